"""Code of the user's own that a config names: datasets, mappers, model parts, to be registered."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def import_modules(cfg: Any) -> list[ModuleType]:
    """Import what ``cfg.DATASETS.MODULES`` names, so that it can register itself.

    A module is imported once per process, however often it is named. Its code runs with the rights
    of the user: name only files that you would run.

    Args:
        cfg: ``DATASETS.MODULES`` holds paths of Python files, relative to the current folder, and
            names of importable modules (``package.module``).

    Returns:
        The modules, in the order in which they are named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module cannot be imported; the message says why and in which line.
    """
    return [_import(str(name)) for name in cfg.DATASETS.MODULES]


def _import(name: str) -> ModuleType:
    is_file = name.endswith(".py") or "/" in name
    if is_file and not Path(name).is_file():
        raise FileNotFoundError(
            f"DATASETS.MODULES names {name}, which does not exist; paths start at the current "
            f"folder, {Path.cwd()}"
        )
    try:
        return _import_file(Path(name).resolve()) if is_file else importlib.import_module(name)
    # Whatever foreign code raises is the user's to see, in one line.
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"DATASETS.MODULES: importing {name} failed: {kind}: {error}{_place(error, name)}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    # Two files of one name are two modules; the same file by two paths is one.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    title = f"gella_module_{path.stem}_{digest}"
    if title in sys.modules:
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]  # a half-made module must not look imported
        raise
    return module


def _place(error: BaseException, name: str) -> str:
    """Line of the module at which it failed, where that is known."""
    own, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(name).name:
            own = trace.tb_lineno
        trace = trace.tb_next
    own = error.lineno if isinstance(error, SyntaxError) else own
    return "" if own is None else f" (line {own})"

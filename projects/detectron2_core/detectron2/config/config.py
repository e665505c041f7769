"""``CfgNode`` with files that inherit (``_BASE_``), and construction of objects from a config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from detectron2.utils.file_io import PathManager
from fvcore.common.config import CfgNode as _FvcoreCfgNode


class CfgNode(_FvcoreCfgNode):
    """A nested, attribute-style config; merging an unknown key raises ``KeyError``.

    Two things differ from fvcore's node: YAML is read with tags allowed (load trusted files
    only), and a file's ``VERSION``, if given, must equal that of the defaults.
    """

    @classmethod
    def _open_cfg(cls, filename: str):
        return PathManager.open(filename, "r")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Merge a YAML file, after the files its ``_BASE_`` names, into this config.

        Raises ``KeyError`` for unknown keys, ``ValueError`` for a wrong type, and
        ``AssertionError`` for a missing file or another version (the errors of Detectron2).
        """
        if not PathManager.isfile(cfg_filename):
            raise AssertionError(f"Config file '{cfg_filename}' does not exist!")
        loaded = type(self)(self.load_yaml_with_base(cfg_filename, allow_unsafe=allow_unsafe))
        version = loaded.get("VERSION", self.VERSION)
        if version != self.VERSION:
            raise AssertionError(f"{cfg_filename}: VERSION {version}, but must be {self.VERSION}")
        self.merge_from_other_cfg(loaded)


def get_cfg() -> CfgNode:
    """Return a fresh, unfrozen copy of the default config."""
    from .defaults import _C

    return _C.clone()


def configurable(init_func: Callable | None = None, *, from_config: Callable | None = None):
    """Let a class or a function be called with a config in place of its arguments.

    On ``__init__``: the class needs a classmethod ``from_config(cls, cfg, ...)`` that returns a
    dict of arguments; then ``C(cfg)``, ``C(cfg, b=1)`` (``b`` overrides) and ``C(a=1, b=2)`` all
    work. On a function: ``@configurable(from_config=f)`` with ``f(cfg, ...)`` likewise.

    Keyword arguments that ``from_config`` does not name go to the target unchanged. Raises
    ``AttributeError``/``TypeError`` on first use if ``from_config`` is absent or not a
    classmethod, or if its first argument is not called ``cfg``.
    """
    if init_func is None:
        return functools.partial(_wrap, from_config) if from_config else configurable
    if getattr(init_func, "__name__", "") != "__init__" or from_config is not None:
        raise AssertionError("@configurable needs from_config on functions other than __init__")

    @functools.wraps(init_func)
    def wrapped(self, *args: Any, **kwargs: Any) -> None:
        hint = f"{type(self).__name__} uses @configurable and must have a classmethod 'from_config'"
        if not hasattr(type(self), "from_config"):
            raise AttributeError(hint)
        if not inspect.ismethod(type(self).from_config):
            raise TypeError(hint)
        _wrap(type(self).from_config, functools.partial(init_func, self))(*args, **kwargs)

    return wrapped


def _wrap(from_config: Callable, target: Callable) -> Callable:
    """Return ``target`` such that a first argument that is a config goes to ``from_config``."""

    def wrapped(*args: Any, **kwargs: Any):
        if not isinstance(args[0] if args else kwargs.get("cfg"), _FvcoreCfgNode):
            return target(*args, **kwargs)
        parameters = inspect.signature(from_config).parameters
        if next(iter(parameters), None) != "cfg":
            raise TypeError(f"{from_config.__qualname__} must take 'cfg' as its first argument.")
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            return target(**from_config(*args, **kwargs))
        understood = {k: v for k, v in kwargs.items() if k in parameters}
        others = {k: v for k, v in kwargs.items() if k not in parameters}
        return target(**{**from_config(*args, **understood), **others})

    return functools.update_wrapper(wrapped, target)

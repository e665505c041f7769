"""Helpers of the tests about datasets: the scripts as modules, and a small prepared dataset."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """A script of the folder datasets/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "datasets" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare_small_shapes(folder: Path) -> Path:
    """Six training and four held-out scenes in all formats, as `prepare_shapes.py` writes them."""
    script("prepare_shapes").prepare(folder, {"train": 6, "val": 4}, seed=2, workers=1)
    return folder


@contextmanager
def registered(register: Any, *args: Any, **options: Any) -> Iterator[str]:
    """Register a dataset under a name of its own, and forget it at the end."""
    name = f"gella_test_{register.__name__}"
    register(name, *args, **options)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

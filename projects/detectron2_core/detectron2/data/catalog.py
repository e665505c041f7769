"""Global tables from dataset names to loading functions and to metadata."""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable
from typing import Any


class _Catalog(UserDict):
    def list(self) -> list[str]:
        """Return the registered names."""
        return list(self.keys())

    def remove(self, name: str) -> None:
        """Delete a name; ``KeyError`` if absent."""
        self.pop(name)


class _DatasetCatalog(_Catalog):
    """Maps a name to a function without arguments that returns the dataset's ``list[dict]``."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Add a dataset; a second registration of the same name is an ``AssertionError``."""
        if not callable(func) or name in self:
            raise AssertionError(
                f"Dataset '{name}': already registered, or {func!r} is no function"
            )
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Call the registered function; ``KeyError`` with the known names if there is none."""
        if name not in self:
            known = ", ".join(self)
            raise KeyError(f"Dataset '{name}' is not registered! Available datasets are: {known}")
        return self[name]()


class Metadata(types.SimpleNamespace):
    """Attributes of one dataset: each may be set again only to an equal value."""

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:  # called only for attributes that are absent
        raise AttributeError(f"metadata of '{self.name}': no '{key}' in {list(self.__dict__)}")

    def __setattr__(self, key: str, value: Any) -> None:
        if not hasattr(self, key):
            super().__setattr__(key, value)
        elif getattr(self, key) != value:
            old = getattr(self, key)
            raise AssertionError(f"metadata of '{self.name}': {key} is {old}, cannot be {value}")

    def as_dict(self) -> dict[str, Any]:
        """Return a shallow copy of all attributes, ``name`` included."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several attributes by the rule of the class; returns itself for chaining."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or ``default`` when it is absent."""
        return getattr(self, key, default)


class _MetadataCatalog(_Catalog):
    """Maps a name to its one ``Metadata`` object, made on first use."""

    def get(self, name: str) -> Metadata:
        """Return the metadata of ``name``; always the same object for the same name."""
        return self.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()

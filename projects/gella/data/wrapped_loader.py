"""A test loader around another one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class WrappedLoader:
    """Has the length and the attributes of the loader in it; who derives from it iterates."""

    def __init__(self, loader: Iterable[list[dict[str, Any]]]) -> None:
        """``loader`` gives lists of mapped dicts."""
        self._loader = loader

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Whatever else the loader has, such as ``dataset`` and ``batch_size``."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

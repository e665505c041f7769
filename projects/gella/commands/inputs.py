"""Pictures that a command line names, each with an id of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """One picture.

    Attributes:
        image_id: its id in what is written.
        path: its file.
        name: of the picture, for people and for files that name it.
        size: (height, width) that it has to have, if known.
    """

    image_id: int | str
    path: Path
    name: str = ""
    size: tuple[int, int] | None = None


def dataset_records(name: str) -> list[dict[str, Any]]:
    """Records of a registered dataset; ValueError for an unknown name lists the known ones."""
    if name not in DatasetCatalog.list():
        known = ", ".join(sorted(n for n in DatasetCatalog.list() if n.startswith("gella_")))
        raise ValueError(f"dataset {name} is not registered; there are: {known}")
    return DatasetCatalog.get(name)


def distinct(sources: Iterable[Source], advice: str) -> list[Source]:
    """The sources, each picture once; ValueError if two pictures have one id.

    Args:
        sources: in any order; a dataset has several records of a picture.
        advice: what to do about two pictures of one id; stands behind the semicolon of the error.
    """
    kept: dict[str, Source] = {}
    for source in sources:
        other = kept.setdefault(str(source.image_id), source)
        if other.path != source.path:
            raise ValueError(
                f"{other.path} and {source.path} have one image id, {source.image_id}; {advice}"
            )
    return list(kept.values())

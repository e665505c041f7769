"""Where the entities of a dataset's images come from: its annotation, files, or a live segmenter.

A source is chosen per dataset by the config key ``INPUT.GELLA.ENTITY_SOURCES``; the mapper then
reads every image's entities through `load_from_record`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gella.entities.entity_map import EntityMap
from gella.entities.files import (
    FORMATS,
    JSON_FORMATS,
    PICTURE_FORMATS,
    entries_by_image,
    forget_files,
    load_entities,
    panoptic_annotation,
)
from gella.utils.io import few, image_key


class EntitySource:
    """Gives the entities of any image of a dataset; a subclass has its own `lead` or `load`."""

    def load(self, record: dict[str, Any], image: np.ndarray | None = None) -> EntityMap:
        """Entities of one image, in the frame of the original picture.

        Args:
            record: dataset dict; `file_name`, `image_id`, `height`, `width` are read.
            image: its picture, uint8 RGB (H, W, 3), where the caller has decoded it already.

        Raises FileNotFoundError or ValueError, naming the image, as `load_entities`.
        """
        return load_from_record(self.lead(record), image)

    def missing(self, records: Iterable[dict[str, Any]]) -> list[Any]:
        """Ids of the images that have no masks here, each once, in the order of `records`.

        No mask is decoded. Sources that make masks on demand miss none.
        """
        return []

    def lead(self, record: dict[str, Any]) -> dict[str, Any]:
        """A copy of a dataset dict whose `entities` lead here; the annotation is at `targets`."""
        return {**record, "entities": {"source": self, "targets": annotation_of(record)}}


class AnnotationSource(EntitySource):
    """The segments that the dataset itself is annotated with: the default."""

    def missing(self, records: Iterable[dict[str, Any]]) -> list[Any]:
        """Images whose mask file does not exist."""
        files = {r["image_id"]: str(annotation_of(r).get("file_name")) for r in records}
        exists = {name: os.path.isfile(name) for name in set(files.values())}
        return [image_id for image_id, name in files.items() if not exists[name]]

    def lead(self, record: dict[str, Any]) -> dict[str, Any]:
        """A copy of a dataset dict that leads to its annotation (again)."""
        return {**record, "entities": annotation_of(record)}


class FileSource(EntitySource):
    """Masks that a segmenter wrote: one JSON for all images, or a folder with a file per image."""

    def __init__(self, path: str | Path, format: str = "auto") -> None:
        """Args:
            path: a JSON file (`JSON_FORMATS`, by image id), or a folder with one ``.npz`` or
                ``.png`` file per image, named like the image file or, failing that, by image id.
            format: one of `FORMATS`, or "auto": by suffix and content.

        Raises:
            FileNotFoundError: there is neither a file nor a folder.
            ValueError: the format is unknown, or does not go with a folder or with a file, or the
                JSON is malformed.
        """
        self.path, self.format = Path(path), format
        if format not in ("auto", *FORMATS):
            raise ValueError(f"unknown entity format {format!r}; known: auto, {', '.join(FORMATS)}")
        if not self.path.exists():
            raise FileNotFoundError(
                f"entity masks {path} do not exist; make them first, or check the path"
            )
        self._folder = self.path.is_dir()
        if not self._folder and self.path.suffix.lower() != ".json":
            raise ValueError(
                f"entity masks {path}: masks of a dataset are one .json file, or a folder with one "
                "file per image; give the folder"
            )
        fitting = PICTURE_FORMATS if self._folder else JSON_FORMATS
        if format not in ("auto", *fitting):
            kind = "folder" if self._folder else "file"
            raise ValueError(
                f"entity masks {path} are a {kind}, but format {format} is not of a {kind}; "
                f"use auto, {', '.join(fitting)}"
            )
        if self._folder:
            names = os.listdir(self.path)
            # By value too: pictures and masks may write one id with and without zeros.
            self._names = {f"{image_key(Path(n).stem)}{Path(n).suffix}": n for n in names}
            self._names.update((name, name) for name in names)
            return
        # As bytes per image: forked processes share them, and would copy what they only look at
        # of objects, whose counts of references they change.
        try:
            self.format, groups = entries_by_image(self.path, self.format)
        except ValueError as error:
            raise ValueError(f"entity file {self.path}: {error}") from error
        parts = [pickle.dumps(entries, pickle.HIGHEST_PROTOCOL) for entries in groups.values()]
        self._bytes, self._ends = b"".join(parts), np.cumsum([0, *map(len, parts)])
        self._numbers = {image_id: k for k, image_id in enumerate(groups)}
        forget_files()  # as objects the entries take 20 times their bytes

    def __str__(self) -> str:
        known = sorted({*self._names.values()}) if self._folder else self._numbers
        return f"{self.path} (it has {few(known)})"

    def missing(self, records: Iterable[dict[str, Any]]) -> list[Any]:
        """Images without an entry in the JSON, or without a file in the folder.

        Raises ValueError when two images of a folder would share one file.
        """
        absent: dict[Any, None] = {}
        owners: dict[str, str] = {}
        for record in records:
            masks = self._masks_of(record)
            if masks is None:
                absent[record["image_id"]] = None
            elif self._folder:
                owner = owners.setdefault(masks["file_name"], record["file_name"])
                if owner != record["file_name"]:
                    raise ValueError(
                        f"images {owner} and {record['file_name']} would share the entity file "
                        f"{masks['file_name']}; use a .json file, which goes by image id"
                    )
        return list(absent)

    def lead(self, record: dict[str, Any]) -> dict[str, Any]:
        """A copy of a dataset dict whose `entities` say `format` and `file_name` of its masks.

        Entries of a JSON come along as `segments_info`, so that nobody reads the file again.

        Raises ValueError for an image that has none, naming it and the file.
        """
        masks = self._masks_of(record)
        if masks is None:
            raise ValueError(f"image {record['image_id']}: no masks in {self}")
        return {**record, "entities": {**masks, "targets": annotation_of(record)}}

    def _masks_of(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """What a record's `entities` say of its image; None if there is nothing of it."""
        image_id = image_key(record["image_id"])
        if self._folder:
            auto = self.format == "auto"
            suffixes = (".npz", ".png") if auto else (f".{self.format.split('_')[-1]}",)
            # Segmenters name their files after pictures; COCO's own tools after ids.
            stem = Path(record["file_name"]).stem
            stems = (stem, image_key(stem), str(record["image_id"]), image_id)
            names = [stem + suffix for stem in stems for suffix in suffixes]
            name = next((self._names[name] for name in names if name in self._names), None)
            if name is None:
                return None
            return {"format": self.format, "file_name": str(self.path / name)}
        if image_id not in self._numbers:
            return None
        start, end = self._ends[self._numbers[image_id] :][:2]
        entries = pickle.loads(memoryview(self._bytes)[start:end])
        if self.format != "coco_panoptic":
            return {"format": self.format, "file_name": str(self.path), "segments_info": entries}
        try:
            picture, segments = panoptic_annotation(self.path, entries[0])
        except ValueError as error:
            raise ValueError(f"image {image_id}, entity file {self.path}: {error}") from error
        return {"format": "panoptic_png", "file_name": str(picture), "segments_info": segments}


class LiveSource(EntitySource):
    """A segmenter that looks at the picture when its entities are asked for.

    It runs where the mapper runs: in the loader's worker processes, unless
    ``DATALOADER.NUM_WORKERS`` is 0. Masks made once and read from a file cost less per epoch.
    """

    def __init__(self, segment: Callable[[np.ndarray], EntityMap]) -> None:
        """``segment``: from uint8 RGB (H, W, 3) to the entities of that size."""
        self._segment = segment

    def load(self, record: dict[str, Any], image: np.ndarray | None = None) -> EntityMap:
        """See `EntitySource.load`; `image` has to be given.

        Raises ValueError without it, and when the segmenter finds nothing.
        """
        if image is None:
            raise ValueError(f"image {record['image_id']}: a live segmenter needs the picture")
        entities = self._segment(image)
        if entities.num_entities == 0:
            raise ValueError(
                f"image {record['image_id']} ({record['file_name']}): the segmenter found no "
                "entity; lower its thresholds or leave the image out"
            )
        return entities


# By the second part of an entry of INPUT.GELLA.ENTITY_SOURCES: what makes a source of the third.
SOURCE_KINDS: dict[str, Callable[[str], EntitySource]] = {
    "annotation": lambda path: AnnotationSource(),
    "auto": FileSource,
    **{kind: partial(FileSource, format=kind) for kind in FORMATS},
}


def source_for(entries: Sequence[Sequence[str]], dataset_name: str) -> EntitySource:
    """The source that a config chooses for a dataset; its annotation where no entry fits.

    Arguments and errors as `entry_for`, and what the source raises. Datasets of one file get one
    source.
    """
    entry = entry_for(entries, dataset_name)
    if entry is None:
        return AnnotationSource()
    _, kind, path = entry
    status = os.stat(path) if os.path.exists(path) else None
    return _made(kind, path, status and (status.st_mtime_ns, status.st_size))


def entry_for(entries: Sequence[Sequence[str]], dataset_name: str) -> Sequence[str] | None:
    """The entry of ``INPUT.GELLA.ENTITY_SOURCES`` that counts for a dataset, if any.

    Args:
        entries: (dataset name or shell pattern, kind, path) each; the first that fits counts.
            Kinds are those of `SOURCE_KINDS`.
        dataset_name: the dataset.

    Raises ValueError for an entry of another form or an unknown kind.
    """
    for entry in entries:
        if isinstance(entry, str) or len(entry) != 3 or not all(isinstance(p, str) for p in entry):
            raise ValueError(
                f"INPUT.GELLA.ENTITY_SOURCES has {entry!r}; each entry is [dataset, kind, path], "
                "for instance ['gella_shapes_png_val', 'auto', 'masks.json']"
            )
        if entry[1] not in SOURCE_KINDS:
            raise ValueError(
                f"INPUT.GELLA.ENTITY_SOURCES: kind {entry[1]!r} of {entry[0]} is unknown; known: "
                f"{', '.join(SOURCE_KINDS)}"
            )
    # All entries were checked first: a mistake in one that is not reached would show up late.
    return next((entry for entry in entries if fnmatchcase(dataset_name, entry[0])), None)


@lru_cache(maxsize=4)
def _made(kind: str, path: str, changed: tuple[int, int] | None) -> EntitySource:
    # Datasets that share a file share its index, which may be large.
    return SOURCE_KINDS[kind](path)


def load_from_record(record: dict[str, Any], image: np.ndarray | None = None) -> EntityMap:
    """Entities of a dataset dict, as its `entities` key describes them.

    Args:
        record: `entities` holds `file_name`, optionally `format` and `segments_info`, or else
            `source`, an `EntitySource`; `height`, `width` and `image_id` are those of the image.
        image: the decoded picture, for sources that look at it.

    Raises what `load_entities` raises, and KeyError when the record has no `entities`.
    """
    masks = record.get("entities") or {}
    if "source" in masks:
        return masks["source"].load(record, image)
    if "file_name" not in masks:
        raise KeyError(
            f"image {record.get('image_id')}: the record has no entities with a file_name; every "
            "image needs masks"
        )
    return load_entities(
        masks["file_name"],
        record["height"],
        record["width"],
        format=masks.get("format", "auto"),
        segments_info=masks.get("segments_info"),
        image_id=record.get("image_id"),
    )


def annotation_of(record: dict[str, Any]) -> dict[str, Any]:
    """Where the annotation's own masks are: `entities`, or its `targets` where it leads away."""
    return record["entities"].get("targets") or record["entities"]

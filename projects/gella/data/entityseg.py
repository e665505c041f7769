"""EntitySeg: images of any domain with entity masks, and generated captions (docs/FORMATS.md 4)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gella.data.narratives import with_captions
from gella.data.panoptic import load_instances
from gella.data.records import STOP, Place, Problems, RecordStore


def load_entityseg(
    instances_json: str | Path,
    captions_jsonl: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("describe", "extract"),
    problems: Problems = STOP,
) -> RecordStore:
    """Read generated captions over COCO-style entity masks, one dataset dict per caption.

    Arguments, dicts and errors are those of `load_instances` and `with_captions`. EntitySeg's
    images come in several folders, while the annotation names files without them: files are looked
    for below ``image_root``, and one that occurs in several folders is a ValueError.
    """
    images = load_instances(instances_json, image_root, tasks, problems=problems)
    folders, names = Place(image_root, "folders"), [record["file_name"] for record in images]
    places = problems.attempt("duplicate-image", folders, locate_images, image_root, names) or {}
    moved = RecordStore()
    for record in images:
        name = record["file_name"]
        moved.share({**record, "file_name": places.get(name, name)})
    return with_captions(moved, captions_jsonl, instances_json, problems)


def locate_images(image_root: str | Path, file_names: Iterable[str]) -> dict[str, str]:
    """For every path of an image the one at which there is a file.

    That is itself, or the only one of this name below the root; itself too when there is none, for
    the error comes when it is read. ValueError where two folders hold a file of that name.
    """
    paths: dict[str, str] = {}
    index: dict[str, list[str]] | None = None
    for name in file_names:
        paths[name] = name
        if os.path.isfile(name):
            continue
        if index is None:  # walking tens of thousands of files only if it is needed
            index = {}
            for folder, _, files in os.walk(image_root):
                for file in files:
                    index.setdefault(file, []).append(os.path.join(folder, file))
        options = index.get(os.path.basename(name), [])
        if len(options) > 1:
            raise ValueError(
                f"{os.path.basename(name)} lies in {len(options)} folders below {image_root}, for "
                f"instance {options[0]} and {options[1]}; keep the copy that the annotation is of"
            )
        paths[name] = options[0] if options else name
    return paths

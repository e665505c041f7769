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

    Args:
        instances_json: ``images`` and ``annotations`` with RLE or polygons; the class labels are
            not used.
        captions_jsonl: lines ``{image_id, file_name, description, nouns, model, prompt_id}``.
        image_root: folder of the images. EntitySeg's come in several folders, while the annotation
            names files without them: files are looked for below this folder.
        tasks: what the records can train and serve.
        problems: what becomes of what is wrong.

    Returns:
        Dicts as `gella.data.panoptic.load_instances` with what `with_captions` adds.

    Raises:
        FileNotFoundError: one of the two annotation files is missing.
        ValueError: as those two, or a file name occurs in several folders.
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
    """Where images are that may lie in any folder below a root.

    Args:
        image_root: the root.
        file_names: paths of images, below the root as the annotation has them.

    Returns:
        For every path the one at which there is a file: itself, or the only one of this name below
        the root; itself too when there is none, for the error comes when it is read.

    Raises:
        ValueError: two folders hold a file of that name.
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

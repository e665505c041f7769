"""COCO panoptic files as dataset dicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gella.data.reading import field, listed, read_json, whole
from gella.data.record_store import RecordStore

__all__ = [
    "categories_of",
    "category_metadata",
    "image_fields",
    "images_by_id",
    "load_coco_panoptic",
    "read_categories",
]


def read_categories(panoptic_json: str | Path) -> list[dict[str, Any]]:
    """Return the categories of a panoptic file, in its order.

    Raises:
        ValueError: there is no ``categories``, or an id occurs twice.
    """
    return categories_of(read_json(panoptic_json), panoptic_json)


def categories_of(content: Any, path: str | Path) -> list[dict[str, Any]]:
    """`read_categories` of a file's content; ``path`` is for errors."""
    categories = []
    for place, category in enumerate(listed(content, "categories", path, "the file")):
        where = f"entry {place} of 'categories'"
        for name in ("name", "isthing"):
            field(category, name, path, where)
        number = whole(category, "id", path, where)
        if category["isthing"] not in (0, 1):
            raise ValueError(
                f"{path}: category {number}: isthing is {category['isthing']!r}, not 0 or 1"
            )
        categories.append({**category, "id": number})
    seen: set[int] = set()
    for category in categories:
        if category["id"] in seen:
            raise ValueError(f"{path}: category id {category['id']} occurs twice")
        seen.add(category["id"])
    return categories


def category_metadata(categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what Detectron2's metadata holds about panoptic categories.

    Contiguous ids count through the categories in their order, from 0, for things and stuff
    together (Detectron2's "standard" panoptic form); classes and colours follow them.
    """
    names = [category["name"] for category in categories]
    colors = [list(category.get("color", (128, 128, 128))) for category in categories]
    order = {category["id"]: k for k, category in enumerate(categories)}
    things = {category["id"] for category in categories if category["isthing"]}
    return {
        "categories": categories,
        "thing_classes": names,
        "stuff_classes": names,
        "thing_colors": colors,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {i: k for i, k in order.items() if i in things},
        "stuff_dataset_id_to_contiguous_id": {i: k for i, k in order.items() if i not in things},
    }


def load_coco_panoptic(
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("ground", "panoptic"),
) -> RecordStore:
    """Read COCO panoptic annotations, one dataset dict per annotated image.

    Args:
        panoptic_json: ``images``, ``annotations`` and ``categories`` (docs/FORMATS.md 1).
        panoptic_root: folder of the PNG files.
        image_root: folder of the images.
        tasks: what the records can train and serve.

    Returns:
        Dicts ``file_name, image_id, height, width, tasks, entities``; ``entities`` is
        ``{"format": "panoptic_png", "file_name", "segments_info"}``, crowd segments included.
        ``category_id`` stays the dataset's own id, and ``isthing`` (bool) is added to segments.
        Neither images nor PNG files are opened.

    Raises:
        FileNotFoundError: ``panoptic_json`` is missing.
        ValueError: a field is missing or of another type, an annotation is of an unknown image or
            category, or an id occurs twice; the message names the file and the image.
    """
    path = panoptic_json
    content = read_json(path)
    isthing = {c["id"]: bool(c["isthing"]) for c in categories_of(content, path)}
    images = images_by_id(content, path)
    annotations = listed(content, "annotations", path, "the file")
    store = RecordStore()
    done: set[str] = set()
    for place, annotation in enumerate(annotations):
        image_id = str(field(annotation, "image_id", path, f"annotation {place}"))
        if image_id not in images:
            raise ValueError(f"{path}: image {image_id} is annotated but not in 'images'")
        if image_id in done:
            raise ValueError(f"{path}: image {image_id} is annotated twice; keep one annotation")
        done.add(image_id)
        where = f"image {image_id}"
        name = str(field(annotation, "file_name", path, where))
        fields = {
            **image_fields(images[image_id], path, image_root, tasks),
            "entities": {
                "format": "panoptic_png",
                "file_name": os.path.join(panoptic_root, name),
                "segments_info": _segments(annotation, isthing, path),
            },
        }
        store.add(store.share(fields))
        annotations[place] = None  # a large file: what is stored need not stay here too
    if not len(store):
        raise ValueError(f"{path}: there is no annotation in it; nothing to train or evaluate")
    return store


def images_by_id(content: Any, path: str | Path) -> dict[str, dict[str, Any]]:
    """The ``images`` of a COCO-style file by id as text; ValueError when an id occurs twice."""
    images: dict[str, dict[str, Any]] = {}
    for place, image in enumerate(listed(content, "images", path, "the file")):
        image_id = str(field(image, "id", path, f"entry {place} of 'images'"))
        if image_id in images:
            raise ValueError(f"{path}: image id {image_id} occurs twice in 'images'")
        images[image_id] = image
    return images


def image_fields(
    image: dict[str, Any], path: str | Path, image_root: str | Path, tasks: tuple[str, ...]
) -> dict[str, Any]:
    """What every dataset dict says of its image: file, id, size, tasks."""
    where = f"image {image['id']}"
    return {
        "file_name": os.path.join(image_root, str(field(image, "file_name", path, where))),
        "image_id": image["id"],
        "height": whole(image, "height", path, where, least=1),
        "width": whole(image, "width", path, where, least=1),
        "tasks": tuple(tasks),
    }


def _segments(
    annotation: dict[str, Any], isthing: dict[int, bool], path: str | Path
) -> list[dict[str, Any]]:
    where = f"image {annotation['image_id']}"
    segments, seen = [], set()
    for segment in listed(annotation, "segments_info", path, where):
        segment_id = whole(segment, "id", path, f"{where}, a segment", least=1)  # 0 is void
        category = whole(segment, "category_id", path, f"{where}, segment {segment_id}")
        if category not in isthing:
            raise ValueError(
                f"{path}: {where}, segment {segment_id}: category {category} is not among the "
                f"{len(isthing)} of the file"
            )
        if segment_id in seen:
            raise ValueError(f"{path}: {where} has segment id {segment_id} twice")
        seen.add(segment_id)
        _check_measures(segment, path, f"{where}, segment {segment_id}")
        own = {"id": segment_id, "category_id": category, "isthing": isthing[category]}
        segments.append({"iscrowd": 0, **segment, **own})
    return segments


def _check_measures(segment: dict[str, Any], path: str | Path, where: str) -> None:
    """Refuse what would fail in the middle of an evaluation: numbers that are text or NaN."""
    if segment.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"{path}: {where}: iscrowd is {segment['iscrowd']!r}, not 0 or 1")
    area = segment.get("area", 0)
    if type(area) not in (int, float) or not area >= 0:
        raise ValueError(f"{path}: {where}: area is {area!r}, not a number of pixels")
    box = segment.get("bbox")
    if box is not None and (
        not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4
    ):
        raise ValueError(f"{path}: {where}: bbox is {box!r}, not [x, y, width, height]")

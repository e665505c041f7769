"""COCO panoptic files as dataset dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gella.data.reading import field, read_json

__all__ = ["category_metadata", "load_coco_panoptic", "read_categories"]


def read_categories(panoptic_json: str | Path) -> list[dict[str, Any]]:
    """Return the categories of a panoptic file, in its order.

    Raises:
        ValueError: there is no ``categories``, or an id occurs twice.
    """
    return _categories(read_json(panoptic_json), panoptic_json)


def _categories(content: Any, path: str | Path) -> list[dict[str, Any]]:
    categories = list(field(content, "categories", path, "the file"))
    for category in categories:
        for name in ("id", "name", "isthing"):
            field(category, name, path, "a category")
    ids = [category["id"] for category in categories]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path}: a category id occurs twice; ids must be unique")
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
) -> list[dict[str, Any]]:
    """Read COCO panoptic annotations, one dataset dict per annotated image.

    Args:
        panoptic_json: ``images``, ``annotations`` and ``categories`` (FORMATS section 1).
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
        ValueError: a field is missing, an annotation is of an unknown image or category, or a
            segment id occurs twice; the message names the file and the image.
    """
    path = panoptic_json
    content = read_json(path)
    isthing = {c["id"]: bool(c["isthing"]) for c in _categories(content, path)}
    images = {
        field(image, "id", path, "an image"): image
        for image in field(content, "images", path, "the file")
    }
    records = []
    for annotation in field(content, "annotations", path, "the file"):
        image_id = field(annotation, "image_id", path, "an annotation")
        if image_id not in images:
            raise ValueError(f"{path}: image {image_id} is annotated but not in 'images'")
        image = images[image_id]
        where = f"image {image_id}"
        records.append(
            {
                "file_name": str(Path(image_root) / field(image, "file_name", path, where)),
                "image_id": image_id,
                "height": int(field(image, "height", path, where)),
                "width": int(field(image, "width", path, where)),
                "tasks": tuple(tasks),
                "entities": {
                    "format": "panoptic_png",
                    "file_name": str(
                        Path(panoptic_root) / field(annotation, "file_name", path, where)
                    ),
                    "segments_info": _segments(annotation, isthing, path),
                },
            }
        )
    if not records:
        raise ValueError(f"{path}: there is no annotation in it; nothing to train or evaluate")
    return records


def _segments(
    annotation: dict[str, Any], isthing: dict[int, bool], path: str | Path
) -> list[dict[str, Any]]:
    where = f"image {annotation['image_id']}"
    segments, seen = [], set()
    for segment in field(annotation, "segments_info", path, where):
        segment_id = field(segment, "id", path, where)
        category = field(segment, "category_id", path, where)
        if category not in isthing:
            raise ValueError(
                f"{path}: {where}, segment {segment_id}: category {category} is not among the "
                f"{len(isthing)} of the file"
            )
        if segment_id in seen:
            raise ValueError(f"{path}: {where} has segment id {segment_id} twice")
        seen.add(segment_id)
        segments.append({"iscrowd": 0, **segment, "isthing": isthing[category]})
    return segments

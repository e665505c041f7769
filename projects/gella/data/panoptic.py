"""COCO's annotation files as dataset dicts: panoptic segments, and objects with outlines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gella.data.records import Place, RecordStore, read_json

__all__ = [
    "categories_of",
    "category_metadata",
    "image_fields",
    "images_by_id",
    "load_coco_panoptic",
    "load_instances",
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
    categories: dict[int, dict[str, Any]] = {}
    for number, category in enumerate(Place(path).listed(content, "categories")):
        entry = Place(path, f"entry {number} of 'categories'")
        for name in ("name", "isthing"):
            entry.field(category, name)
        category_id = entry.whole(category, "id")
        if category["isthing"] not in (0, 1):
            raise ValueError(
                f"{path}: category {category_id}: isthing is {category['isthing']!r}, not 0 or 1"
            )
        if category_id in categories:
            raise ValueError(f"{path}: category id {category_id} occurs twice")
        categories[category_id] = {**category, "id": category_id}
    return list(categories.values())


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
    annotations = Place(path).listed(content, "annotations")
    store = RecordStore()
    done: set[str] = set()
    for number, annotation in enumerate(annotations):
        image_id = Place(path, f"annotation {number}").key(annotation, "image_id")
        if image_id not in images:
            raise ValueError(f"{path}: image {image_id} is annotated but not in 'images'")
        if image_id in done:
            raise ValueError(f"{path}: image {image_id} is annotated twice; keep one annotation")
        done.add(image_id)
        place = Place(path, f"image {image_id}")
        entities = {
            "format": "panoptic_png",
            "file_name": os.path.join(panoptic_root, place.key(annotation, "file_name")),
            "segments_info": _segments(annotation, isthing, place),
        }
        fields = image_fields(images[image_id], path, image_root, tasks)
        store.add(store.share({**fields, "entities": entities}))
        annotations[number] = None  # a large file: what is stored need not stay here too
    if not len(store):
        raise ValueError(f"{path}: there is no annotation in it; nothing to train or evaluate")
    return store


def images_by_id(content: Any, path: str | Path) -> dict[str, dict[str, Any]]:
    """The ``images`` of a COCO-style file by id as text; ValueError when an id occurs twice."""
    images: dict[str, dict[str, Any]] = {}
    for number, image in enumerate(Place(path).listed(content, "images")):
        image_id = Place(path, f"entry {number} of 'images'").key(image, "id")
        if image_id in images:
            raise ValueError(f"{path}: image id {image_id} occurs twice in 'images'")
        images[image_id] = image
    return images


def image_fields(
    image: dict[str, Any], path: str | Path, image_root: str | Path, tasks: tuple[str, ...]
) -> dict[str, Any]:
    """What every dataset dict says of its image: file, id, size, tasks."""
    place = Place(path, f"image {image['id']}")
    return {
        "file_name": os.path.join(image_root, place.key(image, "file_name")),
        "image_id": image["id"],
        "height": place.whole(image, "height", least=1),
        "width": place.whole(image, "width", least=1),
        "tasks": tuple(tasks),
    }


def _segments(
    annotation: dict[str, Any], isthing: dict[int, bool], image: Place
) -> list[dict[str, Any]]:
    segments: dict[int, dict[str, Any]] = {}
    for segment in image.listed(annotation, "segments_info"):
        # 0 is void
        number = Place(image.path, f"{image.where}, a segment").whole(segment, "id", least=1)
        place = Place(image.path, f"{image.where}, segment {number}")
        category = place.whole(segment, "category_id")
        if category not in isthing:
            raise place.error(f"category {category} is not among the {len(isthing)} of the file")
        if number in segments:
            raise ValueError(f"{image.path}: {image.where} has segment id {number} twice")
        # Numbers that are text or NaN would fail in the middle of an evaluation.
        if segment.get("iscrowd", 0) not in (0, 1):
            raise place.error(f"iscrowd is {segment['iscrowd']!r}, not 0 or 1")
        area, box = segment.get("area", 0), segment.get("bbox", [0, 0, 0, 0])
        if type(area) not in (int, float) or not area >= 0:
            raise place.error(f"area is {area!r}, not a number of pixels")
        if box is not None and (
            not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4
        ):
            raise place.error(f"bbox is {box!r}, not [x, y, width, height]")
        own = {"id": number, "category_id": category, "isthing": isthing[category]}
        segments[number] = {"iscrowd": 0, **segment, **own}
    return list(segments.values())


def load_instances(
    path: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...],
    *,
    names_of_2017: bool = False,
) -> RecordStore:
    """Read a COCO-style instance annotation, one dataset dict per image; labels are kept, unused.

    Args:
        path: ``images`` and ``annotations`` with a ``segmentation`` each: polygons, RLE or both.
        image_root: folder of the images.
        tasks: what the records can train and serve.
        names_of_2017: images are named ``000000000009.jpg``, as in COCO 2017, and not
            ``COCO_train2014_000000000009.jpg``, as the file says; the pictures are the same.

    Returns:
        Dicts with ``entities`` ``{"format": "coco_instances", "file_name": path,
        "segments_info"}``; images without annotations are among them. Crowd annotations stay in
        ``segments_info``, although they are no entities.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is missing or of another type, an image has an id twice, or an
            annotation is of an unknown image; the message names the file and the record.
    """
    content = read_json(path)
    images = images_by_id(content, path)
    segments: dict[str, list[dict[str, Any]]] = {image_id: [] for image_id in images}
    seen: set[tuple[str, int]] = set()  # joined files may number each part's objects from 1
    for place, annotation in enumerate(Place(path).listed(content, "annotations")):
        number = Place(path, f"annotation {place}").whole(annotation, "id")
        where = f"annotation {number}"
        image_id = Place(path, where).key(annotation, "image_id")
        if image_id not in images:
            raise ValueError(f"{path}: {where} is of unknown image {image_id}")
        if (image_id, number) in seen:
            raise ValueError(f"{path}: image {image_id} has annotation id {number} twice")
        seen.add((image_id, number))
        Place(path, f"image {image_id}, {where}").field(annotation, "segmentation")
        segments[image_id].append({**annotation, "id": number, "isthing": True})
    store = RecordStore()
    for image_id, image in images.items():
        fields = image_fields(image, path, image_root, tasks)
        if names_of_2017:
            name = f"{Place(path, 'an image').whole(image, 'id'):012d}.jpg"
            fields["file_name"] = os.path.join(image_root, name)
        objects = segments.pop(image_id)
        entities = {"format": "coco_instances", "file_name": str(path), "segments_info": objects}
        store.add(store.share({**fields, "entities": entities}))
    return store

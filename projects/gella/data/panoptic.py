"""COCO's annotation files as dataset dicts: panoptic segments, and objects with outlines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gella.data.records import STOP, Place, Problems, RecordStore, read_json


def read_categories(path: str | Path, content: Any = None) -> list[dict[str, Any]]:
    """Return the categories of a panoptic file, or of one that lists them alone, in its order.

    Args:
        path: the file.
        content: what it holds, where that is known.

    Raises:
        ValueError: there is no ``categories``, or an id or a name occurs twice.
    """
    content = read_json(path) if content is None else content
    if isinstance(content, list):
        content = {"categories": content}
    categories: dict[int, dict[str, Any]] = {}
    names: dict[str, int] = {}
    for number, category in enumerate(Place(path).listed(content, "categories")):
        place = Place(path, f"entry {number} of 'categories'")
        place.field(category, "isthing")
        category_id, name = place.whole(category, "id"), place.text(category, "name")
        if category["isthing"] not in (0, 1):
            isthing = category["isthing"]
            place.wrong("field", f"category {category_id}: isthing is {isthing!r}, not 0 or 1")
        if category_id in categories:
            place.wrong("field", f"category id {category_id} occurs twice")
        # A prompt, a score and a colour go by the name.
        if (other := names.setdefault(name.strip().lower(), category_id)) != category_id:
            place.wrong("field", f"categories {other} and {category_id} are both named {name!r}")
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
    problems: Problems = STOP,
) -> RecordStore:
    """Read COCO panoptic annotations, one dataset dict per annotated image.

    Args:
        panoptic_json: ``images``, ``annotations`` and ``categories`` (docs/FORMATS.md 1).
        panoptic_root: folder of the PNG files.
        image_root: folder of the images.
        tasks: what the records can train and serve.
        problems: what becomes of what is wrong.

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
    file = Place(panoptic_json, problems=problems)
    for figure in ("images", "segments", "crowd segments"):
        problems.count(figure, 0)
    content = file.read(read_json)
    if content is None:
        return RecordStore()
    categories = problems.attempt("categories", file, read_categories, panoptic_json, content)
    isthing = None if categories is None else {c["id"]: bool(c["isthing"]) for c in categories}
    images = _images(content, file, image_root, tasks)
    return _annotated(content, file, images, isthing, panoptic_root)


def _annotated(
    content: Any,
    file: Place,
    images: dict[str, dict[str, Any] | None],
    isthing: dict[int, bool] | None,
    panoptic_root: str | Path,
) -> RecordStore:
    store, done = RecordStore(), set()
    annotations = file.listed(content, "annotations")
    for number, annotation in enumerate(annotations):
        image_id = _owner(annotation, file.at(f"annotation {number}"), images)
        if image_id is None:
            continue
        place = file.at(f"image {image_id}")
        if image_id in done:
            place.wrong("duplicate-annotation", "it is annotated twice; keep one annotation")
            continue
        done.add(image_id)
        # Without a name a check looks for the usual one, and may find more that is wrong.
        name = place.key(annotation, "file_name")
        entities = {
            "format": "panoptic_png",
            "file_name": os.path.join(panoptic_root, name or f"{image_id}.png"),
            "segments_info": _segments(annotation, isthing, place),
        }
        store.add(store.share({**(images[image_id] or {}), "entities": entities}))
        annotations[number] = None  # a large file: what is stored need not stay here too
    for image_id, fields in images.items():
        if fields and image_id not in done:
            file.at(f"image {image_id}").note("unannotated", "it has no annotation")
    file.problems.count("images", len(store))
    if not annotations:  # else a run would start, and fail at its first batch
        file.wrong("empty", "there is no annotation in it; nothing to train or evaluate")
    return store


def _images(
    content: Any, file: Place, image_root: str | Path, tasks: tuple[str, ...]
) -> dict[str, dict[str, Any] | None]:
    """What dataset dicts say of the images of a COCO-style file, by `image_key`; None if wrong."""
    images: dict[str, dict[str, Any] | None] = {}
    for number, image in enumerate(file.listed(content, "images")):
        image_id = file.at(f"entry {number} of 'images'").image_id(image, "id")
        if image_id is None:
            continue
        place = file.at(f"image {image_id}")
        if image_id in images:
            place.wrong("duplicate-image", f"image id {image_id} occurs twice in 'images'")
            continue
        name = place.key(image, "file_name")
        height, width = (place.whole(image, side, least=1) for side in ("height", "width"))
        images[image_id] = None
        if None not in (name, height, width):
            fields = {"file_name": os.path.join(image_root, name), "image_id": image["id"]}
            images[image_id] = {**fields, "height": height, "width": width, "tasks": tuple(tasks)}
    return images


def _owner(annotation: Any, place: Place, images: dict[str, dict[str, Any] | None]) -> str | None:
    """The image id of an annotation, as `image_key` has it, if it is of a sound image there."""
    image_id = place.image_id(annotation)
    if image_id is not None and image_id not in images:
        place.stranger([annotation], images, "'images'")
    return image_id if image_id is not None and images.get(image_id) else None


def _segments(
    annotation: Any, isthing: dict[int, bool] | None, image: Place
) -> list[dict[str, Any]]:
    segments: dict[int, dict[str, Any]] = {}
    for segment in image.listed(annotation, "segments_info"):
        number = image.at(f"{image.where}, a segment").whole(segment, "id", least=1)  # 0 is void
        if number is None:
            continue
        place = image.at(f"{image.where}, segment {number}")
        if number in segments:
            place.wrong("duplicate-segment", f"the id {number} occurs twice in the image")
            continue
        category = place.whole(segment, "category_id")
        if category is not None and isthing is not None and category not in isthing:
            known = f"is not among the {len(isthing)} of the file"
            place.wrong("unknown-category", f"category {category} {known}")
        # Numbers that are text or NaN would fail in the middle of an evaluation.
        area, box, crowd = segment.get("area"), segment.get("bbox"), segment.get("iscrowd", 0)
        if crowd not in (0, 1):
            place.wrong("field", f"iscrowd is {crowd!r}, not 0 or 1")
        if area == 0:
            place.note("zero-area", "area is 0", "error")
        elif area is not None and (type(area) not in (int, float) or not area > 0):
            place.wrong("zero-area", f"area is {area!r}, not a number of pixels")
        if box is not None and (
            not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4
        ):
            place.wrong("field", f"bbox is {box!r}, not [x, y, width, height]")
        # Whoever reads segments later need not ask whether the file says iscrowd.
        own = {"id": number, "category_id": category, "isthing": (isthing or {}).get(category)}
        segments[number] = {"iscrowd": 0, **segment, **own}
        image.problems.count("crowd segments", int(bool(crowd)))
    image.problems.count("segments", len(segments))
    return list(segments.values())


def load_instances(
    path: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...],
    *,
    names_of_2017: bool = False,
    problems: Problems = STOP,
) -> RecordStore:
    """Read a COCO-style instance annotation, one dataset dict per image; labels are kept, unused.

    Args:
        path: ``images`` and ``annotations`` with a ``segmentation`` each: polygons, RLE or both.
        image_root, tasks, problems: as of `load_coco_panoptic`, whose errors there are.
        names_of_2017: images are named ``000000000009.jpg``, as in COCO 2017, and not
            ``COCO_train2014_000000000009.jpg``, as the file says; the pictures are the same.

    Returns:
        Dicts with ``entities`` ``{"format": "coco_instances", "file_name": path,
        "segments_info"}``; images without annotations are among them. Crowd annotations stay in
        ``segments_info``, although they are no entities.
    """
    file, store = Place(path, problems=problems), RecordStore()
    content = file.read(read_json)
    images = {} if content is None else _images(content, file, image_root, tasks)
    objects = {} if content is None else _objects(content, file, images)
    for image_id, fields in images.items():
        if fields is None:
            continue
        if names_of_2017 and image_id.isdecimal():
            fields["file_name"] = os.path.join(image_root, f"{int(image_id):012d}.jpg")
        own = list(objects.pop(image_id).values())
        entities = {"format": "coco_instances", "file_name": str(path), "segments_info": own}
        store.add(store.share({**fields, "entities": entities}))
    return store


def _objects(
    content: Any, file: Place, images: dict[str, dict[str, Any] | None]
) -> dict[str, dict[int, dict[str, Any]]]:
    """The objects of every image, by `image_key` and by their own ids."""
    objects: dict[str, dict[int, dict[str, Any]]] = {image_id: {} for image_id in images}
    for number, annotation in enumerate(file.listed(content, "annotations")):
        object_id = file.at(f"annotation {number}").whole(annotation, "id")
        owner = _owner(annotation, file.at(f"annotation {object_id}"), images)
        if object_id is None or owner is None:
            continue
        place = file.at(f"image {owner}, annotation {object_id}")
        if object_id in objects[owner]:  # joined files may number each part's objects from 1
            said = f"annotation id {object_id} occurs twice in image {owner}"
            place.wrong("duplicate-segment", said)
            continue
        outline = place.field(annotation, "segmentation")
        entry = {**annotation, "segmentation": outline, "id": object_id, "isthing": True}
        objects[owner][object_id] = entry
    file.problems.count("annotated images", sum(bool(own) for own in objects.values()))
    file.problems.count("objects", sum(len(own) for own in objects.values()))
    return objects

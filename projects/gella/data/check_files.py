"""Checks of annotation files that go on after the first problem, unlike the readers."""

from __future__ import annotations

import os
from typing import Any

from gella.data.check_pixels import ImageJob
from gella.data.check_report import Report
from gella.data.coco_panoptic import categories_of
from gella.data.reading import field, listed, read_json, whole

__all__ = ["check_instances", "check_panoptic"]

Jobs = dict[str, ImageJob]
Images = dict[str, tuple[str, tuple[int, int]] | None]


def check_panoptic(report: Report, metadata: Any) -> Jobs:
    """Look through a panoptic JSON (docs/FORMATS.md 1).

    Args:
        report: takes the findings, and the figures "images" (annotated ones), "segments" and
            "crowd segments".
        metadata: ``panoptic_json``, ``panoptic_root``, ``image_root``.

    Returns:
        A job for every annotated image by its id as text, for `check_pixels.check_image`.
    """
    path = metadata.panoptic_json
    report.start("images", "segments", "crowd segments")
    content = report.attempt("file", path, "the file", read_json, path)
    if content is None:
        return {}
    images = _images(report, content, path)
    ids = report.attempt(
        "categories", path, "the file", lambda: {c["id"] for c in categories_of(content, path)}
    )
    jobs: Jobs = {}
    for place, annotation in enumerate(_list(report, content, "annotations", path)):
        image_id = _image_of(report, annotation, path, f"annotation {place}", images)
        said = None if image_id is None else images[image_id]
        if image_id is None or said is None:
            continue
        where = f"image {image_id}"
        if image_id in jobs:
            report.add("duplicate-annotation", path, where, "is annotated twice")
            continue
        segments = _panoptic_segments(report, annotation, path, where, ids)
        name = report.attempt("field", path, where, _name_of, annotation, "file_name", path, where)
        image = os.path.join(metadata.image_root, said[0])
        png = os.path.join(metadata.panoptic_root, name or f"{image_id}.png")
        jobs[image_id] = ImageJob(image_id, image, said[1], str(path), png, segments)
    for image_id in images:
        if image_id not in jobs and images[image_id]:
            report.add("unannotated", path, f"image {image_id}", "has no annotation", "warning")
    report.count("images", len(jobs))
    return jobs


def _panoptic_segments(
    report: Report, annotation: Any, path: str, where: str, categories: set[int] | None
) -> list[dict[str, Any]]:
    kept: dict[int, dict[str, Any]] = {}
    for segment in _list(report, annotation, "segments_info", path, where):
        segment_id = _number(report, segment, "id", path, where)
        if segment_id is None:
            continue
        said = f"{where}, segment {segment_id}"
        if segment_id in kept:
            report.add("duplicate-segment", path, said, "the id occurs twice in the image")
            continue
        category = _number(report, segment, "category_id", path, said)
        if category is not None and categories is not None and category not in categories:
            message = f"category {category} is not among the {len(categories)} of the file"
            report.add("unknown-category", path, said, message)
        area = segment.get("area")
        if area is not None and not (isinstance(area, int | float) and area > 0):
            report.add("zero-area", path, said, f"area is {area!r}")
        crowd = int(bool(segment.get("iscrowd", 0)))
        kept[segment_id] = {"id": segment_id, "iscrowd": crowd, "area": area}
        report.count("crowd segments", crowd)
    report.count("segments", len(kept))
    return list(kept.values())


def check_instances(report: Report, metadata: Any) -> Jobs:
    """Look through a COCO-style instance JSON (docs/FORMATS.md 3 and 4).

    Args:
        report: takes the findings, and the figures "annotated images" and "objects".
        metadata: ``instances_json``, ``image_root``, and ``names_of_2017`` as `load_refcoco`.

    Returns:
        A job for every image by its id as text.
    """
    path = metadata.instances_json
    content = report.attempt("file", path, "the file", read_json, path)
    if content is None:
        return {}
    jobs: Jobs = {}
    objects: dict[str, list[dict[str, Any]]] = {}
    images = _images(report, content, path)
    for image_id, (name, size) in ((i, said) for i, said in images.items() if said):
        if metadata.get("names_of_2017", False) and image_id.isdecimal():
            name = f"{int(image_id):012d}.jpg"
        image = os.path.join(metadata.image_root, name)
        objects[image_id] = []
        jobs[image_id] = ImageJob(image_id, image, size, str(path), None, objects[image_id])
    seen: set[tuple[str, int]] = set()
    for place, annotation in enumerate(_list(report, content, "annotations", path)):
        where = f"annotation {place}"
        number = _number(report, annotation, "id", path, where)
        where = f"annotation {number}" if number is not None else where
        owner = _image_of(report, annotation, path, where, images)
        if number is None or owner is None:
            continue
        if (owner, number) in seen:
            said = f"the id occurs twice in image {owner}"
            report.add("duplicate-segment", path, where, said)
            continue
        seen.add((owner, number))
        objects[owner].append({**annotation, "id": number})
    report.count("annotated images", sum(bool(own) for own in objects.values()))
    report.count("objects", len(seen))
    return jobs


def _images(report: Report, content: Any, path: str) -> Images:
    """File name and size of every image by its id; None for those that say it wrongly."""
    images: Images = {}
    for place, image in enumerate(_list(report, content, "images", path)):
        where = f"entry {place} of 'images'"
        image_id = report.attempt("field", path, where, _name_of, image, "id", path, where)
        if image_id is None:
            continue
        where = f"image {image_id}"
        if image_id in images:
            report.add("duplicate-image", path, where, "the id occurs twice in 'images'")
            continue
        name = report.attempt("field", path, where, _name_of, image, "file_name", path, where)
        sides = [_number(report, image, side, path, where) for side in ("height", "width")]
        images[image_id] = None
        if name is not None and sides[0] and sides[1]:
            images[image_id] = (name, (sides[0], sides[1]))
        elif 0 in sides:
            report.add("field", path, where, f"height and width are {sides}")
    return images


def _name_of(record: Any, name: str, path: str, where: str) -> str:
    return str(field(record, name, path, where))


def _image_of(report: Report, record: Any, path: str, where: str, images: Images) -> str | None:
    """The image id of a record, as text, if it is that of a sound image of the file."""
    image_id = report.attempt("field", path, where, _name_of, record, "image_id", path, where)
    if image_id is not None and image_id not in images:
        report.add("unknown-image", path, where, f"image {image_id} is not among the images")
    return image_id if image_id is not None and images.get(image_id) else None


def _number(report: Report, record: Any, name: str, path: str, where: str) -> int | None:
    return report.attempt("field", path, where, whole, record, name, path, where)


def _list(report: Report, record: Any, name: str, path: str, where: str = "the file") -> list[Any]:
    return report.attempt("field", path, where, listed, record, name, path, where) or []

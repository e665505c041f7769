"""RefCOCO, RefCOCO+ and RefCOCOg as dataset dicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gella.data.coco_panoptic import image_fields, images_by_id, load_coco_panoptic
from gella.data.reading import ADVICE, field, listed, read_json, whole
from gella.data.record_store import RecordStore
from gella.utils.io import read_pickle

__all__ = ["load_instances", "load_refcoco", "read_refs"]


def load_refcoco(
    folder: str | Path,
    split_by: str,
    split: str,
    image_root: str | Path,
    *,
    per: str = "expression",
    panoptic_json: str | Path | None = None,
    panoptic_root: str | Path | None = None,
    match: str = "id",
    names_of_2017: bool = False,
    tasks: tuple[str, ...] = ("ground", "refer"),
) -> RecordStore:
    """Read the refs of one split (docs/FORMATS.md 3).

    Args:
        folder: holds ``instances.json`` and ``refs({split_by}).p``.
        split_by: "unc", "google" or "umd".
        split: "train", "val", "test", "testA" or "testB"; refs of other splits are passed over.
        image_root: folder of the images.
        per: "expression": a dict per sentence (evaluation); "image": a dict per image with all its
            sentences (training draws among them).
        panoptic_json, panoptic_root: a panoptic annotation whose segments are the entities.
            Without, the objects of ``instances.json`` are, as ``{"format": "coco_instances",
            "segments_info": [... "segmentation"]}`` with their polygons or RLE.
        match: how objects are found among panoptic segments: "id", by id and box, as in the
            synthetic shapes; "overlap", by IoU when mapped, as in COCO, where the two annotations
            have ids of their own: the objects are ``entities["targets"]``, still the truth.
        names_of_2017: images are named ``000000000009.jpg``, as in COCO 2017, and not
            ``COCO_train2014_000000000009.jpg``, as the file says; the pictures are the same.
        tasks: what the records can train and serve.

    Returns:
        Dicts of the image with ``expressions``: ``{"text", "segment_ids", "sent_id", "ref_id"}``.
        The refs' own file names are no names of images and are not used.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pickle is refused, a ref names an unknown object or image, the split has no
            ref, or an object is no segment of the panoptic annotation.
    """
    if per not in ("expression", "image") or match not in ("id", "overlap"):
        raise ValueError(
            f"per {per!r} must be 'expression' or 'image', and match {match!r} 'id' or 'overlap'"
        )
    instances_json = Path(folder, "instances.json")
    refs_file = Path(folder, f"refs({split_by}).p")
    images = load_instances(instances_json, image_root, tasks, names_of_2017=names_of_2017)
    said = _said(images, refs_file, split, instances_json)
    numbers = images.numbers_by_image()
    store = images.derived()
    if panoptic_json is not None:
        panoptic = load_coco_panoptic(panoptic_json, panoptic_root or "", image_root, tasks)
        join = _by_id if match == "id" else _by_overlap
        store, numbers = _joined(said, images, panoptic, panoptic_json, join)
    for image_id, texts in said.items():
        for group in [texts] if per == "image" else [[one] for one in texts]:
            store.add(numbers[image_id], {"expressions": group})
    return store


def read_refs(path: str | Path) -> list[dict[str, Any]]:
    """The refs of a ``refs(*).p``, or a ValueError when the pickle holds something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; {ADVICE}")
    try:
        refs = read_pickle(path)
    except ValueError as error:
        raise ValueError(f"{path}: refused, {error}; get the file from its first source") from error
    if not isinstance(refs, list):
        raise ValueError(f"{path}: holds a {type(refs).__name__}, not a list of refs")
    return refs


def _said(
    images: RecordStore, refs_file: Path, split: str, instances_json: Path
) -> dict[str, list[dict[str, Any]]]:
    """Expressions of a split by image, in the order of the file."""
    numbers = images.numbers_by_image()
    objects: dict[str, set[int]] = {}
    said: dict[str, list[dict[str, Any]]] = {}
    splits = set()
    for place, ref in enumerate(read_refs(refs_file)):
        splits.add(field(ref, "split", refs_file, f"ref {place}"))
        if ref["split"] != split:
            continue
        where = f"ref {field(ref, 'ref_id', refs_file, f'entry {place}')}"
        image_id = str(field(ref, "image_id", refs_file, where))
        target = whole(ref, "ann_id", refs_file, where)
        if image_id in numbers and image_id not in objects:
            own = images.shared(numbers[image_id])["entities"]["segments_info"]
            objects[image_id] = {segment["id"] for segment in own}
        if target not in objects.get(image_id, ()):
            raise ValueError(
                f"{refs_file}: {where} names object {target} of image {image_id}, which is not in "
                f"{instances_json}"
            )
        said.setdefault(image_id, []).extend(_expressions(ref, target, refs_file, where))
    if not said:
        raise ValueError(
            f"{refs_file}: no ref is in split '{split}'; it has {', '.join(sorted(splits))}"
        )
    return said


def _expressions(ref: dict[str, Any], target: int, path: Path, where: str) -> list[dict[str, Any]]:
    return [
        {
            "text": str(field(sentence, "sent", path, where)),
            "segment_ids": [target],
            "sent_id": field(sentence, "sent_id", path, where),
            "ref_id": ref["ref_id"],
        }
        for sentence in listed(ref, "sentences", path, where)
    ]


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
        names_of_2017: see `load_refcoco`.

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
    for place, annotation in enumerate(listed(content, "annotations", path, "the file")):
        number = whole(annotation, "id", path, f"annotation {place}")
        where = f"annotation {number}"
        image_id = str(field(annotation, "image_id", path, where))
        if image_id not in images:
            raise ValueError(f"{path}: {where} is of unknown image {image_id}")
        if (image_id, number) in seen:
            raise ValueError(f"{path}: image {image_id} has annotation id {number} twice")
        seen.add((image_id, number))
        field(annotation, "segmentation", path, f"image {image_id}, {where}")
        segments[image_id].append({**annotation, "id": number, "isthing": True})
    store = RecordStore()
    for image_id, image in images.items():
        fields = image_fields(image, path, image_root, tasks)
        if names_of_2017:
            name = f"{whole(image, 'id', path, 'an image'):012d}.jpg"
            fields["file_name"] = os.path.join(image_root, name)
        own = segments.pop(image_id)
        entities = {"format": "coco_instances", "file_name": str(path), "segments_info": own}
        store.add(store.share({**fields, "entities": entities}))
    return store


def _joined(
    said: dict[str, list[dict[str, Any]]],
    images: RecordStore,
    panoptic: RecordStore,
    path: str | Path,
    join: Any,
) -> tuple[RecordStore, dict[str, int]]:
    """Shared fields of every image that is spoken of, with the panoptic segments as entities."""
    own, other = images.numbers_by_image(), panoptic.numbers_by_image()
    store, numbers = RecordStore(), {}
    for image_id, texts in said.items():
        if image_id not in other:
            raise ValueError(f"{path}: has nothing of image {image_id}, of which refs speak")
        image = images.shared(own[image_id])
        targets = {text["segment_ids"][0] for text in texts}
        fields = join(panoptic.shared(other[image_id]), image, targets, path)
        numbers[image_id] = store.share(fields)
    return store, numbers


def _by_id(
    panoptic: dict[str, Any], image: dict[str, Any], targets: set[int], path: str | Path
) -> dict[str, Any]:
    """The panoptic record; each target has to be one of its segments, by id and by box.

    Equal ids alone could be chance.
    """
    segments = panoptic["entities"]["segments_info"]
    boxes = {segment["id"]: segment.get("bbox") for segment in segments}
    own = {segment["id"]: segment.get("bbox") for segment in image["entities"]["segments_info"]}
    for target in targets:
        if target not in boxes or boxes[target] != own[target]:
            raise ValueError(
                f"{path}: image {panoptic['image_id']}: object {target} is none of its "
                f"{len(segments)} segments; match by overlap, or leave panoptic_json out"
            )
    return panoptic


def _by_overlap(
    panoptic: dict[str, Any], image: dict[str, Any], targets: set[int], path: str | Path
) -> dict[str, Any]:
    """The image with the panoptic segments as entities and its objects as targets."""
    return {**image, "entities": {**panoptic["entities"], "targets": image["entities"]}}

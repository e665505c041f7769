"""RefCOCO, RefCOCO+ and RefCOCOg as dataset dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gella.data.coco_panoptic import load_coco_panoptic
from gella.data.reading import field, read_json, read_plain_pickle

__all__ = ["load_refcoco"]


def load_refcoco(
    folder: str | Path,
    split_by: str,
    split: str,
    image_root: str | Path,
    *,
    per: str = "expression",
    panoptic_json: str | Path | None = None,
    panoptic_root: str | Path | None = None,
    tasks: tuple[str, ...] = ("ground", "refer"),
) -> list[dict[str, Any]]:
    """Read the refs of one split (FORMATS section 3).

    Args:
        folder: holds ``instances.json`` and ``refs({split_by}).p``.
        split_by: "unc", "google" or "umd".
        split: "train", "val", "test", "testA" or "testB"; refs of other splits are passed over.
        image_root: folder of the images.
        per: "expression" gives one dict per sentence (evaluation), "image" one dict per image
            with all its sentences (training draws among them).
        panoptic_json, panoptic_root: a panoptic annotation of which the objects are segments,
            by id and box, as in the synthetic shapes. Its segments are then the entities. Without,
            the objects of ``instances.json`` are, as ``{"format": "coco_instances",
            "segments_info": [... "segmentation"]}`` with their polygons or RLE.
        tasks: what the records can train and serve.

    Returns:
        Dicts ``file_name, image_id, height, width, tasks, entities, expressions``; an expression
        is ``{"text", "segment_ids": [id], "sent_id", "ref_id"}``. The image's name comes from
        ``instances.json``, because the refs' own names carry the annotation's suffix.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pickle is refused, a ref names an unknown object or image, no ref is in the
            split, or an object is no segment of the given panoptic annotation.
    """
    if per not in ("expression", "image"):
        raise ValueError(f"load_refcoco: per '{per}' is unknown; use 'expression' or 'image'")
    instances_json = Path(folder) / "instances.json"
    refs_file = Path(folder) / f"refs({split_by}).p"
    bases = _instance_records(instances_json, image_root, tasks)
    said: dict[Any, list[dict[str, Any]]] = {}
    for ref in read_plain_pickle(refs_file):
        if field(ref, "split", refs_file, "a ref") == split:
            _require_object(ref, bases.get(ref["image_id"]), refs_file, instances_json)
            said.setdefault(ref["image_id"], []).extend(_expressions(ref, refs_file))
    if not said:
        raise ValueError(f"{refs_file}: no ref is in split '{split}'")
    if panoptic_json is not None:
        panoptic = load_coco_panoptic(panoptic_json, panoptic_root or "", image_root, tasks)
        bases = _with_segments(said, bases, panoptic, panoptic_json)
    if per == "image":
        return [{**bases[i], "expressions": texts} for i, texts in said.items()]
    return [{**bases[i], "expressions": [one]} for i, texts in said.items() for one in texts]


def _expressions(ref: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    return [
        {
            "text": str(sentence["sent"]),
            "segment_ids": [ref["ann_id"]],
            "sent_id": sentence["sent_id"],
            "ref_id": ref["ref_id"],
        }
        for sentence in field(ref, "sentences", path, f"ref {ref['ref_id']}")
    ]


def _require_object(
    ref: dict[str, Any], base: dict[str, Any] | None, refs_file: Path, instances_json: Path
) -> None:
    objects = base["entities"]["segments_info"] if base else []
    if all(o["id"] != ref["ann_id"] for o in objects):
        raise ValueError(
            f"{refs_file}: ref {ref['ref_id']} names object {ref['ann_id']} of image "
            f"{ref['image_id']}, which is not in {instances_json}"
        )


def _instance_records(
    path: Path, image_root: str | Path, tasks: tuple[str, ...]
) -> dict[Any, dict[str, Any]]:
    """Return one record without expressions per image of ``instances.json``."""
    content = read_json(path)
    records: dict[Any, dict[str, Any]] = {}
    for image in field(content, "images", path, "the file"):
        where = f"image {field(image, 'id', path, 'an image')}"
        records[image["id"]] = {
            "file_name": str(Path(image_root) / field(image, "file_name", path, where)),
            "image_id": image["id"],
            "height": int(field(image, "height", path, where)),
            "width": int(field(image, "width", path, where)),
            "tasks": tuple(tasks),
            "entities": {"format": "coco_instances", "file_name": str(path), "segments_info": []},
        }
    for annotation in field(content, "annotations", path, "the file"):
        image_id = field(annotation, "image_id", path, "an annotation")
        if image_id not in records:
            raise ValueError(f"{path}: annotation {annotation['id']} of unknown image {image_id}")
        records[image_id]["entities"]["segments_info"].append({**annotation, "isthing": True})
    return records


def _with_segments(
    said: dict[Any, list[dict[str, Any]]],
    bases: dict[Any, dict[str, Any]],
    panoptic: list[dict[str, Any]],
    path: str | Path,
) -> dict[Any, dict[str, Any]]:
    """Return the panoptic record of every image; each target has to be one of its segments.

    Ids and boxes are compared: equal ids alone could be chance.
    """
    by_image = {record["image_id"]: record for record in panoptic}
    for image_id, texts in said.items():
        record = by_image.get(image_id)
        segments = record["entities"]["segments_info"] if record else []
        boxes = {segment["id"]: segment["bbox"] for segment in segments}
        objects = {o["id"]: o["bbox"] for o in bases[image_id]["entities"]["segments_info"]}
        for target in {text["segment_ids"][0] for text in texts}:
            if target not in boxes or boxes[target] != objects[target]:
                raise ValueError(
                    f"{path}: image {image_id}: object {target} is none of its {len(segments)} "
                    "segments; leave panoptic_json out for this dataset"
                )
    return by_image

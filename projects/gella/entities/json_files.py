"""Entity masks in JSON files that hold many images: COCO results, instances and panoptic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from gella.entities.entity_map import EntityMap
from gella.entities.limits import MAX_ENTITIES
from gella.entities.masks import flatten
from gella.entities.rle import encode_segmentation, is_finite

JSON_FORMATS = ("coco_results", "coco_panoptic", "coco_instances")
# Under what the entries lie; a results file is the list itself.
_KEYS = {"coco_panoptic": "annotations", "coco_instances": "annotations"}


def json_format(path: Path) -> str:
    """Which of `JSON_FORMATS` a file has, by its content; ValueError if it is none."""
    content = _read_json(*_stamp(path))
    if isinstance(content, list):
        return "coco_results"
    entries = content.get("annotations") if isinstance(content, dict) else None
    first = entries[0] if isinstance(entries, list) and entries else {}
    outlines = isinstance(first, dict) and "segmentation" in first
    return "coco_instances" if outlines else "coco_panoptic"


def entries_by_image(path: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Results or annotations of a file of format `kind`, by image id.

    Ids become text, since files use both forms. Do not change what is returned: it is kept, and
    read again only after the file has changed.

    Raises ValueError for a file that is cut off, of another form, or without image ids.
    """
    return _grouped(*_stamp(path), kind)


def forget_files() -> None:
    """Let go of the files that were read last, for they may be large."""
    _grouped.cache_clear()
    _read_json.cache_clear()


def entries_of(path: Path, kind: str, image_id: int | str | None) -> list[dict[str, Any]]:
    """The entries of one image; ValueError if the file has none of it."""
    if image_id is None:
        raise ValueError("a file of many images needs image_id; give the image's id")
    groups = entries_by_image(path, kind)
    if str(image_id) not in groups:
        raise ValueError(
            f"no {_KEYS.get(kind, 'results')} for this image (the file covers {len(groups)} "
            "others); make its masks or choose the file of this dataset"
        )
    return groups[str(image_id)]


def whole_id(value: Any, what: str) -> int:
    """A segment id as int; whole numbers and their text are taken, ValueError for the rest."""
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    text = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20
    if (number or text) and -(1 << 63) <= int(value) < 1 << 63:
        return int(value)
    raise ValueError(f"{what} is {short(value)}; ids are whole numbers of at most 63 bits")


def checked_segments(segments_info: Any) -> list[tuple[int, bool, dict[str, Any]]]:
    """(id, is crowd, segment) of each entry; ValueError names the entry that is malformed."""
    if not isinstance(segments_info, (list, tuple)):
        raise ValueError(f"segments_info is a {type(segments_info).__name__}, not a list")
    checked = []
    for place, segment in enumerate(segments_info):
        if not isinstance(segment, dict) or "id" not in segment:
            raise ValueError(f"entry {place} of segments_info has no 'id'")
        number = whole_id(segment["id"], f"id of entry {place} of segments_info")
        crowd = segment.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise ValueError(f"segment {number}: iscrowd is {short(crowd)}, not 0 or 1")
        checked.append((number, bool(crowd), segment))
    return checked


def from_results(
    entries: Sequence[dict[str, Any]], size: tuple[int, int], max_entities: int = MAX_ENTITIES
) -> EntityMap:
    """Entities of one image from its entries in a results file; overlaps are flattened."""
    _check_count(len(entries), max_entities)
    codes, scores = [], []
    for place, entry in enumerate(entries):
        try:
            codes.append(_code_of(entry, size))
            scores.append(_score(entry.get("score", 1.0)))
        except ValueError as error:
            raise ValueError(f"result {place} of the image: {error}") from error
    return _flattened(codes, size, scores, list(range(1, len(codes) + 1)))


def from_segments(
    segments_info: Any, size: tuple[int, int], max_entities: int = MAX_ENTITIES
) -> EntityMap:
    """Entities from segments with a COCO `segmentation` each; crowd is left out.

    The smaller of two that overlap lies on top; one without a visible pixel is dropped.
    """
    own = [(i, segment) for i, crowd, segment in checked_segments(segments_info) if not crowd]
    _check_count(len(own), max_entities)
    codes = []
    for number, segment in own:
        try:
            codes.append(_code_of(segment, size))
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from error
    return _flattened(codes, size, [1.0] * len(codes), [number for number, _ in own])


def _code_of(entry: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    if "segmentation" not in entry:
        raise ValueError("'segmentation' is missing")
    return encode_segmentation(entry["segmentation"], size)


def _flattened(
    codes: list[dict[str, Any]], size: tuple[int, int], scores: list[float], names: list[int]
) -> EntityMap:
    """Like `EntityMap.from_masks`, but with one mask decoded at a time."""
    from pycocotools import mask as coco_mask

    ranks = np.array(scores, dtype=np.float32)
    if not np.isfinite(ranks).all():
        raise ValueError(f"score {max(scores, key=abs)} is too large")
    # One by one: of more than 255 at once pycocotools 2.0.11 raises OverflowError.
    areas = np.array([int(coco_mask.area(code)) for code in codes], dtype=np.int64)
    ids, visible = flatten(
        size, areas, ranks, lambda k: coco_mask.decode(codes[k]).astype(bool, copy=False)
    )
    return EntityMap(ids, [name for name, seen in zip(names, visible) if seen], ranks[visible])


def _check_count(count: int, max_entities: int) -> None:
    if count > max_entities:
        raise ValueError(f"holds {count} entities, more than the {max_entities} that are read")


def _score(value: Any) -> float:
    if type(value) not in (int, float) or not is_finite(value):
        raise ValueError(f"score is {short(value)}, not a finite number")
    return float(value)


def _stamp(path: Path) -> tuple[str, int, int]:
    # With time and size as parts of the key, a rewritten file is read again.
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


@lru_cache(maxsize=2)
def _read_json(path: str, changed: int, length: int) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("no valid JSON (nested too deeply)") from error
    except ValueError as error:  # of the text's encoding or of JSON
        raise ValueError(f"no valid JSON ({error}); it may be cut off") from error


@lru_cache(maxsize=4)
def _grouped(path: str, changed: int, length: int, kind: str) -> dict[str, list[dict[str, Any]]]:
    content = _read_json(path, changed, length)
    key = _KEYS.get(kind, "results")
    entries = content
    if kind in _KEYS:
        entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"expected a list of {key}, found {type(content).__name__}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("image_id")) not in (int, str):
            raise ValueError(f"entry {place} of {key} has no image_id that is a number or text")
        groups.setdefault(str(entry["image_id"]), []).append(entry)
    if kind == "coco_panoptic":
        twice = next((i for i, found in groups.items() if len(found) > 1), None)
        if twice is not None:
            raise ValueError(f"image {twice} has {len(groups[twice])} annotations; keep one")
    return groups

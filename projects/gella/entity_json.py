"""Entity masks in JSON files that hold many images: COCO results, instances and panoptic.

The content is checked before pycocotools sees it, which reads uninitialised memory where the runs
of a mask end early, and takes the memory that a coordinate far outside the image asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gella.entities import EntityMap

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
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise ValueError(f"{what} is {value!r}; ids are whole numbers")


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
            raise ValueError(f"segment {number}: iscrowd is {crowd!r}, not 0 or 1")
        checked.append((number, bool(crowd), segment))
    return checked


def from_results(entries: Sequence[dict[str, Any]], size: tuple[int, int]) -> EntityMap:
    """Entities of one image from its entries in a results file; overlaps are flattened."""
    masks = np.zeros((len(entries), *size), dtype=bool)
    scores = []
    for place, entry in enumerate(entries):
        try:
            if "segmentation" not in entry:
                raise ValueError("'segmentation' is missing")
            masks[place] = decode_segmentation(entry["segmentation"], size)
            scores.append(_score(entry.get("score", 1.0)))
        except ValueError as error:
            raise ValueError(f"result {place} of the image: {error}") from error
    return EntityMap.from_masks(masks, scores)


def from_segments(segments_info: Any, size: tuple[int, int]) -> EntityMap:
    """Entities from segments with a COCO `segmentation` each; crowd is left out.

    The smaller of two that overlap lies on top; one without a visible pixel is dropped.
    """
    own = [(i, segment) for i, crowd, segment in checked_segments(segments_info) if not crowd]
    masks = np.zeros((len(own), *size), dtype=bool)
    for mask, (number, segment) in zip(masks, own):
        try:
            if "segmentation" not in segment:
                raise ValueError("'segmentation' is missing")
            mask[:] = decode_segmentation(segment["segmentation"], size)
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from error
    return EntityMap.from_masks(masks, segment_ids=[number for number, _ in own])


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Mask of a COCO segmentation: bool (H, W).

    Args:
        segmentation: compressed or plain run lengths {"size", "counts"}, or a list of parts, each
            a polygon or run lengths. Where parts overlap is inside. Polygons are clipped to the
            image; one of fewer than three points has no pixel.
        size: (H, W) of the image.

    Raises ValueError for run lengths of another size or that do not add up to it, and for
    coordinates that are no numbers or far from the image.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        mask = np.zeros(size, dtype=bool)
        for part in segmentation:
            if isinstance(part, dict):
                mask |= decode_segmentation(part, size)
            elif len(points := _polygon(part, size)) >= 6:
                mask |= coco_mask.decode(coco_mask.frPyObjects([points], *size)[0]).astype(bool)
        return mask
    if not isinstance(segmentation, dict):
        raise ValueError(f"segmentation is a {type(segmentation).__name__}, not RLE or polygons")
    for key in ("size", "counts"):
        if key not in segmentation:
            raise ValueError(f"run lengths lack '{key}'")
    sides = segmentation["size"]
    if not isinstance(sides, (list, tuple)) or [type(side) for side in sides] != [int, int]:
        raise ValueError(f"run lengths have size {sides!r}, not [height, width]")
    check_size(sides, size)
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if any(type(run) is not int or run < 0 for run in counts):
            raise ValueError("run lengths are not all whole numbers of at least 0")
        covered = sum(counts)
    else:
        covered = _covered(counts)
    if covered != size[0] * size[1]:
        raise ValueError(f"runs cover {covered} of {size[0] * size[1]} pixels")
    code = {"size": list(size), "counts": counts}
    return coco_mask.decode(
        coco_mask.frPyObjects(code, *size) if isinstance(counts, list) else code
    ).astype(bool)


def check_size(found: Sequence[int], size: tuple[int, int]) -> None:
    """ValueError with both sizes unless masks of (H, W) `found` are of the image's `size`."""
    if tuple(found) != size:
        raise ValueError(
            f"masks are {found[1]}x{found[0]} pixels but the image is {size[1]}x{size[0]} (width x "
            "height); give masks of the image's size"
        )


def _polygon(part: Any, size: tuple[int, int]) -> list[float]:
    numbers = isinstance(part, (list, tuple)) and all(type(v) in (int, float) for v in part)
    if not numbers or len(part) % 2:
        raise ValueError("polygons cannot be read: each is a flat list x1, y1, x2, y2, ...")
    if not all(math.isfinite(v) for v in part):
        raise ValueError("polygons cannot be read: a coordinate is not finite")
    if part:
        for name, values, side in (("x", part[::2], size[1]), ("y", part[1::2], size[0])):
            low, high = min(values), max(values)
            # Annotators overshoot a border a little; a whole side is another image's polygon.
            if low >= side or high <= 0 or low < -side or high > 2 * side:
                raise ValueError(
                    f"a polygon lies outside the image: {name} from {low:g} to {high:g}, but the "
                    f"image is {size[1]}x{size[0]} (width x height)"
                )
    return [float(v) for v in part]


def _covered(counts: Any) -> int:
    """Pixels covered by COCO's compressed run lengths; ValueError if they are no such text.

    Each run is a signed number in base 32, lowest digit first, one character from chr(48) a digit,
    with bit 5 set where more digits follow. From the fourth run on it is the difference to the run
    two places before.
    """
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise ValueError("counts of run lengths are neither COCO's text nor a list") from error
    digits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    whole = digits.size and digits.min() >= 0 and digits.max() < 64
    if not whole or not ends.size or ends[-1] != digits.size - 1:
        raise ValueError("counts of run lengths are damaged; copy the file again")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more than any image has pixels
        raise ValueError("counts of run lengths are damaged; copy the file again")
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    values -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    if values.min() < 0:
        raise ValueError("counts of run lengths are damaged; copy the file again")
    return int(values.sum())


def _score(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"score is {value!r}, not a finite number")
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

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
from reprlib import repr as short
from typing import Any

import numpy as np

from gella.entities.entity_map import EntityMap
from gella.entities.limits import MAX_ENTITIES, MAX_OUTLINE
from gella.entities.masks import flatten

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


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Mask of a COCO segmentation: bool (H, W). Arguments and errors of `encode_segmentation`."""
    from pycocotools import mask as coco_mask

    return coco_mask.decode(encode_segmentation(segmentation, size)).astype(bool)


def encode_segmentation(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A COCO segmentation as compressed run lengths {"size", "counts"} of the whole image.

    Args:
        segmentation: compressed or plain run lengths {"size", "counts"}, or a list of parts, each
            a polygon or run lengths. Where parts overlap is inside. Polygons are clipped to the
            image; one of fewer than three points has no pixel.
        size: (H, W) of the image.

    Raises ValueError for run lengths of another size or that do not add up to it, and for
    coordinates that are no numbers, far from the image, or of an outline over `MAX_OUTLINE`.
    """
    from pycocotools import mask as coco_mask

    if not isinstance(segmentation, list):
        return _checked_code(segmentation, size)
    codes, polygons, outline = [], [], 0.0
    for part in segmentation:
        if isinstance(part, dict):
            codes.append(_checked_code(part, size))
            continue
        points = _polygon(part, size)
        outline += _outline(points)
        if outline > MAX_OUTLINE:
            raise ValueError(f"polygons are {outline:.0f} pixels long, more than {MAX_OUTLINE}")
        if len(points) >= 6:
            polygons.append(points)
    if polygons:
        codes += coco_mask.frPyObjects(polygons, *size)
    if not codes:
        codes = [coco_mask.encode(np.zeros(size, dtype=np.uint8, order="F"))]
    return coco_mask.merge(codes) if len(codes) > 1 else codes[0]


def _checked_code(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    if not isinstance(segmentation, dict):
        raise ValueError(f"segmentation is a {type(segmentation).__name__}, not RLE or polygons")
    for key in ("size", "counts"):
        if key not in segmentation:
            raise ValueError(f"run lengths lack '{key}'")
    sides = segmentation["size"]
    if not isinstance(sides, (list, tuple)) or [type(side) for side in sides] != [int, int]:
        raise ValueError(f"run lengths have size {short(sides)}, not [height, width]")
    check_size(sides, size)
    counts, pixels = segmentation["counts"], size[0] * size[1]
    if isinstance(counts, list):
        if any(type(run) is not int or run < 0 for run in counts):
            raise ValueError("run lengths are not all whole numbers of at least 0")
        covered = sum(counts)
    else:
        covered = _covered(counts)
    if covered != pixels:
        told = str(covered) if covered < 1 << 63 else "far more"
        raise ValueError(f"runs cover {told} of {pixels} pixels")
    code = {"size": list(size), "counts": counts}
    return coco_mask.frPyObjects(code, *size) if isinstance(counts, list) else code


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
    if not all(_is_finite(v) for v in part):
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
    if type(value) not in (int, float) or not _is_finite(value):
        raise ValueError(f"score is {short(value)}, not a finite number")
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have any length
        return False


def _outline(points: Sequence[float]) -> float:
    xy = np.array(points).reshape(-1, 2)
    return float(np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum()) if len(xy) else 0.0


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

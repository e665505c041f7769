"""Masks as COCO's run lengths, and masks from what COCO's files hold: run lengths or polygons.

The content is checked before pycocotools sees it, which reads uninitialised memory where the runs
of a mask end early, and takes the memory that a coordinate far outside the image asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

MAX_OUTLINE = 4_000_000
"""Length of one entity's polygons, pixels: rasterising takes 80 bytes for each."""


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A bool (H, W) mask as COCO's compressed run lengths: {"size": [H, W], "counts": str}."""
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def decode_box(code: dict[str, Any]) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The part of a mask that holds all of its pixels, bool (h, w), and its index in (H, W).

    Args:
        code: of at least a pixel, as `encode_mask` and `encode_segmentation` give it.
    """
    left, top, width, height = (int(side) for side in coco_mask.toBbox(code))
    runs, (rows, columns) = _run_lengths(code["counts"]), code["size"]
    # They go down the columns. Those beside the part are in the first run and, if it is outside,
    # the last: the whole mask would take a tenth of a second at 24 megapixels.
    runs[0] -= left * rows
    runs[-1] -= (columns - left - width) * rows * (len(runs) % 2)
    part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, rows)
    place = slice(top, top + height), slice(left, left + width)
    return np.ascontiguousarray(part[:, place[0]].T), place


def mask_area(code: dict[str, Any]) -> int:
    """Pixels of a mask."""
    # One by one: of more than 255 at once pycocotools 2.0.11 raises OverflowError.
    return int(coco_mask.area(code))


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Mask of a COCO segmentation: bool (H, W). Arguments and errors of `encode_segmentation`."""
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
    codes, polygons, outline = [], [], 0.0
    for part in segmentation if isinstance(segmentation, list) else [segmentation]:
        if isinstance(part, dict) or part is segmentation:
            codes.append(_checked_code(part, size))
            continue
        points = _polygon(part, size)
        corners = np.array([*points, *points[:2]]).reshape(-1, 2)  # closed
        outline += float(np.abs(np.diff(corners, axis=0)).max(axis=1, initial=0).sum())
        if outline > MAX_OUTLINE:
            raise ValueError(f"polygons are {outline:.0f} pixels long, more than {MAX_OUTLINE}")
        if len(points) >= 6:
            polygons.append(points)
    if polygons:
        codes += coco_mask.frPyObjects(polygons, *size)
    if not codes:  # no part, or only parts without area: a mask of no pixel
        codes = [coco_mask.encode(np.zeros(size, dtype=np.uint8, order="F"))]
    code = coco_mask.merge(codes) if len(codes) > 1 else codes[0]
    counts = code["counts"]
    return {"size": list(size), "counts": counts if isinstance(counts, str) else counts.decode()}


def _checked_code(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
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
    runs: Any
    if isinstance(counts, list):
        runs = counts
        wrong = [place for place, run in enumerate(counts) if type(run) is not int or run < 0]
    else:
        runs = _run_lengths(counts)
        wrong = np.flatnonzero(runs < 0).tolist()
    if wrong:
        told = f"run {wrong[0]} of {len(runs)} is {short(runs[wrong[0]])}"
        raise ValueError(f"{told}; run lengths are whole numbers of at least 0")
    covered = sum(counts) if isinstance(counts, list) else int(runs.sum())
    if covered != pixels:
        # JSON's whole numbers have any length.
        told = str(covered) if covered < 1 << 63 else "far more"
        raise ValueError(f"runs cover {told} of {pixels} pixels")
    code = {"size": list(size), "counts": counts}
    if isinstance(counts, list):
        code = coco_mask.frPyObjects(code, *size)
    # Runs of no pixel say nothing; without them equal masks have equal codes.
    return coco_mask.encode(coco_mask.decode(code)) if 0 in runs[1:] else code


class OtherSize(ValueError):
    """Masks are of another frame than the picture."""


def check_size(sides: Sequence[int], size: Sequence[int]) -> None:
    """OtherSize with both sizes unless masks of (H, W) `sides` are of the image's `size`."""
    if tuple(sides) != tuple(size):
        raise OtherSize(
            f"entity masks are {sides[1]}x{sides[0]} pixels but the image is {size[1]}x{size[0]} "
            "(width x height); give masks of the image's size"
        )


def _polygon(part: Any, size: tuple[int, int]) -> list[float]:
    numbers = isinstance(part, (list, tuple)) and all(type(v) in (int, float) for v in part)
    if not numbers or len(part) % 2:
        raise ValueError("polygons cannot be read: each is a flat list x1, y1, x2, y2, ...")
    if not all(is_finite(v) for v in part):
        raise ValueError("polygons cannot be read: a coordinate is not finite")
    if part:
        for name, values, side in (("x", part[::2], size[1]), ("y", part[1::2], size[0])):
            low, high = min(values), max(values)
            # Annotators overshoot a border a little; a whole side is another image's polygon.
            if low >= side or high <= 0 or low < -side or high > 2 * side:
                raise OtherSize(
                    f"a polygon lies outside the image: {name} from {low:g} to {high:g}, but the "
                    f"image is {size[1]}x{size[0]} (width x height)"
                )
    return [float(v) for v in part]


def _run_lengths(counts: Any) -> np.ndarray:
    """COCO's compressed run lengths as int64 (R,); ValueError if they are no such text.

    Each run is a signed number in base 32, lowest digit first, one character from chr(48) a digit,
    with bit 5 set where more digits follow. From the fourth run on it is the difference to the run
    two places before.
    """
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise ValueError("counts of run lengths are neither COCO's text nor a list") from error
    digits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    odd = np.flatnonzero((digits < 0) | (digits > 63))
    if odd.size or not digits.size:
        found = f"character {odd[0]} is {chr(data[odd[0]])!r}" if odd.size else "the text is empty"
        raise ValueError(f"counts of run lengths are no text of COCO's: {found}")
    if digits[-1] & 32:
        raise ValueError(f"counts of run lengths end within a number, after {len(data)} characters")
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more than any image has pixels
        place = int(lengths.argmax())
        raise ValueError(f"run {place} of {len(ends)} has {lengths[place]} digits, more than 7")
    digit = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * digit), starts)
    values -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


def is_finite(value: float) -> bool:
    """Whether a number of a JSON file is one that floats can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have any length
        return False

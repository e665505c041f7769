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
    if not isinstance(segmentation, list):
        return _checked_code(segmentation, size)
    codes, polygons, outline = [], [], 0.0
    for part in segmentation:
        if isinstance(part, dict):
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
    return coco_mask.merge(codes) if len(codes) > 1 else codes[0]


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
    if isinstance(counts, list):
        if any(type(run) is not int or run < 0 for run in counts):
            raise ValueError("run lengths are not all whole numbers of at least 0")
        covered = sum(counts)
    else:
        covered = _covered(counts)
    if covered != pixels:
        # JSON's whole numbers have any length.
        told = str(covered) if covered < 1 << 63 else "far more"
        raise ValueError(f"runs cover {told} of {pixels} pixels")
    code = {"size": list(size), "counts": counts}
    return coco_mask.frPyObjects(code, *size) if isinstance(counts, list) else code


def check_size(sides: Sequence[int], size: Sequence[int]) -> None:
    """ValueError with both sizes unless masks of (H, W) `sides` are of the image's `size`."""
    if tuple(sides) != tuple(size):
        raise ValueError(
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
    damaged = ValueError("counts of run lengths are damaged; copy the file again")
    digits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise damaged
    ends = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more than any image has pixels
        raise damaged
    digit = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * digit), starts)
    values -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    if values.min() < 0:
        raise damaged
    return int(values.sum())


def is_finite(value: float) -> bool:
    """Whether a number of a JSON file is one that floats can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have any length
        return False

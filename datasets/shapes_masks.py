"""Masks of synthetic scenes in COCO's encodings, and masks as a fallible segmenter gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

_DROP, _MERGE, _RAGGED = 0.10, 0.05, 0.35  # shares of the entities


def area_and_box(mask: np.ndarray) -> tuple[int, list[int]]:
    """Return the pixel count and the box ``[x, y, width, height]`` of a non-empty bool mask."""
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min()), int(ys.min())
    return len(xs), [x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1]


def to_segmentation(mask: np.ndarray) -> list[list[int]] | dict[str, Any]:
    """Encode a bool (H, W) mask as COCO's instance files do, without losing a pixel.

    Returns polygons along the pixel borders, one per part; a mask with a hole, which polygons
    cannot hold, becomes an uncompressed RLE ``{"size": [H, W], "counts": [int, ...]}``.
    """
    loops = _outlines(mask)
    if all(_signed_area(loop) > 0 for loop in loops):
        polygons = [[v for point in loop for v in point] for loop in loops]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))
        if np.array_equal(coco_mask.decode(rle).astype(bool), mask):
            return polygons
    return {"size": list(mask.shape), "counts": _run_lengths(mask)}


def _run_lengths(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F").astype(np.int8)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs  # the first run counts zeros


def _outlines(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Walk the borders of a mask: corner loops (x, y), clockwise outside, reversed in holes."""
    padded = np.pad(mask, 1)
    ahead: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Every border edge keeps the mask on its right hand (y points down).
    for (dy, dx), start, step in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (0, 1)),
        ((1, 0), (1, 1), (-1, 0)),
        ((0, -1), (0, 1), (0, -1)),
    ):
        outside = ~np.roll(padded, (-dy, -dx), (0, 1))[1:-1, 1:-1]
        for y, x in np.argwhere(mask & outside).tolist():
            ahead.setdefault((x + start[0], y + start[1]), []).append(step)
    loops = []
    while ahead:
        start_point = point = next(iter(ahead))
        loop: list[tuple[int, int]] = []
        last: tuple[int, int] | None = None
        while True:
            steps = ahead[point]
            # Where two parts touch at a corner, a right turn stays on the same part.
            right = None if last is None else (-last[1], last[0])
            step = right if right in steps else steps[0]
            steps.remove(step)
            if not steps:
                del ahead[point]
            if step != last:
                loop.append(point)
            point, last = (point[0] + step[0], point[1] + step[1]), step
            if point == start_point:
                break
        loops.append(loop)
    return loops


def _signed_area(loop: list[tuple[int, int]]) -> float:
    points = np.array(loop, dtype=np.float64)
    x, y = points.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def predicted_masks(
    id_map: np.ndarray, segment_ids: list[int], image_id: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Imitate a class-agnostic segmenter: COCO results entries for one image.

    About 10 % of the segments are missing, 5 % are merged with their nearest neighbour, a third
    have ragged borders; masks may overlap. ``score`` falls with the damage; ``category_id`` is 1.

    Args:
        id_map: int (H, W) panoptic ids.
        segment_ids: the ids that are entities.
        image_id: written into every entry.
        rng: source of every choice.
    """
    masks = {segment_id: id_map == segment_id for segment_id in segment_ids}
    entries: list[dict[str, Any]] = []
    for segment_id, mask in masks.items():
        fate, score = rng.random(), rng.uniform(0.85, 0.99)
        if fate < _DROP and len(entries) > 0:  # the first one stays, so no image is left without
            continue
        if fate < _DROP + _MERGE:
            mask, score = mask | masks[_nearest(masks, segment_id)], score - 0.25
        elif fate < _DROP + _MERGE + _RAGGED:
            mask, score = _ragged(mask, rng), score - 0.1
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        entries.append(
            {
                "image_id": image_id,
                "category_id": 1,
                "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
                "score": round(float(score), 4),
            }
        )
    return entries


def _nearest(masks: dict[int, np.ndarray], segment_id: int) -> int:
    centres = {i: np.argwhere(mask).mean(0) for i, mask in masks.items()}
    others = [i for i in masks if i != segment_id]
    return min(others, key=lambda i: float(np.hypot(*(centres[i] - centres[segment_id]))))


def _ragged(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift the border of a mask by up to two pixels, at random along it."""
    for _ in range(2):
        padded = np.pad(mask, 1, mode="edge")
        near = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        border = np.logical_or.reduce([side != mask for side in near])
        changed = np.where(border & (rng.random(mask.shape) < 0.35), ~mask, mask)
        mask = changed if changed.any() else mask
    return mask

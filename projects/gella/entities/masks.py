"""Masks that may overlap, and how they become one entity per pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gella.entities.runs import find_runs


def binary_masks(masks: Any) -> np.ndarray:
    """Masks as bool (E, H, W): 0 is outside, and one other value per mask is inside.

    Raises ValueError for another shape or type, and naming mask and value for one that is not
    finite, negative, or beside a second value: soft masks have to be thresholded by their owner.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be (E, H, W) with at least a pixel, got shape {masks.shape}")
    if masks.dtype.kind not in "buif":
        raise ValueError(f"masks must be bool (E, H, W), got {masks.dtype}")
    if masks.dtype.kind == "b":
        return masks
    result = np.empty(masks.shape, dtype=bool)
    for place, mask in enumerate(masks):
        highest = mask.max()  # NaN if one is among them
        if not np.isfinite(highest) or mask.min() < 0:
            wrong = highest if not np.isfinite(highest) else mask.min()
            raise ValueError(f"mask {place} holds {wrong}; masks are 0 outside and 1 inside")
        np.not_equal(mask, 0, out=result[place])
        others = result[place] & (mask != highest)
        if others.any():
            raise ValueError(
                f"mask {place} holds {mask[others][0]} beside {highest}; masks are 0 outside and "
                "one value inside: threshold them first"
            )
    return result


def flatten(
    size: tuple[int, int],
    areas: np.ndarray,
    scores: np.ndarray,
    mask_of: Callable[[int], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Paint masks in ascending score; among equal scores the smaller lies on top, then the later.

    Args:
        size: (H, W) of the masks.
        areas: int64 (E,), pixels of each.
        scores: float (E,), finite.
        mask_of: gives the bool (H, W) mask of an index, once each; only one is held at a time.

    Returns ids int32 (H, W), numbered from 1 among the visible masks, and which are visible: bool
    (E,).
    """
    canvas = np.zeros(size, dtype=np.int32)
    for k in np.lexsort((-areas, scores)):
        canvas[mask_of(int(k))] = k + 1
    seen = np.zeros(len(areas) + 1, dtype=bool)
    seen[find_runs(canvas).values] = True
    visible = seen[1:]
    renumber = np.concatenate(([0], np.where(visible, np.cumsum(visible), 0))).astype(np.int32)
    return renumber[canvas], visible


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair: bool (N, H, W), (M, H, W) -> float64 (N, M).

    Two empty masks have IoU 0. Raises ValueError when the sizes differ.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.ndim != 3 or b.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"masks of one size (N, H, W) are needed, got {a.shape} and {b.shape}")
    pixels = a.shape[1] * a.shape[2]
    # float32 counts exactly up to 2^24 and multiplies twice as fast.
    kind = np.float32 if pixels < 1 << 24 else np.float64
    left, right = a.reshape(len(a), pixels).astype(kind), b.reshape(len(b), pixels).astype(kind)
    shared = (left @ right.T).astype(np.float64)
    sizes_a, sizes_b = (m.sum(axis=(1, 2), dtype=np.int64).astype(np.float64) for m in (a, b))
    union = sizes_a[:, None] + sizes_b[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)

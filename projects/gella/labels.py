"""Where the numbers of entities stand on a picture: none over another, none outside of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gella.mask_layers import Layer
from gella.outlines import mask_box

__all__ = ["PlacedLabel", "deepest_point", "place_labels"]

_GAP = 1.0  # pixels between labels
_ANGLES = 16
_RINGS = 14
_SMALL = 6  # masks of fewer label areas are hidden by a label on them
_HIDING = 5.0  # a mask hidden is as bad as a label so many label sizes away


class PlacedLabel(NamedTuple):
    """A label's place in pixels of the drawing.

    Attributes:
        x: column of its centre.
        y: row of its centre.
        anchor: (x, y) of a point of the mask that it belongs to.
        apart: whether it stands away from the anchor, so that a line has to join them.
    """

    x: float
    y: float
    anchor: tuple[float, float]
    apart: bool


def place_labels(
    layers: Sequence[Layer], sizes: Sequence[tuple[float, float]], frame: tuple[int, int]
) -> list[PlacedLabel | None]:
    """Find a place for the label of each mask; None where there is no room.

    Large masks come first. A label stands in its mask if that is large enough and free, else next
    to it, and rather not over small masks. All lie in the frame and no two share a pixel.

    Args:
        layers: the masks, not empty, in the frame.
        sizes: (width, height) of each label in pixels.
        frame: (width, height) of the drawing.
    """
    areas = [int(np.count_nonzero(layer.mask)) for layer in layers]
    small = _Cover(frame)
    for layer, area, (width, height) in zip(layers, areas, sizes, strict=True):
        if area < _SMALL * width * height:
            small.add(layer)
    small.finish()
    placed: list[PlacedLabel | None] = [None] * len(layers)
    taken = np.zeros((0, 4))
    for index in sorted(range(len(layers)), key=lambda k: -areas[k]):
        label = _place(layers[index], sizes[index], frame, taken, small)
        if label is None:
            continue
        placed[index] = label
        half = np.array(sizes[index]) / 2
        box = [label.x - half[0], label.y - half[1], label.x + half[0], label.y + half[1]]
        taken = np.vstack([taken, box])
    return placed


def _place(
    layer: Layer,
    size: tuple[float, float],
    frame: tuple[int, int],
    taken: np.ndarray,
    small: _Cover,
) -> PlacedLabel | None:
    width, height = size
    if width > frame[0] or height > frame[1]:
        return None
    column, row = deepest_point(layer.mask)
    anchor = np.array([layer.x + column + 0.5, layer.y + row + 0.5])
    centers = anchor + _offsets(width, height)
    half = np.array(size) / 2
    centers = np.clip(centers, half, np.array(frame) - half)
    boxes = np.hstack([centers - half, centers + half])
    free = np.ones(len(boxes), dtype=bool)
    if len(taken):
        grown = taken + np.array([-_GAP, -_GAP, _GAP, _GAP])
        apart = (boxes[:, None, 2:] <= grown[None, :, :2]) | (
            boxes[:, None, :2] >= grown[None, :, 2:]
        )
        free = apart.any(axis=2).all(axis=1)
    if not free.any():
        return None
    cost = np.abs((centers - anchor) / size).max(axis=1)
    cost += _HIDING * small.hidden(boxes) + 0.7 * ~_inside(layer, centers)
    best = int(np.where(free, cost, np.inf).argmin())
    x, y = centers[best].tolist()
    within = np.abs(centers[best] - anchor) <= half
    return PlacedLabel(x, y, (float(anchor[0]), float(anchor[1])), not bool(within.all()))


def _offsets(width: float, height: float) -> np.ndarray:
    """Candidates around a point, (N, 2): the point itself, then ever wider ellipses."""
    radii = 0.75 * 1.28 ** np.arange(_RINGS)
    angles = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    around = np.stack([np.cos(angles) * width, np.sin(angles) * height], axis=1)
    rings = radii[:, None, None] * around[None]
    return np.vstack([np.zeros((1, 2)), rings.reshape(-1, 2)])


def _inside(layer: Layer, points: np.ndarray) -> np.ndarray:
    columns, rows = (np.floor(points) - [layer.x, layer.y]).astype(np.intp).T
    height, width = layer.mask.shape
    known = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return known & layer.mask[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]


class _Cover:
    """How many small masks a box hides, from sums over a grid of at most 1024 cells a side."""

    def __init__(self, frame: tuple[int, int]) -> None:
        self._step = max(1, -(-max(frame) // 1024))
        shape = (-(-frame[1] // self._step), -(-frame[0] // self._step))
        self._cells = np.zeros(shape)
        self._sums = np.zeros((1, 1))

    def add(self, layer: Layer) -> None:
        rows, columns = np.nonzero(layer.mask)
        places = (rows + layer.y) // self._step, (columns + layer.x) // self._step
        np.add.at(self._cells, places, 1 / max(len(rows), 1))

    def finish(self) -> None:
        self._sums = np.pad(self._cells.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))

    def hidden(self, boxes: np.ndarray) -> np.ndarray:
        """Masks under each box (N, 4: left, top, right, bottom), a half of one counting half."""
        edges = np.rint(boxes / self._step).astype(np.intp)
        height, width = self._cells.shape
        left, right = np.clip(edges[:, 0], 0, width - 1), np.clip(edges[:, 2], 1, width)
        top, bottom = np.clip(edges[:, 1], 0, height - 1), np.clip(edges[:, 3], 1, height)
        sums = self._sums
        return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of a pixel of ``mask`` (bool (H, W)) far from its border.

    Exact on small masks; above 128 pixels a side a coarser grid is searched. Raises ValueError for
    an empty mask.
    """
    box = mask_box(mask)
    if box is None:
        raise ValueError("an empty mask has no deepest point; leave such masks out")
    left, top, right, bottom = box
    crop = mask[top:bottom, left:right]
    step = max(1, max(crop.shape) // 128)
    coarse = crop[::step, ::step]
    if not coarse.any():  # a thin mask that the coarse grid misses
        rows, columns = np.nonzero(crop)
        return int(left + columns[len(columns) // 2]), int(top + rows[len(rows) // 2])
    core = coarse
    while core.any():
        coarse, core = core, _shrunk(core)
    ys, xs = np.nonzero(coarse)
    middle = len(ys) // 2
    return int(left + xs[middle] * step), int(top + ys[middle] * step)


def _shrunk(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return (
        padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1]
        & padded[1:-1, :-2] & padded[1:-1, 2:]
    )  # fmt: skip

"""Masks in a drawing of another size: enlarged exactly, reduced without losing thin parts, and
with labels and outlines; no label lies over another or outside of the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from gella.entities.entity_map import EntityMap

_GAP = 1.0  # pixels between labels
_SMALL = 6  # masks of fewer label areas are hidden by a label on them
_HIDING = 5.0  # a mask hidden is as bad as a label so many label sizes away
_RADII = 0.75 * 1.28 ** np.arange(14)  # label sizes from the anchor to the places that are tried
_ANGLES = np.arange(16) * (2 * np.pi / 16)


class Layer(NamedTuple):
    """A part of a drawing that holds a mask.

    Attributes:
        mask: bool (h, w).
        x, y: column and row of the drawing at which it starts.
    """

    mask: np.ndarray
    x: int
    y: int

    @property
    def place(self) -> tuple[slice, slice]:
        """Index of the part in an array of the drawing's size."""
        height, width = self.mask.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


def layers_of_ids(ids: np.ndarray) -> dict[int, Layer]:
    """Return the layer of every number above 0 in an int (H, W) map, by ascending number."""
    return {
        number: Layer(ids[place] == number, place[1].start, place[0].start)
        for number, place in enumerate(ndimage.find_objects(ids), start=1)
        if place is not None
    }


def layers_of(entities: EntityMap) -> dict[int, Layer]:
    """Return the layer of every entity with a pixel, all of its mask, by its number from 1."""
    layers = layers_of_ids(entities.ids)
    for index, whole in entities.wholes.items():
        mask = whole.paint(whole.values).astype(np.int32)
        layers |= layers_of_ids(mask * (index + 1))
    return dict(sorted(layers.items()))


class Grid:
    """The way from the pixels of a frame to those of a drawing of another size."""

    def __init__(self, frame: tuple[int, int], size: tuple[int, int]) -> None:
        """``frame``: (H, W) of the masks; ``size``: (h, w) of the drawing."""
        self._frame, self._size = np.array(frame), np.array(size)

    def layer(self, mask: np.ndarray, origin: tuple[int, int] = (0, 0)) -> Layer | None:
        """Bring a mask to the drawing; None if it is empty.

        Enlarged, each pixel becomes a block. Reduced, a pixel is set if at least half of what it
        shows is, and where nothing near is set for that reason (a thin part) if any of it is.

        Args:
            mask: bool (h, w), a part of the frame.
            origin: (x, y) of the part in the frame.
        """
        box = Image.fromarray(mask).getbbox()
        if box is None:
            return None
        left, top, right, bottom = box
        start = np.array([top + origin[1], left + origin[0]])
        end = start + (bottom - top, right - left)
        # The drawing's pixels that show a part of it, and what they show of the frame.
        first, last = start * self._size // self._frame, -(-end * self._size // self._frame)
        shown = np.array([first, last]) * self._frame / self._size
        low, high = np.floor(shown[0]).astype(int), np.ceil(shown[1]).astype(int)
        part = np.zeros(high - low, dtype=np.float32)
        part[tuple(map(slice, start - low, end - low))] = mask[top:bottom, left:right]
        (y, x), (height, width) = first.tolist(), (last - first).tolist()
        (upper, near), (lower, far) = (shown - low).tolist()
        resized = Image.fromarray(part).resize(
            (width, height), Image.Resampling.BOX, (near, upper, far, lower)
        )
        cover = np.asarray(resized)
        solid = cover >= 0.5 - 1e-6  # of sums of fractions
        return Layer(solid | ((cover > 1e-6) & ~_dilate(solid, 1)), x, y)


def looks(
    layer: Layer, thickness: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]]:
    """Return how a layer is outlined, ``thickness`` pixels wide, in a drawing of (h, w) pixels.

    Returns:
        The outline: the inner border of wide parts, and pixels around thin ones; bool.
        The thin parts, of which an inner border would leave nothing; of lines of one or two pixels
        in a drawing that is not enlarged also the pixels beside them; bool, of the same size.
        Index of these in an array of the drawing's size.
    """
    margin = 2
    mask = np.pad(layer.mask, margin)
    thin = mask & ~_dilate(_erode(mask, thickness + 1), 2 * thickness + 1)
    border = mask & ~thin & ~_erode(mask, thickness)
    if thickness == 1:  # nothing was enlarged: a line of one pixel would drown in its outline
        thin |= _dilate(thin & ~_dilate(_erode(mask, 1), 2), 1)
    white = border | (_dilate(thin, thickness) & ~mask & ~thin)
    top, left = layer.y - margin, layer.x - margin
    bottom, right = min(top + mask.shape[0], size[0]), min(left + mask.shape[1], size[1])
    inner = slice(max(-top, 0), bottom - top), slice(max(-left, 0), right - left)
    place = slice(max(top, 0), bottom), slice(max(left, 0), right)
    return white[inner], thin[inner], place


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Keep pixels whose square of 2 * radius + 1 is set; beyond the array nothing is."""
    side = 2 * radius + 1
    return ndimage.minimum_filter(mask.view(np.uint8), side, mode="constant", cval=0).view(bool)


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    side = 2 * radius + 1
    return ndimage.maximum_filter(mask.view(np.uint8), side, mode="constant", cval=0).view(bool)


class PlacedLabel(NamedTuple):
    """A label's place in pixels of the drawing.

    Attributes:
        x, y: its centre.
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
    boxed = zip(layers, areas, sizes, strict=True)
    hidden = _hiding([layer for layer, area, (w, h) in boxed if area < _SMALL * w * h], frame)
    placed: list[PlacedLabel | None] = [None] * len(layers)
    taken = np.zeros((0, 4))
    for index in sorted(range(len(layers)), key=lambda k: -areas[k]):
        layer, size = layers[index], np.array(sizes[index])
        if (size > frame).any():
            continue
        column, row = deepest_point(layer.mask)
        anchor = np.array([layer.x + column + 0.5, layer.y + row + 0.5])
        # The anchor itself, then ever wider ellipses around it.
        circle = np.stack([np.cos(_ANGLES) * size[0], np.sin(_ANGLES) * size[1]], axis=1)
        rings = (_RADII[:, None, None] * circle).reshape(-1, 2)
        half = size / 2
        centers = np.clip(anchor + np.vstack([np.zeros(2), rings]), half, np.array(frame) - half)
        boxes = np.hstack([centers - half, centers + half])
        grown = taken + np.array([-_GAP, -_GAP, _GAP, _GAP])
        apart = (boxes[:, None, 2:] <= grown[:, :2]) | (boxes[:, None, :2] >= grown[:, 2:])
        free = apart.any(axis=2).all(axis=1)
        if not free.any():
            continue
        cost = np.abs((centers - anchor) / size).max(axis=1)
        columns, rows = (np.floor(centers) - [layer.x, layer.y]).astype(np.intp).T
        bottom, right = layer.mask.shape
        inside = (rows >= 0) & (rows < bottom) & (columns >= 0) & (columns < right)
        inside[inside] = layer.mask[rows[inside], columns[inside]]
        cost += _HIDING * hidden(boxes) + 0.7 * ~inside
        best = int(np.where(free, cost, np.inf).argmin())
        x, y = centers[best].tolist()
        within = bool((np.abs(centers[best] - anchor) <= half).all())
        placed[index] = PlacedLabel(x, y, (float(anchor[0]), float(anchor[1])), not within)
        taken = np.vstack([taken, boxes[best]])
    return placed


def _hiding(layers: Sequence[Layer], frame: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Tell how many masks boxes (N, 4: left, top, right, bottom) hide, half a one counting half.

    The answer comes from sums over a grid of at most 1024 cells a side, not from the masks.
    """
    step = max(1, -(-max(frame) // 1024))
    width, height = (-(-side // step) for side in frame)
    cells = np.zeros((height, width))
    for layer in layers:
        rows, columns = np.nonzero(layer.mask)
        np.add.at(cells, ((rows + layer.y) // step, (columns + layer.x) // step), 1 / len(rows))
    sums = np.pad(cells.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))

    def hidden(boxes: np.ndarray) -> np.ndarray:
        edges = np.rint(boxes / step).astype(np.intp)
        left, right = np.clip(edges[:, 0], 0, width - 1), np.clip(edges[:, 2], 1, width)
        top, bottom = np.clip(edges[:, 1], 0, height - 1), np.clip(edges[:, 3], 1, height)
        return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]

    return hidden


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of a pixel of ``mask`` (bool (H, W)) far from its border.

    Exact on small masks; above 128 pixels a side a coarser grid is searched. Raises ValueError for
    an empty mask.
    """
    box = Image.fromarray(mask).getbbox()
    if box is None:
        raise ValueError("an empty mask has no deepest point; leave such masks out")
    left, top, right, bottom = box
    crop = mask[top:bottom, left:right]
    step = max(1, max(crop.shape) // 128)
    depths = ndimage.distance_transform_cdt(np.pad(crop[::step, ::step], 1), "taxicab")[1:-1, 1:-1]
    if not depths.any():  # a thin mask that the coarse grid misses
        depths, step = crop, 1
    ys, xs = np.nonzero(depths == depths.max())
    middle = len(ys) // 2
    return int(left + xs[middle] * step), int(top + ys[middle] * step)

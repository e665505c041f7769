"""Masks brought to the size of a drawing: enlarged exactly, reduced without losing thin parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gella.pictures.outlines import mask_box

__all__ = ["Grid", "Layer", "Looks", "looks"]


class Layer(NamedTuple):
    """A part of a drawing that holds a mask.

    Attributes:
        mask: bool (h, w).
        x: column of the drawing at which it starts.
        y: row at which it starts.
    """

    mask: np.ndarray
    x: int
    y: int

    @property
    def place(self) -> tuple[slice, slice]:
        """Index of the part in an array of the drawing's size."""
        height, width = self.mask.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


class Grid:
    """The way from the pixels of a frame to those of a drawing of another size."""

    def __init__(self, frame: tuple[int, int], size: tuple[int, int]) -> None:
        """Args:
        frame: (H, W) of the masks.
        size: (h, w) of the drawing; no side is larger while the other is smaller.
        """
        self.frame, self.size = frame, size
        self._grows = size[0] >= frame[0] and size[1] >= frame[1]
        # Where the drawing's pixels start in the frame (reduced), or the frame's in the drawing
        # (enlarged); exact in whole numbers.
        self._starts = []
        for before, after in zip(frame, size):
            few, many = sorted((before, after))
            self._starts.append(-(-np.arange(few + 1, dtype=np.int64) * many // few))

    def layer(self, mask: np.ndarray, origin: tuple[int, int] = (0, 0)) -> Layer | None:
        """Bring a mask to the drawing; None if it is empty.

        Enlarged, each pixel becomes a block. Reduced, a pixel is set if at least half of what it
        shows is, and where nothing near is set for that reason (a thin part) if any of it is.

        Args:
            mask: bool (h, w), a part of the frame.
            origin: (x, y) of the part in the frame.
        """
        box = mask_box(mask)
        if box is None:
            return None
        crop = mask[box[1] : box[3], box[0] : box[2]]
        left, top = box[0] + origin[0], box[1] + origin[1]
        if self._grows:
            return self._grown(crop, left, top)
        return self._reduced(crop, left, top)

    def _grown(self, crop: np.ndarray, left: int, top: int) -> Layer:
        rows, columns = (
            starts[first : first + count + 1]
            for starts, first, count in zip(self._starts, (top, left), crop.shape)
        )
        large = np.repeat(np.repeat(crop, np.diff(rows), axis=0), np.diff(columns), axis=1)
        return Layer(large, int(columns[0]), int(rows[0]))

    def _reduced(self, crop: np.ndarray, left: int, top: int) -> Layer:
        cover: np.ndarray = crop.astype(np.float32)
        firsts = []
        for axis, offset in ((0, top), (1, left)):
            starts = self._starts[axis]
            length = crop.shape[axis]
            first = int(np.searchsorted(starts, offset, side="right")) - 1
            last = int(np.searchsorted(starts, offset + length - 1, side="right"))
            cuts = np.maximum(starts[first:last] - offset, 0)
            sizes = np.diff(starts[first : last + 1]).reshape((-1, 1) if axis == 0 else (1, -1))
            cover = np.add.reduceat(cover, cuts, axis=axis) / sizes
            firsts.append(first)
        solid = cover >= 0.5
        return Layer(solid | ((cover > 0) & ~_dilate(solid, 1)), firsts[1], firsts[0])


class Looks(NamedTuple):
    """How a mask is to be drawn: bool arrays of one size, a part of the drawing.

    Attributes:
        border: inner border of its wide parts.
        thin: parts too thin for an inner border to leave something of them; of lines of one or two
            pixels in a drawing that is not enlarged also the pixels beside them.
        ring: pixels outside of the mask around its thin parts.
        place: index of the part in an array of the drawing's size.
    """

    border: np.ndarray
    thin: np.ndarray
    ring: np.ndarray
    place: tuple[slice, slice]


def looks(layer: Layer, thickness: int, size: tuple[int, int]) -> Looks:
    """Return where a layer's outline of ``thickness`` pixels goes in a drawing of (h, w) pixels."""
    margin = 2
    mask = np.pad(layer.mask, margin)
    core = _erode(mask, thickness + 1)
    thin = mask & ~_dilate(core, 2 * thickness + 1)
    border = mask & ~thin & ~_erode(mask, thickness)
    if thickness == 1:  # nothing was enlarged: a line of one pixel would drown in its outline
        thin |= _dilate(thin & ~_dilate(_erode(mask, 1), 2), 1)
    ring = _dilate(thin, thickness) & ~mask & ~thin
    top, left = layer.y - margin, layer.x - margin
    bottom, right = min(top + mask.shape[0], size[0]), min(left + mask.shape[1], size[1])
    inner = slice(max(-top, 0), bottom - top), slice(max(-left, 0), right - left)
    place = slice(max(top, 0), bottom), slice(max(left, 0), right)
    return Looks(border[inner], thin[inner], ring[inner], place)


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    return ~_erode(~mask, radius, outside=True)


def _erode(mask: np.ndarray, radius: int, *, outside: bool = False) -> np.ndarray:
    """Keep pixels whose square of 2 * radius + 1 is set; beyond the array all is ``outside``."""
    height, width = mask.shape
    padded = np.pad(mask, radius, constant_values=outside)
    tall = padded[:, :width].copy()
    for shift in range(1, 2 * radius + 1):
        tall &= padded[:, shift : shift + width]
    result = tall[:height].copy()
    for shift in range(1, 2 * radius + 1):
        result &= tall[shift : shift + height]
    return result

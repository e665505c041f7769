"""Integer images as runs: id images are long stretches of one value, so what is asked of them is
answered per stretch instead of per pixel. Only numpy; `EntityMap` is built on these functions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """An (H, W) image row by row: R stretches of equal pixels, none longer than its row.

    Attributes:
        values: (R,), the image's own dtype. Neighbours may be equal.
        lengths: intp (R,), pixels of each, at least 1.
        offsets: intp (H + 1,), the place of each row's first run; the last entry is R.
        width: W.
    """

    values: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    width: int

    @property
    def height(self) -> int:
        """H."""
        return len(self.offsets) - 1

    def paint(self, values: np.ndarray) -> np.ndarray:
        """Pixels from one value per run: (R,) -> (H, W), or (C, R) -> (C, H, W); any dtype."""
        pixels = np.repeat(values, self.lengths, axis=-1)
        return pixels.reshape(*values.shape[:-1], self.height, self.width)

    def astype(self, values: np.dtype | type, counts: np.dtype | type) -> Runs:
        """The same runs with other integer types, of the values and of the rest."""
        return Runs(
            self.values.astype(values, copy=False),
            self.lengths.astype(counts, copy=False),
            self.offsets.astype(counts, copy=False),
            self.width,
        )

    def rows(self) -> np.ndarray:
        """Row of each run: intp (R,)."""
        return np.repeat(np.arange(self.height), np.diff(self.offsets))

    def columns(self) -> np.ndarray:
        """Column in which each run begins: intp (R,)."""
        ends = np.cumsum(self.lengths)
        return ends - self.lengths - self.rows() * self.width


def find_runs(image: np.ndarray) -> Runs:
    """Runs of an (H, W) image with at least one pixel."""
    flat, width = image.reshape(-1), image.shape[1]
    first = np.empty(flat.size, dtype=bool)  # does a run begin here?
    np.not_equal(flat[1:], flat[:-1], out=first[1:])
    first[::width] = True
    starts = np.flatnonzero(first)
    offsets = np.searchsorted(starts, np.arange(len(image) + 1) * width)
    return Runs(flat[starts], np.diff(starts, append=flat.size), offsets, width)


def pick_runs(runs: Runs, rows: np.ndarray, columns: np.ndarray) -> Runs:
    """Runs of `image[rows][:, columns]`.

    Args:
        runs: of the image.
        rows: integers (h,) in 0..H - 1, any order, repeated or not.
        columns: integers (w,) in 0..W - 1, ascending, repeated or not.
    """
    # edges[c]: the new column in which old column c begins, or would begin if it were picked.
    edges = np.searchsorted(columns, np.arange(runs.width + 1))
    begin = runs.columns()
    lengths = edges[begin + runs.lengths] - edges[begin]
    kept = np.flatnonzero(lengths)
    offsets = np.searchsorted(kept, runs.offsets)
    counts = np.diff(offsets)[rows]
    picked = np.zeros(len(rows) + 1, dtype=np.intp)
    np.cumsum(counts, out=picked[1:])
    # Each new row is a range of the old runs.
    places = kept[np.arange(picked[-1]) + np.repeat(offsets[rows] - picked[:-1], counts)]
    return Runs(runs.values[places], lengths[places], picked, len(columns))


def pad_runs(runs: Runs, height: int, width: int) -> Runs:
    """Runs of the image with zeros added below and right, to height x width pixels."""
    values, lengths, offsets = runs.values, runs.lengths, runs.offsets
    if width > runs.width:
        values = np.insert(values, offsets[1:], 0)
        lengths = np.insert(lengths, offsets[1:], width - runs.width)
        offsets = offsets + np.arange(len(offsets))
    added = height - runs.height
    values = np.concatenate((values, np.zeros(added, dtype=values.dtype)))
    lengths = np.concatenate((lengths, np.full(added, width, dtype=np.intp)))
    offsets = np.concatenate((offsets, offsets[-1] + np.arange(1, added + 1)))
    return Runs(values, lengths, offsets, width)


def flip_runs(runs: Runs) -> Runs:
    """Runs of the image mirrored left to right."""
    offsets = runs.offsets
    ends = np.repeat(offsets[:-1] + offsets[1:] - 1, np.diff(offsets))
    places = ends - np.arange(len(runs.values))
    return Runs(runs.values[places], runs.lengths[places], offsets, runs.width)

"""Which colours the entities of one image get (paper, section 3.2 and Table 5b). Only numpy."""

from __future__ import annotations

import numpy as np

_CANDIDATES = 16  # of `separated_colors`: more buys little distance and costs linearly
_LOCATION_GRID = 20  # cells per image side of `location_colors`


def random_colors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform, distinct and never black: integers (count,), R + 256 G + 65536 B."""
    codes = rng.integers(1, 1 << 24, size=count)
    while len(np.unique(codes)) < count:
        repeated = np.ones(count, dtype=bool)
        repeated[np.unique(codes, return_index=True)[1]] = False
        codes[repeated] = rng.integers(1, 1 << 24, size=int(repeated.sum()))
    return codes


def separated_colors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Each the farthest of several candidates from black and the colours before it: (count, 3)."""
    candidates = rng.integers(0, 256, size=(count, _CANDIDATES, 3)).astype(np.int32)
    chosen = np.zeros((count + 1, 3), dtype=np.int32)  # chosen[0] is black
    for k in range(count):
        options = candidates[k]
        while True:
            gaps = ((options[:, None] - chosen[None, : k + 1]) ** 2).sum(axis=-1).min(axis=1)
            best = int(gaps.argmax())
            if gaps[best] > 0:
                break
            options = rng.integers(0, 256, size=(_CANDIDATES, 3)).astype(np.int32)
        chosen[k + 1] = options[best]
    return chosen[1:].astype(np.uint8)


def location_colors(centroids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """From the cell of a fixed grid in which the centroid lies, as Painter does: uint8 (E, 3).

    Args:
        centroids: (E, 2), x and y in pixels.
        size: (H, W) of the image.
    """
    count, (height, width) = len(centroids), size
    side = max(_LOCATION_GRID, int(np.ceil(np.sqrt(count))))
    rows, columns = (axis.ravel() for axis in np.indices((side, side)))
    free = np.ones(side * side, dtype=bool)
    cells = np.zeros(count, dtype=np.int64)
    for k, (x, y) in enumerate(centroids):
        # An occupied cell hands over to the nearest free one.
        column, row = int((x + 0.5) * side / width), int((y + 0.5) * side / height)
        gaps = np.where(free, (rows - row) ** 2 + (columns - column) ** 2, np.iinfo(np.int64).max)
        cells[k] = gaps.argmin()
        free[cells[k]] = False
    # The cell's number, written with three digits, counts down from white in even steps.
    base = int(np.ceil(np.cbrt(side * side)))
    digits = np.stack([cells // base**2, cells // base % base, cells % base], axis=-1)
    return (255 - digits * (255 // base)).astype(np.uint8)

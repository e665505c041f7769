"""The colormap: which colour each entity of an image gets, and the picture of them (paper, 3.2)."""

from __future__ import annotations

import numpy as np

from gella.entities.entity_map import EntityMap, id_to_rgb

ASSIGNMENTS = ("random", "location", "separated")
_CANDIDATES = 16  # of `separated`: more buys little distance and costs linearly
_LOCATION_GRID = 20  # cells per image side of `location`


def entity_colors(entities: EntityMap, assignment: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one colour per entity: uint8 RGB (E, 3).

    Colours are distinct and never black, which stands for background and padding.

    Args:
        entities: `location` reads their centroids, the others only their number.
        assignment: "random" (uniform), "location" (from the cell of a fixed grid in which the
            centroid lies, as Painter does; Table 5b) or "separated" (each the farthest of several
            candidates from black and the colours before it).
        rng: the source of chance; `location` does not use it.
    """
    count = entities.num_entities
    if assignment == "random":
        return random_colors(count, rng)
    if assignment == "location":
        return location_colors(entities.centroids(), entities.size)
    if assignment == "separated":
        return separated_colors(count, rng)
    raise ValueError(f"colour assignment {assignment!r} is none of {', '.join(ASSIGNMENTS)}")


def paint_colormap(entities: EntityMap, colors: np.ndarray) -> np.ndarray:
    """Show every entity in its colour: uint8 (H, W, 3), black where no entity is.

    In memory each channel is a plane of its own: `transpose(2, 0, 1)` is contiguous, as models
    want it.

    Args:
        entities: what is painted.
        colors: uint8 RGB (E, 3), one per entity.
    """
    colors = np.asarray(colors, dtype=np.uint8)
    if colors.shape != (entities.num_entities, 3):
        raise ValueError(f"{entities.num_entities} entities but colours of shape {colors.shape}")
    # One colour per run, not per pixel: a tenth of the time that looking up every pixel takes.
    runs = entities.runs()
    planes = runs.paint(np.pad(colors.T, ((0, 0), (1, 0)))[:, runs.values])  # 0 is black
    return planes.transpose(1, 2, 0)


def random_colors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform, distinct and never black: uint8 (count, 3)."""
    codes = rng.integers(1, 1 << 24, size=count)  # as `id_to_rgb` reads them
    while len(np.unique(codes)) < count:
        repeated = np.ones(count, dtype=bool)
        repeated[np.unique(codes, return_index=True)[1]] = False
        codes[repeated] = rng.integers(1, 1 << 24, size=int(repeated.sum()))
    return id_to_rgb(codes[None])[0]


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

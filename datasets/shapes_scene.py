"""Synthetic scenes: coloured shapes on textured regions, as an RGB image and a panoptic id map.

Their masks come in COCO's encodings, and as a fallible segmenter gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from gella.data.register import SHAPES_STUFF, SHAPES_THINGS
from gella.entities.rle import encode_mask

KINDS = SHAPES_THINGS
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 235, 30),
    "green": (0, 205, 75),
    "blue": (35, 60, 225),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
STUFF = SHAPES_STUFF
# Colour-kind pairs that training scenes never hold: they measure composition, not memory.
HELD_OUT_PAIRS = (
    ("red", "star"),
    ("blue", "cross"),
    ("green", "ring"),
    ("yellow", "triangle"),
    ("purple", "square"),
    ("orange", "circle"),
    ("white", "diamond"),
)
MIN_SIZE = 64  # pixels; smaller canvases cannot hold the shapes

_SUPER = 3  # samples per pixel side; odd, so that the middle sample is the pixel's centre
_MIN_THING_AREA = 60  # visible pixels
_MIN_THING_SHARE = 0.35  # visible share of a thing's own area
_MIN_STUFF_AREA = 150  # visible pixels
_DIAMETERS = {"small": (15.0, 19.0), "large": (24.0, 32.0)}  # pixels
_COUNTS = (3, 4, 5, 6, 7, 8, 9)
_COUNT_WEIGHTS = (0.12, 0.18, 0.20, 0.18, 0.14, 0.10, 0.08)
_DROP, _MERGE, _RAGGED = 0.10, 0.05, 0.35  # shares of the entities of a segmenter
# Base colour and mark colour of each region; the mark is drawn in the region's own pattern.
_STUFF_COLOURS = {
    "sky": ((160, 205, 245), (222, 238, 255)),
    "sand": ((232, 206, 145), (186, 150, 88)),
    "grass": ((122, 172, 82), (70, 118, 42)),
    "water": ((38, 108, 158), (112, 182, 214)),
    "wall": ((160, 82, 62), (214, 188, 172)),
    "floor": ((158, 158, 162), (104, 104, 114)),
}


@dataclass(frozen=True)
class Thing:
    """One shape: centre ``cx, cy`` and ``radius`` in canvas pixels, ``angle`` in radians."""

    kind: str
    colour: str
    size: str
    texture: str
    cx: float
    cy: float
    radius: float
    angle: float

    def has(self, **wanted: str) -> bool:
        """Say whether every given attribute (``kind, colour, size, texture``) has that value."""
        return all(getattr(self, name) == value for name, value in wanted.items())


@dataclass
class Scene:
    """A drawn scene.

    Attributes:
        things: back to front; thing ``i`` has the number ``i + 1`` in ``ids``.
        stuff: kinds of the regions; region ``j`` has the number ``len(things) + j + 1``.
        image: uint8 (S, S, 3) RGB, antialiased.
        ids: int32 (S, S), crisp: a pixel belongs to what covers its centre; never 0.
    """

    things: list[Thing]
    stuff: list[str]
    image: np.ndarray
    ids: np.ndarray

    def region_under(self, thing: int) -> str | None:
        """Return the one stuff kind that holds the centre and most of the rim of a thing.

        None when the thing lies across a border, so that "is on the grass" is never doubtful.
        """
        t = self.things[thing]
        ring = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        xs = np.round(t.cx + (t.radius + 2) * np.cos(ring)).astype(int)
        ys = np.round(t.cy + (t.radius + 2) * np.sin(ring)).astype(int)
        side = self.ids.shape[0]
        keep = (xs >= 0) & (ys >= 0) & (xs < side) & (ys < side)
        around = self.ids[ys[keep], xs[keep]] - 1 - len(self.things)
        around = around[around >= 0]  # other things around it say nothing
        kinds, counts = np.unique(around, return_counts=True)
        return self.stuff[int(kinds[0])] if len(kinds) == 1 and counts[0] >= 8 else None


def draw_scene(rng: np.random.Generator, size: int = 96, held_out: bool = False) -> Scene:
    """Draw one scene from a generator; the same generator state gives the same scene.

    Args:
        rng: source of every choice.
        size: side S of the square canvas in pixels, at least 64.
        held_out: whether the pairs of ``HELD_OUT_PAIRS`` may appear.

    Every thing shows at least 35 % of itself and 60 pixels, every region 150 pixels; a scene that
    breaks this is drawn again.

    Raises:
        ValueError: ``size`` under 64.
    """
    if size < MIN_SIZE:
        raise ValueError(f"shapes: size {size} is under {MIN_SIZE} pixels; give a larger --size")
    while True:
        things = _choose_things(rng, size, held_out)
        inside = [_cover(thing, size) for thing in things]
        stuff, regions = _choose_regions(rng, size)
        ids = regions + len(things) + 1
        for number, (box, mask) in enumerate(inside, start=1):
            centre = mask[_SUPER // 2 :: _SUPER, _SUPER // 2 :: _SUPER]
            ids[box][centre] = number
        if _is_visible(ids, inside, len(stuff)):
            image = _paint(rng, things, inside, stuff, regions, size)
            return Scene(things, stuff, image, ids.astype(np.int32))


def _is_visible(ids: np.ndarray, inside: list, num_stuff: int) -> bool:
    counts = np.bincount(ids.ravel(), minlength=len(inside) + num_stuff + 1)
    for number, (_, mask) in enumerate(inside, start=1):
        whole = mask[_SUPER // 2 :: _SUPER, _SUPER // 2 :: _SUPER].sum()
        if counts[number] < max(_MIN_THING_AREA, _MIN_THING_SHARE * whole):
            return False
    return bool((counts[len(inside) + 1 :] >= _MIN_STUFF_AREA).all())


def _choose_things(rng: np.random.Generator, size: int, held_out: bool) -> list[Thing]:
    count = int(rng.choice(_COUNTS, p=_COUNT_WEIGHTS))
    things: list[Thing] = []
    while len(things) < count:
        kind, colour = str(rng.choice(KINDS)), str(rng.choice(list(COLOURS)))
        scale = str(rng.choice(SIZES, p=(0.6, 0.4) if count > 6 else (0.4, 0.6)))
        texture = "plain"
        if scale == "large" and rng.random() < 0.45:  # marks on small shapes cannot be read
            texture = str(rng.choice(TEXTURES[1:]))
        if things and rng.random() < 0.55:  # look-alikes give plurals and need for attributes
            other = things[rng.integers(len(things))]
            share = rng.integers(3)
            kind = other.kind if share != 1 else kind
            colour = other.colour if share != 0 else colour
        if not held_out and (colour, kind) in HELD_OUT_PAIRS:
            continue
        radius = float(rng.uniform(*_DIAMETERS[scale])) / 2
        cx, cy = _place(rng, things, radius, size)
        angle = float(rng.uniform(-0.2, 0.2))
        things.append(Thing(kind, colour, scale, texture, cx, cy, radius, angle))
    return things


def _place(
    rng: np.random.Generator, things: list[Thing], radius: float, size: int
) -> tuple[float, float]:
    """Take the least crowded of four random places: some overlap stays, heaps do not."""
    spots = rng.uniform(radius + 1, size - radius - 1, size=(4, 2))
    crowding = [
        max((t.radius + radius - np.hypot(t.cx - x, t.cy - y) for t in things), default=0.0)
        for x, y in spots
    ]
    x, y = spots[int(np.argmin(crowding))]
    return float(x), float(y)


def _cover(thing: Thing, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return a pixel box and the bool coverage of its samples, (3h, 3w)."""
    reach = thing.radius * 1.15
    x0, x1 = max(int(thing.cx - reach), 0), min(int(np.ceil(thing.cx + reach)), size)
    y0, y1 = max(int(thing.cy - reach), 0), min(int(np.ceil(thing.cy + reach)), size)
    xs = (np.arange(x0 * _SUPER, x1 * _SUPER) + 0.5) / _SUPER - thing.cx
    ys = (np.arange(y0 * _SUPER, y1 * _SUPER) + 0.5) / _SUPER - thing.cy
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    u = (cos * xs[None] + sin * ys[:, None]) / thing.radius
    v = (-sin * xs[None] + cos * ys[:, None]) / thing.radius
    return (slice(y0, y1), slice(x0, x1)), _inside(thing.kind, u, v)


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Say which points of the unit frame (v downwards) lie in a shape of radius about 1."""
    if kind == "circle":
        return np.hypot(u, v) <= 0.97
    if kind == "square":
        return np.maximum(abs(u), abs(v)) <= 0.86
    if kind == "triangle":
        return (v <= 0.78) & (abs(u) <= (v + 1.0) / 1.78 * 1.05)
    if kind == "ring":
        return (np.hypot(u, v) <= 1.0) & (np.hypot(u, v) >= 0.5)
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 0.95)
    if kind == "diamond":
        return abs(u) / 0.68 + abs(v) / 1.08 <= 1
    # star: ten corners at two radii; the edge of a sector, in the sector's own mirror image
    angle = np.arctan2(u, -v) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    outer, inner = 1.1, 0.5
    ix, iy = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    return (x - outer) * iy - y * (ix - outer) <= 0


def _choose_regions(rng: np.random.Generator, size: int) -> tuple[list[str], np.ndarray]:
    """Split the canvas by wavy lines: kinds and int (S, S) region numbers from 0."""
    count = int(rng.integers(2, 4))
    stuff = [str(name) for name in rng.permutation(STUFF)[:count]]
    first = _wavy_side(rng, size, (0.36, 0.64) if count == 2 else (0.30, 0.45))
    across = rng.random() < 0.4  # the lines run downwards instead of across
    regions = first.astype(np.int64)
    if count == 3:
        if rng.random() < 0.5:
            regions = regions + (first & _wavy_side(rng, size, (0.62, 0.74)))
        else:
            regions = regions + (first & _wavy_side(rng, size, (0.40, 0.60)).T)
    return stuff, regions.T.copy() if across else regions


def _wavy_side(rng: np.random.Generator, size: int, place: tuple[float, float]) -> np.ndarray:
    x = np.arange(size) + 0.5
    level = size * rng.uniform(*place)
    wave = rng.uniform(1.5, 4.0) * np.sin(2 * np.pi * (x / rng.uniform(28, 60) + rng.random()))
    return x[:, None] >= (level + wave)[None]


def _pattern(kind: str, rng: np.random.Generator, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Return which samples carry a region's mark colour; periods of 5 to 8 pixels."""
    period = rng.uniform(5.5, 7.5)
    x, y = xs[None] + rng.uniform(0, period), ys[:, None] + rng.uniform(0, period)
    if kind == "sky":  # broad horizontal bands
        return np.repeat(y / 8 % 1 < 0.5, len(xs), axis=1)
    if kind == "sand":  # dots on a shifted grid
        shift = (y // period % 2) * period / 2
        return np.hypot((x + shift) % period - period / 2, y % period - period / 2) < 1.7
    if kind == "grass":  # upright blades
        return (x + 0.8 * np.sin(y)) / period % 1 < 0.42
    if kind == "water":  # waves
        return (y + 1.8 * np.sin(2 * np.pi * x / 12)) / period % 1 < 0.36
    if kind == "wall":  # mortar between bricks
        shift = (y // period % 2) * period
        return (y % period < 1.5) | ((x + shift) % (2 * period) < 1.5)
    return (x // 4 + y // 4) % 2 < 1  # floor: tiles of 4 pixels


def _paint(
    rng: np.random.Generator,
    things: list[Thing],
    inside: list,
    stuff: list[str],
    regions: np.ndarray,
    size: int,
) -> np.ndarray:
    """Paint everything at three samples a pixel and side, then average: uint8 (S, S, 3)."""
    axis = (np.arange(size * _SUPER) + 0.5) / _SUPER
    fine = regions.repeat(_SUPER, 0).repeat(_SUPER, 1)
    palette = np.empty((len(stuff), 2, 3), dtype=np.float32)
    marked = np.zeros(fine.shape, dtype=bool)
    for number, kind in enumerate(stuff):
        palette[number] = np.array(_STUFF_COLOURS[kind]) + rng.uniform(-10, 10, 3)
        np.copyto(marked, _pattern(kind, rng, axis, axis), where=fine == number)
    canvas = palette[fine, marked.astype(np.int8)]
    for thing, (box, mask) in zip(things, inside):
        rows, cols = (slice(s.start * _SUPER, s.stop * _SUPER) for s in box)
        colour = (np.array(COLOURS[thing.colour]) + rng.uniform(-8, 8, 3)).astype(np.float32)
        patch = np.broadcast_to(colour, (*mask.shape, 3)).copy()
        patch[_texture(thing, axis[cols], axis[rows])] *= 0.4
        patch[~_eroded(mask)] *= 0.45  # a thin dark rim parts a thing from any region
        canvas[rows, cols][mask] = patch[mask]
    noise = rng.normal(0, 2, (size, size, 3))
    pixels = canvas.reshape(size, _SUPER, size, _SUPER, 3).mean((1, 3)) + noise
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _texture(thing: Thing, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    x, y = xs[None] - thing.cx, ys[:, None] - thing.cy
    if thing.texture == "striped":
        return (x + y) / 6.5 % 1 < 0.36
    if thing.texture == "dotted":
        return np.hypot(x % 6 - 3, y % 6 - 3) < 1.5
    return np.zeros((len(ys), len(xs)), dtype=bool)


def _eroded(mask: np.ndarray, steps: int = 2) -> np.ndarray:
    """Take ``steps`` samples off the border of a bool mask (four neighbours)."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


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
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


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
        entries.append(
            {
                "image_id": image_id,
                "category_id": 1,
                "segmentation": encode_mask(mask),
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

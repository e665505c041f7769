"""Entities: which pixels belong to which entity, and the colormap that shows it to the model.

An entity is a class-agnostic segment of an image. `EntityMap` holds all entities of one image as
one integer per pixel, so two entities never share a pixel; files of overlapping masks are flattened
on the way in. Entities are addressed by *index* (0..E-1) inside the program and by *segment id* in
files and results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gella.entities.color_choice import location_colors, random_colors, separated_colors
from gella.entities.limits import MAX_ENTITIES, MAX_SEGMENT_ID
from gella.entities.masks import binary_masks, flatten
from gella.entities.rle import encode_mask
from gella.entities.runs import Runs, find_runs, flip_runs, pad_runs, pick_runs

ASSIGNMENTS = ("random", "location", "separated")


@dataclass
class EntityMap:
    """The E entities of one image of H x W pixels.

    Attributes:
        ids: int32 (H, W); 0 is no entity, k in 1..E is the entity of index k - 1.
        segment_ids: E distinct integers, the ids by which files name the entities; default 1..E.
        scores: float32 (E,), the segmenter's confidence; default 1.0.

    E may be 0, and an entity may have no pixel (after a resize): it keeps its place, so indices
    stay comparable between the frames of one image. `ids` is not to be changed in place: what is
    known of its runs is kept. Raises ValueError for other shapes and types, repeated segment ids,
    non-finite scores and pixels over E.
    """

    ids: np.ndarray
    segment_ids: list[int] = field(default_factory=list)
    scores: np.ndarray = None  # type: ignore[assignment]
    _runs: Runs | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = np.asarray(self.ids)
        if given.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers (H, W), got {given.dtype} {given.shape}")
        for end in (given.min(), given.max()) if given.dtype.itemsize > 4 and given.size else ():
            if not 0 <= end < 1 << 31:
                raise ValueError(f"ids holds {end}; entity numbers are 0 to 2147483647")
        self.ids = np.ascontiguousarray(given, dtype=np.int32)
        if self.ids.ndim != 2 or 0 in self.ids.shape:
            raise ValueError(f"ids must be (H, W) with at least a pixel, got {self.ids.shape}")
        highest = int(self.ids.view(np.uint32).max())  # a negative number is 2^31 or more here
        if highest >= 1 << 31:
            raise ValueError(f"ids holds {int(self.ids.min())}; entity numbers start at 0")
        if highest > MAX_ENTITIES and not len(self.segment_ids):
            raise ValueError(
                f"ids holds entity number {highest}, more than {MAX_ENTITIES}; numbers count the "
                "entities, and ids of a file go through EntityMap.from_id_image"
            )
        self.segment_ids = [int(i) for i in self.segment_ids] or list(range(1, highest + 1))
        count = len(self.segment_ids)
        if highest > count:
            raise ValueError(f"ids holds entity number {highest} but segment_ids has {count}")
        if len(set(self.segment_ids)) != count:
            repeated = sorted(i for i in set(self.segment_ids) if self.segment_ids.count(i) > 1)
            raise ValueError(f"segment_ids repeats {repeated[:5]}; every entity needs its own id")
        self.scores = _checked_scores(self.scores, count)

    @classmethod
    def from_id_image(
        cls,
        id_image: np.ndarray,
        segment_ids: Sequence[int] | None = None,
        scores: Sequence[float] | np.ndarray | None = None,
        *,
        max_entities: int = MAX_ENTITIES,
    ) -> EntityMap:
        """Number the ids of an (H, W) integer image, 0 being void.

        Args:
            id_image: (H, W), any integer type, for instance the ids of a panoptic PNG; 0 to
                `MAX_SEGMENT_ID`.
            segment_ids: which ids are entities and in which order; one that has no pixel is kept,
                ids of the image that are not listed become 0. None: all non-zero ids, ascending.
            scores: (E,), in the order of `segment_ids`.
            max_entities: more of them are refused.

        Raises ValueError for another type, ids out of range, and too many of them.
        """
        image = np.asarray(id_image)
        if image.ndim != 2 or image.size == 0 or image.dtype.kind not in "iu":
            raise ValueError(f"id image must be integer (H, W), got {image.dtype} {image.shape}")
        runs = find_runs(image)
        values, inverse = np.unique(runs.values, return_inverse=True)
        for end in (int(values[0]), int(values[-1])):
            if not 0 <= end <= MAX_SEGMENT_ID:
                raise ValueError(f"the id image holds {end}; ids are 0 (void) to {MAX_SEGMENT_ID}")
        count = np.count_nonzero(values) if segment_ids is None else len(segment_ids)
        if count > max_entities:
            raise ValueError(f"holds {count} entities, more than the {max_entities} that are read")
        if segment_ids is None:
            segment_ids = [int(v) for v in values if v != 0]
        wanted = [int(i) for i in segment_ids]
        number = {segment_id: k for k, segment_id in enumerate(wanted, start=1)}
        numbers = np.array([number.get(int(v), 0) for v in values], dtype=np.int32)
        runs = runs._replace(values=numbers[inverse])
        result = cls(runs.paint(runs.values), wanted, _checked_scores(scores, len(wanted)))
        result._runs = runs
        return result

    @classmethod
    def from_masks(
        cls,
        masks: np.ndarray,
        scores: Sequence[float] | np.ndarray | None = None,
        segment_ids: Sequence[int] | None = None,
    ) -> EntityMap:
        """Flatten masks (E, H, W) that may overlap; see `binary_masks` for what may be in them.

        They are painted in ascending score, so the best lies on top; among equal scores the smaller
        one does, and among equal sizes the later one. Entities that end without a visible pixel are
        dropped; the others keep their order and their ids (by default place + 1 in `masks`).
        """
        masks = binary_masks(masks)
        count = masks.shape[0]
        ranks = _checked_scores(scores, count)
        names = list(range(1, count + 1)) if segment_ids is None else [int(i) for i in segment_ids]
        if len(names) != count:
            raise ValueError(f"{count} masks but {len(names)} segment_ids; give one id per mask")
        areas = masks.sum(axis=(1, 2), dtype=np.int64)
        size = (masks.shape[1], masks.shape[2])
        ids, visible = flatten(size, areas, ranks, masks.__getitem__)
        return cls(ids, [name for name, seen in zip(names, visible) if seen], ranks[visible])

    @property
    def num_entities(self) -> int:
        """E, entities without a pixel included."""
        return len(self.segment_ids)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.ids.shape[0], self.ids.shape[1])

    def bitmasks(self) -> np.ndarray:
        """One mask per entity: bool (E, H, W)."""
        # Bytes compare several times faster than int32, and few images have more entities.
        kind = np.uint8 if self.num_entities < 256 else np.int32
        numbers = np.arange(1, self.num_entities + 1, dtype=kind)
        return self.ids.astype(kind, copy=False)[None] == numbers[:, None, None]

    def areas(self) -> np.ndarray:
        """Pixels per entity: int64 (E,)."""
        return self._sums(self.runs().lengths).astype(np.int64)

    def union(self, indices: Iterable[int]) -> np.ndarray:
        """Pixels of any of the given entities (indices 0..E-1): bool (H, W).

        Raises IndexError for an index out of range.
        """
        chosen = np.zeros(self.num_entities + 1, dtype=bool)
        for index in indices:
            if not 0 <= int(index) < self.num_entities:
                raise IndexError(f"entity index {index} of {self.num_entities} entities")
            chosen[int(index) + 1] = True
        return self.runs().paint(chosen[self.runs().values])

    def to_rle(self) -> list[dict[str, Any]]:
        """COCO run-length codes, one per entity: {"size": [H, W], "counts": str}."""
        return [encode_mask(mask) for mask in self.bitmasks()]

    def index_of(self, segment_id: int) -> int:
        """Index of the entity that files call `segment_id`; KeyError if there is none."""
        try:
            return self.segment_ids.index(int(segment_id))
        except ValueError:
            raise KeyError(
                f"segment id {segment_id} is not among the {self.num_entities} entities"
            ) from None

    def resize(self, height: int, width: int) -> EntityMap:
        """Nearest-neighbour copy of height x width pixels, sampled at pixel centres."""
        if height < 1 or width < 1:
            raise ValueError(f"cannot resize to {height} x {width}; both sides must be positive")
        rows = _nearest_indices(self.ids.shape[0], height)
        columns = _nearest_indices(self.ids.shape[1], width)
        return self._with_runs(pick_runs(self.runs(), rows, columns))

    def pad(self, height: int, width: int) -> EntityMap:
        """Copy of height x width pixels, with no entity in the pixels added below and right."""
        old_height, old_width = self.size
        if height < old_height or width < old_width:
            raise ValueError(f"cannot pad {old_height} x {old_width} to {height} x {width}")
        return self._with_runs(pad_runs(self.runs(), height, width))

    def flip(self) -> EntityMap:
        """Copy mirrored left to right."""
        return self._with_runs(flip_runs(self.runs()))

    def centroids(self) -> np.ndarray:
        """Mean (x, y) pixel index per entity: float32 (E, 2).

        An entity without pixels gets the middle of the image, so that the result is finite.
        """
        height, width = self.size
        runs, counts = self.runs(), self.areas()
        result = np.tile(np.array([(width - 1) / 2, (height - 1) / 2]), (self.num_entities, 1))
        middles = runs.columns() + (runs.lengths - 1) / 2  # halves are exact
        for axis, grid in enumerate((middles, runs.rows())):
            sums = self._sums(grid * runs.lengths)
            result[:, axis] = np.where(counts > 0, sums / np.maximum(counts, 1), result[:, axis])
        return result.astype(np.float32)

    def runs(self) -> Runs:
        """Runs of `ids`, found at the first call."""
        if self._runs is None:
            self._runs = find_runs(self.ids)
        return self._runs

    def _sums(self, weights: np.ndarray) -> np.ndarray:
        # Per entity, of one weight per run; float64 is exact for whole numbers below 2^53.
        values, length = self.runs().values, self.num_entities + 1
        return np.bincount(values, weights=weights, minlength=length)[1:]

    def _with_runs(self, runs: Runs) -> EntityMap:
        # The same entities in another frame; nothing that was checked can have become wrong.
        result = object.__new__(EntityMap)
        result.ids, result._runs = runs.paint(runs.values), runs
        result.segment_ids, result.scores = list(self.segment_ids), self.scores.copy()
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker sends: the runs, which are a hundredth of the pixels."""
        runs = self.runs()
        if not _few(runs):
            return {**self.__dict__, "_runs": None}
        largest = max(len(runs.values), runs.width)
        kinds = np.min_scalar_type(self.num_entities), np.min_scalar_type(largest)
        state = {**self.__dict__, "_runs": runs.astype(*kinds)}
        del state["ids"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Paint the pixels again."""
        self.__dict__.update(state)
        if self._runs is not None:
            self._runs = self._runs.astype(np.int32, np.intp)
            self.ids = self._runs.paint(self._runs.values)


def rgb_to_id(rgb: np.ndarray) -> np.ndarray:
    """Segment ids of a panoptic PNG: uint8 (H, W, 3) -> int32 (H, W), R + 256 G + 65536 B."""
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"an id image must be uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")
    bytes_ = np.ascontiguousarray(rgb).reshape(-1)
    ids = np.empty(bytes_.size // 3, dtype=np.int32)
    # Four bytes from each pixel's first on are R, G, B and the next pixel's R, to be masked out.
    # The last pixel has no next one.
    words = np.ndarray((max(ids.size - 1, 0),), "<i4", bytes_.data, strides=(3,))
    np.bitwise_and(words, 0xFFFFFF, out=ids[:-1])
    ids[-1:] = sum(int(byte) << shift for byte, shift in zip(bytes_[-3:], (0, 8, 16)))
    return ids.reshape(rgb.shape[:2])


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Inverse of `rgb_to_id`: integers (H, W) in 0..2^24 - 1 -> uint8 (H, W, 3)."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be integer (H, W), got {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f"ids {ids.min()}..{ids.max()} do not fit three bytes (0..16777215)")
    return np.stack([(ids >> shift) & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def entity_colors(entities: EntityMap, assignment: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one colour per entity for the colormap (paper, section 3.2): uint8 RGB (E, 3).

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
        return id_to_rgb(random_colors(count, rng)[None])[0]
    if assignment == "location":
        return location_colors(entities.centroids(), entities.size)
    if assignment == "separated":
        return separated_colors(count, rng)
    raise ValueError(f"colour assignment {assignment!r} is none of {', '.join(ASSIGNMENTS)}")


def paint_colormap(entities: EntityMap, colors: np.ndarray) -> np.ndarray:
    """The colormap (paper, section 3.2): uint8 (H, W, 3), black where no entity is.

    In memory each channel is a plane of its own: `transpose(2, 0, 1)` is contiguous, as models
    want it. A process's first call compiles the loop, which takes a second.

    Args:
        colors: uint8 RGB (E, 3), one per entity.
    """
    colors = np.asarray(colors, dtype=np.uint8)
    if colors.shape != (entities.num_entities, 3):
        raise ValueError(f"{entities.num_entities} entities but colours of shape {colors.shape}")
    from gella.entities.colormap_kernel import paint_planes  # imports numba and compiles

    return paint_planes(entities.ids, colors).transpose(1, 2, 0)


def _checked_scores(scores: Any, count: int) -> np.ndarray:
    if scores is None:
        return np.ones(count, dtype=np.float32)
    result = np.asarray(scores, dtype=np.float32)
    if result.shape != (count,):
        raise ValueError(f"{count} entities but scores of shape {result.shape}")
    if not np.isfinite(result).all():
        raise ValueError(f"score {int(np.flatnonzero(~np.isfinite(result))[0])} is not finite")
    return result


def _few(runs: Runs) -> bool:
    # Where runs are shorter than this, pixels are the cheaper way.
    return len(runs.values) * 8 <= runs.height * runs.width


def _nearest_indices(old: int, new: int) -> np.ndarray:
    # Integer arithmetic of floor((i + 0.5) * old / new): no rounding at exact ratios.
    return ((2 * np.arange(new, dtype=np.int64) + 1) * old) // (2 * new)

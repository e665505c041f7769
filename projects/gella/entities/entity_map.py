"""Entities: which pixels of an image belong to which of them.

An entity is a class-agnostic segment of an image. `EntityMap` holds all entities of one image as
one integer per pixel, that of the smallest entity there, and beside it the whole masks of those
that a smaller one covers in part or wholly: every entity has its own mask, whatever lies on it.
Entities are addressed by *index* (0..E-1) inside the program and by *segment id* in files and
results.

Masks and id images are long stretches of one value, so what is asked of them is answered per
stretch (`Runs`) instead of per pixel, and a mask is painted only when it is asked for.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from gella.entities.rle import decode_box, encode_mask, mask_area

_logger = logging.getLogger(__name__)

# How large what a stranger's file declares may be, checked before anything of that size is decoded.

MAX_PIXELS = 120_000_000
"""Of a picture, height x width: those of most telephones have up to 108 million. Decoding one takes
about 12 bytes per pixel, its entities up to 50."""

MAX_ENTITIES = 10_000
"""Of one image. Segmenters find up to about 1,000, and annotations hold fewer."""

MAX_SEGMENT_ID = (1 << 24) - 1
"""Largest id of a pixel: a panoptic PNG has three bytes for it."""


def check_pixels(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """ValueError with both numbers if an image has no pixel, or more than `max_pixels`."""
    if height < 1 or width < 1:
        raise ValueError(f"{width}x{height} pixels (width x height): an image has at least one")
    if height * width > max_pixels:
        raise ValueError(
            f"{width}x{height} = {height * width} pixels are more than the {max_pixels} that are "
            "read; scale it down, or raise max_pixels"
        )


def check_count(count: int, max_entities: int = MAX_ENTITIES) -> None:
    """ValueError with both numbers if an image has more entities than are read."""
    if count > max_entities:
        raise ValueError(f"holds {count} entities, more than the {max_entities} that are read")


_LISTED = 10  # ids that a line of the log names


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

    @classmethod
    def of(cls, image: np.ndarray) -> Runs:
        """Runs of an (H, W) image with at least one pixel."""
        flat, width = image.reshape(-1), image.shape[1]
        first = np.empty(flat.size, dtype=bool)  # does a run begin here?
        np.not_equal(flat[1:], flat[:-1], out=first[1:])
        first[::width] = True  # none goes over the end of a row, so that rows can be picked
        starts = np.flatnonzero(first)
        offsets = np.searchsorted(starts, np.arange(len(image) + 1) * width)
        return cls(flat[starts], np.diff(starts, append=flat.size), offsets, width)

    @property
    def height(self) -> int:
        """H."""
        return len(self.offsets) - 1

    def paint(self, values: np.ndarray) -> np.ndarray:
        """Pixels from one value per run: (R,) -> (H, W), or (C, R) -> (C, H, W); any dtype."""
        pixels = np.repeat(values, self.lengths, axis=-1)
        return pixels.reshape(*values.shape[:-1], self.height, self.width)

    def rows(self) -> np.ndarray:
        """Row of each run: intp (R,)."""
        return np.repeat(np.arange(self.height), np.diff(self.offsets))

    def starts(self) -> np.ndarray:
        """Pixel at which each run begins, counted row by row: intp (R,)."""
        return np.cumsum(self.lengths) - self.lengths

    def columns(self) -> np.ndarray:
        """Column in which each run begins: intp (R,)."""
        return self.starts() - self.rows() * self.width

    def pick(self, rows: np.ndarray, columns: np.ndarray) -> Runs:
        """Runs of `image[rows][:, columns]`.

        Args:
            rows: integers (h,) in 0..H - 1, any order, repeated or not.
            columns: integers (w,) in 0..W - 1, ascending, repeated or not.
        """
        # edges[c]: the new column in which old column c begins, or would begin if it were picked.
        edges = np.searchsorted(columns, np.arange(self.width + 1))
        begin = self.columns()
        lengths = edges[begin + self.lengths] - edges[begin]
        kept = np.flatnonzero(lengths)
        offsets = np.searchsorted(kept, self.offsets)
        counts = np.diff(offsets)[rows]
        picked = np.zeros(len(rows) + 1, dtype=np.intp)
        np.cumsum(counts, out=picked[1:])
        # Each new row is a range of the old runs.
        runs = kept[np.arange(picked[-1]) + np.repeat(offsets[rows] - picked[:-1], counts)]
        return Runs(self.values[runs], lengths[runs], picked, len(columns))

    def pad(self, height: int, width: int, top: int = 0, left: int = 0) -> Runs:
        """Runs of the image with zeros around it, to height x width pixels; it starts there."""
        values, lengths, offsets, old_width = self
        for places, added in ((slice(1, None), width - old_width - left), (slice(-1), left)):
            if added:
                values = np.insert(values, offsets[places], 0)
                lengths = np.insert(lengths, offsets[places], added)
                offsets = offsets + np.arange(len(offsets))
        below = height - self.height - top
        zeros = np.zeros(max(top, below), dtype=values.dtype)
        full = np.full(max(top, below), width, dtype=np.intp)
        ends = offsets[-1] + top + np.arange(1, below + 1)
        return Runs(
            np.concatenate((zeros[:top], values, zeros[:below])),
            np.concatenate((full[:top], lengths, full[:below])),
            np.concatenate((np.arange(top), offsets + top, ends)),
            width,
        )

    def flip(self) -> Runs:
        """Runs of the image mirrored left to right."""
        ends = np.repeat(self.offsets[:-1] + self.offsets[1:] - 1, np.diff(self.offsets))
        order = ends - np.arange(len(self.values))
        return self._replace(values=self.values[order], lengths=self.lengths[order])


class EntityMap:
    """The E entities of one image of H x W pixels.

    Attributes:
        ids: int32 (H, W); 0 is no entity, k in 1..E is the entity of index k - 1; where several
            lie, the smallest.
        segment_ids: E distinct integers, the ids by which files name the entities; default 1..E.
        scores: float32 (E,), the segmenter's confidence; default 1.0.
        wholes: the whole mask (runs of bool) of each index that others lie on; the masks of all
            other entities are their pixels of `ids`.
        merged: ids of masks that equal another's -> the segment id under which both are known.

    E may be 0, and an entity may have no pixel (after a resize): it keeps its place, so indices
    stay comparable between the frames of one image. Nothing of it is to be changed in place: what
    is known of its runs is kept. Raises ValueError for other shapes and types, repeated segment
    ids, non-finite scores and pixels over E.
    """

    def __init__(
        self,
        ids: np.ndarray,
        segment_ids: Sequence[int] = (),
        scores: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Entities that share no pixel; see the class, and `from_codes` for others."""
        given = np.asarray(ids)
        if given.dtype.kind not in "iu" or given.ndim != 2 or not given.size:
            raise ValueError(
                "ids must be integers (H, W) with at least a pixel, got "
                f"{given.dtype} {given.shape}"
            )
        lowest, highest = int(given.min()), int(given.max())
        if lowest < 0:
            raise ValueError(f"ids holds {lowest}; entity numbers start at 0")
        if highest > MAX_ENTITIES and not len(segment_ids):
            raise ValueError(
                f"ids holds entity number {highest}, more than {MAX_ENTITIES}; numbers count the "
                "entities, and ids of a file go through EntityMap.from_id_image"
            )
        self.segment_ids = _checked_ids(segment_ids) or list(range(1, highest + 1))
        count = len(self.segment_ids)
        if highest > count:
            raise ValueError(f"ids holds entity number {highest} but segment_ids has {count}")
        self.ids = np.ascontiguousarray(given, dtype=np.int32)
        self.scores = _checked_scores(scores, count)
        self.wholes: dict[int, Runs] = {}
        self.merged: dict[int, int] = {}
        self._runs: Runs | None = None

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
        runs = Runs.of(image)
        values, inverse = np.unique(runs.values, return_inverse=True)
        for end in (int(values[0]), int(values[-1])):
            if not 0 <= end <= MAX_SEGMENT_ID:
                raise ValueError(f"the id image holds {end}; ids are 0 (void) to {MAX_SEGMENT_ID}")
        # A few values stand for a million pixels.
        wanted = _checked_ids(values[values > 0] if segment_ids is None else segment_ids)
        check_count(len(wanted), max_entities)
        number = {segment_id: k for k, segment_id in enumerate(wanted, start=1)}
        numbers = np.array([number.get(int(v), 0) for v in values], dtype=np.int32)
        runs = runs._replace(values=numbers[inverse])
        return cls._made(runs, wanted, _checked_scores(scores, len(wanted)))

    @classmethod
    def from_masks(
        cls,
        masks: np.ndarray,
        scores: Sequence[float] | np.ndarray | None = None,
        segment_ids: Sequence[int] | None = None,
        where: str = "masks",
    ) -> EntityMap:
        """Masks (E, H, W) that may overlap; see `binary_masks` and `from_codes`."""
        masks = binary_masks(masks)
        codes = [encode_mask(mask) for mask in masks]
        return cls.from_codes(masks.shape[1:], codes, scores, segment_ids, where)

    @classmethod
    def from_codes(
        cls,
        size: tuple[int, ...],
        codes: Sequence[dict[str, Any]],
        scores: Sequence[float] | np.ndarray | None = None,
        segment_ids: Sequence[int] | None = None,
        where: str = "masks",
    ) -> EntityMap:
        """Masks that may overlap, of which only one is held at a time.

        Where masks overlap the smaller is painted on top, whatever their scores, and each keeps all
        of its pixels; the order of the masks changes nothing. A mask without a pixel is left out,
        and of equal ones the best is kept, `merged` names the others: both are counted in the log.
        The entities keep the order and the ids of the masks.

        Args:
            size: (H, W) of the masks.
            codes: E compressed run lengths, see `rle.encode_segmentation`.
            scores: (E,), finite; default 1.
            segment_ids: (E,); default each one's place from 1.
            where: begins the lines in the log.
        """
        count = len(codes)
        ranks = _checked_scores(scores, count)
        names = _checked_ids(range(1, count + 1) if segment_ids is None else segment_ids)
        if len(names) != count:
            raise ValueError(f"{count} masks but {len(names)} segment_ids; give one id per mask")
        areas = np.array([mask_area(code) for code in codes], dtype=np.int64)
        order = sorted(
            np.flatnonzero(areas).tolist(),
            key=lambda k: (-areas[k], codes[k]["counts"], -ranks[k], k),
        )
        canvas, merged, owner = np.zeros(size, dtype=np.min_scalar_type(count)), {}, -1
        for k in order:
            if owner >= 0 and codes[k]["counts"] == codes[owner]["counts"]:
                merged[names[k]] = names[owner]
                continue
            owner = k
            mask, place = decode_box(codes[k])
            canvas[place][mask] = k + 1  # over what was painted before
        kept = [k for k in range(count) if areas[k] and names[k] not in merged]
        numbers = np.zeros(count + 1, dtype=np.int32)
        numbers[np.array(kept, dtype=np.intp) + 1] = np.arange(1, len(kept) + 1)
        painted = Runs.of(canvas)
        runs = painted._replace(values=numbers[painted.values])
        result = cls._made(runs, [names[k] for k in kept], ranks[kept], merged=merged)
        for index in np.flatnonzero(result.areas() < areas[kept]).tolist():
            mask, (rows, columns) = decode_box(codes[kept[index]])
            result.wholes[index] = Runs.of(mask).pad(size[0], size[1], rows.start, columns.start)
        empty = tuple(names[k] for k in np.flatnonzero(areas == 0))
        _tell(f"{where}: {len(empty)} of {count} masks have no pixel and are left out", empty)
        equal = tuple(merged)
        _tell(f"{where}: {len(equal)} of {count} masks equal another mask and are left out", equal)
        return result

    @property
    def num_entities(self) -> int:
        """E, entities without a pixel included."""
        return len(self.segment_ids)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        if self._runs is not None:  # `ids` of a large picture need not be painted for it
            return self._runs.height, self._runs.width
        return self.ids.shape[0], self.ids.shape[1]

    def bitmasks(self) -> np.ndarray:
        """One mask per entity: bool (E, H, W)."""
        # Bytes compare several times faster than int32, and few images have more entities.
        kind = np.uint8 if self.num_entities < 256 else np.int32
        numbers = np.arange(1, self.num_entities + 1, dtype=kind)
        masks = self.ids.astype(kind, copy=False)[None] == numbers[:, None, None]
        for index, whole in self.wholes.items():
            masks[index] = whole.paint(whole.values)
        return masks

    @cached_property
    def ids(self) -> np.ndarray:
        """See the class; painted when first asked for."""
        runs = self.runs()
        return runs.paint(runs.values)

    def areas(self) -> np.ndarray:
        """Pixels per entity: int64 (E,)."""
        return self._sums(lambda runs: runs.lengths).astype(np.int64)

    def overlaps(self, mask: np.ndarray) -> np.ndarray:
        """Pixels of each entity that lie in a bool (H, W) mask: int64 (E,)."""
        flat = np.ascontiguousarray(mask).reshape(-1)
        inside = self._sums(lambda runs: np.add.reduceat(flat, runs.starts(), dtype=np.int64))
        return inside.astype(np.int64)

    def union(self, indices: Iterable[int]) -> np.ndarray:
        """Pixels of any of the given entities (indices 0..E-1): bool (H, W).

        Raises IndexError for an index out of range.
        """
        chosen = np.zeros(self.num_entities + 1, dtype=bool)
        for index in indices:
            if not 0 <= int(index) < self.num_entities:
                raise IndexError(f"entity index {index} of {self.num_entities} entities")
            chosen[int(index) + 1] = True
        mask = self.runs().paint(chosen[self.runs().values])
        for index, whole in self.wholes.items():
            if chosen[index + 1]:
                mask |= whole.paint(whole.values)
        return mask

    def to_rle(self) -> list[dict[str, Any]]:
        """COCO run-length codes, one per entity: {"size": [H, W], "counts": str}."""
        return [encode_mask(self.union([index])) for index in range(self.num_entities)]

    def index_of(self, segment_id: int) -> int:
        """Index of the entity that files call `segment_id`; KeyError if there is none."""
        try:
            return self.segment_ids.index(self.merged.get(int(segment_id), int(segment_id)))
        except ValueError:
            raise KeyError(
                f"segment id {segment_id} is not among the {self.num_entities} entities"
            ) from None

    def resize(self, height: int, width: int) -> EntityMap:
        """Nearest-neighbour copy of height x width pixels, sampled at pixel centres."""
        if height < 1 or width < 1:
            raise ValueError(f"cannot resize to {height} x {width}; both sides must be positive")
        # Integer arithmetic of floor((i + 0.5) * old / new): no rounding at exact ratios.
        rows, columns = (
            ((2 * np.arange(new, dtype=np.int64) + 1) * old) // (2 * new)
            for old, new in zip(self.size, (height, width))
        )
        return self._moved(lambda runs: runs.pick(rows, columns))

    def pad(self, height: int, width: int) -> EntityMap:
        """Copy of height x width pixels, with no entity in the pixels added below and right."""
        old_height, old_width = self.size
        if height < old_height or width < old_width:
            raise ValueError(f"cannot pad {old_height} x {old_width} to {height} x {width}")
        return self._moved(lambda runs: runs.pad(height, width))

    def crop(self, height: int, width: int) -> EntityMap:
        """Copy of the top left height x width pixels."""
        return self._moved(lambda runs: runs.pick(np.arange(height), np.arange(width)))

    def flip(self) -> EntityMap:
        """Copy mirrored left to right."""
        return self._moved(Runs.flip)

    def canonical(self) -> EntityMap:
        """The same entities by area, small first, then by their first visible pixels.

        For the same masks it is the same map, whatever their order, ids and scores were. Those that
        come first get the clearest of `separated` colours: annotations, too, list things before
        the ground that they stand on.
        """
        runs, areas, count = self.runs(), self.areas().tolist(), self.num_entities
        values, first = np.unique(runs.values, return_index=True)
        place = dict(zip((values - 1).tolist(), first.tolist()))

        def key(index: int) -> tuple[Any, ...]:
            if index in place or index not in self.wholes:
                return areas[index], place.get(index, -1), b""
            return areas[index], -1, b"".join(map(bytes, self.wholes[index][:2]))  # hidden

        order = sorted(range(count), key=key)
        numbers = np.zeros(count + 1, dtype=np.int32)
        numbers[np.array(order, dtype=np.intp) + 1] = np.arange(1, count + 1)
        return self._made(
            runs._replace(values=numbers[runs.values]),
            [self.segment_ids[index] for index in order],
            self.scores[order],
            {k: self.wholes[index] for k, index in enumerate(order) if index in self.wholes},
            self.merged,
        )

    def digest(self) -> int:
        """A number of 32 bits that follows from the pixels, for `canonical` maps from the masks."""
        digest = 0
        for runs in (self.runs(), *(self.wholes[index] for index in sorted(self.wholes))):
            for part in (runs.values, runs.lengths, runs.offsets):
                digest = zlib.crc32(part.astype("<i8").data, digest)
        return digest

    def centroids(self) -> np.ndarray:
        """Mean (x, y) pixel index per entity: float32 (E, 2).

        An entity without pixels gets the middle of the image, so that the result is finite.
        """
        height, width = self.size
        counts = self.areas()[:, None]
        # Halves are exact.
        x = self._sums(lambda runs: (runs.columns() + (runs.lengths - 1) / 2) * runs.lengths)
        y = self._sums(lambda runs: runs.rows() * runs.lengths)
        means = np.stack([x, y], axis=1) / np.maximum(counts, 1)
        middle = [(width - 1) / 2, (height - 1) / 2]
        return np.where(counts > 0, means, middle).astype(np.float32)

    def runs(self) -> Runs:
        """Runs of `ids`, found at the first call."""
        if self._runs is None:
            self._runs = Runs.of(self.ids)
        return self._runs

    def _sums(self, weigh: Callable[[Runs], np.ndarray]) -> np.ndarray:
        # Per entity, of one weight per run; float64 is exact for whole numbers below 2^53.
        runs = self.runs()
        sums = np.bincount(runs.values, weights=weigh(runs), minlength=self.num_entities + 1)[1:]
        for index, whole in self.wholes.items():
            sums[index] = weigh(whole)[whole.values].sum()
        return sums

    def _moved(self, move: Callable[[Runs], Runs]) -> EntityMap:
        # The same entities in another frame.
        wholes = {index: move(whole) for index, whole in self.wholes.items()}
        moved = move(self.runs())
        return self._made(moved, list(self.segment_ids), self.scores.copy(), wholes, self.merged)

    @classmethod
    def _made(
        cls,
        runs: Runs,
        segment_ids: list[int],
        scores: np.ndarray,
        wholes: dict[int, Runs] | None = None,
        merged: dict[int, int] | None = None,
    ) -> EntityMap:
        # Of parts that are right already; the pixels are painted when somebody asks for them.
        result = object.__new__(cls)
        result.segment_ids, result.scores, result._runs = segment_ids, scores, runs
        result.wholes, result.merged = wholes or {}, merged or {}
        return result

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker sends: the runs, which are a hundredth of the pixels."""

        def small(runs: Runs) -> tuple[Any, ...]:
            counts = np.min_scalar_type(max(len(runs.values), runs.width))
            values = runs.values.astype(np.min_scalar_type(self.num_entities))
            return values, runs.lengths.astype(counts), runs.offsets.astype(counts), runs.width

        wholes = {index: small(whole) for index, whole in self.wholes.items()}
        known = {"segment_ids": self.segment_ids, "scores": self.scores, "merged": self.merged}
        return {"_runs": small(self.runs()), "wholes": wholes, **known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was sent."""

        def large(small: tuple[Any, ...], kind: type) -> Runs:
            values, lengths, offsets, width = small
            return Runs(
                values.astype(kind), lengths.astype(np.intp), offsets.astype(np.intp), width
            )

        wholes = {index: large(whole, bool) for index, whole in state["wholes"].items()}
        self.__dict__ |= {**state, "_runs": large(state["_runs"], np.int32), "wholes": wholes}


@lru_cache(maxsize=1000)
def _tell(line: str, names: tuple[int, ...]) -> None:
    # Once: a dataset's masks are read in every epoch.
    if names:
        more = ", ..." if len(names) > _LISTED else ""
        _logger.warning("%s: %s%s", line, ", ".join(map(str, names[:_LISTED])), more)


def binary_masks(masks: Any) -> np.ndarray:
    """Masks as bool (E, H, W): 0 is outside, and one other value per mask is inside.

    Raises ValueError for another shape or type, and naming mask and value for one that is not
    finite or beside a second value: soft masks have to be thresholded by their owner.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be (E, H, W) with at least a pixel, got shape {masks.shape}")
    if masks.dtype.kind not in "buif":
        raise ValueError(f"masks must be bool (E, H, W), got {masks.dtype}")
    if masks.dtype.kind == "b":
        return masks
    result = masks != 0
    for number, mask in enumerate(masks):
        highest = mask.max()  # NaN if one is among them
        odd = mask[result[number] & (mask != highest)]
        if odd.size or not np.isfinite(highest):
            wrong = odd[0] if odd.size else highest
            raise ValueError(
                f"mask {number} holds {wrong} beside {highest}; masks are 0 outside and one value "
                "inside: threshold them first"
            )
    return result


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


def _checked_ids(segment_ids: Iterable[int]) -> list[int]:
    ids = [int(i) for i in segment_ids]
    if len(set(ids)) < len(ids):
        repeated = sorted(i for i, times in Counter(ids).items() if times > 1)
        raise ValueError(f"segment_ids repeats {repeated[:5]}; every entity needs its own id")
    return ids


def _checked_scores(scores: Any, count: int) -> np.ndarray:
    if scores is None:
        return np.ones(count, dtype=np.float32)
    result = np.asarray(scores, dtype=np.float32)
    if result.shape != (count,):
        raise ValueError(f"{count} entities but scores of shape {result.shape}")
    if not np.isfinite(result).all():
        raise ValueError(f"score {int(np.flatnonzero(~np.isfinite(result))[0])} is not finite")
    return result

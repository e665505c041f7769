"""Entity maps against plain loops and pycocotools; colours; id images."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gella.entities import colormap_kernel
from gella.entities.entity_map import (
    ASSIGNMENTS,
    EntityMap,
    entity_colors,
    id_to_rgb,
    paint_colormap,
    rgb_to_id,
)
from gella.entities.masks import mask_iou


def random_masks(rng: np.random.Generator, count: int, side: int = 24) -> np.ndarray:
    masks = np.zeros((count, side, side), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, side - 4, size=2)
        height, width = rng.integers(2, 12, size=2)
        mask[top : top + height, left : left + width] = True
    return masks


def blobs(rng: np.random.Generator, count: int, height: int = 30, width: int = 47) -> EntityMap:
    """A Voronoi map: every pixel belongs to the nearest of `count` points."""
    points = np.stack([rng.integers(0, height, count), rng.integers(0, width, count)], axis=1)
    grid = np.stack(np.indices((height, width)), axis=-1)
    gaps = ((grid[:, :, None] - points) ** 2).sum(-1)
    return EntityMap(gaps.argmin(-1).astype(np.int32), list(range(100, 99 + count)))


@pytest.mark.parametrize("seed", range(8))
def test_from_masks_paints_ascending_score_and_smaller_on_top(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = random_masks(rng, 12)
    scores = rng.choice([0.2, 0.5, 0.9], size=12).astype(np.float32)
    result = EntityMap.from_masks(masks, scores, segment_ids=range(50, 62))
    expected = np.zeros((24, 24), dtype=int)
    for row, column in itertools.product(range(24), range(24)):
        over = [k for k in range(12) if masks[k, row, column]]
        if over:
            expected[row, column] = 50 + max(over, key=lambda k: (scores[k], -masks[k].sum(), k))
    names = np.array([0, *result.segment_ids])
    np.testing.assert_array_equal(names[result.ids], expected)
    assert result.segment_ids == sorted(set(np.unique(expected)) - {0})
    np.testing.assert_array_equal(result.scores, scores[np.array(result.segment_ids) - 50])


def test_hidden_mask_is_dropped_and_the_others_keep_their_place_as_id() -> None:
    masks = np.zeros((3, 6, 6), dtype=bool)
    masks[0, :2], masks[1, :2], masks[2, 3:] = True, True, True
    result = EntityMap.from_masks(masks, [0.1, 0.9, 0.5])
    assert result.segment_ids == [2, 3]
    np.testing.assert_allclose(result.scores, [0.9, 0.5])


@pytest.mark.parametrize("seed", range(5))
def test_from_id_image_equals_comparison_per_id(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.choice([0, 7, 300, 70000, 12], size=(9, 14)).repeat(3, axis=1)
    result = EntityMap.from_id_image(image, [300, 5, 7])
    assert result.segment_ids == [300, 5, 7] and result.num_entities == 3
    for mask, segment_id in zip(result.bitmasks(), [300, 5, 7]):
        np.testing.assert_array_equal(mask, image == segment_id)
    every = EntityMap.from_id_image(image)
    assert every.segment_ids == sorted(set(np.unique(image)) - {0})


def test_rle_decodes_to_the_masks_and_areas_and_unions_agree() -> None:
    entities = blobs(np.random.default_rng(0), 9)
    masks = entities.bitmasks()
    for code, mask in zip(entities.to_rle(), masks):
        assert isinstance(code["counts"], str)
        np.testing.assert_array_equal(coco_mask.decode(code).astype(bool), mask)
    np.testing.assert_array_equal(entities.areas(), masks.sum(axis=(1, 2)))
    np.testing.assert_array_equal(entities.union([1, 4, 4]), masks[1] | masks[4])
    assert not entities.union([]).any()
    with pytest.raises(IndexError, match="-1"):
        entities.union([-1])


def test_frames_keep_order_ids_and_scores() -> None:
    entities = EntityMap(np.array([[1, 0], [0, 2]]), [9, 4, 7], np.array([0.5, 0.25, 1.0]))
    up = entities.resize(4, 6)
    np.testing.assert_array_equal(up.ids, entities.ids.repeat(2, axis=0).repeat(3, axis=1))
    np.testing.assert_array_equal(up.resize(2, 2).ids, entities.ids)
    np.testing.assert_array_equal(entities.flip().ids, [[0, 1], [2, 0]])
    padded = entities.pad(3, 5)
    np.testing.assert_array_equal(padded.ids[:2, :2], entities.ids)
    assert padded.size == (3, 5) and padded.areas().tolist() == entities.areas().tolist()
    for other in (up, entities.flip(), padded):
        assert other.segment_ids == [9, 4, 7] and other.num_entities == 3
        np.testing.assert_array_equal(other.scores, entities.scores)
    assert entities.index_of(4) == 1
    with pytest.raises(KeyError, match="77"):
        entities.index_of(77)
    with pytest.raises(ValueError, match="pad"):
        padded.pad(2, 5)


def test_resize_is_nearest_at_pixel_centres() -> None:
    ids = np.arange(1, 8)[None].repeat(3, axis=0)
    small = EntityMap(ids).resize(1, 3).ids[0]
    expected = [ids[0, int((i + 0.5) * 7 / 3)] for i in range(3)]
    assert small.tolist() == expected


def test_centroids_equal_means_and_are_finite_for_empty_entities() -> None:
    entities = blobs(np.random.default_rng(3), 6)
    for k, mask in enumerate(entities.bitmasks()):
        rows, columns = np.nonzero(mask)
        np.testing.assert_allclose(
            entities.centroids()[k], (columns.mean(), rows.mean()), rtol=1e-6
        )
    empty = EntityMap(np.zeros((3, 5), np.int32), [8])
    np.testing.assert_array_equal(empty.centroids(), [[2, 1]])


def test_no_entity_is_a_valid_map() -> None:
    empty = EntityMap(np.zeros((4, 3), np.int32))
    assert empty.num_entities == 0 and empty.size == (4, 3)
    assert empty.bitmasks().shape == (0, 4, 3) and empty.to_rle() == []
    assert empty.areas().shape == (0,) and empty.centroids().shape == (0, 2)
    for assignment in ASSIGNMENTS:
        colors = entity_colors(empty, assignment, np.random.default_rng(0))
        assert colors.shape == (0, 3)
        assert not paint_colormap(empty, colors).any()
    assert EntityMap.from_masks(np.zeros((0, 4, 3), bool)).num_entities == 0
    assert mask_iou(empty.bitmasks(), np.ones((2, 4, 3), bool)).shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 2, 2)),), r"\(H, W\)"),
        ((np.array([[3]]), [1, 2]), "3"),
        ((np.array([[-1]]),), "-1"),
        ((np.array([[1, 2]]), [5, 5]), "5"),
        ((np.array([[1]]), [1], [0.1, 0.2]), "scores"),
        ((np.array([[1]]), [1], [float("nan")]), "finite"),
    ],
)
def test_bad_maps_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntityMap(*arguments)


def test_rgb_ids_round_trip_and_follow_the_panoptic_rule() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
    ids = rgb_to_id(rgb)
    assert ids.dtype == np.int32
    assert ids[2, 3] == rgb[2, 3] @ np.array([1, 256, 65536])
    np.testing.assert_array_equal(id_to_rgb(ids), rgb)
    with pytest.raises(ValueError, match="16777216"):
        id_to_rgb(np.array([[1 << 24]]))
    with pytest.raises(ValueError, match="uint8"):
        rgb_to_id(rgb.astype(np.int32))


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("count", [1, 9, 100, 700])
def test_colors_are_distinct_not_black_and_repeatable(assignment: str, count: int) -> None:
    entities = blobs(np.random.default_rng(count), count + 1)
    colors = entity_colors(entities, assignment, np.random.default_rng(5))
    assert colors.dtype == np.uint8 and colors.shape == (count, 3)
    assert len(np.unique(colors, axis=0)) == count
    assert colors.any(axis=1).all()
    again = entity_colors(entities, assignment, np.random.default_rng(5))
    np.testing.assert_array_equal(colors, again)
    other = entity_colors(entities, assignment, np.random.default_rng(6))
    assert np.array_equal(colors, other) == (assignment == "location")


def test_random_colors_stay_distinct_when_draws_collide() -> None:
    class Repeating:
        """Yields the same number for all entities at first."""

        calls = 0

        def integers(self, low: int, high: int, size: int) -> np.ndarray:
            self.calls += 1
            return np.full(size, 7) if self.calls == 1 else np.arange(100, 100 + size)

    entities = EntityMap(np.array([[1, 2, 3]]))
    colors = entity_colors(entities, "random", Repeating())  # type: ignore[arg-type]
    assert len(np.unique(colors, axis=0)) == 3


def test_separated_colors_lie_farther_apart_than_random_ones() -> None:
    def smallest_gap(colors: np.ndarray) -> float:
        points = np.concatenate((np.zeros((1, 3)), colors.astype(float)))
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        return gaps[~np.eye(len(points), dtype=bool)].min()

    entities = EntityMap(np.arange(1, 10)[None])
    gap = {
        name: np.median(
            [
                smallest_gap(entity_colors(entities, name, np.random.default_rng(seed)))
                for seed in range(60)
            ]
        )
        for name in ("random", "separated")
    }
    assert gap["separated"] > 2 * gap["random"] and gap["separated"] > 90


def test_location_colors_depend_on_the_place_only() -> None:
    ids = np.zeros((60, 60), np.int32)
    ids[5:15, 5:15], ids[40:50, 30:40] = 1, 2
    swapped = np.where(ids == 1, 2, np.where(ids == 2, 1, 0))
    rng = np.random.default_rng(0)
    first = entity_colors(EntityMap(ids), "location", rng)
    second = entity_colors(EntityMap(swapped), "location", rng)
    np.testing.assert_array_equal(first, second[::-1])
    scaled = entity_colors(EntityMap(ids).resize(180, 180), "location", rng)
    np.testing.assert_array_equal(first, scaled)
    with pytest.raises(ValueError, match="rainbow"):
        entity_colors(EntityMap(ids), "rainbow", rng)


def test_colormap_shows_each_entity_in_its_color_and_black_elsewhere() -> None:
    entities = blobs(np.random.default_rng(1), 8)
    colors = entity_colors(entities, "separated", np.random.default_rng(2))
    colormap = paint_colormap(entities, colors)
    assert colormap.dtype == np.uint8
    for mask, color in zip(entities.bitmasks(), colors):
        np.testing.assert_array_equal((colormap == color).all(-1), mask)
    assert not colormap[entities.ids == 0].any()
    with pytest.raises(ValueError, match="colours"):
        paint_colormap(entities, colors[:-1])


# One table serves 31 colours; pictures are made in pieces of 65,536 pixels, 32 at once.
SIZES = [(1, 1), (1, 31), (33, 1), (7, 13), (1, 65536), (257, 256), (65537, 2)]


def indexed(ids: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The colormap by plain indexing."""
    return np.concatenate((np.zeros((1, 3), np.uint8), colors))[ids]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 30, 31, 32, 62, 63, 255, 256, 700])
def test_colormap_is_a_table_look_up(size: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(count)
    ids = rng.integers(0, count + 1, size)
    colors = rng.integers(0, 256, (count, 3), dtype=np.uint8)
    result = paint_colormap(EntityMap(ids, list(range(1, count + 1))), colors)
    assert result.shape == (*size, 3) and result.dtype == np.uint8
    assert result.transpose(2, 0, 1).flags.c_contiguous  # as the page promises
    np.testing.assert_array_equal(result, indexed(ids, colors))


def test_colormap_of_any_memory_layout() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 41, (60, 94)).astype(np.int32)
    colors = rng.integers(0, 256, (40, 3), dtype=np.uint8)
    fixed = ids.copy()
    fixed.setflags(write=False)
    shifted = np.frombuffer(b"." + ids.tobytes(), np.int32, offset=1).reshape(ids.shape)
    for view in (ids[::2, ::3], ids[::-1, ::-1], np.asfortranarray(ids), ids.T, fixed, shifted):
        for other in (view, view.astype(">i4"), view.astype(np.uint8)):
            before = other.copy()
            expected = indexed(other.astype(int), colors)
            planes = colormap_kernel.paint_planes(other, colors)
            np.testing.assert_array_equal(planes.transpose(1, 2, 0), expected)
            names = list(range(1, 41))
            np.testing.assert_array_equal(paint_colormap(EntityMap(other, names), colors), expected)
            np.testing.assert_array_equal(other, before)
    strided = np.repeat(colors, 2, axis=0)[::2]
    expected = indexed(ids, colors)
    np.testing.assert_array_equal(paint_colormap(EntityMap(ids, names), strided), expected)


def test_a_number_without_a_color_is_black_and_reads_no_foreign_memory() -> None:
    ids = np.array([[-(2**31), -1, 0, 1, 2, 3, 31, 32, 33, 64, 256, 257, 65537, 2**31 - 1]])
    for count in (2, 32):
        colors = np.full((count, 3), 9, np.uint8)
        expected = np.where((ids > 0) & (ids <= count), 9, 0)
        for plane in colormap_kernel.paint_planes(ids, colors):
            np.testing.assert_array_equal(plane, expected)


def test_threads_paint_at_once() -> None:
    rng = np.random.default_rng(3)
    jobs = [
        (rng.integers(0, 21, (300, 301)), rng.integers(0, 256, (20, 3), dtype=np.uint8))
        for _ in range(24)
    ]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: colormap_kernel.paint_planes(*job), jobs))
    for planes, job in zip(results, jobs):
        np.testing.assert_array_equal(planes.transpose(1, 2, 0), indexed(*job))


def test_other_processors_paint_the_same_and_numba_waits_for_the_first_colormap() -> None:
    code = """
import sys, numpy as np, gella
from gella.entities.entity_map import EntityMap, paint_colormap
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
rng = np.random.default_rng(0)
ids, colors = rng.integers(0, 41, (150, 501)), rng.integers(0, 256, (40, 3), dtype=np.uint8)
result = paint_colormap(EntityMap(ids, list(range(1, 41))), colors)
assert (result == np.concatenate((np.zeros((1, 3), np.uint8), colors))[ids]).all()
"""
    plain = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", code], env=plain, check=True, timeout=120)


def test_mask_iou_equals_pycocotools() -> None:
    rng = np.random.default_rng(4)
    a, b = random_masks(rng, 5), random_masks(rng, 7)
    encode = lambda masks: [  # noqa: E731
        coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks
    ]
    expected = coco_mask.iou(encode(a), encode(b), [0] * 7)
    result = mask_iou(a, b)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, atol=1e-12)
    assert mask_iou(np.zeros((1, 3, 3), bool), np.zeros((1, 3, 3), bool))[0, 0] == 0
    with pytest.raises(ValueError, match="one size"):
        mask_iou(a, b[:, :-1])

"""Entity maps against plain loops and pycocotools; colours; id images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gella.entities import (
    ASSIGNMENTS,
    EntityMap,
    entity_colors,
    id_to_rgb,
    mask_iou,
    paint_colormap,
    rgb_to_id,
)


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

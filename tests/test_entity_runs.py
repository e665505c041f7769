"""Runs against plain indexing of the pixels, and what entity maps make of them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from gella.entities.entity_map import EntityMap, entity_colors, paint_colormap, rgb_to_id
from gella.entities.runs import Runs, find_runs, flip_runs, pad_runs, pick_runs
from gella.entities.view import fit_image, make_view, received, to_send

SHAPES = [(1, 1), (1, 9), (7, 1), (13, 22), (40, 31)]


def image(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Blocks and single pixels of few values, some of them running over row ends."""
    rng = np.random.default_rng(seed)
    flat = np.repeat(rng.integers(0, 4, shape[0] * shape[1]), rng.integers(1, 9))
    return flat[: shape[0] * shape[1]].reshape(shape).astype(np.int32)


def pixels(runs: Runs) -> np.ndarray:
    """The image of runs, after checking that they are sound."""
    assert (runs.lengths > 0).all() and runs.offsets[0] == 0
    assert runs.offsets[-1] == len(runs.values) == len(runs.lengths)
    sums = np.add.reduceat(runs.lengths, runs.offsets[:-1])
    assert (sums == runs.width).all()
    return runs.paint(runs.values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_pixels(shape: tuple[int, int], seed: int) -> None:
    rng, ids = np.random.default_rng(seed), image(shape, seed)
    runs = find_runs(ids)
    np.testing.assert_array_equal(pixels(runs), ids)
    grid = np.indices(shape)
    first = np.ones(shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    np.testing.assert_array_equal(runs.rows(), grid[0][first])
    np.testing.assert_array_equal(runs.columns(), grid[1][first])
    np.testing.assert_array_equal(pixels(flip_runs(runs)), ids[:, ::-1])
    padded = np.pad(ids, ((0, 3), (0, 2)))
    np.testing.assert_array_equal(pixels(pad_runs(runs, *padded.shape)), padded)
    np.testing.assert_array_equal(pixels(pad_runs(runs, *shape)), ids)
    rows = rng.integers(0, shape[0], 11)
    for count in (1, 6, 50):
        columns = np.sort(rng.integers(0, shape[1], count))
        picked = pick_runs(runs, rows, columns)
        np.testing.assert_array_equal(pixels(picked), ids[rows][:, columns])
        again = pad_runs(flip_runs(picked), 12, count + 1)
        expected = np.pad(ids[rows][:, columns][:, ::-1], ((0, 1), (0, 1)))
        np.testing.assert_array_equal(pixels(again), expected)
    both = np.stack([runs.values, runs.values + 1])
    np.testing.assert_array_equal(runs.paint(both), np.stack([ids, ids + 1]))


def test_derived_maps_agree_with_maps_made_of_their_pixels() -> None:
    entities = EntityMap(image((24, 37), 5), [4, 9, 2, 7], np.array([0.1, 0.2, 0.3, 0.4]))
    entities.areas()  # the runs are known before
    for derived in (entities.resize(50, 71), entities.flip(), entities.resize(9, 8).pad(12, 20)):
        fresh = EntityMap(derived.ids.copy(), derived.segment_ids)
        for own, other in zip(derived.runs()[:3], fresh.runs()[:3]):
            assert own.dtype == other.dtype
        np.testing.assert_array_equal(derived.areas(), fresh.areas())
        np.testing.assert_array_equal(derived.centroids(), fresh.centroids())
        np.testing.assert_array_equal(derived.union([0, 2]), fresh.union([0, 2]))
        colors = entity_colors(fresh, "separated", np.random.default_rng(0))
        np.testing.assert_array_equal(
            paint_colormap(derived, colors), paint_colormap(fresh, colors)
        )


@pytest.mark.parametrize("count", [0, 1, 255, 256, 300])
def test_masks_of_any_number_of_entities(count: int) -> None:
    ids = np.arange(-44, 316).clip(0, count).reshape(12, 30)
    masks = EntityMap(ids, list(range(1, count + 1))).bitmasks()
    assert masks.shape == (count, 12, 30) and masks.dtype == bool
    for number in range(1, count + 1):
        np.testing.assert_array_equal(masks[number - 1], ids == number)


@pytest.mark.parametrize("count", [3, 300])
def test_pickles_and_copies_are_equal_and_small(count: int) -> None:
    smooth = np.arange(1, count + 1).repeat(800)[: count * 800].reshape(-1, 400)
    noise = np.random.default_rng(0).integers(0, count + 1, (20, 30))
    for ids in (smooth, noise):
        entities = EntityMap(ids, list(range(1000, 1000 + count)), np.linspace(0, 1, count))
        data = pickle.dumps(entities)
        for other in (pickle.loads(data), copy.deepcopy(entities)):
            np.testing.assert_array_equal(other.ids, entities.ids)
            assert other.ids.dtype == np.int32 and other.segment_ids == entities.segment_ids
            np.testing.assert_array_equal(other.scores, entities.scores)
            np.testing.assert_array_equal(other.areas(), entities.areas())
            np.testing.assert_array_equal(other.resize(9, 7).ids, entities.resize(9, 7).ids)
    assert len(pickle.dumps(EntityMap(smooth))) < 0.1 * smooth.size * 4 + 400


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 7), (0, 3)])
def test_rgb_ids_of_any_size_and_layout(shape: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = rgb.astype(np.int64) @ np.array([1, 256, 65536])
    np.testing.assert_array_equal(rgb_to_id(rgb), expected)
    np.testing.assert_array_equal(rgb_to_id(rgb[:, ::-1]), expected[:, ::-1])
    read_only = rgb.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(rgb_to_id(read_only), expected)


def test_a_mirrored_picture_is_resized_as_its_copy() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (41, 60, 3), dtype=np.uint8)
    for side in (30, 60, 100):
        mirrored = fit_image(picture[:, ::-1], side)
        np.testing.assert_array_equal(mirrored, fit_image(picture[:, ::-1].copy(), side))


def test_what_a_worker_sends_comes_back_whole() -> None:
    rng = np.random.default_rng(0)
    entities = EntityMap(np.arange(1, 5).repeat(300).reshape(30, 40))
    picture = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    options = {"image_size": 16, "colormap_size": 200, "assignment": "random", "rng": rng}
    view = {**make_view(picture, entities, **options), "input_ids": torch.arange(5), "task": "x"}
    sent = to_send(view)
    assert not any(isinstance(value, torch.Tensor) for value in sent.values())
    data = pickle.dumps(sent)
    assert len(data) < view["colormap"].numel() // 10
    back = received(pickle.loads(data))
    assert set(back) == set(view)
    for key in ("image", "colormap", "input_ids"):
        assert torch.equal(back[key], view[key]) and back[key].dtype == view[key].dtype
        assert back[key].is_contiguous()
    assert isinstance(back["colors"], np.ndarray)
    np.testing.assert_array_equal(back["colors"], view["colors"])
    np.testing.assert_array_equal(back["entities"].ids, view["entities"].ids)
    # Whatever else a mapper gives passes through.
    assert received(to_send({"a": 1, "colormap": torch.ones(2)}))["colormap"].tolist() == [1, 1]

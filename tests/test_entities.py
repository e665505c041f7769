"""Entity maps, their runs and colours, and the view, against plain loops and pycocotools."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from refusals import refused

from gella.entities.colormap import ASSIGNMENTS, entity_colors, paint_colormap
from gella.entities.entity_map import EntityMap, Runs, id_to_rgb, rgb_to_id
from gella.entities.rle import check_size
from gella.entities.view import (
    fit_image,
    fitted_size,
    make_view,
    read_image,
    read_with_entities,
    received,
    to_send,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(seed, count, height=30, width=47):
    draw = rng(seed)
    points = np.stack([draw.integers(0, height, count), draw.integers(0, width, count)], axis=1)
    grid = np.stack(np.indices((height, width)), axis=-1)
    gaps = ((grid[:, :, None] - points) ** 2).sum(-1)
    return EntityMap(gaps.argmin(-1).astype(np.int32), list(range(100, 99 + count)))


def boxes(seed, count=12):
    """Boxes that overlap, lie in one another and on the edge, no two alike; and scores."""
    draw, masks = rng(seed), np.zeros((count, 24, 24), dtype=bool)
    for k, mask in enumerate(masks):
        (top, left), (height, width) = draw.integers(0, 18, 2), draw.integers(2, 12, 2)
        mask[top : top + height, left : left + width] = True
        mask[k, 23] = True
    return masks, draw.choice([0.2, 0.5, 0.9], size=count).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_masks_keep_all_their_pixels_and_the_smaller_is_painted_on_top(seed):
    masks, scores = boxes(seed)
    masks[5] = masks[4] | masks[6]  # wholly covered by smaller ones
    result = EntityMap.from_masks(masks, scores, segment_ids=range(50, 62))
    assert result.segment_ids == list(range(50, 62)) and not result.merged
    np.testing.assert_array_equal(result.bitmasks(), masks)
    np.testing.assert_array_equal(result.scores, scores)
    areas = masks.sum(axis=(1, 2))
    np.testing.assert_array_equal(result.areas(), areas)
    np.testing.assert_array_equal(result.ids > 0, masks.any(axis=0))
    for row, column in np.argwhere(result.ids):
        own = result.ids[row, column] - 1
        assert masks[own, row, column] and areas[own] == areas[masks[:, row, column]].min()
    probe = rng(seed).random((24, 24)) < 0.5
    np.testing.assert_array_equal(result.overlaps(probe), (masks & probe).sum(axis=(1, 2)))
    np.testing.assert_array_equal(result.union([5, 0]), masks[5] | masks[0])
    means = [np.argwhere(mask).mean(axis=0)[::-1] for mask in masks]
    np.testing.assert_allclose(result.centroids(), means, rtol=1e-6)
    for code, mask in zip(result.to_rle(), masks, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(code).astype(bool), mask)
    frames = {
        "resize": lambda entities: entities.resize(50, 31),
        "pad": lambda entities: entities.pad(30, 26),
        "crop": lambda entities: entities.crop(11, 17),
        "flip": EntityMap.flip,
        "pickle": lambda entities: pickle.loads(pickle.dumps(entities)),
    }
    for name, moved in frames.items():
        alone = [moved(EntityMap(mask.astype(int))).ids > 0 for mask in masks]
        np.testing.assert_array_equal(moved(result).bitmasks(), alone, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_numbers_and_scores_of_masks_change_nothing(seed):
    masks, scores = boxes(seed)
    masks[7] = masks[:, ::-1][3]  # of one size with another
    order = rng(seed).permutation(12)
    one = EntityMap.from_masks(masks, scores, segment_ids=range(1, 13)).canonical()
    two = EntityMap.from_masks(masks[order], segment_ids=order + 1).canonical()
    assert one.segment_ids == two.segment_ids and one.digest() == two.digest()
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.bitmasks(), masks[np.array(one.segment_ids) - 1])
    np.testing.assert_array_equal(one.scores, scores[np.array(one.segment_ids) - 1])
    others = (one.flip(), one.resize(24, 23), one.crop(23, 24), EntityMap(one.ids))
    assert len({one.digest(), *(other.canonical().digest() for other in others)}) == 5


def test_masks_that_cannot_be_kept_are_counted_and_named_once(gella_log):
    masks = np.zeros((6, 6, 6), dtype=bool)
    masks[[0, 2, 5], :2], masks[3, 3:] = True, True
    for _ in range(2):
        found = EntityMap.from_masks(masks, [0.1, 0, 0.9, 1, 0, 0.5], range(10, 16), where="a.json")
    assert found.segment_ids == [12, 13] and found.merged == {15: 12, 10: 12}
    assert np.allclose(found.scores, [0.9, 1]) and [found.index_of(i) for i in (10, 12)] == [0, 0]
    assert [record.getMessage() for record in gella_log.records] == [
        "a.json: 2 of 6 masks have no pixel and are left out: 11, 14",
        "a.json: 2 of 6 masks equal another mask and are left out: 15, 10",
    ]
    refused("6 masks but 2 segment_ids", EntityMap.from_masks, masks, segment_ids=[1, 2])


@pytest.mark.parametrize("seed", range(5))
def test_an_id_image_is_compared_with_every_id(seed):
    image = rng(seed).choice([0, 7, 300, 70000, 12], size=(9, 14)).repeat(3, axis=1)
    result = EntityMap.from_id_image(image, [300, 5, 7])
    assert result.segment_ids == [300, 5, 7] and result.num_entities == 3
    for mask, segment_id in zip(result.bitmasks(), [300, 5, 7]):
        np.testing.assert_array_equal(mask, image == segment_id)
    assert EntityMap.from_id_image(image).segment_ids == sorted(set(np.unique(image)) - {0})


def test_no_entity_is_a_valid_map():
    empty = EntityMap(np.zeros((4, 3), np.int32))
    assert empty.num_entities == 0 and empty.size == (4, 3) and empty.to_rle() == []
    shapes = [x.shape for x in (empty.bitmasks(), empty.areas(), empty.centroids())]
    assert shapes == [(0, 4, 3), (0,), (0, 2)]
    for assignment in ASSIGNMENTS:
        colors = entity_colors(empty, assignment, rng())
        assert colors.shape == (0, 3) and not paint_colormap(empty, colors).any()
    assert EntityMap.from_masks(np.zeros((0, 4, 3), bool)).num_entities == 0
    assert empty.canonical().num_entities == 0 and isinstance(empty.digest(), int)


@pytest.mark.parametrize("arguments, message", [
    ((np.zeros((2, 2, 2)),), r"\(H, W\)"),
    ((np.array([[3]]), [1, 2]), "3"),
    ((np.array([[-1]]),), "-1"),
    ((np.array([[1, 2]]), [5, 5]), "5"),
    ((np.array([[1]]), [1], [0.1, 0.2]), "scores"),
    ((np.array([[1]]), [1], [float("nan")]), "finite"),
])  # fmt: skip
def test_bad_maps_are_refused(arguments, message):
    refused(message, EntityMap, *arguments)


def test_codes_areas_and_unions_are_those_of_the_masks():
    entities = blobs(0, 9)
    masks = entities.bitmasks()
    for code, mask in zip(entities.to_rle(), masks, strict=True):
        assert isinstance(code["counts"], str)
        np.testing.assert_array_equal(coco_mask.decode(code).astype(bool), mask)
    np.testing.assert_array_equal(entities.areas(), masks.sum(axis=(1, 2)))
    np.testing.assert_array_equal(entities.union([1, 4, 4]), masks[1] | masks[4])
    assert not entities.union([]).any()
    refused("-1", entities.union, [-1], error=IndexError)
    assert entities.index_of(101) == 1
    refused("77", entities.index_of, 77, error=KeyError)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 300])
def test_masks_of_any_number_of_entities(count):
    ids, names = np.arange(-44, 316).clip(0, count).reshape(12, 30), np.arange(1, count + 1)
    masks = EntityMap(ids, names.tolist()).bitmasks()
    assert masks.dtype == bool and np.array_equal(masks, ids == names[:, None, None])


def test_centroids_equal_means_and_are_finite_for_empty_entities():
    entities = blobs(3, 6)
    means = [np.argwhere(mask).mean(axis=0)[::-1] for mask in entities.bitmasks()]
    np.testing.assert_allclose(entities.centroids(), means, rtol=1e-6)
    assert EntityMap(np.zeros((3, 5), np.int32), [8]).centroids().tolist() == [[2, 1]]


def test_frames_keep_order_ids_and_scores():
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
    refused("pad", padded.pad, 2, 5)
    ids = np.arange(1, 8)[None].repeat(3, axis=0)  # nearest at pixel centres
    expected = [ids[0, int((i + 0.5) * 7 / 3)] for i in range(3)]
    assert EntityMap(ids).resize(1, 3).ids[0].tolist() == expected


def blocks(shape, seed):
    """Blocks and single pixels of few values, some of them running over row ends."""
    draw = rng(seed)
    flat = np.repeat(draw.integers(0, 4, shape[0] * shape[1]), draw.integers(1, 9))
    return flat[: shape[0] * shape[1]].reshape(shape).astype(np.int32)


def pixels(runs):
    """The image of runs, after checking that they are sound."""
    assert (runs.lengths > 0).all() and runs.offsets[0] == 0
    assert runs.offsets[-1] == len(runs.values) == len(runs.lengths)
    assert (np.add.reduceat(runs.lengths, runs.offsets[:-1]) == runs.width).all()
    return runs.paint(runs.values)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 22), (40, 31)])
@pytest.mark.parametrize("seed", range(3))
def test_runs_are_the_pixels(shape, seed):
    draw, ids = rng(seed), blocks(shape, seed)
    runs = Runs.of(ids)
    np.testing.assert_array_equal(pixels(runs), ids)
    first = np.ones(shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    for own, grid in zip((runs.rows(), runs.columns()), np.indices(shape)):
        np.testing.assert_array_equal(own, grid[first])
    np.testing.assert_array_equal(pixels(runs.flip()), ids[:, ::-1])
    padded = np.pad(ids, ((0, 3), (0, 2)))
    np.testing.assert_array_equal(pixels(runs.pad(*padded.shape)), padded)
    np.testing.assert_array_equal(pixels(runs.pad(*shape)), ids)
    rows = draw.integers(0, shape[0], 11)
    for count in (1, 6, 50):
        columns = np.sort(draw.integers(0, shape[1], count))
        picked = runs.pick(rows, columns)
        np.testing.assert_array_equal(pixels(picked), ids[rows][:, columns])
        expected = np.pad(ids[rows][:, columns][:, ::-1], ((0, 1), (0, 1)))
        np.testing.assert_array_equal(pixels(picked.flip().pad(12, count + 1)), expected)
    both = np.stack([runs.values, runs.values + 1])
    np.testing.assert_array_equal(runs.paint(both), np.stack([ids, ids + 1]))


def test_derived_maps_agree_with_maps_made_of_their_pixels():
    entities = EntityMap(blocks((24, 37), 5), [4, 9, 2, 7], np.array([0.1, 0.2, 0.3, 0.4]))
    entities.areas()  # the runs are known before
    for derived in (entities.resize(50, 71), entities.flip(), entities.resize(9, 8).pad(12, 20)):
        fresh = EntityMap(derived.ids.copy(), derived.segment_ids)
        for own, other in zip(derived.runs()[:3], fresh.runs()[:3]):
            assert own.dtype == other.dtype
        colors = entity_colors(fresh, "separated", rng())
        for ask in (
            EntityMap.areas,
            EntityMap.centroids,
            lambda map: map.union([0, 2]),
            lambda map: paint_colormap(map, colors),  # noqa: B023
        ):
            np.testing.assert_array_equal(ask(derived), ask(fresh))


@pytest.mark.parametrize("count", [3, 300])
def test_pickles_and_copies_are_equal_and_small(count):
    smooth = np.arange(1, count + 1).repeat(800)[: count * 800].reshape(-1, 400)
    noise = rng().integers(0, count + 1, (20, 30))
    for ids in (smooth, noise):
        entities = EntityMap(ids, list(range(1000, 1000 + count)), np.linspace(0, 1, count))
        for other in (pickle.loads(pickle.dumps(entities)), copy.deepcopy(entities)):
            np.testing.assert_array_equal(other.ids, entities.ids)
            assert other.ids.dtype == np.int32 and other.segment_ids == entities.segment_ids
            np.testing.assert_array_equal(other.scores, entities.scores)
            np.testing.assert_array_equal(other.areas(), entities.areas())
            np.testing.assert_array_equal(other.resize(9, 7).ids, entities.resize(9, 7).ids)
    assert len(pickle.dumps(EntityMap(smooth))) < 0.1 * smooth.size * 4 + 400


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 7), (0, 3)])
def test_ids_as_rgb(shape):
    rgb = rng().integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = rgb.astype(np.int64) @ np.array([1, 256, 65536])
    assert rgb_to_id(rgb).dtype == np.int32
    np.testing.assert_array_equal(rgb_to_id(rgb), expected)
    np.testing.assert_array_equal(rgb_to_id(rgb[:, ::-1]), expected[:, ::-1])
    np.testing.assert_array_equal(id_to_rgb(rgb_to_id(rgb)), rgb)
    rgb.flags.writeable = False
    np.testing.assert_array_equal(rgb_to_id(rgb), expected)
    refused("16777216", id_to_rgb, np.array([[1 << 24]]))
    refused("uint8", rgb_to_id, rgb.astype(np.int32))


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("count", [1, 9, 100, 700])
def test_colors_are_distinct_not_black_and_repeatable(assignment, count):
    entities = blobs(count, count + 1)
    colors = entity_colors(entities, assignment, rng(5))
    assert colors.dtype == np.uint8 and colors.shape == (count, 3)
    assert len(np.unique(colors, axis=0)) == count and colors.any(axis=1).all()
    np.testing.assert_array_equal(colors, entity_colors(entities, assignment, rng(5)))
    other = entity_colors(entities, assignment, rng(6))
    assert np.array_equal(colors, other) == (assignment == "location")


def test_colors_of_a_seed_never_change():
    entities = EntityMap(np.arange(1, 4)[None])
    assert {name: entity_colors(entities, name, rng()).tolist() for name in ASSIGNMENTS} == {
        "random": [[130, 194, 217], [236, 15, 163], [215, 217, 130]],
        "location": [[162, 224, 162], [162, 193, 193], [162, 162, 255]],
        "separated": [[208, 166, 233], [99, 224, 34], [224, 20, 14]],
    }


def test_random_colors_stay_distinct_when_draws_collide():
    draws = iter([lambda size: np.full(size, 7), lambda size: np.arange(100, 100 + size)])
    colliding = SimpleNamespace(integers=lambda low, high, size: next(draws)(size))
    colors = entity_colors(EntityMap(np.array([[1, 2, 3]])), "random", colliding)
    assert len(np.unique(colors, axis=0)) == 3


def test_separated_colors_lie_farther_apart_than_random_ones():
    def smallest_gap(colors):
        points = np.concatenate((np.zeros((1, 3)), colors.astype(float)))
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        return gaps[~np.eye(len(points), dtype=bool)].min()

    entities = EntityMap(np.arange(1, 10)[None])
    random, separated = (
        np.median([smallest_gap(entity_colors(entities, name, rng(s))) for s in range(60)])
        for name in ("random", "separated")
    )
    assert separated > 2 * random and separated > 90


def test_location_colors_depend_on_the_place_only():
    ids = np.zeros((60, 60), np.int32)
    ids[5:15, 5:15], ids[40:50, 30:40] = 1, 2
    swapped = EntityMap(np.where(ids > 0, 3 - ids, 0))
    first = entity_colors(EntityMap(ids), "location", rng())
    np.testing.assert_array_equal(first, entity_colors(swapped, "location", rng())[::-1])
    scaled = entity_colors(EntityMap(ids).resize(180, 180), "location", rng())
    np.testing.assert_array_equal(first, scaled)
    refused("rainbow", entity_colors, EntityMap(ids), "rainbow", rng())


@pytest.mark.parametrize("size", [(1, 1), (1, 31), (33, 1), (257, 256)])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 700])
def test_the_colormap_is_a_table_look_up(size, count):
    draw, names = rng(count), list(range(1, count + 1))
    ids = draw.integers(0, count + 1, size)
    colors = draw.integers(0, 256, (count, 3), dtype=np.uint8)
    table = np.concatenate((np.zeros((1, 3), np.uint8), colors))
    for view in (ids, ids[::-1, ::-1], ids.T, ids.astype(">i4")):
        result = paint_colormap(EntityMap(view, names), colors)
        assert result.dtype == np.uint8 and result.transpose(2, 0, 1).flags.c_contiguous
        np.testing.assert_array_equal(result, table[view])
    refused("colours", paint_colormap, EntityMap(ids, names), np.zeros((count + 1, 3)))


def scene(height, width):
    """A white box in the lower right quarter of a black picture, and its entity."""
    ids = np.zeros((height, width), dtype=np.int32)
    ids[height // 2 :, width // 2 :] = 1
    image = np.repeat((ids[..., None] * 255).astype(np.uint8), 3, axis=2)
    return image, EntityMap.from_id_image(ids)


def view_of(image, entities, side=8, seed=0):
    sizes = {"image_size": side, "colormap_size": side}
    return make_view(image, entities, assignment="separated", rng=rng(seed), **sizes)


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40), (64, 64), (97, 31)])
def test_an_entity_lies_where_the_image_shows_it(height, width):
    view = view_of(*scene(height, width), side=64)
    bright = view["image"].numpy()[0] > 127
    mask = view["entities"].bitmasks()[0]
    assert (view["colormap"].numpy().any(axis=0) == mask).all()
    assert (bright & mask).sum() / (bright | mask).sum() > 0.9
    valid_height, valid_width = view["valid_size"]
    assert max(valid_height, valid_width) == 64
    assert not view["image"][:, valid_height:].any() and not view["image"][:, :, valid_width:].any()
    assert mask[valid_height - 1, valid_width - 1]  # nothing is cropped


def test_a_view_keeps_entities_that_vanish_and_repeats_with_the_seed():
    ids = np.ones((200, 200), dtype=np.int32)
    ids[0, 1] = 2
    entities, image = EntityMap.from_id_image(ids), np.zeros((200, 200, 3), dtype=np.uint8)
    first, again, other = (view_of(image, entities, seed=seed) for seed in (3, 3, 4))
    assert first["entities"].num_entities == 2
    assert (first["colormap"] == again["colormap"]).all()
    assert (first["colormap"] != other["colormap"]).any()


def test_a_view_paints_no_map_of_the_full_size():
    entities = EntityMap.from_masks(*boxes(0)).canonical()
    view_of(np.zeros((24, 24, 3), dtype=np.uint8), entities)
    assert entities.size == (24, 24)
    assert "ids" not in vars(entities)  # four bytes for every pixel of a large picture


def test_sizes_and_pixels_of_the_fitted_image():
    assert fitted_size(427, 640, 96) == (64, 96) and fitted_size(1, 5000, 96) == (1, 96)
    assert fitted_size(48, 24, 96) == (96, 48)
    picture = rng().integers(0, 256, (41, 60, 3), dtype=np.uint8)
    square = fit_image(picture, 60)
    assert (square[:41] == picture).all() and not square[41:].any()  # nothing is scaled
    for side in (30, 60, 100):
        mirrored = fit_image(picture[:, ::-1], side)
        np.testing.assert_array_equal(mirrored, fit_image(picture[:, ::-1].copy(), side))
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # without antialiasing a quarter would be all black or all white
    assert abs(float(fit_image(stripes, 16).mean()) - 127.5) < 10


@pytest.mark.parametrize("side", [30, 60, 100])
def test_images_are_resized_as_clips_processor_does(side):
    transformers = pytest.importorskip("transformers")
    options = {"do_center_crop": False, "do_rescale": False, "do_normalize": False}
    process = transformers.CLIPImageProcessor(size={"height": side, "width": side}, **options)
    picture = rng().integers(0, 256, (60, 60, 3), dtype=np.uint8)
    expected = np.asarray(process(picture, return_tensors="np")["pixel_values"][0])
    found = fit_image(picture, side).transpose(2, 0, 1).astype(float)
    assert np.abs(found - expected).max() <= 2  # Pillow's rounding and torchvision's


def test_a_view_of_another_size_or_type_is_refused():
    image, entities = scene(40, 80)
    refused("80x40.*50x40", view_of, image[:, :50], entities)
    refused("uint8", view_of, image / 255.0, entities)


def test_what_a_worker_sends_comes_back_whole():
    entities = EntityMap(np.arange(1, 5).repeat(300).reshape(30, 40))
    picture = rng().integers(0, 256, (30, 40, 3), dtype=np.uint8)
    view = {**view_of(picture, entities, side=200), "input_ids": torch.arange(5), "task": "x"}
    sent = to_send(view)
    assert not any(isinstance(value, torch.Tensor) for value in sent.values())
    assert len(pickle.dumps({**sent, "image": None})) < view["colormap"].numel() // 10
    back = received(pickle.loads(pickle.dumps(sent)))
    assert set(back) == set(view) and isinstance(back["colors"], np.ndarray)
    for key in ("image", "colormap", "input_ids"):
        assert torch.equal(back[key], view[key]) and back[key].dtype == view[key].dtype
        assert back[key].is_contiguous()
    np.testing.assert_array_equal(back["colors"], view["colors"])
    np.testing.assert_array_equal(back["entities"].ids, view["entities"].ids)
    # Whatever else a mapper gives passes through.
    assert received(to_send({"a": 1, "colormap": torch.ones(2)}))["colormap"].tolist() == [1, 1]


@pytest.mark.parametrize("orientation, size, turned, told", [
    (1, (40, 60), False, False),
    (6, None, True, False),
    (6, (60, 40), True, False),
    (6, (40, 60), False, False),  # only the stored pixels fit
    (6, (7, 7), True, False),
    (3, None, True, False),
    (3, (40, 60), True, True),  # both fit
    (2, (40, 60), True, True),
])  # fmt: skip
def test_pictures_are_turned_as_they_say_unless_only_the_stored_pixels_fit(
    tmp_path, gella_log, orientation, size, turned, told
):
    pixels, exif, file = rng().integers(0, 256, (40, 60, 3), dtype=np.uint8), Image.Exif(), "a.png"
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / file, exif=exif)
    ways = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1)}
    expected = ways[orientation] if turned else pixels
    np.testing.assert_array_equal(read_image(tmp_path / file, size=size), expected)

    def load(image):  # masks of a file, which say their size only when they are read
        check_size(size or (60, 40), image.shape[:2])
        return EntityMap(np.ones(image.shape[:2], int))

    assert bool(gella_log.messages) == told
    if size not in (None, (7, 7)):
        image, entities = read_with_entities(tmp_path / file, load)
        np.testing.assert_array_equal(image, expected)
        assert entities.size == size and len(gella_log.messages) == told  # once


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_read_as_rgb_or_refused_by_name(tmp_path, suffix):
    pixels, exif = rng().integers(0, 256, (40, 60, 3), dtype=np.uint8), Image.Exif()
    file, cut, nowhere = (tmp_path / f"{name}{suffix}" for name in ("a", "cut", "nowhere"))
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(file, exif=exif, quality=100)
    stored = read_image(file, upright=False)
    assert suffix == ".jpg" or (stored == pixels).all()
    assert (read_image(file) == np.rot90(stored, -1)).all()
    for data, told in ((file.read_bytes()[: file.stat().st_size // 2], "truncated"), (b"no", "no")):
        cut.write_bytes(data)
        refused(f"cut{suffix} is {told}", read_image, cut)
    refused("nowhere", read_image, nowhere, error=FileNotFoundError)
    Image.fromarray(pixels[..., 0]).save(file)
    grey = read_image(file)
    assert grey.shape == pixels.shape and (grey == grey[..., :1]).all()

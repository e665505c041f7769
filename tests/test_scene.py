"""What the predictor takes for a picture's entities, and what it says of what it cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_gella import make_cfg

from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.predictor.scene import image_id_of, is_spec, read_entities, read_scene
from gella.segmenters.segmenter import Segmenter

SIZE = (30, 40)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def ids() -> np.ndarray:
    """Three entities that are named 9, 4 and 70, and pixels of none."""
    ids = np.zeros(SIZE, dtype=np.int64)
    ids[:10], ids[10:20, :20], ids[25:, 30:] = 9, 4, 70
    return ids


class Halves(Segmenter):
    """Finds the left and the right half, or nothing."""

    def __init__(self, count: int = 2) -> None:
        self.count, self.seen = count, []

    def predict(self, images: Any) -> list:
        self.seen += list(images)
        left = np.arange(images[0].shape[1]) < images[0].shape[1] // 2
        masks = np.stack([np.broadcast_to(m, images[0].shape[:2]) for m in (left, ~left)])
        return [(masks[: self.count], np.ones(self.count, np.float32))]


def same(found: EntityMap, ids: np.ndarray, segment_ids: list[int]) -> None:
    named = np.array([0, *found.segment_ids])[found.ids]
    assert (named == ids).all() and found.segment_ids == segment_ids


def test_ids_of_any_integer_type(image: np.ndarray, ids: np.ndarray) -> None:
    for kind in (np.uint8, np.int16, np.uint32, np.int64):
        same(read_entities(ids.astype(kind), image), ids, [4, 9, 70])


def test_masks_of_bools_and_of_two_numbers(image: np.ndarray, ids: np.ndarray) -> None:
    masks = np.stack([ids == value for value in (9, 4, 70)])
    numbered = (masks * np.array([1, 2, 3])[:, None, None]).sum(0)
    inside = (masks, masks.astype(np.uint8), masks * np.uint8(255), masks * 1.0, masks * 0.5)
    for array in inside:
        same(read_entities(array, image), numbered, [1, 2, 3])
    same(read_entities(masks[0], image), masks[0] * 1, [1])
    same(read_entities(masks[0] * 1.0, image), masks[0] * 1, [1])


def test_masks_that_overlap_and_hide(image: np.ndarray) -> None:
    masks = np.zeros((3, *SIZE), dtype=bool)
    masks[0], masks[1, :5, :5], masks[2, 1, 1] = True, True, True
    found = read_entities(masks, image)
    assert found.areas().tolist() == [1200 - 25, 24, 1]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, *SIZE), np.nan), "NaN or inf"),
        (np.full((2, *SIZE), np.inf, np.float32), "NaN or inf"),
        (np.random.default_rng(0).random((2, *SIZE)), "masks > 0.5"),
        (-np.ones(SIZE, np.int32), "holds -1; ids start at 0"),
        (-np.ones((1, *SIZE)), "hold -1 besides 0"),
        (np.random.default_rng(0).integers(0, 9, (2, *SIZE)), "hold 1, 2, 3, ... besides 0"),
        (np.ones((30, 41), int), r"int64 \(30, 41\) but the image is 40x30"),
        (np.ones((*SIZE, 3), np.uint8), r"masks go first: \(E, H, W\)"),
        (np.ones((1, 2, *SIZE), bool), r"bool \(1, 2, 30, 40\); give integer ids"),
        (np.full(SIZE, "a"), r"<U1 \(30, 40\); give integer ids"),
        (np.full(SIZE, None), r"object \(30, 40\)"),
        (np.zeros(SIZE, int), "no entity at all"),
        (np.zeros((0, *SIZE), bool), "no entity at all"),
        (np.zeros((4, *SIZE)), "no entity at all"),
        (EntityMap(np.zeros(SIZE, np.int32)), "no entity at all"),
        (Halves(0), "the segmenter found no entity"),
    ],
)
def test_arrays_that_are_no_entities(image: np.ndarray, array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_entities(array, image)
    assert "\n" not in str(caught.value)


def test_a_wrong_type_is_named(image: np.ndarray) -> None:
    with pytest.raises(TypeError, match="entities are a dict; give an EntityMap, an array, a file"):
        read_entities({"masks": 1}, image)


def test_a_segmenter_and_a_file(image: np.ndarray, ids: np.ndarray, tmp_path: Path) -> None:
    segmenter = Halves()
    found = read_entities(segmenter, image)
    assert found.areas().tolist() == [600, 600] and segmenter.seen[0] is image
    Image.fromarray(id_to_rgb(ids)).save(tmp_path / "ids.png")
    for path in (tmp_path / "ids.png", str(tmp_path / "ids.png")):
        same(read_entities(path, image), ids, [4, 9, 70])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_entities(tmp_path / "nowhere.png", image)


def test_what_is_a_spec() -> None:
    assert is_spec("sam:facebook/sam-vit-base") and is_spec("detectron2:a.yaml:b.pth")
    assert not any(is_spec(x) for x in ("masks.png", "c:/masks.png", "sam", Path("sam:x"), 3))


def test_a_scene_is_a_copy_that_nobody_changes(
    image: np.ndarray, ids: np.ndarray, tokenizer_dir: Path
) -> None:
    cfg = make_cfg(tokenizer_dir)
    before = image.copy()
    options = dict(inputs=cfg.INPUT.GELLA, image_size=96, image_id=3)
    scene = read_scene(image, ids, segmenter=lambda spec: Halves(), **options)
    image[:], ids[:] = 0, 1
    assert (scene.image == before).all() and scene.entities.segment_ids == [4, 9, 70]
    with pytest.raises(ValueError, match="read-only"):
        scene.image[0] = 1
    with pytest.raises(AttributeError):
        scene.image = image  # type: ignore[misc]
    assert scene == scene and scene != read_scene(
        before, ids, segmenter=lambda spec: Halves(), **options
    )
    assert {scene: 1}[scene] == 1
    assert scene.image_id == 3 and scene.colormap.shape == (72, 96, 3)
    asked = []
    read_scene(before, "sam:x", segmenter=lambda spec: asked.append(spec) or Halves(), **options)
    assert asked == ["sam:x"]
    for wrong in (before[..., 0], before.astype(float), before[..., :2]):
        with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\) RGB"):
            read_scene(wrong, ids, segmenter=lambda spec: Halves(), **options)


def test_image_ids_come_from_names() -> None:
    assert image_id_of("val2017/000000142238.jpg") == 142238
    assert image_id_of("a/my dog.png") == "my dog"

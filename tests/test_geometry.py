"""The view: image, colormap and entities show the same scene in the same place."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gella.entities.entity_map import EntityMap
from gella.entities.view import (
    fit_image,
    fitted_size,
    image_token_count,
    make_view,
    read_image,
)


def _scene(height: int, width: int) -> tuple[np.ndarray, EntityMap]:
    """A white box in the lower right quarter of a black picture, and its entity."""
    ids = np.zeros((height, width), dtype=np.int32)
    ids[height // 2 :, width // 2 :] = 1
    image = np.repeat((ids[..., None] * 255).astype(np.uint8), 3, axis=2)
    return image, EntityMap.from_id_image(ids)


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40), (64, 64), (97, 31)])
def test_entity_lies_where_the_image_shows_it(height: int, width: int) -> None:
    image, entities = _scene(height, width)
    view = make_view(
        image,
        entities,
        image_size=64,
        colormap_size=64,
        assignment="random",
        rng=np.random.default_rng(0),
    )
    bright = view["image"].numpy()[0] > 127
    mask = view["entities"].bitmasks()[0]
    coloured = view["colormap"].numpy().any(axis=0)
    assert (coloured == mask).all()
    union = (bright | mask).sum()
    assert (bright & mask).sum() / union > 0.9  # nearest and bilinear differ at the border only
    valid_height, valid_width = view["valid_size"]
    assert max(view["valid_size"]) == 64
    assert not view["image"][:, valid_height:].any() and not view["image"][:, :, valid_width:].any()
    assert mask[valid_height - 1, valid_width - 1]  # nothing is cropped


def test_view_keeps_entities_that_vanish_and_repeats_with_the_seed() -> None:
    ids = np.ones((200, 200), dtype=np.int32)
    ids[0, 1] = 2
    entities = EntityMap.from_id_image(ids)
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    options = {"image_size": 8, "colormap_size": 8, "assignment": "separated"}
    first = make_view(image, entities, rng=np.random.default_rng(3), **options)
    again = make_view(image, entities, rng=np.random.default_rng(3), **options)
    other = make_view(image, entities, rng=np.random.default_rng(4), **options)
    assert first["entities"].num_entities == 2
    assert (first["colormap"] == again["colormap"]).all()
    assert (first["colormap"] != other["colormap"]).any()


def test_fitted_size_and_tokens() -> None:
    assert fitted_size(427, 640, 96) == (64, 96)
    assert fitted_size(1, 5000, 96) == (1, 96)
    assert fitted_size(48, 24, 96) == (96, 48)
    assert image_token_count(336, 14, 1) == 576
    assert image_token_count(96, 8, 2) == 36


def test_fit_image_keeps_pixels_when_nothing_is_scaled() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    square = fit_image(image, 7)
    assert (square[:5] == image).all() and not square[5:].any()


def test_shrinking_averages_instead_of_skipping() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, ::2] = 255  # without antialiasing a quarter-size copy would be all black or all white
    assert abs(float(fit_image(image, 16).mean()) - 127.5) < 10


def test_size_mismatch_and_wrong_dtype_are_refused() -> None:
    image, entities = _scene(40, 80)
    options = {"image_size": 8, "colormap_size": 8, "assignment": "random"}
    with pytest.raises(ValueError, match="80x40.*50x40"):
        make_view(image[:, :50], entities, rng=np.random.default_rng(0), **options)
    with pytest.raises(ValueError, match="uint8"):
        make_view(image / 255.0, entities, rng=np.random.default_rng(0), **options)


def test_read_image(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    assert (read_image(file) == pixels).all()
    Image.fromarray(pixels[..., 0]).save(file)
    assert (read_image(file) == pixels[..., :1]).all()


def test_read_image_turns_upright_on_demand_only(tmp_path) -> None:
    file = tmp_path / "phone.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, exif=exif)
    assert (read_image(file) == pixels).all()
    assert (read_image(file, upright=True) == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_missing_truncated_and_foreign_files(tmp_path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / f"nowhere{suffix}")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    Image.fromarray(pixels).save(whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"cut{suffix} is truncated"):
        read_image(cut)
    cut.write_text("no picture")
    with pytest.raises(ValueError, match=f"cut{suffix} is no picture"):
        read_image(cut)

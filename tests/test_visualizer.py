"""Pictures: the colours are on the right pixels, and the caption is cut at the right places."""

from __future__ import annotations

import numpy as np
import pytest

from gella.entities import EntityMap
from gella.text_layout import Piece, load_font, wrap_pieces
from gella.visualizer import (
    MASK_OPACITY,
    caption_pieces,
    deepest_point,
    draw_colormap,
    draw_grounding,
    draw_panoptic,
    noun_colors,
    palette,
)

SIDE = 480  # of the enlarged panel of a 96 x 96 picture
MARGIN = 16


def _item(phrase: str, start: int, ids: list[int], entities: EntityMap) -> dict:
    mask = entities.union([entities.index_of(entity) for entity in ids])
    end = start + len(phrase) if start >= 0 else -1
    return {"phrase": phrase, "start": start, "end": end, "entity_ids": ids, "mask": mask}


def _scene_entities() -> EntityMap:
    ids = np.zeros((96, 96), dtype=np.int32)
    ids[8:40, 8:40] = 70
    ids[56:88, 48:90] = 9
    return EntityMap.from_id_image(ids, [70, 9])


def _overlay_pixel(picture: np.ndarray, x: int, y: int, top: int = MARGIN) -> list[int]:
    left = 2 * MARGIN + SIDE
    return picture[top + y * 5 + 2, left + x * 5 + 2].tolist()


def test_masks_have_their_nouns_colour_and_the_rest_is_untouched() -> None:
    image, entities = np.full((96, 96, 3), 40, dtype=np.uint8), _scene_entities()
    image[90:] = (200, 10, 30)
    grounding = [_item("a box", 0, [70], entities), _item("a bar", 10, [9], entities)]
    picture = draw_grounding(image, "a box and a bar.", grounding, entities=entities)
    pixels = np.asarray(picture)
    assert picture.width >= 640
    for (x, y), color in zip([(14, 14), (54, 60)], noun_colors(grounding), strict=True):
        wanted = (1 - MASK_OPACITY) * 40 + MASK_OPACITY * np.array(color)
        assert np.abs(_overlay_pixel(pixels, x, y) - wanted).max() <= 1
    assert _overlay_pixel(pixels, 80, 20) == [40, 40, 40]
    input_panel = pixels[MARGIN : MARGIN + SIDE, MARGIN : MARGIN + SIDE]
    assert (input_panel[: 85 * 5] == 40).all() and (input_panel[94 * 5 :] == (200, 10, 30)).all()
    red, green, blue = _overlay_pixel(pixels, 5, 94)
    assert red == green == blue  # no colour but the nouns'
    text = pixels[MARGIN + SIDE + MARGIN :].reshape(-1, 3)
    for color in noun_colors(grounding):  # the chips in the caption and in the list
        assert (text == color).all(axis=1).sum() > 500


def test_an_entity_of_two_nouns_shows_both_colours() -> None:
    image, entities = np.zeros((96, 96, 3), dtype=np.uint8), _scene_entities()
    grounding = [_item("a box", 0, [70], entities), _item("things", 10, [70, 9], entities)]
    pixels = np.asarray(draw_grounding(image, "a box and things", grounding))
    panel = pixels[MARGIN : MARGIN + SIDE, 2 * MARGIN + SIDE : 2 * MARGIN + 2 * SIDE]
    box, rest = panel[60:180, 60:180].reshape(-1, 3), panel[300:420, 260:420].reshape(-1, 3)
    first, second = (np.rint(MASK_OPACITY * np.array(c)) for c in noun_colors(grounding))
    close_first = (np.abs(box - first) <= 2).all(axis=1).mean()
    close_second = (np.abs(box - second) <= 2).all(axis=1).mean()
    assert close_first > 0.1 and close_second > 0.1
    assert (np.abs(rest - second) <= 2).all(axis=1).mean() > 0.95


def test_repeated_noun_shares_its_colour_and_different_ones_do_not() -> None:
    entities = _scene_entities()
    items = [
        _item("The box", 0, [70], entities),
        _item("the box", 20, [70], entities),
        _item("the box", 30, [9], entities),
    ]
    first, second, third = noun_colors(items)
    assert first == second != third


def test_untrained_label_and_empty_grounding() -> None:
    image, entities = np.full((96, 96, 3), 40, dtype=np.uint8), _scene_entities()
    grounding = [_item("a dog", -1, [], entities)]
    plain = draw_grounding(image, "nothing here", grounding, entities=entities)
    marked = draw_grounding(image, "nothing here", grounding, entities=entities, untrained=True)
    assert marked.height > plain.height
    red = (np.asarray(marked)[:20] == (160, 30, 30)).all(axis=2)
    assert red.mean() > 0.8
    assert not (np.asarray(plain) == (160, 30, 30)).all(axis=2).any()


def test_masks_that_are_no_input_entity_are_drawn() -> None:
    image, entities = np.zeros((96, 96, 3), dtype=np.uint8), _scene_entities()
    item = _item("a box", 0, [70], entities)
    item["entity_ids"] = [-1]  # decoded by the model itself
    pixels = np.asarray(draw_grounding(image, "a box", [item], entities=entities))
    wanted = np.rint(MASK_OPACITY * np.array(palette(1)[0]))
    assert np.abs(_overlay_pixel(pixels, 14, 14) - wanted).max() <= 1


def test_mask_of_another_size_is_refused() -> None:
    image, entities = np.zeros((50, 96, 3), dtype=np.uint8), _scene_entities()
    with pytest.raises(ValueError, match="96x96.*96x50"):
        draw_grounding(image, "a box", [_item("a box", 0, [70], entities)])


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (2000, 1500)])
def test_odd_sizes_are_drawn_within_bounds(size: tuple[int, int]) -> None:
    ids = np.ones(size, dtype=np.int32)
    entities = EntityMap.from_id_image(ids)
    image = np.zeros((*size, 3), dtype=np.uint8)
    item = _item("x", 0, [1], entities)
    picture = draw_grounding(image, "x", [item], entities=entities)
    assert 640 <= picture.width <= 2100 and picture.height <= 1400


def test_caption_pieces_join_to_the_caption() -> None:
    caption = "A red box and a blue box on sand"
    spans = [(27, 32), (0, 9), (14, 24), (2, 9), (-1, -1)]
    items = [{"start": start, "end": end} for start, end in spans]
    colors = palette(len(items))
    pieces = caption_pieces(caption, items, colors)
    assert "".join(piece.text for piece in pieces) == caption
    chips = [(piece.text, piece.color) for piece in pieces if piece.color is not None]
    assert chips == [
        ("A red box", colors[1]),
        ("a blue box", colors[2]),
        (caption[27:32], colors[0]),
    ]


def test_wrapping_keeps_every_word_and_the_width() -> None:
    font = load_font(18)
    text = "several words that do not fit on a line " * 3 + "W" * 120
    rows = wrap_pieces([Piece(text, None), Piece("two words", (1, 2, 3))], font, 200)
    assert len(rows) > 3
    joined = "".join(piece.text for row in rows for piece in row)
    assert "".join(joined.split()) == "".join((text + "two words").split())
    for row in rows:
        assert font.getlength("".join(piece.text for piece in row).rstrip()) <= 200


def test_palette_is_distinct() -> None:
    colors = palette(140)
    assert len(set(colors)) == 140
    assert palette(5) == colors[:5]
    assert all(0 <= value <= 255 for color in colors for value in color)


@pytest.mark.parametrize("seed", range(5))
def test_deepest_point_is_inside_and_deep(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 20:60] = True
    mask[rng.integers(0, 60, 20), rng.integers(0, 80, 20)] = True
    x, y = deepest_point(mask)
    assert 25 <= x <= 55 and 15 <= y <= 45
    thin = np.zeros((400, 400), dtype=bool)
    thin[np.arange(400), np.arange(400)] = True
    x, y = deepest_point(thin)
    assert thin[y, x]


def test_colormap_is_enlarged_exactly() -> None:
    colormap = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    picture = np.asarray(draw_colormap(colormap, (60, 96)))
    assert picture.shape == (420, 672, 3)
    assert (picture[::7, ::7] == colormap[:60]).all()


def test_panoptic_colours_by_category() -> None:
    image = np.zeros((96, 96, 3), dtype=np.uint8)
    ids = np.zeros((96, 96), dtype=np.int32)
    ids[:30], ids[40:60], ids[70:] = 1, 2, 3
    segments = [{"id": k, "category_id": c} for k, c in ((1, 5), (2, 8), (3, 5))]
    categories = [{"id": 5, "name": "dog"}, {"id": 8, "name": "sky"}]
    pixels = np.asarray(draw_panoptic(image, ids, segments, categories))
    dog, sky = (np.rint(MASK_OPACITY * np.array(c)) for c in palette(2))
    for y, color in ((15, dog), (50, sky), (82, dog), (35, np.zeros(3)), (65, np.zeros(3))):
        assert np.abs(_overlay_pixel(pixels, 50, y) - color).max() <= 1

"""Pictures: the colours are on the right pixels, and the caption is cut at the right places."""

from __future__ import annotations

import numpy as np
import pytest

from gella.entities.entity_map import EntityMap
from gella.pictures.colors import ink_on
from gella.pictures.labels import place_labels
from gella.pictures.mask_layers import Grid, Layer, looks
from gella.pictures.text_layout import Piece, flow_items, load_font, wrap_pieces
from gella.pictures.visualizer import (
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


def test_items_flow_whole_and_within_the_width() -> None:
    font = load_font(18)
    items = [[Piece(f"noun {k}", (1, 2, 3)), Piece(f": [{k}, {k + 1}]", None)] for k in range(20)]
    items.insert(7, [Piece("a very long noun " * 9, (4, 5, 6)), Piece(": no entity", None)])
    rows = flow_items(items, font, 500)
    assert 10 <= len(rows) <= 17
    texts = ["".join(piece.text for piece in row) for row in rows]
    assert all(any(f"noun {k}: [{k}, {k + 1}]" in text for text in texts) for k in range(20))
    for row in rows:
        chips = 6 * sum(piece.color is not None for piece in row)
        assert font.getlength("".join(piece.text for piece in row).rstrip()) + chips <= 506


# CIELAB as dichromats see it: Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip


def cielab(colors: list[tuple[int, int, int]], vision: str) -> np.ndarray:
    """Lightness, a and b (D65) of RGB colours 0..255, (N, 3)."""
    values = np.array(colors) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISIONS[vision]).T, 0, 1) @ XYZ.T / [0.95047, 1, 1.08883]
    f = np.where(seen > 216 / 24389, np.cbrt(seen), (24389 / 27 * seen + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_stay_apart_for_every_reader(vision: str) -> None:
    """2.3 is just noticeable; published sets for colour-blind readers keep some 16 among 8."""
    lab = cielab(palette(64), vision)
    pairs = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    np.fill_diagonal(pairs, np.inf)
    for count, least in ((4, 42), (8, 23), (16, 18), (32, 11), (64, 7.5)):
        assert pairs[:count, :count].min() >= least
    assert np.diagonal(pairs, 1).min() >= 23  # nouns that follow each other in a caption
    chroma = np.hypot(lab[:, 1], lab[:, 2])  # the picture below the masks is grey
    assert chroma[:8].min() >= 16 and chroma.min() >= 10


def test_ink_is_the_one_with_more_contrast() -> None:
    for color, dark in (((255, 255, 0), True), ((0, 0, 160), False), ((230, 159, 0), True)):
        assert (ink_on(color) == (25, 25, 25)) is dark
    assert ink_on((250, 250, 250), dark=(1, 2, 3)) == (1, 2, 3)


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


# -- masks in a drawing of another size ------------------------------------------------------------


@pytest.mark.parametrize("size", [(30, 44), (61, 80), (7, 9), (1, 1), (20, 30)])
def test_masks_are_brought_to_the_drawing_as_a_whole_would_be(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    grid = Grid((20, 30), size)
    for _ in range(40):
        top, left = rng.integers(0, 20), rng.integers(0, 30)
        mask = rng.random((rng.integers(1, 21 - top), rng.integers(1, 31 - left))) < 0.4
        whole = np.zeros((20, 30), dtype=bool)
        whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        layer, other = grid.layer(mask, (left, top)), grid.layer(whole)
        assert (layer is None) == (other is None) == (not mask.any())
        if layer is None or other is None:
            continue
        assert layer.place == other.place and (layer.mask == other.mask).all()
        drawn = np.zeros(size, dtype=bool)
        drawn[layer.place] = layer.mask
        rows, columns = (np.arange(n) * m // n for n, m in zip((20, 30), size))
        if size[0] >= 20:
            back = [((np.arange(n) * m) // n) for n, m in zip(size, (20, 30))]
            assert (drawn == whole[np.ix_(*back)]).all()
        else:
            ys, xs = np.nonzero(whole)
            near = np.pad(drawn, 1)
            for y, x in zip(rows[ys], columns[xs]):  # nothing is lost altogether
                assert near[y : y + 3, x : x + 3].any()


def test_reduced_masks_keep_their_areas_and_their_thin_parts() -> None:
    mask = np.zeros((600, 900), dtype=bool)
    mask[100:300, 200:500] = True
    mask[200, 500:880] = True  # a line of one pixel
    layer = Grid((600, 900), (60, 90)).layer(mask)
    assert layer is not None
    drawn = np.zeros((60, 90), dtype=bool)
    drawn[layer.place] = layer.mask
    assert drawn[10:30, 20:50].all() and drawn[20, 51:88].all()
    assert drawn.sum() == 20 * 30 + 37


@pytest.mark.parametrize("thickness", [1, 2])
def test_outlines_lie_in_wide_parts_and_around_thin_ones(thickness: int) -> None:
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:40, 10:40] = True
    mask[25 : 25 + thickness, 40:80] = True
    look = looks(Layer(mask, 0, 0), thickness, mask.shape)
    drawn = {name: np.zeros(mask.shape, dtype=bool) for name in ("border", "thin", "ring")}
    for name, canvas in drawn.items():
        canvas[look.place] = getattr(look, name)
    inside = mask[10:40, 10:40].copy()
    inside[thickness:-thickness, thickness:-thickness] = False
    assert (drawn["border"][10:40, 10:39] == inside[:, :-1]).sum() >= 29 * 30 - 4
    assert not drawn["thin"][:, :38].any() and drawn["thin"][25 : 25 + thickness, 46:80].all()
    assert not (drawn["ring"] & mask).any()
    column = drawn["ring"][:, 60] | drawn["thin"][:, 60]
    assert 3 * thickness <= column.sum() <= 5 * thickness
    for left, top in ((0, 0), (80, 50)):  # at the edges of the drawing
        small = looks(Layer(np.ones((10, 10), dtype=bool), left, top), thickness, mask.shape)
        assert drawn["thin"][small.place].shape == small.border.shape == small.ring.shape


@pytest.mark.parametrize("size", [(900, 1300), (1500, 40), (40, 1500), (96, 96)])
def test_a_line_of_one_pixel_is_seen(size: tuple[int, int]) -> None:
    height, width = size
    ids = np.ones(size, dtype=np.int32)
    place = width // 3 if height >= width else height // 3
    ids[:, place] = 2 if height >= width else 1
    if width > height:
        ids[place] = 2
    entities = EntityMap.from_id_image(ids)
    items = [_item("a wall", 0, [1], entities), _item("a line", 10, [2], entities)]
    image = np.full((*size, 3), 120, dtype=np.uint8)
    picture = draw_grounding(image, "a wall, a line", items, entities=entities)
    color = noun_colors(items)[1]
    found = (np.asarray(picture) == color).all(axis=2)
    lines = found[: picture.height - 110]  # not the chips below
    assert lines.sum() > 0.6 * min(max(size), 900)


def test_lines_beside_each_other_leave_each_other_their_colours() -> None:
    ids = np.zeros((700, 900), dtype=np.int32)
    ids[300], ids[301] = 1, 2
    entities = EntityMap.from_id_image(ids)
    items = [_item("one", 0, [1], entities), _item("two", 4, [2], entities)]
    image = np.full((700, 900, 3), 120, dtype=np.uint8)
    pixels = np.asarray(draw_grounding(image, "one two", items, entities=entities))
    for color in noun_colors(items):
        assert (pixels[:716] == color).all(axis=2).sum() >= 800


# -- labels ----------------------------------------------------------------------------------------


def _crowd(seed: int, height: int, width: int, count: int) -> list[Layer]:
    rng = np.random.default_rng(seed)
    ids = np.zeros((height, width), dtype=np.int32)
    for number in range(1, count + 1):
        h, w = (rng.integers(1, max(2, int(side * rng.uniform(0.02, 0.5)))) for side in ids.shape)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        ids[y : y + h, x : x + w] = number
    layers = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(ids == number)
        if len(rows):
            crop = (ids == number)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            layers.append(Layer(crop, int(columns.min()), int(rows.min())))
    return layers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("frame", [(640, 480), (480, 480), (900, 60), (60, 900)])
def test_labels_never_overlap_nor_leave_the_picture(seed: int, frame: tuple[int, int]) -> None:
    layers = _crowd(seed, frame[1], frame[0], 20 * (seed + 1) - 20 * (seed == 5))
    sizes = [(14.0 + 7 * (k % 3), 15.0) for k in range(len(layers))]
    placed = place_labels(layers, sizes, frame)
    boxes = np.array(
        [
            (p.x - w / 2, p.y - h / 2, p.x + w / 2, p.y + h / 2)
            for p, (w, h) in zip(placed, sizes)
            if p
        ]
    )
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= frame).all()
    clear = (boxes[:, None, 2:] <= boxes[None, :, :2]) | (boxes[None, :, 2:] <= boxes[:, None, :2])
    overlap = ~clear.any(axis=2)
    assert overlap.sum() == len(boxes)  # each with itself
    if min(frame) >= 480:
        assert len(boxes) == len(layers)
    for spot, layer, (width, height) in zip(placed, layers, sizes):
        if spot is not None:
            x, y = (int(value) for value in spot.anchor)
            assert layer.mask[y - layer.y, x - layer.x]
            far = (
                abs(spot.x - spot.anchor[0]) > width / 2
                or abs(spot.y - spot.anchor[1]) > height / 2
            )
            assert spot.apart == far


def test_where_there_is_no_room_small_masks_go_without_a_label() -> None:
    masks = [np.ones((5 + k, 40), dtype=bool) for k in range(10)]
    layers = [Layer(mask, 0, 0) for mask in masks]
    placed = place_labels(layers, [(38.0, 14.0)] * 10, (40, 32))
    labelled = [k for k, spot in enumerate(placed) if spot]
    assert labelled in ([9], [8, 9])
    assert place_labels(layers[:1], [(50.0, 14.0)], (40, 32)) == [None]
    assert place_labels([], [], (40, 32)) == []


def test_a_label_does_not_hide_a_small_mask() -> None:
    dot = Layer(np.ones((6, 6), dtype=bool), 100, 80)
    (spot,) = place_labels([dot], [(20.0, 16.0)], (300, 200))
    assert spot is not None and spot.apart
    covered = (abs(spot.x - 103) < 13) and (abs(spot.y - 83) < 11)
    assert not covered
    large = Layer(np.ones((60, 80), dtype=bool), 100, 80)
    (spot,) = place_labels([large], [(20.0, 16.0)], (300, 200))
    assert spot is not None and not spot.apart


def test_very_wide_pictures_stand_above_each_other_with_room_for_labels() -> None:
    ids = np.repeat(np.arange(1, 41, dtype=np.int32), 50)[None].repeat(40, axis=0)
    entities = EntityMap.from_id_image(ids)
    items = [_item("all", 0, list(range(1, 41)), entities)]
    image = np.zeros((40, 2000, 3), dtype=np.uint8)
    picture = draw_grounding(image, "all", items, entities=entities)
    assert 1800 <= picture.width <= 2000 and picture.height < 700
    dark = (np.asarray(picture) == (25, 25, 25)).all(axis=2)
    assert dark.sum() > 40 * 100  # the labels' boxes

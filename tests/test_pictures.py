"""Pictures and figures of results: right pixels and texts, and nothing of a caption is markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_reader import Reader
from PIL import Image

from gella.entities.entity_map import EntityMap
from gella.pictures.chips import Piece, flow_items, ink_on, load_font, palette, wrap_pieces
from gella.pictures.grounding import Grounding, Noun, PanopticResult, cut_caption
from gella.pictures.html import (
    SCRIPT,
    STYLE,
    grounding_html,
    mean_width,
    page,
    panoptic_html,
    svg_path,
)
from gella.pictures.overlays import Grid, Layer, deepest_point, place_labels
from gella.pictures.panels import MASK_OPACITY, draw_colormap

SIDE = 480  # of the enlarged panel of a 96 x 96 picture
MARGIN = 16
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = [
    "<script>window.pwned = 1; alert(1)</script>",
    '"><img src=x onerror="window.pwned = 2">',
    "</style><script>window.pwned = 3</script>",
    "' onmouseover='window.pwned = 4' x='",
    '<a href="javascript:window.pwned=5">link</a> javascript:alert(1)',
    "</span></p></figcaption><iframe srcdoc='<script>parent.pwned=6</script>'>",
    "\u202egnp.exe\u2066 \u200f\u2069 &lt;b&gt; &#x3c;",
    "nul \x00 surrogate \ud800 escape \x1b",
    "<!-- ]]> <svg onload=alert(1)>",
]


def grounded(
    entities: EntityMap, nouns: list[tuple[str, list[int]]], caption: str = "", **more: Any
) -> Grounding:
    """A result over a grey picture; nouns stand in the caption, or have the span -1."""
    caption = caption or ", ".join(text for text, _ in nouns)
    phrases = []
    for text, ids in nouns:
        mask = entities.union([entities.index_of(i) for i in ids if i in entities.segment_ids])
        start = caption.find(text)
        item = {"phrase": text, "start": start, "end": start + len(text) if start >= 0 else -1}
        phrases.append({**item, "entity_ids": ids, "scores": [0.9] * len(ids), "mask": mask})
    image = np.full((*entities.ids.shape, 3), 40, dtype=np.uint8)
    colormap = np.zeros((4, 4, 3), dtype=np.uint8)
    return Grounding(image, caption, entities, phrases, colormap, **{"weights": "w", **more})


def boxes() -> EntityMap:
    ids = np.zeros((96, 96), dtype=np.int32)
    ids[8:40, 8:40] = 70
    ids[56:88, 48:90] = 9
    return EntityMap.from_id_image(ids, [70, 9])


def shades(result: Any) -> list[np.ndarray]:
    """Each noun's colour, blended with the grey picture of `grounded`."""
    colors = palette(len(result.nouns()))
    return [0.4 * 40 + MASK_OPACITY * np.array(colors[noun.color]) for noun in result.nouns()]


def overlay(result: Any) -> np.ndarray:
    """The enlarged picture with the masks."""
    left = 2 * MARGIN + SIDE
    return np.asarray(result.plot())[MARGIN : MARGIN + SIDE, left : left + SIDE].astype(int)


# -- still pictures --------------------------------------------------------------------------------


def test_masks_have_their_nouns_colour_and_the_rest_is_untouched() -> None:
    result = grounded(boxes(), [("a box", [70]), ("a bar", [9])])
    result.image[90:] = (200, 10, 30)
    panel, pixels = overlay(result), np.asarray(result.plot())
    assert pixels.shape[1] >= 640
    for (x, y), shade in zip([(14, 14), (54, 60)], shades(result), strict=True):
        assert np.abs(panel[5 * y + 2, 5 * x + 2] - shade).max() <= 1
    assert panel[102, 402].tolist() == [40, 40, 40]
    given = pixels[MARGIN : MARGIN + SIDE, MARGIN : MARGIN + SIDE]
    assert (given[: 85 * 5] == 40).all() and (given[94 * 5 :] == (200, 10, 30)).all()
    assert len(set(panel[94 * 5 + 2, 27].tolist())) == 1  # no colour but the nouns'
    text = pixels[MARGIN + SIDE + MARGIN :].reshape(-1, 3)
    for color in palette(2):  # the chips in the caption and in the list
        assert (text == color).all(axis=1).sum() > 500


def test_an_entity_of_two_nouns_shows_both_colours() -> None:
    result = grounded(boxes(), [("a box", [70]), ("things", [70, 9])], own_masks=True)
    panel, colors = overlay(result), shades(result)
    for part, shade, least in (
        (panel[60:180, 60:180], colors[0], 0.1),
        (panel[60:180, 60:180], colors[1], 0.1),
        (panel[300:420, 260:420], colors[1], 0.95),
    ):
        assert (np.abs(part - shade) <= 2).all(axis=2).mean() > least


def test_nouns_share_colours_only_with_their_like_and_name_what_they_have() -> None:
    nouns = [("The box", [70]), ("the box", [70]), ("the box", [9]), ("a", []), ("b", [-3, 9, 70])]
    first, second, third, none, made = grounded(boxes(), nouns).nouns()
    assert first.color == second.color != third.color
    assert none.listed == "no entity" and made.listed == "[1, 2, new]" and made.made == (-3,)
    assert grounded(boxes(), [("b", [9, 3])], own_masks=True).nouns()[0].listed == "[3, 9]"


def test_untrained_weights_and_nouns_without_entities() -> None:
    plain, marked = (grounded(boxes(), [("a dog", [])], "nothing", weights=w) for w in ("w", ""))
    assert marked.plot().height > plain.plot().height
    assert (np.asarray(marked.plot())[:20] == (160, 30, 30)).all(axis=2).mean() > 0.8
    assert not (np.asarray(plain.plot()) == (160, 30, 30)).all(axis=2).any()
    marked.cut_nouns = ["<i>"]
    html = grounding_html(marked, key="a")
    assert "untrained" in html and "&lt;i&gt;" in html and "<i>" not in html
    assert "untrained" not in grounding_html(plain, key="a")
    made = grounded(boxes(), [("a box", [70])])
    made.phrases[0]["entity_ids"] = [-1]  # decoded by the model itself, and drawn all the same
    assert np.abs(overlay(made)[72, 72] - shades(made)[0]).max() <= 1


def test_masks_of_another_size_are_refused() -> None:
    result = grounded(boxes(), [("a box", [70])])
    result.image = result.image[:50]
    with pytest.raises(ValueError, match="96x96.*96x50"):
        result.plot()
    with pytest.raises(ValueError, match="96x96.*96x50"):
        PanopticResult(result.image, result.entities.ids, []).plot()


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (2000, 1500)])
def test_odd_sizes_are_drawn_within_bounds(size: tuple[int, int]) -> None:
    picture = grounded(EntityMap(np.ones(size, dtype=np.int32)), [("x", [1])]).plot()
    assert 640 <= picture.width <= 2100 and picture.height <= 1400


def test_a_caption_is_cut_at_its_nouns() -> None:
    caption = "A red box and a blue box on sand"
    spans = [(27, 32), (0, 9), (14, 24), (2, 9), (-1, -1), (28, 99)]
    pieces = cut_caption(caption, [Noun("", k, (), (), (), *span) for k, span in enumerate(spans)])
    assert "".join(text for text, _ in pieces) == caption
    chips = [piece for piece in pieces if piece[1] is not None]
    assert chips == [("A red box", 1), ("a blue box", 2), (caption[27:32], 0)]


def test_text_and_items_flow_within_the_width_and_lose_no_word() -> None:
    font = load_font(18)

    def checked(rows: list[list[Piece]], width: int) -> list[str]:
        texts = ["".join(piece.text for piece in row) for row in rows]
        for row, text in zip(rows, texts):
            chips = 6 * sum(piece.color is not None for piece in row)
            assert font.getlength(text.rstrip()) + chips <= width + 6
        return texts

    text = "several words that do not fit\ton a line " * 3 + "W" * 120
    rows = wrap_pieces([Piece(text), Piece("two words", (1, 2, 3))], font, 200)
    joined = "".join(checked(rows, 200))
    assert len(rows) > 3 and "".join(joined.split()) == "".join((text + "two words").split())
    items = [[Piece(f"noun {k}", (1, 2, 3)), Piece(f": [{k}, {k + 1}]")] for k in range(20)]
    items.insert(7, [Piece("a very long noun " * 9, (4, 5, 6)), Piece(": no entity")])
    texts = checked(flow_items(items, font, 500), 500)
    assert 10 <= len(texts) <= 17
    assert all(any(f"noun {k}: [{k}, {k + 1}]" in text for text in texts) for k in range(20))


# CIELAB as dichromats see it: Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
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


def test_palette_is_distinct_and_its_ink_legible() -> None:
    colors = palette(64)
    assert len(set(colors)) == 64 and palette(70) == [*colors, *colors[:6]]
    assert all(0 <= value <= 255 for color in colors for value in color)
    for color, dark in (((255, 255, 0), True), ((0, 0, 160), False), ((230, 159, 0), True)):
        assert (ink_on(color) == (25, 25, 25)) is dark


def test_deepest_point_is_inside_and_deep() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 20:60] = True
    mask[np.arange(0, 60, 3), np.arange(0, 60, 3)] = True
    x, y = deepest_point(mask)
    assert 25 <= x <= 55 and 15 <= y <= 45
    x, y = deepest_point(np.eye(400, dtype=bool))  # a thin mask that a coarse grid may miss
    assert x == y
    with pytest.raises(ValueError, match="empty mask"):
        deepest_point(np.zeros((3, 3), dtype=bool))


def test_panoptic_colours_by_category() -> None:
    ids = np.zeros((96, 96), dtype=np.int32)
    ids[:30], ids[40:60], ids[70:] = 1, 2, 3
    segments = [{"id": k, "category_id": c} for k, c in ((1, 5), (2, 8), (3, 5))]
    categories = [{"id": 5, "name": "dog"}, {"id": 8, "name": "sky"}]
    result = PanopticResult(np.full((96, 96, 3), 40, np.uint8), ids, segments, categories, "w")
    panel, (dog, sky), grey = overlay(result), shades(result), np.full(3, 40)
    for y, color in ((15, dog), (50, sky), (82, dog), (35, grey), (65, grey)):
        assert np.abs(panel[5 * y + 2, 252] - color).max() <= 1
    colormap = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    picture = np.asarray(draw_colormap(colormap, (60, 96)))  # enlarged exactly, without padding
    assert picture.shape == (420, 672, 3) and (picture[::7, ::7] == colormap[:60]).all()


def test_a_panoptic_map_has_the_numbers_of_the_entities() -> None:
    given = np.zeros((96, 96), dtype=np.int32)
    given[:30], given[30:50], given[50:70], given[70:90] = 40, 10, 30, 20
    entities = EntityMap.from_id_image(given)  # 10, 20, 30, 40 are 1, 2, 3, 4
    ids = np.zeros_like(given)
    ids[:50], ids[52:70], ids[88:] = 1, 2, 3  # 20 is void; no entity lies below 90
    info = [
        {"id": k, "category_id": c, "isthing": 1, "score": 0.5} for k, c in ((2, 5), (1, 8), (3, 5))
    ]
    categories = [{"id": 5, "name": "dog"}, {"id": 8, "name": "sky"}]
    picture = np.full((96, 96, 3), 40, np.uint8)
    result = PanopticResult(picture, ids, info, categories, "w", entities=entities)
    told = {s["id"]: (s["entity_numbers"], s["entity_ids"]) for s in result.to_json()["segments"]}
    assert told == {2: ([3], [30]), 1: ([1, 4], [10, 40]), 3: ([2], [20])}
    assert [noun.listed for noun in result.nouns()] == ["[2, 3, new]", "[1, 4]"]
    assert [noun.scored for noun in result.nouns()][1] == "1 (0.50), 4 (0.50)"
    numbered = result.numbered()
    for y, number in ((0, 4), (40, 1), (51, 0), (60, 3), (80, 0), (89, 2), (92, 7)):
        assert numbered[y, 5] == number, y
    read = Reader(panoptic_html(result, key="p"))
    says = {p["data-entity"]: p["data-says"] for p in read.having("data-entity")}
    assert says["4"].startswith("entity 4") and says["7"].startswith("mask of the model")
    assert sorted(read.each("data-label", tag="text")) == ["1", "2", "3", "4"]
    assert result.plot().width >= 640


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
        rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip((20, 30), size))
        if size[0] >= 20:
            centres = [(np.arange(n) + 0.5) * m / n for n, m in zip(size, (20, 30))]
            clear = np.ix_(*(centre % 1 > 0 for centre in centres))  # not on a border
            back = np.ix_(*(centre.astype(int) for centre in centres))
            assert (drawn[clear] == whole[back][clear]).all()
        else:
            ys, xs = np.nonzero(whole)
            near = np.pad(drawn, 1)
            for y, x in zip(rows[ys], columns[xs]):  # nothing is lost altogether
                assert near[y : y + 3, x : x + 3].any()


def test_reduced_masks_keep_their_areas_and_their_thin_parts() -> None:
    mask, drawn = np.zeros((600, 900), dtype=bool), np.zeros((60, 90), dtype=bool)
    mask[100:300, 200:500] = mask[200, 500:880] = True  # a surface and a line of one pixel
    layer: Any = Grid((600, 900), (60, 90)).layer(mask)
    drawn[layer.place] = layer.mask
    assert drawn[10:30, 20:50].all() and drawn[20, 51:88].all() and drawn.sum() == 20 * 30 + 37


@pytest.mark.parametrize("size", [(900, 1300), (1500, 40), (40, 1500), (96, 96)])
def test_a_line_of_one_pixel_is_seen(size: tuple[int, int]) -> None:
    ids = np.ones(size, dtype=np.int32)
    along = ids if size[0] < size[1] else ids.T
    along[len(along) // 3] = 2
    picture = grounded(EntityMap(ids), [("a wall", [1]), ("a line", [2])]).plot()
    lines = (np.asarray(picture) == palette(2)[1]).all(axis=2)[: picture.height - 110]  # no chips
    assert lines.sum() > 0.6 * min(max(size), 900)


def test_lines_beside_each_other_leave_each_other_their_colours() -> None:
    ids = np.zeros((700, 900), dtype=np.int32)
    ids[300], ids[301] = 1, 2
    pixels = np.asarray(grounded(EntityMap(ids), [("one", [1]), ("two", [2])]).plot())
    for color in palette(2):
        assert (pixels[:716] == color).all(axis=2).sum() >= 800


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("frame", [(640, 480), (480, 480), (900, 60), (60, 900)])
def test_labels_never_overlap_nor_leave_the_picture(seed: int, frame: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    ids = np.zeros(frame[::-1], dtype=np.int32)
    for number in range(1, 20 * (seed + 1) + 1):
        h, w = (rng.integers(1, max(2, int(side * rng.uniform(0.02, 0.5)))) for side in ids.shape)
        y, x = rng.integers(0, ids.shape[0] - h + 1), rng.integers(0, ids.shape[1] - w + 1)
        ids[y : y + h, x : x + w] = number
    layers = []
    for number in np.unique(ids[ids > 0]):
        left, top, right, bottom = Image.fromarray(ids == number).getbbox() or (0, 0, 0, 0)
        layers.append(Layer((ids == number)[top:bottom, left:right], left, top))
    sizes = [(14.0 + 7 * (k % 3), 15.0) for k in range(len(layers))]
    placed = place_labels(layers, sizes, frame)
    spots = [(p, w / 2, h / 2) for p, (w, h) in zip(placed, sizes) if p]
    taken = np.array([(p.x - w, p.y - h, p.x + w, p.y + h) for p, w, h in spots])
    assert (taken[:, :2] >= 0).all() and (taken[:, 2:] <= frame).all()
    clear = (taken[:, None, 2:] <= taken[None, :, :2]) | (taken[None, :, 2:] <= taken[:, None, :2])
    assert (~clear.any(axis=2)).sum() == len(taken)  # each with itself
    if min(frame) >= 480:
        assert len(taken) == len(layers)
    for spot, layer, (width, height) in zip(placed, layers, sizes):
        if spot is not None:
            x, y = (int(value) for value in spot.anchor)
            assert layer.mask[y - layer.y, x - layer.x]
            away = abs(spot.x - spot.anchor[0]) > width / 2
            assert spot.apart == (away or abs(spot.y - spot.anchor[1]) > height / 2)


def test_labels_of_small_masks() -> None:
    layers = [Layer(np.ones((5 + k, 40), dtype=bool), 0, 0) for k in range(10)]
    placed = place_labels(layers, [(38.0, 14.0)] * 10, (40, 32))
    assert [k for k, spot in enumerate(placed) if spot] in ([9], [8, 9])  # no room for all
    assert place_labels(layers[:1], [(50.0, 14.0)], (40, 32)) == [None]
    assert place_labels([], [], (40, 32)) == []
    for size, beside in (((6, 6), True), ((60, 80), False)):  # beside the mask, or on it
        layer = Layer(np.ones(size, dtype=bool), 100, 80)
        spot: Any = place_labels([layer], [(20.0, 16.0)], (300, 200))[0]
        assert spot.apart == beside
        assert not beside or abs(spot.x - 103) >= 13 or abs(spot.y - 83) >= 11


def test_very_wide_pictures_stand_above_each_other() -> None:
    ids = np.repeat(np.arange(1, 41, dtype=np.int32), 50)[None].repeat(40, axis=0)
    picture = grounded(EntityMap(ids), [("all", list(range(1, 41)))]).plot()
    assert 1800 <= picture.width <= 2000 and picture.height < 700


# -- figures as HTML -------------------------------------------------------------------------------


def scene() -> EntityMap:
    """12 x 16 pixels: a region with a hole, in the hole another, two that touch, a line, loose
    pixels, and pixels of none."""
    ids = np.zeros((12, 16), dtype=np.int32)
    ids[1:8, 1:8] = 30
    ids[3:6, 3:6] = 10
    ids[4, 4] = 0
    ids[1:8, 8:12] = 20
    ids[9, :] = 40
    ids[10, 3], ids[11, 4], ids[11, 12] = 50, 50, 50
    return EntityMap.from_id_image(ids, [10, 20, 30, 40, 50, 60])  # 60 has no pixel


def usual() -> Grounding:
    nouns = [("A ring", [30]), ("a dot", [10]), ("all things", [30, 10, 20]), ("a line", [40, 60])]
    caption = "A ring and a dot beside the ring, all things on a line, but no cat."
    return grounded(scene(), [*nouns, ("no cat", []), ("the sparks", [50])], caption)


def segments(*names: str) -> PanopticResult:
    info = [{"id": k, "category_id": c} for k, c in ((10, 3), (20, 1), (30, 3), (40, 2))]
    names = names or ("dog", "sky", "cat", "<unseen>")
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    ids = np.array([0, 10, 20, 30, 40, 0, 0], dtype=np.int32)[scene().ids]
    return PanopticResult(np.full((12, 16, 3), 90, np.uint8), ids, info, categories, "w")


def fill(path: str, height: int, width: int) -> np.ndarray:
    """Pixels that path data covers by the rule evenodd, from its vertical edges."""
    inside = np.zeros((height, width), dtype=bool)
    x = y = top = 0
    for kind, first, second in re.findall(r"([Mhvz])(-?\d+)?(?: (-?\d+))?", path):
        if kind == "M":
            x, y = int(first), int(second)
            top = y
        elif kind == "h":
            x += int(first)
        else:
            down = top if kind == "z" else y + int(first)
            inside[min(y, down) : max(y, down), x:] ^= True
            y = down
    return inside


def drawn(html: str, height: int, width: int) -> dict[int, np.ndarray]:
    """The mask that a page draws of each entity, in its order."""
    paths = Reader(html).having("data-entity")
    return {int(p["data-entity"]): fill(p["d"], height, width) for p in paths}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_paths_cover_exactly_their_pixels(share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = rng.random(rng.integers(1, 24, 2)) < share
        assert (fill(svg_path(mask), *mask.shape) == mask).all()
        assert mask.any() or svg_path(mask) == ""


def test_paths_have_corners_only_and_lines_are_told_from_surfaces() -> None:
    mask = np.zeros((400, 600), dtype=bool)
    mask[100:300, 50:500] = True
    assert svg_path(mask) == "M50 100h450v200h-450z"
    mask[150:200, 100:120] = False
    assert svg_path(mask, 1000, 0) == "M1050 100h450v200h-450zM1100 150h20v50h-20z"
    line, square = np.zeros((2, 300, 300), dtype=bool)
    line[7, 10:260], square[20:120, 30:130] = True, True
    assert 0.9 < mean_width(line) < 1 and mean_width(square) == 50
    assert mean_width(np.zeros((4, 4), dtype=bool)) == 0


def test_every_entity_has_its_path_and_every_noun_its_numbers() -> None:
    result = usual()
    html, areas = grounding_html(result, key="a"), result.entities.areas()
    read, masks = Reader(html), drawn(html, 12, 16)
    assert read.caption == result.caption
    # Large masks lie below small ones; 6 has no pixel.
    assert [areas[k - 1] for k in masks] == sorted((a for a in areas if a), reverse=True)
    assert all((mask == (result.entities.ids == k)).all() for k, mask in masks.items())
    nouns = {int(n["data-noun"]): n for n in read.having("data-noun")}
    assert [nouns[k]["data-entities"] for k in range(6)] == ["3", "1", "1 2 3", "4 6", "", "5"]
    (says,) = (p["data-says"] for p in read.having("data-entity") if p["data-entity"] == "3")
    assert all(part in says for part in ("entity 3", "A ring", "all things")) and "dot" not in says
    assert nouns[2]["data-says"].endswith(": 1 (0.90), 2 (0.90), 3 (0.90)")
    assert nouns[4]["data-says"].endswith(": no entity")


def test_nouns_without_a_place_stand_below_the_caption() -> None:
    nouns = [("the big red box", [30]), ("red box", [20]), ("a ghost", [10])]
    result = grounded(scene(), nouns, "the big red box")
    result.phrases.append({**result.phrases[0], "phrase": "big red", "start": 4, "end": 99})
    read = Reader(grounding_html(result, key="a"))
    assert read.caption == "the big red box"
    assert sorted(read.each("data-noun")) == ["-1", "0", "1", "2", "3"]
    below = read.text[read.text.index("the big red box") + len("the big red box") :]
    assert all(text in below for text in ("red box", "a ghost", "big red"))


def test_masks_of_the_model_get_numbers_after_the_entities() -> None:
    result = grounded(scene(), [("a box", [30, -2]), ("a bar", [-2])])
    for item in result.phrases:
        item["mask"] = item["mask"].copy()
        item["mask"][11, 0:2] = True
    html = grounding_html(result, key="a")
    # Sets of such masks are only known together, so equal sets are one area.
    assert Reader(html).each("data-noun", "data-entities") == ["3 7", "7", "1 2 4 5 6"]
    assert drawn(html, 12, 16)[7].sum() == 2
    own = grounded(scene(), [("a box", [30])], own_masks=True)
    assert Reader(grounding_html(own, key="a")).each("data-noun", "data-entities") == ["7"]


def asked(rows: list[list[float]], **more: Any) -> Grounding:
    """A row of probabilities for each noun over as many entities, of which it names the first."""
    entities = EntityMap(np.arange(1, len(rows[0]) + 1, dtype=np.int32)[None].repeat(4, axis=0))
    ids = entities.segment_ids
    result = grounded(entities, [(f"noun {k}", ids[:1]) for k in range(len(rows))], **more)
    for phrase, row in zip(result.phrases, rows):
        phrase["probabilities"] = {i: p for i, p in zip(ids, row) if not np.isnan(p)}
    return result


def test_the_table_has_every_probability_and_its_highest_marked() -> None:
    wide = [[k / 50 for k in range(50)], [0.3] + [0.0] * 49]
    for result, numbers, cells, best in (
        (asked([[0.9, 0.1, 0.04], [0.25, np.nan, 0.254]]), "1 2 3", "90 10 4 25 25", "90 25"),
        (asked([[0.5, 0.5]]), "1 2", "50 50", "50 50"),
        (asked([[0.2, 0.7]], task="refer"), "1 2", "20 70", "70"),
        (asked(wide), " ".join(map(str, [1, *range(12, 51)])), None, "98 30"),
        (asked([[np.nan, np.nan]]), "", "", ""),
        (asked([[0.5, 0.5]], own_masks=True), "", "", ""),
    ):
        html = grounding_html(result, key="a")
        assert re.findall(r'<th scope="col" data-label="(\d+)"', html) == numbers.split()
        told = re.findall(r'<td class="p\d+(?: best)?">(\d+)', html)
        assert cells is None or told == cells.split()
        assert re.findall(r'best">(\d+)', html) == best.split()
        assert ("10 entities that score lower are left out" in html) == (cells is None)
    assert '<td class="p3 best">25</td>' in grounding_html(asked([[0.254, 0.1]]), key="a")


def test_entities_that_no_noun_names_are_a_noun_of_their_own() -> None:
    for result, listed in (
        (asked([[0.9, 0.1, 0.04], [0.25, 0.3, np.nan]]), "2 (0.30), 3 (0.04)"),
        (asked([[0.9]]), ""),
        (asked([[0.9, 0.1]], task="refer"), ""),  # the others are not what was asked
        (grounded(scene(), [], "a bare picture"), ""),
    ):
        rest = Reader(grounding_html(result, key="a")).having("data-noun")
        says = [
            re.sub("[\u2068\u2069]", "", n["data-says"]) for n in rest if n["data-noun"] == "-1"
        ]
        assert says == [f"named by no noun: {listed}"] * bool(listed)


def test_categories_light_their_segments() -> None:
    html = panoptic_html(segments(), key="p")
    read, masks = Reader(html), drawn(html, 12, 16)
    assert read.each("data-noun", "data-entities") == ["1 3", "2", "4"]
    assert read.caption == "cat dog sky" and "<unseen>" in read.text
    assert all((mask == (segments().ids == 10 * k)).all() for k, mask in masks.items())


def test_ids_are_the_keys_own() -> None:
    pages = [grounding_html(usual(), key=key) for key in ("a", "b-1")]
    ids = [Reader(html).each("id") for html in pages]
    assert len(ids[0] + ids[1]) == len({*ids[0], *ids[1]}) >= 4
    for html, names in zip(pages, ids):
        assert set(re.findall(r"url\(#([^)]*)\)", html)) <= {*names}


@pytest.mark.parametrize("key", ["", "a b", 'a"', "<a>", "é", "a" * 65, "a\n"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        grounding_html(usual(), key=key)


def test_addresses_of_the_picture() -> None:
    wrong = ("javascript:alert(1)", " JavaScript:x", "data:text/html,x", "data:image/svg+xml,x")
    for source in (*wrong, "file:x"):
        with pytest.raises(ValueError, match="image_src"):
            panoptic_html(segments(), key="a", image_src=source)
    source = 'pictures/a"b&c.png?x=1'
    for given, start in ((source, source), (None, "data:image/png;base64,")):
        html = grounding_html(usual(), key="a", image_src=given)
        assert Reader(html).each("href", tag="image")[0].startswith(start)


def test_noise_makes_a_page_of_bounded_size() -> None:
    ids = np.random.default_rng(0).integers(0, 5, (1000, 1000)).astype(np.int32)
    html = grounding_html(grounded(EntityMap(ids), [], "x"), key="a")
    assert len(html) < 4_000_000 and 'viewBox="0 0 1000 1000"' in html
    (stride,) = {int(scale[6:-1]) for scale in Reader(html).each("transform")}
    shown = ids[::stride, ::stride]
    masks = drawn(html, *shown.shape)
    assert masks and all((mask == (shown == k)).all() for k, mask in masks.items())


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_never_become_markup(text: str) -> None:
    nouns = [(text, [30]), ("there", [10]), ("ghost " + text, [20])]
    result = grounded(scene(), nouns, f"see {text} there", cut_nouns=[text])
    body = [grounding_html(result, key="g"), panoptic_html(segments(*[text] * 4), key="p")]
    html = page(text, body)
    html.encode("utf-8")
    plain = page("title", [grounding_html(usual(), key="g"), panoptic_html(segments(), key="p")])
    read = Reader(html)
    used, allowed = (
        {(name, a) for name, attributes in each.tags for a in ("", *attributes)}
        for each in (read, Reader(plain))
    )
    assert used <= allowed
    assert sum(name == "script" for name, _ in read.tags) == 1
    caption = re.sub("[\x00-\x08\x0b-\x1f\ud800-\udfff]", "\ufffd", result.caption)
    assert caption in read.caption
    for says in read.each("data-says"):  # nothing turns the rest of the line around
        assert not re.search("[\u200e\u200f\u202a-\u202e\u2066\u2067]", says)
        assert says.count("\u2068") == says.count("\u2069")


def test_style_and_script_fit_into_their_elements() -> None:
    assert "</" not in STYLE and "<!--" not in SCRIPT and "</script" not in SCRIPT
    selectors = re.findall(r"^([^{}@/][^{}]*)\{", STYLE, re.MULTILINE)
    parts = [part.strip() for selector in selectors for part in selector.split(",")]
    assert parts and all(part.startswith(".gella") for part in parts)


# -- figures in a browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no browser at {CHROMIUM}: apt-get install chromium")
    args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=str(CHROMIUM), args=args)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page of figures; no dialog may come up, no error be thrown."""
    opened, troubles = [], []

    def opener(*figures: str, width: int = 1000, title: str = "Page") -> Any:
        file = tmp_path / "page.html"
        file.write_text(page(title, figures), encoding="utf-8")
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.troubles = troubles
        tab.on("dialog", lambda box: (troubles.append(f"dialog {box.message}"), box.dismiss()))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("console", lambda line: troubles.append(line.text))
        tab.goto(file.as_uri())
        opened.append(tab)
        return tab

    yield opener
    for tab in opened:
        tab.close()
    assert troubles == []


def lit(tab: Any, kind: str, figure: str = "gella-a") -> list[int]:
    return tab.evaluate(
        "([f, k]) => [...document.querySelectorAll(`#${f} .lit`)].filter(n => k in n.dataset)"
        ".map(n => Number(n.dataset[k])).sort((a, b) => a - b)",
        [figure, kind],
    )


def status(tab: Any) -> str:
    return re.sub("[\u2068\u2069]", "", tab.locator("#gella-a .status").inner_text())


def to_pixel(tab: Any, x: int, y: int) -> None:
    """Move the pointer to the middle of a pixel of the picture."""
    box = tab.locator("#gella-a svg").bounding_box()
    side = box["width"] / 16
    tab.mouse.move(box["x"] + (x + 0.5) * side, box["y"] + (y + 0.5) * side)


def seen(tab: Any, folder: Path, x: float, y: float, width: int, height: int) -> np.ndarray:
    """Pixels of the screen, from (x, y) of the figure's picture on."""
    box = tab.locator("#gella-a svg").bounding_box()
    clip = {"x": box["x"] + x, "y": box["y"] + y, "width": width, "height": height}
    (folder / "seen.png").write_bytes(tab.screenshot(clip=clip))
    return np.asarray(Image.open(folder / "seen.png").convert("RGB")).astype(int)


def test_pointing_lights_exactly_what_belongs_together(show: Any) -> None:
    tab = show(grounding_html(usual(), key="a"), grounding_html(usual(), key="b"))
    for noun, numbers in enumerate([[3], [1], [1, 2, 3], [4], [], [5]]):
        tab.locator(f"#gella-a [data-noun='{noun}']").hover()
        assert lit(tab, "entity") == numbers and lit(tab, "noun") == [noun]
        assert lit(tab, "entity", "gella-b") == []
    assert status(tab).startswith("the sparks: 5 (0.90)")
    for pixel, number, nouns in (
        ((1, 1), 3, [0, 2]),
        ((3, 3), 1, [1, 2]),  # in the hole
        ((7, 4), 3, [0, 2]),
        ((8, 4), 2, [2]),  # touches the one before
        ((0, 9), 4, [3]),
        ((4, 11), 5, [5]),
    ):
        to_pixel(tab, *pixel)
        assert lit(tab, "entity") == [number] and lit(tab, "noun") == nouns
    assert status(tab) == "entity 5: the sparks"
    to_pixel(tab, 4, 4)  # the hole in the hole
    assert lit(tab, "entity") == lit(tab, "noun") == [] and "Point at" in status(tab)


def test_the_entities_of_no_noun_light_together(show: Any) -> None:
    tab = show(grounding_html(grounded(scene(), [("A ring", [30])]), key="a"))
    tab.locator("[data-noun='-1']").hover()
    assert lit(tab, "entity") == [1, 2, 4, 5] and lit(tab, "noun") == [-1]
    to_pixel(tab, 8, 4)
    assert lit(tab, "entity") == [2] and lit(tab, "noun") == [-1]


def test_every_pixel_belongs_to_its_mask(show: Any) -> None:
    tab = show(grounding_html(usual(), key="a"), width=640)
    found = tab.evaluate(
        """() => { const box = document.querySelector('svg').getBoundingClientRect();
        const side = box.width / 16, found = [];
        for (let y = 0; y < 12; y++) for (let x = 0; x < 16; x++)
          for (const [u, v] of [[.01, .01], [.99, .01], [.01, .99], [.99, .99], [.5, .5]]) {
            const at = [box.x + (x + u) * side, box.y + (y + v) * side];
            found.push(Number(document.elementFromPoint(...at).dataset.entity || 0)); }
        return found; }"""
    )
    assert (np.array(found).reshape(12, 16, 5) == usual().entities.ids[:, :, None]).all()


def test_a_click_pins_until_the_next_one_or_escape(show: Any) -> None:
    tab = show(grounding_html(usual(), key="a"))
    ring, things = (tab.locator(f"[data-noun='{k}']") for k in (0, 2))
    ring.click()
    things.hover()
    assert lit(tab, "entity") == [3] and ring.get_attribute("aria-pressed") == "true"
    things.click()
    assert ring.get_attribute("aria-pressed") == "false"
    tab.mouse.move(1, 1)
    assert lit(tab, "entity") == [1, 2, 3]
    things.click()
    tab.mouse.move(1, 1)
    assert lit(tab, "entity") == []  # the focus that the click gave does not keep it lit
    to_pixel(tab, 8, 4)
    tab.mouse.down()
    tab.mouse.up()
    ring.hover()
    assert lit(tab, "entity") == [2] and lit(tab, "noun") == [2]
    tab.keyboard.press("Escape")
    tab.mouse.move(1, 1)
    assert lit(tab, "entity") == []


def test_the_original_is_shown_and_enlarged(show: Any) -> None:
    tab = show(grounding_html(usual(), key="a"))
    path, svg = tab.locator("#gella-a path").first, tab.locator("#gella-a svg")
    width, original = svg.bounding_box()["width"], tab.get_by_role("button", name="Original")
    for pressed in ("true", "false"):
        original.click()
        assert original.get_attribute("aria-pressed") == pressed
        assert path.is_visible() == (pressed == "false")
    for times in (2, 4, 1):
        tab.get_by_role("button", name="Zoom").click()
        assert svg.bounding_box()["width"] == pytest.approx(times * width, rel=0.05)
        assert tab.get_by_role("button", name=f"Zoom: {times}\u00d7").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_keyboard_does_the_same(show: Any) -> None:
    tab = show(grounding_html(usual(), key="a"))
    for numbers in ([], [], [3], [1], [1, 2, 3], [4], [], [5]):  # two buttons first
        tab.keyboard.press("Tab")
        assert lit(tab, "entity") == numbers
    for key in ("Shift+Tab", "Shift+Tab", "Enter", "Tab"):
        tab.keyboard.press(key)
    assert lit(tab, "entity") == [4] and lit(tab, "noun") == [3]
    tab.keyboard.press("Escape")
    assert lit(tab, "entity") == []  # the noun in focus has no mask
    names = [n.get_attribute("aria-label") or "" for n in tab.locator("[role=button]").all()]
    assert len(names) == 6 and all("(0.9" in name or "no entity" in name for name in names)


def test_figures_that_come_later_work_and_the_script_may_come_twice(show: Any) -> None:
    tab = show(f'<div id="place"></div>{panoptic_html(segments(), key="p")}')
    insert = "html => { document.querySelector('#place').innerHTML = html; }"
    tab.evaluate(insert, grounding_html(usual(), key="a"))
    tab.evaluate(SCRIPT)
    tab.locator("#gella-a [data-noun='2']").click()
    tab.mouse.move(1, 1)
    assert lit(tab, "entity") == [1, 2, 3]  # two listeners would have pinned and let go
    tab.locator("#gella-p [data-noun='0']").hover()
    assert lit(tab, "entity", "gella-p") == [1, 3]
    tab.evaluate(insert, "")
    tab.keyboard.press("Escape")


def test_nothing_of_a_text_runs_and_the_policy_is_in_force(show: Any) -> None:
    result = grounded(scene(), [(text, [30]) for text in HOSTILE], " and ".join(HOSTILE))
    figures = (grounding_html(result, key="a"), panoptic_html(segments(*HOSTILE[:3]), key="p"))
    tab = show(*figures, title=HOSTILE[0])
    for noun in range(len(HOSTILE)):
        chip = tab.locator(f"#gella-a [data-noun='{noun}']")
        line = chip.evaluate("n => { const r = n.getClientRects()[0]; return [r.x, r.y]; }")
        tab.mouse.move(line[0] + 4, line[1] + 4)  # a chip of several lines has a hole in its box
        assert lit(tab, "entity") == [3]
    to_pixel(tab, 1, 1)
    assert HOSTILE[0] in status(tab)
    assert tab.evaluate("window.pwned === undefined") and tab.troubles == []
    # Even markup that got in would do nothing: the policy runs the page's own script only.
    tab.evaluate(
        """() => { document.querySelector('main').insertAdjacentHTML('beforeend',
        '<img src="x.png" onerror="window.pwned = 7"><iframe src="https://127.0.0.1:9/"></iframe>');
        const script = document.createElement('script'); script.textContent = 'window.pwned = 8';
        document.body.append(script); }"""
    )
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.pwned === undefined")
    refused = [line for line in tab.troubles if "Content Security Policy" in line]
    assert any("script" in line for line in refused) and any("frame" in line for line in refused)
    tab.troubles.clear()


def test_a_picture_beside_the_page_is_shown(show: Any, tmp_path: Path) -> None:
    Image.new("RGB", (160, 120), (200, 10, 30)).save(tmp_path / "beside it.png")
    tab = show(grounding_html(usual(), key="a", image_src="beside%20it.png"))
    tab.wait_for_timeout(100)
    tab.locator("#gella-a [data-noun='1']").hover()  # lit figures show the picture in its colours
    width = tab.locator("#gella-a svg").bounding_box()["width"]
    red, green, _ = seen(tab, tmp_path, 0.9 * width, 5, 5, 5)[2, 2].tolist()
    assert red > green + 60


def test_lines_thinner_than_the_screen_have_their_colour(show: Any, tmp_path: Path) -> None:
    ids = np.ones((1200, 1600), dtype=np.int32)
    ids[600] = 2
    tab = show(grounding_html(grounded(EntityMap(ids), [("line", [2]), ("wall", [1])]), key="a"))
    height = tab.locator("#gella-a svg").bounding_box()["height"]
    column = seen(tab, tmp_path, 30, height / 2 - 5, 4, 10)[:, 2]
    assert (np.abs(column - palette(1)[0]).max(axis=1) < 40).sum() >= 2


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(show: Any, width: int) -> None:
    nouns = [("a line", [40]), ("very long noun " * 20, [30])]
    long = grounded(scene(), nouns, "W" * 300 + " a line " + "words " * 60)
    figures = (grounding_html(long, key="a"), panoptic_html(segments(), key="p"))
    tab = show(*figures, width=width, title="W" * 200)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

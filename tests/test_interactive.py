"""The interactive figures: right masks, right texts, and nothing of a caption becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gella.entities.entity_map import EntityMap
from gella.pictures.colors import palette
from gella.pictures.grounding import Grounding, PanopticResult
from gella.pictures.html import SCRIPT, STYLE, grounding_html, page, panoptic_html
from gella.pictures.outlines import corner_count, mask_box, mean_width, svg_path

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


def phrase(text: str, start: int, ids: list[int], entities: EntityMap) -> dict[str, Any]:
    mask = entities.union([entities.index_of(i) for i in ids if i in entities.segment_ids])
    end = start + len(text) if start >= 0 else -1
    scores = [0.9] * len(ids)
    made = {"phrase": text, "start": start, "end": end, "entity_ids": ids, "scores": scores}
    return {**made, "mask": mask}


def grounding(caption: str, nouns: list[tuple[str, list[int]]], **more: Any) -> Grounding:
    """A result whose nouns stand in the caption, or have the start -1."""
    entities = scene()
    phrases = [phrase(text, caption.find(text), ids, entities) for text, ids in nouns]
    image = np.full((12, 16, 3), 90, dtype=np.uint8)
    colormap = np.zeros((4, 4, 3), dtype=np.uint8)
    return Grounding(image, caption, entities, phrases, colormap, **{"weights": "w", **more})


def usual() -> Grounding:
    return grounding(
        "A ring and a dot beside the ring, all things on a line, but no cat.",
        [
            ("A ring", [30]),
            ("a dot", [10]),
            ("all things", [30, 10, 20]),
            ("a line", [40, 60]),
            ("no cat", []),
            ("the sparks", [50]),
        ],
    )


def segments() -> PanopticResult:
    info = [{"id": k, "category_id": c} for k, c in ((10, 3), (20, 1), (30, 3), (40, 2))]
    categories = [{"id": k, "name": name} for k, name in ((1, "dog"), (2, "sky"), (3, "cat"))]
    ids = scene().ids.copy()
    ids = np.array([0, 10, 20, 30, 40, 0], dtype=np.int32)[ids]
    image = np.full((12, 16, 3), 90, dtype=np.uint8)
    return PanopticResult(image, ids, info, [*categories, {"id": 4, "name": "<unseen>"}], "w")


class Reader(HTMLParser):
    """Keeps start tags with their attributes, and the text inside of ``p.caption``."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.caption, self.text = "", ""
        self._depth = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len({name for name, _ in attrs})
        self.tags.append((tag, dict(attrs)))
        if tag == "p":
            self._depth = int(dict(attrs).get("class") == "caption")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._depth = 0

    def handle_data(self, data: str) -> None:
        self.text += data
        self.caption += data if self._depth else ""

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in attributes]


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


# -- outlines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_paths_cover_exactly_their_pixels(share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(1, 24, 2)
        mask = rng.random((height, width)) < share
        assert (fill(svg_path(mask), height, width) == mask).all()
        rows, columns = np.nonzero(mask)
        box = mask_box(mask)
        if not len(rows):
            assert box is None and svg_path(mask) == ""
        else:
            assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_paths_have_corners_only() -> None:
    mask = np.zeros((400, 600), dtype=bool)
    mask[100:300, 50:500] = True
    assert svg_path(mask) == "M50 100h450v200h-450z"
    mask[150:200, 100:120] = False
    assert svg_path(mask, (1000, 0)) == "M1050 100h450v200h-450zM1100 150h20v50h-20z"
    assert corner_count(mask) == 8


def test_mean_width_tells_lines_from_surfaces() -> None:
    line, square = np.zeros((300, 300), dtype=bool), np.zeros((300, 300), dtype=bool)
    line[7, 10:260], square[20:120, 30:130] = True, True
    assert 0.9 < mean_width(line) < 1 and mean_width(square) == 50
    assert mean_width(np.zeros((4, 4), dtype=bool)) == 0


# -- the figure as HTML ----------------------------------------------------------------------------


def test_every_entity_has_its_path_and_every_noun_its_numbers() -> None:
    result = usual()
    read = Reader(grounding_html(result, key="a"))
    assert read.caption == result.caption
    paths = {int(p["data-entity"] or 0): p for p in read.having("data-entity")}
    assert sorted(paths) == [1, 2, 3, 4, 5]  # 6 has no pixel
    for number, attributes in paths.items():
        covered = fill(attributes["d"] or "", 12, 16)
        assert (covered == (result.entities.ids == number)).all()
    nouns = {int(n["data-noun"] or 0): n for n in read.having("data-noun")}
    lit = [nouns[k]["data-entities"] for k in range(6)]
    assert lit == ["3", "1", "1 2 3", "4 6", "", "5"]
    assert "entity 3" in (paths[3]["data-says"] or "")
    for name in ("A ring", "all things"):
        assert name in (paths[3]["data-says"] or "") and "a dot" not in paths[3]["data-says"]
    assert (nouns[2]["data-says"] or "").endswith(": [1, 2, 3]")
    assert (nouns[4]["data-says"] or "").endswith(": no entity")


def test_large_masks_lie_below_small_ones() -> None:
    read = Reader(grounding_html(usual(), key="a"))
    order = [int(p["data-entity"] or 0) for p in read.having("data-entity")]
    areas = usual().entities.areas()
    assert [areas[k - 1] for k in order] == sorted((a for a in areas if a), reverse=True)


def test_nouns_without_a_place_stand_below_the_caption() -> None:
    result = grounding("the big red box", [("the big red box", [30]), ("red box", [20])])
    result.phrases.append(phrase("a ghost", -1, [10], result.entities))
    result.phrases.append({**phrase("big red", 4, [10], result.entities), "end": 99})
    read = Reader(grounding_html(result, key="a"))
    assert read.caption == "the big red box"
    assert sorted(int(n["data-noun"] or 0) for n in read.having("data-noun")) == [0, 1, 2, 3]
    below = read.text[read.text.index("the big red box") + len("the big red box") :]
    for text in ("red box", "a ghost", "big red"):
        assert text in below


def test_masks_of_the_model_get_numbers_after_the_entities() -> None:
    result = grounding("a box and a bar", [("a box", [30, -2]), ("a bar", [-2])])
    for item in result.phrases:
        item["mask"] = item["mask"].copy()
        item["mask"][11, 0:2] = True
    read = Reader(grounding_html(result, key="a"))
    nouns = read.having("data-noun")
    # Sets of such masks are only known together, so equal sets are one area.
    assert [n["data-entities"] for n in nouns] == ["3 7", "7"]
    (made,) = (p for p in read.having("data-entity") if p["data-entity"] == "7")
    assert fill(made["d"] or "", 12, 16).sum() == 2
    own = grounding("a box", [("a box", [30])], own_masks=True)
    assert [
        n["data-entities"] for n in Reader(grounding_html(own, key="a")).having("data-noun")
    ] == ["7"]


def test_warnings_and_left_out_nouns_are_told() -> None:
    html = grounding_html(grounding("x", [], weights="", cut_nouns=["<i>"]), key="a")
    assert "untrained" in html and "&lt;i&gt;" in html and "<i>" not in html
    assert "untrained" not in grounding_html(usual(), key="a")


def test_categories_light_their_segments() -> None:
    read = Reader(panoptic_html(segments(), key="p"))
    nouns = read.having("data-noun")
    assert [n["data-entities"] for n in nouns] == ["1 3", "2", "4"]
    assert read.caption == "cat dog sky" and "<unseen>" in read.text
    for attributes in read.having("data-entity"):
        number = int(attributes["data-entity"] or 0)
        assert (fill(attributes["d"] or "", 12, 16) == (segments().ids == 10 * number)).all()


def test_ids_are_the_keys_own() -> None:
    first, second = (grounding_html(usual(), key=key) for key in ("a", "b-1"))
    ids = [t["id"] for html in (first, second) for t in Reader(html).having("id")]
    assert len(ids) == len(set(ids)) >= 4
    for html in (first, second):
        names = {t["id"] for t in Reader(html).having("id")}
        assert set(re.findall(r"url\(#([^)]*)\)", html)) <= names


@pytest.mark.parametrize("key", ["", "a b", 'a"', "<a>", "é", "a" * 65, "a\n"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        grounding_html(usual(), key=key)


@pytest.mark.parametrize(
    "source",
    ["javascript:alert(1)", " JavaScript:x", "data:text/html,x", "data:image/svg+xml,x", "file:x"],
)
def test_other_addresses_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="image_src"):
        panoptic_html(segments(), key="a", image_src=source)


def test_address_of_the_picture_is_used_and_escaped() -> None:
    source = 'pictures/a"b&c.png?x=1'
    (picture,) = (t for name, t in Reader(grounding_html(usual(), key="a", image_src=source)).tags
                  if name == "image")  # fmt: skip
    assert picture["href"] == source
    (embedded,) = (
        t for name, t in Reader(grounding_html(usual(), key="a")).tags if name == "image"
    )
    assert (embedded["href"] or "").startswith("data:image/png;base64,")


def test_noise_makes_a_page_of_bounded_size() -> None:
    result = usual()
    ids = np.random.default_rng(0).integers(0, 5, (1000, 1000)).astype(np.int32)
    result.image, result.entities = np.zeros((1000, 1000, 3), np.uint8), EntityMap(ids)
    result.phrases = []
    html = grounding_html(result, key="a")
    assert len(html) < 4_000_000 and 'viewBox="0 0 1000 1000"' in html
    read = Reader(html)
    (stride,) = {int((p["transform"] or "")[6:-1]) for p in read.having("transform")}
    for attributes in read.having("data-entity"):
        wanted = ids[::stride, ::stride] == int(attributes["data-entity"] or 0)
        assert (fill(attributes["d"] or "", *wanted.shape) == wanted).all()


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_never_become_markup(text: str) -> None:
    result = grounding(f"see {text} there", [(text, [30]), ("there", [10])], cut_nouns=[text])
    result.phrases.append(phrase(text, -1, [20], result.entities))
    panoptic = segments()
    panoptic.categories = [{"id": k, "name": text} for k in (1, 2, 3, 4)]
    body = [grounding_html(result, key="g"), panoptic_html(panoptic, key="p")]
    html = page(text, body)
    html.encode("utf-8")
    plain = page("title", [grounding_html(usual(), key="g"), panoptic_html(segments(), key="p")])
    read = Reader(html)
    assert {name for name, _ in read.tags} <= {name for name, _ in Reader(plain).tags}
    allowed = {(name, a) for name, attributes in Reader(plain).tags for a in attributes}
    assert {(name, a) for name, attributes in read.tags for a in attributes} <= allowed
    assert sum(name == "script" for name, _ in read.tags) == 1
    caption = re.sub("[\x00-\x08\x0b-\x1f\ud800-\udfff]", "\ufffd", result.caption)
    assert caption in read.caption
    for attributes in read.having("data-says"):  # nothing of it turns the rest of the line around
        says = attributes["data-says"] or ""
        assert not re.search("[\u200e\u200f\u202a-\u202e\u2066\u2067]", says)
        assert says.count("\u2068") == says.count("\u2069")


def test_style_and_script_fit_into_their_elements() -> None:
    assert "</" not in STYLE and "<!--" not in SCRIPT and "</script" not in SCRIPT
    selectors = re.findall(r"^([^{}@/][^{}]*)\{", STYLE, re.MULTILINE)
    assert selectors and all(
        part.strip().startswith(".gella") for selector in selectors for part in selector.split(",")
    )


# -- the figure in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if not CHROMIUM.is_file():
        pytest.skip(f"there is no browser at {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page's HTML; no dialog may come up, no error be thrown."""
    opened = []

    def opener(html: str, width: int = 1000) -> Any:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.troubles = []
        tab.on("dialog", lambda box: (tab.troubles.append(f"dialog {box.message}"), box.dismiss()))
        tab.on("pageerror", lambda error: tab.troubles.append(str(error)))
        tab.on("console", lambda line: tab.troubles.append(line.text))
        tab.goto(file.as_uri())
        opened.append(tab)
        return tab

    yield opener
    for tab in opened:
        tab.close()


def lit(tab: Any, kind: str, figure: str = "gella-a") -> list[int]:
    return tab.evaluate(
        "([f, k]) => [...document.querySelectorAll(`#${f} .lit`)].filter(n => k in n.dataset)"
        ".map(n => Number(n.dataset[k])).sort((a, b) => a - b)",
        [figure, kind],
    )


def status(tab: Any) -> str:
    text = tab.locator("#gella-a .status").inner_text()
    return re.sub("[\u2068\u2069]", "", text)


def to_pixel(tab: Any, x: int, y: int) -> None:
    """Move the pointer to the middle of a pixel of the picture."""
    box = tab.locator("#gella-a svg").bounding_box()
    side = box["width"] / 16
    tab.mouse.move(box["x"] + (x + 0.5) * side, box["y"] + (y + 0.5) * side)


def test_pointing_at_a_noun_lights_exactly_its_masks(show: Any) -> None:
    tab = show(page("Page", [grounding_html(usual(), key="a"), grounding_html(usual(), key="b")]))
    wanted = [[3], [1], [1, 2, 3], [4], [], [5]]
    for noun, numbers in enumerate(wanted):
        tab.locator(f"#gella-a [data-noun='{noun}']").hover()
        assert lit(tab, "entity") == numbers and lit(tab, "noun") == [noun]
        assert lit(tab, "entity", "gella-b") == []
    assert status(tab).startswith("the sparks: [5]")
    tab.mouse.move(1, 1)
    assert lit(tab, "entity") == lit(tab, "noun") == [] and "Point at" in status(tab)
    assert tab.troubles == []


def test_pointing_at_a_mask_lights_exactly_its_nouns(show: Any) -> None:
    tab = show(page("Page", [grounding_html(usual(), key="a")]))
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
    assert lit(tab, "entity") == lit(tab, "noun") == []


def test_every_pixel_belongs_to_its_mask(show: Any) -> None:
    tab = show(page("Page", [grounding_html(usual(), key="a")]), 640)
    found = tab.evaluate(
        """() => { const box = document.querySelector('svg').getBoundingClientRect();
        const side = box.width / 16, found = [];
        for (let y = 0; y < 12; y++) for (let x = 0; x < 16; x++)
          for (const [u, v] of [[.01, .01], [.99, .01], [.01, .99], [.99, .99], [.5, .5]]) {
            const at = [box.x + (x + u) * side, box.y + (y + v) * side];
            found.push(Number(document.elementFromPoint(...at).dataset.entity || 0)); }
        return found; }"""
    )
    seen = np.array(found).reshape(12, 16, 5)
    assert (seen == usual().entities.ids[:, :, None]).all()


def test_a_click_pins_until_the_next_one_or_escape(show: Any) -> None:
    tab = show(page("Page", [grounding_html(usual(), key="a")]))
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


def test_the_keyboard_does_the_same(show: Any) -> None:
    tab = show(page("Page", [grounding_html(usual(), key="a")]))
    for numbers in ([3], [1], [1, 2, 3], [4], [], [5]):
        tab.keyboard.press("Tab")
        assert lit(tab, "entity") == numbers
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    assert lit(tab, "entity") == [4] and lit(tab, "noun") == [3]
    tab.keyboard.press("Escape")
    assert lit(tab, "entity") == []  # the noun in focus has no mask
    names = [n.get_attribute("aria-label") or "" for n in tab.locator("[role=button]").all()]
    assert len(names) == 6 and all("[" in name or "no entity" in name for name in names)


def test_figures_that_come_later_work_and_the_script_may_come_twice(show: Any) -> None:
    body = [f'<div id="place"></div>{panoptic_html(segments(), key="p")}']
    tab = show(page("Page", body))
    tab.evaluate(
        "html => { document.querySelector('#place').innerHTML = html; }",
        grounding_html(usual(), key="a"),
    )
    tab.evaluate(SCRIPT)
    tab.locator("#gella-a [data-noun='2']").click()
    tab.mouse.move(1, 1)
    assert lit(tab, "entity") == [1, 2, 3]  # two listeners would have pinned and let go
    tab.locator("#gella-p [data-noun='0']").hover()
    assert lit(tab, "entity", "gella-p") == [1, 3]
    tab.evaluate("document.querySelector('#place').innerHTML = ''")
    tab.keyboard.press("Escape")
    assert tab.troubles == []


def test_nothing_of_a_text_runs_and_the_policy_is_in_force(show: Any) -> None:
    caption = " and ".join(HOSTILE)
    result = grounding(caption, [(text, [30]) for text in HOSTILE])
    panoptic = segments()
    panoptic.categories = [{"id": k, "name": HOSTILE[k]} for k in (1, 2, 3)]
    body = [grounding_html(result, key="a"), panoptic_html(panoptic, key="p")]
    tab = show(page(HOSTILE[0], body))
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


def test_a_picture_beside_the_page_is_shown(show: Any, tmp_path: Path) -> None:
    Image.new("RGB", (160, 120), (200, 10, 30)).save(tmp_path / "beside it.png")
    tab = show(page("Page", [grounding_html(usual(), key="a", image_src="beside%20it.png")]))
    tab.wait_for_timeout(100)
    tab.locator("#gella-a [data-noun='1']").hover()  # lit figures show the picture in its colours
    box = tab.locator("#gella-a svg").bounding_box()
    clip = {"x": box["x"] + box["width"] * 0.9, "y": box["y"] + 5, "width": 5, "height": 5}
    (tmp_path / "seen.png").write_bytes(tab.screenshot(clip=clip))
    red, green, _ = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))[2, 2].tolist()
    assert red > green + 60 and tab.troubles == []


def test_lines_thinner_than_the_screen_have_their_colour(show: Any, tmp_path: Path) -> None:
    result = grounding("a line on a wall", [])
    ids = np.ones((1200, 1600), dtype=np.int32)
    ids[600] = 2
    result.entities, result.image = EntityMap(ids), np.zeros((1200, 1600, 3), dtype=np.uint8)
    result.phrases = [phrase(text, 0, [k], result.entities) for k, text in ((2, "a l"), (1, "x"))]
    tab = show(page("Page", [grounding_html(result, key="a")]))
    box = tab.locator("#gella-a svg").bounding_box()
    clip = {"x": box["x"] + 30, "y": box["y"] + box["height"] / 2 - 5, "width": 4, "height": 10}
    (tmp_path / "seen.png").write_bytes(tab.screenshot(clip=clip))
    column = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"))[:, 2].astype(int)
    assert (np.abs(column - palette(1)[0]).max(axis=1) < 40).sum() >= 2


@pytest.mark.parametrize("size", [(40, 1900), (1900, 40)])
def test_very_long_pictures_scroll_and_have_labels(show: Any, size: tuple[int, int]) -> None:
    result = grounding("a wall", [])
    ids = np.ones(size, dtype=np.int32)
    result.entities, result.image = EntityMap(ids), np.zeros((*size, 3), dtype=np.uint8)
    result.phrases = [phrase("a wall", 0, [1], result.entities)]
    tab = show(page("Page", [grounding_html(result, key="a")]))
    box = tab.locator("#gella-a svg").bounding_box()
    assert 90 <= min(box["width"], box["height"]) <= 100
    assert max(box["width"], box["height"]) > 4000
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1000
    label = tab.locator("#gella-a text").bounding_box()
    assert 10 <= label["height"] <= 30


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(show: Any, width: int) -> None:
    long = grounding("W" * 300 + " a line " + "words " * 60, [("a line", [40])])
    long.phrases.append(phrase("very long noun " * 20, -1, [30], long.entities))
    tab = show(
        page("W" * 200, [grounding_html(long, key="a"), panoptic_html(segments(), key="p")]), width
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

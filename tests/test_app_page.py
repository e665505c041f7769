"""The web page in a browser: Chromium without a window, driven as a visitor would."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the web page needs gradio (pip install -e '.[app]')")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="driving a browser needs playwright (pip install -e '.[dev]')"
)

from web_page import CAPTION, MASKS, SCENE, SCENES, Served, served, write_zip_bomb  # noqa: E402

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM,
    reason="no chromium, chromium-browser or google-chrome on the PATH (Debian: chromium)",
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served("--max-upload-mb", "1", "--max-pixels", "100000", "--max-caption", "300") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(site: Served, browser: Any) -> Iterator[Any]:
    """A new visitor's page; afterwards: nothing was asked of others, no script of a text ran."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = open_page(context, site)
    yield opened
    context.close()
    assert opened.dialogs == [] and opened.failures == []
    assert all(url.startswith((site.address, "data:", "blob:")) for url in opened.asked)


def open_page(context: Any, site: Served) -> Any:
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.asked, page.dialogs, page.failures = [], [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.failures.append(str(error)))

    def dismiss(dialog: Any) -> None:
        page.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(site.address)
    page.wait_for_selector("#ground")
    return page


def upload(page: Any, picture: Path = SCENE, *masks: Path) -> None:
    page.set_input_files("#picture input[type=file]", picture)
    page.wait_for_selector("#picture img")
    page.set_input_files("#masks input[type=file]", list(masks or (MASKS,)))


def wait_for_note(page: Any, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('#note').innerText.includes(words)", arg=words
    )


def ground(page: Any, caption: str, nouns: str = "") -> None:
    page.fill("#caption textarea", caption)
    page.fill("#nouns textarea, #nouns input", nouns)
    page.click("#ground")
    page.wait_for_function(
        "text =>"
        " document.querySelector('#figure [data-noun]') &&"
        " document.querySelector('#figure .caption').textContent.includes(text)",
        arg=caption[:12],
    )


def lit(page: Any, kind: str) -> list[str]:
    """Numbers of the entities or nouns that are lit."""
    return page.eval_on_selector_all(
        f"#figure [data-{kind}].lit", f"parts => parts.map(part => part.dataset.{kind})"
    )


def message(page: Any) -> str:
    """The text of the newest message, which is then closed."""
    page.wait_for_selector("[data-testid=toast-text]")
    text = page.inner_text("[data-testid=toast-text] >> nth=-1")
    for close in page.query_selector_all("[data-testid=toast-close]"):
        close.click()
    page.wait_for_selector("[data-testid=toast-text]", state="detached")
    return text


def test_a_visitor_uploads_grounds_and_edits(page: Any, site: Served) -> None:
    before = len(site.encoded)
    upload(page)
    wait_for_note(page, "96 x 96 pixels, 10 entities; encoded")
    ground(page, CAPTION)
    nouns = page.eval_on_selector_all(
        "#figure [data-noun]", "all => all.map(n => n.dataset.entities)"
    )
    assert len(nouns) == 2 and all(nouns)
    page.hover("#figure [data-noun='0']")
    assert sorted(lit(page, "entity")) == sorted(nouns[0].split())
    entity = nouns[1].split()[0]
    page.mouse.move(2, 2)
    assert lit(page, "entity") == []
    page.dispatch_event(f"#figure [data-entity='{entity}']", "pointerover", {"bubbles": True})
    assert lit(page, "noun") == [str(k) for k, named in enumerate(nouns) if entity in named.split()]
    page.dispatch_event(f"#figure [data-entity='{entity}']", "click")  # pinned
    assert f"entity {entity}" in page.inner_text("#figure .status")
    page.mouse.move(2, 2)
    assert lit(page, "entity") == [entity]
    ground(page, "There is the wall beside a lamp.", "the wall, a lamp")
    assert page.inner_text("#figure [data-noun='0']").startswith("the wall")
    assert len(site.encoded) == before + 1


def test_the_results_are_downloaded(page: Any) -> None:
    upload(page)
    ground(page, CAPTION)
    saved = {}
    for name in ("png", "json"):
        page.wait_for_selector(f"#get-{name}:not([disabled])")
        with page.expect_download() as download:
            page.click(f"#get-{name}")
        saved[name] = Path(download.value.path())
        assert download.value.suggested_filename == f"000000500002_ground.{name}"
    content = json.loads(saved["json"].read_text())
    assert content["caption"] == CAPTION and content["config"] == "config.yaml"
    assert [noun["noun"] for noun in content["nouns"]] == ["two white stars", "the grass"]
    assert np.asarray(Image.open(saved["png"])).shape[1] >= 96


def test_the_examples_answer_all_tasks(page: Any, site: Served) -> None:
    before = len(site.encoded)
    page.click("#examples button >> nth=0")
    wait_for_note(page, "encoded")
    assert page.input_value("#caption textarea")
    first = json.loads((SCENES / "captions.jsonl").read_text().splitlines()[0])
    assert page.input_value("#caption textarea") == first["caption"]
    page.click("#describe")
    page.wait_for_function(
        f"document.querySelector('#caption textarea').value !== {json.dumps(first['caption'])}"
    )
    page.wait_for_function("document.querySelector('#caption textarea').value.endsWith('.')")
    page.click("#extract")
    page.wait_for_function("document.querySelector('#nouns textarea, #nouns input').value !== ''")
    page.click("button[role=tab] >> text=Referring")
    page.fill("#expression textarea, #expression input", "the sand")
    page.click("#find-expression")
    page.wait_for_selector("#figure [data-noun] >> text=the sand")
    page.click("button[role=tab] >> text=Panoptic")
    page.fill("#categories textarea, #categories input", "ring, sand, floor")
    page.press("#categories textarea, #categories input", "Enter")
    page.wait_for_selector("#figure [data-noun] >> text=ring")
    assert len(site.encoded) == before + 1


def test_wrong_input_gives_a_message_and_the_page_lives_on(page: Any, tmp_path: Path) -> None:
    page.click("#ground")
    assert "no picture yet" in message(page)
    upload(page)
    wait_for_note(page, "encoded")
    page.click("#ground")
    assert "The caption is empty" in message(page)
    (tmp_path / "text.png").write_text("no picture")
    page.click("#masks [aria-label='Clear']")
    page.set_input_files("#masks input[type=file]", tmp_path / "text.png")
    wait_for_note(page, "text.png is no PNG")
    page.fill("#caption textarea", CAPTION)
    page.click("#ground")
    assert "text.png is no PNG" in message(page)
    page.click("#masks [aria-label='Clear']")
    page.set_input_files("#masks input[type=file]", write_zip_bomb(tmp_path / "bomb.npz", 40))
    wait_for_note(page, "unpack to")
    (tmp_path / "large.png").write_bytes(bytes(1_500_000))
    page.click("#masks [aria-label='Clear']")
    page.set_input_files("#masks input[type=file]", tmp_path / "large.png")
    assert re.search("size|large", message(page), re.IGNORECASE)
    page.set_input_files("#masks input[type=file]", MASKS)
    wait_for_note(page, "encoded")
    ground(page, CAPTION)
    page.evaluate("document.querySelector('#caption textarea').removeAttribute('maxlength')")
    page.fill("#caption textarea", "x" * 301)
    page.click("#ground")
    assert "301 characters; at most 300" in message(page)


def test_a_picture_with_too_many_pixels_is_refused(page: Any, tmp_path: Path) -> None:
    Image.new("L", (400, 300)).save(tmp_path / "large.png")
    upload(page, tmp_path / "large.png")
    wait_for_note(page, "400 x 300 = 120,000 pixels; at most 100,000")


def test_a_description_can_be_stopped(
    page: Any, site: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(*, on_text: Any, **_: Any) -> str:
        try:
            for k in range(2000):
                on_text(f"word {k}")
                time.sleep(0.02)
        finally:
            ended.set()
        return "the end"

    monkeypatch.setattr(site.desk.predictor, "describe", endless)
    upload(page)
    wait_for_note(page, "encoded")
    page.click("#describe")
    page.wait_for_function("document.querySelector('#caption textarea').value.includes('word')")
    first = page.input_value("#caption textarea")
    page.wait_for_function(f"document.querySelector('#caption textarea').value !== '{first}'")
    assert not ended.is_set()  # it is shown while it is written
    page.click("#stop")
    assert ended.wait(20)
    ground(page, CAPTION)  # the next question is answered


def test_a_click_during_an_answer_is_not_lost(
    page: Any, site: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground_now, going = site.desk.predictor.ground, threading.Event()

    def slowly(*args: Any, **options: Any) -> Any:
        going.set()
        time.sleep(1)
        return ground_now(*args, **options)

    monkeypatch.setattr(site.desk.predictor, "ground", slowly)
    upload(page)
    wait_for_note(page, "encoded")
    page.fill("#caption textarea", CAPTION)
    page.click("#ground")
    assert going.wait(30)
    ground(page, "There is the wall.", "the wall")


def test_html_in_a_caption_is_shown_as_text(page: Any) -> None:
    evil = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} <script>alert(3)</script> the wall"
    upload(page)
    wait_for_note(page, "encoded")
    ground(page, evil, "the wall, <b>bold</b>, ${alert(4)}")
    assert evil[:40] in page.inner_text("#figure .caption")
    assert page.query_selector("#figure img, #figure script, #figure b") is None


def test_html_in_a_message_is_shown_as_text(
    page: Any, site: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = 'no noun in "<img src=x onerror=alert(1)> <b>bold</b>"'

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(evil)

    monkeypatch.setattr(site.desk.predictor, "ground", refuse)
    upload(page)
    wait_for_note(page, "encoded")
    page.fill("#caption textarea", CAPTION)
    page.click("#ground")
    assert message(page) == evil


def test_two_visitors_see_their_own_pictures(site: Served, browser: Any) -> None:
    one, two = browser.new_context(), browser.new_context()
    first, second = open_page(one, site), open_page(two, site)
    upload(first)
    wait_for_note(first, "000000500002")
    assert "Still to come: a picture" in second.inner_text("#note")
    second.click("#ground")
    assert "no picture yet" in message(second)
    upload(second, SCENES / "000000500016.png", SCENES / "000000500016_masks.png")
    wait_for_note(second, "000000500016")
    ground(first, CAPTION)
    assert "000000500002" in first.inner_text("#note")
    kept = len(site.desk.sessions)
    two.close()
    one.new_page().wait_for_timeout(1500)
    assert len(site.desk.sessions) == kept - 1  # the visitor who left is forgotten
    one.close()


def test_a_phone_shows_all_without_scrolling_sideways(site: Served, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = open_page(context, site)
    page.click("#examples button >> nth=0")
    wait_for_note(page, "encoded")
    ground(page, "There is the sand.", "the sand")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()

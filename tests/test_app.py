"""The web page without a browser: what it lets in, what it keeps, what it answers, how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

pytest.importorskip("gradio", reason="the web page needs gradio (pip install -e '.[app]')")

from caption_server import answer, chat_server, status  # noqa: E402
from web_page import (  # noqa: E402
    CAPTION,
    MASKS,
    ROOT,
    SCENE,
    SCENES,
    Served,
    served,
    write_huge_png,
    write_zip_bomb,
)

from gella.commands import app  # noqa: E402
from gella.commands.app_server import Guard, Workspace  # noqa: E402
from gella.commands.app_sessions import Held, Janitor, Sessions  # noqa: E402
from gella.commands.app_tasks import streamed  # noqa: E402
from gella.commands.app_uploads import (
    Limits,
    check_masks,
    check_picture,
    clean_folder,
    message_of,
    read_scene,
)
from gella.entities.entity_map import EntityMap, id_to_rgb  # noqa: E402
from gella.entities.sources import load_entities  # noqa: E402

SMALL = Limits(max_upload=100_000, max_pixels=10_000, max_caption=60, max_entities=5)


# -- what is kept ----------------------------------------------------------------------------------


def held(key: str) -> Held:
    return Held(key, f"scene of {key}", key, "")


def test_sessions_see_their_own_picture_only() -> None:
    sessions = Sessions()
    sessions.put("a", held("x"))
    sessions.put("b", held("y"))
    assert sessions.get("a", "x").scene == "scene of x"
    assert sessions.get("a", "y") is None and sessions.get("b", "x") is None
    sessions.put("a", held("z"))  # in the place of the former
    assert sessions.get("a", "x") is None and len(sessions) == 2
    sessions.drop("a")
    sessions.drop("unknown")
    assert sessions.get("a", "z") is None and len(sessions) == 1


def test_the_least_recently_used_picture_goes_when_there_are_too_many() -> None:
    sessions = Sessions(limit=2)
    for name in ("a", "b"):
        sessions.put(name, held(name))
    sessions.get("a", "a")
    sessions.put("c", held("c"))
    assert sessions.get("b", "b") is None
    assert sessions.get("a", "a") and sessions.get("c", "c")


def test_an_unused_picture_goes_after_a_while() -> None:
    now = [0.0]
    sessions = Sessions(seconds=10, clock=lambda: now[0])
    sessions.put("a", held("a"))
    sessions.put("b", held("b"))
    now[0] = 8
    sessions.get("b", "b")
    now[0] = 11
    assert sessions.sweep() == 1
    assert sessions.get("a", "a") is None and sessions.get("b", "b")


def test_extracted_nouns_count_until_the_caption_is_edited() -> None:
    kept = held("x")
    assert kept.keep_nouns("A star on sand.", ["A star", "sand"]) == "A star, sand"
    assert kept.nouns_for("A star on sand. ", "A star, sand") == "A star, sand"
    assert kept.nouns_for("A ring on sand.", "A star, sand") == ""
    assert kept.nouns_for("A ring on sand.", "A ring") == "A ring"  # typed by the visitor


def test_the_janitor_goes_on_after_a_failure() -> None:
    calls: list[int] = []
    done = threading.Event()

    def duty() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("once")
        done.set()

    janitor = Janitor([duty], seconds=0.01)
    assert done.wait(10)
    janitor.stop()
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count


def test_old_files_go_and_the_kept_stay(tmp_path: Path) -> None:
    for name in ("old/file", "old/example", "new/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, 0) if name.startswith("old") else None)
    assert clean_folder(tmp_path, [tmp_path / "old" / "example"], 60) == 1
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"old/example", "new/file"}


def test_the_workspace_goes_with_all_that_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    with Workspace(10, 60) as workspace:
        assert os.environ["GRADIO_TEMP_DIR"] == str(workspace.folder)
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        (workspace.downloads() / "result").write_text("123456789")
        assert not workspace.is_full()
        (workspace.folder / "upload").write_text("12")
        assert workspace.is_full()
    assert not workspace.folder.exists() and os.environ["GRADIO_TEMP_DIR"] == "before"


# -- what is let in --------------------------------------------------------------------------------


def save(path: Path, array: Any, **options: Any) -> Path:
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def test_texts_are_bounded_and_lists_split() -> None:
    assert SMALL.check_text("caption", "  a star ") == "a star"
    for empty in ("", "  ", None):
        with pytest.raises(ValueError, match="The caption is empty"):
            SMALL.check_text("caption", empty)
    with pytest.raises(ValueError, match="61 characters; at most 60"):
        SMALL.check_text("caption", "x" * 61)
    assert SMALL.split("nouns", "a star, sand;\nthe sky,,") == ["a star", "sand", "the sky"]
    assert SMALL.split("nouns", " ") == [] and SMALL.split("nouns", None) == []
    with pytest.raises(ValueError, match="3 nouns; at most 2"):
        Limits(max_phrases=2).split("nouns", "a,b,c")


@pytest.mark.parametrize("size", [(20_000, 20_000), (101, 100), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    huge = write_huge_png(tmp_path / "huge.png", *size)
    with pytest.raises(ValueError, match=r"^huge.png has .* pixels; at most 10,000"):
        check_picture(huge, SMALL)
    with pytest.raises(ValueError, match=r"^huge.png has .* pixels; at most 10,000"):
        check_masks([huge], SMALL)


def test_pictures_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("page.png", "script.png"):
        with pytest.raises(ValueError, match=f"^{name} is no picture; give a PNG"):
            check_picture(tmp_path / name, SMALL)
    save(tmp_path / "noise.png", np.random.default_rng(0).integers(0, 256, (90, 90), np.uint8))
    with pytest.raises(ValueError, match="bytes; at most 1,000 are allowed"):
        check_picture(tmp_path / "noise.png", Limits(max_upload=1000))
    with pytest.raises(ValueError, match="gone.png is no longer here"):
        check_picture(tmp_path / "gone.png", SMALL)
    good = save(tmp_path / "good.jpg", np.zeros((90, 80, 3), np.uint8))
    assert check_picture(good, SMALL) == (80, 90)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = write_zip_bomb(tmp_path / "bomb.npz", 10)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(ValueError, match="unpack to 10,000,128 bytes; at most 16 and 320,000"):
        check_masks([bomb], SMALL)
    (tmp_path / "cut.npz").write_bytes(bomb.read_bytes()[:500])
    with pytest.raises(ValueError, match="^cut.npz is truncated or no npz"):
        check_masks([tmp_path / "cut.npz"], SMALL)
    with pytest.raises(ValueError, match="masks are .png, .npz, .json files, not .exe"):
        (tmp_path / "x.exe").write_text("x")
        check_masks([tmp_path / "x.exe"], SMALL)


def scene_files(folder: Path) -> tuple[Path, np.ndarray]:
    ids = np.zeros((60, 90), dtype=np.int32)
    ids[30:], ids[5:20, 5:20], ids[5:20, 40:55] = 1, 2, 3
    return save(folder / "000000000007.png", np.zeros((60, 90, 3), np.uint8)), ids


def test_masks_of_every_form_are_read(tmp_path: Path) -> None:
    picture, ids = scene_files(tmp_path)
    masks = np.stack([ids == k for k in (1, 2, 3)])
    segments = [{"id": k, "category_id": 1, "iscrowd": int(k == 3)} for k in (1, 2, 3)]
    panoptic = {"annotations": [{"image_id": 7, "file_name": "p.png", "segments_info": segments}]}
    results = []
    for mask in masks:
        rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
        results.append({"image_id": 7, "category_id": 1, "score": 0.5, "segmentation": rle})
    save(tmp_path / "grey.png", ids.astype(np.uint8))
    save(tmp_path / "p.png", id_to_rgb(ids))
    np.savez_compressed(tmp_path / "m.npz", masks=masks)
    (tmp_path / "r.json").write_text(json.dumps(results))
    (tmp_path / "p.json").write_text(json.dumps(panoptic))
    for names, count in (
        (["grey.png"], 3),
        (["p.png"], 3),
        (["m.npz"], 3),
        (["r.json"], 3),
        (["p.png", "p.json"], 2),  # crowd is no entity
        (["p.json", "p.png"], 2),
    ):
        image, entities, image_id = read_scene(picture, [tmp_path / n for n in names], SMALL)
        assert image.shape == (60, 90, 3) and image_id == 7
        assert entities is not None and entities.num_entities == count, names


def test_masks_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    picture, ids = scene_files(tmp_path)
    nothing = np.full((2, 60, 90), np.nan, np.float32)
    np.savez_compressed(tmp_path / "nan.npz", masks=nothing)
    np.savez_compressed(tmp_path / "objects.npz", masks=np.array([{"a": 1}], dtype=object))
    save(tmp_path / "other.png", np.ones((50, 50), np.uint8))
    save(tmp_path / "noise.png", np.arange(60 * 90).reshape(60, 90).astype(np.uint16))
    save(tmp_path / "second.png", ids.astype(np.uint8))
    (tmp_path / "deep.json").write_text("[" * 50_000)
    # A JSON that names what it wants to have read
    evil = {"image_id": 7, "file_name": "../../secret.png", "segments_info": []}
    (tmp_path / "evil.json").write_text(json.dumps({"annotations": [evil]}))
    for names, words in (
        (["nan.npz"], "masks"),
        (["objects.npz"], "truncated or damaged|object"),
        (["other.png"], "50"),
        (["noise.png"], "entities; at most 5"),
        (["second.png", "other.png"], "2 mask files"),
        (["deep.json"], "JSON|nested"),
        (["evil.json"], "upload this picture's PNG"),
        (["evil.json", "second.png"], "no segments of a picture named second.png"),
    ):
        with pytest.raises((ValueError, RecursionError)) as caught:
            read_scene(picture, [tmp_path / name for name in names], SMALL)
        message = message_of(caught.value)
        assert message and re.search(words, message), (names, message)
        assert str(tmp_path) not in message and "/" not in message.replace("and/or", ""), message


def test_messages_name_no_folder_of_the_server() -> None:
    for text, shown in (
        ("image a, entity file /tmp/x_1/ab12/m.png: no entity", "image a, entity file m.png: no"),
        ("no file '/home/me/w.pth'\nhere", "no file 'w.pth' here"),
        ("../up/a.png and ./b.png and ~/c.png", "a.png and b.png and c.png"),
        ('caption "and/or, <b>x</b>, 3 / 4, http://h/x"', 'caption "and/or, <b>x</b>, 3 / 4, http'),
    ):
        assert (message_of(ValueError(text)) or "").startswith(shown)
    assert message_of(RuntimeError("secret")) is None
    assert "memory" in (message_of(MemoryError()) or "")


# -- streaming -------------------------------------------------------------------------------------


def test_text_is_streamed_while_it_grows() -> None:
    turn = threading.Semaphore(1)

    def generate(on_text: Any) -> str:
        for text in ("A", "A star", "A star."):
            assert turn.acquire(timeout=10)
            on_text(text)
        return "A star."

    texts = []
    for text in streamed(generate):
        texts.append(text)
        turn.release()
    assert texts == ["A", "A star", "A star."]


def test_a_failure_while_streaming_is_raised() -> None:
    def generate(on_text: Any) -> str:
        on_text("A")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(streamed(generate))


def test_a_reader_that_leaves_ends_the_generation() -> None:
    ended = threading.Event()

    def generate(on_text: Any) -> str:
        try:
            for k in range(1_000_000):
                on_text(str(k))
                time.sleep(0.001)
        finally:
            ended.set()
        return ""

    stream = streamed(generate)
    next(stream)
    stream.close()
    assert ended.is_set()


# -- the guard before Gradio -----------------------------------------------------------------------


@pytest.fixture
def guarded_echo() -> Any:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    full = [False]

    async def echo(request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    guard = Middleware(Guard, max_upload=1000, max_body=100, full=lambda: full[0])
    routes = [Route("/{path:path}", echo, methods=["GET", "POST"])]
    with TestClient(Starlette(routes=routes, middleware=[guard])) as client:
        yield client, full


def test_requests_are_bounded(guarded_echo: Any) -> None:
    client, full = guarded_echo
    assert client.post("/queue/join", content=b"x" * 100).text == "100"
    refused = client.post("/queue/join", content=b"x" * 101)
    assert refused.status_code == 413 and "at most 100" in refused.json()["detail"]
    assert client.post("/gradio_api/upload", content=b"x" * 1000).text == "1000"
    assert client.post("/gradio_api/upload", content=b"x" * 1001).status_code == 413
    full[0] = True
    refused = client.post("/gradio_api/upload", content=b"x")
    assert refused.status_code == 503 and "no room" in refused.json()["detail"]
    assert client.post("/queue/join", content=b"x").status_code == 200


def test_a_body_without_a_length_is_cut_off(guarded_echo: Any) -> None:
    from starlette.requests import ClientDisconnect

    client, _ = guarded_echo
    assert client.post("/join", content=iter([b"x" * 60, b"x" * 40])).text == "100"
    with pytest.raises(ClientDisconnect):
        client.post("/join", content=iter([b"x" * 60] * 1000))


@pytest.mark.parametrize("path", ["/file=http://h/x", "/FILE=HTTPS%3A//h/x", "/a/proxy=http://h/x"])
def test_nothing_is_fetched_for_others(guarded_echo: Any, path: str) -> None:
    client, _ = guarded_echo
    assert client.get(path).status_code == 403


def test_answers_forbid_what_is_not_of_the_server(guarded_echo: Any) -> None:
    client, _ = guarded_echo
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


# -- the page over HTTP ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator[Served]:
    bounds = ("--max-upload-mb", "1", "--max-pixels", "100000", "--max-caption", "300")
    with chat_server() as captions:
        captioner = ("--captioner", captions.url, "--captioner-model", "a-model")
        with served(*bounds, *captioner) as found:
            found.captions = captions
            yield found


def client_of(page: Served) -> Any:
    from gradio_client import Client

    return Client(page.address, verbose=False, analytics_enabled=False, download_files=False)


def files(picture: Path = SCENE, *masks: Path) -> tuple[Any, list[Any]]:
    from gradio_client import handle_file

    return handle_file(picture), [handle_file(path) for path in masks or (MASKS,)]


def ask(client: Any, question: str, *texts: str, given: Any = None) -> Any:
    return client.predict(*(given or files()), *texts, api_name=f"/{question}")


def path_of(download: Any) -> Path:
    value = download["value"] if "value" in download else download
    return Path(value["path"] if isinstance(value, dict) else value)


def test_grounds_and_grounds_again_without_encoding_again(page: Served) -> None:
    client, before = client_of(page), len(page.encoded)
    given = files()
    figure, note, picture, masks, _ = ask(client, "ground", CAPTION, "", given=given)
    assert 'data-noun="0"' in figure and "two white stars" in figure and "10 entities" in note
    assert np.asarray(Image.open(path_of(picture))).ndim == 3
    content = json.loads(path_of(masks).read_text())
    assert [noun["noun"] for noun in content["nouns"]] == ["two white stars", "the grass"]
    entities = load_entities(MASKS, 96, 96)
    for noun in content["nouns"]:
        mask = mask_utils.decode(noun["mask"]).astype(bool)
        assert (
            noun["entity_ids"]
            and (mask == entities.union(map(entities.index_of, noun["entity_ids"]))).all()
        )
    assert str(ROOT) not in path_of(masks).read_text()
    again = ask(client, "ground", "There is the wall.", "the wall", given=given)
    assert "the wall" in again[0] and "white stars" not in again[0]
    assert len(page.encoded) == before + 1
    assert not path_of(masks).exists()  # the next result takes its place
    ask(client_of(page), "ground", CAPTION, "", given=given)  # another visitor
    assert len(page.encoded) == before + 2


def test_refers_segments_and_extracts(page: Served) -> None:
    client, given = client_of(page), files()
    before = len(page.encoded)
    assert "the wall" in ask(client, "refer", "the wall", given=given)[0]
    figure = ask(client, "panoptic", "star, wall, grass", given=given)[0]
    assert "star" in figure and "data-entity" in figure
    assert "two white stars" in ask(client, "extract", CAPTION, given=given)
    assert len(page.encoded) == before + 1


def test_the_description_is_streamed(page: Served) -> None:
    client = client_of(page)
    job = client.submit(*files(), api_name="/describe")
    caption, nouns = job.result(timeout=60)
    texts = [text for text, _ in job.outputs()]
    assert nouns == "" and caption and texts[-1] == caption
    assert len(texts) > 1 and all(caption.startswith(text[:10]) for text in texts)


def test_a_caption_comes_from_outside_with_its_nouns(page: Served) -> None:
    from gradio_client.exceptions import AppError

    text = "A star lies on the grass."
    client, given = client_of(page), files()
    page.captions.script = [answer(json.dumps({"description": text, "nouns": ["star", "grass"]}))]
    assert ask(client, "ask", given=given) == (text, "star, grass")
    figure, *_, nouns = ask(client, "ground", text, "star, grass", given=given)
    assert "star" in figure and nouns == "star, grass"
    *_, nouns = ask(client, "ground", "There is the wall.", "star, grass", given=given)
    assert nouns == ""  # of another caption
    page.captions.script = [status(401, b'{"error": {"message": "at http://inside/"}}')]
    with pytest.raises(AppError, match="does not answer now") as caught:
        ask(client, "ask", given=given)
    assert "inside" not in str(caught.value)


def test_masks_are_found_where_none_were_uploaded(
    page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradio_client.exceptions import AppError

    client, picture = client_of(page), files()[0]
    assert client.predict(picture, None, api_name="/describe")[0]  # needs no masks
    with pytest.raises(AppError, match="no masks yet"):
        client.predict(picture, None, "the wall", api_name="/refer")
    ids = np.zeros((96, 96), np.int32)

    class Finder:
        def segment(self, image: np.ndarray) -> EntityMap:
            return EntityMap.from_id_image(ids)

    monkeypatch.setattr(page.desk, "finder", Finder())
    other = files(SCENES / "000000500016.png")[0]
    with pytest.raises(AppError, match="found no entity"):
        client.predict(other, None, "the wall", api_name="/refer")
    ids[:40], ids[60:] = 1, 2
    assert "2 entities" in client.predict(other, None, "the wall", api_name="/refer")[1]


@pytest.mark.parametrize(
    ("question", "texts", "words"),
    [
        ("ground", ("  ", ""), "The caption is empty"),
        ("ground", ("x" * 301, ""), "301 characters; at most 300"),
        ("ground", (CAPTION, "a," * 140 + "a" * 60), "340 characters|at most"),
        ("refer", ("",), "The expression is empty"),
        ("panoptic", (" , ",), "no categories"),
        ("extract", ("",), "The caption is empty"),
    ],
)
def test_wrong_texts_give_a_message(
    page: Served, question: str, texts: tuple[str, ...], words: str
) -> None:
    from gradio_client.exceptions import AppError

    client, given = client_of(page), files()
    with pytest.raises(AppError, match=words):
        ask(client, question, *texts, given=given)
    assert "the wall" in ask(client, "refer", "the wall", given=given)[0]  # and it lives on


def test_wrong_files_give_a_message(page: Served, tmp_path: Path) -> None:
    from gradio_client.exceptions import AppError

    (tmp_path / "text.png").write_text("no picture")
    huge = write_huge_png(tmp_path / "huge.png", 20_000, 20_000)
    bomb = write_zip_bomb(tmp_path / "bomb.npz", 40)
    other = save(tmp_path / "other.png", np.ones((50, 50), np.uint8))
    np.savez_compressed(tmp_path / "nan.npz", masks=np.full((1, 96, 96), np.nan))
    client = client_of(page)
    for picture, masks, words in (
        (tmp_path / "text.png", MASKS, "text.png is no picture"),
        (huge, MASKS, "far too many pixels"),
        (SCENE, tmp_path / "text.png", "text.png is no PNG"),
        (SCENE, bomb, "unpack to"),
        (SCENE, huge, "far too many pixels"),
        (SCENE, other, "50.*96"),
        (SCENE, tmp_path / "nan.npz", "masks"),
    ):
        with pytest.raises(AppError, match=words) as caught:
            ask(client, "ground", CAPTION, "", given=files(picture, masks))
        assert str(page.workspace.folder) not in str(caught.value)
    with pytest.raises(AppError, match="no picture yet"):
        client.predict(None, None, CAPTION, "", api_name="/ground")
    with pytest.raises(AppError, match="no masks yet"):
        client.predict(files()[0], None, CAPTION, "", api_name="/ground")
    assert "grass" in ask(client, "ground", CAPTION, "")[0]


def test_an_unforeseen_failure_is_told_without_its_details(
    page: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradio_client.exceptions import AppError

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("at /etc/secret")

    client, given = client_of(page), files()
    with monkeypatch.context() as patch:
        patch.setattr(page.desk.predictor, "refer", broken)
        with pytest.raises(AppError, match="Something went wrong") as caught:
            ask(client, "refer", "the wall", given=given)
    assert "secret" not in str(caught.value)
    assert "the wall" in ask(client, "refer", "the wall", given=given)[0]


def test_html_in_captions_is_text(page: Served) -> None:
    caption = "<script>alert(1)</script> the wall <img src=x onerror=alert(2)>"
    figure = ask(client_of(page), "ground", caption, "the wall, <img src=x onerror=alert(2)>")[0]
    assert "<script" not in figure and "<img" not in figure and "&lt;script&gt;" in figure


def upload(page: Served, name: str, data: bytes) -> tuple[int, str]:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode() + b'"'
        b"\r\nContent-Type: image/png\r\n\r\n" + data + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{page.address}gradio_api/upload",
        body,
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("name", ["../../etc/x.png", "/etc/x.png", "..\\..\\x.png", "a\x00b.png"])
def test_names_of_uploads_lead_nowhere(page: Served, name: str) -> None:
    status, text = upload(page, name, SCENE.read_bytes())
    if status == 200:
        path = Path(json.loads(text)[0]).resolve()
        assert path.is_relative_to(page.workspace.folder) and path.is_file()
        assert path.parent.parent == page.workspace.folder  # one folder per content
    assert not Path("/etc/x.png").exists()


def test_too_large_an_upload_is_refused(page: Served) -> None:
    status, text = upload(page, "x.png", bytes(1_000_001))
    assert status == 413 and "1000000" in text
    status, text = upload(page, "x.png", bytes(2_200_000))
    assert status == 413 and "too large" in text


def get(page: Served, path: str) -> int:
    try:
        with urllib.request.urlopen(f"{page.address}{path}", timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_other_file_is_served(page: Served) -> None:
    assert get(page, "") == 200
    for path in ("/etc/hostname", str(ROOT / "setup.py"), f"{page.workspace.folder}/../x"):
        assert get(page, f"gradio_api/file={path}") in (403, 404), path
    assert get(page, "gradio_api/file=http://127.0.0.1:1/x") == 403
    inside = next(page.workspace.folder.rglob("*.png"))
    assert get(page, f"gradio_api/file={inside}") == 200


def test_a_path_that_was_not_uploaded_is_refused(page: Served) -> None:
    from gradio_client.exceptions import AppError

    meta = {"_type": "gradio.FileData"}
    stolen = {"path": str(ROOT / "docs" / "images" / "grounding.png"), "meta": meta}
    client = client_of(page)
    with pytest.raises((AppError, ValueError)):
        client.predict(stolen, files()[1], CAPTION, "", api_name="/ground")
    assert get(page, "") == 200


def test_twenty_at_once_are_all_answered_in_order(page: Served) -> None:
    given, clients = files(), [client_of(page) for _ in range(4)]
    captions = [f"There is the wall and {k} stars." for k in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(
            pool.map(
                lambda k: ask(clients[k % 4], "ground", captions[k], "the wall", given=given),
                range(20),
            )
        )
    for k, answered in enumerate(answers):
        assert f"and {k} stars" in answered[0]


def test_a_full_queue_says_so_and_lives_on() -> None:
    with served("--queue", "2") as page:
        slow, refer = threading.Event(), page.desk.predictor.refer

        def waiting(*args: Any, **options: Any) -> Any:
            slow.wait(60)
            slow.set()
            return refer(*args, **options)

        page.desk.predictor.refer = waiting
        given, clients = files(), [client_of(page) for _ in range(4)]

        def call(k: int) -> str:
            try:
                return ask(clients[k % 4], "refer", "the wall", given=given)[0]
            except Exception as error:
                slow.set()
                return f"{type(error).__name__}: {error}"

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(call, range(20)))
        refused = [text for text in answers if "Queue is full" in text or "busy" in text]
        answered = [text for text in answers if "the wall" in text]
        assert refused and answered and len(refused) + len(answered) == 20, answers
        assert "the wall" in call(0)


# -- the command -----------------------------------------------------------------------------------


def test_wrong_arguments_are_one_line(capsys: Any) -> None:
    for argv, words in (
        (["--queue", "0"], "--queue is 0"),
        (["--max-upload-mb", "nan"], "--max-upload-mb is nan"),
        (["--port", "70000"], "--port is 70000"),
        (["--captioner-model", "m"], "--captioner-model needs --captioner"),
        (["--nonsense"], "--nonsense"),
    ):
        with pytest.raises(SystemExit) as stop:
            app.parse_args(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and words in err
        assert len(err.splitlines()) == 1
    assert app.main(["--host", "203.0.113.1"]) == 2  # of no machine
    assert "choose another address" in capsys.readouterr().err
    assert app.main(["--config-file", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: config none.yaml does not exist")


def test_hosts_that_only_this_machine_reaches() -> None:
    for host, own in (("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)):
        assert app.is_loopback(host) is own


def test_help_shows_an_example(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        app.parse_args(["--help"])
    assert stop.value.code == 0 and "python tools/app.py" in capsys.readouterr().out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_command_serves_until_it_is_stopped_and_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "tools" / "app.py"), "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "Ctrl-C" in line:
                break
        try:
            assert f"http://127.0.0.1:{port}/" in "".join(seen), seen
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                assert b"GELLA" in answer.read()
            assert list(tmp_path.glob("gella_app_*"))
            second = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert second.returncode == 2
            assert (
                second.stderr.splitlines()[-1].startswith("error: ") and str(port) in second.stderr
            )
        finally:
            process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and "stopped" in rest and "Traceback" not in rest
    assert not list(tmp_path.glob("gella_app_*"))


def test_examples_that_are_missing_or_wrong_are_named(tmp_path: Path) -> None:
    from gella.commands.app_examples import copied, read_examples

    assert read_examples(tmp_path) == []
    assert len(read_examples(SCENES)) > 2
    lines = io.StringIO()
    print(json.dumps({"image": "a.png", "masks": "b.png", "caption": "c"}), file=lines)
    (tmp_path / "captions.jsonl").write_text(lines.getvalue())
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist"):
        copied(read_examples(tmp_path), tmp_path / "copies")
    (tmp_path / "captions.jsonl").write_text(lines.getvalue() + '\n{"image": 1}\n')
    with pytest.raises(ValueError, match="line 3"):
        read_examples(tmp_path)

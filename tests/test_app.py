"""The web page: what it lets in, keeps and answers over HTTP, and shows a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from caption_server import answer, chat_server, status
from PIL import Image
from pycocotools import mask as mask_utils

from gella.captions.endpoint import is_loopback
from gella.commands import app
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.entities.rle import encode_mask
from gella.entities.sources import load_entities

pytest.importorskip("gradio", reason="the web page needs gradio (pip install -e '.[app]')")
gradio_client = pytest.importorskip("gradio_client")
app_page = pytest.importorskip("gella.commands.app_page")

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "examples" / "shapes"
SCENE, MASKS = SCENES / "000000500002.png", SCENES / "000000500002_masks.png"
CAPTION = "We can see two white stars and the grass."
BOUNDS = ("--max-upload-mb", "1", "--max-pixels", "100000", "--max-caption", "300")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 120_000  # milliseconds; the machine may be busy


@dataclass
class Served:
    """A page that answers: its address, and what stands behind it."""

    address: str
    desk: Any
    blocks: Any
    folder: Path
    encoded: Any  # counts the calls of encode
    captions: Any  # the chat endpoint that it asks


@contextmanager
def served(*arguments: str) -> Iterator[Served]:
    """Serve the page with command line arguments until the end of the block."""
    # The folder of an earlier page counts again afterwards.
    with mock.patch.dict(os.environ), chat_server() as captions, app.own_folder() as folder:
        captioner = ("--captioner", captions.url, "--captioner-model", "a-model")
        args = app.parse_args([*captioner, *arguments])
        desk = app.make_desk(args, folder)
        encoded = desk.predictor.encode = mock.Mock(wraps=desk.predictor.encode)
        blocks, address = app.open_page(desk, args, folder)
        try:
            yield Served(address, desk, blocks, folder, encoded, captions)
        finally:
            blocks.close(verbose=False)
    assert not folder.exists()


@pytest.fixture(scope="module")
def site():
    with served(*BOUNDS) as page:
        yield page


# -- what is let in --------------------------------------------------------------------------------


def save(path: Path, array: Any) -> Path:
    Image.fromarray(np.asarray(array)).save(path)
    return path


def write_zip_bomb(path: Path, megabytes: int) -> Path:
    """An .npz of a few kilobytes that unpacks to many megabytes of `masks`."""
    np.savez_compressed(path, masks=np.zeros((megabytes, 1000, 1000), bool))
    return path


def test_texts_are_bounded_and_lists_split():
    small = app_page.Limits(max_caption=60, max_phrases=3)
    assert small.check_text("caption", "  a star ") == "a star"
    assert small.split("nouns", "a star, sand;\nthe sky,,") == ["a star", "sand", "the sky"]
    assert small.split("nouns", " ") == [] and small.split("nouns", None) == []
    for empty in ("", "  ", None):
        with pytest.raises(ValueError, match="The caption is empty"):
            small.check_text("caption", empty)
    with pytest.raises(ValueError, match="61 characters; at most 60"):
        small.check_text("caption", "x" * 61)
    with pytest.raises(ValueError, match="4 nouns; at most 3"):
        small.split("nouns", "a,b,c,d")


@pytest.fixture(scope="module")
def mask_files(tmp_path_factory):
    """Masks of a 90 x 60 picture with the id 7: of every form, and such as cannot be right."""
    folder = tmp_path_factory.mktemp("masks")
    ids = np.zeros((60, 90), dtype=np.int32)
    ids[30:], ids[5:20, 5:20], ids[5:20, 40:55] = 1, 2, 3
    masks = np.stack([ids == k for k in (1, 2, 3)])
    segments = [{"id": k, "category_id": 1, "iscrowd": int(k == 3)} for k in (1, 2, 3)]
    panoptic = {"annotations": [{"image_id": 7, "file_name": "p.png", "segments_info": segments}]}
    codes = [encode_mask(mask) for mask in masks]
    results = [{"image_id": 7, "category_id": 1, "score": 0.5, "segmentation": c} for c in codes]
    save(folder / "grey.png", ids.astype(np.uint8))
    save(folder / "p.png", id_to_rgb(ids))
    np.savez_compressed(folder / "m.npz", masks=masks)
    (folder / "r.json").write_text(json.dumps(results))
    (folder / "p.json").write_text(json.dumps(panoptic))
    write_zip_bomb(folder / "bomb.npz", 10)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")  # a few kilobytes
    save(folder / "other.png", np.ones((50, 50), np.uint8))
    save(folder / "noise.png", np.arange(60 * 90).reshape(60, 90).astype(np.uint16))
    photo = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    save(folder / "photo.jpg", photo).with_suffix(".png").write_bytes(
        (folder / "photo.jpg").read_bytes()
    )
    (folder / "text.png").write_text("no picture")
    (folder / "deep.json").write_text("[" * 50_000)
    # A JSON that names what it wants to have read
    evil = {"image_id": 7, "file_name": "../../secret.png", "segments_info": []}
    (folder / "evil.json").write_text(json.dumps({"annotations": [evil]}))
    (folder / "x.exe").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("grey.png", 3),
        ("p.png", 3),
        ("m.npz", 3),
        ("r.json", 3),
        ("p.png p.json", 2),  # crowd is no entity
        ("p.json p.png", 2),
        ("bomb.npz", "unpacks to 10,000,128 bytes; at most 320,000"),
        ("noise.png", "noise.png is a photograph or a drawing, not masks"),
        ("photo.png", "photo.png is a photograph"),  # of another size, and a JPEG
        ("photo.jpg", "photo.jpg is a photograph"),
        ("grey.png other.png", "2 mask files"),
        ("deep.json", "JSON|nested"),
        ("evil.json", "upload this picture's PNG"),
        ("evil.json grey.png", "no segments of a picture named grey.png"),
        ("r.json grey.png", "no COCO panoptic JSON"),
        ("x.exe", "masks are .png, .npz, .npy, .json files, not .exe"),
    ],
)
def test_masks_of_every_form_are_read_or_refused(mask_files, names, expected):
    small = app_page.Limits(max_upload=100_000, max_pixels=10_000, max_entities=5)
    paths = [mask_files / name for name in names.split()]
    if isinstance(expected, int):
        assert app_page.read_masks(paths, (60, 90), 7, small).num_entities == expected
        return
    with pytest.raises((ValueError, RecursionError)) as caught:
        app_page.read_masks(paths, (60, 90), 7, small)
    message = app_page.message_of(caught.value)
    assert message and re.search(expected, message), message
    assert "/" not in message and "max_" not in message and "\n" not in message, message


def test_messages_name_no_folder_of_the_server():
    for text, shown in (
        ("image a, entity file /tmp/x_1/ab12/m.png: no entity", "image a, entity file m.png: no"),
        ("no file '/home/me/w.pth'\nhere", "no file 'w.pth' here"),
        ("../up/a.png and ./b.png and ~/c.png", "a.png and b.png and c.png"),
        ('caption "and/or, <b>x</b>, 3 / 4, http://h/x"', 'caption "and/or, <b>x</b>, 3 / 4, http'),
        ("scale it down, or raise max_pixels", "scale it down"),
        ("shorten the caption or raise MODEL.LANGUAGE.MAX_POSITIONS", "shorten the caption"),
        (
            "at most 5 tokens fit (MODEL.LANGUAGE.MAX_POSITIONS); cut it",
            "at most 5 tokens fit; cut",
        ),
    ):
        message = app_page.message_of(ValueError(text)) or ""
        assert message.startswith(shown) and "MODEL" not in message and "max_" not in message
    assert app_page.message_of(RuntimeError("secret")) is None
    assert "memory" in (app_page.message_of(MemoryError()) or "")


def test_streaming_ends_when_the_text_fails_or_nobody_reads():
    ended = threading.Event()

    def fails(on_text):
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(app_page.streamed(fails))

    def endless(on_text):
        try:
            while True:
                on_text(str(time.time()))
                time.sleep(0.001)
        finally:
            ended.set()

    stream = app_page.streamed(endless)
    next(stream)
    stream.close()
    assert ended.is_set()


def test_what_is_not_wanted_any_more_is_not_written():
    visitor, nothing = app_page.Visitor(), app_page.gr.skip()

    def click(caption: str) -> Any:
        app_page.Desk.keep(None, visitor, "", "")
        return (caption for _, caption, _ in visitor.write([(caption, ""), ("more", "")]))

    writing = click("one")
    assert next(writing) == "one"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(visitor.end_writing)
        while not visitor.unwanted:
            time.sleep(0.01)
        assert not ended.done()  # "one" may still be on its way
        click("a second click while the first one's caption is written")
        assert list(writing) == [nothing]
        ended.result(60)
    asked = click("two")
    visitor.end_writing()  # before the model's turn
    assert list(asked) == [nothing] and list(click("three")) == ["three", "more"]
    assert "two" not in visitor.written


# -- the guard before Gradio, and its folder -------------------------------------------------------


@pytest.fixture
def guarded_echo():
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    full = [False]

    async def echo(request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    guard = Middleware(app.Guard, max_upload=1000, max_body=100, full=lambda: full[0])
    routes = [Route("/{path:path}", echo, methods=["GET", "POST"])]
    with TestClient(Starlette(routes=routes, middleware=[guard])) as client:
        yield client, full


def test_requests_are_bounded(guarded_echo):
    from starlette.requests import ClientDisconnect

    client, full = guarded_echo
    assert client.post("/queue/join", content=b"x" * 100).text == "100"
    refused = client.post("/queue/join", content=b"x" * 101)
    assert refused.status_code == 413 and "at most 100" in refused.json()["detail"]
    assert client.post("/join", content=iter([b"x" * 60, b"x" * 40])).text == "100"
    with pytest.raises(ClientDisconnect):  # no length was given
        client.post("/join", content=iter([b"x" * 60] * 1000))
    assert client.post("/gradio_api/upload", content=b"x" * 1000).text == "1000"
    assert client.post("/gradio_api/upload", content=b"x" * 1001).status_code == 413
    full[0] = True
    refused = client.post("/gradio_api/upload", content=b"x")
    assert refused.status_code == 503 and "no room" in refused.json()["detail"]
    assert client.post("/queue/join", content=b"x").status_code == 200
    for path in ("/file=http://h/x", "/FILE=HTTPS%3A//h/x", "/a/proxy=http://h/x"):
        assert client.get(path).status_code == 403
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_the_folder_is_full_when_it_is_and_abandoned_uploads_go(tmp_path):
    (tmp_path / "hash").mkdir()
    for name in ("hash/upload", "tmp_new", "tmp_old"):
        (tmp_path / name).write_text("12345")
    for name in ("hash/upload", "tmp_old"):
        os.utime(tmp_path / name, (0, 0))
    assert app.is_full(tmp_path, 9) and not app.is_full(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["hash", "tmp_new", "upload"]


# -- the page over HTTP ----------------------------------------------------------------------------


def client_of(site: Served) -> Any:
    quiet = dict.fromkeys(("verbose", "analytics_enabled", "download_files"), False)
    # Twenty at once wait for one another on a busy machine.
    return gradio_client.Client(site.address, httpx_kwargs={"timeout": 600}, **quiet)


def files(picture: Path = SCENE, *masks: Path) -> tuple[Any, list[Any]]:
    first, *others = map(gradio_client.handle_file, (picture, *(masks or (MASKS,))))
    return first, others


def ask(client: Any, question: str, *texts: str, given: Any = None) -> Any:
    return client.predict(*(given or files()), *texts, api_name=f"/{question}")


def refusal(client: Any, question: str, *texts: str, given: Any = None) -> str:
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        ask(client, question, *texts, given=given)
    return str(caught.value)


def path_of(download: Any) -> Path:
    value = download["value"] if "value" in download else download
    return Path(value["path"] if isinstance(value, dict) else value)


def test_grounds_and_grounds_again_without_encoding_again(site):
    client, before = client_of(site), site.encoded.call_count
    given = files()
    figure, note, picture, masks, _ = ask(client, "ground", CAPTION, "", given=given)
    assert 'data-noun="0"' in figure and "two white stars" in figure and "10 entities" in note
    assert np.asarray(Image.open(path_of(picture))).ndim == 3
    content = json.loads(path_of(masks).read_text())
    assert [noun["noun"] for noun in content["nouns"]] == ["two white stars", "the grass"]
    entities = load_entities(MASKS, 96, 96)
    for noun in content["nouns"]:
        union = entities.union(map(entities.index_of, noun["entity_ids"]))
        assert noun["entity_ids"]
        assert (mask_utils.decode(noun["mask"]).astype(bool) == union).all()
    assert str(ROOT) not in path_of(masks).read_text()
    again = ask(client, "ground", "There is the wall.", "the wall", given=given)
    assert "the wall" in again[0] and "white stars" not in again[0]
    assert not path_of(masks).exists()  # the next result takes its place
    assert "the wall" in ask(client, "refer", "the wall", given=given)[0]
    figure = ask(client, "panoptic", "star, wall, grass", given=given)[0]
    assert "star" in figure and "data-entity" in figure
    assert "two white stars" in ask(client, "extract", CAPTION, given=given)
    assert site.encoded.call_count == before + 1
    ask(client_of(site), "ground", CAPTION, "", given=given)  # another visitor
    assert site.encoded.call_count == before + 2


def test_a_mask_is_shared_or_for_one_noun_only(site):
    client, nouns = client_of(site), "three purple rings, two large purple rings"
    picture = SCENES / "000000500016.png"
    given = files(picture, picture.with_name("000000500016_masks.png"))
    caption = "Here there are three purple rings. We can also see two large purple rings."
    for question, *texts, shared in (
        ("ground", caption, nouns, 0.5, True),
        ("ground", caption, nouns, 0.5, True, False),
        ("again", 0.5, False, True),
        ("again", 0.5, True, False),
        ("refer", "the purple ring", 0.5, False),
        ("again", 0.0, True, False),
    ):
        figure = ask(client, question, *texts, given=given)[0]
        named = re.findall(r'data-noun="\d+" data-entities="([\d ]+)"', figure)
        assert bool(set.intersection(*(set(n.split()) for n in named)) and named[1:]) == shared


def test_the_description_is_streamed(site):
    client = client_of(site)
    job = client.submit(*files(), api_name="/describe")
    caption, nouns = job.result(timeout=600)
    texts = [text for text, _ in job.outputs()]
    assert nouns == "" and caption and texts[-1] == caption
    assert len(texts) > 1 and all(caption.startswith(text[:10]) for text in texts)


def test_a_caption_comes_from_outside_with_its_nouns(site):
    text = "A star lies on the grass."
    client, given = client_of(site), files()
    site.captions.script = [answer(json.dumps({"description": text, "nouns": ["star", "grass"]}))]
    assert ask(client, "ask", given=given) == (text, "star, grass")
    figure, *_, nouns = ask(client, "ground", text, "star, grass", given=given)
    assert "star" in figure and nouns == "star, grass"
    for typed, kept in (("star, grass", ""), ("the wall", "the wall")):  # of another caption; own
        assert ask(client, "ground", "There is the wall.", typed, given=given)[-1] == kept
    site.captions.script = [status(401, b'{"error": {"message": "at http://inside/"}}')]
    message = refusal(client, "ask", given=given)
    assert "does not answer now" in message and "inside" not in message


def test_masks_are_found_where_none_were_uploaded(site, monkeypatch):
    client, picture = client_of(site), files()[0]
    assert ask(client, "describe", given=(picture, None))[0]  # needs no masks
    refused = refusal(client, "refer", "the wall", given=(picture, None))
    assert "no masks yet" in refused and "tools/app.py --segmenter transformers:facebook" in refused
    ids = np.zeros((96, 96), np.int32)
    finder = SimpleNamespace(segment=lambda image: EntityMap.from_id_image(ids))
    monkeypatch.setattr(site.desk, "finder", finder)
    other = (files(SCENES / "000000500016.png")[0], None)
    assert "found no entities" in refusal(client, "refer", "the wall", given=other)
    ids[:40], ids[60:] = 1, 2
    assert "2 entities" in ask(client, "refer", "the wall", given=other)[1]


def test_a_segmenter_at_hand_is_offered_and_loaded_when_it_is_needed(tmp_path, monkeypatch, capsys):
    ids = np.repeat(np.int32([[1, 2]]), 48, axis=1).repeat(96, axis=0)
    loaded = mock.Mock(
        return_value=SimpleNamespace(segment=lambda image: EntityMap.from_id_image(ids))
    )
    monkeypatch.setattr("gella.segmenters.from_transformers.at_hand", lambda: ["sam:models/sam"])
    monkeypatch.setattr("gella.segmenters.segmenter.load_segmenter", loaded)
    monkeypatch.setattr("gella.predictor.GellaPredictor.from_config", mock.Mock())
    desk = app.make_desk(app.parse_args([]), tmp_path)
    assert "sam:models/sam finds them" in capsys.readouterr().out and not loaded.called
    image = np.zeros((96, 96, 3), np.uint8)
    assert [desk.finder.segment(image).num_entities for _ in range(2)] == [2, 2]
    assert loaded.call_count == 1
    assert app.make_desk(app.parse_args(["--segmenter", ""]), tmp_path).finder is None


def test_a_photograph_is_turned_as_its_masks_are(site, mask_files, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # upright it is 60 pixels wide, and its masks are 90
    Image.new("RGB", (90, 60)).save(tmp_path / "turned.jpg", exif=exif)
    given = files(tmp_path / "turned.jpg", mask_files / "grey.png")
    assert "<svg" in ask(client_of(site), "ground", CAPTION, "", given=given)[0]


def test_what_is_wrong_gives_a_message_and_the_page_lives_on(
    site, mask_files, tmp_path, monkeypatch
):
    client, given = client_of(site), files()
    long = "x" * 290
    assert refusal(client, "ground", long, "", given=given).count("x") < 100  # not pasted whole
    for question, texts, words in (
        ("ground", ("  ", ""), "The caption is empty"),
        ("ground", ("x" * 301, ""), "301 characters; at most 300"),
        ("ground", (CAPTION, "a," * 140 + "a" * 60), "340 characters"),
        ("refer", ("",), "The expression is empty"),
        ("panoptic", (" , ",), "no categories"),
        ("extract", ("",), "The caption is empty"),
    ):
        assert words in refusal(client, question, *texts, given=given)
    (tmp_path / "video.png").write_bytes(b"\0\0\0\x20ftypisom")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    save(tmp_path / "wide.png", np.zeros((300, 400), np.uint8))
    bomb = write_zip_bomb(tmp_path / "bomb.npz", 40)
    for picture, masks, words in (
        (mask_files / "text.png", MASKS, "text.png is no picture"),
        (tmp_path / "script.png", MASKS, "script.png is no picture"),
        (tmp_path / "video.png", MASKS, "video.png is a video"),
        (mask_files / "huge.png", MASKS, "huge.png is too large"),
        (tmp_path / "wide.png", MASKS, "400x300 = 120000 pixels are more than the 100000"),
        (SCENE, mask_files / "text.png", "text.png: no picture"),
        (SCENE, bomb, "unpacks to"),
        (SCENE, mask_files / "huge.png", "too large|20000x20000"),
        (SCENE, mask_files / "other.png", "50.*96"),
    ):
        message = refusal(client, "ground", CAPTION, "", given=files(picture, masks))
        assert re.search(words, message) and str(site.folder) not in message, message
    assert "no picture yet" in refusal(client, "ground", CAPTION, "", given=(None, None))
    with monkeypatch.context() as patch:
        patch.setattr(site.desk.predictor, "refer", lambda *_, **__: 1 / 0)
        message = refusal(client, "refer", "the wall", given=given)
    assert "Something went wrong" in message and "zero" not in message
    caption = "<script>alert(1)</script> the wall <img src=x onerror=alert(2)>"
    figure = ask(client, "ground", caption, "the wall, <img src=x onerror=alert(2)>")[0]
    assert "<script" not in figure and "<img" not in figure and "&lt;script&gt;" in figure


def fetched(site: Served, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"{site.address}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def upload(site: Served, name: str, data: bytes) -> tuple[int, str]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = head.encode() + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return fetched(site, "gradio_api/upload", body, **kind)


def test_uploads_are_bounded_and_their_names_lead_nowhere(site):
    for name in ("../../etc/x.png", "/etc/x.png", "..\\..\\x.png", "a\x00b.png"):
        code, text = upload(site, name, SCENE.read_bytes())
        if code == 200:
            path = Path(json.loads(text)[0]).resolve()
            assert path.parent.parent == site.folder  # one folder per content
    assert not Path("/etc/x.png").exists()
    code, text = upload(site, "x.png", bytes(1_000_001))
    assert code == 413 and "1000000" in text
    code, text = upload(site, "x.png", bytes(2_200_000))
    assert code == 413 and "too large" in text


def test_no_other_file_is_served_or_read(site):
    code, text = fetched(site, "")
    assert code == 200 and "GELLA" in text
    for path in ("/etc/hostname", ROOT / "setup.py", SCENES / "README.md", f"{site.folder}/../x"):
        assert fetched(site, f"gradio_api/file={path}")[0] in (403, 404), path
    assert fetched(site, "gradio_api/file=http://127.0.0.1:1/x")[0] == 403
    upload(site, "x.png", SCENE.read_bytes())
    inside = next(site.folder.rglob("*.png"))
    assert fetched(site, f"gradio_api/file={inside}")[0] == 200
    stolen = {"path": str(ROOT / "docs" / "images" / "grounding.png")}
    with pytest.raises((gradio_client.exceptions.AppError, ValueError)):  # it was not uploaded
        ask(
            client_of(site),
            *("ground", CAPTION, ""),
            given=({**stolen, "meta": {"_type": "gradio.FileData"}}, files()[1]),
        )
    assert fetched(site, "")[0] == 200


def test_twenty_at_once_are_all_answered_in_order(site):
    given, clients = files(), [client_of(site) for _ in range(4)]
    captions = [f"There is the wall and {k} stars." for k in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = pool.map(
            lambda k: ask(clients[k % 4], "ground", captions[k], "the wall", given=given),
            range(20),
        )
    for k, answered in enumerate(answers):
        assert f"and {k} stars" in answered[0]


def test_pictures_are_kept_for_a_while_and_not_too_many(monkeypatch):
    monkeypatch.setattr(app_page, "IDLE", 5.0)
    with served("--queue", "2", "--sessions", "1") as page:
        given, (one, two) = files(), (client_of(page) for _ in range(2))
        for client, count in ((one, 1), (one, 1), (two, 2), (one, 3)):
            ask(client, "extract", CAPTION, given=given)
            assert page.encoded.call_count == count  # the newer visitor took the older one's place
        time.sleep(8)
        ask(one, "extract", CAPTION, given=given)
        assert page.encoded.call_count == 4
        slow, refer = threading.Event(), page.desk.predictor.refer

        def waiting(*args, **options):
            slow.wait(60)
            return refer(*args, **options)

        page.desk.predictor.refer = waiting

        def call(client):
            try:
                return ask(client, "refer", "the wall", given=given)[0]
            except Exception as error:
                slow.set()
                return f"{type(error).__name__}: {error}"

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(call, [one, two] * 10))
        refused = [text for text in answers if "Queue is full" in text or "busy" in text]
        answered = [text for text in answers if "the wall" in text]
        assert refused and answered and len(refused) + len(answered) == 20, answers
        assert "the wall" in call(one)


# -- the page in a browser: Chromium without a window, driven as a visitor would -------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="driving a browser needs playwright (pip install -e '.[dev]')"
    )
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH (Debian: chromium)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def visit(site: Served, browser: Any, width: int = 1280) -> Iterator[Any]:
    """A new visitor's page; afterwards: nothing was asked of others, no script of a text ran."""
    context = browser.new_context(viewport={"width": width, "height": 900})
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
    yield page
    context.close()
    assert page.dialogs == [] and page.failures == []
    assert all(url.startswith((site.address, "data:", "blob:")) for url in page.asked)


@pytest.fixture
def page(site, browser):
    with visit(site, browser) as opened:
        yield opened


def give(page: Any, picture: Path = SCENE, masks: Path = MASKS, says: str = "encoded") -> None:
    page.set_input_files("#picture input[type=file]", picture)
    page.wait_for_selector("#picture img")
    page.set_input_files("#masks input[type=file]", masks)
    wait_for_note(page, says)


def wait_for_note(page: Any, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('#note').innerText.includes(words)", arg=words
    )


def wait_for_caption(page: Any, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('#caption textarea').value.includes(words)", arg=words
    )


def wait_until_written(page: Any) -> None:
    """Wait for the end of a description; a click before it asks for no other one."""
    page.wait_for_selector("#caption [data-testid=status-tracker].hide", state="attached")


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


def test_a_visitor_uploads_grounds_edits_and_downloads(page, site):
    before = site.encoded.call_count
    give(page, says="96 x 96 pixels, 10 entities; encoded")
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
    assert np.asarray(Image.open(saved["png"])).shape[1] >= 96
    nouns = page.eval_on_selector_all(
        "#figure .caption [data-noun]", "all => all.map(n => n.dataset.entities)"
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
    assert site.encoded.call_count == before + 1
    evil = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} <script>alert(3)</script> the wall"
    ground(page, evil, "the wall, <b>bold</b>, ${alert(4)}")
    assert evil[:40] in page.inner_text("#figure .caption")
    assert page.query_selector("#figure img, #figure script, #figure b") is None


def test_the_examples_answer_all_tasks(page, site):
    before = site.encoded.call_count
    page.click("#examples button >> nth=0")
    wait_for_note(page, "encoded")
    first = json.loads((SCENES / "captions.jsonl").read_text().splitlines()[0])
    assert page.input_value("#caption textarea") == first["caption"]
    page.click("#describe")
    page.wait_for_function(
        f"document.querySelector('#caption textarea').value !== {json.dumps(first['caption'])}"
    )
    wait_until_written(page)
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
    assert site.encoded.call_count == before + 1


def test_wrong_input_gives_a_message_and_the_page_lives_on(
    page, site, mask_files, tmp_path, monkeypatch
):
    page.click("#ground")
    assert "no picture yet" in message(page)
    give(page, masks=mask_files / "text.png", says="text.png")
    page.fill("#caption textarea", CAPTION)
    page.click("#ground")
    assert "text.png" in message(page)
    (tmp_path / "large.png").write_bytes(bytes(1_500_000))
    page.click("#masks [aria-label='Clear']")
    page.set_input_files("#masks input[type=file]", tmp_path / "large.png")
    assert re.search("size|large", message(page), re.IGNORECASE)
    page.set_input_files("#masks input[type=file]", MASKS)
    wait_for_note(page, "encoded")
    ground(page, CAPTION)
    evil = 'no noun in "<img src=x onerror=alert(1)> <b>bold</b>"'
    monkeypatch.setattr(site.desk.predictor, "ground", mock.Mock(side_effect=ValueError(evil)))
    page.fill("#caption textarea", CAPTION)
    page.click("#ground")
    assert message(page) == evil  # as text


def test_answers_are_stopped_and_clicks_meanwhile_count(page, site, monkeypatch):
    ended, going, ground_now = threading.Event(), threading.Event(), site.desk.predictor.ground

    def endless(*, on_text, **_):
        try:
            for k in range(100_000):
                on_text(f"word {k}")
                time.sleep(0.02)
        finally:
            ended.set()
        return "the end"

    def slowly(*args, **options):
        going.set()
        time.sleep(1)
        return ground_now(*args, **options)

    monkeypatch.setattr(site.desk.predictor, "describe", endless)
    monkeypatch.setattr(site.desk.predictor, "ground", slowly)
    give(page)
    page.click("#describe")
    page.wait_for_function("document.querySelector('#caption textarea').value.includes('word')")
    first = page.input_value("#caption textarea")
    page.wait_for_function(f"document.querySelector('#caption textarea').value !== '{first}'")
    assert not ended.is_set()  # it is shown while it is written
    page.click("#stop")
    assert ended.wait(60)
    wait_until_written(page)
    page.fill("#caption textarea", CAPTION)
    page.click("#ground")
    assert going.wait(60)
    ground(page, "There is the wall.", "the wall")


def test_the_result_has_the_column_its_scores_a_threshold_and_the_original(page, site):
    before = site.encoded.call_count
    page.click("#examples button >> nth=0")
    wait_for_note(page, "encoded")
    ground(page, page.input_value("#caption textarea"), "the sand, three purple rings")
    column, drawn = (page.locator(f"#figure{part}").bounding_box() for part in ("", " svg"))
    assert drawn["width"] > 0.9 * column["width"]
    entities = "#figure [data-noun='1']"
    assert page.get_attribute(entities, "data-entities").split() == ["2", "3", "4"]
    assert "three purple rings: 2 (0." in page.inner_text("#figure ul").replace(
        "\u2068", ""
    ).replace("\u2069", "")
    for threshold, count in (("1", 1), ("0", 7), ("0.5", 3)):
        page.fill("#threshold input[type=number]", threshold)
        page.press("#threshold input[type=number]", "Enter")
        page.wait_for_function(
            f"document.querySelector(\"{entities}\")?.dataset.entities.split(' ').length == {count}"
        )
    assert site.encoded.call_count == before + 1
    page.get_by_role("button", name="Original").click()
    assert not page.locator("#figure path").first.is_visible()
    page.get_by_role("button", name="Zoom").click()
    assert page.locator("#figure svg").bounding_box()["width"] > 1.9 * drawn["width"]


def test_no_result_stays_under_an_error_or_another_task(page):
    give(page)
    gone = "() => !document.querySelector('#figure [data-noun]')"
    for name in ("Referring", "Panoptic", "Caption"):
        page.click("button[role=tab] >> text=Caption")
        ground(page, CAPTION)
        if name != "Caption":
            page.click(f"button[role=tab] >> text={name}")
            page.wait_for_function(gone)
            page.wait_for_selector("#figure [data-entity]")  # the picture with its masks is there
            at = page.input_value("#threshold input[type=number]")
            assert float(at) == (0 if name == "Panoptic" else 0.61)  # of the released config
    page.fill("#caption textarea", " ")
    page.click("#ground")
    assert "caption is empty" in message(page)
    page.wait_for_function(gone)
    assert "caption is empty" in page.inner_text("#note")
    assert page.is_disabled("#get-json")
    ground(page, CAPTION)
    page.click("#picture [aria-label='Remove Image']")
    page.wait_for_function(gone)


def test_a_description_keeps_the_caption_one_click_away(page, site, monkeypatch):
    lengths = iter((5, 100_000, 100_000))

    def slowly(*, on_text, **_):
        for k in range(next(lengths)):
            on_text(f"A sentence. Word {k}")
            time.sleep(0.02)
        return "The end."

    monkeypatch.setattr(site.desk.predictor, "describe", slowly)
    give(page)
    page.fill("#caption textarea", "My own words.")
    page.click("#describe")
    wait_for_caption(page, "The end.")
    wait_until_written(page)
    page.click("#describe")  # the second description takes the first one's place
    wait_for_caption(page, "Word")
    page.click("#describe")  # while it is written
    page.click("#back")
    wait_for_caption(page, "My own words.")
    page.wait_for_timeout(500)  # no late word of what was ended
    assert page.input_value("#caption textarea") == "My own words."


def test_an_example_ends_a_description(page, site, monkeypatch):
    def slowly(*, on_text, **_):
        for k in range(100_000):
            on_text(f"A sentence. Word {k}")
            time.sleep(0.02)

    monkeypatch.setattr(site.desk.predictor, "describe", slowly)
    give(page)
    page.click("#describe")
    wait_for_caption(page, "Word")
    page.click("#examples button >> nth=0")
    wait_for_caption(page, "Here there is the sand")
    page.wait_for_timeout(500)
    assert "Word" not in page.input_value("#caption textarea")


def test_a_broken_picture_is_refused_when_it_is_uploaded(page, tmp_path):
    cut, video = tmp_path / "cut.png", tmp_path / "video.png"
    cut.write_bytes(SCENE.read_bytes()[:-300])
    video.write_bytes(b"\0\0\0\x20ftypisom")
    for picture, words in ((cut, "cut.png is truncated"), (video, "video.png is a video")):
        page.set_input_files("#picture input[type=file]", picture)
        wait_for_note(page, words)
        page.click("#picture [aria-label='Remove Image']")
        wait_for_note(page, "Still to come: a picture")


def test_old_files_go_and_the_examples_stay(page, site):
    from gradio.route_utils import delete_files_created_by_app

    originals = sorted(SCENES.iterdir())
    page.click("#examples button >> nth=0")
    wait_for_note(page, "encoded")
    shown = page.eval_on_selector_all("#examples img", "all => all.map(image => image.src)")
    copies = list(site.folder.glob(f"*/{Path(app.read_examples(SCENES)[0].masks).name}"))
    delete_files_created_by_app(site.blocks, 0)  # as `delete_cache` does, of any age
    assert copies and not any(copy.exists() for copy in copies)
    assert sorted(SCENES.iterdir()) == originals
    for address in shown:
        assert fetched(site, address.removeprefix(site.address))[0] == 200


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_buttons_have_names_and_fingers_meet_them_and_examples_are_in_sight(site, browser, width):
    with visit(site, browser, width) as page:
        examples = page.locator("#examples").bounding_box()
        assert examples["y"] + examples["height"] < 700
        assert page.get_attribute("#caption textarea", "placeholder").startswith("Here there is")
        assert "no model for photographs" in page.inner_text("body")
        page.click("#examples button >> nth=0")
        wait_for_note(page, "encoded")
        ground(page, page.input_value("#caption textarea"))
        buttons = page.get_by_role("button").or_(page.get_by_role("tab")).all()
        shown = [b for b in buttons if b.is_visible() and not b.get_attribute("data-noun")]
        assert len(shown) > 15
        for button in shown:
            box = button.bounding_box()
            name = button.get_attribute("aria-label") or button.inner_text().strip()
            assert name and "." not in name, button.evaluate("b => b.outerHTML")
            if width < 1280 and box["width"] > 1:
                assert min(box["width"], box["height"]) >= 43.5, name
        for name in ("Caption", "Nouns, separated by commas"):
            assert page.get_by_role("textbox", name=name).count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        column, drawn, words, number = (
            page.locator(place).first.bounding_box()
            for place in ("#figure", "#figure svg", "#threshold label", "#threshold input")
        )
        assert drawn["width"] > 0.9 * column["width"]
        assert words["x"] + words["width"] < number["x"]


def test_two_visitors_see_their_own_pictures(site, browser):
    with visit(site, browser) as first:
        with visit(site, browser, width=390) as second:
            give(first)
            assert "Still to come: a picture" in second.inner_text("#note")
            second.click("#ground")
            assert "no picture yet" in message(second)
            second.click("#examples button >> nth=0")
            wait_for_note(second, "000000500016: 96 x 96 pixels, 7 entities; encoded")
            ground(second, "There is the sand.", "the sand")
            assert second.evaluate("document.documentElement.scrollWidth") <= 390  # a phone
            ground(first, CAPTION)
            assert "000000500002" in first.inner_text("#note")
            second.wait_for_selector("#get-json:not([disabled])")
            results, kept = site.desk.folder, len(site.blocks.state_holder.session_data)
            folders = len(list(results.iterdir()))
        for _ in range(600):  # the visitor who left is forgotten
            if len(list(results.iterdir())) == folders - 1:
                break
            time.sleep(0.1)
        assert len(list(results.iterdir())) == folders - 1
        assert len(site.blocks.state_holder.session_data) == kept - 1


# -- the command -----------------------------------------------------------------------------------


def test_wrong_arguments_are_one_line(capsys):
    for argv, words in (
        (["--queue", "0"], "--queue is 0"),
        (["--max-upload-mb", "nan"], "--max-upload-mb is nan"),
        (["--port", "70000"], "--port is 70000"),
        (["--captioner-model", "m"], "--captioner-model needs --captioner"),
        (["--nonsense"], "not known"),
    ):
        with pytest.raises(SystemExit) as stop:
            app.parse_args(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and words in err
        assert len(err.splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        app.parse_args(["--help"])
    assert stop.value.code == 0 and "python tools/app.py" in capsys.readouterr().out
    assert app.main(["--host", "203.0.113.1"]) == 2  # of no machine
    assert "choose another address" in capsys.readouterr().err
    assert app.main(["--config-file", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: config none.yaml does not exist")
    for host, own in (("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)):
        assert is_loopback(host) is own


def test_examples_that_are_missing_or_wrong_are_named(tmp_path):
    assert app.read_examples(tmp_path) == []
    examples = app.read_examples(SCENES)
    assert len(examples) > 2 and all(e.expression and e.categories for e in examples)
    line = json.dumps({"image": "a.png", "masks": "b.png", "caption": "c"})
    (tmp_path / "captions.jsonl").write_text(line)
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist"):
        app.read_examples(tmp_path)
    for wrong in ('{"image": 1}', '{"image": "a.png", "caption": "c"}'):
        (tmp_path / "captions.jsonl").write_text(f"{wrong}\n{line}")
        with pytest.raises(ValueError, match="line 1"):
            app.read_examples(tmp_path)


def test_the_command_serves_until_it_is_stopped_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stop, said = threading.Event(), ""
    args = app.parse_args(["--port", str(port), "--weights", ""])
    with mock.patch.dict(os.environ), ThreadPoolExecutor(1) as pool:
        run = pool.submit(app.run, args, stop)
        while "Ctrl-C" not in said and not run.done():
            said += capsys.readouterr().out
            time.sleep(0.1)
        try:
            assert f"http://127.0.0.1:{port}/" in said and "the model is untrained" in said
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=600) as answer:
                assert b"the answers mean nothing" in answer.read()
            assert list(tmp_path.glob("gella_app_*"))
            with pytest.raises(OSError, match=f"port {port}"):
                app.check_address("127.0.0.1", port)
        finally:
            stop.set()
        run.result()
    assert "stopped" in capsys.readouterr().out and not list(tmp_path.glob("gella_app_*"))

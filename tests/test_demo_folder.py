"""The demo over folders: one page, resume, failures among good ones, hostile names, Ctrl-C."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import demo
import demo_run
import numpy as np
import pytest
from caption_server import KEY, answer, chat_server, status
from PIL import Image
from tiny_gella import make_model

from gella.entities import EntityMap, id_to_rgb
from gella.grounding import Grounding
from gella.predictor import GellaPredictor
from gella.segmenters.segmenter import Segmenter

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
CAPTION = "A red circle lies on the sand."
SCRIPT = "</p><script>alert(1)</script><img src=x onerror=alert(1)> & \"quotes' </svg>"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open not in ("script", "style"):
            self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        """The values of an attribute of all tags of a kind that have it."""
        return [a[name] or "" for t, a in self.tags if t == tag and name in a]


class Fake:
    """A predictor that needs no model: every noun, or the word "circle", names entity 1."""

    asked: list[tuple[str, str, tuple[int, ...]]] = []
    during: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, cfg: Any, config_file: str = "") -> None:
        self.cfg = cfg

    def predict_many(self, requests: list[Any], *, batch_size: int = 8) -> list[Any]:
        assert len(requests) <= batch_size
        type(self).during()
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        size = request.image.shape[:2]
        self.asked.append((request.task, request.text, size))
        if request.text == "raise":
            return ValueError("this caption is not liked")
        if request.task == "describe":
            return CAPTION
        if request.task == "extract":
            return ["A red circle", "the sand"]
        nouns = request.nouns or ["circle"]
        entities: EntityMap = request.entities
        mask = entities.ids == 1
        starts = [request.text.find(noun) for noun in nouns]
        ids = entities.segment_ids[:1]
        phrases = [
            {"phrase": n, "start": s, "end": s + len(n), "entity_ids": ids, "scores": [0.9],
             "mask": mask}
            for n, s in zip(nouns, starts)
        ]  # fmt: skip
        colormap = np.zeros((8, 8, 3), np.uint8)
        return Grounding(
            request.image, request.text, entities, phrases, colormap, request.task, weights="w"
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """The demo with a fake predictor, whose questions are noted."""
    monkeypatch.setattr(demo, "GellaPredictor", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    return Fake


def scene(folder: Path, name: str, seed: int = 0, masks: bool = True) -> None:
    """A picture of 40 x 30 pixels with two entities, its masks beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    ids = np.ones((30, 40), np.int32)
    ids[5:15, 5:25] = 2
    if masks:
        Image.fromarray(id_to_rgb(ids)).save(path.with_name(f"{path.stem}_masks.png"))


@pytest.fixture
def run(tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Call the tool on tmp_path/in with output tmp_path/out and more arguments."""

    def call(*more: Any, input: str = "in", opts: tuple[Any, ...] = ()) -> tuple[int, str, str]:
        argv = ["--config-file", TINY, "--weights", "", "--input", tmp_path / input]
        argv += ["--output", tmp_path / "out", *more, "--opts", *opts]
        try:
            code = demo.main([str(part) for part in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """The folder tmp_path/in with a.png, b.png and sub/c.jpg."""
    for seed, name in enumerate(("a.png", "b.png", "sub/c.png")):
        scene(tmp_path / "in", name, seed)
    return tmp_path / "in"


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def tokens(tokenizer_dir: Path) -> tuple[Any, ...]:
    sizes = ("MODEL.LANGUAGE.MAX_POSITIONS", 1024, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 8)
    return ("MODEL.LANGUAGE.TOKENIZER", tokenizer_dir, *sizes)


def test_a_folder_becomes_one_page(run: Any, three: Path, tokenizer_dir: Path) -> None:
    lines = [
        {"image": "c", "caption": "The sand and a star.", "nouns": ["The sand", "a star"]},
        {"image": "a.png", "caption": CAPTION, "nouns": ["A red circle", "the sand"]},
        {"image": "a.png", "caption": "One circle.", "nouns": ["One circle"]},
    ]
    file = three.parent / "c.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run("--captions", file, opts=tokens(tokenizer_dir))
    assert code == 0, err
    assert "1 of 3 pictures have no caption" in out and "next: open" in out
    out_dir = three.parent / "out"
    stems = ("a", "a_2", "sub__c")
    ends = ("{}.json", "{}_grounding.png", "{}_colormap.png", "page/{}.html", "page/{}.png")
    assert tree(out_dir) == {"index.html", *(end.format(s) for s in stems for end in ends)}
    html = Page(out_dir / "index.html")
    figures = [a["id"] for t, a in html.tags if t == "figure"]
    assert len(figures) == len(set(figures)) == 3
    assert html.text.index(CAPTION.split(" lies")[1]) < html.text.index("One circle")
    assert html.text.count("a.png") == 2 and html.text.count("sub/c.png") == 1
    places = [unquote(place) for place in html.all("a", "href") + html.all("image", "href")]
    assert len(places) == 12 and all((out_dir / place).is_file() for place in places)
    nouns = [a for t, a in html.tags if "data-noun" in a]
    assert [a["data-noun"] for a in nouns] == ["0", "1", "0", "0", "1"]
    content = json.loads((out_dir / "sub__c.json").read_text())
    assert content["caption"] == "The sand and a star." and content["height"] == 30
    assert [noun["noun"] for noun in content["nouns"]] == ["The sand", "a star"]


def test_a_second_run_does_only_what_changed(run: Any, three: Path, fake: type[Fake]) -> None:
    def asked(*more: Any, **options: Any) -> int:
        fake.asked.clear()
        code, _, err = run("--caption", CAPTION, *more, **options)
        assert code == 0, err
        assert len(Page(three.parent / "out" / "index.html").all("figure", "id")) == 3
        return len(fake.asked)

    out_dir = three.parent / "out"
    assert asked() == 3
    before = {path: (out_dir / path).read_bytes() for path in tree(out_dir)}
    assert asked() == 0
    assert {path: (out_dir / path).read_bytes() for path in tree(out_dir)} == before
    scene(three, "a.png", 9)
    assert asked() == 1 and fake.asked[0][0] == "ground"
    ids = np.ones((30, 40), np.int32)
    ids[3:15, 5:25] = 2
    Image.fromarray(id_to_rgb(ids)).save(three / "b_masks.png")
    assert asked() == 1
    (out_dir / "b_colormap.png").unlink()
    assert asked() == 1
    (out_dir / "a.json").write_text((out_dir / "a.json").read_text()[:40])
    assert asked() == 1
    assert asked("--nouns", "the sand") == 3
    assert asked("--nouns", "the sand", opts=("INPUT.GELLA.COLORS", "location")) == 3
    assert asked("--nouns", "the sand", "--overwrite", opts=("INPUT.GELLA.COLORS", "location")) == 3
    assert asked("--nouns", "the sand", opts=("INPUT.GELLA.COLORS", "location")) == 0


def test_other_weights_do_all_again(run: Any, three: Path, fake: type[Fake]) -> None:
    weights = three.parent / "w.pth"
    weights.write_bytes(b"one")
    arguments = ("--caption", CAPTION, "--weights", weights)
    run(*arguments)
    run(*arguments)
    assert len(fake.asked) == 3
    weights.write_bytes(b"other")
    run(*arguments)
    assert len(fake.asked) == 6


def test_bad_pictures_among_good_ones(run: Any, three: Path, fake: type[Fake]) -> None:
    out_dir = three.parent / "out"
    (three / "bad.png").write_bytes(b"no picture")
    (three / "bad_masks.png").write_bytes((three / "a_masks.png").read_bytes())
    cut = (three / "a.png").read_bytes()[:500]
    (three / "cut.png").write_bytes(cut)
    (three / "cut_masks.png").write_bytes((three / "a_masks.png").read_bytes())
    scene(three, "unmasked.png", 5, masks=False)
    scene(three, "nan.png", 6, masks=False)
    np.savez(three / "nan_masks.npz", masks=np.full((1, 30, 40), np.nan))
    huge = Image.new("1", (20000, 20000))
    huge.save(three / "huge.png")
    (three / "huge_masks.png").write_bytes((three / "a_masks.png").read_bytes())
    code, out, err = run("--caption", CAPTION)
    assert code == 1 and "3 done, 5 failed" in out and "Traceback" not in err
    failures = json.loads((out_dir / "failures.json").read_text())
    reasons = {item["image"]: item["reason"] for item in failures}
    assert list(reasons) == ["bad.png", "cut.png", "huge.png", "nan.png", "unmasked.png"]
    assert "no picture" in reasons["bad.png"] and "truncated" in reasons["cut.png"]
    assert "too large to open" in reasons["huge.png"] and "no masks" in reasons["unmasked.png"]
    assert "nan_masks.npz" in reasons["nan.png"]
    html = Page(out_dir / "index.html")
    assert len(html.all("figure", "id")) == 3 and "Failed: 5" in html.text
    assert reasons["bad.png"] in html.text
    assert f"failed: cut.png: {reasons['cut.png']}" in out and "next: mend these" in out
    for name in ("bad", "cut", "huge", "nan", "unmasked"):
        scene(three, f"{name}.png", 7)
    (three / "nan_masks.npz").unlink()
    fake.asked.clear()
    code, out, _ = run("--caption", CAPTION)
    assert code == 0 and len(fake.asked) == 5 and "3 of 8 were done before" in out
    assert not (out_dir / "failures.json").exists()
    assert "Failed" not in Page(out_dir / "index.html").text


def test_a_caption_that_the_model_refuses_fails_alone(
    run: Any, three: Path, fake: type[Fake]
) -> None:
    (three.parent / "c.txt").write_text(f"a.png\t{CAPTION}\nb.png\traise\n")
    code, out, _ = run("--captions", three.parent / "c.txt")
    assert code == 1 and "failed: b.png: this caption is not liked" in out
    (three / "c.txt").write_text("raise")
    code, _, err = run("--caption", "raise", input="in/a.png")  # alone it is an error
    assert code == 2 and err == "error: this caption is not liked\n"


def test_hostile_names_and_captions(run: Any, tmp_path: Path, fake: type[Fake]) -> None:
    names = ["<img src=x onerror=alert(1)>\"'&.png", "n\nl\x1b[31m.png", "é図%23#?.png", "-x.png"]
    names += ["x.png", "X.PNG", "sub/x.png", "failures.png", "index.png"]
    for seed, name in enumerate(names):
        scene(tmp_path / "in", name, seed)
    scene(tmp_path / "in", "x.jpg", 40, masks=False)
    lines = [{"image": name, "caption": f"{k} {SCRIPT}"} for k, name in enumerate(names)]
    lines += [{"image": "x.jpg", "caption": SCRIPT + "\u202e\u2028", "nouns": ["<b>", SCRIPT]}]
    lines += [{"image": name, "caption": "out"} for name in ("../../x.png", "/etc/passwd", "..")]
    lines += [{"image": "x.png", "caption": "\ud83d", "masks": "../../../etc/passwd"}]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = tree(tmp_path)
    code, out, err = run("--captions", file)
    assert code == 1, err  # the masks /etc/passwd
    assert out.count("is no picture of --input") == 3 and "\x1b" not in out + err
    new = tree(tmp_path) - before
    assert all(path.startswith("out/") for path in new)
    assert len([path for path in new if path.endswith(".json")]) == len(names) + 2
    assert {path.count("/") for path in new} == {1, 2}
    html = Page(tmp_path / "out" / "index.html")
    tags = [tag for tag, _ in html.tags]
    assert tags.count("script") == tags.count("b") == 1 and "img" not in tags  # <b>: the failure
    assert not [name for _, a in html.tags for name in a if name.startswith("on")]
    for k, name in enumerate(names):
        assert f"{k} {SCRIPT}" in html.text and name in html.text
    places = html.all("a", "href") + html.all("image", "href")
    assert all((tmp_path / "out" / unquote(place)).is_file() for place in places)
    assert len(set(html.all("image", "href"))) == len(names) + 1
    contents = [json.loads((tmp_path / path).read_text()) for path in new if path[-5:] == ".json"]
    captions = [item["caption"] for item in contents if isinstance(item, dict)]
    assert sorted(captions)[: len(names)] == [f"{k} {SCRIPT}" for k in range(len(names))]


def test_ctrl_c_ends_after_the_batch_and_the_next_run_goes_on(
    run: Any, tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(6):
        scene(tmp_path / "in", f"{k}.png", k)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(fake, "during", lambda: signal.raise_signal(signal.SIGINT))
    arguments = ("--caption", CAPTION, "--batch-size", "2")
    code, out, err = run(*arguments)
    assert code == 130 and "2 done, 0 failed" in out and "stopping after" in err
    assert "next: the same command goes on" in out
    html = Page(tmp_path / "out" / "index.html")
    assert len(html.all("figure", "id")) == 2 and "2 of 6 done" in html.text
    monkeypatch.setattr(fake, "during", lambda: signal.raise_signal(signal.SIGTERM))
    code, out, _ = run(*arguments)
    assert code == 143 and "2 of 6 were done before" in out and len(fake.asked) == 4

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fake, "during", twice)
    code, out, err = run(*arguments)
    assert code == 130 and "the same command goes on" in err and len(fake.asked) == 4
    assert "4 of 6 done" in Page(tmp_path / "out" / "index.html").text
    monkeypatch.setattr(fake, "during", lambda: None)
    assert run(*arguments)[0] == 0 and len(fake.asked) == 6
    assert handlers == [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]


def test_the_page_is_there_while_the_run_goes_on(
    run: Any, three: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    page = three.parent / "out" / "index.html"
    monkeypatch.setattr(demo_run, "_REFRESH", 0.0)
    monkeypatch.setattr(
        fake, "during", lambda: seen.append(page.exists() and Page(page).text.count("lies on"))
    )
    assert run("--caption", CAPTION, "--batch-size", "1")[0] == 0
    assert seen == [False, 1, 2]


def test_the_model_describes_first(run: Any, three: Path, fake: type[Fake]) -> None:
    assert run("--describe-first")[0] == 0
    assert sorted(task for task, *_ in fake.asked) == ["describe"] * 3 + ["ground"] * 3
    assert {text for task, text, _ in fake.asked if task == "ground"} == {CAPTION}
    assert json.loads((three.parent / "out" / "a.json").read_text())["caption"] == CAPTION
    assert run("--describe-first")[0] == 0 and len(fake.asked) == 6


def test_captions_of_an_endpoint(
    run: Any, three: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GELLA_API_KEY", KEY)
    out_dir = three.parent / "out"
    with chat_server() as server:
        server.script = [status(400, b'{"error": "no"}')]
        arguments = ("--captioner", server.url, "--captioner-model", "some-model")
        code, out, err = run(*arguments, "--batch-size", "1")
        assert code == 1 and "2 done, 1 failed" in out, err
        assert f"sent to {server.url}/chat/completions" in out
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
        assert run(*arguments)[0] == 0 and len(server.requests) == 4  # only what had failed
        content = json.loads((out_dir / "b.json").read_text())
        assert content["captioner"] == "some-model" and " wall" in content["caption"]
        assert [noun["noun"] for noun in content["nouns"]][1:] == ["two dogs"]
        server.default = answer("no JSON")
        code, out, _ = run(*arguments, "--overwrite")
        assert code == 1 and "none of 3 answers could be used" in out
        server.default = status(401)
        code, out, err = run(*arguments, "--overwrite")
        assert code == 2 and "check the key" in err and err.count("error: ") == 1
    for path in tree(out_dir):
        assert KEY.encode() not in (out_dir / path).read_bytes()
    code, _, err = run("--captioner", "http://127.0.0.1:9/v1")
    assert code == 2 and "needs the name of a model" in err
    code, _, err = run("--captioner", three / "absent", "--captioner-model", "x")
    assert code == 2 and "no http:// or https:// address" in err
    code, _, err = run("--captioner", three / "absent")
    assert code == 2 and "no model folder" in err


def test_masks_of_a_live_segmenter(
    run: Any, three: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halves(Segmenter):
        def predict(self, images: Any) -> Any:
            masks = np.zeros((2, 30, 40), bool)
            masks[0, :, :20] = masks[1, :2, 30:] = True
            if images[0][0, 0].tolist() == [1, 2, 3]:
                raise RuntimeError("the segmenter broke")
            return [(masks, np.array([0.5, 0.9], np.float32)) for _ in images]

    given: list[Any] = []
    monkeypatch.setattr("demo_masks.load_segmenter", lambda *a: given.append(a) or Halves())
    pixels = np.asarray(Image.open(three / "b.png")).copy()
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(three / "b.png")
    options = ("--segmenter", "sam:x", "--segmenter-option", "points_per_side=4")
    code, out, _ = run("--caption", CAPTION, *options)
    assert code == 1 and "failed: b.png: the segmenter broke" in out
    assert given == [("sam:x", None, {"points_per_side": "4"})]
    content = json.loads((three.parent / "out" / "a.json").read_text())
    assert content["num_entities"] == 2 and content["segmenter"] == "sam:x"
    run("--caption", CAPTION, *options, "--min-area", "100")
    content = json.loads((three.parent / "out" / "a.json").read_text())
    assert content["num_entities"] == 1  # not taken for done
    monkeypatch.undo()
    code, _, err = run("--caption", CAPTION, "--segmenter", "nothing:x")
    assert code == 2 and "is none of sam:PATH" in err


def test_tasks_of_a_real_model(
    run: Any, three: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perturbed(cfg: Any, config_file: str) -> GellaPredictor:
        return GellaPredictor(cfg, model=make_model(cfg), config_file=config_file)

    monkeypatch.setattr(demo, "GellaPredictor", perturbed)
    opts = tokens(tokenizer_dir)
    out_dir = three.parent / "out"

    def content(*more: Any, **options: Any) -> dict[str, Any]:
        code, out, err = run(*more, opts=opts, **options)
        assert code == 0, err
        assert len(Page(out_dir / "index.html").all("image", "href")) == 1
        return json.loads((out_dir / "a.json").read_text())

    one = {"input": "in/a.png"}
    assert content("--task", "refer", "--caption", "the circle", **one)["task"] == "refer"
    found = content("--task", "panoptic", "--categories", "sand,red star", **one)
    assert {s["category"] for s in found["segments"]} <= {"sand", "red star"}
    assert (out_dir / "a_panoptic.png").is_file()
    text = content("--task", "describe", **one)
    assert text["task"] == "describe" and text["text"]
    found = content("--task", "extract", "--caption", CAPTION, **one)
    assert found["caption"] == CAPTION and isinstance(found["nouns"], list)
    (three / "a_masks.png").unlink()  # the text does not depend on masks
    assert content("--task", "describe", **one)["text"] == text["text"]


def test_extracted_nouns_are_shown_at_their_places(run: Any, three: Path, fake: Any) -> None:
    assert run("--task", "extract", "--caption", CAPTION)[0] == 0
    nouns = json.loads((three.parent / "out" / "b.json").read_text())["nouns"]
    assert nouns[1] == {"noun": "the sand", "start": 21, "end": 29}
    html = Page(three.parent / "out" / "index.html")
    assert [tag for tag, _ in html.tags].count("mark") == 6


def test_command_lines_that_are_wrong(run: Any, three: Path) -> None:
    text = ("--caption", CAPTION)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((), "--caption is missing"),
        ((*text, "--captions", "c.txt"), "--caption and --captions exclude"),
        ((*text, "--describe-first"), "--caption and --describe-first exclude"),
        (("--describe-first", "--captioner", "x"), "exclude each other"),
        (("--task", "refer", "--describe-first"), "takes expressions"),
        (("--task", "describe", *text), "takes no captions"),
        (("--task", "panoptic"), "needs --categories"),
        ((*text, "--categories", "a"), "--task panoptic only"),
        ((*text, *text, "--nouns", "a"), "one --caption"),
        ((*text, "--captioner-model", "x"), "--captioner only"),
        ((*text, "--masks", "m", "--segmenter", "sam:x"), "--masks and --segmenter"),
        ((*text, "--panoptic-json", "m"), "--panoptic-json needs --masks"),
        ((*text, "--segmenter", "sam:x", "--segmenter-option", "a"), "no KEY=VALUE"),
        ((*text, "--batch-size", "0"), "--batch-size is 0"),
        ((*text, "--task", "dance"), "invalid choice"),
        (("--caption", " "), "the caption is empty"),
        ((*text, "--masks", three), "also the folder"),
        ((*text, "--output", three / "a.png"), "is a file"),
        (("--captions", three / "absent"), "absent do not exist"),
    ]
    for more, words in wrong:
        code, out, err = run(*more)
        assert code == 2 and words in err and err.count("\n") == 1, (more, err)
        assert err.startswith("error: ") and "done" not in out
    assert not (three.parent / "out").exists()


def test_the_released_model_is_the_default(
    three: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["--input", str(three), "--caption", CAPTION]
    config = three.parent / "config.yaml"
    monkeypatch.setattr(demo, "RELEASE", config)
    with pytest.raises(SystemExit):
        demo.parse_args(argv)
    assert "--config-file is missing" in capsys.readouterr().err
    config.write_text("")
    assert Path(demo.parse_args(argv).config_file).resolve() == config
    assert demo.parse_args([*argv, "--config-file", TINY]).config_file == TINY

"""The demo: what it reads and writes, failures in folders, resume, one line for each mistake."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import check as check_script
import numpy as np
import pytest
from caption_server import KEY, answer, chat_server, status
from detectron2.data import DatasetCatalog, MetadataCatalog
from html_reader import Reader
from PIL import Image
from pycocotools import mask as mask_utils
from tiny_gella import make_model

from gella.commands import demo
from gella.commands import demo_inputs as inputs
from gella.commands.demo_inputs import Job, assign, masks_beside, masks_from, read_captions
from gella.commands.inputs import Source, list_pictures
from gella.entities.entity_map import id_to_rgb
from gella.pictures.grounding import Grounding
from gella.predictor import GellaPredictor
from gella.predictor.many import Nouns
from gella.segmenters.segmenter import Segmenter
from gella.text.spans import located

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
CAPTION = "A red circle lies on the sand."
SCRIPT = "</p><script>alert(1)</script><img src=x onerror=alert(1)> & \"quotes' </svg>"


def page(folder: Path) -> Reader:
    """The page of the run whose input is ``folder``."""
    return Reader((folder.parent / "out" / "index.html").read_text(encoding="utf-8"))


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
        self.asked.append((request.task, request.text, request.image.shape[:2]))
        if request.text == "raise":
            return ValueError("this caption is not liked")
        if request.task == "describe":
            return CAPTION
        if request.task == "extract":
            return Nouns(located(request.text, ["A red circle", "the sand"]))
        ids, mask = request.entities.segment_ids[:1], request.entities.ids == 1
        found = {"scores": [0.9], "entity_ids": ids, "mask": mask}
        spans = [(p["text"], p["start"], p["end"]) for p in request.phrases or ()]
        for noun in [] if spans else request.nouns or ["circle"]:
            start = request.text.find(noun)
            spans.append((noun, start, start + len(noun)))
        phrases = [{"phrase": n, "start": a, "end": b, **found} for n, a, b in spans]
        given = (request.image, request.text, request.entities, phrases)
        return Grounding(*given, np.zeros((8, 8, 3), np.uint8), request.task, weights="w")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """The demo with a fake predictor, whose questions are noted."""
    monkeypatch.setattr(demo, "GellaPredictor", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    return Fake


IDS = np.ones((30, 40), np.int32)
IDS[5:15, 5:25] = 2


def scene(folder: Path, name: str, seed: int = 0, masks: bool = True) -> Path:
    """A picture of 40 x 30 pixels with two entities, its masks beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if masks:
        Image.fromarray(id_to_rgb(IDS)).save(path.with_name(f"{path.stem}_masks.png"))
    return path


@pytest.fixture
def run(tmp_path: Path, capsys: Any) -> Callable[..., tuple[str, str]]:
    """Calls the tool on tmp_path/in with output tmp_path/out and more arguments; (out, err)."""

    def call(*more: Any, input: Any = "in", opts: Any = (), code: int = 0) -> tuple[str, str]:
        argv = ["--config-file", TINY, "--weights", "", "--output", tmp_path / "out"]
        argv += ["--input", tmp_path / input] if input else []
        try:
            ended = demo.main([str(part) for part in (*argv, *more, "--opts", *opts)])
        except SystemExit as stop:
            ended = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert ended == code, out + err
        return out, err

    return call


@pytest.fixture
def refused(run: Any) -> Callable[..., None]:
    """Calls the tool, which must end with one line that holds these words."""

    def call(*more: Any, words: Any, **options: Any) -> None:
        out, err = run(*more, **options, code=2)
        lines = [line for line in err.splitlines() if line and "an answer was cut off" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        assert all(word in lines[0] for word in ([words] if isinstance(words, str) else words)), err
        assert "wrote" not in out and "done" not in out

    return call


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """The folder tmp_path/in with a.png, b.png and sub/c.png."""
    for seed, name in enumerate(("a.png", "b.png", "sub/c.png")):
        scene(tmp_path / "in", name, seed)
    return tmp_path / "in"


@pytest.fixture
def opts(tokenizer_dir: Path) -> tuple[Any, ...]:
    """Overrides that let the tiny config use the tests' tokenizer."""
    sizes = ("MODEL.LANGUAGE.MAX_POSITIONS", 1024, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 8)
    return ("MODEL.LANGUAGE.TOKENIZER", tokenizer_dir, *sizes)


def tree(folder: Path) -> set[str]:
    """Paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def json_of(folder: Path, name: str = "a") -> Any:
    return json.loads((folder.parent / "out" / f"{name}.json").read_text())


def json_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# -- one picture -----------------------------------------------------------------------------------


def test_writes_pictures_and_json(run: Any, three: Path, opts: Any) -> None:
    given = ("--caption", CAPTION, "--nouns", "A red circle,the sand")
    out, err = run(*given, input="in/a.png", opts=opts)
    folder = three.parent / "out"
    names = {"a_grounding.png", "a_colormap.png", "a.json"}
    assert tree(folder) == {*names, "index.html", "page/a.html", "page/a.png"}  # no temporary file
    assert all(f"wrote {folder / name}" in out for name in names)
    assert "untrained" in out and "next:" in out and "error" not in err
    content = json_of(three)
    known = {"config": TINY, "weights": "untrained", "task": "ground", "num_entities": 2}
    assert content.items() >= known.items()
    assert [noun["noun"] for noun in content["nouns"]] == ["A red circle", "the sand"]
    for noun in content["nouns"]:
        assert CAPTION[noun["start"] : noun["end"]] == noun["noun"]
        assert (mask_utils.decode(noun["mask"]) == np.isin(IDS, noun["entity_ids"])).all()
    picture = np.asarray(Image.open(folder / "a_grounding.png"))
    assert picture.shape[1] >= 640
    assert (picture[:20] == (160, 30, 30)).all(axis=2).mean() > 0.8  # "untrained weights"


def test_image_and_mask_mistakes(refused: Any, three: Path, fake: type[Fake]) -> None:
    masks, folder, file = three / "a_masks.png", three.parent, three.parent / "panoptic.json"
    for path in (three / "a.png", masks):
        (folder / f"cut_{path.name}").write_bytes(path.read_bytes()[:90])
    Image.fromarray(np.ones((20, 40), dtype=np.uint8)).save(folder / "small.png")
    Image.fromarray(np.zeros((30, 40), dtype=np.uint8)).save(folder / "void.png")

    def wrong(words: Any, input: str = "in/a.png", masks: Any = masks, *more: Any) -> None:
        given = ("--caption", CAPTION, "--masks", folder / masks, *more)
        refused(*given, input=input, words=words)

    wrong("nowhere.png does not exist", "nowhere.png")
    wrong("cut_a.png is truncated", "cut_a.png")
    for name, words in (
        ("nowhere.png", ["nowhere.png", "does not exist"]),
        ("cut_a_masks.png", ["cut_a_masks.png", "truncated"]),
        ("small.png", ["small.png", "40x20", "40x30"]),
        ("void.png", ["void.png", "no entity at all"]),
    ):
        wrong(words, masks=name)
    listed = '{"annotations": [{"file_name": "%s.png", "segments_info": [%s]}]}'
    for text, words in (
        (None, "panoptic.json does not exist"),
        (listed % ("other", ""), "a_masks.png"),
        *((text, "no COCO panoptic file") for text in ("[]", "{}", "{", '{"annotations": [3]}')),
        # A pixel's id that the JSON does not know.
        (listed % ("a_masks", '{"id": 1, "iscrowd": 0}'), "[2]"),
    ):
        if text is not None:
            file.write_text(text)
        wrong(words, "in/a.png", masks, "--panoptic-json", file)
    assert not (folder / "out").exists()


def test_text_mistakes(refused: Any, three: Path, opts: Any) -> None:
    for given, words in (
        (("",), "the caption is empty"),
        (("  ",), "the caption is empty"),
        ((CAPTION, "--nouns", " , "), "caption without nouns"),
        # The untrained model's answer names nothing that the caption holds.
        ((CAPTION,), ["caption without nouns", CAPTION]),
        (("a <SEG> here", "--nouns", "a"), "<SEG>"),
        ((CAPTION * 60, "--nouns", "the sand"), ["1024", "tokens"]),
    ):
        refused("--caption", *given, input="in/a.png", opts=opts, words=words)


def test_config_and_weight_mistakes(refused: Any, three: Path) -> None:
    (three / "wrong.yaml").write_text("MODEL:\n  GELA: 1\n")
    (three / "broken.pth").write_bytes(b"broken")
    for option, name, word in (
        ("--config-file", "no.yaml", "no.yaml does not exist"),
        ("--config-file", "wrong.yaml", "MODEL.GELA"),
        ("--weights", "no.pth", "no.pth"),
        ("--weights", "broken.pth", "broken.pth"),
    ):
        given = ("--caption", CAPTION, option, three / name)
        refused(*given, input="in/a.png", words=[name, word])
    refused("--caption", CAPTION, opts=("MODEL.GELA", "1"), words="MODEL.GELA")


def test_command_lines_that_are_wrong(refused: Any, three: Path) -> None:
    text = ("--caption", CAPTION)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((), "--caption is missing"),
        ((*text, "--captions", "c.txt"), "--captions: not allowed with argument --caption"),
        ((*text, "--describe-first"), "not allowed with argument --caption"),
        (("--describe-first", "--captioner", "x"), "not allowed with"),
        (("--dataset", "gella_shapes_png_val"), "not allowed with"),
        (("--task", "refer", "--describe-first"), "takes expressions"),
        (("--task", "describe", *text), "takes no captions"),
        (("--task", "panoptic"), "needs --categories"),
        ((*text, "--categories", "a"), "--task panoptic only"),
        (("--task", "extract", *text, "--exclusive"), "--task ground only"),
        ((*text, "--nouns", "a", "--extract"), "not allowed with argument --nouns"),
        ((*text, *text, "--nouns", "a"), "one --caption"),
        ((*text, "--captioner-model", "x"), "--captioner only"),
        ((*text, "--masks", "m", "--segmenter", "sam:x"), "not allowed with argument --masks"),
        ((*text, "--panoptic-json", "m"), "--panoptic-json needs --masks"),
        ((*text, "--segmenter", "sam:x", "--segmenter-option", "a"), "no KEY=VALUE"),
        ((*text, "--segmenter", "nothing:x"), "is none of sam:PATH"),
        ((*text, "--batch-size", "0"), "--batch-size is 0"),
        ((*text, "--num", "0"), "--num is 0"),
        ((*text, "--records", three), "exists; what is filled in there stays"),
        ((*text, "--records", "new", "--task", "refer"), "--records goes with --task ground"),
        ((*text, "--records", "new", "--segmenter", "sam:x"), "masks that are files"),
        ((*text, "--task", "dance"), "invalid choice"),
        ((*text, "--unknown"), "an argument is not known"),
        ((*text, "--masks", three), "also the folder"),
        ((*text, "--output", three / "a.png"), "is a file"),
        (("--captions", three / "absent"), "absent do not exist"),
        (("--captioner", "http://127.0.0.1:9/v1"), "needs the name of a model"),
        (("--captioner", three / "absent", "--captioner-model", "x"), "no http:// or https://"),
        (("--captioner", three / "absent"), "absent does not exist"),
    ]
    for more, words in wrong:
        refused(*more, words=words)
    refused(*text, input=None, words=["--input --dataset is required", "--help"])
    refused("--dataset", "gella_nothing", input=None, words=["gella_nothing", "not registered"])
    assert not (three.parent / "out").exists()


def test_help_teaches(run: Any) -> None:
    out, _ = run("--help")
    assert "--caption" in out and "python tools/demo.py --config-file" in out


def test_the_released_model_is_the_default(three, monkeypatch, capsys):
    argv = ["--input", str(three), "--caption", CAPTION]
    config = three.parent / "config.yaml"
    monkeypatch.setattr(demo, "RELEASE", config)
    with pytest.raises(SystemExit):
        demo.parse_args(argv)
    assert "--config-file is missing" in capsys.readouterr().err
    config.write_text("")
    assert Path(demo.parse_args(argv).config_file).resolve() == config
    assert demo.parse_args([*argv, "--config-file", TINY]).config_file == TINY


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trained.pth", ""])
def test_answers_become_records_to_correct(run, three, fake, monkeypatch, gella_log, weights):
    exif, stored = Image.Exif(), Image.open(three / "b.png").rotate(90, expand=True)
    exif[0x0112] = 6  # viewers turn it back, as the demo does
    stored.save(three / "b.png", exif=exif)
    (three / "bad.png").write_bytes(b"no picture")
    answer, said = Fake.answer, {"caption": CAPTION, "nouns": ["A red circle", "the sea"]}
    monkeypatch.setattr(Fake, "answer", lambda *given: replace(answer(*given), weights=weights))
    names = ("a.png", "b.png", "bad.png", "sub/c.png")
    captions = json_lines(three.parent / "c.jsonl", *({"image": name, **said} for name in names))
    target = three.parent / f"mine_{bool(weights)}"
    given = ("--captions", captions, "--records", target)
    out, _ = run(*given, code=1)
    assert "3 done, 1 failed" in out and f"check.py --module {target}/records.py" in out
    assert f"{0 if weights else 6} nouns to fill in" in out
    text = (target / "narratives.json").read_text()
    ids = '[ "1" ]' if weights else "null"
    row = f'{{ "utterance": "A red circle", "segment_ids": {ids}, "noun": true }},'
    assert sum(line.strip() == row for line in text.splitlines()) == 3
    # All masks have their number on the page; other pages number those that a noun names.
    assert sorted(page(three).each("data-label", tag="text")) == [*"111", *"222"]
    named = {"1", "2"} if weights else {"", "1 2"}  # by nouns, and by none
    assert set(page(three).each("data-entities")) == named
    assert (target / "images" / "a.png").read_bytes() == (three / "a.png").read_bytes()
    upright = np.asarray(stored.rotate(-90, expand=True))
    assert (np.asarray(Image.open(target / "images" / "b.png")) == upright).all()
    (three / "bad.png").unlink()
    assert "what is filled in there stays" in run(*given, code=2)[1]
    try:
        assert check_script.main(["--module", str(target / "records.py"), target.name]) == 0
        records = list(DatasetCatalog.get(target.name))
        assert (target / "narratives.json").read_text() == text
    finally:
        DatasetCatalog.remove(target.name)
        MetadataCatalog.remove(target.name)
    if not weights:
        assert records == [] and "left out 3 narratives" in gella_log.text
        return
    assert [record["image_id"] for record in records] == ["a", "b", "sub__c"]
    for record in records:
        assert [p["segment_ids"] for p in record["phrases"]] == [[1], [1]]
        assert [(p["text"], p["start"]) for p in record["phrases"]] == [
            ("A red circle", 0),
            ("the sea", -1),
        ]


# -- datasets, tasks, other models -----------------------------------------------------------------


@pytest.fixture
def dataset(three: Path) -> Any:
    """The dataset gella_test_demo: two records of a.png, one of b.png, all with masks."""
    shared = {"height": 30, "width": 40, "expressions": [], "tasks": ()}
    shared["entities"] = {"format": "panoptic_png", "file_name": str(three / "a_masks.png")}
    records = []
    for name, caption in (("a", CAPTION), ("a", "Own words."), ("b", CAPTION)):
        phrases = [
            {"text": caption.split(" lies")[0], "start": 0, "end": 9, "segment_ids": [2]},
            {"text": "a photo", "start": -1, "end": -1, "segment_ids": []},
        ]
        own = {"image_id": name, "file_name": str(three / f"{name}.png"), "caption": caption}
        records.append({**shared, **own, "phrases": phrases})
    DatasetCatalog.register("gella_test_demo", lambda: records)
    yield records
    DatasetCatalog.remove("gella_test_demo")


def texts_of(folder: Path) -> set[str]:
    """The names of the JSON files of a run."""
    return {path.name for path in (folder.parent / "out").glob("*.json")}


def test_texts_of_a_dataset(run, refused, three: Path, dataset: Any, fake: type[Fake]) -> None:
    given = ("--dataset", "gella_test_demo")
    run(*given, "--num", "2", input=None)
    assert texts_of(three) == {"a.json", "b.json"}
    content = json_of(three)
    assert content["caption"] == CAPTION and content["dataset"] == "gella_test_demo"
    assert [noun["start"] for noun in content["nouns"]] == [0, -1]
    shutil.rmtree(three.parent / "out")
    fake.asked.clear()
    dataset[2]["expressions"] = [{"text": "the left one", "sent_id": 1}]
    run(*given, "--task", "refer", input=None)
    assert texts_of(three) == {"b.json"} and fake.asked == [("refer", "the left one", (30, 40))]
    fake.asked.clear()
    run(*given, "--describe-first", "--num", "1", input=None)
    assert [text for _, text, _ in fake.asked] == ["", CAPTION]  # not the record's nouns
    for record in dataset:
        record["caption"] = ""
    refused(*given, "--task", "extract", input=None, words="no record with a caption")


def test_real_images_with_crowd_and_void(run, three, coco_sample, opts):
    annotations = coco_sample / "annotations"
    panoptic = json.loads((annotations / "panoptic_val2017.json").read_text())
    infos = {a["image_id"]: a for a in panoptic["annotations"]}
    for record in json.loads((annotations / "png_coco_val2017.json").read_text()):
        info = infos[int(record["image_id"])]
        name = info["file_name"].removesuffix(".png")
        nouns = ",".join(s["utterance"] for s in record["segments"] if s["noun"])
        masks = ("--masks", annotations / "panoptic_val2017" / info["file_name"])
        masks += ("--panoptic-json", annotations / "panoptic_val2017.json")
        texts = ("--caption", record["caption"], "--nouns", nouns)
        run(*masks, *texts, input=coco_sample / "val2017" / f"{name}.jpg", opts=opts)
        content = json_of(three, name)
        ids = {s["id"]: s["iscrowd"] for s in info["segments_info"]}
        assert content["num_entities"] == sum(not crowd for crowd in ids.values())
        for noun in content["nouns"]:
            assert noun["entity_ids"] and not any(ids[entity] for entity in noun["entity_ids"])
            mask = mask_utils.decode(noun["mask"])
            assert mask.shape == (content["height"], content["width"])
            areas = {s["id"]: s["area"] for s in info["segments_info"]}
            assert mask.sum() == sum(areas[entity] for entity in set(noun["entity_ids"]))


def test_tasks_of_a_real_model(run, three, opts, monkeypatch):
    def perturbed(cfg: Any, config_file: str) -> GellaPredictor:
        return GellaPredictor(cfg, model=make_model(cfg), config_file=config_file)

    monkeypatch.setattr(demo, "GellaPredictor", perturbed)
    out_dir = three.parent / "out"

    def content(*more: Any) -> dict[str, Any]:
        run(*more, input="in/a.png", opts=opts)
        html = page(three)
        (place,) = html.each("href", tag="image") + html.each("src", tag="img")
        assert (out_dir / place).is_file()
        return json_of(three)

    assert content("--task", "refer", "--caption", "the circle")["task"] == "refer"
    found = content("--task", "panoptic", "--categories", "sand,red star")
    assert {s["category"] for s in found["segments"]} <= {"sand", "red star"}
    assert (out_dir / "a_panoptic.png").is_file()
    text = content("--task", "describe")
    assert text["task"] == "describe" and text["text"]
    found = content("--task", "extract", "--caption", CAPTION)
    assert found["caption"] == CAPTION and isinstance(found["nouns"], list)
    (three / "a_masks.png").unlink()  # the text does not depend on masks
    assert content("--task", "describe")["text"] == text["text"]


def test_the_model_describes_first_and_extracts(run: Any, three: Path, fake: type[Fake]) -> None:
    for _ in range(2):  # the second time nothing is left to do
        run("--describe-first")
        assert sorted(task for task, *_ in fake.asked) == ["describe"] * 3 + ["ground"] * 3
    assert {text for task, text, _ in fake.asked if task == "ground"} == {CAPTION}
    assert json_of(three)["caption"] == CAPTION
    run("--task", "extract", "--caption", CAPTION)
    assert json_of(three, "b")["nouns"][1] == {"noun": "the sand", "start": 21, "end": 29}
    assert [tag for tag, _ in page(three).tags].count("mark") == 6


def test_captions_of_an_endpoint(run, refused, three: Path, fake: type[Fake], monkeypatch) -> None:
    monkeypatch.setenv("GELLA_API_KEY", KEY)
    with chat_server() as server:
        server.script = [status(400, b'{"error": "no"}')]
        arguments = ("--captioner", server.url, "--captioner-model", "some-model")
        out, _ = run(*arguments, "--batch-size", "1", code=1)
        assert "2 done, 1 failed" in out and f"sent to {server.url}/chat/completions" in out
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
        run(*arguments)
        assert len(server.requests) == 4  # only what had failed
        content = json_of(three, "b")
        assert content["captioner"] == "some-model" and " wall" in content["caption"]
        assert [noun["noun"] for noun in content["nouns"]][1:] == ["two dogs"]
        server.default = answer("no JSON")
        out, _ = run(*arguments, "--overwrite", code=1)
        assert "none of 3 answers could be used" in out
        refused(*arguments, "--overwrite", input="in/a.png", words="none of 3 answers")
        server.default = status(401)
        _, err = run(*arguments, "--overwrite", code=2)
        assert "check the key" in err and err.count("error: ") == 1
    for path in tree(three.parent / "out"):
        assert KEY.encode() not in (three.parent / "out" / path).read_bytes()


def test_masks_of_a_live_segmenter(run, three: Path, fake: type[Fake], monkeypatch) -> None:
    class Halves(Segmenter):
        def predict(self, images: Any) -> Any:
            masks = np.zeros((2, 30, 40), bool)
            masks[0, :, :20] = masks[1, :2, 30:] = True
            if images[0][0, 0].tolist() == [1, 2, 3]:
                raise RuntimeError("the segmenter broke")
            return [(masks, np.array([0.5, 0.9], np.float32)) for _ in images]

    given: list[Any] = []
    made = lambda *a: given.append(a) or Halves()  # noqa: E731
    monkeypatch.setattr("gella.commands.demo.load_segmenter", made)
    pixels = np.asarray(Image.open(three / "b.png")).copy()
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(three / "b.png")
    options = ("--segmenter", "sam:x", "--segmenter-option", "points_per_side=4")
    given_options = ("--caption", CAPTION, *options)
    out, _ = run(*given_options, code=1)
    assert "failed: b.png: the segmenter broke" in out
    assert given == [("sam:x", None, {"points_per_side": "4"})]
    assert json_of(three)["num_entities"] == 2 and json_of(three)["segmenter"] == "sam:x"
    run(*given_options, "--min-area", "100", code=1)
    assert json_of(three)["num_entities"] == 1  # not taken for done
    assert "found no entity" in run(*given_options, "--min-area", "9999", code=1)[0]


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_becomes_one_page(run: Any, three: Path, opts: Any) -> None:
    file = json_lines(
        three.parent / "c.jsonl",
        {"image": "c", "caption": "The sand and a star.", "nouns": ["The sand", "a star"]},
        {"image": "a.png", "caption": CAPTION, "nouns": ["A red circle", "the sand"]},
        {"image": "a.png", "caption": "One circle.", "nouns": ["One circle"]},
    )
    out, _ = run("--captions", file, opts=opts)
    assert "1 of 3 pictures have no caption" in out and "next: open" in out
    out_dir = three.parent / "out"
    stems = ("a", "a_2", "sub__c")
    ends = ("{}.json", "{}_grounding.png", "{}_colormap.png", "page/{}.html", "page/{}.png")
    assert tree(out_dir) == {"index.html", *(end.format(s) for s in stems for end in ends)}
    html = page(three)
    assert len(html.each("id", tag="figure")) == len(set(html.each("id", tag="figure"))) == 3
    assert html.text.index(CAPTION.split(" lies")[1]) < html.text.index("One circle")
    assert html.text.count("a.png") == 2 and html.text.count("sub/c.png") == 1
    places = [unquote(p) for p in html.each("href", tag="a") + html.each("href", tag="image")]
    assert len(places) == 12 and all((out_dir / place).is_file() for place in places)
    nouns = [noun for noun in html.each("data-noun", tag="span") if noun != "-1"]
    assert nouns == ["0", "1", "0", "0", "1"]
    content = json_of(three, "sub__c")
    assert content["caption"] == "The sand and a star." and content["height"] == 30
    assert [noun["noun"] for noun in content["nouns"]] == ["The sand", "a star"]


def test_a_second_run_does_only_what_changed(run: Any, three: Path, fake: type[Fake]) -> None:
    out_dir = three.parent / "out"

    def asked(*more: Any, **options: Any) -> int:
        fake.asked.clear()
        run("--caption", CAPTION, *more, **options)
        assert len(page(three).each("id", tag="figure")) == 3
        return len(fake.asked)

    def contents() -> dict[str, bytes]:
        return {path: (out_dir / path).read_bytes() for path in tree(out_dir)}

    assert asked() == 3
    before = contents()
    assert asked() == 0 and contents() == before
    scene(three, "a.png", 9)
    assert asked() == 1 and fake.asked[0][0] == "ground"
    Image.fromarray(id_to_rgb(np.ones((30, 40), np.int32))).save(three / "b_masks.png")
    assert asked() == 1
    (out_dir / "b_colormap.png").unlink()
    assert asked() == 1
    (out_dir / "a.json").write_text((out_dir / "a.json").read_text()[:40])
    assert asked() == 1
    colors = {"opts": ("INPUT.GELLA.COLORS", "location")}
    assert asked("--nouns", "the sand") == 3
    assert asked("--nouns", "the sand", "--exclusive") == 3 and json_of(three)["exclusive"]
    assert asked("--nouns", "the sand", **colors) == 3
    assert asked("--nouns", "the sand", "--overwrite", **colors) == 3
    assert asked("--nouns", "the sand", **colors) == 0
    weights = three.parent / "w.pth"
    for content in (b"one", b"other"):
        weights.write_bytes(content)
        assert [asked("--weights", weights) for _ in range(2)] == [3, 0]


def test_bad_pictures_among_good_ones(run: Any, three: Path, fake: type[Fake]) -> None:
    masks = (three / "a_masks.png").read_bytes()
    (three / "bad.png").write_bytes(b"no picture")
    (three / "cut.png").write_bytes((three / "a.png").read_bytes()[:500])
    Image.new("1", (20000, 20000)).save(three / "huge.png")
    for name in ("bad", "cut", "huge"):
        (three / f"{name}_masks.png").write_bytes(masks)
    for name in ("unmasked.png", "nan.png"):
        scene(three, name, 5, masks=False)
    np.savez(three / "nan_masks.npz", masks=np.full((1, 30, 40), np.nan))
    out, err = run("--caption", CAPTION, code=1)
    assert "3 done, 5 failed" in out and "Traceback" not in err
    reasons = {item["image"]: item["reason"] for item in json_of(three, "failures")}
    words = ("no picture", "truncated", "too large to open", "nan_masks.npz", "no masks")
    names = ("bad.png", "cut.png", "huge.png", "nan.png", "unmasked.png")
    assert tuple(reasons) == names
    assert all(word in reason for word, reason in zip(words, reasons.values()))
    html = page(three)
    assert len(html.each("id", tag="figure")) == 3 and "Failed: 5" in html.text
    assert reasons["bad.png"] in html.text
    assert f"failed: cut.png: {reasons['cut.png']}" in out and "next: mend these" in out
    for name in names:
        scene(three, name, 7)
    (three / "nan_masks.npz").unlink()
    fake.asked.clear()
    out, _ = run("--caption", CAPTION)
    assert len(fake.asked) == 5 and "3 of 8 were done before" in out
    assert not (three.parent / "out" / "failures.json").exists()
    assert "Failed" not in page(three).text


def test_a_refused_caption_fails_alone_and_given_nouns_are_not_extracted(run, three, fake):
    file = json_lines(
        three.parent / "c.jsonl",
        {"image": "a.png", "caption": CAPTION, "nouns": ["the sand"]},
        {"image": "b.png", "caption": "raise"},
    )
    assert "failed: b.png: this caption is not liked" in run("--captions", file, code=1)[0]
    run("--captions", file, "--extract", code=1)
    assert len(fake.asked) == 4
    assert [noun["noun"] for noun in json_of(three)["nouns"]] == ["circle"]
    # Of one picture it is an error.
    _, err = run("--caption", "raise", input="in/a.png", code=2)
    assert err == "error: this caption is not liked\n"


def test_hostile_names_and_captions(run: Any, tmp_path: Path, fake: type[Fake]) -> None:
    names = ["<img src=x onerror=alert(1)>\"'&.png", "n\nl\x1b[31m.png", "é図%23#?.png", "-x.png"]
    names += ["x.png", "X.PNG", "sub/x.png", "failures.png", "b\udcff.png"]
    for seed, name in enumerate(names):
        scene(tmp_path / "in", name, seed)
    scene(tmp_path / "in", "x.jpg", 40, masks=False)
    lines: list[Any] = [{"image": n, "caption": f"{k} {SCRIPT}"} for k, n in enumerate(names)]
    lines += [{"image": "x.jpg", "caption": SCRIPT + "\u202e\u2028", "nouns": ["<b>", SCRIPT]}]
    lines += [{"image": name, "caption": "out"} for name in ("../../x.png", "/etc/passwd", "..")]
    lines += [{"image": names[1], "caption": "\ud83d", "masks": "../../../etc/passwd"}]
    file = json_lines(tmp_path / "c.jsonl", *lines)
    before = tree(tmp_path)
    out, err = run("--captions", file, code=1)  # the masks /etc/passwd
    assert out.count("is no picture of --input") == 3 and "\x1b" not in out + err
    new = tree(tmp_path) - before
    assert all(path.startswith("out/") for path in new)
    assert len([path for path in new if path.endswith(".json")]) == len(names) + 2
    assert {path.count("/") for path in new} == {1, 2}
    html = page(tmp_path / "in")
    tags = [tag for tag, _ in html.tags]
    assert tags.count("script") == tags.count("b") == 1 and "img" not in tags  # <b>: the failure
    assert not [name for _, a in html.tags for name in a if name.startswith("on")]
    for k, name in enumerate(names):
        assert f"{k} {SCRIPT}" in html.text and inputs.plain(name) in html.text
    places = html.each("href", tag="a") + html.each("href", tag="image")
    assert all((tmp_path / "out" / unquote(place)).is_file() for place in places)
    assert len(set(html.each("href", tag="image"))) == len(names) + 1
    contents = [json.loads((tmp_path / path).read_text()) for path in new if path[-5:] == ".json"]
    captions = [item["caption"] for item in contents if isinstance(item, dict)]
    assert sorted(captions)[: len(names)] == [f"{k} {SCRIPT}" for k in range(len(names))]


def test_names_and_captions_of_bytes_that_are_no_text(run, tmp_path, fake):
    scene(tmp_path / "in", "a\udcff.png", 1)
    (tmp_path / "m\udcff").mkdir()
    (tmp_path / "in" / "a\udcff_masks.png").rename(tmp_path / "m\udcff" / "a\udcff.png")
    run("--caption", "a \udcff", "--masks", tmp_path / "m\udcff")
    content = json_of(tmp_path / "in", "a_")
    assert content["caption"] == "a \ufffd" and content["masks"].endswith("/m\ufffd")
    _, err = run("--caption", "x", input="no\x1b.png", code=2)
    assert err.count("\n") == 1 and "\x1b" not in err


def test_ctrl_c_ends_after_the_batch_and_the_next_run_goes_on(run, tmp_path, fake, monkeypatch):
    for k in range(6):
        scene(tmp_path / "in", f"{k}.png", k)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]

    def go(*signals: int, code: int) -> tuple[str, str]:
        monkeypatch.setattr(fake, "during", lambda: [signal.raise_signal(s) for s in signals])
        return run("--caption", CAPTION, "--batch-size", "2", code=code)

    out, err = go(signal.SIGINT, code=130)
    assert "2 done, 0 failed" in out and "stopping after" in err
    assert "next: the same command goes on" in out
    html = page(tmp_path / "in")
    assert len(html.each("id", tag="figure")) == 2 and "2 of 6 done" in html.text
    out, _ = go(signal.SIGTERM, code=143)
    assert "2 of 6 were done before" in out and len(fake.asked) == 4
    _, err = go(signal.SIGINT, signal.SIGINT, code=130)
    assert "the same command goes on" in err and len(fake.asked) == 4
    assert "4 of 6 done" in page(tmp_path / "in").text
    go(code=0)
    assert len(fake.asked) == 6
    assert handlers == [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]


def test_the_page_is_there_while_the_run_goes_on(run, three, fake, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "_REFRESH", 0.0)
    monkeypatch.setattr(demo, "_TIMES", 0)
    file = three.parent / "out" / "index.html"
    look = lambda: seen.append(file.exists() and page(three).text.count("lies on"))  # noqa: E731
    monkeypatch.setattr(fake, "during", look)
    run("--caption", CAPTION, "--batch-size", "1")
    assert seen == [False, 1, 2]


# -- what it reads ---------------------------------------------------------------------------------


def picture(name: str, root: Path = Path("in"), image_id: Any = None) -> Source:
    return Source(Path(name).stem if image_id is None else image_id, root / name, name)


def write_ids(path: Path, *ids: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(id_to_rgb(np.array([ids], dtype=np.int32))).save(path)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    names = ("b.png", "a/x.JPG", "a/x.txt", ".hidden.png", ".git/y.png", "z.webp", "notes")
    for name in (*names, "b_masks.png", "only_masks.png", "out/b_grounding.png", "a/m/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = list_pictures([tmp_path], [tmp_path / "out", tmp_path / "a" / "m"])
    # only_masks.png belongs to no picture, so it is one.
    assert [item.name for item in found] == ["a/x.JPG", "b.png", "only_masks.png", "z.webp"]
    assert found[0].image_id == "x"
    assert [item.name for item in list_pictures([tmp_path / "b_masks.png"])] == ["b_masks.png"]
    with pytest.raises(ValueError, match="also the folder of the output"):
        list_pictures([tmp_path], [tmp_path / "." / ""])
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        list_pictures([tmp_path / "absent"])
    (tmp_path / "a" / "x.JPG").unlink()
    with pytest.raises(ValueError, match="holds no picture"):
        list_pictures([tmp_path / "a"], [tmp_path / "a" / "m"])


def test_pictures_of_several_paths_and_patterns(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a/x.png", "a/x_masks.png", "a/b/y.jpg", "a/notes.txt", "c/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, names in (
        (["a/x.png", "a/x_masks.png"], ["x.png"]),  # as a shell expands a/*.png
        (["a/*.png"], ["x.png"]),
        (["~/a/*"], ["b/y.jpg", "x.png"]),
        (["a/**/*.jpg"], ["y.jpg"]),
        (["a", "a/x.png", tmp_path / "a"], ["b/y.jpg", "x.png"]),  # each once
        (["c/x.png", "a"], ["c/x.png", "a/b/y.jpg", "a/x.png"]),
        (["./c/../c/x.png"], ["x.png"]),
    ):
        assert [item.name for item in list_pictures(given)] == names, given
    for given in ("a/*.gif", "d/x.png"):
        with pytest.raises(FileNotFoundError, match=f"image {re.escape(given)} does not exist"):
            list_pictures([given])


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("x.mp4", b""),
        ("x.MOV", b""),
        ("x.jpg", b"\0\0\0\x20ftypisom"),
        ("x", b"\x1aE\xdf\xa3webm...."),
        ("x.png", b"RIFF....AVI LIST"),
    ],
)
def test_a_video_is_refused_before_the_model_is_loaded(refused, tmp_path, name, head):
    (tmp_path / name).write_bytes(head)
    words = [f"{name} is a video", f"ffmpeg -i {name}"]
    refused("--caption", CAPTION, "--weights", "no.pth", input=name, words=words)
    for kind in (b"avif", b"heic", b"mif1"):  # pictures
        (tmp_path / "x.heic").write_bytes(b"\0\0\0\x20ftyp" + kind)
        assert list_pictures([tmp_path / "x.heic"])


def test_output_names_are_distinct_and_stay_in_the_folder() -> None:
    names = ["a/x.png", "b/x.png", "x.png", "x.jpg", "X.JPG", "a__x.png", "x_png.png", "y.png"]
    names += ["y.png", "y_2.png", "failures.png", "..x.png", "a/../../e.png", "/etc/p.png"]
    names += ["<b>\"'&.png", "n\nl.png", "\udcff.png", "é図.png", "w" * 300 + ".png", "-x.png"]
    titles = inputs.output_names(names)
    assert len({title.casefold() for title in titles}) == len(names)
    for title in titles:
        assert title not in ("failures", "", ".", "..") and not title.startswith(".")
        assert not set(title) & set('/\\<>"\n\0') and len(title.encode("utf-8")) <= 100
    by_name = dict(zip(names, titles))
    assert by_name["b/x.png"] == "b__x" and by_name["é図.png"] == "é図"
    assert by_name["x.jpg"] != by_name["X.JPG"]
    assert {"y", "y_png_2", "y_2_png"} <= set(titles)  # y.png has two captions
    # Not the order decides: a picture keeps its name when others are listed before it.
    again = dict(zip(reversed(names), inputs.output_names(names[::-1])))
    unique = [name for name in names if names.count(name) == 1]
    assert {name: again[name] for name in unique} == {name: by_name[name] for name in unique}


def test_captions_of_text(tmp_path: Path) -> None:
    pictures = [picture("a.png"), picture("sub/b.png")]
    file = tmp_path / "c.txt"

    def texts(content: str, count: int = 2) -> dict[int, list[str]]:
        file.write_text(content, "utf-8")
        found, lost = assign(read_captions(file), pictures[:count])
        assert lost == []
        return {name[-5]: [entry.text for entry in entries] for name, entries in found.items()}

    named = "\ufeffb\tA dog.\r\n\na.png\tA cat, a hat.\nsub/b.png\tTwo dogs.\n"
    assert texts(named) == {"a": ["A cat, a hat."], "b": ["A dog.", "Two dogs."]}
    nameless = "First.\n\n Second\u2028line. \n"
    assert texts(nameless) == {"a": ["First."], "b": ["Second\u2028line."]}
    assert texts(nameless, 1) == {"a": ["First.", "Second\u2028line."]}  # one picture has all


def test_captions_of_json_lines(tmp_path: Path) -> None:
    file = json_lines(
        tmp_path / "c.jsonl",
        {"image": "a.png", "caption": "A cat.", "nouns": ["A cat"], "masks": "m/a.png"},
        {"image_id": 7, "file_name": "a.png", "description": "B.", "nouns": [], "model": "m"},
        {"image": "../a.png", "caption": "up"},
        {"image": "/etc/a.png", "expression": "the cat \ud83d"},
    )
    found, lost = assign(read_captions(file), [picture("a.png")])
    assert [entry.text for entry in found["a.png"]] == ["A cat.", "B.", "the cat \ufffd"]
    assert [entry.nouns for entry in found["a.png"]] == [("A cat",), (), None]
    assert found["a.png"][0].masks == tmp_path / "m" / "a.png"
    assert [entry.image for entry in lost] == ["../a.png"] and "line 3" in lost[0].where


def test_narratives_of_the_benchmark_are_captions(tmp_path: Path, coco_sample: Path) -> None:
    file = coco_sample / "annotations" / "png_coco_val2017.json"
    pictures = list_pictures([coco_sample / "val2017"])
    found, lost = assign(read_captions(file), pictures)
    narratives = json.loads(file.read_text())
    assert not lost and sum(map(len, found.values())) == len(narratives)
    for narrative in narratives:
        (name,) = (p.name for p in pictures if p.image_id == int(narrative["image_id"]))
        nouns = tuple(s["utterance"] for s in narrative["segments"] if s["noun"])
        assert (narrative["caption"], nouns) in [entry[1:4:2] for entry in found[name]]
    listed = [{"image_id": 7, "caption": "A cat.", "segments": []}, {"image": "a", "caption": "B."}]
    (tmp_path / "c.json").write_text(json.dumps(listed, indent=1))
    found, _ = assign(
        read_captions(tmp_path / "c.json"), [picture("a.png"), picture("007.png", image_id=7)]
    )
    assert [entry[1:4] for entry in found["007.png"]] == [
        ("A cat.", f"{tmp_path / 'c.json'}, entry 0", None)
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.txt", "", "empty"),
        ("c.txt", b"\xff\xfe", "c.txt is no UTF-8"),
        ("c.txt", "a\tb\nc\n", "line 1 has a tab.*line 2"),
        ("c.txt", "one\ntwo\nthree\n", "3 captions without names.*2 pictures"),
        ("c.txt", "q\tA.\n", "'q' is none of the 2 pictures"),
        ("c.txt", "x\tA.\n", "'x' could be a/x.png or b/x.png"),
        ("c.jsonl", "{", "line 1 is no JSON"),
        ("c.json", "{\n}", "line 1 is no JSON"),
        ("c.json", '[{"image": "x"}]', "entry 0: there is no field 'caption'"),
        ("c.json", '[{"image_id": 1, "caption": "A.", "segments": [3]}]', "'segment_ids'"),
        ("c.jsonl", "[" * 100000, "line 1 is no JSON"),
        ("c.jsonl", "[]", "line 1: there is no field 'image'"),
        ("c.jsonl", '{"caption": "A."}', "line 1: there is no field 'image'"),
        ("c.jsonl", '{"image": "a/x.png"}', "line 1: there is no field 'caption'"),
        ("c.jsonl", '{"image": 3, "caption": "A."}', "'image' is '3', not text"),
        (
            "c.jsonl",
            '{"image": "x", "caption": "A.", "nouns": "A"}',
            "'nouns' is a str .*not a list",
        ),
        ("c.jsonl", '{"image": "x", "caption": "A.", "masks": 3}', "'masks' is '3', not text"),
    ],
)
def test_wrong_captions_are_told_with_file_and_line(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        assign(read_captions(tmp_path / name), [picture("a/x.png"), picture("b/x.png")])
    assert name in str(error.value)


def test_masks_of_a_folder_by_name(tmp_path: Path) -> None:
    names = ["x.png", "x.jpg", "a/x.png", "a/y.png", "b/y.png", "b/z.webp", "w.png", "v.png"]
    jobs = {name: Job(picture(name), name) for name in (*names, "c/v.png")}
    files = ("a/x.png", "x.png", "x.jpg.png", "y.png", "z.png", "v.png", "other/w.png")
    for number, name in enumerate(files, start=1):
        write_ids(tmp_path / name, number)
    masks = masks_from(tmp_path, [job.picture for job in jobs.values()])

    def found(name: str) -> Any:
        return masks.find(jobs[name])["file_name"].relative_to(tmp_path).as_posix()

    assert found("a/x.png") == "a/x.png" and found("x.jpg") == "x.jpg.png"
    assert found("b/z.webp") == "z.png" and found("v.png") == "v.png"
    for name, words in (
        ("c/v.png", "such as c/v.png"),  # v.png is the other's
        ("x.png", r"x\.png: its masks .*x\.png could be .* x\.png\.png"),
        ("a/y.png", r"a/y\.png: its masks .*y\.png could be .*call them a/y"),
        ("w.png", r"image w\.png: no masks in .*such as w\.png"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            masks.key(jobs[name])
    image = np.zeros((1, 1, 3), np.uint8)
    assert masks.load(jobs["x.jpg"], image).segment_ids == [3]
    before = masks.key(jobs["x.jpg"])
    write_ids(tmp_path / "x.jpg.png", 4)
    assert masks.key(jobs["x.jpg"]) != before


def test_masks_of_one_json_go_by_file_name_then_by_id(tmp_path: Path) -> None:
    pictures = [picture("a/cat.png"), picture("000000000007.png", image_id=7)]
    jobs = [Job(item, item.name) for item in pictures]
    segment = {"segmentation": {"size": [1, 2], "counts": [0, 1, 1]}, "iscrowd": 0}
    segment.update(category_id=1, bbox=[0, 0, 1, 1], area=1)
    annotations = [{**segment, "id": k + 1, "image_id": i} for k, i in enumerate((31, 7))]
    images = [{"id": 31, "file_name": "cat.png"}, {"id": 9, "file_name": "other.png"}]
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    masks, image = masks_from(file, pictures), np.zeros((1, 2, 3), np.uint8)
    assert [masks.load(job, image).segment_ids for job in jobs] == [[1], [2]]
    assert masks.key(jobs[0]) != masks.key(jobs[1])
    with pytest.raises(ValueError, match="a/7.png and in/b/7.png have one image id, 7"):
        masks_from(file, [picture(f"{folder}/7.png", image_id=7) for folder in "ab"])
    with pytest.raises(ValueError, match="image 8: no masks in"):
        eight = picture("8.png", image_id=8)
        masks_from(file, [eight]).load(Job(eight, "8"), image)


def test_masks_beside_their_picture(tmp_path: Path) -> None:
    job = Job(picture("x.png", tmp_path), "x")
    with pytest.raises(FileNotFoundError, match=r"x\.png: no masks; put x_masks\.png.*--segmenter"):
        masks_beside().key(job)
    whole = masks_beside(whole=True)
    assert whole.load(job, np.zeros((2, 3, 3), np.uint8)).areas().tolist() == [6]
    assert whole.key(job) == "whole"
    write_ids(tmp_path / "x_masks.png", 5)
    write_ids(tmp_path / "other.png", 6)
    named = Job(job.picture, "x", masks=tmp_path / "other.png")
    image = np.zeros((1, 1, 3), np.uint8)
    assert whole.load(job, image).segment_ids == [5]
    assert masks_beside().load(named, image).segment_ids == [6]
    assert masks_beside().key(named) != masks_beside().key(job)
    pictures = [picture("a.png"), picture("b.png")]
    with pytest.raises(ValueError, match=r"other\.png are one picture's file.*2 pictures"):
        masks_from(tmp_path / "other.png", pictures)
    with pytest.raises(FileNotFoundError, match="absent"):
        masks_from(tmp_path / "absent", pictures)


def test_nouns_and_categories(tmp_path: Path) -> None:
    assert inputs.split_nouns(None) is None and inputs.read_categories(None) is None
    assert inputs.split_nouns(" a cat,, two hats ") == ("a cat", "two hats")
    assert inputs.read_categories("sky, grass ,cow") == ["sky", "grass", "cow"]
    assert len(inputs.read_categories("coco") or ()) == 133
    full = [{"id": 4, "name": "sky", "isthing": 0}]
    for name, content in (("c.json", {"categories": full}), ("d.json", full)):
        (tmp_path / name).write_text(json.dumps(content))
        assert inputs.read_categories(str(tmp_path / name)) == full
    (tmp_path / "c.txt").write_text("traffic light\n\nsky\n")
    assert inputs.read_categories(str(tmp_path / "c.txt")) == ["traffic light", "sky"]
    with pytest.raises(FileNotFoundError, match="absent.txt does not exist"):
        inputs.read_categories(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" , ", "no category"),
        ("sky,cow,sky", "'sky' is there twice"),
        ('{"a": 1}', "no field 'categories'"),
        ("{", "is not a JSON file"),
        ("[3]", "entry 0 of 'categories'.*no field '(name|isthing)'"),
        ('[{"name": "sky"}]', "no field '(id|isthing)'"),
        ('["sky", {"id": 1, "name": "cow", "isthing": 1}]', "entry 0.*no field '(name|isthing)'"),
        ("[]", "no category"),
    ],
)
def test_wrong_categories(tmp_path: Path, text: str, words: str) -> None:
    if text[0] in "[{":
        (tmp_path / "c.json").write_text(text)
        text = str(tmp_path / "c.json")
    with pytest.raises(ValueError, match=words):
        inputs.read_categories(text)

"""The demo's tasks, captions and masks by other models, and wrong command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caption_server import KEY, answer, chat_server, status
from demo_scenes import CAPTION, TINY, Fake, Page, fake, run, three, tokens, tree
from detectron2.data import DatasetCatalog
from PIL import Image
from tiny_gella import make_model

from gella.commands import demo
from gella.predictor import GellaPredictor
from gella.segmenters.segmenter import Segmenter

__all__ = ["fake", "run", "three"]  # fixtures


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
        code, out, err = run(*arguments, "--overwrite", input="in/a.png")
        assert code == 2 and err.startswith("error: none of 3 answers") and err.count("\n") == 1
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
    monkeypatch.setattr(
        "gella.commands.demo_masks.load_segmenter", lambda *a: given.append(a) or Halves()
    )
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
        html = Page(out_dir / "index.html")
        (place,) = html.all("image", "href") + html.all("img", "src")
        assert (out_dir / place).is_file()
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


def test_texts_of_a_dataset(three: Path, fake: type[Fake], capsys: Any) -> None:
    masks = {"format": "panoptic_png", "file_name": str(three / "a_masks.png")}
    record = {"image_id": 1, "height": 30, "width": 40, "entities": masks, "tasks": ()}
    record.update(file_name=str(three / "a.png"), caption="Own words.", expressions=[])
    record["phrases"] = [{"text": "Own words", "start": 0, "end": 9, "segment_ids": [1]}]
    other = {**record, "file_name": str(three / "b.png"), "image_id": 2}
    other["expressions"] = [{"text": "the left one", "sent_id": 1}]
    out = three.parent / "out"
    argv = ["--config-file", TINY, "--weights", "", "--dataset", "gella_test_texts"]
    argv += ["--output", str(out)]
    DatasetCatalog.register("gella_test_texts", lambda: [record, other])
    try:
        assert demo.main([*argv, "--task", "refer"]) == 0
        assert {path.name for path in out.glob("*.json")} == {"b.json"}
        assert fake.asked == [("refer", "the left one", (30, 40))]
        fake.asked.clear()
        assert demo.main([*argv, "--describe-first", "--num", "1"]) == 0
        assert [text for _, text, _ in fake.asked] == ["", CAPTION]  # not the record's nouns
        record["caption"] = other["caption"] = ""
        assert demo.main([*argv, "--task", "extract"]) == 2
    finally:
        DatasetCatalog.remove("gella_test_texts")
    assert "no record with a caption" in capsys.readouterr().err


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

"""The demo tool: what it writes, and one line for every mistake of its user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_utils

from gella.commands import demo
from gella.entities.entity_map import id_to_rgb

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
CAPTION = "A red circle and two squares on the sand."


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A picture and its masks: scene.png, masks.png with the ids 1 to 3."""
    ids = np.zeros((60, 90), dtype=np.int32)
    ids[30:], ids[5:20, 5:20], ids[5:20, 40:55] = 1, 2, 3
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    Image.fromarray(id_to_rgb(ids)).save(tmp_path / "masks.png")
    return tmp_path


@pytest.fixture
def run(files: Path, tokenizer_dir: Path, capsys: Any) -> Any:
    """Call the tool with good arguments, some of them replaced (None: left out)."""

    def call(opts: tuple[str, ...] = (), extra: tuple[str, ...] = (), **changes: Any) -> tuple:
        options: dict[str, Any] = {
            "config-file": TINY,
            "weights": "",
            "input": files / "scene.png",
            "masks": files / "masks.png",
            "caption": CAPTION,
            "nouns": "A red circle,two squares",
            "output": files / "out",
        }
        options.update({name.replace("_", "-"): value for name, value in changes.items()})
        argv = [
            part
            for name, value in options.items()
            if value is not None
            for part in (f"--{name}", str(value))
        ]
        tokenizer = ["MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir)]
        sizes = ["MODEL.LANGUAGE.MAX_POSITIONS", "1024", "MODEL.LANGUAGE.MAX_NEW_TOKENS", "8"]
        argv += [*extra, "--opts", *tokenizer, *sizes, *opts]
        try:
            code = demo.main(argv)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_writes_pictures_and_json(run: Any, files: Path) -> None:
    code, out, err = run()
    assert code == 0 and "error" not in err
    out_dir = files / "out"
    names = {"scene_grounding.png", "scene_colormap.png", "scene.json"}
    there = {path.name for path in out_dir.iterdir()}  # and no temporary file
    assert there == {*names, "index.html", "page"}
    assert {path.name for path in (out_dir / "page").iterdir()} == {"scene.html", "scene.png"}
    for name in names:
        assert f"wrote {out_dir / name}" in out
    assert "untrained" in out and "next:" in out
    content = json.loads((out_dir / "scene.json").read_text())
    assert content["config"] == TINY and content["weights"] == "untrained"
    assert content["task"] == "ground" and content["num_entities"] == 3
    assert [noun["noun"] for noun in content["nouns"]] == ["A red circle", "two squares"]
    ids = np.zeros((60, 90), dtype=np.int32)
    ids[30:], ids[5:20, 5:20], ids[5:20, 40:55] = 1, 2, 3
    for noun in content["nouns"]:
        assert CAPTION[noun["start"] : noun["end"]] == noun["noun"]
        mask = mask_utils.decode(noun["mask"]).astype(bool)
        assert (mask == np.isin(ids, noun["entity_ids"])).all()
    picture = np.asarray(Image.open(out_dir / "scene_grounding.png"))
    assert picture.shape[1] >= 640
    assert (picture[:20] == (160, 30, 30)).all(axis=2).mean() > 0.8  # "untrained weights"


def test_trained_weights_are_named_and_not_labelled(run: Any, files: Path) -> None:
    state = _tiny_state(files)
    torch.save({"model": state}, files / "model.pth")
    code, out, err = run(weights=files / "model.pth")
    assert code == 0, err
    assert "untrained" not in out
    content = json.loads((files / "out" / "scene.json").read_text())
    assert content["weights"] == str(files / "model.pth")
    picture = np.asarray(Image.open(files / "out" / "scene_grounding.png"))
    assert not (picture[:20] == (160, 30, 30)).all(axis=2).any()


def _tiny_state(folder: Path) -> dict[str, torch.Tensor]:
    from detectron2.modeling import build_model

    import gella  # noqa: F401  registers the model
    from gella.config import load_config

    return build_model(load_config(TINY)).state_dict()


def _cut(path: Path) -> Path:
    data = path.read_bytes()
    cut = path.with_name(f"cut_{path.name}")
    cut.write_bytes(data[: len(data) // 2])
    return cut


def _assert_one_line(result: tuple, *words: str) -> None:
    code, out, err = result
    lines = [line for line in err.splitlines() if line and "an answer was cut off" not in line]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert word in lines[0], err
    assert "wrote" not in out


def test_image_and_mask_mistakes(run: Any, files: Path) -> None:
    nowhere = files / "nowhere.png"
    _assert_one_line(run(input=nowhere), f"image {nowhere} does not exist")
    cut = _cut(files / "scene.png")
    _assert_one_line(run(input=cut), f"image {cut} is truncated")
    _assert_one_line(run(masks=nowhere), str(nowhere), "does not exist")
    _assert_one_line(run(masks=_cut(files / "masks.png")), "cut_masks.png", "truncated")
    Image.fromarray(np.ones((50, 90), dtype=np.uint8)).save(files / "small.png")
    _assert_one_line(run(masks=files / "small.png"), "small.png", "90x50", "90x60")
    Image.fromarray(np.zeros((60, 90), dtype=np.uint8)).save(files / "void.png")
    _assert_one_line(run(masks=files / "void.png"), "void.png", "no entity at all")
    assert not (files / "out").exists()


def test_text_mistakes(run: Any) -> None:
    _assert_one_line(run(caption=""), "the caption is empty")
    _assert_one_line(run(caption="  "), "the caption is empty")
    _assert_one_line(run(nouns=" , "), "caption without nouns")
    # The untrained model's answer names nothing that the caption holds.
    _assert_one_line(run(nouns=None), "caption without nouns", CAPTION)
    _assert_one_line(run(nouns=None, extra=("--extract",)), "caption without nouns", CAPTION)
    _assert_one_line(run(caption="a <SEG> here", nouns="a"), "<SEG>")
    _assert_one_line(run(caption=CAPTION * 60), "1024", "tokens")


def test_config_and_weight_mistakes(run: Any, files: Path) -> None:
    _assert_one_line(run(config_file=files / "no.yaml"), "no.yaml does not exist")
    (files / "wrong.yaml").write_text("MODEL:\n  GELA: 1\n")
    _assert_one_line(run(config_file=files / "wrong.yaml"), "wrong.yaml", "MODEL.GELA")
    _assert_one_line(run(opts=("MODEL.GELA", "1")), "MODEL.GELA")
    _assert_one_line(run(weights=files / "no.pth"), "no.pth")
    (files / "broken.pth").write_bytes(b"broken")
    _assert_one_line(run(weights=files / "broken.pth"), "broken.pth")
    state = _tiny_state(files)
    key = next(iter(state))
    torch.save({"model": {k: v for k, v in state.items() if k != key}}, files / "less.pth")
    _assert_one_line(run(weights=files / "less.pth"), "less.pth", "1 missing", key)
    torch.save({"model": {**state, "surplus": torch.zeros(1)}}, files / "more.pth")
    _assert_one_line(run(weights=files / "more.pth"), "more.pth", "1 unexpected", "surplus")


def test_command_line_mistakes(run: Any) -> None:
    _assert_one_line(run(input=None), "--input is missing", "--help")
    _assert_one_line(run(caption=None), "--caption is missing")
    _assert_one_line(run(dataset="gella_shapes_png_val"), "exclude")
    _assert_one_line(run(extra=("--extract",)), "exclude")
    _assert_one_line(run(extra=("--num", "0")), "--num")
    _assert_one_line(run(extra=("--unknown",)), "--unknown")
    own = {"input": None, "masks": None, "caption": None, "nouns": None}
    _assert_one_line(run(dataset="gella_nothing", **own), "gella_nothing", "not registered")


def test_help_teaches() -> None:
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--caption" in done.stdout and "python tools/demo.py --config-file" in done.stdout


def test_dataset_records(run: Any, files: Path) -> None:
    entities = {"format": "panoptic_png", "file_name": str(files / "masks.png")}
    records = []
    for name, caption in (("a", CAPTION), ("a", "Two squares."), ("b", CAPTION), ("c", CAPTION)):
        Image.open(files / "scene.png").save(files / f"{name}.png")
        records.append(
            {
                "file_name": str(files / f"{name}.png"),
                "image_id": name,
                "height": 60,
                "width": 90,
                "entities": entities,
                "caption": caption,
                "phrases": [
                    {"text": caption.split(" and")[0], "start": 0, "end": 12, "segment_ids": [2]},
                    {"text": "a photo", "start": -1, "end": -1, "segment_ids": []},
                ],
                "tasks": ("ground",),
            }
        )
    name = "gella_test_demo"
    DatasetCatalog.register(name, lambda: records)
    own = {"input": None, "masks": None, "caption": None, "nouns": None}
    try:
        code, out, err = run(dataset=name, extra=("--num", "2"), **own)
    finally:
        DatasetCatalog.remove(name)
    assert code == 0, err
    written = {path.name for path in (files / "out").glob("*.json")}
    assert written == {"a.json", "b.json"}
    content = json.loads((files / "out" / "a.json").read_text())
    assert content["caption"] == CAPTION and content["dataset"] == name
    assert [noun["start"] for noun in content["nouns"]] == [0, -1]


def test_real_images_with_crowd_and_void(run: Any, files: Path, coco_sample: Path) -> None:
    annotations = coco_sample / "annotations"
    panoptic = json.loads((annotations / "panoptic_val2017.json").read_text())
    infos = {a["image_id"]: a for a in panoptic["annotations"]}
    narratives = json.loads((annotations / "png_coco_val2017.json").read_text())
    for number, record in enumerate(narratives):
        info = infos[int(record["image_id"])]
        nouns = [s["utterance"] for s in record["segments"] if s["noun"]]
        name = info["file_name"].removesuffix(".png")
        code, _, err = run(
            input=coco_sample / "val2017" / f"{name}.jpg",
            masks=annotations / "panoptic_val2017" / info["file_name"],
            panoptic_json=annotations / "panoptic_val2017.json",
            caption=record["caption"],
            nouns=",".join(nouns),
            output=files / str(number),
        )
        assert code == 0, err
        content = json.loads((files / str(number) / f"{name}.json").read_text())
        ids = {s["id"]: s["iscrowd"] for s in info["segments_info"]}
        assert content["num_entities"] == sum(not crowd for crowd in ids.values())
        for noun in content["nouns"]:
            assert noun["entity_ids"] and not any(ids[entity] for entity in noun["entity_ids"])
            mask = mask_utils.decode(noun["mask"])
            assert mask.shape == (content["height"], content["width"])
            assert mask.sum() == sum(
                s["area"] for s in info["segments_info"] if s["id"] in noun["entity_ids"]
            )
        assert (files / str(number) / f"{name}_grounding.png").is_file()


def test_panoptic_json_mistakes(run: Any, files: Path) -> None:
    file = files / "panoptic.json"
    _assert_one_line(run(panoptic_json=file), "panoptic.json does not exist")
    file.write_text('{"annotations": [{"file_name": "other.png", "segments_info": []}]}')
    _assert_one_line(run(panoptic_json=file), "masks.png")
    for text in ("[]", "{}", "{", '{"annotations": [3]}'):
        file.write_text(text)
        _assert_one_line(run(panoptic_json=file), "no COCO panoptic file")
    info = [{"id": 1, "iscrowd": 0}, {"id": 2, "iscrowd": 1}]
    file.write_text(
        json.dumps({"annotations": [{"file_name": "masks.png", "segments_info": info}]})
    )
    _assert_one_line(run(panoptic_json=file), "[3]")  # a pixel's id that the JSON does not know

"""The tool that writes a segmenter's masks: complete, resumable, clear about what went wrong."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_segmenters
from detectron2.data import DatasetCatalog
from PIL import Image
from tiny_segmenters import save_toy

from gella.commands import precompute_entities as tool
from gella.entities.sources import load_entities
from gella.segmenters.segmenter import load_segmenter
from gella.utils.journal import Journal


def draw(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """A grey picture with a red box and a larger blue one."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 20, dtype=np.uint8)
    top, left = rng.integers(0, 10, 2)
    image[top : top + 6, left : left + 5, 0] = 250
    image[top + 12 : top + 25, left : left + 30, 2] = 250
    return image


def turned(path: Path) -> None:
    """Write a picture of 40x56 that EXIF says to show after a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw(3)).save(path, exif=exif)


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of two sizes; COCO's names, but for one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(5):
        size = (40, 56) if k % 2 else (48, 64)
        Image.fromarray(draw(k, *size)).save(folder / f"{k:012d}.png")
    Image.fromarray(draw(9)).save(folder / "street.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> str:
    return save_toy(tmp_path / "toy")


@pytest.fixture
def run(pictures: Path, toy: str, tmp_path: Path, capsys: Any) -> Any:
    """Call the tool with good arguments, some of them replaced (None: left out)."""

    def call(*extra: str, **changes: Any) -> tuple[int, str, str]:
        options = {"segmenter": toy, "images": pictures, "output": tmp_path / "masks.json"}
        given = {**options, "device": "cpu", **changes}.items()
        pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in given if v is not None]
        try:
            code = tool.main([*itertools.chain(*pairs), *extra])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


# -- what is written -------------------------------------------------------------------------------


def test_what_is_written_is_what_the_segmenter_gives(run, toy, pictures, tmp_path):
    options = {"setup": "tiny_segmenters:add_toy_config", "TOY_PANOPTIC": "True"}
    given = [part for key, value in options.items() for part in ("--option", f"{key}={value}")]
    code, out, _ = run(*given)
    assert code == 0 and "6 of 6" in out and "tools/demo.py" in out
    segmenter = load_segmenter(toy, "cpu", options)
    for path in sorted(pictures.glob("*.png")):
        image = np.asarray(Image.open(path))
        expected = segmenter.segment(image)
        image_id = int(path.stem) if path.stem.isdecimal() else path.stem
        read = load_entities(tmp_path / "masks.json", *image.shape[:2], image_id=image_id)
        assert (read.ids == expected.ids).all() and read.scores.tolist() == [1.0, 1.0]
    results = content(tmp_path / "masks.json")
    assert {type(result["image_id"]) for result in results} == {int, str}
    assert set(results[0]) == {"image_id", "category_id", "segmentation", "score"}
    assert not (tmp_path / "masks.json.journal").exists()


def test_folders_and_patterns_are_taken_together(run, pictures, tmp_path):
    (tmp_path / "more" / "below").mkdir(parents=True)
    for name in ("below/scene.png", "scene_masks.png", "below/scene_masks.png", "other.png"):
        Image.fromarray(draw(1)).save(tmp_path / "more" / name)
    given = str(pictures / "*1.png"), str(tmp_path / "more")
    assert run("--images", *given, images=None)[0] == 0
    ids = {result["image_id"] for result in content(tmp_path / "masks.json")}
    assert ids == {1, "scene", "scene_masks", "other"}


def test_the_batch_size_changes_nothing(run, tmp_path):
    written = []
    for size in (1, 4, 10):
        assert run(output=tmp_path / f"{size}.json", batch_size=size)[0] == 0
        written.append((tmp_path / f"{size}.json").read_bytes())
    assert written[0] == written[1] == written[2]


def test_limits_and_report(run, pictures, tmp_path):
    Image.new("RGB", (30, 20)).save(pictures / "dark.png")
    code, out, _ = run(min_area=40, max_entities=3)
    assert code == 0
    report = content(tmp_path / "masks.json.report.json")
    assert report.pop("seconds_per_image") > 0
    expected = {
        **{"images": 7, "done": 7, "failed": {}, "without_mask": [str(pictures / "dark.png")]},
        "entities": 6,  # the red boxes of 30 pixels are too small
        "entities_per_image": {"mean": 6 / 7, "min": 0, "max": 1},
    }
    assert {key: report[key] for key in expected} == expected
    assert "1 images without any mask" in out and str(pictures / "dark.png") in out
    with pytest.raises(ValueError, match="image dark"):
        load_entities(tmp_path / "masks.json", 20, 30, image_id="dark")
    code, _, _ = run(min_score=0.7, output=tmp_path / "red.json")
    results = content(tmp_path / "red.json")
    assert code == 0 and [result["score"] for result in results] == [0.9] * 6


def test_a_photograph_is_segmented_upright(run, pictures, tmp_path):
    turned(pictures / "photo.png")
    assert run()[0] == 0
    entities = load_entities(tmp_path / "masks.json", 56, 40, image_id="photo")
    assert entities.areas().tolist() == [30, 390]


@pytest.fixture
def dataset(pictures: Path) -> Any:
    """A registered dataset with two captions for each of three pictures, turned by EXIF or not."""
    turned(pictures / "street.png")
    names = [("000000000003.png", 30), ("000000000001.png", 10), ("street.png", 20)]
    records = [
        {"file_name": str(pictures / name), "image_id": number, "height": 40, "width": 56}
        for name, number in names
    ]
    DatasetCatalog.register("precompute_toys", lambda: [*records, *records])
    yield records
    DatasetCatalog.remove("precompute_toys")


def test_a_dataset_that_a_module_registers(run, dataset, tmp_path):
    module = tmp_path / "register_toys.py"
    module.write_text(
        "from detectron2.data import DatasetCatalog\n"
        f"DatasetCatalog.register('precompute_own', lambda: {[*dataset, *dataset]!r})\n"
    )
    try:
        code, out, _ = run(images=None, dataset="precompute_own", module=module)
    finally:
        DatasetCatalog.remove("precompute_own")
    assert code == 0 and "3 of 3" in out
    command = shlex.split(out.splitlines()[-1])
    chosen = ast.literal_eval(command[command.index("INPUT.GELLA.ENTITY_SOURCES") + 1])
    assert chosen == [["precompute_own", "coco_results", str(tmp_path / "masks.json")]]
    results = content(tmp_path / "masks.json")
    assert [result["image_id"] for result in results] == [30, 30, 10, 10, 20, 20]
    # COCO's annotations are of the stored pixels, so the turn is not made
    assert load_entities(tmp_path / "masks.json", 40, 56, image_id=20).num_entities == 2


def test_a_picture_that_is_not_the_datasets_fails(run, dataset, tmp_path):
    dataset[1]["height"], dataset[1]["width"] = 56, 40
    code, out, _ = run(images=None, dataset="precompute_toys")
    assert code == 1 and "56x40 pixels but its record says 40x56" in out
    results = content(tmp_path / "masks.json")
    assert {result["image_id"] for result in results} == {30, 20}


# -- what goes wrong -------------------------------------------------------------------------------


def test_bad_images_do_not_stop_the_rest_and_are_tried_again(run, pictures, tmp_path, monkeypatch):
    Image.fromarray(draw(7, 50, 60)).save(pictures / "heavy.png")
    assert run(output=tmp_path / "whole.json")[0] == 0
    cut = pictures / "000000000001.png"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:60])
    find = tiny_segmenters.ToyColorSegmenter.find

    def find_or_fail(self, entry):
        if entry["height"] == 50:
            raise RuntimeError("out of\nmemory")
        return find(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_segmenters.ToyColorSegmenter, "find", find_or_fail)
        code, out, err = run(batch_size=3)
    assert code == 1 and "2 images failed" in out and "run the same command" in out
    report = content(tmp_path / "masks.json.report.json")
    assert set(report["failed"]) == {str(cut), str(pictures / "heavy.png")}
    assert report["failed"][str(pictures / "heavy.png")].endswith("heavy.png: out of memory")
    assert f"image {cut} is truncated" in err
    assert report["done"] == 5
    results = content(tmp_path / "masks.json")
    assert {result["image_id"] for result in results} == {0, 2, 3, 4, "street"}
    cut.write_bytes(whole)
    code, out, _ = run(batch_size=3)
    assert code == 0 and "5 of 7 images are done" in out
    assert (tmp_path / "masks.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_nothing_but_failures_can_be_repaired(run, pictures, tmp_path):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    code, out, _ = run()
    assert code == 1 and "images   0 of 6" in out
    assert content(tmp_path / "masks.json") == []
    Image.fromarray(draw(1)).save(pictures / "street.png")
    code, out, _ = run()
    assert code == 1 and "images   1 of 6" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "--images"),
        ({"dataset": "x"}, "not allowed with"),
        ({"images": "{tmp}/nowhere"}, "nowhere does not exist"),
        ({"images": "{tmp}/toy"}, "holds no picture"),
        ({"images": "{tmp}/twins"}, "01.png and {tmp}/twins/1.png have one image id, 1"),
        ({"images": None, "dataset": "precompute_unheard"}, "is not registered"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"num_gpus": 0}, "--num-gpus is 0"),
        ({"min_area": -3}, "-3 pixels"),
        ({"max_entities": 0}, "at most 0"),
        ({"option": "threshold"}, "no KEY=VALUE"),
        ({"option": "threshold=0.5"}, "'threshold' is not known"),
        ({"segmenter": "toy"}, "none of sam:PATH"),
        ({"segmenter": "sam:{tmp}/nowhere"}, "nowhere does not exist"),
        ({"output": "{tmp}"}, "is a folder"),
        ({"module": "{tmp}/none.py"}, "none.py"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(run, tmp_path, changes, message):
    (tmp_path / "twins").mkdir()
    for name in ("000000000001.png", "1.png"):
        Image.fromarray(draw(1)).save(tmp_path / "twins" / name)
    values = {k: v if v is None else str(v).format(tmp=tmp_path) for k, v in changes.items()}
    code, _, err = run(**values)
    assert code == 2 and message.format(tmp=tmp_path) in err
    assert err.startswith("error: ") and err.count("\n") == 1


# -- going on --------------------------------------------------------------------------------------


def half_done(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> Path:
    """Stop the tool by Ctrl-C after some images; returns its journal."""
    append, left = Journal.append, iter(range(images))

    def append_and_stop(self, entry):
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and_stop)
        code, _, err = run()
    assert code == 130 and "goes on where it stopped" in err
    assert not (tmp_path / "masks.json").exists()
    return tmp_path / "masks.json.journal"


def test_ctrl_c_and_going_on(run, tmp_path, monkeypatch):
    assert run(output=tmp_path / "whole.json")[0] == 0
    journal = half_done(run, tmp_path, monkeypatch, images=0)
    assert not journal.exists()  # other settings are free again
    for _ in range(2):
        half_done(run, tmp_path, monkeypatch, images=2)
        with journal.open("ab") as stream:
            stream.write(b'{"image_id": 4, "bytes": 12, "resu')  # killed while it wrote
    code, out, _ = run()
    assert code == 0 and "4 of 6 images are done" in out
    whole = (tmp_path / "masks.json").read_bytes()
    assert whole == (tmp_path / "whole.json").read_bytes()
    report = content(tmp_path / "masks.json.report.json")
    assert report["done"] == 6
    code, _, err = run()  # a finished output is not made anew
    assert code == 2 and "exists already" in err and str(tmp_path / "masks.json") in err
    assert (tmp_path / "masks.json").read_bytes() == whole


def test_other_settings_and_a_damaged_journal_are_refused(run, pictures, tmp_path, monkeypatch):
    journal = half_done(run, tmp_path, monkeypatch, images=3)
    whole = journal.read_bytes()
    for changes in ({"min_area": 7}, {"option": "output=instances"}):
        code, _, err = run(**changes)
        assert code == 2 and "other settings" in err and str(journal) in err
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:]]))
    code, _, err = run()
    assert code == 2 and f"{journal}: line 3 is damaged" in err
    journal.write_bytes(whole)
    # A picture that was replaced since is done again.
    Image.new("RGB", (9, 7), (255, 0, 0)).save(pictures / "000000000000.png")
    assert run()[0] == 0
    assert load_entities(tmp_path / "masks.json", 7, 9, image_id=0).areas().tolist() == [63]
    results = content(tmp_path / "masks.json")
    assert [result["image_id"] for result in results].count(0) == 1


def test_killed_between_output_and_tidying_up(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run()[0] == 130
    before = (tmp_path / "masks.json").read_bytes()
    code, out, _ = run()
    assert code == 0 and "6 of 6 images are done" in out
    assert (tmp_path / "masks.json").read_bytes() == before


# -- several processes -----------------------------------------------------------------------------

TESTS = str(Path(__file__).resolve().parent)
# Every picture takes its time, and the ninth of a process never comes.
SLOW = """
find, seen = toys.ToyColorSegmenter.find, []
def wait(self, entry):
    seen.append(entry)
    time.sleep(0.01 if len(seen) < 9 else 1000)
    return find(self, entry)
toys.ToyColorSegmenter.find = wait
"""


@pytest.fixture
def forty(pictures):
    """40 pictures of three sizes."""
    for path in pictures.iterdir():
        path.unlink()
    for k in range(40):
        Image.fromarray(draw(k, 40 + k % 3)).save(pictures / f"{k:012d}.png")
    return pictures


def start_two(toy: str, pictures: Path, output: Path, patch: str = "") -> subprocess.Popen[str]:
    """Start the tool with two processes, in which the code of ``patch`` runs first."""
    script = output.with_suffix(".py")
    script.write_text(
        f"import sys, time\nimport tiny_segmenters as toys\n{patch}\n"
        "from gella.commands.precompute_entities import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    given = {"segmenter": toy, "images": pictures, "output": output, "device": "cpu", "num-gpus": 2}
    command = [sys.executable, str(script), *(f"--{k}={v}" for k, v in given.items())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, TESTS])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **streams)


@pytest.fixture
def run_rank(run, monkeypatch):
    """Call the tool as torchrun does in one of its processes."""

    def call(rank: int, size: int, **changes: Any) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
                patch.setenv(name, str(value))
            return run(**changes)

    return call


def test_one_process_two_and_two_killed_and_taken_up_by_one_write_equal_files(
    run, run_rank, toy, forty, tmp_path
):
    one, two, placed, killed = (tmp_path / f"{name}.json" for name in ("1", "2", "run", "killed"))
    started = start_two(toy, forty, two)
    cut = start_two(toy, forty, killed, SLOW)
    assert run(output=one)[0] == 0
    assert run_rank(1, 2, output=placed)[0] == 0 and not placed.exists()
    assert run_rank(0, 2, output=placed)[0] == 0
    journals = [tmp_path / f"killed.json.{rank}of2.journal" for rank in (0, 1)]
    while not all(j.exists() and j.read_bytes().count(b"\n") == 9 for j in journals):
        assert cut.poll() is None, cut.communicate()
        time.sleep(0.05)
    code, _, err = run(output=killed)
    assert code == 2 and "is being written by another process" in err
    os.killpg(cut.pid, signal.SIGKILL)
    cut.communicate()
    with journals[0].open("ab") as stream:
        stream.write(b'{"image_id": 16, "by')  # killed while it wrote
    code, out, _ = run(output=killed)
    assert code == 0 and "going on: 16 of 40 images are done" in out
    out, err = started.communicate()
    assert started.returncode == 0 and "40 of 40" in out, err
    assert not list(tmp_path.glob("*.journal"))
    contents = {file.read_bytes() for file in (one, two, placed, killed)}
    assert len(contents) == 1 and len(json.loads(contents.pop())) == 80


def test_what_failed_in_another_process_is_told_and_tried_again(run, run_rank, forty, tmp_path):
    bad = forty / f"{7:012d}.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no picture")
    assert run_rank(1, 2)[0] == 0  # torchrun would end all for another code
    code, out, _ = run_rank(0, 2)
    assert code == 1 and "39 of 40" in out
    (reason,) = content(tmp_path / "masks.json.report.json")["failed"].values()
    assert str(bad) in reason
    bad.write_bytes(whole)
    for rank in (2, 1, 0):
        code, out, _ = run_rank(rank, 3)
        assert code == 0
    assert "40 of 40" in out and content(tmp_path / "masks.json.report.json")["failed"] == {}
    assert run_rank(0, 2, num_gpus=2)[2] == (
        "error: torchrun has started 2 processes: leave --num-gpus out\n"
    )

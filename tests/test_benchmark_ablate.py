"""The ablations at small scale: what the sets run, what is skipped, and what the tables tell."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import ablate
import benchmark
import numpy as np
import pytest
from PIL import Image
from toy_run import SMALL

from gella import load_config
from gella.evaluation.results import load_results
from gella.utils.io import write_json

ARGS = argparse.Namespace(iterations=3, seeds=3, opts=[], output="nowhere")


def by_label(name):
    return {row.label: row for row in ablate.rows_of(name)}


@pytest.mark.parametrize("name", ablate.SETS)
def test_the_config_takes_the_keys_of_every_row(name):
    for row in ablate.rows_of(name):
        _, train, _ = ablate.places(ARGS, row)[0]
        words = itertools.chain(*train.items(), *row.test.items())
        cfg = load_config(ablate.CONFIG, list(words))
        assert cfg.SOLVER.MAX_ITER == 3 and cfg.SEED == 42 and cfg.MODEL.FROM_SCRATCH
        names = str([cfg.DATASETS.TEST, cfg.DATASETS.TRAIN, cfg.INPUT.GELLA.ENTITY_SOURCES])
        assert "shapes" in names and "coco" not in names


def test_the_sets_have_the_rows_of_tables_5_to_10_but_entityseg_s():
    known = {path.stem for path in (ablate.ROOT / "configs" / "ablations").glob("table*.yaml")}
    rows = {row for part in ablate.SETS.values() for row in part["rows"] if isinstance(row, str)}
    left = known - rows
    assert all("entityseg" in name or name.startswith("table11") for name in left) and rows <= known


def test_a_row_is_its_config_at_the_size_of_the_scenes():
    small = by_label("5a")["resolution 224"]
    assert small.train["MODEL.IMAGE_ENCODER.IMAGE_SIZE"] == "64"
    assert not [key for key in small.train if "WEIGHTS" in key or "HUB" in key]
    assert small.test["MODEL.GELLA.SNAP"] == "False"  # of the parent
    assert small.paper == {"PQ": 51.5, "SQ": 82.6, "RQ": 61.6}
    predicted = by_label("6b")["trained on predictions of a model of COCO"]
    assert "predicted_train" in predicted.train[ablate.SOURCES]
    first, annotated = ablate.rows_of("8b")
    assert "predicted_val" in first.test[ablate.SOURCES] and first.train == annotated.train
    assert annotated.test[ablate.SOURCES] == "[]"
    ratios = by_label("9")["describing 0.0, noun extraction 0.2, grounding 0.8"]
    assert ratios.train["DATALOADER.TASK_RATIOS"] == "[0.0, 0.2, 0.8]"
    assert ratios.paper["AR things"] == 65.8 and ratios.paper["AR text"] == 95.4
    unreadable = by_label("9")["describing 0.1, noun extraction 0.1, grounding 0.8"]
    assert unreadable.paper == {"AR singular": 69.2, "AR text": 95.7}


def test_equal_runs_are_one():
    """What changes the test alone, and the paper's own setting in every table, is trained once."""
    rows = [row for name in ("8b", "snapping", "draws") for row in ablate.rows_of(name)]
    rows += [ablate.rows_of(name)[0] for name in ("5a", "7", "8a", "9", "10", "queries")]
    assert len({ablate.places(ARGS, row)[0][0] for row in rows}) == 1
    assert len({ablate.places(ARGS, row)[0][2] for row in rows}) == 7
    longer = argparse.Namespace(**{**vars(ARGS), "iterations": 4})
    assert ablate.places(ARGS, rows[0])[0][0] != ablate.places(longer, rows[0])[0][0]
    assert len({folder for folder, *_ in ablate.places(ARGS, rows[0])}) == 3


# -- running ---------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """What is called in place of tools/train_net.py; a training with the seed 43 is interrupted."""
    calls = []

    def train_net(output, keys, *words):
        calls.append((output, words))
        output.mkdir(parents=True, exist_ok=True)
        if "--eval-only" in words:
            write_json(output / "results.json", {"png": {"AR": 1.0}})
        elif keys["SEED"] != 43 or len(calls) > 6:
            (output / "model_final.pth").touch()
        else:
            (output / "checkpoints").mkdir()

    monkeypatch.setattr(ablate, "train_net", train_net)
    return calls


def test_what_is_finished_is_skipped_and_what_was_interrupted_is_resumed(runs, tmp_path):
    row, other = ablate.rows_of("snapping")
    args = argparse.Namespace(**{**vars(ARGS), "output": str(tmp_path)})
    jobs = [
        (folder, keys, {path: row.test, with_other: other.test})
        for (folder, keys, path), (*_, with_other) in zip(
            ablate.places(args, row), ablate.places(args, other), strict=True
        )
    ]
    for job in jobs:
        ablate.work(*job)
    resumed = ["--resume" in words for _, words in runs]
    assert resumed == [True, False, False, True, True, False, False]
    runs.clear()
    runs += [None] * 6  # so that the next one comes to its end
    for job in jobs:
        ablate.work(*job)
    trained, *tested = runs[6:]
    assert trained[0].name == "seed43" and "--resume" in trained[1]
    assert [words[1] for _, words in tested] == [trained[0]] * 2  # its own config and weights
    assert not (trained[0] / "checkpoints").exists()
    runs.clear()
    for job in jobs:
        ablate.work(*job)
    assert runs == []


def test_a_training_and_a_test_of_the_script(tmp_path, small_shapes, monkeypatch):
    """Two iterations, on imagined masks in training and at test."""
    data = shutil.copytree(small_shapes, tmp_path / "shapes") / "annotations"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ablate.imagine_masks(data)
    scenes = json.loads((data / "panoptic_train.json").read_text())["images"]
    masks = json.loads((data / "predicted_train.json").read_text())
    assert {mask["image_id"] for mask in masks} == {scene["id"] for scene in scenes}
    opts = [*SMALL, "SOLVER.MAX_ITER", "2"]
    args = argparse.Namespace(iterations=2, seeds=1, opts=opts, output=str(tmp_path / "runs"))
    row = ablate.rows_of("8a")[1]
    ((folder, keys, path),) = ablate.places(args, row)
    ablate.work(folder, keys, {path: row.test})
    found, run = load_results(path / "results.json")
    assert {"PQ", "SQ", "RQ"} <= set(found["panoptic_seg"]) and "AP" in found["entity"]
    assert "predicted_val.json" in str(run["settings"]["entity_sources"])
    assert not run["settings"]["snap"] and "predicted_train" in (folder / "config.yaml").read_text()


# -- tables ----------------------------------------------------------------------------------------


def give(tmp_path, name, values, iterations=3):
    """Write results.json files: {row number: [PQ per seed]}."""
    args = argparse.Namespace(iterations=iterations, seeds=3, opts=[], output=str(tmp_path))
    rows = ablate.rows_of(name)
    for number, seeds in values.items():
        for (*_, path), value in zip(ablate.places(args, rows[number]), seeds):
            path.mkdir(parents=True)
            scores = {"PQ": value, "SQ": 80.0 + value, "RQ": None}
            write_json(path / "results.json", {"panoptic_seg": scores, "entity": {"AP": 7.0}})


def test_a_table_has_mean_spread_and_the_paper_s_figures(tmp_path, capsys):
    give(tmp_path, "5b", {0: [10.0, 11.0, 12.0], 1: [12.0, 14.0, 16.0], 2: [12.5, 13.0, 30.0]})
    file = tmp_path / "all.json"
    words = ["--sets", "5b", "--output", str(tmp_path), "--iterations", "3", "--tables"]
    assert benchmark.main(["ablate", *words, "--json", str(file)]) == 0
    text = (tmp_path / "5b.md").read_text()
    assert text in capsys.readouterr().out
    cells = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if "|" in line]
    head, _, *rows = cells
    assert head == ["row", "n", "PQ", "PQ, paper", "SQ", "SQ, paper", "RQ", "RQ, paper", "AP"]
    assert rows[0][:6] == ["random colours", "3", "11.0 ± 1.0", "53.1", "91.0 ± 1.0", "83.3"]
    assert rows[1][:4] == ["colours by the centroid's place", "3", "14.0 ± 2.0", "52.9"]
    assert rows[1][6:] == ["-", "-", "7.0 ± 0.0"]  # neither ours nor the paper's can be told
    assert rows[2][:4] == ["separated", "3", "18.5 ± 10.0", "-"]
    # The seeds of the second row meet the first's at 12.
    assert text.splitlines()[-1].endswith("by chance in one column of 10): separated (PQ, SQ).")
    figures = json.loads(file.read_text())
    assert figures == json.loads((tmp_path / "ablate.json").read_text())
    assert figures["5b"]["rows"][1]["values"]["PQ"] == [12.0, 14.0, 16.0]
    assert Path(figures["5b"]["rows"][1]["folders"][2], "results.json").is_file()
    assert len(np.unique(np.array(Image.open(tmp_path / "5b.png").convert("RGB")))) > 10


def test_missing_rows_are_named(tmp_path, capsys):
    give(tmp_path, "8a", {0: [10.0, 11.0]})
    words = ["ablate", "--sets", "8a", "--output", str(tmp_path), "--iterations", "3", "--tables"]
    assert benchmark.main(words) == 1
    told = r"Missing: trained on the annotation \(1 of 3 seeds; .*/seed44\); trained on predictions"
    assert re.search(told, capsys.readouterr().out)
    table = (tmp_path / "8a.md").read_text()
    assert re.search(r"predictions of a model of COCO *\| 0 *\| - ", table)
    words[-1:] = ["--iterations", "4", "--tables"]
    assert benchmark.main(words) == 1  # of other runs
    assert "trained on the annotation (3 of 3 seeds; look into" in capsys.readouterr().out


def test_a_difference_is_where_seeds_do_not_meet():
    assert ablate.differs([3.0, 4.0], [1.0, 2.9]) and ablate.differs([1.0, 2.0], [2.1, 9.0])
    assert not ablate.differs([3.0, 4.0], [1.0, 3.0]) and not ablate.differs([], [1.0])
    assert not ablate.differs([math.nan], [1.0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sets", "5a,12"], "--sets: there is no 12; choose of 5a, 5b"),
        (["--seeds", "1"], "--seeds is 1; give at least 2"),
        (["SOLVER.NO_SUCH", "1"], "SOLVER.NO_SUCH"),
    ],
)
def test_wrong_arguments_end_with_one_line(words, told, capsys):
    assert benchmark.main(["ablate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1

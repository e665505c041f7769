"""Two real photographs are learned by heart: the whole path of real data, in its shortest form."""

from __future__ import annotations

import json

import benchmark

NAME = "('gella_coco_png_val2017',)"
# Narratives alone, both pictures with all that is said of them in every iteration. An entity of one
# colour is known sooner.
SHORT = [
    *("DATASETS.TRAIN", NAME, "DATASETS.TEST", NAME, "DATALOADER.TASK_RATIOS", "[0.0,0.0,1.0]"),
    *("DATALOADER.PROMPTS_PER_IMAGE", "2", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.GELLA.COLORMAP_SIZE", "96", "INPUT.GELLA.COLORS", "location"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0015", "SOLVER.WARMUP_ITERS", "10"),
    *("MODEL.ASSOCIATION.WEIGHT", "10.0"),
]


def test_narratives_of_real_photographs_are_learned(coco_sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, output = tmp_path / "figures.json", tmp_path / "new"
    given = ["--sample", str(coco_sample), "--output", str(output), "--iterations", "150"]
    command = ["photographs", *given, "--json", str(file), *SHORT]
    assert benchmark.main(command) == 0
    figures = json.loads(file.read_text())
    scores = figures["png"]
    assert (scores["n"], scores["n_thing"], scores["n_plural"]) == (20, 11, 4)
    assert max(scores["largest_AR"], scores["all_AR"]) < 13  # what knows nothing gets
    assert scores["AR"] > 50 and scores["AR_thing"] > 40
    found = figures["run"]["datasets"]["gella_coco_png_val2017"]
    assert found == {"records": 4, "images": 2}
    assert benchmark.main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_sample_that_is_not_there_is_named(tmp_path, capsys):
    command = ["photographs", "--sample", str(tmp_path / "x"), "--output", str(tmp_path / "new")]
    assert benchmark.main(command) == 2
    error = capsys.readouterr().err
    assert "png_coco_val2017.json" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()

"""tools/train_net.py: training, evaluation, kill and resume on drawn scenes, users' errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from gella.utils.io import file_hash

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "train_net.py"
CONFIG = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
# A model as small as the parts allow, for a few iterations.
SMALL = [
    *("MODEL.IMAGE_ENCODER.WIDTH", "32", "MODEL.IMAGE_ENCODER.LAYERS", "2"),
    *("MODEL.RESOBLEND.DIM", "32", "MODEL.MASK_DECODER.HIDDEN_DIM", "32"),
    *("MODEL.MASK_DECODER.MASK_DIM", "32", "MODEL.MASK_DECODER.DECODER_LAYERS", "1"),
    *("MODEL.LANGUAGE.HIDDEN_SIZE", "32", "MODEL.LANGUAGE.INTERMEDIATE_SIZE", "64"),
    *("MODEL.LANGUAGE.NUM_LAYERS", "1", "MODEL.LANGUAGE.MAX_NEW_TOKENS", "8"),
    *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.NUM_WORKERS", "1"),
    # every task within six iterations
    *("DATALOADER.TASK_RATIOS", "[0.3,0.3,0.4]"),
]
# Ends the process without warning after iteration 4, whose last checkpoint is that of iteration 3.
KILLED = """
import os, runpy, signal, sys
from detectron2.engine import HookBase
from gella.engine.trainer import GellaTrainer

class Kill(HookBase):
    def after_step(self):
        if self.trainer.iter == 4:
            os.kill(os.getpid(), signal.SIGKILL)

build_hooks = GellaTrainer.build_hooks
GellaTrainer.build_hooks = lambda self: [*build_hooks(self), Kill()]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with a few drawn scenes."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
    arguments = ["--output", str(folder / "shapes"), "--train", "40", "--val", "4"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    return folder


def run(scenes, output, *arguments, code=None):
    """Run the script in a process of its own, on the drawn scenes."""
    start = [sys.executable, *(["-c", code] if code else []), str(SCRIPT)]
    tokenizer = ["MODEL.LANGUAGE.TOKENIZER", str(scenes / "shapes" / "tokenizer")]
    options = [a for a in arguments if a.startswith("--")]
    pairs = [a for a in arguments if not a.startswith("--")]
    command = [*start, "--config-file", CONFIG, *options, *SMALL, *tokenizer, "OUTPUT_DIR", output]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(scenes), "OMP_NUM_THREADS": "1"}
    log = Path(output) / "stderr.txt"
    with open(log, "w", encoding="utf-8") as stderr, open(f"{log}.out", "w+") as stdout:
        # Files, not pipes, and a group of its own: loader processes outlive a killed parent.
        process = subprocess.Popen(
            [*map(str, command), *pairs],
            stdout=stdout,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        stdout.seek(0)
        printed = stdout.read()
    return subprocess.CompletedProcess(
        command, process.returncode, printed, log.read_text(encoding="utf-8")
    )


def weights(path):
    """The model's tensors in a checkpoint."""
    return torch.load(path, weights_only=True)["model"]


def scores(folder):
    """The scores of a folder's results.json, without how they came about."""
    content = json.loads((folder / "results.json").read_text())
    return {task: metrics for task, metrics in content.items() if task != "run"}


def run_of(folder):
    """How the scores of a folder came about."""
    return json.loads((folder / "results.json").read_text())["run"]


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """An uninterrupted run: its process and its output folder."""
    output = tmp_path_factory.mktemp("whole")
    process = run(scenes, output)
    assert process.returncode == 0, process.stderr[-3000:]
    return process, output


def test_training_ends_with_one_table_and_the_next_step(trained):
    process, output = trained
    results = json.loads((output / "results.json").read_text())
    described = results.pop("run")
    assert set(results) == {"png", "panoptic_seg", "entity", "nouns"}
    assert described["weights"] == f"{output}/model_final.pth"
    assert described["weights_sha256"] == file_hash(output / "model_final.pth")
    assert described["datasets"]["gella_shapes_png_val"] == {"records": 4, "images": 4}
    assert "| **ours** |" in (output / "results.md").read_text()
    assert all(
        isinstance(v, (int, float)) or v is None for m in results.values() for v in m.values()
    )
    assert f"{results['png']['AR']:.1f}" in process.stdout
    next_command = process.stdout.strip().splitlines()[-1]
    assert "tools/demo.py" in next_command and f"{output}/model_final.pth" in next_command
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"total_loss", "loss_answer", "loss_association", "grad_norm", "png/AR"} <= logged
    assert re.search(r"eta: .*iter: 5 ", (output / "log.txt").read_text())
    assert "detectron2 " in (output / "log.txt").read_text()
    assert list(output.glob("events.out.tfevents.*"))


def test_a_killed_run_resumes_to_the_same_weights(scenes, trained, tmp_path):
    _, whole = trained
    killed = run(scenes, tmp_path, code=KILLED)
    assert killed.returncode == -signal.SIGKILL
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["iter_0000001", "iter_0000003"]
    assert not (tmp_path / "model_final.pth").exists()
    # without workers this time: they must not matter
    resumed = run(scenes, tmp_path, "--resume", "DATALOADER.NUM_WORKERS", "0")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Starting training from iteration 4" in (tmp_path / "log.txt").read_text()
    expected, found = weights(whole / "model_final.pth"), weights(tmp_path / "model_final.pth")
    assert expected.keys() == found.keys()
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []
    start = weights(whole / "checkpoints" / "iter_0000001" / "model.pth")
    assert any(not torch.equal(start[k], found[k]) for k in start)  # it did train
    assert scores(tmp_path) == scores(whole)


@pytest.mark.parametrize("weights", ["model_final.pth", "checkpoints/iter_0000005"])
def test_eval_only_repeats_the_final_evaluation(scenes, trained, tmp_path, weights):
    _, whole = trained
    process = run(scenes, tmp_path, "--eval-only", "MODEL.WEIGHTS", f"{whole}/{weights}")
    assert process.returncode == 0, process.stderr[-3000:]
    assert scores(tmp_path) == scores(whole)
    same_file = weights == "model_final.pth"
    equal = run_of(tmp_path)["weights_sha256"] == run_of(whole)["weights_sha256"]
    assert equal is same_file  # a folder of the same weights has a hash of its own
    assert run_of(tmp_path)["config_sha256"] == run_of(whole)["config_sha256"]


def test_saved_predictions_score_the_same_and_changed_ones_do_not(scenes, trained, tmp_path):
    _, whole = trained
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("*.pth"))
    tool = [sys.executable, str(ROOT / "tools" / "score.py")]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(scenes), "OMP_NUM_THREADS": "1"}

    def score(*arguments):
        command = [*tool, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    same = score(copy)
    assert same.returncode == 0, same.stderr[-2000:]
    assert "bit for bit" in same.stdout
    file = copy / "inference" / "gella_shapes_png_val" / "png_predictions.json"
    content = json.loads(file.read_text())
    noun = content["predictions"][0]["nouns"][0]
    height, width = noun["segmentation"]["size"]
    empty_or_full = [height * width] if noun["iou"] else [0, height * width]
    noun["segmentation"] = {"size": [height, width], "counts": empty_or_full}
    file.write_text(json.dumps(content))
    other = score(copy)
    assert other.returncode == 1 and "png/AR: " in other.stdout


def test_expected_results_fail_after_the_table_was_printed(scenes, tmp_path):
    wrong = ["TEST.EXPECTED_RESULTS", "[['nouns','recall',150.0,0.1]]"]
    nouns = ["DATASETS.TEST", "('gella_shapes_nouns_val',)"]
    process = run(scenes, tmp_path, "SOLVER.MAX_ITER", "1", *nouns, *wrong)
    assert process.returncode == 1
    assert "Noun extraction from generated answers" in process.stdout
    assert "run" in json.loads((tmp_path / "results.json").read_text())


def test_a_table_runs_all_that_it_needs_and_takes_calibrated_thresholds(scenes, trained, tmp_path):
    _, whole = trained
    calibration = tmp_path / "calibration.json"
    tool = [sys.executable, str(ROOT / "tools" / "calibrate.py"), "--config-file", CONFIG]
    tokenizer = ["MODEL.LANGUAGE.TOKENIZER", str(scenes / "shapes" / "tokenizer")]
    picked = subprocess.run(
        [*tool, "--weights", f"{whole}/model_final.pth", "--dataset", "gella_shapes_png_train"]
        + ["--dataset", "gella_shapes_panoptic_train", "--num", "4"]
        + ["--output", str(calibration), *SMALL, *tokenizer],
        capture_output=True,
        text=True,
        env={**os.environ, "DETECTRON2_DATASETS": str(scenes), "OMP_NUM_THREADS": "1"},
    )
    assert picked.returncode == 0, picked.stderr[-3000:]
    thresholds = json.loads(calibration.read_text())["thresholds"]
    process = run(
        scenes,
        tmp_path,
        "--eval-only",
        "--table=3",
        *("MODEL.WEIGHTS", f"{whole}/model_final.pth", "TEST.CALIBRATION", str(calibration)),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "| **ours, nouns extracted** |" in process.stdout
    folder = tmp_path / "table_3"
    both = json.loads((folder / "results.json").read_text())
    assert set(both) == {"nouns_given", "nouns_extracted"}
    used = both["nouns_given"]["run"]
    assert used["settings"]["thresholds"]["association"] == thresholds["ASSOCIATION_THRESHOLD"]
    assert used["calibration"]["scored_on_the_same"] == []
    assert set(both["nouns_extracted"]["scores"]["gella_shapes_png_val"]) == {"png", "nouns"}
    predictions = "inference/gella_shapes_png_val/png_predictions.json"
    assert (folder / "nouns_extracted" / predictions).is_file()


# -- errors, in this process -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_net():
    """The script as a module."""
    from gella.commands import train

    return train


def refused(train_net, capsys, *arguments, config=CONFIG):
    """Run main and expect status 2; returns the one line of the error."""
    args = default_argument_parser().parse_args(["--config-file", config, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        train_net.run(args)
    assert end.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_config_errors(train_net, capsys, tmp_path):
    assert "MODEL.NO_SUCH" in refused(train_net, capsys, "MODEL.NO_SUCH", "1")
    assert "absent.yaml" in refused(train_net, capsys, config="absent.yaml")
    assert "--config-file is missing" in refused(train_net, capsys, config="")
    bad = tmp_path / "bad.yaml"
    bad.write_text("MODEL:\n  GELA:\n    SNAP: True\n")
    assert "MODEL.GELA" in refused(train_net, capsys, config=str(bad))
    bad.write_text("MODEL: [")
    assert "bad.yaml" in refused(train_net, capsys, config=str(bad))
    assert "SOLVER.MAX_ITER" in refused(train_net, capsys, "SOLVER.MAX_ITER", "'many'")
    assert "override" in refused(train_net, capsys, "SOLVER.MAX_ITER")


def test_weights_errors(train_net, capsys, tmp_path):
    common = [*SMALL, "OUTPUT_DIR", tmp_path, "DATASETS.TEST", "()"]
    message = refused(train_net, capsys, "--eval-only", *common)
    assert "nothing to evaluate" in message
    message = refused(train_net, capsys, "--eval-only", "--resume", *common)
    assert "checkpoints has no checkpoint" in message
    cut = tmp_path / "checkpoints" / "iter_0000001"
    cut.mkdir(parents=True)
    message = refused(train_net, capsys, "--eval-only", "--resume", *common)
    assert "none of the 1 checkpoint" in message and "state.json is missing" in message
    message = refused(train_net, capsys, "--eval-only", *common, "MODEL.WEIGHTS", cut)
    assert f"checkpoint {cut} is not complete: state.json is missing" in message
    absent = tmp_path / "absent.pth"
    message = refused(train_net, capsys, "--eval-only", *common, "MODEL.WEIGHTS", absent)
    assert f"{absent} does not exist" in message
    torch.save({"model": {"no.such": torch.zeros(1)}}, tmp_path / "w.pth")
    message = refused(
        train_net, capsys, "--eval-only", *common, "MODEL.WEIGHTS", tmp_path / "w.pth"
    )
    assert "1 unexpected: no.such" in message and re.search(r"\d+ missing: association", message)


def test_dataset_errors(train_net, capsys, tmp_path, tokenizer_dir):
    common = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", tokenizer_dir, "OUTPUT_DIR", tmp_path]
    message = refused(train_net, capsys, *common, "DATASETS.TRAIN", "('gella_no_such',)")
    assert "gella_no_such" in message
    assert "DATASETS.TRAIN is empty" in refused(train_net, capsys, *common, "DATASETS.TRAIN", "()")


def test_a_damaged_test_set_ends_the_run_before_it_trains(scenes, tmp_path):
    narratives = scenes / "shapes" / "annotations" / "png_shapes_val.json"
    kept = narratives.read_text()
    content = json.loads(kept)
    next(s for s in content[0]["segments"] if s["segment_ids"])["segment_ids"] = ["99"]
    narratives.write_text(json.dumps(content))
    try:
        process = run(scenes, tmp_path)
    finally:
        narratives.write_text(kept)
    assert process.returncode == 2
    (line,) = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
    assert "png_shapes_val.json" in line and "segment id 99" in line
    assert "Starting training" not in process.stdout


def test_bugs_keep_their_traceback(train_net):
    with pytest.raises(ZeroDivisionError), train_net.user_errors():
        raise ZeroDivisionError

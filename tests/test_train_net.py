"""tools/train_net.py: training, evaluation, kill and resume on drawn scenes, users' errors."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal

import pytest
import torch
from dataset_scripts import places, registered
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from test_stopping import stopped
from toy_run import CONFIG, KILL, ROOT, SCRIPT, SMALL, finish, start_script

from gella.commands import calibrate, score
from gella.commands import train as train_command
from gella.data.register import register_all, register_png, root_from_environment
from gella.utils.io import file_hash


def run(scenes, output, *arguments, plugin=None):
    """Run the script to its end."""
    return finish(start_script(scenes, output, *arguments, plugin=plugin), output)


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
    assert process.status == 0, process.err[-3000:]
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
    assert f"{results['png']['AR']:.1f}" in process.out
    next_command = process.out.strip().splitlines()[-1]
    assert "tools/demo.py" in next_command and f"{output}/model_final.pth" in next_command
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"total_loss", "loss_answer", "loss_association", "grad_norm", "png/AR"} <= logged
    assert re.search(r"eta: .*iter: 5 ", (output / "log.txt").read_text())
    assert "detectron2 " in (output / "log.txt").read_text()
    assert list(output.glob("events.out.tfevents.*"))


def test_a_stopped_and_killed_run_goes_on_to_the_same_weights(scenes, trained, tmp_path):
    """First Ctrl-C in a terminal, which hits the loader's workers too; then no warning at all."""
    _, whole = trained
    cut = stopped(scenes, tmp_path, 1, signal.SIGINT, "SOLVER.CHECKPOINT_PERIOD", "100")
    assert cut.status == 0 and "Traceback" not in cut.err, cut.err[-3000:]
    printed = cut.out.strip().splitlines()
    assert "stopped by SIGINT after iteration 3 (of 0 to 5), which is saved" in printed
    following = shlex.split(printed[-1].removeprefix("Next:"))
    assert following[:3] == ["python", str(SCRIPT), "--resume"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000003"]
    killed = run(scenes, tmp_path, "--resume", "SOLVER.CHECKPOINT_PERIOD", "5", plugin=KILL)
    assert killed.status == -signal.SIGKILL
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["iter_0000003", "iter_0000004"]
    assert not (tmp_path / "model_final.pth").exists()
    # without workers this time: they must not matter
    resumed = run(scenes, tmp_path, "--resume", "DATALOADER.NUM_WORKERS", "0")
    assert resumed.status == 0, resumed.err[-3000:]
    assert "Starting training from iteration 5" in (tmp_path / "log.txt").read_text()
    expected, found = weights(whole / "model_final.pth"), weights(tmp_path / "model_final.pth")
    assert expected.keys() == found.keys()
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []
    start = weights(whole / "checkpoints" / "iter_0000001" / "model.pth")
    assert any(not torch.equal(start[k], found[k]) for k in start)  # it did train
    assert scores(tmp_path) == scores(whole)


@pytest.fixture
def here(scenes, capsys, closed_logs):
    """Run the script on the drawn scenes in this process, which spares its start."""
    register_scenes(scenes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process, for equal scores

    def run_here(output, *arguments, table="", config=CONFIG, small=SMALL):
        keys = ["MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer", "OUTPUT_DIR", output]
        command = ["--config-file", config, *arguments[:1], *small, *keys, *arguments[1:]]
        args = default_argument_parser().parse_args([str(part) for part in command])
        args.table = table
        train_command.run(args)
        return capsys.readouterr().out

    yield run_here
    torch.set_num_threads(threads)
    register_scenes(root_from_environment())


def register_scenes(root):
    """Let the names of the scenes' datasets stand for those below another folder."""
    for name in [name for name in DatasetCatalog.list() if name.startswith("gella_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_all(root)


@pytest.mark.parametrize("weights", ["model_final.pth", "checkpoints/iter_0000005"])
def test_eval_only_repeats_the_final_evaluation(here, trained, tmp_path, weights):
    _, whole = trained
    here(tmp_path, "--eval-only", "MODEL.WEIGHTS", f"{whole}/{weights}")
    assert scores(tmp_path) == scores(whole)
    same_file = weights == "model_final.pth"
    equal = run_of(tmp_path)["weights_sha256"] == run_of(whole)["weights_sha256"]
    assert equal is same_file  # a folder of the same weights has a hash of its own
    assert run_of(tmp_path)["config_sha256"] == run_of(whole)["config_sha256"]


def test_saved_predictions_score_the_same_and_changed_ones_do_not(here, trained, tmp_path, capsys):
    _, whole = trained
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("*.pth"))
    assert score.main([str(copy)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    file = copy / "inference" / "gella_shapes_png_val" / "png_predictions.json"
    content = json.loads(file.read_text())
    noun = content["predictions"][0]["nouns"][0]
    height, width = noun["segmentation"]["size"]
    empty_or_full = [height * width] if noun["iou"] else [0, height * width]
    noun["segmentation"] = {"size": [height, width], "counts": empty_or_full}
    file.write_text(json.dumps(content))
    assert score.main([str(copy)]) == 1
    assert "png/AR: " in capsys.readouterr().out


@pytest.mark.parametrize("released", [False, True])
def test_its_predictions_score_the_same_as_anybodys(
    scenes, here, trained, tmp_path, capsys, released
):
    names = [f"gella_shapes_{kind}_val" for kind in ("png", "panoptic", "refcoco")]
    weights, options = trained[1] / "model_final.pth", {}
    if released:
        folder = ROOT / "weights" / "gella_tiny_shapes"
        weights = folder / "model.safetensors"
        options = {"config": folder / "config.yaml", "small": ["MODEL.DEVICE", "cpu"]}
    tokenizer = ["MODEL.LANGUAGE.TOKENIZER", folder / "tokenizer"] if released else []
    keys = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", tuple(names), *tokenizer]
    here(tmp_path, "--eval-only", *keys, **options)
    expected, found = scores(tmp_path), {}
    for name, kind in zip(names, ("png", "panoptic", "referring"), strict=True):
        file = tmp_path / "inference" / name / f"{kind}_predictions.json"
        command = ["--predictions", file, "--dataset", name, "--output", tmp_path / "one.json"]
        if kind == "png" and not released:  # the annotation's entities by another way
            command += ["--entities", places(scenes / "shapes", "val")["panoptic_json"]]
        assert score.main([str(part) for part in command]) == 0, capsys.readouterr().err
        assert "Missing:  0 of " in capsys.readouterr().out
        found |= json.loads((tmp_path / "one.json").read_text())
    others = {name: found.pop(name) for name in ("png@official", "png@flmm")}
    assert found == {task: expected[task] for task in ("png", "panoptic_seg", "refer")}
    assert all(others[f"png@{rule}"][f"protocol_{rule}"] == 1 for rule in ("official", "flmm"))
    assert score.main([str(tmp_path)]) == 0, capsys.readouterr()


def test_expected_results_fail_after_the_table_was_printed(here, trained, tmp_path, capsys):
    wrong = ["TEST.EXPECTED_RESULTS", "[['nouns','recall',150.0,0.1]]"]
    nouns = ["DATASETS.TEST", "('gella_shapes_nouns_val',)"]
    weights = ["MODEL.WEIGHTS", f"{trained[1]}/model_final.pth"]
    with pytest.raises(SystemExit) as end:
        here(tmp_path, "--eval-only", *weights, *nouns, *wrong)
    assert end.value.code == 1
    assert "Noun extraction from generated answers" in capsys.readouterr().out
    assert "run" in json.loads((tmp_path / "results.json").read_text())


def test_a_table_runs_all_that_it_needs_and_takes_calibrated_thresholds(
    scenes, here, trained, tmp_path, capsys
):
    weights = trained[1] / "model_final.pth"
    file = tmp_path / "calibration.json"
    command = ["--config-file", CONFIG, "--weights", weights, "--num", "4", "--output", file]
    command += ["--dataset", "gella_shapes_png_train", "--dataset", "gella_shapes_panoptic_train"]
    command += [*SMALL, "MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer"]
    assert calibrate.main([str(part) for part in command]) == 0, capsys.readouterr().err
    thresholds = json.loads(file.read_text())["thresholds"]
    keys = ("MODEL.WEIGHTS", weights, "TEST.CALIBRATION", file)
    assert "| **ours, nouns extracted** |" in here(tmp_path, "--eval-only", *keys, table="3")
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


def refused(capsys, *arguments, config=CONFIG):
    """Run main and expect status 2; returns the one line of the error."""
    args = default_argument_parser().parse_args(["--config-file", config, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        train_command.run(args)
    assert end.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_config_errors(capsys, tmp_path):
    assert "MODEL.NO_SUCH" in refused(capsys, "MODEL.NO_SUCH", "1")
    assert "absent.yaml" in refused(capsys, config="absent.yaml")
    assert "--config-file is missing" in refused(capsys, config="")
    bad = tmp_path / "bad.yaml"
    bad.write_text("MODEL:\n  GELA:\n    SNAP: True\n")
    assert "MODEL.GELA" in refused(capsys, config=str(bad))
    bad.write_text("MODEL: [")
    assert "bad.yaml" in refused(capsys, config=str(bad))
    assert "SOLVER.MAX_ITER" in refused(capsys, "SOLVER.MAX_ITER", "'many'")
    assert "override" in refused(capsys, "SOLVER.MAX_ITER")


def test_weights_errors(capsys, tmp_path):
    common = [*SMALL, "OUTPUT_DIR", tmp_path, "DATASETS.TEST", "()"]
    message = refused(capsys, "--eval-only", *common)
    assert "nothing to evaluate" in message
    message = refused(capsys, "--eval-only", "--resume", *common)
    assert "checkpoints has no checkpoint" in message
    cut = tmp_path / "checkpoints" / "iter_0000001"
    cut.mkdir(parents=True)
    message = refused(capsys, "--eval-only", "--resume", *common)
    assert "none of the 1 checkpoint" in message and "state.json is missing" in message
    message = refused(capsys, "--eval-only", *common, "MODEL.WEIGHTS", cut)
    assert f"checkpoint {cut} is not complete: state.json is missing" in message
    absent = tmp_path / "absent.pth"
    message = refused(capsys, "--eval-only", *common, "MODEL.WEIGHTS", absent)
    assert f"{absent} does not exist" in message
    torch.save({"model": {"no.such": torch.zeros(1)}}, tmp_path / "w.pth")
    message = refused(capsys, "--eval-only", *common, "MODEL.WEIGHTS", tmp_path / "w.pth")
    assert "1 unexpected: no.such" in message and re.search(r"\d+ missing: association", message)


def test_dataset_errors(capsys, tmp_path, tokenizer_dir):
    common = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", tokenizer_dir, "OUTPUT_DIR", tmp_path]
    common += ["DATASETS.TEST", "()"]  # which is read first
    message = refused(capsys, *common, "DATASETS.TRAIN", "('gella_no_such',)")
    assert "gella_no_such" in message
    assert "DATASETS.TRAIN is empty" in refused(capsys, *common, "DATASETS.TRAIN", "()")


def test_a_damaged_test_set_ends_the_run_before_it_trains(scenes, tmp_path):
    scenes = shutil.copytree(scenes, tmp_path / "data")
    narratives = scenes / "shapes" / "annotations" / "png_shapes_val.json"
    content = json.loads(narratives.read_text())
    next(s for s in content[0]["segments"] if s["segment_ids"])["segment_ids"] = ["99"]
    narratives.write_text(json.dumps(content))
    process = run(scenes, tmp_path / "run")
    assert process.status == 2
    (line,) = [x for x in process.err.splitlines() if x.startswith("error: ")]
    assert "png_shapes_val.json" in line and "segment id 99" in line
    assert "Starting training" not in process.out


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("key", ["image_id", "height", "expressions"])
def test_a_record_without_a_key_ends_the_run_before_the_model_is_built(
    capsys, tmp_path, tokenizer_dir, monkeypatch, key, evaluates
):
    sides = {"image_id": 1, "height": 4, "width": 6, "tasks": ["refer"], "expressions": []}
    record = {"file_name": "a.png", "entities": {"file_name": "a.npz"}, **sides}
    records = [record, {k: value for k, value in record.items() if k != key}]
    monkeypatch.setattr(train_command, "build_with_weights", lambda *_: 1 / 0)
    monkeypatch.setattr(train_command.GellaTrainer, "build_model", lambda *_: 1 / 0)
    common = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", tokenizer_dir, "OUTPUT_DIR", tmp_path]
    with registered(DatasetCatalog.register, lambda: records) as name:
        MetadataCatalog.get(name).evaluator_type = "refcoco"
        sets = [f"('{name}',)", "()"]
        keys = ["DATASETS.TRAIN", sets[evaluates], "DATASETS.TEST", sets[not evaluates]]
        torch.save({"model": {}}, tmp_path / "w.pth")
        flags = ["--eval-only", "MODEL.WEIGHTS", tmp_path / "w.pth"] if evaluates else []
        message = refused(capsys, *flags, *common, *keys)
    assert f"{__file__}: dataset {name}, record 1 (a.png): there is no field '{key}'" in message


def test_nothing_evaluated_is_told_after_the_scores(scenes, here, trained, tmp_path, capsys):
    """Offline, and of thresholds, as well; other datasets keep their scores."""
    where = places(scenes / "shapes", "val")
    narratives = json.loads((scenes / "shapes/annotations/png_shapes_val.json").read_text())
    for segment in (s for narrative in narratives for s in narrative["segments"]):
        segment["segment_ids"] = []
    (tmp_path / "png.json").write_text(json.dumps(narratives))
    weights, out = f"{trained[1]}/model_final.pth", tmp_path / "out"
    out.mkdir()
    (out / "results.json").mkdir()  # which can then not be written
    nouns, told = "gella_shapes_nouns_val", r"error: dataset \w+png: .*nothing was evaluated \(png"
    with registered(register_png, png_json=tmp_path / "png.json", **where) as name:
        for path, status in ((out, "results.json"), (tmp_path / "free", told)):
            with pytest.raises(SystemExit, match="^2$"):
                tests = f"('{nouns}', '{name}')"
                here(path, "--eval-only", "MODEL.WEIGHTS", weights, "DATASETS.TEST", tests)
            printed = capsys.readouterr()
            assert "nouns (n)" in printed.out and re.search(status, printed.err)
        content = json.loads((tmp_path / "free" / "results.json").read_text())
        assert content["nouns"]["n"] > 0 and content["png"]["AR"] is None
        shutil.copy(trained[1] / "config.yaml", tmp_path / "free")
        changes = ["DATASETS.TEST", f"('{nouns}', '{name}')"]
        assert score.main([str(tmp_path / "free"), *changes]) == 2
        printed = capsys.readouterr()
        assert "nouns (n)" in printed.out and re.search(told, printed.err)
        command = ["--config-file", CONFIG, "--weights", weights, "--dataset", name, *SMALL]
        keys = ["MODEL.LANGUAGE.TOKENIZER", str(scenes / "shapes" / "tokenizer")]
        assert calibrate.main([*command, *keys]) == 2
        assert re.search(rf"error: dataset {name}: .*no grounded noun", capsys.readouterr().err)
        assert calibrate.main([*command[:4], *SMALL, *keys, "DATASETS.TEST", "()"]) == 2
        assert "nothing to calibrate on" in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), train_command.user_errors():
        raise ZeroDivisionError

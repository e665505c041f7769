"""Runs that go on from a checkpoint: exactly, or with exact weights where the layout changed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from toy_run import toy_config, toy_run

from gella.data.sampling import GroundingBatchSampler, GroundingTrainLoader
from gella.engine.resume import RunCheckpoints, fitted_optimizer_state
from gella.engine.zero_checkpoint import (
    check_readable,
    current_digests,
    layout_changes,
    load_engine,
    part_layout,
    sample_weights,
)
from gella.text.prompts import TASKS
from gella.weights.checkpoint import check_sample, consolidate

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "configs" / "zero"
SAVED = "checkpoints/iter_0000001"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra zero)"
)
needs_two_processes = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="launch gives each process its own GPU, here is one"
)


def options(folder, stage, **changes):
    """Options of a run under ZeRO with parameters really divided; stage None: without."""
    if stage is None:
        return []
    config = json.loads((STAGES / f"stage{stage}.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"stage{stage}{len(changes)}.json"
    path.write_text(json.dumps({**config, **changes}))
    return ["SOLVER.ZERO.CONFIG", str(path)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
    arguments = ["--output", str(folder / "shapes"), "--train", "30", "--val", "2"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    frozen = ["MODEL.META_ARCHITECTURE", "PartlyFrozenGELLA"]
    half = {"bf16": {"enabled": True}}

    def step(name, stage, *extra, start="", **changes):
        run = {"name": name, "options": [*options(folder, stage, **changes), *extra]}
        return run | ({"from": start} if start else {})

    one = [step("alone", None), step("alone on", None, start="alone")]
    two = []
    for stage in (0, 2, 3):  # 3 last: it leaves another linear layer behind in torch
        two += [
            step(f"stage {stage}", stage),
            step(f"stage {stage} on", stage, start=f"stage {stage}"),
        ]
    two += [
        step("1 frozen", 1, *frozen),
        step("1 frozen -> 3", 3, *frozen, start="1 frozen"),
        step("2 half", 2, **half),
        step("2 half -> 3", 3, start="2 half", **half),
        step("2 -> 3", 3, start="stage 2"),
        step("3 -> 2", 2, start="stage 3"),
        step("plain -> 2", 2, start="alone"),
    ]
    back = [
        step("2, two -> one", 2, start="stage 2"),
        step("2, two -> plain", None, start="stage 2"),
    ]
    blocks = [[1, one], [2, two], [1, back]]
    tokenizer = str(folder / "shapes" / "tokenizer")
    process = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("resume_runs.py")),
            json.dumps([tokenizer, str(folder), blocks]),
        ],
        env={**os.environ, "DETECTRON2_DATASETS": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


def weights(folder, run, name):
    """The whole weights that a run kept."""
    loaded = torch.load(folder / run / f"{name}.pth", weights_only=True)
    return loaded.get("model", loaded)


def unequal(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


EXACT = ["alone", *(f"stage {s}" for s in (0, 2, 3))]
CHANGED = {  # from, and what the warning says
    "1 frozen -> 3": ("1 frozen", "stage 1 -> 3"),
    "2 half -> 3": ("2 half", "stage 2 -> 3"),
    "2 -> 3": ("stage 2", "stage 2 -> 3"),
    "3 -> 2": ("stage 3", "stage 3 -> 2"),
    "plain -> 2": ("alone", "no ZeRO -> ZeRO"),
    "2, two -> one": ("stage 2", "processes 2 -> 1"),
    "2, two -> plain": ("stage 2", "ZeRO -> no ZeRO"),
}


@needs_deepspeed
@needs_two_processes
@pytest.mark.parametrize("name", EXACT)
def test_the_same_layout_goes_on_exactly(runs, name):
    """Weights of the uninterrupted run after two more steps, so optimisers and rates as well."""
    found = json.loads((runs / f"{name} on" / "report.json").read_text())
    assert found["start"] == 2 and not [n for n in found["notes"] if "start anew" in n]
    assert unequal(weights(runs, f"{name} on", "start"), weights(runs, name, "middle")) == []
    final = weights(runs, name, "model_final")
    assert unequal(weights(runs, f"{name} on", "model_final"), final) == []
    assert len(unequal(weights(runs, name, "middle"), final)) > 50  # it did train


@needs_deepspeed
@needs_two_processes
@pytest.mark.parametrize("name", CHANGED)
def test_another_layout_keeps_the_weights_and_says_that_the_optimiser_restarts(runs, name):
    start, change = CHANGED[name]
    found = json.loads((runs / name / "report.json").read_text())
    assert found["start"] == 2
    (note,) = [n for n in found["notes"] if "start anew" in n]
    assert "language" in note and note.endswith(change)
    middle = weights(runs, start, "middle")
    assert unequal(weights(runs, name, "start"), middle) == []
    assert any(n.startswith("language_decoder.") for n in middle)
    trained = unequal(weights(runs, name, "model_final"), middle)
    assert any(n.startswith("language_decoder.") for n in trained)
    # its own checkpoint is whole as well
    last = consolidate(runs / name / "checkpoints" / "iter_0000003")
    assert unequal(last, weights(runs, name, "model_final")) == []


@needs_deepspeed
@needs_two_processes
def test_the_vision_side_s_optimiser_goes_on(runs):
    """After a change of the language side's layout too: its steps are counted on."""
    for name in ("2 -> 3", "plain -> 2", "2, two -> plain"):
        file = runs / name / "checkpoints" / "iter_0000003" / "trainer.pth"
        optimizer = torch.load(file, weights_only=True)["trainer"]["_trainer"]["optimizer"]
        steps = {"vision": set(), "language": set()}
        for group in optimizer["param_groups"]:
            side = "language" if group["role"] == "language" else "vision"
            steps[side] |= {int(optimizer["state"][i]["step"]) for i in group["params"]}
        assert max(steps["vision"]) == 4
        assert steps["language"] == ({2} if name == "2, two -> plain" else set())


@needs_deepspeed
@needs_two_processes
@pytest.mark.parametrize("name", ["stage 0", "1 frozen", "2 half", "stage 3"])
def test_a_folder_holds_the_whole_model(runs, name):
    """Whatever the stage; of bf16 training the float32 weights that the optimiser steps."""
    assert unequal(consolidate(runs / name / SAVED), weights(runs, name, "middle")) == []


@needs_deepspeed
@needs_two_processes
def test_damaged_files_of_the_part_are_named(runs, tmp_path):
    def damaged(file, change, name="stage 2"):
        copy = tmp_path / name.replace(" ", "")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(runs / name / SAVED, copy)
        change(copy / "language" / "zero" / file)
        return copy

    optimizer = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def noise(path):
        path.write_bytes(b"x" * path.stat().st_size)

    def swap(path):  # the file of another iteration
        other = runs / "stage 2" / "checkpoints" / "iter_0000003" / "language" / "zero" / path.name
        path.write_bytes(other.read_bytes())
        assert path.stat().st_size == other.stat().st_size

    with pytest.raises(ValueError, match=f"not complete: language/zero/{optimizer} is missing"):
        consolidate(damaged(optimizer, lambda path: path.unlink()))
    with pytest.raises(ValueError, match=f"language/zero/{optimizer} has 9 bytes, .* were written"):
        consolidate(damaged(optimizer, lambda path: path.write_bytes(b"too short")))
    with pytest.raises(ValueError, match=f"{optimizer} cannot be read"):
        consolidate(damaged(optimizer, noise))
    check_readable(runs / "stage 2" / SAVED)
    with pytest.raises(ValueError, match=f"{optimizer} cannot be read"):
        check_readable(damaged(optimizer, noise))
    with pytest.raises(ValueError, match="compared weights under ZeRO are not what was saved"):
        consolidate(damaged("zero_pp_rank_0_mp_rank_00_optim_states.pt", swap))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@needs_deepspeed
@needs_two_processes
def test_reading_deepspeed_s_files_runs_no_code_of_theirs(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "stage 2" / SAVED, copy)
    file = copy / "language" / "zero" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Payload(str(tmp_path / "ran"))}, file)
    state = json.loads((copy / "state.json").read_text())
    state["files"][str(file.relative_to(copy))] = file.stat().st_size
    (copy / "state.json").write_text(json.dumps(state))
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="zero_pp_rank_0_mp_rank_00_optim_states.pt cannot be re"):
        consolidate(copy)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@needs_deepspeed
def test_the_engine_s_loading_is_checked(tmp_path):
    """DeepSpeed returns None, or keeps the weights, where it should fail."""
    folder = tmp_path / "language" / "zero"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no .*model_states.pt"):
        load_engine(SimpleNamespace(), tmp_path)
    (folder / "mp_rank_00_model_states.pt").touch()
    engine = SimpleNamespace(load_checkpoint=lambda path, tag: (None, None))
    with pytest.raises(ValueError, match="could not be loaded by DeepSpeed"):
        load_engine(engine, tmp_path)

    def bare(path, tag):
        raise AssertionError

    with pytest.raises(ValueError, match="model_states.pt cannot be read .AssertionError"):
        load_engine(SimpleNamespace(load_checkpoint=bare), tmp_path)
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2))
    sample = sample_weights(engine)
    check_sample(current_digests(engine, sample), sample, tmp_path)
    with torch.no_grad():
        engine.module.bias[1] += 1e-6
    with pytest.raises(ValueError, match=r"1 of 2 compared weights .* first bias"):
        check_sample(current_digests(engine, sample), sample, tmp_path)


def test_layout_changes():
    config = {"zero_optimization": {"stage": 1}}
    model = torch.nn.Linear(2, 2)
    layout = part_layout(config, model)

    def changed(**zero):
        return part_layout({"zero_optimization": {"stage": 1, **zero}}, model)

    assert layout_changes(layout, 2, layout, 2) == ""
    assert layout_changes(layout, 2, changed(stage=2), 2) == ""
    assert layout_changes(layout, 2, changed(stage=3), 4) == "stage 1 -> 3, processes 2 -> 4"
    offload = changed(offload_optimizer={"device": "cpu"})
    assert layout_changes(layout, 1, offload, 1) == "optimiser offload none -> cpu"
    model.bias.requires_grad_(False)
    assert "trained" in layout_changes(layout, 1, changed(), 1)


# -- without ZeRO, in this process -----------------------------------------------------------------


def states(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("seed", [7, -1])
def test_random_generators_go_on(tmp_path, seed):
    """The toy has dropout, which without a seed draws from wherever the generator stands."""

    def train(folder, iterations, resume=False):
        cfg = toy_config(tmp_path / folder, 6)
        cfg.SEED = seed
        trainer = toy_run(cfg, resume=resume)  # sets the generator, after loading none matters
        torch.manual_seed(1234 + resume), np.random.seed(resume), random.seed(resume)
        drawn = Drawn(iterations)
        trainer.register_hooks([drawn])
        try:
            trainer.train()
        except KeyboardInterrupt:
            pass
        return states(trainer), drawn.numbers

    whole, numbers = train("whole", 6)
    train("cut", 5)  # saved after iteration 2
    again, later = train("cut", 6, resume=True)
    assert later == numbers[3:] and unequal(whole, again) == []


class Drawn(HookBase):
    """Draws from every generator in every step, and ends the run after some."""

    def __init__(self, iterations):
        self.numbers, self.iterations = [], iterations

    def before_step(self):
        self.numbers.append((random.random(), np.random.rand(), float(torch.rand(1))))

    def after_step(self):
        if self.trainer.iter + 1 == self.iterations < self.trainer.max_iter:
            raise KeyboardInterrupt


def test_the_place_of_the_data_is_saved_and_compared(tmp_path, gella_log):
    caplog = gella_log

    def loader(seed=3, batch=4, ratios=(0, 0.5, 0.5), records=5):
        pools = {task: range(records) for task in TASKS}
        sampler = GroundingBatchSampler(pools, ratios, batch, seed)
        return GroundingTrainLoader([], sampler, 0)

    def checkpoints(loader, seed=3):
        cfg = toy_config(tmp_path)
        cfg.SEED = seed
        hook = RunCheckpoints(cfg, loader=loader)
        hook.trainer = toy_run(cfg)
        return hook

    checkpoints(loader()).save(9)
    folder = tmp_path / "checkpoints" / "iter_0000009"
    data = json.loads((folder / "state.json").read_text())["data"]
    assert data["iteration"] == 10 and sum(data["batches"].values()) == 10
    assert data["batches"]["describe"] == 0 and data["records"]["ground"] == 5
    assert "SEED: 3" in (folder / "config.yaml").read_text()
    checkpoints(loader()).resume(folder)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    checkpoints(loader(batch=8, records=6)).resume(folder)
    assert "trained with batch 4, this run has 8" in caplog.text
    assert "'ground': 5}, this run has {" in caplog.text and "seed" not in caplog.text
    drawn = loader(seed=99)
    checkpoints(drawn, seed=-1).resume(folder)
    assert drawn.sampler.seed == 3  # a seed that was drawn is drawn once


def test_an_optimiser_s_state_for_other_groups():
    a, b, c = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))

    def optimizer(**groups):
        return torch.optim.AdamW(
            [{"params": p, "role": role, "name": role} for role, p in groups.items()], lr=1.0
        )

    whole = optimizer(heads=[a], language=[b], vision=[c])
    for place, parameter in enumerate((a, b, c)):
        parameter.grad = torch.full((1,), float(place + 1))
    whole.step()
    saved = whole.state_dict()
    assert fitted_optimizer_state(saved, whole) == saved
    part = optimizer(heads=[a], language=[b], vision=[c])
    part.param_groups[1]["params"] = []
    part.load_state_dict(fitted_optimizer_state(saved, part))
    assert part.state[c]["exp_avg"] == whole.state[c]["exp_avg"] and b not in part.state
    back = optimizer(heads=[a], language=[b], vision=[c])
    back.load_state_dict(fitted_optimizer_state(part.state_dict(), back))
    assert back.state[c]["exp_avg"] == whole.state[c]["exp_avg"] and b not in back.state
    more = [c, torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="has 1 parameters in the group vision, this run's 2"):
        fitted_optimizer_state(saved, optimizer(heads=[a], language=[b], vision=more))
    with pytest.raises(ValueError, match="has 3 groups of parameters, this run's 1"):
        fitted_optimizer_state(saved, optimizer(heads=[a]))


def test_a_finished_run_is_resumed_for_more_iterations(tmp_path):
    cfg = toy_config(tmp_path, 4)
    toy_run(cfg).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iter_0000002", "iter_0000003"]
    file = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(file) == {"model", "iteration"} and file["iteration"] == 3
    more = toy_config(tmp_path, 6)
    trainer = toy_run(more, resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    straight = toy_run(toy_config(tmp_path / "straight", 6))
    straight.train()
    assert unequal(states(trainer), states(straight)) == []


def test_the_last_folder_is_written_after_the_final_weights(tmp_path, monkeypatch):
    """A run that is killed in between is resumed, and would not write them any more otherwise."""
    calls = []
    monkeypatch.setattr(
        RunCheckpoints, "save", lambda self, iteration, name="": calls.append((iteration, name))
    )
    toy_run(toy_config(tmp_path, 6)).train()
    assert calls == [(2, ""), (5, "model_final"), (5, "")]

"""Checkpoints: strict reading, folders that are whole or not there, and kills in between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.file_io import PathManager
from torch import nn
from toy_run import toy_config, toy_run

from gella.data.sampling import GroundingBatchSampler, GroundingTrainLoader
from gella.engine.checkpoint import CheckpointStore
from gella.engine.resume import RunCheckpoints, fitted_optimizer_state
from gella.text.prompts import TASKS
from gella.utils.io import write_atomically
from gella.weights.checkpoint import (
    consolidate,
    is_checkpoint,
    load_weights,
    read_parts,
    read_state,
    why_incomplete,
)

LINEAR = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}


def load(model, path, missing=(), unexpected=()):
    """Load with the two keys of a config that loading reads."""
    keys = {"WEIGHTS_ALLOW_MISSING": missing, "WEIGHTS_ALLOW_UNEXPECTED": unexpected}
    load_weights(model, str(path), SimpleNamespace(MODEL=SimpleNamespace(**keys)))


# -- strict loading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [LINEAR, {"model": LINEAR}, {"model": {f"module.{k}": v for k, v in LINEAR.items()}}],
)
def test_files_of_weights_load(tmp_path, monkeypatch, content):
    """Bare, in Detectron2's layout, and as a distributed wrapper leaves them; from an address."""
    torch.save(content, tmp_path / "w.pth")
    monkeypatch.setattr(PathManager, "get_local_path", lambda path: path.replace("https:/", ""))
    for path in (tmp_path / "w.pth", f"https:/{tmp_path}/w.pth"):
        model = nn.Linear(2, 1)
        load(model, path)
        assert model.weight.tolist() == [[1.0, 1.0]] and model.bias.tolist() == [1.0]


def test_every_misfit_is_named_and_nothing_is_loaded(tmp_path):
    model = nn.Linear(2, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    more = {f"k{i:02d}": torch.ones(1) for i in range(25)}
    torch.save({"weight": torch.ones(1, 3), **more}, tmp_path / "w.pth")
    with pytest.raises(ValueError) as error:
        load(model, tmp_path / "w.pth")
    text = str(error.value)
    assert str(tmp_path / "w.pth") in text and "\n" not in text and "1 missing: bias" in text
    assert "25 unexpected: k00, " in text and "k09 and 15 more" in text
    assert "weight (1, 3) in the file, (1, 2) in the model" in text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_patterns_allow_keys_but_never_shapes(tmp_path):
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    state = {**{f"0.{key}": value for key, value in LINEAR.items()}, "head.old": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="2 missing: 1.bias, 1.weight"):
        load(model, tmp_path / "w.pth", unexpected=["head.*"])
    load(model, tmp_path / "w.pth", ["1.*"], ["head.*"])
    assert model[0].weight.tolist() == [[1.0, 1.0]]
    torch.save({"weight": torch.ones(5, 5), "bias": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="of another shape"):
        load(nn.Linear(2, 1), tmp_path / "w.pth", ["*"], ["*"])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.pth", b"PK\x03\x04half", "cut.pth cannot be read"),
        ("list.pth", [1, 2], "list.pth hold no"),
        ("text.pth", {"model": {"weight": "text"}}, "key weight is a str"),
        ("w.pkl", b"", "pickle"),
        ("code.pth", {"model": {}, "x": Payload("ran")}, "code.pth cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, monkeypatch, name, content, message):
    """One of them would run code."""
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        torch.save(content, name)
    Path("ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        load(nn.Linear(2, 1), name)
    assert not Path("ran").exists()


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load(nn.Linear(2, 1), tmp_path / "absent.pth")
    load(nn.Linear(2, 1), "")  # untrained, which the log says


# -- the checkpoints of a run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Output folder of four iterations of the toy; checkpoints after 3 and 4."""
    folder = tmp_path_factory.mktemp("run")
    toy_run(toy_config(folder, 4)).train()
    return folder


def test_what_a_run_leaves(run):
    assert names(run / "checkpoints") == ["iter_0000002", "iter_0000003"]
    folder = run / "checkpoints" / "iter_0000003"
    files = ["config.yaml", "model.pth", "random_0000.pth", "state.json", "trainer.pth"]
    assert names(folder) == files
    facts, weights, states = read_parts(folder)
    assert facts["iteration"] == states["iteration"] == states["trainer"]["iteration"] == 3
    assert facts["processes"] == 1 and facts["zero"] is None and "torch" in facts["versions"]
    final = torch.load(run / "model_final.pth", weights_only=True)
    assert set(final) == {"model", "iteration"} and final["model"].keys() == weights.keys()
    assert all(torch.equal(final["model"][key], value) for key, value in weights.items())


def test_a_folder_is_taken_as_weights(run, tmp_path):
    """For --eval-only and the demo, which load nothing else."""
    folder = shutil.copytree(run / "checkpoints" / "iter_0000003", tmp_path / "iter_0000003")
    model = toy_run(toy_config(tmp_path)).model
    load(model, folder)
    weights = consolidate(folder)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="iter_0000003 do not fit the model: .*bias"):
        load(nn.Linear(3, 2, bias=False), folder)
    (folder / "model.pth").write_bytes(b"x" * (folder / "model.pth").stat().st_size)
    with pytest.raises(ValueError, match="model.pth cannot be read"):
        load(model, folder)
    (folder / "trainer.pth").unlink()
    with pytest.raises(ValueError, match="not complete: trainer.pth is missing"):
        load(model, folder)


def test_a_damaged_newest_checkpoint_is_passed_over(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "iter_0000003" / "model.pth").unlink()
    assert toy_run(toy_config(tmp_path), resume=True).start_iter == 3
    (tmp_path / "checkpoints" / "iter_0000002" / "model.pth").unlink()
    with pytest.raises(ValueError, match="none of the 2 checkpoint.*iter_0000003: model.pth is mi"):
        toy_run(toy_config(tmp_path), resume=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(run, tmp_path, monkeypatch):
    """Whether the interrupted checkpoint is a new file or replaces the last one."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    trainer = toy_run(toy_config(tmp_path), resume=True)

    def killed(data, path):
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    for iteration in (3, 4):
        child = os.fork()
        if not child:
            torch.save = killed
            try:
                trainer.checkpoints.save(iteration)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert toy_run(toy_config(tmp_path), resume=True).start_iter == 4
    assert names(tmp_path / "checkpoints")[1:] == ["iter_0000002", "iter_0000003"]


# -- going on --------------------------------------------------------------------------------------


def states(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def unequal(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


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
        pools = {task: [range(records)] for task in TASKS}
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
    assert data["iteration"] == 10 and sum(n for (n,) in data["batches"].values()) == 10
    assert data["batches"]["describe"] == [0] and data["records"]["ground"] == [5]
    assert "SEED: 3" in (folder / "config.yaml").read_text()
    checkpoints(loader()).resume(folder)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    checkpoints(loader(batch=8, records=6)).resume(folder)
    assert "trained with batch 4, this run has 8" in caplog.text
    assert "'ground': [5]}, this run has {" in caplog.text and "seed" not in caplog.text
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


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(str(path), lambda stream: stream.write(b"old"))

    def fail(stream):
        stream.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(str(path), fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# -- the folders -----------------------------------------------------------------------------------


def save(store, iteration, content="weights", **facts):
    """A checkpoint with two files, one in a folder."""
    folder = store.begin(iteration)
    (folder / "model.pth").write_text(content)
    (folder / "language").mkdir()
    (folder / "language" / "rank.pt").write_text("optimiser")
    return store.finish(iteration, facts)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.newest() is None and store.found() == ([], {})
    folder = store.begin(7)
    (folder / "model.pth").write_text("weights")
    assert store.newest() is None
    final = store.finish(7, {"processes": 2})
    assert names(tmp_path / "run" / "checkpoints") == ["iter_0000007"] and final == store.path(7)
    state = read_state(final)
    assert state["iteration"] == 7 and state["processes"] == 2
    assert state["files"] == {"model.pth": 7}
    assert is_checkpoint(final) and not is_checkpoint(tmp_path) and not why_incomplete(final)
    assert store.newest().path == final


def test_the_newest_is_what_was_saved_last(tmp_path):
    """A run that begins anew in the folder of a longer one goes on from its own checkpoints."""
    store = CheckpointStore(tmp_path)
    save(store, 99)
    save(store, 12345678)
    assert store.newest().iteration == 12345678
    save(CheckpointStore(tmp_path), 4)
    assert store.newest().iteration == 4
    save(CheckpointStore(tmp_path), 99, "anew")  # replaces the old one
    assert store.newest().iteration == 99
    assert (store.path(99) / "model.pth").read_text() == "anew"
    assert names(tmp_path) == ["iter_0000004", "iter_0000099", "iter_12345678"]


def newer_format(path):
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        ("model.pth is missing", lambda path: (path / "model.pth").unlink()),
        ("language/rank.pt is missing", lambda path: shutil.rmtree(path / "language")),
        ("model.pth has 3 bytes, 7 were", lambda path: (path / "model.pth").write_text("wei")),
        ("state.json is missing", lambda path: (path / "state.json").unlink()),
        ("state.json cannot be read", lambda path: (path / "state.json").write_text('{"form')),
        ("state.json has format 99, known here is 1", newer_format),
    ],
)
def test_incomplete_ones_are_passed_over_with_the_reason(tmp_path, gella_log, reason, damage):
    gella_log.set_level("WARNING", "gella")
    store = CheckpointStore(tmp_path)
    save(store, 3)
    save(store, 5)
    damage(store.path(5))
    store.being_written(7).mkdir()
    (tmp_path / "notes.txt").touch()
    assert store.newest().iteration == 3
    lines = [record.getMessage() for record in gella_log.records]
    assert len(lines) == 2
    assert any(f"{store.path(5)} is passed over: {reason}" in line for line in lines)
    assert any("iter_0000007.tmp is passed over" in line and "temporary" in line for line in lines)
    with pytest.raises(ValueError, match=f"iter_0000005 is not complete: {reason}"):
        read_state(store.path(5))


def test_a_first_save_cut_short_is_no_error(tmp_path):
    CheckpointStore(tmp_path).begin(3)
    assert CheckpointStore(tmp_path).newest() is None


def test_keep_the_last_ones_and_every_mth(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, keep_every=10)
    for iteration in range(4, 40, 5):  # 5, 10, ... 40 iterations done
        save(store, iteration)
    expected = [9, 19, 29, 34, 39]
    assert names(tmp_path) == [f"iter_{i:07d}" for i in expected]
    (store.path(9) / "model.pth").unlink()  # left to its owner, and it does not count
    store.path(34).rename(tmp_path / "mine")
    save(store, 44)
    expected = ["iter_0000009", "iter_0000019", "iter_0000029", "iter_0000039", "iter_0000044"]
    assert names(tmp_path) == [*expected, "mine"]
    everything = CheckpointStore(tmp_path / "all")
    for iteration in range(5):
        save(everything, iteration)
    assert len(names(tmp_path / "all")) == 5
    for wrong in ({"keep": -1}, {"keep_every": -5}):
        with pytest.raises(ValueError, match="may be negative"):
            CheckpointStore(tmp_path, **wrong)


def test_leftovers_go_with_the_next_save(tmp_path):
    store = CheckpointStore(tmp_path)
    for name in (".iter_0000003.tmp", ".iter_0000001.old"):
        (tmp_path / name / "language").mkdir(parents=True)
    (tmp_path / ".mine.tmp").touch()
    save(store, 3)
    assert names(tmp_path) == [".mine.tmp", "iter_0000003"]


CHANGING = [(os, n) for n in ("replace", "fsync", "unlink", "rmdir", "mkdir")]


def count_down(left):
    """Let this process end without warning at the n-th call that changes the disk."""

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in [*CHANGING, (type(Path()), "write_text")]:
        setattr(module, name, counted(getattr(module, name)))


def killed_at(folder, moment):
    """Save 4, 5, and 5 again in a process that is killed at a moment; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        count_down(moment)
        store = CheckpointStore(folder, keep=2)
        for iteration in (4, 5, 5):
            save(store, iteration, f"weights of {iteration}")
        status = 0
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_kill_between_any_two_steps_loses_nothing_that_was_whole(tmp_path):
    start = tmp_path / "start"
    for iteration in (1, 2, 3):
        save(CheckpointStore(start), iteration)
    reached = set()
    for moment in range(1, 1000):
        folder = tmp_path / f"killed{moment}"
        shutil.copytree(start, folder)
        status = killed_at(folder, moment)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        store = CheckpointStore(folder, keep=2)
        newest = store.newest()
        reached.add(newest.iteration)
        if newest.iteration > 3:
            assert (newest.path / "model.pth").read_text() == f"weights of {newest.iteration}"
        # one while the same iteration is replaced, which only a run that began anew does
        assert len(store.found()[0]) >= 1
        save(store, 6)
        assert store.newest().iteration == 6 and not list(folder.glob(".*"))
        assert len(os.listdir(folder)) == 2
    assert reached == {3, 4, 5} and moment > 40


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("this system does not name open files")
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(old, new):
        steps.append(f"-> {os.path.basename(new)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save(CheckpointStore(tmp_path), 3)
    named = steps.index("-> iter_0000003")
    content = {"model.pth", "rank.pt", "language", "state.json", ".iter_0000003.tmp"}
    assert set(steps[:named]) == content and steps[named + 1 :] == [tmp_path.name]

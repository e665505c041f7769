"""Checkpoints: atomic writing, strict reading, and errors that name what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.checkpoint import PeriodicCheckpointer
from torch import nn

from gella.engine.checkpoint import GellaCheckpointer, consolidate, load_weights
from gella.utils.io import write_atomically


def make_cfg(missing=(), unexpected=()):
    """The two keys of a config that loading reads."""
    return SimpleNamespace(
        MODEL=SimpleNamespace(WEIGHTS_ALLOW_MISSING=missing, WEIGHTS_ALLOW_UNEXPECTED=unexpected)
    )


def save(path, **state):
    """A weights file in Detectron2's layout."""
    torch.save({"model": state}, path)
    return str(path)


def snapshot(model):
    """A copy of the weights."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_round_trip_and_layout(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    counter = Counter(5)
    GellaCheckpointer(source, str(tmp_path), trainer=counter).save("model_0000004", iteration=4)
    assert os.listdir(tmp_path) == ["checkpoints"]
    assert os.listdir(tmp_path / "checkpoints") == ["iter_0000004"]
    folder = tmp_path / "checkpoints" / "iter_0000004"
    assert sorted(os.listdir(folder)) == ["model.pth", "state.json", "trainer.pth"]
    resumed = Counter(0)
    checkpointer = GellaCheckpointer(target, str(tmp_path), trainer=resumed)
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == str(folder)
    rest = checkpointer.resume_or_load("", resume=True)
    assert rest == {"iteration": 4} and resumed.value == 5
    assert torch.equal(source.weight, target.weight)
    raw = torch.load(folder / "trainer.pth", weights_only=True)
    assert raw == {"trainer": {"value": 5}, "iteration": 4}


class Counter:
    """A number with a state."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_other_names_are_weights_alone(tmp_path):
    model = nn.Linear(3, 2)
    checkpointer = GellaCheckpointer(model, str(tmp_path), trainer=Counter(5))
    checkpointer.save("model_best", iteration=4)
    assert os.listdir(tmp_path) == ["model_best.pth"]
    raw = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert set(raw) == {"model", "iteration"} and not checkpointer.has_checkpoint()
    with pytest.raises(ValueError, match="must be a plain file name"):
        checkpointer.save("a/b")
    GellaCheckpointer(model, str(tmp_path), save_to_disk=False).save("model_0000007", iteration=7)
    assert os.listdir(tmp_path) == ["model_best.pth"]


def test_detectron2_s_periodic_checkpointer_works_on_it(tmp_path):
    """Also where its last iteration is not one of the period."""
    model = nn.Linear(3, 2)
    checkpointer = GellaCheckpointer(model, str(tmp_path), keep=2)
    periodic = PeriodicCheckpointer(checkpointer, 3, max_iter=8)
    for iteration in range(8):
        with torch.no_grad():
            model.bias.fill_(float(iteration))
        periodic.step(iteration)
    expected = ["iter_0000005", "iter_0000007"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == expected
    assert [Path(p).name for p in checkpointer.get_all_checkpoint_files()] == expected
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 7
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert final["bias"].tolist() == [7.0, 7.0]


def test_a_folder_is_taken_as_weights(tmp_path):
    """For --eval-only and the demo, which load nothing else."""
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    GellaCheckpointer(source, str(tmp_path), trainer=Counter(5)).save("model_0000004", iteration=4)
    folder = tmp_path / "checkpoints" / "iter_0000004"
    load_weights(target, str(folder), make_cfg())
    assert torch.equal(source.weight, target.weight)
    assert torch.equal(consolidate(folder)["bias"], source.bias)
    with pytest.raises(ValueError, match="iter_0000004 do not fit the model: .*bias"):
        load_weights(nn.Linear(3, 2, bias=False), str(folder), make_cfg())
    (folder / "model.pth").write_bytes(b"x" * (folder / "model.pth").stat().st_size)
    with pytest.raises(ValueError, match="model.pth cannot be read"):
        load_weights(target, str(folder), make_cfg())
    (folder / "trainer.pth").unlink()
    with pytest.raises(ValueError, match="not complete: trainer.pth is missing"):
        load_weights(target, str(folder), make_cfg())
    (folder / "state.json").unlink()
    with pytest.raises(ValueError, match="not complete: state.json is missing"):
        load_weights(target, str(folder), make_cfg())


def test_wrapped_weights_load(tmp_path):
    model = nn.Linear(2, 1)
    path = save(
        tmp_path / "w.pth", **{"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)}
    )
    load_weights(model, path, make_cfg())
    assert model.weight.tolist() == [[1.0, 1.0]]


def test_a_bare_state_dict_loads(tmp_path):
    model = nn.Linear(2, 1)
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"), make_cfg())
    assert model.bias.tolist() == [1.0]


def test_every_misfit_is_named_and_nothing_is_loaded(tmp_path):
    model = nn.Linear(2, 1)
    before = snapshot(model)
    path = save(tmp_path / "w.pth", weight=torch.ones(1, 3), extra=torch.ones(1))
    with pytest.raises(ValueError) as error:
        load_weights(model, path, make_cfg())
    text = str(error.value)
    assert path in text and "\n" not in text
    assert "1 missing: bias" in text and "1 unexpected: extra" in text
    assert "weight (1, 3) in the file, (1, 2) in the model" in text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_long_lists_are_counted(tmp_path):
    path = save(tmp_path / "w.pth", **{f"k{i:02d}": torch.ones(1) for i in range(25)})
    with pytest.raises(ValueError, match=r"25 unexpected: k00, .*k09 and 15 more"):
        load_weights(nn.Linear(2, 1), path, make_cfg())


def test_patterns_allow_keys_but_never_shapes(tmp_path):
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    path = save(
        tmp_path / "w.pth",
        **{"0.weight": torch.ones(1, 2), "0.bias": torch.ones(1), "head.old": torch.ones(1)},
    )
    with pytest.raises(ValueError, match="2 missing: 1.bias, 1.weight"):
        load_weights(model, path, make_cfg(unexpected=["head.*"]))
    load_weights(model, path, make_cfg(["1.*"], ["head.*"]))
    assert model[0].weight.tolist() == [[1.0, 1.0]]
    path = save(tmp_path / "x.pth", weight=torch.ones(5, 5), bias=torch.ones(1))
    with pytest.raises(ValueError, match="of another shape"):
        load_weights(nn.Linear(2, 1), path, make_cfg(["*"], ["*"]))


def test_unreadable_files(tmp_path):
    model = nn.Linear(2, 1)
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_weights(model, str(tmp_path / "absent.pth"), make_cfg())
    path = save(tmp_path / "w.pth", weight=torch.ones(1, 2), bias=torch.ones(1))
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.pth cannot be read"):
        load_weights(model, str(tmp_path / "cut.pth"), make_cfg())
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth hold no"):
        load_weights(model, str(tmp_path / "list.pth"), make_cfg())
    torch.save({"model": {"weight": "text"}}, tmp_path / "text.pth")
    with pytest.raises(ValueError, match="key weight is a str"):
        load_weights(model, str(tmp_path / "text.pth"), make_cfg())
    (tmp_path / "w.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        load_weights(model, str(tmp_path / "w.pkl"), make_cfg())
    load_weights(model, path, make_cfg())


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_loading_runs_no_code_of_the_file(tmp_path):
    torch.save({"model": {}, "x": Payload(str(tmp_path / "ran"))}, tmp_path / "w.pth")
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(nn.Linear(2, 1), str(tmp_path / "w.pth"), make_cfg())
    assert not (tmp_path / "ran").exists()


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    checkpointer = GellaCheckpointer(nn.Linear(2, 1), str(tmp_path))
    checkpointer.save("model_0000004", iteration=4)
    checkpointer.save("model_0000009", iteration=9)
    (tmp_path / "checkpoints" / "iter_0000009" / "model.pth").unlink()
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    (tmp_path / "checkpoints" / "iter_0000004" / "model.pth").unlink()
    with pytest.raises(ValueError, match="none of the 2 checkpoint.*iter_0000009: model.pth is mi"):
        checkpointer.resume_or_load("", resume=True)


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


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from torch import nn
from gella.engine.checkpoint import GellaCheckpointer

checkpointer = GellaCheckpointer(nn.Linear(64, 64), sys.argv[1])
checkpointer.save("model_0000000", iteration=0)
whole = torch.save
def killed(data, path):
    open(path, "wb").write(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
checkpointer.save(sys.argv[2], iteration=int(sys.argv[2][-1]))
"""


@pytest.mark.parametrize("name", ["model_0000001", "model_0000000"])
def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(tmp_path, name):
    """Whether the interrupted checkpoint is a new file or replaces the last one."""
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), name]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    resumed = GellaCheckpointer(nn.Linear(64, 64), str(tmp_path))
    assert resumed.resume_or_load("", resume=True)["iteration"] == 0
    assert sorted(os.listdir(tmp_path / "checkpoints"))[1:] == ["iter_0000000"]

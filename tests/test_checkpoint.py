"""Checkpoints: atomic writing, strict reading, and errors that name what is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gella.checkpoint import GellaCheckpointer, load_weights, write_atomically


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
    GellaCheckpointer(source, str(tmp_path)).save("model_0000004", iteration=4)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000004.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    rest = GellaCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    assert torch.equal(source.weight, target.weight)
    raw = torch.load(tmp_path / "model_0000004.pth", weights_only=True)
    assert set(raw) == {"model", "iteration"}


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


def test_last_checkpoint_that_names_a_missing_file(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(FileNotFoundError, match="last_checkpoint names .*model_0000009.pth"):
        GellaCheckpointer(nn.Linear(2, 1), str(tmp_path)).resume_or_load("", resume=True)


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
from gella.checkpoint import GellaCheckpointer

checkpointer = GellaCheckpointer(nn.Linear(64, 64), sys.argv[1])
checkpointer.save("model_0000000", iteration=0)
whole = torch.save
def killed(data, stream):
    stream.write(b"half of it")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
checkpointer.save(sys.argv[2], iteration=1)
"""


@pytest.mark.parametrize("name", ["model_0000001", "model_0000000"])
def test_a_kill_while_saving_leaves_the_last_checkpoint_whole(tmp_path, name):
    """Whether the interrupted checkpoint is a new file or replaces the last one."""
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), name]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    resumed = GellaCheckpointer(nn.Linear(64, 64), str(tmp_path))
    assert resumed.resume_or_load("", resume=True)["iteration"] == 0
    assert not (tmp_path / "model_0000001.pth").exists()

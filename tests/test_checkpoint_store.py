"""Folders of checkpoints: what is complete, what is chosen and deleted, and kills in between."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest

from gella.engine.checkpoint_store import CheckpointStore, is_checkpoint, read_state, why_incomplete


def save(store, iteration, content="weights", **facts):
    """A checkpoint with two files, one in a folder."""
    folder = store.begin(iteration)
    (folder / "model.pth").write_text(content)
    (folder / "language").mkdir()
    (folder / "language" / "rank.pt").write_text("optimiser")
    return store.finish(iteration, facts)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def log(monkeypatch, caplog):
    """What the store logs, whoever set the logging up before."""
    logger = logging.getLogger("gella.engine.checkpoint_store")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


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


DAMAGES = {
    "model.pth is missing": lambda path: (path / "model.pth").unlink(),
    "language/rank.pt is missing": lambda path: shutil.rmtree(path / "language"),
    "model.pth has 3 bytes, 7 were written": lambda path: (path / "model.pth").write_text("wei"),
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "state.json cannot be read": lambda path: (path / "state.json").write_text('{"format": 1'),
    "state.json has format 99, known here is 1": lambda path: (path / "state.json").write_text(
        json.dumps({**json.loads((path / "state.json").read_text()), "format": 99})
    ),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_incomplete_ones_are_passed_over_with_the_reason(tmp_path, log, reason):
    store = CheckpointStore(tmp_path)
    save(store, 3)
    save(store, 5)
    DAMAGES[reason](store.path(5))
    store.being_written(7).mkdir()
    (tmp_path / "notes.txt").touch()
    assert store.newest().iteration == 3
    lines = [record.getMessage() for record in log.records]
    assert len(lines) == 2
    assert any(f"{store.path(5)} is passed over: {reason}" in line for line in lines)
    assert any("iter_0000007.tmp is passed over" in line and "temporary" in line for line in lines)
    with pytest.raises(ValueError, match=f"iter_0000005 is not complete: {reason}"):
        read_state(store.path(5))


def test_no_complete_one_is_an_error_but_a_first_save_cut_short_is_not(tmp_path):
    store = CheckpointStore(tmp_path)
    store.begin(3)
    assert store.newest() is None
    save(store, 3)
    (store.path(3) / "model.pth").unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoint.* iter_0000003: model.pth is m"):
        store.newest()


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
    return lambda: left


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
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(old, new):
        steps.append(f"-> {os.path.basename(new)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("this system does not name open files")
    save(CheckpointStore(tmp_path), 3)
    place = steps.index("-> iter_0000003")
    content = {"model.pth", "rank.pt", "language", "state.json", ".iter_0000003.tmp"}
    assert set(steps[:place]) == content and steps[place + 1 :] == [tmp_path.name]

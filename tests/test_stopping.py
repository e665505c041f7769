"""SIGTERM and SIGINT: the step is finished and saved, the run goes on exactly; workers survive."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from detectron2.engine import TrainerBase, launch
from detectron2.utils import comm
from toy_run import PAUSE, finish, start_script

from gella.data.sampling import start_worker
from gella.engine.evaluation_hooks import build_even_loader
from gella.engine.hooks import RunStopped, StopOnSignal
from gella.engine.launch import forwarded_signals


def test_a_stopped_run_of_two_processes_goes_on_to_the_same_weights(scenes, tmp_path):
    """A signal to the whole group, as ``scancel`` and ``timeout`` send it; the parent passes it on.

    `test_train_net.py` does the same with one process.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    two = ("--num-gpus", 2, "--dist-url", "auto")
    keys = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "100")
    uninterrupted = start_script(scenes, whole, *two, *keys)
    status, out, err = stopped(scenes, cut, 2, signal.SIGTERM, *two, *keys)
    assert status == 0 and "Traceback" not in err, err[-3000:]
    assert "stopped by SIGTERM after iteration 3 (of 0 to 5), which is saved" in out
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["iter_0000003"]
    for process, folder in (
        (uninterrupted, whole),
        (start_script(scenes, cut, "--resume", *two, *keys), cut),
    ):
        status, _, err = finish(process, folder)
        assert status == 0, err[-3000:]
    assert "Starting training from iteration 4" in (cut / "log.txt").read_text()
    expected, found = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (whole, cut)
    )
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def stopped(scenes, output, processes, number, *arguments):
    """Start the script, send its group a signal in iteration 3, and wait for its end."""
    process = start_script(scenes, output, *arguments, plugin=PAUSE)
    while not all((output / f"paused_{rank}").exists() for rank in range(processes)):
        assert process.poll() is None, (output / "err.txt").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, number)
    time.sleep(0.3)
    (output / "go").touch()
    return finish(process, output)


# -- a process that waits in a library -------------------------------------------------------------

# Waits in C, where Python runs no handler, until it is ended.
STUCK = """
import ctypes, sys
from types import SimpleNamespace
from gella.engine import hooks
from gella.utils import stopping
stopping.REPEAT_SECONDS, hooks.PATIENCE_SECONDS = float(sys.argv[1]), float(sys.argv[2])
hook = hooks.StopOnSignal(print)
hook.trainer = SimpleNamespace(iter=0, max_iter=9)
hook.before_train()
print("ready", flush=True)
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("repeat", "patience", "signals"),
    [(0.0, 900.0, [signal.SIGTERM, signal.SIGINT]), (900.0, 0.2, [signal.SIGINT])],
)
def test_a_second_signal_or_no_end_in_time_ends_it_at_once(repeat, patience, signals):
    """Even where the main thread waits for a lost process inside a library."""
    command = [sys.executable, "-c", STUCK, str(repeat), str(patience)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        _, error = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + signals[-1]
    assert "this step is finished and saved" in error and "ended without saving" in error


# -- processes around it ---------------------------------------------------------------------------


class Waiting(TrainerBase):
    """Waits in iteration 2 for the file "go"."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run_step(self):
        if self.iter == 2:
            (self.folder / f"paused_{comm.get_rank()}").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.02)


def wait_and_stop(folder):
    """One process of a run that is stopped; writes down after which iteration it ended."""
    trainer = Waiting(folder)
    trainer.register_hooks([StopOnSignal(lambda iteration: None)])
    with pytest.raises(RunStopped) as end:
        trainer.train(0, 9)
    (folder / f"ended_{comm.get_rank()}").write_text(f"{end.value}")


def signal_when(folder, only_rank):
    """Send SIGTERM to the starting process, or to one of its children, once all are waiting."""
    while len(list(folder.glob("paused_*"))) < 2:
        time.sleep(0.02)
    children = sorted(child.pid for child in multiprocessing.active_children())
    os.kill(children[0] if only_rank else os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    (folder / "go").touch()


@pytest.mark.parametrize("only_rank", [False, True])
def test_one_signal_stops_all_processes_at_one_iteration(tmp_path, monkeypatch, only_rank):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # else each process takes a GPU of its own
    thread = threading.Thread(target=signal_when, args=(tmp_path, only_rank))
    thread.start()
    with forwarded_signals(2):
        launch(wait_and_stop, 2, dist_url="auto", args=(tmp_path,))
    thread.join()
    ends = [(tmp_path / f"ended_{rank}").read_text() for rank in range(2)]
    assert all("after iteration 2 (of 0 to 8)" in end for end in ends)
    assert sum("SIGTERM" in end for end in ends) == (1 if only_rank else 2)


def ends_at_sigterm(ready):
    ready.set()
    time.sleep(1000)


def test_one_process_alone_keeps_its_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with forwarded_signals(1):
        assert signal.getsignal(signal.SIGTERM) is before


def test_processes_that_a_signal_ended_give_its_status():
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    child = context.Process(target=ends_at_sigterm, args=(ready,))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, forwarded_signals(2):
        child.start()
        ready.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        child.join(600)
        raise RuntimeError(f"a process ended with {child.exitcode}")
    assert end.value.code == 128 + signal.SIGTERM and child.exitcode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(RuntimeError, match="a bug"), forwarded_signals(2):
        raise RuntimeError("a bug")  # no signal came


def strangers(pid):
    """Both signals from a process that is not the parent, as from a terminal or a cluster."""
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)


def worker(ready, go):
    start_worker(0)
    ready.set()
    go.wait()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system has no sigwaitinfo")
def test_workers_obey_their_loader_only():
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=worker, args=(ready, go), daemon=True)
    process.start()
    try:
        ready.wait()
        strangers(process.pid)
        time.sleep(0.2)
        assert process.is_alive()
        process.terminate()
        process.join(600)
        assert process.exitcode == 0
    finally:
        process.kill()


def slow(record):
    time.sleep(0.05)
    return record


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system has no sigwaitinfo")
def test_an_evaluation_survives_a_signal_to_the_group():
    records = [{"image_id": number} for number in range(20)]
    batches = iter(build_even_loader(records, slow, batch_size=1, num_workers=1, name="D"))
    seen = [next(batches)]
    strangers(multiprocessing.active_children()[-1].pid)
    seen += batches
    assert [batch[0]["image_id"] for batch in seen] == list(range(20))

"""SIGTERM and SIGINT: the step is finished and saved, the run goes on exactly; workers survive."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from detectron2.engine import TrainerBase, launch
from detectron2.utils import comm
from toy_run import CONFIG, SCRIPT, SMALL

from gella.data.sampling import start_worker
from gella.engine.evaluation_hooks import build_even_loader
from gella.engine.hooks import RunStopped, StopOnSignal
from gella.engine.launch import forwarded_signals

# Stops every process in iteration 3 until the file "go" appears, so that signals hit that step.
PAUSE = """
import os, time
from detectron2.engine import HookBase
from detectron2.utils import comm
from gella.engine.trainer import GellaTrainer

class Pause(HookBase):
    def before_step(self):
        if self.trainer.iter == 3:
            folder = self.trainer.cfg.OUTPUT_DIR
            open(os.path.join(folder, f"paused_{comm.get_rank()}"), "w").close()
            while not os.path.exists(os.path.join(folder, "go")):
                time.sleep(0.02)

build_hooks = GellaTrainer.build_hooks
GellaTrainer.build_hooks = lambda self: [*build_hooks(self), Pause()]
"""


def started(scenes, output, processes, *options, pause=False):
    """Start the script on a config without evaluation; what it prints goes to files."""
    output.mkdir(exist_ok=True)
    pairs = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer"]
    pairs += ["OUTPUT_DIR", output, "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "100"]
    if pause:
        (output / "pause.py").write_text(PAUSE)
        pairs += ["DATASETS.MODULES", f"('{output}/pause.py',)"]
    command = [sys.executable, SCRIPT, "--config-file", CONFIG, "--num-gpus", processes]
    # One port per run, since a socket of the last one may linger.
    command += ["--dist-url", "auto", *options, *pairs]
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(scenes),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with open(output / "out.txt", "w") as out, open(output / "err.txt", "w") as err:
        # A group of its own, as a shell or a cluster makes one.
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )


def finished(process, output):
    """Wait for the end; returns the status and the printed lines."""
    try:
        status = process.wait(timeout=1800)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return status, (output / "out.txt").read_text().strip().splitlines()


def stopped(scenes, output, processes, send):
    """Run, call ``send(process)`` in iteration 3, and return the status and the printed lines."""
    process = started(scenes, output, processes, pause=True)
    deadline = time.monotonic() + 1800
    while not all((output / f"paused_{rank}").exists() for rank in range(processes)):
        assert process.poll() is None, (output / "err.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    send(process)
    time.sleep(0.3)
    (output / "go").touch()
    return finished(process, output)


def terminal(process):
    """Ctrl-C in a terminal: the whole group is hit, the loader's workers too."""
    os.killpg(process.pid, signal.SIGINT)


def cluster(process):
    """What ``scancel`` and ``timeout`` do: the whole group is hit, the parent passes it on too."""
    os.killpg(process.pid, signal.SIGTERM)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_weights(scenes, tmp_path, processes):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = started(scenes, whole, processes)
    send, name = (terminal, "SIGINT") if processes == 1 else (cluster, "SIGTERM")
    status, printed = stopped(scenes, cut, processes, send)
    assert status == 0, (cut / "err.txt").read_text()[-3000:]
    assert f"stopped by {name} after iteration 3 (of 0 to 5), which is saved" in printed
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["iter_0000003"]
    assert not (cut / "model_final.pth").exists()
    following = shlex.split(printed[-1].removeprefix("Next:"))
    assert following[:3] == ["python", str(SCRIPT), "--resume"]
    assert "Traceback" not in (cut / "err.txt").read_text()

    status, _ = finished(uninterrupted, whole)
    assert status == 0, (whole / "err.txt").read_text()[-3000:]
    status, _ = finished(started(scenes, cut, processes, "--resume"), cut)
    assert status == 0, (cut / "err.txt").read_text()[-3000:]
    assert "Starting training from iteration 4" in (cut / "log.txt").read_text()
    expected, found = weights(whole / "model_final.pth"), weights(cut / "model_final.pth")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    before = weights(cut / "checkpoints" / "iter_0000003" / "model.pth")
    assert any(not torch.equal(before[key], found[key]) for key in before)  # it did go on


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

"""Runs of several processes and machines: what starters set, what must be equal, how they end.

As a script: a process of a run, which writes what it found to ``FOLDER/rank<N>.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from toy_run import CONFIG, SCRIPT, SMALL

from gella.config import load_config
from gella.data.records import as_records
from gella.engine.launch import (
    LaunchError,
    UnequalRanks,
    check_agreement,
    config_facts,
    file_facts,
    launch_from_environment,
    record_facts,
    resume_command,
)

TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    **{"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM_", "GROUP_", "ROLE_")
needs_no_single_gpu = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="each process needs a GPU of its own, here is one"
)


@pytest.fixture
def started(monkeypatch):
    """Start a run that must not begin, in an environment of its own; arguments as changes."""

    def start(environment, **changes):
        for name in [name for name in os.environ if name.startswith(STARTERS)]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        values = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
        args = argparse.Namespace(**{**values, **changes})
        called = []
        launch_from_environment(called.append, args)
        assert called == [args] and not torch.distributed.is_initialized()

    return start


# -- what the starters say -------------------------------------------------------------------------

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**TORCHRUN, **ALONE},
        {**TORCHRUN, **ALONE, **SRUN},  # inside srun torchrun counts
        {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "host"},  # clusters that count machines so
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script is not a step
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_process_runs_in_this_one(started, environment):
    started(environment)


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({}, {**TORCHRUN, "WORLD_SIZE": "x"}, "torchrun .* RANK, WORLD_SIZE, .* set to numbers"),
        ({}, {"TORCHELASTIC_RUN_ID": "none"}, "not all set to numbers .'RANK'"),
        ({}, {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "4 processes with 3 on this machine"),
        ({}, SRUN, "srun has started 4 tasks, which would train apart.* torchrun"),
        ({"num_gpus": 8}, TORCHRUN, "torchrun has started 4.*rank 3.*--num-gpus is 8"),
        ({"num_machines": 2}, TORCHRUN, "--num-machines 2: leave both out"),
        ({"num_machines": 2, "machine_rank": 2}, {}, "--machine-rank is 2 but --num-machines 2"),
        ({"num_machines": 2, "machine_rank": 2}, SRUN, "--machine-rank is 2 but"),
        ({"num_machines": 2}, {}, "--dist-url is auto but there are 2 machines"),
    ],
)
def test_contradictions(started, changes, environment, message):
    with pytest.raises(LaunchError, match=message):
        started(environment, **changes)


def test_more_processes_than_gpus(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match="each sees 1 GPUs: .*--gpus-per-node instead"):
        started(TORCHRUN)
    with pytest.raises(LaunchError, match="--num-gpus is 2 but this machine has 1 GPUs"):
        started({}, num_gpus=2)


def test_nobody_at_the_address(started, monkeypatch):
    monkeypatch.setattr("gella.engine.launch.TIMEOUT", datetime.timedelta(seconds=1))
    port = str(free_port())
    with pytest.raises(LaunchError, match=f"rank 3 of 4 found no process group at 127.*:{port}"):
        started({**TORCHRUN, "MASTER_PORT": port})


def test_resume_command():
    argv = ["tools/train_net.py", "--config-file", "a b.yaml", "X", "1"]
    command = "python tools/train_net.py --resume --config-file 'a b.yaml' X 1"
    assert resume_command(argv, {}) == command
    assert resume_command(shlex.split(command)[1:], {}) == command
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}
    by_torchrun = command.replace("python", "torchrun --standalone --nproc-per-node 4", 1)
    assert resume_command(argv, torchrun) == by_torchrun
    several = resume_command(argv, {**torchrun, "GROUP_WORLD_SIZE": "2"})
    assert several.startswith("torchrun <its options") and several.endswith(command[7:])


# -- what must be equal ----------------------------------------------------------------------------


def test_facts(tmp_path):
    cfg = load_config(CONFIG)
    facts = config_facts(cfg)
    assert facts["config key SOLVER.BASE_LR"] == "0.001"
    assert facts["version of torch"] == importlib.metadata.version("torch")
    assert facts == config_facts(load_config(CONFIG))
    own = tmp_path / "own.py"
    own.write_text("a = 1\n")
    cfg.DATASETS.MODULES = (str(own),)
    before = config_facts(cfg)
    own.write_text("a = 2\n")
    changed = config_facts(cfg)
    assert {k for k in before if before[k] != changed[k]} == {f"code of DATASETS.MODULES {own}"}
    zero = tmp_path / "zero.json"
    zero.write_text('{"stage": 2}')
    cfg.SOLVER.ZERO.CONFIG = str(zero)
    before = config_facts(cfg)
    zero.write_text('{"stage": 3}')
    changed = config_facts(cfg)
    assert {k for k in before if before[k] != changed[k]} == {"file of SOLVER.ZERO.CONFIG"}

    records = as_records([{"image_id": i} for i in (1, 2, 3)])
    facts = record_facts("D", records)
    assert facts["D"].startswith("3 records")
    other = as_records([{"image_id": i} for i in (2, 1, 3)])
    assert facts != record_facts("D", other)

    assert file_facts("W", "") == file_facts("W", tmp_path / "absent") == {"W": "no file"}
    weights = tmp_path / "w.pth"
    content = bytearray(20 << 20)
    weights.write_bytes(content)
    first = file_facts("W", weights)
    assert "20,971,520 bytes" in first["W"]
    content[-1] = 0
    content[(20 << 20) // 64 * 5 + 17] = 1  # in one of the blocks that are read
    weights.write_bytes(content)
    assert file_facts("W", weights) != first
    folder = tmp_path / "checkpoint"
    (folder / "language").mkdir(parents=True)
    (folder / "language" / "a.pt").write_bytes(b"abc")
    first = file_facts("C", folder)
    (folder / "language" / "a.pt").write_bytes(b"abd")
    assert "3 bytes" in first["C"] and file_facts("C", folder) != first


def test_differences_are_named(monkeypatch):
    def gathered(*others):
        monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda mine: [mine, *others])

    mine = {"config key SEED": "1", "DATASETS.TRAIN": "5 records"}
    gathered(dict(mine), dict(mine))
    check_agreement(mine)
    gathered(dict(mine), {**mine, "DATASETS.TRAIN": "6 records"})
    expected = "DATASETS.TRAIN is 6 records on rank 2 but 5 records on rank 0: config, code"
    with pytest.raises(UnequalRanks, match=expected):
        check_agreement(mine)
    gathered({"DATASETS.TRAIN": "4 records", "more": "x"})
    expected = r"SEED is absent on rank 1 but 1 on rank 0 \(2 more differ: DATASETS.TRAIN, more\)"
    with pytest.raises(UnequalRanks, match=expected):
        check_agreement(mine)


# -- command lines, with processes -----------------------------------------------------------------


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(commands, folder, expected=0, **variables):
    """Run commands at once, each in a process group of its own; returns what they printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(STARTERS)}
    environment = {**clean, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    processes = []
    for number, command in enumerate(commands):
        with open(folder / f"{number}.txt", "w", encoding="utf-8") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            )
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    printed = "\n".join((folder / f"{i}.txt").read_text() for i in range(len(commands)))
    assert set(codes) == {expected}, printed
    return printed


def by_torchrun(script, *options, machines=1):
    """torchrun with two processes on each machine, all of them here."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    command = ["-m", "torch.distributed.run", "--nnodes", machines, "--nproc-per-node", 2]
    return [[*command, *meeting, script, *options]] * machines


def by_detectron2(script, *options):
    """Two machines of one process each, both here."""
    machines = ("--num-gpus", 1, "--num-machines", 2)
    machines += ("--dist-url", f"tcp://127.0.0.1:{free_port()}")
    return [[script, *machines, "--machine-rank", i, *options] for i in range(2)]


@needs_no_single_gpu
@pytest.mark.parametrize(
    ("starter", "local"),
    [
        # (rank on the machine, processes of the machine, sum of 10^rank over the machine)
        (
            lambda *command: by_torchrun(*command, machines=2),
            [(0, 2, 11), (1, 2, 11), (0, 2, 1100), (1, 2, 1100)],
        ),
        (by_detectron2, [(0, 1, 1), (0, 1, 10)]),
    ],
    ids=["torchrun", "detectron2"],
)
def test_processes_find_each_other(tmp_path, starter, local):
    run(starter(__file__, tmp_path), tmp_path)
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    # Agents of torchrun may number the machines either way.
    assert sorted(tuple(r["local"]) for r in reports) == sorted(local)
    for report in reports:
        assert report["world"] == len(local) and report["total"] == sum(
            10**rank for rank in range(len(local))
        )
        assert report["unequal"].startswith("version of x is 1.0 on rank 1 but 0.0 on rank 0")


@needs_no_single_gpu
def test_a_users_error_in_a_started_process_is_status_2(tmp_path):
    command = [__file__, "--num-gpus", 2, "--dist-url", "auto", tmp_path, "fail"]
    assert "Traceback" not in run([command], tmp_path, expected=2)


def options(scenes, output):
    """Arguments of a short training."""
    keys = ["MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer", "OUTPUT_DIR", output]
    keys += ["SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", "()"]
    return ["--config-file", CONFIG, *SMALL, *keys]


def test_the_same_training_by_every_starter(scenes, tmp_path):
    weights = []
    for starter in (by_torchrun, by_detectron2):
        output = tmp_path / starter.__name__
        output.mkdir()
        run(starter(SCRIPT, *options(scenes, output)), output, DETECTRON2_DATASETS=str(scenes))
        assert "World size: 2" in (output / "log.txt").read_text()
        weights.append(torch.load(output / "model_final.pth", weights_only=True)["model"])
    one, other = weights
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_unequal_configs_end_both_processes(scenes, tmp_path):
    commands = by_detectron2(SCRIPT, *options(scenes, tmp_path))
    commands = [[*c, "SOLVER.BASE_LR", rate] for c, rate in zip(commands, ("0.1", "0.2"))]
    printed = run(commands, tmp_path, expected=2, DETECTRON2_DATASETS=str(scenes))
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "config key SOLVER.BASE_LR is 0.2 on rank 1 but 0.1 on rank 0" in line
    assert not (tmp_path / "model_final.pth").exists()


def report(args):
    """What one process of the run finds; ``opts`` are the folder and, to end it, "fail"."""
    folder, *fail = args.opts
    rank = comm.get_rank()
    if fail and rank == 1:
        raise SystemExit(2)
    if fail:  # the other one is ended by whoever started both
        signal.pause()
    total, local = torch.tensor(10**rank), torch.tensor(10**rank)
    torch.distributed.all_reduce(total)
    # Each Detectron2 has its own name for the processes of this machine.
    group = getattr(comm, "_LOCAL_PROCESS_GROUP", None) or comm._LOCAL_GROUP
    torch.distributed.all_reduce(local, group=group)
    try:
        check_agreement({"same": "1", "version of x": f"{min(rank, 1)}.0"})
        unequal = ""
    except UnequalRanks as error:
        unequal = str(error)
    found = {
        "world": comm.get_world_size(),
        "total": int(total),
        "local": [comm.get_local_rank(), comm.get_local_size(), int(local)],
        "unequal": unequal,
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        launch_from_environment(report, default_argument_parser().parse_args())
    except LaunchError as error:
        sys.exit(f"error: {error}")

"""Runs of several processes and machines: what each starter sets, and the command lines."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gella.config import load_config
from gella.data.records import as_records
from gella.engine.agreement import (
    UnequalRanks,
    check_agreement,
    config_facts,
    file_facts,
    record_facts,
)
from gella.engine.launch import (
    LaunchError,
    Placement,
    first_host,
    launch_from_environment,
    placement_from_environment,
)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "train_net.py"
CONFIG = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
REPORT = str(Path(__file__).with_name("launch_report.py"))
TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    **{"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"},
}
# As srun sets them on the second of two machines with two tasks each.
SRUN = {
    **{"SLURM_JOB_ID": "31234567", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
    **{"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "gpu[03-04]"},
}
STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM_", "GROUP_", "ROLE_")
needs_no_single_gpu = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="each process needs a GPU of its own, here is one"
)


def without(environment, *names, **changes):
    """A copy of an environment, changed."""
    return {**{k: v for k, v in environment.items() if k not in names}, **changes}


def arguments(**changes):
    """Detectron2's arguments of a start without options."""
    values = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **changes}
    return argparse.Namespace(**values)


# -- what the starters say -------------------------------------------------------------------------


def test_torchrun():
    expected = Placement("torchrun", 3, 4, 1, 2, "env://")
    assert placement_from_environment(TORCHRUN) == expected
    # inside srun torchrun counts, and so do its variables without its name
    assert placement_from_environment({**SRUN, **TORCHRUN}) == expected
    assert placement_from_environment(without(TORCHRUN, "TORCHELASTIC_RUN_ID")) == expected
    # clusters that count machines so are not torchrun; nor is one process a run of several
    counted = without(TORCHRUN, "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert placement_from_environment(counted) is None
    alone = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {"WORLD_SIZE": "1"}
    assert placement_from_environment({**TORCHRUN, **alone, "LOCAL_WORLD_SIZE": "1"}) is None
    assert placement_from_environment({}) is None


def test_srun():
    expected = Placement("srun", 2, 4, 0, 2, "tcp://gpu03:24567")
    assert placement_from_environment(SRUN) == expected
    assert placement_from_environment({**SRUN, "SLURM_STEP_ID": "3"}).init_method[-5:] == "24570"
    # the step's own numbers go before those of the whole job
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    place = {**step, "SLURM_STEP_NODELIST": "a1,b2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    expected = Placement("srun", 5, 8, 1, 4, "tcp://a1:24567")
    assert placement_from_environment({**SRUN, **place}) == expected
    chosen = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    assert placement_from_environment({**SRUN, **chosen}).init_method == "tcp://10.0.0.7:1234"
    # a batch script is not a step, and one task is not a run of several
    assert placement_from_environment(without(SRUN, "SLURM_STEP_ID")) is None
    assert placement_from_environment({**SRUN, "SLURM_STEP_ID": "4294967291"}) is None
    assert placement_from_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(TORCHRUN, "RANK"), "torchrun started this process but RANK is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', not a number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "started 4 processes with 3 on this machine"),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, "rank 3 of 4, number 0 of 2 on its machine"),
        ({**SRUN, "SLURM_PROCID": "1"}, "rank 1 of 4, number 0 of 2.*--distribution=block"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "srun placed 3,1 tasks"),
        (without(SRUN, "SLURM_NTASKS_PER_NODE"), "srun placed none tasks"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SRUN, "SLURM_NODELIST"), "node list '' is not readable"),
    ],
)
def test_unusable_environments(environment, message):
    with pytest.raises(LaunchError, match=message):
        placement_from_environment(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("localhost", "localhost"),
        ("gpu[03-05,09],big1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack[0-1]n[010-011]-ib", "rack0n010-ib"),
        ("n1.example.org,n2.example.org", "n1.example.org"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "gpu[", "gpu[1-2"])
def test_no_first_host(nodes):
    with pytest.raises(LaunchError, match="not readable"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"num_gpus": 8}, TORCHRUN, "torchrun has started 4.*rank 3.*--num-gpus is 8"),
        ({"num_machines": 2}, TORCHRUN, "--num-machines 2: leave both out"),
        ({"num_gpus": 8}, SRUN, "srun has started 4 processes.*--num-gpus is 8"),
        ({"num_machines": 2, "machine_rank": 2}, {}, "--machine-rank is 2 but --num-machines 2"),
        ({"num_machines": 2, "machine_rank": 2}, SRUN, "--machine-rank is 2 but"),
        ({"num_machines": 2}, {}, "--dist-url is auto but there are 2 machines"),
    ],
)
def test_contradicting_arguments(changes, environment, message):
    def never(args):
        raise AssertionError("was called")

    with pytest.raises(LaunchError, match=message):
        launch_from_environment(never, arguments(**changes), environment)


def test_one_process_runs_in_this_one():
    called = []
    launch_from_environment(called.append, arguments(), {})
    assert called == [arguments()] and not torch.distributed.is_initialized()


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
    assert {k for k in before if before[k] != changed[k]} == {"code of DATASETS.MODULES"}
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
    assert record_facts("D", [1, 2]) == {"D": "2 records"}

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


def start(command, folder, name, **variables):
    """Start a command in a process group of its own; its output goes to ``folder/name``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(STARTERS)}
    environment = {**clean, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    with open(Path(folder) / name, "w", encoding="utf-8") as stream:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def finish(processes, timeout=300):
    """Wait for all; returns their exit statuses, and leaves none behind."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def by_torchrun(script, folder, *options):
    """torchrun with two processes on this machine."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, *rendezvous, script]
    return [start([*command, *options], folder, "torchrun.txt")]


def by_detectron2(script, folder, *options):
    """Two machines of one process each, both here."""
    url = f"tcp://127.0.0.1:{free_port()}"
    where = ("--num-gpus", 1, "--num-machines", 2, "--dist-url", url)
    return [
        start([script, *where, "--machine-rank", i, *options], folder, f"machine{i}.txt")
        for i in range(2)
    ]


def by_srun(script, folder, *options, machines=1, tasks=2, **changes):
    """What srun does, on this machine: a process per task, with SLURM's variables."""
    fixed = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost"}
    fixed |= {"SLURM_NTASKS": str(machines * tasks), "SLURM_NTASKS_PER_NODE": str(tasks)}
    fixed |= {"MASTER_PORT": str(free_port()), **changes}
    return [
        start(
            [script, *options],
            folder,
            f"task{i}.txt",
            **{**fixed, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % tasks)},
        )
        for i in range(machines * tasks)
    ]


def reports(folder):
    """What the processes of launch_report.py wrote, by rank."""
    paths = sorted(folder.glob("rank*.json"))
    return [json.loads(path.read_text()) for path in paths]


@needs_no_single_gpu
@pytest.mark.parametrize("starter", [by_torchrun, by_detectron2, by_srun])
def test_processes_find_each_other(tmp_path, starter):
    codes = finish(starter(REPORT, tmp_path, tmp_path))
    assert set(codes) == {0}, "\n".join(p.read_text() for p in tmp_path.glob("*.txt"))
    machine_of_one = starter is by_detectron2
    for rank, report in enumerate(reports(tmp_path)):
        assert report["world"] == 2 and report["total"] == 11.0
        assert report["local_rank"] == (0 if machine_of_one else rank)
        assert report["local_size"] == (1 if machine_of_one else 2)
        assert report["local_total"] == (10.0**rank if machine_of_one else 11.0)
        assert report["unequal"].startswith("version of x is 1.0 on rank 1 but 0.0 on rank 0")
    assert len(reports(tmp_path)) == 2


@needs_no_single_gpu
def test_local_groups_of_two_machines(tmp_path):
    codes = finish(by_srun(REPORT, tmp_path, tmp_path, machines=2))
    assert set(codes) == {0}
    found = [(r["world"], r["local_rank"], r["local_size"]) for r in reports(tmp_path)]
    assert found == [(4, 0, 2), (4, 1, 2), (4, 0, 2), (4, 1, 2)]
    assert [r["local_total"] for r in reports(tmp_path)] == [11.0, 11.0, 1100.0, 1100.0]


@needs_no_single_gpu
def test_a_users_error_in_a_started_process_is_status_2(tmp_path):
    options = ("--num-gpus", 2, "--dist-url", "auto", tmp_path, "fail")
    assert finish([start([REPORT, *options], tmp_path, "out.txt")]) == [2]
    assert "Traceback" not in (tmp_path / "out.txt").read_text()


def test_nobody_at_the_address(monkeypatch):
    monkeypatch.setattr("gella.engine.launch.TIMEOUT", datetime.timedelta(seconds=1))
    port = str(free_port())
    changes = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_PORT": port}
    environment = {**SRUN, **changes, "MASTER_ADDR": "127.0.0.1"}
    expected = f"rank 3 of 4 found no process group at tcp://127.0.0.1:{port}"
    with pytest.raises(LaunchError, match=expected):
        launch_from_environment(print, arguments(), environment)


# -- the training script ---------------------------------------------------------------------------

SMALL = [
    *("MODEL.IMAGE_ENCODER.WIDTH", "32", "MODEL.IMAGE_ENCODER.LAYERS", "2"),
    *("MODEL.RESOBLEND.DIM", "32", "MODEL.MASK_DECODER.HIDDEN_DIM", "32"),
    *("MODEL.MASK_DECODER.MASK_DIM", "32", "MODEL.MASK_DECODER.DECODER_LAYERS", "1"),
    *("MODEL.LANGUAGE.HIDDEN_SIZE", "32", "MODEL.LANGUAGE.INTERMEDIATE_SIZE", "64"),
    *("MODEL.LANGUAGE.NUM_LAYERS", "1", "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.MAX_ITER", "3", "DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", "()"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with a few drawn scenes."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
    options = ["--output", str(folder / "shapes"), "--train", "8", "--val", "2"]
    subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    return folder


def options(scenes, output):
    """Arguments of a short training."""
    tokenizer = ("MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer")
    return ["--config-file", CONFIG, *SMALL, *tokenizer, "OUTPUT_DIR", output]


def test_the_same_training_by_every_starter(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes))
    weights = []
    for starter in (by_torchrun, by_detectron2, by_srun):
        output = tmp_path / starter.__name__
        output.mkdir()
        codes = finish(starter(SCRIPT, output, *options(scenes, output)))
        assert set(codes) == {0}, "\n".join(p.read_text() for p in output.glob("*.txt"))
        assert "World size: 2" in (output / "log.txt").read_text()
        weights.append(torch.load(output / "model_final.pth", weights_only=True)["model"])
    for other in weights[1:]:
        assert [k for k in weights[0] if not torch.equal(weights[0][k], other[k])] == []


def test_unequal_configs_end_both_processes(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes))
    fixed = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost"}
    fixed |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    processes = [
        start(
            [SCRIPT, *options(scenes, tmp_path), "SOLVER.BASE_LR", rate],
            tmp_path,
            f"task{rank}.txt",
            **{**fixed, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank, rate in enumerate(("0.1", "0.2"))
    ]
    assert finish(processes) == [2, 2]
    lines = [
        line
        for rank in range(2)
        for line in (tmp_path / f"task{rank}.txt").read_text().splitlines()
        if line.startswith("error: ")
    ]
    (line,) = lines
    assert "config key SOLVER.BASE_LR is 0.2 on rank 1 but 0.1 on rank 0" in line
    assert not (tmp_path / "model_final.pth").exists()

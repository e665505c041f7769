"""How the processes of one run find each other, what they must agree on, and how they end.

torchrun, alone or inside SLURM's ``srun``, starts the processes and tells each its place by
environment variables. Without it Detectron2's ``launch`` starts them here. docs/TRAINING.md has the
command lines.

A run whose machines hold other files trains without a complaint, on weights that drift apart or
batches that leave images out; so config, versions, code, datasets and weights are compared once,
before it trains.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import hashlib
import logging
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from gella.utils.io import versions
from gella.utils.stopping import StopRequest

TIMEOUT = datetime.timedelta(minutes=30)  # Detectron2's, for a rank that does not answer
USER_ERROR = 2  # exit status of a process that has told the user what is wrong
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Distributions whose version can change what a run computes.
PACKAGES = (
    *("torch", "numpy", "transformers", "tokenizers", "timm", "open_clip_torch"),
    *("deepspeed", "peft", "bitsandbytes", "fvcore", "pycocotools"),
)
_BLOCK, _NUM_BLOCKS = 1 << 16, 64  # bytes, and how many blocks of a large file are read


class LaunchError(ValueError):
    """The processes of the run cannot be started or joined as the user asked."""


def launch_from_environment(
    main: Callable[[Any], Any], args: Any, before: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Call the importable ``main(args)`` in every process of the run, in its process group.

    Started by torchrun, this process joins the others. Otherwise Detectron2's ``launch`` starts
    ``args.num_gpus`` processes on this machine. The backend is NCCL with a CUDA device, else Gloo;
    ``detectron2.utils.comm`` knows the local group either way.

    ``before(processes, local)`` is called once on each machine, before any process joins another,
    with their number in all and here.

    Raises:
        LaunchError: arguments that contradict each other or the environment, or the machine.
        SystemExit: with status 2 if a process that was started here ended with a user's error.
    """
    # RANK and WORLD_SIZE alone are no sign: some clusters set them to count machines.
    if "TORCHELASTIC_RUN_ID" in os.environ or all(name in os.environ for name in _TORCHRUN):
        if _join_torchrun(args, before):
            _run(main, args)
            return
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and args.num_machines == 1:
        raise LaunchError(
            f"srun has started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, which would train apart:"
            " start one task per machine, with torchrun in it (docs/TRAINING.md)"
        )
    gpus = torch.cuda.device_count()
    if args.num_gpus > gpus > 0:
        raise LaunchError(f"--num-gpus is {args.num_gpus} but this machine has {gpus} GPUs")
    if not 0 <= args.machine_rank < args.num_machines:
        raise LaunchError(
            f"--machine-rank is {args.machine_rank} but --num-machines {args.num_machines}: number"
            " the machines from 0"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise LaunchError(
            f"--dist-url is {args.dist_url} but there are {args.num_machines} machines: give"
            " tcp://HOST:PORT, a free port of machine 0, the same on all"
        )
    machines = {"num_machines": args.num_machines, "machine_rank": args.machine_rank}
    machines["dist_url"] = args.dist_url
    before(args.num_gpus * args.num_machines, args.num_gpus)
    try:
        with forwarded_signals(args.num_gpus * args.num_machines):
            launch(functools.partial(_run, main), args.num_gpus, args=(args,), **machines)
    except ProcessExitedException as error:
        if error.exit_code == USER_ERROR:  # that process has printed its one line
            raise SystemExit(USER_ERROR) from None
        raise


def _join_torchrun(args: Any, before: Callable[[int, int], None]) -> bool:
    """Join the process group that torchrun describes; False if this process is the only one."""
    try:
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in _TORCHRUN[:4])
    except (KeyError, ValueError) as error:
        raise LaunchError(
            f"torchrun started this process but {', '.join(_TORCHRUN[:4])} are not all set to"
            f" numbers ({error})"
        ) from error
    if size == 1:
        return False
    if args.num_gpus > 1 or args.num_machines > 1:
        raise LaunchError(
            f"torchrun has started {size} processes (this is rank {rank}) but --num-gpus is"
            f" {args.num_gpus} and --num-machines {args.num_machines}: leave both out, or start one"
            " process without torchrun"
        )
    if size % local_size:
        raise LaunchError(
            f"torchrun started {size} processes with {local_size} on this machine: start equally"
            " many on each machine"
        )
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise LaunchError(
            f"torchrun started {local_size} processes on this machine but each sees {gpus} GPUs:"
            " start one process per GPU and let each see all of them (srun: --gpus-per-node instead"
            " of --gpus-per-task)"
        )
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if local_rank == 0:
        before(size, local_size)
        # Before any log is set up, and the last that is heard for long if a machine is missing.
        text = f"rank {rank} of {size}, started by torchrun, waits for the others at {address}"
        print(text, file=sys.stderr, flush=True)
    try:
        # From the environment: torchrun itself may already serve the store at that port.
        dist.init_process_group("nccl" if gpus else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank} of {size} found no process group at {address}"
            f" ({str(error).splitlines()[0]}): check that rank 0's machine is reachable at that"
            " address and the port is free"
        ) from error
    comm.create_local_process_group(local_size)
    if gpus:
        torch.cuda.set_device(local_rank)
    comm.synchronize()  # nobody runs on before all have joined
    return True


def _run(main: Callable[[Any], Any], args: Any) -> None:
    """Call ``main(args)``; end the process there if it is in a process group."""
    try:
        main(args)
    except SystemExit as end:
        if end.code and dist.is_initialized():
            _end(end.code if isinstance(end.code, int) else 1)
        if end.code:
            raise
    leave_process_group()


def leave_process_group() -> None:
    """Wait for the other processes of the group, then end this one, with status 0.

    Without a process group it returns at once. Functions registered with ``atexit`` run; the end of
    the interpreter does not. Whoever still holds a group (Detectron2's comm, DeepSpeed, and default
    values of torch's own functions do) keeps its threads alive, and one of them that drops a tensor
    while the interpreter ends aborts the process.
    """
    if dist.is_initialized():
        comm.synchronize()
        dist.destroy_process_group()
        _end(0)


def _end(status: int) -> NoReturn:
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def forwarded_signals(processes: int) -> Iterator[None]:
    """Let the process that starts others pass SIGTERM and SIGINT on, and wait for their end.

    To be put around Detectron2's ``launch``. Without it the signal would end this process at once
    and leave the others to themselves. One process changes nothing: it has a hook of its own.

    Raises:
        SystemExit: status 128 + signal if the processes could not end well after a signal.
    """
    if processes <= 1:
        yield
        return

    def forward(number: int) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                if child.pid is not None:
                    os.kill(child.pid, number)

    with StopRequest(forward, forward) as request:
        try:
            yield
        except Exception as error:
            if not request.number:
                raise
            print(f"ended by a signal: {' '.join(str(error).split())[-300:]}", file=sys.stderr)
            raise SystemExit(request.status) from error


def resume_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return the command line that goes on with a run.

    ``arguments`` are ``sys.argv`` of the run. The environment tells that torchrun started it, but
    not where the nodes of several met, so that this part is left to the reader.
    """
    script, *options = arguments
    if "--resume" not in options:
        options = ["--resume", *options]
    command = shlex.join([script, *options])
    if "TORCHELASTIC_RUN_ID" not in environment:
        return f"python {command}"
    if environment.get("GROUP_WORLD_SIZE", "1") != "1":
        return f"torchrun <its options, on every node> {command}"
    return f"torchrun --standalone --nproc-per-node {environment['LOCAL_WORLD_SIZE']} {command}"


class UnequalRanks(ValueError):
    """The processes of a run do not agree; raised on all of them with the same message."""


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compare what each process says with what rank 0 says; every process must call this.

    ``facts`` are short texts by names that tell the user what they are. Raises UnequalRanks, the
    same on all processes, with the first rank that differs, what differs, and both values.
    """
    first, *others = comm.all_gather(dict(facts))
    for rank, theirs in enumerate(others, start=1):
        names = [n for n in (*first, *(theirs.keys() - first)) if first.get(n) != theirs.get(n)]
        if not names:
            continue
        name = names[0]
        more = f" ({len(names) - 1} more differ: {', '.join(names[1:4])})" if names[1:] else ""
        raise UnequalRanks(
            f"{name} is {theirs.get(name, 'absent')} on rank {rank} but"
            f" {first.get(name, 'absent')} on rank 0{more}: config, code, packages, data and"
            " weights must be equal on all machines"
        )


def config_facts(cfg: Any) -> dict[str, str]:
    """Every key of the config, the versions of the packages, and the code of this one.

    Files that ``DATASETS.MODULES`` names are taken as code; DeepSpeed's file, the language model's
    and the tokenizer belong to the config.
    """
    keys = flatten_results_dict(cfg).items()
    facts = {f"config key {name.replace('/', '.')}": repr(value) for name, value in keys}
    facts |= {f"version of {name}": text for name, text in versions(PACKAGES).items()}
    facts |= file_facts("code of gella", Path(__file__).parents[1], "*.py")
    for module in cfg.DATASETS.MODULES:
        facts |= file_facts(f"code of DATASETS.MODULES {module}", module)
    language = cfg.MODEL.LANGUAGE
    facts |= file_facts("file of SOLVER.ZERO.CONFIG", cfg.SOLVER.ZERO.CONFIG)
    facts |= file_facts("file of MODEL.LANGUAGE.CONFIG", language.CONFIG)
    facts |= file_facts("files of MODEL.LANGUAGE.TOKENIZER", language.TOKENIZER)
    return facts


def record_facts(name: str, records: Any) -> dict[str, str]:
    """Number and order of a dataset's records (`gella.data.records.Records`) under a name."""
    order = hashlib.sha256("\n".join(records.image_ids().tolist()).encode()).hexdigest()
    return {name: f"{len(records):,} records (order {order[:8]})"}


def file_facts(name: str, path: str | Path, pattern: str = "*") -> dict[str, str]:
    """Size and a digest of a file, of the files of a folder, or that there is none.

    A large file is read at 64 places only, which tells any two trainings apart in milliseconds.
    ``name`` is what the user knows it as; ``path`` may not exist, "" is none.
    """
    source = Path(path)
    if not path or not source.exists():
        return {name: "no file"}
    files = sorted(p for p in source.rglob(pattern) if p.is_file()) if source.is_dir() else [source]
    digest, size = hashlib.sha256(), 0
    for file in files:
        length = file.stat().st_size
        size += length
        digest.update(f"{file.relative_to(source)} {length}\n".encode())
        step = max(_BLOCK, length // _NUM_BLOCKS)
        with open(file, "rb") as stream:
            for start in range(0, length, step):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return {name: f"{source.name}, {size:,} bytes (digest {digest.hexdigest()[:8]})"}

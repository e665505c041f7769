"""How the processes of one run find each other: torchrun, SLURM's srun, or Detectron2's launch.

Whoever starts the processes tells each its place by environment variables (torchrun: RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; srun: SLURM_PROCID and others).
Where neither did, Detectron2's ``launch`` starts them here. docs/TRAINING.md has the command lines.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import defaults, launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from gella.engine.stopping import forwarded_signals

__all__ = [
    "LaunchError",
    "Placement",
    "data_parallel_on",
    "first_host",
    "launch_from_environment",
    "leave_process_group",
    "placement_from_environment",
]

TIMEOUT = datetime.timedelta(minutes=30)  # Detectron2's, for a rank that does not answer
USER_ERROR = 2  # exit status of a process that has told the user what is wrong
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_STEP = 0xFFFFFFF0  # SLURM's numbers from here on stand for batch scripts and the like


class LaunchError(ValueError):
    """The processes of the run cannot be started or joined as the user asked."""


@dataclass(frozen=True)
class Placement:
    """Place of this process among those of a run that something else has started.

    Attributes:
        starter: who started it, "torchrun" or "srun".
        rank: of this process, 0..world_size - 1.
        world_size: number of processes.
        local_rank: of this process on its machine, 0..local_size - 1.
        local_size: processes per machine, the same on all.
        init_method: where the processes meet, as ``torch.distributed`` takes it.
    """

    starter: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    init_method: str

    def __post_init__(self) -> None:
        """Refuse a placement whose machines do not hold equally many consecutive ranks.

        Raises:
            LaunchError: with the numbers.
        """
        place = f"rank {self.rank} of {self.world_size}, number {self.local_rank} of"
        place += f" {self.local_size} on its machine"
        if self.local_size < 1 or self.world_size % self.local_size:
            raise LaunchError(
                f"{self.starter} started {self.world_size} processes with {self.local_size} on this"
                " machine: start equally many on each machine"
            )
        if self.local_rank != self.rank % self.local_size or self.rank >= self.world_size:
            raise LaunchError(
                f"{self.starter} made this process {place}: each machine must hold consecutive"
                " ranks (srun: --distribution=block)"
            )


def placement_from_environment(environment: Mapping[str, str]) -> Placement | None:
    """Read what torchrun or srun told this process; torchrun counts first, as it runs inside srun.

    Args:
        environment: such as ``os.environ``.

    Returns:
        None if neither of them started this process, or if it is the only one.

    Raises:
        LaunchError: a variable is missing or no number, or the placement is not usable.
    """
    # RANK and WORLD_SIZE alone are no sign: some clusters set them to count machines.
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment or all(n in environment for n in _TORCHRUN)
    placement = _of_torchrun(environment) if by_torchrun else _of_srun(environment)
    return placement if placement is not None and placement.world_size > 1 else None


def launch_from_environment(
    main: Callable[[Any], Any], args: Any, environment: Mapping[str, str] | None = None
) -> None:
    """Call ``main(args)`` in every process of the run, with the process group joined.

    Started by torchrun or by srun with several tasks, this process joins the others. Otherwise
    Detectron2's ``launch`` starts ``args.num_gpus`` processes on this machine. The backend is NCCL
    with a CUDA device, else Gloo; ``detectron2.utils.comm`` knows the local group either way.

    Args:
        main: an importable function of ``args``.
        args: what ``default_argument_parser`` parsed.
        environment: in place of ``os.environ``.

    Raises:
        LaunchError: arguments that contradict each other or the environment, or the machine.
        SystemExit: with status 2 if a process that was started here ended with a user's error.
    """
    environment = os.environ if environment is None else environment
    placement = placement_from_environment(environment)
    if placement is None or (placement.starter == "srun" and args.num_machines > 1):
        _launch(main, args)
        return
    if args.num_gpus > 1 or args.num_machines > 1:
        raise LaunchError(
            f"{placement.starter} has started {placement.world_size} processes (this is rank"
            f" {placement.rank}) but --num-gpus is {args.num_gpus} and --num-machines"
            f" {args.num_machines}: leave both out, or start one process without"
            f" {placement.starter}"
        )
    _join(placement)
    _run(main, args)


@contextlib.contextmanager
def data_parallel_on(device: str) -> Iterator[None]:
    """Let Detectron2's default trainer be made for a model on the CPU, in several processes.

    Its wrapper for distributed training names a GPU unless told otherwise, and the trainer does not
    tell it.

    Args:
        device: ``MODEL.DEVICE``; nothing changes for "cuda...".
    """
    plain = defaults.create_ddp_model
    if not device.startswith("cuda"):
        defaults.create_ddp_model = functools.partial(plain, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = plain


def first_host(nodes: str) -> str:
    """First host of a SLURM node list such as ``gpu[03-05,09],big1``.

    Raises:
        LaunchError: the list is empty or not of that form.
    """
    match = re.match(r"(?:[^,\[\]]|\[[0-9,\-]+\])+(?=,|$)", nodes.strip())
    if match is None:
        raise LaunchError(f"SLURM's node list {nodes!r} is not readable: set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match.group())


def _number(environment: Mapping[str, str], name: str, starter: str) -> int:
    text = environment.get(name)
    if text is None or not text.strip().isdigit():
        found = "is not set" if text is None else f"is {text!r}, not a number"
        raise LaunchError(f"{starter} started this process but {name} {found}")
    return int(text)


def _of_torchrun(environment: Mapping[str, str]) -> Placement:
    rank, world_size, local_rank, local_size = (
        _number(environment, name, "torchrun") for name in _TORCHRUN[:4]
    )
    # "env://" and not an address: torchrun itself may already serve the store at that port.
    return Placement("torchrun", rank, world_size, local_rank, local_size, "env://")


def _of_srun(environment: Mapping[str, str]) -> Placement | None:
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but only a step has a step id.
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if "SLURM_PROCID" not in environment or not step.isdigit() or int(step) >= _NO_STEP:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world_size = _number(environment, tasks, "srun")
    if world_size == 1:
        return None
    address = environment.get("MASTER_ADDR") or first_host(
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    )
    port = environment.get("MASTER_PORT")
    if not port:
        # Below the ports that systems hand out, and another one for each job of a machine.
        port = str(20000 + (_number(environment, "SLURM_JOB_ID", "srun") + int(step)) % 10000)
    return Placement(
        "srun",
        _number(environment, "SLURM_PROCID", "srun"),
        world_size,
        _number(environment, "SLURM_LOCALID", "srun"),
        _tasks_per_node(environment),
        f"tcp://{address}:{port}",
    )


def _tasks_per_node(environment: Mapping[str, str]) -> int:
    # "8(x2)" is twice 8, "8,4" is 8 and 4; the second is only set where the option was given.
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    text = next((environment[name] for name in names if name in environment), "none")
    counts = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", text)}
    if len(counts) != 1:
        raise LaunchError(
            f"srun placed {text} tasks on the machines: equally many are needed on each"
            " (srun: --ntasks-per-node)"
        )
    return counts.pop()


def _join(placement: Placement) -> None:
    gpus = torch.cuda.device_count()
    if 0 < gpus < placement.local_size:
        raise LaunchError(
            f"{placement.starter} started {placement.local_size} processes on this machine but each"
            f" sees {gpus} GPUs: start one process per GPU and let each see all of them"
            " (srun: --gpus-per-node instead of --gpus-per-task)"
        )
    if placement.local_rank == 0:
        # Before any log is set up, and the last that is heard for long if a machine is missing.
        text = f"rank {placement.rank} of {placement.world_size}, started by {placement.starter},"
        print(text, f"waits for the others at {placement.init_method}", file=sys.stderr, flush=True)
    try:
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            init_method=placement.init_method,
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {placement.rank} of {placement.world_size} found no process group at"
            f" {placement.init_method} ({str(error).splitlines()[0]}): check that rank 0's machine"
            " is reachable at that address and the port is free"
        ) from error
    comm.create_local_process_group(placement.local_size)
    if gpus:
        torch.cuda.set_device(placement.local_rank)
    comm.synchronize()  # nobody runs on before all have joined


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


def _launch(main: Callable[[Any], Any], args: Any) -> None:
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
    try:
        with forwarded_signals(args.num_gpus * args.num_machines):
            launch(
                functools.partial(_run, main),
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except ProcessExitedException as error:
        if error.exit_code == USER_ERROR:  # that process has printed its one line
            raise SystemExit(USER_ERROR) from None
        raise

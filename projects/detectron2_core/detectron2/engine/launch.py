"""Start of one process per GPU."""

from __future__ import annotations

import atexit
import datetime
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: datetime.timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Call ``main_func(*args)`` in this process, or in ``num_gpus_per_machine`` new processes.

    Call it once on every machine. With more than one process in all, a process group is set up
    (NCCL if there are GPUs, else Gloo) and ``main_func`` must be importable by the new processes.
    ``dist_url``: where rank 0 listens, "auto" for a free local port (one machine only).
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if dist_url == "auto":
        if num_machines != 1:
            raise AssertionError(f"dist_url 'auto' is for 1 machine, not {num_machines}")
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    group = {"init_method": dist_url, "world_size": world_size, "timeout": timeout}
    worker_args = (main_func, args, num_gpus_per_machine, machine_rank, group)
    mp.start_processes(_worker, nprocs=num_gpus_per_machine, args=worker_args)


def _worker(local_rank: int, main_func, args: tuple, count: int, machine: int, group: dict) -> None:
    """Join the process group, take the GPU of the same number, and run."""
    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise AssertionError(f"{count} processes but {gpus} GPUs: lower --num-gpus")
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, rank=machine * count + local_rank, **group)
    comm.create_local_process_group(count)
    if gpus:
        torch.cuda.set_device(local_rank)
    comm.synchronize()  # nobody runs on before all have joined
    main_func(*args)
    if dist.is_initialized():
        comm.synchronize()
        dist.destroy_process_group()
        # Not through the end of the interpreter: a group that anything still names (default values
        # of torch's functions do) keeps its threads, and one that drops a tensor then aborts.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)

"""Process-group helpers that also work when no group was started (one process)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_LOCAL_GROUP = None  # the processes of this machine


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def get_rank() -> int:
    """Rank of this process among all, 0 without a process group."""
    return dist.get_rank() if _active() else 0


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Make one group per machine; every process must call it once, ``launch`` does so."""
    global _LOCAL_GROUP
    size, count = get_world_size(), num_workers_per_machine
    if _LOCAL_GROUP is not None or size % count != 0:
        raise AssertionError(f"{size} processes: local groups of {count} exist or do not divide")
    groups = [dist.new_group(list(range(i, i + count))) for i in range(0, size, count)]
    _LOCAL_GROUP = groups[get_rank() // count]


def _local_group():
    if _LOCAL_GROUP is None:
        raise AssertionError("no local group: use launch() or create_local_process_group()")
    return _LOCAL_GROUP


def get_local_rank() -> int:
    """Rank of this process on its machine, 0 without a process group."""
    return dist.get_rank(group=_local_group()) if _active() else 0


def get_local_size() -> int:
    """Number of processes on this machine, 1 without a process group."""
    return dist.get_world_size(group=_local_group()) if _active() else 1


def synchronize() -> None:
    """Wait until all processes are here."""
    if get_world_size() > 1:
        nccl = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(**({"device_ids": [torch.cuda.current_device()]} if nccl else {}))


@functools.cache
def _cpu_group():
    """A group over all ranks that carries CPU objects, whatever the main backend."""
    nccl = dist.get_backend() == dist.Backend.NCCL
    return dist.new_group(backend="gloo") if nccl else dist.group.WORLD


def all_gather(data: Any, group=None) -> list[Any]:
    """Return every rank's picklable ``data``, in rank order, on every rank."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * dist.get_world_size(group or _cpu_group())
    dist.all_gather_object(gathered, data, group=group or _cpu_group())
    return gathered


def gather(data: Any, dst: int = 0, group=None) -> list[Any]:
    """Return every rank's picklable ``data`` on rank ``dst``, an empty list on the others."""
    if get_world_size() == 1:
        return [data]
    group = group or _cpu_group()
    gathered = [None] * dist.get_world_size(group) if dist.get_rank(group) == dst else []
    dist.gather_object(data, gathered or None, dst=dst, group=group)
    return gathered


def shared_random_seed() -> int:
    """Return one random number in [0, 2**31) that all ranks share; all must call it."""
    return all_gather(np.random.randint(2**31))[0]

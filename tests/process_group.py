"""How a test's own processes leave their process group."""

from __future__ import annotations

import torch.distributed as dist
from detectron2.utils import comm


def leave_group() -> None:
    """Wait for the others, then end the group and forget those that ``comm`` caches.

    A group that something still names keeps its threads, and threads that meet the end of the
    interpreter abort the process now and then.
    """
    comm.synchronize()
    for cached in ("_cpu_group", "_get_global_gloo_group"):  # the core's, the original's
        if hasattr(comm, cached):
            getattr(comm, cached).cache_clear()
    for local in ("_LOCAL_GROUP", "_LOCAL_PROCESS_GROUP"):
        if hasattr(comm, local):
            setattr(comm, local, None)
    dist.destroy_process_group()

"""A script for test_launching.py: each process of a run writes down where it finds itself.

python launch_report.py FOLDER [Detectron2's arguments]
"""

from __future__ import annotations

import json
import os
import sys

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from gella.engine.agreement import check_agreement
from gella.engine.launch import LaunchError, launch_from_environment


def local_group():
    """The processes of this machine; each Detectron2 has its own name for them."""
    return getattr(comm, "_LOCAL_PROCESS_GROUP", None) or comm._LOCAL_GROUP


def main(args):
    """Join in a sum and a comparison, and write ``rank<N>.json``."""
    rank = comm.get_rank()
    total = torch.tensor([10.0**rank])
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    local = torch.tensor([10.0**rank])
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(local, group=local_group())
    unequal = ""
    try:
        check_agreement({"same": "1", "version of x": f"{min(rank, 1)}.0"})
    except ValueError as error:
        unequal = str(error)
    report = {
        "world": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        "total": total.item(),
        "local_total": local.item(),
        "unequal": unequal,
    }
    with open(os.path.join(args.opts[0], f"rank{rank}.json"), "w", encoding="utf-8") as stream:
        json.dump(report, stream)
    if "fail" in args.opts:
        raise SystemExit(2)


if __name__ == "__main__":
    try:
        launch_from_environment(main, default_argument_parser().parse_args())
    except LaunchError as error:
        sys.exit(f"error: {error}")

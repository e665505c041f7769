"""A summary of the software and hardware in use, for logs."""

from __future__ import annotations

import platform

import detectron2
import fvcore
import numpy
import torch
from tabulate import tabulate


def collect_env_info() -> str:
    """Return a text table of platform, versions and GPUs."""
    rows = [("platform", platform.platform()), ("Python", platform.python_version())]
    rows += [(m.__name__, m.__version__) for m in (detectron2, torch, numpy, fvcore)]
    rows.append(("CUDA", torch.version.cuda))
    rows += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    return tabulate(rows)

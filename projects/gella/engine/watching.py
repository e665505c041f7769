"""Figures of a run for Detectron2's writers: learning rates, speed, memory, what was trained.

The losses, ``data_time`` and ``grad_norm`` come from the trainer itself, ``unmatched_phrases`` from
`gella.data.targets`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = ["RunScalars", "peak_memory_mib"]

# Datasets without captions train grounding in their own way; the sampler drew "ground".
_SAMPLED_TASK = {"refer": "ground", "panoptic": "ground"}


def peak_memory_mib(device: str) -> float:
    """Return the most memory that was in use so far, MiB (2^20 bytes).

    Args:
        device: of the model. "cuda...": what PyTorch had allocated on this process's GPU. Others:
            the resident memory of this process, without its loader's workers; NaN on systems that
            do not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class RunScalars(HookBase):
    """Puts these scalars into the storage after each step:

    * ``lr_<role>``, roles of `gella.engine.optimizer`: the learning rate of the step just done;
    * ``images_per_second`` over all ranks, during the step, waiting for data included;
    * ``max_memory_mib`` of this rank, see :func:`peak_memory_mib`;
    * ``batches_<task>``: batches of the task so far in the run, resumed parts included.

    Register it before the scheduler's hook, which changes the rates for the next step.
    """

    def __init__(self) -> None:
        """Nothing to choose."""
        self.batches: Counter[str] = Counter()
        self._images, self._started = 0, 0.0
        self._handle: Any = None

    def before_train(self) -> None:
        """Watch the batches where they enter the model, since workers make them."""
        self._handle = self.trainer.model.register_forward_pre_hook(self._count)

    def before_step(self) -> None:
        """Start the clock."""
        self._images, self._started = 0, time.perf_counter()

    def after_step(self) -> None:
        """Write the scalars."""
        seconds = time.perf_counter() - self._started
        storage = self.trainer.storage
        # The first step also starts the loader and compiles.
        if self.trainer.iter > self.trainer.start_iter and self._images:
            images = self._images * comm.get_world_size()  # ranks have equal shares
            storage.put_scalar("images_per_second", images / seconds)
        for name, rate in self._rates().items():
            storage.put_scalar(f"lr_{name}", rate, smoothing_hint=False)
        memory = peak_memory_mib(str(self.trainer.cfg.MODEL.DEVICE))
        if not math.isnan(memory):
            storage.put_scalar("max_memory_mib", memory, smoothing_hint=False)
        for task, count in sorted(self.batches.items()):
            storage.put_scalar(f"batches_{task}", count, smoothing_hint=False)

    def after_train(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """The counts, so that a resumed run goes on counting."""
        return {"batches": dict(self.batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts over."""
        self.batches = Counter(state["batches"])

    def _rates(self) -> dict[str, float]:
        # Groups of one role differ in weight decay only.
        groups = self.trainer.optimizer.param_groups
        return {group["role"]: group["lr"] for group in groups if "role" in group}

    def _count(self, model: Any, inputs: tuple[Any, ...]) -> None:
        if model.training:
            batch = inputs[0]
            self._images += len(batch)
            task = str(batch[0].get("task", "none")) if batch else "none"
            self.batches[_SAMPLED_TASK.get(task, task)] += 1

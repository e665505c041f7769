"""What ends a run before its last iteration, or throws a step away: numbers that are not finite.

Hooks for the trainer. Every method that talks to the other processes says so: all ranks call it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from gella.utils.io import write_json

__all__ = ["NonFiniteError", "NonFiniteGuard", "any_rank"]

_logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite, and ``SOLVER.NONFINITE`` does not let it pass."""


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank; all ranks must call it."""
    if comm.get_world_size() == 1:
        return flag
    # The NCCL backend carries tensors of a GPU only.
    device = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    raised = torch.tensor([int(flag)], device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


class NonFiniteGuard(HookBase):
    """Decides what becomes of a step whose losses or gradients are NaN or infinite on any rank.

    ``stop`` raises at the first one; ``skip`` tells the trainer to leave the parameters as they
    are, up to ``limit`` steps in all, and then raises. Either way ``nonfinite_<iteration>.json`` in
    the output folder says which images of which rank took part. The number of skipped steps is
    logged as ``skipped_steps`` and is part of checkpoints.

    The trainer that makes the steps calls :meth:`losses_ok` between forward and backward pass. For
    gradients the hook looks at the norms that ``GradientClipper`` logs, behind which it must be
    registered; without ``SOLVER.CLIP_GRADIENTS`` there are none and gradients are not looked at.
    """

    POLICIES = ("stop", "skip")

    def __init__(self, policy: str, limit: int, output_dir: str) -> None:
        """Args:
        policy: ``SOLVER.NONFINITE``.
        limit: ``SOLVER.NONFINITE_LIMIT``, steps that may be skipped in the whole run, resumed
            parts included; the next one ends it. Counted in all and not in a row: a run that
            skips every tenth step trains on other data than its config says.
        output_dir: folder of the files.

        Raises ValueError for another policy or a negative limit.
        """
        if policy not in self.POLICIES:
            raise ValueError(f"SOLVER.NONFINITE is {policy!r}: use one of {self.POLICIES}")
        if limit < 0:
            raise ValueError(f"SOLVER.NONFINITE_LIMIT is {limit}: it must not be negative")
        self.skipped = 0
        self._policy, self._limit, self._folder = policy, limit, output_dir
        self._seen: list[dict[str, Any]] = []

    def before_step(self) -> None:
        """Forget the batches of the last step."""
        self._seen = []

    def losses_ok(self, losses: Mapping[str, Tensor], batch: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the backward pass may be made; all ranks must call it and get one answer.

        Args:
            losses: scalar losses by name, as the model returns them.
            batch: the mapped dicts that they come from.

        Returns:
            False: make no backward pass, drop the gradients of this step, change no parameter.

        Raises:
            NonFiniteError: on all ranks, naming the file that was written.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._seen.append(_description(losses, batch))
        return self._accepted(bool(torch.isfinite(values).all()), "losses", {})

    def after_backward(self) -> None:
        """Let the inner trainer drop the step if a gradient norm is not finite.

        Raises:
            NonFiniteError: on all ranks, naming the file that was written.
        """
        inner = self.trainer._trainer
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None and scaler.is_enabled():
            return  # it skips overflows by itself, and they are no accident
        latest = self.trainer.storage.latest()
        norms = {
            name: value
            for name, (value, iteration) in latest.items()
            if name.startswith("grad_norm") and iteration == self.trainer.iter
        }
        finite = all(math.isfinite(norm) for norm in norms.values())
        if not self._accepted(finite, "gradients", {"gradient_norms": _written(norms)}):
            inner.drop_step = True

    def after_step(self) -> None:
        """Log the count where steps may be skipped."""
        if self._policy == "skip":
            storage = self.trainer.storage
            storage.put_scalar("skipped_steps", self.skipped, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps, so that a resumed run goes on counting."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the number of skipped steps over."""
        self.skipped = int(state["skipped"])

    def _accepted(self, finite: bool, what: str, extra: dict[str, Any]) -> bool:
        if not any_rank(not finite):
            return True
        stops = self._policy == "stop" or self.skipped >= self._limit
        path = self._save(what, extra, "stop" if stops else "skip")
        iteration = self.trainer.iter
        if not stops:
            self.skipped += 1
            _logger.warning(
                "iteration %d: %s are not finite, the step is skipped (%d of %d); see %s",
                *(iteration, what, self.skipped, self._limit, path),
            )
            return False
        skipping = self._policy == "skip"
        reason = f" and {self.skipped} steps were skipped already" if skipping else ""
        advice = (
            "SOLVER.NONFINITE_LIMIT allows no more. A resumed run meets the same batch again"
            if skipping
            else "SOLVER.NONFINITE skip passes over such steps"
        )
        raise NonFiniteError(
            f"iteration {iteration}: {what} are not finite{reason}. The images are listed in"
            f" {path}. {advice}; a lower SOLVER.BASE_LR, SOLVER.CLIP_GRADIENTS or higher precision"
            " may help"
        )

    def _save(self, what: str, extra: dict[str, Any], action: str) -> str:
        """Write what every rank knows about the step; all ranks return the path."""
        path = os.path.join(self._folder, f"nonfinite_{self.trainer.iter:07d}.json")
        ranks = comm.gather({"rank": comm.get_rank(), **extra, "batches": self._seen})
        if comm.is_main_process():
            content = {
                "iteration": int(self.trainer.iter),
                "what": what,
                "action": action,
                "skipped_before": self.skipped,
                "ranks": ranks,
            }
            write_json(path, content)
        # A rank that raised early would take the others down before the file is written.
        comm.synchronize()
        return path


def _description(
    losses: Mapping[str, Tensor], batch: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Losses, task and images of one batch, for JSON."""
    numbers = torch.stack([loss.detach().double() for loss in losses.values()]).tolist()
    images = [
        {"file_name": str(item.get("file_name", "")), "image_id": item.get("image_id")}
        for item in batch
    ]
    tasks = sorted({str(item.get("task", "")) for item in batch})
    named = dict(zip(losses, numbers, strict=True))
    return {"tasks": tasks, "losses": _written(named), "images": images}


def _written(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """The numbers with NaN and infinity, which JSON lacks, as text."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}

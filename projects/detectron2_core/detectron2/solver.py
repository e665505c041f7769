"""Learning-rate schedules, as multipliers of each group's own rate (optimizers are not built)."""

from __future__ import annotations

import torch
from fvcore.common import param_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["LRMultiplier", "LRScheduler", "WarmupParamScheduler", "build_lr_scheduler"]


class WarmupParamScheduler(schedules.CompositeParamScheduler):
    """Another schedule with a warm-up in place of its first part.

    ``warmup_factor``: first value, relative to ``scheduler(0)``. ``warmup_length``: fraction of
    the training, 0..1. ``warmup_method``: "linear" (up to the schedule's value at the end of the
    warm-up) or "constant". ``rescale_interval``: whether the whole schedule is squeezed into the
    time after the warm-up instead of being cut.
    """

    def __init__(
        self,
        scheduler: schedules.ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        first = warmup_factor * scheduler(0.0)
        last = scheduler(0.0 if rescale_interval else warmup_length)
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"warm-up method '{warmup_method}' is none of linear, constant")
        last = first if warmup_method == "constant" else last
        warmup = schedules.LinearParamScheduler(first, last)
        scaling = ["rescaled", "rescaled" if rescale_interval else "fixed"]
        super().__init__([warmup, scheduler], [warmup_length, 1 - warmup_length], scaling)


class LRMultiplier(LRScheduler):
    """Sets every group's rate to its initial rate times ``multiplier(iteration / max_iter)``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: schedules.ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        self._multiplier, self._max_iter = multiplier, max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict:
        """Return the base rates and the iteration; the multiplier itself holds no state."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        """Return the present rate of every group."""
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base * factor for base in self.base_lrs]


def build_lr_scheduler(cfg, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Build WarmupMultiStepLR or WarmupCosineLR as ``cfg.SOLVER`` says; else ``ValueError``.

    Steps after MAX_ITER are dropped; the cosine ends at BASE_LR_END.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        schedule = schedules.MultiStepParamScheduler(values, solver.MAX_ITER, steps)
    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        schedule = schedules.CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    else:
        raise ValueError(f"SOLVER.LR_SCHEDULER_NAME '{solver.LR_SCHEDULER_NAME}' is unknown")
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    schedule = WarmupParamScheduler(
        schedule, solver.WARMUP_FACTOR, warmup, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL
    )
    return LRMultiplier(optimizer, schedule, solver.MAX_ITER)

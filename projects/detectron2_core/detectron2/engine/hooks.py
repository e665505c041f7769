"""The usual hooks; each class tells what it does at which of ``HookBase``'s points."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer

from .train_loop import HookBase


class IterationTimer(HookBase):
    """Stores the seconds per step as ``time`` and logs their sum; register it first.

    The first ``warmup_iter - 1`` steps are not stored.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter, self._in_steps = warmup_iter, 0.0
        self._start = time.perf_counter()

    def before_train(self) -> None:
        self._start = time.perf_counter()

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        self._in_steps += seconds
        if self.trainer.iter - self.trainer.start_iter + 1 >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=seconds)

    def after_train(self) -> None:
        total = time.perf_counter() - self._start
        times = (total, max(total - self._in_steps, 0))
        total, others = (datetime.timedelta(seconds=int(s)) for s in times)
        logging.getLogger(__name__).info(f"Total training time: {total} ({others} on hooks)")


class PeriodicWriter(HookBase):
    """Calls writers every ``period`` iterations, at the last one, and after the training."""

    def __init__(self, writers: list[EventWriter], period: int = 20) -> None:
        self._writers, self._period = writers, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.write()
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """Saves ``model_<iter, 7 digits>`` every ``period`` iterations and ``model_final``."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Stores the learning rate as ``lr`` and steps the scheduler after every iteration.

    Both arguments default to the trainer's attributes of the same name. The rate reported is that
    of the largest parameter group, or the commonest if all groups have one parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, scheduler=None) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler

    @property
    def scheduler(self):
        """The scheduler in use."""
        return self._scheduler or self.trainer.scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        weights = [len(group["params"]) for group in groups]
        weights = [rates.count(rate) for rate in rates] if max(weights) == 1 else weights
        self._group = weights.index(max(weights))

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()  # the rate of the next iteration

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scheduler's state."""
        self.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Evaluates every ``eval_period`` iterations (0: never) and after a successful training.

    ``eval_function``: without arguments, returns a nested dict of numbers (or nothing), which is
    stored flattened, as "task/metric". Register the hook on all ranks or on none.
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], dict], eval_after_train: bool = True
    ) -> None:
        self._period, self._func = eval_period, eval_function
        self._eval_after_train = eval_after_train

    def _evaluate(self) -> None:
        flat = flatten_results_dict(self._func() or {})
        for name, value in flat.items():
            try:
                float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"[EvalHook] {name} is {value!r}, not a number") from error
        self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        comm.synchronize()  # ranks may differ in evaluation time

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._evaluate()

    def after_train(self) -> None:
        if self._eval_after_train and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._evaluate()
        del self._func  # it may hold the trainer

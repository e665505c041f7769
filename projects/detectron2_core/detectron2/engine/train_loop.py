"""The loop with hooks, and the step of one loss, one optimizer, one data source."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn


class HookBase:
    """Something done at fixed points of the loop; ``trainer`` is set on registration.

    Order: ``before_train``; per iteration ``before_step``, the step (in it ``after_backward``),
    ``after_step``; at the end ``after_train``, also after an exception (then
    ``trainer.iter + 1 < max_iter``). ``before_step`` should take no time worth mentioning.
    """

    trainer: TrainerBase = None  # a weak proxy

    def before_train(self) -> None:
        """Before the first iteration."""

    def after_train(self) -> None:
        """After the last iteration, or after a failure."""

    def before_step(self) -> None:
        """Before each iteration."""

    def after_backward(self) -> None:
        """After the backward pass of each iteration."""

    def after_step(self) -> None:
        """After each iteration."""

    def state_dict(self) -> dict:
        """State for checkpoints; one that is not empty needs ``load_state_dict`` as well."""
        return {}


class TrainerBase:
    """A loop over iterations with hooks.

    Attributes: ``iter`` (the present iteration; ``max_iter`` in ``after_train`` of a run that
    succeeded), ``start_iter``, ``max_iter``, ``storage`` (``EventStorage``, open while training).
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = self.start_iter = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Append hooks, which run in this order; ``None`` entries are skipped."""
        for hook in filter(None, hooks):
            hook.trainer = weakref.proxy(self)  # no reference cycle, so models are freed early
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations ``start_iter`` to ``max_iter - 1``."""
        logger = logging.getLogger(__name__)
        logger.info(f"Starting training from iteration {start_iter}")
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter += 1  # tells after_train that all iterations were done
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()

    def _call_hooks(self, point: str) -> None:
        self.storage.iter = self.iter
        for hook in self._hooks:
            getattr(hook, point)()

    before_train = functools.partialmethod(_call_hooks, "before_train")
    before_step = functools.partialmethod(_call_hooks, "before_step")
    after_step = functools.partialmethod(_call_hooks, "after_step")
    after_train = functools.partialmethod(_call_hooks, "after_train")

    def after_backward(self) -> None:
        """Call the hooks; an inner trainer calls its own hooks only, and has no storage."""
        for hook in self._hooks:
            hook.after_backward()

    def run_step(self) -> None:
        """Do one iteration."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"iteration", "hooks": {class name: state}}``; first hook of a class only."""
        states = [(type(hook).__qualname__, hook.state_dict()) for hook in self._hooks]
        hooks = {name: state for name, state in reversed(states) if state}
        return {"iteration": self.iter, **({"hooks": hooks} if hooks else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the iteration and the hooks' states; a state without its hook is logged."""
        self.iter = state_dict["iteration"]
        hooks = {type(hook).__qualname__: hook for hook in reversed(self._hooks)}
        for name, state in state_dict.get("hooks", {}).items():
            if name in hooks:
                hooks[name].load_state_dict(state)
            else:
                text = f"Cannot find the hook '{name}', its state_dict is ignored."
                logging.getLogger(__name__).warning(text)


class SimpleTrainer(TrainerBase):
    """Per step: next batch, model, sum of losses, backward, optimizer.

    ``model``: maps a batch to a dict of scalar losses, or to one loss. ``data_loader``: an
    endless iterable; its iterator is made when first used. ``gather_metric_period``: metrics are
    averaged over ranks and stored every so many iterations. ``zero_grad_before_forward``: else
    right before the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
    ) -> None:
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self._data_loader_iter_obj: Iterator | None = None
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.precision: torch.dtype | None = None
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=False)  # passes all through

    @property
    def _data_loader_iter(self) -> Iterator:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def run_step(self) -> None:
        """Do one iteration; the model must be in training mode (``AssertionError``)."""
        if not self.model.training:
            raise AssertionError(f"[{type(self).__name__}] model was changed to eval mode!")
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        amp = self.precision is not None
        with torch.autocast("cuda", self.precision) if amp else contextlib.nullcontext():
            loss_dict = self.model(data)
            if isinstance(loss_dict, torch.Tensor):
                loss_dict = {"total_loss": loss_dict}
            losses = sum(loss_dict.values())
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self.grad_scaler.scale(losses).backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _write_metrics(self, loss_dict: Mapping, data_time: float, prefix: str = "") -> None:
        if (self.iter + 1) % self.gather_metric_period == 0:
            SimpleTrainer.write_metrics(loss_dict, data_time, self.iter, prefix)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping, data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Store means over all ranks, and their sum; ``FloatingPointError`` if not finite."""
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time, cur_iter=cur_iter)
        own = {name: loss.detach().cpu().item() for name, loss in loss_dict.items()}
        gathered = comm.gather({**own, "data_time": data_time})
        if not comm.is_main_process():
            return
        slowest = max(metrics.pop("data_time") for metrics in gathered)
        storage.put_scalar("data_time", slowest, cur_iter=cur_iter)
        means = {name: np.mean([metrics[name] for metrics in gathered]) for name in own}
        total = sum(means.values())
        if not np.isfinite(total):
            raise FloatingPointError(f"Loss became infinite or NaN at {cur_iter=}: {means}")
        storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
        if len(means) > 1:
            storage.put_scalars(cur_iter=cur_iter, **means)

    def state_dict(self) -> dict[str, Any]:
        """Add the optimizer's state."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state as well."""
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


class AMPTrainer(SimpleTrainer):
    """``SimpleTrainer`` on a GPU with autocast in ``precision`` and gradient scaling.

    ``args``, ``kwargs``: as for ``SimpleTrainer``. Steps with overflowing gradients are skipped.
    """

    def __init__(self, *args, grad_scaler=None, precision=torch.float16, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not torch.cuda.is_available():
            raise AssertionError("[AMPTrainer] CUDA is required: set SOLVER.AMP.ENABLED False")
        self.grad_scaler = grad_scaler or torch.amp.GradScaler("cuda")
        self.precision = precision

    def state_dict(self) -> dict[str, Any]:
        """Add the scaler's state."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scaler's state as well."""
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

"""One optimiser step of k micro batches, on one process or many, with or without ZeRO."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn


class StepTrainer(SimpleTrainer):
    """Detectron2's simple trainer whose step may be made of several micro batches.

    An iteration is one optimiser step. This rank's share of its batch is cut into ``accumulate``
    contiguous parts of equal size, which go through the model one by one; their mean gradient is
    that of the whole share, since the model's losses are means over images.

    Before each part goes through the model the random generators are seeded by (``seed``,
    iteration, place of the part in the whole batch). So a resumed run draws the numbers of an
    uninterrupted one, and k ranks draw what one process draws in k micro batches.

    Attributes:
        batch: this rank's share of the batch, mapped dicts; empty before the first.
        micro_step: the part of it that is in the model, 0 to accumulate - 1.
        outer: the trainer whose hooks hear ``after_backward`` too, or None. Detectron2's default
            trainer runs its steps in an inner trainer, and registers hooks outside.
        zero: what holds the language decoder under ZeRO, or None (``zero.ZeroHook``).
        guard: asked by ``losses_ok(losses, batch)`` before each backward pass whether to go on, or
            None. All ranks get the same answer; after False no parameter changes.
        drop_step: a hook may set it in ``after_backward`` so that no parameter changes.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        seed: int = -1,
        precision: torch.dtype | None = None,
        grad_scaler: Any = None,
    ) -> None:
        """Args:
        model: maps a list of inputs to a dict of scalar losses; may be wrapped.
        data_loader: endless iterable of lists.
        optimizer: of all parameters that are not under ZeRO.
        accumulate: micro batches per step, at least 1.
        seed: ``cfg.SEED``; a negative one leaves the generators alone, as in Detectron2.
        precision, grad_scaler: of autocast, and for float16; None for none.
        """
        super().__init__(model, data_loader, optimizer)
        self.accumulate, self.seed, self.precision = accumulate, seed, precision
        self.grad_scaler = grad_scaler or torch.amp.GradScaler("cuda", enabled=False)
        self.batch: Sequence[Any] = ()
        self.micro_step = 0
        self.outer: Any = None
        self.zero: Any = None
        self.guard: Any = None
        self.drop_step = False

    def run_step(self) -> None:
        """Do one iteration; the model must be in training mode (``AssertionError``)."""
        if not self.model.training:
            raise AssertionError("the model was changed to eval mode during training")
        start = time.perf_counter()
        self.batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        parts = self._parts(self.batch)
        self.optimizer.zero_grad()
        self.drop_step = False
        means: dict[str, Tensor] = {}
        for self.micro_step, part in enumerate(parts):
            self._seed_generators()
            losses = self._forward_backward(part)
            if losses is None:
                self._drop()
                return
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + loss.detach() / len(parts)
        self.after_backward()
        if self.outer is not None:
            self.outer.after_backward()
        if self.drop_step:
            self._drop()
            return
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.zero is not None:
            self.zero.step()

    def _parts(self, batch: Sequence[Any]) -> list[Sequence[Any]]:
        if self.accumulate == 1:
            return [batch]
        size, rest = divmod(len(batch), self.accumulate)
        if rest or not size:
            raise ValueError(
                f"SOLVER.ACCUMULATE is {self.accumulate} but this process has {len(batch)} images"
                " per iteration; make SOLVER.IMS_PER_BATCH a multiple of processes x ACCUMULATE"
            )
        return [batch[i * size : (i + 1) * size] for i in range(self.accumulate)]

    def _seed_generators(self) -> None:
        # Between the data and the forward pass: starting a loader draws a number, once per start.
        if self.seed >= 0:
            # A rank's share of the batch is contiguous, and so are its micro batches in it.
            part = comm.get_rank() * self.accumulate + self.micro_step
            draws = np.random.SeedSequence([self.seed, self.iter, part]).generate_state(3)
            torch.manual_seed(int(draws[0]))
            np.random.seed(int(draws[1]))
            random.seed(int(draws[2]))

    def _forward_backward(self, part: Sequence[Any]) -> Mapping[str, Tensor] | None:
        """Losses of one part, whose gradients were added; None if the guard says no."""
        last = self.micro_step == self.accumulate - 1
        device = next(self.model.parameters()).device.type
        # Gradients stay on this rank until the last part, where a distributed wrapper joins them.
        no_sync = None if last else getattr(self.model, "no_sync", None)
        sync = contextlib.nullcontext() if no_sync is None else no_sync()
        if self.zero is not None:
            self.zero.before_forward(last)
        with sync:
            autocast = torch.autocast(device, self.precision, enabled=self.precision is not None)
            with autocast:
                losses = self.model(part)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            if self.guard is not None and not self.guard.losses_ok(losses, part):
                return None
            total = sum(losses.values())
            if self.zero is not None:
                self.zero.backward(total)
            else:
                self.grad_scaler.scale(total / self.accumulate).backward()
        return losses

    def _drop(self) -> None:
        """Forget the gradients of this step."""
        self.optimizer.zero_grad()
        if self.zero is not None:
            self.zero.discard()

    def state_dict(self) -> dict[str, Any]:
        """Add the scaler's state where there is one."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scaler's state as well where there is one."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

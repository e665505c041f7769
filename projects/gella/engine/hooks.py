"""Hooks of the training loop: seeds, clipping, and the way from the inner trainer to the hooks."""

from __future__ import annotations

import random
import weakref
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn

__all__ = ["ForwardAfterBackward", "GradientClipper", "IterationSeed"]


class IterationSeed(HookBase):
    """Seed the random generators anew before each training forward pass.

    The seed depends on (``seed``, iteration, part of the batch) alone. A resumed run draws the
    numbers of an uninterrupted one although no generator's state is stored, and k ranks draw what
    one process draws in k micro batches. It is set between the data and the forward pass because
    starting a data loader draws a number too, once per start.
    """

    def __init__(self, seed: int) -> None:
        """``seed``: ``cfg.SEED``; a negative one leaves the generators alone, as in Detectron2."""
        self._seed = seed
        self._handle: Any = None

    def before_train(self) -> None:
        """Watch the model's forward passes."""
        if self._seed >= 0:
            self._handle = self.trainer.model.register_forward_pre_hook(self._reseed)

    def after_train(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _reseed(self, model: nn.Module, inputs: Any) -> None:
        if not model.training:
            return
        inner = getattr(self.trainer, "_trainer", None)
        parts, part = getattr(inner, "accumulate", 1), getattr(inner, "micro_step", 0)
        # A rank's share of the batch is contiguous, and so are its micro batches in it.
        key = [self._seed, self.trainer.iter, comm.get_rank() * parts + part]
        draws = np.random.SeedSequence(key).generate_state(3)
        torch.manual_seed(int(draws[0]))
        np.random.seed(int(draws[1]))
        random.seed(int(draws[2]))


class GradientClipper(HookBase):
    """Clip gradients after the backward pass as ``SOLVER.CLIP_GRADIENTS`` says; log their norm.

    ``full_model`` scales all gradients by one factor so that their joint norm is at most
    ``CLIP_VALUE``; ``norm`` does so for each parameter alone, ``value`` clamps each number. With
    the language decoder under ZeRO, where no rank has a whole gradient, only ``full_model``.
    """

    TYPES = ("full_model", "norm", "value")

    def __init__(self, clip_type: str, clip_value: float, norm_type: float) -> None:
        """The three keys of ``SOLVER.CLIP_GRADIENTS``; ValueError for an unknown type."""
        if clip_type not in self.TYPES:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip_type!r}: use one of {self.TYPES}"
            )
        self._type, self._value, self._norm = clip_type, clip_value, norm_type

    def check_zero(self) -> None:
        """Refuse what cannot be done on partitioned gradients.

        Raises:
            ValueError: another type than ``full_model``, or another norm than the Euclidean one.
        """
        if self._type != "full_model" or self._norm != 2.0:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS has CLIP_TYPE {self._type!r} and NORM_TYPE {self._norm}:"
                " with SOLVER.ZERO.CONFIG only 'full_model' and 2.0 are possible"
            )

    def after_backward(self) -> None:
        """Clip, and put the norms before clipping into the storage.

        ``grad_norm`` is over all parameters, ``grad_norm_language`` and ``grad_norm_vision`` over
        those of the language decoder and all others.
        """
        inner = self.trainer._trainer
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None:
            scaler.unscale_(inner.optimizer)  # the limit is meant for the true gradients
        sides: dict[str, list[nn.Parameter]] = {"language": [], "vision": []}
        for group in inner.optimizer.param_groups:
            side = "language" if group.get("role") == "language" else "vision"
            sides[side] += [p for p in group["params"] if p.grad is not None]
        norms = {side: self._total(parameters) for side, parameters in sides.items()}
        zero = getattr(inner, "zero", None)
        if zero is not None:
            norms["language"] = zero.gradient_norm()
        device = norms["vision"].device
        norm = nn.utils.get_total_norm([n.to(device) for n in norms.values()], self._norm)
        parameters = sides["vision"] + sides["language"]
        if self._type == "full_model":
            nn.utils.clip_grads_with_norm_(parameters, self._value, norm)
            if zero is not None:
                # PyTorch's own rule for the factor
                zero.clip(min(1.0, self._value / (float(norm) + 1e-6)))
        elif self._type == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, self._value, self._norm)
        elif self._type == "value":
            nn.utils.clip_grad_value_(parameters, self._value)
        storage = self.trainer.storage
        storage.put_scalar("grad_norm", float(norm))
        for side, value in norms.items():
            storage.put_scalar(f"grad_norm_{side}", float(value))

    def _total(self, parameters: list[nn.Parameter]) -> Tensor:
        grads = [p.grad for p in parameters if p.grad is not None]
        return nn.utils.get_total_norm(grads, self._norm)


class ForwardAfterBackward(HookBase):
    """Hand the inner trainer's ``after_backward`` on to the hooks of the outer trainer.

    Detectron2's default trainer runs its steps in an inner trainer, and registers hooks outside.
    """

    def __init__(self, outer: TrainerBase) -> None:
        """``outer`` is not kept alive by this hook."""
        self._outer = weakref.proxy(outer)

    def after_backward(self) -> None:
        """Call the outer trainer's hooks."""
        self._outer.after_backward()

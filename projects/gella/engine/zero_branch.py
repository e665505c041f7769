"""A part of a model behind a DeepSpeed engine, and what DeepSpeed tells about it at each stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "EngineBranch",
    "full_parameter",
    "full_weights",
    "owned_norm",
    "throw_gradients_away",
]


class EngineBranch(nn.Module):
    """Stands where the part stood: forward passes go through the engine, attributes to the part.

    The engine is no submodule. So the model's optimiser, its distributed wrapper and its
    ``state_dict()`` do not see the part's parameters, of which a rank may hold only a share.
    """

    engine: Any

    def __init__(self, engine: Any, part: nn.Module) -> None:
        """``engine`` drives ``part``, which may return a tensor, a tuple, a dict or a dataclass."""
        super().__init__()
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "_shown", None)
        object.__setattr__(self, "_result", None)
        forward = part.forward

        def plain_forward(*args: Any, **kwargs: Any) -> Any:
            # DeepSpeed finds the tensors that it must watch in tuples and dicts only.
            output = forward(*args, **kwargs)
            if not dataclasses.is_dataclass(output) or isinstance(output, dict):
                return output
            object.__setattr__(self, "_result", type(output))
            return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}

        part.forward = plain_forward  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        """Whatever else the part has, such as ``hidden_size``."""
        if name == "engine":  # while this object is made
            raise AttributeError(name)
        return getattr(self.engine.module, name)

    def forward(self, *args: Any) -> Any:
        """The part's own forward pass; float tensors come in at the precision of its weights."""
        output = self.engine(*(self._cast(x) for x in args))
        return self._result(**output) if self._result is not None else output

    def generate(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The part's own ``generate``; see :meth:`forward` for the precision."""
        return self.engine.module.generate(self._cast(features), *args, **kwargs)

    def train(self, mode: bool = True) -> EngineBranch:
        """Switch the part as well."""
        super().train(mode)
        self.engine.module.train(mode)
        return self

    @contextlib.contextmanager
    def showing(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let ``state_dict()`` hold the given weights in this block."""
        object.__setattr__(self, "_shown", weights)
        try:
            yield
        finally:
            object.__setattr__(self, "_shown", None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in (self._shown or {}).items():
            destination[prefix + name] = tensor

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(next(self.engine.module.parameters()).dtype)
        return value


def owned_norm(engine: Any) -> Tensor:
    """Euclidean norm of the engine's averaged gradient over all ranks; infinite if not finite.

    To be called on all ranks between the last backward pass of a step and the step. Each kind of
    DeepSpeed optimiser holds the gradient in another form and has its own way to sum it up.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        norms = [torch.as_tensor(n).float().cpu() for n in optimizer._get_norm_groups()]
        norm = torch.stack(norms)
    elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        if hasattr(optimizer, "_wait_for_offload_copies"):
            optimizer._wait_for_offload_copies()
        norm = torch.as_tensor(optimizer.scaled_global_norm()).float().cpu()[None]
    elif hasattr(optimizer, "get_grads_for_norm"):  # stage 1, bf16 weights and float32 sums
        norm = nn.utils.get_total_norm(optimizer.get_grads_for_norm()[0]).float().cpu()[None]
    else:  # stage 0: every rank has the whole gradient
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).float().cpu()[None]
    # DeepSpeed writes -1 for what is not finite.
    norm = torch.where(torch.isfinite(norm) & (norm >= 0), norm, float("inf"))
    return torch.linalg.vector_norm(norm)


def throw_gradients_away(engine: Any) -> None:
    """Forget all gradients since the last optimiser step, as DeepSpeed does after an overflow."""
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        parameter.grad = None
    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(1.0)
    elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = -1  # the next micro batch overwrites what is offloaded
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        else:
            for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                held.update(dict.fromkeys(held))
    elif hasattr(optimizer, "clear_hp_grads"):  # stage 1, bf16 weights and float32 sums
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """A parameter of an engine's module, whole, in float32 on the CPU; all ranks must call it.

    A trained one comes from the optimiser's float32 copy.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is None:
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with GatheredParameters(partitioned, enabled=bool(partitioned)):
            full = parameter.detach().float().cpu().clone()
    return full.detach().float().cpu().contiguous()


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Parameters and buffers of the engine's module, whole, float32 where they are floats, on CPU.

    All ranks must call it; ranks above 0 get an empty dict. Trained parameters come from the
    optimiser's float32 copy. One parameter at a time is whole on the device.
    """
    keep = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}  # tied weights are gathered once
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if id(parameter) in done:
            weights[name] = done[id(parameter)]
            continue
        full = full_parameter(parameter)
        if keep:
            weights[name] = done[id(parameter)] = full
        else:
            done[id(parameter)] = full.new_empty(0)
    if not keep:
        return {}
    state = engine.module.state_dict()
    for name, buffer in engine.module.named_buffers():
        if name in state:  # persistent
            weights[name] = buffer.detach().cpu().clone()
    return weights

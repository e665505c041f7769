"""The language decoder under DeepSpeed ZeRO, while Detectron2 trains the rest of the model.

Only the language decoder is large: its gradients, optimiser states and parameters are what ZeRO
stages 1, 2 and 3 divide among the processes. Everything else stays under DistributedDataParallel
and the trainer's own optimiser. One joint loss and one backward pass serve both.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gella.utils.io import read_json

_logger = logging.getLogger(__name__)

_MMAP_THRESHOLD = -3  # of <malloc.h>

# Keys of DeepSpeed's file that a run's config decides, with the key that does.
_OURS = {
    "train_batch_size": "SOLVER.IMS_PER_BATCH",
    "train_micro_batch_size_per_gpu": "SOLVER.IMS_PER_BATCH",
    "gradient_accumulation_steps": "SOLVER.ACCUMULATE",
    "gradient_clipping": "SOLVER.CLIP_GRADIENTS",
    "optimizer": "SOLVER.BASE_LR",
    "scheduler": "SOLVER.LR_SCHEDULER_NAME",
}


def read_config(
    path: str, *, micro_batch: int = 1, accumulate: int = 1, bf16: bool = False
) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and fill in what the run's config decides.

    Args:
        path: file with ``zero_optimization`` and whatever else of DeepSpeed's documented keys; the
            value "auto" of ``bf16.enabled`` and ``torch_autocast.enabled`` becomes ``bf16``.
        micro_batch, accumulate: images of one forward pass, and such passes of one optimiser step.
        bf16: whether ``SOLVER.AMP`` trains in bfloat16.

    Raises:
        FileNotFoundError, ValueError: no such file, not JSON, or a key or value that cannot be.
    """
    config = read_json(path, "SOLVER.ZERO.CONFIG", "see configs/zero/")
    if not isinstance(config, dict) or "stage" not in config.get("zero_optimization", {}):
        raise ValueError(f'SOLVER.ZERO.CONFIG {path} lacks "zero_optimization": {{"stage": 0..3}}')
    for key, ours in _OURS.items():
        if key in config:
            raise ValueError(f"SOLVER.ZERO.CONFIG {path} sets {key!r}: set {ours} instead")
    for section in ("bf16", "torch_autocast"):
        if config.get(section, {}).get("enabled") == "auto":
            config[section] = {**config[section], "enabled": bf16}
    zero, stage = config["zero_optimization"], config["zero_optimization"]["stage"]
    half = config.get("bf16", {}).get("enabled")
    places = {
        key: zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")
    }
    refused = {
        f"zero_optimization.stage is {stage!r}, not 0 to 3": stage not in (0, 1, 2, 3),
        "fp16 skips steps, which would move one side of the model without the other: use bf16": (
            config.get("fp16", {}).get("enabled")
        ),
        "no bf16 at stage 0: use torch_autocast, which keeps float32 weights, or stage 1": (
            half and stage == 0
        ),
        "compute_grad_norm must not be false": zero.get("compute_grad_norm") is False,
        f"{places}: 'cpu' or nowhere here": "nvme" in places.values(),
    }
    for message in [text for text, is_wrong in refused.items() if is_wrong]:
        raise ValueError(f"SOLVER.ZERO.CONFIG {path}: {message}")
    return {
        **config,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        # DeepSpeed's default is 1.0, which would clip one side only and say nothing.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        # The optimiser is ours at all stages, on the CPU too.
        "zero_force_ds_cpu_optimizer": False,
    }


def hide_from_ddp(model: nn.Module, name: str) -> None:
    """Make DistributedDataParallel, once wrapped around ``model``, ignore the child ``name``."""
    ours = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    hidden = [key for key, _ in ours if key.startswith(f"{name}.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, hidden)


class ZeroHook(HookBase):
    """Puts one child of the model under a DeepSpeed engine for the time of the training.

    Until ``before_train`` the model is whole, so that weights are loaded as always. From then on
    the child is an :class:`EngineBranch`, whose parameters are in no ``state_dict()``: see
    :meth:`save_whole`. The learning rates follow the trainer's groups that the parameters came
    from. ``StepTrainer`` calls the other methods; all ranks call all of them.

    Attributes:
        part: name of the child that is under ZeRO.
        config: what :func:`read_config` gave.
        stage: ZeRO's stage, 0 to 3.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        optimizer: torch.optim.Optimizer,
        sources: list[int],
        config: dict[str, Any],
    ) -> None:
        """Args:
            model: the model, not wrapped.
            name: the child to train under ZeRO.
            optimizer: of the child's trainable parameters alone.
            sources: per group of ``optimizer``, the number of the group of the trainer's optimiser
                whose rate it takes.
            config: what :func:`read_config` gives.

        Raises ImportError where DeepSpeed is not installed.
        """
        self._model, self.part, self.config = model, name, config
        self.stage = int(config["zero_optimization"]["stage"])
        self._optimizer, self._sources = optimizer, sources
        self._branch: EngineBranch | None = None
        if next(model.parameters()).device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # even where there is a GPU
        try:
            import deepspeed
        except ImportError as error:
            raise ImportError(
                f"SOLVER.ZERO.CONFIG needs DeepSpeed: pip install 'gella[zero]' ({error})"
            ) from error
        self._deepspeed = deepspeed
        deepspeed.utils.logger.setLevel(logging.WARNING)

    @property
    def module(self) -> nn.Module:
        """The child itself, also before the training starts."""
        child = getattr(self._model, self.part)
        return child.engine.module if isinstance(child, EngineBranch) else child

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine; RuntimeError before the training starts."""
        if self._branch is None:
            raise RuntimeError("the ZeRO engine is made when the training starts")
        return self._branch.engine

    def divider(self) -> Callable[[nn.Parameter], None] | None:
        """At stage 3 what divides a parameter, once it has its values, among the processes.

        So none of them ever holds the whole child. All ranks must call it for the same parameters
        in the same order; the values of the main process count. None at the other stages.
        """
        if self.stage < 3:
            return None
        _join_process_group()
        # glibc keeps freed blocks of up to 32 MiB, such as whole weights; now from 1 MiB on none.
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(_MMAP_THRESHOLD, 2**20)
        dividing = self._deepspeed.zero.Init(config_dict_or_path=self.config)
        return lambda parameter: dividing._convert_to_zero_parameters([parameter])

    def before_train(self) -> None:
        """Start the engine on the weights that the model has now."""
        if self._branch is not None:
            return
        _join_process_group()
        child = getattr(self._model, self.part)
        engine, *_ = self._deepspeed.initialize(
            model=child, optimizer=self._optimizer, config=self.config, dist_init_required=False
        )
        self._branch = EngineBranch(engine, child)
        setattr(self._model, self.part, self._branch)
        _logger.info(
            "%s is under DeepSpeed %s, ZeRO stage %d, %d process(es), %s",
            *(self.part, self._deepspeed.__version__, self.stage, comm.get_world_size()),
            next(child.parameters()).dtype,
        )

    def before_step(self) -> None:
        """Take the learning rates over."""
        groups = self.trainer.optimizer.param_groups  # type: ignore[attr-defined]
        for source, group in zip(self._sources, self.engine.optimizer.param_groups, strict=True):
            group["lr"] = groups[source]["lr"]

    def before_forward(self, last: bool) -> None:
        """Say whether the next micro batch is the last one of its optimiser step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the joint loss of a micro batch, divided by their number."""
        self.engine.backward(loss)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the child's gradient over all ranks, float32; infinite if not finite.

        To be called between the last backward pass and :meth:`step`. Each kind of DeepSpeed
        optimiser holds the gradient in another form and has its own way to sum it up.
        """
        optimizer = self.engine.optimizer
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
            grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(grads).float().cpu()[None]
        # DeepSpeed writes -1 for what is not finite.
        norm = torch.where(torch.isfinite(norm) & (norm >= 0), norm, float("inf"))
        return torch.linalg.vector_norm(norm)

    def clip(self, factor: float, norm: float) -> None:
        """Let :meth:`step` multiply the gradient, of :meth:`gradient_norm` ``norm``, by a factor of
        0 to 1."""
        optimizer = self.engine.optimizer
        if not hasattr(optimizer, "clip_grad"):  # stage 0 in float32: a plain optimiser
            if factor < 1.0:
                for parameter in self.engine.module.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            return
        # DeepSpeed multiplies by clip_grad / (norm + 1e-6) if that is below 1.
        optimizer.clip_grad = (norm + 1e-6) * factor if factor < 1.0 else 0.0

    def step(self) -> None:
        """Optimiser step; forgets the gradient."""
        self.engine.step()

    def discard(self) -> None:
        """Forget all gradients since the last step, as DeepSpeed does after an overflow."""
        optimizer = self.engine.optimizer
        for parameter in self.engine.module.parameters():
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

    def save_whole(self, save: Callable[[], None]) -> None:
        """Call ``save`` on the main process while the model's ``state_dict()`` is complete.

        It then has the child's parameters and buffers, whole, floats in float32, on the CPU. All
        ranks must call it; one parameter at a time is whole on their devices.
        """
        saves, weights = comm.is_main_process(), dict[str, Tensor]()
        if self._branch is None:
            if saves:
                save()
            return
        part = self.engine.module
        for name, parameter in part.named_parameters(remove_duplicate=False):
            full = full_parameter(parameter)
            weights |= {name: full} if saves else {}
        if saves:
            persistent = part.state_dict().keys()
            buffers = {n: b for n, b in part.named_buffers() if n in persistent}
            weights |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
            with self._branch.showing(weights):
                save()
        comm.synchronize()


def _join_process_group() -> None:
    """DeepSpeed works in the process group that `launch` made; one process makes its own."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        comm.create_local_process_group(1)
    # Without it DeepSpeed looks for MPI.
    os.environ.setdefault("LOCAL_RANK", str(comm.get_local_rank()))


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

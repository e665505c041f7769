"""The part of a model that is under ZeRO, in a checkpoint: saved, and read into an engine.

DeepSpeed writes a file or two per process and reads them into the same layout only (stage, number
of processes, kind of optimiser). In a checkpoint folder they lie in ``language/zero/``.
`gella.weights.checkpoint` puts whole float32 weights together from any layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gella.engine.zero import full_parameter
from gella.weights.checkpoint import (
    DEEPSPEED_TAG,
    PART_FOLDER,
    deepspeed_folder,
    first_unreadable,
    reading_deepspeed,
    sample_digest,
)

_SAMPLED = 3
"""Parameters whose value is noted with a checkpoint, to be compared after it was loaded."""


def save_engine(engine: Any, folder: Path) -> None:
    """Write the engine's weights and optimiser below a checkpoint's folder; all ranks call it."""
    # The file "latest" lets DeepSpeed's own script, which it puts beside it, find the tag.
    engine.save_checkpoint(str(folder / PART_FOLDER), tag=DEEPSPEED_TAG, save_latest=True)


def part_layout(config: Mapping[str, Any], part: nn.Module) -> dict[str, Any]:
    """What decides how DeepSpeed divides a part among its files, beside the number of processes.

    Plain JSON values, from ``zero.read_config``'s config and the module, before or under the
    engine; ``trained`` is a digest of the trained parameters' names and shapes.
    """
    zero = config["zero_optimization"]
    trained = [(n, p) for n, p in part.named_parameters() if p.requires_grad]
    text = "\n".join(f"{n} {tuple(getattr(p, 'ds_shape', p.shape))}" for n, p in trained)
    return {
        "stage": int(zero["stage"]),
        "bf16": bool(config.get("bf16", {}).get("enabled", False)),
        "gradient sums": str(config.get("data_types", {}).get("grad_accum_dtype")),
        "optimiser offload": str(zero.get("offload_optimizer", {}).get("device", "none")),
        "trained": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def layout_changes(
    saved: Mapping[str, Any], processes: int, layout: Mapping[str, Any], processes_now: int
) -> str:
    """Why DeepSpeed cannot read files of one layout into another, naming both; "" if it can.

    ``saved`` is the :func:`part_layout` of the files, written by so many ``processes``, ``layout``
    the one of now, with ``processes_now``.
    """
    before = {**saved, "processes": processes}
    after = {**layout, "processes": processes_now}
    if before["gradient sums"] == "None" and {before["stage"], after["stage"]} == {1, 2}:
        before["stage"] = after["stage"]  # they divide the optimiser in the same way
    return ", ".join(
        f"{name} {value} -> {after[name]}" for name, value in before.items() if after[name] != value
    )


def sample_weights(engine: Any) -> dict[str, str]:
    """Digests of the float32 values of a few trained parameters by name; all ranks call it."""
    trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    places = {round(i * (len(trained) - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)}
    return current_digests(engine, [trained[place] for place in sorted(places)])


def current_digests(engine: Any, names: Iterable[str]) -> dict[str, str]:
    """The same of these parameters, of those that the engine has; all ranks call it."""
    parameters = dict(engine.module.named_parameters())
    names = [name for name in names if name in parameters]
    return {name: sample_digest(full_parameter(parameters[name])) for name in names}


def check_readable(folder: str | Path) -> None:
    """Open DeepSpeed's files of a checkpoint without reading their tensors.

    So that a damaged one ends a run while it is set up; errors as of :func:`load_engine`.
    """
    path = deepspeed_folder(folder)
    with reading_deepspeed(path):
        if damaged := first_unreadable(path):
            raise damaged[1]


def load_engine(engine: Any, folder: str | Path) -> None:
    """Read the engine's weights and optimiser from a checkpoint of the same layout; all ranks.

    Raises:
        FileNotFoundError: DeepSpeed's files are not there.
        ValueError: they cannot be read; names the file.
    """
    path = deepspeed_folder(folder)
    with reading_deepspeed(path):
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=DEEPSPEED_TAG)
    if loaded is None:  # what DeepSpeed returns instead of an error
        raise ValueError(f"checkpoint {path} could not be loaded by DeepSpeed")


def set_weights(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Give the optimiser's float32 copies exact values; all ranks must call it.

    An engine in bf16 makes its float32 copies from weights that it has rounded before.

    Args:
        engine: DeepSpeed's, at stage 1 or above.
        weights: by name, float32; only the main process's are looked at.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            device = engine.device
            if dist.get_rank() == 0:
                value = weights[name].to(device, torch.float32).contiguous()
            else:
                value = torch.empty(tuple(shape), device=device)
            dist.broadcast(value, 0)
            safe_set_full_fp32_param(parameter, value)

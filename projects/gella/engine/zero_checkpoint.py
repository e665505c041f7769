"""The part of a model that is under ZeRO, in a checkpoint: saved, read back, and put together.

DeepSpeed writes a file or two per process and reads them into the same layout only (stage, number
of processes, kind of optimiser). In a checkpoint folder they lie in ``language/zero/``.
:func:`consolidate_part` puts whole float32 weights together from any layout.

DeepSpeed reads its files with ``torch.load(weights_only=False)``, which would run code of theirs.
Here all reading happens under PyTorch's switch that forces ``weights_only``, with the three plain
data classes of DeepSpeed that its files hold allowed by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gella.engine.zero_branch import full_parameter

__all__ = [
    "PART_FOLDER",
    "check_readable",
    "check_sample",
    "consolidate_part",
    "layout_changes",
    "load_engine",
    "part_layout",
    "sample_weights",
    "save_engine",
    "set_weights",
]

PART_FOLDER = "language"
_TAG = "zero"  # DeepSpeed's name for the folder of one checkpoint
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_SAMPLED = 3
"""Parameters whose value is noted with a checkpoint, to be compared after it was loaded."""


def save_engine(engine: Any, folder: Path) -> None:
    """Write the engine's weights and optimiser below a checkpoint's folder; all ranks call it."""
    # The file "latest" lets DeepSpeed's own script, which it puts beside it, find the tag.
    engine.save_checkpoint(str(folder / PART_FOLDER), tag=_TAG, save_latest=True)


def part_layout(config: Mapping[str, Any], part: nn.Module) -> dict[str, Any]:
    """What decides how DeepSpeed divides a part among its files, beside the number of processes.

    Args:
        config: what ``zero.read_config`` gives.
        part: the module, before or under the engine.

    Returns:
        plain JSON values; ``trained`` is a digest of the trained parameters' names and shapes.
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

    Args:
        saved: the :func:`part_layout` of the files, written by so many ``processes``.
        layout: the one of now, with ``processes_now``.
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
    return _sample(engine, None)


def check_readable(folder: str | Path) -> None:
    """Open DeepSpeed's files of a checkpoint without reading their tensors.

    So that a damaged one ends a run while it is set up.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_engine`.
    """
    for file, error in _unreadable(_files_of(folder)):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {file} cannot be read ({reason})") from error


def load_engine(engine: Any, folder: str | Path) -> None:
    """Read the engine's weights and optimiser from a checkpoint of the same layout; all ranks.

    Raises:
        FileNotFoundError: DeepSpeed's files are not there.
        ValueError: they cannot be read; names the file.
    """
    path = _files_of(folder)
    with _naming_the_file(path), _no_code():
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=_TAG)
    if loaded is None:  # what DeepSpeed returns instead of an error
        raise ValueError(f"checkpoint {path} could not be loaded by DeepSpeed")


def set_weights(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Give the optimiser's float32 copies exact values; all ranks must call it.

    An engine in bf16 makes its float32 copies from weights that it has rounded before.

    Args:
        engine: DeepSpeed's, at stage 1 or above.
        weights: by name, float32, on the main process; not looked at on the others.
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


def check_sample(engine: Any, saved: Mapping[str, str], folder: str | Path) -> None:
    """Compare the engine's weights with what was noted when the checkpoint was saved; all ranks.

    DeepSpeed may report success and keep the initial weights (``load_module_only`` at stage 3).

    Args:
        engine: DeepSpeed's.
        saved: what :func:`sample_weights` gave then.
        folder: of the checkpoint, for the error.

    Raises:
        ValueError: a parameter differs, or is not there.
    """
    _compare(_sample(engine, list(saved)), saved, folder)


def consolidate_part(
    folder: str | Path, sample: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Whole weights of the part under ZeRO from a checkpoint of any layout.

    Trained parameters come from the optimiser's float32 copies, frozen ones and buffers from the
    module's.

    Args:
        folder: a checkpoint's folder, with ``language/zero/`` in it.
        sample: what :func:`sample_weights` gave when it was saved, to be compared.

    Returns:
        tensors on the CPU by their names in the part; floats in float32.

    Raises:
        FileNotFoundError: DeepSpeed's files are not there.
        ValueError: they cannot be read, weights are missing in them, or differ from the sample.
        ImportError: DeepSpeed is not installed.
    """
    path = _files_of(folder)
    with _naming_the_file(path), _no_code():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        first = sorted(path.glob("*model_states.pt"))[0]
        module = torch.load(first, map_location="cpu", weights_only=True, mmap=True)["module"]
        weights: dict[str, Tensor] = {}
        if any(path.glob("*optim_states.pt")):  # there are none at stage 0
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                weights = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=_TAG)
    for name, tensor in module.items():
        # Stage 3 leaves empty tensors in the place of what it has divided.
        if name not in weights and tensor.numel():
            weights[name] = tensor
    missing = sorted(module.keys() - weights.keys())
    if missing:
        raise ValueError(
            f"checkpoint {path} lacks {len(missing)} weights, first {missing[0]}: its files do not"
            " belong together"
        )
    weights = {k: t.detach() for k, t in weights.items()}
    weights = {k: t.float() if t.is_floating_point() else t for k, t in weights.items()}
    found = {name: _digest(weights[name]) for name in sample or {} if name in weights}
    _compare(found, sample or {}, folder)
    return weights


def _files_of(folder: str | Path) -> Path:
    path = Path(folder) / PART_FOLDER / _TAG
    if not any(path.glob("*model_states.pt")):
        raise FileNotFoundError(f"{path} holds no *model_states.pt: the checkpoint is damaged")
    return path


def _sample(engine: Any, names: list[str] | None = None) -> dict[str, str]:
    known = dict(engine.module.named_parameters())
    if names is None:
        trained = [name for name, p in known.items() if p.requires_grad]
        places = {round(i * (len(trained) - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)}
        names = [trained[place] for place in sorted(places)]
    return {name: _digest(full_parameter(known[name])) for name in names if name in known}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:32]


def _compare(found: Mapping[str, str], saved: Mapping[str, str], folder: str | Path) -> None:
    wrong = [name for name, digest in saved.items() if found.get(name) != digest]
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: {len(wrong)} of {len(saved)} compared weights under ZeRO are not"
            f" what was saved, first {wrong[0]}: the files in {PART_FOLDER}/ are damaged or of"
            " another checkpoint, or DeepSpeed did not load them"
        )


@contextlib.contextmanager
def _no_code() -> Iterator[None]:
    """Force ``weights_only`` on every ``torch.load`` in this block."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ImportError(
            f"a checkpoint of ZeRO needs DeepSpeed: pip install 'gella[zero]' ({error})"
        ) from error
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turn whatever reading raises into one ValueError that names the damaged file."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # torch and DeepSpeed raise many types, bare assertions among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        file = next((file for file, _ in _unreadable(path)), path)
        raise ValueError(f"checkpoint {file} cannot be read ({reason})") from error


def _unreadable(path: Path) -> Iterator[tuple[Path, Exception]]:
    for file in sorted(path.glob("*.pt")):
        try:
            with _no_code():
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except ImportError:
            raise
        except Exception as error:  # torch raises many types for a damaged file
            yield file, error

"""Strict loading of weights, from a file of weights or from the folder of a training's checkpoint.

A checkpoint of a run is a folder, ``OUTPUT_DIR/checkpoints/iter_0000399`` (counted from 0), with

- ``model.pth``: ``{"model": weights}``, without the part of the model that trains under ZeRO,
- ``language/zero/``: that part, in DeepSpeed's files, a few per process,
- ``trainer.pth``: states of optimiser, scheduler and hooks,
- ``state.json``: the iteration, and every file with its size; written last.

DeepSpeed reads its files with ``torch.load(weights_only=False)``, which would run code of theirs.
Here all reading happens under PyTorch's switch that forces ``weights_only``, with the three plain
data classes of DeepSpeed that its files hold allowed by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from gella.modeling.filling import built_empty, empty_modules
from gella.utils.hub import model_folder
from gella.weights.files import read_torch, read_weights
from gella.weights.layout import matches_any, some

STATE_FILE, MODEL_FILE, TRAINER_FILE = "state.json", "model.pth", "trainer.pth"
FORMAT = 1
"""Version of ``state.json``; one that is not known here is refused."""
PART_FOLDER, DEEPSPEED_TAG = "language", "zero"
FOLDER_NAME = re.compile(r"iter_(\d{7,})")
LEFT_OVER = re.compile(r"\.iter_\d{7,}\.(tmp|old)")
_logger = logging.getLogger(__name__)


def find_clip(cfg: Any) -> None:
    """Take weights and tokenizer that ``cfg`` does not name from ``MODEL.CLIP.NAME``, if it does.

    Changes ``cfg`` in place. Raises OSError as :func:`gella.utils.hub.model_folder`.
    """
    if cfg.MODEL.CLIP.NAME:
        cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS or str(model_folder(cfg.MODEL.CLIP.NAME))
        cfg.MODEL.LANGUAGE.TOKENIZER = cfg.MODEL.LANGUAGE.TOKENIZER or cfg.MODEL.WEIGHTS


def build_with_weights(
    cfg: Any, path: str | Path, build: Callable[[Any], nn.Module] = build_model
) -> nn.Module:
    """Build the model of a config and load weights into it, strictly.

    The language decoder is built without memory and then filled straight from the mapped files, on
    its device and in its precision (``MODEL.LANGUAGE.DTYPE``): it is never there twice.

    ``path`` as of :func:`load_weights`; "" leaves the model as it was initialised.
    """
    with built_empty(bool(path)):
        model = build(cfg)
    load_weights(model, path, cfg)
    return model


def load_weights(
    model: nn.Module,
    path: str | Path,
    cfg: Any,
    settle: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Load the weights of a file or of a checkpoint's folder into a model, strictly.

    Args:
        model: module on any device; changed in place. A language decoder that was built empty is
            filled: what the weights may lack of it is initialised from ``SEED``.
        path: a checkpoint's folder, what `read_weights` takes, or an address that Detectron2's
            path manager knows; "" leaves the model untrained and says so in the log.
        cfg: gives ``MODEL.WEIGHTS_ALLOW_MISSING`` and ``MODEL.WEIGHTS_ALLOW_UNEXPECTED``.
        settle: see ``Fillable.fill``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or its keys or shapes are not the model's.
    """
    if not path:
        _logger.warning("no weights were given: the model is untrained")
        return
    _logger.info("loading weights %s", path)
    if is_checkpoint(path):
        state = consolidate(path)
    else:
        file = PathManager.get_local_path(str(path)) if "://" in str(path) else path
        if not os.path.exists(file):
            raise FileNotFoundError(f"weights file {path} does not exist: check MODEL.WEIGHTS")
        state = read_weights(file)
    load_state(model, state, cfg, source=str(path), settle=settle)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    cfg: Any,
    *,
    source: str,
    without: str = "",
    settle: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Copy weights into a model, also behind a distributed wrapper, after `check_state_dict`.

    ``source`` is where they come from, for messages; ``without`` a child of the model whose weights
    may be missing, as they are loaded elsewhere; ``cfg`` and ``settle`` as of :func:`load_weights`.
    """
    model = getattr(model, "module", model)
    check_state_dict(state, model, source=source, **allowed_keys(cfg, without))
    expected = model.state_dict().keys()
    missing = [k for k in expected - state.keys() if not k.startswith(f"{without}.")]
    for kind, keys in (("missing", missing), ("unexpected", list(state.keys() - expected))):
        if keys:
            _logger.warning(
                "weights %s, allowed: %d %s: %s", source, len(keys), kind, some(sorted(keys), 10)
            )
    state = dict(state)
    for name, decoder in empty_modules(model).items():
        start = f"{name}."
        own = {k[len(start) :]: state.pop(k) for k in [*state] if k.startswith(start)}
        device, seed = torch.device(cfg.MODEL.DEVICE), max(cfg.SEED, 0)
        decoder.fill(None if name == without else own, device, seed=seed, settle=settle)
    model.load_state_dict(state, strict=False)


def allowed_keys(cfg: Any, without: str = "") -> dict[str, Any]:
    """``MODEL.WEIGHTS_ALLOW_*``, and all keys below the child ``without``, as arguments."""
    missing = (*cfg.MODEL.WEIGHTS_ALLOW_MISSING, *([f"{without}.*"] if without else ()))
    return {"allow_missing": missing, "allow_unexpected": cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED}


def check_state_dict(
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    source: str,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> None:
    """Refuse weights that do not fit a model, before anything is copied into it.

    Args:
        state: weights by key.
        model: the module that is going to load them.
        source: where the weights come from; only named in the error.
        allow_missing, allow_unexpected: shell patterns of keys that the weights may lack (they stay
            initialised) or have in excess.

    Raises:
        ValueError: one message with the count and the first keys of every kind of misfit: missing,
            unexpected, and of another shape (never allowed: such a tensor cannot be copied).
    """
    expected = model.state_dict()
    missing, unexpected = (
        sorted(k for k in keys if not matches_any(k, allowed))
        for keys, allowed in (
            (expected.keys() - state.keys(), tuple(allow_missing)),
            (state.keys() - expected.keys(), tuple(allow_unexpected)),
        )
    )
    reshaped = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in sorted(state.keys() & expected.keys())
        if state[key].shape != expected[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    problems = [f"{len(keys)} {kind}: {some(keys, 10)}" for kind, keys in kinds if keys]
    if problems:
        raise ValueError(
            f"weights {source} do not fit the model: {'; '.join(problems)}. Use the config that the"
            " weights were trained with, or name the keys (shell patterns) in"
            " MODEL.WEIGHTS_ALLOW_MISSING / MODEL.WEIGHTS_ALLOW_UNEXPECTED"
        )


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a folder that holds a checkpoint, complete or not."""
    path = Path(path)
    return path.is_dir() and bool((path / STATE_FILE).is_file() or FOLDER_NAME.fullmatch(path.name))


def read_state(path: str | Path) -> dict[str, Any]:
    """What ``state.json`` of a complete checkpoint says.

    Raises:
        ValueError: the checkpoint is not complete; names the file.
    """
    reason = why_incomplete(path)
    if reason:
        raise ValueError(
            f"checkpoint {path} is not complete: {reason}. Restore the file or take another"
            " checkpoint"
        )
    return json.loads((Path(path) / STATE_FILE).read_text(encoding="utf-8"))


def why_incomplete(path: str | Path) -> str:
    """Why a folder is no complete checkpoint, in a few words that name the file; "" if it is."""
    path = Path(path)
    if LEFT_OVER.fullmatch(path.name):
        return "its writing or deletion was cut short (temporary name)"
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        version, files = state["format"], dict(state["files"])
        int(state["iteration"]), int(state["sequence"])
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} cannot be read ({type(error).__name__}: {error})"
    if version != FORMAT:
        return f"{STATE_FILE} has format {version}, known here is {FORMAT}"
    for name, written in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != written:
            return f"{name} has {size:,} bytes, {written:,} were written"
    return ""


def read_parts(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """A complete checkpoint folder, as it is divided among its files.

    Returns:
        what ``state.json`` says, the weights outside of ZeRO, and the states of the trainer,
        ``{"trainer": ..., "iteration": ...}``.

    Raises:
        ValueError: it is incomplete or damaged; names the file.
    """
    facts = read_state(path)
    weights = read_torch(Path(path) / MODEL_FILE, mmap=True)["model"]
    return facts, dict(weights), read_torch(Path(path) / TRAINER_FILE)


def consolidate(directory: str | Path) -> dict[str, Tensor]:
    """All weights of a checkpoint folder by the model's keys, whatever stage of ZeRO wrote it.

    Args:
        directory: ``OUTPUT_DIR/checkpoints/iter_<iteration>``.

    Returns:
        tensors on the CPU. Of the part under ZeRO, floats in float32: trained parameters from the
        optimiser's float32 copies, frozen ones and buffers from the module's.

    Raises:
        FileNotFoundError: DeepSpeed's files are not there.
        ValueError: the checkpoint is incomplete or damaged; names the file. Or weights are missing
            in DeepSpeed's files, or are not those that were noted when they were saved.
        ImportError: it is of ZeRO, and DeepSpeed is not installed.
    """
    facts = read_state(directory)
    weights = dict(read_torch(Path(directory) / MODEL_FILE, mmap=True)["model"])
    zero = facts.get("zero")
    if zero:
        part = _consolidate_part(deepspeed_folder(directory))
        digests = {name: sample_digest(part[name]) for name in zero["sample"] if name in part}
        check_sample(digests, zero["sample"], directory)
        weights |= {f"{zero['part']}.{name}": tensor for name, tensor in part.items()}
    return weights


def _consolidate_part(path: Path) -> dict[str, Tensor]:
    with reading_deepspeed(path):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        first = sorted(path.glob("*model_states.pt"))[0]
        module = torch.load(first, map_location="cpu", weights_only=True, mmap=True)["module"]
        weights: dict[str, Tensor] = {}
        if any(path.glob("*optim_states.pt")):  # there are none at stage 0
            with contextlib.redirect_stdout(io.StringIO()):  # it prints
                weights = get_fp32_state_dict_from_zero_checkpoint(
                    str(path.parent), tag=DEEPSPEED_TAG
                )
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
    return {k: t.float() if t.is_floating_point() else t for k, t in weights.items()}


def deepspeed_folder(folder: str | Path) -> Path:
    """The folder of DeepSpeed's files in a checkpoint; FileNotFoundError if there are none."""
    path = Path(folder) / PART_FOLDER / DEEPSPEED_TAG
    if not any(path.glob("*model_states.pt")):
        raise FileNotFoundError(f"{path} holds no *model_states.pt: the checkpoint is damaged")
    return path


def sample_digest(tensor: Tensor) -> str:
    """Digest of a CPU tensor's values, noted with a checkpoint for a few weights under ZeRO."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:32]


def check_sample(digests: Mapping[str, str], saved: Mapping[str, str], folder: str | Path) -> None:
    """Compare digests of weights under ZeRO with those in ``state.json`` (``saved``), by name.

    DeepSpeed may report success and keep the initial weights (``load_module_only`` at stage 3).

    Raises:
        ValueError: a parameter differs, or is not there; names the checkpoint's folder.
    """
    wrong = [name for name, digest in saved.items() if digests.get(name) != digest]
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: {len(wrong)} of {len(saved)} compared weights under ZeRO are not"
            f" what was saved, first {wrong[0]}: the files in {PART_FOLDER}/ are damaged or of"
            " another checkpoint, or DeepSpeed did not load them"
        )


@contextlib.contextmanager
def reading_deepspeed(path: Path) -> Iterator[None]:
    """Read DeepSpeed's files without running code of theirs, and with one error for all damages.

    Whatever is raised inside becomes a ValueError that names the damaged file, but ImportError:
    DeepSpeed is not installed.
    """
    try:
        with _weights_only():
            yield
    except ImportError:
        raise
    except Exception as error:  # torch and DeepSpeed raise many types, bare assertions among them
        file, _ = first_unreadable(path) or (path, error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {file} cannot be read ({reason})") from error


def first_unreadable(path: Path) -> tuple[Path, Exception] | None:
    """The first of DeepSpeed's files that is damaged, and how; tensors are not read."""
    for file in sorted(path.glob("*.pt")):
        try:
            with _weights_only():
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except ImportError:
            raise
        except Exception as error:  # torch raises many types for a damaged file
            return file, error
    return None


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Force ``weights_only`` on every ``torch.load`` in this block."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ImportError(
            f"a checkpoint of ZeRO needs DeepSpeed: pip install 'gella[zero]' ({error})"
        ) from error
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before

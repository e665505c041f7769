"""What is in the folder of one checkpoint: read in parts, or as one set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gella.engine.checkpoint_store import read_state
from gella.engine.zero_checkpoint import consolidate_part
from gella.weights.files import read_torch

MODEL_FILE, TRAINER_FILE = "model.pth", "trainer.pth"

__all__ = ["consolidate", "read_parts", "read_trainer"]


def read_parts(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A complete checkpoint folder: what ``state.json`` says, and the states in its files.

    Returns:
        the facts, and ``{"model": weights outside of ZeRO, "trainer": ..., "iteration": ...}``.

    Raises:
        ValueError: it is incomplete or damaged; names the file.
    """
    facts = read_state(path)
    weights = read_torch(Path(path) / MODEL_FILE, mmap=True)["model"]
    return facts, {**read_trainer(path), "model": weights}


def read_trainer(path: str | Path) -> dict[str, Any]:
    """States of optimiser, scheduler and hooks in a checkpoint folder; see :func:`read_parts`."""
    return read_torch(Path(path) / TRAINER_FILE)


def consolidate(directory: str | Path) -> dict[str, Tensor]:
    """All weights of a checkpoint folder by the model's keys, whatever stage of ZeRO wrote it.

    Args:
        directory: ``OUTPUT_DIR/checkpoints/iter_<iteration>``.

    Returns:
        tensors on the CPU; of the part under ZeRO the optimiser's float32 copies.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; names the file.
        ImportError: it is of ZeRO, and DeepSpeed is not installed.
    """
    facts = read_state(directory)
    weights = dict(read_torch(Path(directory) / MODEL_FILE, mmap=True)["model"])
    zero = facts.get("zero")
    if zero:
        part = consolidate_part(directory, zero["sample"])
        weights |= {f"{zero['part']}.{name}": tensor for name, tensor in part.items()}
    return weights

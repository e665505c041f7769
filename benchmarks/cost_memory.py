"""Activation memory of a training step: what autograd keeps for the backward pass, part by part.

Counted are the storages of all tensors saved for backward, each once, for the part that saves it
first, whole even where a view is saved. Parameters and buffers are not counted; their copies in
bfloat16 that autocast makes are. Autocast is the CPU's, which runs norms in bfloat16; CUDA's keeps
them in float32, so that the vision side takes more there. All prompts of the batch are as long.

The parts run on fake tensors (see `cost_passes.py`); the mask and association losses, whose work
depends on values, run for real on random logits of the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cost_passes import (
    Workload,
    count_image_tokens,
    make_fake,
    run_language,
    run_vision,
    text_pass,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from gella.modeling.criterion import GellaCriterion, LossCounts
from gella.modeling.mask_decoder import MaskDecoderOutput


class SavedBytes:
    """Adds up what autograd saves; an instance is an ``Around`` of `cost_passes.py`."""

    def __init__(self, *modules: nn.Module) -> None:
        """Nothing saved yet; parameters and buffers of ``modules`` will not count."""
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        # Weak references keep an address from being used again, so that they compare safely.
        self._seen = {StorageWeakRef(t.untyped_storage()) for t in tensors}
        self.parts: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What is saved inside counts for ``part``."""
        self.parts.setdefault(part, 0)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._seen:
                self._seen.add(reference)
                self.parts[part] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def saved_bytes(
    model: nn.Module, cfg: Any, load: Workload, batch: int, half: bool
) -> dict[str, Any]:
    """Bytes saved for backward in one training step; the model's tensors become fake.

    Args:
        model: built from ``cfg``.
        cfg: the config. load: of each image. batch: images.
        half: the language branch in bfloat16, as ZeRO keeps it, and autocast for the rest; float32
            without.

    Returns:
        ``parts``: ``{part: bytes}``, losses last; ``sums``: bytes of all parts, ``plain`` as they
        are and ``checkpointed``, when each block of the language decoder keeps its input only and
        is computed again in the backward pass: all inputs, and one whole block at a time.
    """
    model.train()
    # In training these layers look whether a value is infinite, which no fake tensor can tell;
    # without dropout that is all evaluation changes.
    model.mask_decoder.pixel_decoder.encoder.eval()
    for module in model.language_decoder.llama.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # whatever the config says, both ways are told
    dtype = torch.bfloat16 if half else torch.float32
    one = text_pass(load, count_image_tokens(cfg))
    with FakeTensorMode():
        for name, child in model.named_children():
            make_fake(child, dtype if name == "language_decoder" else torch.float32)
        saved = SavedBytes(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output, grid = run_vision(model, cfg, load.entities, batch, saved)
            with _watched_blocks(model, saved) as block:
                logits, nouns = run_language(model, grid, one, saved)
            with saved("association"):
                scores = model.association(nouns, output.query_embeddings)
        targets = torch.empty(len(logits), dtype=torch.int64)
        with saved("losses"):
            F.cross_entropy(logits.float(), targets, reduction="sum")
        shapes = [_shape(x) for x in (*output.entity_logits, *output.mask_logits)]
    inputs = block["count"] * batch * one.length * model.language_decoder.hidden_size
    spared = max(0, block["all"] - inputs * dtype.itemsize - block["last"])
    saved.parts["losses"] += criterion_bytes(
        cfg, load.entities, shapes, [_shape(score) for score in scores], output.query_valid.shape
    )
    plain = sum(saved.parts.values())
    return {"parts": saved.parts, "sums": {"plain": plain, "checkpointed": plain - spared}}


def criterion_bytes(
    cfg: Any,
    entities: int,
    outputs: list[tuple[Any, torch.dtype]],
    scores: list[tuple[Any, torch.dtype]],
    valid: torch.Size,
) -> int:
    """Bytes that the losses of masks, entities and association save, from a real run.

    Args:
        cfg: the config. entities: of each image.
        outputs: shape and dtype of the entity logits of every layer, then of the mask logits.
        scores: of the association logits, per image.
        valid: (B, Q).
    """
    side = cfg.INPUT.GELLA.COLORMAP_SIZE
    masks = torch.zeros(entities, side, side, dtype=torch.bool)
    masks[:, 0, 0] = True  # an entity without a pixel would be left out
    generator = torch.Generator().manual_seed(0)
    filled = [
        torch.randn(shape, generator=generator).to(kind).requires_grad_()
        for shape, kind in (*outputs, *scores)
    ]
    half = len(outputs) // 2
    output = MaskDecoderOutput(
        query_embeddings=torch.empty(valid),  # only its device is looked at
        entity_logits=filled[:half],
        mask_logits=filled[half : 2 * half],
        query_valid=torch.ones(valid, dtype=torch.bool),
    )
    criterion = GellaCriterion(cfg)
    saved = SavedBytes(criterion)
    with torch.random.fork_rng(devices=[]), saved("losses"):
        criterion(
            output,
            target_masks=[masks] * valid[0],
            counts=LossCounts(1.0, 1.0, 1.0, 1.0),  # whatever they are, as much is saved
            association_logits=filled[2 * half :],
            association_targets=[torch.zeros(shape[0], entities) for shape, _ in scores],
        )
    return saved.parts["losses"]


def _shape(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _blocks(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    llama = model.language_decoder.llama
    return [m for m in llama.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def _watched_blocks(model: nn.Module, saved: SavedBytes) -> Iterator[dict[str, int]]:
    """Bytes saved inside the transformer blocks: of ``all``, of the ``last`` one, and ``count``."""
    blocks = _blocks(model)
    found = {"all": 0, "last": 0, "count": len(blocks)}
    start = {"bytes": 0}

    def before(*_: Any) -> None:
        start["bytes"] = saved.parts["language decoder"]

    def after(*_: Any) -> None:
        found["last"] = saved.parts["language decoder"] - start["bytes"]
        found["all"] += found["last"]

    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

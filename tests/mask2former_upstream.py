"""Mask2Former's own code for comparisons, where its repository and Detectron2 are importable."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from typing import Any

import pytest


def upstream() -> Any:
    """The module `mask2former`; skips with a reason where there is none."""
    module, reason = _load()
    if module is None:
        pytest.skip(reason)
    return module


@functools.cache
def _load() -> tuple[Any, str]:
    # Once: a failed import leaves half of its registrations behind and cannot be repeated.
    import detectron2

    if importlib.util.find_spec("mask2former") is None:
        return None, "Mask2Former's repository (facebookresearch/Mask2Former) is not on PYTHONPATH"
    if "core" in detectron2.__version__:
        return None, "Mask2Former needs Detectron2 itself"
    # Compiled parts that are imported and not used here: the deformable attention falls back to
    # PyTorch when its operator fails, and nothing is evaluated on COCO or augmented. They go again
    # at once, so that nobody takes them for the real ones.
    missing = ("MultiScaleDeformableAttention", "detectron2._C", "cv2")
    stubs = {n: types.ModuleType(n) for n in missing if importlib.util.find_spec(n) is None}
    sys.modules.update(stubs)
    try:
        import mask2former
    except Exception as error:
        return None, f"Mask2Former cannot be imported: {error!r}"
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
    return mask2former, ""


def published_keys(
    dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, queries: int
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a COCO panoptic checkpoint of Mask2Former, as the model zoo has them.

    Written down from the published architecture, so that it can be checked without upstream;
    where upstream is importable a test compares the two.
    """
    keys: dict[str, tuple[int, ...]] = {"criterion.empty_weight": (134,)}

    def linear(name: str, out: int, *rest: int, bias: bool = True) -> None:
        keys[f"{name}.weight"] = (out, *rest)
        if bias:
            keys[f"{name}.bias"] = (out,)

    swin = "backbone."
    linear(swin + "patch_embed.proj", dim, 3, 4, 4)
    linear(swin + "patch_embed.norm", dim)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        linear(f"{swin}norm{stage}", width)
        for block in range(depth):
            name = f"{swin}layers.{stage}.blocks.{block}."
            linear(name + "norm1", width)
            linear(name + "norm2", width)
            linear(name + "attn.qkv", 3 * width, width)
            linear(name + "attn.proj", width, width)
            linear(name + "mlp.fc1", 4 * width, width)
            linear(name + "mlp.fc2", width, 4 * width)
            table = (2 * window - 1) ** 2, heads[stage]
            keys[name + "attn.relative_position_bias_table"] = table
            keys[name + "attn.relative_position_index"] = (window**2, window**2)
        if stage < 3:
            name = f"{swin}layers.{stage}.downsample."
            linear(name + "norm", 4 * width)
            linear(name + "reduction", 2 * width, 4 * width, bias=False)

    pixel = "sem_seg_head.pixel_decoder."
    for level, channels in enumerate((8 * dim, 4 * dim, 2 * dim)):
        linear(f"{pixel}input_proj.{level}.0", 256, channels, 1, 1)
        linear(f"{pixel}input_proj.{level}.1", 256)
    linear(pixel + "adapter_1", 256, dim, 1, 1, bias=False)
    linear(pixel + "adapter_1.norm", 256)
    linear(pixel + "layer_1", 256, 256, 3, 3, bias=False)
    linear(pixel + "layer_1.norm", 256)
    linear(pixel + "mask_features", 256, 256, 1, 1)
    keys[pixel + "transformer.level_embed"] = (3, 256)
    for layer in range(6):
        name = f"{pixel}transformer.encoder.layers.{layer}."
        linear(name + "self_attn.sampling_offsets", 8 * 3 * 4 * 2, 256)
        linear(name + "self_attn.attention_weights", 8 * 3 * 4, 256)
        linear(name + "self_attn.value_proj", 256, 256)
        linear(name + "self_attn.output_proj", 256, 256)
        linear(name + "linear1", 1024, 256)
        linear(name + "linear2", 256, 1024)
        linear(name + "norm1", 256)
        linear(name + "norm2", 256)

    head = "sem_seg_head.predictor."
    keys[head + "static_query.weight"] = (queries, 256)
    keys[head + "query_embed.weight"] = (queries, 256)
    keys[head + "level_embed.weight"] = (3, 256)
    linear(head + "decoder_norm", 256)
    linear(head + "class_embed", 134, 256)
    for layer in range(3):
        linear(f"{head}mask_embed.layers.{layer}", 256, 256)
    for layer in range(9):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"{head}transformer_{kind}_attention_layers.{layer}."
            keys[f"{name}{attention}.in_proj_weight"] = (768, 256)
            keys[f"{name}{attention}.in_proj_bias"] = (768,)
            linear(f"{name}{attention}.out_proj", 256, 256)
            linear(name + "norm", 256)
        name = f"{head}transformer_ffn_layers.{layer}."
        linear(name + "linear1", 2048, 256)
        linear(name + "linear2", 256, 2048)
        linear(name + "norm", 256)
    return keys

"""The model of a config without memory, and its parameters part by part beside published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import nn

# Figure 2's boxes and the module of each; what is left over is listed too.
PARTS = (
    ("colormap encoder", "colormap_encoder"),
    ("image encoder", "image_encoder"),
    ("ResoBlend", "resoblend"),
    ("mask decoder", "mask_decoder"),
    ("projector", "language_decoder.projector"),
    ("language decoder", "language_decoder.llama"),
    ("association", "association"),
)
LLAMA_WORDS = 32_000


@dataclass(frozen=True)
class Published:
    """The size of a model as published, and how our count becomes comparable.

    Attributes:
        part: a name of ``PARTS``.
        name: the published model.
        count: its parameters.
        difference: parameters that the published count has and ours has not (negative: ours more).
        rule: the difference in words.
    """

    part: str
    name: str
    count: int
    difference: int
    rule: str


def build_on_meta(cfg: Any) -> nn.Module:
    """The model of a config without memory for its weights; ``cfg`` is not changed."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def count_parameters(module: nn.Module, *, trained_only: bool = False) -> int:
    """Number of parameters, each counted once; buffers do not count."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def largest_layer(module: nn.Module) -> int:
    """The most parameters that one module owns itself: what ZeRO's stage 3 gathers at once."""
    return max(sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules())


def part_sizes(model: nn.Module) -> list[tuple[str, int, int]]:
    """Rows (part, parameters, trained parameters); the last row is the whole model."""
    rows = []
    for title, path in PARTS:
        module = model.get_submodule(path)
        rows.append((title, count_parameters(module), count_parameters(module, trained_only=True)))
    total = (count_parameters(model), count_parameters(model, trained_only=True))
    rest = [total[i] - sum(row[i + 1] for row in rows) for i in (0, 1)]
    if any(rest):
        rows.append(("other", rest[0], rest[1]))
    return [*rows, ("all", *total)]


def published_sizes(cfg: Any) -> list[Published]:
    """Published models whose sizes the config has."""
    language, clip = cfg.MODEL.LANGUAGE, cfg.MODEL.IMAGE_ENCODER
    found = []
    llama = (language.HIDDEN_SIZE, language.INTERMEDIATE_SIZE, language.NUM_LAYERS)
    llamas = {(4096, 11008, 32): ("7B", 6_738_415_616), (5120, 13824, 40): ("13B", 13_015_864_320)}
    if llama in llamas and language.NUM_KEY_VALUE_HEADS == language.NUM_HEADS:
        size, count = llamas[llama]
        added = language.VOCAB_SIZE - LLAMA_WORDS
        rule = f"without the {added} added word(s), a row each in the embedding and the output"
        difference = -2 * added * language.HIDDEN_SIZE
        found.append(Published("language decoder", f"LLaMA-{size}", count, difference, rule))
    tower = (clip.IMAGE_SIZE, clip.PATCH_SIZE, clip.WIDTH, clip.LAYERS, clip.STEM)
    if tower == (336, 14, 1024, 24, "patch"):
        rule = "with the final norm and the 1024 x 768 projection, which no part here reads"
        difference = 2 * clip.WIDTH + clip.WIDTH * 768
        name = "CLIP ViT-L/14-336, vision"
        found.append(Published("image encoder", name, 304_293_888, difference, rule))
    return found


def compare_published(cfg: Any, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Per published model of the config a dict ``name``, ``parameters``, ``ours``, ``rule``.

    Args:
        cfg: the config. counts: parameters by part.
    """
    return [
        {
            "name": item.name,
            "parameters": item.count,
            "ours": counts[item.part] + item.difference,
            "rule": item.rule,
        }
        for item in published_sizes(cfg)
    ]

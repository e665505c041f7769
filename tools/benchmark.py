#!/usr/bin/env python
"""What a configuration costs, and how fast the data path is.

    python tools/benchmark.py cost --config-file configs/gella_swin_t.yaml
    python tools/benchmark.py data --json data.json

``cost`` builds the model on the meta device, which needs no memory for weights, and prints the
parameters of each part of the paper's Figure 2, beside published sizes where the config has them.
``data`` times the mapper, the loader and the colormap; see tools/benchmark_data.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import benchmark_data
import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from gella import load_config
from gella.evaluation.results import write_json

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


def count_parameters(module: nn.Module, *, trained_only: bool = False) -> int:
    """Number of parameters, each counted once; buffers do not count."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def build_on_meta(cfg: Any) -> nn.Module:
    """The model of a config without memory for its weights; ``cfg`` is not changed."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


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


def measure_cost(cfg: Any) -> dict[str, Any]:
    """Figures of ``cost``.

    Returns:
        ``parts``: ``{part: {"parameters", "trained"}}``, the last one "all"; ``published``: a dict
        per comparable published model: its ``name`` and ``parameters``, ``ours`` counted by its
        ``rule``.
    """
    sizes = part_sizes(build_on_meta(cfg))
    counts = {part: count for part, count, _ in sizes}
    published = [
        {
            "name": item.name,
            "parameters": item.count,
            "ours": counts[item.part] + item.difference,
            "rule": item.rule,
        }
        for item in published_sizes(cfg)
    ]
    parts = {part: {"parameters": count, "trained": trained} for part, count, trained in sizes}
    return {"parts": parts, "published": published}


def cost_table(figures: dict[str, Any]) -> str:
    """The printed tables of ``cost``."""
    rows = [
        (part, f"{size['parameters']:,}", f"{size['trained']:,}")
        for part, size in figures["parts"].items()
    ]
    text = tabulate(rows, ["part", "parameters", "trained"], colalign=("left", "right", "right"))
    lines = []
    for item in figures["published"]:
        difference = item["ours"] - item["parameters"]
        verdict = f"differs by {difference:+,}" if difference else "equal"
        count = f"{item['parameters']:,}"
        lines.append((item["name"], count, f"{item['ours']:,}", verdict, item["rule"]))
    if lines:
        head = ["published model", "published", "ours", "", "counted"]
        text += "\n\n" + tabulate(
            lines, head, colalign=("left", "right", "right", "left", "left"), disable_numparse=True
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cost = commands.add_parser("cost", help="parameters per part, on the meta device")
    cost.add_argument("--config-file", required=True, metavar="FILE")
    cost.add_argument("--json", metavar="FILE", help="write the figures there too")
    cost.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    data = commands.add_parser("data", help="images per second of mapper and loader")
    benchmark_data.add_arguments(data)
    args = parser.parse_args(arguments)
    try:
        if args.command == "data":
            benchmark_data.run(args)
            return 0
        cfg = load_config(args.config_file, args.opts)
        figures = measure_cost(cfg)
        print(f"{args.config_file}\n\n{cost_table(figures)}")
        if args.json:
            write_json(args.json, figures)
            print(f"\nwrote {args.json}")
    except (KeyError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a configuration costs, counted without weights or a GPU: parameters, FLOPs, memory.

The model is built on the meta device and run on tensors without data, in seconds.

GFLOPs: of one image, a multiply-add as 2 and beside it as 1. Matrix products, convolutions,
attention (causal attention in full) and bilinear sampling count; work element by element, norms and
resizing do not. The language decoder takes one parallel pass over image, question and answer, with
word logits at the answer. Papers count both ways; the table says which length of a pass Table 12's
figure would mean in each.

Activations: what autograd keeps for the backward pass of one training step with --batch images,
each storage once; parameters not. bf16: language branch in bfloat16, autocast for the rest (the
CPU's, with norms in bfloat16).

ZeRO: weights, gradients and Adam's states of the language branch per GPU by the ZeRO paper's
arithmetic (2 + 2 + 12 bytes a parameter in bf16, 4 + 4 + 8 in fp32), the rest of the model whole on
every GPU in float32 (4 + 4 + 8, and 4 for gradient buckets), and the activations. A plan fits a
card when the sum is under 90 % of it; what CUDA, communication and fragments take has to find room
in the rest. "checkpointed": blocks of the language decoder keep their
input only and are computed again in the backward pass.
"""

from __future__ import annotations

import argparse
from typing import Any

from cost_flops import count_flops
from cost_memory import saved_bytes
from cost_parameters import (
    build_on_meta,
    compare_published,
    count_parameters,
    largest_layer,
    part_sizes,
)
from cost_passes import Workload, count_image_tokens
from cost_tables import cost_report
from cost_zero import Branch, plan_rows
from torch import nn
from tqdm import tqdm

from gella import load_config
from gella.utils.io import write_json

EXAMPLE = """example:
  python tools/benchmark.py cost --config-file configs/gella_swin_t.yaml --zero-gpus 8 \\
      --caption-tokens 60 --nouns 12 INPUT.GELLA.COLORMAP_SIZE 672
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to a parser."""
    add, load = parser.add_argument, Workload()
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add("--config-file", required=True, metavar="FILE")
    for name, default, text in (
        ("caption-tokens", load.caption_tokens, "of the caption in the question"),
        ("nouns", load.nouns, "semantic nouns of the caption, one <SEG> each"),
        ("noun-tokens", load.noun_tokens, "of one noun in the answer, beside <SEG> and a comma"),
        (
            "prompt-tokens",
            load.prompt_tokens,
            "system line, roles and instruction; LLaVA-1.5: about 60",
        ),
        ("entities", load.entities, "entity masks of the image"),
        ("zero-gpus", 8, "GPUs that share the language branch"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    add("--batch", type=int, metavar="N", help="images per GPU (default: the config's share)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 where SOLVER.AMP is on")
    add("--json", metavar="FILE", help="write the figures there too, in FLOPs and bytes")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures; ValueError or OSError for wrong arguments.

    Returns:
        ``workload``; ``parts``: ``{part: {"parameters", "trained", "flops", "activations"}}``, the
        last one "all"; ``published``; ``language``, ``table_12``, ``implied_tokens`` of
        :func:`cost_flops.count_flops`; ``activations``: bytes ``plain`` and ``checkpointed``;
        ``zero``: rows of :func:`cost_zero.plan_rows`.
    """
    cfg = load_config(args.config_file, args.opts)
    load = Workload(
        args.caption_tokens, args.nouns, args.noun_tokens, args.prompt_tokens, args.entities
    )
    load.check(count_image_tokens(cfg), cfg.MODEL.LANGUAGE.MAX_POSITIONS)
    gpus, batch = args.zero_gpus, args.batch
    if batch is None:
        batch = max(1, cfg.SOLVER.IMS_PER_BATCH // max(1, gpus))
    if batch < 1 or gpus < 1:
        raise ValueError(f"--batch is {batch} and --zero-gpus {gpus}; both must be at least 1")
    precision = args.precision or ("bf16" if cfg.SOLVER.AMP.ENABLED else "fp32")
    steps = tqdm(("model", "activations", "FLOPs"), leave=False)
    model = build_on_meta(cfg)
    steps.update()
    sizes = part_sizes(model)
    language, rest = _branches(model)
    saved = saved_bytes(model, cfg, load, batch, half=precision == "bf16")
    steps.update()
    flops = count_flops(model, cfg, load)
    steps.close()
    return {
        "workload": {
            **vars(load),
            "answer_tokens": load.answer,
            "image_tokens": count_image_tokens(cfg),
            "image_size": cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE,
            "colormap_size": cfg.INPUT.GELLA.COLORMAP_SIZE,
        },
        "batch": batch,
        "gpus": gpus,
        "precision": precision,
        "parts": _parts(sizes, flops.pop("parts"), saved["parts"]),
        "published": compare_published(cfg, {part: count for part, count, _ in sizes}),
        **flops,
        "activations": saved["sums"],
        "zero": plan_rows(language, rest, gpus, precision, saved["sums"]),
    }


def _branches(model: nn.Module) -> tuple[Branch, Branch]:
    whole, language = (
        Branch(count_parameters(m), count_parameters(m, trained_only=True), largest_layer(m))
        for m in (model, model.language_decoder)
    )
    parameters, trained = (
        whole.parameters - language.parameters,
        whole.trained - language.trained,
    )
    return language, Branch(parameters, trained)


def _parts(
    sizes: list[tuple[str, int, int]], flops: dict[str, int], saved: dict[str, int]
) -> dict[str, dict[str, int]]:
    *single, whole = [*sizes]
    single.append(("losses", 0, 0))
    rows = {
        part: {
            "parameters": count,
            "trained": trained,
            "flops": flops.get(part, 0),
            "activations": saved.get(part, 0),
        }
        for part, count, trained in single
    }
    _, count, trained = whole
    sums = {"flops": sum(flops.values()), "activations": sum(saved.values())}
    return {**rows, "all": {"parameters": count, "trained": trained, **sums}}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write ``--json``; the figures. Wrong arguments: ValueError, OSError."""
    figures = measure(args)
    print(f"{args.config_file}\n\n{cost_report(figures)}")
    if args.json:
        write_json(args.json, figures)
        print(f"\nwrote {args.json}")
    print(
        "\nnext: python tools/train_net.py --config-file "
        f"{args.config_file} --num-gpus {args.zero_gpus}"
    )
    return figures

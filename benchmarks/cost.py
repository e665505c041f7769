"""What a configuration costs, counted without weights or a GPU: parameters, FLOPs, memory.

example:
    python tools/benchmark.py cost --config-file configs/gella_swin_t.yaml --zero-gpus 8 \\
        --caption-tokens 60 --nouns 12 INPUT.GELLA.COLORMAP_SIZE 672

The model is built on the meta device and run on tensors without data, in seconds. --json has the
figures in FLOPs and bytes.

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

Training: memory of the config's own plan at the longest prompt that the records of each training
dataset are taken to give (gella/engine/memory.py), and days: 3 times a forward pass an image (once
what is frozen), at 40 % of the 312 TFLOPS of an A100 in bfloat16. "next" is the config's command
where it fits 80 GiB, else with the first plan that does.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measuring import OPTS
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from gella import load_config
from gella.engine.memory import (
    CARDS,
    GIB,
    USABLE,
    Branch,
    Workload,
    build_on_meta,
    count_image_tokens,
    count_parameters,
    embed_prompt,
    longest_prompts,
    make_fake,
    plan_rows,
    plans,
    run_language,
    run_model,
    saved_bytes,
    zero_branches,
)
from gella.engine.optimizer import with_epochs

aten = torch.ops.aten
# Table 12a, GFLOPs: language model, image and mask encoder, mask decoder, all.
TABLE_12 = {
    "LISA (Table 12)": (92_607, 3_114, 226, 95_947),
    "GELLA (Table 12)": (11_987, 204, 113, 12_304),
}
COLUMNS = {
    "LLM": ("projector", "language decoder"),
    "IME": ("image encoder", "colormap encoder"),
    "MMD": ("ResoBlend", "mask decoder", "association"),
}
# The language decoder's ways to ground the nouns of a caption, as two tables call them.
WAYS = {
    "given": ("nouns given", "nouns given, one pass"),
    "generated": ("answer generated", "answer generated, then one pass over it"),
    "one_noun": ("a pass per noun", "a pass per noun, with the caption"),
    "noun_alone": (
        "a pass per noun without caption",
        "a pass per noun, noun in place of the caption",
    ),
}
_LOAD = Workload()
NUMBERS = {
    "caption-tokens": (_LOAD.caption_tokens, 0, "of the caption in the question"),
    "nouns": (_LOAD.nouns, 1, "semantic nouns of the caption, one <SEG> each"),
    "noun-tokens": (_LOAD.noun_tokens, 1, "of one noun in the answer, beside <SEG> and a comma"),
    "prompt-tokens": (_LOAD.prompt_tokens, 0, "system line, roles, instruction; LLaVA-1.5: 60"),
    "entities": (_LOAD.entities, 1, "entity masks of the image"),
    "zero-gpus": (8, 1, "GPUs that share the language branch"),
    "batch": (None, 1, "images per GPU; default: the config's share"),
}
OPTIONS = {
    "--config-file": {"required": True, "metavar": "FILE"},
    "--precision": {"choices": ("bf16", "fp32"), "help": "default: bf16 where SOLVER.AMP is on"},
    "opts": OPTS,
}
NEXT = "{next}"  # of `run`: the command that fits
A100, UTILISATION = 312e12, 0.4  # FLOPS in bfloat16, and the share of it that is used
MIB = 2**20
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
# LLaMA's hidden and inner size and blocks, and its name and parameters with 32,000 words.
LLAMAS = {(4096, 11008, 32): ("7B", 6_738_415_616), (5120, 13824, 40): ("13B", 13_015_864_320)}
LLAMA_WORDS = 32_000


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print. ValueError, OSError for wrong arguments.

    Returns:
        figures: ``workload``; ``training``: see :func:`training_figures`; ``parts``: ``{part:
        {"parameters", "trained", "flops", "activations"}}``, the last one "all"; ``published``;
        ``language``, ``table_12``,
        ``implied_tokens`` of :func:`count_flops`; ``activations``: bytes ``plain`` and
        ``checkpointed``; ``zero``: rows of :func:`plan_rows`.
    """
    cfg = load_config(args.config_file, args.opts)
    load = Workload(*(getattr(args, name) for name in Workload._fields))
    tokens, longest = count_image_tokens(cfg), cfg.MODEL.LANGUAGE.MAX_POSITIONS
    if load.length(tokens) > longest:
        raise ValueError(
            f"{load.length(tokens)} tokens ({tokens} of them image) are more than "
            f"MODEL.LANGUAGE.MAX_POSITIONS {longest}: lower --caption-tokens "
            f"{load.caption_tokens} or --nouns {load.nouns}, or raise the key"
        )
    shares = args.zero_gpus * cfg.SOLVER.ACCUMULATE
    batch = args.batch or max(1, cfg.SOLVER.IMS_PER_BATCH // shares)
    precision = args.precision or ("bf16" if cfg.SOLVER.AMP.ENABLED else "fp32")
    with tqdm(("model", "activations", "FLOPs"), leave=False) as steps:
        model = build_on_meta(cfg)
        steps.update()
        sizes, branches = part_sizes(model), zero_branches(model)
        saved = saved_bytes(model, cfg, load, batch, half=precision == "bf16")
        steps.update()
        training = training_figures(args, cfg, model, branches, batch, precision == "bf16")
        flops = count_flops(model, cfg, load)
    counted, kept = flops.pop("parts"), saved["parts"]
    image = sum(n * (3 if sizes[part][1] else 1) for part, n in counted.items())
    images = training["iterations"] * cfg.SOLVER.IMS_PER_BATCH
    training["days"] = image * images / (args.zero_gpus * A100 * UTILISATION) / 86_400
    counted["all"], kept["all"] = sum(counted.values()), saved["sums"]["plain"]
    sizes.update(losses=(0, 0), all=sizes.pop("all"))  # the sum stays the last
    names = ("parameters", "trained", "flops", "activations")
    figures = {
        "workload": {
            **load._asdict(),
            "answer_tokens": load.answer,
            "image_tokens": tokens,
            "image_size": cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE,
            "colormap_size": cfg.INPUT.GELLA.COLORMAP_SIZE,
        },
        "batch": batch,
        "gpus": args.zero_gpus,
        "precision": precision,
        "parts": {
            part: dict(zip(names, (*size, counted.get(part, 0), kept.get(part, 0))))
            for part, size in sizes.items()
        },
        "published": compare_published(cfg, sizes),
        **flops,
        "activations": saved["sums"],
        "training": training,
        "zero": plan_rows(*branches, args.zero_gpus, precision, saved["sums"]),
    }
    return figures, f"{args.config_file}\n\n{cost_report(figures)}"


# -- the config's own training ---------------------------------------------------------------------


def training_figures(
    args: argparse.Namespace,
    cfg: Any,
    model: nn.Module,
    branches: tuple[Branch, Branch],
    batch: int,
    half: bool,
) -> dict[str, Any]:
    """Memory at the longest prompts, and in ``args.next`` the command that fits.

    Returns:
        ``iterations``; ``longest``: by training dataset ``tokens`` of its longest prompt and
        ``gpu``, bytes of each GPU.
    """
    image, longest, made = count_image_tokens(cfg), {}, []
    for name, load in longest_prompts(cfg).items():
        sums = saved_bytes(model, cfg, load, batch, half)["sums"]
        made.append(plans(cfg, *branches, args.zero_gpus, sums))
        longest[name] = {"tokens": load.length(image), "gpu": made[-1][0].gpu}
    room = USABLE * CARDS[-1] * GIB
    ways = (options[0].overrides for options in zip(*made) if max(o.gpu for o in options) <= room)
    plan = next(ways, None)
    changes = f" {shlex.join(map(str, args.opts))}" if args.opts else ""
    args.next = (
        f"python tools/train_net.py --config-file {args.config_file} --num-gpus {args.zero_gpus}"
        f"{changes}{plan}"
        if plan is not None
        else f"no plan fits {CARDS[-1]} GiB on {args.zero_gpus} GPU(s): raise --zero-gpus"
    )
    return {"iterations": with_epochs(cfg, 0).SOLVER.MAX_ITER, "longest": longest}


# -- parameters ------------------------------------------------------------------------------------


def part_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters and trained ones of each part, of "other" ones where there are, and of "all"."""
    sizes = {title: count_parameters(model.get_submodule(path)) for title, path in PARTS}
    total = count_parameters(model)
    parts = [sum(counts) for counts in zip(*sizes.values())]
    if total != tuple(parts):
        sizes["other"] = total[0] - parts[0], total[1] - parts[1]
    return {**sizes, "all": total}


def compare_published(cfg: Any, sizes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Published models whose sizes the config has: ``name``, ``parameters``, ``ours``, ``rule``.

    ``ours``, of the ``sizes`` of :func:`part_sizes`, is made comparable by the ``rule``, in words.
    """
    language, clip = cfg.MODEL.LANGUAGE, cfg.MODEL.IMAGE_ENCODER
    compared: list[tuple[str, int, int, str]] = []
    llama = (language.HIDDEN_SIZE, language.INTERMEDIATE_SIZE, language.NUM_LAYERS)
    if llama in LLAMAS and language.NUM_KEY_VALUE_HEADS == language.NUM_HEADS:
        size, count = LLAMAS[llama]
        added = language.VOCAB_SIZE - LLAMA_WORDS
        rule = f"without the {added} added word(s), a row each in the embedding and the output"
        ours = sizes["language decoder"][0] - 2 * added * language.HIDDEN_SIZE
        compared.append((f"LLaMA-{size}", count, ours, rule))
    tower = (clip.IMAGE_SIZE, clip.PATCH_SIZE, clip.WIDTH, clip.LAYERS, clip.STEM)
    if tower == (336, 14, 1024, 24, "patch"):
        rule = "with the final norm and the 1024 x 768 projection, which no part here reads"
        ours = sizes["image encoder"][0] + 2 * clip.WIDTH + clip.WIDTH * 768
        compared.append(("CLIP ViT-L/14-336, vision", 304_293_888, ours, rule))
    return [dict(zip(("name", "parameters", "ours", "rule"), row)) for row in compared]


# -- FLOPs -----------------------------------------------------------------------------------------
# PyTorch's counter sees the operators that a CPU would take; fvcore's FlopCountAnalysis traces a
# run with real values, and takes fused attention for free.


def counter() -> FlopCounterMode:
    """PyTorch's counter with rules for the operators that it would take for free."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def sampling(*_: Any, out_shape: Any, **__: Any) -> int:
        return 8 * math.prod(out_shape)  # bilinear: four multiply-adds a value

    rules = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten.grid_sampler_2d: sampling,
    }
    return FlopCounterMode(display=False, custom_mapping=rules)


class FlopCount:
    """Adds up FLOPs by part, a multiply-add as 2; an instance is an ``Around``."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.parts: Counter[str] = Counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what runs inside for ``part``."""
        with counter() as count:
            yield
        self.parts[part] += count.get_total_flops()


@contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, and attention that the counter can see.

    PyTorch runs multi-head attention in evaluation as one operator without a formula; and its
    counter loses its place at parameters that want a gradient where none is recorded.
    """
    model.eval().requires_grad_(False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_flops(model: nn.Module, cfg: Any, load: Workload) -> dict[str, Any]:
    """FLOPs of one image, a multiply-add as 2; the model's tensors become fake.

    Returns:
        ``parts``: ``{part: FLOPs}`` of grounding given nouns, one parallel pass over question and
        answer; ``language``: per way of ``WAYS`` to ground the nouns ``passes`` over the prompt,
        ``tokens`` of one of them, and ``flops`` of all (an answer is generated with a key-value
        cache; a pass per noun with the whole caption is what methods with one mask per answer
        need); ``table_12``: rows in the columns of the paper's, in FLOPs; ``implied_tokens``: the
        length of the pass that costs Table 12's LLM figure, should that one count a multiply-add
        as 1 or as 2.
    """
    image, count, single = count_image_tokens(cfg), FlopCount(), load._replace(nouns=1)
    length, alone = load.length(image), single._replace(caption_tokens=load.noun_tokens)
    with FakeTensorMode(), counting(model):
        make_fake(model)
        grid = run_model(model, cfg, load, 1, count)[-1]
        llm, *vision = (sum(count.parts[part] for part in parts) for parts in COLUMNS.values())
        generated = llm + generation_flops(model, grid, length - load.answer, load.answer)
        language = {
            "given": {"passes": 1, "tokens": length, "flops": llm},
            "generated": {"passes": 2, "tokens": length, "flops": generated},
        }
        for way, one in (("one_noun", single), ("noun_alone", alone)):
            flops = load.nouns * pass_flops(model, grid, one.length(image), one.answer)
            language[way] = {"passes": load.nouns, "tokens": one.length(image), "flops": flops}
        paper = 2e9 * TABLE_12["GELLA (Table 12)"][0]
        implied = {str(n): implied_tokens(model, grid, image, paper / n) for n in (1, 2)}
    table = {
        f"ours, {WAYS[way][0]}": [x["flops"], *vision, x["flops"] + sum(vision)]
        for way, x in language.items()
    }
    rest = {"language": language, "table_12": table, "implied_tokens": implied}
    return {"parts": count.parts, **rest}


def pass_flops(model: nn.Module, grid: Tensor, length: int, answer: int) -> int:
    """FLOPs of one parallel pass with ``answer`` logits, the projector included."""
    count = FlopCount()
    run_language(model, grid, length, answer, 0, count)
    return count.parts.total()


def generation_flops(model: nn.Module, grid: Tensor, prompt: int, answer: int) -> int:
    """FLOPs of generating ``answer`` tokens one by one behind a prompt, with a key-value cache.

    The first token comes from the pass over the prompt; each later one from a pass over the token
    before it, whose cost grows by the same amount with each token in the cache.
    """
    llama, past, projector = model.language_decoder.llama, None, FlopCount()
    embeds = embed_prompt(model, grid, prompt, projector)
    steps = []
    for tokens in (embeds, embeds[:, :1], embeds[:, :1]):
        with counter() as count:
            out = llama.base_model(inputs_embeds=tokens, use_cache=True, past_key_values=past)
            llama.get_output_embeddings()(out.last_hidden_state[:, -1:])
        past = out.past_key_values
        steps.append(count.get_total_flops())
    later, growth = answer - 1, steps[2] - steps[1]
    first = projector.parts.total() + steps[0]
    return first + later * steps[1] + growth * later * (later - 1) // 2


def implied_tokens(model: nn.Module, grid: Tensor, image: int, flops: float) -> int:
    """The length L of a pass without logits that takes ``flops``.

    It takes c + a L + b L^2 FLOPs, c the projector's; two passes give the three.
    """
    count = FlopCount()
    run_language(model, grid, image, 0, 0, count)
    fixed, first = count.parts["projector"], count.parts["language decoder"]
    second = pass_flops(model, grid, 2 * image, 0) - fixed
    square = (second - 2 * first) / (2 * image**2)
    linear = first / image - square * image
    # The positive root, in the form that holds for b = 0 too.
    rest = 2 * max(0.0, flops - fixed)
    return round(rest / (linear + math.sqrt(linear**2 + 2 * square * rest)))


# -- tables ----------------------------------------------------------------------------------------


def cost_report(figures: dict[str, Any]) -> str:
    """All tables as text; ``figures`` as :func:`run` returns them."""
    load = figures["workload"]
    text = load["prompt_tokens"] + load["caption_tokens"] + load["answer_tokens"]
    workload = (
        f"one image: {load['image_size']} pixels for CLIP, colormap {load['colormap_size']}, "
        f"{load['entities']} entities; {load['image_tokens'] + text} tokens: "
        f"{load['image_tokens']} image, {load['prompt_tokens']} prompt, {load['caption_tokens']} "
        f"caption, {load['answer_tokens']} answer with {load['nouns']} nouns"
    )
    rows = []
    for part, x in figures["parts"].items():
        sizes = (x["flops"] / 1e9, x["flops"] / 2e9, x["activations"] / MIB)
        rows.append((part, f"{x['parameters']:,}", f"{x['trained']:,}", *map(number, sizes)))
    saved = f"activations MiB, {figures['precision']}, batch {figures['batch']}"
    parts = _table(rows, ["part", "parameters", "trained", "GFLOPs, FMA = 2", "FMA = 1", saved]) + (
        "\nFMA: multiply-add. With the language decoder's blocks checkpointed the activations are "
        f"{number(figures['activations']['checkpointed'] / MIB)} MiB."
    )
    tables = (published_table(figures["published"]), language_tables(figures), zero_table(figures))
    training = figures["training"]
    rows = [(n, x["tokens"], number(x["gpu"] / GIB)) for n, x in training["longest"].items()]
    head = ["longest prompt of", "tokens", "GiB per GPU, as the config says"]
    days = (
        f"{_table(rows, head)}\n{training['iterations']:,} iterations: {training['days']:.2g} days"
        f" on {figures['gpus']} A100 at {UTILISATION:.0%} of {A100 / 1e12:.0f} TFLOPS"
    )
    return "\n\n".join(filter(None, (workload, parts, *tables, days)))


def number(value: float) -> str:
    """One decimal, or three digits of what is small."""
    return f"{value:,.1f}" if value >= 10 or not value else f"{value:.3g}"


def _table(rows: list[Any], head: list[str], *columns: str) -> str:
    """``columns``: the alignment of each; without it the first is left and the others right."""
    columns = columns or ("left", *["right"] * (len(head) - 1))
    return tabulate(rows, head, colalign=columns, disable_numparse=True)


def published_table(published: list[dict[str, Any]]) -> str:
    """Published parameter counts beside ours, "" without any."""
    rows = []
    for item in published:
        difference = item["ours"] - item["parameters"]
        verdict = f"differs by {difference:+,}" if difference else "equal"
        counts = (f"{item['parameters']:,}", f"{item['ours']:,}")
        rows.append((item["name"], *counts, verdict, item["rule"]))
    head = ["published model", "published", "ours", "", "counted"]
    return _table(rows, head, "left", "right", "right", "left", "left") if rows else ""


def language_tables(figures: dict[str, Any]) -> str:
    """The ways of the language decoder, and how many times the first one each costs; and for a
    published model the paper's Table 12a with our rows in both ways of counting."""
    ways, ours = figures["language"], figures["table_12"]
    single, given = ours["ours, a pass per noun"], ours["ours, nouns given"]
    first, vision = given[0], given[3] - given[0]
    rows: list[Any] = []
    for way, x in ways.items():
        ratios = (x["flops"] / first, (x["flops"] + vision) / (first + vision))
        ratio = (f"{value:.2f}" for value in ratios)
        rows.append((WAYS[way][1], x["passes"], x["tokens"], number(x["flops"] / 1e9), *ratio))
    head = ["language decoder", "passes", "tokens each", "GFLOPs", "ratio", "ratio with vision"]
    table = _table(rows, head)
    if not figures["published"]:
        return table
    rows = [(name, *(f"{x:,}" for x in row)) for name, row in TABLE_12.items()]
    for name, row in ours.items():
        for rule in (2, 1):
            rows.append((f"{name}, FMA = {rule}", *(f"{x * rule / 2e9:,.0f}" for x in row)))
    implied, (lisa, gella) = figures["implied_tokens"], TABLE_12.values()
    return f"{table}\n\n{_table(rows, ['GFLOPs', *COLUMNS, 'ALL'])}" + (
        f"\nLISA / GELLA in Table 12: LLM {lisa[0] / gella[0]:.2f}, ALL {lisa[3] / gella[3]:.2f}; "
        f"here a pass per noun / one pass: LLM {single[0] / given[0]:.2f}, ALL "
        f"{single[3] / given[3]:.2f}"
        f"\nLLM {gella[0]:,} of Table 12 is one pass of this language "
        f"decoder over {implied['1']:,} tokens if a multiply-add counts as 1, {implied['2']:,} if 2"
    )


def zero_table(figures: dict[str, Any]) -> str:
    """Memory per GPU of every ZeRO plan, in GiB."""

    def gib(value: int) -> str:
        return number(value / GIB)

    sums = figures["activations"]
    states = ("weights", "gradients", "optimizer", "gathered", "rest")
    rows = []
    for row in figures["zero"]:
        offload = f", {' and '.join(row['offload'])} on host" * bool(row["offload"])
        cells = [f"{row['stage']}{offload}", *(gib(row[name]) for name in states)]
        cells += [
            f"{gib(row['total'][kind])} ({row['card'][kind] or f'over {CARDS[-1]}'})"
            for kind in sums
        ]
        rows.append([*cells, gib(row["host"])])
    head = ["ZeRO stage", "weights", "gradients", "optimizer", "gathered", "rest of model"]
    head += [f"sum, {kind} (card)" for kind in sums] + ["host, all GPUs"]
    activations = ", ".join(f"{gib(size)} {kind}" for kind, size in sums.items())
    return (
        f"GiB per GPU, {figures['gpus']} GPUs, {figures['precision']}, {figures['batch']} image(s) "
        f"each; activations {activations}; card: smallest of {', '.join(map(str, CARDS))} GiB\n"
        + _table(rows, head)
    )

"""The printed tables of `benchmark_cost.py`."""

from __future__ import annotations

from typing import Any

from cost_flops import COLUMNS, TABLE_12
from cost_zero import CARDS, GIB
from tabulate import tabulate

MIB = 2**20
WAYS = {
    "given": "nouns given, one pass",
    "generated": "answer generated, then one pass over it",
    "one_noun": "a pass per noun, with the caption",
    "noun_alone": "a pass per noun, noun in place of the caption",
}


def cost_report(figures: dict[str, Any]) -> str:
    """All tables as text; ``figures`` as :func:`benchmark_cost.measure` returns them."""
    return "\n\n".join(
        text
        for text in (
            _workload(figures),
            parts_table(figures),
            published_table(figures["published"]),
            language_table(figures),
            table_12_text(figures) if figures["published"] else "",
            zero_table(figures),
        )
        if text
    )


def number(value: float) -> str:
    """One decimal, or three digits of what is small."""
    return f"{value:,.1f}" if value >= 10 or not value else f"{value:.3g}"


def _table(rows: list[Any], head: list[str], left: int = 1) -> str:
    align = ("left",) * left + ("right",) * (len(head) - left)
    return tabulate(rows, head, colalign=align, disable_numparse=True)


def _workload(figures: dict[str, Any]) -> str:
    load = figures["workload"]
    text = load["prompt_tokens"] + load["caption_tokens"] + load["answer_tokens"]
    return (
        f"one image: {load['image_size']} pixels for CLIP, colormap {load['colormap_size']}, "
        f"{load['entities']} entities; {load['image_tokens'] + text} tokens: "
        f"{load['image_tokens']} image, {load['prompt_tokens']} prompt, {load['caption_tokens']} "
        f"caption, {load['answer_tokens']} answer with {load['nouns']} nouns"
    )


def parts_table(figures: dict[str, Any]) -> str:
    """Parameters, GFLOPs in both ways of counting, and MiB of activations by part."""
    rows = [
        (
            part,
            f"{x['parameters']:,}",
            f"{x['trained']:,}",
            number(x["flops"] / 1e9),
            number(x["flops"] / 2e9),
            number(x["activations"] / MIB),
        )
        for part, x in figures["parts"].items()
    ]
    saved = f"activations MiB, {figures['precision']}, batch {figures['batch']}"
    head = ["part", "parameters", "trained", "GFLOPs, FMA = 2", "FMA = 1", saved]
    sums = figures["activations"]
    return _table(rows, head) + (
        "\nFMA: multiply-add. With the language decoder's blocks checkpointed the activations are "
        f"{number(sums['checkpointed'] / MIB)} MiB."
    )


def published_table(published: list[dict[str, Any]]) -> str:
    """Published parameter counts beside ours, "" without any."""
    rows = []
    for item in published:
        difference = item["ours"] - item["parameters"]
        verdict = f"differs by {difference:+,}" if difference else "equal"
        count = f"{item['parameters']:,}"
        rows.append((item["name"], count, f"{item['ours']:,}", verdict, item["rule"]))
    if not rows:
        return ""
    head = ["published model", "published", "ours", "", "counted"]
    return tabulate(
        rows, head, colalign=("left", "right", "right", "left", "left"), disable_numparse=True
    )


def language_table(figures: dict[str, Any]) -> str:
    """The ways of the language decoder, and how many times the first one each costs."""
    ways = figures["language"]
    vision = figures["table_12"]["ours, nouns given"][3] - ways["given"]["flops"]
    rows = [
        (
            WAYS[way],
            x["passes"],
            x["tokens"],
            number(x["flops"] / 1e9),
            f"{x['flops'] / ways['given']['flops']:.2f}",
            f"{(x['flops'] + vision) / (ways['given']['flops'] + vision):.2f}",
        )
        for way, x in ways.items()
    ]
    head = ["language decoder", "passes", "tokens each", "GFLOPs", "ratio", "ratio with vision"]
    return _table(rows, head)


def table_12_text(figures: dict[str, Any]) -> str:
    """The paper's Table 12a with our rows in both ways of counting."""
    head = ["GFLOPs", *COLUMNS, "ALL"]
    rows: list[Any] = [(name, *(f"{x:,}" for x in row)) for name, row in TABLE_12.items()]
    for name, row in figures["table_12"].items():
        for rule in (2, 1):
            scaled = (f"{x * rule / 2e9:,.0f}" for x in row)
            rows.append((f"{name}, FMA = {rule}", *scaled))
    implied, ours = figures["implied_tokens"], figures["table_12"]
    lisa, gella = TABLE_12.values()
    single, given = ours["ours, a pass per noun"], ours["ours, nouns given"]
    return _table(rows, head) + (
        f"\nLISA / GELLA in Table 12: LLM {lisa[0] / gella[0]:.2f}, ALL {lisa[3] / gella[3]:.2f}; "
        f"here a pass per noun / one pass: LLM {single[0] / given[0]:.2f}, ALL "
        f"{single[3] / given[3]:.2f}"
        f"\nLLM {TABLE_12['GELLA (Table 12)'][0]:,} of Table 12 is one pass of this language "
        f"decoder over {implied['1']:,} tokens if a multiply-add counts as 1, {implied['2']:,} if 2"
    )


def zero_table(figures: dict[str, Any]) -> str:
    """Memory per GPU of every ZeRO plan, in GiB."""

    def gib(value: int) -> str:
        return number(value / GIB)

    def card(size: int) -> str:
        return str(size) if size else f"over {CARDS[-1]}"

    precision = figures["precision"]
    sums = figures["activations"]
    rows = [
        (
            str(row["stage"])
            + (f", {' and '.join(row['offload'])} on host" * bool(row["offload"])),
            *(gib(row[name]) for name in ("weights", "gradients", "optimizer", "gathered", "rest")),
            *(f"{gib(row['total'][kind])} ({card(row['card'][kind])})" for kind in sums),
            gib(row["host"]),
        )
        for row in figures["zero"]
    ]
    head = ["ZeRO stage", "weights", "gradients", "optimizer", "gathered", "rest of model"]
    head += [f"sum, {kind} (card)" for kind in sums] + ["host, all GPUs"]
    activations = ", ".join(f"{gib(size)} {kind}" for kind, size in sums.items())
    return (
        f"GiB per GPU, {figures['gpus']} GPUs, {precision}, {figures['batch']} image(s) each; "
        f"activations {activations}; card: smallest of {', '.join(map(str, CARDS))} GiB\n"
        + _table(rows, head)
    )

"""FLOPs of every part of the model, counted while it runs on tensors without data.

`gella.engine.memory` runs it. PyTorch's counter sees the operators that a CPU would take; fvcore's
FlopCountAnalysis traces a run with real values, and takes fused attention for free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gella.engine.memory import (
    Workload,
    count_image_tokens,
    embed_prompt,
    make_fake,
    run_language,
    run_model,
)

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

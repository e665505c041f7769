"""FLOPs of one image: the parts, generating, and the way of one noun at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from cost_passes import (
    FlopCount,
    TextPass,
    Workload,
    count_image_tokens,
    embed_prompt,
    make_fake,
    run_language,
    run_vision,
    text_pass,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
        answer; ``language``: FLOPs of projector and language decoder for the ways of
        :func:`count_language`; ``table_12``: rows as the paper's, in FLOPs; ``implied_tokens``:
        the length of the pass that costs Table 12's LLM figure, should that one
        count a multiply-add as 1 or as 2.
    """
    with FakeTensorMode(), counting(model):
        make_fake(model)
        count = FlopCount()
        output, grid = run_vision(model, cfg, load.entities, 1, count)
        one = text_pass(load, count_image_tokens(cfg))
        _, nouns = run_language(model, grid, one, count)
        with count("association"):
            model.association(nouns, output.query_embeddings)
        language = count_language(model, grid, load, sum(count.parts[x] for x in COLUMNS["LLM"]))
        coefficients = pass_coefficients(model, grid)
    return {
        "parts": count.parts,
        "language": language,
        "table_12": table_12(count.parts, language),
        "implied_tokens": {
            str(rule): implied_tokens(*coefficients, TABLE_12["GELLA (Table 12)"][0] * 2e9 / rule)
            for rule in (1, 2)
        },
    }


def count_language(
    model: nn.Module, grid: Tensor, load: Workload, given: int
) -> dict[str, dict[str, int]]:
    """The language decoder's ways to ground ``load.nouns`` nouns.

    Args:
        model, grid: fake. load: the workload. given: FLOPs of one pass over all nouns.

    Returns:
        per way ``passes`` over the prompt, ``tokens`` of one of them, and ``flops`` of all:
        ``given``: the nouns are known, one pass; ``generated``: the answer is generated with a
        key-value cache, and one pass over it follows; ``one_noun``: a pass per noun, each with the
        whole caption in its question, as methods with one mask per answer need; ``noun_alone``: a
        pass per noun with the noun in place of the caption.
    """
    image = count_image_tokens_of(grid, model)
    one = text_pass(load, image)
    single = text_pass(replace(load, nouns=1), image)
    alone = text_pass(replace(load, nouns=1, caption_tokens=load.noun_tokens), image)
    generated = given + generation_flops(model, grid, one.length - load.answer, load.answer)
    ways = {
        "given": (1, one.length, given),
        "generated": (2, one.length, generated),
        "one_noun": (load.nouns, single.length, load.nouns * pass_flops(model, grid, single)),
        "noun_alone": (load.nouns, alone.length, load.nouns * pass_flops(model, grid, alone)),
    }
    return {
        way: {"passes": passes, "tokens": tokens, "flops": flops}
        for way, (passes, tokens, flops) in ways.items()
    }


def count_image_tokens_of(grid: Tensor, model: nn.Module) -> int:
    """Image tokens that the projector makes of a grid."""
    return (grid.shape[-1] // model.language_decoder.image_token_stride) ** 2


def pass_flops(model: nn.Module, grid: Tensor, text: TextPass) -> int:
    """FLOPs of one parallel pass, the projector included."""
    count = FlopCount()
    run_language(model, grid, text, count)
    return count.total


def generation_flops(model: nn.Module, grid: Tensor, prompt: int, answer: int) -> int:
    """FLOPs of generating ``answer`` tokens one by one behind a prompt, with a key-value cache.

    The first token comes from the pass over the prompt; each later one from a pass over the token
    before it, whose cost grows by the same amount with each token in the cache.
    """
    count, llama = FlopCount(), model.language_decoder.llama
    embeds = embed_prompt(model, grid, prompt, count)
    steps = []
    past = None
    for tokens in (embeds, embeds[:, :1], embeds[:, :1]):
        with count("language decoder"):
            before = count.total
            out = llama.base_model(inputs_embeds=tokens, use_cache=True, past_key_values=past)
            llama.get_output_embeddings()(out.last_hidden_state[:, -1:])
        past = out.past_key_values
        steps.append(count.total - before)
    later = answer - 1
    growth = steps[2] - steps[1]
    projector = count.parts["projector"]
    return projector + steps[0] + later * steps[1] + growth * later * (later - 1) // 2


def pass_coefficients(model: nn.Module, grid: Tensor) -> tuple[int, float, float]:
    """(c, a, b): a pass over L tokens without logits takes c + a L + b L^2 FLOPs, c the image's."""
    image = count_image_tokens_of(grid, model)
    count = FlopCount()
    run_language(model, grid, TextPass(image, 0, 0), count)
    fixed, first = count.parts["projector"], count.parts["language decoder"]
    second = pass_flops(model, grid, TextPass(2 * image, 0, 0)) - fixed
    square = (second - 2 * first) / (2 * image**2)
    return fixed, first / image - square * image, square


def implied_tokens(fixed: float, linear: float, square: float, flops: float) -> int:
    """The length of a pass that takes ``flops``; see :func:`pass_coefficients`."""
    rest = max(0.0, flops - fixed)
    if not square:
        return round(rest / linear)
    return round((math.sqrt(linear**2 + 4 * square * rest) - linear) / (2 * square))


def table_12(parts: dict[str, int], language: dict[str, dict[str, int]]) -> dict[str, list[int]]:
    """Our rows in Table 12's columns LLM, IME, MMD, ALL, in FLOPs."""
    names = {
        "given": "ours, nouns given",
        "generated": "ours, answer generated",
        "one_noun": "ours, a pass per noun",
        "noun_alone": "ours, a pass per noun without caption",
    }
    vision = [sum(parts[part] for part in COLUMNS[column]) for column in ("IME", "MMD")]
    return {
        names[way]: [figures["flops"], *vision, figures["flops"] + sum(vision)]
        for way, figures in language.items()
    }

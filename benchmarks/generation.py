"""How often the language model is called for an answer: greedily, and with drafts.

    python tools/benchmark.py generation --config-file configs/gella_tiny_shapes.yaml \\
        --weights output/gella_tiny_shapes/model_final.pth --num 50

Noun extraction copies its answer from the caption. A draft proposes what followed the last word in
the prompt, and one call checks the whole proposal. Calls are counted at the language model; the one
that reads the prompt counts too, and so does the token that ends an answer. Answers are generated
one at a time. Untrained weights copy nothing and say nothing. The third row is transformers' own
prompt lookup, which drafts what followed the first repetition of the last one or two words.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.modeling import build_model
from measuring import OPTS
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from gella import load_config
from gella.data.mapper import GroundingMapper
from gella.data.register import import_modules
from gella.engine.trainer import load_records
from gella.text.prompts import decode_answer
from gella.weights.checkpoint import load_weights

NUMBERS = {
    "num": (50, 1, "captions"),
    "lookup": (None, 1, "draft length; default: PROMPT_LOOKUP_TOKENS"),
}
OPTIONS = {
    "--config-file": {"required": True, "metavar": "YAML"},
    "--weights": {"metavar": "FILE", "help": "checkpoint; default: MODEL.WEIGHTS"},
    "--dataset": {"metavar": "NAME", "help": "a registered one; default: all of DATASETS.TEST"},
    "--opts": OPTS,
}
NEXT = "MODEL.LANGUAGE.PROMPT_LOOKUP_TOKENS takes the draft length with fewest calls"
# By way of decoding, what the table calls it.
WAYS = {
    "greedy": "greedy",
    "drafts": "drafts of up to {}",
    "transformers": "transformers' prompt lookup",
}


@dataclass
class Tally:
    """What one way of decoding took.

    Attributes:
        calls: passes of the language model.
        tokens: generated tokens, end tokens included.
        seconds: of generation alone, by the wall clock.
        answers: token ids of each answer, without the end token.
    """

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    answers: list[list[int]] = field(default_factory=list)


def prepare(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], int]:
    """The model with its weights, mapped inputs, and the draft length."""
    cfg = load_config(args.config_file, args.opts)
    import_modules(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    lookup = args.lookup or cfg.MODEL.LANGUAGE.PROMPT_LOOKUP_TOKENS
    if lookup < 1:
        raise ValueError(f"the config's draft length is {lookup}: give --lookup, at least 1")
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    records = load_records(cfg.DATASETS.TEST, "DATASETS.TEST", cfg)
    able = [i for i in range(len(records)) if "extract" in records[i]["tasks"]][: args.num]
    if not able:
        raise ValueError(
            f"no record of {', '.join(cfg.DATASETS.TEST)} has a caption to extract nouns from: "
            "choose another --dataset"
        )
    mapper = GroundingMapper(cfg, is_train=False, task="extract")
    model = build_model(cfg)
    load_weights(model, args.weights or cfg.MODEL.WEIGHTS, cfg)
    return model.eval(), [mapper(records[i]) for i in tqdm(able, "reading", leave=False)], lookup


@torch.no_grad()
def count_calls(model: Any, inputs: list[dict[str, Any]], lookup: int) -> dict[str, Tally]:
    """Answer every input in each of the ``WAYS``, one at a time.

    Args:
        model: GELLA in evaluation mode.
        inputs: mapped dicts of the task extract.
        lookup: the longest draft, in tokens.
    """
    decoder, before = model.language_decoder, model.language_decoder.prompt_lookup_tokens
    tallies = {name: Tally() for name in WAYS}
    now = tallies["greedy"]

    def count(*_: Any) -> None:
        now.calls += 1

    decoder.prompt_lookup_tokens = lookup
    hook = decoder.llama.base_model.register_forward_hook(count)
    ends = {name: getattr(model.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    try:
        for item in tqdm(inputs, "answering", leave=False):
            grid = model.encode([item])[1]
            ids = item["input_ids"].to(grid.device)
            limit = min(model.max_new_tokens, decoder.max_positions - len(ids))
            options = {"max_new_tokens": limit, **ends}
            for way, now in tallies.items():
                start = time.perf_counter()
                if way == "transformers":
                    answer = library_lookup(decoder, grid, ids, **options)
                else:
                    snippets = model.noun_snippets if way == "drafts" else None
                    answer = decoder.generate(grid, [ids], snippets=snippets, **options)[0].tolist()
                now.seconds += time.perf_counter() - start  # the lists have waited for the device
                now.tokens += len(answer) + (len(answer) < limit)
                now.answers.append(answer)
    finally:
        hook.remove()
        decoder.prompt_lookup_tokens = before
    return tallies


def library_lookup(decoder: Any, grid: Tensor, ids: Tensor, **options: Any) -> list[int]:
    """Answer one prompt with transformers' prompt lookup; the token ids before the end token.

    Args:
        decoder: a ``LanguageDecoder``.
        grid: (1, C, g, g) image features.
        ids: (L,) int64, negative at the image tokens.
        options: ``max_new_tokens``, ``eos_token_id``, ``pad_token_id``.
    """
    words = decoder.llama.get_input_embeddings()
    embeds = words(ids.clamp(min=0))
    embeds = embeds.masked_scatter((ids < 0)[:, None], decoder.image_tokens(grid)[0].to(embeds))
    # What is searched must hold words only, and its last may not repeat: with embeddings as input,
    # the library's first pass judges a draft by the wrong positions.
    used = set(ids.tolist())
    fill, last = [word for word in range(words.num_embeddings) if word not in used][:2]
    searched = torch.where(ids < 0, fill, ids)
    searched[-1] = last
    answer = decoder.llama.generate(
        searched[None],
        inputs_embeds=embeds[None],
        attention_mask=torch.ones_like(ids[None]),
        do_sample=False,
        prompt_lookup_num_tokens=decoder.prompt_lookup_tokens,
        **options,
    )[0, len(ids) :].tolist()
    return answer[:-1] if answer[-1] == options["eos_token_id"] else answer


def summarise(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Figures: per way ``calls``, ``tokens``, ``calls_per_token``, ``seconds`` and ``identical``
    (answers equal to greedy's); ``captions``; ``calls_ratio`` of drafts to greedy.
    """
    greedy = tallies["greedy"]
    figures: dict[str, Any] = {
        name: {
            "calls": tally.calls,
            "tokens": tally.tokens,
            "calls_per_token": tally.calls / tally.tokens,
            "seconds": tally.seconds,
            "identical": sum(map(list.__eq__, greedy.answers, tally.answers)),
        }
        for name, tally in tallies.items()
    }
    ratio = tallies["drafts"].calls / greedy.calls
    return {**figures, "captions": len(greedy.answers), "calls_ratio": ratio}


def report(figures: dict[str, Any], lookup: int, example: str) -> str:
    """The printed table."""
    rows = []
    for way, title in WAYS.items():
        taken = figures[way]
        same = f"{taken['identical']} of {figures['captions']}"
        counts = (taken["calls"], taken["tokens"], f"{taken['calls_per_token']:.3f}", same)
        rows.append((title.format(lookup), *counts, f"{taken['seconds']:.2f}"))
    head = ["decoding", "calls", "tokens", "calls per token", "same answers", "seconds"]
    return (
        f"{tabulate(rows, head, colalign=('left', *['right'] * 5), disable_numparse=True)}\n\n"
        f"calls with drafts / greedy calls: {figures['calls_ratio']:.3f}\nfirst answer: {example}"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print. ValueError, OSError, KeyError for wrong arguments."""
    model, inputs, lookup = prepare(args)
    tallies = count_calls(model, inputs, lookup)
    example = decode_answer(model.tokenizer, tallies["greedy"].answers[0])
    figures = summarise(tallies)
    return figures, report(figures, lookup, example[:200])

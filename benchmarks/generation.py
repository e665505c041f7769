"""How often the language model is called for an answer: greedily, and with drafts.

    python tools/benchmark.py generation --config-file configs/gella_tiny_shapes.yaml \\
        --weights output/gella_tiny_shapes/model_final.pth --num 50

Noun extraction copies its answer from the caption. A draft proposes what followed the last word in
the prompt, and one call checks the whole proposal. Calls are counted at the language model; the one
that reads the prompt counts too, and so does the token that ends an answer. Answers are generated
one at a time. Untrained weights copy nothing and say nothing. The third row is transformers' own
prompt lookup, which drafts what followed the first repetition of the last one or two words. Its
answers are free, so they differ from ours where MODEL.GELLA.COPY_NOUNS keeps a noun from being
invented.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from measuring import OPTS
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from gella.commands.inputs import config_of
from gella.data.mapper import GroundingMapper
from gella.engine.trainer import load_records
from gella.text.prompts import decode_answer
from gella.weights.checkpoint import build_with_weights

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


def prepare(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], int]:
    """The model with its weights, mapped inputs, and the draft length."""
    cfg = config_of(args.config_file, args.opts)
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
    model = build_with_weights(cfg, args.weights or cfg.MODEL.WEIGHTS)
    return model.eval(), [mapper(records[i]) for i in tqdm(able, "reading", leave=False)], lookup


@torch.no_grad()
def count_calls(model: Any, inputs: list[dict[str, Any]], lookup: int) -> dict[str, Any]:
    """Answer every input in each of the ``WAYS``, one at a time.

    Args:
        model: GELLA in evaluation mode.
        inputs: mapped dicts of the task extract.
        lookup: the longest draft, in tokens.

    Returns:
        per way ``calls`` (passes of the language model), ``tokens`` (generated ones, end tokens
        included), ``calls_per_token``, ``seconds`` of generation by the wall clock, ``answers``
        (token ids without the end token) and ``identical`` (answers equal to greedy's);
        ``captions``; ``calls_ratio`` of drafts to greedy.
    """
    decoder, before = model.language_decoder, model.language_decoder.prompt_lookup_tokens
    taken = {way: {"calls": 0, "tokens": 0, "seconds": 0.0, "answers": []} for way in WAYS}
    now: dict[str, Any] = {}

    def count(*_: Any) -> None:
        now["calls"] += 1

    decoder.prompt_lookup_tokens = lookup
    hook = decoder.llama.base_model.register_forward_hook(count)
    ends = {name: getattr(model.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    try:
        for item in tqdm(inputs, "answering", leave=False):
            grid = model.encode([item])[1]
            ids = item["input_ids"].to(grid.device)
            limit = min(model.max_new_tokens, decoder.max_positions - len(ids))
            options = {"max_new_tokens": limit, **ends}
            for way, now in taken.items():
                start = time.perf_counter()
                if way == "transformers":
                    answer = library_lookup(decoder, grid, ids, **options)
                else:
                    ours = {"snippets": model.noun_snippets if way == "drafts" else None}
                    ours["choices"] = [model.copied_nouns(item)]
                    answer = decoder.generate(grid, [ids], **ours, **options)[0].tolist()
                now["seconds"] += time.perf_counter() - start  # the lists waited for the device
                now["tokens"] += len(answer) + (len(answer) < limit)
                now["answers"].append(answer)
    finally:
        hook.remove()
        decoder.prompt_lookup_tokens = before
    greedy = taken["greedy"]
    for way in taken.values():
        way["calls_per_token"] = way["calls"] / way["tokens"]
        way["identical"] = sum(map(list.__eq__, greedy["answers"], way["answers"]))
    ratio = taken["drafts"]["calls"] / greedy["calls"]
    return {**taken, "captions": len(inputs), "calls_ratio": ratio}


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
    if not answer:
        raise ValueError(f"transformers {transformers.__version__} looks nothing up, 5.18 does")
    return answer[:-1] if answer[-1] == options["eos_token_id"] else answer


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print. ValueError, OSError, KeyError for wrong arguments."""
    model, inputs, lookup = prepare(args)
    figures, rows = count_calls(model, inputs, lookup), []
    example = decode_answer(model.tokenizer, figures["greedy"]["answers"][0])
    for way, title in WAYS.items():
        taken = figures[way]
        del taken["answers"]
        same = f"{taken['identical']} of {figures['captions']}"
        counts = (taken["calls"], taken["tokens"], f"{taken['calls_per_token']:.3f}", same)
        rows.append((title.format(lookup), *counts, f"{taken['seconds']:.2f}"))
    head = ["decoding", "calls", "tokens", "calls per token", "same answers", "seconds"]
    return figures, (
        f"{tabulate(rows, head, colalign=('left', *['right'] * 5), disable_numparse=True)}\n\n"
        f"calls with drafts / greedy calls: {figures['calls_ratio']:.3f}\n"
        f"first answer: {example[:200]}"
    )

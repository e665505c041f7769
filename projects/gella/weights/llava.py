"""LLaVA-1.5, as transformers and as the LLaVA repository write it: LLaMA and the projector.

A vision tower in the same file is the business of ``clip.py``; the package joins the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gella.weights.layout import Layout

__all__ = ["EMBEDDINGS", "LlavaHfModulesText", "LlavaHfText", "LlavaOriginalText", "fit_words"]

_LLAMA = "language_decoder.llama."
_PROJECTOR = "language_decoder.projector."
#: GELLA's tensors with one row per token.
EMBEDDINGS = (f"{_LLAMA}model.embed_tokens.weight", f"{_LLAMA}lm_head.weight")
# A buffer of LLaMA in old files; it follows from the configuration.
_ROTARY = "*.rotary_emb.inv_freq"


class LlavaHfText(Layout):
    """``LlavaForConditionalGeneration.save_pretrained``, of transformers 4 and 5."""

    name = "llava-hf-text"
    prefix = "language_decoder."
    rules = (
        ("language_model.model.{rest}", f"{_LLAMA}model.{{rest}}"),
        ("language_model.lm_head.{rest}", f"{_LLAMA}lm_head.{{rest}}"),
        ("multi_modal_projector.linear_1.{rest}", f"{_PROJECTOR}0.{{rest}}"),
        ("multi_modal_projector.linear_2.{rest}", f"{_PROJECTOR}2.{{rest}}"),
    )
    dropped = (_ROTARY,)


class LlavaHfModulesText(Layout):
    """``LlavaForConditionalGeneration.state_dict()`` since transformers 4.52, names of modules."""

    name = "llava-hf-modules-text"
    prefix = "language_decoder."
    rules = (
        ("model.language_model.{rest}", f"{_LLAMA}model.{{rest}}"),
        ("lm_head.{rest}", f"{_LLAMA}lm_head.{{rest}}"),
        ("model.multi_modal_projector.linear_1.{rest}", f"{_PROJECTOR}0.{{rest}}"),
        ("model.multi_modal_projector.linear_2.{rest}", f"{_PROJECTOR}2.{{rest}}"),
    )
    dropped = (_ROTARY,)


class LlavaOriginalText(Layout):
    """The LLaVA repository's ``LlavaLlamaForCausalLM``; the projector may be one linear layer."""

    name = "llava-original-text"
    prefix = "language_decoder."
    rules = (
        ("model.layers.{rest}", f"{_LLAMA}model.layers.{{rest}}"),
        ("model.embed_tokens.{rest}", f"{_LLAMA}model.embed_tokens.{{rest}}"),
        ("model.norm.{rest}", f"{_LLAMA}model.norm.{{rest}}"),
        ("lm_head.{rest}", f"{_LLAMA}lm_head.{{rest}}"),
        ("model.mm_projector.{i}.{rest}", f"{_PROJECTOR}{{i}}.{{rest}}"),
        ("model.mm_projector.{rest}", f"{_PROJECTOR}{{rest}}"),
    )
    dropped = (_ROTARY,)


def fit_words(
    state: Mapping[str, Tensor], vocab_size: int, seg_row: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Give the embeddings GELLA's rows: the words, then ``<SEG>``.

    The public files have 32,000 rows (the words of LLaMA) or, of transformers, 32,064: ``<image>``,
    ``<pad>`` and rows that no token uses.

    Args:
        state: tensors by GELLA's key; those of ``EMBEDDINGS`` are fitted, in their own dtype.
        vocab_size: rows that GELLA has; the last is ``<SEG>``.
        seg_row: the file's row of ``<SEG>``; None: none, the mean of the words is taken.

    Returns:
        the state, and a line for the report per tensor that was changed.

    Raises:
        ValueError: fewer rows than words, or no such row.
    """
    words = vocab_size - 1
    fitted, notes = dict(state), []
    for key in EMBEDDINGS:
        if key not in state:
            continue
        rows = state[key]
        if len(rows) < words:
            raise ValueError(
                f"{key} has {len(rows)} rows; MODEL.LANGUAGE.VOCAB_SIZE {vocab_size} needs {words}"
                " of words and one of <SEG>: set it to the number of the tokenizer's words + 1"
            )
        if seg_row is not None and not words <= seg_row < len(rows):
            raise ValueError(
                f"row {seg_row} of <SEG>: {key} has {len(rows)} rows, of which the first {words}"
                f" are words; it must lie in {words}..{len(rows) - 1}"
            )
        if seg_row is None:
            # The mean of the words neither attracts nor repels any of them. Summed in float32:
            # half precision loses it over 32,000 rows.
            seg = rows[:words].float().mean(0, keepdim=True).to(rows.dtype)
            origin = f"the mean of the {words}"
        else:
            seg, origin = rows[seg_row : seg_row + 1], f"row {seg_row} of the file"
        fitted[key] = torch.cat([rows[:words], seg])
        left = len(rows) - words - (seg_row is not None)
        notes.append(
            f"{key}: {len(rows)} rows in the file, {vocab_size} here: {words} words, <SEG> is"
            f" {origin}" + (f", {left} rows of other tokens left out" if left else "")
        )
    return fitted, notes

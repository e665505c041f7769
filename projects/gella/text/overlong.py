"""Captions that do not fit the language model's context: an error, or a cut behind a whole noun.

The dataset mapper and the predictor both build their prompts here, so that training, evaluation and
use cut alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gella.text.prompts import OverlongPrompt, Prompt, build_prompt, question_text, task_text

__all__ = ["POLICIES", "FittedPrompt", "check_policy", "fit_prompt"]

POLICIES = ("error", "cut")  # INPUT.GELLA.OVERLONG_CAPTION
# An expression is a noun itself, and without a category its entities would take a wrong one.
_CUTTABLE = ("describe", "extract", "ground")
# Three letters before the mark: "Mr." and "St." end no sentence. Fewer places are no harm.
_SENTENCE_END = re.compile(r"(?<=\w{3})[.!?;]+[\"'”’)]*(?=\s)")


@dataclass
class FittedPrompt:
    """A prompt that fits.

    Attributes:
        prompt: its token ids.
        caption: the part of the caption that it holds, from the first character on.
        num_nouns: the first so many of the given nouns lie in that part; an answer that names nouns
            names exactly these.
        num_cut: the others.
    """

    prompt: Prompt
    caption: str
    num_nouns: int
    num_cut: int


def check_policy(policy: str) -> str:
    """Return a value of ``INPUT.GELLA.OVERLONG_CAPTION``; ValueError for one that is unknown."""
    if policy not in POLICIES:
        raise ValueError(f"INPUT.GELLA.OVERLONG_CAPTION is {policy!r}: use one of {POLICIES}")
    return policy


def fit_prompt(
    tokenizer: Any,
    task: str,
    caption: str,
    phrases: Sequence[dict[str, Any]],
    *,
    policy: str,
    phrasing: int = 0,
    answered: bool = True,
    **limits: Any,
) -> FittedPrompt:
    """Build the prompt of a task and, where it is too long and may be cut, of a shorter caption.

    A caption whose nouns are in the answer is cut behind the last noun that fits: neither question
    nor answer holds a part of a noun, and every ``<SEG>`` has its noun. Where the answer does not
    name the nouns (a description, or an answer that is to be generated), it is cut at the end of a
    sentence, outside the nouns that are known.

    Args:
        tokenizer, task, caption, phrasing: as in `prompts.task_text` and `prompts.build_prompt`.
        phrases: per noun ``text``, ``start`` and ``end`` in `caption`; -1 where it is not in it: it
            is cut together with the noun before it.
        policy: "error" or "cut". "panoptic" and "refer" are never cut.
        answered: False leaves the answer to be generated.
        limits: ``num_image_tokens``, ``system`` and ``max_length`` of `prompts.build_prompt`.

    Raises:
        OverlongPrompt: a ValueError with both numbers, when the prompt is too long and may not be
            cut, or does not even fit cut behind its first noun or sentence.
        ValueError: as in the two functions of `prompts`, or <SEG> is no token of the tokenizer.
    """
    check_policy(policy)
    reach = _reach(caption, phrases)
    named = answered and task != "describe"

    def attempt(end: int, count: int) -> FittedPrompt:
        nouns = [phrase["text"] for phrase in phrases[:count]]
        texts = caption[:end], nouns, phrasing
        question = question_text(task, *texts)
        answer = task_text(task, *texts)[1] if answered else None
        prompt = build_prompt(tokenizer, question, answer, **limits)
        if named:
            _check_marks(count, len(prompt.seg_positions))
        return FittedPrompt(prompt, caption[:end], count, len(phrases) - count)

    try:
        return attempt(len(caption), len(phrases))
    except OverlongPrompt as error:
        if policy == "error" or task not in _CUTTABLE:
            raise
        whole = error
    ends = sorted(set(reach)) if named else _sentence_ends(caption, phrases)
    places = [(end, sum(r <= end for r in reach)) for end in ends]
    fitted = _longest(attempt, places)
    if fitted is None:
        unit = "noun" if named else "sentence"
        raise OverlongPrompt(f"{whole}; it does not fit either when cut behind its first {unit}")
    return fitted


def _longest(
    attempt: Callable[[int, int], FittedPrompt], places: list[tuple[int, int]]
) -> FittedPrompt | None:
    # By halving: a prompt grows with its caption.
    fitted = None
    while places:
        middle = (len(places) - 1) // 2
        try:
            fitted = attempt(*places[middle])
            places = places[middle + 1 :]
        except OverlongPrompt:
            places = places[:middle]
    return fitted


def _check_marks(num_nouns: int, num_marks: int) -> None:
    if num_nouns != num_marks:
        raise ValueError(
            f"{num_nouns} nouns but {num_marks} <SEG> tokens in the answer; is <SEG> one token of "
            "this tokenizer?"
        )


def _reach(caption: str, phrases: Sequence[dict[str, Any]]) -> list[int]:
    # Per noun the end of the shortest start of the caption that holds it and all nouns before it.
    # Ascending, so that the nouns of any start of the caption are the first ones.
    placed = [int(phrase["end"]) for phrase in phrases if phrase["start"] >= 0]
    furthest = placed[0] if placed else len(caption)
    reach = []
    for phrase in phrases:
        furthest = max(furthest, int(phrase["end"]))
        reach.append(furthest)
    return reach


def _sentence_ends(caption: str, phrases: Sequence[dict[str, Any]]) -> list[int]:
    ends = [match.end() for match in _SENTENCE_END.finditer(caption)]
    return [end for end in ends if not any(p["start"] < end < p["end"] for p in phrases)]

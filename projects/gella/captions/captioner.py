"""Captions from other models: a picture goes in, a description and its nouns come out.

A captioner answers one question about one picture. ``gella.captions.endpoint.EndpointCaptioner``
asks a chat endpoint, ``gella.captions.local.LocalCaptioner`` a model in this process; whatever has
their ``ask`` works::

    captioner = EndpointCaptioner.from_environment()
    caption = describe(captioner, load_picture("street.jpg"), PROMPTS["overview"])
    print(caption.description, caption.nouns)
"""

from __future__ import annotations

import io
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from gella.captions.text import (
    AnswerError,
    clean_description,
    match_nouns,
    parse_json_answer,
    parse_noun_list,
)
from gella.entities.view import read_image
from gella.utils.io import read_json

__all__ = [
    "MODES",
    "PROMPTS",
    "AnswerError",
    "Caption",
    "Captioner",
    "EndpointError",
    "Picture",
    "Reply",
    "RequestError",
    "StoppedError",
    "Tally",
    "count_usage",
    "describe",
    "load_picture",
    "read_prompts",
    "redact",
    "token_cost",
]

# Two descriptions per image, as in the paper: one prompt each, known by its id in the files.
PROMPTS = {
    "overview": (
        "Describe this image in two to four plain sentences for someone who cannot see it. Name "
        "the main things and the background, such as sky, grass, wall or road, each with a plain "
        "noun, and say where they are."
    ),
    "details": (
        "Describe this image in three to five plain sentences, from the nearest things to the "
        "background. Name people, animals, objects and surfaces, small things too, with colour or "
        "material where it tells them apart."
    ),
}
MODES = ("json", "two-steps")
_JSON_RULE = (
    "\n\nAnswer with one JSON object and nothing else, in this form:\n"
    '{"description": "...", "nouns": ["...", "..."]}\n'
    '"nouns" lists every phrase of the description that names something visible, in order of '
    'appearance, copied letter for letter from the description, without "a", "an" or "the". A '
    "phrase that names several things is listed once; a phrase that stands twice is listed twice."
)
_TEXT_RULE = "\n\nAnswer with the description only."
_NOUNS_QUESTION = (
    "List every phrase of the text below that names something visible, in order of appearance, "
    'copied letter for letter, without "a", "an" or "the", separated by commas, and nothing else.'
    "\n\n{description}"
)


class RequestError(Exception):
    """One request failed for good; the next picture may work."""


class EndpointError(Exception):
    """No request can work: wrong key, address or model, or the quota is used up."""


class StoppedError(Exception):
    """The captioner was told to stop before the answer was there."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture, without the metadata of its file (such as where it was taken)."""

    data: bytes
    mime: str = "image/jpeg"


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: what the model wrote.
        prompt_tokens: tokens of the question and the picture, None if not told.
        completion_tokens: tokens of the answer, None if not told.
        complete: False if the answer was cut at the limit of tokens.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    complete: bool = True


@dataclass(frozen=True)
class Caption:
    """A description and its nouns, each a substring of it, in order and without overlaps."""

    description: str
    nouns: list[str]


class Captioner(Protocol):
    """What :func:`describe` needs of a model. Must be safe to call from several threads."""

    model: str

    def ask(self, text: str, picture: Picture | None, *, attempt: int = 0) -> Reply:
        """Answer a question; ``attempt`` > 0 asks for another answer than the time before.

        Raises:
            AnswerError, RequestError, EndpointError, StoppedError.
        """
        ...


class Tally:
    """Counts of a run, by name; several threads may add to it."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Add to the counts of these names."""
        with self._lock:
            self._counts.update(counts)

    def __getitem__(self, name: str) -> int:
        """One count; 0 if nothing was added under this name."""
        with self._lock:
            return self._counts[name]

    def as_dict(self) -> dict[str, int]:
        """All counts, by name in alphabetical order."""
        with self._lock:
            return dict(sorted(self._counts.items()))


def load_picture(
    source: str | Path | np.ndarray, *, max_side: int = 1024, upright: bool = False
) -> Picture:
    """Read a picture, bound its size and encode it as JPEG.

    Args:
        source: file, or uint8 RGB (H, W, 3).
        max_side: longest side in pixels; a larger picture is scaled down, a smaller one kept.
        upright: as :func:`gella.entities.view.read_image`; off for datasets, whose masks lie in the
            frame of the stored pixels, on for photographs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture or is damaged.
    """
    pixels = source if isinstance(source, np.ndarray) else read_image(source, upright=upright)
    picture = Image.fromarray(pixels)
    # The longest side rounds to max_side exactly, the shorter never to nothing.
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=92, subsampling=0)
    return Picture(stream.getvalue())


def read_prompts(path: str | Path) -> dict[str, str]:
    """Read prompts from a JSON file ``{prompt_id: text}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such JSON, or a text is empty; the message names the prompt.
    """
    prompts = read_json(path, "prompt file")
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(f'{path}: expected {{"id": "text", ...}} with at least one prompt')
    for prompt_id, text in prompts.items():
        if not isinstance(text, str) or not text.strip() or not prompt_id.strip():
            raise ValueError(f"{path}: prompt {prompt_id!r} has no text; write one or remove it")
    return prompts


def describe(
    captioner: Captioner,
    picture: Picture,
    prompt: str = PROMPTS["overview"],
    *,
    mode: str = "json",
    attempts: int = 3,
    min_found: float = 0.8,
    tally: Tally | None = None,
) -> Caption:
    """Ask for a description with nouns until an answer can be used.

    Args:
        captioner: the model.
        picture: what to describe.
        prompt: what kind of description; the rules of the answer are added here.
        mode: "json": description and nouns in one answer. "two-steps": the description first, then
            its nouns, for models that write no JSON; two requests each.
        attempts: answers to ask for at most.
        min_found: least share (0..1) of an answer's nouns that must stand in its description, after
            repairs; the others are left out. With less the answer is rejected.
        tally: gets ``answers``, ``rejected``, ``nouns``, ``nouns_repaired``, ``nouns_merged``,
            ``nouns_dropped``.

    Raises:
        AnswerError: no answer could be used; says why of the last.
        RequestError, EndpointError, StoppedError: of the captioner.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; there are: {', '.join(MODES)}")
    tally = Tally() if tally is None else tally
    reason = "no attempt was made"
    for attempt in range(attempts):
        try:
            return _describe_once(captioner, picture, prompt, mode, attempt, min_found, tally)
        except AnswerError as error:
            tally.add(rejected=1)
            reason = str(error)
    raise AnswerError(f"none of {attempts} answers could be used; the last: {reason}")


def _describe_once(
    captioner: Captioner,
    picture: Picture,
    prompt: str,
    mode: str,
    attempt: int,
    min_found: float,
    tally: Tally,
) -> Caption:
    def ask(text: str, shown: Picture | None) -> str:
        reply = captioner.ask(text, shown, attempt=attempt)
        tally.add(answers=1)
        if not reply.complete:
            raise AnswerError("the answer was cut at the limit of tokens; allow more")
        return reply.text

    if mode == "json":
        description, listed = parse_json_answer(ask(prompt + _JSON_RULE, picture))
    else:
        description = clean_description(ask(prompt + _TEXT_RULE, picture))
        listed = parse_noun_list(ask(_NOUNS_QUESTION.replace("{description}", description), None))
    match = match_nouns(description, listed)
    if not match.nouns or match.found_share < min_found:
        tally.add(nouns_missing=len(match.missing))
        raise AnswerError(
            f"{len(match.missing)} of {len(listed)} nouns are not in the description"
            + (f", such as {match.missing[0][:60]!r}" if match.missing else "")
        )
    tally.add(
        nouns=len(match.nouns),
        nouns_repaired=match.changed,
        nouns_merged=len(match.merged),
        nouns_dropped=len(match.missing),
    )
    return Caption(description, match.nouns)


def token_cost(counts: dict[str, int], price_in: float, price_out: float) -> float:
    """Cost of the tokens counted under ``prompt_tokens`` and ``completion_tokens``.

    Args:
        counts: of a :class:`Tally`.
        price_in, price_out: price of a million tokens of questions and of answers.
    """
    asked, answered = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    return (asked * price_in + answered * price_out) / 1e6


def redact(text: str, secret: str | None) -> str:
    """The text with every occurrence of the secret replaced by ``***``."""
    return text.replace(secret, "***") if secret else text


def count_usage(tally: Tally, reply: Reply) -> None:
    """Add the tokens of a :class:`Reply` to the tally, or note that they are not known."""
    if reply.prompt_tokens is None or reply.completion_tokens is None:
        tally.add(answers_without_usage=1)
    tally.add(
        prompt_tokens=reply.prompt_tokens or 0, completion_tokens=reply.completion_tokens or 0
    )

"""Captions from other models: a picture goes in, a description and its nouns come out.

A captioner answers one question about one picture: a chat endpoint (`EndpointCaptioner`), a model
in this process (`LocalCaptioner`), or whatever has their ``ask``. Models fence their JSON, cut it,
and name nouns in other words than the description's. What can be repaired without guessing is
repaired; everything else is counted, and asked for again.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from gella.entities.view import encoded, read_image
from gella.text.words import ARTICLES, bare_noun, other_numbers

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
# Tokens of the training prompts; a caption that held one could not be trained on.
_RESERVED = ("<SEG>", "<image>", "<s>", "</s>", "<unk>")
_MAX_STARTS = 50  # braces from which a JSON object is looked for
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})
_EDGES = " \t\n.,;:!?\"'()[]{}*_#"


class AnswerError(Exception):
    """An answer that cannot be used; asking again may give a better one."""


class RequestError(Exception):
    """One request failed for good; the next picture may work."""


class EndpointError(Exception):
    """No request can work: wrong key, address or model, or the quota is used up."""


class StoppedError(Exception):
    """The captioner was told to stop before the answer was there."""


@dataclass(frozen=True)
class Reply:
    """One answer: its text, the tokens of question and answer (None: not told), and whether it is
    complete: False if it was cut at the limit of tokens."""

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
    """What :func:`describe` needs of a model. Must be safe to call from several threads.

    Attributes:
        model: its name, for the captions.
        mode: how it is asked, unless the caller wants another way: one of ``MODES``.
    """

    model: str
    mode: str

    def ask(self, text: str, picture: bytes | None, *, attempt: int = 0) -> Reply:
        """Answer a question, maybe about a JPEG; ``attempt`` > 0 asks for another answer.

        Raises AnswerError, RequestError, EndpointError or StoppedError.
        """
        ...


class Tally:
    """Counts of a run, by name; several threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Add to the counts of these names."""
        with self._lock:
            self._counts.update(counts)

    def add_tokens(self, reply: Reply) -> None:
        """Add what an answer cost, or note that it is not known."""
        asked, answered = reply.prompt_tokens, reply.completion_tokens
        if asked is None or answered is None:
            self.add(answers_without_usage=1)
        self.add(prompt_tokens=asked or 0, completion_tokens=answered or 0)

    def __getitem__(self, name: str) -> int:
        with self._lock:
            return self._counts[name]

    def as_dict(self) -> dict[str, int]:
        """All counts, by name in alphabetical order."""
        with self._lock:
            return dict(sorted(self._counts.items()))


def load_picture(
    source: str | Path | np.ndarray, *, max_side: int = 1024, upright: bool = False
) -> bytes:
    """Read a picture, bound its size and encode it as JPEG, without its file's metadata.

    Args:
        source: file, or uint8 RGB (H, W, 3).
        max_side: longest side in pixels; a larger picture is scaled down, a smaller one kept.
        upright: turn it by its EXIF orientation.

    Raises FileNotFoundError without the file, ValueError if it is no picture or damaged.
    """
    pixels = source if isinstance(source, np.ndarray) else read_image(source, upright=upright)
    picture = Image.fromarray(pixels)
    # The longest side rounds to max_side exactly, the shorter never to nothing.
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
    return encoded(picture, "JPEG", quality=92, subsampling=0)


def describe(
    captioner: Captioner,
    picture: bytes,
    prompt: str = PROMPTS["overview"],
    *,
    mode: str | None = None,
    attempts: int = 3,
    min_found: float = 0.8,
    tally: Tally | None = None,
) -> Caption:
    """Ask for a description with nouns until an answer can be used.

    Args:
        captioner, picture: who describes what.
        prompt: what kind of description; the rules of the answer are added here.
        mode: "json": description and nouns in one answer. "two-steps": the description first, then
            its nouns, for models that write no JSON; two requests each. None: the captioner's.
        attempts: answers to ask for at most.
        min_found: least share (0..1) of an answer's nouns that must stand in its description, after
            repairs; the others are left out. With less the answer is rejected.
        tally: gets ``answers``, ``rejected``, ``nouns``, ``nouns_repaired``, ``nouns_merged``,
            ``nouns_dropped``, and ``nouns_missing`` of rejected answers.

    Raises:
        AnswerError: no answer could be used; says why of the last.
        RequestError, EndpointError, StoppedError: of the captioner.
    """
    mode, tally = mode or captioner.mode, Tally() if tally is None else tally
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; there are: {', '.join(MODES)}")
    reason = "no attempt was made"

    def ask(text: str, shown: bytes | None, attempt: int) -> str:
        reply = captioner.ask(text, shown, attempt=attempt)
        tally.add(answers=1)
        if not reply.complete:
            raise AnswerError("the answer was cut at the limit of tokens; allow more")
        return reply.text

    for attempt in range(attempts):
        try:
            if mode == "json":
                description, listed = parse_json_answer(ask(prompt + _JSON_RULE, picture, attempt))
            else:
                description = clean_description(ask(prompt + _TEXT_RULE, picture, attempt))
                question = _NOUNS_QUESTION.replace("{description}", description)
                listed = parse_noun_list(ask(question, None, attempt))
            return Caption(description, _accepted(description, listed, min_found, tally))
        except AnswerError as error:
            tally.add(rejected=1)
            reason = str(error)
    raise AnswerError(f"none of {attempts} answers could be used; the last: {reason}")


def _accepted(description: str, listed: list[str], min_found: float, tally: Tally) -> list[str]:
    """The nouns of an answer, counted; AnswerError if too few stand in its description."""
    match = match_nouns(description, listed)
    lost = match.missing
    if not match.nouns or match.found_share < min_found:
        tally.add(nouns_missing=len(lost))
        example = f", such as {lost[0][:60]!r}" if lost else ""
        raise AnswerError(f"{len(lost)} of {len(listed)} nouns are not in the description{example}")
    tally.add(nouns=len(match.nouns), nouns_repaired=match.changed)
    tally.add(nouns_merged=len(match.merged), nouns_dropped=len(lost))
    return match.nouns


# -- answers ---------------------------------------------------------------------------------------


def parse_json_answer(text: str) -> tuple[str, list[str]]:
    """Description and nouns (as the model wrote them) of an answer that should be one JSON object.

    Code fences, text around it, raw line breaks in strings and trailing commas are passed over.
    Raises AnswerError, which says why, for an answer without a description and a list of nouns.
    """
    for answer in _objects(text):
        if isinstance(answer.get("description"), str):
            if "nouns" not in answer:
                raise AnswerError('the answer\'s JSON object has no "nouns"')
            return clean_description(answer["description"]), _as_nouns(answer["nouns"])
    raise AnswerError(f"no JSON object with a description in the answer {_excerpt(text)}")


def parse_noun_list(text: str) -> list[str]:
    """Nouns of an answer that lists them: as JSON, or by commas or lines, numbered or not."""
    start = text.find("[")
    value = _decode(text, start) if start >= 0 else None
    if isinstance(value, list):
        return _as_nouns(value)
    for answer in _objects(text):
        if "nouns" in answer:
            return _as_nouns(answer["nouns"])
    return _split_nouns(text)


def clean_description(text: str) -> str:
    """One line with single blanks; AnswerError if it has no letter, or a token of the prompts."""
    # Lone halves of surrogate pairs ("\ud83d" cut off) cannot be written as UTF-8.
    whole = text.encode("utf-8", "replace").decode("utf-8")
    line = " ".join(whole.replace("\x00", " ").split())
    if not re.search(r"[^\W\d_]", line):
        raise AnswerError(f"the description is empty: {_excerpt(text)}")
    for token in _RESERVED:
        if token in line:
            raise AnswerError(f"the description holds {token!r}, which training prompts reserve")
    return line


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that start anywhere in the text, outer ones first."""
    for hit in itertools.islice(re.finditer("{", text), _MAX_STARTS):
        value = _decode(text, hit.start())
        if isinstance(value, dict):
            yield value


def _decode(text: str, start: int) -> Any:
    """The JSON value that starts at ``start``, or None."""
    decoder = json.JSONDecoder(strict=False)  # raw line breaks inside strings
    # A comma after the last item is the most common slip.
    for repair in (str, lambda rest: re.sub(r",(\s*[}\]])", r"\1", rest)):
        try:
            return decoder.raw_decode(repair(text[start:]))[0]
        except (ValueError, RecursionError):
            pass
    return None


def _as_nouns(value: Any) -> list[str]:
    if isinstance(value, str):
        return _split_nouns(value)
    if not isinstance(value, list):
        raise AnswerError(f'"nouns" is {_excerpt(json.dumps(value))}, not a list')
    nouns = []
    for item in value:
        if isinstance(item, dict):  # {"noun": "dog", "color": ...}
            item = next((item[key] for key in ("noun", "text", "name") if key in item), None)
        if isinstance(item, str) and item.strip():
            nouns.append(item)
    return nouns


def _split_nouns(text: str) -> list[str]:
    parts = re.split(r"[,;\n]", text)
    bare = [re.sub(r"^\s*(?:[-*\u2022]|\d+[.)])?\s*(?:and\s+)?", "", part) for part in parts]
    return [part.strip(_EDGES) for part in bare if part.strip(_EDGES)]


def _excerpt(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return repr(line[:limit] + ("..." if len(line) > limit else ""))


# -- nouns -----------------------------------------------------------------------------------------


@dataclass
class NounMatch:
    """The nouns of an answer against its description.

    Attributes:
        nouns: texts exactly as they stand in the description, by position, without overlaps.
        spans: (start, end) of each in the description.
        changed: how many were repaired: another case, number, determiner or spelling was found.
        merged: listed more often than they occur, or part of a longer noun; left out.
        missing: not in the description in any form; left out.
    """

    nouns: list[str] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    changed: int = 0
    merged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def found_share(self) -> float:
        """Share (0..1) of the listed nouns that occur in the description; 0 without any noun."""
        there = len(self.nouns) + len(self.merged)
        return there / (there + len(self.missing)) if self.nouns else 0.0


def match_nouns(description: str, nouns: Sequence[str]) -> NounMatch:
    """Find every noun in the description, as whole words, and take the text that stands there.

    Tried in this order: the noun as given, but for case, white space, hyphens and quotes; without
    its determiners; with its last word in the other number; both. Longer nouns choose their place
    first, so "hat" beside "red hat" is another hat, or left out.

    The result is such that :func:`gella.text.spans.locate_phrases` gives its spans back.
    """
    match = NounMatch()
    text = description.translate(_QUOTES)
    cleaned = [bare_noun(noun.strip(_EDGES), ARTICLES) for noun in nouns]
    for number in sorted(range(len(nouns)), key=lambda i: (-len(cleaned[i]), i)):
        occurs = False
        for form in _forms(cleaned[number].translate(_QUOTES)):
            spans = [hit.span() for hit in re.finditer(form, text, re.IGNORECASE)]
            occurs = occurs or bool(spans)
            free = [(a, b) for a, b in spans if all(b <= c or d <= a for c, d in match.spans)]
            if free:
                match.spans.append(free[0])
                match.changed += description[slice(*free[0])] != nouns[number].strip()
                break
        else:
            (match.merged if occurs else match.missing).append(nouns[number])
    match.spans.sort()
    match.nouns = [description[start:end] for start, end in match.spans]
    return match


def _forms(noun: str) -> Iterator[str]:
    """Patterns of the noun's variants, closest first."""
    bare = bare_noun(noun, counts=True)
    for variant in (noun, bare, *other_numbers(noun), *other_numbers(bare)):
        words = [re.escape(word) for word in re.split(r"[\s\-]+", variant) if word]
        if re.search(r"\w", variant):
            yield r"(?<!\w)" + r"[\s\-]+".join(words) + r"(?!\w)"

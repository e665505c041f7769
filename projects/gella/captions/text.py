"""What a language model answered, made into a description and nouns that stand in it.

Models fence their JSON, cut it, and name nouns in other words than the description's. What can be
repaired without guessing is repaired, and everything else is counted, so that the caller can ask
again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gella.text.words import ARTICLES, bare_noun, other_numbers

__all__ = [
    "AnswerError",
    "NounMatch",
    "clean_description",
    "match_nouns",
    "parse_json_answer",
    "parse_noun_list",
]

# Tokens of the training prompts; a caption that held one could not be trained on.
_RESERVED = ("<SEG>", "<image>", "<s>", "</s>", "<unk>")
_MAX_STARTS = 50  # braces from which a JSON object is looked for
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})
_EDGES = " \t\n.,;:!?\"'()[]{}*_#"


class AnswerError(Exception):
    """An answer that cannot be used; asking again may give a better one."""


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
        found = len(self.nouns) + len(self.merged)
        total = found + len(self.missing)
        return found / total if total and self.nouns else 0.0


def parse_json_answer(text: str) -> tuple[str, list[str]]:
    """Description and nouns (as the model wrote them) of an answer that should be one JSON object.

    Code fences, text before and after, raw line breaks in strings and trailing commas are passed
    over.

    Raises:
        AnswerError: no object with a description and a list of nouns, for instance because the
            answer was cut; the message says which.
    """
    found = None
    for candidate in _objects(text):
        if isinstance(candidate.get("description"), str):
            found = candidate
            break
    if found is None:
        raise AnswerError(f"no JSON object with a description in the answer {_excerpt(text)}")
    if "nouns" not in found:
        raise AnswerError('the answer\'s JSON object has no "nouns"')
    return clean_description(found["description"]), _as_nouns(found["nouns"])


def parse_noun_list(text: str) -> list[str]:
    """Nouns of an answer that lists them: as JSON, or by commas or lines, numbered or not."""
    start = text.find("[")
    if start >= 0:
        value = _decode(text, start)
        if isinstance(value, list):
            return _as_nouns(value)
    for candidate in _objects(text):
        if "nouns" in candidate:
            return _as_nouns(candidate["nouns"])
    return _split_nouns(text)


def clean_description(text: str) -> str:
    """One line with single blanks.

    Raises:
        AnswerError: no letter in it, or a token that training prompts keep for themselves.
    """
    # Lone halves of surrogate pairs ("\ud83d" cut off) cannot be written as UTF-8.
    whole = text.encode("utf-8", "replace").decode("utf-8")
    line = " ".join(whole.replace("\x00", " ").split())
    if not re.search(r"[^\W\d_]", line):
        raise AnswerError(f"the description is empty: {_excerpt(text)}")
    for token in _RESERVED:
        if token in line:
            raise AnswerError(f"the description holds {token!r}, which training prompts reserve")
    return line


def match_nouns(description: str, nouns: Sequence[str]) -> NounMatch:
    """Find every noun in the description, as whole words, and take the text that stands there.

    Tried in this order: the noun as given, but for case, white space, hyphens and quotes; without
    its determiners; with its last word in the other number; both. Longer nouns choose their place
    first, so "hat" beside "red hat" is another hat, or left out.

    The result is such that :func:`gella.text.spans.locate_phrases` gives its spans back.
    """
    result = NounMatch()
    text = description.translate(_QUOTES)
    cleaned = [bare_noun(noun.strip(_EDGES), ARTICLES) for noun in nouns]
    taken: list[tuple[int, int]] = []
    for place in sorted(range(len(nouns)), key=lambda i: (-len(cleaned[i]), i)):
        span, occurs = _free_span(text, cleaned[place], taken)
        if span is not None:
            taken.append(span)
            result.changed += description[slice(*span)] != nouns[place].strip()
        else:
            (result.merged if occurs else result.missing).append(nouns[place])
    result.spans = sorted(taken)
    result.nouns = [description[start:end] for start, end in result.spans]
    return result


def _free_span(
    text: str, noun: str, taken: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int] | None, bool]:
    """The first place of the noun that nothing has taken, and whether it occurs at all."""
    occurs = False
    for form in _forms(noun.translate(_QUOTES)):
        for found in re.finditer(form, text, re.IGNORECASE):
            occurs = True
            start, end = found.span()
            if all(end <= left or right <= start for left, right in taken):
                return (start, end), True
    return None, occurs


def _forms(noun: str) -> Iterator[str]:
    """Patterns of the noun's variants, closest first, each once."""
    bare = bare_noun(noun, counts=True)
    seen = set()
    for variant in (noun, bare, *other_numbers(noun), *other_numbers(bare)):
        words = [re.escape(word) for word in re.split(r"[\s\-]+", variant) if word]
        if not re.search(r"\w", variant) or variant.lower() in seen:
            continue
        seen.add(variant.lower())
        yield r"(?<!\w)" + r"[\s\-]+".join(words) + r"(?!\w)"


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that start anywhere in the text, outer ones first."""
    starts = [place for place, character in enumerate(text) if character == "{"][:_MAX_STARTS]
    for start in starts:
        value = _decode(text, start)
        if isinstance(value, dict):
            yield value


def _decode(text: str, start: int) -> Any:
    """The JSON value that starts at ``start``, or None."""
    decoder = json.JSONDecoder(strict=False)  # raw line breaks inside strings
    try:
        return decoder.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        pass
    try:  # a comma after the last item is the most common slip
        return decoder.raw_decode(re.sub(r",(\s*[}\]])", r"\1", text[start:]), 0)[0]
    except (ValueError, RecursionError):
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

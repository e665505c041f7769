"""What a caption says of a mirrored picture: left and right change places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["FLIP_TEXT", "mirrored_words", "names_a_side"]

FLIP_TEXT = ("swap", "skip")  # values of INPUT.GELLA.FLIP_TEXT

# "left", "Rightmost", "right-hand", "topleft"; not "bright", "leftover", "righteous".
_SIDES = re.compile(
    r"\b(?P<before>top|bottom|upper|lower|far)?(?P<side>left|right)"
    r"(?=(?:most|ish|wards?|(?:hand|side)(?:ed)?)?\b)",
    re.IGNORECASE,
)
# Words that turn over in a mirror and that no rule rewrites: "2nd from l", "rt guy", clock faces.
_UNSURE = re.compile(
    r"\b(?:l|r|lt|rt|lft|rgt|lhs|rhs|(?:counter|anti)?-?clockwise|o.?clock)\b", re.IGNORECASE
)


def names_a_side(text: str, mode: str) -> bool:
    """Whether a mirrored picture would make a text wrong.

    Args:
        text: a caption or expression.
        mode: "skip": any word of left and right; "swap": only words that `mirrored_words` leaves.

    Raises ValueError for another mode.
    """
    if mode not in FLIP_TEXT:
        raise ValueError(f"INPUT.GELLA.FLIP_TEXT is {mode!r}: use one of {FLIP_TEXT}")
    return bool(_UNSURE.search(text) or (mode == "skip" and _SIDES.search(text)))


def mirrored_words(
    caption: str, phrases: Sequence[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """A caption and its phrases for the mirrored picture; nothing is changed in place.

    "left" and "right" change places, also inside "leftmost" or "right-hand", and keep their case
    ("Left" -> "Right", "LEFT" -> "RIGHT"). ``start`` and ``end`` of phrases that have a place in
    the caption (``start >= 0``) move along with the words before them.
    """
    swapped: list[dict[str, Any]] = []
    for phrase in phrases:
        changed = {**phrase, "text": _SIDES.sub(_other, phrase["text"])}
        if phrase.get("start", -1) >= 0:
            for key in ("start", "end"):
                changed[key] = phrase[key] + _growth(caption, phrase[key])
        swapped.append(changed)
    return _SIDES.sub(_other, caption), swapped


def _growth(caption: str, place: int) -> int:
    """Characters that the words ending at or before a place gain."""
    ends = (match for match in _SIDES.finditer(caption) if match.end() <= place)
    return sum(1 if match["side"].lower() == "left" else -1 for match in ends)


def _other(match: re.Match[str]) -> str:
    side = match["side"]
    other = "right" if side.lower() == "left" else "left"
    if side.isupper():
        other = other.upper()
    elif side[0].isupper():
        other = other.capitalize()
    return (match["before"] or "") + other

"""Where the phrases of a caption stand in it: character spans from texts without offsets."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any

# Tokenizers of annotation tools rewrite quotes and dashes; one character stands for each family.
_SAME = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})

# First words of the names of letters that are written without blanks between the words, or with
# particles at the end of words: each counts as a word.
_UNSPACED = frozenset("CJK HIRAGANA KATAKANA HANGUL THAI LAO KHMER MYANMAR".split())
_JOINER = "\u200d"

Span = tuple[int, int]
"""Start and end of characters, as slices have them."""


def word_spans(text: str) -> list[Span]:
    """Spans of the words of a text in any script; pictures such as emoji are words of their own.

    No word ends before a mark, a joiner or a colour of skin, which belong to what stands before.
    """
    spans: list[Span] = []
    kind = ""  # of the character before
    for i, character in enumerate(text):
        category = unicodedata.category(character)
        if category[0] == "M" or category == "Cf" or "\U0001f3fb" <= character <= "\U0001f3ff":
            joined = bool(kind)
        else:
            before, kind = kind, "sign" if category == "So" else ""
            if character.isalnum() or character == "_":
                script = unicodedata.name(character, "").split(" ")[0]
                kind = "sign" if script in _UNSPACED else "letter"
            joined = kind == before == "letter" or bool(kind and before and text[i - 1] == _JOINER)
        if joined:
            spans[-1] = (spans[-1][0], i + 1)
        elif kind:
            spans.append((i, i + 1))
    return spans


def locate_phrases(caption: str, phrases: Sequence[str]) -> list[Span | None]:
    """Spans of phrases that occur in `caption` in this order; None where one does not.

    A cursor walks from left to right, so the second "a dog" is found after the first. Case and the
    amount of white space do not matter; whole words are preferred over parts of words.
    """
    spans: list[Span | None] = []
    cursor = 0
    for phrase in phrases:
        pattern = r"\s+".join(map(re.escape, phrase.split()))
        match = None
        if pattern:
            whole = re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)
            part = re.compile(pattern, re.IGNORECASE)
            match = whole.search(caption, cursor) or part.search(caption, cursor)
        spans.append(match.span() if match else None)
        cursor = match.end() if match else cursor
    return spans


def located(caption: str, nouns: Sequence[str]) -> list[dict[str, Any]]:
    """Phrases (``text``, ``start``, ``end``) of nouns; -1 and -1 where one is not in `caption`.

    A noun that does not come in the order of the caption is sought everywhere.
    """
    spans = [
        span or locate_phrases(caption, [noun])[0] or (-1, -1)
        for noun, span in zip(nouns, locate_phrases(caption, nouns), strict=True)
    ]
    return [{"text": noun, "start": s, "end": e} for noun, (s, e) in zip(nouns, spans)]


def align_utterances(caption: str, utterances: Sequence[str]) -> list[Span | None]:
    """Spans of utterances that partition `caption` in order (PNG, docs/FORMATS.md 2).

    Utterances may differ from the caption in case, white space (also inside words, as in "is" +
    "n't"), quotes and punctuation. Where letters differ too, both texts are aligned as wholes, and
    an utterance some of whose letters or digits have no consecutive counterpart gives None; so does
    a blank one.
    """
    offsets = [i for i, c in enumerate(caption) if not c.isspace()]
    left = _stream(caption)
    streams = [_stream(utterance) for utterance in utterances]
    right = "".join(streams)
    if left.startswith(right):  # nearly all of PNG: the caption's own characters
        ends = accumulate(map(len, streams))
        return [
            (offsets[end - len(stream)], offsets[end - 1] + 1) if stream else None
            for stream, end in zip(streams, ends)
        ]
    partners = _pair(right, left)
    # Rank of every letter or digit among the caption's letters and digits.
    ranks, rank = [], 0
    for character in left:
        ranks.append(rank if character.isalnum() else -1)
        rank += character.isalnum()
    spans: list[Span | None] = []
    cursor = 0
    for stream in streams:
        places = partners[cursor : cursor + len(stream)]
        cursor += len(stream)
        letters = [p for p, c in zip(places, stream) if c.isalnum()] or places
        order = [ranks[p] if ranks[p] >= 0 else p for p in letters if p >= 0]
        if not order or len(order) < len(letters) or order[-1] - order[0] != len(order) - 1:
            spans.append(None)
            continue
        matched = [p for p in places if p >= 0]
        spans.append((offsets[matched[0]], offsets[matched[-1]] + 1))
    return spans


def _stream(text: str) -> str:
    """The text's characters without white space, one for one, in lower case."""
    folded = text.translate(_SAME)
    if folded.isascii():
        return "".join(folded.lower().split())
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in folded if not c.isspace())


def _pair(right: str, left: str) -> list[int]:
    """For every character of `right` its counterpart's place in `left`, or -1."""
    partners = [-1] * len(right)
    letters = [[p for p, c in enumerate(text) if c.isalnum()] for text in (right, left)]
    if [right[p] for p in letters[0]] != [left[p] for p in letters[1]]:
        blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
        for block in blocks:
            partners[block.b : block.b + block.size] = range(block.a, block.a + block.size)
        return partners
    # They differ in punctuation only, which takes linear time: the k-th letter or digit belongs to
    # the k-th, and between two of them signs are paired in order.
    start = cursor = 0
    for right_end, left_end in zip([*letters[0], len(right)], [*letters[1], len(left)]):
        for sign in range(start, right_end):
            twin = left.find(right[sign], cursor, left_end)
            if twin >= 0:
                partners[sign], cursor = twin, twin + 1
        if right_end < len(right):
            partners[right_end] = left_end
        start, cursor = right_end + 1, left_end + 1
    return partners

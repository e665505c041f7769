"""Where the phrases of a caption stand in it: character spans from texts without offsets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

# Tokenizers of annotation tools rewrite quotes and dashes; one character stands for each family.
_SAME = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})


def locate_phrases(caption: str, phrases: Sequence[str]) -> list[tuple[int, int] | None]:
    """Spans (start, end) of phrases that occur in `caption` in this order; None where one does not.

    A cursor walks from left to right, so the second "a dog" is found after the first. Case and the
    amount of white space do not matter; whole words are preferred over parts of words.
    """
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for phrase in phrases:
        words = [re.escape(word) for word in phrase.split()]
        pattern = r"\s+".join(words)
        found = None
        if words:
            for form in (rf"(?<!\w){pattern}(?!\w)", pattern):
                found = re.compile(form, re.IGNORECASE).search(caption, cursor)
                if found:
                    break
        spans.append(found.span() if found else None)
        cursor = found.end() if found else cursor
    return spans


def located(caption: str, nouns: Sequence[str]) -> list[dict[str, Any]]:
    """Phrases (``text``, ``start``, ``end``) of nouns; -1 and -1 where one is not in `caption`."""
    spans = locate_phrases(caption, nouns)
    return [
        {"text": noun, "start": start, "end": end}
        for noun, (start, end) in zip(nouns, (span or (-1, -1) for span in spans))
    ]


def align_utterances(caption: str, utterances: Sequence[str]) -> list[tuple[int, int] | None]:
    """Spans (start, end) of utterances that partition `caption` in order (PNG, docs/FORMATS.md 2).

    Utterances may differ from the caption in case, white space (also inside words, as in "is" +
    "n't"), quotes and punctuation. Where letters differ too, both texts are aligned as wholes, and
    an utterance some of whose letters or digits have no consecutive counterpart gives None; so does
    a blank one.
    """
    caption_places = [i for i, c in enumerate(caption) if not c.isspace()]
    left = _stream(caption)
    streams = [_stream(utterance) for utterance in utterances]
    right = "".join(streams)
    if left.startswith(right):
        return _consecutive(streams, caption_places)
    partners = _pair(right, left)
    # Rank of every letter or digit among the caption's letters and digits.
    ranks, rank = [], 0
    for character in left:
        ranks.append(rank if character.isalnum() else -1)
        rank += character.isalnum()
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for stream in streams:
        places = partners[cursor : cursor + len(stream)]
        cursor += len(stream)
        letters = [p for p, c in zip(places, stream) if c.isalnum()] or places
        known = [p for p in letters if p >= 0]
        order = [ranks[p] if ranks[p] >= 0 else p for p in known]
        if not known or len(known) < len(letters) or order[-1] - order[0] != len(order) - 1:
            spans.append(None)
            continue
        matched = [p for p in places if p >= 0]
        spans.append((caption_places[matched[0]], caption_places[matched[-1]] + 1))
    return spans


def _consecutive(streams: Sequence[str], places: Sequence[int]) -> list[tuple[int, int] | None]:
    """Spans of streams that are the caption's characters from the first on: nearly all of PNG."""
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for stream in streams:
        end = cursor + len(stream)
        spans.append((places[cursor], places[end - 1] + 1) if stream else None)
        cursor = end
    return spans


def _stream(text: str) -> str:
    """The text's characters without white space, one for one, in lower case."""
    folded = text.translate(_SAME)
    if folded.isascii():
        return "".join(folded.lower().split())
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in folded if not c.isspace())


def _pair(right: str, left: str) -> list[int]:
    """For every character of `right` its counterpart's place in `left`, or -1."""
    places = [[p for p, c in enumerate(text) if c.isalnum()] for text in (right, left)]
    if [right[p] for p in places[0]] == [left[p] for p in places[1]]:
        return _pair_by_letters(right, left, places[0], places[1])
    partners = [-1] * len(right)
    for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        for step in range(block.size):
            partners[block.b + step] = block.a + step
    return partners


def _pair_by_letters(
    right: str, left: str, right_letters: Sequence[int], left_letters: Sequence[int]
) -> list[int]:
    """`_pair` of texts that differ in punctuation only, in linear time.

    The k-th letter or digit belongs to the k-th; between two of them signs are paired in order.
    """
    partners = [-1] * len(right)
    right_ends, left_ends = [*right_letters, len(right)], [*left_letters, len(left)]
    place, cursor = 0, 0
    for right_end, left_end in zip(right_ends, left_ends):
        while place < right_end:
            found = left.find(right[place], cursor, left_end)
            if found >= 0:
                partners[place], cursor = found, found + 1
            place += 1
        if right_end < len(right):
            partners[right_end] = left_end
        place, cursor = right_end + 1, left_end + 1
    return partners

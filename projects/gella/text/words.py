"""English, as far as nouns need it: numbers in words, plurals, determiners, lists.

Own rules and not the package `inflect`: importing that takes two seconds of every process, and it
makes "bu" the singular of "bus" and "len" that of "lens".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

ARTICLES = frozenset(("a", "an", "the"))
DETERMINERS = ARTICLES | frozenset(
    "this that these those some any each every another all both "
    "my your his her its our their".split()
)
_COUNTS = frozenset((*_SMALL[1:11], "many", "several", "few", "other"))

_PLURALS = {
    **{"man": "men", "woman": "women", "person": "people", "child": "children", "foot": "feet"},
    **{"tooth": "teeth", "goose": "geese", "mouse": "mice", "leaf": "leaves", "knife": "knives"},
    **{"shelf": "shelves", "half": "halves", "loaf": "loaves", "wolf": "wolves"},
    **{"calf": "calves", "scarf": "scarves"},
}
_SINGULARS = {plural: singular for singular, plural in _PLURALS.items()}

# Words by which a noun phrase speaks of several things, or looks as if it did.
_QUANTITIES = frozenset(
    (*_SMALL[2:13], "several", "few", "many", "both", "multiple", "various", "numerous")
    + ("couple", "pair", "dozen")
)
_GROUPS = frozenset(
    "group groups bunch set row rows number lot lots crowd herd flock line pile".split()
)
_PREPOSITIONS = frozenset(
    "of in on at with by from near under over behind beside to for that".split()
)
_SEVERAL = frozenset((*_SINGULARS, "cattle", "they", "them"))
_ONE_IN_S = frozenset(  # singular, or a plural that names one thing
    "bus gas lens canvas plus pants jeans shorts scissors trousers goggles sunglasses eyeglasses "
    "binoculars headphones christmas atlas always perhaps its his".split()
)


def number_in_words(n: int) -> str:
    """English number without hyphens or "and": 21 -> "twenty one". ValueError outside 0..999999."""
    if not 0 <= n < 1_000_000:
        raise ValueError(f"{n} cannot be written in words here; 0..999999 can")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = f" {number_in_words(n % size)}" if n % size else ""
            return f"{number_in_words(n // size)} {name}{rest}"
    if n >= 20:
        return _TENS[n // 10] + (f" {_SMALL[n % 10]}" if n % 10 else "")
    return _SMALL[n]


def with_article(noun: str) -> str:
    """ "dog" -> "a dog", "apple" -> "an apple"."""
    # "u" as in "unit" and "eu" sound like a consonant.
    vowel = re.match(r"(?!uni|use|eu|one\b)[aeiou]", noun, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {noun}"


def in_a_row(items: Sequence[str]) -> str:
    """At least one text: "a", "a and b", "a, b and c"."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if items[1:] else items[0]


def bare_noun(noun: str, words: Collection[str] = DETERMINERS, *, counts: bool = False) -> str:
    """A noun phrase without its leading determiners; the last word stays, blanks become single.

    Args:
        noun: the phrase, in any case.
        words: what is dropped, in lower case.
        counts: whether numbers ("3", "three") and such as "many" are dropped too.
    """
    parts = noun.split()
    start = 0
    while start < len(parts) - 1 and (
        parts[start].lower() in words
        or (counts and (parts[start].lower() in _COUNTS or parts[start].isdecimal()))
    ):
        start += 1
    return " ".join(parts[start:])


def other_numbers(noun: str) -> list[str]:
    """A noun phrase with its last word in the plural or the singular, likely forms first."""
    head, blank, last = noun.rpartition(" ")
    word = last.lower()
    if word in _PLURALS or word in _SINGULARS:
        others = [_PLURALS.get(word) or _SINGULARS[word]]
    else:  # candidates, of which the text decides: "buses" may come of "bus" and of "buse"
        others = [f"{word}s", f"{word}es"]
        if re.search(r"[^aeiou]y$", word):
            others.append(f"{word[:-1]}ies")
        if word.endswith("ies"):
            others.append(f"{word[:-3]}y")
        if word.endswith("es"):
            others.append(word[:-2])
        if word.endswith("s") and not word.endswith("ss"):
            others.append(word[:-1])
    return [head + blank + other for other in others if len(other) > 1]


def names_several(noun: str) -> bool:
    """Whether a noun phrase speaks of more than one thing, judged by its words alone.

    A rule of thumb: a number or quantity ("two", "a few"), "and", a group of something ("a pair
    of"), an irregular plural ("people"), or a head noun in -s that is no known exception.
    """
    words = re.findall(r"[a-z0-9']+", noun.lower())
    if not words:
        return False
    if any(word in _QUANTITIES or (word.isdigit() and int(word) > 1) for word in words):
        return True
    if "and" in words[1:-1] or any(w in _GROUPS and v == "of" for w, v in zip(words, words[1:])):
        return True
    # The head noun stands before the first preposition: "the wall with windows" is one wall.
    end = next((k for k, word in enumerate(words) if k and word in _PREPOSITIONS), len(words))
    head = words[end - 1]
    ending = head.endswith("s") and not head.endswith(("ss", "us", "is", "'s"))
    return head in _SEVERAL or (ending and len(head) > 2 and head not in _ONE_IN_S)


def noun_chunks(text: str, pipeline: str) -> list[dict[str, Any]]:
    """Noun phrases of a text in its order, each with ``text``, ``start`` and ``end``, by spaCy.

    Pronouns are left out: by themselves they name nothing.

    Args:
        text: any.
        pipeline: a pipeline of spaCy with tagger and parser, such as "en_core_web_sm".

    Raises:
        ImportError: spaCy or the pipeline is not installed.
    """
    chunks = [chunk for chunk in _spacy(pipeline)(text).noun_chunks if chunk.root.pos_ != "PRON"]
    return [{"text": c.text, "start": c.start_char, "end": c.end_char} for c in chunks]


@functools.lru_cache
def _spacy(pipeline: str) -> Any:
    given = "or give the nouns, which need no spaCy"
    try:
        import spacy
    except ImportError as error:
        raise ImportError(
            "finding the nouns of a caption needs spaCy: pip install 'gella[chunker]' && python -m"
            f" spacy download {pipeline}; {given}"
        ) from error
    try:
        return spacy.load(pipeline)
    except OSError as error:
        raise ImportError(
            f"spaCy has no pipeline {pipeline} (MODEL.CLIP.CHUNKER): python -m spacy download"
            f" {pipeline}; {given}"
        ) from error

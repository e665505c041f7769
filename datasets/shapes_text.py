"""Narratives, descriptions and referring expressions of a synthetic scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from shapes_phrases import (
    Unit,
    absent_unit,
    attribute_noun,
    attribute_sets,
    plural_units,
    sides_of,
    singular_units,
    stuff_unit,
)
from shapes_scene import Scene

MAX_WORDS = 60  # of a narrative
_PICTURE_WORDS = ("picture", "photo", "image")
_CLOSE = 4.0  # pixels; relations closer than this are not stated

_ARTICLES = ("a", "an", "the")

Piece = tuple[str, "Unit | None"]  # text and, for a noun, the unit it names


@dataclass
class Narrative:
    """A caption and what its parts name.

    Attributes:
        caption: sentences with ordinary spelling.
        segments: dicts of ``utterance``, ``members`` (indices as in `Unit`), ``plural``, ``noun``,
            which partition the caption in order, in the benchmark's habits: often lower-cased,
            some determiners in the segment before, punctuation apart, "isn't" as "is n't".
        nouns: the noun phrases as substrings of the caption, in order.
    """

    caption: str
    segments: list[dict[str, Any]]
    nouns: list[str]


def write_narrative(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> Narrative:
    """Write one narrative of four to eight noun phrases and at most 60 words.

    Every phrase names exactly the things that fit its words (a singular one fits one thing only).

    Args:
        scene: what to write about.
        rng: source of every choice.
        held_out: whether absent things may be of `HELD_OUT_PAIRS`.
    """
    while True:
        units = _choose_units(scene, rng)
        pieces = _sentences(scene, rng, units, held_out)
        caption = _join([text for text, _ in pieces])
        nouns = sum(unit is not None for _, unit in pieces)
        if 4 <= nouns <= 8 and len(units) >= 3 and len(caption.split()) <= MAX_WORDS:
            break
    # Articles only: which words belong to a noun must follow from the caption, or no model could
    # extract it ("two stars" or "stars" from the same sentence).
    split = [
        unit is not None and unit.determiner in _ARTICLES and rng.random() < 0.25
        for _, unit in pieces
    ]
    lower, apart = rng.random() < 0.7, rng.random() < 0.6
    return _to_narrative(caption, pieces, split, lower, apart)


def _choose_units(scene: Scene, rng: np.random.Generator) -> list[Unit]:
    target = int(rng.choice([4, 5, 6, 7, 8], p=[0.15, 0.25, 0.25, 0.20, 0.15]))
    units: list[Unit] = []
    spatial = rng.random() < 0.25  # at most one in a caption
    for _ in range(4 * target):
        if len(units) >= target:
            break
        draw = rng.random()
        if draw < 0.25:
            options = list(plural_units(scene, rng))
        elif draw < 0.52:
            region = int(rng.integers(len(scene.stuff)))
            options = [stuff_unit(scene, rng, region)]
        else:
            thing = int(rng.integers(len(scene.things)))
            options = list(singular_units(scene, rng, thing, spatial))
        # A second phrase for the same set is welcome only rarely: repeats are made on purpose.
        taken = {unit.members for unit in units}
        repeat = rng.random() < 0.06
        fresh = [u for u in options if repeat or u.members not in taken]
        if fresh:
            units.append(fresh[0])
            spatial = spatial and " the " not in fresh[0].noun
    return units


def _sentences(
    scene: Scene, rng: np.random.Generator, units: list[Unit], held_out: bool
) -> list[Piece]:
    rest = list(units)
    first = _take(rest, int(rng.integers(1, 4)))
    pieces = [*_opening(rng, first[0].plural), *_listed(first), (".", None)]
    while rest:
        pieces += _sentence(scene, rng, rest) + [(".", None)]
    extra = rng.random()
    if extra < 0.15:  # a phrase said before is a unit of its own
        again = next((u for u in units if not u.plural and u.members[0] < len(scene.things)), None)
        under = scene.region_under(again.members[0]) if again else None
        if again and under:
            said = Unit("the", again.noun, again.members)
            region = stuff_unit(scene, rng, scene.stuff.index(under))
            pieces += [(_capital(said), said), ("is on", None), (region.text, region), (".", None)]
    elif extra < 0.30:
        absent = absent_unit(scene, rng, held_out)
        pieces += [("There is", None), ("n't", None), (absent.text, absent), (".", None)]
    return pieces


def _opening(rng: np.random.Generator, plural: bool) -> list[Piece]:
    """Open the caption; "picture" is an ungrounded noun, as in the benchmark."""
    there = "there are" if plural else "there is"
    if rng.random() < 0.35:
        return [(str(rng.choice(["Here we can see", "We can see", f"Here {there}"])), None)]
    word = str(rng.choice(_PICTURE_WORDS))
    end = str(rng.choice(["we can see", "I can see", there]))
    return [("In", None), (f"this {word}", Unit("this", word, ())), (end, None)]


def _sentence(scene: Scene, rng: np.random.Generator, rest: list[Unit]) -> list[Piece]:
    first = rest[0]
    is_stuff = first.members[0] >= len(scene.things)
    if is_stuff:
        start = str(rng.choice(["In the background there is", "Behind them we can see"]))
        return [(start, None), *_listed(_take(rest, 1))]
    under = scene.region_under(first.members[0]) if not first.plural else None
    number = len(scene.things) + scene.stuff.index(under) if under else -1
    ground = next((u for u in rest[1:] if u.members == (number,)), None)
    if ground is not None and rng.random() < 0.7:
        rest.remove(first)
        rest.remove(ground)
        if rng.random() < 0.5:
            return [("There is", None), (first.text, first), ("on", None), (ground.text, ground)]
        return [(_capital(first), first), ("is on", None), (ground.text, ground)]
    start = "There are" if first.plural else "There is"
    start = str(rng.choice([start, "We can also see"]))
    return [(start, None), *_listed(_take(rest, int(rng.integers(1, 4))))]


def _take(rest: list[Unit], count: int) -> list[Unit]:
    taken = rest[:count]
    del rest[:count]
    return taken


def _listed(units: list[Unit]) -> list[Piece]:
    pieces: list[Piece] = []
    for place, unit in enumerate(units):
        if place:
            pieces.append(("and" if place == len(units) - 1 else ",", None))
        pieces.append((unit.text, unit))
    return pieces


def _capital(unit: Unit) -> str:
    return unit.text[0].upper() + unit.text[1:]


def _join(texts: list[str]) -> str:
    caption = ""
    for text in texts:
        glued = not caption or text in (",", ".", "n't")
        caption += text if glued else f" {text}"
    return caption


def _to_narrative(
    caption: str, pieces: list[Piece], split: list[Any], lower: bool, apart: bool
) -> Narrative:
    segments: list[dict[str, Any]] = []
    nouns: list[str] = []
    loose: list[str] = []  # words of the running segment without a noun

    def close() -> None:
        if loose:
            segments.append(_segment(" ".join(loose), None, lower))
            loose.clear()

    for (text, unit), detached in zip(pieces, split):
        if unit is None:
            if apart and text in (",", "."):
                close()
                segments.append(_segment(text, None, lower))
            else:
                loose.append(text)
            continue
        words = text
        if detached:
            loose.append(text[: len(unit.determiner)])
            words = text[len(unit.determiner) + 1 :]
        close()
        segments.append(_segment(words, unit, lower))
        nouns.append(words)
    close()
    return Narrative(caption, segments, nouns)


def _segment(text: str, unit: Unit | None, lower: bool) -> dict[str, Any]:
    return {
        "utterance": text.lower() if lower else text,
        "members": list(unit.members) if unit else [],
        "plural": bool(unit and unit.plural),
        "noun": unit is not None,
    }


def write_expressions(scene: Scene, rng: np.random.Generator) -> list[tuple[int, list[str]]]:
    """Write referring expressions: up to three (thing index, two or three sentences).

    Sentences use attributes, sides ("red star on the left"), the region under the thing and
    relations to another thing; each is true of the target and of no other thing.
    """
    refs = []
    for thing in rng.permutation(len(scene.things)):
        sentences = _expressions_of(scene, rng, int(thing))
        if len(sentences) >= 2:
            picked = rng.permutation(len(sentences))[: int(rng.integers(2, 4))]
            refs.append((int(thing), [sentences[i] for i in picked]))
        if len(refs) == 3:
            break
    return refs


def _expressions_of(scene: Scene, rng: np.random.Generator, target: int) -> list[str]:
    plain = [u.noun for u in singular_units(scene, rng, target, spatial=False)][:3]
    sentences = [noun if rng.random() < 0.5 else f"the {noun}" for noun in plain]
    sets = attribute_sets(scene)
    thing = scene.things[target]
    for names in (("kind",), ("colour", "kind")):
        base = tuple((name, str(getattr(thing, name))) for name in names)
        noun = attribute_noun(base, plural=False)
        for side in sides_of(scene.things, target, sets[base]):
            place = f"on the {side}" if side in ("left", "right") else f"at the {side}"
            sentences.append(f"{noun} {place}")
        under = [scene.region_under(i) for i in sets[base]]
        mine = scene.region_under(target)
        if mine and None not in under and under.count(mine) == 1:
            sentences.append(f"{noun} on the {mine}")
        sentences += _relations(scene, rng, target, sets[base], noun)
    return list(dict.fromkeys(sentences))


def _relations(
    scene: Scene, rng: np.random.Generator, target: int, rivals: tuple[int, ...], noun: str
) -> list[str]:
    """Relations to a thing that colour and kind name alone, true of the target only."""
    found = []
    for anchor in rng.permutation(len(scene.things)):
        anchor = int(anchor)
        other = scene.things[anchor]
        base = (("colour", other.colour), ("kind", other.kind))
        if anchor in rivals or len(attribute_sets(scene)[base]) > 1:
            continue
        for words, axis, sign in (
            ("left of", "cx", -1),
            ("right of", "cx", 1),
            ("above", "cy", -1),
            ("below", "cy", 1),
        ):
            gaps = {
                r: sign * (getattr(scene.things[r], axis) - getattr(other, axis)) for r in rivals
            }
            mine = gaps.pop(target)
            if mine >= _CLOSE and all(gap <= -_CLOSE for gap in gaps.values()):
                found.append(f"{noun} {words} the {attribute_noun(base, plural=False)}")
    return found[:2]

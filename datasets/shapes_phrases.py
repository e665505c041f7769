"""Noun phrases of a synthetic scene, each with exactly the things or the region that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from shapes_scene import COLOURS, HELD_OUT_PAIRS, KINDS, Scene, Thing

COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Words for a region: the noun, and a noun with an adjective.
STUFF_NOUNS = {
    "sky": ("sky", "cloudy sky"),
    "sand": ("sand", "sandy ground"),
    "grass": ("grass", "grassy field"),
    "water": ("water", "wavy water"),
    "wall": ("wall", "brick wall"),
    "floor": ("floor", "tiled floor"),
}
# How often an attribute set is chosen when it identifies its things.
_WEIGHTS = {
    ("colour", "kind"): 8.0,
    ("kind",): 2.5,
    ("colour",): 2.0,
    ("size", "kind"): 1.5,
    ("size", "colour", "kind"): 2.0,
    ("texture", "kind"): 2.0,
    ("texture", "colour", "kind"): 2.0,
    ("texture",): 0.5,
    ("size",): 0.3,
    ("size", "colour"): 0.5,
    ("texture", "colour"): 0.5,
}
_SIDES = (("left", "cx", -1), ("right", "cx", 1), ("top", "cy", -1), ("bottom", "cy", 1))
_CLEAR = 20.0  # pixels by which "on the left" has to be true

Attributes = tuple[tuple[str, str], ...]  # (("colour", "red"), ("kind", "star"))


@dataclass(frozen=True)
class Unit:
    """One noun phrase: ``determiner`` ("" if none), ``noun`` and the numbers it names.

    ``members`` are indices into the scene: things from 0, then regions from ``len(things)``; empty
    for a noun that is not in the picture.
    """

    determiner: str
    noun: str
    members: tuple[int, ...]
    plural: bool = False

    @property
    def text(self) -> str:
        """The phrase with its determiner."""
        return f"{self.determiner} {self.noun}".strip()


def kind_plural(kind: str) -> str:
    """Plural of a kind: "cross" -> "crosses"."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def article(noun: str) -> str:
    """ "a" or "an", by the first letter."""
    return "an" if noun[0] in "aeiou" else "a"


def attribute_noun(attributes: Attributes, plural: bool) -> str:
    """Words for an attribute set: (colour red, kind star) -> "red star"; without kind "thing"."""
    given = dict(attributes)
    kind = given.get("kind", "thing")
    words = [given[name] for name in ("size", "texture", "colour") if name in given]
    return " ".join([*words, kind_plural(kind) if plural else kind])


def attribute_sets(scene: Scene) -> dict[Attributes, tuple[int, ...]]:
    """Every attribute set that some thing has, with *all* things that have it, in order."""
    found: dict[Attributes, list[int]] = {}
    for index, thing in enumerate(scene.things):
        for names in _WEIGHTS:
            if "texture" in names and thing.texture == "plain":
                continue  # "plain" is not said
            attributes = tuple((name, str(getattr(thing, name))) for name in names)
            found.setdefault(attributes, []).append(index)
    return {attributes: tuple(members) for attributes, members in found.items()}


def singular_units(
    scene: Scene, rng: np.random.Generator, thing: int, spatial: bool
) -> Iterator[Unit]:
    """Yield phrases that name one thing and no other, likelier ones first (weighted shuffle).

    ``spatial`` allows "the red circle on the left" for look-alikes that nothing else tells apart.
    """
    sets = {a: m for a, m in attribute_sets(scene).items() if thing in m}
    unique = [a for a, members in sets.items() if len(members) == 1]
    for attributes in _shuffled(unique, rng):
        noun = attribute_noun(attributes, plural=False)
        yield Unit("the" if rng.random() < 0.6 else article(noun), noun, (thing,))
    if not unique and spatial:
        base = tuple((n, getattr(scene.things[thing], n)) for n in ("colour", "kind"))
        for side in sides_of(scene.things, thing, sets[base]):
            place = f"on the {side}" if side in ("left", "right") else f"at the {side}"
            yield Unit("the", f"{attribute_noun(base, False)} {place}", (thing,))


def plural_units(scene: Scene, rng: np.random.Generator) -> Iterator[Unit]:
    """Yield phrases for sets of at least two things, likelier ones first."""
    sets = attribute_sets(scene)
    for attributes in _shuffled([a for a, m in sets.items() if len(m) > 1], rng):
        members = sets[attributes]
        count = COUNT_WORDS[len(members)]
        determiner = str(rng.choice(["the", count, f"the {count}"], p=[0.4, 0.45, 0.15]))
        yield Unit(determiner, attribute_noun(attributes, plural=True), members, plural=True)


def stuff_unit(scene: Scene, rng: np.random.Generator, region: int) -> Unit:
    """A phrase for region ``region`` (0-based among the scene's stuff)."""
    noun = STUFF_NOUNS[scene.stuff[region]][int(rng.random() < 0.35)]
    return Unit("the", noun, (len(scene.things) + region,))


def absent_unit(scene: Scene, rng: np.random.Generator, held_out: bool) -> Unit:
    """A phrase for a colour and kind that no thing has: "a purple cross", without members."""
    present = {(t.colour, t.kind) for t in scene.things}
    pairs = [
        (c, k)
        for c in COLOURS
        for k in KINDS
        if (c, k) not in present and (held_out or (c, k) not in HELD_OUT_PAIRS)
    ]
    colour, kind = pairs[rng.integers(len(pairs))]
    noun = f"{colour} {kind}"
    return Unit(article(noun), noun, ())


def sides_of(things: list[Thing], target: int, rivals: tuple[int, ...]) -> list[str]:
    """Sides on which the target lies clearly beyond every other rival (by centre)."""
    sides = []
    for side, axis, sign in _SIDES:
        gaps = [
            sign * (getattr(things[target], axis) - getattr(things[r], axis))
            for r in rivals
            if r != target
        ]
        if gaps and min(gaps) >= _CLEAR:
            sides.append(side)
    return sides


def _shuffled(choices: list[Attributes], rng: np.random.Generator) -> list[Attributes]:
    """Order by weighted sampling without replacement."""
    if not choices:
        return []
    weights = np.array([_WEIGHTS[tuple(name for name, _ in a)] for a in choices])
    keys = rng.exponential(size=len(choices)) / weights
    return [choices[i] for i in np.argsort(keys, kind="stable")]

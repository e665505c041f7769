"""What is said about a synthetic scene: noun phrases, narratives, expressions, and their tokenizer.

Every noun phrase names exactly the things or the region that fit its words.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from shapes_scene import COLOURS, HELD_OUT_PAIRS, KINDS, Scene, Thing

from gella.text.prompts import (
    DESCRIBE_INSTRUCTIONS,
    EXTRACT_INSTRUCTIONS,
    SEG_TOKEN,
    noun_answer,
    panoptic_answer,
)
from gella.text.words import number_in_words, with_article

COUNT_WORDS = tuple(number_in_words(n) for n in range(10))
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
MAX_WORDS = 60  # of a narrative
_PICTURE_WORDS = ("picture", "photo", "image")
_CLOSE = 4.0  # pixels; relations closer than this are not stated

_ARTICLES = ("a", "an", "the")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
VOCABULARY_SIZE = 639  # MODEL.LANGUAGE.VOCAB_SIZE of the tiny config less one, for <SEG>
_MAX_ANSWER_NOUNS = 20  # number words that get a token of their own

Attributes = tuple[tuple[str, str], ...]  # (("colour", "red"), ("kind", "star"))
Piece = tuple[str, "Unit | None"]  # text and, for a noun, the unit it names


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
        yield Unit("the" if rng.random() < 0.6 else with_article(noun).split()[0], noun, (thing,))
    if not unique and spatial:
        yield from side_units(scene, thing, ("colour", "kind"))


def side_units(scene: Scene, thing: int, names: tuple[str, ...]) -> Iterator[Unit]:
    """Yield phrases that tell a thing from all with the same ``names`` by a side: "on the left"."""
    base = tuple((name, str(getattr(scene.things[thing], name))) for name in names)
    for side in sides_of(scene.things, thing, attribute_sets(scene)[base]):
        place = f"on the {side}" if side in ("left", "right") else f"at the {side}"
        yield Unit("the", f"{attribute_noun(base, plural=False)} {place}", (thing,))


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
    return Unit(with_article(noun).split()[0], noun, ())


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


def write_plain(scene: Scene, rng: np.random.Generator, sides: bool = False) -> Narrative:
    """Write what people type: one to three noun phrases in a list or a short sentence.

    Articles, capitals and the full stop come and go: "There are three purple rings.", "Red Square",
    "white star on the grass". Every phrase still names exactly the things that fit its words.
    With ``sides`` up to five phrases, where the scene has any, that only a side decides: "star on
    the left".
    """
    located = _side_units_of(scene, rng) if sides else []
    units = [_with_determiner(unit, rng) for unit in located or _choose_units(scene, rng)]
    single = [u for u in units if not u.plural and u.members[0] < len(scene.things)]
    placed = [(u, under) for u in single if (under := scene.region_under(u.members[0]))]
    if placed and not located and rng.random() < 0.35:
        thing, under = placed[0]
        region = stuff_unit(scene, rng, scene.stuff.index(under))
        ground = _with_determiner(region, rng)
        on = str(rng.choice(["is on", "on", "on", "lies on"]))
        pieces: list[Piece] = [(thing.text, thing), (on, None), (ground.text, ground)]
    else:
        some = units[: int(rng.integers(1, 4)) + (2 if located else 0)]
        pieces = _listed(some)
        there = "There are" if some[0].plural else "There is"
        start = str(rng.choice(["", "", there, "I see", "This is"]))
        pieces = [(start, None), *pieces] if start else pieces
    spelling = rng.random()
    if spelling < 0.15:
        pieces = [(text.title(), unit) for text, unit in pieces]
    elif spelling < 0.6:
        pieces[0] = (pieces[0][0][0].upper() + pieces[0][0][1:], pieces[0][1])
    if rng.random() < 0.5:
        pieces.append((".", None))
    caption = _join([text for text, _ in pieces])
    return _to_narrative(caption, pieces, [False] * len(pieces), lower=False, apart=True)


def _side_units_of(scene: Scene, rng: np.random.Generator) -> list[Unit]:
    found = [
        unit
        for thing in range(len(scene.things))
        for names in (("kind",), ("colour", "kind"))
        for unit in side_units(scene, thing, names)
    ]
    return [found[i] for i in rng.permutation(len(found))]


def _with_determiner(unit: Unit, rng: np.random.Generator) -> Unit:
    # Half of what people type has no article.
    bare = rng.random() < 0.5 and unit.determiner in (*_ARTICLES, "")
    return replace(unit, determiner="") if bare else unit


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
        sentences += [unit.noun for unit in side_units(scene, target, names)]
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


def template_texts() -> list[str]:
    """Texts of the prompts themselves: instructions, roles, number words and answer templates."""
    # An answer without its <SEG>, which is a token of its own and never split.
    answers = [noun_answer(["thing"] * 2), noun_answer(["thing"]), panoptic_answer(["thing"] * 3)]
    return [
        *DESCRIBE_INSTRUCTIONS,
        *(text.replace("{caption}", "") for text in EXTRACT_INSTRUCTIONS),
        "USER: ASSISTANT:",
        *(text.replace(f" {SEG_TOKEN}", "") for text in answers),
        " " + " ".join(number_in_words(n) for n in range(1, _MAX_ANSWER_NOUNS + 1)),
    ]


def train_tokenizer(captions: Sequence[str], folder: str, size: int = VOCABULARY_SIZE) -> int:
    """Train on captions and the prompts' own texts and write a folder that AutoTokenizer reads.

    Every word of the captions and of the prompts, with its leading space, becomes one token; any
    other text falls back to pieces and at worst to bytes, so every unicode text survives a round
    trip. Places that no word needs are filled with reserved tokens, so that the size is a constant.

    Args:
        captions: the training captions.
        folder: where to write; made if missing.
        size: of the vocabulary, ``MODEL.LANGUAGE.VOCAB_SIZE`` less one.

    Returns:
        The number of tokens, always `size`.

    Raises:
        ValueError: there are more words than the vocabulary has room for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Frequent words are merged first, so captions are weighed above the templates.
    templates = template_texts()
    tokenizer.train_from_iterator(_weighted_words(captions, templates), trainer)
    missing = size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<reserved_{n}>" for n in range(missing)])
    texts = (*captions, *templates)
    for word in sorted({w for text in texts for w in re.findall(r" [A-Za-z]+", text)}):
        pieces = tokenizer.encode(word).tokens
        if len(pieces) != 1:
            raise ValueError(
                f"the word '{word}' takes {len(pieces)} tokens; captions and prompts have more "
                f"words than a vocabulary of {size} has room for: raise it with "
                "MODEL.LANGUAGE.VOCAB_SIZE"
            )
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    _write_settings(folder)
    return tokenizer.get_vocab_size()


def _weighted_words(captions: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Words with their leading space, caption words repeated so that their merges come first."""
    pattern = re.compile(r" ?[A-Za-z]+|'t| ?[^A-Za-z\s]+|\s+")
    seen = dict.fromkeys(w for text in captions for w in pattern.findall(text))
    also = dict.fromkeys(w for text in templates for w in pattern.findall(text))
    often = [word for word in seen for _ in range(100)]
    return often + [word for word in also for _ in range(10)]


def _write_settings(folder: str) -> None:
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "model_max_length": 2048,
        **names,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=1)
    with open(os.path.join(folder, "special_tokens_map.json"), "w", encoding="utf-8") as file:
        json.dump(names, file, indent=1)

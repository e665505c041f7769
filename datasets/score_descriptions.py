#!/usr/bin/env python
"""Score a model's descriptions of held-out scenes, whose truth is known down to the colours.

    python datasets/score_descriptions.py [--config-file weights/gella_tiny_shapes/config.yaml]

The scenes are drawn anew, described, and every noun phrase of the text is looked up in its scene:

    things    "a red star", "the large ring": right if some thing has all that is said of it
    named     those of them with colour and kind: what a description is read for
    counts    "three rings": right if exactly so many things fit
    grounds   "the sand", "a grassy field": right if the scene has that ground
    invented  thing phrases that no thing fits, in percent of all
    covered   things and grounds of the scenes that some right phrase names

A phrase behind "isn't" is left out: it says what is not there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import shapes
from shapes_scene import COLOURS, KINDS, SIZES, TEXTURES, Scene
from shapes_text import COUNT_WORDS, STUFF_NOUNS, kind_plural
from tqdm import tqdm

from gella import GellaPredictor
from gella.utils.io import write_json

_PLURALS = {kind_plural(kind): kind for kind in (*KINDS, "thing")}
_ATTRIBUTES = {
    word: name
    for name, words in (("size", SIZES), ("texture", TEXTURES[1:]), ("colour", COLOURS))
    for word in words
}
_GROUNDS = {noun.split()[-1]: kind for kind, nouns in STUFF_NOUNS.items() for noun in nouns}


def score_text(text: str, scene: Scene) -> Counter:
    """Count the phrases of one description: ``{figure: right}`` and ``{figure of: all}``."""
    counts: Counter = Counter()
    named: set[int] = set()
    said: dict[str, str] = {}  # attributes in front of the noun under way
    number, denied = 0, False
    for word in re.findall(r"[a-z]+(?:'t)?|\.", text.lower()):
        if word in _ATTRIBUTES:
            said[_ATTRIBUTES[word]] = word
            continue
        if word in COUNT_WORDS:
            number = COUNT_WORDS.index(word)
            continue
        kind = _PLURALS.get(word, word)
        if kind in (*KINDS, "thing") and not denied:
            wanted = said if kind == "thing" else {**said, "kind": kind}
            fits = {i for i, thing in enumerate(scene.things) if thing.has(**wanted)}
            named |= fits
            figures = ["things"] + ["named"] * ("colour" in said and kind != "thing")
            for figure in figures:
                counts.update({figure: bool(fits), f"{figure} of": 1})
            if number:
                counts.update({"counts": len(fits) == number, "counts of": 1})
            counts.update({"invented": not fits, "invented of": 1})
        elif word in _GROUNDS and not denied:
            right = _GROUNDS[word] in scene.stuff
            counts.update({"grounds": right, "grounds of": 1})
            if right:
                named.add(len(scene.things) + scene.stuff.index(_GROUNDS[word]))
        if word not in ("a", "an", "the"):
            said, number = {}, 0
            denied = word.endswith("n't") or (denied and word != ".")
    counts.update({"covered": len(named), "covered of": len(scene.things) + len(scene.stuff)})
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    predictor = GellaPredictor.from_config(args.config_file, args.weights)
    counts: Counter = Counter()
    for index in tqdm(range(args.num), desc="describing", unit="scene", disable=None):
        sample = shapes.make_sample(args.seed, "val", index)
        predictor.set_image(sample.image_array, sample.scene.ids)
        text = predictor.describe()
        counts.update(score_text(text, sample.scene))
        if index < args.show:
            tqdm.write(f"{sample.image['file_name']}: {text}")
    figures = [name for name in counts if f"{name} of" in counts]
    scores = {name: 100 * counts[name] / counts[f"{name} of"] for name in figures}
    for name, score in scores.items():
        print(f"{name:<9}{score:6.1f} %  of {counts[f'{name} of']}")
    if args.json is not None:
        write_json(args.json, {**scores, **{f"n_{n}": counts[f"{n} of"] for n in figures}})
        print(f"wrote {args.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    config = "weights/gella_tiny_shapes/config.yaml"
    parser.add_argument("--config-file", default=config, help=f"of the model (default {config})")
    parser.add_argument("--weights", help="checkpoint file instead of the config's")
    parser.add_argument("--num", type=int, default=200, help="held-out scenes (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the dataset (default 0)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N texts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

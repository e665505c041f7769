#!/usr/bin/env python
"""Draw six little pictures with id masks and captions, to stand in for your own.

    python examples/own_dataset/make_images.py        # --help: where to write

Writes below the output folder: images/*.png, masks/*.png (grey, pixel value = segment id),
train.json and val.json, and a tokenizer of the captions' words.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[2] / "datasets"))

from shapes_text import train_tokenizer  # noqa: E402

from gella.data.register import root_from_environment  # noqa: E402

WIDTH, HEIGHT = 64, 48
COLORS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (40, 90, 214)}
SHAPES = ("box", "ball")
# What is in each picture: (color, shape) pairs, left to right. The last two are held out.
SCENES = (
    [("red", "box"), ("blue", "ball")],
    [("green", "ball"), ("green", "ball"), ("red", "ball")],
    [("blue", "box"), ("green", "box")],
    [("red", "ball"), ("red", "ball"), ("blue", "box")],
    [("blue", "ball"), ("red", "box")],
    [("green", "box"), ("green", "box"), ("red", "ball")],
)
FLOOR = 1  # segment id of the floor; things count on from it


def draw(things: list[tuple[str, str]]) -> tuple[Image.Image, Image.Image]:
    """One picture (RGB) and its id masks (grey)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (200, 190, 170))
    masks = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).rectangle((0, 30, WIDTH, HEIGHT), fill=(120, 110, 100))
    ImageDraw.Draw(masks).rectangle((0, 30, WIDTH, HEIGHT), fill=FLOOR)
    step = WIDTH // len(things)
    for place, (color, shape) in enumerate(things):
        box = (place * step + 3, 14, place * step + step - 4, 40)
        for picture, fill in ((image, COLORS[color]), (masks, FLOOR + 1 + place)):
            pen = ImageDraw.Draw(picture)
            (pen.rectangle if shape == "box" else pen.ellipse)(box, fill=fill)
    return image, masks


def describe(things: list[tuple[str, str]]) -> tuple[str, list[tuple[str, list[int]]]]:
    """A caption, and its nouns in order with the ids of the segments that they name."""
    members: dict[tuple[str, str], list[int]] = {}
    for place, thing in enumerate(things):
        members.setdefault(thing, []).append(FLOOR + 1 + place)
    nouns = []
    for (color, shape), ids in members.items():
        noun = f"two {color} {shape}{'es' if shape == 'box' else 's'}" if len(ids) > 1 else None
        nouns.append((noun or f"a {color} {shape}", ids))
    caption = "There is " + " and ".join(text for text, _ in nouns) + " on the floor."
    return caption, [*nouns, ("the floor", [FLOOR])]


def main() -> None:
    """Draw and write everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(root_from_environment()) / "own_dataset"
    parser.add_argument("--output", type=Path, default=default, help=f"default: {default}")
    root = parser.parse_args().output
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    entries = []
    for number, things in enumerate(SCENES):
        image, masks = draw(things)
        names = {"image": f"images/{number}.png", "masks": f"masks/{number}.png"}
        noise = np.random.default_rng(number).integers(-8, 9, (HEIGHT, WIDTH, 3))
        grainy = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(root / names["image"])
        masks.save(root / names["masks"])
        caption, nouns = describe(things)
        words = {"caption": caption, "nouns": nouns}
        entries.append({**names, "height": HEIGHT, "width": WIDTH, **words})
    for split, part in (("train", entries[:4]), ("val", entries[4:])):
        (root / f"{split}.json").write_text(json.dumps(part, indent=1), encoding="utf-8")
    train_tokenizer([entry["caption"] for entry in entries], str(root / "tokenizer"))
    print(f"wrote {len(entries)} pictures to {root}")
    here = Path(__file__).absolute().parent
    tool, config = here.parents[1] / "tools/train_net.py", here / "own_dataset.yaml"
    print(f"next: python {os.path.relpath(tool)} --config-file {os.path.relpath(config)}")


if __name__ == "__main__":
    main()

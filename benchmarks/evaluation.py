"""Speed of evaluation: panoptic quality, average recall, and all nouns of a caption in one pass.

    python tools/benchmark.py eval                         scenes made on the spot
    python tools/benchmark.py eval --json eval.json --nouns 12
    python tools/benchmark.py eval --panoptic-json datasets/coco/annotations/panoptic_val2017.json

Panoptic quality is timed from files, by the processor time of one thread, beside decoding the same
PNGs and, where panopticapi is importable, beside panopticapi, with which it must agree. The
language model has random weights, which changes no time.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import picture_size
from nouns import compare_passes
from scoring import compare_panoptic, made_pairs, pairs_of, time_recall
from tabulate import tabulate

from gella.utils.io import write_json

DECODINGS, TIMES_FASTER, SECONDS, PASSES = 1.5, 1.5, 1.0, 6.0  # what is asked, see `rules`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to a parser."""
    add = parser.add_argument
    add("--panoptic-json", metavar="FILE", help="truth in COCO's form; default: made scenes")
    add("--images", type=int, default=24, metavar="N", help="images to score (default 24)")
    add("--size", default="640x480", metavar="WxH", help="of made scenes (default 640x480)")
    add("--segments", type=int, default=20, metavar="N", help="of made scenes (default 20)")
    add("--recall-nouns", type=int, default=100_000, metavar="N", help="for AR (default 100000)")
    add("--nouns", type=int, default=12, metavar="N", help="of the caption (default 12)")
    add("--grid", type=int, default=24, metavar="N", help="image tokens a side (default 24)")
    add("--layers", type=int, default=8, metavar="N", help="of the language model (default 8)")
    add("--width", type=int, default=768, metavar="N", help="a multiple of 64 (default 768)")
    add("--vocabulary", type=int, default=32_001, metavar="N", help="its words (default 32001)")
    add("--repeat", type=int, default=5, metavar="N", help="passes; medians count (default 5)")
    add("--json", metavar="FILE", help="write the figures there too")


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for numbers that nothing can be measured with, naming the option."""
    least = {"images": 1, "segments": 1, "recall_nouns": 1, "nouns": 1, "grid": 1}
    least.update(layers=1, width=64, vocabulary=640, repeat=1)
    for name, number in least.items():
        if getattr(args, name) < number:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(args, name)}; give at least {number}")
    if args.width % 64:
        raise ValueError(f"--width is {args.width}; give a multiple of 64, the width of a head")


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of evaluation, why, and whether this run met it (None: not measured)."""
    panoptic, nouns = figures["panoptic"], figures["nouns"]
    asked = [
        (
            "decoding and panoptic quality, in decodings alone",
            panoptic["decodings"],
            DECODINGS,
            "pixels are counted by runs of equal pairs, of which there are few",
        ),
        (
            "panoptic quality of decoded images, times faster than panopticapi",
            panoptic["count_faster"],
            TIMES_FASTER,
            "one pass for both areas and overlaps, and no sorting of pixels",
        ),
        (
            "decoding and panoptic quality, times faster than panopticapi",
            panoptic["total_faster"],
            TIMES_FASTER,
            "the rest is decoding, which libpng does a fifth quicker than Pillow and no more",
        ),
        (
            f"average recall of {figures['recall_nouns']:,} nouns, seconds",
            max(figures["recall_s"].values()),
            SECONDS,
            "thresholds up to an IoU are found by bisection, not one by one",
        ),
        (
            f"{nouns['nouns']} given nouns in one pass, times faster than a pass each",
            nouns["times_faster"],
            PASSES,
            "the image and the caption are read once, not once per noun",
        ),
    ]
    return [
        {
            "name": name,
            "value": value,
            "limit": limit,
            "met": None if value is None else bool(_passes(name, value, limit)),
            "why": why,
        }
        for name, value, limit, why in asked
    ]


def _passes(name: str, value: float, limit: float) -> bool:
    return value >= limit if "faster" in name else value <= limit


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; ValueError or OSError for wrong arguments."""
    check_arguments(args)
    if args.panoptic_json:
        pairs = pairs_of(args.panoptic_json, folder, args.images)
    else:
        pairs = made_pairs(folder, args.images, picture_size(args.size), args.segments)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {platform.system()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads",
        "of": args.panoptic_json or f"made scenes, {args.size}",
        "panoptic": compare_panoptic(pairs, args.repeat),
        "recall_nouns": args.recall_nouns,
        "recall_s": time_recall(args.recall_nouns, args.repeat),
        "nouns": compare_passes(
            folder / "tokenizer",
            nouns=args.nouns,
            side=args.grid,
            layers=args.layers,
            width=args.width,
            vocabulary=args.vocabulary,
            repeat=args.repeat,
        ),
    }
    return {**figures, "rules": rules(figures)}


def report(figures: dict[str, Any]) -> str:
    """The printed tables and verdicts."""
    panoptic, nouns = figures["panoptic"], figures["nouns"]
    rows = [
        (name, *(_ms(panoptic[key]) for key in keys))
        for name, *keys in (
            ("decoding truth and prediction", "decode_ms"),
            ("panoptic quality of decoded images", "count_ms", "reference_count_ms"),
            ("decoding and panoptic quality", "total_ms", "reference_total_ms"),
        )
    ]
    parts = [
        f"{figures['of']}: {panoptic['images']} images, {panoptic['segments']:.1f} segments each",
        figures["machine"],
        tabulate(
            rows,
            ["per image, one thread", "ours, ms", "panopticapi, ms"],
            colalign=("left", "right", "right"),
            disable_numparse=True,
        ),
        tabulate(
            list(figures["recall_s"].items()),
            [f"AR of {figures['recall_nouns']:,} nouns, protocol", "seconds"],
            floatfmt=".4f",
        ),
        tabulate(
            [
                ("one pass", nouns["one_pass_tokens"], nouns["one_pass_s"]),
                ("a pass per noun", nouns["per_noun_tokens"], nouns["per_noun_s"]),
            ],
            [f"{nouns['nouns']} nouns, {nouns['parameters']:,} parameters", "tokens", "seconds"],
            floatfmt=".3f",
        ),
    ]
    for rule in figures["rules"]:
        sign = ">=" if "faster" in rule["name"] else "<="
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[rule["met"]]
        value = "-" if rule["value"] is None else f"{rule['value']:.2f}"
        line = f"{rule['name']}: {value} (asked: {sign} {rule['limit']:g}, {verdict})"
        parts.append(f"{line}\n    because: {rule['why']}")
    return "\n\n".join(parts)


def _ms(value: float | None) -> str:
    return "not importable" if value is None else f"{value:.2f}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write ``--json``; the figures. Wrong arguments: ValueError, OSError."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    print(report(figures))
    if args.json:
        write_json(args.json, figures)
        print(f"\nwrote {args.json}")
    print("\nnext: python tools/train_net.py --eval-only --config-file YAML MODEL.WEIGHTS FILE")
    return figures

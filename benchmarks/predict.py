"""What encoding a picture once saves, and what questions about several pictures at once save.

    python tools/benchmark.py predict --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py predict --config-file YAML --weights FILE --json predict.json

Captions of synthetic scenes are grounded with given nouns: all on one ``set_image`` against a
``set_image`` each, and pictures in one batch against one by one. Weights change no time and may be
random; without the config's tokenizer one is trained on these captions. Seconds are processor time
of one thread on the CPU (``--threads``), and by the clock on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from shapes import make_sample
from shapes_text import train_tokenizer, write_narrative
from tabulate import tabulate
from tqdm import tqdm

from gella import EntityMap, GellaPredictor, Request
from gella.config import load_config
from gella.data.register import import_modules
from gella.utils.io import write_json

SHARE, BATCH_SHARE = 0.5, 1.0  # what is asked, see `rules`
TOLERANCE = 0.02  # of scores, which half precision rounds
LEAST = {"captions": 2, "images": 2, "size": 64, "repeat": 1, "threads": 1}  # of the options


class Case(NamedTuple):
    """A picture, its entities, and captions about it with their nouns."""

    image: np.ndarray
    entities: EntityMap
    captions: list[tuple[str, list[str]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to a parser."""
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML")
    add("--weights", default="", metavar="FILE", help="checkpoint; default: random weights")
    add("--captions", type=int, default=20, metavar="N", help="of one picture (default 20)")
    add("--images", type=int, default=16, metavar="N", help="of one batch (default 16)")
    add("--size", type=int, default=96, metavar="N", help="side of the pictures (default 96)")
    add("--repeat", type=int, default=5, metavar="N", help="turns; medians count (default 5)")
    add("--threads", type=int, default=1, metavar="N", help="of torch (default 1)")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config")


def made_cases(images: int, captions: int, size: int) -> list[Case]:
    """Scenes of the synthetic shapes: the first with so many captions, the others with one."""
    cases = []
    for index in range(images):
        sample = make_sample(0, "val", index, size)
        texts = []
        for number in range(captions if index == 0 else 1):
            rng = np.random.default_rng((index, number))
            narrative = write_narrative(sample.scene, rng, held_out=True)
            texts.append((narrative.caption, narrative.nouns))
        entities = EntityMap.from_id_image(sample.id_map, sample.segment_ids)
        cases.append(Case(sample.image_array, entities, texts))
    return cases


def load_predictor(args: argparse.Namespace, cases: list[Case], folder: Path) -> GellaPredictor:
    """The predictor of the config, with a tokenizer of these captions where it has none."""
    cfg = load_config(args.config_file, args.opts)
    import_modules(cfg)
    cfg.MODEL.WEIGHTS = args.weights
    if not args.weights and not Path(cfg.MODEL.LANGUAGE.TOKENIZER).expanduser().is_dir():
        train_tokenizer([text for case in cases for text, _ in case.captions], str(folder))
        cfg.MODEL.LANGUAGE.TOKENIZER = str(folder)
    return GellaPredictor(cfg, config_file=args.config_file)


def ways(predictor: GellaPredictor, cases: list[Case]) -> dict[str, Callable[[], list[Any]]]:
    """What is timed; each gives its results."""
    first = cases[0]
    requests = [
        Request("ground", case.image, case.entities, *case.captions[0], image_id=number)
        for number, case in enumerate(cases)
    ]

    def captions(separate: bool) -> list[Any]:
        results = []
        for number, caption in enumerate(first.captions):
            if separate or number == 0:
                predictor.set_image(first.image, first.entities, image_id=0)
            results.append(predictor.ground(*caption))
        return results

    return {
        "separate": lambda: captions(True),
        "shared": lambda: captions(False),
        "single": lambda: [predictor.predict_many([request])[0] for request in requests],
        "batch": lambda: list(predictor.predict_many(requests, batch_size=len(requests))),
    }


def time_ways(
    functions: dict[str, Callable[[], list[Any]]], repeat: int, device: str
) -> dict[str, float]:
    """Median seconds of each way; they take turns, so that a busy machine slows all of them.

    Raises:
        ValueError: two ways that must agree do not.
    """
    results = {name: function() for name, function in functions.items()}  # also warms up
    failed = [one for found in results.values() for one in found if isinstance(one, Exception)]
    if failed:
        raise failed[0]
    for pair in (("separate", "shared"), ("single", "batch")):
        # Of near ties, which random weights give many of, the entities may change places.
        scores = [
            [phrase["scores"][0] for found in results[name] for phrase in found.phrases]
            for name in pair
        ]
        if not np.allclose(*scores, rtol=0, atol=TOLERANCE):
            raise ValueError(f"{pair[0]} and {pair[1]} calls gave different scores")
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in tqdm(range(repeat), "turns", leave=False):
        for name, function in functions.items():
            start = clock()
            function()
            if on_gpu:
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of the predictor, why, and whether this run met it."""
    seconds, captions, images = figures["seconds"], figures["captions"], figures["images"]
    asked = [
        (
            f"{captions} captions on one set_image, in {captions} separate calls",
            seconds["shared"] / seconds["separate"],
            SHARE,
            "the vision side and the keys and values of the image tokens are computed once",
        ),
        (
            f"a batch of {images} pictures, in {images} single ones",
            seconds["batch"] / seconds["single"],
            BATCH_SHARE,
            "one pass through each part instead of one per picture",
        ),
    ]
    return [
        {"name": name, "value": value, "limit": limit, "met": value <= limit, "why": why}
        for name, value, limit, why in asked
    ]


def report(figures: dict[str, Any]) -> str:
    """The printed table and verdicts."""
    seconds, captions, images = figures["seconds"], figures["captions"], figures["images"]
    rows = [
        (f"{captions} captions, set_image for each", seconds["separate"], captions),
        (f"{captions} captions, one set_image", seconds["shared"], captions),
        (f"{images} pictures one by one", seconds["single"], images),
        (f"{images} pictures in one batch", seconds["batch"], images),
    ]
    table = tabulate(
        [(name, f"{value:.3f}", f"{1000 * value / count:.1f}") for name, value, count in rows],
        ["", "seconds", "ms each"],
        colalign=("left", "right", "right"),
        disable_numparse=True,
    )
    parts = [f"{figures['of']}\n{figures['machine']}", table]
    for rule in figures["rules"]:
        verdict = "met" if rule["met"] else "NOT MET"
        line = f"{rule['name']}: {rule['value']:.2f} (asked: <= {rule['limit']:g}, {verdict})"
        parts.append(f"{line}\n    because: {rule['why']}")
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write ``--json``; the figures. Wrong arguments: ValueError, OSError."""
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; give at least {least}")
    before = torch.get_num_threads()  # given back: the tests' process goes on with its own
    torch.set_num_threads(args.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cases = made_cases(args.images, args.captions, args.size)
            predictor = load_predictor(args, cases, Path(folder))
            device = predictor.cfg.MODEL.DEVICE
            seconds = time_ways(ways(predictor, cases), args.repeat, device)
    finally:
        torch.set_num_threads(before)
    figures: dict[str, Any] = {
        "of": f"{args.config_file}, {args.weights or 'random weights'}, {args.size}x{args.size}",
        "machine": f"{platform.machine()}, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__} on {device}, "
        f"{args.threads} threads",
        "captions": args.captions,
        "images": args.images,
        "seconds": seconds,
    }
    figures["rules"] = rules(figures)
    print(report(figures))
    if args.json:
        write_json(args.json, figures)
        print(f"\nwrote {args.json}")
    print("\nnext: python tools/demo.py --help")
    return figures

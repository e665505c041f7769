"""What encoding a picture once saves, and what questions about several pictures at once save.

    python tools/benchmark.py predict --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py predict --config-file YAML --weights FILE --json predict.json
    python tools/benchmark.py predict --config-file YAML --large 6000x4000 --entities 157
    python tools/benchmark.py predict --config-file YAML --nouns 1,10,40,60 --plot nouns.png

Captions of synthetic scenes are grounded with given nouns: all on one ``set_image`` against a
``set_image`` each, and pictures in one batch against one by one. Weights change no time and may be
random; without the config's tokenizer one is trained on these captions. Seconds are processor time
of one thread on the CPU (``--threads``), and by the clock on a GPU.

``--large`` measures one picture instead: what ``set_image`` and ``ground`` take of a JPEG and a
file of COCO results whose masks, a fourth of them in another, are spread over it at random.
``--nouns`` asks an encoded picture for so many nouns, all in one pass and in a pass per noun.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from loading import memory
from matplotlib.figure import Figure
from measuring import OPTS, judge, machine, take_turns, threads, with_verdicts
from PIL import Image
from pycocotools import mask as coco_mask
from scenes import picture_size
from shapes import make_sample
from shapes_scene import COLOURS, KINDS
from shapes_text import train_tokenizer, write_narrative
from tabulate import tabulate
from tqdm import tqdm

from gella import EntityMap, GellaPredictor, Request
from gella.commands.inputs import config_of

NUMBERS = {
    "captions": (20, 2, "of one picture"),
    "images": (16, 2, "of one batch"),
    "size": (96, 64, "side of the pictures"),
    "repeat": (5, 1, "turns; medians count"),
    "threads": (1, 1, "of torch"),
    "entities": (157, 1, "of the large picture"),
}
OPTIONS = {
    "--config-file": {"required": True, "metavar": "YAML"},
    "--weights": {"default": "", "metavar": "FILE", "help": "checkpoint; default: random weights"},
    "--large": {"metavar": "WxH", "help": "measure one picture of this size instead"},
    "--nouns": {"metavar": "N,N", "help": "one pass against a pass per noun instead"},
    "--plot": {"metavar": "PNG", "help": "of --nouns"},
    "--opts": OPTS,
}
NEXT = "python tools/demo.py --help"
SHARE, BATCH_SHARE = 0.5, 1.0  # what is asked, see `rules`
TOLERANCE = 0.02  # of scores, which half precision rounds


class Case(NamedTuple):
    """A picture, its entities, and captions about it with their nouns."""

    image: np.ndarray
    entities: EntityMap
    captions: list[tuple[str, list[str]]]


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


def ways(predictor: GellaPredictor, cases: list[Case]) -> dict[str, Callable[[], list[Any]]]:
    """What is timed; each gives its results: "separate" and "shared" ground all captions of the
    first picture, with a ``set_image`` each and with one; "single" and "batch" one caption of every
    picture, one by one and together."""
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
    """Median seconds of each way; ValueError if two ways that must agree do not."""
    results = {name: function() for name, function in functions.items()}  # also warms up
    failed = [one for given in results.values() for one in given if isinstance(one, Exception)]
    if failed:
        raise failed[0]
    for pair in (("separate", "shared"), ("single", "batch")):
        # Of near ties, which random weights give many of, the entities may change places.
        scores = [
            [phrase["scores"][0] for result in results[name] for phrase in result.phrases]
            for name in pair
        ]
        if not np.allclose(*scores, rtol=0, atol=TOLERANCE):
            raise ValueError(f"{pair[0]} and {pair[1]} calls gave different scores")
    on_gpu = device.startswith("cuda")

    def finish(function: Callable[[], list[Any]]) -> None:
        function()
        if on_gpu:
            torch.cuda.synchronize()

    clock = time.perf_counter if on_gpu else time.process_time
    tasks = {name: (finish, [function]) for name, function in functions.items()}
    return take_turns(tasks, repeat, clock, warm=False)


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of the predictor, why, and whether this run met it."""
    seconds, captions, images = figures["seconds"], figures["captions"], figures["images"]
    one = f"{captions} captions on one set_image, in {captions} separate calls"
    batch = f"a batch of {images} pictures, in {images} single ones"
    shares = seconds["shared"] / seconds["separate"], seconds["batch"] / seconds["single"]
    kept = "the vision side and the keys and values of the image tokens are computed once"
    together = "one pass through each part instead of one per picture"
    return judge([(one, shares[0], SHARE, kept), (batch, shares[1], BATCH_SHARE, together)])


def write_large(folder: Path, size: tuple[int, int], entities: int) -> tuple[Path, Path]:
    """A JPEG of (width, height) and COCO results for it: ragged discs, every fourth in another."""
    rng, turn = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 200, endpoint=False)
    picture, masks, results = folder / "large.jpg", folder / "large.json", []
    coarse, middle, radius = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), np.zeros(2), 0.0
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(picture)
    for number in range(entities):
        if number % 4 == 3:
            middle, radius = middle + radius * rng.uniform(-0.3, 0.3, 2), 0.4 * radius
        else:
            middle, radius = rng.uniform(0, size), max(size) * rng.uniform(0.01, 0.1)
        radii = radius * rng.uniform(0.95, 1.05, len(turn))
        points = middle + radii[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        (code,) = coco_mask.frPyObjects([points.ravel().tolist()], size[1], size[0])
        code["counts"] = code["counts"].decode("ascii")
        results.append({"image_id": "large", "segmentation": code, "score": float(rng.random())})
    masks.write_text(json.dumps(results))
    return picture, masks


def run_large(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Seconds and memory of one large picture."""
    with threads(args.threads), tempfile.TemporaryDirectory() as folder:
        files = write_large(Path(folder), picture_size(args.large), args.entities)
        predictor = GellaPredictor.from_config(args.config_file, args.weights or None)
        before, start = memory("status", "VmRSS"), time.process_time()
        scene = predictor.set_image(*files)
        encoded = time.process_time()
        predictor.ground("There is the sand and a red circle.", ["the sand", "a red circle"])
        seconds = {"set_image": encoded - start, "ground": time.process_time() - encoded}
    gib = {"before": before / 2**30, "most": memory("status", "VmHWM") / 2**30}
    figures = {"entities": scene.entities.num_entities, "seconds": seconds, "gib": gib}
    lines = [f"{args.large}, {figures['entities']} entities\n{machine(predictor.cfg.MODEL.DEVICE)}"]
    lines += [f"{name:9} {value:.2f} s" for name, value in seconds.items()]
    told = f"memory    {gib['most']:.2f} GiB at most, {gib['before']:.2f} GiB before set_image"
    return figures, "\n".join([*lines, told])


def run_nouns(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Seconds of all nouns in one pass and of a pass per noun, by their number."""
    sizes = ("large", "small")
    names = [f"the {' '.join(words)}" for words in itertools.product(sizes, COLOURS, KINDS)]
    counts = sorted(map(int, args.nouns.split(",")))
    if not 0 < counts[0] <= counts[-1] <= len(names):
        raise ValueError(f"--nouns {args.nouns}: give numbers from 1 to {len(names)}")
    (case,) = made_cases(1, 1, args.size)
    with threads(args.threads):
        predictor = GellaPredictor.from_config(
            args.config_file, args.weights or None, opts=args.opts
        )
        predictor.set_image(case.image, case.entities)
        tasks: dict[str, Any] = {
            "one pass": lambda n: predictor.ground(", ".join(names[:n]), names[:n]),
            "a pass per noun": lambda n: [predictor.ground(name, [name]) for name in names[:n]],
        }
        device = predictor.cfg.MODEL.DEVICE
        rows = [
            {"nouns": n, **take_turns({w: (f, [n]) for w, f in tasks.items()}, args.repeat)}
            for n in tqdm(counts, leave=False)
        ]
    if args.plot:
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        for way in tasks:
            axes.plot(counts, [row[way] for row in rows], marker="o", label=way)
        axes.set(xlabel="nouns of one caption", ylabel="seconds", title=args.config_file)
        axes.legend()
        figure.savefig(args.plot)
    table = tabulate(rows, headers="keys", floatfmt=".3f")
    return {"rows": rows}, f"{args.config_file}\n{machine(device)}\n\n{table}"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print. ValueError, OSError for wrong arguments."""
    if args.large or args.nouns:
        return run_large(args) if args.large else run_nouns(args)
    images, captions = args.images, args.captions
    with threads(args.threads), tempfile.TemporaryDirectory() as folder:
        cases = made_cases(images, captions, args.size)
        cfg = config_of(args.config_file, args.opts)
        cfg.MODEL.WEIGHTS = args.weights
        if not args.weights and not Path(cfg.MODEL.LANGUAGE.TOKENIZER).expanduser().is_dir():
            train_tokenizer([text for case in cases for text, _ in case.captions], folder)
            cfg.MODEL.LANGUAGE.TOKENIZER = folder
        predictor = GellaPredictor(cfg, config_file=args.config_file)
        device = predictor.cfg.MODEL.DEVICE
        seconds = time_ways(ways(predictor, cases), args.repeat, device)
        of = f"{args.config_file}, {args.weights or 'random weights'}, {args.size}x{args.size}"
        figures: dict[str, Any] = {"of": of, "machine": machine(device)}
    figures.update(captions=captions, images=images, seconds=seconds)
    figures["rules"] = rules(figures)
    rows = [
        (f"{captions} captions, set_image for each", "separate", captions),
        (f"{captions} captions, one set_image", "shared", captions),
        (f"{images} pictures one by one", "single", images),
        (f"{images} pictures in one batch", "batch", images),
    ]
    table = tabulate(
        [(name, seconds[way], 1000 * seconds[way] / count) for name, way, count in rows],
        ["", "seconds", "ms each"],
        floatfmt=("", ".3f", ".1f"),
    )
    return figures, with_verdicts([f"{of}\n{figures['machine']}", table], figures["rules"])

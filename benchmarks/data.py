"""Speed of the data path: the mapper, the loader, and the colormap against the plain way.

    python tools/benchmark.py data                                   scenes made on the spot
    python tools/benchmark.py data --json data.json --segments 50
    python tools/benchmark.py data --dataset gella_shapes_png_train \\
        --config-file configs/gella_tiny_shapes.yaml

All but the loader runs in one thread, and is timed by the processor time of that thread. Times are
medians over different pictures, as training meets them; "in cache" is one picture again and again.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from colormap import compare_colormaps, compare_encoding
from detectron2.config import get_cfg
from scenes import id_image, write_scenes
from stages import STAGES, Steps, loader_speed
from tabulate import tabulate
from tqdm import tqdm

from gella import add_gella_config, load_config
from gella.data.mapper import GroundingMapper
from gella.data.register import import_modules
from gella.engine.trainer import load_records
from gella.text.prompts import TASKS
from gella.utils.io import write_json

STREAM = 48  # id maps of 640 x 480; with their colormaps more than a processor's cache
TIMES_FASTER, COPIES = 3.0, 3.0  # what is asked of the colormap, see `rules`
WAYS = {"": "", "_warm": ", in cache", "_checked": ", checked"}  # readings of "encoding"
KINDS = ("encode", "copy", "copies")
ENCODING = [kind + way for way in WAYS for kind in KINDS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to a parser."""
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="a registered dataset; default: scenes made on the spot")
    add("--config-file", metavar="YAML", help="sizes and tokenizer; default: the paper's sizes")
    add("--images", type=int, default=16, metavar="N", help="pictures to map (default 16)")
    add("--size", default="640x480", metavar="WxH", help="of made scenes (default 640x480)")
    add("--segments", type=int, default=20, metavar="N", help="of made scenes (default 20)")
    add("--workers", type=int, nargs="*", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--seconds", type=float, default=5.0, metavar="S", help="per loader (default 5)")
    add("--repeat", type=int, default=5, metavar="N", help="passes over the pictures (default 5)")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config")


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Any, Sequence[dict[str, Any]]]:
    """Config and at most ``--images`` records; ValueError or OSError for wrong arguments."""
    if args.images < 2 or args.repeat < 1 or args.segments < 1 or min(args.workers, default=0) < 0:
        raise ValueError(
            "--images must be at least 2, --repeat and --segments 1, --workers 0; got "
            f"{args.images}, {args.repeat}, {args.segments}, {args.workers}"
        )
    width, height = picture_size(args.size)
    if args.config_file:
        cfg = load_config(args.config_file, args.opts)
    else:
        cfg = get_cfg()
        add_gella_config(cfg)
        cfg.SOLVER.IMS_PER_BATCH = 8
        cfg.merge_from_list(args.opts)
    import_modules(cfg)
    cfg.SEED = max(cfg.SEED, 0)
    if args.dataset:
        if not args.config_file:
            raise ValueError("--dataset needs --config-file, for its tokenizer and sizes")
        cfg.DATASETS.TRAIN = (args.dataset,)
        records = load_records(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", cfg)[: args.images]
    else:
        cfg.DATASETS.TRAIN = ()
        records, tokenizer = write_scenes(folder, args.images, height, width, args.segments)
        cfg.MODEL.LANGUAGE.TOKENIZER = tokenizer
    able = [any(task in record["tasks"] for record in records) for task in TASKS]
    shares = [ratio * can for ratio, can in zip(cfg.DATALOADER.TASK_RATIOS, able)]
    cfg.DATALOADER.TASK_RATIOS = shares if sum(shares) else [float(can) for can in able]
    return cfg, records


def picture_size(text: str) -> tuple[int, int]:
    """ "640x480" -> (640, 480), width first; ValueError for anything else."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 16:
        raise ValueError(f"--size is {text!r}: give width x height, at least 16 each, as 640x480")
    return width, height


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of the colormap path, why, and whether this run met it."""
    asked = [
        (
            f"colormap and targets, {side} pixels, times faster than the quicker plain way",
            times["times_faster"],
            TIMES_FASTER,
            "one pass over runs instead of one over all pixels for each segment",
        )
        for side, times in figures["colormap_ms"].items()
    ]
    # Making an EntityMap checks its numbers, once, when a mask file is read: that is printed beside
    # these and is no encoding. Both states of the cache are judged, so that none is picked.
    for frame, times in figures["encoding_ms"].items():
        for text, value, why in (
            ("different pictures", times["copies"], "32 pixels a look-up, one pass over memory"),
            ("in cache", times["copies_warm"], "the same without waiting for memory"),
        ):
            name = f"encoding, {frame}, {text}, in copies of the same bytes"
            asked.append((name, value, COPIES, why))
    return [
        {
            "name": name,
            "value": value,
            "limit": limit,
            "met": bool(value >= limit if "faster" in name else value <= limit),
            "why": why,
        }
        for name, value, limit, why in asked
    ]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; ValueError or OSError for wrong arguments."""
    cfg, records = prepare(args, folder)
    names = [args.dataset] if args.dataset else []
    mapper = GroundingMapper(cfg, is_train=True, dataset_names=names)
    width, height = picture_size(args.size)
    rng = np.random.default_rng(3)
    maps = [
        id_image(height, width, args.segments, rng)
        for _ in tqdm(range(STREAM), "id maps", leave=False)
    ]
    sides = sorted({max(width, height), cfg.INPUT.GELLA.COLORMAP_SIZE})
    stages = Steps(records, mapper, cfg).times(args.repeat)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {platform.system()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}",
        "pictures": {
            "of": args.dataset or f"made: {width} x {height}, {args.segments} segments",
            "count": len(records),
            "colormap": cfg.INPUT.GELLA.COLORMAP_SIZE,
            "image": cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE,
            "batch": cfg.SOLVER.IMS_PER_BATCH,
        },
        "mapper_images_per_second": 1000 / stages.pop("mapper"),
        "stages_ms": stages,
        "loader_images_per_second": {
            workers: loader_speed(cfg, records, mapper, workers, args.seconds)
            for workers in tqdm(args.workers, "loaders", leave=False)
        },
        "colormap_ms": {side: compare_colormaps(maps[:16], side, args.repeat) for side in sides},
        "encoding_ms": compare_encoding(maps, sides, args.repeat),
    }
    return {**figures, "rules": rules(figures)}


def report(figures: dict[str, Any]) -> str:
    """The printed tables."""
    total = 1000 / figures["mapper_images_per_second"]
    stages, encoding = figures["stages_ms"], figures["encoding_ms"]
    rest = max(0.0, total - sum(stages.values()))
    rows = [(name, stages[name], 100 * stages[name] / total, STAGES[name]) for name in STAGES]
    rows += [("other", rest, 100 * rest / total, "the rest"), ("mapper", total, 100.0, "")]
    parts = [
        ", ".join(f"{key} {value}" for key, value in figures["pictures"].items()),
        figures["machine"],
        tabulate(rows, ["stage", "ms", "%", ""], floatfmt=("", ".2f", ".0f")),
        tabulate(
            [("mapper alone, one thread", figures["mapper_images_per_second"])]
            + [(f"loader, {n} workers", v) for n, v in figures["loader_images_per_second"].items()],
            ["", "images/s"],
            floatfmt=".1f",
        ),
        tabulate(
            [
                (f"{side} pixels", t["ours"], t["resize_first"], t["masks_first"])
                for side, t in figures["colormap_ms"].items()
            ],
            ["colormap and targets", "ours ms", "plain, resize first", "plain, masks first"],
            floatfmt=".2f",
        ),
        tabulate(
            [(frame, *(times[key] for key in ENCODING)) for frame, times in encoding.items()],
            ["encoding", *(kind + text for text in WAYS.values() for kind in KINDS)],
            floatfmt=".3f",
        ),
        "copy: of the colormap's bytes; copies: encode / copy; checked: EntityMap is made first",
    ]
    for rule in figures["rules"]:
        sign = ">=" if "faster" in rule["name"] else "<="
        verdict = "met" if rule["met"] else "NOT MET"
        line = f"{rule['name']}: {rule['value']:.2f} (asked: {sign} {rule['limit']:g}, {verdict})"
        parts.append(f"{line}\n    because: {rule['why']}")
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write ``--json``; the figures. Wrong arguments: ValueError, OSError."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(args, Path(folder))
    finally:
        torch.set_num_threads(threads)
    print(report(figures))
    if args.json:
        write_json(args.json, figures)
        print(f"\nwrote {args.json}")
    print("\nnext: give DATALOADER.NUM_WORKERS the workers that outrun one training step")
    return figures

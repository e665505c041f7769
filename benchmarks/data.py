"""Speed of the data path: the mapper, the loader, and the colormap against the plain way.

    python tools/benchmark.py data                                   scenes made on the spot
    python tools/benchmark.py data --json data.json --segments 50
    python tools/benchmark.py data --dataset gella_shapes_png_train \\
        --config-file configs/gella_tiny_shapes.yaml

All but the loader runs in one thread, and is timed by the processor time of that thread. Times are
medians over different pictures, as training meets them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from measuring import OPTS, judge, machine, take_turns, threads, with_verdicts
from PIL import Image
from scenes import id_image, picture_size, write_scenes
from tabulate import tabulate
from tqdm import tqdm

from gella import add_gella_config
from gella.commands.inputs import config_of
from gella.data.mapper import GroundingMapper
from gella.data.sampling import build_train_loader
from gella.data.targets import EntityMatcher
from gella.engine.evaluation_hooks import with_keys
from gella.engine.trainer import load_records
from gella.entities.colormap import entity_colors, paint_colormap
from gella.entities.entity_map import EntityMap
from gella.entities.sources import load_from_record
from gella.entities.view import fit_image, fitted_size, read_image
from gella.text.prompts import TASKS

NUMBERS = {
    "images": (16, 2, "pictures to map"),
    "segments": (20, 1, "of made scenes"),
    "repeat": (5, 1, "passes over the pictures"),
}
OPTIONS = {
    "--dataset": {"metavar": "NAME", "help": "a registered one; default: scenes made on the spot"},
    "--config-file": {"metavar": "YAML", "help": "sizes, tokenizer; default: the paper's sizes"},
    "--size": {"default": "640x480", "help": "of made scenes (default 640x480)"},
    "--workers": {"type": int, "nargs": "*", "default": [0, 1, 2], "help": "default: 0 1 2"},
    "--seconds": {"type": float, "default": 5.0, "help": "per loader (default 5)"},
    "--opts": OPTS,
}
NEXT = "give DATALOADER.NUM_WORKERS the workers that outrun one training step"
STREAM = 16  # id maps of 640 x 480; with their colormaps more than a processor's cache
KEPT = 16  # results held while measuring, as a batch is
TIMES_FASTER, SHARE = 3.0, 5.0  # what is asked of the colormap, see `rules`
STAGES = {
    "decode image": "JPEG or PNG to RGB",
    "decode mask file": "the PNG of ids, where there is one",
    "ids to entities": "numbers, checks against the annotation",
    "resize and pad": "the image for CLIP, the entities for the colormap",
    "colors": "one for each entity",
    "colormap": "the entities painted",
    "prompt": "instruction, answer, tokens",
    "targets": "which entities each noun names",
}


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Any, Sequence[dict[str, Any]]]:
    """Config and at most ``--images`` records; ValueError or OSError for wrong arguments."""
    if min(args.workers, default=0) < 0:
        raise ValueError(f"--workers is {args.workers}; give at least 0")
    size = picture_size(args.size)
    if args.config_file:
        cfg = config_of(args.config_file, args.opts)
    else:
        cfg = get_cfg()
        add_gella_config(cfg)
        cfg.SOLVER.IMS_PER_BATCH = 8
        cfg.merge_from_list(args.opts)
    cfg.SEED = max(cfg.SEED, 0)
    if args.dataset:
        if not args.config_file:
            raise ValueError("--dataset needs --config-file, for its tokenizer and sizes")
        cfg.DATASETS.TRAIN = (args.dataset,)
        records = load_records(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", cfg)[: args.images]
    else:
        cfg.DATASETS.TRAIN = ()
        records, tokenizer = write_scenes(folder, args.images, size, args.segments)
        cfg.MODEL.LANGUAGE.TOKENIZER = tokenizer
    able = [any(task in record["tasks"] for record in records) for task in TASKS]
    shares = [ratio * can for ratio, can in zip(cfg.DATALOADER.TASK_RATIOS, able)]
    cfg.DATALOADER.TASK_RATIOS = shares if sum(shares) else [float(can) for can in able]
    return cfg, records


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of the colormap path, why, and whether this run met it."""
    faster = "colormap and targets, {} pixels, times faster than the plain way"
    runs = "one pass over runs instead of one over all pixels for each segment"
    asked = [
        (faster.format(side), times["times_faster"], TIMES_FASTER, runs)
        for side, times in figures["colormap_ms"].items()
    ]
    share = figures["stages_ms"]["colormap"] * figures["mapper_images_per_second"] / 10
    reading = "reading pictures and words is what a mapper is for"
    return judge([*asked, ("colormap encoding, % of the mapper's time", share, SHARE, reading)])


def plain(
    ids: np.ndarray, segment_ids: Sequence[int], colors: np.ndarray, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Colormap (3, S, S) and targets bool (E, S, S): the resized map compared with every id.

    This is the order of Mask2Former's panoptic mapper. Nearest neighbour by NumPy indices, which is
    exact and quicker than an image library here.
    """
    height, width = fitted_size(*ids.shape, side)
    rows, columns = (
        ((2 * np.arange(new) + 1) * old) // (2 * new)
        for old, new in zip(ids.shape, (height, width))
    )
    resized = np.zeros((side, side), ids.dtype)
    resized[:height, :width] = ids[rows][:, columns]
    colormap, masks = np.zeros((side, side, 3), np.uint8), []
    for segment_id, color in zip(segment_ids, colors):
        mask = resized == segment_id
        colormap[mask] = color
        masks.append(torch.from_numpy(np.ascontiguousarray(mask.copy())))
    return torch.from_numpy(colormap.transpose(2, 0, 1).copy()), torch.stack(masks)


def by_runs(
    ids: np.ndarray, segment_ids: Sequence[int], colors: np.ndarray, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The project's way to the same two tensors."""
    entities = EntityMap.from_id_image(ids, segment_ids)
    padded = entities.resize(*fitted_size(*ids.shape, side)).pad(side, side)
    colormap = paint_colormap(padded, colors).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(colormap)), torch.from_numpy(padded.bitmasks())


def compare_colormaps(maps: Sequence[np.ndarray], side: int, repeat: int) -> dict[str, float]:
    """Milliseconds per picture from an id map to colormap and target masks, both ways.

    Raises:
        RuntimeError: the ways disagree in a pixel; a time would mean nothing.
    """
    rng, scenes = np.random.default_rng(1), []
    for ids in maps:
        segment_ids = [int(i) for i in np.unique(ids) if i]
        entities = EntityMap.from_id_image(ids, segment_ids)
        scenes.append((ids, segment_ids, entity_colors(entities, "random", rng), side))
    for scene in scenes[:4]:
        if not all(torch.equal(a, b) for a, b in zip(by_runs(*scene), plain(*scene))):
            raise RuntimeError("the two ways give different colormaps or masks")
    tasks = {
        "ours": (lambda scene: by_runs(*scene), scenes),
        "plain": (lambda scene: plain(*scene), scenes),
    }
    times = {way: 1000 * t for way, t in take_turns(tasks, repeat, keep=2 * KEPT).items()}
    return {**times, "times_faster": times["plain"] / times["ours"]}


def stage_times(
    records: Sequence[dict[str, Any]], mapper: GroundingMapper, cfg: Any, repeat: int
) -> dict[str, float]:
    """Median milliseconds of each of `STAGES` for a picture, and of the whole "mapper"."""
    options, numbers = cfg.INPUT.GELLA, range(len(records))
    side = cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE
    task = "ground" if "ground" in records[0]["tasks"] else records[0]["tasks"][0]
    rng = np.random.default_rng(0)

    def decode_masks(i: int) -> Any:
        name = str(records[i]["entities"].get("file_name", ""))
        if not name.endswith(".png"):  # the masks are in another kind of file
            return None
        with Image.open(name) as opened:
            return np.asarray(opened)

    def fit(i: int) -> EntityMap:
        size = fitted_size(*entities[i].size, options.COLORMAP_SIZE)
        return entities[i].resize(*size).pad(options.COLORMAP_SIZE, options.COLORMAP_SIZE)

    def targets(i: int) -> Any:
        source = records[i]["entities"]
        elsewhere = source.get("targets")
        truth = elsewhere and load_from_record({**records[i], "entities": elsewhere})
        segments = (elsewhere or source).get("segments_info")
        matcher = EntityMatcher(entities[i], segments, truth, min_iou=options.TARGET_IOU)
        return [matcher.entity_indices(phrase["segment_ids"]) for phrase in mapped[i]["phrases"]]

    steps = {
        "decode image": lambda i: read_image(records[i]["file_name"]),
        "decode mask file": decode_masks,
        "ids to entities": lambda i: load_from_record(records[i]),
        "resize and pad": lambda i: (fit_image(images[i], side), fit(i)),
        "colors": lambda i: entity_colors(views[i], options.COLORS, rng),
        "colormap": lambda i: np.ascontiguousarray(
            paint_colormap(views[i], colors[i]).transpose(2, 0, 1)
        ),
        "prompt": lambda i: mapper.fit(*(mapped[i][k] for k in ("task", "caption", "phrases"))),
        "targets": targets,
        "mapper": lambda i: mapper(records[i], task=task, rng_seed=(0, i)),
    }
    # What one step makes is there for the next.
    images, entities, mapped = (
        [steps[name](i) for i in numbers] for name in ("decode image", "ids to entities", "mapper")
    )
    views = [fit(i) for i in numbers]
    colors = [steps["colors"](i) for i in numbers]
    times = {
        name: 1000 * take_turns({name: (step, numbers)}, repeat, keep=KEPT)[name]
        for name, step in tqdm(steps.items(), "stages", leave=False)
    }
    # Reading decodes too; shown is what comes on top.
    times["ids to entities"] = max(0.0, times["ids to entities"] - times["decode mask file"])
    return times


def loader_speed(
    cfg: Any, records: Sequence[dict[str, Any]], mapper: Any, workers: int, seconds: float
) -> float:
    """Images per second of the training loader, its start not counted."""
    cfg = with_keys(cfg, {"DATALOADER.NUM_WORKERS": workers})
    batches = iter(build_train_loader(cfg, datasets=[records], mapper=mapper))
    # What the workers had in hand when the clock starts would count as done in no time.
    for _ in range(2 * workers + 1):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - start)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print. ValueError, OSError for wrong arguments."""
    with threads(1), tempfile.TemporaryDirectory() as folder:
        cfg, records = prepare(args, Path(folder))
        names = [args.dataset] if args.dataset else []
        mapper = GroundingMapper(cfg, is_train=True, dataset_names=names)
        (width, height), side = picture_size(args.size), cfg.INPUT.GELLA.COLORMAP_SIZE
        rng = np.random.default_rng(3)
        maps = [id_image(height, width, args.segments, rng) for _ in range(STREAM)]
        stages = stage_times(records, mapper, cfg, args.repeat)
        speed = 1000 / stages.pop("mapper")
        speeds = {
            workers: loader_speed(cfg, records, mapper, workers, args.seconds)
            for workers in tqdm(args.workers, "loaders", leave=False)
        }
        sides = sorted({max(width, height), side})
        colormaps = {side: compare_colormaps(maps, side, args.repeat) for side in sides}
        figures: dict[str, Any] = {
            "machine": machine(),
            "pictures": {
                "of": args.dataset or f"made: {width} x {height}, {args.segments} segments",
                "count": len(records),
                "colormap": side,
                "image": cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE,
                "batch": cfg.SOLVER.IMS_PER_BATCH,
            },
            "mapper_images_per_second": speed,
            "stages_ms": stages,
            "loader_images_per_second": speeds,
            "colormap_ms": colormaps,
        }
    figures["rules"] = rules(figures)
    rows = [(name, ms, ms * speed / 10, STAGES[name]) for name, ms in stages.items()]
    rest = max(0.0, 1000 / speed - sum(stages.values()))
    rows += [("other", rest, rest * speed / 10, "the rest"), ("mapper", 1000 / speed, 100.0, "")]
    loaders = [("mapper alone, one thread", speed)]
    loaders += [(f"loader, {number} workers", value) for number, value in speeds.items()]
    ways = [(f"{number} pixels", t["ours"], t["plain"]) for number, t in colormaps.items()]
    parts = [
        ", ".join(f"{key} {value}" for key, value in figures["pictures"].items()),
        figures["machine"],
        tabulate(rows, ["stage", "ms", "%", ""], floatfmt=("", ".2f", ".0f")),
        tabulate(loaders, ["", "images/s"], floatfmt=".1f"),
        tabulate(ways, ["colormap and targets", "ours ms", "plain ms"], floatfmt=".2f"),
    ]
    return figures, with_verdicts(parts, figures["rules"])

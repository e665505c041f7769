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
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from PIL import Image
from scenes import id_image, write_scenes
from tabulate import tabulate
from tqdm import tqdm

from gella import add_gella_config, load_config
from gella.data.mapper import GroundingMapper
from gella.data.register import import_modules
from gella.data.sampling import build_train_loader
from gella.data.targets import EntityMatcher
from gella.engine.trainer import load_records
from gella.entities.colormap import entity_colors, paint_colormap
from gella.entities.entity_map import EntityMap
from gella.entities.sources import load_from_record
from gella.entities.view import fit_image, fitted_size, read_image
from gella.text.prompts import TASKS
from gella.utils.io import write_json

STREAM = 16  # id maps of 640 x 480; with their colormaps more than a processor's cache
KEPT = 16  # results held while measuring, as a batch is: the allocator cannot reuse a warm page
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
    rows = [
        {
            "name": f"colormap and targets, {side} pixels, times faster than the plain way",
            "value": times["times_faster"],
            "limit": TIMES_FASTER,
            "met": bool(times["times_faster"] >= TIMES_FASTER),
            "why": "one pass over runs instead of one over all pixels for each segment",
        }
        for side, times in figures["colormap_ms"].items()
    ]
    total = 1000 / figures["mapper_images_per_second"]
    share = 100 * figures["stages_ms"]["colormap"] / total
    rows.append(
        {
            "name": "colormap encoding, % of the mapper's time",
            "value": share,
            "limit": SHARE,
            "met": bool(share <= SHARE),
            "why": "reading pictures and words is what a mapper is for",
        }
    )
    return rows


def median_ms(task: Callable[[Any], Any], items: Sequence[Any], repeat: int) -> float:
    """Median milliseconds of `task(item)` over `repeat` passes, after one pass that is not timed.

    Processor time of this thread: what else the machine does meanwhile is not counted. The last
    `KEPT` results stay alive, so that every call gets memory as in training.
    """
    kept: deque[Any] = deque(maxlen=KEPT)
    times = []
    for turn in range(repeat + 1):
        for item in items:
            start = time.thread_time()
            kept.append(task(item))
            if turn:
                times.append(time.thread_time() - start)
    return 1000 * statistics.median(times)


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
    ours = median_ms(lambda scene: by_runs(*scene), scenes, repeat)
    others = median_ms(lambda scene: plain(*scene), scenes, repeat)
    return {"ours": ours, "plain": others, "times_faster": others / ours}


class Steps:
    """The mapper's work, step by step: each method does one step for the picture of a number."""

    def __init__(self, records: Sequence[dict[str, Any]], mapper: GroundingMapper, cfg: Any):
        """``records`` and ``mapper`` as the loader has them, for training."""
        self.records, self.mapper, self.cfg = records, mapper, cfg
        self.task = "ground" if "ground" in records[0]["tasks"] else records[0]["tasks"][0]
        self.side = cfg.INPUT.GELLA.COLORMAP_SIZE
        self.images = [read_image(record["file_name"]) for record in records]
        self.entities = [load_from_record(record) for record in records]
        self.views = [self.fit(i) for i in range(len(records))]
        self.mapped = [self.map(i) for i in range(len(records))]
        self._rng = np.random.default_rng(0)
        self.colors = [self.color(i) for i in range(len(records))]

    def map(self, i: int) -> dict[str, Any]:
        """Everything at once."""
        return self.mapper(self.records[i], task=self.task, rng_seed=(0, i))

    def fit(self, i: int) -> Any:
        """The entities in the colormap's frame."""
        size = fitted_size(*self.entities[i].size, self.side)
        return self.entities[i].resize(*size).pad(self.side, self.side)

    def decode_masks(self, i: int) -> Any:
        """The pixels of a mask PNG; nothing where the masks are in another kind of file."""
        name = str(self.records[i]["entities"].get("file_name", ""))
        if not name.endswith(".png"):
            return None
        with Image.open(name) as opened:
            return np.asarray(opened)

    def resize(self, i: int) -> Any:
        """The image in CLIP's frame, and the entities."""
        return fit_image(self.images[i], self.cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE), self.fit(i)

    def color(self, i: int) -> np.ndarray:
        """uint8 (E, 3)."""
        return entity_colors(self.views[i], self.cfg.INPUT.GELLA.COLORS, self._rng)

    def colormap(self, i: int) -> np.ndarray:
        """uint8 (3, S, S)."""
        picture = paint_colormap(self.views[i], self.colors[i])
        return np.ascontiguousarray(picture.transpose(2, 0, 1))

    def prompt(self, i: int) -> Any:
        """Tokens and labels."""
        mapped = self.mapped[i]
        return self.mapper.fit(mapped["task"], mapped["caption"], mapped["phrases"])

    def targets(self, i: int) -> Any:
        """Entity indices of each noun."""
        source = self.records[i]["entities"]
        elsewhere = source.get("targets")
        truth = elsewhere and load_from_record({**self.records[i], "entities": elsewhere})
        segments = (elsewhere or source).get("segments_info")
        matcher = EntityMatcher(
            self.entities[i], segments, truth, min_iou=self.cfg.INPUT.GELLA.TARGET_IOU
        )
        return [matcher.entity_indices(p["segment_ids"]) for p in self.mapped[i]["phrases"]]

    def times(self, repeat: int) -> dict[str, float]:
        """Median milliseconds of each of `STAGES`, and of the whole "mapper"."""
        steps = {
            "decode image": lambda i: read_image(self.records[i]["file_name"]),
            "decode mask file": self.decode_masks,
            "ids to entities": lambda i: load_from_record(self.records[i]),
            "resize and pad": self.resize,
            "colors": self.color,
            "colormap": self.colormap,
            "prompt": self.prompt,
            "targets": self.targets,
            "mapper": self.map,
        }
        numbers = range(len(self.records))
        times = {
            name: median_ms(step, numbers, repeat)
            for name, step in tqdm(steps.items(), "stages", leave=False)
        }
        # Reading decodes too; shown is what comes on top.
        times["ids to entities"] = max(0.0, times["ids to entities"] - times["decode mask file"])
        return times


def loader_speed(
    cfg: Any, records: Sequence[dict[str, Any]], mapper: Any, workers: int, seconds: float
) -> float:
    """Images per second of the training loader, its start not counted."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = iter(build_train_loader(cfg, records=records, mapper=mapper))
    # What the workers had in hand when the clock starts would count as done in no time.
    for _ in range(2 * workers + 1):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - start)


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
        "colormap_ms": {side: compare_colormaps(maps, side, args.repeat) for side in sides},
    }
    return {**figures, "rules": rules(figures)}


def report(figures: dict[str, Any]) -> str:
    """The printed tables."""
    total = 1000 / figures["mapper_images_per_second"]
    stages = figures["stages_ms"]
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
                (f"{side} pixels", t["ours"], t["plain"])
                for side, t in figures["colormap_ms"].items()
            ],
            ["colormap and targets", "ours ms", "plain ms"],
            floatfmt=".2f",
        ),
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

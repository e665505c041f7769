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
import contextlib
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from data import picture_size
from nouns import compare_passes
from scenes import id_image
from tabulate import tabulate

from gella.data.coco_categories import coco_panoptic_categories
from gella.entities.entity_map import id_to_rgb
from gella.entities.files import read_id_png, write_id_png
from gella.evaluation import metrics
from gella.evaluation.panoptic_quality import PQCounts, pq_counts
from gella.utils.io import read_json, write_json

AGREEMENT = 1e-9  # of the sums of IoUs that the two ways add up
RULES = (
    (
        "decoding and panoptic quality, in decodings alone",
        1.5,
        "pixels are counted by runs of equal pairs, of which there are few",
    ),
    (
        "panoptic quality of decoded images, times faster than panopticapi",
        1.5,
        "one pass for both areas and overlaps, and no sorting of pixels",
    ),
    (
        "decoding and panoptic quality, times faster than panopticapi",
        1.5,
        "the rest is decoding, which is the same work for both",
    ),
    (
        "average recall of {recall_nouns:,} nouns, seconds",
        1.0,
        "thresholds up to an IoU are found by bisection, not one by one",
    ),
    (
        "{nouns[nouns]} given nouns in one pass, times faster than a pass each",
        6.0,
        "the image and the caption are read once, not once per noun",
    ),
)
"""What is asked, its limit ("faster": at least, else at most), and why it can be met."""


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


class Pair(NamedTuple):
    """One image's truth and prediction on disk, in COCO's panoptic form.

    Both are dicts ``image_id``, ``file_name`` (below the folder of its place in ``folders``) and
    ``segments_info``.
    """

    truth: dict[str, Any]
    prediction: dict[str, Any]
    folders: tuple[Path, Path]


def made_pairs(folder: Path, count: int, size: tuple[int, int], segments: int) -> list[Pair]:
    """Write scenes as truth, and predictions that are off in borders, ids and some categories.

    Args:
        folder: an existing folder.
        count: of images.
        size: (width, height) in pixels.
        segments: per image, at least 1.
    """
    rng, pairs = np.random.default_rng(5), []
    categories = [category["id"] for category in coco_panoptic_categories()]
    for number in range(count):
        ids = id_image(size[1], size[0], segments, rng)
        kinds = {int(i): int(rng.choice(categories)) for i in np.unique(ids)}
        infos = [
            {"id": i, "category_id": kind, "iscrowd": 0, "area": int(np.count_nonzero(ids == i))}
            for i, kind in kinds.items()
        ]
        truth = {"image_id": number, "file_name": f"{number}_truth.png", "segments_info": infos}
        write_id_png(folder / truth["file_name"], ids)
        pairs.append(Pair(truth, _predict(folder, ids, truth, rng), (folder, folder)))
    return pairs


def pairs_of(panoptic_json: str | Path, folder: Path, limit: int) -> list[Pair]:
    """Truth from a COCO panoptic file, and made predictions as in ``made_pairs``.

    Args:
        panoptic_json: the PNGs lie beside it, in the folder of its name without ``.json``.
        folder: where predictions are written.
        limit: the most images.

    Raises:
        OSError, ValueError: a file is missing or is no panoptic annotation.
    """
    path = Path(panoptic_json)
    try:
        entries = read_json(path)["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO panoptic file with 'annotations': {error}") from error
    rng, pairs = np.random.default_rng(5), []
    for entry in entries[:limit]:
        ids = read_id_png(path.with_suffix("") / entry["file_name"])
        pairs.append(Pair(entry, _predict(folder, ids, entry, rng), (path.with_suffix(""), folder)))
    if not pairs:
        raise ValueError(f"{path} annotates no image")
    return pairs


def _predict(folder: Path, ids: np.ndarray, truth: dict, rng: Any) -> dict[str, Any]:
    """Write a prediction: borders moved by some pixels row by row, a tenth of the segments void."""
    shifts = np.arange(ids.shape[1]) - rng.integers(0, 6, (ids.shape[0], 1))
    moved = np.take_along_axis(ids, shifts.clip(0), axis=1)
    infos = truth["segments_info"]
    predicted, segments = np.zeros_like(moved), []
    for place, info in enumerate(infos):
        inside = moved == info["id"]
        if rng.random() < 0.1 or not inside.any():
            continue
        other = infos[int(rng.integers(len(infos)))]["category_id"]
        category = other if rng.random() < 0.2 else info["category_id"]
        predicted[inside] = place + 1 + (place << 16)  # more than one byte of a pixel is in use
        segments.append({"id": place + 1 + (place << 16), "category_id": category})
    name = f"{truth['image_id']}_prediction.png"
    write_id_png(folder / name, predicted)
    return {"image_id": truth["image_id"], "file_name": name, "segments_info": segments}


def decode(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Ids of truth and prediction, int32 (H, W)."""
    truth, prediction = (
        read_id_png(folder / entry["file_name"]) for folder, entry in zip(pair.folders, pair[:2])
    )
    return truth, prediction


def count(pair: Pair, ids: tuple[np.ndarray, np.ndarray], categories: list) -> PQCounts:
    """Panoptic quality's counts of one image that is decoded."""
    segments = pair.truth["segments_info"], pair.prediction["segments_info"]
    return pq_counts(ids[0], segments[0], ids[1], segments[1], categories, pair.truth["image_id"])


class Reference:
    """panopticapi's way to count one image on one core; its ImportError where it is missing."""

    def __init__(self, categories: Sequence[dict[str, Any]]) -> None:
        """``categories``: COCO's form."""
        from panopticapi import evaluation

        self._evaluation, self._by_id = evaluation, {c["id"]: c for c in categories}

    def from_files(self, pair: Pair) -> dict[int, Any]:
        """Its statistics per category; it decodes the PNGs itself."""
        folders = map(str, pair.folders)
        with contextlib.redirect_stdout(io.StringIO()):  # it reports by printing
            statistics = self._evaluation.pq_compute_single_core(
                0, [pair[:2]], *folders, self._by_id
            )
        return statistics.pq_per_cat

    def decoded(self, item: tuple[Pair, dict[str, np.ndarray]]) -> dict[int, Any]:
        """The same with pixels, uint8 (H, W, 3), handed to it by path in place of the files."""
        pair, pixels = item
        original = self._evaluation.Image
        self._evaluation.Image = SimpleNamespace(open=pixels.__getitem__)
        try:
            return self.from_files(pair)
        finally:
            self._evaluation.Image = original


def compare_panoptic(pairs: Sequence[Pair], repeat: int) -> dict[str, Any]:
    """Milliseconds per image of scoring, of decoding, and of panopticapi.

    Medians of one thread's processor time over the images and ``repeat`` passes (`take_turns`).

    Returns:
        ``decode_ms`` (both PNGs), ``count_ms`` (of decoded ids) and ``total_ms``; the same two of
        panopticapi, ``reference_count_ms`` and ``reference_total_ms``, None where it is not
        importable; ``decodings`` (total / decode); ``count_faster`` and ``total_faster``
        (panopticapi / ours, or None); ``images`` and ``segments`` (mean per image).

    Raises:
        RuntimeError: the two ways count differently, so that their times mean nothing.
    """
    categories = coco_panoptic_categories()
    decoded = [(pair, decode(pair)) for pair in pairs]
    tasks: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]] = {
        "decode_ms": (decode, pairs),
        "count_ms": (lambda item: count(*item, categories), decoded),
        "total_ms": (lambda pair: count(pair, decode(pair), categories), pairs),
    }
    with contextlib.suppress(ImportError):
        reference = Reference(categories)
        pixels = []
        for pair, ids in decoded:
            check_agreement(count(pair, ids, categories), reference.from_files(pair), pair)
            paths = [os.path.join(f, e["file_name"]) for f, e in zip(pair.folders, pair[:2])]
            pixels.append((pair, dict(zip(paths, map(id_to_rgb, ids)))))
        tasks["reference_count_ms"] = (reference.decoded, pixels)
        tasks["reference_total_ms"] = (reference.from_files, pairs)
    figures: dict[str, Any] = take_turns(tasks, repeat)
    figures["decodings"] = figures["total_ms"] / figures["decode_ms"]
    for part in ("count", "total"):
        theirs = figures.setdefault(f"reference_{part}_ms", None)
        figures[f"{part}_faster"] = None if theirs is None else theirs / figures[f"{part}_ms"]
    segments = sum(len(pair.truth["segments_info"]) for pair in pairs) / len(pairs)
    return {**figures, "images": len(pairs), "segments": segments}


def take_turns(
    tasks: Mapping[str, tuple[Callable[[Any], Any], Sequence[Any]]], repeat: int
) -> dict[str, float]:
    """Median milliseconds of each task over its items and ``repeat`` passes, after one untimed.

    The tasks, (function, its arguments, as many for each), take turns item by item, so that a
    change of the machine's speed meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    length = len(next(iter(tasks.values()))[1])
    for turn in range(repeat + 1):
        for place in range(length):
            for name, (task, items) in tasks.items():
                start = time.thread_time()
                task(items[place])
                taken = time.thread_time() - start
                if turn:
                    times[name].append(taken)
    return {name: 1000 * float(np.median(values)) for name, values in times.items()}


def check_agreement(ours: PQCounts, theirs: dict[int, Any], pair: Pair) -> None:
    """RuntimeError unless counts and sums of IoUs agree, per category, to ``AGREEMENT``."""
    for category in ours.categories() | {c for c, s in theirs.items() if s.tp + s.fp + s.fn}:
        counts = tuple(getattr(ours, name).get(category, 0) for name in ("tp", "fp", "fn"))
        other = theirs[category]
        gap = abs(ours.iou.get(category, 0.0) - other.iou)
        if counts != (other.tp, other.fp, other.fn) or gap > AGREEMENT:
            raise RuntimeError(
                f"image {pair.truth['image_id']}, category {category}: TP, FP, FN {counts} and a "
                f"gap of {gap} in IoU, panopticapi has {(other.tp, other.fp, other.fn)}"
            )


def time_recall(nouns: int, repeat: int) -> dict[str, float]:
    """Seconds by the wall clock for average recall of random nouns with all subsets, per protocol;
    the median of ``repeat`` times."""
    rng = np.random.default_rng(7)
    ious = np.where(rng.random(nouns) < 0.2, 0.0, rng.random(nouns)).tolist()
    flags, counts = rng.random((nouns, 2)) < 0.5, rng.integers(1, 6, nouns).tolist()
    units = [
        {"iou": iou, "is_thing": thing, "segment_ids": range(count), "is_plural": plural}
        for iou, (thing, plural), count in zip(ious, flags.tolist(), counts)
    ]
    seconds = {}
    for protocol in metrics.PROTOCOLS:
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            metrics.png_summary(units, protocol)
            times.append(time.perf_counter() - start)
        seconds[protocol] = float(np.median(times))
    return seconds


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of evaluation, why, and whether this run met it (None: not measured)."""
    panoptic, nouns = figures["panoptic"], figures["nouns"]
    values = [panoptic[key] for key in ("decodings", "count_faster", "total_faster")]
    values += [max(figures["recall_s"].values()), nouns["times_faster"]]
    verdicts = []
    for (name, limit, why), value in zip(RULES, values, strict=True):
        met = None if value is None else value >= limit if "faster" in name else value <= limit
        told = {"name": name.format(**figures), "value": value, "limit": limit}
        verdicts.append({**told, "met": met, "why": why})
    return verdicts


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; ValueError or OSError for wrong arguments."""
    least = {"images": 1, "segments": 1, "recall_nouns": 1, "nouns": 1, "grid": 1}
    for name, number in {**least, "layers": 1, "width": 64, "vocabulary": 640, "repeat": 1}.items():
        if getattr(args, name) < number:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(args, name)}; give at least {number}")
    if args.width % 64:
        raise ValueError(f"--width is {args.width}; give a multiple of 64, the width of a head")
    if args.panoptic_json:
        pairs = pairs_of(args.panoptic_json, folder, args.images)
    else:
        pairs = made_pairs(folder, args.images, picture_size(args.size), args.segments)
    sizes = ("nouns", "layers", "width", "vocabulary", "repeat")
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
            side=args.grid,
            **{name: getattr(args, name) for name in sizes},
        ),
    }
    return {**figures, "rules": rules(figures)}


def report(figures: dict[str, Any]) -> str:
    """The printed tables and verdicts."""
    panoptic, nouns = figures["panoptic"], figures["nouns"]
    counting, both = (
        (panoptic[f"{part}_ms"], panoptic[f"reference_{part}_ms"]) for part in ("count", "total")
    )
    rows = [
        ("decoding truth and prediction", panoptic["decode_ms"], ""),
        ("panoptic quality of decoded images", *counting),
        ("decoding and panoptic quality", *both),
    ]
    passes = [
        (title, nouns[f"{way}_tokens"], nouns[f"{way}_s"])
        for title, way in (("one pass", "one_pass"), ("a pass per noun", "per_noun"))
    ]
    parts = [
        f"{figures['of']}: {panoptic['images']} images, {panoptic['segments']:.1f} segments each",
        figures["machine"],
        tabulate(
            rows,
            ["per image, one thread", "ours, ms", "panopticapi, ms"],
            floatfmt=".2f",
            missingval="not importable",
        ),
        tabulate(
            list(figures["recall_s"].items()),
            [f"AR of {figures['recall_nouns']:,} nouns, protocol", "seconds"],
            floatfmt=".4f",
        ),
        tabulate(
            passes,
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

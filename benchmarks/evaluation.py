"""Speed of evaluation: panoptic quality and average recall.

    python tools/benchmark.py eval                         scenes made on the spot
    python tools/benchmark.py eval --json eval.json
    python tools/benchmark.py eval --panoptic-json datasets/coco/annotations/panoptic_val2017.json

Panoptic quality is timed from files, by the processor time of one thread, beside decoding the same
PNGs and, where panopticapi is importable, beside panopticapi, with which it must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import Task, judge, machine, take_turns, with_verdicts
from scenes import id_image, picture_size
from tabulate import tabulate

from gella.data.register import coco_panoptic_categories
from gella.entities.files import read_id_png, write_id_png
from gella.evaluation import metrics
from gella.evaluation.panoptic_quality import PQCounts, pq_counts
from gella.utils.io import read_json

NUMBERS = {
    "images": (24, 1, "images to score"),
    "segments": (20, 1, "of made scenes"),
    "recall-nouns": (100_000, 1, "for average recall"),
    "repeat": (5, 1, "passes; medians count"),
}
OPTIONS = {
    "--panoptic-json": {"metavar": "FILE", "help": "truth in COCO's form; default: made scenes"},
    "--size": {"default": "640x480", "help": "of made scenes (default 640x480)"},
}
NEXT = "python tools/train_net.py --eval-only --config-file YAML MODEL.WEIGHTS FILE"
AGREEMENT = 1e-9  # of the sums of IoUs that the two ways add up


# -- panoptic quality ------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One image's truth and prediction on disk, in COCO's panoptic form.

    Both are dicts ``image_id``, ``file_name`` (below the folder of its place in ``folders``) and
    ``segments_info``.
    """

    truth: dict[str, Any]
    prediction: dict[str, Any]
    folders: tuple[Path, Path]


def made_pairs(folder: Path, count: int, size: tuple[int, int], segments: int) -> list[Pair]:
    """Scenes of ``segments`` and ``size`` (width, height) as truth, and predictions that are off in
    borders, ids and some categories; all is written into an existing folder."""
    rng, pairs = np.random.default_rng(5), []
    categories = [category["id"] for category in coco_panoptic_categories()]
    for number in range(count):
        ids = id_image(size[1], size[0], segments, rng)
        infos = [
            {"id": i, "category_id": int(rng.choice(categories)), "iscrowd": 0, "area": area}
            for i, area in zip(*(part.tolist() for part in np.unique(ids, return_counts=True)))
        ]
        truth = {"image_id": number, "file_name": f"{number}_truth.png", "segments_info": infos}
        write_id_png(folder / truth["file_name"], ids)
        pairs.append(Pair(truth, _predict(folder, ids, truth, rng), (folder, folder)))
    return pairs


def pairs_of(panoptic_json: str, folder: Path, limit: int) -> list[Pair]:
    """At most ``limit`` truths of a COCO panoptic file, whose PNGs lie in the folder of its name
    without ``.json``, and predictions as in ``made_pairs``, written into ``folder``.

    Raises:
        OSError, ValueError: a file is missing or is no panoptic annotation.
    """
    path, root = Path(panoptic_json), Path(panoptic_json).with_suffix("")
    try:
        entries = read_json(path)["annotations"][:limit]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO panoptic file with 'annotations': {error}") from error
    if not entries:
        raise ValueError(f"{path} annotates no image")
    rng, pairs = np.random.default_rng(5), []
    for entry in entries:
        prediction = _predict(folder, read_id_png(root / entry["file_name"]), entry, rng)
        pairs.append(Pair(entry, prediction, (root, folder)))
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


def decode(pair: Pair) -> tuple[np.ndarray, ...]:
    """Ids of truth and prediction, int32 (H, W)."""
    return tuple(read_id_png(f / one["file_name"]) for f, one in zip(pair.folders, pair[:2]))


def count(pair: Pair, ids: tuple[np.ndarray, ...], categories: list) -> PQCounts:
    """Panoptic quality's counts of one image that is decoded."""
    segments = pair.truth["segments_info"], pair.prediction["segments_info"]
    return pq_counts(ids[0], segments[0], ids[1], segments[1], categories, pair.truth["image_id"])


def reference(pair: Pair, by_id: dict[int, Any]) -> dict[int, Any]:
    """panopticapi's statistics per category of one image on one core; it decodes the PNGs itself.

    ``by_id``: categories in COCO's form. ImportError where it is missing.
    """
    from panopticapi import evaluation

    with contextlib.redirect_stdout(io.StringIO()):  # it reports by printing
        score = evaluation.pq_compute_single_core
        return score(0, [pair[:2]], *map(str, pair.folders), by_id).pq_per_cat


def compare_panoptic(pairs: Sequence[Pair], repeat: int) -> dict[str, Any]:
    """Milliseconds per image of scoring, of decoding, and of panopticapi.

    Medians of one thread's processor time over the images and ``repeat`` passes (`take_turns`).

    Returns:
        ``decode_ms`` (both PNGs), ``count_ms`` (of decoded ids) and ``total_ms``; ``decodings``
        (total / decode); panopticapi's ``reference_total_ms`` and ``total_faster`` (it / ours),
        None where it is not importable; ``images`` and ``segments`` (mean per image).

    Raises:
        RuntimeError: the two ways count differently, so that their times mean nothing.
    """
    categories = coco_panoptic_categories()
    decoded = [(pair, decode(pair)) for pair in pairs]
    tasks: dict[str, Task] = {
        "decode_ms": (decode, pairs),
        "count_ms": (lambda item: count(*item, categories), decoded),
        "total_ms": (lambda pair: count(pair, decode(pair), categories), pairs),
    }
    with contextlib.suppress(ImportError):
        by_id = {category["id"]: category for category in categories}
        for pair, ids in decoded:
            check_agreement(count(pair, ids, categories), reference(pair, by_id), pair)
        tasks["reference_total_ms"] = (lambda pair: reference(pair, by_id), pairs)
    seconds = take_turns(tasks, repeat)
    figures: dict[str, Any] = {name: 1000 * value for name, value in seconds.items()}
    theirs = figures.setdefault("reference_total_ms", None)
    figures["decodings"] = figures["total_ms"] / figures["decode_ms"]
    figures["total_faster"] = None if theirs is None else theirs / figures["total_ms"]
    segments = sum(len(pair.truth["segments_info"]) for pair in pairs) / len(pairs)
    return {**figures, "images": len(pairs), "segments": segments}


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


# -- average recall and given nouns ----------------------------------------------------------------


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

    tasks: dict[str, Task] = {
        protocol: (lambda name: metrics.png_summary(units, name), [protocol])
        for protocol in metrics.PROTOCOLS
    }
    return take_turns(tasks, repeat, time.perf_counter, warm=False)


# -- all together ----------------------------------------------------------------------------------


def rules(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of evaluation, why it can be met, and whether this run met it."""
    panoptic, slowest = figures["panoptic"], max(figures["recall_s"].values())
    return judge(
        [
            (
                "decoding and panoptic quality, in decodings alone",
                panoptic["decodings"],
                1.5,
                "pixels are counted by runs of equal pairs, of which there are few",
            ),
            (
                "decoding and panoptic quality, times faster than panopticapi",
                panoptic["total_faster"],
                1.5,
                "one pass for areas and overlaps; the rest is decoding, the same work for both",
            ),
            (
                f"average recall of {figures['recall_nouns']:,} nouns, seconds",
                slowest,
                1.0,
                "thresholds up to an IoU are found by bisection, not one by one",
            ),
        ]
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print. ValueError, OSError for wrong arguments."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.panoptic_json:
            pairs = pairs_of(args.panoptic_json, folder, args.images)
        else:
            pairs = made_pairs(folder, args.images, picture_size(args.size), args.segments)
        figures: dict[str, Any] = {
            "machine": machine(),
            "of": args.panoptic_json or f"made scenes, {args.size}",
            "panoptic": compare_panoptic(pairs, args.repeat),
            "recall_nouns": args.recall_nouns,
            "recall_s": time_recall(args.recall_nouns, args.repeat),
        }
    figures["rules"] = rules(figures)
    panoptic = figures["panoptic"]
    rows = [
        ("decoding truth and prediction", panoptic["decode_ms"], ""),
        ("panoptic quality of decoded images", panoptic["count_ms"], ""),
        ("both from files", panoptic["total_ms"], panoptic["reference_total_ms"]),
    ]
    head = ["per image, one thread", "ours, ms", "panopticapi, ms"]
    protocol = f"AR of {args.recall_nouns:,} nouns, protocol"
    parts = [
        f"{figures['of']}: {panoptic['images']} images, {panoptic['segments']:.1f} segments each",
        figures["machine"],
        tabulate(rows, head, floatfmt=".2f", missingval="not importable"),
        tabulate(figures["recall_s"].items(), [protocol, "seconds"], floatfmt=".4f"),
    ]
    return figures, with_verdicts(parts, figures["rules"])

"""Time of the metrics, for `benchmark_eval.py`: panoptic quality from files, average recall."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from scenes import id_image
from tqdm import tqdm

from gella.data.coco_categories import coco_panoptic_categories
from gella.entities.entity_map import id_to_rgb
from gella.entities.files import read_id_png
from gella.evaluation import metrics
from gella.evaluation.panoptic_quality import PQCounts, pq_counts

AGREEMENT = 1e-9  # of the sums of IoUs that the two ways add up


@dataclass
class Pair:
    """One image's truth and prediction on disk, in COCO's panoptic form.

    Attributes:
        truth: dict ``image_id``, ``file_name`` (below ``folders[0]``) and ``segments_info``.
        prediction: the same, below ``folders[1]``.
        folders: of truth and of prediction.
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
    for number in tqdm(range(count), "scenes", leave=False):
        ids = id_image(size[1], size[0], segments, rng)
        kinds = {int(i): int(rng.choice(categories)) for i in np.unique(ids)}
        infos = [_segment(ids, i, category) for i, category in kinds.items()]
        truth = {"image_id": number, "file_name": f"{number}_truth.png", "segments_info": infos}
        Image.fromarray(id_to_rgb(ids)).save(folder / truth["file_name"])
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
        entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO panoptic file with 'annotations': {error}") from error
    rng, pairs = np.random.default_rng(5), []
    for entry in entries[:limit]:
        ids = read_id_png(path.with_suffix("") / entry["file_name"])
        prediction = _predict(folder, ids, entry, rng)
        pairs.append(Pair(entry, prediction, (path.with_suffix(""), folder)))
    if not pairs:
        raise ValueError(f"{path} annotates no image")
    return pairs


def _segment(ids: np.ndarray, segment_id: int, category: int) -> dict[str, Any]:
    area = int(np.count_nonzero(ids == segment_id))
    return {"id": segment_id, "category_id": category, "iscrowd": 0, "area": area}


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
    Image.fromarray(id_to_rgb(predicted)).save(folder / name)
    return {"image_id": truth["image_id"], "file_name": name, "segments_info": segments}


def decode(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Ids of truth and prediction, int32 (H, W)."""
    truth, prediction = (
        read_id_png(folder / entry["file_name"])
        for folder, entry in zip(pair.folders, (pair.truth, pair.prediction))
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
        pairs = [(pair.truth, pair.prediction)]
        with contextlib.redirect_stdout(io.StringIO()):  # it reports by printing
            statistics = self._evaluation.pq_compute_single_core(
                0, pairs, *map(str, pair.folders), self._by_id
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
    try:
        reference = Reference(categories)
    except ImportError:
        reference = None
    if reference is not None:
        for pair, ids in decoded:
            check_agreement(count(pair, ids, categories), reference.from_files(pair), pair)
        pixels = [(pair, _pixels(pair, ids)) for pair, ids in decoded]
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

    The tasks take turns item by item, so that a change of the machine's speed meets all of them.

    Args:
        tasks: name -> (function, its arguments, as many for each task).
        repeat: passes.
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


def _pixels(pair: Pair, ids: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    entries = pair.truth, pair.prediction
    return {
        os.path.join(str(folder), entry["file_name"]): id_to_rgb(image)
        for folder, entry, image in zip(pair.folders, entries, ids)
    }


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
    """Seconds by the wall clock for average recall with all subsets, per protocol; the median.

    Args:
        nouns: how many random nouns.
        repeat: how often.
    """
    rng = np.random.default_rng(7)
    ious = np.where(rng.random(nouns) < 0.2, 0.0, rng.random(nouns)).tolist()
    flags = rng.random((nouns, 2)) < 0.5
    counts = rng.integers(1, 6, nouns).tolist()
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

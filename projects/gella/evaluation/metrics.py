"""Scores of grounding, referring and noun extraction, as pure functions of masks and counts.

Shares are fractions in [0, 1] here; the evaluators turn them into percent. Masks are boolean
arrays (H, W) in the frame of the original image. Panoptic quality and entity AP are in
``panoptic_quality``.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from gella.text.words import bare_noun

NUM_THRESHOLDS = 100_000
"""Thresholds of average recall: 0, 1e-5, ..., 0.99999 (the PNG benchmark's rule)."""

PROTOCOLS = ("hard", "official", "flmm")
"""Rules for average recall in use by different repositories; their rows are not comparable."""

SUBSETS = ("thing", "stuff", "singular", "plural")
"""The two splits of the nouns that are reported: thing + stuff and singular + plural."""

_THRESHOLDS = np.arange(NUM_THRESHOLDS) / NUM_THRESHOLDS
_SOFT_SIDE = 256  # pixels; the official baseline compares masks that went through this size
_FLMM_EPSILON = 1e-12


def average_recall(ious: Sequence[float] | np.ndarray) -> float:
    """Area under recall(t) = share of ``ious`` >= t, as a left sum over 100,000 thresholds.

    Args:
        ious: (N,) in [0, 1].

    Returns:
        A fraction, NaN for N = 0. An IoU of 0 is a miss at the threshold 0 too, so that an empty
        prediction scores exactly 0; the benchmark's literal sum is larger by at most 1e-5.

    Raises:
        ValueError: an IoU is NaN or outside [0, 1].
    """
    values = np.asarray(ious, dtype=np.float64).reshape(-1)
    if values.size == 0:
        return math.nan
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"average recall: IoUs lie in [{values.min()}, {values.max()}], expected [0, 1]: "
            "check the masks they were computed from"
        )
    # Every unit is recalled at the thresholds up to its IoU. Counts are integers, so the order
    # of the units (and the number of processes) cannot change the sum.
    passed = np.searchsorted(_THRESHOLDS, values, side="right")
    passed[values == 0] = 0
    return int(passed.sum()) / (NUM_THRESHOLDS * values.size)


def png_summary(
    nouns: Sequence[Mapping[str, Any]], protocol: str = "hard", key: str = "iou"
) -> dict[str, float]:
    """Average recall of all nouns and of the subsets, with the size of each (docs/FORMATS.md 2).

    Args:
        nouns: scored nouns with ``is_thing`` (category of the last segment), ``segment_ids`` (at
            least one), ``is_plural`` (the file's flag, for "flmm" alone) and ``key``.
        protocol: one of ``PROTOCOLS``.
        key: which IoU in [0, 1] is pooled; 0 for a noun without a prediction.

    Returns:
        ``AR``, ``acc@0.5`` (share of IoUs strictly above), ``n`` and, for each name of
        ``SUBSETS``, ``AR_<name>`` and ``n_<name>``. Fractions and counts, NaN where n is 0.

    Raises:
        RuntimeError: AR differs from the n-weighted mean of one of its two splits.
    """
    ious = np.array([noun[key] for noun in nouns], dtype=np.float64)
    thing = np.array([noun["is_thing"] for noun in nouns], dtype=bool)
    if protocol == "flmm":
        plural = np.array([noun["is_plural"] for noun in nouns], dtype=bool)
        thing |= plural  # F-LMM files every plural under things, whatever its category
    else:
        plural = np.array([len(set(noun["segment_ids"])) > 1 for noun in nouns], dtype=bool)
    members = dict(zip(SUBSETS, (thing, ~thing, ~plural, plural), strict=True))
    summary = {"AR": average_recall(ious)}
    summary.update({f"AR_{name}": average_recall(ious[chosen]) for name, chosen in members.items()})
    # Strictly above, as the benchmarks have it: 0.5 itself is no hit.
    summary["acc@0.5"] = float((ious > 0.5).mean()) if nouns else math.nan
    summary["n"] = float(len(nouns))
    summary.update({f"n_{name}": float(chosen.sum()) for name, chosen in members.items()})
    check_splits(summary)
    return summary


def check_splits(summary: dict[str, float]) -> None:
    """RuntimeError for a PNG row whose AR is not the n-weighted mean of both of its splits.

    ``summary`` has the keys of ``png_summary``.
    """
    if not summary["n"]:
        return
    for names in (SUBSETS[:2], SUBSETS[2:]):
        parts = [(summary[f"n_{name}"], summary[f"AR_{name}"]) for name in names]
        mean = sum(n * score for n, score in parts if n) / summary["n"]
        if abs(mean - summary["AR"]) > 1e-9:
            raise RuntimeError(
                f"PNG summary: AR {summary['AR']} is not the weighted mean {mean} of "
                f"{names[0]} and {names[1]}: a noun is missing from the split or counted twice"
            )


def ratio_iou(intersection: float, union: float, protocol: str = "hard") -> float:
    """IoU of two binary masks from pixel counts; 0/0 is 0, a miss."""
    if protocol == "flmm":
        return float(intersection / (union + _FLMM_EPSILON))
    return float(intersection / union) if union else 0.0


def soften(mask: np.ndarray) -> np.ndarray:
    """Send a mask (H, W) through 256x256 and back bilinearly: float64 (H, W), not binarised.

    What the PNG baseline does to truth and proposals before it compares them ("official").
    """
    soft = torch.from_numpy(mask.astype(np.float64))[None, None]
    for size in ((_SOFT_SIDE, _SOFT_SIDE), mask.shape):
        soft = interpolate(soft, size, mode="bilinear", align_corners=False)
    return soft[0, 0].numpy()


def noun_iou(prediction: np.ndarray, truth: np.ndarray, protocol: str = "hard") -> float:
    """IoU of two masks (H, W) by the rule of ``protocol``.

    "hard": pixel counts. "flmm": the same with 1e-12 added to the union. "official": soft IoU
    sum(pt) / sum(p + t - pt) of both masks after ``soften``.
    """
    if protocol == "official":
        p, t = soften(prediction), soften(truth)
        product = float((p * t).sum())
        # Rounding can lift a perfect match over 1 in the last digit.
        return min(ratio_iou(product, float(p.sum() + t.sum()) - product), 1.0)
    inter = int(np.count_nonzero(prediction & truth))
    union = np.count_nonzero(prediction) + np.count_nonzero(truth) - inter
    return ratio_iou(inter, union, protocol)


def best_union(
    intersections: np.ndarray, areas: np.ndarray, truth_area: int
) -> tuple[float, np.ndarray]:
    """Best IoU with a truth that any union of the given disjoint masks reaches.

    Args:
        intersections: int (E,), pixels of each mask on the truth.
        areas: int (E,), pixels of each mask.
        truth_area: pixels of the truth, those under no mask included.

    Returns:
        The IoU and the indices of the masks of the union, possibly none.

    A union reaches IoU r exactly if the sum over its masks of (1 + r) inter - r area is at least
    r truth_area, and that sum is largest for the masks with inter / area > r / (1 + r). So one of
    the prefixes in descending order of inter / area is optimal, and all of them are tried.
    """
    useful = np.flatnonzero(np.asarray(intersections) > 0)
    if useful.size == 0:
        return 0.0, useful
    inter, area = np.asarray(intersections)[useful], np.asarray(areas)[useful]
    order = np.argsort(-inter / area, kind="stable")
    inter, area = np.cumsum(inter[order]), np.cumsum(area[order])
    ious = inter / (truth_area + area - inter)
    best = int(ious.argmax())
    return float(ious[best]), useful[order[: best + 1]]


def blind_choices(
    areas: np.ndarray, image_id: int | str, phrase_index: int
) -> dict[str, np.ndarray]:
    """Entity indices that three baselines name without looking at image or noun.

    ``random`` (one entity), ``largest`` (one, by ``areas``, pixels (E,)) and ``all``; all empty for
    E = 0. ``image_id`` and ``phrase_index`` fix the draw, whatever process and order.
    """
    everything, seed = np.arange(len(areas)), (zlib.crc32(str(image_id).encode()), phrase_index)
    chosen = dict.fromkeys(("random", "largest", "all"), everything)
    if len(areas):
        chosen["random"] = np.random.default_rng(seed).integers(len(areas), size=1)
        chosen["largest"] = everything[[np.argmax(areas)]]
    return chosen


def normalize_noun(noun: str) -> str:
    """Lower case, single spaces, leading determiners dropped (never the last word)."""
    return bare_noun(noun.lower())


def noun_recall(reference: Iterable[str], answered: Iterable[str]) -> int:
    """Reference nouns that occur in the answer, each answer noun used once (docs/FORMATS.md 6)."""
    wanted, given = (Counter(map(normalize_noun, nouns)) for nouns in (reference, answered))
    return sum((wanted & given).values())


def cumulative_iou(
    intersections: Sequence[int] | np.ndarray, unions: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Referring segmentation scores from pixel counts, one pair per expression (docs/FORMATS.md 3).

    Returns:
        ``cIoU`` sum of intersections / sum of unions; ``gIoU`` mean IoU, where an empty truth met
        by an empty prediction (union 0) counts 1; ``P@0.5`` ... ``P@0.9`` shares strictly above;
        ``n``. NaN without expressions; cIoU is 1 if every union is 0.

    Raises:
        ValueError: the two sequences differ in length.
    """
    inter, union = np.asarray(intersections, np.int64), np.asarray(unions, np.int64)
    if inter.shape != union.shape:
        raise ValueError(
            f"referring: {inter.size} intersections but {union.size} unions: give one pair each"
        )
    ious = np.where(union == 0, 1.0, inter / np.maximum(union, 1))
    n, total = len(ious), int(union.sum())
    # fsum rounds once, so the order of the expressions cannot change the result.
    summary = {
        "cIoU": (int(inter.sum()) / total if total else 1.0) if n else math.nan,
        "gIoU": math.fsum(ious) / n if n else math.nan,
    }
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        summary[f"P@{threshold}"] = float((ious > threshold).mean()) if n else math.nan
    return {**summary, "n": float(n)}

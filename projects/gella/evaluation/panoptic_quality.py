"""Panoptic quality and class-agnostic entity AP, as pure functions (numpy and pycocotools)."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOID = 0
"""Id of pixels that belong to no segment, in truth and prediction."""


def joint_counts(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of every pair of ids that two id images of one size show.

    Args:
        first, second: int (H, W), ids in 0..2^31 - 1.

    Returns:
        pairs int64 (N, 2), each once, in ascending order, and counts int64 (N,).

    Raises:
        ValueError: the sizes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"id images of sizes {first.shape} and {second.shape}: give equal sizes")
    if first.size == 0:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
    a, b = first.reshape(-1), second.reshape(-1)
    # Neighbouring pixels mostly agree: sorting the runs is far cheaper than sorting the pixels.
    change = a[1:] != a[:-1]
    change |= b[1:] != b[:-1]
    starts = np.concatenate(([0], np.flatnonzero(change) + 1))
    lengths = np.diff(starts, append=a.size)
    keys = (a[starts].astype(np.int64) << 32) | b[starts].astype(np.int64)
    unique, inverse = np.unique(keys, return_inverse=True)
    counts = np.bincount(inverse.reshape(-1), weights=lengths).astype(np.int64)
    return np.stack((unique >> 32, unique & 0xFFFFFFFF), axis=1), counts


def check_segments(
    present: Iterable[int], segments: Sequence[dict[str, Any]], image_id: Any, source: str
) -> dict[int, dict[str, Any]]:
    """Check that an id image and its list of segments name the same ids.

    Args:
        present: ids that occur in the image; void may be among them.
        segments: dicts with ``id``; void (0) and repeated ids are refused.
        source: "truth" or "prediction", for the message.

    Returns:
        id -> segment, in the order of the list.

    Raises:
        ValueError: naming the image and the ids.
    """
    by_id = {int(segment["id"]): segment for segment in segments}
    if len(by_id) != len(segments) or VOID in by_id:
        raise ValueError(
            f"image {image_id}: the {source}'s segments repeat an id or use {VOID}, which is void"
        )
    shown = {int(i) for i in present} - {VOID}
    for ids, where, absent in (
        (sorted(shown - by_id.keys()), "in its pixels", "its segments"),
        (sorted(by_id.keys() - shown), "among its segments", "its pixels"),
    ):
        if ids:
            raise ValueError(
                f"image {image_id}: the {source} has ids {ids} {where} but not in {absent}: "
                "write both from the same segmentation"
            )
    return by_id


@dataclass
class PQCounts:
    """What panoptic quality adds up, per category id: matched IoUs and numbers of segments."""

    iou: dict[int, float] = field(default_factory=dict)
    tp: dict[int, int] = field(default_factory=dict)
    fp: dict[int, int] = field(default_factory=dict)
    fn: dict[int, int] = field(default_factory=dict)

    def categories(self) -> set[int]:
        """Ids of the categories that occur."""
        return {*self.tp, *self.fp, *self.fn}


def _add(table: dict[int, Any], category: int, value: Any) -> None:
    table[category] = table.get(category, 0) + value


def _checked_segments(pairs, gt_segments, pred_segments, categories, image_id):
    known = {int(category["id"]) for category in categories}
    truth = check_segments(pairs[:, 0].tolist(), gt_segments, image_id, "truth")
    predicted = check_segments(pairs[:, 1].tolist(), pred_segments, image_id, "prediction")
    for source, segments in (("truth", truth), ("prediction", predicted)):
        for segment_id, segment in segments.items():
            if segment.get("category_id") not in known:
                raise ValueError(
                    f"image {image_id}: {source} segment {segment_id} has unknown category_id "
                    f"{segment.get('category_id')}: take one of the {len(known)} known ids"
                )
    return truth, predicted


def pq_counts(
    gt_ids: np.ndarray,
    gt_segments: Sequence[dict[str, Any]],
    pred_ids: np.ndarray,
    pred_segments: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    image_id: Any = "?",
) -> PQCounts:
    """Match one image's prediction to its truth by the COCO panoptic rules (docs/FORMATS.md 1).

    Args:
        gt_ids, pred_ids: int (H, W), 0 = void.
        gt_segments: dicts ``id, category_id, iscrowd`` and optionally ``area`` (pixels); without
            it the pixels are counted. A given area is trusted, as panopticapi does.
        pred_segments: dicts ``id, category_id``.
        categories: dicts with ``id``, the dataset's own.

    Raises:
        ValueError: sizes differ, ids in pixels and segments differ, or an unknown category; the
            message names the image.
    """
    if gt_ids.shape != pred_ids.shape:
        raise ValueError(
            f"image {image_id}: prediction of size {pred_ids.shape}, truth {gt_ids.shape}: "
            "predict at the original image size"
        )
    pairs, pixels = joint_counts(gt_ids, pred_ids)
    truth, predicted = _checked_segments(pairs, gt_segments, pred_segments, categories, image_id)
    overlap = {(g, p): n for (g, p), n in zip(pairs.tolist(), pixels.tolist(), strict=True)}
    gt_area, pred_area = dict.fromkeys(truth, 0), dict.fromkeys(predicted, 0)
    for (g, p), n in overlap.items():
        if g != VOID:
            gt_area[g] += n
        if p != VOID:
            pred_area[p] += n
    matches = _matches(truth, predicted, overlap, gt_area, pred_area)
    return _count(truth, predicted, overlap, pred_area, matches)


def _matches(truth, predicted, overlap, gt_area, pred_area) -> list[tuple[int, int, float]]:
    """(truth id, predicted id, IoU) of every match; void under a prediction does not count."""
    matches = []
    for (g, p), n in overlap.items():
        if g == VOID or p == VOID or truth[g].get("iscrowd", 0):
            continue
        if truth[g]["category_id"] != predicted[p]["category_id"]:
            continue
        area = truth[g].get("area", gt_area[g])
        iou = n / (pred_area[p] + area - n - overlap.get((VOID, p), 0))
        if iou > 0.5:  # at most one partner can pass, so no assignment is needed
            matches.append((g, p, iou))
    return matches


def _count(truth, predicted, overlap, pred_area, matches) -> PQCounts:
    counts = PQCounts()
    for g, _, iou in matches:
        _add(counts.tp, truth[g]["category_id"], 1)
        _add(counts.iou, truth[g]["category_id"], iou)
    matched_truth = {g for g, _, _ in matches}
    matched_predictions = {p for _, p, _ in matches}
    crowd = {}  # a category's last crowd segment, the one that panopticapi looks at
    for g, segment in truth.items():
        if segment.get("iscrowd", 0):
            crowd[segment["category_id"]] = g
        elif g not in matched_truth:
            _add(counts.fn, segment["category_id"], 1)
    for p, segment in predicted.items():
        category = segment["category_id"]
        ignored = overlap.get((VOID, p), 0)
        if category in crowd:
            ignored += overlap.get((crowd[category], p), 0)
        if p not in matched_predictions and ignored / pred_area[p] <= 0.5:
            _add(counts.fp, category, 1)
    return counts


def pq_summary(
    counts: Iterable[PQCounts], categories: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Panoptic quality over images, as fractions.

    Args:
        counts: one per image.
        categories: dicts ``id, isthing`` (1 or 0).

    Returns:
        ``PQ, SQ, RQ, n`` (number of categories that occur) and the same with ``_th`` and ``_st``:
        means over the categories with TP + FP + FN > 0, NaN if there are none; and the three
        scores per category id (0 for a category that does not occur).
    """
    per_image = list(counts)
    classes: dict[int, dict[str, float]] = {}
    occurs: dict[int, bool] = {}
    for category in (int(c["id"]) for c in categories):
        tp, fp, fn = (
            sum(getattr(c, name).get(category, 0) for c in per_image) for name in ("tp", "fp", "fn")
        )
        iou = math.fsum(c.iou.get(category, 0.0) for c in per_image)
        weight = tp + 0.5 * fp + 0.5 * fn
        occurs[category] = weight > 0
        classes[category] = {
            "PQ": iou / weight if weight else 0.0,
            "SQ": iou / tp if tp else 0.0,
            "RQ": tp / weight if weight else 0.0,
        }
    summary: dict[str, float] = {}
    for suffix, wanted in (("", (0, 1)), ("_th", (1,)), ("_st", (0,))):
        members = [int(c["id"]) for c in categories if int(c["isthing"]) in wanted]
        members = [category for category in members if occurs[category]]
        for name in ("PQ", "SQ", "RQ"):
            total = math.fsum(classes[category][name] for category in members)
            summary[name + suffix] = total / len(members) if members else math.nan
        summary["n" + suffix] = float(len(members))
    return summary, classes


def entity_ap(images: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Class-agnostic COCO mask AP (IoU .50:.05:.95, 101 points, 100 detections per image).

    Args:
        images: dicts ``truth`` (list of RLE dicts, ``counts`` bytes or str), ``crowd`` (list of
            bool, ignored truth), ``predictions`` (list of RLE dicts), ``scores`` (list of float).

    Returns:
        ``AP, AP50, AP75`` as fractions, 0 without predictions, NaN without truth; ``n`` entities.
    """
    n = sum(not crowd for image in images for crowd in image["crowd"])
    if n == 0:
        return {"AP": math.nan, "AP50": math.nan, "AP75": math.nan, "n": 0.0}
    if not any(len(image["scores"]) for image in images):
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "n": float(n)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
        precision = _coco_precision(images)  # (IoU thresholds, recalls)
    # pycocotools marks recalls without truth by -1; there is truth, so none is left.
    return {
        "AP": float(precision.mean()),
        "AP50": float(precision[0].mean()),
        "AP75": float(precision[5].mean()),
        "n": float(n),
    }


def _coco_precision(images: Sequence[dict[str, Any]]) -> np.ndarray:
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        for rle, crowd in zip(image["truth"], image["crowd"], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes id 0 for "unmatched"
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": rle,
                    "area": float(mask_api.area(rle)),
                    "iscrowd": int(crowd),
                }
            )
        for rle, score in zip(image["predictions"], image["scores"], strict=True):
            results.append(
                {"image_id": number, "category_id": 1, "segmentation": rle, "score": float(score)}
            )
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [_image_entry(number, image) for number, image in enumerate(images, start=1)],
        "categories": [{"id": 1, "name": "entity"}],
        "annotations": annotations,
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, 0, 0]


def _image_entry(number: int, image: dict[str, Any]) -> dict[str, int]:
    sizes = {tuple(rle["size"]) for rle in (*image["truth"], *image["predictions"])}
    if len(sizes) > 1:
        raise ValueError(
            f"image {image.get('image_id', number)}: masks of sizes {sorted(sizes)}: "
            "give truth and predictions at the original image size"
        )
    height, width = sizes.pop() if sizes else (1, 1)
    return {"id": number, "height": int(height), "width": int(width)}

"""Panoptic quality and class-agnostic entity AP, as pure functions (numpy and pycocotools)."""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOID = 0
"""Id of pixels that belong to no segment, in truth and prediction."""


def joint_counts(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of every pair of ids that two id images, int (H, W) in 0..2^31 - 1, show.

    Both are of one size. Returns pairs int64 (N, 2), each once, in ascending order, and counts
    int64 (N,).
    """
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
    """Segments by id, in the order of the list; ValueError if image and list name different ids.

    ``present`` are the ids that occur in the image, void maybe among them; void (0) and repeated
    ids of ``segments`` are refused. ``source`` is "truth" or "prediction", for the message.
    """
    by_id = {int(segment["id"]): segment for segment in segments}
    if len(by_id) != len(segments) or VOID in by_id:
        raise ValueError(
            f"image {image_id}: the {source}'s segments repeat an id or use {VOID}, which is void"
        )
    shown = {int(i) for i in present} - {VOID}
    for ids, side, absent in (
        (sorted(shown - by_id.keys()), "in its pixels", "its segments"),
        (sorted(by_id.keys() - shown), "among its segments", "its pixels"),
    ):
        if ids:
            raise ValueError(
                f"image {image_id}: the {source} has ids {ids} {side} but not in {absent}: "
                "write both from the same segmentation"
            )
    return by_id


@dataclass
class PQCounts:
    """What panoptic quality adds up, per category id: matched IoUs and numbers of segments."""

    iou: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    tp: Counter[int] = field(default_factory=Counter)
    fp: Counter[int] = field(default_factory=Counter)
    fn: Counter[int] = field(default_factory=Counter)

    def categories(self) -> set[int]:
        """Ids of the categories that occur."""
        return {*self.tp, *self.fp, *self.fn}


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
        image_id: for the messages.

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
    truth = check_segments(pairs[:, 0].tolist(), gt_segments, image_id, "truth")
    predicted = check_segments(pairs[:, 1].tolist(), pred_segments, image_id, "prediction")
    kinds = {int(category["id"]) for category in categories}
    for source, segments in (("truth", truth), ("prediction", predicted)):
        for segment_id, segment in segments.items():
            if segment.get("category_id") not in kinds:
                raise ValueError(
                    f"image {image_id}: {source} segment {segment_id} has unknown category_id "
                    f"{segment.get('category_id')}: take one of the {len(kinds)} known ids"
                )
    overlap = {(g, p): n for (g, p), n in zip(pairs.tolist(), pixels.tolist(), strict=True)}
    return _matched(truth, predicted, overlap)


def _matched(
    truth: dict[int, dict[str, Any]],
    predicted: dict[int, dict[str, Any]],
    overlap: dict[tuple[int, int], int],
) -> PQCounts:
    """The counts, from segments by id and the pixels of each (truth id, predicted id)."""
    gt_area, pred_area = Counter[int](), Counter[int]()
    for (g, p), n in overlap.items():
        gt_area[g] += n
        pred_area[p] += n
    counts = PQCounts()
    matched: set[tuple[str, int]] = set()
    for (g, p), n in overlap.items():
        if g == VOID or p == VOID or truth[g].get("iscrowd", 0):
            continue
        category = truth[g]["category_id"]
        if category != predicted[p]["category_id"]:
            continue
        union = pred_area[p] + truth[g].get("area", gt_area[g]) - n - overlap.get((VOID, p), 0)
        if n / union > 0.5:  # at most one partner can pass, so no assignment is needed
            counts.tp[category] += 1
            counts.iou[category] += n / union
            matched |= {("truth", g), ("prediction", p)}
    crowd = {}  # a category's last crowd segment, the one that panopticapi looks at
    for g, segment in truth.items():
        if segment.get("iscrowd", 0):
            crowd[segment["category_id"]] = g
        elif ("truth", g) not in matched:
            counts.fn[segment["category_id"]] += 1
    for p, segment in predicted.items():
        # Void and crowd of its own category under a prediction are no proof that it is wrong.
        ignored = overlap.get((VOID, p), 0)
        if segment["category_id"] in crowd:
            ignored += overlap.get((crowd[segment["category_id"]], p), 0)
        if ("prediction", p) not in matched and ignored / pred_area[p] <= 0.5:
            counts.fp[segment["category_id"]] += 1
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
    images = list(counts)
    classes: dict[int, dict[str, float]] = {}
    occurring: set[int] = set()
    for category in (int(c["id"]) for c in categories):
        tp, fp, fn = (
            sum(getattr(c, name).get(category, 0) for c in images) for name in ("tp", "fp", "fn")
        )
        # fsum rounds once: the order of the images cannot change the sum.
        iou = math.fsum(c.iou.get(category, 0.0) for c in images)
        weight = tp + 0.5 * fp + 0.5 * fn
        if weight:
            occurring.add(category)
        classes[category] = {
            "PQ": iou / weight if weight else 0.0,
            "SQ": iou / tp if tp else 0.0,
            "RQ": tp / weight if weight else 0.0,
        }
    summary: dict[str, float] = {}
    for suffix, kinds in (("", (0, 1)), ("_th", (1,)), ("_st", (0,))):
        members = [int(c["id"]) for c in categories if int(c["isthing"]) in kinds]
        members = [category for category in members if category in occurring]
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

    Raises:
        ValueError: the masks of an image differ in size.
    """
    n = sum(not crowd for image in images for crowd in image["crowd"])
    names = ("AP", "AP50", "AP75")
    if n == 0 or not any(len(image["scores"]) for image in images):
        return {**dict.fromkeys(names, 0.0 if n else math.nan), "n": float(n)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
        precision = _coco_precision(images)
    # pycocotools marks recalls without truth by -1; there is truth, so none is left.
    means = (float(part.mean()) for part in (precision, precision[0], precision[5]))
    return {**dict(zip(names, means, strict=True)), "n": float(n)}


def _coco_precision(images: Sequence[dict[str, Any]]) -> np.ndarray:
    """Precision at (IoU thresholds, recalls), by pycocotools."""
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sizes: list[dict[str, int]] = []
    truths: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        masks = [*image["truth"], *image["predictions"]]
        shapes = {tuple(rle["size"]) for rle in masks} or {(1, 1)}
        if len(shapes) > 1:
            raise ValueError(
                f"image {image.get('image_id', number)}: masks of sizes {sorted(shapes)}: "
                "give truth and predictions at the original image size"
            )
        height, width = map(int, shapes.pop())
        sizes.append({"id": number, "height": height, "width": width})
        common = {"image_id": number, "category_id": 1}
        for rle, crowd in zip(image["truth"], image["crowd"], strict=True):
            # pycocotools takes id 0 for "unmatched".
            entry = {**common, "id": len(truths) + 1, "segmentation": rle, "iscrowd": int(crowd)}
            truths.append({**entry, "area": float(mask_api.area(rle))})
        for rle, score in zip(image["predictions"], image["scores"], strict=True):
            results.append({**common, "segmentation": rle, "score": float(score)})
    coco = COCO()
    coco.dataset = {"info": {}, "images": sizes, "annotations": truths}
    coco.dataset["categories"] = [{"id": 1, "name": "entity"}]
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, 0, 0]

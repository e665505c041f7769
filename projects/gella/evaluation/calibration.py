"""Picking the thresholds of inference on a validation split, and taking them from the file.

One pass over the split is enough: a threshold selects a prefix of a noun's entities in descending
score, so the pixel counts of all prefixes give the score of every threshold exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gella.evaluation.evaluators import GatheringEvaluator, to_array
from gella.evaluation.panoptic_quality import pq_counts, pq_summary
from gella.text.words import names_several
from gella.utils.io import file_hash, read_json

GRID = tuple(k / 100 for k in range(0, 100))
"""Association and "none of them" thresholds that are tried."""

PANOPTIC_GRID = tuple(k / 20 for k in range(0, 20))
"""Panoptic thresholds that are tried."""

KEYS = {
    "ASSOCIATION_THRESHOLD": float,
    "SINGULAR_ARGMAX": bool,
    "NONE_THRESHOLD": float,
    "PANOPTIC_THRESHOLD": float,
}
"""Keys of ``MODEL.GELLA`` that a calibration file may set."""

TAKE_ALL = {"ASSOCIATION_THRESHOLD": -1.0, "SINGULAR_ARGMAX": False, "NONE_THRESHOLD": 0.0}
"""Values of ``MODEL.GELLA`` by which every noun takes every entity: what the sweeps need to see."""


def candidates_of(
    sample: dict[str, Any], output: dict[str, Any], queries: str, snap: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What the nouns of an image chose from, out of an answer under ``TAKE_ALL``.

    Args:
        sample: mapped dict with ``entities_full``.
        output: ``grounding`` and ``instances``.
        queries, snap: ``MODEL.MASK_DECODER.QUERIES`` and ``MODEL.GELLA.SNAP``.

    Returns:
        masks bool (K, H, W) and association probabilities float64 (P, K).
    """
    entities, entries = sample["entities_full"], output["grounding"]
    drawn = to_array(output["instances"].pred_masks, bool)
    ids = sorted(entries[0]["entity_ids"]) if entries else []
    masks = np.zeros((len(ids), sample["height"], sample["width"]), bool)
    for k, number in enumerate(ids):
        if number < 0:  # a query that met no entity
            masks[k] = drawn[-number - 1]
        elif queries == "learned" and not snap:
            masks[k] = drawn[number - 1]
        else:
            index = entities.index_of(number)
            masks[k] = entities.union([index]) if snap else drawn[index]
    scores = np.zeros((len(entries), len(ids)))
    for row, entry in zip(scores, entries, strict=True):
        by_id = dict(zip(entry["entity_ids"], entry["scores"], strict=True))
        row[:] = [by_id[number] for number in ids]
    return masks, scores


class SelectionSweep(GatheringEvaluator):
    """Picks the keys that choose a noun's entities, on narratives or referring expressions.

    ``evaluate`` returns ``{"thresholds", "score", "before", "objective", "curve", "n"}`` on the
    main process, ``{}`` on the others. The objective is the mean IoU by pixel counts: of all
    grounded nouns (AR of the protocol "hard"), or of all expressions (gIoU), where expressions
    without a target exist the "none of them" threshold is picked too.
    """

    def __init__(self, options: Any, queries: str, referring: bool) -> None:
        """``options``: the node MODEL.GELLA in use; the model itself answers under ``TAKE_ALL``.

        ``queries``: MODEL.MASK_DECODER.QUERIES; ``referring``: expressions, not narratives.
        """
        super().__init__()
        self._options, self._queries, self._referring = options, queries, referring

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        masks, scores = candidates_of(sample, output, self._queries, self._options.SNAP)
        nouns = []
        # Nouns behind a cut of the caption got no row; they stay unfound at any threshold.
        for row, phrase in zip(scores, sample["phrases"], strict=False):
            if phrase["segment_ids"] or self._referring:
                target = self._truth.mask(sample, phrase["segment_ids"] or [])
                order = np.argsort(-row, kind="stable")
                counts = _prefix_counts(masks[order], target)
                nouns.append((row[order], *counts, names_several(phrase["text"])))
        return {"caption": sample["caption"], "nouns": nouns}

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pick; ValueError if there was nothing to pick on."""
        nouns = [noun for row in rows for noun in row["nouns"]]
        if not nouns:
            raise ValueError("calibration: the split has no grounded noun to pick thresholds on")
        table = _Prefixes(nouns, self._referring)
        best: tuple[float, dict[str, Any]] = (-1.0, {})
        curve: dict[str, list[float]] = {}
        for argmax in (False, True):
            scores = [table.mean_iou(t, argmax, 0.0) for t in GRID]
            curve[f"singular_argmax {argmax}"] = scores
            # The plain rule wins ties: fewer rules are easier to trust.
            if max(scores) > best[0]:
                picked = {"ASSOCIATION_THRESHOLD": _middle(GRID, scores), "SINGULAR_ARGMAX": argmax}
                best = max(scores), picked
        score, picked = best
        picked["NONE_THRESHOLD"] = 0.0
        if self._referring and bool((table.unions[:, 0] == 0).any()):
            rule = picked["ASSOCIATION_THRESHOLD"], bool(picked["SINGULAR_ARGMAX"])
            curve["none"] = [table.mean_iou(*rule, none) for none in GRID]
            picked["NONE_THRESHOLD"] = _middle(GRID, curve["none"])
            score = max(curve["none"])
        now = self._options
        before = table.mean_iou(now.ASSOCIATION_THRESHOLD, now.SINGULAR_ARGMAX, now.NONE_THRESHOLD)
        return {
            "thresholds": picked,
            "objective": "gIoU" if self._referring else "AR, protocol hard",
            "score": 100 * score,
            "before": 100 * before,
            "n": len(nouns),
            "grid": list(GRID),
            "curve": {name: [100 * s for s in scores] for name, scores in curve.items()},
        }


def _prefix_counts(masks: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union with the target of the first 0, 1, 2, ... masks: (K + 1,) each."""
    first = np.full(target.shape, len(masks), np.int64)  # the first mask that has the pixel
    for k in range(len(masks) - 1, -1, -1):
        first[masks[k]] = k
    inter, area = (
        np.append(0, np.cumsum(np.bincount(pixels, minlength=len(masks) + 1)[: len(masks)]))
        for pixels in (first[target], first.reshape(-1))
    )
    return inter, area - inter + int(np.count_nonzero(target))


class _Prefixes:
    """Prefix counts of all nouns, padded to one table."""

    def __init__(self, nouns: list[tuple], referring: bool) -> None:
        width = max(len(noun[0]) for noun in nouns)
        # Padding scores -1, under every threshold, and its union of 1 divides safely.
        self.scores = np.full((len(nouns), width), -1.0)
        self.unions = np.ones((len(nouns), width + 1), np.int64)
        inters = np.zeros_like(self.unions)
        self.counts = np.array([len(noun[0]) for noun in nouns])
        self.several = np.array([noun[3] for noun in nouns], bool)
        for k, (scores, inter, union, _) in enumerate(nouns):
            self.scores[k, : len(scores)] = scores
            inters[k, : len(inter)], self.unions[k, : len(union)] = inter, union
        nothing = 1.0 if referring else 0.0  # what an empty answer to an empty target is worth
        self._ious = np.where(self.unions == 0, nothing, inters / np.maximum(self.unions, 1))

    def mean_iou(self, threshold: float, argmax: bool, none: float) -> float:
        """Mean IoU of the rule of ``postprocessing.ground_phrases``."""
        sizes = np.maximum((self.scores > threshold).sum(axis=1), 1)
        if argmax:
            sizes = np.where(self.several, sizes, 1)
        best = self.scores.max(axis=1, initial=-1.0)
        sizes = np.where((self.counts == 0) | (best < none), 0, sizes)
        chosen = np.take_along_axis(self._ious, sizes[:, None], axis=1)
        return math.fsum(chosen[:, 0]) / len(chosen)


def _middle(grid: Sequence[float], scores: Sequence[float]) -> float:
    """The middle of the thresholds with the best score: as far as can be from either edge."""
    best = [k for k, score in enumerate(scores) if score == max(scores)]
    return grid[best[len(best) // 2]]


class PanopticSweep(GatheringEvaluator):
    """Picks ``PANOPTIC_THRESHOLD`` by PQ; ``evaluate`` returns what `SelectionSweep` does.

    The model has to answer as for the task "ground", where each category's scores come back.
    """

    def __init__(
        self,
        options: Any,
        queries: str,
        categories: Sequence[dict[str, Any]],
        paint: Callable[..., tuple[Any, list[dict[str, Any]]]],
    ) -> None:
        """``options`` and ``queries`` as of `SelectionSweep`, ``categories`` with id and isthing.

        ``paint``: (scores, masks, phrases, threshold) -> ids (H, W) and segments, the rule of
        ``postprocessing.panoptic_from_scores`` on arrays.
        """
        super().__init__()
        self._options, self._queries = options, queries
        self._categories, self._paint = list(categories), paint
        self._tried = sorted({*PANOPTIC_GRID, float(options.PANOPTIC_THRESHOLD)})

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        """Paint and count at every threshold."""
        truth = self._truth(sample)
        masks, scores = candidates_of(sample, output, self._queries, self._options.SNAP)
        counts = []
        for threshold in self._tried:
            ids, segments = self._paint(scores, masks, sample["phrases"], threshold)
            answer = (to_array(ids, np.int32), segments)
            image_id = sample["image_id"]
            counts.append(pq_counts(truth.ids, truth.segments, *answer, self._categories, image_id))
        return {"counts": counts}

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pick; ValueError if there was nothing to pick on."""
        if not rows:
            raise ValueError("calibration: the split has no image to pick thresholds on")
        by_threshold = zip(*(row["counts"] for row in rows), strict=True)
        scores = [100 * pq_summary(counts, self._categories)[0]["PQ"] for counts in by_threshold]
        if not math.isfinite(max(scores)):
            raise ValueError("calibration: no image of the split has a segment that PQ counts")
        return {
            "thresholds": {"PANOPTIC_THRESHOLD": _middle(self._tried, scores)},
            "objective": "PQ",
            "score": max(scores),
            "before": scores[self._tried.index(float(self._options.PANOPTIC_THRESHOLD))],
            "n": len(rows),
            "grid": self._tried,
            "curve": {"panoptic": scores},
        }


def read_calibration(path: str | Path, weights: str) -> dict[str, Any]:
    """A file of ``tools/calibrate.py`` for these weights: ``thresholds``, ``datasets``, ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no calibration, sets another key, or was made for other weights.
    """
    content = read_json(path, "TEST.CALIBRATION", "run tools/calibrate.py")
    try:
        picked = {name: KEYS[name](value) for name, value in content["thresholds"].items()}
        made_for, _ = content["weights_sha256"], content["datasets"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"TEST.CALIBRATION {path} is no calibration ({error!r})") from error
    # By content, not by name: thresholds fit the weights they were picked for and no others.
    given = file_hash(weights)
    if made_for != given:
        raise ValueError(
            f"TEST.CALIBRATION {path} is of weights with SHA-256 {made_for[:12]}..., but {weights} "
            f"has {given[:12] or 'none'}...: run tools/calibrate.py for these weights"
        )
    return {**content, "thresholds": picked}

"""Panoptic narrative grounding: average recall, its oracle and blind baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gella.entities.rle import encode_mask
from gella.evaluation import metrics
from gella.evaluation.base import GatheringEvaluator, percent, sized_mask
from gella.evaluation.png_form import png_form
from gella.evaluation.truth import Truth
from gella.utils.io import write_json


def match_grounding(
    phrases: Sequence[dict[str, Any]], grounding: Sequence[dict[str, Any]]
) -> list[dict[str, Any] | None]:
    """Give each reference phrase its predicted entry, or None.

    With the nouns given, the lists agree one to one. With extracted nouns, a phrase takes the
    first unused entry of the same normalised text.
    """
    if [p["text"] for p in phrases] == [g["phrase"] for g in grounding]:
        return list(grounding)
    unused = list(grounding)
    matched: list[dict[str, Any] | None] = []
    for phrase in phrases:
        name = metrics.normalize_noun(phrase["text"])
        hits = (i for i, g in enumerate(unused) if metrics.normalize_noun(g["phrase"]) == name)
        place = next(hits, None)
        matched.append(None if place is None else unused.pop(place))
    return matched


class PNGEvaluator(GatheringEvaluator):
    """Average recall of narrative grounding (task "png"), its oracle and three blind baselines.

    A unit is a phrase with at least one segment id; its truth is the union of its segments at the
    original size, crowd segments included. ``protocol`` is one of ``metrics.PROTOCOLS`` and is
    reported as ``protocol_<name>``: 1. Under "official" the oracle's union is chosen by pixel
    counts and then scored by the soft IoU, like the rest.

    Writes ``png_predictions.json``, from which everything can be scored again: per narrative the
    scored ``nouns`` with IoUs and predicted masks, and as ``others`` what else the model grounded;
    and ``png_form.json``, the benchmark's own form with the predicted entities' ids.
    """

    file_name = "png_predictions.json"
    baselines = ("oracle", "random", "largest", "all")

    def __init__(self, output_folder: str | Path | None = None, protocol: str = "hard") -> None:
        """``protocol``: "hard", "official" or "flmm" (docs/FORMATS.md 2)."""
        self._protocol = metrics.check_protocol(protocol)
        super().__init__(output_folder)

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        truth, entities = self._truth(sample), sample["entities_full"]
        if entities.ids.shape != truth.ids.shape:
            raise ValueError(
                f"image {sample['image_id']}: entities of size {entities.ids.shape}, truth "
                f"{truth.ids.shape}: give entity masks at the original image size"
            )
        overlap = _overlap(truth, entities)
        nouns, phrases, answered = [], sample["phrases"], output["grounding"]
        others = {id(entry): place for place, entry in enumerate(answered)}
        for k, found in enumerate(match_grounding(phrases, answered)):
            if not phrases[k]["segment_ids"]:
                continue  # an ungrounded noun is not scored
            noun = {
                name: phrases[k][name]
                for name in ("text", "start", "end", "segment_ids", "is_thing", "is_plural")
            }
            noun.update(self._baseline_ious(truth, entities, overlap, phrases[k], sample, k))
            noun["iou"] = 0.0
            if found is not None:
                mask = sized_mask(found["mask"], sample)
                target = truth.mask(phrases[k]["segment_ids"])
                noun["iou"] = metrics.noun_iou(mask, target, self._protocol)
                noun.update(_entry(found, mask), place=others.pop(id(found)))
            nouns.append(noun)
        return {
            "caption": sample["caption"],
            "text": output.get("text"),
            "nouns": nouns,
            "others": [
                {**_entry(answered[k], sized_mask(answered[k]["mask"], sample)), "place": k}
                for k in others.values()
            ],
            "n_ungrounded": len(phrases) - len(nouns),
            "aligned": all(phrase["start"] >= 0 for phrase in phrases),
        }

    def _baseline_ious(self, truth, entities, overlap, phrase, sample, k) -> dict[str, float]:
        rows = sorted({i + 1 for i in truth.indices(phrase["segment_ids"])})
        inter, areas = overlap[rows, 1:].sum(axis=0), overlap[:, 1:].sum(axis=0)
        area = int(overlap[rows].sum())
        chosen = metrics.blind_choices(areas, sample["image_id"], k)
        chosen["oracle"] = metrics.best_union(inter, areas, area)[1]
        ious = {}
        for name in self.baselines:
            members = chosen[name]
            if self._protocol == "official":
                target = truth.mask(phrase["segment_ids"])
                ious[name] = metrics.noun_iou(entities.union(members), target, "official")
                continue
            both = int(inter[members].sum())
            union = area + int(areas[members].sum()) - both
            ious[name] = metrics.ratio_iou(both, union, self._protocol)
        return ious

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        used = [row for row in rows if row["nouns"]]
        if self._protocol == "official":  # the benchmark leaves out captions it cannot align
            used = [row for row in used if row["aligned"]]
        nouns = [noun for row in used for noun in row["nouns"]]
        results = self._summary(nouns, "iou")
        for name in self.baselines:
            summary = self._summary(nouns, name)
            results.update({f"{name}_{k}": v for k, v in summary.items() if k.startswith("AR")})
        results["n_captions"] = float(len(used))
        results["n_captions_left_out"] = float(len(rows) - len(used))
        results["n_ungrounded"] = float(sum(row["n_ungrounded"] for row in used))
        results["n_others"] = float(sum(len(row["others"]) for row in used))
        results["n_without_prediction"] = float(sum("segmentation" not in n for n in nouns))
        results["n_thresholds"] = float(metrics.NUM_THRESHOLDS)
        results[f"protocol_{self._protocol}"] = 1.0
        return {"png": results}

    def _payload(self, rows: list[dict[str, Any]], results: dict[str, Any]) -> Any:
        if self._folder is not None:
            write_json(self._folder / "png_form.json", [png_form(row) for row in rows])
        return super()._payload(rows, results)

    def _summary(self, nouns: list[dict[str, Any]], key: str) -> dict[str, float]:
        units = [
            metrics.NounUnit(
                n[key], bool(n["is_thing"]), len(set(n["segment_ids"])), n["is_plural"]
            )
            for n in nouns
        ]
        return percent(metrics.png_summary(units, self._protocol))


def _entry(found: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """One entry of an answer's grounding, in values that JSON takes."""
    return {
        "answer": found["phrase"],
        "entity_ids": [int(i) for i in found["entity_ids"]],
        "scores": [float(score) for score in found["scores"]],
        "segmentation": encode_mask(mask),
    }


def _overlap(truth: Truth, entities: Any) -> np.ndarray:
    """Pixels of each (annotated segment, entity) pair, int64 (S + 1, E + 1); 0 is neither."""
    shape = (truth.regions.num_entities + 1, entities.num_entities + 1)
    keys = truth.regions.ids.astype(np.int64) * shape[1] + entities.ids
    return np.bincount(keys.reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)

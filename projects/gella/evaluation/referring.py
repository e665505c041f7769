"""Masks of referring expressions, with targets and without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gella.entities.rle import encode_mask
from gella.evaluation import metrics
from gella.evaluation.base import GatheringEvaluator, percent, sized_mask


class ReferringEvaluator(GatheringEvaluator):
    """cIoU, gIoU and P@t of referring expressions (task "refer"), one expression per sample.

    An expression may have no target (no segment ids): its IoU is 1 if nothing is predicted and 0
    otherwise. ``N_acc`` is the share of such expressions that got no mask, ``T_acc`` the share of
    the others that got one.
    """

    file_name = "referring_predictions.json"

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        if len(sample["phrases"]) != 1:
            raise ValueError(
                f"image {sample['image_id']}: {len(sample['phrases'])} phrases in a referring "
                "sample, expected 1: map the dataset for the task 'refer'"
            )
        phrase = sample["phrases"][0]
        target = sized_mask(self._truth.mask(sample, phrase["segment_ids"] or []), sample)
        masks = [sized_mask(entry["mask"], sample) for entry in output["grounding"][:1]]
        mask = masks[0] if masks else np.zeros_like(target)
        return {
            "phrase": phrase["text"],
            **{key: phrase[key] for key in ("ref_id", "sent_id") if key in phrase},
            "entity_ids": [
                int(i) for e in output["grounding"][:1] for i in e.get("entity_ids", ())
            ],
            "scores": [float(s) for e in output["grounding"][:1] for s in e.get("scores", ())],
            "target": int(np.count_nonzero(target)),
            "predicted": int(np.count_nonzero(mask)),
            "intersection": int(np.count_nonzero(mask & target)),
            "union": int(np.count_nonzero(mask | target)),
            "segmentation": encode_mask(mask),
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        summary = metrics.cumulative_iou(
            [row["intersection"] for row in rows], [row["union"] for row in rows]
        )
        for name, empty in (("N_acc", True), ("T_acc", False)):
            found = [row["predicted"] == 0 for row in rows if (row["target"] == 0) == empty]
            right = sum(is_empty == empty for is_empty in found)
            summary[name] = right / len(found) if found else math.nan
        summary["n_no_target"] = float(sum(row["target"] == 0 for row in rows))
        return {"refer": percent(summary)}

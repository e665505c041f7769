"""Class-agnostic AP of the entity masks that the decoder draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gella.entities.rle import encode_mask
from gella.evaluation import panoptic_quality as metrics_panoptic
from gella.evaluation.base import GatheringEvaluator, percent, sized_mask


class EntityAPEvaluator(GatheringEvaluator):
    """Class-agnostic mask AP of the reconstructed entities before snapping (task "entity").

    Each image counts once, however many captions it has. Writes COCO results form.
    """

    file_name = "entity_predictions.json"

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._seen: set[Any] = set()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take a batch; an image that was seen is passed over."""
        for sample, output in zip(inputs, outputs, strict=True):
            if sample["image_id"] not in self._seen:
                self._seen.add(sample["image_id"])
                super().process([sample], [output])

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        truth, instances = self._truth(sample), output["instances"]
        return {
            "truth": truth.regions.to_rle(),
            "crowd": [bool(segment.get("iscrowd", 0)) for segment in truth.segments],
            "predictions": [encode_mask(sized_mask(mask, sample)) for mask in instances.pred_masks],
            "scores": [float(score) for score in instances.scores],
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        unique = list({row["image_id"]: row for row in rows}.values())
        # Predictions of one score rank by their image: in pycocotools' order, by number.
        unique.sort(key=lambda row: str(row["image_id"]).zfill(20))
        return {"entity": percent(metrics_panoptic.entity_ap(unique))}

    def _payload(self, rows: list[dict[str, Any]], results: dict[str, Any]) -> Any:
        return [
            {"image_id": row["image_id"], "category_id": 1, "segmentation": rle, "score": score}
            for row in rows
            for rle, score in zip(row["predictions"], row["scores"], strict=True)
        ]

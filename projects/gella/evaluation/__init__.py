"""Detectron2 evaluators over ``metrics``: what a model answered, against the annotation.

Each evaluator compares mapped test inputs (with ``entities_full``, ``phrases``, ``annotation``)
with the model's outputs, image by image; ``evaluate`` gathers the rows of all processes, sorts
them, and returns ``{task: {metric: score}}`` in percent on the main process, ``{}`` on the others.
Sums are exact or correctly rounded, so results depend neither on batches nor on processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from PIL import Image

from gella import metrics, metrics_panoptic
from gella.entities import id_to_rgb
from gella.evaluation.base import (
    GatheringEvaluator,
    encode_mask,
    percent,
    sized_mask,
    to_array,
)
from gella.evaluation.png import PNGEvaluator
from gella.evaluation.results import format_results, save_results

__all__ = [
    "EVALUATORS",
    "EntityAPEvaluator",
    "NounExtractionEvaluator",
    "PNGEvaluator",
    "PanopticEvaluator",
    "ReferringEvaluator",
    "build_evaluator",
    "format_results",
    "save_results",
]


class PanopticEvaluator(GatheringEvaluator):
    """Panoptic quality (task "panoptic_seg"), equal to panopticapi's, which is not needed.

    Reports PQ, SQ, RQ and the number of categories, the same with ``_th`` and ``_st``, and
    ``PQ-<name>`` for each category that occurs. Writes the predictions in COCO's panoptic form:
    ``panoptic_predictions.json`` and PNGs in ``panoptic_predictions/``.
    """

    file_name = "panoptic_predictions.json"

    def __init__(
        self, categories: Sequence[dict[str, Any]], output_folder: str | Path | None = None
    ) -> None:
        """``categories``: dicts ``id`` (the dataset's), ``name``, ``isthing``."""
        self._categories = list(categories)
        super().__init__(output_folder)

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        truth = self._truth(sample)
        ids = to_array(output["panoptic_seg"][0], np.int32)
        segments = [dict(segment) for segment in output["panoptic_seg"][1]]
        counts = metrics_panoptic.pq_counts(
            truth.ids, truth.segments, ids, segments, self._categories, sample["image_id"]
        )
        name = Path(sample["annotation"]["file_name"]).stem + ".png"
        if self._folder is not None:
            _write_png(self._folder / "panoptic_predictions" / name, ids)
        return {"file_name": name, "segments_info": segments, "counts": counts}

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        summary, classes = metrics_panoptic.pq_summary(
            [row["counts"] for row in rows], self._categories
        )
        results = percent(summary)
        seen = {c for row in rows for c in row["counts"].categories()}
        for category in self._categories:
            if category["id"] in seen:
                results[f"PQ-{category['name']}"] = 100 * classes[category["id"]]["PQ"]
        results["n_images"] = float(len(rows))
        return {"panoptic_seg": results}

    def _payload(self, rows: list[dict[str, Any]], results: dict[str, Any]) -> Any:
        kept = ("image_id", "file_name", "segments_info")
        return {"annotations": [{k: row[k] for k in kept} for row in rows], "results": results}


def _write_png(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    Image.fromarray(id_to_rgb(ids)).save(temporary, format="PNG")
    os.replace(temporary, path)


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
        return {"entity": percent(metrics_panoptic.entity_ap(unique))}

    def _payload(self, rows: list[dict[str, Any]], results: dict[str, Any]) -> Any:
        return [
            {"image_id": row["image_id"], "category_id": 1, "segmentation": rle, "score": score}
            for row in rows
            for rle, score in zip(row["predictions"], row["scores"], strict=True)
        ]


class NounExtractionEvaluator(GatheringEvaluator):
    """Recall and precision of the nouns in generated answers (task "nouns").

    The reference is every phrase of the caption, ungrounded ones too. The answer's nouns are those
    that the model parsed out of its text and grounded (``grounding``).
    """

    file_name = "noun_predictions.json"

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        return {
            "caption": sample["caption"],
            "text": output["text"],
            "reference": [phrase["text"] for phrase in sample["phrases"]],
            "found": [entry["phrase"] for entry in output["grounding"]],
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        hits = [metrics.noun_recall(row["reference"], row["found"])[0] for row in rows]
        n, n_found = (sum(len(row[key]) for row in rows) for key in ("reference", "found"))
        scores = {
            "recall": sum(hits) / n if n else math.nan,
            "precision": sum(hits) / n_found if n_found else 0.0,
            "n": float(n),
            "n_found": float(n_found),
            "n_captions": float(len(rows)),
        }
        return {"nouns": percent(scores)}


class ReferringEvaluator(GatheringEvaluator):
    """cIoU, gIoU and P@t of referring expressions (task "refer"), one expression per sample."""

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
            "intersection": int(np.count_nonzero(mask & target)),
            "union": int(np.count_nonzero(mask | target)),
            "segmentation": encode_mask(mask),
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        summary = metrics.cumulative_iou(
            [row["intersection"] for row in rows], [row["union"] for row in rows]
        )
        return {"refer": percent(summary)}


Factory = Callable[[Any, str, str], DatasetEvaluator]
"""(cfg, dataset name, output folder) -> evaluator."""

EVALUATORS: dict[str, list[Factory]] = {
    "png": [lambda cfg, _, folder: PNGEvaluator(folder, cfg.TEST.PNG_PROTOCOL)],
    "coco_panoptic_seg": [
        lambda _, name, folder: PanopticEvaluator(MetadataCatalog.get(name).categories, folder),
        lambda _, __, folder: EntityAPEvaluator(folder),
    ],
    "noun_extraction": [lambda _, __, folder: NounExtractionEvaluator(folder)],
    "refcoco": [lambda _, __, folder: ReferringEvaluator(folder)],
}
"""Evaluators per ``evaluator_type`` of a dataset's metadata; add an entry to plug in your own."""


def build_evaluator(cfg: Any, dataset_name: str, output_folder: str) -> DatasetEvaluators:
    """All evaluators of a dataset's ``evaluator_type``.

    Raises:
        KeyError: the metadata has no type that ``EVALUATORS`` knows.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise KeyError(
            f"dataset {dataset_name}: no evaluator for evaluator_type {kind!r}: set it to one of "
            f"{', '.join(sorted(EVALUATORS))} or add it to gella.evaluation.EVALUATORS"
        )
    return DatasetEvaluators([make(cfg, dataset_name, output_folder) for make in EVALUATORS[kind]])

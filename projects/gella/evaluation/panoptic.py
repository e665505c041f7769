"""Panoptic quality, by our own counts and by Detectron2's evaluator where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator

from gella.entities.files import write_id_png
from gella.evaluation import panoptic_quality as metrics_panoptic
from gella.evaluation.base import GatheringEvaluator, percent, to_array


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
            write_id_png(self._folder / "panoptic_predictions" / name, ids)
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


class Detectron2PanopticEvaluator(DatasetEvaluator):
    """Detectron2's ``COCOPanopticEvaluator`` on the same outputs (task "panoptic_seg_detectron2").

    It calls panopticapi, and takes category ids of the dataset as they are where a segment does not
    say whether it is a thing; ours do say, so this is left out for it. ``file_name`` of the inputs
    is the image's; the annotation's PNG must have its stem, as in COCO.
    """

    def __init__(self, dataset_name: str, output_folder: str | Path | None = None) -> None:
        """The dataset's metadata needs ``panoptic_json``, ``panoptic_root`` and the id tables.

        Raises:
            ValueError: this Detectron2 has no such evaluator, or panopticapi is missing.
        """
        try:
            import panopticapi  # noqa: F401
            from detectron2.evaluation import COCOPanopticEvaluator
        except ImportError as error:
            raise ValueError(
                f"TEST.DETECTRON2_PANOPTIC needs the full Detectron2 and panopticapi ({error}); "
                "install both, or set it to False: the project's own PQ needs neither"
            ) from error
        folder = str(Path(output_folder) / "detectron2") if output_folder else None
        self._evaluator = COCOPanopticEvaluator(dataset_name, folder)

    def reset(self) -> None:
        """Forget all samples."""
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take a batch of mapped dicts and the model's outputs; neither is changed."""
        kept = ("id", "category_id")
        plain = [
            {"panoptic_seg": (ids, [{key: segment[key] for key in kept} for segment in segments])}
            for ids, segments in (output["panoptic_seg"] for output in outputs)
        ]
        self._evaluator.process(inputs, plain)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score all samples of all processes; every process must call this."""
        results = self._evaluator.evaluate() or {}
        return {f"{task}_detectron2": dict(scores) for task, scores in results.items()}

"""What all evaluators share: rows per sample, gathered over processes, sorted and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from gella.evaluation.truth import TruthReader
from gella.utils.io import write_json


def percent(summary: dict[str, float]) -> dict[str, float]:
    """Fractions to percent; counts (``n``, ``n_...``) stay."""
    return {k: v if k.split("_")[0] == "n" else 100 * v for k, v in summary.items()}


def to_array(value: Any, dtype: Any) -> np.ndarray:
    """A tensor on any device, or an array, as a numpy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=dtype)


def sized_mask(mask: Any, sample: dict[str, Any]) -> np.ndarray:
    """A predicted mask as bool (H, W); ValueError if it is not of the original image size."""
    array, size = to_array(mask, bool), (sample["height"], sample["width"])
    if array.shape != size:
        raise ValueError(
            f"image {sample['image_id']}: predicted mask of size {array.shape}, image {size}: "
            "predict at the original image size"
        )
    return array


class GatheringEvaluator(DatasetEvaluator):
    """Rows per sample, gathered and written; subclasses give ``_row`` and ``_score``."""

    file_name = "predictions.json"

    def __init__(self, output_folder: str | Path | None = None) -> None:
        """``output_folder``: where predictions are written; None writes nothing."""
        self._folder = Path(output_folder) if output_folder else None
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._rows: list[dict[str, Any]] = []
        self._truth = TruthReader()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take a batch of mapped dicts and the model's outputs for them, in the same order."""
        for sample, output in zip(inputs, outputs, strict=True):
            row = self._row(sample, output)
            self._rows.append({"image_id": sample["image_id"], **row})

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score all samples of all processes; every process must call this."""
        gathered = comm.gather(self._rows, dst=0)
        if not comm.is_main_process():
            return {}
        rows = sorted((row for part in gathered for row in part), key=_order)
        results = self._score(rows)
        if self._folder is not None:
            write_json(self._folder / self.file_name, self._payload(rows, results))
        return results

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        raise NotImplementedError

    def _payload(self, rows: list[dict[str, Any]], results: dict[str, Any]) -> Any:
        return {"results": results, "predictions": rows}


def _order(row: dict[str, Any]) -> tuple[str, ...]:
    """The same order whatever process saw which sample."""
    keys = ("caption", "phrase", "ref_id", "sent_id")
    return (str(row["image_id"]), *(str(row.get(key, "")) for key in keys))

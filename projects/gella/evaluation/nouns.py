"""Which nouns a generated answer names, against the reference."""

from __future__ import annotations

import math
from typing import Any

from gella.evaluation import metrics
from gella.evaluation.base import GatheringEvaluator, percent


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

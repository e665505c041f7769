"""Compare results of the predictor with each other and with the model's own."""

from __future__ import annotations

from typing import Any

import torch
from tiny_gella import same_result


def as_evaluated(result: Any) -> dict[str, Any]:
    """A result in the form of the model's own."""
    if hasattr(result, "phrases"):
        return {"grounding": result.phrases}
    if hasattr(result, "segments_info"):
        segments = [dict(segment) for segment in result.segments_info]
        return {"panoptic_seg": (torch.as_tensor(result.ids), segments)}
    return {"text": result}


def same_answers(one: Any, other: Any) -> None:
    same_result(as_evaluated(one), as_evaluated(other))

"""From what the model says to the predictor's typed results."""

from __future__ import annotations

from typing import Any

import numpy as np

from gella.pictures.grounding import Grounding, PanopticResult
from gella.predictor.questions import Question
from gella.predictor.scene import Scene

Result = Grounding | PanopticResult | str | list[str]
"""Of "ground" and "refer", "panoptic", "describe", "extract"."""


def to_grounding(
    cfg: Any,
    config_file: str,
    scene: Scene,
    question: Question,
    result: dict[str, Any],
    num_cut: int,
) -> Grounding:
    """The result of "ground" or "refer".

    Args:
        cfg: the predictor's config; config_file: its file.
        scene, question: what was asked.
        result: the model's, with ``grounding``.
        num_cut: so many of the question's phrases, the last ones, were cut from the caption.
    """
    model, phrases = cfg.MODEL, question.phrases
    return Grounding(
        image=scene.image,
        caption=question.caption,
        entities=scene.entities,
        phrases=result["grounding"],
        colormap=scene.colormap,
        task=question.task,
        own_masks=model.MASK_DECODER.QUERIES == "learned" and not model.GELLA.SNAP,
        cut_nouns=[phrase["text"] for phrase in phrases[len(phrases) - num_cut :]],
        config=config_file,
        weights=model.WEIGHTS,
    )


def to_panoptic(
    cfg: Any, config_file: str, scene: Scene, question: Question, result: dict[str, Any]
) -> PanopticResult:
    """The result of "panoptic"; arguments as for :func:`to_grounding`."""
    ids, segments_info = result["panoptic_seg"]
    return PanopticResult(
        image=scene.image,
        ids=np.asarray(ids.cpu(), dtype=np.int32),
        segments_info=segments_info,
        categories=question.categories,
        weights=cfg.MODEL.WEIGHTS,
        config=config_file,
    )

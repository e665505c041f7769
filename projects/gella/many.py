"""Many requests at once: one scene per picture, several pictures and questions per pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gella.answers import Result
from gella.questions import TASKS, Request


def answer_requests(
    predictor: Any,
    requests: Sequence[Request],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[Result | Exception]:
    """Answer requests; see :meth:`gella.predictor.GellaPredictor.predict_many`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    results: list[Result | Exception] = []
    for request in requests:
        try:
            results.append(_single(predictor, request))
        except Exception as error:
            results.append(error)
        if progress is not None:
            progress(len(results), len(requests))
    return results


def _single(predictor: Any, request: Request) -> Result:
    scene = predictor.encode(
        request.image,
        request.entities,
        masks_format=request.masks_format,
        segments_info=request.segments_info,
        image_id=request.image_id,
    )
    if request.task == "ground":
        return predictor.ground(request.text, request.nouns, scene=scene)
    if request.task == "refer":
        return predictor.refer(request.text, scene=scene)
    if request.task == "panoptic":
        return predictor.panoptic(request.categories or [], scene=scene)
    if request.task == "describe":
        return predictor.describe(scene=scene)
    if request.task == "extract":
        return predictor.extract_nouns(request.text, scene=scene)
    raise ValueError(f"unknown task {request.task!r}; known: {', '.join(TASKS)}")

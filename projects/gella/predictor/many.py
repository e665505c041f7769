"""Many requests at once: one scene per picture, several pictures and questions per pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gella.predictor.answers import Result
from gella.predictor.engine import Asked, Engine
from gella.predictor.questions import (
    TASKS,
    Question,
    Request,
    caption_question,
    named_in,
    panoptic_question,
    referring_question,
    text_question,
)
from gella.predictor.scene import Scene
from gella.text import prompts

Outcome = Result | Exception


def answer_requests(
    engine: Engine,
    requests: Sequence[Request],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[Outcome]:
    """Answer requests; see :meth:`gella.predictor.GellaPredictor.predict_many`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    outcomes: list[Outcome] = []
    scenes: dict[tuple, Scene | Exception] = {}
    to_come = Counter(map(_key, requests))
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        keys = [_key(request) for request in batch]
        _add_scenes(engine, batch, scenes)
        outcomes += _answer_batch(engine, batch, [scenes[key] for key in keys])
        to_come.subtract(keys)
        scenes = {key: scene for key, scene in scenes.items() if to_come[key]}
        if progress is not None:
            progress(len(outcomes), len(requests))
    return outcomes


def _key(request: Request) -> tuple:
    """Equal for requests about one scene; objects count as equal only if they are the same."""

    def name(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return value if value is None or isinstance(value, (str, int)) else f"object {id(value)}"

    parts = (request.image, request.entities, request.image_id, request.segments_info)
    return (*map(name, parts), request.masks_format)


def _add_scenes(
    engine: Engine, batch: Sequence[Request], scenes: dict[tuple, Scene | Exception]
) -> None:
    """Encode the pictures of a batch that are new, together; failures are kept in their place."""
    read: dict[tuple, Scene] = {}
    for request in batch:
        key = _key(request)
        if key in scenes or key in read:
            continue
        try:
            read[key] = engine.read(
                request.image,
                request.entities,
                masks_format=request.masks_format,
                segments_info=request.segments_info,
                image_id=request.image_id,
            )
        except Exception as error:
            scenes[key] = error
    scenes.update(zip(read, _together(engine.encode, list(read.values()))))


def _answer_batch(
    engine: Engine, batch: Sequence[Request], scenes: Sequence[Scene | Exception]
) -> list[Outcome]:
    outcomes: dict[int, Any] = {}
    asked: dict[int, Asked] = {}

    def ask(place: int, make: Callable[..., Question], *args: Any) -> None:
        scene = scenes[place]
        try:
            if isinstance(scene, Exception):
                raise scene
            asked[place] = engine.ask(make(batch[place], *args), scene)
        except Exception as error:
            outcomes[place] = error

    for place in range(len(batch)):
        ask(place, _first_question)
    for task in ("describe", "extract"):
        places = [place for place, one in asked.items() if one.question.task == task]
        texts = _together(engine.write, [asked.pop(place) for place in places])
        for place, text in zip(places, texts):
            if isinstance(text, Exception) or batch[place].task == "describe":
                outcomes[place] = text
            elif batch[place].task == "extract":
                outcomes[place] = prompts.parse_nouns(text)
            else:
                ask(place, _question_with_nouns, prompts.parse_nouns(text))
    outcomes.update(zip(asked, _together(engine.find, list(asked.values()))))
    return [outcomes[place] for place in range(len(batch))]


def _first_question(request: Request) -> Question:
    if request.task == "ground" and request.nouns is None:
        return text_question("extract", request.text)
    if request.task == "ground":
        return caption_question(request.text, request.nouns or ())
    if request.task == "refer":
        return referring_question(request.text)
    if request.task == "panoptic":
        return panoptic_question(request.categories or ())
    if request.task in ("describe", "extract"):
        return text_question(request.task, request.text)
    raise ValueError(f"unknown task {request.task!r}; known: {', '.join(TASKS)}")


def _question_with_nouns(request: Request, found: list[str]) -> Question:
    return caption_question(request.text, named_in(request.text, found))


def _together(function: Callable[[list], list], items: list) -> list:
    """function(items), or, where that fails, function([item])[0] or its exception of each."""
    if not items:
        return []
    try:
        return function(items)
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [_together(function, [item])[0] for item in items]

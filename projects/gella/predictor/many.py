"""Many requests at once: one scene per picture, several pictures and questions per pass.

The workings of :meth:`gella.predictor.GellaPredictor.predict_many`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gella.pictures.grounding import Grounding, PanopticResult
from gella.predictor.scene import EntitiesLike, Scene


class Nouns(list[str]):
    """The nouns that a model extracted from a caption, in its order.

    Attributes:
        phrases: ``text``, ``start`` and ``end`` of each; -1 where it is not in the caption.
    """

    def __init__(self, phrases: Sequence[dict[str, Any]]) -> None:
        """Take the phrases of an answer."""
        super().__init__(phrase["text"] for phrase in phrases)
        self.phrases = phrases


Result = Grounding | PanopticResult | str | Nouns
"""Of "ground" and "refer", "panoptic", "describe", "extract"."""


@dataclass
class Request:
    """One question about one picture, for :meth:`GellaPredictor.predict_many`.

    Attributes:
        task: "ground", "refer", "panoptic", "describe" or "extract".
        image, entities, image_id, masks_format, segments_info: see
            :meth:`GellaPredictor.set_image`. Requests with the same image and entities (the same
            objects, or equal names) share one scene.
        text: the caption ("ground", "extract") or the expression ("refer").
        nouns: for "ground"; None: the model extracts them.
        phrases: for "ground", instead of nouns: as in :meth:`GellaPredictor.ground_phrases`.
        categories: for "panoptic".
        exclusive: for "ground", see :meth:`GellaPredictor.ground`.
    """

    task: str
    image: np.ndarray | str | Path
    entities: EntitiesLike
    text: str = ""
    nouns: Sequence[str] | None = None
    categories: Sequence[dict[str, Any] | str] | None = None
    image_id: int | str | None = None
    masks_format: str = "auto"
    segments_info: list[dict[str, Any]] | None = None
    phrases: Sequence[dict[str, Any]] | None = None
    exclusive: bool = False


def answer_requests(
    predictor: Any,
    requests: Sequence[Request],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[Result | Exception]:
    """Answer requests; see :meth:`gella.predictor.GellaPredictor.predict_many`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    outcomes: list[Result | Exception] = []
    scenes: dict[tuple, Scene | Exception] = {}
    to_come = Counter(map(_key, requests))
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        keys = [_key(request) for request in batch]
        read: dict[tuple, Scene] = {}
        for key, request in {k: r for k, r in zip(keys, batch) if k not in scenes}.items():
            names = ("image_id", "masks_format", "segments_info")
            options = {name: getattr(request, name) for name in names}
            try:
                read[key] = predictor._read(request.image, request.entities, **options)
            except Exception as error:  # kept in its place, for every request about this picture
                scenes[key] = error
        scenes.update(zip(read, _together(predictor._encode, list(read.values()))))
        outcomes += _answer_batch(predictor, batch, [scenes[key] for key in keys])
        # A scene holds the picture's features: kept only while a request to come is about it.
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


def _answer_batch(
    predictor: Any, batch: Sequence[Request], scenes: Sequence[Scene | Exception]
) -> list[Result | Exception]:
    outcomes: dict[int, Any] = {}
    asked: dict[int, Any] = {}

    def ask(place: int, nouns: Nouns | None = None) -> None:
        scene = scenes[place]
        try:
            if isinstance(scene, Exception):
                raise scene
            asked[place] = predictor._ask_for(batch[place], scene, nouns)
        except Exception as error:
            outcomes[place] = error

    for place in range(len(batch)):
        ask(place)
    # Texts first: nouns that the model extracts are grounded in one pass with the given ones.
    for task in ("describe", "extract"):
        places = [place for place, one in asked.items() if one.question.task == task]
        answers = _together(predictor._write, [asked.pop(place) for place in places])
        for place, answer in zip(places, answers):
            if isinstance(answer, Exception):
                outcomes[place] = answer
            elif batch[place].task == "describe":
                outcomes[place] = answer["text"]
            elif batch[place].task == "extract":
                outcomes[place] = Nouns(answer["phrases"])
            else:
                ask(place, Nouns(answer["phrases"]))
    outcomes.update(zip(asked, _together(predictor._find, list(asked.values()))))
    return [outcomes[place] for place in range(len(batch))]


def _together(function: Callable[[list], list], items: list) -> list:
    """function(items), or, where that fails, function([item])[0] or its exception of each."""
    if not items:
        return []
    try:
        return function(items)
    except Exception as error:  # one bad item, or too many for the memory: each has its own try
        if len(items) == 1:
            return [error]
        return [_together(function, [item])[0] for item in items]

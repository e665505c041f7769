"""What a model can be asked about a scene, from a caption to the model's input."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gella.entities.entity_map import EntityMap
from gella.entities.view import image_token_count
from gella.predictor.scene import Scene
from gella.segmenters.segmenter import Segmenter
from gella.text import prompts
from gella.text.prompts import FittedPrompt, fit_prompt
from gella.text.spans import locate_phrases

__all__ = [
    "TASKS",
    "Question",
    "Request",
    "caption_question",
    "fit_question",
    "mapped_input",
    "named_in",
    "panoptic_question",
    "phrases_question",
    "prefix_ids",
    "referring_question",
    "text_question",
]

TASKS = ("ground", "refer", "panoptic", "describe", "extract")

_logger = logging.getLogger(__name__)


@dataclass
class Request:
    """One question about one picture, for :meth:`GellaPredictor.predict_many`.

    Attributes:
        task: one of ``TASKS``.
        image, entities, image_id, masks_format, segments_info: see
            :meth:`GellaPredictor.set_image`. Requests with the same image and entities (the same
            objects, or equal names) share one scene.
        text: the caption ("ground", "extract") or the expression ("refer").
        nouns: for "ground"; None: the model extracts them.
        categories: for "panoptic".
    """

    task: str
    image: np.ndarray | str | Path
    entities: EntityMap | np.ndarray | str | Path | Segmenter
    text: str = ""
    nouns: Sequence[str] | None = None
    categories: Sequence[dict[str, Any] | str] | None = None
    image_id: int | str | None = None
    masks_format: str = "auto"
    segments_info: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Question:
    """A checked question.

    Attributes:
        task: one of ``TASKS``.
        caption: the sentence that is asked about; "" for "describe".
        phrases: what its answer names, in the dataset mapper's form.
        categories: of "panoptic", with ``id``, ``name`` and ``isthing``.
    """

    task: str
    caption: str = ""
    phrases: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)

    @property
    def generates(self) -> bool:
        """Whether its answer is a text that the model has to write."""
        return self.task in ("describe", "extract")


def text_question(task: str, caption: str = "") -> Question:
    """A question for a text: "describe", or "extract" with its caption.

    Raises:
        ValueError: "extract" without a caption.
    """
    if task == "extract":
        _require_text("caption", caption)
    return Question(task, caption)


def caption_question(caption: str, nouns: Sequence[str]) -> Question:
    """Where the given nouns of a caption are; one that is not in it has the span -1.

    Raises:
        ValueError: the caption is empty, or there is no noun.
    """
    _require_text("caption", caption)
    if not nouns or not all(noun.strip() for noun in nouns):
        raise ValueError(
            f'caption without nouns: "{caption}"; write one that names something, or give nouns'
        )
    spans = _spans(caption, nouns)
    phrases = [_phrase(noun, *span) for noun, span in zip(nouns, spans, strict=True)]
    return Question("ground", caption, phrases)


def phrases_question(caption: str, phrases: Sequence[dict[str, Any]]) -> Question:
    """Where nouns of known spans are; ``text``, ``start`` and ``end`` of each are read.

    Raises:
        ValueError: the caption is empty, or there is no noun.
    """
    _require_text("caption", caption)
    if not phrases:
        raise ValueError(f'caption without nouns: "{caption}"; give at least one noun')
    plain = [_phrase(phrase["text"], phrase["start"], phrase["end"]) for phrase in phrases]
    return Question("ground", caption, plain)


def referring_question(expression: str) -> Question:
    """What an expression names; it is its own only phrase.

    Raises:
        ValueError: the expression is empty.
    """
    _require_text("expression", expression)
    return Question("refer", expression, [_phrase(expression, 0, len(expression))])


def panoptic_question(categories: Sequence[dict[str, Any] | str]) -> Question:
    """Which category each entity has; names without more are things with the ids 1, 2, ...

    Raises:
        ValueError: there is no category.
    """
    if not categories:
        raise ValueError("panoptic: no category was given; give at least one name")
    full: list[dict[str, Any]] = [
        {"id": number, "name": item, "isthing": 1} if isinstance(item, str) else dict(item)
        for number, item in enumerate(categories, start=1)
    ]
    names = [prompts.spoken_name(category["name"]) for category in full]
    sentence = prompts.panoptic_sentence(names)
    phrases = [
        {**_phrase(name, *span), "category_id": item["id"], "isthing": item["isthing"]}
        for name, span, item in zip(names, _spans(sentence, names), full, strict=True)
    ]
    return Question("panoptic", sentence, phrases, full)


def named_in(caption: str, found: Sequence[str]) -> list[str]:
    """Those of the extracted nouns that the caption holds, in order; the others are invented."""
    nouns = [noun for noun in found if noun]
    pairs = list(zip(nouns, _spans(caption, nouns), strict=True))
    invented = [noun for noun, span in pairs if span[0] < 0]
    if invented:
        _logger.warning("extracted nouns that are not in the caption: %s", invented)
    return [noun for noun, span in pairs if span[0] >= 0]


def fit_question(question: Question, cfg: Any, tokenizer: Any) -> FittedPrompt:
    """The token ids of a question, cut where it is too long and may be (see ``overlong.py``).

    Raises:
        ValueError: it is too long for ``MODEL.LANGUAGE.MAX_POSITIONS``.
    """
    language = cfg.MODEL.LANGUAGE
    fitted = fit_prompt(
        tokenizer,
        question.task,
        question.caption,
        question.phrases,
        policy=cfg.INPUT.GELLA.OVERLONG_CAPTION,
        answered=not question.generates,
        **_limits(cfg),
    )
    if len(fitted.caption) < len(question.caption):
        _logger.warning(
            "the caption was cut to %d of %d characters, %d nouns left out: at most %d tokens "
            "fit (MODEL.LANGUAGE.MAX_POSITIONS)",
            *(len(fitted.caption), len(question.caption), fitted.num_cut, language.MAX_POSITIONS),
        )
    return fitted


def prefix_ids(cfg: Any, tokenizer: Any) -> torch.Tensor:
    """What every question about an image begins with, up to its last image token: int64 (N,).

    It is cut from a whole prompt, so that its tokens are those of every other one.
    """
    ids = prompts.build_prompt(tokenizer, "", None, **_limits(cfg)).input_ids
    last = int((ids == prompts.IMAGE_TOKEN_ID).nonzero()[-1])
    return ids[: last + 1]


def mapped_input(scene: Scene, question: Question, fitted: FittedPrompt) -> dict[str, Any]:
    """The model's input, as the dataset mapper makes it."""
    return {
        **scene.view,
        "entities_full": scene.entities,
        "input_ids": fitted.prompt.input_ids,
        "labels": fitted.prompt.labels,
        "seg_positions": fitted.prompt.seg_positions,
        "phrases": question.phrases[: fitted.num_nouns],
        "caption": question.caption,
        "task": question.task,
        "height": scene.image.shape[0],
        "width": scene.image.shape[1],
    }


def _limits(cfg: Any) -> dict[str, Any]:
    encoder, language = cfg.MODEL.IMAGE_ENCODER, cfg.MODEL.LANGUAGE
    return {
        "num_image_tokens": image_token_count(
            encoder.IMAGE_SIZE, encoder.PATCH_SIZE, language.IMAGE_TOKEN_STRIDE
        ),
        "system": language.SYSTEM,
        "max_length": language.MAX_POSITIONS,
    }


def _phrase(text: str, start: int, end: int) -> dict[str, Any]:
    known = {"text": text, "start": start, "end": end, "is_plural": False, "is_thing": True}
    return {**known, "segment_ids": None, "entity_indices": None}


def _spans(caption: str, nouns: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of nouns in order; a noun out of order is sought everywhere; (-1, -1) if absent."""
    spans = locate_phrases(caption, list(nouns))
    return [
        span or locate_phrases(caption, [noun])[0] or (-1, -1)
        for noun, span in zip(nouns, spans, strict=True)
    ]


def _require_text(what: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{what} is empty; write a sentence that names what to find")

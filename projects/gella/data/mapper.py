"""The mapped dict, what the model takes: pixels, colormap, prompt and targets of one question.

`InputMaker` and `mapped_input` make it for everybody: `GroundingMapper` from a dataset's record,
the predictor from a picture and a question.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import configurable
from detectron2.data import MetadataCatalog

from gella.data.targets import EntityMatcher, category_phrases
from gella.entities.entity_map import EntityMap
from gella.entities.sources import annotation_of, load_from_record
from gella.entities.view import make_view, read_recorded
from gella.text.prompts import (
    DESCRIBE_INSTRUCTIONS,
    EXTRACT_INSTRUCTIONS,
    POLICIES,
    FittedPrompt,
    fit_prompt,
    load_tokenizer,
    panoptic_sentence,
)
from gella.text.spans import locate_phrases

FLIP_TEXT = ("swap", "skip")  # values of INPUT.GELLA.FLIP_TEXT
_logger = logging.getLogger(__name__)

Words = tuple[str, FittedPrompt, str, list[dict[str, Any]]]  # task, prompt, caption, phrases


class InputMaker:
    """Pictures and prompts as a config wants them, for :func:`mapped_input`."""

    @configurable
    def __init__(
        self,
        *,
        tokenizer: Any,
        image_size: int,
        colormap_size: int,
        colors: str = "random",
        color_draws: int = 1,
        num_image_tokens: int,
        system: str = "",
        max_length: int = 4096,
        overlong: str = "error",
    ) -> None:
        """Args:
        tokenizer: from `prompts.load_tokenizer`.
        image_size: side of CLIP's input, pixels.
        colormap_size: side of the colormap, pixels.
        colors: assignment, see `colormap.entity_colors`.
        color_draws: draws of colours of one picture at test; in training there is one.
        num_image_tokens: image tokens of the prompt.
        system: the prompt's system line.
        max_length: most tokens of a prompt.
        overlong: what becomes of a caption with more: "error" or "cut", see `prompts.fit_prompt`.
        """
        self.tokenizer = tokenizer
        self.image_size, self.colormap_size, self.colors = image_size, colormap_size, colors
        self.color_draws = color_draws
        self.limits: dict[str, Any] = {
            "num_image_tokens": num_image_tokens,
            "system": system,
            "max_length": max_length,
        }
        if overlong not in POLICIES:
            raise ValueError(f"INPUT.GELLA.OVERLONG_CAPTION is {overlong!r}: use one of {POLICIES}")
        self.overlong = overlong

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Arguments from a config.

        Raises ValueError for an ``INPUT.FORMAT`` other than RGB.
        """
        clip, language, own = cfg.MODEL.IMAGE_ENCODER, cfg.MODEL.LANGUAGE, cfg.INPUT.GELLA
        if cfg.INPUT.FORMAT != "RGB":
            raise ValueError(
                f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but pictures are read as RGB, the order of "
                "the image encoder's weights; leave it at RGB"
            )
        # One image token per cell of the pooled CLIP grid.
        side = clip.IMAGE_SIZE // clip.PATCH_SIZE // language.IMAGE_TOKEN_STRIDE
        return {
            "tokenizer": load_tokenizer(language.TOKENIZER),
            "image_size": clip.IMAGE_SIZE,
            "colormap_size": own.COLORMAP_SIZE,
            "colors": own.COLORS,
            "color_draws": cfg.TEST.COLOR_DRAWS,
            "num_image_tokens": side**2,
            "system": language.SYSTEM,
            "max_length": language.MAX_POSITIONS,
            "overlong": own.OVERLONG_CAPTION,
        }

    def picture(
        self,
        image: np.ndarray,
        entities: EntityMap,
        *,
        image_id: Any = None,
        file_name: str = "",
        rng: np.random.Generator | None = None,
    ) -> dict[str, Any]:
        """What the mapped dict says of a picture: `make_view`, and size and name of the original.

        Args:
            image: uint8 (H, W, 3) RGB.
            entities: in the frame of ``image``.
            image_id, file_name: as they are to stand in the dict.
            rng: draws the colours; None, at test: from the pixels of ``entities``. Those in
                canonical order then give one picture, whatever their names and order were.
        """
        options = {"image_size": self.image_size, "colormap_size": self.colormap_size}
        if rng is None:
            rng = np.random.default_rng(entities.digest())
            options["draws"] = self.color_draws
        view = make_view(image, entities, assignment=self.colors, rng=rng, **options)
        view.update(height=image.shape[0], width=image.shape[1])
        return {**view, "image_id": image_id, "file_name": file_name}

    def fit(
        self,
        task: str,
        caption: str,
        phrases: Sequence[dict[str, Any]],
        *,
        phrasing: int = 0,
        answered: bool = True,
    ) -> FittedPrompt:
        """The prompt of a question within the model's context; see `prompts.fit_prompt`."""
        options: dict[str, Any] = {"phrasing": phrasing, "answered": answered, **self.limits}
        return fit_prompt(self.tokenizer, task, caption, phrases, policy=self.overlong, **options)


def mapped_input(
    picture: dict[str, Any],
    task: str,
    fitted: FittedPrompt,
    caption: str,
    phrases: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The mapped dict (docs/FORMATS.md 7): a picture, and what is asked or said about it.

    Args:
        picture: from :meth:`InputMaker.picture`; at test with ``entities_full``.
        task: "describe", "extract", "ground", "panoptic" or "refer".
        fitted: from :meth:`InputMaker.fit`.
        caption: the sentence.
        phrases: with ``segment_ids`` and ``entity_indices``, None where nobody knows them or, in
            training, where no input entity covers their segments.
    """
    grounded = [phrase for phrase in phrases if phrase["segment_ids"]]
    return {
        **picture,
        "task": task,
        "caption": caption,
        "num_read": len(fitted.caption),
        "phrases": list(phrases),
        "input_ids": fitted.prompt.input_ids,
        "labels": fitted.prompt.labels,
        "seg_positions": fitted.prompt.seg_positions,
        # Those whose segments no input entity covers: they are counted and logged.
        "num_grounded": len(grounded),
        "num_unmatched": sum(not phrase["entity_indices"] for phrase in grounded),
        "num_cut": fitted.num_cut,
    }


def record_fields(record: dict[str, Any]) -> dict[str, Any]:
    """What the mapped dict of a test says of its record: all that evaluators need for the truth."""
    truth = annotation_of(record)
    return {
        **{key: record[key] for key in ("image_id", "file_name", "height", "width")},
        "annotation": {
            "file_name": truth["file_name"],
            "segments_info": truth.get("segments_info"),
        },
    }


def as_test_input(mapped: dict[str, Any]) -> dict[str, Any]:
    """A mapped training sample as an input to ground its nouns, for any task but "describe".

    Training samples have no masks of the original size, so the answer's frame is the part of the
    colormap that is no padding.
    """
    height, width = mapped["valid_size"]
    entities = mapped["entities"]
    frame = {"height": height, "width": width, "entities_full": entities.crop(height, width)}
    return {**mapped, "task": "ground", **frame}


class GroundingMapper(InputMaker):
    """Callable that maps one dataset dict for one task (docs/FORMATS.md 7).

    The result depends only on the record, the task and `rng_seed`; at test entities are in
    canonical order and the colours come from them, so that no name or order changes a result.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        flip: bool = False,
        flip_text: str = "skip",
        target_iou: float = 0.5,
        panoptic_negatives: int = -1,
        prompts_per_image: int = 1,
        categories: Sequence[dict[str, Any]] = (),
        task: str | None = None,
        **options: Any,
    ) -> None:
        """Args:
        is_train: draw colours, phrasing, flip and negatives anew for each `rng_seed`; else give
            the full-size entities and the annotation for evaluators too.
        flip: mirror half of the training images.
        flip_text: what becomes of a caption that says left or right: "swap" exchanges the words,
            "skip" leaves its image as it is.
        target_iou: least IoU at which an entity from elsewhere stands for an annotated segment.
        panoptic_negatives: absent categories listed when a panoptic image trains; -1 for all.
        prompts_per_image: most expressions that training asks of an image in one pass.
        categories: `id`, `name`, `isthing` of each category, for the task panoptic.
        task: the task of every call that gives none; None takes the record's first.
        options: of `InputMaker`.
        """
        super().__init__(**options)
        if flip_text not in FLIP_TEXT:
            raise ValueError(f"INPUT.GELLA.FLIP_TEXT is {flip_text!r}: use one of {FLIP_TEXT}")
        self.is_train, self.task = is_train, task
        self.flip, self.flip_text = flip and is_train, flip_text
        self.target_iou, self.panoptic_negatives = target_iou, panoptic_negatives
        self.prompts_per_image = prompts_per_image
        self.categories = list(categories)
        self._captions_cut, self._nouns_cut = 0, 0  # so far, in this process

    @classmethod
    def from_config(  # type: ignore[override]  # configurable passes what it takes
        cls, cfg: Any, is_train: bool, dataset_names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Arguments from a config.

        The categories are those of ``dataset_names``; None: of `DATASETS.TRAIN` or
        `DATASETS.TEST`. Raises ValueError when these datasets have different ones.
        """
        if dataset_names is None:
            dataset_names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        listed = {name: MetadataCatalog.get(name).get("categories", None) for name in dataset_names}
        listed = {name: list(categories) for name, categories in listed.items() if categories}
        keys = [[(c["id"], c["name"]) for c in categories] for categories in listed.values()]
        if any(key != keys[0] for key in keys):
            raise ValueError(
                f"datasets {', '.join(listed)} have different categories; name datasets of one set "
                "of categories, or give the mapper dataset_names"
            )
        return {
            **InputMaker.from_config(cfg),
            "is_train": is_train,
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "flip_text": cfg.INPUT.GELLA.FLIP_TEXT,
            "target_iou": cfg.INPUT.GELLA.TARGET_IOU,
            "panoptic_negatives": cfg.INPUT.GELLA.PANOPTIC_NEGATIVES,
            "prompts_per_image": cfg.DATALOADER.PROMPTS_PER_IMAGE,
            "categories": next(iter(listed.values()), []),
        }

    def __call__(
        self,
        record: dict[str, Any],
        task: str | None = None,
        rng_seed: Sequence[int] | None = None,
        others: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Map one record; the record is not changed.

        Args:
            record: dataset dict (docs/FORMATS.md 7).
            task: "describe", "extract", "ground", "panoptic" or "refer". "ground" of a record
                without caption means its expressions, or else its panoptic categories.
            rng_seed: integers that fix every random choice; None: from the image id.
            others: further records of the same image, in training: their prompts, phrases and
                counts are the dicts of the result's ``more``.

        Raises:
            FileNotFoundError: the image or the entity file is missing.
            ValueError: naming the image, for unreadable files, sizes that disagree, no entity, an
                empty caption, a caption without nouns, unknown segment ids, a prompt too long.
        """
        task = task or self.task or record["tasks"][0]
        seed = zlib.crc32(str(record["image_id"]).encode()) if rng_seed is None else rng_seed
        rng = np.random.default_rng(seed)
        image = read_recorded(record["file_name"], (record["height"], record["width"]))
        entities = load_from_record(record, image)
        if not self.is_train:
            entities = entities.canonical()
        try:
            asked, mirrored = self._words([record, *others], task, entities, rng)
        except ValueError as error:
            raise ValueError(
                f"image {record['image_id']} ({record['file_name']}), task {task}: {error}"
            ) from error
        # Mirrored together: the colormap has to show the same scene in the same place.
        shown = (image[:, ::-1], entities.flip()) if mirrored else (image, entities)
        names = {"image_id": record["image_id"], "file_name": record["file_name"]}
        picture = self.picture(*shown, **names, rng=rng if self.is_train else None)
        if not self.is_train:
            # Scores are taken at the original size; the truth stays the annotation's.
            picture.update(record_fields(record), entities_full=entities)
        mapped = mapped_input(picture, *asked[0])
        if len(asked) > 1:
            mapped["more"] = [mapped_input({}, *words) for words in asked[1:]]
        return mapped

    def _words(
        self,
        records: Sequence[dict[str, Any]],
        task: str,
        entities: EntityMap,
        rng: np.random.Generator,
    ) -> tuple[list[Words], bool]:
        """What is asked about an image, and whether to mirror its pixels."""
        # The order of these draws is part of what a seed means: names, phrasing, mirror, colours.
        said: list[tuple[str, list[dict[str, Any]]]] = []
        sources = []
        for behind, record in zip(range(len(records) - 1, -1, -1), records):
            own, truth, annotated = _own_task(record, task), annotation_of(record), None
            if truth is not record["entities"]:  # the entities come from elsewhere
                annotated = load_from_record({**record, "entities": truth})
            segments = truth.get("segments_info")
            matcher = EntityMatcher(entities, segments, annotated, self.target_iou)
            # Several expressions take the room that the records behind leave.
            room = max(1, self.prompts_per_image - len(said) - behind)
            words = self._said(record, own, matcher, rng)[:room]
            said += words
            sources += [(record, own, matcher)] * len(words)
        choices = DESCRIBE_INSTRUCTIONS if task == "describe" else EXTRACT_INSTRUCTIONS
        phrasings = [int(rng.integers(len(choices))) if self.is_train else 0 for _ in said]
        mirrored = self.flip and rng.random() < 0.5
        if mirrored:
            texts = [t for words, phrases in said for t in (words, *(p["text"] for p in phrases))]
            # With "swap" only those words are in the way that no rule turns over.
            wrong = _SIDES if self.flip_text == "skip" else _UNSURE
            mirrored = not any(_UNSURE.search(text) or wrong.search(text) for text in texts)
        if mirrored and self.flip_text == "swap":
            said = [mirrored_words(*words) for words in said]
        asked = zip(sources, said, phrasings)
        return [self._asked(*source, *words, n) for source, words, n in asked], mirrored

    def _asked(
        self,
        record: dict[str, Any],
        task: str,
        matcher: EntityMatcher,
        caption: str,
        phrases: list[dict[str, Any]],
        phrasing: int,
    ) -> Words:
        """Prompt, caption and phrases with their entities."""
        # Outside training, descriptions and extracted nouns are the model's to say.
        answered = self.is_train or task not in ("describe", "extract")
        fitted = self.fit(task, caption, phrases, phrasing=phrasing, answered=answered)
        if len(fitted.caption) < len(caption):
            self._captions_cut += 1
            self._nouns_cut += fitted.num_cut
            if self._captions_cut & (self._captions_cut - 1) == 0:  # 1st, 2nd, 4th: a readable log
                _logger.warning(
                    "image %s (%s): caption cut to %d of %d characters, %d of its nouns left out; "
                    "so far %d nouns of %d captions in this process: more than %d tokens",
                    *(record["image_id"], record["file_name"], len(fitted.caption), len(caption)),
                    *(fitted.num_cut, self._nouns_cut, self._captions_cut),
                    self.limits["max_length"],
                )
        if self.is_train:
            # At test the nouns that were cut stay: evaluators count them as not found.
            caption, phrases = fitted.caption, phrases[: fitted.num_nouns]
        if task == "describe":
            phrases = []  # its answer names no noun
        phrases = [dict(phrase) for phrase in phrases]
        for phrase in phrases:
            found = matcher.entity_indices(phrase["segment_ids"])
            # Entities that no input mask covers are unknown, not absent: the noun has no target.
            unknown = self.is_train and phrase["segment_ids"] and not found
            phrase["entity_indices"] = None if unknown else found
        return task, fitted, caption, phrases

    def _said(
        self,
        record: dict[str, Any],
        task: str,
        matcher: EntityMatcher,
        rng: np.random.Generator,
    ) -> list[tuple[str, list[dict[str, Any]]]]:
        """Captions of a record with their phrases: one, or in training several expressions."""
        if task == "panoptic":
            if not self.categories:
                raise ValueError("no category names; register the dataset with `categories`")
            negatives = self.panoptic_negatives if self.is_train else -1
            phrases = category_phrases(matcher.segments_info, self.categories, negatives, rng)
            names = [phrase["text"] for phrase in phrases]
            sentence = panoptic_sentence(names)
            spans = locate_phrases(sentence, names)
            for phrase, span in zip(phrases, spans):
                phrase["start"], phrase["end"] = span or (-1, -1)
            return [(sentence, phrases)]
        if task == "refer":
            expressions = record.get("expressions") or []
            if not expressions or (len(expressions) > 1 and not self.is_train):
                raise ValueError(
                    f"the record has {len(expressions)} expressions; evaluation takes one record "
                    "per expression and training at least one"
                )
            drawn = rng.permutation(len(expressions))[: self.prompts_per_image]
            chosen = [expression_phrase(expressions[number]) for number in drawn]
            return [(phrase["text"], [phrase]) for phrase in chosen]
        caption = record.get("caption") or ""
        if not caption.strip():
            raise ValueError("the caption is empty; give a sentence")
        phrases = list(record.get("phrases") or [])
        if task != "describe" and not phrases:
            raise ValueError(f"the caption has no noun: {caption[:80]!r}; at least one is needed")
        return [(caption, phrases)]


def _own_task(record: dict[str, Any], task: str) -> str:
    # Datasets without captions train grounding in their own way.
    if task == "ground" and "caption" not in record:
        if record.get("expressions"):
            return "refer"
        if "panoptic" in record.get("tasks", ()):
            return "panoptic"
    return task


def expression_phrase(expression: dict[str, Any]) -> dict[str, Any]:
    """A referring expression as the only phrase of a caption that is itself."""
    text, ids = expression["text"].strip(), expression["segment_ids"]
    span = {"start": 0, "end": len(text)}
    return {**expression, "text": text, **span, "is_plural": len(ids or ()) > 1, "is_thing": True}


# "left", "Rightmost", "right-hand", "topleft"; not "bright", "leftover", "righteous".
_SIDES = re.compile(
    r"\b(?P<before>top|bottom|upper|lower|far)?(?P<side>left|right)"
    r"(?=(?:most|ish|wards?|(?:hand|side)(?:ed)?)?\b)",
    re.IGNORECASE,
)
# Words that turn over in a mirror and that no rule rewrites: "2nd from l", "rt guy", clock faces.
_UNSURE = re.compile(
    r"\b(?:l|r|lt|rt|lft|rgt|lhs|rhs|(?:counter|anti)?-?clockwise|o.?clock)\b", re.IGNORECASE
)


def mirrored_words(
    caption: str, phrases: Sequence[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """A caption and its phrases for the mirrored picture; nothing is changed in place.

    "left" and "right" change places, also inside "leftmost" or "right-hand", and keep their case
    ("Left" -> "Right", "LEFT" -> "RIGHT"). ``start`` and ``end`` of phrases that have a place in
    the caption (``start >= 0``) move along with the words before them.
    """
    swapped: list[dict[str, Any]] = []
    for phrase in phrases:
        changed = {**phrase, "text": _SIDES.sub(_other, phrase["text"])}
        if phrase.get("start", -1) >= 0:
            for key in ("start", "end"):  # what stands before a place may have another length
                before = [m[0] for m in _SIDES.finditer(caption) if m.end() <= phrase[key]]
                grown = sum(len(_SIDES.sub(_other, word)) - len(word) for word in before)
                changed[key] = phrase[key] + grown
        swapped.append(changed)
    return _SIDES.sub(_other, caption), swapped


def _other(match: re.Match[str]) -> str:
    side = match["side"]
    other = "right" if side.lower() == "left" else "left"
    if side.isupper():
        other = other.upper()
    elif side[0].isupper():
        other = other.capitalize()
    return (match["before"] or "") + other

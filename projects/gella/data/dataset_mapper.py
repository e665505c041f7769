"""From a dataset dict to what the model takes: pixels, colormap, prompt and targets of one task."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import configurable
from detectron2.data import MetadataCatalog

from gella.data.mirror import FLIP_TEXT, mirrored_words, names_a_side
from gella.data.phrases import EntityMatcher, category_phrases
from gella.entities.sources import annotation_of, load_entities, load_from_record
from gella.entities.view import image_token_count, make_view, read_image
from gella.text.overlong import FittedPrompt, check_policy, fit_prompt
from gella.text.prompts import (
    DESCRIBE_INSTRUCTIONS,
    EXTRACT_INSTRUCTIONS,
    load_tokenizer,
    locate_phrases,
    panoptic_sentence,
)

_logger = logging.getLogger(__name__)


class GroundingMapper:
    """Callable that maps one dataset dict for one task (docs/FORMATS.md 7).

    The result depends only on the record, the task and `rng_seed`; at test the colours come from
    the image id, so results repeat.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        tokenizer: Any,
        image_size: int,
        colormap_size: int,
        colors: str = "random",
        flip: bool = False,
        flip_text: str = "skip",
        target_iou: float = 0.5,
        panoptic_negatives: int = -1,
        num_image_tokens: int,
        system: str = "",
        max_length: int = 4096,
        overlong: str = "error",
        categories: Sequence[dict[str, Any]] = (),
        task: str | None = None,
    ) -> None:
        """Args:
        is_train: draw colours, phrasing, flip and negatives anew for each `rng_seed`; else give
            the full-size entities and the annotation for evaluators too.
        tokenizer: from `prompts.load_tokenizer`.
        image_size: side of CLIP's input, pixels.
        colormap_size: side of the colormap, pixels.
        colors: assignment, see `entities.entity_colors`.
        flip: mirror half of the training images.
        flip_text: what becomes of a caption that says left or right: "swap" exchanges the words,
            "skip" leaves its image as it is.
        target_iou: least IoU at which an entity from elsewhere stands for an annotated segment.
        panoptic_negatives: absent categories listed when a panoptic image trains; -1 for all.
        num_image_tokens: image tokens of the prompt.
        system: the prompt's system line.
        max_length: most tokens of a prompt.
        overlong: what becomes of a caption with more: "error" or "cut", see `overlong.fit_prompt`.
        categories: `id`, `name`, `isthing` of each category, for the task panoptic.
        task: the task of every call that gives none; None takes the record's first.
        """
        self.is_train, self.task, self.tokenizer = is_train, task, tokenizer
        self.image_size, self.colormap_size, self.colors = image_size, colormap_size, colors
        self.flip, self.flip_text = flip and is_train, flip_text
        if flip_text not in FLIP_TEXT:
            raise ValueError(f"INPUT.GELLA.FLIP_TEXT is {flip_text!r}: use one of {FLIP_TEXT}")
        self.target_iou = target_iou
        self.panoptic_negatives = panoptic_negatives
        self.num_image_tokens, self.system, self.max_length = num_image_tokens, system, max_length
        self.overlong = check_policy(overlong)
        self._cut = [0, 0]  # captions and nouns so far
        self.categories = list(categories)
        # Compiles here: forked workers would each do it again and keep 160 MiB of their own.
        import gella.entities.colormap_kernel  # noqa: F401

    @classmethod
    def from_config(
        cls, cfg: Any, is_train: bool, dataset_names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Arguments from a config.

        Args:
            cfg: the config.
            is_train: as in the constructor.
            dataset_names: whose categories to use; None: `DATASETS.TRAIN` or `DATASETS.TEST`.

        Raises ValueError when these datasets have different categories.
        """
        clip, language, own = cfg.MODEL.IMAGE_ENCODER, cfg.MODEL.LANGUAGE, cfg.INPUT.GELLA
        if dataset_names is None:
            dataset_names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        return {
            "is_train": is_train,
            "tokenizer": load_tokenizer(language.TOKENIZER),
            "image_size": clip.IMAGE_SIZE,
            "colormap_size": own.COLORMAP_SIZE,
            "colors": own.COLORS,
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "flip_text": own.FLIP_TEXT,
            "target_iou": own.TARGET_IOU,
            "panoptic_negatives": own.PANOPTIC_NEGATIVES,
            "num_image_tokens": image_token_count(
                clip.IMAGE_SIZE, clip.PATCH_SIZE, language.IMAGE_TOKEN_STRIDE
            ),
            "system": language.SYSTEM,
            "max_length": language.MAX_POSITIONS,
            "overlong": own.OVERLONG_CAPTION,
            "categories": _shared_categories(dataset_names),
        }

    def __call__(
        self,
        record: dict[str, Any],
        task: str | None = None,
        rng_seed: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Map one record; the record is not changed.

        Args:
            record: dataset dict (docs/FORMATS.md 7).
            task: "describe", "extract", "ground", "panoptic" or "refer". "ground" of a record
                without caption means its expressions, or else its panoptic categories.
            rng_seed: integers that fix every random choice; None: from the image id.

        Raises:
            FileNotFoundError: the image or the entity file is missing.
            ValueError: naming the image, for unreadable files, sizes that disagree, no entity, an
                empty caption, a caption without nouns, unknown segment ids, a prompt too long.
        """
        task = self._resolve(record, task or self.task or record["tasks"][0])
        seed = zlib.crc32(str(record["image_id"]).encode()) if rng_seed is None else rng_seed
        rng = np.random.default_rng(seed)
        image = read_image(record["file_name"])
        size = (record["height"], record["width"])
        if image.shape[:2] != size:
            raise ValueError(
                f"image {record['file_name']} is {image.shape[1]}x{image.shape[0]} pixels but its "
                f"record says {size[1]}x{size[0]} (width x height); the annotation belongs to "
                "another picture, or the sides are swapped"
            )
        entities = load_from_record(record, image)
        full, matcher = entities, self._matcher(record, entities)
        try:
            said, mirrored = self._words(record, task, matcher, rng)
        except ValueError as error:
            raise ValueError(
                f"image {record['image_id']} ({record['file_name']}), task {task}: {error}"
            ) from error
        if mirrored:
            image, entities = image[:, ::-1], entities.flip()
        mapped = make_view(
            image,
            entities,
            image_size=self.image_size,
            colormap_size=self.colormap_size,
            assignment=self.colors,
            rng=rng,
        )
        mapped.update(said, task=task, height=size[0], width=size[1])
        mapped.update(image_id=record["image_id"], file_name=record["file_name"])
        if not self.is_train:
            truth = annotation_of(record)
            mapped["entities_full"] = full
            mapped["annotation"] = {
                "file_name": truth["file_name"],
                "segments_info": truth.get("segments_info"),
            }
        return mapped

    def _resolve(self, record: dict[str, Any], task: str) -> str:
        """The concrete task: datasets without captions can train grounding in their own way."""
        if task == "ground" and "caption" not in record:
            if record.get("expressions"):
                return "refer"
            if "panoptic" in record.get("tasks", ()):
                return "panoptic"
        return task

    def _matcher(self, record: dict[str, Any], entities: Any) -> EntityMatcher:
        source = record["entities"]
        targets = source.get("targets")
        if targets is None:
            return EntityMatcher(entities, source.get("segments_info"))
        annotated = load_entities(
            targets["file_name"],
            record["height"],
            record["width"],
            format=targets.get("format", "auto"),
            segments_info=targets.get("segments_info"),
            image_id=record["image_id"],
        )
        return EntityMatcher(
            entities, targets.get("segments_info"), annotated, min_iou=self.target_iou
        )

    def _words(
        self,
        record: dict[str, Any],
        task: str,
        matcher: EntityMatcher,
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], bool]:
        """Everything of the mapped dict that is not pixels, and whether to mirror the pixels."""
        caption, phrases = self._caption_and_phrases(record, task, matcher, rng)
        choices = DESCRIBE_INSTRUCTIONS if task == "describe" else EXTRACT_INSTRUCTIONS
        phrasing = int(rng.integers(len(choices))) if self.is_train else 0
        mirrored = self.flip and rng.random() < 0.5
        if mirrored:
            texts = (caption, *(phrase["text"] for phrase in phrases))
            mirrored = not any(names_a_side(text, self.flip_text) for text in texts)
        if mirrored and self.flip_text == "swap":
            caption, phrases = mirrored_words(caption, phrases)
        fitted = self._fit(record, task, caption, phrases, phrasing)
        if self.is_train:
            # At test the nouns that were cut stay: evaluators count them as not found.
            caption, phrases = fitted.caption, phrases[: fitted.num_nouns]
        if task == "describe":
            phrases = []  # its answer names no noun
        matched = [matcher.entity_indices(phrase["segment_ids"]) for phrase in phrases]
        words = {
            "input_ids": fitted.prompt.input_ids,
            "labels": fitted.prompt.labels,
            "seg_positions": fitted.prompt.seg_positions,
            "caption": caption,
            "phrases": [
                {**phrase, "entity_indices": indices} for phrase, indices in zip(phrases, matched)
            ],
            # Nouns with segments, and those whose segments no input entity covers: they train with
            # an empty row.
            "num_grounded": sum(bool(phrase["segment_ids"]) for phrase in phrases),
            "num_unmatched": sum(
                bool(p["segment_ids"]) and not found for p, found in zip(phrases, matched)
            ),
            "num_cut": fitted.num_cut,
        }
        return words, mirrored

    def _fit(
        self,
        record: dict[str, Any],
        task: str,
        caption: str,
        phrases: list[dict[str, Any]],
        phrasing: int,
    ) -> FittedPrompt:
        # Outside training, descriptions and extracted nouns are the model's to say.
        answered = self.is_train or task not in ("describe", "extract")
        fitted = fit_prompt(
            self.tokenizer,
            task,
            caption,
            phrases,
            policy=self.overlong,
            phrasing=phrasing,
            answered=answered,
            num_image_tokens=self.num_image_tokens,
            system=self.system,
            max_length=self.max_length,
        )
        if len(fitted.caption) < len(caption):
            self._cut = [self._cut[0] + 1, self._cut[1] + fitted.num_cut]
            if self._cut[0] & (self._cut[0] - 1) == 0:  # the 1st, 2nd, 4th, ...: a readable log
                _logger.warning(
                    "image %s (%s): caption cut to %d of %d characters, %d of its nouns left out; "
                    "so far %d nouns of %d captions in this process: more than %d tokens",
                    *(record["image_id"], record["file_name"], len(fitted.caption), len(caption)),
                    *(fitted.num_cut, self._cut[1], self._cut[0], self.max_length),
                )
        return fitted

    def _caption_and_phrases(
        self,
        record: dict[str, Any],
        task: str,
        matcher: EntityMatcher,
        rng: np.random.Generator,
    ) -> tuple[str, list[dict[str, Any]]]:
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
            return sentence, phrases
        if task == "refer":
            return self._expression(record, rng)
        caption = record.get("caption") or ""
        if not caption.strip():
            raise ValueError("the caption is empty; give a sentence")
        phrases = list(record.get("phrases") or [])
        if task != "describe" and not phrases:
            raise ValueError(f"the caption has no noun: {caption[:80]!r}; at least one is needed")
        return caption, phrases

    def _expression(
        self, record: dict[str, Any], rng: np.random.Generator
    ) -> tuple[str, list[dict[str, Any]]]:
        expressions = record.get("expressions") or []
        if not expressions or (len(expressions) > 1 and not self.is_train):
            raise ValueError(
                f"the record has {len(expressions)} expressions; evaluation takes one record per "
                "expression and training at least one"
            )
        expression = expressions[int(rng.integers(len(expressions)))]
        text, ids = expression["text"].strip(), expression["segment_ids"]
        phrase = {
            **expression,
            "text": text,
            "start": 0,
            "end": len(text),
            "is_plural": len(ids) > 1,
            "is_thing": True,
        }
        return text, [phrase]


def _shared_categories(dataset_names: Sequence[str]) -> list[dict[str, Any]]:
    """Categories that all datasets with categories agree on; empty when none has any."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in dataset_names:
        listed = MetadataCatalog.get(name).get("categories", None)
        if listed:
            found[name] = list(listed)
    key = [[(c["id"], c["name"]) for c in listed] for listed in found.values()]
    if any(entry != key[0] for entry in key):
        raise ValueError(
            f"datasets {', '.join(found)} have different categories; name datasets of one set of "
            "categories, or give the mapper dataset_names"
        )
    return next(iter(found.values()), [])

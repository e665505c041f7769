"""Use a model from Python: give it a picture and its entities once, then ask.

predictor = GellaPredictor.from_config("configs/gella_tiny_shapes.yaml", "model_final.pth")
predictor.set_image("scene.png", "scene_masks.png")
result = predictor.ground("A red circle lies on the sand.", ["A red circle", "the sand"])
result.plot().save("grounded.png")
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model

from gella import prompts
from gella.checkpoint import load_weights
from gella.config_file import load_config
from gella.entities import EntityMap
from gella.entity_sources import load_entities
from gella.geometry import image_token_count, make_view, read_image
from gella.grounding import Grounding, PanopticResult
from gella.overlong import fit_prompt

_logger = logging.getLogger(__name__)


def image_id_of(file_name: str | Path) -> int | str:
    """Return a picture's id from its name, COCO's way: ``000000142238.jpg`` is 142238.

    A name that is no number is its own id, without the suffix.
    """
    stem = Path(file_name).stem
    return int(stem) if stem.isdecimal() else stem


class GellaPredictor:
    """Ground captions, expressions and category names in the entities of one picture at a time.

    Args:
        cfg: a complete config. ``MODEL.WEIGHTS`` "" leaves the model untrained; every result then
            says so. ``MODEL.DEVICE`` "cuda" falls back to the CPU where there is none.
        model: use this model (its weights as they are) instead of building one.
        config_file: only named in the results.

    Raises:
        FileNotFoundError, ValueError: the weights are missing or do not fit the model.
    """

    def __init__(self, cfg: Any, *, model: Any = None, config_file: str = "") -> None:
        cfg = cfg.clone()
        cfg.defrost()
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        cfg.freeze()
        self.cfg = cfg
        self.config_file = config_file
        self.model = model
        if model is None:
            self.model = build_model(cfg)
            if cfg.MODEL.WEIGHTS:
                load_weights(self.model, cfg.MODEL.WEIGHTS, cfg)
        self.model.eval()
        self._tokenizer: Any = None
        self._image: np.ndarray | None = None
        self._entities: EntityMap | None = None
        self._view: dict[str, Any] = {}

    @classmethod
    def from_config(
        cls,
        config_file: str | Path,
        weights: str | None = None,
        device: str | None = None,
        opts: Sequence[str] = (),
    ) -> GellaPredictor:
        """Build a predictor from files.

        Args:
            config_file: YAML, such as those in ``configs/``.
            weights: checkpoint file; "" for untrained weights, None for what the config names.
            device: "cpu", "cuda", ...; None for what the config names.
            opts: overrides ``KEY, VALUE, KEY, VALUE, ...``.

        Raises:
            FileNotFoundError, ValueError: see :func:`load_config` and the class.
        """
        cfg = load_config(config_file, opts)
        if weights is not None:
            cfg.MODEL.WEIGHTS = str(weights)
        if device is not None:
            cfg.MODEL.DEVICE = device
        return cls(cfg, config_file=str(config_file))

    def set_image(
        self,
        image: np.ndarray | str | Path,
        entities: EntityMap | str | Path,
        *,
        masks_format: str = "auto",
        segments_info: list[dict[str, Any]] | None = None,
        image_id: int | str | None = None,
    ) -> None:
        """Choose the picture that the next questions are about.

        Args:
            image: uint8 (H, W, 3) RGB, or a file (turned upright by its EXIF orientation).
            entities: the picture's entities (same frame), or a file of any format that
                :func:`gella.entity_sources.load_entities` reads.
            masks_format: format of that file.
            segments_info: of a COCO panoptic file: which segments are crowd.
            image_id: picks the picture's masks in a file of many, and the colours of the
                colormap. Default for a file: :func:`image_id_of`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, the sizes differ, or there is no entity at all.
        """
        if not isinstance(image, np.ndarray):
            image_id = image_id_of(image) if image_id is None else image_id
            image = read_image(image, upright=True)
        if not isinstance(entities, EntityMap):
            entities = load_entities(
                str(entities),
                image.shape[0],
                image.shape[1],
                format=masks_format,
                segments_info=segments_info,
                image_id=image_id,
            )
        if entities.num_entities == 0:
            raise ValueError("the image has no entity at all; give at least one mask")
        inputs = self.cfg.INPUT.GELLA
        self._view = make_view(
            image,
            entities,
            image_size=self.cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE,
            colormap_size=inputs.COLORMAP_SIZE,
            assignment=inputs.COLORS,
            # The dataset mapper's rule at test time: results repeat, and agree with evaluation.
            rng=np.random.default_rng(zlib.crc32(str(image_id).encode())),
        )
        self._view.update(image_id=image_id, file_name="")
        self._image, self._entities = image, entities

    def ground(self, caption: str, nouns: Sequence[str] | None = None) -> Grounding:
        """Find the entities that each noun of a caption names.

        Args:
            caption: the sentence.
            nouns: its noun phrases in the order of the caption; a noun that is not in it is
                grounded all the same and has the span -1. None: the model extracts them.

        A caption that is too long is an error, or cut (``INPUT.GELLA.OVERLONG_CAPTION``): the
        result then lists the nouns that were left out.

        Raises:
            ValueError: the caption is empty, or there is no noun, or the text is too long.
            RuntimeError: no image was set.
        """
        _require_text("caption", caption)
        if nouns is None:
            # An answer may name what the caption does not: such nouns would be invented.
            found = [noun for noun in self.extract_nouns(caption) if noun]
            pairs = list(zip(found, _spans(caption, found), strict=True))
            invented = [noun for noun, span in pairs if span[0] < 0]
            if invented:
                _logger.warning("extracted nouns that are not in the caption: %s", invented)
            nouns = [noun for noun, span in pairs if span[0] >= 0]
        if not nouns or not all(noun.strip() for noun in nouns):
            raise ValueError(
                f'caption without nouns: "{caption}"; write one that names something, or give nouns'
            )
        spans = _spans(caption, nouns)
        phrases = [_phrase(noun, *span) for noun, span in zip(nouns, spans, strict=True)]
        return self.ground_phrases(caption, phrases)

    def ground_phrases(self, caption: str, phrases: Sequence[dict[str, Any]]) -> Grounding:
        """Ground nouns whose spans are known, such as those of a dataset's record.

        Args:
            caption: the sentence.
            phrases: per noun ``text``, ``start`` and ``end``; other keys are not looked at.

        Raises:
            ValueError: the caption is empty, there is no noun, or the text is too long.
        """
        _require_text("caption", caption)
        if not phrases:
            raise ValueError(f'caption without nouns: "{caption}"; give at least one noun')
        plain = [_phrase(phrase["text"], phrase["start"], phrase["end"]) for phrase in phrases]
        return self._grounding("ground", caption, plain)

    def refer(self, expression: str) -> Grounding:
        """Find what a referring expression names; the result has one phrase, the expression.

        Raises:
            ValueError: the expression is empty or too long.
        """
        _require_text("expression", expression)
        return self._grounding("refer", expression, [_phrase(expression, 0, len(expression))])

    def panoptic(self, categories: Sequence[dict[str, Any] | str]) -> PanopticResult:
        """Give every entity one of the categories.

        Args:
            categories: COCO's form (``id``, ``name``, ``isthing``), or names only: these are then
                things with the ids 1, 2, ...

        Raises:
            ValueError: there is no category, or the list is too long for the model.
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
        result, _ = self._ask("panoptic", sentence, phrases)
        ids, segments_info = result["panoptic_seg"]
        image, _ = self._current()
        ids = np.asarray(ids.cpu(), dtype=np.int32)
        return PanopticResult(image, ids, segments_info, full, self.cfg.MODEL.WEIGHTS)

    def describe(self) -> str:
        """Return a description of the picture, generated greedily."""
        return self._text(self._ask("describe", "", [])[0])

    def extract_nouns(self, caption: str) -> list[str]:
        """Return the noun phrases of a caption as the model generates them, in its order.

        Raises:
            ValueError: the caption is empty or too long.
        """
        _require_text("caption", caption)
        return prompts.parse_nouns(self._text(self._ask("extract", caption, [])[0]))

    def _current(self) -> tuple[np.ndarray, EntityMap]:
        if self._image is None or self._entities is None:
            raise RuntimeError("no image yet: call set_image(image, entities) first")
        return self._image, self._entities

    def _text(self, result: dict[str, Any]) -> str:
        return result["text"].replace(self.tokenizer.eos_token or "</s>", "").strip()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of ``MODEL.LANGUAGE.TOKENIZER`` with <SEG>, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = prompts.load_tokenizer(self.cfg.MODEL.LANGUAGE.TOKENIZER)
        return self._tokenizer

    def _grounding(self, task: str, caption: str, phrases: list[dict[str, Any]]) -> Grounding:
        result, num_cut = self._ask(task, caption, phrases)
        image, entities = self._current()
        height, width = self._view["valid_size"]
        model = self.cfg.MODEL
        return Grounding(
            image=image,
            caption=caption,
            entities=entities,
            phrases=result["grounding"],
            colormap=self._view["colormap"].numpy().transpose(1, 2, 0)[:height, :width],
            task=task,
            own_masks=model.MASK_DECODER.QUERIES == "learned" and not model.GELLA.SNAP,
            cut_nouns=[phrase["text"] for phrase in phrases[len(phrases) - num_cut :]],
            config=self.config_file,
            weights=model.WEIGHTS,
        )

    def _ask(
        self, task: str, caption: str, phrases: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], int]:
        """Run the model on one mapped dict (the dataset mapper's contract) of the current image.

        Returns its result, and how many of the phrases, the last ones, were cut from the caption.
        """
        image, entities = self._current()
        encoder, language = self.cfg.MODEL.IMAGE_ENCODER, self.cfg.MODEL.LANGUAGE
        fitted = fit_prompt(
            self.tokenizer,
            task,
            caption,
            phrases,
            policy=self.cfg.INPUT.GELLA.OVERLONG_CAPTION,
            answered=task not in ("describe", "extract"),
            num_image_tokens=image_token_count(
                encoder.IMAGE_SIZE, encoder.PATCH_SIZE, language.IMAGE_TOKEN_STRIDE
            ),
            system=language.SYSTEM,
            max_length=language.MAX_POSITIONS,
        )
        if len(fitted.caption) < len(caption):
            _logger.warning(
                "the caption was cut to %d of %d characters, %d nouns left out: at most %d tokens "
                "fit (MODEL.LANGUAGE.MAX_POSITIONS)",
                *(len(fitted.caption), len(caption), fitted.num_cut, language.MAX_POSITIONS),
            )
        mapped = {
            **self._view,
            "entities_full": entities,
            "input_ids": fitted.prompt.input_ids,
            "labels": fitted.prompt.labels,
            "seg_positions": fitted.prompt.seg_positions,
            "phrases": phrases[: fitted.num_nouns],
            "caption": caption,
            "task": task,
            "height": image.shape[0],
            "width": image.shape[1],
        }
        with torch.no_grad():
            return self.model([mapped])[0], fitted.num_cut


def _phrase(text: str, start: int, end: int) -> dict[str, Any]:
    known = {"text": text, "start": start, "end": end, "is_plural": False, "is_thing": True}
    return {**known, "segment_ids": None, "entity_indices": None}


def _spans(caption: str, nouns: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of nouns in order; a noun out of order is sought everywhere; (-1, -1) if absent."""
    spans = prompts.locate_phrases(caption, list(nouns))
    return [
        span or prompts.locate_phrases(caption, [noun])[0] or (-1, -1)
        for noun, span in zip(nouns, spans, strict=True)
    ]


def _require_text(what: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{what} is empty; write a sentence that names what to find")

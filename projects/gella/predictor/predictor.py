"""Use a model from Python: give it a picture and its entities once, then ask.

predictor = GellaPredictor.from_config("configs/gella_tiny_shapes.yaml", "model_final.pth")
predictor.set_image("scene.png", "scene_masks.png")
result = predictor.ground("A red circle lies on the sand.", ["A red circle", "the sand"])
result.plot().save("grounded.png")

Several threads may ask one predictor at once. Each has its own current picture; a scene, which
``encode`` and ``set_image`` return, can also be passed to every question.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model

from gella.config import load_config
from gella.pictures.grounding import Grounding, PanopticResult
from gella.predictor.answers import Result
from gella.predictor.engine import Engine
from gella.predictor.many import answer_requests
from gella.predictor.questions import (
    Question,
    Request,
    caption_question,
    named_in,
    panoptic_question,
    phrases_question,
    referring_question,
    text_question,
)
from gella.predictor.scene import EntitiesLike, Scene, image_id_of
from gella.text import prompts
from gella.weights.checkpoint import load_weights

__all__ = ["DTYPES", "GellaPredictor", "Grounding", "Request", "Scene", "image_id_of"]

DTYPES = ("float32", "bfloat16")


class GellaPredictor:
    """Ground captions, expressions and category names in the entities of pictures.

    Args:
        cfg: a complete config. ``MODEL.WEIGHTS`` "" leaves the model untrained; every result then
            says so. ``MODEL.DEVICE`` "cuda" falls back to the CPU where there is none.
        model: use this model (its weights as they are) instead of building one.
        config_file: only named in the results.
        autocast: compute the vision side in bfloat16; see :meth:`from_config`.

    Raises:
        FileNotFoundError, ValueError: the weights are missing or do not fit the model.
    """

    def __init__(
        self, cfg: Any, *, model: Any = None, config_file: str = "", autocast: bool = False
    ) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        cfg.freeze()
        if model is None:
            model = build_model(cfg)
            if cfg.MODEL.WEIGHTS:
                load_weights(model, cfg.MODEL.WEIGHTS, cfg)
        self.cfg, self.model, self.config_file = cfg, model.eval(), config_file
        self._engine = Engine(cfg, self.model, config_file, autocast)
        self._current = threading.local()  # .scene, of each thread

    @classmethod
    def from_config(
        cls,
        config_file: str | Path,
        weights: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        opts: Sequence[str] = (),
    ) -> GellaPredictor:
        """Build a predictor from files.

        Args:
            config_file: YAML, such as those in ``configs/``.
            weights: checkpoint file; "" for untrained weights, None for what the config names.
            device: "cpu", "cuda", ...; None for what the config names.
            dtype: "float32", or "bfloat16": the language decoder's weights are kept in it
                (``MODEL.LANGUAGE.DTYPE``), and the vision side, a small part of the weights,
                computes in it by autocast, which leaves sums and norms in float32. None: as the
                config says.
            opts: overrides ``KEY, VALUE, KEY, VALUE, ...``.

        Raises:
            FileNotFoundError, ValueError: see :func:`load_config` and the class.
        """
        cfg = load_config(config_file, opts)
        if dtype is not None:
            if dtype not in DTYPES:
                raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
            cfg.MODEL.LANGUAGE.DTYPE = dtype
        if weights is not None:
            cfg.MODEL.WEIGHTS = str(weights)
        if device is not None:
            cfg.MODEL.DEVICE = device
        return cls(cfg, config_file=str(config_file), autocast=dtype == "bfloat16")

    def encode(
        self,
        image: np.ndarray | str | Path,
        entities: EntitiesLike,
        *,
        masks_format: str = "auto",
        segments_info: list[dict[str, Any]] | None = None,
        image_id: int | str | None = None,
    ) -> Scene:
        """Compute once what every question about a picture needs.

        Args:
            image: uint8 (H, W, 3) RGB, or a file (turned upright by its EXIF orientation).
            entities: the picture's entities (same frame): an EntityMap, ids (H, W), masks
                (E, H, W), a mask file, a segmenter, or the spec of one (``sam:PATH``); see
                :func:`gella.predictor.scene.read_entities`.
            masks_format: format of a mask file.
            segments_info: of a COCO panoptic file: which segments are crowd.
            image_id: picks the picture's masks in a file of many, and the colours of the
                colormap. Default for a file: :func:`image_id_of`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, the sizes differ, or there is no entity at all.
        """
        scene = self._engine.read(
            image,
            entities,
            masks_format=masks_format,
            segments_info=segments_info,
            image_id=image_id,
        )
        return self._engine.encode([scene])[0]

    def set_image(self, image: Any, entities: Any, **options: Any) -> Scene:
        """Choose the picture that this thread's next questions are about, and return its scene.

        Arguments and errors are those of :meth:`encode`.
        """
        scene = self.encode(image, entities, **options)
        self._current.scene = scene
        return scene

    def ground(
        self, caption: str, nouns: Sequence[str] | None = None, *, scene: Scene | None = None
    ) -> Grounding:
        """Find the entities that each noun of a caption names.

        Args:
            caption: the sentence.
            nouns: its noun phrases in the order of the caption; a noun that is not in it is
                grounded all the same and has the span -1. None: the model extracts them.
            scene: what it is about; None: this thread's current one.

        A caption that is too long is an error, or cut (``INPUT.GELLA.OVERLONG_CAPTION``): the
        result then lists the nouns that were left out.

        Raises:
            ValueError: the caption is empty, or there is no noun, or the text is too long.
            RuntimeError: no image was set.
        """
        if nouns is None:
            # An answer may name what the caption does not: such nouns would be invented.
            nouns = named_in(caption, self.extract_nouns(caption, scene=scene))
        return self._find(caption_question(caption, nouns), scene)

    def ground_phrases(
        self, caption: str, phrases: Sequence[dict[str, Any]], *, scene: Scene | None = None
    ) -> Grounding:
        """Ground nouns whose spans are known, such as those of a dataset's record.

        Args:
            caption: the sentence.
            phrases: per noun ``text``, ``start`` and ``end``; other keys are not looked at.
            scene: what it is about; None: this thread's current one.

        Raises:
            ValueError: the caption is empty, there is no noun, or the text is too long.
            RuntimeError: no image was set.
        """
        return self._find(phrases_question(caption, phrases), scene)

    def refer(self, expression: str, *, scene: Scene | None = None) -> Grounding:
        """Find what a referring expression names; the result has one phrase, the expression.

        Raises:
            ValueError: the expression is empty or too long.
            RuntimeError: no image was set.
        """
        return self._find(referring_question(expression), scene)

    def panoptic(
        self, categories: Sequence[dict[str, Any] | str], *, scene: Scene | None = None
    ) -> PanopticResult:
        """Give every entity one of the categories.

        Args:
            categories: COCO's form (``id``, ``name``, ``isthing``), or names only: these are then
                things with the ids 1, 2, ...
            scene: what it is about; None: this thread's current one.

        Raises:
            ValueError: there is no category, or the list is too long for the model.
            RuntimeError: no image was set.
        """
        return self._find(panoptic_question(categories), scene)

    def describe(
        self, *, scene: Scene | None = None, on_text: Callable[[str], None] | None = None
    ) -> str:
        """Return a description of the picture, generated greedily.

        Args:
            scene: what it is about; None: this thread's current one.
            on_text: gets the text so far, again and again while it is generated.

        Raises:
            RuntimeError: no image was set.
        """
        return self._text(text_question("describe"), scene, on_text)

    def extract_nouns(
        self,
        caption: str,
        *,
        scene: Scene | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Return the noun phrases of a caption as the model generates them, in its order.

        Args:
            caption: the sentence.
            scene: what it is about; None: this thread's current one.
            on_text: gets the answer so far, with ``<SEG>`` behind each noun, while it is generated.

        Raises:
            ValueError: the caption is empty or too long.
            RuntimeError: no image was set.
        """
        return prompts.parse_nouns(self._text(text_question("extract", caption), scene, on_text))

    def predict_many(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result | Exception]:
        """Answer many requests, several at a time.

        Args:
            requests: what to answer.
            batch_size: how many are computed together.
            progress: gets (requests done, requests in all) after each batch.

        Returns:
            per request what the single question returns, or the exception that it raises: one bad
            request does not stop the others.

        Raises:
            ValueError: the batch size is below 1.
        """
        return answer_requests(self._engine, requests, batch_size, progress)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of ``MODEL.LANGUAGE.TOKENIZER`` with <SEG>, loaded at first use."""
        return self._engine.tokenizer

    def _scene(self, scene: Scene | None) -> Scene:
        current = getattr(self._current, "scene", None) if scene is None else scene
        if current is None:
            raise RuntimeError("no image yet: call set_image(image, entities) first")
        return current

    def _text(
        self, question: Question, scene: Scene | None, on_text: Callable[[str], None] | None
    ) -> str:
        return self._engine.write([self._engine.ask(question, self._scene(scene))], on_text)[0]

    def _find(self, question: Question, scene: Scene | None) -> Any:
        return self._engine.find([self._engine.ask(question, self._scene(scene))])[0]

"""The predictor's workings: a model, asked about one or several scenes in one pass.

Threads may share it. Images are read and encoded one call at a time; questions run side by side.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gella.pictures.grounding import Grounding, PanopticResult
from gella.predictor.answers import to_grounding, to_panoptic
from gella.predictor.questions import Question, fit_question, mapped_input, prefix_ids
from gella.predictor.scene import Scene, read_scene
from gella.segmenters.segmenter import Segmenter, load_segmenter
from gella.text import prompts


@dataclass(frozen=True, eq=False)
class Asked:
    """A question about a scene.

    Attributes:
        question, scene: the scene is encoded.
        inputs: of the model, as the dataset mapper makes them.
        num_cut: so many of the question's phrases, the last ones, were cut from the caption.
    """

    question: Question
    scene: Scene
    inputs: dict[str, Any]
    num_cut: int


class Engine:
    """A model with its config and its tokenizer.

    Args:
        cfg: a complete, frozen config.
        model: in evaluation mode.
        config_file: only named in the results.
        autocast: compute in bfloat16 what autocast may.
    """

    def __init__(self, cfg: Any, model: Any, config_file: str, autocast: bool) -> None:
        self.cfg, self.model, self.config_file = cfg, model, config_file
        self._autocast = autocast
        self._tokenizer: Any = None
        self._prefix: torch.Tensor | None = None
        self._segmenters: dict[str, Segmenter] = {}
        # A model's vision side keeps notes while it computes, and so do segmenters and the readers
        # of mask files; a tokenizer may not be set up twice at once.
        self._encoding, self._words = threading.Lock(), threading.RLock()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of ``MODEL.LANGUAGE.TOKENIZER`` with <SEG>, loaded at first use."""
        with self._words:
            if self._tokenizer is None:
                self._tokenizer = prompts.load_tokenizer(self.cfg.MODEL.LANGUAGE.TOKENIZER)
            return self._tokenizer

    def read(self, image: Any, entities: Any, **options: Any) -> Scene:
        """A scene that is not encoded yet; see :func:`gella.predictor.scene.read_scene`."""
        with self._encoding:
            return read_scene(
                image,
                entities,
                inputs=self.cfg.INPUT.GELLA,
                image_size=self.cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE,
                segmenter=self._segmenter,
                **options,
            )

    def encode(self, scenes: Sequence[Scene]) -> list[Scene]:
        """The scenes with what the model computes of them once, in one pass."""
        with self._words:
            if self._prefix is None:
                self._prefix = prefix_ids(self.cfg, self.tokenizer)
        views = [
            {
                **scene.view,
                "entities_full": scene.entities,
                "height": scene.image.shape[0],
                "width": scene.image.shape[1],
            }
            for scene in scenes
        ]
        with self._encoding, self._computing():
            encoded = self.model.encode_images(views, self._prefix)
        return [replace(scene, encoded=one) for scene, one in zip(scenes, encoded)]

    def ask(self, question: Question, scene: Scene) -> Asked:
        """A question about an encoded scene, ready for :meth:`write` or :meth:`find`.

        Raises:
            ValueError: it is too long for the model.
        """
        with self._words:
            fitted = fit_question(question, self.cfg, self.tokenizer)
        return Asked(question, scene, mapped_input(scene, question, fitted), fitted.num_cut)

    def write(
        self, asked: Sequence[Asked], on_text: Callable[[str], None] | None = None
    ) -> list[str]:
        """The texts that questions of one task ask for, "describe" or "extract".

        Args:
            asked: questions; several may be about one scene.
            on_text: gets the text so far, of a single question.
        """
        encoded = [one.scene.encoded for one in asked]
        with self._computing():
            written = self.model.write_answers([one.inputs for one in asked], encoded, on_text)
        return [answer["text"] for answer in written]

    def find(self, asked: Sequence[Asked]) -> list[Grounding | PanopticResult]:
        """What questions of the other tasks ask for; the tasks may be mixed."""
        encoded = [one.scene.encoded for one in asked]
        with self._computing():
            found = self.model.find_entities([one.inputs for one in asked], encoded)
        results: list[Grounding | PanopticResult] = []
        for one, result in zip(asked, found):
            known = (self.cfg, self.config_file, one.scene, one.question, result)
            if one.question.task == "panoptic":
                results.append(to_panoptic(*known))
            else:
                results.append(to_grounding(*known, one.num_cut))
        return results

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self._autocast:  # else the caller's own autocast holds
                device = torch.device(self.cfg.MODEL.DEVICE).type
                stack.enter_context(torch.autocast(device, torch.bfloat16))
            yield

    def _segmenter(self, spec: str) -> Segmenter:
        if spec not in self._segmenters:
            self._segmenters[spec] = load_segmenter(spec, self.cfg.MODEL.DEVICE)
        return self._segmenters[spec]

"""Use a model from Python: give it a picture and its entities once, then ask.

predictor = GellaPredictor.from_config("configs/gella_tiny_shapes.yaml", "model_final.pth")
predictor.set_image("scene.png", "scene_masks.png")
result = predictor.ground("A red circle lies on the sand.", ["A red circle", "the sand"])
result.plot().save("grounded.png")

Several threads may ask one predictor at once. Each has its own current picture; a scene, which
``encode`` and ``set_image`` return, can also be passed to every question.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch

from gella.config import load_config
from gella.data.mapper import InputMaker, mapped_input
from gella.entities.entity_map import EntityMap
from gella.entities.view import read_image, read_with_entities
from gella.pictures.grounding import Grounding, PanopticResult
from gella.predictor.many import Nouns, Request, Result, answer_requests
from gella.predictor.scene import (
    EntitiesLike,
    Scene,
    image_id_of,
    is_spec,
    picture_of,
    read_entities,
)
from gella.segmenters.segmenter import Segmenter, load_segmenter
from gella.text import prompts
from gella.text.spans import located
from gella.utils.hub import model_folder
from gella.weights.checkpoint import build_with_weights, find_clip

TASKS = ("ground", "refer", "panoptic", "describe", "extract")
DTYPES = ("float32", "bfloat16")

_logger = logging.getLogger(__name__)


class GellaPredictor:
    """Ground captions, expressions and category names in the entities of pictures.

    Every question is about ``scene``, by default this thread's current one. Without any it raises
    RuntimeError, and ValueError for a text that is empty, names nothing or is too long.

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
        find_clip(cfg)
        cfg.freeze()
        if model is None:
            model = build_with_weights(cfg, cfg.MODEL.WEIGHTS)
        self.cfg, self.model, self.config_file = cfg, model.eval(), config_file
        self._autocast = autocast
        self._maker: InputMaker | None = None
        self._prefix: torch.Tensor | None = None
        self._segmenters: dict[str, Segmenter] = {}
        # A model's vision side keeps notes while it computes, and so do segmenters and the readers
        # of mask files; a tokenizer may not be set up twice at once.
        self._vision, self._words = threading.Lock(), threading.RLock()
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
            config_file: YAML, such as those in ``configs/``, or a folder of weights with its own.
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

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, **options: Any
    ) -> GellaPredictor:
        """Build a predictor from a folder of weights, or from such a folder on the hub.

        Args:
            name: a folder with ``config.yaml``, weights and tokenizer, such as
                ``tools/convert_weights.py --export`` writes, or a name ``owner/model``.
            revision: commit, branch or tag on the hub.
            options: of :meth:`from_config`.

        Raises:
            OSError: there is no such folder, and the hub does not have it or does not answer.
            ValueError: see :meth:`from_config`.
        """
        return cls.from_config(model_folder(name, revision), **options)

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
            image: a picture in memory (:func:`gella.predictor.scene.picture_of`), or a file, turned
                by the rule of :func:`gella.entities.view.read_image`.
            entities: the picture's entities (same frame): an EntityMap, ids (H, W), masks
                (E, H, W), a mask file, a segmenter, or the spec of one (``sam:PATH``); see
                :func:`gella.predictor.scene.read_entities`.
            masks_format: format of a mask file.
            segments_info: of a COCO panoptic file: which segments are crowd.
            image_id: picks the picture's masks in a file of many. Default for a file:
                :func:`image_id_of`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, the sizes differ, or there is no entity at all.
        """
        options = {"masks_format": masks_format, "segments_info": segments_info}
        return self._encode([self._read(image, entities, image_id=image_id, **options)])[0]

    def set_image(self, image: Any, entities: Any, **options: Any) -> Scene:
        """Choose the picture that this thread's next questions are about, and return its scene.

        Arguments and errors are those of :meth:`encode`.
        """
        scene = self.encode(image, entities, **options)
        self._current.scene = scene
        return scene

    def ground(
        self,
        caption: str,
        nouns: Sequence[str] | None = None,
        *,
        scene: Scene | None = None,
        threshold: float | None = None,
        exclusive: bool = False,
    ) -> Grounding:
        """Find the entities that each noun of a caption names, all nouns together in one pass.

        Args:
            caption: the sentence.
            nouns: its noun phrases in the order of the caption; a noun that is not in it is
                grounded all the same and has the span -1. None: the model extracts them.
            scene: what it is about.
            threshold: a noun takes the entities that score higher, 0..1, and always the best one;
                None: ``MODEL.GELLA.ASSOCIATION_THRESHOLD``.
            exclusive: no entity belongs to two nouns (``modeling.postprocessing.owners``).

        A caption that is too long is an error, or cut (``INPUT.GELLA.OVERLONG_CAPTION``): the
        result then lists the nouns that were left out.

        Raises:
            ValueError: the caption is empty, or there is no noun, or the text is too long.
            RuntimeError: no image was set.
        """
        if nouns is None:
            phrases = _named_in_caption(self.extract_nouns(caption, scene=scene).phrases)
        else:
            phrases = located(caption, nouns)
        question = _phrases_question(caption, phrases)
        return self._find_one(question, scene, threshold, exclusive=exclusive)

    def ground_phrases(
        self, caption: str, phrases: Sequence[dict[str, Any]], *, scene: Scene | None = None
    ) -> Grounding:
        """Ground nouns whose ``text``, ``start`` and ``end`` are known, such as a record's."""
        return self._find_one(_phrases_question(caption, phrases), scene)

    def refer(
        self, expression: str, *, scene: Scene | None = None, threshold: float | None = None
    ) -> Grounding:
        """Find what a referring expression names; the result has one phrase, the expression.

        ``threshold`` is that of :meth:`ground`.
        """
        return self._find_one(_referring_question(expression), scene, threshold)

    def panoptic(
        self,
        categories: Sequence[dict[str, Any] | str],
        *,
        scene: Scene | None = None,
        threshold: float | None = None,
    ) -> PanopticResult:
        """Give every entity one of the categories.

        Args:
            categories: COCO's form (``id``, ``name``, ``isthing``), or names only: these are then
                things with the ids 1, 2, ...
            threshold: entities whose best category scores lower are void, 0..1; None:
                ``MODEL.GELLA.PANOPTIC_THRESHOLD``.
        """
        return self._find_one(_panoptic_question(categories), scene, threshold)

    def describe(
        self, *, scene: Scene | None = None, on_text: Callable[[str], None] | None = None
    ) -> str:
        """Return a description of the picture, generated greedily.

        ``on_text`` gets the text so far, again and again while it is generated.
        """
        return self._write_one(Question("describe"), scene, on_text)["text"]

    def extract_nouns(
        self,
        caption: str,
        *,
        scene: Scene | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Nouns:
        """Return the noun phrases of a caption as the model copies them, in its order.

        With ``MODEL.GELLA.COPY_NOUNS`` False they are what the model says, in its own order, and
        the caption may lack some.

        ``on_text`` gets the answer so far, with ``<SEG>`` behind each noun, while it is generated.
        """
        question = Question("extract", _told("caption", caption))
        return Nouns(self._write_one(question, scene, on_text)["phrases"])

    def predict_many(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result | Exception]:
        """Answer many requests, ``batch_size`` (at least 1) computed together.

        Returns per request what the single question returns, or the exception that it raises: one
        bad request does not stop the others. ``progress`` gets (requests done, requests in all)
        after each batch.
        """
        return answer_requests(self, requests, batch_size, progress)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of ``MODEL.LANGUAGE.TOKENIZER`` with <SEG>, loaded at first use."""
        return self._inputs().tokenizer

    # -- the workings, for several scenes and questions per pass -----------------------------------

    def _inputs(self) -> InputMaker:
        with self._words:
            if self._maker is None:
                self._maker = InputMaker(self.cfg)
            return self._maker

    def _read(
        self, image: Any, entities: Any, *, image_id: int | str | None = None, **options: Any
    ) -> Scene:
        """A scene that is not encoded yet; arguments and errors are those of :meth:`encode`."""
        maker = self._inputs()
        with self._vision:
            of_file = isinstance(image, (str, Path))
            if of_file and image_id is None:
                image_id = image_id_of(image)

            def load(picture: np.ndarray) -> EntityMap:
                return read_entities(entities, picture, image_id=image_id, **options)

            if is_spec(entities):
                if entities not in self._segmenters:
                    self._segmenters[entities] = load_segmenter(entities, self.cfg.MODEL.DEVICE)
                entities = self._segmenters[entities]
            if not of_file:
                picture, checked = picture_of(image), None
            elif isinstance(entities, Segmenter):
                picture, checked = read_image(image), None
            else:
                picture, checked = read_with_entities(image, load)
            checked = checked or load(picture)
            ordered = checked.canonical()  # answers name entities by their ids
            view = maker.picture(picture, ordered, image_id=image_id)
        picture.flags.writeable = False
        return Scene(picture, checked, image_id, {**view, "entities_full": ordered})

    def _encode(self, scenes: Sequence[Scene]) -> list[Scene]:
        """The scenes with what the model computes of them once, in one pass."""
        maker = self._inputs()
        with self._words:
            if self._prefix is None:
                self._prefix = prefix_ids(maker)
        with self._vision, self._computing():
            encoded = self.model.encode_images([scene.view for scene in scenes], self._prefix)
        return [replace(scene, encoded=one) for scene, one in zip(scenes, encoded)]

    def _ask(self, question: Question, scene: Scene) -> Asked:
        """A question about an encoded scene; ValueError if it is too long for the model."""
        task, caption, phrases = question.task, question.caption, question.phrases
        maker = self._inputs()
        with self._words:
            fitted = maker.fit(task, caption, phrases, answered=task not in ("describe", "extract"))
        if len(fitted.caption) < len(caption):
            _logger.warning(
                "the caption was cut to %d of %d characters, %d nouns left out: at most %d tokens "
                "fit (MODEL.LANGUAGE.MAX_POSITIONS)",
                *(len(fitted.caption), len(caption), fitted.num_cut),
                self.cfg.MODEL.LANGUAGE.MAX_POSITIONS,
            )
        phrases = phrases[: fitted.num_nouns]
        return Asked(question, scene, mapped_input(scene.view, task, fitted, caption, phrases))

    def _ask_for(self, request: Request, scene: Scene, nouns: Nouns | None = None) -> Asked:
        """The first question of a request; with extracted ``nouns`` the one that follows."""
        text = request.text
        phrases = request.phrases if nouns is None else _named_in_caption(nouns.phrases)
        if phrases is None and request.nouns is not None:
            phrases = located(text, request.nouns)
        if request.task == "ground" and phrases is not None:
            question = _phrases_question(text, phrases)
        elif request.task in ("ground", "extract"):
            question = Question("extract", _told("caption", text))
        elif request.task == "refer":
            question = _referring_question(text)
        elif request.task == "panoptic":
            question = _panoptic_question(request.categories or ())
        elif request.task == "describe":
            question = Question("describe", text)
        else:
            raise ValueError(f"unknown task {request.task!r}; known: {', '.join(TASKS)}")
        asked = self._ask(question, scene)
        asked.inputs["exclusive"] = request.exclusive
        return asked

    def _write(
        self, asked: Sequence[Asked], on_text: Callable[[str], None] | None = None
    ) -> list[dict[str, Any]]:
        """The ``text`` and ``phrases`` that answer questions of one task, "describe" or "extract";
        some may share a scene."""
        encoded = [one.scene.encoded for one in asked]
        with self._computing():
            return self.model.write_answers([one.inputs for one in asked], encoded, on_text)

    def _find(self, asked: Sequence[Asked]) -> list[Grounding | PanopticResult]:
        """The answers to questions of the other tasks, which may be mixed."""
        encoded = [one.scene.encoded for one in asked]
        # No lock: the language side keeps nothing between passes, so threads may ask side by side.
        with self._computing():
            found = self.model.find_entities([one.inputs for one in asked], encoded)
        model = self.cfg.MODEL
        own_masks = model.MASK_DECODER.QUERIES == "learned" and not model.GELLA.SNAP
        source = {"config": self.config_file, "weights": model.WEIGHTS}
        results: list[Grounding | PanopticResult] = []
        for (question, scene, inputs), result in zip(asked, found):
            if question.task == "panoptic":
                ids, segments = result["panoptic_seg"]
                ids = np.asarray(ids.cpu(), dtype=np.int32)
                given = {"categories": question.categories, **source}
                given["entities"] = None if own_masks else scene.entities
                results.append(PanopticResult(scene.image, ids, segments, **given))
                continue
            results.append(
                Grounding(
                    image=scene.image,
                    caption=question.caption,
                    entities=scene.entities,
                    phrases=result["grounding"],
                    colormap=scene.colormap,
                    task=question.task,
                    own_masks=own_masks,
                    cut_nouns=[item["text"] for item in question.phrases[len(inputs["phrases"]) :]],
                    **source,
                )
            )
        return results

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self._autocast:  # else the caller's own autocast holds
                device = torch.device(self.cfg.MODEL.DEVICE).type
                stack.enter_context(torch.autocast(device, torch.bfloat16))
            yield

    def _scene(self, scene: Scene | None) -> Scene:
        current = getattr(self._current, "scene", None) if scene is None else scene
        if current is None:
            raise RuntimeError("no image yet: call set_image(image, entities) first")
        return current

    def _write_one(
        self, question: Question, scene: Scene | None, on_text: Callable[[str], None] | None
    ) -> dict[str, Any]:
        return self._write([self._ask(question, self._scene(scene))], on_text)[0]

    def _find_one(
        self,
        question: Question,
        scene: Scene | None,
        threshold: float | None = None,
        **options: Any,
    ) -> Any:
        asked = self._ask(question, self._scene(scene))
        asked.inputs.update(options)
        if threshold is not None:
            asked.inputs["threshold"] = threshold
        return self._find([asked])[0]


class Question(NamedTuple):
    """What is asked about a scene.

    Attributes:
        task: one of ``TASKS``.
        caption: the sentence that is asked about; "" for "describe".
        phrases: what its answer names, in the dataset mapper's form.
        categories: of "panoptic", with ``id``, ``name`` and ``isthing``.
    """

    task: str
    caption: str = ""
    phrases: Sequence[dict[str, Any]] = ()
    categories: Sequence[dict[str, Any]] = ()


class Asked(NamedTuple):
    """A question about an encoded scene, and the model's input of both."""

    question: Question
    scene: Scene
    inputs: dict[str, Any]


def _phrases_question(caption: str, phrases: Sequence[dict[str, Any]]) -> Question:
    """Where nouns of known spans are."""
    _told("caption", caption)
    if not phrases or not all(phrase["text"].strip() for phrase in phrases):
        raise ValueError(
            f'caption without nouns: "{shorten(caption, 80, placeholder=" ...")}"; write one that '
            "names something, or give nouns"
        )
    return Question("ground", caption, [_plain(phrase) for phrase in phrases])


def _referring_question(expression: str) -> Question:
    """What an expression names; it is its own only phrase."""
    _told("expression", expression)
    phrase = {"text": expression, "start": 0, "end": len(expression)}
    return Question("refer", expression, [_plain(phrase)])


def _panoptic_question(categories: Sequence[dict[str, Any] | str]) -> Question:
    """Which category each entity has; names without more are things with the ids 1, 2, ..."""
    if not categories:
        raise ValueError("panoptic: no category was given; give at least one name")
    full: list[dict[str, Any]] = [
        {"id": number, "name": item, "isthing": 1} if isinstance(item, str) else dict(item)
        for number, item in enumerate(categories, start=1)
    ]
    names = [prompts.spoken_name(category["name"]) for category in full]
    sentence = prompts.panoptic_sentence(names)
    phrases = [
        {**_plain(phrase), "category_id": item["id"], "isthing": item["isthing"]}
        for phrase, item in zip(located(sentence, names), full, strict=True)
    ]
    return Question("panoptic", sentence, phrases, full)


def _named_in_caption(phrases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the extracted nouns that the caption holds; where answers are free some are not."""
    named = [phrase for phrase in phrases if phrase["text"]]
    invented = [phrase["text"] for phrase in named if phrase["start"] < 0]
    if invented:
        _logger.warning("extracted nouns that are not in the caption: %s", invented)
    return [phrase for phrase in named if phrase["start"] >= 0]


def _plain(phrase: dict[str, Any]) -> dict[str, Any]:
    known = {key: phrase[key] for key in ("text", "start", "end")}
    unknown = {"segment_ids": None, "entity_indices": None}
    return {**known, "is_plural": False, "is_thing": True, **unknown}


def _told(what: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{what} is empty; write a sentence that names what to find")
    return text


def prefix_ids(maker: InputMaker) -> torch.Tensor:
    """What every question about an image begins with, up to its last image token: int64 (N,).

    It is cut from a whole prompt, so that its tokens are those of every other one.
    """
    ids = prompts.build_prompt(maker.tokenizer, "", None, **maker.limits).input_ids
    last = int((ids == prompts.IMAGE_TOKEN_ID).nonzero()[-1])
    return ids[: last + 1]

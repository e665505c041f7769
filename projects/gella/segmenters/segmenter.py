"""Entity masks from a live segmenter: an image goes in, an `EntityMap` comes out.

    segmenter = load_segmenter("sam:facebook/sam-vit-base", device="cuda")
    entities = segmenter.segment(read_image("photo.jpg"), MaskLimits(min_area=100))

A segmenter is named by a *spec*; class labels are dropped, since entities have none:

    sam:PATH                    SAM, SAM-HQ, SAM 2, SAM 3: masks of everything, by a grid of points
    transformers:PATH           Mask2Former, OneFormer, MaskFormer, DETR, EoMT: panoptic, instances
    detectron2:CONFIG:WEIGHTS   any Detectron2 model that returns instances or panoptic_seg

PATH is a folder that transformers' `save_pretrained` wrote, or a name on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gella.entities.entity_map import EntityMap
from gella.entities.sources import SOURCE_KINDS, LiveSource
from gella.entities.view import read_image

SPECS = (
    "sam:PATH (SAM, 2 and 3), transformers:PATH (Mask2Former, EoMT, ...) or "
    "detectron2:CONFIG:WEIGHTS"
)

KINDS: dict[str, type[Segmenter]] = {}
"""The kinds of specs; the siblings of this file enter theirs when the package is imported."""


@dataclass(frozen=True)
class MaskLimits:
    """Which of a segmenter's masks become entities.

    Attributes:
        min_area: pixels; smaller masks are left out.
        min_score: masks scored lower are left out; None keeps all.
        max_entities: this many masks of the highest scores are kept; None keeps all.

    Raises ValueError for negative areas and for max_entities below 1.
    """

    min_area: int = 1
    min_score: float | None = None
    max_entities: int | None = None

    def __post_init__(self) -> None:
        if self.min_area < 0:
            raise ValueError(f"the smallest area is {self.min_area} pixels; give 0 or more")
        if self.max_entities is not None and self.max_entities < 1:
            raise ValueError(f"at most {self.max_entities} entities were asked for; give 1 or more")

    def flatten(self, masks: np.ndarray, scores: np.ndarray) -> EntityMap:
        """Turn masks bool (E, H, W), which may overlap, and scores float (E,) into entities.

        They are numbered 1..E' in the order of ``masks``; there may be none. Those that overlap
        keep their pixels, see `EntityMap.from_codes`.
        """
        keep = masks.sum(axis=(1, 2)) >= max(1, self.min_area)
        if self.min_score is not None:
            keep &= scores >= self.min_score
        chosen = np.flatnonzero(keep)
        if self.max_entities is not None:
            best = np.argsort(-scores[chosen], kind="stable")[: self.max_entities]
            chosen = np.sort(chosen[best])
        entities = EntityMap.from_masks(masks[chosen], scores[chosen])
        entities.segment_ids, entities.merged = list(range(1, entities.num_entities + 1)), {}
        return entities


class Segmenter:
    """Base of the live segmenters. A subclass says what its `predict` finds and its OPTIONS.

    Attributes:
        FORM: of the specs that name it; each part between colons is an argument of the class, and
            the device follows them.
        OPTIONS: what `load_segmenter` accepts for the kind: name -> (type of the value, meaning).
    """

    FORM = ""
    OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {}

    def __init_subclass__(cls) -> None:
        """Make the kind known under the first word of its FORM."""
        if cls.FORM:
            KINDS[cls.FORM.partition(":")[0]] = cls

    def predict(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Find the masks of uint8 RGB images (H, W, 3) of any sizes.

        Returns per image masks bool (E, H, W), which may overlap, and scores float32 (E,). The
        result for an image does not depend on the others of the call.
        """
        raise NotImplementedError

    def segment(self, image: np.ndarray, limits: MaskLimits | None = None) -> EntityMap:
        """Entities of one uint8 RGB image (H, W, 3); the map may hold none."""
        return self.segment_batch([image], limits)[0]

    def segment_batch(
        self, images: Sequence[np.ndarray], limits: MaskLimits | None = None
    ) -> list[EntityMap]:
        """Entities of several uint8 RGB images (H, W, 3), one map per image.

        Raises ValueError for other arrays and for a model that answers nonsense.
        """
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        with torch.inference_mode():
            answers = self.predict(images)
        results = []
        for image, (masks, scores) in zip(images, answers):
            if masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
                raise ValueError(
                    f"the segmenter gave masks of shape {masks.shape} for an image of "
                    f"{image.shape[1]}x{image.shape[0]} (width x height)"
                )
            if not np.isfinite(scores).all():
                raise ValueError("the segmenter gave scores that are no numbers; are its weights?")
            results.append((limits or MaskLimits()).flatten(masks, scores))
        return results

    @classmethod
    def parse_options(cls, options: Mapping[str, str]) -> dict[str, Any]:
        """Convert option values from text; ValueError names an unknown one or a wrong value."""
        parsed = {}
        for name, value in options.items():
            if name not in cls.OPTIONS:
                known = "; ".join(f"{key}: {text}" for key, (_, text) in cls.OPTIONS.items())
                raise ValueError(f"segmenter option {name!r} is not known; there are {known}")
            convert, text = cls.OPTIONS[name]
            try:
                parsed[name] = convert(value)
            except ValueError as error:
                raise ValueError(
                    f"segmenter option {name}={value}: {error}; it is {text}"
                ) from error
        return parsed


class SegmenterSource(LiveSource):
    """Entities of dataset records made on the spot, in the place of files.

    The model is loaded at the first image, once per process. The processes of a loader cannot share
    one GPU's model: for more than a look, write the masks to a file first
    (``tools/precompute_entities.py``), or set ``DATALOADER.NUM_WORKERS 0``.
    """

    def __init__(self, spec: str) -> None:
        """``spec``: as of `load_segmenter`; only its form is checked."""
        _split_spec(spec)
        super().__init__(self._find)
        self._spec = spec
        self._segmenter: Segmenter | None = None

    def __str__(self) -> str:
        return self._spec

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_segmenter": None}

    def load(self, record: dict[str, Any], image: np.ndarray | None = None) -> EntityMap:
        """See `LiveSource.load`; without `image` the picture is read."""
        if image is None:
            image = read_image(record["file_name"], size=(record["height"], record["width"]))
        return super().load(record, image)

    def _find(self, image: np.ndarray) -> EntityMap:
        if self._segmenter is None:
            self._segmenter = load_segmenter(self._spec)
        return self._segmenter.segment(image)


SOURCE_KINDS["segmenter"] = SegmenterSource


def load_segmenter(
    spec: str, device: str | None = None, options: Mapping[str, str] | None = None
) -> Segmenter:
    """Load the segmenter that a spec (see the top of this file) names.

    Args:
        spec: ``sam:PATH``, ``transformers:PATH`` or ``detectron2:CONFIG:WEIGHTS``. Code and pickles
            that come with a model are never run.
        device: "cpu", "cuda", "cuda:1", ...; None takes CUDA where there is one.
        options: values by name, as text; the names are the kind's OPTIONS. A Detectron2 model also
            takes config keys (``MODEL.ROI_HEADS.SCORE_THRESH_TEST``).

    Raises:
        FileNotFoundError: a file or folder of the spec does not exist.
        ValueError: a wrong spec, device, option, or a model that cannot be loaded; the message says
            what to do.
    """
    kind, parts = _split_spec(spec)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        on_gpu = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; use cpu, cuda or cuda:NUMBER") from error
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for but torch sees no CUDA; use --device cpu")
    return kind(*parts, device, **kind.parse_options(options or {}))


def _split_spec(spec: str) -> tuple[Any, list[str]]:
    """The class of a spec and its arguments."""
    name, _, rest = spec.partition(":")
    if name not in KINDS or not rest:
        raise ValueError(f"segmenter {spec!r} is none of {SPECS}")
    form = KINDS[name].FORM
    wanted = form.split(":")[1:]
    parts = [part for part in rest.split(":", len(wanted) - 1) if part]
    if len(parts) < len(wanted):
        lacking = wanted[len(parts)].lower()
        raise ValueError(f"segmenter {spec!r} lacks its {lacking}; give {form}")
    return KINDS[name], parts


def one_of(*choices: str) -> Callable[[str], str]:
    """Converter of an option that is one of a few words; ValueError for another."""

    def convert(value: str) -> str:
        if value not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return value

    return convert

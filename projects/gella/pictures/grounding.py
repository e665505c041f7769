"""What the predictor returns: a grounded caption or a panoptic map, ready for JSON and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from gella.entities.entity_map import EntityMap
from gella.pictures.visualizer import draw_colormap, draw_grounding, draw_panoptic


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return a bool (H, W) mask as COCO's compressed RLE: ``{"size": [H, W], "counts": str}``."""
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


@dataclass
class Grounding:
    """The entities that the nouns of one caption name.

    Attributes:
        image: uint8 (H, W, 3) RGB, the picture as it was given.
        caption: the text; for the task "refer" the expression.
        entities: the input entities in the frame of ``image``.
        phrases: one dict per noun in order: ``phrase``, ``start`` and ``end`` (characters of
            ``caption``; -1 where the noun is not in it), ``entity_ids`` (best first; ids as
            ``entities.segment_ids``, see ``own_masks``), ``scores`` (association probability of
            each, 0..1) and ``mask``, the union, bool (H, W).
        colormap: uint8 (h, w, 3), what the colormap encoder saw, without padding.
        task: "ground" or "refer".
        own_masks: True when ``entity_ids`` number masks that the model decoded itself (learned
            queries without snapping) instead of the input's. With snapping, an id below 0 is such
            a mask.
        cut_nouns: nouns of a caption too long for the model that were left out; not in ``phrases``.
        config: the config file, "" if there was none.
        weights: the checkpoint file, "" for untrained weights.
    """

    image: np.ndarray
    caption: str
    entities: EntityMap
    phrases: list[dict[str, Any]]
    colormap: np.ndarray
    task: str = "ground"
    own_masks: bool = False
    cut_nouns: list[str] = field(default_factory=list)
    config: str = ""
    weights: str = ""

    @property
    def untrained(self) -> bool:
        """Whether the weights are random, so that the answer means nothing."""
        return not self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the result in values that ``json`` can write; masks as COCO's compressed RLE.

        ``entity_numbers`` counts the input entities from 1 in their order, as the picture does;
        it is None for a mask that the model decoded itself.
        """
        return {
            "task": self.task,
            "caption": self.caption,
            "height": int(self.image.shape[0]),
            "width": int(self.image.shape[1]),
            "num_entities": self.entities.num_entities,
            "config": self.config,
            "weights": self.weights or "untrained",
            "nouns": [
                {
                    "noun": phrase["phrase"],
                    "start": int(phrase["start"]),
                    "end": int(phrase["end"]),
                    "entity_ids": [int(entity) for entity in phrase["entity_ids"]],
                    "entity_numbers": [self._number(entity) for entity in phrase["entity_ids"]],
                    "scores": [float(score) for score in phrase["scores"]],
                    "mask": encode_mask(phrase["mask"]),
                }
                for phrase in self.phrases
            ],
            "cut_nouns": list(self.cut_nouns),
        }

    def to_rle(self) -> dict[str, list[dict[str, Any]]]:
        """Return the masks alone, as COCO's compressed RLE, bytes as ASCII text.

        ``nouns``: per noun ``noun`` and ``mask``, the union of its entities. ``entities``: per
        input entity ``id`` (as files name it), ``number`` (from 1, as the picture shows it) and
        ``mask``.
        """
        named = zip(self.entities.segment_ids, self.entities.to_rle(), strict=True)
        return {
            "nouns": [
                {"noun": phrase["phrase"], "mask": encode_mask(phrase["mask"])}
                for phrase in self.phrases
            ],
            "entities": [
                {"id": segment_id, "number": number, "mask": mask}
                for number, (segment_id, mask) in enumerate(named, start=1)
            ],
        }

    def plot(self) -> Image.Image:
        """Return the picture of :func:`gella.pictures.visualizer.draw_grounding`."""
        return draw_grounding(
            self.image,
            self.caption,
            self.phrases,
            entities=None if self.own_masks else self.entities,
            untrained=self.untrained,
        )

    def plot_colormap(self) -> Image.Image:
        """Return the colormap as a picture; its colours are those that the model saw."""
        return draw_colormap(self.colormap)

    def _number(self, entity_id: int) -> int | None:
        if self.own_masks or entity_id not in self.entities.segment_ids:
            return None
        return self.entities.index_of(entity_id) + 1


@dataclass
class PanopticResult:
    """A panoptic map of one picture.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        ids: int32 (H, W), the segment of each pixel, 0 = void.
        segments_info: per segment ``id``, ``category_id``, ``isthing`` and ``score``.
        categories: ``id``, ``name`` and ``isthing`` of every category that was asked for.
        weights: the checkpoint file, "" for untrained weights.
        config: the config file, "" if there was none.
    """

    image: np.ndarray
    ids: np.ndarray
    segments_info: list[dict[str, Any]]
    categories: Sequence[dict[str, Any]] = field(default_factory=list)
    weights: str = ""
    config: str = ""

    @property
    def untrained(self) -> bool:
        """Whether the weights are random, so that the answer means nothing."""
        return not self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the result in values that ``json`` can write; masks as COCO's compressed RLE."""
        names = {category["id"]: category["name"] for category in self.categories}
        return {
            "task": "panoptic",
            "height": int(self.ids.shape[0]),
            "width": int(self.ids.shape[1]),
            "config": self.config,
            "weights": self.weights or "untrained",
            "categories": [dict(category) for category in self.categories],
            "segments": [
                {
                    "id": int(segment["id"]),
                    "category_id": segment["category_id"],
                    "category": names.get(segment["category_id"]),
                    "isthing": bool(segment["isthing"]),
                    "score": float(segment["score"]),
                    "mask": coded["mask"],
                }
                for segment, coded in zip(self.segments_info, self.to_rle(), strict=True)
            ],
        }

    def to_rle(self) -> list[dict[str, Any]]:
        """Return per segment ``id`` and ``mask``, COCO's compressed RLE."""
        return [
            {"id": int(segment["id"]), "mask": encode_mask(self.ids == segment["id"])}
            for segment in self.segments_info
        ]

    def plot(self) -> Image.Image:
        """Return the picture of :func:`gella.pictures.visualizer.draw_panoptic`."""
        return draw_panoptic(
            self.image,
            self.ids,
            self.segments_info,
            self.categories,
            untrained=self.untrained,
        )

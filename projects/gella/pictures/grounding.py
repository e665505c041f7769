"""Results, ready for JSON and pictures: a grounded caption, and a panoptic map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gella.entities.entity_map import EntityMap
from gella.entities.rle import encode_mask
from gella.pictures.chips import Color, Piece, palette
from gella.pictures.overlays import layers_of, layers_of_ids
from gella.pictures.panels import Panels, draw_colormap


class Noun(NamedTuple):
    """A noun or a category as pictures and pages show it.

    Attributes:
        text: the noun.
        color: place of its colour in the palette; equal nouns with equal entities share one.
        numbers: of its input entities, counted from 1 in their order, ascending.
        made: ids of its masks that the model made itself, ascending.
        names: how a reader is told of both: "1", "2", "new".
        start, end: characters of the caption; -1 where it is not in it.
        scores: of each name, 0..1.
    """

    text: str
    color: int
    numbers: tuple[int, ...]
    made: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    start: int = -1
    end: int = -1
    scores: tuple[float, ...] = ()

    @property
    def scored(self) -> str:
        """Its entities as text with their scores, such as "1 (0.98), new (0.61)"."""
        pairs = zip(self.names, self.scores)
        return ", ".join(f"{name} ({score:.2f})" for name, score in pairs) or "no entity"

    @property
    def listed(self) -> str:
        """Its entities as text, such as "[1, 2, new]"."""
        return f"[{', '.join(self.names)}]" if self.names else "no entity"


def cut_caption(caption: str, nouns: Sequence[Noun]) -> list[tuple[str, int | None]]:
    """Cut a caption at the spans of its nouns, into texts that joined are the caption again.

    Returns:
        each text with the index of its noun. Nouns without a span, or whose span overlaps an
        earlier one, get none.
    """
    pieces: list[tuple[str, int | None]] = []
    cursor = 0
    # By their start, since nouns may come in any order and inside one another.
    for index in sorted(range(len(nouns)), key=lambda k: nouns[k].start):
        start, end = nouns[index].start, min(nouns[index].end, len(caption))
        if cursor <= start < end:
            pieces += [(caption[cursor:start], None), (caption[start:end], index)]
            cursor = end
    return [piece for piece in [*pieces, (caption[cursor:], None)] if piece[0]]


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
            each, 0..1), ``mask``, the union, bool (H, W), and ``probabilities``, of every entity
            by its id, named or not.
        colormap: uint8 (h, w, 3), what the colormap encoder saw, without padding.
        task: "ground" or "refer".
        own_masks: True when ``entity_ids`` number masks that the model decoded itself (learned
            queries without snapping) instead of the input's. With snapping, an id below 0 is such
            a mask.
        cut_nouns: nouns of a caption too long for the model that were left out; not in ``phrases``.
        config: the config file, "" if there was none.
        weights: the checkpoint file, "" for untrained weights.
        number_all: the page numbers all entities, not only those that a noun names.
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
    number_all: bool = False

    @property
    def untrained(self) -> bool:
        """Whether the weights are random, so that the answer means nothing."""
        return not self.weights

    @property
    def probabilities(self) -> np.ndarray:
        """What the nouns were chosen by: float64 (P, E), the probability that a noun names an input
        entity, in their order; NaN where no mask of the model stands for the entity."""
        ids = list(self._numbers())
        rows = [[p.get("probabilities", {}).get(i, np.nan) for i in ids] for p in self.phrases]
        return np.array(rows, dtype=np.float64).reshape(len(self.phrases), len(ids))

    @property
    def unnamed(self) -> list[int]:
        """Numbers of the input entities that no noun names, counted from 1."""
        named = {entity for phrase in self.phrases for entity in phrase["entity_ids"]}
        return [number for entity, number in self._numbers().items() if entity not in named]

    def to_json(self) -> dict[str, Any]:
        """Return the result in values that ``json`` can write; masks as COCO's compressed RLE.

        ``entity_numbers`` counts the input entities from 1 in their order, as the picture does;
        it is None for a mask that the model decoded itself. ``probabilities`` of a noun are of all
        input entities in this order, None where no mask stands for one.
        """
        numbers = self._numbers()
        rows = self.probabilities.tolist()
        every = [[None if np.isnan(number) else number for number in row] for row in rows]
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
                    "entity_numbers": [numbers.get(entity) for entity in phrase["entity_ids"]],
                    "scores": [float(score) for score in phrase["scores"]],
                    "probabilities": row,
                    "mask": encode_mask(phrase["mask"]),
                }
                for phrase, row in zip(self.phrases, every, strict=True)
            ],
            "unnamed_entities": self.unnamed,
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

    def nouns(self) -> list[Noun]:
        """The nouns as pictures show them, in the order of ``phrases``."""
        known, nouns = self._numbers(), []
        order: dict[Any, int] = {}
        for item in self.phrases:
            ids = item["entity_ids"]
            color = order.setdefault((item["phrase"].lower(), tuple(ids)), len(order))
            numbers = tuple(sorted(known[entity] for entity in ids if entity in known))
            made = tuple(sorted(entity for entity in ids if entity not in known))
            names = [*numbers, *(made if self.own_masks else ["new"] * len(made))]
            texts = tuple(str(name) for name in names)
            score = dict(zip(ids, item["scores"]))
            scores = [
                *sorted(ids, key=lambda entity: (entity not in known, known.get(entity, entity)))
            ]
            span = (item["start"], item["end"], tuple(score[entity] for entity in scores))
            nouns.append(Noun(item["phrase"], color, numbers, made, texts, *span))
        return nouns

    def plot(self) -> Image.Image:
        """Draw the grounded caption as in Figure 4 of the paper.

        Left the picture, right the same in grey with each noun's masks in its colour and the
        entities outlined and numbered, below both the caption with the nouns on chips of the same
        colours, and the list ``noun: [entity numbers]`` ("new" is a mask that the model made
        itself). A pixel that several nouns claim is striped in their colours.

        Raises:
            ValueError: a mask's size is not the image's.
        """
        nouns, panels = self.nouns(), Panels(self.image)
        colors = palette(1 + max((noun.color for noun in nouns), default=0))
        masks: dict[int, list[np.ndarray]] = {}  # by colour
        owners: dict[int, list[Color]] = {}
        made = []  # masks that the model made itself belong to no input entity
        for noun, item in zip(nouns, self.phrases, strict=True):
            layer, color = panels.layer(item["mask"]), colors[noun.color]
            masks.setdefault(noun.color, []).append(item["mask"])
            if noun.made and layer is not None:
                made.append((layer, [color]))
            for number in noun.numbers:
                owners.setdefault(number, []).append(color)
        # A pixel of two like-coloured nouns is no stripe, so their masks are united first.
        united = {color: np.logical_or.reduce(group) for color, group in masks.items()}
        layers = {color: panels.layer(mask) for color, mask in united.items()}
        panels.blend([(layer, colors[k]) for k, layer in layers.items() if layer is not None])
        parts = {k: part for k, part in layers_of(self.entities).items() if k in owners}
        numbered = panels.layers(parts)
        outlined = [(layer, list(dict.fromkeys(owners[k]))) for k, layer in numbered.items()]
        panels.outline([*outlined, *made])
        text = [
            Piece(part, None if index is None else colors[nouns[index].color])
            for part, index in cut_caption(self.caption, nouns)
        ]
        # "not in the caption": a reader would look for the chip there.
        items = [
            [
                Piece(noun.text, colors[noun.color]),
                Piece(f": {noun.listed}{' (not in the caption)' if noun.start < 0 else ''}"),
            ]
            for noun in nouns
        ]
        return panels.picture(numbered, text, items, untrained=self.untrained)

    def plot_colormap(self) -> Image.Image:
        """Return the colormap as a picture; its colours are those that the model saw."""
        return draw_colormap(self.colormap)

    def _numbers(self) -> dict[int, int]:
        """The number of every input entity that ``entity_ids`` may name, by its id."""
        ids = () if self.own_masks else self.entities.segment_ids
        return {segment_id: number for number, segment_id in enumerate(ids, start=1)}


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
        entities: the input entities that the segments are made of; None numbers the segments.
    """

    image: np.ndarray
    ids: np.ndarray
    segments_info: list[dict[str, Any]]
    categories: Sequence[dict[str, Any]] = field(default_factory=list)
    weights: str = ""
    config: str = ""
    entities: EntityMap | None = None

    @property
    def untrained(self) -> bool:
        """Whether the weights are random, so that the answer means nothing."""
        return not self.weights

    @property
    def names(self) -> dict[int, str]:
        """Name of every category that was asked for, by its id."""
        return {category["id"]: category["name"] for category in self.categories}

    def to_json(self) -> dict[str, Any]:
        """Return the result in values that ``json`` can write; masks as COCO's compressed RLE.

        ``entity_numbers`` and ``entity_ids`` of a segment are those of `Grounding.to_json`.
        """
        known, members = self.entities.segment_ids if self.entities else [], self.members()
        numbers = {s: [k for k in group if k <= self.last] for s, group in members.items()}
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
                    "category": self.names.get(segment["category_id"]),
                    "isthing": bool(segment["isthing"]),
                    "score": float(segment["score"]),
                    "entity_ids": [known[k - 1] for k in numbers[segment["id"]] if known],
                    "entity_numbers": numbers[segment["id"]],
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

    @property
    def last(self) -> int:
        """The last number of an entity."""
        return len(self.segments_info) if self.entities is None else self.entities.num_entities

    def numbered(self) -> np.ndarray:
        """What each pixel's segment is made of: int32 (H, W), 0 = void.

        An input entity has its number, from 1 in their order, as in every other result. Above
        `last` come the masks that the model made itself, one a segment.
        """
        entities = np.zeros_like(self.ids) if self.entities is None else self.entities.ids
        width = int(self.ids.max()) + 1
        pairs = np.bincount((entities.astype(np.int64) * width + self.ids).ravel())
        pairs = np.pad(pairs, (0, -len(pairs) % width)).reshape(-1, width)
        pairs[0], pairs[:, 0] = 0, 0
        # An entity belongs to the segment that has most of it.
        owned = pairs.argmax(axis=1)[entities] == self.ids
        made = np.zeros(width, dtype=np.int32)
        for place, segment in enumerate(self.segments_info, start=1):
            made[segment["id"]] = place if self.entities is None else self.last + place
        rest = made[self.ids]
        return np.where(owned & (rest > 0), entities, rest)

    def members(self) -> dict[int, list[int]]:
        """The numbers (`numbered`) that each segment is made of, ascending, by its id."""
        numbers = self.numbered()
        owners = np.zeros(int(numbers.max()) + 1, dtype=np.int32)
        owners[numbers] = self.ids
        owners[0] = 0
        return {s["id"]: np.flatnonzero(owners == s["id"]).tolist() for s in self.segments_info}

    def nouns(self) -> list[Noun]:
        """The categories that were found, with the numbers (`numbered`) of what they name."""
        found: dict[int, dict[int, float]] = {}
        members = self.members()
        for segment in self.segments_info:
            scored = dict.fromkeys(members[segment["id"]], segment.get("score", 1.0))
            found.setdefault(segment["category_id"], {}).update(scored)
        nouns = []
        for color, (k, group) in enumerate(found.items()):
            numbers = tuple(sorted(group))
            names = tuple(str(number) if number <= self.last else "new" for number in numbers)
            scores = tuple(group[number] for number in numbers)
            nouns.append(Noun(self.names[k], color, numbers, (), names, scores=scores))
        return nouns

    def plot(self) -> Image.Image:
        """Draw the map: a colour per category, entities outlined and numbered, names below."""
        nouns, panels = self.nouns(), Panels(self.image)
        colors = palette(len(nouns))
        panels.layer(self.ids != 0)  # refuses a map of another size
        owner = {number: colors[noun.color] for noun in nouns for number in noun.numbers}
        layers = panels.layers(layers_of_ids(self.numbered()))
        panels.blend([(layer, owner[number]) for number, layer in layers.items()])
        panels.outline([(layer, [owner[number]]) for number, layer in layers.items()])
        labelled = {number: layer for number, layer in layers.items() if number <= self.last}
        items = [
            [Piece(noun.text, color), Piece(f": {noun.listed}")]
            for noun, color in zip(nouns, colors, strict=True)
        ]
        return panels.picture(labelled, [], items, untrained=self.untrained)

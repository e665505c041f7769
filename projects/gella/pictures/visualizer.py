"""Pictures of what the model did: nouns in their colours on the masks and in the caption.

Every function takes arrays and plain dicts and returns a new ``PIL.Image``; nothing is shown or
written here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from gella.entities.entity_map import EntityMap
from gella.pictures.colors import Color, palette
from gella.pictures.labels import deepest_point
from gella.pictures.mask_layers import Layer
from gella.pictures.panels import MASK_OPACITY, Panels
from gella.pictures.text_layout import PAPER, Piece, draw_row, flow_items, load_font, wrap_pieces

__all__ = [
    "MASK_OPACITY",
    "caption_pieces",
    "deepest_point",
    "draw_colormap",
    "draw_grounding",
    "draw_panoptic",
    "noun_colors",
    "palette",
]

_MARGIN = 16  # pixels around the panels and the text
_MIN_WIDTH = 640  # pixels; narrower pictures cannot hold legible text


def noun_colors(grounding: Sequence[dict[str, Any]]) -> list[Color]:
    """Return one colour per noun, in order; equal nouns with equal entities share one."""
    keys = [(item["phrase"].lower(), tuple(item["entity_ids"])) for item in grounding]
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    colors = palette(len(order))
    return [colors[order[key]] for key in keys]


def draw_grounding(
    image: np.ndarray,
    caption: str,
    grounding: Sequence[dict[str, Any]],
    *,
    entities: EntityMap | None = None,
    untrained: bool = False,
) -> Image.Image:
    """Draw a grounded caption as in Figure 4 of the paper.

    Left the picture, right the same in grey with each noun's masks in its colour, below both the
    caption with the nouns on chips of the same colours, and the list ``noun: [entity numbers]``.
    A pixel that several nouns claim is striped in their colours. Small pictures are enlarged.

    Args:
        image: uint8 (H, W, 3) RGB.
        caption: the text that the spans count in.
        grounding: per noun ``phrase``, ``start``, ``end`` (characters; -1 where the noun is not in
            the caption), ``entity_ids``, ``mask`` bool (H, W).
        entities: the image's entities (same frame). With them each entity is outlined and numbered
            1, 2, ... in their order, and the list shows these numbers instead of ids ("new" for an
            id that is none of theirs: a mask that the model made itself).
        untrained: print a warning that the weights are random.

    Raises:
        ValueError: a mask's size is not the image's.
    """
    colors = noun_colors(grounding)
    for item in grounding:
        _check_size(item["mask"], image)
    panels = Panels(image)
    panels.blend(*_noun_layers(panels, grounding, colors))
    owners: dict[int, list[Color]] = {}
    for item, color in zip(grounding, colors, strict=True):
        for number in _known_numbers(item["entity_ids"], entities):
            owners.setdefault(number, []).append(color)
    layers = {} if entities is None else _entity_layers(panels, entities.ids, owners)
    own = [list(dict.fromkeys(owners[number])) for number in layers]
    # Masks that the model made itself belong to no input entity.
    made = [
        (layer, [color])
        for item, color in zip(grounding, colors, strict=True)
        if len(_known_numbers(item["entity_ids"], entities)) < len(item["entity_ids"])
        for layer in [panels.layer(item["mask"])]
        if layer is not None
    ]
    panels.outline(
        [*layers.values(), *(layer for layer, _ in made)], [*own, *(color for _, color in made)]
    )
    marked = panels.marked(list(layers.values()), [str(number) for number in layers])
    items = []
    for item, color in zip(grounding, colors, strict=True):
        absent = " (not in the caption)" if item["start"] < 0 else ""
        numbers = _numbers(item["entity_ids"], entities)
        items.append([Piece(item["phrase"], color), Piece(f": {numbers}{absent}", None)])
    text = caption_pieces(caption, grounding, colors)
    return _compose([panels.plain(), marked], text, items, untrained, stacked=panels.stacked)


def draw_panoptic(
    image: np.ndarray,
    ids: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    *,
    untrained: bool = False,
) -> Image.Image:
    """Draw a panoptic result: one colour per category, one outline per segment, names below.

    Args:
        image: uint8 (H, W, 3) RGB.
        ids: int (H, W), the segment of each pixel; 0 is void and stays uncoloured.
        segments_info: Detectron2's form, ``id`` and ``category_id`` per segment.
        categories: ``id`` and ``name`` of every category that occurs.
        untrained: print a warning that the weights are random.
    """
    names = {category["id"]: category["name"] for category in categories}
    present = list(dict.fromkeys(segment["category_id"] for segment in segments_info))
    members = [[s["id"] for s in segments_info if s["category_id"] == c] for c in present]
    colors = dict(zip(present, palette(len(present)), strict=True))
    _check_size(ids, image)
    panels = Panels(image)
    own = [colors[segment["category_id"]] for segment in segments_info]
    numbered = EntityMap.from_id_image(ids, [segment["id"] for segment in segments_info])
    layers = _entity_layers(panels, numbered.ids, range(1, len(own) + 1))
    shown = [own[number - 1] for number in layers]
    panels.blend(list(layers.values()), shown)
    panels.outline(list(layers.values()), [[color] for color in shown])
    legend = []
    for category, group, color in zip(present, members, colors.values(), strict=True):
        count = f" x {len(group)}" if len(group) > 1 else ""
        legend.append([Piece(names[category], color), Piece(count, None)])
    pictures = [panels.plain(), panels.marked([], [])]
    return _compose(pictures, [], legend, untrained, stacked=panels.stacked)


def draw_colormap(colormap: np.ndarray, valid_size: tuple[int, int] | None = None) -> Image.Image:
    """Return the colormap (uint8 (H, W, 3), 0 = no entity) as a picture, enlarged if small.

    Args:
        colormap: what the colormap encoder sees, RGB.
        valid_size: (h, w) of the part that is no padding; given, the padding is cut off.
    """
    if valid_size is not None:
        colormap = colormap[: valid_size[0], : valid_size[1]]
    factor = max(1, math.ceil(_MIN_WIDTH / max(colormap.shape[:2])))
    height, width = colormap.shape[0] * factor, colormap.shape[1] * factor
    return Image.fromarray(colormap).resize((width, height), Image.Resampling.NEAREST)


def caption_pieces(
    caption: str,
    grounding: Sequence[dict[str, Any]],
    colors: Sequence[Color],
) -> list[Piece]:
    """Cut the caption at the nouns' spans; the pieces' texts joined are the caption again.

    Nouns without a span (-1), or whose span overlaps an earlier one, get no chip.
    """
    order = sorted(range(len(grounding)), key=lambda i: grounding[i]["start"])
    pieces, cursor = [], 0
    for index in order:
        start, end = grounding[index]["start"], grounding[index]["end"]
        if start < cursor or end <= start:
            continue
        if start > cursor:
            pieces.append(Piece(caption[cursor:start], None))
        pieces.append(Piece(caption[start:end], colors[index]))
        cursor = end
    if cursor < len(caption):
        pieces.append(Piece(caption[cursor:], None))
    return pieces


def _check_size(mask: np.ndarray, image: np.ndarray) -> None:
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"a mask is {mask.shape[1]}x{mask.shape[0]} pixels but the image is "
            f"{image.shape[1]}x{image.shape[0]} (width x height); give masks of the image's size"
        )


def _known_numbers(entity_ids: Sequence[int], entities: EntityMap | None) -> list[int]:
    """Numbers 1, 2, ... of the ids that are input entities, ascending."""
    if entities is None:
        return []
    known = set(entities.segment_ids)
    return sorted(entities.index_of(entity) + 1 for entity in entity_ids if entity in known)


def _numbers(entity_ids: Sequence[int], entities: EntityMap | None) -> str:
    if not entity_ids:
        return "no entity"
    if entities is None:
        return str(sorted(entity_ids))
    numbers = _known_numbers(entity_ids, entities)
    made = ["new"] * (len(entity_ids) - len(numbers))
    return "[" + ", ".join([*map(str, numbers), *made]) + "]"


def _noun_layers(
    panels: Panels, grounding: Sequence[dict[str, Any]], colors: Sequence[Color]
) -> tuple[list[Layer], list[Color]]:
    """One layer per colour, so that a repeated noun does not stripe itself."""
    masks: dict[Color, list[np.ndarray]] = {}
    for item, color in zip(grounding, colors, strict=True):
        masks.setdefault(color, []).append(item["mask"])
    found = [
        (layer, color)
        for color, group in masks.items()
        for layer in [panels.layer(group[0] if len(group) == 1 else np.logical_or.reduce(group))]
        if layer is not None
    ]
    return [layer for layer, _ in found], [color for _, color in found]


def _entity_layers(panels: Panels, ids: np.ndarray, wanted: Collection[int]) -> dict[int, Layer]:
    """The layer of each wanted number of an int map (H, W) that has a pixel."""
    layers = {}
    for number, place in enumerate(ndimage.find_objects(ids), start=1):
        if place is not None and number in wanted:
            layer = panels.layer(ids[place] == number, (place[1].start, place[0].start))
            if layer is not None:
                layers[number] = layer
    return layers


def _compose(
    panels: Sequence[Image.Image],
    text: Sequence[Piece],
    items: Sequence[Sequence[Piece]],
    untrained: bool,
    *,
    stacked: bool,
) -> Image.Image:
    """Panels side by side or stacked, below them the text and the items, above them the warning."""
    steps = [
        (0, panel.height + _MARGIN) if stacked else (panel.width + _MARGIN, 0) for panel in panels
    ]
    inner = panels[0].width + sum(step[0] for step in steps[:-1])
    tall = panels[0].height + sum(step[1] for step in steps[:-1])
    width = max(_MIN_WIDTH, inner + 2 * _MARGIN)
    font = load_font(max(16, min(24, width // 60)))
    spacing = round(font.size * 1.7)
    listed = flow_items(items, font, width - 2 * _MARGIN)
    rows = [*wrap_pieces(text, font, width - 2 * _MARGIN), [], *listed] if text else listed
    banner = spacing + 8 if untrained else 0
    height = banner + 3 * _MARGIN + tall + spacing * len(rows)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    if untrained:
        draw.rectangle((0, 0, width, banner), fill=(160, 30, 30))
        warning = "untrained weights: shows the form of the output, not a result"
        draw.text((width / 2, banner / 2), warning, font=font, anchor="mm", fill=PAPER)
    x, y = (width - inner) // 2, banner + _MARGIN
    for panel, (right, down) in zip(panels, steps, strict=True):
        canvas.paste(panel, (x, y))
        x, y = x + right, y + down
    top = banner + 2 * _MARGIN + tall
    for number, row in enumerate(rows):
        draw_row(draw, (_MARGIN, top + number * spacing), row, font, spacing)
    return canvas

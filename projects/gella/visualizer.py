"""Pictures of what the model did: nouns in their colours on the masks and in the caption.

Every function takes arrays and plain dicts and returns a new ``PIL.Image``; nothing is shown or
written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gella.entities import EntityMap
from gella.text_layout import INK, PAPER, Piece, draw_row, load_font, wrap_pieces

MASK_OPACITY = 0.6
"""Share of the noun's colour in a masked pixel; the rest is the picture in grey."""

# Okabe and Ito's colours without black, then Paul Tol's "muted" ones: both sets were made to stay
# apart under the common colour vision deficiencies. Neighbours differ in lightness as well.
_BASE = (
    (230, 159, 0), (0, 114, 178), (240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233),
    (213, 94, 0), (51, 34, 136), (221, 204, 119), (136, 34, 85), (68, 170, 153), (153, 153, 51),
    (204, 102, 119),
)  # fmt: skip
_MARGIN = 16  # pixels around the panels and the text
_MIN_WIDTH = 640  # pixels; narrower pictures cannot hold legible text
_STRIPE = 8  # pixels; width of a stripe where several nouns claim a place
_PANEL_SIDE = 960  # pixels; larger pictures are reduced to this longest side


def palette(count: int) -> list[tuple[int, int, int]]:
    """Return ``count`` distinct RGB colours (0..255), safe for colour-blind readers at first.

    The first 13 are published sets; later ones are their lighter and darker shades.
    """
    colors = []
    for index in range(count):
        base = np.array(_BASE[index % len(_BASE)], dtype=np.float64)
        shade = index // len(_BASE)
        # Shades alternate: towards white, towards black, each round a step further.
        share = 1 - 0.6 ** ((shade + 1) // 2)
        target = 255.0 if shade % 2 else 0.0
        red, green, blue = np.rint(base + (target - base) * share).astype(int).tolist()
        colors.append((red, green, blue))
    return colors


def noun_colors(grounding: Sequence[dict[str, Any]]) -> list[tuple[int, int, int]]:
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
    plain, scale = _enlarge(image)
    marked = _blend(plain, [item["mask"] for item in grounding], colors, image.shape[:2])
    known = set() if entities is None else set(entities.segment_ids)
    # Masks that the model made itself belong to no input entity.
    foreign = [item["mask"] for item in grounding if not known.issuperset(item["entity_ids"])]
    _outline(marked, foreign, scale)
    if entities is not None:
        named = {e for item in grounding for e in item["entity_ids"]} & known
        _mark_entities(marked, entities, sorted(entities.index_of(e) for e in named), scale)
    lines = [caption_pieces(caption, grounding, colors), []]
    for item, color in zip(grounding, colors, strict=True):
        absent = " (not in the caption)" if item["start"] < 0 else ""
        numbers = _numbers(item["entity_ids"], entities)
        lines.append([Piece(item["phrase"], color), Piece(f": {numbers}{absent}", None)])
    return _compose([plain, marked], lines, untrained)


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
    colors = palette(len(present))
    members = [[s["id"] for s in segments_info if s["category_id"] == c] for c in present]
    plain, scale = _enlarge(image)
    marked = _blend(plain, [np.isin(ids, group) for group in members], colors, image.shape[:2])
    _outline(marked, [ids == segment["id"] for segment in segments_info], scale)
    legend: list[Piece] = []
    for category, group, color in zip(present, members, colors, strict=True):
        count = f" x {len(group)}" if len(group) > 1 else ""
        legend += [Piece(names[category], color), Piece(f"{count}   ", None)]
    return _compose([plain, marked], [legend], untrained)


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
    colors: Sequence[tuple[int, int, int]],
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


def _numbers(entity_ids: Sequence[int], entities: EntityMap | None) -> str:
    if not entity_ids:
        return "no entity"
    if entities is None:
        return str(sorted(entity_ids))
    known = set(entities.segment_ids)
    numbers = sorted(entities.index_of(entity) + 1 for entity in entity_ids if entity in known)
    made = ["new"] * sum(entity not in known for entity in entity_ids)
    return "[" + ", ".join([*map(str, numbers), *made]) + "]"


def _enlarge(image: np.ndarray) -> tuple[Image.Image, float]:
    height, width = image.shape[:2]
    # Two panels share the minimal width; whole factors while they fit.
    scale: float = max(1, math.ceil(_MIN_WIDTH / 1.5 / width))
    if max(height, width) * scale > _PANEL_SIDE:
        scale = _PANEL_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), scale


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resizing of a bool mask to ``size`` (width, height)."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _blend(
    picture: Image.Image,
    masks: Sequence[np.ndarray],
    colors: Sequence[tuple[int, int, int]],
    frame: tuple[int, int],
) -> Image.Image:
    """Lay masks of the original ``frame`` (height, width) over the enlarged picture."""
    # Claims by colour, so that a repeated noun does not stripe itself.
    shape = (picture.height, picture.width)
    claims = {color: np.zeros(shape, dtype=bool) for color in colors}
    for mask, color in zip(masks, colors, strict=True):
        if mask.shape != frame:
            raise ValueError(
                f"a mask is {mask.shape[1]}x{mask.shape[0]} pixels but the image is "
                f"{frame[1]}x{frame[0]} (width x height); give masks of the image's size"
            )
        claims[color] |= _resize_mask(mask, picture.size)
    total = np.zeros(shape, dtype=np.int64)
    for claim in claims.values():
        total += claim
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    turn = ((rows + columns) // _STRIPE) % np.maximum(total, 1)
    # On a grey picture every colour is a noun's; the picture's own would mix with them.
    result = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float64)
    seen = np.zeros(shape, dtype=np.int64)
    for color, claim in claims.items():
        here = claim & (turn == seen)
        result[here] = (1 - MASK_OPACITY) * result[here] + MASK_OPACITY * np.array(color)
        seen += claim
    return Image.fromarray(np.rint(result).astype(np.uint8))


def _edges(mask: np.ndarray, size: tuple[int, int], thickness: int) -> np.ndarray:
    """Inner border of a mask after nearest resizing to ``size`` (width, height)."""
    large = _resize_mask(mask, size)
    inside = large.copy()
    for _ in range(thickness):
        inside = _erode(inside)
    return large & ~inside


def _erode(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return (
        padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1]
        & padded[1:-1, :-2] & padded[1:-1, 2:]
    )  # fmt: skip


def _outline(picture: Image.Image, masks: Sequence[np.ndarray], scale: float) -> None:
    thickness = 2 if scale >= 2 else 1
    for mask in masks:
        border = Image.fromarray(_edges(mask, picture.size, thickness))
        picture.paste(PAPER, (0, 0), border)


def _mark_entities(
    picture: Image.Image, entities: EntityMap, used: Sequence[int], scale: float
) -> None:
    _outline(picture, [entities.ids == index + 1 for index in used], scale)
    draw = ImageDraw.Draw(picture)
    font = load_font(max(11, min(picture.size) // 32))
    # Large entities first, so that a small one's number is never covered.
    areas = entities.areas()
    for index in sorted(used, key=lambda i: -int(areas[i])):
        if areas[index] == 0:
            continue
        mask = entities.ids == index + 1
        rows, columns = np.nonzero(mask)
        corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        left, top, right, bottom = (float(corner) * scale for corner in corners)
        x, y = deepest_point(mask)
        center = (x + 0.5) * scale, (y + 0.5) * scale
        _tag(draw, center, (left, top, right, bottom), str(index + 1), font)


def _tag(
    draw: ImageDraw.ImageDraw,
    center: tuple[float, float],
    entity_box: tuple[float, float, float, float],
    text: str,
    font: Any,
) -> None:
    """Write a number at ``center``, or above (else below) an entity that it would hide."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="mm")
    half_width, half_height = (right - left) / 2 + 3, (bottom - top) / 2 + 3
    x, y = center
    box_width, box_height = entity_box[2] - entity_box[0], entity_box[3] - entity_box[1]
    if box_width * box_height < 8 * half_width * half_height:
        above = entity_box[1] - half_height
        y = above if above > half_height else entity_box[3] + half_height
    width, height = draw.im.size
    x = min(max(x, half_width), width - half_width)
    y = min(max(y, half_height), height - half_height)
    corners = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw.rounded_rectangle(corners, 3, fill=INK)
    draw.text((x, y), text, font=font, anchor="mm", fill=PAPER)


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of a pixel of ``mask`` (bool (H, W), not empty) far from its border.

    Exact on small masks; above 128 pixels a side a coarser grid is searched.
    """
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    crop = mask[top : rows.max() + 1, left : columns.max() + 1]
    step = max(1, max(crop.shape) // 128)
    coarse = crop[::step, ::step]
    if not coarse.any():  # a thin mask that the coarse grid misses
        return int(columns[len(columns) // 2]), int(rows[len(rows) // 2])
    core = coarse
    while core.any():
        coarse, core = core, _erode(core)
    ys, xs = np.nonzero(coarse)
    middle = len(ys) // 2
    return int(left + xs[middle] * step), int(top + ys[middle] * step)


def _compose(
    panels: Sequence[Image.Image], lines: Sequence[Sequence[Piece]], untrained: bool
) -> Image.Image:
    inner = sum(panel.width for panel in panels) + _MARGIN * (len(panels) - 1)
    width = max(_MIN_WIDTH, inner + 2 * _MARGIN)
    font = load_font(max(16, min(24, width // 60)))
    spacing = round(font.size * 1.7)
    rows = [row for line in lines for row in wrap_pieces(line, font, width - 2 * _MARGIN)]
    banner = spacing + 8 if untrained else 0
    height = banner + 3 * _MARGIN + panels[0].height + spacing * len(rows)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    if untrained:
        draw.rectangle((0, 0, width, banner), fill=(160, 30, 30))
        text = "untrained weights: shows the form of the output, not a result"
        draw.text((width / 2, banner / 2), text, font=font, anchor="mm", fill=PAPER)
    x, y = (width - inner) // 2, banner + _MARGIN
    for panel in panels:
        canvas.paste(panel, (x, y))
        x += panel.width + _MARGIN
    y += panels[0].height + _MARGIN
    for number, row in enumerate(rows):
        draw_row(draw, (_MARGIN, y + number * spacing), row, font, spacing)
    return canvas

"""A picture beside its copy in grey with coloured masks, and the text and the lists below both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from gella.entities.rle import check_size
from gella.pictures.chips import (
    INK,
    PAPER,
    Color,
    Piece,
    draw_row,
    flow_items,
    load_font,
    wrap_pieces,
)
from gella.pictures.overlays import Grid, Layer, looks, place_labels

MASK_OPACITY = 0.6
"""Share of the noun's colour in a masked pixel; the rest is the picture in grey."""
UNTRAINED = "untrained weights: shows the form of the output, not a result"

_MIN_WIDTH = 640  # pixels; narrower pictures cannot hold legible text
_MARGIN = 16  # pixels around the panels and the text
_STRIPE = 8  # pixels; width of a stripe where several nouns claim a place
_PANEL_SIDE = 960  # pixels; larger pictures are reduced to this longest side
_WIDE_SIDE = 1800  # pixels; the same for panels that stand one above the other
_STACK = 2.5  # width over height from which they do


class Panels:
    """The picture in the size of a panel, plain and with masks.

    ``image`` is uint8 (H, W, 3) RGB. Small pictures are enlarged.
    """

    def __init__(self, image: np.ndarray) -> None:
        height, width = image.shape[:2]
        self._frame, self._stacked = (height, width), width > _STACK * height
        # Panels side by side share the minimal width; whole factors while they fit.
        scale: float = max(1, math.ceil(_MIN_WIDTH / (1 if self._stacked else 1.5) / width))
        side = _WIDE_SIDE if self._stacked else _PANEL_SIDE
        if max(height, width) * scale > side:
            scale = side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        self._plain = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        self._grid = Grid((height, width), (size[1], size[0]))
        self._thickness = 2 if scale >= 2 else 1
        # On a grey picture every colour is a noun's; the picture's own would mix with them.
        self._pixels = np.asarray(self._plain.convert("L").convert("RGB"), dtype=np.float32)
        rows, columns = np.ogrid[: size[1], : size[0]]
        self._turns = (rows + columns) // _STRIPE

    def layer(self, mask: np.ndarray) -> Layer | None:
        """A bool (H, W) mask in the panel; None if it is empty; ValueError for another size."""
        check_size(mask.shape, self._frame)
        return self._grid.layer(mask)

    def layers(self, parts: Mapping[int, Layer]) -> dict[int, Layer]:
        """Parts of the picture in the panel."""
        scaled = {key: self._grid.layer(part.mask, (part.x, part.y)) for key, part in parts.items()}
        return {key: layer for key, layer in scaled.items() if layer is not None}

    def blend(self, layers: Sequence[tuple[Layer, Color]]) -> None:
        """Colour the layers; where several claim a pixel it is striped in their colours."""
        total = np.zeros(self._turns.shape, dtype=np.int16)
        seen = np.zeros(self._turns.shape, dtype=np.int16)
        for layer, _ in layers:
            total[layer.place] += layer.mask
        turns = self._turns % np.maximum(total, 1)
        for layer, color in layers:
            here = layer.mask & (turns[layer.place] == seen[layer.place])
            part, ink = self._pixels[layer.place], np.array(color, np.float32)
            part[here] = (1 - MASK_OPACITY) * part[here] + MASK_OPACITY * ink
            seen[layer.place] += layer.mask

    def outline(self, layers: Sequence[tuple[Layer, Sequence[Color]]]) -> None:
        """Give each layer a white outline, and its thin parts their full colours, striped.

        The outline lies in wide parts, where it takes nothing from a neighbour, and around thin
        ones, of which it would leave nothing.
        """
        white = np.zeros(self._turns.shape, dtype=bool)
        thin = np.zeros(self._turns.shape, dtype=bool)
        for layer, colors in layers:
            outline, lines, place = looks(layer, self._thickness, self._turns.shape)
            stripes = np.array(colors, dtype=np.float32)[self._turns[place] % len(colors)]
            self._pixels[place][lines] = stripes[lines]
            thin[place] |= lines
            white[place] |= outline
        self._pixels[white & ~thin] = PAPER

    def picture(
        self,
        numbered: Mapping[int, Layer],
        text: Sequence[Piece],
        items: Sequence[Sequence[Piece]],
        *,
        untrained: bool,
    ) -> Image.Image:
        """The whole picture: both panels side by side or stacked, below them text and items.

        Args:
            numbered: layers that get their number where there is room for it.
            text: what is set in lines, such as a caption.
            items: what is set as a list.
            untrained: warn above the panels that the weights are random.
        """
        marked = Image.fromarray(np.rint(self._pixels).astype(np.uint8))
        _draw_labels(marked, [*numbered.values()], [str(number) for number in numbered])
        tall, inner = marked.height, marked.width
        step = (0, tall + _MARGIN) if self._stacked else (inner + _MARGIN, 0)
        tall, inner = tall + step[1], inner + step[0]
        width = max(_MIN_WIDTH, inner + 2 * _MARGIN)
        font = load_font(max(16, min(24, width // 60)))
        spacing = round(font.size * 1.7)
        rows = flow_items(items, font, width - 2 * _MARGIN)
        if text:
            rows = [*wrap_pieces(text, font, width - 2 * _MARGIN), [], *rows]
        banner = spacing + 8 if untrained else 0
        top = banner + 2 * _MARGIN + tall
        canvas = Image.new("RGB", (width, top + _MARGIN + spacing * len(rows)), PAPER)
        draw = ImageDraw.Draw(canvas)
        if untrained:
            draw.rectangle((0, 0, width, banner), fill=(160, 30, 30))
            draw.text((width / 2, banner / 2), UNTRAINED, font=font, anchor="mm", fill=PAPER)
        x, y = (width - inner) // 2, banner + _MARGIN
        canvas.paste(self._plain, (x, y))
        canvas.paste(marked, (x + step[0], y + step[1]))
        for number, row in enumerate(rows):
            draw_row(draw, (_MARGIN, top + number * spacing), row, font, spacing)
        return canvas


def _draw_labels(picture: Image.Image, layers: Sequence[Layer], labels: Sequence[str]) -> None:
    """Write each label on its layer or, joined to it by a line, near it."""
    draw = ImageDraw.Draw(picture)
    font = load_font(max(12, min(20, max(picture.size) // 56)))
    sizes = []
    for label in labels:
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font, anchor="mm")
        sizes.append((right - left + 6.0, bottom - top + 6.0))
    placed = place_labels(layers, sizes, picture.size)
    for spot in placed:  # first, so that no line crosses a number
        if spot is not None and spot.apart:
            draw.line([(spot.x, spot.y), spot.anchor], fill=PAPER, width=4)
            draw.line([(spot.x, spot.y), spot.anchor], fill=INK, width=2)
            x, y = spot.anchor
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=INK, outline=PAPER)
    for spot, text, (width, height) in zip(placed, labels, sizes, strict=True):
        if spot is not None:
            left, top = spot.x - width / 2, spot.y - height / 2
            box = (left, top, left + width - 1, top + height - 1)
            draw.rounded_rectangle(box, 3, fill=INK)
            draw.text((spot.x, spot.y), text, font=font, anchor="mm", fill=PAPER)


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

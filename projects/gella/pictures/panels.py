"""The panels of a picture: as it was given, and in grey with coloured masks and their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from gella.pictures.colors import Color
from gella.pictures.labels import place_labels
from gella.pictures.mask_layers import Grid, Layer, looks
from gella.pictures.text_layout import INK, PAPER, load_font

__all__ = ["MASK_OPACITY", "Panels"]

MASK_OPACITY = 0.6
"""Share of the noun's colour in a masked pixel; the rest is the picture in grey."""

_MIN_WIDTH = 640  # pixels; narrower pictures cannot hold legible text
_STRIPE = 8  # pixels; width of a stripe where several nouns claim a place
_PANEL_SIDE = 960  # pixels; larger pictures are reduced to this longest side
_WIDE_SIDE = 1800  # pixels; the same for panels that stand one above the other
_STACK = 2.5  # width over height from which they do
_THIN = 120  # pixels; panels with a shorter side get room for labels beside the picture
_THIN_MARGIN = 48  # pixels; that room


class Panels:
    """The picture in the size of a panel, plain and with masks, in a margin if it is very thin."""

    def __init__(self, image: np.ndarray) -> None:
        height, width = image.shape[:2]
        self.stacked = width > _STACK * height
        # Panels side by side share the minimal width; whole factors while they fit.
        scale: float = max(1, math.ceil(_MIN_WIDTH / (1 if self.stacked else 1.5) / width))
        side = _WIDE_SIDE if self.stacked else _PANEL_SIDE
        if max(height, width) * scale > side:
            scale = side / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        self._margins = tuple(_THIN_MARGIN if length < _THIN else 0 for length in size)
        self._plain = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        self._grid = Grid((height, width), (size[1], size[0]))
        self._thickness = 2 if scale >= 2 else 1
        # On a grey picture every colour is a noun's; the picture's own would mix with them.
        self._pixels = np.asarray(self._plain.convert("L").convert("RGB"), dtype=np.float32)
        rows, columns = np.ogrid[: size[1], : size[0]]
        self._turns = (rows + columns) // _STRIPE

    def plain(self) -> Image.Image:
        """The picture itself."""
        return self._framed(self._plain)

    def layer(self, mask: np.ndarray, origin: tuple[int, int] = (0, 0)) -> Layer | None:
        """A part of a mask (see :meth:`gella.pictures.mask_layers.Grid.layer`) in the panel."""
        return self._grid.layer(mask, origin)

    def blend(self, layers: Sequence[Layer], colors: Sequence[Color]) -> None:
        """Colour the layers; where several claim a pixel it is striped in their colours."""
        total = np.zeros(self._turns.shape, dtype=np.int16)
        seen = np.zeros(self._turns.shape, dtype=np.int16)
        for layer in layers:
            total[layer.place] += layer.mask
        turns = self._turns % np.maximum(total, 1)
        for layer, color in zip(layers, colors, strict=True):
            here = layer.mask & (turns[layer.place] == seen[layer.place])
            part = self._pixels[layer.place]
            part[here] = (1 - MASK_OPACITY) * part[here] + MASK_OPACITY * np.array(
                color, np.float32
            )
            seen[layer.place] += layer.mask

    def outline(self, layers: Sequence[Layer], colors: Sequence[Sequence[Color]]) -> None:
        """Give each layer a white outline, and its thin parts their full colour.

        The outline lies in wide parts, where it takes nothing from a neighbour, and around thin
        ones, of which it would leave nothing.

        Args:
            layers: what to outline.
            colors: of each layer the colours that it has; several are striped.
        """
        white = np.zeros(self._turns.shape, dtype=bool)
        thin = np.zeros(self._turns.shape, dtype=bool)
        for layer, own in zip(layers, colors, strict=True):
            look = looks(layer, self._thickness, self._turns.shape)
            stripes = np.array(own, dtype=np.float32)[self._turns[look.place] % len(own)]
            self._pixels[look.place][look.thin] = stripes[look.thin]
            thin[look.place] |= look.thin
            white[look.place] |= look.border | look.ring
        self._pixels[white & ~thin] = PAPER

    def marked(self, layers: Sequence[Layer], labels: Sequence[str]) -> Image.Image:
        """The picture with the masks and a label for each of some layers that has room for one."""
        pixels = np.rint(self._pixels).astype(np.uint8)
        picture = self._framed(Image.fromarray(pixels))
        right, down = self._margins
        moved = [Layer(layer.mask, layer.x + right, layer.y + down) for layer in layers]
        _draw_labels(picture, moved, labels)
        return picture

    def _framed(self, picture: Image.Image) -> Image.Image:
        right, down = self._margins
        canvas = Image.new("RGB", (picture.width + 2 * right, picture.height + 2 * down), PAPER)
        canvas.paste(picture, (right, down))
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

"""Words on pictures: colours that stay apart, and rows of text with coloured chips."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont

Color = tuple[int, int, int]
"""RGB, each 0..255."""

INK: Color = (25, 25, 25)
"""Dark text."""
PAPER: Color = (255, 255, 255)
"""The background, and light text."""
CHIP_PADDING = 3
"""Pixels between a chip's side and its text."""
_GAP = 24  # pixels between the items of a list

# Farthest-point search over the RGB cube from Okabe and Ito's orange and blue: each colour has the
# largest distance in CIELAB to those before it, taken as the smallest of four views: the normal one
# and those of protanopes, deuteranopes and tritanopes (Machado, Oliveira and Fernandes 2009). Very
# dark, very light and, in any view, greyish ones are left out, most strictly among the first eight,
# since masks lie on a grey picture. From the ninth on, blocks of eight are put in the order in
# which neighbours differ most.
_COLORS: tuple[Color, ...] = (
    (230, 159, 0), (0, 114, 178), (64, 255, 184), (200, 40, 56), (144, 80, 255),
    (240, 176, 255), (184, 240, 128), (0, 184, 120), (112, 56, 96), (232, 112, 255),
    (240, 232, 0), (104, 8, 176), (176, 168, 80), (136, 0, 128), (232, 8, 0),
    (176, 120, 160), (136, 32, 0), (255, 200, 80), (224, 8, 192), (64, 112, 56),
    (255, 120, 208), (128, 216, 128), (0, 40, 224), (224, 104, 96), (128, 88, 136),
    (128, 112, 248), (208, 56, 112), (56, 144, 224), (184, 112, 48), (144, 56, 208),
    (0, 216, 160), (112, 24, 152), (216, 128, 16), (144, 248, 160), (200, 160, 248),
    (80, 144, 80), (160, 56, 160), (152, 200, 48), (24, 72, 128), (240, 168, 152),
    (104, 48, 216), (88, 184, 216), (160, 16, 40), (48, 72, 255), (200, 200, 96),
    (16, 88, 32), (136, 240, 255), (88, 120, 0), (192, 96, 216), (192, 216, 24),
    (216, 144, 120), (80, 88, 152), (192, 168, 64), (40, 112, 72), (160, 248, 104),
    (152, 112, 168), (255, 0, 80), (144, 40, 184), (248, 56, 136), (64, 96, 216),
    (160, 48, 120), (136, 152, 255), (88, 0, 200), (248, 16, 184),
)  # fmt: skip


def palette(count: int) -> list[Color]:
    """Return ``count`` RGB colours (0..255), the first ones being those farthest apart.

    A shorter palette is the start of a longer one. From the 65th on they come again.
    """
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


def ink_on(color: Color) -> Color:
    """Return ``INK`` or ``PAPER``, whichever has more contrast (WCAG 2) on a colour."""

    def luminance(of: Color) -> float:
        parts = (value / 255 for value in of)
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(ink: Color) -> float:
        low, high = sorted((luminance(ink), luminance(color)))
        return (high + 0.05) / (low + 0.05)

    return max(INK, PAPER, key=contrast)


class Piece(NamedTuple):
    """A stretch of text and the colour of the chip behind it; ``None``: plain text."""

    text: str
    color: Color | None = None

    def width(self, font: Any) -> float:
        """Pixels that it takes, the chip included."""
        return font.getlength(self.text) + (2 * CHIP_PADDING if self.color else 0)


def load_font(size: int) -> Any:
    """Return DejaVu Sans, which comes with matplotlib and knows many scripts."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size)


def wrap_pieces(line: Sequence[Piece], font: Any, width: int) -> list[list[Piece]]:
    """Break a line of pieces into rows of at most ``width`` pixels.

    Breaks come at white space, or inside a word that is wider than a row. A chip that continues on
    the next row keeps its colour.
    """
    rows: list[list[Piece]] = [[]]
    used = 0.0
    for piece in line:
        words = re.findall(r"[^ ]* |[^ ]+", re.sub(r"[\n\t]", " ", piece.text))[::-1]
        while words:
            word = words.pop()
            if font.getlength(word) > width and len(word) > 1:
                cut = max(1, int(len(word) * width / font.getlength(word)) - 1)
                words.append(word[cut:])
                word = word[:cut]
            if used and used + font.getlength(word.rstrip()) > width:
                rows.append([])
                used = 0.0
            if not used and not word.strip():
                continue
            if rows[-1] and rows[-1][-1].color == piece.color is not None:
                rows[-1][-1] = Piece(rows[-1][-1].text + word, piece.color)
            else:
                rows[-1].append(Piece(word, piece.color))
            used += Piece(word, piece.color).width(font)
    return rows


def flow_items(items: Sequence[Sequence[Piece]], font: Any, width: int) -> list[list[Piece]]:
    """Set items one after the other in rows of at most ``width`` pixels, ``_GAP`` or more apart.

    An item is broken only if it is wider than a row; then it has rows of its own.
    """
    spaces = Piece(" " * math.ceil(_GAP / font.getlength(" ")))
    rows: list[list[Piece]] = []
    free = 0.0
    for item in items:
        needed = sum(piece.width(font) for piece in item)
        if rows and needed + spaces.width(font) <= free:
            rows[-1] += [spaces, *item]
            free -= needed + spaces.width(font)
        else:
            rows += wrap_pieces(item, font, width)
            free = width - needed  # below 0 for an item that was broken
    return rows


def draw_row(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], row: Sequence[Piece], font: Any, height: int
) -> None:
    """Draw one row of pieces from ``corner`` (x, y) in a band of ``height`` pixels.

    Coloured pieces stand on rounded chips, in dark or light ink, whichever is easier to read.
    """
    x: float = corner[0]
    for piece in row:
        text, ink, start = piece.text, INK, x
        if piece.color is not None:
            text, ink, start = text.rstrip(), ink_on(piece.color), x + CHIP_PADDING
            right = start + font.getlength(text) + CHIP_PADDING
            box = (x, corner[1] + 2, right, corner[1] + height - 2)
            draw.rounded_rectangle(box, 4, fill=piece.color)
        draw.text((start, corner[1] + height / 2), text, font=font, anchor="lm", fill=ink)
        x += piece.width(font)

"""Text with coloured chips for the visualizer: fonts, line breaking, drawing of one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont

from gella.pictures.colors import Color, ink_on

INK = (25, 25, 25)
"""RGB of dark text."""
PAPER = (255, 255, 255)
"""RGB of the background and of light text."""
CHIP_PADDING = 3
"""Pixels between a chip's side and its text."""


class Piece(NamedTuple):
    """A stretch of text and the colour of the chip behind it; ``None``: plain text."""

    text: str
    color: Color | None


def load_font(size: int) -> Any:
    """Return DejaVu Sans (shipped with matplotlib, wide script coverage) or Pillow's own font."""
    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size) if file.is_file() else ImageFont.load_default(size)


def wrap_pieces(line: Sequence[Piece], font: Any, width: int) -> list[list[Piece]]:
    """Break a line of pieces into rows of at most ``width`` pixels.

    Breaks come at white space, or inside a word that is wider than a row. A chip that continues on
    the next row keeps its colour.
    """
    rows: list[list[Piece]] = [[]]
    used = 0.0
    for piece in line:
        for word in _words(piece.text, font, width):
            advance = font.getlength(word) + (2 * CHIP_PADDING if piece.color else 0)
            if used and used + font.getlength(word.rstrip()) > width:
                rows.append([])
                used = 0.0
            if not used and not word.strip():
                continue
            if rows[-1] and rows[-1][-1].color == piece.color is not None:
                rows[-1][-1] = Piece(rows[-1][-1].text + word, piece.color)
            else:
                rows[-1].append(Piece(word, piece.color))
            used += advance
    return rows


def flow_items(
    items: Sequence[Sequence[Piece]], font: Any, width: int, gap: int = 24
) -> list[list[Piece]]:
    """Set items one after the other in rows of at most ``width`` pixels, ``gap`` or more apart.

    An item is broken only if it is wider than a row; then it has rows of its own.
    """
    spaces = Piece(" " * math.ceil(gap / font.getlength(" ")), None)
    rows: list[list[Piece]] = []
    free = 0.0
    for item in items:
        needed = sum(_width(piece, font) for piece in item)
        if rows and needed + _width(spaces, font) <= free:
            rows[-1] += [spaces, *item]
            free -= needed + _width(spaces, font)
        else:
            rows += wrap_pieces(item, font, width)
            free = width - needed  # below 0 for an item that was broken
    return rows


def _width(piece: Piece, font: Any) -> float:
    return font.getlength(piece.text) + (2 * CHIP_PADDING if piece.color is not None else 0)


def _words(text: str, font: Any, width: int) -> list[str]:
    """Cut text after each white space; words wider than ``width`` are cut as well."""
    words = []
    for word in (part for part in _split_after_space(text) if part):
        while font.getlength(word) > width and len(word) > 1:
            cut = max(1, int(len(word) * width / font.getlength(word)) - 1)
            words.append(word[:cut])
            word = word[cut:]
        words.append(word)
    return words


def _split_after_space(text: str) -> list[str]:
    parts = " ".join(text.split("\n")).replace("\t", " ").split(" ")
    return [part + " " for part in parts[:-1]] + parts[-1:]


def draw_row(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], row: Sequence[Piece], font: Any, height: int
) -> None:
    """Draw one row of pieces from ``corner`` (x, y) in a band of ``height`` pixels.

    Coloured pieces stand on rounded chips, in black or white ink, whichever is easier to read.
    """
    x: float = corner[0]
    middle = corner[1] + height / 2
    for piece in row:
        text = piece.text if piece.color is None else piece.text.rstrip()
        ink = INK
        if piece.color is not None:
            right = x + font.getlength(text) + 2 * CHIP_PADDING
            box = (x, corner[1] + 2, right, corner[1] + height - 2)
            draw.rounded_rectangle(box, 4, fill=piece.color)
            x += CHIP_PADDING
            ink = ink_on(piece.color, INK, PAPER)
        draw.text((x, middle), text, font=font, anchor="lm", fill=ink)
        x += font.getlength(piece.text) + (CHIP_PADDING if piece.color is not None else 0)

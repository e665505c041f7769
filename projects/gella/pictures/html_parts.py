"""What the interactive figures are made of: masks as SVG, nouns as chips, all texts escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
from scipy import ndimage

from gella.pictures.colors import palette
from gella.pictures.labels import place_labels
from gella.pictures.mask_layers import Layer
from gella.pictures.outlines import corner_count, mask_box, mean_width, svg_path
from gella.pictures.visualizer import noun_colors

COLOR_CLASSES = 64
"""Number of noun colours on a page; further nouns start again with the first."""

MAX_CORNERS = 400_000
"""Corners of all masks of a figure; masks with more (noise) are drawn on every 2nd, 4th, ... pixel,
so that a page stays at some megabytes."""

# In pixels of a screen on which a picture is some 700 pixels wide:
_SIDE = 700
_SHORT_SIDE = 96  # of pictures so long (more than _LONG to one) that they scroll; see the style
_LONG = 12
_TEXT = 16  # height of the numbers
_STRIPE = 12  # width of the stripes of areas with several nouns
_THIN = 3  # mean width of areas that are drawn as lines

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BIDI = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Area:
    """A mask that can be pointed at.

    Attributes:
        number: what nouns call it, 1, 2, ...; once per figure.
        name: how the status line calls it ("entity 3").
        label: what is written on it; "": nothing.
        mask: bool (h, w), the part of the frame in which it lies; not empty.
        origin: (x, y) of that part in the frame, pixels.
    """

    number: int
    name: str
    label: str
    mask: np.ndarray
    origin: tuple[int, int]


@dataclass(frozen=True)
class Noun:
    """A noun or category with the numbers of its areas.

    Attributes:
        text: the noun.
        color: class of its colour, 0 .. COLOR_CLASSES - 1.
        numbers: of its areas; may hold numbers of areas without a pixel.
        names: how a reader is told of them: "1", "2", "new".
    """

    text: str
    color: int
    numbers: tuple[int, ...]
    names: tuple[str, ...]


def safe(text: str) -> str:
    """Return text for HTML content or a quoted attribute.

    Characters that HTML cannot hold (controls, lone surrogates) become U+FFFD.
    """
    return escape(_CONTROLS.sub("\ufffd", text), quote=True)


def isolated(text: str) -> str:
    """Return text in Unicode isolates, so that its writing direction ends where it ends."""
    return f"\u2068{_BIDI.sub('', text)}\u2069"


def color_style() -> str:
    """Return the CSS that gives the classes c0, c1, ... their colours and inks."""
    rules = []
    for place, (red, green, blue) in enumerate(palette(COLOR_CLASSES)):
        ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else "#191919"
        rules.append(
            f".gella .c{place} {{ --c: #{red:02x}{green:02x}{blue:02x}; --ink: {ink}; }}\n"
        )
    return "".join(rules)


def areas_of_ids(ids: np.ndarray, names: Sequence[str]) -> list[Area]:
    """Return the areas of an int (H, W) map, number k being the pixels k; 0 is none.

    Args:
        names: of the numbers 1, 2, ...
    """
    areas = []
    for number, place in enumerate(ndimage.find_objects(ids, len(names)), start=1):
        if place is not None:
            origin = (place[1].start, place[0].start)
            name = names[number - 1]
            areas.append(Area(number, name, str(number), ids[place] == number, origin))
    return areas


def area_of_mask(number: int, name: str, mask: np.ndarray) -> list[Area]:
    """Return the one area of a bool (H, W) mask, without a label; none if the mask is empty."""
    box = mask_box(mask)
    if box is None:
        return []
    left, top, right, bottom = box
    return [Area(number, name, "", mask[top:bottom, left:right], (left, top))]


def color_classes(phrases: Sequence[dict[str, Any]]) -> list[int]:
    """Return the class of each noun's colour: that of ``visualizer.noun_colors``."""
    colors = noun_colors(phrases)
    order = {color: place for place, color in enumerate(palette(len(colors)))}
    return [order[color] % COLOR_CLASSES for color in colors]


def _thinned(areas: Sequence[Area]) -> tuple[list[Area], int]:
    """Areas with MAX_CORNERS at most, on every n-th pixel of the frame, and n."""
    thinned, stride = list(areas), 1
    while sum(corner_count(area.mask) for area in thinned) > MAX_CORNERS:
        stride *= 2
        thinned = []
        for area in areas:
            x, y = (-(-start // stride) for start in area.origin)
            first = (y * stride - area.origin[1], x * stride - area.origin[0])
            mask = area.mask[first[0] :: stride, first[1] :: stride]
            thinned.append(replace(area, mask=mask, origin=(x, y)))
    return thinned, stride


def areas_svg(
    size: tuple[int, int], areas: Sequence[Area], nouns: Sequence[Noun], source: str, ident: str
) -> str:
    """Return the picture with its areas, large ones below small ones, as one ``<svg>``.

    Args:
        size: (H, W) of the frame in pixels.
        areas: numbers are distinct.
        nouns: give the areas their colours; an area of several is striped.
        source: address of the picture, not escaped.
        ident: start of the ids in it; unique on the page and safe.
    """
    height, width = size
    kind, scale = _shown(size)
    drawn, stride = _thinned(areas)
    patterns: dict[tuple[int, ...], str] = {}
    paths = []
    for area in sorted(drawn, key=lambda a: -np.count_nonzero(a.mask)):
        owners = [noun for noun in nouns if area.number in noun.numbers]
        colors = tuple(dict.fromkeys(noun.color for noun in owners))
        look = f'class="named c{colors[0]}' if colors else 'class="unnamed'
        if colors and mean_width(area.mask) * stride * scale < _THIN:
            look += " thin"
        look += '"'
        if len(colors) > 1:
            name = patterns.setdefault(colors, f"{ident}-stripes-{len(patterns)}")
            look += f' fill="url(#{name})"'
        elif colors:
            look += ' fill="currentColor"'
        data = svg_path(area.mask, area.origin)
        says = f"{area.name}: {', '.join(isolated(noun.text) for noun in owners) or 'no noun'}"
        scaled = f' transform="scale({stride})"' if stride > 1 else ""
        told = f'data-entity="{area.number}" data-says="{safe(says)}"'
        paths.append(f'<path {told} {look}{scaled} d="{data}"/>')
    named = {number for noun in nouns for number in noun.numbers}
    labelled = [area for area in areas if area.label and area.number in named]
    return (
        f'<div class="stage {kind}"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="picture with {len(areas)} masks">{_stripes(patterns, _STRIPE / scale)}'
        f'<image href="{safe(source)}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{"".join(paths)}'
        f"{_labels(labelled, size, _TEXT / scale)}</svg></div>"
    )


def _shown(size: tuple[int, int]) -> tuple[str, float]:
    """Classes of the stage, and about how many pixels of the screen a pixel of the frame gets."""
    height, width = size
    crisp = " crisp" if max(size) <= 256 else ""
    if max(size) > _LONG * min(size):  # scrolls; the style gives the shorter side
        return ("wide" if width > height else "tall") + crisp, _SHORT_SIDE / min(size)
    return "plain" + crisp, _SIDE / max(size)


def _labels(areas: Sequence[Area], size: tuple[int, int], text: float) -> str:
    """Numbers where ``labels.place_labels`` puts them; a line joins those that lie off their masks.

    Args:
        text: height of the letters in pixels of the frame.
    """
    layers = [Layer(area.mask, *area.origin) for area in areas]
    boxes = [((0.62 * len(area.label) + 0.4) * text, 1.15 * text) for area in areas]
    parts: list[str] = []
    for area, spot in zip(areas, place_labels(layers, boxes, (size[1], size[0])), strict=True):
        if spot is None:
            continue
        ident = f'data-label="{area.number}"'
        if spot.apart:
            x, y = spot.anchor
            ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{spot.x:.1f}" y2="{spot.y:.1f}"'
            parts.insert(0, f"<line {ident} {ends}/>")
        parts.append(f'<text {ident} x="{spot.x:.1f}" y="{spot.y:.1f}">{safe(area.label)}</text>')
    return f'<g font-size="{text:.2f}">{"".join(parts)}</g>'


def _stripes(patterns: dict[tuple[int, ...], str], width: float) -> str:
    """Fillings of slanted stripes, each colour ``width`` wide in pixels of the frame."""
    if not patterns:
        return ""
    parts = []
    for colors, name in patterns.items():
        stripes = "".join(
            f'<rect class="stripe c{color}" x="{place * width:.2f}" width="{width:.2f}" '
            f'height="{width:.2f}"/>'
            for place, color in enumerate(colors)
        )
        parts.append(
            f'<pattern id="{name}" width="{len(colors) * width:.2f}" height="{width:.2f}" '
            f'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">{stripes}</pattern>'
        )
    return f"<defs>{''.join(parts)}</defs>"


def chip(noun: Noun, place: int, text: str) -> str:
    """Return the noun as a chip that lights its areas.

    Args:
        place: of the noun in the result, its ``data-noun``.
        text: what is written on it, for instance as the caption spells it.
    """
    numbers = " ".join(str(number) for number in noun.numbers)
    listed = f"[{', '.join(noun.names)}]" if noun.names else "no entity"
    shown = ", ".join(noun.names) if len(noun.names) <= 4 else f"\u00d7{len(noun.names)}"
    says = f"{isolated(noun.text)}: {listed}"
    look = f"noun c{noun.color}" if noun.numbers else "noun none"
    return (
        f'<span class="{look}" role="button" tabindex="0" aria-pressed="false" '
        f'aria-label="{safe(says)}" data-says="{safe(says)}" data-noun="{place}" '
        f'data-entities="{numbers}" data-numbers="{safe(shown)}">{safe(text)}</span>'
    )

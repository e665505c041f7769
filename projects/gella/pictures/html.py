"""Results as HTML figures in which nouns light their masks and masks their nouns.

The figures hold no script: a page that shows them needs :data:`STYLE` and :data:`SCRIPT` once, and
:func:`page` makes such a page. All texts are escaped, so captions and categories may hold anything.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

from gella.entities.view import encoded
from gella.pictures.chips import ink_on, palette
from gella.pictures.grounding import Grounding, Noun, PanopticResult, cut_caption
from gella.pictures.overlays import Layer, layers_of, layers_of_ids, place_labels
from gella.pictures.panels import UNTRAINED

_COLORS = 64  # classes of colours on a page; further nouns start again with the first
# Corners of all masks of a figure; masks with more (noise) are drawn on every 2nd, 4th, ... pixel,
# so that a page stays at some megabytes.
_MAX_CORNERS = 400_000
_EMBEDDED = 1600  # pixels; larger pictures are embedded at this longest side
_EXACT = 256  # pixels; up to this side pictures are shown pixel by pixel
# In pixels of a screen on which a picture is some 700 pixels wide:
_SIDE = 700
_TEXT = 16  # height of the numbers
_STRIPE = 12  # width of the stripes of areas with several nouns
_THIN = 3  # mean width of areas that are drawn as lines
_COLUMNS = 40  # of the table of probabilities: the entities that some noun names best

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_DATA = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]*")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BIDI = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_HINT = "Point at a noun or a mask. A click keeps it lit, another click or Escape lets go."
_TOOLS = (
    '<button type="button" data-act="original" aria-pressed="false">Original</button>'
    '<button type="button" data-act="zoom" data-zoom="1">Zoom: 1\u00d7</button>'
)
_PAGE_STYLE = """:root { color-scheme: light dark; }
body { margin: 0; background: Canvas; color: CanvasText; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 12px 16px 48px; }
h1, h2 { unicode-bidi: isolate; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; margin: 8px 0 16px; }
h2 { font-size: 1.15em; margin: 28px 0 8px; }
"""


_FILES = resources.files("gella.pictures")

STYLE = (
    _FILES.joinpath("page.css").read_text("utf-8")
    + "".join(
        f".gella .c{k} {{ --c: #{bytes(color).hex()}; --ink: #{bytes(ink_on(color)).hex()}; }}\n"
        for k, color in enumerate(palette(_COLORS))
    )
    + "".join(f".gella .p{tenth} {{ --p: {6 * tenth}%; }}\n" for tenth in range(11))
)
"""CSS of the figures; every rule is for ``.gella`` and what is in it."""

SCRIPT = _FILES.joinpath("page.js").read_text("utf-8")
"""JavaScript of the figures: listeners on ``document``, also for figures that are inserted later.

Including it twice does no harm. Class ``lit`` is on what is lit, ``active`` on a figure in which
something is, ``pinned`` on the noun or mask that was clicked.
"""


class Area(NamedTuple):
    """A mask that can be pointed at.

    Attributes:
        number: what nouns call it, 1, 2, ...; once per figure.
        name: how the status line calls it ("entity 3").
        layer: its pixels in the frame of the picture; not empty.
        labelled: whether its number is written on it.
    """

    number: int
    name: str
    layer: Layer
    labelled: bool = True


def grounding_html(result: Grounding, *, key: str, image_src: str | None = None) -> str:
    """Return a grounded caption as a figure: the picture with its masks, and the caption.

    Every entity with a pixel is a ``<path data-entity="N">``, N counted from 1 as in the picture of
    ``plot()``; masks that the model made itself follow after the input's. Every noun is one
    ``<span data-noun="i" data-entities="1 2">`` at its place in the caption, or below it where it
    has none there (not in the caption, or inside another noun). One more of them, ``data-noun``
    -1, has the entities that no noun of a caption names, with the highest of their scores. Below is
    the table of probabilities.

    Args:
        result: what was grounded.
        key: makes the ids of the figure its own on a page; 1 to 64 letters, digits, ``_``, ``-``.
        image_src: address of the picture: a relative one (percent-encoded), http(s), blob or a
            data URI; the file may have another size. None embeds the picture.

    Raises:
        ValueError: a key or an address that is none of these.
    """
    layers = layers_of(result.entities)
    areas = [Area(k, f"entity {k}", layer) for k, layer in layers.items()]
    nouns, first = [], result.entities.num_entities + 1
    made: dict[tuple[int, ...], int] = {}  # of sets of masks only the union is known
    for noun, phrase in zip(result.nouns(), result.phrases, strict=True):
        if noun.made and noun.made not in made:
            made[noun.made] = number = first + len(made)
            rest = phrase["mask"] & ~result.entities.union(k - 1 for k in noun.numbers)
            own = layers_of_ids(rest.astype(np.uint8)).values()
            areas += [Area(number, "mask of the model", layer, False) for layer in own]
        more = (made[noun.made],) if noun.made else ()
        names = [*map(str, noun.numbers), *["new"] * len(noun.made)]
        nouns.append(noun._replace(numbers=(*noun.numbers, *more), names=tuple(names)))
    if not result.number_all:
        named = {number for noun in nouns for number in noun.numbers}
        areas = [a._replace(labelled=a.labelled and a.number in named) for a in areas]
    pieces = cut_caption(result.caption, nouns)
    inside = [safe(text) if k is None else _chip(nouns[k], k, text) for text, k in pieces]
    placed = {index for _, index in pieces}
    outside = [_chip(noun, k, noun.text) for k, noun in enumerate(nouns) if k not in placed]
    parts = [f'<p class="caption" dir="auto">{"".join(inside)}</p>']
    if outside:
        chips = " ".join(outside)
        parts.append(f'<p class="note">not at a place of their own in the text: {chips}</p>')
    if result.cut_nouns:
        left_out = safe(", ".join(isolated(noun) for noun in result.cut_nouns))
        parts.append(f'<p class="note">left out, the caption is too long: {left_out}</p>')
    if nouns and result.task == "ground" and (unnamed := tuple(result.unnamed)):
        best = np.nan_to_num(result.probabilities).max(axis=0)
        scores = tuple(best[number - 1] for number in unnamed)
        rest = Noun("named by no noun", 0, unnamed, (), tuple(map(str, unnamed)), scores=scores)
        parts.append(f'<p class="note">{_chip(rest, -1, rest.text)}</p>')
    matrix = _matrix(result.probabilities, nouns)
    return _figure(result, key, image_src, areas, nouns, parts, matrix)


def panoptic_html(result: PanopticResult, *, key: str, image_src: str | None = None) -> str:
    """Return a panoptic map as a figure: every entity a path, every category found a chip.

    Entities have the numbers of `PanopticResult.numbered`; the other arguments and the errors are
    those of :func:`grounding_html`.
    """
    areas = [
        Area(k, f"entity {k}" if own else "mask of the model", layer, own)
        for k, layer in layers_of_ids(result.numbered()).items()
        for own in (k <= result.last,)
    ]
    nouns = result.nouns()
    chips = " ".join(_chip(noun, place, noun.text) for place, noun in enumerate(nouns))
    parts = [f'<p class="caption">{chips or "no segment"}</p>']
    present = {segment["category_id"] for segment in result.segments_info}
    absent = [isolated(name) for k, name in result.names.items() if k not in present]
    if absent:
        listed = f"{len(absent)} categories without a segment"
        parts.append(
            f'<details class="note"><summary>{listed}</summary>{safe(", ".join(absent))}</details>'
        )
    return _figure(result, key, image_src, areas, nouns, parts)


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole HTML document with the style and the script of the figures.

    Its Content-Security-Policy runs this script only and loads nothing but pictures, from data URIs
    and from beside the page. Style attributes and other scripts in ``body`` do nothing.

    Args:
        title: any text.
        body: HTML of the page's parts, whose texts are escaped already.
    """

    def digest(text: str) -> str:
        hashed = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(hashed).decode('ascii')}'"

    policy = (
        "default-src 'none'; img-src data: 'self'; "
        f"style-src {digest(STYLE)} {digest(_PAGE_STYLE)}; script-src {digest(SCRIPT)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n<style>{_PAGE_STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n<h1>{safe(title)}</h1>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def safe(text: str) -> str:
    """Return text for HTML content or a quoted attribute.

    Characters that HTML cannot hold (controls, lone surrogates) become U+FFFD.
    """
    return escape(_CONTROLS.sub("\ufffd", text), quote=True)


def isolated(text: str) -> str:
    """Return text in Unicode isolates, so that its writing direction ends where it ends."""
    return f"\u2068{_BIDI.sub('', text)}\u2069"


def _figure(
    result: Grounding | PanopticResult,
    key: str,
    image_src: str | None,
    areas: Sequence[Area],
    nouns: Sequence[Noun],
    parts: Sequence[str],
    below: str = "",
) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"key {key!r} is not 1 to 64 letters, digits, '_' or '-'; give another")
    source = image_src or ""
    if image_src is None:  # embedded: small pictures exact, large ones as JPEG of bounded size
        picture = Image.fromarray(np.ascontiguousarray(result.image))
        picture.thumbnail((_EMBEDDED, _EMBEDDED))
        kind = "png" if max(result.image.shape[:2]) <= _EXACT else "jpeg"
        data = encoded(picture, kind, quality=90)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    scheme = _SCHEME.match(source)
    named = scheme.group(1).lower() if scheme else ""
    if named not in ("", "http", "https", "blob") and not _DATA.fullmatch(source):
        raise ValueError(
            f"image_src {source[:80]!r} is no address of a picture; give a relative one, "
            "http(s), blob or a base64 data URI of a PNG, JPEG, WebP or GIF"
        )
    svg = _areas_svg(result.image.shape[:2], areas, nouns, source, f"gella-{key}")
    scores = "".join(f"<li>{safe(isolated(n.text))}: {safe(n.scored)}</li>" for n in nouns)
    warning = f'<p class="warning">{UNTRAINED}</p>' if result.untrained else ""
    status = f'<p class="status" role="status" data-hint="{safe(_HINT)}">{safe(_HINT)}</p>'
    return (
        f'<figure class="gella" id="gella-{key}">{warning}<div class="view">{_TOOLS}{svg}</div>'
        f"<figcaption>{''.join(parts)}{status}"
        f'<ul class="note" aria-label="entities and their scores">{scores}</ul>{below}'
        "</figcaption></figure>"
    )


def _chip(noun: Noun, place: int, text: str) -> str:
    """The noun of index ``place`` as a chip that lights its areas, ``text`` written on it."""
    numbers = " ".join(str(number) for number in noun.numbers)
    shown = ", ".join(noun.names) if len(noun.names) <= 4 else f"\u00d7{len(noun.names)}"
    says = f"{isolated(noun.text)}: {noun.scored}"
    look = f"noun c{noun.color % _COLORS}" if noun.numbers and place >= 0 else "noun none"
    return (
        f'<span class="{look}" role="button" tabindex="0" aria-pressed="false" '
        f'aria-label="{safe(says)}" data-says="{safe(says)}" data-noun="{place}" '
        f'data-entities="{numbers}" data-numbers="{safe(shown)}">{safe(text)}</span>'
    )


def _matrix(probabilities: np.ndarray, nouns: Sequence[Noun]) -> str:
    """A table of ``probabilities`` (P, E), the highest of each noun in bold; "" without any."""
    if np.isnan(probabilities).all():
        return ""
    table = np.nan_to_num(probabilities, nan=-1.0)
    order = np.argsort(-table.max(axis=0), kind="stable")
    columns = sorted(order[:_COLUMNS].tolist())
    head = "".join(f'<th scope="col" data-label="{k + 1}">{k + 1}</th>' for k in columns)
    rows = []
    for noun, row in zip(nouns, table, strict=True):
        cells = []
        for p, best in zip(row[columns].tolist(), (row[columns] == row.max()).tolist()):
            look = f"p{round(10 * p)}{' best' * best}"
            cells.append(f'<td class="{look}">{100 * p:.0f}</td>' if p >= 0 else "<td></td>")
        name = f'<th scope="row">{safe(isolated(noun.text))}</th>'
        rows.append(f'<tr class="c{noun.color % _COLORS}">{name}{"".join(cells)}</tr>')
    left = len(order) - len(columns)
    more = f"; {left} entities that score lower are left out" if left else ""
    return (
        f'<details class="note" open><summary>probability of noun and entity, in %{more}</summary>'
        f'<div class="matrix"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _areas_svg(
    size: tuple[int, int], areas: Sequence[Area], nouns: Sequence[Noun], source: str, ident: str
) -> str:
    """The picture with its areas, large ones below small ones, as one ``<svg>``.

    ``size`` (H, W) is that of the frame; nouns give the areas, whose numbers are distinct, their
    colours, and an area of several is striped. ``source`` is the address of the picture, not
    escaped; ``ident`` begins the ids, unique on the page and safe.
    """
    height, width = size
    scale = _SIDE / max(size)  # pixels of the screen that one of the frame gets
    drawn, stride = _thinned(areas)
    patterns: dict[tuple[int, ...], str] = {}
    paths = []
    for area in sorted(drawn, key=lambda a: -np.count_nonzero(a.layer.mask)):
        owners = [noun for noun in nouns if area.number in noun.numbers]
        colors = tuple(dict.fromkeys(noun.color % _COLORS for noun in owners))
        look = f'class="named c{colors[0]}' if colors else 'class="unnamed'
        if colors and mean_width(area.layer.mask) * stride * scale < _THIN:
            look += " thin"
        look += '"'
        if len(colors) > 1:
            name = patterns.setdefault(colors, f"{ident}-stripes-{len(patterns)}")
            look += f' fill="url(#{name})"'
        elif colors:
            look += ' fill="currentColor"'
        says = f"{area.name}: {', '.join(isolated(noun.text) for noun in owners) or 'no noun'}"
        scaled = f' transform="scale({stride})"' if stride > 1 else ""
        told = f'data-entity="{area.number}" data-says="{safe(says)}"'
        paths.append(f'<path {told} {look}{scaled} d="{svg_path(*area.layer)}"/>')
    labelled = [area for area in areas if area.labelled]
    return (
        f'<div class="stage{" crisp" if max(size) <= _EXACT else ""}">'
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="picture with {len(areas)} masks">{_stripes(patterns, _STRIPE / scale)}'
        f'<image href="{safe(source)}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{"".join(paths)}'
        f"{_labels(labelled, size, _TEXT / scale)}</svg></div>"
    )


def _thinned(areas: Sequence[Area]) -> tuple[list[Area], int]:
    """Areas with _MAX_CORNERS at most, on every n-th pixel of the frame, and n."""
    thinned, stride = list(areas), 1
    while sum(len(_corners(area.layer.mask)[0]) for area in thinned) > _MAX_CORNERS:
        stride *= 2
        thinned = []
        for area in areas:
            mask, left, top = area.layer
            x, y = -(-left // stride), -(-top // stride)
            mask = mask[y * stride - top :: stride, x * stride - left :: stride]
            thinned.append(area._replace(layer=Layer(mask, x, y)))
    return thinned, stride


def _labels(areas: Sequence[Area], size: tuple[int, int], text: float) -> str:
    """Numbers where ``place_labels`` puts them; a line joins those that lie off their masks.

    ``text`` is the height of the letters in pixels of the frame.
    """
    boxes = [((0.62 * len(str(area.number)) + 0.4) * text, 1.15 * text) for area in areas]
    spots = place_labels([area.layer for area in areas], boxes, (size[1], size[0]))
    parts: list[str] = []
    for area, spot in zip(areas, spots, strict=True):
        if spot is None:
            continue
        ident = f'data-label="{area.number}"'
        if spot.apart:
            x, y = spot.anchor
            ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{spot.x:.1f}" y2="{spot.y:.1f}"'
            parts.insert(0, f"<line {ident} {ends}/>")
        parts.append(f'<text {ident} x="{spot.x:.1f}" y="{spot.y:.1f}">{area.number}</text>')
    return f'<g font-size="{text:.2f}">{"".join(parts)}</g>'


def _stripes(patterns: dict[tuple[int, ...], str], width: float) -> str:
    """Fillings of slanted stripes, each colour ``width`` wide in pixels of the frame."""
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
    return f"<defs>{''.join(parts)}</defs>" if parts else ""


def mean_width(mask: np.ndarray) -> float:
    """Return twice the area over the length of the boundary of a bool (H, W) mask, in pixels: about
    the width of a line, half the side of a square; 0 for an empty mask."""
    cells = np.pad(mask, 1)
    across = np.count_nonzero(cells[1:] != cells[:-1])
    length = across + np.count_nonzero(cells[:, 1:] != cells[:, :-1])
    return 2 * np.count_nonzero(mask) / length if length else 0.0


def svg_path(mask: np.ndarray, x: int = 0, y: int = 0) -> str:
    """Return the path data of a mask's boundary, to be filled by the rule ``evenodd``.

    A pixel (x, y) is the square from (x, y) to (x + 1, y + 1): the path covers exactly the mask's
    pixels, with its parts and holes as subpaths, so neighbouring masks share an edge and no point.

    Args:
        mask: bool (H, W).
        x, y: column and row of the mask's first pixel in the frame of the path.

    Returns:
        Relative horizontal and vertical lines, ``"M3 4h5v2h-5z"``; "" for an empty mask.
    """
    columns, rows = _corners(mask)
    # Along a line of the pixel grid the boundary's corners are the ends of its edges in turn: in
    # row order corners 2k and 2k + 1 share a horizontal edge, in column order a vertical one.
    order = np.lexsort((rows, columns))
    partners = np.empty(len(order), dtype=np.intp)
    partners[order[0::2]], partners[order[1::2]] = order[1::2], order[0::2]
    xs, ys, below = (columns + x).tolist(), (rows + y).tolist(), partners.tolist()
    seen = [False] * len(xs)
    parts: list[str] = []
    for start in range(len(xs)):
        if seen[start]:
            continue
        parts.append(f"M{xs[start]} {ys[start]}")
        here = start
        while True:  # horizontal and vertical edges in turn
            across = here ^ 1
            seen[here] = seen[across] = True
            following = below[across]
            parts.append(f"h{xs[across] - xs[here]}")
            if following == start:  # "z" draws the last edge
                parts.append("z")
                break
            parts.append(f"v{ys[following] - ys[across]}")
            here = following
    return "".join(parts)


def _corners(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the boundary's corners in row order; where two pixels touch by a corner only,
    that corner is there twice."""
    cells = np.pad(mask, 1).view(np.int8)
    turns = cells[1:, 1:] ^ cells[1:, :-1] ^ cells[:-1, 1:] ^ cells[:-1, :-1]
    # A diagonal pair has an even number of pixels, and is a corner all the same.
    crossing = (cells[1:, 1:] == cells[:-1, :-1]) & (cells[1:, :-1] == cells[:-1, 1:])
    crossing &= cells[1:, 1:] != cells[1:, :-1]
    ys, xs = np.nonzero((turns != 0) | crossing)
    twice = 1 + crossing[ys, xs].astype(np.intp)
    return np.repeat(xs, twice), np.repeat(ys, twice)

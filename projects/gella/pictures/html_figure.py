"""Results as HTML figures in which nouns light their masks and masks their nouns.

The figures hold no script: a page that shows them needs :data:`STYLE` and :data:`SCRIPT` once, and
:func:`page` makes such a page. All texts are escaped, so captions and categories may hold anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from gella.entities.entity_map import EntityMap
from gella.pictures.grounding import Grounding, PanopticResult
from gella.pictures.html_parts import (
    COLOR_CLASSES,
    Area,
    Noun,
    area_of_mask,
    areas_of_ids,
    areas_svg,
    chip,
    color_classes,
    color_style,
    isolated,
    safe,
)

__all__ = ["SCRIPT", "STYLE", "grounding_html", "page", "panoptic_html"]

_FILES = resources.files("gella.pictures")

STYLE = _FILES.joinpath("page.css").read_text("utf-8") + color_style()
"""CSS of the figures; every rule is for ``.gella`` and what is in it."""

SCRIPT = _FILES.joinpath("page.js").read_text("utf-8")
"""JavaScript of the figures: listeners on ``document``, also for figures that are inserted later.

Including it twice does no harm. Class ``lit`` is on what is lit, ``active`` on a figure in which
something is, ``pinned`` on the noun or mask that was clicked.
"""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_DATA = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]*")
_LONGEST = 1600  # pixels; larger pictures are embedded at this longest side
_HINT = "Point at a noun or a mask. A click keeps it lit, another click or Escape lets go."
_PAGE_STYLE = """:root { color-scheme: light dark; }
body { margin: 0; background: Canvas; color: CanvasText; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 12px 16px 48px; }
h1, h2 { unicode-bidi: isolate; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; margin: 8px 0 16px; }
h2 { font-size: 1.15em; margin: 28px 0 8px; }
"""


def grounding_html(result: Grounding, *, key: str, image_src: str | None = None) -> str:
    """Return a grounded caption as a figure: the picture with its masks, and the caption.

    Every entity with a pixel is a ``<path data-entity="N">``, N counted from 1 as in the picture of
    ``plot()``; masks that the model made itself follow after the input's. Every noun is one
    ``<span data-noun="i" data-entities="1 2">`` at its place in the caption, or below it where it
    has none there (not in the caption, or inside another noun).

    Args:
        result: what was grounded.
        key: makes the ids of the figure its own on a page; 1 to 64 letters, digits, ``_``, ``-``.
        image_src: address of the picture: a relative one (percent-encoded), http(s), blob or a
            data URI; the file may have another size. None embeds the picture.

    Raises:
        ValueError: a key or an address that is none of these.
    """
    ident = _ident(key)
    areas, nouns = _grounded(result)
    inside, outside = _cut(result.caption, result.phrases, nouns)
    parts = [f'<p class="caption" dir="auto">{inside}</p>']
    if outside:
        chips = " ".join(outside)
        parts.append(f'<p class="note">not at a place of their own in the text: {chips}</p>')
    if result.cut_nouns:
        names = ", ".join(isolated(noun) for noun in result.cut_nouns)
        parts.append(f'<p class="note">left out, the caption is too long: {safe(names)}</p>')
    source = _source(image_src, result.image)
    svg = areas_svg(result.image.shape[:2], areas, nouns, source, ident)
    return _figure(ident, svg, parts, untrained=result.untrained)


def panoptic_html(result: PanopticResult, *, key: str, image_src: str | None = None) -> str:
    """Return a panoptic map as a figure: every segment a path, every category found a chip.

    Segments are numbered 1, 2, ... in the order of ``segments_info``; the other arguments and the
    errors are those of :func:`grounding_html`.
    """
    ident = _ident(key)
    numbered = EntityMap.from_id_image(result.ids, [s["id"] for s in result.segments_info])
    count = numbered.num_entities
    areas = areas_of_ids(numbered.ids, [f"segment {k + 1}" for k in range(count)])
    names = {category["id"]: category["name"] for category in result.categories}
    members: dict[int, list[int]] = {}
    for number, segment in enumerate(result.segments_info, start=1):
        members.setdefault(segment["category_id"], []).append(number)
    nouns = [
        Noun(names[k], place % COLOR_CLASSES, tuple(found), tuple(map(str, found)))
        for place, (k, found) in enumerate(members.items())
    ]
    chips = " ".join(chip(noun, place, noun.text) for place, noun in enumerate(nouns))
    parts = [f'<p class="caption">{chips or "no segment"}</p>']
    absent = [isolated(name) for k, name in names.items() if k not in members]
    if absent:
        listed = f"{len(absent)} categories without a segment"
        parts.append(
            f'<details class="note"><summary>{listed}</summary>{safe(", ".join(absent))}</details>'
        )
    source = _source(image_src, result.image)
    svg = areas_svg(result.image.shape[:2], areas, nouns, source, ident)
    return _figure(ident, svg, parts, untrained=not result.weights)


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole HTML document with the style and the script of the figures.

    Its Content-Security-Policy runs this script only and loads nothing but pictures, from data URIs
    and from beside the page. Style attributes and other scripts in ``body`` do nothing.

    Args:
        title: any text.
        body: HTML of the page's parts, whose texts are escaped already.
    """
    styles = [STYLE, _PAGE_STYLE]
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data: 'self'",
            f"style-src {' '.join(_hash(style) for style in styles)}",
            f"script-src {_hash(SCRIPT)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = "".join(f"<style>{style}</style>\n" for style in styles)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n{head}</head>\n<body>\n<main>\n<h1>{safe(title)}</h1>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _ident(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"key {key!r} is not 1 to 64 letters, digits, '_' or '-'; give another")
    return f"gella-{key}"


def _source(image_src: str | None, image: np.ndarray) -> str:
    if image_src is None:
        return _embedded(image)
    scheme = _SCHEME.match(image_src)
    named = scheme.group(1).lower() if scheme else ""
    if named not in ("", "http", "https", "blob") and not _DATA.fullmatch(image_src):
        raise ValueError(
            f"image_src {image_src[:80]!r} is no address of a picture; give a relative one, "
            "http(s), blob or a base64 data URI of a PNG, JPEG, WebP or GIF"
        )
    return image_src


def _embedded(image: np.ndarray) -> str:
    """The picture as a data URI: small ones exact, large ones as JPEG of bounded size."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_LONGEST, _LONGEST))
    buffer = io.BytesIO()
    kind = "png" if max(image.shape[:2]) <= 256 else "jpeg"
    picture.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _figure(ident: str, svg: str, parts: Sequence[str], *, untrained: bool) -> str:
    warning = ""
    if untrained:
        text = "untrained weights: shows the form of the output, not a result"
        warning = f'<p class="warning">{text}</p>'
    status = f'<p class="status" role="status" data-hint="{safe(_HINT)}">{safe(_HINT)}</p>'
    return (
        f'<figure class="gella" id="{ident}">{warning}{svg}'
        f"<figcaption>{''.join(parts)}{status}</figcaption></figure>"
    )


def _grounded(result: Grounding) -> tuple[list[Area], list[Noun]]:
    """Areas and nouns of a grounding; masks of the model get numbers after the entities'."""
    entities = result.entities
    count = entities.num_entities
    areas = areas_of_ids(entities.ids, [f"entity {k + 1}" for k in range(count)])
    known = {} if result.own_masks else {e: k + 1 for k, e in enumerate(entities.segment_ids)}
    colors = color_classes(result.phrases)
    made: dict[tuple[int, ...], int] = {}
    nouns = []
    for phrase, color in zip(result.phrases, colors, strict=True):
        numbers = sorted(known[entity] for entity in phrase["entity_ids"] if entity in known)
        foreign = tuple(sorted(entity for entity in phrase["entity_ids"] if entity not in known))
        names = [str(number) for number in numbers]
        if foreign:
            names += ["new"] * len(foreign)
            if foreign not in made:
                made[foreign] = count + 1 + len(made)
                rest = phrase["mask"] & ~np.isin(entities.ids, numbers)
                areas += area_of_mask(made[foreign], "mask of the model", rest)
            numbers.append(made[foreign])
        nouns.append(Noun(phrase["phrase"], color, tuple(numbers), tuple(names)))
    return areas, nouns


def _cut(
    caption: str, phrases: Sequence[dict[str, Any]], nouns: Sequence[Noun]
) -> tuple[str, list[str]]:
    """HTML of the caption with its chips, and the chips of the nouns without a place in it."""
    parts, outside, cursor = [], {}, 0
    for place in sorted(range(len(nouns)), key=lambda k: phrases[k]["start"]):
        start, end = phrases[place]["start"], min(phrases[place]["end"], len(caption))
        if start < cursor or end <= start:
            outside[place] = chip(nouns[place], place, nouns[place].text)
            continue
        parts.append(safe(caption[cursor:start]))
        parts.append(chip(nouns[place], place, caption[start:end]))
        cursor = end
    parts.append(safe(caption[cursor:]))
    return "".join(parts), [outside[place] for place in sorted(outside)]

"""Weight formats that people have, and the way to GELLA's keys and back.

``FORMATS`` lists them by kind, which is what a file was given as; ``detect`` finds out which of a
kind some keys are in. A format is a :class:`~gella.weights.layout.Layout`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gella.weights.layout import Layout
from gella.weights.llava import (
    ClipHf,
    ClipHfVision,
    ClipOpenAI,
    ClipOpenAIVisual,
    LlavaHf,
    LlavaHfModules,
    LlavaOriginal,
)
from gella.weights.mask2former import (
    Mask2FormerTransformers,
    Mask2FormerUpstream,
    MobileNetTimm,
    SwinOriginal,
    SwinTimm,
)

__all__ = ["FORMATS", "Layout", "LlavaHf", "LlavaOriginal", "detect"]

#: Formats by kind, in the order in which they are listed to a user.
FORMATS: dict[str, tuple[type[Layout], ...]] = {
    "llava": (LlavaHf, LlavaHfModules, LlavaOriginal),
    "mask2former": (Mask2FormerUpstream, Mask2FormerTransformers),
    "clip": (ClipOpenAI, ClipOpenAIVisual, ClipHf, ClipHfVision),
    "colormap-encoder": (SwinOriginal, SwinTimm, MobileNetTimm),
}


def detect(kind: str, keys: Iterable[str], source: str) -> type[Layout]:
    """The one format of a kind that the keys are in.

    Args:
        kind: a key of ``FORMATS``.
        keys: all keys of a file.
        source: the file; only named in the error.

    Raises:
        ValueError: the keys are in none of the formats, or in several at once.
    """
    keys = list(keys)
    found = [layout for layout in FORMATS[kind] if layout.recognises(keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} mixes the formats {_names(found)}: give one model per file")
    raise ValueError(
        f"{source} is in no {kind} format that is known ({_names(FORMATS[kind])}); its {len(keys)}"
        f" keys start with: {', '.join(sorted(keys)[:5])}"
    )


def _names(layouts: Iterable[type[Layout]]) -> str:
    return ", ".join(layout.name for layout in layouts)

"""Weight formats that people have, and the way to GELLA's keys and back.

``FORMATS`` lists them by kind, which is what a file was given as; ``detect`` finds out which of a
kind some keys are in. A format is a :class:`~gella.weights.layout.Layout`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gella.weights.backbones import MobileNetTimm, SwinOriginal, SwinTimm
from gella.weights.clip import ClipHf, ClipHfVision, ClipOpenAI, ClipOpenAIVisual
from gella.weights.layout import Composite, Layout
from gella.weights.llava import LlavaHfModulesText, LlavaHfText, LlavaOriginalText
from gella.weights.mask2former import Mask2FormerTransformers, Mask2FormerUpstream

__all__ = ["FORMATS", "Composite", "Layout", "LlavaHf", "LlavaOriginal", "detect", "format_named"]


class LlavaHf(Composite):
    """LLaVA-1.5 as ``save_pretrained`` writes it; exports take transformers 4's names, which both
    versions read."""

    name = "llava-hf"
    signature = ("language_model.model.layers.*", "multi_modal_projector.linear_1.weight")
    parts = (
        ("vision_tower.vision_model.", ClipHfVision()),
        ("vision_tower.", ClipHfVision()),
        ("", LlavaHfText()),
    )


class LlavaHfModules(Composite):
    """The names of transformers' modules, which ``state_dict()`` gives since its version 4.52."""

    name = "llava-hf-modules"
    signature = ("model.language_model.layers.*", "model.multi_modal_projector.linear_1.weight")
    parts = (
        ("model.vision_tower.vision_model.", ClipHfVision()),
        ("model.vision_tower.", ClipHfVision()),
        ("", LlavaHfModulesText()),
    )


class LlavaOriginal(Composite):
    """LLaVA-1.5 as its own repository writes it, with or without a vision tower."""

    name = "llava-original"
    signature = ("model.layers.*", "model.mm_projector.*")
    parts = (
        ("model.vision_tower.vision_tower.vision_model.", ClipHfVision()),
        ("model.vision_tower.vision_tower.", ClipHfVision()),
        ("", LlavaOriginalText()),
    )


#: Formats by kind, in the order in which they are listed to a user.
FORMATS: dict[str, tuple[type[Layout], ...]] = {
    "llava": (LlavaHf, LlavaHfModules, LlavaOriginal),
    "mask2former": (Mask2FormerUpstream, Mask2FormerTransformers),
    "clip": (ClipOpenAI, ClipOpenAIVisual, ClipHf, ClipHfVision),
    "colormap-encoder": (SwinOriginal, SwinTimm, MobileNetTimm),
}


def format_named(kind: str, name: str) -> type[Layout]:
    """The format of a kind with this name; ValueError lists the names."""
    for layout in FORMATS[kind]:
        if layout.name == name:
            return layout
    raise ValueError(f"there is no {kind} format {name!r}; known: {_names(FORMATS[kind])}")


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

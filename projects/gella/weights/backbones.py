"""Weights of image classifiers for the colormap encoder: Swin (two cuts) and the MobileNet family.

The encoder is a timm model with ``features_only``, which names stages ``layers_0`` where the plain
model says ``layers.0`` and has neither the final norm nor the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

from gella.weights.layout import Layout

__all__ = [
    "SWIN_BUFFERS",
    "MobileNetTimm",
    "SwinOriginal",
    "SwinTimm",
    "merging_rules",
    "swin_rules",
]

_BODY = "colormap_encoder.body."
#: Constants that Swin's own code stores with the weights; timm computes them.
SWIN_BUFFERS = ("*.relative_position_index", "*.attn_mask")


def merging_rules(prefix: str = "") -> list[tuple[str, str]]:
    """Rules for Swin's merging of patches, from the names of its repository behind ``prefix``.

    The repository puts it at the end of a stage, timm at the start of the next. The merged channels
    have the same order, so nothing is permuted.
    """
    return [
        (
            f"{prefix}layers.{stage}.downsample.{{rest}}",
            f"{_BODY}layers_{stage + 1}.downsample.{{rest}}",
        )
        for stage in range(3)
    ]


def swin_rules(prefix: str = "") -> list[tuple[str, str]]:
    """Rules from all names of the Swin repository, behind ``prefix``, to the colormap encoder's."""
    return [
        *merging_rules(prefix),  # before the general rule, which would fit too
        (f"{prefix}layers.{{i}}.{{rest}}", f"{_BODY}layers_{{i}}.{{rest}}"),
        (f"{prefix}patch_embed.{{rest}}", f"{_BODY}patch_embed.{{rest}}"),
    ]


class SwinOriginal(Layout):
    """The Swin repository's classifiers (``{"model": ...}``), and timm's before its version 0.9.

    The norms of the four levels are Mask2Former's addition; a classifier has none.
    """

    name = "swin-original"
    prefix = "colormap_encoder."
    signature: Sequence[str] = ("patch_embed.proj.weight", "layers.0.downsample.reduction.weight")
    rules: Sequence[tuple[str, str]] = tuple(swin_rules())
    dropped: Sequence[str] = (*SWIN_BUFFERS, "norm.*", "head.*")
    fresh: Sequence[str] = ("colormap_encoder.norms.*",)


class SwinTimm(Layout):
    """timm's Swin classifiers, version 0.9 and later."""

    name = "swin-timm"
    prefix = "colormap_encoder."
    signature: Sequence[str] = ("patch_embed.proj.weight", "layers.3.downsample.reduction.weight")
    rules: Sequence[tuple[str, str]] = (
        ("layers.{i}.{rest}", _BODY + "layers_{i}.{rest}"),
        ("patch_embed.{rest}", _BODY + "patch_embed.{rest}"),
    )
    dropped: Sequence[str] = (*SWIN_BUFFERS, "norm.*", "head.*")
    fresh: Sequence[str] = ("colormap_encoder.norms.*",)


class MobileNetTimm(Layout):
    """timm's MobileNetV2 classifiers, and its other models of the same build, such as LCNet."""

    name = "mobilenet-timm"
    prefix = "colormap_encoder."
    signature: Sequence[str] = ("conv_stem.weight", "bn1.weight", "blocks.0.0.conv_dw.weight")
    rules: Sequence[tuple[str, str]] = tuple(
        (f"{part}.{{rest}}", f"{_BODY}{part}.{{rest}}") for part in ("conv_stem", "bn1", "blocks")
    )
    # What lies behind the last feature map.
    dropped: Sequence[str] = ("conv_head.*", "bn2.*", "classifier.*")

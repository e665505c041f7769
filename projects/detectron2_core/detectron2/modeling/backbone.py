"""Interface, registry and builder of networks that turn images into named feature maps."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

BACKBONE_REGISTRY = Registry("BACKBONE")  # callables (cfg, input_shape: ShapeSpec) -> Backbone


class Backbone(nn.Module, metaclass=ABCMeta):
    """Base class: ``forward`` maps (B, C, H, W) to ``{name: (B, C_n, H / s_n, W / s_n)}``.

    Subclasses either override ``output_shape`` or set ``_out_features`` (list of names),
    ``_out_feature_channels`` and ``_out_feature_strides`` (dicts from name to int).
    """

    @abstractmethod
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the feature maps, keyed as in ``output_shape``."""

    @property
    def size_divisibility(self) -> int:
        """Number by which the input's height and width must be divisible; 0: no demand."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Demands on padding: keys ``size_divisibility`` and ``square_size``, both optional."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every feature map."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {n: ShapeSpec(channels=channels[n], stride=strides[n]) for n in self._out_features}


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build ``cfg.MODEL.BACKBONE.NAME``; the input has ``len(PIXEL_MEAN)`` channels by default.

    Raises ``KeyError`` for an unregistered name, ``AssertionError`` for a wrong return type.
    """
    name = cfg.MODEL.BACKBONE.NAME
    input_shape = input_shape or ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        raise AssertionError(f"MODEL.BACKBONE.NAME {name} gave {type(backbone)}, not a Backbone")
    return backbone

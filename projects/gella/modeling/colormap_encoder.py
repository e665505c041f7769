"""The colormap encoder f_Upsilon (eq. 1): any timm pyramid behind Detectron2's Backbone."""

from __future__ import annotations

import logging
import math
from typing import Any

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_DIVISOR = 32
_logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
class TimmColormapEncoder(Backbone):
    """Pyramid mask features ``z^s``, s in 2..5, from the colormap (section 3.1, eq. 1).

    One class for every timm model with ``features_only`` that has the strides 4, 8, 16 and 32:
    MobileNetV2, Swin-T and Swin-L of the paper, LCNet for small machines, ConvNeXt and others.
    Weights are always random here; a checkpoint fills them.

    Swin computes what Mask2Former's Swin computes where its windows fit every level whole: at sides
    that are multiples of 224 pixels for windows of 7 cells (7 x 32) and of 384 for windows of 12
    (``swin_large_patch4_window12_384``), at any size and shape. At other sides timm shifts before
    it pads, Mask2Former pads before it shifts: maps of unit variance then differ by about 1. Any
    side works, and training adapts, but public weights start best at whole windows.
    """

    @configurable
    def __init__(self, *, arch: str, in_channels: int = 3) -> None:
        """Build the timm model.

        Args:
            arch: a timm model name, without a pretrained tag.
            in_channels: channels of the input, 3 for a colormap.

        Raises:
            ValueError: timm does not know ``arch``, or it lacks one of the four strides.
        """
        super().__init__()
        self.body = _create(arch, in_channels)
        reductions = list(self.body.feature_info.reduction())
        missing = [s for s in _STRIDES.values() if s not in reductions]
        if missing:
            raise ValueError(
                f"MODEL.COLORMAP_ENCODER.ARCH {arch!r} has strides {reductions} and lacks "
                f"{missing}; choose a timm model with the strides 4, 8, 16 and 32"
            )
        channels = self.body.feature_info.channels()
        self._taken = {name: reductions.index(s) for name, s in _STRIDES.items()}
        self._out_features = list(_STRIDES)
        self._out_feature_strides = dict(_STRIDES)
        self._out_feature_channels = {n: channels[i] for n, i in self._taken.items()}
        # Swin-like transformers give channels-last maps straight from the residual stream, without
        # a norm; Mask2Former puts one LayerNorm on each, and so do we.
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        # Sides that are multiples of this have whole windows at every level.
        parts = self.body.modules() if arch.startswith("swin_") else ()
        windows = (m.window_size[0] for m in parts if hasattr(m, "window_size"))
        self.window_stride = _DIVISOR * math.lcm(*windows)
        self._warned = False
        self.norms = nn.ModuleDict()
        if self.channels_last:
            for name in self._out_features:
                self.norms[name] = nn.LayerNorm(self._out_feature_channels[name])

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Read ``MODEL.COLORMAP_ENCODER``; ``input_shape`` gives the channels (3 without it)."""
        channels = 3 if input_shape is None else input_shape.channels or 3
        return dict(arch=cfg.MODEL.COLORMAP_ENCODER.ARCH, in_channels=channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Encode normalised colormaps.

        Args:
            x: (B, 3, H, W) float. Sides that are no multiples of 32 are padded at the bottom and
                right with 0, which is the mean colour, and the maps are cropped back.

        Returns:
            ``{"res2": (B, c2, H/4, W/4), ..., "res5": (B, c5, H/32, W/32)}``, sizes rounded up.
        """
        height, width = x.shape[-2:]
        whole = not (height % self.window_stride or width % self.window_stride)
        if self.window_stride > _DIVISOR and not whole and not self._warned:
            self._warned = True
            _logger.warning(
                "Colormaps of %d x %d pixels cut the windows of this Swin: it is not the function "
                "that public weights were trained in. Set INPUT.GELLA.COLORMAP_SIZE to a multiple "
                "of %d.",
                *(width, height, self.window_stride),
            )
        # MobileNets round odd sizes up and ConvNeXt down; on multiples of 32 all agree.
        pad = (-width % _DIVISOR, -height % _DIVISOR)
        if any(pad):
            x = nn.functional.pad(x, (0, pad[0], 0, pad[1]))
        maps = self.body(x)
        outputs = {}
        for name, index in self._taken.items():
            feature = maps[index]
            if self.channels_last:
                feature = self.norms[name](feature).permute(0, 3, 1, 2)  # B H W C -> B C H W
            stride = _STRIDES[name]
            outputs[name] = feature[..., : -(-height // stride), : -(-width // stride)].contiguous()
        return outputs


def _create(arch: str, in_channels: int) -> nn.Module:
    import timm

    if not timm.is_model(arch):
        raise ValueError(
            f"MODEL.COLORMAP_ENCODER.ARCH {arch!r} is not a timm model; see timm.list_models()"
        )
    options: dict[str, Any] = {}
    if arch.startswith("swin_"):
        # Other sizes than the pretraining size are allowed, and windows keep their size on small
        # maps: then the function is Mask2Former's Swin at sides that are multiples of 224.
        options = dict(strict_img_size=False, always_partition=True)
    return timm.create_model(
        arch, pretrained=False, features_only=True, in_chans=in_channels, **options
    )

"""The image encoder f_Omega (eq. 2): CLIP's vision transformer, built from sizes alone."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn


@BACKBONE_REGISTRY.register()
class CLIPImageEncoder(Backbone):
    """Grid features ``Z_v`` of CLIP's last layer, and of the layer before it (section 3.1, eq. 2).

    The last layer goes to ResoBlend; LLaVA-1.5's language model was trained on the penultimate
    one. The tower is open_clip's ``VisionTransformer`` without the parts behind the last layer
    (``ln_post`` and ``proj``), so every parameter left takes part in the output.
    """

    @configurable
    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        head_width: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = True,
        stem: str = "patch",
        freeze: bool = True,
    ) -> None:
        """Build a random tower; the arguments are the keys of ``MODEL.IMAGE_ENCODER``.

        Args:
            image_size, patch_size: pixels; the grid side g is their quotient.
            width, layers, head_width, mlp_ratio: of the transformer.
            quick_gelu: OpenAI's activation, needed by OpenAI's weights.
            stem: ``patch``, CLIP's single convolution, or ``conv``, strided convolutions with norm
                and GELU of the same total stride.
            freeze: no gradient, evaluation mode for good.

        Raises:
            ValueError: sizes that do not divide, fewer than two layers, or an unknown stem.
        """
        super().__init__()
        _check_sizes(image_size, patch_size, width, layers, head_width)
        self.image_size, self.patch_size = image_size, patch_size
        self.width, self.num_layers, self.freeze = width, layers, freeze
        self.visual = _build_tower(
            quick_gelu,
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=width // head_width,
            mlp_ratio=mlp_ratio,
        )
        if stem == "conv":
            self.visual.conv1 = _convolutional_stem(patch_size, width)
        elif stem != "patch":
            raise ValueError(f"MODEL.IMAGE_ENCODER.STEM is {stem!r}; it must be 'patch' or 'conv'")
        if freeze:
            self.requires_grad_(False)
            self.eval()

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Read ``MODEL.IMAGE_ENCODER``; the input is RGB, ``input_shape`` is not needed."""
        node = {key.lower(): value for key, value in cfg.MODEL.IMAGE_ENCODER.items()}
        return {k: v for k, v in node.items() if k not in ("name", "pixel_mean", "pixel_std")}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels, stride and grid side of ``last`` and ``penultimate``."""
        side = self.image_size // self.patch_size
        shape = ShapeSpec(channels=self.width, height=side, width=side, stride=self.patch_size)
        return {"last": shape, "penultimate": shape}

    def train(self, mode: bool = True) -> CLIPImageEncoder:
        """As ``nn.Module.train``; a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.freeze)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Encode normalised RGB images.

        Args:
            x: (B, 3, S, S) float, S = ``image_size``.

        Returns:
            ``{"last": (B, C, g, g), "penultimate": (B, C, g, g)}``: the residual stream behind the
            last two layers, without the class token and without a final norm.

        Raises:
            ValueError: the images have another size.
        """
        if tuple(x.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"CLIPImageEncoder takes {self.image_size}x{self.image_size} images, got "
                f"{x.shape[-2]}x{x.shape[-1]}; resize, or set MODEL.IMAGE_ENCODER.IMAGE_SIZE"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            grids = self.visual.forward_intermediates(
                x,
                indices=[self.num_layers - 2, self.num_layers - 1],
                output_fmt="NCHW",
                intermediates_only=True,
            )["image_intermediates"]
        return {"last": grids[1], "penultimate": grids[0]}


def _check_sizes(image_size: int, patch_size: int, width: int, layers: int, head: int) -> None:
    for wrong, message in (
        (
            image_size % patch_size,
            f"IMAGE_SIZE {image_size} is no multiple of PATCH_SIZE {patch_size}",
        ),
        (width % head, f"WIDTH {width} is no multiple of HEAD_WIDTH {head}"),
        (layers < 2, f"LAYERS is {layers}; the penultimate layer needs at least 2"),
    ):
        if wrong:
            raise ValueError(f"MODEL.IMAGE_ENCODER.{message}")


def _build_tower(quick_gelu: bool, **sizes: Any) -> nn.Module:
    from open_clip.transformer import QuickGELU, VisionTransformer

    visual = VisionTransformer(
        **sizes,
        output_dim=1,  # of the projection, which goes at once
        act_layer=QuickGELU if quick_gelu else nn.GELU,
    )
    # What lies behind the last layer would be parameters without a gradient, which
    # DistributedDataParallel refuses.
    visual.ln_post = nn.Identity()
    visual.proj = None
    return visual


def _convolutional_stem(patch_size: int, width: int) -> nn.Module:
    """Strided convolutions whose strides multiply to ``patch_size``: (B, 3, S, S) -> (B, C, g, g).

    Three stride-2 convolutions for patches of 8. Channels double from one to the next and end at
    ``width``; the last has neither norm nor activation, for the transformer's ``ln_pre`` follows.
    """
    strides = _prime_factors(patch_size)
    layers: list[nn.Module] = []
    channels = 3
    for i, stride in enumerate(strides):
        last = i == len(strides) - 1
        out = width if last else max(16, width >> (len(strides) - 1 - i))
        kernel = max(3, stride)
        padding = 1 if stride == 2 else 0
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=last))
        if not last:
            layers += [nn.GroupNorm(1, out), nn.GELU()]
        channels = out
    return nn.Sequential(*layers)


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors or [1]

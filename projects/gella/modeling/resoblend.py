"""ResoBlend: one low-resolution image grid blended into the colormap's pyramid (section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

FUSIONS = ("image_query", "image_query_mask_residual", "mask_query")


def sine_positions(height: int, width: int, dim: int, like: Tensor) -> Tensor:
    """Fixed 2D sine embedding of cell centres: (1, height * width, dim), row-major.

    Coordinates are relative (0..1), so cells of two grids over the same padded square that lie at
    the same place get the same embedding whatever their strides: half the channels encode y, half
    x, by sines and cosines of wave lengths from 2 down to 2/32 of the side.

    Args:
        height, width: of the grid.
        dim: channels, a multiple of 4.
        like: gives dtype and device.
    """
    count = dim // 4
    exponents = torch.arange(count, device=like.device, dtype=torch.float32) / max(1, count - 1)
    frequencies = math.pi * 32.0**exponents  # radians per side
    ys = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) / height
    xs = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) / width
    y = ys[:, None] * frequencies
    x = xs[:, None] * frequencies
    y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(height, width, 2 * count)
    x = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(height, width, 2 * count)
    return torch.cat([y, x], dim=-1).reshape(1, height * width, dim).to(like.dtype)


class Attention(nn.Module):
    """Multi-head attention through ``scaled_dot_product_attention``: no matrix is materialised."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build ``f_q``, ``f_k``, ``f_v`` of eq. 7 and the output projection, all ``dim`` wide."""
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, N, D) queries over (B, M, D) keys and values -> (B, N, D)."""
        q, k, v = (self._split(x) for x in (self.query(query), self.key(key), self.value(value)))
        mixed = F.scaled_dot_product_attention(q, k, v)  # B h N d
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B N D -> B h N d


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; the hidden width is ``ratio`` times ``dim``."""

    def __init__(self, dim: int, ratio: float) -> None:
        """Build the two layers."""
        hidden = max(1, int(dim * ratio))
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class _Level(nn.Module):
    """One level of the pyramid; what a switch turns off has no parameters here."""

    def __init__(self, parent: ResoBlend, in_channels: int) -> None:
        super().__init__()
        dim = parent.dim
        # z^s comes unnormalised and with its own channels; attention wants one width and scale.
        self.lateral = nn.Sequential(
            nn.Conv2d(in_channels, dim, 1), nn.GroupNorm(math.gcd(32, dim), dim)
        )
        if parent.cross_attention:
            self.attention = Attention(dim, parent.num_heads)
        mask_query = parent.fusion == "mask_query"
        if mask_query and parent.cross_attention:
            self.attention_norm = nn.LayerNorm(dim)
        if parent.feed_forward:
            self.ffn = FeedForward(dim, parent.ffn_ratio)
            if mask_query:
                self.ffn_norm = nn.LayerNorm(dim)
        if parent.convolution:
            self.conv = nn.Conv2d(dim, dim, 3, padding=1)


class ResoBlend(nn.Module):
    """Fuse CLIP's grid ``Z_v`` with every level ``z^s`` of the colormap's pyramid (eq. 7 and 8).

    Fusions:
        ``image_query``: eq. 7 and 8 to the letter. The image tokens ask, the mask features answer;
        every output level holds no more detail than CLIP's grid has cells.
        ``image_query_mask_residual``: the same, plus the projected ``z^s`` after the upsampling.
        ``mask_query``: the mask features ask and keep themselves as the residual, the image tokens
        answer, and ``Z_v`` is added bilinearly upsampled: full detail at every level.

    Image and colormap are padded to squares by the same geometry, so cells at the same relative
    place show the same part of the scene and nothing has to be aligned.

    Both attentions see a fixed sine embedding of the cell centres on queries and keys (not on
    values), unless ``position`` is off. CLIP's tokens carry a position of their own, but ``z^s``
    has none except what zero padding leaks at the borders: without it, a region in the middle
    could find its image cells by colour alone, and colours are random.

    The five switches are the parts of Table 7. Without cross-attention the mask features go on
    alone, isolated from the image: self-attention and the residual ``Z_v`` are then absent too.
    """

    @configurable
    def __init__(
        self,
        *,
        image_channels: int,
        pyramid_shapes: dict[str, ShapeSpec],
        fusion: str = "mask_query",
        dim: int = 256,
        num_heads: int = 8,
        ffn_ratio: float = 4.0,
        self_attention: bool = True,
        cross_attention: bool = True,
        feed_forward: bool = True,
        residual: bool = True,
        convolution: bool = True,
        position: bool = True,
    ) -> None:
        """Build the module; the arguments are the keys of ``MODEL.RESOBLEND``.

        Args:
            image_channels: C_v, of ``Z_v``.
            pyramid_shapes: channels and stride of every ``z^s``.

        Raises:
            ValueError: an unknown fusion, or sizes that do not divide.
        """
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"MODEL.RESOBLEND.FUSION is {fusion!r}; it must be one of {FUSIONS}")
        if dim % num_heads or dim % 4:
            raise ValueError(
                f"MODEL.RESOBLEND.DIM {dim} must be a multiple of NUM_HEADS {num_heads} and of 4"
            )
        self.fusion, self.dim, self.num_heads, self.ffn_ratio = fusion, dim, num_heads, ffn_ratio
        self.cross_attention, self.feed_forward = cross_attention, feed_forward
        self.convolution, self.position = convolution, position
        self.self_attention = self_attention and cross_attention
        self.residual = residual and cross_attention
        if cross_attention:
            # Raw CLIP grids have a few channels hundreds of times larger than the rest.
            self.image_projection = nn.Sequential(
                nn.LayerNorm(image_channels), nn.Linear(image_channels, dim)
            )
        if self.self_attention:
            self.image_norm = nn.LayerNorm(dim)
            self.image_attention = Attention(dim, num_heads)
        self.strides = {name: shape.stride for name, shape in pyramid_shapes.items()}
        self.levels = nn.ModuleDict(
            {name: _Level(self, shape.channels) for name, shape in pyramid_shapes.items()}
        )

    @classmethod
    def from_config(
        cls, cfg: Any, image_shape: ShapeSpec, pyramid_shapes: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Read ``MODEL.RESOBLEND``; the shapes are those of the two encoders."""
        node = {key.lower(): value for key, value in cfg.MODEL.RESOBLEND.items()}
        return dict(image_channels=image_shape.channels, pyramid_shapes=pyramid_shapes, **node)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Every level keeps its stride and has ``dim`` channels; so has ``image``, where there is
        cross-attention."""
        strides = {**self.strides, **({"image": None} if self.cross_attention else {})}
        return {n: ShapeSpec(channels=self.dim, stride=s) for n, s in strides.items()}

    def forward(self, image_grid: Tensor, pyramid: dict[str, Tensor]) -> dict[str, Tensor]:
        """Blend.

        Args:
            image_grid: ``Z_v``, (B, C_v, g, g).
            pyramid: ``{name: z^s (B, c_s, H/s, W/s)}``.

        Returns:
            ``{name: z^s_w (B, dim, H/s, W/s)}`` with the same keys, and as ``image`` what is
            blended in: ``Z_v`` in ``dim`` channels, (B, dim, g, g). Entity queries read it, for
            what an entity looks like drowns in the colours of the masks where the two are summed.
        """
        if not self.cross_attention:
            # An image encoder that is trained still has to take part in the step, with weight 0:
            # the language decoder reads its penultimate layer, nobody else the last one.
            idle = image_grid.sum() * 0.0 if image_grid.requires_grad else 0.0
            return {
                n: self._mask_only(level, pyramid[n]) + idle for n, level in self.levels.items()
            }
        size = image_grid.shape[-2:]
        tokens = self.image_projection(image_grid.flatten(2).transpose(1, 2))  # B g*g D
        image = _to_map(tokens, size)
        position = self._positions(size[0], size[1], tokens)
        attended = tokens  # Z_v'
        if self.self_attention:
            normed = self.image_norm(tokens)
            located = normed + position
            attended = tokens + self.image_attention(located, located, normed)
        blend = self._ask_image if self.fusion == "mask_query" else self._ask_masks
        located = attended + position
        blended = {
            name: blend(level, pyramid[name], image, attended, located)
            for name, level in self.levels.items()
        }
        return {**blended, "image": image}

    def _mask_only(self, level: nn.Module, mask_features: Tensor) -> Tensor:
        x = level.lateral(mask_features)  # B D h w
        if self.feed_forward:
            tokens = x.flatten(2).transpose(1, 2)
            if self.fusion == "mask_query":
                tokens = tokens + level.ffn(level.ffn_norm(tokens))
            else:
                tokens = level.ffn(tokens)
            x = _to_map(tokens, x.shape[-2:])
        return level.conv(x) if self.convolution else x

    def _ask_masks(
        self, level: nn.Module, features: Tensor, image: Tensor, _: Tensor, located: Tensor
    ) -> Tensor:
        # Eq. 7 and 8: Z_v' is the query, z^s is key and value, the result lives on CLIP's grid.
        x = level.lateral(features)
        tokens = x.flatten(2).transpose(1, 2)  # B h*w D
        keys = tokens + self._positions(x.shape[-2], x.shape[-1], tokens)
        mixed = level.attention(located, keys, tokens)  # B g*g D
        if self.feed_forward:
            mixed = level.ffn(mixed)
        low = _to_map(mixed, image.shape[-2:])
        if self.residual:
            low = low + image
        if self.convolution:
            low = level.conv(low)
        out = _resize(low, x.shape[-2:])
        return out + x if self.fusion == "image_query_mask_residual" else out

    def _ask_image(
        self, level: nn.Module, features: Tensor, image: Tensor, attended: Tensor, located: Tensor
    ) -> Tensor:
        x = level.lateral(features)
        size = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # B h*w D
        queries = level.attention_norm(tokens) + self._positions(size[0], size[1], tokens)
        tokens = tokens + level.attention(queries, located, attended)
        if self.feed_forward:
            tokens = tokens + level.ffn(level.ffn_norm(tokens))
        x = _to_map(tokens, size)
        if self.residual:
            x = x + _resize(image, size)
        return level.conv(x) if self.convolution else x

    def _positions(self, height: int, width: int, like: Tensor) -> Tensor | float:
        return sine_positions(height, width, self.dim, like) if self.position else 0.0


def _to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    return tokens.transpose(1, 2).unflatten(-1, tuple(size))  # B N D -> B D h w


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)

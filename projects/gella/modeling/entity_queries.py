"""Queries from the input entities, instead of learned ones (MODEL.MASK_DECODER.QUERIES: entity).

Content says what lies under an entity's mask, blended and in the image alone, and how its outline
looks; position says where. The decoder's layers keep what makes masks: its embeddings lose most of
an entity's colour, and positions, which attention compares and never passes on, altogether. So the
evidence, content and place, goes past the decoder to the association as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EntityQueries(nn.Module):
    """Queries from the input entities: content, position and evidence, (B, E, D) each."""

    def __init__(
        self, in_channels: int, dim: int, shape_size: int, image_channels: int = 0
    ) -> None:
        """Build the projections; 0 leaves the mask crop, and the image's own grid, out."""
        super().__init__()
        self.dim, self.shape_size = dim, shape_size
        self.content = nn.Linear(in_channels, dim)
        self.embedding = nn.Parameter(torch.randn(dim))
        self.image = nn.Linear(image_channels, dim) if image_channels else None
        self.shape = nn.Linear(shape_size**2, dim) if shape_size else None
        self.position = nn.Sequential(nn.Linear(dim + 5, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.place = nn.Linear(5, dim)

    def forward(
        self, features: Tensor, masks: Tensor, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pool features (B, C, h, w), and the image's grid (B, C', g, g), under masks (B, E, H, W).

        An entity without a pixel has zeros for its pooled features, its geometry and its crop.
        """
        masks = masks.to(torch.float32)
        weights, pooled = _pool(features, masks)
        geometry = mask_geometry(weights)  # B E 5
        content = self.content(pooled) + self.embedding
        if self.image is not None and image is not None:
            content = content + self.image(_pool(image, masks)[1])
        if self.shape is not None:
            content = content + self.shape(crop_masks(masks, geometry, self.shape_size).flatten(2))
        where = torch.cat([_sine(geometry[..., :2], self.dim), geometry], dim=-1)
        # In -2..2: as fractions beside their sines the place was too faint for "the star on the
        # left" to be learned at all (docs/OPTIONS.md).
        return content, self.position(where), content + self.place(4 * geometry - 2)


def _pool(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    # Masks at the features' size (B, E, h, w), and the features' means under them (B, E, C). Area
    # averaging keeps what is thinner than a cell.
    weights = F.adaptive_avg_pool2d(masks, (features.shape[2], features.shape[3]))
    area = weights.sum(dim=(2, 3)).clamp(min=1e-6)  # in cells
    return weights, torch.einsum("behw,bchw->bec", weights, features.float()) / area[..., None]


def mask_geometry(weights: Tensor) -> Tensor:
    """Centroid, spread and size of soft masks.

    Args:
        weights: (B, E, h, w) float in 0..1.

    Returns:
        (B, E, 5): x and y of the centroid, standard deviation along x and y, square root of the
        area, all as fractions of the frame's sides; zeros for an empty mask.
    """
    height, width = weights.shape[-2:]
    area = weights.sum(dim=(2, 3))
    safe = area.clamp(min=1e-6)
    values = []
    for profile, length in ((weights.sum(2), width), (weights.sum(3), height)):
        at = (torch.arange(length, device=weights.device) + 0.5) / length
        mean = (profile * at).sum(-1) / safe
        variance = (profile * (at - mean[..., None]) ** 2).sum(-1) / safe
        values.append((mean, variance.clamp(min=0).sqrt()))
    (x, spread_x), (y, spread_y) = values
    return torch.stack([x, y, spread_x, spread_y, (area / (height * width)).sqrt()], dim=-1)


def crop_masks(masks: Tensor, geometry: Tensor, size: int) -> Tensor:
    """Sample every mask in a window around itself: (B, E, H, W) -> (B, E, size, size) in 0..1.

    The window reaches 2.5 standard deviations from the centroid on each axis (a disk ends at 2),
    so the outline is seen at one scale whatever the entity's size and place.
    """
    batch, count, height, width = masks.shape
    ticks = torch.linspace(-1, 1, size, device=masks.device)
    # At least half a pixel, or the window of a one-pixel mask would be a point.
    least = torch.tensor([0.5 / width, 0.5 / height], device=masks.device)
    reach = 2.5 * torch.maximum(geometry[..., 2:4], least)  # B E 2
    x = geometry[..., 0, None] + reach[..., 0, None] * ticks  # B E size
    y = geometry[..., 1, None] + reach[..., 1, None] * ticks
    shape = (-1, -1, size, size)
    grid = torch.stack([x[..., None, :].expand(shape), y[..., None].expand(shape)], dim=-1)
    grid = 2 * grid.flatten(0, 1) - 1  # B*E size size 2, in -1..1
    flat = masks.reshape(batch * count, 1, height, width)
    crops = F.grid_sample(flat, grid, align_corners=False)
    return crops.view(batch, count, size, size)


def _sine(points: Tensor, dim: int) -> Tensor:
    # (..., 2) x, y in 0..1 -> (..., dim), by the wave lengths of Mask2Former's own keys.
    half = torch.arange(dim // 4, device=points.device, dtype=points.dtype)
    angles = points[..., None] * (2 * math.pi) / 10000 ** (half / (dim // 4))  # ... 2 dim/4
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)

"""Only the shape record that parts of a model exchange."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """Channels, height and width (cells) and stride (input pixels per cell); None: unknown."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None

"""The projection of image features into the word space (eq. 3)."""

from __future__ import annotations

from torch import nn


def build_projector(kind: str, in_dim: int, out_dim: int) -> nn.Module:
    """Build the projection of image features into the word space (eq. 3).

    ``linear`` is the paper's single layer, ``mlp2x_gelu`` LLaVA-1.5's two layers.
    """
    if kind == "linear":
        return nn.Linear(in_dim, out_dim)
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
    raise ValueError(f"MODEL.LANGUAGE.PROJECTOR is {kind!r}; it must be 'mlp2x_gelu' or 'linear'")

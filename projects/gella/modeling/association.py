"""The association module: which entities a noun names (eq. 9)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn


def _branch(structure: str, in_dim: int, dim: int) -> nn.Module:
    if structure == "fc":
        return nn.Linear(in_dim, dim)
    if structure == "fc_relu_fc":
        return nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    raise ValueError(
        f"MODEL.ASSOCIATION.STRUCTURE is {structure!r}; it must be 'fc' or 'fc_relu_fc'"
    )


class Association(nn.Module):
    """``FC(E_vl) . FC(E_vc)^T``: a logit for every pair of noun and entity (eq. 9, Table 10).

    With ``calibrated`` the product is multiplied by a learned scale that starts at 1/sqrt(dim), and
    a learned bias is added: most pairs are negative, and without them the first hundred iterations
    only learn that.
    """

    @configurable
    def __init__(
        self,
        *,
        noun_dim: int,
        entity_dim: int,
        dim: int,
        structure: str,
        calibrated: bool,
        bias_init: float,
    ) -> None:
        """Build the two branches; the arguments are the keys of ``MODEL.ASSOCIATION``."""
        super().__init__()
        self.noun_branch = _branch(structure, noun_dim, dim)
        self.entity_branch = _branch(structure, entity_dim, dim)
        self.scale: Tensor | float = 1.0
        self.bias: Tensor | float = 0.0
        if calibrated:
            self.scale = nn.Parameter(torch.tensor(dim**-0.5))
            self.bias = nn.Parameter(torch.tensor(bias_init))

    @classmethod
    def from_config(cls, cfg: Any, noun_dim: int, entity_dim: int) -> dict[str, Any]:
        """Read ``MODEL.ASSOCIATION``; the dimensions are those of E_vl and E_vc."""
        node = {key.lower(): value for key, value in cfg.MODEL.ASSOCIATION.items()}
        del node["weight"], node["caption_nouns"]  # of the loss
        return dict(noun_dim=noun_dim, entity_dim=entity_dim, **node)

    def forward(self, nouns: list[Tensor], entities: Tensor) -> list[Tensor]:
        """Score nouns against the entities of their own image.

        Args:
            nouns: per image (P_i, noun_dim) <SEG> embeddings, E_vl.
            entities: (B, Q, entity_dim) query embeddings, E_vc.

        Returns:
            per image (P_i, Q) float32 logits; their sigmoid is the probability that the noun names
            the entity.
        """
        sizes = [len(noun) for noun in nouns]
        # One projection over the whole batch; .to() because the language branch may run in bf16.
        joined = torch.cat(nouns).to(entities.dtype)
        projected = self.noun_branch(joined).float().split(sizes)  # (P_i, dim) each
        keys = self.entity_branch(entities).float()  # B Q dim
        # Autocast would round the logits to three digits: entities would tie, and thresholds shift.
        with torch.autocast(keys.device.type, enabled=False):
            return [self.scale * (p @ k.T) + self.bias for p, k in zip(projected, keys)]

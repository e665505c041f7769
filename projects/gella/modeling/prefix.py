"""The start of a prompt that all questions about an image share: its keys and values, kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a causal language model has read of prompts that begin alike.

    Attributes:
        ids: int64 (N,) on the CPU, the tokens, image placeholders (negative) included.
        keys_values: per layer the keys and the values, (1, heads, N, head width) each. They are
            only ever read: passes work on copies.
    """

    ids: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]

    def rest(self, ids: Tensor) -> Tensor:
        """What follows in a prompt (L,) that begins so, (L - N,).

        Raises:
            ValueError: the prompt begins otherwise, ends here, or has another image behind it.
        """
        count = len(self.ids)
        if not torch.equal(ids[:count].cpu(), self.ids):
            raise ValueError(
                f"A prompt of {len(ids)} tokens does not begin with the {count} tokens that were "
                "read of its image: both must come from the same config"
            )
        rest = ids[count:]
        if not len(rest) or bool((rest < 0).any()):
            raise ValueError(
                f"A prompt of {len(ids)} tokens must go on in words behind the {count} tokens that "
                "were read of its image"
            )
        return rest


def read_prefix(model: Any, embeds: Tensor, ids: Tensor) -> list[Prefix] | None:
    """Read the same tokens for several images.

    Args:
        model: a decoder of transformers without its output layer.
        embeds: (B, N, D) embeddings; they differ at the image tokens.
        ids: (N,) int64.

    Returns:
        one prefix per image; None for an architecture that keeps more of what it read than keys and
        values: its prompts are read anew each time.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    kinds = DynamicCache(config=model.config).layers
    if not all(isinstance(kind, DynamicLayer) for kind in kinds):
        return None
    cache = DynamicCache()
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    # A slice would keep the whole batch alive.
    return [
        Prefix(
            ids.cpu(),
            tuple((x.keys[i : i + 1].clone(), x.values[i : i + 1].clone()) for x in cache.layers),
        )
        for i in range(len(embeds))
    ]


def joined_cache(prefixes: Sequence[Prefix]) -> Any:
    """A cache of transformers that holds the prefixes of a batch, all of one length, as copies."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, parts in enumerate(zip(*(prefix.keys_values for prefix in prefixes))):
        keys, values = (torch.cat(tensors) for tensors in zip(*parts))  # B heads N width
        cache.update(keys, values, layer)
    return cache

"""What the means in the losses divide by: one number for the whole step, on every rank.

A loss that is a sum over tokens, masks or pairs divided by their number is averaged by the training
step over ranks and over the micro batches of gradient accumulation. The result is the loss of the
joined batch only if every part divides by the same number: the count averaged over all parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_terms", "mean_over_parts", "planned_counts"]

_PLANNED: ContextVar[Mapping[str, float] | None] = ContextVar("planned_counts", default=None)


def mean_over_parts(name: str, count: float | Tensor, device: torch.device) -> Tensor:
    """The count averaged over all parts of the step; 1 where no part has any.

    Args:
        name: "answer", "masks", "queries" or "pairs", as in :func:`count_terms`.
        count: of this part. Within :func:`planned_counts` the plan is taken instead; otherwise the
            parts are the ranks, and all of them must make the call.
        device: where the losses are.

    Returns:
        a 0-dimensional float32 tensor above 0.
    """
    plan = _PLANNED.get()
    if plan is not None:
        value = torch.tensor(float(plan[name]), device=device)
    else:
        value = torch.as_tensor(count, dtype=torch.float32, device=device).clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(value)
            value = value / torch.distributed.get_world_size()
    # Not clamped to 1: one mask on one of two ranks is an average of a half.
    return torch.where(value > 0, value, torch.ones_like(value))


@contextlib.contextmanager
def planned_counts(counts: Mapping[str, float] | None) -> Iterator[None]:
    """Take the counts of the step from the caller, who knows all of its parts; None: no plan."""
    token = _PLANNED.set(counts)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def count_terms(
    batched_inputs: Sequence[dict[str, Any]], num_queries: int | None, no_object_weight: float
) -> dict[str, float]:
    """What the losses of a batch divide by, told from the data alone, before any forward pass.

    Args:
        batched_inputs: mapped dicts of one task.
        num_queries: of learned queries; None where every entity has its own.
        no_object_weight: of queries without an entity in the entity loss.

    Returns:
        ``answer``: supervised tokens; ``masks``: entities with a pixel; ``queries``: queries by
        their weight in the entity loss; ``pairs``: of a noun with known entities and a query.
        Describing has an answer only.
    """
    counts = dict.fromkeys(("answer", "masks", "queries", "pairs"), 0.0)
    for inputs in batched_inputs:
        # The first token predicts the second label.
        counts["answer"] += float((inputs["labels"][1:] != -100).sum())
        if inputs["task"] == "describe":
            continue
        entities = inputs["entities"]
        ids = torch.as_tensor(entities.ids).flatten()
        visible = int((torch.bincount(ids, minlength=1)[1:] > 0).sum())
        queries = entities.num_entities if num_queries is None else num_queries
        counts["masks"] += visible
        matched = min(visible, queries)
        counts["queries"] += matched + no_object_weight * (queries - matched)
        phrases = inputs["phrases"] if len(inputs["seg_positions"]) else []
        counts["pairs"] += queries * sum(p["entity_indices"] is not None for p in phrases)
    return counts

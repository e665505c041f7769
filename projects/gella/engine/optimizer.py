"""AdamW and its groups: which parameters take which learning rate and weight decay; epochs."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from detectron2.config import get_cfg
from torch import nn

from gella.engine.evaluation_hooks import with_keys

# Parts without public pretrained weights start from nothing and may want a higher rate. Of the mask
# decoder, ours and upstream's, the convolutions that read ResoBlend's channels are among them.
HEADS = """
    resoblend.* association.* mask_decoder.entity_head.* mask_decoder.entity_queries.*
    mask_decoder.pixel_decoder.input_projections.?.0.* mask_decoder.pixel_decoder.adapter_1.0.*
    mask_decoder.head.predictor.class_embed.* mask_decoder.head.pixel_decoder.input_proj.?.0.*
    mask_decoder.head.pixel_decoder.adapter_1.weight
""".split()
LANGUAGE_PREFIX = "language_decoder."


def role_of(name: str) -> str:
    """Whose learning rate a parameter of the model takes: "language", "heads" or "vision".

    Language is everything below ``language_decoder``, its image projector included. Heads are the
    parts that no public weights exist for: ResoBlend, association, the entity classifier, entity
    queries and the mask decoder's convolutions on ResoBlend's channels. Vision is the rest:
    colormap encoder, image encoder, mask decoder.
    """
    if name.startswith(LANGUAGE_PREFIX):
        return "language"
    return "heads" if any(fnmatchcase(name, pattern) for pattern in HEADS) else "vision"


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with up to six groups: heads, language or vision, with or without weight decay.

    Args:
        cfg: ``SOLVER``: ``BASE_LR``, ``BETAS``, ``WEIGHT_DECAY``,
            ``HEADS_MULTIPLIER``, ``LANGUAGE_MULTIPLIER``, ``VISION_MULTIPLIER``.
        model: :func:`role_of` tells the role of its parameters, which every group carries as
            ``role``, beside a ``name`` of its own; frozen ones are left out; norms, biases and
            embeddings do not decay.

    Raises:
        ValueError: a model without a trainable parameter.
    """
    solver = cfg.SOLVER
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # each once
        if parameter.requires_grad:
            parent, _, leaf = name.rpartition(".")
            # Norms, biases and scales have one dimension or none.
            embedding = isinstance(modules[parent], nn.Embedding) or "embed" in leaf
            decays = parameter.ndim > 1 and not embedding
            members.setdefault((role_of(name), decays), []).append(parameter)
    if not members:
        raise ValueError("every parameter of the model is frozen: there is nothing to train")
    groups = [
        {
            "params": parameters,
            "name": role if decays else f"{role}_no_decay",
            "role": role,
            "lr": solver.BASE_LR * solver[f"{role.upper()}_MULTIPLIER"],
            "weight_decay": solver.WEIGHT_DECAY if decays else 0.0,
        }
        for (role, decays), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    # One fused update instead of a dozen small ones per tensor: it matters for tiny models.
    return torch.optim.AdamW(groups, lr=solver.BASE_LR, betas=tuple(solver.BETAS), fused=True)


def split_language(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, list[int]]:
    """Move the parameters of the language side into an optimiser of their own.

    Their groups stay in ``optimizer`` without parameters, so that one schedule still drives the
    rates of all groups.

    Returns:
        the new optimiser, and for each of its groups the number of the group in ``optimizer`` that
        it came from (not the group itself, which loading a state replaces).

    Raises:
        ValueError: there are none.
    """
    numbered = list(enumerate(optimizer.param_groups))
    sources = [i for i, g in numbered if g.get("role") == "language" and g["params"]]
    if not sources:
        raise ValueError("no trainable parameter belongs to the language side")
    groups = [{**optimizer.param_groups[i]} for i in sources]
    for i in sources:
        optimizer.param_groups[i]["params"] = []
    kept = ("lr", "betas", "eps", "weight_decay", "fused")
    return torch.optim.AdamW(groups, **{key: optimizer.defaults[key] for key in kept}), sources


def with_epochs(cfg: Any, num_records: int) -> Any:
    """The config with ``SOLVER.MAX_ITER`` and ``SOLVER.STEPS`` computed from epochs, if it has any.

    An epoch is ``SOLVER.EPOCH_SIZE`` images, or one image per training record where that is 0,
    whichever tasks they are drawn for. Iterations are optimiser steps of ``SOLVER.IMS_PER_BATCH``
    images; the iteration in which an epoch ends is its last one.

    Raises:
        ValueError: ``SOLVER.STEP_EPOCHS`` that do not rise within 0 to ``SOLVER.EPOCHS``; a
            ``MAX_ITER`` or ``STEPS`` that was set beside the epochs and is not what they make.
    """
    solver = cfg.SOLVER
    if solver.EPOCHS <= 0:
        return cfg
    steps = [float(epoch) for epoch in solver.STEP_EPOCHS]
    if steps != sorted(set(steps)) or not all(0 < epoch < solver.EPOCHS for epoch in steps):
        raise ValueError(
            f"SOLVER.STEP_EPOCHS is {tuple(solver.STEP_EPOCHS)}: give rising epochs between 0 and"
            f" SOLVER.EPOCHS, which is {solver.EPOCHS}"
        )
    size = solver.EPOCH_SIZE or num_records

    def iteration(epoch: float) -> int:
        return math.ceil(epoch * size / solver.IMS_PER_BATCH)

    computed = {"MAX_ITER": iteration(solver.EPOCHS), "STEPS": tuple(map(iteration, steps))}
    unset = get_cfg().SOLVER
    for key, value in computed.items():
        given = solver[key] if key == "MAX_ITER" else tuple(solver[key])
        if given not in (value, unset[key]):
            raise ValueError(
                f"SOLVER.EPOCHS {solver.EPOCHS:g} makes SOLVER.{key} {value}, but it is set to"
                f" {given}: leave it out, or set SOLVER.EPOCHS 0 to count iterations"
            )
    return with_keys(cfg, {f"SOLVER.{key}": value for key, value in computed.items()})

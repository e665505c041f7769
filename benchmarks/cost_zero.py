"""Memory per GPU of parameters, gradients and optimizer under DeepSpeed's ZeRO stages.

The arithmetic of the ZeRO paper (arXiv 1910.02054, section 3.1 and figure 1) for Adam on N GPUs.
Bytes per parameter of the language branch:

    bf16   2 weights, 2 gradients, 12 optimizer (float32 weights and two moments)
    fp32   4 weights, 4 gradients,  8 optimizer (two moments)

Stage 1 divides the optimizer by N, stage 2 the gradients too, stage 3 the weights too, and then
holds one layer's whole weights while it runs (the largest one is counted). Frozen parameters have
weights only. Optimizer offload (stages 2 and 3) moves optimizer and gradients to the host, as
ZeRO-Offload does, where they take 12 + 4 bytes; parameter offload (stage 3) the weights too.

The rest of the model is float32 under DistributedDataParallel, whole on every GPU: 4 weights, 4
gradients, 8 moments, and 4 for the buckets in which gradients travel when there are several GPUs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GIB = 2**30
CARDS = (24, 40, 48, 80)  # GiB
# The rest is CUDA's own, fragments, and buffers of communication.
USABLE = 0.9
BYTES = {"bf16": (2, 2, 12), "fp32": (4, 4, 8)}  # weights, gradients, optimizer
HOST_BYTES = 16  # float32 weights, two moments, gradient
PLANS: tuple[tuple[int, frozenset[str]], ...] = (
    (0, frozenset()),
    (1, frozenset()),
    (2, frozenset()),
    (2, frozenset({"optimizer"})),
    (3, frozenset()),
    (3, frozenset({"optimizer"})),
    (3, frozenset({"optimizer", "parameters"})),
)


@dataclass(frozen=True)
class Branch:
    """Sizes of a part of the model: all parameters, the trained ones, the largest layer's."""

    parameters: int
    trained: int
    largest: int = 0


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, and on the host for all its GPUs together."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0
    host: int = 0

    @property
    def gpu(self) -> int:
        """All that lies on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.gathered


def zero_states(
    branch: Branch,
    gpus: int,
    stage: int,
    precision: str = "bf16",
    offload: frozenset[str] = frozenset(),
) -> States:
    """Memory of a branch under a ZeRO stage.

    Args:
        branch: its sizes.
        gpus: N, at least 1.
        stage: 0 to 3.
        precision: ``bf16`` or ``fp32``.
        offload: of ``optimizer`` (stages 2 and 3) and ``parameters`` (stage 3, with ``optimizer``).

    Raises:
        ValueError: another stage, precision or offload, or no GPU.
    """
    if gpus < 1 or stage not in (0, 1, 2, 3) or precision not in BYTES:
        raise ValueError(f"no ZeRO stage {stage} in {precision!r} on {gpus} GPUs")
    allowed = {2: {"optimizer"}, 3: {"optimizer", "parameters"}}.get(stage, set())
    if offload - allowed or offload == {"parameters"}:
        raise ValueError(f"ZeRO stage {stage} offloads no {sorted(offload)} alone")
    weight, gradient, optimizer = BYTES[precision]
    shared = [-(-branch.trained // (gpus if stage >= first else 1)) for first in (1, 2)]
    weights = weight * -(-branch.parameters // (gpus if stage == 3 else 1))
    states = {
        "weights": weights,
        "gradients": gradient * shared[1],
        "optimizer": optimizer * shared[0],
        "gathered": weight * branch.largest if stage == 3 else 0,
        "host": 0,
    }
    if "optimizer" in offload:
        states.update(gradients=0, optimizer=0, host=HOST_BYTES * branch.trained)
    if "parameters" in offload:
        states.update(weights=0, host=states["host"] + weight * branch.parameters)
    return States(**states)


def replicated_states(branch: Branch, gpus: int) -> States:
    """Memory of a float32 branch that every GPU holds whole."""
    buckets = 4 * branch.trained if gpus > 1 else 0
    return States(4 * branch.parameters, 4 * branch.trained + buckets, 8 * branch.trained)


def plan_rows(
    language: Branch, rest: Branch, gpus: int, precision: str, activations: dict[str, int]
) -> list[dict[str, Any]]:
    """A row per ZeRO plan.

    Args:
        language, rest: the two sides of the model.
        gpus: N.
        precision: of the language branch.
        activations: bytes saved for backward on one GPU: ``plain`` and ``checkpointed``.

    Returns:
        dicts of ``stage``, ``offload``, the bytes of :class:`States`, ``rest``, and for both kinds
        of activations ``total`` and ``card``, the smallest of ``CARDS`` whose usable share holds
        the total, 0 for none.
    """
    others = replicated_states(rest, gpus).gpu
    rows = []
    for stage, offload in PLANS:
        states = zero_states(language, gpus, stage, precision, offload)
        totals = {kind: states.gpu + others + size for kind, size in activations.items()}
        rows.append(
            {
                "stage": stage,
                "offload": sorted(offload),
                **asdict(states),
                "rest": others,
                "total": totals,
                "card": {kind: smallest_card(total) for kind, total in totals.items()},
            }
        )
    return rows


def smallest_card(total: int) -> int:
    """GiB of the smallest of ``CARDS`` that holds ``total`` bytes in its usable share, or 0."""
    return next((card for card in CARDS if total <= USABLE * card * GIB), 0)

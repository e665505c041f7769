"""The losses of the segmentation and association branches (eq. 6, 9 and their part of eq. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from torch import Tensor, nn
from torch.nn import functional as F

Match = tuple[Tensor, Tensor]  # query indices and entity indices, int64, the same length


class LossCounts(NamedTuple):
    """What the losses of a step divide by: one number each for all its parts, on every rank.

    The training step averages losses over ranks and over the micro batches of gradient
    accumulation. The result is the loss of the joined batch only if every part divides by the same
    number: the count of :func:`count_terms` averaged over all parts.

    Attributes:
        answer: supervised tokens.
        masks: entities with a pixel.
        queries: queries by their weight in the entity loss.
        pairs: of a noun with known entities and a query.
    """

    answer: float
    masks: float
    queries: float
    pairs: float


def count_terms(
    batched_inputs: Sequence[dict[str, Any]], num_queries: int | None, no_object_weight: float
) -> LossCounts:
    """Count what the losses of a batch divide by, from the data alone, before any forward pass.

    Args:
        batched_inputs: mapped dicts of one task; describing has an answer only.
        num_queries: of learned queries; None where every entity has its own.
        no_object_weight: of queries without an entity in the entity loss.
    """
    tokens = masks = pairs = 0
    weight = 0.0
    for inputs in batched_inputs:
        tokens += int((inputs["labels"][1:] != -100).sum())  # the first predicts the second label
        if inputs["task"] == "describe":
            continue
        entities = inputs["entities"]
        queries = entities.num_entities if num_queries is None else num_queries
        visible = int((entities.areas() > 0).sum())
        matched = min(visible, queries)
        masks += visible
        weight += matched + no_object_weight * (queries - matched)
        phrases = inputs["phrases"] if len(inputs["seg_positions"]) else []
        pairs += queries * sum(p["entity_indices"] is not None for p in phrases)
    return LossCounts(float(tokens), float(masks), weight, float(pairs))


class GellaCriterion(nn.Module):
    """Weighted losses ``loss_entity``, ``loss_mask``, ``loss_dice`` and ``loss_association``.

    Entity, mask and dice losses are Mask2Former's (transformers' ``Mask2FormerLoss``: sampled
    points, no-object weight), on the decoder's final output and, with deep supervision, on that of
    every layer before it (``_0``, ``_1``, ...). ``learned`` queries meet entities by Hungarian
    matching, layer by layer; ``entity`` queries by their number.

    All means are over the step as a whole, by the :class:`LossCounts` that the caller gives: an
    image with many entities weighs more, as in Mask2Former.
    """

    @configurable
    def __init__(
        self,
        *,
        queries: str,
        weights: dict[str, float],
        no_object_weight: float = 0.1,
        deep_supervision: bool = True,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ) -> None:
        """Build transformers' loss; arguments but the first two are ``MODEL.MASK_DECODER``'s keys.

        ``weights`` are by a loss's name without a layer's number; a loss that is not named there is
        an error when it is computed.
        """
        super().__init__()
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

        config = Mask2FormerConfig(
            num_labels=1,
            no_object_weight=no_object_weight,
            class_weight=weights.get("loss_entity", 0.0),
            mask_weight=weights.get("loss_mask", 0.0),
            dice_weight=weights.get("loss_dice", 0.0),
            train_num_points=num_points,
            oversample_ratio=oversample_ratio,
            importance_sample_ratio=importance_sample_ratio,
        )
        self.queries, self.weights, self.deep_supervision = queries, dict(weights), deep_supervision
        self.terms = Mask2FormerLoss(config, weight_dict={})

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Read ``MODEL.MASK_DECODER`` and ``MODEL.ASSOCIATION.WEIGHT``."""
        node = cfg.MODEL.MASK_DECODER
        return dict(
            queries=node.QUERIES,
            weights={
                "loss_entity": float(node.ENTITY_WEIGHT),
                "loss_mask": float(node.MASK_WEIGHT),
                "loss_dice": float(node.DICE_WEIGHT),
                "loss_association": float(cfg.MODEL.ASSOCIATION.WEIGHT),
            },
            no_object_weight=node.NO_OBJECT_WEIGHT,
            deep_supervision=node.DEEP_SUPERVISION,
            num_points=node.TRAIN_NUM_POINTS,
            oversample_ratio=float(node.OVERSAMPLE_RATIO),
            importance_sample_ratio=float(node.IMPORTANCE_SAMPLE_RATIO),
        )

    def forward(
        self,
        decoder_output: Any,
        target_masks: list[Tensor],
        counts: LossCounts,
        association_logits: list[Tensor] | None = None,
        association_targets: Sequence[Tensor] = (),
        association_valid: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute every loss, weighted, in float32 whatever autocast says.

        Args:
            decoder_output: a ``MaskDecoderOutput``.
            target_masks: per image bool (E_i, H, W) in the colormap's frame, the input entities.
            counts: what to divide by.
            association_logits: per image (P_i, Q); None leaves ``loss_association`` out.
            association_targets: per image (P_i, E_i) in 0..1, 1 where noun p names entity e.
            association_valid: per image bool (P_i,), False where a noun's entities are unknown;
                all known without it.

        Returns:
            ``{name: scalar}``. A loss to which nothing contributes is 0 and keeps its graph.

        Raises:
            ValueError: numbers of images, nouns or entities that disagree.
            KeyError: a loss without a weight.
        """
        # 1 where nothing is counted; not clamped, for one mask on one of two ranks is a half.
        divisors = LossCounts(*(count or 1.0 for count in counts))
        with torch.autocast(decoder_output.query_valid.device.type, enabled=False):
            targets = [mask.bool() for mask in target_masks]
            matches = self.match(decoder_output, targets)
            losses = self._segmentation(decoder_output, targets, matches, divisors)
            if association_logits is not None:
                losses["loss_association"] = self._association(
                    decoder_output.query_valid,
                    matches,
                    association_logits,
                    association_targets,
                    association_valid,
                    divisors.pairs,
                )
        return self.weigh(losses)

    def loss_names(self, num_outputs: int) -> list[str]:
        """Names of all losses for a decoder with that many outputs, the last one included."""
        layers = [f"_{i}" for i in range(num_outputs - 1)] if self.deep_supervision else []
        parts = ("loss_entity", "loss_mask", "loss_dice")
        return [part + layer for layer in [*layers, ""] for part in parts] + ["loss_association"]

    def weigh(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multiply each loss by its weight; KeyError for a loss that has none."""
        weighted = {}
        for name, loss in losses.items():
            base = name.rstrip("0123456789").rstrip("_")
            if base not in self.weights:
                raise KeyError(
                    f"the loss {name} has no weight; weights exist for {sorted(self.weights)}"
                )
            weighted[name] = loss * self.weights[base]
        return weighted

    def match(
        self, decoder_output: Any, target_masks: list[Tensor], layer: int = -1
    ) -> list[Match]:
        """Pair queries with entities by one layer's output: per image the indices of both.

        ``entity`` queries: every entity with its own query. ``learned``: the cheapest pairing of
        entities that have a pixel; with more entities than queries, the surplus stays unpaired.
        """
        valid = decoder_output.query_valid
        if len(target_masks) != len(valid):
            raise ValueError(
                f"{len(target_masks)} target mask stacks for a batch of {len(valid)} images"
            )
        matches = []
        for i, masks in enumerate(target_masks):
            entities = torch.arange(len(masks), device=valid.device)
            if self.queries == "entity":
                own = valid[i].nonzero().flatten()
                if len(own) != len(masks):
                    raise ValueError(
                        f"image {i} has {len(masks)} target masks but {len(own)} entity queries; "
                        "the decoder and the criterion must get the same entities"
                    )
                matches.append((own, entities))
                continue
            entities = entities[masks.flatten(1).any(dim=1)]
            matches.append(self._hungarian(decoder_output, layer, i, masks, entities))
        return matches

    def _hungarian(
        self, output: Any, layer: int, image: int, masks: Tensor, entities: Tensor
    ) -> Match:
        if len(entities) == 0:
            return entities, entities
        ((query, entity),) = self.terms.matcher(
            output.mask_logits[layer][image : image + 1].float(),
            output.entity_logits[layer][image : image + 1].float(),
            [masks[entities].float()],
            [torch.zeros_like(entities)],
        )
        return query.to(entities.device), entities[entity.to(entities.device)]

    def _segmentation(
        self, output: Any, targets: list[Tensor], matches: list[Match], divisors: LossCounts
    ) -> dict[str, Tensor]:
        last = len(output.mask_logits) - 1
        # What has no pixel cannot be reconstructed: no mask loss, and it counts as no object.
        visible = [mask.flatten(1).any(dim=1) for mask in targets]
        losses: dict[str, Tensor] = {}
        wanted = None
        for layer in range(last + 1) if self.deep_supervision else [last]:
            pairs = matches
            if self.queries == "learned" and layer != last:
                pairs = self.match(output, targets, layer)
            pairs = [(q[v[e]], e[v[e]]) for (q, e), v in zip(pairs, visible)]
            if wanted is None or self.queries == "learned":
                wanted = torch.cat([t[e] for t, (_, e) in zip(targets, pairs)]).float()  # M H W
            suffix = "" if layer == last else f"_{layer}"
            terms = self._layer(output, layer, wanted, pairs, divisors)
            losses.update({name + suffix: loss for name, loss in terms.items()})
        return losses

    def _layer(
        self, output: Any, layer: int, wanted: Tensor, pairs: list[Match], divisors: LossCounts
    ) -> dict[str, Tensor]:
        mask_logits, entity_logits = output.mask_logits[layer], output.entity_logits[layer]
        valid = output.query_valid
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
        query = torch.cat([q for q, _ in pairs])
        if len(query):
            chosen = mask_logits[image, query].float()  # M h w
            terms = self._mask_terms(chosen, wanted, divisors.masks)
        else:
            terms = {"loss_mask": mask_logits.sum() * 0.0, "loss_dice": mask_logits.sum() * 0.0}
        # Mask2FormerLoss.loss_labels with another divisor than this rank's own sum of weights.
        wanted_class = torch.ones_like(valid, dtype=torch.int64)  # 0 entity, 1 no object
        wanted_class[image, query] = 0
        total = F.cross_entropy(
            entity_logits[valid].float(),
            wanted_class[valid],
            weight=self.terms.empty_weight,
            reduction="sum",
        )
        return {**terms, "loss_entity": total / divisors.queries}

    def _mask_terms(self, chosen: Tensor, wanted: Tensor, num_masks: float) -> dict[str, Tensor]:
        """``Mask2FormerLoss.loss_masks`` on pairs that are already side by side.

        That method pads, copies and indexes all full-size targets once per layer, a fifth of the
        time of a small model's step. Logits are (M, h, w), targets (M, H, W), both float32.
        """
        from transformers.models.mask2former import modeling_mask2former as mask2former

        loss = self.terms
        logits, targets = chosen[:, None], wanted[:, None]
        with torch.no_grad():
            points = loss.sample_points_using_uncertainty(
                logits,
                loss.calculate_uncertainty,
                loss.num_points,
                loss.oversample_ratio,
                loss.importance_sample_ratio,
            )  # M K 2, x and y in 0..1: the two sizes need not agree
            labels = mask2former.sample_point(targets, points, align_corners=False).squeeze(1)
        scores = mask2former.sample_point(logits, points, align_corners=False).squeeze(1)  # M K
        return {
            "loss_mask": mask2former.sigmoid_cross_entropy_loss(scores, labels, num_masks),
            "loss_dice": mask2former.dice_loss(scores, labels, num_masks),
        }

    def _association(
        self,
        query_valid: Tensor,
        matches: list[Match],
        logits: list[Tensor],
        targets: Sequence[Tensor],
        known: Sequence[Tensor] | None,
        divisor: float,
    ) -> Tensor:
        # Eq. 9: the mean over all pairs of a noun whose entities are known and a valid query.
        if len(logits) != len(matches) or len(targets) != len(matches):
            raise ValueError(
                f"association: {len(logits)} logits and {len(targets)} targets for "
                f"{len(matches)} images"
            )
        total: Any = sum(x.float().sum() for x in logits) * 0.0
        for i, ((query, entity), scores, target) in enumerate(zip(matches, logits, targets)):
            if len(scores) != len(target):
                raise ValueError(
                    f"association: image {i} has {len(scores)} <SEG> embeddings for {len(target)} "
                    "nouns; the answer and the phrases must agree"
                )
            wanted = torch.zeros_like(scores, dtype=torch.float32)  # G^A, P Q
            wanted[:, query] = target[:, entity].to(wanted)
            rows = torch.ones_like(scores[:, 0], dtype=torch.bool) if known is None else known[i]
            scores, wanted = scores[rows][:, query_valid[i]], wanted[rows][:, query_valid[i]]
            total = total + F.binary_cross_entropy_with_logits(
                scores.float(), wanted, reduction="sum"
            )
        return total / divisor

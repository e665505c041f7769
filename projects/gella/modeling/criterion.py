"""The losses of the segmentation and association branches (eq. 6, 9 and their part of eq. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn
from torch.nn import functional as F

Match = tuple[Tensor, Tensor]  # query indices and entity indices, int64, the same length


class GellaCriterion(nn.Module):
    """Weighted losses ``loss_entity``, ``loss_mask``, ``loss_dice`` and ``loss_association``.

    Entity, mask and dice losses are Mask2Former's (transformers' ``Mask2FormerLoss``: sampled
    points, no-object weight), on the decoder's final output and, with deep supervision, on that of
    every layer before it (``_0``, ``_1``, ...). ``learned`` queries meet entities by Hungarian
    matching, layer by layer; ``entity`` queries by their number.

    Each loss is the mean over images of the mean over an image's own entities, queries or pairs (of
    pairs times a share of the caller's): a narrative of 5 nouns weighs as much as a list of 133
    categories. An image that a loss finds nothing in counts with 0, so that the loss of a batch is
    the mean over its parts of equal size, on one process or many.
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
        association_logits: list[Tensor] | None = None,
        association_targets: Sequence[Tensor] = (),
        association_valid: Sequence[Tensor] | None = None,
        association_shares: Sequence[Tensor | float] | None = None,
    ) -> dict[str, Tensor]:
        """Compute every loss, weighted, in float32 whatever autocast says.

        Args:
            decoder_output: a ``MaskDecoderOutput``.
            target_masks: per image bool (E_i, H, W) in the colormap's frame, the input entities.
            association_logits: per image (P_i, Q); None leaves ``loss_association`` out.
            association_targets: per image (P_i, E_i) in 0..1, 1 where noun p names entity e.
            association_valid: per image bool (P_i,), False where a noun's entities are unknown;
                all known without it.
            association_shares: what each image counts in ``loss_association``; all 1 without it.

        Returns:
            ``{name: scalar}``. A loss to which nothing contributes is 0 and keeps its graph.

        Raises:
            ValueError: numbers of images, nouns or entities that disagree.
            KeyError: a loss without a weight.
        """
        with torch.autocast(decoder_output.query_valid.device.type, enabled=False):
            targets = [mask.bool() for mask in target_masks]
            matches = self.match(decoder_output, targets)
            losses = self._segmentation(decoder_output, targets, matches)
            if association_logits is not None:
                losses["loss_association"] = self._association(
                    decoder_output.query_valid,
                    matches,
                    association_logits,
                    association_targets,
                    association_valid,
                    association_shares or [1.0] * len(association_logits),
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
        self, output: Any, targets: list[Tensor], matches: list[Match]
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
            terms = self._layer(output, layer, wanted, pairs)
            losses.update({name + suffix: loss for name, loss in terms.items()})
        return losses

    def _layer(
        self, output: Any, layer: int, wanted: Tensor, pairs: list[Match]
    ) -> dict[str, Tensor]:
        mask_logits, entity_logits = output.mask_logits[layer], output.entity_logits[layer]
        valid = output.query_valid
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
        query = torch.cat([q for q, _ in pairs])
        if len(query):
            chosen = mask_logits[image, query].float()  # M h w
            counts = torch.tensor([len(q) for q, _ in pairs], device=image.device)
            terms = self._mask_terms(chosen, wanted, 1.0 / (len(pairs) * counts[image]))
        else:
            terms = {"loss_mask": mask_logits.sum() * 0.0, "loss_dice": mask_logits.sum() * 0.0}
        # Mask2FormerLoss.loss_labels, image by image.
        wanted_class = torch.where(valid, 1, -100)  # 0 entity, 1 no object, ignored padding
        wanted_class[image, query] = 0
        weight = self.terms.empty_weight
        losses = F.cross_entropy(
            entity_logits.float().transpose(1, 2), wanted_class, weight=weight, reduction="none"
        )  # B Q
        weights = (weight[wanted_class.clamp(min=0)] * valid).sum(1)
        return {**terms, "loss_entity": (losses.sum(1) / weights.clamp(min=1e-6)).mean()}

    def _mask_terms(self, chosen: Tensor, wanted: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """``Mask2FormerLoss.loss_masks`` on pairs that are already side by side.

        That method pads, copies and indexes all full-size targets once per layer, a fifth of the
        time of a small model's step, and weighs all masks alike. Logits are (M, h, w), targets
        (M, H, W), the masks' shares of the loss (M,), all float32.
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
        bce = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(1)
        drawn = scores.sigmoid()
        sizes = drawn.sum(1) + labels.sum(1)
        dice = 1 - (2 * (drawn * labels).sum(1) + 1) / (sizes + 1)
        return {"loss_mask": (bce * shares).sum(), "loss_dice": (dice * shares).sum()}

    def _association(
        self,
        query_valid: Tensor,
        matches: list[Match],
        logits: list[Tensor],
        targets: Sequence[Tensor],
        known: Sequence[Tensor] | None,
        shares: Sequence[Tensor | float],
    ) -> Tensor:
        # Eq. 9: the mean over an image's pairs of a noun of known entities and a valid query.
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
            if scores.numel():
                own = F.binary_cross_entropy_with_logits(scores.float(), wanted)
                total = total + shares[i] * own
        return total / len(logits)

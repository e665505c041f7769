"""From mask logits and association scores to masks, groundings and panoptic segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """K bool masks (H, W), each made when it is asked for: at full size they fill gigabytes.

    Attributes:
        make: gives the mask of an index 0..K-1.
        shape: (K, H, W).
    """

    make: Callable[[int], Tensor]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.make(index)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.make, range(len(self)))


@dataclass
class Candidates:
    """The entities that the nouns of one image may take.

    Attributes:
        masks: K bool masks (H, W) in the original image's frame, or a tensor of them.
        entity_ids: K ids, as the input names its entities. Without snapping, learned queries have
            no entity and are numbered from 1; with it, an id below 0 is a query that met none.
        scores: (P, K) association probabilities.
    """

    masks: Masks | Tensor
    entity_ids: list[int]
    scores: Tensor


def masks_in_original_frame(
    mask_logits: Tensor,
    colormap_size: tuple[int, int],
    valid_size: tuple[int, int],
    height: int,
    width: int,
) -> Masks:
    """Turn stride-4 mask logits of the padded colormap into masks of the original image.

    Args:
        mask_logits: (K, h, w) float logits over the padded square.
        colormap_size: (H, W) of the padded colormap, in pixels.
        valid_size: (h', w') of its top-left part that is not padding.
        height, width: of the original image, in pixels.

    Returns:
        K masks (height, width).
    """

    def mask_of(index: int) -> Tensor:
        logits = mask_logits[index][None, None].float()
        resized = F.interpolate(logits, size=colormap_size, mode="bilinear", align_corners=False)
        valid = resized[..., : valid_size[0], : valid_size[1]]
        size = (height, width)
        return F.interpolate(valid, size=size, mode="bilinear", align_corners=False)[0, 0] > 0

    return Masks(mask_of, (len(mask_logits), height, width))


def snap_to_entities(masks: Masks | Tensor, entities: Any, iou_threshold: float) -> Tensor:
    """Find the input entity that each predicted mask reproduces.

    Args:
        masks: K bool predictions (H, W).
        entities: the input's ``EntityMap``, of the same frame.
        iou_threshold: the least IoU of a match.

    Returns:
        (K,) int64 index of the entity with the highest IoU, -1 where none reaches the threshold.
    """
    met, areas = torch.full((len(masks),), -1), torch.from_numpy(entities.areas())
    for k, mask in enumerate(masks if entities.num_entities else ()):
        inter = torch.from_numpy(entities.overlaps(mask.cpu().numpy()))  # E
        union = mask.sum().cpu() + areas - inter
        best, index = (inter / union.clamp(min=1)).max(dim=0)
        met[k] = torch.where(best >= iou_threshold, index, -1)
    return met


def gather_candidates(
    logits: Tensor,
    masks: Masks | Tensor,
    segment_ids: list[int],
    *,
    queries: str,
    entity_masks: Masks | Tensor | None = None,
    snapped: Tensor | None = None,
) -> Candidates:
    """Decide which masks the nouns choose from: predicted ones, or the input's own.

    Args:
        logits: (P, k, K) association logits of the K kept queries for k draws of colours, whose
            probabilities are averaged; of learned queries there is one.
        masks: K bool predicted masks (H, W).
        segment_ids: E ids of the input entities.
        queries: ``entity`` or ``learned`` (``MODEL.MASK_DECODER.QUERIES``).
        entity_masks: E bool masks (H, W) of the input, for ``MODEL.GELLA.SNAP``; None: predicted
            masks only. With entity queries K = E, in the same order.
        snapped: of learned queries, see :func:`snap_to_entities`.
    """
    if queries == "entity":
        # Query i belongs to entity i, even where the decoder reproduced its mask badly.
        chosen = masks if entity_masks is None else entity_masks
        return Candidates(chosen, list(segment_ids), logits.sigmoid().mean(dim=1))
    logits = logits[:, 0]
    if entity_masks is None or snapped is None:
        return Candidates(masks, list(range(1, len(masks) + 1)), logits.sigmoid())
    # Queries of one entity become one, with the highest logit per noun; -(k + 1) stands for query
    # k, which met no entity.
    numbers = torch.arange(len(snapped), device=snapped.device)
    sources, inverse = torch.where(snapped >= 0, snapped, -(numbers + 1)).unique(
        return_inverse=True
    )
    merged = logits.new_full((logits.shape[0], len(sources)), -torch.inf)
    merged.scatter_reduce_(1, inverse.expand_as(logits), logits, reduce="amax")
    places = sources.tolist()

    def mask_of(index: int) -> Tensor:
        return entity_masks[places[index]] if places[index] >= 0 else masks[-places[index] - 1]

    ids = [segment_ids[s] if s >= 0 else s for s in places]
    shape = (len(places), *masks.shape[1:])
    return Candidates(Masks(mask_of, shape), ids, merged.sigmoid())


def ground_phrases(
    phrases: list[dict[str, Any]],
    candidates: Candidates,
    threshold: float,
    *,
    best_only: Sequence[bool] = (),
    none_threshold: float = 0.0,
    exclusive: bool = False,
) -> list[dict[str, Any]]:
    """Give every phrase the entities it names and the union of their masks.

    A phrase takes all entities above the threshold, and always the best one. All phrases are
    decided together, so that with ``exclusive`` no entity belongs to two of them.

    Args:
        phrases: P dicts with ``text``, ``start`` and ``end``.
        candidates: of the same image.
        threshold: association probability above which an entity is taken.
        best_only: per phrase whether it takes its best entity only; (): no phrase does.
        none_threshold: a phrase whose best entity scores lower takes none.
        exclusive: an entity belongs to one phrase alone, see :func:`owners`; the others choose
            among theirs, and may be left with none.

    Returns:
        per phrase ``phrase``, ``start``, ``end``, ``entity_ids`` and ``scores`` (best first),
        ``mask``, bool ndarray (H, W), and ``probabilities``, of every candidate by its id.
    """
    grounding = []
    owner = owners(candidates.scores, threshold) if exclusive else None
    for number, (phrase, every) in enumerate(zip(phrases, candidates.scores)):
        scores = every if owner is None else every.where(owner == number, 0.0)
        order = scores.argsort(descending=True, stable=True).tolist()
        chosen = [k for k in order if scores[k] > threshold] or order[:1]
        if best_only and best_only[number]:
            chosen = order[:1]
        if order and scores[order[0]] < none_threshold:
            chosen = []
        if owner is not None:
            chosen = [k for k in chosen if owner[k] == number]
        grounding.append(
            {
                "phrase": phrase["text"],
                "start": phrase["start"],
                "end": phrase["end"],
                "entity_ids": [candidates.entity_ids[k] for k in chosen],
                "scores": [float(scores[k]) for k in chosen],
                "mask": _union(candidates.masks, chosen),
                "probabilities": dict(zip(candidates.entity_ids, every.tolist())),
            }
        )
    return grounding


def owners(scores: Tensor, threshold: float) -> Tensor:
    """The one phrase that each entity belongs to.

    It is the phrase with the highest score, but first each phrase that has an entity above the
    threshold gets one of its own, so that their sum is the largest: of "two stars" and "the red
    star" the second is not left without the only entity that it can name.

    Args:
        scores: (P, K) association probabilities.
        threshold: 0..1.

    Returns:
        (K,) int64 indices of phrases.
    """
    if not scores.numel():
        return torch.zeros(scores.shape[1], dtype=torch.int64)
    from scipy.optimize import linear_sum_assignment

    owner = scores.argmax(dim=0)
    sure = (scores > threshold).any(dim=1).nonzero().flatten()
    phrase, entity = linear_sum_assignment(scores[sure].cpu().numpy(), maximize=True)
    owner[torch.from_numpy(entity)] = sure[torch.from_numpy(phrase)]
    return owner


def _union(masks: Masks | Tensor, chosen: Sequence[int]) -> np.ndarray:
    united = np.zeros(tuple(masks.shape[1:]), dtype=bool)
    for index in chosen:
        united |= masks[index].cpu().numpy()
    return united


def panoptic_from_scores(
    scores: Tensor,
    masks: Masks | Tensor,
    categories: list[dict[str, Any]],
    threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give every entity its best category and paint a panoptic segmentation.

    Entities of one stuff category become one segment; where masks overlap, the higher score is on
    top. Section 4.3 of the paper: absent categories score low and so take no entity.

    Args:
        scores: (C, K) probability that category c names entity k.
        masks: K bool masks (H, W).
        categories: C dicts with ``category_id`` and ``isthing``.
        threshold: entities whose best score is lower stay void.

    Returns:
        ``(ids, segments_info)``: int32 (H, W) with 0 for void, and per segment ``id``,
        ``category_id``, ``isthing`` and ``score``.
    """
    ids = torch.zeros(tuple(masks.shape[1:]), dtype=torch.int32)
    if scores.numel() == 0:
        return ids, []
    best, category = scores.max(dim=0)  # K
    segments: dict[tuple[int, int], dict[str, Any]] = {}
    for k in best.argsort().tolist():
        if best[k] < threshold or not (mask := masks[k].cpu()).any():
            continue
        info = categories[int(category[k])]
        key = (info["category_id"], k if info["isthing"] else -1)
        segment = segments.setdefault(
            key,
            {
                "id": len(segments) + 1,
                "category_id": info["category_id"],
                "isthing": bool(info["isthing"]),
                "score": 0.0,
            },
        )
        segment["score"] = max(segment["score"], float(best[k]))
        ids[mask] = segment["id"]
    visible = set(ids.unique().tolist())
    return ids, [segment for segment in segments.values() if segment["id"] in visible]

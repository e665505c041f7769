"""Post-processing: masks in the original frame, snapping, selection and panoptic painting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gella.modeling.postprocessing import (
    Candidates,
    gather_candidates,
    ground_phrases,
    masks_in_original_frame,
    panoptic_from_scores,
    snap_to_entities,
)


def test_masks_return_to_a_non_square_original():
    # A 60 x 30 image in a 64 x 64 colormap: scaled to 64 x 32, the rest is padding.
    truth = torch.zeros(64, 64, dtype=torch.bool)
    truth[16:48, 8:24] = True
    truth[:, 32:] = True  # padding must not leak into the result
    logits = torch.where(truth[2::4, 2::4], 5.0, -5.0)[None]
    masks = masks_in_original_frame(logits, (64, 64), (64, 32), 60, 30)
    expected = torch.zeros(60, 30, dtype=torch.bool)
    expected[15:45, 8:22] = True
    wrong = (masks[0] ^ expected)[:, :28].float().mean()
    assert masks.shape == (1, 60, 30)
    assert wrong < 0.03
    assert masks_in_original_frame(logits[:0], (64, 64), (64, 32), 60, 30).shape == (0, 60, 30)


def strips(count: int, size: int = 12) -> torch.Tensor:
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    for k in range(count):
        masks[k, k * size // count : (k + 1) * size // count] = True
    return masks


def gathered(logits, masks, entities, ids, queries, snap):
    known = entities if snap else None
    met = snap_to_entities(masks, entities, 0.5)
    return gather_candidates(logits, masks, ids, queries=queries, entity_masks=known, snapped=met)


def test_snapping_takes_the_best_entity_above_the_threshold():
    entities = strips(3)
    predicted = entities[[2, 0]].clone()
    predicted[0, 8, :6] = False  # IoU 42 / 48
    predicted = torch.cat([predicted, strips(1)])  # everything: IoU 1/3 with each
    assert snap_to_entities(predicted, entities, 0.5).tolist() == [2, 0, -1]
    assert snap_to_entities(predicted, entities, 0.9).tolist() == [-1, 0, -1]
    assert snap_to_entities(predicted, entities[:0], 0.5).tolist() == [-1, -1, -1]
    assert snap_to_entities(predicted, entities, 42 / 48).tolist() == [2, 0, -1]  # at least


def test_queries_of_one_entity_merge_to_the_highest_logit():
    logits = torch.tensor([[1.0, 5.0, -1.0, 3.0], [0.0, -2.0, 4.0, 2.0]])
    found = gather_candidates(
        logits,
        strips(4),
        [70, 80],
        queries="learned",
        entity_masks=strips(2),
        snapped=torch.tensor([1, -1, 1, 0]),
    )
    assert found.entity_ids == [-2, 70, 80]
    assert torch.allclose(found.scores.logit(), torch.tensor([[5.0, 3.0, 1.0], [-2.0, 2.0, 4.0]]))
    assert torch.equal(found.masks, torch.stack([strips(4)[1], *strips(2)]))


@pytest.mark.parametrize(
    ("queries", "snap", "ids"),
    [
        ("entity", True, [70, 80, 90]),
        ("entity", False, [70, 80, 90]),
        ("learned", True, [-3, 70, 90]),
        ("learned", False, [1, 2, 3]),
    ],
)
def test_candidates_are_the_inputs_own_masks_or_the_predicted_ones(queries, snap, ids):
    entities = strips(3)
    predicted = entities[[0, 2, 1]].clone() if queries == "learned" else entities.clone()
    predicted[0, 0, 0] = False
    if queries == "learned":
        predicted[2] = True  # meets no entity
    logits = torch.tensor([[4.0, -4.0, 0.0]])
    found = gathered(logits, predicted, entities, [70, 80, 90], queries, snap)
    assert found.entity_ids == ids
    first = ids.index(1 if 1 in ids else 70)
    expected = entities[0] if snap else predicted[0]
    assert torch.equal(found.masks[first], expected)
    assert float(found.scores[0, first]) == pytest.approx(torch.tensor(4.0).sigmoid().item())


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_snapped_segments_of_ragged_predictions_are_the_entities_to_the_pixel(queries):
    # Hence SQ 100 on ground-truth entities, where the paper's own masks reach 97.8.
    entities = strips(3)
    ragged = entities.clone()
    ragged[:, ::3, 0] = False
    order = [0, 1, 2] if queries == "entity" else [2, 0, 1]
    logits = torch.where(torch.eye(3, dtype=torch.bool)[:, order], 4.0, -4.0)
    categories = [{"category_id": c, "isthing": True} for c in (5, 6, 7)]
    for snap in (True, False):
        found = gathered(logits, ragged[order], entities, [7, 8, 9], queries, snap)
        ids, segments = panoptic_from_scores(found.scores, found.masks, categories, 0.0)
        painted = {s["category_id"]: ids == s["id"] for s in segments}
        for entity, category in zip(entities, (5, 6, 7)):
            assert torch.equal(painted[category], entity) == snap


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, [[9, 7], [8, 7], [7]]),  # all above the threshold, always the best
        ({"best_only": [True, False, True]}, [[9], [8, 7], [7]]),
        ({"none_threshold": 0.35}, [[9, 7], [8, 7], []]),
        ({"none_threshold": 0.3}, [[9, 7], [8, 7], [7]]),  # not lower
        ({"none_threshold": 0.35, "best_only": [True, False, True]}, [[9], [8, 7], []]),
    ],
)
def test_which_entities_a_noun_takes(options, taken):
    scores = torch.tensor([[0.6, 0.2, 0.9], [0.6, 0.7, 0.2], [0.3, 0.1, 0.2]])
    phrases = [{"text": t, "start": 0, "end": 1} for t in ("a dog", "two dogs", "a cat")]
    masks = strips(3)
    found = ground_phrases(phrases, Candidates(masks, [7, 8, 9], scores), 0.5, **options)
    assert [unit["entity_ids"] for unit in found] == taken
    for unit in found:
        expected = masks[[k - 7 for k in unit["entity_ids"]]].any(0).numpy()
        assert (unit["mask"] == expected).all() and unit["mask"].shape == (12, 12)
    nothing = Candidates(masks[:0], [], scores[:, :0])
    assert [unit["entity_ids"] for unit in ground_phrases(phrases, nothing, 0.5)] == [[], [], []]


def test_grounding_unites_masks_and_keeps_spans():
    masks = strips(3)
    candidates = Candidates(masks, [7, 8, 9], torch.tensor([[0.9, 0.1, 0.8]]))
    phrases = [{"text": "two strips", "start": 4, "end": 14}]
    (unit,) = ground_phrases(phrases, candidates, 0.5)
    assert unit["entity_ids"] == [7, 9]
    assert unit["scores"] == pytest.approx([0.9, 0.8])
    assert (unit["phrase"], unit["start"], unit["end"]) == ("two strips", 4, 14)
    assert np.array_equal(unit["mask"], (masks[0] | masks[2]).numpy())


def test_panoptic_merges_stuff_keeps_things_apart_and_leaves_weak_entities_void():
    categories = [{"category_id": 5, "isthing": True}, {"category_id": 9, "isthing": False}]
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.05], [0.1, 0.2, 0.7, 0.6, 0.01]])
    masks = strips(5, size=20)
    ids, segments = panoptic_from_scores(scores, masks, categories, threshold=0.1)
    of_entity = [int(ids[masks[k]].unique()) for k in range(5)]
    assert of_entity[2] == of_entity[3] and of_entity[4] == 0
    assert len(set(of_entity[:3])) == 3
    found = {s["id"]: (s["category_id"], s["isthing"], round(s["score"], 3)) for s in segments}
    assert found == {
        of_entity[0]: (5, True, 0.9),
        of_entity[1]: (5, True, 0.8),
        of_entity[2]: (9, False, 0.7),
    }


def test_panoptic_paints_the_higher_score_on_top_and_drops_hidden_segments():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :2] = True
    masks[1] = True
    categories = [{"category_id": 1, "isthing": True}]
    ids, segments = panoptic_from_scores(torch.tensor([[0.4, 0.9]]), masks, categories, 0.0)
    assert len(segments) == 1 and len(ids.unique()) == 1
    ids, segments = panoptic_from_scores(torch.tensor([[0.9, 0.4]]), masks, categories, 0.0)
    assert len(segments) == 2 and int((ids == ids[0, 0]).sum()) == 4
    ids, segments = panoptic_from_scores(torch.zeros(1, 0), masks[:0], categories, 0.0)
    assert segments == [] and ids.dtype == torch.int32 and not ids.any()

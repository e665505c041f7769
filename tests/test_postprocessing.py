"""Post-processing: masks in the original frame, snapping, selection and panoptic painting."""

import numpy as np
import pytest
import torch

from gella.entities.entity_map import EntityMap
from gella.modeling import postprocessing as post
from gella.modeling.inference import own_masks


def test_masks_return_to_a_non_square_original():
    # A 60 x 30 image in a 64 x 64 colormap: scaled to 64 x 32, the rest is padding.
    truth, expected = torch.zeros(64, 64).bool(), torch.zeros(60, 30).bool()
    truth[16:48, 8:24], expected[15:45, 8:22] = True, True
    truth[:, 32:] = True  # padding must not leak into the result
    logits, frame = torch.where(truth[2::4, 2::4], 5.0, -5.0)[None], ((64, 64), (64, 32), 60, 30)
    masks = post.masks_in_original_frame(logits, *frame)
    assert masks.shape == (1, 60, 30) and (masks[0] ^ expected)[:, :28].float().mean() < 0.03
    assert post.masks_in_original_frame(logits[:0], *frame).shape == (0, 60, 30)


def strips(count, size=12):
    places = torch.arange(count).repeat_interleave(size // count)
    return (places == torch.arange(count)[:, None])[:, :, None].repeat(1, 1, size)


def snapped(masks, entities, threshold):
    return post.snap_to_entities(masks, EntityMap.from_masks(entities.numpy()), threshold)


def gathered(logits, masks, entities, ids, queries, snap, met=None):
    met = snapped(masks, entities, 0.5) if met is None else met
    known = {"entity_masks": entities if snap else None, "snapped": met}
    return post.gather_candidates(logits[:, None], masks, ids, queries=queries, **known)


def test_snapping_takes_the_best_entity_above_the_threshold():
    entities = strips(3)
    predicted = torch.cat([entities[[2, 0]], strips(1)])  # everything: IoU 1/3 with each
    predicted[0, 8, :6] = False  # IoU 42 / 48
    for known, threshold, met in (
        (entities, 0.5, [2, 0, -1]),
        (entities, 0.9, [-1, 0, -1]),
        (entities[:0], 0.5, [-1, -1, -1]),
        (entities, 42 / 48, [2, 0, -1]),  # at least
    ):
        assert snapped(predicted, known, threshold).tolist() == met


def test_queries_of_one_entity_merge_to_the_highest_logit():
    logits = torch.tensor([[1.0, 5.0, -1.0, 3.0], [0.0, -2.0, 4.0, 2.0]])
    met = torch.tensor([1, -1, 1, 0])
    found = gathered(logits, strips(4), strips(2), [70, 80], "learned", True, met)
    assert found.entity_ids == [-2, 70, 80]
    assert torch.allclose(found.scores.logit(), torch.tensor([[5.0, 3.0, 1.0], [-2.0, 2.0, 4.0]]))
    assert torch.equal(torch.stack(list(found.masks)), torch.stack([strips(4)[1], *strips(2)]))


@pytest.mark.parametrize("queries, snap, ids", [
    ("entity", True, [70, 80, 90]),
    ("entity", False, [70, 80, 90]),
    ("learned", True, [-3, 70, 90]),
    ("learned", False, [1, 2, 3]),
])  # fmt: skip
def test_candidates_are_the_inputs_own_masks_or_the_predicted_ones(queries, snap, ids):
    entities = strips(3)
    predicted = entities[[0, 2, 1] if queries == "learned" else [0, 1, 2]].clone()
    predicted[0, 0, 0] = False
    if queries == "learned":
        predicted[2] = True  # meets no entity
    logits = torch.tensor([[4.0, -4.0, 0.0]])
    found = gathered(logits, predicted, entities, [70, 80, 90], queries, snap)
    first = ids.index(1 if 1 in ids else 70)
    assert found.entity_ids == ids
    assert torch.equal(found.masks[first], entities[0] if snap else predicted[0])
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
        ids, segments = post.panoptic_from_scores(found.scores, found.masks, categories, 0.0)
        painted = {s["category_id"]: ids == s["id"] for s in segments}
        for entity, category in zip(entities, (5, 6, 7)):
            assert torch.equal(painted[category], entity) == snap


@pytest.mark.parametrize("options, taken", [
    ({}, [[9, 7], [8, 7], [7]]),  # all above the threshold, always the best
    ({"best_only": [True, False, True]}, [[9], [8, 7], [7]]),
    ({"none_threshold": 0.35}, [[9, 7], [8, 7], []]),
    ({"none_threshold": 0.3}, [[9, 7], [8, 7], [7]]),  # not lower
    ({"none_threshold": 0.35, "best_only": [True, False, True]}, [[9], [8, 7], []]),
])  # fmt: skip
def test_which_entities_a_noun_takes(options, taken):
    scores = torch.tensor([[0.6, 0.2, 0.9], [0.6, 0.7, 0.2], [0.3, 0.1, 0.2]])
    texts = ("a dog", "two dogs", "a cat")
    phrases = [{"text": t, "start": k, "end": k + 9} for k, t in enumerate(texts)]
    masks = strips(3)
    found = post.ground_phrases(phrases, post.Candidates(masks, [7, 8, 9], scores), 0.5, **options)
    assert [unit["entity_ids"] for unit in found] == taken
    for k, (unit, ids) in enumerate(zip(found, taken)):
        assert (unit["phrase"], unit["start"], unit["end"]) == (texts[k], k, k + 9)
        assert unit["scores"] == pytest.approx([float(scores[k, i - 7]) for i in ids])
        assert np.array_equal(unit["mask"], masks[[i - 7 for i in ids]].any(0).numpy())
    nothing = post.Candidates(masks[:0], [], scores[:, :0])
    assert [u["entity_ids"] for u in post.ground_phrases(phrases, nothing, 0.5)] == [[], [], []]


@pytest.mark.parametrize("scores, taken", [
    ([[0.9, 0.9, 0.1], [0.9, 0.1, 0.1]], [[8], [7]]),  # "two stars", "the red star"
    ([[0.9, 0.8, 0.1], [0.1, 0.1, 0.2]], [[7, 8], [9]]),  # what is in no picture takes nothing away
    ([[0.9, 0.9, 0.8], [0.1, 0.1, 0.2]], [[7, 8, 9], []]),
    ([[0.6, 0.1, 0.1], [0.9, 0.1, 0.1], [0.7, 0.2, 0.1]], [[9], [7], [8]]),
])  # fmt: skip
def test_no_entity_belongs_to_two_nouns(scores, taken):
    phrases = [{"text": "stars", "start": -1, "end": -1}] * len(scores)
    candidates = post.Candidates(strips(3), [7, 8, 9], torch.tensor(scores))
    found = post.ground_phrases(phrases, candidates, 0.5, exclusive=True)
    assert [unit["entity_ids"] for unit in found] == taken
    every = [[unit["probabilities"][i] for i in (7, 8, 9)] for unit in found]
    assert every == pytest.approx(np.array(scores))  # of all, also of what is another's
    nothing = post.Candidates(strips(3)[:0], [], torch.tensor(scores)[:, :0])
    units = post.ground_phrases(phrases, nothing, 0.5, exclusive=True)
    assert all(unit["entity_ids"] == [] for unit in units)


def test_panoptic_merges_stuff_keeps_things_apart_and_leaves_weak_entities_void():
    categories = [{"category_id": 5, "isthing": True}, {"category_id": 9, "isthing": False}]
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.05], [0.1, 0.2, 0.7, 0.6, 0.01]])
    masks = strips(5, size=20)
    ids, segments = post.panoptic_from_scores(scores, masks, categories, threshold=0.1)
    of_entity = [int(ids[masks[k]].unique()) for k in range(5)]
    assert of_entity[2] == of_entity[3] and of_entity[4] == 0 and len(set(of_entity[:3])) == 3
    found = {s["id"]: (s["category_id"], s["isthing"], round(s["score"], 3)) for s in segments}
    assert found == {
        of_entity[0]: (5, True, 0.9),
        of_entity[1]: (5, True, 0.8),
        of_entity[2]: (9, False, 0.7),
    }


def test_a_part_is_not_hidden_under_its_whole_of_higher_score():
    masks = np.zeros((2, 6, 6), dtype=bool)
    masks[0], masks[1, 2:4, 2:5] = True, True
    own = own_masks(EntityMap.from_masks(masks), flat=True)
    things = [{"category_id": 1, "isthing": True}]
    ids, segments = post.panoptic_from_scores(torch.tensor([[0.9, 0.8]]), own, things, 0.0)
    assert len(segments) == 2 and np.array_equal(ids == ids[2, 2], masks[1])
    whole = own_masks(EntityMap.from_masks(masks), flat=False)
    assert np.array_equal(np.stack(list(whole)), masks)


def test_panoptic_paints_the_higher_score_on_top_and_drops_hidden_segments():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :2], masks[1] = True, True
    categories = [{"category_id": 1, "isthing": True}]
    for scores, count in (([0.4, 0.9], 1), ([0.9, 0.4], 2), ([], 0)):
        given = torch.tensor([scores]), masks[: len(scores)], categories, 0.0
        ids, segments = post.panoptic_from_scores(*given)
        assert len(segments) == count and ids.dtype == torch.int32
        assert len(ids.unique()) == max(1, count) and bool(ids.any()) == bool(count)
        assert int((ids == ids[0, 0]).sum()) == (4 if count == 2 else 16)

"""The criterion: every loss against its formula, matching, and what must not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from tiny_gella import TINY
from torch.nn import functional as F

from gella import EntityMap, load_config
from gella.modeling.criterion import GellaCriterion, LossCounts, count_terms
from gella.modeling.mask_decoder import MaskDecoderOutput

PAPER = TINY.parent / "gella_swin_t.yaml"
WEIGHTS = {"loss_entity": 2.0, "loss_mask": 5.0, "loss_dice": 3.0, "loss_association": 4.0}


def build(queries="entity", **changes):
    options = dict(weights=WEIGHTS, num_points=256, deep_supervision=False)
    return GellaCriterion(queries=queries, **{**options, **changes})


def losses_of(criterion, output, masks, logits=None, targets=(), known=None):
    """The losses, divided by what the input itself holds."""
    return criterion(
        output, masks, seen(criterion, output, masks, logits, known), logits, targets, known
    )


def seen(criterion, output, masks, logits=None, known=None):
    """What a criterion is shown, counted from the tensors instead of from the data."""
    visible = [mask.flatten(1).any(1) for mask in masks]
    matches = criterion.match(output, masks)
    paired = sum(int(v[e].sum()) for (_, e), v in zip(matches, visible))
    others = int(output.query_valid.sum()) - paired
    rows = [torch.ones(len(x), dtype=torch.bool) for x in logits or ()] if known is None else known
    pairs = sum(int(row.sum()) * int(q.sum()) for row, q in zip(rows, output.query_valid))
    weight = paired + float(criterion.terms.empty_weight[1]) * others
    return LossCounts(0.0, float(sum(int(v.sum()) for v in visible)), weight, float(pairs))


def scene(batch=2, count=4, queries=4, layers=3, seed=0):
    """Blocks of 8x8 pixels, ``count`` entities, random predictions at stride 4."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, count, (batch, 8, 8), generator=generator)
    ids[:, 0, :count] = torch.arange(count)  # all visible
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)
    masks = [image == torch.arange(count)[:, None, None] for image in ids]

    def random(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    output = MaskDecoderOutput(
        query_embeddings=random(batch, queries, 8),
        entity_logits=[random(batch, queries, 2) for _ in range(layers)],
        mask_logits=[random(batch, queries, 16, 16) for _ in range(layers)],
        query_valid=torch.ones(batch, queries, dtype=torch.bool),
    )
    return output, masks


def on_full_grid(criterion, side=16):
    """Sample every cell centre of the stride-4 grid once, instead of random points."""
    ticks = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], -1)
    criterion.terms.sample_points_using_uncertainty = lambda logits, *_: points.expand(
        len(logits), -1, -1
    )
    return criterion


def test_mask_losses_by_hand_on_the_full_grid():
    output, masks = scene()
    losses = losses_of(on_full_grid(build()), output, masks)
    logits = output.mask_logits[-1].flatten(0, 1).flatten(1)  # 8 masks, 256 cells
    # Blocks of 8 pixels make all four pixels around a cell centre equal.
    wanted = torch.cat(masks).float()[:, 2::4, 2::4].flatten(1)
    bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1).mean()
    p = logits.sigmoid()
    dice = (1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)).mean()
    entity = -output.entity_logits[-1].log_softmax(-1)[..., 0].mean()
    assert losses["loss_mask"].item() == pytest.approx(5 * bce.item(), rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(3 * dice.item(), rel=1e-5)
    assert losses["loss_entity"].item() == pytest.approx(2 * entity.item(), rel=1e-5)


def test_terms_equal_transformers_loss_with_the_same_points():
    output, masks = scene(queries=6)
    criterion = build("learned")
    matches = criterion.match(output, masks)
    torch.manual_seed(5)
    mine = criterion._segmentation(output, masks, matches, LossCounts(1.0, 8.0, 8.4, 1.0))
    torch.manual_seed(5)
    theirs = criterion.terms.loss_masks(
        output.mask_logits[-1], [m.float() for m in masks], matches, torch.tensor(8.0)
    )
    labels = [torch.zeros(4, dtype=torch.int64)] * 2
    entity = criterion.terms.loss_labels(output.entity_logits[-1], labels, matches)
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(mine[name], theirs[name])
    torch.testing.assert_close(mine["loss_entity"], entity["loss_cross_entropy"])


def test_no_object_weight_of_unmatched_queries():
    output, masks = scene(batch=1, queries=6)
    criterion = build("learned")
    ((query, _),) = criterion.match(output, masks)
    logs = output.entity_logits[-1][0].log_softmax(-1)
    others = [q for q in range(6) if q not in query.tolist()]
    wanted = -(logs[query, 0].sum() + 0.1 * logs[others, 1].sum()) / (4 + 0.1 * 2)
    loss = losses_of(criterion, output, masks)["loss_entity"]
    assert loss.item() == pytest.approx(2 * wanted.item(), rel=1e-5)


def test_hungarian_matching_finds_the_hidden_permutation():
    output, masks = scene(queries=9)
    order = torch.tensor([5, 0, 8, 3])
    logits = torch.full((2, 9, 16, 16), -6.0)
    for i, mask in enumerate(masks):
        logits[i, order] = mask[:, 2::4, 2::4].float() * 12 - 6
    output.mask_logits[-1] = logits
    criterion = build("learned")
    for query, entity in criterion.match(output, masks):
        assert dict(zip(query.tolist(), entity.tolist())) == {5: 0, 0: 1, 8: 2, 3: 3}
    targets = [torch.eye(4), torch.eye(4)]
    association = [torch.full((4, 9), -20.0) for _ in range(2)]
    for scores in association:
        scores[torch.arange(4), order] = 20.0
    losses = losses_of(criterion, output, masks, association, targets)
    assert losses["loss_association"].item() < 1e-6  # G^A was moved to the matched queries
    wrong = losses_of(criterion, output, masks, association, [t.flip(0) for t in targets])
    assert wrong["loss_association"].item() > 1


def test_invisible_entities_are_not_matched_and_indices_stay_comparable():
    output, masks = scene(batch=1, queries=6)
    masks[0][1] = False
    ((_, entity),) = build("learned").match(output, masks)
    assert sorted(entity.tolist()) == [0, 2, 3]
    ((query, entity),) = build("entity").match(scene(batch=1)[0], masks)
    assert query.tolist() == entity.tolist() == [0, 1, 2, 3]


def test_an_invisible_entity_has_no_mask_loss_and_is_no_object():
    output, masks = scene(batch=1)
    masks[0][1] = False
    criterion = on_full_grid(build())
    losses = losses_of(criterion, output, masks)
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    gradient = output.mask_logits[-1].grad[0].abs().sum((1, 2))
    assert gradient[1] == 0 and (gradient[[0, 2, 3]] > 0).all()
    losses["loss_entity"].backward()
    # Descent raises "no object" (class 1) for it, and "entity" for the others.
    step = -output.entity_logits[-1].grad[0]
    assert step[1, 1] > 0 and (step[[0, 2, 3], 0] > 0).all()


def test_padding_queries_do_not_count():
    output, masks = scene()
    padded = MaskDecoderOutput(
        output.query_embeddings,
        output.entity_logits,
        output.mask_logits,
        torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool),
    )
    targets = [masks[0], masks[1][:2]]
    logits = [torch.randn(3, 4) for _ in range(2)]
    nouns = [torch.ones(3, 4), torch.ones(3, 2)]
    criterion = on_full_grid(build())
    before = losses_of(criterion, padded, targets, logits, nouns)
    with torch.no_grad():
        padded.mask_logits[-1][1, 2:] = 50.0
        padded.entity_logits[-1][1, 2:] = torch.tensor([-30.0, 30.0])
        logits[1][:, 2:] = 30.0
    after = losses_of(criterion, padded, targets, logits, nouns)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_association_is_the_mean_over_known_nouns_and_valid_queries():
    output, masks = scene()
    logits = [torch.randn(3, 4), torch.randn(2, 4)]
    targets = [torch.randint(0, 2, (3, 4)).float(), torch.randint(0, 2, (2, 4)).float()]
    known = [torch.tensor([True, False, True]), torch.tensor([True, True])]
    loss = losses_of(build(), output, masks, logits, targets, known)["loss_association"]
    rows = torch.cat([logits[0][[0, 2]], logits[1]])
    wanted = F.binary_cross_entropy_with_logits(rows, torch.cat([targets[0][[0, 2]], targets[1]]))
    assert loss.item() == pytest.approx(4 * wanted.item(), rel=1e-5)
    assert losses_of(build(), output, masks, logits, targets)["loss_association"] != loss


def test_nothing_to_learn_is_zero_and_keeps_the_graph():
    output, masks = scene()
    logits = [torch.zeros(0, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)]
    targets = [torch.zeros(0, 4), torch.zeros(1, 4)]
    unknown = [torch.zeros(0, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    loss = losses_of(build(), output, masks, logits, targets, unknown)["loss_association"]
    loss.backward()
    assert loss.item() == 0 and logits[1].grad.abs().sum() == 0
    output.query_valid = torch.zeros(2, 4, dtype=torch.bool)
    losses = losses_of(build(), output, [mask[:0] for mask in masks])
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss_entity": 0.0, "loss_mask": 0.0, "loss_dice": 0.0,
    }  # fmt: skip
    sum(losses.values()).backward()
    assert output.mask_logits[-1].grad is not None


def test_learned_queries_of_an_image_without_entities_are_no_objects():
    output, masks = scene()
    losses = losses_of(build("learned"), output, [masks[0], masks[1][:0]])
    sum(losses.values()).backward()
    step = -output.entity_logits[-1].grad[1]
    assert (step[:, 1] > 0).all()


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_deep_supervision_names_every_layer(queries):
    output, masks = scene()
    losses = losses_of(build(queries, deep_supervision=True), output, masks)
    base = ["loss_entity", "loss_mask", "loss_dice"]
    assert sorted(losses) == sorted(base + [f"{n}_{i}" for n in base for i in range(2)])
    sum(losses.values()).backward()
    assert all(logits.grad is not None for logits in output.mask_logits)
    assert set(losses_of(build(queries), output, masks)) == set(base)


def test_parts_of_a_step_give_what_it_gives_whole():
    # The second image has one entity and one noun only.
    output, masks = scene()
    masks[1] = masks[1][:1]
    output.query_valid[1, 1:] = False
    logits = [torch.randn(3, 4), torch.randn(1, 4)]
    targets = [torch.ones(3, 4), torch.ones(1, 1)]
    criterion = on_full_grid(build())
    whole = losses_of(criterion, output, masks, logits, targets)
    counts = seen(criterion, output, masks, logits)
    assert counts == (0.0, 5.0, 5.0, 13.0)  # 3 x 4 + 1 pairs
    half = LossCounts(*(count / 2 for count in counts))
    parts = []
    for i in (slice(0, 1), slice(1, 2)):
        part = MaskDecoderOutput(
            output.query_embeddings[i],
            [x[i] for x in output.entity_logits],
            [x[i] for x in output.mask_logits],
            output.query_valid[i],
        )
        parts.append(criterion(part, masks[i], half, logits[i], targets[i]))
    for name in ("loss_entity", "loss_mask", "loss_dice", "loss_association"):
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name])


def test_losses_are_float32_under_autocast():
    output, masks = scene()
    logits = [torch.randn(2, 4).bfloat16() for _ in range(2)]
    output.mask_logits[-1] = output.mask_logits[-1].bfloat16()
    output.entity_logits[-1] = output.entity_logits[-1].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(build(), output, masks, logits, [torch.ones(2, 4)] * 2)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_disagreeing_input_is_named():
    output, masks = scene()
    criterion, counts = build(), LossCounts(1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="1 target mask stacks for a batch of 2"):
        criterion(output, masks[:1], counts)
    with pytest.raises(ValueError, match="image 1 has 3 target masks but 4 entity queries"):
        criterion(output, [masks[0], masks[1][:3]], counts)
    with pytest.raises(ValueError, match="image 0 has 2 <SEG> embeddings for 3 nouns"):
        criterion(output, masks, counts, [torch.zeros(2, 4)] * 2, [torch.zeros(3, 4)] * 2)
    with pytest.raises(KeyError, match="loss_dice_3 has no weight"):
        build(weights={"loss_mask": 1.0}).weigh({"loss_dice_3": torch.tensor(1.0)})


def test_the_config_gives_the_weights():
    criterion = GellaCriterion(load_config(PAPER, ["MODEL.ASSOCIATION.WEIGHT", 4.0]))
    assert criterion.weights == {
        "loss_entity": 2.0, "loss_mask": 5.0, "loss_dice": 5.0, "loss_association": 4.0,
    }  # fmt: skip
    assert criterion.terms.empty_weight.tolist() == pytest.approx([1.0, 0.1])
    assert criterion.terms.num_points == 12544 and criterion.deep_supervision


# -- what the losses divide by ---------------------------------------------------------------------


def sample(task, ids, phrases, answer):
    """A mapped dict; 4 image tokens, then a prompt of 2 and the answer."""
    seg = list(range(6, 6 + len(phrases)))
    return {
        "task": task,
        "image": torch.zeros(3, 96, 96, dtype=torch.uint8),
        "colormap": torch.zeros(3, 96, 96, dtype=torch.uint8),
        "entities": EntityMap(np.kron(ids, np.ones((48, 48), np.int32)), segment_ids=[1, 2, 3]),
        "input_ids": torch.tensor([-200] * 36 + [1, 2] + list(range(answer))),
        "labels": torch.tensor([-100] * 38 + list(range(answer))),
        "seg_positions": torch.tensor(seg, dtype=torch.int64),
        "phrases": [{"entity_indices": indices} for indices in phrases],
    }


def batch(task):
    """Entity 3 of the first image has no pixel; one noun's entities are not known."""
    first = sample(task, [[1, 2], [2, 0]], [[0], None, []], 5)
    return [first, sample(task, [[1, 2], [3, 3]], [[1, 2]], 3)]


def test_counts_by_hand():
    # The entity without a pixel counts as no object; 2 + 1 nouns with 3 entities each.
    assert count_terms(batch("ground"), None, 0.1) == (8.0, 5.0, pytest.approx(5.1), 9.0)
    fewer_queries_than_entities = count_terms(batch("ground"), 2, 0.1)
    assert fewer_queries_than_entities == (8.0, 5.0, 4.0, 6.0)
    assert count_terms(batch("describe"), None, 0.1) == (8.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("queries", "number"), [("entity", 100), ("learned", 2), ("learned", 7)])
def test_the_data_tell_what_the_model_sees(monkeypatch, queries, number):
    options = ["MODEL.MASK_DECODER.QUERIES", queries, "MODEL.MASK_DECODER.NUM_QUERIES", number]
    model = build_model(load_config(TINY, options)).train()
    criterion, shown = model.criterion, {}
    plain = criterion.forward

    def noting(output, **arguments):
        shown.update(arguments, output=output)
        return plain(output, **arguments)

    monkeypatch.setattr(criterion, "forward", noting)
    for task in ("describe", "extract", "ground"):
        inputs = batch(task)
        expected = model.loss_counts(inputs)
        losses = model(inputs)
        assert losses["loss_answer"] > 0 and expected.answer == 8
        if task == "describe":
            assert not shown
            continue
        masks, logits = shown["target_masks"], shown["association_logits"]
        counts = seen(criterion, shown["output"], masks, logits, shown["association_valid"])
        assert shown["counts"] == expected
        assert expected == pytest.approx(counts._replace(answer=8.0))
        twice = model(inputs, LossCounts(*(2 * count for count in expected)))
        assert float(twice["loss_answer"].detach()) == pytest.approx(
            float(losses["loss_answer"].detach()) / 2
        )

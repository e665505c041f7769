"""The criterion: every loss against its formula, matching, and what must not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from tiny_gella import TINY
from torch.nn import functional as F
from zero_runs import SteadyGELLA  # noqa: F401  # registers it

from gella import EntityMap, load_config
from gella.modeling.criterion import GellaCriterion
from gella.modeling.mask_decoder import MaskDecoderOutput

PAPER = TINY.parent / "gella_swin_t.yaml"
WEIGHTS = {"loss_entity": 2.0, "loss_mask": 5.0, "loss_dice": 3.0, "loss_association": 4.0}


def build(queries="entity", **changes):
    options = dict(weights=WEIGHTS, num_points=256, deep_supervision=False)
    return GellaCriterion(queries=queries, **{**options, **changes})


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
    losses = on_full_grid(build())(output, masks)
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
    output, masks = scene(batch=1, queries=6)
    criterion = build("learned")
    matches = criterion.match(output, masks)
    torch.manual_seed(5)
    mine = criterion._segmentation(output, masks, matches)
    torch.manual_seed(5)
    theirs = criterion.terms.loss_masks(
        output.mask_logits[-1], [m.float() for m in masks], matches, torch.tensor(4.0)
    )
    labels = [torch.zeros(4, dtype=torch.int64)]
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
    loss = criterion(output, masks)["loss_entity"]
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
    losses = criterion(output, masks, association, targets)
    assert losses["loss_association"].item() < 1e-6  # G^A was moved to the matched queries
    wrong = criterion(output, masks, association, [t.flip(0) for t in targets])
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
    losses = criterion(output, masks)
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
    before = criterion(padded, targets, logits, nouns)
    with torch.no_grad():
        padded.mask_logits[-1][1, 2:] = 50.0
        padded.entity_logits[-1][1, 2:] = torch.tensor([-30.0, 30.0])
        logits[1][:, 2:] = 30.0
    after = criterion(padded, targets, logits, nouns)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_association_is_the_mean_over_an_image_s_known_nouns_and_valid_queries():
    output, masks = scene()
    logits = [torch.randn(3, 4), torch.randn(2, 4)]
    targets = [torch.randint(0, 2, (3, 4)).float(), torch.randint(0, 2, (2, 4)).float()]
    known = [torch.tensor([True, False, True]), torch.tensor([True, True])]
    loss = build()(output, masks, logits, targets, known)["loss_association"]
    pairs = [(logits[0][[0, 2]], targets[0][[0, 2]]), (logits[1], targets[1])]
    wanted = sum(F.binary_cross_entropy_with_logits(*pair) for pair in pairs) / 2
    assert loss.item() == pytest.approx(4 * wanted.item(), rel=1e-5)
    assert build()(output, masks, logits, targets)["loss_association"] != loss
    halved = build()(output, masks, logits, targets, known, [1.0, 0.5])["loss_association"]
    wanted -= F.binary_cross_entropy_with_logits(*pairs[1]) / 4
    assert halved.item() == pytest.approx(4 * wanted.item(), rel=1e-5)


def test_nothing_to_learn_is_zero_and_keeps_the_graph():
    output, masks = scene()
    logits = [torch.zeros(0, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)]
    targets = [torch.zeros(0, 4), torch.zeros(1, 4)]
    unknown = [torch.zeros(0, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]
    loss = build()(output, masks, logits, targets, unknown)["loss_association"]
    loss.backward()
    assert loss.item() == 0 and logits[1].grad.abs().sum() == 0
    output.query_valid = torch.zeros(2, 4, dtype=torch.bool)
    losses = build()(output, [mask[:0] for mask in masks])
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss_entity": 0.0, "loss_mask": 0.0, "loss_dice": 0.0,
    }  # fmt: skip
    sum(losses.values()).backward()
    assert output.mask_logits[-1].grad is not None


def test_learned_queries_of_an_image_without_entities_are_no_objects():
    output, masks = scene()
    losses = build("learned")(output, [masks[0], masks[1][:0]])
    sum(losses.values()).backward()
    step = -output.entity_logits[-1].grad[1]
    assert (step[:, 1] > 0).all()


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_deep_supervision_names_every_layer(queries):
    output, masks = scene()
    losses = build(queries, deep_supervision=True)(output, masks)
    base = ["loss_entity", "loss_mask", "loss_dice"]
    assert sorted(losses) == sorted(base + [f"{n}_{i}" for n in base for i in range(2)])
    sum(losses.values()).backward()
    assert all(logits.grad is not None for logits in output.mask_logits)
    assert set(build(queries)(output, masks)) == set(base)


def test_losses_are_float32_under_autocast():
    output, masks = scene()
    logits = [torch.randn(2, 4).bfloat16() for _ in range(2)]
    output.mask_logits[-1] = output.mask_logits[-1].bfloat16()
    output.entity_logits[-1] = output.entity_logits[-1].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = build()(output, masks, logits, [torch.ones(2, 4)] * 2)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_disagreeing_input_is_named():
    output, masks = scene()
    criterion = build()
    with pytest.raises(ValueError, match="1 target mask stacks for a batch of 2"):
        criterion(output, masks[:1])
    with pytest.raises(ValueError, match="image 1 has 3 target masks but 4 entity queries"):
        criterion(output, [masks[0], masks[1][:3]])
    with pytest.raises(ValueError, match="image 0 has 2 <SEG> embeddings for 3 nouns"):
        criterion(output, masks, [torch.zeros(2, 4)] * 2, [torch.zeros(3, 4)] * 2)
    with pytest.raises(KeyError, match="loss_dice_3 has no weight"):
        build(weights={"loss_mask": 1.0}).weigh({"loss_dice_3": torch.tensor(1.0)})


def test_the_config_gives_the_weights():
    criterion = GellaCriterion(load_config(PAPER, ["MODEL.ASSOCIATION.WEIGHT", 4.0]))
    assert criterion.weights == {
        "loss_entity": 2.0, "loss_mask": 5.0, "loss_dice": 5.0, "loss_association": 4.0,
    }  # fmt: skip
    assert criterion.terms.empty_weight.tolist() == pytest.approx([1.0, 0.1])
    assert criterion.terms.num_points == 12544 and criterion.deep_supervision


# -- means per image -------------------------------------------------------------------------------


def sample(nouns, entities, answer, seed):
    """A mapped dict: 36 image tokens, a prompt of 2 and the answer; of every third noun the
    entities are not known, and one entity has no pixel."""
    rng = np.random.default_rng(seed)
    ids = np.kron(np.arange(16).reshape(4, 4) % entities + 1, np.ones((24, 24), np.int32))
    pixels = torch.from_numpy(rng.integers(0, 256, (2, 3, 96, 96), dtype=np.uint8))
    words = torch.from_numpy(rng.integers(5, 600, answer))
    return {
        "task": "ground",
        "image": pixels[0],
        "colormap": pixels[1],
        "entities": EntityMap(ids, segment_ids=range(1, entities + 2)),
        "input_ids": torch.cat([torch.tensor([-200] * 36 + [1, 2]), words]),
        "labels": torch.cat([torch.full((38,), -100), words]),
        "seg_positions": torch.arange(38, 38 + nouns),
        "phrases": [
            {"entity_indices": None if i % 3 == 2 else [i % entities]} for i in range(nouns)
        ],
    }


@pytest.mark.parametrize("task", ["ground", "describe"])
@pytest.mark.parametrize("queries", ["entity", "learned"])
def test_losses_of_a_batch_are_the_mean_of_those_of_its_images_alone(queries, task):
    options = ["MODEL.MASK_DECODER.QUERIES", queries, "MODEL.MASK_DECODER.NUM_QUERIES", 7]
    options += ["MODEL.META_ARCHITECTURE", "SteadyGELLA"]  # without chance in its losses
    model = build_model(load_config(TINY, options)).train()
    if task == "describe":  # which needs nothing of the vision side but CLIP
        for part in ("colormap_encoder", "resoblend", "mask_decoder", "association", "criterion"):
            model.get_submodule(part).forward = None
    shapes = [(1, 3, 5), (9, 6, 60), (2, 1, 8), (133, 9, 400), (0, 2, 0)]
    images = [{**sample(*shape, seed), "task": task} for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        for batch in (images[:4], images[3:]):
            joint, alone = model(batch), [model([image]) for image in batch]
            for name, loss in joint.items():
                mean = sum(losses[name] for losses in alone) / len(batch)
                assert loss.item() == pytest.approx(mean.item(), rel=1e-5, abs=1e-5), name
    assert (joint["loss_association"] > 0) == (task == "ground") and joint["loss_answer"] > 0
    assert alone[1]["loss_answer"] == alone[1]["loss_association"] == 0


@pytest.mark.parametrize("task, known, share", [
    ("ground", 2, 0.5), ("extract", 8, 2.0), ("panoptic", 8, 1.0), ("refer", 1, 1.0),
])  # fmt: skip
def test_captions_count_by_their_known_nouns_and_lists_and_expressions_as_one(task, known, share):
    image = {**sample(known + 1, 3, 20, 0), "task": task}
    entities = [None, *([i % 3] for i in range(known))]
    image["phrases"] = [{"entity_indices": indices} for indices in entities]
    losses = {}
    for number in (0.0, 4.0):
        options = ["MODEL.META_ARCHITECTURE", "SteadyGELLA", "MODEL.ASSOCIATION.CAPTION_NOUNS"]
        model = build_model(load_config(TINY, [*options, number])).train()
        model.load_state_dict(losses.setdefault("weights", model.state_dict()))
        losses[number] = {name: loss.item() for name, loss in model([image]).items()}
    assert losses[4.0].pop("loss_association") == pytest.approx(
        share * losses[0.0].pop("loss_association")
    )
    assert losses[4.0] == losses[0.0]

"""What must not change the answers of the whole model: company, padding, mode, numbering, dtype."""

import numpy as np
import pytest
import torch
from tiny_gella import (
    NOUNS,
    QUERIES,
    TOLERANCE,
    farthest,
    make_cfg,
    make_fluent,
    make_mapper,
    make_model,
    make_record,
    same_result,
)

from gella.entities.entity_map import EntityMap
from gella.text import prompts

# Size of the picture, entities, nouns: squares, upright and flat ones, all different.
SCENES = [((90, 120), 5, 2), ((40, 160), 1, 6), ((160, 60), 13, 1), ((50, 50), 9, 4)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return [
        make_record(folder, f"scene{i}", size, count, [*NOUNS[i:], *NOUNS][:nouns], seed=i)
        for i, (size, count, nouns) in enumerate(SCENES)
    ]


def batch_of(cfg, records, tasks, is_train=False):
    mapper = make_mapper(cfg, is_train)
    tasks = [tasks] * len(records) if isinstance(tasks, str) else tasks
    return [mapper(r, task=t, rng_seed=(0, i)) for i, (r, t) in enumerate(zip(records, tasks))]


def of_image(output, i, valid):
    """What a `MaskDecoderOutput` says of the valid queries of one image, layer by layer."""
    said = {"query_embeddings": output.query_embeddings[i][valid]}
    for layer, (entity, mask) in enumerate(zip(output.entity_logits, output.mask_logits)):
        said[f"entity_logits_{layer}"] = entity[i][valid]
        said[f"mask_logits_{layer}"] = mask[i][valid]
    return said


@torch.no_grad()
def parts(model, batch):
    """(output of the mask decoder, of the language decoder, association logits) of a batch."""
    (output,), grid = model.encode(batch)
    language = model.read_answers(batch, grid)
    return output, language, model.association(language.seg_embeddings, output.query_embeddings)


def same_layers(output, i, valid, other, j, other_valid):
    expected, found = of_image(output, i, valid), of_image(other, j, other_valid)
    for name in expected:
        assert farthest(expected[name], found[name], relative=True) < TOLERANCE, (i, name)


@pytest.mark.parametrize("queries", QUERIES)
def test_every_tensor_of_a_batch_is_that_of_the_image_alone(records, tokenizer_dir, queries):
    cfg = make_cfg(tokenizer_dir, queries)
    model, batch = make_model(cfg), batch_of(cfg, records, "ground")
    assert len({len(x["input_ids"]) for x in batch}) == len(SCENES)
    joint, joint_language, joint_logits = parts(model, batch)
    for i, inputs in enumerate(batch):
        alone, language, (logits,) = parts(model, [inputs])
        valid = joint.query_valid[i]
        assert int(valid.sum()) == (inputs["entities"].num_entities if queries == "entity" else 8)
        assert alone.query_valid.all()
        same_layers(alone, 0, alone.query_valid[0], joint, i, valid)
        assert farthest(language.seg_embeddings[0], joint_language.seg_embeddings[i]) < TOLERANCE
        assert farthest(logits, joint_logits[i][:, valid]) < TOLERANCE
        assert logits.shape[0] == len(inputs["phrases"]) and logits.std() > 0.01


@torch.no_grad()
def test_a_seg_embedding_is_the_state_right_at_its_token(records, tokenizer_dir):
    """The last state of the prompt that ends there, without company and padding."""
    model = make_model(cfg := make_cfg(tokenizer_dir))
    batch, states = batch_of(cfg, records, "ground"), []
    grid = model.encode(batch)[1]
    given = model.read_answers(batch, grid).seg_embeddings
    handle = model.language_decoder.llama.base_model.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    seg, none = model.tokenizer.convert_tokens_to_ids("<SEG>"), torch.zeros(0, dtype=torch.int64)
    for i, inputs in enumerate(batch):
        for k, place in enumerate(inputs["seg_positions"].tolist()):
            assert inputs["input_ids"][place] == seg
            short = {key: inputs[key][: place + 1] for key in ("input_ids", "labels")}
            model.read_answers([{**short, "seg_positions": none}], grid[i : i + 1])
            assert farthest(states[-1][0, -1], given[i][k]) < TOLERANCE
    handle.remove()
    assert len(states) == sum(nouns for _, _, nouns in SCENES)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("snap", [True, False])
def test_every_result_of_a_batch_is_that_of_the_image_alone(records, tokenizer_dir, queries, snap):
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.GELLA.SNAP", snap, "MODEL.GELLA.SNAP_IOU", 0.1)
    model = make_model(cfg)
    for tasks in (["ground", "extract", "panoptic", "describe"], ["extract", "refer"] * 2):
        batch = batch_of(cfg, records, tasks)
        for inputs, joint in zip(batch, model(batch)):
            (alone,) = model([inputs])
            assert set(joint) == set(alone) != set()
            same_result(alone, joint)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("task", ["ground", "panoptic"])
@torch.no_grad()
def test_losses_of_a_batch_are_means_over_its_images(
    records, tokenizer_dir, queries, task, monkeypatch
):
    """Images of other sizes, entities and nouns weigh alike, with the points drawn at random."""
    # Of many points two are as uncertain as one another, and either may be taken.
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.MASK_DECODER.TRAIN_NUM_POINTS", 16)
    model, batch = make_model(cfg).train(), batch_of(cfg, records, task, is_train=True)
    model.colormap_encoder.eval()  # statistics of a batch are of the batch

    def rand(*shape, **options):
        # The same sample points for every mask, whatever else is in the batch.
        if shape == ([],):  # older versions of transformers may leave layers out by it
            return torch.ones(())
        shape = tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        row = torch.empty(1, *shape[1:]).uniform_(generator=torch.Generator().manual_seed(3))
        return row.expand(shape).clone()

    monkeypatch.setattr(torch, "rand", rand)
    joint, singles = model(batch), [model([inputs]) for inputs in batch]
    for name, loss in joint.items():
        values = torch.stack([losses[name] for losses in singles])
        assert farthest(values.mean(), loss, relative=True) < TOLERANCE, name
        assert values.std() > 0.001  # the images differ


@torch.no_grad()
@pytest.mark.parametrize("caption_nouns", [0.0, 4.2])
def test_prompts_of_one_image_weigh_as_if_each_came_with_it(records, tokenizer_dir, caption_nouns):
    """The answer loss is the mean over prompts; all nouns of an image meet its entities at once."""
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.ASSOCIATION.CAPTION_NOUNS", caption_nouns)
    model, (first, second) = make_model(cfg).train(), batch_of(cfg, records[:2], "ground", True)
    model.colormap_encoder.eval()
    keys = ("input_ids", "labels", "seg_positions", "phrases", "task")
    fewer = batch_of(cfg, [{**records[0], "phrases": records[0]["phrases"][:1]}], "ground", True)[0]
    other = {key: fewer[key] for key in keys}
    joint = model([{**first, "more": [other]}, second])
    first_alone, other_alone, second_alone = (
        model([x]) for x in (first, {**first, **other}, second)
    )
    nouns = [len(x["phrases"]) for x in (first, other)]
    assert nouns == [2, 1]
    name = "loss_association"
    weights = (1, 1) if caption_nouns else nouns  # counted by its nouns already, when alone
    both = (weights[0] * first_alone[name] + weights[1] * other_alone[name]) / sum(weights)
    assert farthest(joint[name], (both + second_alone[name]) / 2, relative=True) < TOLERANCE
    name = "loss_answer"
    mean = (first_alone[name] + other_alone[name] + second_alone[name]) / 3
    assert farthest(joint[name], mean, relative=True) < TOLERANCE
    assert farthest(first_alone[name], other_alone[name]) > 0.001


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("arch", ["lcnet_050", "convnext_atto"])
def test_training_and_inference_see_the_same(records, tokenizer_dir, queries, arch, monkeypatch):
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.COLORMAP_ENCODER.ARCH", arch)
    model, batch = make_model(cfg), batch_of(cfg, records, "ground")
    seen_by = []
    encode, association = type(model).encode, model.association.forward

    def seen(self, inputs):
        outputs, grid = encode(self, inputs)
        seen_by.append((*outputs, model.read_answers(inputs, grid)))
        return outputs, grid

    def associated(nouns, entities):
        seen_by[-1] += (association(nouns, entities),)
        return seen_by[-1][-1]

    monkeypatch.setattr(type(model), "encode", seen)
    monkeypatch.setattr(model.association, "forward", associated)
    model.train()
    if arch == "lcnet_050":
        model.colormap_encoder.eval()  # batch norm uses the batch in training, by its nature
    losses = model(batch)
    assert torch.stack(list(losses.values())).isfinite().all()
    model.eval()(batch)
    (trained, language, logits), (shown, shown_language, shown_logits) = seen_by
    for i in range(len(batch)):
        valid = trained.query_valid[i]  # what stands behind them is padding
        assert farthest(logits[i][:, valid], shown_logits[i][:, valid]) < TOLERANCE
        assert farthest(language.seg_embeddings[i], shown_language.seg_embeddings[i]) < TOLERANCE
        same_layers(trained, i, valid, shown, i, valid)
    assert farthest(language.loss_answer, shown_language.loss_answer) < TOLERANCE


def test_generated_answers_ground_as_given_ones_alone_and_in_company(
    records, tokenizer_dir, monkeypatch
):
    short, embeddings = [records[0], records[2]], []
    cfg, model = make_fluent(tokenizer_dir, short)
    asked, given = (batch_of(cfg, short, task) for task in ("extract", "ground"))
    assert not any(len(x["seg_positions"]) for x in asked)
    association = model.association.forward

    def spy(nouns, entities):
        embeddings.append(nouns)
        return association(nouns, entities)

    monkeypatch.setattr(model.association, "forward", spy)
    generated, forced = model(asked), model(given)
    alone = [model([x])[0] for x in asked]
    for i, record in enumerate(short):
        nouns = [phrase["text"] for phrase in record["phrases"]]
        said = generated[i].pop("text")
        assert alone[i].pop("text") == said == prompts.noun_answer(nouns)  # so it tests something
        same_result(forced[i], generated[i])
        same_result(forced[i], alone[i])
        own, teacher, single = embeddings[0][i], embeddings[1][i], embeddings[2 + i][0]
        assert len(own) == len(nouns)
        assert farthest(own, teacher) < TOLERANCE and farthest(single, teacher) < TOLERANCE
        assert all(p["start"] >= 0 for p in generated[i]["grounding"])


def renumbered(inputs, order):
    """The same view with entity `order[k]` in place k; each keeps its pixels, id and colour."""
    place = np.zeros(len(order) + 1, np.int32)
    place[order + 1] = np.arange(1, len(order) + 1)
    changed = {**inputs, "colors": inputs["colors"][order]}
    for key in ("entities", "entities_full"):
        old = inputs[key]
        names = [old.segment_ids[k] for k in order]
        changed[key] = EntityMap(place[old.ids], names, old.scores[order])
    return changed


@pytest.mark.parametrize("snap", [True, False])
def test_the_order_of_entities_does_not_matter(records, tokenizer_dir, snap):
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.GELLA.SNAP", snap)
    model, rng = make_model(cfg), np.random.default_rng(0)
    for task in ("ground", "panoptic"):
        batch = batch_of(cfg, records, task)
        orders = [rng.permutation(x["entities"].num_entities) for x in batch]
        moved = [renumbered(x, order) for x, order in zip(batch, orders)]
        assert any((order[:-1] > order[1:]).any() for order in orders)
        logits = [parts(model, views)[2] for views in (batch, moved)]
        for i, (before, after) in enumerate(zip(model(batch), model(moved))):
            count = len(orders[i])
            assert farthest(logits[0][i][:, orders[i]], logits[1][i][:, :count]) < TOLERANCE
            masks = before["instances"].pred_masks[torch.as_tensor(orders[i])]
            assert torch.equal(masks, after["instances"].pred_masks)
            for a, b in zip(before.get("grounding", ()), after.get("grounding", ()), strict=True):
                # By segment id; entities whose scores tie to the last digit may change places.
                a_scores, b_scores = (dict(zip(x["entity_ids"], x["scores"])) for x in (a, b))
                assert set(a_scores) == set(b_scores) and np.array_equal(a["mask"], b["mask"])
                assert all(abs(a_scores[k] - b_scores[k]) < TOLERANCE for k in a_scores)
            if task == "panoptic":
                same_map(before["panoptic_seg"], after["panoptic_seg"])


def same_map(before, after):
    (a, a_info), (b, b_info) = before, after
    pairs = torch.stack([a.flatten(), b.flatten()]).unique(dim=1).T.tolist()
    assert len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})
    of_a, of_b = ({s["id"]: s for s in info} for info in (a_info, b_info))
    for x, y in pairs:
        assert (x == 0) == (y == 0)
        if x:
            assert of_a[x]["category_id"] == of_b[y]["category_id"]
            assert abs(of_a[x]["score"] - of_b[y]["score"]) < TOLERANCE


def train_once(model, batch, half):
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert torch.stack(list(losses.values())).isfinite().all()
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    return {n: float(x.detach()) for n, x in losses.items()}, gradients


# Share of a loss, cosine of a part's gradient. Learned queries attend where their own mask says:
# rounding moves single queries to other masks, of which an image of few nouns has a large share.
HALF = {"entity": (0.02, 0.99), "learned": (0.06, 0.85)}


@pytest.mark.parametrize("task, queries", [
    ("describe", "entity"), ("extract", "entity"), ("ground", "learned"), ("panoptic", "entity"),
])  # fmt: skip
def test_bfloat16_trains_every_task(records, tokenizer_dir, queries, task):
    # Points drawn by chance only, not where the prediction is uncertain.
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.MASK_DECODER.IMPORTANCE_SAMPLE_RATIO", 0.0)
    model, batch = make_model(cfg).train(), batch_of(cfg, records[:3], task, is_train=True)
    train_once(model, batch, half=True)
    # Batch norm over three maps of 3 x 3 cells magnifies any difference: as at inference.
    model.colormap_encoder.eval()
    (losses, gradients), (half_losses, half_gradients) = (
        train_once(model, batch, half) for half in (False, True)
    )
    share, cosine = HALF[queries]
    assert half_losses == pytest.approx(losses, rel=share, abs=share)
    names = {name.split(".")[0] for name in gradients}
    for part in names if task != "describe" else ["language_decoder"]:
        own = [name for name in gradients if name.startswith(f"{part}.")]
        a, b = (torch.cat([g[n].flatten() for n in own]) for g in (gradients, half_gradients))
        assert a.any() and torch.cosine_similarity(a, b, dim=0) > cosine, part


@pytest.mark.parametrize("queries", QUERIES)
def test_bfloat16_grounds_like_float32(records, tokenizer_dir, queries):
    cfg = make_cfg(tokenizer_dir, queries)
    model, batch = make_model(cfg), batch_of(cfg, records, "ground")
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            runs.append(parts(model, batch))
            results = model(batch)
        for inputs, result in zip(batch, results):
            assert len(result["grounding"]) == len(inputs["phrases"])
            assert result["instances"].scores.dtype == torch.float32
    (full, language, logits), (half, half_language, half_logits) = runs
    for i in range(len(batch)):
        valid = full.query_valid[i]
        # Rounded logits would tie. What goes into them has three digits.
        assert half_logits[i].dtype == torch.float32
        error = (logits[i] - half_logits[i])[:, valid].abs()
        assert error.median() < 0.1 and error.max() < (0.2 if queries == "entity" else 1.0)
        a, b = language.seg_embeddings[i], half_language.seg_embeddings[i].float()
        assert torch.cosine_similarity(a, b).min() > 0.999

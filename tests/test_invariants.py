"""What must not change the answers of the whole model: company, padding, mode, numbering, dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_gella import (
    FLUENT,
    NOUNS,
    QUERIES,
    TOLERANCE,
    farthest,
    make_cfg,
    make_mapper,
    make_model,
    make_record,
    same_result,
    teach,
)

from gella.entities.entity_map import EntityMap
from gella.text import prompts

# Size of the picture, entities, nouns: squares, upright and flat ones, all different.
SCENES = [((90, 120), 5, 2), ((40, 160), 1, 6), ((160, 60), 13, 1), ((50, 50), 9, 4)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per scene."""
    folder = tmp_path_factory.mktemp("scenes")
    return [
        make_record(folder, f"scene{i}", size, count, [*NOUNS[i:], *NOUNS][:nouns], seed=i)
        for i, (size, count, nouns) in enumerate(SCENES)
    ]


def batch_of(cfg: Any, records: list, tasks: Any, is_train: bool = False) -> list[dict[str, Any]]:
    mapper = make_mapper(cfg, is_train)
    tasks = [tasks] * len(records) if isinstance(tasks, str) else tasks
    return [mapper(r, task=t, rng_seed=(0, i)) for i, (r, t) in enumerate(zip(records, tasks))]


def of_image(output: Any, i: int, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a `MaskDecoderOutput` says of the valid queries of one image, layer by layer."""
    said = {"query_embeddings": output.query_embeddings[i][valid]}
    for layer, (entity, mask) in enumerate(zip(output.entity_logits, output.mask_logits)):
        said[f"entity_logits_{layer}"] = entity[i][valid]
        said[f"mask_logits_{layer}"] = mask[i][valid]
    return said


@torch.no_grad()
def parts(model: Any, batch: list[dict[str, Any]]) -> tuple[Any, Any, list[torch.Tensor]]:
    """(output of the mask decoder, of the language decoder, association logits) of a batch."""
    output, grid = model.encode(batch)
    language = model.read_answers(batch, grid)
    return output, language, model.association(language.seg_embeddings, output.query_embeddings)


# -- company and padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("queries", QUERIES)
def test_every_tensor_of_a_batch_is_that_of_the_image_alone(records, tokenizer_dir, queries):
    cfg = make_cfg(tokenizer_dir, queries)
    model = make_model(cfg)
    batch = batch_of(cfg, records, "ground")
    assert len({len(x["input_ids"]) for x in batch}) == len(SCENES)
    joint, joint_language, joint_logits = parts(model, batch)
    for i, inputs in enumerate(batch):
        alone, language, (logits,) = parts(model, [inputs])
        valid = joint.query_valid[i]
        assert int(valid.sum()) == (inputs["entities"].num_entities if queries == "entity" else 8)
        assert alone.query_valid.all()
        expected = of_image(alone, 0, alone.query_valid[0])
        for name, found in of_image(joint, i, valid).items():
            assert farthest(expected[name], found, relative=True) < TOLERANCE, (i, name)
        assert farthest(language.seg_embeddings[0], joint_language.seg_embeddings[i]) < TOLERANCE
        assert farthest(logits, joint_logits[i][:, valid]) < TOLERANCE
        assert logits.shape[0] == len(inputs["phrases"]) and logits.std() > 0.01


@torch.no_grad()
def test_a_seg_embedding_is_the_state_right_at_its_token(records, tokenizer_dir):
    """The last state of the prompt that ends there, without company and padding."""
    model = make_model(cfg := make_cfg(tokenizer_dir))
    batch = batch_of(cfg, records, "ground")
    grid = model.encode(batch)[1]
    given = model.read_answers(batch, grid).seg_embeddings
    states: list[torch.Tensor] = []
    handle = model.language_decoder.llama.base_model.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    for i, inputs in enumerate(batch):
        for k, place in enumerate(inputs["seg_positions"].tolist()):
            assert inputs["input_ids"][place] == model.tokenizer.convert_tokens_to_ids("<SEG>")
            short = {key: inputs[key][: place + 1] for key in ("input_ids", "labels")}
            model.read_answers(
                [{**short, "seg_positions": torch.tensor([], dtype=torch.int64)}], grid[i : i + 1]
            )
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
    cfg = make_cfg(tokenizer_dir, queries)
    # Statistics of a batch are of the batch: batch norm as at inference.
    model = make_model(cfg).train()
    model.colormap_encoder.eval()
    batch = batch_of(cfg, records, task, is_train=True)

    def rand(*shape: Any, **options: Any) -> torch.Tensor:
        # The same sample points for every mask, whatever else is in the batch.
        shape = tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape
        row = torch.empty(1, *shape[1:]).uniform_(generator=torch.Generator().manual_seed(3))
        return row.expand(shape).clone()

    monkeypatch.setattr(torch, "rand", rand)
    joint = model(batch)
    singles = [model([inputs]) for inputs in batch]
    for name, loss in joint.items():
        values = torch.stack([losses[name] for losses in singles])
        assert farthest(values.mean(), loss, relative=True) < TOLERANCE, name
        assert values.std() > 0.001  # the images differ


# -- training and inference ------------------------------------------------------------------------


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("arch", ["lcnet_050", "convnext_atto"])
def test_training_and_inference_see_the_same(records, tokenizer_dir, queries, arch, monkeypatch):
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.COLORMAP_ENCODER.ARCH", arch)
    model = make_model(cfg)
    batch = batch_of(cfg, records, "ground")
    seen_by: list[tuple] = []
    encode, association = type(model).encode, model.association.forward

    def seen(self: Any, inputs: Any) -> Any:
        output, grid = encode(self, inputs)
        seen_by.append((output, model.read_answers(inputs, grid)))
        return output, grid

    def associated(nouns: Any, entities: Any) -> Any:
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
        expected = of_image(trained, i, valid)
        for name, found in of_image(shown, i, valid).items():
            assert farthest(expected[name], found, relative=True) < TOLERANCE, name
    assert farthest(language.loss_answer, shown_language.loss_answer) < TOLERANCE


@pytest.fixture(scope="module")
def fluent(records, tokenizer_dir) -> tuple[Any, Any]:
    """(config, model) whose language decoder knows the answers of the extraction prompts."""
    cfg = make_cfg(tokenizer_dir, "entity", *FLUENT)
    model, mapper = make_model(cfg), make_mapper(cfg, is_train=True)
    # The wording that inference uses is the first; the seeds that draw it are found here.
    short = [records[i] for i in (0, 2)]
    shown = make_mapper(cfg, is_train=False)
    lengths = [len(shown(r, task="extract")["input_ids"]) for r in short]
    batch = []
    for record, length in zip(short, lengths):
        views = (mapper(record, task="extract", rng_seed=(0, i)) for i in range(99))
        starts = lambda v: int((v["labels"] != prompts.IGNORE_INDEX).nonzero()[0])  # noqa: E731
        batch.append(next(view for view in views if starts(view) == length))
    teach(model, batch)
    return cfg, model


def test_generated_answers_ground_as_given_ones_alone_and_in_company(records, fluent, monkeypatch):
    cfg, model = fluent
    short = [records[0], records[2]]
    asked, given = (batch_of(cfg, short, task) for task in ("extract", "ground"))
    assert not any(len(x["seg_positions"]) for x in asked)
    embeddings: list[list[torch.Tensor]] = []
    association = type(model.association).forward

    def spy(self: Any, nouns: Any, entities: Any) -> Any:
        embeddings.append(nouns)
        return association(self, nouns, entities)

    monkeypatch.setattr(type(model.association), "forward", spy)
    generated, forced = model(asked), model(given)
    alone = [model([x])[0] for x in asked]
    for i, record in enumerate(short):
        nouns = [phrase["text"] for phrase in record["phrases"]]
        assert generated[i]["text"] == prompts.noun_answer(nouns)  # so the test tests something
        said = generated[i].pop("text")
        assert alone[i].pop("text") == said
        same_result(forced[i], generated[i])
        same_result(forced[i], alone[i])
        own, teacher, single = embeddings[0][i], embeddings[1][i], embeddings[2 + i][0]
        assert len(own) == len(nouns)
        assert farthest(own, teacher) < TOLERANCE and farthest(single, teacher) < TOLERANCE
        assert all(p["start"] >= 0 for p in generated[i]["grounding"])


# -- numbering -------------------------------------------------------------------------------------


def renumbered(inputs: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """The same view with entity `order[k]` in place k; each keeps its pixels, id and colour."""
    place = np.empty(len(order) + 1, np.int32)
    place[0], place[order + 1] = 0, np.arange(1, len(order) + 1)
    changed = {**inputs, "colors": inputs["colors"][order]}
    for key in ("entities", "entities_full"):
        old = inputs[key]
        changed[key] = EntityMap(
            place[old.ids], [old.segment_ids[k] for k in order], old.scores[order]
        )
    return changed


@pytest.mark.parametrize("snap", [True, False])
def test_the_order_of_entities_does_not_matter(records, tokenizer_dir, snap):
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.GELLA.SNAP", snap)
    model = make_model(cfg)
    rng = np.random.default_rng(0)
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


def same_map(before: tuple, after: tuple) -> None:
    """Panoptic maps with the same segments under any numbers."""
    (a, a_info), (b, b_info) = before, after
    pairs = torch.stack([a.flatten(), b.flatten()]).unique(dim=1).T.tolist()
    assert len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})
    of_a, of_b = ({s["id"]: s for s in info} for info in (a_info, b_info))
    for x, y in pairs:
        assert (x == 0) == (y == 0)
        if x:
            assert of_a[x]["category_id"] == of_b[y]["category_id"]
            assert abs(of_a[x]["score"] - of_b[y]["score"]) < TOLERANCE


# -- bfloat16 --------------------------------------------------------------------------------------


def train_once(model: Any, batch: list, half: bool) -> tuple[dict, dict]:
    """Losses and gradients of one step, with the same sample points at every call."""
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
# rounding moves single queries to other masks.
HALF = {"entity": (0.02, 0.99), "learned": (0.06, 0.9)}


@pytest.mark.parametrize(
    ("task", "queries"),
    [("describe", "entity"), ("extract", "entity"), ("ground", "learned"), ("panoptic", "entity")],
)
def test_bfloat16_trains_every_task(records, tokenizer_dir, queries, task):
    # Points drawn by chance only, not where the prediction is uncertain.
    cfg = make_cfg(tokenizer_dir, queries, "MODEL.MASK_DECODER.IMPORTANCE_SAMPLE_RATIO", 0.0)
    model = make_model(cfg).train()
    batch = batch_of(cfg, records[:3], task, is_train=True)
    train_once(model, batch, half=True)
    # Batch norm over three maps of 3 x 3 cells magnifies any difference: as at inference.
    model.colormap_encoder.eval()
    losses, gradients = train_once(model, batch, half=False)
    half_losses, half_gradients = train_once(model, batch, half=True)
    for name, loss in losses.items():
        share = HALF[queries][0]
        assert half_losses[name] == pytest.approx(loss, rel=share, abs=share), name
    parts = {name.split(".")[0] for name in gradients}
    for part in parts if task != "describe" else ["language_decoder"]:
        names = [name for name in gradients if name.startswith(f"{part}.")]
        a, b = (torch.cat([g[n].flatten() for n in names]) for g in (gradients, half_gradients))
        assert a.any() and torch.cosine_similarity(a, b, dim=0) > HALF[queries][1], part


@pytest.mark.parametrize("queries", QUERIES)
def test_bfloat16_grounds_like_float32(records, tokenizer_dir, queries):
    cfg = make_cfg(tokenizer_dir, queries)
    model = make_model(cfg)
    batch = batch_of(cfg, records, "ground")
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
        assert error.median() < 0.05 and error.max() < (0.2 if queries == "entity" else 1.0)
        a, b = language.seg_embeddings[i], half_language.seg_embeddings[i].float()
        assert torch.cosine_similarity(a, b).min() > 0.999

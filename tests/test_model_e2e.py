"""The composed model: one path for training and inference, on real files written by the project."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from tiny_gella import CATEGORIES, NOUNS, TINY, make_cfg, make_mapper, make_model, make_record

from gella import load_config
from gella.modeling.inference import with_answer
from gella.text import prompts

LOSSES = {"loss_entity", "loss_mask", "loss_dice", "loss_association", "loss_answer"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two scenes with different numbers of entities and nouns."""
    folder = tmp_path_factory.mktemp("scenes")
    sizes = [((90, 120), 5, 3), ((96, 64), 9, 2)]
    return [
        make_record(folder, f"scene{i}", size, count, NOUNS[:nouns], seed=i)
        for i, (size, count, nouns) in enumerate(sizes)
    ]


def batch_of(cfg, records, task, is_train=False):
    mapper = make_mapper(cfg, is_train)
    return [mapper(r, task=task, rng_seed=(0, i)) for i, r in enumerate(records)]


@pytest.mark.parametrize("queries", ["entity", "learned"])
@pytest.mark.parametrize("task", ["describe", "extract", "ground", "panoptic"])
def test_every_task_has_the_same_losses_and_reaches_every_parameter(
    records, tokenizer_dir, queries, task
):
    cfg = make_cfg(tokenizer_dir, queries)
    model = make_model(cfg).train()
    losses = model(batch_of(cfg, records, task, is_train=True))
    assert {name.rstrip("_0123456789") for name in losses} == LOSSES
    names = model.criterion.loss_names(model.mask_decoder.num_outputs)
    assert sorted([*names, "loss_answer"]) == sorted(losses)
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []  # DistributedDataParallel would hang on them
    vision = [p.grad.abs().max() for p in model.resoblend.parameters()]
    assert (max(vision) > 0) == (task != "describe")
    zero = [float(losses[n].detach()) == 0 for n in losses if n != "loss_answer"]
    assert all(zero) == (task == "describe") and float(losses["loss_answer"].detach()) > 0


def test_it_learns_a_batch_by_heart(records, tokenizer_dir):
    cfg = make_cfg(tokenizer_dir)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = batch_of(cfg, records, "ground", is_train=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for step in range(40):
        torch.manual_seed(step)
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append({n: float(x.detach()) for n, x in losses.items()})
    first, last = history[0], history[-1]
    for name, share in {"loss_answer": 0.3, "loss_association": 0.7, "loss_dice": 0.7}.items():
        assert last[name] < share * first[name], name


def test_entity_queries_with_snapping_return_the_input_masks(records, tokenizer_dir):
    cfg = make_cfg(tokenizer_dir)
    model = make_model(cfg)
    (inputs,) = batch_of(cfg, records[:1], "ground")
    (output,) = model([inputs])
    entities = inputs["entities_full"]
    for unit in output["grounding"]:
        indices = [entities.index_of(i) for i in unit["entity_ids"]]
        assert np.array_equal(unit["mask"], entities.union(indices))
    assert len(output["instances"]) == entities.num_entities
    assert output["instances"].pred_masks.shape[1:] == (inputs["height"], inputs["width"])
    (inputs,) = batch_of(cfg, records[:1], "panoptic")
    ids, segments = model([inputs])[0]["panoptic_seg"]
    assert ids.dtype == torch.int32 and tuple(ids.shape) == (inputs["height"], inputs["width"])
    assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}
    assert {s["category_id"] for s in segments} <= {c["id"] for c in CATEGORIES}
    assert torch.equal(ids > 0, torch.as_tensor(entities.ids > 0))


def test_generated_and_given_answers_give_the_same_embeddings(records, tokenizer_dir):
    cfg = make_cfg(tokenizer_dir)
    model = make_model(cfg)
    batch = batch_of(cfg, records, "ground")
    grid = model.encode(batch)[1]
    given = model.read_answers(batch, grid)
    for i, inputs in enumerate(batch):
        # Cut the answer off and put it back as if it had been generated.
        start = int((inputs["labels"] != prompts.IGNORE_INDEX).nonzero()[0])
        prompt = {**inputs, "input_ids": inputs["input_ids"][:start]}
        answer = inputs["input_ids"][start:-1]  # without the end token
        rebuilt = with_answer(model.tokenizer, prompt, answer)
        assert [p["text"] for p in rebuilt["phrases"]] == [p["text"] for p in inputs["phrases"]]
        assert rebuilt["text"].count(prompts.SEG_TOKEN) == len(inputs["phrases"])
        single = model.read_answers([rebuilt], grid[i : i + 1])
        assert torch.allclose(single.seg_embeddings[0], given.seg_embeddings[i], atol=1e-5)


def test_extraction_and_description_generate_text_in_mixed_batches(records, tokenizer_dir):
    cfg = make_cfg(tokenizer_dir, "entity", "MODEL.LANGUAGE.MAX_NEW_TOKENS", 8)
    tasks = ("describe", "ground", "extract")
    batch = [batch_of(cfg, records[:1], task)[0] for task in tasks]
    describe, ground, extract = make_model(cfg)(batch)
    assert set(describe) == {"text"}
    assert set(ground) == {"grounding", "instances"}
    assert set(extract) == {"text", "grounding", "instances"}


def test_the_full_size_model_has_the_published_sizes():
    cfg = load_config(TINY.parent / "gella_swin_t.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    # LLaMA-7B has 6,738,415,616 parameters with 32,000 words; <SEG> adds a row of 4,096 to the
    # embedding and one to the output layer.
    assert count(model.language_decoder.llama) == 6_738_415_616 + 2 * 4096
    # open_clip's ViT-L-14-336 image tower; its ln_post and proj are left out.
    assert count(model.image_encoder) == 304_293_888 - 2 * 1024 - 1024 * 768
    shape = model.image_encoder.output_shape()["last"]
    assert (shape.channels, shape.height, shape.width, shape.stride) == (1024, 24, 24, 14)
    assert model.language_decoder.image_tokens(
        torch.empty(1, 1024, 24, 24, device="meta")
    ).shape == (1, 576, 4096)
    # LLaVA-1.5's projector: 1024 -> 4096 -> 4096.
    assert count(model.language_decoder.projector) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert len(model.mask_decoder.transformer.decoder.layers) == 9
    assert len(model.mask_decoder.pixel_decoder.encoder.layers) == 6
    assert {s.channels for s in model.resoblend.output_shape().values()} == {256}
    assert all(p.is_meta for p in model.parameters())

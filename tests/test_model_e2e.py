"""The composed model: one path for training and inference, on real files written by the project."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from gella import add_gella_config
from gella.data.mapper import GroundingMapper
from gella.data.narratives import load_png
from gella.data.panoptic import load_coco_panoptic
from gella.modeling.inference import with_answer
from gella.text import prompts

ROOT = Path(__file__).resolve().parents[1]
LOSSES = {"loss_entity", "loss_mask", "loss_dice", "loss_association", "loss_answer"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and three held-out scenes on disk."""
    path = ROOT / "datasets" / "prepare_shapes.py"
    spec = importlib.util.spec_from_file_location("prepare_shapes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = tmp_path_factory.mktemp("data") / "shapes"
    module.prepare(output, counts={"train": 6, "val": 3}, workers=1)
    return output


def make_cfg(shapes: Path, *opts: Any) -> Any:
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "gella_tiny_shapes.yaml"))
    cfg.merge_from_list(["MODEL.LANGUAGE.TOKENIZER", str(shapes / "tokenizer"), *opts])
    return cfg


def make_model(cfg: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(cfg)


def png_records(shapes: Path, split: str = "val") -> list[dict[str, Any]]:
    annotations = shapes / "annotations"
    return load_png(
        annotations / f"png_shapes_{split}.json",
        annotations / f"panoptic_{split}.json",
        annotations / f"panoptic_{split}",
        shapes / split,
    )


def make_mapper(cfg: Any, shapes: Path, is_train: bool) -> GroundingMapper:
    import json

    categories = json.loads((shapes / "annotations" / "panoptic_val.json").read_text())
    arguments = GroundingMapper.from_config(cfg, is_train, dataset_names=[])
    return GroundingMapper(**{**arguments, "categories": categories["categories"]})


def batch_of(cfg: Any, shapes: Path, task: str, is_train: bool, count: int = 3) -> list[dict]:
    mapper = make_mapper(cfg, shapes, is_train)
    records = png_records(shapes)[:count]
    return [mapper(r, task=task, rng_seed=(0, i)) for i, r in enumerate(records)]


@pytest.mark.parametrize("queries", ["entity", "learned"])
@pytest.mark.parametrize("task", ["describe", "extract", "ground", "panoptic"])
def test_every_task_has_the_same_losses_and_reaches_every_parameter(shapes, queries, task):
    cfg = make_cfg(shapes, "MODEL.MASK_DECODER.QUERIES", queries)
    model = make_model(cfg).train()
    losses = model(batch_of(cfg, shapes, task, is_train=True))
    assert {name.rstrip("_0123456789") for name in losses} == LOSSES
    names = model.criterion.loss_names(model.mask_decoder.num_outputs)
    assert sorted([*names, "loss_answer"]) == sorted(losses)
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []  # DistributedDataParallel would hang on them
    vision = [p.grad.abs().max() for p in model.resoblend.parameters()]
    assert (max(vision) > 0) == (task != "describe")
    assert all(float(losses[n].detach()) == 0 for n in losses if n != "loss_answer") == (
        task == "describe"
    )
    assert float(losses["loss_answer"].detach()) > 0


def test_it_learns_a_batch_by_heart(shapes):
    cfg = make_cfg(shapes)
    model = make_model(cfg).train()
    batch = batch_of(cfg, shapes, "ground", is_train=True, count=2)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for step in range(90):
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


@pytest.mark.parametrize("queries", ["entity", "learned"])
def test_a_batch_gives_what_its_images_give_alone(shapes, queries):
    cfg = make_cfg(
        shapes, "MODEL.MASK_DECODER.QUERIES", queries, "MODEL.GELLA.ENTITY_SCORE_THRESHOLD", 0.0
    )
    model = make_model(cfg).eval()
    batch = batch_of(cfg, shapes, "ground", is_train=False)
    assert len({x["entities"].num_entities for x in batch}) > 1  # padding takes part
    for inputs, joint in zip(batch, model(batch)):
        (alone,) = model([inputs])
        assert len(joint["grounding"]) == len(inputs["phrases"])
        for a, b in zip(joint["grounding"], alone["grounding"]):
            assert a["entity_ids"] == b["entity_ids"]
            assert np.allclose(a["scores"], b["scores"], atol=1e-5)
            assert np.array_equal(a["mask"], b["mask"])
        difference = joint["instances"].pred_masks ^ alone["instances"].pred_masks
        assert difference.float().mean() < 1e-3


def test_entity_queries_with_snapping_return_the_input_masks(shapes):
    cfg = make_cfg(shapes)
    model = make_model(cfg).eval()
    (inputs,) = batch_of(cfg, shapes, "ground", is_train=False, count=1)
    (output,) = model([inputs])
    entities = inputs["entities_full"]
    for unit in output["grounding"]:
        indices = [entities.index_of(i) for i in unit["entity_ids"]]
        assert np.array_equal(unit["mask"], entities.union(indices))
    assert len(output["instances"]) == entities.num_entities
    assert output["instances"].pred_masks.shape[1:] == (inputs["height"], inputs["width"])


def test_panoptic_covers_the_entities_with_known_categories(shapes):
    cfg = make_cfg(shapes)
    model = make_model(cfg).eval()
    mapper = make_mapper(cfg, shapes, is_train=False)
    annotations = shapes / "annotations"
    record = load_coco_panoptic(
        annotations / "panoptic_val.json", annotations / "panoptic_val", shapes / "val"
    )[0]
    inputs = mapper(record, task="panoptic")
    ids, segments = model([inputs])[0]["panoptic_seg"]
    assert ids.dtype == torch.int32 and tuple(ids.shape) == (record["height"], record["width"])
    assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}
    known = {c["id"] for c in mapper.categories}
    assert {s["category_id"] for s in segments} <= known
    assert torch.equal(ids > 0, torch.as_tensor(inputs["entities_full"].ids > 0))


def test_generated_and_given_answers_give_the_same_embeddings(shapes):
    cfg = make_cfg(shapes)
    model = make_model(cfg).eval()
    batch = batch_of(cfg, shapes, "ground", is_train=False, count=2)
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


def test_extraction_and_description_generate_text_in_mixed_batches(shapes):
    cfg = make_cfg(shapes, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 8)
    model = make_model(cfg).eval()
    batch = [batch_of(cfg, shapes, t, False, 1)[0] for t in ("describe", "ground", "extract")]
    describe, ground, extract = model(batch)
    assert set(describe) == {"text"}
    assert set(ground) == {"grounding", "instances"}
    assert set(extract) == {"text", "grounding", "instances"}


def test_bfloat16_autocast_trains(shapes):
    cfg = make_cfg(shapes)
    model = make_model(cfg).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch_of(cfg, shapes, "ground", is_train=True, count=2))
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_full_size_model_has_the_published_sizes():
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "gella_swin_t.yaml"))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    # LLaMA-7B has 6,738,415,616 parameters with 32,000 words; <SEG> adds a row of 4,096 to the
    # embedding and one to the output layer.
    assert count(model.language_decoder.llama) == 6_738_415_616 + 2 * 4096
    # ViT-L/14-336's vision tower: 24 layers of 12,596,224, patch, class and position embeddings.
    layers = 24 * (4 * 1024**2 + 4 * 1024 + 8 * 1024**2 + 4096 + 1024 + 4 * 1024)
    embeddings = 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 1024
    assert count(model.image_encoder) == layers + embeddings
    # LLaVA-1.5's projector: 1024 -> 4096 -> 4096.
    assert count(model.language_decoder.projector) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert all(p.is_meta for p in model.parameters())

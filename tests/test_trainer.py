"""The trainer's own parts on a toy model: groups, clipping, seeding, exact resume, results."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.solver import build_lr_scheduler
from torch import nn
from toy_run import ToyRunLoader, toy_config, toy_run

from gella.engine.optimizer import build_optimizer, role_of, split_language, with_epochs
from gella.engine.step import StepTrainer
from gella.engine.trainer import load_records
from gella.weights.mask2former import Mask2FormerTransformers, MaskFormerHeadUpstream


@pytest.fixture
def cfg(tmp_path):
    """A config of ten iterations of the toy, with two test sets and clipping."""
    cfg = toy_config(tmp_path, 10)
    cfg.DATASETS.TEST = ("first", "second")
    cfg.SOLVER.STEPS, cfg.SOLVER.CLIP_GRADIENTS.ENABLED = (8,), True
    return cfg


class Parts(nn.Module):
    """Parameters of every kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.level_embed = nn.Parameter(torch.randn(2, 6))
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.language_decoder = nn.Linear(6, 1)


def draws(monkeypatch, seed=1, iteration=5, rank=0, accumulate=1):
    """Random numbers of torch and NumPy in each part of an iteration."""
    monkeypatch.setattr("gella.engine.step.comm.get_rank", lambda: rank)
    model, numbers = nn.Linear(1, 1), []

    def forward(module, batch, losses):
        numbers.append((torch.rand(4).tolist(), np.random.rand(), random.random()))
        return losses.sum()

    model.register_forward_hook(forward)
    batches = iter([torch.ones(4, 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = StepTrainer(model, batches, optimizer, accumulate=accumulate, seed=seed)
    step._write_metrics = lambda *args: None
    step.iter = iteration
    torch.rand(iteration + 3), np.random.rand(), random.random()  # wherever the generators stand
    step.run_step()
    return numbers


def test_random_numbers_depend_on_seed_and_iteration_only(monkeypatch):
    assert draws(monkeypatch) == draws(monkeypatch)
    for one, other in zip(draws(monkeypatch)[0], draws(monkeypatch, iteration=6)[0]):
        assert one != other
    assert draws(monkeypatch) != draws(monkeypatch, seed=2)
    torch.manual_seed(0)
    torch.rand(8), nn.Linear(1, 1)
    free = torch.rand(4).tolist()
    torch.manual_seed(0)
    assert draws(monkeypatch, seed=-1)[0][0] == free


def test_ranks_draw_what_one_process_draws_part_by_part(monkeypatch):
    alone = draws(monkeypatch, accumulate=4)
    assert alone == [x for rank in range(2) for x in draws(monkeypatch, rank=rank, accumulate=2)]
    assert alone == [draws(monkeypatch, rank=rank)[0] for rank in range(4)]
    assert len({str(part) for part in alone}) == 4


def test_optimizer_groups(cfg):
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    cfg.SOLVER.LANGUAGE_MULTIPLIER = 2.0
    cfg.SOLVER.VISION_MULTIPLIER = 0.5
    cfg.SOLVER.HEADS_MULTIPLIER = 3.0
    model = Parts()
    model.association = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    vision, language = pytest.approx(0.025), pytest.approx(0.1)
    assert found == {
        "embedding.weight": (vision, 0.0),
        "level_embed": (vision, 0.0),
        "norm.weight": (vision, 0.0),
        "norm.bias": (vision, 0.0),
        "language_decoder.weight": (language, 0.05),
        "language_decoder.bias": (language, 0.0),
        "association.weight": (pytest.approx(0.15), 0.05),
    }  # frozen.* is absent
    assert {g["name"]: g["role"] for g in optimizer.param_groups} == {
        "heads": "heads",
        "language": "language",
        "language_no_decay": "language",
        "vision_no_decay": "vision",
    }


def test_roles():
    names = ["language_decoder.projector.0.weight", "resoblend.x", "association.scale"]
    names += ["mask_decoder.entity_head.bias", "mask_decoder.entity_queries.embedding"]
    names += ["mask_decoder.pixel_decoder.x", "image_encoder.x", "colormap_encoder.x"]
    heads = ["heads"] * 4
    assert [role_of(n) for n in names] == ["language", *heads, "vision", "vision", "vision"]


@pytest.mark.parametrize("layout", [Mask2FormerTransformers, MaskFormerHeadUpstream])
def test_what_the_public_weights_leave_out_is_of_the_heads(layout):
    for pattern in layout(queries="entity").fresh:
        assert role_of(pattern.replace("*", "1")) == "heads", pattern
    kept = ["input_projections.0.1.weight", "input_projections.1.1.bias", "adapter_1.1.weight"]
    assert {role_of(f"mask_decoder.pixel_decoder.{name}") for name in kept} == {"vision"}


def test_split_language_keeps_the_schedule_in_one_place(cfg):
    cfg.SOLVER.LANGUAGE_MULTIPLIER = 2.0
    model = Parts()
    whole = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, whole)
    language, sources = split_language(whole)
    held = {id(p) for group in language.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.language_decoder.parameters()}
    left = {id(p) for group in whole.param_groups for p in group["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert left == trained - held and len(whole.param_groups) == 3
    (-model.norm.weight.sum()).backward()
    whole.step()  # also with groups that are empty
    whole.load_state_dict(whole.state_dict())
    scheduler.step()
    assert [whole.param_groups[i]["name"] for i in sources] == ["language_no_decay", "language"]
    for i in sources:
        assert whole.param_groups[i]["lr"] == pytest.approx(2 * whole.param_groups[-1]["lr"])
    with pytest.raises(ValueError, match="language side"):
        split_language(whole)


def test_epochs_become_iterations(cfg):
    assert with_epochs(cfg, 100) is cfg
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 40_000, (30_000,)  # as Detectron2 has them
    cfg.SOLVER.EPOCHS, cfg.SOLVER.STEP_EPOCHS, cfg.SOLVER.IMS_PER_BATCH = 50, (46, 48), 16
    found = with_epochs(cfg, 134_272).SOLVER
    assert (found.MAX_ITER, found.STEPS) == (419_600, (386_032, 402_816))
    cfg.SOLVER.EPOCHS, cfg.SOLVER.STEP_EPOCHS = 2, (1,)
    found = with_epochs(cfg, 25).SOLVER  # 1.56 iterations an epoch: the second ends in the fourth
    assert (found.MAX_ITER, found.STEPS) == (4, (2,))
    cfg.SOLVER.EPOCH_SIZE = 160
    assert with_epochs(cfg, 25).SOLVER.MAX_ITER == 20
    for wrong in [(2,), (0,), (1, 1), (1.5, 1)]:
        cfg.SOLVER.STEP_EPOCHS = wrong
        with pytest.raises(ValueError, match="SOLVER.STEP_EPOCHS"):
            with_epochs(cfg, 25)


def test_epochs_and_iterations_cannot_contradict_each_other(cfg):
    cfg.SOLVER.EPOCHS, cfg.SOLVER.STEP_EPOCHS, cfg.SOLVER.EPOCH_SIZE = 2, (1,), 80
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 40, [20]  # what a checkpoint's config.yaml says
    assert with_epochs(cfg, 25).SOLVER.MAX_ITER == 40
    for key, wrong in [("MAX_ITER", 20), ("STEPS", (10,))]:
        changed = cfg.clone()
        changed.SOLVER[key] = wrong
        with pytest.raises(ValueError, match=rf"EPOCHS 2 makes SOLVER.{key} .*, but .*EPOCHS 0"):
            with_epochs(changed, 25)
        changed.SOLVER.EPOCHS = 0
        assert with_epochs(changed, 25).SOLVER[key] == wrong


def test_epochs_end_the_run(cfg, monkeypatch, gella_log):
    monkeypatch.setattr(ToyRunLoader, "dataset", range(12), raising=False)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 40_000, (30_000,)
    cfg.SOLVER.EPOCHS, cfg.SOLVER.STEP_EPOCHS, cfg.SOLVER.WARMUP_ITERS = 3, (2,), 0
    trainer = toy_run(cfg)
    assert "3 epochs of 12 images" in gella_log.text and "SOLVER.MAX_ITER 9" in gella_log.text
    trainer.train()
    rates = [rate for rate, _ in trainer.storage.history("lr_vision").values()]
    assert rates == pytest.approx([0.05] * 6 + [0.005] * 3)


def test_accumulation_makes_the_step_of_the_whole_batch(cfg, tmp_path):
    trainers = []
    for cfg.SOLVER.ACCUMULATE in (1, 4):
        cfg.OUTPUT_DIR = str(tmp_path / str(cfg.SOLVER.ACCUMULATE))
        trainer = toy_run(cfg)
        trainer.model.dropout.p, trainer.model.norm = 0.0, nn.Identity()
        trainer.train()
        trainers.append(trainer)
    one, four = (dict(trainer.model.named_parameters()) for trainer in trainers)
    for name, value in one.items():
        torch.testing.assert_close(value, four[name], rtol=0, atol=2e-6)
    one, four = ([v for v, _ in t.storage.history("total_loss").values()] for t in trainers)
    assert len(one) == 10 and one == pytest.approx(four, rel=1e-4)


def test_a_batch_that_cannot_be_divided(cfg):
    cfg.SOLVER.ACCUMULATE = 3
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 4, SOLVER.ACCUMULATE 3 and 1 process"):
        toy_run(cfg)


def test_a_key_of_older_runs_is_read_and_a_frozen_model_refused(cfg):
    cfg.merge_from_list(["SOLVER.OPTIMIZER", "ADAMW"])
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer(cfg, Parts().requires_grad_(False))


def test_training_clips_logs_and_evaluates(cfg):
    """after_backward of outer hooks is reached, and the results of all datasets are merged."""
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "full_model", 1e-6
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    norms = []

    class Watch(HookBase):
        def after_step(self):
            parameters = self.trainer.model.parameters()
            grads = [p.grad.flatten() for p in parameters if p.grad is not None]
            norms.append(float(torch.cat(grads).norm()))

    trainer = toy_run(cfg)
    trainer.register_hooks([Watch()])
    results = trainer.train()
    assert len(norms) == 10 and max(norms) <= 1.01e-6
    assert results == {"seen": {"n": 6.0}, "seen@second": {"n": 6.0}}
    with open(f"{cfg.OUTPUT_DIR}/metrics.json", encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    assert any(line.get("grad_norm", 0) > 1e-4 for line in lines)  # before clipping
    assert any("total_loss" in line for line in lines)


def test_results_of_one_dataset_are_by_task(cfg):
    cfg.DATASETS.TEST = ("only",)
    trainer = toy_run(cfg)
    assert trainer.test(cfg, trainer.model) == {"seen": {"n": 6.0}}


def test_amp_needs_cuda(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(ValueError, match="AMP.ENABLED needs a CUDA device"):
        toy_run(cfg)


def test_load_records():
    shared = {"file_name": "a.png", "height": 1, "width": 1, "tasks": (), "entities": {"source": 0}}
    two = [{**shared, "image_id": 1}, {**shared, "image_id": 2}]
    DatasetCatalog.register("gella_test_two", lambda: two)
    DatasetCatalog.register("gella_test_none", list)
    try:
        assert [r["image_id"] for r in load_records(["gella_test_two"] * 2, "K")] == [1, 2, 1, 2]
        with pytest.raises(ValueError, match="K is empty"):
            load_records((), "K")
        with pytest.raises(ValueError, match="has no record"):
            load_records(["gella_test_none"], "K")
        with pytest.raises(ValueError, match="gella_test_absent is not registered"):
            load_records(["gella_test_absent"], "K")
    finally:
        DatasetCatalog.remove("gella_test_two")
        DatasetCatalog.remove("gella_test_none")

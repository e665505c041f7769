"""The trainer's own parts on a toy model: groups, clipping, seeding, exact resume, results."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from gella import add_gella_config
from gella.trainer import (
    GellaTrainer,
    GradientClipper,
    IterationSeed,
    build_optimizer,
    load_records,
)

TOY = "GellaTrainerToy"


class Toy(nn.Module):
    """Dropout makes it draw random numbers, so a resume that restores none of them shows."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.level_embed = nn.Parameter(torch.randn(2, 6))
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(0.4)
        self.language_decoder = nn.Linear(6, 1)

    def forward(self, batch):
        numbers = torch.tensor([item["number"] for item in batch])
        x = self.norm(self.embedding(numbers % 10) + self.level_embed.sum(0) + self.frozen.bias)
        y = self.language_decoder(self.dropout(x))[:, 0]
        if not self.training:
            return [{"value": float(v)} for v in y]
        return {"loss_toy": (y - numbers / 10).square().mean()}


if TOY not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY._do_register(TOY, Toy)


class ToyLoader:
    """Batch i holds numbers that depend on i alone; worker processes read ahead."""

    def __init__(self, workers):
        self.start_iteration = 0
        self._workers = workers

    def __iter__(self):
        batches = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(self.start_iteration, 40)]
        return iter(
            torch.utils.data.DataLoader(
                [{"number": n} for n in range(120)],
                batch_sampler=batches,
                collate_fn=list,
                num_workers=self._workers,
            )
        )


class Counter(DatasetEvaluator):
    """Counts the images that it is shown."""

    def __init__(self, task):
        self._task = task

    def reset(self):
        self._count = 0

    def process(self, inputs, outputs):
        self._count += len(outputs)

    def evaluate(self):
        return {self._task: {"n": float(self._count)}}


class ToyTrainer(GellaTrainer):
    """Our trainer with the toy's data."""

    @classmethod
    def build_train_loader(cls, cfg):
        return ToyLoader(cfg.DATALOADER.NUM_WORKERS)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[{"number": 1}], [{"number": 2}]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Counter("toy")


@pytest.fixture
def cfg(tmp_path):
    """A config of ten iterations on the CPU."""
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = TOY
    cfg.MODEL.DEVICE = "cpu"
    cfg.SEED = 7
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TEST = ("first", "second")
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MAX_ITER = 10
    cfg.SOLVER.STEPS = (8,)
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.OUTPUT_DIR = str(tmp_path / "whole")
    return cfg


class DieAt(HookBase):
    """Ends the run in the middle, between two checkpoints."""

    def __init__(self, iteration):
        self._iteration = iteration

    def after_step(self):
        if self.trainer.iter == self._iteration:
            raise KeyboardInterrupt


def start(cfg, seed=0):
    """A trainer whose initial weights depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return ToyTrainer(cfg)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_to_exactly_the_same_weights(cfg, tmp_path, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    whole = start(cfg)
    whole.resume_or_load(resume=False)
    whole.train()

    cfg.OUTPUT_DIR = str(tmp_path / "cut")
    cut = start(cfg)
    cut.register_hooks([DieAt(7)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    torch.rand(17)  # the generators are elsewhere when the run is resumed
    again = start(cfg, seed=99)
    again.resume_or_load(resume=True)
    assert again.start_iter == 6  # the checkpoint of iteration 5, not the death at 7
    again.train()

    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b), name
    rates = [[g["lr"] for g in t.optimizer.param_groups] for t in (whole, again)]
    assert rates[0] == rates[1]


def test_without_the_start_iteration_the_resume_would_differ(cfg, tmp_path, monkeypatch):
    """The test above is able to fail: the same run with the wrong data gives other weights."""
    whole = start(cfg)
    whole.train()
    cfg.OUTPUT_DIR = str(tmp_path / "cut")
    cut = start(cfg)
    cut.register_hooks([DieAt(7)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = start(cfg)
    again.resume_or_load(resume=True)
    DefaultTrainer.train(again)  # skips our train()
    assert not torch.equal(whole.model.embedding.weight, again.model.embedding.weight)


def test_random_numbers_depend_on_seed_and_iteration_only(cfg):
    def draws(seed, iteration):
        hook = IterationSeed(seed)
        model = nn.Dropout(0.5)
        hook.trainer = SimpleNamespace(model=model, iter=iteration)
        hook.before_train()
        torch.rand(iteration + 3)
        out = model(torch.ones(64)), np.random.rand()
        hook.after_train()
        assert not model._forward_pre_hooks
        return out

    assert torch.equal(draws(1, 5)[0], draws(1, 5)[0])
    assert draws(1, 5)[1] == draws(1, 5)[1]
    assert not torch.equal(draws(1, 5)[0], draws(1, 6)[0])
    assert not torch.equal(draws(1, 5)[0], draws(2, 5)[0])
    torch.manual_seed(0)
    free = torch.rand(8)
    torch.manual_seed(0)
    hook = IterationSeed(-1)
    hook.trainer = SimpleNamespace(model=nn.Identity(), iter=0)
    hook.before_train()
    assert torch.equal(hook.trainer.model(torch.rand(8)), free)


def test_evaluation_leaves_the_generators_alone():
    model = nn.Identity()
    hook = IterationSeed(3)
    hook.trainer = SimpleNamespace(model=model, iter=0)
    hook.before_train()
    model.eval()
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    model(torch.zeros(1))
    assert torch.equal(torch.rand(4), expected)


def test_optimizer_groups(cfg):
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    cfg.SOLVER.LANGUAGE_MULTIPLIER = 2.0
    cfg.SOLVER.VISION_MULTIPLIER = 0.5
    model = Toy(cfg)
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
    }  # frozen.* is absent


def test_optimizer_refuses_what_it_does_not_know(cfg):
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER is 'LION'"):
        build_optimizer(cfg, Toy(cfg))
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer(cfg, Toy(cfg).requires_grad_(False))


def clip(model, *args):
    """Clip the gradients of a model as a hook of a trainer would; returns the logged norm."""
    logged = {}
    inner = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), 1.0))
    hook = GradientClipper(*args)
    storage = SimpleNamespace(put_scalar=logged.__setitem__)
    hook.trainer = SimpleNamespace(_trainer=inner, storage=storage)
    hook.after_backward()
    return logged["grad_norm"]


def test_clipping_by_the_norm_of_the_whole_model():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    assert clip(model, "full_model", 1.0, 2.0) == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.8]))
    assert clip(model, "full_model", 10.0, 2.0) == pytest.approx(1.0)
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.8]))  # below the limit: untouched
    model.bias.grad = torch.tensor([4.0])
    clip(model, "norm", 2.0, 2.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([2.0]))
    clip(model, "value", 0.5, 2.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.5, 0.0]]))
    with pytest.raises(ValueError, match="CLIP_TYPE is 'both'"):
        GradientClipper("both", 1.0, 2.0)


def test_training_clips_logs_and_evaluates(cfg):
    """after_backward of outer hooks is reached, and the results of all datasets are merged."""
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-6
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    norms = []

    class Watch(HookBase):
        def after_step(self):
            parameters = self.trainer.model.parameters()
            grads = [p.grad.flatten() for p in parameters if p.grad is not None]
            norms.append(float(torch.cat(grads).norm()))

    trainer = start(cfg)
    trainer.register_hooks([Watch()])
    results = trainer.train()
    assert len(norms) == 10 and max(norms) <= 1.01e-6
    assert results == {"toy": {"n": 2.0}, "toy@second": {"n": 2.0}}
    with open(f"{cfg.OUTPUT_DIR}/metrics.json", encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    assert any(line.get("grad_norm", 0) > 1e-4 for line in lines)  # before clipping
    assert any("total_loss" in line for line in lines)


def test_results_of_one_dataset_are_by_task(cfg):
    cfg.DATASETS.TEST = ("only",)
    trainer = start(cfg)
    assert trainer.test(cfg, trainer.model) == {"toy": {"n": 2.0}}


def test_amp_needs_cuda(cfg):
    cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(ValueError, match="AMP.ENABLED needs a CUDA device"):
        ToyTrainer(cfg)


def test_load_records():
    DatasetCatalog.register("gella_test_two", lambda: [{"image_id": 1}, {"image_id": 2}])
    DatasetCatalog.register("gella_test_none", list)
    try:
        assert [r["image_id"] for r in load_records(["gella_test_two"] * 2, "K")] == [1, 2, 1, 2]
        with pytest.raises(ValueError, match="K is empty"):
            load_records((), "K")
        with pytest.raises(ValueError, match="has no record"):
            load_records(["gella_test_none"], "K")
        with pytest.raises(KeyError, match="gella_test_absent"):
            load_records(["gella_test_absent"], "K")
    finally:
        DatasetCatalog.remove("gella_test_two")
        DatasetCatalog.remove("gella_test_none")

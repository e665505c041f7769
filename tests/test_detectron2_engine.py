"""Detectron2's training loop, trainers and checkpoints.

Every test holds for the small core and for the real Detectron2 alike (run with either first on
the path), which is what makes the core a stand-in. Expected values are written out, not computed
by the code under test.
"""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    hooks,
)
from detectron2.modeling import (
    META_ARCH_REGISTRY,
)
from detectron2.utils.events import (
    has_event_storage,
)
from detectron2_toys import Loader, SumEvaluator, ToyModel, solver_config
from torch import nn


def _register(registry, name, thing):
    if name not in registry:
        registry._do_register(name, thing)


_register(META_ARCH_REGISTRY, "CoreTestModel", ToyModel)


class _Recorder(HookBase):
    def __init__(self, log, name):
        self.log, self.name = log, name

    def before_train(self):
        self.log.append((self.name, "before_train", self.trainer.iter))

    def after_train(self):
        self.log.append((self.name, "after_train", self.trainer.iter))

    def before_step(self):
        assert self.trainer.storage.iter == self.trainer.iter
        self.log.append((self.name, "before_step", self.trainer.iter))

    def after_backward(self):
        self.log.append((self.name, "after_backward", self.trainer.iter))

    def after_step(self):
        self.log.append((self.name, "after_step", self.trainer.iter))


class _Steps(TrainerBase):
    def __init__(self, log, fail_at=None):
        super().__init__()
        self.log, self.fail_at = log, fail_at

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("step failed")
        self.log.append(("", "run_step", self.iter))


def test_hooks_run_in_order():
    log = []
    trainer = _Steps(log)
    trainer.register_hooks([_Recorder(log, "a"), None, _Recorder(log, "b")])
    trainer.train(3, 5)
    expected = [("a", "before_train", 3), ("b", "before_train", 3)]
    for i in (3, 4):
        expected += [("a", "before_step", i), ("b", "before_step", i), ("", "run_step", i)]
        expected += [("a", "after_step", i), ("b", "after_step", i)]
    expected += [("a", "after_train", 5), ("b", "after_train", 5)]
    assert log == expected and trainer.iter == 5 and trainer.start_iter == 3


def test_after_train_runs_after_a_failure_and_the_error_is_kept():
    log, evaluated = [], []
    trainer = _Steps(log, fail_at=1)
    trainer.register_hooks([_Recorder(log, "a"), hooks.EvalHook(0, lambda: evaluated.append(1))])
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(0, 3)
    assert log[-1] == ("a", "after_train", 1) and not evaluated and not has_event_storage()


def test_eval_hook_times_and_stores_flat_results():
    log, seen = [], []
    trainer = _Steps(log)

    def evaluate():
        seen.append(trainer.iter)
        return {"task": {"ap": float(len(seen))}}

    trainer.register_hooks([hooks.EvalHook(2, evaluate)])
    trainer.train(0, 6)
    assert seen == [1, 3, 6]  # the last one after the training, not at iteration 5
    assert trainer.storage.latest()["task/ap"] == (3.0, 6)
    bad = _Steps([])
    bad.register_hooks([hooks.EvalHook(1, lambda: {"task": "text"}, eval_after_train=False)])
    with pytest.raises(ValueError, match="text"):
        bad.train(0, 2)


def test_simple_trainer_step_metrics_and_state():
    model = ToyModel(None)
    start = model.weight.detach().clone()
    trainer = SimpleTrainer(model, Loader(2), torch.optim.SGD(model.parameters(), lr=0.1))
    log = []
    trainer.register_hooks([_Recorder(log, "a")])
    trainer.train(0, 1)
    target = ((7 * 2) % 5 + 2 % 3) / 2
    gradient = 2 * (start - target) + start.sign()
    assert torch.allclose(model.weight, start - 0.1 * gradient)
    assert [point for _, point, _ in log] == [
        "before_train",
        "before_step",
        "after_backward",
        "after_step",
        "after_train",
    ]
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    loss_a, loss_b = ((start - target) ** 2).sum().item(), start.abs().sum().item()
    assert latest["loss_a"] == pytest.approx(loss_a) and latest["loss_b"] == pytest.approx(loss_b)
    assert latest["total_loss"] == pytest.approx(loss_a + loss_b) and latest["data_time"] >= 0
    state = trainer.state_dict()
    assert set(state) == {"iteration", "optimizer"} and state["iteration"] == 1
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.train(1, 2)


def test_simple_trainer_iterator_is_lazy_period_and_nan():
    opened = []

    class Opens(Loader):
        def __iter__(self):
            opened.append(1)
            return super().__iter__()

    model = ToyModel(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = SimpleTrainer(
        model, Opens(), optimizer, gather_metric_period=2, zero_grad_before_forward=True
    )
    assert not opened
    trainer.train(0, 3)
    assert opened == [1]
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [1]
    with torch.no_grad():
        model.weight[0] = math.nan
    with pytest.raises(FloatingPointError):
        trainer.train(0, 2)


class _Trainer(DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), lr=cfg.SOLVER.BASE_LR, momentum=0.9)

    @classmethod
    def build_train_loader(cls, cfg):
        return Loader()

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        data = [torch.tensor(float(i)) for i in range(3)]
        return build_detection_test_loader(data, mapper=None, batch_size=2)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return SumEvaluator()


def _train_config(folder, **solver):
    cfg = solver_config(BASE_LR=0.05, MAX_ITER=8, STEPS=(5,), WARMUP_ITERS=3, **solver)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "CoreTestModel"
    cfg.DATASETS.TEST = ("core_test_eval",)
    cfg.OUTPUT_DIR = str(folder)
    os.makedirs(folder, exist_ok=True)
    return cfg


def _load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def test_default_trainer_files_hooks_and_results(tmp_path):
    cfg = _train_config(tmp_path / "run", CHECKPOINT_PERIOD=3)
    cfg.TEST.EVAL_PERIOD = 4
    cfg.TEST.EXPECTED_RESULTS = [["sum", "count", 3.0, 0.0]]
    trainer = _Trainer(cfg)
    names = [type(hook).__name__ for hook in trainer._hooks]
    assert [name for name in names if name != "NoneType"] == [
        "IterationTimer",
        "LRScheduler",
        "PeriodicCheckpointer",
        "EvalHook",
        "PeriodicWriter",
    ]
    assert trainer.model is trainer._trainer.model and isinstance(trainer._trainer, SimpleTrainer)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["sum"]["count"] == 3.0
    files = sorted(name for name in os.listdir(cfg.OUTPUT_DIR) if name.endswith(".pth"))
    assert files == ["model_0000002.pth", "model_0000005.pth", "model_final.pth"]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    checkpoint = _load(tmp_path / "run" / "model_0000005.pth")
    assert set(checkpoint) == {"model", "trainer", "iteration"} and checkpoint["iteration"] == 5
    assert set(checkpoint["model"]) == {"weight", "pixel_mean"}
    state = checkpoint["trainer"]
    assert set(state) == {"iteration", "hooks", "_trainer"} and state["iteration"] == 5
    # a checkpoint is written after the scheduler's step: it holds the next iteration's rate
    assert state["hooks"] == {"LRScheduler": {"base_lrs": [0.05], "last_epoch": 6}}
    assert set(state["_trainer"]) == {"iteration", "optimizer"}
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.json")]
    last = [row for row in rows if row["iteration"] == 7][0]
    assert {"total_loss", "loss_a", "loss_b", "lr", "time", "data_time"} <= set(last)
    assert last["lr"] == pytest.approx(0.005)
    scores = {row["iteration"]: row for row in rows if "sum/total" in row}
    assert set(scores) == {3, 8} or set(scores) == {8}  # 3 is written only if a write falls on it
    assert any("tfevents" in name for name in os.listdir(cfg.OUTPUT_DIR))


def test_default_trainer_resumes_exactly(tmp_path):
    whole = _Trainer(_train_config(tmp_path / "whole"))
    whole.resume_or_load(resume=True)
    assert whole.start_iter == 0
    whole.train()

    class Interrupt(HookBase):
        def after_step(self):
            if self.trainer.iter == 5:
                raise KeyboardInterrupt

    first = _Trainer(_train_config(tmp_path / "parts", CHECKPOINT_PERIOD=4))
    first.register_hooks([Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000003.pth"
    second = _Trainer(_train_config(tmp_path / "parts", CHECKPOINT_PERIOD=4))
    second.resume_or_load(resume=True)
    assert second.start_iter == 4
    second.data_loader.start = second.start_iter
    second.train()
    assert torch.equal(second.model.weight, whole.model.weight)
    end = [_load(tmp_path / part / "model_final.pth")["trainer"] for part in ("whole", "parts")]
    assert end[0]["hooks"] == end[1]["hooks"] and end[0]["iteration"] == end[1]["iteration"]
    momenta = [state["_trainer"]["optimizer"]["state"][0]["momentum_buffer"] for state in end]
    assert torch.equal(*momenta)


def test_weights_are_loaded_without_the_training_state(tmp_path):
    trainer = _Trainer(_train_config(tmp_path / "first"))
    trainer.train()
    cfg = _train_config(tmp_path / "second")
    cfg.MODEL.WEIGHTS = str(tmp_path / "first" / "model_final.pth")
    other = _Trainer(cfg)
    other.resume_or_load(resume=True)  # no checkpoint of its own yet
    assert other.start_iter == 0 and other.scheduler.last_epoch == 0
    assert torch.equal(other.model.weight, trainer.model.weight)


def test_default_trainer_test_without_evaluator_and_with_several_sets(tmp_path):
    cfg = _train_config(tmp_path)
    model = ToyModel(None)

    class NoEvaluator(_Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            raise NotImplementedError

    assert NoEvaluator.test(cfg, model) == {}
    cfg.DATASETS.TEST = ("core_test_one", "core_test_two")
    assert set(_Trainer.test(cfg, model)) == {"core_test_one", "core_test_two"}
    with pytest.raises(AssertionError):
        _Trainer.test(cfg, model, evaluators=[SumEvaluator()])
    with pytest.raises(NotImplementedError):
        DefaultTrainer.build_evaluator(cfg, "x")


def test_checkpointer_layout_and_prefix(tmp_path):
    model = ToyModel(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    assert not checkpointer.has_checkpoint()
    checkpointer.save("named", note=4)
    checkpoint = _load(tmp_path / "named.pth")
    assert set(checkpoint) == {"model", "optimizer", "note"} and checkpoint["note"] == 4
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "named.pth")
    assert checkpointer.resume_or_load("", resume=True) == {"note": 4}
    # a bare state dict, saved from a wrapped model
    bare = {f"module.{k}": v + 1 for k, v in model.state_dict().items()}
    torch.save(bare, tmp_path / "bare.pth")
    other = ToyModel(None)
    DetectionCheckpointer(other).load(str(tmp_path / "bare.pth"))
    assert torch.equal(other.weight, model.weight + 1)
    DetectionCheckpointer(other, str(tmp_path / "off"), save_to_disk=False).save("x")
    assert not (tmp_path / "off").exists()
    assert DetectionCheckpointer(other).load("") == {}
    with pytest.raises(AssertionError):
        DetectionCheckpointer(other).load(str(tmp_path / "none.pth"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="AMPTrainer runs on a GPU only")
def test_amp_trainer_on_a_gpu():
    from detectron2.engine import AMPTrainer

    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.seen = []

        def forward(self, batch):
            out = self.layer(torch.ones(2, 4, device="cuda"))
            self.seen.append(out.dtype)
            return {"loss": out.float().pow(2).mean()}

    model = Records().cuda()
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AMPTrainer(model, Loader(), optimizer)
    trainer.train(0, 2)
    assert model.seen == [torch.float16] * 2 and not torch.equal(before, model.layer.weight)
    assert set(trainer.state_dict()) == {"iteration", "optimizer", "grad_scaler"}
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    trainer = AMPTrainer(model, Loader(), optimizer, precision=torch.bfloat16, grad_scaler=scaler)
    trainer.train(0, 1)
    assert model.seen[-1] == torch.bfloat16

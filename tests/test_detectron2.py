"""What this project uses of Detectron2; every test holds for the small core and the real one.

Expected values are written out, not computed by the code under test.
"""

import functools
import itertools
import json
import logging
import math
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from detectron2 import engine, evaluation, modeling
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.layers import ShapeSpec
from detectron2.solver import LRMultiplier, WarmupParamScheduler, build_lr_scheduler
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils import comm, events
from detectron2.utils.logger import log_every_n_seconds, setup_logger
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn

from gella.engine.launch import leave_process_group


class ToyModel(nn.Module):
    """Fits a vector; the loss depends on the batch, so that the order of data matters."""

    def __init__(self, cfg=None):
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("pixel_mean", torch.zeros(1), persistent=True)

    def forward(self, batch):
        if not self.training:
            return [{"value": x * self.weight.sum()} for x in batch]
        target = torch.stack(list(batch)).mean()
        return {"loss_a": ((self.weight - target) ** 2).sum(), "loss_b": self.weight.abs().sum()}


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


class Loader:
    def __init__(self, start=0):
        self.start = start

    def __iter__(self):
        for i in itertools.count(self.start):
            yield [torch.tensor(float((7 * i) % 5)), torch.tensor(float(i % 3))]


class SumEvaluator(evaluation.DatasetEvaluator):
    def reset(self):
        self.values = []

    def process(self, inputs, outputs):
        assert len(inputs) == len(outputs)
        self.values += [output["value"].item() for output in outputs]

    def evaluate(self):
        return {"sum": {"count": float(len(self.values)), "total": sum(self.values)}}


def solver_config(**keys):
    cfg = get_cfg()
    for key, value in {"BASE_LR": 0.5, **keys}.items():
        cfg.SOLVER[key] = value
    return cfg


DEFAULTS = """
VERSION: 2
OUTPUT_DIR: ./output
SEED: -1
CUDNN_BENCHMARK: false
FLOAT32_PRECISION: ""
VIS_PERIOD: 0
GLOBAL: {HACK: 1.0}
MODEL:
  {DEVICE: cuda, META_ARCHITECTURE: GeneralizedRCNN, MASK_ON: false, WEIGHTS: ""}
MODEL.PIXEL_MEAN: [103.53, 116.28, 123.675]
MODEL.PIXEL_STD: [1.0, 1.0, 1.0]
MODEL.BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 2}
MODEL.SEM_SEG_HEAD:
  {NAME: SemSegFPNHead, IN_FEATURES: [p2, p3, p4, p5], IGNORE_VALUE: 255, NUM_CLASSES: 54,
   CONVS_DIM: 128, COMMON_STRIDE: 4, NORM: GN, LOSS_WEIGHT: 1.0}
INPUT:
  {MIN_SIZE_TRAIN: !t [800], MAX_SIZE_TRAIN: 1333, MIN_SIZE_TEST: 800, MAX_SIZE_TEST: 1333,
   RANDOM_FLIP: horizontal, FORMAT: BGR, MASK_FORMAT: polygon}
INPUT.CROP: {ENABLED: false, TYPE: relative_range, SIZE: [0.9, 0.9]}
DATASETS: {TRAIN: !t [], TEST: !t []}
DATALOADER:
  {NUM_WORKERS: 4, ASPECT_RATIO_GROUPING: true, SAMPLER_TRAIN: TrainingSampler,
   FILTER_EMPTY_ANNOTATIONS: true}
SOLVER:
  {LR_SCHEDULER_NAME: WarmupMultiStepLR, MAX_ITER: 40000, BASE_LR: 0.001, BASE_LR_END: 0.0,
   MOMENTUM: 0.9, NESTEROV: false, WEIGHT_DECAY: 0.0001, WEIGHT_DECAY_NORM: 0.0,
   WEIGHT_DECAY_BIAS: null, BIAS_LR_FACTOR: 1.0, GAMMA: 0.1, STEPS: !t [30000], NUM_DECAYS: 3,
   WARMUP_FACTOR: 0.001, WARMUP_ITERS: 1000, WARMUP_METHOD: linear, RESCALE_INTERVAL: false,
   CHECKPOINT_PERIOD: 5000, IMS_PER_BATCH: 16, REFERENCE_WORLD_SIZE: 0}
SOLVER.AMP: {ENABLED: false}
SOLVER.CLIP_GRADIENTS: {ENABLED: false, CLIP_TYPE: value, CLIP_VALUE: 1.0, NORM_TYPE: 2.0}
TEST: {EXPECTED_RESULTS: [], EVAL_PERIOD: 0, DETECTIONS_PER_IMAGE: 100}
TEST.AUG: {ENABLED: false}
TEST.PRECISE_BN: {ENABLED: false}
"""


class _Tuples(yaml.SafeLoader):
    """Reads ``!t [...]`` as a tuple."""


_Tuples.add_constructor("!t", lambda loader, node: tuple(loader.construct_sequence(node)))


def test_default_config_values():
    checked = 0
    for name, expected in yaml.load(DEFAULTS, _Tuples).items():
        node = get_cfg()
        for part in name.split("."):
            node = node[part]
        for key, value in expected.items() if isinstance(expected, dict) else [("", expected)]:
            default = node[key] if key else node
            assert default == value and type(default) is type(value), f"{name} {key}"
            checked += 1
    assert checked == 69


def test_config_inherits_files_and_refuses_unknown_keys(tmp_path):
    def read(name, text=None):
        cfg = get_cfg()
        if text:
            (tmp_path / name).write_text(text)
        cfg.merge_from_file(str(tmp_path / name))
        return cfg

    read("base.yaml", "SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\nSEED: 3\nVERSION: 2\n")
    cfg = read("child.yaml", "_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.25}\nVERSION: 2\n")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (7, 0.25, 3)
    cfg.merge_from_list(["SOLVER.STEPS", "(1, 2)", "MODEL.DEVICE", "cpu"])
    assert cfg.SOLVER.STEPS == (1, 2) and cfg.MODEL.DEVICE == "cpu"
    again = read("dump.yaml", cfg.dump())
    assert again.SOLVER == cfg.SOLVER and again.SEED == 3
    with pytest.raises(KeyError, match="MAX_ITERS"):
        read("bad.yaml", "SOLVER: {MAX_ITERS: 7}\nVERSION: 2\n")
    pytest.raises((KeyError, AssertionError), get_cfg().merge_from_list, ["SOLVER.MAX_ITERS", 7])
    pytest.raises(AssertionError, read, "none.yaml")
    pytest.raises(AssertionError, read, "new.yaml", "VERSION: 3\n")
    cfg.freeze()
    pytest.raises(AttributeError, setattr, cfg, "SEED", 4)
    assert get_cfg().SEED == -1  # the defaults themselves are untouched


class _Part:
    @configurable
    def __init__(self, a, b=2, *, c=3):
        self.values = (a, b, c)

    @classmethod
    def from_config(cls, cfg, shift=0):
        return {"a": cfg.A + shift, "b": cfg.B}


class _SubPart(_Part):
    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "c": 9}


@configurable(from_config=lambda cfg: {"a": cfg.A})
def _build(a, b=5):
    return a, b


CFG = CfgNode({"A": 10, "B": 20})


@pytest.mark.parametrize("made, values", [
    (lambda: _Part(1), (1, 2, 3)),
    (lambda: _Part(a=1, b=4, c=5), (1, 4, 5)),
    (lambda: _Part(CFG), (10, 20, 3)),
    (lambda: _Part(cfg=CFG, c=7), (10, 20, 7)),
    (lambda: _Part(CFG, b=8), (10, 8, 3)),  # an explicit argument wins
    (lambda: _Part(CFG, shift=5), (15, 20, 3)),  # goes to from_config alone
    (lambda: _Part(CFG, 6), (16, 20, 3)),
    (lambda: _SubPart(CFG), (10, 20, 9)),
])  # fmt: skip
def test_configurable_classes(made, values):
    assert made().values == values


def test_configurable_functions_and_wrong_use():
    assert (_build(1), _build(CFG), _build(CFG, b=6)) == ((1, 5), (10, 5), (10, 6))

    class NoFromConfig:
        @configurable
        def __init__(self, a):
            pass

    class NotClassmethod(NoFromConfig):
        def from_config(self, cfg):
            return {}

    class WrongName(NoFromConfig):
        @classmethod
        def from_config(cls, config):
            return {}

    pytest.raises(AttributeError, NoFromConfig, CFG)
    pytest.raises(TypeError, NotClassmethod, CFG)
    pytest.raises(TypeError, WrongName, CFG)
    pytest.raises(AssertionError, configurable, lambda cfg: None)


def test_dataset_catalog_registers_once_and_loads_lazily():
    calls = []
    DatasetCatalog.register("core_test_set", lambda: calls.append(1) or [{"a": 1}])
    try:
        assert "core_test_set" in DatasetCatalog.list() and not calls
        assert DatasetCatalog.get("core_test_set") == [{"a": 1}] and calls == [1]
        pytest.raises(AssertionError, DatasetCatalog.register, "core_test_set", list)
        pytest.raises(AssertionError, DatasetCatalog.register, "core_test_other", [{"a": 1}])
    finally:
        DatasetCatalog.remove("core_test_set")
    with pytest.raises(KeyError, match="core_test_set"):
        DatasetCatalog.get("core_test_set")


def test_metadata_is_one_object_per_name_and_immutable():
    meta = MetadataCatalog.get("core_test_meta")
    assert MetadataCatalog.get("core_test_meta") is meta
    assert meta.set(things=["a", "b"], root="x") is meta
    meta.things = ["a", "b"]  # the same value again
    with pytest.raises(AssertionError, match="things"):
        meta.things = ["b"]
    pytest.raises(AssertionError, setattr, meta, "name", "other")
    with pytest.raises(AttributeError, match="absent"):
        _ = meta.absent
    assert meta.get("things") == ["a", "b"] and meta.get("absent", 3) == 3
    copy = meta.as_dict()
    assert copy == {"name": "core_test_meta", "things": ["a", "b"], "root": "x"}
    copy["root"] = "y"
    assert meta.root == "x" and "core_test_meta" in MetadataCatalog.list()
    MetadataCatalog.pop("core_test_meta")
    assert MetadataCatalog.get("core_test_meta").get("things") is None
    MetadataCatalog.remove("core_test_meta")


def test_image_list_pads_right_and_bottom():
    images = [torch.full((3, 5, 7), 1.0), torch.full((3, 6, 4), 2.0)]
    batch = ImageList.from_tensors(images, 4, pad_value=-1.0)
    assert batch.tensor.shape == (2, 3, 8, 8) and len(batch) == 2
    assert [tuple(size) for size in batch.image_sizes] == [(5, 7), (6, 4)]
    for i, image in enumerate(images):
        assert torch.equal(batch[i], image)
        assert batch.tensor[i].eq(-1).sum() == 3 * 64 - image.numel()
    assert batch.device == torch.device("cpu")
    assert ImageList.from_tensors(images).tensor.shape == (2, 3, 6, 7)
    assert ImageList.from_tensors(images[:1], 4).tensor.shape == (1, 3, 8, 8)
    pytest.raises(AssertionError, ImageList.from_tensors, [images[0], images[1][:2]])


def test_instances_keep_fields_of_one_length():
    inst = Instances((4, 6), scores=torch.tensor([0.1, 0.2, 0.3]), names=["a", "b", "c"])
    inst.boxes = Boxes(torch.arange(12.0).reshape(3, 4))
    assert inst.image_size == (4, 6) and len(inst) == 3 and inst.has("boxes")
    assert not inst.has("masks") and set(inst.get_fields()) == {"scores", "names", "boxes"}
    pytest.raises(AssertionError, setattr, inst, "masks", torch.zeros(2, 4, 6))
    pytest.raises(AttributeError, getattr, inst, "masks")
    pytest.raises(IndexError, inst.__getitem__, 3)
    pytest.raises(NotImplementedError, len, Instances((1, 1)))
    pytest.raises(NotImplementedError, iter, inst)
    picked, last = inst[:2], inst[-1]
    assert picked.names == ["a", "b"] and picked.boxes.tensor.shape == (2, 4)
    assert last.names == ["c"] and last.scores.tolist() == pytest.approx([0.3])
    half = Instances((4, 6), scores=torch.ones(3)).to(torch.float16)
    masked = half[torch.tensor([True, False, True])]
    assert half.scores.dtype == torch.float16 and len(masked) == 2 and "scores" in repr(masked)


def test_bitmasks_and_boxes():
    tensor = torch.zeros(3, 5, 8)
    tensor[0, 1:3, 2:7] = 1
    tensor[2, 4, 0] = 1
    masks = BitMasks(tensor)
    assert masks.tensor.dtype == torch.bool and len(masks) == 3
    assert masks.nonempty().tolist() == [True, False, True]
    boxes = masks.get_bounding_boxes()
    assert boxes.tensor.tolist() == [[2, 1, 7, 3], [0, 0, 0, 0], [0, 4, 1, 5]]
    assert boxes.tensor.dtype == torch.float32 and boxes.area().tolist() == [10, 0, 1]
    assert masks[2].tensor.shape == (1, 5, 8) and len(masks[masks.nonempty()]) == 2
    assert BitMasks(np.ones((1, 2, 2))).tensor.all() and masks.device == torch.device("cpu")
    assert tuple(masks.image_size) == (5, 8) and masks.to("cpu").tensor.equal(masks.tensor)
    assert boxes[1].tensor.shape == (1, 4) and len(boxes[1:]) == 2
    assert Boxes(torch.empty(0)).tensor.shape == (0, 4)
    pytest.raises(AssertionError, Boxes, torch.zeros(2, 3))
    pytest.raises(AssertionError, BitMasks, torch.zeros(2, 3))


class _ToyBackbone(modeling.Backbone):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = nn.Conv2d(input_shape.channels, 4, 2, stride=2)
        self._out_features = ["res2"]
        self._out_feature_channels = {"res2": 4, "unused": 8}
        self._out_feature_strides = {"res2": 2, "unused": 4}

    def forward(self, images):
        return {"res2": self.conv(images)}


for registry, name, thing in (
    (modeling.BACKBONE_REGISTRY, "CoreTestBackbone", _ToyBackbone),
    (modeling.BACKBONE_REGISTRY, "CoreTestNoBackbone", lambda cfg, shape: nn.Identity()),
    (modeling.META_ARCH_REGISTRY, "CoreTestModel", ToyModel),
    (modeling.SEM_SEG_HEADS_REGISTRY, "CoreTestHead", lambda cfg, shapes: (cfg, shapes)),
):
    if name not in registry:
        registry._do_register(name, thing)


def test_builders_look_up_registries():
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", "CoreTestBackbone"
    backbone = modeling.build_backbone(cfg)
    assert backbone.conv.in_channels == 3
    assert backbone.output_shape() == {"res2": ShapeSpec(channels=4, stride=2)}
    assert backbone.size_divisibility == 0 and backbone.padding_constraints == {}
    assert modeling.build_backbone(cfg, ShapeSpec(channels=5)).conv.in_channels == 5
    cfg.MODEL.BACKBONE.NAME = "CoreTestNoBackbone"
    pytest.raises(AssertionError, modeling.build_backbone, cfg)
    cfg.MODEL.BACKBONE.NAME = "CoreTestAbsent"
    with pytest.raises(KeyError, match="CoreTestAbsent"):
        modeling.build_backbone(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = "CoreTestModel", "CoreTestHead"
    assert next(modeling.build_model(cfg).parameters()).device == torch.device("cpu")
    shapes = {"a": ShapeSpec(channels=1)}
    assert modeling.build_sem_seg_head(cfg, shapes) == (cfg, shapes)
    pytest.raises(TypeError, modeling.Backbone)


STEPS = [0.5, 0.5, 0.05, 0.05, 0.005, 0.005]
COSINE = [0.3 + 0.2 * math.cos(math.pi * i / 8) for i in range(8)]
SHORT_COSINE = [0.3 + 0.2 * math.cos(math.pi * i / 6) for i in range(6)]
MULTI = {"MAX_ITER": 10, "STEPS": (6, 8, 20), "WARMUP_ITERS": 4, "WARMUP_FACTOR": 0.2}
HALF = {"LR_SCHEDULER_NAME": "WarmupCosineLR", "MAX_ITER": 8, "BASE_LR_END": 0.1}
HALF |= {"WARMUP_ITERS": 2, "WARMUP_FACTOR": 0.5}


@pytest.mark.parametrize("keys, expected", [
    (MULTI, [0.1, 0.2, 0.3, 0.4, *STEPS]),
    ({**MULTI, "WARMUP_METHOD": "constant"}, [*[0.1] * 4, *STEPS]),
    ({**MULTI, "WARMUP_METHOD": "constant", "WARMUP_ITERS": 0}, [*[0.5] * 6, 0.05]),
    ({**HALF, "WARMUP_ITERS": 0}, COSINE),
    # up to the schedule's own value at the end of the warm-up
    (HALF, [0.25, (0.25 + COSINE[2]) / 2, *COSINE[2:]]),
    # the whole cosine in the remaining six iterations
    ({**HALF, "RESCALE_INTERVAL": True}, [0.25, 0.375, *SHORT_COSINE]),
])  # fmt: skip
def test_schedules(keys, expected):
    group = {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5}
    optimizer = torch.optim.SGD([group], lr=0.5)
    scheduler, rates = build_lr_scheduler(solver_config(**keys), optimizer), []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="None"):
        build_lr_scheduler(solver_config(**{**keys, "LR_SCHEDULER_NAME": "None"}), optimizer)


def test_lr_multiplier_scales_each_group_and_resumes():
    def make():
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        schedule = WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.25)
        return optimizer, LRMultiplier(optimizer, schedule, max_iter=8)

    def rates_after(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return [group["lr"] for group in optimizer.param_groups]

    first, second = make(), make()
    expected = 0.5 + 0.5 * math.cos(math.pi * 5 / 8)
    assert rates_after(*first, 5) == pytest.approx([expected, 0.1 * expected])
    assert first[1].state_dict() == {"base_lrs": [1.0, 0.1], "last_epoch": 5}
    for old, new in zip(first, second):
        new.load_state_dict(old.state_dict())
    assert rates_after(*second, 1) == rates_after(*first, 1)
    arguments = CosineParamScheduler(1, 0), 0.1, 0.25, "cubic"
    pytest.raises(ValueError, WarmupParamScheduler, *arguments)


class _Recorder(engine.HookBase):
    def __init__(self, log, name):
        def note(point):
            assert "step" not in point or self.trainer.storage.iter == self.trainer.iter
            log.append((name, point, self.trainer.iter))

        for point in ("before_train", "after_train", "before_step", "after_backward", "after_step"):
            setattr(self, point, functools.partial(note, point))


class _Steps(engine.TrainerBase):
    def __init__(self, log, fail_at=None):
        super().__init__()
        self.log, self.fail_at = log, fail_at

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("step failed")
        self.log.append(("", "run_step", self.iter))


def test_hooks_run_in_order_and_after_a_failure_too():
    log, evaluated = [], []
    trainer = _Steps(log)
    trainer.register_hooks([_Recorder(log, "a"), None, _Recorder(log, "b")])
    trainer.train(3, 5)
    expected = [("a", "before_train", 3), ("b", "before_train", 3)]
    for i in (3, 4):
        expected += [("a", "before_step", i), ("b", "before_step", i), ("", "run_step", i)]
        expected += [("a", "after_step", i), ("b", "after_step", i)]
    expected += [("a", "after_train", 5), ("b", "after_train", 5)]
    assert log == expected and trainer.iter == 5 and trainer.start_iter == 3
    failing, evaluate = _Steps(log, fail_at=1), lambda: evaluated.append(1)
    failing.register_hooks([_Recorder(log, "a"), engine.hooks.EvalHook(0, evaluate)])
    with pytest.raises(RuntimeError, match="step failed"):
        failing.train(0, 3)
    assert log[-1] == ("a", "after_train", 1) and not evaluated and not events.has_event_storage()


def test_eval_hook_times_and_stores_flat_results():
    trainer, bad, seen = _Steps([]), _Steps([]), []
    evaluate = lambda: seen.append(trainer.iter) or {"task": {"ap": float(len(seen))}}  # noqa: E731
    trainer.register_hooks([engine.hooks.EvalHook(2, evaluate)])
    trainer.train(0, 6)
    assert seen == [1, 3, 6]  # the last one after the training, not at iteration 5
    assert trainer.storage.latest()["task/ap"] == (3.0, 6)
    bad.register_hooks([engine.hooks.EvalHook(1, lambda: {"task": "text"}, eval_after_train=False)])
    with pytest.raises(ValueError, match="text"):
        bad.train(0, 2)


def test_simple_trainer_step_metrics_and_state():
    model, log = ToyModel(), []
    start, target = model.weight.detach().clone(), ((7 * 2) % 5 + 2 % 3) / 2
    trainer = engine.SimpleTrainer(model, Loader(2), sgd(model))
    trainer.register_hooks([_Recorder(log, "a")])
    trainer.train(0, 1)
    gradient = 2 * (start - target) + start.sign()
    assert torch.allclose(model.weight, start - 0.1 * gradient)
    points = "before_train before_step after_backward after_step after_train"
    assert [point for _, point, _ in log] == points.split()
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    loss_a, loss_b = ((start - target) ** 2).sum().item(), start.abs().sum().item()
    losses = {"loss_a": loss_a, "loss_b": loss_b, "total_loss": loss_a + loss_b}
    assert {name: latest[name] for name in losses} == pytest.approx(losses)
    state = trainer.state_dict()
    assert state.keys() == {"iteration", "optimizer"} and state["iteration"] == 1
    assert latest["data_time"] >= 0
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.train(1, 2)


def test_simple_trainer_iterator_is_lazy_period_and_nan():
    opened = []

    class Opens(Loader):
        def __iter__(self):
            opened.append(1)
            return super().__iter__()

    model = ToyModel()
    options = {"gather_metric_period": 2, "zero_grad_before_forward": True}
    trainer = engine.SimpleTrainer(model, Opens(), sgd(model, lr=0.0), **options)
    assert not opened
    trainer.train(0, 3)
    assert opened == [1]
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [1]
    with torch.no_grad():
        model.weight[0] = math.nan
    pytest.raises(FloatingPointError, trainer.train, 0, 2)


class _Trainer(engine.DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return sgd(model, lr=cfg.SOLVER.BASE_LR, momentum=0.9)

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


def test_default_trainer_files_hooks_and_results(tmp_path):
    cfg = _train_config(tmp_path, CHECKPOINT_PERIOD=3)
    cfg.TEST.EVAL_PERIOD, cfg.TEST.EXPECTED_RESULTS = 4, [["sum", "count", 3.0, 0.0]]
    trainer = _Trainer(cfg)
    names = [type(hook).__name__ for hook in trainer._hooks if hook is not None]
    assert (
        names == "IterationTimer LRScheduler PeriodicCheckpointer EvalHook PeriodicWriter".split()
    )
    inner = trainer._trainer
    assert trainer.model is inner.model and isinstance(inner, engine.SimpleTrainer)
    trainer.resume_or_load(resume=False)
    assert trainer.train()["sum"]["count"] == 3.0
    files = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert files == ["model_0000002.pth", "model_0000005.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    checkpoint = load(tmp_path / "model_0000005.pth")
    state = checkpoint["trainer"]
    assert checkpoint.keys() == {"model", "trainer", "iteration"} and checkpoint["iteration"] == 5
    assert checkpoint["model"].keys() == {"weight", "pixel_mean"}
    assert state.keys() == {"iteration", "hooks", "_trainer"} and state["iteration"] == 5
    # a checkpoint is written after the scheduler's step: it holds the next iteration's rate
    assert state["hooks"] == {"LRScheduler": {"base_lrs": [0.05], "last_epoch": 6}}
    assert state["_trainer"].keys() == {"iteration", "optimizer"}
    rows = [json.loads(line) for line in open(tmp_path / "metrics.json")]
    (last, *_) = [row for row in rows if row["iteration"] == 7]
    assert last.keys() >= {"total_loss", "loss_a", "loss_b", "lr", "time", "data_time"}
    assert last["lr"] == pytest.approx(0.005)
    scores = {row["iteration"]: row for row in rows if "sum/total" in row}
    assert set(scores) == {3, 8} or set(scores) == {8}  # 3 is written only if a write falls on it
    assert list(tmp_path.glob("*tfevents*"))


def test_default_trainer_resumes_exactly_and_loads_weights_alone(tmp_path):
    whole = _Trainer(_train_config(tmp_path / "whole"))
    whole.resume_or_load(resume=True)
    assert whole.start_iter == 0
    whole.train()

    class Interrupt(engine.HookBase):
        def after_step(self):
            if self.trainer.iter == 5:
                raise KeyboardInterrupt

    first = _Trainer(_train_config(tmp_path / "parts", CHECKPOINT_PERIOD=4))
    first.register_hooks([Interrupt()])
    pytest.raises(KeyboardInterrupt, first.train)
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000003.pth"
    second = _Trainer(_train_config(tmp_path / "parts", CHECKPOINT_PERIOD=4))
    second.resume_or_load(resume=True)
    assert second.start_iter == 4
    second.data_loader.start = second.start_iter
    second.train()
    assert torch.equal(second.model.weight, whole.model.weight)
    end = [load(tmp_path / part / "model_final.pth")["trainer"] for part in ("whole", "parts")]
    assert end[0]["hooks"] == end[1]["hooks"] and end[0]["iteration"] == end[1]["iteration"]
    momenta = [state["_trainer"]["optimizer"]["state"][0]["momentum_buffer"] for state in end]
    assert torch.equal(*momenta)
    cfg = _train_config(tmp_path / "other")
    cfg.MODEL.WEIGHTS = str(tmp_path / "whole" / "model_final.pth")
    other = _Trainer(cfg)
    other.resume_or_load(resume=True)  # no checkpoint of its own yet
    assert other.start_iter == 0 and other.scheduler.last_epoch == 0
    assert torch.equal(other.model.weight, whole.model.weight)


def test_default_trainer_test_without_evaluator_and_with_several_sets(tmp_path):
    cfg, model = _train_config(tmp_path), ToyModel()

    class NoEvaluator(_Trainer):
        build_evaluator = engine.DefaultTrainer.build_evaluator

    assert NoEvaluator.test(cfg, model) == {}
    cfg.DATASETS.TEST = ("core_test_one", "core_test_two")
    assert set(_Trainer.test(cfg, model)) == {"core_test_one", "core_test_two"}
    pytest.raises(AssertionError, _Trainer.test, cfg, model, evaluators=[SumEvaluator()])
    pytest.raises(NotImplementedError, engine.DefaultTrainer.build_evaluator, cfg, "x")


def test_checkpointer_layout_and_prefix(tmp_path):
    model, other = ToyModel(), ToyModel()
    checkpointer = DetectionCheckpointer(model, str(tmp_path), optimizer=sgd(model))
    assert not checkpointer.has_checkpoint()
    checkpointer.save("named", note=4)
    checkpoint = load(tmp_path / "named.pth")
    assert checkpoint.keys() == {"model", "optimizer", "note"} and checkpoint["note"] == 4
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "named.pth")
    assert checkpointer.resume_or_load("", resume=True) == {"note": 4}
    bare = {f"module.{k}": v + 1 for k, v in model.state_dict().items()}  # of a wrapped model
    torch.save(bare, tmp_path / "bare.pth")
    DetectionCheckpointer(other).load(str(tmp_path / "bare.pth"))
    assert torch.equal(other.weight, model.weight + 1)
    DetectionCheckpointer(other, str(tmp_path / "off"), save_to_disk=False).save("x")
    assert not (tmp_path / "off").exists() and DetectionCheckpointer(other).load("") == {}
    pytest.raises(AssertionError, DetectionCheckpointer(other).load, str(tmp_path / "none.pth"))


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
    before, optimizer = model.layer.weight.detach().clone(), sgd(model)
    trainer = AMPTrainer(model, Loader(), optimizer)
    trainer.train(0, 2)
    assert model.seen == [torch.float16] * 2 and not torch.equal(before, model.layer.weight)
    assert set(trainer.state_dict()) == {"iteration", "optimizer", "grad_scaler"}
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    trainer = AMPTrainer(model, Loader(), optimizer, precision=torch.bfloat16, grad_scaler=scaler)
    trainer.train(0, 1)
    assert model.seen[-1] == torch.bfloat16


@contextmanager
def messages_of(caplog, name):
    """What a logger says that may not propagate."""
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=name):
        yield
    logger.removeHandler(caplog.handler)


def test_event_storage_and_json_writer(tmp_path):
    assert not events.has_event_storage()
    pytest.raises(AssertionError, events.get_event_storage)
    path = tmp_path / "metrics.json"
    writer = events.JSONWriter(str(path), window_size=3)
    with events.EventStorage(10) as storage:
        assert events.get_event_storage() is storage and events.has_event_storage()
        for i, value in enumerate([5.0, 1.0, 9.0, 2.0]):
            storage.iter = 10 + i
            storage.put_scalar("loss", value)
            storage.put_scalars(lr=value / 10, smoothing_hint=False)
        storage.put_scalar("early", 7.0, cur_iter=11)
        writer.write()
        writer.write()  # nothing new, nothing written
        assert storage.latest()["loss"] == (2.0, 13)
        assert storage.history("loss").latest() == 2.0 and set(storage.histories()) >= {"lr"}
        assert storage.count_samples("loss", 3) == 3
        assert storage.latest_with_smoothing_hint(3)["loss"] == (2.0, 13)  # median of 1, 9, 2
        pytest.raises(KeyError, storage.history, "absent")
        pytest.raises(AssertionError, storage.put_scalar, "lr", 0.1)  # with the other hint
        storage.iter = 14
        storage.put_scalar("loss", 8.0)
        writer.write()
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(rows, key=lambda row: row["iteration"]) == [
        {"early": 7.0, "iteration": 11},
        {"iteration": 13, "loss": 2.0, "lr": 0.2},
        {"iteration": 14, "loss": 8.0},
    ]


def test_printer_and_tensorboard(tmp_path, caplog):
    board = events.TensorboardXWriter(str(tmp_path))
    with messages_of(caplog, "detectron2.utils.events"), events.EventStorage(4) as storage:
        storage.put_scalars(total_loss=1.5, loss_mask=0.25, time=2.0, data_time=0.5, accuracy=9.0)
        storage.put_scalar("lr", 1e-3, smoothing_hint=False)
        events.CommonMetricPrinter(max_iter=35).write()
        board.write()
        storage.iter = 35
        events.CommonMetricPrinter(max_iter=35).write()  # the training has ended
    (line,) = dict.fromkeys(caplog.messages)
    for part in ("eta: 0:01:00", "iter: 4", "total_loss: 1.5", "loss_mask: 0.25", "lr: 0.001"):
        assert part in line
    assert "accuracy" not in line
    board.close()
    assert list(tmp_path.glob("*tfevents*"))


def test_loggers_write_files_once_per_rank(tmp_path):
    logger = setup_logger(str(tmp_path), name="core_test_log")
    assert setup_logger(str(tmp_path), name="core_test_log") is logger and len(logger.handlers) == 2
    other = setup_logger(str(tmp_path), distributed_rank=1, name="core_test_log.rank")
    other.info("from one")
    logger.debug("from zero")
    for handler in [*logger.handlers, *other.handlers]:
        handler.flush()
    text = (tmp_path / "log.txt").read_text()
    assert text.count("from zero") == 1 and "from one" not in text and "core_test_log" in text
    assert "from one" in (tmp_path / "log.txt.rank1").read_text()


def test_log_every_n_seconds_is_per_line_of_code(caplog):
    with caplog.at_level(logging.INFO, logger="core_test_rate"):
        for _ in range(3):
            log_every_n_seconds(logging.INFO, "often", n=1000, name="core_test_rate")
        log_every_n_seconds(logging.INFO, "other line", n=1000, name="core_test_rate")
    assert caplog.messages == ["often", "other line"]


@pytest.mark.parametrize("count", [1, 5, 7])
def test_inference_sees_every_sample_once_in_eval_mode(count):
    model, seen, data = ToyModel(), [], [{"v": i} for i in range(count)]
    mapper = lambda d: torch.tensor(float(d["v"]))  # noqa: E731
    loader = build_detection_test_loader(data, mapper=mapper, batch_size=2)
    assert len(loader) == (count + 1) // 2

    class Check(SumEvaluator):
        def process(self, inputs, outputs):
            assert not model.training and not torch.is_grad_enabled()
            seen.extend(x.item() for x in inputs)
            super().process(inputs, outputs)

    results = evaluation.inference_on_dataset(model, loader, Check())["sum"]
    assert seen == list(range(count)) and model.training
    total = sum(range(count)) * model.weight.sum().item()
    assert results == {"count": count, "total": pytest.approx(total, abs=1e-4)}
    assert evaluation.inference_on_dataset(lambda batch: batch, loader, None) == {}


def test_inference_merges_evaluators_and_refuses_equal_keys():
    class Other(SumEvaluator):
        def evaluate(self):
            return {"other": {"x": 1.0}}

    model, silent = ToyModel(), type("Silent", (evaluation.DatasetEvaluator,), {})()
    given = model, build_detection_test_loader([torch.ones(1)], mapper=None)
    ask = evaluation.inference_on_dataset
    assert set(ask(*given, [SumEvaluator(), Other(), silent])) == {"sum", "other"}
    assert ask(*given, silent) == {}
    twice = evaluation.DatasetEvaluators([Other(), Other()])
    pytest.raises(AssertionError, ask, *given, twice)
    model.eval()
    with evaluation.inference_context(model):
        assert not model.training
    assert not model.training


def test_results_are_flattened_printed_and_verified(caplog):
    results = {"a": {"b": 1.0, "c": {"d": 2.0}}, "e": {}}
    assert flatten_results_dict(results) == {"a/b": 1.0, "a/c/d": 2.0}
    with messages_of(caplog, "detectron2.evaluation.testing"):
        evaluation.print_csv_format({"task": {"AP": 12.34567, "AP-cat": 1.0, "AR": 5.0}})
    assert list(dict.fromkeys(caplog.messages)) == [
        "copypaste: Task: task",
        "copypaste: AP,AR",
        "copypaste: 12.3457,5.0000",
    ]
    cfg = get_cfg()
    assert evaluation.verify_results(cfg, {})
    cfg.TEST.EXPECTED_RESULTS = [["task", "AP", 12.0, 0.5]]
    assert evaluation.verify_results(cfg, {"task": {"AP": 12.4}})
    for wrong in ({"AP": 12.6}, {"AP": math.nan}, {}):
        pytest.raises(SystemExit, evaluation.verify_results, cfg, {"task": wrong})


def test_argument_parser_and_setup(tmp_path, closed_logs):
    words = ["--config-file", "", "--num-gpus", "2", "--resume", "SEED", "7"]
    args = engine.default_argument_parser().parse_args(words)
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (2, 1, 0)
    assert args.resume and not args.eval_only and args.opts == ["SEED", "7"]
    assert args.dist_url.startswith("tcp://127.0.0.1:")
    cfg = get_cfg()
    cfg.merge_from_list(args.opts + ["OUTPUT_DIR", str(tmp_path / "out")])
    engine.default_setup(cfg, args)
    first = (torch.rand(2).tolist(), np.random.rand())
    saved = get_cfg()
    saved.merge_from_file(str(tmp_path / "out" / "config.yaml"))
    assert saved.SOLVER == cfg.SOLVER and saved.SEED == 7
    assert (tmp_path / "out" / "log.txt").exists()
    engine.default_setup(cfg, args)
    assert (torch.rand(2).tolist(), np.random.rand()) == first


def test_one_process_needs_no_group():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (1, 0, 0)
    assert comm.is_main_process() and comm.get_local_size() == 1
    assert comm.gather("x") == ["x"] and comm.all_gather("x") == ["x"]
    comm.synchronize()
    assert 0 <= comm.shared_random_seed() < 2**31
    model, called = nn.Linear(1, 1), []
    assert engine.create_ddp_model(model) is model
    engine.launch(lambda *args: called.append(args), 1, args=(1, "a"))
    assert called == [(1, "a")]


def _two_processes(folder):
    torch.set_num_threads(1)
    rank = comm.get_rank()
    np.random.seed(rank)
    model = ToyModel()
    ddp = engine.create_ddp_model(model, device_ids=None)
    DetectionCheckpointer(ddp, folder).save("ddp")
    trainer = engine.SimpleTrainer(ddp, Loader(rank), sgd(ddp))
    trainer.train(0, 1)
    loader = build_detection_test_loader([torch.tensor(float(i)) for i in range(5)], mapper=None)
    report = {
        "sizes": [comm.get_world_size(), comm.get_local_size(), comm.get_local_rank()],
        "main": comm.is_main_process(),
        "gather": comm.gather(rank),
        "all_gather": comm.all_gather({"rank": rank}),
        "seed": int(comm.shared_random_seed()),
        "weight": model.weight.tolist(),
        "total_loss": trainer.storage.latest().get("total_loss", (None,))[0],
        "values": [batch[0].item() for batch in loader],
        "samplers": [list(InferenceSampler(n)) for n in (1, 2, 3)],
    }
    comm.synchronize()
    with open(os.path.join(folder, f"rank{rank}.json"), "w") as file:
        json.dump(report, file)
    leave_process_group()  # the original would leave the group to the end of the interpreter


@pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="launch gives each process its own GPU, here is one"
)
def test_launch_two_processes(tmp_path):
    engine.launch(_two_processes, 2, dist_url="auto", args=(str(tmp_path),))
    zero, one = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    # gradients are averaged, so the step equals one on the mean of both losses
    start, targets = ToyModel().weight.detach(), [0.0, (7 % 5 + 1) / 2]
    step = sum(2 * (start - target) + start.sign() for target in targets) / 2
    weight = pytest.approx((start - 0.1 * step).tolist())
    losses = [((start - t) ** 2).sum() + start.abs().sum() for t in targets]
    loss = pytest.approx(float(sum(losses)) / 2)
    both = {"all_gather": [{"rank": 0}, {"rank": 1}], "weight": weight, "seed": zero["seed"]}
    first = {"sizes": [2, 2, 0], "main": True, "gather": [0, 1], "total_loss": loss}
    second = {"sizes": [2, 2, 1], "main": False, "gather": [], "total_loss": None}
    first |= {"values": [0, 1, 2], "samplers": [[0], [0], [0, 1]]}
    second |= {"values": [3, 4], "samplers": [[], [1], [2]]}
    assert (zero, one) == ({**both, **first}, {**both, **second}) and zero["weight"] == one[
        "weight"
    ]
    assert load(tmp_path / "ddp.pth")["model"].keys() == {"weight", "pixel_mean"}

"""Detectron2's catalogs, structures, registries and schedules.

Every test holds for the small core and for the real Detectron2 alike (run with either first on
the path), which is what makes the core a stand-in. Expected values are written out, not computed
by the code under test.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_backbone,
    build_model,
    build_sem_seg_head,
)
from detectron2.solver import LRMultiplier, WarmupParamScheduler, build_lr_scheduler
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2_toys import ToyModel, solver_config
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn


def test_dataset_catalog_registers_once_and_loads_lazily():
    calls = []
    DatasetCatalog.register("core_test_set", lambda: calls.append(1) or [{"a": 1}])
    try:
        assert "core_test_set" in DatasetCatalog.list() and not calls
        assert DatasetCatalog.get("core_test_set") == [{"a": 1}] and calls == [1]
        with pytest.raises(AssertionError):
            DatasetCatalog.register("core_test_set", list)
        with pytest.raises(AssertionError):
            DatasetCatalog.register("core_test_other", [{"a": 1}])
    finally:
        DatasetCatalog.remove("core_test_set")
    with pytest.raises(KeyError, match="core_test_set"):
        DatasetCatalog.get("core_test_set")


def test_metadata_is_one_object_per_name_and_immutable():
    meta = MetadataCatalog.get("core_test_meta")
    assert MetadataCatalog.get("core_test_meta") is meta and meta.name == "core_test_meta"
    assert meta.set(things=["a", "b"], root="x") is meta
    meta.things = ["a", "b"]  # the same value again
    with pytest.raises(AssertionError, match="things"):
        meta.things = ["b"]
    with pytest.raises(AssertionError):
        meta.name = "other"
    assert meta.get("things") == ["a", "b"] and meta.get("absent", 3) == 3
    with pytest.raises(AttributeError, match="absent"):
        _ = meta.absent
    copy = meta.as_dict()
    assert copy == {"name": "core_test_meta", "things": ["a", "b"], "root": "x"}
    copy["root"] = "y"
    assert meta.root == "x"
    assert "core_test_meta" in MetadataCatalog.list()
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
    with pytest.raises(AssertionError):
        ImageList.from_tensors([images[0], images[1][:2]])


def test_instances_keep_fields_of_one_length():
    inst = Instances((4, 6), scores=torch.tensor([0.1, 0.2, 0.3]), names=["a", "b", "c"])
    inst.boxes = Boxes(torch.arange(12.0).reshape(3, 4))
    assert inst.image_size == (4, 6) and len(inst) == 3 and inst.has("boxes")
    assert not inst.has("masks") and set(inst.get_fields()) == {"scores", "names", "boxes"}
    with pytest.raises(AssertionError):
        inst.masks = torch.zeros(2, 4, 6)
    with pytest.raises(AttributeError):
        _ = inst.masks
    picked = inst[:2]
    assert picked.names == ["a", "b"] and picked.boxes.tensor.shape == (2, 4)
    last = inst[-1]
    assert last.names == ["c"] and last.scores.tolist() == pytest.approx([0.3])
    with pytest.raises(IndexError):
        _ = inst[3]
    with pytest.raises(NotImplementedError):
        len(Instances((1, 1)))
    with pytest.raises(NotImplementedError):
        iter(inst)
    half = Instances((4, 6), scores=torch.ones(3)).to(torch.float16)
    assert half.scores.dtype == torch.float16
    masked = half[torch.tensor([True, False, True])]
    assert len(masked) == 2 and "scores" in repr(masked)


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
    with pytest.raises(AssertionError):
        Boxes(torch.zeros(2, 3))
    with pytest.raises(AssertionError):
        BitMasks(torch.zeros(2, 3))


class _ToyBackbone(Backbone):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = nn.Conv2d(input_shape.channels, 4, 2, stride=2)
        self._out_features = ["res2"]
        self._out_feature_channels = {"res2": 4, "unused": 8}
        self._out_feature_strides = {"res2": 2, "unused": 4}

    def forward(self, images):
        return {"res2": self.conv(images)}


def _register(registry, name, thing):
    if name not in registry:
        registry._do_register(name, thing)


_register(BACKBONE_REGISTRY, "CoreTestBackbone", _ToyBackbone)
_register(BACKBONE_REGISTRY, "CoreTestNoBackbone", lambda cfg, shape: nn.Identity())
_register(META_ARCH_REGISTRY, "CoreTestModel", ToyModel)
_register(SEM_SEG_HEADS_REGISTRY, "CoreTestHead", lambda cfg, shapes: (cfg, shapes))


def test_builders_look_up_registries():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "CoreTestBackbone"
    backbone = build_backbone(cfg)
    assert backbone.conv.in_channels == 3
    assert backbone.output_shape() == {"res2": ShapeSpec(channels=4, stride=2)}
    assert backbone.size_divisibility == 0 and backbone.padding_constraints == {}
    assert build_backbone(cfg, ShapeSpec(channels=5)).conv.in_channels == 5
    cfg.MODEL.BACKBONE.NAME = "CoreTestNoBackbone"
    with pytest.raises(AssertionError):
        build_backbone(cfg)
    cfg.MODEL.BACKBONE.NAME = "CoreTestAbsent"
    with pytest.raises(KeyError, match="CoreTestAbsent"):
        build_backbone(cfg)
    cfg.MODEL.META_ARCHITECTURE = "CoreTestModel"
    assert next(build_model(cfg).parameters()).device == torch.device("cpu")
    cfg.MODEL.SEM_SEG_HEAD.NAME = "CoreTestHead"
    shapes = {"a": ShapeSpec(channels=1)}
    assert build_sem_seg_head(cfg, shapes) == (cfg, shapes)
    with pytest.raises(TypeError):
        Backbone()


def _rates(cfg, count, lr=0.5):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr}], lr=lr)
    scheduler, rates = build_lr_scheduler(cfg, optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_multistep_schedule_values():
    cfg = solver_config(MAX_ITER=10, STEPS=(6, 8, 20), WARMUP_ITERS=4, WARMUP_FACTOR=0.2)
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005]
    assert _rates(cfg, 10) == pytest.approx(expected, rel=1e-9)
    cfg.SOLVER.WARMUP_METHOD = "constant"
    assert _rates(cfg, 10) == pytest.approx([0.1] * 4 + expected[4:], rel=1e-9)
    cfg.SOLVER.WARMUP_ITERS = 0
    assert _rates(cfg, 7) == pytest.approx([0.5] * 6 + [0.05], rel=1e-9)
    cfg.SOLVER.LR_SCHEDULER_NAME = "None"
    with pytest.raises(ValueError, match="None"):
        _rates(cfg, 1)


def test_cosine_schedule_values():
    cfg = solver_config(
        LR_SCHEDULER_NAME="WarmupCosineLR", MAX_ITER=8, WARMUP_ITERS=0, BASE_LR_END=0.1
    )
    cosine = [0.3 + 0.2 * math.cos(math.pi * i / 8) for i in range(8)]
    assert _rates(cfg, 8) == pytest.approx(cosine, rel=1e-9)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = 2, 0.5
    # up to the schedule's own value at the end of the warm-up
    ramp = [0.25, (0.25 + cosine[2]) / 2]
    assert _rates(cfg, 8) == pytest.approx(ramp + cosine[2:], rel=1e-9)
    cfg.SOLVER.RESCALE_INTERVAL = True  # the whole cosine in the remaining six iterations
    squeezed = [0.3 + 0.2 * math.cos(math.pi * i / 6) for i in range(6)]
    assert _rates(cfg, 8) == pytest.approx([0.25, 0.375, *squeezed], rel=1e-9)


def test_lr_multiplier_scales_each_group_and_resumes():
    def make():
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        schedule = WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.25)
        return optimizer, LRMultiplier(optimizer, schedule, max_iter=8)

    optimizer, scheduler = make()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    expected = 0.5 + 0.5 * math.cos(math.pi * 5 / 8)
    assert rates == pytest.approx([expected, 0.1 * expected])
    assert scheduler.state_dict() == {"base_lrs": [1.0, 0.1], "last_epoch": 5}
    other_optimizer, other = make()
    other.load_state_dict(scheduler.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    for opt, sched in ((optimizer, scheduler), (other_optimizer, other)):
        opt.step()
        sched.step()
    assert [g["lr"] for g in other_optimizer.param_groups] == [
        g["lr"] for g in optimizer.param_groups
    ]
    with pytest.raises(ValueError):
        WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.25, "cubic")

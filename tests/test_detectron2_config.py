"""Detectron2's configs and what is built from them.

Every test holds for the small core and for the real Detectron2 alike (run with either first on
the path), which is what makes the core a stand-in. Expected values are written out, not computed
by the code under test.
"""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode, configurable, get_cfg


def test_default_config_values():
    cfg = get_cfg()
    values = {
        "VERSION": 2,
        "OUTPUT_DIR": "./output",
        "SEED": -1,
        "CUDNN_BENCHMARK": False,
        "FLOAT32_PRECISION": "",
        "VIS_PERIOD": 0,
        "GLOBAL.HACK": 1.0,
        "MODEL.DEVICE": "cuda",
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.MASK_ON": False,
        "MODEL.WEIGHTS": "",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 128,
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
        "MODEL.SEM_SEG_HEAD.NORM": "GN",
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
        "INPUT.MIN_SIZE_TRAIN": (800,),
        "INPUT.MAX_SIZE_TRAIN": 1333,
        "INPUT.MIN_SIZE_TEST": 800,
        "INPUT.MAX_SIZE_TEST": 1333,
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.FORMAT": "BGR",
        "INPUT.MASK_FORMAT": "polygon",
        "INPUT.CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
        "DATASETS.TRAIN": (),
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 4,
        "DATALOADER.ASPECT_RATIO_GROUPING": True,
        "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.MAX_ITER": 40000,
        "SOLVER.BASE_LR": 0.001,
        "SOLVER.BASE_LR_END": 0.0,
        "SOLVER.MOMENTUM": 0.9,
        "SOLVER.NESTEROV": False,
        "SOLVER.WEIGHT_DECAY": 0.0001,
        "SOLVER.WEIGHT_DECAY_NORM": 0.0,
        "SOLVER.WEIGHT_DECAY_BIAS": None,
        "SOLVER.BIAS_LR_FACTOR": 1.0,
        "SOLVER.GAMMA": 0.1,
        "SOLVER.STEPS": (30000,),
        "SOLVER.NUM_DECAYS": 3,
        "SOLVER.WARMUP_FACTOR": 0.001,
        "SOLVER.WARMUP_ITERS": 1000,
        "SOLVER.WARMUP_METHOD": "linear",
        "SOLVER.RESCALE_INTERVAL": False,
        "SOLVER.CHECKPOINT_PERIOD": 5000,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SOLVER.AMP.ENABLED": False,
        "SOLVER.CLIP_GRADIENTS": {
            "ENABLED": False,
            "CLIP_TYPE": "value",
            "CLIP_VALUE": 1.0,
            "NORM_TYPE": 2.0,
        },
        "TEST.EXPECTED_RESULTS": [],
        "TEST.EVAL_PERIOD": 0,
        "TEST.DETECTIONS_PER_IMAGE": 100,
        "TEST.AUG.ENABLED": False,
        "TEST.PRECISE_BN.ENABLED": False,
    }
    for name, expected in values.items():
        node = cfg
        for part in name.split("."):
            node = node[part]
        assert node == expected and type(node) in (type(expected), CfgNode), name


def test_config_inherits_files_and_refuses_unknown_keys(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\nSEED: 3\n")
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: base.yaml\nSOLVER: {BASE_LR: 0.25}\nVERSION: 2\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(child))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (7, 0.25, 3)
    cfg.merge_from_list(["SOLVER.STEPS", "(1, 2)", "MODEL.DEVICE", "cpu"])
    assert cfg.SOLVER.STEPS == (1, 2) and cfg.MODEL.DEVICE == "cpu"
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "dump.yaml"))
    assert again.SOLVER == cfg.SOLVER and again.SEED == 3
    (tmp_path / "bad.yaml").write_text("SOLVER: {MAX_ITERS: 7}\nVERSION: 2\n")
    with pytest.raises(KeyError, match="MAX_ITERS"):
        get_cfg().merge_from_file(str(tmp_path / "bad.yaml"))
    with pytest.raises((KeyError, AssertionError)):
        get_cfg().merge_from_list(["SOLVER.MAX_ITERS", 7])
    with pytest.raises(AssertionError):
        get_cfg().merge_from_file(str(tmp_path / "none.yaml"))
    (tmp_path / "new.yaml").write_text("VERSION: 3\n")
    with pytest.raises(AssertionError):
        get_cfg().merge_from_file(str(tmp_path / "new.yaml"))
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.SEED = 4
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


def test_configurable_class_and_function():
    cfg = CfgNode({"A": 10, "B": 20})
    assert _Part(1).values == (1, 2, 3)
    assert _Part(a=1, b=4, c=5).values == (1, 4, 5)
    assert _Part(cfg).values == (10, 20, 3)
    assert _Part(cfg=cfg, c=7).values == (10, 20, 7)
    assert _Part(cfg, b=8).values == (10, 8, 3)  # an explicit argument wins
    assert _Part(cfg, shift=5).values == (15, 20, 3)  # goes to from_config alone
    assert _Part(cfg, 6).values == (16, 20, 3)
    assert _SubPart(cfg).values == (10, 20, 9)
    assert (_build(1), _build(cfg), _build(cfg, b=6)) == ((1, 5), (10, 5), (10, 6))


def test_configurable_reports_wrong_use():
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

    cfg = CfgNode({"A": 1})
    with pytest.raises(AttributeError):
        NoFromConfig(cfg)
    with pytest.raises(TypeError):
        NotClassmethod(cfg)
    with pytest.raises(TypeError):
        WrongName(cfg)
    with pytest.raises(AssertionError):
        configurable(lambda cfg: None)

"""Every shipped config loads, and states only its difference from its parent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import get_cfg

from gella import add_gella_config, load_config
from gella.optimizer import with_epochs

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").rglob("*.yaml"))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_of(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, (list, tuple)) else cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_differences_are_stated(path):
    stated = yaml.safe_load(path.read_text())
    base = stated.pop("_BASE_", None)
    parent = load_config(path.parent / base) if base else get_cfg()
    if not base:
        add_gella_config(parent)
    own = load_config(path)
    keys = [key for key, _ in leaves(stated)]
    assert keys
    assert [key for key in keys if value_of(own, key) == value_of(parent, key)] == []


def test_the_paper_s_schedule():
    cfg = load_config(next(path for path in CONFIGS if path.stem == "gella_swin_t"))
    cfg = with_epochs(cfg, num_records=1)
    epoch = 134_272 // cfg.SOLVER.IMS_PER_BATCH
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (16, 1e-5, 0.1)
    assert cfg.SOLVER.MAX_ITER == 50 * epoch
    assert list(cfg.SOLVER.STEPS) == [46 * epoch, 48 * epoch]
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    assert list(cfg.DATALOADER.TASK_RATIOS) == [0.2, 0.2, 0.6]

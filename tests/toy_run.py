"""A run of our trainer on a model of a few numbers, for tests of its hooks; the smallest GELLA."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import nn

from gella import add_gella_config
from gella.engine.evaluation_hooks import RealSamples, build_even_loader, evenly_spaced
from gella.engine.trainer import GellaTrainer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "train_net.py"
CONFIG = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
# A model as small as the parts allow, for a few iterations.
SMALL = [
    *("MODEL.IMAGE_ENCODER.WIDTH", "32", "MODEL.IMAGE_ENCODER.LAYERS", "2"),
    *("MODEL.RESOBLEND.DIM", "32", "MODEL.MASK_DECODER.HIDDEN_DIM", "32"),
    *("MODEL.MASK_DECODER.MASK_DIM", "32", "MODEL.MASK_DECODER.DECODER_LAYERS", "1"),
    *("MODEL.LANGUAGE.HIDDEN_SIZE", "32", "MODEL.LANGUAGE.INTERMEDIATE_SIZE", "64"),
    *("MODEL.LANGUAGE.NUM_LAYERS", "1", "MODEL.LANGUAGE.MAX_NEW_TOKENS", "8"),
    *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.NUM_WORKERS", "1"),
    # every task within six iterations
    *("DATALOADER.TASK_RATIOS", "[0.3,0.3,0.4]"),
]
# A module for DATASETS.MODULES that adds a hook to the script's trainer.
PLUGIN = """
import os, signal, time
from detectron2.engine import HookBase
from detectron2.utils import comm
from gella.engine.evaluation_hooks import RealSamples, build_even_loader, evenly_spaced
from gella.engine.trainer import GellaTrainer

class Extra(HookBase):
    def {moment}(self):
        folder = self.trainer.cfg.OUTPUT_DIR
        if self.trainer.iter == {iteration}:
            {action}

build_hooks = GellaTrainer.build_hooks
GellaTrainer.build_hooks = lambda self: [*build_hooks(self), Extra()]
"""
# Without warning, after iteration 4, whose last checkpoint is that of iteration 3.
KILL = {"moment": "after_step", "iteration": 4, "action": "os.kill(os.getpid(), signal.SIGKILL)"}
# Every process waits in iteration 3 for the file "go", so that signals hit that step.
PAUSE = {
    "moment": "before_step",
    "iteration": 3,
    "action": """open(os.path.join(folder, f"paused_{comm.get_rank()}"), "w").close()
            while not os.path.exists(os.path.join(folder, "go")):
                time.sleep(0.02)""",
}
TASKS = ("describe", "extract", "ground", "refer")


class ToyRunModel(nn.Module):
    """A line on numbers, with dropout, batch statistics and a language side.

    An item's "poison" makes the loss NaN, or its gradient infinite while the loss stays finite. In
    evaluation it draws random numbers, as a bad guest would, and answers with the numbers.
    """

    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.Linear(1, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.3)
        self.language_decoder = nn.Linear(4, 1)

    def forward(self, batch):
        numbers = torch.tensor([[float(item["number"])] for item in batch])
        y = self.language_decoder(self.dropout(self.norm(self.layer(numbers / 40))))
        if not self.training:
            torch.rand(1), np.random.rand(), random.random()
            return [item["number"] for item in batch]
        loss = (y - numbers / 40).square().mean()
        for item in batch:
            if item["poison"] == "loss":
                loss = loss * math.nan
            elif item["poison"] == "gradient":
                # sqrt has an infinite slope at 0
                loss = loss + (self.layer.weight[0, 0] * 0).abs().sqrt()
        return {"loss_toy": loss, "loss_other": 0.5 * loss}


if "ToyRunModel" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(ToyRunModel)


class ToyRunLoader:
    """Batch i holds the numbers 4 i to 4 i + 3; ``poisoned`` says which number has which poison.

    Ranks take contiguous shares.
    """

    def __init__(self, poisoned):
        self.start_iteration, self.poisoned = 0, poisoned

    def __iter__(self):
        for i in range(self.start_iteration, 1000):
            share = 4 // comm.get_world_size()
            first = 4 * i + share * comm.get_rank()
            yield [self.item(number) for number in range(first, first + share)]

    def item(self, number):
        """One mapped dict, as far as the toy needs it."""
        return {
            "number": number,
            "poison": self.poisoned.get(number, "none"),
            "file_name": f"images/{number}.jpg",
            "image_id": number,
            "task": TASKS[number // 4 % len(TASKS)],
        }


class Seen(DatasetEvaluator):
    """Remembers the numbers it is shown."""

    def reset(self):
        self.numbers, self.calls = [], 0

    def process(self, inputs, outputs):
        assert [i["number"] for i in inputs] == outputs
        self.numbers += outputs
        self.calls += 1

    def evaluate(self):
        return {"seen": {"n": float(len(self.numbers))}}


def by_number(record):
    """A mapper for the toys."""
    return {"number": record["image_id"]}


class ToyRun(GellaTrainer):
    """Our trainer with the toy's data; the test loader starts a worker, which draws a number."""

    poisoned: dict = {}

    @classmethod
    def build_train_loader(cls, cfg):
        return ToyRunLoader(cls.poisoned)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        records = evenly_spaced([{"image_id": i} for i in range(6)], cfg.TEST.SUBSET)
        return build_even_loader(records, by_number, batch_size=2, num_workers=1, name=dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return RealSamples(Seen())


def toy_config(folder, iterations=8):
    """A config for the toy on the CPU, without evaluation."""
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ToyRunModel"
    cfg.MODEL.DEVICE, cfg.MODEL.FROM_SCRATCH = "cpu", True
    cfg.SEED = 7
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def toy_run(cfg, poisoned=None, resume=False):
    """A trainer of the toy with fixed initial weights, ready to train."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    run_class = type("ToyRun", (ToyRun,), {"poisoned": dict(poisoned or {})})
    trainer = run_class(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


class Ended(NamedTuple):
    """How the script ended, and what it printed."""

    status: int
    out: str
    err: str


def start_script(scenes, output, *arguments, plugin=None):
    """Start tools/train_net.py with the smallest model, in a process group of its own.

    ``arguments`` are flags of the command line, and behind them keys and values of the config.
    """
    output.mkdir(exist_ok=True)
    pairs = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer"]
    pairs += ["OUTPUT_DIR", output]
    if plugin:
        (output / "plugin.py").write_text(PLUGIN.format(**plugin))
        pairs += ["DATASETS.MODULES", f"('{output}/plugin.py',)"]
    place = next((i for i, a in enumerate(arguments) if str(a).isupper()), len(arguments))
    flags, keys = arguments[:place], arguments[place:]
    command = [sys.executable, SCRIPT, "--config-file", CONFIG, *flags, *pairs, *keys]
    environment = {"DETECTRON2_DATASETS": str(scenes), "OMP_NUM_THREADS": "1"}
    # Files, not pipes: loader processes outlive a killed parent.
    with open(output / "out.txt", "w") as out, open(output / "err.txt", "w") as err:
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=err,
            env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )


def finish(process, output):
    """Wait for the end of a script, and end what it leaves behind."""
    try:
        status = process.wait(timeout=3600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(status, (output / "out.txt").read_text(), (output / "err.txt").read_text())

"""Small parts shared by the tests of what this project uses of Detectron2."""

from __future__ import annotations

import torch
from detectron2.config import get_cfg
from detectron2.evaluation import (
    DatasetEvaluator,
)
from torch import nn


class ToyModel(nn.Module):
    """Fits a vector; the loss depends on the batch, so that the order of data matters."""

    def __init__(self, cfg):
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("pixel_mean", torch.zeros(1), persistent=True)

    def forward(self, batch):
        if not self.training:
            return [{"value": x * self.weight.sum()} for x in batch]
        target = torch.stack(list(batch)).mean()
        return {"loss_a": ((self.weight - target) ** 2).sum(), "loss_b": self.weight.abs().sum()}


class Loader:
    """Endless batches that depend on their number alone."""

    def __init__(self, start=0):
        self.start = start

    def __iter__(self):
        i = self.start
        while True:
            yield [torch.tensor(float((7 * i) % 5)), torch.tensor(float(i % 3))]
            i += 1


class SumEvaluator(DatasetEvaluator):
    def reset(self):
        self.values = []

    def process(self, inputs, outputs):
        assert len(inputs) == len(outputs)
        self.values += [output["value"].item() for output in outputs]

    def evaluate(self):
        return {"sum": {"count": float(len(self.values)), "total": sum(self.values)}}


def solver_config(**kwargs):
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 0.5
    for key, value in kwargs.items():
        cfg.SOLVER[key] = value
    return cfg

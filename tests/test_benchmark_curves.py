"""The comparison of loss curves: what it compares, draws and refuses."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import benchmark_curves  # noqa: E402


def test_differences_of_early_and_of_all_iterations():
    plain = {"total_loss": [float(i) for i in range(30)]}
    zero = {"total_loss": [i + (0.5 if i == 3 else -2.0 if i == 25 else 0.0) for i in range(30)]}
    found = benchmark_curves.compare(plain, zero)
    assert found == {"total_loss": {"mean": 14.5, "early": 0.5, "all": 2.0}}


def test_noise_is_the_largest_difference_of_any_two_plain_runs():
    totals = {"plain 0": 1.0, "plain 1": 2.0, "plain 2": -1.0, "zero": 9.0}
    curves = {name: {"total_loss": [value] * 30} for name, value in totals.items()}
    assert benchmark_curves.noise(curves) == {"total_loss": {"early": 3.0, "all": 3.0}}


def test_other_curves_are_refused():
    with pytest.raises(ValueError, match="recorded"):
        benchmark_curves.compare({"a": [1.0]}, {"a": [1.0, 2.0]})


def test_the_picture(tmp_path):
    curves = {name: {"total_loss": [3.0, 2.0, 1.0]} for name in ("plain 0", "plain 1", "zero")}
    path = tmp_path / "folder" / "curves.png"
    benchmark_curves.draw(curves, str(path), "2 processes")
    assert len(Image.open(path).convert("RGB").getcolors(100_000)) > 10


def test_one_process_is_no_comparison():
    parser = ArgumentParser()
    benchmark_curves.add_arguments(parser)
    args = parser.parse_args(["--config-file", "x.yaml", "--processes", "1"])
    with pytest.raises(ValueError, match="at least 2"):
        benchmark_curves.record(args)


def test_moved_weights_are_the_neighbours_of_the_first_ones():
    model = torch.nn.Linear(40, 40)
    before = model.weight.detach().clone()
    hook = benchmark_curves.LastPlace(1)
    hook.trainer = SimpleNamespace(model=model)
    hook.before_train()
    after = model.weight.detach()
    up, down = (torch.nextafter(before, torch.tensor(end)) for end in (math.inf, -math.inf))
    assert ((after == up) | (after == down)).all() and (after == up).any() and (after == down).any()

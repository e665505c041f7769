"""The comparison of loss curves: what it compares, draws and refuses."""

from __future__ import annotations

import math

import curves as benchmark_curves
import pytest
import torch
from PIL import Image


def test_differences_of_early_and_of_all_iterations():
    plain = {"total_loss": [float(i) for i in range(30)]}
    zero = {"total_loss": [i + (0.5 if i == 3 else -2.0 if i == 25 else 0.0) for i in range(30)]}
    found = benchmark_curves.compare(plain, zero)
    assert found == {"total_loss": {"early": 0.5, "all": 2.0}}


def test_other_curves_are_refused():
    with pytest.raises(ValueError, match="recorded"):
        benchmark_curves.compare({"a": [1.0]}, {"a": [1.0, 2.0]})


def test_the_table_compares_runs_of_a_pair_and_any_two_plain_ones():
    curves = {
        kind: [{"total_loss": [value] * 25 + [value + late] * 15} for value, late in runs]
        for kind, runs in {
            "plain": [(1, 0), (2, 0), (-1, 4)],
            "zero": [(1, 0), (9, 1), (1, 4)],
        }.items()
    }
    (row,) = benchmark_curves.table(curves)
    assert row["curve"] == "total_loss" and row["mean size"] == 1.0
    assert (row["pair, early"], row["pair, all"]) == (7.0, 8.0)
    assert (row["two plain, early"], row["two plain, all"]) == (3.0, 3.0)
    # The last 20 iterations: 1, 2 and 2 in the mean.
    assert row["late plain"] == "1.667 ± 0.58"


def test_the_picture(tmp_path):
    runs = [{"total_loss": [3.0, 2.0, 1.0]}, {"total_loss": [3.0, 2.0, 1.1]}]
    path = tmp_path / "folder" / "curves.png"
    benchmark_curves.draw({"plain": runs, "zero": runs[::-1]}, str(path), "2 processes")
    assert len(Image.open(path).convert("RGB").getcolors(100_000)) > 10


def test_moved_weights_are_the_neighbours_of_the_first_ones():
    model = torch.nn.Linear(40, 40)
    before = model.weight.detach().clone()
    benchmark_curves.move_weights(model, 1)
    after = model.weight.detach()
    up, down = (torch.nextafter(before, torch.tensor(end)) for end in (math.inf, -math.inf))
    assert ((after == up) | (after == down)).all() and (after == up).any() and (after == down).any()


def test_the_same_seed_moves_wrapped_weights_likewise():
    torch.manual_seed(0)
    one = torch.nn.Linear(9, 9)
    other = torch.nn.ModuleDict({"module": torch.nn.Linear(9, 9)})
    other["module"].load_state_dict(one.state_dict())
    benchmark_curves.move_weights(one, 3)
    benchmark_curves.move_weights(other, 3)
    assert torch.equal(one.weight, other["module"].weight)

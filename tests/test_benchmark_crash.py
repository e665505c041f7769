"""tools/benchmark_crash.py: a few kills of a real run, and that a wrong end is seen."""

from __future__ import annotations

import json

import benchmark
import crash as benchmark_crash
import torch


def test_killed_runs_end_at_the_weights_of_the_whole_one(tmp_path, capsys):
    """One kill inside a save, one anywhere."""
    file = tmp_path / "crash.json"
    arguments = ["--kills", "2", "--iterations", "8", "--folder", str(tmp_path / "runs")]
    assert benchmark.main(["crash", *arguments, "--json", str(file), "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "8 iterations, 1 process(es), without ZeRO: 2 of 2 equal" in printed
    figures = json.loads(file.read_text())
    assert figures["equal"] == 2
    assert [row["difference"] for row in figures["kills"]] == [0.0, 0.0]
    assert "into saving" in figures["kills"][0]["moment"]
    # other weights than those of the whole run are told apart
    folder = tmp_path / "runs" / "kill00"
    weights = benchmark_crash._weights(folder)
    name = next(n for n in weights if weights[n].is_floating_point())
    weights[name] = weights[name] + 1e-6
    found = benchmark_crash.compared(weights, benchmark_crash._weights(tmp_path / "runs" / "whole"))
    assert found[0] is False and 0 < found[1] < 1e-5


def test_wrong_arguments(capsys):
    assert benchmark.main(["crash", "--kills", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --kills is 0; give at least 1")
    assert benchmark_crash.NUMBERS["kills"][0] == 20


class Failing:
    """A trial whose resumed runs end elsewhere."""

    def __init__(self, args, folder):
        pass

    def whole(self):
        pass

    def kill(self, number):
        return dict.fromkeys(("moment", "reached", "resumed from", "passed over"), "") | {
            "kill": number,
            "equal": "NO",
            "difference": 0.5,
        }


def test_a_failure_ends_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_crash, "Trial", Failing)
    assert benchmark.main(["crash", "--kills", "3"]) == 1
    assert "0 of 3 equal" in capsys.readouterr().out
    equal, difference = benchmark_crash.compared({"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert equal and difference == 0.0

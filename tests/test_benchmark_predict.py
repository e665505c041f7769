"""The predictor's benchmark: what it compares, what it prints, what it refuses. Times no matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark
import predict as benchmark_predict
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
SMALL = ["--captions", "2", "--images", "3", "--repeat", "1"]
# The tokenizer that prepared shapes bring may or may not be there.
NO_TOKENIZER = ["--opts", "MODEL.LANGUAGE.TOKENIZER", "/nowhere/tokenizer"]


def test_figures_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_predict, "SHARE", 0.0)
    monkeypatch.setattr(benchmark_predict, "BATCH_SHARE", 1e9)
    path, threads = tmp_path / "figures.json", torch.get_num_threads()
    arguments = ["predict", "--config-file", TINY, *SMALL, "--json", str(path), *NO_TOKENIZER]
    assert benchmark.main(arguments) == 0
    figures = json.loads(path.read_text())
    assert set(figures["seconds"]) == {"separate", "shared", "single", "batch"}
    assert min(figures["seconds"].values()) > 0
    assert [rule["met"] for rule in figures["rules"]] == [False, True]
    assert (figures["captions"], figures["images"]) == (2, 3)
    printed = capsys.readouterr().out
    assert "in 2 separate calls" in printed and "(asked: <= 0, NOT MET)" in printed
    assert "in 3 single ones" in printed and ", met)" in printed and "next: python" in printed
    assert torch.get_num_threads() == threads


def test_the_limits_are_those_of_the_rules() -> None:
    seconds = {"separate": 2.0, "shared": 1.0, "single": 1.0, "batch": 1.01}
    judged = benchmark_predict.rules({"seconds": seconds, "captions": 20, "images": 16})
    assert [(rule["value"], rule["met"]) for rule in judged] == [(0.5, True), (1.01, False)]


def test_each_way_asks_what_it_says() -> None:
    cases = benchmark_predict.made_cases(3, 4, 96)
    assert [len(case.captions) for case in cases] == [4, 1, 1]
    assert len({caption for case in cases for caption, _ in case.captions}) == 6
    assert all(noun in caption for c in cases for caption, nouns in c.captions for noun in nouns)
    calls: list[Any] = []

    class Recorder:
        def set_image(self, image: Any, entities: Any, image_id: int) -> None:
            calls.append("image")

        def ground(self, caption: str, nouns: list[str]) -> str:
            calls.append(nouns)
            return caption

        def predict_many(self, requests: list, batch_size: int = 8) -> list:
            calls.append((len(requests), batch_size))
            return [request.text for request in requests]

    functions = benchmark_predict.ways(Recorder(), cases)  # type: ignore[arg-type]
    captions = [caption for caption, _ in cases[0].captions]
    nouns = [nouns for _, nouns in cases[0].captions]
    assert functions["separate"]() == captions and calls[::2] == ["image"] * 4
    assert calls[1::2] == nouns
    calls.clear()
    assert functions["shared"]() == captions and calls == ["image", *nouns]
    calls.clear()
    assert functions["single"]() == functions["batch"]() == [c.captions[0][0] for c in cases]
    assert calls == [(1, 8)] * 3 + [(3, 3)]


def test_ways_that_disagree_or_fail_are_told() -> None:
    class Found:
        def __init__(self, score: float) -> None:
            self.phrases = [{"scores": [score]}]

    same = {name: lambda: [Found(0.5)] for name in ("separate", "shared", "single", "batch")}
    assert set(benchmark_predict.time_ways(same, 1, "cpu")) == set(same)
    with pytest.raises(ValueError, match="single and batch calls gave different scores"):
        benchmark_predict.time_ways({**same, "batch": lambda: [Found(0.6)]}, 1, "cpu")
    with pytest.raises(ValueError, match="too long"):
        broken: Any = {**same, "batch": lambda: [ValueError("too long")]}
        benchmark_predict.time_ways(broken, 1, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions", "1"], "--captions is 1; give at least 2"),
        (["--images", "0"], "--images is 0; give at least 2"),
        (["--size", "9"], "--size is 9; give at least 64"),
        (["--config-file", "no_such.yaml"], "no_such.yaml"),
        (["--weights", "no_such.pth"], "no_such.pth"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert benchmark.main(["predict", "--config-file", TINY, *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

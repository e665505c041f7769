"""The count of the language model's calls: what it counts, what it prints, what it refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import benchmark
import generation as benchmark_generation
import pytest
import torch
from tiny_language import EOS, IMAGE_DIM, PAD, make_copier

from gella.modeling.language_decoder import IMAGE_TOKEN_ID


def tiny_model() -> Any:
    """What the benchmark takes of GELLA, around a decoder whose answers are known."""
    return SimpleNamespace(
        language_decoder=make_copier(),
        encode=lambda inputs: (None, torch.zeros(1, IMAGE_DIM, 2, 2)),
        tokenizer=SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD),
        noun_snippets=[[36, 37]],
        max_new_tokens=25,
    )


def prompt(*words: int) -> dict[str, Any]:
    return {"input_ids": torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *words])}


def test_calls_and_tokens_are_counted():
    model = tiny_model()
    # The second answer, 10 to 34, is cut off at 25 tokens and has no end.
    inputs = [prompt(*range(20, 40), 19), prompt(9)]
    tallies = benchmark_generation.count_calls(model, inputs, lookup=6)
    greedy, drafts = tallies["greedy"], tallies["drafts"]
    assert (
        greedy.answers
        == drafts.answers
        == tallies["transformers"].answers
        == [list(range(20, 40)), list(range(10, 35))]
    )
    assert (greedy.calls, greedy.tokens) == (21 + 25, 21 + 25)
    assert (drafts.calls, drafts.tokens) == (4 + 25, 21 + 25)
    figures = benchmark_generation.summarise(tallies)
    assert figures["greedy"]["calls_per_token"] == 1.0
    assert figures["calls_ratio"] == pytest.approx(29 / 46)
    assert [figures[way]["identical"] for way in benchmark_generation.WAYS] == [2, 2, 2]
    assert figures["captions"] == 2
    # 20; 21 to 27; 28 to 34; 35 to 39 and the end. The second prompt holds nothing to copy.
    assert tallies["transformers"].calls == 4 + 25
    assert model.language_decoder.prompt_lookup_tokens == 6
    calls = drafts.calls
    model.language_decoder.llama.base_model(torch.tensor([[1]]))
    assert drafts.calls == calls  # the counter is gone


def test_different_answers_are_told():
    tallies = {
        "greedy": benchmark_generation.Tally(4, 4, 0.1, [[5], [6]]),
        "drafts": benchmark_generation.Tally(3, 4, 0.1, [[5], [7]]),
        "transformers": benchmark_generation.Tally(3, 4, 0.1, [[5], [6]]),
    }
    figures = benchmark_generation.summarise(tallies)
    assert [figures[way]["identical"] for way in benchmark_generation.WAYS] == [2, 1, 2]
    lines = benchmark_generation.report(figures, 6, "There is one").splitlines()
    assert [line for line in lines if "drafts of up to 6" in line and "1 of 2" in line]


def test_figures_are_printed_and_written(monkeypatch, tmp_path, capsys):
    model = tiny_model()
    inputs = [prompt(*range(20, 40), 19)]
    monkeypatch.setattr(benchmark_generation, "prepare", lambda args: (model, inputs, 6))
    monkeypatch.setattr(benchmark_generation, "decode_answer", lambda tokenizer, ids: "There are")
    path = tmp_path / "figures.json"
    assert benchmark.main(["generation", "--config-file", "x.yaml", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["drafts"]["calls"] == 4
    printed = capsys.readouterr().out
    assert "0.190" in printed and "first answer: There are" in printed and "next:" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num is 0; give at least 1"),
        (["--lookup", "0"], "--lookup must be at least 1"),
        (["--config-file", "no_such.yaml"], "no_such.yaml"),
        (["--dataset", "no_such_dataset"], "no_such_dataset"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, capsys):
    base = ["--config-file", "configs/gella_tiny_shapes.yaml"]
    assert benchmark.main(["generation", *base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

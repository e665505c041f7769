"""Benchmarks of generation and of the predictor: what they count and compare. Times no matter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import generation
import predict
import pytest
import torch
import transformers
from tiny_language import EOS, IMAGE_DIM, PAD, make_copier

from gella.modeling.language_decoder import IMAGE_TOKEN_ID

TINY = str(Path(__file__).resolve().parents[1] / "configs" / "gella_tiny_shapes.yaml")
SMALL = ["--captions", "2", "--images", "3", "--repeat", "1"]
# The tokenizer that prepared shapes bring may or may not be there.
NO_TOKENIZER = ["--opts", "MODEL.LANGUAGE.TOKENIZER", "/nowhere/tokenizer"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generation --config-file TINY --num 0", "--num is 0; give at least 1"),
        ("generation --config-file TINY --lookup 0", "--lookup is 0; give at least 1"),
        ("generation --config-file no_such.yaml", "no_such.yaml"),
        ("generation --config-file TINY --dataset no_such_dataset", "no_such_dataset"),
        ("predict --config-file TINY --captions 1", "--captions is 1; give at least 2"),
        ("predict --config-file TINY --images 0", "--images is 0; give at least 2"),
        ("predict --config-file TINY --size 9", "--size is 9; give at least 64"),
        ("predict --config-file TINY --nouns 0,5", "--nouns 0,5: give numbers from 1 to 98"),
        ("predict --config-file no_such.yaml", "no_such.yaml"),
        ("predict --config-file TINY --weights no_such.pth --captions 2 --images 3", "no_such.pth"),
        ("data --images 1", "--images is 1"),
        ("data --size 640", "640"),
        ("data --size 8x8", "8x8"),
        ("data --dataset gella_shapes_png_val", "--config-file"),
        ("data --config-file absent.yaml", "absent.yaml"),
        ("data --workers -1", "-1"),
        ("data --config-file TINY --dataset no_set", "no_set"),
        ("eval --recall-nouns 0", "--recall-nouns is 0"),
        ("eval --size 7", "--size"),
        ("eval --panoptic-json absent.json", "absent.json"),
        ("eval --panoptic-json TINY", "no COCO panoptic file"),
        ("curves --config-file x.yaml --processes 1", "--processes is 1; give at least 2"),
    ],
)
def test_wrong_arguments_end_with_one_line(command, message, capsys):
    assert benchmark.main(command.replace("TINY", TINY).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# -- calls of the language model -------------------------------------------------------------------

looks_up = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18),
    reason="transformers' prompt lookup answers nothing here before 5.18",
)


def tiny_model() -> Any:
    """What the benchmark takes of GELLA, around a decoder whose answers are known."""
    return SimpleNamespace(
        language_decoder=make_copier(),
        encode=lambda inputs: (None, torch.zeros(1, IMAGE_DIM, 2, 2)),
        tokenizer=SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD),
        noun_snippets=[[36, 37]],
        copied_nouns=lambda inputs: None,
        max_new_tokens=25,
    )


def prompt(*words: int) -> dict[str, Any]:
    return {"input_ids": torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *words])}


@looks_up
def test_calls_and_tokens_are_counted() -> None:
    model = tiny_model()
    # The second answer, 10 to 34, is cut off at 25 tokens and has no end.
    inputs = [prompt(*range(20, 40), 19), prompt(9)]
    figures = generation.count_calls(model, inputs, lookup=6)
    for way in generation.WAYS:
        assert figures[way]["answers"] == [list(range(20, 40)), list(range(10, 35))]
    counted = {way: (figures[way]["calls"], figures[way]["tokens"]) for way in generation.WAYS}
    # 20; 21 to 27; 28 to 34; 35 to 39 and the end. The second prompt holds nothing to copy.
    assert counted == {"greedy": (46, 46), "drafts": (29, 46), "transformers": (29, 46)}
    assert figures["greedy"]["calls_per_token"] == 1.0 and figures["captions"] == 2
    assert figures["calls_ratio"] == pytest.approx(29 / 46)
    assert [figures[way]["identical"] for way in generation.WAYS] == [2, 2, 2]
    assert model.language_decoder.prompt_lookup_tokens == 6
    model.language_decoder.llama.base_model(torch.tensor([[1]]))
    assert figures["transformers"]["calls"] == 29  # the counter is gone


@looks_up
def test_calls_are_printed_and_written(monkeypatch, tmp_path, capsys):
    inputs = [prompt(*range(20, 40), 19)]
    monkeypatch.setattr(generation, "prepare", lambda args: (tiny_model(), inputs, 6))
    monkeypatch.setattr(generation, "decode_answer", lambda tokenizer, ids: "There are")
    path = tmp_path / "figures.json"
    assert benchmark.main(["generation", "--config-file", "x.yaml", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["drafts"]["calls"] == 4
    printed = capsys.readouterr().out
    assert "drafts of up to 6" in printed and "1 of 1" in printed
    assert "0.190" in printed and "first answer: There are" in printed and "next:" in printed


# -- the predictor ---------------------------------------------------------------------------------


def test_seconds_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "SHARE", 0.0)
    monkeypatch.setattr(predict, "BATCH_SHARE", 1e9)
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


def test_one_pass_against_a_pass_per_noun(tmp_path, capsys):
    path, plot = tmp_path / "figures.json", tmp_path / "nouns.png"
    arguments = ["predict", "--config-file", TINY.replace("configs", "weights")[: -len(".yaml")]]
    arguments += ["--repeat", "1", "--nouns", "9,1", "--plot", str(plot), "--json", str(path)]
    assert benchmark.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["nouns"] for row in rows] == [1, 9] and plot.stat().st_size > 5000
    assert rows[1]["one pass"] < rows[1]["a pass per noun"]
    assert "a pass per noun" in capsys.readouterr().out


def test_the_limits_are_those_of_the_rules() -> None:
    seconds = {"separate": 2.0, "shared": 1.0, "single": 1.0, "batch": 1.01}
    judged = predict.rules({"seconds": seconds, "captions": 20, "images": 16})
    assert [(rule["value"], rule["met"]) for rule in judged] == [(0.5, True), (1.01, False)]


def test_each_way_asks_what_it_says() -> None:
    cases = predict.made_cases(3, 4, 96)
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

    functions = predict.ways(Recorder(), cases)  # type: ignore[arg-type]
    captions, nouns = (list(part) for part in zip(*cases[0].captions))
    assert functions["separate"]() == captions
    assert calls[::2] == ["image"] * 4 and calls[1::2] == nouns
    calls.clear()
    assert functions["shared"]() == captions and calls == ["image", *nouns]
    calls.clear()
    assert functions["single"]() == functions["batch"]() == [c.captions[0][0] for c in cases]
    assert calls == [(1, 8)] * 3 + [(3, 3)]


def test_ways_that_disagree_or_fail_are_told() -> None:
    def found(score: float) -> Any:
        return lambda: [SimpleNamespace(phrases=[{"scores": [score]}])]

    same = {name: found(0.5) for name in ("separate", "shared", "single", "batch")}
    assert set(predict.time_ways(same, 1, "cpu")) == set(same)
    with pytest.raises(ValueError, match="single and batch calls gave different scores"):
        predict.time_ways({**same, "batch": found(0.6)}, 1, "cpu")
    with pytest.raises(ValueError, match="too long"):
        predict.time_ways({**same, "batch": lambda: [ValueError("too long")]}, 1, "cpu")

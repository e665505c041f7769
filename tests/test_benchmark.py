"""The benchmark's command line, and parameters that add up and meet the published sizes exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import benchmark
import cost_parameters
import cost_tables
import pytest
import torch

from gella import load_config

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")


@pytest.fixture(scope="module")
def paper():
    """The paper's config."""
    return load_config(ROOT / "configs" / "gella_swin_t.yaml")


def test_the_paper_s_model_has_the_published_sizes(paper):
    model = cost_parameters.build_on_meta(paper)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sizes = {part: (count, trained) for part, count, trained in cost_parameters.part_sizes(model)}
    # LLaMA-7B from its architecture: embedding and output, 32 blocks, the final norm
    width, inner = 4096, 11008
    block = 4 * width * width + 3 * width * inner + 2 * width
    llama = 2 * 32000 * width + 32 * block + width
    assert llama == 6_738_415_616
    assert sizes["language decoder"] == (llama + 2 * width,) * 2  # <SEG>
    # ViT-L/14 at 336: patches, class and position embeddings, first norm, 24 blocks
    width = 1024
    block = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    tower = 3 * 14 * 14 * width + width + (24 * 24 + 1) * width + 2 * width + 24 * block
    assert sizes["image encoder"] == (tower, 0)  # frozen
    assert tower + 2 * width + width * 768 == 304_293_888
    total = sum(p.numel() for p in model.parameters())
    assert sizes["all"][0] == total
    assert sum(count for part, (count, _) in sizes.items() if part != "all") == total
    assert cost_parameters.largest_layer(model) == 32001 * 4096
    compared = cost_parameters.compare_published(paper, {p: n for p, (n, _) in sizes.items()})
    assert [item["ours"] - item["parameters"] for item in compared] == [0, 0]
    text = cost_tables.published_table(compared)
    assert text.count("equal") == 2 and "differs" not in text
    assert "6,738,415,616" in text and "304,293,888" in text
    compared[0]["ours"] += 7
    assert "differs by +7" in cost_tables.published_table(compared)


def test_added_words_are_taken_off_before_comparing(paper):
    other = paper.clone()
    other.MODEL.LANGUAGE.VOCAB_SIZE = 32003
    assert cost_parameters.published_sizes(other)[0].difference == -2 * 3 * 4096


def test_a_model_without_published_size_gets_no_comparison():
    assert cost_parameters.published_sizes(load_config(TINY)) == []
    assert cost_tables.published_table([]) == ""


def test_counting_takes_shared_parameters_once():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    both = torch.nn.ModuleList([layer, layer])
    assert cost_parameters.count_parameters(both) == 8
    assert cost_parameters.count_parameters(both, trained_only=True) == 6
    assert cost_parameters.largest_layer(both) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--config-file", "absent.yaml"], "absent.yaml"),
        (["cost", "--config-file", TINY, "MODEL.FOO", "1"], "MODEL.FOO"),
        (["data", "--images", "1"], "--images"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_unknown_mode_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["speed"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert all(mode in error for mode in benchmark.MODES)


def test_every_mode_has_help():
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(mode in text for mode in ("cost", "data", "generation"))

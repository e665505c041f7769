"""The cost table: parts add up, and the published sizes are met exactly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from gella import load_config

ROOT = Path(__file__).resolve().parents[1]


def load_tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    """tools/benchmark.py."""
    return load_tool("benchmark")


@pytest.fixture(scope="module")
def paper():
    """The paper's config."""
    return load_config(ROOT / "configs" / "gella_swin_t.yaml")


def test_the_paper_s_model_has_the_published_sizes(benchmark, paper):
    model = benchmark.build_on_meta(paper)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sizes = {part: (count, trained) for part, count, trained in benchmark.part_sizes(model)}
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


def test_published_sizes_are_compared_and_misses_are_shown(benchmark, paper):
    text = benchmark.cost_table(benchmark.measure_cost(paper))
    assert text.count("equal") == 2 and "differs" not in text
    assert "6,738,415,616" in text and "304,293,888" in text
    other = paper.clone()
    other.MODEL.LANGUAGE.VOCAB_SIZE = 32003
    language = benchmark.published_sizes(other)[0]
    assert language.difference == -2 * 3 * 4096


def test_a_model_without_published_size_gets_no_comparison(benchmark, capsys, tmp_path):
    config = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
    file = tmp_path / "cost.json"
    assert benchmark.main(["cost", "--config-file", config, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "association" in out and "published model" not in out
    figures = json.loads(file.read_text())
    assert figures["published"] == []
    for part, size in figures["parts"].items():
        assert f"{size['parameters']:,}" in out, part


def test_counting_takes_shared_parameters_once(benchmark):
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    both = torch.nn.ModuleList([layer, layer])
    assert benchmark.count_parameters(both) == 8
    assert benchmark.count_parameters(both, trained_only=True) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "absent.yaml"], "absent.yaml"),
        (["--config-file", "{tiny}", "MODEL.FOO", "1"], "MODEL.FOO"),
    ],
)
def test_bad_input(benchmark, capsys, arguments, message):
    tiny = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
    assert benchmark.main(["cost", *(a.format(tiny=tiny) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

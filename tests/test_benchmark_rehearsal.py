"""The rehearsal of the paper's model, at a tiny size through the same path."""

from __future__ import annotations

import argparse

import pytest
import rehearsal
import torch

from gella.weights.files import read_weights


def arguments(output, sample, **changes):
    options = {
        name[2:].replace("-", "_"): o.get("default") for name, o in rehearsal.OPTIONS.items()
    }
    options |= {name: default for name, (default, *_) in rehearsal.NUMBERS.items()}
    options |= dict(scale="tiny", output=str(output), sample=str(sample), gpu=False, keep=True)
    return argparse.Namespace(**{**options, **changes})


def test_every_stage_runs_on_real_photographs(coco_sample, tmp_path, capsys, monkeypatch):
    figures, text = rehearsal.run(arguments(tmp_path / "new", coco_sample))
    assert list(figures["stages"]) == ["write", "convert", "check", "ground", "evaluate"]
    assert all(0 < stage["peak_gib"] < 8 for stage in figures["stages"].values())
    assert all(name in text for name in figures["stages"])
    out = capsys.readouterr().out
    assert [out.count(f"{image}: ") for image in (142238, 439180)] == [2, 2]
    assert '"n_captions": 4' in out  # evaluated
    llava = read_weights(tmp_path / "new" / "public" / "llava")
    assert {tensor.dtype for tensor in llava.values()} == {torch.bfloat16}
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in llava  # its public names
    with pytest.raises(ValueError, match="exists already"):
        rehearsal.run(arguments(tmp_path / "new", coco_sample))
    args = arguments(tmp_path / "new", coco_sample, iterations=4)
    monkeypatch.setattr(rehearsal, "TRAININGS", {"LoRA": rehearsal.TRAININGS["stage 2, LoRA"]})
    row = rehearsal.trainings(args, rehearsal.overrides(args))["LoRA"]
    assert len(row["losses"]) == 5 and row["losses"][4] < row["losses"][0]
    assert row["images_per_s"] > 0 and row["tokens"] > 36 + 60 and 0 < row["host_gib"] < 8
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            rehearsal.run(arguments(tmp_path / "other", coco_sample, gpu=True))


def test_random_weights_have_no_memory_and_are_all_different():
    shapes = {
        "a.weight": torch.empty(300, 200, device="meta"),
        "b.weight": torch.empty(300, 200, device="meta"),
        "conv.weight": torch.empty(8, 3, 14, 14, device="meta"),
        "norm.weight": torch.empty(5, device="meta"),
        "norm.bias": torch.empty(5, device="meta"),
    }
    found = rehearsal.random_weights(shapes)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in shapes.items()
    }
    assert found["a.weight"].data_ptr() - found["b.weight"].data_ptr() in range(-999, 999)
    assert not torch.equal(found["a.weight"], found["b.weight"])
    assert torch.linalg.matrix_rank(found["a.weight"]) == 200
    for key in ("a.weight", "conv.weight"):
        assert float(found[key].std()) == pytest.approx(0.02, rel=0.1)
    assert found["norm.weight"].tolist() == [1.0] * 5 and found["norm.bias"].tolist() == [0.0] * 5

"""What the README tells people to type: the Python runs, the files exist, the options are known."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dataset_scripts import prepare_small_shapes
from detectron2.modeling import build_model

from gella import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG = "configs/gella_tiny_shapes.yaml"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words for words in lines if words and words[0] == ".venv/bin/python"]


def test_the_python_use_grounds_the_nouns_that_the_model_finds(tmp_path, monkeypatch, capsys):
    prepare_small_shapes(tmp_path / "datasets" / "shapes")
    (tmp_path / "output" / "gella_tiny_shapes").mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG))
    torch.save({"model": model.state_dict()}, "output/gella_tiny_shapes/model_final.pth")
    (code,) = blocks("python")
    # Random weights extract no nouns of this caption; the six lines leave that to trained ones.
    from gella import GellaPredictor

    nouns = ["a purple diamond"]
    monkeypatch.setattr(GellaPredictor, "extract_nouns", lambda self, caption, scene: nouns)
    exec(compile(code, "README.md", "exec"), {})
    assert "a purple diamond" in capsys.readouterr().out
    assert (tmp_path / "output" / "grounding.png").stat().st_size > 1000


def test_the_commands_name_files_that_exist_and_options_that_are_known():
    assert len(commands()) >= 3
    for _, script, *words in commands():
        if script == "-c":
            continue
        assert (ROOT / script).is_file(), script
        helped = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        if words[0] in ("cost", "data"):
            helped += subprocess.run(
                [sys.executable, script, words[0], "--help"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{word}\b", helped), f"{script}: {word}"
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()

"""What the README tells people to type: the Python runs, the files exist, the options are known."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words for words in lines if words and words[0] == ".venv/bin/python"]


def test_the_python_use_works_at_once_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    for folder in ("weights", "configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) == 7  # six and an empty one
    exec(compile(code, "README.md", "exec"), {})
    (told,) = re.findall(r"```python\n.*?```\n\n```\n(.*?)```", README, re.DOTALL)
    assert capsys.readouterr().out == told
    assert (tmp_path / "grounding.png").stat().st_size > 1000


def test_the_make_targets_are_there_and_in_the_help():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (quick,) = [block for block in blocks("bash") if block.startswith("make ")]
    helped = subprocess.run(
        ["make", "-C", str(ROOT), "help"], capture_output=True, text=True
    ).stdout
    named = re.findall(r"^make (\w+)", quick, re.MULTILINE)
    assert named == ["demo", "app", "train", "test"]
    for name in named:
        assert re.search(rf"^{name}: \$\(STAMP\)", makefile, re.MULTILINE), name
        assert f"make {name} " in helped
    for path in re.findall(r"\b(?:datasets|tools|configs|weights)/[\w./]+\.(?:py|yaml)", makefile):
        assert (ROOT / path).is_file(), path


def test_the_commands_name_files_that_exist_and_options_that_are_known():
    assert len(commands()) >= 3
    for _, script, *words in commands():
        if script == "-c" or not words:
            assert script == "-c" or (ROOT / script).is_file(), script
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
            if word.startswith(("configs/", "weights/", "examples/")):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()

"""examples/quick_start.ipynb: its cells run in order in any folder; the file holds no output."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quick_start.ipynb"


def test_the_ten_cells_run_and_show_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    monkeypatch.chdir(tmp_path)
    names, shown = {}, []
    monkeypatch.setattr(sys, "displayhook", shown.append)
    for cell in code:
        statements = ast.Interactive(ast.parse("".join(cell["source"])).body)
        exec(compile(statements, f"cell {cell['id']}", "single"), names)
    num_entities, ground, picture, nouns, given, joint, sole, panoptic, size, nothing = shown
    assert num_entities == joint[0].shape[1] == 7
    assert ground == [("three purple rings", [3, 2, 4]), ("the sand", [7])]
    assert isinstance(picture, Image.Image) and isinstance(panoptic, Image.Image)
    assert [noun["noun"] for noun in nouns] == [phrase for phrase, _ in ground]
    assert [phrase for phrase, _ in given] == ["Three rings", "the sand"]
    (_, rings), (_, purple) = sole
    assert joint[1] == [1, 5, 6] and sorted(rings + purple) == [3, 4]  # singular: one each
    assert Image.open("grounding.png").size == picture.size
    text = Path("grounding.json").read_text(encoding="utf-8")
    assert json.loads(text)["nouns"] == nouns and (len(text), None) == (size, nothing)

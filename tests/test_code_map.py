"""docs/CODE_MAP.md: every name on it exists, and nothing that the paper numbers is missing."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from gella.config import add_gella_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "CODE_MAP.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE)
PLACES = sorted({c for c in CODE if re.fullmatch(r"[\w./]+\.(?:py|yaml)(?::[\w.]+)?|[\w/]+/", c)})
KEYS = sorted({c for c in CODE if re.fullmatch(r"[A-Z]+(?:\.[A-Z_0-9]+)+", c)})


@cache
def names(path: Path) -> set[str]:
    """What a file defines at the top, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        found.add(getattr(node, "name", ""))
    return found


def problem(place: str) -> str:
    """Why a place of the page does not exist; "" if it does."""
    file, _, name = place.partition(":")
    path = next((p for p in (ROOT / "projects/gella" / file, ROOT / file) if p.exists()), None)
    if path is None:
        return f"there is no {file}"
    return "" if not name or name in names(path) else f"{file} has no {name}"


@pytest.mark.parametrize("place", PLACES)
def test_the_place_exists(place):
    assert problem(place) == ""


@pytest.mark.parametrize("key", KEYS)
def test_the_key_exists(key):
    node = get_cfg()
    add_gella_config(node)
    for part in key.split("."):
        node = node[part]


def test_what_does_not_exist_is_told():
    assert "no Resoblend" in problem("modeling/resoblend.py:Resoblend")
    assert "no ResoBlend.ask" in problem("modeling/resoblend.py:ResoBlend.ask")
    assert "there is no modeling/none.py" in problem("modeling/none.py")
    assert len(PLACES) > 60 and len(KEYS) > 12


@pytest.mark.parametrize(
    ("heading", "wanted"),
    [
        ("Equations", [str(n) for n in range(1, 11)]),
        ("Tables", [str(n) for n in range(1, 13)]),
        ("Figures", [str(n) for n in range(1, 7)]),
        ("Sections", ["3.1", "3.2", "3.3", "3.4", "4.1", "4.2", "4.3", "4.4", "4.5"]),
    ],
)
def test_nothing_that_the_paper_numbers_is_missing(heading, wanted):
    (table,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| ([\d., right]+) \|", table, re.MULTILINE)
    assert set(wanted) <= {number for row in rows for number in re.findall(r"[\d.]+", row)}


def test_every_file_of_the_model_is_on_the_map():
    files = {p.name for p in (ROOT / "projects/gella/modeling").glob("*.py")} - {"__init__.py"}
    # parts of parts, which the files on the map import
    files -= {"adapters.py"}
    named = {place.partition(":")[0].rpartition("/")[2] for place in PLACES}
    assert files <= named

"""docs/CONFIG.md: up to date, complete, and made of the comments in gella/config.py."""

from __future__ import annotations

import re

import config_reference
import pytest
from detectron2.config import CfgNode, get_cfg

from gella import config

SOURCE = '''
def add_gella_config(cfg):
    """A config."""
    node = type(cfg)
    # Above it.
    cfg.A = 1
    cfg.B = 2  # its own
    cfg.C = 3

    part = cfg.PART = node()  # never shown
    # Both of
    # these.
    part.X = [
        1,  # one
    ]
    part.Y = ""
    _more(part, node)

def _more(thing, node):
    # Of the node.
    thing.DEEP = node()
    thing.DEEP.ON = True
    thing.LAST = 0  # <name> of a|b*c*
'''


def leaves(node, prefix=""):
    """Names and values of all keys below a node."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_keys_and_meanings_are_read_from_the_source():
    keys = {key.name: (key.meaning, key.shared) for key in config_reference.read_keys(SOURCE)}
    assert keys == {
        "A": ("Above it.", ""),
        "B": ("its own", ""),
        "C": ("", ""),
        "PART.X": ("Both of these. one", ""),
        "PART.Y": ("Both of these.", "PART.X"),
        "PART.DEEP.ON": ("Of the node.", ""),
        "PART.LAST": ("<name> of a|b*c*", ""),
    }


def test_every_key_that_differs_from_detectron2s_is_on_the_page():
    with pytest.raises(ValueError, match=r"no comment on C; add one"):
        config_reference.render(config_reference.read_keys(SOURCE), CfgNode())
    text = config_reference.page()
    listed = {
        f"{section}.{key}"
        for section, table in re.findall(r"^## ([A-Z._\d]+)\n\n(.*?)(?=^##|\Z)", text, re.S | re.M)
        for key in re.findall(r"^\| `(\w+)` ", table, re.M)
    }
    full = get_cfg()
    config.add_gella_config(full)
    plain, absent = dict(leaves(get_cfg())), object()
    assert {n for n, value in leaves(full) if plain.get(n, absent) != value} <= listed
    assert len(listed) > 100
    assert "| `IMAGE_SIZE` | int | `336` | Pixels; CLIP's own input side |" in text
    cfg = CfgNode({"PART": {"LAST": 0}})
    row = config_reference._row("LAST", "PART.LAST", "<name> of a|b*c*", cfg)
    assert row == "| `LAST` | int | `0` | `<name>` of a\\|b\\*c\\* |\n"


def test_the_page_is_up_to_date_and_check_tells_when_it_is_not(tmp_path, capsys):
    assert config_reference.main(["--check"]) == 0, "run python tools/config_reference.py"
    page = tmp_path / "CONFIG.md"
    assert config_reference.main(["--check", "--output", str(page)]) == 1
    assert config_reference.main(["--output", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == config_reference.PAGE.read_text(encoding="utf-8")
    page.write_text(page.read_text(encoding="utf-8").replace("`336`", "`224`"), encoding="utf-8")
    capsys.readouterr()
    assert config_reference.main(["--check", "--output", str(page)]) == 1
    assert "is not up to date; run tools/config_reference.py" in capsys.readouterr().err

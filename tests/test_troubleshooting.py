"""docs/TROUBLESHOOTING.md: the messages that it quotes are messages of this code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
# The first cell of a row that begins and ends with a backtick is a message.
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
SOURCES = ("projects/gella/**/*.py", "tools/*.py", "datasets/*.py", "Makefile")


def text_of(node: ast.AST) -> str:
    """A string of the source, with "\0" where a value is put in."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[ds]", "\0", node.value)
    return "\0"


@cache
def strings() -> tuple[str, ...]:
    """All strings of the code, and the lines of the Makefile."""
    found = []
    for path in (path for pattern in SOURCES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            found += re.sub(r"\$\(\w+\)|%[ds]", "\0", text).splitlines()
            continue
        kinds = (ast.JoinedStr, ast.Constant, ast.BinOp)
        found += [text_of(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return tuple(text for text in found if text.strip("\0"))


def occurs(message: str) -> bool:
    """Whether a string of the code has the message's words in order, and values for each `...`."""
    pieces = [re.escape(piece) for piece in message.split("...")]
    # a value may be several with text between: f"{width}x{height}"
    pattern = re.compile(r"[^\n]*?\0[^\n]*?".join(pieces))
    return any(pattern.search(text) for text in strings())


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_code(message):
    assert occurs(message), message


def test_a_message_that_is_not_in_the_code_is_found_out():
    assert len(MESSAGES) > 40
    assert not occurs("no tokenizer directory at ...")
    assert not occurs("config ... does not exist; see the folder config/")
    assert not occurs("config does ... not exist; see the folder configs/")

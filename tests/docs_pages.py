"""Reading the documentation: its code blocks, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```(\S*)[ \t]*\n(.*?)^\1```[ \t]*$", re.DOTALL | re.MULTILINE)
# A command in a sentence, such as `tools/score.py OUTPUT_DIR`.
INLINE = re.compile(r"(?:(?:\.venv/bin/)?python )?((?:tools|datasets)/\w+\.py)((?:\s[^`]*)?)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
# What makes a line of a block without a language a command all the same.
COMMAND = re.compile(r"^\s*(?:\$ )?(?:\.venv/bin/)?(?:python3?|make|pytest|torchrun|srun|bash) \S")
RUN = ("bash", "python")


@dataclass(frozen=True)
class Block:
    """A fenced block: line of its fence, language, text, and what stands right below as output."""

    line: int
    language: str
    text: str
    shown: list[str]


def pages() -> list[str]:
    """Every page for people, as paths from the root."""
    patterns = ("README.md", "docs/*.md", "configs/README.md", "datasets/README.md")
    patterns += ("tools/README.md", "weights/*/README.md", "examples/**/README.md")
    paths = (path for pattern in patterns for path in sorted(ROOT.glob(pattern)))
    return [path.relative_to(ROOT).as_posix() for path in paths]


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order; output is ```text, below Python also ```."""
    text, made = read(page), []
    for fence in FENCE.finditer(text):
        below = FENCE.match(text, fence.end() + 2) or FENCE.match(text, fence.end() + 1)
        languages = ("", "text") if fence[2] == "python" else ("text",)
        shown = below[3].splitlines() if below and below[2] in languages else []
        made.append(Block(text.count("\n", 0, fence.start()) + 1, fence[2], fence[3], shown))
    return made


def to_run(page: str) -> list[Block]:
    """What a test has to run of a page."""
    return [block for block in blocks(page) if block.language in RUN]


def stray_commands(page: str) -> list[str]:
    """Lines that look like commands but stand in no block that says it is bash."""
    others = (block for block in blocks(page) if block.language not in RUN)
    lines = [line for block in others for line in block.text.splitlines()]
    # four spaces make a block too, except inside a list
    lines += [line for line in prose(page).splitlines() if line.startswith("    ")]
    return [line for line in lines if COMMAND.match(line)]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def inline_commands(page: str) -> list[tuple[str, list[str]]]:
    """The scripts that a page's sentences and tables call, each with its arguments."""
    spans = (INLINE.fullmatch(span) for span in re.findall(r"`([^`]+)`", prose(page)))
    return [(match[1], match[2].split()) for match in spans if match]


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page that lead to no other server."""
    targets = (a or b for a, b in LINK.findall(prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    made: list[str] = []
    for title in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        made.append(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return {f"{s}-{n}" if (n := made[:i].count(s)) else s for i, s in enumerate(made)}

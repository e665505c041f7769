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


@dataclass(frozen=True)
class Block:
    """A fenced block: page (path from the root), line of its fence, language, text."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    """Every page for people, as paths from the root."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found += [ROOT / name / "README.md" for name in ("configs", "datasets", "tools")]
    found += sorted(ROOT.glob("weights/*/README.md")) + sorted(ROOT.glob("examples/**/README.md"))
    return [path.relative_to(ROOT).as_posix() for path in found if path.is_file()]


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    text = read(page)
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[2], found[3])
        for found in FENCE.finditer(text)
    ]


def without_blocks(page: str) -> str:
    """A page's prose: fenced blocks are left out."""
    return FENCE.sub("", read(page))


def stray_commands(page: str) -> list[str]:
    """Lines that look like commands but stand in no block that says it is bash."""
    lines = [
        line
        for block in blocks(page)
        if block.language not in ("bash", "python")
        for line in block.text.splitlines()
    ]
    # four spaces make a block too, except inside a list
    prose = without_blocks(page).splitlines()
    lines += [line for line in prose if line.startswith("    ")]
    return [line for line in lines if COMMAND.match(line)]


def inline_commands(page: str) -> list[tuple[str, list[str]]]:
    """The scripts that a page's sentences and tables call, each with its arguments."""
    spans = re.findall(r"`([^`]+)`", without_blocks(page))
    found = [INLINE.fullmatch(span) for span in spans]
    return [(match[1], match[2].split()) for match in found if match]


def shown_after(block: Block) -> list[str]:
    """The lines of output that stand right below a block: ```text, below Python also ```."""
    last = block.line + block.text.count("\n") + 1
    languages = ("", "text") if block.language == "python" else ("text",)
    for other in blocks(block.page):
        if other.language in languages and last < other.line <= last + 2:
            return other.text.splitlines()
    return []


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page that lead to no other server."""
    found = [a or b for a, b in LINK.findall(without_blocks(page))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    made: set[str] = set()
    counts: dict[str, int] = {}
    for title in re.findall(r"^#{1,6} +(.+?)\s*#*$", without_blocks(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = counts.get(slug, 0)
        counts[slug] = number + 1
        made.add(f"{slug}-{number}" if number else slug)
    return made

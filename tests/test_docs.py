"""The README and the docs: every code block runs, every link, file, name and message is there.

Blocks run in order in a folder of their page, as they stand but for the changes of docs_sandbox.py;
`python` there is a fork of one process that has the libraries imported (docs_warm.py).
"""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from caption_server import chat_server
from detectron2.config import get_cfg
from docs_sandbox import CHANGES, ROOT, build_sandbox, changed, copy_sandbox

from gella.config import add_gella_config

FENCE = re.compile(r"^( *)```(\S*)[ \t]*\n(.*?)^\1```[ \t]*$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?:(?:\.venv/bin/)?python )?((?:tools|datasets)/\w+\.py)((?:\s[^`]*)?)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^\s*(?:\$ )?(?:\.venv/bin/)?(?:python3?|make|pytest|torchrun|srun|bash) \S")
RUN = ("bash", "python")
SHOWN = ("", "json", "yaml", "text", "sbatch", "bibtex")  # files, trees, output
SECONDS = 900  # for one block, on a very busy machine


class Block(NamedTuple):
    """A fenced block: line of its fence, language, text, and what stands right below as output."""

    line: int
    language: str
    text: str
    shown: list[str]


def pages():
    patterns = ("README.md", "docs/*.md", "configs/README.md", "datasets/README.md")
    patterns += ("tools/README.md", "weights/*/README.md", "examples/**/README.md")
    paths = (path for pattern in patterns for path in sorted(ROOT.glob(pattern)))
    return [path.relative_to(ROOT).as_posix() for path in paths]


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    text, made = read(page), []
    for fence in FENCE.finditer(text):
        below = FENCE.match(text, fence.end() + 2) or FENCE.match(text, fence.end() + 1)
        languages = ("", "text") if fence[2] == "python" else ("text",)
        shown = below[3].splitlines() if below and below[2] in languages else []
        made.append(Block(text.count("\n", 0, fence.start()) + 1, fence[2], fence[3], shown))
    return made


def to_run(page):
    return [block for block in blocks(page) if block.language in RUN]


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def stray_commands(page):
    """Lines that look like commands but stand in no block that says it is bash."""
    texts = [block.text for block in blocks(page) if block.language not in RUN]
    # four spaces make a block too, except inside a list
    texts += re.findall(r"^    .*", prose(page), re.MULTILINE)
    return [line for text in texts for line in text.splitlines() if COMMAND.match(line)]


def inline_commands(page):
    """The scripts that a page's sentences and tables call, each with its arguments."""
    spans = (INLINE.fullmatch(span) for span in re.findall(r"`([^`]+)`", prose(page)))
    return [(match[1], match[2].split()) for match in spans if match]


def links(page):
    targets = (a or b for a, b in LINK.findall(prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    made = []
    for title in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        made.append(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return {f"{s}-{n}" if (n := made[:i].count(s)) else s for i, s in enumerate(made)}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    address = tmp_path_factory.mktemp("warm") / "socket"
    paths = os.pathsep.join([str(ROOT / "projects"), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "docs_warm.py"), "serve", str(address)]
    options = {"env": environment, "start_new_session": True, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **options) as server:
        assert server.stdout.readline()
        yield address
        os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def sandbox(small_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "gella"
    build_sandbox(folder, small_shapes)
    return folder


def run_block(place, block, text, folder, environment):
    if block.language == "python":
        # a line per line of the page, so that tracebacks tell the page's
        (folder / "block.py").write_text("\n" * block.line + text)
        text = "python block.py"
    # exports stay for the page's later blocks
    script = f"set -e -o pipefail\nsource ./.exports\n{text}\nexport -p > ./.exports\n"
    (folder / "block.sh").write_text(script)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options = {"cwd": folder, "env": environment, "text": True, "start_new_session": True}
    process = subprocess.Popen(["bash", "block.sh"], **streams, **options)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):  # and what it left in the background
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, f"{place}: {process.returncode}\n{text}\n{output[-3000:]}"
    return output


@pytest.mark.parametrize("page", [page for page in pages() if to_run(page)])
def test_every_block_runs_and_prints_what_stands_below_it(page, warm, sandbox, tmp_path):
    folder = tmp_path / "gella"
    environment = copy_sandbox(sandbox, folder, warm)
    (folder / ".exports").touch()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    with chat_server() as chat:
        for block in to_run(page):
            text = changed(block.text, page).replace("@CHAT@", chat.url).replace("@PORT@", port)
            output = run_block(f"{page}:{block.line}", block, text, folder, environment)
            assert [line for line in block.shown if line not in output] == []


def key_exists(key):
    node = get_cfg()
    add_gella_config(node)
    for part in key.split("."):
        node = node.get(part, {})
    return node != {}


@pytest.fixture(scope="module")
def help_of(warm, sandbox, tmp_path_factory):
    """What a script's --help says, with a first word that may be a mode of its own."""
    folder = tmp_path_factory.mktemp("help") / "gella"
    options = {"cwd": folder, "env": copy_sandbox(sandbox, folder, warm), "text": True}
    return cache(lambda *words: subprocess.check_output(["python", *words, "--help"], **options))


@pytest.mark.parametrize("page", [page for page in pages() if inline_commands(page)])
def test_commands_in_sentences_have_files_options_and_keys_that_exist(page, help_of):
    for script, words in inline_commands(page):
        assert (ROOT / script).is_file(), script
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if options:
            mode = words[:1] if script == "tools/benchmark.py" else []
            known = help_of(script, *mode)
            assert [o for o in options if not re.search(rf"{o}\b", known)] == [], (script, words)
        for word in words:
            if word.startswith("configs/") and "." in word:
                assert (ROOT / word).is_file(), word
            assert not re.fullmatch(r"[A-Z]+(\.[A-Z_\d]+)+", word) or key_exists(word), word


@pytest.mark.parametrize("page", pages())
def test_blocks_have_a_language_and_names_and_links_lead_to_files_and_headings(page):
    assert {block.language for block in blocks(page)} <= {*RUN, *SHOWN}
    assert stray_commands(page) == []
    roots = [ROOT / folder for folder in ("", "projects", "projects/gella")]
    names = re.findall(r"(?<![\w/.-])((?:\w+/)+\w+\.py)\b", prose(page))
    assert [n for n in names if not any((root / n).is_file() for root in roots)] == []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), target


def test_the_index_names_every_page():
    named = {target.partition("#")[0] for target in links("docs/README.md")}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= named


def test_no_change_is_stale():
    for page, changes in CHANGES.items():
        texts = [block.text for p in (pages() if page == "*" else [page]) for block in to_run(p)]
        texts = texts if page != "Makefile" else [read(page)]
        assert [old for old in changes if not any(old in text for text in texts)] == [], page


def test_the_reader_of_pages_sees_what_is_wrong(tmp_path):
    page = str(tmp_path / "page.md")
    Path(page).write_text(
        "# A `title`, twice\n# A `title`, twice\n[x](b.md#c) ![p](p.png) [out](https://host/)\n"
        "Run `tools/score.py DIR --json F` and `score`.\n\n"
        "    python tools/score.py\n\n"
        "```python\nmake demo\n```\n\n```\nsaid\n```\n\n- in a list\n\n"
        "  ```\n  $ make train\n  ```\n\n```json\npython is not run here\n```\n"
    )
    found = [(b.line, b.language, b.shown) for b in blocks(page)]
    assert found == [(8, "python", ["said"]), (12, "", []), (18, "", []), (22, "json", [])]
    stray = ["$ make train", "python is not run here", "python tools/score.py"]
    assert [line.strip() for line in stray_commands(page)] == stray
    assert links(page) == ["b.md#c", "p.png"]
    assert anchors(page) == {"a-title-twice", "a-title-twice-1"}
    assert inline_commands(page) == [("tools/score.py", ["DIR", "--json", "F"])]


def test_the_readme_starts_with_make_and_six_lines_of_python():
    (code,) = [block for block in blocks("README.md") if block.language == "python"]
    assert len(code.text.strip().splitlines()) == 7 and code.shown  # six and an empty one
    (quick,) = [b.text for b in blocks("README.md") if b.text.startswith("make ")]
    helped = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True).stdout
    named = re.findall(r"^make (\w+)", quick, re.MULTILINE)
    assert named == ["demo", "app", "train", "test"]
    for name in named:
        assert re.search(rf"^{name}: \$\(STAMP\)", read("Makefile"), re.MULTILINE), name
        assert f"make {name} " in helped
    paths = r"\b(?:datasets|tools|configs|weights)/[\w./]+\.(?:py|yaml)"
    for path in re.findall(paths, read("Makefile")):
        assert (ROOT / path).is_file(), path


def test_the_citation_is_the_one_of_the_citation_file():
    (entry,) = [block.text for block in blocks("README.md") if block.language == "bibtex"]
    fields = {k: " ".join(v.split()) for k, v in re.findall(r"(\w+) += {([^}]*)}", entry)}
    cited = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in cited["authors"]]
    assert fields.pop("author") == " and ".join(names)
    assert fields == {key: str(cited[key]) for key in ("title", "journal", "year")}


MAP = read("docs/CODE_MAP.md")
CODE = sorted(set(re.findall(r"`([^`\n]+)`", MAP)))
PLACES = [c for c in CODE if re.fullmatch(r"[\w./]+\.(?:py|yaml)(?::[\w.]+)?|[\w/]+/", c)]


@cache
def names(path):
    """What a file defines at the top, and `Class.method`."""
    defined = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for inner in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else ():
            defined.add(f"{node.name}.{getattr(inner, 'name', '')}")
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        defined.add(getattr(node, "name", ""))
    return defined


def problem(place):
    """Why a place of the map does not exist; "" if it does."""
    file, _, name = place.partition(":")
    path = next((p for p in (ROOT / "projects/gella" / file, ROOT / file) if p.exists()), None)
    if path is None:
        return f"there is no {file}"
    return "" if not name or name in names(path) else f"{file} has no {name}"


def test_every_place_and_key_of_the_map_exists():
    keys = [c for c in CODE if re.fullmatch(r"[A-Z]+(?:\.[A-Z_0-9]+)+", c)]
    assert len(PLACES) > 60 and len(keys) > 12
    assert [problem(place) for place in PLACES if problem(place)] == []
    assert [key for key in keys if not key_exists(key)] == []
    assert "no Resoblend" in problem("modeling/resoblend.py:Resoblend")
    assert "no ResoBlend.ask" in problem("modeling/resoblend.py:ResoBlend.ask")
    assert "there is no modeling/none.py" in problem("modeling/none.py")


@pytest.mark.parametrize("heading, wanted", [
    ("Equations", map(str, range(1, 11))),
    ("Tables", map(str, range(1, 13))),
    ("Figures", map(str, range(1, 7))),
    ("Sections", "3.1 3.2 3.3 3.4 4.1 4.2 4.3 4.4 4.5".split()),
])  # fmt: skip
def test_nothing_that_the_paper_numbers_is_missing_on_the_map(heading, wanted):
    (table,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", MAP, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| ([\d., right]+) \|", table, re.MULTILINE)
    assert set(wanted) <= {number for row in rows for number in re.findall(r"[\d.]+", row)}


def test_every_file_of_the_model_is_on_the_map():
    files = {p.name for p in (ROOT / "projects/gella/modeling").glob("*.py")}
    named = {place.partition(":")[0].rpartition("/")[2] for place in PLACES}
    assert files - {"__init__.py", "adapters.py"} <= named


def text_of(node):
    """A string of the source, with "\0" where a value is put in."""
    match node:
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return text_of(left) + text_of(right)
        case ast.Constant(value=str(text)):
            return re.sub(r"%[ds]", "\0", text)
    return "\0"


@cache
def strings():
    """All strings of the code, and the lines of the Makefile."""
    made = re.sub(r"\$\(\w+\)|%[ds]", "\0", read("Makefile")).splitlines()
    kinds = (ast.JoinedStr, ast.Constant, ast.BinOp)
    for pattern in ("projects/gella/**/*.py", "tools/*.py", "datasets/*.py"):
        for path in ROOT.glob(pattern):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            made += [text_of(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return tuple(text for text in made if text.strip("\0"))


def occurs(message):
    """Whether a string of the code has the message's words in order, and values for each `...`."""
    pieces = [re.escape(piece) for piece in message.split("...")]
    # a value may be several with text between: f"{width}x{height}"
    pattern = re.compile(r"[^\n]*?\0[^\n]*?".join(pieces))
    return any(pattern.search(text) for text in strings())


def test_the_messages_of_troubleshooting_are_in_the_code():
    # The first cell of a row that begins and ends with a backtick is a message.
    messages = re.findall(r"^\| `([^`]+)` \|", read("docs/TROUBLESHOOTING.md"), re.MULTILINE)
    assert len(messages) > 40
    assert [message for message in messages if not occurs(message)] == []
    wrong = "config ... does not exist; see the folder config/"
    assert not occurs(wrong) and not occurs("config does ... not exist; see the folder configs/")

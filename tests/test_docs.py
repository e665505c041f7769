"""Every code block of the README and the docs runs, and every link leads somewhere.

Blocks of bash are given to bash as they stand, but for the changes that docs_replacements.py
states; blocks of Python are scripts. Each page has a folder of its own, in which its blocks run in
order. `python` there is a fork of one process that has the libraries imported (docs_warm.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from caption_server import chat_server
from detectron2.config import get_cfg
from docs_pages import (
    ROOT,
    Block,
    anchors,
    blocks,
    inline_commands,
    links,
    pages,
    read,
    shown_after,
    stray_commands,
)
from docs_replacements import REPLACEMENTS, replace
from docs_sandbox import build_sandbox, copy_sandbox
from docs_srun import free_port

from gella.config import add_gella_config

RUN = ("bash", "python")
SHOWN = ("", "json", "yaml", "text", "sbatch")  # files, trees, output
SECONDS = 900  # for one block, on a very busy machine


def kill_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a warm Python."""
    folder = tmp_path_factory.mktemp("warm")
    paths = os.pathsep.join([str(ROOT / "projects"), str(ROOT / "tests")])
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "docs_warm.py"), "serve", str(folder / "socket")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        start_new_session=True,
        stderr=(folder / "server.txt").open("w"),
    )
    try:
        end = time.monotonic() + 300
        while not (folder / "socket").exists():
            assert server.poll() is None, (folder / "server.txt").read_text()
            assert time.monotonic() < end, "the libraries were not imported in five minutes"
            time.sleep(0.05)
        yield folder / "socket"
    finally:
        kill_group(server)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pages get copies of."""
    folder = tmp_path_factory.mktemp("docs") / "gella"
    build_sandbox(folder)
    return folder


def run_block(block: Block, text: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a block in a folder; its output, and an assertion on its exit status."""
    if block.language == "python":
        # a line per line of the page, so that tracebacks tell the page's
        (folder / "block.py").write_text("\n" * block.line + text)
        text = "python block.py"
    # exports stay for the page's later blocks
    script = f"set -e -o pipefail\nsource ./.exports\n{text}\nexport -p > ./.exports\n"
    (folder / "block.sh").write_text(script)
    process = subprocess.Popen(
        ["bash", "block.sh"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        kill_group(process)
    place = f"{block.page}:{block.line}"
    assert process.returncode == 0, (
        f"{place}: status {process.returncode}\n{text}\n{output[-3000:]}"
    )
    return output


def page_blocks(page: str) -> list[Block]:
    """What a test has to run of a page."""
    return [block for block in blocks(page) if block.language in RUN]


@pytest.mark.parametrize("page", [page for page in pages() if page_blocks(page)])
def test_every_block_of_the_page_runs(page, warm, sandbox, tmp_path):
    folder = tmp_path / "gella"
    environment = copy_sandbox(sandbox, folder, warm)
    (folder / ".exports").touch()
    with chat_server() as chat:
        for block in page_blocks(page):
            text = replace(block.text, page).replace("@CHAT@", chat.url)
            text = text.replace("@PORT@", str(free_port()))
            output = run_block(block, text, folder, environment)
            assert [line for line in shown_after(block) if line not in output] == []


@pytest.mark.parametrize("page", pages())
def test_blocks_have_a_known_language_and_commands_stand_in_blocks_of_bash(page):
    assert {block.language for block in blocks(page)} <= {*RUN, *SHOWN}
    assert stray_commands(page) == []


@pytest.fixture(scope="module")
def help_of(warm, sandbox, tmp_path_factory):
    """What a script's --help says, with a first word that may be a mode of its own."""
    folder = tmp_path_factory.mktemp("help") / "gella"
    environment = copy_sandbox(sandbox, folder, warm)

    @cache
    def ask(script: str, mode: str) -> str:
        command = ["python", script, *([mode] if mode else []), "--help"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-1000:]}"
        return done.stdout

    return ask


@pytest.mark.parametrize("page", [page for page in pages() if inline_commands(page)])
def test_commands_in_sentences_have_files_options_and_keys_that_exist(page, help_of):
    cfg = get_cfg()
    add_gella_config(cfg)
    for script, words in inline_commands(page):
        assert (ROOT / script).is_file(), script
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if options:
            mode = words[0] if script == "tools/benchmark.py" else ""
            known = help_of(script, mode)
            assert [o for o in options if not re.search(rf"{o}\b", known)] == [], (script, words)
        for word in words:
            if word.startswith("configs/") and "." in word:
                assert (ROOT / word).is_file(), word
            if re.fullmatch(r"[A-Z]+(\.[A-Z_\d]+)+", word):
                node = cfg
                for part in word.split("."):
                    node = node[part]


@pytest.mark.parametrize("entry", REPLACEMENTS, ids=lambda entry: f"{entry.page}: {entry.old}")
def test_no_replacement_is_stale(entry):
    where = pages() if entry.page == "*" else [entry.page]
    texts = [block.text for page in where for block in page_blocks(page)]
    assert any(entry.old in text for text in texts or [read(entry.page)])
    assert entry.why


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), target


def test_the_index_names_every_page():
    named = {target.partition("#")[0] for target in links("docs/README.md")}
    written = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert written <= named


def test_the_reader_of_pages_sees_what_is_wrong(tmp_path):
    page = str(tmp_path / "page.md")
    Path(page).write_text(
        "# A `title`, twice\n# A `title`, twice\n[x](b.md#c) ![p](p.png) [out](https://host/)\n"
        "Run `tools/score.py DIR --json F` and `score`.\n\n"
        "    python tools/score.py\n\n"
        "```python\nmake demo\n```\n\n```\nsaid\n```\n\n- in a list\n\n"
        "  ```\n  $ make train\n  ```\n\n```json\npython is not run here\n```\n"
    )
    assert [(b.line, b.language) for b in blocks(page)] == [
        *((8, "python"), (12, ""), (18, ""), (22, "json")),
    ]
    assert shown_after(blocks(page)[0]) == ["said"] and shown_after(blocks(page)[1]) == []
    assert [line.strip() for line in stray_commands(page)] == [
        *("$ make train", "python is not run here", "python tools/score.py"),
    ]
    assert links(page) == ["b.md#c", "p.png"]
    assert anchors(page) == {"a-title-twice", "a-title-twice-1"}
    assert inline_commands(page) == [("tools/score.py", ["DIR", "--json", "F"])]

"""The scripts that download the benchmarks, with the programs that they call replaced by one that
writes down its arguments."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

import gella  # noqa: F401  registers the datasets

DATASETS = Path(__file__).resolve().parents[1] / "datasets"
SCRIPTS = sorted(DATASETS.glob("get_*.sh"))


def test_there_is_one_for_each_benchmark():
    names = [path.stem.removeprefix("get_") for path in SCRIPTS]
    assert names == ["coco", "entityseg", "png", "refcoco"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_downloads_resumably_below_the_root_and_checks(script, tmp_path):
    programs, root = tmp_path / "bin", tmp_path / "data"
    programs.mkdir()
    root.mkdir()
    for name in ("wget", "unzip", "hf", "python"):
        note = f'echo {name} "$PWD" "$@" >> "{tmp_path}/calls"\n'
        (programs / name).write_text(f"#!/bin/sh\n{note}")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = {"PATH": path, "DETECTRON2_DATASETS": str(root)}
    subprocess.run(["sh", str(script)], check=True, env=environment)
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert {call[1] for call in calls} == {str(root)}
    downloads = [call for call in calls if call[0] == "wget"]
    assert downloads and all(call[2:4] == ["-c", "-P"] for call in downloads)
    *_, last = calls
    checked = [call[3] for call in calls if call[2] == str(DATASETS / "check.py")]
    assert last[3] in checked and set(checked) <= set(DatasetCatalog.list())
    # what is unpacked was downloaded, or came out of such an archive
    fetched = {f"{call[4]}/{call[5].rsplit('/', 1)[1]}" for call in downloads}
    unpacked = {call[4] for call in calls if call[0] == "unzip"}
    inner = {f"coco/annotations/panoptic_{split}2017.zip" for split in ("train", "val")}
    assert unpacked <= fetched | inner
    # every file of the tree at its head is one that the readers look for
    page = (DATASETS / "README.md").read_text()
    tree = [line[4:] for line in script.read_text().splitlines() if line.startswith("#   ")]
    names = {name for line in tree for name in re.findall(r"[\w(){},]+\.(?:jsonl?|p)\b", line)}
    assert names and all(name in page for name in names)

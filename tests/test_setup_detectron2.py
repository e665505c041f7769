"""tools/setup_detectron2.py: which Detectron2 is chosen, and that a failed choice falls back."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tool(monkeypatch):
    """The script, with no choice from outside."""
    monkeypatch.delenv("GELLA_DETECTRON2", raising=False)
    path = ROOT / "tools" / "setup_detectron2.py"
    spec = importlib.util.spec_from_file_location("tool_setup_detectron2", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def play(monkeypatch, tool, installed=None, answers=False, builds=True, core_builds=True):
    """An environment without pip or network; what the script does in it, as a list that grows."""
    did, version = [], [installed]

    def pip_install(*arguments):
        target = "upstream" if arguments[-1].startswith("git+") else "core"
        did.append(target)
        works = core_builds if target == "core" else bool(builds)
        if works and builds != "broken":
            version[0] = "0.6" if target == "upstream" else "0.6+core"
        return works

    monkeypatch.setattr(tool, "installed_version", lambda: version[0])
    monkeypatch.setattr(tool, "repository_answers", lambda: did.append("ask") or answers)
    monkeypatch.setattr(tool, "pip_install", pip_install)
    return did


@pytest.mark.parametrize(
    ("world", "forced", "did", "status", "says"),
    [
        ({"installed": "0.6"}, "", [], 0, "0.6: it is installed already"),
        ({"answers": True}, "", ["ask", "upstream"], 0, "0.6: the original"),
        ({"answers": False}, "", ["ask", "core"], 0, "does not answer"),
        (
            {"answers": True, "builds": False},
            "",
            ["ask", "upstream", "core"],
            0,
            "not be installed",
        ),
        # It is built but cannot be imported.
        ({"answers": True, "builds": "broken"}, "", ["ask", "upstream", "core"], 0, "_core, b"),
        ({"installed": "0.6"}, "core", ["core"], 0, "0.6+core: projects/detectron2_core"),
        ({"installed": "0.6+core"}, "upstream", ["upstream"], 0, "0.6: the original"),
        ({"builds": False}, "upstream", ["upstream"], 1, "could not be installed"),
        ({"core_builds": False}, "", ["ask", "core"], 1, "could not be installed"),
        ({}, "other", [], 2, "use core or upstream"),
    ],
)
def test_choice(monkeypatch, capsys, tool, world, forced, did, status, says):
    monkeypatch.setenv("GELLA_DETECTRON2", forced)
    done = play(monkeypatch, tool, **world)
    assert (tool.main(), done) == (status, did)
    printed = capsys.readouterr()
    assert says in (printed.out if status == 0 else printed.err)


def test_the_real_probe_sees_the_running_detectron2(monkeypatch, tool):
    import detectron2

    assert tool.installed_version() == detectron2.__version__ and tool.CORE.is_dir()
    monkeypatch.setenv("PATH", "")  # no git
    assert tool.repository_answers() is False

"""tools/setup_detectron2.py: which Detectron2 is chosen, and that a failed choice falls back."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class World:
    """What the script meets and what it does: the environment without pip or network."""

    def __init__(self, monkeypatch, installed=None, answers=False, builds=True, core_builds=True):
        path = ROOT / "tools" / "setup_detectron2.py"
        spec = importlib.util.spec_from_file_location("tool_setup_detectron2", path)
        self.tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.tool)
        self.installed, self.answers, self.did = installed, answers, []
        monkeypatch.setattr(self.tool, "installed_version", lambda: self.installed)
        monkeypatch.setattr(self.tool, "repository_answers", self._ask)

        def pip_install(*arguments):
            target = "upstream" if arguments[-1].startswith("git+") else "core"
            self.did.append(target)
            works = builds if target == "upstream" else core_builds
            if works:
                self.installed = "0.6" if target == "upstream" else "0.6+core"
            return works

        monkeypatch.setattr(self.tool, "pip_install", pip_install)

    def _ask(self):
        self.did.append("ask")
        return self.answers


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    """No choice from outside."""
    monkeypatch.delenv("GELLA_DETECTRON2", raising=False)


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
        ({"installed": "0.6"}, "core", ["core"], 0, "0.6+core: projects/detectron2_core"),
        ({"installed": "0.6+core"}, "upstream", ["upstream"], 0, "0.6: the original"),
        ({"builds": False}, "upstream", ["upstream"], 1, "could not be installed"),
        ({"core_builds": False}, "", ["ask", "core"], 1, "could not be installed"),
        ({}, "other", [], 2, "use core or upstream"),
    ],
)
def test_choice(monkeypatch, capsys, world, forced, did, status, says):
    if forced:
        monkeypatch.setenv("GELLA_DETECTRON2", forced)
    world = World(monkeypatch, **world)
    assert world.tool.main() == status
    assert world.did == did
    printed = capsys.readouterr()
    assert says in (printed.out if status == 0 else printed.err)


def test_an_original_that_cannot_be_imported_counts_as_failed(monkeypatch, capsys):
    world = World(monkeypatch, answers=True)
    versions = iter([None, None, "0.6+core"])  # before, after the original, after the core
    monkeypatch.setattr(world.tool, "installed_version", lambda: next(versions))
    assert world.tool.main() == 0
    assert world.did == ["ask", "upstream", "core"]
    assert "projects/detectron2_core" in capsys.readouterr().out


def test_the_real_probe_sees_the_running_detectron2(monkeypatch):
    import detectron2

    spec = importlib.util.spec_from_file_location("t", ROOT / "tools" / "setup_detectron2.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.installed_version() == detectron2.__version__
    assert tool.CORE.is_dir()
    monkeypatch.setenv("PATH", "")  # no git
    assert tool.repository_answers() is False

"""docs/OWN_DATA.md runs as it stands; modules of the user's own are imported once, or named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gella import load_config
from gella.commands import demo, train
from gella.data.register import import_modules

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "own_dataset"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Runs the page's blocks in one process: the model's libraries take seconds to import.
DRIVER = """
import json, runpy, shlex, sys
from pathlib import Path
for kind, text in json.load(sys.stdin):
    if kind == "python":
        exec(compile(text, "OWN_DATA.md", "exec"), {"__name__": "block"})
        continue
    for line in text.splitlines():
        python, script, *sys.argv[1:] = shlex.split(line)
        assert python == "python", line
        sys.argv[0], sys.path[0] = script, str(Path(script).resolve().parent)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (line, end.code)
"""


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every code block of the page that names its language."""
    return BLOCK.findall((ROOT / "docs" / "OWN_DATA.md").read_text(encoding="utf-8"))


def modules(*names: object) -> Any:
    """A config that names modules."""
    options = ["DATASETS.MODULES", str([str(name) for name in names])] if names else []
    return load_config(ROOT / "configs" / "gella_tiny_shapes.yaml", options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder that has the project's scripts and configs, but none of its data."""
    for name in ("examples", "tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_shows_the_files_and_the_example_is_short():
    texts = [text for _, text in blocks()]
    for name in ("my_dataset.py", "own_dataset.yaml"):
        assert (EXAMPLE / name).read_text(encoding="utf-8") in texts
    lines = (EXAMPLE / "my_dataset.py").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip()]
    assert len(code) < 30
    assert f"Register it: {len(code)} lines" in (ROOT / "docs" / "OWN_DATA.md").read_text()


def driven(jobs: list[tuple[str, str]], **environment: str) -> str:
    """What blocks print, with this environment and without the caller's DETECTRON2_DATASETS."""
    kept = {k: v for k, v in os.environ.items() if k != "DETECTRON2_DATASETS"}
    options = {"capture_output": True, "text": True, "timeout": 600}
    options["env"] = {**kept, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(jobs), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pictures_and_captions_are_trained_on_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenes, tools = ROOT / "examples" / "shapes", ROOT / "tools"
    config = ROOT / "weights" / "gella_tiny_shapes" / "config.yaml"
    own = "DATASETS.MODULES \"['data/mine/records.py']\" SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2"
    own += "".join(f" DATASETS.{split} \"('mine',)\"" for split in ("TRAIN", "TEST"))
    commands = (
        f"{tools}/demo.py --input {scenes} --captions {scenes}/captions.jsonl --records data/mine",
        f"{ROOT}/datasets/check.py --module data/mine/records.py mine",
        f"{tools}/train_net.py --config-file {config} {own} OUTPUT_DIR tuned",
    )
    text = "\n".join(f"python {command}" for command in commands)
    printed = driven([("bash", text)], DETECTRON2_DATASETS=str(tmp_path / "data"))
    assert "0 errors, 0 warnings" in printed and "ungrounded nouns" in printed
    results = json.loads(Path("tuned/results.json").read_text())
    assert results["png"]["n"] == 34 and results["png"]["oracle_AR"] == pytest.approx(100)


@pytest.mark.parametrize("data", ["datasets", "~/data"])
def test_every_block_of_the_page_runs_whatever_the_folder_of_datasets(here, data):
    shown = (EXAMPLE / "my_dataset.py").read_text(encoding="utf-8")
    # The listing of my_dataset.py is run by what follows it; run here too, it would register twice.
    jobs = [(kind, text) for kind, text in blocks() if kind != "yaml" and text != shown]
    assert [kind for kind, _ in jobs] == ["bash", "python", "bash", "python", "bash"]
    if data == "datasets":
        (here / data).mkdir()
        printed = driven(jobs)
    else:
        printed = driven(jobs, DETECTRON2_DATASETS=data, HOME=str(here))
    first = "There is a red box and a blue ball on the floor."
    assert f"{first} [('a red box', [1]), ('a blue ball', [2]), ('the floor', [0])]" in printed
    assert "torch.Size([3, 96, 96]) 3" in printed
    results = json.loads((here / "output/own_dataset/results.json").read_text())
    assert results["png"]["n"] == 6 and results["png"]["oracle_AR"] == pytest.approx(100)
    written = {path.name for path in (here / "output/own_dataset/demo").iterdir()}
    assert written == {"4_grounding.png", "4_colormap.png", "4.json", "index.html", "page"}
    assert "loader, 0 workers" in printed


def test_a_module_runs_once_however_it_is_named(here):
    count = "import pathlib\nwith open('ran.txt', 'a') as f:\n    f.write(__name__ + '\\n')\n"
    for folder in ("one", "two"):
        (here / folder).mkdir()
        (here / folder / "data.py").write_text(count)
    first = import_modules(modules("one/data.py", here / "one" / "data.py", "json"))
    second = import_modules(modules("one/../one/data.py"))
    assert import_modules(modules()) == []
    assert first[0] is first[1] is second[0] and first[2] is json
    assert len((here / "ran.txt").read_text().splitlines()) == 1
    import_modules(modules("two/data.py"))  # another file of the same name
    assert len(set((here / "ran.txt").read_text().splitlines())) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nimport no_such_library\n", "ModuleNotFoundError: No module.*line 2"),
        ("x = (1\n", "SyntaxError"),
        ("\n\nraise RuntimeError('two\\nlines')\n", r"RuntimeError: two.*line 3"),
    ],
)
def test_a_broken_module_is_named_with_its_line_and_can_be_mended(here, text, message):
    (here / "data.py").write_text(text)
    for _ in range(2):  # not taken for imported after it failed
        with pytest.raises(ValueError, match=r"(?s)DATASETS\.MODULES.*data\.py.*" + message):
            import_modules(modules("data.py"))
    (here / "data.py").write_text("ANSWER = 42\n")
    assert import_modules(modules("data.py"))[0].ANSWER == 42


def test_missing_modules_are_named(here):
    with pytest.raises(FileNotFoundError, match=r"MODULES.*absent\.py.*current folder"):
        import_modules(modules("absent.py"))
    with pytest.raises(ValueError, match=r"MODULES.*no_such_package\.data"):
        import_modules(modules("no_such_package.data"))


def test_the_tools_report_a_missing_module_in_one_line(here, capsys, monkeypatch):
    config = ["--config-file", "configs/gella_tiny_shapes.yaml"]
    override = ["DATASETS.MODULES", "['absent.py']"]
    assert demo.main([*config, "--dataset", "own_val", "--opts", *override]) == 2
    monkeypatch.setattr(sys, "argv", ["train_net.py", *config, *override])
    said = [capsys.readouterr().err]
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    for text in (*said, capsys.readouterr().err):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "absent.py" in line

"""Guards the house: twelve rooms, arrows that only go down, third parties at home, docstrings.

The rules are data; the checkers take a folder, so that one broken example of each is seen to fail.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "projects" / "gella"
CORE_LINES, FUNCTION_LINES, SMALL_FILE = 2000, 60, 60

# room -> the rooms that it may import; "" is gella/__init__.py, which registers everything.
ARROWS: dict[str, set[str]] = {
    "config": set(),
    "utils": set(),
    "entities": {"utils"},
    "text": {"utils"},
    "weights": {"modeling", "utils"},  # it builds what it fills
    "segmenters": {"entities", "utils"},
    "captions": {"entities", "text", "utils"},
    "pictures": {"entities", "text", "utils"},
    "data": {"entities", "text", "utils"},
    "modeling": {"entities", "text"},
    "evaluation": {"data", "entities", "text", "utils"},
    "predictor": {"data", "segmenters", "pictures", "weights", "entities", "text", "utils"},
    "engine": {"data", "evaluation", "modeling", "weights", "pictures"},
}
ARROWS["engine"] |= {"entities", "text", "utils"}
ARROWS["predictor"] |= {"config"}  # from_config reads one
ARROWS["commands"] = {"", *ARROWS}
# Files of modeling that put siblings together; only the first three see other rooms.
COMPOSERS = ("meta_arch", "clip_grounder", "inference", "language_decoder", "mask_decoder")
COMPOSERS += ("criterion", "upstream_mask_decoder", "__init__")
HOMES = {
    "open_clip": {"modeling.image_encoder"},
    "timm": {"modeling.colormap_encoder"},
    "deepspeed": {"engine.zero", "engine.zero_checkpoint", "weights.checkpoint"},
    "peft": {"modeling.adapters"},
    "bitsandbytes": {"modeling.adapters"},
    "accelerate": {"modeling.adapters"},
    "safetensors": {"weights.files"},
    "huggingface_hub": {"weights.files", "utils.hub"},
    "mask2former": {"modeling.upstream_mask_decoder"},
    "gradio": {"commands.app_page"},
    "openai": {"captions.endpoint"},
    "spacy": {"text.words"},
    "pandas": {"commands.analyze", "commands.analyze_cases"},
}
# Imported in the function that needs them, never with gella.
LAZY = {*HOMES, "transformers", "tokenizers"} - {"pandas", "gradio"}
# Modules that only register; what they hold is reached through a registry.
REGISTER: set[str] = set()


def modules(package: Path) -> dict[str, Path]:
    """File of every module by its dotted name below the package; "" is the package itself."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(p for p in parts if p != "__init__")] = path
    return names


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted target, line, is at import time); ``from a import b`` gives ``a.b``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            later |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in later
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, id(node) not in later


def inner_imports(package: Path) -> Iterator[tuple[str, str, int]]:
    """(module, module of gella that it imports, line)."""
    names = modules(package)
    for module, path in names.items():
        for target, line, _ in imports(path):
            parts = target.split(".")
            if parts[0] == "gella":
                while ".".join(parts[1:]) not in names:
                    parts.pop()
                yield module, ".".join(parts[1:]), line


def arrow_problems(package: Path) -> list[str]:
    """Imports from room to room, or inside modeling, that are not on the list; and circles."""
    problems, below = [], defaultdict(set)
    for module, other, line in inner_imports(package):
        room, target = module.split(".")[0], other.split(".")[0]
        if room and room not in ARROWS:
            problems.append(f"{module}: no such room")
        elif room and room != target and target not in ARROWS[room]:
            problems.append(f"{module}:{line} imports {other or 'the package, which is above it'}")
        elif room == "modeling":
            composers = COMPOSERS if target == room else COMPOSERS[:3]
            if module != room and module.split(".")[-1] not in composers:
                problems.append(f"{module}:{line} imports {other}")
        below[module].add(other)
    names = set(below)
    while ends := names - {o for m in names for o in below[m] - {m}} or {
        m for m in names if not (below[m] & names) - {m}
    }:
        names -= ends  # nothing imports them, or they import nothing
    return problems + ([f"circle among {', '.join(sorted(names))}"] if names else [])


def home_problems(package: Path) -> list[str]:
    """Third parties imported outside their home, or together with gella."""
    problems = []
    for module, path in modules(package).items():
        for target, line, top in imports(path):
            library = target.split(".")[0]
            if module not in HOMES.get(library, {module}):
                problems.append(f"{module}:{line} imports {library}")
            if library in LAZY and top:
                problems.append(f"{module}:{line} imports {library} at import time")
    return problems


def small_files(package: Path, callers: list[Path]) -> list[str]:
    """Short files that at most one other file imports: they belong into that one."""
    users = defaultdict(set)
    for module, other, _ in inner_imports(package):
        users[other].add(module)
    names = modules(package)
    for caller in callers:
        for target, _, _ in imports(caller):
            users[".".join(target.split(".")[1:-1])].add(str(caller))
            users[".".join(target.split(".")[1:])].add(str(caller))
    return [
        f"{module}: {len(users[module])} importers"
        for module, path in names.items()
        if path.name != "__init__.py" and not module.startswith("commands.")
        if len(path.read_text(encoding="utf-8").splitlines()) < SMALL_FILE
        and len(users[module]) < 2
        and module not in REGISTER
    ]


def function_problems(folder: Path, documented: bool = True) -> list[str]:
    """Functions over the limit; public names without a docstring."""
    problems = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                    problems.append(f"{path.name}:{node.lineno} {node.name} is long")
        bare = [] if not documented or not tree.body else [*undocumented(tree, path.stem)]
        problems += [f"{path.name}:{node} no docstring" for node in bare]
    return problems


def undocumented(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    """Names of what is public in a module or class and says nothing of itself."""
    if not ast.get_docstring(node):
        yield name
    for child in node.body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(child, kinds) and not child.name.startswith("_"):
            marks = {getattr(d, "attr", getattr(d, "id", "")) for d in child.decorator_list}
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, child.name)
            elif not marks & {"setter", "overload"} and not ast.get_docstring(child):
                yield child.name


def test_imports_go_down():
    assert arrow_problems(PACKAGE) == []


def test_third_parties_have_one_home():
    assert home_problems(PACKAGE) == []


def test_files_are_concepts():
    folders = ("tools", "benchmarks", "datasets")
    scripts = [path for name in folders for path in (ROOT / name).glob("*.py")]
    assert small_files(PACKAGE, scripts) == []
    top = {p.stem for p in PACKAGE.glob("*.py")}
    assert top <= {"__init__", "config"} and {p.stem for p in PACKAGE.glob("*/")} >= {*ARROWS} - top


@pytest.mark.parametrize("folder", ["projects/gella", "tools", "datasets", "benchmarks"])
def test_functions_are_short_and_public_names_documented(folder):
    assert function_problems(ROOT / folder) == []


def test_the_core_stays_small():
    core = ROOT / "projects" / "detectron2_core"
    assert function_problems(core, documented=False) == []
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in core.rglob("*.py"))
    assert lines <= CORE_LINES


def test_the_lowest_versions_are_those_of_setup():
    allowed = dict(re.findall(r'"([\w-]+)>=([\w.]+)"', (ROOT / "setup.py").read_text()))
    del allowed["spacy"]  # of the one extra that no test needs
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {n: Version(v) for n, v in pinned.items()} == {n: Version(v) for n, v in allowed.items()}


def test_nothing_shadows_an_installed_package():
    """Scripts put their folder first on the path, `python -m` the current one."""
    installed = {"datasets", *importlib.metadata.packages_distributions()} - {"gella", "detectron2"}
    for folder in ("datasets", "tools", "benchmarks", "tests", "."):
        here = {p.stem for p in (ROOT / folder).glob("*.py")} - {"setup", "conftest"}
        here |= {p.parent.name for p in (ROOT / folder).glob("*/__init__.py")}
        assert not here & installed, folder


BROKEN = [
    (arrow_problems, "entities/a.py", "import gella.data.b", "entities.a:2 imports data.b"),
    (arrow_problems, "modeling/a.py", "import gella.entities.a", "modeling.a:2 imports entities.a"),
    (arrow_problems, "modeling/a.py", "import gella.modeling.b", "modeling.a:2 imports modeling.b"),
    (arrow_problems, "data/b.py", "import gella.data.c", "circle among data.b, data.c"),
    (arrow_problems, "attic/a.py", "import gella.data.b", "attic.a: no such room"),
    (home_problems, "data/b.py", "def f():\n    import timm", "data.b:3 imports timm"),
    (home_problems, "weights/files.py", "import safetensors", "weights.files:2 imports"),
    (lambda p: small_files(p, []), "data/d.py", "", "data.d: 0 importers"),
    (function_problems, "data/b.py", "def f(): ...", "b.py:f no docstring"),
    (function_problems, "data/b.py", "def _f():" + "\n    1" * 60, "b.py:2 _f is long"),
]


@pytest.mark.parametrize(("check", "name", "text", "problem"), BROKEN)
def test_a_broken_rule_is_told(tmp_path, check, name, text, problem):
    files = {
        "data/b.py": "",
        "data/c.py": "import gella.data.b\n",
        "data/e.py": "import gella.data.b\nimport gella.data.c\n",
        "entities/a.py": "",
        "modeling/a.py": "",
        "modeling/b.py": "",
        "modeling/meta_arch.py": "import gella.modeling.a\nimport gella.entities.a\n",
    }
    for file, content in {**files, name: text + "\n"}.items():
        path = tmp_path / "gella" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""Module."""\n' + content)
    assert any(problem in line for line in check(tmp_path / "gella"))

"""Guards the design: imports go down, third parties have a home, files are short, names documented.

The rules are data; the checker functions take a folder, so that the tests also see them fail.
"""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "projects" / "gella"
MAX_LINES = 350
CORE_MAX_LINES = 2000

# What a module may import of gella, besides other modules of its own group. A module that no line
# names belongs to the group of its folder ("data", "modeling", "evaluation", ...); a new file of
# the top folder needs a line here, which is the moment to think about where it belongs.
ARROWS: dict[str, set[str]] = {
    # leaves
    "config": set(),
    "entities": set(),
    "prompts": set(),
    "metrics": set(),
    "checkpoint": {"modeling.state_dicts.files", "zero"},  # DeepSpeed's files among a folder's
    "plugins": set(),
    "colors": set(),
    "outlines": set(),
    "optimizer": set(),
    "training_hooks": set(),
    "zero": set(),
    "agreement": set(),
    "watching": set(),
    "modeling.state_dicts.files": set(),  # reads and writes weight files; knows no model
    # one step up
    "config_file": {"config"},
    "entity_sources": {"entities"},
    "geometry": {"entities"},
    "text_layout": {"colors"},
    "mask_layers": {"outlines"},
    "labels": {"mask_layers", "outlines"},
    "panels": {"colors", "labels", "mask_layers", "text_layout"},
    "visualizer": {"colors", "entities", "labels", "mask_layers", "panels", "text_layout"},
    "grounding": {"entities", "visualizer"},
    "interactive": {
        "colors",
        "entities",
        "grounding",
        "labels",
        "mask_layers",
        "outlines",
        "visualizer",
    },
    # rooms
    "data": {"entities", "entity_sources", "prompts", "geometry"},
    "modeling": set(),  # every file but the one that composes them
    "modeling.meta_arch": {"modeling", "entities", "prompts"},
    "modeling.inference": {"modeling", "prompts"},  # its other half
    "evaluation": {"metrics", "entities", "entity_sources", "prompts"},
    "analysis": {"metrics", "entities", "entity_sources", "evaluation", "visualizer"},
    "captions": {"geometry"},
    "segmenters": {"entities", "entity_sources", "geometry", "checkpoint"},
    "scene": {"entities", "entity_sources", "geometry", "segmenters"},
    "questions": {"entities", "geometry", "prompts", "scene", "segmenters"},
    "answers": {"grounding", "questions", "scene"},
    "engine": {
        "answers",
        "grounding",
        "prompts",
        "questions",
        "scene",
        "segmenters",
    },
    "many": {"answers", "engine", "prompts", "questions", "scene"},
    "predictor": {
        "answers",
        "checkpoint",
        "config_file",
        "engine",
        "grounding",
        "many",
        "prompts",
        "questions",
        "scene",
    },
    "run_control": {"checkpoint"},
    "run_checkpoints": {"checkpoint", "modeling.state_dicts.files", "zero"},
    "stopping": {"run_control"},
    "picture_panel": {"entities", "evaluation_hooks", "text_layout", "visualizer"},
    "launching": {"stopping"},
    "evaluation_hooks": {"data", "evaluation"},
    "training_step": {"modeling"},  # what the losses of a step divide by
    # the top
    "trainer": {
        "checkpoint",
        "config",
        "data",
        "evaluation",
        "evaluation_hooks",
        "launching",
        "optimizer",
        "picture_panel",
        "run_checkpoints",
        "run_control",
        "stopping",
        "training_hooks",
        "training_step",
        "watching",
        "zero",
    },
    "evaluating": {"data", "evaluation", "trainer"},
}
# Files that were split off another for length stay in its group.
GROUPS = {
    "alignment": "prompts",
    "interactive_parts": "interactive",
    "overlong": "prompts",
    "metrics_panoptic": "metrics",
    "entity_limits": "entities",
    "entity_masks": "entities",
    "entity_runs": "entities",
    "color_choice": "entities",
    "zero_branch": "zero",
    "zero_checkpoint": "zero",
    "checkpoint_folder": "checkpoint",
    "checkpoint_store": "checkpoint",
    "evaluation_split": "evaluation_hooks",
    "colormap_kernel": "entities",
    "entity_files": "entity_sources",
    "entity_json": "entity_sources",
    "entity_npz": "entity_sources",
}
# Leaves of modeling do not even see each other: only these arrows inside the room.
MODELING_ARROWS = {
    "modeling.criterion": {"modeling.mask_decoder", "modeling.loss_counts"},
    "modeling.mask_decoder": {"modeling.entity_queries"},
    "modeling.upstream_mask_decoder": {"modeling.mask_decoder"},
    "modeling.language_decoder": {
        "modeling.adapters",
        "modeling.causal_lm",
        "modeling.generation",
        "modeling.loss_counts",
        "modeling.prefix",
        "modeling.projector",
    },
    "modeling.state_dicts.backbones": {"modeling.state_dicts.layout"},
    "modeling.state_dicts.clip": {"modeling.state_dicts.layout"},
    "modeling.state_dicts.llava": {"modeling.state_dicts.layout"},
    "modeling.state_dicts.mask2former": {
        "modeling.state_dicts.backbones",
        "modeling.state_dicts.layout",
    },
    "modeling.state_dicts.assembly": {"modeling.state_dicts.layout"},
    "modeling.state_dicts": {  # its __init__ lists the formats
        "modeling.state_dicts.backbones",
        "modeling.state_dicts.clip",
        "modeling.state_dicts.layout",
        "modeling.state_dicts.llava",
        "modeling.state_dicts.mask2former",
    },
    "modeling.meta_arch": {"*"},
    "modeling.inference": {
        "modeling.mask_decoder",
        "modeling.postprocessing",
        "modeling.prefix",
    },
    "modeling": {"*"},  # its __init__ registers everything
}
HOMES: dict[str, set[str]] = {
    "open_clip": {"modeling.image_encoder"},
    "timm": {"modeling.colormap_encoder"},
    "transformers": {
        "modeling.adapters",  # its quantised layers
        "modeling.causal_lm",
        "modeling.generation",  # its cache
        "modeling.prefix",  # its cache
        "modeling.mask_decoder",
        "modeling.criterion",
        "segmenters.from_transformers",
        "captions.local",
        "prompts",
        "data.shapes_tokens",  # writes the tokenizer of the synthetic scenes
    },
    "deepspeed": {"zero", "zero_branch", "zero_checkpoint"},
    "peft": {"modeling.adapters"},
    "bitsandbytes": {"modeling.adapters"},
    "accelerate": {"modeling.adapters"},
    "safetensors": {"modeling.state_dicts.files"},
    "huggingface_hub": {"modeling.state_dicts.files"},
    "numba": {"colormap_kernel"},  # which only functions import
    "llvmlite": {"colormap_kernel"},
    "mask2former": {"modeling.upstream_mask_decoder"},
    "gradio": set(),  # tools/app.py only
}
# Imported inside the function that needs them, never when gella is imported.
LAZY = {
    "open_clip",
    "timm",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "deepspeed",
    "mask2former",
    "gradio",
}


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name below the package, file); the package's own __init__ is ""."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


def imports(path: Path, module: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted target, line, is at module level) of every import, those in functions included.

    ``from a.b import c`` gives ``a.b.c``: c may be a module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    package = ["gella", *module.split(".")] if module else ["gella"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        top = id(node) not in inner and not _typing_only(tree, node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno, top
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, top


def _called(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _typing_only(tree: ast.Module, node: ast.AST) -> bool:
    for test in ast.walk(tree):
        if isinstance(test, ast.If) and _called(test.test) == "TYPE_CHECKING":
            if any(node is inner for inner in ast.walk(test)):
                return True
    return False


def group(module: str) -> str:
    """The key of ARROWS that a module of gella falls under, "" for the package itself."""
    if module in ARROWS:
        return module
    head = module.split(".")[0]
    return GROUPS.get(head, head)


def target_module(target: str, known: set[str]) -> str:
    """Dotted module below gella that an import target lies in."""
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in known:
        parts = parts[:-1]
    return ".".join(parts)


def arrow_violations(package: Path) -> list[str]:
    """Imports between modules of gella that go up or sideways."""
    found = list(modules(package))
    known = {name for name, _ in found}
    problems = []
    for module, path in found:
        if module == "":
            continue  # the package imports everything, to register it
        source = group(module)
        if source not in ARROWS:
            problems.append(f"{module}: not in ARROWS; give it a place")
            continue
        for target, line, _ in imports(path, module):
            if target.split(".")[0] != "gella":
                continue
            other = target_module(target, known)
            if other == "" and target not in ("gella.data", "gella.modeling"):
                problems.append(f"{module}:{line} imports the package gella, which is above it")
                continue
            if not _allowed(module, source, other):
                problems.append(f"{module}:{line} imports {other}")
    return problems


def _allowed(module: str, source: str, other: str) -> bool:
    if module.split(".")[0] == "modeling" and other.split(".")[0] == "modeling":
        inside = MODELING_ARROWS.get(module, set())
        return "*" in inside or other in inside
    return group(other) == source or group(other) in ARROWS[source]


def home_violations(package: Path) -> list[str]:
    """Heavy third parties imported outside their home, or when gella is imported."""
    problems = []
    for module, path in modules(package):
        for target, line, top in imports(path, module):
            library = target.split(".")[0]
            if library in HOMES and module not in HOMES[library]:
                problems.append(f"{module}:{line} imports {library}")
            if library in LAZY and top:
                problems.append(f"{module}:{line} imports {library} at import time")
    return problems


def long_files(folder: Path, limit: int = MAX_LINES) -> list[str]:
    """Python files over the limit."""
    counts = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in folder.rglob("*.py")}
    return [f"{path.name}: {n} lines" for path, n in counts.items() if n > limit]


def undocumented(folder: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring.

    ``__init__`` counts when its class says nothing of the arguments, which no rule can see; it is
    left to the reader. Methods that only repeat a documented base class are public too: one line.
    """
    problems = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            problems.append(f"{path.name}: module")
        for name, node in _public(tree, ""):
            if ast.get_docstring(node) is None:
                problems.append(f"{path.name}:{node.lineno} {name}")
    return problems


def _public(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for child in getattr(node, "body", []):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        setter = any(_called(d) in ("setter", "overload") for d in child.decorator_list)
        if child.name.startswith("_") or setter:
            continue
        yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from _public(child, f"{child.name}.")


def long_functions(folder: Path, limit: int = 60) -> list[str]:
    """Functions over the limit, docstring included."""
    problems = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    problems.append(f"{path.name}:{node.lineno} {node.name}: {lines} lines")
    return problems


def test_imports_go_down():
    assert arrow_violations(PACKAGE) == []


def test_third_parties_have_one_home():
    assert home_violations(PACKAGE) == []


@pytest.mark.parametrize("folder", ["projects", "tools", "datasets"])
def test_files_and_functions_are_short(folder):
    assert long_files(ROOT / folder) == []
    assert long_functions(ROOT / folder) == []


@pytest.mark.parametrize("folder", ["projects/gella", "tools", "datasets"])
def test_public_names_are_documented(folder):
    assert undocumented(ROOT / folder) == []


def test_the_core_stays_small():
    core = ROOT / "projects" / "detectron2_core"
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in core.rglob("*.py"))
    assert lines <= CORE_MAX_LINES


def test_nothing_shadows_an_installed_package():
    """Scripts put their folder first on the path, `python -m` the current one."""
    assert not (ROOT / "datasets" / "__init__.py").exists()
    installed = {"datasets", *importlib.metadata.packages_distributions()} - {"gella", "detectron2"}
    for folder in ("datasets", "tools", "tests", "."):
        modules_here = {p.stem for p in (ROOT / folder).glob("*.py")}
        packages_here = {p.parent.name for p in (ROOT / folder).glob("*/__init__.py")}
        assert not (modules_here - {"setup", "conftest"} | packages_here) & installed, folder


# -- the checkers themselves -----------------------------------------------------------------------


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    """A package `gella` with the given files; every folder gets an __init__."""
    for name, text in files.items():
        path = folder / "gella" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents:
            if parent.name and not (folder / parent / "__init__.py").exists():
                (folder / parent / "__init__.py").write_text("")
    return folder / "gella"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("entities.py", "from gella.data import shapes\n", "entities:1 imports data"),
        ("entities.py", "def f():\n    import gella.trainer\n", "entities:2 imports trainer"),
        ("metrics.py", "from . import entities\n", "metrics:1 imports entities"),
        ("modeling/resoblend.py", "from gella import prompts\n", "imports prompts"),
        ("modeling/resoblend.py", "from .criterion import x\n", "imports modeling.criterion"),
        ("modeling/resoblend.py", "from ..data.shapes import x\n", "imports data.shapes"),
        ("modeling/meta_arch.py", "import gella.data.shapes\n", "imports data.shapes"),
        ("data/shapes.py", "from gella.modeling.criterion import x\n", "modeling.criterion"),
        ("data/shapes.py", "import gella\n", "imports the package gella"),
        ("novelty.py", "", "novelty: not in ARROWS"),
        ("prompts.py", "import importlib\nimportlib.import_module('gella.data')\n", "prompts:2"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, name, text, message):
    files = {
        "entities.py": "",
        "prompts.py": "",
        "metrics.py": "",
        "trainer.py": "from gella.data import shapes\n",
        "data/shapes.py": "from gella.entities import EntityMap\n",
        "modeling/criterion.py": "import torch\n",
        "modeling/meta_arch.py": "from gella import prompts\nimport gella.modeling.criterion\n",
    }
    assert arrow_violations(write_tree(tmp_path / "good", files)) == []
    problems = arrow_violations(write_tree(tmp_path / "bad", {**files, name: text}))
    assert len(problems) == 1 and message in problems[0]


def test_a_stray_third_party_is_found(tmp_path):
    package = write_tree(
        tmp_path,
        {
            "prompts.py": "def f():\n    from transformers import AutoTokenizer\n",
            "modeling/image_encoder.py": "import open_clip\n",
            "modeling/resoblend.py": "def f():\n    import timm.layers\n",
        },
    )
    assert home_violations(package) == [
        "modeling.image_encoder:1 imports open_clip at import time",
        "modeling.resoblend:2 imports timm",
    ]


def test_missing_docstrings_and_long_files_are_found(tmp_path):
    text = '"""Module."""\n\nclass A:\n    """A."""\n    def b(self): ...\n    def _c(self): ...\n'
    (tmp_path / "x.py").write_text(text + "def d(): ...\n" + "\n" * MAX_LINES)
    assert undocumented(tmp_path) == ["x.py:5 A.b", "x.py:7 d"]
    assert len(long_files(tmp_path)) == 1
    (tmp_path / "x.py").write_text("def d():\n" + "    a = 1\n" * 60)
    assert long_functions(tmp_path) == ["x.py:1 d: 61 lines"]

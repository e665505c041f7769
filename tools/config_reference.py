#!/usr/bin/env python
"""Write docs/CONFIG.md, the reference of all keys, from projects/gella/config.py.

    python tools/config_reference.py            # writes the page
    python tools/config_reference.py --check    # says whether it is up to date (exit code 1: not)

Keys, defaults and types come from the config that add_gella_config makes, meanings from the
comments of that file: one behind a key is its own, one above it also counts for the keys that
follow without a comment. A key without a meaning is an error.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg

from gella import config
from gella.utils.io import write_atomically

PAGE = Path(__file__).resolve().parents[1] / "docs" / "CONFIG.md"
HEAD = """# Configuration reference

Written by `tools/config_reference.py` from `projects/gella/config.py`; do not edit it by hand.

A config file states what differs from its `_BASE_` and, in the end, from these defaults, which are
the paper's values where [OPTIONS](OPTIONS.md) does not tell of others. `KEY VALUE` pairs at the end
of a command override both (behind `--opts` where a tool's `--help` says so):

```bash
python tools/train_net.py --config-file configs/gella_tiny_shapes.yaml SOLVER.MAX_ITER 20 \\
    DATASETS.TEST "('gella_shapes_png_val',)" OUTPUT_DIR output/reference
```

Lists are written as in Python, in quotes. An unknown key, or a value of another type, ends a
command with one line and status 2. Weights of losses and probabilities have no unit.
"""
# Detectron2 has no comments to take, and these are the keys of its own that one changes most here.
DETECTRON2 = {
    "MODEL.DEVICE": "`cuda`, `cuda:1` or `cpu`",
    "MODEL.WEIGHTS": "file or folder to start from, or to evaluate",
    "DATASETS.TRAIN": "registered names; one that stands twice counts twice",
    "DATASETS.TEST": "registered names, each evaluated by its `evaluator_type`",
    "DATALOADER.NUM_WORKERS": "processes that load images, per training process",
    "INPUT.RANDOM_FLIP": "`horizontal` mirrors images of captions without sides, `none` never",
    "SOLVER.IMS_PER_BATCH": "images of an iteration over all processes",
    "SOLVER.BASE_LR": "learning rate, before the multipliers of the groups",
    "SOLVER.MAX_ITER": "iterations; computed where `SOLVER.EPOCHS` is above 0",
    "SOLVER.STEPS": "iterations after which the rate is multiplied by `SOLVER.GAMMA`",
    "SOLVER.WARMUP_ITERS": "iterations in which the rate rises to `SOLVER.BASE_LR`",
    "SOLVER.CHECKPOINT_PERIOD": "iterations between checkpoints",
    "SOLVER.AMP.ENABLED": "mixed precision, bfloat16 where the GPU has it; needs a GPU",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "clip the gradients",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "largest norm of all gradients together",
    "TEST.EVAL_PERIOD": "iterations between evaluations; 0: only at the end",
    "TEST.EXPECTED_RESULTS": "`[[task, metric, expected, tolerance], ...]`, checked at the end",
    "VIS_PERIOD": "iterations between pictures of a training sample in TensorBoard; 0: none",
    "SEED": "of every random choice; below 0: another one in each run",
    "OUTPUT_DIR": "folder of everything that a run writes",
}


@dataclass(frozen=True)
class Key:
    """A key of the config.

    Attributes:
        name: with all its sections, such as "MODEL.GELLA.SNAP".
        meaning: the comment's words; "" where there is none.
        shared: the key above whose comment this is, if it is not this key's own.
    """

    name: str
    meaning: str
    shared: str = ""


def read_keys(source: str) -> list[Key]:
    """The keys that a file with `add_gella_config` sets, in its order.

    Args:
        source: text of the file. It may assign to attributes of ``cfg``, of names that it gave to
            nodes, and hand either to functions of its own.
    """
    comments = {
        token.start[0]: (token.string.lstrip("# ").rstrip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    return list(_keys_of("add_gella_config", {"cfg": ""}, functions, comments))


def _keys_of(
    function: str, names: dict[str, str], functions: dict[str, Any], comments: dict[int, Any]
) -> Iterator[Key]:
    """Keys of one function; `names` are its local names for nodes, with their sections."""
    above, first, previous, node = "", "", -1, ""
    for statement in functions[function].body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            inner = functions.get(getattr(call.func, "id", ""))
            if inner is not None:
                parameters = [argument.arg for argument in inner.args.args]
                given = {p: _path(a, names) for p, a in zip(parameters, call.args)}
                known = {p: path for p, path in given.items() if path is not None}
                yield from _keys_of(inner.name, known, functions, comments)
            continue
        if not isinstance(statement, ast.Assign):
            continue
        paths = [_path(target, names) for target in statement.targets]
        if isinstance(statement.value, ast.Call):  # a node, perhaps with a local name
            found = next((path for path in paths if path), None)
            for target in statement.targets:
                if isinstance(target, ast.Name) and found is not None:
                    names = {**names, target.id: found}
            node = _above(statement.lineno, comments)  # told by the node's first key
            continue
        (path,) = paths
        if path is None:
            continue
        own = _behind(statement, comments)
        over = " ".join(part for part in (node, _above(statement.lineno, comments)) if part)
        node = ""
        if over or own or statement.lineno != previous + 1:
            above, first = over, path
        previous = statement.end_lineno or statement.lineno
        meaning = " ".join(part for part in (over, own) if part)
        if meaning:
            yield Key(path, meaning)
        else:
            yield Key(path, above, first if above else "")


def _path(node: ast.expr, names: dict[str, str]) -> str | None:
    """Sections of an attribute of a known name; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        start = _path(node.value, names)
        return None if start is None else f"{start}.{node.attr}".lstrip(".")
    return None


def _behind(statement: ast.Assign, comments: dict[int, Any]) -> str:
    lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    return " ".join(comments[n][0] for n in lines if n in comments and not comments[n][1])


def _above(line: int, comments: dict[int, Any]) -> str:
    found: list[str] = []
    while comments.get(line - 1, ("", False))[1]:
        line -= 1
        found.insert(0, comments[line][0])
    return " ".join(found)


def value_of(cfg: Any, name: str) -> Any:
    """A config's value of a key with all its sections."""
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


def render(keys: Sequence[Key], cfg: Any) -> str:
    """The page; ValueError names the keys without a meaning."""
    missing = [key.name for key in keys if not key.meaning]
    if missing:
        raise ValueError(f"{config.__file__} has no comment on {', '.join(missing)}; add one")
    parts = [HEAD]
    sections = dict.fromkeys(key.name.rpartition(".")[0] for key in keys)
    for section in sections:
        parts.append(f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        for key in keys:
            if key.name.rpartition(".")[0] == section:
                meaning = key.meaning
                if key.shared:
                    meaning = f"as `{key.shared.rpartition('.')[2]}`"
                parts.append(_row(key.name, meaning, cfg))
    parts.append("\n## Detectron2's own, most used\n\n")
    parts.append("| key | type | default | meaning |\n|---|---|---|---|\n")
    parts += [_row(name, meaning, cfg, True) for name, meaning in DETECTRON2.items()]
    return "".join(parts)


def _row(name: str, meaning: str, cfg: Any, full: bool = False) -> str:
    value = value_of(cfg, name)
    shown = repr(list(value) if isinstance(value, (list, tuple)) else value)
    if isinstance(value, str):
        shown = f'"{value}"'
    meaning = re.sub(r"<\w+>", r"`\g<0>`", re.sub(r"[|*]", r"\\\g<0>", meaning))
    meaning = (
        meaning[:1].upper() + meaning[1:] if not meaning.startswith(("as `", "`")) else meaning
    )
    label = name if full else name.rpartition(".")[2]
    return f"| `{label}` | {type(value).__name__} | `{shown}` | {meaning} |\n"


def page() -> str:
    """What docs/CONFIG.md has to hold."""
    cfg = get_cfg()
    config.add_gella_config(cfg)
    return render(read_keys(Path(config.__file__).read_text(encoding="utf-8")), cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help="another page")
    args = parser.parse_args(argv)
    try:
        text = page()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.check:
        write_atomically(str(args.output), lambda file: file.write(text.encode()))
        print(f"wrote {args.output}\nnext: python tools/config_reference.py --check")
        return 0
    if args.output.is_file() and args.output.read_text(encoding="utf-8") == text:
        print(f"{args.output} is up to date")
        return 0
    print(f"error: {args.output} is not up to date; run tools/config_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

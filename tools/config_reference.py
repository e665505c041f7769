#!/usr/bin/env python
"""Write docs/CONFIG.md, the reference of all keys, from projects/gella/config.py.

    python tools/config_reference.py            # writes the page
    python tools/config_reference.py --check    # says whether it is up to date (exit code 1: not)

Keys, defaults and types come from the config that add_gella_config makes, meanings from the
comments of that file: one behind a key is its own, one above it also counts for the keys that
follow without a comment. A key without a meaning is an error.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from detectron2.config import CfgNode, get_cfg

from gella import config
from gella.commands.console import Parser, exit_status
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
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "largest norm; `per_side`: of the vision side's gradient",
    "TEST.EVAL_PERIOD": "iterations between evaluations; 0: only at the end",
    "TEST.EXPECTED_RESULTS": "`[[task, metric, expected, tolerance], ...]`, checked at the end",
    "VIS_PERIOD": "iterations between pictures of a training sample in TensorBoard; 0: none",
    "SEED": "of every random choice; below 0: another one in each run",
    "OUTPUT_DIR": "folder of everything that a run writes",
}


class Key(NamedTuple):
    """A key of the config."""

    name: str  # with all its sections, such as "MODEL.GELLA.SNAP"
    meaning: str  # the comment's words; "" where there is none
    shared: str = ""  # the key above whose comment this is, if it is not this key's own


def read_keys(source: str) -> list[Key]:
    """The keys that a file's `add_gella_config` sets, in its order; ``source`` is its text."""
    comments = {
        token.start[0]: (token.string.lstrip("# ").rstrip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    statements = (s for s in ast.walk(ast.parse(source)) if isinstance(s, ast.Assign))
    ends = {s.lineno: s.end_lineno or s.lineno for s in statements}
    keys, prefixes = [], {}
    above, first, previous, node = "", "", -1, ""
    for owner, name, line in _assigned(source, prefixes):
        over, start = [node] if node else [], line
        while comments.get(start - 1, ("", False))[1]:
            start -= 1
        over += [comments[n][0] for n in range(start, line)]
        if isinstance(owner[name], CfgNode):  # told by the node's first key
            node = " ".join(over)
            continue
        behind = [comments[n] for n in range(line, ends[line] + 1) if n in comments]
        own = [text for text, alone in behind if not alone]
        path, node = prefixes[id(owner)] + name, ""
        if over or own or line != previous + 1:
            above, first = " ".join(over), path
        previous = ends[line]
        if over or own:
            keys.append(Key(path, " ".join([*over, *own])))
        else:
            keys.append(Key(path, above, first if above else ""))
    return keys


def _assigned(source: str, prefixes: dict[int, str]) -> list[tuple[CfgNode, str, int]]:
    """Run a file's `add_gella_config`: every assignment with its node, name and line.

    ``prefixes`` gets the sections of each node by its id, with a dot behind.
    """
    made, plain = [], CfgNode.__setattr__

    def noted(self: CfgNode, name: str, value: Any) -> None:
        plain(self, name, value)
        caller = sys._getframe(1)
        if caller.f_code.co_filename == "<config>":
            made.append((self, name, caller.f_lineno))

    def walk(node: CfgNode, prefix: str) -> None:
        prefixes[id(node)] = prefix
        for name, value in node.items():
            if isinstance(value, CfgNode):
                walk(value, f"{prefix}{name}.")

    content: dict[str, Any] = {"__name__": "config", "__file__": "<config>"}
    exec(compile(source, "<config>", "exec"), content)
    cfg = get_cfg()
    with mock.patch.object(CfgNode, "__setattr__", noted):
        content["add_gella_config"](cfg)
    walk(cfg, "")
    return made


def render(keys: Sequence[Key], cfg: Any) -> str:
    """The page; ValueError names the keys without a meaning."""
    missing = [key.name for key in keys if not key.meaning]
    if missing:
        raise ValueError(f"{config.__file__} has no comment on {', '.join(missing)}; add one")
    tables: dict[str, list[str]] = {}
    for key in keys:
        section, _, name = key.name.rpartition(".")
        meaning = f"as `{key.shared.rpartition('.')[2]}`" if key.shared else key.meaning
        tables.setdefault(section, []).append(_row(name, key.name, meaning, cfg))
    tables["Detectron2's own, most used"] = [
        _row(name, name, meaning, cfg) for name, meaning in DETECTRON2.items()
    ]
    head = "| key | type | default | meaning |\n|---|---|---|---|\n"
    return HEAD + "".join(
        f"\n## {section}\n\n{head}{''.join(rows)}" for section, rows in tables.items()
    )


def _row(label: str, name: str, meaning: str, cfg: Any) -> str:
    value = functools.reduce(lambda node, part: node[part], name.split("."), cfg)
    shown = repr(list(value) if isinstance(value, (list, tuple)) else value)
    if isinstance(value, str):
        shown = f'"{value}"'
    meaning = re.sub(r"<\w+>", r"`\g<0>`", re.sub(r"[|*]", r"\\\g<0>", meaning))
    if not meaning.startswith(("as `", "`")):
        meaning = meaning[:1].upper() + meaning[1:]
    return f"| `{label}` | {type(value).__name__} | `{shown}` | {meaning} |\n"


def page() -> str:
    """What docs/CONFIG.md has to hold."""
    cfg = get_cfg()
    config.add_gella_config(cfg)
    return render(read_keys(Path(config.__file__).read_text(encoding="utf-8")), cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help="another page")
    args = parser.parse_args(argv)
    return exit_status(lambda: write(args.output, args.check))


def write(output: Path, check: bool) -> int:
    """Write the page, or check that it is up to date; the exit status."""
    text = page()
    if not check:
        write_atomically(str(output), lambda file: file.write(text.encode()))
        print(f"wrote {output}\nnext: python tools/config_reference.py --check")
        return 0
    if output.is_file() and output.read_text(encoding="utf-8") == text:
        print(f"{output} is up to date")
        return 0
    print(f"error: {output} is not up to date; run tools/config_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

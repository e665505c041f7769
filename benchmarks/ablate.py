"""The paper's ablations and ours on the drawn scenes: rows trained with several seeds, and tables.

    python tools/benchmark.py ablate --sets 7,10
    python tools/benchmark.py ablate --sets queries --iterations 400 --seeds 5
    python tools/benchmark.py ablate --tables

benchmarks/ablate.yaml lists the sets: the tables 5a, 5b, 6a, 6b, 7, 8a, 8b, 9 and 10, with the rows
of configs/ablations/ on configs/gella_tiny_shapes.yaml in place of the paper's model; and ours,
queries (one per entity, or learned), outlines (entity queries without the crop of their mask),
snapping, and draws (of the colours at test).

Every training and every test is a run of tools/train_net.py in one thread, two of them side by
side. Rows, sets and seeds share what is the same, and a row that changes the test alone trains
nothing. The same command goes on where it was: what is finished is not run again, what was
interrupted is resumed. New code or data need a new --output.

It gets SET.md and SET.png of each set, and ablate.json with every figure. A table has the mean and
the standard deviation over the seeds; the paper's figures beside them are of its model and data.
As seeds differ by as much as rows do, a row is said to differ from the first where each of its
seeds is above, or each below, all seeds of the first; else there is no difference. A schedule is
long enough if a longer one has the same order of rows: runs of several --iterations stay side by
side, so compare two. The exit status is 1 while a figure is missing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib.figure import Figure
from measuring import OPTS
from PIL import Image
from shapes_scene import predicted_masks
from tabulate import tabulate
from tqdm import tqdm

from gella import load_config
from gella.data.register import root_from_environment
from gella.entities.entity_map import rgb_to_id
from gella.evaluation.results import figure, load_results
from gella.evaluation.tables import PAPER
from gella.utils.io import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "gella_tiny_shapes.yaml"
NUMBERS = {
    "iterations": (1000, 1, "of each training"),
    "seeds": (3, 2, "of each row, from 42 on"),
    "jobs": (2, 1, "runs side by side"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "--sets": {"metavar": "SET,SET", "help": "some of them; default: all"},
    "--output": {"default": "output/ablate", "metavar": "DIR", "help": "default: %(default)s"},
    "--tables": {"action": "store_true", "help": "run nothing: tables of what is there"},
    "opts": OPTS,
}
NEXT = "look at {output}/*.png, and whether other --iterations have the same order of rows"
SETS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SETS = {str(name): part for name, part in SETS.items()}
COLUMNS = {"AR": PAPER[3].columns, "AP": PAPER[6].columns, "AR and nouns": PAPER[9].columns}
COLUMNS["PQ"] = (*PAPER[4].columns, COLUMNS["AP"][0])
COLUMNS["all"] = (COLUMNS["AR"][0], *COLUMNS["PQ"])
# Keys of configs/ablations/ that only the paper's size has, and what stands for the others' values.
LEFT_OUT = ("MODEL.WEIGHTS", "MODEL.HUB", "OUTPUT_DIR", "INPUT.GELLA.COLORMAP_SIZE")
LEFT_OUT += ("MODEL.MASK_DECODER.NUM_QUERIES",)
SMALL = {
    "^224$": "64",
    "^swin_large_patch4_window12_384$": "swin_small_patch4_window7_224",
    "datasets/entities/coco_entity_swin_l": "datasets/shapes/annotations/predicted",
    "gella_coco_": "gella_shapes_",
    "(train|val)2017": r"\1",
}
SOURCES = "INPUT.GELLA.ENTITY_SOURCES"
Keys = dict[str, Any]  # of the config, by their whole names


class Row(NamedTuple):
    """Keys of a row's training and of its test, and the paper's figures by the head of a column."""

    label: str
    train: Keys
    test: Keys
    paper: dict[str, float]


def read_config(name: str) -> tuple[str, Keys]:
    """The comment of a config in configs/ablations/; its keys, and its parents' there, for the
    scenes. Both are empty without a name."""
    if not name:
        return "", {}
    text = (ROOT / f"configs/ablations/{name}.yaml").read_text(encoding="utf-8")
    stated = yaml.safe_load(text)
    base = Path(stated.pop("_BASE_"))
    keys = read_config("" if base.parent.name else base.stem)[1]
    for key, value in _leaves(stated):
        for pattern, here in SMALL.items():
            value = re.sub(pattern, here, str(value))
        keys |= {} if key.startswith(LEFT_OUT) else {key: value}
    return " ".join(line[2:] for line in text.splitlines() if line.startswith("#")), keys


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        yield from _leaves(value, f"{key}.") if isinstance(value, dict) else [(key, value)]


def rows_of(name: str) -> list[Row]:
    """The rows of a set; labels and figures of the paper's are in their configs' comments."""
    part, rows = SETS[name], []
    for row in part["rows"]:
        if isinstance(row, str):
            comment, keys = read_config(row)
            label = re.findall(r", (.*?):", comment)[0]
        else:
            ((label, own),) = row.items()
            comment, keys = "", read_config(part.get("base", ""))[1] | own
        keys = {key: str(value) for key, value in (part.get("keys", {}) | keys).items()}
        sources = ast.literal_eval(keys.pop(SOURCES, "[]"))
        tests = ("MODEL.GELLA.", "TEST.", "DATASETS.TEST")
        test = {key: keys.pop(key) for key in list(keys) if key.startswith(tests)}
        for kind, split in ((keys, "_train"), (test, "_val")):
            kind[SOURCES] = str([entry for entry in sources if entry[0].endswith(split)])
        told = {k.removeprefix("AR_"): v for k, v in re.findall(r"(\w+) (\d+\.\d)\b", comment)}
        heads = [column.head for column in COLUMNS[part["columns"]]]
        paper = {h: float(told[h.split()[-1]]) for h in heads if h.split()[-1] in told}
        rows.append(Row(label, keys, test, paper))
    return rows


def places(args: argparse.Namespace, row: Row) -> list[tuple[Path, Keys, Path]]:
    """Per seed where a row is trained, with which keys, and where it is tested.

    Folders are named after all that decides what is in them, so that equal runs are one.
    """
    keys = {"SOLVER.MAX_ITER": args.iterations, "SOLVER.CHECKPOINT_PERIOD": 200, **row.train}
    keys |= {"DATALOADER.NUM_WORKERS": 0, "DATASETS.TEST": "()", "SOLVER.CHECKPOINT_KEEP": 1}
    keys |= zip(args.opts[::2], args.opts[1::2])
    names = (json.dumps(k, sort_keys=True).encode() for k in (keys, row.test))
    train, test = (hashlib.sha256(name).hexdigest()[:8] for name in names)
    seeds = range(42, 42 + args.seeds)
    trained = [(Path(args.output, train, f"seed{seed}"), keys | {"SEED": seed}) for seed in seeds]
    return [(folder, own, folder / f"test_{test}") for folder, own in trained]


def work(folder: Path, train: Keys, tests: Mapping[Path, Keys]) -> None:
    """Train one seed and test it as often as asked, but for what is finished."""
    weights = folder / "model_final.pth"
    if not weights.exists():
        train_net(folder, train, "--config-file", CONFIG, "--resume")
    if weights.exists():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path, test in tests.items():
        if weights.exists() and not (path / "results.json").exists():
            train_net(path, test, "--config-file", folder, "--eval-only")


def train_net(output: Path, keys: Keys, *words: Any) -> None:
    """Run tools/train_net.py in one thread; what it prints goes to printed.txt."""
    output.mkdir(parents=True, exist_ok=True)
    options = [text for pair in keys.items() for text in pair]
    command = [sys.executable, ROOT / "tools/train_net.py", *words, *options, "OUTPUT_DIR", output]
    with open(output / "printed.txt", "a", encoding="utf-8") as stream:
        streams = {"stdout": stream, "stderr": subprocess.STDOUT}
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([str(word) for word in command], check=False, env=one_thread, **streams)


def imagine_masks(folder: Path) -> None:
    """Write what the scenes' imagined segmenter makes of the training scenes.

    predicted_train.json is written where datasets/prepare_shapes.py writes predicted_val.json.
    """
    scenes = read_json(folder / "panoptic_train.json", advice="python datasets/prepare_shapes.py")
    masks: list[dict[str, Any]] = []
    for scene in scenes["annotations"]:
        segments = rgb_to_id(np.array(Image.open(folder / "panoptic_train" / scene["file_name"])))
        ids, image = [info["id"] for info in scene["segments_info"]], scene["image_id"]
        masks += predicted_masks(segments, ids, image, np.random.default_rng(image))
    write_json(folder / "predicted_train.json", masks)


def figures_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Title and rows of a set: a row's folders, its figures by column and seed, and the paper's;
    the labels of rows that are missing."""
    columns, rows, missing = COLUMNS[SETS[name]["columns"]], [], []
    for row in rows_of(name):
        there = {path: (path / "results.json").exists() for *_, path in places(args, row)}
        found = [path for path in there if there[path]]
        scores = [load_results(path / "results.json")[0] for path in found]
        values = {c.head: [s[c.task][c.metric] for s in scores] for c in columns}
        rows.append({"label": row.label, "folders": found, "values": values, "paper": row.paper})
        if lost := [str(path.parent) for path in there if not there[path]]:
            missing.append(f"{row.label} ({len(lost)} of {args.seeds} seeds; look into {lost[0]})")
    return {"title": SETS[name]["title"], "rows": rows, "missing": missing}


def differs(values: list[float], first: list[float]) -> bool:
    """Whether all of these are above, or all below, those of the first row."""
    return bool(values and first) and (min(values) > max(first) or max(values) < min(first))


def markdown(name: str, figures: Mapping[str, Any], args: argparse.Namespace) -> str:
    """The table of a set, what differs in it by the rule, and what is missing."""
    (first, *_), table, apart = figures["rows"], [], []
    told = {head for row in figures["rows"] for head in row["paper"]}
    for row in figures["rows"]:
        cells = {"row": row["label"], "n": len(row["folders"])}
        for head, values in row["values"].items():
            mean = np.mean(values) if values else math.nan
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells[head] = figure(mean) + (spread if math.isfinite(mean) else "")
            if head in told:
                cells[f"{head}, paper"] = figure(row["paper"].get(head))
        table.append(cells)
        there = [h for h, values in row["values"].items() if differs(values, first["values"][h])]
        apart += [f"{row['label']} ({', '.join(there)})"] if there else []
    chance = math.comb(2 * args.seeds, args.seeds) // 2
    lines = [f"**{name}**: {figures['title']}. {args.iterations} iterations.", ""]
    lines += [tabulate(table, "keys", "github", disable_numparse=True), ""]
    rule = "every seed above, or every seed below, all of the first row's; by chance in one column"
    lines += [f"Different from the first row ({rule} of {chance}): {'; '.join(apart) or 'none'}."]
    lines += [f"Missing: {'; '.join(figures['missing'])}."] if figures["missing"] else []
    return "\n".join(lines) + "\n"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Seeds and means of every row, and the paper's figure, less the mean of the first row each."""
    (first, *_), heads = figures["rows"], list(figures["rows"][0]["values"])
    size = (2.4 * len(heads) + 2, 0.4 * len(figures["rows"]) + 1.5)
    page = Figure(figsize=size, layout="tight")
    for axes, head in zip(page.subplots(1, len(heads), sharey=True, squeeze=False)[0], heads):
        start, paper = first["values"][head], first["paper"].get(head)
        for place, row in enumerate(figures["rows"]):
            if start and row["values"][head]:
                values = np.subtract(row["values"][head], np.mean(start))
                axes.plot(values, [place] * len(values), "o", color="#0072b2", alpha=0.5)
                axes.plot(values.mean(), place, "|", color="#0072b2", markersize=18)
            if paper is not None and head in row["paper"]:
                axes.plot(row["paper"][head] - paper, place, "D", color="#d55e00", fillstyle="none")
        axes.axvline(0, color="#999999", linewidth=0.7)
        axes.set(title=head, yticks=range(len(figures["rows"])))
        axes.set_yticklabels([row["label"] for row in figures["rows"]])
    axes.invert_yaxis()
    page.supxlabel("less the first row's mean; o: seeds, |: mean, diamond: the paper's difference")
    page.savefig(path, dpi=110)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures by set, and their tables; ValueError for a set that there is not."""
    names = args.sets.split(",") if args.sets else list(SETS)
    if unknown := ", ".join(name for name in names if name not in SETS):
        raise ValueError(f"--sets: there is no {unknown}; choose of {', '.join(SETS)}")
    load_config(CONFIG, args.opts)  # a wrong key is told before the first run
    jobs: dict[Path, tuple[Keys, dict[Path, Keys]]] = {}
    for row in (row for name in names for row in rows_of(name)):
        for folder, keys, path in places(args, row):
            jobs.setdefault(folder, (keys, {}))[1][path] = row.test
    if not args.tables:
        folder = Path(root_from_environment(), "shapes", "annotations")
        if "predicted_train" in str(jobs) and not (folder / "predicted_train.json").exists():
            imagine_masks(folder)
        with ThreadPoolExecutor(args.jobs) as pool:
            done = pool.map(lambda folder: work(folder, *jobs[folder]), jobs)
            list(tqdm(done, "trainings", len(jobs)))
    figures = {name: figures_of(name, args) for name in names}
    texts = {name: markdown(name, part, args) for name, part in figures.items()}
    for name, text in texts.items():
        write_text(Path(args.output, f"{name}.md"), text)
        draw(figures[name], Path(args.output, f"{name}.png"))
    write_json(Path(args.output, "ablate.json"), figures)
    return figures, "\n".join(texts.values())


def failed(figures: dict[str, Any]) -> bool:
    """Whether a figure is missing."""
    return any(part["missing"] for part in figures.values())

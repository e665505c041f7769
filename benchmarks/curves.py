"""Loss curves under ZeRO in several processes, laid over those of plain training in one.

    python tools/benchmark.py curves --config-file configs/gella_tiny_shapes.yaml \\
        --processes 2 --zero configs/zero/stage2.json --iterations 200 --plot curves.png

Both runs see the same batches: the one process cuts each into as many parts as there are
processes (``SOLVER.ACCUMULATE``), and random numbers belong to the part, so that every difference
is rounding. Rounding grows with every step that is taken on it, the faster the larger the learning
rate. How far it gets by itself show more pairs of runs: before each, every one of the first weights
is moved by one unit in its last place, at random, the same way in both runs of the pair.

Printed for every loss and the gradient's norm, over the first twenty and over all iterations: the
largest difference between the two runs of a pair, and the largest between any two plain runs; and
over the second half of the iterations the mean of the runs of each kind, and their standard
deviation.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from matplotlib.figure import Figure
from measuring import OPTS
from tabulate import tabulate

from gella.commands.inputs import config_of
from gella.engine.launch import leave_process_group
from gella.engine.trainer import GellaTrainer
from gella.utils.io import read_json, write_json

NUMBERS = {
    "processes": (2, 2, "under ZeRO"),
    "iterations": (200, 1, "of each run"),
    "moved": (3, 1, "pairs with moved weights"),
}
OPTIONS = {
    "--config-file": {"required": True, "metavar": "FILE"},
    "--zero": {"default": "configs/zero/stage2.json", "metavar": "FILE", "help": "DeepSpeed's"},
    "--plot": {"metavar": "PNG", "help": "draw the curves into this file"},
    "opts": OPTS,
}
NEXT = "train under ZeRO: docs/TRAINING.md says how"
EARLY = 20  # iterations of the second column

Curves = dict[str, list[float]]  # by name


def move_weights(model: torch.nn.Module, seed: int) -> None:
    """Move every weight to the next float up or down, at random.

    Args:
        seed: of the directions; they are the same however the model is wrapped.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            away = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
            target = (away * float("inf")).to(parameter.device)
            parameter.copy_(torch.nextafter(parameter, target))


def train(config_file: str, options: list[Any], output: str, moved: int) -> None:
    """Train in this process, one of those that ``launch`` made; the main one writes curves.json.

    Args:
        config_file, options, output: the config, and where its run goes.
        moved: seed with which the first weights are moved by one unit in the last place; 0 leaves
            them.
    """
    torch.set_num_threads(1)
    cfg = config_of(config_file, [*options, "OUTPUT_DIR", output])
    cfg.freeze()
    os.makedirs(output, exist_ok=True)
    torch.manual_seed(max(cfg.SEED, 0))  # the same initial weights in all runs
    trainer = GellaTrainer(cfg)
    trainer.resume_or_load(resume=False)
    if moved:  # before DeepSpeed, which starts with the training, copies the weights
        move_weights(trainer.model, moved)
    trainer.train()
    if comm.is_main_process():  # values are means over the processes
        histories = trainer.storage.histories().items()
        curves = {name: history.values() for name, history in histories}
        kept = {n: v for n, v in curves.items() if "loss" in n or n == "grad_norm"}
        values = {name: [value for value, _ in pairs] for name, pairs in kept.items()}
        write_json(os.path.join(output, "curves.json"), values)
    leave_process_group()


def record(args: argparse.Namespace) -> dict[str, list[Curves]]:
    """Run the trainings; curves of the runs "plain" and "zero", the first of each not moved."""
    # No evaluation and no checkpoint but the last: only the steps count.
    common = ["SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", args.iterations]
    common += ["SOLVER.CHECKPOINT_PERIOD", args.iterations]
    common += ["DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0, *args.opts]
    kinds = {
        "plain": (1, ["SOLVER.ACCUMULATE", args.processes]),
        "zero": (args.processes, ["SOLVER.ZERO.CONFIG", args.zero]),
    }
    curves: dict[str, list[Curves]] = {kind: [] for kind in kinds}
    for moved, (kind, (processes, options)) in itertools.product(
        range(args.moved + 1), kinds.items()
    ):
        with tempfile.TemporaryDirectory() as folder:
            job = (args.config_file, [*common, *options], folder, moved)
            launch(train, processes, dist_url="auto", args=job)
            curves[kind].append(read_json(os.path.join(folder, "curves.json")))
    return curves


def compare(one: Curves, other: Curves) -> dict[str, dict[str, float]]:
    """Largest differences of each curve, over the early and over all iterations.

    Raises:
        ValueError: the runs recorded other curves, or other numbers of values.
    """
    if {k: len(v) for k, v in one.items()} != {k: len(v) for k, v in other.items()}:
        raise ValueError(f"the runs recorded {sorted(one)} and {sorted(other)}, or more of one")
    apart = {name: np.abs(np.subtract(one[name], other[name])) for name in one}
    return {k: {"early": float(v[:EARLY].max()), "all": float(v.max())} for k, v in apart.items()}


def table(curves: dict[str, list[Curves]]) -> list[dict[str, Any]]:
    """One row per curve, of what this module's text says is printed."""
    plain, zero = curves["plain"], curves["zero"]
    pairs = [compare(a, b) for a, b in zip(plain, zero, strict=True)]
    noise = [compare(a, b) for a, b in itertools.combinations(plain, 2)]
    rows = []
    for name in sorted(plain[0]):
        row: dict[str, Any] = {"curve": name, "mean size": np.abs(plain[0][name]).mean()}
        for part in ("early", "all"):
            row[f"pair, {part}"] = max(pair[name][part] for pair in pairs)
            row[f"two plain, {part}"] = max(pair[name][part] for pair in noise)
        for kind, runs in curves.items():
            late = [np.mean(run[name][len(run[name]) // 2 :]) for run in runs]
            row[f"late {kind}"] = f"{np.mean(late):.4g} ± {np.std(late, ddof=1):.2g}"
        rows.append(row)
    return rows


def draw(curves: dict[str, list[Curves]], path: str, title: str) -> None:
    """The total losses, one over the other, and what runs differ by, as a PNG."""
    plain, zero = ([run["total_loss"] for run in curves[kind]] for kind in ("plain", "zero"))
    figure = Figure(figsize=(7, 6), layout="tight")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    top.plot(plain[0], color="#999999", linewidth=3, label="plain, one process")
    top.plot(zero[0], color="#d55e00", linewidth=1, label=title)
    for label, pairs, color in (
        ("two plain runs", itertools.combinations(plain, 2), "#0072b2"),
        ("ZeRO and plain from the same weights", zip(plain, zero, strict=True), "#d55e00"),
    ):
        # A logarithmic scale has no zero.
        apart = np.transpose([np.abs(np.subtract(*pair)) + 1e-9 for pair in pairs])
        lines = bottom.semilogy(apart, color=color, linewidth=0.7, alpha=0.6)
        lines[0].set_label(label)
    top.set(ylabel="total loss")
    bottom.set(ylabel="difference", xlabel="iteration")
    for axes in (top, bottom):
        axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures, all values among them, and the text to print; draws what was asked for."""
    curves = record(args)
    rows = table(curves)
    text = tabulate(rows, "keys", floatfmt=("", ".3f", ".1e", ".1e", ".1e", ".1e", "", ""))
    if args.plot:
        draw(curves, args.plot, f"{args.processes} processes, {Path(args.zero).stem}")
        text += f"\n\nwrote {args.plot}"
    return {"curves": curves, "rows": rows}, text

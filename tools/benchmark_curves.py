"""Loss curves under ZeRO in several processes, laid over those of plain training in one.

    python tools/benchmark.py curves --config-file configs/gella_tiny_shapes.yaml \\
        --processes 2 --zero configs/zero/stage2.json --iterations 200 --plot curves.png

Both runs see the same batches: the one process cuts each into as many parts as there are
processes (``SOLVER.ACCUMULATE``), and random numbers belong to the part, so that every difference
is rounding. Rounding grows with every step that is taken on it. How far it gets by itself show more
plain runs, each of their first weights moved by one unit in its last place, at random. Printed, for
every loss and the gradient's norm, over the first twenty and over all iterations: the largest
difference between ZeRO and plain training, and the largest between any two of the plain runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from tabulate import tabulate

from gella import load_config
from gella.evaluation.results import write_json
from gella.plugins import import_modules
from gella.trainer import GellaTrainer

EARLY = 20  # iterations of the second column


class LastPlace(HookBase):
    """Moves every weight to the next float up or down, at random, before the training."""

    def __init__(self, seed: int) -> None:
        """``seed``: of the directions."""
        self._seed = seed

    def before_train(self) -> None:
        """Move them."""
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for parameter in self.trainer.model.parameters():
                away = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
                target = (away * float("inf")).to(parameter.device)
                parameter.copy_(torch.nextafter(parameter, target))


class Recorder(HookBase):
    """Keeps the losses and the gradient's norm of every iteration; the main process writes them."""

    def __init__(self, path: str) -> None:
        """``path``: JSON file, written when the training ends."""
        self._path = path
        self._curves: dict[str, list[float]] = {}

    def after_step(self) -> None:
        """Take this iteration's values, which are means over the processes."""
        if not comm.is_main_process():
            return
        for name, (value, iteration) in self.trainer.storage.latest().items():
            if iteration == self.trainer.iter and ("loss" in name or name == "grad_norm"):
                self._curves.setdefault(name, []).append(float(value))

    def after_train(self) -> None:
        """Write the file."""
        if comm.is_main_process():
            write_json(self._path, self._curves)


def train(config_file: str, options: list[Any], output: str, moved: int) -> None:
    """Train in this process, one of those that ``launch`` made, and record.

    Args:
        config_file, options, output: the config, and where its run goes.
        moved: seed with which the first weights are moved by one unit in the last place; 0 leaves
            them.
    """
    torch.set_num_threads(1)
    cfg = load_config(config_file, [*options, "OUTPUT_DIR", output])
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    import_modules(cfg)
    cfg.freeze()
    os.makedirs(output, exist_ok=True)
    torch.manual_seed(max(cfg.SEED, 0))  # the same initial weights in both runs
    trainer = GellaTrainer(cfg)
    trainer.register_hooks([LastPlace(moved)] if moved else [])
    trainer.register_hooks([Recorder(os.path.join(output, "curves.json"))])
    trainer.resume_or_load(resume=False)
    trainer.train()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the mode ``curves``."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--processes", type=int, default=2, help="under ZeRO; default 2")
    parser.add_argument(
        "--zero", default="configs/zero/stage2.json", metavar="FILE", help="DeepSpeed's JSON"
    )
    parser.add_argument("--iterations", type=int, default=200, help="default 200")
    parser.add_argument("--moved", type=int, default=3, help="runs with moved weights; default 3")
    parser.add_argument("--plot", metavar="PNG", help="draw the curves into this file")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")


def record(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Run the trainings; curves by run ("zero", "plain 0", "plain 1", ...) and name.

    Raises:
        ValueError: wrong arguments.
    """
    if args.processes < 2 or args.iterations < 1 or args.moved < 1:
        raise ValueError(
            f"--processes is {args.processes}, --iterations {args.iterations} and --moved "
            f"{args.moved}: at least 2, 1 and 1"
        )
    # No evaluation and no checkpoint but the last: only the steps count.
    common = ["SOLVER.MAX_ITER", args.iterations, "SOLVER.CHECKPOINT_PERIOD", args.iterations]
    common += ["DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0, *args.opts]
    one = ["SOLVER.ACCUMULATE", args.processes]
    runs = {f"plain {seed}": (1, one, seed) for seed in range(args.moved + 1)}
    runs["zero"] = (args.processes, ["SOLVER.ZERO.CONFIG", args.zero], 0)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (processes, options, moved) in runs.items():
            output = os.path.join(folder, name)
            job = (args.config_file, [*common, *options], output, moved)
            launch(train, processes, dist_url="auto", args=job)
            with open(os.path.join(output, "curves.json"), encoding="utf-8") as stream:
                curves[name] = json.load(stream)
    return curves


def compare(
    plain: dict[str, list[float]], other: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Per curve: its mean size and the largest differences, over early and over all iterations.

    Raises:
        ValueError: the runs recorded other curves, or other numbers of values.
    """
    if {k: len(v) for k, v in plain.items()} != {k: len(v) for k, v in other.items()}:
        raise ValueError(f"the runs recorded {sorted(plain)} and {sorted(other)}, or more of one")
    found = {}
    for name, values in plain.items():
        apart = [abs(a - b) for a, b in zip(values, other[name], strict=True)]
        size = sum(abs(value) for value in values) / len(values)
        found[name] = {"mean": size, "early": max(apart[:EARLY]), "all": max(apart)}
    return found


def noise(curves: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """What :func:`compare` finds between any two of the plain runs at most."""
    plain = [values for name, values in curves.items() if name.startswith("plain")]
    pairs = [compare(a, b) for a, b in itertools.combinations(plain, 2)]
    return {
        name: {part: max(pair[name][part] for pair in pairs) for part in ("early", "all")}
        for name in plain[0]
    }


def draw(curves: dict[str, dict[str, list[float]]], path: str, title: str) -> None:
    """The total losses, one over the other, and what they differ from the plain one, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain = curves["plain 0"]["total_loss"]
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 6), height_ratios=[3, 2])
    top.plot(plain, color="#999999", linewidth=3, label="plain, one process")
    top.plot(curves["zero"]["total_loss"], color="#d55e00", linewidth=1, label=title)
    label = "plain, moved by one last place"
    for name in (n for n in curves if n not in ("plain 0", "zero")):
        bottom.semilogy(_apart(plain, curves[name]), color="#0072b2", linewidth=1, label=label)
        label = ""
    bottom.semilogy(_apart(plain, curves["zero"]), color="#d55e00", linewidth=1, label=title)
    top.set_ylabel("total loss")
    bottom.set_ylabel("difference from plain")
    bottom.set_xlabel("iteration")
    top.legend()
    bottom.legend()
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _apart(plain: list[float], other: dict[str, list[float]]) -> list[float]:
    # A logarithmic scale has no zero.
    return [abs(a - b) + 1e-9 for a, b in zip(plain, other["total_loss"], strict=True)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, print the differences, draw and write what was asked for."""
    curves = record(args)
    zero, plain = compare(curves["plain 0"], curves["zero"]), noise(curves)
    rows = [
        (name, zero[name]["mean"], *(d[name][part] for part in ("early", "all") for d in pair))
        for name in sorted(zero)
        for pair in [(zero, plain)]
    ]
    head = ["largest difference of", "mean size"]
    ways = ("ZeRO to plain", "two plain runs")
    head += [f"{way}, {part}" for part in (f"first {EARLY}", "all") for way in ways]
    print(tabulate(rows, head, floatfmt=("", ".3f", ".1e", ".1e", ".1e", ".1e")))
    if args.plot:
        draw(curves, args.plot, f"{args.processes} processes, {Path(args.zero).stem}")
        print(f"\nwrote {args.plot}")
    figures = {"curves": curves, "zero": zero, "plain": plain}
    if args.json:
        write_json(args.json, figures)
        print(f"\nwrote {args.json}")
    return figures

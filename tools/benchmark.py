#!/usr/bin/env python
"""What a configuration costs, and how fast its data path, its answers and their scores are.

    python tools/benchmark.py cost --config-file configs/gella_swin_t.yaml
    python tools/benchmark.py data --json data.json
    python tools/benchmark.py loading --narratives 20000 --images 20000
    python tools/benchmark.py generation --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py eval --json eval.json
    python tools/benchmark.py predict --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py crash --kills 20
    python tools/benchmark.py curves --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py photographs
    python tools/benchmark.py ablate --sets 7,10

``cost`` counts parameters, FLOPs and memory of each part, and memory per GPU under ZeRO, without
weights or a GPU. ``data`` times the mapper, the loader and the colormap. ``loading`` loads
annotations of COCO's size. ``generation`` counts the calls of the language model for an answer.
``eval`` times the metrics. ``predict`` times captions on one
picture and pictures in one batch. ``curves`` lays a training under ZeRO over a plain one. ``crash``
kills a training again and again. ``photographs`` lets a tiny model learn two real ones by heart.
``ablate`` repeats the paper's ablations on the scenes, over seeds.
Each explains itself: ``python tools/benchmark.py cost --help``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from gella.commands.console import exit_status
from gella.utils.io import write_json

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT / "datasets")]
# mode -> its file in benchmarks/, and what it does. The file has NUMBERS (options that take an
# integer: default, least, help), OPTIONS where there are others (arguments of add_argument), run
# (figures, and the text to print), NEXT (what to do then), and where figures can be wrong, failed.
MODES = {
    "ablate": ("ablate", "the paper's ablations and ours on the scenes, over seeds"),
    "cost": ("cost", "parameters, FLOPs and memory of each part, counted"),
    "crash": ("crash", "kills a training and compares what its resumed runs end at"),
    "curves": ("curves", "losses under ZeRO in several processes over those of one"),
    "data": ("data", "images per second of mapper and loader"),
    "loading": ("loading", "time and memory of annotations of COCO's and PNG's size"),
    "generation": ("generation", "calls of the language model for an answer"),
    "eval": ("evaluation", "time of panoptic quality and average recall"),
    "rehearsal": ("rehearsal", "the paper's model at its size on random weights, stage by stage"),
    "photographs": ("photographs", "a training that learns two real photographs by heart"),
    "predict": ("predict", "captions on one picture, and pictures in one batch"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments, 1 if a mode failed."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(file) for name, (file, _) in MODES.items()}
    for name, (_, text) in MODES.items():
        about = modules[name].__doc__
        mode = commands.add_parser(name, help=text, description=about, formatter_class=form)
        mode.add_argument("--json", metavar="FILE", help="write the figures there too")
        for option, (default, _, what) in modules[name].NUMBERS.items():
            told = what if default is None else f"{what} (default {default})"
            mode.add_argument(f"--{option}", type=int, default=default, metavar="N", help=told)
        for option, settings in getattr(modules[name], "OPTIONS", {}).items():
            mode.add_argument(option, **settings)
    args = parser.parse_args(arguments)
    module = modules[args.command]

    def work() -> int:
        for option, (_, least, _) in module.NUMBERS.items():
            value = getattr(args, option.replace("-", "_"))
            if value is not None and value < least:
                raise ValueError(f"--{option} is {value}; give at least {least}")
        figures, text = module.run(args)
        print(text)
        if args.json:
            write_json(args.json, figures)
            print(f"\nwrote {args.json}")
        if hasattr(module, "failed") and module.failed(figures):
            return 1
        print("\nnext:", module.NEXT.format_map(vars(args)))
        return 0

    return exit_status(work, errors=(KeyError, OSError, ValueError), interrupted="stopped")


if __name__ == "__main__":
    sys.exit(main())

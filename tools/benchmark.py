#!/usr/bin/env python
"""What a configuration costs, and how fast its data path, its answers and their scores are.

    python tools/benchmark.py cost --config-file configs/gella_swin_t.yaml
    python tools/benchmark.py data --json data.json
    python tools/benchmark.py generation --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py eval --json eval.json
    python tools/benchmark.py predict --config-file configs/gella_tiny_shapes.yaml
    python tools/benchmark.py crash --kills 20
    python tools/benchmark.py curves --config-file configs/gella_tiny_shapes.yaml

``cost`` counts parameters, FLOPs and memory of each part, and memory per GPU under ZeRO, without
weights or a GPU. ``data`` times the mapper, the loader and the colormap. ``generation`` counts the
calls of the language model for an answer. ``eval`` times the metrics and the language pass of given
nouns. ``predict`` times captions on one picture and pictures in one batch. ``curves`` lays a
training under ZeRO over a plain one. ``crash`` kills a training again and again. Each explains
itself: ``python tools/benchmark.py cost --help``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT / "datasets")]

import cost as benchmark_cost  # noqa: E402
import crash as benchmark_crash  # noqa: E402
import curves as benchmark_curves  # noqa: E402
import data as benchmark_data  # noqa: E402
import evaluation as benchmark_eval  # noqa: E402
import generation as benchmark_generation  # noqa: E402
import predict as benchmark_predict  # noqa: E402

MODES = {
    "cost": (benchmark_cost, "parameters, FLOPs and memory of each part, counted"),
    "crash": (benchmark_crash, "kills a training and compares what its resumed runs end at"),
    "curves": (benchmark_curves, "losses under ZeRO in several processes over those of one"),
    "data": (benchmark_data, "images per second of mapper and loader"),
    "generation": (benchmark_generation, "calls of the language model for an answer"),
    "eval": (benchmark_eval, "time of panoptic quality, average recall and given nouns"),
    "predict": (benchmark_predict, "captions on one picture, and pictures in one batch"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (mode, text) in MODES.items():
        mode.add_arguments(commands.add_parser(name, help=text))
    args = parser.parse_args(arguments)
    try:
        MODES[args.command][0].run(args)
    except (KeyError, OSError, ValueError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

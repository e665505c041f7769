"""Lets a tiny model learn two real photographs by heart, through the whole path of real data.

    python tools/benchmark.py photographs
    python tools/benchmark.py photographs --iterations 60 --output output/short SEED 3

Makes a byte-level tokenizer of the four narratives of --sample (in COCO's layout) and of COCO's
categories, and runs tools/train_net.py as anybody does: it trains the config on them from scratch,
and asks for the same narratives, nouns and segments again. What it knows then it was shown; how it
does on another photograph the figures do not say. That the path of real data carries what there is
to learn, they do: JPEGs, panoptic PNGs with crowds and void, narratives with their nouns, resized
views, the annotation's masks, losses, and scores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import OPTS, machine
from shapes_text import train_tokenizer

from gella.commands.inputs import config_of
from gella.data.register import coco_panoptic_categories
from gella.evaluation import load_results
from gella.text.prompts import panoptic_sentence, spoken_name
from gella.utils.io import read_json

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = {"iterations": (None, 1, "of the training; default: those of the config")}
OPTIONS = {
    "--config-file": {
        "default": str(ROOT / "configs" / "gella_tiny_photographs.yaml"),
        "metavar": "FILE",
    },
    "--sample": {"default": str(ROOT.parent / "shared" / "coco_sample"), "metavar": "DIR"},
    "--output": {"default": "output/photographs", "metavar": "DIR", "help": "a new folder"},
    "opts": OPTS,
}
NEXT = "docs/FINETUNING.md, photographs of your own"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The scores ``{task: {metric: score}}`` with how they came about, and what they took.

    FileNotFoundError for a sample that is not there, ValueError for a folder that is, and for a run
    that failed.
    """
    sample, data = Path(args.sample).resolve(), Path(args.output).resolve()
    narratives = read_json(sample / "annotations" / "png_coco_val2017.json")
    if data.exists():
        raise ValueError(f"{data} exists already: name a new folder, or remove it first")
    categories = panoptic_sentence([spoken_name(c["name"]) for c in coco_panoptic_categories()])
    texts = [*(item["caption"] for item in narratives), categories]
    size = config_of(args.config_file, args.opts).MODEL.LANGUAGE.VOCAB_SIZE
    train_tokenizer(texts, str(data / "tokenizer"), size - 1)
    (data / "coco").symlink_to(sample)  # which is laid out as COCO is
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--config-file", args.config_file]
    command += [*args.opts, "OUTPUT_DIR", data / "run"]
    command += ["SOLVER.MAX_ITER", args.iterations] if args.iterations else []
    known = {**os.environ, "DETECTRON2_DATASETS": str(data)}
    if subprocess.run([*map(str, command)], env=known).returncode:
        raise ValueError("tools/train_net.py failed; its message is above")
    results, how = load_results(data / "run" / "results.json")
    return {**results, "run": how}, f"{how['seconds']:.0f} s; {machine(how['device'])}"

"""Kill a training without warning, again and again: does it go on to the same weights?

    python tools/benchmark.py crash --kills 20
    python tools/benchmark.py crash --kills 20 --processes 2 --zero-stage 2 --json crash.json

A tiny model trains on drawn scenes by tools/train_net.py, saving after every iteration; once to the
end, and once per kill: ``kill -9`` for all its processes at a moment drawn from ``--seed``, then
``--resume``. Every second moment is drawn from the time between the first save and the last, every
other one lies inside the writing of a checkpoint. Each resumed run must start from the newest
complete checkpoint and end at the weights of the run that was never killed, bit for bit. Runs on
the CPU; a kill takes two starts of the script. The exit status is 1 if a run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = {
    "kills": (20, 1, "so many trials"),
    "processes": (1, 1, "of each run"),
    "iterations": (12, 3, "of each run"),
    "seed": (0, 0, "of the moments"),
}
OPTIONS = {
    "--zero-stage": {"type": int, "choices": range(4), "help": "of the language decoder"},
    "--folder": {"metavar": "DIR", "help": "keep data and runs there; default: a temporary folder"},
}
NEXT = "train with SOLVER.CHECKPOINT_PERIOD; after a crash add --resume to the command"
POLL = 0.0005  # seconds between two looks at what a run does
PATIENCE = 900.0  # seconds that a run of a minute may take
IN_SAVE = 0.03  # seconds after the start of a save in which a kill lies
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.IMAGE_ENCODER.WIDTH", 32, "MODEL.IMAGE_ENCODER.LAYERS", 2),
    *("MODEL.RESOBLEND.DIM", 32, "MODEL.MASK_DECODER.HIDDEN_DIM", 32),
    *("MODEL.MASK_DECODER.MASK_DIM", 32, "MODEL.MASK_DECODER.DECODER_LAYERS", 1),
    *("MODEL.LANGUAGE.HIDDEN_SIZE", 32, "MODEL.LANGUAGE.INTERMEDIATE_SIZE", 64),
    *("MODEL.LANGUAGE.NUM_LAYERS", 1, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1),
    *("SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 3, "DATALOADER.TASK_RATIOS", "[0.3,0.3,0.4]"),
]


class Run:
    """One process group that trains into a folder, and what it prints."""

    def __init__(self, command: Sequence[Any], folder: Path, data: Path) -> None:
        """Start it; ``data`` holds the drawn scenes."""
        folder.mkdir(exist_ok=True)
        self.checkpoints, self._printed = folder / "checkpoints", folder / "printed.txt"
        environment = {"DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
        with open(self._printed, "w", encoding="utf-8") as stream:
            # A group of its own: a kill must hit the workers and the other processes too.
            self._process = subprocess.Popen(
                [*map(str, command), "OUTPUT_DIR", str(folder)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        self._deadline = time.monotonic() + PATIENCE

    def wait(self, *paths: Path) -> None:
        """Wait until one of these is there, or the run has ended; ValueError if it hangs."""
        while not any(path.exists() for path in paths) and self._process.poll() is None:
            if time.monotonic() > self._deadline:
                self.kill()
                raise ValueError(f"the run in {self._printed.parent} hangs; see {self._printed}")
            time.sleep(POLL)

    def kill(self) -> None:
        """End all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def finish(self) -> str:
        """Wait for its good end; returns what it printed. ValueError if it failed."""
        self.wait()
        self.kill()  # loader processes that outlive it
        printed = self._printed.read_text(encoding="utf-8", errors="replace")
        if self._process.returncode:
            last = printed.strip().splitlines()[-1:]
            raise ValueError(f"the run in {self._printed.parent} failed: {''.join(last)}")
        return printed


class Trial:
    """Runs of one configuration: the whole one, then killed and resumed ones."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Draw the scenes."""
        self._iterations, self._folder = args.iterations, folder
        self._random = random.Random(args.seed)
        shapes = folder / "data" / "shapes"
        prepare = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
        prepare += ["--output", str(shapes), "--train", "40", "--val", "2"]
        subprocess.run(prepare, check=True, capture_output=True)
        self._options = ["--num-gpus", args.processes, "--dist-url", "auto", *TINY]
        self._options += ["MODEL.LANGUAGE.TOKENIZER", shapes / "tokenizer"]
        self._options += ["SOLVER.MAX_ITER", args.iterations]
        self._options += ["SOLVER.IMS_PER_BATCH", 2 * args.processes]
        if args.zero_stage is not None:
            config = ROOT / "configs" / "zero" / f"stage{args.zero_stage}.json"
            self._options += ["SOLVER.ZERO.CONFIG", config]

    def _start(self, name: str, *flags: str) -> Run:
        script, config = ROOT / "tools/train_net.py", ROOT / "configs/gella_tiny_shapes.yaml"
        command = [sys.executable, script, "--config-file", config, *flags, *self._options]
        return Run(command, self._folder / name, self._folder / "data")

    def whole(self) -> None:
        """Train to the end once, and take the time from the first save on."""
        run = self._start("whole")
        run.wait(run.checkpoints)
        start = time.monotonic()
        run.wait(run.checkpoints / f"iter_{self._iterations - 1:07d}")
        self._seconds = time.monotonic() - start
        run.finish()
        self._expected = _weights(self._folder / "whole")

    def kill(self, number: int) -> dict[str, Any]:
        """One run that is killed and resumed; the row of the table."""
        name = f"kill{number:02d}"
        run = self._start(name)
        if number % 2:
            # DeepSpeed takes seconds to start, in which nothing happens.
            delay, begun = self._random.uniform(0.0, self._seconds), [run.checkpoints]
            moment = f"{delay:.2f} s after the first save began"
        else:
            iteration = self._random.randrange(self._iterations)
            delay = self._random.uniform(0.0, IN_SAVE)
            names = (f".iter_{iteration:07}.tmp", f"iter_{iteration:07}")
            begun = [run.checkpoints / name for name in names]
            moment = f"{1000 * delay:.0f} ms into saving {iteration}"
        run.wait(*begun)
        time.sleep(delay)
        run.kill()
        present = sorted(p.name for p in run.checkpoints.glob("*iter_*"))
        complete = [n for n in present if n.startswith("iter_")]
        printed = self._start(name, "--resume").finish()
        resumed = re.findall(r"Loading checkpoint \S*/(iter_\d+)", printed)
        passed = sorted(set(re.findall(r"checkpoint \S*/(\S+) is passed over", printed)))
        equal, difference = compared(_weights(self._folder / name), self._expected)
        right = set(resumed) == set(complete[-1:]) and passed == sorted(set(present) - {*complete})
        return {
            "kill": number,
            "moment": moment,
            "reached": max([p.lstrip(".") for p in present], default="no save"),
            "resumed from": resumed[0] if resumed else "the start",
            "passed over": ", ".join(passed),
            "equal": "yes" if equal and right else "NO" if right else "NO: wrong checkpoint",
            "difference": difference,
        }


def compared(
    weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[bool, float]:
    """Whether two sets of weights are equal bit for bit, and their largest difference."""
    pairs = [(weights[key], value) for key, value in expected.items()]
    difference = max(float((one.double() - other.double()).abs().max()) for one, other in pairs)
    return all(torch.equal(*pair) for pair in pairs), difference


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print; ValueError for a run that hangs or fails."""
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        trial = Trial(args, Path(folder).resolve())
        trial.whole()
        rows = [trial.kill(n) for n in tqdm(range(args.kills), "kills", leave=False)]
    stage = "without ZeRO" if args.zero_stage is None else f"ZeRO stage {args.zero_stage}"
    runs = f"{args.iterations} iterations, {args.processes} process(es), {stage}"
    equal = sum(row["equal"] == "yes" for row in rows)
    text = f"{tabulate(rows, 'keys', floatfmt='.1e')}\n\n{runs}: {equal} of {len(rows)} equal"
    return {"runs": runs, "equal": equal, "kills": rows}, f"{text} to the whole run"


def failed(figures: dict[str, Any]) -> bool:
    """Whether a run ended at other weights, or took up a wrong checkpoint."""
    return figures["equal"] < len(figures["kills"])

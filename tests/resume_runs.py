"""Runs of the small GELLA of `zero_runs`, from the start or from the middle of another run.

Called with a JSON list [tokenizer, folder, blocks]; a block is [processes, steps], a step {"name",
"options"} and, where needed, "from", the name of a run: its output folder is copied as if it had
ended after iteration 1, and resumed. A run's folder gets ``report.json`` and, apart from all
checkpoints, whole weights before its first step (``start.pth``) and after iteration 1
(``middle.pth``).
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import zero_runs
from detectron2.engine import HookBase, launch
from detectron2.utils import comm

MAX_ITER, MIDDLE = 4, 1


class Watch(HookBase):
    """Keeps whole weights of the first step and of the middle, apart from all checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.has_started = folder, False

    def before_step(self) -> None:
        if not self.has_started:
            self.keep("start")
        self.has_started = True

    def after_step(self) -> None:
        if self.trainer.iter == MIDDLE:
            self.keep("middle")

    def keep(self, name: str) -> None:
        trainer: Any = self.trainer

        def save() -> None:
            if comm.is_main_process():
                state = getattr(trainer.model, "module", trainer.model).state_dict()
                torch.save(state, self.folder / f"{name}.pth")

        save() if trainer._zero is None else trainer._zero.save_whole(save)


def run(step: dict[str, Any], tokenizer: str, folder: str) -> None:
    """One run; every process calls it."""
    torch.set_num_threads(1)
    output = Path(folder, step["name"])
    if comm.is_main_process():
        if "from" in step:
            left_out = shutil.ignore_patterns("model_final.pth", "iter_0000003", "start.pth")
            shutil.copytree(Path(folder, step["from"]), output, ignore=left_out)
        output.mkdir(exist_ok=True)
    comm.synchronize()
    options = ["SOLVER.MAX_ITER", MAX_ITER, "SOLVER.CHECKPOINT_PERIOD", 2, *step["options"]]
    cfg = zero_runs.make_cfg(tokenizer, str(output), options)
    torch.manual_seed(50 + comm.get_rank())  # other weights than any other run
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gella").addHandler(handler)
    trainer = zero_runs.SteadyTrainer(cfg)
    trainer.register_hooks([Watch(output)])
    trainer.resume_or_load(resume="from" in step)
    trainer.train()
    logging.getLogger("gella").removeHandler(handler)
    if comm.is_main_process():
        report = {"notes": notes, "start": trainer.start_iter}
        (output / "report.json").write_text(json.dumps(report))
    comm.synchronize()


def run_all(steps: list[dict[str, Any]], tokenizer: str, folder: str) -> None:
    """One run after the other; every process calls it."""
    for step in steps:
        run(step, tokenizer, folder)


if __name__ == "__main__":
    TOKENIZER, FOLDER, BLOCKS = json.loads(sys.argv[1])
    for processes, steps in BLOCKS:
        if processes == 1:
            run_all(steps, TOKENIZER, FOLDER)
        else:
            launch(run_all, processes, dist_url="auto", args=(steps, TOKENIZER, FOLDER))

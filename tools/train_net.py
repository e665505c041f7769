#!/usr/bin/env python
"""Train or evaluate GELLA with Detectron2's command line.

    python tools/train_net.py --config-file configs/gella_tiny_shapes.yaml
    python tools/train_net.py --config-file ... --resume
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth
    python tools/train_net.py --config-file ... --eval-only --table 3 MODEL.WEIGHTS ...

Writes to OUTPUT_DIR: checkpoints, config.yaml, log.txt, metrics.json, TensorBoard events,
inference/<dataset>/, results.json ({task: {metric: score}}, and "run": how they came about) and
results.md (the paper's rows beside ours). --table N runs all that a table of the paper needs, with
these weights, and writes to OUTPUT_DIR/table_N; "all" is every mode (docs/EVALUATION.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm

from gella import load_config
from gella.checkpoint import load_weights
from gella.evaluating import (
    Evaluation,
    calibrated,
    check_expected,
    dataset_counts,
    evaluate_config,
    evaluate_table,
    save_evaluation,
    without_expected,
)
from gella.evaluation import format_results
from gella.evaluation.run_info import describe_run
from gella.evaluation.tables import TABLES
from gella.plugins import import_modules
from gella.trainer import GellaTrainer

LOGGER = logging.getLogger("detectron2")
# What a wrong file, name or value raises while a run is set up. Other exceptions are bugs.
USER_ERRORS = (KeyError, ValueError, OSError)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with one line and status 2 if a user's mistake is met inside.

    Only the set-up runs in here; the training loop does not, so that its errors keep their
    traceback. ``GELLA_TRACEBACK=1`` shows the traceback of the set-up too.
    """
    try:
        yield
    except USER_ERRORS as error:
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        # str() of a KeyError quotes its message
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, KeyError) and " " not in text:
            text = f"KeyError {text} (GELLA_TRACEBACK=1 shows where)"
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def setup(args: Any) -> CfgNode:
    """Read the config file and the overrides, and set logging and seeds up.

    Args:
        args: what ``default_argument_parser`` parsed.

    Returns:
        The frozen config. Without a CUDA device, ``MODEL.DEVICE`` "cuda" becomes "cpu".
    """
    if not args.config_file:
        raise ValueError("--config-file is missing; see the folder configs/")
    cfg = load_config(args.config_file, args.opts or [])
    if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    import_modules(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    LOGGER.info(
        "detectron2 %s from %s", detectron2.__version__, os.path.dirname(detectron2.__file__)
    )
    LOGGER.info("device: %s", cfg.MODEL.DEVICE)
    return cfg


def evaluate(
    cfg: CfgNode, *, resume: bool, config_file: str = "", table: str = ""
) -> tuple[Evaluation, str]:
    """Evaluate weights on ``DATASETS.TEST``, or run all that a table of the paper needs.

    Args:
        cfg: a frozen config; ``MODEL.WEIGHTS`` names the weights.
        resume: take the newest checkpoint of ``OUTPUT_DIR`` instead.
        config_file: its file, for the record.
        table: one of ``TABLES``; the table is printed, and the evaluation comes back empty.

    Returns:
        the scores (empty on other processes than the main one) and the weights' path.
    """
    with user_errors():
        weights = cfg.MODEL.WEIGHTS
        if resume:
            weights = newest_checkpoint(cfg.OUTPUT_DIR)
        if not weights:
            raise ValueError(
                "--eval-only has nothing to evaluate: give MODEL.WEIGHTS FILE at the end of the"
                " command, or --resume for the newest checkpoint of OUTPUT_DIR"
            )
        cfg, calibration = calibrated(cfg, weights)
        model = GellaTrainer.build_model(cfg)
        load_weights(model, weights, cfg)
        counts = {} if table else dataset_counts(cfg)
    known = {"config_file": config_file, "weights": weights, "calibration": calibration}
    if not table:
        return evaluate_config(cfg, model, counts=counts, **known), weights
    with user_errors():
        text, folder = evaluate_table(cfg, model, table, **known)
    if comm.is_main_process():
        print(f"\n{text}\nTable:    {folder}/results.md; each run in a folder beside it")
    return Evaluation(), weights


def newest_checkpoint(folder: str) -> str:
    """Path of the checkpoint that ``folder/last_checkpoint`` names; FileNotFoundError if none."""
    tag = os.path.join(folder, "last_checkpoint")
    if not os.path.isfile(tag):
        raise FileNotFoundError(f"{tag} does not exist: nothing was trained in OUTPUT_DIR {folder}")
    with open(tag, encoding="utf-8") as stream:
        return os.path.join(folder, stream.read().strip())


def train(cfg: CfgNode, *, resume: bool) -> tuple[dict[str, dict[str, float]] | None, str]:
    """Train, and evaluate at the end.

    Args:
        cfg: a frozen config.
        resume: continue from the newest checkpoint of ``OUTPUT_DIR`` if there is one.

    Returns:
        ``{task: {metric: score}}`` (None on other processes than the main one) and the path of the
        final weights.
    """
    with user_errors():
        trainer = GellaTrainer(without_expected(cfg))
        trainer.resume_or_load(resume=resume)
        dataset_counts(cfg)  # wrong annotations end the run here
    return trainer.train(), os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


def report(
    cfg: CfgNode,
    config_file: str,
    results: dict[str, Any] | None,
    weights: str,
    run: dict[str, Any] | None = None,
    outcome: dict[str, Any] | None = None,
) -> None:
    """Print the one table, write ``results.json`` and ``results.md``, say what to type next."""
    lines = [f"Weights:  {weights}"]
    if results:
        path = save_evaluation(cfg.OUTPUT_DIR, results, run, outcome)
        print(f"\n{format_results(results)}\n")
        lines.append(f"Results:  {path}")
    dataset = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "NAME"
    lines.append(
        f"Next:     python tools/demo.py --config-file {config_file} --weights {weights}"
        f" --dataset {dataset} --num 3 --output {os.path.join(cfg.OUTPUT_DIR, 'demo')}"
    )
    print("\n".join(lines), flush=True)


def main(args: Any) -> None:
    """Run one process of the training or evaluation that the arguments describe."""
    table = getattr(args, "table", "")
    with user_errors():
        if table and not args.eval_only:
            raise ValueError(f"--table {table} evaluates weights: add --eval-only")
        cfg = setup(args)
    started = time.perf_counter()
    run: dict[str, Any] | None = None
    outcome = None
    if args.eval_only:
        done, weights = evaluate(cfg, resume=args.resume, config_file=args.config_file, table=table)
        results, run, outcome = done.results, done.run, done.outcome
    else:
        results, weights = train(cfg, resume=args.resume)
    if not comm.is_main_process():
        return
    if results and run is None:
        run = describe_run(
            cfg,
            config_file=args.config_file,
            weights=weights,
            seconds=time.perf_counter() - started,
            datasets=dataset_counts(cfg),
        )
    report(cfg, args.config_file, results, weights, run, outcome)
    if results:
        with user_errors():
            check_expected(cfg, results)


if __name__ == "__main__":
    PARSER = default_argument_parser(epilog=__doc__)
    PARSER.add_argument(
        "--table", default="", choices=TABLES, help="evaluate all that a table of the paper needs"
    )
    ARGS = PARSER.parse_args()
    launch(
        main,
        ARGS.num_gpus,
        num_machines=ARGS.num_machines,
        machine_rank=ARGS.machine_rank,
        dist_url=ARGS.dist_url,
        args=(ARGS,),
    )

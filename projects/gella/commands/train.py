"""Train or evaluate GELLA with Detectron2's command line.

    python tools/train_net.py --config-file configs/gella_tiny_shapes.yaml
    python tools/train_net.py --config-file ... --resume
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth
    python tools/train_net.py --config-file ... --eval-only --table 3 MODEL.WEIGHTS ...

--resume goes on from the newest complete checkpoint in OUTPUT_DIR/checkpoints, to the weights of a
run that was never interrupted; after a change of ZeRO stage or of the number of processes with the
same weights and a new optimiser of the language decoder.

On several GPUs or machines, by --num-gpus and --num-machines, or started by torchrun or srun (then
without these two; docs/TRAINING.md):

    torchrun --nnodes 2 --nproc-per-node 8 ... tools/train_net.py --config-file ...

SIGTERM and SIGINT (Ctrl-C) finish the step, save a checkpoint and end with status 0; a second one
ends at once.

Writes to OUTPUT_DIR: checkpoints/iter_* to resume from, model_final.pth (weights alone),
config.yaml, log.txt, metrics.json, TensorBoard events, inference/<dataset>/, results.json ({task:
{metric: score}}, and "run": how they came about) and results.md (the paper's rows beside ours).
--check looks at what the run needs and starts nothing, as every run does before it starts: config,
data, masks, weights, tokenizer, memory; what is missing is listed at once, with status 2.
--table N runs all that a table of the paper needs, with these weights, and writes to
OUTPUT_DIR/table_N; "all" is every mode (docs/EVALUATION.md).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from gella import __version__, load_config
from gella.commands.console import USER_ERRORS, tell_error, tools
from gella.commands.inputs import config_of
from gella.config import find_config
from gella.data.register import import_modules
from gella.engine.checkpoint import FOLDER as CHECKPOINTS
from gella.engine.checkpoint import CheckpointStore
from gella.engine.evaluate import (
    Evaluation,
    calibrated,
    check_expected,
    evaluate_config,
    evaluate_table,
    read_test_sets,
    save_evaluation,
)
from gella.engine.evaluation_hooks import with_keys
from gella.engine.hooks import RunStopped
from gella.engine.launch import (
    LaunchError,
    UnequalRanks,
    check_agreement,
    config_facts,
    file_facts,
    launch_from_environment,
    record_facts,
    resume_command,
)
from gella.engine.preflight import Run, missing_for, missing_text, untrained_parts
from gella.engine.trainer import GellaTrainer
from gella.evaluation import format_results
from gella.evaluation.results import by_dataset, describe_run, refuse_nothing
from gella.evaluation.tables import TABLES
from gella.weights.checkpoint import build_with_weights, find_clip

LOGGER = logging.getLogger("detectron2")


@contextlib.contextmanager
def user_errors(types: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """End the process with one line and status 2 if a user's mistake is met inside.

    Only the set-up runs in here; the training loop does not, so that its errors keep their
    traceback.

    Args:
        types: the exceptions that are a mistake of the user.
    """
    try:
        yield
    except types as error:
        shared = isinstance(error, UnequalRanks)  # raised on all ranks
        if comm.is_main_process() or not shared:
            tell_error(error)
        if shared:
            comm.synchronize()  # the first to end takes the others down
        raise SystemExit(2) from None


def setup(args: Any) -> CfgNode:
    """Read the config file and the overrides; set logging and seeds up. Returns the frozen config.

    Without a CUDA device, ``MODEL.DEVICE`` "cuda" becomes "cpu"; `preflight` has refused what does
    not fit there.
    """
    cfg = config_of(args.config_file, args.opts or [])
    find_clip(cfg)
    cfg.freeze()
    args.config_file = str(find_config(args.config_file))  # which it notes as it stands
    default_setup(cfg, args)
    # Detectron2 sets its own loggers up only.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gella")
    folder = os.path.dirname(detectron2.__file__)
    LOGGER.info("detectron2 %s from %s", detectron2.__version__, folder)
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

    Returns the scores (empty on other processes than the main one) and the weights' path.
    """
    with user_errors():
        weights = cfg.MODEL.WEIGHTS
        if resume:
            checkpoints = os.path.join(cfg.OUTPUT_DIR, CHECKPOINTS)
            newest = CheckpointStore(checkpoints).newest()
            if newest is None:
                raise FileNotFoundError(
                    f"{checkpoints} has no checkpoint: nothing was trained in OUTPUT_DIR"
                    f" {cfg.OUTPUT_DIR}"
                )
            weights = str(newest.path)
        if not weights:
            raise ValueError(
                "--eval-only has nothing to evaluate: give MODEL.WEIGHTS FILE at the end of the"
                " command, or --resume for the newest checkpoint of OUTPUT_DIR"
            )
        cfg, calibration = calibrated(with_keys(cfg, {"TEST.SUBSET": 0}), weights)
        fresh = untrained_parts(weights)
        if fresh:
            LOGGER.warning("%s are first weights, untrained: %s", weights, ", ".join(fresh))
        facts, counts = read_test_sets(cfg)
        check_agreement({**facts, **file_facts("the weights", weights)})
        model = build_with_weights(cfg, weights, GellaTrainer.build_model)
    known = {"config_file": config_file, "weights": weights, "calibration": calibration}
    if not table:
        done = evaluate_config(cfg, model, counts=counts, **known)
        done.run |= {"untrained": fresh} if fresh and done.run else {}
        return done, weights
    with user_errors():
        text, folder = evaluate_table(cfg, model, table, **known)
    if comm.is_main_process():
        print(f"\n{text}\nTable:    {folder}/results.md; each run in a folder beside it")
    return Evaluation(), weights


def train(cfg: CfgNode, *, resume: bool, config_file: str = "") -> tuple[Evaluation, str]:
    """Train, or go on from the newest checkpoint of ``OUTPUT_DIR``, and evaluate at the end.

    Returns the scores (empty on other processes than the main one) and the path of the final
    weights.
    """
    started = time.perf_counter()
    with user_errors():
        facts, counts = read_test_sets(cfg)
        # Detectron2 compares with expected results before anybody sees the scores.
        trainer = GellaTrainer(with_keys(cfg, {"TEST.EXPECTED_RESULTS": []}), resume=resume)
        facts |= record_facts("DATASETS.TRAIN", trainer.data_loader.dataset.records)
        facts |= file_facts("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
        if resume:
            newest = trainer.checkpoints.store.newest()
            facts |= file_facts("the checkpoint to resume from", newest.path if newest else "")
        check_agreement(facts)
        trainer.resume_or_load(resume=resume)
    results = trainer.train()
    weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    if not results:
        return Evaluation(), weights
    run = describe_run(
        cfg,
        config_file=config_file,
        weights=weights,
        seconds=time.perf_counter() - started,
        datasets=counts,
    )
    return Evaluation(by_dataset(results, list(counts)), run), weights


def run(args: Any) -> None:
    """Run one process of the training or evaluation that the arguments describe."""
    table = getattr(args, "table", "")
    with user_errors():
        if table and not args.eval_only:
            raise ValueError(f"--table {table} evaluates weights: add --eval-only")
        cfg = setup(args)
        check_agreement(config_facts(cfg))
    try:
        options = {"resume": args.resume, "config_file": args.config_file}
        if args.eval_only:
            done, weights = evaluate(cfg, table=table, **options)
        else:
            done, weights = train(cfg, **options)
    except RunStopped as stopped:
        if comm.is_main_process():
            print(f"{stopped}\nNext:     {resume_command(sys.argv)}", flush=True)
        return
    if not comm.is_main_process():
        return
    lines = [f"Weights:  {weights}"]
    if done.run.get("untrained"):
        lines[0] += f" (first weights, untrained: {', '.join(done.run['untrained'])})"
    if done.results:
        print(f"\n{format_results(done.results)}\n", flush=True)
        with user_errors():  # shown before what may fail
            lines.append(f"Results:  {save_evaluation(cfg.OUTPUT_DIR, done)}")
    dataset = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "NAME"
    lines.append(
        f"Next:     python {tools()}/demo.py"
        f" --config-file {args.config_file} --weights {weights} --dataset {dataset}"
        f" --num 3 --output {os.path.join(cfg.OUTPUT_DIR, 'demo')}"
    )
    print("\n".join(lines), flush=True)
    with user_errors():
        if done.results or (args.eval_only and not table):
            refuse_nothing(done.outcome)
            check_expected(cfg, done.results)


def preflight(args: Any, processes: int, local: int) -> None:
    """List what the run lacks on this machine and end with status 2; with ``--check`` with 0."""
    with user_errors():
        cfg = load_config(args.config_file, args.opts or [])
        import_modules(cfg)
        find_clip(cfg)
        run = Run(args.config_file, processes, local, not args.eval_only, args.resume)
        found = missing_for(cfg, run._replace(data=not args.table, tools=tools()))
    if found:
        print(missing_text(found, args.config_file), file=sys.stderr, flush=True)
        raise SystemExit(2)
    if args.check:
        print(f"nothing is missing for {args.config_file}", flush=True)
        raise SystemExit(0)


def evaluate_only() -> None:
    """The command line with --eval-only, installed as ``gella-eval``."""
    sys.argv.insert(1, "--eval-only")
    main()


def main() -> None:
    """Run the command line, in as many processes as it or the environment asks for."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--version", action="version", version=f"gella {__version__}")
    parser.add_argument(
        "--table", default="", choices=TABLES, help="evaluate all that a table of the paper needs"
    )
    parser.add_argument(
        "--check", action="store_true", help="look at what is missing, start nothing"
    )
    args = parser.parse_args()
    if args.check and os.getenv("LOCAL_RANK", "0") != "0":
        return  # of torchrun's processes one looks
    with user_errors((LaunchError,)):
        launch_from_environment(run, args, functools.partial(preflight, args))

"""Running evaluations: one config, or all that a table of the paper needs, and what they leave."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from gella.data.register import root_from_environment
from gella.engine.evaluation_hooks import with_keys
from gella.engine.launch import record_facts
from gella.engine.trainer import GellaTrainer, load_records
from gella.evaluation.calibration import read_calibration
from gella.evaluation.results import (
    RUN,
    attempted,
    by_dataset,
    describe_run,
    load_results,
    merge_datasets,
    refuse_nothing,
)
from gella.evaluation.tables import Run, compared_markdown, plan_table, table_markdown
from gella.utils.io import write_json, write_text

_logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Scores of one config and how they came about.

    Attributes:
        outcome: ``{dataset: {task: {metric: score}}}``, empty on other processes than the main one.
        run: of `describe_run`, likewise.
    """

    outcome: Mapping[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """``{task: {metric: score}}``; see `merge_datasets`."""
        return merge_datasets(self.outcome)


def calibrated(cfg: Any, weights: str) -> tuple[Any, dict[str, Any] | None]:
    """The config with the thresholds of ``TEST.CALIBRATION``, and what that file says.

    Returns ``(cfg, None)`` where the key is empty. Raises what `read_calibration` raises.
    """
    if not cfg.TEST.CALIBRATION:
        return cfg, None
    calibration = read_calibration(cfg.TEST.CALIBRATION, weights)
    thresholds = calibration["thresholds"]
    _logger.info("%s sets MODEL.GELLA: %s", cfg.TEST.CALIBRATION, thresholds)
    return with_keys(cfg, {f"MODEL.GELLA.{k}": v for k, v in thresholds.items()}), calibration


def read_test_sets(cfg: Any) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Read the annotations of ``DATASETS.TEST`` once, so that wrong ones end a run at its start.

    Returns:
        what must be equal on all ranks, for ``check_agreement``, and for ``results.json`` by
        dataset the numbers of ``records`` and of the ``images`` that they are about.

    Raises:
        OSError, KeyError, ValueError: what the readers refuse, naming file and record.
    """
    facts: dict[str, str] = {}
    counts = {}
    for name in cfg.DATASETS.TEST:
        records = load_records([name], "DATASETS.TEST", cfg)
        facts |= record_facts(f"test set {name}", records)
        images = len(set(records.image_ids().tolist()))
        counts[name] = {"records": len(records), "images": images}
    return facts, counts


def evaluate_config(
    cfg: Any,
    model: nn.Module,
    *,
    config_file: str,
    weights: str,
    calibration: dict[str, Any] | None = None,
    counts: dict[str, dict[str, int]] | None = None,
) -> Evaluation:
    """Evaluate a model on ``DATASETS.TEST`` by ``MODEL.GELLA``; every process must call this.

    ``config_file``, ``weights`` and ``calibration`` are for the record; ``counts``, of
    `read_test_sets`, spare reading the annotations once more.
    """
    inner = model.module if hasattr(model, "module") else model
    inner.inference_options = cfg.MODEL.GELLA
    counts = read_test_sets(cfg)[1] if counts is None else counts
    outcome: dict[str, dict[str, dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    for name in cfg.DATASETS.TEST:
        began = time.perf_counter()
        outcome[name] = GellaTrainer.test(with_keys(cfg, {"DATASETS.TEST": (name,)}), model)
        seconds[name] = round(time.perf_counter() - began, 1)
    if not comm.is_main_process():
        return Evaluation()
    run = describe_run(
        cfg,
        config_file=config_file,
        weights=weights,
        seconds=time.perf_counter() - started,
        datasets={name: {**counts[name], "seconds": seconds[name]} for name in outcome},
        calibration=calibration,
    )
    return Evaluation(outcome, run)


def save_evaluation(folder: str | Path, evaluation: Evaluation) -> str:
    """Write ``results.json`` and ``results.md``, the paper's rows beside ours, into a folder.

    Returns the path of the former.
    """
    path = os.path.join(folder, "results.json")
    write_json(path, {**evaluation.results, RUN: evaluation.run})
    text = compared_markdown(evaluation.outcome, evaluation.run.get("settings", {}))
    if text and evaluation.run.get("untrained"):
        text = f"**First weights: {', '.join(evaluation.run['untrained'])}: untrained.**\n\n{text}"
    if text:
        write_text(os.path.join(folder, "results.md"), text)
    return path


def evaluate_table(cfg: Any, model: nn.Module, table: str, **record: Any) -> tuple[str, Path]:
    """Run all evaluations that a table needs; every process must call this.

    Each run has a folder ``OUTPUT_DIR/table_<table>/<run>`` with its config, predictions and
    ``results.json``; beside the folders stand the whole table as ``results.md`` and all scores as
    ``results.json``. ``record`` is what `evaluate_config` takes for the record.

    Returns:
        the table as Markdown ("" on other processes than the main one), and its folder.

    Raises:
        ValueError, OSError, KeyError: the table or a run's data are wrong, before the first run; or
            after the last one that a run had nothing to score.
    """
    folder = Path(cfg.OUTPUT_DIR) / f"table_{table}"
    runs = plan_table(cfg, table, root_from_environment())
    configs = [
        with_keys(
            cfg,
            {**r.changes, "DATASETS.TEST": r.datasets, "OUTPUT_DIR": str(folder / r.name)},
        )
        for r in runs
    ]
    counts = [read_test_sets(run_cfg)[1] for run_cfg in configs]
    done = []
    for number, (run, run_cfg) in enumerate(zip(runs, configs, strict=True)):
        _logger.info("table %s, run %d of %d: %s", table, number + 1, len(runs), run.name)
        evaluation = evaluate_config(run_cfg, model, counts=counts[number], **record)
        done.append(evaluation)
        if comm.is_main_process():
            with attempted(f"results in {run_cfg.OUTPUT_DIR}"):
                write_text(Path(run_cfg.OUTPUT_DIR) / "config.yaml", run_cfg.dump())
                save_evaluation(run_cfg.OUTPUT_DIR, evaluation)
    if not comm.is_main_process():
        return "", folder
    written = {run.name: {"scores": e.outcome, "run": e.run} for run, e in zip(runs, done)}
    rows = [(run, e.outcome, e.run["settings"]) for run, e in zip(runs, done)]
    if table in ("6", "8", "9"):  # their rows are different weights, evaluated before
        parent, pattern = Path(cfg.OUTPUT_DIR).parent, f"table{int(table):02d}*/results.json"
        for path in sorted({*parent.glob(pattern), *(parent / "ablations").glob(pattern)}):
            results, known = load_results(path)
            names = tuple(known.get("datasets", ()))
            earlier = Run("", f"ours, {path.parent.name}", names)
            rows.append((earlier, by_dataset(results, names), known.get("settings", {})))
    text = table_markdown(table, *zip(*rows))
    with attempted(f"results in {folder}"):
        write_json(folder / "results.json", written)
        write_text(folder / "results.md", text)
    for evaluation in done:
        refuse_nothing(evaluation.outcome)
    return text, folder


def check_expected(cfg: Any, results: Mapping[str, Mapping[str, float]]) -> None:
    """Compare with ``TEST.EXPECTED_RESULTS`` by Detectron2's ``verify_results``: status 1 if off.

    To be called when the scores were shown: Detectron2's trainer would end before that.

    Raises:
        ValueError: an entry is malformed, or of a task that was not evaluated.
    """
    for entry in cfg.TEST.EXPECTED_RESULTS:
        if len(entry) != 4:
            raise ValueError(
                f"TEST.EXPECTED_RESULTS: {entry!r} is not [task, metric, expected, tolerance]"
            )
        if entry[0] not in results:
            raise ValueError(
                f"TEST.EXPECTED_RESULTS names the task {entry[0]!r}, but the results have "
                f"{', '.join(results) or 'none'}"
            )
    verify_results(cfg, results)

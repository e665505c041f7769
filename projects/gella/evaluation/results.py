"""What an evaluation leaves: its scores as one JSON file and one table, and how they came about."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm

from gella.evaluation.metrics import PROTOCOLS, SUBSETS
from gella.utils.io import config_hash, file_hash, read_json, versions

_logger = logging.getLogger(__name__)

RUN = "run"
"""Key of results.json beside the tasks: how the scores came about."""


def load_results(path: str | Path) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Scores and run of a results.json; an undefined score is NaN again. Errors as `read_json`."""
    content = read_json(path, advice="evaluate first (tools/train_net.py)")
    try:
        run = content.pop(RUN, {})
        scores = {
            task: {key: math.nan if value is None else value for key, value in metrics.items()}
            for task, metrics in content.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results ({error}); evaluate again") from error
    return scores, run


def merge_datasets(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """``{dataset: {task: metrics}}`` as ``{task: metrics}``.

    Where two datasets report the same task, the later one's key is ``task@dataset``.
    """
    merged: dict[str, dict[str, float]] = {}
    for dataset, tasks in results.items():
        for task, metrics in (tasks or {}).items():
            merged[f"{task}@{dataset}" if task in merged else task] = metrics
    return merged


def by_dataset(
    results: Mapping[str, Mapping[str, float]], datasets: Sequence[str]
) -> dict[str, dict[str, Mapping[str, float]]]:
    """The inverse of `merge_datasets` as far as it goes: ``{dataset: {task: metrics}}``.

    Tasks without ``@dataset`` stand under all names of ``datasets``, joined by commas.
    """
    split: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, metrics in results.items():
        task, _, dataset = name.partition("@")
        split.setdefault(dataset or ", ".join(datasets), {})[task] = metrics
    return split


def amp_dtype(cfg: Any) -> torch.dtype | None:
    """What training and evaluation compute in by autocast, with SOLVER.AMP on a GPU; else None.

    bfloat16 where the GPU has it: with float32's range it needs no loss scaling.
    """
    if not cfg.SOLVER.AMP.ENABLED or not str(cfg.MODEL.DEVICE).startswith("cuda"):
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def settings(cfg: Any) -> dict[str, Any]:
    """The keys that decide by which rule and in which mode scores were computed."""
    gella, test = cfg.MODEL.GELLA, cfg.TEST
    return {
        "png_protocol": test.PNG_PROTOCOL,
        "nouns": test.NOUNS,
        "categories_from": test.CATEGORIES_FROM or "the dataset",
        "entity_sources": [list(entry) for entry in cfg.INPUT.GELLA.ENTITY_SOURCES]
        or "the annotation",
        "queries": cfg.MODEL.MASK_DECODER.QUERIES,
        "snap": bool(gella.SNAP),
        "snap_iou": float(gella.SNAP_IOU),
        "copy_nouns": bool(gella.COPY_NOUNS),
        "color_draws": int(test.COLOR_DRAWS),
        "precision": str(amp_dtype(cfg) or cfg.MODEL.LANGUAGE.DTYPE).removeprefix("torch."),
        "thresholds": {
            "entity_score": float(gella.ENTITY_SCORE_THRESHOLD),
            "association": float(gella.ASSOCIATION_THRESHOLD),
            "singular_argmax": bool(gella.SINGULAR_ARGMAX),
            "none": float(gella.NONE_THRESHOLD),
            "panoptic": float(gella.PANOPTIC_THRESHOLD),
        },
    }


def describe_run(
    cfg: Any,
    *,
    config_file: str,
    weights: str,
    seconds: float,
    datasets: Mapping[str, Mapping[str, float]],
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that results.json says beside the scores.

    Args:
        cfg, config_file, weights: what was evaluated; the bytes of the weights are hashed.
        seconds: wall time of the evaluation, or of training with it.
        datasets: per dataset ``records``, ``images`` and, where known, ``seconds``.
        calibration: where the thresholds were picked (`calibration.read_calibration`).
    """
    described: dict[str, Any] = {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "processes": comm.get_world_size(),
        "device": str(cfg.MODEL.DEVICE),
        "config_file": config_file,
        "config_sha256": config_hash(cfg),
        "weights": weights,
        "weights_sha256": file_hash(weights),
        "versions": versions(),
        "datasets": {name: dict(counts) for name, counts in datasets.items()},
        "settings": settings(cfg),
    }
    if calibration is not None:
        picked_on = list(calibration["datasets"])
        described["calibration"] = {
            "picked_on": picked_on,
            "thresholds": calibration["thresholds"],
            # Thresholds that were picked on what they are scored on flatter the score.
            "scored_on_the_same": sorted(set(picked_on) & set(datasets)),
        }
    return described


@contextlib.contextmanager
def attempted(what: object) -> Iterator[None]:
    """Write what comes with scores: what fails inside is logged in one line and costs no score."""
    try:
        yield
    except Exception as error:  # a full disk, a folder of others, a value that JSON lacks
        told = " ".join(str(error).split())
        _logger.error("%s cannot be written (%s: %s)", what, type(error).__name__, told)


def refuse_nothing(outcome: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """ValueError where ``{dataset: {task: {metric: score}}}`` is of nothing, once it was shown."""
    if not outcome:
        raise ValueError("nothing was evaluated: DATASETS.TEST is empty; name a registered dataset")
    for dataset, tasks in outcome.items():
        empty = [task for task, metrics in tasks.items() if metrics.get("n") == 0]
        if empty or not tasks:
            raise ValueError(
                f"dataset {dataset}: nothing was evaluated ({', '.join(empty) or 'no task'}, n is "
                "0); its annotation names no entity, or no noun: look at its segment ids"
            )


# Per task its title, what its rows are called and their metrics, and suffixes of the columns.
_SECTIONS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "png": (
        "Panoptic narrative grounding, average recall, protocol {protocol}",
        {
            "AR": "AR",
            "oracle: best union of the given entities": "oracle_AR",
            "blind: a random entity per noun": "random_AR",
            "blind: the largest entity": "largest_AR",
            "blind: all entities": "all_AR",
            "acc@0.5": "acc@0.5",
            "nouns (n)": "n",
        },
        ("", *(f"_{name}" for name in SUBSETS)),
    ),
    "panoptic_seg": (
        "Panoptic segmentation",
        {"PQ": "PQ", "SQ": "SQ", "RQ": "RQ", "categories (n)": "n"},
        ("", "_th", "_st"),
    ),
    "entity": (
        "Entity masks before snapping, class-agnostic",
        {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "entities (n)": "n"},
        ("",),
    ),
    "nouns": (
        "Noun extraction from generated answers",
        {"recall": "recall", "precision": "precision", "nouns (n)": "n"},
        ("",),
    ),
    "refer": (
        "Referring expressions",
        {
            **{name: name for name in ("cIoU", "gIoU", *(f"P@0.{k}" for k in range(5, 10)))},
            "no target, none found": "N_acc",
            "of these (n)": "n_no_target",
            "a target, some found": "T_acc",
            "expressions (n)": "n",
        },
        ("",),
    ),
}


def format_results(results: Mapping[str, Any]) -> str:
    """One table of everything in ``results``, in percent, with the number of cases behind it.

    Args:
        results: ``{task: {metric: score}}`` or ``{dataset: {task: {metric: score}}}``. A task may
            be written ``task@dataset``; tasks that this table does not know are listed metric by
            metric.

    Returns:
        Lines joined by newlines; "-" where a score does not exist.
    """
    tasks: dict[str, Mapping[str, float]] = {}
    for name, value in results.items():
        if value and all(isinstance(item, Mapping) for item in value.values()):
            tasks |= {f"{task}@{name}": metrics for task, metrics in value.items()}
        elif value:
            tasks[name] = value
    table = [["score (percent)", "all", *SUBSETS]]
    for name, metrics in tasks.items():
        task, _, dataset = name.partition("@")
        title, rows, suffixes = _SECTIONS.get(task, (task, dict(zip(metrics, metrics)), ("",)))
        protocol = next((rule for rule in PROTOCOLS if metrics.get(f"protocol_{rule}")), "unknown")
        where = f" on {dataset}" if dataset not in ("", protocol) else ""
        table.append([title.format(protocol=protocol) + where])
        for label, key in rows.items():
            values = [metrics[key + suffix] for suffix in suffixes if key + suffix in metrics]
            if values:
                digits = 0 if key.split("_")[0] == "n" else 1
                table.append([f"  {label}", *(figure(value, digits) for value in values)])
    columns = zip_longest(*(row for row in table if len(row) > 1), fillvalue="")
    first, *widths = (max(map(len, column)) for column in columns)
    lines = []
    for label, *texts in table:
        aligned = [cell.rjust(width) for cell, width in zip(texts, widths, strict=False)]
        lines.append("  ".join([label.ljust(first), *aligned]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def figure(value: float | None, digits: int = 1) -> str:
    """A score as tables print it, "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"

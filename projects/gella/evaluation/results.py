"""Evaluation results as one JSON file and as one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gella.evaluation.metrics import PROTOCOLS, SUBSETS
from gella.utils.io import read_json, write_json

_COLUMNS = ("all", *SUBSETS)
_BASELINES = {
    "oracle": "oracle: best union of the given entities",
    "random": "blind: a random entity per noun",
    "largest": "blind: the largest entity",
    "all": "blind: all entities",
}


RUN = "run"
"""Key of results.json beside the tasks: how the scores came about."""


def save_results(
    results: Mapping[str, Any], path: str | Path, run: Mapping[str, Any] | None = None
) -> None:
    """Write ``{task: {metric: score}}`` as results.json, atomically; undefined scores are null.

    ``run``: how the scores came about (`run_info.describe_run`), under the key "run".
    """
    write_json(path, results if run is None else {**results, RUN: run})


def load_results(path: str | Path) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Scores and run of a results.json; an undefined score is NaN again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results.json.
    """
    content = read_json(path, advice="evaluate first (tools/train_net.py)")
    try:
        run = content.pop(RUN, {})
        scores = {
            task: {key: math.nan if value is None else value for key, value in metrics.items()}
            for task, metrics in content.items()
        }
    except (TypeError, AttributeError) as error:
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


def format_results(results: Mapping[str, Any]) -> str:
    """One table of everything in ``results``, in percent, with the number of cases behind it.

    Args:
        results: ``{task: {metric: score}}`` or ``{dataset: {task: {metric: score}}}``. A task may
            be written ``task@dataset``; tasks that this table does not know are listed metric by
            metric.

    Returns:
        Lines joined by newlines; "-" where a score does not exist.
    """
    rows: list[list[str]] = []
    for name, metrics in _flat_tasks(results):
        task, _, dataset = name.partition("@")
        title, body = _SECTIONS.get(task, _other)(task, metrics)
        rows.append([title + (f" on {dataset}" if dataset else "")])
        rows += body
    header = ["score (percent)", *_COLUMNS]
    table = [row for row in (header, *rows) if len(row) > 1]
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        indent = "" if len(row) == 1 or row is header else "  "
        lines.append("  ".join([(indent + row[0]).ljust(widths[0] + 2), *cells]).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _flat_tasks(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    tasks: list[tuple[str, Mapping[str, float]]] = []
    for name, value in results.items():
        if value and all(isinstance(item, Mapping) for item in value.values()):
            tasks += [(f"{task}@{name}", metrics) for task, metrics in value.items()]
        elif value:
            tasks.append((name, value))
    return tasks


def _cells(metrics: Mapping[str, float], key: str, suffixes: tuple[str, ...]) -> list[str]:
    return [_cell(metrics.get(key + suffix), key == "n") for suffix in suffixes]


def _cell(value: float | None, count: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if count else f"{value:.1f}"


def _png(_: str, metrics: Mapping[str, float]) -> tuple[str, list[list[str]]]:
    suffixes = ("", *(f"_{name}" for name in SUBSETS))
    rule = next((name for name in PROTOCOLS if metrics.get(f"protocol_{name}")), "unknown")
    rows = [["GELLA AR", *_cells(metrics, "AR", suffixes)]]
    rows += [
        [title, *_cells(metrics, f"{name}_AR", suffixes)] for name, title in _BASELINES.items()
    ]
    rows.append(["acc@0.5", _cell(metrics.get("acc@0.5"))])
    rows.append(["nouns (n)", *_cells(metrics, "n", suffixes)])
    return f"Panoptic narrative grounding, average recall, protocol {rule}", rows


def _panoptic(_: str, metrics: Mapping[str, float]) -> tuple[str, list[list[str]]]:
    suffixes = ("", "_th", "_st")
    rows = [[name, *_cells(metrics, name, suffixes)] for name in ("PQ", "SQ", "RQ")]
    rows.append(["categories (n)", *_cells(metrics, "n", suffixes)])
    return "Panoptic segmentation", rows


def _plain(title: str, names: Mapping[str, str]) -> Any:
    def section(_: str, metrics: Mapping[str, float]) -> tuple[str, list[list[str]]]:
        return title, [
            [label, _cell(metrics.get(key), key.split("_")[0] == "n")]
            for key, label in names.items()
            if key in metrics
        ]

    return section


def _other(task: str, metrics: Mapping[str, float]) -> tuple[str, list[list[str]]]:
    return task, [[key, _cell(value, key == "n")] for key, value in metrics.items()]


_SECTIONS: dict[str, Any] = {
    "png": _png,
    "panoptic_seg": _panoptic,
    "entity": _plain(
        "Entity masks before snapping, class-agnostic",
        {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "n": "entities (n)"},
    ),
    "nouns": _plain(
        "Noun extraction from generated answers",
        {"recall": "recall", "precision": "precision", "n": "nouns (n)"},
    ),
    "refer": _plain(
        "Referring expressions",
        {
            "cIoU": "cIoU",
            "gIoU": "gIoU",
            **{f"P@{t}": f"P@{t}" for t in (0.5, 0.6, 0.7, 0.8, 0.9)},
            "N_acc": "no target, none found",
            "n_no_target": "of these (n)",
            "n": "expressions (n)",
        },
    ),
}

"""Evaluation results as one JSON file and as one table."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gella.metrics import PROTOCOLS, SUBSETS

_COLUMNS = ("all", *SUBSETS)
_BASELINES = {
    "oracle": "oracle: best union of the given entities",
    "random": "blind: a random entity per noun",
    "largest": "blind: the largest entity",
    "all": "blind: all entities",
}


def write_json(path: str | Path, payload: Any) -> None:
    """Write JSON atomically, making the folder; NaN, which JSON lacks, becomes null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(payload), indent=1, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_results(results: Mapping[str, Any], path: str | Path) -> None:
    """Write ``{task: {metric: score}}`` as results.json, atomically; undefined scores are null."""
    write_json(path, results)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
            "P@0.5": "P@0.5",
            "P@0.9": "P@0.9",
            "n": "expressions (n)",
        },
    ),
}

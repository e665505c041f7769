"""Printing and checking of nested results ``{task: {metric: value}}``."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log per task one line of metric names and one of values, ready for a spreadsheet.

    Metrics with a ``-`` in the name (by convention those of single categories) are left out.
    """
    logger = logging.getLogger(__name__)
    for task, metrics in results.items():
        shown = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info(f"copypaste: Task: {task}")
        logger.info("copypaste: " + ",".join(shown))
        logger.info("copypaste: " + ",".join(f"{value:.4f}" for value in shown.values()))


def verify_results(cfg, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compare with ``cfg.TEST.EXPECTED_RESULTS``: [task, metric, expected, tolerance] each.

    Returns True if all agree or none is expected; else exits with status 1. A missing or
    non-finite metric is a failure.
    """
    logger = logging.getLogger(__name__)
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = results[task].get(metric)
        if actual is None or not math.isfinite(actual) or abs(actual - expected) > tolerance:
            logger.error(f"Result verification failed: {task}/{metric} is {actual}, not {expected}")
            sys.exit(1)
    return True


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"a": {"b": 1}}`` into ``{"a/b": 1}``, at any depth."""
    flat: dict[str, Any] = {}
    for key, value in results.items():
        inner = flatten_results_dict(value).items() if isinstance(value, Mapping) else ()
        flat.update({f"{key}/{name}": leaf for name, leaf in inner})
        if not isinstance(value, Mapping):
            flat[key] = value
    return flat

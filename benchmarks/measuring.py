"""What the modes of tools/benchmark.py share: the clock, the machine's name, and the verdicts."""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

# Of the config, behind all other options.
OPTS = {"nargs": argparse.REMAINDER, "default": [], "metavar": "KEY VALUE", "help": "of the config"}
Task = tuple[Callable[[Any], Any], Sequence[Any]]  # a function, and what it is called with


def machine(device: str = "cpu") -> str:
    """The versions and threads behind figures, in one line."""
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    system = f"{platform.machine()}, {platform.system()}, {versions}, torch {torch.__version__}"
    return f"{system} on {device}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads of torch inside; its own again afterwards, as the tests' process needs."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(
    tasks: Mapping[str, Task],
    repeat: int,
    clock: Callable[[], float] = time.thread_time,
    *,
    warm: bool = True,
    keep: int = 0,
) -> dict[str, float]:
    """Median seconds of a call of each task, over its items and ``repeat`` passes.

    The tasks, with as many items each, take turns item by item, so that a change of the machine's
    speed meets all of them.

    Args:
        tasks: by name, a function and the items it is called with.
        repeat: timed passes over all items.
        clock: processor time of this thread by default, which counts nothing else that runs.
        warm: whether a pass that is not timed goes first.
        keep: so many results stay alive, as in a batch: the allocator cannot reuse a warm page.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    kept: deque[Any] = deque(maxlen=keep)
    for turn in tqdm(range(-warm, repeat), "turns", leave=False):
        for index in range(len(next(iter(tasks.values()))[1])):
            for name, (task, items) in tasks.items():
                start = clock()
                kept.append(task(items[index]))
                taken = clock() - start
                if turn >= 0:
                    times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def judge(asked: Iterable[tuple[str, float | None, float, str]]) -> list[dict[str, Any]]:
    """What is asked of figures, and whether they met it.

    Args:
        asked: rows of name, value (None: not measured), limit, and why it can be met. A name with
            "faster" asks for its limit at least, another for its limit at most.

    Returns:
        per row a dict ``name``, ``value``, ``limit``, ``met`` (None: not measured) and ``why``.
    """
    rules = []
    for name, value, limit, why in asked:
        reached = value is not None and (value >= limit if "faster" in name else value <= limit)
        met = None if value is None else bool(reached)
        rules.append({"name": name, "value": value, "limit": limit, "met": met, "why": why})
    return rules


def with_verdicts(parts: Iterable[str], rules: Iterable[Mapping[str, Any]]) -> str:
    """The printed text: tables, then a verdict on each rule of :func:`judge`."""
    parts = list(parts)
    for rule in rules:
        sign = ">=" if "faster" in rule["name"] else "<="
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[rule["met"]]
        value = "-" if rule["value"] is None else f"{rule['value']:.2f}"
        asked = f"(asked: {sign} {rule['limit']:g}, {verdict})"
        parts.append(f"{rule['name']}: {value} {asked}\n    because: {rule['why']}")
    return "\n\n".join(parts)

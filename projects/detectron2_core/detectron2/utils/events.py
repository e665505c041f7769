"""Metrics of a training run: the storage and the writers that read it."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections import defaultdict
from functools import cached_property
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from fvcore.common.history_buffer import HistoryBuffer

_ACTIVE: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """Return the innermost storage whose context is open; ``AssertionError`` if there is none."""
    if not _ACTIVE:
        raise AssertionError("get_event_storage() works only inside 'with EventStorage(...)'")
    return _ACTIVE[-1]


def has_event_storage() -> bool:
    """Whether an ``EventStorage`` context is open."""
    return bool(_ACTIVE)


class EventStorage:
    """Scalars by name, each with the iteration it was put at; use it as a context manager.

    ``iter``: the present iteration, which a trainer keeps equal to its own.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = {}
        self._smooth: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Add a value; ``smoothing_hint`` (fixed per name) says whether writers may smooth it."""
        if self._smooth.setdefault(name, smoothing_hint) != smoothing_hint:
            raise AssertionError(f"scalar '{name}' was put with another smoothing_hint before")
        at = self.iter if cur_iter is None else cur_iter
        self._history.setdefault(name, HistoryBuffer()).update(float(value), at)
        self._latest[name] = (float(value), at)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float
    ) -> None:
        """Add several values."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint, cur_iter)

    def history(self, name: str) -> HistoryBuffer:
        """Return all values of a name; ``KeyError`` if there are none."""
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return the histories of all names."""
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return the last value of every name and the iteration it was put at."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Like ``latest``, but medians over ``window_size`` iterations where smoothing is due."""
        latest = dict(self._latest)
        for name in filter(self._smooth.get, latest):
            median = self._history[name].median(self.count_samples(name, window_size))
            latest[name] = (median, latest[name][1])
        return latest

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Count the values that were put in the last ``window_size`` iterations of the name."""
        iterations = [at for _, at in self._history[name].values()]
        return sum(at > iterations[-1] - window_size for at in iterations)

    def __enter__(self) -> EventStorage:  # noqa: PYI034 (Self is new in Python 3.11)
        _ACTIVE.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _ACTIVE.remove(self)


class EventWriter:
    """Interface of what reads the current ``EventStorage`` from time to time."""

    _window_size = 20  # iterations over which scalars are smoothed, if they may be
    _last_write = -1

    def write(self) -> None:
        """Write what is new."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files."""

    def _new_scalars(self) -> list[tuple[str, float, int]]:
        """Name, value and iteration of the scalars put after the last call's newest."""
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = [(name, value, at) for name, (value, at) in latest.items() if at > self._last_write]
        self._last_write = max([self._last_write, *(at for _, _, at in new)])
        return new


class JSONWriter(EventWriter):
    """Appends to a file one JSON object per iteration that has new scalars (keys sorted)."""

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._file = PathManager.open(json_file, "a")
        self._window_size = window_size

    def write(self) -> None:
        """Write new scalars, and make sure that they are on the disk."""
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, value, at in self._new_scalars():
            rows[at].update({name: value, "iteration": at})
        self._file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows.values())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorboardXWriter(EventWriter):
    """Writes all scalars to a TensorBoard folder, opened at the first write."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        self._window_size = window_size
        self._writer_args = {"log_dir": log_dir, **kwargs}

    @cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(**self._writer_args)

    def write(self) -> None:
        """Write new scalars."""
        for name, value, at in self._new_scalars():
            self._writer.add_scalar(name, value, at)

    def close(self) -> None:
        """Close the folder if it was opened."""
        if "_writer" in self.__dict__:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with time left, iteration, losses, times, learning rate and GPU memory.

    ``max_iter``: needed for the time left. Losses are medians over ``window_size`` iterations.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        self._max_iter, self._window_size = max_iter, window_size

    def write(self) -> None:
        """Log the line; nothing once the training has ended."""
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return
        histories, fields = storage.histories(), [f"iter: {storage.iter}"]
        if self._max_iter is not None and "time" in histories:
            seconds = histories["time"].median(1000) * (self._max_iter - storage.iter - 1)
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            fields.insert(0, f"eta: {datetime.timedelta(seconds=int(seconds))}")
        for name, values in histories.items():
            if "loss" in name or "[metric]" in name:
                count = storage.count_samples(name, self._window_size)
                fields.append(f"{name}: {values.median(count):.4g}")
        for name in ("time", "data_time"):
            if name in histories:
                mean, last = histories[name].global_avg(), histories[name].latest()
                fields.append(f"{name}: {mean:.4f}  last_{name}: {last:.4f}")
        fields.append(f"lr: {histories['lr'].latest():.5g}" if "lr" in histories else "lr: N/A")
        if torch.cuda.is_available():
            fields.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        logging.getLogger(__name__).info(" " + "  ".join(fields))

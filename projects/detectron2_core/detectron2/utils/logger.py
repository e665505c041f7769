"""Logging to the console (rank 0) and to files (all ranks), and rate-limited messages."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time

from detectron2.utils.file_io import PathManager
from termcolor import colored

_LAST_TIME: dict[tuple, float] = {}


@functools.lru_cache
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
) -> logging.Logger:
    """Set up the logger ``name`` at DEBUG level and return it; a repeated call adds nothing.

    ``output``: a file that ends in .txt or .log, or a folder that gets ``log.txt``; ranks above
    0 append ``.rankN`` and print nothing. Names are never abbreviated (``abbrev_name``).
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    if distributed_rank == 0:
        head = "[%(asctime)s %(name)s]:"
        head = (colored(head, "green") if color else head) + " %(levelname)s %(message)s"
        _add_handler(logger, sys.stdout, head)
    if output is not None:
        path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        path += f".rank{distributed_rank}" if distributed_rank > 0 else ""
        PathManager.mkdirs(os.path.dirname(path))
        plain = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        _add_handler(logger, _open_log(path), plain)
    return logger


def _add_handler(logger: logging.Logger, stream, form: str) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(form, "%m/%d %H:%M:%S"))
    logger.addHandler(handler)


@functools.cache
def _open_log(path: str):
    """One stream per file, so that several loggers may write to the same file."""
    return PathManager.open(path, "a")


def log_every_n_seconds(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log unless the same line of code logged less than ``n`` seconds ago."""
    frame = sys._getframe(1)
    place = (frame.f_code.co_filename, frame.f_lineno)
    if time.time() - _LAST_TIME.get(place, 0.0) >= n:
        _LAST_TIME[place] = time.time()
        logging.getLogger(name or frame.f_globals["__name__"]).log(lvl, msg)

"""Checkpoints as folders: one per iteration, whole or not there, the newest whole one chosen.

``FOLDER/iter_0000399/`` holds what belongs to iteration 399 (counted from 0) and, written last,
``state.json``, which lists every file with its size. A folder is filled under a temporary name that
starts with a dot, brought to the disk and renamed: a kill at any moment leaves the old folders and
at most one temporary one, which nobody picks up and the next save removes. It is deleted the same
way backwards. On several machines ``FOLDER`` must be shared by all of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "STATE_FILE",
    "CheckpointStore",
    "FoundCheckpoint",
    "is_checkpoint",
    "read_state",
    "why_incomplete",
]

STATE_FILE = "state.json"
FORMAT = 1
"""Version of ``state.json``; one that is not known here is refused."""

_NAME = re.compile(r"iter_(\d{7,})")
_LEFT_OVER = re.compile(r"\.iter_\d{7,}\.(tmp|old)")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint of a store: its folder, iteration, and place in the order of saving."""

    path: Path
    iteration: int
    sequence: int


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a folder that holds a checkpoint, complete or not."""
    path = Path(path)
    return path.is_dir() and bool((path / STATE_FILE).is_file() or _NAME.fullmatch(path.name))


def read_state(path: str | Path) -> dict[str, Any]:
    """What ``state.json`` of a complete checkpoint says.

    Raises:
        ValueError: the checkpoint is not complete; names the file.
    """
    reason = why_incomplete(path)
    if reason:
        raise ValueError(
            f"checkpoint {path} is not complete: {reason}. Restore the file or take another"
            " checkpoint"
        )
    return json.loads((Path(path) / STATE_FILE).read_text(encoding="utf-8"))


def why_incomplete(path: str | Path) -> str:
    """Why a folder is no complete checkpoint, in a few words that name the file; "" if it is."""
    path = Path(path)
    if _LEFT_OVER.fullmatch(path.name):
        return "its writing or deletion was cut short (temporary name)"
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        version, files = state["format"], dict(state["files"])
        int(state["iteration"]), int(state["sequence"])
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} cannot be read ({type(error).__name__}: {error})"
    if version != FORMAT:
        return f"{STATE_FILE} has format {version}, known here is {FORMAT}"
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes, {size:,} were written"
    return ""


class CheckpointStore:
    """The checkpoints of one run. All methods that write belong to the main process alone."""

    def __init__(self, folder: str | Path, *, keep: int = 0, keep_every: int = 0) -> None:
        """Args:
            folder: made by the first save.
            keep: complete checkpoints to keep, newest first; 0 keeps all.
            keep_every: of those that are due to go, keep the ones after every so many iterations;
                0 keeps none of them.

        Raises:
            ValueError: a negative number.
        """
        if keep < 0 or keep_every < 0:
            raise ValueError(
                f"SOLVER.CHECKPOINT_KEEP is {keep} and SOLVER.CHECKPOINT_KEEP_EVERY {keep_every}:"
                " neither may be negative"
            )
        self.folder = Path(folder)
        self._keep, self._keep_every = keep, keep_every

    def path(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration is, once it is whole."""
        return self.folder / f"iter_{iteration:07d}"

    def being_written(self, iteration: int) -> Path:
        """Where the files of a checkpoint are written between :meth:`begin` and `finish`."""
        return self.folder / f".iter_{iteration:07d}.tmp"

    def found(self) -> tuple[list[FoundCheckpoint], dict[str, str]]:
        """Complete checkpoints, newest first, and the others: {name: why they do not count}.

        Newest is what was saved last, not what has the highest iteration: a run may have begun anew
        in the folder of a longer one.
        """
        complete, others = [], {}
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if not _NAME.fullmatch(path.name) and not _LEFT_OVER.fullmatch(path.name):
                continue
            reason = why_incomplete(path)
            if reason:
                others[path.name] = reason
                continue
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            complete.append(FoundCheckpoint(path, state["iteration"], state["sequence"]))
        return sorted(complete, key=lambda item: item.sequence, reverse=True), others

    def newest(self) -> FoundCheckpoint | None:
        """The complete checkpoint that was saved last, None in a run that has saved none.

        What is passed over is logged with the reason.

        Raises:
            ValueError: there are checkpoints, and none is complete. To start anew would hide that.
        """
        complete, others = self.found()
        chosen = complete[0] if complete else None
        for name, reason in others.items():
            _logger.warning("checkpoint %s is passed over: %s", self.folder / name, reason)
        finished = {name: why for name, why in others.items() if _NAME.fullmatch(name)}
        if chosen is None and finished:
            name, reason = max(finished.items())
            raise ValueError(
                f"none of the {len(finished)} checkpoint(s) in {self.folder} is complete; {name}:"
                f" {reason}. Restore the file, or remove the folder to start anew"
            )
        return chosen

    def begin(self, iteration: int) -> Path:
        """Remove what earlier saves left over, and make the folder to be filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path)
        path = self.being_written(iteration)
        path.mkdir()
        return path

    def finish(self, iteration: int, facts: Mapping[str, Any]) -> Path:
        """Make what was written the checkpoint of an iteration, then delete what need not be kept.

        All processes must have written their files.

        Args:
            iteration: as in :meth:`begin`.
            facts: further entries of ``state.json``; plain JSON values.

        Returns:
            the checkpoint's folder.
        """
        path, final = self.being_written(iteration), self.path(iteration)
        files = [p for p in sorted(path.rglob("*")) if p.is_file()]
        complete, _ = self.found()
        state = {
            "format": FORMAT,
            "iteration": iteration,
            "sequence": max((item.sequence for item in complete), default=0) + 1,
            **facts,
            "files": {p.relative_to(path).as_posix(): p.stat().st_size for p in files},
        }
        text = json.dumps(state, indent=1, allow_nan=False) + "\n"
        (path / STATE_FILE).write_text(text, encoding="utf-8")
        folders = [p for p in path.rglob("*") if p.is_dir()]
        # The name must not reach the disk before the content.
        for item in (*files, path / STATE_FILE, *folders, path):
            _to_disk(item)
        if final.exists():  # of a run before this one, or damaged
            os.replace(final, self._being_deleted(final))
        os.replace(path, final)
        _to_disk(self.folder)
        self.prune()
        return final

    def prune(self) -> None:
        """Delete the checkpoints that need not be kept; incomplete ones are left to the user."""
        if not self._keep:
            complete = []
        else:
            complete = self.found()[0][self._keep :]
        for item in complete:
            if not (self._keep_every and (item.iteration + 1) % self._keep_every == 0):
                os.replace(item.path, self._being_deleted(item.path))
        for path in self.folder.glob(".iter_*.old"):
            shutil.rmtree(path)

    def _being_deleted(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.old")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

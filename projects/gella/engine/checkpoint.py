"""Folders of checkpoints: one per iteration, whole or not there, the newest whole one chosen.

What is in such a folder, and its reading: `gella.weights.checkpoint`. It is filled under a
temporary name that starts with a dot, brought to the disk and renamed: a kill at any moment leaves
the old folders and at most one temporary one, which nobody picks up and the next save removes. It
is deleted the same way backwards. On several machines ``FOLDER`` must be shared by all of them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gella.utils.io import to_disk
from gella.weights.checkpoint import FOLDER_NAME, FORMAT, LEFT_OVER, STATE_FILE, why_incomplete

FOLDER = "checkpoints"
"""Below the output folder, for the checkpoints to resume from."""

_logger = logging.getLogger(__name__)


class FoundCheckpoint(NamedTuple):
    """A complete checkpoint of a store: its folder, iteration, and place in the order of saving."""

    path: Path
    iteration: int
    sequence: int


class CheckpointStore:
    """The checkpoints of one run. All methods that write belong to the main process alone."""

    def __init__(self, folder: str | Path, *, keep: int = 0, keep_every: int = 0) -> None:
        """Args:
        folder: made by the first save.
        keep: complete checkpoints to keep, newest first; 0 keeps all.
        keep_every: of those that are due to go, keep the ones after every so many iterations;
            0 keeps none of them. ValueError for a negative number.
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
            if not FOLDER_NAME.fullmatch(path.name) and not LEFT_OVER.fullmatch(path.name):
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
        finished = {name: why for name, why in others.items() if FOLDER_NAME.fullmatch(name)}
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
            if LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path)
        path = self.being_written(iteration)
        path.mkdir()
        return path

    def finish(self, iteration: int, facts: Mapping[str, Any]) -> Path:
        """Make what was written the checkpoint of an iteration, then delete what need not be kept.

        All processes must have written their files. ``facts`` are further entries of
        ``state.json``, plain JSON values. Returns the checkpoint's folder.
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
            to_disk(item)
        if final.exists():  # of a run before this one, or damaged
            os.replace(final, self._being_deleted(final))
        os.replace(path, final)
        to_disk(self.folder)
        # Incomplete ones are left to the user.
        for old in self.found()[0][self._keep :] if self._keep else []:
            if not (self._keep_every and (old.iteration + 1) % self._keep_every == 0):
                os.replace(old.path, self._being_deleted(old.path))
        for path in self.folder.glob(".iter_*.old"):
            shutil.rmtree(path)
        return final

    def _being_deleted(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.old")

"""JSON lines that only grow, held by one process and safe against a kill at any moment.

What a run has paid for is on the disk before it goes on: a line is there, whole, when
:meth:`Journal.append` returns, and the next run opens the file and does what is missing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

_logger = logging.getLogger(__name__)
_FIRST = "image_id"  # field of every entry that stands first: half a line of ours is known by it
_SETTINGS = "made_by"  # the only field of the first line, in a journal of settings


class Journal:
    """One file of entries by key; a context manager that holds it for one process.

    Args:
        path: file to continue or create; its folder is made. What a kill left of a last line is
            cut off, with a warning.
        note: makes ``(key, what to remember)`` of an entry, KeyError or ValueError for what is
            none. Keys are compared as text, as are ids in COCO's files: 7 and "7" are one.
        settings: how entries are made, JSON values; they are the first line of the file, and a
            journal of others is refused. None: the file holds entries only.
        advice: what to do about a damaged line.
        reader: leave the file, which has to exist, as it is; others may read it at the same time,
            nobody may write. "wait" waits for the writer's end, "now" refuses a held file.

    Attributes:
        entries: what is remembered, by key, in the order of the file.

    Raises:
        ValueError: another process holds the file, a line before the last is damaged, the settings
            differ, or the name is that of a folder; says which and what to do.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        note: Callable[[Any], tuple[Hashable, Any]],
        *,
        settings: Mapping[str, Any] | None = None,
        advice: str = "repair or remove it",
        reader: Literal["", "now", "wait"] = "",
    ) -> None:
        self.path = Path(path)
        self.entries: dict[Hashable, Any] = {}
        self._note, self._advice, self._reader = note, advice, reader
        names = [_FIRST] if settings is None else [_FIRST, _SETTINGS]
        self._starts = [f'{{"{name}"'.encode() for name in names]
        # As they will be read again: tuples are lists, keys are texts.
        self._settings = None if settings is None else json.loads(json.dumps(settings))
        self._places: dict[Hashable, int] = {}
        if self.path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDONLY if reader else os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._handle = os.open(self.path, flags, 0o644)
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, which takes the place of one with its key; it is on the disk afterwards.

        Raises OSError when nothing more can be written (full disk): the file stays without it.
        """
        if self._settings is not None and os.fstat(self._handle).st_size == 0:
            self._write({_SETTINGS: self._settings})
        place = self._write({_FIRST: entry[_FIRST], **entry})
        key, remembered = self._note(entry)
        self.entries[key], self._places[key] = remembered, place

    def read(self, key: Hashable) -> Any:
        """The whole entry of a key, from the disk."""
        with open(self.path, "rb") as file:
            file.seek(self._places[key])
            return json.loads(file.readline())

    def remove(self) -> None:
        """Delete the file: what it was for is complete, or it holds nothing."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            import fcntl

            kind = fcntl.LOCK_SH if self._reader else fcntl.LOCK_EX
            fcntl.flock(self._handle, kind | (0 if self._reader == "wait" else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is being written by another process; wait for it, or name another "
                "output"
            ) from None
        except (ImportError, OSError) as error:  # systems, and network file systems, without locks
            _logger.warning("%s cannot be locked (%s); run only one process", self.path, error)

    def _write(self, value: Mapping[str, Any]) -> int:
        line = json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
        place = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, place)
            raise
        return place

    def _read(self) -> None:
        place = repeated = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if self._is_half(line):
                    if self._reader:
                        break
                    os.ftruncate(self._handle, place)
                    os.fsync(self._handle)
                    _logger.warning("%s: removed a half-written last line", self.path)
                    break
                if line.strip():
                    repeated += self._take(line, number, place)
                if not (self._reader or line.endswith(b"\n")):  # whole, after an edit by hand
                    os.write(self._handle, b"\n")
                place += len(line)
        if repeated:
            _logger.warning("%s: %d entries stand there more than once", self.path, repeated)

    def _take(self, line: bytes, number: int, place: int) -> bool:
        """Note a line of the file; returns whether its key was there before."""
        of_settings = number == 1 and self._settings is not None
        try:
            value = json.loads(line)
            key, remembered = (None, None) if of_settings else self._note(value)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            kind = "no JSON: " if isinstance(error, json.JSONDecodeError) else ""
            kind = "it lacks " if isinstance(error, KeyError) else kind
            raise ValueError(
                f"{self.path}: line {number} is damaged ({kind}{error}); {self._advice}"
            ) from None
        if of_settings:
            if value != {_SETTINGS: self._settings}:
                raise ValueError(
                    f"{self.path} was begun with other settings: {json.dumps(value)[:2000]}, now "
                    f"{json.dumps(self._settings)}; use the same, or delete it to start anew"
                )
            return False
        before = key in self.entries
        self.entries[key], self._places[key] = remembered, place
        return before

    def _is_half(self, line: bytes) -> bool:
        """Whether a line is what a kill or a power failure left of one of ours.

        Half an object is never JSON. A line that begins otherwise is somebody else's: not ours to
        cut.
        """
        if line.endswith(b"\n"):
            return False
        if not line.strip(b"\0"):
            return True
        if not any(line.startswith(start[: len(line)]) for start in self._starts):
            return False
        try:
            json.loads(line)
        except ValueError:
            return True
        return False

"""The file of captions: JSON lines that only grow, safe against a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["CaptionFile"]

_logger = logging.getLogger(__name__)
_FIELDS: dict[str, Any] = {
    "image_id": (int, str),
    "file_name": str,
    "description": str,
    "nouns": list,
    "model": str,
    "prompt_id": (str, int),
}
_START = b'{"image_id"'  # of every line written here


class CaptionFile:
    """Captions on disk, one JSON object a line (docs/FORMATS.md 4); opens to continue the file.

    A line is on the disk when :meth:`append` returns. What a kill left of a last line is removed on
    opening. One process at a time may hold the file.

    Args:
        path: file to continue or create; its folder is made.

    Raises:
        ValueError: another process holds the file, or a line before the last is damaged, or its
            name is that of a folder; the message gives the file and the line.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"{path} is a folder; name a file such as captions.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._done: dict[tuple[str, str], dict[str, Any]] = {}
            self._read()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> CaptionFile:
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file and give up the lock."""
        os.close(self._handle)

    def __len__(self) -> int:
        """How many captions there are."""
        return len(self._done)

    def __contains__(self, key: tuple[int | str, str]) -> bool:
        """Whether there is a caption for (image_id, prompt_id); 7 and "7" are one id."""
        return (str(key[0]), str(key[1])) in self._done

    def file_name(self, image_id: int | str, prompt_id: str) -> str | None:
        """Name of the picture that a caption was made of; None if there is none."""
        record = self._done.get((str(image_id), str(prompt_id)))
        return None if record is None else record["file_name"]

    def models(self) -> list[str]:
        """Names of the models that wrote captions, each once."""
        return sorted({str(record["model"]) for record in self._done.values()})

    def append(self, record: dict[str, Any]) -> None:
        """Add one caption and wait until it is on the disk.

        Raises:
            ValueError: there is one for this image and prompt already.
            OSError: nothing more can be written (full disk); the file is left without the line.
        """
        key = (str(record["image_id"]), str(record["prompt_id"]))
        if key in self._done:
            raise ValueError(f"{self.path}: image {key[0]}, prompt {key[1]} is there already")
        ordered = {name: record[name] for name in _FIELDS}
        line = json.dumps(ordered, ensure_ascii=False).encode("utf-8") + b"\n"
        size = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, size)
            raise
        self._done[key] = _remembered(record)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is being written by another process; wait for it, or name another "
                "file"
            ) from None
        except OSError as error:  # file systems without locks, such as some network ones
            _logger.warning("%s cannot be locked (%s); run only one process", self.path, error)

    def _read(self) -> None:
        size = os.fstat(self._handle).st_size
        with open(self.path, "rb") as file:
            content = file.read()
        *lines, tail = content.split(b"\n")
        repeated = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                repeated += self._remember(line, number)
        if repeated:
            _logger.warning("%s: %d captions stand there more than once", self.path, repeated)
        if not tail:
            return
        if _half_written(tail):
            os.ftruncate(self._handle, size - len(tail))
            os.fsync(self._handle)
            _logger.warning("%s: removed a half-written last line", self.path)
        else:  # whole but for its end, after an edit by hand; or no file of captions at all
            self._remember(tail, len(lines) + 1)
            os.write(self._handle, b"\n")

    def _remember(self, line: bytes, number: int) -> bool:
        """Note a line of the file; returns whether its caption was there before."""
        where = f"{self.path}: line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}); repair or remove it") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no object; is it a file of captions?")
        for name, kind in _FIELDS.items():
            if not isinstance(record.get(name), kind):
                raise ValueError(f"{where} has no proper field '{name}'; is it a file of captions?")
        key = (str(record["image_id"]), str(record["prompt_id"]))
        before = key in self._done
        self._done[key] = _remembered(record)
        return before


def _half_written(tail: bytes) -> bool:
    """Whether a last line is what a kill or a power failure left of one of ours.

    Half an object is never JSON. A line that begins otherwise is somebody else's: not ours to cut.
    """
    if not tail.strip(b"\0"):
        return True
    if not tail.startswith(_START[: len(tail)]):
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def _remembered(record: dict[str, Any]) -> dict[str, Any]:
    return {"file_name": record["file_name"], "model": record["model"]}

"""Masks of many images written one image at a time, so that a killed run loses one at most.

``OUTPUT.journal`` is a file of JSON lines: first how the masks are made, then one line per image,
on disk before the next image begins. The output itself is written from it, whole, at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gella.entities.entity_map import EntityMap
from gella.utils.io import write_atomically


@dataclass(frozen=True)
class PictureJob:
    """One picture to segment.

    Attributes:
        image_id: its id in the output.
        path: its file.
        upright: turn it by its EXIF orientation.
        size: (height, width) that it has to have, if known.
    """

    image_id: int | str
    path: Path
    upright: bool = False
    size: tuple[int, int] | None = None


class MaskJournal:
    """The journal of one output file; a context manager that holds it for one process.

    Args:
        output: COCO results JSON to write in the end.
        made_by: how masks are made, JSON values; a journal of another way is refused.

    Raises:
        ValueError: another process is at work on it, the output exists already, or the journal is
            damaged or was made another way; the message says what to do.
    """

    def __init__(self, output: Path, made_by: Mapping[str, Any]) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".journal")
        self._made_by = json.loads(json.dumps(made_by))  # as it will be read again
        # (place of the line, bytes of the picture, entities) by image id as text
        self._index: dict[str, tuple[int, int, int]] = {}
        if output.is_dir():
            raise ValueError(f"output {output} is a folder; name a file")
        if output.exists() and not self.path.exists():
            raise ValueError(
                f"{output} exists already and is complete; delete it or choose another --output"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> MaskJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._index:
            self.path.unlink(missing_ok=True)  # nothing is lost, and other settings may follow
        self._file.close()

    def has(self, job: PictureJob) -> bool:
        """Whether a picture is done, and is still of as many bytes as it was then."""
        entry = self._index.get(str(job.image_id))
        return entry is not None and job.path.is_file() and job.path.stat().st_size == entry[1]

    def counts(self, jobs: Sequence[PictureJob]) -> dict[int | str, int]:
        """Entities by image id, of those jobs that are done."""
        return {job.image_id: self._index[str(job.image_id)][2] for job in jobs if self.has(job)}

    def add(self, job: PictureJob, entities: EntityMap) -> None:
        """Keep the entities of a picture; they are on disk when this returns."""
        results = [
            {
                "image_id": job.image_id,
                "category_id": 1,  # class-agnostic
                "segmentation": code,
                "score": round(float(score), 6),
            }
            for code, score in zip(entities.to_rle(), entities.scores)
        ]
        if self._file.seek(0, os.SEEK_END) == 0:
            self._append({"made_by": self._made_by})
        size = job.path.stat().st_size
        place = self._append({"image_id": job.image_id, "bytes": size, "results": results})
        self._index[str(job.image_id)] = (place, size, len(results))

    def write_output(self, jobs: Sequence[PictureJob]) -> None:
        """Write the results of the jobs that are done, in the order of the jobs."""
        done = [job for job in jobs if self.has(job)]

        def write(stream: IO[bytes]) -> None:
            separator = b"[\n"
            for job in done:
                for result in self._results(job):
                    stream.write(separator + json.dumps(result).encode())
                    separator = b",\n"
            stream.write(b"\n]\n" if separator == b",\n" else b"[]\n")

        write_atomically(str(self.output), write)

    def remove(self) -> None:
        """Delete the journal: the output is complete."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is writing {self.output}; wait for it or choose another --output"
            ) from error

    def _append(self, value: Mapping[str, Any]) -> int:
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return place

    def _read(self) -> None:
        end = 0
        for number, (place, line) in enumerate(self._lines(), start=1):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
                if number > 1 and value is not None:
                    entry = (place, int(value["bytes"]), len(value["results"]))
                    self._index[str(value["image_id"])] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is damaged ({error}); delete this file to start "
                    "anew"
                ) from error
            if value is None:  # half a line: the run was killed while it wrote
                break
            if number == 1 and value != {"made_by": self._made_by}:
                raise ValueError(
                    f"{self.path} was begun with other settings: {json.dumps(value)}, now "
                    f"{json.dumps(self._made_by)}; use the same, or delete it to start anew"
                )
            end = place + len(line)
        self._file.truncate(end)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        place = self._file.seek(0)
        for line in self._file:
            yield place, line
            place += len(line)

    def _results(self, job: PictureJob) -> list[dict[str, Any]]:
        self._file.seek(self._index[str(job.image_id)][0])
        return json.loads(self._file.readline())["results"]

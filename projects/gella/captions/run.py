"""Captions of many pictures at once: worker threads, one file, an end that loses no answer."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from gella.captions.captioner import (
    AnswerError,
    EndpointError,
    RequestError,
    StoppedError,
    Tally,
    describe,
    load_picture,
)
from gella.utils.io import image_key
from gella.utils.journal import Journal
from gella.utils.stopping import StopRequest

Item = TypeVar("Item")
# What fails one picture only; anything else would fail the next one, too.
OF_ONE = (AnswerError, RequestError, ValueError, OSError)
_GRACE = 2.0  # seconds that threads have for their end
_FIELDS: dict[str, Any] = {"image_id": (int, str), "file_name": str, "description": str}
_FIELDS |= {"nouns": list, "model": str, "prompt_id": (str, int)}


@dataclass(frozen=True)
class Job:
    """One prompt about one picture: its id, its name in the captions, and where it is."""

    image_id: int | str
    file_name: str
    path: Path
    prompt_id: str


def open_captions(path: str | Path) -> Journal:
    """Open a file of captions to continue it (docs/FORMATS.md 4).

    Its keys are (image_id, prompt_id) as text; it remembers (file_name, model).
    """

    def note(record: Any) -> tuple[tuple[str, str], tuple[str, str]]:
        if not isinstance(record, dict):
            raise ValueError("it is no object; is it a file of captions?")
        for name, kind in _FIELDS.items():
            if not isinstance(record.get(name), kind):
                raise ValueError(f"it has no proper field '{name}'; is it a file of captions?")
        key = (image_key(record["image_id"]), str(record["prompt_id"]))
        return key, (record["file_name"], record["model"])

    return Journal(path, note)


def in_threads(
    work: Callable[[Item], Any], items: Iterable[Item], threads: int
) -> Iterator[tuple[Item, Any]]:
    """Call ``work`` for every item in some threads; yields (item, result or exception) as they end.

    A thread whose work raised what is not ``OF_ONE`` takes no further item. They are daemons: who
    leaves the loop early waits for no server that hangs.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Item, Any] | None] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def run() -> None:
        with suppress(queue.Empty):
            while True:
                item = waiting.get_nowait()
                try:
                    results.put((item, work(item)))
                except Exception as error:
                    results.put((item, error))
                    if not isinstance(error, OF_ONE):
                        break
        results.put(None)

    started = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        while threads:
            result = results.get()
            if result is None:
                threads -= 1
            else:
                yield result
    finally:  # a model in this process that was told to stop ends at its next token
        for thread in started:
            thread.join(_GRACE / len(started))


@dataclass
class CaptionRun:
    """Writes captions of many pictures to a file; keeps what failed and why it ended.

    Attributes:
        captioner: the model; besides ``ask`` it has ``stop`` and ``abort``.
        file: where the captions go, of :func:`open_captions`.
        prompts: text by id.
        tally: gets the counts of ``describe``.
        picture: options of :func:`gella.captions.captioner.load_picture`.
        rules: options of :func:`gella.captions.captioner.describe`.
        workers: questions at once.
        max_failures: captions that fail in a row before the run ends itself.
        written: captions added to the file.
        failures: job and reason of each that could not be made.
        ended: no further caption is begun.
        status: exit status by the signal that came, 0 if none did.
    """

    captioner: Any
    file: Journal
    prompts: dict[str, str]
    tally: Tally
    picture: dict[str, Any]
    rules: dict[str, Any]
    workers: int = 4
    max_failures: int = 20
    written: int = 0
    failures: list[tuple[Job, str]] = field(default_factory=list)
    ended: bool = False
    status: int = 0

    def do(self, jobs: list[Job], done: int = 0) -> None:
        """Ask, and write what comes, until all jobs are done or the run has to stop.

        The first Ctrl-C lets the requests under way finish, for they are paid; the second cuts
        them. ``done`` jobs were done before, for the progress bar.

        Raises:
            OSError: the file cannot be written.
            EndpointError: no further question makes sense.
            KeyboardInterrupt: a second signal came.
        """
        in_a_row, fatal = 0, None
        with (
            tqdm(total=len(jobs) + done, initial=done, unit="caption") as bar,
            StopRequest(self._first, self._again) as stop,
        ):
            for job, result in in_threads(self._caption, jobs, self.workers):
                if isinstance(result, dict):
                    self.file.append(result)
                    self.written, in_a_row = self.written + 1, 0
                elif isinstance(result, OF_ONE):
                    self.failures.append((job, " ".join(str(result).split())))
                    in_a_row += 1
                elif not isinstance(result, StoppedError):
                    fatal = fatal or result
                if in_a_row >= self.max_failures and fatal is None:
                    reason = f"{in_a_row} captions in a row failed (--max-failures)"
                    fatal = EndpointError(f"{reason}; the last: {self.failures[-1][1]}")
                if fatal is not None:
                    self._end()
                bar.set_postfix(failed=len(self.failures), retries=self.tally["retries"])
                bar.update(not isinstance(result, StoppedError))
        self.status = stop.status
        if fatal is not None:
            raise fatal

    def _end(self) -> None:
        self.ended = True
        self.captioner.stop()

    def _caption(self, job: Job) -> dict[str, Any]:
        if self.ended:
            raise StoppedError("stopped")
        picture = load_picture(job.path, **self.picture)
        prompt = self.prompts[job.prompt_id]
        caption = describe(self.captioner, picture, prompt, tally=self.tally, **self.rules)
        named = {"image_id": job.image_id, "file_name": job.file_name, **vars(caption)}
        return {**named, "model": self.captioner.model, "prompt_id": job.prompt_id}

    def _first(self, number: int) -> None:
        self._end()
        message = "stopping: requests under way are finished (Ctrl-C again cuts them)"
        tqdm.write(message, file=sys.stderr)

    def _again(self, number: int) -> None:
        self.captioner.abort()
        raise KeyboardInterrupt

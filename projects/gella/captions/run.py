"""Captions of many pictures at once: worker threads, one file, an end that loses no answer."""

from __future__ import annotations

import queue
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gella.captions.captioner import (
    AnswerError,
    Caption,
    EndpointError,
    RequestError,
    StoppedError,
    Tally,
    describe,
    load_picture,
)
from gella.utils.journal import Journal
from gella.utils.stopping import StopRequest

_TICK = 0.1  # seconds between looks at the signals
_FIELDS: dict[str, Any] = {
    "image_id": (int, str),
    "file_name": str,
    "description": str,
    "nouns": list,
    "model": str,
    "prompt_id": (str, int),
}


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
        key = (str(record["image_id"]), str(record["prompt_id"]))
        return key, (record["file_name"], record["model"])

    return Journal(path, note)


class CaptionRun:
    """Writes captions of many pictures to a file; keeps what failed and why it ended.

    Args:
        captioner: the model; besides ``ask`` it has ``stop`` and ``abort``.
        file: where the captions go, of :func:`open_captions`.
        prompts: text by id.
        picture: options of :func:`gella.captions.captioner.load_picture`.
        rules: options of :func:`gella.captions.captioner.describe`.
        workers: questions at once.
        max_failures: captions that fail in a row before the run ends itself.
        tally: gets the counts of ``describe``.

    Attributes:
        written: captions added to the file.
        failures: job and reason of each that could not be made.
        fatal: the error that ended the run, None if none did.
        stop: the signals that came.
    """

    def __init__(
        self,
        captioner: Any,
        file: Journal,
        prompts: dict[str, str],
        tally: Tally,
        *,
        picture: dict[str, Any],
        rules: dict[str, Any],
        workers: int = 4,
        max_failures: int = 20,
    ) -> None:
        self.captioner, self.file, self.prompts, self.tally = captioner, file, prompts, tally
        self._picture, self._rules = picture, rules
        self._workers, self._max_failures = workers, max_failures
        self.written = self._in_a_row = self._heard = 0
        self.failures: list[tuple[Job, str]] = []
        self.fatal: Exception | None = None
        self.stop = StopRequest(again=lambda number: None)  # `_listen` sees what came
        self._ended = threading.Event()

    def do(self, jobs: list[Job], done: int = 0) -> None:
        """Ask, and write what comes, until all jobs are done or the run has to stop.

        The first Ctrl-C lets the requests under way finish, for they are paid; the second cuts
        them. ``done`` jobs were done before, for the progress bar. Raises OSError when the file
        cannot be written.
        """
        results: queue.Queue[tuple[Job, Caption | Exception] | None] = queue.Queue()
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        # Daemons: a process that was told twice to end does not wait for a hanging model.
        for _ in range(self._workers):
            threading.Thread(target=self._work, args=(waiting, results), daemon=True).start()
        running, shown = self._workers, (0, 0)
        with tqdm(total=len(jobs) + done, initial=done, unit="caption") as bar, self.stop:
            try:
                while running:
                    self._listen()
                    counts = (len(self.failures), self.tally["retries"])
                    if counts != shown:  # a run that only waits shall not look dead
                        bar.set_postfix(failed=counts[0], retries=counts[1])
                        shown = counts
                    try:
                        result = results.get(timeout=_TICK)
                    except queue.Empty:
                        continue
                    if result is None:
                        running -= 1
                    else:
                        self._take(*result)
                        bar.update()
            except BaseException:
                self._end(None)
                raise

    def _work(self, waiting: Any, results: Any) -> None:
        """One thread: make captions until there is no job, or no further one makes sense."""
        try:
            while not self._ended.is_set():
                job = waiting.get_nowait()
                try:
                    picture = load_picture(job.path, **self._picture)
                    prompt = self.prompts[job.prompt_id]
                    options = {"tally": self.tally, **self._rules}
                    results.put((job, describe(self.captioner, picture, prompt, **options)))
                except (AnswerError, RequestError, ValueError, OSError) as error:
                    results.put((job, error))
                except StoppedError:
                    break
                except Exception as error:  # of every question, not of this one
                    self.fatal = self.fatal or error
                    break
        except queue.Empty:
            pass
        results.put(None)

    def _take(self, job: Job, result: Caption | Exception) -> None:
        if isinstance(result, Caption):
            self.file.append(
                {
                    "image_id": job.image_id,
                    "file_name": job.file_name,
                    "description": result.description,
                    "nouns": result.nouns,
                    "model": self.captioner.model,
                    "prompt_id": job.prompt_id,
                }
            )
            self.written += 1
            self._in_a_row = 0
            return
        self.failures.append((job, " ".join(str(result).split())))
        self._in_a_row += 1
        if self._in_a_row >= self._max_failures:
            reason = f"{self._in_a_row} captions in a row failed (--max-failures)"
            self._end(EndpointError(f"{reason}; the last: {self.failures[-1][1]}"))

    def _end(self, reason: Exception | None) -> None:
        self.fatal = self.fatal or reason
        self._ended.set()
        self.captioner.stop()

    def _listen(self) -> None:
        if self.fatal is not None and not self._ended.is_set():
            self._end(self.fatal)
        if self.stop.count == self._heard:
            return
        self._heard = self.stop.count
        self._end(None)
        if self._heard == 1:
            message = "stopping: requests under way are finished (Ctrl-C again cuts them)"
            tqdm.write(message, file=sys.stderr)
        else:
            self.captioner.abort()

"""Captions of many pictures at once: worker threads, one writer, an end that loses no answer."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
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
    token_cost,
)
from gella.captions.file import CaptionFile
from gella.utils.stopping import StopRequest

__all__ = ["CaptionRun", "Job", "Outcome", "Source", "run_jobs"]

_TICK = 0.1  # seconds between looks at the signals


@dataclass(frozen=True)
class Source:
    """A picture to describe: its id, its name in the captions, and where it is."""

    image_id: int | str
    file_name: str
    path: Path


@dataclass(frozen=True)
class Job:
    """One prompt about one picture."""

    source: Source
    prompt_id: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a caption, or the error; ``fatal`` if no further job makes sense."""

    job: Job
    caption: Caption | None
    error: Exception | None = None
    fatal: bool = False


def run_jobs(
    jobs: Iterable[Job],
    work: Callable[[Job], Caption],
    *,
    workers: int,
    stop: threading.Event,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Outcome]:
    """Do jobs in threads and yield their outcomes as they come, in the caller's thread.

    Args:
        jobs: taken one by one, each when a thread is free.
        work: makes the caption; called from several threads. AnswerError, RequestError, ValueError
            and OSError fail the job, StoppedError leaves it undone, everything else is fatal.
        workers: number of threads.
        stop: once set, no job is begun; those under way are finished and yielded.
        tick: called ten times a second while waiting.
    """
    results: queue.Queue[Outcome | None] = queue.Queue()
    iterator, lock = iter(jobs), threading.Lock()

    def loop() -> None:
        while not stop.is_set():
            with lock:
                job = next(iterator, None)
            if job is None:
                break
            try:
                results.put(Outcome(job, work(job)))
            except StoppedError:
                break
            except (AnswerError, RequestError, ValueError, OSError) as error:
                results.put(Outcome(job, None, error))
            except Exception as error:  # reaches the caller, who stops the others
                results.put(Outcome(job, None, error, fatal=True))
                break
        results.put(None)

    # Daemons: a process that was told twice to end does not wait for a hanging model.
    threads = [threading.Thread(target=loop, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        tick()
        try:
            outcome = results.get(timeout=_TICK)
        except queue.Empty:
            continue
        if outcome is None:
            running -= 1
        else:
            yield outcome


class CaptionRun:
    """Writes captions of many pictures to a file; keeps what failed and why it ended.

    Args:
        captioner: the model; besides ``ask`` it has ``stop`` and ``abort``.
        file: where the captions go.
        prompts: text by id.
        mode, attempts, min_found: as :func:`gella.captions.captioner.describe`.
        workers: questions at once.
        max_failures: captions that fail in a row before the run ends itself.
        max_side, upright: as :func:`gella.captions.captioner.load_picture`.
        tally: gets the counts of ``describe``.

    Attributes:
        written: captions added to the file.
        failures: job and reason of each that could not be made.
        fatal: the error that ended the run, None if none did.
    """

    def __init__(
        self,
        captioner: Any,
        file: CaptionFile,
        prompts: dict[str, str],
        *,
        mode: str = "json",
        workers: int = 4,
        attempts: int = 3,
        min_found: float = 0.8,
        max_failures: int = 20,
        max_side: int = 1024,
        upright: bool = False,
        tally: Tally | None = None,
    ) -> None:
        self.captioner, self.file, self.prompts = captioner, file, prompts
        self.tally = Tally() if tally is None else tally
        self._workers, self._max_failures = workers, max_failures
        self._picture: dict[str, Any] = {"max_side": max_side, "upright": upright}
        self._rules: dict[str, Any] = {"mode": mode, "attempts": attempts}
        self._rules["min_found"] = min_found
        self.written = self._before = 0
        self.failures: list[tuple[Job, str]] = []
        self.fatal: Exception | None = None
        self._interrupts = StopRequest(again=lambda number: None)  # see _listen
        self._stop = threading.Event()
        self._in_a_row = self._heard = 0

    @property
    def interrupted(self) -> int:
        """Number of the signal that ended the run, 0 if none did."""
        return self._interrupts.number

    def do(self, jobs: list[Job], done: int = 0) -> None:
        """Ask, and write what comes, until all jobs are done or the run has to stop.

        The first Ctrl-C lets the requests under way finish, for they are paid; the second cuts
        them.

        Args:
            jobs: what to do.
            done: how many were done before, for the progress bar.

        Raises:
            OSError: the file cannot be written.
        """
        self._before = done
        with tqdm(total=len(jobs) + done, initial=done, unit="caption") as bar, self._interrupts:
            shown = (0, 0)

            def tick() -> None:
                nonlocal shown
                self._listen()
                counts = (len(self.failures), self.tally["retries"])
                if counts != shown:  # a run that only waits shall not look dead
                    bar.set_postfix(failed=counts[0], retries=counts[1])
                    shown = counts

            try:
                for outcome in run_jobs(
                    jobs, self._work, workers=self._workers, stop=self._stop, tick=tick
                ):
                    self._take(outcome)
                    bar.update()
            except BaseException:
                self._end(None)
                raise

    def report(self, total: int, price_in: float = 0.0, price_out: float = 0.0) -> dict[str, Any]:
        """Counts, cost and failures of the run, ready for JSON.

        Args:
            total: how many captions there shall be in the end.
            price_in, price_out: of a million tokens of questions and of answers.
        """
        counts = self.tally.as_dict()
        return {
            "captions": {
                "written": self.written,
                "there_before": self._before,
                "failed": len(self.failures),
                "open": total - self._before - self.written,
            },
            "counts": counts,
            "cost": token_cost(counts, price_in, price_out),
            "prices_per_million_tokens": {"prompt": price_in, "answer": price_out},
            "failures": [
                {
                    "image_id": job.source.image_id,
                    "file_name": job.source.file_name,
                    "prompt_id": job.prompt_id,
                    "reason": reason,
                }
                for job, reason in self.failures
            ],
        }

    def _work(self, job: Job) -> Caption:
        picture = load_picture(job.source.path, **self._picture)
        return describe(
            self.captioner,
            picture,
            self.prompts[job.prompt_id],
            tally=self.tally,
            **self._rules,
        )

    def _take(self, outcome: Outcome) -> None:
        job, caption = outcome.job, outcome.caption
        if caption is not None:
            self.file.append(
                {
                    "image_id": job.source.image_id,
                    "file_name": job.source.file_name,
                    "description": caption.description,
                    "nouns": caption.nouns,
                    "model": self.captioner.model,
                    "prompt_id": job.prompt_id,
                }
            )
            self.written += 1
            self._in_a_row = 0
        elif outcome.fatal:
            self._end(outcome.error)
        else:
            self.failures.append((job, " ".join(str(outcome.error).split())))
            self._in_a_row += 1
            if self._in_a_row >= self._max_failures:
                reason = f"{self._in_a_row} captions in a row failed (--max-failures)"
                self._end(EndpointError(f"{reason}; the last: {self.failures[-1][1]}"))

    def _end(self, reason: Exception | None) -> None:
        self.fatal = self.fatal or reason
        self._stop.set()
        self.captioner.stop()

    def _listen(self) -> None:
        if self._interrupts.count == self._heard:
            return
        self._heard = self._interrupts.count
        self._end(None)
        if self._heard == 1:
            message = "stopping: requests under way are finished (Ctrl-C again cuts them)"
            tqdm.write(message, file=sys.stderr)
        else:
            self.captioner.abort()

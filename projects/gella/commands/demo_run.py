"""The demo's work: batches of jobs, what is done already, what fails, an end that loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gella.captions.ask import caption_picture
from gella.captions.captioner import AnswerError, EndpointError, RequestError, StoppedError
from gella.commands.demo_inputs import Job, plain
from gella.commands.demo_masks import MaskSource
from gella.commands.demo_output import Output, failure_section, headline, shown
from gella.commands.demo_stop import Stop
from gella.entities.entity_map import EntityMap
from gella.entities.view import read_image
from gella.predictor import GellaPredictor, Request
from gella.utils.io import file_hash

_FORM = 1  # of the output files; another number makes all of them again
_REFRESH = 10.0  # seconds between two writings of the page, at least,
_TIMES = 20  # and times what writing it took
_TALKATIVE = 5  # jobs; up to so many, results and files are printed
LISTED = 10  # failures that the screen shows


@dataclass
class Plan:
    """What is to be done with every job.

    Attributes:
        task: "ground", "refer", "panoptic", "describe" or "extract".
        masks: where entities come from.
        categories: of the task "panoptic".
        describe_first: the model writes the captions.
        captioner: another model writes them, see `gella.captions.ask`; ``origin`` names it.
        extract: the model finds the nouns, also where a dataset knows them.
        origin: where the input comes from; part of the fingerprint, and of every JSON.
        batch_size: pictures at a time.
        overwrite: do finished jobs again.
        strict: raise the first failure instead of counting it.
    """

    task: str
    masks: MaskSource
    categories: Sequence[dict[str, Any] | str] | None = None
    describe_first: bool = False
    captioner: Any = None
    extract: bool = False
    origin: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    overwrite: bool = False
    strict: bool = False


@dataclass
class Ready:
    """A job with its picture and its entities in memory."""

    job: Job
    fingerprint: str
    image: np.ndarray
    entities: EntityMap


class Run:
    """One run over jobs; keeps what it did.

    Attributes:
        done: jobs that were done now; ``skipped``: that were done before.
        failures: ``image``, ``caption`` and ``reason`` of each that failed.
    """

    def __init__(self, predictor: GellaPredictor, plan: Plan, output: Output) -> None:
        """Args: the model, what to do with it, where the results go."""
        self.predictor, self.plan, self.output = predictor, plan, output
        self.done = self.skipped = 0
        self.failures: list[dict[str, str]] = []
        self._sections: dict[str, str] = {}  # by job, in the order of the jobs
        self._next_page = time.monotonic() + _REFRESH
        self._model = model_key(predictor)
        self._last: tuple[Any, Any] = (None, None)  # picture and entities that were read last

    def do(self, jobs: Sequence[Job], stop: Stop) -> None:
        """Work on the jobs until all are done or a signal came, then write page and failures.

        Raises:
            EndpointError: the captioner cannot answer at all.
            OSError: the results cannot be written.
            ValueError: what went wrong, if the plan is strict; nothing is written then.
        """
        chatty = len(jobs) <= _TALKATIVE
        with tqdm(total=len(jobs), unit="picture", disable=len(jobs) == 1) as bar:
            try:
                for batch in self._batches(jobs, bar, stop):
                    self._do(batch, chatty)
                    bar.update(len(batch))
                    if self.failures:
                        bar.set_postfix(failed=len(self.failures))
                    if time.monotonic() >= self._next_page:
                        self.write_page(len(jobs))
            finally:
                # A hopeless run shows what it has; a strict one leaves nothing.
                if not self.plan.strict or self.done + self.skipped:
                    self.write_page(len(jobs))
                    self.output.write_failures(self.failures)

    def write_page(self, total: int) -> Path:
        """Write the page as far as it goes."""
        there = self.done + self.skipped
        weights = self.predictor.cfg.MODEL.WEIGHTS or "untrained weights"
        state = f"{there} of {total} done, {len(self.failures)} failed"
        notes = [f"Task: {self.plan.task}. Model: {weights}. Pictures and captions: {state}."]
        sections = [*self._sections.values(), failure_section(self.failures)]
        began = time.monotonic()
        path = self.output.write_page(notes, sections)
        # A page of thousands is long: refreshing it stays a small part of the time.
        took = time.monotonic() - began
        self._next_page = began + max(_REFRESH, _TIMES * took)
        return path

    def _batches(self, jobs: Sequence[Job], bar: Any, stop: Stop) -> Iterator[list[Ready]]:
        """Read the jobs that are not finished, a batch at a time."""
        batch: list[Ready] = []
        for job in jobs:
            if stop.number:
                return  # what was read, but not begun, is left for the next run
            ready = self._read(job, bar)
            if ready is None:
                bar.update()
            else:
                batch.append(ready)
            if len(batch) == self.plan.batch_size:
                yield batch
                batch = []
        if batch and not stop.number:
            yield batch

    def _read(self, job: Job, bar: Any) -> Ready | None:
        """The job, ready to be asked; None if it is finished or cannot be read."""
        self._sections[job.name] = ""
        try:
            fingerprint = self.fingerprint(job)
            html = None if self.plan.overwrite else self.output.finished(job, fingerprint)
            if html is not None:
                self._sections[job.name] = html
                self.skipped += 1
                return None
            key = (job.picture, job.masks)
            if self._last[0] != key:
                # Photographs lie on their side in the file; annotations are of the stored pixels.
                image = read_image(job.picture.path, upright=job.record is None)
                self._last = (key, (image, self.plan.masks.load(job, image)))
            return Ready(job, fingerprint, *self._last[1])
        except Exception as error:  # a segmenter may raise anything; one picture stops no others
            self._fail(job, error)
            return None

    def fingerprint(self, job: Job) -> str:
        """What a job's result follows from, as a hash; raises as `MaskSource.key`."""
        known = {
            "form": _FORM,
            "model": self._model,
            "task": self.plan.task,
            "image": file_hash(job.picture.path),
            "image_id": str(job.picture.image_id),
            "masks": self.plan.masks.key(job),
            "text": job.text,
            "nouns": job.nouns,
            "extract": self.plan.extract,
            "phrases": _phrases(job, self.plan),
            "categories": self.plan.categories,
            "describe_first": self.plan.describe_first,
            "captioner": self.plan.origin.get("captioner"),
        }
        text = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def _do(self, batch: list[Ready], chatty: bool) -> None:
        batch = self._with_captions(batch)
        for ready, result in zip(batch, self._ask(batch), strict=True):
            if isinstance(result, Exception):
                self._fail(ready.job, result)
                continue
            job = ready.job
            source = {"image": plain(job.picture.path), **self.plan.origin}
            if job.record is not None:
                source["image_id"] = job.record["image_id"]
            source["fingerprint"] = ready.fingerprint
            try:
                html, paths = self.output.write(self.plan.task, result, job, ready.image, source)
            except (ValueError, MemoryError) as error:  # not OSError: a full disk fails them all
                self._fail(job, error)
                continue
            self._sections[job.name] = html
            self.done += 1
            if chatty:
                for line in headline(self.plan.task, result):
                    tqdm.write(f"  {line}", file=sys.stdout)
                for path in paths:
                    tqdm.write(f"wrote {shown(path)}", file=sys.stdout)

    def _with_captions(self, batch: list[Ready]) -> list[Ready]:
        """The batch with texts; a job whose caption fails is left out and counted."""
        if self.plan.captioner is not None:
            workers = 4 if hasattr(self.plan.captioner, "address") else 1
            with ThreadPoolExecutor(workers) as pool:
                answers: list[Any] = list(pool.map(self._caption, batch))
        elif self.plan.describe_first:
            asked = [Request("describe", r.image, r.entities, image_id=_id(r)) for r in batch]
            answers = self.predictor.predict_many(asked, batch_size=self.plan.batch_size)
        else:
            return batch
        captioned = []
        for ready, answer in zip(batch, answers, strict=True):
            if isinstance(answer, EndpointError):
                raise answer
            if isinstance(answer, Exception):
                if not isinstance(answer, StoppedError):
                    self._fail(ready.job, answer)
                continue
            text, nouns = (answer, None) if isinstance(answer, str) else answer
            captioned.append(replace(ready, job=replace(ready.job, text=text, nouns=nouns)))
        return captioned

    def _caption(self, ready: Ready) -> tuple[str, tuple[str, ...]] | Exception:
        try:
            caption = caption_picture(self.plan.captioner, ready.image)
        except (AnswerError, RequestError, EndpointError, StoppedError, ValueError) as error:
            return error
        return caption.description, tuple(caption.nouns)

    def _ask(self, batch: list[Ready]) -> list[Any]:
        """The results of the batch, an exception for each that failed, in order."""
        requests = {
            place: Request(
                self.plan.task,
                ready.image,
                ready.entities,
                text=ready.job.text or "",
                nouns=None if self.plan.extract else ready.job.nouns,
                categories=self.plan.categories,
                image_id=_id(ready),
            )
            for place, ready in enumerate(batch)
            if _phrases(ready.job, self.plan) is None
        }
        size = self.plan.batch_size
        answers = self.predictor.predict_many(list(requests.values()), batch_size=size)
        found = dict(zip(requests, answers, strict=True))
        return [found[k] if k in found else self._by_record(batch[k]) for k in range(len(batch))]

    def _by_record(self, ready: Ready) -> Any:
        """Ground the nouns whose spans a dataset's record knows."""
        try:
            scene = self.predictor.encode(ready.image, ready.entities, image_id=_id(ready))
            phrases = _phrases(ready.job, self.plan) or []
            return self.predictor.ground_phrases(ready.job.text or "", phrases, scene=scene)
        except ValueError as error:
            return error

    def _fail(self, job: Job, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.plan.strict:
            # Whatever a segmenter or a captioner raised, it is the user's to see in one line.
            raise ValueError(reason) from error
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exception(error)
        failure = {"image": job.picture.name, "caption": job.text or "", "reason": reason}
        self.failures.append(failure)


def _id(ready: Ready) -> int | str:
    return ready.job.picture.image_id


def _phrases(job: Job, plan: Plan) -> list[dict[str, Any]] | None:
    """Nouns of a dataset's record with their places; None if other nouns are wanted."""
    written = plan.describe_first or plan.captioner is not None
    if plan.task != "ground" or plan.extract or written or job.record is None:
        return None
    return job.record["phrases"]


def model_key(predictor: GellaPredictor) -> list[str]:
    """What the model's answers follow from: its config, and which weight files these are."""
    cfg = predictor.cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = ""
    return [cfg.dump(), *_stamps(Path(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None)]


def _stamps(path: Path | None) -> Iterator[str]:
    """Size and time of every weight file; hashing gigabytes would take longer than a demo."""
    if path is None:
        return
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = os.stat(file)
            yield f"{file.name} {status.st_size} {status.st_mtime_ns}"

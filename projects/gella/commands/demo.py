"""Ground the nouns of captions in pictures' entity masks; write pictures, JSON and one HTML page.

The example scenes with the weights that come with the project:

    python tools/demo.py --input examples/shapes --captions examples/shapes/captions.jsonl

Your own picture, with masks from any segmenter (id PNG, COCO panoptic PNG, .npz, COCO JSON):

    python tools/demo.py --config-file configs/gella_tiny_shapes.yaml --weights model_final.pth \\
        --input scene.png --masks scene_masks.png --caption "A red circle lies on the sand." \\
        --nouns "A red circle,the sand" --output output/demo

A folder of pictures, masks by a live segmenter, captions by the model itself:

    python tools/demo.py --config-file CONFIG --weights PTH --input photos \\
        --segmenter sam:facebook/sam-vit-base --describe-first

Other questions: --task refer (captions are expressions), panoptic (--categories sky,grass,cow),
describe, extract. The first pictures of a registered dataset: --dataset NAME --num 3.

DIR/index.html shows all: nouns light their masks and masks their nouns. Beside it lie <name>.json,
<name>_grounding.png and <name>_colormap.png. Stop the tool as you like: the same command goes on
where it stopped. docs/DEMO.md says more. Exit code 0: all done; 1: some pictures failed (listed in
DIR/failures.json); 2 and one line "error: ...": wrong input; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from shlex import quote as shell_quote
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gella.captions import describe, load_picture, open_captioner
from gella.captions.captioner import Caption, EndpointError, StoppedError
from gella.captions.run import in_threads
from gella.commands.console import Parser, exit_status, project, shown, tools
from gella.commands.demo_inputs import (
    Job,
    Masks,
    assign,
    dataset_jobs,
    masks_beside,
    masks_from,
    output_names,
    plain,
    read_captions,
    read_categories,
    split_nouns,
)
from gella.commands.demo_records import to_correct, write_records
from gella.commands.inputs import Source, config_of, list_pictures
from gella.entities.sources import LiveSource
from gella.entities.view import encoded, read_image, read_with_entities
from gella.pictures.grounding import Grounding, PanopticResult
from gella.pictures.html import grounding_html, page, panoptic_html
from gella.predictor import TASKS, GellaPredictor, Request
from gella.segmenters.segmenter import SPECS, MaskLimits, load_segmenter
from gella.utils.io import file_hash, write_atomically
from gella.utils.stopping import StopRequest
from gella.weights.files import made_for

RELEASE = Path(__file__).resolve().parents[3] / "weights" / "gella_tiny_shapes" / "config.yaml"
TEXTS = ("--caption", "--captions", "--describe-first", "--captioner")
PAGE = "index.html"
FAILURES = "failures.json"
PARTS = "page"  # folder of what the page is made of
LISTED = 10  # failures that the screen shows
_FORM = 2  # of the output files; another number makes all of them again
_REFRESH = 10.0  # seconds between two writings of the page, at least,
_TIMES = 20  # and times what writing it took
_TALKATIVE = 5  # jobs; up to so many, results and files are printed
_SHOWN_SIDE = 1280  # pixels; pictures on the page are scaled down to this longest side
_EXACT_SIDE = 256  # pixels; up to this side they are PNG


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("model and output").add_argument
    add("--config-file", metavar="YAML", help="default: that of weights/gella_tiny_shapes")
    add("--weights", metavar="PTH", help='default: MODEL.WEIGHTS of the config; "": untrained')
    add("--device", help="cpu, cuda; default: the config's")
    add("--output", default="output/demo", metavar="DIR", help="default: output/demo")
    add("--records", metavar="DIR", help="new folder: records to correct and to train on")
    add("--overwrite", action="store_true", help="do finished pictures again")
    add("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (default 8)")
    last = "config overrides; must come last"
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help=last)
    group = parser.add_argument_group("pictures and masks")
    add, either = group.add_argument, group.add_mutually_exclusive_group(required=True).add_argument
    several = 'pictures, folders of them (searched through), patterns ("photos/*.jpg")'
    either("--input", nargs="+", metavar="PATH", help=several)
    either("--dataset", metavar="NAME", help="a registered dataset instead of --input")
    add("--num", type=int, default=3, help="with --dataset: how many pictures (default 3)")
    masks = group.add_mutually_exclusive_group().add_argument
    beside = "default: scene_masks.png beside scene.jpg"
    given = f"mask file, a folder of them by name, or one COCO JSON; {beside}"
    masks("--masks", metavar="PATH", help=given)
    masks("--segmenter", metavar="SPEC", help=f"makes the masks on the spot: {SPECS}")
    add("--masks-format", default="auto", metavar="FORMAT", help="panoptic_png, gray_png, npz, ...")
    add("--panoptic-json", metavar="JSON", help="of one PNG: COCO file that says what is crowd")
    add("--segmenter-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--min-area", type=int, default=1, metavar="PIXELS", help="of the segmenter's masks")
    add("--max-entities", type=int, metavar="N", help="the segmenter's best N of a picture")
    group = parser.add_argument_group("questions")
    add, text = group.add_argument, group.add_mutually_exclusive_group().add_argument
    nouns = group.add_mutually_exclusive_group().add_argument
    caption = "the sentence or expression, for every picture; repeatable"
    captions = "text: name<TAB>caption, or a caption per line; .jsonl: "
    captions += '{"image", "caption", "nouns", "masks"} per line; .json: a list of these, or '
    captions += "narratives of PNG"
    captioner = "an OpenAI-compatible endpoint (key: GELLA_API_KEY), or a local model of "
    captioner += "transformers, writes the captions"
    add("--task", choices=TASKS, default="ground", help="default: ground")
    text("--caption", action="append", metavar="TEXT", help=caption)
    text("--captions", metavar="FILE", help=captions)
    text("--describe-first", action="store_true", help="the model writes the captions")
    text("--captioner", metavar="URL", help=captioner)
    add("--captioner-model", metavar="NAME", help="of the endpoint; default: GELLA_API_MODEL")
    nouns("--nouns", metavar="A,B,C", help="nouns of --caption in their order")
    nouns("--extract", action="store_true", help="the model finds the nouns, given ones or not")
    alone = "no mask belongs to two nouns of a caption"
    add("--exclusive", action="store_true", default=None, help=alone)
    add("--categories", metavar="A,B,C", help='for panoptic: names, "coco", or a file of them')
    args = parser.parse_args(argv)
    if args.config_file is None:
        if not RELEASE.is_file():
            parser.error("--config-file is missing")
        args.config_file = os.path.relpath(RELEASE)
    for problem in _problems(args):
        parser.error(problem)
    return args


def _problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the command line, in words; the first is told."""
    # An empty --caption is given, too: it has an error of its own.
    values = (args.caption is not None, args.captions, args.describe_first, args.captioner)
    text = next((option for option, value in zip(TEXTS, values) if value), None)
    for name in ("masks", "segmenter", "caption", "captions", "nouns"):
        if args.dataset is not None and getattr(args, name) is not None:
            yield f"--{name} and --dataset exclude each other"
    for option in args.segmenter_option:
        if "=" not in option:
            yield f"--segmenter-option {option} is no KEY=VALUE"
    if args.records and (args.task != "ground" or args.dataset or args.segmenter):
        yield "--records goes with --task ground, --input, and masks that are files"
    if args.records and Path(args.records).exists():
        yield f"--records {args.records} exists; what is filled in there stays: name a new one"
    if args.panoptic_json is not None and args.masks is None:
        yield "--panoptic-json needs --masks, a PNG"
    for option, number in (("--num", args.num), ("--batch-size", args.batch_size)):
        if number < 1:
            yield f"{option} is {number}; at least 1"
    if args.task in ("ground", "refer", "extract") and args.dataset is None and not text:
        yield f"--caption is missing (or give one of {', '.join(TEXTS[1:])})"
    if args.task in ("panoptic", "describe") and text:
        yield f"--task {args.task} takes no captions; leave {text} out"
    if args.task == "refer" and text in TEXTS[2:]:
        yield f"--task refer takes expressions; {text} writes captions"
    if (args.task == "panoptic") != (args.categories is not None):
        yield "--task panoptic needs --categories, and they go with --task panoptic only"
    if args.exclusive and args.task != "ground":
        yield "--exclusive goes with --task ground only"
    if args.nouns is not None and (args.task != "ground" or len(args.caption or ()) != 1):
        yield "--nouns goes with one --caption and --task ground only"
    if args.captioner_model is not None and not args.captioner:
        yield "--captioner-model goes with --captioner only"


def own_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Source]]:
    """Jobs of ``--input``, and its pictures.

    Raises:
        FileNotFoundError, ValueError: of the files that the arguments name, or an empty caption.
    """
    leave_out = [Path(path) for path in (args.output, args.masks, args.records) if path]
    pictures = list_pictures(args.input, leave_out)
    if args.captions:
        assigned, lost = assign(read_captions(args.captions), pictures)
        for entry in lost[:LISTED]:
            print(f"note: {shown(entry.where)}: {shown(entry.image)} is no picture of --input")
        if len(pictures) > len(assigned):
            bare = len(pictures) - len(assigned)
            print(f"note: {bare} of {len(pictures)} pictures have no caption")
        jobs = [
            Job(picture, "", entry.text, entry.nouns, entry.masks)
            for picture in pictures
            for entry in assigned.get(picture.name, ())
        ]
    else:
        texts = [plain(text) for text in args.caption] if args.caption else [None]
        if any(text is not None and not text.strip() for text in texts):
            raise ValueError("the caption is empty; write a sentence that names what to find")
        nouns = split_nouns(args.nouns)
        jobs = [Job(picture, "", text, nouns) for picture in pictures for text in texts]
    titles = output_names([job.picture.name for job in jobs])
    return [replace(job, name=title) for job, title in zip(jobs, titles)], pictures


def choose_masks(args: argparse.Namespace, pictures: Sequence[Source]) -> Masks:
    """The masks that the arguments name; wrong ones are ValueErrors."""
    if args.segmenter is not None:
        options = dict(option.split("=", 1) for option in args.segmenter_option)
        limits = MaskLimits(args.min_area, max_entities=args.max_entities)
        segmenter = load_segmenter(args.segmenter, args.device, options)
        source = LiveSource(lambda image: segmenter.segment(image, limits))
        made_by = [args.segmenter, sorted(options.items()), vars(limits)]
        return Masks(lambda job: {"source": source}, made_by)
    if args.masks is not None:
        return masks_from(Path(args.masks), pictures, args.masks_format, args.panoptic_json)
    # What the language model says of a picture does not depend on masks.
    return masks_beside(whole=args.task in ("describe", "extract"))


@dataclass
class Run:
    """One run over jobs; keeps what it did.

    Attributes:
        args: of the command line.
        predictor: answers.
        masks: where entities come from.
        categories: of the task "panoptic".
        captioner: another model writes the captions, see `gella.captions`.
        strict: raise the first failure instead of counting it.
        done: jobs that were done now; ``skipped``: that were done before.
        failures: ``image``, ``caption`` and ``reason`` of each that failed.
    """

    args: argparse.Namespace
    predictor: GellaPredictor
    masks: Masks
    categories: Sequence[dict[str, Any] | str] | None = None
    captioner: Any = None
    strict: bool = False
    done: int = 0
    skipped: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = Path(self.args.output)
        # Where the input comes from, and whether nouns share entities; every JSON says so.
        names = ("masks", "segmenter", "dataset", "exclusive")
        named = {name: getattr(self.args, name) for name in names}
        self._origin = {name: value for name, value in named.items() if value is not None}
        if self.captioner is not None:
            self._origin["captioner"] = self.captioner.model
        self._sections: dict[str, str] = {}  # by job, in the order of the jobs
        self._next_page = time.monotonic() + _REFRESH
        self._last: tuple[Any, Any] = (None, None)  # picture and entities that were read last
        # What the model's answers follow from: its config, and which weight files these are.
        cfg = self.predictor.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE, path = "", Path(cfg.MODEL.WEIGHTS)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        status = {file: os.stat(file) for file in files if cfg.MODEL.WEIGHTS and file.is_file()}
        # Size and time: hashing gigabytes would take longer than a demo.
        stamps = [f"{file.name} {of.st_size} {of.st_mtime_ns}" for file, of in status.items()]
        self._model = [cfg.dump(), *stamps]

    def do(self, jobs: Sequence[Job], stop: StopRequest) -> None:
        """Work on the jobs until all are done or a signal came, then write page and failures.

        Raises:
            EndpointError: the captioner cannot answer at all.
            OSError: the results cannot be written.
            ValueError: what went wrong, if the run is strict; nothing is written then.
        """
        with tqdm(total=len(jobs), unit="picture", disable=len(jobs) == 1) as bar:
            try:
                for batch in self._batches(jobs, bar, stop):
                    self._do(batch, talkative=len(jobs) <= _TALKATIVE)
                    bar.update(len(batch))
                    if self.failures:
                        bar.set_postfix(failed=len(self.failures))
                    if time.monotonic() >= self._next_page:
                        self._write_page(len(jobs))
            finally:
                # A hopeless run shows what it has; a strict one leaves nothing.
                if not self.strict or self.done + self.skipped:
                    self._write_page(len(jobs))
                    (self.folder / FAILURES).unlink(missing_ok=True)
                    if self.failures:
                        text = json.dumps(self.failures, indent=2, ensure_ascii=False)
                        self._put(FAILURES, plain(text).encode("utf-8"))

    def _batches(self, jobs: Sequence[Job], bar: Any, stop: StopRequest) -> Iterator[list[Job]]:
        """Read the jobs that are not finished, a batch at a time."""
        batch: list[Job] = []
        for job in jobs:
            if stop.number:
                return  # what was read, but not begun, is left for the next run
            ready = self._read(job)
            batch += [ready] if ready else []
            bar.update(not ready)
            if len(batch) == self.args.batch_size:
                yield batch
                batch = []
        if batch and not stop.number:
            yield batch

    def _read(self, job: Job) -> Job | None:
        """The job, ready to be asked; None if it is finished or cannot be read."""
        self._sections[job.name] = ""
        try:
            fingerprint = self._fingerprint(job)
            if not self.args.overwrite and self._finished(job, fingerprint):
                self.skipped += 1
                return None
            key = (job.picture, job.masks)
            if self._last[0] != key:
                load, record = partial(self.masks.load, job), job.record
                size = None if record is None else (record["height"], record["width"])
                if size or self.masks.made_by is not None:
                    image = read_image(job.picture.path, size=size)
                    self._last = (key, (image, load(image)))
                else:
                    self._last = (key, read_with_entities(job.picture.path, load))
            image, entities = self._last[1]
            return replace(job, fingerprint=fingerprint, image=image, entities=entities)
        except Exception as error:  # a segmenter may raise anything; one picture stops no others
            self._fail(job, error)
            return None

    def _fingerprint(self, job: Job) -> str:
        """What a job's result follows from, as a hash; raises as `Masks.key`."""
        known = {
            "form": _FORM,
            "model": self._model,
            "task": self.args.task,
            "image": file_hash(job.picture.path),
            "image_id": str(job.picture.image_id),
            "masks": self.masks.key(job),
            "text": job.text,
            "nouns": job.nouns,
            "extract": self.args.extract,
            "exclusive": self.args.exclusive,
            "phrases": self._phrases(job),
            "categories": self.categories,
            "describe_first": self.args.describe_first,
            "captioner": self._origin.get("captioner"),
            "records": bool(self.args.records),
        }
        text = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def _phrases(self, job: Job) -> list[dict[str, Any]] | None:
        """Nouns of a dataset's record with their places; None if other nouns are wanted."""
        other = self.args.extract or self.args.describe_first or self.captioner is not None
        if self.args.task != "ground" or other or job.record is None:
            return None
        return job.record["phrases"]

    def _finished(self, job: Job, fingerprint: str) -> bool:
        """Whether a job's files are all there, made from the same input; takes its HTML then."""
        try:
            content = json.loads((self.folder / f"{job.name}.json").read_text(encoding="utf-8"))
            there = all((self.folder / name).is_file() for name in content["files"])
            if content["fingerprint"] == fingerprint and there:
                html = (self.folder / PARTS / f"{job.name}.html").read_text(encoding="utf-8")
                self._sections[job.name] = html
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged or of another tool: made again
        return False

    def _do(self, batch: list[Job], *, talkative: bool) -> None:
        batch = self._with_captions(batch)
        for job, result in zip(batch, self._ask(batch), strict=True):
            if isinstance(result, Exception):
                self._fail(job, result)
                continue
            result = to_correct(result) if self.args.records else result
            try:
                paths = self._write(job, result)
            except (ValueError, MemoryError) as error:  # not OSError: a full disk fails them all
                self._fail(job, error)
                continue
            self.done += 1
            if isinstance(result, Grounding | PanopticResult):
                told = [f"{noun.text}: {noun.listed}" for noun in result.nouns()]
            else:
                told = [result if isinstance(result, str) else ", ".join(result)]
            lines = [f"  {shown(line)}" for line in told] + [f"wrote {shown(p)}" for p in paths]
            for line in lines if talkative else ():
                tqdm.write(line, file=sys.stdout)

    def _with_captions(self, batch: list[Job]) -> list[Job]:
        """The batch with texts; a job whose caption fails is left out and counted."""
        if self.captioner is not None:
            threads = 4 if hasattr(self.captioner, "address") else 1
            pictures = enumerate(load_picture(job.image) for job in batch)
            said = in_threads(lambda item: describe(self.captioner, item[1]), pictures, threads)
            by_place = {place: answer for (place, _), answer in said}
            # Threads that were told to stop leave the rest.
            answers = [by_place.get(place, StoppedError("stopped")) for place in range(len(batch))]
        elif self.args.describe_first:
            answers = self._ask(batch, task="describe")
        else:
            return batch
        captioned = []
        for job, answer in zip(batch, answers, strict=True):
            if isinstance(answer, EndpointError):
                raise answer
            if isinstance(answer, Caption):
                nouns = tuple(answer.nouns)
                captioned.append(replace(job, text=answer.description, nouns=nouns))
            elif isinstance(answer, str):
                captioned.append(replace(job, text=answer, nouns=None))
            elif not isinstance(answer, StoppedError):
                self._fail(job, answer)
        return captioned

    def _ask(self, batch: list[Job], task: str | None = None) -> list[Any]:
        """The results of the batch, an exception for each that failed, in order."""
        requests = [
            Request(
                task or self.args.task,
                job.image,
                job.entities,
                text="" if task else job.text or "",
                nouns=None if self.args.extract else job.nouns,
                phrases=self._phrases(job),
                categories=self.categories,
                image_id=job.picture.image_id,
                exclusive=bool(self.args.exclusive),
            )
            for job in batch
        ]
        return self.predictor.predict_many(requests, batch_size=self.args.batch_size)

    def _fail(self, job: Job, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.strict:
            # Whatever a segmenter or a captioner raised, it is the user's to see in one line.
            raise ValueError(reason) from error
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exception(error)
        failure = {"image": job.picture.name, "caption": job.text or "", "reason": reason}
        self.failures.append(failure)

    def _write(self, job: Job, result: Any) -> list[Path]:
        """Write a result, each file whole or not at all; return its pictures and its JSON.

        All lies directly in the output folder or in its folder ``page``.
        """
        task, name = self.args.task, f"{job.name}.json"
        drawn: dict[str, Image.Image] = {}
        if isinstance(result, Grounding):
            drawn[f"{job.name}_grounding.png"] = result.plot()
            drawn[f"{job.name}_colormap.png"] = result.plot_colormap()
        elif isinstance(result, PanopticResult):
            drawn[f"{job.name}_panoptic.png"] = result.plot()
        suffix, small = _small(job.image, enlarge=not drawn)
        picture = f"{PARTS}/{job.name}.{suffix}"
        html = _section(task, result, job, picture, [*drawn, name])
        files = {file: encoded(image, "PNG") for file, image in drawn.items()}
        files |= {picture: small, f"{PARTS}/{job.name}.html": html.encode("utf-8")}
        content = {"image": plain(job.picture.path), **self._origin}
        if job.record is not None:
            content["image_id"] = job.record["image_id"]
        content.update(fingerprint=job.fingerprint, files=[*files], **_as_json(task, result, job))
        # The JSON comes last: while it is not there, the job is not finished.
        files[name] = plain(json.dumps(content, indent=2, ensure_ascii=False)).encode("utf-8")
        for file, data in files.items():
            self._put(file, data)
        self._sections[job.name] = html
        return [self.folder / file for file in (*drawn, name)]

    def _write_page(self, total: int) -> None:
        """Write the page as far as it goes."""
        began = time.monotonic()
        weights = self.predictor.cfg.MODEL.WEIGHTS or "untrained weights"
        state = f"{self.done + self.skipped} of {total} done, {len(self.failures)} failed"
        note = f"Task: {self.args.task}. Model: {weights}. Pictures and captions: {state}."
        body = [f"<p>{escape(plain(note))}</p>", *self._sections.values()]
        if self.failures:
            items = "".join(
                f"<li><b>{escape(plain(item['image']))}</b>: {escape(plain(item['reason']))}</li>"
                for item in self.failures
            )
            head = f"<h2>Failed: {len(self.failures)}</h2>"
            body.append(f'<section id="failures">{head}<ul>{items}</ul></section>')
        self._put(PAGE, page("GELLA", body).encode("utf-8"))
        # A page of thousands is long: refreshing it stays a small part of the time.
        self._next_page = began + max(_REFRESH, _TIMES * (time.monotonic() - began))

    def _put(self, name: str, data: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / name, lambda stream: stream.write(data))


def _as_json(task: str, result: Any, job: Job) -> dict[str, Any]:
    """A result of any task as values that JSON can hold."""
    if isinstance(result, Grounding | PanopticResult):
        return result.to_json()
    if task == "describe":
        return {"task": task, "text": result}
    nouns = [{"noun": p["text"], "start": p["start"], "end": p["end"]} for p in result.phrases]
    return {"task": task, "caption": job.text or "", "nouns": nouns}


def _small(image: np.ndarray, *, enlarge: bool) -> tuple[str, bytes]:
    """The picture as the page shows it, and its suffix; a browser would blur a small one."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) > _EXACT_SIDE:
        picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
        return "jpg", encoded(picture, "JPEG", quality=88)
    times = _SHOWN_SIDE // max(picture.size) if enlarge else 1
    size = (picture.width * times, picture.height * times)
    return "png", encoded(picture.resize(size, Image.Resampling.NEAREST), "PNG")


def _section(task: str, result: Any, job: Job, address: str, files: Sequence[str]) -> str:
    """One job's part of the page."""
    key = hashlib.sha256(job.name.encode("utf-8")).hexdigest()[:16]
    if isinstance(result, Grounding | PanopticResult):
        draw: Any = grounding_html if isinstance(result, Grounding) else panoptic_html
        figure = draw(result, key=key, image_src=quote(address))
    else:  # the picture beside the text that the model wrote, in the form of the other figures
        marks = "" if task == "describe" else "".join(f"<mark>{escape(n)}</mark> " for n in result)
        texts = [result] if task == "describe" else [job.text or "", "" if result else "no nouns"]
        said = "".join(f'<p class="caption" dir="auto">{escape(text)}</p>' for text in texts)
        # No <image> of SVG: the figures' style fades what no noun names.
        figure = (
            f'<figure class="gella"><div class="stage"><img src="{quote(address)}" width="100%" '
            f'alt="" loading="lazy"></div><figcaption>{said}{marks}</figcaption></figure>'
        )
    links = ", ".join(f'<a href="{quote(name)}">{escape(name)}</a>' for name in files)
    title = escape(plain(job.picture.name))
    return f'<section id="{key}"><h2>{title}</h2>{plain(figure)}<p>{links}</p></section>\n'


def execute(args: argparse.Namespace) -> int:
    """Read the input, then build the model (the slow part), then do the jobs; the exit code."""
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"--output {args.output} is a file; name a folder")
    cfg = config_of(args.config_file, args.opts)
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    if args.device is not None:
        cfg.MODEL.DEVICE = args.device
    if args.dataset is not None:
        jobs = dataset_jobs(args.dataset, args.num, cfg, args.task)
        masks = Masks(lambda job: (job.record or {}).get("entities") or {})
    else:
        jobs, pictures = own_jobs(args)
        masks = choose_masks(args, pictures)
    captioner: Any = None
    if args.captioner:
        device = args.device or "cpu"
        captioner = open_captioner(args.captioner, args.captioner_model, device=device)
        if hasattr(captioner, "address"):
            print(f"captions: the pictures are sent to {captioner.address}")
    categories = read_categories(args.categories)
    single = len(jobs) == len(args.input or ()) == 1 and Path(args.input[0]).is_file()
    if single:
        masks.find(jobs[0])  # a picture that has none is told before a large model is loaded
    predictor = GellaPredictor(cfg, config_file=args.config_file)
    weights = predictor.cfg.MODEL.WEIGHTS
    if not weights:
        print("no weights: the model is untrained, and the output is labelled so")
    elif purpose := made_for(weights):
        print(f"weights: {shown(purpose)}")
    run = Run(args, predictor, masks, categories, captioner, single)

    def end(number: int) -> None:
        if captioner is not None:
            captioner.stop()
        tqdm.write("stopping after the pictures under way (again: at once)", file=sys.stderr)

    def end_at_once(number: int) -> None:
        if captioner is not None:
            captioner.abort()
        raise KeyboardInterrupt

    with StopRequest(end, end_at_once) as stop, logging_redirect_tqdm():
        run.do(jobs, stop)
    _summarize(run, len(jobs), bool(stop.number))
    finished = [job for job in jobs if run._sections.get(job.name)]
    if args.records and finished and not stop.number:
        left = write_records(Path(args.records), finished, masks, run.folder)
        print(f"wrote {args.records}: {left} nouns to fill in, the others to correct by the page")
        check, name = project("datasets/check.py"), Path(args.records).name
        print(f"next: python {check} --module {args.records}/records.py {name}")
    return stop.status or int(bool(run.failures))


def _summarize(run: Run, total: int, stopped: bool) -> None:
    """Say what was done, what failed, where to look and what to do next."""
    args, page_file = run.args, run.folder / PAGE
    if run.skipped:
        print(f"{run.skipped} of {total} were done before (--overwrite does them again)")
    print(f"{run.done} done, {len(run.failures)} failed")
    for failure in run.failures[:LISTED]:
        print(f"failed: {shown(failure['image'])}: {shown(failure['reason'])}")
    if run.failures:
        print(f"all failures: {run.folder / FAILURES}")
    if run.done or run.skipped or run.failures:
        print(f"wrote {page_file}")
    if stopped:
        print("next: the same command goes on where this one stopped")
    elif run.failures:
        print("next: mend these and run the same command again; it does only what is missing")
    else:
        print(f"next: open {page_file} in a browser, or try your own:")
        released = args.config_file == os.path.relpath(RELEASE)
        model = "" if released else f" --config-file {shell_quote(args.config_file)}"
        model += f" --weights {shell_quote(args.weights)}" if args.weights else ""
        print(f'  python {tools()}/demo.py{model} --input IMAGE --masks FILE --caption "..."')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    return exit_status(
        lambda: execute(args), errors=(EndpointError, ValueError, OSError, ImportError)
    )

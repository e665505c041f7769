"""Validating a registered dataset from its files: all problems at once, not the first one only.

The readers stop at the first thing that is wrong; these checks note it and go on, and open every
picture and its masks in worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tqdm import tqdm

from gella.data.entityseg import locate_images
from gella.data.narratives import read_narratives
from gella.data.panoptic import categories_of
from gella.data.records import Place, json_lines, read_json
from gella.data.refcoco import read_refs
from gella.data.register import refcoco_name
from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation
from gella.entities.sources import load_from_record
from gella.text.spans import align_utterances, locate_phrases

__all__ = ["Finding", "Known", "Report", "check_dataset", "known_counts"]

T = TypeVar("T")
_SHOWN = 3  # examples of each kind in the table; the JSON has all


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: short name of the class of problems, such as "missing-image".
        file: in which it is.
        record: image, annotation or line that it concerns.
        message: one line; both numbers where two disagree.
        level: "error": the dataset cannot be used as it is; "warning": look at it.
    """

    kind: str
    file: str
    record: str
    message: str
    level: str = "error"


@dataclass
class Report:
    """All findings of a dataset.

    Attributes:
        name: of the dataset.
        form: how its files are made, as in the metadata.
        figures: counts by what is counted.
        known: published counts by what is counted: ``{"value", "source", "exact"}``.
        findings: in the order in which they were found.
    """

    name: str
    form: str
    figures: dict[str, int] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, place: Place, message: str, level: str = "error") -> None:
        """Note a problem of a record; arguments as `Finding`."""
        self.findings.append(Finding(kind, str(place.path), place.where, message, level))

    def attempt(self, kind: str, place: Place, make: Callable[..., T], *args: Any) -> T | None:
        """The result of ``make(*args)``; what it raises is noted, and None returned.

        KeyError, OSError, TypeError and ValueError count, the errors that wrong data cause.
        """
        try:
            return make(*args)
        except (KeyError, OSError, TypeError, ValueError) as error:
            self.add(kind, place, " ".join(str(error).split()) or type(error).__name__)
            return None

    def start(self, *names: str) -> None:
        """Put figures at 0, in the order in which they are to be shown."""
        for name in names:
            self.figures.setdefault(name, 0)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a figure."""
        self.figures[what] = self.figures.get(what, 0) + number

    def number(self, level: str) -> int:
        """How many findings are of a level."""
        return sum(finding.level == level for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        errors = self.number("error")
        counts = {"ok": not errors, "errors": errors, "warnings": self.number("warning")}
        noted = {"figures": self.figures, "known": self.known}
        findings = [asdict(finding) for finding in self.findings]
        return {"dataset": self.name, "form": self.form, **counts, **noted, "findings": findings}

    def as_text(self) -> str:
        """The figures, and of each kind of problem how often it is and the first examples."""
        lines = [f"{self.name} ({self.form})"]
        for what, number in self.figures.items():
            known = self.known.get(what)
            about = "" if known is None or known["exact"] else "about "
            beside = "" if known is None else f"   known: {about}{known['value']:,}"
            lines.append(f"  {what:32}{number:>12,}{beside}")
        kinds: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault((finding.level, finding.kind), []).append(finding)
        for (level, kind), alike in sorted(kinds.items()):
            lines.append(f"  {level}: {kind}: {len(alike):,}")
            lines += [f"    {f.file}: {f.record}: {f.message}" for f in alike[:_SHOWN]]
            if len(alike) > _SHOWN:
                lines.append(f"    and {len(alike) - _SHOWN:,} more (--json FILE lists all)")
        lines.append(f"  {self.number('error'):,} errors, {self.number('warning'):,} warnings")
        return "\n".join(lines)


class Known(NamedTuple):
    """A published number, who says so, and whether publications round it or count differently."""

    value: int
    source: str
    exact: bool = True


# Refs, images with refs and, where papers evaluate on the split, expressions.
_REFS: dict[tuple[str, str, str], tuple[int, ...]] = {
    ("refcoco", "google", "train"): (40_000, 19_213),
    ("refcoco", "google", "val"): (5_000, 4_559),
    ("refcoco", "google", "test"): (5_000, 4_527),
    ("refcoco", "unc", "train"): (42_404, 16_994),
    ("refcoco", "unc", "val"): (3_811, 1_500, 10_834),
    ("refcoco", "unc", "testA"): (1_975, 750, 5_657),
    ("refcoco", "unc", "testB"): (1_810, 750, 5_095),
    ("refcoco+", "unc", "train"): (42_278, 16_992),
    ("refcoco+", "unc", "val"): (3_805, 1_500, 10_758),
    ("refcoco+", "unc", "testA"): (1_975, 750, 5_726),
    ("refcoco+", "unc", "testB"): (1_798, 750, 4_889),
    ("refcocog", "google", "train"): (44_822, 24_698),
    ("refcocog", "google", "val"): (5_000, 4_650),
    ("refcocog", "umd", "train"): (42_226, 21_899),
    ("refcocog", "umd", "val"): (2_573, 1_300, 4_896),
    ("refcocog", "umd", "test"): (5_023, 2_600, 9_602),
}
_TABLE = "tensorflow.org/datasets/catalog/ref_coco"
_SOURCES = {
    "refs": _TABLE,
    "images": _TABLE,
    "expressions": "the numbers of expressions that papers evaluate on",
}
_COCO = "cocodataset.org, 2017 panoptic"
_KNOWN = {
    "gella_coco_panoptic_train2017": {"images": Known(118_287, _COCO)},
    "gella_coco_panoptic_val2017": {"images": Known(5_000, _COCO)},
    "gella_coco_png_train2017": {
        "narratives": Known(134_272, "Panoptic Narrative Grounding", exact=False)
    },
    **{
        refcoco_name(*split, entities): {
            what: Known(value, source) for value, (what, source) in zip(counts, _SOURCES.items())
        }
        for split, counts in _REFS.items()
        for entities in ("instances", "panoptic")
    },
}


def known_counts(name: str, metadata: Any) -> dict[str, Known]:
    """What is known of a dataset's size, to tell a partial copy from a whole one.

    Args:
        name: in the catalogs.
        metadata: of the dataset; the shapes say in their ``meta.json`` how many there are.

    Returns:
        Numbers by what they count: "images", "narratives", "refs", "expressions"; empty for a
        dataset that nobody has published.
    """
    if not name.startswith("gella_shapes_"):
        return _KNOWN.get(name, {})
    root = Path(metadata.image_root)
    meta = root.parent / "meta.json"
    if metadata.form != "panoptic" or not meta.is_file():
        return {}
    recipe = read_json(meta).get("recipe", {})
    return {"images": Known(int(recipe[root.name]), str(meta))} if root.name in recipe else {}


@dataclass
class _ImageJob:
    """One image to look at.

    Attributes:
        image_id: for messages.
        image: the picture's file.
        size: (height, width) according to ``annotation``.
        annotation: the JSON file that says so.
        png: the panoptic PNG file, if there is one.
        segments: dicts ``id``, ``iscrowd``, ``area`` as far as known, and ``segmentation`` where
            there is no PNG; None: only the picture is looked at.
    """

    image_id: str
    image: str
    size: tuple[int, int]
    annotation: str
    png: str | None
    segments: list[dict[str, Any]] | None

    def crowds(self) -> dict[int, bool]:
        """Whether it is a crowd, of every segment by its id."""
        return {s["id"]: bool(s.get("iscrowd", 0)) for s in self.segments or []}


_Jobs = dict[str, _ImageJob]  # by image id as text


def check_dataset(name: str, *, limit: int | None = None, workers: int = 1) -> Report:
    """Validate a dataset: its annotation files whole, its pictures and masks up to a limit.

    Args:
        name: in the catalogs. Datasets registered by `gella.data.register` are looked through file
            by file; for others, the records that the catalog gives are.
        limit: images to open; None opens all of those the dataset uses.
        workers: processes that open them; 1 does it in this one.

    Returns:
        The report. Without an error in it, the dataset's own reader has read the files as well.

    Raises:
        KeyError: no dataset has this name.
    """
    if name not in DatasetCatalog.list():
        raise KeyError(name)
    metadata = MetadataCatalog.get(name)
    form = metadata.get("form", "records")
    report = Report(name, form)
    jobs = _CHECKS[form](report, metadata)
    unread = any(finding.kind == "file" for finding in report.findings)
    for what, known in known_counts(name, metadata).items():
        number = report.figures.get(what, 0)
        report.known[what] = known._asdict()
        if number != known.value and not unread:
            message = f"{number:,} {what}, but {known.source} has {known.value:,}"
            level = "error" if known.exact else "warning"
            report.add("count", Place(name, what), message, level)
    opened = jobs[:limit]
    with tqdm(total=len(opened), desc="images and masks", unit="image", disable=None) as bar:
        for findings in _opened(opened, workers):
            report.findings.extend(findings)
            bar.update()
    report.count("images opened", len(opened))
    report.count("images to open", len(jobs))
    if form != "records" and not report.number("error"):
        report.attempt("reader", Place(name, "loading"), DatasetCatalog.get, name)
    return report


def _opened(jobs: list[_ImageJob], workers: int) -> Iterable[list[Finding]]:
    if workers <= 1 or len(jobs) < 2:
        yield from map(_check_image, jobs)
        return
    with Pool(workers) as pool:
        yield from pool.imap(_check_image, jobs, chunksize=max(1, min(32, len(jobs) // workers)))


def _check_image(job: _ImageJob) -> list[Finding]:
    """Everything that is wrong with an image's files; a missing or damaged one is a finding."""
    report = Report("", "")

    def add(kind: str, file: str, message: str, level: str = "error") -> None:
        report.add(kind, Place(file, f"image {job.image_id}"), message, level)

    _check_picture(job, add)
    if job.segments is not None:
        (_check_outlines if job.png is None else _check_png)(job, add)
        if all(segment.get("iscrowd", 0) for segment in job.segments):
            add("no-entity", job.annotation, f"no entity among {len(job.segments)} segments")
    return report.findings


def _check_picture(job: _ImageJob, add: Callable[..., None]) -> None:
    if not os.path.isfile(job.image):
        add("missing-image", job.image, "the file does not exist")
        return
    try:
        with Image.open(job.image) as picture:
            size = (picture.height, picture.width)
            # A JPEG is decoded at an eighth of its size: all of its data, much less work.
            picture.draft("L", (1, 1))
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        add("damaged-image", job.image, f"cannot be decoded ({error})")
        return
    if size != job.size:
        add("image-size", job.image, _sizes(size, job))


def _sizes(size: tuple[int, ...], job: _ImageJob) -> str:
    swapped = "; the sides are swapped" if size == job.size[::-1] else ""
    return (
        f"is {size[1]}x{size[0]} pixels but {job.annotation} says {job.size[1]}x{job.size[0]} "
        f"(width x height){swapped}"
    )


def _check_png(job: _ImageJob, add: Callable[..., None]) -> None:
    path = str(job.png)
    if not os.path.isfile(path):
        add("missing-masks", path, "the file does not exist")
        return
    try:
        ids = read_id_png(path)
        with Image.open(path) as picture:
            mode = picture.mode
    except ValueError as error:
        add("damaged-masks", path, f"cannot be decoded ({error})")
        return
    if mode != "RGB":
        add("mask-mode", path, f"picture mode is {mode}, expected RGB (id = R + 256 G + 65536 B)")
        return
    if ids.shape != job.size:
        add("mask-size", path, _sizes(ids.shape, job))
    areas = _areas(ids)
    listed = {int(segment["id"]): segment for segment in job.segments or []}
    for segment_id, area in areas.items():
        if segment_id and segment_id not in listed:
            add("unlisted-id", path, f"{area} pixels have id {segment_id}, not in {job.annotation}")
    for segment_id, segment in listed.items():
        area = areas.get(segment_id, 0)
        if not area:
            add("absent-id", path, f"no pixel has id {segment_id}, which {job.annotation} lists")
        elif segment.get("area") is not None and segment["area"] != area:
            said = f"segment {segment_id} has {area} pixels but area {segment['area']}"
            add("area", job.annotation, said, "warning")


def _areas(ids: np.ndarray) -> dict[int, int]:
    """Number of pixels of each id."""
    # Every id starts somewhere in a row, so sorting the starts of runs is enough.
    starts = ids[:, 1:][ids[:, 1:] != ids[:, :-1]]
    present = np.unique(np.concatenate([ids[:, 0], starts]))
    counts = np.bincount(np.searchsorted(present, ids.ravel()), minlength=len(present))
    return dict(zip(present.tolist(), counts.tolist()))


def _check_outlines(job: _ImageJob, add: Callable[..., None]) -> None:
    for segment in job.segments or []:
        where = f"segment {segment.get('id')}"
        try:
            mask = decode_segmentation(segment["segmentation"], job.size)
        except (KeyError, TypeError, ValueError) as error:
            add("bad-mask", job.annotation, f"{where}: {' '.join(str(error).split())}")
            continue
        if not mask.any() and not segment.get("iscrowd", 0):
            add("zero-area", job.annotation, f"{where} has no pixel")


class _Images:
    """File name and size of the images of a COCO-style file; None for those that say it wrongly."""

    def __init__(self, report: Report, content: Any, path: str) -> None:
        self._report = report
        self.files: dict[str, tuple[str, tuple[int, int]] | None] = {}
        for number, image in enumerate(_list(report, Place(path), content, "images")):
            place = Place(path, f"entry {number} of 'images'")
            image_id = report.attempt("field", place, place.key, image, "id")
            if image_id is None:
                continue
            place = Place(path, f"image {image_id}")
            if image_id in self.files:
                report.add("duplicate-image", place, "the id occurs twice in 'images'")
                continue
            name = report.attempt("field", place, place.key, image, "file_name")
            height, width = (
                report.attempt("field", place, place.whole, image, side)
                for side in ("height", "width")
            )
            self.files[image_id] = None
            if name is not None and height and width:
                self.files[image_id] = (name, (height, width))
            elif 0 in (height, width):
                report.add("field", place, f"height and width are {[height, width]}")

    def owner(self, place: Place, record: Any) -> str | None:
        """The image id of a record, as text, if it is that of a sound image of the file."""
        image_id = self._report.attempt("field", place, place.key, record, "image_id")
        if image_id is not None and image_id not in self.files:
            message = f"image {image_id} is not among the images"
            self._report.add("unknown-image", place, message)
        return image_id if image_id is not None and self.files.get(image_id) else None


def _list(report: Report, place: Place, record: Any, name: str) -> list[Any]:
    return report.attempt("field", place, place.listed, record, name) or []


def _panoptic_jobs(report: Report, metadata: Any) -> _Jobs:
    """Look through a panoptic JSON (docs/FORMATS.md 1): a job for every annotated image."""
    path = metadata.panoptic_json
    report.start("images", "segments", "crowd segments")
    content = report.attempt("file", Place(path), read_json, path)
    if content is None:
        return {}
    images = _Images(report, content, path)
    categories = report.attempt("categories", Place(path), categories_of, content, path)
    known = None if categories is None else {category["id"] for category in categories}
    jobs: _Jobs = {}
    for number, annotation in enumerate(_list(report, Place(path), content, "annotations")):
        image_id = images.owner(Place(path, f"annotation {number}"), annotation)
        said = None if image_id is None else images.files[image_id]
        if image_id is None or said is None:
            continue
        place = Place(path, f"image {image_id}")
        if image_id in jobs:
            report.add("duplicate-annotation", place, "is annotated twice")
            continue
        segments = _panoptic_segments(report, annotation, place, known)
        name = report.attempt("field", place, place.key, annotation, "file_name")
        image = os.path.join(metadata.image_root, said[0])
        png = os.path.join(metadata.panoptic_root, name or f"{image_id}.png")
        jobs[image_id] = _ImageJob(image_id, image, said[1], str(path), png, segments)
    for image_id, file in images.files.items():
        if image_id not in jobs and file:
            place = Place(path, f"image {image_id}")
            report.add("unannotated", place, "has no annotation", "warning")
    report.count("images", len(jobs))
    return jobs


def _panoptic_segments(
    report: Report, annotation: Any, image: Place, categories: set[int] | None
) -> list[dict[str, Any]]:
    kept: dict[int, dict[str, Any]] = {}
    for segment in _list(report, image, annotation, "segments_info"):
        segment_id = report.attempt("field", image, image.whole, segment, "id")
        if segment_id is None:
            continue
        place = Place(image.path, f"{image.where}, segment {segment_id}")
        if segment_id in kept:
            report.add("duplicate-segment", place, "the id occurs twice in the image")
            continue
        category = report.attempt("field", place, place.whole, segment, "category_id")
        if category is not None and categories is not None and category not in categories:
            message = f"category {category} is not among the {len(categories)} of the file"
            report.add("unknown-category", place, message)
        area = segment.get("area")
        if area is not None and not (isinstance(area, int | float) and area > 0):
            report.add("zero-area", place, f"area is {area!r}")
        crowd = int(bool(segment.get("iscrowd", 0)))
        kept[segment_id] = {"id": segment_id, "iscrowd": crowd, "area": area}
        report.count("crowd segments", crowd)
    report.count("segments", len(kept))
    return list(kept.values())


def _instance_jobs(report: Report, metadata: Any) -> _Jobs:
    """Look through a COCO-style instance JSON (docs/FORMATS.md 3 and 4): a job for every image."""
    path = metadata.instances_json
    content = report.attempt("file", Place(path), read_json, path)
    if content is None:
        return {}
    jobs: _Jobs = {}
    objects: dict[str, list[dict[str, Any]]] = {}
    images = _Images(report, content, path)
    for image_id, (name, size) in ((i, said) for i, said in images.files.items() if said):
        if metadata.get("names_of_2017", False) and image_id.isdecimal():
            name = f"{int(image_id):012d}.jpg"
        image = os.path.join(metadata.image_root, name)
        objects[image_id] = []
        jobs[image_id] = _ImageJob(image_id, image, size, str(path), None, objects[image_id])
    seen: set[tuple[str, int]] = set()
    for number, annotation in enumerate(_list(report, Place(path), content, "annotations")):
        place = Place(path, f"annotation {number}")
        object_id = report.attempt("field", place, place.whole, annotation, "id")
        if object_id is not None:
            place = Place(path, f"annotation {object_id}")
        owner = images.owner(place, annotation)
        if object_id is None or owner is None:
            continue
        if (owner, object_id) in seen:
            report.add("duplicate-segment", place, f"the id occurs twice in image {owner}")
            continue
        seen.add((owner, object_id))
        objects[owner].append({**annotation, "id": object_id})
    report.count("annotated images", sum(bool(own) for own in objects.values()))
    report.count("objects", len(seen))
    return jobs


def _check_narratives(report: Report, metadata: Any, jobs: _Jobs) -> set[str]:
    """Look through narratives in the form of PNG (docs/FORMATS.md 2).

    Returns the ids, as text, of the images that are spoken of.
    """
    path = metadata.json_file
    report.start("narratives", "images with narratives", "noun phrases", "utterances")
    narratives = report.attempt("file", Place(path), read_narratives, path) or []
    seen: set[tuple[str, str]] = set()
    spoken: set[str] = set()
    crowds = {image_id: job.crowds() for image_id, job in jobs.items()}
    for number, narrative in enumerate(tqdm(narratives, desc="narratives", disable=None)):
        place = Place(path, f"narrative {number}")
        read = report.attempt("field", place, _narrative, narrative, place)
        if read is None:
            continue
        image_id, caption, segments = read
        place = Place(path, f"narrative {number}, image {image_id}")
        if image_id not in crowds:
            message = f"image {image_id} is not in {metadata.panoptic_json}"
            report.add("unknown-image", place, message)
            continue
        spoken.add(image_id)
        if (image_id, caption) in seen:
            report.add("duplicate-narrative", place, "the same words again", "warning")
        seen.add((image_id, caption))
        _check_phrases(report, place, segments, crowds[image_id])
        utterances = [segment["utterance"] for segment in segments]
        report.count("utterances", sum(bool(words.strip()) for words in utterances))
        for words, span in zip(utterances, align_utterances(caption, utterances)):
            if span is None and words.strip():
                message = f"{words[:60]!r} is not in the caption as written: {caption[:60]!r}"
                report.add("unaligned", place, message, "warning")
    report.count("narratives", len(narratives))
    report.count("images with narratives", len(spoken))
    return spoken


def _narrative(narrative: Any, place: Place) -> tuple[str, str, list[dict[str, Any]]]:
    """Image id, caption and segments, or a ValueError for the first field that is wrong."""
    segments = place.listed(narrative, "segments")
    for segment in segments:
        place.text(segment, "utterance")
        place.listed(segment, "segment_ids")
    return place.key(narrative, "image_id"), place.text(narrative, "caption"), segments


def _check_phrases(
    report: Report, place: Place, segments: list[dict[str, Any]], crowds: dict[int, bool]
) -> None:
    nouns = 0
    for segment in segments:
        ids = segment["segment_ids"]
        if not ids and not segment.get("noun", False):
            continue
        nouns += 1
        unknown = [i for i in ids if not str(i).isdecimal() or int(i) not in crowds]
        known = [int(i) for i in ids if i not in unknown]
        if unknown:
            phrase = Place(place.path, f"{place.where}, {segment['utterance'][:40]!r}")
            message = f"segment ids {unknown[:5]} are not among the image's {len(crowds)} segments"
            report.add("phrase-without-mask", phrase, message)
        report.count("ungrounded nouns", not ids)
        report.count("crowd-only phrases", bool(known) and all(crowds[i] for i in known))
    report.count("noun phrases", nouns)
    if not nouns:
        report.add("no-noun", place, "it is left out: it names nothing", "warning")


def _check_captions(report: Report, metadata: Any, jobs: _Jobs) -> set[str]:
    """Look through generated captions (docs/FORMATS.md 4); returns as `_check_narratives`."""
    path = metadata.json_file
    report.start("captions", "images with captions", "nouns")
    lines = report.attempt("file", Place(path), lambda: list(json_lines(path))) or []
    spoken: set[str] = set()
    seen: set[tuple[str, Any, str]] = set()
    for number, line in tqdm(lines, desc="captions", disable=None):
        place = Place(path, f"line {number}")
        if isinstance(line, ValueError):
            report.add("line", place, str(line))
            continue
        read = report.attempt("field", place, _caption, line, place)
        if read is None:
            continue
        image_id, caption, nouns = read
        place = Place(path, f"line {number}, image {image_id}")
        if image_id not in jobs:
            report.add("unknown-image", place, "the annotation has no such image")
            continue
        spoken.add(image_id)
        said, name = line.get("file_name"), Path(jobs[image_id].image).name
        if said and Path(str(said)).name != name:
            report.add("other-image", place, f"is of {said}, but the image is {name}")
        key = (image_id, line.get("prompt_id"), caption)
        if key in seen:
            report.add("duplicate-caption", place, "the same caption again", "warning")
        seen.add(key)
        report.count("nouns", len(nouns))
        if not caption.strip():
            report.add("empty", place, "the description is empty")
        elif not nouns:
            report.add("no-noun", place, "no noun: noun extraction cannot use it")
        for noun, span in zip(nouns, locate_phrases(caption, nouns)):
            if span is None:
                message = f"noun {noun[:40]!r} is not in the description after those before it"
                report.add("noun-not-in-text", place, message)
    report.count("captions", len(lines))
    report.count("images with captions", len(spoken))
    return spoken


def _caption(line: Any, place: Place) -> tuple[str, str, list[str]]:
    nouns = [str(noun) for noun in place.listed(line, "nouns")]
    return place.key(line, "image_id"), place.text(line, "description"), nouns


def _check_refs(report: Report, metadata: Any, jobs: _Jobs) -> set[str]:
    """Look through the refs of a split (docs/FORMATS.md 3); returns as `_check_narratives`."""
    path, split = metadata.json_file, metadata.split
    report.start("refs", "images", "expressions")
    refs = report.attempt("file", Place(path), read_refs, path) or []
    crowds = {image_id: job.crowds() for image_id, job in jobs.items()}
    spoken: set[str] = set()
    ref_ids: set[Any] = set()
    for number, ref in enumerate(tqdm(refs, desc="refs", disable=None)):
        place = Place(path, f"ref {number}")
        read = report.attempt("field", place, _ref, ref, place)
        if read is None or ref["split"] != split:
            continue
        ref_id, image_id, target, sentences = read
        place = Place(path, f"ref {ref_id}, image {image_id}")
        report.count("refs")
        if ref_id in ref_ids:
            report.add("duplicate-ref", place, "the ref_id occurs twice")
        ref_ids.add(ref_id)
        if target not in crowds.get(image_id, {}):
            message = f"object {target} is not in {metadata.instances_json}"
            report.add("phrase-without-mask", place, message)
            continue
        spoken.add(image_id)
        if crowds[image_id][target]:
            message = f"object {target} is a crowd, which is no input entity"
            report.add("crowd", place, message, "warning")
        report.count("expressions", len(sentences))
        if not all(sentence.strip() for sentence in sentences) or not sentences:
            report.add("empty", place, f"an empty expression among {len(sentences)}")
    report.count("images", len(spoken))
    return spoken


def _ref(ref: Any, place: Place) -> tuple[Any, str, int, list[str]]:
    place.field(ref, "split")
    ref_id = place.field(ref, "ref_id")
    sentences = [place.text(s, "sent") for s in place.listed(ref, "sentences")]
    return ref_id, place.key(ref, "image_id"), place.whole(ref, "ann_id"), sentences


def _used(jobs: _Jobs, images: Iterable[str]) -> list[_ImageJob]:
    wanted = set(images)
    return [job for image_id, job in jobs.items() if image_id in wanted]


def _panoptic(report: Report, metadata: Any) -> list[_ImageJob]:
    return list(_panoptic_jobs(report, metadata).values())


def _png(report: Report, metadata: Any) -> list[_ImageJob]:
    jobs = _panoptic_jobs(report, metadata)
    return _used(jobs, _check_narratives(report, metadata, jobs))


def _captions(report: Report, metadata: Any) -> list[_ImageJob]:
    jobs = _panoptic_jobs(report, metadata)
    return _used(jobs, _check_captions(report, metadata, jobs))


def _entityseg(report: Report, metadata: Any) -> list[_ImageJob]:
    jobs = _instance_jobs(report, metadata)
    used = _used(jobs, _check_captions(report, metadata, jobs))
    root, names = metadata.image_root, [job.image for job in used]
    paths = report.attempt("duplicate-image", Place(root, "folders"), locate_images, root, names)
    return used if paths is None else [replace(job, image=paths[job.image]) for job in used]


def _refcoco(report: Report, metadata: Any) -> list[_ImageJob]:
    jobs = _instance_jobs(report, metadata)
    spoken = _check_refs(report, metadata, jobs)
    used = _used(jobs, spoken)
    if metadata.get("panoptic_json") is None:
        return used
    other = Report(report.name, report.form)  # its figures are of all images, not of the split's
    panoptic = _panoptic_jobs(other, metadata)
    report.findings += other.findings
    for image_id in sorted(spoken - panoptic.keys()):
        place = Place(metadata.panoptic_json, f"image {image_id}")
        message = "refs speak of it, but it has no panoptic annotation"
        report.add("unknown-image", place, message)
    return used + [replace(job, image=jobs[job.image_id].image) for job in _used(panoptic, spoken)]


def _records(report: Report, metadata: Any) -> list[_ImageJob]:
    """Whatever the catalog gives, for datasets of unknown files."""
    name = report.name
    records = report.attempt("reader", Place(name, "loading"), DatasetCatalog.get, name) or []
    jobs: dict[str, _ImageJob] = {}
    for number, record in enumerate(tqdm(records, desc="records", disable=None)):
        place = Place(name, f"record {number}, image {record.get('image_id')}")
        job = report.attempt("field", place, _record_job, record, name)
        if job is not None and job.image not in jobs:
            jobs[job.image] = job
            report.attempt("masks", place, load_from_record, record)
    report.count("records", len(records))
    return list(jobs.values())


def _record_job(record: dict[str, Any], name: str) -> _ImageJob:
    absent = [k for k in ("file_name", "image_id", "height", "width") if k not in record]
    if absent:
        raise ValueError(f"the record has no {', '.join(absent)}")
    size = (int(record["height"]), int(record["width"]))
    return _ImageJob(str(record["image_id"]), str(record["file_name"]), size, name, None, None)


_CHECKS = {
    "panoptic": _panoptic,
    "png": _png,
    "captions": _captions,
    "entityseg": _entityseg,
    "refcoco": _refcoco,
    "records": _records,
}

"""Validating a registered dataset from its files: all problems at once, not the first one only.

The readers go through the files with a `Report`, which notes what is wrong and lets them go on;
then every picture and its masks are opened in worker processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tqdm import tqdm

from gella.data.panoptic import load_instances
from gella.data.records import Place, Problems, as_records, check_record, read_json
from gella.data.register import read_dataset, record_place, refcoco_name
from gella.data.targets import EntityMatcher
from gella.entities.entity_map import EntityMap
from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation
from gella.entities.sources import load_from_record
from gella.utils.io import image_key

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
class Report(Problems):
    """All findings of a dataset, in order, and counts by what is counted.

    ``form`` says how its files are made, as in the metadata; ``known`` has published counts:
    ``{"value", "source", "exact"}`` by what is counted.
    """

    name: str
    form: str
    figures: dict[str, int] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def wrong(self, kind: str, place: Place, message: str) -> None:
        """Note an error."""
        self.note(kind, place, message, "error")

    def note(self, kind: str, place: Place, message: str, level: str = "warning") -> None:
        """Note a problem of a record; arguments as `Finding`."""
        self.findings.append(Finding(kind, str(place.path), place.where, message, level))

    def attempt(self, kind: str, place: Place, make: Callable[..., Any], *args: Any) -> Any:
        """The result of ``make(*args)``; errors that wrong data cause are noted (None)."""
        try:
            return make(*args)
        except (KeyError, OSError, TypeError, ValueError) as error:
            self.wrong(kind, place, " ".join(str(error).split()) or type(error).__name__)
            return None

    def count(self, what: str, number: int = 1) -> None:
        """Add to a figure; figures are shown in the order in which they were first named."""
        self.figures[what] = self.figures.get(what, 0) + number

    def uncounted(self) -> Report:
        """A report that adds its findings to this one and counts for itself."""
        return Report(self.name, self.form, findings=self.findings)

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
# PNG is made of them; papers that use it count one to three percent less, what they could align.
_NARRATIVES = "Localized Narratives of COCO"
_KNOWN = {
    "gella_coco_panoptic_train2017": {"images": Known(118_287, _COCO)},
    "gella_coco_panoptic_val2017": {"images": Known(5_000, _COCO)},
    **{
        f"gella_coco_{name}2017": {"narratives": Known(number, _NARRATIVES, exact=False)}
        for name, number in (("png_train", 134_272), ("png_val", 8_573), ("nouns_val", 8_573))
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

    The shapes say in their ``meta.json`` how many there are. Returns numbers by what they count:
    "images", "narratives", "refs", "expressions"; none for a dataset that nobody has published.
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
    """One image to look at."""

    image_id: str
    image: str  # the picture's file
    size: tuple[int, int]  # (height, width) according to the annotation
    annotation: str  # the JSON file that says so
    png: str | None = None  # panoptic; without one the segments have outlines
    segments: list[dict[str, Any]] | None = None  # None: only the picture is looked at


def check_dataset(name: str, *, limit: int | None = None, workers: int = 1) -> Report:
    """Validate a dataset: its annotation files whole, its pictures and masks up to a limit.

    Args:
        name: in the catalogs. Datasets registered by `gella.data.register` are looked through file
            by file; for others, the records that the catalog gives are.
        limit: images to open; None opens all of those the dataset uses.
        workers: processes that open them; 1 does it in this one.

    Returns:
        The report. Without an error in it, the dataset can be read.

    Raises:
        KeyError: no dataset has this name.
    """
    if name not in DatasetCatalog.list():
        raise KeyError(name)
    metadata = MetadataCatalog.get(name)
    form = metadata.get("form", "records")
    report = Report(name, form)
    jobs = _record_jobs(report) if form == "records" else _file_jobs(report, metadata)
    unread = any(finding.kind == "file" for finding in report.findings)
    for what, known in known_counts(name, metadata).items():
        number = report.figures.get(what, 0)
        report.known[what] = known._asdict()
        allowed = 0 if known.exact else 0.03 * known.value
        if abs(number - known.value) > allowed and not unread:
            message = f"{number:,} {what}, but {known.source} has {known.value:,}"
            level = "error" if known.exact else "warning"
            report.note("count", Place(name, what), message, level)
    opened = jobs[:limit]
    # Decoding is all the work; findings are small to send back.
    pool = Pool(workers) if workers > 1 and len(opened) > 1 else None
    with pool or contextlib.nullcontext():
        found: Iterable[list[Finding]] = map(_check_image, opened)
        if pool:
            found = pool.imap(_check_image, opened, max(1, min(32, len(opened) // workers)))
        named: dict[str, Any] = {"desc": "images and masks", "unit": "image", "disable": None}
        for findings in tqdm(found, total=len(opened), **named):
            report.findings.extend(findings)
    report.count("images opened", len(opened))
    report.count("images to open", len(jobs))
    return report


def _file_jobs(report: Report, metadata: Any) -> list[_ImageJob]:
    """Read a dataset's files to their ends; a job for every image and annotation that it uses."""
    records = read_dataset(report.name, report)
    # Several narratives tell of one image: its files are opened once.
    _, first = np.unique(records.image_ids(), return_index=True)
    used = [records[place] for place in sorted(first.tolist())]
    jobs = [_job(record, record["entities"], metadata) for record in used]
    if metadata.form == "refcoco" and metadata.get("panoptic_json") is not None:
        # The objects are spoken of, and the panoptic segments are the entities.
        options = {"names_of_2017": metadata.names_of_2017, "problems": Report("", "")}
        objects = load_instances(metadata.instances_json, metadata.image_root, (), **options)
        ids = {image_key(record["image_id"]) for record in used}
        jobs += [
            _job(record, record["entities"], metadata)
            for record in objects
            if image_key(record["image_id"]) in ids
        ]
    return jobs


def _job(record: dict[str, Any], entities: dict[str, Any], metadata: Any) -> _ImageJob:
    panoptic = entities["format"] == "panoptic_png"
    return _ImageJob(
        str(record["image_id"]),
        record["file_name"],
        (record["height"], record["width"]),
        str(metadata.panoptic_json if panoptic else entities["file_name"]),
        entities["file_name"] if panoptic else None,
        entities["segments_info"],
    )


def _record_jobs(report: Report) -> list[_ImageJob]:
    """Whatever the catalog gives, for datasets of unknown files."""
    name = report.name
    dataset = record_place(name, report)
    records = as_records(report.attempt("reader", dataset, DatasetCatalog.get, name) or [])
    jobs: dict[str, _ImageJob] = {}
    matchers: dict[str, EntityMatcher] = {}  # by picture, where its masks can be read
    for number, record in enumerate(tqdm(records, desc="records", disable=None)):
        where, found = f"record {number}, {record.get('file_name')}", len(report.findings)
        place = dataset.at(where)
        check_record(record, place)
        if len(report.findings) > found:
            continue
        image = record["file_name"]
        if image not in jobs:
            size = (record["height"], record["width"])
            jobs[image] = _ImageJob(str(record["image_id"]), image, size, name)
            entities = report.attempt("masks", place, load_from_record, record)
            if entities is not None:
                matchers[image] = EntityMatcher(entities, record["entities"].get("segments_info"))
        asked = "caption" in record and {"extract", "ground"} & set(record["tasks"])
        for phrase in record["phrases"] if asked else ():
            ids = phrase["segment_ids"]
            report.count("nouns of unknown masks", ids is None)
            if image in matchers:
                report.attempt("phrase-without-mask", place, matchers[image].entity_indices, ids)
    report.count("records", len(records))
    return list(jobs.values())


def _check_image(job: _ImageJob) -> list[Finding]:
    """Everything that is wrong with an image's files; a missing or damaged one is a finding."""
    report = Report("", "")

    def add(kind: str, file: str, message: str, level: str = "error") -> None:
        report.note(kind, Place(file, f"image {job.image_id}"), message, level)

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
        entities = EntityMap.from_id_image(ids)
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
    areas = dict(zip(entities.segment_ids, entities.areas().tolist()))
    listed = {int(segment["id"]): segment for segment in job.segments or []}
    for segment_id, area in areas.items():
        if segment_id not in listed:
            add("unlisted-id", path, f"{area} pixels have id {segment_id}, not in {job.annotation}")
    for segment_id, segment in listed.items():
        area = areas.get(segment_id, 0)
        if not area:
            add("absent-id", path, f"no pixel has id {segment_id}, which {job.annotation} lists")
        elif segment.get("area") is not None and segment["area"] != area:
            said = f"segment {segment_id} has {area} pixels but area {segment['area']}"
            add("area", job.annotation, said, "warning")


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

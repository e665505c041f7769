"""Validating a registered dataset from its files: all problems at once, not the first one only."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import replace
from multiprocessing import Pool
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from gella.data.check_files import Jobs, check_instances, check_panoptic
from gella.data.check_pixels import ImageJob, check_image
from gella.data.check_report import Finding, Report
from gella.data.check_words import check_captions, check_narratives, check_refs
from gella.data.entityseg import locate_images
from gella.data.known_counts import known_counts
from gella.entities.sources import load_from_record

__all__ = ["check_dataset"]


def check_dataset(name: str, *, limit: int | None = None, workers: int = 1) -> Report:
    """Validate a dataset: its annotation files whole, its pictures and masks up to a limit.

    Args:
        name: in the catalogs. Datasets registered by `gella.data.datasets` are looked through file
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
        found = report.figures.get(what, 0)
        report.known[what] = {"value": known.value, "source": known.source, "exact": known.exact}
        if found != known.value and not unread:
            message = f"{found:,} {what}, but {known.source} has {known.value:,}"
            report.add("count", name, what, message, "error" if known.exact else "warning")
    _open_images(report, jobs if limit is None else jobs[:limit], workers)
    report.count("images to open", len(jobs))
    if form != "records" and not report.number("error"):
        report.attempt("reader", name, "loading", DatasetCatalog.get, name)
    return report


def _open_images(report: Report, jobs: list[ImageJob], workers: int) -> None:
    bar = tqdm(total=len(jobs), desc="images and masks", unit="image", disable=None)
    with closing(_findings(jobs, workers)) as results, bar:
        for findings in results:
            report.findings.extend(findings)
            bar.update()
    report.count("images opened", len(jobs))


def _findings(jobs: list[ImageJob], workers: int) -> Generator[list[Finding], None, None]:
    if workers <= 1 or len(jobs) < 2:
        yield from map(check_image, jobs)
        return
    with Pool(workers) as pool:
        yield from pool.imap(check_image, jobs, chunksize=max(1, min(32, len(jobs) // workers)))


def _used(jobs: Jobs, images: Iterable[str]) -> list[ImageJob]:
    wanted = set(images)
    return [job for image_id, job in jobs.items() if image_id in wanted]


def _panoptic(report: Report, metadata: Any) -> list[ImageJob]:
    return list(check_panoptic(report, metadata).values())


def _png(report: Report, metadata: Any) -> list[ImageJob]:
    jobs = check_panoptic(report, metadata)
    return _used(jobs, check_narratives(report, metadata, jobs))


def _captions(report: Report, metadata: Any) -> list[ImageJob]:
    jobs = check_panoptic(report, metadata)
    return _used(jobs, check_captions(report, metadata, jobs))


def _entityseg(report: Report, metadata: Any) -> list[ImageJob]:
    jobs = check_instances(report, metadata)
    used = _used(jobs, check_captions(report, metadata, jobs))
    root = metadata.image_root
    places = report.attempt(
        "duplicate-image", root, "folders", lambda: locate_images(root, (j.image for j in used))
    )
    return used if places is None else [replace(job, image=places[job.image]) for job in used]


def _refcoco(report: Report, metadata: Any) -> list[ImageJob]:
    jobs = check_instances(report, metadata)
    spoken = check_refs(report, metadata, jobs)
    used = _used(jobs, spoken)
    if metadata.get("panoptic_json") is None:
        return used
    other = Report(report.name, report.form)  # its figures are of all images, not of the split's
    panoptic = check_panoptic(other, metadata)
    report.findings += other.findings
    for image_id in sorted(spoken - panoptic.keys()):
        message = "refs speak of it, but it has no panoptic annotation"
        report.add("unknown-image", metadata.panoptic_json, f"image {image_id}", message)
    return used + [replace(job, image=jobs[job.image_id].image) for job in _used(panoptic, spoken)]


def _records(report: Report, metadata: Any) -> list[ImageJob]:
    """Whatever the catalog gives, for datasets of unknown files."""
    name = report.name
    records = report.attempt("reader", name, "loading", DatasetCatalog.get, name) or []
    jobs: dict[str, ImageJob] = {}
    for place, record in enumerate(tqdm(records, desc="records", disable=None)):
        where = f"record {place}, image {record.get('image_id')}"
        job = report.attempt("field", name, where, _job, record, name)
        if job is not None and job.image not in jobs:
            jobs[job.image] = job
            report.attempt("masks", name, where, load_from_record, record)
    report.count("records", len(records))
    return list(jobs.values())


def _job(record: dict[str, Any], name: str) -> ImageJob:
    absent = [k for k in ("file_name", "image_id", "height", "width") if k not in record]
    if absent:
        raise ValueError(f"the record has no {', '.join(absent)}")
    size = (int(record["height"]), int(record["width"]))
    return ImageJob(str(record["image_id"]), str(record["file_name"]), size, name, None, None)


_CHECKS = {
    "panoptic": _panoptic,
    "png": _png,
    "captions": _captions,
    "entityseg": _entityseg,
    "refcoco": _refcoco,
    "records": _records,
}

"""Checks that open an image and its masks: one job per image, run in worker processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from gella.data.check_report import Finding
from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation

__all__ = ["ImageJob", "check_image"]


@dataclass
class ImageJob:
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


def check_image(job: ImageJob) -> list[Finding]:
    """Everything that is wrong with an image's files; a missing or damaged one is a finding."""
    findings: list[Finding] = []

    def add(kind: str, file: str, message: str, level: str = "error") -> None:
        findings.append(Finding(kind, file, f"image {job.image_id}", message, level))

    _check_picture(job, add)
    if job.segments is None:
        return findings
    if job.png is not None:
        _check_png(job, add)
    else:
        _check_outlines(job, add)
    if all(segment.get("iscrowd", 0) for segment in job.segments):
        add("no-entity", job.annotation, f"no entity among {len(job.segments)} segments")
    return findings


def _check_picture(job: ImageJob, add: Any) -> None:
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


def _sizes(size: tuple[int, int], job: ImageJob) -> str:
    swapped = "; the sides are swapped" if size == job.size[::-1] else ""
    return (
        f"is {size[1]}x{size[0]} pixels but {job.annotation} says {job.size[1]}x{job.size[0]} "
        f"(width x height){swapped}"
    )


def _check_png(job: ImageJob, add: Any) -> None:
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


def _check_outlines(job: ImageJob, add: Any) -> None:
    for segment in job.segments or []:
        where = f"segment {segment.get('id')}"
        try:
            mask = decode_segmentation(segment["segmentation"], job.size)
        except (KeyError, TypeError, ValueError) as error:
            add("bad-mask", job.annotation, f"{where}: {' '.join(str(error).split())}")
            continue
        if not mask.any() and not segment.get("iscrowd", 0):
            add("zero-area", job.annotation, f"{where} has no pixel")

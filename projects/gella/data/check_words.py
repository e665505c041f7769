"""Checks of narratives, captions and referring expressions; they go on after a problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from gella.data.check_files import Jobs
from gella.data.check_report import Report
from gella.data.narratives import read_narratives
from gella.data.reading import field, json_lines, listed, text, whole
from gella.data.refcoco import read_refs
from gella.text.prompts import align_utterances, locate_phrases

__all__ = ["check_captions", "check_narratives", "check_refs"]


def check_narratives(report: Report, metadata: Any, jobs: Jobs) -> set[str]:
    """Look through narratives in the form of PNG (docs/FORMATS.md 2).

    Args:
        report: takes the findings and the figures, among them "ungrounded nouns" (no segment) and
            "crowd-only phrases" (no input entity can be meant).
        metadata: ``json_file``.
        jobs: of the panoptic annotation; only their segments are used.

    Returns the ids, as text, of the images that are spoken of.
    """
    path = metadata.json_file
    report.start("narratives", "images with narratives", "noun phrases", "utterances")
    narratives = report.attempt("file", path, "the file", read_narratives, path) or []
    seen: set[tuple[str, str]] = set()
    spoken: set[str] = set()
    crowds = {
        image_id: {s["id"]: bool(s["iscrowd"]) for s in job.segments or []}
        for image_id, job in jobs.items()
    }
    for place, narrative in enumerate(tqdm(narratives, desc="narratives", disable=None)):
        where = f"narrative {place}"
        read = report.attempt("field", path, where, _narrative, narrative, path, where)
        if read is None:
            continue
        image_id, caption, segments = read
        where += f", image {image_id}"
        if image_id not in crowds:
            message = f"image {image_id} is not in {metadata.panoptic_json}"
            report.add("unknown-image", path, where, message)
            continue
        spoken.add(image_id)
        if (image_id, caption) in seen:
            report.add("duplicate-narrative", path, where, "the same words again", "warning")
        seen.add((image_id, caption))
        _check_phrases(report, path, where, segments, crowds[image_id])
        _check_spans(report, path, where, caption, segments)
    report.count("narratives", len(narratives))
    report.count("images with narratives", len(spoken))
    return spoken


def _narrative(narrative: Any, path: str, where: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Image id, caption and segments, or a ValueError for the first field that is wrong."""
    segments = listed(narrative, "segments", path, where)
    for segment in segments:
        text(segment, "utterance", path, where)
        listed(segment, "segment_ids", path, where)
    image_id = str(field(narrative, "image_id", path, where))
    return image_id, text(narrative, "caption", path, where), segments


def _check_phrases(
    report: Report, path: str, where: str, segments: list[dict[str, Any]], crowds: dict[int, bool]
) -> None:
    nouns = 0
    for segment in segments:
        ids, said = segment["segment_ids"], f"{where}, {segment['utterance'][:40]!r}"
        if not ids and not segment.get("noun", False):
            continue
        nouns += 1
        known = [int(i) for i in ids if str(i).isdecimal() and int(i) in crowds]
        if len(known) < len(ids):
            unknown = [i for i in ids if not str(i).isdecimal() or int(i) not in crowds]
            message = f"segment ids {unknown[:5]} are not among the image's {len(crowds)} segments"
            report.add("phrase-without-mask", path, said, message)
        report.count("ungrounded nouns", not ids)
        report.count("crowd-only phrases", bool(known) and all(crowds[i] for i in known))
    report.count("noun phrases", nouns)
    if not nouns:
        report.add("no-noun", path, where, "it is left out: it names nothing", "warning")


def _check_spans(
    report: Report, path: str, where: str, caption: str, segments: list[dict[str, Any]]
) -> None:
    utterances = [segment["utterance"] for segment in segments]
    report.count("utterances", sum(bool(words.strip()) for words in utterances))
    for words, span in zip(utterances, align_utterances(caption, utterances)):
        if span is None and words.strip():
            message = f"{words[:60]!r} is not in the caption as written: {caption[:60]!r}"
            report.add("unaligned", path, where, message, "warning")


def check_captions(report: Report, metadata: Any, jobs: Jobs) -> set[str]:
    """Look through generated captions, JSON lines of docs/FORMATS.md 4; as `check_narratives`."""
    path = metadata.json_file
    report.start("captions", "images with captions", "nouns")
    lines = report.attempt("file", path, "the file", lambda: list(json_lines(path))) or []
    spoken: set[str] = set()
    seen: set[tuple[str, Any, str]] = set()
    for number, line in tqdm(lines, desc="captions", disable=None):
        where = f"line {number}"
        if isinstance(line, ValueError):
            report.add("line", path, where, str(line))
            continue
        read = report.attempt("field", path, where, _caption, line, path, where)
        if read is None:
            continue
        image_id, caption, nouns = read
        where += f", image {image_id}"
        if image_id not in jobs:
            report.add("unknown-image", path, where, "the annotation has no such image")
            continue
        spoken.add(image_id)
        said, known = line.get("file_name"), Path(jobs[image_id].image).name
        if said and Path(str(said)).name != known:
            report.add("other-image", path, where, f"is of {said}, but the image is {known}")
        key = (image_id, line.get("prompt_id"), caption)
        if key in seen:
            report.add("duplicate-caption", path, where, "the same caption again", "warning")
        seen.add(key)
        _check_nouns(report, path, where, caption, nouns)
    report.count("captions", len(lines))
    report.count("images with captions", len(spoken))
    return spoken


def _caption(line: Any, path: str, where: str) -> tuple[str, str, list[str]]:
    nouns = [str(noun) for noun in listed(line, "nouns", path, where)]
    image_id = str(field(line, "image_id", path, where))
    return image_id, text(line, "description", path, where), nouns


def _check_nouns(report: Report, path: str, where: str, caption: str, nouns: list[str]) -> None:
    report.count("nouns", len(nouns))
    if not caption.strip():
        report.add("empty", path, where, "the description is empty")
    elif not nouns:
        report.add("no-noun", path, where, "no noun: noun extraction cannot use it")
    for noun, span in zip(nouns, locate_phrases(caption, nouns)):
        if span is None:
            message = f"noun {noun[:40]!r} is not in the description after those before it"
            report.add("noun-not-in-text", path, where, message)


def check_refs(report: Report, metadata: Any, jobs: Jobs) -> set[str]:
    """Look through the refs of a split (docs/FORMATS.md 3); as `check_narratives`."""
    path, split = metadata.json_file, metadata.split
    report.start("refs", "images", "expressions")
    refs = report.attempt("file", path, "the file", read_refs, path) or []
    objects = {
        image_id: {s["id"]: bool(s.get("iscrowd", 0)) for s in job.segments or []}
        for image_id, job in jobs.items()
    }
    spoken: set[str] = set()
    ref_ids: set[Any] = set()
    for place, ref in enumerate(tqdm(refs, desc="refs", disable=None)):
        where = f"ref {place}"
        read = report.attempt("field", path, where, _ref, ref, path, where)
        if read is None or ref["split"] != split:
            continue
        ref_id, image_id, target, sentences = read
        where = f"ref {ref_id}, image {image_id}"
        report.count("refs")
        if ref_id in ref_ids:
            report.add("duplicate-ref", path, where, "the ref_id occurs twice")
        ref_ids.add(ref_id)
        if target not in objects.get(image_id, {}):
            message = f"object {target} is not in {metadata.instances_json}"
            report.add("phrase-without-mask", path, where, message)
            continue
        spoken.add(image_id)
        if objects[image_id][target]:
            message = f"object {target} is a crowd, which is no input entity"
            report.add("crowd", path, where, message, "warning")
        report.count("expressions", len(sentences))
        if not all(sentence.strip() for sentence in sentences) or not sentences:
            report.add("empty", path, where, f"an empty expression among {len(sentences)}")
    report.count("images", len(spoken))
    return spoken


def _ref(ref: Any, path: str, where: str) -> tuple[Any, str, int, list[str]]:
    field(ref, "split", path, where)
    ref_id = field(ref, "ref_id", path, where)
    sentences = [text(s, "sent", path, where) for s in listed(ref, "sentences", path, where)]
    image_id = str(field(ref, "image_id", path, where))
    return ref_id, image_id, whole(ref, "ann_id", path, where), sentences

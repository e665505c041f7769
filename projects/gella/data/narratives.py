"""Captions as dataset dicts: Panoptic Narrative Grounding and EntitySeg-style descriptions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gella.data.panoptic import load_coco_panoptic
from gella.data.records import STOP, Place, Problems, RecordStore, json_lines, read_json
from gella.text.spans import align_utterances, locate_phrases

_logger = logging.getLogger(__name__)


def load_png(
    png_json: str | Path,
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("ground",),
    problems: Problems = STOP,
) -> RecordStore:
    """Read Panoptic Narrative Grounding, one dataset dict per narrative (docs/FORMATS.md 2).

    Arguments are those of `load_coco_panoptic`, and the file of the narratives.

    Returns:
        The image's panoptic dict and ``annotator_id``, ``caption``, ``phrases``. A phrase is every
        segment that is a noun or has ids: ``text`` (as it stands in the caption), ``start, end``,
        ``segment_ids`` (empty for an ungrounded noun), ``is_plural`` (the file's flag; count the
        ids for the rule by number), ``is_thing`` (category of the last segment, None without ids).
        Ids of crowd segments stay in ``segment_ids``: the truth of a phrase is the union of all
        its segments, although a crowd is no input entity. An utterance that does not occur in
        the caption keeps its place with ``start = end = -1`` and its own text, and is counted in a
        warning; narratives without any noun, or with one whose ``segment_ids`` are null (to be
        filled in), are left out and counted too.

    Raises:
        FileNotFoundError: one of the two JSON files is missing.
        ValueError: a narrative is of an unknown image or names an unknown segment id; the message
            gives the file, the image and the id.
    """
    panoptic = load_coco_panoptic(panoptic_json, panoptic_root, image_root, tasks, problems)
    for figure in ("narratives", "images with narratives", "noun phrases", "utterances"):
        problems.count(figure, 0)
    numbers = panoptic.numbers_by_image()
    file = Place(png_json, problems=problems)
    narratives = file.read(read_narratives) or []
    lost, left_out, store = 0, 0, panoptic.derived()
    seen: set[int] = set()
    spoken: set[str] = set()
    for number, narrative in enumerate(narratives):
        image_id = file.at(f"narrative {number}").image_id(narrative)
        place = file.at(f"narrative {number}, image {image_id}")
        if image_id is not None and image_id not in numbers:
            place.stranger(narratives[number : number + 50], numbers, panoptic_json)
        elif image_id is not None:
            segments = panoptic.shared(numbers[image_id])["entities"]["segments_info"]
            own = _with_narrative(narrative, segments, place, seen)
            spoken.add(image_id)
            left_out += not own["phrases"]
            if own["phrases"]:
                store.add(numbers[image_id], own)
                lost += sum(phrase["start"] < 0 for phrase in own["phrases"])
        narratives[number] = {}  # a large file: what is stored need not stay here too
    problems.count("narratives", len(narratives))
    problems.count("images with narratives", len(spoken))
    _report(png_json, lost, left_out)
    return store


def _with_narrative(
    narrative: Any, segments_info: list[dict[str, Any]], place: Place, seen: set[int]
) -> dict[str, Any]:
    """Caption, author and phrases; ``seen`` holds the hashes of narratives before."""
    caption = place.text(narrative, "caption")
    segments = place.listed(narrative, "segments")
    utterances = [place.text(segment, "utterance") for segment in segments]
    if None in (caption, *utterances):
        return {"phrases": []}
    words = hash((str(narrative["image_id"]), caption))  # the texts themselves would stay in memory
    if words in seen:
        place.note("duplicate-narrative", "the same words again")
    seen.add(words)
    unfilled = sum(segment.get("segment_ids", ()) is None for segment in segments)
    if unfilled:
        place.note("unfilled", f"segment_ids of {unfilled} nouns are null: it is left out")
        return {"phrases": []}
    spans = align_utterances(caption, utterances)
    place.problems.count("utterances", sum(bool(text.strip()) for text in utterances))
    for text, span in zip(utterances, spans):
        if span is None and text.strip():
            said = f"{text[:60]!r} is not in the caption as written: {caption[:60]!r}"
            place.note("unaligned", said)
    phrases = _phrases(segments, caption, spans, segments_info, place)
    if not phrases:
        place.note("no-noun", "it is left out: it names nothing")
    author = narrative.get("annotator_id")
    return {"caption": caption, "phrases": phrases, "annotator_id": author}


def read_narratives(png_json: str | Path) -> list[dict[str, Any]]:
    """The narratives of a PNG file as they are, or a ValueError when it holds something else."""
    # The two JSON files are easily swapped; the panoptic one holds a dict.
    narratives = read_json(png_json)
    if not isinstance(narratives, list):
        raise ValueError(
            f"{png_json}: holds a {type(narratives).__name__}, not a list of narratives; is it the "
            "panoptic file?"
        )
    return narratives


def _report(path: str | Path, lost: int, left_out: int = 0) -> None:
    """Log what is not as it should be, once a file."""
    if lost:
        message = "%s: %d phrases are not in their captions as written; kept without a span"
        _logger.warning(message, path, lost)
    if left_out:
        _logger.warning("%s: left out %d narratives: no noun, or null segment_ids", path, left_out)


def _phrases(
    segments: list[dict[str, Any]],
    caption: str,
    spans: list[tuple[int, int] | None],
    segments_info: list[dict[str, Any]],
    narrative: Place,
) -> list[dict[str, Any]]:
    annotated = {segment["id"]: segment for segment in segments_info}
    phrases = []
    for segment, span in zip(segments, spans):
        names = narrative.listed(segment, "segment_ids")
        if not names and not segment.get("noun", False):
            continue
        ids = [int(n) for n in names if str(n).isdecimal() and int(n) in annotated]
        if len(ids) < len(names):
            unknown = [n for n in names if not str(n).isdecimal() or int(n) not in annotated]
            narrative.at(f"{narrative.where}, {segment['utterance'][:40]!r}").wrong(
                "phrase-without-mask",
                f"segment id {', '.join(map(str, unknown[:5]))} is not in the image's panoptic "
                f"annotation, which has {len(annotated)} segments; use the annotation that the "
                "file was made for",
            )
        plural = bool(segment.get("plural", len(ids) > 1))
        # The benchmark's rule for a plural's kind is the category of its last segment.
        thing = bool(annotated[ids[-1]]["isthing"]) if ids else None
        phrases.append(_phrase(segment["utterance"], caption, span, ids, plural, thing))
        crowd = bool(ids) and all(annotated[i]["iscrowd"] for i in ids)
        narrative.problems.count("ungrounded nouns", not names)
        narrative.problems.count("crowd-only phrases", crowd)
    narrative.problems.count("noun phrases", len(phrases))
    return phrases


def _phrase(
    words: str,
    caption: str,
    span: tuple[int, int] | None,
    segment_ids: list[int] | None,
    is_plural: bool | None,
    is_thing: bool | None,
) -> dict[str, Any]:
    start, end = span or (-1, -1)
    return {
        "text": caption[start:end] if span else words,
        "start": start,
        "end": end,
        "segment_ids": segment_ids,
        "is_plural": is_plural,
        "is_thing": is_thing,
    }


def load_captions(
    captions_jsonl: str | Path,
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("describe", "extract"),
    problems: Problems = STOP,
) -> RecordStore:
    """Read generated captions, one dataset dict per line (docs/FORMATS.md 4).

    The lines are ``{image_id, file_name, description, nouns, model, prompt_id}``, the other
    arguments those of `load_coco_panoptic`, whose dicts get what `with_captions` adds.
    """
    images = load_coco_panoptic(panoptic_json, panoptic_root, image_root, tasks, problems)
    return with_captions(images, captions_jsonl, panoptic_json, problems)


def with_captions(
    images: RecordStore,
    captions_jsonl: str | Path,
    annotation: str | Path,
    problems: Problems = STOP,
) -> RecordStore:
    """One dataset dict per caption line, over the images of an annotation.

    Args:
        images: dicts of the images.
        captions_jsonl: see `load_captions`.
        annotation: the file that ``images`` come from, for errors.

    Returns:
        The image's dict and ``caption``, ``phrases`` with ``segment_ids`` None, for what the nouns
        name is not known; ``is_plural`` and ``is_thing`` are None too. A noun that is not in its
        description keeps ``start = end = -1`` and is counted in a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line lacks a field, or names an unknown image or another file name than the
            annotation has for the image; the message gives the file, the caption and the image.
    """
    for figure in ("captions", "images with captions", "nouns"):
        problems.count(figure, 0)
    numbers = images.numbers_by_image()
    file = Place(captions_jsonl, problems=problems)
    store, lost = images.derived(), 0
    seen: set[tuple[Any, ...]] = set()
    spoken: set[str] = set()
    lines = file.read(lambda path: list(json_lines(path))) or []
    for index, (number, line) in enumerate(lines):
        if isinstance(line, ValueError):
            said = str(line).removeprefix(f"{file.path}: ")
            file.at(f"line {number}").wrong("line", said)
            continue
        image_id = file.at(f"caption {number}").image_id(line)
        place = file.at(f"caption {number}, image {image_id}")
        if image_id is not None and image_id not in numbers:
            next_ones = [line for _, line in lines[index : index + 50]]
            place.stranger(next_ones, numbers, annotation)
        elif image_id is not None:
            file_name = images.shared(numbers[image_id])["file_name"]
            own = _with_caption(line, Path(file_name).name, place, seen)
            spoken.add(image_id)
            store.add(numbers[image_id], own)
            lost += sum(phrase["start"] < 0 for phrase in own["phrases"])
    problems.count("captions", len(lines))
    problems.count("images with captions", len(spoken))
    _report(captions_jsonl, lost)
    return store


def _with_caption(
    line: dict[str, Any], file_name: str, place: Place, seen: set[tuple[Any, ...]]
) -> dict[str, Any]:
    """Caption and phrases of one line; ``seen`` holds what tells the lines before apart."""
    caption, nouns = place.text(line, "description") or "", place.listed(line, "nouns")
    # Ids of two datasets may be equal: a caption of another file is refused.
    said = line.get("file_name")
    if said and Path(str(said)).name != file_name:
        mixed = "the captions and the annotation belong to different datasets"
        place.wrong("other-image", f"it is of {said}, but that image is {file_name}; {mixed}")
    key = (str(line["image_id"]), line.get("prompt_id"), hash(caption))
    if key in seen:
        place.note("duplicate-caption", "the same caption again")
    seen.add(key)
    if not caption.strip():
        place.note("empty", "the description is empty", "error")
    elif not nouns:
        place.note("no-noun", "no noun: noun extraction cannot use it", "error")
    for k, noun in enumerate(nouns):
        if not isinstance(noun, str) or not noun.strip():
            place.wrong("field", f"noun {k} is {noun!r}, not text")
    nouns = [str(noun) for noun in nouns]
    spans = locate_phrases(caption, nouns)
    for noun, span in zip(nouns, spans):
        if span is None:
            there = "is not in the description after those before it"
            place.note("noun-not-in-text", f"noun {noun[:40]!r} {there}", "error")
    place.problems.count("nouns", len(nouns))
    phrases = [_phrase(n, caption, span, None, None, None) for n, span in zip(nouns, spans)]
    return {"caption": caption, "phrases": phrases}

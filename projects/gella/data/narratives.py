"""Captions as dataset dicts: Panoptic Narrative Grounding and EntitySeg-style descriptions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gella.data.coco_panoptic import load_coco_panoptic
from gella.data.reading import field, listed, read_json, read_json_lines, text
from gella.data.record_store import RecordStore
from gella.text.prompts import align_utterances, locate_phrases

__all__ = ["load_captions", "load_png", "read_narratives", "with_captions"]

_logger = logging.getLogger(__name__)


def load_png(
    png_json: str | Path,
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("ground",),
) -> RecordStore:
    """Read Panoptic Narrative Grounding, one dataset dict per narrative (docs/FORMATS.md 2).

    Args:
        png_json: the narratives.
        panoptic_json, panoptic_root, image_root: as `load_coco_panoptic`.
        tasks: what the records can train and serve.

    Returns:
        The image's panoptic dict and ``annotator_id``, ``caption``, ``phrases``. A phrase is every
        segment that is a noun or has ids: ``text`` (as it stands in the caption), ``start, end``,
        ``segment_ids`` (empty for an ungrounded noun), ``is_plural`` (the file's flag; count the
        ids for the rule by number), ``is_thing`` (category of the last segment, None without ids).
        Ids of crowd segments stay in ``segment_ids``: the truth of a phrase is the union of all
        its segments, although a crowd is no input entity. An utterance that does not occur in
        the caption keeps its place with ``start = end = -1`` and its own text, and is counted in a
        warning; narratives without any noun are left out and counted too.

    Raises:
        FileNotFoundError: one of the two JSON files is missing.
        ValueError: a narrative is of an unknown image or names an unknown segment id; the message
            gives the file, the image and the id.
    """
    panoptic = load_coco_panoptic(panoptic_json, panoptic_root, image_root, tasks)
    numbers = panoptic.numbers_by_image()
    narratives = read_narratives(png_json)
    total, lost = len(narratives), 0
    store = panoptic.derived()
    for place in range(total):
        image_id = str(field(narratives[place], "image_id", png_json, f"narrative {place}"))
        if image_id not in numbers:
            raise ValueError(
                f"{png_json}: image {image_id} is not in {panoptic_json}; both must be of one split"
            )
        image = panoptic.shared(numbers[image_id])
        own = _with_narrative(image, narratives[place], png_json)
        narratives[place] = {}  # a large file: what is stored need not stay here too
        if own["phrases"]:
            store.add(numbers[image_id], own)
            lost += sum(phrase["start"] < 0 for phrase in own["phrases"])
    _report(png_json, lost, total - len(store))
    return store


def read_narratives(png_json: str | Path) -> list[dict[str, Any]]:
    """The narratives of a PNG file as they are, or a ValueError when it holds something else."""
    narratives = read_json(png_json)
    if not isinstance(narratives, list):
        raise ValueError(
            f"{png_json}: holds a {type(narratives).__name__}, not a list of narratives; is it the "
            "panoptic file?"
        )
    return narratives


def _with_narrative(
    image: dict[str, Any], narrative: dict[str, Any], path: str | Path
) -> dict[str, Any]:
    caption = text(narrative, "caption", path, f"image {image['image_id']}")
    return {
        "caption": caption,
        "phrases": _phrases(narrative, caption, image, path),
        "annotator_id": narrative.get("annotator_id"),
    }


def _report(path: str | Path, lost: int, left_out: int = 0) -> None:
    """Log what is not as it should be, once a file."""
    if lost:
        message = "%s: %d phrases are not in their captions as written; kept without a span"
        _logger.warning(message, path, lost)
    if left_out:
        _logger.warning("%s: left out %d narratives without any noun", path, left_out)


def _phrases(
    narrative: dict[str, Any], caption: str, base: dict[str, Any], path: str | Path
) -> list[dict[str, Any]]:
    where = f"image {base['image_id']}"
    segments = listed(narrative, "segments", path, where)
    utterances = [text(segment, "utterance", path, where) for segment in segments]
    known = {segment["id"]: segment for segment in base["entities"]["segments_info"]}
    phrases = []
    for segment, span in zip(segments, align_utterances(caption, utterances)):
        ids = _segment_ids(listed(segment, "segment_ids", path, where), known, path, where)
        if not ids and not segment.get("noun", False):
            continue
        start, end = span if span is not None else (-1, -1)
        phrases.append(
            {
                "text": caption[start:end] if span is not None else segment["utterance"],
                "start": start,
                "end": end,
                "segment_ids": ids,
                "is_plural": bool(segment.get("plural", len(ids) > 1)),
                "is_thing": bool(known[ids[-1]]["isthing"]) if ids else None,
            }
        )
    return phrases


def _segment_ids(ids: list[Any], known: dict[int, Any], path: str | Path, where: str) -> list[int]:
    numbers = []
    for name in ids:
        if not str(name).isdecimal() or int(name) not in known:
            raise ValueError(
                f"{path}: {where}: segment id {name} is not in the image's panoptic annotation, "
                f"which has {len(known)} segments; use the annotation that the file was made for"
            )
        numbers.append(int(name))
    return numbers


def load_captions(
    captions_jsonl: str | Path,
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("describe", "extract"),
) -> RecordStore:
    """Read generated captions, one dataset dict per line (docs/FORMATS.md 4).

    Args:
        captions_jsonl: lines ``{image_id, file_name, description, nouns, model, prompt_id}``.
        panoptic_json, panoptic_root, image_root: where the images and their entities are, as
            `load_coco_panoptic`.
        tasks: what the records can train and serve.

    Returns:
        The image's panoptic dict with what `with_captions` adds.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as `with_captions`.
    """
    images = load_coco_panoptic(panoptic_json, panoptic_root, image_root, tasks)
    return with_captions(images, captions_jsonl, panoptic_json)


def with_captions(
    images: RecordStore, captions_jsonl: str | Path, annotation: str | Path
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
    numbers = images.numbers_by_image()
    store, lost = images.derived(), 0
    for place, line in enumerate(read_json_lines(captions_jsonl), start=1):
        image_id = str(field(line, "image_id", captions_jsonl, f"caption {place}"))
        where = f"caption {place}, image {image_id}"
        if image_id not in numbers:
            raise ValueError(f"{captions_jsonl}: {where} is not in {annotation}")
        _same_picture(line, images.shared(numbers[image_id]), captions_jsonl, where)
        caption = text(line, "description", captions_jsonl, where)
        nouns = listed(line, "nouns", captions_jsonl, where)
        for number, noun in enumerate(nouns):
            if not isinstance(noun, str) or not noun.strip():
                raise ValueError(f"{captions_jsonl}: {where}: noun {number} is {noun!r}, not text")
        spans = locate_phrases(caption, nouns)
        phrases = [
            {
                "text": noun if span is None else caption[span[0] : span[1]],
                "start": -1 if span is None else span[0],
                "end": -1 if span is None else span[1],
                "segment_ids": None,
                "is_plural": None,
                "is_thing": None,
            }
            for noun, span in zip(nouns, spans)
        ]
        lost += sum(span is None for span in spans)
        store.add(numbers[image_id], {"caption": caption, "phrases": phrases})
    _report(captions_jsonl, lost)
    return store


def _same_picture(
    line: dict[str, Any], image: dict[str, Any], path: str | Path, where: str
) -> None:
    """Refuse a caption that was written for another file: ids of two datasets may be equal."""
    said = line.get("file_name")
    if said and Path(str(said)).name != Path(image["file_name"]).name:
        raise ValueError(
            f"{path}: {where} is of {said}, but that image is {Path(image['file_name']).name}; the "
            "captions and the annotation belong to different datasets"
        )

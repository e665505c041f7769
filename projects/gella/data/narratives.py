"""Captions as dataset dicts: Panoptic Narrative Grounding and EntitySeg-style descriptions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gella.data.coco_panoptic import load_coco_panoptic
from gella.data.reading import field, read_json, read_json_lines
from gella.prompts import align_utterances, locate_phrases

__all__ = ["load_captions", "load_png"]

_logger = logging.getLogger(__name__)


def load_png(
    png_json: str | Path,
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("ground",),
) -> list[dict[str, Any]]:
    """Read Panoptic Narrative Grounding, one dataset dict per narrative (FORMATS section 2).

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
    by_image = {str(record["image_id"]): record for record in panoptic}
    narratives = read_json(png_json)
    records = []
    for narrative in narratives:
        image_id = str(field(narrative, "image_id", png_json, "a narrative"))
        if image_id not in by_image:
            raise ValueError(
                f"{png_json}: image {image_id} is not in {panoptic_json}; both must be of one split"
            )
        record = _with_narrative(by_image[image_id], narrative, png_json)
        if record["phrases"]:
            records.append(record)
    _report(png_json, records, len(narratives) - len(records))
    return records


def _with_narrative(
    base: dict[str, Any], narrative: dict[str, Any], path: str | Path
) -> dict[str, Any]:
    caption = str(field(narrative, "caption", path, f"image {base['image_id']}"))
    return {
        **base,
        "caption": caption,
        "phrases": _phrases(narrative, caption, base, path),
        "annotator_id": narrative.get("annotator_id"),
    }


def _report(path: str | Path, records: list[dict[str, Any]], left_out: int = 0) -> None:
    """Log what is not as it should be, once a file."""
    lost = sum(phrase["start"] < 0 for record in records for phrase in record["phrases"])
    if lost:
        message = "%s: %d phrases are not in their captions as written; kept without a span"
        _logger.warning(message, path, lost)
    if left_out:
        _logger.warning("%s: left out %d narratives without any noun", path, left_out)


def _phrases(
    narrative: dict[str, Any], caption: str, base: dict[str, Any], path: str | Path
) -> list[dict[str, Any]]:
    where = f"image {base['image_id']}"
    segments = field(narrative, "segments", path, where)
    utterances = [str(field(segment, "utterance", path, where)) for segment in segments]
    known = {segment["id"]: segment for segment in base["entities"]["segments_info"]}
    phrases = []
    for segment, span in zip(segments, align_utterances(caption, utterances)):
        ids = _segment_ids(field(segment, "segment_ids", path, where), known, path, where)
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
    for text in ids:
        if not str(text).isdigit() or int(text) not in known:
            raise ValueError(
                f"{path}: {where}: segment id {text} is not in the image's panoptic annotation, "
                f"which has {len(known)} segments; use the annotation that the file was made for"
            )
        numbers.append(int(text))
    return numbers


def load_captions(
    captions_jsonl: str | Path,
    panoptic_json: str | Path,
    panoptic_root: str | Path,
    image_root: str | Path,
    tasks: tuple[str, ...] = ("describe", "extract"),
) -> list[dict[str, Any]]:
    """Read generated captions, one dataset dict per line (FORMATS section 4).

    Args:
        captions_jsonl: lines ``{image_id, file_name, description, nouns, model, prompt_id}``.
        panoptic_json, panoptic_root, image_root: where the images and their entities are, as
            `load_coco_panoptic`.
        tasks: what the records can train and serve.

    Returns:
        The image's panoptic dict and ``caption``, ``phrases`` with ``segment_ids`` None, for what
        the nouns name is not known; ``is_plural`` and ``is_thing`` are None too. A noun that is
        not in its description keeps ``start = end = -1`` and is counted in a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line lacks a field or names an unknown image; the message gives the file.
    """
    panoptic = load_coco_panoptic(panoptic_json, panoptic_root, image_root, tasks)
    by_image = {str(record["image_id"]): record for record in panoptic}
    records = []
    for line in read_json_lines(captions_jsonl):
        image_id = str(field(line, "image_id", captions_jsonl, "a caption"))
        if image_id not in by_image:
            raise ValueError(f"{captions_jsonl}: image {image_id} is not in {panoptic_json}")
        where = f"image {image_id}"
        caption = str(field(line, "description", captions_jsonl, where))
        nouns = [str(noun) for noun in field(line, "nouns", captions_jsonl, where)]
        phrases = []
        for noun, span in zip(nouns, locate_phrases(caption, nouns)):
            start, end = span if span is not None else (-1, -1)
            phrases.append(
                {
                    "text": caption[start:end] if span is not None else noun,
                    "start": start,
                    "end": end,
                    "segment_ids": None,
                    "is_plural": None,
                    "is_thing": None,
                }
            )
        records.append({**by_image[image_id], "caption": caption, "phrases": phrases})
    _report(captions_jsonl, records)
    return records

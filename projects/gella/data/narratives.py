"""Captions as dataset dicts: Panoptic Narrative Grounding and EntitySeg-style descriptions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gella.data.panoptic import load_coco_panoptic
from gella.data.records import Place, RecordStore, json_lines, read_json
from gella.text.spans import align_utterances, locate_phrases

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
    for number in range(total):
        image_id = Place(png_json, f"narrative {number}").key(narratives[number], "image_id")
        if image_id not in numbers:
            raise ValueError(
                f"{png_json}: image {image_id} is not in {panoptic_json}; both must be of one split"
            )
        place = Place(png_json, f"image {image_id}")
        segments = panoptic.shared(numbers[image_id])["entities"]["segments_info"]
        caption = place.text(narratives[number], "caption")
        phrases = _phrases(narratives[number], caption, segments, place)
        author = narratives[number].get("annotator_id")
        narratives[number] = {}  # a large file: what is stored need not stay here too
        if phrases:
            own = {"caption": caption, "phrases": phrases, "annotator_id": author}
            store.add(numbers[image_id], own)
            lost += sum(phrase["start"] < 0 for phrase in phrases)
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


def _report(path: str | Path, lost: int, left_out: int = 0) -> None:
    """Log what is not as it should be, once a file."""
    if lost:
        message = "%s: %d phrases are not in their captions as written; kept without a span"
        _logger.warning(message, path, lost)
    if left_out:
        _logger.warning("%s: left out %d narratives without any noun", path, left_out)


def _phrases(
    narrative: dict[str, Any], caption: str, segments_info: list[dict[str, Any]], place: Place
) -> list[dict[str, Any]]:
    segments = place.listed(narrative, "segments")
    utterances = [place.text(segment, "utterance") for segment in segments]
    things = {segment["id"]: bool(segment["isthing"]) for segment in segments_info}
    phrases = []
    for segment, span in zip(segments, align_utterances(caption, utterances)):
        ids = []
        for name in place.listed(segment, "segment_ids"):
            if not str(name).isdecimal() or int(name) not in things:
                raise place.error(
                    f"segment id {name} is not in the image's panoptic annotation, which has "
                    f"{len(things)} segments; use the annotation that the file was made for"
                )
            ids.append(int(name))
        if not ids and not segment.get("noun", False):
            continue
        plural = bool(segment.get("plural", len(ids) > 1))
        thing = things[ids[-1]] if ids else None
        phrases.append(_phrase(segment["utterance"], caption, span, ids, plural, thing))
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
    lines = (value for _, value in json_lines(captions_jsonl))
    for number, line in enumerate(lines, start=1):
        if isinstance(line, ValueError):
            raise line
        image_id = Place(captions_jsonl, f"caption {number}").key(line, "image_id")
        place = Place(captions_jsonl, f"caption {number}, image {image_id}")
        if image_id not in numbers:
            raise ValueError(f"{captions_jsonl}: {place.where} is not in {annotation}")
        # Ids of two datasets may be equal: a caption of another file is refused.
        name = Path(images.shared(numbers[image_id])["file_name"]).name
        said = line.get("file_name")
        if said and Path(str(said)).name != name:
            raise ValueError(
                f"{captions_jsonl}: {place.where} is of {said}, but that image is {name}; the "
                "captions and the annotation belong to different datasets"
            )
        caption = place.text(line, "description")
        nouns = place.listed(line, "nouns")
        for k, noun in enumerate(nouns):
            if not isinstance(noun, str) or not noun.strip():
                raise place.error(f"noun {k} is {noun!r}, not text")
        spans = locate_phrases(caption, nouns)
        phrases = [_phrase(n, caption, s, None, None, None) for n, s in zip(nouns, spans)]
        lost += sum(span is None for span in spans)
        store.add(numbers[image_id], {"caption": caption, "phrases": phrases})
    _report(captions_jsonl, lost)
    return store

"""What any method predicted for a dataset, from one JSON file (docs/FORMATS.md 8)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from types import SimpleNamespace
from typing import Any

import numpy as np

from gella.data.mapper import expression_phrase
from gella.data.records import Place, as_records
from gella.entities.files import entries_by_image, panoptic_annotation, read_id_png
from gella.entities.rle import decode_segmentation
from gella.utils.io import few, image_key, read_json

FORMS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "png": ("png_predictions.json", "predictions", ("caption", "annotator_id"), "nouns"),
    "refcoco": ("referring_predictions.json", "predictions", ("sent_id", "phrase"), "expressions"),
    "coco_panoptic_seg": ("panoptic_predictions.json", "annotations", (), "images"),
    "noun_extraction": ("noun_predictions.json", "predictions", ("caption",), "captions"),
}
"""By a dataset's ``evaluator_type``: the file that GELLA's evaluators write in this form, its list,
the fields that tell, beside the image, whose an entry is, and what is predicted."""

_Told = tuple[Place, dict[str, Any]]  # what was predicted, and where it stands


class Predictions:
    """The predictions of a file, joined with the records of a dataset.

    Attributes:
        kind, records: of the dataset.
        num_asked, num_missing: nouns, expressions, images or captions of the records that were
            answered so far, and those of them of which the file says nothing.
    """

    def __init__(self, path: str | Path, kind: str, records: Sequence[dict[str, Any]]) -> None:
        """Read and join; masks are decoded by :meth:`answer`.

        Args:
            path: the JSON file; the PNGs of panoptic predictions are in the folder of its name. Or
                a folder of GELLA's evaluators, which has to say something of every record.
            kind: the dataset's ``evaluator_type``, one of `FORMS`.
            records: dataset dicts.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an entry is malformed, of nothing in the dataset, or the second of the same;
                it names file, entry and field.
        """
        if kind not in FORMS:
            raise ValueError(f"evaluator_type {kind!r}: predictions are of {', '.join(FORMS)}")
        (name, key, fields, _), ours = FORMS[kind], Path(path).is_dir()
        self.kind, self.records = kind, records
        self._path = Path(path, name) if ours else Path(path)
        drawn = Path(path, "entity_predictions.json") if ours and key == "annotations" else None
        self._drawn = entries_by_image(drawn, "coco_results")[1] if drawn else None
        self.num_asked = self.num_missing = 0
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, image_id in enumerate(as_records(records).image_ids()):
            numbers[str(image_id)].append(number)
        content = read_json(self._path, advice="evaluate first, or check the path")
        file, self._found = Place(self._path), dict[int, _Told]()
        self._nouns: dict[int, dict[int, _Told]] = {}  # by the places of a narrative's phrases
        entries = file.listed({key: content} if isinstance(content, list) else content, key)
        for k, entry in enumerate(entries):
            image_id = file.at(f"entry {k}").image_id(entry)
            place = file.at(f"entry {k}, image {image_id}")
            if image_id not in numbers:
                place.stranger(entries[k : k + 50], numbers, "the dataset")
            asked = {number: _asked(records[number], kind) for number in numbers[image_id]}
            number = _whose(place, entry, fields, asked, self._found)
            self._found[number] = place, entry
            if kind == "png":
                self._nouns[number] = _nouns(place, entry, asked[number]["phrases"])
        absent = sorted({*range(len(records))} - self._found.keys())
        if ours and absent:
            raise ValueError(
                f"{self._path}: nothing of {len(absent)} of {len(records)} records, the first of "
                f"image {records[absent[0]]['image_id']}: the evaluation was cut short"
            )

    def answer(self, number: int, sample: dict[str, Any]) -> dict[str, Any]:
        """What a model would have answered for a record; nothing where the file lacks it.

        Args:
            number: place of the record among ``records``.
            sample: the record as the evaluators take it.

        Raises:
            ValueError: a mask is damaged or of another size than the image; as above.
        """
        told, size = self._found.get(number), (sample["height"], sample["width"])
        if self.kind == "png":
            return self._narrative(number, sample["phrases"], size)
        self.num_asked, self.num_missing = self.num_asked + 1, self.num_missing + (told is None)
        if self.kind == "noun_extraction":
            found = told[0].listed(told[1], "found") if told else []
            return {"text": None, "grounding": [{"phrase": str(noun)} for noun in found]}
        if self.kind == "refcoco":
            return {"grounding": [_grounded(*told, size)] if told else []}
        output: dict[str, Any] = {"panoptic_seg": (np.zeros(size, np.int32), [])}
        if told:
            output["panoptic_seg"] = self._segments(*told, size)
        if self._drawn is not None:  # an image without entities has no entry
            drawn = self._drawn.get(image_key(sample["image_id"]), [])
            masks = [decode_segmentation(one["segmentation"], size) for one in drawn]
            scores = [one["score"] for one in drawn]
            output["instances"] = SimpleNamespace(pred_masks=masks, scores=scores)
        return output

    def _narrative(
        self, number: int, phrases: Sequence[dict[str, Any]], size: tuple[int, int]
    ) -> dict[str, Any]:
        nouns = self._nouns.get(number, {})
        # Nouns that GELLA did not answer have no mask in its files.
        said = {k: told for k, told in nouns.items() if told[1].get("segmentation") is not None}
        scored = [k for k, phrase in enumerate(phrases) if phrase["segment_ids"]]
        self.num_asked += len(scored)
        self.num_missing += sum(k not in said for k in scored)
        grounding = [_grounded(*told, size) for told in said.values()]
        place, entry = self._found.get(number) or (Place(self._path), {})
        for k, other in enumerate(place.listed({"others": [], **entry}, "others")):
            grounding.append(_grounded(place.at(f"{place.where}, other {k}"), other, size))
        places = {k: j for j, k in enumerate(said)}
        matched = [places.get(k) for k in range(len(phrases))]
        return {"text": entry.get("text"), "grounding": grounding, "matched": matched}

    def _segments(
        self, place: Place, entry: dict[str, Any], size: tuple[int, int]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Ids (H, W) and segments of an image."""
        segments = []
        for k, segment in enumerate(place.listed(entry, "segments_info")):
            at = place.at(f"{place.where}, segment {k}")
            segments.append({key: at.whole(segment, key) for key in ("id", "category_id")})
        try:
            return read_id_png(panoptic_annotation(self._path, entry)[0], size), segments
        except (OSError, ValueError) as error:
            told = f"{self._path}: {place.where}: 'file_name' {short(entry.get('file_name'))}"
            raise ValueError(f"{told}: {error}") from error


def _asked(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """A record, with what tells it from others of its image called as entries call it."""
    if kind != "refcoco":
        return record
    phrase = expression_phrase(record["expressions"][0])
    return {**phrase, "phrase": phrase["text"]}


def _nouns(
    place: Place, entry: dict[str, Any], phrases: Sequence[dict[str, Any]]
) -> dict[int, _Told]:
    """A narrative's nouns by the places of their phrases; of equal ones the scored come first."""
    order = sorted(range(len(phrases)), key=lambda k: not phrases[k]["segment_ids"])
    asked, nouns = {k: phrases[k] for k in order}, dict[int, _Told]()
    for k, noun in enumerate(place.listed(entry, "nouns")):
        at = place.at(f"{place.where}, noun {k}")
        nouns[_whose(at, noun, ("start", "end", "text"), asked, nouns)] = at, noun
    return nouns


def _whose(
    place: Place,
    entry: Any,
    fields: Sequence[str],
    asked: Mapping[int, dict[str, Any]],
    taken: Container[int],
) -> int:
    """The first number of ``asked``, but those ``taken``, that all ``fields`` of an entry fit."""
    given = [key for key in fields if isinstance(entry, dict) and entry.get(key) is not None]
    if fields and not given:
        place.wrong("field", f"there is none of the fields {', '.join(fields)}")
    fitting = list(asked)
    for key in given:
        there = {number: asked[number].get(key) for number in fitting}
        fitting = [n for n in fitting if image_key(there[n]) == image_key(entry[key])]
        if not fitting:
            known = few(dict.fromkeys(short(value) for value in there.values()))
            place.wrong("unknown", f"'{key}' is {short(entry[key])}, but the dataset has {known}")
    free = [number for number in fitting if number not in taken]
    if not free:
        told = ", ".join(f"'{key}' {short(entry[key])}" for key in given) or "the image"
        place.wrong("twice", f"entries before it predict all that the dataset has of {told}")
    return free[0]


def _grounded(place: Place, entry: Any, size: tuple[int, int]) -> dict[str, Any]:
    segmentation = place.field(entry, "segmentation")
    try:
        mask = decode_segmentation(segmentation, size)
    except ValueError as error:
        raise ValueError(f"{place.path}: {place.where}: 'segmentation': {error}") from error
    return {"phrase": entry.get("answer"), "entity_ids": [], "scores": [], "mask": mask}

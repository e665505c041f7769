"""Saved predictions as a model's outputs, and records as mapped inputs: scoring without a model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gella.data.mapper import expression_phrase, record_fields
from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation
from gella.entities.sources import load_from_record
from gella.evaluation.truth import TruthReader
from gella.utils.io import read_json

PREDICTION_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "png_predictions.json": ("predictions", ("image_id", "caption")),
    "panoptic_predictions.json": ("annotations", ("image_id",)),
    "entity_predictions.json": ("", ("image_id",)),
    "noun_predictions.json": ("predictions", ("image_id", "caption")),
    "referring_predictions.json": ("predictions", ("image_id", "phrase", "ref_id", "sent_id")),
}
"""What the evaluators write into ``inference/<dataset>/``, of which a folder has those of its type:
under which key its rows are ("": the file is the list), and what tells whose a row is."""


def sample_of(record: dict[str, Any], evaluator_type: str) -> dict[str, Any]:
    """The part of a mapped test input that the evaluators look at, from a dataset dict.

    Args:
        record: a dataset dict (docs/FORMATS.md 7).
        evaluator_type: of the dataset; entities and truth are decoded for those that need them.
    """
    sample = record_fields(record)
    sample["caption"], sample["phrases"] = record.get("caption", ""), record.get("phrases") or []
    if evaluator_type == "refcoco":
        sample["phrases"] = [expression_phrase(e) for e in record.get("expressions") or []]
        sample["caption"] = " ".join(phrase["text"] for phrase in sample["phrases"])
    if evaluator_type == "png":
        sample["entities_full"] = load_from_record(record)
    if evaluator_type in ("png", "coco_panoptic_seg"):
        sample["truth"] = TruthReader()(sample)
    return sample


class SavedPredictions:
    """The outputs that a folder of predictions holds; call it with a sample of `sample_of`."""

    def __init__(self, folder: str | Path) -> None:
        """Read a folder ``inference/<dataset>``.

        Raises:
            FileNotFoundError: it has none of ``PREDICTION_FILES``.
            ValueError: a file is damaged.
        """
        self._folder = Path(folder)
        self._waiting: dict[str, dict[tuple[str, ...], list[dict[str, Any]]]] = {}
        for name, (field, keys) in PREDICTION_FILES.items():
            path = self._folder / name
            if not path.is_file():
                continue
            # A list per key: several captions of an image may be the same text.
            waiting = self._waiting[name] = defaultdict(list)
            try:
                content = read_json(path)
                for row in content[field] if field else content:
                    waiting[tuple(str(row.get(key, "")) for key in keys)].append(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} is no file of predictions ({error!r}); evaluate again"
                ) from error
        if not self._waiting:
            raise FileNotFoundError(
                f"{folder} holds no predictions ({', '.join(PREDICTION_FILES)}): evaluate first, "
                "with tools/train_net.py --eval-only"
            )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What the model answered for a sample; samples of one key are answered in turn.

        Raises:
            KeyError: nothing was predicted for it; the message names file and image.
            ValueError: a predicted PNG is damaged, or a mask is of another size than the image.
        """
        output: dict[str, Any] = {}
        for name in self._waiting:
            output.update(self._answer(name, sample))
        return output

    def _answer(self, name: str, sample: dict[str, Any]) -> dict[str, Any]:
        """What one file says of a sample."""
        if name == "entity_predictions.json":  # an image without entities has no entry
            entries = self._waiting[name][(str(sample["image_id"]),)]
            masks = [_mask(entry, sample) for entry in entries]
            scores = [entry["score"] for entry in entries]
            return {"instances": SimpleNamespace(pred_masks=masks, scores=scores)}
        if name == "referring_predictions.json":
            phrase = sample["phrases"][0]
            image_id = sample["image_id"]
            row = self._take(name, {**phrase, "image_id": image_id, "phrase": phrase["text"]})
            return {"grounding": [_entry({**row, "answer": row["phrase"]}, sample)]}
        row = self._take(name, sample)
        if name == "panoptic_predictions.json":
            path = self._folder / "panoptic_predictions" / row["file_name"]
            try:
                return {"panoptic_seg": (read_id_png(path), row["segments_info"])}
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}); evaluate again") from error
        if name == "png_predictions.json":
            # Nouns without a place were not answered; the places restore the answer's order.
            said = [noun for noun in (*row["nouns"], *row["others"]) if "place" in noun]
            said.sort(key=lambda noun: noun["place"])
            return {"grounding": [_entry(noun, sample) for noun in said], "text": row["text"]}
        if "png_predictions.json" in self._waiting:  # it has the same nouns, with their masks
            return {"text": row["text"]}
        return {"text": row["text"], "grounding": [{"phrase": noun} for noun in row["found"]]}

    def _take(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        key = tuple(str(values.get(field, "")) for field in PREDICTION_FILES[name][1])
        if not self._waiting[name][key]:
            raise KeyError(
                f"{self._folder / name}: no prediction of image {values['image_id']} for "
                f"{[text[:60] for text in key[1:]]}: it is of another dataset, or the evaluation "
                "was cut short"
            )
        return self._waiting[name][key].pop(0)


def _entry(noun: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    entry = {key: noun[key] for key in ("entity_ids", "scores")}
    return {**entry, "phrase": noun["answer"], "mask": _mask(noun, sample)}


def _mask(entry: dict[str, Any], sample: dict[str, Any]) -> np.ndarray:
    return decode_segmentation(entry["segmentation"], (sample["height"], sample["width"]))

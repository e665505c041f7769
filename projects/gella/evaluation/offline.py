"""Saved predictions as a model's outputs, and records as mapped inputs: scoring without a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation
from gella.entities.sources import annotation_of, load_from_record
from gella.evaluation.truth import TruthReader
from gella.utils.io import read_json

PREDICTION_FILES = (
    "png_predictions.json",
    "panoptic_predictions.json",
    "entity_predictions.json",
    "noun_predictions.json",
    "referring_predictions.json",
)
"""What the evaluators write into ``inference/<dataset>/``; a folder has those of its type."""


def sample_with_truth(record: dict[str, Any], evaluator_type: str) -> dict[str, Any]:
    """As `sample_of`, with the annotated masks read where they are wanted: for worker processes."""
    sample = sample_of(record, evaluator_type)
    if evaluator_type in ("png", "coco_panoptic_seg"):
        sample["truth"] = TruthReader()(sample)
    return sample


def sample_of(record: dict[str, Any], evaluator_type: str) -> dict[str, Any]:
    """The part of a mapped test input that the evaluators look at, from a dataset dict.

    Args:
        record: a dataset dict (docs/FORMATS.md 7).
        evaluator_type: of the dataset; the entities are loaded for "png" only.
    """
    truth = annotation_of(record)
    sample = {key: record[key] for key in ("image_id", "height", "width", "file_name")}
    sample["annotation"] = {
        "file_name": truth["file_name"],
        "segments_info": truth.get("segments_info"),
    }
    sample["caption"], sample["phrases"] = record.get("caption", ""), record.get("phrases") or []
    if evaluator_type == "refcoco":
        expressions = record.get("expressions") or []
        sample["phrases"] = [{**e, "text": e["text"].strip()} for e in expressions]
        sample["caption"] = " ".join(phrase["text"] for phrase in sample["phrases"])
    if evaluator_type == "png":
        sample["entities_full"] = load_from_record(record)
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
        self._parts: list[Callable[[dict[str, Any]], dict[str, Any]]] = []
        readers = (self._png, self._panoptic, self._entity, self._nouns, self._referring)
        for name, reader in zip(PREDICTION_FILES, readers, strict=True):
            if (self._folder / name).is_file():
                self._parts.append(self._reading(name, reader))
        if not self._parts:
            raise FileNotFoundError(
                f"{folder} holds no predictions ({', '.join(PREDICTION_FILES)}): evaluate first, "
                "with tools/train_net.py --eval-only"
            )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What the model answered for a sample; samples of one key are answered in turn.

        Raises:
            KeyError: nothing was predicted for it; the message names file and image.
        """
        output: dict[str, Any] = {}
        for part in self._parts:
            output.update(part(sample))
        return output

    def _reading(self, name: str, reader: Callable) -> Callable[[dict[str, Any]], dict[str, Any]]:
        try:
            return reader(read_json(self._folder / name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._folder / name} is no file of predictions ({error!r}); evaluate again"
            ) from error

    def _lookup(self, name: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Callable:
        waiting: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            waiting[tuple(str(row.get(key, "")) for key in keys)].append(row)

        def take(values: dict[str, Any]) -> dict[str, Any]:
            found = waiting[tuple(str(values.get(key, "")) for key in keys)]
            if not found:
                raise KeyError(
                    f"{self._folder / name}: no prediction of image {values['image_id']} for "
                    f"{[str(values.get(key, ''))[:60] for key in keys[1:]]}: it is of another "
                    "dataset, or the evaluation was cut short"
                )
            return found.pop(0)

        return take

    def _png(self, content: Any) -> Callable:
        take = self._lookup("png_predictions.json", content["predictions"], ("image_id", "caption"))

        def output(sample: dict[str, Any]) -> dict[str, Any]:
            row = take(sample)
            said = [noun for noun in (*row["nouns"], *row["others"]) if "place" in noun]
            grounding = [_entry(noun, sample) for noun in sorted(said, key=lambda n: n["place"])]
            return {"grounding": grounding, "text": row["text"]}

        return output

    def _panoptic(self, content: Any) -> Callable:
        name = "panoptic_predictions.json"
        take = self._lookup(name, content["annotations"], ("image_id",))

        def output(sample: dict[str, Any]) -> dict[str, Any]:
            row = take(sample)
            path = self._folder / "panoptic_predictions" / row["file_name"]
            try:
                ids = read_id_png(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}); evaluate again") from error
            return {"panoptic_seg": (ids, row["segments_info"])}

        return output

    def _entity(self, content: Any) -> Callable:
        by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in content:
            by_image[str(entry["image_id"])].append(entry)

        def output(sample: dict[str, Any]) -> dict[str, Any]:
            found = by_image[str(sample["image_id"])]  # an image without entities has no entry
            masks = [_mask(entry, sample) for entry in found]
            instances = SimpleNamespace(pred_masks=masks, scores=[e["score"] for e in found])
            return {"instances": instances}

        return output

    def _nouns(self, content: Any) -> Callable:
        keys = ("image_id", "caption")
        take = self._lookup("noun_predictions.json", content["predictions"], keys)
        grounded = (self._folder / "png_predictions.json").is_file()

        def output(sample: dict[str, Any]) -> dict[str, Any]:
            row = take(sample)
            # Beside narratives, whose file has the same nouns with their masks, nothing is new.
            said = {} if grounded else {"grounding": [{"phrase": n} for n in row["found"]]}
            return {"text": row["text"], **said}

        return output

    def _referring(self, content: Any) -> Callable:
        keys = ("image_id", "phrase", "ref_id", "sent_id")
        take = self._lookup("referring_predictions.json", content["predictions"], keys)

        def output(sample: dict[str, Any]) -> dict[str, Any]:
            phrase = sample["phrases"][0]
            row = take({**phrase, "image_id": sample["image_id"], "phrase": phrase["text"]})
            return {"grounding": [_entry({**row, "answer": row["phrase"]}, sample)]}

        return output


def _entry(noun: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "phrase": noun["answer"],
        "entity_ids": noun["entity_ids"],
        "scores": noun["scores"],
        "mask": _mask(noun, sample),
    }


def _mask(entry: dict[str, Any], sample: dict[str, Any]) -> np.ndarray:
    return decode_segmentation(entry["segmentation"], (sample["height"], sample["width"]))

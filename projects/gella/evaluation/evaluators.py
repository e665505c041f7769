"""Detectron2 evaluators: a row per sample, gathered over processes, scored by `metrics`, written.

An evaluator is what a sample adds (``_row``) and what all rows give (``_score``); the rest is
`GatheringEvaluator`. Inputs are mapped test dicts, outputs the model's, in the original frame.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from gella.entities.files import write_id_png
from gella.entities.rle import encode_mask
from gella.evaluation import metrics, panoptic_quality
from gella.evaluation.results import attempted
from gella.evaluation.truth import TruthReader
from gella.utils.io import write_json


def percent(summary: dict[str, float]) -> dict[str, float]:
    """Fractions to percent; counts (``n``, ``n_...``) stay."""
    return {k: v if k.split("_")[0] == "n" else 100 * v for k, v in summary.items()}


def to_array(value: Any, dtype: Any) -> np.ndarray:
    """A tensor on any device, or an array, as a numpy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=dtype)


def sized_mask(mask: Any, sample: dict[str, Any]) -> np.ndarray:
    """A predicted mask as bool (H, W); ValueError if it is not of the original image size."""
    array, size = to_array(mask, bool), (sample["height"], sample["width"])
    if array.shape != size:
        raise ValueError(
            f"image {sample['image_id']}: predicted mask of size {array.shape}, image {size}: "
            "predict at the original image size"
        )
    return array


class GatheringEvaluator(DatasetEvaluator):
    """Rows per sample, gathered and written; subclasses give ``_row`` and ``_score``.

    Sums are exact or correctly rounded and rows are sorted, so results depend neither on batches
    nor on processes.
    """

    file_name = "predictions.json"

    def __init__(self, output_folder: str | Path | None = None) -> None:
        self._folder = Path(output_folder) if output_folder else None
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._rows: list[dict[str, Any]] = []
        self._truth = TruthReader()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take a batch of mapped dicts and the model's outputs for them, in the same order."""
        for sample, output in zip(inputs, outputs, strict=True):
            row = self._row(sample, output)
            if row is not None:
                self._rows.append({"image_id": sample["image_id"], **row})

    def evaluate(self) -> dict[str, Any]:
        """``{task: {metric: score}}`` in percent, over the samples of all processes.

        Every process must call this; all but the main one get ``{}``.
        """
        gathered = comm.gather(self._rows, dst=0)
        if not comm.is_main_process():
            return {}
        keys = ("image_id", "caption", "phrase", "ref_id", "sent_id")
        # The same order whatever process saw which sample, so that files are equal byte for byte.
        rows = [row for part in gathered for row in part]
        rows.sort(key=lambda row: tuple(str(row.get(key, "")) for key in keys))
        results = self._score(rows)
        self._try(lambda folder: self._write(folder, rows, results))
        return results

    def _try(self, write: Callable[[Path], object]) -> Any:
        """Write predictions if they are wanted; what fails costs no score and is told once."""
        if self._folder is not None:
            with attempted(f"predictions in {self._folder}"):
                return write(self._folder)
            self._folder = None

    @abstractmethod
    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any] | None:
        """What a sample adds; None adds nothing."""

    @abstractmethod
    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What all rows give."""

    def _write(self, folder: Path, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
        write_json(folder / self.file_name, {"results": results, "predictions": rows})


class ReferringEvaluator(GatheringEvaluator):
    """cIoU, gIoU and P@t of referring expressions (task "refer"), one expression per sample.

    An expression may have no target (no segment ids): its IoU is 1 if nothing is predicted and 0
    otherwise. ``N_acc`` is the share of such expressions that got no mask, ``T_acc`` the share of
    the others that got one.
    """

    file_name = "referring_predictions.json"

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        if len(sample["phrases"]) != 1:
            raise ValueError(
                f"image {sample['image_id']}: {len(sample['phrases'])} phrases in a referring "
                "sample, expected 1: map the dataset for the task 'refer'"
            )
        phrase = sample["phrases"][0]
        target = sized_mask(self._truth.mask(sample, phrase["segment_ids"] or []), sample)
        # A model may find nothing: an empty mask, which is right where nothing was meant.
        entry = next(iter(output["grounding"]), {"mask": np.zeros_like(target)})
        mask = sized_mask(entry["mask"], sample)
        return {
            "phrase": phrase["text"],
            **{key: phrase[key] for key in ("ref_id", "sent_id") if key in phrase},
            "entity_ids": [int(i) for i in entry.get("entity_ids", ())],
            "scores": [float(score) for score in entry.get("scores", ())],
            "target": int(np.count_nonzero(target)),
            "predicted": int(np.count_nonzero(mask)),
            "intersection": int(np.count_nonzero(mask & target)),
            "union": int(np.count_nonzero(mask | target)),
            "segmentation": encode_mask(mask),
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        summary = metrics.cumulative_iou(
            [row["intersection"] for row in rows], [row["union"] for row in rows]
        )
        for name, empty in (("N_acc", True), ("T_acc", False)):
            answers = [row["predicted"] == 0 for row in rows if (row["target"] == 0) == empty]
            summary[name] = answers.count(empty) / len(answers) if answers else math.nan
        summary["n_no_target"] = float(sum(row["target"] == 0 for row in rows))
        return {"refer": percent(summary)}


class NounExtractionEvaluator(GatheringEvaluator):
    """Recall and precision of the nouns in generated answers (task "nouns").

    The reference is every phrase of the caption, ungrounded ones too. The answer's nouns are those
    that the model parsed out of its text and grounded (``grounding``).
    """

    file_name = "noun_predictions.json"

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        return {
            "caption": sample["caption"],
            "text": output["text"],
            "reference": [phrase["text"] for phrase in sample["phrases"]],
            "found": [entry["phrase"] for entry in output["grounding"]],
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        hits = sum(metrics.noun_recall(row["reference"], row["found"]) for row in rows)
        n, n_found = (sum(len(row[key]) for row in rows) for key in ("reference", "found"))
        scores = {
            "recall": hits / n if n else math.nan,
            "precision": hits / n_found if n_found else 0.0,
            "n": float(n),
            "n_found": float(n_found),
            "n_captions": float(len(rows)),
        }
        return {"nouns": percent(scores)}


class EntityAPEvaluator(GatheringEvaluator):
    """Class-agnostic mask AP of the reconstructed entities before snapping (task "entity").

    Each image counts once, however many captions it has. Writes COCO results form.
    """

    file_name = "entity_predictions.json"

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._seen: set[Any] = set()

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any] | None:
        if sample["image_id"] in self._seen:
            return None
        self._seen.add(sample["image_id"])
        truth, instances = self._truth(sample), output["instances"]
        return {
            "truth": truth.regions.to_rle(),
            "crowd": [bool(segment.get("iscrowd", 0)) for segment in truth.segments],
            "predictions": [encode_mask(sized_mask(mask, sample)) for mask in instances.pred_masks],
            "scores": [float(score) for score in instances.scores],
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        unique = list({row["image_id"]: row for row in rows}.values())  # of several processes
        # Predictions of one score rank by their image: in pycocotools' order, by number.
        unique.sort(key=lambda row: str(row["image_id"]).zfill(20))
        return {"entity": percent(panoptic_quality.entity_ap(unique))}

    def _write(self, folder: Path, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
        entries = [
            {"image_id": row["image_id"], "category_id": 1, "segmentation": rle, "score": score}
            for row in rows
            for rle, score in zip(row["predictions"], row["scores"], strict=True)
        ]
        write_json(folder / self.file_name, entries)


class PanopticEvaluator(GatheringEvaluator):
    """Panoptic quality (task "panoptic_seg"), equal to panopticapi's, which is not needed.

    Reports PQ, SQ, RQ and the number of categories, the same with ``_th`` and ``_st``, and
    ``PQ-<name>`` for each category that occurs. Writes the predictions in COCO's panoptic form:
    ``panoptic_predictions.json`` and PNGs in ``panoptic_predictions/``.
    """

    file_name = "panoptic_predictions.json"

    def __init__(
        self, categories: Sequence[dict[str, Any]], output_folder: str | Path | None = None
    ) -> None:
        self._categories = list(categories)
        super().__init__(output_folder)

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        truth = self._truth(sample)
        ids = to_array(output["panoptic_seg"][0], np.int32)
        segments = [dict(segment) for segment in output["panoptic_seg"][1]]
        counts = panoptic_quality.pq_counts(
            truth.ids, truth.segments, ids, segments, self._categories, sample["image_id"]
        )
        name = Path(sample["annotation"]["file_name"]).stem + ".png"
        self._try(lambda folder: write_id_png(folder / "panoptic_predictions" / name, ids))
        return {"file_name": name, "segments_info": segments, "counts": counts}

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        counts = [row["counts"] for row in rows]
        summary, classes = panoptic_quality.pq_summary(counts, self._categories)
        results = percent(summary)
        occurring = {category for count in counts for category in count.categories()}
        for category in self._categories:
            if category["id"] in occurring:
                results[f"PQ-{category['name']}"] = 100 * classes[category["id"]]["PQ"]
        results["n_images"] = float(len(rows))
        return {"panoptic_seg": results}

    def _write(self, folder: Path, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
        kept = ("image_id", "file_name", "segments_info")
        annotations = [{key: row[key] for key in kept} for row in rows]
        write_json(folder / self.file_name, {"annotations": annotations, "results": results})


class Detectron2PanopticEvaluator(DatasetEvaluator):
    """Detectron2's ``COCOPanopticEvaluator`` on the same outputs (task "panoptic_seg_detectron2").

    It calls panopticapi. The annotation's PNG must have the stem of the image's file, as in COCO.
    """

    def __init__(self, dataset_name: str, output_folder: str | Path | None = None) -> None:
        """The dataset's metadata needs ``panoptic_json``, ``panoptic_root`` and the id tables.

        Raises:
            ValueError: this Detectron2 has no such evaluator, or panopticapi is missing.
        """
        try:
            import panopticapi  # noqa: F401
            from detectron2.evaluation import COCOPanopticEvaluator
        except ImportError as error:
            raise ValueError(
                f"TEST.DETECTRON2_PANOPTIC needs the full Detectron2 and panopticapi ({error}); "
                "install both, or set it to False: the project's own PQ needs neither"
            ) from error
        folder = str(Path(output_folder) / "detectron2") if output_folder else None
        self._evaluator = COCOPanopticEvaluator(dataset_name, folder)

    def reset(self) -> None:
        """Forget all samples."""
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take a batch of mapped dicts and the model's outputs; neither is changed."""
        plain = []
        for ids, segments in (output["panoptic_seg"] for output in outputs):
            # It takes ids of the dataset as they are where a segment does not say "isthing".
            kept = [{key: segment[key] for key in ("id", "category_id")} for segment in segments]
            plain.append({"panoptic_seg": (ids, kept)})
        self._evaluator.process(inputs, plain)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score all samples of all processes; every process must call this."""
        results = self._evaluator.evaluate() or {}
        return {f"{task}_detectron2": dict(scores) for task, scores in results.items()}


class PNGEvaluator(GatheringEvaluator):
    """Average recall of narrative grounding (task "png"), its oracle and three blind baselines.

    A unit is a phrase with at least one segment id; its truth is the union of its segments at the
    original size, crowd segments included. ``protocol`` is one of ``metrics.PROTOCOLS`` and is
    reported as ``protocol_<name>``: 1. Under "official" the oracle's union is chosen by pixel
    counts and then scored by the soft IoU, like the rest. An output that says itself which entry
    answers which phrase (``matched``, as of `match_grounding`) is believed.

    Writes ``png_predictions.json``, from which everything can be scored again: per narrative the
    scored ``nouns`` with IoUs and predicted masks, and as ``others`` what else the model grounded;
    and ``png_form.json``, the benchmark's own form with the predicted entities' ids.
    """

    file_name = "png_predictions.json"
    baselines = ("oracle", "random", "largest", "all")

    def __init__(self, output_folder: str | Path | None = None, protocol: str = "hard") -> None:
        if protocol not in metrics.PROTOCOLS:
            known = ", ".join(metrics.PROTOCOLS)
            raise ValueError(f"unknown PNG protocol {protocol!r}: choose one of {known}")
        self._protocol = protocol
        super().__init__(output_folder)

    def _row(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        truth, entities = self._truth(sample), sample["entities_full"]
        if entities.ids.shape != truth.ids.shape:
            raise ValueError(
                f"image {sample['image_id']}: entities of size {entities.ids.shape}, truth "
                f"{truth.ids.shape}: give entity masks at the original image size"
            )
        # Pixels of each (annotated segment, entity) pair; 0 is neither. Oracle and baselines are
        # sums over this table: no mask is painted for them.
        pairs, pixels = panoptic_quality.joint_counts(truth.regions.ids, entities.ids)
        shape = (truth.regions.num_entities + 1, entities.num_entities + 1)
        overlap = np.zeros(shape, np.int64)
        overlap[pairs[:, 0], pairs[:, 1]] = pixels
        phrases, answers = sample["phrases"], output["grounding"]
        nouns, others = [], dict(enumerate(answers))
        matched = output.get("matched") or match_grounding(phrases, answers)
        for k, number in enumerate(matched):
            phrase = phrases[k]
            if not phrase["segment_ids"]:
                continue  # an ungrounded noun is not scored
            fields = ("text", "start", "end", "segment_ids", "is_thing", "is_plural")
            noun = {name: phrase[name] for name in fields}
            target = truth.mask(phrase["segment_ids"])
            # A phrase may name a segment twice; its pixels count once.
            rows = sorted({i + 1 for i in truth.indices(phrase["segment_ids"])})
            area, areas = int(overlap[rows].sum()), overlap[:, 1:].sum(axis=0)
            inter = overlap[rows, 1:].sum(axis=0)
            chosen = metrics.blind_choices(areas, sample["image_id"], k)
            chosen["oracle"] = metrics.best_union(inter, areas, area)[1]
            for name in self.baselines:
                members = chosen[name]
                if self._protocol == "official":  # soft masks have no pixels to count
                    noun[name] = metrics.noun_iou(entities.union(members), target, "official")
                else:
                    both = int(inter[members].sum())
                    union = area + int(areas[members].sum()) - both
                    noun[name] = metrics.ratio_iou(both, union, self._protocol)
            noun["iou"] = 0.0
            if number is not None:
                entry = others.pop(number)
                mask = sized_mask(entry["mask"], sample)
                noun["iou"] = metrics.noun_iou(mask, target, self._protocol)
                noun.update(_entry(entry, mask), place=number)
            nouns.append(noun)
        return {
            "caption": sample["caption"],
            "text": output.get("text"),
            "nouns": nouns,
            "others": [
                {**_entry(entry, sized_mask(entry["mask"], sample)), "place": number}
                for number, entry in others.items()
            ],
            "n_ungrounded": len(phrases) - len(nouns),
            "aligned": all(phrase["start"] >= 0 for phrase in phrases),
        }

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        used = [row for row in rows if row["nouns"]]
        if self._protocol == "official":  # the benchmark leaves out captions it cannot align
            used = [row for row in used if row["aligned"]]
        nouns = [noun for row in used for noun in row["nouns"]]
        results = percent(metrics.png_summary(nouns, self._protocol))
        for name in self.baselines:
            scores = percent(metrics.png_summary(nouns, self._protocol, key=name))
            results.update({f"{name}_{k}": v for k, v in scores.items() if k.startswith("AR")})
        results["n_captions"] = float(len(used))
        results["n_captions_left_out"] = float(len(rows) - len(used))
        results["n_ungrounded"] = float(sum(row["n_ungrounded"] for row in used))
        results["n_others"] = float(sum(len(row["others"]) for row in used))
        results["n_without_prediction"] = float(sum("segmentation" not in n for n in nouns))
        results["n_thresholds"] = float(metrics.NUM_THRESHOLDS)
        results[f"protocol_{self._protocol}"] = 1.0
        return {"png": results}

    def _write(self, folder: Path, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
        write_json(folder / "png_form.json", [png_form(row) for row in rows])
        super()._write(folder, rows, results)


def match_grounding(
    phrases: Sequence[dict[str, Any]], grounding: Sequence[dict[str, Any]]
) -> list[int | None]:
    """Give each reference phrase the place of its predicted entry, or None.

    With the nouns given, the lists agree one to one. With extracted nouns, a phrase takes the
    first unused entry of the same normalised text.
    """
    if [p["text"] for p in phrases] == [g["phrase"] for g in grounding]:
        return list(range(len(phrases)))
    unused = {k: metrics.normalize_noun(entry["phrase"]) for k, entry in enumerate(grounding)}
    matched: list[int | None] = []
    for phrase in phrases:
        name = metrics.normalize_noun(phrase["text"])
        first = next((k for k, text in unused.items() if text == name), None)
        matched.append(first)
        if first is not None:
            del unused[first]
    return matched


def png_form(row: dict[str, Any]) -> dict[str, Any]:
    """A narrative in the benchmark's own form, with the predicted entities as ``segment_ids``.

    Args:
        row: ``image_id``, ``caption`` and ``nouns``; a noun has ``text``, ``start``, ``end`` (-1
            where it is not in the caption as written), ``is_plural`` and, where something was
            predicted, ``entity_ids`` (None, and null in the form: to be filled in).

    Returns:
        ``{image_id: str, caption, segments: [{utterance, segment_ids: [str], plural, noun}]}``. The
        segments partition the caption in order; nouns without a place of their own come last.
    """
    caption, cursor = row["caption"], 0
    segments: list[dict[str, Any]] = []
    late: list[dict[str, Any]] = []

    def between(end: int) -> None:
        words = {"utterance": caption[cursor:end].strip(), "segment_ids": []}
        if words["utterance"]:
            segments.append({**words, "plural": False, "noun": False})

    for noun in sorted(row["nouns"], key=lambda noun: noun["start"]):
        ids = None if (named := noun.get("entity_ids", ())) is None else [str(i) for i in named]
        kind = {"plural": bool(noun["is_plural"]), "noun": True}
        segment = {"utterance": noun["text"], "segment_ids": ids, **kind}
        if noun["start"] < cursor:  # not in the caption, or it overlaps the noun before it
            late.append(segment)
            continue
        between(noun["start"])
        segments.append(segment)
        cursor = noun["end"]
    between(len(caption))
    return {"image_id": str(row["image_id"]), "caption": caption, "segments": [*segments, *late]}


def _entry(answer: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """One entry of an answer's grounding, in values that JSON takes."""
    return {
        "answer": answer["phrase"],
        "entity_ids": [int(i) for i in answer["entity_ids"]],
        "scores": [float(score) for score in answer["scores"]],
        "segmentation": encode_mask(mask),
    }

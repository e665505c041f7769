"""Phrases of saved predictions as a table, with what truth and picture say of each.

A row of the table is a *case*, one phrase whose mask was scored: ``image_id, caption, text, start,
end, iou``, ``score`` (highest association score, NaN without), ``segment_ids`` (of an expression
`compare` fills them in), ``is_thing, is_plural, oracle`` (None where the file does not tell),
``segmentation`` (RLE, None without a prediction) and ``ref_id, sent_id``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from gella.entities.entity_map import EntityMap
from gella.entities.rle import decode_segmentation
from gella.entities.sources import annotation_of
from gella.entities.view import read_recorded
from gella.evaluation.truth import TruthReader
from gella.utils.io import few, image_key, read_json

TAKEN = 0.5  # a mask takes a segment when it covers more than this share of its pixels
# Kinds of outcome of a case, and what they mean.
ERRORS = {
    "right": "the right entities",
    "none": "no mask at all",
    "part": "less than half of any entity",
    "fewer": "some of the right entities, no wrong one",
    "more": "all right entities and wrong ones",
    "mixed": "right and wrong ones, and some missing",
    "other": "only wrong ones",
    "unneeded": "a mask where nothing was meant",
}
# Files of predictions that can be analysed, and their task.
FILES = {"png_predictions.json": "png", "referring_predictions.json": "refer"}
_SAME_IOU = 1e-6


@dataclass
class Predictions:
    """What one evaluator wrote for one dataset."""

    label: str  # the folder below the one that was given; the dataset's name for that one itself
    dataset: str  # the folder's name
    file: Path
    task: str  # "png" or "refer"
    results: dict[str, float]  # the evaluator's metrics, in percent
    cases: pd.DataFrame  # see the module


def find_predictions(folder: str | Path) -> list[Predictions]:
    """Read all predictions that can be analysed in a folder and below: of one dataset, of all in
    ``OUTPUT_DIR/inference``, or of all runs of a table.

    Raises:
        FileNotFoundError: the folder is missing, or holds no predictions of phrases.
        ValueError: a file is damaged or of another version; the message names it.
    """
    top = Path(folder)
    if not top.is_dir():
        raise FileNotFoundError(
            f"{top} is no folder: give OUTPUT_DIR/inference of an evaluation "
            "(tools/train_net.py --eval-only writes it)"
        )
    predictions = []
    for path in sorted(path for name in FILES for path in top.rglob(name)):
        content, task = read_json(path, advice="evaluate again"), FILES[path.name]
        if not isinstance(content, dict) or not {"results", "predictions"} <= content.keys():
            raise ValueError(f"{path} lacks 'results' or 'predictions'; evaluate again")
        cases = _cases(content["predictions"], task, path)
        if len(cases):
            dataset, inner = path.resolve().parent.name, path.parent.relative_to(top)
            label = inner.as_posix() if inner.parts else dataset
            results = content["results"].get(task, {})
            predictions.append(Predictions(label, dataset, path, task, results, cases))
    if not predictions:
        raise FileNotFoundError(
            f"{top} has no scored phrase: looked for {' and '.join(FILES)} in it and below; "
            "evaluate a dataset of narratives or of referring expressions first"
        )
    return predictions


def _cases(rows: list[dict[str, Any]], task: str, path: Path) -> pd.DataFrame:
    """The table of one file; ValueError where a prediction lacks something."""
    needed = ["image_id", "caption", "text", "iou", "segment_ids"]
    try:
        if task == "png":
            cases = pd.json_normalize(rows, "nouns", ["image_id", "caption"], max_level=0)
        else:
            cases = pd.DataFrame(rows).rename(columns={"phrase": "text"})
            needed.remove("segment_ids")
            cases["caption"], cases["start"], cases["end"] = cases.text, 0, cases.text.str.len()
            # Nothing to find and nothing found is right, as in the evaluator's gIoU.
            cases["iou"] = (cases["intersection"] / cases["union"]).where(cases["union"] > 0, 1.0)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: predictions of another version ({error}); evaluate again"
        ) from error
    columns = [*needed, "segment_ids", "is_thing", "is_plural", "oracle", "segmentation", "scores"]
    cases = cases.reindex(
        columns=list(dict.fromkeys([*columns, "start", "end", "ref_id", "sent_id"]))
    )
    # None and not NaN where the file tells nothing, so that masks and lists are told from it.
    cases = cases.astype(object).where(cases.notna(), None)
    for row in cases.itertuples():
        for name in needed:
            if getattr(row, name) is None:
                raise ValueError(f"{path}: a prediction has no {name!r}; evaluate again")
        if not isinstance(row.iou, int | float) or not 0 <= row.iou <= 1:
            raise ValueError(
                f"{path}: image {row.image_id} has the IoU {row.iou!r}, expected a number in "
                "[0, 1]; evaluate again"
            )
    cases["score"] = [max(scores or [], default=math.nan) for scores in cases.pop("scores")]
    return cases.astype({"iou": float})


@dataclass
class Scene:
    """One image with its annotated segments."""

    image: np.ndarray  # uint8 (H, W, 3) RGB
    regions: EntityMap  # all segments
    categories: list[str]  # per segment

    def indices(self, segment_ids: Iterable[int]) -> list[int]:
        """Indices of the named segments that the picture shows, ascending."""
        present = {*self.regions.segment_ids, *self.regions.merged}
        return sorted({self.regions.index_of(i) for i in set(segment_ids) if i in present})

    def predicted(self, segmentation: dict[str, Any] | None) -> np.ndarray:
        """A predicted mask, bool (H, W), empty without one; ValueError for another size."""
        if segmentation is None:
            return np.zeros(self.regions.size, dtype=bool)
        return decode_segmentation(segmentation, self.regions.size)


def read_scene(record: dict[str, Any], names: Mapping[Any, str], reader: TruthReader) -> Scene:
    """The scene of a dataset dict; ``names`` are those of the categories, by id.

    Raises:
        OSError, ValueError: the picture or the annotation is missing or damaged, or of two sizes.
    """
    size = (record["height"], record["width"])
    try:
        image = read_recorded(record["file_name"], size)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"image {record['image_id']}: {record['file_name']} cannot be read ({error}); the "
            "dataset must lie where it lay at evaluation, or use --without-images"
        ) from error
    annotation = annotation_of(record)
    segments = annotation.get("segments_info") or []
    if segments and all(segment.get("segmentation") is not None for segment in segments):
        masks = np.stack([decode_segmentation(s["segmentation"], size) for s in segments])
        regions = EntityMap.from_masks(masks, segment_ids=[int(s["id"]) for s in segments])
    else:
        truth = reader({**record, "annotation": {"segments_info": None, **annotation}})
        regions, segments = truth.regions, truth.segments
    kinds = {int(segment["id"]): segment.get("category_id") for segment in segments}
    categories = [names.get(kinds[i], f"category {kinds[i]}") for i in regions.segment_ids]
    return Scene(image, regions, categories)


def scenes(
    cases: pd.DataFrame, records: Iterable[dict[str, Any]], names: Mapping[Any, str]
) -> Iterator[tuple[Any, Scene]]:
    """Each case, as a named tuple, with its scene; ValueError for an image that has no record."""
    # Of several records the first is kept.
    by_image = {image_key(record["image_id"]): record for record in reversed(list(records))}
    reader, scene, last = TruthReader(), None, ""
    for case in cases.itertuples():
        key = image_key(case.image_id)
        if key not in by_image:
            raise ValueError(
                f"image {key} of the predictions is not in the dataset (ids of the predictions: "
                f"{few(dict.fromkeys(cases.image_id))}; of its {len(by_image)} images: "
                f"{few(by_image)}): name the one that was evaluated with --dataset"
            )
        if scene is None or key != last:
            scene, last = read_scene(by_image[key], names, reader), key
        yield case, scene


def compare(
    predictions: Predictions, records: Sequence[dict[str, Any]], names: Mapping[Any, str]
) -> pd.DataFrame:
    """The cases with the columns of `case_facts`; the ids of expressions are filled in from them.

    Args:
        predictions: read by `find_predictions`.
        records, names: dataset dicts, and the names of the categories by id.

    Raises:
        OSError, ValueError: an image, an expression or a file is missing, or narratives have other
            IoUs here than at evaluation: another dataset may well have the same image and segment
            ids. The soft IoU of "official", and overlapping objects, cannot be compared.
    """
    cases = predictions.cases
    if predictions.task == "refer":
        expressions: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in records:
            for expression in record.get("expressions") or []:
                key = image_key(record["image_id"]), expression["text"].strip()
                expressions.setdefault(key, []).append(expression)
        meant = []
        for case in cases.itertuples():
            same = expressions.get((image_key(case.image_id), case.text), [])
            if not same:
                raise ValueError(
                    f"image {case.image_id}: the dataset has no expression {case.text!r}: name the "
                    "one that was evaluated with --dataset"
                )
            ids = (case.ref_id, case.sent_id)
            exact = [e for e in same if (e.get("ref_id"), e.get("sent_id")) == ids]
            # One text for two objects of an image, in files without ids: the first stands for both.
            meant.append([int(i) for i in (exact or same)[0]["segment_ids"]])
        cases["segment_ids"] = meant
    facts = [
        case_facts(case.segment_ids, case.segmentation, scene)
        for case, scene in tqdm(scenes(cases, records, names), predictions.label, len(cases))
    ]
    table = cases.join(pd.DataFrame(facts))
    different = table[(table.iou - table.pixel_iou).abs() > _SAME_IOU]
    if predictions.task == "png" and not predictions.results.get("protocol_official"):
        for case in different.head(1).itertuples():
            raise ValueError(
                f"{predictions.file}: image {case.image_id}, phrase {case.text!r} has the IoU "
                f"{case.iou:.4f}, but {case.pixel_iou:.4f} with this dataset ({len(different)} of "
                f"{len(table)} phrases differ): it is not the dataset that was evaluated; see "
                "--dataset and DETECTRON2_DATASETS, or use --without-images"
            )
    return table


def case_facts(segment_ids: Sequence[int], segmentation: Any, scene: Scene) -> dict[str, Any]:
    """Compare what a case was to take with what it took.

    Returns:
        ``error``, a key of ``ERRORS``; ``pixel_iou`` (two empty masks have 1); ``area_share`` of
        the image, covered by the truth; the category names of segments ``meant`` and ``taken``;
        ``rivals``, segments of a meant one's category that are not meant (NaN if nothing is); and
        ``confused``, (missed, wrongly taken) categories.
    """
    regions, areas, names = scene.regions, scene.regions.areas(), scene.categories
    meant, mask = scene.indices(segment_ids), scene.predicted(segmentation)
    truth = regions.union(meant)
    size, inter = np.count_nonzero(truth), np.count_nonzero(truth & mask)
    union = size + np.count_nonzero(mask) - inter
    taken = np.flatnonzero(regions.overlaps(mask) > TAKEN * areas).tolist()
    missed, wrong = {*meant} - {*taken}, {*taken} - {*meant}
    categories = {names[i] for i in meant}
    rivals = sum(name in categories for name in names) - len(meant)
    if not meant:
        error = "unneeded" if mask.any() else "right"
    elif not taken:
        error = "part" if mask.any() else "none"
    else:
        partly = "other" if len(wrong) == len(taken) else "mixed" if wrong else "fewer"
        error = partly if missed else "more" if wrong else "right"
    return {
        "error": error,
        "pixel_iou": inter / union if union else 1.0,
        "area_share": size / mask.size,
        "meant": [names[i] for i in meant],
        "taken": [names[i] for i in taken],
        "rivals": rivals if meant else math.nan,
        "confused": sorted({(names[a], names[b]) for a in missed for b in wrong}),
    }

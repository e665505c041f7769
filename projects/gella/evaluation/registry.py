"""Which evaluators, task and category names a dataset gets, by its metadata and the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from gella.data.panoptic import read_categories
from gella.evaluation.evaluators import (
    Detectron2PanopticEvaluator,
    EntityAPEvaluator,
    NounExtractionEvaluator,
    PanopticEvaluator,
    PNGEvaluator,
    ReferringEvaluator,
)
from gella.utils.io import read_json

Factory = Callable[[Any, str, str], "DatasetEvaluator | None"]
"""(cfg, dataset name, output folder) -> evaluator, or None where the config does not want it."""

EVALUATORS: dict[str, list[Factory]] = {
    "png": [
        lambda cfg, _, folder: PNGEvaluator(folder, cfg.TEST.PNG_PROTOCOL),
        lambda cfg, _, folder: (
            NounExtractionEvaluator(folder) if cfg.TEST.NOUNS == "extracted" else None
        ),
    ],
    "coco_panoptic_seg": [
        lambda _, name, folder: PanopticEvaluator(MetadataCatalog.get(name).categories, folder),
        lambda _, __, folder: EntityAPEvaluator(folder),
        lambda cfg, name, folder: (
            Detectron2PanopticEvaluator(name, folder) if cfg.TEST.DETECTRON2_PANOPTIC else None
        ),
    ],
    "noun_extraction": [lambda _, __, folder: NounExtractionEvaluator(folder)],
    "refcoco": [lambda _, __, folder: ReferringEvaluator(folder)],
}
"""Evaluators per ``evaluator_type`` of a dataset's metadata; see `register_evaluator`."""

TASKS: dict[str, str] = {
    "png": "ground",
    "coco_panoptic_seg": "panoptic",
    "noun_extraction": "extract",
    "refcoco": "refer",
}
"""The task by which the model answers for a dataset of each ``evaluator_type``."""


def register_evaluator(evaluator_type: str, *factories: Factory, task: str = "ground") -> None:
    """Say how datasets of a new ``evaluator_type`` are scored.

    Args:
        evaluator_type: what the datasets' metadata says.
        factories: make a ``DatasetEvaluator`` each from (cfg, dataset name, output folder), or
            None; each evaluator returns tasks of its own names.
        task: what the model is asked: "ground", "extract", "describe", "panoptic" or "refer".

    Raises:
        ValueError: the type is taken, no factory is given, or the task is unknown.
    """
    tasks = sorted({*TASKS.values(), "describe"})
    if evaluator_type in EVALUATORS:
        raise ValueError(f"evaluator_type {evaluator_type!r} is registered already: take another")
    if not factories:
        raise ValueError(f"evaluator_type {evaluator_type!r}: no factory was given")
    if task not in tasks:
        raise ValueError(
            f"evaluator_type {evaluator_type!r}: unknown task {task!r}: use one of {tasks}"
        )
    EVALUATORS[evaluator_type], TASKS[evaluator_type] = list(factories), task


def task_for(cfg: Any, dataset_name: str) -> str:
    """The task by which the model answers for a dataset (``TEST.NOUNS`` decides for narratives).

    Raises:
        ValueError: the metadata has no type that is known, or ``TEST.NOUNS`` is no mode.
    """
    kind = _type_of(dataset_name)
    modes = ("given", "extracted")
    if cfg.TEST.NOUNS not in modes:
        raise ValueError(f"TEST.NOUNS is {cfg.TEST.NOUNS!r}: use one of {modes}")
    return "extract" if kind == "png" and cfg.TEST.NOUNS == "extracted" else TASKS[kind]


def build_evaluator(cfg: Any, dataset_name: str, output_folder: str) -> DatasetEvaluators:
    """All evaluators of a dataset's ``evaluator_type``; ValueError for one that is not known."""
    # A factory gives None where the config does not ask for its evaluator.
    factories = EVALUATORS[_type_of(dataset_name)]
    made = [make(cfg, dataset_name, output_folder) for make in factories]
    return DatasetEvaluators([evaluator for evaluator in made if evaluator is not None])


def _type_of(dataset_name: str) -> str:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"dataset {dataset_name}: evaluator_type is {kind!r}, known: {sorted(EVALUATORS)}; "
            "gella.evaluation.register_evaluator adds one"
        )
    return kind


def asked_categories(cfg: Any, dataset_name: str) -> list[dict[str, Any]] | None:
    """Categories to list in the prompt for a dataset, by ``TEST.CATEGORIES_FROM``.

    The key names a registered dataset, or a JSON file: COCO's form (``[{id, name, isthing}, ...]``,
    or an object that has it under ``categories``) with the dataset's ids in any order, or a list of
    names in the order of the dataset's categories. The truth stays the dataset's.

    Returns:
        dicts ``id``, ``name``, ``isthing``; None where the key is empty or the dataset has no
        categories, and its own are to be taken.

    Raises:
        FileNotFoundError: neither a dataset nor a file.
        ValueError: it is no list of categories, its ids are not the dataset's, or a name is twice.
    """
    source = cfg.TEST.CATEGORIES_FROM
    truth = MetadataCatalog.get(dataset_name).get("categories", None)
    if not source or not truth:
        return None
    if source in MetadataCatalog.list():
        content: Any = {"categories": MetadataCatalog.get(source).get("categories", [])}
    else:
        advice = "name a registered dataset or a JSON file"
        content = read_json(source, "TEST.CATEGORIES_FROM:", advice)
    content = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise ValueError(f"TEST.CATEGORIES_FROM: {source} holds no list of categories")
    if content and all(isinstance(item, str) for item in content):
        if len(content) != len(truth):
            raise ValueError(
                f"TEST.CATEGORIES_FROM: {source} has {len(content)} names but {dataset_name} has "
                f"{len(truth)} categories: give one name each, in the same order"
            )
        named = [{**old, "name": name} for old, name in zip(truth, content, strict=True)]
        return read_categories(f"TEST.CATEGORIES_FROM: {source}", named)
    kinds = {int(category["id"]): category["isthing"] for category in truth}
    try:
        names = [(int(category["id"]), str(category["name"])) for category in content]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"TEST.CATEGORIES_FROM: {source} is no list of categories ({error!r}): each needs "
            "'id' and 'name'"
        ) from error
    ids = [number for number, _ in names]
    if sorted(ids) != sorted(kinds):
        odd = sorted(set(ids) ^ set(kinds))
        raise ValueError(
            f"TEST.CATEGORIES_FROM: {source} has {len(ids)} categories, {dataset_name} "
            f"{len(kinds)}; ids in only one of them or twice: {odd[:10] or 'twice'}: the names may "
            "differ, the ids may not"
        )
    named = [{"id": number, "name": name, "isthing": kinds[number]} for number, name in names]
    return read_categories(f"TEST.CATEGORIES_FROM: {source}", named)

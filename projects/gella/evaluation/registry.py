"""Which evaluators and which task a dataset gets, by the ``evaluator_type`` of its metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from gella.evaluation.entity import EntityAPEvaluator
from gella.evaluation.nouns import NounExtractionEvaluator
from gella.evaluation.panoptic import Detectron2PanopticEvaluator, PanopticEvaluator
from gella.evaluation.png import PNGEvaluator
from gella.evaluation.referring import ReferringEvaluator

Factory = Callable[[Any, str, str], "DatasetEvaluator | None"]
"""(cfg, dataset name, output folder) -> evaluator, or None where the config does not want it."""

NOUNS = ("given", "extracted")
"""Values of ``TEST.NOUNS``."""


def _detectron2_panoptic(cfg: Any, name: str, folder: str) -> DatasetEvaluator | None:
    if not cfg.TEST.DETECTRON2_PANOPTIC:
        return None
    return Detectron2PanopticEvaluator(name, folder)


def _nouns_of_narratives(cfg: Any, _: str, folder: str) -> DatasetEvaluator | None:
    return NounExtractionEvaluator(folder) if cfg.TEST.NOUNS == "extracted" else None


EVALUATORS: dict[str, list[Factory]] = {
    "png": [
        lambda cfg, _, folder: PNGEvaluator(folder, cfg.TEST.PNG_PROTOCOL),
        _nouns_of_narratives,
    ],
    "coco_panoptic_seg": [
        lambda _, name, folder: PanopticEvaluator(MetadataCatalog.get(name).categories, folder),
        lambda _, __, folder: EntityAPEvaluator(folder),
        _detectron2_panoptic,
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
    known = sorted({*TASKS.values(), "describe"})
    if evaluator_type in EVALUATORS:
        raise ValueError(f"evaluator_type {evaluator_type!r} is registered already: take another")
    if not factories:
        raise ValueError(f"evaluator_type {evaluator_type!r}: no factory was given")
    if task not in known:
        raise ValueError(
            f"evaluator_type {evaluator_type!r}: unknown task {task!r}: use one of {known}"
        )
    EVALUATORS[evaluator_type], TASKS[evaluator_type] = list(factories), task


def task_for(cfg: Any, dataset_name: str) -> str:
    """The task by which the model answers for a dataset (``TEST.NOUNS`` decides for narratives).

    Raises:
        ValueError: the metadata has no type that is known, or ``TEST.NOUNS`` is no mode.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in TASKS:
        raise ValueError(
            f"dataset {dataset_name}: evaluator_type is {kind!r}, known: {sorted(TASKS)}; "
            "gella.evaluation.register_evaluator adds one"
        )
    if cfg.TEST.NOUNS not in NOUNS:
        raise ValueError(f"TEST.NOUNS is {cfg.TEST.NOUNS!r}: use one of {NOUNS}")
    if kind == "png" and cfg.TEST.NOUNS == "extracted":
        return "extract"
    return TASKS[kind]


def build_evaluator(cfg: Any, dataset_name: str, output_folder: str) -> DatasetEvaluators:
    """All evaluators of a dataset's ``evaluator_type``.

    Raises:
        KeyError: the metadata has no type that ``EVALUATORS`` knows.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise KeyError(
            f"dataset {dataset_name}: no evaluator for evaluator_type {kind!r}: set it to one of "
            f"{', '.join(sorted(EVALUATORS))} or add it with gella.evaluation.register_evaluator"
        )
    made = [make(cfg, dataset_name, output_folder) for make in EVALUATORS[kind]]
    return DatasetEvaluators([evaluator for evaluator in made if evaluator is not None])

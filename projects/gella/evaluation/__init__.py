"""Detectron2 evaluators over ``metrics``: what a model answered, against the annotation.

Each evaluator compares mapped test inputs (with ``entities_full``, ``phrases``, ``annotation``)
with the model's outputs, image by image; ``evaluate`` gathers the rows of all processes, sorts
them, and returns ``{task: {metric: score}}`` in percent on the main process, ``{}`` on the others.
Sums are exact or correctly rounded, so results depend neither on batches nor on processes.
"""

from gella.evaluation import metrics
from gella.evaluation.categories import asked_categories
from gella.evaluation.entity import EntityAPEvaluator
from gella.evaluation.nouns import NounExtractionEvaluator
from gella.evaluation.panoptic import Detectron2PanopticEvaluator, PanopticEvaluator
from gella.evaluation.png import PNGEvaluator
from gella.evaluation.referring import ReferringEvaluator
from gella.evaluation.registry import (
    EVALUATORS,
    TASKS,
    build_evaluator,
    register_evaluator,
    task_for,
)
from gella.evaluation.results import (
    format_results,
    load_results,
    merge_datasets,
    save_results,
)

__all__ = [
    "EVALUATORS",
    "TASKS",
    "Detectron2PanopticEvaluator",
    "EntityAPEvaluator",
    "NounExtractionEvaluator",
    "PNGEvaluator",
    "PanopticEvaluator",
    "ReferringEvaluator",
    "asked_categories",
    "build_evaluator",
    "format_results",
    "load_results",
    "merge_datasets",
    "metrics",
    "register_evaluator",
    "save_results",
    "task_for",
]

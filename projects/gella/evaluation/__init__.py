"""Detectron2 evaluators over `metrics`: what a model answered, against the annotation."""

from gella.evaluation import metrics
from gella.evaluation.evaluators import (
    Detectron2PanopticEvaluator,
    EntityAPEvaluator,
    NounExtractionEvaluator,
    PanopticEvaluator,
    PNGEvaluator,
    ReferringEvaluator,
)
from gella.evaluation.registry import (
    EVALUATORS,
    TASKS,
    asked_categories,
    build_evaluator,
    register_evaluator,
    task_for,
)
from gella.evaluation.results import format_results, load_results, merge_datasets

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
    "task_for",
]

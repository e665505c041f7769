"""From predictions and a dataset to the figures of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from gella.commands.analysis import groups
from gella.commands.analysis.cases import Case, Predictions
from gella.commands.analysis.gallery import choose, pictures
from gella.commands.analysis.scenes import Facts, case_facts, locate

_SAME_IOU = 1e-6


@dataclass
class Example:
    """One case of the gallery; ``pictures`` are (caption, data URI)."""

    case: Case
    facts: Facts | None
    pictures: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Analysis:
    """All that the page shows of one file of predictions.

    Attributes:
        predictions: what was analysed.
        overall: all cases.
        histograms: counts per bin of IoU, by part (``parts``).
        curves: recall over thresholds 0, 0.01, ... 1 by part, and of the oracle if there is one.
        breakdowns: (grouping, its groups), those with at least one group.
        errors, relations, confusions: see ``groups``; empty without images.
        worst, best: cases to look at.
    """

    predictions: Predictions
    overall: groups.Group
    histograms: dict[str, list[int]]
    curves: dict[str, list[float]]
    breakdowns: list[tuple[groups.Grouping, list[groups.Group]]]
    errors: list[tuple[str, int]] = field(default_factory=list)
    relations: list[dict[str, Any]] = field(default_factory=list)
    confusions: list[tuple[str, str, int]] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The figures without the gallery, in values that JSON takes; shares in [0, 1]."""
        return {
            "label": self.predictions.label,
            "dataset": self.predictions.dataset,
            "task": self.predictions.task,
            "overall": asdict(self.overall),
            "histograms": self.histograms,
            "recall_curves": self.curves,
            "groups": {
                grouping.title: [asdict(item) for item in items]
                for grouping, items in self.breakdowns
            },
            "errors": dict(self.errors),
            "relations_of_wrong_entities": self.relations,
            "confusions": [
                {"wanted": wanted, "taken": taken, "cases": count}
                for wanted, taken, count in self.confusions
            ],
        }


def parts(cases: list[Case]) -> dict[str, list[Case]]:
    """Cases by thing and stuff where all are told apart, else all under one name."""
    if any(case.is_thing is None for case in cases):
        return {"all": cases}
    found = {
        "thing": [case for case in cases if case.is_thing],
        "stuff": [case for case in cases if not case.is_thing],
    }
    return {name: members for name, members in found.items() if members}


def check_dataset(predictions: Predictions, facts: Sequence[Facts | None]) -> None:
    """Refuse a dataset that gives narratives other IoUs than the evaluation did.

    Another dataset may well have the same image and segment ids. The soft IoU of the "official"
    protocol, and expressions whose objects overlap, cannot be checked.

    Raises:
        ValueError: naming the first such case, both numbers and how many there are.
    """
    if predictions.task != "png" or predictions.results.get("protocol_official"):
        return
    pairs = [(c, f.iou) for c, f in zip(predictions.cases, facts, strict=True) if f is not None]
    wrong = [(case, iou) for case, iou in pairs if abs(case.iou - iou) > _SAME_IOU]
    if wrong:
        case, iou = wrong[0]
        raise ValueError(
            f"{predictions.file}: image {case.image_id}, phrase {case.text!r} has the IoU "
            f"{case.iou:.4f}, but {iou:.4f} with this dataset ({len(wrong)} of {len(pairs)} "
            "phrases differ): it is not the dataset that was evaluated; see --dataset and "
            "DETECTRON2_DATASETS, or use --without-images"
        )


def analyse(
    predictions: Predictions,
    records: Mapping[str, list[dict[str, Any]]] | None,
    names: Mapping[Any, str],
    examples: int,
) -> Analysis:
    """Count, compare with the dataset, and choose the cases to show.

    Args:
        predictions: with at least one case.
        records: dataset dicts by image id; None leaves out what needs images and annotation.
        names: of the categories, by id.
        examples: worst and best cases to show, at most so many each.

    Raises:
        OSError, ValueError: the dataset does not fit the predictions, or a file is missing.
    """
    cases = predictions.cases
    facts: list[Facts | None] = [None] * len(cases)
    if records is not None:
        scenes = locate(cases, records, names)
        bar = tqdm(scenes, predictions.label, total=len(cases), leave=False)
        facts = [case_facts(case, scene) for case, scene in bar]
        check_dataset(predictions, facts)
    known = [fact for fact in facts if fact is not None]
    split = {name: [case.iou for case in members] for name, members in parts(cases).items()}
    curves = {"all": [case.iou for case in cases], **split}
    if all("oracle" in case.baselines for case in cases):
        curves["oracle"] = [case.baselines["oracle"] for case in cases]
    sorted_groups = [(g, groups.group(g, cases, facts)) for g in groups.GROUPINGS]
    result = Analysis(
        predictions,
        groups.summarise(cases),
        {name: groups.histogram(ious) for name, ious in split.items()},
        {name: groups.recall_curve(ious) for name, ious in curves.items()},
        [(grouping, items) for grouping, items in sorted_groups if items],
        groups.count_errors(known),
        groups.count_relations(known),
        groups.count_confusions(known),
    )
    chosen = choose(cases, facts, examples)
    result.worst, result.best = ([Example(cases[i], facts[i]) for i in part] for part in chosen)
    if records is not None:
        shown = [*result.worst, *result.best]
        scenes = locate([example.case for example in shown], records, names)
        for example, (case, scene) in zip(shown, scenes, strict=True):
            example.pictures = pictures(case, scene)
    return result

"""Average recall by what a phrase is like, and counts of what went wrong. Pure functions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gella.commands.analysis.cases import Case
from gella.commands.analysis.scenes import ERRORS, RELATIONS, Facts
from gella.evaluation import metrics

POSITION_WORDS = re.compile(
    r"\b(left|right|top|bottom|upper|lower|above|below|under|over|behind|front|beside|between|"
    r"near|nearest|next|middle|cent(?:er|re)|corner|far|farthest|closest|side|edge|foreground|"
    r"background|inside|outside|around|opposite)\b",
    re.IGNORECASE,
)
"""Words by which a phrase says where something is."""

_SIZES = ((0.005, "under 0.5 %"), (0.02, "0.5 to 2 %"), (0.08, "2 to 8 %"), (0.32, "8 to 32 %"))


@dataclass(frozen=True)
class Grouping:
    """A way to sort cases.

    Attributes:
        title: what is told apart.
        labels: of the groups, in the order in which they are shown.
        of: the label of a case, or None where it is not known. ``Facts`` are None without pictures.
        note: how a group is told, for the reader.
    """

    title: str
    labels: tuple[str, ...]
    of: Callable[[Case, Facts | None], str | None]
    note: str


@dataclass
class Group:
    """The cases of one label.

    Attributes:
        label: of the grouping.
        n: cases.
        recall: average recall, the mean IoU, in [0, 1].
        margin: half of the 95 % interval of the mean, taking cases for independent; NaN for n < 2.
        accuracy: share of cases with an IoU above 0.5.
        oracle: average recall of the best union of the given entities, or None.
    """

    label: str
    n: int
    recall: float
    margin: float
    accuracy: float
    oracle: float | None


def _count_label(most: int) -> Callable[[int], str]:
    return lambda count: str(count) if count < most else f"{most} or more"


def _entities(case: Case, _: Facts | None) -> str | None:
    if case.segment_ids is None:
        return None
    return _count_label(5)(len(set(case.segment_ids)))


def _size(_: Case, facts: Facts | None) -> str | None:
    if facts is None or not facts.wanted:
        return None
    return next((label for limit, label in _SIZES if facts.area_share < limit), "32 % or more")


def _flag(name: str, yes: str, no: str) -> Callable[[Case, Facts | None], str | None]:
    def label(case: Case, _: Facts | None) -> str | None:
        value = getattr(case, name)
        return None if value is None else (yes if value else no)

    return label


def _rivals(_: Case, facts: Facts | None) -> str | None:
    if facts is None or facts.rivals is None:
        return None
    return _count_label(3)(facts.rivals)


GROUPINGS: tuple[Grouping, ...] = (
    Grouping(
        "words of the phrase",
        ("1", "2", "3", "4", "5", "6 or more"),
        lambda case, _: _count_label(6)(max(1, len(case.text.split()))),
        "words between blanks, articles among them",
    ),
    Grouping(
        "entities that the phrase names",
        ("0", "1", "2", "3", "4", "5 or more"),
        _entities,
        "segments of the annotation",
    ),
    Grouping(
        "size of what is named",
        (*(label for _, label in _SIZES), "32 % or more"),
        _size,
        "share of the image that the annotated segments cover together",
    ),
    Grouping(
        "other entities of the same category",
        ("0", "1", "2", "3 or more"),
        _rivals,
        "segments in the image that are of a named one's category but not meant",
    ),
    Grouping(
        "thing or stuff",
        ("thing", "stuff"),
        _flag("is_thing", "thing", "stuff"),
        "category of the phrase's last segment",
    ),
    Grouping(
        "singular or plural",
        ("singular", "plural"),
        _flag("is_plural", "plural", "singular"),
        "as the dataset flags the phrase",
    ),
    Grouping(
        "words of position",
        ("none", "some"),
        lambda case, _: "some" if POSITION_WORDS.search(case.text) else "none",
        "such as left, behind, near, corner",
    ),
)
"""All groupings of the page, in its order."""


def summarise(cases: Sequence[Case], label: str = "all") -> Group:
    """Average recall of some cases, at least one."""
    ious = np.array([case.iou for case in cases])
    known = [case.baselines["oracle"] for case in cases if "oracle" in case.baselines]
    margin = 1.96 * float(ious.std(ddof=1)) / math.sqrt(len(ious)) if len(ious) > 1 else math.nan
    return Group(
        label,
        len(cases),
        metrics.average_recall(ious),
        margin,
        float((ious > 0.5).mean()),
        metrics.average_recall(known) if len(known) == len(cases) else None,
    )


def group(grouping: Grouping, cases: Sequence[Case], facts: Sequence[Facts | None]) -> list[Group]:
    """Groups with at least one case, in the order of the labels; empty if no label is known."""
    members: dict[str, list[Case]] = {}
    for case, fact in zip(cases, facts, strict=True):
        label = grouping.of(case, fact)
        if label is not None:
            members.setdefault(label, []).append(case)
    return [summarise(members[label], label) for label in grouping.labels if label in members]


def histogram(ious: Sequence[float], bins: int = 20) -> list[int]:
    """Counts per equal bin of [0, 1]; 1 falls into the last."""
    # Edges as quotients, so that 0.3 opens the bin that starts at 0.3.
    return np.histogram(ious, bins=np.arange(bins + 1) / bins)[0].tolist()


def recall_curve(ious: Sequence[float], steps: int = 100) -> list[float]:
    """Share of IoUs at or above each of ``steps`` + 1 thresholds 0 ... 1; an IoU of 0 is a miss.

    As in average recall, which is the area under the curve.
    """
    values = np.sort(np.asarray(ious, dtype=np.float64))
    # Thresholds as quotients, so that 0.3 meets the IoU 0.3.
    below = np.searchsorted(values, np.arange(steps + 1) / steps, side="left")
    below[0] = np.count_nonzero(values == 0)
    return ((len(values) - below) / len(values)).tolist()


def count_errors(facts: Sequence[Facts]) -> list[tuple[str, int]]:
    """(meaning, cases) of each kind of outcome that occurs, in the order of ``ERRORS``."""
    seen = Counter(fact.error for fact in facts)
    return [(ERRORS[kind], seen[kind]) for kind in ERRORS if seen[kind]]


def count_relations(facts: Sequence[Facts]) -> list[dict[str, Any]]:
    """What wrongly taken entities have in common with the right ones.

    Returns:
        per relation of ``RELATIONS``, and for "none of these": ``name``, ``count``, ``n`` wrongly
        taken entities, and ``expected``, the count if they had been drawn blindly (None for "none
        of these"). Empty without any.
    """
    held = [relation for fact in facts for relation in fact.relations]
    chances = [chance for fact in facts for chance in fact.chances]
    if not held:
        return []
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "count": sum(relation[name] for relation in held),
            "expected": math.fsum(chance[name] for chance in chances),
            "n": len(held),
        }
        for name in RELATIONS
    ]
    alone = sum(not any(relation.values()) for relation in held)
    return [*rows, {"name": "none of these", "count": alone, "expected": None, "n": len(held)}]


def count_confusions(facts: Sequence[Facts], most: int = 15) -> list[tuple[str, str, int]]:
    """(wanted category, wrongly taken category, cases), the most frequent first.

    Only cases with a missed and a wrongly taken entity: one stands in another's place.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for fact in facts:
        names = dict(zip(fact.wanted, fact.wanted_names)), dict(zip(fact.taken, fact.taken_names))
        missed = {names[0][i] for i in fact.wanted if i not in names[1]}
        wrong = {names[1][i] for i in fact.taken if i not in names[0]}
        seen.update((a, b) for a in missed for b in wrong)
    order = sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    return [(*pair, count) for pair, count in order[:most]]

"""Which evaluations a table of the paper needs, and our rows beside the paper's as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from detectron2.data import MetadataCatalog

from gella.evaluation.paper import PAPER, REFCOCO_DATASETS, Column

TABLES = (*(str(number) for number in PAPER), "all")
"""What ``--table`` takes."""

_FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "shapes": {
        "png": ("gella_shapes_png_val",),
        "coco_panoptic_seg": ("gella_shapes_panoptic_val",),
        "noun_extraction": ("gella_shapes_nouns_val",),
        "refcoco": ("gella_shapes_refcoco_val",),
    },
    "coco": {
        "png": ("gella_coco_png_val2017",),
        "coco_panoptic_seg": ("gella_coco_panoptic_val2017",),
        "noun_extraction": ("gella_coco_nouns_val2017",),
        "refcoco": REFCOCO_DATASETS,
    },
}


@dataclass(frozen=True)
class Run:
    """One evaluation of the weights.

    Attributes:
        name: of its folder.
        label: of its row.
        datasets: names in the catalogs.
        changes: config keys and their values.
        modes: what the table "all" lists in columns of its own.
    """

    name: str
    label: str
    datasets: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ()


def family_of(cfg: Any) -> str:
    """ "shapes", "coco" or "own": whose datasets the tables of a config are on (DATASETS.TEST)."""
    names = list(cfg.DATASETS.TEST)
    if names and names[0].startswith("gella_shapes_"):
        return "shapes"
    return "coco" if names and names[0].startswith("gella_") else "own"


def plan_table(cfg: Any, table: str, root: str) -> list[Run]:
    """The evaluations that a table needs, with the config's weights.

    Args:
        cfg: its DATASETS.TEST says on which data: the synthetic scenes, COCO, or datasets of one's
            own, of which those with the table's ``evaluator_type`` count.
        table: one of ``TABLES``.
        root: folder of the datasets, for the synthetic scenes' imagined segmenter.

    Raises:
        ValueError: an unknown table, no dataset of the needed type, or no source of predicted masks
            where the table compares sources.
    """
    if table not in TABLES:
        raise ValueError(f"--table {table}: choose one of {', '.join(TABLES)}")
    if table == "all":
        return _all_modes(cfg, root)
    if table == "2":
        return [Run("refer", "ours", _datasets(cfg, "refcoco"))]
    if table == "3":
        names = _datasets(cfg, "png")
        return [
            Run(f"nouns_{mode}", f"ours, nouns {mode}", names, {"TEST.NOUNS": mode})
            for mode in ("given", "extracted")
        ]
    panoptic = () if table == "9" else _datasets(cfg, "coco_panoptic_seg")
    if table == "4":
        return [Run("panoptic", "ours", panoptic)]
    if table == "6":  # annotated entities go in, and all that the decoder draws is ranked
        changes = {"INPUT.GELLA.ENTITY_SOURCES": [], "MODEL.GELLA.ENTITY_SCORE_THRESHOLD": 0.0}
        return [Run("reconstruction", "ours", panoptic, changes)]
    if table == "8":  # the paper scores what the decoder drew
        return [
            Run(
                f"masks_{name}",
                f"ours, tested on {_LABELS[name]}",
                panoptic,
                {"INPUT.GELLA.ENTITY_SOURCES": sources, "MODEL.GELLA.SNAP": False},
            )
            for name, sources in _mask_sources(cfg, root, every=True).items()
        ]
    names = (*_datasets(cfg, "png"), *_datasets(cfg, "noun_extraction"))
    return [Run("narratives", "ours", names)]


_LABELS = {
    "predicted": "predicted masks",
    "entityseg": "masks of an EntitySeg model",
    "annotation": "the annotation",
}


def _datasets(cfg: Any, kind: str) -> tuple[str, ...]:
    family = family_of(cfg)
    if family in _FAMILIES:
        return _FAMILIES[family][kind]
    names = tuple(
        name
        for name in cfg.DATASETS.TEST
        if MetadataCatalog.get(name).get("evaluator_type") == kind
    )
    if not names:
        raise ValueError(
            f"DATASETS.TEST {tuple(cfg.DATASETS.TEST)} has no dataset of evaluator_type {kind!r}, "
            "which the table needs"
        )
    return names


def _mask_sources(cfg: Any, root: str, every: bool = False) -> dict[str, list[list[str]]]:
    """Values of INPUT.GELLA.ENTITY_SOURCES by kind of masks."""
    predicted = [list(entry) for entry in cfg.INPUT.GELLA.ENTITY_SOURCES]
    family = family_of(cfg)
    if not predicted and family == "shapes":
        file = f"{root}/shapes/annotations/predicted_val.json"
        predicted = [["gella_shapes_*_val", "auto", file]]
    if not predicted and family == "coco":
        file = "datasets/entities/coco_entity_swin_l_{}.json"
        predicted = [["gella_coco_*_val2017", "auto", file.format("val2017")]]
        predicted += [[name, "auto", file.format("train2017")] for name in REFCOCO_DATASETS]
    if not predicted:
        raise ValueError(
            "the table compares entity masks of several sources: set INPUT.GELLA.ENTITY_SOURCES to "
            "a file of predicted masks for DATASETS.TEST"
        )
    sources: dict[str, list[list[str]]] = {"annotation": [], "predicted": predicted}
    if every and family == "coco":
        file = "datasets/entities/entityseg_swin_l_val2017.json"
        sources["entityseg"] = [["gella_coco_*_val2017", "auto", file]]
    return sources


def _all_modes(cfg: Any, root: str) -> list[Run]:
    runs = []
    own = family_of(cfg) == "own"
    known = {MetadataCatalog.get(n).get("evaluator_type") for n in cfg.DATASETS.TEST}
    sources = _mask_sources(cfg, root)
    for mode, (masks, entries), snap in product(
        ("given", "extracted"), sources.items(), (True, False)
    ):
        kinds = ["png"] if mode == "extracted" else ["png", "coco_panoptic_seg", "refcoco"]
        wanted = [kind for kind in kinds if not own or kind in known]
        names = tuple(name for kind in wanted for name in _datasets(cfg, kind))
        if not names:
            continue
        snapped = "snapped" if snap else "drawn"
        changes = {
            "TEST.NOUNS": mode,
            "INPUT.GELLA.ENTITY_SOURCES": entries,
            "MODEL.GELLA.SNAP": snap,
        }
        modes = (mode, masks, "on" if snap else "off")
        runs.append(Run(f"nouns_{mode}_{masks}_{snapped}", "", names, changes, modes))
    return runs


def changed(cfg: Any, run: Run, output: str) -> Any:
    """A frozen copy of ``cfg`` for a run, whose files go to ``output``."""
    copy = cfg.clone()
    copy.defrost()
    for key, value in run.changes.items():
        node, parts = copy, key.split(".")
        for part in parts[:-1]:
            node = node[part]
        node[parts[-1]] = value
    copy.DATASETS.TEST, copy.OUTPUT_DIR = tuple(run.datasets), output
    copy.freeze()
    return copy


Outcome = Mapping[str, Mapping[str, Mapping[str, float]]]
"""{dataset: {task: {metric: score}}} of one run."""


def table_markdown(table: str, runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    """Our rows beside the paper's, or for "all" one row per combination of modes.

    Args:
        table: one of ``TABLES``.
        runs: of `plan_table`.
        outcomes: of the runs, in the same order.
    """
    if table == "all":
        return _modes_markdown(runs, outcomes)
    paper = PAPER[int(table)]
    ours = sorted({dataset for outcome in outcomes for dataset in outcome})
    columns = [column for column in paper.columns if not column.dataset]
    if not columns:  # a column per dataset; those that are not the paper's come last
        columns = list(paper.columns)
        own = [name for name in ours if name not in {c.dataset for c in columns}]
        columns += [Column(name, columns[0].task, columns[0].metric, name) for name in own]
    rows = [
        [f"{name} (paper)", paper.data, *(_figure(x) for x in _padded(figures, len(columns)))]
        for name, figures in paper.rows
    ]
    for run, outcome in zip(runs, outcomes, strict=True):
        figures = [_score(outcome, column) for column in columns]
        rows.append([f"**{run.label}**", ", ".join(run.datasets), *map(_figure, figures)])
    head = [f"Table {table}", "on", *(column.head for column in columns)]
    apart = [run for run in runs if paper.data not in _data_of(run.datasets)]
    note = " Ours is on other data: the rows do not compare." if apart else ""
    return f"{paper.title}.{note}\n\n{_markdown(head, rows)}\n"


def _data_of(datasets: Sequence[str]) -> set[str]:
    """What the paper calls the images of our datasets."""
    return {
        "COCO train2014" if "refcoco" in name else "COCO val2017"
        for name in datasets
        if name.startswith(("gella_coco_", "gella_refcoco"))
    }


def compared_markdown(outcome: Outcome) -> str:
    """Every task of an evaluation with the paper's row of the same figures, where it has one."""
    parts = []
    present = {task for tasks in outcome.values() for task in tasks}
    for number, task in ((3, "png"), (4, "panoptic_seg"), (6, "entity"), (2, "refer")):
        if task in present:
            datasets = tuple(name for name, tasks in outcome.items() if task in tasks)
            part = {name: outcome[name] for name in datasets}
            parts.append(table_markdown(str(number), [Run("", "ours", datasets)], [part]))
    for name, tasks in outcome.items():
        if "nouns" in tasks:
            head = ["Noun extraction", "on", "recall", "precision"]
            figures = (tasks["nouns"].get(key) for key in ("recall", "precision"))
            rows = [["GELLA-7B (paper, Table 9)", "COCO val2017", "96.1", "-"]]
            rows.append(["**ours**", name, *map(_figure, figures)])
            parts.append(f"Nouns in generated answers.\n\n{_markdown(head, rows)}\n")
    return "\n".join(parts)


_MODE_COLUMNS = (
    *PAPER[3].columns,
    Column("oracle AR", "png", "oracle_AR"),
    Column("nouns found", "nouns", "recall"),
    *PAPER[4].columns,
    Column("cIoU", "refer", "cIoU"),
    Column("gIoU", "refer", "gIoU"),
    *PAPER[6].columns[:1],
)


def _modes_markdown(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    rows = [
        [*run.modes, *(_figure(_score(outcome, column)) for column in _MODE_COLUMNS)]
        for run, outcome in zip(runs, outcomes, strict=True)
    ]
    head = ["nouns", "masks", "snapping", *(column.head for column in _MODE_COLUMNS)]
    names = ", ".join(dict.fromkeys(name for run in runs for name in run.datasets))
    return f"All modes on {names}.\n\n{_markdown(head, rows)}\n"


def _score(outcome: Outcome, column: Column) -> float | None:
    for dataset, tasks in outcome.items():
        fits = not column.dataset or dataset == column.dataset
        if fits and column.metric in tasks.get(column.task, {}):
            return tasks[column.task][column.metric]
    return None


def _padded(figures: Sequence[float | None], length: int) -> list[float | None]:
    return [*figures, *[None] * (length - len(figures))]


def _figure(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

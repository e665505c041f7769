"""Tables of the paper (arXiv 2402.02555): the evaluations each needs, our rows beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import MetadataCatalog

from gella.evaluation.results import figure

REFCOCO = {
    f"gella_{name}_{by}_{split}": f"{title} {split}"
    for title, name, by, splits in (
        ("RefCOCO", "refcoco", "unc", ("val", "testA", "testB")),
        ("RefCOCO+", "refcocoplus", "unc", ("val", "testA", "testB")),
        ("RefCOCOg", "refcocog", "umd", ("val", "test")),
    )
    for split in splits
}
"""Datasets of Table 2's columns, in order, and their heads."""


class Column(NamedTuple):
    """One figure: its head as in the paper, and the task and metric (in percent) that results
    have it under. With a ``dataset`` the figure is of that dataset alone, without of any."""

    head: str
    task: str
    metric: str
    dataset: str = ""


_PREDICTED = "masks of an entity Mask2Former Swin-L, drawn; else not said"
_OTHERS = ("LISA-7B", "PiGLET", "PPO-TD")  # draw masks of their own


class PaperTable(NamedTuple):
    """A table as the paper prints it. ``data`` names what the figures were measured on, ``how``
    what `conditions` says of ours; a row is a name and a figure per column, None where it is
    unreadable or not given."""

    title: str
    data: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float | None, ...]]
    how: str = _PREDICTED


_AR = (
    Column("AR", "png", "AR"),
    Column("AR things", "png", "AR_thing"),
    *(Column(f"AR {name}", "png", f"AR_{name}") for name in ("stuff", "singular", "plural")),
)
_PQ = tuple(Column(name, "panoptic_seg", name) for name in ("PQ", "SQ", "RQ"))
_AP = tuple(Column(name, "entity", name) for name in ("AP", "AP50", "AP75"))
_VAL = "COCO val2017"

PAPER: dict[int, PaperTable] = {
    2: PaperTable(
        "Referring expression segmentation, cIoU",
        "COCO train2014",
        tuple(Column(head, "refer", "cIoU", dataset) for dataset, head in REFCOCO.items()),
        {
            "LISA-7B": (74.9, 79.1, 72.3, 65.1, 70.8, 58.1, 67.9, 70.6),
            "GELLA-7B": (76.1, 79.9, 73.1, 66.4, 72.7, 60.2, 69.6, 71.3),
            "GELLA-13B": (76.7, 80.5, 73.6, 67.0, 73.2, 60.6, 70.4, 71.5),
        },
    ),
    3: PaperTable(
        "Panoptic narrative grounding, average recall",
        _VAL,
        _AR,
        {
            "PiGLET": (65.9, 64.0, 68.6, 67.2, 54.5),
            "PPO-TD": (66.1, 64.0, 70.7, 68.1, 58.3),
            "GELLA-7B": (69.8, 66.2, 72.3, 69.9, 58.4),
            "GELLA-13B": (71.3, 67.8, 73.1, 71.0, 59.5),
        },
    ),
    4: PaperTable(
        "Panoptic segmentation",
        _VAL,
        _PQ,
        {
            "GELLA-7B, 12 epochs": (None, 83.3, None),
            "GELLA-7B, 50 epochs": (None, 83.4, None),
            "GELLA-7B of Tables 5, 7 and 8": (53.1, 83.3, 63.8),
        },
    ),
    6: PaperTable(
        "Colormap reconstruction, class-agnostic mask AP",
        _VAL,
        _AP,
        {
            "6a MobileNet(V2)": (95.2, 96.9, 96.1),
            "6a Swin-Tiny": (95.8, 98.9, 97.3),
            "6a Swin-Large": (96.3, 99.0, 97.8),
            "6b trained on masks of a COCO model": (95.2, 98.7, None),
            "6b trained on masks of an EntitySeg model": (94.9, 98.5, 97.0),
            "6b trained on the annotation": (95.2, 96.9, None),
        },
        "annotated masks, drawn; else not said",
    ),
    8: PaperTable(
        "Sources of entity masks",
        _VAL,
        _PQ,
        {
            "8a trained on masks of a COCO model": (53.0, 83.1, 63.8),
            "8a trained on masks of an EntitySeg model": (52.9, 83.2, 63.7),
            "8a trained on the annotation": (53.1, 83.3, 63.8),
            "8b tested on masks of a COCO model": (53.1, 83.3, 63.8),
            "8b tested on masks of an EntitySeg model": (49.2, 83.7, 58.6),
            "8b tested on the annotation": (79.6, 97.8, 91.4),
        },
        "masks as 8b says, 8a of a COCO model, drawn; else not said",
    ),
    9: PaperTable(
        "Shares of describing, noun extraction and grounding in training",
        _VAL,
        (*_AR, Column("AR text", "nouns", "recall")),
        {
            "0.0, 0.0, 1.0": (66.4, 64.2, 70.5, 68.0, 58.3, 79.4),
            "0.0, 0.2, 0.8": (69.4, 65.8, 71.8, 69.5, 58.0, 95.4),
            "0.1, 0.1, 0.8": (None, None, None, 69.2, None, 95.7),
            "0.2, 0.2, 0.6": (69.8, 66.2, 72.3, 69.9, 58.4, 96.1),
        },
    ),
}
"""By number. Figures that the paper's text layer lost are None."""

TABLES = (*(str(number) for number in PAPER), "all")
"""What ``--table`` takes."""

_KINDS = {"png": "png", "panoptic": "coco_panoptic_seg", "nouns": "noun_extraction"}
_FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    family: {kind: (f"gella_{family}_{name}_{split}",) for name, kind in _KINDS.items()}
    for family, split in (("shapes", "val"), ("coco", "val2017"))
}
_FAMILIES["shapes"]["refcoco"] = ("gella_shapes_refcoco_val",)
_FAMILIES["coco"]["refcoco"] = tuple(REFCOCO)


@dataclass(frozen=True)
class Run:
    """One evaluation of the weights."""

    name: str  # of its folder
    label: str  # of its row
    datasets: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)  # config keys and their values
    modes: tuple[str, ...] = ()  # what the table "all" lists in columns of its own


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
    if table == "9":
        names = (*_datasets(cfg, "png"), *_datasets(cfg, "noun_extraction"))
        return [Run("narratives", "ours", names)]
    panoptic = _datasets(cfg, "coco_panoptic_seg")
    if table == "4":
        return [Run("panoptic", "ours", panoptic)]
    if table == "6":  # annotated entities go in, and all that the decoder draws is ranked
        changes = {"INPUT.GELLA.ENTITY_SOURCES": [], "MODEL.GELLA.ENTITY_SCORE_THRESHOLD": 0.0}
        return [Run("reconstruction", "ours", panoptic, changes)]
    labels = {"annotation": "the annotation", "predicted": "predicted masks"}
    labels["entityseg"] = "masks of an EntitySeg model"
    sources = _mask_sources(cfg, root)
    if _family(cfg) == "coco":
        file = "datasets/entities/entityseg_swin_l_val2017.json"
        sources["entityseg"] = [["gella_coco_*_val2017", "auto", file]]
    return [
        Run(
            f"masks_{name}",
            f"ours, tested on {labels[name]}",
            panoptic,
            # The paper scores what the decoder drew.
            {"INPUT.GELLA.ENTITY_SOURCES": entries, "MODEL.GELLA.SNAP": False},
        )
        for name, entries in sources.items()
    ]


def _family(cfg: Any) -> str:
    """ "shapes", "coco" or "own": whose datasets the tables of a config are on (DATASETS.TEST)."""
    first = next(iter(cfg.DATASETS.TEST), "")
    if first.startswith("gella_shapes_"):
        return "shapes"
    return "coco" if first.startswith("gella_") else "own"


def _datasets(cfg: Any, kind: str) -> tuple[str, ...]:
    """The datasets of an ``evaluator_type`` that the tables of a config are on."""
    family, names = _family(cfg), tuple(cfg.DATASETS.TEST)
    if family in _FAMILIES:
        return _FAMILIES[family][kind]
    fitting = tuple(n for n in names if MetadataCatalog.get(n).get("evaluator_type") == kind)
    if not fitting:
        raise ValueError(
            f"DATASETS.TEST {names} has no dataset of evaluator_type {kind!r}, "
            "which the table needs"
        )
    return fitting


def _mask_sources(cfg: Any, root: str) -> dict[str, list[list[str]]]:
    """Values of INPUT.GELLA.ENTITY_SOURCES by kind of masks."""
    predicted = [list(entry) for entry in cfg.INPUT.GELLA.ENTITY_SOURCES]
    family = _family(cfg)
    if not predicted and family == "shapes":
        file = f"{root}/shapes/annotations/predicted_val.json"
        predicted = [["gella_shapes_*_val", "auto", file]]
    if not predicted and family == "coco":
        file = "datasets/entities/coco_entity_swin_l_{}.json"
        predicted = [["gella_coco_*_val2017", "auto", file.format("val2017")]]
        predicted += [[name, "auto", file.format("train2017")] for name in REFCOCO]
    if not predicted:
        raise ValueError(
            "the table compares entity masks of several sources: set INPUT.GELLA.ENTITY_SOURCES to "
            "a file of predicted masks for DATASETS.TEST"
        )
    return {"annotation": [], "predicted": predicted}


def _all_modes(cfg: Any, root: str) -> list[Run]:
    """Nouns given or extracted, each source of masks, snapped or drawn."""
    runs = []
    present = {MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST}
    for mode, (masks, entries), snap in product(
        ("given", "extracted"), _mask_sources(cfg, root).items(), (True, False)
    ):
        # Only narratives have nouns to extract.
        kinds = ["png"] if mode == "extracted" else ["png", "coco_panoptic_seg", "refcoco"]
        if _family(cfg) == "own":
            kinds = [kind for kind in kinds if kind in present]
        names = tuple(name for kind in kinds for name in _datasets(cfg, kind))
        if names:
            changes = {
                "TEST.NOUNS": mode,
                "INPUT.GELLA.ENTITY_SOURCES": entries,
                "MODEL.GELLA.SNAP": snap,
            }
            folder = f"nouns_{mode}_{masks}_{'snapped' if snap else 'drawn'}"
            runs.append(Run(folder, "", names, changes, (mode, masks, "on" if snap else "off")))
    return runs


Outcome = Mapping[str, Mapping[str, Mapping[str, float]]]
"""{dataset: {task: {metric: score}}} of one run."""


def conditions(settings: Mapping[str, Any], datasets: Sequence[str]) -> str:
    """In what mode a row was got: its masks, nouns, snapping, protocol and precision.

    ``settings`` are those of `results.settings`, without which an old results.json was written.
    """
    if "precision" not in settings:
        return "masks and modes not recorded"
    sources = settings["entity_sources"]
    sources = sources if isinstance(sources, list) else []
    files = (next((f for name, _, f in sources if fnmatchcase(d, name)), "") for d in datasets)
    masks = dict.fromkeys(f"masks of {Path(f).name}" if f else "annotated masks" for f in files)
    how = "snapped" if settings["snap"] else "drawn"
    protocol = f"protocol {settings['png_protocol']}"
    nouns = f"nouns {settings['nouns']}"
    return ", ".join([" and ".join(masks), nouns, how, protocol, settings["precision"]])


def table_markdown(
    table: str,
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    modes: Sequence[Mapping[str, Any]],
) -> str:
    """Our rows beside the paper's, or for "all" one row per combination of modes.

    Args:
        table: one of ``TABLES``.
        runs: of `plan_table`.
        outcomes, modes: of the runs, in the same order; the latter as `results.settings` has them.
    """
    if table == "all":
        columns = [*PAPER[3].columns, Column("oracle AR", "png", "oracle_AR")]
        columns += [Column("nouns found", "nouns", "recall"), *PAPER[4].columns]
        columns += [Column(name, "refer", name) for name in ("cIoU", "gIoU")]
        columns += PAPER[6].columns[:1]
        rows = [
            [*run.modes, *_scores(outcome, columns)]
            for run, outcome in zip(runs, outcomes, strict=True)
        ]
        head = ["nouns", "masks", "snapping", *(column.head for column in columns)]
        names = ", ".join(dict.fromkeys(name for run in runs for name in run.datasets))
        return f"All modes on {names}.\n\n{_markdown(head, rows)}\n"
    paper = PAPER[int(table)]
    columns = [column for column in paper.columns if not column.dataset]
    if not columns:  # a column per dataset; those that are not the paper's come last
        columns = list(paper.columns)
        ours = sorted({dataset for outcome in outcomes for dataset in outcome})
        own = [name for name in ours if name not in {c.dataset for c in columns}]
        columns += [Column(name, columns[0].task, columns[0].metric, name) for name in own]
    rows = []
    for name, figures in paper.rows.items():
        padding = [None] * (len(columns) - len(figures))  # the paper has no such datasets
        how = "masks of its own" if name in _OTHERS else paper.how
        rows.append([f"{name} (paper)", paper.data, how, *map(figure, [*figures, *padding])])
    for run, outcome, mode in zip(runs, outcomes, modes, strict=True):
        how = conditions(mode, run.datasets)
        names = ", ".join(run.datasets)
        rows.append([f"**{run.label}**", names, how, *_scores(outcome, columns)])
    head = [f"Table {table}", "on", "how", *(column.head for column in columns)]
    apart = any(paper.data not in map(_images_of, run.datasets) for run in runs)
    note = " Ours is on other data: the rows do not compare." if apart else ""
    if paper.how == _PREDICTED and any("annotated masks" in row[2] for row in rows):
        note += " On annotated masks is an upper bound: it does not compare with predicted ones."
    return f"{paper.title}.{note}\n\n{_markdown(head, rows)}\n"


def _images_of(dataset: str) -> str:
    """What the paper calls the images of one of our datasets."""
    if not dataset.startswith(("gella_coco_", "gella_refcoco")):
        return ""
    return "COCO train2014" if "refcoco" in dataset else _VAL


def compared_markdown(outcome: Outcome, mode: Mapping[str, Any]) -> str:
    """Every task of an evaluation with the paper's row of the same figures, where it has one.

    ``mode``: as `results.settings` has it.
    """
    parts = []
    for number, task in ((3, "png"), (4, "panoptic_seg"), (6, "entity"), (2, "refer")):
        part = {name: tasks for name, tasks in outcome.items() if task in tasks}
        if part:
            run = Run("", "ours", tuple(part))
            parts.append(table_markdown(str(number), [run], [part], [mode]))
    for name, tasks in outcome.items():
        if "nouns" in tasks:
            head = ["Noun extraction", "on", "how", "recall", "precision"]
            figures = (tasks["nouns"].get(key) for key in ("recall", "precision"))
            rows = [["GELLA-7B (paper, Table 9)", _VAL, _PREDICTED, "96.1", "-"]]
            rows.append(["**ours**", name, conditions(mode, [name]), *map(figure, figures)])
            parts.append(f"Nouns in generated answers.\n\n{_markdown(head, rows)}\n")
    return "\n".join(parts)


def _scores(outcome: Outcome, columns: Sequence[Column]) -> list[str]:
    """A cell per column: the figure of the first dataset that has it."""
    cells = []
    for column in columns:
        values = [
            tasks[column.task][column.metric]
            for dataset, tasks in outcome.items()
            if column.dataset in ("", dataset) and column.metric in tasks.get(column.task, {})
        ]
        cells.append(figure(values[0] if values else None))
    return cells


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""The paper's tables as it prints them (arXiv 2402.02555), to stand beside our rows."""

from __future__ import annotations

from dataclasses import dataclass

_REFCOCO = tuple(
    (f"{title} {split}", f"gella_{name}_{by}_{split}")
    for title, name, by, splits in (
        ("RefCOCO", "refcoco", "unc", ("val", "testA", "testB")),
        ("RefCOCO+", "refcocoplus", "unc", ("val", "testA", "testB")),
        ("RefCOCOg", "refcocog", "umd", ("val", "test")),
    )
    for split in splits
)
REFCOCO_DATASETS = tuple(dataset for _, dataset in _REFCOCO)
"""Datasets of Table 2's columns, in order."""


@dataclass(frozen=True)
class Column:
    """One figure: its head, and where results have it.

    Attributes:
        head: as in the paper.
        task: of the results.
        metric: of the task, in percent.
        dataset: the figure is of this dataset alone; "" takes any.
    """

    head: str
    task: str
    metric: str
    dataset: str = ""


@dataclass(frozen=True)
class PaperTable:
    """Title, columns and rows of a table; a row is a name and a figure per column, None: unreadable
    or not given. ``data`` names what the figures were measured on."""

    title: str
    data: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


_AR = tuple(
    Column(head, "png", metric)
    for head, metric in (
        ("AR", "AR"),
        ("AR things", "AR_thing"),
        ("AR stuff", "AR_stuff"),
        ("AR singular", "AR_singular"),
        ("AR plural", "AR_plural"),
    )
)
_PQ = tuple(Column(name, "panoptic_seg", name) for name in ("PQ", "SQ", "RQ"))
_AP = tuple(Column(name, "entity", name) for name in ("AP", "AP50", "AP75"))

PAPER: dict[int, PaperTable] = {
    2: PaperTable(
        "Referring expression segmentation, cIoU",
        "COCO train2014",
        tuple(Column(head, "refer", "cIoU", dataset) for head, dataset in _REFCOCO),
        (
            ("LISA-7B", (74.9, 79.1, 72.3, 65.1, 70.8, 58.1, 67.9, 70.6)),
            ("GELLA-7B", (76.1, 79.9, 73.1, 66.4, 72.7, 60.2, 69.6, 71.3)),
            ("GELLA-13B", (76.7, 80.5, 73.6, 67.0, 73.2, 60.6, 70.4, 71.5)),
        ),
    ),
    3: PaperTable(
        "Panoptic narrative grounding, average recall",
        "COCO val2017",
        _AR,
        (
            ("PiGLET", (65.9, 64.0, 68.6, 67.2, 54.5)),
            ("PPO-TD", (66.1, 64.0, 70.7, 68.1, 58.3)),
            ("GELLA-7B", (69.8, 66.2, 72.3, 69.9, 58.4)),
            ("GELLA-13B", (71.3, 67.8, 73.1, 71.0, 59.5)),
        ),
    ),
    4: PaperTable(
        "Panoptic segmentation",
        "COCO val2017",
        _PQ,
        (
            ("GELLA-7B, 12 epochs", (None, 83.3, None)),
            ("GELLA-7B, 50 epochs", (None, 83.4, None)),
            ("GELLA-7B of Tables 5, 7 and 8", (53.1, 83.3, 63.8)),
        ),
    ),
    6: PaperTable(
        "Colormap reconstruction, class-agnostic mask AP",
        "COCO val2017",
        _AP,
        (
            ("6a MobileNet(V2)", (95.2, 96.9, 96.1)),
            ("6a Swin-Tiny", (95.8, 98.9, 97.3)),
            ("6a Swin-Large", (96.3, 99.0, 97.8)),
            ("6b trained on masks of a COCO model", (95.2, 98.7, None)),
            ("6b trained on masks of an EntitySeg model", (94.9, 98.5, 97.0)),
            ("6b trained on the annotation", (95.2, 96.9, None)),
        ),
    ),
    8: PaperTable(
        "Sources of entity masks",
        "COCO val2017",
        _PQ,
        (
            ("8a trained on masks of a COCO model", (53.0, 83.1, 63.8)),
            ("8a trained on masks of an EntitySeg model", (52.9, 83.2, 63.7)),
            ("8a trained on the annotation", (53.1, 83.3, 63.8)),
            ("8b tested on masks of a COCO model", (53.1, 83.3, 63.8)),
            ("8b tested on masks of an EntitySeg model", (49.2, 83.7, 58.6)),
            ("8b tested on the annotation", (79.6, 97.8, 91.4)),
        ),
    ),
    9: PaperTable(
        "Shares of describing, noun extraction and grounding in training",
        "COCO val2017",
        (*_AR, Column("AR text", "nouns", "recall")),
        (
            ("0.0, 0.0, 1.0", (66.4, 64.2, 70.5, 68.0, 58.3, 79.4)),
            ("0.0, 0.2, 0.8", (69.4, 65.8, 71.8, 69.5, 58.0, 95.4)),
            ("0.1, 0.1, 0.8", (None, None, None, 69.2, None, 95.7)),
            ("0.2, 0.2, 0.6", (69.8, 66.2, 72.3, 69.9, 58.4, 96.1)),
        ),
    ),
}
"""By number. Figures that the paper's text layer lost are None."""

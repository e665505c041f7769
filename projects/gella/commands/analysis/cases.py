"""Scored phrases of saved predictions, of narratives and of referring expressions alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gella.utils.io import read_json

BASELINES = ("oracle", "random", "largest", "all")
"""IoUs that narratives carry beside the model's own, see ``evaluation.png``."""


@dataclass
class Case:
    """One phrase whose mask was scored.

    Attributes:
        image_id: of the dataset.
        caption: the text that the phrase is part of; of an expression, itself.
        text: the phrase.
        start, end: its characters in ``caption``; -1 where it is not in it as written.
        iou: of the predicted mask, in [0, 1].
        segment_ids: of the truth; None where the file does not tell (referring expressions).
        is_thing, is_plural: as the dataset flags them; None where the file does not tell.
        score: highest association score of the predicted entities, None without any.
        segmentation: RLE of the predicted mask, None without a prediction.
        baselines: IoU by name of ``BASELINES``; empty for referring expressions.
        ref_id, sent_id: of a referring expression, else None.
    """

    image_id: Any
    caption: str
    text: str
    start: int
    end: int
    iou: float
    segment_ids: list[int] | None = None
    is_thing: bool | None = None
    is_plural: bool | None = None
    score: float | None = None
    segmentation: dict[str, Any] | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    ref_id: Any = None
    sent_id: Any = None


@dataclass
class Predictions:
    """What one evaluator wrote for one dataset.

    Attributes:
        label: the folder below the one that was given; the dataset's name for that one itself.
        dataset: its name, that of the folder.
        file: where the predictions were read.
        task: "png" or "refer".
        results: metrics of the evaluator, in percent.
        cases: every scored phrase.
    """

    label: str
    dataset: str
    file: Path
    task: str
    results: dict[str, float]
    cases: list[Case]


def find_predictions(folder: str | Path) -> list[Predictions]:
    """Read all predictions that can be analysed, below a folder such as ``OUTPUT_DIR/inference``.

    Args:
        folder: of one dataset, or a folder above it: of all datasets, or of all runs of a table.

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
    found = []
    for path in sorted(path for name in _READERS for path in top.rglob(name)):
        task, read = _READERS[path.name]
        payload = _read(path)
        cases = read(payload["predictions"], path)
        dataset, inner = path.resolve().parent.name, path.parent.relative_to(top)
        label = inner.as_posix() if inner.parts else dataset
        results = payload["results"].get(task, {})
        found.append(Predictions(label, dataset, path, task, results, cases))
    if not any(predictions.cases for predictions in found):
        raise FileNotFoundError(
            f"{top} has no scored phrase: looked for {' and '.join(_READERS)} in it and "
            "below; evaluate a dataset of narratives or of referring expressions first"
        )
    return [predictions for predictions in found if predictions.cases]


def _read(path: Path) -> dict[str, Any]:
    payload = read_json(path, advice="evaluate again")
    if not isinstance(payload, dict) or not {"results", "predictions"} <= payload.keys():
        raise ValueError(f"{path} lacks 'results' or 'predictions'; evaluate again")
    return payload


def _narratives(rows: Sequence[dict[str, Any]], path: Path) -> list[Case]:
    return [_noun(row, noun, path) for row in rows for noun in _field(row, "nouns", path)]


def _noun(row: dict[str, Any], noun: dict[str, Any], path: Path) -> Case:
    return Case(
        image_id=_field(row, "image_id", path),
        caption=_field(row, "caption", path),
        text=_field(noun, "text", path),
        start=int(noun.get("start", -1)),
        end=int(noun.get("end", -1)),
        iou=_iou(noun.get("iou"), row, path),
        segment_ids=[int(i) for i in _field(noun, "segment_ids", path)],
        is_thing=bool(noun["is_thing"]) if "is_thing" in noun else None,
        is_plural=bool(noun["is_plural"]) if "is_plural" in noun else None,
        score=max(noun.get("scores") or [], default=None),
        segmentation=noun.get("segmentation"),
        baselines={name: float(noun[name]) for name in BASELINES if name in noun},
    )


def _expressions(rows: Sequence[dict[str, Any]], path: Path) -> list[Case]:
    return [_expression(row, path) for row in rows]


def _expression(row: dict[str, Any], path: Path) -> Case:
    text, union = _field(row, "phrase", path), int(_field(row, "union", path))
    # Nothing to find and nothing found is right, as in the evaluator's gIoU.
    iou = int(_field(row, "intersection", path)) / union if union else 1.0
    return Case(
        image_id=_field(row, "image_id", path),
        caption=text,
        text=text,
        start=0,
        end=len(text),
        iou=_iou(iou, row, path),
        score=max(row.get("scores") or [], default=None),
        segmentation=row.get("segmentation"),
        ref_id=row.get("ref_id"),
        sent_id=row.get("sent_id"),
    )


def _field(row: dict[str, Any], key: str, path: Path) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise ValueError(f"{path}: a prediction has no {key!r}; evaluate again with this version")
    return row[key]


def _iou(value: Any, row: dict[str, Any], path: Path) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(
            f"{path}: image {row.get('image_id')} has the IoU {value!r}, expected a number in "
            "[0, 1]; evaluate again"
        )
    return float(value)


_READERS: dict[str, tuple[str, Any]] = {
    "png_predictions.json": ("png", _narratives),
    "referring_predictions.json": ("refer", _expressions),
}

"""Which cases are shown, and their pictures: the image, the truth and the prediction."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gella.commands.analysis.cases import Case
from gella.commands.analysis.scenes import Facts, Scene, predicted_mask
from gella.pictures.panels import MASK_OPACITY

TRUTH_COLOUR, RIGHT_COLOUR, WRONG_COLOUR = (0, 114, 178), (0, 158, 115), (213, 94, 0)
"""RGB of the truth's mask, and of the predicted pixels inside and outside of it."""

SIDE = 340
"""Pixels of a picture's longer side on the page."""


def choose(cases: Sequence[Case], facts: Sequence[Facts | None], count: int) -> list[list[int]]:
    """Places of the worst and of the best cases, at most ``count`` each, no image twice in a list.

    Worst are the lowest IoUs, and among equal ones those that the model was surest of. Best are
    the highest, and among equal ones those that name most entities, then the smallest.
    """

    def worst(place: int) -> tuple[float, ...]:
        case = cases[place]
        return (case.iou, -(case.score if case.score is not None else -1.0), place)

    def best(place: int) -> tuple[float, ...]:
        case, fact = cases[place], facts[place]
        named = len(set(case.segment_ids or []))
        return (-case.iou, -named, fact.area_share if fact else 0.0, place)

    middle = np.median([case.iou for case in cases]) if cases else 0.0
    lists: list[list[int]] = []
    for key, fits in ((worst, lambda iou: iou < 1.0), (best, lambda iou: iou > 0.0)):
        seen: dict[str, int] = {}
        for place in sorted(range(len(cases)), key=key):
            if len(seen) == count:
                break
            # With few cases, none is to be shown as a good and a bad one.
            taken = lists and place in lists[0] and cases[place].iou < middle
            if fits(cases[place].iou) and not taken:
                seen.setdefault(str(cases[place].image_id), place)
        lists.append(list(seen.values()))
    return lists


def pictures(case: Case, scene: Scene) -> list[tuple[str, str]]:
    """(caption, data URI of a JPEG) of the image, the truth over it, and the prediction over it."""
    wanted = [
        scene.regions.index_of(i)
        for i in set(case.segment_ids or [])
        if i in scene.regions.segment_ids
    ]
    truth = scene.regions.union(wanted)
    mask = predicted_mask(case, scene.regions.size)
    grey = np.asarray(Image.fromarray(scene.image).convert("L").convert("RGB"))
    return [
        ("image", _data_uri(scene.image)),
        ("truth", _data_uri(_over(grey, [(truth, TRUTH_COLOUR)]))),
        (
            "prediction",
            _data_uri(_over(grey, [(mask & truth, RIGHT_COLOUR), (mask & ~truth, WRONG_COLOUR)])),
        ),
    ]


def _over(
    image: np.ndarray, layers: Sequence[tuple[np.ndarray, tuple[int, int, int]]]
) -> np.ndarray:
    result = image.astype(np.float64)
    for mask, colour in layers:
        result[mask] = (1 - MASK_OPACITY) * result[mask] + MASK_OPACITY * np.array(colour)
    return np.rint(result).astype(np.uint8)


def _data_uri(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Enlarged pixels stay pixels, so that a border is where the mask has it.
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    stream = io.BytesIO()
    Image.fromarray(image).resize(size, way).save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")

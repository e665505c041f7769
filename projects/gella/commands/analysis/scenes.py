"""What the truth and the picture say of a case: how large, which entities were taken instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from gella.commands.analysis.cases import Case
from gella.entities.entity_map import EntityMap
from gella.entities.rle import decode_segmentation
from gella.entities.sources import annotation_of
from gella.evaluation.truth import TruthReader

TAKEN = 0.5
"""A mask takes a segment when it covers more than this share of the segment's pixels."""

COLOUR_DISTANCE = 20.0
"""CIE Lab distance of mean colours below which two segments look alike."""

ERRORS = {
    "right": "the right entities",
    "none": "no mask at all",
    "part": "less than half of any entity",
    "fewer": "some of the right entities, no wrong one",
    "more": "all right entities and wrong ones",
    "mixed": "right and wrong ones, and some missing",
    "other": "only wrong ones",
    "unneeded": "a mask where nothing was meant",
}
"""Kinds of outcome of a case, and what they mean."""

RELATIONS = ("same category", "similar colour", "touching")
"""What a wrongly taken entity may have in common with a right one."""


class Scene:
    """One image with its annotated segments.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        regions: every annotated segment. Of polygons, which may overlap, the smaller lies on top.
        categories: per segment its category's name.
    """

    def __init__(self, image: np.ndarray, regions: EntityMap, categories: list[str]) -> None:
        """See the class's attributes."""
        self.image, self.regions, self.categories = image, regions, categories

    @cached_property
    def areas(self) -> np.ndarray:
        """Pixels per segment, int64 (S,)."""
        return self.regions.areas()

    @cached_property
    def colours(self) -> np.ndarray:
        """Mean colour per segment in CIE Lab, (S, 3); of segments without pixels, black."""
        numbers, count = self.regions.ids.reshape(-1), self.regions.num_entities + 1
        sums = [
            np.bincount(numbers, self.image[..., channel].reshape(-1), count)[1:]
            for channel in range(3)
        ]
        means = np.stack(sums, axis=1) / np.maximum(self.areas, 1)[:, None]
        return to_lab(means / 255)

    @cached_property
    def touching(self) -> np.ndarray:
        """Which segments lie next to each other, bool (S, S).

        A gap of a pixel, or of a hundredth of the shorter side, does not part them: annotations
        often leave a line of void between neighbours.
        """
        ids, count = self.regions.ids, self.regions.num_entities + 1
        pairs = np.zeros((count, count), dtype=bool)
        for step in (1, 1 + max(1, round(min(ids.shape) / 100))):
            pairs[ids[step:], ids[:-step]] = True
            pairs[ids[:, step:], ids[:, :-step]] = True
        pairs = (pairs | pairs.T)[1:, 1:]
        np.fill_diagonal(pairs, False)
        return pairs


@dataclass
class Facts:
    """What was meant and what was taken; segments are given by their place in the scene.

    Attributes:
        error: a key of ``ERRORS``.
        iou: of prediction and truth by pixel counts; two empty masks have 1.
        area_share: of the image, covered by the truth.
        wanted, taken: segments of the truth, and those that the mask covers (``TAKEN``).
        wanted_names, taken_names: their categories.
        rivals: segments of a wanted one's category that are not wanted; None if nothing is wanted.
        relations: for each wrongly taken segment, whether each of ``RELATIONS`` holds with any of
            the wanted ones.
        chances: the share of the image's unwanted segments for which each holds, likewise for each
            wrongly taken one: what taking one blindly would give.
    """

    error: str
    iou: float
    area_share: float
    wanted: list[int]
    taken: list[int]
    wanted_names: list[str]
    taken_names: list[str]
    rivals: int | None = None
    relations: list[dict[str, bool]] = field(default_factory=list)
    chances: list[dict[str, float]] = field(default_factory=list)


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """SRGB in [0, 1], (N, 3), as CIE Lab under D65 (IEC 61966-2-1, CIE 15)."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ matrix.T / matrix.sum(axis=1)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def read_scene(record: dict[str, Any], names: Mapping[Any, str], reader: TruthReader) -> Scene:
    """The scene of a dataset dict.

    Args:
        record: with ``file_name, height, width, image_id`` and where its annotation is.
        names: of the categories, by id.
        reader: of panoptic annotations.

    Raises:
        OSError, ValueError: the picture or the annotation is missing or damaged, or of two sizes.
    """
    size = (record["height"], record["width"])
    try:
        with Image.open(record["file_name"]) as picture:
            image = np.array(picture.convert("RGB"))
    except (FileNotFoundError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"image {record['image_id']}: {record['file_name']} cannot be read ({error}); the "
            "dataset must lie where it lay at evaluation, or use --without-images"
        ) from error
    if image.shape[:2] != size:
        raise ValueError(
            f"image {record['image_id']}: {record['file_name']} has size {image.shape[:2]}, its "
            f"record says {size} (height, width): it is another picture"
        )
    annotation = annotation_of(record)
    listed = annotation.get("segments_info") or []
    if listed and all(segment.get("segmentation") is not None for segment in listed):
        masks = np.stack([decode_segmentation(s["segmentation"], size) for s in listed])
        regions = EntityMap.from_masks(masks, segment_ids=[int(s["id"]) for s in listed])
    else:
        truth = reader({**record, "annotation": {"segments_info": None, **annotation}})
        regions, listed = truth.regions, truth.segments
    kinds = {int(segment["id"]): segment.get("category_id") for segment in listed}
    categories = [kinds[i] for i in regions.segment_ids]
    return Scene(image, regions, [names.get(c, f"category {c}") for c in categories])


def case_facts(case: Case, scene: Scene) -> Facts:
    """Compare what a case was to take with what it took; its ``segment_ids`` must be known."""
    regions = scene.regions
    wanted = sorted(
        regions.index_of(i) for i in set(case.segment_ids or []) if i in regions.segment_ids
    )
    mask = predicted_mask(case, regions.size)
    covered = np.bincount(regions.ids[mask], minlength=regions.num_entities + 1)
    inter, size = int(covered[1:][wanted].sum()), int(scene.areas[wanted].sum())
    union = size + int(covered.sum()) - inter
    taken = np.flatnonzero(covered[1:] > TAKEN * scene.areas).tolist()
    facts = Facts(
        error=_error(set(wanted), set(taken), bool(mask.any())),
        iou=inter / union if union else 1.0,
        area_share=size / regions.ids.size,
        wanted=wanted,
        taken=taken,
        wanted_names=[scene.categories[i] for i in wanted],
        taken_names=[scene.categories[i] for i in taken],
    )
    if not wanted:
        return facts
    others = [i for i in range(regions.num_entities) if i not in wanted]
    facts.rivals = sum(scene.categories[i] in facts.wanted_names for i in others)
    wrong = [i for i in taken if i not in wanted]
    if wrong:
        holds = {i: _relations(scene, wanted, i) for i in others}
        facts.relations = [holds[i] for i in wrong]
        chance = {name: float(np.mean([holds[i][name] for i in others])) for name in RELATIONS}
        facts.chances = [chance] * len(wrong)
    return facts


def predicted_mask(case: Case, size: tuple[int, int]) -> np.ndarray:
    """The predicted mask, bool (H, W), empty without a prediction; ValueError for another size."""
    if case.segmentation is None:
        return np.zeros(size, dtype=bool)
    return decode_segmentation(case.segmentation, size)


def _error(wanted: set[int], taken: set[int], any_pixel: bool) -> str:
    if not wanted:
        return "unneeded" if any_pixel else "right"
    if not any_pixel:
        return "none"
    if not taken:
        return "part"
    if taken == wanted:
        return "right"
    if not taken & wanted:
        return "other"
    if taken < wanted:
        return "fewer"
    return "more" if taken > wanted else "mixed"


def _relations(scene: Scene, wanted: list[int], other: int) -> dict[str, bool]:
    distances = np.linalg.norm(scene.colours[wanted] - scene.colours[other], axis=1)
    return {
        "same category": scene.categories[other] in {scene.categories[i] for i in wanted},
        "similar colour": bool((distances < COLOUR_DISTANCE).any()),
        "touching": bool(scene.touching[other, wanted].any()),
    }


def index_records(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Dataset dicts by image id, as text: files and datasets differ in its type."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(str(record["image_id"]), []).append(record)
    return found


def locate(
    cases: Iterable[Case], records: Mapping[str, list[dict[str, Any]]], names: Mapping[Any, str]
) -> Iterator[tuple[Case, Scene]]:
    """Each case with its scene, image by image in the order of the cases.

    The segment ids of a referring expression are filled in from the dataset.

    Raises:
        ValueError: an image, or an expression, is not in the dataset.
    """
    reader, scene, last = TruthReader(), None, ""
    for case in cases:
        key = str(case.image_id)
        if key not in records:
            raise ValueError(
                f"image {case.image_id} of the predictions is not in the dataset, which has "
                f"{len(records)} images: name the one that was evaluated with --dataset"
            )
        if case.segment_ids is None:
            case.segment_ids = _expression_ids(case, records[key])
        if scene is None or key != last:
            scene, last = read_scene(records[key][0], names, reader), key
        yield case, scene


def _expression_ids(case: Case, records: list[dict[str, Any]]) -> list[int]:
    same = [
        e
        for record in records
        for e in record.get("expressions") or []
        if e["text"].strip() == case.text
    ]
    exact = [e for e in same if (e.get("ref_id"), e.get("sent_id")) == (case.ref_id, case.sent_id)]
    if not same:
        raise ValueError(
            f"image {case.image_id}: the dataset has no expression {case.text!r}: name the one "
            "that was evaluated with --dataset"
        )
    # One text for two objects of an image, in files without ids: the first stands for both.
    return [int(i) for i in (exact or same)[0]["segment_ids"]]

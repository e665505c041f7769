"""Read the annotation of an image as evaluation needs it: every segment, crowd included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gella.entities.entity_map import EntityMap, Runs
from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation
from gella.evaluation.panoptic_quality import VOID, check_segments

_KEPT = 4  # images held decoded; the captions of one image usually come one after the other


@dataclass
class Truth:
    """One image's annotated segments in the frame of the original image.

    Attributes:
        ids: int32 (H, W), the ids of the file, 0 = void.
        segments: dicts ``id, category_id, iscrowd`` ..., in the order of the file.
        regions: the same pixels as an EntityMap of *all* segments in that order; crowds, which are
            no entities, are among them because a narrative may name one.
        image_id: for messages.
    """

    ids: np.ndarray
    segments: list[dict[str, Any]]
    regions: EntityMap
    image_id: Any

    def indices(self, segment_ids: Sequence[int | str]) -> list[int]:
        """Indices of segments in ``segments``; ValueError names the image and unknown ids."""
        index = {segment_id: k for k, segment_id in enumerate(self.regions.segment_ids)}
        unknown = [int(i) for i in segment_ids if int(i) not in index]
        if unknown:
            raise ValueError(
                f"image {self.image_id}: segment ids {unknown} are not in its annotation, which "
                f"has {len(index)} segments: narrative and panoptic file must be of one release"
            )
        return [index[int(i)] for i in segment_ids]

    def mask(self, segment_ids: Sequence[int | str]) -> np.ndarray:
        """Union of the named segments, bool (H, W)."""
        return self.regions.union(self.indices(segment_ids))


class TruthReader:
    """Reads panoptic annotations of mapped test inputs and keeps the last few."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Any], Truth] = {}

    def __call__(self, sample: dict[str, Any]) -> Truth:
        """Truth of a mapped dict with ``annotation`` {"file_name", "segments_info"}.

        The file is a panoptic PNG, or a grey one whose values are the ids; ``segments_info`` None
        takes every id of it for a segment without category. A ``truth`` that the sample brings,
        read ahead by a worker process, is taken as it is.

        Raises:
            KeyError: the mapped dict has no annotation.
            FileNotFoundError: the panoptic PNG is missing.
            ValueError: it is unreadable, of another size than the image, or names other ids than
                ``segments_info``; the message names the image.
        """
        if "truth" in sample:
            return sample["truth"]
        key = (str(_annotation(sample)["file_name"]), sample["image_id"])
        if key not in self._kept:
            self._kept[key] = _read(sample)
            if len(self._kept) > _KEPT:  # a dict keeps its order: the first is the oldest
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def mask(self, sample: dict[str, Any], segment_ids: Sequence[int | str]) -> np.ndarray:
        """Union of named segments, bool (H, W), of a panoptic or an instance annotation.

        Segments that carry a ``segmentation`` (RefCOCO's polygons or RLE) may overlap each other
        and are decoded from it; else the panoptic PNG is read.
        """
        outlines = {
            int(segment["id"]): segment.get("segmentation")
            for segment in _annotation(sample)["segments_info"] or []
        }
        size = (sample["height"], sample["width"])
        wanted = [int(segment_id) for segment_id in segment_ids]
        if not wanted:
            return np.zeros(size, bool)
        if any(outlines.get(segment_id) is None for segment_id in wanted):
            return self(sample).mask(wanted)
        return np.logical_or.reduce([decode_segmentation(outlines[i], size) for i in wanted])


def _annotation(sample: dict[str, Any]) -> dict[str, Any]:
    if not sample.get("annotation"):
        raise KeyError(
            f"image {sample.get('image_id')}: no 'annotation' among the mapped inputs: "
            "evaluate with the test mapper, on a dataset that has annotations"
        )
    return sample["annotation"]


def _read(sample: dict[str, Any]) -> Truth:
    annotation, image_id = _annotation(sample), sample["image_id"]
    path = Path(annotation["file_name"])
    if not path.is_file():
        raise FileNotFoundError(
            f"image {image_id}: annotation {path} does not exist; check the dataset's panoptic_root"
        )
    try:
        ids = read_id_png(path, (sample["height"], sample["width"]))
    except ValueError as error:
        raise ValueError(f"image {image_id}: annotation {path}: {error}") from error
    present = np.unique(Runs.of(ids).values).tolist()
    segments = annotation["segments_info"]
    if segments is None:
        segments = [{"id": segment_id} for segment_id in present if segment_id != VOID]
    # Before EntityMap, which would silently take an unlisted id for void.
    order = list(check_segments(present, segments, image_id, "truth"))
    return Truth(ids, list(segments), EntityMap.from_id_image(ids, order), image_id)

"""The synthetic shapes dataset: one scene with everything that is written about it.

`make_sample` is a pure function of (seed, split, index), so a dataset can be drawn by any number of
processes. The records it returns are those of the real benchmarks (COCO panoptic, Panoptic
Narrative Grounding, RefCOCO, EntitySeg captions, COCO results); `datasets/prepare_shapes.py` only
collects them into files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from shapes_scene import (
    HELD_OUT_PAIRS,
    Scene,
    area_and_box,
    draw_scene,
    predicted_masks,
    to_segmentation,
)
from shapes_text import write_expressions, write_narrative, write_plain

from gella.data.register import SHAPES_CATEGORIES as CATEGORIES

__all__ = [
    "CATEGORIES",
    "HELD_OUT_PAIRS",
    "SPLITS",
    "VERSION",
    "ShapesSample",
    "image_id_of",
    "make_sample",
]

VERSION = 4  # of the drawing and the grammar; a prepared dataset of another version is redone
SPLITS = ("train", "val")
MAX_SCENES = 500_000  # of one split, so that segment ids stay within the 24 bits of a PNG

_CATEGORY_ID = {category["name"]: category["id"] for category in CATEGORIES}


@dataclass
class ShapesSample:
    """One scene and its records.

    Attributes:
        scene: what was drawn.
        image_array: uint8 (S, S, 3) RGB.
        image: COCO image record ``{id, file_name, height, width}``.
        segment_ids: the panoptic id of every number of ``scene.ids``, from number 1.
        id_map: int32 (S, S), panoptic ids; no pixel is void.
        panoptic: COCO panoptic annotation of the image.
        narratives: PNG records.
        refs, instances: RefCOCO refs and COCO instance annotations of all things; an instance has
            the id of its panoptic segment. Empty ``refs`` when no thing can be told apart.
        descriptions: EntitySeg-style caption records, two.
        predictions: COCO results entries of an imagined segmenter (`predicted_masks`); "val" only.
    """

    scene: Scene
    image_array: np.ndarray
    image: dict[str, Any]
    segment_ids: list[int]
    id_map: np.ndarray
    panoptic: dict[str, Any]
    narratives: list[dict[str, Any]]
    refs: list[dict[str, Any]]
    instances: list[dict[str, Any]]
    descriptions: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


def image_id_of(split: str, index: int) -> int:
    """COCO image id of a scene; ids of the two splits never meet."""
    return SPLITS.index(split) * MAX_SCENES + index + 1


def make_sample(seed: int, split: str, index: int, size: int = 96) -> ShapesSample:
    """Draw scene ``index`` of a split and write its records.

    Args:
        seed: of the dataset.
        split: "train" (two narratives and two captions as people type them, one of them about
            sides; never a pair of `HELD_OUT_PAIRS`) or "val" (one narrative).
        index: 0-based, below 500,000.
        size: side of the image in pixels, at least 64.

    Raises:
        ValueError: unknown split, index out of range or too small a size.
    """
    if split not in SPLITS:
        raise ValueError(f"shapes: split '{split}' is unknown; use one of {', '.join(SPLITS)}")
    if not 0 <= index < MAX_SCENES:
        raise ValueError(f"shapes: index {index} is outside 0..{MAX_SCENES - 1}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    held_out = split == "val"
    scene = draw_scene(rng, size, held_out)
    image_id = image_id_of(split, index)
    image = {"id": image_id, "file_name": f"{image_id:012d}.png", "height": size, "width": size}
    segment_ids = [_segment_id(image_id, n) for n in range(1, int(scene.ids.max()) + 1)]
    id_map = np.array([0, *segment_ids], dtype=np.int32)[scene.ids]
    segments = _segments_info(scene, segment_ids)
    narratives = [write_narrative(scene, rng, held_out) for _ in range(1 if held_out else 2)]
    if not held_out:  # of its own chance: all else is as without
        own = np.random.default_rng([seed, SPLITS.index(split), index, 1])
        narratives += [write_plain(scene, own), write_plain(scene, own, sides=True)]
    descriptions = [
        _caption_record(write_narrative(scene, rng, held_out), image, prompt) for prompt in range(2)
    ]
    refs = _ref_records(write_expressions(scene, rng), image, segments, split)
    return ShapesSample(
        scene=scene,
        image_array=scene.image,
        image=image,
        segment_ids=segment_ids,
        id_map=id_map,
        panoptic={
            "image_id": image_id,
            "file_name": f"{image_id:012d}.png",
            "segments_info": segments,
        },
        narratives=[
            _png_record(narrative.__dict__, image_id, author, segment_ids)
            for author, narrative in enumerate(narratives)
        ],
        refs=refs,
        instances=_instances(scene, segments, image_id),
        descriptions=descriptions,
        predictions=predicted_masks(id_map, segment_ids, image_id, rng) if held_out else [],
    )


def _segment_id(image_id: int, number: int) -> int:
    """Scatter (image, number) over all 24 bits: unique in the dataset, all three bytes in use."""
    return (image_id * 16 + number) * 0x9E3779 % (1 << 24)


def _segments_info(scene: Scene, segment_ids: list[int]) -> list[dict[str, Any]]:
    names = [thing.kind for thing in scene.things] + scene.stuff
    infos = []
    for number, (name, segment_id) in enumerate(zip(names, segment_ids), start=1):
        area, box = area_and_box(scene.ids == number)
        infos.append(
            {
                "id": segment_id,
                "category_id": _CATEGORY_ID[name],
                "iscrowd": 0,
                "area": area,
                "bbox": box,
            }
        )
    return infos


def _png_record(
    narrative: dict[str, Any], image_id: int, author: int, segment_ids: list[int]
) -> dict[str, Any]:
    """Panoptic Narrative Grounding's record: image and segment ids are strings there."""
    return {
        "image_id": str(image_id),
        "annotator_id": author,
        "caption": narrative["caption"],
        "segments": [
            {
                "utterance": segment["utterance"],
                "segment_ids": [str(segment_ids[member]) for member in segment["members"]],
                "plural": segment["plural"],
                "noun": segment["noun"],
            }
            for segment in narrative["segments"]
        ],
    }


def _caption_record(narrative: Any, image: dict[str, Any], prompt: int) -> dict[str, Any]:
    return {
        "image_id": image["id"],
        "file_name": image["file_name"],
        "description": narrative.caption,
        "nouns": narrative.nouns,
        "model": "shapes-grammar",
        "prompt_id": prompt,
    }


def _ref_records(
    expressions: list[tuple[int, list[str]]],
    image: dict[str, Any],
    segments: list[dict[str, Any]],
    split: str,
) -> list[dict[str, Any]]:
    refs = []
    for place, (thing, sentences) in enumerate(expressions):
        ref_id = image["id"] * 4 + place
        texts = [
            {"sent_id": ref_id * 4 + k, "sent": text, "raw": text, "tokens": text.split()}
            for k, text in enumerate(sentences)
        ]
        stem = image["file_name"].rsplit(".", 1)[0]
        refs.append(
            {
                "ref_id": ref_id,
                "ann_id": segments[thing]["id"],
                "image_id": image["id"],
                "category_id": segments[thing]["category_id"],
                # As in the real files, the annotation's suffix makes this no name of an image.
                "file_name": f"{stem}_{segments[thing]['id']}.png",
                "split": split,
                "sent_ids": [text["sent_id"] for text in texts],
                "sentences": texts,
            }
        )
    return refs


def _instances(scene: Scene, segments: list[dict[str, Any]], image_id: int) -> list[dict[str, Any]]:
    return [
        {**segments[i], "image_id": image_id, "segmentation": to_segmentation(scene.ids == i + 1)}
        for i in range(len(scene.things))
    ]

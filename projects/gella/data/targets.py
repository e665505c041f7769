"""Which input entities a phrase means: from segment ids of an annotation to entity indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gella.entities.entity_map import EntityMap
from gella.text.prompts import spoken_name


class EntityMatcher:
    """Finds the input entities behind segment ids (docs/FORMATS.md 7).

    Where the input entities are the annotation's own, a segment is the entity of its id. Where they
    come from a segmenter, a segment is every entity that overlaps it with enough IoU, which may be
    none. Crowd segments are no entities and never match.
    """

    def __init__(
        self,
        entities: EntityMap,
        segments_info: Sequence[dict[str, Any]] | None,
        annotated: EntityMap | None = None,
        min_iou: float = 0.5,
    ) -> None:
        """Args:
        entities: the input entities.
        segments_info: all segments of the annotation, crowd included; None: only the ids of
            its map are known.
        annotated: the annotation's own map if `entities` come from elsewhere, same frame.
        min_iou: least IoU of a match, used with `annotated` only.
        """
        # Crowds are in the list and not in the map: known ids that match no entity.
        own = entities if annotated is None else annotated
        listed = None if segments_info is None else [int(s["id"]) for s in segments_info]
        self.segments_info = list(segments_info or [])
        if annotated is None:
            matches: list[list[int]] = [[k] for k in range(entities.num_entities)]
        else:
            close = segment_iou(annotated, entities) >= min_iou
            matches = [np.flatnonzero(row).tolist() for row in close]
        self._indices = dict(zip(own.segment_ids, matches))
        self._indices |= {i: self._indices[kept] for i, kept in own.merged.items()}
        self._known = set(self._indices if listed is None else listed)

    def entity_indices(self, segment_ids: Sequence[int] | None) -> list[int] | None:
        """Indices (ascending, each once) of the entities that the segments name.

        None stays None (unknown). Raises ValueError for an id the annotation does not have.
        """
        if segment_ids is None:
            return None
        unknown = [int(i) for i in segment_ids if int(i) not in self._known]
        if unknown:
            raise ValueError(
                f"segment ids {unknown[:5]} are not in the image's annotation; the narrative and "
                "the annotation belong to different versions"
            )
        return sorted({index for i in segment_ids for index in self._indices.get(int(i), [])})


def segment_iou(a: EntityMap, b: EntityMap) -> np.ndarray:
    """IoU of every entity of `a` with every entity of `b`: float64 (E_a, E_b)."""
    if a.size != b.size:
        raise ValueError(f"entity maps of {a.size} and {b.size} pixels cannot be compared")
    # One number for each pair of labels: a single histogram holds all intersections.
    columns = b.num_entities + 1
    joint = a.ids.ravel().astype(np.int64) * columns + b.ids.ravel()
    counts = np.bincount(joint, minlength=(a.num_entities + 1) * columns).reshape(-1, columns)
    shared = counts[1:, 1:].astype(np.float64)
    for index in b.wholes:
        shared[:, index] = a.overlaps(b.union([index]))
    for index in a.wholes:
        shared[index] = b.overlaps(a.union([index]))
    union = a.areas()[:, None] + b.areas()[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def category_phrases(
    segments_info: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    negatives: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """One phrase per category present in an image, and `negatives` absent ones (-1: all).

    They come in the order of `categories` (`id`, `name`, `isthing`); crowd segments do not make a
    category present. Returns phrases as of a dataset dict with `category_id` and `isthing` added;
    `segment_ids` is empty for absent categories, `start` and `end` are -1. Raises ValueError for a
    segment of an unknown category.
    """
    members: dict[int, list[int]] = {int(category["id"]): [] for category in categories}
    for segment in segments_info:
        category_id = int(segment["category_id"])
        if category_id not in members:
            raise ValueError(f"segment {segment['id']} has unknown category {category_id}")
        if not segment.get("iscrowd", 0):
            members[category_id].append(int(segment["id"]))
    absent = [category_id for category_id, ids in members.items() if not ids]
    if 0 <= negatives < len(absent):
        chosen = {absent[k] for k in rng.choice(len(absent), size=negatives, replace=False)}
    else:
        chosen = set(absent)
    phrases = []
    for category in categories:
        category_id, thing = int(category["id"]), bool(category["isthing"])
        ids = members[category_id]
        if ids or category_id in chosen:
            phrase = {"text": spoken_name(category["name"]), "start": -1, "end": -1}
            phrase.update(segment_ids=ids, is_plural=len(ids) > 1, is_thing=thing)
            phrases.append({**phrase, "category_id": category_id, "isthing": thing})
    return phrases

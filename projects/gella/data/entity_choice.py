"""Lead the records of a dataset to the entity source that the config chooses for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from detectron2.data import DatasetCatalog

from gella.data.record_store import mapped, selected
from gella.entities.sources import AnnotationSource, EntitySource, source_for

__all__ = ["choose_entities", "use_source"]

_logger = logging.getLogger(__name__)


def choose_entities(
    records: Sequence[dict[str, Any]], dataset_name: str, cfg: Any, *, is_train: bool
) -> Sequence[dict[str, Any]]:
    """Records of a dataset with the entities that ``INPUT.GELLA.ENTITY_SOURCES`` names for it.

    Args:
        records: dataset dicts; not changed.
        dataset_name: in the catalogs.
        cfg: the config.
        is_train: images without masks may be left out (``INPUT.GELLA.LEAVE_OUT_MISSING``). Never at
            test, where leaving out the hard images would raise the score.

    Raises:
        FileNotFoundError: the source's path does not exist.
        ValueError: an entry is malformed or names no registered dataset, or images lack masks.
    """
    own = cfg.INPUT.GELLA
    source = source_for(own.ENTITY_SOURCES, dataset_name)
    known = DatasetCatalog.list()
    for pattern, _, _ in own.ENTITY_SOURCES:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"INPUT.GELLA.ENTITY_SOURCES: {pattern} is no registered dataset; check its name"
            )
    leave_out = bool(own.LEAVE_OUT_MISSING and is_train)
    return use_source(records, source, dataset_name, leave_out=leave_out)


def use_source(
    records: Sequence[dict[str, Any]],
    source: EntitySource,
    dataset_name: str,
    *,
    leave_out: bool = False,
) -> Sequence[dict[str, Any]]:
    """Lead the records of a dataset to a source, after a look at what it lacks.

    Args:
        records: dataset dicts; not changed.
        source: of the entities.
        dataset_name: for messages.
        leave_out: drop records of images without masks, with a warning, instead of refusing.

    Raises ValueError with the number and the first ids of the images that lack masks, or when none
    is left.
    """
    if isinstance(source, AnnotationSource):
        return records  # datasets/check.py looks at a dataset's own files
    absent = source.missing(records)
    if absent:
        ids = [record["image_id"] for record in records]
        lacking = set(absent)
        kept = [place for place, image_id in enumerate(ids) if image_id not in lacking]
        first = ", ".join(str(image_id) for image_id in absent[:5])
        message = (
            f"dataset {dataset_name}: {len(absent)} of its {len(set(ids))} images have no masks in "
            f"{source}: {first}{', ...' if len(absent) > 5 else ''}"
        )
        if not leave_out or not kept:
            raise ValueError(
                f"{message}; make them or choose the file of this dataset (training can leave such "
                "images out: INPUT.GELLA.LEAVE_OUT_MISSING True)"
            )
        _logger.warning("%s; left out, with %d records", message, len(ids) - len(kept))
        records = selected(records, kept)
    return mapped(records, source.lead)

"""Leaving the RefCOCO val and test images out of training on COCO train2017.

All of these images lie inside train2017 (docs/FORMATS.md 3), so a model that is trained on it has
seen, with masks, the pictures that RefCOCO's scores are measured on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from gella.data.reading import field
from gella.data.record_store import as_records, selected
from gella.data.refcoco import read_refs

__all__ = ["REFCOCO_FOLDERS", "held_out_images", "without_held_out"]

REFCOCO_FOLDERS = ("refcoco", "refcoco+", "refcocog")
_logger = logging.getLogger(__name__)


def held_out_images(root: str | Path) -> frozenset[str]:
    """Ids, as text, of all images of which a ref of another split than "train" speaks.

    Args:
        root: holds ``refcoco``, ``refcoco+`` and ``refcocog`` with their ``refs(*).p``. Every file
            that is there counts, so the splits of unc, google and umd are joined.

    Raises:
        FileNotFoundError: none of them is there.
        ValueError: a pickle is refused or holds something else.
    """
    files = {name: sorted((Path(root) / name).glob("refs(*).p")) for name in REFCOCO_FOLDERS}
    absent = [name for name, found in files.items() if not found]
    if len(absent) == len(files):
        raise FileNotFoundError(
            f"DATASETS.EXCLUDE_REFCOCO_VAL_TEST needs the refs(*).p of {', '.join(absent)} below "
            f"{root}, where there is none; see datasets/README.md, or set the key to False"
        )
    if absent:
        _logger.warning(
            "%s: no refs(*).p of %s; their val and test images are NOT left out of training",
            root,
            ", ".join(absent),
        )
    stamps = [(str(path), path.stat().st_mtime_ns) for found in files.values() for path in found]
    return _images_of(tuple(stamps))


@lru_cache(maxsize=2)
def _images_of(stamps: tuple[tuple[str, int], ...]) -> frozenset[str]:
    images = set()
    for path, _ in stamps:
        for place, ref in enumerate(read_refs(path)):
            if field(ref, "split", path, f"ref {place}") != "train":
                images.add(str(field(ref, "image_id", path, f"ref {place}")))
    return frozenset(images)


def without_held_out(
    records: Sequence[dict[str, Any]], dataset_name: str, root: str | Path
) -> Sequence[dict[str, Any]]:
    """The records of a dataset without those of RefCOCO val and test images; logs how many.

    Only datasets whose metadata has ``coco_train2017`` set are looked at: ids of other images mean
    nothing here, and RefCOCO's own training splits stay as they are published.

    Args:
        records: dataset dicts of ``dataset_name``.
        dataset_name: in the catalogs.
        root: see `held_out_images`.

    Raises:
        FileNotFoundError, ValueError: as `held_out_images`.
    """
    if not MetadataCatalog.get(dataset_name).get("coco_train2017", False):
        return records
    held_out = held_out_images(root)
    records = as_records(records)
    ids = records.image_ids()
    kept = ~np.isin(ids, sorted(held_out))
    _logger.info(
        "%s: left out %s of %s images (%s of %s records), which are val or test images of RefCOCO",
        dataset_name,
        *(f"{n:,}" for n in (len(np.unique(ids[~kept])), len(np.unique(ids)))),
        *(f"{n:,}" for n in (int((~kept).sum()), len(ids))),
    )
    return selected(records, np.flatnonzero(kept))

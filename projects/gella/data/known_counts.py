"""How large the published datasets are, to tell a partial copy from a whole one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gella.data.catalog import refcoco_name
from gella.utils.io import read_json

__all__ = ["Known", "known_counts"]


@dataclass(frozen=True)
class Known:
    """A published number.

    Attributes:
        value: the number.
        source: who says so.
        exact: False where publications round it or count differently.
    """

    value: int
    source: str
    exact: bool = True


_COCO = "cocodataset.org, 2017 panoptic"
_TABLE = "tensorflow.org/datasets/catalog/ref_coco"
_PAPERS = "the numbers of expressions that papers evaluate on"
# refs and images with refs, per split.
_REFS = {
    ("refcoco", "google", "train"): (40_000, 19_213),
    ("refcoco", "google", "val"): (5_000, 4_559),
    ("refcoco", "google", "test"): (5_000, 4_527),
    ("refcoco", "unc", "train"): (42_404, 16_994),
    ("refcoco", "unc", "val"): (3_811, 1_500),
    ("refcoco", "unc", "testA"): (1_975, 750),
    ("refcoco", "unc", "testB"): (1_810, 750),
    ("refcoco+", "unc", "train"): (42_278, 16_992),
    ("refcoco+", "unc", "val"): (3_805, 1_500),
    ("refcoco+", "unc", "testA"): (1_975, 750),
    ("refcoco+", "unc", "testB"): (1_798, 750),
    ("refcocog", "google", "train"): (44_822, 24_698),
    ("refcocog", "google", "val"): (5_000, 4_650),
    ("refcocog", "umd", "train"): (42_226, 21_899),
    ("refcocog", "umd", "val"): (2_573, 1_300),
    ("refcocog", "umd", "test"): (5_023, 2_600),
}
_EXPRESSIONS = {
    ("refcoco", "unc", "val"): 10_834,
    ("refcoco", "unc", "testA"): 5_657,
    ("refcoco", "unc", "testB"): 5_095,
    ("refcoco+", "unc", "val"): 10_758,
    ("refcoco+", "unc", "testA"): 5_726,
    ("refcoco+", "unc", "testB"): 4_889,
    ("refcocog", "umd", "val"): 4_896,
    ("refcocog", "umd", "test"): 9_602,
}


def _table() -> dict[str, dict[str, Known]]:
    table = {
        "gella_coco_panoptic_train2017": {"images": Known(118_287, _COCO)},
        "gella_coco_panoptic_val2017": {"images": Known(5_000, _COCO)},
        "gella_coco_png_train2017": {
            "narratives": Known(134_272, "Panoptic Narrative Grounding", exact=False)
        },
    }
    for (folder, split_by, split), (refs, images) in _REFS.items():
        counts = {"refs": Known(refs, _TABLE), "images": Known(images, _TABLE)}
        told = _EXPRESSIONS.get((folder, split_by, split))
        if told is not None:
            counts["expressions"] = Known(told, _PAPERS)
        for entities in ("instances", "panoptic"):
            table[refcoco_name(folder, split_by, split, entities)] = counts
    return table


def known_counts(name: str, metadata: Any) -> dict[str, Known]:
    """What is known of a dataset's size.

    Args:
        name: in the catalogs.
        metadata: of the dataset; the shapes say in their ``meta.json`` how many there are.

    Returns:
        Numbers by what they count: "images", "narratives", "refs", "expressions"; empty for a
        dataset that nobody has published.
    """
    if not name.startswith("gella_shapes_"):
        return _table().get(name, {})
    meta = Path(metadata.image_root).parent / "meta.json"
    split = Path(metadata.image_root).name
    if metadata.form != "panoptic" or not meta.is_file():
        return {}
    recipe = read_json(meta).get("recipe", {})
    return {"images": Known(int(recipe[split]), str(meta))} if split in recipe else {}

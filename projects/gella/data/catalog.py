"""The names under which the project's datasets stand in Detectron2's catalogs.

Files are looked for below ``$DETECTRON2_DATASETS`` (default: ``datasets``), as Detectron2 does;
datasets/README.md has the tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from gella.data import datasets
from gella.data.coco_categories import SHAPES_CATEGORIES, coco_panoptic_categories
from gella.data.entityseg import first_that_exists

__all__ = ["REFCOCO_SPLITS", "refcoco_name", "register_all"]

# (folder, who made the split, its parts). "+" is no letter for names of files and shells.
REFCOCO_SPLITS = (
    ("refcoco", "unc", ("train", "val", "testA", "testB")),
    ("refcoco", "google", ("train", "val", "test")),
    ("refcoco+", "unc", ("train", "val", "testA", "testB")),
    ("refcocog", "umd", ("train", "val", "test")),
    ("refcocog", "google", ("train", "val")),
)


def refcoco_name(folder: str, split_by: str, split: str, entities: str = "instances") -> str:
    """Name in the catalogs, such as ``gella_refcocoplus_unc_testA``.

    Args:
        folder: "refcoco", "refcoco+" or "refcocog".
        split_by: "unc", "google" or "umd".
        split: of the refs.
        entities: "instances" (the objects of ``instances.json``) or "panoptic" (all segments of
            COCO panoptic, in which the object is found by overlap; the name then ends with it).
    """
    name = f"gella_{folder.replace('+', 'plus')}_{split_by}_{split}"
    return name if entities == "instances" else f"{name}_{entities}"


def register_all(root: str | Path) -> None:
    """Register every dataset that the project knows, below ``root``; no file is read.

    Names: ``gella_shapes_{png,panoptic,refcoco}_{train,val}``, ``gella_shapes_captions_train``,
    ``gella_shapes_nouns_val``, ``gella_coco_{panoptic,png}_{train,val}2017``,
    ``gella_coco_nouns_val2017``, ``gella_entityseg_captions_train``, and `refcoco_name` of every
    entry of `REFCOCO_SPLITS` with both kinds of entities.
    """
    base = Path(root).expanduser()
    _register_shapes(base / "shapes")
    _register_coco(base / "coco")
    _register_refcoco(base)
    _register_entityseg(base / "entityseg")


def _register_shapes(root: Path) -> None:
    notes = root / "annotations"
    categories = SHAPES_CATEGORIES
    for split in ("train", "val"):
        panoptic_json = notes / f"panoptic_{split}.json"
        where = (root / split, notes / f"panoptic_{split}", panoptic_json)
        narratives = notes / f"png_shapes_{split}.json"
        datasets.register_panoptic(f"gella_shapes_panoptic_{split}", *where, categories)
        datasets.register_png(f"gella_shapes_png_{split}", *where, narratives, categories)
        datasets.register_refcoco(
            f"gella_shapes_refcoco_{split}",
            root / "refcoco",
            "unc",
            split,
            root / split,
            per="image" if split == "train" else "expression",
            panoptic_json=panoptic_json,
            panoptic_root=where[1],
        )
        if split == "train":
            captions = notes / "captions_train.jsonl"
            datasets.register_captions("gella_shapes_captions_train", *where, captions, categories)
        else:
            _register_nouns("gella_shapes_nouns_val", where, narratives, categories)


def _register_nouns(name: str, where: tuple[Path, ...], png_json: Path, categories: list) -> None:
    image_root, panoptic_root, panoptic_json = where
    datasets.register_png(
        name,
        image_root,
        panoptic_root,
        panoptic_json,
        png_json,
        categories,
        tasks=("extract",),
        evaluator_type="noun_extraction",
    )


def _register_coco(root: Path) -> None:
    categories = coco_panoptic_categories()
    for split in ("train2017", "val2017"):
        panoptic_json = root / "annotations" / f"panoptic_{split}.json"
        where = (root / split, _panoptic_root(root, split), panoptic_json)
        narratives = root / "annotations" / f"png_coco_{split}.json"
        datasets.register_panoptic(f"gella_coco_panoptic_{split}", *where, categories)
        datasets.register_png(f"gella_coco_png_{split}", *where, narratives, categories)
        if split == "val2017":
            _register_nouns("gella_coco_nouns_val2017", where, narratives, categories)
        else:
            for kind in ("panoptic", "png"):
                # The images that DATASETS.EXCLUDE_REFCOCO_VAL_TEST looks at.
                MetadataCatalog.get(f"gella_coco_{kind}_{split}").set(coco_train2017=True)


def _panoptic_root(root: Path, split: str) -> Path:
    """Choose among the places where COCO, Detectron2 and the benchmark keep the PNG files."""
    return first_that_exists(
        root,
        f"annotations/panoptic_{split}",
        f"panoptic_{split}",
        f"annotations/panoptic_segmentation/{split}",
    )


def _register_refcoco(root: Path) -> None:
    coco = root / "coco"
    # All of RefCOCO's pictures are in train2017 too, under other names: one copy is enough.
    images = first_that_exists(coco, "train2014", "train2017")
    panoptic: dict[str, Any] = {
        "panoptic_json": coco / "annotations" / "panoptic_train2017.json",
        "panoptic_root": _panoptic_root(coco, "train2017"),
        "match": "overlap",
    }
    for folder, split_by, splits in REFCOCO_SPLITS:
        for split in splits:
            for entities, more in (("instances", {}), ("panoptic", panoptic)):
                datasets.register_refcoco(
                    refcoco_name(folder, split_by, split, entities),
                    root / folder,
                    split_by,
                    split,
                    images,
                    per="image" if split == "train" else "expression",
                    names_of_2017=images.name == "train2017",
                    **more,
                )


def _register_entityseg(root: Path) -> None:
    instances = first_that_exists(
        root / "annotations",
        *(
            folder + name
            for name in (
                "entityv2_010203_entity_train.json",
                "entityv2_010203_entity_train_lr.json",
            )
            for folder in ("entity_segmentation/", "")
        ),
    )
    low = instances.stem.endswith("_lr")  # masks of the smaller copies of the images
    datasets.register_entityseg(
        "gella_entityseg_captions_train",
        instances,
        root / "annotations" / "captions_train.jsonl",
        root / ("images_lr" if low else "images"),
    )

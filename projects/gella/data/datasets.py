"""Names of datasets in Detectron2's catalogs; importing `gella.data` registers them all.

Files are looked for below ``$DETECTRON2_DATASETS`` (default: ``datasets``), as Detectron2 does, and
are read when a dataset is first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from gella.data import shapes
from gella.data.coco_categories import coco_panoptic_categories
from gella.data.coco_panoptic import category_metadata, load_coco_panoptic, read_categories
from gella.data.narratives import load_captions, load_png
from gella.data.refcoco import load_refcoco

__all__ = [
    "load_captions",
    "load_coco_panoptic",
    "load_png",
    "load_refcoco",
    "register_all",
    "register_captions",
    "register_panoptic",
    "register_png",
    "register_refcoco",
    "with_entity_files",
]


def register_panoptic(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    categories: list[dict[str, Any]] | None = None,
) -> None:
    """Register images with COCO panoptic annotations (evaluated by panoptic quality).

    Args:
        name: of the dataset in the catalogs.
        image_root, panoptic_root, panoptic_json: where the files are.
        categories: ``{id, name, isthing}`` each; None reads them from the file when the dataset is
            first loaded, and the metadata has none before.
    """
    paths = (str(panoptic_json), str(panoptic_root), str(image_root))
    _register(name, lambda: load_coco_panoptic(*paths), "coco_panoptic_seg", paths, categories)


def register_png(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    png_json: str | Path,
    categories: list[dict[str, Any]] | None = None,
    tasks: tuple[str, ...] = ("ground",),
    evaluator_type: str = "png",
) -> None:
    """Register narratives in the form of Panoptic Narrative Grounding.

    Args:
        name, image_root, panoptic_root, panoptic_json, categories: as `register_panoptic`.
        png_json: the narratives.
        tasks: what the records can train and serve.
        evaluator_type: "png" (average recall) or "noun_extraction".
    """
    paths = (str(panoptic_json), str(panoptic_root), str(image_root))
    _register(
        name,
        lambda: load_png(str(png_json), *paths, tasks=tasks),
        evaluator_type,
        paths,
        categories,
        json_file=str(png_json),
    )


def register_captions(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    captions_jsonl: str | Path,
    categories: list[dict[str, Any]] | None = None,
) -> None:
    """Register generated captions (JSON lines) that train describing and noun extraction.

    Args:
        name, image_root, panoptic_root, panoptic_json, categories: as `register_panoptic`.
        captions_jsonl: the captions.
    """
    paths = (str(panoptic_json), str(panoptic_root), str(image_root))
    _register(
        name,
        lambda: load_captions(str(captions_jsonl), *paths),
        "noun_extraction",
        paths,
        categories,
        json_file=str(captions_jsonl),
    )


def register_refcoco(
    name: str,
    folder: str | Path,
    split_by: str,
    split: str,
    image_root: str | Path,
    *,
    per: str = "expression",
    panoptic_json: str | Path | None = None,
    panoptic_root: str | Path | None = None,
) -> None:
    """Register the refs of one split; arguments as `load_refcoco`."""
    panoptic: dict[str, Any] = {"panoptic_json": panoptic_json, "panoptic_root": panoptic_root}
    DatasetCatalog.register(
        name, lambda: load_refcoco(folder, split_by, split, image_root, per=per, **panoptic)
    )
    MetadataCatalog.get(name).set(
        evaluator_type="refcoco",
        image_root=str(image_root),
        json_file=str(Path(folder) / f"refs({split_by}).p"),
        **{key: str(path) for key, path in panoptic.items() if path is not None},
    )


def _register(
    name: str,
    load: Callable[[], list[dict[str, Any]]],
    evaluator_type: str,
    paths: tuple[str, str, str],
    categories: list[dict[str, Any]] | None,
    **more: str,
) -> None:
    panoptic_json, panoptic_root, image_root = paths
    metadata = MetadataCatalog.get(name)

    def load_and_describe() -> list[dict[str, Any]]:
        records = load()
        if categories is None:
            metadata.set(**category_metadata(read_categories(panoptic_json)))
        return records

    DatasetCatalog.register(name, load_and_describe)
    metadata.set(
        evaluator_type=evaluator_type,
        panoptic_json=panoptic_json,
        panoptic_root=panoptic_root,
        image_root=image_root,
        **{"json_file": panoptic_json, **more},
    )
    if categories is not None:
        metadata.set(**category_metadata(categories))


def with_entity_files(
    records: list[dict[str, Any]], file_name: str | Path, format: str = "auto"
) -> list[dict[str, Any]]:
    """Return records whose entities come from a segmenter's files instead of the annotation.

    Args:
        records: dataset dicts; not changed.
        file_name: one JSON file for all images, or a folder with one ``.npz`` or ``.png`` file
            per image, named like the image.
        format: as `gella.entity_sources.load_entities`.

    The annotation stays at ``entities["targets"]``: phrases find their entities in it by overlap.

    Raises:
        FileNotFoundError: no file for an image; the message names both.
    """
    source = Path(file_name)
    swapped = []
    for record in records:
        found = source
        if source.is_dir():
            stem = Path(record["file_name"]).stem
            options = [source / f"{stem}{suffix}" for suffix in (".npz", ".png")]
            found = next((option for option in options if option.is_file()), options[0])
        if not found.is_file():
            raise FileNotFoundError(f"image {record['image_id']}: no entity file {found}")
        targets = record["entities"].get("targets", record["entities"])
        entities = {"format": format, "file_name": str(found), "targets": targets}
        swapped.append({**record, "entities": entities})
    return swapped


def register_all(root: str | Path) -> None:
    """Register every dataset that the project knows, below ``root``; no file is read.

    Names: ``gella_shapes_{png,panoptic,refcoco}_{train,val}``, ``gella_shapes_captions_train``,
    ``gella_shapes_nouns_val``, ``gella_coco_{panoptic,png}_{train,val}2017``.
    """
    base = Path(root).expanduser()
    _register_shapes(base / "shapes")
    _register_coco(base / "coco")


def _register_shapes(root: Path) -> None:
    notes = root / "annotations"
    categories = shapes.CATEGORIES
    for split in shapes.SPLITS:
        panoptic_json = notes / f"panoptic_{split}.json"
        where = (root / split, notes / f"panoptic_{split}", panoptic_json)
        narratives = notes / f"png_shapes_{split}.json"
        register_panoptic(f"gella_shapes_panoptic_{split}", *where, categories)
        register_png(f"gella_shapes_png_{split}", *where, narratives, categories)
        register_refcoco(
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
            register_captions("gella_shapes_captions_train", *where, captions, categories)
        else:
            register_png(
                "gella_shapes_nouns_val",
                *where,
                narratives,
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
        register_panoptic(f"gella_coco_panoptic_{split}", *where, categories)
        register_png(f"gella_coco_png_{split}", *where, narratives, categories)


def _panoptic_root(root: Path, split: str) -> Path:
    """Choose among the places where COCO, Detectron2 and the benchmark keep the PNG files."""
    usual = root / "annotations" / f"panoptic_{split}"
    others = (root / f"panoptic_{split}", root / "annotations" / "panoptic_segmentation" / split)
    return next((folder for folder in (usual, *others) if folder.is_dir()), usual)


def root_from_environment() -> str:
    """Return ``$DETECTRON2_DATASETS`` or its default, ``datasets``."""
    return os.getenv("DETECTRON2_DATASETS", "datasets")

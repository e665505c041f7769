"""Registering datasets of the known forms in Detectron2's catalogs.

No file is read before a dataset is asked for. Next to what Detectron2's metadata usually has,
``form`` ("panoptic", "png", "captions", "entityseg", "refcoco") and the paths say what lies on disk
where, for `gella.data.checking`. The names that come with the project are in `gella.data.catalog`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from gella.data.coco_panoptic import category_metadata, load_coco_panoptic, read_categories
from gella.data.entityseg import load_entityseg
from gella.data.narratives import load_captions, load_png
from gella.data.record_store import RecordStore
from gella.data.refcoco import load_refcoco

__all__ = [
    "load_captions",
    "load_coco_panoptic",
    "load_entityseg",
    "load_png",
    "load_refcoco",
    "register_captions",
    "register_entityseg",
    "register_panoptic",
    "register_png",
    "register_refcoco",
    "root_from_environment",
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
    kind = "coco_panoptic_seg"
    _register(name, lambda: load_coco_panoptic(*paths), kind, paths, categories, form="panoptic")


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
        form="png",
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
        form="captions",
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
    match: str = "id",
    names_of_2017: bool = False,
) -> None:
    """Register the refs of one split; arguments as `load_refcoco`."""
    options: dict[str, Any] = {"per": per, "match": match, "names_of_2017": names_of_2017}
    panoptic: dict[str, Any] = {"panoptic_json": panoptic_json, "panoptic_root": panoptic_root}
    DatasetCatalog.register(
        name, lambda: load_refcoco(folder, split_by, split, image_root, **options, **panoptic)
    )
    MetadataCatalog.get(name).set(
        form="refcoco",
        evaluator_type="refcoco",
        image_root=str(image_root),
        json_file=str(Path(folder) / f"refs({split_by}).p"),
        instances_json=str(Path(folder) / "instances.json"),
        split=split,
        names_of_2017=names_of_2017,
        **{key: str(path) for key, path in panoptic.items() if path is not None},
    )


def _register(
    name: str,
    load: Callable[[], RecordStore],
    evaluator_type: str,
    paths: tuple[str, str, str],
    categories: list[dict[str, Any]] | None,
    **more: str,
) -> None:
    panoptic_json, panoptic_root, image_root = paths
    metadata = MetadataCatalog.get(name)

    def load_and_describe() -> RecordStore:
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


def register_entityseg(
    name: str,
    instances_json: str | Path,
    captions_jsonl: str | Path,
    image_root: str | Path,
) -> None:
    """Register generated captions over COCO-style entity masks; arguments as `load_entityseg`."""
    DatasetCatalog.register(
        name, lambda: load_entityseg(instances_json, captions_jsonl, image_root)
    )
    MetadataCatalog.get(name).set(
        form="entityseg",
        evaluator_type="noun_extraction",
        image_root=str(image_root),
        instances_json=str(instances_json),
        json_file=str(captions_jsonl),
    )


def root_from_environment() -> str:
    """Return ``$DETECTRON2_DATASETS`` or its default, ``datasets``."""
    return os.getenv("DETECTRON2_DATASETS", "datasets")

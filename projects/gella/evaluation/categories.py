"""The names that panoptic inference asks for, where they are not the dataset's own."""

from __future__ import annotations

from typing import Any

from detectron2.data import MetadataCatalog

from gella.utils.io import read_json


def asked_categories(cfg: Any, dataset_name: str) -> list[dict[str, Any]] | None:
    """Categories to list in the prompt for a dataset, by ``TEST.CATEGORIES_FROM``.

    The key names a registered dataset, or a JSON file: COCO's form (``[{id, name, isthing}, ...]``,
    or an object that has it under ``categories``) with the dataset's ids in any order, or a list of
    names in the order of the dataset's categories. The truth stays the dataset's.

    Returns:
        dicts ``id``, ``name``, ``isthing``; None where the key is empty or the dataset has no
        categories, and its own are to be taken.

    Raises:
        FileNotFoundError: neither a dataset nor a file.
        ValueError: the file is no list of categories, or its ids are not the dataset's.
    """
    source = cfg.TEST.CATEGORIES_FROM
    own = MetadataCatalog.get(dataset_name).get("categories", None)
    if not source or not own:
        return None
    found = _read(source)
    if found and all(isinstance(item, str) for item in found):
        if len(found) != len(own):
            raise ValueError(
                f"TEST.CATEGORIES_FROM: {source} has {len(found)} names but {dataset_name} has "
                f"{len(own)} categories: give one name each, in the same order"
            )
        return [{**category, "name": name} for category, name in zip(own, found, strict=True)]
    kinds = {int(category["id"]): category["isthing"] for category in own}
    try:
        asked: list[dict[str, Any]] = [{"id": int(c["id"]), "name": str(c["name"])} for c in found]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"TEST.CATEGORIES_FROM: {source} is no list of categories ({error!r}): each needs "
            "'id' and 'name'"
        ) from error
    ids = [category["id"] for category in asked]
    if sorted(ids) != sorted(kinds):
        odd = sorted(set(ids) ^ set(kinds))
        raise ValueError(
            f"TEST.CATEGORIES_FROM: {source} has {len(ids)} categories, {dataset_name} "
            f"{len(kinds)}; ids in only one of them or twice: {odd[:10] or 'twice'}: the names may "
            "differ, the ids may not"
        )
    return [{**category, "isthing": kinds[category["id"]]} for category in asked]


def _read(source: str) -> list[Any]:
    if source in MetadataCatalog.list():
        return list(MetadataCatalog.get(source).get("categories", []))
    advice = "name a registered dataset or a JSON file"
    content = read_json(source, "TEST.CATEGORIES_FROM:", advice)
    found = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise ValueError(f"TEST.CATEGORIES_FROM: {source} holds no list of categories")
    return found

"""Nouns and categories as the demo's command line takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gella.data.coco_categories import coco_panoptic_categories


def split_nouns(text: str | None) -> tuple[str, ...] | None:
    """Nouns separated by commas; None without a text.

    Raises:
        ValueError: there is a text, but no noun in it.
    """
    if text is None:
        return None
    nouns = tuple(noun.strip() for noun in text.split(",") if noun.strip())
    if not nouns:
        raise ValueError(f'caption without nouns: --nouns is "{text}"; name at least one')
    return nouns


def read_categories(text: str | None) -> list[dict[str, Any] | str] | None:
    """Categories of a panoptic question; None without a text.

    Args:
        text: names separated by commas; "coco" for the 133 of COCO panoptic; or a file with a name
            per line or a JSON list of names or of ``{"id", "name", "isthing"}``, which may also be
            the value of ``categories``, as in COCO's files.

    Raises:
        ValueError: there is no name, one is empty or given twice, or the file is none of these.
    """
    if text is None:
        return None
    if text == "coco":
        return list(coco_panoptic_categories())
    path = Path(text)
    if "," not in text and (path.is_file() or path.suffix in (".json", ".txt")):
        found, where = _from_file(path), f"categories {path}"
    else:
        found, where = [name.strip() for name in text.split(",") if name.strip()], "--categories"
    names = [str(item["name"] if isinstance(item, dict) else item).strip() for item in found]
    if not names or not all(names):
        raise ValueError(f'{where}: no category, or an empty name; write such as "sky,grass,cow"')
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: category {twice!r} is there twice")
    return found


def _from_file(path: Path) -> list[dict[str, Any] | str]:
    if not path.is_file():
        raise FileNotFoundError(f"categories {path} do not exist; check --categories")
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".json":
            return [line.strip() for line in content.splitlines() if line.strip()]
        listed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"categories {path} cannot be read ({error})") from error
    listed = listed.get("categories") if isinstance(listed, dict) else listed
    if not isinstance(listed, list):
        raise ValueError(f"categories {path}: expected a list of names, or COCO's categories")
    for place, item in enumerate(listed):
        whole = isinstance(item, dict) and isinstance(item.get("name"), str)
        if whole and not {"id", "isthing"} <= item.keys():
            raise ValueError(
                f"categories {path}: entry {place} has no 'id' or no 'isthing'; or give names only"
            )
        if not (whole or isinstance(item, str)):
            raise ValueError(f"categories {path}: entry {place} is neither a name nor has a 'name'")
    if len({isinstance(item, str) for item in listed}) > 1:
        raise ValueError(f"categories {path}: names and objects are mixed; write all one way")
    return listed

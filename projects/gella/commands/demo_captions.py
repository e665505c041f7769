"""Captions from files: text or JSON lines, and which picture each is of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gella.commands.demo_inputs import Picture, plain

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FORM = '{"image": "a.png", "caption": "...", "nouns": [...], "masks": "a_masks.png"}'


@dataclass(frozen=True)
class Entry:
    """One caption of a file.

    Attributes:
        image: name of its picture; None: the file says it by the order.
        text: caption or expression.
        nouns: of the caption, in its order; None: not given.
        masks: file of the picture's masks, relative to the folder of the file.
        where: file and line, for messages.
    """

    image: str | None
    text: str
    nouns: tuple[str, ...] | None
    masks: Path | None
    where: str


def read_captions(file_name: str | Path) -> list[Entry]:
    """Read a file of captions: JSON lines by the suffix .jsonl, .ndjson or .json, else text.

    JSON lines: ``image`` (or ``file_name``), ``caption`` (or ``description``, ``expression``,
    ``text``) and, if wanted, ``nouns`` and ``masks``; so the files of ``tools/describe_images.py``
    do. Text: ``name<TAB>caption`` in every line, or a caption in every line. Empty lines are
    skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; names the line.
    """
    path = Path(file_name)
    if not path.is_file():
        raise FileNotFoundError(f"captions {path} do not exist; check --captions")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"captions {path} are no UTF-8 text ({error.reason}); save them so") from (
            error
        )
    # Not splitlines(): a caption may hold characters that it takes for line ends (U+2028).
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"captions {path} are empty; write a caption per line")
    read = _from_json if path.suffix.lower() in JSON_SUFFIXES else _from_text
    return read(path, [(number, line.strip("\r")) for number, line in lines])


def _from_text(path: Path, lines: list[tuple[int, str]]) -> list[Entry]:
    tabs = [number for number, line in lines if "\t" in line]
    if tabs and len(tabs) < len(lines):
        other = next(number for number, line in lines if "\t" not in line)
        raise ValueError(
            f"captions {path}: line {tabs[0]} has a tab (name<TAB>caption) but line {other} has "
            "none; write all lines one way"
        )
    entries = []
    for number, line in lines:
        name, _, text = line.partition("\t") if tabs else ("", "", line)
        image = name.strip() if tabs else None
        entries.append(Entry(image, text.strip(), None, None, f"{path}, line {number}"))
    return entries


def _from_json(path: Path, lines: list[tuple[int, str]]) -> list[Entry]:
    entries = []
    for number, line in lines:
        where = f"captions {path}: line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON ({error}); write one object a line") from None
        if not isinstance(item, dict):
            raise ValueError(f"{where} is no object; write {_FORM}")
        image = _text_of(item, ("image", "file_name"), where)
        text = _text_of(item, ("caption", "description", "expression", "text"), where)
        nouns, masks = item.get("nouns"), item.get("masks")
        if nouns is not None and not (
            isinstance(nouns, list) and all(isinstance(noun, str) for noun in nouns)
        ):
            raise ValueError(f"{where}: 'nouns' is no list of texts; write {_FORM}")
        if masks is not None and not (isinstance(masks, str) and masks and "\0" not in masks):
            raise ValueError(f"{where}: 'masks' is no name of a file; write {_FORM}")
        entries.append(
            Entry(
                image,
                text,
                None if nouns is None else tuple(plain(noun) for noun in nouns),
                None if masks is None else path.parent / masks,
                f"{path}, line {number}",
            )
        )
    return entries


def _text_of(item: dict[str, Any], keys: Sequence[str], where: str) -> str:
    given = [key for key in keys if key in item]
    if not given:
        raise ValueError(f"{where} has no '{keys[0]}'; write {_FORM}")
    value = item[given[0]]
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{given[0]}' is no text; write {_FORM}")
    return plain(value)


class Names:
    """Finds pictures by the names that files of captions use.

    A name is the picture's path below the input folder, or as much of its end as is enough; the
    suffix may be left out. Names are only compared, never opened.
    """

    def __init__(self, pictures: Sequence[Picture]) -> None:
        """Index the pictures."""
        self._places: dict[PurePosixPath, list[int]] = defaultdict(list)
        for place, picture in enumerate(pictures):
            path = PurePosixPath(plain(picture.name))
            for form in {path, path.with_suffix("")}:
                for start in range(len(form.parts)):
                    self._places[PurePosixPath(*form.parts[start:])].append(place)
        self._names = [plain(picture.name) for picture in pictures]

    def find(self, name: str) -> int | None:
        """Place of the picture that a name means; None if there is none.

        A name with more folders than the input has ("data/img/a.png" for "a.png") is tried by its
        end, unless it leads upwards.

        Raises:
            ValueError: several pictures could be meant.
        """
        path = PurePosixPath(name.replace("\\", "/"))
        parts = path.parts[1:] if path.is_absolute() else path.parts
        if not parts or ".." in parts:
            return None
        for start in range(len(parts)):
            found = self._places.get(PurePosixPath(*parts[start:]), [])
            whole = [place for place in found if self._names[place] == name]
            found = whole or found
            if len(found) > 1:
                first, second = (self._names[place] for place in found[:2])
                raise ValueError(f"{name!r} could be {first} or {second}; write more of its path")
            if found:
                return found[0]
        return None


def assign(
    entries: Sequence[Entry], pictures: Sequence[Picture]
) -> tuple[dict[int, list[Entry]], list[Entry]]:
    """Which captions each picture has.

    Args:
        entries: of one file.
        pictures: in the order of their names.

    Returns:
        Entries by the place of their picture, and those whose picture is not there.

    Raises:
        ValueError: captions without names do not go with the number of pictures, or a name is of
            several pictures, or no caption is of any picture.
    """
    if entries[0].image is None:
        # All captions of a nameless file are of the one picture, else one of each.
        if len(pictures) == 1:
            return {0: list(entries)}, []
        if len(entries) != len(pictures):
            file = entries[0].where.rpartition(",")[0]
            raise ValueError(
                f"{file} has {len(entries)} captions without names, but there are {len(pictures)} "
                "pictures; write name<TAB>caption, or a caption for each picture in their order"
            )
        return {place: [entry] for place, entry in enumerate(entries)}, []
    names = Names(pictures)
    found: dict[int, list[Entry]] = defaultdict(list)
    lost = []
    for entry in entries:
        try:
            place = names.find(entry.image or "")
        except ValueError as error:
            raise ValueError(f"{entry.where}: {error}") from None
        if place is None:
            lost.append(entry)
        else:
            found[place].append(entry)
    if not found:
        raise ValueError(
            f"{lost[0].where}: {lost[0].image!r} is none of the {len(pictures)} pictures, and no "
            f"other caption is of one (the first picture is {pictures[0].name})"
        )
    return dict(found), lost

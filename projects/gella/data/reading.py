"""Reading annotation files with one clear error for each way they can be wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from gella.utils import io

ADVICE = (
    "for the synthetic shapes run: python datasets/prepare_shapes.py; "
    "for other datasets see datasets/README.md"
)
read_json = partial(io.read_json, advice=ADVICE)
json_lines = partial(io.json_lines, advice=ADVICE)


def read_json_lines(path: str | Path) -> list[Any]:
    """Return the content of a file with one JSON value a line; blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
        ValueError: a line is no JSON; the message gives its number, from 1.
    """
    records = []
    for _, value in json_lines(path):
        if isinstance(value, ValueError):
            raise value
        records.append(value)
    return records


def field(record: Any, name: str, path: str | Path, where: str) -> Any:
    """Return ``record[name]``; a ValueError names the file, the place and the field if missing."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{path}: {where} has no field '{name}'; is it a file of this format?")
    return record[name]


def listed(record: Any, name: str, path: str | Path, where: str) -> list[Any]:
    """Return ``record[name]``, which has to be a list; errors as `field`."""
    value = field(record, name, path, where)
    if not isinstance(value, list):
        kind = type(value).__name__
        raise ValueError(f"{path}: {where}: '{name}' is a {kind} ({str(value)[:40]}), not a list")
    return value


def text(record: Any, name: str, path: str | Path, where: str) -> str:
    """Return ``record[name]``, which has to be text; errors as `field`."""
    value = field(record, name, path, where)
    if not isinstance(value, str):
        raise ValueError(f"{path}: {where}: '{name}' is {str(value)[:40]!r}, not text")
    return value


def whole(record: Any, name: str, path: str | Path, where: str, least: int | None = None) -> int:
    """Return ``record[name]`` as an int; text of digits counts, since files use both forms.

    Raises ValueError, naming the file, the place and the value, for anything else and for a number
    below ``least``.
    """
    value = field(record, name, path, where)
    if isinstance(value, bool) or not (
        isinstance(value, int) or (isinstance(value, str) and value.isdecimal())
    ):
        raise ValueError(f"{path}: {where}: '{name}' is {value!r}, not a whole number")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{path}: {where}: '{name}' is {number}, but at least {least} is needed")
    return number

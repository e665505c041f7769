"""Reading annotation files with one clear error for each way they can be wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

ADVICE = (
    "for the synthetic shapes run: python datasets/prepare_shapes.py; "
    "for other datasets see datasets/README.md"
)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
        ValueError: the file is no JSON, for instance because it is cut short.
    """
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}); copy or prepare it again") from error


def read_json_lines(path: str | Path) -> list[Any]:
    """Return the content of a file with one JSON value a line; blank lines are passed over.

    Raises:
        FileNotFoundError: as `read_json`.
        ValueError: a line is no JSON; the message gives its number, from 1.
    """
    records = []
    for number, line in enumerate(_existing(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is no JSON ({error})") from error
    return records


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers and strings, and refuses to import anything."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function: a pickle that names one could run any code."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: str | Path) -> Any:
    """Return the content of a pickle that holds plain data only, such as RefCOCO's refs.

    Text of Python 2 pickles is read as UTF-8.

    Raises:
        FileNotFoundError: as `read_json`.
        ValueError: the file is damaged, or asks for a class or function, which is never run.
    """
    with open(_existing(path), "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{path}: refused, only plain lists, dicts, numbers and text are read from a "
                f"pickle ({error}); get the file from its first source"
            ) from error


def field(record: Any, name: str, path: str | Path, where: str) -> Any:
    """Return ``record[name]``; a ValueError names the file, the place and the field if missing."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{path}: {where} has no field '{name}'; is it a file of this format?")
    return record[name]


def _existing(path: str | Path) -> Path:
    found = Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"{path} does not exist; {ADVICE}")
    return found

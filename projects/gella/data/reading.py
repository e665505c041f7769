"""Reading annotation files with one clear error for each way they can be wrong."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADVICE = (
    "for the synthetic shapes run: python datasets/prepare_shapes.py; "
    "for other datasets see datasets/README.md"
)


@contextmanager
def no_cycle_search() -> Iterator[None]:
    """Keep the garbage collector from walking millions of fresh dicts again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
        ValueError: the file is no JSON, for instance because it is cut short.
    """
    try:
        with no_cycle_search():
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
    for _, value in json_lines(path):
        if isinstance(value, ValueError):
            raise value
        records.append(value)
    return records


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and value of every line that is not blank.

    The value of a line that is no JSON is a ValueError, which is not raised. A missing file raises
    FileNotFoundError, and one that is no UTF-8 ValueError.
    """
    try:
        content = _existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
    # Not splitlines(): it also splits at line separators that may stand inside JSON text.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, ValueError(f"{path}: line {number} is no JSON ({error})")


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
        except Exception as error:  # a damaged pickle may raise nearly anything
            trouble = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path}: refused, only plain lists, dicts, numbers and text are read from a "
                f"pickle ({trouble}); get the file from its first source"
            ) from error


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


def _existing(path: str | Path) -> Path:
    found = Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"{path} does not exist; {ADVICE}")
    return found

"""Records of datasets: reading their fields from files, and holding very many of them.

Annotation files are read with one clear error for each way they can be wrong. What they hold is
kept as bytes: a Python object is written to whenever somebody looks at it (its reference count), so
a list of dicts that a forked worker reads is copied into that worker page by page. Bytes are only
read, and what several records have in common, an image and its segments, is held once.
"""

from __future__ import annotations

import operator
import pickle
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from gella.utils import io
from gella.utils.io import few, image_key, plain

Record = dict[str, Any]
ADVICE = (
    "for the synthetic shapes run: python datasets/prepare_shapes.py; "
    "for other datasets see datasets/README.md"
)
read_json = partial(io.read_json, advice=ADVICE)
json_lines = partial(io.json_lines, advice=ADVICE)
_COMMON = ("image_id", "tasks", "entities")  # what `pack` takes for shared


class Problems:
    """What becomes of what is wrong with a file: a reader stops at the first, with a ValueError.

    `gella.data.check.Report` notes all of it instead, and the readers go on: then their fields are
    None where they are wrong.
    """

    def wrong(self, kind: str, place: Place, message: str) -> None:
        """Meet what makes a record unusable; ``kind`` is a short name for it."""
        raise ValueError(f"{place.path}: {place.where}: {message}")

    def note(self, kind: str, place: Place, message: str, level: str = "warning") -> None:
        """Meet what a reader can live with, and only a check tells."""

    def attempt(self, kind: str, place: Place, make: Callable[..., Any], *args: Any) -> Any:
        """The result of ``make(*args)``, or what it raises."""
        return make(*args)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a figure of a check."""

    def uncounted(self) -> Problems:
        """The same without figures, for a file of which only a part is used."""
        return self


STOP = Problems()
_ABSENT = object()


class Place:
    """A record's place in a file; it takes fields, and knows what to do with what is wrong there.

    Attributes:
        path: the file.
        where: the record, such as "image 17".
        problems: what is wrong goes there; see there for what the methods return then.
    """

    __slots__ = ("path", "problems", "where")  # one is made for each of a million segments

    def __init__(
        self, path: str | Path, where: str = "the file", problems: Problems = STOP
    ) -> None:
        self.path, self.where, self.problems = path, where, problems

    def at(self, where: str) -> Place:
        """Another record of the file."""
        return Place(self.path, where, self.problems)

    def wrong(self, kind: str, message: str) -> None:
        """See :meth:`Problems.wrong`."""
        self.problems.wrong(kind, self, message)

    def note(self, kind: str, message: str, level: str = "warning") -> None:
        """See :meth:`Problems.note`."""
        self.problems.note(kind, self, message, level)

    def read(self, reader: Callable[[Any], Any]) -> Any:
        """The file's content."""
        return self.problems.attempt("file", self, reader, self.path)

    def field(self, record: Any, name: str, default: Any = None) -> Any:
        """``record[name]``, whatever it is."""
        if isinstance(record, dict) and name in record:
            return record[name]
        self.wrong("field", f"there is no field '{name}'; is it a file of this format?")
        return default

    def key(self, record: Any, name: str) -> Any:
        """``record[name]`` as text: names, which files write as numbers too."""
        value = self.field(record, name, _ABSENT)
        return None if value is _ABSENT else str(value)

    def image_id(self, record: Any, name: str = "image_id") -> Any:
        """``record[name]``, a whole number or text, as `image_key` has it."""
        value = self.field(record, name, _ABSENT)
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        if whole or isinstance(value, str):
            return image_key(value)
        if value is not _ABSENT:
            self.wrong("field", f"'{name}' is {value!r}, not a whole number or text")
        return None

    def stranger(self, entries: Sequence[Any], known: Iterable[Any], file: str | Path) -> None:
        """Meet an image that ``file`` lacks, which knows others: that of the first of entries."""
        ids = [str(entry.get("image_id")) for entry in entries if isinstance(entry, dict)]
        there = f"(ids here: {few(dict.fromkeys(ids))}; there: {few(known)})"
        said = f"image {ids[0]} is not in {file}; both must be of one split {there}"
        self.wrong("unknown-image", said)

    def listed(self, record: Any, name: str) -> Any:
        """``record[name]``, which has to be a list; where it is not, an empty one."""
        value = self.field(record, name, _ABSENT)
        if value is not _ABSENT and not isinstance(value, list | tuple):
            kind = type(value).__name__
            self.wrong("field", f"'{name}' is a {kind} ({str(value)[:40]}), not a list")
        return value if isinstance(value, list | tuple) else []

    def text(self, record: Any, name: str) -> Any:
        """``record[name]``, which has to be text."""
        value = self.field(record, name, _ABSENT)
        if value is not _ABSENT and not isinstance(value, str):
            self.wrong("field", f"'{name}' is {str(value)[:40]!r}, not text")
        return value if isinstance(value, str) else None

    def whole(self, record: Any, name: str, least: int | None = None) -> Any:
        """``record[name]`` as an int of at least ``least``; text of digits counts too."""
        value = self.field(record, name, _ABSENT)
        digits = isinstance(value, str) and value.isdecimal()
        if isinstance(value, bool) or not (isinstance(value, int) or digits):
            if value is not _ABSENT:
                self.wrong("field", f"'{name}' is {value!r}, not a whole number")
            return None
        if least is not None and int(value) < least:
            self.wrong("field", f"'{name}' is {int(value)}, but at least {least} is needed")
            return None
        return int(value)


PICTURE = ("file_name", "image_id", "height", "width")
"""Keys of a dataset dict that say what the picture is."""

_PHRASE = ("text", "segment_ids", "start", "end", "is_plural", "is_thing")
# Types of the values of dataset dicts (docs/FORMATS.md 7); truth values are numbers.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("file_name", "caption", "text"), str),
    **dict.fromkeys(("height", "width", "start", "end"), int),
    **dict.fromkeys(("is_plural", "is_thing"), int | None),
    **dict.fromkeys(("id", "category_id"), int | str),
    **{"entities": dict, "segment_ids": list | tuple | None},
}


def check_record(record: Any, place: Place, keys: Sequence[str] = (), task: str = "") -> None:
    """Meet what a dataset dict of plain values lacks, or has of another type.

    ``keys`` are looked at; none: all that its ``tasks``, and ``task`` beside them, need.
    """

    def look(at: Place, held: Any, *names: str) -> None:
        for name in names:
            value, kind = at.field(held, name, _ABSENT), _KINDS[name]
            right = isinstance(value, kind) and not (name in PICTURE[2:] and value < 1)
            if name == "segment_ids":
                right = right and all(str(i).isdecimal() for i in value or ())
            if value is not _ABSENT and not right:
                called = getattr(kind, "__name__", kind)
                at.wrong("field", f"'{name}' is {value!r:.40}, not {called}")

    tasks = {task, *map(str, place.listed(record, "tasks"))} - {""} if not keys else set()
    if unknown := tasks - {"describe", "extract", "ground", "panoptic", "refer"}:
        place.wrong("field", f"'tasks' has {', '.join(sorted(unknown))}, which is no task")
    place.image_id(record)
    look(place, record, *(key for key in keys or PICTURE if key != "image_id"))
    if keys:
        return
    look(place, record, "entities")
    masks = record.get("entities")
    for part in (masks, masks.get("targets")) if isinstance(masks, dict) else ():
        if isinstance(part, dict):
            look(place, part, *(() if "source" in part else ("file_name",)))
            listed = part.get("segments_info") is not None
            for segment in place.listed(part, "segments_info") if listed else ():
                wanted = ("id", "category_id")[: 1 + ("panoptic" in tasks)]
                look(place.at(f"{place.where}, a segment"), segment, *wanted)
    said = "caption" in record or not (record.get("expressions") or "panoptic" in tasks)
    if tasks & {"describe", "extract"} or ("ground" in tasks and said):
        look(place, record, "caption")
    for key, asked, names in (
        ("phrases", "extract" in tasks or ("ground" in tasks and said), _PHRASE),
        ("expressions", "refer" in tasks, _PHRASE[:2]),
    ):
        for number, one in enumerate(place.listed(record, key) if asked else ()):
            look(place.at(f"{place.where}, {key} {number}"), one, *names)


class Records(Sequence[Record]):
    """Dataset dicts made anew at every access; changing one changes nothing inside."""

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        """One dict, or a list of them for a slice; IndexError outside the records."""
        if isinstance(place, slice):
            return [self._make(index) for index in range(*place.indices(len(self)))]
        index = operator.index(place)
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._make(index % len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self._make(index) for index in range(len(self)))

    @abstractmethod
    def _make(self, index: int) -> Record:
        """The dict at a place in 0..len - 1."""

    @abstractmethod
    def tasks(self) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """The tasks of every record without making it: distinct values, and their places (N,)."""

    @abstractmethod
    def image_ids(self) -> np.ndarray:
        """The image ids as `image_key` has them, (N,); "" for records without any."""


class _Blobs:
    """Pickled objects one after the other in one buffer."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, value: Any) -> int:
        self._bytes += pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._bytes))
        return len(self._ends) - 2

    def load(self, number: int) -> Any:
        with memoryview(self._bytes) as view:
            return pickle.loads(view[self._ends[number] : self._ends[number + 1]])

    @property
    def num_bytes(self) -> int:
        return len(self._bytes) + self._ends.itemsize * len(self._ends)


class _Shared:
    """Fields in common, and what has to be known of them without unpickling."""

    def __init__(self) -> None:
        self.blobs = _Blobs()
        self.image_ids: list[str] = []
        self.task_kinds: list[tuple[str, ...]] = []
        self.task_codes = array("q")


class RecordStore(Records):
    """Pickled dicts in two buffers: shared fields, and each record's own.

    Build it with `pack`, or with `share` and `add`; `derived` starts another one over the same
    shared fields.
    """

    def __init__(self, shared: _Shared | None = None) -> None:
        """An empty store; ``shared`` is of another store, see `derived`."""
        self._shared = _Shared() if shared is None else shared
        self._own = _Blobs()
        # Arrays, not lists: a list's numbers are objects, which every reader would write to.
        self._numbers = array("q")  # of the shared fields, for every record

    @classmethod
    def pack(cls, records: Iterable[Record]) -> RecordStore:
        """Store dicts that exist already as `plain` values; shared ``entities`` are kept once."""
        store = cls()
        numbers: dict[tuple[int, str, str], int] = {}
        kept = []  # an id stays taken while its object lives
        for given in records:
            record = given if isinstance(given, Mapping) else {}  # which `check_record` tells
            common = {name: record[name] for name in _COMMON if name in record}
            entities = common.get("entities")
            key = (id(entities), str(common.get("image_id")), str(common.get("tasks")))
            if entities is None or key not in numbers:
                kept.append(entities)
                numbers[key] = store.share(plain(common))
            own = {k: value for k, value in record.items() if k not in common}
            store.add(numbers[key], plain(own))
        return store

    def derived(self) -> RecordStore:
        """An empty store that has this one's shared fields; they are not copied."""
        return RecordStore(self._shared)

    def share(self, fields: Mapping[str, Any]) -> int:
        """Keep fields that records have in common; returns the number to `add` records with."""
        shared, tasks = self._shared, fields.get("tasks")
        tasks = tuple(tasks) if isinstance(tasks, list | tuple) else ()
        if tasks not in shared.task_kinds:
            shared.task_kinds.append(tasks)
        shared.task_codes.append(shared.task_kinds.index(tasks))
        shared.image_ids.append(image_key(fields.get("image_id", "")))
        return shared.blobs.append(dict(fields))

    def add(self, number: int, own: Mapping[str, Any] | None = None) -> None:
        """Append the record of the shared fields ``number`` and the fields ``own``."""
        self._own.append(dict(own) if own else None)
        self._numbers.append(number)

    def shared(self, number: int) -> Record:
        """A fresh dict of the shared fields of that number."""
        return self._shared.blobs.load(number)

    def numbers_by_image(self) -> dict[str, int]:
        """Number of the shared fields of every image, by its id as `image_key` has it."""
        return {image_id: number for number, image_id in enumerate(self._shared.image_ids)}

    @property
    def num_bytes(self) -> int:
        """Bytes of both buffers and their indices."""
        index = self._numbers.itemsize * len(self._numbers)
        return self._shared.blobs.num_bytes + self._own.num_bytes + index

    def __len__(self) -> int:
        """Number of records."""
        return len(self._numbers)

    def _make(self, index: int) -> Record:
        return {**self.shared(self._numbers[index]), **(self._own.load(index) or {})}

    def tasks(self) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """See `Records`."""
        codes = np.asarray(self._shared.task_codes, dtype=np.int64)
        return list(self._shared.task_kinds), codes[np.asarray(self._numbers, dtype=np.int64)]

    def image_ids(self) -> np.ndarray:
        """See `Records`."""
        numbers = np.asarray(self._numbers, dtype=np.int64)
        return np.asarray(self._shared.image_ids, dtype=str)[numbers]


class _View(Records):
    """Chosen records of several datasets, which may pass through a function at every access."""

    def __init__(
        self,
        parts: Sequence[Records],
        places: np.ndarray | None = None,
        change: Callable[[Record], Record] | None = None,
    ) -> None:
        self._parts, self._change = list(parts), change
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        total = int(self._ends[-1]) if len(parts) else 0
        self._places = np.arange(total) if places is None else np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def _make(self, index: int) -> Record:
        # Views of views stay cheap: a place is looked up in each, and only the last one unpickles.
        place = int(self._places[index])
        part = int(np.searchsorted(self._ends, place, side="right"))
        record = self._parts[part]._make(place - (int(self._ends[part - 1]) if part else 0))
        return record if self._change is None else self._change(record)

    def tasks(self) -> tuple[list[tuple[str, ...]], np.ndarray]:
        kinds: list[tuple[str, ...]] = []
        codes = [np.zeros(0, dtype=np.int64)]
        for own_kinds, own_codes in (part.tasks() for part in self._parts):
            codes.append(own_codes + len(kinds))
            kinds += own_kinds
        return kinds, np.concatenate(codes)[self._places]

    def image_ids(self) -> np.ndarray:
        ids = [np.zeros(0, dtype=str), *(part.image_ids() for part in self._parts)]
        return np.concatenate(ids)[self._places]


def as_records(records: Sequence[Record]) -> Records:
    """The same records, packed unless they are already; plain lists come from users' catalogs."""
    return records if isinstance(records, Records) else RecordStore.pack(records)


def concatenated(parts: Iterable[Sequence[Record]]) -> Records:
    """The records of several datasets one after the other; stores are not copied."""
    packed = [as_records(part) for part in parts]
    return packed[0] if len(packed) == 1 else _View(packed)


def selected(records: Sequence[Record], places: Sequence[int] | np.ndarray) -> Records:
    """The records at some places, in the order of ``places`` (int64 (K,)); nothing is copied."""
    return _View([as_records(records)], np.asarray(places, dtype=np.int64))


def mapped(records: Sequence[Record], change: Callable[[Record], Record]) -> Records:
    """Records that pass through a function at every access.

    ``change`` takes a dict that it may alter and returns the one to give out; pure, and of the same
    ``image_id`` and ``tasks``.
    """
    return _View([as_records(records)], change=change)


def indices_with_task(records: Sequence[Record], task: str) -> np.ndarray:
    """Places of the records that can train a task, int64 (K,), ascending."""
    kinds, codes = as_records(records).tasks()
    chosen = [code for code, tasks in enumerate(kinds) if task in tasks]
    return np.flatnonzero(np.isin(codes, chosen))

"""Entity masks in ``.npz`` archives of numpy, which may come from anybody.

What an archive declares is checked before any of it is decompressed: how many members it has, and
type and shape of the arrays that are read. The others are not touched, nothing is unpickled, and
names in the archive never become paths.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from reprlib import repr as short
from typing import IO

import numpy as np

from gella.entities.entity_map import EntityMap
from gella.entities.limits import MAX_ENTITIES
from gella.entities.rle import check_size

MAX_MEMBERS = 64
"""Arrays in one archive; more than three are never needed."""

MAX_ARRAY_BYTES = 4 << 30
"""Of one array, decompressed: 1,000 masks of 4 megapixels."""

_DAMAGED = "truncated or no npz archive; write it again with numpy.savez"
_END = b"PK\x05\x06"  # of a zip file's directory
_END_LENGTH = 22
_LONGEST_ENTRY = 46 + 3 * 65535  # of that directory: fixed part, name, extra field, comment


def load_npz(path: Path, size: tuple[int, int], max_entities: int = MAX_ENTITIES) -> EntityMap:
    """Entities of an image of (H, W) `size` from `masks` (E, H, W) or `ids` (H, W), with `scores`.

    Raises ValueError for what is damaged, of another type or size, or larger than allowed.
    """
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(archive, size, max_entities)
    except (
        *(OSError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error, struct.error),
    ) as error:
        reason = str(error)[:100]  # zipfile quotes bytes of the file
        raise ValueError(f"truncated or damaged ({reason}); write it again") from error


def _load(archive: zipfile.ZipFile, size: tuple[int, int], max_entities: int) -> EntityMap:
    names = {name.removesuffix(".npy") for name in archive.namelist()}
    scores = None
    if "scores" in names:
        shape, kind = _header(archive, "scores", size, max_entities)
        if len(shape) != 1 or kind.kind not in "fiu":
            raise ValueError(f"scores must be numbers (E,), got {kind} {shape}")
        scores = _read(archive, "scores")
    if "masks" in names:
        shape, kind = _header(archive, "masks", size, max_entities)
        if len(shape) != 3 or kind.kind not in "bui":
            raise ValueError(f"masks must be bool (E, H, W), got {kind} {shape}")
        return EntityMap.from_masks(_read(archive, "masks"), scores)
    if "ids" in names:
        shape, kind = _header(archive, "ids", size, max_entities)
        if len(shape) != 2 or kind.kind not in "ui":
            raise ValueError(f"ids must be int32 (H, W), got {kind} {shape}")
        ids = _read(archive, "ids")
        if ids.min() < 0:
            raise ValueError(f"ids holds {int(ids.min())}; ids start at 1, and 0 is void")
        return EntityMap.from_id_image(ids, scores=scores, max_entities=max_entities)
    raise ValueError(f"holds {short(sorted(names))} but neither 'masks' (E, H, W) nor 'ids' (H, W)")


def _check_directory(path: Path) -> None:
    # zipfile makes an object of each entry of the directory before it tells how many there are.
    with open(path, "rb") as stream:
        stream.seek(0, 2)
        length = stream.tell()
        stream.seek(max(0, length - _END_LENGTH - 65535 - 20))  # comment, and the 64-bit locator
        tail = stream.read()
    place = tail.rfind(_END)
    if place < 0 or len(tail) < place + _END_LENGTH:
        raise ValueError(_DAMAGED)
    _, _, _, count, room, _, _ = struct.unpack("<4H2LH", tail[place + 4 : place + _END_LENGTH])
    if tail[max(0, place - 20) :].startswith(b"PK\x06\x07"):
        raise ValueError(f"a 64-bit zip directory; at most {MAX_MEMBERS} arrays are read")
    if count > MAX_MEMBERS or room > MAX_MEMBERS * _LONGEST_ENTRY:
        raise ValueError(f"holds {count} arrays, more than the {MAX_MEMBERS} that are read")


def _header(
    archive: zipfile.ZipFile, name: str, size: tuple[int, int], max_entities: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that an array declares; ValueError unless its bytes are as many as these."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Of the others zipfile cannot bound what one piece expands to.
        raise ValueError(f"{name} is compressed in way {member.compress_type}; numpy's are 0 and 8")
    with archive.open(member) as stream:
        shape, kind, start = _npy_header(stream, name)
    if kind.hasobject:
        raise ValueError(
            f"{name} holds Python objects (a pickle), which are not read; save numbers"
        )
    if len(shape) in (2, 3):
        check_size(shape[-2:], size)
    if len(shape) in (1, 3) and shape[0] > max_entities:
        raise ValueError(f"holds {shape[0]} entities, more than the {max_entities} that are read")
    count = math.prod(shape) * kind.itemsize
    if count > MAX_ARRAY_BYTES:
        raise ValueError(f"{name} {shape} has {count} bytes, more than {MAX_ARRAY_BYTES}")
    if start + count != member.file_size:
        raise ValueError(
            f"{name} {shape} needs {count} bytes but the archive holds {member.file_size - start}; "
            "it is truncated or damaged"
        )
    return shape, kind


def _npy_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, kind = readers[version](stream)
    except (ValueError, KeyError, SyntaxError, RecursionError) as error:
        reason = short(str(error).split("\n")[0])
        raise ValueError(f"{name} is truncated or no array of numpy ({reason})") from error
    return shape, kind, stream.tell()


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)

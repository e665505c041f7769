"""Entity masks of one image from a file: every format of docs/FORMATS.md 5 becomes an `EntityMap`.

A file may come from anybody: what it declares is checked before anything is decoded, nothing in it
is run, no name in it leads out of its folder, and whatever is wrong with it is said in one line
that names the file and the image.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from gella.entities.entity_map import (
    MAX_ENTITIES,
    MAX_PIXELS,
    EntityMap,
    check_count,
    check_pixels,
    id_to_rgb,
    rgb_to_id,
)
from gella.entities.rle import OtherSize, check_size, encode_segmentation, is_finite
from gella.utils.io import few, image_key, read_json, write_atomically

PICTURE_FORMATS = ("panoptic_png", "gray_png", "npz", "npy")  # one file per image
JSON_FORMATS = ("coco_results", "coco_panoptic", "coco_instances")  # many images in one
FORMATS = (*PICTURE_FORMATS, *JSON_FORMATS)
_LISTS = dict(zip(JSON_FORMATS, ("results", "annotations", "annotations")))

MAX_BYTES = 1 << 30
"""Of a mask file on disk: COCO's largest annotation file has half of that. Reading a JSON file may
take 20 times its size."""

MAX_MEMBERS = 64
"""Arrays in one .npz archive; more than three are never needed."""

MAX_ARRAY_BYTES = 4 << 30
"""Of one array, decompressed: 1,000 masks of 4 megapixels."""

_GRAY_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Arrays of an .npz: number of axes, kinds of numbers, what is expected.
_ARRAYS = {
    "masks": (3, "bui", "bool (E, H, W)"),
    "ids": (2, "ui", "int32 (H, W)"),
    "scores": (1, "fiu", "numbers (E,)"),
}


def load_entities(
    file_name: str | Path,
    height: int,
    width: int,
    *,
    format: str = "auto",
    segments_info: Sequence[dict[str, Any]] | None = None,
    image_id: int | str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_entities: int = MAX_ENTITIES,
    max_bytes: int = MAX_BYTES,
) -> EntityMap:
    """Read the entities of one image of height x width pixels.

    Args:
        file_name: the mask file.
        height, width: of the image, pixels.
        format: "panoptic_png" (RGB ids), "gray_png" (8 or 16 bits, or palette indices), "npz"
            (`masks` (E, H, W) or `ids` (H, W), optionally `scores`), "npy" (one of the two),
            "coco_results" (JSON list of all images), "coco_panoptic" (the JSON; its PNGs lie in
            the folder of the same name), "coco_instances" (the JSON; RLE or polygons), or "auto":
            by the suffix and content.
        segments_info: the segments of the image. Crowd segments are no entities: they are left out
            and their pixels become 0. None takes every id but 0. For "coco_results" and
            "coco_instances" they hold the `segmentation` themselves, as read from the JSON, which
            is then only named in errors; None reads them from it.
        image_id: finds the image in the JSON formats, and names it in errors.
        max_pixels: larger images are refused.
        max_entities: more entities are refused.
        max_bytes: larger files are refused before they are read.

    Returns an EntityMap in the image's frame whose ids are those of the file (for masks without
    ids: their place from 1). Masks may overlap, and those without a pixel are counted in the log,
    see `EntityMap.from_codes`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another mode or size, lists other ids than `segments_info`,
            says nothing of the image, holds no entity at all, or more than is allowed.
    """
    path, size = Path(file_name), (int(height), int(width))
    name = path.stem if image_id is None else str(image_id)
    where = f"image {name}, entity file {path}"
    if not path.is_file():
        raise FileNotFoundError(f"image {name}: entity file {path} does not exist; check the path")
    try:
        check_pixels(*size, max_pixels)
        length = path.stat().st_size
        read_here = segments_info is None or format not in ("coco_results", "coco_instances")
        if read_here and length > max_bytes:
            raise ValueError(f"{length} bytes, more than the {max_bytes} that are read")
        entities = _load(path, size, format, segments_info, image_id, max_entities, where)
        if entities.num_entities == 0:
            raise ValueError("no entity at all; give masks with at least one")
    except ValueError as error:
        raise _same_kind(error)(f"{where}: {error}") from error
    return entities


def _same_kind(error: ValueError) -> type[ValueError]:
    return OtherSize if isinstance(error, OtherSize) else ValueError


def _load(
    path: Path,
    size: tuple[int, int],
    format: str,
    segments_info: Sequence[dict[str, Any]] | None,
    image_id: int | str | None,
    max_entities: int,
    where: str,
) -> EntityMap:
    kind, suffix = format, path.suffix.lower()
    if kind == "auto" and suffix in (".npz", ".npy"):
        kind = suffix[1:]
    elif kind == "auto" and suffix == ".json":
        kind = entries_by_image(path)[0]
    elif kind == "auto" and suffix == ".png":
        kind = "gray_png" if _open_png(path, size)[1] in _GRAY_MODES else "panoptic_png"
    elif kind == "auto":
        raise ValueError(
            f"the suffix {short(suffix)} names no known format; use .png, .npz, .npy or .json"
        )
    if kind in ("panoptic_png", "gray_png"):
        return _from_png(path, size, segments_info, max_entities, kind)
    if kind == "npz":
        return _from_npz(path, size, max_entities, where)
    if kind == "npy":
        with damage_told():
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        name = "ids" if array.ndim == 2 else "masks"
        _check_array(name, array.shape, array.dtype, size, max_entities)
        if name == "masks":
            return EntityMap.from_masks(array, where=where)
        return EntityMap.from_id_image(array, max_entities=max_entities)
    if kind == "coco_panoptic":
        picture, segments = panoptic_annotation(path, _entries_of(path, format, image_id)[0])
        if not picture.is_file():
            raise ValueError(f"its picture {picture} does not exist; unpack it beside the JSON")
        return _from_png(picture, size, segments, max_entities, "panoptic_png")
    if kind in JSON_FORMATS:
        if segments_info is None:
            segments_info = _entries_of(path, format, image_id)
        scored = kind == "coco_results"
        return _from_segmentations(segments_info, size, max_entities, where, scored=scored)
    raise ValueError(f"unknown format {format!r}; known: auto, {', '.join(FORMATS)}")


# -- PNGs of ids -----------------------------------------------------------------------------------


def read_id_png(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Ids of a PNG: int32 (H, W), read-only.

    Of a grey (1, 8 or 16 bits) or palette file the values are the ids, and others hold
    ``R + 256 G + 65536 B`` (docs/FORMATS.md 1); transparency is passed over.

    Args:
        path: the file. One that is asked for twice in a row is decoded once.
        size: (H, W) that it has to have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, damaged, or of another size; the message does not name it.
    """
    return _open_png(Path(path), size)[0]


def write_id_png(path: str | Path, ids: np.ndarray) -> None:
    """Write ids, integers (H, W) in 0..2^24 - 1, as a panoptic PNG, whole; makes the folder."""
    picture = Image.fromarray(id_to_rgb(ids))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda stream: picture.save(stream, format="PNG"))


def _open_png(path: Path, size: tuple[int, int] | None) -> tuple[np.ndarray, str]:
    """Ids and Pillow's mode."""
    status = path.stat()
    return _decoded(str(path), status.st_mtime_ns, status.st_size, size)


@lru_cache(maxsize=1)
def _decoded(
    path: str, changed: int, length: int, size: tuple[int, int] | None
) -> tuple[np.ndarray, str]:
    data = Path(path).read_bytes()
    with damage_told(), Image.open(io.BytesIO(data)) as picture:
        kind, mode, sides = picture.format, picture.mode, (picture.height, picture.width)
        frames = getattr(picture, "n_frames", 1)
        picture.verify()  # the check sums, which Pillow does not look at when it decodes
        if kind == "PNG" and _PNG_END not in data:
            raise ValueError(f"ends after {len(data)} bytes")
    if kind != "PNG":
        raise ValueError(f"a {kind} picture; ids need a PNG, which loses nothing")
    if size is not None:
        check_size(sides, size)
    check_pixels(*sides)
    if frames != 1:
        raise ValueError(f"{frames} frames; ids are one picture")
    depth = data[24]  # of the header; Pillow cuts deeper colours to 8 bits unasked
    if mode not in _GRAY_MODES and (depth != 8 or mode not in ("RGB", "RGBA")):
        raise ValueError(
            f"{depth} bits per colour in mode {mode}; ids are RGB with 8, grey with 8 or 16"
        )
    with damage_told():
        if mode in _GRAY_MODES:
            with Image.open(io.BytesIO(data)) as picture:
                ids = np.asarray(picture).astype(np.int32)
        else:
            # Importing it takes 2 s and 170 MiB: not before a mask is read.
            from torchvision.io import ImageReadMode, decode_png

            # torchvision's libpng takes a fifth less time than Pillow, and not Python's lock. torch
            # reads bytes without a copy but wants memory that may be written to.
            stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            ids = rgb_to_id(decode_png(stream, ImageReadMode.RGB).permute(1, 2, 0).numpy())
            if mode == "RGBA":
                with Image.open(io.BytesIO(data)) as picture:
                    low, high = picture.getchannel("A").getextrema()
                mode = "RGB" if low == high else mode  # a constant says nothing
    ids.flags.writeable = False
    return ids, mode


@contextmanager
def damage_told(what: str = "") -> Iterator[None]:
    """ValueError in place of the many types by which Pillow, zipfile and others report damage.

    Args:
        what: stands before the reason, for instance "image x.png is ".
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{what}no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{what}too large to open safely, more than {MAX_PIXELS} pixels ({error})"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise ValueError(f"{what}truncated or damaged ({reason}); copy it again") from error


def _from_png(
    path: Path, size: tuple[int, int], segments_info: Any, max_entities: int, kind: str
) -> EntityMap:
    ids, mode = _open_png(path, size)
    if mode not in (("RGB",) if kind == "panoptic_png" else _GRAY_MODES):
        wanted = "RGB" if kind == "panoptic_png" else "grey (8 or 16 bits) or palette"
        raise ValueError(f"picture mode is {mode}, expected {wanted}")
    if segments_info is None:
        return EntityMap.from_id_image(ids, max_entities=max_entities)
    segments = _checked_segments(segments_info)
    listed = [number for number, _, _ in segments]
    if any(number <= 0 for number in listed):
        raise ValueError(f"segments_info lists id {min(listed)}; ids start at 1, and 0 is void")
    entities = EntityMap.from_id_image(ids, listed, max_entities=max_entities)
    absent = [i for i, area in zip(listed, entities.areas()) if area == 0]
    if absent:
        raise ValueError(f"segments_info lists {absent[:5]} but no pixel of the PNG has these ids")
    unlisted = (entities.ids == 0) & (ids != 0)
    if unlisted.any():
        extra = [int(i) for i in np.unique(ids[unlisted])]
        raise ValueError(f"pixels have ids {extra[:5]} that segments_info does not list")
    uncrowded = [number for number, crowd, _ in segments if not crowd]
    return entities if uncrowded == listed else EntityMap.from_id_image(ids, uncrowded)


# -- archives of numpy -----------------------------------------------------------------------------


def _from_npz(path: Path, size: tuple[int, int], max_entities: int, where: str) -> EntityMap:
    """From `masks` (E, H, W) or `ids` (H, W), with `scores`; other arrays are not touched."""
    _check_directory(path)
    with damage_told():
        archive = zipfile.ZipFile(path)
    with archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        arrays = {
            name: _array(archive, name, size, max_entities)
            for name in ("scores", "masks" if "masks" in names else "ids")
            if name in names
        }
    scores = arrays.get("scores")
    if "masks" in arrays:
        return EntityMap.from_masks(arrays["masks"], scores, where=where)
    if "ids" in arrays:
        if arrays["ids"].min() < 0:
            raise ValueError(f"ids holds {arrays['ids'].min()}; ids start at 1, and 0 is void")
        return EntityMap.from_id_image(arrays["ids"], scores=scores, max_entities=max_entities)
    raise ValueError(f"holds {short(sorted(names))} but neither 'masks' (E, H, W) nor 'ids' (H, W)")


def _check_directory(path: Path) -> None:
    # zipfile makes an object of each entry of the directory before it tells how many there are.
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - (22 + 65535 + 20)))  # record, comment, locator
        tail = stream.read()
    record = tail.rfind(b"PK\x05\x06")
    if record < 0 or len(tail) < record + 22:
        raise ValueError("truncated or no npz archive; write it again with numpy.savez")
    count, room = struct.unpack_from("<HI", tail, record + 10)
    if b"PK\x06\x07" in tail[max(0, record - 20) : record]:
        raise ValueError(f"a 64-bit zip directory; at most {MAX_MEMBERS} arrays are read")
    if count > MAX_MEMBERS or room > MAX_MEMBERS * (46 + 3 * 65535):  # the longest entries
        raise ValueError(f"holds {count} arrays, more than the {MAX_MEMBERS} that are read")


def _array(
    archive: zipfile.ZipFile, name: str, size: tuple[int, int], max_entities: int
) -> np.ndarray:
    """An array, read only if type and shape that it declares are expected, and so are its bytes."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Of the others zipfile cannot bound what one piece expands to.
        raise ValueError(f"{name} is compressed in way {member.compress_type}; numpy's are 0 and 8")
    with damage_told(), archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, _, kind = header(stream)
        room = member.file_size - stream.tell()
    if kind.hasobject:
        raise ValueError(
            f"{name} holds Python objects (a pickle), which are not read; save numbers"
        )
    count = _check_array(name, shape, kind, size, max_entities)
    if count != room:
        raise ValueError(
            f"{name} {shape} needs {count} bytes but the archive holds {room}; it is truncated or "
            "damaged"
        )
    with damage_told(), archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_array(
    name: str, shape: tuple[int, ...], kind: np.dtype, size: tuple[int, int], max_entities: int
) -> int:
    """Its bytes; ValueError if type and shape that it declares are not expected."""
    axes, kinds, expected = _ARRAYS[name]
    if len(shape) != axes or kind.kind not in kinds:
        raise ValueError(f"{name} must be {expected}, got {kind} {shape}")
    if axes > 1:
        check_size(shape[-2:], size)
    if axes != 2:
        check_count(shape[0], max_entities)
    count = math.prod(shape) * kind.itemsize
    if count > MAX_ARRAY_BYTES:
        raise ValueError(f"{name} {shape} has {count} bytes, more than {MAX_ARRAY_BYTES}")
    return count


# -- JSON files of many images ---------------------------------------------------------------------


def entries_by_image(path: Path, kind: str = "auto") -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Format of a file, one of `JSON_FORMATS`, and its results or annotations by image id.

    Ids become `image_key`, since files use several forms. Do not change what is returned: it is
    kept, and read again only after the file has changed.

    Args:
        path: the file.
        kind: its format; "auto": by its content.

    Raises ValueError for a file that is cut off, of another form, or without image ids.
    """
    status = path.stat()  # with time and size as parts of the key, a rewritten file is read again
    return _entries(str(path), status.st_mtime_ns, status.st_size, kind)


def forget_files() -> None:
    """Let go of the JSON files that were read last, for they may be large."""
    _entries.cache_clear()


def panoptic_annotation(panoptic_json: Path, annotation: dict[str, Any]) -> tuple[Path, Any]:
    """The PNG, in the folder of the JSON's name, and the segments of an annotation.

    Raises ValueError where it has neither, or names a file that leads out of that folder.
    """
    for key in ("file_name", "segments_info"):
        if key not in annotation:
            raise ValueError(f"the image's annotation has no '{key}'")
    name = annotation["file_name"]
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(f"file_name {short(name)} is no name in the folder beside the JSON")
    return panoptic_json.with_suffix("") / name, annotation["segments_info"]


@lru_cache(maxsize=2)
def _entries(
    path: str, changed: int, length: int, kind: str
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    content = read_json(path, advice="it may be cut off")
    listed = content.get("annotations") if isinstance(content, dict) else None
    if kind == "auto":
        first = listed[0] if isinstance(listed, list) and listed else {}
        outlines = isinstance(first, dict) and "segmentation" in first
        kind = "coco_instances" if outlines else "coco_panoptic"
        kind = "coco_results" if isinstance(content, list) else kind
    key = _LISTS[kind]
    entries = content if kind == "coco_results" else listed
    if not isinstance(entries, list):
        raise ValueError(f"expected a list of {key}, found {type(content).__name__}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("image_id")) not in (int, str):
            raise ValueError(f"entry {number} of {key} has no image_id that is a number or text")
        groups.setdefault(image_key(entry["image_id"]), []).append(entry)
    if kind == "coco_panoptic":
        twice = next((i for i, group in groups.items() if len(group) > 1), None)
        if twice is not None:
            raise ValueError(f"image {twice} has {len(groups[twice])} annotations; keep one")
    return kind, groups


def _entries_of(path: Path, kind: str, image_id: int | str | None) -> list[dict[str, Any]]:
    if image_id is None:
        raise ValueError("a file of many images needs image_id; give the image's id")
    kind, groups = entries_by_image(path, kind)
    if image_key(image_id) not in groups:
        raise ValueError(
            f"no {_LISTS[kind]} for this image (the file covers {len(groups)} others: "
            f"{few(groups)}); make its masks or choose the file of this dataset"
        )
    return groups[image_key(image_id)]


def _checked_segments(segments_info: Any) -> list[tuple[int, bool, dict[str, Any]]]:
    """(id, is crowd, segment) of each entry; ValueError names the entry that is malformed."""
    if not isinstance(segments_info, (list, tuple)):
        raise ValueError(f"segments_info is a {type(segments_info).__name__}, not a list")
    checked = []
    for index, segment in enumerate(segments_info):
        if not isinstance(segment, dict) or "id" not in segment:
            raise ValueError(f"entry {index} of segments_info has no 'id'")
        number = segment["id"]
        whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        text = isinstance(number, str) and number.isascii() and number.isdigit()
        if not (whole or (text and len(number) < 20)) or not -(1 << 63) <= int(number) < 1 << 63:
            raise ValueError(
                f"id of entry {index} of segments_info is {short(number)}; ids are whole numbers "
                "of at most 63 bits"
            )
        crowd = segment.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise ValueError(f"segment {int(number)}: iscrowd is {short(crowd)}, not 0 or 1")
        checked.append((int(number), bool(crowd), segment))
    return checked


def _from_segmentations(
    entries: Sequence[dict[str, Any]],
    size: tuple[int, int],
    max_entities: int,
    where: str,
    *,
    scored: bool,
) -> EntityMap:
    """Entities of one image from results (`scored`), or from segments, whose crowd is left out."""
    if scored:
        named = [(k, f"result {k - 1} of the image", e) for k, e in enumerate(entries, start=1)]
    else:
        checked = _checked_segments(entries)
        named = [(i, f"segment {i}", entry) for i, crowd, entry in checked if not crowd]
    check_count(len(named), max_entities)
    codes, scores = [], []
    for _, name, entry in named:
        score = entry.get("score", 1.0) if scored else 1.0
        try:
            if "segmentation" not in entry:
                raise ValueError("'segmentation' is missing")
            # In float32, which holds no more than 3.4e38.
            if type(score) not in (int, float) or not is_finite(score) or abs(score) > 3.4e38:
                raise ValueError(f"score is {short(score)}, not a finite number")
            codes.append(encode_segmentation(entry["segmentation"], size))
        except ValueError as error:
            raise _same_kind(error)(f"{name}: {error}") from error
        scores.append(score)
    return EntityMap.from_codes(size, codes, scores, [number for number, _, _ in named], where)

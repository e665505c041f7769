"""Entity masks of one image from a file: every format of docs/FORMATS.md 5 becomes an `EntityMap`.

Whatever is wrong with a file is said in one line that names the file and the image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from gella.entities.entity_map import EntityMap, rgb_to_id
from gella.entities.json_files import (
    JSON_FORMATS,
    check_size,
    checked_segments,
    entries_of,
    from_results,
    from_segments,
    json_format,
)
from gella.entities.limits import MAX_BYTES, MAX_ENTITIES, MAX_PIXELS, check_pixels
from gella.entities.npz import load_npz

PICTURE_FORMATS = ("panoptic_png", "gray_png", "npz")  # one file per image
FORMATS = (*PICTURE_FORMATS, *JSON_FORMATS)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = 33  # bytes of a PNG up to the end of its first chunk: sizes and type of the pixels
_GRAY_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


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

    The file may come from anybody: what it declares is checked before anything is decoded, nothing
    in it is run, and no name in it leads out of its folder.

    Args:
        file_name: the mask file.
        height: of the image, pixels.
        width: of the image, pixels.
        format: "panoptic_png" (RGB ids), "gray_png" (8 or 16 bits, or palette indices), "npz"
            (`masks` (E, H, W) or `ids` (H, W), optionally `scores`), "coco_results" (JSON list of
            all images), "coco_panoptic" (the JSON; its PNGs lie in the folder of the same name),
            "coco_instances" (the JSON; RLE or polygons), or "auto": by the suffix and content.
        segments_info: the segments of the image. Crowd segments are no entities: they are left out
            and their pixels become 0. None takes every id but 0. For "coco_results" and
            "coco_instances" they hold the `segmentation` themselves, as read from the JSON, which
            is then only named in errors; None reads them from it.
        image_id: finds the image in the JSON formats, and names it in errors.
        max_pixels: larger images are refused.
        max_entities: more entities are refused.
        max_bytes: larger files are refused before they are read.

    Returns an EntityMap in the image's frame whose ids are those of the file (for masks without
    ids: their place from 1). Masks that overlap are flattened, see `EntityMap.from_masks`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another mode or size, lists other ids than `segments_info`,
            says nothing of the image, holds no entity at all, or more than is allowed.
    """
    path = Path(file_name)
    name = path.stem if image_id is None else str(image_id)
    if not path.is_file():
        raise FileNotFoundError(f"image {name}: entity file {path} does not exist; check the path")
    size = (int(height), int(width))
    try:
        check_pixels(*size, max_pixels)
        listed = segments_info is not None and format in ("coco_results", "coco_instances")
        if not listed:
            _check_length(path, max_bytes)
        entities = _load(path, size, format, segments_info, image_id, max_entities)
    except ValueError as error:
        raise ValueError(f"image {name}, entity file {path}: {error}") from error
    if entities.num_entities == 0:
        raise ValueError(
            f"image {name}, entity file {path}: no entity at all; give masks with at least one"
        )
    return entities


def _check_length(path: Path, max_bytes: int) -> None:
    length = path.stat().st_size
    if length > max_bytes:
        raise ValueError(f"{length} bytes, more than the {max_bytes} that are read")


def _load(
    path: Path,
    size: tuple[int, int],
    format: str,
    segments_info: Sequence[dict[str, Any]] | None,
    image_id: int | str | None,
    max_entities: int,
) -> EntityMap:
    kind = _detect(path, size) if format == "auto" else format
    if kind in ("panoptic_png", "gray_png"):
        rgb = kind == "panoptic_png"
        return _from_png(path, size, segments_info, max_entities, rgb=rgb)
    if kind == "npz":
        return load_npz(path, size, max_entities)
    if kind == "coco_panoptic":
        annotation = entries_of(path, kind, image_id)[0]
        for key in ("file_name", "segments_info"):
            if key not in annotation:
                raise ValueError(f"the image's annotation has no '{key}'")
        picture = panoptic_picture(path, annotation["file_name"])
        if not picture.is_file():
            raise ValueError(f"its picture {picture} does not exist; unpack it beside the JSON")
        return _from_png(picture, size, annotation["segments_info"], max_entities, rgb=True)
    if kind in JSON_FORMATS:
        read = from_results if kind == "coco_results" else from_segments
        given = entries_of(path, kind, image_id) if segments_info is None else segments_info
        return read(given, size, max_entities)
    raise ValueError(f"unknown format {format!r}; known: auto, {', '.join(FORMATS)}")


def panoptic_picture(panoptic_json: Path, file_name: Any) -> Path:
    """The PNG that an annotation of a panoptic JSON names: in the folder of the JSON's name.

    Raises ValueError for a name that is no text, or leads out of that folder.
    """
    parts = Path(file_name).parts if isinstance(file_name, str) else ()
    if not parts or Path(file_name).is_absolute() or ".." in parts or "\0" in file_name:
        raise ValueError(f"file_name {short(file_name)} is no name in the folder beside the JSON")
    return panoptic_json.with_suffix("") / file_name


def _detect(path: Path, size: tuple[int, int]) -> str:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return "npz"
    if suffix == ".json":
        return json_format(path)
    if suffix == ".png":
        return "gray_png" if _open_png(path, size)[1] in _GRAY_MODES else "panoptic_png"
    raise ValueError(f"the suffix {short(suffix)} names no known format; use .png, .npz or .json")


def _open_png(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Pixels and Pillow's mode. A file that is asked for twice in a row is decoded once."""
    try:
        status = path.stat()
        return _decoded(str(path), status.st_mtime_ns, status.st_size, size)
    except UnidentifiedImageError as error:
        raise ValueError("no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large to open safely ({error})") from error
    except (OSError, SyntaxError, EOFError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"truncated or damaged ({error}); copy it again") from error


@lru_cache(maxsize=1)
def _decoded(path: str, changed: int, length: int, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    with open(path, "rb") as file:
        data = file.read(_HEADER)
        if data.startswith(_SIGNATURE):
            data += file.read()
            _check_chunks(data)
            width, height = struct.unpack(">2I", data[16:24])
            check_size((height, width), size)
        file.seek(0)
        with Image.open(file) as picture:
            if picture.format != "PNG":
                raise ValueError(f"a {picture.format} picture; ids need a PNG, which loses nothing")
            frames = getattr(picture, "n_frames", 1)
            if frames != 1:
                raise ValueError(f"{frames} frames; ids are one picture")
            depth = data[24]  # of the header; Pillow cuts deeper colours to 8 bits unasked
            if depth != 8 and picture.mode not in _GRAY_MODES:
                raise ValueError(f"{depth} bits per colour; ids are RGB with 8, grey with 8 or 16")
            pixels = np.asarray(picture)
            pixels.flags.writeable = False
            return pixels, picture.mode


def _check_chunks(data: bytes) -> None:
    """ValueError if a PNG is cut or was changed: Pillow does not look at the pixels' check sums."""
    place = len(_SIGNATURE)
    while True:
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length
        if end > len(data):
            raise ValueError(f"truncated after {len(data)} bytes; copy it again")
        kind = data[place + 4 : place + 8]
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError(f"damaged (check sum of a {kind!r} chunk); copy it again")
        if kind == b"IEND":
            return
        place = end


def _from_png(
    path: Path, size: tuple[int, int], segments_info: Any, max_entities: int, *, rgb: bool
) -> EntityMap:
    pixels, mode = _open_png(path, size)
    wanted = ("RGB",) if rgb else _GRAY_MODES
    if mode not in wanted:
        kind = "RGB" if rgb else "grey (8 or 16 bits) or palette"
        raise ValueError(f"picture mode is {mode}, expected {kind}")
    ids = rgb_to_id(pixels) if rgb else pixels.astype(np.int32)
    if segments_info is None:
        return EntityMap.from_id_image(ids, max_entities=max_entities)
    segments = checked_segments(segments_info)
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
    own = [number for number, crowd, _ in segments if not crowd]
    return entities if own == listed else EntityMap.from_id_image(ids, own)

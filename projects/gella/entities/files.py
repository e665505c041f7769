"""Entity masks of one image from a file: every format of docs/FORMATS.md 5 becomes an `EntityMap`.

Whatever is wrong with a file is said in one line that names the file and the image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_png

from gella.entities.entity_map import EntityMap, id_to_rgb, rgb_to_id
from gella.entities.json_files import (
    JSON_FORMATS,
    checked_segments,
    entries_of,
    from_results,
    from_segments,
    json_format,
)
from gella.entities.limits import MAX_BYTES, MAX_ENTITIES, MAX_PIXELS, check_pixels
from gella.entities.npz import load_npz
from gella.entities.rle import check_size
from gella.utils.io import write_atomically

PICTURE_FORMATS = ("panoptic_png", "gray_png", "npz")  # one file per image
FORMATS = (*PICTURE_FORMATS, *JSON_FORMATS)
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
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


def read_id_png(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Ids of a PNG: int32 (H, W), read-only. The one reader of them.

    Of a grey (1, 8 or 16 bits) or palette file the values are the ids, and others hold
    ``R + 256 G + 65536 B`` (docs/FORMATS.md 1); transparency is passed over.

    Args:
        path: the file. One that is asked for twice in a row is decoded once.
        size: (H, W) that it has to have; checked, like all that it declares, before it is decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, damaged, or of another size; the message does not name it.
    """
    return _open_png(Path(path), size)[0]


def write_id_png(path: str | Path, ids: np.ndarray) -> None:
    """Write ids, integers (H, W) in 0..2^24 - 1, as the RGB of a panoptic PNG, whole or not at all.

    The folder is made.
    """
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
    with _damage_told(), Image.open(io.BytesIO(data)) as picture:
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
    with _damage_told():
        if mode in _GRAY_MODES:
            with Image.open(io.BytesIO(data)) as picture:
                ids = np.asarray(picture).astype(np.int32)
        else:
            # torchvision's libpng takes a fifth less time than Pillow, and not Python's lock. torch
            # reads bytes without a copy but wants memory that may be written to.
            stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            ids = rgb_to_id(decode_png(stream, ImageReadMode.RGB).permute(1, 2, 0).numpy())
    ids.flags.writeable = False
    return ids, mode


@contextmanager
def _damage_told() -> Iterator[None]:
    # Pillow reports damaged data by errors of many types, and torchvision by RuntimeError.
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError("no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large to open safely ({error})") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"truncated or damaged ({reason}); copy it again") from error


def _from_png(
    path: Path, size: tuple[int, int], segments_info: Any, max_entities: int, *, rgb: bool
) -> EntityMap:
    ids, mode = _open_png(path, size)
    wanted = ("RGB",) if rgb else _GRAY_MODES
    if mode not in wanted:
        kind = "RGB" if rgb else "grey (8 or 16 bits) or palette"
        raise ValueError(f"picture mode is {mode}, expected {kind}")
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

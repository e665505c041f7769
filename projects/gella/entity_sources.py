"""Entity masks from files: every format of FORMATS section 5 becomes an `EntityMap`.

Whatever is wrong with a file is said in one line that names the file and the image.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from gella.entities import EntityMap, rgb_to_id

FORMATS = ("panoptic_png", "gray_png", "npz", "coco_results", "coco_panoptic", "coco_instances")
_GRAY_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def load_from_record(record: dict[str, Any]) -> EntityMap:
    """Entities of a dataset dict, as its `entities` key describes them.

    Args:
        record: `entities` holds `file_name`, optionally `format` and `segments_info`; `height`,
            `width` and `image_id` are those of the image.

    Raises what `load_entities` raises, and KeyError when the record has no `entities`.
    """
    source = record.get("entities")
    if not source or "file_name" not in source:
        raise KeyError(
            f"image {record.get('image_id')}: the record has no entities with a file_name; every "
            "image needs masks"
        )
    return load_entities(
        source["file_name"],
        record["height"],
        record["width"],
        format=source.get("format", "auto"),
        segments_info=source.get("segments_info"),
        image_id=record.get("image_id"),
    )


def load_entities(
    file_name: str | Path,
    height: int,
    width: int,
    *,
    format: str = "auto",
    segments_info: Sequence[dict[str, Any]] | None = None,
    image_id: int | str | None = None,
) -> EntityMap:
    """Read the entities of one image of height x width pixels.

    Args:
        file_name: the mask file.
        height: of the image, pixels.
        width: of the image, pixels.
        format: "panoptic_png" (RGB ids), "gray_png" (8 or 16 bits, or palette indices), "npz"
            (`masks` (E, H, W) or `ids` (H, W), optionally `scores`), "coco_results" (JSON list of
            all images), "coco_panoptic" (the JSON; its PNGs lie in the folder of the same name),
            "coco_instances" (`segments_info` holds a COCO `segmentation` each, as read from an
            instance JSON; the file is only named in errors), or "auto": by the suffix and content.
        segments_info: the segments of the image. Crowd segments are no entities: they are left out
            and their pixels become 0. None takes every id but 0.
        image_id: finds the image in the JSON formats, and names it in errors.

    Returns an EntityMap in the image's frame whose ids are those of the file (for masks without
    ids: their place from 1). Masks that overlap are flattened, see `EntityMap.from_masks`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another mode or size, lists other ids than `segments_info`,
            says nothing of the image, or holds no entity at all.
    """
    path = Path(file_name)
    name = path.stem if image_id is None else str(image_id)
    if not path.is_file():
        raise FileNotFoundError(f"image {name}: entity file {path} does not exist; check the path")
    size = (int(height), int(width))
    try:
        kind = _detect(path) if format == "auto" else format
        if kind in ("panoptic_png", "gray_png"):
            entities = _from_png(path, size, segments_info, rgb=kind == "panoptic_png")
        elif kind == "npz":
            entities = _from_npz(path, size)
        elif kind == "coco_results":
            entities = _from_results(path, size, image_id)
        elif kind == "coco_instances":
            entities = _from_segments(size, segments_info)
        elif kind == "coco_panoptic":
            entities = _from_panoptic_json(path, size, image_id)
        else:
            raise ValueError(f"unknown format {format!r}; known: auto, {', '.join(FORMATS)}")
    except ValueError as error:
        raise ValueError(f"image {name}, entity file {path}: {error}") from error
    if entities.num_entities == 0:
        raise ValueError(
            f"image {name}, entity file {path}: no entity at all; give masks with at least one"
        )
    return entities


def _detect(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return "npz"
    if suffix == ".json":
        return "coco_results" if isinstance(_read_json(*_stamp(path)), list) else "coco_panoptic"
    if suffix == ".png":
        return "gray_png" if _open_png(path).mode in _GRAY_MODES else "panoptic_png"
    raise ValueError(f"the suffix {suffix!r} names no known format; use .png, .npz or .json")


def _open_png(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError as error:
        raise ValueError("no picture that Pillow can read") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"truncated or damaged ({error}); copy it again") from error


def _check_size(found: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(found) != size:
        raise ValueError(
            f"masks are {found[1]}x{found[0]} pixels but the image is {size[1]}x{size[0]} (width x "
            "height); give masks of the image's size"
        )


def _from_png(
    path: Path,
    size: tuple[int, int],
    segments_info: Sequence[dict[str, Any]] | None,
    *,
    rgb: bool,
) -> EntityMap:
    picture = _open_png(path)
    wanted = ("RGB",) if rgb else _GRAY_MODES
    if picture.mode not in wanted:
        kind = "RGB" if rgb else "grey (8 or 16 bits) or palette"
        raise ValueError(f"picture mode is {picture.mode}, expected {kind}")
    pixels = np.asarray(picture)
    ids = rgb_to_id(pixels) if rgb else pixels.astype(np.int32)
    _check_size(ids.shape, size)
    if segments_info is None:
        return EntityMap.from_id_image(ids)
    listed = [int(segment["id"]) for segment in segments_info]
    things = [int(s["id"]) for s in segments_info if not s.get("iscrowd", 0)]
    entities = EntityMap.from_id_image(ids, listed)
    absent = [i for i, area in zip(listed, entities.areas()) if area == 0]
    if absent:
        raise ValueError(f"segments_info lists {absent[:5]} but no pixel of the PNG has these ids")
    unlisted = (entities.ids == 0) & (ids != 0)
    if unlisted.any():
        extra = [int(i) for i in np.unique(ids[unlisted])]
        raise ValueError(f"pixels have ids {extra[:5]} that segments_info does not list")
    return entities if things == listed else EntityMap.from_id_image(ids, things)


def _from_npz(path: Path, size: tuple[int, int]) -> EntityMap:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"truncated or damaged ({error}); write it again") from error
    scores = arrays.get("scores")
    if "masks" in arrays:
        masks = arrays["masks"]
        if masks.ndim != 3 or masks.dtype.kind not in "bui":
            raise ValueError(f"masks must be bool (E, H, W), got {masks.dtype} {masks.shape}")
        _check_size(masks.shape[1:], size)
        return EntityMap.from_masks(masks, scores)
    if "ids" in arrays:
        ids = arrays["ids"]
        if ids.ndim != 2 or ids.dtype.kind not in "ui":
            raise ValueError(f"ids must be int32 (H, W), got {ids.dtype} {ids.shape}")
        _check_size(ids.shape, size)
        return EntityMap.from_id_image(ids, scores=scores)
    raise ValueError(f"holds {sorted(arrays)} but neither 'masks' (E, H, W) nor 'ids' (H, W)")


def _stamp(path: Path) -> tuple[str, int]:
    # With the time of change as part of the key, a rewritten file is read again.
    return str(path), path.stat().st_mtime_ns


@lru_cache(maxsize=4)
def _read_json(path: str, changed: int) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"no valid JSON ({error}); it may be cut off") from error


@lru_cache(maxsize=4)
def _grouped(path: str, changed: int, key: str) -> dict[str, list[dict[str, Any]]]:
    """Entries of a JSON file by image id; ids are compared as text, since files use both forms."""
    content = _read_json(path, changed)
    entries = content.get(key) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError(f"expected a list of {key}, found {type(entries).__name__}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise ValueError(f"entry {place} of {key} has no image_id")
        groups.setdefault(str(entry["image_id"]), []).append(entry)
    return groups


def _entries_of(path: Path, key: str, image_id: int | str | None) -> list[dict[str, Any]]:
    if image_id is None:
        raise ValueError("a file of many images needs image_id; give the image's id")
    groups = _grouped(*_stamp(path), key)
    if str(image_id) not in groups:
        raise ValueError(
            f"no {key} for this image (the file covers {len(groups)} others); make its masks or "
            "choose the file of this dataset"
        )
    return groups[str(image_id)]


def _from_results(path: Path, size: tuple[int, int], image_id: int | str | None) -> EntityMap:
    entries = _entries_of(path, "results", image_id)
    masks = np.zeros((len(entries), *size), dtype=bool)
    for place, entry in enumerate(entries):
        try:
            masks[place] = _decode(entry["segmentation"], size)
        except KeyError as error:
            raise ValueError(f"result {place} of the image lacks {error}") from error
        except ValueError as error:
            raise ValueError(f"result {place} of the image: {error}") from error
    scores = [float(entry.get("score", 1.0)) for entry in entries]
    return EntityMap.from_masks(masks, scores)


def _decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Mask (H, W) of a COCO segmentation: compressed or plain run lengths, or a list of parts.

    Parts are polygons or run lengths; where they overlap is inside.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        polygons = [part for part in segmentation if not isinstance(part, dict)]
        parts = [_decode(part, size) for part in segmentation if isinstance(part, dict)]
        try:
            codes = coco_mask.frPyObjects(polygons, *size) if polygons else []
        except Exception as error:  # pycocotools raises bare Exception for malformed polygons
            raise ValueError(f"polygons cannot be read ({error})") from error
        parts += [coco_mask.decode(code).astype(bool) for code in codes]
        return np.logical_or.reduce(parts) if parts else np.zeros(size, dtype=bool)
    if not isinstance(segmentation, dict):
        raise ValueError(f"segmentation is a {type(segmentation).__name__}, not RLE or polygons")
    _check_size(tuple(segmentation["size"]), size)
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != size[0] * size[1]:
            raise ValueError(f"runs cover {sum(counts)} of {size[0] * size[1]} pixels")
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(segmentation).astype(bool)


def _from_segments(
    size: tuple[int, int], segments_info: Sequence[dict[str, Any]] | None
) -> EntityMap:
    if segments_info is None:
        raise ValueError("format coco_instances needs segments_info with a segmentation each")
    own = [segment for segment in segments_info if not segment.get("iscrowd", 0)]
    masks = np.zeros((len(own), *size), dtype=bool)
    for mask, segment in zip(masks, own):
        try:
            mask[:] = _decode(segment["segmentation"], size)
        except KeyError as error:
            raise ValueError(f"segment {segment.get('id')} lacks {error}") from error
        except ValueError as error:
            raise ValueError(f"segment {segment['id']}: {error}") from error
    return EntityMap.from_masks(masks, segment_ids=[int(segment["id"]) for segment in own])


def _from_panoptic_json(path: Path, size: tuple[int, int], image_id: int | str | None) -> EntityMap:
    annotation = _entries_of(path, "annotations", image_id)[0]
    picture = path.with_suffix("") / annotation["file_name"]
    if not picture.is_file():
        raise ValueError(f"its picture {picture} does not exist; unpack it beside the JSON")
    return _from_png(picture, size, annotation["segments_info"], rgb=True)

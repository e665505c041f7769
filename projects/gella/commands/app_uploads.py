"""Files from strangers: bounded before they are decoded, read by the library, never named by path.

Every message says what is wrong and what is allowed, and none of them names a folder of the server.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from gella.captions.text import AnswerError
from gella.entities.entity_map import EntityMap
from gella.entities.json_files import entries_by_image, forget_files, json_format
from gella.entities.sources import load_entities
from gella.entities.view import read_image
from gella.predictor.scene import image_id_of

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MASK_SUFFIXES = (".png", ".npz", ".json")
MAX_MEMBERS = 16  # of an .npz; the formats know three
BYTES_PER_PIXEL = 32  # that an .npz may unpack to, for each pixel that a picture may have


@dataclass(frozen=True)
class Limits:
    """What a visitor may send.

    Attributes:
        max_upload: bytes of one file.
        max_pixels: of a picture, width times height.
        max_caption: characters of a caption, an expression or a list of nouns or categories.
        max_entities: masks of one picture.
        max_phrases: nouns of one caption, and categories.
    """

    max_upload: int = 20_000_000
    max_pixels: int = 16_000_000
    max_caption: int = 2000
    max_entities: int = 1000
    max_phrases: int = 200

    def check_text(self, what: str, text: str | None) -> str:
        """The text without blanks around it; ValueError for an empty or too long one."""
        text = (text or "").strip()
        if not text:
            raise ValueError(f"The {what} is empty: write one that names what to find.")
        if len(text) > self.max_caption:
            raise ValueError(
                f"The {what} has {len(text):,} characters; at most {self.max_caption:,} are "
                "allowed."
            )
        return text

    def split(self, what: str, text: str | None) -> list[str]:
        """The parts of a list, separated by commas, semicolons or lines; empty for no text.

        Raises ValueError for a text or a list that is too long.
        """
        if not (text or "").strip():
            return []
        text = self.check_text(f"list of {what}", text)
        parts = [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]
        if len(parts) > self.max_phrases:
            raise ValueError(
                f"There are {len(parts)} {what}; at most {self.max_phrases} are allowed."
            )
        return parts


def check_picture(path: Path, limits: Limits) -> tuple[int, int]:
    """Look at a picture's header only; return (width, height).

    Raises ValueError: it is no picture of `PICTURE_FORMATS`, or has too many bytes or pixels.
    """
    size = _header(path, limits)
    if size is None:
        raise ValueError(f"{path.name} is no picture; give a {', '.join(PICTURE_FORMATS)} file.")
    return size


def _header(path: Path, limits: Limits) -> tuple[int, int] | None:
    """(width, height) as the file says; None if it is no picture."""
    _check_bytes(path, limits)
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            width, height = picture.size
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path.name} has far too many pixels; at most {limits.max_pixels:,} are allowed."
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged ({error}); export it again.") from error
    if width * height > limits.max_pixels:
        raise ValueError(
            f"{path.name} has {width} x {height} = {width * height:,} pixels; at most "
            f"{limits.max_pixels:,} are allowed. Scale it down."
        )
    return width, height


def _check_bytes(path: Path, limits: Limits) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise ValueError(f"{path.name} is no longer here; upload it again.") from None
    if size > limits.max_upload:
        raise ValueError(
            f"{path.name} has {size:,} bytes; at most {limits.max_upload:,} are allowed."
        )


def fingerprint(path: Path, limits: Limits) -> tuple[str, str]:
    """Name and SHA-256 of a file: the same file uploaded again is the same.

    Raises ValueError: it has too many bytes, or is no longer there.
    """
    _check_bytes(path, limits)
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()


def check_masks(paths: Sequence[Path], limits: Limits) -> None:
    """Bound what mask files unpack to, by their headers only.

    Raises ValueError: another suffix, or too many bytes, pixels or unpacked bytes.
    """
    for path in paths:
        _check_bytes(path, limits)
        suffix = path.suffix.lower()
        if suffix not in MASK_SUFFIXES:
            raise ValueError(
                f"{path.name}: masks are {', '.join(MASK_SUFFIXES)} files, not {suffix or 'this'}."
            )
        if suffix == ".png" and _header(path, limits) is None:
            raise ValueError(f"{path.name} is no PNG that can be read; export it again.")
        if suffix == ".npz":
            _check_archive(path, limits)


def _check_archive(path: Path, limits: Limits) -> None:
    allowed = BYTES_PER_PIXEL * limits.max_pixels
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ValueError(
            f"{path.name} is truncated or no npz archive; write it again with numpy.savez."
        ) from None
    unpacked = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or unpacked > allowed:
        raise ValueError(
            f"{path.name} holds {len(members)} arrays that unpack to {unpacked:,} bytes; at most "
            f"{MAX_MEMBERS} and {allowed:,} are allowed."
        )


def read_masks(
    paths: Sequence[Path], size: tuple[int, int], image_id: int | str, limits: Limits
) -> EntityMap:
    """Read the entities of a picture from one file, or from a COCO panoptic PNG and its JSON.

    Args:
        paths: the file, or the two.
        size: (height, width) of the picture.
        image_id: finds the picture in a JSON of many.
        limits: of what is read.

    Raises ValueError: `check_masks`; the files do not go together; too many entities; and what
    `load_entities` raises.
    """
    check_masks(paths, limits)
    segments: list[dict[str, Any]] | None = None
    chosen = list(paths)
    if len(paths) > 1:
        names = sorted(path.suffix.lower() for path in paths)
        if names != [".json", ".png"]:
            raise ValueError(
                f"There are {len(paths)} mask files ({', '.join(p.name for p in paths)}); give one "
                "file, or a COCO panoptic PNG together with its JSON."
            )
        listed, chosen = (
            sorted(paths, key=lambda path: path.suffix.lower() != ".json")[:1],
            [path for path in paths if path.suffix.lower() == ".png"],
        )
        segments = _segments_of(listed[0], chosen[0].name)
    elif paths[0].suffix.lower() == ".json" and json_format(paths[0]) == "coco_panoptic":
        # Its PNGs are named by the file itself: a stranger's JSON must not choose what is read.
        raise ValueError(
            f"{paths[0].name} is a COCO panoptic JSON, whose masks are in PNG files: upload this "
            "picture's PNG together with it, or alone."
        )
    try:
        entities = load_entities(chosen[0], *size, segments_info=segments, image_id=image_id)
    finally:
        forget_files()
    if entities.num_entities > limits.max_entities:
        raise ValueError(
            f"{chosen[0].name} has {entities.num_entities:,} entities; at most "
            f"{limits.max_entities:,} are allowed. Are the pixels really ids?"
        )
    return entities


def _segments_of(panoptic_json: Path, png: str) -> list[dict[str, Any]]:
    """``segments_info`` of the annotation whose PNG has this name."""
    if json_format(panoptic_json) != "coco_panoptic":
        raise ValueError(f"{panoptic_json.name} is no COCO panoptic JSON; upload one mask file.")
    for entries in entries_by_image(panoptic_json, "coco_panoptic").values():
        for entry in entries:
            name = str(entry.get("file_name"))
            if Path(name).name == png and isinstance(entry.get("segments_info"), list):
                return entry["segments_info"]
    raise ValueError(f"{panoptic_json.name} has no segments of a picture named {png}.")


def read_scene(
    picture: Path, masks: Sequence[Path], limits: Limits
) -> tuple[np.ndarray, EntityMap | None, int | str]:
    """Read a picture (upright) and its masks within the limits.

    Returns the picture uint8 (H, W, 3) RGB, its entities (None without mask files), and its id.

    Raises ValueError, naming files without their folders.
    """
    check_picture(picture, limits)
    if masks:
        check_masks(masks, limits)
    image = read_image(picture, upright=True)
    image_id = image_id_of(picture)
    if not masks:
        return image, None, image_id
    return image, read_masks(masks, image.shape[:2], image_id, limits), image_id


_FOLDERS = re.compile(r"(?<![\w.:/<])(?:~|\.{0,2})/(?:[^\s/'\"<>|:]+/)*(?=[^\s/'\"<>|:])")


def without_folders(message: str) -> str:
    """A message in one line in which each path is only its file name."""
    return " ".join(_FOLDERS.sub("", message).split())


def message_of(error: BaseException) -> str | None:
    """What the visitor is told of an error; None for one that only the server's log should hold."""
    if isinstance(error, MemoryError):
        return "There is not enough memory for this; try a smaller picture or fewer masks."
    if isinstance(error, RecursionError):
        return "The file is nested too deeply to be read; write it again."
    if isinstance(error, ValueError | FileNotFoundError | AnswerError):
        return without_folders(str(error)) or None
    return None


def clean_folder(folder: Path, keep: Iterable[Path], seconds: float) -> int:
    """Delete files and empty folders not changed for ``seconds``; return how many files.

    Args:
        folder: searched through.
        keep: files that stay.
        seconds: age.
    """
    kept, now, count = set(keep), time.time(), 0
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            try:
                if path not in kept and now - path.lstat().st_mtime > seconds:
                    path.unlink()
                    count += 1
            except FileNotFoundError:
                continue  # somebody else cleaned too
        old = now - os.lstat(place).st_mtime > seconds
        if old and place != str(folder) and not os.listdir(place):
            os.rmdir(place)
    return count


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total

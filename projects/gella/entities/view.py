"""From a picture and its entities to what the model sees: resized, coloured, padded squares.

Training, evaluation and the predictor all come through :func:`make_view`, so the image for CLIP and
the colormap always show the same scene in the same place.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from gella.entities.colormap import entity_colors, paint_colormap
from gella.entities.entity_map import MAX_PIXELS, EntityMap, check_pixels
from gella.entities.files import damage_told
from gella.entities.rle import OtherSize, check_size

_logger = logging.getLogger(__name__)
_ORIENTATION = 0x0112  # the tag of EXIF
# Formats of photographs. Pillow knows more, of which one (EPS) runs a program on the file.
PHOTO_FORMATS = (
    *("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"),
)


def read_image(
    file_name: str | Path,
    *,
    size: tuple[int, int] | None = None,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read a picture as uint8 RGB (H, W, 3), turned as its EXIF orientation says.

    The one exception are pictures whose stored pixels alone are of the ``size`` of what belongs to
    them. Where both are (turned by 180 degrees, mirrored, square), the turned one is taken and the
    log says so. Grey (8 or 16 bits), palette, CMYK and transparent pictures are converted to RGB.
    What the file declares is checked before it is decoded.

    Args:
        file_name: a picture in one of `PHOTO_FORMATS`, whatever its suffix.
        size: (H, W) of its masks, or of its record.
        upright: False takes the stored pixels whatever the file says.
        max_pixels: larger pictures are refused. Above 178,956,970 Pillow refuses them itself,
            unless `PIL.Image.MAX_IMAGE_PIXELS` is raised too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, ends before its last row, has too many pixels, more
            than one frame, or numbers of no known range in place of colours.
    """
    path = Path(file_name)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist; check the path")
    Image.init()
    formats = [name for name in PHOTO_FORMATS if name in Image.OPEN]  # HEIF needs a plugin
    with damage_told(f"image {path} is "), Image.open(path, formats=formats) as picture:
        refused = _refusal(picture, max_pixels)
        if not refused:
            picture.load()
            if upright and _turned(path, picture, size):
                ImageOps.exif_transpose(picture, in_place=True)  # else it makes a copy
            turned: Image.Image = picture
            if turned.mode.startswith("I;16"):  # Pillow would clip all that is over 255
                turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
            # A picture that is RGB already would be copied by convert() all the same.
            return np.array(turned if turned.mode == "RGB" else turned.convert("RGB"))
    raise ValueError(f"image {path}: {refused}")


def read_recorded(file_name: str | Path, size: tuple[int, int] | None) -> np.ndarray:
    """`read_image` of a picture that a record says is of ``size``; ValueError if it is not."""
    image = read_image(file_name, size=size)
    if size not in (None, image.shape[:2]):
        raise ValueError(
            f"image {file_name} is {image.shape[1]}x{image.shape[0]} pixels but its record says "
            f"{size[1]}x{size[0]} (width x height); it is of another picture, or the sides are "
            "swapped"
        )
    return image


def read_with_entities(
    file_name: str | Path, load: Callable[[np.ndarray], EntityMap], **options: Any
) -> tuple[np.ndarray, EntityMap]:
    """A picture, turned by the rule of `read_image`, and its entities.

    Args:
        file_name: the picture.
        load: gives its entities, or raises `OtherSize` if they are of another size.
        options: of `read_image`.
    """
    image = read_image(file_name, **options)
    try:
        entities = load(image)
    except OtherSize:
        stored = read_image(file_name, **{**options, "size": image.shape[1::-1]})
        if stored.shape != image.shape:
            with suppress(OtherSize):  # neither fits: the first error tells
                return stored, load(stored)
        raise
    with damage_told(f"image {file_name} is "), Image.open(file_name) as picture:
        _turned(Path(file_name), picture, entities.size)
    return image, entities


def _turned(path: Path, picture: Image.Image, size: tuple[int, ...] | None) -> bool:
    orientation, stored = picture.getexif().get(_ORIENTATION, 1), (picture.height, picture.width)
    turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if orientation in range(2, 9) and tuple(size or ()) == stored == turned:
        _warn_once(
            f"image {path}: masks of {stored[1]}x{stored[0]} fit it as it is stored and as its "
            f"EXIF orientation {orientation} turns it; it is turned, and the masks have to be"
        )
    return tuple(size or ()) != stored or stored == turned


@lru_cache(maxsize=1000)
def _warn_once(line: str) -> None:
    _logger.warning(line)


def _refusal(picture: Image.Image, max_pixels: int) -> str:
    """Why a picture that was opened is not to be decoded; "" if it may be."""
    try:
        check_pixels(picture.height, picture.width, max_pixels)
    except ValueError as error:
        return str(error)
    # The further pictures in a telephone's MPO are previews and gain maps of the first.
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        return f"more than 1 frame in the {picture.format} file; save the one that is meant alone"
    if picture.mode in ("I", "F"):
        return (
            f"32-bit numbers (Pillow's mode {picture.mode}) of no known range; "
            "save colours with 8 or 16 bits"
        )
    return ""


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    """A file of a picture; ``form`` and ``options`` are Pillow's."""
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def fitted_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) scaled so that the longest side is ``side``, each at least 1 pixel."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_image(image: np.ndarray, side: int) -> np.ndarray:
    """Scale uint8 (H, W, 3) to the longest side ``side`` and pad with zeros to (side, side, 3).

    Bicubic with antialiasing, as CLIP's and LLaVA's own processors. The picture stays at the top
    left.
    """
    height, width = fitted_size(image.shape[0], image.shape[1], side)
    square = np.zeros((side, side, 3), dtype=np.uint8)
    if (height, width) == image.shape[:2]:
        square[:height, :width] = image
    else:
        mirrored = image.strides[1] < 0  # array[:, ::-1]: Pillow would copy it byte by byte
        picture = Image.fromarray(image[:, ::-1] if mirrored else image)
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        square[:height, :width] = np.asarray(resized)
    return square


def make_view(
    image: np.ndarray,
    entities: EntityMap,
    *,
    image_size: int,
    colormap_size: int,
    assignment: str,
    rng: np.random.Generator,
    draws: int = 1,
) -> dict[str, Any]:
    """Bring one scene into the model's frame (paper, section 3.1 and "augmentation").

    The longest side is scaled to the square's side and the rest is padded with zeros at the bottom
    and on the right; nothing is cropped, since a crop would cut entities.

    Args:
        image: uint8 (H, W, 3) RGB.
        entities: the scene's entities, in the frame of ``image``.
        image_size: side S of CLIP's input, pixels.
        colormap_size: side C of the colormap, pixels.
        assignment: how colours are chosen, see :func:`gella.entities.colormap.entity_colors`.
        rng: source of the colours; the same state gives the same colormap.
        draws: how often colours are drawn, one draw after the other.

    Returns:
        ``image`` uint8 tensor (3, S, S), ``colormap`` uint8 tensor (3, C, C), ``entities``
        EntityMap of size (C, C) with the same E and order, ``colors`` uint8 (E, 3): those of the
        colormap, ``redrawn``: those of the further draws, ``valid_size`` (h, w): the part of the
        colormap that is no padding.

    Raises:
        ValueError: the image is not uint8 (H, W, 3), or its size is not that of the entities.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 (H, W, 3) RGB, not {image.dtype} {tuple(image.shape)}"
        )
    check_size(entities.size, image.shape[:2])
    height, width = fitted_size(image.shape[0], image.shape[1], colormap_size)
    # Colours are drawn on the unpadded map: the place of a centroid must not depend on padding.
    resized = entities.resize(height, width)
    colors, *redrawn = (entity_colors(resized, assignment, rng) for _ in range(draws))
    padded = resized.pad(colormap_size, colormap_size)
    return {
        "image": _to_tensor(fit_image(image, image_size)),
        "colormap": painted(padded, colors),
        "entities": padded,
        "colors": colors,
        "redrawn": redrawn,
        "valid_size": (height, width),
    }


def to_send(mapped: dict[str, Any]) -> dict[str, Any]:
    """A mapped dict as a loader's worker sends it: a tenth of the bytes, and no shared memory.

    The colormap, most of what a view weighs, is left out, since entities and colours say the same;
    tensors become arrays, because each tensor would take a file handle and pages of its own.
    """
    dropped = {"colormap"} if "colors" in mapped else set()
    sent = {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in mapped.items()
        if key not in dropped
    }
    return {**sent, "more": [to_send(x) for x in sent["more"]]} if "more" in sent else sent


def received(sent: dict[str, Any]) -> dict[str, Any]:
    """The mapped dict of `to_send`, equal to it in every pixel; the colormap is painted here."""
    mapped = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) and key != "colors" else value
        for key, value in sent.items()
    }
    if "more" in sent:
        mapped["more"] = [received(x) for x in sent["more"]]
    if "colors" in sent:
        mapped["colormap"] = painted(sent["entities"], sent["colors"])
    return mapped


def painted(entities: EntityMap, colors: np.ndarray) -> torch.Tensor:
    """The colormap of entities in uint8 colours (E, 3), as a view has it: uint8 (3, H, W)."""
    return _to_tensor(paint_colormap(entities, colors))


def _to_tensor(picture: np.ndarray) -> torch.Tensor:
    # Costs nothing for a colormap, whose channels are planes already.
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))

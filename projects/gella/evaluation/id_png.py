"""Segment ids of a PNG, read by the fastest decoder at hand: decoding is most of scoring's time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gella.entities.entity_map import rgb_to_id

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BIT_RGB = b"\x08\x02"  # depth and colour type, bytes 24 and 25 of the file


def read_id_png(path: str | Path) -> np.ndarray:
    """Ids of a panoptic PNG: int32 (H, W).

    An RGB file holds ``R + 256 G + 65536 B`` (docs/FORMATS.md 1); it is decoded by torchvision's
    libpng, a fifth quicker than Pillow and without holding Python's lock. Of a grey or palette file
    the values are the ids, as everywhere in this project; anything else is read as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG or damaged.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        if data.startswith(_SIGNATURE) and data[24:26] == _EIGHT_BIT_RGB:
            return rgb_to_id(_decode(data))
        with Image.open(path) as picture:
            grey = picture.mode not in ("RGB", "RGBA")
            pixels = np.array(picture if grey else picture.convert("RGB"))
    except (OSError, RuntimeError, SyntaxError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged ({reason}); copy it again") from error
    return pixels.astype(np.int32) if grey else rgb_to_id(pixels)


def _decode(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3) of an 8-bit RGB PNG."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    # torch reads bytes without a copy but wants memory that may be written to.
    stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels: np.ndarray = decode_png(stream, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return pixels

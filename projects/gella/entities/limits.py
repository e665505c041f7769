"""How large what a stranger's file declares may be.

Each bound is checked on the declared size, before anything of that size is decoded.
"""

from __future__ import annotations

MAX_PIXELS = 120_000_000
"""Of a picture, height x width: those of most telephones have up to 108 million. Decoding one takes
about 12 bytes per pixel, its entities up to 50."""

MAX_ENTITIES = 10_000
"""Of one image. Segmenters find up to about 1,000, and annotations hold fewer."""

MAX_BYTES = 1 << 30
"""Of a mask file on disk: COCO's largest annotation file has half of that. Reading a JSON file may
take 20 times its size."""

MAX_SEGMENT_ID = (1 << 24) - 1
"""Largest id of a pixel: a panoptic PNG has three bytes for it."""


def check_pixels(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """ValueError with both numbers if an image has no pixel, or more than `max_pixels`."""
    if height < 1 or width < 1:
        raise ValueError(f"{width}x{height} pixels (width x height): an image has at least one")
    if height * width > max_pixels:
        raise ValueError(
            f"{width}x{height} = {height * width} pixels are more than the {max_pixels} that are "
            "read; scale it down, or raise max_pixels"
        )

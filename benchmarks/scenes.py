"""Pictures, masks and captions made on the spot, on which the modes `data` and `eval` measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shapes_text import train_tokenizer

from gella.entities.entity_map import id_to_rgb

NOUNS = "person dog table window road tree cup horse".split()  # of a scene's caption
_CELL = 4  # pixels: the coarse grid on which regions are laid out


def picture_size(text: str) -> tuple[int, int]:
    """ "640x480" -> (640, 480), width first; ValueError for anything else."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 16:
        raise ValueError(f"--size is {text!r}: give width x height, at least 16 each, as 640x480")
    return width, height


def id_image(height: int, width: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """A map like a panoptic one: regions with ragged borders, int32 (H, W), ids from 1000 on."""
    grid = (-(-height // _CELL), -(-width // _CELL) + 1)
    points = np.stack([rng.permutation(side * segments)[:segments] % side for side in grid], axis=1)
    cells = np.stack(np.indices(grid), axis=-1)[:, :, None]
    nearest = ((cells - points) ** 2).sum(axis=-1).argmin(axis=-1)
    fine = nearest.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[:height]
    # Each row is moved by itself, so that no border is straight.
    columns = np.arange(width) + rng.integers(0, _CELL + 1, size=(height, 1))
    return (np.take_along_axis(fine, columns, axis=1) + 1000).astype(np.int32)


def write_scenes(
    folder: Path, count: int, size: tuple[int, int], segments: int
) -> tuple[list[dict[str, Any]], str]:
    """Write JPEGs, panoptic PNGs and a tokenizer.

    Args:
        folder: an existing, empty folder.
        count: how many scenes.
        size: (width, height) of each in pixels.
        segments: of each, at least 1; one that is covered by its neighbours is left out.

    Returns:
        Dataset dicts, which can train every task, and the tokenizer's folder.
    """
    rng, records, (width, height) = np.random.default_rng(0), [], size
    caption = "In this picture there is " + " beside ".join(f"a {noun}" for noun in NOUNS) + "."
    for number in range(count):
        ids = id_image(height, width, segments, rng)
        coarse = (max(height // 16, 1), max(width // 16, 1), 3)
        blobs = Image.fromarray(rng.integers(0, 256, coarse, dtype=np.uint8))
        smooth = np.asarray(blobs.resize(size, Image.Resampling.BICUBIC)).astype(np.int64)
        # With noise the JPEG is about as large as a photograph's.
        picture = smooth + rng.integers(-12, 13, (height, width, 1))
        image, masks = (str(folder / f"{number}{suffix}") for suffix in (".jpg", ".png"))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(image, quality=90)
        Image.fromarray(id_to_rgb(ids)).save(masks)
        present = np.unique(ids).tolist()
        infos = [{"id": i, "category_id": 1, "iscrowd": 0} for i in present]
        phrases = []
        for place, noun in enumerate(NOUNS):
            start, named = caption.index(f"a {noun}") + 2, present[place :: len(NOUNS)]
            span = {"text": noun, "start": start, "end": start + len(noun), "segment_ids": named}
            phrases.append({**span, "is_plural": len(named) > 1, "is_thing": True})
        records.append(
            {
                "file_name": image,
                "image_id": number,
                "height": height,
                "width": width,
                "entities": {"format": "panoptic_png", "file_name": masks, "segments_info": infos},
                "caption": caption,
                "phrases": phrases,
                "tasks": ("describe", "extract", "ground"),
            }
        )
    train_tokenizer([caption], str(folder / "tokenizer"))
    return records, str(folder / "tokenizer")

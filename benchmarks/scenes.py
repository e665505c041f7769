"""Pictures, masks and captions made on the spot, on which `data.py` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from shapes_text import train_tokenizer

from gella.entities.entity_map import id_to_rgb

NOUNS = ("person", "dog", "table", "window", "road", "tree", "cup", "horse")
_CELL = 4  # pixels: the coarse grid on which regions are laid out


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


def picture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A picture whose JPEG is about as large as a photograph's: uint8 (H, W, 3)."""
    coarse = rng.integers(0, 256, (max(height // 16, 1), max(width // 16, 1), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-12, 13, (height, width, 1))
    return (np.asarray(smooth).astype(np.int64) + noise).clip(0, 255).astype(np.uint8)


def write_scenes(
    folder: Path, count: int, height: int, width: int, segments: int, seed: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Write JPEGs, panoptic PNGs and a tokenizer.

    Args:
        folder: an existing, empty folder.
        count: how many scenes.
        height: of each, pixels.
        width: of each, pixels.
        segments: of each, at least 1; one that is covered by its neighbours is left out.
        seed: other numbers give other scenes.

    Returns:
        Dataset dicts, which can train every task, and the tokenizer's folder.
    """
    rng, records = np.random.default_rng(seed), []
    for number in range(count):
        ids = id_image(height, width, segments, rng)
        names = [str(folder / f"{number}{suffix}") for suffix in (".jpg", ".png")]
        Image.fromarray(picture(height, width, rng)).save(names[0], quality=90)
        Image.fromarray(id_to_rgb(ids)).save(names[1])
        found = [int(i) for i in np.unique(ids)]
        caption, phrases = _caption(found)
        listed = [{"id": i, "category_id": 1, "iscrowd": 0} for i in found]
        where = {"format": "panoptic_png", "file_name": names[1], "segments_info": listed}
        sides = {"height": height, "width": width}
        record = {"file_name": names[0], "image_id": number, **sides, "entities": where}
        record.update(caption=caption, phrases=phrases, tasks=("describe", "extract", "ground"))
        records.append(record)
    tokenizer = str(folder / "tokenizer")
    train_tokenizer([record["caption"] for record in records], tokenizer)
    return records, tokenizer


def _caption(segment_ids: list[int]) -> tuple[str, list[dict[str, Any]]]:
    caption, phrases = "There is", []
    for place, noun in enumerate(NOUNS):
        caption += " a " if place == 0 else " near a "
        start = len(caption)
        caption += noun
        ids = segment_ids[place :: len(NOUNS)]
        phrase = {"text": noun, "start": start, "end": len(caption), "segment_ids": ids}
        phrases.append({**phrase, "is_plural": len(ids) > 1, "is_thing": True})
    return caption + ".", phrases

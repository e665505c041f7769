"""Colormap and target masks, the project's way and the plain ways, for `benchmark_data.py`.

The plain ways are written here, independently of the project's, and must agree with it in every
pixel before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gella.entities.colormap import entity_colors, paint_colormap
from gella.entities.entity_map import EntityMap
from gella.entities.view import fitted_size

KEPT = 16  # results held while measuring, as a batch is: the allocator cannot reuse a warm page


def median_ms(task: Callable[[Any], Any], items: Sequence[Any], repeat: int) -> float:
    """Median milliseconds of `task(item)` over `repeat` passes, after one pass that is not timed.

    Processor time of this thread: what else the machine does meanwhile is not counted. The last
    `KEPT` results stay alive, so that every call gets memory as in training.
    """
    kept: deque[Any] = deque(maxlen=KEPT)
    times = []
    for turn in range(repeat + 1):
        for item in items:
            start = time.thread_time()
            kept.append(task(item))
            if turn:
                times.append(time.thread_time() - start)
    return 1000 * statistics.median(times)


def plain_masks_first(
    ids: np.ndarray, segment_ids: Sequence[int], colors: np.ndarray, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Colormap (3, S, S) and targets bool (E, S, S): a mask per segment, each resized and painted.

    Nearest neighbour by NumPy indices, which is exact and quicker than an image library here.
    """
    height, width = fitted_size(*ids.shape, side)
    rows, columns = (_centres(old, new) for old, new in zip(ids.shape, (height, width)))
    colormap, masks = np.zeros((side, side, 3), np.uint8), []
    for segment_id, color in zip(segment_ids, colors):
        mask = ids == segment_id
        padded = np.zeros((side, side), bool)
        padded[:height, :width] = mask[rows][:, columns]
        colormap[padded] = color
        masks.append(torch.from_numpy(padded))
    return torch.from_numpy(colormap.transpose(2, 0, 1).copy()), torch.stack(masks)


def plain_resize_first(
    ids: np.ndarray, segment_ids: Sequence[int], colors: np.ndarray, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, but the id map is resized once and then compared with every segment's id.

    This is the order of Mask2Former's panoptic mapper, and the quicker of the two plain ways.
    """
    height, width = fitted_size(*ids.shape, side)
    rows, columns = (_centres(old, new) for old, new in zip(ids.shape, (height, width)))
    resized = np.zeros((side, side), ids.dtype)
    resized[:height, :width] = ids[rows][:, columns]
    colormap, masks = np.zeros((side, side, 3), np.uint8), []
    for segment_id, color in zip(segment_ids, colors):
        mask = resized == segment_id
        colormap[mask] = color
        masks.append(torch.from_numpy(np.ascontiguousarray(mask.copy())))
    return torch.from_numpy(colormap.transpose(2, 0, 1).copy()), torch.stack(masks)


def _centres(old: int, new: int) -> np.ndarray:
    return ((2 * np.arange(new) + 1) * old) // (2 * new)


def by_runs(
    ids: np.ndarray, segment_ids: Sequence[int], colors: np.ndarray, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The project's way to the same two tensors."""
    entities = EntityMap.from_id_image(ids, segment_ids)
    padded = entities.resize(*fitted_size(*ids.shape, side)).pad(side, side)
    colormap = paint_colormap(padded, colors).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(colormap)), torch.from_numpy(padded.bitmasks())


def compare_colormaps(maps: Sequence[np.ndarray], side: int, repeat: int) -> dict[str, float]:
    """Milliseconds per picture from an id map to colormap and target masks, all three ways.

    Raises:
        RuntimeError: the ways disagree in a pixel; a time would mean nothing.
    """
    rng, scenes = np.random.default_rng(1), []
    for ids in maps:
        segment_ids = [int(i) for i in np.unique(ids) if i]
        entities = EntityMap.from_id_image(ids, segment_ids)
        scenes.append((ids, segment_ids, entity_colors(entities, "random", rng), side))
    ways = {"ours": by_runs, "masks_first": plain_masks_first, "resize_first": plain_resize_first}
    for scene in scenes[:4]:
        expected = plain_masks_first(*scene)
        for name, way in ways.items():
            if not all(torch.equal(a, b) for a, b in zip(way(*scene), expected)):
                raise RuntimeError(f"the way {name!r} gives another colormap or other masks")
    times = {name: median_ms(lambda s, w=way: w(*s), scenes, repeat) for name, way in ways.items()}
    times["times_faster"] = min(times["masks_first"], times["resize_first"]) / times["ours"]
    return times


def compare_encoding(
    maps: Sequence[np.ndarray], sides: Sequence[int], repeat: int
) -> dict[str, dict[str, float]]:
    """Milliseconds from entity map to colours, beside a copy of these bytes.

    Args:
        maps: id images of one size.
        sides: of the padded squares to paint, besides the maps as they are.
        repeat: passes.

    Returns:
        Per frame: "encode", "copy" and their ratio "copies", over different pictures; the same
        with "_warm" for one picture again and again, and with "_checked" for making the entity map
        of bare numbers first, which checks every one of them.
    """
    rng, height, width = np.random.default_rng(2), *maps[0].shape
    scenes = [EntityMap.from_id_image(ids) for ids in maps]
    colors = [entity_colors(scene, "random", rng) for scene in scenes]
    figures = {f"{width} x {height}": _encoding(scenes, colors, repeat)}
    for side in sides:
        size = fitted_size(height, width, side)
        views = [scene.resize(*size).pad(side, side) for scene in scenes]
        figures[f"square of {side}"] = _encoding(views, colors, repeat)
    return figures


def _encoding(
    scenes: Sequence[EntityMap], colors: Sequence[np.ndarray], repeat: int
) -> dict[str, float]:
    pictures = [np.ascontiguousarray(paint_colormap(*job)) for job in zip(scenes, colors)]

    def paint(i: int) -> np.ndarray:
        return paint_colormap(scenes[i], colors[i])

    def check_and_paint(i: int) -> np.ndarray:
        return paint_colormap(EntityMap(scenes[i].ids, scenes[i].segment_ids), colors[i])

    figures: dict[str, float] = {}
    all_, one = range(len(scenes)), [0] * len(scenes)
    ways = (("", paint, all_), ("_warm", paint, one), ("_checked", check_and_paint, all_))
    for suffix, way, places in ways:
        encode = median_ms(way, places, repeat)
        copy = median_ms(lambda i: pictures[i].copy(), places, repeat)
        figures.update({f"encode{suffix}": encode, f"copy{suffix}": copy})
        figures[f"copies{suffix}"] = encode / copy
    return figures

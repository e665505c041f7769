"""The mapper step by step, and the loader, for `data.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from colormap import median_ms
from PIL import Image
from tqdm import tqdm

from gella.data.mapper import GroundingMapper
from gella.data.sampling import build_train_loader
from gella.data.targets import EntityMatcher
from gella.entities.colormap import entity_colors, paint_colormap
from gella.entities.sources import load_from_record
from gella.entities.view import fit_image, fitted_size, read_image

STAGES = {
    "decode image": "JPEG or PNG to RGB",
    "decode mask file": "the PNG of ids, where there is one",
    "ids to entities": "numbers, checks against the annotation",
    "resize and pad": "the image for CLIP, the entities for the colormap",
    "colormap": "colours drawn and painted",
    "prompt": "instruction, answer, tokens",
    "targets": "which entities each noun names",
}


class Steps:
    """The mapper's work, step by step: each method does one step for the picture of a number."""

    def __init__(self, records: Sequence[dict[str, Any]], mapper: GroundingMapper, cfg: Any):
        """``records`` and ``mapper`` as the loader has them, for training."""
        self.records, self.mapper, self.cfg = records, mapper, cfg
        self.task = "ground" if "ground" in records[0]["tasks"] else records[0]["tasks"][0]
        self.side = cfg.INPUT.GELLA.COLORMAP_SIZE
        self.images = [read_image(record["file_name"]) for record in records]
        self.entities = [load_from_record(record) for record in records]
        self.views = [self.fit(i) for i in range(len(records))]
        self.mapped = [self.map(i) for i in range(len(records))]
        self._rng = np.random.default_rng(0)

    def map(self, i: int) -> dict[str, Any]:
        """Everything at once."""
        return self.mapper(self.records[i], task=self.task, rng_seed=(0, i))

    def fit(self, i: int) -> Any:
        """The entities in the colormap's frame."""
        size = fitted_size(*self.entities[i].size, self.side)
        return self.entities[i].resize(*size).pad(self.side, self.side)

    def decode_masks(self, i: int) -> Any:
        """The pixels of a mask PNG; nothing where the masks are in another kind of file."""
        name = str(self.records[i]["entities"].get("file_name", ""))
        if not name.endswith(".png"):
            return None
        with Image.open(name) as opened:
            return np.asarray(opened)

    def resize(self, i: int) -> Any:
        """The image in CLIP's frame, and the entities."""
        return fit_image(self.images[i], self.cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE), self.fit(i)

    def colormap(self, i: int) -> np.ndarray:
        """uint8 (3, S, S)."""
        colors = entity_colors(self.views[i], self.cfg.INPUT.GELLA.COLORS, self._rng)
        return np.ascontiguousarray(paint_colormap(self.views[i], colors).transpose(2, 0, 1))

    def prompt(self, i: int) -> Any:
        """Tokens and labels."""
        mapped = self.mapped[i]
        return self.mapper.fit(mapped["task"], mapped["caption"], mapped["phrases"])

    def targets(self, i: int) -> Any:
        """Entity indices of each noun."""
        source = self.records[i]["entities"]
        elsewhere = source.get("targets")
        truth = elsewhere and load_from_record({**self.records[i], "entities": elsewhere})
        segments = (elsewhere or source).get("segments_info")
        matcher = EntityMatcher(
            self.entities[i], segments, truth, min_iou=self.cfg.INPUT.GELLA.TARGET_IOU
        )
        return [matcher.entity_indices(p["segment_ids"]) for p in self.mapped[i]["phrases"]]

    def times(self, repeat: int) -> dict[str, float]:
        """Median milliseconds of each of `STAGES`, and of the whole "mapper"."""
        steps = {
            "decode image": lambda i: read_image(self.records[i]["file_name"]),
            "decode mask file": self.decode_masks,
            "ids to entities": lambda i: load_from_record(self.records[i]),
            "resize and pad": self.resize,
            "colormap": self.colormap,
            "prompt": self.prompt,
            "targets": self.targets,
            "mapper": self.map,
        }
        numbers = range(len(self.records))
        times = {
            name: median_ms(step, numbers, repeat)
            for name, step in tqdm(steps.items(), "stages", leave=False)
        }
        # Reading decodes too; shown is what comes on top.
        times["ids to entities"] = max(0.0, times["ids to entities"] - times["decode mask file"])
        return times


def loader_speed(
    cfg: Any, records: Sequence[dict[str, Any]], mapper: Any, workers: int, seconds: float
) -> float:
    """Images per second of the training loader, its start not counted."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = iter(build_train_loader(cfg, records=records, mapper=mapper))
    # What the workers had in hand when the clock starts would count as done in no time.
    for _ in range(2 * workers + 1):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - start)

"""A small dataset in every annotation format, written to be spoiled in one place at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from gella.data import register as datasets
from gella.data.entityseg import load_entityseg
from gella.entities.sources import load_entities, load_from_record

SIZE = (12, 17)
IDS = np.zeros(SIZE, np.int32)
IDS[1:5, 2:9], IDS[6:9, 7:15], IDS[10:, :6] = 70000, 300, 9
SEGMENTS = [
    {"id": 300, "category_id": 3, "iscrowd": 0, "area": 24, "bbox": [7, 6, 8, 3]},
    {"id": 9, "category_id": 5, "iscrowd": 0, "area": 12, "bbox": [0, 10, 6, 2]},
    {"id": 70000, "category_id": 3, "iscrowd": 0, "area": 28, "bbox": [2, 1, 7, 4]},
]
CAPTION = "A dog and a bush, with a second dog."


def rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask."""
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def rgb(ids: np.ndarray) -> np.ndarray:
    """The colours of a panoptic PNG."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def _contents() -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.png", "height": 12, "width": 17} for i in (41, 42)]
    utterances = [("a dog", ["300"]), ("and", []), ("a bush", ["9"]), (", with", [])]
    narrative = [
        {"utterance": text, "segment_ids": ids, "plural": False, "noun": bool(ids)}
        for text, ids in (*utterances, ("a second dog", ["70000"]), (".", []))
    ]
    sentence = {"sent_id": 1, "sent": "dog below", "raw": "Dog below", "tokens": ["dog", "below"]}
    contents = {
        "panoptic.json": {
            "images": images,
            "annotations": [
                {"image_id": i, "file_name": f"{i}.png", "segments_info": SEGMENTS}
                for i in (41, 42)
            ],
            "categories": [
                {"id": 3, "name": "dog", "isthing": 1},
                {"id": 5, "name": "bush", "isthing": 0},
            ],
        },
        "narratives.json": [
            {"image_id": str(i), "caption": CAPTION, "segments": narrative} for i in (41, 42)
        ],
        "captions.jsonl": [
            {
                "image_id": i,
                "file_name": f"{i}.png",
                "description": CAPTION,
                "nouns": ["A dog", "a bush"],
                "model": "m",
                "prompt_id": 0,
            }
            for i in (41, 42)
        ],
        "instances.json": {
            "images": images,
            "annotations": [
                {
                    "id": 1000 * i + k,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [0, 0, 1, 1],
                    "segmentation": rle(IDS == segment_id),
                }
                for i in (41, 42)
                for k, segment_id in enumerate((300, 9))
            ],
        },
        "refs(unc).p": [
            {
                "ref_id": 500 + i,
                "ann_id": 1000 * i,
                "image_id": i,
                "category_id": 1,
                "split": "val",
                "sentences": [sentence],
            }
            for i in (41, 42)
        ],
        "results.json": [
            {
                "image_id": 42,
                "category_id": 1,
                "segmentation": rle(IDS == segment_id),
                "score": 0.5,
            }
            for segment_id in (300, 9)
        ],
    }
    return json.loads(json.dumps(contents))  # nothing shared: each case spoils one place


class Files:
    """The dataset: contents to change, files written on reading, and a reader of each kind.

    Image 41 is fine; cases spoil image 42 or the file as a whole.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` is empty."""
        self.folder, self.contents = folder, _contents()
        self.png = folder / "panoptic" / "42.png"
        self.npz: dict[str, Any] = {"masks": np.stack([IDS == 300, IDS == 9])}
        self.after: list[Callable[[], Any]] = []
        self.png.parent.mkdir()
        (folder / "images").mkdir()
        for name in ("41.png", "42.png"):
            Image.fromarray(rgb(IDS)).save(self.png.parent / name)
            Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "images" / name)

    def path(self, name: str) -> Path:
        """Where a file of the dataset is."""
        return self.folder / name

    def annotation(self, file: str = "panoptic.json") -> dict[str, Any]:
        """The last annotation of a file."""
        return self.contents[file]["annotations"][-1]

    def segment(self) -> dict[str, Any]:
        """The first panoptic segment of image 42."""
        return self.annotation()["segments_info"][0]

    def later(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of a file once it is written."""
        path = self.path(name)
        self.after.append(lambda: path.write_bytes(change(path.read_bytes())))

    def write(self) -> None:
        """Write all contents."""
        for name, content in self.contents.items():
            if name.endswith(".jsonl"):
                self.path(name).write_text("".join(f"{json.dumps(line)}\n" for line in content))
            elif name.endswith(".p"):
                self.path(name).write_bytes(pickle.dumps(content, 2))
            else:
                self.path(name).write_text(json.dumps(content))
        np.savez(self.path("42.npz"), **self.npz)
        for change in self.after:
            change()

    def read(self, what: str) -> list[Any]:
        """Write everything and read it as `what`: records, or entity maps."""
        self.write()
        return self._read(what)

    def _read(self, what: str) -> list[Any]:
        panoptic = (self.path("panoptic.json"), self.png.parent, self.folder / "images")
        if what == "panoptic":
            return list(datasets.load_coco_panoptic(*panoptic))
        if what == "narratives":
            return list(datasets.load_png(self.path("narratives.json"), *panoptic))
        if what == "captions":
            return list(datasets.load_captions(self.path("captions.jsonl"), *panoptic))
        if what == "refs":
            return list(datasets.load_refcoco(self.folder, "unc", "val", panoptic[2]))
        if what == "instances":
            return list(
                load_entityseg(
                    self.path("instances.json"), self.path("captions.jsonl"), panoptic[2]
                )
            )
        if what in ("png", "masks of refs"):
            records = self._read("panoptic" if what == "png" else "refs")
            return [load_from_record(record) for record in records]
        name, format = {"results": ("results.json", "coco_results")}.get(what, ("42.npz", "npz"))
        return [load_entities(self.path(name), *SIZE, format=format, image_id=42)]

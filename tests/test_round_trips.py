"""Scenes written in every format of entity masks, read back and compared pixel by pixel.

The files are encoded here, by the definitions of the formats, not by the project's own writers; the
synthetic scenes are also read from the files of `prepare_shapes.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
from PIL import Image
from pycocotools import mask as coco_mask
from shapes_masks import to_segmentation

from gella.data import register as datasets
from gella.entities.sources import FileSource, load_entities, load_from_record

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Truth:
    """One image: its ids (0 = void) and its segments in the order of the annotation."""

    image_id: int
    ids: np.ndarray
    segments: list[dict[str, Any]]

    @property
    def own(self) -> list[int]:
        """Ids of the segments that are entities."""
        return [s["id"] for s in self.segments if not s["iscrowd"]]

    @property
    def masks(self) -> np.ndarray:
        """bool (E, H, W) of the entities: one comparison per segment."""
        return np.stack([self.ids == segment_id for segment_id in self.own])


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths in column order, zeros first, one pixel after the other."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def plain(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": runs_of(mask)}


def save_rgb(path: Path, ids: np.ndarray) -> None:
    channels = [ids % 256, ids // 256 % 256, ids // 65536]
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(path)


def numbered(truth: Truth) -> np.ndarray:
    """Entities as 1..E in the order of the annotation, for formats without room for large ids."""
    return (truth.masks * np.arange(1, len(truth.own) + 1)[:, None, None]).sum(axis=0)


# Each writer puts one image into a folder and returns the arguments of `load_entities`.


def panoptic_png(truth: Truth, folder: Path) -> dict[str, Any]:
    save_rgb(folder / "a.png", truth.ids)
    return {"file_name": folder / "a.png", "segments_info": truth.segments}


def panoptic_json(truth: Truth, folder: Path) -> dict[str, Any]:
    (folder / "p").mkdir()
    save_rgb(folder / "p" / "a.png", truth.ids)
    entry = {"image_id": truth.image_id, "file_name": "a.png", "segments_info": truth.segments}
    (folder / "p.json").write_text(json.dumps({"annotations": [entry]}))
    return {"file_name": folder / "p.json", "image_id": str(truth.image_id)}


def results(code: Callable[[np.ndarray], Any]) -> Callable[[Truth, Path], dict[str, Any]]:
    def write(truth: Truth, folder: Path) -> dict[str, Any]:
        entries = [
            {"image_id": truth.image_id, "category_id": 1, "segmentation": code(m), "score": 0.7}
            for m in truth.masks
        ]
        (folder / "r.json").write_text(json.dumps(entries))
        return {"file_name": folder / "r.json", "image_id": truth.image_id}

    return write


def instances(code: Callable[[np.ndarray], Any]) -> Callable[[Truth, Path], dict[str, Any]]:
    def write(truth: Truth, folder: Path) -> dict[str, Any]:
        entries = [
            {
                **segment,
                "image_id": truth.image_id,
                "segmentation": code(truth.ids == segment["id"]),
            }
            for segment in truth.segments
        ]
        (folder / "i.json").write_text(json.dumps({"images": [], "annotations": entries}))
        return {"file_name": folder / "i.json", "image_id": truth.image_id}

    return write


def npz(key: str) -> Callable[[Truth, Path], dict[str, Any]]:
    def write(truth: Truth, folder: Path) -> dict[str, Any]:
        own = np.where(np.isin(truth.ids, truth.own), truth.ids, 0).astype(np.int32)
        array = {"masks": truth.masks, "ids": own, "bytes": truth.masks.astype(np.uint8) * 255}
        np.savez_compressed(folder / "a.npz", **{"ids" if key == "ids" else "masks": array[key]})
        return {"file_name": folder / "a.npz"}

    return write


def gray(depth: int) -> Callable[[Truth, Path], dict[str, Any]]:
    def write(truth: Truth, folder: Path) -> dict[str, Any]:
        ids = numbered(truth) * (1 if depth == 8 else 900)
        Image.fromarray(ids.astype({8: np.uint8, 16: np.uint16}[depth])).save(folder / "a.png")
        return {"file_name": folder / "a.png"}

    return write


WRITERS: dict[str, Callable[[Truth, Path], dict[str, Any]]] = {
    "panoptic_png": panoptic_png,
    "panoptic_json": panoptic_json,
    "results, compressed": results(compressed),
    "results, plain": results(plain),
    "results, outlines": results(to_segmentation),
    "instances, compressed": instances(compressed),
    "instances, outlines": instances(to_segmentation),
    "npz masks": npz("masks"),
    "npz bytes": npz("bytes"),
    "npz ids": npz("ids"),
    "8-bit grey": gray(8),
    "16-bit grey": gray(16),
}
# Which ids come back: those of the annotation in its order, the same in ascending order, or others.
ORDER = dict.fromkeys(("panoptic_png", "panoptic_json"), "listed")
ORDER |= dict.fromkeys(("instances, compressed", "instances, outlines"), "listed")
ORDER |= {"npz ids": "ascending"}


def check(truth: Truth, name: str, folder: Path) -> None:
    folder.mkdir()
    arguments = WRITERS[name](truth, folder)
    entities = load_entities(height=truth.ids.shape[0], width=truth.ids.shape[1], **arguments)
    expected = {"listed": truth.own, "ascending": sorted(truth.own)}.get(ORDER.get(name, ""))
    if expected is not None:
        assert entities.segment_ids == expected
    order = np.argsort(truth.own) if ORDER.get(name) == "ascending" else np.arange(len(truth.own))
    np.testing.assert_array_equal(entities.bitmasks(), truth.masks[order])
    # Void and crowd are no entity.
    np.testing.assert_array_equal(entities.ids == 0, ~truth.masks.any(axis=0))


def drawn(seed: int, split: str, index: int) -> Truth:
    sample = shapes.make_sample(seed, split, index)
    return Truth(sample.image["id"], sample.id_map, sample.panoptic["segments_info"])


@pytest.mark.parametrize("name", WRITERS)
def test_shapes_in_every_format(tmp_path: Path, name: str) -> None:
    for place, (split, index) in enumerate(itertools.product(shapes.SPLITS, range(4))):
        truth = drawn(5, split, index)
        assert len(truth.own) > 3
        check(truth, name, tmp_path / str(place))
        # With a crowd and void pixels, which the scenes have not.
        segments = [{**s, "iscrowd": int(k == 1)} for k, s in enumerate(truth.segments)]
        ids = np.where(truth.ids == truth.own[0], 0, truth.ids)
        with_crowd = Truth(truth.image_id, ids, segments[1:])
        check(with_crowd, name, tmp_path / f"{place}-crowd")


@pytest.mark.parametrize("name", WRITERS)
def test_coco_sample_in_every_format(tmp_path: Path, coco_sample: Path, name: str) -> None:
    folder = coco_sample / "annotations"
    content = json.loads((folder / "panoptic_val2017.json").read_text())
    for annotation in content["annotations"]:
        picture = np.asarray(Image.open(folder / "panoptic_val2017" / annotation["file_name"]))
        ids = (picture.astype(int) * [1, 256, 65536]).sum(axis=-1)
        truth = Truth(annotation["image_id"], ids, annotation["segments_info"])
        assert (ids == 0).any() and any(s["iscrowd"] for s in truth.segments)
        if "outlines" in name or "plain" in name:  # slow to write; the small scenes have them all
            small = [s for s in truth.segments if s["area"] < 3000 or s["iscrowd"]][:6]
            kept = [s["id"] for s in small]
            truth = Truth(truth.image_id, np.where(np.isin(ids, kept), ids, 0), small)
        check(truth, name, tmp_path / str(truth.image_id))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared dataset, as `prepare_shapes.py` writes it."""
    spec = importlib.util.spec_from_file_location(
        "prepare_shapes", ROOT / "datasets" / "prepare_shapes.py"
    )
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("data") / "shapes"
    script.prepare(folder, {"train": 2, "val": 5}, seed=5, workers=1)
    return folder


def test_prepared_shapes_through_the_readers(prepared: Path) -> None:
    notes, images = prepared / "annotations", prepared / "val"
    panoptic = (notes / "panoptic_val.json", notes / "panoptic_val")
    records = datasets.load_coco_panoptic(*panoptic, images)
    objects = datasets.load_refcoco(prepared / "refcoco", "unc", "val", images, per="image")
    by_id = {record["image_id"]: record for record in objects}
    assert len(by_id) > 2
    for index, record in enumerate(records):
        truth = drawn(5, "val", index)
        assert record["image_id"] == truth.image_id
        entities = load_from_record(record)
        assert entities.segment_ids == truth.own
        np.testing.assert_array_equal(entities.bitmasks(), truth.masks)
        if truth.image_id in by_id:  # RefCOCO's own objects, by polygons and RLE
            things = load_from_record(by_id[truth.image_id])
            listed = record["entities"]["segments_info"]
            assert things.segment_ids == [s["id"] for s in listed if s["isthing"]]
            expected = [truth.ids == i for i in things.segment_ids]
            np.testing.assert_array_equal(things.bitmasks(), expected)


def test_predicted_shapes_are_flattened_as_defined(prepared: Path) -> None:
    path = prepared / "annotations" / "predicted_val.json"
    source = FileSource(path, "coco_results")
    overlapping = 0
    for index in range(5):
        sample = shapes.make_sample(5, "val", index)
        record = {"image_id": sample.image["id"], "file_name": "x.png", "height": 96, "width": 96}
        entities = source.load({**record, "entities": {"file_name": "none"}})
        masks = np.stack(
            [coco_mask.decode(entry["segmentation"]).astype(bool) for entry in sample.predictions]
        )
        overlapping += int((masks.sum(axis=0) > 1).sum())
        # Pixel by pixel: the best of the masks there, the smaller one among equals.
        scores, areas = [e["score"] for e in sample.predictions], masks.sum(axis=(1, 2))
        owner = np.zeros(masks.shape[1:], int)
        for y, x in np.argwhere(masks.any(axis=0)):
            there = np.flatnonzero(masks[:, y, x])
            owner[y, x] = 1 + max(there, key=lambda k: (scores[k], -areas[k], k))
        names = np.array([0, *entities.segment_ids])
        np.testing.assert_array_equal(names[entities.ids], owner)
    assert overlapping > 100

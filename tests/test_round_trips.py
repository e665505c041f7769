"""Scenes written in every format of entity masks, read back and compared pixel by pixel.

The files are encoded here, by the definitions of the formats, not by the project's own writers.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import shapes
from PIL import Image
from pycocotools import mask as coco_mask
from shapes_scene import to_segmentation

from gella.entities.files import read_id_png
from gella.entities.sources import load_entities

ROOT = Path(__file__).resolve().parents[1]


class Truth(NamedTuple):
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


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def plain(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths in column order, zeros first, one pixel after the other."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def as_rgb(ids: np.ndarray) -> Image.Image:
    channels = [ids % 256, ids // 256 % 256, ids // 65536]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


# Each writer puts one image into a folder and returns the arguments of `load_entities`.


def panoptic_png(truth: Truth, folder: Path) -> dict[str, Any]:
    as_rgb(truth.ids).save(folder / "a.png")
    return {"file_name": folder / "a.png", "segments_info": truth.segments}


def panoptic_json(truth: Truth, folder: Path) -> dict[str, Any]:
    (folder / "p").mkdir()
    as_rgb(truth.ids).save(folder / "p" / "a.png")
    entry = {"image_id": truth.image_id, "file_name": "a.png", "segments_info": truth.segments}
    (folder / "p.json").write_text(json.dumps({"annotations": [entry]}))
    return {"file_name": folder / "p.json", "image_id": str(truth.image_id)}


def results(truth: Truth, folder: Path, code: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    common = {"image_id": truth.image_id, "category_id": 1, "score": 0.7}
    entries = [{**common, "segmentation": code(mask)} for mask in truth.masks]
    (folder / "r.json").write_text(json.dumps(entries))
    return {"file_name": folder / "r.json", "image_id": truth.image_id}


def instances(truth: Truth, folder: Path, code: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    entries = [
        {**segment, "image_id": truth.image_id, "segmentation": code(truth.ids == segment["id"])}
        for segment in truth.segments
    ]
    (folder / "i.json").write_text(json.dumps({"images": [], "annotations": entries}))
    return {"file_name": folder / "i.json", "image_id": truth.image_id}


def npz(truth: Truth, folder: Path, key: str) -> dict[str, Any]:
    own = np.where(np.isin(truth.ids, truth.own), truth.ids, 0).astype(np.int32)
    array = {"masks": truth.masks, "ids": own, "bytes": truth.masks.astype(np.uint8) * 255}
    np.savez_compressed(folder / "a.npz", **{"ids" if key == "ids" else "masks": array[key]})
    return {"file_name": folder / "a.npz"}


def grey(truth: Truth, folder: Path, kind: type, factor: int) -> dict[str, Any]:
    """Entities as 1..E in the order of the annotation, where there is no room for large ids."""
    ids = (truth.masks * np.arange(1, len(truth.own) + 1)[:, None, None]).sum(axis=0) * factor
    Image.fromarray(ids.astype(kind)).save(folder / "a.png")
    return {"file_name": folder / "a.png"}


# And which ids come back: those of the annotation in its order or in ascending order, or others.
WRITERS: dict[str, tuple[Callable[[Truth, Path], dict[str, Any]], str]] = {
    "panoptic_png": (panoptic_png, "listed"),
    "panoptic_json": (panoptic_json, "listed"),
    "results, compressed": (partial(results, code=compressed), ""),
    "results, plain": (partial(results, code=plain), ""),
    "results, outlines": (partial(results, code=to_segmentation), ""),
    "instances, compressed": (partial(instances, code=compressed), "listed"),
    "instances, outlines": (partial(instances, code=to_segmentation), "listed"),
    "npz masks": (partial(npz, key="masks"), ""),
    "npz bytes": (partial(npz, key="bytes"), ""),
    "npz ids": (partial(npz, key="ids"), "ascending"),
    "8-bit grey": (partial(grey, kind=np.uint8, factor=1), ""),
    "16-bit grey": (partial(grey, kind=np.uint16, factor=900), ""),
}


def check(truth: Truth, name: str, folder: Path) -> None:
    folder.mkdir()
    write, order = WRITERS[name]
    arguments = write(truth, folder)
    entities = load_entities(height=truth.ids.shape[0], width=truth.ids.shape[1], **arguments)
    masks = truth.masks[np.argsort(truth.own)] if order == "ascending" else truth.masks
    if order:
        expected = sorted(truth.own) if order == "ascending" else truth.own
        assert entities.segment_ids == expected
    np.testing.assert_array_equal(entities.bitmasks(), masks)
    # Void and crowd are no entity.
    np.testing.assert_array_equal(entities.ids == 0, ~truth.masks.any(axis=0))


def drawn(seed: int, split: str, index: int) -> Truth:
    sample = shapes.make_sample(seed, split, index)
    return Truth(sample.image["id"], sample.id_map, sample.panoptic["segments_info"])


@pytest.mark.parametrize("name", WRITERS)
def test_shapes_in_every_format(tmp_path, name):
    for place, (split, index) in enumerate(itertools.product(shapes.SPLITS, range(2))):
        truth = drawn(5, split, index)
        assert len(truth.own) > 3
        check(truth, name, tmp_path / str(place))
        # With a crowd and void pixels, which the scenes have not.
        segments = [{**s, "iscrowd": int(k == 1)} for k, s in enumerate(truth.segments)]
        ids = np.where(truth.ids == truth.own[0], 0, truth.ids)
        check(Truth(truth.image_id, ids, segments[1:]), name, tmp_path / f"{place}-crowd")


def encoded(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def interlaced() -> tuple[np.ndarray, bytes]:
    """An Adam7 RGB file of one pixel's height, which Pillow does not write, and its ids."""
    pixels = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], np.uint8)  # passes 1, 6 and 4
    passes = [pixels[:, 0::8], pixels[:, 2::4], pixels[:, 1::2]]
    raw = zlib.compress(b"".join(b"\0" + part.tobytes() for part in passes))
    header = struct.pack(">IIBBBBB", 3, 1, 8, 2, 0, 0, 1)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", raw), (b"IEND", b"")):
        check_sum = struct.pack(">I", zlib.crc32(name + body))
        data += struct.pack(">I", len(body)) + name + body + check_sum
    r, g, b = pixels.astype(np.int32).transpose(2, 0, 1)
    return r + 256 * g + 65536 * b, data


def pictures_of_ids() -> dict[str, tuple[np.ndarray, bytes]]:
    ids = np.random.default_rng(0).integers(0, 1 << 24, (13, 17)).astype(np.int32)
    palette = Image.fromarray((ids % 256).astype(np.uint8)).convert("L")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    return {
        "rgb": (ids, encoded(as_rgb(ids))),
        "rgba": (ids, encoded(as_rgb(ids).convert("RGBA"))),
        "grey8": (ids % 256, encoded(Image.fromarray((ids % 256).astype(np.uint8)))),
        "grey16": (ids % 65536, encoded(Image.fromarray((ids % 65536).astype(np.uint16)))),
        "palette": (ids % 256, encoded(palette)),
        "interlaced": interlaced(),
    }


@pytest.mark.parametrize("kind", pictures_of_ids())
def test_ids_are_read_from_every_kind_of_png(tmp_path, kind):
    ids, data = pictures_of_ids()[kind]
    (tmp_path / "x.png").write_bytes(data)
    read = read_id_png(tmp_path / "x.png")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)
    for damaged in (data[: len(data) // 2], b"no picture", data[:20]):
        (tmp_path / "x.png").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|no picture"):
            read_id_png(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        read_id_png(tmp_path / "absent.png")

"""Scenes in every format of entity masks, encoded here by the formats' definitions, read back."""

import io
import itertools
import json
import struct
import zlib
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import shapes
from PIL import Image
from pycocotools import mask as coco_mask
from refusals import refused
from shapes_scene import to_segmentation

from gella.entities.files import read_id_png
from gella.entities.sources import load_entities


class Truth(NamedTuple):
    """One image: its ids (0 = void) and its segments in the order of the annotation."""

    image_id: int
    ids: np.ndarray
    segments: list
    own = property(lambda self: [s["id"] for s in self.segments if not s["iscrowd"]])
    masks = property(lambda self: np.stack([self.ids == i for i in self.own]))


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def plain(mask):
    """Run lengths in column order, zeros first."""
    runs = [(value, len(list(pixels))) for value, pixels in itertools.groupby(mask.T.ravel())]
    return {"size": list(mask.shape), "counts": [0] * bool(runs[0][0]) + [n for _, n in runs]}


def as_rgb(ids):
    channels = [ids % 256, ids // 256 % 256, ids // 65536]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def panoptic_png(truth, folder):
    as_rgb(truth.ids).save(folder / "a.png")
    return {"file_name": folder / "a.png", "segments_info": truth.segments}


def panoptic_json(truth, folder):
    (folder / "p").mkdir()
    as_rgb(truth.ids).save(folder / "p" / "a.png")
    entry = {"image_id": truth.image_id, "file_name": "a.png", "segments_info": truth.segments}
    (folder / "p.json").write_text(json.dumps({"annotations": [entry]}))
    return {"file_name": folder / "p.json", "image_id": str(truth.image_id)}


def results(truth, folder, code):
    common = {"image_id": truth.image_id, "category_id": 1, "score": 0.7}
    entries = [{**common, "segmentation": code(mask)} for mask in truth.masks]
    (folder / "r.json").write_text(json.dumps(entries))
    return {"file_name": folder / "r.json", "image_id": truth.image_id}


def instances(truth, folder, code):
    entries = [{**s, "segmentation": code(truth.ids == s["id"])} for s in truth.segments]
    content = {"images": [], "annotations": [{**e, "image_id": truth.image_id} for e in entries]}
    (folder / "i.json").write_text(json.dumps(content))
    return {"file_name": folder / "i.json", "image_id": truth.image_id}


def npz(truth, folder, key):
    own = np.where(np.isin(truth.ids, truth.own), truth.ids, 0).astype(np.int32)
    array = {"masks": truth.masks, "ids": own, "bytes": truth.masks.astype(np.uint8) * 255}
    np.savez_compressed(folder / "a.npz", **{"ids" if key == "ids" else "masks": array[key]})
    return {"file_name": folder / "a.npz"}


def grey(truth, folder, kind, factor):
    """Entities as 1..E in the order of the annotation, where there is no room for large ids."""
    ids = (truth.masks * np.arange(1, len(truth.own) + 1)[:, None, None]).sum(axis=0) * factor
    Image.fromarray(ids.astype(kind)).save(folder / "a.png")
    return {"file_name": folder / "a.png"}


# And which ids come back: those of the annotation in its order or in ascending order, or others.
WRITERS = {
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


def check(truth, name, folder):
    folder.mkdir()
    write, order = WRITERS[name]
    height, width = truth.ids.shape
    entities = load_entities(height=height, width=width, **write(truth, folder))
    ascending = order == "ascending"
    if order:
        assert entities.segment_ids == (sorted(truth.own) if ascending else truth.own)
    masks = truth.masks[np.argsort(truth.own)] if ascending else truth.masks
    np.testing.assert_array_equal(entities.bitmasks(), masks)
    np.testing.assert_array_equal(entities.ids == 0, ~truth.masks.any(axis=0))


@pytest.mark.parametrize("name", WRITERS)
def test_shapes_in_every_format(tmp_path, name):
    for place, (split, index) in enumerate(itertools.product(shapes.SPLITS, range(2))):
        sample = shapes.make_sample(5, split, index)
        truth = Truth(sample.image["id"], sample.id_map, sample.panoptic["segments_info"])
        assert len(truth.own) > 3
        check(truth, name, tmp_path / str(place))
        # With a crowd and void pixels, which the scenes have not.
        segments = [{**s, "iscrowd": int(k == 1)} for k, s in enumerate(truth.segments)]
        ids = np.where(truth.ids == truth.own[0], 0, truth.ids)
        check(Truth(truth.image_id, ids, segments[1:]), name, tmp_path / f"{place}-crowd")


def encoded(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def interlaced():
    """An Adam7 RGB file of one pixel's height, which Pillow does not write, and its ids."""
    pixels = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], np.uint8)  # passes 1, 6 and 4
    passes = [pixels[:, 0::8], pixels[:, 2::4], pixels[:, 1::2]]
    raw = zlib.compress(b"".join(b"\0" + part.tobytes() for part in passes))
    header = struct.pack(">IIBBBBB", 3, 1, 8, 2, 0, 0, 1)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", raw), (b"IEND", b"")):
        check_sum = struct.pack(">I", zlib.crc32(name + body))
        data += struct.pack(">I", len(body)) + name + body + check_sum
    return pixels @ np.array([1, 256, 65536]), data


IDS = np.random.default_rng(0).integers(0, 1 << 24, (13, 17)).astype(np.int32)
GREY = Image.fromarray((IDS % 256).astype(np.uint8))
PALETTE = GREY.copy()
PALETTE.putpalette(list(range(255, -1, -1)) * 3)
PICTURES = {
    "rgb": (IDS, encoded(as_rgb(IDS))),
    "rgba": (IDS, encoded(as_rgb(IDS).convert("RGBA"))),
    "grey8": (IDS % 256, encoded(GREY)),
    "grey16": (IDS % 65536, encoded(Image.fromarray((IDS % 65536).astype(np.uint16)))),
    "palette": (IDS % 256, encoded(PALETTE)),
    "interlaced": interlaced(),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_ids_are_read_from_every_kind_of_png(tmp_path, kind):
    (ids, data), path = PICTURES[kind], tmp_path / "x.png"
    path.write_bytes(data)
    read = read_id_png(path)
    assert read.dtype == np.int32 and np.array_equal(read, ids)
    for damaged in (data[: len(data) // 2], b"no picture", data[:20]):
        path.write_bytes(damaged)
        refused("damaged|no picture", read_id_png, path)
    refused(None, read_id_png, tmp_path / "absent.png", error=FileNotFoundError)

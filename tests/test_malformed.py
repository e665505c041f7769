"""Malformed input of every reader: one clear error that names file and record, or accepted.

`REFUSED` is the table: what is wrong, what reads it, how to spoil the good files of
`malformed_files.py`, and the words that the error must hold: the file, the record, the trouble.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed_files import CAPTION, IDS, SIZE, Files, rgb, rle
from PIL import Image

from gella.entities.sources import load_entities, load_from_record

PANOPTIC, PNG, RESULTS, NPZ = "panoptic.json", "42.png", "results.json", "42.npz"
REFS, INSTANCES = "refs(unc).p", "instances.json"
CAPTIONS, NARRATIVES = "captions.jsonl", "narratives.json"
NAN = float("nan")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update(values)


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.pop(key)


def cut(name: str) -> Callable[[Files], None]:
    return lambda files: files.later(name, half)


def whole(name: str, content: Any) -> Callable[[Files], None]:
    return lambda files: files.contents.update({name: content})


def panoptic(change: Callable[[Any], Any], *keys: Any) -> Callable[[Files], None]:
    """Change the panoptic file, or the entry below it that the keys lead to."""

    def spoil(files: Files) -> None:
        entry: Any = files.contents[PANOPTIC]
        for key in keys:
            entry = entry[key]
        change(entry)

    return spoil


def segment(change: Callable[[Any], Any]) -> Callable[[Files], None]:
    """Change the first panoptic segment of image 42."""
    return lambda files: change(files.segment())


def last(name: str, change: Callable[[Any], Any], *keys: Any) -> Callable[[Files], None]:
    """Change the last entry of a file that is a list, or what lies below it."""

    def spoil(files: Files) -> None:
        entry: Any = files.contents[name][-1]
        for key in keys:
            entry = entry[key]
        change(entry)

    return spoil


def replace_last(name: str, value: Any) -> Callable[[Files], None]:
    def spoil(files: Files) -> None:
        files.contents[name][-1] = value

    return spoil


def twice(*keys: Any) -> Callable[[Files], None]:
    """Repeat the last entry of a list below the panoptic file."""

    return panoptic(lambda entries: entries.append(dict(entries[-1])), *keys)


def picture(image: Image.Image | bytes, **options: Any) -> Callable[[Files], None]:
    """Put another file in the place of the panoptic PNG of image 42."""

    def spoil(files: Files) -> None:
        if isinstance(image, bytes):
            files.png.write_bytes(image)
        else:
            image.save(files.png, **{"format": "PNG", **options})

    return spoil


def deep_png() -> bytes:
    """An RGB PNG with 16 bits per colour, which Pillow would cut to 8 without a word."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = b"".join(b"\0" + bytes(6 * SIZE[1]) for _ in range(SIZE[0]))
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def palette() -> Image.Image:
    image = Image.fromarray((IDS % 251).astype(np.uint8))
    image.putpalette(list(range(256)) * 3)
    return image


def bitten(data: bytes) -> bytes:
    """One byte of the pixels of the last chunk changed, behind an intact header."""
    place = data.rindex(b"IDAT") + 12
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


def outline(*parts: list[float]) -> Callable[[Files], None]:
    return last(RESULTS, put(segmentation=list(parts)))


def npz(**arrays: Any) -> Callable[[Files], None]:
    def spoil(files: Files) -> None:
        files.npz = arrays

    return spoil


def masks(**more: Any) -> dict[str, Any]:
    return {"masks": np.stack([IDS == 300, IDS == 9]), **more}


class Payload:
    """Asks the reader of a pickle to run a shell command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def pickled(files: Files) -> None:
    files.contents[REFS].append(Payload())


def not_utf8(name: str) -> Callable[[Files], None]:
    return lambda files: files.later(name, lambda data: data.replace(b"dog", b"d\xf6g", 1))


def insert_line(files: Files) -> None:
    files.later(CAPTIONS, lambda data: data.replace(b"\n", b"\n{oops\n", 1))


Case = tuple[str, str, Callable[[Files], None], tuple[str, ...]]
REFUSED: list[Case] = [
    # -- COCO panoptic JSON
    ("cut in the middle", "panoptic", cut(PANOPTIC), (PANOPTIC, "char", "not a JSON file")),
    ("no UTF-8", "panoptic", not_utf8(PANOPTIC), (PANOPTIC, "position", "not a JSON file")),
    ("a list", "panoptic", whole(PANOPTIC, [1]), (PANOPTIC, "'categories'")),
    ("text", "panoptic", whole(PANOPTIC, "hello"), (PANOPTIC, "'categories'")),
    ("no categories", "panoptic", panoptic(drop("categories")), (PANOPTIC, "'categories'")),
    ("images a dict", "panoptic", panoptic(put(images={})), (PANOPTIC, "'images'", "list")),
    ("no annotation", "panoptic", panoptic(put(annotations=[])), (PANOPTIC, "no annotation")),
    ("annotation a number", "panoptic", panoptic(put(annotations=[5])), (PANOPTIC, "annotation 0")),
    ("category twice", "panoptic", twice("categories"), (PANOPTIC, "category id 5", "twice")),
    (
        "isthing in words",
        "panoptic",
        panoptic(put(isthing="no"), "categories", 1),
        (PANOPTIC, "category 5", "isthing", "'no'"),
    ),
    ("image twice", "panoptic", twice("images"), (PANOPTIC, "image id 42", "twice")),
    ("annotated twice", "panoptic", twice("annotations"), (PANOPTIC, "image 42", "twice")),
    (
        "unknown image",
        "panoptic",
        panoptic(put(image_id=77), "annotations", 1),
        (PANOPTIC, "image 77", "not in 'images'"),
    ),
    (
        "no file name",
        "panoptic",
        panoptic(drop("file_name"), "annotations", 1),
        (PANOPTIC, "image 42", "'file_name'"),
    ),
    (
        "height in words",
        "panoptic",
        panoptic(put(height="tall"), "images", 1),
        (PANOPTIC, "image 42", "'height'", "'tall'"),
    ),
    (
        "no height",
        "panoptic",
        panoptic(put(height=0), "images", 1),
        (PANOPTIC, "image 42", "'height'", "0"),
    ),
    (
        "segments a dict",
        "panoptic",
        panoptic(put(segments_info={}), "annotations", 1),
        (PANOPTIC, "image 42", "segments_info", "list"),
    ),
    (
        "unknown category",
        "panoptic",
        segment(put(category_id=8)),
        (PANOPTIC, "image 42", "300", "8"),
    ),
    (
        "no category",
        "panoptic",
        segment(drop("category_id")),
        (PANOPTIC, "image 42", "segment 300"),
    ),
    ("segment twice", "panoptic", segment(put(id=9)), (PANOPTIC, "image 42", "id 9", "twice")),
    ("id in words", "panoptic", segment(put(id="x1")), (PANOPTIC, "image 42", "'x1'")),
    ("id a fraction", "panoptic", segment(put(id=9.5)), (PANOPTIC, "image 42", "9.5")),
    ("negative id", "panoptic", segment(put(id=-300)), (PANOPTIC, "image 42", "-300")),
    ("id of void", "panoptic", segment(put(id=0)), (PANOPTIC, "image 42", "'id' is 0")),
    ("no id", "panoptic", segment(drop("id")), (PANOPTIC, "image 42", "'id'")),
    ("crowd as text", "panoptic", segment(put(iscrowd="0")), (PANOPTIC, "image 42", "300", "'0'")),
    ("area as text", "panoptic", segment(put(area="24")), (PANOPTIC, "image 42", "300", "'24'")),
    ("area NaN", "panoptic", segment(put(area=NAN)), (PANOPTIC, "image 42", "300", "nan")),
    (
        "box as text",
        "panoptic",
        segment(put(bbox=["7", "6", "8", "3"])),
        (PANOPTIC, "image 42", "300", "bbox"),
    ),
    ("box too short", "panoptic", segment(put(bbox=[7, 6])), (PANOPTIC, "image 42", "300", "bbox")),
    # -- panoptic PNG
    ("missing", "png", lambda files: files.png.unlink(), (PNG, "image 42", "does not exist")),
    ("truncated", "png", cut("panoptic/42.png"), (PNG, "image 42", "truncated")),
    (
        "one byte changed",
        "png",
        lambda f: f.later("panoptic/42.png", bitten),
        (PNG, "image 42", "damaged"),
    ),
    ("no picture", "png", picture(b"<html>"), (PNG, "image 42", "no picture")),
    ("grey", "png", picture(Image.fromarray(IDS.astype(np.uint8))), (PNG, "image 42", "mode is L")),
    (
        "grey of 16 bits",
        "png",
        picture(Image.fromarray(IDS.astype(np.uint16))),
        (PNG, "image 42", "mode is I;16", "RGB"),
    ),
    ("colours of 16 bits", "png", picture(deep_png()), (PNG, "image 42", "16 bits")),
    ("palette", "png", picture(palette()), (PNG, "image 42", "mode is P")),
    (
        "with alpha",
        "png",
        picture(Image.fromarray(rgb(IDS)).convert("RGBA")),
        (PNG, "image 42", "mode is RGBA"),
    ),
    ("a JPEG", "png", picture(Image.fromarray(rgb(IDS)), format="JPEG"), (PNG, "image 42", "JPEG")),
    ("turned", "png", picture(Image.fromarray(rgb(IDS.T))), (PNG, "image 42", "12x17", "17x12")),
    (
        "sides swapped in the JSON",
        "png",
        panoptic(put(height=17, width=12), "images", 1),
        (PNG, "image 42", "17x12", "12x17"),
    ),
    (
        "id that the JSON lacks",
        "png",
        panoptic(lambda segments: segments.pop(), "annotations", 1, "segments_info"),
        (PNG, "image 42", "[70000]"),
    ),
    ("segment without a pixel", "png", segment(put(id=301, area=0)), (PNG, "image 42", "[301]")),
    (
        "all void",
        "png",
        lambda f: [
            picture(Image.fromarray(rgb(IDS * 0)))(f),
            panoptic(put(segments_info=[]), "annotations", 1)(f),
        ],
        (PNG, "image 42", "no entity"),
    ),
    # -- COCO results
    ("cut", "results", cut(RESULTS), (RESULTS, "image 42", "not a JSON file")),
    ("a dict", "results", whole(RESULTS, {"annotations": []}), (RESULTS, "image 42", "list")),
    ("an empty list", "results", whole(RESULTS, []), (RESULTS, "image 42", "0 others")),
    (
        "other images",
        "results",
        lambda f: [last(RESULTS, put(image_id=43))(f), f.contents[RESULTS].pop(0)],
        (RESULTS, "image 42", "1 others"),
    ),
    ("no image id", "results", last(RESULTS, drop("image_id")), (RESULTS, "entry 1", "image_id")),
    ("image id a list", "results", last(RESULTS, put(image_id=[42])), (RESULTS, "entry 1")),
    ("an entry null", "results", replace_last(RESULTS, None), (RESULTS, "entry 1")),
    ("no mask", "results", last(RESULTS, drop("segmentation")), (RESULTS, "image 42", "result 1")),
    (
        "mask null",
        "results",
        last(RESULTS, put(segmentation=None)),
        (RESULTS, "image 42", "result 1"),
    ),
    (
        "score NaN",
        "results",
        last(RESULTS, put(score=NAN)),
        (RESULTS, "image 42", "result 1", "nan"),
    ),
    ("score text", "results", last(RESULTS, put(score="0.5")), (RESULTS, "image 42", "result 1")),
    ("score null", "results", last(RESULTS, put(score=None)), (RESULTS, "image 42", "result 1")),
    (
        "run lengths of another size",
        "results",
        last(RESULTS, put(segmentation=rle(np.ones((3, 4))))),
        (RESULTS, "image 42", "result 1", "4x3", "17x12"),
    ),
    (
        "size text",
        "results",
        last(RESULTS, put(size="12x17"), "segmentation"),
        (RESULTS, "result 1"),
    ),
    ("no counts", "results", last(RESULTS, drop("counts"), "segmentation"), (RESULTS, "'counts'")),
    (
        "run lengths cut",
        "results",
        last(RESULTS, lambda code: code.update(counts=code["counts"][:3]), "segmentation"),
        (RESULTS, "image 42", "result 1", "of 204 pixels"),
    ),
    (
        "run lengths no text of COCO",
        "results",
        last(RESULTS, put(counts="\x01\x02"), "segmentation"),
        (RESULTS, "image 42", "result 1", "damaged"),
    ),
    (
        "negative run",
        "results",
        last(RESULTS, put(counts=[-4, 208]), "segmentation"),
        (RESULTS, "image 42", "result 1"),
    ),
    (
        "polygon outside",
        "results",
        outline([20, 1, 25, 1, 25, 5]),
        (RESULTS, "result 1", "outside"),
    ),
    (
        "polygon far away",
        "results",
        outline([0, 0, 1e9, 0, 5, 5]),
        (RESULTS, "result 1", "outside"),
    ),
    (
        "polygon of odd length",
        "results",
        outline([1, 1, 5, 1, 5]),
        (RESULTS, "result 1", "polygon"),
    ),
    ("polygon NaN", "results", outline([1, 1, 5, NAN, 5, 5]), (RESULTS, "result 1", "finite")),
    (
        "only empty masks",
        "results",
        whole(RESULTS, [{"image_id": 42, "segmentation": [], "score": 1}]),
        (RESULTS, "image 42", "no entity"),
    ),
    # -- npz
    ("cut npz", "npz", cut(NPZ), (NPZ, "image 42", "truncated")),
    (
        "no archive",
        "npz",
        lambda f: f.later(NPZ, lambda _: b"masks"),
        (NPZ, "image 42", "truncated"),
    ),
    ("no arrays", "npz", npz(), (NPZ, "image 42", "neither 'masks'")),
    ("other arrays", "npz", npz(picture=IDS), (NPZ, "image 42", "picture")),
    ("pickled", "npz", npz(masks=np.array([Payload()], object)), (NPZ, "image 42", "pickle")),
    ("float masks", "npz", npz(masks=np.ones((1, *SIZE))), (NPZ, "image 42", "float64")),
    ("flat masks", "npz", npz(masks=IDS > 0), (NPZ, "image 42", "(12, 17)")),
    (
        "wide masks",
        "npz",
        npz(masks=np.ones((1, 12, 18), bool)),
        (NPZ, "image 42", "18x12", "17x12"),
    ),
    ("no masks", "npz", npz(masks=np.ones((0, *SIZE), bool)), (NPZ, "image 42", "no entity")),
    ("float ids", "npz", npz(ids=IDS.astype(float)), (NPZ, "image 42", "float64")),
    ("negative ids", "npz", npz(ids=IDS - 1), (NPZ, "image 42", "-1")),
    ("scores NaN", "npz", npz(**masks(scores=[0.5, NAN])), (NPZ, "image 42", "score 1", "finite")),
    (
        "too few scores",
        "npz",
        npz(**masks(scores=[0.5])),
        (NPZ, "image 42", "2 entities", "scores"),
    ),
    ("scores text", "npz", npz(**masks(scores=["a", "b"])), (NPZ, "image 42", "scores")),
    # -- RefCOCO
    ("runs code", "refs", pickled, (REFS, "refused", "system")),
    ("cut refs", "refs", cut(REFS), (REFS, "refused")),
    (
        "no pickle",
        "refs",
        lambda f: f.later(REFS, lambda _: b"\x80\x02}q\x00Rx"),
        (REFS, "refused"),
    ),
    ("refs a dict", "refs", whole(REFS, {"refs": []}), (REFS, "dict")),
    ("refs empty", "refs", whole(REFS, []), (REFS, "no ref", "'val'")),
    ("ref a number", "refs", replace_last(REFS, 5), (REFS, "ref 1")),
    ("other split", "refs", whole(REFS, [{"split": "train"}]), (REFS, "'val'", "train")),
    (
        "unknown object",
        "refs",
        last(REFS, put(ann_id=8)),
        (REFS, "ref 542", "object 8", "image 42"),
    ),
    ("unknown image of a ref", "refs", last(REFS, put(image_id=8)), (REFS, "ref 542", "image 8")),
    ("no sentences", "refs", last(REFS, drop("sentences")), (REFS, "ref 542", "'sentences'")),
    (
        "sentence without words",
        "refs",
        last(REFS, lambda sentences: sentences[0].pop("sent"), "sentences"),
        (REFS, "ref 542", "'sent'"),
    ),
    # -- COCO instances
    (
        "instance of no image",
        "refs",
        lambda f: f.annotation(INSTANCES).update(image_id=8),
        (INSTANCES, "annotation 42001", "image 8"),
    ),
    (
        "instance twice",
        "instances",
        lambda f: f.annotation(INSTANCES).update(id=42000),
        (INSTANCES, "annotation id 42000", "twice"),
    ),
    (
        "instance without a mask",
        "instances",
        lambda f: f.annotation(INSTANCES).pop("segmentation"),
        (INSTANCES, "annotation 42001", "'segmentation'"),
    ),
    (
        "instance of another size",
        "masks of refs",
        lambda f: f.annotation(INSTANCES).update(segmentation=rle(np.ones((5, 5)))),
        (INSTANCES, "image 42", "segment 42001", "5x5", "17x12"),
    ),
    (
        "instance outside",
        "masks of refs",
        lambda f: f.annotation(INSTANCES).update(segmentation=[[-9, -9, -5, -9, -5, -5]]),
        (INSTANCES, "image 42", "segment 42001", "outside"),
    ),
    # -- captions
    ("line no JSON", "captions", insert_line, (CAPTIONS, "line 2", "no JSON")),
    ("line no UTF-8", "captions", not_utf8(CAPTIONS), (CAPTIONS, "position", "UTF-8")),
    ("line a list", "captions", replace_last(CAPTIONS, [1]), (CAPTIONS, "caption 2")),
    (
        "nouns a text",
        "captions",
        last(CAPTIONS, put(nouns="dog")),
        (CAPTIONS, "image 42", "'nouns'"),
    ),
    (
        "noun a number",
        "captions",
        last(CAPTIONS, put(nouns=[5])),
        (CAPTIONS, "image 42", "noun 0", "5"),
    ),
    (
        "noun empty",
        "captions",
        last(CAPTIONS, put(nouns=["a dog", " "])),
        (CAPTIONS, "image 42", "noun 1"),
    ),
    (
        "description null",
        "captions",
        last(CAPTIONS, put(description=None)),
        (CAPTIONS, "image 42", "'description'"),
    ),
    (
        "caption of no image",
        "captions",
        last(CAPTIONS, put(image_id=8)),
        (CAPTIONS, "image 8", PANOPTIC),
    ),
    (
        "caption of another file",
        "captions",
        last(CAPTIONS, put(file_name="cat.png")),
        (CAPTIONS, "image 42", "cat.png"),
    ),
    # -- narratives
    ("narratives cut", "narratives", cut(NARRATIVES), (NARRATIVES, "char", "not a JSON file")),
    ("narratives a dict", "narratives", whole(NARRATIVES, {"a": 1}), (NARRATIVES, "dict")),
    ("narrative a number", "narratives", replace_last(NARRATIVES, 5), (NARRATIVES, "narrative 1")),
    (
        "narrative of no image",
        "narratives",
        last(NARRATIVES, put(image_id="8")),
        (NARRATIVES, "image 8", PANOPTIC),
    ),
    (
        "no caption",
        "narratives",
        last(NARRATIVES, put(caption=None)),
        (NARRATIVES, "image 42", "'caption'"),
    ),
    ("no segments", "narratives", last(NARRATIVES, drop("segments")), (NARRATIVES, "image 42")),
    (
        "unknown segment",
        "narratives",
        last(NARRATIVES, put(segment_ids=["301"]), "segments", 0),
        (NARRATIVES, "image 42", "segment id 301"),
    ),
    (
        "segment ids a text",
        "narratives",
        last(NARRATIVES, put(segment_ids="300"), "segments", 0),
        (NARRATIVES, "image 42", "'segment_ids'"),
    ),
    (
        "negative segment id",
        "narratives",
        last(NARRATIVES, put(segment_ids=["-300"]), "segments", 0),
        (NARRATIVES, "image 42", "-300"),
    ),
    (
        "utterance a number",
        "narratives",
        last(NARRATIVES, put(utterance=5), "segments", 0),
        (NARRATIVES, "image 42", "'utterance'"),
    ),
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    folder = tmp_path / "data"  # a name that no error is asked for
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Files(folder)


READERS = ("panoptic", "png", "results", "npz", "refs", "masks of refs", "instances")
READERS += ("captions", "narratives")


@pytest.mark.parametrize("what", READERS)
def test_the_files_are_good_before_they_are_spoiled(files: Files, what: str) -> None:
    assert len(files.read(what)) == (1 if what in ("results", "npz") else 2)


def test_the_table_is_long_and_has_no_case_twice() -> None:
    assert len({(what, name) for name, what, _, _ in REFUSED}) == len(REFUSED) >= 30


@pytest.mark.parametrize("case", REFUSED, ids=[f"{what}: {name}" for name, what, _, _ in REFUSED])
def test_one_clear_error(files: Files, case: Case) -> None:
    _, what, spoil, words = case
    spoil(files)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        files.read(what)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    # The folder has none of the words: they are said by the error itself.
    said = text.replace(str(files.folder), "")
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in: {text}"
    assert not (files.folder / "owned").exists()


# -- what looks wrong and is accepted ----------------------------------------------------------


def test_ids_may_be_text_or_numbers(files: Files) -> None:
    """PNG writes ids as text and COCO as numbers; both name the same."""
    content = files.contents[PANOPTIC]
    for entry in (*content["images"], *content["annotations"]):
        key = "id" if "id" in entry else "image_id"
        entry[key] = str(entry[key])
    files.segment().update(id="300", category_id="3")
    files.contents[CAPTIONS][1]["image_id"] = "42"
    files.contents[RESULTS][0]["image_id"] = "42"
    files.contents[NARRATIVES][1]["image_id"] = 42
    files.contents[NARRATIVES][1]["segments"][0]["segment_ids"] = [300]
    assert [entities.segment_ids for entities in files.read("png")] == [[300, 9, 70000]] * 2
    assert len(files.read("captions")) == len(files.read("narratives")) == 2
    assert files.read("narratives")[1]["phrases"][0]["segment_ids"] == [300]
    assert files.read("results")[0].num_entities == 2


def test_a_noun_that_is_not_in_its_description_is_counted(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.contents[CAPTIONS][1]["nouns"] = ["A dog", "a zebra"]
    with caplog.at_level(logging.WARNING, logger="gella"):
        record = files.read("captions")[1]
    spans = [(p["text"], p["start"], p["end"]) for p in record["phrases"]]
    assert spans == [("A dog", 0, 5), ("a zebra", -1, -1)]
    assert CAPTIONS in caplog.text and "1 phrases" in caplog.text


def test_a_polygon_is_clipped_to_the_image(files: Files) -> None:
    files.contents[RESULTS][1]["segmentation"] = [[14, 3, 20, 3, 20, 6, 14, 6], [1, 1, 2, 2]]
    (entities,) = files.read("results")
    expected = np.zeros(SIZE, bool)
    expected[3:6, 14:] = True
    np.testing.assert_array_equal(entities.bitmasks()[1], expected)


def test_a_mask_without_a_pixel_is_no_entity(files: Files) -> None:
    files.contents[RESULTS][1]["segmentation"] = rle(np.zeros(SIZE))
    files.annotation(INSTANCES)["segmentation"] = []
    assert [entities.segment_ids for entities in files.read("results")] == [[1]]
    assert [e.segment_ids for e in files.read("masks of refs")] == [[41000, 41001], [42000]]


def test_a_palette_or_16_bits_are_fine_for_grey_ids(files: Files) -> None:
    palette().save(files.png)
    entities = load_entities(files.png, *SIZE, format="gray_png")
    assert entities.segment_ids == [9, 49, 222]  # 300 and 70000 modulo 251
    Image.fromarray((IDS % 65536).astype(np.uint16)).save(files.png)
    assert load_entities(files.png, *SIZE, format="gray_png").segment_ids == [9, 300, 4464]


def test_areas_and_boxes_may_be_absent(files: Files) -> None:
    for key in ("area", "bbox", "iscrowd"):
        files.segment().pop(key)
    assert len(files.read("png")) == 2


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([{"category_id": 3}], "entry 0 of segments_info has no 'id'"),
        (["300"], "entry 0 of segments_info has no 'id'"),
        ([{"id": None}], "id of entry 0 of segments_info is None"),
        ([{"id": 300, "iscrowd": "0"}], "segment 300: iscrowd is '0'"),
        ([{"id": 0}], "lists id 0"),
        ({"300": {}}, "segments_info is a dict"),
    ],
)
def test_segments_of_an_own_record(files: Files, segments: Any, message: str) -> None:
    """Records that come from a user's own reader are checked where they are used."""
    place = {"format": "panoptic_png", "file_name": str(files.png), "segments_info": segments}
    record = {"image_id": 42, "height": SIZE[0], "width": SIZE[1], "entities": place}
    with pytest.raises(ValueError, match=rf"image 42, entity file .*42\.png: .*{message}"):
        load_from_record(record)


def test_a_pickle_never_runs_code(files: Files) -> None:
    """By any way that a pickle has to name a function, in every protocol."""
    ways = [pickle.dumps([Payload()], protocol) for protocol in range(6)]
    ways += [b"cos\nsystem\n(S'touch owned'\ntR.", b"(S'touch owned'\nios\nsystem\n."]
    ways += [b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R."]
    ways += [b"\x82\x01.", b"P1\n.", b"\x80\x02]q\x00b.", b"I1\n)R.", b"\x8a\xff" + b"\xff" * 9]
    for data in ways:
        files.after = [lambda data=data: files.path(REFS).write_bytes(data)]  # type: ignore
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p: refused") as caught:
            files.read("refs")
        assert "\n" not in str(caught.value)
    assert not Path("owned").exists()


def test_every_cut_of_a_png_is_told_and_every_bit_flipped(files: Files) -> None:
    data = files.png.read_bytes()
    for place in range(len(data)):
        flipped = bytes([data[place] ^ (1 << place % 8)])
        for bad in (data[:place], data[:place] + flipped + data[place + 1 :]):
            files.png.write_bytes(bad)
            with pytest.raises(ValueError, match=r"42\.png: (truncated|damaged|no picture)"):
                load_entities(files.png, *SIZE, format="panoptic_png")
    files.png.write_bytes(data + b"more")  # what follows the end is nobody's
    assert load_entities(files.png, *SIZE).num_entities == 3


def test_every_cut_of_an_npz_is_told(files: Files) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, masks=np.stack([IDS == 300, IDS == 9]))
    for end in range(0, len(buffer.getvalue()), 5):
        files.path(NPZ).write_bytes(buffer.getvalue()[:end])
        with pytest.raises(ValueError, match=r"42\.npz"):
            load_entities(files.path(NPZ), *SIZE)


def test_errors_hold_the_words_of_the_file_not_of_the_caption(files: Files) -> None:
    """The good files hold what the table looks for nowhere but in the spoiled place."""
    text = json.dumps(files.contents[NARRATIVES])
    assert CAPTION in text and "301" not in text

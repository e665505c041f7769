"""Malformed input of every reader: one clear error that names file and record, or accepted.

A small dataset in every format is spoiled in one place at a time; image 41 stays good.
"""

import json
import logging
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from gella import load_config
from gella.captions.run import open_captions
from gella.data import register as datasets
from gella.data.entityseg import load_entityseg
from gella.entities.entity_map import id_to_rgb
from gella.entities.rle import encode_mask
from gella.entities.sources import load_entities, load_from_record

SIZE = (12, 17)
IDS = np.zeros(SIZE, np.int32)
IDS[1:5, 2:9], IDS[6:9, 7:15], IDS[10:, :6] = 70000, 300, 9
CAPTION = "A dog and a bush, with a second dog."
PNG = "panoptic/42.png"
DROP, NAN = object(), float("nan")


def contents():
    images = [{"id": i, "file_name": f"{i}.png", "height": 12, "width": 17} for i in (41, 42)]
    segments = [
        {"id": 300, "category_id": 3, "iscrowd": 0, "area": 24, "bbox": [7, 6, 8, 3]},
        {"id": 9, "category_id": 5, "iscrowd": 0, "area": 12, "bbox": [0, 10, 6, 2]},
        {"id": 70000, "category_id": 3, "iscrowd": 0, "area": 28, "bbox": [2, 1, 7, 4]},
    ]
    said = [("a dog", [300]), ("and", []), ("a bush", [9]), (", with", [])]
    said += [("a second dog", [70000]), (".", [])]
    narrative = [
        {"utterance": t, "segment_ids": [str(i) for i in s], "plural": False, "noun": bool(s)}
        for t, s in said
    ]
    named = {"file_name": "{}.png", "description": CAPTION, "nouns": ["A dog", "a bush"]}
    sentence = {"sent_id": 1, "sent": "dog below", "raw": "Dog below", "tokens": ["dog", "below"]}
    outlined = {"category_id": 1, "iscrowd": 0, "bbox": [0, 0, 1, 1]}
    masks = [encode_mask(IDS == i) for i in (300, 9)]
    content = {
        "panoptic.json": {
            "images": images,
            "annotations": [
                {"image_id": i, "file_name": f"{i}.png", "segments_info": segments}
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
            {**named, "image_id": i, "file_name": f"{i}.png", "model": "m", "prompt_id": 0}
            for i in (41, 42)
        ],
        "instances.json": {
            "images": images,
            "annotations": [
                {**outlined, "id": 1000 * i + k, "image_id": i, "segmentation": mask}
                for i in (41, 42)
                for k, mask in enumerate(masks)
            ],
        },
        "refs(unc).p": [
            {"ref_id": 500 + i, "ann_id": 1000 * i, "image_id": i, "split": "val"}
            | {"category_id": 1, "sentences": [sentence]}
            for i in (41, 42)
        ],
        "results.json": [
            {"image_id": 42, "category_id": 1, "segmentation": mask, "score": 0.5} for mask in masks
        ],
    }
    return json.loads(json.dumps(content))  # nothing shared: each case spoils one place


class Files:
    """The dataset: contents to change, files written on reading, and a reader of each kind."""

    def __init__(self, folder):
        self.folder, self.contents, self.after = folder, contents(), []
        self.npz = {"masks": np.stack([IDS == 300, IDS == 9])}
        self.png = folder / PNG
        for name in ("panoptic", "images"):
            (folder / name).mkdir()
        for name in ("41.png", "42.png"):
            Image.fromarray(id_to_rgb(IDS)).save(folder / "panoptic" / name)
            Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "images" / name)

    def read(self, what):
        folder = self.folder
        for name, content in self.contents.items():
            if name.endswith(".jsonl"):
                (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in content))
            elif name.endswith(".p"):
                (folder / name).write_bytes(pickle.dumps(content, 2))
            else:
                (folder / name).write_text(json.dumps(content))
        np.savez(folder / "42.npz", **self.npz)
        for change in self.after:
            change()
        panoptic = (folder / "panoptic.json", folder / "panoptic", folder / "images")
        captions, images = folder / "captions.jsonl", panoptic[2]
        readers = {
            "panoptic": lambda: datasets.load_coco_panoptic(*panoptic),
            "narratives": lambda: datasets.load_png(folder / "narratives.json", *panoptic),
            "captions": lambda: datasets.load_captions(captions, *panoptic),
            "refs": lambda: datasets.load_refcoco(self.folder, "unc", "val", images),
            "instances": lambda: load_entityseg(folder / "instances.json", captions, images),
            "png": lambda: map(load_from_record, readers["panoptic"]()),
            "masks": lambda: map(load_from_record, readers["refs"]()),
            "results": lambda: [load_entities(folder / "results.json", *SIZE, image_id=42)],
            "npz": lambda: [load_entities(folder / "42.npz", *SIZE, image_id=42)],
        }
        return list(readers[what]())


Spoil = Callable[[Files], Any]


def at(file, *place):
    """Set, or `DROP`, what lies at some keys of a file: ``at(file, key, ..., key, value)``."""
    *keys, last, value = place

    def spoil(files):
        entry = files.contents[file]
        for key in keys:
            entry = entry[key]
        if value is DROP:
            del entry[last]
        else:
            entry[last] = value

    return spoil


p = partial(at, "panoptic.json")
s = partial(p, "annotations", 1, "segments_info", 0)  # the first panoptic segment of image 42
r = partial(at, "results.json", -1)  # and the last entry of the others
i = partial(at, "instances.json", "annotations", -1)
n = partial(at, "narratives.json", -1)
said = partial(n, "segments", 0)
c = partial(at, "captions.jsonl", -1)


def whole(file, content):
    return lambda files: files.contents.update({file: content})


def twice(*keys):
    return lambda f: f.contents["panoptic.json"][keys[0]].append(
        dict(f.contents["panoptic.json"][keys[0]][-1])
    )


def later(file, change):
    return lambda f: f.after.append(
        lambda: (f.folder / file).write_bytes(change((f.folder / file).read_bytes()))
    )


def cut(file):
    return later(file, lambda data: data[: len(data) // 2])


def not_utf8(file):
    return later(file, lambda data: data.replace(b"dog", b"d\xf6g", 1))


def picture(image, format="PNG"):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return lambda f: image.save(f.png, format=format)


def npz(**arrays):
    return lambda f: setattr(f, "npz", arrays)


def both(*spoils):
    return lambda f: [spoil(f) for spoil in spoils]


def palette():
    image = Image.fromarray((IDS % 251).astype(np.uint8))
    image.putpalette(list(range(256)) * 3)
    return image


def bitten(data):
    place = data.rindex(b"IDAT") + 12
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


class Payload:
    """Asks the reader of a pickle to run a shell command."""

    def __reduce__(self):
        return os.system, ("touch owned",)


MASKS = {"masks": np.stack([IDS == 300, IDS == 9])}
VOID = id_to_rgb(IDS * 0)
SMALL, BESIDE = encode_mask(np.ones((5, 5))), [[-9, -9, -5, -9, -5, -5]]
CAPTIONS, NARRATIVES = "captions.jsonl", "narratives.json"
REFS = "refs(unc).p"
# Reader, spoiler, and the words of the error, at least one of them behind each bar.
REFUSED = [
    ("panoptic", cut("panoptic.json"), "panoptic.json|char|not a JSON file"),
    ("panoptic", not_utf8("panoptic.json"), "panoptic.json|position|not a JSON file"),
    ("panoptic", whole("panoptic.json", [1]), "panoptic.json|'categories'"),
    ("panoptic", whole("panoptic.json", "hello"), "panoptic.json|no field 'categories'"),
    ("panoptic", p("categories", DROP), "panoptic.json|the file|'categories'"),
    ("panoptic", p("images", {}), "panoptic.json|'images'|list"),
    ("panoptic", p("annotations", []), "panoptic.json|no annotation"),
    ("panoptic", p("annotations", [5]), "panoptic.json|annotation 0"),
    ("panoptic", twice("categories"), "panoptic.json|category id 5|twice"),
    ("panoptic", p("categories", 1, "name", "Dog "), "panoptic.json|categories 3 and 5|'Dog '"),
    ("panoptic", p("categories", 1, "name", 5), "panoptic.json|'name' is '5'"),
    ("panoptic", p("images", 1, "id", None), "panoptic.json|entry 1|'id' is None"),
    ("panoptic", p("categories", 1, "isthing", "no"), "panoptic.json|category 5|isthing|'no'"),
    ("panoptic", twice("images"), "panoptic.json|image id 42|twice"),
    ("panoptic", twice("annotations"), "panoptic.json|image 42|twice"),
    ("panoptic", p("annotations", 1, "image_id", 77), "panoptic.json|image 77|not in 'images'"),
    ("panoptic", p("annotations", 1, "file_name", DROP), "panoptic.json|image 42|'file_name'"),
    ("panoptic", p("images", 1, "height", "tall"), "panoptic.json|image 42|'height'|'tall'"),
    ("panoptic", p("images", 1, "height", 0), "panoptic.json|image 42|'height'|0"),
    ("panoptic", p("annotations", 1, "segments_info", {}), "image 42|segments_info|list"),
    ("panoptic", s("category_id", 8), "panoptic.json|image 42|300|8"),
    ("panoptic", s("category_id", DROP), "panoptic.json|image 42|segment 300"),
    ("panoptic", s("id", 9), "panoptic.json|image 42|id 9|twice"),
    ("panoptic", s("id", "x1"), "panoptic.json|image 42|'x1'"),
    ("panoptic", s("id", 9.5), "panoptic.json|image 42|9.5"),
    ("panoptic", s("id", -300), "panoptic.json|image 42|-300"),
    ("panoptic", s("id", 0), "panoptic.json|image 42|'id' is 0"),
    ("panoptic", s("id", DROP), "panoptic.json|image 42|no field 'id'"),
    ("panoptic", s("iscrowd", "0"), "panoptic.json|image 42|300|iscrowd is '0'"),
    ("panoptic", s("area", "24"), "panoptic.json|image 42|300|'24'"),
    ("panoptic", s("area", NAN), "panoptic.json|image 42|300|nan"),
    ("panoptic", s("bbox", ["7", "6", "8", "3"]), "panoptic.json|image 42|300|bbox is ['7'"),
    ("panoptic", s("bbox", [7, 6]), "panoptic.json|image 42|300|bbox is [7, 6]"),
    ("png", lambda f: f.png.unlink(), "42.png|image 42|does not exist"),
    ("png", cut(PNG), "42.png|image 42|truncated"),
    ("png", later(PNG, bitten), "42.png|image 42|damaged"),
    ("png", later(PNG, lambda _: b"<html>"), "42.png|image 42|no picture"),
    ("png", picture(IDS.astype(np.uint8)), "42.png|image 42|mode is L, expected RGB"),
    ("png", picture(IDS.astype(np.uint16)), "42.png|image 42|mode is I;16|RGB"),
    ("png", picture(palette()), "42.png|image 42|mode is P"),
    ("png", picture(np.dstack([id_to_rgb(IDS), (IDS % 7).astype(np.uint8)])), "mode is RGBA"),
    ("png", picture(id_to_rgb(IDS), "JPEG"), "42.png|image 42|a JPEG picture"),
    ("png", picture(id_to_rgb(IDS.T)), "42.png|image 42|12x17 pixels but the image is 17x12"),
    ("png", both(p("images", 1, "height", 17), p("images", 1, "width", 12)), "is 12x17"),
    ("png", p("annotations", 1, "segments_info", 2, DROP), "42.png|image 42|ids [70000]"),
    ("png", both(s("id", 301), s("area", 0)), "42.png|image 42|lists [301]"),
    ("png", both(picture(VOID), p("annotations", 1, "segments_info", [])), "no entity at"),
    ("results", cut("results.json"), "results.json|image 42|not a JSON file"),
    ("results", whole("results.json", {"annotations": []}), "image 42|no annotations|0 others"),
    ("results", whole("results.json", {"images": []}), "image 42|list of annotations"),
    ("results", whole("results.json", []), "results.json|image 42|no results|0 others"),
    ("results", both(r("image_id", 43), at("results.json", 0, DROP)), "image 42|1 others"),
    ("results", r("image_id", DROP), "results.json|entry 1|no image_id"),
    ("results", r("image_id", [42]), "results.json|entry 1 of results"),
    ("results", at("results.json", -1, None), "results.json|entry 1 of results has"),
    ("results", r("segmentation", DROP), "image 42|result 1|'segmentation' is missing"),
    ("results", r("segmentation", None), "image 42|result 1|NoneType"),
    ("results", r("score", NAN), "results.json|image 42|result 1|nan"),
    ("results", r("score", "0.5"), "results.json|image 42|result 1|score is '0.5'"),
    ("results", r("score", None), "results.json|image 42|result 1|score is None"),
    ("results", r("segmentation", encode_mask(np.ones((3, 4)))), "image 42|result 1|4x3|17x12"),
    ("results", r("segmentation", "size", "12x17"), "result 1|'12x17'"),
    ("results", r("segmentation", "counts", DROP), "result 1|lack 'counts'"),
    ("results", r("segmentation", "counts", "o2"), "image 42|result 1|of 204 pixels"),
    ("results", r("segmentation", "counts", "\x01\x02"), "image 42|result 1|character 0"),
    ("results", r("segmentation", "counts", [-4, 208]), "image 42|result 1|at least 0"),
    ("results", r("segmentation", "counts", [3, 4]), "result 1|runs cover 7 of 204"),
    ("results", r("segmentation", [[20, 1, 25, 1, 25, 5]]), "result 1|outside|x from 20 to 25"),
    ("results", r("segmentation", [[0, 0, 1e9, 0, 5, 5]]), "result 1|outside|1e+09"),
    ("results", r("segmentation", [[1, 1, 5, 1, 5]]), "result 1|flat list"),
    ("results", r("segmentation", [["a", "b"]]), "result 1|polygons cannot be read"),
    ("results", r("segmentation", [[1, 1, 5, NAN, 5, 5]]), "result 1|finite"),
    ("results", whole("results.json", [{"image_id": 42, "segmentation": []}]), "42|no entity"),
    ("npz", cut("42.npz"), "42.npz|image 42|truncated"),
    ("npz", later("42.npz", lambda _: b"masks"), "42.npz|image 42|truncated or no npz"),
    ("npz", npz(), "42.npz|image 42|neither 'masks'"),
    ("npz", npz(picture=IDS), "42.npz|image 42|picture"),
    ("npz", npz(masks=np.array([Payload()], object)), "42.npz|image 42|pickle"),
    ("npz", npz(masks=np.ones((1, *SIZE))), "42.npz|image 42|bool (E, H, W), got float64"),
    ("npz", npz(masks=IDS > 0), "42.npz|image 42|(12, 17)"),
    ("npz", npz(masks=np.ones((1, 12, 18), bool)), "42.npz|image 42|18x12|17x12"),
    ("npz", npz(masks=np.ones((0, *SIZE), bool)), "42.npz|image 42|no entity"),
    ("npz", npz(ids=IDS.astype(float)), "42.npz|image 42|int32 (H, W), got float64"),
    ("npz", npz(ids=IDS - 1), "42.npz|image 42|-1"),
    ("npz", npz(**MASKS, scores=[0.5, NAN]), "42.npz|image 42|score 1|finite"),
    ("npz", npz(**MASKS, scores=[0.5]), "42.npz|image 42|2 entities|scores"),
    ("npz", npz(**MASKS, scores=["a", "b"]), "42.npz|image 42|scores must be numbers"),
    ("refs", lambda f: f.contents[REFS].append(Payload()), "refs(unc).p|refused|system"),
    ("refs", cut(REFS), "refs(unc).p|refused"),
    ("refs", later(REFS, lambda _: b"\x80\x02}q\x00Rx"), "refs(unc).p|refused|first source"),
    ("refs", whole(REFS, {"refs": []}), "refs(unc).p|dict"),
    ("refs", whole(REFS, []), "refs(unc).p|no ref|'val'"),
    ("refs", at(REFS, -1, 5), "refs(unc).p|ref 1"),
    ("refs", whole(REFS, [{"split": "train"}]), "refs(unc).p|'val'|train"),
    ("refs", at(REFS, -1, "ann_id", 8), "refs(unc).p|ref 542|object 8|image 42"),
    ("refs", at(REFS, -1, "image_id", 8), "refs(unc).p|ref 542|image 8"),
    ("refs", at(REFS, -1, "sentences", DROP), "refs(unc).p|ref 542|'sentences'"),
    ("refs", at(REFS, -1, "sentences", 0, "sent", DROP), "refs(unc).p|ref 542|'sent'"),
    ("refs", i("image_id", 8), "annotation 42001|image 8"),
    ("instances", i("id", 42000), "annotation id 42000|twice"),
    ("instances", i("segmentation", DROP), "instances.json|annotation 42001|'segmentation'"),
    ("masks", i("segmentation", SMALL), "instances.json|image 42|segment 42001|5x5|17x12"),
    ("masks", i("segmentation", BESIDE), "instances.json|image 42|segment 42001|outside"),
    ("captions", later(CAPTIONS, lambda d: d.replace(b"\n", b"\n{oops\n", 1)), "line 2|no JSON"),
    ("captions", not_utf8(CAPTIONS), "captions.jsonl|position|UTF-8"),
    ("captions", c([1]), "captions.jsonl|caption 2"),
    ("captions", c("nouns", "dog"), "captions.jsonl|image 42|'nouns'"),
    ("captions", c("nouns", [5]), "captions.jsonl|image 42|noun 0|5"),
    ("captions", c("nouns", ["a dog", " "]), "captions.jsonl|image 42|noun 1"),
    ("captions", c("description", None), "captions.jsonl|image 42|'description'"),
    ("captions", c("image_id", 8), "captions.jsonl|image 8|panoptic.json"),
    ("captions", c("file_name", "cat.png"), "captions.jsonl|image 42|cat.png"),
    ("narratives", cut(NARRATIVES), "narratives.json|char|not a JSON file"),
    ("narratives", whole(NARRATIVES, {"a": 1}), "narratives.json|dict"),
    ("narratives", n(5), "narratives.json|narrative 1"),
    ("narratives", n("image_id", "8"), "narratives.json|image 8|panoptic.json"),
    ("narratives", n("caption", None), "narratives.json|image 42|'caption'"),
    ("narratives", n("segments", DROP), "narratives.json|image 42|'segments'"),
    ("narratives", said("segment_ids", ["301"]), "narratives.json|image 42|segment id 301"),
    ("narratives", said("segment_ids", "300"), "42|'segment_ids'"),
    ("narratives", said("segment_ids", ["-300"]), "42|-300"),
    ("narratives", said("utterance", 5), "image 42|'utterance'"),
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    folder = tmp_path / "data"  # a name that no error is asked for
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Files(folder)


@pytest.mark.parametrize("what", sorted({what for what, _, _ in REFUSED}))
def test_the_files_are_good_before_they_are_spoiled(files, what):
    assert len(files.read(what)) == (1 if what in ("results", "npz") else 2)


@pytest.mark.parametrize("case", REFUSED, ids=[f"{what}: {words}" for what, _, words in REFUSED])
def test_one_clear_error(files, case):
    what, spoil, words = case
    spoil(files)
    text = refused(None, files.read, what, error=(ValueError, FileNotFoundError))
    told = text.replace(str(files.folder), "")
    missing = [word for word in words.split("|") if word not in told]
    assert not missing, f"{missing} not in: {text}"
    assert len(text) < 600 and not (files.folder / "owned").exists()


@pytest.mark.parametrize("segments, message", [
    ([{"category_id": 3}], "entry 0 of segments_info has no 'id'"),
    (["300"], "entry 0 of segments_info has no 'id'"),
    ([{"id": None}], "id of entry 0 of segments_info is None"),
    ([{"id": 300, "iscrowd": "0"}], "segment 300: iscrowd is '0'"),
    ([{"id": 0}], "lists id 0"),
    ([{"id": 9}, {"id": 300}, {"id": 70000}, {"id": 9}], r"repeats \[9\]"),
    ([{"id": i, "iscrowd": 1} for i in (9, 300, 70000)], "no entity at all"),
    ({"300": {}}, "segments_info is a dict"),
])  # fmt: skip
def test_segments_of_an_own_record(files, segments, message):
    masks = {"format": "panoptic_png", "file_name": str(files.png), "segments_info": segments}
    record = {"image_id": 42, "height": SIZE[0], "width": SIZE[1], "entities": masks}
    refused(rf"image 42, entity file .*42\.png: .*{message}", load_from_record, record)
    with pytest.raises(KeyError, match="image 42: the record has no entities"):
        load_from_record({**record, "entities": None})


@pytest.mark.parametrize("name, options, message", [
    ("results.json", {"image_id": None}, "needs image_id"),
    (PNG, {"format": "jpeg2000"}, "jpeg2000.*known: auto"),
    (PNG, {"format": "gray_png"}, "mode is RGB, expected grey"),
    (CAPTIONS, {}, "suffix '.jsonl' names no known format"),
    ("absent.png", {}, "absent.png does not exist"),
])  # fmt: skip
def test_arguments_that_do_not_fit_the_file(files, name, options, message):
    files.read("results")
    given = {"image_id": 42, "error": (ValueError, FileNotFoundError), **options}
    refused(message, load_entities, files.folder / name, *SIZE, **given)


def test_a_pickle_never_runs_code(files):
    ways = [pickle.dumps([Payload()], protocol) for protocol in range(6)]
    ways += [b"cos\nsystem\n(S'touch owned'\ntR.", b"(S'touch owned'\nios\nsystem\n."]
    ways += [b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R."]
    ways += [b"\x82\x01.", b"P1\n.", b"\x80\x02]q\x00b.", b"I1\n)R.", b"\x8a\xff" + b"\xff" * 9]
    for data in ways:
        files.after = [lambda data=data: (files.folder / REFS).write_bytes(data)]
        refused(r"refs\(unc\)\.p: refused", files.read, "refs")
    assert not Path("owned").exists()


def test_every_cut_of_a_png_is_told_and_every_bit_flipped(files):
    data = files.png.read_bytes()
    for place in range(len(data)):
        flipped = bytes([data[place] ^ (1 << place % 8)])
        for bad in (data[:place], data[:place] + flipped + data[place + 1 :]):
            files.png.write_bytes(bad)
            told = r"42\.png: (truncated|damaged|no picture)"
            refused(told, load_entities, files.png, *SIZE, format="panoptic_png")
    files.png.write_bytes(data + b"more")  # what follows the end is nobody's
    assert load_entities(files.png, *SIZE).num_entities == 3


def test_every_cut_of_an_npz_is_told(files):
    path = files.folder / "42.npz"
    np.savez_compressed(path, **MASKS)
    data = path.read_bytes()
    for end in range(0, len(data), 5):
        path.write_bytes(data[:end])
        refused(r"42\.npz", load_entities, path, *SIZE)


def test_ids_may_be_text_or_numbers_and_measures_absent(files):
    content = files.contents["panoptic.json"]
    for key, entries in (("id", content["images"]), ("image_id", content["annotations"])):
        for entry in entries:
            entry[key] = str(entry[key])
    for name in ("area", "bbox", "iscrowd"):
        s(name, DROP)(files)
    both(s("id", "300"), s("category_id", "3"))(files)
    files.contents[CAPTIONS][1]["image_id"] = files.contents["results.json"][0]["image_id"] = "42"
    files.contents[NARRATIVES][1]["image_id"] = 42
    files.contents[NARRATIVES][1]["segments"][0]["segment_ids"] = [300]
    assert [entities.segment_ids for entities in files.read("png")] == [[300, 9, 70000]] * 2
    assert len(files.read("captions")) == len(files.read("narratives")) == 2
    assert files.read("narratives")[1]["phrases"][0]["segment_ids"] == [300]
    assert files.read("results")[0].num_entities == 2


@pytest.mark.parametrize("form", ["{:012d}", "{}", int, float])
@pytest.mark.parametrize("turned", [False, True])
def test_files_are_joined_by_the_value_of_an_id(files, form, turned):
    """What names an image and what is named change their forms in turn."""
    write = form if callable(form) else form.format
    panoptic, instances = (files.contents[f"{name}.json"] for name in ("panoptic", "instances"))
    own = [(c["images"], "id") for c in (panoptic, instances)]
    other = [(c["annotations"], "image_id") for c in (panoptic, instances)]
    other += [(files.contents[name], "image_id") for name in (NARRATIVES, CAPTIONS, REFS)]
    for entries, key in own if turned else other:
        for entry in entries:
            entry[key] = write(int(entry[key]))
    for what in ("narratives", "captions", "refs", "instances", "png"):
        assert len(files.read(what)) == 2
    for entry in files.contents["results.json"]:
        entry["image_id"] = write(42) if form is not float else 42
    for image_id in (42, "42", "000000000042"):
        results = load_entities(files.folder / "results.json", *SIZE, image_id=image_id)
        assert results.num_entities == 2
    for what, name in (("narratives", NARRATIVES), ("captions", CAPTIONS), ("refs", REFS)):
        files.contents[name][1]["image_id"] = "0008"
        told = r"image 0008 is not in .*ids here: 0008; there: 41, 42\)"
        refused(told, files.read, what)
    told = r"no results for this image \(the file covers 1 others: 42\)"
    refused(told, load_entities, files.folder / "results.json", *SIZE, image_id=8)


@pytest.mark.parametrize("what", ["narratives", "captions", "refs", "instances", "results"])
def test_a_byte_order_mark_is_no_part_of_a_file(files, what):
    files.contents["grefs(unc).json"] = files.contents.pop(REFS)
    expected = [str(item) for item in files.read(what)]

    def mark():
        for path in files.folder.glob("*.json*"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    files.after = [mark]
    assert len(expected) == len(files.read(what))
    assert open_captions(files.folder / CAPTIONS).entries.keys() == {("41", "0"), ("42", "0")}
    (files.folder / "a.yaml").write_bytes(b"\xef\xbb\xbfOUTPUT_DIR: here\n")
    assert load_config(files.folder / "a.yaml").OUTPUT_DIR == "here"


def test_a_noun_that_is_not_in_its_description_is_counted(files, gella_log):
    files.contents[CAPTIONS][1]["nouns"] = ["A dog", "a zebra"]
    with gella_log.at_level(logging.WARNING, logger="gella"):
        record = files.read("captions")[1]
    spans = [(p["text"], p["start"], p["end"]) for p in record["phrases"]]
    assert spans == [("A dog", 0, 5), ("a zebra", -1, -1)]
    assert CAPTIONS in gella_log.text and "1 phrases" in gella_log.text


def test_a_polygon_is_clipped_and_a_mask_without_a_pixel_no_entity(files):
    r("segmentation", [[14, 3, 20, 3, 20, 6, 14, 6], [1, 1, 2, 2]])(files)
    (entities,) = files.read("results")
    expected = np.zeros(SIZE, bool)
    expected[3:6, 14:] = True
    np.testing.assert_array_equal(entities.bitmasks()[1], expected)
    r("segmentation", encode_mask(np.zeros(SIZE)))(files)
    i("segmentation", [])(files)
    assert [entities.segment_ids for entities in files.read("results")] == [[1]]
    assert [e.segment_ids for e in files.read("masks")] == [[41000, 41001], [42000]]


def test_a_palette_or_16_bits_are_fine_for_grey_ids(files):
    palette().save(files.png)
    entities = load_entities(files.png, *SIZE, format="gray_png")
    assert entities.segment_ids == [9, 49, 222]  # 300 and 70000 modulo 251
    Image.fromarray((IDS % 65536).astype(np.uint16)).save(files.png)
    assert load_entities(files.png, *SIZE).segment_ids == [9, 300, 4464]

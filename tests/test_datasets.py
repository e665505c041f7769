"""Readers of the benchmarks' files, on prepared shapes and on two real COCO images."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes
from dataset_scripts import prepare_small_shapes
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gella.data import register as datasets
from gella.data.coco_categories import coco_panoptic_categories
from gella.data.panoptic import read_categories
from gella.data.records import json_lines
from gella.data.refcoco import read_refs
from gella.entities.entity_map import rgb_to_id
from gella.entities.sources import load_from_record

REFCOCO = ("refcoco", "refcocoplus")
COCO_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "coco_sample"
needs_sample = pytest.mark.skipif(
    not COCO_SAMPLE.is_dir(), reason="the two COCO sample images (shared/coco_sample) are absent"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small prepared dataset, as `prepare_shapes.py` writes it."""
    return prepare_small_shapes(tmp_path_factory.mktemp("data") / "shapes")


def places(root: Path, split: str) -> dict[str, Path]:
    notes = root / "annotations"
    return {
        "panoptic_json": notes / f"panoptic_{split}.json",
        "panoptic_root": notes / f"panoptic_{split}",
        "image_root": root / split,
    }


def sample_places() -> dict[str, Path]:
    notes = COCO_SAMPLE / "annotations"
    return {
        "panoptic_json": notes / "panoptic_val2017.json",
        "panoptic_root": notes / "panoptic_val2017",
        "image_root": COCO_SAMPLE / "val2017",
    }


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_shapes_come_back_pixel_by_pixel(root, split):
    records = datasets.load_coco_panoptic(**places(root, split))
    assert len(records) == {"train": 6, "val": 4}[split]
    for index, record in enumerate(records):
        drawn = shapes.make_sample(2, split, index)
        assert record["image_id"] == drawn.image["id"]
        assert (record["height"], record["width"]) == (96, 96)
        with Image.open(record["file_name"]) as image:
            assert np.array_equal(np.array(image), drawn.image_array)
        with Image.open(record["entities"]["file_name"]) as image:
            assert np.array_equal(rgb_to_id(np.array(image)), drawn.id_map)
        segments = record["entities"]["segments_info"]
        assert [s["id"] for s in segments] == drawn.segment_ids
        names = [shapes.CATEGORIES[s["category_id"] - 1] for s in segments]
        assert [n["name"] for n in names] == [
            t.kind for t in drawn.scene.things
        ] + drawn.scene.stuff
        assert [s["isthing"] for s in segments] == [bool(n["isthing"]) for n in names]


def test_narratives_come_back(root):
    records = datasets.load_png(
        root / "annotations" / "png_shapes_train.json", **places(root, "train")
    )
    written = [r for i in range(6) for r in shapes.make_sample(2, "train", i).narratives]
    assert [r["caption"] for r in records] == [w["caption"] for w in written]
    for record, narrative in zip(records, written):
        nouns = [s for s in narrative["segments"] if s["noun"]]
        assert len(record["phrases"]) == len(nouns)
        cursor = 0
        for phrase, noun in zip(record["phrases"], nouns):
            assert phrase["start"] >= cursor
            assert record["caption"][phrase["start"] : phrase["end"]] == phrase["text"]
            assert phrase["text"].lower() == noun["utterance"].lower()
            assert phrase["segment_ids"] == [int(i) for i in noun["segment_ids"]]
            assert phrase["is_plural"] == noun["plural"]
            cursor = phrase["end"]


def test_captions_come_back(root):
    records = datasets.load_captions(
        root / "annotations" / "captions_train.jsonl", **places(root, "train")
    )
    assert len(records) == 12 and records[0]["tasks"] == ("describe", "extract")
    for record in records:
        assert record["phrases"]
        for phrase in record["phrases"]:
            assert record["caption"][phrase["start"] : phrase["end"]] == phrase["text"]
            assert phrase["segment_ids"] is None


def test_refcoco_with_panoptic_entities(root):
    where = places(root, "val")
    read = {"panoptic_json": where["panoptic_json"], "panoptic_root": where["panoptic_root"]}
    one = datasets.load_refcoco(root / "refcoco", "unc", "val", where["image_root"], **read)
    drawn = [ref for i in range(4) for ref in shapes.make_sample(2, "val", i).refs]
    assert [r["expressions"][0]["text"] for r in one] == [
        sentence["sent"] for ref in drawn for sentence in ref["sentences"]
    ]
    for record in one:
        (expression,) = record["expressions"]
        ids = [s["id"] for s in record["entities"]["segments_info"]]
        assert expression["segment_ids"][0] in ids
        assert (
            Path(record["file_name"]).is_file() and Path(record["entities"]["file_name"]).is_file()
        )
    grouped = datasets.load_refcoco(
        root / "refcoco", "unc", "val", where["image_root"], per="image", **read
    )
    assert sum(len(r["expressions"]) for r in grouped) == len(one)
    assert len({r["image_id"] for r in grouped}) == len(grouped)


def test_refcoco_with_its_own_objects(root):
    records = datasets.load_refcoco(root / "refcoco", "unc", "train", root / "train")
    objects = records[0]["entities"]["segments_info"]
    assert records[0]["entities"]["format"] == "coco_instances"
    assert all("segmentation" in o for o in objects)
    assert records[0]["expressions"][0]["segment_ids"][0] in [o["id"] for o in objects]
    with pytest.raises(ValueError, match="testB"):
        datasets.load_refcoco(root / "refcoco", "unc", "testB", root / "train")


def test_refcoco_refuses_objects_that_are_no_segments(root, tmp_path):
    where = places(root, "val")
    content = json.loads(where["panoptic_json"].read_text())
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["bbox"][0] += 3  # same id, another region: as COCO's unrelated ids may collide
    other = tmp_path / "panoptic.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leave panoptic_json out"):
        datasets.load_refcoco(root / "refcoco", "unc", "val", root / "val", panoptic_json=other)


def test_pickles_run_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    bad = tmp_path / "refs(unc).p"
    bad.write_bytes(pickle.dumps([Payload()]))
    with pytest.raises(ValueError, match=r"refs\(unc\).p: refused.*system"):
        read_refs(bad)
    assert not (tmp_path / "owned").exists()
    bad.write_bytes(pickle.dumps([{"ref_id": 1}])[:-6])
    with pytest.raises(ValueError, match="refused"):
        read_refs(bad)
    python2 = b"(lp0\n(dp1\nS'sent'\np2\nS'a dog'\np3\nsS'ref_id'\np4\nI7\nsa."
    bad.write_bytes(python2)
    assert read_refs(bad) == [{"sent": "a dog", "ref_id": 7}]


@needs_sample
def test_coco_sample():
    panoptic = datasets.load_coco_panoptic(**sample_places())
    assert [r["image_id"] for r in panoptic] == [142238, 439180]
    segments = [r["entities"]["segments_info"] for r in panoptic]
    assert [len(s) for s in segments] == [18, 32]
    assert [sum(x["iscrowd"] for x in s) for s in segments] == [1, 2]
    narratives = COCO_SAMPLE / "annotations" / "png_coco_val2017.json"
    records = datasets.load_png(narratives, **sample_places())
    assert [r["image_id"] for r in records] == [142238, 142238, 439180, 439180]
    assert [len(r["phrases"]) for r in records] == [5, 4, 7, 4]
    for record in records:
        for phrase in record["phrases"]:
            assert record["caption"][phrase["start"] : phrase["end"]] == phrase["text"]
    people, grass, ball, trees, sky = records[0]["phrases"]
    assert (people["text"], len(people["segment_ids"])) == ("a few people", 13)
    assert people["is_plural"] and people["is_thing"] and ball["is_thing"]
    assert not grass["is_thing"] and not sky["is_plural"] and trees["text"] == "trees"


@needs_sample
def test_narrative_may_name_a_crowd(tmp_path):
    """A crowd is no entity, but the truth of a phrase that names it needs its id."""
    narrative = {
        "image_id": "142238",
        "caption": "Many people watch them.",
        "segments": [
            {
                "utterance": "many people",
                "segment_ids": ["3937500", "3153362"],
                "plural": True,
                "noun": True,
            },
            {"utterance": "watch them .", "segment_ids": [], "plural": False, "noun": False},
        ],
    }
    path = tmp_path / "png.json"
    path.write_text(json.dumps([narrative]))
    (record,) = datasets.load_png(path, **sample_places())
    assert record["phrases"][0]["segment_ids"] == [3937500, 3153362]


@needs_sample
def test_coco_categories_are_those_of_the_file():
    listed = read_categories(sample_places()["panoptic_json"])
    ours = coco_panoptic_categories()
    keys = ("id", "name", "isthing", "color")
    assert [{k: c[k] for k in keys} for c in listed] == ours


def edited_narratives(root: Path, tmp_path: Path, change) -> Path:
    records = json.loads((root / "annotations" / "png_shapes_val.json").read_text())
    change(records)
    path = tmp_path / "png_changed.json"
    path.write_text(json.dumps(records))
    return path


def grounded(record: dict) -> dict:
    return next(s for s in record["segments"] if s["segment_ids"])


def test_unknown_segment_id_is_named(root, tmp_path):
    def change(records):
        grounded(records[1])["segment_ids"] = ["999"]

    path = edited_narratives(root, tmp_path, change)
    image_id = shapes.image_id_of("val", 1)
    with pytest.raises(ValueError, match=rf"narrative 1, image {image_id}, .* id 999 "):
        datasets.load_png(path, **places(root, "val"))


def test_unknown_image_is_named(root, tmp_path):
    def change(records):
        records[0]["image_id"] = "12"

    path = edited_narratives(root, tmp_path, change)
    with pytest.raises(ValueError, match="image 12 is not in"):
        datasets.load_png(path, **places(root, "val"))


def test_unaligned_phrases_stay_and_are_counted(root, tmp_path, caplog):
    def change(records):
        grounded(records[0])["utterance"] = "zebra"

    path = edited_narratives(root, tmp_path, change)
    with caplog.at_level(logging.WARNING, logger="gella"):
        changed = datasets.load_png(path, **places(root, "val"))[0]["phrases"]
    lost = [p for p in changed if p["start"] < 0]
    assert (
        [p["text"] for p in lost] == ["zebra"] and lost[0]["end"] == -1 and lost[0]["segment_ids"]
    )
    assert "1 phrases" in caplog.text


def test_narratives_without_nouns_are_left_out_and_counted(root, tmp_path, caplog):
    def change(records):
        for segment in records[0]["segments"]:
            segment.update(segment_ids=[], noun=False)

    path = edited_narratives(root, tmp_path, change)
    with caplog.at_level(logging.WARNING, logger="gella"):
        records = datasets.load_png(path, **places(root, "val"))
    assert len(records) == 3 and "1 narratives" in caplog.text


def test_bad_panoptic_files(root, tmp_path):
    where = places(root, "val")
    content = json.loads(where["panoptic_json"].read_text())
    where["panoptic_json"] = tmp_path / "panoptic.json"

    def refused(message, **change):
        where["panoptic_json"].write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            datasets.load_coco_panoptic(**where)

    first = content["annotations"][0]
    segment = first["segments_info"][0]
    refused(
        "category 77", annotations=[{**first, "segments_info": [{**segment, "category_id": 77}]}]
    )
    refused("twice", annotations=[{**first, "segments_info": [segment, segment]}])
    refused("not in 'images'", annotations=[{**first, "image_id": 1}])
    refused("no annotation", annotations=[])
    where["panoptic_json"].write_text('{"images": [')
    with pytest.raises(ValueError, match="not a JSON file"):
        datasets.load_coco_panoptic(**where)
    where["panoptic_json"].unlink()
    with pytest.raises(FileNotFoundError, match="panoptic.json.*prepare_shapes.py"):
        datasets.load_coco_panoptic(**where)


def test_names_and_metadata():
    names = {n for n in DatasetCatalog.list() if n.startswith("gella_")}
    assert names >= {
        *(f"gella_shapes_{k}_{s}" for k in ("png", "panoptic", "refcoco") for s in shapes.SPLITS),
        "gella_shapes_captions_train",
        "gella_shapes_nouns_val",
        *(f"gella_coco_{k}_{s}2017" for k in ("png", "panoptic") for s in shapes.SPLITS),
        "gella_coco_nouns_val2017",
        "gella_entityseg_captions_train",
        *(f"gella_{d}_unc_{s}" for d in REFCOCO for s in ("train", "val", "testA", "testB")),
        *(f"gella_refcoco_google_{s}" for s in ("train", "val", "test")),
        *(f"gella_refcocog_umd_{s}_panoptic" for s in ("train", "val", "test")),
        *(f"gella_refcocog_google_{s}" for s in ("train", "val")),
    }
    assert all(re.fullmatch(r"\w+", name) for name in names)  # of files, shells and YAML alike
    kinds = {
        "gella_shapes_png_val": "png",
        "gella_shapes_panoptic_val": "coco_panoptic_seg",
        "gella_shapes_nouns_val": "noun_extraction",
        "gella_shapes_refcoco_val": "refcoco",
        "gella_refcocoplus_unc_testA": "refcoco",
        "gella_entityseg_captions_train": "noun_extraction",
    }
    assert {name: MetadataCatalog.get(name).evaluator_type for name in kinds} == kinds
    coco = MetadataCatalog.get("gella_coco_panoptic_val2017")
    things = coco.thing_dataset_id_to_contiguous_id
    stuff = coco.stuff_dataset_id_to_contiguous_id
    assert (len(things), len(stuff)) == (80, 53)
    assert sorted([*things.values(), *stuff.values()]) == list(range(133))
    assert coco.thing_classes[things[1]] == "person"
    assert coco.stuff_classes[stuff[200]] == "rug-merged"


def entityseg_files(root: Path, folder: Path, split: str = "train") -> dict[str, Path]:
    """The shapes as EntitySeg is laid out: an instance JSON, images in several folders."""
    for index, image in enumerate(sorted((root / split).iterdir())):
        place = folder / "images" / f"entity_0{index % 2 + 1}" / image.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image.read_bytes())
    return {
        "instances_json": root / "refcoco" / "instances.json",
        "captions_jsonl": root / "annotations" / f"captions_{split}.jsonl",
        "image_root": folder / "images",
    }


def test_entityseg(root, tmp_path):
    where = entityseg_files(root, tmp_path)
    records = datasets.load_entityseg(**where)
    like = datasets.load_captions(where["captions_jsonl"], **places(root, "train"))
    assert [r["caption"] for r in records] == [r["caption"] for r in like]
    assert [r["phrases"] for r in records] == [r["phrases"] for r in like]
    for record in records:
        assert record["tasks"] == ("describe", "extract")
        drawn = shapes.make_sample(2, "train", record["image_id"] - 1)
        with Image.open(record["file_name"]) as image:
            assert np.array_equal(np.array(image), drawn.image_array)
        entities = load_from_record(record)
        things = [i for s, i in zip(drawn.panoptic["segments_info"], drawn.segment_ids)
                  if s["category_id"] <= 7]  # fmt: skip
        assert sorted(entities.segment_ids) == sorted(things)
        for k, segment_id in enumerate(entities.segment_ids):
            assert np.array_equal(entities.ids == k + 1, drawn.id_map == segment_id)
    copy = tmp_path / "images" / "more" / Path(records[0]["file_name"]).name
    copy.parent.mkdir()
    copy.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{copy.name} lies in 2 folders"):
        datasets.load_entityseg(**where)


def test_captions_of_another_dataset_are_refused(root, tmp_path):
    where = entityseg_files(root, tmp_path)
    lines = [json.loads(line) for line in where["captions_jsonl"].read_text().splitlines()]
    lines[3]["file_name"] = "another.jpg"
    where["captions_jsonl"] = tmp_path / "captions.jsonl"
    where["captions_jsonl"].write_text("\n".join(map(json.dumps, lines)))
    message = rf"captions.jsonl: caption 4, image {lines[3]['image_id']}: it is of another.jpg"
    with pytest.raises(ValueError, match=message):
        datasets.load_entityseg(**where)


def test_json_lines_may_hold_line_separators(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"description": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n")
    assert list(json_lines(path)) == [(1, {"description": "a\u2028b\x85c"})]


def test_own_dataset_reads_its_categories_when_loaded(root):
    where = places(root, "val")
    name = "gella_test_own"
    datasets.register_panoptic(
        name, where["image_root"], where["panoptic_root"], where["panoptic_json"]
    )
    try:
        assert MetadataCatalog.get(name).get("categories") is None
        assert len(DatasetCatalog.get(name)) == 4
        assert len(DatasetCatalog.get(name)) == 4  # the metadata may be set again to the same
        assert MetadataCatalog.get(name).categories == shapes.CATEGORIES
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_the_environment_names_the_root(root):
    """In a fresh process: the variable is honoured, and importing reads no dataset file."""
    code = (
        "import gella\n"
        "from detectron2.data import DatasetCatalog as d\n"
        "print(len(d.get('gella_shapes_png_val')), len(d.get('gella_shapes_nouns_val')))\n"
        "print(d.get('gella_shapes_refcoco_train')[0]['file_name'])\n"
        "d.get('gella_coco_png_val2017')\n"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": str(root.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.split()
    assert lines[:2] == ["4", "4"] and Path(lines[2]).is_file()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError") and "datasets/README.md" in last

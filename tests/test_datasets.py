"""Readers of the benchmarks' files, on prepared shapes, RefCOCO's layout and two COCO images."""

import importlib
import json
import logging
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import prepare_png
import pytest
import shapes
from dataset_scripts import places, registered
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from refusals import refused

import gella.data
from gella import add_gella_config
from gella.data import register as datasets
from gella.data.check import check_dataset
from gella.data.mapper import GroundingMapper
from gella.data.panoptic import load_instances, read_categories
from gella.data.records import json_lines
from gella.data.refcoco import held_out_images, read_refs
from gella.data.register import REFCOCO_SPLITS, coco_panoptic_categories, refcoco_name, register_all
from gella.engine.trainer import load_records
from gella.entities.entity_map import rgb_to_id
from gella.entities.files import write_id_png
from gella.entities.sources import load_from_record


def said(record):
    words = [record["caption"][phrase["start"] : phrase["end"]] for phrase in record["phrases"]]
    assert words == [phrase["text"] for phrase in record["phrases"]]
    return words


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_shapes_come_back_pixel_by_pixel(small_shapes, split):
    records = datasets.load_coco_panoptic(**places(small_shapes, split))
    assert len(records) == {"train": 6, "val": 4}[split]
    for index, record in enumerate(records):
        drawn, masks = shapes.make_sample(2, split, index), record["entities"]
        assert record["image_id"] == drawn.image["id"]
        assert (record["height"], record["width"]) == (96, 96)
        assert np.array_equal(pixels(record["file_name"]), drawn.image_array)
        assert np.array_equal(rgb_to_id(pixels(masks["file_name"])), drawn.id_map)
        segments = masks["segments_info"]
        names = [shapes.CATEGORIES[s["category_id"] - 1] for s in segments]
        kinds = [thing.kind for thing in drawn.scene.things]
        assert [s["id"] for s in segments] == drawn.segment_ids
        assert [n["name"] for n in names] == kinds + drawn.scene.stuff
        assert [s["isthing"] for s in segments] == [bool(n["isthing"]) for n in names]


def test_narratives_come_back(small_shapes):
    path = small_shapes / "annotations" / "png_shapes_train.json"
    records = datasets.load_png(path, **places(small_shapes, "train"))
    written = [r for i in range(6) for r in shapes.make_sample(2, "train", i).narratives]
    assert [r["caption"] for r in records] == [w["caption"] for w in written]
    for record, narrative in zip(records, written):
        nouns = [s for s in narrative["segments"] if s["noun"]]
        spoken = [noun["utterance"].lower() for noun in nouns]
        assert [words.lower() for words in said(record)] == spoken
        phrases = record["phrases"]
        starts = [phrase["start"] for phrase in phrases]
        assert starts == sorted(starts)
        assert [(p["segment_ids"], p["is_plural"]) for p in phrases] == [
            ([int(i) for i in noun["segment_ids"]], noun["plural"]) for noun in nouns
        ]


def test_refcoco_with_panoptic_entities(small_shapes, tmp_path):
    place = places(small_shapes, "val")
    where = (small_shapes / "refcoco", "unc", "val", place.pop("image_root"))
    drawn = [ref for i in range(4) for ref in shapes.make_sample(2, "val", i).refs]
    one = datasets.load_refcoco(*where, **place)
    grouped = datasets.load_refcoco(*where, **place, per="image")
    sentences = [sentence["sent"] for ref in drawn for sentence in ref["sentences"]]
    assert [r["expressions"][0]["text"] for r in one] == sentences
    for record in one:
        (expression,), masks = record["expressions"], record["entities"]
        assert expression["segment_ids"][0] in [s["id"] for s in masks["segments_info"]]
        assert Path(record["file_name"]).is_file() and Path(masks["file_name"]).is_file()
    assert sum(len(r["expressions"]) for r in grouped) == len(one)
    assert len({r["image_id"] for r in grouped}) == len(grouped)
    content = json.loads(place["panoptic_json"].read_text())
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["bbox"][0] += 3  # same id, another region: as COCO's unrelated ids may collide
    place["panoptic_json"] = tmp_path / "panoptic.json"
    place["panoptic_json"].write_text(json.dumps(content))
    refused("leave panoptic_json out", datasets.load_refcoco, *where, **place)


def test_coco_sample(coco_sample, tmp_path):
    place = places(coco_sample, "val2017")
    panoptic = datasets.load_coco_panoptic(**place)
    assert [r["image_id"] for r in panoptic] == [142238, 439180]
    segments = [r["entities"]["segments_info"] for r in panoptic]
    assert [(len(s), sum(x["iscrowd"] for x in s)) for s in segments] == [(18, 1), (32, 2)]
    records = datasets.load_png(coco_sample / "annotations" / "png_coco_val2017.json", **place)
    assert [r["image_id"] for r in records] == [142238, 142238, 439180, 439180]
    assert [len(said(record)) for record in records] == [5, 4, 7, 4]
    people, grass, ball, trees, sky = records[0]["phrases"]
    assert (people["text"], len(people["segment_ids"])) == ("a few people", 13)
    assert people["is_plural"] and people["is_thing"] and ball["is_thing"]
    assert not grass["is_thing"] and not sky["is_plural"] and trees["text"] == "trees"
    keys = ("id", "name", "isthing", "color")
    listed = read_categories(place["panoptic_json"])
    assert [{k: c[k] for k in keys} for c in listed] == coco_panoptic_categories()
    # A crowd is no entity, but the truth of a phrase that names it needs its id.
    crowd = {"utterance": "many people", "segment_ids": ["3937500", "3153362"], "plural": True}
    rest = {"utterance": "watch them .", "segment_ids": [], "plural": False, "noun": False}
    narrative = {"image_id": "142238", "caption": "Many people watch them."}
    narrative["segments"] = [{**crowd, "noun": True}, rest]
    (tmp_path / "png.json").write_text(json.dumps([narrative]))
    (record,) = datasets.load_png(tmp_path / "png.json", **place)
    assert record["phrases"][0]["segment_ids"] == [3937500, 3153362]


def test_names_and_metadata():
    unc = ("train", "val", "testA", "testB")
    names = {n for n in DatasetCatalog.list() if n.startswith("gella_")}
    assert names >= {
        *(f"gella_shapes_{k}_{s}" for k in ("png", "panoptic", "refcoco") for s in shapes.SPLITS),
        "gella_shapes_captions_train",
        "gella_shapes_nouns_val",
        *(f"gella_coco_{k}_{s}2017" for k in ("png", "panoptic") for s in shapes.SPLITS),
        "gella_coco_nouns_val2017",
        "gella_entityseg_captions_train",
        *(f"gella_{d}_unc_{s}" for d in ("refcoco", "refcocoplus") for s in unc),
        *(f"gella_refcoco_google_{s}" for s in ("train", "val", "test")),
        *(f"gella_refcocog_umd_{s}_panoptic" for s in ("train", "val", "test")),
        *(f"gella_refcocog_google_{s}" for s in ("train", "val")),
        *(f"gella_grefcoco_unc_{s}" for s in unc),
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


def test_captions_and_entityseg(small_shapes, tmp_path):
    for index, image in enumerate(sorted((small_shapes / "train").iterdir())):
        folder = tmp_path / "images" / f"entity_0{index % 2 + 1}"  # as EntitySeg is laid out
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder)
    captions = small_shapes / "annotations" / "captions_train.jsonl"
    where = (small_shapes / "refcoco" / "instances.json", captions, tmp_path / "images")
    records = datasets.load_entityseg(*where)
    like = datasets.load_captions(captions, **places(small_shapes, "train"))
    assert len(records) == 12 and all(said(record) for record in records)
    assert {p["segment_ids"] for record in records for p in record["phrases"]} == {None}
    assert {record["tasks"] for record in like} == {("describe", "extract")}
    assert [r["caption"] for r in records] == [r["caption"] for r in like]
    assert [r["phrases"] for r in records] == [r["phrases"] for r in like]
    for record in records:
        assert record["tasks"] == ("describe", "extract")
        drawn = shapes.make_sample(2, "train", record["image_id"] - 1)
        assert np.array_equal(pixels(record["file_name"]), drawn.image_array)
        entities = load_from_record(record)
        things = [i for s, i in zip(drawn.panoptic["segments_info"], drawn.segment_ids)
                  if s["category_id"] <= 7]  # fmt: skip
        assert sorted(entities.segment_ids) == sorted(things)
        for k, segment_id in enumerate(entities.segment_ids):
            assert np.array_equal(entities.ids == k + 1, drawn.id_map == segment_id)
    copy = tmp_path / "images" / "more" / Path(records[0]["file_name"]).name
    copy.parent.mkdir()
    copy.write_bytes(b"")
    refused(rf"{copy.name} lies in 2 folders", datasets.load_entityseg, *where)


def test_json_lines_may_hold_line_separators(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"description": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n")
    assert list(json_lines(path)) == [(1, {"description": "a\u2028b\x85c"})]


def test_own_dataset_reads_its_categories_when_loaded(small_shapes):
    with registered(datasets.register_panoptic, **places(small_shapes, "val")) as name:
        assert MetadataCatalog.get(name).get("categories") is None
        # The metadata may be set again to the same.
        assert [len(DatasetCatalog.get(name)) for _ in range(2)] == [4, 4]
        assert MetadataCatalog.get(name).categories == shapes.CATEGORIES


@contextmanager
def nothing_registered():
    """The catalogs without the project's datasets, which come back at the end."""
    before = {name: DatasetCatalog.pop(name) for name in DatasetCatalog.list() if "gella" in name}
    metadata = {name: MetadataCatalog.pop(name) for name in before}
    try:
        yield DatasetCatalog.get
    finally:
        for name in [n for n in DatasetCatalog.list() if "gella" in n]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.update(before)
        MetadataCatalog.update(metadata)


def test_the_environment_names_the_root(small_shapes, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert datasets.root_from_environment() == "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_shapes.parent))
    with nothing_registered() as load:
        importlib.reload(gella.data)
        assert len(load("gella_shapes_png_val")) == len(load("gella_shapes_nouns_val")) == 4
        assert Path(load("gella_shapes_refcoco_train")[0]["file_name"]).is_file()
        told = "datasets/README.md"
        refused(told, load, "gella_coco_png_val2017", error=FileNotFoundError)


SIZE = (20, 30)
IMAGES = [
    {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": SIZE[0], "width": SIZE[1]}
    for i in (9, 25)
]


def box_polygon(x, y, width, height):
    return [x, y, x + width, y, x + width, y + height, x, y + height]


@pytest.fixture
def refcoco(tmp_path):
    """Two train2014 images as RefCOCO has them: polygons, RLE, a crowd, suffixed ref names."""
    (tmp_path / "coco" / "train2014").mkdir(parents=True)
    for image in IMAGES:
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "coco" / "train2014" / image["file_name"])
    rle = {"size": list(SIZE), "counts": [412, *[8, 12] * 9, 8]}  # the box 20, 12, 10, 8
    annotations = [
        # Two parts that overlap are a union; the second object lies on the first.
        {"id": 101, "image_id": 9, "iscrowd": 0, "category_id": 1, "bbox": [0, 0, 12, 10],
         "segmentation": [box_polygon(0, 0, 8, 10), box_polygon(4, 0, 8, 10)]},
        {"id": 102, "image_id": 9, "iscrowd": 0, "category_id": 1, "bbox": [2, 2, 4, 4],
         "segmentation": [box_polygon(2, 2, 4, 4)]},
        {"id": 103, "image_id": 9, "iscrowd": 1, "category_id": 1, "bbox": [20, 12, 10, 8],
         "segmentation": rle},
        {"id": 201, "image_id": 25, "iscrowd": 0, "category_id": 2, "bbox": [20, 12, 10, 8],
         "segmentation": rle},
    ]  # fmt: skip
    content = {"images": IMAGES, "annotations": annotations, "categories": []}
    for folder, split_by, _ in REFCOCO_SPLITS:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "instances.json").write_text(json.dumps(content))
        held_out = "testA" if split_by == "unc" else "val"
        refs = [ref(1, 101, 9, held_out), ref(2, 102, 9, held_out), ref(3, 201, 25, "train")]
        write_refs(tmp_path / folder / f"refs({split_by}).p", refs)
    return tmp_path


def ref(ref_id, ann_id, image_id, split):
    texts = enumerate([f"the thing {ann_id}", f"object {ann_id}"], 10 * ref_id)
    sentences = [{"sent_id": k, "sent": t, "raw": t, "tokens": t.split()} for k, t in texts]
    return {
        "ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1, "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg", "sentences": sentences,
        "sent_ids": [s["sent_id"] for s in sentences],
    }  # fmt: skip


def write_refs(path, refs):
    path.write_bytes(pickle.dumps(refs, protocol=2))


def write_panoptic(refcoco):
    """Panoptic segments of image 9 with other ids than the objects': 5 covers 101, 6 the rest."""
    ids, place = np.full(SIZE, 6, dtype=np.int32), places(refcoco / "coco", "train2017")
    ids[0:10, 0:12] = 5
    del place["image_root"]
    place["panoptic_root"].mkdir(parents=True)
    write_id_png(place["panoptic_root"] / "000000000009.png", ids)
    segments = [
        {"id": 5, "category_id": 1, "iscrowd": 0, "area": 120, "bbox": [0, 0, 12, 10]},
        {"id": 6, "category_id": 2, "iscrowd": 0, "area": 480, "bbox": [0, 0, 30, 20]},
    ]
    annotation = {"image_id": 9, "file_name": "000000000009.png", "segments_info": segments}
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "wall", "isthing": 0}]
    content = {"annotations": [annotation], "categories": categories}
    content["images"] = [{**IMAGES[0], "file_name": "000000000009.jpg"}]
    place["panoptic_json"].write_text(json.dumps(content))
    return place


def load_split(root, split="testA", **options):
    images = root / "coco" / "train2014"
    return datasets.load_refcoco(root / "refcoco", "unc", split, images, **options)


def test_objects_are_flattened_and_crowds_left_out(refcoco):
    records, texts = load_split(refcoco), ["the thing 101", "object 101", "the thing 102"]
    assert [r["expressions"][0]["text"] for r in records] == [*texts, "object 102"]
    assert {Path(r["file_name"]).name for r in records} == {"COCO_train2014_000000000009.jpg"}
    entities, expected = load_from_record(records[0]), np.zeros(SIZE, dtype=int)
    expected[0:10, 0:12] = 101
    expected[2:6, 2:6] = 102  # the smaller on top
    assert np.array_equal(np.array([0, *entities.segment_ids])[entities.ids], expected)
    # A split without refs is named beside those that have some.
    refused("no ref is in split 'testB'; it has .*testA", load_split, refcoco, "testB")


def test_panoptic_segments_stand_for_objects_by_overlap(refcoco, tokenizer):
    panoptic, own = write_panoptic(refcoco), load_split(refcoco)
    told = "image 9: object 10[12] is none of its 2 segments"
    refused(told, load_split, refcoco, **panoptic)
    records = load_split(refcoco, match="overlap", **panoptic)
    assert [r["expressions"] for r in records] == [r["expressions"] for r in own]
    assert records[0]["file_name"] == own[0]["file_name"]
    sizes = {"image_size": 32, "colormap_size": 32, "num_image_tokens": 4}
    mapper = GroundingMapper(is_train=False, tokenizer=tokenizer, task="refer", **sizes)
    mapped = [mapper(record) for record in records]
    assert mapped[0]["entities_full"].segment_ids == [5, 6]
    # Object 101 is segment 5; nothing is like object 102.
    assert [mapped[k]["phrases"][0]["entity_indices"] for k in (0, 2)] == [[0], []]
    truth = mapped[0]["annotation"]["segments_info"]
    assert [s["id"] for s in truth] == [101, 102, 103]  # the objects stay the truth


def test_images_may_have_the_names_of_2017(refcoco):
    where, options = (refcoco / "refcocog", "umd", "train", "pictures"), {"per": "image"}
    (record,) = datasets.load_refcoco(*where, names_of_2017=True, **options)
    assert record["file_name"] == "pictures/000000000025.jpg"
    assert [e["sent_id"] for e in record["expressions"]] == [30, 31]


def test_objects_of_different_images_may_have_one_id(refcoco):
    path = refcoco / "refcocog" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["id"] = 101
    path.write_text(json.dumps(content))
    images = {r["image_id"]: r for r in load_instances(path, "x", ("describe",))}
    segments = {key: record["entities"]["segments_info"] for key, record in images.items()}
    assert [s["id"] for s in segments[25]] == [101] and segments[9][0]["bbox"] == [0, 0, 12, 10]


def test_every_published_split_is_registered(refcoco):
    expected = {
        refcoco_name(folder, by, split, kind)
        for folder, by, splits in REFCOCO_SPLITS
        for split in splits
        for kind in ("instances", "panoptic")
    }
    assert len(expected) == 40 and "gella_refcocoplus_unc_testB_panoptic" in expected
    assert expected <= set(DatasetCatalog.list())
    with nothing_registered() as load:
        register_all(refcoco)
        records = load("gella_refcocoplus_unc_testA")
        assert Path(records[0]["file_name"]).is_file() and len(records) == 4
        meta = MetadataCatalog.get("gella_refcocoplus_unc_testA")
        assert (meta.form, meta.split) == ("refcoco", "testA")
        write_panoptic(refcoco)
        masks = load("gella_refcoco_google_val_panoptic")[0]["entities"]
        assert masks["segments_info"][0]["id"] == 5 and Path(masks["file_name"]).is_file()
        (record,) = load("gella_refcocog_umd_train")  # one per image in training
        assert len(record["expressions"]) == 2


TARGETS = [[101, 102, 101], [-1], [], 102, -1]
MEANT = [[101, 102], [], [], [102], []]


@pytest.mark.parametrize("suffix", ["json", "p"])
def test_expressions_may_mean_several_objects_or_none(refcoco, tokenizer, suffix):
    refs = [{**ref(k, ann_id, 9, "val")} for k, ann_id in enumerate(TARGETS)]
    refs[1]["no_target"], folder = True, refcoco / "grefcoco"
    (folder / "refs(unc).p").unlink()
    told = r"grefcoco/grefs\(unc\).json does not exist; .*datasets/README.md"
    with nothing_registered() as load:
        register_all(refcoco)
        refused(told, load, "gella_grefcoco_unc_val", error=FileNotFoundError)
        write_refs(folder / "grefs(unc).p", refs)
        if suffix == "json":
            (folder / "grefs(unc).json").write_text(json.dumps(refs))
            (folder / "grefs(unc).p").write_bytes(b"not read")
        one = load("gella_grefcoco_unc_val")
        report = check_dataset("gella_grefcoco_unc_val")
    assert [r["expressions"][0]["segment_ids"] for r in one[::2]] == MEANT and len(one) == 10
    counts = {"refs": 5, "expressions": 10, "expressions of several objects": 2}
    assert report.figures.items() >= {**counts, "expressions of no objects": 6}.items()
    assert [f.kind for f in report.findings] == []
    sizes = {"image_size": 32, "colormap_size": 32, "num_image_tokens": 4}
    for is_train in (False, True):
        mapper = GroundingMapper(is_train=is_train, tokenizer=tokenizer, task="refer", **sizes)
        found = [(m["phrases"][0], m["entities"].segment_ids) for m in map(mapper, one[::2])]
        # None would leave the noun out of the loss: it is to be learnt that it names nothing.
        assert [sorted(ids[k] for k in p["entity_indices"]) for p, ids in found] == MEANT
        assert [p["is_plural"] for p, _ in found] == [True, False, False, False, False]
    panoptic = write_panoptic(refcoco)
    where = (folder, "unc", "val", refcoco / "coco" / "train2014")
    joined = datasets.load_refcoco(*where, match="overlap", per="image", **panoptic)
    assert [e["segment_ids"] for e in joined[0]["expressions"][::2]] == MEANT
    refused("object 10[12] is none of its 2 segments", datasets.load_refcoco, *where, **panoptic)
    refs[0]["ann_id"] = [101, 7, 8]
    write_refs(folder / "grefs(unc).p", refs)
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    refused(r"grefs.*ref 0, image 9: object 7, 8 is not in", datasets.load_refcoco, *where)
    assert held_out_images(refcoco) == {"9"}
    (folder / "grefs(unc).json").write_text(json.dumps([{**refs[1], "image_id": 77}]))
    assert held_out_images(refcoco) == {"9", "77"}


def test_held_out_images_are_those_of_every_other_split_on_disk(refcoco, caplog):
    assert held_out_images(refcoco) == {"9"}
    path = refcoco / "refcocog" / "refs(google).p"
    refs = pickle.loads(path.read_bytes())
    refs[2]["split"] = "test"
    write_refs(path, refs)
    assert held_out_images(refcoco) == {"9", "25"}
    path.unlink()
    (refcoco / "refcocog" / "refs(umd).p").unlink()
    with caplog.at_level(logging.WARNING, logger="gella"):
        assert held_out_images(refcoco) == {"9"}
    assert "refcocog" in caplog.text and "NOT left out" in caplog.text
    told = "EXCLUDE_REFCOCO_VAL_TEST.*datasets/README.md"
    refused(told, held_out_images, refcoco / "coco", error=FileNotFoundError)


def test_the_key_is_off_by_default_and_only_coco_train2017_loses_images(
    refcoco, small_shapes, monkeypatch, gella_log
):
    path = refcoco / "refcoco+" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    refs[0]["image_id"] = "002"  # of the shapes; ids count by value
    write_refs(path, refs)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(refcoco))
    cfg = get_cfg()
    add_gella_config(cfg)
    off = cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST
    with registered(datasets.register_panoptic, **places(small_shapes, "train")) as name:
        cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST = True
        assert len(load_records([name], "DATASETS.TRAIN", cfg)) == 6
        MetadataCatalog.get(name).set(coco_train2017=True)
        assert "left out" not in gella_log.text
        left = load_records([name], "DATASETS.TRAIN", cfg)
        assert [r["image_id"] for r in left] == [1, 3, 4, 5, 6]
        assert "left out 1 of 6 images (1 of 6 records)" in gella_log.text
        assert len(load_records([name], "DATASETS.TEST", cfg)) == 6
        cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST = off
        assert len(load_records([name], "DATASETS.TRAIN", cfg)) == 6
    marked = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("coco_train2017")]
    assert sorted(marked) == ["gella_coco_panoptic_train2017", "gella_coco_png_train2017"]


def test_refs_of_python_2_are_text(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'a dog'\np3\nsS'ref_id'\np4\nI7\nsa.")
    assert read_refs(path) == [{"sent": "a dog", "ref_id": 7}]


@pytest.fixture
def damaged(small_shapes, tmp_path):
    """Narratives of which one noun and one piece of plain text are not in their captions."""
    narratives = json.loads((small_shapes / "annotations" / "png_shapes_val.json").read_text())
    noun = next(s for s in narratives[1]["segments"] if s["segment_ids"])
    plain = next(s for s in narratives[2]["segments"] if not s["noun"] and s["utterance"].strip())
    noun["utterance"], plain["utterance"] = "zebra", "qqq xyz"
    blank = {"utterance": " ", "segment_ids": [], "plural": False, "noun": False}
    narratives[0]["segments"].append(blank)
    (tmp_path / "png.json").write_text(json.dumps(narratives))
    return tmp_path / "png.json", narratives


def test_what_is_unaligned_or_names_nothing_is_counted(small_shapes, damaged, gella_log):
    path, narratives = damaged
    for segment in narratives[3]["segments"]:
        segment.update(segment_ids=[], noun=False)
    path.write_text(json.dumps(narratives))
    records = datasets.load_png(path, **places(small_shapes, "val"))
    (lost,) = [p for record in records for p in record["phrases"] if p["start"] < 0]
    assert len(records) == 3 and (lost["text"], lost["end"]) == ("zebra", -1)
    assert lost["segment_ids"]
    assert "1 phrases" in gella_log.text and "1 narratives" in gella_log.text


def test_what_does_not_align_is_listed(small_shapes, damaged, tmp_path, capsys):
    (path, narratives), out = damaged, tmp_path / "spans.json"
    main = prepare_png.main

    def not_checked(name, message):
        capsys.readouterr()
        assert main(["--check", name]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error

    assert main(["--check", str(path), "--json", str(out)]) == 1
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "'zebra'" in printed and f"image {narratives[1]['image_id']}" in printed
    spoken = [s for n in narratives for s in n["segments"] if s["utterance"].strip()]
    nouns = sum(bool(s["noun"] or s["segment_ids"]) for s in spoken)
    figures = {"utterances": len(spoken), "aligned": len(spoken) - 2}
    figures |= {"narratives": 4, "nouns": nouns, "aligned_nouns": nouns - 1}
    assert report.items() >= figures.items()
    assert report["unaligned"][0]["caption"] == narratives[1]["caption"]
    keys = ("narrative", "image_id", "utterance", "is_noun")
    assert [tuple(entry[key] for key in keys) for entry in report["unaligned"]] == [
        (1, narratives[1]["image_id"], "zebra", True),
        (2, narratives[2]["image_id"], "qqq xyz", False),
    ]
    assert [main(["--check", str(path), "--allow", n]) for n in "12"] == [1, 0]
    narratives_json = small_shapes / "annotations" / "png_shapes_val.json"
    place = places(small_shapes, "val")
    with registered(datasets.register_png, png_json=narratives_json, **place) as name:
        capsys.readouterr()
        assert main(["--check", name]) == 0
        assert f"next: python datasets/check.py {name}" in capsys.readouterr().out
    with registered(datasets.register_panoptic, **place) as name:
        not_checked(name, "holds no narratives")
    not_checked("gella_nothing", "gella_coco_png_val2017")
    not_checked(str(tmp_path / "absent.json"), "does not exist")
    path.write_text("[{]")
    not_checked(str(path), "not a JSON file")
    with pytest.raises(SystemExit, match="^2$"):
        main([])

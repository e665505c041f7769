"""RefCOCO, RefCOCO+ and RefCOCOg: real layout, both kinds of entities, and leaving images out."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from dataset_scripts import prepare_small_shapes, registered
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gella import add_gella_config
from gella.data import register as datasets
from gella.data.mapper import GroundingMapper
from gella.data.records import RecordStore
from gella.data.refcoco import held_out_images, load_instances, without_held_out
from gella.data.register import REFCOCO_SPLITS, refcoco_name, register_all
from gella.engine.trainer import load_records
from gella.entities.entity_map import id_to_rgb
from gella.entities.sources import load_from_record
from gella.text.prompts import load_tokenizer

SIZE = (20, 30)


def box_polygon(x: int, y: int, width: int, height: int) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


@pytest.fixture
def root(tmp_path):
    """Two train2014 images as RefCOCO has them: polygons, RLE, a crowd, suffixed ref names."""
    names = {9: "COCO_train2014_000000000009.jpg", 25: "COCO_train2014_000000000025.jpg"}
    (tmp_path / "coco" / "train2014").mkdir(parents=True)
    for name in names.values():
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "coco" / "train2014" / name)
    images = [
        {"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for i, name in names.items()
    ]
    whole = np.zeros(SIZE, dtype=np.uint8)
    whole[12:20, 20:30] = 1
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(whole.ravel(order="F"))) + 1)]
    rle = {"size": list(SIZE), "counts": [412, *runs]}
    rle["counts"].append(SIZE[0] * SIZE[1] - sum(rle["counts"]))
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
    for folder, split_by, _ in REFCOCO_SPLITS:
        (tmp_path / folder).mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": []}
        (tmp_path / folder / "instances.json").write_text(json.dumps(content))
        held_out = "testA" if split_by == "unc" else "val"
        refs = [ref(1, 101, 9, held_out, names), ref(2, 102, 9, held_out, names)]
        refs.append(ref(3, 201, 25, "train", names))
        write_refs(tmp_path / folder / f"refs({split_by}).p", refs)
    return tmp_path


def ref(ref_id, ann_id, image_id, split, names):
    sentences = [
        {"sent_id": 10 * ref_id + k, "sent": text, "raw": text, "tokens": text.split()}
        for k, text in enumerate([f"the thing {ann_id}", f"object {ann_id}"])
    ]
    stem = names[image_id].rsplit(".", 1)[0]
    return {
        "ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1,
        "split": split, "file_name": f"{stem}_{ann_id}.jpg", "sentences": sentences,
        "sent_ids": [s["sent_id"] for s in sentences],
    }  # fmt: skip


def write_refs(path: Path, refs: object) -> None:
    path.write_bytes(pickle.dumps(refs, protocol=2))


def write_panoptic(root: Path) -> dict[str, Path]:
    """Panoptic segments of image 9 with other ids than the objects': 5 covers 101, 6 the rest."""
    ids = np.full(SIZE, 6, dtype=np.int32)
    ids[0:10, 0:12] = 5
    notes = root / "coco" / "annotations"
    (notes / "panoptic_train2017").mkdir(parents=True)
    Image.fromarray(id_to_rgb(ids)).save(notes / "panoptic_train2017" / "000000000009.png")
    segments = [
        {"id": 5, "category_id": 1, "iscrowd": 0, "area": 120, "bbox": [0, 0, 12, 10]},
        {"id": 6, "category_id": 2, "iscrowd": 0, "area": 480, "bbox": [0, 0, 30, 20]},
    ]
    image = {"id": 9, "file_name": "000000000009.jpg", "height": SIZE[0], "width": SIZE[1]}
    content = {
        "images": [image],
        "annotations": [
            {"image_id": 9, "file_name": "000000000009.png", "segments_info": segments}
        ],
        "categories": [
            {"id": 1, "name": "cat", "isthing": 1},
            {"id": 2, "name": "wall", "isthing": 0},
        ],
    }
    (notes / "panoptic_train2017.json").write_text(json.dumps(content))
    return {
        "panoptic_json": notes / "panoptic_train2017.json",
        "panoptic_root": notes / "panoptic_train2017",
    }


def test_objects_are_flattened_and_crowds_left_out(root):
    records = datasets.load_refcoco(root / "refcoco", "unc", "testA", root / "coco" / "train2014")
    assert [r["expressions"][0]["text"] for r in records] == [
        "the thing 101", "object 101", "the thing 102", "object 102"
    ]  # fmt: skip
    assert {Path(r["file_name"]).name for r in records} == {"COCO_train2014_000000000009.jpg"}
    entities = load_from_record(records[0])
    expected = np.zeros(SIZE, dtype=int)
    expected[0:10, 0:12] = 101
    expected[2:6, 2:6] = 102  # the smaller on top
    found = np.array([0, *entities.segment_ids])[entities.ids]
    assert np.array_equal(found, expected)


def test_panoptic_segments_stand_for_objects_by_overlap(root, tokenizer_dir):
    panoptic = write_panoptic(root)
    images = root / "coco" / "train2014"
    with pytest.raises(ValueError, match="image 9: object 10[12] is none of its 2 segments"):
        datasets.load_refcoco(root / "refcoco", "unc", "testA", images, **panoptic)
    records = datasets.load_refcoco(
        root / "refcoco", "unc", "testA", images, match="overlap", **panoptic
    )
    own = datasets.load_refcoco(root / "refcoco", "unc", "testA", images)
    assert [r["expressions"] for r in records] == [r["expressions"] for r in own]
    assert records[0]["file_name"] == own[0]["file_name"]
    mapper = GroundingMapper(
        is_train=False,
        tokenizer=load_tokenizer(str(tokenizer_dir)),
        image_size=32,
        colormap_size=32,
        num_image_tokens=4,
        task="refer",
    )
    mapped = [mapper(record) for record in records]
    assert mapped[0]["entities_full"].segment_ids == [5, 6]
    assert mapped[0]["phrases"][0]["entity_indices"] == [0]  # object 101 is segment 5
    assert mapped[2]["phrases"][0]["entity_indices"] == []  # nothing is like object 102
    truth = mapped[0]["annotation"]["segments_info"]
    assert [s["id"] for s in truth] == [101, 102, 103]  # the objects stay the truth


def test_images_may_have_the_names_of_2017(root):
    (record,) = datasets.load_refcoco(
        root / "refcocog", "umd", "train", "pictures", per="image", names_of_2017=True
    )
    assert record["file_name"] == "pictures/000000000025.jpg"
    assert [e["sent_id"] for e in record["expressions"]] == [30, 31]


def test_objects_of_different_images_may_have_one_id(root):
    path = root / "refcocog" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["id"] = 101
    path.write_text(json.dumps(content))
    images = {r["image_id"]: r for r in load_instances(path, "x", ("describe",))}
    assert [s["id"] for s in images[25]["entities"]["segments_info"]] == [101]
    assert images[9]["entities"]["segments_info"][0]["bbox"] == [0, 0, 12, 10]


def test_every_published_split_is_registered(root):
    expected = {
        refcoco_name(folder, by, split, kind)
        for folder, by, splits in REFCOCO_SPLITS
        for split in splits
        for kind in ("instances", "panoptic")
    }
    assert len(expected) == 32 and "gella_refcocoplus_unc_testB_panoptic" in expected
    assert expected <= set(DatasetCatalog.list())
    before = {name: DatasetCatalog.pop(name) for name in DatasetCatalog.list() if "gella" in name}
    metadata = {name: MetadataCatalog.pop(name) for name in before}
    try:
        register_all(root)
        records = DatasetCatalog.get("gella_refcocoplus_unc_testA")
        assert Path(records[0]["file_name"]).is_file() and len(records) == 4
        meta = MetadataCatalog.get("gella_refcocoplus_unc_testA")
        assert (meta.form, meta.split) == ("refcoco", "testA")
        write_panoptic(root)
        records = DatasetCatalog.get("gella_refcoco_google_val_panoptic")
        assert records[0]["entities"]["segments_info"][0]["id"] == 5
        assert Path(records[0]["entities"]["file_name"]).is_file()
        (record,) = DatasetCatalog.get("gella_refcocog_umd_train")  # one per image in training
        assert len(record["expressions"]) == 2
    finally:
        for name in [n for n in DatasetCatalog.list() if "gella" in n]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.update(before)
        MetadataCatalog.update(metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs: refs[0].pop("ann_id"), "ref 1, image 9: .* no field 'ann_id'"),
        (lambda refs: refs[0].update(ann_id=7), "ref 1, image 9: object 7 is not"),
        (lambda refs: refs[0].update(image_id=77), "ref 1, image 77: object 101 is not"),
        (lambda refs: refs[0].update(sentences="x"), "ref 1, image 9: 'sentences' is a str"),
        (lambda refs: refs[0]["sentences"][0].pop("sent"), "ref 1, .* no field 'sent'"),
        (lambda refs: [r.update(split="val") for r in refs], "split 'testA'; it has val"),
        (lambda refs: refs[0].pop("split"), "ref 0: .* no field 'split'"),
    ],
)
def test_wrong_refs_are_named(root, change, message):
    path = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    write_refs(path, refs)
    with pytest.raises(ValueError, match=rf"refs\(unc\).p: .*{message}"):
        datasets.load_refcoco(root / "refcoco", "unc", "testA", "x")


def test_refs_that_are_no_list_or_run_code_are_refused(root):
    path = root / "refcoco" / "refs(unc).p"
    write_refs(path, {"a": 1})
    with pytest.raises(ValueError, match="holds a dict, not a list of refs"):
        datasets.load_refcoco(root / "refcoco", "unc", "testA", "x")
    write_refs(path, print)
    with pytest.raises(ValueError, match="refused.*print"):
        datasets.load_refcoco(root / "refcoco", "unc", "testA", "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][1].update(id=101),
            "annotation id 101 occurs twice in image 9",
        ),
        (lambda c: c["annotations"][1].update(image_id=3), "annotation 102: image 3 is not in"),
        (lambda c: c["annotations"][1].pop("segmentation"), "annotation 102: .*segmentation"),
        (lambda c: c["images"].append(c["images"][0]), "image id 9 occurs twice"),
        (lambda c: c["images"][0].update(height=None), "image 9: 'height' is None"),
        (lambda c: c["annotations"][1].update(id="one"), "'id' is 'one'"),
        (lambda c: c.update(annotations={}), "'annotations' is a dict"),
    ],
)
def test_wrong_instances_are_named(root, change, message):
    path = root / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances.json: .*{message}"):
        datasets.load_refcoco(root / "refcoco", "unc", "testA", "x")


# -- DATASETS.EXCLUDE_REFCOCO_VAL_TEST -------------------------------------------------------------


def test_held_out_images_are_those_of_every_other_split_on_disk(root, caplog):
    assert held_out_images(root) == {"9"}
    path = root / "refcocog" / "refs(google).p"
    refs = pickle.loads(path.read_bytes())
    refs[2]["split"] = "test"
    write_refs(path, refs)
    assert held_out_images(root) == {"9", "25"}
    path.unlink()
    (root / "refcocog" / "refs(umd).p").unlink()
    with caplog.at_level(logging.WARNING, logger="gella"):
        assert held_out_images(root) == {"9"}
    assert "refcocog" in caplog.text and "NOT left out" in caplog.text
    with pytest.raises(FileNotFoundError, match="EXCLUDE_REFCOCO_VAL_TEST.*datasets/README.md"):
        held_out_images(root / "coco")


def test_only_coco_train2017_loses_images_and_the_log_says_how_many(root, caplog):
    records = [{"image_id": i, "tasks": ("ground",), "caption": str(i)} for i in (9, 9, 25, 30)]
    name = "gella_test_excluded"
    try:
        assert list(without_held_out(records, name, root)) == records
        MetadataCatalog.get(name).set(coco_train2017=True)
        with caplog.at_level(logging.INFO, logger="gella"):
            left = without_held_out(RecordStore.pack(records), name, root)
    finally:
        MetadataCatalog.remove(name)
    assert [r["image_id"] for r in left] == [25, 30]
    assert "left out 1 of 3 images (2 of 4 records)" in caplog.text
    marked = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("coco_train2017")]
    assert sorted(marked) == ["gella_coco_panoptic_train2017", "gella_coco_png_train2017"]


def test_the_key_is_off_by_default_and_spares_evaluation(root, tmp_path, monkeypatch):
    shapes_root = prepare_small_shapes(tmp_path / "shapes")
    notes = shapes_root / "annotations"
    where = (shapes_root / "train", notes / "panoptic_train", notes / "panoptic_train.json")
    path = root / "refcoco+" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    refs[0]["image_id"] = 2  # of the shapes
    write_refs(path, refs)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    cfg = get_cfg()
    add_gella_config(cfg)
    with registered(datasets.register_panoptic, *where) as name:
        MetadataCatalog.get(name).set(coco_train2017=True)
        assert len(load_records([name], "DATASETS.TRAIN", cfg)) == 6
        cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST = True
        left = load_records([name], "DATASETS.TRAIN", cfg)
        assert [r["image_id"] for r in left] == [1, 3, 4, 5, 6]
        assert len(load_records([name], "DATASETS.TEST", cfg)) == 6

"""Entity masks from every file format, and one clear error for every way a file can be wrong."""

import json
import logging
import os
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from PIL import Image
from refusals import refused

from gella import add_gella_config
from gella.data.register import choose_entities
from gella.entities.entity_map import EntityMap, id_to_rgb, rgb_to_id
from gella.entities.rle import decode_segmentation, encode_mask
from gella.entities.sources import (
    AnnotationSource,
    FileSource,
    LiveSource,
    load_entities,
    load_from_record,
    source_for,
)

SIZE = (12, 17)
IDS = np.zeros(SIZE, np.int32)
IDS[1:5, 2:9], IDS[3:9, 7:15], IDS[10:, :6] = 70000, 300, 9


def write_png(path, ids):
    Image.fromarray(id_to_rgb(ids)).save(path)
    return path


def info(*ids, crowd=()):
    return [{"id": i, "category_id": 1, "iscrowd": int(i in crowd)} for i in ids]


def assert_same(entities, ids):
    np.testing.assert_array_equal(np.array([0, *entities.segment_ids])[entities.ids], ids)


@pytest.mark.parametrize("format", ["auto", "panoptic_png"])
def test_panoptic_png_keeps_ids_order_and_leaves_crowd_out(tmp_path, format):
    path = write_png(tmp_path / "a.png", IDS)
    segments = info(300, 9, 70000, crowd=(9,))
    entities = load_entities(path, *SIZE, format=format, segments_info=segments)
    assert entities.segment_ids == [300, 70000]
    assert_same(entities, np.where(IDS == 9, 0, IDS))
    assert_same(load_entities(path, *SIZE, format=format), IDS)


def test_npz_with_masks_or_ids(tmp_path):
    path, masks = tmp_path / "m.npz", np.zeros((3, *SIZE), dtype=bool)
    masks[0, :6], masks[1, 4:9], masks[2, 5, 5] = True, True, True
    np.savez_compressed(path, masks=masks, scores=np.array([0.9, 0.4, 0.6]))
    loaded = load_entities(path, *SIZE)
    assert loaded.segment_ids == [1, 2, 3]
    np.testing.assert_array_equal(loaded.bitmasks(), masks)
    np.testing.assert_allclose(loaded.scores, [0.9, 0.4, 0.6])
    np.savez(path, ids=IDS)
    assert_same(load_entities(path, *SIZE), IDS)


def test_npy_and_a_constant_alpha(tmp_path):
    path, masks = tmp_path / "m.npy", np.stack([IDS == 300, IDS == 9])
    for array, expected in ((IDS, IDS), (masks, masks[0] + 2 * masks[1])):
        np.save(path, array)
        assert_same(load_entities(path, *SIZE), expected)
    for array, message in (
        (IDS.T, "17x12|12x17"),
        (IDS * 1.0, r"m\.npy.*ids must be int32 .* got float64"),
        (np.array([None]), r"m\.npy.*Python objects"),
    ):
        np.save(path, array)
        refused(message, load_entities, path, *SIZE)
    path.write_bytes(path.read_bytes()[:40])
    refused(r"m\.npy", load_entities, path, *SIZE)
    Image.fromarray(id_to_rgb(IDS)).convert("RGBA").save(tmp_path / "a.png")
    assert_same(load_entities(tmp_path / "a.png", *SIZE), IDS)


@pytest.mark.parametrize("scores", [(0.9, 0.8), (0.8, 0.9)])
def test_a_whole_and_its_part_are_two_entities_whatever_their_scores(tmp_path, scores):
    masks = np.zeros((2, *SIZE), dtype=bool)
    masks[0, 1:11, 1:15], masks[1, 4:7, 3:6] = True, True
    path = tmp_path / "results.json"
    entries = [{"image_id": 1, "segmentation": encode_mask(m), "score": s}
               for m, s in zip(masks, scores)]  # fmt: skip
    path.write_text(json.dumps(entries))
    loaded = load_entities(path, *SIZE, image_id=1)
    assert loaded.segment_ids == [1, 2] and loaded.scores.tolist() == pytest.approx(scores)
    np.testing.assert_array_equal(loaded.bitmasks(), masks)
    np.testing.assert_array_equal(loaded.ids, masks[0] + masks[1].astype(int))


def test_shapes_without_a_pixel_are_counted_and_named(tmp_path, gella_log):
    square, line = [2, 2, 8, 2, 8, 8, 2, 8], [1.0, 1.0, 2.0, 2.0]
    nothing = encode_mask(np.zeros(SIZE))
    outlines = ([square], [line], [[]], [], nothing, [nothing, line], encode_mask(IDS == 300))
    segments = [{"id": 10 + k, "segmentation": outline} for k, outline in enumerate(outlines)]
    path = tmp_path / "instances.json"
    path.write_text("{}")
    for _ in range(2):
        options = {"format": "coco_instances", "segments_info": segments, "image_id": 3}
        assert load_entities(path, *SIZE, **options).segment_ids == [10, 16]
    told = f"image 3, entity file {path}: 5 of 7 masks have no pixel and are left out: "
    assert gella_log.messages == [told + "11, 12, 13, 14, 15"]


def test_results_json_takes_every_coding(tmp_path):
    masks = np.zeros((3, *SIZE), dtype=bool)
    masks[0, 2:9, 2:9], masks[1, 4:11, 4:11], masks[2, 0:3, 12:16] = True, True, True
    flat = masks[1].ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    plain = {"size": list(SIZE), "counts": np.diff([0, *edges, flat.size]).tolist()}
    codes = encode_mask(masks[0]), plain, [[12, 0, 16, 0, 16, 3, 12, 3]]
    results = [
        {"image_id": 5, "category_id": 1, "segmentation": code, "score": score}
        for code, score in zip(codes, (0.3, 0.8, 0.5))
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**results[0], "image_id": 6}, *results]))
    for image_id in (5, "5"):  # ids are integers or text in the wild
        loaded = load_entities(path, *SIZE, image_id=image_id)
        np.testing.assert_array_equal(loaded.bitmasks(), masks)
        np.testing.assert_allclose(loaded.scores, [0.3, 0.8, 0.5])
    assert load_entities(path, *SIZE, image_id=6, format="coco_results").num_entities == 1


def test_segments_of_an_instance_json(tmp_path):
    square, bar = [2, 2, 8, 2, 8, 8, 2, 8], [6, 4, 14, 4, 14, 6, 6, 6]
    inside, spot = np.zeros((2, *SIZE), dtype=bool), np.zeros(SIZE, dtype=bool)
    inside[0, 2:8, 2:8], inside[1, 4:6, 6:14], spot[3:5, 3:5] = True, True, True
    segments = [
        {"id": 900, "segmentation": [square, bar], "iscrowd": 0},  # overlapping parts: a union
        {"id": 31, "segmentation": [bar, encode_mask(inside[0])]},  # a part may be RLE
        {"id": 5, "segmentation": encode_mask(spot)},
        {"id": 6, "segmentation": encode_mask(np.ones(SIZE)), "iscrowd": 1},
    ]
    path, options = tmp_path / "instances.json", {"format": "coco_instances", "image_id": 1}
    path.write_text("{}")
    for first in segments[:2]:
        loaded = load_entities(path, *SIZE, segments_info=[first, *segments[2:]], **options)
        assert loaded.segment_ids == [first["id"], 5]
        np.testing.assert_array_equal(loaded.bitmasks(), [inside.any(0), spot])
    missing = "image 1.*instances.json.*segment 7.*'segmentation' is missing"
    refused(missing, load_entities, path, *SIZE, segments_info=[{"id": 7}], **options)
    annotations = [{**segment, "image_id": k} for k, segment in enumerate((*segments, *segments))]
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    whole = load_entities(path, *SIZE, image_id=2)  # "auto": by the outlines in it
    assert whole.segment_ids == [5] and np.array_equal(whole.bitmasks()[0], spot)
    absent = "image 77.*instances.json.*no annotations"
    refused(absent, load_entities, path, *SIZE, format="coco_instances", image_id=77)


def test_a_rewritten_file_is_read_again(tmp_path):
    path = tmp_path / "results.json"
    codes = [encode_mask(np.ones(SIZE)), encode_mask(IDS == 9)]
    for count in (1, 2):
        entries = [{"image_id": 1, "segmentation": c, "score": 1.0} for c in codes[:count]]
        path.write_text(json.dumps(entries))
        os.utime(path, ns=(count * 10**9, count * 10**9))
        assert load_entities(path, *SIZE, image_id=1).num_entities == count


def test_real_coco_sample_equals_a_comparison_per_segment(coco_sample):
    folder = coco_sample / "annotations"
    panoptic = json.loads((folder / "panoptic_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in panoptic["images"]}
    for annotation in panoptic["annotations"]:
        path = folder / "panoptic_val2017" / annotation["file_name"]
        image_id, segments = annotation["image_id"], annotation["segments_info"]
        entities = load_entities(path, *sizes[image_id], segments_info=segments)
        ids = rgb_to_id(np.asarray(Image.open(path)))
        own = [segment for segment in segments if not segment["iscrowd"]]
        assert len(own) < len(segments) and (ids == 0).any()  # the sample has crowd, and void
        assert entities.segment_ids == [segment["id"] for segment in own]
        for mask, segment in zip(entities.bitmasks(), own):
            np.testing.assert_array_equal(mask, ids == segment["id"])
        from_json = folder / "panoptic_val2017.json"
        found = load_entities(from_json, *sizes[image_id], image_id=image_id)
        np.testing.assert_array_equal(found.ids, entities.ids)


def test_run_lengths_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    for density, size in product((0.0, 0.02, 0.5, 1.0), ((1, 1), (7, 90), (300, 211))):
        mask = rng.random(size) < density
        mask[: size[0] // 2] |= rng.random() < 0.5  # long runs too
        code = encode_mask(mask)
        for given in (code, {**code, "counts": code["counts"].encode()}):
            np.testing.assert_array_equal(decode_segmentation(given, size), mask)


CODE = encode_mask(IDS == 300)["counts"]
DAMAGED = ["", "0", "52", "P", "04P", "0" * 50, "00N", "hello", "é", 7]


@pytest.mark.parametrize("counts", [*DAMAGED, *(CODE[:end] for end in range(1, len(CODE)))])
def test_run_lengths_that_do_not_add_up_are_refused(counts):
    """pycocotools decodes some of these to whatever lies in memory."""
    with pytest.raises(ValueError, match="runs cover|run lengths"):
        decode_segmentation({"size": list(SIZE), "counts": counts}, SIZE)


def records_of(folder, count=3):
    """Records annotated by panoptic PNGs; image k has the ids of `IDS` plus k."""
    (folder / "panoptic").mkdir()
    records = []
    for k in range(count):
        file = write_png(folder / "panoptic" / f"{k:04d}.png", np.where(IDS > 0, IDS + k, 0))
        place = {"format": "panoptic_png", "file_name": str(file)}
        place["segments_info"] = info(9 + k, 300 + k, 70000 + k)
        record = {"file_name": f"pictures/{k:04d}.jpg", "image_id": 50 + k, "entities": place}
        records.append({**record, "height": SIZE[0], "width": SIZE[1], "tasks": ("ground",)})
    return records


def write_source(kind, folder, count):
    """Masks of the first `count` images as one kind of file; every image has one entity, k + 1."""
    path, annotations = folder / "found", []
    path.mkdir()
    for k in range(count):
        name = f"{k:04d}" if k or kind != "gray_png" else "50"  # one is named by its image id
        entry, ids = {"image_id": 50 + k, "id": k + 1, "score": 0.5}, np.where(IDS == 300, k + 1, 0)
        if kind == "npz":
            np.savez(path / f"{name}.npz", ids=ids)
        elif kind == "gray_png":
            Image.fromarray(ids.astype(np.uint8)).save(path / f"{name}.png")
        elif kind in ("panoptic_png", "coco_panoptic"):
            write_png(path / f"{name}.png", ids)
            entry |= {"file_name": f"{name}.png", "segments_info": info(k + 1)}
        else:
            entry["segmentation"] = encode_mask(ids > 0)
        annotations.append(entry)
    if kind in ("npz", "gray_png", "panoptic_png"):
        return path
    content = annotations if kind == "coco_results" else {"annotations": annotations}
    path.with_suffix(".json").write_text(json.dumps(content))
    return path.with_suffix(".json")


KINDS = ("npz", "gray_png", "panoptic_png", "coco_results", "coco_panoptic", "coco_instances")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_source_of_every_format(tmp_path, kind, named):
    records = records_of(tmp_path)
    source = FileSource(write_source(kind, tmp_path, 2), kind if named else "auto")
    assert source.missing([*records, *records]) == [52]
    refused("image 52: no masks in .*found", source.lead, records[2])
    source = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
    before = json.dumps(records)
    for k in range(2):
        led, given = source.lead(records[k]), records[k]["entities"]
        entities = load_from_record(led)
        assert entities.num_entities == 1
        np.testing.assert_array_equal(entities.ids > 0, IDS == 300)
        if kind != "coco_results":
            assert entities.segment_ids == [k + 1]
        np.testing.assert_array_equal(source.load(records[k]).ids, entities.ids)
        # A second source takes the place of the first; the annotation stays what it was.
        assert led["entities"]["targets"] is source.lead(led)["entities"]["targets"] is given
        assert AnnotationSource().lead(led)["entities"] is given
        assert AnnotationSource().load(led).segment_ids == [9 + k, 300 + k, 70000 + k]
    assert json.dumps(records) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image_id", [50, "50", "000000000050"])
def test_masks_are_found_by_the_value_of_an_id(tmp_path, kind, image_id):
    path = write_source(kind, tmp_path, 2)
    if path.is_dir():
        file = next(iter([*path.glob("0000.*"), *path.glob("50.*")]))
        file.rename(path / f"0000050{file.suffix}")
    record = {**records_of(tmp_path)[0], "image_id": image_id, "file_name": "COCO_50.jpg"}
    source = FileSource(path)
    assert source.missing([record]) == [] and source.load(record).num_entities == 1
    told = r"image 8: no masks in .*it has (50, 51|0000050.\w+, 0001.\w+)\)"
    refused(told, source.lead, {**record, "image_id": 8})


def test_the_results_are_not_read_again_for_every_image(tmp_path):
    path = write_source("coco_results", tmp_path, 3)
    led = [FileSource(path).lead(record) for record in records_of(tmp_path)]
    path.write_text("no longer JSON")
    assert [load_from_record(record).num_entities for record in led] == [1, 1, 1]


def test_missing_masks_are_told_before_anything_is_read(tmp_path, caplog):
    records = records_of(tmp_path, 9)
    entries = f"[['gella_*', 'auto', '{write_source('npz', tmp_path, 2)}']]"
    given, train = (records, "gella_some"), {"is_train": True}
    text = refused(None, choose_entities, *given, config(entries), **train)
    assert "gella_some: 7 of its 9 images have no masks in" in text and str(tmp_path) in text
    assert "52, 53, 54, 55, 56, ..." in text and "LEAVE_OUT_MISSING" in text
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, logger="gella"):
        twice = [*records, records[0]], "gella_some", config(entries, "True")
        kept = choose_entities(*twice, **train)
    assert [record["image_id"] for record in kept] == [50, 51, 50]
    assert all(record["entities"]["targets"] for record in kept)
    assert "7 of its 9 images" in caplog.text and "with 7 records" in caplog.text
    (tmp_path / "empty").mkdir()
    none = config(f"[['gella_*', 'auto', '{tmp_path / 'empty'}']]", "True")
    refused("9 of its 9 images", choose_entities, *given, none, **train)


def test_missing_and_shared_files_are_found(tmp_path):
    records = records_of(tmp_path)
    Path(records[1]["entities"]["file_name"]).unlink()
    assert AnnotationSource().missing([*records, *records]) == [51]
    assert LiveSource(EntityMap).missing(records) == []
    records[1]["file_name"] = "other/0000.jpg"  # two images never share a mask file
    source = FileSource(write_source("npz", tmp_path, 3))
    refused("pictures/0000.jpg and other/0000.jpg.*0000.npz", source.missing, records)


@pytest.mark.parametrize("name, format, message", [
    ("absent", "auto", "absent do not exist"),
    ("panoptic/0000.png", "auto", "give the folder"),
    ("panoptic", "coco_results", "folder.*coco_results"),
    ("found.json", "npz", "file.*npz"),
    ("found.json", "tiff", "tiff.*known: auto, panoptic_png"),
    ("cut.json", "auto", "cut.json.*not a JSON file"),
    ("found.json", "coco_panoptic", "found.json.*list of annotations"),
])  # fmt: skip
def test_a_source_that_cannot_be_is_refused(tmp_path, name, format, message):
    records_of(tmp_path)
    write_source("coco_results", tmp_path, 1)
    (tmp_path / "cut.json").write_text('[{"image_id": 5')
    refused(message, FileSource, tmp_path / name, format, error=(ValueError, FileNotFoundError))


@pytest.fixture
def catalog(tmp_path):
    """Two registered datasets of the same three images."""
    records, names = records_of(tmp_path), ("gella_sources_test_train", "gella_sources_test_val")
    for name in names:
        DatasetCatalog.register(name, lambda: records)
    yield names
    for name in names:
        DatasetCatalog.remove(name)


def config(entries="[]", leave_out="False"):
    cfg = get_cfg()
    add_gella_config(cfg)
    options = ("INPUT.GELLA.ENTITY_SOURCES", entries, "INPUT.GELLA.LEAVE_OUT_MISSING", leave_out)
    cfg.merge_from_list(list(options))
    return cfg


def test_the_command_line_chooses_per_dataset(tmp_path, catalog):
    train, val = catalog
    masks = write_source("coco_results", tmp_path, 3)
    cfg = config(f"[['*_test_val', 'auto', '{masks}'], ['gella_*', 'annotation', '']]")
    records, entries = DatasetCatalog.get(val), cfg.INPUT.GELLA.ENTITY_SOURCES
    led = choose_entities(records, val, cfg, is_train=False)
    assert [r["entities"]["file_name"] for r in led] == [str(masks)] * 3
    assert choose_entities(records, train, cfg, is_train=True) is records
    assert choose_entities(records, val, config(), is_train=False) is records
    assert isinstance(source_for(entries, train), AnnotationSource)
    # One index for all datasets of a file; of several entries the first counts.
    assert source_for(entries, val) is source_for(entries, "a_test_val")
    assert isinstance(source_for(entries[::-1], val), AnnotationSource)
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"INPUT:\n  GELLA:\n    ENTITY_SOURCES: [['{val}', coco_results, {masks}]]\n")
    cfg.merge_from_file(str(yaml))
    led = choose_entities(records, val, cfg, is_train=False)
    assert led[0]["entities"]["format"] == "coco_results"
    masks.write_text("[]")  # a file that was written anew is read anew
    assert source_for(entries, val).missing(records) == [50, 51, 52]


def test_only_training_leaves_images_out(tmp_path, catalog):
    train, val = catalog
    masks = write_source("coco_results", tmp_path, 2)
    entries, records = f"[['gella_sources_test_*', 'auto', '{masks}']]", DatasetCatalog.get(val)
    assert len(choose_entities(records, train, config(entries, "True"), is_train=True)) == 2
    told = "1 of its 3 images.*: 52"
    refused(told, choose_entities, records, val, config(entries, "True"), is_train=False)
    refused(told, choose_entities, records, train, config(entries), is_train=True)


@pytest.mark.parametrize("entry, message", [
    ("'gella_sources_test_val', 'auto', 'masks.json'", "'gella_sources_test_val'; each"),
    ("['gella_sources_test_val', 'auto']", "each entry is"),
    ("['gella_sources_test_val', 'auto', 5]", "each entry is"),
    ("['gella_sources_test_val', 'jpeg', 'masks']", "'jpeg'.*known: annotation, auto"),
    ("['gella_sources_test_vall', 'annotation', '']", "test_vall is no registered"),
    ("['gella_sources_test_val', 'auto', 'absent.json']", "absent.json do not exist"),
])  # fmt: skip
def test_a_wrong_entry_is_named(catalog, entry, message):
    given = DatasetCatalog.get(catalog[1]), catalog[1], config(f"[{entry}]")
    error = (ValueError, FileNotFoundError)
    refused(message, choose_entities, *given, error=error, is_train=False)

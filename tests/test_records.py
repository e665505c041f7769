"""Many records: compact, shared by forked readers, and equal to what plain dicts would be."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from pathlib import Path

import loading
import numpy as np
import pytest
import torch
from dataset_scripts import registered
from detectron2.data import DatasetCatalog, MetadataCatalog
from refusals import refused

from gella.data.narratives import load_png
from gella.data.panoptic import load_coco_panoptic
from gella.data.records import (
    RecordStore,
    concatenated,
    indices_with_task,
    mapped,
    selected,
)
from gella.data.register import dataset_records
from gella.data.sampling import GroundingDataset
from gella.utils.io import write_json


def plain_records(images: int = 3, each: int = 2) -> list[dict]:
    """Dicts as readers of one's own may return them: several of one image hold one ``entities``."""
    records = []
    for image_id in range(images):
        entities = {"format": "npz", "file_name": f"{image_id}.npz", "segments_info": [{"id": 5}]}
        for k in range(each):
            records.append(
                {
                    "image_id": image_id if image_id else "zero",
                    "tasks": ("ground",) if image_id % 2 else ("extract", "ground"),
                    "entities": entities,
                    "caption": f"caption {k} of {image_id}",
                }
            )
    return records


def test_a_store_gives_back_what_was_put_in():
    records = plain_records()
    store = RecordStore.pack(records)
    assert len(store) == 6 and list(store) == records == store[:] == store[0:6]
    assert store[-1] == records[-1] and store[np.int64(2)] == records[2]
    assert store[1::2] == records[1::2]
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"record {index} of 6"):
            store[index]
    store[0]["entities"]["segments_info"].clear()  # of a copy
    assert store[0] == records[0]
    assert list(pickle.loads(pickle.dumps(store))) == records
    assert list(RecordStore.pack([{"name": 1}, {"name": 2}])) == [{"name": 1}, {"name": 2}]


def test_values_of_other_libraries_come_out_as_pythons_own(tmp_path):
    ids = np.array([3, 5])
    given = {
        "file_name": Path("a.png"), "image_id": np.int64(7), "height": torch.tensor(4),
        "width": np.uint8(6), "tasks": ("ground",), "score": np.longdouble(0.5),
        "entities": {"file_name": np.str_("a.npz"), "segments_info": [{"id": ids[0]}]},
        "phrases": [{"segment_ids": ids, "is_thing": np.bool_(1), "start": torch.tensor([0])[0]}],
    }  # fmt: skip
    entities = {"file_name": "a.npz", "segments_info": [{"id": 3}]}
    phrases = [{"segment_ids": [3, 5], "is_thing": True, "start": 0}]
    sides = {"height": 4, "width": 6, "tasks": ["ground"], "score": 0.5}
    expected = {"file_name": "a.png", "image_id": 7, **sides}
    (record,) = RecordStore.pack([given])
    expected = {**expected, "entities": entities, "phrases": phrases}
    assert json.loads(json.dumps(record)) == expected
    write_json(tmp_path / "a.json", {np.int64(1): [np.float32("nan"), torch.ones(2)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"1": [None, [1.0, 1.0]]}


PHRASE = {"text": "a dog", "start": 0, "end": 5, "segment_ids": [3], "is_plural": False}
RECORD = {
    "file_name": "a.png", "image_id": "a", "height": 4, "width": 6, "caption": "a dog",
    "entities": {"file_name": "a.npz", "segments_info": [{"id": 3, "category_id": 1}]},
    "phrases": [{**PHRASE, "is_thing": True}], "expressions": [{"text": "it", "segment_ids": []}],
    "tasks": ("describe", "extract", "ground", "panoptic", "refer"),
}  # fmt: skip
DROP = object()
WRONG = [
    *((name, DROP, f"no field '{name}'") for name in RECORD),
    *(("phrases.0." + name, DROP, f"phrases 0: there is no field '{name}'") for name in PHRASE),
    ("phrases.0.is_thing", DROP, "phrases 0: there is no field 'is_thing'"),
    ("expressions.0.text", DROP, "expressions 0: there is no field 'text'"),
    ("expressions.0.segment_ids", DROP, "expressions 0: there is no field 'segment_ids'"),
    ("entities.file_name", DROP, "no field 'file_name'"),
    *(
        (f"entities.segments_info.0.{name}", DROP, f"a segment: there is no field '{name}'")
        for name in ("id", "category_id")
    ),
    ("file_name", 5, "'file_name' is 5, not str"),
    ("image_id", None, "'image_id' is None, not a whole number or text"),
    ("image_id", 1.5, "'image_id' is 1.5"),
    ("height", "4", "'height' is '4', not int"),
    ("width", 0, "'width' is 0, not int"),
    ("width", np.float64(6), "'width' is 6.0, not int"),
    ("entities", "a.npz", "'entities' is 'a.npz', not dict"),
    ("entities.segments_info", 3, "'segments_info' is a int"),
    ("caption", ["a"], "'caption' is"),
    ("phrases", "a dog", "'phrases' is a str"),
    ("phrases.0", "a dog", "phrases 0: there is no field 'text'"),
    ("phrases.0.start", "0", "phrases 0: 'start' is '0', not int"),
    ("phrases.0.segment_ids", 3, "phrases 0: 'segment_ids' is 3, not list"),
    ("phrases.0.segment_ids", [3.5], "phrases 0: 'segment_ids' is"),
    ("phrases.0.is_plural", "yes", "phrases 0: 'is_plural' is 'yes'"),
    ("expressions.0.segment_ids", "3", "expressions 0: 'segment_ids' is '3'"),
    ("tasks", "ground", "'tasks' is a str"),
    ("tasks", ["grond"], "'tasks' has grond, which is no task"),
]


@pytest.mark.parametrize("key, value, message", WRONG)
def test_a_wrong_record_is_named_with_its_file_and_key(key, value, message):
    records = [copy.deepcopy(RECORD) for _ in range(3)]
    *path, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    holder = records[2]
    for part in path:
        holder = holder[part]
    if value is DROP:
        del holder[last]
    else:
        holder[last] = value
    with registered(DatasetCatalog.register, lambda: records) as name:
        text = refused(None, dataset_records, name, ())
        which = r"record 2 \((a.png|a|5)\)"
        assert re.match(rf"{re.escape(__file__)}: dataset {name}, {which}.*: ", text), text
        assert message in text
        MetadataCatalog.get(name).json_file = "own.json"
        assert refused(None, dataset_records, name, ()).startswith("own.json: ")
        if key.split(".")[0] in ("entities", "caption", "phrases", "expressions", "tasks"):
            assert len(dataset_records(name)) == 3  # for who looks at pictures alone


def test_what_no_task_needs_may_be_absent():
    records = [{**RECORD, "tasks": ["ground", "refer"]}, {**RECORD, "tasks": []}, [5]]
    del records[0]["caption"], records[0]["phrases"], records[1]["caption"]
    with registered(DatasetCatalog.register, lambda: records) as name:
        assert "record 2 (None): there is no field 'tasks'" in refused(
            None, dataset_records, name, ()
        )
        records.pop()
        assert len(dataset_records(name, ())) == 2
        refused("record 0 .*no field 'caption'", dataset_records, name, (), "describe")


def test_what_records_share_is_held_once():
    records = plain_records(images=20, each=1)
    for record in records:
        record["entities"]["segments_info"] = list(range(5000))
    once = RecordStore.pack(records).num_bytes
    several = [{**record, "caption": str(k)} for record in records for k in range(5)]
    assert RecordStore.pack(several).num_bytes < 1.1 * once
    # Equal records of different images are not mixed up, nor are other tasks of one image.
    changed = [{**several[0], "tasks": ("refer",)}, *several]
    assert list(RecordStore.pack(changed)) == changed


def test_views_of_a_store():
    records = plain_records()
    store = RecordStore.pack(records)
    joined = concatenated([records[:2], store, []])
    assert list(joined) == records[:2] + records and len(concatenated([])) == 0
    assert joined[7] == records[5] and joined[-1] == records[-1]
    some = selected(joined, [7, 0, 2])
    assert list(some) == [records[5], records[0], records[0]]
    shouted = mapped(some, lambda record: {**record, "caption": record["caption"].upper()})
    assert shouted[0]["caption"] == "CAPTION 1 OF 2" and shouted[1:][0]["image_id"] == "zero"
    for view in (store, joined, some, shouted):
        for task in ("extract", "ground", "refer"):
            expected = [i for i, record in enumerate(view) if task in record["tasks"]]
            assert indices_with_task(view, task).tolist() == expected
        assert view.image_ids().tolist() == [str(record["image_id"]) for record in view]
    assert indices_with_task(records, "extract").tolist() == [0, 1, 4, 5]


def test_a_large_file_is_read_like_a_small_one(tmp_path):
    """Against an independent reading of the same files, with several narratives an image."""
    loading.write_files(tmp_path, images=40, narratives=120)
    store = load_png(
        tmp_path / "png.json", tmp_path / "panoptic.json", tmp_path / "p", tmp_path / "i"
    )
    content = json.loads((tmp_path / "panoptic.json").read_text())
    segments = {a["image_id"]: a["segments_info"] for a in content["annotations"]}
    isthing = {c["id"]: bool(c["isthing"]) for c in content["categories"]}
    narratives = json.loads((tmp_path / "png.json").read_text())
    assert len(store) == len(narratives) == 120
    for record, narrative in zip(store, narratives):
        image_id = int(narrative["image_id"])
        assert record["image_id"] == image_id and record["caption"] == narrative["caption"]
        assert record["entities"]["segments_info"] == [
            {**s, "isthing": isthing[s["category_id"]]} for s in segments[image_id]
        ]
        nouns = [s for s in narrative["segments"] if s["noun"]]
        assert [p["segment_ids"] for p in record["phrases"]] == [
            [int(i) for i in s["segment_ids"]] for s in nouns
        ]
        assert [p["text"].lower() for p in record["phrases"]] == [s["utterance"] for s in nouns]
    images = load_coco_panoptic(
        tmp_path / "panoptic.json", tmp_path / "p", tmp_path / "i", ("ground",)
    )
    assert store.derived().num_bytes == images.derived().num_bytes  # whatever is told of them


def heavy_records(count: int) -> list[dict]:
    rng = random.Random(0)
    return [
        {
            "image_id": k,
            "tasks": ("ground",),
            "caption": f"{k} " + "word " * 30,
            "entities": {"segments_info": [{"id": rng.random(), "name": str(i)} for i in range(9)]},
        }
        for k in range(count)
    ]


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="/proc/self/smaps_rollup is Linux's"
)
def test_forked_readers_share_the_records():
    """A list of dicts would be copied into each reader: every look at an object is a write."""
    records = heavy_records(40_000)  # beside 3 MiB that any first reading takes
    dataset = GroundingDataset(records, lambda record, **key: len(record["caption"]))
    size = dataset.records.num_bytes
    assert size > 3 * 2**20
    del records
    grown = loading.grown_by_reading(dataset, 2)
    assert max(grown) < size / 4

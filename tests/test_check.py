"""The check of a dataset: every kind of damage is found, named, and does not hide the others."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import check as check_script
import numpy as np
import pytest
import shapes
from dataset_scripts import places, registered
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gella.data import check as checking
from gella.data import register as datasets
from gella.data.check import Known, check_dataset, known_counts

FIRST = shapes.image_id_of("val", 0)
Damage = Callable[[Path], None]
MASKS = "annotations/panoptic_val/"
UNC = ("train", "val", "testA", "testB")


@pytest.fixture
def root(small_shapes, tmp_path):
    return shutil.copytree(small_shapes, tmp_path / "shapes")


def check(root, form, **options):
    """The report on one form of the scenes below a root, held-out ones but for captions."""
    notes, refcoco = root / "annotations", root / "refcoco"
    val, train = places(root, "val"), places(root, "train")
    captions = {"captions_jsonl": notes / "captions_train.jsonl"}
    objects = {"instances_json": refcoco / "instances.json", "image_root": root / "train"}
    refs = {"folder": refcoco, "split_by": "unc", "split": "val", "image_root": root / "val"}
    register, where = {
        "panoptic": (datasets.register_panoptic, val),
        "png": (datasets.register_png, {**val, "png_json": notes / "png_shapes_val.json"}),
        "captions": (datasets.register_captions, {**train, **captions}),
        "entityseg": (datasets.register_entityseg, {**objects, **captions}),
        "refcoco": (datasets.register_refcoco, refs),
    }[form]
    with registered(register, **where) as name:
        return check_dataset(name, **options)


@pytest.mark.parametrize("form, figure, count, opened", [
    ("panoptic", "images", 4, 4),
    ("png", "narratives", 4, 4),
    ("captions", "captions", 12, 6),
    ("entityseg", "captions", 12, 6),
    ("refcoco", "images", 4, 4),
])  # fmt: skip
def test_a_sound_dataset_has_no_error_and_is_counted(small_shapes, form, figure, count, opened):
    report = check(small_shapes, form)
    assert report.findings == [] and report.number("error") == 0
    assert (report.figures[figure], report.figures["images opened"]) == (count, opened)


def rewritten(name, read, write, change):
    """The file with what `change` makes of its content: what it returns, or the changed content."""

    def apply(root):
        content = read((root / name).read_bytes())
        (root / name).write_bytes(write(change(content) or content))

    return apply


def as_json(content):
    return json.dumps(content).encode()


def as_lines(lines):
    return b"".join((v.encode() if isinstance(v, str) else as_json(v)) + b"\n" for v in lines)


def read_lines(data):
    return [json.loads(line) for line in data.splitlines()]


panoptic = partial(rewritten, "annotations/panoptic_val.json", json.loads, as_json)
narratives = partial(rewritten, "annotations/png_shapes_val.json", json.loads, as_json)
instances = partial(rewritten, "refcoco/instances.json", json.loads, as_json)
captions = partial(rewritten, "annotations/captions_train.jsonl", read_lines, as_lines)
refs = partial(rewritten, "refcoco/refs(unc).p", pickle.loads, partial(pickle.dumps, protocol=2))


def redrawn(name, change):
    def apply(root):
        path = root / name / f"{FIRST:012d}.png"
        image = Image.open(path)
        image.load()
        change(image).save(path)

    return apply


def masks(change):
    return redrawn(MASKS, lambda image: Image.fromarray(change(np.array(image))))


picture = partial(redrawn, "val")


def painted(pixels):
    pixels[:3, :5] = (1, 2, 0)  # id 513
    return pixels


def cut(name):
    def apply(root):
        (path,) = root.glob(name)
        os.truncate(path, path.stat().st_size * 6 // 10)

    return apply


def removed(name):
    return lambda root: next(root.glob(name)).unlink()


def segments(content):
    return content["annotations"][0]["segments_info"]


def repeated(key):
    return panoptic(lambda content: content[key].append(content[key][0]))


def segment(**changes):
    return panoptic(lambda content: segments(content)[0].update(changes))


def first_noun(content):
    return next(s for s in content[0]["segments"] if s["segment_ids"])


def noun(**changes):
    return narratives(lambda content: first_noun(content).update(changes))


def caption(**changes):
    return captions(lambda lines: lines[0].update(changes))


def first_of_val(content):
    return next(ref for ref in content if ref["split"] == "val")


def ref(**changes):
    return refs(lambda content: first_of_val(content).update(changes))


def outline(value):
    def change(content):
        first = next(a for a in content["annotations"] if a["image_id"] == FIRST)
        first["segmentation"] = value

    return instances(change)


ABSENT = {"id": 77, "category_id": 1, "iscrowd": 0, "area": 5}
# name: form, damage, kind of the finding, what its text has to say
# fmt: off
DAMAGE = {
    "no image": ("panoptic", removed("val/*01.png"), "missing-image", "does not exist"),
    "image cut": ("panoptic", cut("val/*01.png"), "damaged-image", "decoded"),
    "image size": ("panoptic", picture(lambda i: i.resize((80, 96))), "image-size",
                   "80x96 .* 96x96"),
    "no masks": ("panoptic", removed(f"{MASKS}*01.png"), "missing-masks", "does not exist"),
    "masks cut": ("panoptic", cut(f"{MASKS}*01.png"), "damaged-masks", "decoded"),
    "masks grey": ("panoptic", masks(lambda p: p[..., 0]), "mask-mode", "mode is L"),
    "masks size": ("panoptic", masks(lambda p: p.repeat(2, 0)), "mask-size", "96x192 .* 96x96"),
    "unlisted": ("panoptic", masks(painted), "unlisted-id", "15 pixels have id 513"),
    "absent": ("panoptic", panoptic(lambda c: segments(c).append(ABSENT)), "absent-id", "id 77"),
    "zero area": ("panoptic", segment(area=0), "zero-area", "area is 0"),
    "other area": ("panoptic", segment(area=7), "area", "pixels but area 7"),
    "crowd only": ("panoptic", panoptic(lambda c: [s.update(iscrowd=1) for s in segments(c)]
                                        and None), "no-entity", "no entity among"),
    "category": ("panoptic", segment(category_id=99), "unknown-category", "category 99"),
    "segment twice": ("panoptic", panoptic(lambda c: segments(c).append(segments(c)[0])),
                      "duplicate-segment", "twice"),
    "image twice": ("panoptic", repeated("images"), "duplicate-image", "twice"),
    "annotated twice": ("panoptic", repeated("annotations"), "duplicate-annotation", "twice"),
    "unannotated": ("panoptic", panoptic(lambda c: c["annotations"].pop(0) and None),
                    "unannotated", "no annotation"),
    "stranger": ("panoptic", panoptic(lambda c: c["annotations"].append(
        {**c["annotations"][0], "image_id": 5})), "unknown-image", "image 5"),
    "no field": ("panoptic", panoptic(lambda c: segments(c)[0].pop("category_id") and None),
                 "field", "category_id"),
    "no number": ("panoptic", panoptic(lambda c: c["images"][0].update(height="tall")),
                  "field", "'height' is 'tall'"),
    "json cut": ("panoptic", cut("annotations/panoptic_val.json"), "file", "not a JSON file"),
    "no json": ("png", removed("annotations/png_shapes_val.json"), "file", "does not exist"),
    "no list": ("png", narratives(lambda c: {"a": c}), "file", "dict, not a list"),
    "unknown segment": ("png", noun(segment_ids=["513"]), "phrase-without-mask",
                        "id 513 is not in"),
    "unaligned": ("png", noun(utterance="zebra"), "unaligned", "'zebra'"),
    "narrative twice": ("png", narratives(lambda c: c + c[:1]), "duplicate-narrative", "again"),
    "other split": ("png", narratives(lambda c: c[0].update(image_id="12")),
                    "unknown-image", "image 12 is not in"),
    "says nothing": ("png", narratives(lambda c: [s.update(segment_ids=[], noun=False)
                                                  for s in c[0]["segments"]] and None),
                     "no-noun", "names nothing"),
    "no caption": ("png", narratives(lambda c: c[0].pop("caption") and None), "field", "caption"),
    "line": ("captions", captions(lambda v: ['{"a": ', *v]), "line", "line 1 is no JSON"),
    "noun": ("captions", caption(nouns=["zebra"]), "noun-not-in-text", "'zebra'"),
    "no noun": ("captions", caption(nouns=[]), "no-noun", "no noun"),
    "caption twice": ("captions", captions(lambda v: v + v[:1]), "duplicate-caption", "again"),
    "caption of another": ("captions", caption(file_name="x.jpg"), "other-image", "x.jpg"),
    "caption of none": ("entityseg", caption(image_id=12), "unknown-image", "image 12 is not in"),
    "unknown object": ("refcoco", ref(ann_id=3), "phrase-without-mask", "object 3"),
    "ref twice": ("refcoco", refs(lambda v: [*v, first_of_val(v)]), "duplicate-ref", "twice"),
    "no sentence": ("refcoco", ref(sentences=[]), "empty", "0"),
    "empty mask": ("refcoco", outline({"size": [96, 96], "counts": [96 * 96]}),
                   "zero-area", "no pixel"),
    "other mask": ("refcoco", outline({"size": [90, 96], "counts": [90 * 96]}),
                   "bad-mask", "96x90.*96x96"),
    "broken mask": ("refcoco", outline({"size": [96, 96]}), "bad-mask", "segment"),
}
WARNINGS = {"area", "unannotated", "unaligned", "duplicate-narrative", "no-noun of png",
            "duplicate-caption"}
# fmt: on


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(root, name):
    form, damage, kind, message = DAMAGE[name]
    damage(root)
    report = check(root, form)
    first = next(f for f in report.findings if f.kind == kind)
    level = "warning" if kind in WARNINGS or f"{kind} of {form}" in WARNINGS else "error"
    assert first.level == level and first.file and first.record
    assert re.search(message, first.message) and "\n" not in first.message
    assert report.number("error") == 0 or level == "error"
    # What the damage does not touch is not complained about.
    related = {"missing-masks", "reader"} if kind == "field" else set()
    others = {f.kind for f in report.findings if f.level == "error"} - {kind} - related
    assert not others, report.as_text()


def test_all_problems_are_collected(root):
    for name in ("no image", "unlisted", "unknown segment", "narrative twice"):
        DAMAGE[name][1](root)
    removed(f"{MASKS}*02.png")(root)
    kinds = "missing-image missing-masks unlisted-id area phrase-without-mask duplicate-narrative"
    assert {f.kind for f in check(root, "png").findings} == set(kinds.split())


def test_workers_and_limits(root):
    DAMAGE["unlisted"][1](root)
    assert check(root, "panoptic", workers=2).as_dict() == check(root, "panoptic").as_dict()
    limited = check(root, "panoptic", limit=0)
    figures = {"images opened": 0, "images to open": 4}
    assert limited.findings == [] and limited.figures.items() >= figures.items()


def test_phrases_that_no_entity_can_be_meant_by_are_counted(root):
    content = json.loads((root / "annotations" / "png_shapes_val.json").read_text())
    nouns = [s for n in content for s in n["segments"] if s["noun"] or s["segment_ids"]]
    (target,) = first_noun(content)["segment_ids"][:1]
    crowded = lambda c: [s.update(iscrowd=int(str(s["id"]) == target)) for s in segments(c)]  # noqa: E731
    panoptic(lambda c: crowded(c) and None)(root)
    figures = check(root, "png").figures
    alone = sum(s["segment_ids"] == [target] for s in nouns)
    bare = sum(not s["segment_ids"] for s in nouns)
    expected = {"noun phrases": len(nouns), "ungrounded nouns": bare, "crowd-only phrases": alone}
    assert figures.items() >= {**expected, "crowd segments": 1}.items() and alone and bare


def test_a_dataset_of_unknown_files_is_checked_by_its_records(root):
    records = list(datasets.load_coco_panoptic(**places(root, "val")))
    first = records[0]["entities"]["segments_info"][0]["id"]
    span, named = {"text": "it", "start": 0, "end": 2}, ([first], [], None, [first, 12345])
    said = [{**span, "segment_ids": ids, "is_plural": None, "is_thing": None} for ids in named]
    for record, phrases in ((records[0], said), (records[3], [span])):
        record.update(caption="it", phrases=phrases)
    records[1].pop("height")
    records[2]["entities"]["file_name"] = "nowhere.png"
    with registered(DatasetCatalog.register, lambda: records) as name:
        report = check_dataset(name)
    found = sorted(f.kind for f in report.findings)
    assert found == [*["field"] * 4, "masks", "phrase-without-mask"]
    assert report.figures["records"] == 4 and report.figures["images opened"] == 2
    assert report.figures["nouns of unknown masks"] == 1


def test_a_module_registers_what_is_checked(root, tmp_path, capsys):
    module = tmp_path / "own.py"
    where = {key: str(path) for key, path in places(root, "val").items()}
    module.write_text(
        "from gella.data.register import register_panoptic\n"
        f"register_panoptic('gella_test_own', **{where})\n"
    )
    main = check_script.main
    try:
        assert main(["--module", str(module), "gella_test_own", "--workers", "1"]) == 0
    finally:
        DatasetCatalog.remove("gella_test_own")
        MetadataCatalog.remove("gella_test_own")
    other = tmp_path / "other.py"
    other.write_text(module.read_text().replace("test_own", "test_other"))
    wrong = {
        (str(other), "gella_test_oter"): "did you mean gella_test_other?",
        (str(tmp_path / "absent.py"), "x"): "absent.py, which does not exist",
    }
    capsys.readouterr()
    for (file, name), words in wrong.items():
        assert main(["--module", file, name]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    DatasetCatalog.remove("gella_test_other")
    MetadataCatalog.remove("gella_test_other")


def test_known_counts_are_compared(root):
    meta = MetadataCatalog.get("gella_coco_panoptic_val2017")

    def known(name, metadata=meta):
        return {key: count.value for key, count in known_counts(name, metadata).items()}

    assert known("gella_coco_panoptic_val2017")["images"] == 5000
    counts = {"refs": 1975, "images": 750, "expressions": 5726}
    assert known("gella_refcocoplus_unc_testA_panoptic") == counts
    totals = [known(f"gella_refcoco_unc_{split}")["refs"] for split in UNC]
    assert sum(totals) == 50_000 and sum(totals[2:]) == 3_785
    values = MetadataCatalog.get("gella_shapes_panoptic_val").as_dict()
    here = SimpleNamespace(**{**values, "image_root": str(root / "val")})
    assert known("gella_shapes_panoptic_val", here)["images"] == 4
    for split, number in {"png_train": 134_272, "png_val": 8_573, "nouns_val": 8_573}.items():
        assert known(f"gella_coco_{split}2017") == {"narratives": number}


def test_a_part_of_a_published_dataset_is_an_error(root, monkeypatch):
    known = {"images": Known(5, "a page"), "segments": Known(1, "a paper", exact=False)}
    monkeypatch.setattr(checking, "known_counts", lambda name, metadata: known)
    report = check(root, "panoptic")
    found = [("count", "images", "error"), ("count", "segments", "warning")]
    assert [(f.kind, f.record, f.level) for f in report.findings] == found
    number = report.figures["segments"]
    near = {"segments": Known(round(number / 0.98), "a paper", exact=False)}
    monkeypatch.setattr(checking, "known_counts", lambda name, metadata: near)
    assert check(root, "panoptic").findings == []
    assert "4 images, but a page has 5" in report.findings[0].message
    assert "known: 5" in report.as_text() and "known: about 1" in report.as_text()


def test_the_command_line(root, tmp_path, capsys):
    main, out = check_script.main, tmp_path / "report.json"
    read = lambda: json.loads(out.read_text())  # noqa: E731
    with registered(datasets.register_panoptic, **places(root, "val")) as name:
        argv = [name, "--workers", "1"]
        assert main([*argv, "--json", str(out)]) == 0 and read()["ok"] is True
        removed("val/*03.png")(root)
        assert main([*argv, "--json", str(out)]) == 1 and main([*argv, "--limit", "2"]) == 0
    printed, report = capsys.readouterr().out, read()
    assert "error: missing-image: 1" in printed
    assert f"next: python datasets/check.py {name}" in printed
    assert (report["errors"], report["ok"], report["figures"]["images"]) == (1, False, 4)
    assert report["findings"][0]["kind"] == "missing-image"
    assert main(["gella_shapes_png_vol"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "gella_shapes_png_val" in message
    assert message.count("\n") == 1

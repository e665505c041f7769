"""What the demo reads: pictures of a folder, captions of files, masks by name, categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gella.commands.demo_captions import assign, read_captions
from gella.commands.demo_inputs import Job, Picture, list_pictures, output_names
from gella.commands.demo_masks import Beside, MaskFolder, MaskJson, Whole, masks_from
from gella.commands.demo_text import read_categories, split_nouns
from gella.entities.entity_map import id_to_rgb


def picture(name: str, root: Path = Path("in")) -> Picture:
    return Picture(root / name, name, Path(name).stem)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write_ids(path: Path, *ids: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(id_to_rgb(np.array([ids], dtype=np.int32))).save(path)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a/x.JPG", "a/x.txt", ".hidden.png", ".git/y.png", "z.webp", "notes")
    touch(tmp_path, "b_masks.png", "only_masks.png", "out/b_grounding.png", "a/m/x.png")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = list_pictures(tmp_path, [tmp_path / "out", tmp_path / "a" / "m"])
    # only_masks.png belongs to no picture, so it is one.
    assert [item.name for item in found] == ["a/x.JPG", "b.png", "only_masks.png", "z.webp"]
    assert [item.image_id for item in found][0] == "x"
    one = list_pictures(tmp_path / "b_masks.png")
    assert [item.name for item in one] == ["b_masks.png"]


def test_folders_without_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match="holds no picture"):
        list_pictures(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        list_pictures(tmp_path / "absent")
    touch(tmp_path, "x.png")
    with pytest.raises(ValueError, match="also the folder of the output"):
        list_pictures(tmp_path, [tmp_path / "." / ""])


def test_output_names_are_distinct_and_stay_in_the_folder() -> None:
    names = ["a/x.png", "b/x.png", "x.png", "x.jpg", "X.JPG", "a__x.png", "x_png.png", "y.png"]
    names += ["y.png", "y_2.png", "failures.png", "..x.png", "a/../../e.png", "/etc/p.png"]
    names += ["<b>\"'&.png", "n\nl.png", "\udcff.png", "é図.png", "w" * 300 + ".png", "-x.png"]
    titles = output_names(names)
    assert len({title.casefold() for title in titles}) == len(names)
    for title in titles:
        assert title not in ("failures", "", ".", "..") and not title.startswith(".")
        assert not set(title) & set('/\\<>"\n\0') and len(title.encode("utf-8")) <= 100
    by_name = dict(zip(names, titles))
    assert by_name["b/x.png"] == "b__x" and by_name["é図.png"] == "é図"
    assert by_name["x.jpg"] != by_name["X.JPG"]
    assert {"y", "y_png_2", "y_2_png"} <= set(titles)  # y.png has two captions
    # Not the order decides: a picture keeps its name when others are listed before it.
    again = dict(zip(reversed(names), output_names(names[::-1])))
    unique = [name for name in names if names.count(name) == 1]
    assert {name: again[name] for name in unique} == {name: by_name[name] for name in unique}


def test_captions_of_text(tmp_path: Path) -> None:
    pictures = [picture("a.png"), picture("sub/b.png")]
    file = tmp_path / "c.txt"
    file.write_text("\ufeffb\tA dog.\r\n\na.png\tA cat, a hat.\nsub/b.png\tTwo dogs.\n", "utf-8")
    found, lost = assign(read_captions(file), pictures)
    assert {k: [e.text for e in v] for k, v in found.items()} == {
        0: ["A cat, a hat."],
        1: ["A dog.", "Two dogs."],
    }
    assert lost == []
    file.write_text("First.\n\n Second\u2028line. \n", "utf-8")
    found, _ = assign(read_captions(file), pictures)
    assert [found[0][0].text, found[1][0].text] == ["First.", "Second\u2028line."]
    found, _ = assign(read_captions(file), pictures[:1])  # one picture has all captions
    assert [entry.text for entry in found[0]] == ["First.", "Second\u2028line."]


def test_captions_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "A cat.", "nouns": ["A cat"], "masks": "m/a.png"},
        {"image_id": 7, "file_name": "a.png", "description": "B.", "nouns": [], "model": "m"},
        {"image": "../a.png", "caption": "up"},
        {"image": "/etc/a.png", "expression": "the cat \ud83d"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, lost = assign(read_captions(file), [picture("a.png")])
    assert [entry.text for entry in found[0]] == ["A cat.", "B.", "the cat \ufffd"]
    assert [entry.nouns for entry in found[0]] == [("A cat",), (), None]
    assert found[0][0].masks == tmp_path / "m" / "a.png"
    assert [entry.image for entry in lost] == ["../a.png"] and "line 3" in lost[0].where


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.txt", "", "empty"),
        ("c.txt", "a\tb\nc\n", "line 1 has a tab.*line 2"),
        ("c.txt", "one\ntwo\nthree\n", "3 captions without names.*2 pictures"),
        ("c.txt", "q\tA.\n", "'q' is none of the 2 pictures"),
        ("c.txt", "x\tA.\n", "'x' could be a/x.png or b/x.png"),
        ("c.jsonl", "{", "line 1 is no JSON"),
        ("c.jsonl", "[" * 100000, "line 1 is no JSON"),
        ("c.jsonl", "[]", "line 1 is no object"),
        ("c.jsonl", '{"caption": "A."}', "line 1 has no 'image'"),
        ("c.jsonl", '{"image": "a/x.png"}', "line 1 has no 'caption'"),
        ("c.jsonl", '{"image": 3, "caption": "A."}', "'image' is no text"),
        ("c.jsonl", '{"image": "x", "caption": "A.", "nouns": "A"}', "'nouns' is no list"),
        ("c.jsonl", '{"image": "x", "caption": "A.", "masks": 3}', "'masks' is no name"),
    ],
)
def test_wrong_captions_are_told_with_file_and_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"(?s){name}.*{words}" if "could" not in words else words):
        assign(read_captions(tmp_path / name), [picture("a/x.png"), picture("b/x.png")])


def test_captions_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        read_captions(tmp_path / "absent.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="c.txt are no UTF-8"):
        read_captions(tmp_path / "c.txt")


def test_masks_of_a_folder_by_name(tmp_path: Path) -> None:
    names = [
        "x.png",
        "x.jpg",
        "a/x.png",
        "a/y.png",
        "b/y.png",
        "b/z.webp",
        "w.png",
        "v.png",
        "c/v.png",
    ]
    jobs = {name: Job(picture(name), name) for name in names}
    masks = MaskFolder(tmp_path, [job.picture for job in jobs.values()])
    write_ids(tmp_path / "a" / "x.png", 1)
    write_ids(tmp_path / "x.png", 2)
    write_ids(tmp_path / "x.jpg.png", 3)
    write_ids(tmp_path / "y.png", 4)
    write_ids(tmp_path / "z.png", 5)
    assert masks.find(jobs["a/x.png"]) == tmp_path / "a" / "x.png"
    assert masks.find(jobs["x.jpg"]) == tmp_path / "x.jpg.png"
    assert masks.find(jobs["b/z.webp"]) == tmp_path / "z.png"
    write_ids(tmp_path / "v.png", 6)
    assert masks.find(jobs["v.png"]) == tmp_path / "v.png"
    with pytest.raises(FileNotFoundError, match="such as c/v.png"):  # v.png is the other's
        masks.find(jobs["c/v.png"])
    with pytest.raises(ValueError, match=r"x\.png: its masks .*x\.png could be .* x\.png\.png"):
        masks.find(jobs["x.png"])
    with pytest.raises(ValueError, match=r"a/y\.png: its masks .*y\.png could be .*call them a/y"):
        masks.find(jobs["a/y.png"])
    with pytest.raises(FileNotFoundError, match=r"image w\.png: no masks in .*such as w\.png"):
        masks.load(jobs["w.png"], np.zeros((1, 1, 3), np.uint8))
    image = np.zeros((1, 1, 3), np.uint8)
    assert masks.load(jobs["x.jpg"], image).segment_ids == [3]
    before = masks.key(jobs["x.jpg"])
    write_ids(tmp_path / "x.jpg.png", 4)
    assert masks.key(jobs["x.jpg"]) != before


def test_masks_of_one_json_go_by_file_name_then_by_id(tmp_path: Path) -> None:
    names = ["a/cat.png", "000000000007.png"]
    jobs = [Job(picture(name), name) for name in names]
    pictures = [Picture(jobs[0].picture.path, names[0], "cat"), Picture(Path("7"), names[1], 7)]
    jobs = [Job(item, item.name) for item in pictures]
    segment = {"segmentation": {"size": [1, 2], "counts": [0, 1, 1]}, "iscrowd": 0}
    segment.update(category_id=1, bbox=[0, 0, 1, 1], area=1)
    annotations = [{**segment, "id": k + 1, "image_id": i} for k, i in enumerate((31, 7))]
    file = tmp_path / "m.json"
    images = [{"id": 31, "file_name": "cat.png"}, {"id": 9, "file_name": "other.png"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    masks = MaskJson(file, pictures)
    image = np.zeros((1, 2, 3), np.uint8)
    assert masks.load(jobs[0], image).segment_ids == [1]
    assert masks.load(jobs[1], image).segment_ids == [2]
    assert masks.key(jobs[0]) != masks.key(jobs[1])
    with pytest.raises(ValueError, match="a/7.png and b/7.png have one image id"):
        MaskJson(file, [Picture(Path("7"), "a/7.png", 7), Picture(Path("7"), "b/7.png", 7)])
    with pytest.raises(ValueError, match="image 8: no masks in"):
        eight = Picture(Path("8"), "8.png", 8)
        MaskJson(file, [eight]).load(Job(eight, "8"), image)


def test_masks_beside_their_picture(tmp_path: Path) -> None:
    job = Job(picture("x.png", tmp_path), "x")
    with pytest.raises(FileNotFoundError, match=r"x\.png: no masks; put x_masks\.png"):
        Beside().key(job)
    assert Beside(Whole()).load(job, np.zeros((2, 3, 3), np.uint8)).areas().tolist() == [6]
    write_ids(tmp_path / "x_masks.png", 5)
    image = np.zeros((1, 1, 3), np.uint8)
    assert Beside(Whole()).load(job, image).segment_ids == [5]
    write_ids(tmp_path / "other.png", 6)
    named = Job(job.picture, "x", masks=tmp_path / "other.png")
    assert Beside().load(named, image).segment_ids == [6]
    assert Beside().key(named) != Beside().key(job)


def test_one_mask_file_is_not_of_several_pictures(tmp_path: Path) -> None:
    write_ids(tmp_path / "m.png", 1)
    pictures = [picture("a.png"), picture("b.png")]
    with pytest.raises(ValueError, match=r"m\.png are one picture's file.*2 pictures"):
        masks_from(tmp_path / "m.png", pictures, "auto", None)
    with pytest.raises(FileNotFoundError, match="absent"):
        masks_from(tmp_path / "absent", pictures, "auto", None)


def test_nouns_and_categories(tmp_path: Path) -> None:
    assert split_nouns(None) is None
    assert split_nouns(" a cat,, two hats ") == ("a cat", "two hats")
    assert read_categories(None) is None
    assert read_categories("sky, grass ,cow") == ["sky", "grass", "cow"]
    coco = read_categories("coco")
    assert coco is not None and len(coco) == 133
    full = [{"id": 4, "name": "sky", "isthing": 0}]
    for name, text in (("c.json", json.dumps({"categories": full})), ("d.json", json.dumps(full))):
        (tmp_path / name).write_text(text)
        assert read_categories(str(tmp_path / name)) == full
    (tmp_path / "c.txt").write_text("traffic light\n\nsky\n")
    assert read_categories(str(tmp_path / "c.txt")) == ["traffic light", "sky"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" , ", "no category"),
        ("sky,cow,sky", "'sky' is there twice"),
        ('{"a": 1}', "expected a list"),
        ("{", "cannot be read"),
        ("[3]", "entry 0 is neither"),
        ('[{"name": "sky"}]', "entry 0 has no 'id'"),
        ('["sky", {"id": 1, "name": "cow", "isthing": 1}]', "mixed"),
        ("[]", "no category"),
    ],
)
def test_wrong_categories(tmp_path: Path, text: str, words: str) -> None:
    if text[0] in "[{":
        (tmp_path / "c.json").write_text(text)
        text = str(tmp_path / "c.json")
    with pytest.raises(ValueError, match=words):
        read_categories(text)

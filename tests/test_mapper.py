"""The mapper: shared geometry, targets, prompts per task, determinism, and errors with names."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from gella import add_gella_config
from gella.data.mapper import GroundingMapper, InputMaker, mirrored_words
from gella.data.narratives import load_png
from gella.data.panoptic import read_categories
from gella.data.sampling import build_train_loader
from gella.data.targets import EntityMatcher, category_phrases, segment_iou
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.entities.sources import LiveSource, load_from_record
from gella.entities.view import received, to_send
from gella.text.prompts import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    decode_answer,
    noun_answer,
    panoptic_answer,
)

HEIGHT, WIDTH = 40, 60
CATEGORIES = [
    {"id": 3, "name": "circle", "isthing": 1},
    {"id": 5, "name": "star", "isthing": 1},
    {"id": 9, "name": "grass-merged", "isthing": 0},
    {"id": 11, "name": "owl", "isthing": 1},
]
SEGMENTS = [
    {"id": 70, "category_id": 3, "iscrowd": 0},
    {"id": 8, "category_id": 9, "iscrowd": 0},
    {"id": 600, "category_id": 3, "iscrowd": 0},
    {"id": 41, "category_id": 5, "iscrowd": 1},
]
IDS = np.zeros((HEIGHT, WIDTH), np.int32)
IDS[20:, :40] = 8
IDS[4:16, 6:18], IDS[10:30, 30:50], IDS[0:6, 50:] = 70, 600, 41


def phrase(text: str, ids: list[int] | None, caption: str = "") -> dict[str, Any]:
    start = caption.find(text)
    return {
        "text": text,
        "start": start,
        "end": start + len(text) if start >= 0 else -1,
        "segment_ids": ids,
        "is_plural": len(ids or []) > 1,
        "is_thing": True,
    }


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """A scene whose picture shows each segment in a flat colour, with a caption."""
    shades = np.zeros((*IDS.shape, 3), np.uint8)
    for segment, shade in zip(SEGMENTS, (60, 120, 180, 240)):
        shades[IDS == segment["id"]] = shade
    Image.fromarray(shades).save(tmp_path / "scene.png")
    Image.fromarray(id_to_rgb(IDS)).save(tmp_path / "ids.png")
    caption = "Two circles on the grass, in a picture of stars."
    return {
        "file_name": str(tmp_path / "scene.png"),
        "image_id": 17,
        "height": HEIGHT,
        "width": WIDTH,
        "entities": {
            "format": "panoptic_png",
            "file_name": str(tmp_path / "ids.png"),
            "segments_info": SEGMENTS,
        },
        "caption": caption,
        "phrases": [
            phrase("Two circles", [600, 70], caption),
            phrase("the grass", [8], caption),
            phrase("a picture", [], caption),
            phrase("stars", [41], caption),
        ],
        "tasks": ("describe", "extract", "ground"),
    }


@pytest.fixture
def make(tokenizer: Any) -> Any:
    def build(**changes: Any) -> GroundingMapper:
        options = {
            "is_train": True,
            "tokenizer": tokenizer,
            "image_size": 30,
            "colormap_size": 120,
            "colors": "separated",
            "num_image_tokens": 9,
            "max_length": 500,
            "categories": CATEGORIES,
        }
        return GroundingMapper(**{**options, **changes})

    return build


def answer_of(mapped: dict[str, Any], tokenizer: Any) -> str:
    return decode_answer(tokenizer, mapped["labels"][mapped["labels"] != IGNORE_INDEX].tolist())


def test_image_colormap_and_entities_show_one_place(record: dict, make: Any) -> None:
    mapped = make()(record, task="ground", rng_seed=(0, 1, 2))
    assert mapped["image"].shape == (3, 30, 30) and mapped["image"].dtype == torch.uint8
    assert mapped["colormap"].shape == (3, 120, 120) and mapped["colormap"].dtype == torch.uint8
    assert mapped["valid_size"] == (80, 120) and mapped["entities"].size == (120, 120)
    assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
    # Pixel (x, y) of the scene lies at (2x, 2y) in the colormap and at (x/2, y/2) in the image.
    ids = mapped["entities"].ids
    for index, segment in enumerate(SEGMENTS[:3]):
        expected = (IDS == segment["id"]).repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(ids[:80] == index + 1, expected)
        color = mapped["colormap"][:, ids == index + 1]
        assert (color == color[:, :1]).all() and color.any()
    assert not ids[80:].any() and not mapped["colormap"][:, ids == 0].any()
    assert not mapped["image"][:, 20:].any()
    assert mapped["image"][0, 5, 6] == 60 and mapped["image"][0, 10, 20] == 180  # insides
    assert mapped["entities"].segment_ids == [70, 8, 600]  # crowd is no entity


def named(mapped: dict) -> list[list[int]]:
    """Segment ids of the entities of each phrase: at test their order is canonical."""
    ids = mapped["entities"].segment_ids
    return [
        sorted(ids[index] for index in phrase["entity_indices"]) for phrase in mapped["phrases"]
    ]


def test_grounding_targets_and_answer(record: dict, make: Any, tokenizer: Any) -> None:
    before = copy.deepcopy(record)
    mapped = make()(record, task="ground", rng_seed=(0, 0, 0))
    assert record == before
    # The third noun has no segment: absent. The last one's is a crowd, no entity: unknown.
    assert [p["entity_indices"] for p in mapped["phrases"]] == [[0, 2], [1], [], None]
    tested = make(is_train=False)(record, task="ground")
    assert named(tested) == [[70, 600], [8], [], []]
    assert tested["num_unmatched"] == 1
    assert [p["text"] for p in mapped["phrases"]] == [p["text"] for p in record["phrases"]]
    assert mapped["phrases"][0]["start"] == 0 and mapped["num_unmatched"] == 1  # the crowd of stars
    assert answer_of(mapped, tokenizer) == noun_answer([p["text"] for p in record["phrases"]])
    assert len(mapped["seg_positions"]) == 4 and mapped["task"] == "ground"
    assert (mapped["input_ids"] == IMAGE_TOKEN_ID).sum() == 9
    for key in ("input_ids", "labels", "seg_positions"):
        assert mapped[key].dtype == torch.int64


def test_describing_has_no_noun_and_extraction_keeps_unknown_segments(
    record: dict, make: Any, tokenizer: Any
) -> None:
    record["phrases"][1]["segment_ids"] = None
    described = make()(record, task="describe", rng_seed=(0, 0, 0))
    assert described["phrases"] == [] and len(described["seg_positions"]) == 0
    assert answer_of(described, tokenizer) == record["caption"]
    extracted = make()(record, task="extract", rng_seed=(0, 0, 0))
    assert [p["entity_indices"] for p in extracted["phrases"]] == [[0, 2], None, [], None]
    assert len(extracted["seg_positions"]) == 4


def test_testing_gives_prompts_without_answers_and_the_truth(record: dict, make: Any) -> None:
    mapper = make(is_train=False)
    for task in ("describe", "extract"):
        mapped = mapper(record, task=task)
        assert (mapped["labels"] == IGNORE_INDEX).all() and len(mapped["seg_positions"]) == 0
    assert [p["text"] for p in mapped["phrases"]] == [p["text"] for p in record["phrases"]]
    grounded = make(is_train=False, task="ground")(record)
    assert grounded["task"] == "ground" and len(grounded["seg_positions"]) == 4
    full = grounded["entities_full"]
    assert full.size == (HEIGHT, WIDTH) and full.segment_ids == grounded["entities"].segment_ids
    np.testing.assert_array_equal(full.union([full.index_of(600)]), IDS == 600)
    assert grounded["annotation"] == {
        "file_name": record["entities"]["file_name"],
        "segments_info": SEGMENTS,
    }
    assert mapper(record)["task"] == "describe"  # the record's first
    assert "annotation" not in make()(record, task="ground", rng_seed=(0, 0, 0))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    keys = ("image", "colormap", "input_ids", "labels")
    return all(torch.equal(a[key], b[key]) for key in keys)


def test_views_depend_on_the_seed_in_training_and_on_the_masks_at_test(
    record: dict, make: Any
) -> None:
    train, test = make(flip=True), make(is_train=False, flip=True)
    first = train(record, task="ground", rng_seed=(0, 5, 1))
    assert same(first, make(flip=True)(record, task="ground", rng_seed=(0, 5, 1)))
    others = [train(record, task="ground", rng_seed=(0, 5, place)) for place in range(2, 30)]
    assert all(not torch.equal(first["colormap"], other["colormap"]) for other in others)
    assert any(len(first["input_ids"]) != len(other["input_ids"]) for other in others)  # phrasings
    shown = test(record, task="ground")
    assert same(shown, test(record, task="ground"))
    # Neither its name nor the order of its segments changes how an image is seen.
    segments = {**record["entities"], "segments_info": SEGMENTS[::-1]}
    for changes in ({"image_id": 18}, {"image_id": "17"}, {"entities": segments}):
        other = test({**record, **changes}, task="ground")
        assert torch.equal(shown["colormap"], other["colormap"]) and named(shown) == named(other)
        assert shown["entities"].segment_ids == other["entities"].segment_ids


def test_flip_mirrors_image_and_entities_together_but_not_left_and_right(
    record: dict, make: Any
) -> None:
    plain, mapper = make()(record, task="ground", rng_seed=(0,)), make(flip=True)
    views = [mapper(record, task="ground", rng_seed=(0, i)) for i in range(40)]
    mirrored = 0
    for view in views:
        ids = view["entities"].ids
        if np.array_equal(ids, plain["entities"].ids):
            assert torch.equal(view["image"], plain["image"])
            continue
        mirrored += 1
        np.testing.assert_array_equal(ids[:80], plain["entities"].ids[:80, ::-1])
        assert torch.equal(view["image"][:, :20], plain["image"][:, :20].flip(-1))
        assert view["phrases"] == plain["phrases"]
    assert 8 < mirrored < 32
    said = [
        {**record, "caption": record["caption"] + words}
        for words in ("on the Left", "the rightmost one", "its right-hand side")
    ]
    kept = [mapper(one, task="ground", rng_seed=(0, i)) for one in said for i in range(10)]
    test = make(flip=True, is_train=False)
    kept += [test({**record, "image_id": i}, task="ground") for i in range(10)]
    painted = [np.array([0, *v["entities"].segment_ids])[v["entities"].ids] for v in (plain, *kept)]
    assert all(np.array_equal(view, painted[0]) for view in painted)


SIDES = [
    # caption, the same said of the mirrored picture
    ("the Left circle, right of a star", "the Right circle, left of a star"),
    ("LEFTMOST and right-hand circles", "RIGHTMOST and left-hand circles"),
    ("circle topleft, lower right, righthand", "circle topright, lower left, lefthand"),
    ("left/right circles' leftovers", "right/left circles' leftovers"),
    ("a bright, upright circle with rights", "a bright, upright circle with rights"),
]


@pytest.mark.parametrize(("caption", "mirrored"), SIDES)
def test_mirrored_words_keep_case_and_spans(caption: str, mirrored: str) -> None:
    words = [caption[a:b] for a in range(len(caption)) for b in range(a + 1, len(caption) + 1)]
    spans = [(a, b) for a in range(len(caption)) for b in range(a + 1, len(caption) + 1)]
    # Every span that cuts no word, with the text that the same words have in the other caption.
    whole = [
        (word, span)
        for word, span in zip(words, spans)
        if all(not (p[0] + p[1]).isalpha() for p in edges(caption, span))
    ]
    phrases = [{"text": w, "start": a, "end": b, "kept": 1} for w, (a, b) in whole]
    loose = {"text": "LEFT one", "start": -1, "end": -1}
    said, (*moved, unplaced) = mirrored_words(caption, [*phrases, loose])
    assert said == mirrored and len(phrases) > 20
    for before, after in zip(phrases, moved):
        assert said[after["start"] : after["end"]] == after["text"] and after["kept"] == 1
        assert mirrored_words(after["text"], [])[0] == before["text"]
    assert unplaced == {"text": "RIGHT one", "start": -1, "end": -1}
    assert mirrored_words(said, moved) == (caption, phrases)


def edges(text: str, span: tuple[int, int]) -> list[tuple[str, str]]:
    """Characters on both sides of each end of a span."""
    padded = f" {text} "
    return [(padded[place], padded[place + 1]) for place in span]


def test_mirrored_views_say_the_other_side(record: dict, make: Any, tokenizer: Any) -> None:
    caption = "Two circles on the left, the right grass, in a picture of stars left of it"
    record["caption"] = caption
    record["phrases"] = [
        phrase("Two circles", [600, 70], caption),
        phrase("the right grass", [8], caption),
        phrase("stars left of it", [41], caption),
        {**phrase("right thing", []), "start": -1, "end": -1},
    ]
    other = "Two circles on the right, the left grass, in a picture of stars right of it"
    plain = make()(record, task="ground", rng_seed=(0,))["entities"].ids
    mapper = make(flip=True, flip_text="swap")
    seen = set()
    for i in range(20):
        view = mapper(record, task="ground", rng_seed=(0, i))
        mirrored = not np.array_equal(view["entities"].ids, plain)
        seen.add(mirrored)
        assert view["caption"] == (other if mirrored else caption)
        texts = [p["text"] for p in view["phrases"]]
        sides = ("left", "right") if mirrored else ("right", "left")
        assert texts[1:] == [
            f"the {sides[0]} grass",
            f"stars {sides[1]} of it",
            f"{sides[0]} thing",
        ]
        for said in view["phrases"][:3]:
            assert view["caption"][said["start"] : said["end"]] == said["text"]
        assert answer_of(view, tokenizer) == noun_answer(texts)
        assert [p["entity_indices"] for p in view["phrases"]] == [[0, 2], [1], None, []]
    assert seen == {True, False}
    record["caption"] = "Two circles"  # the noun outside it counts too
    unmoved = [make(flip=True)(record, task="ground", rng_seed=(0, i)) for i in range(10)]
    assert all(np.array_equal(view["entities"].ids, plain) for view in unmoved)
    for words in ("2nd from l", "the rt guy", "at 3 o'clock"):  # no rule turns these over
        record["caption"] = f"Two circles {words}"
        for i in range(10):
            view = mapper(record, task="describe", rng_seed=(0, i))
            assert view["caption"] == record["caption"]
            np.testing.assert_array_equal(view["entities"].ids, plain)
    with pytest.raises(ValueError, match="FLIP_TEXT is 'mirror'"):
        make(flip_text="mirror")


def test_a_mirrored_expression_says_the_other_side(record: dict, make: Any) -> None:
    del record["caption"], record["phrases"]
    record["expressions"] = [{"text": "left circle", "segment_ids": [70], "sent_id": 1}]
    mapper = make(flip=True, flip_text="swap")
    said = {mapper(record, task="refer", rng_seed=(i,))["caption"] for i in range(20)}
    assert said == {"left circle", "right circle"}
    views = [make(flip=True)(record, task="refer", rng_seed=(i,)) for i in range(20)]
    assert {view["caption"] for view in views} == {"left circle"}
    assert len({view["entities"].ids.tobytes() for view in views}) == 1


def test_prompts_of_one_image_share_its_view(record: dict, make: Any, tokenizer: Any) -> None:
    """What other records ask of the image stands in ``more``, mirrored with it, masks and all."""
    second = "A circle on the left"
    other = {**record, "caption": second, "phrases": [phrase("A circle", [600], second)]}
    said = [{"text": f"circle {n}", "segment_ids": [70], "sent_id": n} for n in range(5)]
    refer = {k: v for k, v in record.items() if k not in ("caption", "phrases")}
    refer = {**refer, "expressions": said, "tasks": ("ground", "refer")}
    mapper = make(flip=True, flip_text="swap", prompts_per_image=4)
    plain = make()(record, task="ground", rng_seed=(0,))["entities"].ids[:80]
    seen = set()
    for i in range(12):
        view = mapper(record, task="ground", rng_seed=(0, i), others=[other, refer])
        asked = [view, *view["more"]]
        assert [x["task"] for x in asked] == ["ground", "ground", "refer", "refer"]
        assert not {"image", "colormap", "entities"} & set().union(*view["more"])
        ids = view["entities"].ids[:80]  # 80 x 120: the picture, twice as large
        mirrored = not np.array_equal(ids, plain)
        assert np.array_equal(ids, plain[:, ::-1] if mirrored else plain)
        seen.add(mirrored)
        assert asked[1]["caption"] == second.replace("left", "right" if mirrored else "left")
        assert [p["entity_indices"] for x in asked[1:] for p in x["phrases"]] == [[2], [0], [0]]
        assert answer_of(asked[1], tokenizer) == noun_answer(["A circle"])
        texts = [x["caption"] for x in asked[2:]]
        assert len(set(texts)) == 2 and set(texts) <= {x["text"] for x in said}
        for x, y in zip(view["more"], received(to_send(view))["more"]):
            assert all(torch.equal(x[k], y[k]) for k in ("input_ids", "labels", "seg_positions"))
    assert seen == {True, False}
    view = mapper(refer, task="ground", rng_seed=(0,), others=[other])
    assert [x["task"] for x in (view, *view["more"])] == ["refer"] * 3 + ["ground"]
    still = [
        make(flip=True)(record, task="ground", rng_seed=(i,), others=[other]) for i in range(9)
    ]
    assert len({view["entities"].ids.tobytes() for view in still}) == 1  # one says left: none moves


def test_records_of_one_picture_are_asked_together(record: dict, make: Any) -> None:
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 4, 3, 0
    cfg.DATALOADER.PROMPTS_PER_IMAGE, cfg.DATALOADER.TASK_RATIOS = 3, [0.3, 0.0, 0.7]
    # Four narratives of a picture in two datasets, and one of a picture of the same id elsewhere.
    named = [{**record, "caption": f"{record['caption']} {i}"} for i in range(4)]
    Image.open(record["file_name"]).save(elsewhere := record["file_name"].replace("scene", "other"))
    alone = {**record, "file_name": elsewhere, "caption": "stars alone", "phrases": []}
    alone["phrases"] = [phrase("stars", [70], alone["caption"])]
    loader = build_train_loader(cfg, datasets=[named[:3], [named[3], alone]], mapper=make())
    views = [view for batch in itertools.islice(iter(loader), 20) for view in batch]
    assert {view["task"] for view in views} == {"describe", "ground"}
    for view in views:
        captions = [x["caption"] for x in (view, *view.get("more", ()))]
        assert len(set(captions)) == len(captions)
        several = view["task"] == "ground" and view["file_name"] != elsewhere
        assert len(captions) == (3 if several else 1)
        assert several or "more" not in view
    cfg.DATALOADER.PROMPTS_PER_IMAGE = 0
    with pytest.raises(ValueError, match="PROMPTS_PER_IMAGE is 0"):
        build_train_loader(cfg, datasets=[named], mapper=make())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_views_do_not_depend_on_the_workers(record: dict, make: Any, workers: int) -> None:
    """The batches of the loader are those that the mapper makes of the sampler's keys."""
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 3, 11, workers
    records = [{**record, "image_id": i, "caption": f"{record['caption']} {i}"} for i in range(5)]
    mapper = make(flip=True, flip_text="swap")
    loader = build_train_loader(cfg, datasets=[records], mapper=mapper, start_iteration=2)
    keys = itertools.islice(iter(loader.sampler), 4)
    views = list(itertools.islice(iter(loader), 4))
    for batch, batch_keys in zip(views, keys):
        for view, (index, task, rng_seed) in zip(batch, batch_keys):
            expected = mapper(records[index], task=task, rng_seed=rng_seed)
            assert view["image_id"] == index and view["task"] == task and same(view, expected)
            np.testing.assert_array_equal(view["entities"].ids, expected["entities"].ids)
    # Two epochs see one image in other colours.
    colors = {v["colormap"].numpy().tobytes() for batch in views for v in batch}
    assert len(colors) == 12


@pytest.mark.parametrize("source", ["annotation", "same file", "other file"])
def test_every_file_is_decoded_once(
    record: dict, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    targets = record["entities"]
    if source == "same file":
        record["entities"] = {"format": "auto", "file_name": targets["file_name"]}
    if source == "other file":
        Image.fromarray((IDS > 0).astype(np.uint8)).save(tmp_path / "other.png")
        record["entities"] = {"file_name": str(tmp_path / "other.png")}
    if source != "annotation":
        record["entities"]["targets"] = targets
    opened: list[str] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    make(is_train=False)(record, task="ground")
    assert sorted(opened) == ["ids.png", *(["other.png"] if source == "other file" else [])]


def test_a_live_source_sees_the_picture(record: dict, make: Any) -> None:
    shown: list[np.ndarray] = []

    def segment(image: np.ndarray) -> EntityMap:
        shown.append(image)
        return EntityMap.from_id_image(np.where(image[..., 0] == 180, 7, 0))

    led = LiveSource(segment).lead(record)
    mapped = make(is_train=False)(led, task="ground")
    assert len(shown) == 1 and shown[0].shape == (HEIGHT, WIDTH, 3)
    assert mapped["entities_full"].segment_ids == [7]
    assert [p["entity_indices"] for p in mapped["phrases"]] == [[0], [], [], []]
    assert mapped["annotation"]["segments_info"] == SEGMENTS  # the truth stays the annotation
    with pytest.raises(ValueError, match="image 17.*no entity"):
        make()(LiveSource(lambda image: EntityMap(IDS * 0)).lead(record), task="ground")
    with pytest.raises(ValueError, match="image 17.*the picture"):
        load_from_record(led)


def test_panoptic_lists_categories_in_order(record: dict, make: Any, tokenizer: Any) -> None:
    del record["caption"], record["phrases"]
    record["tasks"] = ("ground", "panoptic")
    for mapper in (make(is_train=False), make()):
        mapped = mapper(record, task="ground", rng_seed=(0,))
        names = ["circle", "star", "grass", "owl"]
        assert mapped["task"] == "panoptic"
        assert [p["text"] for p in mapped["phrases"]] == names
        assert [p["category_id"] for p in mapped["phrases"]] == [3, 5, 9, 11]
        assert [p["isthing"] for p in mapped["phrases"]] == [True, True, False, True]
        assert named(mapped) == [[70, 600], [], [8], []]
        assert answer_of(mapped, tokenizer) == panoptic_answer(names)
        said = [mapped["caption"][p["start"] : p["end"]] for p in mapped["phrases"]]
        assert said == names
    drawn = set()
    for i in range(20):
        mapped = make(panoptic_negatives=1)(record, task="panoptic", rng_seed=(i,))
        ids = [p["category_id"] for p in mapped["phrases"]]
        assert len(ids) == 3 and ids == sorted(ids) and {3, 9} < set(ids)
        drawn |= set(ids)
    assert drawn == {3, 5, 9, 11}
    few = make(panoptic_negatives=0)(record, task="panoptic", rng_seed=(0,))
    assert [p["category_id"] for p in few["phrases"]] == [3, 9]
    shown = make(panoptic_negatives=0, is_train=False)(record, task="panoptic")
    assert len(shown["phrases"]) == 4  # evaluation always asks for all


def test_referring_draws_an_expression_in_training(record: dict, make: Any, tokenizer: Any) -> None:
    del record["caption"], record["phrases"]
    record["expressions"] = [
        {"text": "small circle", "segment_ids": [70], "sent_id": 1, "ref_id": 4},
        {"text": "grass below", "segment_ids": [8], "sent_id": 2, "ref_id": 4},
    ]
    seen = set()
    for i in range(12):
        mapped = make()(record, task="ground", rng_seed=(i,))
        (only,) = mapped["phrases"]
        assert mapped["task"] == "refer" and mapped["caption"] == only["text"]
        assert only["entity_indices"] == ([0] if only["text"] == "small circle" else [1])
        assert answer_of(mapped, tokenizer) == noun_answer([only["text"]])
        seen.add(only["sent_id"])
    assert seen == {1, 2}
    with pytest.raises(ValueError, match="2 expressions"):
        make(is_train=False)(record, task="refer")
    record["expressions"] = record["expressions"][1:]
    assert make(is_train=False)(record, task="refer")["caption"] == "grass below"


def test_targets_by_iou_for_entities_of_a_segmenter(
    record: dict, make: Any, tmp_path: Path
) -> None:
    found = np.zeros_like(IDS)
    found[IDS == 600], found[4:16, 6:11], found[IDS == 8] = 1, 2, 3
    found[20:22, :30] = 0  # 600 is met exactly, 70 to 5/12, 8 closely
    np.savez(tmp_path / "found.npz", ids=found)
    record["entities"] = {
        "format": "npz",
        "file_name": str(tmp_path / "found.npz"),
        "targets": record["entities"],
    }
    mapped = make(is_train=False)(record, task="ground")
    assert named(mapped) == [[1], [3], [], []]
    assert mapped["num_unmatched"] == 1 and mapped["entities_full"].num_entities == 3
    assert mapped["annotation"]["segments_info"] == SEGMENTS
    low = make(is_train=False, target_iou=0.3)(record, task="ground")
    assert named(low)[0] == [1, 2]
    high = make(is_train=False, target_iou=0.99)(record, task="ground")
    assert named(high) == [[1], [], [], []]


def test_segment_iou_equals_pycocotools() -> None:
    rng = np.random.default_rng(0)
    a, b = (EntityMap(rng.integers(0, 5, size=(9, 9)), [1, 2, 3, 4, 5]) for _ in range(2))
    c, d = (EntityMap.from_masks(rng.random((4, 9, 9)) < 0.6) for _ in range(2))  # they overlap
    for one, other in ((a, b), (a, c), (c, b), (c, d)):
        expected = coco_mask.iou(one.to_rle(), other.to_rle(), [False] * other.num_entities)
        np.testing.assert_allclose(segment_iou(one, other), expected, atol=1e-12)


def test_matcher_without_segments_info_knows_the_ids_of_its_map() -> None:
    matcher = EntityMatcher(EntityMap(np.array([[1, 2]]), [5, 9]), None)
    assert matcher.entity_indices([9, 5, 9]) == [0, 1] and matcher.entity_indices(None) is None
    equal = EntityMap.from_masks(np.eye(2, dtype=bool)[[0, 0, 1]][:, None], segment_ids=[7, 8, 9])
    assert EntityMatcher(equal, None).entity_indices([8, 9]) == [0, 1]  # 8 is the same as 7
    with pytest.raises(ValueError, match=r"\[6\]"):
        matcher.entity_indices([6])


def test_unknown_category_is_an_error() -> None:
    segments = [{"id": 1, "category_id": 77}]
    with pytest.raises(ValueError, match="segment 1.*77"):
        category_phrases(segments, CATEGORIES, -1, np.random.default_rng(0))


def masks(record: dict[str, Any], ids: np.ndarray) -> None:
    Image.fromarray(id_to_rgb(ids)).save(record["entities"]["file_name"])


def without_entity(record: dict[str, Any]) -> None:
    masks(record, np.where(IDS == 41, IDS, 0))
    record["entities"]["segments_info"] = SEGMENTS[3:]


def cut_image(record: dict[str, Any]) -> None:
    path = Path(record["file_name"])
    path.write_bytes(path.read_bytes()[:90])


# task, what is done to a good record, what the error says
WRONG = {
    "missing image": ("ground", lambda r: Path(r["file_name"]).unlink(), "scene.png.*exist"),
    "truncated image": ("ground", cut_image, "scene.png.*truncated"),
    "swapped sides": (
        *("ground", lambda r: r.update(height=WIDTH, width=HEIGHT)),
        "scene.png is 60x40.*40x60",
    ),
    "masks of another size": (
        *("ground", lambda r: masks(r, IDS[:-1])),
        "image 17.*ids.png.*60x39.*60x40",
    ),
    "no entity": ("ground", without_entity, "image 17.*ids.png.*no entity"),
    "empty caption": ("ground", lambda r: r.update(caption=" "), "image 17.*empty"),
    "no noun": ("ground", lambda r: r.update(phrases=[]), "image 17.*no noun"),
    "unknown id": (
        *("ground", lambda r: r["phrases"][0].update(segment_ids=[70, 12345])),
        r"image 17.*\[12345\]",
    ),
    "seg in caption": ("ground", lambda r: r.update(caption="Two <SEG>"), "image 17.*<SEG>"),
    "too long": (
        *("ground", lambda r: r.update(caption=r["caption"] * 40)),
        "image 17.*tokens.*500",
    ),
    "no categories": ("panoptic", lambda r: None, "image 17.*categories"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error(record: dict, make: Any, case: str) -> None:
    task, spoil, message = WRONG[case]
    spoil(record)
    error = FileNotFoundError if case == "missing image" else ValueError
    with pytest.raises(error, match=message) as caught:
        make(categories=[])(record, task=task, rng_seed=(0,))
    assert "\n" not in str(caught.value)


def test_the_config_builds_it(record: dict, tokenizer_dir: Path) -> None:
    cfg = get_cfg()
    add_gella_config(cfg)
    names = ("gella_mapper_test_a", "gella_mapper_test_b", "gella_mapper_test_c")
    MetadataCatalog.get(names[0]).categories = CATEGORIES
    MetadataCatalog.get(names[2]).categories = CATEGORIES[:2]
    cfg.MODEL.LANGUAGE.TOKENIZER = str(tokenizer_dir)
    cfg.MODEL.LANGUAGE.IMAGE_TOKEN_STRIDE = 2
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.DATASETS.TRAIN = names[:2]
    mapper = GroundingMapper(cfg, is_train=True)
    mapped = mapper(record, task="panoptic", rng_seed=(0, 0, 0))
    assert mapped["image"].shape[-1] == 336 and mapped["colormap"].shape[-1] == 896
    assert (mapped["input_ids"] == IMAGE_TOKEN_ID).sum() == 144
    assert len(mapped["phrases"]) == 4 and mapper.flip
    cfg.DATASETS.TEST = names
    with pytest.raises(ValueError, match="gella_mapper_test_a, gella_mapper_test_c"):
        GroundingMapper(cfg, is_train=False)
    tester = GroundingMapper(cfg, is_train=False, task="ground", dataset_names=names[2:])
    assert len(tester.categories) == 2 and tester.task == "ground" and not tester.flip
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'BGR'"):
        InputMaker(cfg)


def test_real_narratives_with_crowd_and_void(coco_sample: Path, make: Any) -> None:
    notes = coco_sample / "annotations"
    where = (notes / "panoptic_val2017.json", notes / "panoptic_val2017", coco_sample / "val2017")
    mapper = make(is_train=False, max_length=4000, categories=read_categories(where[0]))
    for record in load_png(notes / "png_coco_val2017.json", *where):
        mapped = mapper(record)
        assert len(mapped["seg_positions"]) == len(record["phrases"])
        assert mapped["num_unmatched"] == 0
        assert named(mapped) == [sorted(phrase["segment_ids"]) for phrase in mapped["phrases"]]
        listed = mapper(record, task="panoptic")
        assert len(listed["phrases"]) == len(listed["seg_positions"]) == 133
        placed = [index for p in listed["phrases"] for index in p["entity_indices"]]
        assert sorted(placed) == list(range(mapped["entities_full"].num_entities))

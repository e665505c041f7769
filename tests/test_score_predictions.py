"""Predictions of any method from a file: whose they are, what is missing, what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from evaluation_scenes import CATEGORIES, answer, make_sample, phrase, run
from refusals import refused

from gella import evaluation
from gella.commands import score
from gella.commands.score_predictions import Predictions
from gella.entities.files import write_id_png
from gella.entities.rle import encode_mask

CAPTION = "the circles and a star beside stars on sand in a picture"


@pytest.fixture
def scene(tmp_path):
    sample = make_sample(tmp_path, 3)
    star = {**phrase("the star", [302], thing=True), "sent_id": 7, "ref_id": 1}
    return {**sample, "annotator_id": 5, "expressions": [star]}


def told(tmp_path, kind, content, scene):
    """Predictions of a scene in a file, and the answer for it."""
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(content))
    predictions = Predictions(path, kind, [scene])
    return predictions, predictions.answer(0, scene)


def nouns_of(scene):
    """Each noun of a perfect answer as anybody would write it."""
    for said, given in zip(scene["phrases"], answer(scene)["grounding"], strict=True):
        yield {"text": said["text"], "segmentation": encode_mask(given["mask"])}


@pytest.mark.parametrize("whose", [
    {"image_id": 3, "caption": CAPTION}, {"image_id": "0003", "caption": CAPTION},
    {"image_id": 3, "annotator_id": "5"}, {"image_id": 3.0, "caption": CAPTION, "annotator_id": 5},
])  # fmt: skip
def test_a_noun_is_found_by_its_words_or_its_place_and_one_that_is_missing_is_counted(
    tmp_path, scene, whose
):
    nouns = list(nouns_of(scene))
    # The second of two nouns of one text: only the place tells them apart.
    scene["phrases"][2].update(text="a star", start=26, end=31)
    nouns[2] = {"start": "26", "end": 31, "segmentation": [nouns[2]["segmentation"]] * 2}
    content = [{**whose, "nouns": [nouns[2], *nouns[3:]]}]
    predictions, output = told(tmp_path, "png", content, scene)
    png = run(evaluation.PNGEvaluator(), [scene], [output])["png"]
    assert (png["AR"], png["n_without_prediction"], png["n_others"]) == (50.0, 2.0, 1.0)
    assert (predictions.num_missing, predictions.num_asked) == (2, 4)
    content[0]["nouns"].append({"text": "a star", "segmentation": None})
    predictions, output = told(tmp_path, "png", {"predictions": content}, scene)
    assert run(evaluation.PNGEvaluator(), [scene], [output])["png"] == png
    predictions, output = told(tmp_path, "png", [], scene)
    png = run(evaluation.PNGEvaluator(), [scene], [output])["png"]
    assert png["AR"] == 0 and png["oracle_AR"] > 0 and predictions.num_missing == 4


def test_expressions_and_segments_without_prediction_are_empty(tmp_path, scene):
    scene["phrases"] = scene["expressions"]
    (noun,) = nouns_of(scene)
    for content, expected, missing in (
        ([{"image_id": 3, "sent_id": "7", **noun}], 100.0, 0),
        ([{"image_id": 3, "phrase": "the star", **noun}], 100.0, 0),
        ([], 0.0, 1),
    ):
        predictions, output = told(tmp_path, "refcoco", content, scene)
        assert run(evaluation.ReferringEvaluator(), [scene], [output])["refer"]["cIoU"] == expected
        assert (predictions.num_missing, predictions.num_asked) == (missing, 1)
    ids, segments = answer(scene)["panoptic_seg"]
    write_id_png(tmp_path / "masks" / "x.png", ids.numpy())
    segments = [{key: str(value) for key, value in one.items()} for one in segments]
    entry = {"image_id": 3, "file_name": "x.png", "segments_info": segments}
    for content, expected in (([entry], 100.0), ([], 0.0)):
        _, output = told(tmp_path, "coco_panoptic_seg", {"annotations": content}, scene)
        found = run(evaluation.PanopticEvaluator(CATEGORIES), [scene], [output])
        assert found["panoptic_seg"]["PQ"] == expected
    entry = {"image_id": 3, "caption": CAPTION, "found": ["circles", "a star", "moon"]}
    _, output = told(tmp_path, "noun_extraction", [entry], scene)
    nouns = run(evaluation.NounExtractionEvaluator(), [scene], [output])["nouns"]
    assert nouns["precision"] == pytest.approx(100 / 3)


RLE = {"size": [20, 30], "counts": [600]}
NARRATIVE = {"image_id": 3, "caption": CAPTION}
SAID = "entry 0, image 3"


def noun(**values):
    return [{**NARRATIVE, "nouns": [{"segmentation": RLE, **values}]}]


@pytest.mark.parametrize("kind, content, message", [
    ("png", {}, "there is no field 'predictions'"),
    ("png", 3, "there is no field 'predictions'"),
    ("png", {"predictions": 3}, "'predictions' is a int (3), not a list"),
    ("png", ["x"], "entry 0: there is no field 'image_id'"),
    ("png", [{"image_id": 1.5}], "entry 0: 'image_id' is 1.5, not a whole number or text"),
    ("png", [{"image_id": 4}], "image 4 is not in the dataset; both must be of one split (ids "
                               "here: 4; there: 3)"),
    ("png", [{"image_id": 3}], f"{SAID}: there is none of the fields caption, annotator_id"),
    ("png", [{**NARRATIVE, "caption": "a cat"}],
     f"{SAID}: 'caption' is 'a cat', but the dataset has 'the circles"),
    ("png", [{**NARRATIVE, "annotator_id": 6}], "'annotator_id' is 6, but the dataset has 5"),
    ("png", [NARRATIVE], f"{SAID}: there is no field 'nouns'"),
    ("png", noun(text="sand") * 2, "entry 1, image 3: entries before it predict all that the "
                                   "dataset has of 'caption' 'the circles"),
    ("png", noun(), f"{SAID}, noun 0: there is none of the fields start, end, text"),
    ("png", noun(text="a cat"), f"{SAID}, noun 0: 'text' is 'a cat', but the dataset has "
                                "'circles', 'a star', 'stars', ..."),
    ("png", noun(start=0, end=99), "noun 0: 'end' is 99, but the dataset has 7, 6, 5, ..."),
    ("png", noun(text="sand", segmentation={**RLE, "size": [30, 20]}),
     f"{SAID}, noun 0: 'segmentation': entity masks are 20x30 pixels but the image is 30x20"),
    ("png", noun(text="sand", segmentation={**RLE, "counts": [599]}),
     f"{SAID}, noun 0: 'segmentation': runs cover 599 of 600 pixels"),
    ("png", noun(text="sand", segmentation="x"), "'segmentation': segmentation is a str, not RLE"),
    ("refcoco", [{"image_id": 3, "segmentation": RLE}],
     f"{SAID}: there is none of the fields sent_id, phrase"),
    ("refcoco", [{"image_id": 3, "sent_id": 8}], "'sent_id' is 8, but the dataset has 7"),
    ("refcoco", [{"image_id": 3, "sent_id": 7, "phrase": "a"}],
     "'phrase' is 'a', but the dataset has 'the star'"),
    ("refcoco", [{"image_id": 3, "sent_id": 7}], f"{SAID}: there is no field 'segmentation'"),
    ("coco_panoptic_seg", [{"image_id": 3}] * 2, "predict all that the dataset has of the image"),
    ("coco_panoptic_seg", [{"image_id": 3}], f"{SAID}: there is no field 'segments_info'"),
    ("coco_panoptic_seg", [{"image_id": 3, "segments_info": []}],
     f"{SAID}: 'file_name' None: the image's annotation has no 'file_name'"),
    ("coco_panoptic_seg", [{"image_id": 3, "segments_info": [{"id": 1}], "file_name": "x.png"}],
     f"{SAID}, segment 0: there is no field 'category_id'"),
    ("coco_panoptic_seg", [{"image_id": 3, "segments_info": [], "file_name": "../x.png"}],
     "is no name in the folder beside the JSON"),
    ("coco_panoptic_seg", [{"image_id": 3, "segments_info": [], "file_name": "x.png"}],
     "'file_name' 'x.png': "),
    ("coco_panoptic_seg", [{"image_id": 3, "segments_info": [], "file_name": "small.png"}],
     "'file_name' 'small.png': entity masks are 5x4 pixels but the image is 30x20"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_file_entry_and_field(tmp_path, scene, kind, content, message):
    write_id_png(tmp_path / "masks" / "small.png", np.zeros((4, 5), np.int32))
    if kind == "refcoco":
        scene["phrases"] = scene["expressions"]
    pattern = f"masks.json: .*{re.escape(message)}"
    refused(pattern, told, tmp_path, kind, content, scene)


@pytest.mark.parametrize("words, message", [
    ([], "give the OUTPUT_DIR of an evaluation, or --predictions and --dataset"),
    (["--predictions", "x.json"], "or --predictions and --dataset"),
    (["--predictions", "x.json", "--dataset", "none"], "dataset none is not registered"),
    (["--predictions", "x.json", "--dataset", "none", "TEST.PNG_PROTOCOL", "flmm"],
     "--config-file is missing"),
])  # fmt: skip
def test_a_wrong_command_is_one_line(capsys, words, message):
    try:
        status = score.main(words)
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr().err
    assert status == 2 and message in told and told.count("\n") == 1

"""Error analysis: figures against plain counting, errors told apart, a file that stands alone."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from evaluation_scenes import CATEGORIES, answer, make_sample, run
from PIL import Image

from gella.commands import analyze
from gella.commands.analyze_cases import (
    Predictions,
    Scene,
    case_facts,
    compare,
    find_predictions,
    scenes,
)
from gella.entities.entity_map import EntityMap, rgb_to_id
from gella.entities.rle import encode_mask
from gella.evaluation import PNGEvaluator, ReferringEvaluator

NAME = "analysis_scenes"


def make_record(folder: Path, image_id: int) -> dict:
    """The dataset dict of `evaluation_scenes.make_sample`, with a picture of its own."""
    sample = make_sample(folder, image_id)
    rng = np.random.default_rng(image_id)
    picture = folder / f"{image_id}.jpg"
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture)
    caption = "<b>the</b> " + sample["caption"]
    for phrase in sample["phrases"]:
        phrase["start"] = caption.find(phrase["text"])
        phrase["end"] = phrase["start"] + len(phrase["text"])
    return {
        **sample,
        "caption": caption,
        "file_name": str(picture),
        "entities": {"format": "panoptic_png", **sample["annotation"]},
        "expressions": [{"text": "a star", "segment_ids": [302], "ref_id": 1, "sent_id": 2}],
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An `inference` folder of a model that is right, empty or off, and the dataset's records."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out") / "inference"
    records = [make_record(data, i) for i in range(6)]
    outputs = [answer(r, empty=i == 1, shift=3 * (i == 2)) for i, r in enumerate(records)]
    run(PNGEvaluator(out / NAME), records, outputs)
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(categories=CATEGORIES)
    yield out, records
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture(scope="module")
def page(evaluated, tmp_path_factory):
    """The page and the figures of `evaluated`."""
    html, numbers = (tmp_path_factory.mktemp("page") / name for name in ("r.html", "r.json"))
    command = [str(evaluated[0]), "--output", str(html), "--json", str(numbers)]
    assert analyze.main([*command, "--examples", "3"]) == 0
    return html.read_text(), json.loads(numbers.read_text())


def test_every_grouping_adds_up_to_the_evaluator_s_scores(evaluated, page):
    results = json.loads((evaluated[0] / NAME / "png_predictions.json").read_text())["results"]
    png, figures = results["png"], page[1][0]
    assert 100 * figures["overall"]["recall"] == pytest.approx(png["AR"], abs=1e-9)
    assert figures["overall"]["n"] == png["n"] == sum(figures["errors"].values())
    assert sum(map(sum, figures["histograms"].values())) == png["n"]
    assert list(figures["groups"]) == list(analyze.NOTES)
    for title, items in figures["groups"].items():
        assert sum(item["n"] for item in items) == png["n"], title
        mean = sum(item["n"] * item["recall"] for item in items) / png["n"]
        assert 100 * mean == pytest.approx(png["AR"], abs=1e-9), title
    by_label = {item["label"]: item for item in figures["groups"]["thing or stuff"]}
    for kind in ("thing", "stuff"):
        assert 100 * by_label[kind]["recall"] == pytest.approx(png[f"AR_{kind}"], abs=1e-9)
        assert by_label[kind]["n"] == png[f"n_{kind}"]
        assert 100 * by_label[kind]["oracle"] == pytest.approx(png[f"oracle_AR_{kind}"], abs=1e-9)
    counts = {i["label"]: i["n"] for i in figures["groups"]["entities that the phrase names"]}
    assert counts == {"1": 2 * 6, "2": 2 * 6}


def test_the_page_stands_alone_and_escapes_what_it_shows(page):
    html, unclosed = page[0], []
    for end, tag in re.findall(r"<(/?)([a-z]\w*)", html):
        assert tag not in ("script", "link")
        if end:
            assert unclosed.pop() == tag
        elif tag not in ("meta", "img", "br"):
            unclosed.append(tag)
    links = re.findall(r"\b(?:src|href)=\"([^\"]*)", html)
    assert unclosed == [] and all(link.startswith(("data:image/", "#part-")) for link in links)
    assert "url(" not in html and "@import" not in html and "http:" not in html
    assert "<b>the</b>" not in html and "&lt;b&gt;the&lt;/b&gt;" in html
    assert "<mark>circles</mark>" in html
    pictures = [link for link in links if link.startswith("data:image/jpeg")]
    assert len(pictures) == 3 * (2 + 3)  # two images have an error
    for link in pictures:
        with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as picture:
            assert max(picture.size) == analyze.SIDE
    assert sum(link.startswith("data:image/svg+xml") for link in links) == 2 + 7
    titles = ("IoU", "recall", "words of the phrase", "entities that", "size of", "position")
    for title in (*titles, "Worst cases", "Best cases"):
        assert title in html


def cases_of(ious, **columns) -> pd.DataFrame:
    """Cases of one word each."""
    plain = {"image_id": 0, "text": "x", "caption": "", "start": 0, "end": 1, "is_thing": None}
    plain |= {"is_plural": None, "oracle": None, "score": math.nan, "segmentation": None}
    table = pd.DataFrame({"iou": ious}).assign(**{**plain, **columns})
    return table if "segment_ids" in table else table.assign(segment_ids=[[0]] * len(table))


def test_histogram_and_curve_count_what_a_loop_counts():
    rng = np.random.default_rng(0)
    ious = [*rng.random(200), *([0.0] * 30), *([1.0] * 20), 0.3, 0.5, 0.05]
    predictions = Predictions("a", "a", Path("p.json"), "png", {}, cases_of(ious))
    figures = analyze.figures_of(predictions, predictions.cases)
    for place, count in enumerate(figures["histograms"]["all"]):
        last = place == 19
        assert count == sum(place / 20 <= x < (place + 1) / 20 or (last and x == 1) for x in ious)
    curve = figures["recall_curves"]["all"]
    for step in range(101):
        expected = sum(x >= step / 100 and x > 0 for x in ious) / len(ious)
        assert curve[step] == pytest.approx(expected, abs=1e-12)
    area = sum((a + b) / 2 for a, b in zip(curve, curve[1:])) / 100
    assert area == pytest.approx(np.mean(ious), abs=0.005)


def test_a_group_s_interval_is_that_of_its_mean():
    cases = cases_of([0.0, 0.5, 1.0, 0.7])
    group = analyze.summarise(cases)
    spread = math.sqrt(sum((x - 0.55) ** 2 for x in cases.iou) / 3)
    assert group["margin"] == pytest.approx(1.96 * spread / 2)
    assert group["accuracy"] == 0.5 and group["oracle"] is None
    assert math.isnan(analyze.summarise(cases[:1])["margin"])


@pytest.mark.parametrize(
    ("title", "column", "labels"),
    [
        (
            "words of position",
            "text",
            {"the dog on the left": "some", "a leftover": "none", "Next one": "some"},
        ),
        ("words of the phrase", "text", {"": "1", "a b": "2", "a b c d e f g": "6 or more"}),
        (
            "size of what is named",
            "area_share",
            {0.0049: "under 0.5 %", 0.005: "0.5 to 2 %", 0.32: "32 % or more"},
        ),
        ("other entities of the same category", "rivals", {0: "0", 2: "2", 3: "3 or more"}),
    ],
)
def test_groups_have_the_borders_that_they_name(title, column, labels):
    facts = {"error": "right", "meant": [["a"]] * len(labels), "area_share": 0.0, "rivals": 0}
    cases = cases_of([0.5] * len(labels), **{**facts, column: list(labels)})
    assert analyze.labels_of(cases)[title].tolist() == list(labels.values())


SCENE_IDS = np.zeros((10, 30), np.int32)
SCENE_IDS[:, 0:5], SCENE_IDS[:, 5:10] = 11, 12  # two touching red circles
SCENE_IDS[:, 11:16], SCENE_IDS[:, 22:27] = 13, 14  # a blue star; a red star far from all


def scene() -> Scene:
    picture = np.zeros((10, 30, 3), np.uint8)
    for segment, colour in ((11, (220, 0, 0)), (12, (210, 5, 0)), (13, (0, 0, 220))):
        picture[SCENE_IDS == segment] = colour
    picture[SCENE_IDS == 14] = (220, 0, 5)
    return Scene(picture, EntityMap.from_id_image(SCENE_IDS), ["circle", "circle", "star", "star"])


def facts_of(meant: list[int], taken: list[int], mask: np.ndarray | None = None) -> dict:
    mask = np.isin(SCENE_IDS, taken) if mask is None else mask
    return case_facts(meant, encode_mask(mask), scene())


@pytest.mark.parametrize(
    ("meant", "taken", "error"),
    [
        ([11, 12], [11, 12], "right"),
        ([11], [], "none"),
        ([11, 12], [12], "fewer"),
        ([11], [11, 13], "more"),
        ([11, 12], [11, 13], "mixed"),
        ([11], [13, 14], "other"),
        ([], [13], "unneeded"),
        ([], [], "right"),
    ],
)
def test_outcomes_are_told_apart(meant, taken, error):
    facts = facts_of(meant, taken)
    assert facts["error"] == error
    inter, union = len({*meant} & {*taken}), len({*meant} | {*taken})
    assert facts["pixel_iou"] == pytest.approx(inter / union if union else 1.0)
    assert facts["area_share"] == pytest.approx(50 * len(meant) / 300)


def test_half_of_a_segment_is_not_taken_and_more_is():
    half = np.zeros((10, 30), bool)
    half[:5, :5] = True
    facts = facts_of([11], [], half)
    assert facts["error"] == "part" and facts["taken"] == [] and facts["pixel_iou"] == 0.5
    half[5, 0] = True
    assert facts_of([11], [], half)["error"] == "right"
    assert [facts_of(meant, [12, 14])["rivals"] for meant in ([11], [13, 14], [11, 13])] == [
        1,
        0,
        2,
    ]


def test_confusions_need_a_missed_and_a_wrong_entity():
    pairs = ([11], [13]), ([11], [14]), ([13], [14]), ([11], [11, 13])
    cases = cases_of([0.0] * 4).join(pd.DataFrame([facts_of(*pair) for pair in pairs]))
    figures = analyze.figures_of(Predictions("a", "a", Path("a"), "png", {}, cases), cases)
    assert [tuple(row.values()) for row in figures["confusions"]] == [
        ("circle", "star", 2),
        ("star", "star", 1),
    ]


def test_worst_are_the_surest_and_best_the_hardest_one_per_image():
    def chosen(count, *rows):
        image, iou, score, named = zip(*rows, strict=True)
        ids = [list(range(n)) for n in named]
        cases = cases_of(iou, image_id=image, score=score, segment_ids=ids)
        return [part.index.tolist() for part in analyze.choose(cases, count)]

    rows = [
        (0, 0.0, 0.5, 1), (0, 0.0, 0.9, 1), (1, 0.0, 0.6, 1), (2, 1.0, 0.9, 1),
        (3, 1.0, 0.9, 3), (3, 1.0, 0.9, 4), (4, 0.4, None, 1), (5, 0.9, None, 1),
    ]  # fmt: skip
    assert chosen(3, *rows) == [[1, 2, 6], [5, 3, 7]]
    assert chosen(3, (0, 1.0, None, 1)) == [[], [0]]
    assert chosen(3, (0, 0.0, None, 1)) == [[0], []]
    assert chosen(0, *rows) == [[], []]


def test_pictures_show_right_and_wrong_pixels():
    mask = encode_mask(np.isin(SCENE_IDS, [12, 13]))
    case = next(cases_of([0.0], segment_ids=[[11, 12]], segmentation=[mask]).itertuples())
    image, truth, predicted = analyze.pictures(case, scene()).values()
    np.testing.assert_array_equal(image, scene().image)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None].astype(float)
    for shown, segment, colour in (
        (truth, 11, (0, 114, 178)),
        (truth, 12, (0, 114, 178)),
        (predicted, 12, (0, 158, 115)),
        (predicted, 13, (213, 94, 0)),
    ):
        tinted = np.rint(0.4 * grey + 0.6 * np.array(colour))[SCENE_IDS == segment]
        np.testing.assert_allclose(shown[SCENE_IDS == segment], tinted, atol=1)
    for segment in (0, 11, 14):
        assert (predicted[SCENE_IDS == segment] == grey[SCENE_IDS == segment]).all()


def test_figures_scale_with_their_numbers():
    one = {"label": "a", "n": 4, "recall": 0.5, "margin": 0.1, "oracle": 0.75}
    two = {"label": "b", "n": 1, "recall": 1.0, "margin": math.nan, "oracle": None}
    (axes,) = analyze.bar_figure([one, two], 0.6).axes
    assert sorted(bar.get_width() for bar in axes.patches) == [0.5, 1.0]
    assert [text.get_text() for text in axes.texts] == ["100.0  (n 1)", "50.0 ± 10.0  (n 4)"]
    (axes,) = analyze.histogram_figure({"thing": [1, 0, 3], "stuff": [1, 2, 3]}).axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [
        *((0, 1), (0, 0), (0, 3)),
        *((1, 1), (0, 2), (3, 3)),
    ]


def test_referring_expressions_are_looked_up_by_their_ids(tmp_path):
    record = make_record(tmp_path, 3)
    other = {**record["expressions"][0], "segment_ids": [300], "sent_id": 3}
    records = [record, {**record, "expressions": [other]}]
    samples = [{**r, "phrases": r["expressions"], "caption": "a star"} for r in records]
    mask = rgb_to_id(np.array(Image.open(record["annotation"]["file_name"]))) == 302
    outputs = [{"grounding": [{"mask": mask, "entity_ids": [302], "scores": [0.7]}]}] * 2
    run(ReferringEvaluator(tmp_path / "refer"), samples, outputs)
    predictions = find_predictions(tmp_path / "refer")[0]
    cases = compare(predictions, records, {2: "star", 1: "circle"})
    assert cases.segment_ids.tolist() == [[302], [300]] and cases.iou.tolist() == [1.0, 0.0]
    figures = analyze.figures_of(predictions, cases)
    assert figures["errors"] == {"the right entities": 1, "only wrong ones": 1}
    assert figures["confusions"] == [{"wanted": "circle", "taken": "star", "cases": 1}]
    assert list(figures["histograms"]) == ["all"] and "oracle" not in figures["recall_curves"]
    predictions.cases["text"] = "a dog"
    with pytest.raises(ValueError, match="no expression 'a dog'"):
        compare(predictions, records, {})


def test_an_expression_without_a_target_is_right_if_nothing_is_taken(tmp_path):
    record = {**make_record(tmp_path, 5), "expressions": [{"text": "a cat", "segment_ids": []}]}
    sample = {**record, "phrases": record["expressions"], "caption": "a cat"}
    run(ReferringEvaluator(tmp_path / "refer"), [sample], [{"grounding": []}])
    predictions = find_predictions(tmp_path / "refer")[0]
    assert list(analyze.figures_of(predictions, predictions.cases)["groups"]) == [
        "words of the phrase",
        "words of position",
    ]
    cases = compare(predictions, [record], {})
    assert cases.iou.tolist() == [1.0] and cases.error.tolist() == ["right"]
    assert "size of what is named" not in analyze.figures_of(predictions, cases)["groups"]
    assert len(analyze.choose(cases, 2)[0]) == 0


def test_polygons_that_overlap_are_a_scene_too(tmp_path):
    record = make_record(tmp_path, 4)
    square = [[2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]]
    large = [[0.0, 0.0, 30.0, 0.0, 30.0, 20.0, 0.0, 20.0]]
    infos = [
        {"id": 5, "category_id": 1, "segmentation": large},
        {"id": 6, "category_id": 2, "segmentation": square},
    ]
    record["entities"] = {"format": "coco", "file_name": "instances.json", "segments_info": infos}
    _, shown = next(scenes(cases_of([0.0], image_id=4), [record], {1: "wall"}))
    assert shown.categories == ["wall", "category 2"]
    assert shown.regions.areas().tolist() == [600, 100]


def test_without_images_the_figures_of_the_file_remain(evaluated, tmp_path):
    output = tmp_path / "r.html"
    command = [str(evaluated[0] / NAME), "--without-images", "--output", str(output)]
    assert analyze.main([*command, "--dataset", "not_registered"]) == 0
    html = output.read_text()
    assert "image/jpeg" not in html and "analysed without the dataset" in html
    assert "Worst cases" in html


def test_the_runs_of_a_table_are_told_apart(evaluated, tmp_path):
    for name in ("given", "extracted"):
        folder = tmp_path / name / "inference" / NAME
        folder.mkdir(parents=True)
        (folder / "png_predictions.json").write_text(
            (evaluated[0] / NAME / "png_predictions.json").read_text()
        )
    labels = [(p.label, p.dataset) for p in find_predictions(tmp_path)]
    assert labels == [(f"{run}/inference/{NAME}", NAME) for run in ("extracted", "given")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("predictions"), "lacks 'results' or 'predictions'"),
        (lambda p: p["predictions"][0]["nouns"][0].pop("text"), "no 'text'"),
        (lambda p: p["predictions"][0].pop("nouns"), "another version"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou=None), "no 'iou'"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou="x"), "IoU 'x'"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou=1.5), "IoU 1.5"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou=0.123), "0.1230, but 1.0000"),
        (lambda p: p["predictions"][0].update(image_id=99), "image 99"),
        (lambda p: p.update(predictions=[]), "no scored phrase"),
    ],
)
def test_wrong_predictions_are_one_line(evaluated, tmp_path, capsys, change, message):
    payload = json.loads((evaluated[0] / NAME / "png_predictions.json").read_text())
    change(payload)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "png_predictions.json").write_text(json.dumps(payload))
    output = tmp_path / "r.html"
    assert analyze.main([str(tmp_path / NAME), "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and not output.exists()


def test_wrong_arguments_are_one_line(evaluated, tmp_path, capsys):
    folder = str(evaluated[0])
    for arguments, message in (
        ([str(tmp_path / "absent")], "is no folder"),
        ([str(tmp_path)], "no scored phrase"),
        ([folder, "--dataset", "nobody"], "--without-images"),
        ([folder, "--examples", "-1"], "--examples is -1"),
    ):
        assert analyze.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_picture_that_is_missing_or_another_is_named(evaluated, tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "other.jpg")
    for name, message in (("absent.jpg", "absent.jpg"), ("other.jpg", "5x5 .* says 30x20")):
        record = {**evaluated[1][0], "file_name": str(tmp_path / name)}
        with pytest.raises(ValueError, match=message):
            next(scenes(cases_of([0.0]), [record], {}))


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        analyze.main(["--help"])
    assert caught.value.code == 0
    assert "python tools/analyze.py output/" in capsys.readouterr().out

"""Error analysis: figures against plain counting, errors told apart, a file that stands alone."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from evaluation_scenes import CATEGORIES, answer, make_sample, run
from PIL import Image

from gella.commands import analyze
from gella.commands.analysis import figures, gallery, groups, report
from gella.commands.analysis.cases import Case, find_predictions
from gella.commands.analysis.scenes import Facts, Scene, case_facts, index_records, locate, to_lab
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
    entities = {"format": "panoptic_png", **sample["annotation"]}
    expressions = [{"text": "a star", "segment_ids": [302], "ref_id": 1, "sent_id": 2}]
    return {
        **sample,
        "caption": caption,
        "file_name": str(picture),
        "entities": entities,
        "expressions": expressions,
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
    folder = tmp_path_factory.mktemp("page")
    command = [
        str(evaluated[0]),
        "--output",
        str(folder / "r.html"),
        "--json",
        str(folder / "r.json"),
    ]
    assert analyze.main([*command, "--examples", "3"]) == 0
    return (folder / "r.html").read_text(), json.loads((folder / "r.json").read_text())


def test_every_grouping_adds_up_to_the_evaluator_s_scores(evaluated, page):
    results = json.loads((evaluated[0] / NAME / "png_predictions.json").read_text())["results"]
    png, found = results["png"], page[1][0]
    assert 100 * found["overall"]["recall"] == pytest.approx(png["AR"], abs=1e-9)
    assert found["overall"]["n"] == png["n"] == sum(found["errors"].values())
    assert sum(map(sum, found["histograms"].values())) == png["n"]
    assert len(found["groups"]) == len(groups.GROUPINGS)
    for title, items in found["groups"].items():
        assert sum(item["n"] for item in items) == png["n"], title
        mean = sum(item["n"] * item["recall"] for item in items) / png["n"]
        assert 100 * mean == pytest.approx(png["AR"], abs=1e-9), title
    by_label = {item["label"]: item for item in found["groups"]["thing or stuff"]}
    for kind in ("thing", "stuff"):
        assert 100 * by_label[kind]["recall"] == pytest.approx(png[f"AR_{kind}"], abs=1e-9)
        assert by_label[kind]["n"] == png[f"n_{kind}"]
        assert 100 * by_label[kind]["oracle"] == pytest.approx(png[f"oracle_AR_{kind}"], abs=1e-9)
    counts = {i["label"]: i["n"] for i in found["groups"]["entities that the phrase names"]}
    assert counts == {"1": 2 * 6, "2": 2 * 6}


class _Balance(HTMLParser):
    """Fails on tags that are not closed in order; keeps what refers to elsewhere."""

    void = {"meta", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_it_shows(page):
    html = page[0]
    parser = _Balance()
    parser.feed(html)
    assert parser.open == [] and "script" not in parser.tags and "link" not in parser.tags
    assert all(link.startswith(("data:image/jpeg;base64,", "#part-")) for link in parser.links)
    assert "url(" not in html and "@import" not in html and "http:" not in html
    assert "<b>the</b>" not in html and "&lt;b&gt;the&lt;/b&gt;" in html
    assert "<mark>circles</mark>" in html
    pictures = [link for link in parser.links if link.startswith("data:")]
    assert len(pictures) == 3 * (2 + 3)  # two images have an error
    for link in pictures:
        with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as picture:
            assert max(picture.size) == gallery.SIDE
    for title in ("IoU", "recall", "words of the phrase", "entities that", "size of", "position"):
        assert title in html
    assert "Worst cases" in html and "Best cases" in html


def test_histogram_and_curve_count_what_a_loop_counts():
    rng = np.random.default_rng(0)
    ious = [*rng.random(200), *([0.0] * 30), *([1.0] * 20), 0.3, 0.5, 0.05]
    counts = groups.histogram(ious, 20)
    for place in range(20):
        last = place == 19
        expected = sum(place / 20 <= x < (place + 1) / 20 or (last and x == 1.0) for x in ious)
        assert counts[place] == expected
    curve = groups.recall_curve(ious)
    for step in range(101):
        expected = sum(x >= step / 100 and x > 0 for x in ious) / len(ious)
        assert curve[step] == pytest.approx(expected, abs=1e-12)
    area = sum((a + b) / 2 for a, b in zip(curve, curve[1:])) / 100
    assert area == pytest.approx(np.mean(ious), abs=0.005)


def test_a_group_s_interval_is_that_of_its_mean():
    cases = [Case(0, "", "x", 0, 1, iou) for iou in (0.0, 0.5, 1.0, 0.7)]
    group = groups.summarise(cases)
    spread = math.sqrt(sum((x.iou - 0.55) ** 2 for x in cases) / 3)
    assert group.margin == pytest.approx(1.96 * spread / 2)
    assert group.accuracy == 0.5 and group.oracle is None
    assert math.isnan(groups.summarise(cases[:1]).margin)


SCENE_IDS = np.zeros((10, 30), np.int32)
SCENE_IDS[:, 0:5], SCENE_IDS[:, 5:10] = 11, 12  # two touching red circles
SCENE_IDS[:, 11:16], SCENE_IDS[:, 22:27] = 13, 14  # a blue star; a red star far from all


def scene() -> Scene:
    picture = np.zeros((10, 30, 3), np.uint8)
    for segment, colour in ((11, (220, 0, 0)), (12, (210, 5, 0)), (13, (0, 0, 220))):
        picture[SCENE_IDS == segment] = colour
    picture[SCENE_IDS == 14] = (220, 0, 5)
    return Scene(picture, EntityMap.from_id_image(SCENE_IDS), ["circle", "circle", "star", "star"])


def facts_of(wanted: list[int], taken: list[int], mask: np.ndarray | None = None) -> Facts:
    mask = np.isin(SCENE_IDS, taken) if mask is None else mask
    case = Case(0, "", "x", 0, 1, 0.0, segment_ids=wanted, segmentation=encode_mask(mask))
    return case_facts(case, scene())


@pytest.mark.parametrize(
    ("wanted", "taken", "error"),
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
def test_outcomes_are_told_apart(wanted, taken, error):
    facts = facts_of(wanted, taken)
    assert facts.error == error
    inter, union = len({*wanted} & {*taken}), len({*wanted} | {*taken})
    assert facts.iou == pytest.approx(inter / union if union else 1.0)
    assert facts.area_share == pytest.approx(50 * len(wanted) / 300)


def test_half_of_a_segment_is_not_taken_and_more_is():
    half = np.zeros((10, 30), bool)
    half[:5, :5] = True
    facts = facts_of([11], [], half)
    assert facts.error == "part" and facts.taken == [] and facts.iou == 0.5
    half[5, 0] = True
    assert facts_of([11], [], half).error == "right"


def test_relations_of_a_wrong_entity_and_what_chance_would_give():
    facts = facts_of([11], [12, 14])
    assert facts.relations == [
        {"same category": True, "similar colour": True, "touching": True},
        {"same category": False, "similar colour": True, "touching": False},
    ]
    # Of the three others one is a circle, two are red, one is next to it.
    expected = {"same category": 1 / 3, "similar colour": 2 / 3, "touching": 1 / 3}
    assert facts.chances == [pytest.approx(expected)] * 2
    assert facts.rivals == 1
    other = facts_of([12], [13])
    assert other.relations[0]["touching"]  # a gap of one pixel
    assert facts_of([12], [11]).relations[0]["touching"]  # from either side
    rows = groups.count_relations([facts, other, facts_of([11], [11])])
    assert [(row["name"], row["count"], row["n"]) for row in rows] == [
        ("same category", 1, 3),
        ("similar colour", 2, 3),
        ("touching", 2, 3),
        ("none of these", 0, 3),
    ]
    assert rows[0]["expected"] == pytest.approx(3 * 1 / 3) and rows[3]["expected"] is None
    assert groups.count_relations([facts_of([11], [11])]) == []


def test_confusions_need_a_missed_and_a_wrong_entity():
    facts = [
        facts_of([11], [13]),
        facts_of([11], [14]),
        facts_of([13], [14]),
        facts_of([11], [11, 13]),
    ]
    assert groups.count_confusions(facts) == [("circle", "star", 2), ("star", "star", 1)]
    assert groups.count_confusions(facts, most=1) == [("circle", "star", 2)]


def test_lab_of_known_colours():
    # White, black, and the sRGB primaries as tables give them.
    rgb = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    expected = [
        [100, 0, 0],
        [0, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
    ]
    assert to_lab(rgb) == pytest.approx(np.array(expected), abs=0.1)


@pytest.mark.parametrize(
    ("text", "label"),
    [("the dog on the left", "some"), ("a leftover", "none"), ("Next one", "some")],
)
def test_words_of_position_are_whole_words(text, label):
    grouping = next(g for g in groups.GROUPINGS if g.title == "words of position")
    assert grouping.of(Case(0, text, text, 0, 1, 0.5), None) == label


@pytest.mark.parametrize(
    ("share", "label"), [(0.0049, "under 0.5 %"), (0.005, "0.5 to 2 %"), (0.32, "32 % or more")]
)
def test_sizes_have_the_borders_that_they_name(share, label):
    grouping = next(g for g in groups.GROUPINGS if g.title.startswith("size"))
    facts = Facts("right", 1.0, share, [0], [0], ["a"], ["a"])
    assert grouping.of(Case(0, "x", "x", 0, 1, 0.5), facts) == label
    assert label in grouping.labels


def test_worst_are_the_surest_and_best_the_hardest_one_per_image():
    def case(image, iou, score=None, named=1):
        return Case(image, "", "x", 0, 1, iou, segment_ids=list(range(named)), score=score)

    cases = [
        case(0, 0.0, 0.5), case(0, 0.0, 0.9), case(1, 0.0, 0.6), case(2, 1.0, 0.9),
        case(3, 1.0, 0.9, named=3), case(3, 1.0, 0.9, named=4), case(4, 0.4), case(5, 0.9),
    ]  # fmt: skip
    worst, best = gallery.choose(cases, [None] * len(cases), 3)
    assert worst == [1, 2, 6] and best == [5, 3, 7]
    assert gallery.choose([case(0, 1.0)], [None], 3) == [[], [0]]
    assert gallery.choose([case(0, 0.0)], [None], 3) == [[0], []]
    assert gallery.choose(cases, [None] * len(cases), 0) == [[], []]


def test_pictures_show_right_and_wrong_pixels(monkeypatch):
    shown = []
    monkeypatch.setattr(gallery, "_data_uri", lambda image: shown.append(image) or "")
    mask = np.isin(SCENE_IDS, [12, 13])
    case = Case(0, "", "x", 0, 1, 0.0, segment_ids=[11, 12], segmentation=encode_mask(mask))
    gallery.pictures(case, scene())
    image, truth, predicted = shown
    np.testing.assert_array_equal(image, scene().image)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None].astype(float)

    def tinted(colour, segment):
        return np.rint(0.4 * grey + 0.6 * np.array(colour))[SCENE_IDS == segment]

    for segment in (11, 12):
        np.testing.assert_allclose(
            truth[SCENE_IDS == segment], tinted((0, 114, 178), segment), atol=1
        )
    np.testing.assert_allclose(predicted[SCENE_IDS == 12], tinted((0, 158, 115), 12), atol=1)
    np.testing.assert_allclose(predicted[SCENE_IDS == 13], tinted((213, 94, 0), 13), atol=1)
    for segment in (0, 11, 14):
        assert (predicted[SCENE_IDS == segment] == grey[SCENE_IDS == segment]).all()


def test_figures_scale_with_their_numbers():
    one = groups.Group("<a>", 4, 0.5, 0.1, 0.5, 0.75)
    svg = figures.bar_figure([one, groups.Group("b", 1, 1.0, math.nan, 1.0, None)], "t", 0.6)
    widths = [float(x) for x in re.findall(r'<rect[^>]*width="([\d.]+)"[^>]*fill="#0072b2"', svg)]
    assert widths[0] * 2 == widths[1]
    assert "&lt;a&gt;" in svg and "50.0 ± 10.0  (n 4)" in svg and "nan" not in svg
    svg = figures.histogram_figure({"thing": [1, 0, 3], "stuff": [1, 2, 3]}, "t")
    tall = [float(x) for x in re.findall(r'height="([\d.]+)" fill="#d55e00"><title>', svg)]
    assert tall[1] == pytest.approx(2 * tall[0], abs=0.11) and len(tall) == 3
    assert svg.count('fill="#0072b2"><title>') == 2  # an empty bin has no bar


def test_referring_expressions_are_looked_up_by_their_ids(tmp_path):
    record = make_record(tmp_path, 3)
    twin = {
        **record,
        "expressions": [{**record["expressions"][0], "segment_ids": [300], "sent_id": 3}],
    }
    samples = [
        {**r, "phrases": [dict(e) for e in r["expressions"]], "caption": "a star"}
        for r in (record, twin)
    ]
    mask = rgb_to_id(np.array(Image.open(record["annotation"]["file_name"]))) == 302
    outputs = [{"grounding": [{"mask": mask, "entity_ids": [302], "scores": [0.7]}]}] * 2
    run(ReferringEvaluator(tmp_path / "refer"), samples, outputs)
    predictions = find_predictions(tmp_path / "refer")[0]
    records = index_records([record, twin])
    result = report.analyse(predictions, records, {2: "star", 1: "circle"}, 2)
    assert [case.segment_ids for case in predictions.cases] == [[302], [300]]
    assert [case.iou for case in predictions.cases] == [1.0, 0.0]
    assert result.errors == [("the right entities", 1), ("only wrong ones", 1)]
    assert result.confusions == [("circle", "star", 1)]
    assert list(result.histograms) == ["all"] and "oracle" not in result.curves
    predictions.cases[0].segment_ids, predictions.cases[0].text = None, "a dog"
    with pytest.raises(ValueError, match="no expression 'a dog'"):
        list(locate(predictions.cases, records, {}))


def test_an_expression_without_a_target_is_right_if_nothing_is_taken(tmp_path):
    record = {**make_record(tmp_path, 5), "expressions": [{"text": "a cat", "segment_ids": []}]}
    sample = {**record, "phrases": record["expressions"], "caption": "a cat"}
    outputs = [{"grounding": []}]
    run(ReferringEvaluator(tmp_path / "refer"), [sample], outputs)
    predictions = find_predictions(tmp_path / "refer")[0]
    assert predictions.cases[0].iou == 1.0
    result = report.analyse(predictions, index_records([record]), {}, 2)
    assert result.errors == [("the right entities", 1)] and result.worst == []


def test_polygons_that_overlap_are_a_scene_too(tmp_path):
    record = make_record(tmp_path, 4)
    square = [[2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]]
    large = [[0.0, 0.0, 30.0, 0.0, 30.0, 20.0, 0.0, 20.0]]
    infos = [
        {"id": 5, "category_id": 1, "segmentation": large},
        {"id": 6, "category_id": 2, "segmentation": square},
    ]
    record["entities"] = {"format": "coco", "file_name": "instances.json", "segments_info": infos}
    case = Case(4, "", "x", 0, 1, 0.0, segment_ids=[6])
    _, found = next(locate([case], index_records([record]), {1: "wall"}))
    assert found.categories == ["wall", "category 2"]
    assert found.areas.tolist() == [500, 100]


def test_without_images_the_figures_of_the_file_remain(evaluated, tmp_path):
    output = tmp_path / "r.html"
    command = [str(evaluated[0] / NAME), "--without-images", "--output", str(output)]
    assert analyze.main([*command, "--dataset", "not_registered"]) == 0
    html = output.read_text()
    assert "<img" not in html and "analysed without the dataset" in html and "Worst cases" in html


def test_the_runs_of_a_table_are_told_apart(evaluated, tmp_path):
    for name in ("given", "extracted"):
        folder = tmp_path / name / "inference" / NAME
        folder.mkdir(parents=True)
        (folder / "png_predictions.json").write_text(
            (evaluated[0] / NAME / "png_predictions.json").read_text()
        )
    labels = [(p.label, p.dataset) for p in find_predictions(tmp_path)]
    assert labels == [(f"{run}/inference/{NAME}", NAME) for run in ("extracted", "given")]


def broken(evaluated, folder: Path, change) -> Path:
    payload = json.loads((evaluated[0] / NAME / "png_predictions.json").read_text())
    change(payload)
    target = folder / NAME
    target.mkdir()
    (target / "png_predictions.json").write_text(json.dumps(payload))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("predictions"), "lacks 'results' or 'predictions'"),
        (lambda p: p["predictions"][0]["nouns"][0].pop("text"), "no 'text'"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou=None), "IoU None"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou=1.5), "IoU 1.5"),
        (lambda p: p["predictions"][0]["nouns"][0].update(iou=0.123), "0.1230, but 1.0000"),
        (lambda p: p["predictions"][0].update(image_id=99), "image 99"),
        (lambda p: p.update(predictions=[]), "no scored phrase"),
    ],
)
def test_wrong_predictions_are_one_line(evaluated, tmp_path, capsys, change, message):
    folder = broken(evaluated, tmp_path, change)
    assert analyze.main([str(folder), "--output", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "r.html").exists()


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
    record = evaluated[1][0]
    case = Case(0, "", "x", 0, 1, 0.0, segment_ids=[300])
    for path, message in (
        (tmp_path / "absent.jpg", "absent.jpg"),
        (tmp_path / "other.jpg", "size"),
    ):
        if path.name == "other.jpg":
            Image.new("RGB", (5, 5)).save(path)
        with pytest.raises(ValueError, match=message):
            next(locate([case], index_records([{**record, "file_name": str(path)}]), {}))


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        analyze.main(["--help"])
    assert caught.value.code == 0
    assert "python tools/analyze.py output/" in capsys.readouterr().out

"""Modes, tables, plug-ins and provenance of evaluations."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from evaluation_scenes import CATEGORIES
from tiny_gella import make_cfg, make_model, make_record

from gella import add_gella_config, evaluation
from gella.data.register import import_modules
from gella.engine import evaluate as evaluating
from gella.engine.trainer import GellaTrainer
from gella.evaluation.results import describe_run
from gella.evaluation.tables import (
    PAPER,
    TABLES,
    changed,
    compared_markdown,
    plan_table,
    table_markdown,
)
from gella.utils.io import config_hash

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cfg() -> Any:
    config = get_cfg()
    add_gella_config(config)
    config.DATASETS.TEST = ("gella_shapes_png_val",)
    return config


@pytest.fixture
def dataset() -> Any:
    """A registered name with three categories, forgotten afterwards."""
    name = "evaluation_modes_panoptic"
    MetadataCatalog.get(name).set(evaluator_type="coco_panoptic_seg", categories=CATEGORIES)
    yield name
    MetadataCatalog.remove(name)


# --------------------------------------------------------------------------- plug-ins


def test_an_evaluator_of_ones_own(cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.registry, "EVALUATORS", dict(evaluation.EVALUATORS))
    monkeypatch.setattr(evaluation.registry, "TASKS", dict(evaluation.TASKS))

    class Words(DatasetEvaluator):
        def reset(self) -> None:
            self.count = 0

        def process(self, inputs: list, outputs: list) -> None:
            self.count += sum(len(output["text"].split()) for output in outputs)

        def evaluate(self) -> dict:
            return {"words": {"n": float(self.count)}}

    evaluation.register_evaluator(
        "word_count", lambda cfg, name, folder: Words(), lambda *_: None, task="describe"
    )
    name = "evaluation_modes_words"
    MetadataCatalog.get(name).evaluator_type = "word_count"
    try:
        assert evaluation.task_for(cfg, name) == "describe"
        made = evaluation.build_evaluator(cfg, name, "")
        made.reset()
        made.process([{}], [{"text": "a red circle"}])
        assert made.evaluate() == {"words": {"n": 3.0}}
    finally:
        MetadataCatalog.remove(name)
    for kind, factories, task, message in (
        ("png", [Words], "ground", "registered already"),
        ("other", [], "ground", "no factory"),
        ("other", [Words], "sing", "unknown task 'sing'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.register_evaluator(kind, *factories, task=task)


def test_the_example_of_an_evaluator(cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.registry, "EVALUATORS", dict(evaluation.EVALUATORS))
    monkeypatch.setattr(evaluation.registry, "TASKS", dict(evaluation.TASKS))
    example = ROOT / "examples" / "own_evaluator" / "my_evaluator.py"
    cfg.DATASETS.MODULES = (str(example),)
    import_modules(cfg)
    try:
        assert evaluation.task_for(cfg, "answers_val") == "extract"
        made = evaluation.build_evaluator(cfg, "answers_val", "")
        made.reset()
        made.process([{}, {}], [{"text": "one two three"}, {"text": "one"}])
        assert made.evaluate() == {"length": {"words": 2.0, "n": 2.0}}
    finally:
        DatasetCatalog.remove("answers_val")
        MetadataCatalog.remove("answers_val")


def test_nouns_given_or_extracted(cfg: Any) -> None:
    assert evaluation.task_for(cfg, "gella_shapes_png_val") == "ground"
    assert evaluation.task_for(cfg, "gella_shapes_refcoco_val") == "refer"
    given = evaluation.build_evaluator(cfg, "gella_shapes_png_val", "")
    cfg.TEST.NOUNS = "extracted"
    extracted = evaluation.build_evaluator(cfg, "gella_shapes_png_val", "")
    assert len(extracted._evaluators) == len(given._evaluators) + 1
    assert evaluation.task_for(cfg, "gella_shapes_png_val") == "extract"
    assert evaluation.task_for(cfg, "gella_shapes_panoptic_val") == "panoptic"
    cfg.TEST.NOUNS = "heard"
    with pytest.raises(ValueError, match="TEST.NOUNS is 'heard'"):
        evaluation.task_for(cfg, "gella_shapes_png_val")
    with pytest.raises(ValueError, match="evaluator_type is None"):
        evaluation.task_for(cfg, "evaluation_modes_unknown")


# --------------------------------------------------------------------------- category names


def test_other_names_for_the_same_categories(cfg: Any, dataset: str, tmp_path: Path) -> None:
    assert evaluation.asked_categories(cfg, dataset) is None
    path = tmp_path / "names.json"
    cfg.TEST.CATEGORIES_FROM = str(path)
    path.write_text(json.dumps(["ball", "sun", "beach"]))
    asked = evaluation.asked_categories(cfg, dataset)
    assert [(c["id"], c["name"], c["isthing"]) for c in asked] == [
        (1, "ball", 1),
        (2, "sun", 1),
        (9, "beach", 0),
    ]
    coco = {"categories": [{"id": i, "name": f"n{i}", "isthing": 1} for i in (9, 2, 1)]}
    path.write_text(json.dumps(coco))
    asked = evaluation.asked_categories(cfg, dataset)
    assert [(c["id"], c["name"], c["isthing"]) for c in asked] == [
        (9, "n9", 0),
        (2, "n2", 1),
        (1, "n1", 1),
    ]
    for content, message in (
        (["ball"], "has 1 names but .* has 3 categories"),
        ([{"id": 1, "name": "x"}], r"ids in only one of them or twice: \[2, 9\]"),
        ([{"name": "x"}], "is no list of categories"),
        ({"names": []}, "holds no list"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            evaluation.asked_categories(cfg, dataset)
    cfg.TEST.CATEGORIES_FROM = str(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match="name a registered dataset or a JSON file"):
        evaluation.asked_categories(cfg, dataset)


def test_a_second_datasets_names_need_no_code_and_one_pass(
    dataset: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """40 names of a dataset that nobody knows: one pass of the language model an image."""
    names = [f"kind {k} of thing" for k in range(40)]
    categories = [{"id": 3 * k + 3, "name": n, "isthing": k % 2} for k, n in enumerate(names)]
    records = [make_record(tmp_path, f"im{k}", (40, 56), 4, ("a",), seed=k) for k in range(2)]
    for record in records:
        for k, segment in enumerate(record["entities"]["segments_info"]):
            segment["category_id"] = categories[k]["id"]
    MetadataCatalog.remove(dataset)
    MetadataCatalog.get(dataset).set(evaluator_type="coco_panoptic_seg", categories=categories)
    DatasetCatalog.register(dataset, lambda: records)
    try:
        cfg = make_cfg(tokenizer_dir, "entity", "DATASETS.TEST", (dataset,))
        cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = str(tmp_path / "out"), 0
        cfg.TEST.IMS_PER_BATCH = 1
        model = make_model(cfg)
        passes = []
        model.language_decoder.register_forward_hook(lambda *_: passes.append(1))
        done = evaluating.evaluate_config(cfg, model, config_file="x", weights="")
    finally:
        DatasetCatalog.remove(dataset)
    assert len(passes) == 2
    scores = done.outcome[dataset]["panoptic_seg"]
    assert scores["n_images"] == 2 and scores["SQ"] in (0.0, 100.0)
    assert (
        done.run["datasets"][dataset]["images"] == 2 and "seconds" in done.run["datasets"][dataset]
    )


# --------------------------------------------------------------------------- tables


def test_every_table_is_planned_for_scenes_and_for_coco(cfg: Any) -> None:
    for first in ("gella_shapes_png_val", "gella_coco_png_val2017"):
        cfg.DATASETS.TEST = (first,)
        for table in TABLES:
            runs = plan_table(cfg, table, "data")
            assert runs and len({run.name for run in runs}) == len(runs)
            for run in runs:
                copy = changed(cfg, run, "out")
                assert copy.DATASETS.TEST == run.datasets and copy.OUTPUT_DIR == "out"
                assert all(name in DatasetCatalog.list() for name in run.datasets)
    assert len(plan_table(cfg, "2", "data")[0].datasets) == 8
    assert [run.name for run in plan_table(cfg, "8", "data")] == [
        "masks_annotation",
        "masks_predicted",
        "masks_entityseg",
    ]
    cfg.INPUT.GELLA.ENTITY_SOURCES = [["gella_coco_*_val2017", "auto", "own.json"]]
    predicted = plan_table(cfg, "8", "data")[1]
    assert predicted.changes["INPUT.GELLA.ENTITY_SOURCES"][0][2] == "own.json"
    assert changed(cfg, predicted, "out").MODEL.GELLA.SNAP is False and cfg.MODEL.GELLA.SNAP
    with pytest.raises(ValueError, match="--table 5: choose one of 2, 3"):
        plan_table(cfg, "5", "data")


def test_tables_of_ones_own_datasets(cfg: Any, dataset: str) -> None:
    cfg.DATASETS.TEST = (dataset,)
    assert plan_table(cfg, "4", "data")[0].datasets == (dataset,)
    with pytest.raises(ValueError, match="no dataset of evaluator_type 'png'"):
        plan_table(cfg, "3", "data")
    with pytest.raises(ValueError, match="INPUT.GELLA.ENTITY_SOURCES"):
        plan_table(cfg, "8", "data")


def test_all_modes_are_crossed(cfg: Any) -> None:
    runs = plan_table(cfg, "all", "data")
    assert len({run.modes for run in runs}) == 8
    outcomes = [{"gella_shapes_png_val": {"png": {"AR": float(k)}}} for k in range(8)]
    text = table_markdown("all", runs, outcomes)
    assert "| extracted | predicted | off | 7.0 |" in text


def test_our_row_stands_beside_the_papers() -> None:
    ar = {"AR": 70.04, "AR_thing": math.nan, "AR_stuff": 71.0}
    text = compared_markdown({"gella_coco_png_val2017": {"png": ar, "nouns": {"recall": 95.0}}})
    lines = text.splitlines()
    assert "| GELLA-7B (paper) | COCO val2017 | 69.8 | 66.2 | 72.3 | 69.9 | 58.4 |" in lines
    assert "| **ours** | gella_coco_png_val2017 | 70.0 | - | 71.0 | - | - |" in lines
    assert "| **ours** | gella_coco_png_val2017 | 95.0 | - |" in lines
    assert "do not compare" not in text
    refer = {
        "gella_refcoco_unc_testA": {"refer": {"cIoU": 80.0}},
        "mine": {"refer": {"cIoU": 12.0}},
    }
    text = compared_markdown(refer)
    head = next(line for line in text.splitlines() if line.startswith("| Table 2"))
    assert head.endswith("| RefCOCOg test | mine |")
    (row,) = [line for line in text.splitlines() if "**ours**" in line]
    assert row.split(" | ")[3] == "80.0" and row.endswith("| 12.0 |")


def test_the_papers_tables_have_a_figure_per_column() -> None:
    for table in PAPER.values():
        assert all(len(figures) == len(table.columns) for figures in table.rows.values())


# --------------------------------------------------------------------------- provenance


def test_the_config_hash_changes_with_what_changes_scores(cfg: Any) -> None:
    first = config_hash(cfg)
    for key, value in (("OUTPUT_DIR", "elsewhere"), ("VIS_PERIOD", 7)):
        cfg[key] = value
    cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.WEIGHTS = 9, 7, "w.pth"
    assert config_hash(cfg) == first
    cfg.MODEL.GELLA.ASSOCIATION_THRESHOLD = 0.4
    assert config_hash(cfg) != first
    cfg.TEST.EXPECTED_RESULTS = [["png", "AR", 1.0, 1.0]]
    assert evaluating.without_expected(cfg).TEST.EXPECTED_RESULTS == []


def test_results_hold_the_run_and_come_back(cfg: Any, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"weights")
    run = describe_run(
        cfg,
        config_file="c.yaml",
        weights=str(weights),
        seconds=1.23,
        datasets={"d": {"records": 2}},
    )
    results = {"png": {"AR": 1.5, "AR_stuff": math.nan}}
    path = evaluating.save_evaluation(tmp_path, results, run)
    scores, described = evaluation.load_results(path)
    assert scores["png"]["AR"] == 1.5 and math.isnan(scores["png"]["AR_stuff"])
    assert described["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert described["settings"]["png_protocol"] == "hard" and described["seconds"] == 1.2
    assert described["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "| **ours** | d | 1.5 |" in (tmp_path / "results.md").read_text()
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        evaluation.load_results(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no results"):
        evaluation.load_results(tmp_path / "bad.json")


def test_expected_results_are_checked_by_detectron2s_rule(cfg: Any) -> None:
    results = {"png": {"AR": 70.0}}
    cfg.TEST.EXPECTED_RESULTS = [["png", "AR", 70.4, 0.5]]
    evaluating.check_expected(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["png", "AR", 70.6, 0.5]]
    with pytest.raises(SystemExit) as end:
        evaluating.check_expected(cfg, results)
    assert end.value.code == 1
    cfg.TEST.EXPECTED_RESULTS = [["refer", "cIoU", 1.0, 0.5]]
    with pytest.raises(ValueError, match="task 'refer', but the results have png"):
        evaluating.check_expected(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["png", "AR", 70.0]]
    with pytest.raises(ValueError, match="is not .task, metric, expected, tolerance"):
        evaluating.check_expected(cfg, results)


def test_the_trainer_maps_for_the_mode(tmp_path: Path, tokenizer_dir: Path) -> None:
    record = make_record(tmp_path, "one", (40, 56), 3, ("a red circle", "the sand"))
    name = "evaluation_modes_png"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(evaluator_type="png")
    try:
        lengths = []
        for mode in ("given", "extracted"):
            cfg = make_cfg(tokenizer_dir, "entity", "TEST.NOUNS", mode)
            cfg.DATALOADER.NUM_WORKERS = 0
            (batch,) = list(GellaTrainer.build_test_loader(cfg, name))
            lengths.append(len(batch[0]["seg_positions"]))
            assert [p["text"] for p in batch[0]["phrases"]] == ["a red circle", "the sand"]
        assert lengths == [2, 0], "extracted nouns are the model's to say"
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_merging_datasets_keeps_every_score() -> None:
    outcome: dict[str, Any] = {"a": {"png": {"AR": 1.0}}, "b": {"png": {"AR": 2.0}, "x": {}}}
    merged = evaluation.merge_datasets(outcome)
    assert merged == {"png": {"AR": 1.0}, "png@b": {"AR": 2.0}, "x": {}}
    assert np.isclose(merged["png@b"]["AR"], 2.0)

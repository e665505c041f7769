"""Registry, modes, tables, results and provenance of evaluations."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from evaluation_scenes import CATEGORIES, answer, make_sample, run, run_all
from refusals import refused
from tiny_gella import make_cfg, make_model, make_record

from gella import add_gella_config, evaluation
from gella.data.register import import_modules
from gella.engine import evaluate as evaluating
from gella.engine import trainer as trainer_module
from gella.engine.evaluation_hooks import with_keys
from gella.engine.trainer import GellaTrainer
from gella.evaluation.results import amp_dtype, describe_run, settings
from gella.evaluation.tables import (
    PAPER,
    TABLES,
    Run,
    compared_markdown,
    plan_table,
    table_markdown,
)
from gella.utils.io import config_hash

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_evaluator" / "my_evaluator.py"


@pytest.fixture
def cfg():
    config = get_cfg()
    add_gella_config(config)
    config.DATASETS.TEST = ("gella_shapes_png_val",)
    return config


@pytest.fixture
def dataset():
    """A registered name with three categories, forgotten afterwards."""
    name = "evaluation_modes_panoptic"
    MetadataCatalog.get(name).set(evaluator_type="coco_panoptic_seg", categories=CATEGORIES)
    yield name
    MetadataCatalog.remove(name)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)


@pytest.fixture
def own_registry(monkeypatch):
    for name in ("EVALUATORS", "TASKS"):
        monkeypatch.setattr(evaluation.registry, name, dict(getattr(evaluation, name)))


@pytest.mark.usefixtures("own_registry")
def test_the_example_of_an_evaluator_of_ones_own(cfg):
    cfg.DATASETS.MODULES = (str(EXAMPLE),)
    import_modules(cfg)
    try:
        assert evaluation.task_for(cfg, "answers_val") == "extract"
        made = evaluation.build_evaluator(cfg, "answers_val", "")
        scores = run(made, [{}, {}], [{"text": "one two three"}, {"text": "one"}], batch=2)
        assert scores == {"length": {"words": 2.0, "n": 2.0}}
    finally:
        DatasetCatalog.remove("answers_val")
        MetadataCatalog.remove("answers_val")
    for kind, factories, task, message in (
        ("png", [print], "ground", "registered already"),
        ("other", [], "ground", "no factory"),
        ("other", [print], "sing", "unknown task 'sing'"),
    ):
        refused(message, evaluation.register_evaluator, kind, *factories, task=task)


@pytest.mark.usefixtures("own_registry")
def test_evaluators_by_type(cfg, dataset, tmp_path):
    samples = [make_sample(tmp_path, image_id) for image_id in (3, 11)]
    outputs, build = [answer(s) for s in samples], evaluation.build_evaluator
    evaluators = build(cfg, dataset, str(tmp_path / "out"))
    assert set(run(evaluators, samples, outputs)) == {"panoptic_seg", "entity"}
    cfg.TEST.PNG_PROTOCOL = "flmm"
    evaluation.register_evaluator("my_rule", *evaluation.EVALUATORS["png"], lambda *_: None)
    for kind in ("my_rules", "my_rule"):
        MetadataCatalog.remove(dataset)
        MetadataCatalog.get(dataset).evaluator_type = kind
        if kind == "my_rules":
            refused("my_rules.*noun_extraction", build, cfg, dataset, str(tmp_path))
    evaluators = build(cfg, dataset, str(tmp_path / "out"))
    assert run(evaluators, samples, outputs)["png"]["protocol_flmm"] == 1.0


def test_nouns_given_or_extracted(cfg):
    names = [f"gella_shapes_{kind}_val" for kind in ("png", "refcoco", "panoptic")]
    counts = []
    for nouns, tasks in (("given", ["ground", "refer"]), ("extracted", ["extract", "refer"])):
        cfg.TEST.NOUNS = nouns
        assert [evaluation.task_for(cfg, name) for name in names] == [*tasks, "panoptic"]
        counts.append(len(evaluation.build_evaluator(cfg, names[0], "")._evaluators))
    assert counts[1] == counts[0] + 1
    cfg.TEST.NOUNS = "heard"
    refused("TEST.NOUNS is 'heard'", evaluation.task_for, cfg, names[0])
    refused("evaluator_type is None", evaluation.task_for, cfg, "evaluation_modes_unknown")


def test_the_trainer_maps_for_the_mode(dataset, tmp_path, tokenizer_dir):
    record = make_record(tmp_path, "one", (40, 56), 3, ("a red circle", "the sand"))
    MetadataCatalog.remove(dataset)
    DatasetCatalog.register(dataset, lambda: [record])
    MetadataCatalog.get(dataset).set(evaluator_type="png")
    lengths = []
    for mode in ("given", "extracted"):
        cfg = make_cfg(tokenizer_dir, "entity", "TEST.NOUNS", mode)
        cfg.DATALOADER.NUM_WORKERS = 0
        (batch,) = list(GellaTrainer.build_test_loader(cfg, dataset))
        lengths.append(len(batch[0]["seg_positions"]))
        assert [p["text"] for p in batch[0]["phrases"]] == ["a red circle", "the sand"]
    assert lengths == [2, 0], "extracted nouns are the model's to say"


def test_other_names_for_the_same_categories(cfg, dataset, tmp_path):
    assert evaluation.asked_categories(cfg, dataset) is None
    path = tmp_path / "names.json"
    cfg.TEST.CATEGORIES_FROM = str(path)

    def asked(content):
        path.write_text(json.dumps(content))
        return [tuple(c.values()) for c in evaluation.asked_categories(cfg, dataset)]

    assert asked(["ball", "sun", "beach"]) == [(1, "ball", 1), (2, "sun", 1), (9, "beach", 0)]
    coco = {"categories": [{"id": i, "name": f"n{i}", "isthing": 1} for i in (9, 2, 1)]}
    assert asked(coco) == [(9, "n9", 0), (2, "n2", 1), (1, "n1", 1)]
    for content, message in (
        (["ball"], "has 1 names but .* has 3 categories"),
        ([{"id": 1, "name": "x"}], r"ids in only one of them or twice: \[2, 9\]"),
        ([{"name": "x"}], "is no list of categories"),
        ({"names": []}, "holds no list"),
    ):
        refused(message, asked, content)
    cfg.TEST.CATEGORIES_FROM = str(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match="name a registered dataset or a JSON file"):
        evaluation.asked_categories(cfg, dataset)


def test_a_second_datasets_names_need_no_code_and_one_pass(dataset, tmp_path, tokenizer_dir):
    names, passes = [f"kind {k} of thing" for k in range(40)], []
    categories = [{"id": 3 * k + 3, "name": n, "isthing": k % 2} for k, n in enumerate(names)]
    records = [make_record(tmp_path, f"im{k}", (40, 56), 4, ("a",), seed=k) for k in range(2)]
    for record in records:
        for k, segment in enumerate(record["entities"]["segments_info"]):
            segment["category_id"] = categories[k]["id"]
    MetadataCatalog.remove(dataset)
    MetadataCatalog.get(dataset).set(evaluator_type="coco_panoptic_seg", categories=categories)
    DatasetCatalog.register(dataset, lambda: records)
    options = ("OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", 0)
    options += ("TEST.IMS_PER_BATCH", 1, "DATASETS.TEST", (dataset,))
    cfg = make_cfg(tokenizer_dir, "entity", *options)
    model = make_model(cfg)
    model.language_decoder.register_forward_hook(lambda *_: passes.append(1))
    done = evaluating.evaluate_config(cfg, model, config_file="x", weights="")
    scores, counts = done.outcome[dataset]["panoptic_seg"], done.run["datasets"][dataset]
    assert len(passes) == 2 and scores["n_images"] == 2 and scores["SQ"] in (0.0, 100.0)
    assert counts["images"] == 2 and "seconds" in counts


def test_every_table_is_planned_for_scenes_and_for_coco(cfg):
    for table in PAPER.values():
        assert all(len(figures) == len(table.columns) for figures in table.rows.values())
    for first in ("gella_shapes_png_val", "gella_coco_png_val2017"):
        cfg.DATASETS.TEST = (first,)
        for table in TABLES:
            runs = plan_table(cfg, table, "data")
            assert runs and len({run.name for run in runs}) == len(runs)
            for one in runs:
                with_keys(cfg, one.changes)  # the keys exist
                assert all(name in DatasetCatalog.list() for name in one.datasets)
    assert len(plan_table(cfg, "2", "data")[0].datasets) == 8
    names = [run.name for run in plan_table(cfg, "8", "data")]
    assert names == ["masks_annotation", "masks_predicted", "masks_entityseg"]
    cfg.INPUT.GELLA.ENTITY_SOURCES = [["gella_coco_*_val2017", "auto", "own.json"]]
    predicted = plan_table(cfg, "8", "data")[1]
    assert predicted.changes["INPUT.GELLA.ENTITY_SOURCES"][0][2] == "own.json"
    assert with_keys(cfg, predicted.changes).MODEL.GELLA.SNAP is False and cfg.MODEL.GELLA.SNAP
    refused("--table 5: choose one of 2, 3", plan_table, cfg, "5", "data")


def test_tables_of_ones_own_datasets(cfg, dataset):
    cfg.DATASETS.TEST = (dataset,)
    assert plan_table(cfg, "4", "data")[0].datasets == (dataset,)
    refused("no dataset of evaluator_type 'png'", plan_table, cfg, "3", "data")
    refused("INPUT.GELLA.ENTITY_SOURCES", plan_table, cfg, "8", "data")


def test_all_modes_are_crossed(cfg):
    runs = plan_table(cfg, "all", "data")
    assert len({run.modes for run in runs}) == 8
    outcomes = [{"gella_shapes_png_val": {"png": {"AR": float(k)}}} for k in range(8)]
    text = table_markdown("all", runs, outcomes, [{}] * 8)
    assert "| extracted | predicted | off | 7.0 |" in text


PREDICTED = "masks of an entity Mask2Former Swin-L, drawn; else not said"
ANNOTATED = "annotated masks, nouns given, snapped, protocol hard, float32"


def test_our_row_stands_beside_the_papers(cfg):
    ar = {"AR": 70.04, "AR_thing": math.nan, "AR_stuff": 71.0}
    name, mode = "gella_coco_png_val2017", settings(cfg)
    text = compared_markdown({name: {"png": ar, "nouns": {"recall": 95.0}}}, mode)
    lines = text.splitlines()
    assert (
        f"| GELLA-7B (paper) | COCO val2017 | {PREDICTED} | 69.8 | 66.2 | 72.3 | 69.9 | 58.4 |"
        in lines
    )
    assert "| PiGLET (paper) | COCO val2017 | masks of its own | 65.9 |" in text
    assert f"| **ours** | {name} | {ANNOTATED} | 70.0 | - | 71.0 | - | - |" in lines
    assert f"| **ours** | {name} | {ANNOTATED} | 95.0 | - |" in lines
    assert "other data" not in text
    scores = {"gella_refcoco_unc_testA": 80.0, "mine": 12.0}
    text = compared_markdown({name: {"refer": {"cIoU": v}} for name, v in scores.items()}, mode)
    head = next(line for line in text.splitlines() if line.startswith("| Table 2"))
    assert head.endswith("| RefCOCOg test | mine |") and "other data" not in text
    (row,) = [line for line in text.splitlines() if "**ours**" in line]
    assert row.split(" | ")[4] == "80.0" and row.endswith("| 12.0 |")
    assert "other data: the rows do not compare" in compared_markdown({"mine": {"png": ar}}, mode)


@pytest.mark.parametrize("changes, table, datasets, how, bound", [
    ({}, 3, ["a_png"], ANNOTATED, True),
    ({"INPUT.GELLA.ENTITY_SOURCES": [["a_*", "auto", "x/m2f.json"]]}, 3, ["a_png"],
     "masks of m2f.json, nouns given, snapped, protocol hard, float32", False),
    ({"INPUT.GELLA.ENTITY_SOURCES": [["a_*", "auto", "m2f.json"]]}, 2, ["a_x", "b"],
     "masks of m2f.json and annotated masks, nouns given, snapped, protocol hard, float32",
     True),
    ({"TEST.NOUNS": "extracted", "TEST.PNG_PROTOCOL": "flmm", "MODEL.GELLA.SNAP": False,
      "MODEL.LANGUAGE.DTYPE": "bfloat16"}, 3, ["a"],
     "annotated masks, nouns extracted, drawn, protocol flmm, bfloat16", True),
    ({}, 6, ["a"], ANNOTATED, False),  # the paper's are annotated too
    (None, 4, ["a"], "masks and modes not recorded", False),
])  # fmt: skip
def test_a_row_says_how_it_was_got(cfg, changes, table, datasets, how, bound):
    run = Run("", "ours", tuple(datasets), changes or {})
    mode = {} if changes is None else settings(with_keys(cfg, run.changes))
    text = table_markdown(str(table), [run], [{name: {} for name in datasets}], [mode])
    (row,) = [line for line in text.splitlines() if "**ours**" in line]
    assert row.split(" | ")[2] == how
    assert ("upper bound: it does not compare with predicted" in text) is bound
    others = [line.split(" | ")[2] for line in text.splitlines() if "(paper)" in line]
    assert others and all("masks" in other for other in others)


@pytest.mark.parametrize("device, enabled, has, expected", [
    ("cuda", True, True, torch.bfloat16),
    ("cuda:1", True, False, torch.float16),
    ("cuda", False, True, None),
    ("cpu", True, True, None),
])  # fmt: skip
def test_evaluation_computes_in_the_precision_of_training(
    cfg, monkeypatch, device, enabled, has, expected
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = device, enabled
    assert amp_dtype(cfg) is expected
    assert settings(cfg)["precision"] == str(expected or "float32").removeprefix("torch.")
    seen = []

    def test(cls, cfg, model, evaluators):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)

    monkeypatch.setattr(DefaultTrainer, "test", classmethod(test))
    monkeypatch.setattr(trainer_module, "amp_dtype", lambda cfg: torch.bfloat16)
    cfg.MODEL.DEVICE = "cpu"
    GellaTrainer.test(cfg, torch.nn.Linear(1, 1))
    assert seen == [torch.bfloat16]


def test_format_results_shows_every_score_with_its_count(tmp_path):
    samples = [make_sample(tmp_path, image_id) for image_id in (3, 11, 2)]
    results = run_all(samples, [answer(s) for s in samples])
    results["refer"] = {"cIoU": 61.25, "gIoU": math.nan, "P@0.5": 70.0, "P@0.9": 5.0, "n": 40.0}
    table = evaluation.format_results(results)
    lines = {line.strip().split("  ")[0]: line.split() for line in table.splitlines()}
    assert "protocol hard" in table
    counts = [line.split()[2:] for line in table.splitlines() if "nouns (n)" in line]
    assert counts == [["12", "9", "3", "6", "6"], ["15"]], "of narratives and of extraction"
    assert lines["AR"][-5:] == ["100.0"] * 5
    assert lines["PQ"][1:] == ["100.0"] * 3 and lines["cIoU"][1] in ("61.2", "61.3")
    assert lines["gIoU"][1] == "-", "an undefined score is no number"
    for words in ("blind: a random entity", "blind: the largest", "blind: all", "oracle"):
        assert words in table
    nested = evaluation.format_results({"gella_x_val": {"custom": {"score": 1.0}}})
    assert "custom on gella_x_val" in nested and "1.0" in nested


def test_the_config_hash_changes_with_what_changes_scores(cfg):
    first = config_hash(cfg)
    cfg.OUTPUT_DIR, cfg.VIS_PERIOD, cfg.TEST.IMS_PER_BATCH = "elsewhere", 7, 9
    cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.WEIGHTS = 7, "w.pth"
    assert config_hash(cfg) == first
    cfg.MODEL.GELLA.ASSOCIATION_THRESHOLD = 0.4
    assert config_hash(cfg) != first


def test_results_hold_the_run_and_come_back(cfg, tmp_path):
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"weights")
    described = {"config_file": "c.yaml", "weights": str(weights), "seconds": 1.23}
    described = describe_run(cfg, **described, datasets={"d": {"records": 2}})
    results = {"png": {"AR": 1.5, "AR_stuff": math.nan}}
    done = evaluating.Evaluation({"d": results}, described)
    path = evaluating.save_evaluation(tmp_path / "deep", done)
    assert json.loads(Path(path).read_text())["png"]["AR_stuff"] is None
    scores, read = evaluation.load_results(path)
    assert scores["png"]["AR"] == 1.5 and math.isnan(scores["png"]["AR_stuff"])
    assert read["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert read["settings"]["png_protocol"] == "hard" and read["seconds"] == 1.2
    assert read["versions"]["torch"] == torch.__version__.split("+")[0]
    assert f"| **ours** | d | {ANNOTATED} | 1.5 |" in (tmp_path / "deep" / "results.md").read_text()
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        evaluation.load_results(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    refused("holds no results", evaluation.load_results, tmp_path / "bad.json")
    outcome = {"a": {"png": {"AR": 1.0}}, "b": {"png": {"AR": 2.0}, "x": {}}}
    merged = evaluation.merge_datasets(outcome)
    assert merged == {"png": {"AR": 1.0}, "png@b": {"AR": 2.0}, "x": {}}


def test_expected_results_are_checked_by_detectron2s_rule(cfg):
    results = {"png": {"AR": 70.0}}
    cfg.TEST.EXPECTED_RESULTS = [["png", "AR", 70.4, 0.5]]
    evaluating.check_expected(cfg, results)
    for entry, kind, message in (
        (["png", "AR", 70.6, 0.5], SystemExit, "1"),
        (["refer", "cIoU", 1.0, 0.5], ValueError, "task 'refer', but the results have png"),
        (["png", "AR", 70.0], ValueError, "is not .task, metric, expected, tolerance"),
    ):
        cfg.TEST.EXPECTED_RESULTS = [entry]
        refused(message, evaluating.check_expected, cfg, results, error=kind)

"""Picking thresholds: the sweep against evaluating each threshold, files and their errors."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from evaluation_scenes import CATEGORIES, make_sample, phrase, run
from refusals import refused

from gella import add_gella_config, evaluation
from gella.engine import evaluate as evaluating
from gella.evaluation.calibration import (
    GRID,
    PANOPTIC_GRID,
    PanopticSweep,
    SelectionSweep,
    candidates_of,
    read_calibration,
)
from gella.evaluation.panoptic_quality import pq_counts, pq_summary
from gella.evaluation.results import describe_run
from gella.evaluation.truth import TruthReader
from gella.modeling.postprocessing import (
    Candidates,
    gather_candidates,
    ground_phrases,
    panoptic_from_scores,
    snap_to_entities,
)
from gella.text.words import names_several
from gella.utils.io import file_hash


def options(**changes):
    plain = {"SNAP": True, "ASSOCIATION_THRESHOLD": 0.5, "SINGULAR_ARGMAX": False}
    return SimpleNamespace(**{**plain, "NONE_THRESHOLD": 0.0, "PANOPTIC_THRESHOLD": 0.1, **changes})


def scene(folder, image_id, referring=False):
    sample = make_sample(folder, image_id)
    if referring:
        ids = [302] if image_id % 3 else []
        sample["phrases"] = [phrase("the star", ids, thing=True)]
    entities, rng = sample["entities_full"], np.random.default_rng(image_id)
    names = entities.segment_ids
    truth = np.array([[n in p["segment_ids"] for n in names] for p in sample["phrases"]])
    scores = np.clip(0.25 + 0.45 * truth + rng.normal(0, 0.2, truth.shape), 0.01, 0.99)
    own = torch.from_numpy(entities.bitmasks())
    masks = own | own.roll(2, dims=2)  # what the decoder drew overlaps
    return sample, Candidates(masks, list(names), torch.from_numpy(scores).float())


def all_taken(sample, candidates):
    grounding = ground_phrases(sample["phrases"], candidates, -1.0)
    return {
        "grounding": grounding,
        "instances": SimpleNamespace(pred_masks=torch.stack(list(candidates.masks))),
    }


def evaluated(scenes, threshold, argmax, none, referring):
    evaluator = evaluation.ReferringEvaluator() if referring else evaluation.PNGEvaluator()
    answers = []
    for sample, candidates in scenes:
        best_only = [argmax and not names_several(p["text"]) for p in sample["phrases"]]
        rule = {"best_only": best_only, "none_threshold": none}
        answers.append(ground_phrases(sample["phrases"], candidates, threshold, **rule))
    results = run(evaluator, [s for s, _ in scenes], [{"grounding": a} for a in answers])
    return results["refer"]["gIoU"] if referring else results["png"]["AR"]


@pytest.mark.parametrize("referring", [False, True])
def test_the_sweep_is_what_evaluation_would_give(tmp_path, referring):
    scenes = [scene(tmp_path, k, referring) for k in range(12)]
    node = options(ASSOCIATION_THRESHOLD=0.37, SINGULAR_ARGMAX=True, SNAP=False)
    sweep = SelectionSweep(node, "entity", referring)
    picks = run(sweep, [s for s, _ in scenes], [all_taken(*one) for one in scenes])
    assert picks["before"] == pytest.approx(evaluated(scenes, 0.37, True, 0.0, referring), abs=1e-3)
    for argmax in (False, True):
        for k in (5, 40, 62, 90):
            expected = evaluated(scenes, GRID[k], argmax, 0.0, referring)
            curve = picks["curve"][f"singular_argmax {argmax}"]
            assert curve[k] == pytest.approx(expected, abs=1e-3)
    picked = picks["thresholds"]
    rule = (picked["ASSOCIATION_THRESHOLD"], picked["SINGULAR_ARGMAX"], picked["NONE_THRESHOLD"])
    assert picks["score"] == pytest.approx(evaluated(scenes, *rule, referring), abs=1e-3)
    every = [score for name in picks["curve"] for score in picks["curve"][name]]
    assert picks["score"] == pytest.approx(max(every)) and picks["score"] > picks["before"]
    assert (picked["NONE_THRESHOLD"] > 0) == referring, "only expressions may have no target"
    assert picks["n"] == (12 if referring else 48)
    refused("no grounded noun", run, sweep, [], [])


def test_the_panoptic_sweep_is_what_evaluation_would_give(tmp_path):
    scenes = []
    for sample, c in (scene(tmp_path, k) for k in range(4)):
        sample["phrases"] = sample["phrases"][:3]
        for p, category in zip(sample["phrases"], CATEGORIES, strict=True):
            p.update(category_id=category["id"], isthing=bool(category["isthing"]))
        scenes.append((sample, Candidates(c.masks, c.entity_ids, c.scores[:3])))

    def paint(scores, masks, categories, threshold):
        as_model = torch.from_numpy(scores).float()
        return panoptic_from_scores(as_model, torch.from_numpy(masks), categories, threshold)

    sweep = PanopticSweep(options(SNAP=False), "entity", CATEGORIES, paint)
    picks = run(sweep, [s for s, _ in scenes], [all_taken(*one) for one in scenes])
    for k in (0, 9, 15):
        counts = []
        for sample, c in scenes:
            ids, segments = panoptic_from_scores(
                c.scores, c.masks, sample["phrases"], PANOPTIC_GRID[k]
            )
            truth = TruthReader()(sample)
            counts.append(pq_counts(truth.ids, truth.segments, ids.numpy(), segments, CATEGORIES))
        expected = 100 * pq_summary(counts, CATEGORIES)[0]["PQ"]
        assert picks["curve"]["panoptic"][k] == pytest.approx(expected)
    assert picks["score"] == max(picks["curve"]["panoptic"])
    assert picks["thresholds"]["PANOPTIC_THRESHOLD"] in picks["grid"]
    refused("no image", run, sweep, [], [])


@pytest.mark.parametrize("queries", ["entity", "learned"])
@pytest.mark.parametrize("snap", [True, False])
def test_candidates_come_back_from_an_answer_that_takes_all(tmp_path, queries, snap):
    sample, _ = scene(tmp_path, 1)
    own, ids = torch.from_numpy(sample["entities_full"].bitmasks()), sample["entities_full"]
    drawn = own[[2, 0, 3, 1] if queries == "learned" else [0, 1, 2, 3]].clone()
    drawn[0, 0, 0] = True
    if queries == "learned":
        drawn[1] = ~drawn[1]  # meets no entity
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    known = {"entity_masks": own if snap else None, "snapped": snap_to_entities(drawn, ids, 0.5)}
    made = gather_candidates(logits[:, None], drawn, ids.segment_ids, queries=queries, **known)
    answer = {**all_taken(sample, made), "instances": SimpleNamespace(pred_masks=drawn)}
    masks, scores = candidates_of(sample, answer, queries, snap)
    order = np.argsort(made.entity_ids)
    np.testing.assert_array_equal(masks, np.stack(list(made.masks))[order])
    np.testing.assert_array_equal(scores, made.scores.double().numpy()[:, order])


def test_a_calibration_sets_the_keys_of_its_weights_only(tmp_path):
    cfg = get_cfg()
    add_gella_config(cfg)
    weights, other, file = (tmp_path / name for name in ("w.pth", "other.pth", "calibration.json"))
    weights.write_bytes(b"some weights")
    other.write_bytes(b"other weights")
    assert evaluating.calibrated(cfg, str(weights)) == (cfg, None)
    cfg.TEST.CALIBRATION = str(file)
    picked = {"ASSOCIATION_THRESHOLD": 0.37, "SINGULAR_ARGMAX": True}
    content = {"thresholds": picked, "datasets": {"a_split": {}}}
    whole = {**content, "weights_sha256": file_hash(weights)}
    file.write_text(json.dumps(whole))
    changed, calibration = evaluating.calibrated(cfg, str(weights))
    assert changed.MODEL.GELLA.items() >= picked.items()
    assert cfg.MODEL.GELLA.ASSOCIATION_THRESHOLD == 0.5
    run_of = {"config_file": "", "weights": str(weights), "seconds": 0, "calibration": calibration}
    described = describe_run(changed, datasets={"a_split": {}}, **run_of)
    assert described["calibration"]["scored_on_the_same"] == ["a_split"]
    assert described["settings"]["thresholds"]["association"] == 0.37
    told, none = "run tools/calibrate.py", tmp_path / "none.json"
    refused(f"{told} for these weights", read_calibration, file, str(other))
    for broken in ({**whole, "thresholds": {"SNAP": 1}}, {**whole, "thresholds": []}, content):
        file.write_text(json.dumps(broken))
        refused("calibration.json is no calibration", read_calibration, file, str(weights))
    refused(told, read_calibration, none, str(weights), error=FileNotFoundError)

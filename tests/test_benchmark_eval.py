"""The benchmark of evaluation measures what it says."""

from __future__ import annotations

import json
from collections import defaultdict
from types import SimpleNamespace

import benchmark
import evaluation as benchmark_eval
import measuring
import pytest

from gella.data.register import coco_panoptic_categories
from gella.evaluation.panoptic_quality import PQCounts

SMALL = "eval --images 2 --size 64x48 --segments 6 --repeat 1 --recall-nouns 500".split()
CATEGORIES = coco_panoptic_categories()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Made scenes with their predictions on disk."""
    return benchmark_eval.made_pairs(tmp_path_factory.mktemp("pairs"), 6, (64, 48), 12)


def test_it_runs_prints_a_verdict_per_aim_and_writes_json(tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert benchmark.main([*SMALL, "--json", str(path)]) == 0
    text, figures = capsys.readouterr().out, json.loads(path.read_text())
    assert len(figures["rules"]) == 3
    for rule in figures["rules"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[rule["met"]]
        assert f"{rule['name']}: " in text
        assert f"<= {rule['limit']:g}, {met})" in text or f">= {rule['limit']:g}, {met})" in text
    assert figures["panoptic"]["images"] == 2
    assert "next: python tools/train_net.py" in text


@pytest.mark.parametrize(
    ("change", "unmet"),
    [
        ({}, {}),
        ({"decodings": 1.51}, {0: False}),
        ({"total_faster": None}, {1: None}),
        ({"official": 1.01}, {2: False}),
    ],
)
def test_aims_are_judged_on_their_side_of_the_limit(change, unmet):
    panoptic = {"decodings": 1.5, "total_faster": 1.5}
    recall = {"hard": 0.1, "official": 0.2, "flmm": 0.3}
    for part in (panoptic, recall):
        part.update({key: value for key, value in change.items() if key in part})
    figures = {"panoptic": panoptic, "recall_s": recall, "recall_nouns": 100_000}
    rules = benchmark_eval.rules(figures)
    assert {k: rule["met"] for k, rule in enumerate(rules) if not rule["met"]} == unmet
    assert rules[2]["name"].startswith("average recall of 100,000 nouns")


def test_made_predictions_are_right_wrong_and_missing(pairs):
    """So that all branches of the counting are among what is timed."""
    counts = [benchmark_eval.count(p, benchmark_eval.decode(p), CATEGORIES) for p in pairs]
    for name in ("tp", "fp", "fn"):
        assert sum(sum(getattr(c, name).values()) for c in counts) > 2, name
    assert all(len(p.prediction["segments_info"]) <= len(p.truth["segments_info"]) for p in pairs)


def test_real_annotations_are_scored_too(coco_sample, tmp_path):
    path = coco_sample / "annotations" / "panoptic_val2017.json"
    for pair in benchmark_eval.pairs_of(path, tmp_path, 5):
        assert pair.truth["image_id"] == pair.prediction["image_id"]
        truth, prediction = benchmark_eval.decode(pair)
        assert truth.shape == prediction.shape and (truth != prediction).any()
        assert sum(benchmark_eval.count(pair, (truth, prediction), CATEGORIES).tp.values()) > 5


def test_panopticapi_counts_the_same(pairs):
    pytest.importorskip("panopticapi", reason="panopticapi is not on PyPI; put it on PYTHONPATH")
    figures = benchmark_eval.compare_panoptic(pairs, 1)
    assert figures["total_faster"] == figures["reference_total_ms"] / figures["total_ms"]


def test_counts_that_differ_are_refused(pairs):
    nothing = SimpleNamespace(tp=0, fp=0, fn=0, iou=0.0)
    theirs = defaultdict(lambda: nothing, {3: SimpleNamespace(tp=1, fp=0, fn=2, iou=0.75)})
    benchmark_eval.check_agreement(PQCounts({3: 0.75}, {3: 1}, fn={3: 2}), theirs, pairs[0])
    for wrong in (
        PQCounts({3: 0.75}, {3: 1}),
        PQCounts({3: 0.7}, {3: 1}, fn={3: 2}),
        PQCounts(),
    ):
        with pytest.raises(RuntimeError, match="category 3"):
            benchmark_eval.check_agreement(wrong, theirs, pairs[0])


def test_tasks_take_turns_and_the_first_pass_is_not_counted():
    # Seconds of the calls in turn: a first pass of 90, then 1 and 2 (a), 10 and 40 (b), and so on.
    seconds = iter([90] * 4 + [1, 10, 2, 40] + [3, 20, 6, 30])
    now = [0.0, False]

    def clock():
        now[1] = not now[1]
        now[0] += 0 if now[1] else next(seconds)
        return now[0]

    seen: list[tuple[str, int]] = []

    tasks = {name: (lambda x, name=name: seen.append((name, x)), [1, 2]) for name in "ab"}
    figures = measuring.take_turns(tasks, 2, clock)
    assert seen == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 3
    assert figures == {"a": 2.5, "b": 25.0}

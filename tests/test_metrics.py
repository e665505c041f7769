"""Metrics against literal definitions, brute force and the reference implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from gella.evaluation import metrics, panoptic_quality

CATEGORIES = [{"id": i, "name": f"c{i}", "isthing": int(i < 5)} for i in (1, 2, 3, 4, 7, 8, 9)]


def test_average_recall_is_the_literal_sum_over_thresholds():
    rng = np.random.default_rng(0)
    ious = np.concatenate([rng.random(60), [0.0, 1.0, 0.5, 0.3, 0.99999]])
    thresholds = np.arange(100_000) / 100_000
    literal = np.mean((ious[None, :] >= thresholds[:, None]).mean(axis=1))
    assert metrics.average_recall(ious) == pytest.approx(literal, abs=1e-5)
    assert metrics.average_recall(ious) == pytest.approx(ious.mean(), abs=1e-5)
    assert metrics.average_recall([1.0, 1.0]) == 1.0 and metrics.average_recall([0.0, 0.0]) == 0.0
    assert math.isnan(metrics.average_recall([]))
    for bad in ([0.5, math.nan], [1.2], [-0.1]):
        with pytest.raises(ValueError, match="expected"):
            metrics.average_recall(bad)


def noun(iou: float, is_thing: bool, segments: int, is_plural: bool) -> dict:
    ids = list(range(segments))
    return {"iou": iou, "is_thing": is_thing, "segment_ids": ids, "is_plural": is_plural}


def test_png_subsets_follow_the_protocol():
    nouns = [noun(0.9, False, 2, False), noun(0.5, False, 1, True), noun(0.1, True, 1, False)]
    hard, flmm = metrics.png_summary(nouns), metrics.png_summary(nouns, "flmm")
    assert (hard["n_plural"], hard["n_thing"], hard["n_stuff"]) == (1, 1, 2)
    assert hard["AR_plural"] == pytest.approx(0.9, abs=1e-5)
    # F-LMM goes by the flag, and files its plural stuff under things.
    assert (flmm["n_plural"], flmm["n_thing"], flmm["n_stuff"]) == (1, 2, 1)
    assert flmm["AR_plural"] == pytest.approx(0.5, abs=1e-5)
    assert hard["acc@0.5"] == pytest.approx(1 / 3), "0.5 itself is not above 0.5"
    assert math.isnan(metrics.png_summary([])["AR"])
    with pytest.raises(ValueError, match="official"):
        metrics.png_summary(nouns, "soft")
    with pytest.raises(RuntimeError, match="singular and plural"):
        metrics.check_splits({**hard, "AR_plural": hard["AR_plural"] + 0.01})


def test_noun_iou_rules():
    truth = np.zeros((20, 30), bool)
    truth[5:15, 5:15] = True
    shifted, empty = np.roll(truth, 5, axis=1), np.zeros_like(truth)
    assert metrics.noun_iou(shifted, truth) == 50 / 150
    assert metrics.noun_iou(shifted, truth, "flmm") == pytest.approx(50 / 150, abs=1e-12)
    assert metrics.noun_iou(empty, empty) == 0.0, "0/0 is a miss"
    with pytest.raises(ValueError, match=r"\(20, 30\)"):
        metrics.noun_iou(truth[1:], truth)


@pytest.mark.parametrize("size", [(20, 30), (300, 260), (256, 400)])
def test_official_protocol_equals_torch_interpolation(size):
    pair = np.random.default_rng(1).random((2, *size)) > 0.6
    soft = torch.from_numpy(pair)[None].double()
    for shape in ((256, 256), size):
        soft = torch.nn.functional.interpolate(soft, shape, mode="bilinear")
    p, t = soft[0]
    expected = float((p * t).sum() / (p + t - p * t).sum())
    assert metrics.noun_iou(*pair, "official") == pytest.approx(expected, abs=1e-9)


def test_oracle_equals_brute_force():
    rng = np.random.default_rng(2)
    for _ in range(200):
        ids = rng.integers(0, 6, (5, 7))
        masks = np.stack([ids == k for k in range(1, 6)])  # some may be empty
        truth = rng.random((5, 7)) < rng.random()
        if not truth.any():
            continue
        unions = [
            masks[list(members)].any(axis=0)
            for size in range(6)
            for members in itertools.combinations(range(5), size)
        ]
        best = max(metrics.noun_iou(union, truth) for union in unions)
        inter = (masks & truth).sum(axis=(1, 2))
        score, chosen = metrics.best_union(inter, masks.sum(axis=(1, 2)), int(truth.sum()))
        assert score == pytest.approx(best, abs=1e-12)
        assert metrics.noun_iou(masks[chosen].any(axis=0), truth) == pytest.approx(score)


def test_blind_choices_repeat_and_spread():
    areas = np.array([3, 9, 4, 1])
    first, again = metrics.blind_choices(areas, 17, 2), metrics.blind_choices(areas, "17", 2)
    assert first["random"].tolist() == again["random"].tolist()
    assert first["largest"].tolist() == [1] and first["all"].tolist() == [0, 1, 2, 3]
    picks = [metrics.blind_choices(areas, i, k)["random"][0] for i in range(50) for k in range(8)]
    assert np.bincount(picks, minlength=4).min() > 60, "about 100 of 400 each"
    assert all(v.size == 0 for v in metrics.blind_choices(np.zeros(0, int), 1, 0).values())


def test_noun_recall_uses_each_answer_noun_once():
    reference = ["the red circle", "a  Dog", "red circle", "Sky"]
    assert metrics.noun_recall(reference, ["Red  circle", "dog ", "sea"]) == 2
    assert metrics.noun_recall(reference, ["a red circle", "THE red circle", "sky"]) == 3
    assert metrics.noun_recall([], ["dog"]) == 0
    for given, plain in ((" All  the Dogs ", "dogs"), ("another",) * 2, ("theatre",) * 2):
        assert metrics.normalize_noun(given) == plain


def test_cumulative_iou_at_the_borders():
    """In between it is a plain loop's, see test_evaluation."""
    assert metrics.cumulative_iou([5], [10])["P@0.5"] == 0.0, "strictly above"
    assert math.isnan(metrics.cumulative_iou([], [])["cIoU"])
    with pytest.raises(ValueError, match="1 intersections but 2"):
        metrics.cumulative_iou([1], [1, 2])


def test_joint_counts_equals_a_loop():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 4, (6, 9)), rng.integers(0, 3, (6, 9)) * (2**24 - 1)
    pairs, counts = panoptic_quality.joint_counts(a, b)
    expected: dict[tuple[int, int], int] = {}
    for pair in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        expected[pair] = expected.get(pair, 0) + 1
    assert {tuple(p): n for p, n in zip(pairs.tolist(), counts.tolist(), strict=True)} == expected


def random_ids(rng: np.random.Generator, segments: int, side: int = 24) -> np.ndarray:
    """Rectangles painted over each other, some of the picture left void."""
    ids = np.zeros((side, side), np.int64)
    for number in rng.choice(2**24 - 1, segments, replace=False) + 1:
        y, x = rng.integers(0, side - 4, 2)
        height, width = rng.integers(3, side, 2)
        ids[y : y + height, x : x + width] = number
    return ids


def random_case(seed: int) -> tuple[np.ndarray, list[dict], np.ndarray, list[dict]]:
    """Truth with crowds and void; a prediction with shifted, missing, extra and wrong segments."""
    rng = np.random.default_rng(seed)
    truth = random_ids(rng, int(rng.integers(1, 9)))
    gt_segments = [
        {
            "id": int(i),
            "category_id": int(rng.choice([1, 2, 3, 7, 8])),
            "iscrowd": int(rng.random() < 0.25),
            "area": int((truth == i).sum()),
        }
        for i in np.unique(truth[truth != 0])
    ]
    predicted = truth.copy()
    for y, x in rng.integers(0, 20, (int(rng.integers(0, 5)), 2)):
        predicted[y : y + 4, x : x + 4] = rng.choice(np.append(np.unique(truth), 5_000_000))
    for segment_id in np.unique(truth):
        if rng.random() < 0.15:
            predicted[predicted == segment_id] = 0
    extra = random_ids(rng, 2)
    if rng.random() < 0.5:
        predicted[extra != 0] = extra[extra != 0]
    kinds = {segment["id"]: segment["category_id"] for segment in gt_segments}
    pred_segments = [
        {
            "id": int(i),
            "category_id": kinds.get(int(i), 3) if rng.random() < 0.8 else int(rng.choice([1, 8])),
        }
        for i in np.unique(predicted[predicted != 0])
    ]
    return truth, gt_segments, predicted, pred_segments


def ours(cases: list[tuple]) -> tuple[dict, dict]:
    counts = [panoptic_quality.pq_counts(*case, CATEGORIES, k) for k, case in enumerate(cases)]
    return panoptic_quality.pq_summary(counts, CATEGORIES)


def test_pq_of_a_case_by_hand():
    truth = np.repeat([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0]], 2, axis=0)
    gt = [
        {"id": 1, "category_id": 1, "iscrowd": 0},
        {"id": 2, "category_id": 7, "iscrowd": 0},
        {"id": 3, "category_id": 2, "iscrowd": 1},
    ]
    predicted = np.repeat([[9, 9, 9, 0, 0, 5, 6, 6, 9, 4]], 2, axis=0)
    segments = [
        {"id": 9, "category_id": 1},  # 6 of 8 pixels, and 2 on void that do not count: IoU 0.75
        {"id": 5, "category_id": 7},  # half of segment 2: no match, one FP and one FN
        {"id": 6, "category_id": 2},  # on crowd of its own category: ignored
        {"id": 4, "category_id": 8},  # on void: ignored
    ]
    summary, classes = ours([(truth, gt, predicted, segments)])
    assert classes[1] == {"PQ": 0.75, "SQ": 0.75, "RQ": 1.0}
    assert classes[7] == {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0}
    assert summary["n"] == 2 and summary["n_th"] == 1 and summary["n_st"] == 1
    assert summary["PQ"] == 0.375 and summary["PQ_th"] == 0.75 and summary["PQ_st"] == 0.0
    summary, _ = ours([])
    assert math.isnan(summary["PQ"]) and summary["n"] == 0, "no category, no quality"


GOOD = [{"id": i, "category_id": 1, "iscrowd": 0} for i in (1, 2)]


@pytest.mark.parametrize(
    ("message", "segments"),
    [
        (r"\[2\] in its pixels", GOOD[:1]),
        (r"\[3\] among its segments", [*GOOD, {"id": 3, "category_id": 1}]),
        ("unknown category_id 99", [GOOD[0], {"id": 2, "category_id": 99}]),
        ("repeat an id", [*GOOD, GOOD[0]]),
        (r"\(1, 3\)", None),
    ],
)
def test_pq_refuses_contradictions_and_names_the_image(message, segments):
    ids = np.array([[1, 1, 2, 2]])
    cases = [(ids, GOOD, ids, segments), (ids, segments, ids, GOOD)]
    for case in cases if segments else [(ids, GOOD, ids[:, :3], GOOD)]:
        with pytest.raises(ValueError, match=f"image 41: .*{message}"):
            panoptic_quality.pq_counts(*case, CATEGORIES, image_id=41)


def test_pq_equals_panopticapi(tmp_path):
    """The single-core routine of the reference on the same cases, written to PNGs."""
    reference = pytest.importorskip("panopticapi.evaluation")
    cases = [random_case(seed) for seed in range(300)]
    crowds = sum(s["iscrowd"] for _, gt, _, _ in cases for s in gt)
    summary, classes = ours(cases)
    assert crowds > 100 and 0.05 < summary["PQ"] < 0.95, "the cases must be telling"
    pairs = []
    for k, (truth, gt, predicted, segments) in enumerate(cases):
        for name, ids in (("gt", truth), ("pred", predicted)):
            (tmp_path / name).mkdir(exist_ok=True)
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(tmp_path / name / f"{k}.png")
        entry = {"image_id": k, "file_name": f"{k}.png"}
        pairs.append(
            tuple({**entry, "segments_info": [dict(s) for s in part]} for part in (gt, segments))
        )
    table = {category["id"]: category for category in CATEGORIES}
    folders = str(tmp_path / "gt"), str(tmp_path / "pred")
    stat = reference.pq_compute_single_core(0, pairs, *folders, table)
    for suffix, isthing in (("", None), ("_th", True), ("_st", False)):
        expected = stat.pq_average(table, isthing=isthing)[0]
        for name in ("pq", "sq", "rq", "n"):
            key = (name if name == "n" else name.upper()) + suffix
            assert summary[key] == pytest.approx(expected[name], abs=1e-9), key
    for category, scores in stat.pq_average(table, isthing=None)[1].items():
        for name, value in scores.items():
            assert classes[category][name.upper()] == pytest.approx(value, abs=1e-9)


def test_entity_ap_without_images_or_of_other_sizes():
    """The rest is pycocotools', see test_evaluation."""
    small, large = (mask_api.encode(np.ones((k, k), np.uint8, order="F")) for k in (5, 24))
    assert math.isnan(panoptic_quality.entity_ap([])["AP"])
    image = {"truth": [large], "crowd": [False], "predictions": [small], "scores": [0.5]}
    with pytest.raises(ValueError, match=r"image 1: masks of sizes \[\(5, 5\), \(24, 24\)\]"):
        panoptic_quality.entity_ap([image])

"""Metrics against literal definitions, brute force and the reference implementations."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api
from refusals import refused

from gella.evaluation import PNGEvaluator, metrics, panoptic_quality

CATEGORIES = [{"id": i, "name": f"c{i}", "isthing": int(i < 5)} for i in (1, 2, 3, 4, 7, 8, 9)]


def test_average_recall_of_a_list():
    """The literal sum over thresholds is in test_evaluation."""
    ious = np.concatenate([np.random.default_rng(0).random(60), [0.0, 1.0, 0.5, 0.3, 0.99999]])
    for values, expected in ((ious, ious.mean()), ([1.0, 1.0], 1.0), ([0.0, 0.0], 0.0)):
        assert metrics.average_recall(values) == pytest.approx(expected, abs=1e-5)
    assert math.isnan(metrics.average_recall([]))
    for bad in ([0.5, math.nan], [1.2], [-0.1]):
        refused("expected", metrics.average_recall, bad)


def test_png_subsets_follow_the_protocol():
    keys = ("iou", "is_thing", "segment_ids", "is_plural")
    rows = (0.9, False, [0, 1], False), (0.5, False, [0], True), (0.1, True, [0], False)
    nouns = [dict(zip(keys, row)) for row in rows]
    hard, flmm = metrics.png_summary(nouns), metrics.png_summary(nouns, "flmm")
    counts = ("n_plural", "n_thing", "n_stuff")
    assert [hard[k] for k in counts] == [1, 1, 2]
    # F-LMM goes by the flag, and files its plural stuff under things.
    assert [flmm[k] for k in counts] == [1, 2, 1]
    assert (hard["AR_plural"], flmm["AR_plural"]) == pytest.approx((0.9, 0.5), abs=1e-5)
    assert hard["acc@0.5"] == pytest.approx(1 / 3), "0.5 itself is not above 0.5"
    assert math.isnan(metrics.png_summary([])["AR"])
    refused("official", PNGEvaluator, protocol="soft")
    other = {**hard, "AR_plural": hard["AR_plural"] + 0.01}
    refused("singular and plural", metrics.check_splits, other, error=RuntimeError)


def test_noun_iou_rules():
    truth = np.zeros((20, 30), bool)
    truth[5:15, 5:15] = True
    shifted, empty = np.roll(truth, 5, axis=1), np.zeros_like(truth)
    assert metrics.noun_iou(shifted, truth) == 50 / 150
    assert metrics.noun_iou(shifted, truth, "flmm") == pytest.approx(50 / 150, abs=1e-12)
    assert metrics.noun_iou(empty, empty) == 0.0, "0/0 is a miss"


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
    chosen = [c for size in range(6) for c in itertools.combinations(range(5), size)]
    for _ in range(200):
        ids = rng.integers(0, 6, (5, 7))
        masks = np.stack([ids == k for k in range(1, 6)])  # some may be empty
        truth = rng.random((5, 7)) < rng.random()
        if not truth.any():
            continue
        best = max(metrics.noun_iou(masks[list(c)].any(axis=0), truth) for c in chosen)
        inter = (masks & truth).sum(axis=(1, 2))
        score, found = metrics.best_union(inter, masks.sum(axis=(1, 2)), int(truth.sum()))
        assert score == pytest.approx(best, abs=1e-12)
        assert metrics.noun_iou(masks[found].any(axis=0), truth) == pytest.approx(score)


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
    assert metrics.cumulative_iou([5], [10])["P@0.5"] == 0.0, "strictly above"
    assert math.isnan(metrics.cumulative_iou([], [])["cIoU"])
    refused("1 intersections but 2", metrics.cumulative_iou, [1], [1, 2])


def test_joint_counts_equals_a_loop():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 4, (6, 9)), rng.integers(0, 3, (6, 9)) * (2**24 - 1)
    pairs, counts = panoptic_quality.joint_counts(a, b)
    expected = Counter(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    assert {tuple(p): n for p, n in zip(pairs.tolist(), counts.tolist(), strict=True)} == expected


def random_ids(rng, segments, side=24):
    ids = np.zeros((side, side), np.int64)
    for number in rng.choice(2**24 - 1, segments, replace=False) + 1:
        y, x = rng.integers(0, side - 4, 2)
        height, width = rng.integers(3, side, 2)
        ids[y : y + height, x : x + width] = number
    return ids


def random_case(seed):
    """Truth with crowds and void; a prediction with shifted, missing, extra and wrong segments."""
    rng = np.random.default_rng(seed)
    truth = random_ids(rng, int(rng.integers(1, 9)))
    gt_segments = [
        {"id": int(i), "category_id": int(rng.choice([1, 2, 3, 7, 8]))}
        | {"iscrowd": int(rng.random() < 0.25), "area": int((truth == i).sum())}
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
    kinds, pred_segments = {s["id"]: s["category_id"] for s in gt_segments}, []
    for i in map(int, np.unique(predicted[predicted != 0])):
        kind = kinds.get(i, 3) if rng.random() < 0.8 else int(rng.choice([1, 8]))
        pred_segments.append({"id": i, "category_id": kind})
    return truth, gt_segments, predicted, pred_segments


def ours(cases):
    counts = [panoptic_quality.pq_counts(*case, CATEGORIES, k) for k, case in enumerate(cases)]
    return panoptic_quality.pq_summary(counts, CATEGORIES)


def test_pq_of_a_case_by_hand():
    truth = np.repeat([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0]], 2, axis=0)
    kinds = (1, 1, 0), (2, 7, 0), (3, 2, 1)
    gt = [{"id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd in kinds]
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
    expected = {"n": 2, "n_th": 1, "n_st": 1, "PQ": 0.375, "PQ_th": 0.75, "PQ_st": 0.0}
    assert summary.items() >= expected.items()
    summary, _ = ours([])
    assert math.isnan(summary["PQ"]) and summary["n"] == 0, "no category, no quality"


GOOD = [{"id": i, "category_id": 1, "iscrowd": 0} for i in (1, 2)]


@pytest.mark.parametrize("message, segments", [
    (r"\[2\] in its pixels", GOOD[:1]),
    (r"\[3\] among its segments", [*GOOD, {"id": 3, "category_id": 1}]),
    ("unknown category_id 99", [GOOD[0], {"id": 2, "category_id": 99}]),
    ("repeat an id", [*GOOD, GOOD[0]]),
    (r"\(1, 3\)", None),
])  # fmt: skip
def test_pq_refuses_contradictions_and_names_the_image(message, segments):
    ids = np.array([[1, 1, 2, 2]])
    cases = [(ids, GOOD, ids, segments), (ids, segments, ids, GOOD)]
    for case in cases if segments else [(ids, GOOD, ids[:, :3], GOOD)]:
        with pytest.raises(ValueError, match=f"image 41: .*{message}"):
            panoptic_quality.pq_counts(*case, CATEGORIES, image_id=41)


def test_pq_equals_panopticapi(tmp_path):
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
    small, large = (mask_api.encode(np.ones((k, k), np.uint8, order="F")) for k in (5, 24))
    assert math.isnan(panoptic_quality.entity_ap([])["AP"])
    image = {"truth": [large], "crowd": [False], "predictions": [small], "scores": [0.5]}
    with pytest.raises(ValueError, match=r"image 1: masks of sizes \[\(5, 5\), \(24, 24\)\]"):
        panoptic_quality.entity_ap([image])

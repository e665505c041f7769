"""Panoptic quality and entity AP against hand counts, panopticapi and plain code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gella.evaluation import panoptic_quality as metrics_panoptic

CATEGORIES = [{"id": i, "name": f"c{i}", "isthing": int(i < 5)} for i in (1, 2, 3, 4, 7, 8, 9)]


# --------------------------------------------------------------------------- panoptic quality


def test_joint_counts_equals_a_loop() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 4, (6, 9)), rng.integers(0, 3, (6, 9)) * (2**24 - 1)
    pairs, counts = metrics_panoptic.joint_counts(a, b)
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


def listed(ids: np.ndarray, rng: np.random.Generator, crowds: float) -> list[dict]:
    return [
        {
            "id": int(i),
            "category_id": int(rng.choice([1, 2, 3, 7, 8])),
            "iscrowd": int(rng.random() < crowds),
            "area": int((ids == i).sum()),
        }
        for i in np.unique(ids)
        if i != 0
    ]


def random_case(seed: int) -> tuple[np.ndarray, list[dict], np.ndarray, list[dict]]:
    """Truth with crowds and void; a prediction with shifted, missing, extra and wrong segments."""
    rng = np.random.default_rng(seed)
    truth = random_ids(rng, int(rng.integers(1, 9)))
    gt_segments = listed(truth, rng, crowds=0.25)
    predicted = truth.copy()
    for y, x in rng.integers(0, 20, (int(rng.integers(0, 5)), 2)):
        predicted[y : y + 4, x : x + 4] = rng.choice(np.append(np.unique(truth), 5_000_000))
    for segment_id in np.unique(truth):
        if rng.random() < 0.15:
            predicted[predicted == segment_id] = 0
    extra = random_ids(rng, 2)
    if rng.random() < 0.5:
        predicted[extra != 0] = extra[extra != 0]
    known = {segment["id"]: segment["category_id"] for segment in gt_segments}
    pred_segments = [
        {
            "id": int(i),
            "category_id": known.get(int(i), 3) if rng.random() < 0.8 else int(rng.choice([1, 8])),
        }
        for i in np.unique(predicted)
        if i != 0
    ]
    return truth, gt_segments, predicted, pred_segments


def ours(cases: list[tuple]) -> tuple[dict, dict]:
    counts = [metrics_panoptic.pq_counts(*case, CATEGORIES, k) for k, case in enumerate(cases)]
    return metrics_panoptic.pq_summary(counts, CATEGORIES)


def test_pq_of_a_case_by_hand() -> None:
    truth = np.repeat([[1, 1, 1, 1, 2, 2, 3, 3, 0, 0]], 2, axis=0)
    gt = [
        {"id": 1, "category_id": 1, "iscrowd": 0},
        {"id": 2, "category_id": 7, "iscrowd": 0},
        {"id": 3, "category_id": 2, "iscrowd": 1},
    ]
    predicted = np.repeat([[9, 9, 9, 0, 0, 5, 6, 6, 9, 4]], 2, axis=0)
    found = [
        {"id": 9, "category_id": 1},  # 6 of 8 pixels, and 2 on void that do not count: IoU 0.75
        {"id": 5, "category_id": 7},  # half of segment 2: no match, one FP and one FN
        {"id": 6, "category_id": 2},  # on crowd of its own category: ignored
        {"id": 4, "category_id": 8},  # on void: ignored
    ]
    summary, classes = ours([(truth, gt, predicted, found)])
    assert classes[1] == {"PQ": 0.75, "SQ": 0.75, "RQ": 1.0}
    assert classes[7] == {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0}
    assert summary["n"] == 2 and summary["n_th"] == 1 and summary["n_st"] == 1
    assert summary["PQ"] == 0.375 and summary["PQ_th"] == 0.75 and summary["PQ_st"] == 0.0


def test_pq_perfect_empty_and_permuted() -> None:
    cases = [random_case(seed) for seed in range(20)]
    perfect, _ = ours([(t, g, t, [dict(s) for s in g]) for t, g, _, _ in cases])
    assert perfect["PQ"] == perfect["SQ"] == perfect["RQ_st"] == 1.0
    empty, _ = ours([(t, g, np.zeros_like(t), []) for t, g, _, _ in cases])
    assert empty["PQ"] == empty["SQ"] == empty["RQ"] == 0.0
    renamed = []
    for t, g, p, s in cases:
        table = {0: 0, **{x["id"]: 10_000 - k for k, x in enumerate(s)}}
        ids = np.vectorize(table.get)(p)
        renamed.append((t, g, ids, [{**x, "id": table[x["id"]]} for x in s][::-1]))
    assert ours(renamed) == ours(cases)
    assert ours(cases[::-1]) == ours(cases)


def test_pq_without_categories_is_undefined() -> None:
    summary, _ = metrics_panoptic.pq_summary([], CATEGORIES)
    assert math.isnan(summary["PQ"]) and summary["n"] == 0


def test_pq_refuses_contradictions_and_names_the_image() -> None:
    ids = np.array([[1, 1, 2, 2]])
    good = [{"id": i, "category_id": 1, "iscrowd": 0} for i in (1, 2)]
    bad_lists = {
        r"\[2\] in its pixels": good[:1],
        r"\[3\] among its segments": [*good, {"id": 3, "category_id": 1}],
        "unknown category_id 99": [good[0], {"id": 2, "category_id": 99}],
        "repeat an id": [*good, good[0]],
    }
    for message, segments in bad_lists.items():
        for case in ((ids, good, ids, segments), (ids, segments, ids, good)):
            with pytest.raises(ValueError, match=f"image 41: .*{message}"):
                metrics_panoptic.pq_counts(*case, CATEGORIES, image_id=41)
    with pytest.raises(ValueError, match=r"image 41: .*\(1, 3\)"):
        metrics_panoptic.pq_counts(ids, good, ids[:, :3], good, CATEGORIES, image_id=41)


def reference_pq(cases, folder: Path, categories: list[dict]) -> tuple[dict, dict]:
    """panopticapi's single-core routine on the same cases, written to PNGs."""
    evaluation = pytest.importorskip("panopticapi.evaluation")
    (folder / "gt").mkdir()
    (folder / "pred").mkdir()
    pairs = []
    for k, (truth, gt, predicted, found) in enumerate(cases):
        for name, ids in (("gt", truth), ("pred", predicted)):
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(folder / name / f"{k}.png")
        entry = {"image_id": k, "file_name": f"{k}.png"}
        pairs.append(
            (
                {**entry, "segments_info": [dict(s) for s in gt]},
                {**entry, "segments_info": [dict(s) for s in found]},
            )
        )
    table = {category["id"]: category for category in categories}
    gt_folder, pred_folder = str(folder / "gt"), str(folder / "pred")
    stat = evaluation.pq_compute_single_core(0, pairs, gt_folder, pred_folder, table)
    means = {
        suffix: stat.pq_average(table, isthing=isthing)[0]
        for suffix, isthing in (("", None), ("_th", True), ("_st", False))
    }
    return means, stat.pq_average(table, isthing=None)[1]


def assert_same_pq(cases, folder: Path, categories: list[dict]) -> None:
    means, per_class = reference_pq(cases, folder, categories)
    counts = [metrics_panoptic.pq_counts(*case, categories, k) for k, case in enumerate(cases)]
    summary, classes = metrics_panoptic.pq_summary(counts, categories)
    for suffix, expected in means.items():
        for name in ("pq", "sq", "rq", "n"):
            key = (name if name == "n" else name.upper()) + suffix
            assert summary[key] == pytest.approx(expected[name], abs=1e-9), key
    for category, expected in per_class.items():
        for name, value in expected.items():
            assert classes[category][name.upper()] == pytest.approx(value, abs=1e-9)


def test_pq_equals_panopticapi(tmp_path: Path) -> None:
    cases = [random_case(seed) for seed in range(500)]
    crowds = sum(s["iscrowd"] for _, gt, _, _ in cases for s in gt)
    assert crowds > 100 and 0.05 < ours(cases)[0]["PQ"] < 0.95, "the cases must be telling"
    assert_same_pq(cases, tmp_path, CATEGORIES)


# --------------------------------------------------------------------------- entity AP


def rle(mask: np.ndarray) -> dict:
    from pycocotools import mask as mask_api

    return mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))


def random_ap_images(seed: int, count: int = 6) -> list[dict]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        ids = random_ids(rng, 6)
        masks = [ids == i for i in np.unique(ids) if i != 0]
        noisy = [np.roll(m, tuple(rng.integers(0, 3, 2)), axis=(0, 1)) for m in masks[1:]]
        images.append(
            {
                "truth": [rle(m) for m in masks],
                "crowd": [bool(rng.random() < 0.2) for _ in masks],
                "predictions": [rle(m) for m in noisy],
                "scores": rng.random(len(noisy)).tolist(),
            }
        )
    return images


def plain_ap(images: list[dict], threshold: float) -> float:
    """COCO's AP written out for one threshold: greedy matching, then 101-point interpolation."""
    from pycocotools import mask as mask_api

    hits, positives = [], 0
    for image in images:
        crowd = np.array(image["crowd"], dtype=bool)
        positives += int((~crowd).sum())
        order = np.argsort(-np.array(image["scores"]), kind="stable")[:100]
        free = ~crowd
        for k in order:
            ious = mask_api.iou([image["predictions"][k]], image["truth"], crowd.tolist())[0]
            candidates = np.where(free, ious, -1)
            if candidates.max() >= threshold:
                free[candidates.argmax()] = False
                hits.append((image["scores"][k], True))
            elif not (ious[crowd] >= threshold).any():
                hits.append((image["scores"][k], False))
    flags = np.array([hit for _, hit in sorted(hits, key=lambda x: -x[0])])
    recall = flags.cumsum() / positives
    precision = flags.cumsum() / np.arange(1, len(flags) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.mean([envelope[p] if p < len(envelope) else 0.0 for p in places]))


def test_entity_ap_equals_a_plain_implementation() -> None:
    images = random_ap_images(5)
    result = metrics_panoptic.entity_ap(images)
    assert 0.05 < result["AP"] < 0.95
    assert result["AP50"] == pytest.approx(plain_ap(images, 0.5), abs=1e-9)
    assert result["AP75"] == pytest.approx(plain_ap(images, 0.75), abs=1e-9)
    levels = np.linspace(0.5, 0.95, 10)
    assert result["AP"] == pytest.approx(np.mean([plain_ap(images, t) for t in levels]), abs=1e-9)


def test_entity_ap_at_the_ends() -> None:
    images = random_ap_images(6)
    for image in images:
        image["predictions"], image["scores"] = image["truth"], [0.5] * len(image["truth"])
    assert metrics_panoptic.entity_ap(images)["AP"] == pytest.approx(1.0)
    for image in images:
        image["predictions"], image["scores"] = [], []
    assert metrics_panoptic.entity_ap(images)["AP"] == 0.0
    assert math.isnan(metrics_panoptic.entity_ap([])["AP"])

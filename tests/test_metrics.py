"""Metrics against literal definitions, brute force and the reference implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gella.evaluation import metrics
from gella.evaluation.metrics import NounUnit

# --------------------------------------------------------------------------- average recall


def test_average_recall_is_the_literal_sum_over_thresholds() -> None:
    rng = np.random.default_rng(0)
    ious = np.concatenate([rng.random(60), [0.0, 1.0, 0.5, 0.3, 0.99999]])
    thresholds = np.arange(100_000) / 100_000
    literal = np.mean((ious[None, :] >= thresholds[:, None]).mean(axis=1))
    assert metrics.average_recall(ious) == pytest.approx(literal, abs=1e-5)
    assert metrics.average_recall(ious) == pytest.approx(ious.mean(), abs=1e-5)


def test_average_recall_at_the_ends() -> None:
    assert metrics.average_recall([1.0, 1.0]) == 1.0
    assert metrics.average_recall([0.0, 0.0]) == 0.0
    assert math.isnan(metrics.average_recall([]))
    for bad in ([0.5, math.nan], [1.2], [-0.1]):
        with pytest.raises(ValueError, match="expected"):
            metrics.average_recall(bad)


def random_units(count: int, seed: int = 0) -> list[NounUnit]:
    rng = np.random.default_rng(seed)
    return [
        NounUnit(
            iou=float(rng.random()),
            is_thing=bool(rng.integers(2)),
            num_segments=int(rng.integers(1, 4)),
            plural_flag=bool(rng.integers(2)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_png_subsets_add_up_and_partition(protocol: str) -> None:
    summary = metrics.png_summary(random_units(101), protocol)
    for first, second in (("thing", "stuff"), ("singular", "plural")):
        assert summary[f"n_{first}"] + summary[f"n_{second}"] == summary["n"] == 101
        mean = sum(summary[f"n_{x}"] * summary[f"AR_{x}"] for x in (first, second)) / 101
        assert mean == pytest.approx(summary["AR"], abs=1e-12)
    broken = {**summary, "AR_plural": summary["AR_plural"] + 0.01}
    with pytest.raises(RuntimeError, match="singular and plural"):
        metrics.check_splits(broken)


def test_png_subsets_follow_the_protocol() -> None:
    units = [
        NounUnit(0.9, is_thing=False, num_segments=2, plural_flag=False),
        NounUnit(0.5, is_thing=False, num_segments=1, plural_flag=True),
        NounUnit(0.1, is_thing=True, num_segments=1, plural_flag=False),
    ]
    hard, flmm = metrics.png_summary(units), metrics.png_summary(units, "flmm")
    assert (hard["n_plural"], hard["n_thing"], hard["n_stuff"]) == (1, 1, 2)
    assert hard["AR_plural"] == pytest.approx(0.9, abs=1e-5)
    # F-LMM goes by the flag, and files its plural stuff under things.
    assert (flmm["n_plural"], flmm["n_thing"], flmm["n_stuff"]) == (1, 2, 1)
    assert flmm["AR_plural"] == pytest.approx(0.5, abs=1e-5)
    assert hard["acc@0.5"] == pytest.approx(1 / 3), "0.5 itself is not above 0.5"
    assert math.isnan(metrics.png_summary([])["AR"])
    with pytest.raises(ValueError, match="official"):
        metrics.png_summary(units, "soft")


# --------------------------------------------------------------------------- masks and unions


def test_noun_iou_rules() -> None:
    truth = np.zeros((20, 30), bool)
    truth[5:15, 5:15] = True
    shifted = np.roll(truth, 5, axis=1)
    assert metrics.noun_iou(shifted, truth) == 50 / 150
    assert metrics.noun_iou(shifted, truth, "flmm") == pytest.approx(50 / 150, abs=1e-12)
    empty = np.zeros_like(truth)
    assert metrics.noun_iou(empty, empty) == 0.0, "0/0 is a miss"
    with pytest.raises(ValueError, match=r"\(20, 30\)"):
        metrics.noun_iou(truth[1:], truth)


@pytest.mark.parametrize("size", [(20, 30), (300, 260), (256, 400)])
def test_official_protocol_equals_torch_interpolation(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    pair = torch.from_numpy(rng.random((2, *size)) > 0.6)

    def through(mask: torch.Tensor) -> torch.Tensor:
        mask = mask.double()[None, None]
        small = torch.nn.functional.interpolate(mask, (256, 256), mode="bilinear")
        return torch.nn.functional.interpolate(small, size, mode="bilinear")[0, 0]

    p, t = through(pair[0]), through(pair[1])
    expected = float((p * t).sum() / (p + t - p * t).sum())
    assert metrics.noun_iou(*pair.numpy(), "official") == pytest.approx(expected, abs=1e-9)


def test_oracle_equals_brute_force() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        ids = rng.integers(0, 6, (5, 7))
        masks = np.stack([ids == k for k in range(1, 6)])  # some may be empty
        truth = rng.random((5, 7)) < rng.random()
        if not truth.any():
            continue
        best = 0.0
        for size in range(6):
            for members in itertools.combinations(range(5), size):
                union = masks[list(members)].any(axis=0)
                best = max(best, metrics.noun_iou(union, truth))
        assert metrics.oracle_iou(truth, masks) == pytest.approx(best, abs=1e-12)
        inter = (masks & truth).sum(axis=(1, 2))
        score, chosen = metrics.best_union(inter, masks.sum(axis=(1, 2)), int(truth.sum()))
        assert metrics.noun_iou(masks[chosen].any(axis=0), truth) == pytest.approx(score)


def test_blind_choices_repeat_and_spread() -> None:
    areas = np.array([3, 9, 4])
    first = metrics.blind_choices(areas, 17, 2)
    again = metrics.blind_choices(areas, "17", 2)
    assert first["random"].tolist() == again["random"].tolist()
    assert first["largest"].tolist() == [1] and first["all"].tolist() == [0, 1, 2]
    picks = [metrics.random_entity(image, phrase, 4) for image in range(50) for phrase in range(8)]
    assert np.bincount(picks, minlength=4).min() > 60, "about 100 of 400 each"
    assert all(v.size == 0 for v in metrics.blind_choices(np.zeros(0, int), 1, 0).values())


# --------------------------------------------------------------------------- nouns, referring


def test_noun_recall_uses_each_answer_noun_once() -> None:
    reference = ["the red circle", "a  Dog", "red circle", "Sky"]
    assert metrics.noun_recall(reference, ["Red  circle", "dog ", "sea"]) == (2, 4)
    assert metrics.noun_recall(reference, ["a red circle", "THE red circle", "sky"]) == (3, 4)
    assert metrics.noun_recall([], ["dog"]) == (0, 0)
    assert metrics.normalize_noun(" All  the Dogs ") == "dogs"
    assert metrics.normalize_noun("another") == "another"
    assert metrics.normalize_noun("theatre") == "theatre"


def test_cumulative_iou_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    union = rng.integers(0, 100, 40)
    union[:3] = 0
    inter = np.array([rng.integers(0, u + 1) for u in union])
    summary = metrics.cumulative_iou(inter, union)
    ious = [1.0 if u == 0 else i / u for i, u in zip(inter, union, strict=True)]
    assert summary["cIoU"] == pytest.approx(sum(inter) / sum(union))
    assert summary["gIoU"] == pytest.approx(sum(ious) / 40)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert summary[f"P@{t}"] == pytest.approx(sum(v > t for v in ious) / 40)
    assert metrics.cumulative_iou([5], [10])["P@0.5"] == 0.0, "strictly above"
    assert math.isnan(metrics.cumulative_iou([], [])["cIoU"])
    with pytest.raises(ValueError, match="1 intersections but 2"):
        metrics.cumulative_iou([1], [1, 2])

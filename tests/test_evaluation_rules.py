"""Evaluators against rules written out: literal sums, pixels, pycocotools, two processes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_scenes import CATEGORIES, all_evaluators, answer, make_sample, phrase, run, run_all

from gella import evaluation
from gella.engine.launch import leave_process_group
from gella.entities.entity_map import EntityMap
from gella.evaluation.offline import SavedPredictions
from gella.evaluation.truth import TruthReader


@pytest.fixture
def samples(tmp_path: Path) -> list[dict[str, Any]]:
    return [make_sample(tmp_path, image_id) for image_id in (3, 11, 2, 27)]


def referring(samples: list[dict[str, Any]], shift: int = 0) -> tuple[list[dict], list[dict]]:
    """One expression per sample; the last has no target, and none is found for it."""
    inputs, outputs = [], []
    for k, sample in enumerate(samples):
        ids = [302] if k < len(samples) - 1 else []
        one = {**sample, "phrases": [{**phrase("the star", ids, thing=True), "sent_id": k}]}
        inputs.append(one)
        outputs.append(answer(one, shift=shift * (k + 1)))
    return inputs, outputs


# --------------------------------------------------------------------------- both ends


def test_perfect_answers_score_100_and_empty_ones_0_everywhere(samples: list[dict]) -> None:
    inputs, outputs = referring(samples)
    refer = run(evaluation.ReferringEvaluator(), inputs, outputs)["refer"]
    shares = {k: v for k, v in refer.items() if k.split("_")[0] != "n"}
    assert set(shares.values()) == {100.0} and len(shares) == 9
    assert refer["n"] == 4 and refer["n_no_target"] == 1
    nothing = [{"grounding": []}] * 3
    refer = run(evaluation.ReferringEvaluator(), inputs[:3], nothing)["refer"]
    assert {refer[k] for k in ("cIoU", "gIoU", "P@0.5", "T_acc")} == {0.0}
    for protocol in ("hard", "flmm"):
        evaluator = evaluation.PNGEvaluator(protocol=protocol)
        png = run(evaluator, samples, [answer(s) for s in samples])["png"]
        assert png["AR"] == pytest.approx(100.0, abs=1e-3) == png["AR_plural"]
    panoptic = run_all(samples, [answer(s) for s in samples])["panoptic_seg"]
    assert {panoptic[k] for k in ("PQ", "SQ", "RQ", "SQ_th", "SQ_st")} == {100.0}


def test_no_target_counts_in_giou(samples: list[dict]) -> None:
    inputs, outputs = referring(samples)
    outputs[-1] = answer({**inputs[-1], "phrases": [phrase("the star", [302], thing=True)]})
    refer = run(evaluation.ReferringEvaluator(), inputs, outputs)["refer"]
    assert refer["gIoU"] == 75.0 and refer["N_acc"] == 0.0 and refer["T_acc"] == 100.0
    assert refer["cIoU"] < 100.0, "the mask that nobody asked for enlarges the union"


def test_permuted_entity_ids_change_nothing(samples: list[dict]) -> None:
    outputs = [answer(s, shift=1) for s in samples]
    expected = run_all(samples, outputs)
    assert 0 < expected["png"]["AR"] < 100
    inputs, renamed = [], []
    for sample, output in zip(samples, outputs, strict=True):
        old = sample["entities_full"]
        order = np.random.default_rng(5).permutation(old.num_entities)
        place = np.zeros(old.num_entities + 1, np.int32)
        place[1 + order] = np.arange(1, old.num_entities + 1)
        ids = [9000 - old.segment_ids[k] % 1000 for k in order]
        inputs.append({**sample, "entities_full": EntityMap(place[old.ids], ids)})
        numbers, infos = output["panoptic_seg"]
        table = {0: 0, **{info["id"]: 50 + k for k, info in enumerate(reversed(infos))}}
        changed = np.vectorize(table.get)(numbers.numpy()).astype(np.int32)
        left = [{**info, "id": table[info["id"]]} for info in infos]
        instances = output["instances"]
        renamed.append(
            {
                **output,
                "panoptic_seg": (torch.from_numpy(changed), left[::-1]),
                "instances": SimpleNamespace(
                    pred_masks=instances.pred_masks.flip(0), scores=instances.scores.flip(0)
                ),
                "grounding": [{**g, "entity_ids": [1, 2, 3]} for g in output["grounding"]],
            }
        )
    found = run_all(inputs, renamed)
    for scores in (expected["png"], found["png"]):
        for key in [k for k in scores if k.startswith("random_")]:
            del scores[key]  # a blind draw among the entities goes by their order
    assert found == expected


# --------------------------------------------------------------------------- literal rules


@pytest.mark.parametrize("protocol", ["hard", "official", "flmm"])
def test_average_recall_is_the_literal_sum_and_subsets_add_up(
    samples: list[dict], protocol: str, tmp_path: Path
) -> None:
    for k, sample in enumerate(samples):
        sample["phrases"][2]["is_plural"] = bool(k % 2)
        sample["phrases"][3]["is_plural"] = k == 1  # stuff, which F-LMM then calls a thing
    outputs = [answer(s, shift=k) for k, s in enumerate(samples)]
    evaluator = evaluation.PNGEvaluator(tmp_path / "out", protocol=protocol)
    png = run(evaluator, samples, outputs)["png"]
    units = []
    for sample, output in zip(samples, outputs, strict=True):
        truth = TruthReader()(sample)
        for p, found in zip(sample["phrases"], output["grounding"], strict=True):
            if p["segment_ids"]:
                target, mask = truth.mask(p["segment_ids"]), found["mask"]
                if protocol == "official":
                    target, mask = through_256(target), through_256(mask)
                both = (mask * target).sum()
                iou = both / ((mask + target * 1.0).sum() - both)
                many = p["is_plural"] if protocol == "flmm" else len(p["segment_ids"]) > 1
                thing = p["is_thing"] or (protocol == "flmm" and many)
                units.append((float(iou), thing, many))
    ious = np.array([u[0] for u in units])
    thing, plural = (np.array([u[k] for u in units], bool) for k in (1, 2))
    subsets = {"": thing | True, "_thing": thing, "_stuff": ~thing}
    subsets |= {"_singular": ~plural, "_plural": plural}
    thresholds = np.arange(100_000) / 100_000
    for name, chosen in subsets.items():
        literal = np.mean(ious[chosen] >= thresholds[:, None])
        assert png[f"AR{name}"] / 100 == pytest.approx(literal, abs=1e-5), name
        assert png[f"n{name}"] == chosen.sum() > 0
    for pair in (("thing", "stuff"), ("singular", "plural")):
        mean = sum(png[f"n_{x}"] * png[f"AR_{x}"] for x in pair) / png["n"]
        assert mean == pytest.approx(png["AR"], abs=1e-9)


def through_256(mask: np.ndarray) -> np.ndarray:
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(mask).double()[None, None], (256, 256), mode="bilinear"
    )
    return torch.nn.functional.interpolate(resized, mask.shape, mode="bilinear")[0, 0].numpy()


def test_referring_equals_plain_pixels_with_overlaps_and_empty_targets(tmp_path: Path) -> None:
    """Rectangles with whole corners, whose pixels plain loops can count."""
    rng = np.random.default_rng(8)
    height, width = 20, 30
    inputs, outputs, inters, unions = [], [], [], []
    for k in range(60):
        boxes = [(*rng.integers(0, (20, 12)), *rng.integers(1, 9, 2)) for _ in range(k % 4)]
        truth = {
            (y, x)
            for left, top, w, h in boxes
            for y in range(top, top + h)
            for x in range(left, left + w)
            if y < height and x < width
        }
        polygons = [
            [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)] for x, y, w, h in boxes
        ]
        top, left = rng.integers(0, (10, 20))
        guess = set() if k % 5 == 0 else {(top + i, left + j) for i in range(8) for j in range(9)}
        mask = np.zeros((height, width), bool)
        for y, x in guess:
            mask[y, x] = True
        one = phrase("it", [5] if boxes else [], thing=True)
        annotation = {"segments_info": [{"id": 5, "segmentation": polygons}]}
        size = {"image_id": k, "height": height, "width": width}
        inputs.append({**size, "caption": "it", "phrases": [one], "annotation": annotation})
        outputs.append({"grounding": [{"mask": mask}]})
        inters.append(len(truth & guess))
        unions.append(len(truth | guess))
    refer = run(evaluation.ReferringEvaluator(), inputs, outputs)["refer"]
    ious = [1.0 if u == 0 else i / u for i, u in zip(inters, unions, strict=True)]
    assert unions.count(0) > 1 and 0.05 < np.mean(ious) < 0.95
    assert refer["cIoU"] == pytest.approx(100 * sum(inters) / sum(unions), abs=1e-9)
    assert refer["gIoU"] == pytest.approx(100 * math.fsum(ious) / 60, abs=1e-9)
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        share = 100 * sum(v > t for v in ious) / 60
        assert refer[f"P@{t}"] == pytest.approx(share, abs=1e-9)


def test_entity_ap_is_what_pycocotools_prints_for_the_written_file(
    samples: list[dict], tmp_path: Path
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    outputs = [answer(s, shift=1 + k) for k, s in enumerate(samples)]
    entity = run(evaluation.EntityAPEvaluator(tmp_path), samples, outputs)["entity"]
    annotations = []
    for sample in samples:
        truth = TruthReader()(sample)
        for segment, rle in zip(truth.segments, truth.regions.to_rle(), strict=True):
            if isinstance(rle["counts"], bytes):
                rle = {**rle, "counts": rle["counts"].decode()}
            entry = {"id": len(annotations) + 1, "image_id": sample["image_id"], "category_id": 1}
            entry |= {"segmentation": rle, "iscrowd": segment["iscrowd"], "area": segment["area"]}
            annotations.append({**entry, "bbox": [0, 0, 1, 1]})
    images = [{"id": s["image_id"], "height": 20, "width": 30} for s in samples]
    categories = [{"id": 1, "name": "entity"}]
    content = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        reference = COCOeval(coco, coco.loadRes(str(tmp_path / "entity_predictions.json")), "segm")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert 5 < entity["AP"] < 95
    for name, value in zip(("AP", "AP50", "AP75"), reference.stats[:3], strict=True):
        assert entity[name] == pytest.approx(100 * value, abs=1e-9)


# --------------------------------------------------------------------------- processes


def evaluate_share(rank: int, world: int, port: int, folder: str, result: str) -> None:
    """One of several real processes: its share of the samples, by every evaluator."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    inputs = [make_sample(Path(folder), image_id) for image_id in (3, 11, 2, 27)]
    outputs = [answer(s, shift=k) for k, s in enumerate(inputs)]
    refer_inputs, refer_outputs = referring(inputs, shift=1)
    found: dict[str, Any] = {}
    for evaluator in (*all_evaluators(Path(result)), evaluation.ReferringEvaluator(Path(result))):
        is_refer = isinstance(evaluator, evaluation.ReferringEvaluator)
        pairs = (refer_inputs, refer_outputs) if is_refer else (inputs, outputs)
        own = [part[rank::world] for part in pairs]
        found.update(run(evaluator, *own, batch=1 if world == 1 else 2))
    if rank == 0:
        evaluation.save_results(found, Path(result) / "results.json")
    else:
        assert found == {}
    leave_process_group()  # the first to leave would take the connection down


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_write_what_one_writes_byte_for_byte(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    for world in (1, 2):
        data = tmp_path / f"data{world}"
        data.mkdir()
        arguments = (world, free_port(), str(data), str(tmp_path / f"out{world}"))
        processes = [
            spawn.Process(target=evaluate_share, args=(r, *arguments)) for r in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world
    one, two = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "out1", tmp_path / "out2")
    )
    assert len(one) >= 11 and one == two


# --------------------------------------------------------------------------- saved predictions


def test_saved_predictions_give_every_score_again(samples: list[dict], tmp_path: Path) -> None:
    outputs = [answer(s, shift=k) for k, s in enumerate(samples)]
    # Extracted answers: in another order, and one noun twice, where the order says which is which.
    samples[1]["phrases"][0]["text"] = samples[1]["phrases"][3]["text"] = "stars"
    outputs[1] = answer(samples[1], shift=1)
    outputs[1]["grounding"].pop()
    outputs[0]["grounding"] = outputs[0]["grounding"][::-1]
    for index, evaluator in enumerate(all_evaluators(tmp_path)):
        expected = run(evaluator, samples, outputs)
        saved = SavedPredictions(tmp_path)
        fresh = all_evaluators()[index]
        assert run(fresh, samples, [saved(s) for s in samples]) == expected
    inputs, outputs = referring(samples, shift=2)
    expected = run(evaluation.ReferringEvaluator(tmp_path / "refer"), inputs, outputs)
    saved = SavedPredictions(tmp_path / "refer")
    backwards = [saved(s) for s in inputs[::-1]]
    assert run(evaluation.ReferringEvaluator(), inputs[::-1], backwards) == expected
    with pytest.raises(KeyError, match="no prediction of image 3"):
        saved(inputs[0])  # each was answered once
    with pytest.raises(FileNotFoundError, match="holds no predictions"):
        SavedPredictions(tmp_path / "none")
    (tmp_path / "refer" / "referring_predictions.json").write_text("[1]")
    with pytest.raises(ValueError, match="referring_predictions.json is no file of predictions"):
        SavedPredictions(tmp_path / "refer")


def test_predictions_stand_in_the_benchmarks_form_too(samples: list[dict], tmp_path: Path) -> None:
    sample = samples[0]
    words = ["circles", "a star", "stars", "sand", "picture"]
    starts = [sample["caption"].index(w) for w in words]
    starts[2] = sample["caption"].index("stars", starts[1] + 4)
    for p, word, start in zip(sample["phrases"], words, starts, strict=True):
        p.update(text=word, start=start, end=start + len(word))
    run(evaluation.PNGEvaluator(tmp_path), [sample], [answer(sample)])
    (narrative,) = json.loads((tmp_path / "png_form.json").read_text())
    assert narrative["image_id"] == "3" and narrative["caption"] == sample["caption"]
    assert " ".join(s["utterance"] for s in narrative["segments"]) == sample["caption"]
    nouns = {s["utterance"]: s["segment_ids"] for s in narrative["segments"] if s["noun"]}
    assert nouns["circles"] == ["300", "301"] and nouns["sand"] == ["70000"]


# --------------------------------------------------------------------------- Detectron2's own


def test_detectron2s_panoptic_evaluator_scores_the_same_outputs(tmp_path: Path) -> None:
    pytest.importorskip("panopticapi", reason="panopticapi is not importable")
    detectron2_evaluation = pytest.importorskip("detectron2.evaluation")
    if not hasattr(detectron2_evaluation, "COCOPanopticEvaluator"):
        pytest.skip("this Detectron2 is the core, without COCOPanopticEvaluator")
    from detectron2.data import MetadataCatalog

    from gella.data.panoptic import category_metadata

    samples = [make_sample(tmp_path, image_id) for image_id in (3, 11)]
    outputs = [answer(s, shift=1) for s in samples]
    for output in outputs:  # as the model gives them
        for info in output["panoptic_seg"][1]:
            info.update(isthing=info["category_id"] != 9, score=0.5)
    before = [dict(info) for info in outputs[0]["panoptic_seg"][1]]
    entries = [
        {
            "image_id": s["image_id"],
            "file_name": f"{s['image_id']}.png",
            "segments_info": s["annotation"]["segments_info"],
        }
        for s in samples
    ]
    images = [{"id": s["image_id"], "file_name": s["file_name"]} for s in samples]
    content = {"images": images, "annotations": entries, "categories": CATEGORIES}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    name = "evaluation_test_detectron2_panoptic"
    paths = {"panoptic_json": str(tmp_path / "panoptic.json"), "panoptic_root": str(tmp_path)}
    MetadataCatalog.get(name).set(**category_metadata(CATEGORIES), **paths)
    try:
        theirs = run(
            evaluation.Detectron2PanopticEvaluator(name, tmp_path / "out"), samples, outputs
        )
    finally:
        MetadataCatalog.remove(name)
    assert outputs[0]["panoptic_seg"][1] == before
    ours = run(evaluation.PanopticEvaluator(CATEGORIES), samples, outputs)["panoptic_seg"]
    assert 10 < ours["PQ"] < 95
    for key, value in theirs["panoptic_seg_detectron2"].items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key

"""Evaluators on real COCO annotations with crowd and void."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_scenes import phrase, run, told
from PIL import Image

from gella import evaluation
from gella.entities.entity_map import EntityMap, rgb_to_id
from gella.evaluation.truth import TruthReader

SHARED = Path(__file__).resolve().parents[2] / "shared"


def coco_samples() -> list[dict[str, Any]]:
    """The four narratives of the sample images as mapped dicts, read by plain code."""
    root = SHARED / "coco_sample" / "annotations"
    if not root.is_dir():
        pytest.skip("shared/coco_sample is not beside the repository")
    panoptic = json.loads((root / "panoptic_val2017.json").read_text())
    thing = {c["id"]: bool(c["isthing"]) for c in panoptic["categories"]}
    by_image = {a["image_id"]: a for a in panoptic["annotations"]}
    samples = []
    for record in json.loads((root / "png_coco_val2017.json").read_text()):
        entry = by_image[int(record["image_id"])]
        path = root / "panoptic_val2017" / entry["file_name"]
        ids = rgb_to_id(np.array(Image.open(path).convert("RGB")))
        kind = {s["id"]: thing[s["category_id"]] for s in entry["segments_info"]}
        solid = [s["id"] for s in entry["segments_info"] if not s["iscrowd"]]
        nouns = [s for s in record["segments"] if s["noun"]]
        samples.append(
            {
                "image_id": entry["image_id"],
                "height": ids.shape[0],
                "width": ids.shape[1],
                "caption": record["caption"],
                "phrases": [
                    phrase(
                        s["utterance"],
                        [int(i) for i in s["segment_ids"]],
                        bool(s["segment_ids"]) and kind[int(s["segment_ids"][-1])],
                    )
                    for s in nouns
                ],
                "entities_full": EntityMap.from_id_image(ids, solid),
                "annotation": {"file_name": str(path), "segments_info": entry["segments_info"]},
                "categories": panoptic["categories"],
            }
        )
    return samples


def test_real_narratives_with_crowd_and_void() -> None:
    samples = coco_samples()
    png = run(evaluation.PNGEvaluator(), samples, [told(s) for s in samples])["png"]
    assert png["AR"] == png["oracle_AR"] == 100.0 and png["n_captions"] == 4
    assert png["all_AR"] < 60 and png["n_thing"] + png["n_stuff"] == png["n"] > 10
    # The people of the first image's crowd join "a few people": they count, though the crowd is
    # not among the entities.
    samples[0]["phrases"][0]["segment_ids"].append(3153362)
    crowded = run(evaluation.PNGEvaluator(), samples, [told(s) for s in samples])["png"]
    assert crowded["AR"] == 100.0 and 90 < crowded["oracle_AR"] < 100


def test_real_panoptic_equals_panopticapi(tmp_path: Path) -> None:
    reference = pytest.importorskip("panopticapi.evaluation")
    samples = {s["image_id"]: s for s in coco_samples()}
    categories = next(iter(samples.values()))["categories"]
    outputs, pairs = [], []
    for sample in samples.values():
        truth = TruthReader()(sample)
        solid = [s for s in truth.segments if not s["iscrowd"]]
        ids = np.where(np.isin(truth.ids, [s["id"] for s in solid[1:]]), truth.ids, 0)
        ids[100:160, 100:300] = solid[1]["id"]  # one segment grows over others and over void
        ids = np.roll(ids, 3, axis=1)
        left = [s for s in solid if (ids == s["id"]).any()]
        infos = [{"id": s["id"], "category_id": s["category_id"]} for s in left]
        outputs.append({"panoptic_seg": (torch.from_numpy(ids), infos)})
        entry = {
            "image_id": sample["image_id"],
            "file_name": Path(sample["annotation"]["file_name"]).name,
        }
        gt = [dict(s) for s in sample["annotation"]["segments_info"]]
        pairs.append(({**entry, "segments_info": gt}, {**entry, "segments_info": infos}))
    inputs = list(samples.values())
    evaluator = evaluation.PanopticEvaluator(categories, tmp_path)
    ours = run(evaluator, inputs, outputs)["panoptic_seg"]
    table = {category["id"]: category for category in categories}
    gt_folder = str(Path(inputs[0]["annotation"]["file_name"]).parent)
    pred_folder = str(tmp_path / "panoptic_predictions")
    stat = reference.pq_compute_single_core(0, pairs, gt_folder, pred_folder, table)
    for suffix, isthing in (("", None), ("_th", True), ("_st", False)):
        expected = stat.pq_average(table, isthing=isthing)[0]
        for name in ("pq", "sq", "rq"):
            assert ours[name.upper() + suffix] == pytest.approx(100 * expected[name], abs=1e-9)
    assert 20 < ours["PQ"] < 99

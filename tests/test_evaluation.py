"""Evaluators on annotated images: known scores, rules written out, invariances, files, errors."""

import contextlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from evaluation_scenes import (
    CATEGORIES,
    all_evaluators,
    answer,
    make_sample,
    phrase,
    referring,
    run,
    run_all,
)
from PIL import Image
from refusals import refused

import gella.entities.files
import gella.evaluation.evaluators
from gella import evaluation
from gella.commands.score_predictions import Predictions
from gella.data.narratives import load_png
from gella.entities.entity_map import EntityMap, rgb_to_id
from gella.entities.sources import load_from_record
from gella.evaluation import metrics
from gella.evaluation.truth import TruthReader


@pytest.fixture
def samples(tmp_path):
    return [make_sample(tmp_path, image_id) for image_id in (3, 11, 2, 27)]


def test_perfect_answers_score_100(samples):
    results = run_all(samples, [answer(s) for s in samples])
    png, panoptic = results["png"], results["panoptic_seg"]
    assert {png[k] for k in png if k.startswith(("AR", "acc"))} == {100.0}
    counts = {"n": 16, "n_thing": 12, "n_stuff": 4, "n_singular": 8, "n_plural": 8}
    counts |= {"n_ungrounded": 4, "protocol_hard": 1.0, "n_captions": 4}
    assert png.items() >= counts.items()
    assert {panoptic[k] for k in ("PQ", "SQ", "RQ", "SQ_th", "SQ_st", "PQ-sand")} == {100.0}
    assert (panoptic["n"], panoptic["n_th"], panoptic["n_st"]) == (3, 2, 1)
    assert results["entity"]["AP"] == pytest.approx(100.0) and results["entity"]["n"] == 16
    assert results["nouns"]["recall"] == results["nouns"]["precision"] == 100.0
    flat = [value for scores in results.values() for value in scores.values()]
    assert all(isinstance(value, float) for value in flat)
    refer = run(evaluation.ReferringEvaluator(), *referring(samples))["refer"]
    shares = {k: v for k, v in refer.items() if k.split("_")[0] != "n"}
    assert set(shares.values()) == {100.0} and len(shares) == 9
    assert refer["n"] == 4 and refer["n_no_target"] == 1


def test_empty_answers_score_0(samples):
    outputs = [{**answer(s, empty=True), "grounding": []} for s in samples]
    results, inputs = run_all(samples, outputs), referring(samples)[0][:3]
    results |= run(evaluation.ReferringEvaluator(), inputs, outputs[:3])
    for kind, *names in (
        ("png", "AR", "AR_plural", "acc@0.5"),
        ("panoptic_seg", "PQ"),
        ("entity", "AP"),
        ("nouns", "recall", "precision"),
        ("refer", "cIoU", "gIoU", "P@0.5", "T_acc"),
    ):
        assert {results[kind][name] for name in names} == {0.0}
    assert results["png"]["n_without_prediction"] == results["png"]["n"] == 16


def test_a_mask_where_nothing_was_meant_counts(samples):
    inputs, outputs = referring(samples)
    outputs[-1] = answer({**inputs[-1], "phrases": [phrase("the star", [302], thing=True)]})
    refer = run(evaluation.ReferringEvaluator(), inputs, outputs)["refer"]
    assert refer["gIoU"] == 75.0 and refer["N_acc"] == 0.0 and refer["T_acc"] == 100.0
    assert refer["cIoU"] < 100.0, "the mask that nobody asked for enlarges the union"


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_png_baselines_and_oracle(samples, protocol):
    sample = samples[0]
    png = run(evaluation.PNGEvaluator(protocol=protocol), [sample], [answer(sample)])["png"]
    truth, entities = TruthReader()(sample), sample["entities_full"]
    targets = [truth.mask(p["segment_ids"]) for p in sample["phrases"] if p["segment_ids"]]
    areas, image_id = entities.areas(), sample["image_id"]
    picks = [metrics.blind_choices(areas, image_id, k)["random"] for k in range(4)]
    for name, chosen in (
        ("oracle", [[0, 1], [2], [2], [3]]),
        ("largest", [[3]] * 4),
        ("all", [[0, 1, 2, 3]] * 4),
        ("random", picks),
    ):
        pairs = zip(chosen, targets, strict=True)
        ious = [metrics.noun_iou(entities.union(c), t, protocol) for c, t in pairs]
        assert png[f"{name}_AR"] == pytest.approx(100 * float(np.mean(ious)), abs=2e-3)
    assert png["oracle_AR"] < 100, "no union of entities covers the crowd"
    # A perfect mask with soft borders meets itself with less than 1: sum(pp) < sum(2p - pp).
    assert png["AR"] == 100.0 if protocol != "official" else 90 < png["AR"] < 100
    assert png[f"protocol_{protocol}"] == 1.0


def test_official_leaves_out_captions_that_do_not_align(samples):
    samples[1]["phrases"][1]["start"] = samples[1]["phrases"][1]["end"] = -1
    outputs = [answer(s) for s in samples]
    hard = run(evaluation.PNGEvaluator(), samples, outputs)["png"]
    official = run(evaluation.PNGEvaluator(protocol="official"), samples, outputs)["png"]
    assert (hard["n"], official["n"], official["n_captions_left_out"]) == (16, 12, 1)


def test_extracted_nouns_are_matched_by_text(samples):
    sample, output = samples[0], answer(samples[0])
    output["grounding"] = [output["grounding"][k] for k in (3, 1)]
    output["grounding"].append({**output["grounding"][0], "phrase": "grass"})
    png = run(evaluation.PNGEvaluator(), [sample], [output])["png"]
    assert png["n"] == 4 and png["n_without_prediction"] == 2
    assert png["AR"] == pytest.approx(50, abs=1e-9) and png["AR_stuff"] == 100.0
    nouns = run(evaluation.NounExtractionEvaluator(), [sample], [output])["nouns"]
    assert nouns["recall"] == pytest.approx(40) and nouns["precision"] == pytest.approx(200 / 3)


def test_entity_ap_counts_an_image_once_and_ignores_crowd(samples):
    outputs = [answer(s) for s in samples]
    once = run(evaluation.EntityAPEvaluator(), samples, outputs)
    assert run(evaluation.EntityAPEvaluator(), samples * 2, outputs * 2) == once
    instances = outputs[0]["instances"]
    crowd = torch.from_numpy(TruthReader()(samples[0]).mask([303]))[None]
    instances.pred_masks = torch.cat([instances.pred_masks, crowd])
    instances.scores = torch.cat([instances.scores, torch.ones(1)])
    assert run(evaluation.EntityAPEvaluator(), samples, outputs) == once


def through_256(mask):
    """A mask as the benchmark's baseline compares it."""
    soft = torch.from_numpy(mask).double()[None, None]
    for size in ((256, 256), mask.shape):
        soft = torch.nn.functional.interpolate(soft, size, mode="bilinear")
    return soft[0, 0].numpy()


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_average_recall_is_the_literal_sum_and_subsets_add_up(samples, protocol, tmp_path):
    for k, sample in enumerate(samples):
        sample["phrases"][2]["is_plural"] = bool(k % 2)
        sample["phrases"][3]["is_plural"] = k == 1  # stuff, which F-LMM then calls a thing
    outputs = [answer(s, shift=k) for k, s in enumerate(samples)]
    evaluator = evaluation.PNGEvaluator(tmp_path / "out", protocol=protocol)
    png, units = run(evaluator, samples, outputs)["png"], []
    for sample, output in zip(samples, outputs, strict=True):
        truth = TruthReader()(sample)
        for p, entry in zip(sample["phrases"], output["grounding"], strict=True):
            if p["segment_ids"]:
                target, mask = truth.mask(p["segment_ids"]), entry["mask"]
                if protocol == "official":
                    target, mask = through_256(target), through_256(mask)
                both = (mask * target).sum()
                iou = both / ((mask + target * 1.0).sum() - both)
                many = p["is_plural"] if protocol == "flmm" else len(p["segment_ids"]) > 1
                thing = p["is_thing"] or (protocol == "flmm" and many)
                units.append((float(iou), thing, many))
    ious = np.array([unit[0] for unit in units])
    thing, plural = (np.array([unit[k] for unit in units], bool) for k in (1, 2))
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


def test_referring_equals_plain_pixels_with_overlaps_and_empty_targets():
    """Rectangles with whole corners, whose pixels are known."""
    rng = np.random.default_rng(8)
    inputs, outputs, pairs = [], [], []
    for k in range(60):
        boxes = [(*rng.integers(0, (20, 12)), *rng.integers(1, 9, 2)) for _ in range(k % 4)]
        truth, mask = np.zeros((2, 20, 30), bool)
        polygons = []
        for x, y, w, h in boxes:
            truth[y : y + h, x : x + w] = True
            polygons.append([float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)])
        top, left = rng.integers(0, (10, 20))
        mask[top : top + 8, left : left + 9] = k % 5 > 0
        one = phrase("it", [5] if boxes else [], thing=True)
        annotation = {"segments_info": [{"id": 5, "segmentation": polygons}]}
        size = {"image_id": k, "height": 20, "width": 30}
        inputs.append({**size, "caption": "it", "phrases": [one], "annotation": annotation})
        outputs.append({"grounding": [{"mask": mask}]})
        pairs.append(((truth & mask).sum(), (truth | mask).sum()))
    refer = run(evaluation.ReferringEvaluator(), inputs, outputs)["refer"]
    ious = [1.0 if union == 0 else inter / union for inter, union in pairs]
    inters, unions = zip(*pairs, strict=True)
    assert unions.count(0) > 1 and 0.05 < np.mean(ious) < 0.95
    expected = {"cIoU": 100 * sum(inters) / sum(unions), "gIoU": 100 * math.fsum(ious) / 60}
    for t in (0.5, 0.6, 0.7, 0.8, 0.9):
        expected[f"P@{t}"] = 100 * sum(v > t for v in ious) / 60
    assert {k: refer[k] for k in expected} == pytest.approx(expected, abs=1e-9)


def test_entity_ap_is_what_pycocotools_prints_for_the_written_file(samples, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    outputs, annotations = [answer(s, shift=1 + k) for k, s in enumerate(samples)], []
    entity = run(evaluation.EntityAPEvaluator(tmp_path), samples, outputs)["entity"]
    for sample in samples:
        truth = TruthReader()(sample)
        for segment, rle in zip(truth.segments, truth.regions.to_rle(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": sample["image_id"], "category_id": 1}
            entry |= {"segmentation": rle, "iscrowd": segment["iscrowd"], "area": segment["area"]}
            annotations.append({**entry, "bbox": [0, 0, 1, 1]})
    images = [{"id": s["image_id"], "height": 20, "width": 30} for s in samples]
    content = {"images": images, "annotations": annotations, "info": {}}
    content["categories"] = [{"id": 1, "name": "entity"}]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        reference = COCOeval(coco, coco.loadRes(str(tmp_path / "entity_predictions.json")), "segm")
        for step in (reference.evaluate, reference.accumulate, reference.summarize):
            step()
    assert 5 < entity["AP"] < 95
    ours = [entity[name] for name in ("AP", "AP50", "AP75")]
    assert ours == pytest.approx(100 * reference.stats[:3], abs=1e-9)


def test_batches_and_order_change_nothing(samples):
    outputs = [answer(s, shift=k) for k, s in enumerate(samples)]
    single = run_all(samples, outputs)
    assert 0 < single["png"]["AR"] < 100 and 0 < single["panoptic_seg"]["PQ"] < 100
    assert run_all(samples, outputs, batch=2) == single
    assert run_all(samples[::-1], outputs[::-1], batch=3) == single


def test_permuted_entity_ids_change_nothing(samples):
    outputs = [answer(s, shift=1) for s in samples]
    expected = run_all(samples, outputs)
    inputs, renamed = [], []
    for sample, output in zip(samples, outputs, strict=True):
        old = sample["entities_full"]
        order = np.random.default_rng(5).permutation(old.num_entities)
        places = np.zeros(old.num_entities + 1, np.int32)
        places[1 + order] = np.arange(1, old.num_entities + 1)
        ids = [9000 - old.segment_ids[k] % 1000 for k in order]
        inputs.append({**sample, "entities_full": EntityMap(places[old.ids], ids)})
        numbers, infos = output["panoptic_seg"]
        table = {0: 0, **{info["id"]: 50 + k for k, info in enumerate(reversed(infos))}}
        changed = np.vectorize(table.get)(numbers.numpy()).astype(np.int32)
        infos = [{**info, "id": table[info["id"]]} for info in infos[::-1]]
        instances = {k: v.flip(0) for k, v in vars(output["instances"]).items()}
        grounding = [{**g, "entity_ids": [1, 2, 3]} for g in output["grounding"]]
        renamed.append({**output, "panoptic_seg": (torch.from_numpy(changed), infos)})
        renamed[-1].update(instances=SimpleNamespace(**instances), grounding=grounding)
    actual = run_all(inputs, renamed)
    for scores in (expected["png"], actual["png"]):
        for key in [k for k in scores if k.startswith("random_")]:
            del scores[key]  # a blind draw among the entities goes by their order
    assert actual == expected


def test_two_processes_write_what_one_writes_byte_for_byte(samples, monkeypatch, tmp_path):
    """Two evaluators with a share each stand for two processes."""
    plain = samples, [answer(s, shift=k) for k, s in enumerate(samples)]
    comm = gella.evaluation.evaluators.comm

    def made(folder):
        refer = evaluation.ReferringEvaluator(folder), *referring(samples, shift=1)
        return [*((evaluator, *plain) for evaluator in all_evaluators(folder)), refer]

    for alone, first, second in zip(*(made(tmp_path / name) for name in "abb"), strict=True):
        expected = run(*alone)
        for k, (evaluator, inputs, outputs) in enumerate((first, second)):
            evaluator.process(inputs[k::2], outputs[k::2])
        with monkeypatch.context() as patch:
            patch.setattr(comm, "is_main_process", lambda: False)
            patch.setattr(comm, "gather", lambda rows, dst=0: [])
            assert second[0].evaluate() == {}
            patch.setattr(comm, "is_main_process", lambda: True)
            patch.setattr(comm, "gather", lambda rows, dst=0, e=second[0]: [rows, e._rows])
            assert first[0].evaluate() == expected
    one, two = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert len(one) >= 10 and one == two


def test_predictions_are_written_and_can_be_read_back(samples, tmp_path):
    from pycocotools import mask as mask_api

    outputs = [answer(s, shift=1) for s in samples]
    for evaluator in all_evaluators(tmp_path / "out"):
        run(evaluator, samples, outputs)
    png, panoptic, entity = (
        json.loads((tmp_path / "out" / f"{name}_predictions.json").read_text())
        for name in ("png", "panoptic", "entity")
    )
    first = png["predictions"][0]  # image 11 sorts before 2 and 3 as text
    assert first["image_id"] == 11 and png["results"]["png"]["n"] == 16
    decoded = mask_api.decode(first["nouns"][0]["segmentation"]).astype(bool)
    np.testing.assert_array_equal(decoded, outputs[1]["grounding"][0]["mask"])
    name = panoptic["annotations"][0]["file_name"]
    with Image.open(tmp_path / "out" / "panoptic_predictions" / name) as picture:
        ids = rgb_to_id(np.array(picture))
    np.testing.assert_array_equal(ids, outputs[1]["panoptic_seg"][0].numpy())
    assert len(entity) == 16 and set(entity[0]) >= {"image_id", "segmentation", "score"}
    assert not list(tmp_path.rglob("*.tmp"))


def full(path, text):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["full", "folder", "value"])
def test_scores_are_not_lost_with_predictions_that_cannot_be_written(
    samples, tmp_path, monkeypatch, gella_log, kind
):
    outputs, folder = [answer(s, shift=1) for s in samples], tmp_path / "out"
    refer = referring(samples, shift=1)
    expected = run_all(samples, outputs) | run(evaluation.ReferringEvaluator(), *refer)
    if kind == "full":
        for module in (gella.evaluation.evaluators, gella.entities.files):
            name = "write_json" if module is gella.evaluation.evaluators else "write_atomically"
            monkeypatch.setattr(module, name, full)
    elif kind == "folder":
        folder.write_text("a file")
    else:
        for sample in (*samples, *refer[0]):
            sample["image_id"] = complex(sample["image_id"])
        expected = run_all(samples, outputs) | run(evaluation.ReferringEvaluator(), *refer)
    found = {}
    for evaluator in (*all_evaluators(folder), evaluation.ReferringEvaluator(folder)):
        gella_log.clear()
        given = (
            refer if isinstance(evaluator, evaluation.ReferringEvaluator) else (samples, outputs)
        )
        found |= run(evaluator, *given)
        (line,) = gella_log.records
        assert line.levelname == "ERROR" and "\n" not in line.getMessage()
        assert f"predictions in {folder} cannot be written (" in line.getMessage()
    assert found == expected


def test_predictions_stand_in_the_benchmarks_form_too(samples, tmp_path):
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
    sample["phrases"][0].update(start=-1, end=-1)  # not in the caption as written: comes last
    sample["phrases"][3].update(start=starts[2] + 2)  # overlaps the noun before it, too
    run(evaluation.PNGEvaluator(tmp_path), [sample], [answer(sample)])
    (narrative,) = json.loads((tmp_path / "png_form.json").read_text())
    assert [s["utterance"] for s in narrative["segments"][-2:]] == ["circles", "sand"]


def test_saved_predictions_give_every_score_again(samples, tmp_path):
    outputs = [answer(s, shift=k) for k, s in enumerate(samples)]
    # Extracted answers: in another order, and one noun twice, where the order says which is which.
    samples[1]["phrases"][0]["text"] = samples[1]["phrases"][3]["text"] = "stars"
    outputs[1] = answer(samples[1], shift=1)
    outputs[1]["grounding"].pop()
    outputs[0]["grounding"] = outputs[0]["grounding"][::-1]
    kinds = ("png", *["coco_panoptic_seg"] * 2, "noun_extraction")
    for index, evaluator in enumerate(all_evaluators(tmp_path)):
        expected = run(evaluator, samples, outputs)
        (tmp_path / "entity_predictions.json").touch()  # of the third
        if index == 1:
            (tmp_path / "entity_predictions.json").write_text("[]")
        assert run(all_evaluators()[index], *predicted(tmp_path, kinds[index], samples)) == expected
    folder = tmp_path / "refer"
    inputs, outputs = referring(samples, shift=2)
    inputs = [{**one, "expressions": one["phrases"]} for one in inputs]
    expected = run(evaluation.ReferringEvaluator(folder), inputs, outputs)
    for turn in (int, str, "{:012d}".format):  # files of others write ids as they like
        turned = [{**one, "image_id": turn(one["image_id"])} for one in inputs[::-1]]
        again = predicted(folder, "refcoco", turned)[1][::-1]
        assert run(evaluation.ReferringEvaluator(), inputs, again) == expected
    more = [*inputs, {**inputs[0], "image_id": 8}]
    told = "nothing of 1 of 5 records, the first of image 8"
    refused(told, Predictions, folder, "refcoco", more)
    told = "does not exist; evaluate first"
    refused(told, Predictions, folder / "none", "png", [], error=FileNotFoundError)
    refused("predictions are of png, ", Predictions, folder, "own", [])


def predicted(path, kind, samples):
    """Samples, and what a file says of them."""
    predictions = Predictions(path, kind, samples)
    return samples, [predictions.answer(k, sample) for k, sample in enumerate(samples)]


def test_errors_name_the_image(samples, tmp_path):
    sample, output = samples[0], answer(samples[0])
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(sample["annotation"]["file_name"]).read_bytes()[:60])
    missing = str(tmp_path / "none.png")
    unlisted = sample["annotation"]["segments_info"][:-1]
    entities, cut = EntityMap(np.ones((5, 6), np.int32)), answer(sample)
    cut["grounding"][1]["mask"] = cut["grounding"][1]["mask"][:4]
    unknown = [phrase("sand", [5], thing=False)]
    for kind, message, changes in (
        (ValueError, r"segment ids \[5\]", {"phrases": unknown}),
        (KeyError, "no 'annotation'", {"annotation": None}),
        (FileNotFoundError, "annotation .*none.png does not exist", {"file_name": missing}),
        (ValueError, r"the truth has ids \[70000\] in its pixels", {"segments_info": unlisted}),
        (ValueError, "annotation .*masks are 30x20 pixels but the image is 30x10", {"height": 10}),
        (ValueError, "annotation .*broken.png: .*damaged", {"file_name": str(broken)}),
        (ValueError, r"entities of size \(5, 6\)", {"entities_full": entities}),
        (ValueError, r"predicted mask of size \(4, 30\)", {"output": cut}),
    ):
        one = {**sample, **changes}
        if changes.keys() & {"file_name", "segments_info"}:
            one = {**sample, "annotation": {**sample["annotation"], **changes}}
        with pytest.raises(kind, match=f"image 3: {message}"):
            evaluation.PNGEvaluator().process([one], [changes.get("output", output)])
    refused("5 phrases", run, evaluation.ReferringEvaluator(), samples, [output] * 4)


def test_real_narratives_with_crowd_and_void(coco_sample):
    root = coco_sample / "annotations"
    panoptic = root / "panoptic_val2017.json", root / "panoptic_val2017", coco_sample / "val2017"
    records = load_png(root / "png_coco_val2017.json", *panoptic)
    coco = [
        {**r, "entities_full": load_from_record(r), "annotation": r["entities"]} for r in records
    ]
    png = run(evaluation.PNGEvaluator(), coco, [answer(s) for s in coco])["png"]
    assert png["AR"] == png["oracle_AR"] == 100.0 and png["n_captions"] == 4
    assert png["all_AR"] < 60 and png["n_thing"] + png["n_stuff"] == png["n"] > 10
    # The people of the first image's crowd join "a few people": they count, though the crowd is
    # not among the entities.
    coco[0]["phrases"][0]["segment_ids"].append(3153362)
    png = run(evaluation.PNGEvaluator(), coco, [answer(s) for s in coco])["png"]
    assert png["AR"] == 100.0 and 90 < png["oracle_AR"] < 100


def test_detectron2s_panoptic_evaluator_scores_the_same_outputs(tmp_path):
    pytest.importorskip("panopticapi", reason="panopticapi is not importable")
    if not hasattr(pytest.importorskip("detectron2.evaluation"), "COCOPanopticEvaluator"):
        pytest.skip("this Detectron2 is the core, without COCOPanopticEvaluator")
    from gella.data.panoptic import category_metadata

    samples = [make_sample(tmp_path, image_id) for image_id in (3, 11)]
    outputs = [answer(s, shift=1) for s in samples]
    for output in outputs:  # as the model gives them
        for info in output["panoptic_seg"][1]:
            info.update(isthing=info["category_id"] != 9, score=0.5)
    before = [dict(info) for info in outputs[0]["panoptic_seg"][1]]
    ids = [s["image_id"] for s in samples]
    entries = [{**s["annotation"], "image_id": i, "file_name": f"{i}.png"} for s, i in
               zip(samples, ids)]  # fmt: skip
    images = [{"id": i, "file_name": s["file_name"]} for s, i in zip(samples, ids)]
    content = {"images": images, "annotations": entries, "categories": CATEGORIES}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    name = "evaluation_test_detectron2_panoptic"
    paths = {"panoptic_json": str(tmp_path / "panoptic.json"), "panoptic_root": str(tmp_path)}
    MetadataCatalog.get(name).set(**category_metadata(CATEGORIES), **paths)
    try:
        evaluator = evaluation.Detectron2PanopticEvaluator(name, tmp_path / "out")
        theirs = run(evaluator, samples, outputs)["panoptic_seg_detectron2"]
    finally:
        MetadataCatalog.remove(name)
    assert outputs[0]["panoptic_seg"][1] == before
    ours = run(evaluation.PanopticEvaluator(CATEGORIES), samples, outputs)["panoptic_seg"]
    assert 10 < ours["PQ"] < 95
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-9)

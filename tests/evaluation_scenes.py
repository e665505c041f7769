"""Small annotated scenes and the answers of imagined models, for the tests of the evaluators."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from gella import evaluation
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.evaluation.truth import TruthReader

CATEGORIES = [
    {"id": 1, "name": "circle", "isthing": 1},
    {"id": 2, "name": "star", "isthing": 1},
    {"id": 9, "name": "sand", "isthing": 0},
]


def make_sample(folder, image_id):
    """A 20 x 30 scene: two circles, a star, a crowd of stars, sand and a void strip."""
    rng, ids = np.random.default_rng(image_id), np.full((20, 30), 70_000)
    ids[2:8, 2:8], ids[2:8, 12:18], ids[12:18, 2:9], ids[12:16, 20:28] = 300, 301, 302, 303
    ids[:, 29] = 0
    ids = np.roll(ids, int(rng.integers(0, 2)), axis=0)
    path = folder / f"{image_id}.png"
    Image.fromarray(id_to_rgb(ids.astype(np.int32))).save(path)
    kinds = {300: (1, 0), 301: (1, 0), 302: (2, 0), 303: (2, 1), 70_000: (9, 0)}
    segments = [
        {"id": i, "category_id": c, "iscrowd": crowd, "area": int((ids == i).sum())}
        for i, (c, crowd) in kinds.items()
    ]
    entities = EntityMap.from_id_image(ids, [i for i, (_, crowd) in kinds.items() if not crowd])
    named = {"circles": [300, 301], "a star": [302], "stars": [302, 303], "sand": [70_000]}
    return {
        "image_id": image_id,
        "height": 20,
        "width": 30,
        "file_name": f"{image_id}.jpg",
        "caption": "the circles and a star beside stars on sand in a picture",
        "phrases": [
            *(phrase(text, segment_ids, text != "sand") for text, segment_ids in named.items()),
            phrase("picture", [], thing=False),
        ],
        "entities_full": entities,
        "annotation": {"file_name": str(path), "segments_info": segments},
    }


def phrase(text, segment_ids, thing):
    span = {"text": text, "start": 0, "end": len(text), "segment_ids": segment_ids}
    return {**span, "is_thing": thing, "is_plural": len(segment_ids) > 1}


def answer(sample, *, empty=False, shift=0):
    """Output of a model that knows the truth, or says nothing, or is off by some columns."""
    truth, grounding = TruthReader()(sample), []
    for p in sample["phrases"]:
        mask = np.roll(truth.mask([] if empty else p["segment_ids"]), shift, axis=1)
        entry = {"phrase": p["text"], "start": p["start"], "end": p["end"], "mask": mask}
        grounding.append({**entry, "entity_ids": p["segment_ids"], "scores": [0.9] * 3})
    solid = [s for s in truth.segments if not s["iscrowd"]]
    pan = np.where(np.isin(truth.ids, [0 if empty else s["id"] for s in solid]), truth.ids, 0)
    infos = [] if empty else [{"id": s["id"], "category_id": s["category_id"]} for s in solid]
    masks = sample["entities_full"].bitmasks()[: 0 if empty else None]
    masks = np.roll(masks, shift, axis=2)
    return {
        "grounding": grounding,
        "panoptic_seg": (torch.from_numpy(np.roll(pan, shift, axis=1)), infos),
        "instances": SimpleNamespace(
            pred_masks=torch.from_numpy(masks), scores=torch.linspace(1, 0.5, len(masks))
        ),
        "text": "There are five semantic nouns",
    }


def referring(samples, shift=0):
    """One expression per sample; the last has no target, and none is found for it."""
    inputs, outputs = [], []
    for k, sample in enumerate(samples):
        ids = [302] if k < len(samples) - 1 else []
        one = {**sample, "phrases": [{**phrase("the star", ids, thing=True), "sent_id": k}]}
        inputs.append(one)
        outputs.append(answer(one, shift=shift * (k + 1)))
    return inputs, outputs


def run(evaluator, inputs, outputs, batch=1):
    evaluator.reset()
    for k in range(0, len(inputs), batch):
        evaluator.process(inputs[k : k + batch], outputs[k : k + batch])
    return evaluator.evaluate()


def all_evaluators(folder=None):
    return [
        evaluation.PNGEvaluator(folder),
        evaluation.PanopticEvaluator(CATEGORIES, folder),
        evaluation.EntityAPEvaluator(folder),
        evaluation.NounExtractionEvaluator(folder),
    ]


def run_all(inputs, outputs, batch=1):
    results = {}
    for evaluator in all_evaluators():
        results.update(run(evaluator, inputs, outputs, batch))
    return results

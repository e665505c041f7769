"""TEST.COLOR_DRAWS: a noun's probability as the mean over several draws of colours."""

import numpy as np
import pytest
import tiny_gella as tiny
import torch
from detectron2.modeling import build_model
from refusals import refused

from gella.config import load_config
from gella.entities.entity_map import EntityMap
from gella.entities.view import painted, received, to_send
from gella.evaluation.results import settings
from gella.modeling.postprocessing import masks_in_original_frame
from gella.predictor import GellaPredictor

KEY = "TEST.COLOR_DRAWS"
SIZES = ((40, 56, 3), (64, 48, 7))  # height, width and entities: their queries are padded


@pytest.fixture(scope="module")
def model(tokenizer_dir):
    return tiny.make_model(tiny.make_cfg(tokenizer_dir))


@pytest.fixture
def batch_of(tokenizer_dir, tmp_path):
    """Views of two scenes, for a number of draws."""
    records = [
        tiny.make_record(tmp_path, f"scene {n}", size, n, tiny.NOUNS[: n - 1], seed=n)
        for *size, n in SIZES
    ]

    def make(draws, task="ground", is_train=False):
        mapper = tiny.make_mapper(tiny.make_cfg(tokenizer_dir, "entity", KEY, draws), is_train)
        return [mapper(record, task=task) for record in records]

    return make


def single_draws(batch):
    """The same views with each of their draws alone."""
    choices = [[x["colors"], *x["redrawn"]] for x in batch]
    return [
        [{**x, "colormap": painted(x["entities"], c), "redrawn": []} for x, c in zip(batch, colors)]
        for colors in zip(*choices, strict=True)
    ]


def probabilities(outputs):
    """Per image (P, E), of one row of categories for panoptic."""
    found = [[list(g["probabilities"].values()) for g in x["grounding"]] for x in outputs]
    return [np.array(rows) for rows in found]


def sureness(logits):
    """Mean probability inside a drawn mask, mask by mask (Mask2Former's score of masks)."""
    inside = [torch.sigmoid(mask[mask > 0]) for mask in logits]
    return torch.stack([part.mean() if len(part) else torch.zeros(()) for part in inside])


@torch.no_grad()
def test_one_draw_is_the_first_of_several_and_stands_alone(model, batch_of):
    one, four, trained = batch_of(1), batch_of(4), batch_of(4, is_train=True)
    for x, y, z in zip(one, four, trained):
        assert torch.equal(x["colormap"], y["colormap"]) and (x["colors"] == y["colors"]).all()
        assert x["redrawn"] == z["redrawn"] == [] and len(y["redrawn"]) == 3
        assert len({colors.tobytes() for colors in (y["colors"], *y["redrawn"])}) == 4
        back = received(to_send(y))["redrawn"]
        assert all((a == b).all() for a, b in zip(back, y["redrawn"], strict=True))
    # To the last bit what follows from the only output.
    (output,), grid = model.encode(one)
    logits = model.association(
        model.read_answers(one, grid).seg_embeddings, output.query_embeddings
    )
    scores, masks = output.entity_logits[-1].softmax(-1)[..., 0], output.mask_logits[-1]
    for i, (x, found) in enumerate(zip(one, model(one))):
        count = x["entities"].num_entities
        (seen,) = probabilities([found])
        assert (seen == logits[i][:, :count].sigmoid().numpy()).all()
        expected = scores[i, :count] * sureness(masks[i, :count])
        assert tiny.farthest(found["instances"].scores, expected) < 1e-6
        assert tiny.farthest(scores[i, :count], expected) > 1e-3


@torch.no_grad()
def test_several_draws_give_the_mean_of_the_single_ones(model, batch_of):
    batch = batch_of(4)
    passes = {"image_encoder": 0, "colormap_encoder": 0, "mask_decoder": 0, "language_decoder": 0}
    hooks = []
    for name in passes:
        count = lambda *_, name=name: passes.update({name: passes[name] + 1})  # noqa: E731
        hooks.append(getattr(model, name).register_forward_hook(count))
    together = model(batch)
    for hook in hooks:
        hook.remove()
    assert list(passes.values()) == [1, 4, 4, 1]
    singles = single_draws(batch)
    alone = [model(views) for views in singles]
    expected = [np.mean(draws, axis=0) for draws in zip(*map(probabilities, alone))]
    outputs = [model.encode(views)[0][0] for views in singles]
    scores = torch.stack([output.entity_logits[-1].softmax(-1)[..., 0] for output in outputs])
    logits = torch.stack([output.mask_logits[-1] for output in outputs]).mean(0)
    for i, (x, found) in enumerate(zip(batch, together)):
        (seen,) = probabilities([found])
        assert np.abs(seen - expected[i]).max() < 1e-6
        assert np.abs(seen - probabilities(alone[0])[i]).max() > 1e-4  # so it tests something
        mean = logits[i, : x["entities"].num_entities]
        ranks = scores.mean(0)[i, : len(mean)] * sureness(mean)
        assert tiny.farthest(found["instances"].scores, ranks) < 1e-6
        frame = (96, 96), x["valid_size"], x["height"], x["width"]
        masks = torch.stack(list(masks_in_original_frame(mean, *frame)))
        assert torch.equal(found["instances"].pred_masks, masks)
        tiny.same_result(model([x])[0], found)
    panoptic = [x["panoptic_seg"] for x in model(batch_of(4, "panoptic"))]
    assert all(ids.any() and segments for ids, segments in panoptic)


def test_the_order_of_the_masks_does_not_matter(model, tokenizer_dir):
    predictor = GellaPredictor(tiny.make_cfg(tokenizer_dir, "entity", KEY, 3), model=model)
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    masks, answers = tiny.make_entities(40, 56, 6).bitmasks(), []
    for order in ([0, 1, 2, 3, 4, 5], [4, 2, 5, 1, 0, 3]):
        scene = predictor.encode(image, EntityMap.from_masks(masks[order]))
        assert len(scene.encoded.query_embeddings) == 3
        answers.append(predictor.ground("A star on the sand.", ["A star", "the sand"], scene=scene))
    for one, other in zip(*(answer.phrases for answer in answers), strict=True):
        assert (one["mask"] == other["mask"]).all() and one["scores"] == other["scores"]


def test_a_number_that_cannot_be_is_refused(tokenizer_dir):
    told = "COLOR_DRAWS is {} and MODEL.MASK_DECODER.QUERIES is '{}': draw once"
    for draws, queries in ((0, "entity"), (-1, "learned"), (2, "learned")):
        cfg = tiny.make_cfg(tokenizer_dir, queries, KEY, draws)
        refused(told.format(draws, queries), build_model, cfg)
    location = ("INPUT.GELLA.COLORS", "location")
    cfg = tiny.make_cfg(tokenizer_dir, "entity", KEY, 2, *location)
    refused("COLOR_DRAWS is 2 and INPUT.GELLA.COLORS is 'location', whose draws", build_model, cfg)
    build_model(tiny.make_cfg(tokenizer_dir, "entity", KEY, 1, *location))
    for value in (2.5, True, "'four'"):
        refused("config override: .*COLOR_DRAWS", load_config, tiny.TINY, [KEY, value])
    assert settings(tiny.make_cfg(tokenizer_dir, "entity", KEY, 4))["color_draws"] == 4

"""Unusual scenes and captions, through the predictor and through mapper and model."""

import json
import logging

import numpy as np
import pytest
import tiny_gella as tiny
import torch
from refusals import refused

from gella.entities.entity_map import EntityMap
from gella.evaluation import PNGEvaluator
from gella.predictor import GellaPredictor
from gella.text import prompts

MANY = [tiny.NOUNS[i % len(tiny.NOUNS)] for i in range(60)]


@pytest.fixture(scope="module", params=tiny.QUERIES)
def predictor(request, tokenizer_dir):
    """A predictor with each kind of queries; tests leave its model in evaluation mode."""
    cfg = tiny.make_cfg(tokenizer_dir, request.param)
    return GellaPredictor(cfg, model=tiny.make_model(cfg))


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def train(model, batch):
    model.train().zero_grad()
    try:
        losses = model(batch)
        sum(losses.values()).backward()
    finally:
        model.eval()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(loss.isfinite() for loss in losses.values())
    return {name: float(loss.detach()) for name, loss in losses.items()}


def check(result, entities, nouns):
    """A complete answer: every noun, known ids, probabilities, a mask of the picture's size."""
    assert [phrase["phrase"] for phrase in result.phrases] == nouns
    for phrase in result.phrases:
        assert phrase["mask"].shape == entities.size and phrase["mask"].dtype == bool
        assert len(phrase["entity_ids"]) == len(phrase["scores"]) > 0
        assert np.isfinite(phrase["scores"]).all()
        known = [i for i in phrase["entity_ids"] if i in entities.segment_ids]
        if known == phrase["entity_ids"]:  # snapped to input entities: their own masks
            union = entities.union(entities.index_of(i) for i in known)
            assert np.array_equal(phrase["mask"], union)
    json.dumps(result.to_json())
    assert result.plot().width > 0


def walk(predictor, folder, entities, nouns):
    """A scene through predictor and training: its training view, losses, and test view."""
    predictor.set_image(picture(*entities.size), entities)
    check(predictor.ground(tiny.make_caption(nouns)[0], nouns), entities, nouns)
    record = tiny.make_record(folder, "scene", entities.size, entities, nouns)
    mapped = tiny.make_mapper(predictor.cfg, is_train=True)(record, task="ground", rng_seed=(0,))
    assert mapped["entities"].num_entities == entities.num_entities
    losses = train(predictor.model, [mapped])
    return mapped, losses, tiny.make_mapper(predictor.cfg, is_train=False)(record, task="ground")


@pytest.mark.parametrize("count", [1, 300])
def test_one_and_300_entities(predictor, tmp_path, caplog, count):
    entities, queries = tiny.make_entities(120, 90, count), predictor.model.mask_decoder.queries
    with caplog.at_level(logging.WARNING):
        _, losses, view = walk(predictor, tmp_path, entities, list(tiny.NOUNS[:3]))
        assert predictor.panoptic(["circle", "sand"]).ids.shape == (120, 90)
    assert losses["loss_association"] > 0
    # 8 learned queries can find 8 of 300 entities: said once, with both numbers and what to do.
    said = [r.getMessage() for r in caplog.records if "NUM_QUERIES" in r.getMessage()]
    assert len(said) == (queries == "learned" and count == 300)
    for text in said:
        assert all(w in text for w in ("300 entities", "NUM_QUERIES is 8", "QUERIES to entity"))
    if queries == "entity":
        assert len(predictor.model([view])[0]["instances"]) == count


def test_no_entity_is_an_error_for_users_but_not_for_the_model(predictor, tmp_path):
    none, model = EntityMap(np.zeros((20, 30), np.int32)), predictor.model
    refused("no entity at all", predictor.set_image, picture(20, 30), none)
    in_training, mapper = (tiny.make_mapper(predictor.cfg, is_train) for is_train in (True, False))
    record = tiny.make_record(tmp_path, "none", (20, 30), 0, tiny.NOUNS[:2])
    told = r"image none.*none_ids\.png.*no entity"
    refused(told, in_training, record, task="ground", rng_seed=(0,))
    # Such a view beside another changes nothing for that one, and has an answer of its own.
    full = tiny.make_record(tmp_path, "some", (20, 30), 5, tiny.NOUNS[:3])
    for task in ("ground", "panoptic"):
        view = mapper(full, task=task)
        empty = tiny.without_entities(view)
        first, second = model([empty, view])
        tiny.same_result(model([view])[0], second)
        tiny.same_result(model([empty])[0], first)
        if model.mask_decoder.queries == "entity":
            found = first.get("grounding", [])
            assert [g["entity_ids"] for g in found] == [[]] * (3 if task == "ground" else 0)
            assert not any(g["mask"].any() for g in found) and len(first["instances"]) == 0
            if task == "panoptic":
                assert not first["panoptic_seg"][0].any() and first["panoptic_seg"][1] == []
    view = in_training(full, task="ground", rng_seed=(0,))
    for batch in ([tiny.without_entities(view)], [tiny.without_entities(view), view]):
        losses = train(model, batch)
        assert losses["loss_answer"] > 0 and (losses["loss_mask"] == 0) == (len(batch) == 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (160, 40), (2, 700)])
def test_sizes_and_shapes(predictor, tmp_path, size):
    entities = tiny.make_entities(*size, min(3, size[0] * size[1]))
    mapped, _, _ = walk(predictor, tmp_path, entities, list(tiny.NOUNS[:2]))
    height, width = mapped["valid_size"]
    assert max(height, width) == 96
    assert min(height, width) == max(1, round(96 * min(size) / max(size)))


def test_an_entity_of_one_pixel_and_one_that_is_everything(predictor, tmp_path):
    ids = np.ones((300, 400), np.int32)
    whole = EntityMap(ids.copy(), [5])
    ids[123, 321] = 2  # of 12,000 pixels the colormap shows every twelfth
    speck = EntityMap(ids, [5, 9])
    for entities in (whole, speck):
        mapped, _, view = walk(predictor, tmp_path, entities, ["the speck"])
    assert mapped["entities"].areas()[1] == 0  # gone from the colormap, not from the answer
    if predictor.model.mask_decoder.queries == "entity":
        (result,) = predictor.model([view])
        assert len(result["instances"]) == 2
        shown = {i for g in result["grounding"] for i in g["entity_ids"]}
        assert shown <= {5, 9}


def test_no_noun_is_an_error_but_not_in_an_answer(predictor, tmp_path, monkeypatch):
    predictor.set_image(picture(20, 30), tiny.make_entities(20, 30, 4))
    refused('caption without nouns: "It rains"', predictor.ground, "It rains", [])
    record = tiny.make_record(tmp_path, "scene", (20, 30), 4, tiny.NOUNS[:2])
    rainy = {**record, "caption": "It rains", "phrases": []}
    told = "image scene.*the caption has no noun: 'It rains'"
    refused(told, tiny.make_mapper(predictor.cfg, True), rainy, task="ground")
    # A model that names nothing: the answer is text, and the grounding empty.
    said = predictor.model.tokenizer("It rains.", add_special_tokens=False)["input_ids"]
    generate = lambda grid, ids, **options: [torch.tensor(said)] * len(ids)  # noqa: E731
    monkeypatch.setattr(predictor.model.language_decoder, "generate", generate)
    mapper = tiny.make_mapper(predictor.cfg, is_train=False)
    batch = [mapper(record, task=task) for task in ("extract", "ground")]
    silent, other = predictor.model(batch)
    assert silent["text"] == "It rains." and silent["grounding"] == []
    assert len(other["grounding"]) == 2 and predictor.model(batch[:1])[0]["grounding"] == []


def test_60_nouns_take_one_pass_and_logits_of_the_answer_only(predictor, tmp_path):
    entities, passes, rows = tiny.make_entities(60, 80, 12), [], []
    mapped, losses, _ = walk(predictor, tmp_path, entities, MANY)
    assert len(mapped["seg_positions"]) == len(mapped["phrases"]) == 60
    assert losses["loss_association"] > 0
    llama, note = predictor.model.language_decoder.llama, lambda *args: rows.append(len(args[1][0]))
    handles = (
        llama.get_output_embeddings().register_forward_pre_hook(note),
        (
            llama.base_model.register_forward_pre_hook(
                lambda *args: passes.append(args[2]["inputs_embeds"].shape), with_kwargs=True
            )
        ),
    )
    for nouns in (MANY[:1], MANY):
        check(predictor.ground(tiny.make_caption(MANY)[0], nouns), entities, nouns)
    for handle in handles:
        handle.remove()
    assert len(passes) == 2 and all(shape[0] == 1 for shape in passes)
    answer = " " + prompts.noun_answer(MANY)
    ids = predictor.model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert rows[1] <= len(ids) + 1 < passes[1][1]


def test_equal_nouns_are_nouns_of_their_own(predictor):
    entities = tiny.make_entities(60, 80, 6)
    predictor.set_image(picture(60, 80), entities)
    nouns = ["the star", "the star", "a lamp", "the star"]
    caption = tiny.make_caption(nouns)[0]
    result = predictor.ground(caption, nouns)
    check(result, entities, nouns)
    starts = [phrase["start"] for phrase in result.phrases]
    assert starts == sorted(set(starts)) and starts[0] >= 0
    assert all(caption[p["start"] : p["end"]] == p["phrase"] for p in result.phrases)
    scores = [phrase["scores"][0] for phrase in result.phrases]
    assert len({scores[0], scores[1], scores[3]}) == 3  # each has its own <SEG>


def short_predictor(tokenizer_dir, policy):
    options = ("MODEL.LANGUAGE.MAX_POSITIONS", 400, "INPUT.GELLA.OVERLONG_CAPTION", policy)
    cfg = tiny.make_cfg(tokenizer_dir, "entity", *options)
    predictor = GellaPredictor(cfg, model=tiny.make_model(cfg))
    predictor.set_image(picture(60, 80), tiny.make_entities(60, 80, 12))
    return predictor


@pytest.fixture(scope="module")
def short(tokenizer_dir):
    return short_predictor(tokenizer_dir, "cut")


@pytest.fixture(scope="module")
def long_record(tmp_path_factory):
    return tiny.make_record(tmp_path_factory.mktemp("long"), "scene", (60, 80), 12, MANY)


def answer_of(mapped, tokenizer):
    answer = mapped["labels"][mapped["labels"] != prompts.IGNORE_INDEX]
    return prompts.decode_answer(tokenizer, answer.tolist())


def test_too_long_a_caption_is_an_error_with_both_numbers(tokenizer_dir, long_record):
    predictor, caption = short_predictor(tokenizer_dir, "error"), long_record["caption"]
    told = r"image scene.*has \d{3,4} tokens.*at most 400 fit"
    for is_train, task in ((True, "ground"), (False, "ground"), (True, "describe")):
        mapper = tiny.make_mapper(predictor.cfg, is_train)
        refused(told, mapper, long_record, task=task, rng_seed=(0,))
    told = r"has \d{4} tokens.*at most 400 fit.*MAX_POSITIONS"
    refused(told, predictor.ground, caption, MANY)
    # One token is kept for an answer that is to be generated.
    told = r"has \d{3} tokens.*at most 399 fit, with one left for"
    refused(told, predictor.extract_nouns, caption)
    told = "OVERLONG_CAPTION is 'shorten'.*'error', 'cut'"
    refused(told, tiny.make_mapper, predictor.cfg, is_train=True, overlong="shorten")


@pytest.mark.parametrize("task", ["ground", "extract"])
def test_a_caption_is_cut_behind_the_last_fitting_noun(short, long_record, tmp_path, caplog, task):
    record, mapper = long_record, tiny.make_mapper(short.cfg, is_train=True)
    with caplog.at_level(logging.WARNING):
        mapped = mapper(record, task=task, rng_seed=(0,))
    kept = len(mapped["phrases"])
    assert 3 < kept < 60 and mapped["num_cut"] == 60 - kept and len(mapped["input_ids"]) <= 400
    assert len(mapped["seg_positions"]) == kept
    assert mapped["caption"] == record["caption"][: record["phrases"][kept - 1]["end"]]
    assert mapped["caption"].endswith(MANY[kept - 1])
    assert prompts.parse_nouns(answer_of(mapped, mapper.tokenizer)) == MANY[:kept]
    asked = prompts.decode_answer(mapper.tokenizer, mapped["input_ids"].tolist())
    assert f"{mapped['caption']} ASSISTANT:" in asked
    assert f"{60 - kept} of its nouns left out" in caplog.text and "image scene" in caplog.text
    # One noun more would not have fitted, but for the phrasings, which differ by a few tokens.
    end = record["phrases"][kept]["end"]
    asked, answer = prompts.task_text(task, record["caption"][:end], MANY[: kept + 1])
    limits = {"num_image_tokens": 36, "system": "", "max_length": 9999}
    assert len(prompts.build_prompt(mapper.tokenizer, asked, answer, **limits).input_ids) > 388
    assert train(short.model, [mapped])["loss_association"] > 0
    whole = tiny.make_record(tmp_path, "short", (60, 80), 12, MANY[:3])
    mapped = mapper(whole, task=task, rng_seed=(0,))
    assert mapped["caption"] == whole["caption"] and mapped["num_cut"] == 0


def test_cut_nouns_are_counted_and_logged_at_the_1st_2nd_4th(short, long_record, caplog):
    mapper = tiny.make_mapper(short.cfg, is_train=True)
    with caplog.at_level(logging.WARNING):
        cut = [mapper(long_record, task="ground", rng_seed=(i,))["num_cut"] for i in range(6)]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 3
    for line, captions in zip(said, (1, 2, 4)):
        assert f"so far {sum(cut[:captions])} nouns of {captions} captions" in line


def test_evaluation_scores_cut_nouns_as_not_found(short, long_record):
    named = {"segment_ids": long_record["phrases"][0]["segment_ids"]}
    record = {**long_record, "phrases": [{**p, **named} for p in long_record["phrases"]]}
    mapped = tiny.make_mapper(short.cfg, is_train=False)(record, task="ground")
    kept = len(mapped["seg_positions"])
    assert len(mapped["phrases"]) == 60 and mapped["num_cut"] == 60 - kept > 0
    (output,) = short.model([mapped])
    assert [g["phrase"] for g in output["grounding"]] == MANY[:kept]
    evaluator = PNGEvaluator()
    evaluator.process([mapped], [output])
    assert evaluator.evaluate()["png"]["n_without_prediction"] == 60 - kept


def test_the_predictor_lists_the_nouns_that_it_cut(short, caplog):
    caption = tiny.make_caption(MANY)[0]
    with caplog.at_level(logging.WARNING):
        result = short.ground(caption, MANY)
    kept = len(result.phrases)
    check(result, tiny.make_entities(60, 80, 12), MANY[:kept])
    assert result.cut_nouns == result.to_json()["cut_nouns"] == MANY[kept:] != []
    assert f"{60 - kept} nouns left out" in caplog.text
    assert short.ground(tiny.make_caption(MANY[:2])[0], MANY[:2]).cut_nouns == []
    refused("at most 400 fit", short.refer, caption)  # is one noun
    refused("at most 400 fit", short.panoptic, [f"category {i}" for i in range(60)])

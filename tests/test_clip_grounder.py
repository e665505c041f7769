"""The zero-shot grounder: features equal transformers' own, and everything around it unchanged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare_shapes
import pytest
import torch
import torch.nn.functional as F
from dataset_scripts import places, registered
from detectron2.data import DatasetCatalog
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_clip import CONFIG, SIDE, evaluate, save_clip, sizes, train_clip
from tiny_gella import farthest, make_entities

from gella import GellaPredictor, load_config
from gella.commands import demo
from gella.data.register import register_panoptic, register_png, register_refcoco
from gella.entities.entity_map import EntityMap
from gella.text import words

ROOT = Path(__file__).resolve().parents[1]
NOUNS = ["a red circle", "two stars", "the sand", "a lamp"]
CAPTION = "A red circle and two stars lie on the sand."
SMALL = sizes(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def clip(folder):
    return save_clip(folder)


def predictor_of(folder, *opts):
    options = ["MODEL.CLIP.NAME", str(folder), *SMALL, *opts]
    return GellaPredictor.from_config(CONFIG, opts=options)


@pytest.fixture(scope="module")
def predictor(clip, folder):
    return predictor_of(folder)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def pixels_of(predictor, picture):
    image = torch.from_numpy(picture).permute(2, 0, 1)
    return (image - predictor.model.pixel_mean) / predictor.model.pixel_std


def unit(features):
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def test_whole_pictures_and_texts_have_the_library_s_features(clip, predictor, picture):
    scene = predictor.encode(picture, np.ones((1, 32, 32), bool))
    with torch.no_grad():
        own = unit(clip.get_image_features(pixels_of(predictor, picture)[None]))
        assert farthest(scene.encoded.crops, own) < 1e-5
        texts = [f"a photo of {noun}." for noun in NOUNS] + ["a photo of " + "very " * 30 + "much."]
        limits = {"padding": True, "truncation": True, "return_tensors": "pt"}
        own = unit(clip.get_text_features(**predictor.model.tokenizer(texts, **limits)))
        assert farthest(predictor.model.text_features(texts), own) < 1e-5


def test_the_grid_is_pooled_by_each_entity_s_share_of_the_patches(clip, predictor, picture):
    entities = make_entities(32, 32, 5)
    scene = predictor.encode(picture, entities)
    pixels, last = pixels_of(predictor, picture)[None], clip.vision_model.encoder.layers[-1]
    inputs = []
    with torch.no_grad(), last.register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        clip.get_image_features(pixels)
        attention = last.self_attn  # that of a patch to itself alone is its value
        alone = torch.full((17, 17), -torch.inf).fill_diagonal_(0)[None, None]
        values = attention(last.layer_norm1(inputs[0]), attention_mask=alone)[0][0, 1:]
        features = clip.visual_projection(clip.vision_model.post_layernorm(values))
    ordered = entities.canonical()
    for number, pooled in enumerate(scene.encoded.pooled):
        cells = ordered.union([number]).reshape(4, 8, 4, 8).sum((1, 3)).reshape(-1)
        expected = sum(int(n) * f for n, f in zip(cells, features)) / int(cells.sum())
        assert farthest(pooled, unit(expected)) < 1e-5


def test_a_crop_shows_the_entity_and_little_around(predictor):
    model = predictor.model
    picture, inside = torch.zeros(3, 20, 40), torch.zeros(1, 20, 40)
    inside[:, 4:12, 30:40], picture[:, 4:12, 30:40], picture[:, :, :20] = 1, 1, 9
    crop = model.crop(picture, inside)
    assert crop.shape == (3, 32, 32) and crop.max() < 1.2 and crop[:, 16, 16].min() > 0.99
    assert 0 <= crop[:, 1].abs().max() < 0.5  # what is not of it is dim
    assert not model.crop(picture, inside * 0).any()
    wide = model.crop(picture, torch.ones(1, 20, 40))  # whole, and nothing above and below
    assert wide[:, 16, 2].min() > 8 and wide[:, :4].abs().max() < 6
    ids = np.zeros((32, 32), np.int32)
    ids[4:9, 4:9] = 1
    scene = predictor.encode(np.zeros((32, 32, 3), np.uint8), EntityMap(ids, [3, 8]))
    lengths = [x.norm(dim=-1).round().tolist() for x in (scene.encoded.crops, scene.encoded.pooled)]
    assert lengths == [[0, 1]] * 2  # canonical: the one without a pixel comes first


def test_forty_nouns_in_one_pass_are_forty_passes(predictor, picture):
    predictor.set_image(picture, make_entities(32, 32, 7))
    nouns = [f"{number} {noun}" for number in range(10) for noun in NOUNS]
    together = predictor.ground(" and ".join(nouns), nouns)
    for noun, phrase in zip(nouns, together.phrases, strict=True):
        alone = predictor.ground(noun, [noun]).phrases[0]
        assert alone["entity_ids"] == phrase["entity_ids"]
        values = [list(x["probabilities"].values()) for x in (alone, phrase)]
        assert farthest(*values) < 1e-4 and max(values[1]) == 1


def test_scores_are_shares_of_the_softmax_and_the_number_of_a_noun_counts(predictor, picture):
    scene = predictor.set_image(picture, make_entities(32, 32, 6))
    model, encoded = predictor.model, scene.encoded
    texts = model.text_features(["a photo of stars.", "a photo of a star."])
    cosines = texts @ (0.5 * encoded.crops + 0.5 * encoded.pooled).T
    shares = (model.logit_scale.exp() * cosines).softmax(1)
    shares = shares / shares.amax(1, keepdim=True)
    plural, single = predictor.ground("stars and a star", ["stars", "a star"]).phrases
    assert farthest(list(plural["probabilities"].values()), shares[0]) < 1e-4
    assert len(single["entity_ids"]) == 1
    assert len(plural["entity_ids"]) == int((shares[0] > 0.5).sum())
    every = predictor.ground("stars", ["stars"], threshold=0.0).phrases[0]["entity_ids"]
    assert len(every) == 6
    exclusive = predictor.ground("stars and a star", ["stars", "a star"], exclusive=True).phrases
    assert not set(exclusive[0]["entity_ids"]) & set(exclusive[1]["entity_ids"])
    assert len(predictor.refer("the left star").phrases[0]["entity_ids"]) == 1
    texts = model.text_features(["a photo of a star.", "a photo of an apple."])
    classes = (model.logit_scale.exp() * texts @ (encoded.crops + encoded.pooled).T / 2).softmax(0)
    found = predictor.panoptic(["star", "apple"]).segments_info
    assert sorted(s["score"] for s in found) == pytest.approx(sorted(classes.amax(0).tolist()))


def spacy_of(*chunks):
    """A stand-in for spaCy, whose sentences have these (word, kind) for noun chunks."""

    def analyse(text):
        found = [(text.index(word), word, kind) for word, kind in chunks]
        made = [
            SimpleNamespace(
                text=word,
                start_char=start,
                end_char=start + len(word),
                root=SimpleNamespace(pos_=kind),
            )
            for start, word, kind in found
        ]
        return SimpleNamespace(noun_chunks=made)

    def load(name):
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model '{name}'")
        return analyse

    return SimpleNamespace(load=load)


def test_nouns_come_from_a_chunker_that_is_needed_for_nothing_else(
    predictor, picture, monkeypatch, folder
):
    words._spacy.cache_clear()
    predictor.set_image(picture, make_entities(32, 32, 3))
    monkeypatch.setitem(sys.modules, "spacy", None)
    install = r"pip install 'gella\[chunker\]' && python -m spacy download en_core_web_sm"
    refused(install, predictor.ground, CAPTION, error=ImportError)
    assert len(predictor.ground(CAPTION, NOUNS[:2]).phrases) == 2
    chunks = [("A red circle", "NOUN"), ("two stars", "NOUN"), ("the sand", "NOUN")]
    monkeypatch.setitem(sys.modules, "spacy", spacy_of(*chunks, ("lie", "PRON")))
    assert predictor.extract_nouns(CAPTION) == [word for word, _ in chunks]
    spans = [(p["start"], p["end"]) for p in predictor.ground(CAPTION).phrases]
    assert spans == [(0, 12), (17, 26), (34, 42)]
    other = predictor_of(folder, "MODEL.CLIP.CHUNKER", "de_core_news_sm")
    other.set_image(picture, make_entities(32, 32, 3))
    told = "no pipeline de_core_news_sm .*python -m spacy download de_core_news_sm"
    refused(told, other.ground, CAPTION, error=ImportError)
    monkeypatch.setitem(sys.modules, "spacy", spacy_of())
    words._spacy.cache_clear()
    refused("caption without nouns", predictor.ground, CAPTION)
    refused("describes no picture; give captions", predictor.describe)
    words._spacy.cache_clear()


def test_the_demo_runs_as_with_any_model(clip, folder, tmp_path, capsys):
    scene = ROOT / "examples" / "shapes" / "000000500016.png"
    command = ["--config-file", CONFIG, "--input", str(scene), "--output", str(tmp_path)]
    command += ["--caption", "Three purple rings on the sand.", "--nouns", "purple rings,the sand"]
    options = ["MODEL.CLIP.NAME", str(folder), *map(str, SMALL)]
    assert demo.main([*command, "--opts", *options]) == 0, capsys.readouterr().err
    assert "untrained" not in capsys.readouterr().out
    content = json.loads((tmp_path / "000000500016.json").read_text())
    assert [noun["noun"] for noun in content["nouns"]] == ["purple rings", "the sand"]
    assert content["weights"] == str(folder)
    assert "purple rings" in (tmp_path / "index.html").read_text()


def test_an_evaluation_gives_ar_ciou_and_pq(clip, folder, small_shapes, tmp_path, closed_logs):
    where, notes = places(small_shapes, "val"), small_shapes / "annotations"
    refs = (small_shapes / "refcoco", "unc", "val", small_shapes / "val")
    with (
        registered(register_png, png_json=notes / "png_shapes_val.json", **where) as png,
        registered(register_panoptic, **where) as panoptic,
        registered(register_refcoco, *refs) as refcoco,
    ):
        results = evaluate(folder, tmp_path, [png, panoptic, refcoco], 32)
    assert results["png"]["n"] > 0 and results["refer"]["n"] > 0
    for task, metric in (("png", "AR"), ("refer", "cIoU"), ("panoptic_seg", "PQ")):
        assert 0 <= results[task][metric] <= 100
    assert results["entity"]["AP"] == pytest.approx(100)  # the input's own masks
    assert results["run"]["weights"] == str(folder) and results["run"]["weights_sha256"]


def test_a_clip_trained_on_crops_of_other_scenes_beats_the_blind_by_far(tmp_path, closed_logs):
    shapes, folder = tmp_path / "shapes", tmp_path / "clip"
    prepare_shapes.prepare(shapes, {"train": 200, "val": 40}, workers=1)

    def narrated(split):
        narratives = shapes / "annotations" / f"png_shapes_{split}.json"
        return registered(register_png, png_json=narratives, **places(shapes, split))

    with narrated("train") as png:
        train_clip(folder, DatasetCatalog.get(png), steps=250)
    with narrated("val") as png:
        scores = evaluate(folder, tmp_path, [png], SIDE)["png"]
    blind = [scores[f"{name}_AR"] for name in ("random", "largest", "all")]
    # Seeds 0, 1 and 2 gave 56, 60 and 58; with nouns or crops exchanged in training 11 and 12.
    assert max(blind) < 15 and min(scores["AR"], scores["AR_thing"]) > 38


def test_errors(clip, folder, tmp_path, monkeypatch, picture):
    build = GellaPredictor.from_config
    keys = ["MODEL.CLIP.NAME", ""]
    refused("no config.json in MODEL.WEIGHTS '': set MODEL.CLIP.NAME", build, CONFIG, opts=keys)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError):
        build(CONFIG, opts=["MODEL.CLIP.NAME", "nobody/clip"])
    keys = ["MODEL.CLIP.NAME", str(folder), "MODEL.CLIP.TEMPLATE", "a photo"]
    refused("'a photo' has no {} for the noun", build, CONFIG, opts=keys)
    keys = ["MODEL.CLIP.NAME", str(folder), "TEST.COLOR_DRAWS", "4"]
    refused("COLOR_DRAWS is 4, but ClipGrounder looks at no colours", build, CONFIG, opts=keys)
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    refused("type 'llama', not 'clip'", build, CONFIG, opts=["MODEL.CLIP.NAME", str(other)])
    damaged = tmp_path / "damaged"
    save_clip(damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(48)[None]  # as older files have
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    predictor = build(CONFIG, str(damaged), opts=SMALL)  # instead of MODEL.CLIP.NAME
    assert predictor.cfg.MODEL.LANGUAGE.TOKENIZER == str(damaged)
    weights["more"] = weights.pop("visual_projection.weight")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    refused("1 missing: visual_projection.weight; 1 unexpected: more", build, CONFIG, str(damaged))
    with pytest.raises(RuntimeError, match="is not trained: use it with --eval-only"):
        predictor.model.train()([])
    assert load_config(CONFIG).MODEL.CLIP.NAME == "openai/clip-vit-base-patch16"

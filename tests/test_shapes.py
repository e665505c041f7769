"""Synthetic shapes: scenes, what is written about them, and the preparation of the files."""

import filecmp
import json
import re
from collections import Counter
from operator import attrgetter

import numpy as np
import prepare_shapes
import pytest
import shapes
import shapes_text
from pycocotools import mask as coco_mask
from refusals import refused
from score_descriptions import score_text
from shapes_scene import COLOURS, HELD_OUT_PAIRS, KINDS, STUFF, TEXTURES, draw_scene

from gella.text.prompts import load_tokenizer

SAMPLES = 40


@pytest.fixture(scope="module")
def samples():
    return {
        split: [shapes.make_sample(3, split, i) for i in range(SAMPLES)] for split in shapes.SPLITS
    }


@pytest.fixture(scope="module")
def everything(samples):
    return samples["train"] + samples["val"]


def named_by(phrase, scene):
    """Indices that a phrase names, read from its words alone, without the code under test."""
    words, side = phrase.lower().split(), None
    if len(words) > 3 and words[-3] in ("on", "at") and words[-2] == "the":
        side, words = words[-1], words[:-3]
    kinds = {k: k for k in KINDS} | {shapes_text.kind_plural(k): k for k in KINDS}
    regions = {
        form.split()[-1]: kind for kind, forms in shapes_text.STUFF_NOUNS.items() for form in forms
    }
    if words[-1] in regions:
        return {len(scene.things) + scene.stuff.index(regions[words[-1]])}
    chosen = set(range(len(scene.things)))
    for word in words:
        for attribute, values in (("colour", COLOURS), ("texture", TEXTURES)):
            if word in values:
                chosen = {i for i in chosen if getattr(scene.things[i], attribute) == word}
        if word in kinds:
            chosen = {i for i in chosen if scene.things[i].kind == kinds[word]}
        if word in ("small", "large"):
            large = {i for i in chosen if 2 * scene.things[i].radius > 21.5}  # between the classes
            chosen = large if word == "large" else chosen - large
    for word in set(words) & set(shapes_text.COUNT_WORDS):
        assert len(chosen) == shapes_text.COUNT_WORDS.index(word), phrase
    if side:
        axis = "cx" if side in ("left", "right") else "cy"
        pick = min if side in ("left", "top") else max
        chosen = {pick(chosen, key=lambda i: getattr(scene.things[i], axis))}
    return chosen


def test_scenes_are_covered_and_everything_is_visible(everything):
    for sample in everything:
        scene = sample.scene
        assert scene.image.dtype == np.uint8 and scene.image.shape == (96, 96, 3)
        counts = np.bincount(scene.ids.ravel(), minlength=len(sample.segment_ids) + 1)
        assert counts[0] == 0
        things, regions = np.split(counts[1:], [len(scene.things)])
        assert 3 <= len(things) <= 9 and things.min() >= 60
        assert 2 <= len(regions) <= 3 and regions.min() >= 150
        assert len(set(scene.stuff)) == len(scene.stuff)


def test_ids_are_where_the_colour_is():
    seen = 0
    for index in range(30):
        scene = draw_scene(np.random.default_rng([9, index]), 96, held_out=True)
        for number, thing in enumerate(scene.things, start=1):
            if thing.texture != "plain" or thing.kind == "ring":
                continue
            y, x = int(thing.cy), int(thing.cx)
            if (scene.ids[y - 1 : y + 2, x - 1 : x + 2] == number).all():
                assert np.abs(scene.image[y, x].astype(int) - COLOURS[thing.colour]).max() < 25
                seen += 1
    assert seen > 40


def test_held_out_pairs_are_in_val_only(samples):
    pairs = {
        split: {(t.colour, t.kind) for s in samples[split] for t in s.scene.things}
        for split in shapes.SPLITS
    }
    assert not pairs["train"] & set(HELD_OUT_PAIRS) and pairs["val"] & set(HELD_OUT_PAIRS)
    said = " ".join(r["caption"].lower() for s in samples["train"] for r in s.narratives)
    # Not even as something absent.
    assert not any(f"{colour} {kind}" in said for colour, kind in HELD_OUT_PAIRS)


def test_samples_depend_on_seed_split_and_index_only():
    first, again = (shapes.make_sample(5, "train", 7) for _ in range(2))
    assert np.array_equal(first.id_map, again.id_map)
    assert np.array_equal(first.image_array, again.image_array)
    assert first.narratives == again.narratives and first.refs == again.refs
    for other in ((6, "train", 7), (5, "val", 7), (5, "train", 8)):
        assert not np.array_equal(first.image_array, shapes.make_sample(*other).image_array)
    for message, arguments in {
        "split 'test'": (0, "test", 0),
        "-1": (0, "train", -1),
        "32.*64": (0, "train", 0, 32),
    }.items():
        refused(message, shapes.make_sample, *arguments)


def test_segment_ids_are_unique_in_the_dataset(everything):
    ids = [i for sample in everything for i in sample.segment_ids]
    assert len(set(ids)) == len(ids) and min(ids) > 0 and max(ids) < 1 << 24
    last = shapes.image_id_of("val", shapes.MAX_SCENES - 1)
    assert (last + 1) * 16 <= 1 << 24  # so that the numbering of ids never wraps


def test_phrases_name_exactly_what_fits(everything):
    grounded = plural = stuff = ungrounded = 0
    for sample in everything:
        number = {segment_id: k for k, segment_id in enumerate(sample.segment_ids)}
        for record in sample.narratives[:2]:  # the others are typed, see below
            assert isinstance(record["image_id"], str)
            nouns = [s for s in record["segments"] if s["noun"]]
            assert 4 <= len(nouns) <= 8 and len(record["caption"].split()) <= 60
            for segment in record["segments"]:
                members = {number[int(i)] for i in segment["segment_ids"]}
                if not members:
                    ungrounded += segment["noun"]
                    if segment["noun"] and segment["utterance"].split()[-1] in KINDS:
                        assert not named_by(segment["utterance"], sample.scene)
                    continue
                assert segment["noun"] and segment["plural"] == (len(members) > 1)
                assert members == named_by(segment["utterance"], sample.scene), segment
                grounded += 1
                plural += segment["plural"]
                stuff += min(members) >= len(sample.scene.things)
    assert 0.22 < plural / grounded < 0.40 and 0.20 < stuff / grounded < 0.35
    assert ungrounded > 20


def test_the_last_narratives_of_a_training_scene_are_as_people_type_them():
    habits, sides = Counter(), Counter()
    for index in range(60):
        typed = shapes.make_sample(3, "train", index)
        for record, most in zip(typed.narratives[2:], (3, 5), strict=True):
            nouns = [segment for segment in record["segments"] if segment["noun"]]
            assert 1 <= len(nouns) <= most
            for segment in nouns:
                members = {typed.segment_ids.index(int(i)) for i in segment["segment_ids"]}
                assert members == named_by(segment["utterance"].lower(), typed.scene), segment
                assert segment["utterance"] in record["caption"]
        words = typed.narratives[2]["caption"].split()
        habits["stop"] += words[-1].endswith(".")
        habits["title"] += all(word[0].isupper() for word in words)
        habits["bare"] += words[0].lower() not in ("a", "an", "the", "there", "this", "i")
        habits["on"] += "on" in words
        said = [segment["utterance"].lower().split()[-1] for segment in nouns]
        sides.update(side for side in said if side in ("left", "right", "top", "bottom"))
    assert min(habits.values()) > 5 and max(habits.values()) < 50, habits
    assert len(sides) == 4 and min(sides.values()) > 20, sides
    assert len(shapes.make_sample(3, "val", 0).narratives) == 1


def test_utterances_partition_the_caption(everything):
    habits = Counter()
    for record in [record for sample in everything for record in sample.narratives]:
        utterances = [segment["utterance"] for segment in record["segments"]]
        squeezed = re.sub(r"\s", "", "".join(utterances)).lower()
        assert squeezed == re.sub(r"\s", "", record["caption"]).lower()
        habits["n't"] += any(u.endswith("n't") for u in utterances)
        habits["lower"] += "".join(utterances).islower()
        habits["apart"] += "." in utterances
        behind = zip(utterances, record["segments"][1:])
        habits["detached"] += any(u.endswith(" the") and s["noun"] for u, s in behind)
    assert min(habits.values()) > 5, habits


def test_expressions_are_true_of_their_target_only(everything):
    total = relations = 0
    for sample, ref in [(drawn, ref) for drawn in everything for ref in drawn.refs]:
        scene, target = sample.scene, sample.segment_ids.index(ref["ann_id"])
        assert 2 <= len(ref["sentences"]) <= 3
        for text in [sentence["sent"] for sentence in ref["sentences"]]:
            match = re.fullmatch(r"(.+?) (left of|right of|above|below) the (.+)", text)
            on = re.fullmatch(rf"(.+) on the ({'|'.join(STUFF)})", text)
            if match:
                (anchor,) = named_by(match[3], scene)
                place = attrgetter("cx" if "of" in match[2] else "cy")
                sign = -1 if match[2] in ("left of", "above") else 1
                offsets = {
                    i: sign * (place(scene.things[i]) - place(scene.things[anchor]))
                    for i in named_by(match[1], scene)
                }
                fits = {i for i, offset in offsets.items() if offset > 0}
                relations += 1
            elif on:
                fits = {i for i in named_by(on[1], scene) if scene.region_under(i) == on[2]}
            else:
                fits = named_by(text, scene)
            assert fits == {target}, text
            total += 1
    assert total > 200 and relations > 50


def test_instances_hold_every_pixel(everything):
    instances = [(s, instance) for s in everything for instance in s.instances]
    for sample, instance in instances:
        rle = coco_mask.frPyObjects(instance["segmentation"], 96, 96)
        rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
        mask = coco_mask.decode(rle).astype(bool)
        assert np.array_equal(mask, sample.id_map == instance["id"])
        assert instance["area"] == mask.sum()
        assert instance["bbox"] == coco_mask.toBbox(rle).tolist()
    assert {type(instance["segmentation"]) for _, instance in instances} == {list, dict}


def test_predictions_are_damaged(samples):
    segments, ious = sum(len(s.segment_ids) for s in samples["val"]), []
    for sample in samples["val"]:
        assert sample.predictions
        truth = [sample.id_map == i for i in sample.segment_ids]
        for entry in sample.predictions:
            mask = coco_mask.decode(entry["segmentation"]).astype(bool)
            ious.append(max((mask & t).sum() / (mask | t).sum() for t in truth))
            assert 0 < entry["score"] <= 1 and entry["image_id"] == sample.image["id"]
    assert 0.03 < 1 - len(ious) / segments < 0.17
    assert 0.25 < np.mean(np.array(ious) < 1) < 0.55


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def different(one, two, names):
    _, *others = filecmp.cmpfiles(one, two, names, shallow=False)
    return sum(others, [])


def test_preparation_is_the_same_for_any_number_of_workers(tmp_path, capsys):
    counts = {"train": 9, "val": 5}
    one, two = tmp_path / "one", tmp_path / "two"
    assert prepare_shapes.prepare(one, counts, seed=1, workers=1)
    options = ["--train", "9", "--val", "5", "--seed", "1", "--workers", "2"]
    assert prepare_shapes.main(["--output", str(two), *options]) == 0
    assert "next: python tools/train_net.py" in capsys.readouterr().out
    names = files_below(one)
    assert names == files_below(two) and different(one, two, names) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]  # no scratch is left

    stamp = (one / "meta.json").stat().st_mtime_ns
    assert not prepare_shapes.prepare(one, counts, seed=1)  # equal settings: nothing to do
    assert (one / "meta.json").stat().st_mtime_ns == stamp
    assert prepare_shapes.prepare(one, {"train": 3, "val": 2}, seed=1, workers=1)
    assert len(list((one / "train").iterdir())) == 3


def test_held_out_scenes_alone_are_those_of_the_whole_dataset(tmp_path, capsys):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    prepare_shapes.prepare(whole, {"train": 3, "val": 4}, seed=1, workers=1)
    argv = ["--val", "4", "--seed", "1", "--workers", "1", "--train"]
    assert prepare_shapes.main(["--output", str(alone), *argv, "0"]) == 0
    assert "--eval-only" in capsys.readouterr().out  # what the files are good for
    names = [name for name in files_below(alone) if "val" in name]
    assert names == [name for name in files_below(whole) if "val" in name]
    assert different(whole, alone, names) == []
    # Nothing of the training scenes, and no tokenizer of other captions, to train on by mistake.
    others = set(files_below(alone)) - set(names)
    assert others == {"meta.json", "refcoco/instances.json", "refcoco/refs(unc).p"}

    stamp = (whole / "meta.json").stat().st_mtime_ns
    assert prepare_shapes.main(["--output", str(whole), *argv, "0"]) == 0
    assert (whole / "meta.json").stat().st_mtime_ns == stamp  # it holds these scenes: left alone
    assert prepare_shapes.main(["--output", str(alone), *argv, "3"]) == 0
    assert files_below(alone) == files_below(whole)


@pytest.mark.parametrize("option", ["--val 1", "--train -1", "--val 0", "--size 20", "--workers 0"])
def test_preparation_spares_foreign_folders_and_refuses_bad_settings(tmp_path, option, capsys):
    name, value = option.split()
    folder, message = ("x", value) if value != "1" else (".", "not empty")
    (tmp_path / "thesis.tex").write_text("words")
    assert prepare_shapes.main(["--output", str(tmp_path / folder), name, value]) == 1
    assert message in capsys.readouterr().err
    assert files_below(tmp_path) == ["thesis.tex"] and not (tmp_path / "x").exists()


def test_tokenizer(samples, tmp_path):
    captions = [r["description"] for s in samples["train"] for r in s.descriptions]
    assert shapes_text.train_tokenizer(captions, str(tmp_path)) == shapes_text.VOCABULARY_SIZE
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == shapes_text.VOCABULARY_SIZE + 1
    words = {
        w for c in [*captions, *shapes_text.template_texts()] for w in re.findall(r" [A-Za-z]+", c)
    }
    assert len(words) > 80
    assert {w: tokenizer.tokenize(w) for w in words if len(tokenizer.tokenize(w)) != 1} == {}
    for text in (*captions[:5], "Ünïcödé 漢字 🙂 a\tb\n  c!", "USER: \nPlease <reserved"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(tokenizer, n) for n in names] == ["<s>", "</s>", "<pad>", "<unk>"]
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    assert "<SEG>" not in json.dumps(settings)

    many = [f" {a}{b}{c}" for a in "bcdfghjk" for b in "aeiou" for c in "lmnprstvwz"]
    refused("VOCAB", shapes_text.train_tokenizer, ["".join(many)], str(tmp_path / "full"))


def test_descriptions_are_scored_by_what_the_scene_holds() -> None:
    scene = shapes.make_sample(0, "val", 15).scene  # a striped red triangle and three purple rings
    assert sorted(f"{thing.size} {thing.colour} {thing.kind}" for thing in scene.things) == [
        *["large purple ring"] * 2,
        *["large red triangle", "small purple ring"],
    ]
    text = (
        "In this picture there are three purple rings, two blue stars and a striped red triangle. "
        "Behind them we can see the sandy ground and the sky. There isn't a purple cross. There is "
        "a large ring and two rings."
    )
    counts = score_text(text, scene)
    told = {name: (counts[name], counts[f"{name} of"]) for name in counts if f"{name} of" in counts}
    assert told == {
        "things": (4, 5),  # all but the blue stars; "a large ring" is there, so are "two rings"
        "named": (2, 3),
        "counts": (1, 3),
        "invented": (1, 5),
        "grounds": (1, 2),
        "covered": (5, 7),
    }

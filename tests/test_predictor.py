"""The predictor: entities of every kind, questions to a model, equal to evaluation, in batches."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_gella as tiny
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from refusals import refused

from gella.config import load_config
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.entities.rle import encode_mask
from gella.predictor import TASKS, GellaPredictor, Request, image_id_of
from gella.predictor.predictor import prefix_ids
from gella.predictor.scene import is_spec, picture_of, read_entities
from gella.segmenters.segmenter import Segmenter
from gella.text import prompts
from gella.text.spans import located
from gella.utils.hub import model_folder

CAPTION = "A red circle and two squares on the sand."


def as_evaluated(result):
    """A result in the form of the model's own."""
    if isinstance(result, list):
        return {"text": [result, result.phrases]}
    if hasattr(result, "phrases"):
        return {"grounding": result.phrases}
    if hasattr(result, "segments_info"):
        segments = [dict(segment) for segment in result.segments_info]
        return {"panoptic_seg": (torch.as_tensor(result.ids), segments)}
    return result if isinstance(result, dict) else {"text": result}


def same_answers(one, other):
    tiny.same_result(as_evaluated(one), as_evaluated(other))


SIZE = (30, 40)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def ids():
    ids = np.zeros(SIZE, dtype=np.int64)
    ids[:10], ids[10:20, :20], ids[25:, 30:] = 9, 4, 70
    return ids


class Halves(Segmenter):
    def __init__(self, count=2):
        self.count, self.seen = count, []

    def predict(self, images):
        self.seen += list(images)
        left = np.arange(images[0].shape[1]) < images[0].shape[1] // 2
        masks = np.stack([np.broadcast_to(m, images[0].shape[:2]) for m in (left, ~left)])
        return [(masks[: self.count], np.ones(self.count, np.float32))]


def same(found, ids, segment_ids):
    named = np.array([0, *found.segment_ids])[found.ids]
    assert (named == ids).all() and found.segment_ids == segment_ids


def test_ids_of_any_integer_type_and_masks_of_two_numbers(image, ids):
    masks = np.stack([ids == value for value in (9, 4, 70)])
    numbered = (masks * np.array([1, 2, 3])[:, None, None]).sum(0)
    for kind in (np.uint8, np.int16, np.uint32, np.int64):
        same(read_entities(ids.astype(kind), image), ids, [4, 9, 70])
    for array in (masks, masks.astype(np.uint8), masks * np.uint8(255), masks * 1.0, masks * 0.5):
        same(read_entities(array, image), numbered, [1, 2, 3])
    for array in (masks[0], masks[0] * 1.0):
        same(read_entities(array, image), masks[0] * 1, [1])
    masks[:] = False
    masks[0], masks[1, :5, :5], masks[2, 1, 1] = True, True, True  # smaller ones lie on top
    assert read_entities(masks, image).areas().tolist() == [1200, 25, 1]


NOISE = np.random.default_rng(0)


@pytest.mark.parametrize("array, message", [
    (np.full((2, *SIZE), np.nan), "mask 0 holds nan"),
    (NOISE.random((2, *SIZE)), "threshold them first"),
    (-np.ones(SIZE, np.int32), "holds -1; ids are 0"),
    (NOISE.integers(0, 9, (2, *SIZE)), "beside 8.*threshold"),
    (np.ones((30, 41), int), r"int64 \(30, 41\) but the image is 40x30"),
    (np.ones((*SIZE, 3), np.uint8), r"masks go first: \(E, H, W\)"),
    (np.ones((1, 2, *SIZE), bool), r"bool \(1, 2, 30, 40\); give integer ids"),
    (np.full(SIZE, "a"), r"<U1 \(30, 40\); give integer ids"),
    (np.full(SIZE, None), r"object \(30, 40\)"),
    (np.zeros(SIZE, int), "no entity at all"),
    (np.zeros((0, *SIZE), bool), "no entity at all"),
    (np.zeros((4, *SIZE)), "no entity at all"),
    (EntityMap(np.zeros(SIZE, np.int32)), "no entity at all"),
    (Halves(0), "the segmenter found no entity"),
])  # fmt: skip
def test_arrays_that_are_no_entities(image, array, message):
    refused(message, read_entities, array, image)


def test_a_segmenter_and_a_file(image, ids, tmp_path):
    segmenter, file = Halves(), tmp_path / "ids.png"
    assert read_entities(segmenter, image).areas().tolist() == [600, 600]
    assert segmenter.seen[0] is image
    Image.fromarray(id_to_rgb(ids)).save(file)
    for path in (file, str(file)):
        same(read_entities(path, image), ids, [4, 9, 70])
    refused("nowhere", read_entities, tmp_path / "nowhere.png", image, error=FileNotFoundError)
    with pytest.raises(TypeError, match="entities are a dict; give an EntityMap, an array or t"):
        read_entities({"masks": 1}, image)


class Instances:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Detections(Instances):
    pass


# What people hold of two masks, (2, H, W) bool.
HELD = {
    "a tensor": lambda m: torch.from_numpy(m),
    "a tensor of floats": lambda m: torch.from_numpy(m).half(),
    "a list of arrays": lambda m: [*m],
    "a list of tensors": lambda m: [*torch.from_numpy(m)],
    "SAM's dicts": lambda m: [{"segmentation": x, "bbox": [], "predicted_iou": 0.5} for x in m],
    "SAM's dicts of run lengths": lambda m: [{"segmentation": encode_mask(x)} for x in m],
    "run lengths": lambda m: [encode_mask(x) for x in m],
    "supervision's": lambda m: Detections(xyxy=m, mask=m, confidence=np.full(2, 0.5)),
    "Detectron2's": lambda m: Instances(
        pred_masks=torch.from_numpy(m), scores=torch.full((2,), 0.5)
    ),
    "a picture of ids": lambda m: Image.fromarray((m[0] + 2 * m[1]).astype(np.uint8)),
    "a coloured picture": lambda m: Image.fromarray(id_to_rgb(m[0] + 2 * m[1])),
    "one with alpha": lambda m: Image.fromarray(id_to_rgb(m[0] + 2 * m[1])).convert("RGBA"),
}


@pytest.mark.parametrize("form", HELD)
def test_entities_as_other_libraries_hold_them(image, ids, form):
    masks = np.stack([ids == 9, ids == 4])
    found = read_entities(HELD[form](masks), image)
    same(found, masks[0] + 2 * masks[1], [1, 2])
    assert set(found.scores) == {0.5 if "'s" in form and "run" not in form else 1.0}


@pytest.mark.parametrize("held, message", [
    (Detections(xyxy=0, mask=None), "Detections have boxes and no masks"),
    (Instances(pred_boxes=3), "Instances have boxes and no masks"),
    ([{"bbox": [1, 2, 3, 4]}], r"entry 0 of the masks has no 'segmentation', only \['bbox'\]"),
    ([np.ones((3, 4), bool)], "4x3"),
    (Image.new("CMYK", SIZE[::-1]), "picture of mode CMYK; give ids as L, I or RGB"),
    (Image.fromarray(NOISE.integers(0, 255, (*SIZE, 4), np.uint8)), "mode RGBA; give ids"),
])  # fmt: skip
def test_what_other_libraries_hold_without_masks(image, held, message):
    refused(message, read_entities, held, image)


def test_pictures_in_memory(image):
    turned = Image.fromarray(image)
    turned.getexif()[0x0112] = 3
    for held in (
        Image.fromarray(image),
        Image.fromarray(image[::-1, ::-1]).rotate(180),
        torch.from_numpy(image),
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1) / 255,
        image / 255.0,
    ):
        assert (picture_of(held) == image).all()
    assert (picture_of(turned) == image[::-1, ::-1]).all()
    refused(r"float64 .* from -1 to 1; give floats in 0..1", picture_of, image / 127.5 - 1)
    refused(r"must be uint8 \(H, W, 3\) RGB, not uint8 \(30, 40\)", picture_of, image[..., 0])


def test_names_of_segmenters_and_of_pictures():
    assert is_spec("sam:facebook/sam-vit-base") and is_spec("detectron2:a.yaml:b.pth")
    assert not any(is_spec(x) for x in ("masks.png", "c:/masks.png", "sam", Path("sam:x"), 3))
    assert image_id_of("val2017/000000142238.jpg") == 142238
    assert image_id_of("a/my dog.png") == "my dog"


@pytest.fixture
def cfg(tokenizer_dir):
    opts = ["MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir), "MODEL.LANGUAGE.MAX_POSITIONS", "1024"]
    return load_config(tiny.TINY, opts)


@pytest.fixture
def scene():
    ids = np.zeros((60, 90), dtype=np.int32)
    ids[30:], ids[5:20, 5:20], ids[5:20, 40:55], ids[35:50, 60:80] = 11, 5, 300, 7
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return image, EntityMap.from_id_image(ids, [11, 5, 300, 7])


class StubModel(torch.nn.Module):
    """Notes its input; gives phrase i the i-th and last entity, and says ``text``."""

    def __init__(self, text=""):
        super().__init__()
        self.text, self.inputs, self.views = text, [], []

    def encode_images(self, views, prefix_ids):
        self.views += views
        return [f"image {len(self.views)}"] * len(views)

    def write_answers(self, batch, *rest):
        self.inputs += batch
        nouns = prompts.parse_nouns(self.text)
        return [{"text": self.text, "phrases": located(x["caption"], nouns)} for x in batch]

    def find_entities(self, batch, encoded):
        assert not self.training and not torch.is_grad_enabled()
        assert encoded == [f"image {len(self.views)}"]
        self.inputs += batch
        return [self._found(inputs["entities_full"], inputs) for inputs in batch]

    def _found(self, entities, inputs):
        if inputs["task"] == "panoptic":
            info = [{"id": 1, "category_id": 4, "isthing": 0, "score": 0.5}]
            return {"panoptic_seg": (torch.as_tensor(entities.ids), info)}
        grounding = []
        for index, phrase in enumerate(inputs["phrases"]):
            chosen = sorted({index % entities.num_entities, entities.num_entities - 1})
            item = {"phrase": phrase["text"], "start": phrase["start"], "end": phrase["end"]}
            item["entity_ids"] = [entities.segment_ids[k] for k in chosen]
            item.update(scores=[0.75] * len(chosen), mask=entities.union(chosen))
            item["probabilities"] = dict.fromkeys(item["entity_ids"], 0.75)
            grounding.append(item)
        return {"grounding": grounding}


def stubbed(cfg, scene, text=""):
    model = StubModel(text)
    predictor = GellaPredictor(cfg, model=model)
    predictor.set_image(*scene)
    return predictor, model


def test_ground_with_given_nouns(cfg, scene):
    predictor, model = stubbed(cfg, scene)
    nouns = ["A red circle", "two squares", "the sand"]
    result = predictor.ground(CAPTION, nouns)
    (inputs,) = model.inputs
    assert [CAPTION[p["start"] : p["end"]] for p in inputs["phrases"]] == nouns
    seg = predictor.tokenizer.convert_tokens_to_ids(prompts.SEG_TOKEN)
    assert inputs["input_ids"][inputs["seg_positions"]].tolist() == [seg] * 3
    assert inputs["image"].shape == inputs["colormap"].shape == (3, 96, 96)
    assert (inputs["height"], inputs["width"], *inputs["valid_size"]) == (60, 90, 64, 96)
    assert result.colormap.shape == (64, 96, 3) and result.untrained
    result = predictor.ground(CAPTION, ["the sand", "a red circle", "a unicorn"])
    spans = [(phrase["start"], phrase["end"]) for phrase in result.phrases]
    assert spans == [(32, 40), (0, 12), (-1, -1)] and result.plot().width >= 640


def test_a_grounding_as_json_and_as_masks(cfg, scene):
    result = stubbed(cfg, scene)[0].ground(CAPTION, ["A red circle", "two squares"])
    loaded = json.loads(json.dumps(result.to_json()))
    known = {"weights": "untrained", "caption": CAPTION, "num_entities": 4}
    assert loaded.items() >= {**known, "height": 60, "width": 90}.items()
    ids = scene[1].ids
    for noun, phrase in zip(loaded["nouns"], result.phrases, strict=True):
        assert (mask_utils.decode(noun["mask"]).astype(bool) == phrase["mask"]).all()
        assert (np.isin(ids, noun["entity_numbers"]) == phrase["mask"]).all()
        assert CAPTION[noun["start"] : noun["end"]] == noun["noun"]
    assert noun["entity_ids"] == [300, 11] and noun["entity_numbers"] == [3, 1]
    # By the entities' numbers, with None for those that the model has no mask of.
    assert noun["probabilities"] == [0.75, None, 0.75, None] and loaded["unnamed_entities"] == [4]
    assert result.probabilities.shape == (2, 4) and np.isnan(result.probabilities[1, 1])


def test_extracted_nouns_that_the_caption_lacks_are_dropped(cfg, scene):
    text = prompts.noun_answer(["A red circle", "a unicorn", "the sand"])
    predictor, model = stubbed(cfg, scene, text)
    result = predictor.ground(CAPTION)
    assert [phrase["phrase"] for phrase in result.phrases] == ["A red circle", "the sand"]
    asked = model.inputs[0]
    assert asked["task"] == "extract" and len(asked["seg_positions"]) == 0
    assert predictor.extract_nouns(CAPTION) == ["A red circle", "a unicorn", "the sand"]
    assert predictor.describe() == text


def test_refer_and_panoptic(cfg, scene):
    predictor, model = stubbed(cfg, scene)
    result = predictor.refer("the circle on the left")
    assert result.task == model.inputs[-1]["task"] == "refer" and len(result.phrases) == 1
    for ask, text in ((predictor.ground, "a dog"), (predictor.refer, "a dog")):
        words = (text, ["a dog"]) if ask == predictor.ground else (text,)
        for threshold, told in ((0.0, 0.0), (0.3, 0.3), (None, "the config's")):
            ask(*words, threshold=threshold)
            assert model.inputs[-1].get("threshold", "the config's") == told
    sand = {"id": 4, "name": "sand", "isthing": 0}
    panoptic = predictor.panoptic([sand, {"id": 9, "name": "wall-other-merged", "isthing": 1}])
    assert [p["category_id"] for p in model.inputs[-1]["phrases"]] == [4, 9]
    assert len(model.inputs[-1]["seg_positions"]) == 2
    assert panoptic.ids.dtype == np.int32 and panoptic.plot().width >= 640
    assert [c["id"] for c in predictor.panoptic(["dog", "cat"]).categories] == [1, 2]
    result = predictor.panoptic([sand])
    loaded = json.loads(json.dumps(result.to_json()))
    mask = loaded["segments"][0].pop("mask")
    assert (mask_utils.decode(mask) == (result.ids == 1)).all() and result.untrained
    segment = {"id": 1, "category_id": 4, "category": "sand", "isthing": False, "score": 0.5}
    segment |= {"entity_ids": [5], "entity_numbers": [2]}  # as drawn, and as the file has it
    known = {"config": "", "weights": "untrained", "categories": [sand], "segments": [segment]}
    assert loaded == {"task": "panoptic", "height": 60, "width": 90, **known}


@pytest.mark.parametrize("fits", ["stored", "turned"])
def test_a_photograph_is_turned_as_its_masks_are(cfg, scene, tmp_path, fits):
    pixels, exif, ids = scene[0], Image.Exif(), np.ones((60, 90), np.uint8)
    exif[0x0112], file, masks = 6, tmp_path / "photo.png", tmp_path / "masks.png"
    Image.fromarray(pixels).save(file, exif=exif)
    expected = pixels if fits == "stored" else np.rot90(pixels, -1)
    Image.fromarray(ids if fits == "stored" else ids.T).save(masks)
    predictor, _ = stubbed(cfg, scene)
    for entities in (masks, (ids if fits == "stored" else ids.T).astype(int)):
        np.testing.assert_array_equal(predictor.set_image(file, entities).image, expected)
    told = "the entity array is .* but the image is 60x90"
    refused(told, predictor.set_image, file, np.ones((60, 60), int))
    assert predictor.set_image(file, Halves()).image.shape == (90, 60, 3)  # it sees the turned one


def test_a_segmenter_by_name_is_loaded_once(cfg, scene, monkeypatch):
    loaded, (predictor, _) = [], stubbed(cfg, scene)
    load = lambda *given: loaded.append(given) or Halves()  # noqa: E731
    monkeypatch.setattr("gella.predictor.predictor.load_segmenter", load)
    for spec in ("sam:a", "sam:a", "transformers:b"):
        found = predictor.encode(scene[0], spec)
        assert found.entities.areas().tolist() == [60 * 45] * 2
    assert loaded == [("sam:a", "cpu"), ("transformers:b", "cpu")]


def test_names_and_order_do_not_change_what_the_model_sees(cfg, scene):
    predictor, _ = stubbed(cfg, scene)
    image, entities = scene
    seen = predictor.set_image(image, entities, image_id=1)
    named = np.array([0, *entities.segment_ids])[entities.ids]
    for order, image_id in ((entities.segment_ids[::-1], 1), (entities.segment_ids, "a dog")):
        other = predictor.set_image(image, EntityMap.from_id_image(named, order), image_id=image_id)
        assert (seen.colormap == other.colormap).all() and other.entities.segment_ids == order
        assert seen.view["entities"].segment_ids == other.view["entities"].segment_ids
    moved = predictor.set_image(image, entities.flip())
    assert (seen.colormap != moved.colormap).any()


def test_from_config_falls_back_to_the_cpu(tokenizer_dir):
    make = partial(GellaPredictor.from_config, tiny.TINY, weights="")
    opts = ["MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir)]
    predictor = make(device="cuda", opts=opts)
    assert predictor.cfg.MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")
    assert predictor.config_file == str(tiny.TINY) and predictor.cfg.MODEL.WEIGHTS == ""
    assert predictor.cfg.MODEL.LANGUAGE.DTYPE == "float32"
    told = "dtype 'half' is unknown; use one of float32, bfloat16"
    refused(told, make, dtype="half", opts=opts)


def test_config_errors(cfg, tmp_path):
    before, file = cfg.dump(), tmp_path / "wrong.yaml"
    GellaPredictor(cfg, model=StubModel())
    assert cfg.dump() == before and not cfg.is_frozen()  # whose it is may go on with it
    refused(r"none\.yaml", load_config, tmp_path / "none.yaml", error=FileNotFoundError)
    for text, word in (
        ("MODEL:\n  GELA: 1\n", r"MODEL\.GELA"),
        ("MODEL: [", "wrong.yaml"),
        ("MODEL:\n  GELLA:\n    SNAP: word\n", r"MODEL\.GELLA\.SNAP"),
        ("just text\n", "wrong.yaml"),
    ):
        file.write_text(text)
        refused(word, load_config, file)
    refused(r"MODEL\.NO_SUCH", load_config, tiny.TINY, ["MODEL.NO_SUCH", "1"])
    refused("pairs", load_config, tiny.TINY, ["MODEL.DEVICE"])


def test_a_scene_is_a_copy_that_nobody_changes(cfg, scene):
    image, ids = scene[0].copy(), scene[1].ids.copy()
    predictor, _ = stubbed(cfg, scene)
    found = predictor.encode(image, ids, image_id=3)
    image[:], ids[:] = 0, 1
    assert (found.image == scene[0]).all() and found.entities.segment_ids == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        found.image[0] = 1
    with pytest.raises(AttributeError):
        found.image = image
    assert found == found != predictor.encode(*scene, image_id=3) and {found: 1}[found] == 1
    assert found.image_id == 3 and found.colormap.shape == (64, 96, 3)
    for wrong in (image[..., 0], image[..., :2]):
        refused(r"image must be uint8 \(H, W, 3\) RGB", predictor.encode, wrong, scene[1])


# (height, width), number of entities, number of nouns
SCENES = [((60, 80), 5, 2), ((90, 60), 9, 5), ((48, 48), 1, 1), ((64, 96), 14, 7)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return [
        tiny.make_record(folder, f"scene{i}", size, entities, tiny.NOUNS[:nouns], seed=i)
        for i, (size, entities, nouns) in enumerate(SCENES)
    ]


def encode(predictor, record):
    masks = record["entities"]
    given = record["file_name"], masks["file_name"]
    return predictor.encode(*given, segments_info=masks["segments_info"])


def answer(predictor, task, record, scene):
    ask, given = {
        "ground": (predictor.ground_phrases, (record["caption"], record.get("phrases"))),
        "panoptic": (predictor.panoptic, (tiny.CATEGORIES,)),
        "refer": (predictor.refer, [e["text"] for e in record["expressions"]]),
        "describe": (predictor.describe, ()),
        "extract": (predictor.extract_nouns, (record["caption"],)),
    }[task]
    return ask(*given, scene=scene)


@pytest.fixture(scope="module", params=tiny.QUERIES)
def batcher(request, tokenizer_dir):
    cfg = tiny.make_cfg(tokenizer_dir, request.param)
    return GellaPredictor(cfg, model=tiny.make_model(cfg))


@pytest.mark.parametrize("queries", tiny.QUERIES)
@pytest.mark.parametrize("snap", [True, False])
def test_every_answer_is_that_of_evaluation(records, tokenizer_dir, queries, snap):
    cfg = tiny.make_cfg(
        tokenizer_dir, queries, "MODEL.GELLA.SNAP", snap, "MODEL.GELLA.SNAP_IOU", 0.1
    )
    model = tiny.make_model(cfg)
    predictor, mapper = GellaPredictor(cfg, model=model), tiny.make_mapper(cfg, is_train=False)
    texts = []
    for record in records[1:]:
        scene = encode(predictor, record)
        for task in TASKS:
            (evaluated,) = model([mapper(record, task=task)])
            found = answer(predictor, task, record, scene)
            if task == "describe":
                texts.append(evaluated["text"].strip())
                assert found == texts[-1]
            elif task == "extract":
                assert found == prompts.parse_nouns(evaluated["text"])
                assert [p["start"] for p in found.phrases] == [
                    p["start"] for p in evaluated["grounding"]
                ]
            else:
                assert evaluated.get("grounding") or evaluated["panoptic_seg"][1]
                same_answers({k: evaluated[k] for k in as_evaluated(found)}, found)
    assert len(set(texts)) > 1


@pytest.fixture(scope="module")
def predictor(records, tokenizer_dir):
    """Of the first random model that says letters of the first picture, not bytes alone."""
    cfg = tiny.make_cfg(tokenizer_dir)
    for seed in range(50):
        predictor = GellaPredictor(cfg, model=tiny.make_model(cfg, seed))
        if len(set(predictor.describe(scene=encode(predictor, records[0]))) - {"\ufffd"}) > 3:
            return predictor
    raise AssertionError("no random model says a word")


def test_the_order_of_questions_does_not_matter(records, predictor):
    other, record = records[:2]
    fresh = {task: answer(predictor, task, record, encode(predictor, record)) for task in TASKS}
    scene = encode(predictor, record)
    encode(predictor, other)  # changes nothing
    for task in [*TASKS, *reversed(TASKS), "ground", "ground"]:
        same_answers(fresh[task], answer(predictor, task, record, scene))


class Counts:
    """Calls of the vision side, and positions that the language model computed."""

    def __init__(self, model):
        self.vision, self.language = [], []
        for part in (model.image_encoder, model.colormap_encoder, model.mask_decoder):
            part.register_forward_hook(lambda *_: self.vision.append(1))
        model.language_decoder.llama.base_model.register_forward_hook(
            lambda module, args, output: self.language.append(output.last_hidden_state.shape[1])
        )


def test_vision_and_image_tokens_are_computed_once(records, tokenizer_dir):
    cfg = tiny.make_cfg(tokenizer_dir)
    model = tiny.make_model(cfg)
    predictor, counts = GellaPredictor(cfg, model=model), Counts(model)
    scene = encode(predictor, records[1])
    start = len(prefix_ids(predictor._inputs()))
    assert len(counts.vision) == 3 and counts.language == [start] and start > 36
    for task in TASKS * 2:
        answer(predictor, task, records[1], scene)
    assert len(counts.vision) == 3 and counts.language.count(start) == 1
    whole = tiny.make_mapper(cfg, is_train=False)(records[1], task="ground")["input_ids"]
    assert counts.language[1] == len(whole) - start


@pytest.mark.parametrize("system", ["", "A chat. \n\nAnswer well! "])
def test_the_shared_start_is_that_of_every_prompt(records, tokenizer_dir, system):
    cfg = tiny.make_cfg(tokenizer_dir, "entity", "MODEL.LANGUAGE.SYSTEM", system)
    mapper = tiny.make_mapper(cfg, is_train=False)
    start = prefix_ids(mapper).tolist()
    assert start[-36:] == [prompts.IMAGE_TOKEN_ID] * 36
    for record in (records[0], {**records[1], "caption": "\n\n  A  " + records[1]["caption"]}):
        for task in ("describe", "extract", "panoptic", "refer"):
            ids = mapper({**record, "phrases": records[0]["phrases"]}, task=task)["input_ids"]
            assert ids[: len(start)].tolist() == start
            assert prompts.IMAGE_TOKEN_ID not in ids[len(start) :]


@pytest.fixture(scope="module")
def fluent(records, tokenizer_dir):
    cfg, model = tiny.make_fluent(tokenizer_dir, records[:2])
    return GellaPredictor(cfg, model=model)


@pytest.mark.parametrize("place", [0, 1])
def test_nouns_are_extracted_and_grounded_on_one_scene(records, fluent, place, monkeypatch):
    record, nouns = records[place], list(tiny.NOUNS[: SCENES[place][2]])
    scene, counts, seen = encode(fluent, record), Counts(fluent.model), []
    assert fluent.extract_nouns(record["caption"], scene=scene, on_text=seen.append) == nouns
    assert len(seen) > 1 and seen[-1] == prompts.noun_answer(nouns)
    assert all(later.startswith(text) for text, later in zip(seen, seen[1:]))
    plain = fluent.ground(record["caption"], nouns, scene=scene)
    passes = len(counts.language)
    same_answers(plain, fluent.ground(record["caption"], scene=scene))
    assert not counts.vision and len(counts.language) - passes == passes
    monkeypatch.setattr(fluent.model.language_decoder, "prompt_lookup_tokens", 0)
    assert fluent.extract_nouns(record["caption"], scene=scene) == nouns  # undrafted, the same


def test_a_description_is_streamed(records, predictor):
    seen, scene = [], encode(predictor, records[0])
    text = predictor.describe(scene=scene, on_text=seen.append)
    assert len(seen) > 3 and seen[-1].strip() == text.rstrip("\ufffd") != seen[0]

    def stop(text):
        raise InterruptedError

    pytest.raises(InterruptedError, predictor.describe, scene=scene, on_text=stop)
    assert predictor.describe(scene=scene) == text


def test_threads_share_a_predictor(records, batcher):
    jobs = [(task, record) for record in records[:2] for task in TASKS]
    serial = [answer(batcher, task, r, encode(batcher, r)) for task, r in jobs]
    shared = {r["image_id"]: encode(batcher, r) for r in records[:2]}
    fresh = GellaPredictor(batcher.cfg, model=batcher.model)  # nothing is loaded yet
    barrier = threading.Barrier(8)

    def work(job):
        number, (task, record) = job
        if number < 8:
            barrier.wait(60)
        scene = shared[record["image_id"]] if number % 2 else encode(fresh, record)
        return answer(fresh, task, record, scene)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, enumerate(jobs * 2)))
    for expected, result in zip(serial * 2, found, strict=True):
        same_answers(expected, result)


def test_each_thread_has_its_own_picture(records, predictor):
    def in_a_thread(function):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    first = encode(predictor, records[0])
    given = records[1]["file_name"], records[1]["entities"]["file_name"]
    second = predictor.set_image(*given)
    assert predictor.refer("x").image is second.image
    assert predictor.refer("x", scene=first).image is first.image
    assert predictor.refer("x").image is second.image  # naming one changes nothing
    refused("set_image", in_a_thread, lambda: predictor.refer("x"), error=RuntimeError)
    other = in_a_thread(lambda: (predictor.set_image(*given), predictor.refer("x"))[1])
    assert other.image is not second.image and predictor.refer("x").image is second.image


def test_bfloat16_keeps_language_weights_small_and_answers_near(records, tokenizer_dir, tmp_path):
    cfg = tiny.make_cfg(tokenizer_dir)
    model = tiny.make_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    given = (tmp_path / "config.yaml", str(tmp_path / "weights.pth"))
    exact = GellaPredictor.from_config(*given, dtype="float32")
    rough = GellaPredictor.from_config(*given, dtype="bfloat16")
    kinds = {p.dtype for p in rough.model.language_decoder.parameters()}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}
    mapper = tiny.make_mapper(rough.cfg, is_train=False)
    for record in records[:2]:
        scene = encode(rough, record)
        same_place = [p.dtype for pair in scene.encoded.prefix.keys_values for p in pair]
        assert set(same_place) == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            (evaluated,) = rough.model([mapper(record, task="ground")])
        found = answer(rough, "ground", record, scene)
        reference = answer(exact, "ground", record, encode(exact, record))
        for a, b, c in zip(evaluated["grounding"], found.phrases, reference.phrases, strict=True):
            assert tiny.farthest(a["scores"][0], b["scores"][0]) < 0.02
            assert tiny.farthest(c["scores"][0], b["scores"][0]) < 0.05
        assert tiny.farthest(found.phrases[0]["scores"][0], reference.phrases[0]["scores"][0]) > 0
        assert answer(rough, "panoptic", record, scene).segments_info
        assert isinstance(rough.describe(scene=scene), str)


LORA, EIGHT = ("LORA.ENABLED", True), ("QUANTIZATION", "8bit")


@pytest.mark.parametrize("case, key, libraries, tolerance", [
    ("adapters", LORA, ["peft"], tiny.TOLERANCE),
    ("merged", LORA, ["peft"], tiny.TOLERANCE),
    ("8bit", EIGHT, ["bitsandbytes", "accelerate"], 0.02),
])  # fmt: skip
def test_adapters_and_quantised_weights_answer_as_in_evaluation(
    records, tokenizer_dir, case, key, libraries, tolerance
):
    for library in libraries:
        pytest.importorskip(library)
    cfg = tiny.make_cfg(tokenizer_dir, "entity", f"MODEL.LANGUAGE.{key[0]}", key[1])
    model, record = tiny.make_model(cfg), records[0]
    if case == "merged":
        model.language_decoder.merge_adapters()
    predictor, mapper = GellaPredictor(cfg, model=model), tiny.make_mapper(cfg, is_train=False)
    scene = encode(predictor, record)
    (evaluated,) = model([mapper(record, task="ground")])
    found = answer(predictor, "ground", record, scene)
    for a, b in zip(evaluated["grounding"], found.phrases, strict=True):
        assert a["entity_ids"] == b["entity_ids"] and np.array_equal(a["mask"], b["mask"])
        assert tiny.farthest(a["scores"], b["scores"]) < tolerance
    assert predictor.describe(scene=scene) == model([mapper(record, task="describe")])[0]["text"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (*size, 3), dtype=np.uint8), tiny.make_entities(*size, 2 + 3 * i, i))
        for i, size in enumerate([(60, 80), (90, 60), (48, 48)])
    ]


def requests_about(pictures):
    """Ground, refer, panoptic, describe and extract, on each picture in another order."""
    asked = []
    for i, picture in enumerate(pictures):
        nouns = tiny.NOUNS[: 1 + i]
        caption = tiny.make_caption(nouns)[0]
        kinds = [
            Request("ground", *picture, text=caption, nouns=nouns, image_id=i, exclusive=i == 2),
            Request("refer", *picture, text=nouns[0], image_id=i),
            Request("panoptic", *picture, categories=tiny.CATEGORIES, image_id=i),
            Request("describe", *picture, image_id=i),
            Request("extract", *picture, text=caption, image_id=i),
        ]
        asked += kinds[i:] + kinds[:i]
    return asked


def single(predictor, request):
    scene = predictor.encode(request.image, request.entities, image_id=request.image_id)
    if request.task == "ground":
        exclusive = request.exclusive
        return predictor.ground(request.text, request.nouns, scene=scene, exclusive=exclusive)
    record = {"caption": request.text, "expressions": [{"text": request.text}]}
    return answer(predictor, request.task, record, scene)


def test_results_are_those_of_single_calls(batcher, pictures):
    requests = requests_about(pictures)
    singles = [single(batcher, request) for request in requests]
    for size in (4, 99):
        progress = []
        note = lambda *numbers, to=progress: to.append(numbers)  # noqa: E731
        results = batcher.predict_many(requests, batch_size=size, progress=note)
        assert len(results) == len(requests) == 15
        for expected, result in zip(singles, results, strict=True):
            same_answers(expected, result)
        assert progress == [(done, 15) for done in (*range(size, 15, size), 15)]


class Passes:
    """Images and prompts per pass, through the model's own methods."""

    def __init__(self, model, monkeypatch):
        self.images, self.prompts = [], []
        for owner, name, counts, place in (
            (model, "encode", self.images, 0),
            (model.language_decoder, "generate", self.prompts, 1),
            (model, "read_answers", self.prompts, 0),
        ):
            monkeypatch.setattr(owner, name, self.noting(getattr(owner, name), counts, place))

    def noting(self, method, counts, place):
        def noted(*args, **options):
            counts.append(len(args[place]))
            return method(*args, **options)

        return noted


def test_a_picture_is_encoded_once_and_passes_are_shared(batcher, pictures, monkeypatch):
    passes, requests = Passes(batcher.model, monkeypatch), requests_about(pictures)
    batcher.predict_many(requests, batch_size=99)
    assert passes.images == [3] and passes.prompts == [3, 3, 9]
    passes.images.clear()
    # In batches a picture that comes again later is still known; unless it is another object.
    batcher.predict_many(requests, batch_size=4)
    assert sum(passes.images) == 3
    passes.images.clear()
    copied = [replace(r, image=r.image.copy()) for r in requests[:3]]
    other_colours = [replace(requests[0], image_id="x")]
    batcher.predict_many([*requests[:3], *copied, *other_colours], batch_size=99)
    assert passes.images == [5]


def test_names_of_files_share_a_scene(batcher, pictures, tmp_path, monkeypatch):
    image, entities = pictures[0]
    Image.fromarray(image).save(tmp_path / "12.png")
    Image.fromarray(entities.ids.astype(np.uint8)).save(tmp_path / "masks.png")
    passes = Passes(batcher.model, monkeypatch)
    paths = [(str(tmp_path / "12.png"), tmp_path / "masks.png")] * 2
    paths += [(tmp_path / "12.png", str(tmp_path / "masks.png"))]
    found = batcher.predict_many([Request("refer", *path, text="a lamp") for path in paths])
    assert passes.images == [1] and passes.prompts == [3] and found[0].image is found[2].image
    same_answers(batcher.refer("a lamp", scene=batcher.encode(*paths[0])), found[1])


def test_a_bad_request_stops_no_other(batcher, pictures, tmp_path):
    picture, missing = pictures[1], tmp_path / "missing.png"
    caption, nouns = tiny.make_caption(tiny.NOUNS[:2])[0], tiny.NOUNS[:2]
    good = Request("ground", *picture, text=caption, nouns=nouns)
    cases = [
        (good, None),
        (replace(good, image=missing), "missing.png"),
        (replace(good, image=missing), "missing.png"),
        (replace(good, entities=missing), "missing.png"),
        (replace(good, image=picture[0][:9]), "60x90"),
        (replace(good, text=" "), "caption is empty"),
        (replace(good, nouns=[]), "caption without nouns"),
        (replace(good, nouns=[nouns[0], " "]), "caption without nouns"),
        (replace(good, phrases=[]), "caption without nouns"),
        (replace(good, task="refer", text=""), "expression is empty"),
        (replace(good, text="long " * 3000, nouns=["long"]), "tokens"),
        (Request("panoptic", *picture), "no category"),
        (Request("paint", *picture), "unknown task 'paint'; known: ground, refer"),
        (Request("extract", *picture), "caption is empty"),
        (replace(good, nouns=None), "caption without nouns"),  # the answer is cut off
        (Request("refer", *picture, text="<SEG>"), "<SEG>"),
        (good, None),
    ]
    for batch_size in (3, 99):
        results = batcher.predict_many([request for request, _ in cases], batch_size=batch_size)
        for (_, message), result in zip(cases, results, strict=True):
            if message is None:
                same_answers(single(batcher, good), result)
            else:
                assert isinstance(result, (ValueError, FileNotFoundError)), result
                assert message in str(result)


def test_a_pass_that_fails_is_tried_one_by_one(batcher, pictures, monkeypatch):
    requests = requests_about(pictures)
    expected = batcher.predict_many(requests, batch_size=99)
    for name in ("encode_images", "write_answers", "find_entities"):
        whole = getattr(batcher.model, name)

        def small(items, *args, whole=whole):
            if len(items) > 1:
                raise RuntimeError("out of memory")
            return whole(items, *args)

        monkeypatch.setattr(batcher.model, name, small)
    for one, other in zip(expected, batcher.predict_many(requests, batch_size=99), strict=True):
        same_answers(one, other)
    monkeypatch.delattr(type(batcher.model), "encode_images")
    monkeypatch.delattr(batcher.model, "encode_images")
    results = batcher.predict_many(requests[:3])
    assert all("encode_images" in str(result) for result in results)


def test_extracted_and_given_nouns_are_grounded_in_one_pass(batcher, pictures, monkeypatch):
    caption, nouns = tiny.make_caption(tiny.NOUNS[:3])[0], list(tiny.NOUNS[:3])
    text = prompts.noun_answer([*nouns[:2], "a unicorn", nouns[2]])
    said = {"text": text, "phrases": located(caption, prompts.parse_nouns(text))}
    write = lambda inputs, *args: [said] * len(inputs)  # noqa: E731
    monkeypatch.setattr(batcher.model, "write_answers", write)
    passes = Passes(batcher.model, monkeypatch)
    requests = [Request("ground", *pictures[i], text=caption, image_id=i) for i in (0, 1)]
    requests += [replace(requests[0], nouns=nouns), replace(requests[0], task="extract")]
    found = batcher.predict_many(requests)
    assert passes.prompts == [3]
    assert [len(grounding.phrases) for grounding in found[:3]] == [3, 3, 3]
    same_answers(found[0], found[2])
    assert found[3] == prompts.parse_nouns(text) and batcher.predict_many([]) == []
    refused("batch_size is 0; give at least 1", batcher.predict_many, [], batch_size=0)


def test_a_name_is_a_folder_or_a_model_in_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, cached = "a" * 40, tmp_path / "models--me--shapes"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    assert model_folder("me/shapes") == cached / "snapshots" / commit
    assert model_folder(tmp_path) == tmp_path
    for name in ("me/others", "no/such/folder", "two words"):
        with pytest.raises(OSError):
            GellaPredictor.from_pretrained(name)

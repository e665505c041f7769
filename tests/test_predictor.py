"""The predictor: what it hands to the model, and what it makes of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image
from pycocotools import mask as mask_utils

import gella
from gella.config import load_config
from gella.data.mapper import GroundingMapper
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.predictor import GellaPredictor, image_id_of
from gella.segmenters.segmenter import Segmenter
from gella.text import prompts
from gella.text.spans import locate_phrases
from gella.weights.checkpoint import load_weights

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "gella_tiny_shapes.yaml"
CAPTION = "A red circle and two squares on the sand."


@pytest.fixture
def cfg(tokenizer_dir: Path) -> Any:
    """The tiny config, its weights untrained."""
    return load_config(
        TINY,
        ["MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir), "MODEL.LANGUAGE.MAX_POSITIONS", "1024"],
    )


@pytest.fixture
def scene() -> tuple[np.ndarray, EntityMap]:
    """A 60 x 90 picture with four entities that are named 11, 5, 300 and 7."""
    ids = np.zeros((60, 90), dtype=np.int32)
    ids[30:], ids[5:20, 5:20], ids[5:20, 40:55], ids[35:50, 60:80] = 11, 5, 300, 7
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return image, EntityMap.from_id_image(ids, [11, 5, 300, 7])


class StubModel(torch.nn.Module):
    """Notes its input; gives phrase i the i-th and last entity, and says ``text``."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text, self.inputs, self.views = text, [], []

    def encode_images(self, views: list[dict], prefix_ids: torch.Tensor) -> list[str]:
        self.views += views
        return [f"image {len(self.views)}"] * len(views)

    def write_answers(self, batch: list[dict], encoded: list[str], on_text: Any) -> list[dict]:
        self._note(batch, encoded)
        return [{"text": self.text}] * len(batch)

    def find_entities(self, batch: list[dict], encoded: list[str]) -> list[dict]:
        self._note(batch, encoded)
        return [self._found(inputs) for inputs in batch]

    def _note(self, batch: list[dict], encoded: list[str]) -> None:
        assert not self.training and not torch.is_grad_enabled()
        assert encoded == [f"image {len(self.views)}"]
        self.inputs += batch

    def _found(self, inputs: dict) -> dict:
        entities = inputs["entities_full"]
        if inputs["task"] == "panoptic":
            ids = torch.as_tensor(entities.ids)
            info = [{"id": 1, "category_id": 4, "isthing": 0, "score": 0.5}]
            return {"panoptic_seg": (ids, info)}
        grounding = []
        for index, phrase in enumerate(inputs["phrases"]):
            chosen = sorted({index % entities.num_entities, entities.num_entities - 1})
            grounding.append(
                {
                    "phrase": phrase["text"],
                    "start": phrase["start"],
                    "end": phrase["end"],
                    "entity_ids": [entities.segment_ids[k] for k in chosen],
                    "scores": [0.75] * len(chosen),
                    "mask": entities.union(chosen),
                }
            )
        return {"grounding": grounding}


def _predictor(cfg: Any, scene: tuple, text: str = "") -> tuple[GellaPredictor, StubModel]:
    model = StubModel(text)
    predictor = GellaPredictor(cfg, model=model)
    predictor.set_image(*scene)
    return predictor, model


def test_ground_with_given_nouns(cfg: Any, scene: tuple) -> None:
    predictor, model = _predictor(cfg, scene)
    result = predictor.ground(CAPTION, ["A red circle", "two squares", "the sand"])
    inputs = model.inputs[0]
    assert [CAPTION[p["start"] : p["end"]] for p in inputs["phrases"]] == [
        "A red circle",
        "two squares",
        "the sand",
    ]
    assert len(inputs["seg_positions"]) == 3
    seg = predictor.tokenizer.convert_tokens_to_ids(prompts.SEG_TOKEN)
    assert (inputs["input_ids"][inputs["seg_positions"]] == seg).all()
    assert inputs["image"].shape == (3, 96, 96) and inputs["colormap"].shape == (3, 96, 96)
    assert (inputs["height"], inputs["width"]) == (60, 90)
    assert inputs["valid_size"] == (64, 96)
    assert result.colormap.shape == (64, 96, 3)
    assert result.untrained


def test_json_masks_decode_to_the_masks(cfg: Any, scene: tuple) -> None:
    predictor, _ = _predictor(cfg, scene)
    result = predictor.ground(CAPTION, ["A red circle", "two squares"])
    loaded = json.loads(json.dumps(result.to_json()))
    assert loaded["weights"] == "untrained" and loaded["caption"] == CAPTION
    assert loaded["num_entities"] == 4 and (loaded["height"], loaded["width"]) == (60, 90)
    entities = scene[1]
    for noun, phrase in zip(loaded["nouns"], result.phrases, strict=True):
        assert (mask_utils.decode(noun["mask"]).astype(bool) == phrase["mask"]).all()
        union = np.isin(entities.ids, noun["entity_numbers"])
        assert (union == phrase["mask"]).all()
        assert CAPTION[noun["start"] : noun["end"]] == noun["noun"]
    assert loaded["nouns"][1]["entity_ids"] == [5, 7]
    assert loaded["nouns"][1]["entity_numbers"] == [2, 4]


def test_masks_alone_as_rle(cfg: Any, scene: tuple) -> None:
    predictor, _ = _predictor(cfg, scene)
    result = predictor.ground(CAPTION, ["A red circle", "two squares"])
    coded = json.loads(json.dumps(result.to_rle()))
    assert [n["noun"] for n in coded["nouns"]] == ["A red circle", "two squares"]
    for noun, phrase in zip(coded["nouns"], result.phrases, strict=True):
        assert (mask_utils.decode(noun["mask"]).astype(bool) == phrase["mask"]).all()
    assert [(e["id"], e["number"]) for e in coded["entities"]] == [
        (11, 1),
        (5, 2),
        (300, 3),
        (7, 4),
    ]
    for entity in coded["entities"]:
        assert (mask_utils.decode(entity["mask"]) == (scene[1].ids == entity["number"])).all()


def test_a_panoptic_result_as_json(cfg: Any, scene: tuple) -> None:
    predictor, _ = _predictor(cfg, scene)
    result = predictor.panoptic([{"id": 4, "name": "sand", "isthing": 0}])
    loaded = json.loads(json.dumps(result.to_json()))
    (segment,) = loaded.pop("segments")
    assert loaded == {
        "task": "panoptic",
        "height": 60,
        "width": 90,
        "config": "",
        "weights": "untrained",
        "categories": [{"id": 4, "name": "sand", "isthing": 0}],
    }
    assert result.untrained
    assert (mask_utils.decode(segment["mask"]) == (result.ids == 1)).all()
    assert result.to_rle() == [{"id": 1, "mask": segment.pop("mask")}]
    assert segment == {
        "id": 1,
        "category_id": 4,
        "category": "sand",
        "isthing": False,
        "score": 0.5,
    }


def test_extracted_nouns_that_the_caption_lacks_are_dropped(cfg: Any, scene: tuple) -> None:
    text = prompts.noun_answer(["A red circle", "a unicorn", "the sand"])
    predictor, model = _predictor(cfg, scene, text)
    result = predictor.ground(CAPTION)
    assert [phrase["phrase"] for phrase in result.phrases] == ["A red circle", "the sand"]
    asked = model.inputs[0]
    assert asked["task"] == "extract" and len(asked["seg_positions"]) == 0
    assert predictor.extract_nouns(CAPTION) == ["A red circle", "a unicorn", "the sand"]
    assert predictor.describe() == text


@pytest.mark.parametrize("text", ["", "There is one semantic noun, including a unicorn <SEG>."])
def test_caption_without_nouns(cfg: Any, scene: tuple, text: str) -> None:
    predictor, _ = _predictor(cfg, scene, text)
    with pytest.raises(ValueError, match="caption without nouns.*red circle"):
        predictor.ground(CAPTION)


def test_wrong_texts(cfg: Any, scene: tuple) -> None:
    predictor, _ = _predictor(cfg, scene)
    with pytest.raises(ValueError, match="caption is empty"):
        predictor.ground("  ", ["a"])
    with pytest.raises(ValueError, match="caption without nouns"):
        predictor.ground(CAPTION, [])
    with pytest.raises(ValueError, match="caption without nouns"):
        predictor.ground(CAPTION, ["A red circle", " "])
    with pytest.raises(ValueError, match="expression is empty"):
        predictor.refer("")
    with pytest.raises(ValueError, match="no category"):
        predictor.panoptic([])
    with pytest.raises(ValueError, match="1024"):
        predictor.ground(CAPTION * 100, ["A red circle"])
    with pytest.raises(ValueError, match="<SEG>"):
        predictor.ground("a <SEG> here", ["a"])


def test_nouns_out_of_order_or_absent(cfg: Any, scene: tuple) -> None:
    predictor, _ = _predictor(cfg, scene)
    result = predictor.ground(CAPTION, ["the sand", "a red circle", "a unicorn"])
    spans = [(phrase["start"], phrase["end"]) for phrase in result.phrases]
    assert spans == [(32, 40), (0, 12), (-1, -1)]
    assert result.plot().width >= 640


def test_refer_and_panoptic(cfg: Any, scene: tuple) -> None:
    predictor, model = _predictor(cfg, scene)
    result = predictor.refer("the circle on the left")
    assert result.task == "refer" and len(result.phrases) == 1
    assert model.inputs[-1]["task"] == "refer"
    categories = [
        {"id": 4, "name": "sand", "isthing": 0},
        {"id": 9, "name": "wall-other-merged", "isthing": 1},
    ]
    panoptic = predictor.panoptic(categories)
    inputs = model.inputs[-1]
    assert [p["category_id"] for p in inputs["phrases"]] == [4, 9]
    assert len(inputs["seg_positions"]) == 2
    assert panoptic.ids.dtype == np.int32
    assert panoptic.plot().width >= 640
    named = predictor.panoptic(["dog", "cat"])
    assert [c["id"] for c in named.categories] == [1, 2]


def test_asking_before_set_image(cfg: Any) -> None:
    predictor = GellaPredictor(cfg, model=StubModel())
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.refer("the dog")


def test_a_segmenter_by_name_is_loaded_once(
    cfg: Any, scene: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, str]] = []

    class Whole(Segmenter):
        def predict(self, images: Any) -> list:
            return [(np.ones((1, *images[0].shape[:2]), bool), np.ones(1, np.float32))]

    def load(spec: str, device: str) -> Segmenter:
        loaded.append((spec, device))
        return Whole()

    monkeypatch.setattr("gella.predictor.engine.load_segmenter", load)
    predictor, _ = _predictor(cfg, scene)
    for spec in ("sam:a", "sam:a", "transformers:b"):
        found = predictor.encode(scene[0], spec)
        assert found.entities.areas().tolist() == [60 * 90]
    assert loaded == [("sam:a", "cpu"), ("transformers:b", "cpu")]


def test_colours_repeat_per_image_id(cfg: Any, scene: tuple) -> None:
    predictor, _ = _predictor(cfg, scene)
    maps = []
    for image_id in (1, 2, 1):
        predictor.set_image(*scene, image_id=image_id)
        maps.append(predictor.refer("x").colormap)
    assert (maps[0] == maps[2]).all() and (maps[0] != maps[1]).any()


def test_same_input_as_the_dataset_mapper(cfg: Any, scene: tuple, tmp_path) -> None:
    image, _ = scene
    ids = scene[1].ids
    Image.fromarray(image).save(tmp_path / "000000000012.png")
    Image.fromarray(id_to_rgb(ids)).save(tmp_path / "masks.png")
    nouns = ["A red circle", "the sand"]
    spans = locate_phrases(CAPTION, nouns)
    record = {
        "file_name": str(tmp_path / "000000000012.png"),
        "image_id": 12,
        "height": 60,
        "width": 90,
        "entities": {"format": "panoptic_png", "file_name": str(tmp_path / "masks.png")},
        "caption": CAPTION,
        "phrases": [
            {"text": n, "start": s, "end": e, "segment_ids": [1], "is_plural": 0, "is_thing": 1}
            for n, (s, e) in zip(nouns, spans, strict=True)
        ],
        "tasks": ("ground",),
    }
    mapped = GroundingMapper(cfg, is_train=False, dataset_names=())(record)
    model = StubModel()
    predictor = GellaPredictor(cfg, model=model)
    predictor.set_image(record["file_name"], tmp_path / "masks.png")
    predictor.ground(CAPTION, nouns)
    inputs = model.inputs[0]
    assert inputs["image_id"] == 12
    for key in ("image", "colormap", "input_ids", "labels", "seg_positions"):
        assert torch.equal(inputs[key], mapped[key]), key
    for key in ("valid_size", "height", "width", "caption", "task"):
        assert inputs[key] == mapped[key], key
    assert (inputs["entities_full"].ids == mapped["entities_full"].ids).all()
    assert (inputs["entities"].ids == mapped["entities"].ids).all()


def test_image_id_of() -> None:
    assert image_id_of("val2017/000000142238.jpg") == 142238
    assert image_id_of("a/my dog.png") == "my dog"


def test_wrong_images(cfg: Any, scene: tuple, tmp_path) -> None:
    predictor, _ = _predictor(cfg, scene)
    image, entities = scene
    with pytest.raises(ValueError, match="90x60.*90x59"):
        predictor.set_image(image[:59], entities)
    empty = EntityMap.from_id_image(np.zeros((60, 90), dtype=np.int32))
    with pytest.raises(ValueError, match="no entity"):
        predictor.set_image(image, empty)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        predictor.set_image(tmp_path / "nowhere.png", entities)


def test_real_model_and_its_weights(cfg: Any, scene: tuple, tmp_path) -> None:
    torch.manual_seed(0)
    first = GellaPredictor(cfg)
    first.set_image(*scene, image_id=1)
    before = first.ground(CAPTION, ["A red circle", "two squares", "the sand"])
    assert [len(p["entity_ids"]) >= 1 for p in before.phrases] == [True] * 3
    assert set(before.phrases[0]["entity_ids"]) <= {11, 5, 300, 7}
    assert before.phrases[0]["mask"].shape == (60, 90)
    file = tmp_path / "weights.pth"
    torch.save({"model": first.model.state_dict()}, file)
    torch.manual_seed(1)
    cfg.MODEL.WEIGHTS = str(file)
    second = GellaPredictor(cfg)
    second.set_image(*scene, image_id=1)
    after = second.ground(CAPTION, ["A red circle", "two squares", "the sand"])
    assert not after.untrained and after.to_json()["weights"] == str(file)
    scores = [[p["scores"] for p in r.phrases] for r in (before, after)]
    assert scores[0] == scores[1]
    panoptic = second.panoptic(["circle", "sand"])
    assert panoptic.ids.shape == (60, 90)
    assert isinstance(second.describe(), str)


def test_weights_that_do_not_fit(cfg: Any, tmp_path) -> None:
    model = GellaPredictor(cfg).model
    state = model.state_dict()
    key = next(iter(state))
    torch.save({"model": {k: v for k, v in state.items() if k != key}}, tmp_path / "less.pth")
    torch.save({"model": {**state, "surplus": torch.zeros(1)}}, tmp_path / "more.pth")
    for name, word in (("less", key), ("more", "surplus")):
        cfg.MODEL.WEIGHTS = str(tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=word):
            GellaPredictor(cfg)
    with pytest.raises(FileNotFoundError):
        load_weights(model, str(tmp_path / "none.pth"), cfg)


def test_real_images_with_crowd_and_void(cfg: Any, coco_sample: Path) -> None:
    panoptic = json.loads((coco_sample / "annotations" / "panoptic_val2017.json").read_text())
    infos = {str(a["image_id"]): a for a in panoptic["annotations"]}
    narratives = json.loads((coco_sample / "annotations" / "png_coco_val2017.json").read_text())
    predictor = GellaPredictor(cfg)
    for record in narratives:
        info = infos[record["image_id"]]
        crowd = {s["id"] for s in info["segments_info"] if s["iscrowd"]}
        predictor.set_image(
            coco_sample / "val2017" / info["file_name"].replace(".png", ".jpg"),
            coco_sample / "annotations" / "panoptic_val2017" / info["file_name"],
            segments_info=info["segments_info"],
        )
        nouns = [s["utterance"] for s in record["segments"] if s["noun"]]
        result = predictor.ground(record["caption"], nouns)
        assert len(result.phrases) == len(nouns)
        assert result.entities.num_entities == len(info["segments_info"]) - len(crowd)
        assert min(phrase["start"] for phrase in result.phrases) >= 0
        for phrase in result.phrases:
            assert phrase["entity_ids"] and not crowd & set(phrase["entity_ids"])
            # The model's masks never reach into crowd or void: entities answer with their own.
            assert (result.entities.ids[phrase["mask"]] > 0).all()
        assert result.plot().width >= 1280


def test_config_errors(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")
    file = tmp_path / "wrong.yaml"
    for text, word in (
        ("MODEL:\n  GELA: 1\n", r"MODEL\.GELA"),
        ("MODEL: [", "wrong.yaml"),
        ("MODEL:\n  GELLA:\n    SNAP: word\n", r"MODEL\.GELLA\.SNAP"),
        ("just text\n", "wrong.yaml"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=word) as caught:
            load_config(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"MODEL\.NO_SUCH"):
        load_config(TINY, ["MODEL.NO_SUCH", "1"])
    with pytest.raises(ValueError, match="pairs"):
        load_config(TINY, ["MODEL.DEVICE"])


def test_from_config_falls_back_to_the_cpu(tokenizer_dir: Path) -> None:
    opts = ["MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir)]
    predictor = GellaPredictor.from_config(TINY, weights="", device="cuda", opts=opts)
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert predictor.cfg.MODEL.DEVICE == wanted
    assert predictor.config_file == str(TINY)
    assert predictor.cfg.MODEL.WEIGHTS == ""
    assert predictor.cfg.MODEL.LANGUAGE.DTYPE == "float32"
    with pytest.raises(ValueError, match="dtype 'half' is unknown; use one of float32, bfloat16"):
        GellaPredictor.from_config(TINY, weights="", dtype="half", opts=opts)


def test_config_is_left_as_it_was(cfg: Any) -> None:
    reference = get_cfg()
    gella.add_gella_config(reference)
    before = cfg.dump()
    GellaPredictor(cfg, model=StubModel())
    assert cfg.dump() == before and not cfg.is_frozen()

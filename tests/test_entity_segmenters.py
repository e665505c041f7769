"""Live segmenters: tiny random models saved by their own libraries, and what is done with masks."""

import os
import pickle
import shutil
import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from packaging.version import Version
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_segmenters import save_eomt, save_mask2former, save_sam, save_sam2, save_sam3, save_toy
from tiny_weights import fill_hub

from gella.entities.sources import load_from_record, source_for
from gella.segmenters.from_detectron2 import resized_size
from gella.segmenters.from_transformers import at_hand, how_to_find
from gella.segmenters.segmenter import MaskLimits, Segmenter, SegmenterSource, load_segmenter

SAM_OPTIONS = {"points_per_side": "4", "pred_iou_thresh": "-1000"}
SAM_OPTIONS |= {"stability_score_thresh": "0", "nms_thresh": "0.99"}


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models, whole and damaged; not to be changed."""
    root = tmp_path_factory.mktemp("models")
    sam, mask2former = save_sam(root / "sam"), save_mask2former(root / "mask2former")
    toy, cut = root / "toy", shutil.copytree(sam, root / "cut")
    save_toy(toy)
    whole = (toy / "toy.pth").read_bytes()
    (toy / "cut.pth").write_bytes(whole[: len(whole) // 2])
    evil = {"model": {"levels": Evil()}}
    (toy / "evil.pkl").write_bytes(pickle.dumps(evil))
    weights = {"empty": {"model": {}}, "shape": {"model": {"levels": torch.zeros(3)}}}
    for name, content in {**weights, "list": [1, 2], "evil": evil}.items():
        torch.save(content, toy / f"{name}.pth")
    (toy / "arch.yaml").write_text("MODEL: {META_ARCHITECTURE: Unheard}\n")
    (toy / "code.yaml").write_text("OUTPUT_DIR: !!python/object/apply:os.mkdir ['ran']\n")
    sam3, detector = save_sam3(root / "sam3"), root / "detector"
    hf.Sam3Config().save_pretrained(detector)
    with (cut / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    folders = {"sam": sam, "sam3": sam3, "detector": detector, "mask2former": mask2former}
    return SimpleNamespace(**folders, toy=toy, cut=cut)


def boxes(*corners):
    masks = np.zeros((len(corners), 10, 12), dtype=bool)
    for mask, (top, left, bottom, right) in zip(masks, corners):
        mask[top:bottom, left:right] = True
    return masks


def test_limits_leave_out_small_weak_and_surplus_masks():
    masks = boxes((0, 0, 4, 4), (0, 6, 2, 8), (5, 0, 9, 4), (5, 6, 9, 10))
    scores = np.array([0.5, 0.99, 0.9, 0.8], dtype=np.float32)
    for limits, kept in (
        ({}, [0, 1, 2, 3]),
        ({"min_area": 5, "min_score": 0.6}, [2, 3]),
        ({"max_entities": 2}, [1, 2]),
    ):
        found = MaskLimits(**limits).flatten(masks, scores)
        assert np.array_equal(found.bitmasks(), masks[kept])
        assert found.segment_ids == list(range(1, len(kept) + 1))
        np.testing.assert_allclose(found.scores, scores[kept])


def test_a_covered_mask_is_whole_and_equal_ones_are_one():
    masks = boxes((0, 0, 5, 5), (0, 0, 5, 4), (0, 0, 5, 5), (6, 6, 10, 12))
    scores = np.array([0.2, 0.9, 0.1, 0.5], dtype=np.float32)
    kept = MaskLimits(min_area=6).flatten(masks, scores)
    assert kept.areas().tolist() == [25, 20, 24] and kept.segment_ids == [1, 2, 3]
    assert kept.index_of(3) == 2
    none = MaskLimits(min_score=1.0).flatten(masks, scores)
    assert none.num_entities == 0 and none.size == (10, 12)
    for wrong in ({"min_area": -1}, {"max_entities": 0}):
        refused("give", MaskLimits, **wrong)


class Fixed(Segmenter):
    def __init__(self, masks, scores):
        self.answer = (masks, np.array(scores, dtype=np.float32))

    def predict(self, images):
        return [self.answer for _ in images]


@pytest.mark.parametrize("segmenter, image, message", [
    (Fixed(boxes((0, 0, 4, 4)), [1]), np.zeros((12, 10, 3), np.uint8), r"10x12 \(width x"),
    (Fixed(boxes((0, 0, 4, 4)), [np.nan]), np.zeros((10, 12, 3), np.uint8), "no numbers"),
    (Fixed(boxes(), []), np.zeros((10, 12), np.uint8), "uint8"),
    (Fixed(boxes(), []), np.zeros((10, 12, 3), np.float32), "float32"),
])  # fmt: skip
def test_wrong_answers_and_images_are_refused(segmenter, image, message):
    refused(message, segmenter.segment, image)


@pytest.mark.parametrize("name, height, width", [("sam", 48, 70), ("sam3", 70, 70)])
def test_sam_gives_the_masks_of_the_pipeline(models, name, height, width):
    folder, image = getattr(models, name), picture(height, width)
    spec = f"sam:{folder}"
    segmenter = load_segmenter(spec, "cpu", SAM_OPTIONS)
    ((masks, scores),) = segmenter.predict([image])
    options = {key: float(value) for key, value in SAM_OPTIONS.items()}
    options["points_per_crop"] = int(options.pop("points_per_side"))
    options["crops_nms_thresh"] = options.pop("nms_thresh")
    generate = hf.pipeline("mask-generation", model=str(folder), device="cpu")
    reference = generate(Image.fromarray(image), **options)
    assert masks.shape[0] >= 2 and masks.shape[1:] == (height, width)
    assert (masks == np.stack([np.asarray(mask) for mask in reference["masks"]])).all()
    np.testing.assert_allclose(scores, np.asarray(reference["scores"]), rtol=1e-6)
    entities = segmenter.segment(image)
    assert entities.size == (height, width) and entities.num_entities >= 2
    distrustful = {"points_per_side": "2", "pred_iou_thresh": "1000"}
    none = load_segmenter(spec, "cpu", distrustful).segment(picture(40, 64))
    assert none.num_entities == 0 and none.size == (40, 64)


@pytest.mark.parametrize("save, side, rule", [
    (save_sam2, 128, hf.Sam2Processor),
    (save_sam3, 112, hf.Sam3TrackerProcessor),
])  # fmt: skip
def test_sam2_and_3_ask_all_of_an_image_that_is_not_square(tmp_path, save, side, rule):
    """The grid of points, brought back by the processor's own rule, spreads over every crop."""
    segmenter = load_segmenter(f"sam:{save(tmp_path / 'm')}", "cpu", SAM_OPTIONS)
    processor = segmenter._pipeline.image_processor
    steps = (torch.arange(4) + 0.5) / 4
    # transformers 5.20 stacks crops of an image that is not square, which are of two sizes.
    crops_too = Version(hf.__version__) >= Version("5.23")
    for layers, size in product((0, 1)[: 1 + crops_too], ((48, 96), (96, 40), (64, 64))):
        image = Image.fromarray(picture(*size))
        _, points, crops, _ = processor.generate_crop_boxes(image, side, layers, 0.3, 4)
        assert len(crops) == (1 if layers == 0 else 5)
        for number, crop in enumerate(crops):
            height, width = crop.shape[-2:]
            pixels = torch.stack(torch.meshgrid(steps * width, steps * height, indexing="xy"), -1)
            asked = rule(processor, target_size=side)(
                images=Image.fromarray(crop.permute(1, 2, 0).numpy().astype(np.uint8)),
                input_points=[[pixels.reshape(-1, 2).tolist()]],
                return_tensors="pt",
            )["input_points"]
            close = {"rtol": 0, "atol": 1e-3}
            torch.testing.assert_close(points[0, :, number], asked[0, 0].float(), **close)
    images = [picture(48, 96), picture(64, 40, seed=1)]
    for image, entities in zip(images, segmenter.segment_batch(images)):
        assert entities.size == image.shape[:2] and entities.num_entities >= 1


def test_mask2former_gives_the_segments_of_its_post_processing(models):
    image = picture(50, 64)
    loose = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    options = {key: str(value) for key, value in loose.items()}
    segmenter = load_segmenter(f"transformers:{models.mask2former}", "cpu", options)
    ((masks, scores),) = segmenter.predict([image])
    model = hf.Mask2FormerForUniversalSegmentation.from_pretrained(models.mask2former).eval()
    processor = hf.AutoImageProcessor.from_pretrained(models.mask2former)
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(image), return_tensors="pt"))
    found = processor.post_process_panoptic_segmentation(
        outputs, label_ids_to_fuse=set(), target_sizes=[(50, 64)], **loose
    )[0]
    assert len(found["segments_info"]) == len(masks) >= 2
    for mask, score, segment in zip(masks, scores, found["segments_info"]):
        assert (mask == (found["segmentation"].numpy() == segment["id"])).all()
        assert score == pytest.approx(segment["score"], rel=1e-5)
    assert masks.sum(0).max() == 1  # panoptic: no overlaps


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_other_images_of_a_batch_change_nothing(models, task):
    """Padding to a common size would stretch the masks of the smaller image."""
    images = [picture(48, 64), picture(96, 64, seed=1), picture(48, 64, seed=2)]
    options = {"task": task, "threshold": "0.0", "overlap_mask_area_threshold": "0.0"}
    segmenter = load_segmenter(f"transformers:{models.mask2former}", "cpu", options)
    together = segmenter.predict(images)
    for image, (masks, scores) in zip(images, together):
        assert masks.shape[1:] == image.shape[:2] and len(masks) >= 1
        ((alone, alone_scores),) = segmenter.predict([image])
        assert (masks == alone).all()
        np.testing.assert_allclose(scores, alone_scores, atol=1e-5)


@pytest.mark.parametrize("task, dinov3", product(("panoptic", "instance"), (False, True)))
def test_eomt_gives_the_segments_of_its_post_processing(tmp_path, task, dinov3):
    folder, image = save_eomt(tmp_path, dinov3), picture(48, 96)
    visible = {"overlap_mask_area_threshold": 0.0} if task == "panoptic" else {}
    loose = {"threshold": 0.0, **visible}
    options = {"task": task} | {key: str(value) for key, value in loose.items()}
    ((masks, scores),) = load_segmenter(f"transformers:{folder}", "cpu", options).predict([image])
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(images=Image.fromarray(image), return_tensors="pt")
        outputs = hf.AutoModelForUniversalSegmentation.from_pretrained(folder)(**inputs)
    post = getattr(processor, f"post_process_{task}_segmentation")
    (found,) = post(outputs, target_sizes=[(48, 96)], **loose)
    ids = [segment["id"] for segment in found["segments_info"]]
    assert len(ids) >= 2 and masks.shape[1:] == (48, 96)
    assert (masks == np.stack([found["segmentation"].numpy() == number for number in ids])).all()
    np.testing.assert_allclose(scores, [s["score"] for s in found["segments_info"]], atol=1e-6)


def test_instances_of_a_model_may_overlap_and_none_may_be_found(models):
    spec, image = f"transformers:{models.mask2former}", picture(48, 64)
    loose = load_segmenter(spec, "cpu", {"task": "instance", "threshold": "0"})
    ((masks, _),) = loose.predict([image])
    assert len(masks) >= 2 and masks.sum(0).max() >= 2
    entities = loose.segment(image)
    assert 1 <= entities.num_entities <= len(masks)
    for task in ("panoptic", "instance"):
        strict = load_segmenter(spec, "cpu", {"task": task, "threshold": "1.1"})
        assert strict.segment(image).num_entities == 0


def test_models_whose_masks_would_be_wrong_are_refused(models, tmp_path):
    padded = shutil.copytree(models.mask2former, tmp_path / "padded")
    size = {"shortest_edge": 64, "longest_edge": 128}
    pad = {"height": 256, "width": 256}
    hf.Mask2FormerImageProcessor(size=size, pad_size=pad).save_pretrained(padded)
    refused("pad_size", load_segmenter(f"transformers:{padded}", "cpu").segment, picture(48, 64))
    for wrong in ({"do_split_image": True}, {"do_pad": False}):  # as of semantic EoMT models
        eomt = save_eomt(tmp_path / "eomt", **wrong)
        refused("cuts pictures into pieces", load_segmenter, f"transformers:{eomt}", "cpu")
    lacking = shutil.copytree(models.mask2former, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    name = next(key for key in weights if "class_predictor" in key)
    del weights[name]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    refused(f"1 weights are missing.*{name}", load_segmenter, f"transformers:{lacking}", "cpu")


def reds_and_blues(height=20, width=30):
    image = np.full((height, width, 3), 10, dtype=np.uint8)
    image[2:8, 3:9, 0], image[10:18, 12:28, 2] = 250, 250
    return image


def test_detectron2_instances_panoptic_segments_and_overrides(tmp_path):
    for order in ("RGB", "BGR"):
        spec = save_toy(tmp_path, f"  FORMAT: {order}")
        segmenter = load_segmenter(spec, "cpu")
        entities = segmenter.segment(reds_and_blues())
        assert entities.bitmasks().shape == (2, 20, 30)
        assert entities.bitmasks()[0].nonzero()[0].min() == 2  # red is first, in both orders
        assert entities.areas().tolist() == [36, 128]
        np.testing.assert_allclose(entities.scores, [0.9, 0.6])
        black = segmenter.segment(np.zeros((9, 7, 3), np.uint8))
        assert black.num_entities == 0 and black.size == (9, 7)
    given = {"setup": "tiny_segmenters:add_toy_config", "TOY_PANOPTIC": "True"}
    panoptic = load_segmenter(spec, "cpu", given).segment(reds_and_blues())
    assert panoptic.areas().tolist() == [36, 128] and panoptic.scores.tolist() == [1.0, 1.0]
    scored = load_segmenter(spec, "cpu", {**given, "output": "instances"})
    np.testing.assert_allclose(scored.segment(reds_and_blues()).scores, [0.9, 0.6])
    lacking = load_segmenter(spec, "cpu", {"output": "panoptic_seg"})
    refused("gives instances but no panoptic_seg", lacking.segment, reds_and_blues())


def test_detectron2_resizes_as_at_test_time(tmp_path):
    spec = save_toy(tmp_path)
    options = {"INPUT.MIN_SIZE_TEST": "40", "INPUT.MAX_SIZE_TEST": "50"}
    segmenter = load_segmenter(spec, "cpu", options)
    segmenter.segment_batch([reds_and_blues(20, 30), reds_and_blues(20, 20)])
    assert segmenter._model.seen == [(33, 50, 20, 30), (40, 40, 20, 20)]
    assert resized_size(480, 640, 800, 1333) == (800, 1067)
    assert resized_size(200, 1000, 800, 1333) == (267, 1333)
    assert resized_size(33, 44, 0, 10) == (33, 44)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detectron2_weights_of_the_model_zoo(tmp_path, protocol):
    config, zoo = save_toy(tmp_path).split(":")[1], tmp_path / "zoo.pkl"
    levels = np.array([128, 128], dtype=np.float32)
    zoo.write_bytes(pickle.dumps({"model": {"levels": levels}, "__author__": "a zoo"}, protocol))
    entities = load_segmenter(f"detectron2:{config}:{zoo}", "cpu").segment(reds_and_blues())
    assert entities.areas().tolist() == [36, 128]


@pytest.mark.parametrize("spec, options, error, message", [
    ("yolo:x", {}, ValueError, "none of sam:PATH"),
    ("sam:", {}, ValueError, "none of sam:PATH"),
    ("detectron2:{toy}/toy.yaml", {}, ValueError, "lacks its weights"),
    ("sam:{toy}/nowhere", {}, FileNotFoundError, "nowhere does not exist"),
    ("transformers:./nowhere", {}, FileNotFoundError, "nowhere does not exist"),
    ("sam:{toy}", {}, ValueError, "cannot be loaded.*saved with its processor"),
    ("sam:{mask2former}", {}, ValueError, "cannot be loaded.*of this kind"),
    ("transformers:{sam}", {}, ValueError, "cannot be loaded.*of this kind"),
    ("sam:{detector}", {}, ValueError, "finds what a text names; give all of SAM 3"),
    ("transformers:{detector}", {}, ValueError, "finds what a text names"),
    ("sam:{cut}", {}, ValueError, "cannot be loaded"),
    ("sam:{sam}", {"device": "cuda:0"}, ValueError, "--device cpu"),
    ("sam:{sam}", {"device": "gpu"}, ValueError, "'gpu' is unknown"),
    ("sam:{sam}", {"size": "3"}, ValueError, "'size' is not known.*points_per_side"),
    ("sam:{sam}", {"points_per_side": "many"}, ValueError, "points_per_side=many.*side of"),
    ("sam:{sam}", {"points_per_side": "0"}, ValueError, "at least 1"),
    ("transformers:{mask2former}", {"task": "semantic"}, ValueError, "panoptic, instance"),
    ("detectron2:{toy}/no.yaml:{toy}/toy.pth", {}, FileNotFoundError, "no.yaml does not"),
    ("detectron2:{toy}/toy.yaml:{toy}/no.pth", {}, FileNotFoundError, "no.pth do not"),
    ("detectron2:{toy}/toy.yaml:{toy}/toy.pth", {"NO.KEY": "1"}, ValueError, "NO.KEY.*setup"),
    ("detectron2:{toy}/toy.yaml:{toy}/toy.pth", {"setup": "a.b:c"}, ValueError, "setup=a.b:c"),
    ("detectron2:{toy}/toy.yaml:{toy}/empty.pth", {}, ValueError, "1 missing.*levels"),
    ("detectron2:{toy}/toy.yaml:{toy}/shape.pth", {}, ValueError, "1 of another shape.*levels"),
    ("detectron2:{toy}/toy.yaml:{toy}/list.pth", {}, ValueError, "hold no tensors by key"),
    ("detectron2:{toy}/toy.yaml:{toy}/cut.pth", {}, ValueError, "cut.pth cannot be read"),
    ("detectron2:{toy}/toy.yaml:{toy}/evil.pkl", {}, ValueError, "evil.pkl cannot be read"),
    ("detectron2:{toy}/toy.yaml:{toy}/evil.pth", {}, ValueError, "evil.pth cannot be read"),
    ("detectron2:{toy}/arch.yaml:{toy}/toy.pth", {}, ValueError, "Unheard.*setup="),
    ("detectron2:{toy}/code.yaml:{toy}/toy.pth", {}, ValueError, "code.yaml"),
])  # fmt: skip
def test_one_clear_error(models, tmp_path, monkeypatch, spec, options, error, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, given = options.get("device", "cpu"), {k: options[k] for k in {*options} - {"device"}}
    with pytest.raises(error, match=message) as caught:
        load_segmenter(spec.format(**vars(models)), device, given)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_segmenter_is_a_source_that_a_config_can_name(tmp_path):
    Image.fromarray(reds_and_blues()).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "b.png")
    spec = save_toy(tmp_path)
    source = source_for([["my_*", "segmenter", spec]], "my_set")
    assert isinstance(source, SegmenterSource) and spec in str(source)
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 3, "height": 20, "width": 30}
    assert source.missing([record]) == []
    entities = load_from_record({**record, "entities": {"source": source}})
    assert entities.areas().tolist() == [36, 128]
    given = np.zeros((20, 30, 3), np.uint8)
    given[:3, :3, 0] = 255
    assert source.load(record, given).areas().tolist() == [9]  # the decoded picture is used
    copy = pickle.loads(pickle.dumps(source))  # without its model, to other processes
    assert copy._segmenter is None and copy.load(record).num_entities == 2
    empty = {"file_name": str(tmp_path / "b.png"), "image_id": "b", "height": 8, "width": 8}
    refused("image b .*found no entity", source.load, empty)
    refused("lacks its weights", source_for, [["*", "segmenter", "detectron2:x"]], "my_set")


def test_a_hub_that_does_not_answer_is_one_message_and_its_cache_is_used(
    tmp_path, monkeypatch, capfd
):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    for name, value in (("HF_HUB_OFFLINE", False), ("ENDPOINT", "http://127.0.0.1:9")):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert at_hand() == [] and how_to_find().startswith("--segmenter transformers:facebook/mask2f")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="segmenter sam:tiny/sam: http.* does not answer"):
        load_segmenter("sam:tiny/sam", "cpu")
    said = capfd.readouterr()
    assert "Retrying" not in said.err + said.out and time.monotonic() - began < 20
    save_sam(tmp_path / "models" / "sam")
    (tmp_path / "models" / "notes").mkdir()
    assert at_hand() == ["sam:models/sam"]
    assert how_to_find() == "--segmenter sam:models/sam (its weights are on this machine)"
    fill_hub(tmp_path / "cache", {"sam": tmp_path / "models" / "sam"})
    assert at_hand() == ["sam:tiny/sam", "sam:models/sam"]
    load_segmenter("sam:tiny/sam", "cpu", {"points_per_side": "2"})

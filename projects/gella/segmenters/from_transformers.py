"""Live segmenters of transformers: SAM's masks of everything, and Mask2Former and its relatives."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gella.segmenters.segmenter import Segmenter, one_of
from gella.utils.hub import cached_models, hub_options
from gella.utils.io import read_json

SUGGESTED = (
    "transformers:facebook/mask2former-swin-large-coco-panoptic",
    "transformers:tue-mps/coco_panoptic_eomt_large_640",
    "sam:facebook/sam-vit-base",
)
"""Specs of models on the hub that find everything in a photograph."""

_TYPES = {  # by the model_type of a config.json
    **dict.fromkeys(("sam", "sam_hq", "sam2", "sam2_video", "sam3_tracker", "sam3_video"), "sam"),
    **dict.fromkeys(("mask2former", "oneformer", "maskformer", "detr"), "transformers"),
    **dict.fromkeys(("eomt", "eomt_dinov3"), "transformers"),
}
_TOLD = ("sam3", "sam3_lite_text")  # detectors of what a text names, without the part for points


def at_hand() -> list[str]:
    """Specs of the segmenters whose weights are on this machine: in the hub's cache, or in a folder
    of ``models/`` here. Those of whole entities come first; SAM also finds their parts."""
    places = {str(folder): folder for folder in Path("models").glob("*")} | cached_models()
    specs = []
    for name, folder in places.items():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kind = _TYPES[read_json(folder / "config.json")["model_type"]]
            if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
                specs.append(f"{kind}:{name}")
    return sorted(specs, reverse=True)


def how_to_find() -> str:
    """The option to type for masks of pictures that have none."""
    if here := at_hand():
        return f"--segmenter {here[0]} (its weights are on this machine)"
    return f"--segmenter {SUGGESTED[0]} (or {', '.join(SUGGESTED[1:])})"


class SamSegmenter(Segmenter):
    """Masks of everything by SAM, SAM-HQ, SAM 2 or 3: a grid of points, each asked for its masks.

    Args:
        path: folder that `save_pretrained` wrote, or a hub name.
        device: as torch names it.
        options: see OPTIONS; defaults are those of transformers' mask-generation pipeline.

    Scores are SAM's estimates of the masks' IoU. Of SAM 3 only the tracker is loaded, which answers
    points without a word, so that its masks are class-agnostic; its detector finds the instances of
    one named concept, which leaves to the names what an entity is, and is refused when it is alone.
    """

    FORM = "sam:PATH"
    OPTIONS = {
        "points_per_side": (int, "side of the grid of points, default 32"),
        "points_per_batch": (int, "points at a time, default 64; fewer need less memory"),
        "crops": (int, "layers of crops that are asked again for small entities, default 0"),
        "pred_iou_thresh": (float, "least score of a mask, default 0.88"),
        "stability_score_thresh": (float, "least stability of a mask, default 0.95"),
        "nms_thresh": (float, "IoU of boxes over which the lower scored goes, default 0.7"),
    }
    _NAMES = {
        "points_per_side": "points_per_crop",
        "crops": "crops_n_layers",
        "nms_thresh": "crops_nms_thresh",
    }

    def __init__(self, path: str, device: str, **options: Any) -> None:
        from transformers import AutoImageProcessor, AutoModelForMaskGeneration
        from transformers.pipelines import MaskGenerationPipeline

        for name in ("points_per_side", "points_per_batch"):
            if options.get(name, 1) < 1:
                raise ValueError(f"segmenter option {name}={options[name]} must be at least 1")
        processor, model = _load("sam", path, AutoImageProcessor, AutoModelForMaskGeneration)
        _spread_points(processor)
        self._pipeline = MaskGenerationPipeline(
            model=model.to(device).eval(), image_processor=processor, device=torch.device(device)
        )
        self._options = {self._NAMES.get(key, key): value for key, value in options.items()}

    def predict(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `Segmenter.predict`; one image after the other, its points in batches."""
        results = []
        for image in images:
            answer = self._pipeline(Image.fromarray(image), **self._options)
            masks = np.zeros((0, *image.shape[:2]), dtype=bool)
            if len(answer["masks"]):
                masks = np.stack([np.asarray(mask, dtype=bool) for mask in answer["masks"]])
            results.append((masks, _to_numpy(answer["scores"])))
        return results


def _spread_points(processor: Any) -> None:
    """Make the grid of points of SAM 2 and SAM 3 cover the whole of an image that is not square.

    transformers scales the grid as for SAM, by the longest side, also where the processor squashes
    the image to a square (SAM 2, SAM 3, EdgeTAM): part of the image would never be asked.
    """
    size = processor.size
    if size.get("longest_edge") is not None:
        return
    original = processor.generate_crop_boxes

    @functools.wraps(original)
    def generate(image: Any, target_size: int, *args: Any, **kwargs: Any) -> Any:
        boxes, points, crops, labels = original(image, target_size, *args, **kwargs)
        for number, crop in enumerate(crops):
            height, width = crop.shape[-2:]
            scale = target_size / max(height, width)
            points[:, :, number, 0] *= size["width"] / int(width * scale + 0.5)
            points[:, :, number, 1] *= size["height"] / int(height * scale + 0.5)
        return boxes, points, crops, labels

    processor.generate_crop_boxes = generate


class UniversalSegmenter(Segmenter):
    """Panoptic or instance segments by Mask2Former, OneFormer, MaskFormer, DETR or EoMT.

    Args:
        path: folder that `save_pretrained` wrote (model and processor), or a hub name.
        device: as torch names it.
        task: "panoptic" (no overlaps, stuff included) or "instance".
        options: thresholds of the processor's post-processing, see OPTIONS.

    Class labels are dropped, and segments of one class are never fused.
    """

    FORM = "transformers:PATH"
    OPTIONS = {
        "task": (one_of("panoptic", "instance"), "panoptic (default) or instance"),
        "threshold": (float, "least score of a segment; default: the model's processor's"),
        "mask_threshold": (float, "probability over which a pixel belongs to it, default 0.5"),
        "overlap_mask_area_threshold": (float, "least share of it that stays visible, default 0.8"),
    }

    def __init__(self, path: str, device: str, task: str = "panoptic", **options: Any) -> None:
        import transformers as hf

        auto = (hf.AutoImageProcessor, hf.AutoProcessor)
        processor, model = _load("transformers", path, auto, hf.AutoModelForUniversalSegmentation)
        self._model, self._processor = model.to(device).eval(), processor
        self._device = device
        eomt = model.config.model_type.startswith("eomt")
        if eomt and (processor.do_split_image or not processor.do_pad):
            raise ValueError(
                f"segmenter transformers:{path} cuts pictures into pieces or does not pad them "
                "(do_split_image, do_pad), as semantic EoMT does; give a panoptic or instance model"
            )
        # OneFormer is told its task in words, by a processor that holds a tokenizer.
        self._told = {"task_inputs": [task]} if model.config.model_type == "oneformer" else {}
        name = f"post_process_{task}_segmentation"
        post = getattr(getattr(processor, "image_processor", processor), name, None)
        if post is None:
            raise ValueError(f"segmenter transformers:{path} has no {task} segmentation")
        accepted = inspect.signature(inspect.unwrap(post)).parameters
        unknown = sorted(options.keys() - accepted.keys())
        if unknown:
            raise ValueError(f"segmenter transformers:{path} has no option {unknown[0]} for {task}")
        wanted = {"label_ids_to_fuse": set(), "return_binary_maps": True, **options}
        arguments = {key: value for key, value in wanted.items() if key in accepted}
        self._post = functools.partial(post, **arguments)

    def predict(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `Segmenter.predict`; images of one size after preprocessing go in one batch."""
        # Prepared one by one: padding to a common size would stretch the masks, which are scaled to
        # the image as if no pixel were padding.
        prepared = [self._prepare(image) for image in images]
        groups: dict[Any, list[int]] = {}
        for number, inputs in enumerate(prepared):
            shapes = tuple((key, tuple(value.shape)) for key, value in inputs.items())
            groups.setdefault(shapes, []).append(number)
        results: list[Any] = [None] * len(images)
        for numbers in groups.values():
            batch = {
                key: torch.cat([prepared[number][key] for number in numbers]).to(self._device)
                for key in prepared[numbers[0]]
            }
            sizes = [images[number].shape[:2] for number in numbers]
            answers = self._post(self._model(**batch), target_sizes=sizes)
            for number, size, answer in zip(numbers, sizes, answers):
                results[number] = _segments(answer, size)
        return results

    def _prepare(self, image: np.ndarray) -> dict[str, torch.Tensor]:
        inputs = self._processor(images=Image.fromarray(image), return_tensors="pt", **self._told)
        mask = inputs.get("pixel_mask")
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                "the segmenter's processor pads every image to a fixed size, which would shift its "
                'masks; set "pad_size": null in its preprocessor_config.json'
            )
        accepted = inspect.signature(self._model.forward).parameters
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        return {key: value for key, value in tensors.items() if key in accepted}


def _segments(answer: dict[str, Any], size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool (E, H, W) and scores (E,) from what post-processing says of one image."""
    segments = answer["segments_info"]
    if not segments:
        return np.zeros((0, *size), dtype=bool), np.zeros(0, dtype=np.float32)
    scores = np.array([segment["score"] for segment in segments], dtype=np.float32)
    pixels = _to_numpy(answer["segmentation"])
    if pixels.ndim == 3:  # one map per instance, in the segments' order
        return pixels > 0.5, scores
    ids = np.array([segment["id"] for segment in segments])
    return pixels[None] == ids[:, None, None], scores


def _to_numpy(values: Any) -> np.ndarray:
    tensor = torch.as_tensor(values).detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def _load(kind: str, path: str, processor_class: Any, model_class: Any) -> tuple[Any, Any]:
    """Processor and model of a folder or hub name; weights that do not fit are refused.

    ``processor_class`` may be a pair; the second is OneFormer's.
    """
    from transformers import AutoConfig

    name = f"segmenter {kind}:{path}"
    folder = Path(path).expanduser()
    source = str(folder) if folder.is_dir() else path
    try:
        options = {"trust_remote_code": False, **hub_options(source)}
    except OSError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
    try:
        if AutoConfig.from_pretrained(source, **options).model_type in _TOLD:
            raise ValueError("it finds what a text names; give all of SAM 3, or its tracker")
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, weights_only=True, **options
        )
        if isinstance(processor_class, tuple):
            processor_class = processor_class[model.config.model_type == "oneformer"]
        processor = processor_class.from_pretrained(source, **options)
    except ImportError as error:
        raise ValueError(f"{name} needs a package: {_one_line(error)}") from error
    except Exception as error:  # transformers raises many types: no model, another kind, damaged
        hint = "is it a model of this kind, saved with its processor"
        hint += "?" if folder.is_dir() else ", and is the hub reachable?"
        raise ValueError(f"{name} cannot be loaded ({_one_line(error)}); {hint}") from error
    lacking = sorted(info["missing_keys"])
    odd = sorted(str(entry) for entry in info["mismatched_keys"])
    if lacking or odd:
        raise ValueError(
            f"{name}: {len(lacking)} weights are missing and {len(odd)} have another shape, for "
            f"instance {(lacking + odd)[0]}; they would stay random, copy the model again"
        )
    return processor, model


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 300 else (text[:300] + " ..." if text else type(error).__name__)

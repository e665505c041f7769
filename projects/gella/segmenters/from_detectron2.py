"""A live segmenter out of any Detectron2 model, given by its config and weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image

from gella.segmenters.segmenter import Segmenter, one_of
from gella.utils.io import NUMPY_PARTS, read_pickle


class Detectron2Segmenter(Segmenter):
    """Instances or panoptic segments of a Detectron2 model, without their classes.

    Args:
        config: YAML file.
        weights: .pth, or a .pkl of the model zoo; only arrays are read from either.
        device: as torch names it.
        overrides: config values by key, as text; `load_segmenter` takes them as options.
        setup: ``MODULE:FUNCTION``, several separated by commas: imported, which registers a
            project's models, and called with the config, to which it adds the project's keys.
        output: "instances", "panoptic_seg" or "auto": panoptic_seg if the model gives it.

    Pictures are scaled as by Detectron2 at test time (``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``).
    """

    FORM = "detectron2:CONFIG:WEIGHTS"
    OPTIONS = {
        "setup": (str, "MODULE:FUNCTION[,...] that adds a project's keys to the config"),
        "output": (
            one_of("auto", "instances", "panoptic_seg"),
            "instances, panoptic_seg or auto (default: panoptic_seg if there is one)",
        ),
    }

    def __init__(
        self,
        config: str,
        weights: str,
        device: str,
        overrides: Mapping[str, str] | None = None,
        *,
        setup: str = "",
        output: str = "auto",
    ) -> None:
        self._cfg = _read_config(config, overrides or {}, setup)
        self._cfg.MODEL.DEVICE, self._cfg.MODEL.WEIGHTS = device, ""
        if "://" not in weights and not Path(weights).is_file():
            raise FileNotFoundError(f"segmenter weights {weights} do not exist; check the path")
        try:
            self._model = build_model(self._cfg).eval()
        except KeyError as error:
            raise ValueError(
                f"segmenter config {config}: {error.args[0]}; name the project that registers it "
                "by setup=MODULE:FUNCTION"
            ) from error
        try:
            _PlainCheckpointer(self._model).load(weights, checkpointables=[])
        except (AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"segmenter weights {weights}: {reason}") from error
        self._output = output

    @classmethod
    def parse_options(cls, options: Mapping[str, str]) -> dict[str, Any]:
        """See `Segmenter.parse_options`; names with a capital are config keys, for the config."""
        keys = {name: value for name, value in options.items() if name[:1].isupper()}
        others = {name: value for name, value in options.items() if name not in keys}
        return {"overrides": keys, **super().parse_options(others)}

    def predict(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See `Segmenter.predict`; all images are given to the model in one call."""
        inputs = [self._prepare(image) for image in images]
        answers = self._model(inputs)
        return [self._masks(answer, image) for answer, image in zip(answers, images)]

    def _prepare(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        bounds = self._cfg.INPUT.MIN_SIZE_TEST, self._cfg.INPUT.MAX_SIZE_TEST
        size = resized_size(height, width, *bounds)
        if size != (height, width):
            image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        if self._cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32))
        return {"image": tensor, "height": height, "width": width}

    def _masks(self, answer: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = self._output
        if wanted == "auto":
            wanted = "panoptic_seg" if "panoptic_seg" in answer else "instances"
        if wanted not in answer:
            raise ValueError(
                f"the Detectron2 model gives {', '.join(sorted(answer))} but no {wanted}; use a "
                "model of instance or panoptic segmentation"
            )
        if wanted == "panoptic_seg":
            ids, segments = answer["panoptic_seg"]
            numbers = np.array([segment["id"] for segment in segments or ()], dtype=np.int64)
            scores = np.array([segment.get("score", 1.0) for segment in segments or ()], np.float32)
            return ids.cpu().numpy()[None] == numbers[:, None, None], scores
        instances = answer["instances"].to("cpu")
        if not instances.has("pred_masks"):
            raise ValueError("the Detectron2 model gives boxes without masks; use one with masks")
        masks = instances.pred_masks
        masks = torch.as_tensor(getattr(masks, "tensor", masks))  # of BitMasks
        ranks = instances.scores if instances.has("scores") else torch.ones(len(masks))
        if len(masks) == 0:  # heads without a detection give their masks any size
            masks = torch.zeros((0, *image.shape[:2]))
        return (masks if masks.dtype == torch.bool else masks > 0.5).numpy(), ranks.float().numpy()


def resized_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) after Detectron2's resize of the shortest side, bounded by the longest.

    ``shortest`` 0 leaves the image as it is.
    """
    if shortest == 0:
        return height, width
    scale = shortest / min(height, width)
    if scale * max(height, width) > longest:
        scale = longest / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _read_config(config: str, overrides: Mapping[str, str], setup: str) -> Any:
    if not Path(config).is_file():
        raise FileNotFoundError(f"segmenter config {config} does not exist; check the path")
    if config.endswith(".py"):
        raise ValueError(f"segmenter config {config} is a program; give a YAML config")
    cfg = get_cfg()
    for entry in filter(None, setup.split(",")):
        module, _, function = entry.partition(":")
        try:
            add = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"segmenter option setup={entry}: {error}; give MODULE:FUNCTION, importable "
                "(PYTHONPATH)"
            ) from error
        add(cfg)
    try:
        cfg.merge_from_file(config, allow_unsafe=False)
        cfg.merge_from_list([part for item in overrides.items() for part in item])
    except Exception as error:  # yacs and YAML raise many types
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(
            f"segmenter config {config}: {text}; keys of a project come with setup=MODULE:FUNCTION"
        ) from error
    return cfg


class _PlainCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that runs no code of the file and refuses weights that miss."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith((".pkl", ".pyth")):
                loaded = read_pickle(filename, NUMPY_PARTS, encoding="latin1")
            else:
                loaded = torch.load(filename, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise many types for a damaged file
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"segmenter weights {filename} cannot be read ({text})") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"segmenter weights {filename} hold no tensors by key")
        return loaded if "model" in loaded else {"model": loaded}

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        # After the model's own renaming of old keys, unlike a check of the file.
        missing = list(incompatible.missing_keys)
        odd = [str(entry[0]) for entry in incompatible.incorrect_shapes]
        if missing or odd:
            raise ValueError(
                f"segmenter weights do not fit the config: {len(missing)} missing and {len(odd)} "
                f"of another shape, for instance {(missing + odd)[0]}; give the config they were "
                "trained with"
            )
        super()._log_incompatible_keys(incompatible)

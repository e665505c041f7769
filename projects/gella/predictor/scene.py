"""One picture with its entities, as the predictor takes it: of every kind, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from gella.entities.entity_map import EntityMap, binary_masks, rgb_to_id
from gella.entities.rle import OtherSize, check_size, encode_mask, encode_segmentation
from gella.entities.sources import load_entities
from gella.segmenters.segmenter import KINDS, Segmenter

EntitiesLike = EntityMap | np.ndarray | str | Path | Segmenter | Any
"""What the predictor takes for entities; see :func:`read_entities`."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and its entities, and what the model computed of them once.

    Nothing in it changes any more, so that threads and questions may share it. Scenes are equal
    only to themselves.

    Attributes:
        image: uint8 (H, W, 3) RGB; read-only.
        entities: in the frame of ``image``; at least one.
        image_id: picked its masks in a file of many.
        view: what mapped dicts say of the picture; for the predictor.
        encoded: what the model computed once; for the predictor.
    """

    image: np.ndarray
    entities: EntityMap
    image_id: int | str | None = None
    view: dict[str, Any] = field(default_factory=dict, repr=False)
    encoded: Any = field(default=None, repr=False)

    @property
    def colormap(self) -> np.ndarray:
        """What the colormap encoder saw, without padding: uint8 (h, w, 3)."""
        height, width = self.view["valid_size"]
        return self.view["colormap"].numpy().transpose(1, 2, 0)[:height, :width]


def image_id_of(file_name: str | Path) -> int | str:
    """Return a picture's id from its name, COCO's way: ``000000142238.jpg`` is 142238.

    A name that is no number is its own id, without the suffix.
    """
    stem = Path(file_name).stem
    return int(stem) if stem.isdecimal() else stem


def is_spec(entities: Any) -> bool:
    """Whether a text names a live segmenter (``sam:PATH``, ...) instead of a file."""
    return isinstance(entities, str) and entities.split(":")[0] in KINDS and ":" in entities


def read_entities(
    entities: EntitiesLike,
    image: np.ndarray,
    *,
    masks_format: str = "auto",
    segments_info: list[dict[str, Any]] | None = None,
    image_id: int | str | None = None,
) -> EntityMap:
    """Entities of any kind as an EntityMap in the frame of an image, uint8 (H, W, 3).

    Args:
        entities: an EntityMap; ids, an integer array (H, W), 0 where no entity is; masks (E, H, W),
            bool or numbers of which one, such as 1 or 255, means inside (they may overlap: smaller
            masks lie on top); a file of any format that
            :func:`gella.entities.sources.load_entities` reads; a segmenter, which looks at the
            image; or what other libraries hold: tensors and Pillow's pictures of the same form,
            SAM's list of dicts (or a list of masks), supervision's detections, Detectron2's
            ``Instances``.
        image: uint8 (H, W, 3) RGB.
        masks_format: format of a mask file.
        segments_info: of a COCO panoptic file: which segments are crowd.
        image_id: picks the picture's masks in a file of many.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: damaged or of another form or size, or no entity at all.
        TypeError: nothing that entities can be.
    """
    height, width = image.shape[:2]
    if isinstance(entities, EntityMap):
        checked = entities
    elif isinstance(entities, np.ndarray):
        checked = _from_array(entities, height, width)
    elif (held := _from_library(entities, (height, width))) is not None:
        checked = held
    elif isinstance(entities, (str, Path)):
        options: dict[str, Any] = {"segments_info": segments_info, "image_id": image_id}
        checked = load_entities(str(entities), height, width, format=masks_format, **options)
    elif isinstance(entities, Segmenter):
        checked = entities.segment(image)
        if checked.num_entities == 0:
            raise ValueError("the segmenter found no entity; lower its thresholds, or give masks")
    else:
        raise TypeError(
            f"entities are a {type(entities).__name__}; give an EntityMap, an array or tensor, a "
            "list of masks, a file or a segmenter"
        )
    if checked.num_entities == 0:
        raise ValueError("the image has no entity at all; give at least one mask")
    check_size(checked.size, (height, width))
    return checked


def picture_of(image: Any) -> np.ndarray:
    """A picture in memory as uint8 RGB (H, W, 3) of its own.

    Args:
        image: Pillow's, turned by its EXIF orientation; or an array or tensor, (H, W, 3) or
            (3, H, W), uint8 or floats in 0..1.

    Raises ValueError for anything else.
    """
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    array = _array_of(image)
    form = f"{array.dtype} {array.shape}"
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f" and array.size:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"image is {form} from {low:g} to {high:g}; give floats in 0..1, before any "
                "normalization, or uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"image must be uint8 (H, W, 3) RGB, not {form}")
    return np.array(array, order="C")


def _array_of(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _from_library(entities: Any, size: tuple[int, int]) -> EntityMap | None:
    """Entities as other libraries hold them; None if it is nothing of theirs."""
    name = type(entities).__name__
    masks: Any = None
    scores: Any = None
    if isinstance(entities, list | tuple) and entities:
        return _from_list(entities, size)
    if isinstance(entities, Image.Image):
        if entities.mode == "RGBA" and len(set(entities.getchannel("A").getextrema())) == 1:
            entities = entities.convert("RGB")  # a constant says nothing
        if entities.mode not in ("1", "L", "P", "I", "I;16", "RGB"):
            raise ValueError(
                f"the masks are a picture of mode {entities.mode}; give ids as L, I or RGB "
                "(id = R + 256 G + 65536 B), or masks (E, H, W)"
            )
        masks = np.asarray(entities)
        masks = rgb_to_id(masks) if masks.ndim == 3 else masks
    elif isinstance(entities, torch.Tensor):
        masks = entities
    elif hasattr(entities, "xyxy"):  # supervision's detections
        masks, scores = getattr(entities, "mask", None), getattr(entities, "confidence", None)
    elif name == "Instances":  # Detectron2's
        masks, scores = getattr(entities, "pred_masks", None), getattr(entities, "scores", None)
        masks = getattr(masks, "tensor", masks)
    else:
        return None
    if masks is None:
        raise ValueError(f"the {name} have boxes and no masks; give those of a model with masks")
    return _from_array(_array_of(masks), *size, None if scores is None else _array_of(scores))


def _from_list(entities: Sequence[Any], size: tuple[int, int]) -> EntityMap:
    """Of a list with a mask an entry, or a dict with a ``segmentation``, as SAM and COCO have."""
    codes, scores = [], []
    for number, entry in enumerate(entities):
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {"segmentation": entry}
        mask = fields.get("segmentation", fields if "counts" in fields else None)
        if mask is None:
            raise ValueError(
                f"entry {number} of the masks has no 'segmentation', only {sorted(fields)}"
            )
        if not isinstance(mask, dict | list):
            array = binary_masks(_array_of(mask)[None])[0]
            check_size(array.shape, size)
            mask = encode_mask(array)
        codes.append(encode_segmentation(mask, size))
        scores.append(float(fields.get("predicted_iou", fields.get("score", 1.0))))
    return EntityMap.from_codes(size, codes, scores)


def _from_array(
    array: np.ndarray, height: int, width: int, scores: np.ndarray | None = None
) -> EntityMap:
    form = f"{array.dtype} {tuple(array.shape)}"
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise ValueError(
            f"the entity array is {form}; give integer ids (H, W) or bool masks (E, H, W)"
        )
    if array.shape[-2:] != (height, width):
        hint = ""
        if array.ndim == 3 and array.shape[:2] == (height, width):
            hint = " (masks go first: (E, H, W); of a coloured id picture give the file)"
        raise OtherSize(
            f"the entity array is {form} but the image is {width}x{height} (width x height){hint}; "
            "give ids or masks of the image's size"
        )
    # Two dimensions are ids only if they are whole numbers: a bool or float array is one mask.
    if array.ndim == 2 and array.dtype.kind in "iu":
        return EntityMap.from_id_image(array)
    return EntityMap.from_masks(array.reshape(-1, height, width), scores)

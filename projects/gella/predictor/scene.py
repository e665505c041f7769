"""One picture with its entities, as the predictor takes it: of every kind, and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gella.entities.entity_map import EntityMap
from gella.entities.rle import OtherSize, check_size
from gella.entities.sources import load_entities
from gella.segmenters.segmenter import KINDS, Segmenter

EntitiesLike = EntityMap | np.ndarray | str | Path | Segmenter
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
            :func:`gella.entities.sources.load_entities` reads; or a segmenter, which looks at the
            image.
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
    elif isinstance(entities, (str, Path)):
        options: dict[str, Any] = {"segments_info": segments_info, "image_id": image_id}
        checked = load_entities(str(entities), height, width, format=masks_format, **options)
    elif isinstance(entities, Segmenter):
        checked = entities.segment(image)
        if checked.num_entities == 0:
            raise ValueError("the segmenter found no entity; lower its thresholds, or give masks")
    else:
        raise TypeError(
            f"entities are a {type(entities).__name__}; give an EntityMap, an array, a file or a "
            "segmenter"
        )
    if checked.num_entities == 0:
        raise ValueError("the image has no entity at all; give at least one mask")
    check_size(checked.size, (height, width))
    return checked


def _from_array(array: np.ndarray, height: int, width: int) -> EntityMap:
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
    return EntityMap.from_masks(array.reshape(-1, height, width))

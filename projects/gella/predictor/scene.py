"""One picture with its entities, as the predictor takes it: of every kind, checked and encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gella.data.mapper import InputMaker
from gella.entities.entity_map import EntityMap
from gella.entities.sources import load_entities
from gella.entities.view import read_image
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
        image_id: chose the colours of the colormap.
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


def read_scene(
    image: np.ndarray | str | Path,
    entities: EntitiesLike,
    *,
    maker: InputMaker,
    segmenter: Callable[[str], Segmenter],
    masks_format: str = "auto",
    segments_info: list[dict[str, Any]] | None = None,
    image_id: int | str | None = None,
) -> Scene:
    """Read, check and resize a picture and its entities; nothing is encoded yet.

    Args:
        image: uint8 (H, W, 3) RGB, or a file (turned upright by its EXIF orientation).
        entities: see :func:`read_entities`.
        maker: brings both to the model's size.
        segmenter: loads the segmenter that a spec names.
        masks_format: format of a mask file.
        segments_info: of a COCO panoptic file: which segments are crowd.
        image_id: picks the picture's masks in a file of many, and the colours of the colormap.
            Default for a file: :func:`image_id_of`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or an array is damaged or of another form, the sizes differ, or there is
            no entity at all.
    """
    if isinstance(image, np.ndarray):
        picture = image.copy()
    else:
        image_id = image_id_of(image) if image_id is None else image_id
        picture = read_image(image, upright=True)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 (H, W, 3) RGB, not {picture.dtype} {tuple(picture.shape)}"
        )
    if is_spec(entities):
        entities = segmenter(str(entities))
    found = read_entities(
        entities,
        picture,
        masks_format=masks_format,
        segments_info=segments_info,
        image_id=image_id,
    )
    view = {**maker.picture(picture, found, image_id=image_id), "entities_full": found}
    picture.flags.writeable = False
    return Scene(picture, found, image_id, view)


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
        masks_format, segments_info, image_id: of a file, see :func:`read_scene`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: damaged or of another form or size, or no entity at all.
        TypeError: nothing that entities can be.
    """
    height, width = image.shape[:2]
    if isinstance(entities, EntityMap):
        found = entities
    elif isinstance(entities, np.ndarray):
        found = _from_array(entities, height, width)
    elif isinstance(entities, (str, Path)):
        found = load_entities(
            str(entities),
            height,
            width,
            format=masks_format,
            segments_info=segments_info,
            image_id=image_id,
        )
    elif isinstance(entities, Segmenter):
        found = entities.segment(image)
        if found.num_entities == 0:
            raise ValueError("the segmenter found no entity; lower its thresholds, or give masks")
    else:
        raise TypeError(
            f"entities are a {type(entities).__name__}; give an EntityMap, an array, a file or a "
            "segmenter"
        )
    if found.num_entities == 0:
        raise ValueError("the image has no entity at all; give at least one mask")
    return found


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
        raise ValueError(
            f"the entity array is {form} but the image is {width}x{height} (width x height){hint}; "
            "give ids or masks of the image's size"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"the entity array ({form}) holds values that are no numbers (NaN or inf)")
    if array.ndim == 2 and array.dtype.kind in "iu":
        if array.size and array.min() < 0:
            raise ValueError(
                f"the id array holds {array.min()}; ids start at 0, which is no entity"
            )
        return EntityMap.from_id_image(array)
    values = np.unique(array[array != 0])
    if len(values) > 1 or (len(values) and values[0] < 0):
        raise ValueError(
            f"the masks ({form}) hold {_listed(values)} besides 0; a mask is True or False: "
            "compare with a threshold first, such as masks > 0.5"
        )
    return EntityMap.from_masks(array.reshape(-1, height, width))


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:3].tolist())
    return f"{shown}, ..." if len(values) > 3 else shown

"""What a command line names: its config, and pictures, each with an id of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gella.config import load_config
from gella.data.register import import_modules
from gella.predictor import image_id_of
from gella.utils.io import image_key

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASKS_BESIDE = "_masks"  # scene_masks.png is no picture, but the masks of scene.png


@dataclass(frozen=True)
class Source:
    """One picture.

    Attributes:
        image_id: its id in what is written.
        path: its file.
        name: of the picture, for people and for files that name it.
        size: (height, width) that it has to have, if known.
    """

    image_id: int | str
    path: Path
    name: str = ""
    size: tuple[int, int] | None = None


def config_of(file: str, options: Sequence[Any]) -> Any:
    """The config, with its own modules imported, on the CPU where there is no GPU."""
    cfg = load_config(file, options)
    import_modules(cfg)
    if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def distinct(sources: Iterable[Source], advice: str) -> list[Source]:
    """The sources, each picture once; ValueError if two pictures have one id.

    Args:
        sources: in any order; a dataset has several records of a picture.
        advice: what to do about two pictures of one id; stands behind the semicolon of the error.
    """
    kept: dict[str, Source] = {}
    for source in sources:
        other = kept.setdefault(image_key(source.image_id), source)
        if other.path != source.path:
            raise ValueError(
                f"{other.path} and {source.path} have one image id, {source.image_id}; {advice}"
            )
    return list(kept.values())


def list_pictures(root: Path, leave_out: Sequence[Path] = ()) -> list[Source]:
    """The pictures of a folder and its subfolders, by name; or the one picture that ``root`` is.

    Hidden files and folders, other files, mask files beside their picture (``scene_masks.png``
    with a ``scene.*``) and what lies in ``leave_out`` are no pictures. Links to folders are not
    followed.

    Raises:
        FileNotFoundError: there is neither a file nor a folder.
        ValueError: the folder holds no picture.
    """
    if not root.exists():
        raise FileNotFoundError(f"image {root} does not exist; check --input")
    if not root.is_dir():
        return [Source(image_id_of(root), root, root.name)]
    excluded = {path.resolve() for path in leave_out}
    if root.resolve() in excluded:
        raise ValueError(
            f"--input {root} is also the folder of the output or of the masks; write elsewhere, "
            f"and name masks beside pictures scene{MASKS_BESIDE}.png, or move them"
        )
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        seen = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in seen if (here / name).resolve() not in excluded]
        names = (name for name in files if not name.startswith("."))
        found += [here / name for name in names if name.lower().endswith(SUFFIXES)]
    beside = {path.with_name(path.stem + MASKS_BESIDE) for path in found}
    pictures = [
        Source(image_id_of(path), path, path.relative_to(root).as_posix())
        for path in sorted(found, key=lambda path: path.relative_to(root).parts)
        if path.with_suffix("") not in beside or not path.stem.endswith(MASKS_BESIDE)
    ]
    if not pictures:
        raise ValueError(f"folder {root} holds no picture ({', '.join(SUFFIXES)})")
    return pictures

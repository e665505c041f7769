"""What a command line names: its config, and pictures, each with an id of its own."""

from __future__ import annotations

import glob
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
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
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
    """The sources, each picture once (a dataset has several records of one).

    ValueError, with the ``advice`` behind its semicolon, if two pictures have one id.
    """
    kept: dict[str, Source] = {}
    for source in sources:
        other = kept.setdefault(image_key(source.image_id), source)
        if other.path != source.path:
            raise ValueError(
                f"{other.path} and {source.path} have one image id, {source.image_id}; {advice}"
            )
    return list(kept.values())


def list_pictures(paths: Sequence[str | Path], leave_out: Sequence[Path] = ()) -> list[Source]:
    """The pictures of folders and their subfolders, by name, and those that are named themselves.

    Hidden files and folders, other files, mask files beside their picture (``scene_masks.png``
    with a ``scene.*``) and what lies in ``leave_out`` are no pictures. Links to folders are not
    followed. A picture's name is its path below the folder, of several paths below the folder that
    holds them all.

    Args:
        paths: files, folders, and patterns of them (``"photos/*.jpg"``), which a shell that quotes
            them or Windows leaves as they are.
        leave_out: files and folders.

    Raises:
        FileNotFoundError: there is neither a file nor a folder of a name or a pattern.
        ValueError: there is no picture, or a file is a video.
    """
    roots: list[Path] = []
    for given in (os.path.expanduser(path) for path in paths):
        hits = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        if not hits:
            raise FileNotFoundError(f"image {given} does not exist; check its path")
        wanted = [hit for hit in hits if os.path.isdir(hit) or hit.lower().endswith(SUFFIXES)]
        roots += map(Path, wanted or hits)
    excluded = {path.resolve() for path in leave_out}
    found: dict[str, Path] = {}  # by the absolute path: a picture may be named twice
    for root in roots:
        if root.is_dir() and root.resolve() in excluded:
            raise ValueError(
                f"--input {root} is also the folder of the output or of the masks; write elsewhere,"
                f" and name masks beside pictures scene{MASKS_BESIDE}.png, or move them"
            )
        refuse_video(root)
        listed = [root] if not root.is_dir() else _below(root, excluded)
        found |= {os.path.abspath(path): path for path in listed}
    base = os.path.commonpath([os.path.abspath(r if r.is_dir() else r.parent) for r in roots])
    beside = {path.with_name(path.stem + MASKS_BESIDE) for path in found.values()}
    pictures = [
        Source(image_id_of(path), path, Path(name).relative_to(base).as_posix())
        for name, path in found.items()
        if path.with_suffix("") not in beside or not path.stem.endswith(MASKS_BESIDE)
    ]
    if not pictures:
        folders = ", ".join(map(str, roots))
        raise ValueError(f"folder {folders} holds no picture ({', '.join(SUFFIXES)})")
    return pictures


def _below(root: Path, excluded: set[Path]) -> list[Path]:
    """The files of a folder and its subfolders with a picture's suffix, by name."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        seen = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in seen if (here / name).resolve() not in excluded]
        names = (name for name in files if not name.startswith("."))
        found += [here / name for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def refuse_video(path: Path) -> None:
    """ValueError for a video, which its suffix or its first bytes tell."""
    head = b""
    if path.is_file():
        with open(path, "rb") as stream:
            head = stream.read(12)
    # HEIF and AVIF, which are pictures, lie in the boxes of MP4 and MOV.
    boxed = head[4:8] == b"ftyp" and head[8:11] not in (b"hei", b"hev", b"mif", b"msf", b"avi")
    starts = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3")  # Matroska and WebM, MPEG
    inside = boxed or head.startswith(starts) or (head[:4], head[8:]) == (b"RIFF", b"AVI ")
    if inside or path.suffix.lower() in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path} is a video, and pictures are what is grounded; save its frames as pictures, "
            f"for instance: ffmpeg -i {path.name} frame%04d.png"
        )

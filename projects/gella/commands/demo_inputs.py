"""What the demo works on: the pictures of a folder, and one job per picture and caption.

Nothing is decoded here, so that a folder of thousands is listed at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from gella.data.register import choose_entities
from gella.predictor import image_id_of

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASKS_BESIDE = "_masks"  # scene_masks.png is no picture, but the masks of scene.png
RESERVED = ("failures",)  # the demo's own JSON in the output folder, without the suffix
_LONGEST = 80  # bytes of an output name; file systems allow 255 for the whole
# Control characters, halves of surrogate pairs (undecodable bytes), and what some system forbids.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff<>:"/\\|?*]')


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        path: the file.
        name: its path below the input folder with "/", such as "a/x.png"; the user sees it.
        image_id: finds its masks in a file of many, and chooses the colours of the colormap.
    """

    path: Path
    name: str
    image_id: int | str


@dataclass(frozen=True)
class Job:
    """One question about one picture.

    Attributes:
        picture: the picture.
        name: of the output files, unlike every other job's.
        text: caption or expression; None: a model is going to write it, or none is needed.
        nouns: nouns of the caption in its order; None: the model extracts them.
        masks: mask file that the file of captions names.
        record: dataset dict that the job was made from.
    """

    picture: Picture
    name: str
    text: str | None = None
    nouns: tuple[str, ...] | None = None
    masks: Path | None = None
    record: dict[str, Any] | None = None


def plain(text: object) -> str:
    """The text with what UTF-8 cannot hold (halves of surrogate pairs) replaced."""
    return str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def list_pictures(root: Path, leave_out: Sequence[Path] = ()) -> list[Picture]:
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
        return [Picture(root, root.name, image_id_of(root))]
    excluded = {path.resolve() for path in leave_out}
    if root.resolve() in excluded:
        raise ValueError(
            f"--input {root} is also the folder of the output or of the masks; write elsewhere, "
            f"and name masks beside pictures scene{MASKS_BESIDE}.png, or move them"
        )
    found = sorted(_walk(root, excluded), key=lambda path: path.relative_to(root).parts)
    stems = {path.with_suffix("") for path in found if not path.stem.endswith(MASKS_BESIDE)}
    pictures = [
        Picture(path, path.relative_to(root).as_posix(), image_id_of(path))
        for path in found
        if not (
            path.stem.endswith(MASKS_BESIDE)
            and path.with_name(path.stem.removesuffix(MASKS_BESIDE)) in stems
        )
    ]
    if not pictures:
        raise ValueError(f"folder {root} holds no picture ({', '.join(SUFFIXES)})")
    return pictures


def _walk(root: Path, excluded: set[Path]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (Path(folder) / name).resolve() not in excluded
        ]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(folder) / name


def output_names(names: Sequence[str]) -> list[str]:
    """Names of output files for pictures' names, all different and safe on every file system.

    ``a/x.png`` becomes ``a__x``. Where two would be alike (also in case only), or like a file of
    the demo's own, each takes its suffix or, if that is not enough, a mark made from its full name:
    the result does not depend on the order. A picture that comes again (another caption) is
    numbered: ``x``, ``x_2``.
    """
    times: Counter[str] = Counter()
    keys = []  # (picture's name, how often it came before)
    for name in names:
        keys.append((name, times[name]))
        times[name] += 1
    chosen = {key: _safe(key, with_suffix=False) for key in keys}
    for rename in (lambda key: _safe(key, with_suffix=True), _marked):
        counts = Counter(title.casefold() for title in chosen.values())
        for key, title in chosen.items():
            if counts[title.casefold()] > 1 or title.casefold() in RESERVED:
                chosen[key] = rename(key)
    return [chosen[key] for key in keys]


def _safe(key: tuple[str, int], *, with_suffix: bool) -> str:
    name, before = key
    stem, suffix = os.path.splitext(name)
    title = stem.replace("/", "__") + (suffix.replace(".", "_") if with_suffix else "")
    title = _UNSAFE.sub("_", title).lstrip(".").rstrip(". ") or "picture"
    if len(title.encode("utf-8")) > _LONGEST:
        return _marked(key)
    return title + (f"_{before + 1}" if before else "")


def _marked(key: tuple[str, int]) -> str:
    name, before = key
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    title = _UNSAFE.sub("_", os.path.splitext(name)[0].replace("/", "__")).lstrip(".").rstrip(". ")
    kept = title.encode("utf-8")[: _LONGEST - 16].decode("utf-8", "ignore")
    return f"{kept}_{digest}" + (f"_{before + 1}" if before else "")


def dataset_jobs(name: str, num: int, cfg: Any, task: str) -> list[Job]:
    """The first ``num`` pictures of a registered dataset, each with its first caption.

    For the task "refer" the text is the record's first expression.

    Raises:
        ValueError: no such dataset is registered, or it has no record that the task can use.
    """
    names = DatasetCatalog.list()
    if name not in names:
        known = ", ".join(sorted(item for item in names if item.startswith("gella_")))
        raise ValueError(f"dataset {name} is not registered; there are: {known}")
    chosen: dict[str, tuple[str | None, dict[str, Any]]] = {}
    for record in choose_entities(DatasetCatalog.get(name), name, cfg, is_train=False):
        text = _record_text(record, task)
        file_name = str(record["file_name"])
        if file_name not in chosen and text != "":
            chosen[file_name] = (text, record)
        if len(chosen) == num:
            break
    if not chosen:
        what = "an expression" if task == "refer" else "a caption and nouns"
        raise ValueError(f"dataset {name} has no record with {what}")
    titles = output_names([Path(file_name).name for file_name in _distinct(chosen)])
    return [
        Job(Picture(Path(path), Path(path).name, record["image_id"]), title, text, record=record)
        for title, (path, (text, record)) in zip(titles, chosen.items(), strict=True)
    ]


def _distinct(paths: Sequence[str] | dict[str, Any]) -> list[str]:
    """Paths as names: the last part where it is the only one of its kind, else all of it."""
    counts = Counter(Path(path).name for path in paths)
    return [Path(path).name if counts[Path(path).name] == 1 else path for path in paths]


def _record_text(record: dict[str, Any], task: str) -> str | None:
    """The text of a record for a task; None if the task needs none, "" if it has none."""
    if task in ("panoptic", "describe"):
        return None
    if task == "refer":
        return next((item["text"] for item in record.get("expressions") or ()), "")
    return (record.get("caption") or "") if record.get("phrases") else ""

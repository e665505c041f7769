"""What the demo works on: a job per picture and caption, and where each has its entity masks.

Nothing is decoded before its turn comes, so that a folder of thousands is listed at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gella.commands.inputs import SUFFIXES, Source, dataset_records, distinct
from gella.data.panoptic import read_categories as coco_categories
from gella.data.records import Place
from gella.data.register import choose_entities, coco_panoptic_categories
from gella.entities.entity_map import EntityMap
from gella.entities.sources import FileSource, load_from_record
from gella.predictor import image_id_of
from gella.segmenters.segmenter import MaskLimits, load_segmenter
from gella.utils.io import file_hash, json_lines, read_json

MASKS_BESIDE = "_masks"  # scene_masks.png is no picture, but the masks of scene.png
RESERVED = ("failures",)  # the demo's own JSON in the output folder, without the suffix
_MASK_SUFFIXES = (".npz", ".png")
_LONGEST = 80  # bytes of an output name; file systems allow 255 for the whole
# Control characters, halves of surrogate pairs (undecodable bytes), and what some system forbids.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff<>:"/\\|?*]')


@dataclass(frozen=True)
class Job:
    """One question about one picture.

    Attributes:
        picture: its name is the path below the input folder with "/", such as "a/x.png"; its id
            finds masks in a file of many, and chooses the colours of the colormap.
        name: of the output files, unlike every other job's.
        text: caption or expression; None: a model is going to write it, or none is needed.
        nouns: nouns of the caption in its order; None: the model extracts them.
        masks: mask file that the file of captions names.
        record: dataset dict that the job was made from.
        fingerprint, image, entities: once its turn has come: what the result follows from, as a
            hash; the picture, uint8 RGB (H, W, 3), and its entities.
    """

    picture: Source
    name: str = ""
    text: str | None = None
    nouns: tuple[str, ...] | None = None
    masks: Path | None = None
    record: dict[str, Any] | None = None
    fingerprint: str = ""
    image: Any = field(default=None, repr=False)
    entities: Any = field(default=None, repr=False)


def plain(text: object) -> str:
    """The text with what UTF-8 cannot hold (halves of surrogate pairs) replaced."""
    return str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def output_names(names: Sequence[str]) -> list[str]:
    """Names of output files for pictures' names, all different and safe on every file system.

    ``a/x.png`` becomes ``a__x``. Where two would be alike (also in case only), or like a file of
    the demo's own, each takes its suffix or, if that is not enough, a mark made from its full name:
    the result does not depend on the order. A picture that comes again (another caption) is
    numbered: ``x``, ``x_2``.
    """

    def title(key: tuple[str, int], form: str) -> str:
        stem, suffix = os.path.splitext(key[0])
        text = stem.replace("/", "__") + (suffix.replace(".", "_") if form == "suffix" else "")
        text = _UNSAFE.sub("_", text).lstrip(".").rstrip(". ")
        if form == "mark" or len(text.encode("utf-8")) > _LONGEST:
            digest = hashlib.sha256(key[0].encode("utf-8", "surrogatepass")).hexdigest()[:10]
            kept = text.encode("utf-8")[: _LONGEST - 16].decode("utf-8", "ignore")
            text = f"{kept}_{digest}"
        return (text or "picture") + (f"_{key[1] + 1}" if key[1] else "")

    times: Counter[str] = Counter()
    keys = []  # (picture's name, how often it came before)
    for name in names:
        keys.append((name, times[name]))
        times[name] += 1
    chosen = {key: title(key, "stem") for key in keys}
    for form in ("suffix", "mark"):
        counts = Counter(name.casefold() for name in chosen.values())
        for key, name in chosen.items():
            if counts[name.casefold()] > 1 or name.casefold() in RESERVED:
                chosen[key] = title(key, form)
    return [chosen[key] for key in keys]


def dataset_jobs(name: str, num: int, cfg: Any, task: str) -> list[Job]:
    """The first ``num`` pictures of a registered dataset, each with its first caption.

    For the task "refer" the text is the record's first expression.

    Raises:
        ValueError: no such dataset is registered, or it has no record that the task can use.
    """
    jobs: dict[str, Job] = {}
    for record in choose_entities(dataset_records(name), name, cfg, is_train=False):
        path = Path(record["file_name"])
        text = None  # the task needs none
        if task == "refer":
            text = next((item["text"] for item in record.get("expressions") or ()), "")
        elif task not in ("panoptic", "describe"):
            text = (record.get("caption") or "") if record.get("phrases") else ""
        if text != "":
            picture = Source(record["image_id"], path, path.name)
            jobs.setdefault(str(path), Job(picture, text=text, record=record))
        if len(jobs) == num:
            break
    if not jobs:
        what = "an expression" if task == "refer" else "a caption and nouns"
        raise ValueError(f"dataset {name} has no record with {what}")
    counts = Counter(job.picture.name for job in jobs.values())
    whole = [
        path if counts[job.picture.name] > 1 else job.picture.name for path, job in jobs.items()
    ]
    titles = output_names(whole)
    return [replace(job, name=title) for job, title in zip(jobs.values(), titles, strict=True)]


# -- captions --------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One caption of a file.

    Attributes:
        image: name of its picture; None: the file says it by the order.
        text: caption or expression.
        where: file and line, for messages.
        nouns: of the caption, in its order; None: not given.
        masks: file of the picture's masks, relative to the folder of the file.
    """

    image: str | None
    text: str
    where: str
    nouns: tuple[str, ...] | None = None
    masks: Path | None = None


def read_captions(file_name: str | Path) -> list[Entry]:
    """Read a file of captions: JSON lines by the suffix .jsonl, .ndjson or .json, else text.

    JSON lines: ``image`` (or ``file_name``), ``caption`` (or ``description``, ``expression``,
    ``text``) and, if wanted, ``nouns`` and ``masks``; so the files of ``tools/describe_images.py``
    do. Text: ``name<TAB>caption`` in every line, or a caption in every line. Empty lines are
    skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; names the line.
    """
    path = Path(file_name)
    if not path.is_file():
        raise FileNotFoundError(f"captions {path} do not exist; check --captions")
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        entries = [_json_entry(path, number, item) for number, item in json_lines(path)]
    else:
        # Not splitlines(): a caption may hold characters that it takes for line ends (U+2028).
        lines = _text(path).split("\n")
        given = {number: line for number, line in enumerate(lines, 1) if line.strip()}
        tabs = {"\t" in line: number for number, line in given.items()}
        if len(tabs) > 1:
            raise ValueError(
                f"captions {path}: line {tabs[True]} has a tab (name<TAB>caption) but line "
                f"{tabs[False]} has none; write all lines one way"
            )
        entries = []
        for number, line in given.items():
            name, tab, text = line.partition("\t") if True in tabs else ("", "", line)
            image = name.strip() if tab else None
            entries.append(Entry(image, text.strip(), f"{path}, line {number}"))
    if not entries:
        raise ValueError(f"captions {path} are empty; write a caption per line")
    return entries


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason}); save it so") from error


def _json_entry(path: Path, number: int, item: Any) -> Entry:
    if isinstance(item, ValueError):
        raise item
    place, texts = Place(path, f"line {number}"), []
    for keys in (("image", "file_name"), ("caption", "description", "expression", "text")):
        key = next((key for key in keys if isinstance(item, dict) and key in item), keys[0])
        texts.append(plain(place.text(item, key)))
    nouns, masks = item.get("nouns"), item.get("masks")
    if nouns is not None:
        if not all(isinstance(noun, str) for noun in place.listed(item, "nouns")):
            place.wrong("field", "'nouns' is no list of texts")
        nouns = tuple(map(plain, nouns))
    if masks is not None:
        if not place.text(item, "masks") or "\0" in masks:
            place.wrong("field", "'masks' is no name of a file")
        masks = path.parent / masks
    return Entry(texts[0], texts[1], f"{path}, line {number}", nouns, masks)


def assign(
    entries: Sequence[Entry], pictures: Sequence[Source]
) -> tuple[dict[int, list[Entry]], list[Entry]]:
    """Which captions each picture has.

    A name means the picture whose path below the input folder it is, or as much of the path's end
    as is enough; the suffix may be left out. A name with more folders than the input has
    ("data/img/a.png" for "a.png") is tried by its end, unless it leads upwards. Names are only
    compared, never opened.

    Returns:
        Entries by the place of their picture, and those whose picture is not there.

    Raises:
        ValueError: captions without names do not go with the number of pictures, or a name is of
            several pictures, or no caption is of any picture.
    """
    if entries[0].image is None:
        # All captions of a nameless file are of the one picture, else one of each.
        if len(pictures) == 1:
            return {0: list(entries)}, []
        if len(entries) != len(pictures):
            raise ValueError(
                f"{entries[0].where.rpartition(',')[0]} has {len(entries)} captions without names, "
                f"but there are {len(pictures)} pictures; write name<TAB>caption, or a caption for "
                "each picture in their order"
            )
        return {place: [entry] for place, entry in enumerate(entries)}, []
    names = [plain(picture.name) for picture in pictures]
    ends: dict[PurePosixPath, list[int]] = defaultdict(list)
    for place, path in enumerate(map(PurePosixPath, names)):
        for form in {path, path.with_suffix("")}:
            for start in range(len(form.parts)):
                ends[PurePosixPath(*form.parts[start:])].append(place)
    assigned: dict[int, list[Entry]] = defaultdict(list)
    lost = []
    for entry in entries:
        path = PurePosixPath((entry.image or "").replace("\\", "/"))
        parts = path.parts[1:] if path.is_absolute() else path.parts
        starts = range(0 if ".." in parts else len(parts))
        places = next((p for k in starts if (p := ends.get(PurePosixPath(*parts[k:])))), [])
        places = [place for place in places if names[place] == entry.image] or places
        if len(places) > 1:
            raise ValueError(
                f"{entry.where}: {entry.image!r} could be {names[places[0]]} or "
                f"{names[places[1]]}; write more of its path"
            )
        if places:
            assigned[places[0]].append(entry)
        else:
            lost.append(entry)
    if not assigned:
        raise ValueError(
            f"{lost[0].where}: {lost[0].image!r} is none of the {len(pictures)} pictures, and no "
            f"other caption is of one (the first picture is {pictures[0].name})"
        )
    return dict(assigned), lost


# -- masks -----------------------------------------------------------------------------------------


class Masks:
    """The entities of jobs, from files.

    ``find`` tells ``file_name``, ``format`` and ``segments_info`` of a job's file, as a dataset
    dict has them; {}: the whole picture is one entity. It raises FileNotFoundError or ValueError
    for a job that has no file, or one that might be another's.
    """

    def __init__(self, find: Callable[[Job], dict[str, Any]]) -> None:
        self.find = find

    def key(self, job: Job) -> Any:
        """What JSON can hold, and changes when the entities would change, so that finished pictures
        are known without decoding a mask; errors as `find`."""
        place = self.find(job)
        if not place:
            return "whole"
        file = Path(place["file_name"])
        if not file.is_file():
            raise FileNotFoundError(f"image {job.picture.name}: masks {file} do not exist")
        # Of a JSON the entries say all; in other files the masks themselves lie.
        masks = None if file.suffix.lower() == ".json" else file_hash(file)
        return [masks, *(place[name] for name in ("format", "segments_info") if name in place)]

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """The job's entities in the frame of its picture, uint8 (H, W, 3).

        Raises:
            FileNotFoundError, ValueError: there are none, or they are damaged or of another size.
        """
        place = self.find(job)
        if not place:
            return EntityMap(np.ones(image.shape[:2], dtype=np.int32), [1])
        record = {"image_id": job.picture.image_id, "entities": place}
        height, width = image.shape[:2]
        return load_from_record({**record, "height": height, "width": width}, image)


class Records(Masks):
    """The masks that the records of a dataset lead to, in whatever way."""

    def __init__(self) -> None:
        super().__init__(lambda job: (job.record or {}).get("entities") or {})

    def key(self, job: Job) -> Any:
        """See `Masks.key`."""
        place = self.find(job)
        return {name: str(place.get(name)) for name in ("format", "file_name", "segments_info")}

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `Masks.load`."""
        return load_from_record(job.record or {}, image)


class Live:
    """Makes masks on the spot, as `Masks` reads them; arguments as `load_segmenter`.

    ``limits`` say which masks are kept.
    """

    def __init__(
        self, spec: str, device: str | None, options: Mapping[str, str], limits: MaskLimits
    ) -> None:
        self._limits, self._key = limits, [spec, sorted(options.items()), vars(limits)]
        self._segmenter = load_segmenter(spec, device, options)

    def key(self, job: Job) -> Any:
        """See `Masks.key`."""
        return self._key

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `Masks.load`."""
        entities = self._segmenter.segment(image, self._limits)
        if entities.num_entities == 0:
            raise ValueError(
                f"image {job.picture.name}: the segmenter found no entity; lower its thresholds "
                "(--segmenter-option) or --min-area"
            )
        return entities


def masks_beside(whole: bool = False) -> Masks:
    """The file that the captions name, else ``x_masks.npz`` or ``x_masks.png`` beside ``x.jpg``.

    ``whole``: a picture without one is one entity, for questions that do not depend on masks.
    """

    def find(job: Job) -> dict[str, Any]:
        path = job.picture.path
        beside = [path.with_name(path.stem + MASKS_BESIDE + suffix) for suffix in _MASK_SUFFIXES]
        file = job.masks or next((file for file in beside if file.is_file()), None)
        if file is not None:
            return {"file_name": file, "format": "auto", "segments_info": None}
        if whole:
            return {}
        raise FileNotFoundError(
            f"image {job.picture.name}: no masks; put {beside[1].name} beside it, or give --masks "
            "or --segmenter"
        )

    return Masks(find)


def masks_from(
    path: Path, pictures: Sequence[Source], format: str = "auto", panoptic_json: str | None = None
) -> Masks:
    """What ``--masks`` names: a folder, a JSON of many pictures, or one picture's file.

    ``panoptic_json`` says what in one picture's PNG is crowd.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: one picture's file for several pictures, or a JSON that cannot be read.
    """
    if path.is_dir():
        return _masks_of_folder(path, pictures, format)
    if not path.exists():
        raise FileNotFoundError(f"mask file {path} does not exist; check --masks")
    if path.suffix.lower() == ".json":
        return _masks_of_json(path, pictures, format)
    if len(pictures) > 1:
        raise ValueError(
            f"masks {path} are one picture's file, but there are {len(pictures)} pictures; give "
            "a folder with a file per picture, or a COCO JSON"
        )
    segments = None
    if panoptic_json is not None:
        try:
            annotations = read_json(panoptic_json, "panoptic JSON")["annotations"]
            segments = next(a["segments_info"] for a in annotations if a["file_name"] == path.name)
        except StopIteration:
            raise ValueError(
                f"panoptic JSON {panoptic_json} has no annotation with file_name {path.name}"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{panoptic_json} is no COCO panoptic file ({error!r})") from error
    place = {"file_name": path, "format": format, "segments_info": segments}
    return Masks(lambda job: place)


def _masks_of_folder(folder: Path, pictures: Sequence[Source], format: str) -> Masks:
    """An ``.npz`` or ``.png`` per picture, in the input's subfolders or in none.

    Those of ``a/x.jpg`` are ``a/x.npz``, ``a/x.png``, ``a/x.jpg.npz``, ..., ``x.npz``, ..., and all
    of these with ``_masks`` before the suffix.
    """

    def stems(name: str) -> tuple[list[str], list[str]]:
        """Names without their suffix: below the picture's folders, and without folders."""
        path = PurePosixPath(name)
        flat = [path.stem, path.name] if len(path.parts) > 1 else []
        return list(dict.fromkeys([str(path.with_suffix("")), name])), list(dict.fromkeys(flat))

    named = [stems(picture.name) for picture in pictures]
    claims = Counter(stem for _, flat in named for stem in flat)
    # A file without folders belongs to a picture without folders, if there is one.
    owned = Counter(stem for own, _ in named for stem in own)
    claims.update({stem: count - claims[stem] for stem, count in owned.items()})
    endings = [mark + suffix for mark in ("", MASKS_BESIDE) for suffix in _MASK_SUFFIXES]

    def find(job: Job) -> dict[str, Any]:
        own, flat = stems(job.picture.name)
        usable = [*own, *(stem for stem in flat if stem not in owned)]
        for stem in sorted(usable, key=lambda stem: claims[stem] > 1):
            for ending in endings:
                path = folder / f"{stem}{ending}"
                if path.is_file() and claims[stem] == 1:
                    return {"file_name": path, "format": format}
                if path.is_file():
                    better = next((stem for stem in own if claims[stem] == 1), own[0])
                    raise ValueError(
                        f"image {job.picture.name}: its masks {path} could be those of another "
                        f"picture, too; call them {better}{ending}"
                    )
        raise FileNotFoundError(
            f"image {job.picture.name}: no masks in {folder}, such as {own[0]}.png"
        )

    return Masks(find)


def _masks_of_json(path: Path, pictures: Sequence[Source], format: str) -> Masks:
    """Those of a COCO JSON, by the file names of its ``images`` first, then by image id.

    Two pictures of one id are a ValueError; the other errors are those of `FileSource`.
    """
    source = FileSource(path, format)
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    named = {
        image["file_name"]: image["id"]
        for image in (images if isinstance(images, list) else ())
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and "id" in image
    }
    last = Counter(PurePosixPath(name).name for name in named)
    short = {PurePosixPath(name).name: number for name, number in named.items()}
    named = {**{name: k for name, k in short.items() if last[name] == 1}, **named}
    sources = {}
    for picture in pictures:
        by_name = named.get(picture.name, named.get(PurePosixPath(picture.name).name))
        image_id = picture.image_id if by_name is None else by_name
        sources[picture.name] = replace(picture, image_id=image_id)
    distinct(sources.values(), f"in {path} they could not be told apart: give masks by a folder")

    def find(job: Job) -> dict[str, Any]:
        name, image_id = str(job.picture.path), sources[job.picture.name].image_id
        record: dict[str, Any] = {"image_id": image_id, "file_name": name, "entities": {}}
        place = source.lead(record)["entities"]
        return {key: place[key] for key in ("file_name", "format", "segments_info")}

    return Masks(find)


# -- nouns and categories --------------------------------------------------------------------------


def split_nouns(text: str | None) -> tuple[str, ...] | None:
    """Nouns separated by commas; None without a text, ValueError for one without a noun."""
    if text is None:
        return None
    nouns = tuple(noun.strip() for noun in text.split(",") if noun.strip())
    if not nouns:
        raise ValueError(f'caption without nouns: --nouns is "{text}"; name at least one')
    return nouns


def read_categories(text: str | None) -> list[dict[str, Any] | str] | None:
    """Categories of a panoptic question; None without a text.

    Args:
        text: names separated by commas; "coco" for the 133 of COCO panoptic; or a file with a name
            per line or a JSON list of names or of ``{"id", "name", "isthing"}``, which may also be
            the value of ``categories``, as in COCO's files.

    Raises:
        ValueError: there is no name, one is empty or given twice, or the file is none of these.
    """
    if text is None:
        return None
    if text == "coco":
        return list(coco_panoptic_categories())
    path, where = Path(text), "--categories"
    listed: Any = [name.strip() for name in text.split(",") if name.strip()]
    if "," not in text and (path.is_file() or path.suffix in (".json", ".txt")):
        where = f"categories {path}"
        if path.suffix.lower() == ".json":
            content = read_json(path, "categories", "check --categories")
            listed = content.get("categories") if isinstance(content, dict) else content
            if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
                listed = coco_categories(path)
        elif path.is_file():
            listed = [line.strip() for line in _text(path).splitlines() if line.strip()]
        else:
            raise FileNotFoundError(f"{where} does not exist; check --categories")
    names = [str(item["name"] if isinstance(item, dict) else item).strip() for item in listed]
    if not names or not all(names):
        raise ValueError(f'{where}: no category, or an empty name; write such as "sky,grass,cow"')
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: category {twice!r} is there twice")
    return listed

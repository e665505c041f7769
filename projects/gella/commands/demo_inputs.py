"""What the demo works on: a job per picture and caption, and where each has its entity masks.

Nothing is decoded before its turn comes, so that a folder of thousands is listed at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gella.commands.inputs import MASKS_BESIDE, Source, distinct
from gella.data.panoptic import read_categories as coco_categories
from gella.data.records import Place
from gella.data.register import choose_entities, coco_panoptic_categories, dataset_records
from gella.entities.entity_map import EntityMap
from gella.entities.sources import FileSource, load_from_record
from gella.segmenters.from_transformers import how_to_find
from gella.utils.io import file_hash, json_lines, read_json, read_text

RESERVED = ("failures",)  # the demo's own JSON in the output folder, without the suffix
_MASK_SUFFIXES = (".npz", ".png", ".npy")
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

    times = Counter[str]()
    keys = []  # (picture's name, how often it came before)
    for name in names:
        keys.append((name, times[name]))
        times[name] += 1
    chosen = {key: title(key, "stem") for key in keys}
    for form in ("suffix", "mark"):
        counts = Counter([*RESERVED, *(name.casefold() for name in chosen.values())])
        chosen |= {k: title(k, form) for k, name in chosen.items() if counts[name.casefold()] > 1}
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
    titles = output_names(
        [path if counts[job.picture.name] > 1 else job.picture.name for path, job in jobs.items()]
    )
    return [replace(job, name=title) for job, title in zip(jobs.values(), titles, strict=True)]


class Names:
    """Pictures by the names that files give them.

    A name is a picture's path below the input folder, or as much of the path's end as is enough;
    the suffix may be left out, and the more exact meaning counts. A name with more folders than the
    input has ("data/img/a.png" for "a.png") is tried by its end, unless it leads upwards. Names are
    only compared, never opened. Where a name means nothing else it is an image id, "142238" for
    "000000142238.jpg".
    """

    def __init__(self, pictures: Sequence[Source]) -> None:
        """``pictures`` whose names are their paths below the input folder."""
        self._meanings: list[dict[str, list[Source]]] = [defaultdict(list) for _ in range(5)]
        for picture in pictures:
            self._meanings[4][str(picture.image_id)].append(picture)
            path = PurePosixPath(plain(picture.name))
            for place, form in enumerate((path, path.with_suffix(""))):
                self._meanings[place][str(form)].append(picture)
                for start in range(1, len(form.parts)):
                    end = PurePosixPath(*form.parts[start:])
                    self._meanings[2 + place][str(end)].append(picture)

    def meant(self, name: str) -> list[Source]:
        """The pictures that a name means: none, one, or several that it cannot tell apart."""
        return next((meaning[name] for meaning in self._meanings if name in meaning), [])

    def find(self, name: str) -> list[Source]:
        """The same of a name that may have more folders."""
        path = PurePosixPath(name.replace("\\", "/"))
        parts = path.parts[1:] if path.is_absolute() else path.parts
        starts = range(0 if ".." in parts else len(parts))
        found = (self.meant(str(PurePosixPath(*parts[start:]))) for start in starts)
        return next(filter(None, found), [])


# -- captions --------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One caption of a file.

    Attributes:
        image: name of its picture; None: the file says it by the order.
        text: caption or expression.
        where: file and line, for messages.
        nouns: of the caption, in its order; None: not given.
        masks: file of the picture's masks, relative to the folder of the file.
        expression, categories: what else to ask about the picture; the web page offers them.
    """

    image: str | None
    text: str
    where: str
    nouns: tuple[str, ...] | None = None
    masks: Path | None = None
    expression: str = ""
    categories: tuple[str, ...] = ()


def read_captions(file_name: str | Path) -> list[Entry]:
    """Read a file of captions: JSON lines by the suffix .jsonl, .ndjson or .json, else text.

    JSON lines, or one list of them: ``image`` (or ``file_name``, ``image_id``), ``caption`` (or
    ``description``, ``expression``, ``text``) and, if wanted, ``nouns`` and ``masks``; so the files
    of ``tools/describe_images.py`` do. The narratives of Panoptic Narrative Grounding have their
    nouns in ``segments`` (docs/FORMATS.md 2). Text: ``name<TAB>caption`` in every line, or a
    caption in every line. Empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; names the line.
    """
    path = Path(file_name)
    if not path.is_file():
        raise FileNotFoundError(f"captions {path} do not exist; check --captions")
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        entries = [_json_entry(path, where, item) for where, item in _json_items(path)]
    else:
        # Not splitlines(): a caption may hold characters that it takes for line ends (U+2028).
        lines = read_text(path).split("\n")
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


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each entry of a JSON stands, and the entry: of a list in .json, or of lines."""
    if path.suffix.lower() == ".json":
        with suppress(ValueError):
            if isinstance(content := read_json(path), list):
                yield from ((f"entry {place}", item) for place, item in enumerate(content))
                return
    yield from ((f"line {number}", item) for number, item in json_lines(path))


def _json_entry(path: Path, where: str, item: Any) -> Entry:
    if isinstance(item, ValueError):
        raise item
    place, texts = Place(path, where), []
    names, spoken = ("image", "file_name", "image_id"), ("caption", "description", "expression")
    for keys in (names, (*spoken, "text")):
        key = next((key for key in keys if isinstance(item, dict) and key in item), keys[0])
        texts.append(plain((place.key if key == "image_id" else place.text)(item, key)))
    nouns, masks = item.get("nouns"), item.get("masks")
    if nouns is None and "segments" in item:
        segments = place.listed(item, "segments")
        named = [s for s in segments if place.field(s, "segment_ids") or s.get("noun")]
        nouns = [place.text(segment, "utterance") for segment in named] or None
        item = {**item, "nouns": nouns}
    if nouns is not None:
        if not all(isinstance(noun, str) for noun in place.listed(item, "nouns")):
            place.wrong("field", "'nouns' is no list of texts")
        nouns = tuple(map(plain, nouns))
    if masks is not None:
        if not place.text(item, "masks") or "\0" in masks:
            place.wrong("field", "'masks' is no name of a file")
        masks = path.parent / masks
    more = plain(item.get("expression", "")), tuple(map(plain, item.get("categories") or ()))
    return Entry(texts[0], texts[1], f"{path}, {where}", nouns, masks, *more)


def assign(
    entries: Sequence[Entry], pictures: Sequence[Source]
) -> tuple[dict[str, list[Entry]], list[Entry]]:
    """Which captions each picture has, see `Names`.

    Returns:
        Entries by the name of their picture, in the order of the pictures, and those whose picture
        is not there.

    Raises:
        ValueError: captions without names do not go with the number of pictures, or a name is of
            several pictures, or no caption is of any picture.
    """
    assigned: dict[str, list[Entry]] = {picture.name: [] for picture in pictures}
    lost: list[Entry] = []
    nameless = entries[0].image is None
    # All captions of a nameless file are of the one picture, else one of each.
    if nameless and 1 != len(pictures) != len(entries):
        raise ValueError(
            f"{entries[0].where.rpartition(',')[0]} has {len(entries)} captions without names, "
            f"but there are {len(pictures)} pictures; write name<TAB>caption, or a caption for "
            "each picture in their order"
        )
    names = Names(pictures)
    for place, entry in enumerate(entries):
        meant = [pictures[place % len(pictures)]] if nameless else names.find(entry.image or "")
        if len(meant) > 1:
            raise ValueError(
                f"{entry.where}: {entry.image!r} could be {meant[0].name} or {meant[1].name}; "
                "write more of its path"
            )
        (assigned[meant[0].name] if meant else lost).append(entry)
    if len(lost) == len(entries):
        raise ValueError(
            f"{lost[0].where}: {lost[0].image!r} is none of the {len(pictures)} pictures, and no "
            f"other caption is of one (the first picture is {pictures[0].name})"
        )
    return {name: listed for name, listed in assigned.items() if listed}, lost


# -- masks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masks:
    """Where the entities of jobs come from.

    Attributes:
        find: the ``entities`` of a job's dataset dict (docs/FORMATS.md 7); {}: the whole picture is
            one entity. Raises FileNotFoundError or ValueError for a job that has none, or one that
            might be another's.
        made_by: what a live segmenter's masks follow from.
    """

    find: Callable[[Job], dict[str, Any]]
    made_by: Any = None

    def key(self, job: Job) -> Any:
        """What JSON can hold, and changes when the entities would change, so that finished pictures
        are known without decoding a mask; errors as `find`."""
        place = self.find(job)
        if "file_name" not in place:
            return self.made_by or "whole"
        file = Path(place["file_name"])
        if not file.is_file():
            raise FileNotFoundError(f"image {job.picture.name}: masks {file} do not exist")
        # Of a JSON the entries say all; in other files the masks themselves lie.
        masks = None if file.suffix.lower() == ".json" else file_hash(file)
        return [masks, *(place.get(name) for name in ("format", "segments_info"))]

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """The job's entities in the frame of its picture, uint8 (H, W, 3).

        Raises:
            FileNotFoundError, ValueError: there are none, or they are damaged or of another size.
        """
        place, size = self.find(job), image.shape[:2]
        if not place:
            return EntityMap(np.ones(size, dtype=np.int32), [1])
        picture = {"image_id": job.picture.image_id, "file_name": job.picture.name}
        record = job.record or {**picture, "height": size[0], "width": size[1]}
        return load_from_record({**record, "entities": place}, image)


def masks_beside(whole: bool = False) -> Masks:
    """The file that the captions name, else ``x_masks.npz`` or ``x_masks.png`` beside ``x.jpg``.

    ``whole``: a picture without one is one entity, for questions that do not depend on masks.
    """

    def find(job: Job) -> dict[str, Any]:
        path = job.picture.path
        beside = [path.with_name(path.stem + MASKS_BESIDE + suffix) for suffix in _MASK_SUFFIXES]
        file = job.masks or next((file for file in beside if file.is_file()), None)
        if file is not None:
            return {"file_name": file, "format": "auto"}
        if whole:
            return {}
        raise FileNotFoundError(
            f"image {job.picture.name}: no masks; put {beside[1].name} beside it, give --masks "
            f"FILE, or have them found: {how_to_find()}"
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
    return Masks(lambda job: {"file_name": path, "format": format, "segments_info": segments})


def _masks_of_folder(folder: Path, pictures: Sequence[Source], format: str) -> Masks:
    """An ``.npz`` or ``.png`` per picture that bears its name, see `Names`, or that and _masks."""
    names = Names(pictures)
    files: dict[str, list[tuple[bool, int, Path]]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _MASK_SUFFIXES:
            stem = plain(path.relative_to(folder).with_suffix("").as_posix())
            meant = names.meant(stem) or names.meant(stem.removesuffix(MASKS_BESIDE))
            for picture in meant:  # the first is taken: a name of one picture, with its folders
                files[picture.name].append((len(meant) > 1, -len(path.parts), path))

    def find(job: Job) -> dict[str, Any]:
        name = job.picture.name
        stem = str(PurePosixPath(name).with_suffix(""))
        if name not in files:
            raise FileNotFoundError(f"image {name}: no masks in {folder}, such as {stem}.png")
        shared, _, path = min(files[name])
        if shared:
            better = stem if len(names.meant(plain(stem))) == 1 else name
            raise ValueError(
                f"image {name}: its masks {path} could be those of another picture, too; call them "
                f"{better}{path.suffix}"
            )
        return {"file_name": path, "format": format}

    return Masks(find)


def _masks_of_json(path: Path, pictures: Sequence[Source], format: str) -> Masks:
    """Those of a COCO JSON, by the file names of its ``images`` first, then by image id.

    Two pictures of one id are a ValueError; the other errors are those of `FileSource`.
    """
    source, names, content = FileSource(path, format), Names(pictures), read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    ids: dict[str, dict[str, Any]] = defaultdict(dict)  # by picture, and by how the file calls it
    for image in images if isinstance(images, list) else ():
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and "id" in image:
            for picture in names.find(image["file_name"]):
                ids[picture.name][image["file_name"]] = image["id"]
    sources = {}
    for picture in pictures:
        known = ids[picture.name]
        (only,) = known.values() if len(known) == 1 else (picture.image_id,)
        sources[picture.name] = replace(picture, image_id=known.get(picture.name, only))
    distinct(sources.values(), f"in {path} they could not be told apart: give masks by a folder")

    def find(job: Job) -> dict[str, Any]:
        name, image_id = str(job.picture.path), sources[job.picture.name].image_id
        record: dict[str, Any] = {"image_id": image_id, "file_name": name, "entities": {}}
        return {**source.lead(record)["entities"], "targets": None}

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
            listed = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        else:
            raise FileNotFoundError(f"{where} does not exist; check --categories")
    names = [str(item["name"] if isinstance(item, dict) else item).strip() for item in listed]
    if not names or not all(names):
        raise ValueError(f'{where}: no category, or an empty name; write such as "sky,grass,cow"')
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: category {twice!r} is there twice")
    return listed

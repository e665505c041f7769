"""RefCOCO, RefCOCO+ and RefCOCOg as dataset dicts, and their val and test images.

All of these images lie inside COCO train2017 (docs/FORMATS.md 3), so a model that is trained on it
has seen, with masks, the pictures that RefCOCO's scores are measured on: they can be left out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from gella.data.panoptic import load_coco_panoptic, load_instances
from gella.data.records import ADVICE, STOP, Place, Problems, RecordStore, as_records, selected
from gella.utils.io import few, read_json, read_pickle

REFCOCO_FOLDERS = ("refcoco", "refcoco+", "refcocog")
GREFCOCO = "grefcoco"
_logger = logging.getLogger(__name__)


def load_refcoco(
    folder: str | Path,
    split_by: str,
    split: str,
    image_root: str | Path,
    *,
    per: str = "expression",
    panoptic_json: str | Path | None = None,
    panoptic_root: str | Path | None = None,
    match: str = "id",
    names_of_2017: bool = False,
    tasks: tuple[str, ...] = ("ground", "refer"),
    problems: Problems = STOP,
) -> RecordStore:
    """Read the refs of one split (docs/FORMATS.md 3).

    Args:
        folder: holds ``instances.json`` and `refs_file`.
        split_by: "unc", "google" or "umd".
        split: "train", "val", "test", "testA" or "testB"; refs of other splits are passed over.
        image_root: folder of the images.
        per: "expression": a dict per sentence (evaluation); "image": a dict per image with all its
            sentences (training draws among them).
        panoptic_json, panoptic_root: a panoptic annotation whose segments are the entities.
            Without, the objects of ``instances.json`` are, as ``{"format": "coco_instances",
            "segments_info": [... "segmentation"]}`` with their polygons or RLE.
        match: how objects are found among panoptic segments: "id", by id and box, as in the
            synthetic shapes; "overlap", by IoU when mapped, as in COCO, where the two annotations
            have ids of their own: the objects are ``entities["targets"]``, still the truth.
        names_of_2017, tasks, problems: see `load_instances`.

    Returns:
        Dicts of the image with ``expressions``: ``{"text", "segment_ids", "sent_id", "ref_id"}``;
        ``segment_ids`` are several, or none, in gRefCOCO. The refs' own file names are no names of
        images and are not used.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pickle is refused, the split has no ref, or a ref names what the
            annotations do not have.
    """
    if (per, match) not in itertools.product(("expression", "image"), ("id", "overlap")):
        raise ValueError(f"per is {per!r} (expression, image) and match {match!r} (id, overlap)")
    objects, refs = Path(folder, "instances.json"), refs_file(folder, split_by)
    options: dict[str, Any] = {"names_of_2017": names_of_2017, "problems": problems}
    images = load_instances(objects, image_root, tasks, **options)
    said = _said(images, refs, split, objects, problems)
    numbers, store = images.numbers_by_image(), images.derived()
    if panoptic_json is not None:
        paths = (panoptic_json, panoptic_root or "", image_root)
        others = problems.uncounted()  # its figures would be of all images, not of the split's
        panoptic = load_coco_panoptic(*paths, tasks, others)
        store, numbers = _joined(said, images, panoptic, Place(panoptic_json, "", problems), match)
    for image_id, texts in said.items():
        if image_id in numbers:
            for group in [texts] if per == "image" else [[one] for one in texts]:
                store.add(numbers[image_id], {"expressions": group})
    return store


def refs_file(folder: str | Path, split_by: str) -> Path:
    """A folder's refs: ``refs(unc).p``, or gRefCOCO's ``grefs(unc).json`` or ``grefs(unc).p``."""
    names = (f"grefs({split_by}).json", f"grefs({split_by}).p", f"refs({split_by}).p")
    usual = names[0 if Path(folder).name == GREFCOCO else 2]  # for the error where there is none
    return next((p for name in names if (p := Path(folder, name)).is_file()), Path(folder, usual))


def read_refs(path: str | Path) -> list[dict[str, Any]]:
    """The refs of a `refs_file`, or a ValueError when it holds something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; {ADVICE}")
    try:
        refs = (read_json if Path(path).suffix == ".json" else read_pickle)(path)
    except ValueError as error:
        raise ValueError(f"{path}: refused, {error}; get the file from its first source") from error
    if not isinstance(refs, list):
        raise ValueError(f"{path}: holds a {type(refs).__name__}, not a list of refs")
    return refs


def _said(
    images: RecordStore, refs_file: Path, split: str, instances_json: Path, problems: Problems
) -> dict[str, list[dict[str, Any]]]:
    """Expressions of a split by image, in the order of the file."""
    for figure in ("refs", "images", "expressions"):
        problems.count(figure, 0)
    numbers = images.numbers_by_image()
    objects: dict[str, dict[int, Any]] = {}  # whether it is a crowd
    said: dict[str, list[dict[str, Any]]] = {}
    splits, ref_ids = set(), set()
    file = Place(refs_file, problems=problems)
    refs = file.read(read_refs)
    for number, ref in enumerate(refs or []):
        splits.add(name := file.at(f"ref {number}").field(ref, "split"))
        if name != split:  # one file holds all splits
            continue
        ref_id = file.at(f"ref {number}").field(ref, "ref_id")
        image_id = file.at(f"ref {ref_id}").image_id(ref)
        place = file.at(f"ref {ref_id}, image {image_id}")
        meant, sentences = place.field(ref, "ann_id"), place.listed(ref, "sentences")
        # In gRefCOCO several objects, or none, which may stand there as -1.
        each = dict.fromkeys(map(str, meant)) if isinstance(meant, list) else [meant]
        targets = [place.whole({"ann_id": one}, "ann_id") for one in each if str(one) != "-1"]
        problems.count("refs")
        if ref_id in ref_ids:
            place.note("duplicate-ref", "the ref_id occurs twice", "error")
        ref_ids.add(ref_id)
        if image_id not in numbers:
            place.stranger(refs[number : number + 50], numbers, instances_json)
            continue
        if image_id not in objects:
            segments = images.shared(numbers[image_id])["entities"]["segments_info"]
            objects[image_id] = {s["id"]: s.get("iscrowd", 0) for s in segments}
        if absent := [target for target in targets if target not in objects[image_id]]:
            place.wrong("phrase-without-mask", f"object {few(absent)} is not in {instances_json}")
            continue
        if crowds := [target for target in targets if objects[image_id][target]]:
            place.note("crowd", f"object {few(crowds)} is a crowd, which is no input entity")
        texts = [
            {
                "text": place.key(sentence, "sent"),
                "segment_ids": targets,
                "sent_id": place.field(sentence, "sent_id"),
                "ref_id": ref_id,
            }
            for sentence in sentences
        ]
        problems.count("expressions", len(texts))
        if len(targets) != 1:
            problems.count(f"expressions of {'several' if targets else 'no'} objects", len(texts))
        if not texts or not all((text["text"] or "").strip() for text in texts):
            place.note("empty", f"an empty expression among {len(texts)}", "error")
        said.setdefault(image_id, []).extend(texts)
    problems.count("images", len(said))
    if refs is not None and split not in splits:
        known = ", ".join(sorted(map(str, splits)))
        file.wrong("split", f"no ref is in split '{split}'; it has {known}")
    return said


def _joined(
    said: dict[str, list[dict[str, Any]]],
    images: RecordStore,
    panoptic: RecordStore,
    file: Place,
    match: str,
) -> tuple[RecordStore, dict[str, int]]:
    """Shared fields of every image that is spoken of, with the panoptic segments as entities."""
    own, other = images.numbers_by_image(), panoptic.numbers_by_image()
    store, numbers = RecordStore(), {}
    for number, (image_id, texts) in enumerate(said.items()):
        place = file.at(f"image {image_id}")
        if image_id not in other:
            rest = itertools.islice(said, number, number + 50)
            place.stranger([{"image_id": one} for one in rest], other, file.path)
            continue
        image, whole = images.shared(own[image_id]), panoptic.shared(other[image_id])
        if match == "overlap":
            entities = {**whole["entities"], "targets": image["entities"]}
            numbers[image_id] = store.share({**image, "entities": entities})
            continue
        # Equal ids alone could be chance: the boxes have to be equal too.
        segments = whole["entities"]["segments_info"]
        boxes = {segment["id"]: segment.get("bbox") for segment in segments}
        objects = {s["id"]: s.get("bbox") for s in image["entities"]["segments_info"]}
        for target in {target for text in texts for target in text["segment_ids"]}:
            if target not in boxes or boxes[target] != objects[target]:
                place.wrong(
                    "other-object",
                    f"object {target} is none of its {len(segments)} segments; match by overlap, "
                    "or leave panoptic_json out",
                )
        numbers[image_id] = store.share(whole)
    return store, numbers


def held_out_images(root: str | Path) -> frozenset[str]:
    """Ids, by `image_key`, of all images of which a ref of another split than "train" speaks.

    ``root`` holds ``refcoco``, ``refcoco+``, ``refcocog`` with ``refs(*).p``, maybe ``grefcoco``.
    Every file that is there counts, so the splits of unc, google and umd are joined; none is a
    FileNotFoundError.
    """
    files = {
        name: sorted(
            [*Path(root, name).glob("*refs(*).p"), *Path(root, name).glob("grefs(*).json")]
        )
        for name in (*REFCOCO_FOLDERS, GREFCOCO)
    }
    absent = [name for name in REFCOCO_FOLDERS if not files[name]]
    if not any(files.values()):
        raise FileNotFoundError(
            f"DATASETS.EXCLUDE_REFCOCO_VAL_TEST needs the refs(*).p of {', '.join(absent)} below "
            f"{root}, where there is none; see datasets/README.md, or set the key to False"
        )
    if absent:
        _logger.warning(
            "%s: no refs(*).p of %s; their val and test images are NOT left out of training",
            root,
            ", ".join(absent),
        )
    # A hundred thousand refs take seconds to read, and several datasets ask for them.
    stamps = [(str(path), path.stat().st_mtime_ns) for found in files.values() for path in found]
    return _images_of(tuple(stamps))


@lru_cache(maxsize=2)
def _images_of(stamps: tuple[tuple[str, int], ...]) -> frozenset[str]:
    images = set()
    for path, _ in stamps:
        for number, ref in enumerate(read_refs(path)):
            place = Place(path, f"ref {number}")
            if place.field(ref, "split") != "train":
                images.add(place.image_id(ref))
    return frozenset(images)


def without_held_out(
    records: Sequence[dict[str, Any]], dataset_name: str, root: str | Path
) -> Sequence[dict[str, Any]]:
    """The records of a dataset without those of RefCOCO val and test images; logs how many.

    Only datasets whose metadata has ``coco_train2017`` set are looked at: ids of other images mean
    nothing here, and RefCOCO's own training splits stay as they are published. ``root`` and errors
    are those of `held_out_images`.
    """
    if not MetadataCatalog.get(dataset_name).get("coco_train2017", False):
        return records
    held_out = held_out_images(root)
    records = as_records(records)
    ids = records.image_ids()
    kept = ~np.isin(ids, sorted(held_out))
    _logger.info(
        "%s: left out %s of %s images (%s of %s records), which are val or test images of RefCOCO",
        dataset_name,
        *(f"{n:,}" for n in (len(np.unique(ids[~kept])), len(np.unique(ids)))),
        *(f"{n:,}" for n in (int((~kept).sum()), len(ids))),
    )
    return selected(records, np.flatnonzero(kept))

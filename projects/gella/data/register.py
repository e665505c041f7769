"""Datasets by name: registering them, and what a config makes of their records.

`register_all` registers those that the project knows, below ``$DETECTRON2_DATASETS`` (default:
``datasets``), as Detectron2 does; datasets/README.md has the tree. No file is read before a dataset
is asked for. Next to what Detectron2's metadata usually has, ``form`` ("panoptic", "png",
"captions", "entityseg", "refcoco") and the paths say what lies on disk where, for
`gella.data.check`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from gella.data.entityseg import load_entityseg
from gella.data.narratives import load_captions, load_png
from gella.data.panoptic import category_metadata, load_coco_panoptic, read_categories
from gella.data.records import (
    PICTURE,
    STOP,
    Place,
    Problems,
    Records,
    RecordStore,
    as_records,
    check_record,
    mapped,
    selected,
)
from gella.data.refcoco import GREFCOCO, load_refcoco, refs_file
from gella.entities.sources import AnnotationSource, source_for
from gella.utils.io import plain

_READERS: dict[str, Callable[..., RecordStore]] = {}
_logger = logging.getLogger(__name__)


# (folder, who made the split, its parts). "+" is no letter for names of files and shells.
REFCOCO_SPLITS = (
    ("refcoco", "unc", ("train", "val", "testA", "testB")),
    ("refcoco", "google", ("train", "val", "test")),
    ("refcoco+", "unc", ("train", "val", "testA", "testB")),
    ("refcocog", "umd", ("train", "val", "test")),
    ("refcocog", "google", ("train", "val")),
    (GREFCOCO, "unc", ("train", "val", "testA", "testB")),
)


def refcoco_name(folder: str, split_by: str, split: str, entities: str = "instances") -> str:
    """Name in the catalogs, such as ``gella_refcocoplus_unc_testA``.

    Args:
        folder: "refcoco", "refcoco+", "refcocog" or "grefcoco".
        split_by: "unc", "google" or "umd".
        split: of the refs.
        entities: "instances" (the objects of ``instances.json``) or "panoptic" (all segments of
            COCO panoptic, in which the object is found by overlap; the name then ends with it).
    """
    name = f"gella_{folder.replace('+', 'plus')}_{split_by}_{split}"
    return name if entities == "instances" else f"{name}_{entities}"


def register_all(root: str | Path) -> None:
    """Register every dataset that the project knows, below ``root``; no file is read.

    Names: ``gella_shapes_{png,panoptic,refcoco}_{train,val}``, ``gella_shapes_captions_train``,
    ``gella_shapes_nouns_val``, ``gella_coco_{panoptic,png}_{train,val}2017``,
    ``gella_coco_nouns_val2017``, ``gella_entityseg_captions_train``, and `refcoco_name` of every
    entry of `REFCOCO_SPLITS` with both kinds of entities.
    """
    base = Path(root).expanduser()
    _register_narrated("shapes", base / "shapes", ("train", "val"), SHAPES_CATEGORIES)
    splits = ("train2017", "val2017")
    _register_narrated("coco", base / "coco", splits, coco_panoptic_categories())
    for kind in ("panoptic", "png"):
        # The images that DATASETS.EXCLUDE_REFCOCO_VAL_TEST looks at.
        MetadataCatalog.get(f"gella_coco_{kind}_train2017").set(coco_train2017=True)
    shapes, entityseg = base / "shapes", base / "entityseg"
    for split, per in (("train", "image"), ("val", "expression")):
        images, pngs, panoptic_json = _places(shapes, split)
        panoptic: dict[str, Any] = {"panoptic_json": panoptic_json, "panoptic_root": pngs}
        name = f"gella_shapes_refcoco_{split}"
        register_refcoco(name, shapes / "refcoco", "unc", split, images, per=per, **panoptic)
    where = (*_places(shapes, "train"), shapes / "annotations" / "captions_train.jsonl")
    register_captions("gella_shapes_captions_train", *where, SHAPES_CATEGORIES)
    _register_refcoco(base)
    whole = "entityv2_010203_entity_train.json"
    names = (whole, whole.replace(".json", "_lr.json"))
    places = (folder + name for name in names for folder in ("entity_segmentation/", ""))
    instances = _first_that_exists(entityseg / "annotations", *places)
    low = instances.stem.endswith("_lr")  # masks of the smaller copies of the images
    images = entityseg / ("images_lr" if low else "images")
    captions = entityseg / "annotations" / "captions_train.jsonl"
    register_entityseg("gella_entityseg_captions_train", instances, captions, images)


def _places(root: Path, split: str) -> tuple[Path, Path, Path]:
    """Images, panoptic PNGs (COCO, Detectron2 and PNG keep them elsewhere), and their JSON."""
    pngs = _first_that_exists(
        root,
        f"annotations/panoptic_{split}",
        f"panoptic_{split}",
        f"annotations/panoptic_segmentation/{split}",
    )
    return root / split, pngs, root / "annotations" / f"panoptic_{split}.json"


def _register_narrated(
    kind: str, root: Path, splits: Sequence[str], categories: list[dict[str, Any]]
) -> None:
    for split in splits:
        where = _places(root, split)
        narratives = root / "annotations" / f"png_{kind}_{split}.json"
        register_panoptic(f"gella_{kind}_panoptic_{split}", *where, categories)
        register_png(f"gella_{kind}_png_{split}", *where, narratives, categories)
        if split.startswith("val"):
            asked = ("extract",), "noun_extraction"
            register_png(f"gella_{kind}_nouns_{split}", *where, narratives, categories, *asked)


def _register_refcoco(root: Path) -> None:
    coco = root / "coco"
    # All of RefCOCO's pictures are in train2017 too, under other names: one copy is enough.
    images = _first_that_exists(coco, "train2014", "train2017")
    _, pngs, panoptic_json = _places(coco, "train2017")
    panoptic: dict[str, Any] = {"panoptic_json": panoptic_json, "panoptic_root": pngs}
    panoptic["match"] = "overlap"
    for folder, split_by, splits in REFCOCO_SPLITS:
        for split in splits:
            for entities, more in (("instances", {}), ("panoptic", panoptic)):
                register_refcoco(
                    refcoco_name(folder, split_by, split, entities),
                    root / folder,
                    split_by,
                    split,
                    images,
                    per="image" if split == "train" else "expression",
                    names_of_2017=images.name == "train2017",
                    **more,
                )


def register_panoptic(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    categories: list[dict[str, Any]] | None = None,
) -> None:
    """Register images with COCO panoptic annotations (evaluated by panoptic quality).

    Args:
        name: of the dataset in the catalogs.
        image_root, panoptic_root, panoptic_json: where the files are.
        categories: ``{id, name, isthing}`` each; None reads them from the file when the dataset is
            first loaded, and the metadata has none before.
    """
    paths = (str(panoptic_json), str(panoptic_root), str(image_root))
    reader = partial(load_coco_panoptic, *paths)
    _register_over(paths, categories, name, reader, "panoptic", "coco_panoptic_seg", paths[0])


def register_png(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    png_json: str | Path,
    categories: list[dict[str, Any]] | None = None,
    tasks: tuple[str, ...] = ("ground",),
    evaluator_type: str = "png",
) -> None:
    """Register narratives in the form of Panoptic Narrative Grounding.

    Args:
        name, image_root, panoptic_root, panoptic_json, categories: as `register_panoptic`.
        png_json: the narratives.
        tasks: what the records can train and serve.
        evaluator_type: "png" (average recall) or "noun_extraction".
    """
    paths = (str(panoptic_json), str(panoptic_root), str(image_root))
    reader = partial(load_png, str(png_json), *paths, tasks=tasks)
    _register_over(paths, categories, name, reader, "png", evaluator_type, png_json)


def register_captions(
    name: str,
    image_root: str | Path,
    panoptic_root: str | Path,
    panoptic_json: str | Path,
    captions_jsonl: str | Path,
    categories: list[dict[str, Any]] | None = None,
) -> None:
    """Register generated captions (JSON lines) that train describing and noun extraction.

    The other arguments are those of `register_panoptic`.
    """
    paths = (str(panoptic_json), str(panoptic_root), str(image_root))
    reader = partial(load_captions, str(captions_jsonl), *paths)
    kind = "noun_extraction"
    _register_over(paths, categories, name, reader, "captions", kind, captions_jsonl)


def register_refcoco(
    name: str,
    folder: str | Path,
    split_by: str,
    split: str,
    image_root: str | Path,
    *,
    panoptic_json: str | Path | None = None,
    panoptic_root: str | Path | None = None,
    names_of_2017: bool = False,
    **options: Any,
) -> None:
    """Register the refs of one split; arguments as `load_refcoco`."""
    panoptic = {"panoptic_json": panoptic_json, "panoptic_root": panoptic_root}
    options = {**options, **panoptic, "names_of_2017": names_of_2017}
    reader = partial(load_refcoco, folder, split_by, split, image_root, **options)
    given = {key: str(path) for key, path in panoptic.items() if path is not None}
    given.update(image_root=str(image_root), instances_json=str(Path(folder) / "instances.json"))
    refs = refs_file(folder, split_by)
    _register(name, reader, "refcoco", "refcoco", refs, **given)
    MetadataCatalog.get(name).set(split=split, names_of_2017=names_of_2017)


def register_entityseg(
    name: str,
    instances_json: str | Path,
    captions_jsonl: str | Path,
    image_root: str | Path,
) -> None:
    """Register generated captions over COCO-style entity masks; arguments as `load_entityseg`."""
    reader = partial(load_entityseg, instances_json, captions_jsonl, image_root)
    given = {"image_root": str(image_root), "instances_json": str(instances_json)}
    _register(name, reader, "entityseg", "noun_extraction", captions_jsonl, **given)


def root_from_environment() -> str:
    """``$DETECTRON2_DATASETS``, else ``datasets`` here, or in the checkout where there is none."""
    checkout = Path(__file__).resolve().parents[3] / "datasets"
    default = str(checkout) if checkout.is_dir() and not Path("datasets").is_dir() else "datasets"
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS") or default)


def read_dataset(name: str, problems: Problems) -> RecordStore:
    """The records of a dataset that was registered here; ``problems`` gets what is wrong."""
    return _READERS[name](problems=problems)


def dataset_records(name: str, keys: Sequence[str] = PICTURE, task: str = "") -> Records:
    """The records of a registered dataset, whoever registered it.

    ``keys`` and ``task`` say what they have to hold, see `check_record`. Raises ValueError where
    they do not, for an unknown name (the known ones are listed), and for two categories of one.
    """
    if name not in DatasetCatalog.list():
        known = ", ".join(sorted(n for n in DatasetCatalog.list() if n.startswith("gella_")))
        raise ValueError(f"dataset {name} is not registered; there are: {known}")
    found, dataset = DatasetCatalog.get(name), record_place(name)
    records = as_records(found)
    # The readers here have looked at theirs.
    for number, record in enumerate(records if records is not found else ()):
        which = record.get("file_name", record.get("image_id"))
        check_record(record, dataset.at(f"{dataset.where}, record {number} ({which})"), keys, task)
    if categories := MetadataCatalog.get(name).get("categories"):
        read_categories(f"metadata of {name}", plain(categories))
    return records


def record_place(name: str, problems: Problems = STOP) -> Place:
    """The place of a dataset: its annotation file, or the file of the function that returns it."""
    function = DatasetCatalog[name]
    code = getattr(getattr(function, "func", function), "__code__", None)
    path = MetadataCatalog.get(name).get("json_file") or (code and code.co_filename)
    return Place(path or "the catalog", f"dataset {name}", problems)


def _register(
    name: str,
    reader: Callable[..., RecordStore],
    form: str,
    evaluator_type: str,
    json_file: str | Path,
    **paths: str,
) -> None:
    # A check reads with a report of its own, for which the catalog has no argument.
    _READERS[name] = reader
    DatasetCatalog.register(name, reader)
    what = {"form": form, "evaluator_type": evaluator_type, "json_file": str(json_file)}
    MetadataCatalog.get(name).set(**what, **paths)


def _register_over(
    paths: tuple[str, str, str],
    categories: list[dict[str, Any]] | None,
    name: str,
    reader: Callable[..., RecordStore],
    *what: Any,
) -> None:
    """Register a dataset over a panoptic annotation, with its categories."""

    def load_and_describe(problems: Problems = STOP) -> RecordStore:
        records = reader(problems=problems)
        if problems is STOP:  # a check has told already what is wrong with them
            metadata.set(**category_metadata(read_categories(paths[0])))
        return records

    given = dict(zip(("panoptic_json", "panoptic_root", "image_root"), paths))
    _register(name, load_and_describe if categories is None else reader, *what, **given)
    metadata = MetadataCatalog.get(name)
    if categories is not None:
        metadata.set(**category_metadata(categories))


def _first_that_exists(folder: str | Path, *names: str) -> Path:
    """The first of some names that exists in a folder; the first of all when none does."""
    options = [Path(folder) / name for name in names]
    return next((path for path in options if path.exists()), options[0])


def choose_entities(
    records: Sequence[dict[str, Any]], dataset_name: str, cfg: Any, *, is_train: bool
) -> Sequence[dict[str, Any]]:
    """Records of a dataset with the entities that ``INPUT.GELLA.ENTITY_SOURCES`` names for it.

    Training may leave out images without masks, with a warning and unless none is left
    (``INPUT.GELLA.LEAVE_OUT_MISSING``); at test that would raise the score.

    Raises:
        FileNotFoundError: the source's path does not exist.
        ValueError: an entry is malformed or names no registered dataset, or images lack masks;
            names the first of them.
    """
    own = cfg.INPUT.GELLA
    source = source_for(own.ENTITY_SOURCES, dataset_name)
    known = DatasetCatalog.list()
    for pattern, _, _ in own.ENTITY_SOURCES:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"INPUT.GELLA.ENTITY_SOURCES: {pattern} is no registered dataset; check its name"
            )
    if isinstance(source, AnnotationSource):
        return records  # datasets/check.py looks at a dataset's own files
    # Before training starts, not in the middle of an epoch.
    absent = source.missing(records)
    if absent:
        ids = [record["image_id"] for record in records]
        lacking = set(absent)
        kept = [place for place, image_id in enumerate(ids) if image_id not in lacking]
        first = ", ".join(str(image_id) for image_id in absent[:5])
        message = (
            f"dataset {dataset_name}: {len(absent)} of its {len(set(ids))} images have no masks in "
            f"{source}: {first}{', ...' if len(absent) > 5 else ''}"
        )
        if not (own.LEAVE_OUT_MISSING and is_train and kept):
            raise ValueError(
                f"{message}; make them or choose the file of this dataset (training can leave such "
                "images out: INPUT.GELLA.LEAVE_OUT_MISSING True)"
            )
        _logger.warning("%s; left out, with %d records", message, len(ids) - len(kept))
        records = selected(records, kept)
    return mapped(records, source.lead)


def import_modules(cfg: Any) -> list[ModuleType]:
    """Import what ``cfg.DATASETS.MODULES`` names, so that it can register itself.

    These are paths of Python files, relative to the current folder, and names of importable modules
    (``package.module``). Each is imported once per process, however often it is named. Its code
    runs with the rights of the user: name only files that you would run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module cannot be imported; the message says why and in which line.
    """
    modules = []
    for name in map(str, cfg.DATASETS.MODULES):
        is_file = name.endswith(".py") or "/" in name
        if is_file and not Path(name).is_file():
            raise FileNotFoundError(
                f"DATASETS.MODULES names {name}, which does not exist; paths start at the current "
                f"folder, {Path.cwd()}"
            )
        try:
            path = Path(name).resolve()
            modules.append(_import_file(path) if is_file else importlib.import_module(name))
        # Whatever foreign code raises is the user's to see, in one line.
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f.lineno for f in frames if Path(f.filename).name == Path(name).name]
            if isinstance(error, SyntaxError):
                lines = [error.lineno]
            said = f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")
            raise ValueError(f"DATASETS.MODULES: importing {name} failed: {said}") from error
    return modules


def _import_file(path: Path) -> ModuleType:
    # Two files of one name are two modules; the same file by two paths is one.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    title = f"gella_module_{path.stem}_{digest}"
    if title in sys.modules:
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]  # a half-made module must not look imported
        raise
    return module


# -- categories ----------------------------------------------------------------------

# "id name rrggbb", things (80) and stuff (53), in COCO's order.
_THINGS = """
1 person dc143c; 2 bicycle 770b20; 3 car 00008e; 4 motorcycle 0000e6; 5 airplane 6a00e4;
6 bus 003c64; 7 train 005064; 8 truck 000046; 9 boat 0000c0; 10 traffic light faaa1e;
11 fire hydrant 64aa1e; 13 stop sign dcdc00; 14 parking meter af74af; 15 bench fa001e;
16 bird a52a2a; 17 cat ff4dff; 18 dog 00e2fc; 19 horse b6b6ff; 20 sheep 005200; 21 cow 78a69d;
22 elephant 6e4c00; 23 bear ae39ff; 24 zebra c76400; 25 giraffe 480076; 27 backpack ffb3f0;
28 umbrella 007d5c; 31 handbag d10097; 32 tie bcd0b6; 33 suitcase 00dcb0; 34 frisbee ff63a4;
35 skis 5c0049; 36 snowboard 8581ff; 37 sports ball 4eb4ff; 38 kite 00e400;
39 baseball bat aefff3; 40 baseball glove 2d59ff; 41 skateboard 868667; 42 surfboard 9194ae;
43 tennis racket ffd0ba; 44 bottle c5e2ff; 46 wine glass ab8601; 47 cup 6d3f36; 48 fork cf8aff;
49 knife 97005f; 50 spoon 09503d; 51 bowl 546933; 52 banana 4a4169; 53 apple a6c466;
54 sandwich d0c3d2; 55 orange ff6d41; 56 broccoli 008f95; 57 carrot b300c2; 58 hot dog d1636a;
59 pizza 057900; 60 donut e3ffcd; 61 cake 93bad0; 62 chair 994501; 63 couch 035fa1;
64 potted plant a3ff00; 65 bed 7700aa; 67 dining table 00b6c7; 70 toilet 00a578; 72 tv b78258;
73 laptop 5f2000; 74 mouse 827287; 75 remote 6e8185; 76 keyboard a64a76; 77 cell phone db8eb9;
78 microwave 4fd272; 79 oven b25a3e; 80 toaster 41460f; 81 sink 7fa773; 82 refrigerator 3b696a;
84 book 8e6c2d; 85 clock c4ac00; 86 vase 5f3650; 87 scissors 804cff; 88 teddy bear c93901;
89 hair drier f6007a; 90 toothbrush bfa2d0
"""
_STUFF = """
92 banner ffff80; 93 blanket 93d3cb; 95 bridge 966464; 100 cardboard a8abac;
107 counter 9270c6; 109 curtain d2aa64; 112 door-stuff 5c8859; 118 floor-wood da58b8;
119 flower f18100; 122 fruit d911ff; 125 gravel 7c4ab5; 128 house 464646; 130 light ffe4ff;
133 mirror-stuff 9ad000; 138 net c1005c; 141 pillow 4c5b71; 144 platform ffb4c3;
145 playingfield 6a9ab0; 147 railroad e6968c; 148 river 3c8fff; 149 road 804080;
151 roof 5c5237; 154 sand fed47c; 155 sea 494dae; 156 shelf ffa062; 159 snow ffffff;
161 stairs 68546d; 166 tent a9a483; 168 towel e1c7ff; 171 wall-brick 89364a;
175 wall-stone 879edf; 176 wall-tile 07f6e7; 177 wall-wood 6bffc8; 178 water-other 3a2995;
180 window-blind b7798e; 181 window-other ff4961; 184 tree-merged 6b8e23;
185 fence-merged be9999; 186 ceiling-merged 928b8d; 187 sky-other-merged 4682b4;
188 cabinet-merged 86c79c; 189 table-merged d1e28c; 190 floor-other-merged 60246c;
191 pavement-merged 606060; 192 mountain-merged 40aa40; 193 grass-merged 98fb98;
194 dirt-merged d0e5e4; 195 paper-merged cebaab; 196 food-other-merged 98a140;
197 building-other-merged 747000; 198 rock-merged 00728f; 199 wall-other-merged 66669c;
200 rug-merged fa8dff
"""


def _categories(*tables: str) -> list[dict[str, Any]]:
    return [
        {"id": int(n), "name": " ".join(w), "isthing": isthing, "color": list(bytes.fromhex(rgb))}
        for isthing, table in zip((1, 0), tables)
        for n, *w, rgb in map(str.split, table.split(";"))
    ]


def coco_panoptic_categories() -> list[dict[str, Any]]:
    """Return COCO's form ``{id, name, isthing, color}``, things first; a fresh list every time."""
    return _categories(_THINGS, _STUFF)


# The drawn scenes of datasets/prepare_shapes.py.
SHAPES_CATEGORIES: list[dict[str, Any]] = [
    {**category, "supercategory": "shape" if category["isthing"] else "region"}
    for category in _categories(
        "1 circle dc143c; 2 square 005200; 3 triangle faaa1e; 4 star ffd0ba; 5 ring 003c64; "
        "6 cross ae39ff; 7 diamond 6e4c00",
        "8 sky 4682b4; 9 sand cebaab; 10 grass 98fb98; 11 water 3a2995; 12 wall 66669c; "
        "13 floor 606060",
    )
]
SHAPES_THINGS = tuple(c["name"] for c in SHAPES_CATEGORIES if c["isthing"])
SHAPES_STUFF = tuple(c["name"] for c in SHAPES_CATEGORIES if not c["isthing"])

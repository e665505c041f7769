#!/usr/bin/env python
"""Ground the nouns of a caption in a picture's entity masks; write pictures and JSON.

Your own picture, with masks from any segmenter (id PNG, COCO panoptic PNG, .npz, COCO results):

    python tools/demo.py --config-file configs/gella_tiny_shapes.yaml --weights model_final.pth \\
        --input scene.png --masks scene_masks.png --caption "A red circle lies on the sand." \\
        --nouns "A red circle,the sand" --output output/demo

Without --nouns the model extracts them. The first records of a registered dataset, with their own
captions, nouns and masks:

    python tools/demo.py --config-file configs/gella_tiny_shapes.yaml --weights model_final.pth \\
        --dataset gella_shapes_png_val --num 3 --output output/demo

Each picture gives <name>_grounding.png, <name>_colormap.png and <name>.json (nouns, spans, entity
ids and numbers, scores, masks as COCO RLE). Exit code 2 and one line "error: ..." for wrong input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from detectron2.data import DatasetCatalog

from gella.checkpoint import write_atomically
from gella.config_file import load_config
from gella.data.entity_choice import choose_entities
from gella.entities import EntityMap
from gella.entity_sources import load_entities, load_from_record
from gella.geometry import read_image
from gella.grounding import Grounding
from gella.plugins import import_modules
from gella.predictor import GellaPredictor, image_id_of


@dataclass
class Job:
    """One picture to ground: its entities, its caption and, if known, its nouns."""

    name: str
    source: dict[str, Any]  # what the JSON says about where the input came from
    image: np.ndarray
    entities: EntityMap
    image_id: int | str
    caption: str
    nouns: list[str] | None = None
    phrases: list[dict[str, Any]] | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows an example\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML", help="such as those in configs/")
    add("--weights", metavar="PTH", help='default: MODEL.WEIGHTS of the config; "": untrained')
    add("--input", metavar="IMAGE", help="the picture")
    add("--masks", metavar="FILE", help="entity masks of the same size; or a COCO JSON")
    add("--masks-format", default="auto", metavar="FORMAT", help="panoptic_png, gray_png, npz, ...")
    add("--panoptic-json", metavar="JSON", help="COCO panoptic file that says what is crowd")
    add("--caption", help="the sentence to ground")
    add("--nouns", metavar="A,B,C", help="its nouns, separated by commas, in their order")
    add("--extract", action="store_true", help="let the model find the nouns (as without --nouns)")
    add("--dataset", metavar="NAME", help="a registered dataset instead of --input")
    add("--num", type=int, default=3, help="with --dataset: how many pictures (default 3)")
    add("--output", default="output/demo", metavar="DIR", help="default: output/demo")
    add("--device", help="cpu, cuda; default: the config's")
    add(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    if args.dataset is None:
        for name in ("input", "masks", "caption"):
            if getattr(args, name) is None:
                parser.error(f"--{name} is missing (or give --dataset NAME)")
    elif args.input is not None:
        parser.error("--input and --dataset exclude each other")
    if args.num < 1:
        parser.error(f"--num is {args.num}; it must be at least 1")
    if args.nouns is not None and args.extract:
        parser.error("--nouns and --extract exclude each other")
    return args


def read_own_input(args: argparse.Namespace) -> list[Job]:
    """Read ``--input``, ``--masks``, ``--caption`` and ``--nouns``; wrong ones are ValueErrors."""
    if not args.caption.strip():
        raise ValueError("the caption is empty; write a sentence that names what to find")
    nouns = None
    if args.nouns is not None:
        nouns = [noun.strip() for noun in args.nouns.split(",") if noun.strip()]
        if not nouns:
            raise ValueError(f'caption without nouns: --nouns is "{args.nouns}"; name at least one')
    image = read_image(args.input, upright=True)
    segments_info = None
    if args.panoptic_json is not None:
        segments_info = find_segments(args.panoptic_json, Path(args.masks).name)
    image_id = image_id_of(args.input)
    entities = load_entities(
        args.masks,
        image.shape[0],
        image.shape[1],
        format=args.masks_format,
        segments_info=segments_info,
        image_id=image_id,
    )
    source = {"image": str(args.input), "masks": str(args.masks)}
    name = Path(args.input).stem
    return [Job(name, source, image, entities, image_id, args.caption, nouns=nouns)]


def find_segments(panoptic_json: str, mask_name: str) -> list[dict[str, Any]]:
    """Return ``segments_info`` of the annotation whose PNG is ``mask_name``.

    Raises:
        FileNotFoundError: there is no such JSON file.
        ValueError: it is no COCO panoptic file, or knows no such PNG.
    """
    if not Path(panoptic_json).is_file():
        raise FileNotFoundError(f"panoptic JSON {panoptic_json} does not exist; check the path")
    try:
        annotations = json.loads(Path(panoptic_json).read_text(encoding="utf-8"))["annotations"]
        return next(a["segments_info"] for a in annotations if a["file_name"] == mask_name)
    except StopIteration:
        raise ValueError(
            f"panoptic JSON {panoptic_json} has no annotation with file_name {mask_name}"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{panoptic_json} is no COCO panoptic file ({error!r})") from error


def read_dataset(args: argparse.Namespace, cfg: Any) -> list[Job]:
    """Take the first ``--num`` pictures of a registered dataset, with their first captions."""
    names = DatasetCatalog.list()
    if args.dataset not in names:
        known = ", ".join(sorted(name for name in names if name.startswith("gella_")))
        raise ValueError(f"dataset {args.dataset} is not registered; there are: {known}")
    jobs: dict[str, Job] = {}
    records = DatasetCatalog.get(args.dataset)
    for record in choose_entities(records, args.dataset, cfg, is_train=False):
        if len(jobs) == args.num:
            break
        name = Path(record["file_name"]).stem
        if name in jobs or not record.get("caption") or not record.get("phrases"):
            continue
        source = {"image": record["file_name"], "dataset": args.dataset}
        source["image_id"] = record["image_id"]
        phrases = None if args.extract else record["phrases"]
        jobs[name] = Job(
            name,
            source,
            read_image(record["file_name"]),
            load_from_record(record),
            record["image_id"],
            record["caption"],
            phrases=phrases,
        )
    if not jobs:
        raise ValueError(f"dataset {args.dataset} has no record with a caption and nouns")
    return list(jobs.values())


def ground(predictor: GellaPredictor, job: Job) -> Grounding:
    """Ground one job's caption."""
    predictor.set_image(job.image, job.entities, image_id=job.image_id)
    if job.phrases is not None:
        return predictor.ground_phrases(job.caption, job.phrases)
    return predictor.ground(job.caption, job.nouns)


def write(result: Grounding, job: Job, folder: Path) -> list[Path]:
    """Write the two pictures and the JSON, each complete or not at all; return their paths."""
    text = json.dumps({**job.source, **result.to_json()}, indent=2, ensure_ascii=False)
    grounding, colormap = result.plot(), result.plot_colormap()
    writers = {
        f"{job.name}_grounding.png": lambda stream: grounding.save(stream, format="PNG"),
        f"{job.name}_colormap.png": lambda stream: colormap.save(stream, format="PNG"),
        f"{job.name}.json": lambda stream: stream.write(text.encode("utf-8")),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, writer in writers.items():
        write_atomically(str(folder / name), writer)
    return [folder / name for name in writers]


def run(args: argparse.Namespace) -> None:
    """Read the input, then build the model (the slow part), then ground and write."""
    cfg = load_config(args.config_file, args.opts)
    import_modules(cfg)
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    if args.device is not None:
        cfg.MODEL.DEVICE = args.device
    jobs = read_own_input(args) if args.dataset is None else read_dataset(args, cfg)
    predictor = GellaPredictor(cfg, config_file=args.config_file)
    if not cfg.MODEL.WEIGHTS:
        print("no weights: the model is untrained, and the output is labelled so")
    for job in jobs:
        result = ground(predictor, job)
        for phrase in result.phrases:
            print(f"  {phrase['phrase']}: entities {phrase['entity_ids']}")
        for path in write(result, job, Path(args.output)):
            print(f"wrote {path}")
    print(f"next: open {Path(args.output) / jobs[0].name}_grounding.png, or try your own:")
    weights = f" --weights {cfg.MODEL.WEIGHTS}" if cfg.MODEL.WEIGHTS else ""
    print(
        f"  python tools/demo.py --config-file {args.config_file}{weights}"
        ' --input IMAGE --masks FILE --caption "..."'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

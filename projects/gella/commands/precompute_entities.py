"""Make the entity masks of a folder of pictures or of a registered dataset with a live segmenter.

SAM's masks of everything, by a folder of transformers' form or a name on the Hugging Face hub:

    python tools/precompute_entities.py --segmenter sam:facebook/sam-vit-huge \\
        --images photos --output masks.json --min-area 100

Mask2Former, OneFormer, MaskFormer, DETR, EoMT (classes are dropped), and a Detectron2 model:

    python tools/precompute_entities.py --output masks.json \\
        --segmenter transformers:facebook/mask2former-swin-large-coco-panoptic \\
        --dataset gella_coco_png_val2017 --batch-size 4
    python tools/precompute_entities.py --output masks.json --dataset gella_coco_png_val2017 \\
        --segmenter detectron2:config.yaml:model.pkl \\
        --option setup=mask2former:add_maskformer2_config

The output is COCO results JSON without overlaps, one entry per entity. Image ids are the dataset's,
or made from the file name (000000142238.jpg is 142238). Every finished image is kept in
OUTPUT.journal: after a kill or Ctrl-C the same command goes on where it stopped. OUTPUT.report.json
says which images failed and which have no mask. docs/ENTITY_MASKS.md has the details.

Exit code 0: all images done; 1: some images failed, the rest is written, and the same command tries
the failed ones again; 2 and one line "error: ..." for wrong input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
from detectron2.data import DatasetCatalog
from tqdm import tqdm

import gella  # noqa: F401  registers the datasets
from gella.data.register import import_modules
from gella.entities.entity_map import EntityMap
from gella.entities.view import read_image
from gella.predictor import image_id_of
from gella.segmenters.journal import MaskJournal, PictureJob
from gella.segmenters.segmenter import SPECS, MaskLimits, Segmenter, load_segmenter
from gella.utils.io import write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LISTED = 10  # names that the summary prints before it refers to the report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows an example\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--segmenter", required=True, metavar="SPEC", help=SPECS)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER", help="its pictures, not those of subfolders")
    source.add_argument("--dataset", metavar="NAME", help="a dataset of Detectron2's catalog")
    add(
        "--module",
        action="append",
        default=[],
        metavar="FILE.py",
        help="run first: registers the dataset or the model (as DATASETS.MODULES)",
    )
    add("--output", required=True, metavar="JSON", help="file to write, COCO results")
    add("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    add("--batch-size", type=int, default=1, metavar="N", help="images at a time (default 1)")
    add("--min-area", type=int, default=1, metavar="PIXELS", help="smaller entities are left out")
    add("--min-score", type=float, metavar="S", help="entities of lower score are left out")
    add("--max-entities", type=int, metavar="N", help="the best N of an image")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the segmenter, again for more (points_per_side=16, threshold=0.3, ...)",
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}; it must be at least 1")
    for option in args.option:
        if "=" not in option:
            parser.error(f"--option {option} is no KEY=VALUE")
    return args


def list_folder(folder: Path) -> list[PictureJob]:
    """One job per picture of a folder, by name; ids from the names.

    Raises FileNotFoundError without the folder, ValueError without pictures or when two names give
    one id.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give one with pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"folder {folder} has no pictures ({', '.join(SUFFIXES)})")
    # Viewers and the demo turn photographs upright, so their masks have to be of the turned one.
    return _distinct([PictureJob(image_id_of(path), path, upright=True) for path in paths])


def list_dataset(name: str) -> list[PictureJob]:
    """One job per image of a registered dataset, in its order, however many records it has.

    Raises ValueError for an unknown name and what the dataset raises.
    """
    if name not in DatasetCatalog.list():
        known = ", ".join(sorted(n for n in DatasetCatalog.list() if n.startswith("gella_")))
        raise ValueError(f"dataset {name} is not registered; there are: {known}")
    jobs: dict[tuple[str, str], PictureJob] = {}
    for record in DatasetCatalog.get(name):
        key = (str(record["image_id"]), str(record["file_name"]))
        size = (int(record["height"]), int(record["width"]))
        jobs.setdefault(key, PictureJob(record["image_id"], Path(record["file_name"]), size=size))
    if not jobs:
        raise ValueError(f"dataset {name} has no record")
    return _distinct(list(jobs.values()))


def _distinct(jobs: list[PictureJob]) -> list[PictureJob]:
    seen: dict[str, PictureJob] = {}
    for job in jobs:
        other = seen.setdefault(str(job.image_id), job)
        if other is not job:
            raise ValueError(
                f"{other.path} and {job.path} have one image id, {job.image_id}; rename one, since "
                "masks are found by id"
            )
    return jobs


def read_picture(job: PictureJob) -> np.ndarray:
    """The picture, uint8 RGB (H, W, 3); ValueError if its size is not the dataset's."""
    image = read_image(job.path, upright=job.upright)
    if job.size is not None and image.shape[:2] != job.size:
        raise ValueError(
            f"image {job.path} is {image.shape[1]}x{image.shape[0]} pixels but the dataset says "
            f"{job.size[1]}x{job.size[0]} (width x height); is it the right picture?"
        )
    return image


def segment_all(
    segmenter: Segmenter, jobs: Sequence[PictureJob], limits: MaskLimits, batch_size: int
) -> Iterator[tuple[PictureJob, EntityMap | str]]:
    """Yield each job with its entities, or with the reason why it failed, in order."""
    for start in range(0, len(jobs), batch_size):
        ready: list[tuple[PictureJob, np.ndarray]] = []
        results: dict[Any, EntityMap | str] = {}
        batch = jobs[start : start + batch_size]
        for job in batch:
            try:
                ready.append((job, read_picture(job)))
            except (ValueError, OSError) as error:
                results[job.image_id] = str(error)
        results.update(_segment(segmenter, ready, limits))
        yield from ((job, results[job.image_id]) for job in batch)


def _segment(
    segmenter: Segmenter, ready: list[tuple[PictureJob, np.ndarray]], limits: MaskLimits
) -> dict[Any, EntityMap | str]:
    if not ready:
        return {}
    try:
        found = segmenter.segment_batch([image for _, image in ready], limits)
        return {job.image_id: entities for (job, _), entities in zip(ready, found)}
    except Exception as error:  # a model may raise anything; one image must not stop the others
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        if len(ready) > 1:
            results: dict[Any, EntityMap | str] = {}
            for entry in ready:
                results.update(_segment(segmenter, [entry], limits))
            return results
        text = " ".join(str(error).split()) or type(error).__name__
        return {ready[0][0].image_id: f"image {ready[0][0].path}: {text}"}


def summarize(
    jobs: Sequence[PictureJob],
    counts: dict[Any, int],
    failed: dict[str, str],
    seconds: float | None,
) -> dict[str, Any]:
    """Figures of the run: what the report file holds.

    Args:
        jobs: all images.
        counts: entities by image id, of the images that are done.
        failed: reason by file name.
        seconds: per image of this run, None if it had nothing to do.
    """
    done = [counts[job.image_id] for job in jobs if job.image_id in counts]
    empty = [str(job.path) for job in jobs if counts.get(job.image_id) == 0]
    spread = {"mean": float(np.mean(done)), "min": min(done), "max": max(done)} if done else None
    return {
        "images": len(jobs),
        "done": len(done),
        "failed": failed,
        "without_mask": empty,
        "entities": sum(done),
        "entities_per_image": spread,
        "seconds_per_image": seconds,
    }


def print_summary(report: dict[str, Any], report_file: Path) -> None:
    """Print the figures and the first names of what went wrong."""
    print(f"images   {report['done']} of {report['images']}")
    spread = report["entities_per_image"]
    if spread is not None:
        print(
            f"entities {report['entities']}, per image {spread['mean']:.1f} "
            f"({spread['min']} to {spread['max']})"
        )
    if report["seconds_per_image"] is not None:
        print(f"time     {report['seconds_per_image']:.2f} s per image")
    if report["without_mask"]:
        print(f"{len(report['without_mask'])} images without any mask; grounding refuses them:")
        _print_first(report["without_mask"], report_file)
    if report["failed"]:
        print(f"{len(report['failed'])} images failed:")
        _print_first(list(report["failed"].values()), report_file)


def _print_first(lines: list[str], report_file: Path) -> None:
    for line in lines[:LISTED]:
        print(f"  {line}")
    if len(lines) > LISTED:
        print(f"  ... all in {report_file}")


def print_next(args: argparse.Namespace, jobs: Sequence[PictureJob], failed: bool) -> None:
    """Print the command to go on with."""
    if failed:
        print("next: repair or remove these images, then run the same command again")
        return
    if args.images is not None:
        print("next: ground a caption in them")
        print(
            "  python tools/demo.py --config-file CONFIG --weights PTH "
            f"--input {shlex.quote(str(jobs[0].path))} --masks {shlex.quote(args.output)} "
            '--caption "..."'
        )
        return
    print(f"next: evaluate {args.dataset} with these masks")
    choice = [[args.dataset, "coco_results", args.output]]
    print(
        "  python tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS PTH "
        f'DATASETS.TEST "(\'{args.dataset}\',)" INPUT.GELLA.ENTITY_SOURCES "{choice}"'
    )


def run(args: argparse.Namespace) -> int:
    """List the images, load the segmenter, go through what is not done, write; return the code."""
    limits = MaskLimits(args.min_area, args.min_score, args.max_entities)
    options = dict(option.split("=", 1) for option in args.option)
    import_modules(SimpleNamespace(DATASETS=SimpleNamespace(MODULES=args.module)))
    jobs = list_folder(Path(args.images)) if args.images else list_dataset(args.dataset)
    output = Path(args.output)
    report_file = output.with_name(output.name + ".report.json")
    made_by = {"segmenter": args.segmenter, "options": options, "limits": vars(limits)}
    failed: dict[str, str] = {}
    with MaskJournal(output, made_by) as journal:
        remaining = [job for job in jobs if not journal.has(job)]
        if len(remaining) < len(jobs):
            print(f"going on: {len(jobs) - len(remaining)} of {len(jobs)} images are done")
        started = time.perf_counter()
        if remaining:
            segmenter = load_segmenter(args.segmenter, args.device, options)
            started = time.perf_counter()
            work = segment_all(segmenter, remaining, limits, args.batch_size)
            for job, result in tqdm(work, total=len(remaining), unit="image", desc="segmenting"):
                if isinstance(result, EntityMap):
                    journal.add(job, result)
                else:
                    failed[str(job.path)] = result
                    tqdm.write(f"failed: {result}", file=sys.stderr)
        elapsed = time.perf_counter() - started
        journal.write_output(jobs)
        seconds = elapsed / len(remaining) if remaining else None
        report = {**made_by, **summarize(jobs, journal.counts(jobs), failed, seconds)}
        write_json(report_file, report)
        if not failed:
            journal.remove()
    print_summary(report, report_file)
    print(f"wrote {output}")
    print_next(args, jobs, bool(failed))
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

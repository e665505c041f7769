"""Make the entity masks of pictures or of a registered dataset with a live segmenter.

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

The output is COCO results JSON, an entry per entity with its whole mask. Image ids are a dataset's,
or made from the file name (000000142238.jpg is 142238). Every finished image is kept in
OUTPUT.journal: after a kill or Ctrl-C the same command goes on where it stopped. OUTPUT.report.json
says which images failed and which have no mask. docs/ENTITY_MASKS.md has the details.

--num-gpus N shares the work among N processes, torchrun among those of several machines; a run may
go on with another number of them.

Exit code 0: all images done; 1: some images failed, the rest is written, and the same command tries
the failed ones again; 2 and one line "error: ..." for wrong input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

import gella  # noqa: F401  registers the datasets
from gella.commands.console import Parser, exit_status, one_line, tools
from gella.commands.inputs import Source, distinct, list_pictures
from gella.data.register import dataset_records, import_modules
from gella.entities.entity_map import EntityMap
from gella.entities.view import read_recorded
from gella.segmenters.segmenter import SPECS, MaskLimits, Segmenter, load_segmenter
from gella.utils.io import write_atomically, write_json
from gella.utils.journal import Journal

LISTED = 10  # names that the summary prints before it refers to the report


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--segmenter", required=True, metavar="SPEC", help=SPECS)
    source = parser.add_mutually_exclusive_group(required=True)
    several = "pictures, folders, quoted patterns of them; subfolders too"
    source.add_argument("--images", nargs="+", metavar="PATH", help=several)
    source.add_argument("--dataset", metavar="NAME", help="a dataset of Detectron2's catalog")
    own = "run first: registers the dataset or the model (as DATASETS.MODULES)"
    add("--module", action="append", default=[], metavar="FILE.py", help=own)
    add("--output", required=True, metavar="JSON", help="file to write, COCO results")
    add("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes, a GPU each (default 1)")
    add("--batch-size", type=int, default=1, metavar="N", help="images at a time (default 1)")
    add("--min-area", type=int, default=1, metavar="PIXELS", help="smaller entities are left out")
    add("--min-score", type=float, metavar="S", help="entities of lower score are left out")
    add("--max-entities", type=int, metavar="N", help="the best N of an image")
    again = "setting of the segmenter, again for more (points_per_side=16, threshold=0.3, ...)"
    add("--option", action="append", default=[], metavar="KEY=VALUE", help=again)
    args = parser.parse_args(argv)
    for option, number in (("--batch-size", args.batch_size), ("--num-gpus", args.num_gpus)):
        if number < 1:
            parser.error(f"{option} is {number}; it must be at least 1")
    for option in args.option:
        if "=" not in option:
            parser.error(f"--option {option} is no KEY=VALUE")
    return args


def list_sources(args: argparse.Namespace) -> list[Source]:
    """The pictures of paths by name, or of a dataset in its order; none is a ValueError."""
    if args.images:
        sources = list_pictures(args.images)
    else:
        sources = [
            Source(r["image_id"], Path(r["file_name"]), size=(r["height"], r["width"]))
            for r in dataset_records(args.dataset)
        ]
    if not sources:
        raise ValueError(f"dataset {args.dataset} has no record")
    return distinct(sources, "rename one, since masks are found by id")


def segment_all(
    segmenter: Segmenter,
    sources: Sequence[Source],
    limits: MaskLimits,
    batch_size: int,
    journal: Journal,
) -> None:
    """Enter the entities of each picture, or why there are none, into the journal."""
    bar = tqdm(total=len(sources), unit="image", desc="segmenting")
    for start in range(0, len(sources), batch_size):
        images: dict[Source, np.ndarray] = {}
        results: dict[Source, EntityMap | str] = {}
        for source in sources[start : start + batch_size]:
            try:
                images[source] = read_recorded(source.path, source.size)
            except (ValueError, OSError) as error:
                results[source] = str(error)
        results.update(_segment(segmenter, images, limits))
        for source, result in results.items():
            bar.update()
            # As in a file of COCO results; all entities are of one category.
            fixed = {"image_id": source.image_id, "category_id": 1}
            if isinstance(result, str):
                journal.append({"image_id": source.image_id, "failed": result})
                tqdm.write(f"failed: {result}", file=sys.stderr)
                continue
            coded = [
                {**fixed, "segmentation": code, "score": round(float(score), 6)}
                for code, score in zip(result.to_rle(), result.scores)
            ]
            size = source.path.stat().st_size
            journal.append({"image_id": source.image_id, "bytes": size, "results": coded})
    bar.close()


def _segment(
    segmenter: Segmenter, images: dict[Source, np.ndarray], limits: MaskLimits
) -> dict[Source, EntityMap | str]:
    if not images:
        return {}
    try:
        return dict(zip(images, segmenter.segment_batch(list(images.values()), limits)))
    except Exception as error:  # a model may raise anything; one image must not stop the others
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        if len(images) == 1:
            (source,) = images
            return {source: f"image {source.path}: {one_line(error) or type(error).__name__}"}
        results: dict[Source, EntityMap | str] = {}
        for source, image in images.items():
            results.update(_segment(segmenter, {source: image}, limits))
        return results


Noted = tuple[int, int] | str
"""Of a finished picture the bytes of its file and the number of its entities, or why it failed."""


def open_journal(
    path: Path, made_by: dict[str, Any], reader: Literal["", "now", "wait"] = ""
) -> Journal:
    """A journal of an output file: one line a picture, with all its results, or why it failed.

    Every process has its own; all were made with these settings. Remembered is `Noted`. Raises what
    `Journal` raises.
    """

    def note(entry: Any) -> tuple[str, Noted]:
        if "failed" in entry:
            return str(entry["image_id"]), str(entry["failed"])
        return str(entry["image_id"]), (int(entry["bytes"]), len(entry["results"]))

    advice = "delete this file to start anew"
    return Journal(path, note, settings=made_by, advice=advice, reader=reader)


def journal_path(output: Path, rank: int, size: int) -> Path:
    """The journal of a process, the ``rank``-th of ``size``; an output's are OUTPUT.*journal."""
    which = "" if size == 1 else f"{rank}of{size}."
    return output.with_name(f"{output.name}.{which}journal")


def find_done(journals: Sequence[Journal], sources: Sequence[Source]) -> dict[Source, Journal]:
    """Who has the pictures, in their order, that are done and as long as they were then."""
    found = {}
    for source in sources:
        size = source.path.stat().st_size if source.path.is_file() else None
        for journal in journals:
            noted = journal.entries.get(str(source.image_id))
            if isinstance(noted, tuple) and noted[0] == size:
                found[source] = journal
    return found


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
    empty, failed = report["without_mask"], list(report["failed"].values())
    without = "images without any mask; grounding refuses them:"
    for lines, title in ((empty, without), (failed, "images failed:")):
        if lines:
            print(f"{len(lines)} {title}", *lines[:LISTED], sep="\n  ")
        if len(lines) > LISTED:
            print(f"  ... all in {report_file}")


def print_next(args: argparse.Namespace, sources: Sequence[Source], failed: bool) -> None:
    """Print the command to go on with."""
    if failed:
        print("next: repair or remove these images, then run the same command again")
    elif args.images is not None:
        print("next: ground a caption in them")
        print(
            f"  python {tools()}/demo.py --config-file CONFIG --weights PTH "
            f"--input {shlex.quote(str(sources[0].path))} --masks {shlex.quote(args.output)} "
            '--caption "..."'
        )
    else:
        print(f"next: evaluate {args.dataset} with these masks")
        choice = [[args.dataset, "coco_results", args.output]]
        print(
            f"  python {tools()}/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS PTH "
            f'DATASETS.TEST "(\'{args.dataset}\',)" INPUT.GELLA.ENTITY_SOURCES "{choice}"'
        )


def merge(
    args: argparse.Namespace,
    sources: Sequence[Source],
    journals: Sequence[Journal],
    report: dict[str, Any],
) -> int:
    """Write what all processes have done and the report; the exit code, 1 if an image is not done.

    The journals of all processes are removed if all is done; ``report``: what it begins with.
    """
    output = Path(args.output)
    report_file = output.with_name(output.name + ".report.json")
    done = find_done(journals, sources)

    def write(stream: IO[bytes]) -> None:
        separator = b"[\n"
        for source, journal in done.items():
            for result in journal.read(str(source.image_id))["results"]:
                stream.write(separator + json.dumps(result).encode())
                separator = b",\n"
        stream.write(b"\n]\n" if separator == b",\n" else b"[]\n")

    write_atomically(output, write)
    undone = [source for source in sources if source not in done]
    reasons = {key: noted for journal in journals for key, noted in journal.entries.items()}
    counts = {source: j.entries[str(source.image_id)][1] for source, j in done.items()}
    numbers = list(counts.values())
    spread = None
    if numbers:
        spread = {"mean": float(np.mean(numbers)), "min": min(numbers), "max": max(numbers)}
    report |= {
        "images": len(sources),
        "done": len(numbers),
        "failed": {str(s.path): str(reasons.get(str(s.image_id), "not tried")) for s in undone},
        "without_mask": [str(source.path) for source in counts if counts[source] == 0],
        "entities": sum(numbers),
        "entities_per_image": spread,
    }
    write_json(report_file, report)
    if not undone:
        for journal in journals:
            journal.remove()
    print_summary(report, report_file)
    print(f"wrote {output}")
    print_next(args, sources, bool(undone))
    return 1 if undone else 0


def run(args: argparse.Namespace, rank: int, size: int, wait: Callable[[], object]) -> int:
    """Do a process's share, every ``size``-th image; the first process writes what all have done.

    ``wait`` is called by it and returns when the others have begun, or have ended. Returns the exit
    code.
    """
    limits = MaskLimits(args.min_area, args.min_score, args.max_entities)
    options = dict(option.split("=", 1) for option in args.option)
    import_modules(SimpleNamespace(DATASETS=SimpleNamespace(MODULES=args.module)))
    sources, output = list_sources(args), Path(args.output)
    made_by = {"segmenter": args.segmenter, "options": options, "limits": vars(limits)}
    team = [journal_path(output, number, size) for number in range(size)]
    present = set(output.parent.glob(f"{glob.escape(output.name)}.*journal"))
    if output.is_dir():
        raise ValueError(f"output {output} is a folder; name a file")
    if output.exists() and not present:
        raise ValueError(
            f"{output} exists already and is complete; delete it or choose another --output"
        )
    with contextlib.ExitStack() as stack:
        earlier = [open_journal(path, made_by, "now") for path in sorted(present - set(team))]
        journal = open_journal(team[rank], made_by)
        journals = [stack.enter_context(opened) for opened in (*earlier, journal)]
        done = find_done(journals, sources)
        remaining = [source for source in sources[rank::size] if source not in done]
        if done and not rank:
            print(f"going on: {len(done)} of {len(sources)} images are done")
        started = time.perf_counter()
        try:
            if remaining:
                segmenter = load_segmenter(args.segmenter, args.device, options)
                started = time.perf_counter()
                segment_all(segmenter, remaining, limits, args.batch_size, journal)
        except BaseException:
            if not journal.entries and size == 1:
                journal.remove()  # nothing is lost, and other settings may follow
            raise
        elapsed = time.perf_counter() - started
        if rank:
            return 0  # torchrun would end all for another code; the first process tells of failures
        wait()
        ended = [open_journal(path, made_by, "wait") for path in team[1:] if path.exists()]
        journals += [stack.enter_context(opened) for opened in ended]
        each = elapsed / len(remaining) if remaining else None
        return merge(args, sources, journals, {**made_by, "seconds_per_image": each})


def share(args: argparse.Namespace, argv: Sequence[str], rank: int) -> int:
    """Work as torchrun has placed this process, or start ``--num-gpus`` of them here.

    ``rank`` is of a process that was started here. Each takes the GPU of its number, if there are
    any.
    """
    gpus, placed = torch.cuda.device_count(), ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    size, local, started = args.num_gpus, rank, []
    if all(name in os.environ for name in placed):
        rank, size, local = (int(os.environ[name]) for name in placed)
        if args.num_gpus > 1:
            raise ValueError(f"torchrun has started {size} processes: leave --num-gpus out")
    elif size > gpus > 0:
        raise ValueError(f"--num-gpus is {size} but this machine has {gpus} GPUs")
    elif not rank:
        process = multiprocessing.get_context("spawn").Process
        started = [process(target=main, args=(argv, n), daemon=True) for n in range(1, size)]
        # Daemons end with this process, if Python ends it.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if size > 1 and gpus and args.device in (None, "cuda"):
        args.device = f"cuda:{local}"
    for one in started:
        one.start()

    def wait() -> None:
        for one in started:
            one.join()
        paths = [journal_path(Path(args.output), n, size) for n in range(size)]
        while not started and not all(path.exists() for path in paths):
            time.sleep(0.2)  # torchrun ends all if one of them cannot begin

    return run(args, rank, size, wait)


def main(argv: Sequence[str] | None = None, rank: int = 0) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    told = "interrupted; the same command goes on where it stopped"
    return exit_status(lambda: share(args, argv, rank), interrupted=told)

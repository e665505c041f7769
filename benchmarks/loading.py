#!/usr/bin/env python
"""Measure how long an annotation of the size of PNG's takes to load, and in how much memory.

    python benchmarks/loading.py [--narratives 134272 --images 118287 --workers 2]

Writes a made-up panoptic JSON and narratives of that size into a temporary folder, loads them as
training does, in a fresh process, and then lets forked workers read every record. Prints
    load_s            seconds from the files to a training loader
    peak_gib          the most memory the loading process held (resident, its imports included)
    store_mib         bytes of the stored records
    worker_grown_mib  memory that became private to each worker by reading all records
Exit status 1 when loading takes over 60 s or 3 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

MAX_SECONDS, MAX_GIB = 60.0, 3.0
SEGMENTS = 11  # per image: COCO panoptic's mean
NOUNS = 9  # per narrative, each after some words that are no noun
_WORDS = "in this picture we can see there are some of the behind near green old two".split()
_NOUNS = ("a man", "the sky", "few people", "trees", "a wooden table", "the grass", "black cars")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    if args.load is not None:
        print(json.dumps(measure(args.load, args.workers)))
        return 0
    with tempfile.TemporaryDirectory(prefix="gella-large-") as scratch:
        root = Path(scratch)
        sizes = write_files(root, args.images, args.narratives)
        command = [sys.executable, __file__, "--load", scratch, "--workers", str(args.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = {**sizes, **json.loads(done.stdout.splitlines()[-1])}
    for name, value in figures.items():
        print(f"{name:18} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print("next: datasets/README.md, 'Large files', says how the records are kept")
    return int(figures["load_s"] > MAX_SECONDS or figures["peak_gib"] > MAX_GIB)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/loading.py --narratives 20000 --images 20000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--narratives", type=int, default=134_272, help="PNG has this many")
    parser.add_argument("--images", type=int, default=118_287, help="COCO train2017 has this many")
    parser.add_argument("--workers", type=int, default=2, help="forked readers")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the measured process
    return parser


def write_files(root: Path, images: int, narratives: int) -> dict[str, Any]:
    """Write ``panoptic.json`` and ``png.json``; returns their sizes in MiB."""
    rng = random.Random(0)
    ids = [3 * k + 9 for k in range(images)]
    colours = range(1, 1 << 24)
    segments = {i: [_segment(rng, k) for k in rng.sample(colours, SEGMENTS)] for i in ids}
    annotations = (
        {"segments_info": segments[i], "file_name": f"{i:012d}.png", "image_id": i} for i in ids
    )
    categories = [{"id": k, "name": f"category {k}", "isthing": k % 2} for k in range(1, 134)]
    with open(root / "panoptic.json", "w", encoding="utf-8") as file:
        file.write(f'{{"categories": {json.dumps(categories)}, "images": ')
        _write_list(file, map(_image, ids), images, "writing images")
        file.write(', "annotations": ')
        _write_list(file, annotations, images, "writing segments")
        file.write("}")
    with open(root / "png.json", "w", encoding="utf-8") as file:
        told = (_narrative(rng, i, segments[i]) for i in rng.choices(ids, k=narratives))
        _write_list(file, told, narratives, "writing narratives")
    names = {"panoptic_json_mib": "panoptic.json", "png_json_mib": "png.json"}
    return {key: round((root / name).stat().st_size / 2**20) for key, name in names.items()}


def _write_list(file: Any, values: Iterator[Any], total: int, what: str) -> None:
    file.write("[")
    for place, value in enumerate(tqdm(values, total=total, desc=what, disable=None)):
        file.write((", " if place else "") + json.dumps(value))
    file.write("]")


def _segment(rng: random.Random, segment_id: int) -> dict[str, Any]:
    box, area = [rng.randrange(640) for _ in range(4)], rng.randrange(300_000)
    category = rng.randrange(1, 134)
    return {"id": segment_id, "category_id": category, "iscrowd": 0, "bbox": box, "area": area}


def _image(image_id: int) -> dict[str, Any]:
    name = f"{image_id:012d}.jpg"
    sides = {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "license": 3}
    urls = {
        "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "flickr_url": f"http://farm9.staticflickr.com/8186/{image_id}_0a1b2c3d4e_z.jpg",
    }
    return {"id": image_id, "file_name": name, **sides, **urls}


def _narrative(rng: random.Random, image_id: int, segments: list[dict[str, Any]]) -> dict[str, Any]:
    parts = []
    for _ in range(NOUNS):
        plain = " ".join(rng.choices(_WORDS, k=rng.randrange(1, 6)))
        parts.append({"utterance": plain, "segment_ids": [], "plural": False, "noun": False})
        named = [str(s["id"]) for s in rng.sample(segments, rng.choice((0, 1, 1, 1, 3)))]
        noun = {"utterance": rng.choice(_NOUNS), "segment_ids": named, "plural": len(named) > 1}
        parts.append({**noun, "noun": True})
    caption = " ".join(part["utterance"] for part in parts).capitalize() + "."
    record = {"image_id": str(image_id), "annotator_id": rng.randrange(100)}
    return {**record, "caption": caption, "segments": parts}


def measure(root: Path, workers: int) -> dict[str, Any]:
    """Load the files in this process as training does, then read all records in forked ones."""
    from gella.data.narratives import load_png
    from gella.data.sampling import GroundingDataset

    start = time.perf_counter()
    records = load_png(root / "png.json", root / "panoptic.json", root / "png", root / "images")
    dataset = GroundingDataset(records, _first_fields)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "records": len(dataset),
        "load_s": round(seconds, 1),
        "peak_gib": round(peak, 2),
        "store_mib": round(records.num_bytes / 2**20),
        "worker_grown_mib": [
            round(grown / 2**20, 1) for grown in grown_by_reading(dataset, workers)
        ],
    }


def _first_fields(record: dict[str, Any], **key: Any) -> int:
    return len(record["phrases"])


def grown_by_reading(dataset: Any, workers: int) -> list[int]:
    """Bytes that became private to each of several forked processes that read every record."""
    pipes = []
    for _ in range(workers):
        receive, send = os.pipe()
        if os.fork() == 0:
            try:
                before = private_bytes()
                for index in tqdm(range(len(dataset)), desc="worker reads", disable=None):
                    dataset[index, "ground", (0, 0, 0)]
                os.write(send, str(private_bytes() - before).encode())
            finally:
                os._exit(0)  # whatever happens, this is not the process that goes on
        os.close(send)
        pipes.append(receive)
    grown = [int(os.read(pipe, 64)) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return grown


def private_bytes() -> int:
    """Memory of this process that no other shares, in bytes; Linux."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    sys.exit(main())

"""How long an annotation of the size of PNG's takes to load, and in how much memory.

    python tools/benchmark.py loading
    python tools/benchmark.py loading --narratives 20000 --images 20000 --workers 2

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

NUMBERS = {
    "narratives": (134_272, 1, "PNG has the default's number"),
    "images": (118_287, 1, "COCO train2017 has the default's number"),
    "workers": (2, 0, "forked readers"),
}
NEXT = "datasets/README.md, 'Large files', says how the records are kept"
MAX_SECONDS, MAX_GIB = 60.0, 3.0
SEGMENTS = 11  # per image: COCO panoptic's mean
NOUNS = 9  # per narrative, each after some words that are no noun
_WORDS = "in this picture we can see there are some of the behind near green old two".split()
_NOUNS = ("a man", "the sky", "few people", "trees", "a wooden table", "the grass", "black cars")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print."""
    with tempfile.TemporaryDirectory(prefix="gella-large-") as scratch:
        figures = write_files(Path(scratch), args.images, args.narratives)
        # A fresh process: this one's memory would count, and that of making the files.
        command = [sys.executable, __file__, scratch, str(args.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures |= json.loads(done.stdout.splitlines()[-1])
    return figures, "\n".join(f"{name:18} {value}" for name, value in figures.items())


def failed(figures: dict[str, Any]) -> bool:
    """Whether a limit is broken."""
    return figures["load_s"] > MAX_SECONDS or figures["peak_gib"] > MAX_GIB


def write_files(root: Path, images: int, narratives: int) -> dict[str, Any]:
    """Write ``panoptic.json`` and ``png.json``; returns their sizes in MiB."""
    rng = random.Random(0)
    ids = [3 * k + 9 for k in range(images)]
    colours = range(1, 1 << 24)

    def segment(segment_id: int) -> dict[str, Any]:
        box, area = [rng.randrange(640) for _ in range(4)], rng.randrange(300_000)
        category = rng.randrange(1, 134)
        return {"id": segment_id, "category_id": category, "iscrowd": 0, "bbox": box, "area": area}

    segments = {i: [segment(k) for k in rng.sample(colours, SEGMENTS)] for i in ids}
    annotations = (
        {"segments_info": segments[i], "file_name": f"{i:012d}.png", "image_id": i} for i in ids
    )
    categories = [{"id": k, "name": f"category {k}", "isthing": k % 2} for k in range(1, 134)]
    told = (_narrative(rng, i, segments[i]) for i in rng.choices(ids, k=narratives))
    with open(root / "panoptic.json", "w", encoding="utf-8") as file:
        for before, values in (
            ('{"categories": ', categories),
            (', "images": ', map(_image, ids)),
            (', "annotations": ', annotations),
        ):
            file.write(before)
            _write_list(file, values)
        file.write("}")
    with open(root / "png.json", "w", encoding="utf-8") as file:
        _write_list(file, told)
    names = {"panoptic_json_mib": "panoptic.json", "png_json_mib": "png.json"}
    return {key: round((root / name).stat().st_size / 2**20) for key, name in names.items()}


def _write_list(file: TextIO, values: Iterable[Any]) -> None:
    file.write("[")  # entry by entry: the whole text would take GiB
    for index, value in enumerate(tqdm(values, "writing", disable=None)):
        file.write((", " if index else "") + json.dumps(value))
    file.write("]")


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
    """Load the files in this process as training does, then read all records in forked ones.

    Args:
        root: the folder of ``write_files``.
        workers: how many processes are forked; each reads every record.
    """
    from gella.data.narratives import load_png
    from gella.data.sampling import GroundingDataset

    def first_fields(record: dict[str, Any], **key: Any) -> int:
        return len(record["phrases"])

    start = time.perf_counter()
    records = load_png(root / "png.json", root / "panoptic.json", root / "png", root / "images")
    dataset = GroundingDataset(records, first_fields)
    figures: dict[str, Any] = {"records": len(dataset)}
    figures["load_s"] = round(time.perf_counter() - start, 1)
    figures["peak_gib"] = round(memory("status", "VmHWM") / 2**30, 2)
    figures["store_mib"] = round(records.num_bytes / 2**20)
    grown = grown_by_reading(dataset, workers)
    figures["worker_grown_mib"] = [round(size / 2**20, 1) for size in grown]
    return figures


def grown_by_reading(dataset: Any, workers: int) -> list[int]:
    """Bytes that became private to each of several forked processes that read every record."""
    pipes = []
    for _ in range(workers):
        receive, send = os.pipe()
        if os.fork() == 0:
            try:
                before = memory("smaps_rollup", "Private_")
                for index in tqdm(range(len(dataset)), desc="worker reads", disable=None):
                    dataset[index, "ground", (0, 0, 0)]
                os.write(send, str(memory("smaps_rollup", "Private_") - before).encode())
            finally:
                os._exit(0)  # whatever happens, this is not the process that goes on
        os.close(send)
        pipes.append(receive)
    grown = [int(os.read(pipe, 64)) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return grown


def memory(file: str, name: str) -> int:
    """Bytes in the lines of /proc/self/FILE that start so; Linux. ``Private_``: shared with none;
    ``VmHWM``: the most that was resident at once."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":  # the process that is measured
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))

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

    python tools/benchmark.py loading --language 1500

measures instead how a language branch of so many million parameters starts from a file in bf16, in
--processes at once: built whole and then loaded (as without weights), and built without memory and
filled, at ZeRO stages 2 and 3 up to DeepSpeed's own start. Prints per process
    seconds   until the weights are in place
    peak_gib  the most anonymous memory on the way; pages of mapped files do not count
    kept_gib  what of it stays
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

NUMBERS = {
    "narratives": (134_272, 1, "PNG has the default's number"),
    "images": (118_287, 1, "COCO train2017 has the default's number"),
    "workers": (2, 0, "forked readers"),
    "language": (0, 0, "million parameters of a language branch whose start is measured instead"),
    "processes": (2, 1, "that start it at once"),
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
        if args.language:
            return language_starts(Path(scratch), args.language, args.processes)
        figures = write_files(Path(scratch), args.images, args.narratives)
        # A fresh process: this one's memory would count, and that of making the files.
        command = [sys.executable, __file__, scratch, str(args.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures |= json.loads(done.stdout.splitlines()[-1])
    return figures, "\n".join(f"{name:18} {value}" for name, value in figures.items())


def failed(figures: dict[str, Any]) -> bool:
    """Whether a limit is broken."""
    return figures.get("load_s", 0) > MAX_SECONDS or figures.get("peak_gib", 0) > MAX_GIB


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


@contextlib.contextmanager
def anonymous_peak() -> Iterator[dict[str, float]]:
    """Seconds of a block, and this process's anonymous memory: pages that no file backs.

    Filled at the end: ``seconds``, ``peak_gib`` (looked at every 10 ms), ``kept_gib`` afterwards.
    """
    found: dict[str, float] = {}
    start, seen, done = time.perf_counter(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen[0] = max(seen[0], memory("status", "RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        found["seconds"] = round(time.perf_counter() - start, 1)
        done.set()
        watcher.join()
        gc.collect()
        found["peak_gib"] = round(seen[0] / 2**30, 2)
        found["kept_gib"] = round(memory("status", "RssAnon") / 2**30, 2)


# -- the start of a language branch ----------------------------------------------------------------


def language_starts(scratch: Path, millions: int, processes: int) -> tuple[dict[str, Any], str]:
    """Figures and table of ``--language``: of every way and stage the process that took most."""
    from detectron2.config import get_cfg
    from detectron2.engine import launch
    from tabulate import tabulate

    from gella import add_gella_config
    from gella.weights.files import write_shards

    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.DEVICE, node = "cpu", cfg.MODEL.LANGUAGE
    node.HIDDEN_SIZE, node.INTERMEDIATE_SIZE, node.NUM_HEADS = 2048, 5504, 16
    node.NUM_KEY_VALUE_HEADS, node.NUM_LAYERS = 16, max(1, round((millions - 137) / 50.6))
    shapes = _build_branch(cfg, "meta").state_dict()
    weights = {key: torch.full((), 0.01).expand(like.shape) for key, like in shapes.items()}
    (scratch / "weights").mkdir()
    write_shards(weights, scratch / "weights", dtype=torch.bfloat16)
    rows = []
    for stage in (2, 3):
        for way in ("whole", "filled"):
            launch(_start, processes, dist_url="auto", args=(cfg, scratch, way, stage))
            found = [json.loads(file.read_text()) for file in scratch.glob("*.json")]
            most = {name: max(one[name] for one in found) for name in found[0]}
            rows.append({"stage": stage, "way": way, **most})
    return {"language": rows}, tabulate(rows, headers="keys")


def _build_branch(cfg: Any, device: str = "cpu") -> torch.nn.Module:
    from gella.modeling.language_decoder import LanguageDecoder

    model = torch.nn.Module()
    with torch.device(device):
        model.language_decoder = LanguageDecoder(cfg, 1024)
    return model


def _start(cfg: Any, scratch: Path, way: str, stage: int) -> None:
    from detectron2.utils import comm

    from gella.engine.zero import ZeroHook
    from gella.modeling.filling import built_empty
    from gella.weights.checkpoint import load_weights

    torch.set_num_threads(1)
    filled = way == "filled"
    cfg.MODEL.LANGUAGE.DTYPE = "bfloat16" if filled else "float32"
    zero = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
    idle = torch.nn.Linear(1, 1)
    divider = ZeroHook(idle, "", torch.optim.SGD(idle.parameters()), [], zero).divider()
    with anonymous_peak() as found:
        with built_empty(filled):
            model = _build_branch(cfg)
        load_weights(model, scratch / "weights", cfg, divider)
        for parameter in () if filled else model.parameters():  # as DeepSpeed does when it starts
            parameter.data = parameter.data.bfloat16()
            if divider is not None:
                divider(parameter)
    (scratch / f"{comm.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":  # the process that is measured
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))

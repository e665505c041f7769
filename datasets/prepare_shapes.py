#!/usr/bin/env python
"""Draw the synthetic shapes dataset and write it in the on-disk formats of the real benchmarks.

    python datasets/prepare_shapes.py [--train 4000 --val 200 --size 96 --seed 0 --workers 2]

Writes, below --output (default: shapes in $DETECTRON2_DATASETS, or in datasets):
    {train,val}/*.png                            images
    annotations/panoptic_{train,val}.json, annotations/panoptic_{train,val}/*.png
                                                 COCO panoptic
    annotations/png_shapes_{train,val}.json      Panoptic Narrative Grounding
    annotations/captions_train.jsonl             EntitySeg-style generated captions
    annotations/predicted_val.json               COCO results: dropped, merged and ragged masks
    refcoco/instances.json, refcoco/refs(unc).p  RefCOCO
    tokenizer/                                   byte-level BPE, for MODEL.LANGUAGE.TOKENIZER
    meta.json                                    how it was made; equal settings are not redone
The same settings give the same bytes, whatever --workers is.

--train 0 draws the held-out scenes alone, which is all that an evaluation reads: no training files
and no tokenizer. It leaves a dataset alone that holds these scenes and training scenes as well.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import shapes
from PIL import Image
from shapes_scene import MIN_SIZE
from shapes_text import train_tokenizer
from tqdm import tqdm

from gella.commands.console import project
from gella.data.register import root_from_environment
from gella.entities.entity_map import id_to_rgb


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        prepare(
            args.output,
            counts={"train": args.train, "val": args.val},
            size=args.size,
            seed=args.seed,
            workers=args.workers,
            force=args.force,
        )
    except (ValueError, OSError) as error:
        print(f"prepare_shapes: error: {error}", file=sys.stderr)
        return 1
    released = "weights/gella_tiny_shapes/config.yaml --eval-only"
    config = "configs/gella_tiny_all_tasks.yaml" if args.train else released
    print(f"next: python {project('tools/train_net.py')} --config-file {config}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Path(root_from_environment()) / "shapes"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--train", type=int, default=4000, help="training scenes; 0: none")
    parser.add_argument("--val", type=int, default=200, help="held-out scenes")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--force", action="store_true", help="redo an existing preparation")
    return parser


def prepare(
    output: Path,
    counts: dict[str, int],
    size: int = 96,
    seed: int = 0,
    workers: int = 2,
    force: bool = False,
) -> bool:
    """Write the dataset into ``output``; see the file's docstring for what goes where.

    Everything is written beside ``output`` first and renamed at the end, so an interrupted run
    leaves no half dataset.

    Args:
        output: folder to make; an earlier preparation in it is replaced.
        counts: scenes of "train" and "val". No "train" at all gives what an evaluation reads, and
            takes an earlier preparation with any number of them.
        size: side of the images in pixels.
        seed: of the dataset.
        workers: number of processes; 1 draws in this one.
        force: redo even when the settings are equal.

    Returns:
        False if an equal preparation was there already.

    Raises:
        ValueError: settings out of range, or ``output`` holds something else than a preparation.
    """
    _check(counts, size, seed, workers)
    recipe = {"version": shapes.VERSION, "seed": seed, "size": size, **counts}
    found = _read_meta(output)
    known = dict(found.get("recipe", {})) if found is not None else {}
    drawn = known.get("train", 0)
    if not counts["train"]:
        known["train"] = 0
    if known == recipe and not force:
        print(f"{output} holds this dataset already ({drawn} + {counts['val']} scenes)")
        return False
    if found is None and output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and has no meta.json; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        _write_all(fresh, counts, size, seed, workers, recipe)
        if output.exists():
            os.replace(output, Path(scratch) / "old")
        os.replace(fresh, output)
    print(f"wrote {counts['train']} + {counts['val']} scenes to {output}")
    return True


def _check(counts: dict[str, int], size: int, seed: int, workers: int) -> None:
    for split, least in zip(shapes.SPLITS, (0, 1)):
        if not least <= counts[split] <= shapes.MAX_SCENES:
            raise ValueError(f"--{split} {counts[split]} is outside {least}..{shapes.MAX_SCENES}")
    if size < MIN_SIZE:
        raise ValueError(f"--size {size} is under {MIN_SIZE} pixels, too small for the shapes")
    if seed < 0 or workers < 1:
        raise ValueError(f"--seed {seed} must not be negative and --workers {workers} at least 1")


def _read_meta(output: Path) -> dict[str, Any] | None:
    path = output / "meta.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}  # ours, but broken: redo it


def _write_all(
    root: Path, counts: dict[str, int], size: int, seed: int, workers: int, recipe: dict[str, Any]
) -> None:
    annotations = root / "annotations"
    refs: list[dict[str, Any]] = []
    instances: dict[str, list[Any]] = {"images": [], "annotations": []}
    texts: list[str] = []
    for split in (name for name in shapes.SPLITS if counts[name]):
        for folder in (root / split, annotations / f"panoptic_{split}"):
            folder.mkdir(parents=True)
        samples = list(_drawn(root, split, counts[split], seed, workers, size))
        images = [sample["image"] for sample in samples]
        _dump(
            annotations / f"panoptic_{split}.json",
            {
                "info": {"description": f"GELLA synthetic shapes, version {shapes.VERSION}"},
                "images": images,
                "annotations": [sample["panoptic"] for sample in samples],
                "categories": shapes.CATEGORIES,
            },
        )
        _dump(annotations / f"png_shapes_{split}.json", _joined(samples, "narratives"))
        refs += _joined(samples, "refs")
        instances["images"] += images
        instances["annotations"] += _joined(samples, "instances")
        if split == "train":
            lines = _joined(samples, "descriptions")
            _dump_lines(annotations / "captions_train.jsonl", lines)
            texts = [line["description"] for line in lines]
            # Without the captions that people type: with a capital for every word of theirs there
            # is no room for the prompts' own words, whose pieces make a prompt 129 tokens long
            # instead of 75.
            narratives = _joined(samples, "narratives")
            texts += [n["caption"] for n in narratives if n["annotator_id"] < 2]
        else:
            _dump(annotations / "predicted_val.json", _joined(samples, "predictions"))
    _write_refcoco(root / "refcoco", refs, instances)
    meta = {"recipe": recipe, "held_out_pairs": [list(pair) for pair in shapes.HELD_OUT_PAIRS]}
    if texts:
        meta["tokens"] = tokens = train_tokenizer(texts, str(root / "tokenizer"))
        print(f"tokenizer: {tokens} tokens; MODEL.LANGUAGE.VOCAB_SIZE is one more (<SEG>)")
    _dump(root / "meta.json", meta)


def _write_refcoco(folder: Path, refs: list[dict[str, Any]], instances: dict[str, Any]) -> None:
    folder.mkdir()
    things = [category for category in shapes.CATEGORIES if category["isthing"]]
    _dump(folder / "instances.json", {**instances, "categories": things})
    # A pickle notes which texts are one object, which depends on the processes they came through;
    # fresh objects make the bytes depend on the content alone.
    refs = json.loads(json.dumps(refs))
    with open(folder / "refs(unc).p", "wb") as file:
        pickle.dump(refs, file, protocol=2)  # the protocol of the published files


def _drawn(
    root: Path, split: str, count: int, seed: int, workers: int, size: int
) -> Iterator[dict[str, Any]]:
    """Draw the scenes of a split in order, write their pixels, yield their records."""
    draw = partial(_draw_one, str(root), seed, split, size)
    bar = partial(tqdm, total=count, desc=f"drawing {split}", unit="scene", disable=None)
    if workers == 1:
        yield from bar(map(draw, range(count)))
        return
    with Pool(workers) as pool:
        yield from bar(pool.imap(draw, range(count), chunksize=16))


def _draw_one(root: str, seed: int, split: str, size: int, index: int) -> dict[str, Any]:
    sample = shapes.make_sample(seed, split, index, size)
    name = sample.image["file_name"]
    Image.fromarray(sample.image_array).save(f"{root}/{split}/{name}")
    segments = Image.fromarray(id_to_rgb(sample.id_map))
    segments.save(f"{root}/annotations/panoptic_{split}/{sample.panoptic['file_name']}")
    kept = ("image", "panoptic", "narratives", "refs", "instances", "descriptions", "predictions")
    return {key: getattr(sample, key) for key in kept}


def _joined(samples: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [record for sample in samples for record in sample[key]]


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))


def _dump_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    sys.exit(main())

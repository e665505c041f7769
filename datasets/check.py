#!/usr/bin/env python
"""Validate a registered dataset from its files, and list everything that is wrong with them.

    python datasets/check.py gella_coco_png_val2017 [--json report.json --limit 500 --workers 2]
    python datasets/check.py --module my_dataset.py my_pictures

Looks at the annotation files as a whole and opens every image and mask file that the dataset uses:
counts against the published ones, missing and damaged files, ids in a PNG and not in the JSON and
the reverse, sizes that disagree, phrases without masks, segments without area, duplicates.
Errors make the dataset unusable as it is; warnings are worth a look. Exit status: 0 without errors,
1 with errors, 2 for a dataset that nobody registered, or a module that cannot be imported.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from types import SimpleNamespace

from detectron2.data import DatasetCatalog

import gella
from gella.commands.console import project
from gella.data.check import check_dataset
from gella.data.register import import_modules
from gella.utils.io import write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    before = DatasetCatalog.list()
    try:
        import_modules(SimpleNamespace(DATASETS=SimpleNamespace(MODULES=args.module)))
        report = check_dataset(args.name, limit=args.limit, workers=args.workers)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyError:
        own = [name for name in DatasetCatalog.list() if name not in before]
        print(f"error: {_unknown(args.name, own)}", file=sys.stderr)
        return 2
    print(report.as_text())
    if args.json is not None:
        write_json(args.json, report.as_dict())
        print(f"report: {args.json}")
    if report.number("error"):
        print("next: datasets/README.md says where each file comes from")
        return 1
    if args.limit is not None and args.limit < report.figures["images to open"]:
        print(f"next: python {project('datasets/check.py')} {args.name}   # opens all images")
    else:
        print("next: name it in DATASETS.TRAIN or DATASETS.TEST of tools/train_net.py")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: python datasets/check.py gella_shapes_png_val --json report.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("name", help="of the dataset, as in DATASETS.TRAIN")
    own = "run first: registers the dataset (as DATASETS.MODULES)"
    parser.add_argument("--module", action="append", default=[], metavar="FILE.py", help=own)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings here")
    parser.add_argument(
        "--limit", type=_count, metavar="N", help="open the first N images only; None opens all"
    )
    parser.add_argument("--workers", type=_count, default=2, metavar="N", help="processes")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _unknown(name: str, own: list[str]) -> str:
    names = own or [n for n in DatasetCatalog.list() if n.startswith("gella_")]
    close = difflib.get_close_matches(name, names, n=3) or names[:3]
    return (
        f"no dataset is registered as {name!r} (gella {gella.__version__} knows {len(names)}); did "
        f"you mean {', '.join(close)}?"
    )


if __name__ == "__main__":
    sys.exit(main())

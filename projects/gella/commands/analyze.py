"""Look into the errors of an evaluation: one HTML file of figures and cases.

    python tools/analyze.py output/gella_tiny_shapes/inference
    python tools/analyze.py output/gella_tiny_shapes/inference --output e.html --json e.json
    python tools/analyze.py my_run/inference/my_dataset --config-file my_config.yaml

Reads all predictions of phrases (png_predictions.json, referring_predictions.json) below the
folder, which may be that of a table's runs, and the datasets themselves for pictures, sizes and
confusions. The file opens in any browser, without a server: histograms of IoU, recall curves,
average recall by phrase length, number of entities, size, thing and stuff, singular and plural,
words of position; which entities were taken instead; the worst and the best cases with their masks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from gella import load_config
from gella.commands.analysis.cases import Predictions, find_predictions
from gella.commands.analysis.page import render
from gella.commands.analysis.report import Analysis, analyse
from gella.commands.analysis.scenes import index_records
from gella.data.register import import_modules
from gella.utils.io import write_atomically, write_json


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", help="OUTPUT_DIR/inference, one dataset's folder in it, or a table's folder")
    add("--output", metavar="FILE", help="default: report.html in the folder")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--examples", type=int, default=12, metavar="N", help="worst and best cases (default 12)")
    add("--dataset", metavar="NAME", help="registered dataset; default: the folder's name")
    add("--config-file", metavar="YAML", help="its DATASETS.MODULES register datasets of your own")
    add("--without-images", action="store_true", help="figures from the predictions alone")
    return parser


def records_of(predictions: Predictions, name: str | None) -> tuple[dict[str, list], dict]:
    """Dataset dicts by image id, and the names of the categories by id.

    Raises:
        ValueError: no dataset of that name is registered.
        OSError: its files are missing.
    """
    name = name or predictions.dataset
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"{predictions.file}: no dataset {name!r} is registered: give its name with --dataset "
            "(and --config-file, if your own code registers it), or --without-images"
        )
    records = index_records(DatasetCatalog.get(name))
    categories = MetadataCatalog.get(name).get("categories", None) or []
    return records, {category["id"]: category["name"] for category in categories}


def run(args: argparse.Namespace) -> tuple[Path, list[Analysis]]:
    """Analyse and write; the page's path and what is on it.

    Raises:
        ValueError, OSError: wrong arguments, files or datasets.
    """
    if args.examples < 0:
        raise ValueError(f"--examples is {args.examples}; give 0 or more")
    if args.config_file:
        import_modules(load_config(args.config_file, []))
    found = find_predictions(args.folder)
    analyses: list[Analysis] = []
    for predictions in found:
        records: Any = None
        names: dict[Any, str] = {}
        if not args.without_images:
            records, names = records_of(predictions, args.dataset)
        analyses.append(analyse(predictions, records, names, args.examples))
    output = Path(args.output or Path(args.folder) / "report.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    page = render(analyses).encode("utf-8")
    write_atomically(str(output), lambda stream: stream.write(page))
    if args.json:
        write_json(args.json, [analysis.to_json() for analysis in analyses])
    return output, analyses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments."""
    args = build_parser().parse_args(arguments)
    try:
        output, analyses = run(args)
    except (KeyError, OSError, ValueError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    for analysis in analyses:
        overall = analysis.overall
        print(
            f"{analysis.predictions.label} ({analysis.predictions.task}): "
            f"AR {100 * overall.recall:.2f} over {overall.n} phrases"
        )
    print(f"wrote {output}" + (f" and {args.json}" if args.json else ""))
    print(f"\nnext: open {output} in a browser, for instance: python -m webbrowser {output}")
    return 0

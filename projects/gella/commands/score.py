"""Score saved predictions again, without the model.

    python tools/score.py output/gella_tiny_shapes
    python tools/score.py output/gella_tiny_shapes TEST.PNG_PROTOCOL official

Reads OUTPUT_DIR/config.yaml and the predictions in OUTPUT_DIR/inference/<dataset>/ that
tools/train_net.py left there, and the datasets' annotations. Without KEY VALUE changes the scores
are compared with OUTPUT_DIR/results.json: they are equal bit for bit, or the status is 1.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from tqdm import tqdm

from gella import load_config
from gella.data.plugins import import_modules
from gella.engine.trainer import load_records
from gella.evaluation import build_evaluator, format_results, load_results, merge_datasets
from gella.evaluation.offline import SavedPredictions, sample_with_truth
from gella.evaluation.overlap import prepared_ahead
from gella.evaluation.results import save_results

USER_ERRORS = (KeyError, ValueError, OSError)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", help="OUTPUT_DIR of an evaluation, or a run's folder of --table")
    add("--config-file", default="", metavar="FILE", help="default: FOLDER/config.yaml")
    add("--output", default="", metavar="FILE", help="write the scores there as JSON")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    return parser.parse_args(argv)


def score_dataset(cfg: Any, name: str, folder: Path) -> dict[str, dict[str, float]]:
    """``{task: {metric: score}}`` of the predictions in a folder, by the dataset's evaluators.

    Raises:
        FileNotFoundError, KeyError, ValueError: predictions are missing, damaged or of another
            dataset.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    records = load_records([name], "DATASETS.TEST", cfg)
    saved = SavedPredictions(folder)
    evaluator = build_evaluator(cfg, name, "")
    evaluator.reset()
    prepare = functools.partial(sample_with_truth, evaluator_type=kind)
    samples = prepared_ahead(records, prepare, cfg.DATALOADER.NUM_WORKERS)
    for sample in tqdm(samples, name, len(records), unit="sample", disable=None):
        evaluator.process([sample], [saved(sample)])
    return evaluator.evaluate()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Scores that are not equal bit for bit, or in one of the two only."""
    found = []
    for task in sorted({*ours, *theirs}):
        first, second = ours.get(task, {}), theirs.get(task, {})
        for key in sorted({*first, *second}):
            a, b = first.get(key), second.get(key)
            undefined = all(v is not None and math.isnan(v) for v in (a, b))
            if a != b and not undefined:
                found.append(f"{task}/{key}: {a} now, {b} in the file")
    return found


def score(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], list[str] | None]:
    """The scores, and their differences from results.json (None: nothing to compare with)."""
    folder = Path(args.folder)
    if not (folder / "inference").is_dir():
        raise FileNotFoundError(
            f"{folder}/inference does not exist: give the OUTPUT_DIR of an evaluation"
        )
    cfg = load_config(args.config_file or folder / "config.yaml", args.opts or [])
    import_modules(cfg)
    cfg.freeze()
    outcome = {}
    for name in cfg.DATASETS.TEST:
        outcome[name] = score_dataset(cfg, name, folder / "inference" / name)
    results = merge_datasets(outcome)
    file = folder / "results.json"
    if args.opts or not file.is_file():
        return results, None
    return results, differences(results, load_results(file)[0])


def main(argv: list[str] | None = None) -> None:
    """Score, print one table and compare."""
    args = parse(argv)
    try:
        results, different = score(args)
        if args.output:
            save_results(results, args.output)
    except USER_ERRORS as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    print(f"{format_results(results)}\n")
    if args.output:
        print(f"Written:  {args.output}")
    file = Path(args.folder) / "results.json"
    total = sum(len(metrics) for metrics in results.values())
    if different is None:
        print("Compared: with nothing (changed settings, or no results.json)")
    elif different:
        print(f"Compared: {len(different)} of {total} scores differ from {file}:")
        print("\n".join(f"  {line}" for line in different[:10]))
        raise SystemExit(1)
    else:
        print(f"Compared: all {total} scores equal those of {file} bit for bit")
    print(f"Next:     python tools/analyze.py {args.folder}/inference")

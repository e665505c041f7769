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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from torch.utils.data import DataLoader
from tqdm import tqdm

from gella import load_config
from gella.commands.console import exit_status
from gella.data.register import import_modules
from gella.engine.trainer import load_records
from gella.evaluation import build_evaluator, format_results, load_results, merge_datasets
from gella.evaluation.offline import SavedPredictions, sample_of
from gella.evaluation.results import save_results


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
    # Worker processes decode while this one scores: `sample_of` runs where records are collated.
    samples: Any = DataLoader(
        records,  # type: ignore[arg-type]  # indexable, with a length
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=functools.partial(sample_of, evaluator_type=kind),
    )
    for sample in tqdm(samples, name, len(records), unit="sample", disable=None):
        evaluator.process([sample], [saved(sample)])
    return evaluator.evaluate()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Scores that are not equal bit for bit, or in one of the two only."""
    lines = []
    for task in sorted({*ours, *theirs}):
        first, second = ours.get(task, {}), theirs.get(task, {})
        for key in sorted({*first, *second}):
            a, b = first.get(key), second.get(key)
            undefined = all(v is not None and math.isnan(v) for v in (a, b))
            if a != b and not undefined:
                lines.append(f"{task}/{key}: {a} now, {b} in the file")
    return lines


def run(args: argparse.Namespace) -> int:
    """Score, print one table and compare; 1 where scores differ from results.json."""
    folder = Path(args.folder)
    if not (folder / "inference").is_dir():
        raise FileNotFoundError(
            f"{folder}/inference does not exist: give the OUTPUT_DIR of an evaluation"
        )
    cfg = load_config(args.config_file or folder / "config.yaml", args.opts or [])
    import_modules(cfg)
    cfg.freeze()
    names = cfg.DATASETS.TEST
    outcome = {name: score_dataset(cfg, name, folder / "inference" / name) for name in names}
    results = merge_datasets(outcome)
    file = folder / "results.json"
    comparable = not args.opts and file.is_file()
    different = differences(results, load_results(file)[0]) if comparable else []
    if args.output:
        save_results(results, args.output)
    print(f"{format_results(results)}\n")
    if args.output:
        print(f"Written:  {args.output}")
    total = sum(len(metrics) for metrics in results.values())
    if not comparable:
        print("Compared: with nothing (changed settings, or no results.json)")
    elif different:
        print(f"Compared: {len(different)} of {total} scores differ from {file}:")
        print("\n".join(f"  {line}" for line in different[:10]))
        return 1
    else:
        print(f"Compared: all {total} scores equal those of {file} bit for bit")
    print(f"Next:     python tools/analyze.py {args.folder}/inference")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments or files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", help="OUTPUT_DIR of an evaluation, or a run's folder of --table")
    add("--config-file", default="", metavar="FILE", help="default: FOLDER/config.yaml")
    add("--output", default="", metavar="FILE", help="write the scores there as JSON")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))

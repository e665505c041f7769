"""Score predictions without a model: saved ones again, or those of any other method.

    python tools/score.py output/gella_tiny_shapes
    python tools/score.py output/gella_tiny_shapes TEST.PNG_PROTOCOL official
    python tools/score.py --predictions masks.json --dataset gella_coco_png_val2017

Reads OUTPUT_DIR/config.yaml and the predictions in OUTPUT_DIR/inference/<dataset>/ that
tools/train_net.py left there, and the datasets' annotations. Without KEY VALUE changes the scores
are compared with OUTPUT_DIR/results.json: they are equal bit for bit, or the status is 1.
A file of docs/FORMATS.md 8 is scored alike, narratives under every protocol; KEY VALUE changes
then need a --config-file.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from torch.utils.data import DataLoader
from tqdm import tqdm

from gella import add_gella_config, load_config
from gella.commands.console import Parser, exit_status, tools
from gella.commands.score_predictions import FORMS, Predictions
from gella.data.mapper import expression_phrase, record_fields
from gella.data.register import import_modules
from gella.engine.trainer import load_records
from gella.entities.sources import load_from_record
from gella.evaluation import build_evaluator, format_results, load_results, merge_datasets
from gella.evaluation.metrics import PROTOCOLS
from gella.evaluation.registry import EVALUATORS
from gella.evaluation.results import refuse_nothing
from gella.evaluation.truth import TruthReader
from gella.utils.io import write_json


def sample_of(record: dict[str, Any], evaluator_type: str) -> dict[str, Any]:
    """The part of a mapped test input that the evaluators look at, from a dataset dict.

    Args:
        record: a dataset dict (docs/FORMATS.md 7).
        evaluator_type: of the dataset; entities and truth are decoded for those that need them.
    """
    sample = record_fields(record)
    sample["caption"], sample["phrases"] = record.get("caption", ""), record.get("phrases") or []
    if evaluator_type == "refcoco":
        sample["phrases"] = [expression_phrase(e) for e in record.get("expressions") or []]
        sample["caption"] = " ".join(phrase["text"] for phrase in sample["phrases"])
    if evaluator_type == "png":
        sample["entities_full"] = load_from_record(record).canonical()
    if evaluator_type in ("png", "coco_panoptic_seg"):
        sample["truth"] = TruthReader()(sample)
    return sample


def predictions_of(path: str | Path, name: str, cfg: Any) -> Predictions:
    """What was predicted for a registered dataset, with the entities of a config.

    Raises:
        FileNotFoundError, ValueError: annotations or predictions are missing, damaged or of another
            dataset.
    """
    records = load_records([name], "DATASETS.TEST", cfg)
    return Predictions(path, MetadataCatalog.get(name).get("evaluator_type"), records)


def score(
    predictions: Predictions, evaluators: Sequence[DatasetEvaluator], num_workers: int
) -> list[dict[str, dict[str, float]]]:
    """``{task: {metric: score}}`` of each evaluator.

    Raises:
        FileNotFoundError, ValueError: masks of annotations or predictions are missing or damaged.
    """
    for evaluator in evaluators:
        evaluator.reset()
    # Worker processes decode while this one scores: `sample_of` runs where records are collated.
    samples: Any = DataLoader(
        predictions.records,  # type: ignore[arg-type]  # indexable, with a length
        batch_size=None,
        num_workers=num_workers,
        collate_fn=functools.partial(sample_of, evaluator_type=predictions.kind),
    )
    for number, sample in enumerate(tqdm(samples, unit="sample", disable=None)):
        output = predictions.answer(number, sample)
        for evaluator in evaluators:
            evaluator.process([sample], [output])
    return [evaluator.evaluate() for evaluator in evaluators]


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


def run_file(args: argparse.Namespace) -> int:
    """Score a file of predictions under every protocol, and print one table and what is missing."""
    cfg, name = get_cfg(), args.dataset
    add_gella_config(cfg)
    if args.config_file or args.opts:
        cfg = load_config(args.config_file, args.opts)
    import_modules(cfg)
    if args.entities:
        cfg.INPUT.GELLA.ENTITY_SOURCES = [[name, "auto", args.entities]]
    evaluators: list[Any] = []
    predictions = predictions_of(args.predictions, name, cfg)
    protocols = list(dict.fromkeys((cfg.TEST.PNG_PROTOCOL, *PROTOCOLS)))
    for protocol in protocols if predictions.kind == "png" else protocols[:1]:
        cfg.TEST.PNG_PROTOCOL = protocol
        # The first of a type's evaluators scores the masks; others need what a model says beside.
        evaluators.append(EVALUATORS[predictions.kind][0](cfg, name, ""))
    scores = score(predictions, evaluators, cfg.DATALOADER.NUM_WORKERS)
    results = merge_datasets(dict(zip(protocols, scores)))
    print(f"{format_results(results)}\n")
    refuse_nothing({name: scores[0]})
    if args.output:
        write_json(args.output, results)
        print(f"Written:  {args.output}")
    missing, asked = predictions.num_missing, predictions.num_asked
    print(f"Missing:  {missing} of {asked} {FORMS[predictions.kind][-1]}, which count as empty")
    return 0


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
    outcome: dict[str, Any] = {}
    for name in names:
        predictions = predictions_of(folder / "inference" / name, name, cfg)
        evaluators = [build_evaluator(cfg, name, "")]
        (outcome[name],) = score(predictions, evaluators, cfg.DATALOADER.NUM_WORKERS)
    results = merge_datasets(outcome)
    file = folder / "results.json"
    comparable = not args.opts and file.is_file()
    different = differences(results, load_results(file)[0]) if comparable else []
    print(f"{format_results(results)}\n")  # before what may fail
    refuse_nothing(outcome)
    if args.output:
        write_json(args.output, results)
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
    print(f"Next:     python {tools()}/analyze.py {args.folder}/inference")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments or files."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", help="OUTPUT_DIR of an evaluation, or a run's folder of --table")
    add("--predictions", metavar="FILE", help="instead: masks of any method (docs/FORMATS.md 8)")
    add("--dataset", metavar="NAME", help="the registered dataset of --predictions")
    add("--entities", metavar="FILE", help="masks for oracle and baselines (docs/FORMATS.md 5)")
    add("--config-file", default="", metavar="FILE", help="default: FOLDER/config.yaml")
    add("--output", default="", metavar="FILE", help="write the scores there as JSON")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args(argv)
    if not (args.dataset if args.predictions else args.folder):
        parser.error("give the OUTPUT_DIR of an evaluation, or --predictions and --dataset")
    if not args.predictions:
        return exit_status(lambda: run(args))
    args.opts = [*filter(None, [args.folder]), *args.opts]
    return exit_status(lambda: run_file(args))

"""Pick the thresholds of inference on a validation split and write them to a file.

    python tools/calibrate.py --config-file configs/gella_tiny_shapes.yaml \\
        --weights output/gella_tiny_shapes/model_final.pth --dataset gella_shapes_png_train \\
        --num 200 --output output/gella_tiny_shapes/calibration.json

Narratives (PNG) and referring expressions pick MODEL.GELLA.ASSOCIATION_THRESHOLD, SINGULAR_ARGMAX
and, where expressions without a target exist, NONE_THRESHOLD by mean IoU; panoptic datasets pick
PANOPTIC_THRESHOLD by PQ. Pick on other images than you report on: results.json says where the
thresholds come from, and names datasets that were used for both.

Evaluate with them:  tools/train_net.py --eval-only ... TEST.CALIBRATION FILE
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.logger import setup_logger

from gella.commands.console import Parser, exit_status, tools
from gella.commands.inputs import config_of
from gella.engine.trainer import GellaTrainer
from gella.evaluation.calibration import TAKE_ALL, PanopticSweep, SelectionSweep
from gella.modeling.postprocessing import panoptic_from_scores
from gella.utils.io import config_hash, file_hash, versions, write_json
from gella.weights.checkpoint import build_with_weights, find_clip


class Questions:
    """Some batches of a loader, asked as nouns so that the scores of every name come back."""

    def __init__(self, loader: Any, num_images: int) -> None:
        """``num_images`` 0 takes all."""
        self._loader = loader
        size = max(1, getattr(loader, "batch_size", None) or 1)
        self._batches = min(len(loader), -(-num_images // size)) if num_images else len(loader)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Any:
        for batch in itertools.islice(self._loader, self._batches):
            yield [{**sample, "task": "ground"} for sample in batch]


def sweep_for(cfg: Any, dataset: str) -> Any:
    """The sweep that fits a dataset's ``evaluator_type``.

    Raises:
        ValueError: there is nothing to calibrate on such a dataset.
    """
    options, queries = cfg.MODEL.GELLA, cfg.MODEL.MASK_DECODER.QUERIES
    metadata = MetadataCatalog.get(dataset)
    kind = metadata.get("evaluator_type")
    if kind in ("png", "refcoco"):
        return SelectionSweep(options, queries, referring=kind == "refcoco")
    if kind == "coco_panoptic_seg":
        return PanopticSweep(
            options,
            queries,
            metadata.categories,
            lambda scores, masks, *rest: panoptic_from_scores(
                torch.from_numpy(scores).float(), torch.from_numpy(masks), *rest
            ),
        )
    raise ValueError(
        f"dataset {dataset}: evaluator_type {kind!r} has no threshold to pick; name narratives, "
        "referring expressions or a panoptic dataset"
    )


def run(args: argparse.Namespace) -> None:
    """Run the model over the datasets, pick, write, and say what to type next."""
    setup_logger()
    logging.getLogger("gella").setLevel(logging.INFO)
    cfg = config_of(args.config_file, [*(args.opts or []), "TEST.NOUNS", "given"])
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    find_clip(cfg)
    cfg.freeze()
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError("no weights: give --weights FILE or MODEL.WEIGHTS in the config")
    names = args.dataset or cfg.DATASETS.TEST
    if not names:
        raise ValueError("nothing to calibrate on: DATASETS.TEST is empty; give --dataset NAME")
    work = []  # wrong names and annotations end the run before the model is built
    for name in names:
        loader = Questions(GellaTrainer.build_test_loader(cfg, name), args.num)
        work.append((name, loader, sweep_for(cfg, name)))
    taking_all = cfg.clone()
    taking_all.defrost()
    taking_all.MODEL.GELLA.update(TAKE_ALL)
    model = build_with_weights(taking_all, weights)
    thresholds: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name, loader, sweep in work:
        try:
            described[name] = picked = inference_on_dataset(model, loader, sweep)
        except ValueError as error:  # such as that there was nothing to pick on
            raise ValueError(f"dataset {name}: {error}") from error
        twice = sorted(set(thresholds) & set(picked["thresholds"]))
        if twice:
            raise ValueError(
                f"{name} picks {', '.join(twice)}, which another dataset has picked: calibrate "
                "narratives and referring expressions apart, into a file each"
            )
        thresholds |= picked["thresholds"]
    content = {
        "thresholds": thresholds,
        "datasets": described,
        "weights": weights,
        "weights_sha256": file_hash(weights),
        "config_file": args.config_file,
        "config_sha256": config_hash(cfg),
        "versions": versions(),
    }
    path = args.output or os.path.join(cfg.OUTPUT_DIR, "calibration.json")
    for name, picked in described.items():
        change = f"{picked['before']:.2f} -> {picked['score']:.2f}"
        print(f"{name}: {picked['objective']} {change} (n {picked['n']})")
    for key, value in thresholds.items():
        print(f"  MODEL.GELLA.{key} {value}")
    write_json(path, content)  # the thresholds were shown before what may fail
    print(
        f"Written:  {path}\nNext:     python {tools()}/train_net.py --config-file"
        f" {args.config_file} --eval-only MODEL.WEIGHTS {weights} TEST.CALIBRATION {path}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments or files."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config of the model")
    add("--weights", default="", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    name_help = "split to pick on, repeatable; default: DATASETS.TEST"
    add("--dataset", action="append", metavar="NAME", help=name_help)
    add("--num", type=int, default=0, metavar="N", help="first N records only; 0: all")
    add("--output", default="", metavar="FILE", help="default: OUTPUT_DIR/calibration.json")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))

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
import logging
import os
import sys
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from gella import load_config
from gella.data.plugins import import_modules
from gella.engine.trainer import GellaTrainer
from gella.evaluation.calibration import TAKE_ALL, PanopticSweep, SelectionSweep
from gella.modeling.postprocessing import names_several, panoptic_from_scores
from gella.utils.io import config_hash, file_hash, versions, write_json
from gella.weights.checkpoint import load_weights

USER_ERRORS = (KeyError, ValueError, OSError)


class Questions:
    """Some batches of a loader, asked as nouns so that the scores of every name come back."""

    def __init__(self, loader: Any, num_images: int) -> None:
        """``num_images`` 0 takes all."""
        self._loader = loader
        size = max(1, getattr(loader, "batch_size", None) or 1)
        total = len(loader)
        self._batches = min(total, -(-num_images // size)) if num_images else total

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    def __iter__(self) -> Any:
        """The loader's first batches."""
        for number, batch in enumerate(self._loader, start=1):
            yield [{**sample, "task": "ground"} for sample in batch]
            if number >= self._batches:
                return


def paint(
    scores: np.ndarray, masks: np.ndarray, categories: list[dict[str, Any]], threshold: float
) -> tuple[Any, list[dict[str, Any]]]:
    """``panoptic_from_scores`` on arrays."""
    as_model = torch.from_numpy(scores).float()
    return panoptic_from_scores(as_model, torch.from_numpy(masks), categories, threshold)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config of the model")
    add("--weights", default="", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    add(
        "--dataset",
        action="append",
        metavar="NAME",
        help="split to pick on, repeatable; default: DATASETS.TEST",
    )
    add("--num", type=int, default=0, metavar="N", help="first N records only; 0: all")
    add("--output", default="", metavar="FILE", help="default: OUTPUT_DIR/calibration.json")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    return parser.parse_args(argv)


def sweep_for(cfg: Any, dataset: str) -> Any:
    """The sweep that fits a dataset's ``evaluator_type``.

    Raises:
        ValueError: there is nothing to calibrate on such a dataset.
    """
    options, queries = cfg.MODEL.GELLA, cfg.MODEL.MASK_DECODER.QUERIES
    metadata = MetadataCatalog.get(dataset)
    kind = metadata.get("evaluator_type")
    if kind in ("png", "refcoco"):
        return SelectionSweep(options, queries, names_several, referring=kind == "refcoco")
    if kind == "coco_panoptic_seg":
        return PanopticSweep(options, queries, metadata.categories, paint)
    raise ValueError(
        f"dataset {dataset}: evaluator_type {kind!r} has no threshold to pick; name narratives, "
        "referring expressions or a panoptic dataset"
    )


def taking_all(cfg: Any) -> Any:
    """The config of a model whose nouns take every entity."""
    copy = cfg.clone()
    copy.defrost()
    for name, value in TAKE_ALL.items():
        setattr(copy.MODEL.GELLA, name, value)
    copy.freeze()
    return copy


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Run the model over the datasets and pick; returns what is written to the file."""
    cfg = load_config(args.config_file, [*(args.opts or []), "TEST.NOUNS", "given"])
    if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    import_modules(cfg)
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    cfg.freeze()
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("no weights: give --weights FILE or MODEL.WEIGHTS in the config")
    names = args.dataset or list(cfg.DATASETS.TEST)
    loaders = {}
    for name in names:  # wrong names and annotations end the run before the model is built
        loaders[name] = Questions(GellaTrainer.build_test_loader(cfg, name), args.num)
    sweeps = {name: sweep_for(cfg, name) for name in names}
    model = build_model(taking_all(cfg))
    load_weights(model, cfg.MODEL.WEIGHTS, cfg)
    thresholds: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name, sweep in sweeps.items():
        found = inference_on_dataset(model, loaders[name], sweep)
        twice = sorted(set(thresholds) & set(found["thresholds"]))
        if twice:
            raise ValueError(
                f"{name} picks {', '.join(twice)}, which another dataset has picked: calibrate "
                "narratives and referring expressions apart, into a file each"
            )
        thresholds |= found["thresholds"]
        described[name] = found
    return {
        "thresholds": thresholds,
        "datasets": described,
        "weights": cfg.MODEL.WEIGHTS,
        "weights_sha256": file_hash(cfg.MODEL.WEIGHTS),
        "config_file": args.config_file,
        "config_sha256": config_hash(cfg),
        "versions": versions(),
        "output": args.output or os.path.join(cfg.OUTPUT_DIR, "calibration.json"),
    }


def main(argv: list[str] | None = None) -> None:
    """Pick, write and say what to type next."""
    args = parse(argv)
    setup_logger()
    logging.getLogger("gella").setLevel(logging.INFO)
    try:
        content = calibrate(args)
        path = content.pop("output")
        write_json(path, content)
    except USER_ERRORS as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    for name, found in content["datasets"].items():
        print(
            f"{name}: {found['objective']} {found['before']:.2f} -> {found['score']:.2f} "
            f"(n {found['n']})"
        )
    for key, value in content["thresholds"].items():
        print(f"  MODEL.GELLA.{key} {value}")
    print(
        f"Written:  {path}\nNext:     python tools/train_net.py --config-file {args.config_file} "
        f"--eval-only MODEL.WEIGHTS {content['weights']} TEST.CALIBRATION {path}"
    )

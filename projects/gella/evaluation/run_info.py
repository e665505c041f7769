"""How scores came about: hashes of config and weights, versions, datasets, settings and time."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils import comm

# Keys that cannot change a score: where files go, and how the work is shared out.
_NO_MATTER = (
    "OUTPUT_DIR",
    "VERSION",
    "VIS_PERIOD",
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "TEST.IMS_PER_BATCH",
    "TEST.EXPECTED_RESULTS",
    "TEST.CALIBRATION",  # the thresholds that it set count
    "TEST.EVAL_PERIOD",
    "CUDNN_BENCHMARK",
)
_PACKAGES = ("torch", "transformers", "timm", "numpy", "pycocotools", "pillow")


def config_hash(cfg: Any) -> str:
    """SHA-256 of a config without the keys that cannot change a score.

    Left out: OUTPUT_DIR, MODEL.WEIGHTS (it has a hash of its own), MODEL.DEVICE, numbers of workers
    and of images per batch at test, expected results.
    """
    tree = yaml.safe_load(cfg.dump())
    for key in _NO_MATTER:
        node, *rest = key.split(".")
        place = tree
        while rest:
            place = place.get(node, {})
            node, *rest = rest
        place.pop(node, None)
    text = yaml.safe_dump(tree, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or of the names and hashes of a folder's files; "" for neither."""
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        lines = [f"{file.relative_to(path)} {file_hash(file)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if not Path(path).is_file():
        return ""
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that scores depend on."""
    import detectron2

    found = {"python": platform.python_version(), "detectron2": str(detectron2.__version__)}
    for name in ("gella", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def settings(cfg: Any) -> dict[str, Any]:
    """The keys that decide by which rule and in which mode scores were computed."""
    gella, test = cfg.MODEL.GELLA, cfg.TEST
    return {
        "png_protocol": test.PNG_PROTOCOL,
        "nouns": test.NOUNS,
        "categories_from": test.CATEGORIES_FROM or "the dataset",
        "entity_sources": [list(entry) for entry in cfg.INPUT.GELLA.ENTITY_SOURCES]
        or "the annotation",
        "queries": cfg.MODEL.MASK_DECODER.QUERIES,
        "snap": bool(gella.SNAP),
        "snap_iou": float(gella.SNAP_IOU),
        "thresholds": {
            "entity_score": float(gella.ENTITY_SCORE_THRESHOLD),
            "association": float(gella.ASSOCIATION_THRESHOLD),
            "singular_argmax": bool(gella.SINGULAR_ARGMAX),
            "none": float(gella.NONE_THRESHOLD),
            "panoptic": float(gella.PANOPTIC_THRESHOLD),
        },
    }


def describe_run(
    cfg: Any,
    *,
    config_file: str,
    weights: str,
    seconds: float,
    datasets: Mapping[str, Mapping[str, float]],
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that results.json says beside the scores.

    Args:
        cfg: the config that was evaluated.
        config_file: its file.
        weights: the checkpoint; its bytes are hashed.
        seconds: wall time of the evaluation, or of training with it.
        datasets: per dataset ``records``, ``images`` and, where known, ``seconds``.
        calibration: where the thresholds were picked (`calibration.read_calibration`).
    """
    described: dict[str, Any] = {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "processes": comm.get_world_size(),
        "device": str(cfg.MODEL.DEVICE),
        "config_file": config_file,
        "config_sha256": config_hash(cfg),
        "weights": weights,
        "weights_sha256": file_hash(weights),
        "versions": versions(),
        "datasets": {name: dict(counts) for name, counts in datasets.items()},
        "settings": settings(cfg),
    }
    if calibration is not None:
        picked_on = list(calibration["datasets"])
        described["calibration"] = {
            "picked_on": picked_on,
            "thresholds": calibration["thresholds"],
            # Thresholds that were picked on what they are scored on flatter the score.
            "scored_on_the_same": sorted(set(picked_on) & set(datasets)),
        }
    return described

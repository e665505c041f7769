"""How scores came about: hashes of config and weights, versions, datasets, settings and time."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from detectron2.utils import comm

from gella.utils.io import config_hash, file_hash, versions


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

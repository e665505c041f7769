"""What must be equal on all processes of a run, looked at once before it trains.

A run whose machines hold other files trains without a complaint, on weights that drift apart or
batches that leave images out; so config, versions, code, datasets and weights are compared.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2
from detectron2.utils import comm

__all__ = ["UnequalRanks", "check_agreement", "config_facts", "file_facts", "record_facts"]

# Distributions whose version can change what a run computes.
PACKAGES = (
    *("torch", "numpy", "transformers", "tokenizers", "timm", "open_clip_torch"),
    *("deepspeed", "peft", "bitsandbytes", "fvcore", "pycocotools"),
)
_BLOCK, _NUM_BLOCKS = 1 << 16, 64  # bytes, and how many blocks of a large file are read


class UnequalRanks(ValueError):
    """The processes of a run do not agree; raised on all of them with the same message."""


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compare what each process says with what rank 0 says; every process must call this.

    Args:
        facts: what must be equal, by a name that tells the user what it is; short texts.

    Raises:
        UnequalRanks: names the first rank that differs, what differs, and both values; the same
            on all processes.
    """
    first, *others = comm.all_gather(dict(facts))
    for rank, found in enumerate(others, start=1):
        names = [n for n in (*first, *(found.keys() - first)) if first.get(n) != found.get(n)]
        if not names:
            continue
        name = names[0]
        more = f" ({len(names) - 1} more differ: {', '.join(names[1:4])})" if names[1:] else ""
        raise UnequalRanks(
            f"{name} is {found.get(name, 'absent')} on rank {rank} but"
            f" {first.get(name, 'absent')} on rank 0{more}: config, code, packages, data and"
            " weights must be equal on all machines"
        )


def config_facts(cfg: Any) -> dict[str, str]:
    """Every key of the config, the versions of the packages, and the code of this one.

    Args:
        cfg: a GELLA config. Files that ``DATASETS.MODULES`` names are taken as code; DeepSpeed's
            file, the language model's and the tokenizer belong to the config.
    """
    facts = {f"config key {name}": value for name, value in _flat(cfg, "")}
    facts["Python"] = platform.python_version()
    facts["detectron2"] = str(detectron2.__version__)
    for name in PACKAGES:
        try:
            facts[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[f"version of {name}"] = "not installed"
    facts["code of gella"] = _digest(sorted(Path(__file__).parents[1].rglob("*.py")))
    modules = [Path(str(name)) for name in cfg.DATASETS.MODULES]
    facts["code of DATASETS.MODULES"] = _digest([path for path in modules if path.is_file()])
    language = cfg.MODEL.LANGUAGE
    facts |= file_facts("file of SOLVER.ZERO.CONFIG", cfg.SOLVER.ZERO.CONFIG)
    facts |= file_facts("file of MODEL.LANGUAGE.CONFIG", language.CONFIG)
    facts |= file_facts("files of MODEL.LANGUAGE.TOKENIZER", language.TOKENIZER)
    return facts


def record_facts(name: str, records: Any) -> dict[str, str]:
    """Number and order of a dataset's records.

    Args:
        name: what the user knows them as, such as "DATASETS.TRAIN".
        records: a sequence; where it has ``image_ids()`` (``data.record_store.Records``) the order
            of the images counts too.
    """
    text = f"{len(records):,} records"
    if hasattr(records, "image_ids"):
        digest = hashlib.sha256("\n".join(records.image_ids().tolist()).encode())
        text += f" (order {digest.hexdigest()[:8]})"
    return {name: text}


def file_facts(name: str, path: str | Path) -> dict[str, str]:
    """Size and a digest of a file, of the files of a folder, or that there is none.

    A large file is read at 64 places only, which tells any two trainings apart in milliseconds.

    Args:
        name: what the user knows it as, such as "MODEL.WEIGHTS".
        path: may not exist; "" is none.
    """
    source = Path(path)
    if not path or not source.exists():
        return {name: "no file"}
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    digest, size = hashlib.sha256(), 0
    for file in files:
        length = file.stat().st_size
        size += length
        digest.update(f"{file.relative_to(source)} {length}\n".encode())
        step = max(_BLOCK, length // _NUM_BLOCKS)
        with open(file, "rb") as stream:
            for start in range(0, length, step):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return {name: f"{source.name}, {size:,} bytes (digest {digest.hexdigest()[:8]})"}


def _flat(node: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    rows = []
    for key, value in node.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", repr(value)))
    return rows


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"digest {digest.hexdigest()[:8]}"

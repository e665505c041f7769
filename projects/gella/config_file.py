"""Read a config file with GELLA's keys, turning yacs' many error types into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg

from gella.config import add_gella_config


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> Any:
    """Read a GELLA config file and apply ``KEY VALUE`` overrides; the result can still be changed.

    ``MODEL.WEIGHTS`` and ``MODEL.LANGUAGE.TOKENIZER`` of the file are sought beside it first, so
    that a folder of weights works from anywhere. All other paths, and those in overrides, start
    at the working directory.

    Raises:
        FileNotFoundError: there is no such file, or a ``_BASE_`` of it is missing.
        ValueError: the file is no YAML, or a key is unknown or of another type.
    """
    if not Path(config_file).is_file():
        raise FileNotFoundError(f"config {config_file} does not exist; see the folder configs/")
    cfg = get_cfg()
    add_gella_config(cfg)
    # yacs reports unknown keys by KeyError in files but by AssertionError in overrides, and YAML
    # errors have types of their own.
    try:
        cfg.merge_from_file(str(config_file))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"config {config_file}: {_one_line(error)}") from error
    _find_beside(cfg, Path(config_file).parent)
    try:
        cfg.merge_from_list(list(opts))
    except Exception as error:
        raise ValueError(f"config override: {_one_line(error)}") from error
    return cfg


def _find_beside(cfg: Any, folder: Path) -> None:
    for node, key in ((cfg.MODEL, "WEIGHTS"), (cfg.MODEL.LANGUAGE, "TOKENIZER")):
        if node[key] and (folder / node[key]).exists():
            node[key] = str(folder / node[key])


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__

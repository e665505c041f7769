"""Reading the public weights for tools/convert_weights.py: formats, checks, what no file has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn
from tqdm import tqdm

from gella.utils.io import file_hash, read_json
from gella.weights import detect, format_named
from gella.weights.assembly import Piece
from gella.weights.files import main_file, read_weights, weight_files
from gella.weights.llava import EMBEDDINGS, fit_words

BLOCK = 1 << 24  # bytes that are hashed at a time


def plain_config(cfg: Any) -> Any:
    """A copy of a config whose language decoder has neither adapters nor rounded weights.

    Public weights are those of the plain model; both are laid over it when it is loaded.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.LANGUAGE.LORA.ENABLED = False
    cfg.MODEL.LANGUAGE.QUANTIZATION = ""
    return cfg


def build_on_meta(cfg: Any) -> nn.Module:
    """The model of a config without memory for its weights."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.LANGUAGE.ATTENTION = "sdpa"  # others may not be installed; the keys are the same
    with torch.device("meta"):
        return build_model(cfg)


def initial_tensors(cfg: Any, model: nn.Module, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that the config's model starts with, for keys outside the language decoder.

    The model is built with a language decoder and an image encoder of the least size, so that a
    model of 7B parameters needs no memory for them. ``SEED`` makes the result repeat.

    Args:
        cfg: of the model.
        model: that model on any device, for the language decoder's width.
        keys: which tensors.
    """
    cfg = plain_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.IMAGE_ENCODER.LAYERS = 2
    node = cfg.MODEL.LANGUAGE
    node.HIDDEN_SIZE = model.language_decoder.hidden_size
    node.CONFIG, node.ATTENTION, node.DTYPE = "", "sdpa", "float32"
    node.NUM_LAYERS = node.NUM_HEADS = node.NUM_KEY_VALUE_HEADS = 1
    node.INTERMEDIATE_SIZE = node.VOCAB_SIZE = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(cfg.SEED, 0))
        state = build_model(cfg).state_dict()
    return {key: state[key] for key in keys}


def read_piece(
    kind: str, path: str, name: str | None, cfg: Any, seg_row: int | None
) -> tuple[Piece, list[str]]:
    """Read one file and rename its keys to GELLA's.

    Args:
        kind: a key of ``gella.weights.FORMATS``.
        path: file or folder.
        name: of the format; None finds it out.
        cfg: of the model.
        seg_row: of ``llava``: the embedding's row of <SEG>, see ``fit_words``; None takes what the
            folder's config.json says, if it says so.

    Returns:
        the piece, and lines for the report.

    Raises:
        OSError, ValueError: what reading and renaming refuse; a config.json that differs.
    """
    state = read_weights(path)
    layout = (format_named(kind, name) if name else detect(kind, state, path)).from_config(cfg)
    try:
        converted = layout.to_gella(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    notes: list[str] = []
    beside = _config_beside(path)
    if kind in ("llava", "clip"):
        check_hyperparameters(beside, cfg, path, kind)
    if kind == "llava":
        if seg_row is None:
            seg_row = beside.get("seg_token_index")
        if cfg.MODEL.LANGUAGE.TIE_EMBEDDINGS and EMBEDDINGS[0] in converted:
            # files of models with one matrix for both hold it once
            converted.setdefault(EMBEDDINGS[1], converted[EMBEDDINGS[0]])
        try:
            converted, notes = fit_words(converted, cfg.MODEL.LANGUAGE.VOCAB_SIZE, seg_row)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    dropped = [key for key in state if layout.drops(key)]
    return Piece(path, layout.name, converted, tuple(layout.fresh), dropped), notes


def _config_beside(path: str) -> dict[str, Any]:
    file = main_file(path).parent / "config.json"
    if not file.is_file():
        return {}
    loaded = read_json(file)
    return loaded if isinstance(loaded, dict) else {}


def check_hyperparameters(beside: Mapping[str, Any], cfg: Any, path: str, kind: str) -> None:
    """Compare what no tensor's shape shows with a file's own config.json, as far as it says so.

    Args:
        beside: the config.json of the same folder, {} if there is none.
        cfg: of the model.
        path: named in the error.
        kind: ``llava`` or ``clip``.

    Raises:
        ValueError: values that differ, each with its key here.
    """
    language, clip = cfg.MODEL.LANGUAGE, cfg.MODEL.IMAGE_ENCODER
    # Any model's config.json may lie beside a CLIP file; only CLIP's own says something of it.
    alone = beside if beside.get("model_type") == "clip_vision_model" else {}
    vision = beside.get("vision_config") or alone
    rows = [
        (vision, "num_attention_heads", clip.WIDTH // clip.HEAD_WIDTH, "IMAGE_ENCODER.HEAD_WIDTH"),
        (
            vision,
            "hidden_act",
            "quick_gelu" if clip.QUICK_GELU else "gelu",
            "IMAGE_ENCODER.QUICK_GELU",
        ),
    ]
    if kind == "llava":
        rows += [
            (beside, "vision_feature_layer", -2, ""),
            (beside, "mm_vision_select_layer", -2, ""),
        ]
        if not language.CONFIG:
            text = beside.get("text_config") or beside
            rope = text.get("rope_parameters") or {}
            rows += [
                (text, "num_attention_heads", language.NUM_HEADS, "LANGUAGE.NUM_HEADS"),
                (text, "rms_norm_eps", language.RMS_NORM_EPS, "LANGUAGE.RMS_NORM_EPS"),
                (text, "rope_theta", language.ROPE_THETA, "LANGUAGE.ROPE_THETA"),
                (rope, "rope_theta", language.ROPE_THETA, "LANGUAGE.ROPE_THETA"),
            ]
    wrong = [
        f"{name} is {there[name]} there and {here} here"
        + (f" (MODEL.{key})" if key else " (GELLA takes CLIP's penultimate layer)")
        for there, name, here, key in rows
        if there.get(name) is not None and there[name] != here
    ]
    if wrong:
        raise ValueError(
            f"the config.json of {path} differs from the model's config: {'; '.join(wrong)}"
        )


def hash_files(paths: Iterable[str]) -> list[tuple[str, str]]:
    """(name, sha256) of every file that weights are made of, with a progress bar."""
    files = [file for path in paths for file in weight_files(path)]
    size = sum(file.stat().st_size for file in files)
    result = []
    with tqdm(total=size, unit="B", unit_scale=True, desc="sha256", leave=False) as bar:
        for file in files:
            result.append((_short(file), file_hash(file, bar.update)))
    return result


def _short(file: Path) -> str:
    # folder and file: enough to recognise a model, and nothing of this machine
    return f"{file.resolve().parent.name}/{file.name}"

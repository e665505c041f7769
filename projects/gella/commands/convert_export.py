"""Folders that tools/convert_weights.py writes: safetensors shards, index, model card, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gella import __version__
from gella.weights import LlavaHf, LlavaOriginal
from gella.weights.files import new_folder, write_shards
from gella.weights.llava import EMBEDDINGS

PARTS = (
    "colormap_encoder",
    "image_encoder",
    "resoblend",
    "mask_decoder",
    "language_decoder",
    "association",
)


def write_gella(
    folder: str,
    state: Mapping[str, Tensor],
    cfg: Any,
    *,
    config_file: str,
    sources: Sequence[tuple[str, str]],
    fresh: Sequence[str] = (),
    notes: Sequence[str] = (),
    max_shard_size: str,
    dtype: torch.dtype | None,
) -> None:
    """Write GELLA's weights, the whole config and a model card into a new folder.

    Args:
        folder: must not exist, or be empty.
        state: tensors by GELLA's key.
        cfg: the config; written as ``config.yaml``.
        config_file: its name, for the card.
        sources: (file, sha256) of what the weights were made from.
        fresh: names of what no source has and is untrained.
        notes: further lines for the card.
        max_shard_size, dtype: see ``write_shards``.
    """
    with new_folder(folder) as temporary:
        shards = write_shards(state, temporary, max_shard_size=max_shard_size, dtype=dtype)
        (temporary / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
        card = model_card(state, Path(config_file).name, sources, fresh, notes, len(shards), dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(
    state: Mapping[str, Tensor],
    config_name: str,
    sources: Sequence[tuple[str, str]],
    fresh: Sequence[str],
    notes: Sequence[str],
    num_files: int,
    dtype: torch.dtype | None,
) -> str:
    """The README.md of a folder of GELLA's weights."""
    kinds = {str(t.dtype if dtype is None else dtype) for t in state.values()}
    lines = [
        "---",
        "library_name: gella",
        "pipeline_tag: image-segmentation",
        "---",
        "# GELLA weights",
        "",
        "Grounds every entity that a caption names, on entity masks from any source"
        " (arXiv 2402.02555).",
        "",
        f"- config: `{config_name}`, whole in `config.yaml`; gella {__version__}",
        f"- {len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers,"
        f" {', '.join(sorted(k.removeprefix('torch.') for k in kinds))}, {num_files} file(s)",
        "- load: `MODEL.WEIGHTS` names this folder; keys are checked strictly",
        "",
        "| part | tensors | numbers |",
        "|---|---|---|",
    ]
    for part in (*PARTS, *sorted({k.split(".")[0] for k in state} - set(PARTS))):
        mine = [t for k, t in state.items() if k.split(".")[0] == part]
        if mine:
            lines.append(f"| {part} | {len(mine)} | {sum(t.numel() for t in mine):,} |")
    lines += ["", "## Made from", "", "| file | sha256 |", "|---|---|"]
    lines += [f"| {name} | `{digest}` |" for name, digest in sources]
    if fresh:
        lines += ["", "## Untrained", "", "No source has these; they are as initialised:", ""]
        lines += [f"- `{name}`" for name in fresh]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join([*lines, ""])


def write_llava(
    folder: str,
    state: Mapping[str, Tensor],
    model: nn.Module,
    cfg: Any,
    *,
    original: bool,
    max_shard_size: str,
    dtype: torch.dtype | None,
) -> None:
    """Write the language decoder and CLIP as a LLaVA-1.5 of transformers, or of its repository.

    Args:
        folder: must not exist, or be empty.
        state: all of GELLA's tensors by key.
        model: the same model on any device, for the language model's configuration.
        cfg: its config.
        original: the LLaVA repository's layout instead of transformers'.
        max_shard_size, dtype: see ``write_shards``.

    Raises:
        ValueError: what the layout has no place for: adapters, or one linear layer as projector.
    """
    adapters = [key for key in state if ".lora_" in key]
    if adapters:
        raise ValueError(
            f"the weights hold {len(adapters)} adapter tensors ({adapters[0]} ...), for which LLaVA"
            " has no place: merge them into the weights first"
        )
    if cfg.MODEL.LANGUAGE.PROJECTOR != "mlp2x_gelu" and not original:
        raise ValueError(
            f"MODEL.LANGUAGE.PROJECTOR is {cfg.MODEL.LANGUAGE.PROJECTOR!r}; transformers' LLaVA has"
            " two layers only: use --export-llava-original"
        )
    layout = LlavaOriginal() if original else LlavaHf()
    state = dict(state)
    if not original:
        state.update(_image_row(state))
    foreign = layout.from_gella(state)
    config = original_config(model, cfg) if original else transformers_config(model, cfg)
    if not original:
        # transformers builds CLIP's last norm, which neither LLaVA nor GELLA uses.
        width, start = cfg.MODEL.IMAGE_ENCODER.WIDTH, "vision_tower.vision_model.post_layernorm."
        foreign[start + "weight"], foreign[start + "bias"] = torch.ones(width), torch.zeros(width)
    with new_folder(folder) as temporary:
        write_shards(foreign, temporary, max_shard_size=max_shard_size, dtype=dtype)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")


def _image_row(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # transformers marks the image's place by a token of the vocabulary; GELLA's has none. Its row
    # is never read as a word, and as the mean of the others it never wins as an answer.
    rows = {key: state[key] for key in EMBEDDINGS if key in state}
    return {
        key: torch.cat([table, table.float().mean(0, keepdim=True).to(table.dtype)])
        for key, table in rows.items()
    }


def transformers_config(model: nn.Module, cfg: Any) -> dict[str, Any]:
    """config.json of ``LlavaForConditionalGeneration`` for a GELLA model.

    ``image_token_index`` is a row of its own behind <SEG>; ``seg_token_index`` tells
    tools/convert_weights.py which row <SEG> has.
    """
    from transformers import CLIPVisionConfig, LlavaConfig

    clip = cfg.MODEL.IMAGE_ENCODER
    text = model.language_decoder.llama.config.to_dict()
    words = text["vocab_size"]
    text["vocab_size"] = words + 1
    vision = CLIPVisionConfig(
        hidden_size=clip.WIDTH,
        intermediate_size=int(clip.WIDTH * clip.MLP_RATIO),
        num_hidden_layers=clip.LAYERS,
        num_attention_heads=clip.WIDTH // clip.HEAD_WIDTH,
        image_size=clip.IMAGE_SIZE,
        patch_size=clip.PATCH_SIZE,
        hidden_act="quick_gelu" if clip.QUICK_GELU else "gelu",
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=words,
        image_seq_length=(clip.IMAGE_SIZE // clip.PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=cfg.MODEL.LANGUAGE.TIE_EMBEDDINGS,
    ).to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    config["seg_token_index"] = words - 1
    return config


def original_config(model: nn.Module, cfg: Any) -> dict[str, Any]:
    """config.json of the LLaVA repository's ``LlavaLlamaForCausalLM`` for a GELLA model."""
    config = model.language_decoder.llama.config.to_dict()
    # The repository reads the tower from the hub by this name, whatever the file holds.
    sizes = (cfg.MODEL.IMAGE_ENCODER.WIDTH, cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE)
    towers = {(1024, 224): "-patch14", (1024, 336): "-patch14-336"}
    tower = f"openai/clip-vit-large{towers[sizes]}" if sizes in towers else None
    return {
        **config,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_hidden_size": cfg.MODEL.IMAGE_ENCODER.WIDTH,
        "mm_projector_type": cfg.MODEL.LANGUAGE.PROJECTOR,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
        "seg_token_index": config["vocab_size"] - 1,
    }

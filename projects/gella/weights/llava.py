"""CLIP and LLaVA-1.5, as their own repositories write them and as transformers does.

GELLA keeps open_clip's vision transformer, so its names are OpenAI's; transformers has query, key
and value apart. What lies behind the last layer (a norm and the projection to the words) has no use
here. A LLaVA may hold such a vision tower beside LLaMA and the projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gella.weights.layout import Layout, table

_VISION, _LANGUAGE = "image_encoder.visual.", "language_decoder."
#: GELLA's tensors with one row per token.
EMBEDDINGS = (
    f"{_LANGUAGE}llama.model.embed_tokens.weight",
    f"{_LANGUAGE}llama.lm_head.weight",
)
# A buffer of LLaMA in old files; it follows from the configuration.
_ROTARY = "*.rotary_emb.inv_freq"
_CLIP = """
class_embedding       class_embedding
positional_embedding  positional_embedding
conv1.{rest}          conv1.{rest}
ln_pre.{rest}         ln_pre.{rest}
transformer.{rest}    transformer.{rest}
"""
_CLIP_HF = """
embeddings.class_embedding                class_embedding
embeddings.patch_embedding.{rest}         conv1.{rest}
embeddings.position_embedding.weight      positional_embedding
pre_layrnorm.{rest}                       ln_pre.{rest}
encoder.layers.{i}.layer_norm1.{rest}     transformer.resblocks.{i}.ln_1.{rest}
encoder.layers.{i}.layer_norm2.{rest}     transformer.resblocks.{i}.ln_2.{rest}
encoder.layers.{i}.mlp.fc1.{rest}         transformer.resblocks.{i}.mlp.c_fc.{rest}
encoder.layers.{i}.mlp.fc2.{rest}         transformer.resblocks.{i}.mlp.c_proj.{rest}
encoder.layers.{i}.self_attn.in_proj_{rest}    transformer.resblocks.{i}.attn.in_proj_{rest}
encoder.layers.{i}.self_attn.out_proj.{rest}   transformer.resblocks.{i}.attn.out_proj.{rest}
"""  # "layrnorm" is spelt like this in transformers
_CLIP_HF_DROPPED = ("embeddings.position_ids", "post_layernorm.*")


def _fused(start: str) -> tuple[str, Sequence[str]]:
    head = start + "{head}.self_attn."
    return head + "in_proj_{kind}", [f"{head}{part}_proj.{{kind}}" for part in "qkv"]


class ClipOpenAI(Layout):
    """Whole models of open_clip and OpenAI (the state dict), or their keys ``visual.*`` alone."""

    name = "clip-openai"
    prefix = _VISION
    signature = ("visual.conv1.weight", "visual.transformer.resblocks.*.attn.in_proj_weight")
    rules = table(_CLIP, "visual.", _VISION)
    dropped = (
        *("visual.ln_post.*", "visual.proj"),
        # the text side, bare or (open_clip's CustomTextCLIP) under text.*
        *("transformer.*", "text.*", "token_embedding.*", "positional_embedding", "ln_final.*"),
        *("text_projection", "attn_mask", "logit_scale", "logit_bias"),
        # numbers that OpenAI's archives keep among the weights
        *("input_resolution", "context_length", "vocab_size"),
    )


class ClipOpenAIVisual(Layout):
    """The module ``visual`` of open_clip, saved alone."""

    name = "clip-openai-visual"
    prefix = _VISION
    signature = ("conv1.weight", "transformer.resblocks.*.attn.in_proj_weight", "ln_pre.weight")
    rules = table(_CLIP, "", _VISION)
    dropped = ("ln_post.*", "proj")


class ClipHfVision(Layout):
    """transformers' vision model without any prefix (``CLIPVisionModel`` since transformers 5)."""

    name = "clip-hf-vision"
    prefix = _VISION
    signature = (
        "embeddings.patch_embedding.weight",
        "encoder.layers.*.self_attn.q_proj.weight",
    )
    rules = table(_CLIP_HF, "", _VISION)
    dropped = _CLIP_HF_DROPPED
    fused_here = _fused("")


class ClipHf(Layout):
    """transformers' ``CLIPModel``, or its keys ``vision_model.*`` alone."""

    name = "clip-hf"
    prefix = _VISION
    signature = tuple(f"vision_model.{pattern}" for pattern in ClipHfVision.signature)
    rules = table(_CLIP_HF, "vision_model.", _VISION)
    dropped = (
        *(f"vision_model.{pattern}" for pattern in _CLIP_HF_DROPPED),
        *("text_model.*", "visual_projection.*", "text_projection.*", "logit_scale"),
    )
    fused_here = _fused("vision_model.")


class _Llava(Layout):
    """LLaMA, the projector, and a vision tower of transformers' if the file has one."""

    prefix = (_VISION, _LANGUAGE)

    def __init_subclass__(cls, *, text: str, tower: str) -> None:
        """Make the tables of ``text``'s rules and of a vision model behind ``tower``.

        transformers 5 leaves ``vision_model.`` out; both are read, the first is written.
        """
        towers = (f"{tower}vision_model.", tower)
        cls.rules = [*table(text, "", _LANGUAGE)]
        cls.rules += [rule for start in towers for rule in table(_CLIP_HF, start, _VISION)]
        cls.dropped = (_ROTARY, *(start + x for start in towers for x in _CLIP_HF_DROPPED))
        cls.fused_here = _fused(tower)


class LlavaHf(
    _Llava,
    text="""
    language_model.model.{rest}             llama.model.{rest}
    language_model.lm_head.{rest}           llama.lm_head.{rest}
    multi_modal_projector.linear_1.{rest}   projector.0.{rest}
    multi_modal_projector.linear_2.{rest}   projector.2.{rest}
    """,
    tower="vision_tower.",
):
    """LLaVA-1.5 as ``save_pretrained`` writes it; exports take transformers 4's names, which both
    versions read."""

    name = "llava-hf"
    signature = ("language_model.model.layers.*", "multi_modal_projector.linear_1.weight")


class LlavaHfModules(
    _Llava,
    text="""
    model.language_model.{rest}                   llama.model.{rest}
    lm_head.{rest}                                llama.lm_head.{rest}
    model.multi_modal_projector.linear_1.{rest}   projector.0.{rest}
    model.multi_modal_projector.linear_2.{rest}   projector.2.{rest}
    """,
    tower="model.vision_tower.",
):
    """The names of transformers' modules, which ``state_dict()`` gives since its version 4.52."""

    name = "llava-hf-modules"
    signature = ("model.language_model.layers.*", "model.multi_modal_projector.linear_1.weight")


class LlavaOriginal(
    _Llava,
    text="""
    model.layers.{rest}            llama.model.layers.{rest}
    model.embed_tokens.{rest}      llama.model.embed_tokens.{rest}
    model.norm.{rest}              llama.model.norm.{rest}
    lm_head.{rest}                 llama.lm_head.{rest}
    model.mm_projector.{i}.{rest}  projector.{i}.{rest}
    model.mm_projector.{rest}      projector.{rest}
    """,
    tower="model.vision_tower.vision_tower.",
):
    """LLaVA-1.5 as its own repository writes it, with or without a vision tower; the projector may
    be one linear layer."""

    name = "llava-original"
    signature = ("model.layers.*", "model.mm_projector.*")


def fit_words(
    state: Mapping[str, Tensor], vocab_size: int, seg_row: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Give the embeddings GELLA's rows: the words, then ``<SEG>``.

    The public files have 32,000 rows (the words of LLaMA) or, of transformers, 32,064: ``<image>``,
    ``<pad>`` and rows that no token uses.

    Args:
        state: tensors by GELLA's key; those of ``EMBEDDINGS`` are fitted, in their own dtype.
        vocab_size: rows that GELLA has; the last is ``<SEG>``.
        seg_row: the file's row of ``<SEG>``; None: none, the mean of the words is taken.

    Returns:
        the state, and a line for the report per tensor that was changed.

    Raises:
        ValueError: fewer rows than words, or no such row.
    """
    words = vocab_size - 1
    fitted, notes = dict(state), []
    for key in EMBEDDINGS:
        if key not in state:
            continue
        rows = state[key]
        if len(rows) < words:
            raise ValueError(
                f"{key} has {len(rows)} rows; MODEL.LANGUAGE.VOCAB_SIZE {vocab_size} needs {words}"
                " of words and one of <SEG>: set it to the number of the tokenizer's words + 1"
            )
        if seg_row is not None and not words <= seg_row < len(rows):
            raise ValueError(
                f"row {seg_row} of <SEG>: {key} has {len(rows)} rows, of which the first {words}"
                f" are words; it must lie in {words}..{len(rows) - 1}"
            )
        if seg_row is None:
            # The mean of the words neither attracts nor repels any of them. Summed in float32:
            # half precision loses it over 32,000 rows.
            seg = rows[:words].float().mean(0, keepdim=True).to(rows.dtype)
            origin = f"the mean of the {words}"
        else:
            seg, origin = rows[seg_row : seg_row + 1], f"row {seg_row} of the file"
        fitted[key] = torch.cat([rows[:words], seg])
        left = len(rows) - words - (seg_row is not None)
        notes.append(
            f"{key}: {len(rows)} rows in the file, {vocab_size} here: {words} words, <SEG> is"
            f" {origin}" + (f", {left} rows of other tokens left out" if left else "")
        )
    return fitted, notes

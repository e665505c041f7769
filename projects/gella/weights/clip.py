"""CLIP's vision transformer, as OpenAI and open_clip write it and as transformers does.

GELLA keeps open_clip's module, so its names are OpenAI's; transformers has query, key and value
apart. What lies behind the last layer (a norm and the projection to the words) has no use here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gella.weights.layout import Layout, fuse, unfuse

__all__ = ["ClipHf", "ClipHfVision", "ClipOpenAI", "ClipOpenAIVisual"]

_OURS = "image_encoder.visual."
_BEHIND = ("ln_post.*", "proj")


class ClipOpenAI(Layout):
    """Whole models of open_clip and OpenAI (the state dict), or their keys ``visual.*`` alone."""

    name = "clip-openai"
    prefix = _OURS
    signature = ("visual.conv1.weight", "visual.transformer.resblocks.*.attn.in_proj_weight")
    rules = (("visual.{rest}", _OURS + "{rest}"),)
    dropped = (
        *(f"visual.{pattern}" for pattern in _BEHIND),
        # the text side, bare or (open_clip's CustomTextCLIP) under text.*
        "transformer.*",
        "text.*",
        "token_embedding.*",
        "positional_embedding",
        "ln_final.*",
        "text_projection",
        "attn_mask",
        "logit_scale",
        "logit_bias",
        # numbers that OpenAI's archives keep among the weights
        "input_resolution",
        "context_length",
        "vocab_size",
    )


class ClipOpenAIVisual(Layout):
    """The module ``visual`` of open_clip, saved alone."""

    name = "clip-openai-visual"
    prefix = _OURS
    signature = ("conv1.weight", "transformer.resblocks.*.attn.in_proj_weight", "ln_pre.weight")
    rules = tuple(
        (key, _OURS + key)
        for key in (
            "class_embedding",
            "positional_embedding",
            "conv1.{rest}",
            "ln_pre.{rest}",
            "transformer.{rest}",
        )
    )
    dropped = _BEHIND


class ClipHfVision(Layout):
    """transformers' vision model without any prefix (``CLIPVisionModel`` since transformers 5)."""

    name = "clip-hf-vision"
    prefix = _OURS
    signature: Sequence[str] = (
        "embeddings.patch_embedding.weight",
        "encoder.layers.*.self_attn.q_proj.weight",
    )
    rules: Sequence[tuple[str, str]] = tuple(
        (there, _OURS + here)
        for there, here in (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding.{rest}", "conv1.{rest}"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm.{rest}", "ln_pre.{rest}"),  # spelt like this in transformers
            ("encoder.layers.{i}.layer_norm1.{rest}", "transformer.resblocks.{i}.ln_1.{rest}"),
            ("encoder.layers.{i}.layer_norm2.{rest}", "transformer.resblocks.{i}.ln_2.{rest}"),
            ("encoder.layers.{i}.mlp.fc1.{rest}", "transformer.resblocks.{i}.mlp.c_fc.{rest}"),
            ("encoder.layers.{i}.mlp.fc2.{rest}", "transformer.resblocks.{i}.mlp.c_proj.{rest}"),
            (
                "encoder.layers.{i}.self_attn.in_proj_{rest}",
                "transformer.resblocks.{i}.attn.in_proj_{rest}",
            ),
            (
                "encoder.layers.{i}.self_attn.out_proj.{rest}",
                "transformer.resblocks.{i}.attn.out_proj.{rest}",
            ),
        )
    )
    dropped: Sequence[str] = ("embeddings.position_ids", "post_layernorm.*")

    _fused = "{head}.self_attn.in_proj_{kind}"
    _apart = tuple(f"{{head}}.self_attn.{part}_proj.{{kind}}" for part in "qkv")

    def split(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join query, key and value, which GELLA has in one tensor."""
        return fuse(state, self._fused, self._apart)

    def join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut them apart again."""
        return unfuse(state, self._fused, self._apart)


class ClipHf(ClipHfVision):
    """transformers' ``CLIPModel``, or its keys ``vision_model.*`` alone."""

    name = "clip-hf"
    signature = tuple(f"vision_model.{pattern}" for pattern in ClipHfVision.signature)
    rules = tuple((f"vision_model.{there}", here) for there, here in ClipHfVision.rules)
    dropped = (
        *(f"vision_model.{pattern}" for pattern in ClipHfVision.dropped),
        "text_model.*",
        "visual_projection.*",
        "text_projection.*",
        "logit_scale",
    )

"""Weights of Mask2Former: the public repository's files and transformers' layout.

Both become ``colormap_encoder.*`` (Swin with its four norms) and ``mask_decoder.*``. Not taken, by
name: the class head (GELLA's tells entities from no object), the criterion's constants, Swin's
computed buffers, and the first 1x1 convolutions of the pixel decoder, which read the backbone's
own channels where GELLA's read ResoBlend's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gella.weights.backbones import SWIN_BUFFERS, merging_rules, swin_rules
from gella.weights.layout import Layout, fuse, unfuse

__all__ = ["Mask2FormerTransformers", "Mask2FormerUpstream", "MaskFormerHeadUpstream"]

_SELF_ATTENTION = "sem_seg_head.predictor.transformer_self_attention_layers.{i}.self_attn."
_SELF_ATTENTION_PARTS = tuple(_SELF_ATTENTION + part + "_proj.{kind}" for part in "qkv")
_SWIN_BLOCK = "colormap_encoder.body.layers_{i}.blocks.{j}."
_SWIN_PARTS = tuple(
    "model.pixel_level_module.encoder.{head}.self." + part + ".{kind}"
    for part in ("query", "key", "value")
)
_PIXEL, _DECODER = "mask_decoder.pixel_decoder.", "mask_decoder.transformer."


class _Mask2Former(Layout):
    """What the layouts share: a given GELLA model can take some parts and not others."""

    prefix: str | tuple[str, ...] = ("colormap_encoder.", "mask_decoder.")
    #: Shell patterns of foreign keys that only some models can take ...
    backbone_keys: Sequence[str] = ()
    query_keys: Sequence[str] = ()
    input_keys: Sequence[str] = ()
    #: ... and of the keys that GELLA then fills itself.
    fresh: Sequence[str] = ("mask_decoder.entity_head.*",)
    fresh_inputs: Sequence[str] = (_PIXEL + "input_projections.*.0.*", _PIXEL + "adapter_1.0.*")

    def __init__(
        self, *, queries: str = "learned", backbone: bool = True, same_channels: bool = False
    ) -> None:
        """Choose the parts.

        Args:
            queries: ``MODEL.MASK_DECODER.QUERIES``; ``entity`` drops the learned queries by name.
            backbone: False drops the backbone by name, for a colormap encoder that is no Swin.
            same_channels: True keeps the pixel decoder's first convolutions, for a head that reads
                Swin's own maps; in a GELLA model ResoBlend stands between.
        """
        dropped, fresh = list(self.dropped), list(self.fresh)
        if queries == "entity":
            dropped += self.query_keys
            fresh.append("mask_decoder.entity_queries.*")
        if not backbone:
            dropped += self.backbone_keys
            fresh.append("colormap_encoder.*")
        if not same_channels:
            dropped += self.input_keys
            fresh += self.fresh_inputs
        self.dropped, self.fresh = tuple(dropped), tuple(fresh)

    @classmethod
    def from_config(cls, cfg: Any) -> _Mask2Former:
        """The layout for the model of a config."""
        return cls(
            queries=cfg.MODEL.MASK_DECODER.QUERIES,
            backbone=cfg.MODEL.COLORMAP_ENCODER.ARCH.startswith("swin_"),
        )


def _pixel_decoder_rules() -> list[tuple[str, str]]:
    pixel, ours = "sem_seg_head.pixel_decoder.", _PIXEL
    rules = [
        (pixel + "transformer.level_embed", ours + "level_embed"),
        (pixel + "input_proj.{rest}", ours + "input_projections.{rest}"),
        (pixel + "mask_features.{rest}", ours + "mask_projection.{rest}"),
    ]
    for part in ("adapter", "layer"):
        rules += [
            (f"{pixel}{part}_{{i}}.norm.{{rest}}", f"{ours}{part}_{{i}}.1.{{rest}}"),
            (f"{pixel}{part}_{{i}}.weight", f"{ours}{part}_{{i}}.0.weight"),
        ]
    layer = "encoder.layers.{i}."
    for there, here in (
        ("self_attn", "self_attn"),
        ("norm1", "self_attn_layer_norm"),
        ("linear1", "fc1"),
        ("linear2", "fc2"),
        ("norm2", "final_layer_norm"),
    ):
        rules.append(
            (f"{pixel}transformer.{layer}{there}.{{rest}}", f"{ours}{layer}{here}.{{rest}}")
        )
    return rules


def _transformer_rules() -> list[tuple[str, str]]:
    decoder, ours = "sem_seg_head.predictor.", _DECODER
    rules = [
        (decoder + "query_feat.{rest}", ours + "queries_features.{rest}"),
        # The name of the same queries in the published files.
        (decoder + "static_query.{rest}", ours + "queries_features.{rest}"),
        (decoder + "query_embed.{rest}", ours + "queries_embedder.{rest}"),
        (decoder + "level_embed.{rest}", ours + "level_embed.{rest}"),
        (decoder + "input_proj.{rest}", ours + "input_projections.{rest}"),
        (decoder + "decoder_norm.{rest}", ours + "decoder.layernorm.{rest}"),
        (
            decoder + "mask_embed.layers.{i}.{rest}",
            ours + "decoder.mask_predictor.mask_embedder.{i}.0.{rest}",
        ),
    ]
    for there, here in (
        ("self_attention_layers.{i}.self_attn", "self_attn"),
        ("self_attention_layers.{i}.norm", "self_attn_layer_norm"),
        ("cross_attention_layers.{i}.multihead_attn", "cross_attn"),
        ("cross_attention_layers.{i}.norm", "cross_attn_layer_norm"),
        ("ffn_layers.{i}.linear1", "fc1"),
        ("ffn_layers.{i}.linear2", "fc2"),
        ("ffn_layers.{i}.norm", "final_layer_norm"),
    ):
        rules.append(
            (
                f"{decoder}transformer_{there}.{{rest}}",
                f"{ours}decoder.layers.{{i}}.{here}.{{rest}}",
            )
        )
    return rules


def _norm_rules(foreign: str, first: int) -> list[tuple[str, str]]:
    # Norms of the four levels; `foreign` has a place for their number, which starts at `first`.
    return [
        (foreign.format(first + k) + ".{rest}", f"colormap_encoder.norms.res{k + 2}.{{rest}}")
        for k in range(4)
    ]


class Mask2FormerUpstream(_Mask2Former):
    """The Mask2Former repository's checkpoints with a Swin backbone (``.pkl`` and ``.pth``).

    Only the self-attention of the decoder is cut: PyTorch's fused ``in_proj`` there, three
    projections in transformers.
    """

    name = "mask2former-upstream"
    signature: Sequence[str] = (
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.predictor.mask_embed.*",
    )
    rules: Sequence[tuple[str, str]] = (
        *swin_rules("backbone."),
        *_norm_rules("backbone.norm{}", 0),
        *_pixel_decoder_rules(),
        *_transformer_rules(),
    )
    dropped: Sequence[str] = (
        "sem_seg_head.predictor.class_embed.*",
        "criterion.empty_weight",
        *SWIN_BUFFERS,
    )
    backbone_keys = ("backbone.*",)
    query_keys = tuple(
        f"sem_seg_head.predictor.{x}.*" for x in ("query_feat", "static_query", "query_embed")
    )
    input_keys = (
        "sem_seg_head.pixel_decoder.input_proj.*.0.*",
        "sem_seg_head.pixel_decoder.adapter_1.weight",
    )

    def split(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut the fused projections of the decoder's self-attention."""
        return unfuse(state, _SELF_ATTENTION + "in_proj_{kind}", _SELF_ATTENTION_PARTS)

    def join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fuse them again."""
        return fuse(state, _SELF_ATTENTION + "in_proj_{kind}", _SELF_ATTENTION_PARTS)

    @classmethod
    def from_config(cls, cfg: Any) -> _Mask2Former:
        """The layout for the model of a config, whichever of the two heads it has."""
        if cls is Mask2FormerUpstream and cfg.MODEL.SEM_SEG_HEAD.NAME == "MaskFormerHead":
            return MaskFormerHeadUpstream.from_config(cfg)
        return super().from_config(cfg)


class MaskFormerHeadUpstream(_Mask2Former):
    """The same files for a model with ``MODEL.SEM_SEG_HEAD.NAME: MaskFormerHead``.

    The head is upstream's own and keeps its names, behind ``mask_decoder.head.``. No signature:
    the files are recognised as ``Mask2FormerUpstream``, whose ``from_config`` comes here.
    """

    name = "mask2former-upstream"
    rules: Sequence[tuple[str, str]] = (
        *swin_rules("backbone."),
        *_norm_rules("backbone.norm{}", 0),
        ("sem_seg_head.pixel_decoder.{rest}", "mask_decoder.head.pixel_decoder.{rest}"),
        (
            "sem_seg_head.predictor.static_query.{rest}",
            "mask_decoder.head.predictor.query_feat.{rest}",
        ),
        ("sem_seg_head.predictor.{rest}", "mask_decoder.head.predictor.{rest}"),
    )
    dropped: Sequence[str] = Mask2FormerUpstream.dropped
    fresh: Sequence[str] = ("mask_decoder.head.predictor.class_embed.*",)
    fresh_inputs = (
        "mask_decoder.head.pixel_decoder.input_proj.*.0.*",
        "mask_decoder.head.pixel_decoder.adapter_1.weight",
    )
    backbone_keys = Mask2FormerUpstream.backbone_keys
    query_keys = Mask2FormerUpstream.query_keys
    input_keys = Mask2FormerUpstream.input_keys


_ENCODER = "model.pixel_level_module.encoder."
_BLOCK = "encoder.layers.{i}.blocks.{j}."
_BLOCK_PARTS = (
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
# transformers 5 renames Swin in memory and renames it back when it saves; both are read.
_IN_MEMORY = tuple(
    (f"{_ENCODER}swin.{{head}}.{now}", f"{_ENCODER}{{head}}.{saved}")
    for now, saved in (
        ("attention.q_proj.{kind}", "attention.self.query.{kind}"),
        ("attention.k_proj.{kind}", "attention.self.key.{kind}"),
        ("attention.v_proj.{kind}", "attention.self.value.{kind}"),
        (
            "attention.relative_position_bias.relative_position_bias_table",
            "attention.self.relative_position_bias_table",
        ),
        ("attention.o_proj.{kind}", "attention.output.dense.{kind}"),
        ("mlp.fc1.{kind}", "intermediate.dense.{kind}"),
        ("mlp.fc2.{kind}", "output.dense.{kind}"),
    )
) + ((_ENCODER + "swin.{rest}", _ENCODER + "{rest}"),)


class Mask2FormerTransformers(_Mask2Former):
    """transformers' ``Mask2FormerForUniversalSegmentation`` with a Swin backbone.

    The names are those of the files; those of transformers 5 in memory are read too. Swin's query,
    key and value are separate there and one ``qkv`` in timm.
    """

    name = "mask2former-transformers"
    signature: Sequence[str] = (
        "model.pixel_level_module.decoder.level_embed",
        "model.transformer_module.level_embed.weight",
    )
    rules: Sequence[tuple[str, str]] = (
        *merging_rules(_ENCODER + "encoder."),
        *(
            (f"{_ENCODER}{_BLOCK}{there}.{{rest}}", f"{_SWIN_BLOCK}{here}.{{rest}}")
            for there, here in _BLOCK_PARTS
        ),
        (f"{_ENCODER}{_BLOCK}attention.self.qkv.{{rest}}", f"{_SWIN_BLOCK}attn.qkv.{{rest}}"),
        (
            f"{_ENCODER}{_BLOCK}attention.self.relative_position_bias_table",
            f"{_SWIN_BLOCK}attn.relative_position_bias_table",
        ),
        (
            _ENCODER + "embeddings.patch_embeddings.projection.{rest}",
            "colormap_encoder.body.patch_embed.proj.{rest}",
        ),
        (_ENCODER + "embeddings.norm.{rest}", "colormap_encoder.body.patch_embed.norm.{rest}"),
        *_norm_rules(_ENCODER + "hidden_states_norms.stage{}", 1),
        ("model.pixel_level_module.decoder.{rest}", _PIXEL + "{rest}"),
        ("model.transformer_module.{rest}", _DECODER + "{rest}"),
    )
    # The backbone's own last norm is not used by Mask2Former.
    dropped: Sequence[str] = (
        "class_predictor.*",
        "criterion.empty_weight",
        _ENCODER + "swin.layernorm.*",
        _ENCODER + "layernorm.*",
        *SWIN_BUFFERS,
    )
    backbone_keys = (_ENCODER + "*",)
    query_keys = ("model.transformer_module.queries_*",)
    input_keys = (
        "model.pixel_level_module.decoder.input_projections.*.0.*",
        "model.pixel_level_module.decoder.adapter_1.0.*",
    )

    def split(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring in-memory names to those of files, and fuse Swin's projections."""
        state = self._rename(state, (*_IN_MEMORY, ("{key}", "{key}")))
        return fuse(state, _ENCODER + "{head}.self.qkv.{kind}", _SWIN_PARTS)

    def join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut Swin's projections again; the names stay those of files."""
        return unfuse(state, _ENCODER + "{head}.self.qkv.{kind}", _SWIN_PARTS)

    @classmethod
    def from_config(cls, cfg: Any) -> _Mask2Former:
        """The layout for the model of a config.

        Raises:
            ValueError: the model's head is upstream's own.
        """
        if cfg.MODEL.SEM_SEG_HEAD.NAME == "MaskFormerHead":
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.NAME: MaskFormerHead takes Mask2Former's own files "
                f"({Mask2FormerUpstream.name}), not {cls.name}; set it to Mask2FormerHead"
            )
        return super().from_config(cfg)

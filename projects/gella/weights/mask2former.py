"""Weights of Mask2Former, in its repository's files and transformers' layout, and of classifiers.

Mask2Former's become ``colormap_encoder.*`` (Swin with its four norms) and ``mask_decoder.*``. Not
taken, by name: the class head (GELLA's tells entities from no object), the criterion's constants,
Swin's computed buffers, and the first 1x1 convolutions of the pixel decoder, which read the
backbone's own channels where GELLA's read ResoBlend's.

Classifiers fill the colormap encoder alone: Swin (two cuts) and the MobileNet family. It is a timm
model with ``features_only``, which names stages ``layers_0`` where the plain model says
``layers.0`` and has neither the final norm nor the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gella.weights.layout import Layout, table

_BODY = "colormap_encoder.body."
_PIXEL, _DECODER = "mask_decoder.pixel_decoder.", "mask_decoder.transformer."
#: Constants that Swin's own code stores with the weights; timm computes them.
SWIN_BUFFERS = ("*.relative_position_index", "*.attn_mask")
# The repository merges patches at the end of a stage, timm at the start of the next. The merged
# channels have the same order, so nothing is permuted.
_MERGING = """
layers.0.downsample.{rest}  layers_1.downsample.{rest}
layers.1.downsample.{rest}  layers_2.downsample.{rest}
layers.2.downsample.{rest}  layers_3.downsample.{rest}
"""
_SWIN = """
layers.{i}.{rest}   layers_{i}.{rest}
patch_embed.{rest}  patch_embed.{rest}
"""


# -- classifiers -----------------------------------------------------------------------------------


class SwinTimm(Layout):
    """timm's Swin classifiers, version 0.9 and later.

    The norms of the four levels are Mask2Former's addition; a classifier has none.
    """

    name = "swin-timm"
    prefix = "colormap_encoder."
    signature: Sequence[str] = ("patch_embed.proj.weight", "layers.3.downsample.reduction.weight")
    rules: Sequence[tuple[str, str]] = table(_SWIN, "", _BODY)
    dropped = (*SWIN_BUFFERS, "norm.*", "head.*")
    fresh = ("colormap_encoder.norms.*",)


class SwinOriginal(SwinTimm):
    """The Swin repository's classifiers (``{"model": ...}``), and timm's before its version 0.9."""

    name = "swin-original"
    signature = ("patch_embed.proj.weight", "layers.0.downsample.reduction.weight")
    rules = table(_MERGING + _SWIN, "", _BODY)  # in this order: the general rule would fit too


class MobileNetTimm(Layout):
    """timm's MobileNetV2 classifiers, and its other models of the same build, such as LCNet."""

    name = "mobilenet-timm"
    prefix = "colormap_encoder."
    signature = ("conv_stem.weight", "bn1.weight", "blocks.0.0.conv_dw.weight")
    rules = [(f"{x}.{{rest}}", f"{_BODY}{x}.{{rest}}") for x in ("conv_stem", "bn1", "blocks")]
    dropped = ("conv_head.*", "bn2.*", "classifier.*")  # what lies behind the last feature map


# -- Mask2Former -----------------------------------------------------------------------------------


class _Mask2Former(Layout):
    """What the layouts share: a given GELLA model can take some parts and not others."""

    prefix: str | tuple[str, ...] = ("colormap_encoder.", "mask_decoder.")
    #: Shell patterns of foreign keys that only some models can take ...
    backbone_keys: Sequence[str] = ("backbone.*",)
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


def _norm_rules(foreign: str, first: int) -> list[tuple[str, str]]:
    # Norms of the four levels; `foreign` has a place for their number, which starts at `first`.
    return [
        (foreign.format(first + k) + ".{rest}", f"colormap_encoder.norms.res{k + 2}.{{rest}}")
        for k in range(4)
    ]


_UPSTREAM_BACKBONE = [
    *table(_MERGING + _SWIN, "backbone.", _BODY),
    *_norm_rules("backbone.norm{}", 0),
]
_UPSTREAM_PIXEL = """
transformer.level_embed                             level_embed
input_proj.{rest}                                   input_projections.{rest}
mask_features.{rest}                                mask_projection.{rest}
adapter_{i}.norm.{rest}                             adapter_{i}.1.{rest}
adapter_{i}.weight                                  adapter_{i}.0.weight
layer_{i}.norm.{rest}                               layer_{i}.1.{rest}
layer_{i}.weight                                    layer_{i}.0.weight
transformer.encoder.layers.{i}.self_attn.{rest}     encoder.layers.{i}.self_attn.{rest}
transformer.encoder.layers.{i}.norm1.{rest}         encoder.layers.{i}.self_attn_layer_norm.{rest}
transformer.encoder.layers.{i}.linear1.{rest}       encoder.layers.{i}.fc1.{rest}
transformer.encoder.layers.{i}.linear2.{rest}       encoder.layers.{i}.fc2.{rest}
transformer.encoder.layers.{i}.norm2.{rest}         encoder.layers.{i}.final_layer_norm.{rest}
"""
# static_query is the name of the queries in the published files.
_UPSTREAM_DECODER = """
query_feat.{rest}            queries_features.{rest}
static_query.{rest}          queries_features.{rest}
query_embed.{rest}           queries_embedder.{rest}
level_embed.{rest}           level_embed.{rest}
input_proj.{rest}            input_projections.{rest}
decoder_norm.{rest}          decoder.layernorm.{rest}
mask_embed.layers.{i}.{rest} decoder.mask_predictor.mask_embedder.{i}.0.{rest}
"""
_UPSTREAM_LAYERS = """
self_attention_layers.{i}.self_attn.{rest}        {i}.self_attn.{rest}
self_attention_layers.{i}.norm.{rest}             {i}.self_attn_layer_norm.{rest}
cross_attention_layers.{i}.multihead_attn.{rest}  {i}.cross_attn.{rest}
cross_attention_layers.{i}.norm.{rest}            {i}.cross_attn_layer_norm.{rest}
ffn_layers.{i}.linear1.{rest}                     {i}.fc1.{rest}
ffn_layers.{i}.linear2.{rest}                     {i}.fc2.{rest}
ffn_layers.{i}.norm.{rest}                        {i}.final_layer_norm.{rest}
"""
_HEAD, _PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
_SELF_ATTENTION = _PREDICTOR + "transformer_self_attention_layers.{i}.self_attn."


class Mask2FormerUpstream(_Mask2Former):
    """The Mask2Former repository's checkpoints with a Swin backbone (``.pkl`` and ``.pth``).

    Only the self-attention of the decoder is cut: PyTorch's fused ``in_proj`` there, three
    projections in transformers.
    """

    name = "mask2former-upstream"
    signature: Sequence[str] = (_HEAD + "transformer.level_embed", _PREDICTOR + "mask_embed.*")
    rules: Sequence[tuple[str, str]] = (
        *_UPSTREAM_BACKBONE,
        *table(_UPSTREAM_PIXEL, _HEAD, _PIXEL),
        *table(_UPSTREAM_DECODER, _PREDICTOR, _DECODER),
        *table(_UPSTREAM_LAYERS, _PREDICTOR + "transformer_", _DECODER + "decoder.layers."),
    )
    fused_there: tuple[str, Sequence[str]] | None = (
        _SELF_ATTENTION + "in_proj_{kind}",
        [_SELF_ATTENTION + part + "_proj.{kind}" for part in "qkv"],
    )
    dropped: Sequence[str] = (_PREDICTOR + "class_embed.*", "criterion.empty_weight", *SWIN_BUFFERS)
    query_keys = tuple(_PREDICTOR + x for x in ("query_feat.*", "static_query.*", "query_embed.*"))
    input_keys = (_HEAD + "input_proj.*.0.*", _HEAD + "adapter_1.weight")

    @classmethod
    def from_config(cls, cfg: Any) -> _Mask2Former:
        """The layout for the model of a config, whichever of the two heads it has."""
        if cls is Mask2FormerUpstream and cfg.MODEL.SEM_SEG_HEAD.NAME == "MaskFormerHead":
            return MaskFormerHeadUpstream.from_config(cfg)
        return super().from_config(cfg)


class MaskFormerHeadUpstream(Mask2FormerUpstream):
    """The same files for a model with ``MODEL.SEM_SEG_HEAD.NAME: MaskFormerHead``.

    The head is upstream's own and keeps its names, behind ``mask_decoder.head.``. No signature:
    the files are recognised as ``Mask2FormerUpstream``, whose ``from_config`` comes here.
    """

    signature = ()
    rules = (
        *_UPSTREAM_BACKBONE,
        (_HEAD + "{rest}", "mask_decoder.head.pixel_decoder.{rest}"),
        (_PREDICTOR + "static_query.{rest}", "mask_decoder.head.predictor.query_feat.{rest}"),
        (_PREDICTOR + "{rest}", "mask_decoder.head.predictor.{rest}"),
    )
    fused_there = None
    fresh = ("mask_decoder.head.predictor.class_embed.*",)
    fresh_inputs = (
        "mask_decoder.head.pixel_decoder.input_proj.*.0.*",
        "mask_decoder.head.pixel_decoder.adapter_1.weight",
    )


_ENCODER = "model.pixel_level_module.encoder."
_HF_BLOCK = """
layernorm_before.{rest}                         norm1.{rest}
layernorm_after.{rest}                          norm2.{rest}
attention.output.dense.{rest}                   attn.proj.{rest}
intermediate.dense.{rest}                       mlp.fc1.{rest}
output.dense.{rest}                             mlp.fc2.{rest}
attention.self.qkv.{rest}                       attn.qkv.{rest}
attention.self.relative_position_bias_table     attn.relative_position_bias_table
"""
# transformers 5 renames Swin in memory and renames it back when it saves; both are read.
_HF_IN_MEMORY = """
swin.{head}.attention.q_proj.{kind}  {head}.attention.self.query.{kind}
swin.{head}.attention.k_proj.{kind}  {head}.attention.self.key.{kind}
swin.{head}.attention.v_proj.{kind}  {head}.attention.self.value.{kind}
swin.{head}.attention.relative_position_bias.{table} {head}.attention.self.{table}
swin.{head}.attention.o_proj.{kind}  {head}.attention.output.dense.{kind}
swin.{head}.mlp.fc1.{kind}           {head}.intermediate.dense.{kind}
swin.{head}.mlp.fc2.{kind}           {head}.output.dense.{kind}
swin.{rest}                          {rest}
"""


class Mask2FormerTransformers(_Mask2Former):
    """transformers' ``Mask2FormerForUniversalSegmentation`` with a Swin backbone.

    The names are those of the files; those of transformers 5 in memory are read too. Swin's query,
    key and value are separate there and one ``qkv`` in timm.
    """

    name = "mask2former-transformers"
    signature = (
        "model.pixel_level_module.decoder.level_embed",
        "model.transformer_module.level_embed.weight",
    )
    rules = (
        *table(_MERGING, _ENCODER + "encoder.", _BODY),
        *table(
            _HF_BLOCK,
            _ENCODER + "encoder.layers.{i}.blocks.{j}.",
            _BODY + "layers_{i}.blocks.{j}.",
        ),
        (
            _ENCODER + "embeddings.patch_embeddings.projection.{rest}",
            _BODY + "patch_embed.proj.{rest}",
        ),
        (_ENCODER + "embeddings.norm.{rest}", _BODY + "patch_embed.norm.{rest}"),
        *_norm_rules(_ENCODER + "hidden_states_norms.stage{}", 1),
        ("model.pixel_level_module.decoder.{rest}", _PIXEL + "{rest}"),
        ("model.transformer_module.{rest}", _DECODER + "{rest}"),
    )
    spellings = table(_HF_IN_MEMORY, _ENCODER, _ENCODER)
    fused_here = (
        _ENCODER + "{head}.self.qkv.{kind}",
        [f"{_ENCODER}{{head}}.self.{part}.{{kind}}" for part in ("query", "key", "value")],
    )
    # The backbone's own last norm is not used by Mask2Former.
    dropped = (
        *("class_predictor.*", "criterion.empty_weight"),
        *(_ENCODER + "swin.layernorm.*", _ENCODER + "layernorm.*", *SWIN_BUFFERS),
    )
    backbone_keys = (_ENCODER + "*",)
    query_keys = ("model.transformer_module.queries_*",)
    input_keys = (
        "model.pixel_level_module.decoder.input_projections.*.0.*",
        "model.pixel_level_module.decoder.adapter_1.0.*",
    )

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

"""The mask decoder: Mask2Former's pixel and transformer decoder, class-agnostic (section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from gella.modeling.entity_queries import EntityQueries

QUERIES = ("learned", "entity")
_STRIDES = [4, 8, 16, 32]
# Added to the self-attention logits of padding queries: exp() of it is exactly 0 in every dtype,
# and unlike -inf it leaves a row whose queries are all padding finite.
_PADDING_BIAS = -1e4


@dataclass
class MaskDecoderOutput:
    """What the decoder says about Q queries of B images.

    Attributes:
        query_embeddings: ``E_vc``, (B, Q, HIDDEN_DIM), behind the decoder's final LayerNorm, and
            with an entity query's evidence added.
        entity_logits: per layer (B, Q, 2): class 0 entity, class 1 no object; the last is final.
        mask_logits: per layer (B, Q, H/4, W/4); the last is final.
        query_valid: bool (B, Q); False marks padding queries, whose rows mean nothing.
    """

    query_embeddings: Tensor
    entity_logits: list[Tensor]
    mask_logits: list[Tensor]
    query_valid: Tensor


@SEM_SEG_HEADS_REGISTRY.register()
class Mask2FormerHead(nn.Module):
    """Decode fused features into entity embeddings, entity scores and masks (eq. 6).

    The two decoders are transformers' Mask2Former modules, unmodified; the class head with its two
    classes is ours. ``queries`` chooses where the queries come from:

    ``learned``: Mask2Former's own, a fixed number, matched to entities by the criterion.
    ``entity``: one per input entity. Content: the fused stride-4 features averaged under the
    entity's mask, through a linear layer, the same of the image's own grid where there is one, the
    mask's own outline in a crop around it (see ``shape_size``), and a learned embedding, summed.
    Position: centroid, spread and area of the mask.
    Query i belongs to entity i by construction. Images with fewer entities are padded with queries
    that no valid query can see, so a batch gives what each image gives alone.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        queries: str = "learned",
        num_queries: int = 100,
        shape_size: int = 16,
        image_channels: int = 0,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        encoder_ffn_dim: int = 1024,
        decoder_layers: int = 9,
        decoder_ffn_dim: int = 2048,
    ) -> None:
        """Build and initialise; the arguments are the keys of ``MODEL.MASK_DECODER``.

        Args:
            input_shape: four levels with the strides 4, 8, 16, 32, in this order.
            shape_size: cells per side of the mask crop in entity queries; 0 leaves it out.
            image_channels: of ``features["image"]``, which entity queries see; 0: they do not.

        Raises:
            ValueError: unknown ``queries``, other strides, or sizes that do not divide.
        """
        super().__init__()
        _check_sizes(input_shape, queries, hidden_dim, num_heads)
        self.queries, self.num_heads, self.shape_size = queries, num_heads, shape_size
        self.num_outputs = decoder_layers + 1  # the queries before the first layer predict too
        self.in_features = list(input_shape)
        self._self_attention_bias: Tensor | None = None
        self.pixel_decoder, self.transformer = _build_decoders(
            [shape.channels for shape in input_shape.values()],
            feature_size=hidden_dim,
            hidden_dim=hidden_dim,
            mask_feature_size=mask_dim,
            num_attention_heads=num_heads,
            encoder_layers=encoder_layers,
            encoder_feedforward_dim=encoder_ffn_dim,
            decoder_layers=decoder_layers + 1,  # transformers builds one less
            dim_feedforward=decoder_ffn_dim,
            num_queries=num_queries if queries == "learned" else 1,
        )
        self.entity_head = nn.Linear(hidden_dim, 2)
        for layer in self.transformer.decoder.layers:
            layer.cross_attn.register_forward_pre_hook(_without_weights, with_kwargs=True)
            layer.self_attn.register_forward_pre_hook(self._hide_padding, with_kwargs=True)
        if queries == "entity":
            # Parameters without a gradient are refused by DistributedDataParallel.
            del self.transformer.queries_features, self.transformer.queries_embedder
            channels = input_shape[self.in_features[0]].channels
            self.entity_queries = EntityQueries(channels, hidden_dim, shape_size, image_channels)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read ``MODEL.MASK_DECODER`` and ``MODEL.SEM_SEG_HEAD.IN_FEATURES``."""
        node = cfg.MODEL.MASK_DECODER
        shapes = {name: input_shape[name] for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES}
        names = "queries num_queries hidden_dim mask_dim num_heads encoder_layers encoder_ffn_dim"
        names += " decoder_layers decoder_ffn_dim"
        sizes = {name: node[name.upper()] for name in names.split()}
        sizes["shape_size"] = node.ENTITY_SHAPE_SIZE
        if node.ENTITY_IMAGE and "image" in input_shape:
            sizes["image_channels"] = input_shape["image"].channels
        return dict(input_shape=shapes, **sizes)

    def forward(
        self,
        features: dict[str, Tensor],
        entity_masks: Tensor | None = None,
        entity_valid: Tensor | None = None,
    ) -> MaskDecoderOutput:
        """Decode.

        Args:
            features: ``{name: (B, C, H/s, W/s)}``, ``Z_vc`` of ResoBlend.
            entity_masks: (B, E, h, w) bool or float in 0..1 in the colormap's frame, at any size
                that covers it; needed by ``entity`` queries, ignored by ``learned`` ones.
            entity_valid: bool (B, E), False for padding entities; all valid without it.

        Raises:
            ValueError: ``entity`` queries without masks, or masks of another batch size.
        """
        maps = [features[name] for name in self.in_features]
        with torch.autocast(maps[0].device.type, enabled=False):
            # As upstream's: in bfloat16 sampled places would be rounded to whole pixels.
            pixels = self.pixel_decoder(
                [x.float() for x in maps], output_attentions=False, output_hidden_states=False
            )
        if self.queries == "learned":
            content = self.transformer.queries_features.weight.expand(len(maps[0]), -1, -1)
            evidence = torch.zeros_like(content)
            position = self.transformer.queries_embedder.weight.expand(len(maps[0]), -1, -1)
            valid = torch.ones(content.shape[:2], dtype=torch.bool, device=content.device)
        else:
            masks, valid = _check_masks(entity_masks, entity_valid, len(maps[0]))
            queries = self.entity_queries(maps[0], masks, features.get("image"))
            content, position, evidence = queries
            bias = torch.where(valid, 0.0, _PADDING_BIAS)[:, None, None]  # B 1 1 Q
            bias = bias.expand(-1, self.num_heads, valid.shape[1], -1)
            self._self_attention_bias = bias.flatten(0, 1)  # B*h Q Q
        try:
            levels = pixels.multi_scale_features
            decoded = self._decode(levels, pixels.mask_features, content, position)
        finally:
            self._self_attention_bias = None
        # last_hidden_state would lack the final LayerNorm; the intermediate states have it.
        states = [state.transpose(0, 1) for state in decoded.intermediate_hidden_states]  # B Q D
        return MaskDecoderOutput(
            query_embeddings=states[-1] + evidence,
            entity_logits=[self.entity_head(state) for state in states],
            mask_logits=list(decoded.masks_queries_logits),
            query_valid=valid,
        )

    def _decode(
        self, levels: tuple[Tensor, ...], mask_features: Tensor, content: Tensor, position: Tensor
    ) -> Any:
        """Run the transformer decoder on queries of our choice, (B, Q, D) each.

        With the module's own learned queries this is what its ``forward`` does; that method takes
        no other queries, so its inputs to the decoder are prepared here.
        """
        module = self.transformer
        keys, key_positions = [], []
        for i, level in enumerate(levels):
            where = module.position_embedder(level.shape, level.device, level.dtype, None)
            key_positions.append(where.flatten(2).permute(2, 0, 1))  # hw B D
            key = module.input_projections[i](level).flatten(2)
            keys.append((key + module.level_embed.weight[i][None, :, None]).permute(2, 0, 1))
        return module.decoder(
            inputs_embeds=content.transpose(0, 1),  # Q B D
            query_position_embeddings=position.transpose(0, 1),
            multi_stage_positional_embeddings=key_positions,
            encoder_hidden_states=keys,
            pixel_embeddings=mask_features,
            feature_size_list=[level.shape[-2:] for level in levels],
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
        )

    def _hide_padding(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # The decoder passes no self-attention mask and offers no argument for one. A bound method,
        # not a closure: a deep copy of the model then asks its own head.
        if self._self_attention_bias is not None:
            kwargs["attention_mask"] = self._self_attention_bias
        return args, kwargs


def _without_weights(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    # The decoder drops the weights anyway; not asking for them allows fused attention.
    return args, {**kwargs, "need_weights": False}


def _check_sizes(
    input_shape: dict[str, ShapeSpec], queries: str, hidden_dim: int, num_heads: int
) -> None:
    if queries not in QUERIES:
        raise ValueError(f"MODEL.MASK_DECODER.QUERIES is {queries!r}; it must be one of {QUERIES}")
    strides = [shape.stride for shape in input_shape.values()]
    if strides != _STRIDES:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES {list(input_shape)} has strides {strides}; "
            f"Mask2FormerHead takes exactly {_STRIDES}, in this order"
        )
    if hidden_dim % 32 or hidden_dim % num_heads:
        raise ValueError(
            f"MODEL.MASK_DECODER.HIDDEN_DIM {hidden_dim} must be a multiple of 32 (group norm) and "
            f"of NUM_HEADS {num_heads}"
        )


def _check_masks(masks: Tensor | None, valid: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    if masks is None:
        raise ValueError("entity queries need entity_masks (B, E, h, w); got None")
    if masks.dim() != 4 or len(masks) != batch:
        raise ValueError(
            f"entity_masks has shape {tuple(masks.shape)}; expected (B, E, h, w) with B {batch}"
        )
    if valid is None:
        valid = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
    if valid.shape != masks.shape[:2]:
        raise ValueError(
            f"entity_valid has shape {tuple(valid.shape)}, entity_masks {tuple(masks.shape)}"
        )
    if masks.shape[1] == 0:
        # No entity in the whole batch: one padding query keeps every part in the graph.
        masks = masks.new_zeros(batch, 1, *masks.shape[2:])
        valid = valid.new_zeros(batch, 1)
    return masks, valid


def _build_decoders(channels: list[int], **sizes: Any) -> tuple[nn.Module, nn.Module]:
    from transformers import Mask2FormerConfig, __version__
    from transformers.models.mask2former import modeling_mask2former as mask2former

    config = Mask2FormerConfig(num_labels=1, feature_strides=_STRIDES, common_stride=4, **sizes)
    pixel_decoder = mask2former.Mask2FormerPixelDecoder(config, feature_channels=channels)
    transformer = mask2former.Mask2FormerTransformerModule(sizes["feature_size"], config)
    # Built alone the modules are not initialised (level_embed is raw memory). apply() goes children
    # first, as the rules expect, and reaches these two modules only.
    rules = mask2former.Mask2FormerPreTrainedModel(config)
    pixel_decoder.apply(rules._init_weights)
    transformer.apply(rules._init_weights)
    # Older rules give these a normal of 0.02 too; the original, as newer rules, PyTorch's own.
    if tuple(map(int, __version__.split(".")[:2])) < (5, 23):
        parts = transformer.queries_features, transformer.queries_embedder, transformer.level_embed
        for part in (*parts, *transformer.decoder.mask_predictor.mask_embedder.modules()):
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    # Made by a constructor that ignores the default device, so a build on "meta" leaves it behind.
    pixel_decoder.level_embed = nn.Parameter(torch.randn(3, sizes["feature_size"]))
    # The rules leave these at a normal of 0.02, where the original has Xavier's and, for the mask
    # features, Kaiming's uniform: at 64 channels the difference is fourfold.
    for linear in (x for layer in pixel_decoder.encoder.layers for x in (layer.fc1, layer.fc2)):
        nn.init.xavier_uniform_(linear.weight)
    nn.init.kaiming_uniform_(pixel_decoder.mask_projection.weight, a=1)
    return pixel_decoder, transformer

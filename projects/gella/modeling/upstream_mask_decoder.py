"""Upstream's own ``MaskFormerHead`` as the mask decoder, where Mask2Former's repository is at hand.

It is a repository to clone and put on PYTHONPATH, with a compiled operator. The default,
``Mask2FormerHead``, computes the same function without it.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_sem_seg_head
from torch import Tensor, nn

from gella.modeling.mask_decoder import MaskDecoderOutput

#: ``MODEL.SEM_SEG_HEAD.NAME`` of upstream's head; the registry's entry is made by upstream itself.
UPSTREAM_NAME = "MaskFormerHead"
_ENCODER_FFN_DIM = 1024  # fixed in upstream's pixel decoder


def build_mask_decoder(cfg: Any, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the mask decoder that ``MODEL.SEM_SEG_HEAD.NAME`` names.

    ``MaskFormerHead`` is imported and wrapped; every other name is looked up as Detectron2 does.

    It maps features with these shapes to :class:`MaskDecoderOutput`, and has ``queries`` and
    ``num_outputs``.
    """
    if cfg.MODEL.SEM_SEG_HEAD.NAME == UPSTREAM_NAME:
        return UpstreamMaskDecoder(cfg, input_shape)
    return build_sem_seg_head(cfg, input_shape)


class UpstreamMaskDecoder(nn.Module):
    """Upstream's head behind the interface of ``Mask2FormerHead``, with learned queries.

    Its class head has two classes, 0 entity and 1 no object, as ours.
    """

    queries = "learned"

    @configurable
    def __init__(self, *, head: nn.Module) -> None:
        """Wrap a ``MaskFormerHead`` with the multi-scale masked decoder."""
        super().__init__()
        self.head = head
        self.num_outputs: int = head.predictor.num_layers + 1

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Import upstream and build its head; errors are those of :func:`maskformer_config`."""
        upstream_cfg = maskformer_config(cfg)
        shapes = {name: input_shape[name] for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES}
        return dict(head=SEM_SEG_HEADS_REGISTRY.get(UPSTREAM_NAME)(upstream_cfg, shapes))

    def forward(
        self,
        features: dict[str, Tensor],
        entity_masks: Tensor | None = None,
        entity_valid: Tensor | None = None,
    ) -> MaskDecoderOutput:
        """Decode ``{name: (B, C, H/s, W/s)}``; the entities' masks are not used."""
        states: list[Tensor] = []
        # The embeddings are no output of upstream's. They are what the decoder's final LayerNorm
        # returns last, in front of the last class and mask heads.
        hook = self.head.predictor.decoder_norm.register_forward_hook(
            lambda module, args, state: states.append(state)
        )
        try:
            predictions = self.head(features)
        finally:
            hook.remove()
        layers = [*predictions["aux_outputs"], predictions]  # the last is final
        embeddings = states[-1].transpose(0, 1)  # Q B D -> B Q D
        return MaskDecoderOutput(
            query_embeddings=embeddings,
            entity_logits=[layer["pred_logits"] for layer in layers],
            mask_logits=[layer["pred_masks"] for layer in layers],
            query_valid=embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool),
        )


def maskformer_config(cfg: Any) -> CfgNode:
    """A copy of the config with upstream's keys, filled from ``MODEL.MASK_DECODER``.

    Raises:
        ImportError: Mask2Former, or what it needs, is not importable.
        ValueError: entity queries, or a size that upstream cannot have.
    """
    ours = cfg.MODEL.MASK_DECODER
    if ours.QUERIES != "learned":
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NAME: {UPSTREAM_NAME} has learned queries only, and "
            f"MODEL.MASK_DECODER.QUERIES is {ours.QUERIES!r}; set it to 'learned', or NAME to "
            "Mask2FormerHead"
        )
    if ours.ENCODER_FFN_DIM != _ENCODER_FFN_DIM:
        raise ValueError(
            f"MODEL.MASK_DECODER.ENCODER_FFN_DIM is {ours.ENCODER_FFN_DIM}; {UPSTREAM_NAME} has "
            f"always {_ENCODER_FFN_DIM}: set that, or MODEL.SEM_SEG_HEAD.NAME to Mask2FormerHead"
        )
    upstream = cfg.clone()
    upstream.defrost()
    _import_upstream().add_maskformer2_config(upstream)
    head, former = upstream.MODEL.SEM_SEG_HEAD, upstream.MODEL.MASK_FORMER
    fixed = {"NUM_CLASSES": 1, "IGNORE_VALUE": 255, "LOSS_WEIGHT": 1.0, "NORM": "GN"}
    head.update(fixed, COMMON_STRIDE=4)
    head.CONVS_DIM = ours.HIDDEN_DIM
    head.MASK_DIM = ours.MASK_DIM
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = list(head.IN_FEATURES[1:])
    head.TRANSFORMER_ENC_LAYERS = ours.ENCODER_LAYERS
    former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    former.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    former.HIDDEN_DIM = ours.HIDDEN_DIM
    former.NUM_OBJECT_QUERIES = ours.NUM_QUERIES
    former.NHEADS = ours.NUM_HEADS
    former.DIM_FEEDFORWARD = ours.DECODER_FFN_DIM
    former.DEC_LAYERS = ours.DECODER_LAYERS + 1  # upstream builds one less
    former.update(DROPOUT=0.0, PRE_NORM=False, ENFORCE_INPUT_PROJ=False)
    return upstream


def _import_upstream() -> Any:
    try:
        import mask2former
    except Exception as error:  # half of a registration may be done: whatever it is, say what to do
        raise ImportError(
            f"MODEL.SEM_SEG_HEAD.NAME: {UPSTREAM_NAME} needs the repository "
            "facebookresearch/Mask2Former on PYTHONPATH, with its compiled operator, beside "
            "Detectron2 itself (not the small core that is installed without it); importing "
            f"mask2former failed: {error!r}. Mask2FormerHead computes the same from the same "
            "weights. After a repair start a new process: the import cannot be repeated"
        ) from error
    return mask2former

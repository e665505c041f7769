"""Upstream's MaskFormerHead behind our interface, and our head against it."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from mask2former_upstream import upstream
from torch import nn

from gella.config import add_gella_config
from gella.modeling.criterion import GellaCriterion
from gella.modeling.mask_decoder import Mask2FormerHead
from gella.modeling.upstream_mask_decoder import (
    UpstreamMaskDecoder,
    build_mask_decoder,
    maskformer_config,
)
from gella.weights.mask2former import Mask2FormerUpstream

SHAPES = {f"res{k + 2}": ShapeSpec(channels=16 * (k + 1), stride=4 * 2**k) for k in range(4)}


def make_cfg(name="MaskFormerHead", **sizes):
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = name
    node = cfg.MODEL.MASK_DECODER
    node.HIDDEN_DIM = node.MASK_DIM = 64
    node.NUM_HEADS, node.NUM_QUERIES, node.ENCODER_LAYERS = 4, 11, 2
    node.DECODER_LAYERS, node.DECODER_FFN_DIM = 4, 96
    for key, value in sizes.items():
        setattr(node, key, value)
    return cfg


def features(height, width, batch=2):
    torch.manual_seed(1)
    return {
        name: torch.randn(batch, s.channels, height // s.stride, width // s.stride)
        for name, s in SHAPES.items()
    }


@pytest.fixture(scope="module")
def heads():
    """Upstream's head with perturbed weights, and ours with the same, through the converter."""
    upstream()
    torch.manual_seed(0)
    theirs = build_mask_decoder(make_cfg(), SHAPES).eval()
    with torch.no_grad():  # fresh norms are the identity and would hide a missing one
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = build_mask_decoder(make_cfg("Mask2FormerHead"), SHAPES).eval()
    assert isinstance(ours, Mask2FormerHead)
    state = {f"sem_seg_{name}": tensor for name, tensor in theirs.state_dict().items()}
    converted = Mask2FormerUpstream(same_channels=True).to_gella(state)
    weights = {key.removeprefix("mask_decoder."): value for key, value in converted.items()}
    for kind in ("weight", "bias"):
        weights[f"entity_head.{kind}"] = state[f"sem_seg_head.predictor.class_embed.{kind}"]
    ours.load_state_dict(weights)
    return theirs, ours


def unfused(head):
    """A copy whose cross-attention makes its weights, as upstream's does; ours is fused."""
    head = copy.deepcopy(head)
    for layer in head.transformer.decoder.layers:
        layer.cross_attn._forward_pre_hooks.clear()
        layer.cross_attn._forward_pre_hooks_with_kwargs.clear()
    return head


def difference(one, two):
    pairs = [(one.query_embeddings, two.query_embeddings)]
    for name in ("mask_logits", "entity_logits"):
        pairs += zip(getattr(one, name), getattr(two, name), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (224, 224)])
def test_ours_is_upstreams_bit_for_bit(heads, height, width):
    theirs, ours = heads
    maps = features(height, width)
    with torch.no_grad():
        wanted, fused, exact = theirs(maps), ours(maps), unfused(ours)(maps)
    print(
        f"{height} x {width}, all layers and embeddings: {difference(exact, wanted)}, "
        f"with fused attention {difference(fused, wanted)}"
    )
    assert len(wanted.mask_logits) == 5 == theirs.num_outputs
    assert difference(exact, wanted) == 0.0
    assert difference(fused, wanted) < 1e-4
    assert torch.equal(wanted.query_valid, fused.query_valid)
    assert wanted.query_valid.dtype == torch.bool and wanted.query_embeddings.shape == (2, 11, 64)


def test_upstreams_head_trains_on_our_losses(heads):
    theirs, _ = heads
    head, criterion = copy.deepcopy(theirs).train(), GellaCriterion(make_cfg())
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, :32], masks[1, 32:, :32], masks[2, 32:, 32:] = True, True, True
    out = head(features(64, 64), entity_masks=masks[None].expand(2, -1, -1, -1))
    losses = criterion(
        out,
        target_masks=[masks, masks[:1]],
        association_logits=[out.query_embeddings[i, :, 0][None] for i in range(2)],
        association_targets=[torch.eye(3)[:1], torch.ones(1, 1)],
        association_valid=[torch.ones(1, dtype=torch.bool)] * 2,
    )
    assert set(losses) == set(criterion.loss_names(head.num_outputs))
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


# -- without upstream ------------------------------------------------------------------------------


class Predictor(nn.Module):
    num_layers, num_queries = 2, 5

    def __init__(self):
        super().__init__()
        self.decoder_norm = nn.LayerNorm(4)


class FakeHead(nn.Module):
    """What the adapter relies on: a norm before every prediction, and the results' names."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.cfg, self.shapes, self.predictor = cfg, input_shape, Predictor()
        self.states = torch.randn(3, 5, 2, 4)  # layer Q B D

    def forward(self, maps):
        layers = []
        for state in self.states:
            x = self.predictor.decoder_norm(state).transpose(0, 1)
            layers.append({"pred_logits": x[..., :2], "pred_masks": x[..., None]})
        return {**layers[-1], "aux_outputs": layers[:-1]}


def add_maskformer2_config(cfg):
    cfg.MODEL.MASK_FORMER, cfg.MODEL.SWIN = CfgNode(), CfgNode()
    cfg.SOLVER.OPTIMIZER = "theirs"


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("mask2former")
    module.add_maskformer2_config = add_maskformer2_config
    monkeypatch.setitem(sys.modules, "mask2former", module)
    monkeypatch.setitem(SEM_SEG_HEADS_REGISTRY._obj_map, "MaskFormerHead", FakeHead)


def test_the_adapter_keeps_the_last_layer_apart(fake):
    head = build_mask_decoder(make_cfg(), {**SHAPES, "extra": ShapeSpec(channels=1, stride=2)})
    assert isinstance(head, UpstreamMaskDecoder) and head.queries == "learned"
    assert list(head.head.shapes) == ["res2", "res3", "res4", "res5"] and head.num_outputs == 3
    twin = copy.deepcopy(head)
    for module in (head, twin):
        out = module({})
        wanted = module.head.predictor.decoder_norm(module.head.states[-1]).transpose(0, 1)
        assert torch.equal(out.query_embeddings, wanted)
        assert torch.equal(out.entity_logits[-1], wanted[..., :2]) and len(out.entity_logits) == 3
        assert torch.equal(out.mask_logits[-1], wanted[..., None]) and len(out.mask_logits) == 3
        assert out.query_valid.shape == (2, 5) and out.query_valid.all()
        assert not module.head.predictor.decoder_norm._forward_hooks


def test_our_sizes_reach_upstreams_config(fake):
    cfg = make_cfg(MASK_DIM=32, HIDDEN_DIM=128)
    theirs = maskformer_config(cfg)
    head, former = theirs.MODEL.SEM_SEG_HEAD, theirs.MODEL.MASK_FORMER
    assert (head.CONVS_DIM, head.MASK_DIM, head.TRANSFORMER_ENC_LAYERS) == (128, 32, 2)
    assert head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES == ["res3", "res4", "res5"]
    assert (former.HIDDEN_DIM, former.NHEADS, former.DIM_FEEDFORWARD) == (128, 4, 96)
    assert (former.NUM_OBJECT_QUERIES, former.DEC_LAYERS, head.NUM_CLASSES) == (11, 5, 1)
    assert "MASK_FORMER" not in cfg.MODEL and "OPTIMIZER" not in cfg.SOLVER


def test_what_upstream_cannot_do_is_named(fake):
    with pytest.raises(ValueError, match="QUERIES is 'entity'; set it to 'learned'"):
        build_mask_decoder(make_cfg(QUERIES="entity"), SHAPES)
    with pytest.raises(ValueError, match="ENCODER_FFN_DIM is 48; MaskFormerHead has always 1024"):
        build_mask_decoder(make_cfg(ENCODER_FFN_DIM=48), SHAPES)


def test_without_upstream_the_error_names_the_repository(monkeypatch):
    monkeypatch.setitem(sys.modules, "mask2former", None)
    with pytest.raises(ImportError, match="facebookresearch/Mask2Former on PYTHONPATH.*Mask2Form"):
        build_mask_decoder(make_cfg(), SHAPES)

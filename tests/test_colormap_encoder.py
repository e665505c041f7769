"""The colormap encoder: pyramids of timm models behind Detectron2's Backbone."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from gella.config import add_gella_config
from gella.modeling.colormap_encoder import TimmColormapEncoder

ARCHS = ["lcnet_050", "mobilenetv2_100", "convnext_atto", "swin_tiny_patch4_window7_224"]
CHANNELS = {
    "lcnet_050": [32, 64, 128, 256],
    "mobilenetv2_100": [24, 32, 96, 320],
    "convnext_atto": [40, 80, 160, 320],
    "swin_tiny_patch4_window7_224": [96, 192, 384, 768],
}


@pytest.fixture(scope="module", params=ARCHS)
def encoder(request):
    torch.manual_seed(0)
    return request.param, TimmColormapEncoder(arch=request.param).eval()


def test_maps_have_the_promised_channels_and_strides(encoder):
    arch, model = encoder
    shapes = model.output_shape()
    assert [shapes[n].channels for n in ("res2", "res3", "res4", "res5")] == CHANNELS[arch]
    assert [s.stride for s in shapes.values()] == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 96))
    for name, shape in shapes.items():
        assert maps[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_odd_sizes_are_padded_inside_and_cropped_back(encoder):
    _, model = encoder
    x = torch.randn(1, 3, 50, 70)
    padded = torch.zeros(1, 3, 64, 96)
    padded[..., :50, :70] = x
    with torch.no_grad():
        maps, reference = model(x), model(padded)
    for name, (height, width) in {"res2": (13, 18), "res3": (7, 9), "res5": (2, 3)}.items():
        assert maps[name].shape[-2:] == (height, width)
        torch.testing.assert_close(maps[name], reference[name][..., :height, :width])


def test_a_map_is_where_its_input_is(encoder):
    # A channels-last map read as channels-first would have the right sizes for square maps only,
    # and transposed axes would answer a change at the top right in the bottom left.
    _, model = encoder
    base = torch.zeros(1, 3, 128, 128)
    changed = base.clone()
    changed[..., :16, 96:112] = 3.0
    with torch.no_grad():
        difference = (model(changed)["res2"] - model(base)["res2"]).abs().sum(1)[0]
    top_right = difference[:8, 22:30].sum()
    bottom_left = difference[22:30, :8].sum()
    assert top_right > 5 * bottom_left


def test_swin_maps_are_normalised_over_channels():
    model = TimmColormapEncoder(arch="swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 64))
    for feature in maps.values():
        assert feature.mean(1).abs().max() < 1e-5
        assert (feature.var(1, unbiased=False) - 1).abs().max() < 1e-2


def test_every_parameter_gets_a_gradient(encoder):
    _, model = encoder
    model.zero_grad()
    sum(feature.square().sum() for feature in model(torch.randn(1, 3, 64, 64)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_unusable_architectures_are_named():
    with pytest.raises(ValueError, match="swin_tiny_typo.*not a timm model"):
        TimmColormapEncoder(arch="swin_tiny_typo")
    with pytest.raises(ValueError, match=r"vit_tiny.*lacks.*4, 8, 32"):
        TimmColormapEncoder(arch="vit_tiny_patch16_224")


def test_the_config_builds_it_on_the_meta_device():
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.COLORMAP_ENCODER.ARCH = "swin_large_patch4_window12_384"
    with torch.device("meta"):
        model = build_backbone(cfg, ShapeSpec(channels=3))
    assert isinstance(model, TimmColormapEncoder)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [s.channels for s in model.output_shape().values()] == [192, 384, 768, 1536]

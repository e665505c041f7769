"""ResoBlend: the three fusions, Table 7's switches, and eq. 7 and 8 written out."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from gella.modeling.resoblend import FUSIONS, ResoBlend, sine_positions

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
CHANNELS = {"res2": 6, "res3": 8, "res4": 10, "res5": 12}
SHAPES = {n: ShapeSpec(channels=CHANNELS[n], stride=s) for n, s in STRIDES.items()}
SWITCHES = ["self_attention", "cross_attention", "feed_forward", "residual", "convolution"]


def build(**changes):
    torch.manual_seed(0)
    options = dict(image_channels=20, pyramid_shapes=SHAPES, dim=32, num_heads=4, ffn_ratio=2.0)
    return ResoBlend(**{**options, **changes}).eval()


def inputs(batch=2, height=64, width=64, side=3):
    torch.manual_seed(1)
    pyramid = {
        n: torch.randn(batch, CHANNELS[n], height // s, width // s) for n, s in STRIDES.items()
    }
    return torch.randn(batch, 20, side, side), pyramid


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("height, width", [(64, 64), (96, 64)])
def test_every_level_keeps_its_size(fusion, height, width):
    model = build(fusion=fusion)
    image, pyramid = inputs(height=height, width=width)
    with torch.no_grad():
        out = model(image, pyramid)
    assert list(out) == [*pyramid, "image"] == list(shapes := model.output_shape())
    # Beside the levels, the image alone: what is blended in, which no mask has touched.
    assert out["image"].shape == (2, shapes.pop("image").channels, 3, 3)
    other = model(image, {name: torch.zeros_like(level) for name, level in pyramid.items()})
    assert torch.equal(out["image"], other["image"])
    for name, shape in shapes.items():
        assert shape.stride == STRIDES[name]
        assert out[name].shape == (2, shape.channels, height // shape.stride, width // shape.stride)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_changes_the_function_and_leaves_no_idle_parameter(fusion, switch):
    model, without = build(fusion=fusion), build(fusion=fusion, **{switch: False})
    shared = {k: v for k, v in model.state_dict().items() if k in without.state_dict()}
    without.load_state_dict(shared)  # strict: a switch only takes parameters away
    if switch != "residual":  # the one part without parameters
        assert len(shared) < len(model.state_dict())
    image, pyramid = inputs()
    out, other = model(image, pyramid), without(image, pyramid)
    assert (out["res3"] - other["res3"]).abs().max() > 1e-4
    sum(feature.square().sum() for feature in other.values()).backward()
    assert [name for name, p in without.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_cross_attention_the_image_has_no_influence(fusion):
    model = build(fusion=fusion, cross_attention=False)
    image, pyramid = inputs()
    with torch.no_grad():
        one, two = model(image, pyramid), model(torch.randn_like(image), pyramid)
        full = build(fusion=fusion)
        seen = (full(image, pyramid)["res2"] - full(-image, pyramid)["res2"]).abs().max()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert seen > 1e-3
    # A trained image encoder must have a gradient, or DistributedDataParallel refuses it.
    image.requires_grad_()
    trained = model(image, pyramid)
    assert all(torch.equal(one[n], trained[n]) for n in one)
    sum(feature.sum() for feature in trained.values()).backward()
    assert image.grad is not None and not image.grad.any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_with_all_parts_off_only_the_projection_of_each_level_is_left(fusion):
    # Table 6: colormap encoding and decoding alone.
    model = build(fusion=fusion, **{switch: False for switch in SWITCHES})
    assert {name.split(".")[2] for name, _ in model.named_parameters()} == {"lateral"}
    image, pyramid = inputs()
    with torch.no_grad():
        out = model(image, pyramid)
        for name, level in model.levels.items():
            conv, norm = level.lateral
            flat = torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], pyramid[name])
            flat = flat + conv.bias[None, :, None, None]
            expected = F.group_norm(flat, norm.num_groups, norm.weight, norm.bias)
            torch.testing.assert_close(out[name], expected, atol=1e-5, rtol=1e-5)


def literal_attention(module, query, key, value):
    """Multi-head attention with an explicit matrix."""

    def split(linear, x):
        return linear(x).reshape(*x.shape[:2], 4, 8)

    q, k, v = split(module.query, query), split(module.key, key), split(module.value, value)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5).softmax(-1)
    return module.output(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS[:2])
def test_image_query_is_equation_7_and_8_to_the_letter(fusion, position):
    model = build(fusion=fusion, position=position)
    image, pyramid = inputs()
    with torch.no_grad():
        z_v = model.image_projection(image.flatten(2).transpose(1, 2))
        where = sine_positions(3, 3, 32, z_v) if position else 0.0
        normed = model.image_norm(z_v)
        z_prime = z_v + literal_attention(
            model.image_attention, normed + where, normed + where, normed
        )
        out = model(image, pyramid)
        for name, level in model.levels.items():
            z_s = level.lateral(pyramid[name])
            size = z_s.shape[-2:]
            tokens = z_s.flatten(2).transpose(1, 2)
            at = sine_positions(*size, 32, tokens) if position else 0.0
            z_d = (
                level.ffn(literal_attention(level.attention, z_prime + where, tokens + at, tokens))
                + z_v
            )  # eq. 7
            z_w = F.interpolate(  # eq. 8
                level.conv(z_d.transpose(1, 2).reshape(2, 32, 3, 3)), size, mode="bilinear"
            )
            if fusion == "image_query_mask_residual":
                z_w = z_w + z_s
            torch.testing.assert_close(out[name], z_w, atol=1e-5, rtol=1e-5)


def test_mask_query_keeps_detail_that_image_query_loses():
    # One cell of stride 4 changes: mask_query answers sharply there.
    image, pyramid = inputs(batch=1)
    changed = {**pyramid, "res2": pyramid["res2"].clone()}
    changed["res2"][..., 8, 8] += 3.0
    for fusion, local in (("mask_query", True), ("image_query", False)):
        model = build(fusion=fusion)
        with torch.no_grad():
            difference = model(image, changed)["res2"] - model(image, pyramid)["res2"]
        difference = difference.abs().sum(1)[0]
        share = difference[7:10, 7:10].sum() / difference.sum()
        assert (share > 0.5) == local


def test_positions_let_the_mask_features_find_their_image_cells():
    image, pyramid = inputs(batch=1)
    mixed = image.flatten(2)[..., torch.randperm(9)].reshape(image.shape)
    options = dict(self_attention=False, residual=False)
    with torch.no_grad():
        blind, seeing = build(position=False, **options), build(**options)
        same = blind(image, pyramid)["res4"] - blind(mixed, pyramid)["res4"]
        moved = seeing(image, pyramid)["res4"] - seeing(mixed, pyramid)["res4"]
    assert same.abs().max() < 1e-4  # without positions the tokens are a bag
    assert moved.abs().max() > 1e-3


def test_positions_agree_between_grids_of_the_same_square():
    like = torch.zeros(1)
    fine, coarse = sine_positions(9, 9, 32, like), sine_positions(3, 3, 32, like)
    fine = fine.view(9, 9, 32)
    torch.testing.assert_close(fine[1::3, 1::3].reshape(1, 9, 32), coarse)
    assert torch.cdist(coarse, coarse).add(torch.eye(3 * 3)).min() > 0.5  # all differ
    assert not torch.allclose(fine[0, 8], fine[8, 0])  # y and x are told apart


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="FUSION is 'both'"):
        build(fusion="both")
    with pytest.raises(ValueError, match="DIM 32.*NUM_HEADS 3"):
        build(num_heads=3)

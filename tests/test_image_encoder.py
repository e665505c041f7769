"""The image encoder: CLIP's raw grids, its stem, and what freezing means."""

from __future__ import annotations

import pytest
import torch

from gella.modeling.image_encoder import CLIPImageEncoder

SIZES = dict(image_size=48, patch_size=8, width=32, layers=3, head_width=16, mlp_ratio=2.0)


def build(**changes):
    torch.manual_seed(0)
    return CLIPImageEncoder(**{**SIZES, **changes})


def test_grids_are_the_last_two_layers_of_an_independent_clip_tower():
    from open_clip.transformer import QuickGELU, VisionTransformer

    model = build()
    reference = VisionTransformer(48, 8, 32, 3, 2, 2.0, output_dim=5, act_layer=QuickGELU).eval()
    left = reference.load_state_dict(model.visual.state_dict(), strict=False)
    assert set(left.missing_keys) == {"ln_post.weight", "ln_post.bias", "proj"}
    assert left.unexpected_keys == []
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        # The tower by hand: patches in row order behind the class token, then block by block.
        patches = reference.conv1(x).flatten(2).transpose(1, 2)
        token = reference.class_embedding.expand(2, 1, -1)
        states = [reference.ln_pre(torch.cat([token, patches], 1) + reference.positional_embedding)]
        for block in reference.transformer.resblocks:
            states.append(block(states[-1]))
        grids = model(x)
    for name, state in (("last", states[3]), ("penultimate", states[2])):
        wanted = state[:, 1:].reshape(2, 6, 6, 32).permute(0, 3, 1, 2)
        torch.testing.assert_close(grids[name], wanted)
    assert grids["last"].shape == (2, 32, 6, 6)


def test_the_last_state_goes_on_to_the_published_output():
    from open_clip.transformer import QuickGELU, VisionTransformer

    model = build(layers=2)
    reference = VisionTransformer(
        48, 8, 32, 2, 2, 2.0, output_dim=5, act_layer=QuickGELU, output_tokens=True
    ).eval()
    reference.load_state_dict(model.visual.state_dict(), strict=False)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        _, tokens = reference(x)  # ln_post of the last layer's tokens
        mine = reference.ln_post(model(x)["last"].flatten(2).transpose(1, 2))
    torch.testing.assert_close(mine, tokens)


def test_frozen_stays_in_evaluation_and_has_no_gradient():
    model = build(freeze=True).train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(torch.randn(1, 3, 48, 48))["last"].requires_grad
    assert build(freeze=False).train().training


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_parameter_of_a_trained_tower_gets_a_gradient(stem):
    model = build(freeze=False, stem=stem).train()
    model(torch.randn(1, 3, 48, 48))["last"].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("patch, side", [(4, 16), (8, 6), (12, 4), (14, 4), (16, 3)])
def test_a_convolutional_stem_has_the_stride_of_the_patch(patch, side):
    model = build(image_size=patch * side, patch_size=patch, stem="conv")
    with torch.no_grad():
        assert model(torch.randn(1, 3, patch * side, patch * side))["last"].shape[-1] == side
    assert model.output_shape()["last"].stride == patch
    convolutions = [m for m in model.visual.conv1 if isinstance(m, torch.nn.Conv2d)]
    total = 1
    for convolution in convolutions:
        total *= convolution.stride[0]
    assert total == patch and len(convolutions) > 1


def test_quick_gelu_is_another_function():
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        quick, plain = build()(x)["last"], build(quick_gelu=False)(x)["last"]
    assert (quick - plain).abs().max() > 1e-4


def test_bad_sizes_are_named():
    for changes, message in [
        (dict(image_size=50), "50.*PATCH_SIZE 8"),
        (dict(width=40), "WIDTH 40.*HEAD_WIDTH 16"),
        (dict(layers=1), "LAYERS is 1"),
        (dict(stem="resnet"), "STEM is 'resnet'"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**changes)
    with pytest.raises(ValueError, match="takes 48x48 images, got 56x48"):
        build()(torch.zeros(1, 3, 56, 48))

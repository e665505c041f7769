"""Classifiers of timm and of the Swin repository as start weights of the colormap encoder."""

from __future__ import annotations

import pytest
import timm
import torch

from gella.modeling import colormap_encoder
from gella.modeling.colormap_encoder import TimmColormapEncoder
from gella.weights.layout import matches_any
from gella.weights.mask2former import MobileNetTimm, SwinOriginal, SwinTimm

SWIN_T, SWIN_L = "swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384"
PREFIX = "colormap_encoder."


def classifier(arch, **options):
    torch.manual_seed(0)
    model = timm.create_model(arch, **options).eval()
    with torch.no_grad():  # fresh norms are the identity and would hide an exchange
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def as_original(state):
    """timm's Swin names as the Swin repository has them, buffers included."""
    renamed = {}
    for key, tensor in state.items():
        for stage in (1, 2, 3):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        renamed[key.replace("head.fc.", "head.")] = tensor
    for stage, block in ((0, 0), (0, 1), (3, 1)):
        name = f"layers.{stage}.blocks.{block}."
        renamed[name + "attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return renamed


def load(arch, layout, state):
    """The encoder with the state converted; every key must be given or be fresh by name."""
    encoder = TimmColormapEncoder(arch=arch).eval()
    converted = layout.to_gella(state)
    assert all(key.startswith(PREFIX) for key in converted)
    own = {PREFIX + key for key in encoder.state_dict()}
    assert set(converted) <= own
    assert {k for k in own if k not in converted} == {
        k for k in own if matches_any(k, layout.fresh)
    }
    encoder.load_state_dict({k[len(PREFIX) :]: v for k, v in converted.items()}, strict=False)
    return encoder


def assert_same_maps(encoder, model, x):
    indices = encoder._taken.values()  # MobileNet has a level of stride 2 too
    with torch.no_grad():
        maps = encoder.body(x)
        wanted = model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    wanted = [w for w in wanted if w.shape[-1] < x.shape[-1] // 2]
    by_size = {w.shape[-1]: w for w in wanted}  # the last of each size
    for index in indices:
        mine = maps[index].permute(0, 3, 1, 2) if encoder.channels_last else maps[index]
        torch.testing.assert_close(mine, by_size[mine.shape[-1]], atol=1e-5, rtol=0)


def test_swin_from_both_cuts_is_the_classifier():
    model = classifier(SWIN_T, img_size=448)
    original = as_original(model.state_dict())
    assert SwinTimm.recognises(model.state_dict()) and not SwinTimm.recognises(original)
    assert SwinOriginal.recognises(original) and not SwinOriginal.recognises(model.state_dict())
    encoder = load(SWIN_T, SwinOriginal(), original)
    assert_same_maps(encoder, model, torch.randn(1, 3, 448, 448))
    state = load(SWIN_T, SwinTimm(), model.state_dict()).body.state_dict()
    for key, tensor in encoder.body.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("arch", ["mobilenetv2_100", "lcnet_050"])
def test_mobilenets_are_the_classifier(arch):
    model = classifier(arch)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    assert MobileNetTimm.recognises(model.state_dict())
    encoder = load(arch, MobileNetTimm(), model.state_dict())
    assert_same_maps(encoder, model, torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize("layout", [SwinTimm(), SwinOriginal(), MobileNetTimm()])
def test_there_and_back(layout):
    arch = "mobilenetv2_100" if layout.name.startswith("mobile") else SWIN_T
    state = classifier(arch).state_dict()
    state = as_original(state) if layout.name == "swin-original" else state
    back = layout.from_gella({**layout.to_gella(state), "other.key": torch.zeros(1)})
    gone = {key for key in state if key not in back}
    assert gone == {key for key in state if layout.drops(key)}
    assert not {"patch_embed.proj.weight", "conv_stem.weight"} & gone
    assert all(back[key] is state[key] for key in back)


def test_cut_windows_are_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(colormap_encoder._logger, "warning", lambda m, *args: said.append(m % args))
    encoder = TimmColormapEncoder(arch=SWIN_T).eval()
    with torch.no_grad():
        encoder(torch.zeros(1, 3, 224, 224))
        assert said == []
        for _ in range(2):
            encoder(torch.zeros(1, 3, 224, 128))
        TimmColormapEncoder(arch="lcnet_050").eval()(torch.zeros(1, 3, 40, 64))
    (text,) = said
    assert "128 x 224" in text and "multiple of 224" in text

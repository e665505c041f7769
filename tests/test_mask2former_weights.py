"""Mask2Former's weights, from transformers and from its repository, in GELLA's vision part."""

import functools
from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from mask2former_upstream import published_keys, upstream
from refusals import refused
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from gella.config import add_gella_config, load_config
from gella.modeling.colormap_encoder import TimmColormapEncoder
from gella.modeling.mask_decoder import Mask2FormerHead
from gella.weights.layout import matches_any
from gella.weights.mask2former import (
    Mask2FormerTransformers,
    Mask2FormerUpstream,
    MaskFormerHeadUpstream,
)

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {
    "tiny": dict(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, queries=100),
    "large": dict(dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, queries=200),
}
ARCHS = {"tiny": "swin_tiny_patch4_window7_224", "large": "swin_large_patch4_window12_384"}
THIN = dict(dim=12, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=7)


def swin_config(dim, depths, heads, window, **_):
    sizes = dict(embed_dim=dim, depths=list(depths), num_heads=list(heads), window_size=window)
    return SwinConfig(**sizes, out_features=STAGES)


def perturb(model, scale=0.1):
    with torch.no_grad():  # fresh norms are the identity and would hide an exchange
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=swin_config(**THIN), feature_size=32, hidden_dim=32, mask_feature_size=32,
        num_attention_heads=4, encoder_layers=2, encoder_feedforward_dim=48, decoder_layers=5,
        dim_feedforward=40, num_queries=7, num_labels=1,
    )  # fmt: skip
    return perturb(Mask2FormerForUniversalSegmentation(config)).eval()


def thin_encoder(dim, depths, heads, window, **_):
    """A TimmColormapEncoder around a narrow Swin."""
    encoder = TimmColormapEncoder(arch=ARCHS["tiny"])
    encoder.body = timm.create_model(
        ARCHS["tiny"], features_only=True, strict_img_size=False, always_partition=True,
        embed_dim=dim, depths=depths, num_heads=heads, window_size=window,
    )  # fmt: skip
    encoder.norms = nn.ModuleDict({f"res{k + 2}": nn.LayerNorm(dim * 2**k) for k in range(4)})
    return encoder.eval()


def thin_head():
    shapes = {f"res{k + 2}": ShapeSpec(channels=12 * 2**k, stride=4 * 2**k) for k in range(4)}
    return Mask2FormerHead(
        input_shape=shapes, num_queries=7, hidden_dim=32, mask_dim=32, num_heads=4,
        encoder_layers=2, encoder_ffn_dim=48, decoder_layers=4, decoder_ffn_dim=40,
    ).eval()  # fmt: skip


def load(module, prefix, state):
    module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})


def gella_shapes(size, *opts):
    """Shapes of GELLA's colormap encoder and mask decoder by key, from the paper's config."""
    # One layer of LLaMA: the language part is not looked at.
    opts = [*opts, "MODEL.COLORMAP_ENCODER.ARCH", ARCHS[size], "MODEL.LANGUAGE.NUM_LAYERS", 1]
    opts += ["MODEL.MASK_DECODER.NUM_QUERIES", SWIN[size]["queries"], "MODEL.DEVICE", "meta"]
    cfg = load_config(ROOT / "configs" / "gella_swin_t.yaml", opts)
    with torch.device("meta"):
        state = build_model(cfg).state_dict()
    parts = ("colormap_encoder.", "mask_decoder.")
    return cfg, {k: tuple(v.shape) for k, v in state.items() if k.startswith(parts)}


def on_meta(keys):
    return {name: torch.empty(shape, device="meta") for name, shape in keys.items()}


def assert_nothing_is_left(layout, state, wanted):
    """Every key of the state is taken or dropped by name; every key of GELLA is given or fresh."""
    converted = {k: tuple(v.shape) for k, v in layout.to_gella(state).items()}
    assert converted.items() <= wanted.items()
    rest = {key for key in wanted if key not in converted}
    assert rest and rest == {key for key in wanted if matches_any(key, layout.fresh)}
    # The class head, constants, the first convolutions, learned queries; not a key of the others.
    names = ("class_", "empty_weight", "relative_position_index", ".input_proj", "adapter_1")
    names = (*names, "quer", "swin.layernorm")
    assert all(any(n in key for n in names) for key in state if layout.drops(key))


def test_the_whole_decoder_is_transformers(reference):
    head, encoder, foreign = thin_head(), thin_encoder(**THIN), reference.state_dict()
    state = Mask2FormerTransformers(same_channels=True).to_gella(foreign)
    load(encoder, "colormap_encoder.", state)
    for name in ("weight", "bias"):
        state[f"mask_decoder.entity_head.{name}"] = foreign[f"class_predictor.{name}"]
    load(head, "mask_decoder.", state)
    image = torch.randn(2, 3, 448, 448)
    with torch.no_grad():
        features = encoder(image)
        theirs = reference.model.pixel_level_module.encoder(image).feature_maps
        out, wanted = head(features), reference(image, output_auxiliary_logits=True)
    for mine, level in zip(features.values(), theirs, strict=True):
        torch.testing.assert_close(mine, level, atol=1e-5, rtol=0)
    layers = [*wanted.auxiliary_logits, wanted]
    assert len(layers) == len(out.mask_logits) == len(out.entity_logits) == 5
    for layer, *mine in zip(layers, out.mask_logits, out.entity_logits):
        theirs = layer["masks_queries_logits"], layer["class_queries_logits"]
        for ours, other, error in zip(mine, theirs, (1e-4, 1e-5)):  # fused attention rounds
            torch.testing.assert_close(ours, other, atol=error, rtol=0)
    assert out.mask_logits[-1].std() > 0.1


def test_files_and_memory_have_two_spellings_of_one_model(reference, tmp_path):
    from safetensors.torch import load_file

    reference.save_pretrained(tmp_path)
    saved, memory = load_file(tmp_path / "model.safetensors"), reference.state_dict()
    assert saved.keys() != memory.keys()  # or this test can go
    layout = Mask2FormerTransformers(same_channels=True)
    assert layout.recognises(saved) and layout.recognises(memory)
    one, two = layout.to_gella(saved), layout.to_gella(memory)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    back = layout.from_gella(one)
    assert back.keys() == {key for key in saved if not layout.drops(key)}
    assert all(torch.equal(back[k], saved[k]) for k in back)


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_no_key_of_transformers_checkpoints_is_left(queries):
    swin = swin_config(**SWIN["large"])
    config = Mask2FormerConfig(backbone_config=swin, num_queries=200, num_labels=133)
    with torch.device("meta"):
        state = Mask2FormerForUniversalSegmentation(config).state_dict()
    cfg, wanted = gella_shapes("large", "MODEL.MASK_DECODER.QUERIES", queries)
    assert_nothing_is_left(Mask2FormerTransformers.from_config(cfg), state, wanted)


@pytest.mark.parametrize("size", ["tiny", "large"])
@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_no_key_of_published_checkpoints_is_left(size, queries):
    state = on_meta(published_keys(**SWIN[size]))
    assert Mask2FormerUpstream.recognises(state) and not Mask2FormerTransformers.recognises(state)
    cfg, wanted = gella_shapes(size, "MODEL.MASK_DECODER.QUERIES", queries)
    layout = Mask2FormerUpstream.from_config(cfg)
    assert_nothing_is_left(layout, state, wanted)
    taken = "mask_decoder.transformer.queries_features.weight" in layout.to_gella(state)
    assert taken == (queries == "learned")


@pytest.mark.parametrize("layout", [
    Mask2FormerUpstream(same_channels=True),
    Mask2FormerUpstream(),
    Mask2FormerUpstream(queries="entity"),
    Mask2FormerUpstream(backbone=False),
    MaskFormerHeadUpstream(),
])  # fmt: skip
def test_there_and_back_is_exact(layout):
    keys = published_keys(**THIN, queries=5)
    state = {name: torch.randn(shape) for name, shape in keys.items()}
    back, head = layout.from_gella(layout.to_gella(state)), "sem_seg_head.predictor."
    if head + "query_feat.weight" in back:  # the name that upstream's code has now
        back[head + "static_query.weight"] = back.pop(head + "query_feat.weight")
    assert back.keys() == {key for key in state if not layout.drops(key)}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_self_attention_is_cut_in_order():
    name = "sem_seg_head.predictor.transformer_self_attention_layers.4.self_attn.in_proj_bias"
    ours = Mask2FormerUpstream().to_gella({name: torch.arange(6)})
    prefix = "mask_decoder.transformer.decoder.layers.4.self_attn."
    parts = {k.removeprefix(prefix): v.tolist() for k, v in ours.items()}
    assert parts == {"q_proj.bias": [0, 1], "k_proj.bias": [2, 3], "v_proj.bias": [4, 5]}


@pytest.mark.parametrize("theirs, ours", [
    ("pixel_decoder.transformer.encoder.layers.2.norm1", "layers.2.self_attn_layer_norm"),
    ("pixel_decoder.transformer.encoder.layers.2.norm2", "layers.2.final_layer_norm"),
    ("pixel_decoder.adapter_1.norm", "adapter_1.1"),
    ("pixel_decoder.layer_1.norm", "layer_1.1"),
    ("predictor.query_embed", "queries_embedder"),
    ("predictor.static_query", "queries_features"),
    ("predictor.transformer_self_attention_layers.2.norm", "layers.2.self_attn_layer_norm"),
    ("predictor.transformer_cross_attention_layers.2.norm", "layers.2.cross_attn_layer_norm"),
    ("predictor.transformer_ffn_layers.2.norm", "layers.2.final_layer_norm"),
    ("predictor.transformer_self_attention_layers.2.self_attn.out_proj",
     "2.self_attn.out_proj"),
    ("predictor.transformer_cross_attention_layers.2.multihead_attn.out_proj",
     "2.cross_attn.out_proj"),
])  # fmt: skip
def test_names_of_one_shape_are_not_exchanged(theirs, ours):
    # Shapes cannot tell these apart; with upstream at hand its features and logits do.
    (key,) = Mask2FormerUpstream().to_gella({f"sem_seg_head.{theirs}.weight": torch.zeros(1)})
    part = "pixel_decoder." if theirs.startswith("pixel_decoder") else "transformer."
    assert key.startswith(f"mask_decoder.{part}") and key.endswith(f".{ours}.weight")


def test_parts_that_a_model_lacks_are_dropped_by_name():
    state, cfg = on_meta(published_keys(**SWIN["tiny"])), get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.COLORMAP_ENCODER.ARCH = "mobilenetv2_100"
    converted = Mask2FormerUpstream.from_config(cfg).to_gella(state)
    assert all(key.startswith("mask_decoder.") for key in converted)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "MaskFormerHead"
    layout = Mask2FormerUpstream.from_config(cfg)
    assert isinstance(layout, MaskFormerHeadUpstream)
    assert "mask_decoder.head.predictor.query_feat.weight" in layout.to_gella(state)
    told = "MaskFormerHead takes Mask2Former's own files"
    refused(told, Mask2FormerTransformers.from_config, cfg)
    wrong = {**state, "backbone.res2.0.conv1.weight": torch.empty(1)}  # a ResNet's
    refused(r"1 of \d+ keys.*backbone\.res2", Mask2FormerUpstream().to_gella, wrong)


def upstream_cfg(size):
    module = upstream()
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    module.add_maskformer2_config(cfg)
    folder = Path(module.__file__).resolve().parents[1] / "configs/coco/panoptic-segmentation/swin"
    name = {"tiny": "swin_tiny_bs16_50ep", "large": "swin_large_IN21k_384_bs16_100ep"}[size]
    cfg.merge_from_file(str(folder / f"maskformer2_{name}.yaml"))
    cfg.MODEL.DEVICE = "meta"
    return cfg


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_the_published_keys_are_those_that_upstream_builds(size, monkeypatch):
    cfg = upstream_cfg(size)
    # Swin asks a tensor of drop rates for its values, which one on "meta" does not have.
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        model = build_model(cfg)
    keys = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    old = "sem_seg_head.predictor.static_query.weight"
    keys[old] = keys.pop("sem_seg_head.predictor.query_feat.weight")
    assert keys == published_keys(**SWIN[size])


@pytest.mark.parametrize("architecture, sizes", [
    (SWIN["tiny"], [(224, 224), (448, 448), (224, 672)]),
    ({**THIN, "window": 12}, [(384, 384), (768, 768), (384, 768)]),
])  # fmt: skip
def test_swin_features_are_upstreams(architecture, sizes):
    cfg = upstream_cfg("tiny")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SWIN.EMBED_DIM = architecture["dim"]
    cfg.MODEL.SWIN.DEPTHS = list(architecture["depths"])
    cfg.MODEL.SWIN.NUM_HEADS = list(architecture["heads"])
    cfg.MODEL.SWIN.WINDOW_SIZE = architecture["window"]
    torch.manual_seed(0)
    theirs = perturb(upstream().modeling.D2SwinTransformer(cfg, None), 0.05)
    theirs.eval()  # returns nothing
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items()}
    encoder = thin_encoder(**architecture)
    load(encoder, "colormap_encoder.", Mask2FormerUpstream().to_gella(state))
    for height, width in sizes:
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            mine, wanted = encoder(x), theirs(x)
        difference = max((mine[name] - wanted[name]).abs().max().item() for name in wanted)
        print(f"Swin, window {architecture['window']}, {height} x {width}: {difference}")
        assert difference < 1e-5

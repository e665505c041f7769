"""Weight formats: keys of public models to GELLA's and back, and what they compute."""

from __future__ import annotations

import pytest
import tiny_weights as tiny
import torch
from torch import nn

from gella import load_config
from gella.modeling.image_encoder import CLIPImageEncoder
from gella.weights import FORMATS, detect, format_named
from gella.weights.layout import Layout, Piece, assemble, cover, fuse, matches, rename, unfuse
from gella.weights.llava import (
    EMBEDDINGS,
    ClipHf,
    ClipHfVision,
    ClipOpenAI,
    ClipOpenAIVisual,
    fit_words,
)

PAPER = str(tiny.ROOT / "configs" / "gella_swin_t.yaml")


def values(*keys):
    """A different one-number tensor per key."""
    return {key: torch.tensor([float(n)]) for n, key in enumerate(keys)}


def same(left, right):
    """Equal keys and bits."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# -- the mechanism ---------------------------------------------------------------------------------


class Toy(Layout):
    """Two rules, of which the first is the special case; a gap on either side."""

    name = "toy"
    prefix = "ours."
    signature = ("layers.*.w", "head")
    rules = (("layers.0.{rest}", "ours.first.{rest}"), ("layers.{i}.{rest}", "ours.{i}.{rest}"))
    dropped = ("head", "*.buffer")
    fresh = ("ours.new.*",)


def test_templates_match_whole_keys_and_numbers():
    assert matches("a.{i}.{rest}", "a.12.b.c") == {"i": "12", "rest": "b.c"}
    assert matches("a.{i}.w", "a.x.w") is None
    assert matches("a.{i}.w", "a.1.w.more") is None
    assert matches("a.b", "axb") is None  # a dot is a dot
    assert rename("a.1.w", [("a.{i}.v", "no"), ("a.{i}.w", "b{i}"), ("a.{x}", "late")]) == "b1"


def test_a_layout_renames_both_ways_and_drops_by_name():
    foreign = values("layers.0.w", "layers.1.w", "head", "layers.1.buffer")
    ours = Toy().to_gella(foreign)
    assert ours.keys() == {"ours.first.w", "ours.1.w"}
    assert ours["ours.first.w"] is foreign["layers.0.w"]
    others = values("ours.new.w", "other.w")
    assert same(
        Toy().from_gella({**ours, **others}), {k: foreign[k] for k in ("layers.0.w", "layers.1.w")}
    )
    assert Toy.recognises(foreign) and not Toy.recognises(["layers.0.w"])


def test_every_unknown_key_is_reported():
    strange = values("layers.0.w", "layers.x.w", "novel", "tail")
    with pytest.raises(ValueError, match=r"3 of 4 keys .* toy: layers\.x\.w, novel, tail"):
        Toy().to_gella(strange)
    with pytest.raises(ValueError, match=r"1 of 2 .* toy: ours\.last\.w"):
        Toy().from_gella(values("ours.first.w", "ours.last.w", "elsewhere"))


def test_two_keys_that_meet_are_an_error():
    class Clash(Toy):
        rules = (("a", "ours.x"), ("b", "ours.x"))

    with pytest.raises(ValueError, match=r"a and b both become ours\.x"):
        Clash().to_gella(values("a", "b"))


def test_fused_tensors_are_cut_and_joined():
    whole = {"h.in_proj_bias": torch.arange(6.0), "other": torch.ones(1)}
    parts = [f"{{head}}.{x}.{{kind}}" for x in "qkv"]
    apart = unfuse(whole, "{head}.in_proj_{kind}", parts)
    assert apart["h.k.bias"].tolist() == [2, 3]
    shuffled = dict(reversed(apart.items()))
    assert same(fuse(shuffled, "{head}.in_proj_{kind}", parts), whole)
    with pytest.raises(ValueError, match=r"h\.in_proj_bias .*\(5,\).* 3 parts"):
        unfuse({"h.in_proj_bias": torch.ones(5)}, "{head}.in_proj_{kind}", parts)
    del apart["h.k.bias"]
    with pytest.raises(ValueError, match=r"without h\.k\.bias"):
        fuse(apart, "{head}.in_proj_{kind}", parts)


def test_formats_are_found_out_and_named():
    for kind, layouts in FORMATS.items():
        names = [layout.name for layout in layouts]
        assert len(set(names)) == len(names)
        assert [format_named(kind, name) for name in names] == list(layouts)
    with pytest.raises(ValueError, match="no clip format 'x'; known: clip-openai, "):
        format_named("clip", "x")
    with pytest.raises(ValueError, match=r"w\.pth is in no llava format .* 2 keys .* a, b"):
        detect("llava", ["b", "a"], "w.pth")
    keys = ["model.layers.0.x", "model.mm_projector.0.weight", "language_model.model.layers.0.x"]
    mixed = [*keys, "multi_modal_projector.linear_1.weight"]
    with pytest.raises(ValueError, match="w mixes the formats llava-hf, llava-original"):
        detect("llava", mixed, "w")


# -- words and <SEG> -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 5, 9])
def test_words_are_cut_and_seg_is_their_mean(rows):
    table = torch.randn(rows, 3).half()
    fitted, notes = fit_words({EMBEDDINGS[0]: table, "x": table}, 5)
    assert fitted["x"] is table and fitted[EMBEDDINGS[0]].dtype == torch.float16
    assert torch.equal(fitted[EMBEDDINGS[0]][:4], table[:4])
    assert torch.equal(fitted[EMBEDDINGS[0]][4], table[:4].float().mean(0).half())
    assert f"{rows} rows in the file, 5 here" in notes[0] and len(notes) == 1
    assert (f"{rows - 4} rows of other tokens" in notes[0]) == (rows > 4)


def test_seg_may_have_a_row_already():
    table = torch.randn(9, 3)
    fitted, notes = fit_words({EMBEDDINGS[1]: table}, 5, seg_row=7)
    assert torch.equal(fitted[EMBEDDINGS[1]], table[[0, 1, 2, 3, 7]])
    assert "row 7 of the file, 4 rows of other tokens" in notes[0]
    for row in (3, 9):
        with pytest.raises(ValueError, match=rf"row {row} of <SEG>.* 9 rows"):
            fit_words({EMBEDDINGS[1]: table}, 5, seg_row=row)
    with pytest.raises(ValueError, match="has 9 rows; MODEL.LANGUAGE.VOCAB_SIZE 12 needs 11"):
        fit_words({EMBEDDINGS[1]: table}, 12)


# -- putting parts together ------------------------------------------------------------------------


def piece(source, *keys, fresh=()):
    """A piece of one-number tensors."""
    return Piece(source, "toy", values(*keys), fresh=fresh)


def test_parts_of_own_files_win_and_gaps_are_fresh():
    expected = values("a.x", "b.x", "b.y", "resoblend.w")
    result = assemble(
        expected, [piece("big", "a.x", "b.x", "b.y"), piece("b", "b.x", fresh=["*y"])]
    )
    assert result.state.keys() == {"a.x", "b.x"} and result.origin["b"].source == "b"
    assert result.fresh == ["b.y", "resoblend.w"] and result.absent == []
    assert result.notes == ["b: from b; 2 tensors of it in big left out"]


def test_a_part_that_nobody_gave_is_not_fresh():
    expected = values("mask_decoder.x", "colormap_encoder.y")
    pieces = [piece("m", "mask_decoder.x", fresh=["colormap_encoder.*"])]
    message = r"1 missing, all of colormap_encoder; give --colormap-encoder"
    with pytest.raises(ValueError, match=message):
        assemble(expected, pieces)
    result = assemble(expected, pieces, allow_missing=["colormap_encoder.*"])
    assert result.absent == ["colormap_encoder.y"] and result.fresh == []


def test_all_misfits_are_in_one_message():
    expected = {**values("a.x", "a.y", "b.z"), "b.s": torch.ones(2, 3)}
    pieces = [piece("f", "a.x", "a.more"), Piece("g", "toy", {"b.s": torch.ones(3, 2)})]
    with pytest.raises(ValueError) as caught:
        assemble(expected, pieces)
    for text in (
        "1 missing in f: a.y",
        "1 missing in g: b.z",
        "1 unexpected in f: a.more",
        "1 of another shape in g: b.s (3, 2) in the file, (2, 3) in the model",
    ):
        assert text in str(caught.value)
    expected["b.s"] = torch.ones(3, 2)
    result = assemble(expected, pieces, allow_missing=["*.y", "b.z"], allow_unexpected=["a.m*"])
    assert result.state.keys() == {"a.x", "b.s"} and "a.more left out" in result.notes[0]


def test_keys_are_named_by_the_largest_modules():
    among = ["a.b.x", "a.b.y", "a.c", "d.x", "d.y.z", "e"]
    assert cover(["a.b.x", "a.b.y", "d.x", "d.y.z", "e"], among) == ["a.b.* (2)", "d.* (2)", "e"]
    assert cover(["a.b.x"], among) == ["a.b.x"]


# -- CLIP ------------------------------------------------------------------------------------------


def encoder(state, layout):
    """GELLA's image encoder with converted weights, strictly."""
    sizes = tiny.VISION
    model = CLIPImageEncoder(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        head_width=16,
        mlp_ratio=2.0,
    )
    renamed = layout.to_gella(state)
    model.load_state_dict({k.removeprefix("image_encoder."): v for k, v in renamed.items()})
    return model.eval()


def hf_clip():
    """transformers' whole CLIP, tiny, random in every tensor."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    vision = CLIPVisionConfig(**tiny.VISION)
    return tiny.perturb(
        CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    )


def compare_features(model, vision_model):
    """Last and penultimate grids against transformers' hidden states; the maximum difference."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(pixels)
        states = vision_model(pixels, output_hidden_states=True).hidden_states
    assert not torch.allclose(ours["last"], ours["penultimate"], atol=0.1)
    return max(
        (ours[name].flatten(2).transpose(1, 2) - states[index][:, 1:]).abs().max().item()
        for name, index in (("last", -1), ("penultimate", -2))
    )


def openai_state(whole):
    """transformers' CLIP in OpenAI's names, by OpenAI's own cut (written here by hand)."""
    out = {}
    for key, tensor in whole.items():
        if not key.startswith("vision_model."):
            continue
        new = "visual." + key.removeprefix("vision_model.")
        for old, name in (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding", "conv1"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("encoder.layers", "transformer.resblocks"),
            ("layer_norm", "ln_"),
            ("self_attn", "attn"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            new = new.replace(old, name)
        out[new] = tensor
    for key in [k for k in out if ".q_proj." in k]:
        names = [key.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
        out[key.replace(".q_proj.", ".in_proj_")] = torch.cat([out.pop(n) for n in names])
    out["visual.proj"] = whole["visual_projection.weight"].t()
    return out


def test_clip_features_equal_transformers_from_every_naming():
    model = hf_clip()
    whole = dict(model.state_dict())
    named = openai_state(whole)
    openai = {
        **named,
        **values("logit_scale", "input_resolution", "context_length", "vocab_size"),
        **values("transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "ln_final.bias"),
        **values("positional_embedding", "text_projection"),
    }
    vision = {k.removeprefix("vision_model."): v for k, v in whole.items() if "vision_m" in k}
    visual = {k.removeprefix("visual."): v for k, v in named.items()}
    buffers = {"vision_model.embeddings.position_ids": torch.arange(17)}  # of transformers 4
    for state, name in (
        ({**whole, **buffers}, "clip-hf"),
        ({k: v for k, v in whole.items() if "vision_m" in k}, "clip-hf"),
        (vision, "clip-hf-vision"),
        (openai, "clip-openai"),
        (named, "clip-openai"),
        (visual, "clip-openai-visual"),
    ):
        layout = detect("clip", state, "file")
        assert layout.name == name
        assert compare_features(encoder(state, layout()), model.vision_model) < 1e-5


def test_clip_features_equal_open_clips_own_model():
    from open_clip.model import CLIP

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.perturb(
            CLIP(
                embed_dim=8,
                vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16,
                                mlp_ratio=2.0),
                text_cfg=dict(context_length=7, vocab_size=50, width=16, heads=2, layers=1),
                quick_gelu=True,
            )
        )  # fmt: skip
    half = {k: v.half() for k, v in model.state_dict().items()}  # as OpenAI's files are
    model.load_state_dict(half)
    ours = encoder(half, ClipOpenAI())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model.visual.forward_intermediates(pixels, indices=[1, 2])
        grids = ours(pixels)
    assert torch.equal(grids["penultimate"], theirs["image_intermediates"][0])
    assert torch.equal(grids["last"], theirs["image_intermediates"][1])


@pytest.mark.parametrize("layout", [ClipHf(), ClipHfVision(), ClipOpenAI(), ClipOpenAIVisual()])
def test_clip_goes_out_and_comes_back_bit_for_bit(layout):
    ours = ClipHf().to_gella(hf_clip().state_dict())
    foreign = layout.from_gella({**ours, **values("association.scale")})
    assert detect("clip", foreign, "file") is type(layout)
    assert same(layout.to_gella(foreign), ours)


# -- LLaVA -----------------------------------------------------------------------------------------


def llava_states():
    """The same LLaVA in every naming: (name of the format, state)."""
    modules = dict(tiny.llava().state_dict())
    saved, old = {}, {}
    for key, tensor in modules.items():
        new = key.removeprefix("model.").replace("language_model.", "language_model.model.")
        new = "language_model.lm_head.weight" if key == "lm_head.weight" else new
        saved[new] = tensor
        old[new.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
    buffer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    return [
        ("llava-hf", saved),  # what transformers 5 saves
        ("llava-hf", {**old, buffer: torch.ones(8)}),  # transformers 4
        ("llava-hf-modules", modules),
    ]


def test_llava_is_read_in_every_naming_and_written_in_the_first():
    results = []
    for name, state in llava_states():
        layout = detect("llava", state, "file")()
        assert layout.name == name
        results.append(layout.to_gella(state))
        assert same(layout.to_gella(layout.from_gella(results[-1])), results[-1])
    assert same(results[0], results[1]) and same(results[0], results[2])
    written = FORMATS["llava"][0]().from_gella(results[0])
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in written
    assert "language_model.lm_head.weight" in written


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_llavas_original_layout_round_trip(tower, linear):
    ours = FORMATS["llava"][0]().to_gella(llava_states()[0][1])
    if not tower:
        ours = {k: v for k, v in ours.items() if not k.startswith("image_encoder.")}
    if linear:
        kept = {k: v for k, v in ours.items() if ".projector." not in k}
        name = "language_decoder.projector."
        ours = {**kept, name + "weight": torch.ones(3, 2), name + "bias": torch.ones(3)}
    layout = format_named("llava", "llava-original")()
    foreign = layout.from_gella(ours)
    assert detect("llava", foreign, "file") is type(layout)
    projector = "model.mm_projector.weight" if linear else "model.mm_projector.2.weight"
    assert {projector, "lm_head.weight", "model.embed_tokens.weight"} <= foreign.keys()
    vision = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert (vision in foreign) == tower
    assert same(layout.to_gella(foreign), ours)
    if linear:  # transformers' class has no place for it
        with pytest.raises(ValueError, match=r"projector\.bias"):
            FORMATS["llava"][0]().from_gella(ours)


# -- the published sizes, on the meta device -------------------------------------------------------


def gella_shapes():
    """Shapes by key of GELLA at full size."""
    from detectron2.modeling import build_model

    cfg = load_config(PAPER, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return shapes(build_model(cfg).state_dict())


def shapes(state):
    """Shapes by key."""
    return {k: tuple(v.shape) for k, v in state.items()}


def on_meta(build):
    """A model without memory."""
    with torch.device("meta"):
        return build()


def published_llava(hidden, middle, layers, heads, rows):
    """LLaVA-1.5 as published: Vicuna 1.5 with CLIP ViT-L/14-336."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    return on_meta(lambda: LlavaForConditionalGeneration(config))


def test_keys_and_shapes_of_published_llava():
    wanted = {
        k: v
        for k, v in gella_shapes().items()
        if k.startswith(("language_decoder.", "image_encoder."))
    }
    modules = published_llava(4096, 11008, 32, 32, rows=32064).state_dict()
    converted = detect("llava", modules, "file")().to_gella(modules)
    assert shapes(fit_words(converted, 32001)[0]) == wanted
    # The repository's own files: 32,000 rows, and a tower or none.
    original = format_named("llava", "llava-original")()
    foreign = original.from_gella(converted)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        foreign[key] = foreign[key][:32000]
    language = {k: v for k, v in foreign.items() if "vision_tower" not in k}
    assert shapes(fit_words(original.to_gella(foreign), 32001)[0]) == wanted
    assert shapes(fit_words(original.to_gella(language), 32001)[0]) == {
        k: v for k, v in wanted.items() if k.startswith("language_decoder.")
    }


def test_keys_and_shapes_of_published_clip():
    import open_clip
    from open_clip.model import CLIP
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    wanted = {k: v for k, v in gella_shapes().items() if k.startswith("image_encoder.")}
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    sizes = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    models: list[nn.Module] = [
        on_meta(lambda: CLIPModel(config)),
        on_meta(lambda: CLIP(**sizes)),
        on_meta(lambda: CLIP(**sizes).visual),
    ]
    for model in models:
        state = model.state_dict()
        layout = detect("clip", state, "file")()
        assert shapes(layout.to_gella(state)) == wanted


def test_the_papers_model_is_put_together_whole():
    """LLaVA-1.5 7B and Mask2Former Swin-T fill all of it but GELLA's own parts."""
    from detectron2.modeling import build_model
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    cfg = load_config(PAPER, ["MODEL.DEVICE", "meta"])
    expected = on_meta(lambda: build_model(cfg)).state_dict()
    stages = [f"stage{n}" for n in (1, 2, 3, 4)]
    backbone = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
                          window_size=7, out_features=stages)  # fmt: skip
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=100, num_labels=133)
    published = {
        "llava": published_llava(4096, 11008, 32, 32, rows=32064),
        "mask2former": on_meta(lambda: Mask2FormerForUniversalSegmentation(config)),
    }
    pieces = []
    for kind, model in published.items():
        state = model.state_dict()
        layout = detect(kind, state, kind).from_config(cfg)
        converted, _ = fit_words(layout.to_gella(state), cfg.MODEL.LANGUAGE.VOCAB_SIZE)
        pieces.append(Piece(kind, layout.name, converted, tuple(layout.fresh)))
    result = assemble(expected, pieces)
    assert result.absent == []
    assert result.state.keys() | set(result.fresh) == expected.keys()
    first = "mask_decoder.pixel_decoder."
    assert [name.rsplit(" ", 1)[0] for name in cover(result.fresh, expected)] == [
        "resoblend.*",
        *(f"{first}input_projections.{n}.0.*" for n in range(3)),
        f"{first}adapter_1.0.*",
        "mask_decoder.entity_head.*",
        "association.*",
        "criterion.*",
    ]

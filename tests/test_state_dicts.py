"""Weight formats: keys of public models to GELLA's and back, and what they compute."""

import pytest
import tiny_weights as tiny
import torch
from refusals import refused

from gella import load_config
from gella.modeling.image_encoder import CLIPImageEncoder
from gella.weights import FORMATS, LlavaOriginal, detect
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
    return {key: torch.tensor([float(n)]) for n, key in enumerate(keys)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


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
    assert matches("a.{i}.w", "a.x.w") is None and matches("a.{i}.w", "a.1.w.more") is None
    assert matches("a.b", "axb") is None  # a dot is a dot
    assert rename("a.1.w", [("a.{i}.v", "no"), ("a.{i}.w", "b{i}"), ("a.{x}", "late")]) == "b1"


def test_a_layout_renames_both_ways_and_drops_by_name():
    foreign = values("layers.0.w", "layers.1.w", "head", "layers.1.buffer")
    ours = Toy().to_gella(foreign)
    assert ours.keys() == {"ours.first.w", "ours.1.w"}
    assert ours["ours.first.w"] is foreign["layers.0.w"]
    back = Toy().from_gella({**ours, **values("ours.new.w", "other.w")})
    assert same(back, {k: foreign[k] for k in ("layers.0.w", "layers.1.w")})
    assert Toy.recognises(foreign) and not Toy.recognises(["layers.0.w"])


def test_every_unknown_key_and_two_that_meet_are_reported():
    strange = values("layers.0.w", "layers.x.w", "novel", "tail")
    refused(r"3 of 4 keys .* toy: layers\.x\.w, novel, tail", Toy().to_gella, strange)
    strange = values("ours.first.w", "ours.last.w", "elsewhere")
    refused(r"1 of 2 .* toy: ours\.last\.w", Toy().from_gella, strange)
    clash = type("Clash", (Toy,), {"rules": (("a", "ours.x"), ("b", "ours.x"))})
    refused(r"a and b both become ours\.x", clash().to_gella, values("a", "b"))


def test_fused_tensors_are_cut_and_joined():
    whole = {"h.in_proj_bias": torch.arange(6.0), "other": torch.ones(1)}
    names = "{head}.in_proj_{kind}", [f"{{head}}.{x}.{{kind}}" for x in "qkv"]
    apart = unfuse(whole, *names)
    assert apart["h.k.bias"].tolist() == [2, 3]
    assert same(fuse(dict(reversed(apart.items())), *names), whole)
    told = r"h\.in_proj_bias .*\(5,\).* 3 parts"
    refused(told, unfuse, {"h.in_proj_bias": torch.ones(5)}, *names)
    del apart["h.k.bias"]
    refused(r"without h\.k\.bias", fuse, apart, *names)


def test_formats_are_found_out_and_named():
    for layouts in FORMATS.values():
        names = [layout.name for layout in layouts]
        assert len(set(names)) == len(names)
    told = r"w\.pth is in no llava format .* 2 keys .* a, b"
    refused(told, detect, "llava", ["b", "a"], "w.pth")
    mixed = ["model.layers.0.x", "model.mm_projector.0.weight", "language_model.model.layers.0.x"]
    mixed += ["multi_modal_projector.linear_1.weight"]
    refused("w mixes the formats llava-hf, llava-original", detect, "llava", mixed, "w")


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
        refused(rf"row {row} of <SEG>.* 9 rows", fit_words, {EMBEDDINGS[1]: table}, 5, seg_row=row)
    with pytest.raises(ValueError, match="has 9 rows; MODEL.LANGUAGE.VOCAB_SIZE 12 needs 11"):
        fit_words({EMBEDDINGS[1]: table}, 12)


def piece(source, *keys, fresh=()):
    return Piece(source, "toy", values(*keys), fresh=fresh)


def test_parts_of_own_files_win_and_gaps_are_fresh():
    expected = values("a.x", "b.x", "b.y", "resoblend.w")
    pieces = [piece("big", "a.x", "b.x", "b.y"), piece("b", "b.x", fresh=["*y"])]
    result = assemble(expected, pieces)
    assert result.state.keys() == {"a.x", "b.x"} and result.origin["b"].source == "b"
    assert result.fresh == ["b.y", "resoblend.w"] and result.absent == []
    assert result.notes == ["b: from b; 2 tensors of it in big left out"]


def test_a_part_that_nobody_gave_is_not_fresh():
    expected = values("mask_decoder.x", "colormap_encoder.y")
    pieces = [piece("m", "mask_decoder.x", fresh=["colormap_encoder.*"])]
    told = r"1 missing, all of colormap_encoder; give --colormap-encoder"
    refused(told, assemble, expected, pieces)
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


def encoder(state, layout):
    sizes = {k: tiny.VISION[k] for k in ("image_size", "patch_size")}
    sizes |= {"width": tiny.VISION["hidden_size"], "layers": tiny.VISION["num_hidden_layers"]}
    model = CLIPImageEncoder(**sizes, head_width=16, mlp_ratio=2.0)
    renamed = layout.to_gella(state)
    model.load_state_dict({k.removeprefix("image_encoder."): v for k, v in renamed.items()})
    return model.eval()


def clip_model(vision, **text):
    """transformers' whole CLIP."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    parts = {"text_config": CLIPTextConfig(**text), "vision_config": CLIPVisionConfig(**vision)}
    return CLIPModel(CLIPConfig(**{name: part.to_dict() for name, part in parts.items()}))


def hf_clip():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return tiny.perturb(clip_model(tiny.VISION, vocab_size=50, **sizes))


def compare_features(model, vision_model):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(pixels)
        states = vision_model(pixels, output_hidden_states=True).hidden_states
    assert not torch.allclose(ours["last"], ours["penultimate"], atol=0.1)
    return max(
        (ours[name].flatten(2).transpose(1, 2) - states[index][:, 1:]).abs().max().item()
        for name, index in (("last", -1), ("penultimate", -2))
    )


OPENAI = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def openai_state(whole):
    """transformers' CLIP in OpenAI's names, by OpenAI's own cut (written here by hand)."""
    out = {}
    for key, tensor in whole.items():
        if key.startswith("vision_model."):
            new = "visual." + key.removeprefix("vision_model.")
            for old, name in OPENAI.items():
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
    others = "logit_scale input_resolution context_length vocab_size token_embedding.weight"
    others += " transformer.resblocks.0.ln_1.weight ln_final.bias positional_embedding"
    openai = {**named, **values(*others.split(), "text_projection")}
    tower = {k: v for k, v in whole.items() if "vision_m" in k}
    buffers = {"vision_model.embeddings.position_ids": torch.arange(17)}  # of transformers 4
    for state, name in (
        ({**whole, **buffers}, "clip-hf"),
        (tower, "clip-hf"),
        ({k.removeprefix("vision_model."): v for k, v in tower.items()}, "clip-hf-vision"),
        (openai, "clip-openai"),
        (named, "clip-openai"),
        ({k.removeprefix("visual."): v for k, v in named.items()}, "clip-openai-visual"),
    ):
        layout = detect("clip", state, "file")
        assert layout.name == name
        assert compare_features(encoder(state, layout()), model.vision_model) < 1e-5


def test_clip_features_equal_open_clips_own_model():
    from open_clip.model import CLIP

    vision = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16, mlp_ratio=2.0)
    text = dict(context_length=7, vocab_size=50, width=16, heads=2, layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    tiny.perturb(model)
    half = {k: v.half() for k, v in model.state_dict().items()}  # as OpenAI's files are
    model.load_state_dict(half)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model.visual.forward_intermediates(pixels, indices=[1, 2])["image_intermediates"]
        ours = encoder(half, ClipOpenAI())(pixels)
    assert torch.equal(ours["penultimate"], theirs[0]) and torch.equal(ours["last"], theirs[1])


@pytest.mark.parametrize("layout", [ClipHf(), ClipHfVision(), ClipOpenAI(), ClipOpenAIVisual()])
def test_clip_goes_out_and_comes_back_bit_for_bit(layout):
    ours = ClipHf().to_gella(hf_clip().state_dict())
    foreign = layout.from_gella({**ours, **values("association.scale")})
    assert detect("clip", foreign, "file") is type(layout)
    assert same(layout.to_gella(foreign), ours)


def llava_states():
    """The same LLaVA in every naming: (name of the format, state)."""
    modules, saved, old = dict(tiny.llava().state_dict()), {}, {}
    for key, tensor in modules.items():
        new = key.removeprefix("model.").replace("language_model.", "language_model.model.")
        new = "language_model.lm_head.weight" if key == "lm_head.weight" else new
        saved[new] = old[new.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
    old["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    # What transformers 5 saves, and 4.
    return [("llava-hf", saved), ("llava-hf", old), ("llava-hf-modules", modules)]


def test_llava_is_read_in_every_naming_and_written_in_the_first():
    first, *others = llava_states()
    ours = detect("llava", first[1], "file")().to_gella(first[1])
    for name, state in (first, *others):
        layout = detect("llava", state, "file")()
        assert layout.name == name and same(layout.to_gella(state), ours)
        assert same(layout.to_gella(layout.from_gella(ours)), ours)
    written = FORMATS["llava"][0]().from_gella(ours)
    tower = "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"
    assert written.keys() >= {tower, "language_model.lm_head.weight"}


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
    layout = LlavaOriginal()
    foreign = layout.from_gella(ours)
    assert detect("llava", foreign, "file") is type(layout)
    projector = "model.mm_projector.weight" if linear else "model.mm_projector.2.weight"
    assert {projector, "lm_head.weight", "model.embed_tokens.weight"} <= foreign.keys()
    vision = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert (vision in foreign) == tower and same(layout.to_gella(foreign), ours)
    if linear:  # transformers' class has no place for it
        refused(r"projector\.bias", FORMATS["llava"][0]().from_gella, ours)


def gella_shapes(*prefixes):
    from detectron2.modeling import build_model

    cfg = load_config(PAPER, ["MODEL.DEVICE", "meta"])
    every = shapes(on_meta(lambda: build_model(cfg)).state_dict())
    return {k: v for k, v in every.items() if k.startswith(prefixes)}


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
VIT_L |= dict(num_attention_heads=16, image_size=336, patch_size=14)


def published_llava():
    from transformers import CLIPVisionConfig as Vision
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    text = LlamaConfig(vocab_size=32064, num_attention_heads=32, num_key_value_heads=32, **sizes)
    config = LlavaConfig(vision_config=Vision(**VIT_L).to_dict(), text_config=text.to_dict())
    return on_meta(lambda: LlavaForConditionalGeneration(config))


def test_keys_and_shapes_of_published_llava():
    wanted = gella_shapes("language_decoder.", "image_encoder.")
    modules = published_llava().state_dict()
    converted = detect("llava", modules, "file")().to_gella(modules)
    assert shapes(fit_words(converted, 32001)[0]) == wanted
    # The repository's own files: 32,000 rows, and a tower or none.
    original = LlavaOriginal()
    foreign = original.from_gella(converted)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        foreign[key] = foreign[key][:32000]
    language = {k: v for k, v in foreign.items() if "vision_tower" not in k}
    assert shapes(fit_words(original.to_gella(foreign), 32001)[0]) == wanted
    alone = {k: v for k, v in wanted.items() if k.startswith("language_decoder.")}
    assert shapes(fit_words(original.to_gella(language), 32001)[0]) == alone


def test_keys_and_shapes_of_published_clip():
    import open_clip
    from open_clip.model import CLIP

    wanted = gella_shapes("image_encoder.")
    sizes = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    for build in (
        lambda: clip_model({**VIT_L, "projection_dim": 768}, **text),
        lambda: CLIP(**sizes),
        lambda: CLIP(**sizes).visual,
    ):
        state = on_meta(build).state_dict()
        assert shapes(detect("clip", state, "file")().to_gella(state)) == wanted


def test_the_papers_model_is_put_together_whole():
    from detectron2.modeling import build_model
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    cfg = load_config(PAPER, ["MODEL.DEVICE", "meta"])
    expected = on_meta(lambda: build_model(cfg)).state_dict()
    stages = [f"stage{n}" for n in (1, 2, 3, 4)]
    backbone = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
                          window_size=7, out_features=stages)  # fmt: skip
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=100, num_labels=133)
    published = {
        "llava": published_llava(),
        "mask2former": on_meta(lambda: Mask2FormerForUniversalSegmentation(config)),
    }
    pieces = []
    for kind, model in published.items():
        state = model.state_dict()
        layout = detect(kind, state, kind).from_config(cfg)
        converted, _ = fit_words(layout.to_gella(state), cfg.MODEL.LANGUAGE.VOCAB_SIZE)
        pieces.append(Piece(kind, layout.name, converted, tuple(layout.fresh)))
    result = assemble(expected, pieces)
    assert result.absent == [] and result.state.keys() | set(result.fresh) == expected.keys()
    first = "mask_decoder.pixel_decoder."
    assert [name.rsplit(" ", 1)[0] for name in cover(result.fresh, expected)] == [
        "resoblend.*",
        *(f"{first}input_projections.{n}.0.*" for n in range(3)),
        f"{first}adapter_1.0.*",
        "mask_decoder.entity_head.*",
        "association.*",
        "criterion.*",
    ]

"""tools/convert_weights.py from end to end, on tiny models that their own libraries saved."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_weights as tiny
import torch
from safetensors.torch import load_file, save_file

from gella import GellaPredictor, load_config
from gella.commands import convert_weights
from gella.engine.preflight import untrained_parts
from gella.weights import LlavaHf, LlavaOriginal
from gella.weights.files import download, read_weights
from gella.weights.llava import EMBEDDINGS, ClipOpenAI
from gella.weights.mask2former import Mask2FormerUpstream

WORDS = tiny.WORDS


def run(*arguments, opts=tiny.OPTS):
    """The tool with the tiny config; its exit status."""
    return convert_weights.main(["--config-file", tiny.CONFIG, *map(str, arguments), *opts])


def same(left, right):
    """Equal keys, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def part(state, *names):
    """The tensors of some parts."""
    return {k: v for k, v in state.items() if k.split(".")[0] in names}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Public weights in a folder: `llava` of transformers, `m2f.pkl`, `lcnet.pth`."""
    import timm
    from detectron2.modeling import build_model

    from gella import load_config

    folder = tmp_path_factory.mktemp("public")
    tiny.llava().save_pretrained(folder / "llava", max_shard_size="20KB")
    encoder = tiny.perturb(timm.create_model("lcnet_050"), 2)
    torch.save({"state_dict": encoder.state_dict()}, folder / "lcnet.pth")

    cfg = load_config(tiny.CONFIG, tiny.OPTS)
    model = tiny.perturb(build_model(cfg), 3)
    m2f = Mask2FormerUpstream.from_config(cfg).from_gella(model.state_dict())
    predictor = "sem_seg_head.predictor."
    m2f[predictor + "class_embed.weight"] = torch.ones(134, 64)
    m2f[predictor + "class_embed.bias"] = torch.ones(134)
    m2f[predictor + "query_feat.weight"] = torch.ones(100, 64)
    m2f[predictor + "query_embed.weight"] = torch.ones(100, 64)
    m2f["criterion.empty_weight"] = torch.ones(134)
    m2f["backbone.norm0.weight"] = torch.ones(96)
    arrays = {key: tensor.numpy() for key, tensor in m2f.items()}
    (folder / "m2f.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    return folder


@pytest.fixture(scope="module")
def gella(sources, tmp_path_factory):
    """GELLA's weights made of all of them, as one file."""
    path = tmp_path_factory.mktemp("gella") / "gella_init.pth"
    status = run(
        *("--llava", sources / "llava", "--mask2former", sources / "m2f.pkl"),
        *("--colormap-encoder", sources / "lcnet.pth", "--output", path),
    )
    assert status == 0
    return path


@pytest.fixture(scope="module")
def trained(gella):
    """The same with rows of <SEG> that are no mean any more."""
    state = read_weights(gella)
    for key in EMBEDDINGS:
        state[key] = state[key].clone()
        state[key][WORDS] += 1
    torch.save({"model": state}, gella.parent / "trained.pth")
    return gella.parent / "trained.pth"


def logits_of(model, pixels, words):
    """GELLA's logits for an image and the words behind its tokens."""
    with torch.no_grad():
        language = model.language_decoder
        image = language.image_tokens(model.image_encoder(pixels)["penultimate"])
        text = language.llama.get_input_embeddings()(words)
        return language.llama(inputs_embeds=torch.cat([image, text], 1)).logits[..., :WORDS]


def llava_logits(model, pixels, words):
    """The same of transformers' LLaVA, which wants a placeholder per image token."""
    image = torch.full((len(words), 16), model.config.image_token_index)
    with torch.no_grad():
        ids = torch.cat([image, words], 1)
        return model(input_ids=ids, pixel_values=pixels).logits[..., :WORDS]


@pytest.fixture(scope="module")
def question():
    """Two images with six words each."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return pixels, torch.randint(0, WORDS, (2, 6), generator=generator)


def test_logits_equal_transformers_llava(gella, question):
    model = tiny.load_gella(str(gella), allow=[])
    wanted = llava_logits(tiny.llava(), *question)
    assert wanted.std() > 0.1
    assert (logits_of(model, *question) - wanted).abs().max() < 1e-4


def test_the_report_names_what_is_what(sources, tmp_path, capsys):
    assert 0 == run(
        *("--llava", sources / "llava", "--mask2former", sources / "m2f.pkl"),
        *("--colormap-encoder", sources / "lcnet.pth", "--output", tmp_path / "out"),
    )
    text = capsys.readouterr().out
    for expected in (
        "56 rows in the file, 49 here: 48 words, <SEG> is the mean of the 48, 8 rows of other",
        "of no use in m2f.pkl: ",
        "sem_seg_head.predictor.class_embed.weight",
        "of no use in lcnet.pth: ",
        "mask_decoder.entity_head.* (2)",
        "association.* (6)",
        "resoblend.* (102)",
        f"next: python tools/train_net.py --config-file {tiny.CONFIG} MODEL.WEIGHTS",
    ):
        assert expected in text
    assert "absent" not in text
    card = (tmp_path / "out" / "README.md").read_text()
    digest = convert_weights.hash_files([str(sources / "m2f.pkl")])[0][1]
    assert f"`{digest}`" in card and "`association.* (6)`" in card and str(sources) not in card


def test_what_no_file_has_is_initialised_the_same_each_time(gella, sources, tmp_path):
    state = read_weights(gella)
    assert state["association.scale"].item() == pytest.approx(1 / 8)  # 1 / sqrt(DIM)
    assert state["criterion.terms.empty_weight"].tolist() == pytest.approx([1, 0.1])
    arguments = ("--llava", sources / "llava", "--output", tmp_path / "w.pth")
    assert run(*arguments, opts=[*tiny.OPTS, *tiny.LEAVE_OUT]) == 0
    again = read_weights(tmp_path / "w.pth")
    assert {"association.* (6)", "resoblend.* (102)"} <= {*untrained_parts(tmp_path / "w.pth")}
    assert not part(again, "mask_decoder", "colormap_encoder")
    assert same(again, {k: state[k] for k in again})


def test_gellas_own_weights_go_out_and_load(gella, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    opts = [*tiny.OPTS, "MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir)]
    assert run("--weights", gella, "--export", out, "--max-shard-size", "30KB", opts=opts) == 0
    state = read_weights(gella)
    assert same(read_weights(out), state)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert "MODEL:" in (out / "config.yaml").read_text()
    # Nothing beside it is needed, and the hub's cache is a folder of links.
    alone = shutil.copytree(out, tmp_path / "moved" / "alone", copy_function=os.symlink)
    assert load_config(alone).MODEL.LANGUAGE.TOKENIZER == str(alone / "tokenizer")
    assert same(GellaPredictor.from_pretrained(alone).model.state_dict(), state)
    assert f"{len(state)} tensors" in (out / "README.md").read_text()
    for path in (out, out / "model.safetensors.index.json"):
        assert same(tiny.load_gella(str(path), allow=[]).state_dict(), state)
    assert run("--weights", out, "--export", tmp_path / "again", "--dtype", "bfloat16") == 0
    single = tmp_path / "again" / "model.safetensors"
    half = load_file(single)
    assert {t.dtype for t in half.values() if t.is_floating_point()} == {torch.bfloat16}
    loaded = tiny.load_gella(str(single), allow=[]).state_dict()
    assert all(torch.equal(loaded[k], half[k].to(loaded[k].dtype)) for k in half)


def test_llava_goes_back_to_transformers(trained, question, tmp_path):
    from transformers import LlavaForConditionalGeneration

    out = tmp_path / "llava"
    assert run("--weights", trained, "--export-llava", out, "--max-shard-size", "30KB") == 0
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.image_token_index == 49 and model.config.text_config.vocab_size == 50
    wanted = llava_logits(tiny.llava(), *question)
    assert (llava_logits(model.eval(), *question) - wanted).abs().max() < 1e-5
    # <SEG> has a row of its own there, which config.json names, and comes back bit for bit.
    back = tmp_path / "back.pth"
    assert run("--llava", out, "--output", back, opts=[*tiny.OPTS, *tiny.LEAVE_OUT]) == 0
    parts = ("image_encoder", "language_decoder")
    assert same(part(read_weights(back), *parts), part(read_weights(trained), *parts))


@pytest.mark.parametrize("bins", [False, True])
def test_the_original_layout_round_trip(trained, question, tmp_path, bins):
    out = tmp_path / "original"
    assert (
        run("--weights", trained, "--export-llava-original", out, "--max-shard-size", "30KB") == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["vocab_size"] == 49
    if bins:  # as the LLaVA repository's own files are
        index = json.loads((out / "model.safetensors.index.json").read_text())
        for name in set(index["weight_map"].values()):
            torch.save(load_file(out / name), out / name.replace("safetensors", "bin"))
            (out / name).unlink()
        (out / "model.safetensors.index.json").unlink()
        text = json.dumps(index).replace(".safetensors", ".bin")
        (out / "pytorch_model.bin.index.json").write_text(text)
    back = tmp_path / "back.pth"
    assert run("--llava", out, "--output", back, opts=[*tiny.OPTS, *tiny.LEAVE_OUT]) == 0
    parts = ("image_encoder", "language_decoder")
    assert same(part(read_weights(back), *parts), part(read_weights(trained), *parts))
    model = tiny.load_gella(str(back))
    wanted = llava_logits(tiny.llava(), *question)
    assert (logits_of(model, *question) - wanted).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")  # the repository's, about the installed transformers
def test_logits_equal_the_llava_repositorys_own_class(gella, question, tmp_path):
    """Needs the clone of LLaVA's repository on PYTHONPATH."""
    try:
        from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    except ImportError:
        pytest.skip("LLaVA's repository is not on PYTHONPATH; it is on no package index")
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    tower = tmp_path / "tower"
    tiny.perturb(CLIPVisionModel(CLIPVisionConfig(**tiny.VISION)), 4).save_pretrained(tower)
    CLIPImageProcessor(crop_size=32).save_pretrained(tower)
    sizes = dict(
        vocab_size=WORDS, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(**sizes)
    for key, value in dict(
        mm_projector_type="mlp2x_gelu", mm_hidden_size=32, mm_vision_tower=str(tower),
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", use_mm_proj=True,
        tune_mm_mlp_adapter=False,
    ).items():  # fmt: skip
        setattr(config, key, value)
    theirs = tiny.perturb(LlavaLlamaForCausalLM(config), 6)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    command = ("--llava", tmp_path / "pytorch_model.bin", "--clip", tower)
    opts = [*tiny.OPTS, *tiny.LEAVE_OUT]
    assert run(*command, "--output", tmp_path / "w.pth", opts=opts) == 0
    theirs.get_vision_tower().load_model()
    pixels, words = question
    with torch.no_grad():
        ids = torch.cat([torch.full((2, 1), -200), words], 1)  # one mark stands for the image
        wanted = theirs(input_ids=ids, images=pixels).logits
    assert wanted.std() > 0.1
    found = logits_of(tiny.load_gella(str(tmp_path / "w.pth")), pixels, words)
    assert (found - wanted).abs().max() < 1e-4
    # and back: all of the language part, strictly
    out = tmp_path / "out"
    assert run("--weights", tmp_path / "w.pth", "--export-llava-original", out, opts=opts) == 0
    state = {k: v for k, v in read_weights(out).items() if "vision_tower" not in k}
    again = LlavaLlamaForCausalLM(LlavaConfig(**{**sizes, "vocab_size": WORDS + 1}))
    again.model.mm_projector = theirs.model.mm_projector
    again.load_state_dict(state)


def test_a_llava_without_a_tower_takes_a_clip_file(gella, tmp_path, capsys):
    state = read_weights(gella)
    language = LlavaOriginal().from_gella(part(state, "language_decoder"))
    # 32,000 rows in the real file: no <SEG>
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        language[key] = language[key][:WORDS].half().contiguous()
    save_file(language, tmp_path / "llava.safetensors")
    vision = ClipOpenAI().from_gella(part(state, "image_encoder"))
    torch.save({**vision, "visual.proj": torch.ones(32, 8)}, tmp_path / "clip.pth")
    opts = [*tiny.OPTS, *tiny.LEAVE_OUT]
    command = ("--llava", tmp_path / "llava.safetensors", "--output", tmp_path / "w.pth")
    assert run(*command, opts=opts) == 2
    error = capsys.readouterr().err
    assert "41 missing, all of image_encoder; give --clip" in error
    assert run(*command, "--clip", tmp_path / "clip.pth", opts=opts) == 0
    assert "48 rows in the file, 49 here" in capsys.readouterr().out
    back = read_weights(tmp_path / "w.pth")
    assert same(part(back, "image_encoder"), part(state, "image_encoder"))
    assert back[EMBEDDINGS[0]].dtype == torch.float16  # as in the file
    assert torch.equal(back[EMBEDDINGS[0]][:WORDS], state[EMBEDDINGS[0]][:WORDS].half())


def test_a_clip_file_counts_before_llavas_own_tower(sources, tmp_path, capsys):
    tiny.llava(seed=9).save_pretrained(tmp_path / "other")
    other = LlavaHf().to_gella(read_weights(tmp_path / "other"))
    vision = part(other, "image_encoder")
    torch.save(ClipOpenAI().from_gella(vision), tmp_path / "clip.pth")
    command = ("--llava", sources / "llava", "--clip", tmp_path / "clip.pth")
    opts = [*tiny.OPTS, *tiny.LEAVE_OUT]
    assert run(*command, "--output", tmp_path / "w.pth", opts=opts) == 0
    assert "41 tensors of it in" in capsys.readouterr().out
    assert same(part(read_weights(tmp_path / "w.pth"), "image_encoder"), vision)


def test_one_matrix_for_both_embeddings(sources, tmp_path):
    state = read_weights(sources / "llava")
    del state["language_model.lm_head.weight"]
    save_file(state, tmp_path / "tied.safetensors")
    opts = [*tiny.OPTS, *tiny.LEAVE_OUT, "MODEL.LANGUAGE.TIE_EMBEDDINGS", "True"]
    command = ("--llava", tmp_path / "tied.safetensors", "--output", tmp_path / "w.pth")
    assert run(*command, opts=opts) == 0
    back = read_weights(tmp_path / "w.pth")
    assert torch.equal(back[EMBEDDINGS[0]], back[EMBEDDINGS[1]])
    out = tmp_path / "out"
    assert run("--weights", tmp_path / "w.pth", "--export", out, opts=opts) == 0
    assert same(read_weights(out), back)


def test_a_config_beside_counts_only_for_its_own_model():
    from gella import load_config

    cfg = load_config(tiny.CONFIG, tiny.OPTS)
    llama = {"model_type": "llava_llama", "num_attention_heads": 32, "hidden_act": "silu"}
    convert_weights.check_hyperparameters(llama, cfg, "clip")
    with pytest.raises(ValueError, match=r"num_attention_heads is 4 there and 2 here"):
        convert_weights.check_hyperparameters(
            {"model_type": "clip_vision_model", "num_attention_heads": 4}, cfg, "clip"
        )
    original = {"mm_vision_select_layer": -1, "num_attention_heads": 2, "rope_theta": 1e6}
    with pytest.raises(ValueError, match=r"mm_vision_select_layer is -1.*rope_theta is 1000000\.0"):
        convert_weights.check_hyperparameters(original, cfg, "llava")


def break_shard(folder):
    """A shard is gone."""
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    return "are missing: model-00002-of-000"


def break_length(folder):
    """A shard is half as long."""
    path = next(folder.glob("*-00002-of-*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return f"{path.name} cannot be read"


def break_shape(folder):
    """A matrix has a row less."""
    path = next(p for p in folder.glob("*.safetensors") if any(map(is_gate, load_file(p))))
    save_file({k: v[:-1] if is_gate(k) else v for k, v in load_file(path).items()}, path)
    return (
        "language_decoder.llama.model.layers.1.mlp.gate_proj.weight (39, 32) in the file, (40, 32)"
    )


def is_gate(key):
    """Whether a key is the matrix that break_shape takes."""
    return key.endswith("layers.1.mlp.gate_proj.weight")


def break_mixture(folder):
    """Keys of the original layout among those of transformers."""
    state = read_weights(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    more = {"model.layers.0.x": torch.ones(1), "model.mm_projector.0.weight": torch.ones(1)}
    save_file({**state, **more}, folder / "model.safetensors")
    return "mixes the formats llava-hf, llava-original"


def break_key(folder):
    """A key that no format knows."""
    state = read_weights(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    save_file({**state, "image_newline": torch.ones(1)}, folder / "model.safetensors")
    return "keys are not known to the format llava-hf: image_newline"


def break_heads(folder):
    """Another number of heads, which no shape shows."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_attention_heads"] = 4
    config["vision_config"]["hidden_act"] = "gelu"
    path.write_text(json.dumps(config))
    return (
        "hidden_act is gelu there and quick_gelu here (MODEL.IMAGE_ENCODER.QUICK_GELU);"
        " num_attention_heads is 4 there and 2 here (MODEL.LANGUAGE.NUM_HEADS)"
    )


@pytest.mark.parametrize(
    "damage", [break_shard, break_length, break_shape, break_mixture, break_key, break_heads]
)
def test_a_damaged_llava_is_one_clear_error(sources, tmp_path, capsys, damage):
    folder = tmp_path / "llava"
    shutil.copytree(sources / "llava", folder)
    message = damage(folder)
    command = ("--llava", folder, "--output", tmp_path / "w.pth")
    assert run(*command, opts=[*tiny.OPTS, *tiny.LEAVE_OUT]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not (tmp_path / "w.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--llava", "x"], "--output is missing"),
        (["--output", "x.pth"], "--output needs public weights"),
        (["--export", "x"], "--export needs --weights"),
        (["--weights", "x"], "--weights needs --export"),
        (["--llava", "x", "--output", "y.pth", "--weights", "z"], "one after the other"),
        (["--llava", "nothing", "--output", "y.pth"], "weights nothing do not exist"),
        (["--llava", "nothing", "--output", "no/where/y.pth"], "folder no/where does not exist"),
        (["--weights", "nothing", "--export", "{full}"], "exists already"),
        (["--mask2former", "{llava}", "--output", "y.pth"], "in no mask2former format"),
        (["--llava", "{llava}", "--seg-row", "99", "--output", "y.pth"], "row 99 of <SEG>"),
        (
            ["--weights", "{gella}", "--export", "y", "--max-shard-size", "much"],
            "--max-shard-size is 'much'",
        ),
    ],
)
def test_wrong_commands(sources, gella, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = {"full": sources, "llava": sources / "llava", "gella": gella}
    assert run(*(a.format(**places) for a in arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_parts_that_nobody_gave_are_named_with_their_option(sources, tmp_path, capsys):
    assert run("--llava", sources / "llava", "--output", tmp_path / "w.pth") == 2
    error = capsys.readouterr().err
    assert "missing, all of mask_decoder; give --mask2former" in error
    assert "missing, all of colormap_encoder; give --colormap-encoder" in error


def test_what_llava_has_no_place_for(gella, tmp_path, capsys):
    opts = [*tiny.OPTS, "MODEL.LANGUAGE.PROJECTOR", "linear"]
    state = {k: v for k, v in read_weights(gella).items() if ".projector." not in k}
    name = "language_decoder.projector."
    state |= {name + "weight": torch.ones(32, 32), name + "bias": torch.ones(32)}
    torch.save({"model": state}, tmp_path / "linear.pth")
    command = ("--weights", tmp_path / "linear.pth")
    assert run(*command, "--export-llava", tmp_path / "x", opts=opts) == 2
    assert "use --export-llava-original" in capsys.readouterr().err
    assert run(*command, "--export-llava-original", tmp_path / "x", opts=opts) == 0
    assert read_weights(tmp_path / "x")["model.mm_projector.weight"].shape == (32, 32)


def test_help_shows_both_ways(capsys):
    with pytest.raises(SystemExit) as caught:
        convert_weights.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ("--mask2former model_final", "--export gella_swin_t", "--colormap-encoder"):
        assert option in text


def test_the_page_names_every_format():
    page = Path(tiny.ROOT / "docs" / "WEIGHTS.md").read_text()
    from gella.weights import FORMATS

    for kind, layouts in FORMATS.items():
        for layout in layouts:
            assert f"`{layout.name}`" in page, kind


# -- from a training run ---------------------------------------------------------------------------


def test_from_zero_needs_a_place_and_nothing_else(capsys):
    assert run("--from-zero", "runs/iter_0000001") == 2
    assert "--from-zero goes with --output" in capsys.readouterr().err
    assert run("--from-zero", "runs/iter_0000001", "--output", "x.pth", "--clip", "c.pth") == 2
    assert "no other input" in capsys.readouterr().err


def test_from_zero_writes_what_was_put_together_if_it_fits(tmp_path, monkeypatch, capsys):
    """`consolidate` itself is compared with real checkpoints in tests/test_zero.py."""
    from detectron2.modeling import build_model

    from gella import load_config

    state = tiny.perturb(build_model(load_config(tiny.CONFIG, tiny.OPTS)), 4).state_dict()
    folder = tmp_path / "iter_0000009"
    folder.mkdir()
    monkeypatch.setattr(convert_weights, "consolidate", lambda path: dict(state))
    for output in (tmp_path / "model.pth", tmp_path / "shards"):
        assert run("--from-zero", folder, "--output", output) == 0
        assert same(read_weights(str(output)), state)
        assert f"MODEL.WEIGHTS {output}" in capsys.readouterr().out
    key = next(iter(state))
    monkeypatch.setattr(convert_weights, "consolidate", lambda path: {key: state[key]})
    assert run("--from-zero", folder, "--output", tmp_path / "other.pth") == 2
    assert "missing" in capsys.readouterr().err and not (tmp_path / "other.pth").exists()


# -- from the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(sources, tmp_path, monkeypatch):
    """A hub's cache with a LLaVA, a tokenizer and a colormap encoder, no network; the overrides."""
    from huggingface_hub import constants

    timm_folder = tmp_path / "lcnet"
    timm_folder.mkdir()
    save_file(read_weights(sources / "lcnet.pth"), timm_folder / "model.safetensors")
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.model").write_bytes(b"a SentencePiece model")
    (words / "pytorch_model.bin").write_bytes(b"much larger")
    models = {"LLAVA": sources / "llava", "COLORMAP_ENCODER": timm_folder, "TOKENIZER": words}
    names = tiny.fill_hub(tmp_path / "cache", models)
    names["LLAVA"] = names["LLAVA"].split("@")[0]  # what main is
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    places = {"WEIGHTS": "made/first/tiny", "LANGUAGE.TOKENIZER": "made/tokenizers/tiny"}
    keys = {f"HUB.{kind}": name for kind, name in names.items()} | places
    keys["WEIGHTS_ALLOW_MISSING"] = "['mask_decoder.*']"
    return [*tiny.OPTS, *(part for key, value in keys.items() for part in (f"MODEL.{key}", value))]


def test_one_command_makes_weights_and_tokenizer(hub, gella, capsys):
    assert run("--from-hub", opts=hub) == 0
    text = capsys.readouterr().out
    made, wanted = read_weights("made/first/tiny"), read_weights(gella)
    assert same(part(made, "colormap_encoder", "image_encoder"),
                part(wanted, "colormap_encoder", "image_encoder"))  # fmt: skip
    language = part(wanted, "language_decoder")
    assert same(part(made, "language_decoder"), {k: t.bfloat16() for k, t in language.items()})
    assert [p.name for p in Path("made/tokenizers/tiny").iterdir()] == ["tokenizer.model"]
    card = Path("made/first/tiny/README.md").read_text()
    assert f"- llava: tiny/LLAVA of the Hugging Face hub, {1:040x}" in card
    assert "/model-00001-of-" in card and "bfloat16, float32" in card
    assert f"next: python tools/train_net.py --config-file {tiny.CONFIG}\n" in text
    # what is there stays, and what is missing is made alone
    shutil.rmtree("made/tokenizers")
    before = Path("made/first/tiny/README.md").stat().st_mtime_ns
    assert run("--from-hub", opts=hub) == 0
    assert "is there already" in capsys.readouterr().out and Path("made/tokenizers/tiny").is_dir()
    assert Path("made/first/tiny/README.md").stat().st_mtime_ns == before
    next(Path("made/first/tiny").glob("*.safetensors")).unlink()
    assert run("--from-hub", opts=hub) == 2
    assert "are missing: model" in capsys.readouterr().err


def test_a_file_of_ones_own_is_not_downloaded(hub, sources):
    opts = [*hub, "MODEL.HUB.COLORMAP_ENCODER", "tiny/absent"]
    own = ("--colormap-encoder", sources / "lcnet.pth", "--output", "own.pth")
    assert run("--from-hub", *own, "--dtype", "float16", opts=opts) == 0
    assert {t.dtype for t in read_weights("own.pth").values() if t.is_floating_point()} == {
        torch.float16
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["MODEL.HUB.LLAVA", ""], "sets no MODEL.HUB.LLAVA"),
        (["MODEL.WEIGHTS", ""], "sets no MODEL.WEIGHTS"),
        (["MODEL.HUB.LLAVA", "tiny/absent"], "tiny/absent (MODEL.HUB) was not downloaded: "),
        ([], "0.0 GB are needed on the disk of "),
    ],
)
def test_what_stops_from_hub_is_one_line(hub, capsys, monkeypatch, changes, message):
    if not changes:
        full = shutil.disk_usage("/")._replace(free=5)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert run("--from-hub", opts=[*hub, *changes]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not Path("made/first").exists()


def test_what_is_fetched_is_pinned_counted_and_no_more_than_needed(monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only, dry_run=False):
        calls.append((name, revision, dry_run))
        kept = list(huggingface_hub.utils.filter_repo_objects(FILES, allow_patterns=allow_patterns))
        if not dry_run:
            return str(tmp_path / revision)
        sizes = {"file_size": 10**15, "is_cached": False, "local_path": ""}
        info = huggingface_hub.DryRunFileInfo
        fetched.extend(kept)
        return [info(commit_hash="c0ffee", filename=f, will_download=large, **sizes) for f in kept]

    FILES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    FILES += ["config.json", "tokenizer.json", "tokenizer.model", "README.md"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetched, large = [], False
    names = {"llava": "a/b@abc", "tokenizer": "a/c"}
    folders = download(names, tmp_path / "new" / "out", 1)
    assert fetched == [*FILES[:2], "config.json", "tokenizer.json", "tokenizer.model"]
    assert calls[2:] == [("a/b", "c0ffee", False), ("a/c", "c0ffee", False)]
    assert folders == {"llava": tmp_path / "c0ffee", "tokenizer": tmp_path / "c0ffee"}
    large = True
    with pytest.raises(OSError, match=r"5000000\.0 GB are needed on the disk of .*, \d+\.\d GB"):
        download(names, tmp_path / "new" / "out", 1)

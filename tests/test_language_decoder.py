"""The language decoder against transformers' own LLaMA, and against itself one sample at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from tiny_language import EOS, PAD, VOCAB, make_batch, make_config, make_decoder

from gella.config import add_gella_config
from gella.modeling.language_decoder import (
    IGNORE_INDEX,
    LanguageDecoder,
    build_causal_lm,
    llama_config,
    read_config,
)


def test_equals_transformers_on_the_same_embeddings():
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([9])
    output = decoder(grid, input_ids, labels, positions)
    tokens = decoder.projector(grid[0].flatten(1).T)
    words = decoder.llama.get_input_embeddings()(input_ids[0].clamp(min=0))
    embeds = torch.cat([words[:1], tokens, words[5:]])[None]
    reference = decoder.llama(inputs_embeds=embeds, labels=labels[0][None], use_cache=False)
    hidden = decoder.llama.model(inputs_embeds=embeds).last_hidden_state[0]
    assert torch.allclose(output.loss_answer, reference.loss, atol=1e-6)
    assert torch.allclose(output.seg_embeddings[0], hidden[positions[0]], atol=1e-6)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_a_padded_batch_equals_its_samples_in_fused_attention(projector, monkeypatch):
    decoder, asked = make_decoder(projector), []
    plain = F.scaled_dot_product_attention

    def noting(*args, attn_mask=None, is_causal=False, **options):
        asked.append((attn_mask, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    grid, input_ids, labels, positions = make_batch([5, 14, 9])
    joint = decoder(grid, input_ids, labels, positions)
    # A mask would keep PyTorch from its fused kernels.
    assert asked == [(None, True)] * decoder.llama.config.num_hidden_layers
    total = 0.0
    for i in range(3):
        single = decoder(
            grid[i : i + 1], input_ids[i : i + 1], labels[i : i + 1], positions[i : i + 1]
        )
        assert torch.allclose(joint.seg_embeddings[i], single.seg_embeddings[0], atol=1e-5)
        total += single.loss_answer.item()
    assert float(joint.loss_answer) == pytest.approx(total / 3, abs=1e-5)


def test_no_supervised_token_gives_zero_with_a_gradient():
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([6])
    labels = [torch.full_like(labels[0], IGNORE_INDEX)]
    loss = decoder(grid, input_ids, labels, positions).loss_answer
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert decoder.projector[0].weight.grad is not None


def test_image_tokens_follow_the_grid_and_are_pooled():
    grid = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 6, 4, 4)
    pooled = make_decoder(stride=2)
    tokens = pooled.image_tokens(grid)
    expected = pooled.projector(F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2))
    assert tokens.shape == (1, 4, 32)
    assert torch.equal(tokens, expected)
    assert make_decoder().image_tokens(grid).shape == (1, 16, 32)


def test_wrong_input_is_named():
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([6], image_tokens=3)
    with pytest.raises(ValueError, match="3 image placeholders, the image gives 4"):
        decoder(grid, input_ids, labels, positions)
    grid, input_ids, labels, positions = make_batch([70])
    with pytest.raises(ValueError, match="75 tokens, MODEL.LANGUAGE.MAX_POSITIONS is 64"):
        decoder(grid, input_ids, labels, positions)
    with pytest.raises(ValueError, match="one of 'mlp2x_gelu', 'linear'"):
        make_decoder(projector="mlp")


# -- precision and memory --------------------------------------------------------------------------


def test_bfloat16_is_finite_and_close():
    decoder = make_decoder()
    batch = make_batch([5, 8])
    full = decoder(*batch)
    half = decoder.to(torch.bfloat16)(batch[0].to(torch.bfloat16), *batch[1:])
    assert half.loss_answer.dtype == torch.float32
    assert float(half.loss_answer) == pytest.approx(float(full.loss_answer), rel=0.05)


def test_bfloat16_parameters_take_and_give_float32():
    """The rest of the model stays float32, whatever MODEL.LANGUAGE.DTYPE is."""
    batch = make_batch([5, 8])
    decoder = make_decoder(dtype="bfloat16")
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    output = decoder(*batch)
    assert output.seg_embeddings[0].dtype == torch.float32
    expected = make_decoder()(*batch)
    assert float(output.loss_answer) == pytest.approx(float(expected.loss_answer), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_runs_forward_and_backward(checkpointing):
    decoder = make_decoder(gradient_checkpointing=checkpointing).train()
    batch = make_batch([5, 8])
    exact = float(decoder(*batch).loss_answer)
    with torch.autocast("cpu", torch.bfloat16):
        output = decoder(*batch)
        loss = output.loss_answer + sum(e.square().mean() for e in output.seg_embeddings)
    loss.backward()
    assert float(output.loss_answer) == pytest.approx(exact, rel=0.05)
    gradients = [p.grad for p in decoder.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert max(float(g.abs().max()) for g in gradients) > 0


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = make_batch([5, 14, 9])
    calls = {}
    plain, saving = make_decoder().train(), make_decoder(gradient_checkpointing=True).train()
    for name, decoder in (("plain", plain), ("saving", saving)):
        layer = decoder.llama.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1}))
        output = decoder(*batch)
        (output.loss_answer + sum(e.sum() for e in output.seg_embeddings)).backward()
    assert calls == {"plain": 1, "saving": 2}  # it does compute the layers again
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_by_key(attention):
    decoder = make_decoder(attention=attention)
    assert decoder.llama.config._attn_implementation == attention
    batch = make_batch([5, 14])
    loss = float(decoder(*batch).loss_answer)
    assert loss == pytest.approx(float(make_decoder()(*batch).loss_answer), abs=1e-5)


def test_logits_are_computed_at_supervised_positions_only():
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([5, 14])
    shapes = []
    head = decoder.llama.get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    decoder(grid, input_ids, labels, positions)
    supervised = sum(int((label[1:] != IGNORE_INDEX).sum()) for label in labels)
    assert shapes == [(supervised, VOCAB)]


# -- other architectures ---------------------------------------------------------------------------


def language_node(**changes: Any) -> Any:
    cfg = get_cfg()
    add_gella_config(cfg)
    node = cfg.MODEL.LANGUAGE
    sizes = dict(VOCAB_SIZE=VOCAB, HIDDEN_SIZE=32, INTERMEDIATE_SIZE=48, NUM_LAYERS=1)
    sizes.update(NUM_HEADS=4, NUM_KEY_VALUE_HEADS=4, MAX_POSITIONS=64, **changes)
    for key, value in sizes.items():
        setattr(node, key, value)
    return cfg


@pytest.mark.parametrize("kind", ["Qwen2Config", "MistralConfig", "PhiConfig", "GPTNeoXConfig"])
def test_another_architecture_through_its_config_file(tmp_path, kind):
    make_config(kind).save_pretrained(tmp_path)
    cfg = language_node(CONFIG=str(tmp_path), HIDDEN_SIZE=999)
    cfg.MODEL.LANGUAGE.VOCAB_SIZE = VOCAB + 1
    torch.manual_seed(0)
    decoder = LanguageDecoder(cfg, 6).eval()
    assert decoder.llama.config.model_type.replace("_", "") in kind.lower()
    assert decoder.hidden_size == 32  # the file's, not the key's
    assert decoder.llama.get_input_embeddings().num_embeddings == VOCAB + 1
    grid, input_ids, labels, positions = make_batch([5, 14])
    joint = decoder(grid, input_ids, labels, positions)
    single = decoder(grid[:1], input_ids[:1], labels[:1], positions[:1])
    assert torch.allclose(joint.seg_embeddings[0], single.seg_embeddings[0], atol=1e-5)
    # The model's own loss, of its own logits at every position.
    words = decoder.llama.get_input_embeddings()(input_ids[0].clamp(min=0))
    embeds = torch.cat([words[:1], decoder.image_tokens(grid)[0], words[5:]])[None]
    reference = decoder.llama(inputs_embeds=embeds, labels=labels[0][None], use_cache=False).loss
    assert torch.allclose(single.loss_answer, reference, atol=1e-5)
    options = dict(max_new_tokens=6, eos_token_id=EOS, pad_token_id=PAD)
    together = decoder.generate(grid, input_ids, **options)
    assert torch.equal(together[0], decoder.generate(grid[:1], input_ids[:1], **options)[0])


def test_a_multimodal_config_gives_its_language_part(tmp_path):
    from transformers import CLIPVisionConfig, LlavaConfig

    LlavaConfig(vision_config=CLIPVisionConfig(), text_config=make_config()).save_pretrained(
        tmp_path
    )
    config = read_config(str(tmp_path), vocab_size=VOCAB + 1, max_positions=64)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, VOCAB + 1)


def test_wrong_config_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL.LANGUAGE.CONFIG is '.*none'"):
        read_config(str(tmp_path / "none"), vocab_size=VOCAB, max_positions=64)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match="no model that transformers knows"):
        read_config(str(tmp_path), vocab_size=VOCAB, max_positions=64)
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ValueError, match="no model that transformers knows"):
        read_config(str(tmp_path), vocab_size=VOCAB, max_positions=64)
    write_t5(tmp_path)
    with pytest.raises(ValueError, match="'t5', which is no causal language model"):
        read_config(str(tmp_path), vocab_size=VOCAB, max_positions=64)
    make_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="50 words, MODEL.LANGUAGE.VOCAB_SIZE is 49: set it to 51"):
        read_config(str(tmp_path), vocab_size=VOCAB - 1, max_positions=64)
    with pytest.raises(ValueError, match="64 positions, MODEL.LANGUAGE.MAX_POSITIONS is 65"):
        read_config(str(tmp_path), vocab_size=VOCAB, max_positions=65)


def write_t5(folder: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=VOCAB).save_pretrained(folder)


def test_unknown_choices_are_named():
    config = make_config()
    with pytest.raises(ValueError, match=r"ATTENTION is 'flash'; it must be one of 'sdpa'"):
        build_causal_lm(config, attention="flash")
    with pytest.raises(ValueError, match=r"DTYPE is 'half'; it must be one of 'float32'"):
        build_causal_lm(config, dtype="half")
    with pytest.raises(ValueError, match=r"QUANTIZATION is '2bit'"):
        make_decoder(quantization="2bit")
    with pytest.raises(ValueError, match="PROMPT_LOOKUP_TOKENS is -1; 0 turns it off"):
        make_decoder(prompt_lookup_tokens=-1)
    # Its logits are capped behind the output layer.
    with pytest.raises(ValueError, match=r"gemma2 with final_logit_softcapping = 30\.0"):
        build_causal_lm(make_config("Gemma2Config", head_dim=8))


def test_missing_fused_attention_is_named():
    pytest.importorskip("transformers")
    if has_flash_attention():
        pytest.skip("flash-attn is installed")
    with pytest.raises(ValueError, match=r"'flash_attention_2', which is not available here"):
        build_causal_lm(make_config(), attention="flash_attention_2", dtype="bfloat16")


def has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def test_size_keys_reach_the_model():
    cfg = language_node(INIT_STD=0.5, TIE_EMBEDDINGS=True, ROPE_THETA=500.0)
    config = llama_config(copy.deepcopy(cfg.MODEL.LANGUAGE))
    assert config.rope_parameters["rope_theta"] == 500.0
    torch.manual_seed(0)
    decoder = LanguageDecoder(cfg, 6)
    model = decoder.llama
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert float(model.get_output_embeddings().weight.detach().std()) == pytest.approx(0.5, rel=0.1)
    assert decoder.max_positions == 64

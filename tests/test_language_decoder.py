"""The language decoder against transformers' own LLaMA, and against itself one sample at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from refusals import refused
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
    decoder, batch, asked = make_decoder(projector), make_batch([5, 14, 9]), []
    plain = F.scaled_dot_product_attention

    def noting(*args, attn_mask=None, is_causal=False, **options):
        asked.append((attn_mask, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    joint = decoder(*batch)
    # A mask would keep PyTorch from its fused kernels.
    assert asked == [(None, True)] * decoder.llama.config.num_hidden_layers
    singles = [decoder(*(part[i : i + 1] for part in batch)) for i in range(3)]
    for i, single in enumerate(singles):
        assert torch.allclose(joint.seg_embeddings[i], single.seg_embeddings[0], atol=1e-5)
    mean = sum(float(single.loss_answer) for single in singles) / 3
    assert float(joint.loss_answer) == pytest.approx(mean, abs=1e-5)


def test_no_supervised_token_gives_zero_with_a_gradient():
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([6])
    labels = [torch.full_like(labels[0], IGNORE_INDEX)]
    loss = decoder(grid, input_ids, labels, positions).loss_answer
    loss.backward()
    assert float(loss.detach()) == 0.0 and decoder.projector[0].weight.grad is not None


def test_image_tokens_follow_the_grid_and_are_pooled():
    grid, pooled = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 6, 4, 4), make_decoder(stride=2)
    expected = pooled.projector(F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2))
    assert expected.shape == (1, 4, 32) and torch.equal(pooled.image_tokens(grid), expected)
    assert make_decoder().image_tokens(grid).shape == (1, 16, 32)


def test_wrong_input_is_named():
    decoder = make_decoder()
    few = make_batch([6], image_tokens=3)
    refused("3 image placeholders, the image gives 4", decoder, *few)
    refused("75 tokens, MODEL.LANGUAGE.MAX_POSITIONS is 64", decoder, *make_batch([70]))
    refused("one of 'mlp2x_gelu', 'linear'", make_decoder, projector="mlp")


def test_bfloat16_parameters_give_float32_and_are_close():
    batch, decoder = make_batch([5, 8]), make_decoder(dtype="bfloat16")
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    exact = make_decoder()
    exact.load_state_dict(decoder.state_dict())  # older PyTorch draws other numbers in bfloat16
    full = float(exact(*batch).loss_answer)
    for grid in (batch[0], batch[0].to(torch.bfloat16)):
        output = decoder(grid, *batch[1:])
        assert output.seg_embeddings[0].dtype == grid.dtype
        assert output.loss_answer.dtype == torch.float32
        assert float(output.loss_answer) == pytest.approx(full, rel=0.05)


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
    batch, calls = make_batch([5, 14, 9]), {False: 0, True: 0}
    decoders = [make_decoder(gradient_checkpointing=saving).train() for saving in calls]
    for saving, decoder in zip(calls, decoders):
        layer = decoder.llama.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, n=saving: calls.update({n: calls[n] + 1}))
        output = decoder(*batch)
        (output.loss_answer + sum(e.sum() for e in output.seg_embeddings)).backward()
    assert calls == {False: 1, True: 2}  # it does compute the layers again
    for (name, a), (_, b) in zip(*(decoder.named_parameters() for decoder in decoders)):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_by_key(attention):
    decoder, batch = make_decoder(attention=attention), make_batch([5, 14])
    assert decoder.llama.config._attn_implementation == attention
    loss = float(decoder(*batch).loss_answer)
    assert loss == pytest.approx(float(make_decoder()(*batch).loss_answer), abs=1e-5)


def test_logits_are_computed_at_supervised_positions_only():
    decoder, batch, shapes = make_decoder(), make_batch([5, 14]), []
    head = decoder.llama.get_output_embeddings()
    head.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    decoder(*batch)
    supervised = sum(int((label[1:] != IGNORE_INDEX).sum()) for label in batch[2])
    assert shapes == [(supervised, VOCAB)]


def language_node(**changes):
    cfg = get_cfg()
    add_gella_config(cfg)
    sizes = dict(VOCAB_SIZE=VOCAB, HIDDEN_SIZE=32, INTERMEDIATE_SIZE=48, NUM_LAYERS=1)
    sizes |= dict(NUM_HEADS=4, NUM_KEY_VALUE_HEADS=4, MAX_POSITIONS=64, **changes)
    for key, value in sizes.items():
        setattr(cfg.MODEL.LANGUAGE, key, value)
    return cfg


@pytest.mark.parametrize("kind", ["Qwen2Config", "MistralConfig", "PhiConfig", "GPTNeoXConfig"])
def test_another_architecture_through_its_config_file(tmp_path, kind):
    make_config(kind).save_pretrained(tmp_path)
    torch.manual_seed(0)
    cfg = language_node(CONFIG=str(tmp_path), HIDDEN_SIZE=999, VOCAB_SIZE=VOCAB + 1)
    decoder = LanguageDecoder(cfg, 6).eval()
    llama, embedding = decoder.llama, decoder.llama.get_input_embeddings()
    assert llama.config.model_type.replace("_", "") in kind.lower()
    assert decoder.hidden_size == 32  # the file's, not the key's
    assert embedding.num_embeddings == VOCAB + 1
    grid, input_ids, labels, positions = batch = make_batch([5, 14])
    joint, single = decoder(*batch), decoder(*(part[:1] for part in batch))
    assert torch.allclose(joint.seg_embeddings[0], single.seg_embeddings[0], atol=1e-5)
    # The model's own loss, of its own logits at every position.
    words = embedding(input_ids[0].clamp(min=0))
    embeds = torch.cat([words[:1], decoder.image_tokens(grid)[0], words[5:]])[None]
    reference = llama(inputs_embeds=embeds, labels=labels[0][None], use_cache=False).loss
    assert torch.allclose(single.loss_answer, reference, atol=1e-5)
    options = dict(max_new_tokens=6, eos_token_id=EOS, pad_token_id=PAD)
    together = decoder.generate(grid, input_ids, **options)
    assert torch.equal(together[0], decoder.generate(grid[:1], input_ids[:1], **options)[0])


def test_config_folders_multimodal_and_wrong(tmp_path):
    from transformers import CLIPVisionConfig, LlavaConfig, T5Config

    def read(vocab_size=VOCAB, max_positions=64, folder=tmp_path):
        return read_config(str(folder), vocab_size=vocab_size, max_positions=max_positions)

    whole = LlavaConfig(vision_config=CLIPVisionConfig(), text_config=make_config())
    whole.save_pretrained(tmp_path)
    config = read(VOCAB + 1)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, VOCAB + 1)
    none = tmp_path / "none"
    refused("MODEL.LANGUAGE.CONFIG is '.*none'", read, folder=none, error=FileNotFoundError)
    for text in ('{"model_type": "no_such_model"}', '{"model_type": "llama", '):
        (tmp_path / "config.json").write_text(text)
        refused("no model that transformers knows", read)
    T5Config(vocab_size=VOCAB).save_pretrained(tmp_path)
    refused("'t5', which is no causal language model", read)
    make_config().save_pretrained(tmp_path)
    told = "50 words, MODEL.LANGUAGE.VOCAB_SIZE is 49: set it to 51"
    refused(told, read, VOCAB - 1)
    refused("64 positions, MODEL.LANGUAGE.MAX_POSITIONS is 65", read, max_positions=65)


def test_unknown_choices_are_named():
    config = make_config()
    with pytest.raises(ValueError, match=r"ATTENTION is 'flash'; it must be one of 'sdpa'"):
        build_causal_lm(config, attention="flash")
    refused(r"DTYPE is 'half'; it must be one of 'float32'", build_causal_lm, config, dtype="half")
    refused(r"QUANTIZATION is '2bit'", make_decoder, quantization="2bit")
    refused("PROMPT_LOOKUP_TOKENS is -1; 0 turns it off", make_decoder, prompt_lookup_tokens=-1)
    with pytest.raises(ValueError, match=r"gemma2 with final_logit_softcapping = 30\.0"):
        build_causal_lm(make_config("Gemma2Config", head_dim=8))


def test_missing_fused_attention_is_named():
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    told, options = "'flash_attention_2', which is not available here", {"dtype": "bfloat16"}
    refused(told, build_causal_lm, make_config(), attention="flash_attention_2", **options)


def test_size_keys_reach_the_model():
    cfg = language_node(INIT_STD=0.5, TIE_EMBEDDINGS=True, ROPE_THETA=500.0)
    config = llama_config(copy.deepcopy(cfg.MODEL.LANGUAGE))
    assert config.rope_parameters["rope_theta"] == 500.0
    torch.manual_seed(0)
    decoder = LanguageDecoder(cfg, 6)
    weights = decoder.llama.get_output_embeddings().weight
    assert decoder.llama.get_input_embeddings().weight is weights and decoder.max_positions == 64
    assert float(weights.detach().std()) == pytest.approx(0.5, rel=0.1)

"""LoRA adapters and quantised weights of the language decoder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_language import EOS, PAD, make_batch, make_config, make_decoder
from torch import nn

from gella.modeling.language_decoder import LanguageDecoder
from gella.weights.checkpoint import check_state_dict, load_weights

TARGETS = ["q_proj", "down_proj"]
GENERATION = dict(max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD)


def lora(**changes: Any) -> dict[str, Any]:
    pytest.importorskip("peft")
    options = dict(rank=4, alpha=8, dropout=0.0, targets=TARGETS, train_embeddings=False)
    return {**options, **changes}


def randomise_adapters(decoder: LanguageDecoder) -> None:
    """As after training: adapters start at zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in decoder.named_parameters():
        if ".lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.3 * noise.to(parameter.dtype)


def seg_embeddings(decoder: LanguageDecoder) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(decoder(*make_batch([5, 14])).seg_embeddings)


class Whole(nn.Module):
    """A model that holds the decoder where GELLA does."""

    def __init__(self, decoder: LanguageDecoder) -> None:
        super().__init__()
        self.language_decoder = decoder


def checkpoint_options(missing: list[str]) -> Any:
    keys = dict(WEIGHTS_ALLOW_MISSING=missing, WEIGHTS_ALLOW_UNEXPECTED=[])
    return SimpleNamespace(MODEL=SimpleNamespace(**keys))


# -- LoRA ------------------------------------------------------------------------------------------


def test_new_adapters_change_nothing():
    assert torch.equal(seg_embeddings(make_decoder(lora=lora())), seg_embeddings(make_decoder()))


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_adapters_and_named_parts_train_and_nothing_else(train_embeddings):
    decoder = make_decoder(
        lora=lora(train_embeddings=train_embeddings), gradient_checkpointing=True
    )
    randomise_adapters(decoder)
    decoder.train()
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    output = decoder(*make_batch([5, 14]))
    (output.loss_answer + sum(e.sum() for e in output.seg_embeddings)).backward()
    optimizer.step()
    changed = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    adapters = {
        f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    expected = {
        f"llama.model.{layer}.{side}.default.weight"
        for layer in adapters
        for side in ("lora_A", "lora_B")
    }
    expected |= {f"projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    if train_embeddings:
        expected |= {"llama.model.embed_tokens.weight", "llama.lm_head.weight"}
    assert changed == expected


def test_keys_are_those_of_the_plain_decoder_and_the_adapters():
    plain, adapted = make_decoder().state_dict(), make_decoder(lora=lora()).state_dict()
    assert set(plain) <= set(adapted)
    assert len(set(adapted) - set(plain)) == 8
    assert all(".lora_" in key for key in set(adapted) - set(plain))
    assert all(torch.equal(adapted[key], plain[key]) for key in plain)


def save(decoder: LanguageDecoder, folder: Path) -> str:
    torch.save({"model": Whole(decoder).state_dict()}, folder / "model.pth")
    return str(folder / "model.pth")


def test_checkpoints_without_and_with_adapters_load_strictly(tmp_path):
    trained = make_decoder()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    path = save(trained, tmp_path)
    adapted = make_decoder(lora=lora())
    with pytest.raises(ValueError, match=r"8 missing: language_decoder\.llama\..*lora_A"):
        load_weights(Whole(adapted), path, checkpoint_options([]))
    load_weights(Whole(adapted), path, checkpoint_options(["*.lora_*"]))
    assert torch.equal(seg_embeddings(adapted), seg_embeddings(trained))
    randomise_adapters(adapted)
    path, fresh = save(adapted, tmp_path), make_decoder(lora=lora())
    load_weights(Whole(fresh), path, checkpoint_options([]))
    assert torch.equal(seg_embeddings(fresh), seg_embeddings(adapted))
    assert not torch.allclose(seg_embeddings(fresh), seg_embeddings(trained))
    with pytest.raises(ValueError, match="8 unexpected"):
        load_weights(Whole(make_decoder()), path, checkpoint_options(["*.lora_*"]))


def test_merged_equals_unmerged_and_is_a_plain_decoder():
    decoder = make_decoder(lora=lora())
    randomise_adapters(decoder)
    grid, input_ids, _, _ = make_batch([5, 14])
    before = seg_embeddings(decoder), decoder.generate(grid, input_ids, **GENERATION)
    assert not torch.allclose(before[0], seg_embeddings(make_decoder()), atol=1e-2)
    decoder.merge_adapters()
    plain = make_decoder()
    check_state_dict(decoder.state_dict(), plain, source="merged")
    plain.load_state_dict(decoder.state_dict())
    for merged in (decoder, plain):
        assert torch.allclose(seg_embeddings(merged), before[0], atol=1e-5)
        answers = merged.generate(grid, input_ids, **GENERATION)
        assert [a.tolist() for a in answers] == [a.tolist() for a in before[1]]
    assert [type(m) for m in decoder.llama.modules()] == [type(m) for m in plain.llama.modules()]
    assert all(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_what_trains_beside_half_precision_weights_is_float32_and_moves(tied, autocast):
    config = make_config(tie_word_embeddings=tied)
    decoder = make_decoder(config=config, dtype="bfloat16", lora=lora(train_embeddings=True))
    randomise_adapters(decoder)
    trained = {n: p for n, p in decoder.train().named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {n.split(".")[0] for n in trained} == {"projector", "llama"} and len(trained) > 12
    kept = decoder.llama.model.layers[0].mlp.up_proj.weight
    assert kept.dtype == torch.bfloat16 and not kept.requires_grad
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), 1e-5, weight_decay=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = decoder(*make_batch([5, 14]))
    (output.loss_answer + sum(e.float().sum() for e in output.seg_embeddings)).backward()
    optimizer.step()
    for name, parameter in trained.items():
        touched = parameter.grad != 0
        assert touched.any() and (parameter != before[name])[touched].float().mean() > 0.99, name
    exact = make_decoder(config=config, lora=lora(train_embeddings=True))
    exact.load_state_dict({n: t.float() for n, t in decoder.state_dict().items()})
    expected, found = exact.train()(*make_batch([5])), decoder(*make_batch([5]))
    assert found.loss_answer.item() == pytest.approx(expected.loss_answer.item(), rel=0.05)


def test_wrong_adapter_options_are_named():
    with pytest.raises(ValueError, match=r"TARGETS \['query'\] name no layer.*'gate_proj', "):
        make_decoder(lora=lora(targets=["q_proj", "query"]))
    with pytest.raises(ValueError, match=r"TARGETS \[\] name no layer"):
        make_decoder(lora=lora(targets=[]))
    with pytest.raises(ValueError, match="RANK is 0; it must be at least 1"):
        make_decoder(lora=lora(rank=0))


# -- quantised weights -----------------------------------------------------------------------------


def quantized(kind: str, **options: Any) -> LanguageDecoder:
    """A decoder whose rows are a whole number of 4-bit blocks, with fixed weights, not used yet."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    config = make_config(hidden_size=64, intermediate_size=128)
    return make_decoder(config=config, quantization=kind, **options)


def test_8_bit_weights_are_rounded_to_127_steps_a_row():
    exact, rounded = quantized(""), quantized("8bit")
    assert 0 < float((seg_embeddings(exact) - seg_embeddings(rounded)).abs().max()) < 1.0
    state = rounded.state_dict()
    for key, weight in exact.state_dict().items():
        if not key.endswith("_proj.weight"):
            assert torch.equal(state[key], weight), key  # norms, embeddings, lm_head, projector
            continue
        step = weight.abs().amax(1, keepdim=True) / 127
        assert float(((state[key] - weight) / step).abs().max()) < 0.55, key
        places = state[key] / step
        assert torch.allclose(places, places.round(), atol=0.1), key  # scales are of half precision
    storage = {type(p).__name__: p.dtype for p in rounded.llama.parameters()}
    assert storage["Int8Params"] == torch.int8


# QLoRA, appendix E: the values of a 4-bit normal float.
NF4 = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0]
NF4 += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]


def test_4_bit_weights_are_rounded_to_normal_floats():
    exact, rounded = quantized(""), quantized("4bit")
    seg_embeddings(rounded)
    state = rounded.state_dict()
    for key, weight in exact.state_dict().items():
        if not key.endswith("_proj.weight"):
            assert torch.equal(state[key], weight), key
            continue
        blocks = weight.reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        codes = torch.tensor(NF4)
        values = state[key].reshape(-1, 64) / scale
        to_codes = (values[..., None] - codes).abs().amin(-1)
        assert float(to_codes.max()) < 1e-3, key
        best = ((blocks / scale)[..., None] - codes).abs().amin(-1)
        assert ((values - blocks / scale).abs() <= best + 1e-3).all(), key
    packed = rounded.llama.model.layers[0].mlp.up_proj.weight
    assert packed.dtype == torch.uint8 and packed.numel() == 64 * 128 // 2


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_weights_come_from_an_ordinary_checkpoint(kind, tmp_path):
    trained = quantized("")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.2)
    path, decoder = save(trained, tmp_path), quantized(kind)
    load_weights(Whole(decoder), path, checkpoint_options([]))
    first = seg_embeddings(decoder)
    # What it saves is plain again, and rounding it once more changes nothing.
    save(decoder, tmp_path)
    again = quantized(kind)
    load_weights(Whole(again), path, checkpoint_options([]))
    assert torch.equal(seg_embeddings(again), first)
    plain = quantized("")
    load_weights(Whole(plain), path, checkpoint_options([]))
    error = (seg_embeddings(plain) - first).abs().max()
    # 8-bit products round their inputs too.
    assert float(error) < (0.5 if kind == "8bit" else 1e-4)
    with pytest.raises(ValueError, match="quantised.*newly built model"):
        load_weights(Whole(decoder), path, checkpoint_options([]))


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_generation_is_greedy(kind):
    decoder = quantized(kind, prompt_lookup_tokens=4, dtype="bfloat16")
    grid, input_ids, _, _ = make_batch([9])
    answer = decoder.generate(grid, input_ids, **GENERATION)[0]
    assert len(answer) == 8
    assert decoder.generate(grid, input_ids, snippets=[], **GENERATION)[0].shape == answer.shape


def test_quantised_weights_train_with_adapters_only():
    with pytest.raises(ValueError, match=r"QUANTIZATION '4bit' cannot be trained: .*LORA.ENABLED"):
        quantized("4bit").train()(*make_batch([5]))
    decoder = quantized("4bit", lora=lora()).train()
    randomise_adapters(decoder)
    base = quantized("4bit")
    assert not torch.allclose(seg_embeddings(decoder), seg_embeddings(base), atol=1e-2)
    decoder(*make_batch([5, 14])).loss_answer.backward()
    trained = {n for n, p in decoder.named_parameters() if p.grad is not None}
    assert {n for n in trained if ".lora_" not in n and "projector" not in n} == set()
    assert sum(".lora_" in n for n in trained) == 8
    assert set(base.state_dict()) == {n for n in decoder.state_dict() if ".lora_" not in n}
    with pytest.raises(ValueError, match="cannot be merged into quantised weights"):
        decoder.merge_adapters()


def test_weights_that_wait_for_rounding_stay_off_the_device():
    decoder = quantized("4bit").to("meta")
    assert {p.device.type for p in decoder.llama.parameters()} == {"cpu"}
    assert {p.device.type for p in decoder.projector.parameters()} == {"meta"}

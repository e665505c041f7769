"""A language decoder that is built without memory and filled, and its bfloat16 on any CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_language import make_batch, make_config, make_decoder
from torch.overrides import TorchFunctionMode

from gella.modeling import language_decoder
from gella.modeling.filling import built_empty

ADAPTERS = dict(rank=4, alpha=8, dropout=0.0, targets=["q_proj"], train_embeddings=True)
BUILDS = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "tied": {"config": make_config(tie_word_embeddings=True)},
    "another architecture": {"config": make_config("Qwen2Config")},
    "adapters": {"lora": ADAPTERS},
    "linear projector": {"projector": "linear"},
}


def make_empty(**options):
    with built_empty():
        decoder = make_decoder(**options)
    assert all(p.is_meta for p in decoder.to("cpu").parameters())
    return decoder


@pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
def test_a_filled_decoder_is_the_one_that_is_built_whole(options):
    """With its buffers, ties and frozen parts; also where an optimiser has its parameters."""
    if "lora" in options:
        pytest.importorskip("peft")
    whole, empty = make_decoder(**options), make_empty(**options)
    known = [id(p) for p in empty.parameters()]
    settled = []
    empty.fill(whole.state_dict(), torch.device("cpu"), seed=0, settle=settled.append)
    assert [id(p) for p in settled] == [id(p) for p in empty.parameters()] == known
    for ours, theirs in (
        (empty.named_parameters(), whole.named_parameters()),
        (empty.named_buffers(), whole.named_buffers()),
    ):
        for (name, found), (same, expected) in zip(ours, theirs, strict=True):
            assert name == same and torch.equal(found, expected)
            assert found.dtype == expected.dtype
            assert found.requires_grad == expected.requires_grad
    batch = make_batch([5, 14])
    for found, expected in zip(empty(*batch).seg_embeddings, whole(*batch).seg_embeddings):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
def test_what_no_file_gives_is_initialised_and_nothing_else(options):
    """To the spread that the constructor gives, from a seed; given weights stay as they are."""
    if "lora" in options:
        pytest.importorskip("peft")
    whole = make_decoder(**options).state_dict()
    given = {k: torch.full_like(v, 0.5) for k, v in whole.items() if k.endswith("layernorm.weight")}
    found = []
    for seed in (3, 3, 4):
        decoder = make_empty(**options)
        before = torch.get_rng_state()
        decoder.fill(given, torch.device("cpu"), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        found.append(decoder.state_dict())
    for key, expected in whole.items():
        assert torch.equal(found[0][key], found[1][key])
        if key in given:
            assert torch.equal(found[0][key], given[key])
            continue
        ours, spread = (float(x.float().std()) for x in (found[0][key], expected))
        assert ours == pytest.approx(spread, rel=0.3, abs=1e-6), key
        assert torch.equal(found[0][key], found[2][key]) == (expected.unique().numel() == 1), key


def test_values_that_follow_later_are_no_numbers():
    decoder = make_empty()
    decoder.fill(None, torch.device("cpu"), seed=0)
    assert all(p.isnan().all() for p in decoder.parameters()) and not decoder.is_empty


# -- bfloat16 on any CPU ---------------------------------------------------------------------------


class Products(TorchFunctionMode):
    """Notes the dtype of the weights of all linear products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.dtypes.append(args[1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("able", "gradients", "expected"),
    [
        (False, False, {torch.float32}),
        (False, True, {torch.bfloat16}),  # autograd would keep all float32 copies
        (True, False, {torch.bfloat16}),
    ],
)
def test_bfloat16_on_a_cpu_without_instructions_for_it(monkeypatch, able, gradients, expected):
    """Block by block the float32 product, rounded; where gradients are recorded as it was."""
    monkeypatch.setattr(language_decoder, "multiplies_bfloat16", lambda: able)
    monkeypatch.setattr(language_decoder, "_BLOCK", 300)
    config = make_config("Qwen2Config")  # with biases
    decoder, batch = make_decoder(dtype="bfloat16", config=config), make_batch([5, 14])
    with Products() as products, torch.set_grad_enabled(gradients):
        found = decoder(*batch)
    assert set(products.dtypes) == expected
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.Linear):
            whole = copy.deepcopy(layer).float()
            layer.forward = lambda x, whole=whole: whole(x.float()).bfloat16()
    with torch.no_grad():
        reference = decoder(*batch)
    for ours, theirs in zip(found.seg_embeddings, reference.seg_embeddings):
        assert torch.allclose(ours, theirs, atol=0.1, rtol=0.05)
    if expected == {torch.float32}:
        assert len(products.dtypes) > 15 * 3  # layers in blocks
        assert torch.allclose(found.loss_answer, reference.loss_answer, atol=1e-2)

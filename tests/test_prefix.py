"""What a language decoder read of an image once, against reading it with every question."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_language import EOS, PAD, SEG, make_batch, make_config, make_decoder

from gella.modeling.generation import Drafts, joined_cache, read_prefix, with_drafts
from gella.modeling.language_decoder import IGNORE_INDEX, IMAGE_TOKEN_ID, LanguageDecoder

KINDS = ["LlamaConfig", "Qwen2Config", "MistralConfig"]
OPTIONS: dict[str, int] = dict(max_new_tokens=16, eos_token_id=EOS, pad_token_id=PAD)
COUNT = 5  # the beginning and four image tokens


def read(decoder: LanguageDecoder, grid: torch.Tensor, ids: torch.Tensor) -> list:
    prefixes = decoder.remember(grid, ids[:COUNT])
    assert prefixes is not None
    return prefixes


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_and_loss_equal_those_of_whole_prompts(kind: str) -> None:
    config = make_config(kind, **({"sliding_window": 6} if kind == "MistralConfig" else {}))
    decoder = make_decoder(config=config)
    grid, input_ids, labels, positions = make_batch([9, 14, 6])
    prefixes = read(decoder, grid, input_ids[0])
    whole = decoder(grid, input_ids, labels, positions)
    for _ in range(2):  # a question leaves no trace
        rest = decoder(grid, input_ids, labels, positions, prefixes)
        for a, b in zip(whole.seg_embeddings, rest.seg_embeddings, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(whole.loss_answer, rest.loss_answer, atol=1e-5)
    # Another image's prefix gives another answer: it is not only the words that count.
    other = decoder(grid, input_ids, labels, positions, prefixes[::-1])
    assert (whole.seg_embeddings[0] - other.seg_embeddings[0]).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_rest_is_computed() -> None:
    decoder = make_decoder(prompt_lookup_tokens=4)
    grid, input_ids, labels, positions = make_batch([9, 14])
    prefixes = read(decoder, grid, input_ids[0])
    lengths: list[int] = []
    decoder.llama.base_model.register_forward_hook(
        lambda m, args, output: lengths.append(output.last_hidden_state.shape[1])
    )
    decoder(grid, input_ids, labels, positions, prefixes)
    decoder.generate(grid, input_ids, prefixes=prefixes, **OPTIONS)
    decoder.generate(grid[:1], input_ids[:1], prefixes=prefixes[:1], snippets=[], **OPTIONS)
    assert lengths[:2] == [14, 14] and set(lengths[2:]) <= {9, *range(1, 6)}
    assert lengths.count(9) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [False, True])
def test_answers_equal_those_of_whole_prompts(kind: str, drafts: bool) -> None:
    decoder = make_decoder(config=make_config(kind), prompt_lookup_tokens=5)
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[SEG] *= 2.0
    grid, input_ids, _, _ = make_batch([4, 9, 6])
    prefixes = read(decoder, grid, input_ids[0])
    before = [tensor.clone() for pair in prefixes[0].keys_values for tensor in pair]
    snippets = [[7, SEG, 8], [SEG, 9, 10]] if drafts else None
    joint = decoder.generate(grid, input_ids, snippets=snippets, prefixes=prefixes, **OPTIONS)
    for i in (2, 0, 1):
        one = slice(i, i + 1)
        plain = decoder.generate(grid[one], input_ids[one], snippets=snippets, **OPTIONS)[0]
        known = dict(snippets=snippets, prefixes=prefixes[one])
        again = decoder.generate(grid[one], input_ids[one], **known, **OPTIONS)[0]
        assert plain.tolist() == again.tolist() == joint[i].tolist()
    after = [tensor for pair in prefixes[0].keys_values for tensor in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_image_may_have_several_questions() -> None:
    decoder = make_decoder()
    grid, input_ids, _, _ = make_batch([4, 9, 6])
    (prefix,) = read(decoder, grid[:1], input_ids[0])
    joint = decoder.generate(grid[[0, 0, 0]], input_ids, prefixes=[prefix] * 3, **OPTIONS)
    for ids, answer in zip(input_ids, joint, strict=True):
        assert decoder.generate(grid[:1], [ids], **OPTIONS)[0].tolist() == answer.tolist()


def test_an_answer_ends_where_the_context_does(caplog: pytest.LogCaptureFixture) -> None:
    decoder = make_decoder(max_positions=24)
    grid, input_ids, _, _ = make_batch([12, 4])  # prompts of 17 and 9 tokens
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[EOS] = 0.0  # never the most probable
    prefixes = read(decoder, grid, input_ids[0])
    with caplog.at_level(logging.WARNING):
        answers = decoder.generate(
            grid, input_ids, prefixes=prefixes, **{**OPTIONS, "max_new_tokens": 12}
        )
    assert [len(a) for a in answers] == [7, 12] and "cut off after 7 tokens" in caplog.text
    # Streamed, as described: the same tokens, piece by piece behind the prompt's.
    pieces: list[list[int]] = []

    class Streamer:
        def put(self, ids: torch.Tensor) -> None:
            pieces.append(ids.flatten().tolist())

        def end(self) -> None:
            pieces.append([])

    known = dict(prefixes=prefixes[1:], streamer=Streamer())
    decoder.generate(grid[1:], input_ids[1:], **known, **{**OPTIONS, "max_new_tokens": 12})
    assert sum(pieces[1:], []) == answers[1].tolist() and len(pieces) > 10


def test_prompts_that_begin_otherwise_are_refused() -> None:
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([9])
    prefixes = read(decoder, grid, input_ids[0])
    for change, message in (
        (torch.cat([torch.tensor([3]), input_ids[0][1:]]), "does not begin with the 5 tokens"),
        (input_ids[0][:4], "does not begin with the 5 tokens"),
        (input_ids[0][:COUNT], "must go on in words behind the 5 tokens"),
        (torch.cat([input_ids[0], torch.tensor([IMAGE_TOKEN_ID])]), "must go on in words"),
    ):
        none = torch.full_like(change, IGNORE_INDEX)
        with pytest.raises(ValueError, match=message):
            decoder(grid, [change], [none], [torch.tensor([], dtype=torch.int64)], prefixes)
    with pytest.raises(ValueError, match="A prompt holds 3 image placeholders, the image gives 4"):
        decoder.remember(grid, input_ids[0][:4])
    with pytest.raises(ValueError, match="MAX_POSITIONS is 64"):
        decoder(grid, [input_ids[0].repeat(5)[:65]], labels, positions, prefixes)


def test_an_architecture_with_other_states_is_read_anew() -> None:
    class Recurrent:
        """Takes no part: it must not even be called."""

        config: Any = make_config("Qwen3NextConfig", num_hidden_layers=4, num_key_value_heads=2)

    assert read_prefix(Recurrent(), torch.zeros(1, 5, 32), torch.arange(5)) is None


def test_a_cache_of_one_s_own_goes_before_the_prompt() -> None:
    decoder = make_decoder()
    grid, (ids,), _, _ = make_batch([9])
    embeds, _ = decoder._embed(grid, [ids], "left")
    options = dict(num_drafted=0, max_new_tokens=8, eos_token_id=EOS)
    whole = with_drafts(decoder.llama, embeds, Drafts([]), **options)
    (prefix,) = read(decoder, grid, ids)
    rest = with_drafts(
        decoder.llama, embeds[:, COUNT:], Drafts([]), joined_cache([prefix]), **options
    )
    assert whole.tolist() == rest.tolist()

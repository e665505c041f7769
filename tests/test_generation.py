"""Answers: against a decoder without a cache, in batches, with drafts, prefixes, at the limits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_language import (
    EOS,
    IMAGE_DIM,
    PAD,
    SEG,
    VOCAB,
    make_batch,
    make_config,
    make_copier,
    make_decoder,
)

from gella.modeling.generation import Drafts, joined_cache, read_prefix, with_drafts
from gella.modeling.language_decoder import IGNORE_INDEX, IMAGE_TOKEN_ID, LanguageDecoder

OPTIONS: dict[str, int] = dict(max_new_tokens=16, eos_token_id=EOS, pad_token_id=PAD)


def uncached(decoder: LanguageDecoder, grid: torch.Tensor, ids: torch.Tensor, steps: int) -> list:
    """Greedy tokens by a full pass per token."""
    answer: list[int] = []
    for _ in range(steps):
        full = torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])
        words = decoder.llama.get_input_embeddings()(full.clamp(min=0))
        words[full == IMAGE_TOKEN_ID] = decoder.image_tokens(grid)[0]
        token = int(
            decoder.llama(inputs_embeds=words[None], use_cache=False).logits[0, -1].argmax()
        )
        if token == EOS:
            break
        answer.append(token)
    return answer


class Calls:
    """Counts passes of the language model and the positions of each."""

    def __init__(self, decoder: LanguageDecoder) -> None:
        self.lengths: list[int] = []
        decoder.llama.base_model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.lengths.append(output.last_hidden_state.shape[1])


def test_cached_equals_uncached_and_a_batch_equals_its_samples():
    decoder = make_decoder()
    grid, input_ids, _, _ = make_batch([4, 9, 6])
    answers = decoder.generate(grid, input_ids, **OPTIONS)
    for i in range(3):
        alone = decoder.generate(grid[i : i + 1], input_ids[i : i + 1], **OPTIONS)[0]
        assert answers[i].tolist() == alone.tolist()
        assert alone.tolist() == uncached(decoder, grid[i : i + 1], input_ids[i], 16)
    assert len({len(a) for a in answers}) > 1 or len(answers[0]) == 16


def test_generated_and_teacher_forced_embeddings_are_equal():
    """Hidden states as they arose one by one with a cache, against the parallel pass."""
    decoder = make_decoder()
    grid, input_ids, _, _ = make_batch([9])
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[SEG] *= 3.0  # so that <SEG> is answered
    states: list[torch.Tensor] = []
    decoder.llama.base_model.register_forward_hook(
        lambda m, args, output: states.append(output.last_hidden_state[0])
    )
    answer = decoder.generate(grid, input_ids, **OPTIONS)[0]
    one_by_one = torch.cat(states)  # of the prompt, then of every answered token but the last
    full = torch.cat([input_ids[0], answer])[: len(one_by_one)]
    positions = (full == SEG).nonzero().flatten()
    assert (positions >= len(input_ids[0])).sum() >= 1  # some <SEG> was generated
    labels = torch.full_like(full, IGNORE_INDEX)
    forced = decoder(grid, [full], [labels], [positions]).seg_embeddings[0]
    assert torch.allclose(forced, one_by_one[positions], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "MistralConfig"])
def test_drafts_give_the_tokens_of_greedy(seed, kind):
    """Drafts that are right for a while and then wrong, of random models."""
    decoder = make_decoder(config=make_config(kind), prompt_lookup_tokens=5)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCAB, (19,), generator=generator)
    ids = torch.cat([torch.tensor([1, *[IMAGE_TOKEN_ID] * 4]), words])
    grid = torch.randn(1, IMAGE_DIM, 2, 2, generator=generator)
    options = {**OPTIONS, "max_new_tokens": 30}
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[EOS] = 0.0
    calls = Calls(decoder)
    plain = decoder.generate(grid, [ids], **options)[0].tolist()
    assert calls.lengths == [len(ids)] + [1] * 29
    calls.lengths.clear()
    # Pieces of the right answer, each with a wrong end.
    snippets = [[*plain[i : i + 3], 7, 8] for i in range(0, 30, 3)]
    drafted = decoder.generate(grid, [ids], snippets=snippets, **options)[0].tolist()
    assert drafted == plain
    assert calls.lengths[0] == len(ids) and max(calls.lengths) <= len(ids)
    assert len(calls.lengths) < 28 and max(calls.lengths[1:]) >= 5  # drafts were taken and refused


@pytest.mark.parametrize(
    ("prompt", "snippets", "limit", "expected", "passes"),
    [
        # The prompt gives 20; then 7 tokens a pass: 21..27, 28..34, and 35..39 with the end, behind
        # which the prompt still proposes its 19.
        ([*range(20, 40), 19], [], 30, range(20, 40), [26, 7, 7, 7]),
        ([*range(20, 40), 19], None, 30, range(20, 40), [26] + [1] * 20),
        # 20 and three drafted tokens; the pass gives the fifth: no draft goes beyond the limit.
        ([*range(20, 40), 19], [], 5, range(20, 25), [26, 4]),
        # Wrong snippets change no answer. The last is right to the end and on: what follows the end
        # is no answer any more.
        (
            [*range(20, 40), 19],
            [[20, 30], [21, 22, 23, EOS, 24], [36, 37, 38, 39, EOS, 3, 4]],
            *(30, range(20, 40), None),
        ),
        ([39], [], 16, [], [6]),  # an end at once
        ([39], None, 16, [], [6]),
    ],
)
def test_an_answer_that_stands_in_the_prompt(prompt, snippets, limit, expected, passes):
    """The passes can be counted on paper."""
    decoder = make_copier()
    ids = torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *prompt])
    calls = Calls(decoder)
    options = {**OPTIONS, "max_new_tokens": limit}
    grid = torch.randn(1, IMAGE_DIM, 2, 2)
    answer = decoder.generate(grid, [ids], snippets=snippets, **options)[0]
    assert answer.tolist() == list(expected) and answer.dtype == torch.int64
    assert passes is None or calls.lengths == passes
    if len(prompt) > 1 and limit > 16:  # several prompts share their passes instead
        calls.lengths.clear()
        grid = torch.randn(2, IMAGE_DIM, 2, 2)
        answers = decoder.generate(grid, [ids, ids[:-1]], snippets=snippets, **options)
        assert [a.tolist() for a in answers] == [list(expected), []]
        assert calls.lengths == [26] + [1] * 20


def test_drafts_come_from_snippets_then_from_the_prompt_in_its_order():
    the, seg, comma = 1, 2, 3
    cat, mat, on, dog = 10, 11, 12, 13
    prompt = [the, cat, on, the, mat, the, dog]
    drafts = Drafts(prompt, [[5, 6, the], [7, 6, 8], [seg, comma, the]])
    assert drafts.propose(5, 9) == [6, the, cat, on, the, mat, the, dog]
    drafts.accept(3)  # "6 the cat": copied up to behind "cat"
    assert drafts.propose(seg, 9) == [comma, the, mat, the, dog]
    assert drafts.propose(seg, 2) == [comma, the]
    drafts.accept(2)  # nothing was copied: the place stays
    assert drafts.propose(the, 9) == [mat, the, dog]
    drafts.accept(2)  # "mat the": behind the third "the", so there is none left
    assert drafts.propose(dog, 9) == []
    assert drafts.propose(the, 9) == [cat, on, the, mat, the, dog]
    assert drafts.propose(cat, 9) == [on, the, mat, the, dog]
    assert drafts.propose(6, 3) == [the, cat, on]  # the first snippet that has it
    assert drafts.propose(8, 9) == [] and drafts.propose(dog, 9) == []  # nothing behind it
    assert drafts.propose(the, 0) == []


# -- where answers end -----------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [False, True])
def test_an_answer_ends_where_the_context_does(drafts, caplog):
    decoder = make_decoder(prompt_lookup_tokens=5, max_positions=24)
    decoder.llama.config.max_position_embeddings = 24
    grid, input_ids, _, _ = make_batch([12, 4])  # prompts of 17 and 9 tokens
    positions: list[int] = []
    decoder.llama.model.rotary_emb.register_forward_pre_hook(
        lambda m, a, kw: positions.append(int(kw["position_ids"].max())), with_kwargs=True
    )
    options = dict(max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD)
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[EOS] = 0.0  # never the most probable
    with caplog.at_level(logging.WARNING):
        answers = decoder.generate(grid, input_ids, snippets=[] if drafts else None, **options)
    assert [len(a) for a in answers] == [7, 12]
    assert max(positions) < 24
    assert "cut off after 7 tokens" in caplog.text and "cut off after 12 tokens" in caplog.text
    for i in range(2):
        alone = decoder.generate(
            grid[i : i + 1], input_ids[i : i + 1], snippets=[] if drafts else None, **options
        )[0]
        assert answers[i].tolist() == alone.tolist()


def test_a_prompt_without_room_for_an_answer_is_named():
    decoder = make_decoder(max_positions=17)
    grid, input_ids, _, _ = make_batch([12])
    with pytest.raises(ValueError, match="17 tokens, MODEL.LANGUAGE.MAX_POSITIONS is 17: no token"):
        decoder.generate(grid, input_ids, **OPTIONS)
    grid, input_ids, _, _ = make_batch([6], image_tokens=3)
    with pytest.raises(ValueError, match="3 image placeholders, the image gives 4"):
        decoder.generate(grid, input_ids, **OPTIONS)
    with pytest.raises(RuntimeError, match="call eval"):
        decoder.train().generate(grid, input_ids, **OPTIONS)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_streamer_gets_the_tokens_as_they_come(drafts):
    class Streamer:
        parts: list[list[int]] = []
        ended = False

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    decoder = make_copier()
    ids = torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *range(30, 40), 29])
    streamer = Streamer()
    streamer.parts = []
    grid = torch.randn(1, IMAGE_DIM, 2, 2)
    decoder.generate(grid, [ids], snippets=[] if drafts else None, streamer=streamer, **OPTIONS)
    assert sum(streamer.parts[1:], []) == [*range(30, 40), EOS]  # behind the prompt
    assert streamer.ended and (len(streamer.parts) < 6) == drafts


# -- what was read of an image before --------------------------------------------------------------

COUNT = 5  # the beginning and four image tokens


def read(decoder: LanguageDecoder, grid: torch.Tensor, ids: torch.Tensor) -> list:
    prefixes = decoder.remember(grid, ids[:COUNT])
    assert prefixes is not None
    return prefixes


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "MistralConfig"])
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


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "MistralConfig"])
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

"""Answers: against a decoder without a cache, in batches, with drafts, prefixes, at the limits."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_language as tiny
import torch
from refusals import refused

from gella.modeling.generation import Drafts, joined_cache, read_prefix, with_drafts
from gella.modeling.language_decoder import IGNORE_INDEX, IMAGE_TOKEN_ID

OPTIONS = dict(max_new_tokens=16, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
KINDS = ("LlamaConfig", "Qwen2Config", "MistralConfig")


@torch.no_grad()
def uncached(decoder, grid, ids, steps):
    """Greedy tokens by a full pass per token."""
    answer = []
    while len(answer) < steps:
        full = torch.cat([ids, torch.tensor(answer, dtype=torch.int64)])
        words = decoder.llama.get_input_embeddings()(full.clamp(min=0))
        words[full == IMAGE_TOKEN_ID] = decoder.image_tokens(grid)[0]
        logits = decoder.llama(inputs_embeds=words[None], use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tiny.EOS:
            break
        answer.append(token)
    return answer


def passes_of(decoder):
    """A list that gets the positions of each pass of the language model."""
    lengths = []
    decoder.llama.base_model.register_forward_hook(
        lambda module, args, output: lengths.append(output.last_hidden_state.shape[1])
    )
    return lengths


def test_cached_equals_uncached_and_a_batch_equals_its_samples():
    decoder = tiny.make_decoder()
    grid, input_ids, _, _ = tiny.make_batch([4, 9, 6])
    answers = decoder.generate(grid, input_ids, **OPTIONS)
    for i in range(3):
        alone = decoder.generate(grid[i : i + 1], input_ids[i : i + 1], **OPTIONS)[0]
        assert answers[i].tolist() == alone.tolist()
        assert alone.tolist() == uncached(decoder, grid[i : i + 1], input_ids[i], 16)
    assert len({len(a) for a in answers}) > 1 or len(answers[0]) == 16


def test_generated_and_teacher_forced_embeddings_are_equal():
    decoder = tiny.make_decoder()
    grid, input_ids, _, _ = tiny.make_batch([9])
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[tiny.SEG] *= 3.0  # so that <SEG> is answered
    states = []
    decoder.llama.base_model.register_forward_hook(
        lambda m, args, output: states.append(output.last_hidden_state[0])
    )
    answer = decoder.generate(grid, input_ids, **OPTIONS)[0]
    one_by_one = torch.cat(states)  # of the prompt, then of every answered token but the last
    full = torch.cat([input_ids[0], answer])[: len(one_by_one)]
    positions = (full == tiny.SEG).nonzero().flatten()
    assert (positions >= len(input_ids[0])).sum() >= 1  # some <SEG> was generated
    labels = torch.full_like(full, IGNORE_INDEX)
    forced = decoder(grid, [full], [labels], [positions]).seg_embeddings[0]
    assert torch.allclose(forced, one_by_one[positions], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_give_the_tokens_of_greedy(seed, kind):
    decoder = tiny.make_decoder(config=tiny.make_config(kind), prompt_lookup_tokens=5)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, tiny.VOCAB, (19,), generator=generator)
    ids = torch.cat([torch.tensor([1, *[IMAGE_TOKEN_ID] * 4]), words])
    given = torch.randn(1, tiny.IMAGE_DIM, 2, 2, generator=generator), [ids]
    options = {**OPTIONS, "max_new_tokens": 30}
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[tiny.EOS] = 0.0
    lengths = passes_of(decoder)
    plain = decoder.generate(*given, **options)[0].tolist()
    assert lengths == [len(ids)] + [1] * 29
    lengths.clear()
    # Pieces of the right answer, each with a wrong end.
    snippets = [[*plain[i : i + 3], 7, 8] for i in range(0, 30, 3)]
    assert decoder.generate(*given, snippets=snippets, **options)[0].tolist() == plain
    assert lengths[0] == len(ids) and max(lengths) <= len(ids)
    assert len(lengths) < 28 and max(lengths[1:]) >= 5  # drafts were taken and refused


IN_PROMPT, SAID = [*range(20, 40), 19], [*range(20, 40)]
WRONG = [[20, 30], [21, 22, 23, tiny.EOS, 24], [36, 37, 38, 39, tiny.EOS, 3, 4]]


@pytest.mark.parametrize("prompt, snippets, limit, expected, passes", [
    # The prompt gives 20; then 7 tokens a pass: 21..27, 28..34, and 35..39 with the end, behind
    # which the prompt still proposes its 19.
    (IN_PROMPT, [], 30, SAID, [26, 7, 7, 7]),
    (IN_PROMPT, None, 30, SAID, [26] + [1] * 20),
    # 20 and three drafted tokens; the pass gives the fifth: no draft goes beyond the limit.
    (IN_PROMPT, [], 5, SAID[:5], [26, 4]),
    # Wrong snippets change no answer. The last is right to the end and on: what follows the end
    # is no answer any more.
    (IN_PROMPT, WRONG, 30, SAID, None),
    ([39], [], 16, [], [6]),  # an end at once
    ([39], None, 16, [], [6]),
])  # fmt: skip
def test_an_answer_that_stands_in_the_prompt(prompt, snippets, limit, expected, passes):
    decoder = tiny.make_copier()
    ids = torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *prompt])
    lengths, grid = passes_of(decoder), torch.randn(2, tiny.IMAGE_DIM, 2, 2)
    options = {**OPTIONS, "max_new_tokens": limit, "snippets": snippets}
    (answer,) = decoder.generate(grid[:1], [ids], **options)
    assert answer.tolist() == expected and answer.dtype == torch.int64
    assert passes is None or lengths == passes
    if len(prompt) > 1 and limit > 16:  # several prompts share their passes instead
        lengths.clear()
        answers = decoder.generate(grid, [ids, ids[:-1]], **options)
        assert [a.tolist() for a in answers] == [expected, []] and lengths == [26] + [1] * 20


def test_drafts_come_from_snippets_then_from_the_prompt_in_its_order():
    the, seg, comma, cat, mat, on, dog = 1, 2, 3, 10, 11, 12, 13
    drafts = Drafts([the, cat, on, the, mat, the, dog], [[5, 6, the], [7, 6, 8], [seg, comma, the]])
    assert drafts.propose(5, 9) == [6, the, cat, on, the, mat, the, dog]
    drafts.accept(3)  # "6 the cat": copied up to behind "cat"
    assert drafts.propose(seg, 9) == [comma, the, mat, the, dog]
    assert drafts.propose(seg, 2) == [comma, the]
    drafts.accept(2)  # nothing was copied: the place stays
    assert drafts.propose(the, 9) == [mat, the, dog]
    drafts.accept(2)  # "mat the": behind the third "the", so there is none left
    for word, limit, proposed in (
        (dog, 9, []),
        (the, 9, [cat, on, the, mat, the, dog]),
        (cat, 9, [on, the, mat, the, dog]),
        (6, 3, [the, cat, on]),  # the first snippet that has it
        (8, 9, []),  # nothing behind it
        (dog, 9, []),
        (the, 0, []),
    ):
        assert drafts.propose(word, limit) == proposed


@pytest.mark.parametrize("drafts", [False, True])
def test_an_answer_ends_where_the_context_does(drafts, caplog):
    decoder, places = tiny.make_decoder(prompt_lookup_tokens=5, max_positions=24), []
    decoder.llama.config.max_position_embeddings = 24
    grid, input_ids, _, _ = tiny.make_batch([12, 4])  # prompts of 17 and 9 tokens
    decoder.llama.model.rotary_emb.register_forward_pre_hook(
        lambda m, a, kw: places.append(int(kw["position_ids"].max())), with_kwargs=True
    )
    options = {**OPTIONS, "max_new_tokens": 12, "snippets": [] if drafts else None}
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[tiny.EOS] = 0.0  # never the most probable
    with caplog.at_level(logging.WARNING):
        answers = decoder.generate(grid, input_ids, **options)
    assert [len(a) for a in answers] == [7, 12] and max(places) < 24
    assert "cut off after 7 tokens" in caplog.text and "cut off after 12 tokens" in caplog.text
    for i in range(2):
        (alone,) = decoder.generate(grid[i : i + 1], input_ids[i : i + 1], **options)
        assert answers[i].tolist() == alone.tolist()


def test_a_prompt_without_room_for_an_answer_is_named():
    decoder = tiny.make_decoder(max_positions=17)
    grid, input_ids, _, _ = tiny.make_batch([12])
    with pytest.raises(ValueError, match="17 tokens, MODEL.LANGUAGE.MAX_POSITIONS is 17: no token"):
        decoder.generate(grid, input_ids, **OPTIONS)
    grid, input_ids, _, _ = tiny.make_batch([6], image_tokens=3)
    refused("3 image placeholders, the image gives 4", decoder.generate, grid, input_ids, **OPTIONS)
    refused("call eval", decoder.train().generate, grid, input_ids, error=RuntimeError, **OPTIONS)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_streamer_gets_the_tokens_as_they_come(drafts):
    parts, ended = [], []
    put = lambda value: parts.append(value.flatten().tolist())  # noqa: E731
    streamer = SimpleNamespace(put=put, end=lambda: ended.append(1))
    ids = torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *range(30, 40), 29])
    options = {**OPTIONS, "snippets": [] if drafts else None, "streamer": streamer}
    tiny.make_copier().generate(torch.randn(1, tiny.IMAGE_DIM, 2, 2), [ids], **options)
    assert sum(parts[1:], []) == [*range(30, 40), tiny.EOS]  # behind the prompt
    assert ended and (len(parts) < 6) == drafts


COUNT = 5  # the beginning and four image tokens


def read(decoder, grid, ids):
    prefixes = decoder.remember(grid, ids[:COUNT])
    assert prefixes is not None
    return prefixes


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_and_loss_equal_those_of_whole_prompts(kind):
    window = {"sliding_window": 6} if kind == "MistralConfig" else {}
    decoder = tiny.make_decoder(config=tiny.make_config(kind, **window))
    batch = tiny.make_batch([9, 14, 6])
    prefixes, whole = read(decoder, batch[0], batch[1][0]), decoder(*batch)
    for _ in range(2):  # a question leaves no trace
        rest = decoder(*batch, prefixes)
        for a, b in zip(whole.seg_embeddings, rest.seg_embeddings, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(whole.loss_answer, rest.loss_answer, atol=1e-5)
    # Another image's prefix gives another answer: it is not only the words that count.
    other = decoder(*batch, prefixes[::-1])
    assert (whole.seg_embeddings[0] - other.seg_embeddings[0]).abs().max() > 1e-3


@torch.no_grad()
def test_only_the_rest_is_computed():
    decoder, batch = tiny.make_decoder(prompt_lookup_tokens=4), tiny.make_batch([9, 14])
    grid, input_ids = batch[:2]
    prefixes, lengths = read(decoder, grid, input_ids[0]), passes_of(decoder)
    decoder(*batch, prefixes)
    decoder.generate(grid, input_ids, prefixes=prefixes, **OPTIONS)
    decoder.generate(grid[:1], input_ids[:1], prefixes=prefixes[:1], snippets=[], **OPTIONS)
    assert lengths[:2] == [14, 14] and set(lengths[2:]) <= {9, *range(1, 6)}
    assert lengths.count(9) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snippets", [None, [[7, tiny.SEG, 8], [tiny.SEG, 9, 10]]])
def test_answers_equal_those_of_whole_prompts(kind, snippets):
    decoder = tiny.make_decoder(config=tiny.make_config(kind), prompt_lookup_tokens=5)
    with torch.no_grad():
        decoder.llama.get_output_embeddings().weight[tiny.SEG] *= 2.0
    grid, input_ids, _, _ = tiny.make_batch([4, 9, 6])
    prefixes, options = read(decoder, grid, input_ids[0]), {**OPTIONS, "snippets": snippets}
    before = [tensor.clone() for pair in prefixes[0].keys_values for tensor in pair]
    # Each image with its question, and one image with several.
    for images, known in ((grid, prefixes), (grid[[0, 0, 0]], prefixes[:1] * 3)):
        joint = decoder.generate(images, input_ids, prefixes=known, **options)
        for i in (2, 0, 1):
            one = slice(i, i + 1)
            (plain,) = decoder.generate(images[one], input_ids[one], **options)
            (again,) = decoder.generate(images[one], input_ids[one], prefixes=known[one], **options)
            assert plain.tolist() == again.tolist() == joint[i].tolist()
    after = [tensor for pair in prefixes[0].keys_values for tensor in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_prompts_that_begin_otherwise_are_refused():
    decoder, (grid, (ids,), labels, positions) = tiny.make_decoder(), tiny.make_batch([9])
    prefixes, none = read(decoder, grid, ids), torch.tensor([], dtype=torch.int64)
    for change, message in (
        (torch.cat([torch.tensor([3]), ids[1:]]), "does not begin with the 5 tokens"),
        (ids[:4], "does not begin with the 5 tokens"),
        (ids[:COUNT], "must go on in words behind the 5 tokens"),
        (torch.cat([ids, torch.tensor([IMAGE_TOKEN_ID])]), "must go on in words"),
    ):
        unlabelled = torch.full_like(change, IGNORE_INDEX)
        refused(message, decoder, grid, [change], [unlabelled], [none], prefixes)
    told = "A prompt holds 3 image placeholders, the image gives 4"
    refused(told, decoder.remember, grid, ids[:4])
    refused("MAX_POSITIONS is 64", decoder, grid, [ids.repeat(5)[:65]], labels, positions, prefixes)


def test_an_architecture_with_other_states_is_read_anew():
    class Recurrent:
        config = tiny.make_config("Qwen3NextConfig", num_hidden_layers=4, num_key_value_heads=2)

    assert read_prefix(Recurrent(), torch.zeros(1, 5, 32), torch.arange(5)) is None


def test_a_cache_of_one_s_own_goes_before_the_prompt():
    decoder, (grid, (ids,), _, _) = tiny.make_decoder(), tiny.make_batch([9])
    embeds, _ = decoder._embed(grid, [ids], "left")
    given = partial(with_drafts, decoder.llama)
    options = dict(num_drafted=0, max_new_tokens=8, eos_token_id=tiny.EOS)
    whole = given(embeds, Drafts([]), **options)
    cache = joined_cache(read(decoder, grid, ids))
    rest = given(embeds[:, COUNT:], Drafts([]), cache, **options)
    assert whole.tolist() == rest.tolist()

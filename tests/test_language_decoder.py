"""The language decoder against transformers' own LLaMA, and against itself one sample at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gella.modeling.language_decoder import IGNORE_INDEX, IMAGE_TOKEN_ID, LanguageDecoder

VOCAB, SEG, EOS, PAD = 50, 49, 2, 0


def make_decoder(projector: str = "mlp2x_gelu", stride: int = 1) -> LanguageDecoder:
    torch.manual_seed(0)
    llama = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        # Large enough that every token matters.
        initializer_range=0.3,
    )
    decoder = LanguageDecoder(
        llama=llama, image_dim=6, projector=projector, image_token_stride=stride
    )
    return decoder.eval()


def make_batch(lengths: list[int], image_tokens: int = 4) -> tuple[torch.Tensor, list, list, list]:
    generator = torch.Generator().manual_seed(1)
    grid = torch.randn(len(lengths), 6, 2, 2, generator=generator)
    input_ids, labels, positions = [], [], []
    for length in lengths:
        words = torch.randint(3, SEG, (length,), generator=generator)
        words[[length // 2, length - 2]] = SEG
        head = torch.tensor([1, *[IMAGE_TOKEN_ID] * image_tokens])
        ids = torch.cat([head, words])
        label = ids.clone()
        label[: len(head) + length // 3] = IGNORE_INDEX
        input_ids.append(ids)
        labels.append(label)
        positions.append((ids == SEG).nonzero().flatten())
    return grid, input_ids, labels, positions


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
def test_a_padded_batch_equals_its_samples(projector):
    decoder = make_decoder(projector)
    grid, input_ids, labels, positions = make_batch([5, 14, 9])
    joint = decoder(grid, input_ids, labels, positions)
    total, count = 0.0, 0
    for i in range(3):
        single = decoder(
            grid[i : i + 1], input_ids[i : i + 1], labels[i : i + 1], positions[i : i + 1]
        )
        assert torch.allclose(joint.seg_embeddings[i], single.seg_embeddings[0], atol=1e-5)
        n = int((labels[i][1:] != IGNORE_INDEX).sum())
        total, count = total + float(single.loss_answer) * n, count + n
    assert float(joint.loss_answer) == pytest.approx(total / count, abs=1e-5)


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


def test_generation_is_greedy_and_its_embeddings_equal_a_parallel_pass():
    decoder = make_decoder()
    grid, input_ids, _, _ = make_batch([4, 9])
    options = dict(max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD)
    answers = decoder.generate(grid, input_ids, **options)
    for i in range(2):
        alone = decoder.generate(grid[i : i + 1], input_ids[i : i + 1], **options)[0]
        assert torch.equal(answers[i], alone)
        full = torch.cat([input_ids[i], answers[i]])
        everywhere = torch.arange(len(full))
        labels = torch.full_like(full, IGNORE_INDEX)
        output = decoder(grid[i : i + 1], [full], [labels], [everywhere])
        logits = decoder.llama.lm_head(output.seg_embeddings[0])
        start = len(input_ids[i])
        # Every generated token is the most probable one after what precedes it.
        assert torch.equal(logits[start - 1 : len(full) - 1].argmax(-1), answers[i])


def test_wrong_input_is_named():
    decoder = make_decoder()
    grid, input_ids, labels, positions = make_batch([6], image_tokens=3)
    with pytest.raises(ValueError, match="3 image placeholders, the image gives 4"):
        decoder(grid, input_ids, labels, positions)
    grid, input_ids, labels, positions = make_batch([70])
    with pytest.raises(ValueError, match="75 tokens, MODEL.LANGUAGE.MAX_POSITIONS is 64"):
        decoder(grid, input_ids, labels, positions)
    with pytest.raises(ValueError, match="'mlp2x_gelu' or 'linear'"):
        make_decoder(projector="mlp")


def test_bfloat16_is_finite_and_close():
    decoder = make_decoder()
    batch = make_batch([5, 8])
    full = decoder(*batch)
    half = decoder.to(torch.bfloat16)(batch[0].to(torch.bfloat16), *batch[1:])
    assert half.loss_answer.dtype == torch.float32
    assert float(half.loss_answer) == pytest.approx(float(full.loss_answer), rel=0.05)

"""Tiny random language decoders and batches for them."""

import torch

from gella.modeling.language_decoder import IGNORE_INDEX, IMAGE_TOKEN_ID, LanguageDecoder

VOCAB, SEG, EOS, PAD = 50, 49, 2, 0
IMAGE_DIM = 6


def make_config(kind="LlamaConfig", **changes):
    import transformers

    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Large enough that every token matters.
        initializer_range=0.3,
        # Qwen2's and Mistral's own (beginning, end, padding) may lie outside 50 words.
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return getattr(transformers, kind)(**{**sizes, **changes})


def make_decoder(projector="mlp2x_gelu", stride=1, *, config=None, **options):
    """A decoder with the same random weights at every call, in evaluation mode."""
    torch.manual_seed(0)
    options.setdefault("max_positions", 64)
    decoder = LanguageDecoder(
        model_config=config or make_config(),
        image_dim=IMAGE_DIM,
        projector=projector,
        image_token_stride=stride,
        **options,
    )
    return decoder.eval()


def make_copier():
    """Weights under which a word is followed by its successor, the last but one by the end.

    Attention and MLP add nothing, embeddings are one-hot rows and the output layer is their shift:
    what a language model answers is then known without one.
    """
    config = make_config(hidden_size=64, num_hidden_layers=1, initializer_range=0.02)
    decoder = make_decoder(config=config, prompt_lookup_tokens=6)
    for layer in decoder.llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    with torch.no_grad():
        decoder.llama.model.embed_tokens.weight.copy_(torch.eye(VOCAB, 64))
        following = torch.arange(VOCAB).roll(1)
        decoder.llama.lm_head.weight.copy_(torch.eye(VOCAB, 64)[following])
        decoder.llama.lm_head.weight[EOS] = decoder.llama.lm_head.weight[40]
        decoder.llama.lm_head.weight[40] = 0.0  # 39 is followed by the end
    return decoder


def make_batch(lengths, image_tokens=4):
    """(image_grid, input_ids, labels, seg_positions) with two <SEG> per sample."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.randn(len(lengths), IMAGE_DIM, 2, 2, generator=generator)
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

"""A tiny CLIP with random weights and a tokenizer of single letters, as transformers saves them."""

import torch
from tiny_weights import perturb
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

VISION = {"image_size": 32, "patch_size": 8}


def save_clip(folder, seed=0, **vision):
    """Write model and tokenizer to a folder; returns the model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=48)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 3, "projection_dim": 16}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {"vocab_size": len(vocab), "max_position_embeddings": 48, **ends}
    config = CLIPConfig(
        text_config={**size, **text}, vision_config={**size, **VISION, **vision}, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = perturb(CLIPModel(config), seed)
    model.save_pretrained(folder)
    return model

"""One pass of the language model for all nouns of a caption against one pass per noun."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shapes_text import train_tokenizer
from tqdm import tqdm

from gella.modeling.language_decoder import LanguageDecoder
from gella.text.prompts import Prompt, build_prompt, load_tokenizer, task_text

WORDS = (
    "person dog table window road tree cup horse lamp boat chair river train cloud bench flower"
).split()
_IMAGE_DIM, _MAX_POSITIONS = 1024, 4096


def made_caption(nouns: int) -> tuple[str, list[str]]:
    """A sentence that names ``nouns`` things, and their names in order."""
    # Later rounds number their nouns, so that no two are the same.
    rounds = (divmod(place, len(WORDS)) for place in range(nouns))
    names = [WORDS[word] + (f" {turn + 1}" if turn else "") for turn, word in rounds]
    return "In this picture there is " + " beside ".join(f"a {name}" for name in names) + ".", names


def prompts_of(tokenizer: Any, nouns: int, image_tokens: int) -> tuple[Prompt, list[Prompt]]:
    """The prompt that names all nouns, and one per noun, as grounding words them."""
    caption, names = made_caption(nouns)

    def prompt(chosen: Sequence[str]) -> Prompt:
        limits = {"num_image_tokens": image_tokens, "system": "", "max_length": _MAX_POSITIONS}
        return build_prompt(tokenizer, *task_text("ground", caption, chosen), **limits)

    return prompt(names), [prompt([name]) for name in names]


def random_decoder(layers: int, width: int, vocabulary: int) -> LanguageDecoder:
    """An untrained LLaMA with LLaVA's projector, on the CPU; heads of 64 channels."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
    )
    options = {"image_dim": _IMAGE_DIM, "projector": "mlp2x_gelu", "image_token_stride": 1}
    decoder = LanguageDecoder(model_config=config, max_positions=_MAX_POSITIONS, **options)
    return decoder.eval()


@torch.no_grad()
def compare_passes(
    folder: Path, *, nouns: int, side: int, layers: int, width: int, vocabulary: int, repeat: int
) -> dict[str, Any]:
    """Wall time for the nouns of one caption, in one pass and one by one.

    The image is encoded once for both: only the language model is timed. The two ways take turns,
    so that a busy machine slows both.

    Args:
        folder: a tokenizer is written there.
        nouns: of the caption.
        side: of the grid of image tokens (24 for CLIP ViT-L/14 at 336 pixels).
        layers, width, vocabulary: of the language model.
        repeat: turns; medians are given.

    Returns:
        ``one_pass_s``, ``per_noun_s``, ``times_faster``, ``parameters`` of the language model,
        ``nouns``, ``one_pass_tokens`` and ``per_noun_tokens`` (of all passes together).
    """
    train_tokenizer([made_caption(nouns)[0]], str(folder))
    together, single = prompts_of(load_tokenizer(str(folder)), nouns, side * side)
    decoder = random_decoder(layers, width, vocabulary)
    grid = torch.randn(1, _IMAGE_DIM, side, side, generator=torch.Generator().manual_seed(1))

    def embed(prompt: Prompt) -> torch.Tensor:  # (P, D), as grounding with given nouns does it
        output = decoder(grid, [prompt.input_ids], [prompt.labels], [prompt.seg_positions])
        return output.seg_embeddings[0]

    assert len(embed(together)) == nouns  # also the pass that warms up
    times: list[list[float]] = [[], []]
    for _ in tqdm(range(repeat), "language passes", leave=False):
        for way, prompts in enumerate(([together], single)):
            start = time.perf_counter()
            for prompt in prompts:
                embed(prompt)
            times[way].append(time.perf_counter() - start)
    one, many = map(statistics.median, times)
    return {
        "one_pass_s": one,
        "per_noun_s": many,
        "times_faster": many / one,
        "parameters": sum(p.numel() for p in decoder.llama.parameters()),
        "nouns": nouns,
        "one_pass_tokens": len(together.input_ids),
        "per_noun_tokens": sum(len(prompt.input_ids) for prompt in single),
    }

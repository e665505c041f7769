"""Every part of the model run on tensors without memory, and the FLOPs it takes.

The model is built on the meta device. To run, its tensors become fake ones: meta tensors that give
a device as their own, so that the operators a CPU would take are taken, fused attention included.
What depends on values (where a token is supervised, where an image token stands) is put in by its
shape; all else is the forward pass of the real modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Around = Callable[[str], AbstractContextManager[None]]
aten = torch.ops.aten
# "There are twelve semantic nouns, including", the last "and", the full stop and the end token.
ANSWER_FRAME = 10


@dataclass(frozen=True)
class Workload:
    """What one image brings with it.

    Attributes:
        caption_tokens: of the caption in the question.
        nouns: semantic nouns, each with one ``<SEG>``.
        noun_tokens: words of one noun, in tokens, ``<SEG>`` and the comma not included.
        prompt_tokens: system line, roles and instruction together.
        entities: entity masks.
    """

    caption_tokens: int = 60
    nouns: int = 12
    noun_tokens: int = 2
    prompt_tokens: int = 60
    entities: int = 20

    @property
    def answer(self) -> int:
        """Tokens of the answer: a frame, and per noun its words, ``<SEG>`` and a comma."""
        return ANSWER_FRAME + self.nouns * (self.noun_tokens + 2)

    def check(self, image_tokens: int, max_positions: int) -> None:
        """ValueError for numbers that make no sense or a prompt that is too long."""
        least = {"caption_tokens": 0, "noun_tokens": 1, "prompt_tokens": 0}
        for name in ("caption_tokens", "nouns", "noun_tokens", "prompt_tokens", "entities"):
            value, limit = getattr(self, name), least.get(name, 1)
            if value < limit:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is {value}; it must be at least {limit}")
        length = text_pass(self, image_tokens).length
        if length > max_positions:
            raise ValueError(
                f"{length} tokens ({image_tokens} of them image) are more than "
                f"MODEL.LANGUAGE.MAX_POSITIONS {max_positions}: lower --caption-tokens "
                f"{self.caption_tokens} or --nouns {self.nouns}, or raise the key"
            )


@dataclass(frozen=True)
class TextPass:
    """One parallel pass of the language decoder: all tokens, those with logits, and the nouns."""

    length: int
    logits: int
    nouns: int


def text_pass(load: Workload, image_tokens: int) -> TextPass:
    """All nouns in one answer, as GELLA does it."""
    length = image_tokens + load.prompt_tokens + load.caption_tokens + load.answer
    return TextPass(length, load.answer, load.nouns)


def count_image_tokens(cfg: Any) -> int:
    """Tokens that one image takes in the language decoder."""
    clip = cfg.MODEL.IMAGE_ENCODER
    side = clip.IMAGE_SIZE // clip.PATCH_SIZE // cfg.MODEL.LANGUAGE.IMAGE_TOKEN_STRIDE
    return side * side


def make_fake(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give a module fake parameters and buffers in place; call it inside a ``FakeTensorMode``.

    Args:
        module: on any device; its values are not read. Shared tensors stay shared.
        dtype: of all floating tensors.
    """
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    kind = dtype if old.is_floating_point() else old.dtype
                    new = torch.empty(old.shape, dtype=kind, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = new
                tensors[name] = made[id(old)]


def run_vision(
    model: nn.Module, cfg: Any, entities: int, batch: int, around: Around
) -> tuple[Any, Tensor]:
    """Encoders, blend and mask decoder; each runs inside ``around(part)``.

    Returns:
        the ``MaskDecoderOutput`` and CLIP's penultimate grid.
    """
    side, colormap = cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE, cfg.INPUT.GELLA.COLORMAP_SIZE
    with around("image encoder"):
        grids = model.image_encoder(torch.empty(batch, 3, side, side))
    with around("colormap encoder"):
        pyramid = model.colormap_encoder(torch.empty(batch, 3, colormap, colormap))
    with around("ResoBlend"):
        fused = model.resoblend(grids["last"], pyramid)
    masks = torch.empty(batch, entities, colormap, colormap, dtype=torch.bool)
    with around("mask decoder"):
        output = model.mask_decoder(fused, entity_masks=masks)
    return output, grids["penultimate"]


def embed_prompt(model: nn.Module, grid: Tensor, length: int, around: Around) -> Tensor:
    """Image tokens among word embeddings: (B, length, D)."""
    decoder = model.language_decoder
    with around("projector"):
        tokens = decoder.image_tokens(grid)
    ids = torch.empty(len(grid), length, dtype=torch.int64)
    embeds = decoder.llama.get_input_embeddings()(ids)
    return embeds.masked_scatter((ids == 0).unsqueeze(-1), tokens.to(embeds.dtype))


def run_language(
    model: nn.Module, grid: Tensor, text: TextPass, around: Around
) -> tuple[Tensor, list[Tensor]]:
    """One parallel pass, as :meth:`LanguageDecoder.forward`.

    Returns:
        logits (B * text.logits, words), and per image (text.nouns, D) ``<SEG>`` embeddings.
    """
    embeds = embed_prompt(model, grid, text.length, around)
    llama = model.language_decoder.llama
    supervised = torch.empty(len(grid) * text.logits, dtype=torch.int64)
    with around("language decoder"):
        # With a cache transformers leaves the mask to the causal kernel, as it does in a real run
        # without padding; without one it would look for packed sequences, which takes values.
        hidden = llama.base_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    answers = hidden[:, :-1][supervised, supervised]
    with around("language decoder"):
        logits = llama.get_output_embeddings()(answers)
    return logits, [h[torch.empty(text.nouns, dtype=torch.int64)] for h in hidden]


class FlopCount:
    """Adds up FLOPs by part; an instance is an ``Around``.

    A multiply-add counts as 2. Counted: matrix products, convolutions, attention (causal or not, in
    full) and bilinear sampling (grid_sample, four multiply-adds a value). Not counted: element by
    element work, norms, softmax, lookups, resizing.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.parts: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what runs inside for ``part``."""
        with counter() as count:
            yield
        self.parts[part] = self.parts.get(part, 0) + count.get_total_flops()

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())


def counter() -> FlopCounterMode:
    """PyTorch's counter with rules for the operators that it would take for free."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten.grid_sampler_2d: _grid_sample,
        },
    )


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _grid_sample(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 8 * torch.Size(out_shape).numel()

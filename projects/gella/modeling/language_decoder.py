"""The language decoder: image tokens and text in, answer tokens and one embedding per <SEG> out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from gella.modeling.loss_counts import mean_over_parts

# The placeholder that `input_ids` hold where an image token goes, and the label that has no loss.
IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100


@dataclass
class LanguageOutput:
    """What one parallel pass over prompts and answers gives.

    Attributes:
        loss_answer: scalar, mean cross-entropy over the batch's supervised tokens (eq. 5); 0 when
            none is supervised.
        seg_embeddings: per sample (P_i, D): the final-norm hidden state at each <SEG> (E_vl).
    """

    loss_answer: Tensor
    seg_embeddings: list[Tensor]


def build_projector(kind: str, in_dim: int, out_dim: int) -> nn.Module:
    """Build the projection of image features into the word space (eq. 3).

    ``linear`` is the paper's single layer, ``mlp2x_gelu`` LLaVA-1.5's two layers.
    """
    if kind == "linear":
        return nn.Linear(in_dim, out_dim)
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
    raise ValueError(f"MODEL.LANGUAGE.PROJECTOR is {kind!r}; it must be 'mlp2x_gelu' or 'linear'")


class LanguageDecoder(nn.Module):
    """LLaMA with an image projector, as in LLaVA: ``Z_vl = f_phi([W Z_v, H_t])`` (eq. 3 to 5).

    The same class is LLaMA-7B and the tiny model of the tests: sizes come from the config alone.
    """

    @configurable
    def __init__(
        self,
        *,
        llama: dict[str, Any],
        image_dim: int,
        projector: str,
        image_token_stride: int,
    ) -> None:
        """Build an untrained decoder.

        Args:
            llama: arguments of ``transformers.LlamaConfig``.
            image_dim: channels of the image grid.
            projector: ``linear`` or ``mlp2x_gelu``.
            image_token_stride: the grid is average-pooled by this factor before it is projected.
        """
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**llama)
        self.projector = build_projector(projector, image_dim, config.hidden_size)
        self.llama = LlamaForCausalLM(config)
        self.image_token_stride = image_token_stride
        self.hidden_size = config.hidden_size
        self.max_positions = config.max_position_embeddings

    @classmethod
    def from_config(cls, cfg: Any, image_dim: int) -> dict[str, Any]:
        """Read ``MODEL.LANGUAGE``; `image_dim` is the image encoder's width."""
        node = cfg.MODEL.LANGUAGE
        llama = dict(
            vocab_size=node.VOCAB_SIZE,
            hidden_size=node.HIDDEN_SIZE,
            intermediate_size=node.INTERMEDIATE_SIZE,
            num_hidden_layers=node.NUM_LAYERS,
            num_attention_heads=node.NUM_HEADS,
            num_key_value_heads=node.NUM_KEY_VALUE_HEADS,
            rms_norm_eps=node.RMS_NORM_EPS,
            rope_theta=node.ROPE_THETA,
            max_position_embeddings=node.MAX_POSITIONS,
            tie_word_embeddings=node.TIE_EMBEDDINGS,
            initializer_range=node.INIT_STD,
            attn_implementation="sdpa",
        )
        return dict(
            llama=llama,
            image_dim=image_dim,
            projector=node.PROJECTOR,
            image_token_stride=node.IMAGE_TOKEN_STRIDE,
        )

    def image_tokens(self, image_grid: Tensor) -> Tensor:
        """Project an image grid (B, C, g, g) to word-space tokens (B, N, D), row by row (eq. 3)."""
        if self.image_token_stride > 1:
            image_grid = F.avg_pool2d(image_grid, self.image_token_stride)
        return self.projector(image_grid.flatten(2).transpose(1, 2))  # B N D

    def forward(
        self,
        image_grid: Tensor,
        input_ids: list[Tensor],
        labels: list[Tensor],
        seg_positions: list[Tensor],
    ) -> LanguageOutput:
        """Run prompts and answers in one parallel pass.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            input_ids: per sample (L_i,) int64, with ``IMAGE_TOKEN_ID`` once per image token.
            labels: per sample (L_i,) int64, ``IGNORE_INDEX`` outside the answer.
            seg_positions: per sample (P_i,) int64, where <SEG> stands in `input_ids`.

        Raises:
            ValueError: a sample is longer than ``MODEL.LANGUAGE.MAX_POSITIONS`` or holds another
                number of image placeholders than the image gives tokens.
        """
        embeds, attention_mask = self._embed(image_grid, input_ids, padding_side="right")
        hidden = self.llama.model(
            inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # B L D
        seg_embeddings = [h[p] for h, p in zip(hidden, seg_positions)]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        return LanguageOutput(self._answer_loss(hidden, padded), seg_embeddings)

    def _answer_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        # Logits only where a token is supervised: at 32,000 words the full (B, L, V) tensor of a
        # long caption would cost more memory than a decoder layer.
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.llama.lm_head(hidden[:, :-1][supervised])
        total = F.cross_entropy(logits.float(), targets[supervised], reduction="sum")
        count = supervised.sum()
        if self.training:  # only then do all ranks come here together
            return total / mean_over_parts("answer", count, total.device)
        return total / count.clamp(min=1)

    def _embed(
        self, image_grid: Tensor, input_ids: list[Tensor], padding_side: str
    ) -> tuple[Tensor, Tensor]:
        tokens = self.image_tokens(image_grid)  # B N D
        for ids in input_ids:
            self._check(ids, tokens.shape[1])
        ids = nn.utils.rnn.pad_sequence(
            input_ids, batch_first=True, padding_value=IGNORE_INDEX, padding_side=padding_side
        )
        is_image = ids == IMAGE_TOKEN_ID
        embeds = self.llama.get_input_embeddings()(ids.clamp(min=0))  # B L D
        embeds = embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeds.dtype))
        return embeds, (ids != IGNORE_INDEX).long()

    def _check(self, ids: Tensor, num_image_tokens: int) -> None:
        if len(ids) > self.max_positions:
            raise ValueError(
                f"A prompt has {len(ids)} tokens, MODEL.LANGUAGE.MAX_POSITIONS is "
                f"{self.max_positions}: shorten the caption or raise the key"
            )
        found = int((ids == IMAGE_TOKEN_ID).sum())
        if found != num_image_tokens:
            raise ValueError(
                f"A prompt holds {found} image placeholders, the image gives {num_image_tokens} "
                "tokens: the mapper and the model were built from different configs"
            )

    @torch.no_grad()
    def generate(
        self,
        image_grid: Tensor,
        input_ids: list[Tensor],
        *,
        max_new_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> list[Tensor]:
        """Answer prompts greedily, with a key-value cache.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            input_ids: per sample (L_i,) int64 prompts without an answer.
            max_new_tokens: the longest answer, in tokens.
            eos_token_id: the token that ends an answer.
            pad_token_id: what fills the answers of a batch that end early.

        Returns:
            per sample (T_i,) int64: the new tokens before the end token.
        """
        embeds, attention_mask = self._embed(image_grid, input_ids, padding_side="left")
        answers = self.llama.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        return [self._until(answer, eos_token_id) for answer in answers]

    @staticmethod
    def _until(answer: Tensor, eos_token_id: int) -> Tensor:
        ends = (answer == eos_token_id).nonzero()
        return answer[: int(ends[0])] if len(ends) else answer

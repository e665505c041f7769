"""The language decoder: image tokens and text in, answer tokens and one embedding per <SEG> out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from gella.modeling.adapters import QUANTIZATIONS, add_lora, merge_lora, quantize
from gella.modeling.causal_lm import build_causal_lm, llama_config, read_config
from gella.modeling.generation import Drafts, before_end, greedy, with_drafts
from gella.modeling.prefix import Prefix, joined_cache, read_prefix
from gella.modeling.projector import build_projector

# The placeholder that `input_ids` hold where an image token goes, and the label that has no loss.
IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100


@dataclass
class LanguageOutput:
    """What one parallel pass over prompts and answers gives.

    Attributes:
        loss_answer: scalar, mean cross-entropy over the batch's supervised tokens (eq. 5); 0 when
            none is supervised.
        seg_embeddings: per sample (P_i, D): the final-norm hidden state at each <SEG> (E_vl), of
            the image grid's dtype.
    """

    loss_answer: Tensor
    seg_embeddings: list[Tensor]


class LanguageDecoder(nn.Module):
    """A causal language model with an image projector, as in LLaVA (eq. 3 to 5).

    ``Z_vl = f_phi([W Z_v, H_t])``. The same class is LLaMA-13B and the tiny model of the tests.
    The language model is the attribute ``llama`` whatever its architecture, so that its weights
    have one name.
    """

    @configurable
    def __init__(
        self,
        *,
        model_config: Any,
        image_dim: int,
        projector: str,
        image_token_stride: int,
        max_positions: int,
        attention: str = "sdpa",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        lora: dict[str, Any] | None = None,
        quantization: str = "",
        prompt_lookup_tokens: int = 0,
    ) -> None:
        """Build an untrained decoder.

        Args:
            model_config: ``PretrainedConfig`` of the language model, see ``causal_lm.py``.
            image_dim, projector: channels of the image grid; ``linear`` or ``mlp2x_gelu``.
            image_token_stride: the grid is average-pooled by this factor before it is projected.
            max_positions: the longest prompt with its answer, in tokens, image tokens included.
            attention, dtype, gradient_checkpointing: see ``causal_lm.build_causal_lm``; the
                projector has the same dtype.
            lora: arguments of ``adapters.add_lora``; None trains all weights.
            quantization: "", ``8bit`` or ``4bit``. Weights are loaded into the plain model and
                rounded at its first use; until then the language model stays on the CPU.
            prompt_lookup_tokens: the longest draft of :meth:`generate`; 0 drafts nothing.

        Raises:
            ValueError, ImportError: a choice that is unknown or not installed.
        """
        super().__init__()
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                f"MODEL.LANGUAGE.QUANTIZATION is {quantization!r}; it must be '', '8bit' or '4bit'"
            )
        if prompt_lookup_tokens < 0:
            raise ValueError(
                f"MODEL.LANGUAGE.PROMPT_LOOKUP_TOKENS is {prompt_lookup_tokens}; 0 turns it off"
            )
        self.projector = build_projector(projector, image_dim, model_config.hidden_size)
        self.llama = build_causal_lm(
            model_config,
            attention=attention,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.projector.to(self.llama.dtype)
        if lora is not None:
            add_lora(self.llama, **lora)
        self.has_adapters = lora is not None
        self.image_token_stride = image_token_stride
        self.hidden_size = model_config.hidden_size
        self.max_positions = max_positions
        self.prompt_lookup_tokens = prompt_lookup_tokens
        self.quantization = quantization
        self._waits_for_quantization = bool(quantization)

    @classmethod
    def from_config(cls, cfg: Any, image_dim: int) -> dict[str, Any]:
        """Read ``MODEL.LANGUAGE``; `image_dim` is the image encoder's width."""
        node = cfg.MODEL.LANGUAGE
        if node.CONFIG:
            model_config = read_config(
                node.CONFIG, vocab_size=node.VOCAB_SIZE, max_positions=node.MAX_POSITIONS
            )
        else:
            model_config = llama_config(node)
        lora = dict(
            rank=node.LORA.RANK,
            alpha=node.LORA.ALPHA,
            dropout=node.LORA.DROPOUT,
            targets=list(node.LORA.TARGETS),
            train_embeddings=node.LORA.TRAIN_EMBEDDINGS,
        )
        return dict(
            model_config=model_config,
            image_dim=image_dim,
            projector=node.PROJECTOR,
            image_token_stride=node.IMAGE_TOKEN_STRIDE,
            max_positions=node.MAX_POSITIONS,
            attention=node.ATTENTION,
            dtype=node.DTYPE,
            gradient_checkpointing=node.GRADIENT_CHECKPOINTING,
            lora=lora if node.LORA.ENABLED else None,
            quantization=node.QUANTIZATION,
            prompt_lookup_tokens=node.PROMPT_LOOKUP_TOKENS,
        )

    def image_tokens(self, image_grid: Tensor) -> Tensor:
        """Project an image grid (B, C, g, g) to word-space tokens (B, N, D), row by row (eq. 3)."""
        if self.image_token_stride > 1:
            image_grid = F.avg_pool2d(image_grid, self.image_token_stride)
        features = image_grid.flatten(2).transpose(1, 2)  # B N C
        return self.projector(features.to(next(self.projector.parameters()).dtype))  # B N D

    def forward(
        self,
        image_grid: Tensor,
        input_ids: list[Tensor],
        labels: list[Tensor],
        seg_positions: list[Tensor],
        prefixes: Sequence[Prefix] | None = None,
        answer_count: float | None = None,
    ) -> LanguageOutput:
        """Run prompts and answers in one parallel pass.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            input_ids: per sample (L_i,) int64, with ``IMAGE_TOKEN_ID`` once per image token.
            labels: per sample (L_i,) int64, ``IGNORE_INDEX`` outside the answer.
            seg_positions: per sample (P_i,) int64, where <SEG> stands in `input_ids`.
            prefixes: per sample what :meth:`remember` gave for its image: only the rest of the
                prompts is computed, and the image grid is not looked at.
            answer_count: supervised tokens that the loss divides by; None: those of this batch.

        Raises:
            ValueError: a sample is longer than ``MODEL.LANGUAGE.MAX_POSITIONS`` or holds another
                number of image placeholders than the image gives tokens; quantised weights are
                to be trained without adapters.
        """
        if self.training and self.quantization and not self.has_adapters:
            raise ValueError(
                f"weights of MODEL.LANGUAGE.QUANTIZATION {self.quantization!r} cannot be trained: "
                "set it to '', or MODEL.LANGUAGE.LORA.ENABLED True to train adapters beside them"
            )
        embeds, attention_mask = self._embed(image_grid, input_ids, "right", prefixes)
        known, cache = 0, {}
        if prefixes is not None:
            known = len(prefixes[0].ids)
            cache["past_key_values"] = joined_cache(prefixes)
        hidden = self.llama.base_model(
            inputs_embeds=embeds, attention_mask=attention_mask, use_cache=bool(cache), **cache
        ).last_hidden_state  # B L D, without what was known
        seg_embeddings = [h[p - known].to(image_grid.dtype) for h, p in zip(hidden, seg_positions)]
        labels = [label[known:] for label in labels]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        return LanguageOutput(self._answer_loss(hidden, padded, answer_count), seg_embeddings)

    def _answer_loss(self, hidden: Tensor, labels: Tensor, count: float | None) -> Tensor:
        # Logits only where a token is supervised: at 32,000 words the full (B, L, V) tensor of a
        # long caption would cost more memory than a decoder layer.
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.llama.get_output_embeddings()(hidden[:, :-1][supervised])
        total = F.cross_entropy(logits.float(), targets[supervised], reduction="sum")
        if count is None:
            return total / supervised.sum().clamp(min=1)
        return total / (count or 1.0)

    @torch.no_grad()
    def remember(self, image_grid: Tensor, ids: Tensor) -> list[Prefix] | None:
        """Read the start of every prompt about each image, its image tokens included, once.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            ids: (N,) int64, what all prompts begin with; the last image placeholder is among them.

        Returns:
            one prefix per image, for :meth:`forward` and :meth:`generate` in evaluation mode; None
            for an architecture that cannot (see ``prefix.py``).
        """
        embeds, _ = self._embed(image_grid, [ids] * len(image_grid), "right")
        return read_prefix(self.llama.base_model, embeds, ids)

    def _embed(
        self,
        image_grid: Tensor,
        input_ids: list[Tensor],
        padding_side: str,
        prefixes: Sequence[Prefix] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self._waits_for_quantization:
            quantize(self.llama, self.quantization, image_grid.device)
            self._waits_for_quantization = False
        tokens = None if prefixes is not None else self.image_tokens(image_grid)  # B N D
        for ids in input_ids:
            self._check(ids, None if tokens is None else tokens.shape[1])
        if prefixes is not None:
            input_ids = [prefix.rest(ids) for prefix, ids in zip(prefixes, input_ids)]
        ids = nn.utils.rnn.pad_sequence(
            input_ids, batch_first=True, padding_value=IGNORE_INDEX, padding_side=padding_side
        )
        mask = ids != IGNORE_INDEX
        embeds = self.llama.get_input_embeddings()(ids.clamp(min=0))  # B L D
        if tokens is not None:
            is_image = ids == IMAGE_TOKEN_ID
            embeds = embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeds.dtype))
        if prefixes is not None:
            mask = F.pad(mask, (len(prefixes[0].ids), 0), value=True)
        return embeds, mask.long()

    def _check(self, ids: Tensor, num_image_tokens: int | None) -> None:
        if len(ids) > self.max_positions:
            raise ValueError(
                f"A prompt has {len(ids)} tokens, MODEL.LANGUAGE.MAX_POSITIONS is "
                f"{self.max_positions}: shorten the caption or raise the key"
            )
        found = int((ids == IMAGE_TOKEN_ID).sum())
        if num_image_tokens is not None and found != num_image_tokens:
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
        snippets: Sequence[Sequence[int]] | None = None,
        streamer: Any = None,
        prefixes: Sequence[Prefix] | None = None,
    ) -> list[Tensor]:
        """Answer prompts greedily, with a key-value cache; in evaluation mode.

        An answer ends at `eos_token_id`, or with a warning at `max_new_tokens` or where prompt and
        answer fill ``MODEL.LANGUAGE.MAX_POSITIONS``.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            input_ids: per sample (L_i,) int64 prompts without an answer.
            max_new_tokens, eos_token_id: the longest answer, and what ends one.
            pad_token_id: what fills the answers of a batch that end early.
            snippets: pieces that answers are made of, as token ids, for answers that repeat words
                of their prompts, as noun extraction does. A single prompt is then decoded with
                drafts of up to ``prompt_lookup_tokens`` tokens: the same tokens in fewer passes.
                Several prompts share each pass instead. None: no drafts.
            streamer: gets the tokens of a single prompt as they come, see ``generation.py``.
            prefixes: as in :meth:`forward`.

        Returns:
            per sample (T_i,) int64: the new tokens before the end token.

        Raises:
            ValueError: a prompt is too long, fills the context, or does not fit its image.
        """
        if self.training:
            raise RuntimeError("generate needs evaluation mode: call eval() first")
        limits = [min(max_new_tokens, self._room(ids)) for ids in input_ids]
        # A prompt near the end of the context may answer less than the others of its batch.
        together = [i for i, limit in enumerate(limits) if limit == max_new_tokens]
        alone = [[i] for i, limit in enumerate(limits) if limit < max_new_tokens]
        drafted = self.prompt_lookup_tokens
        answers: dict[int, Tensor] = {}
        for members in [together, *alone] if together else alone:
            chosen = [input_ids[i] for i in members]
            known = None if prefixes is None else [prefixes[i] for i in members]
            embeds, mask = self._embed(image_grid[members], chosen, "left", known)
            options = dict(
                max_new_tokens=limits[members[0]],
                eos_token_id=eos_token_id,
                streamer=streamer,
                cache=None if known is None else joined_cache(known),
            )
            if snippets is not None and drafted and len(members) == 1:
                drafts = Drafts(chosen[0][chosen[0] != IMAGE_TOKEN_ID].tolist(), snippets)
                found = [with_drafts(self.llama, embeds, drafts, num_drafted=drafted, **options)]
            else:
                found = greedy(self.llama, embeds, mask, pad_token_id=pad_token_id, **options)
            answers.update(zip(members, found))
        return [before_end(answers[i], limits[i], eos_token_id) for i in range(len(input_ids))]

    def _room(self, ids: Tensor) -> int:
        room = self.max_positions - len(ids)
        if room < 1:
            raise ValueError(
                f"A prompt has {len(ids)} tokens, MODEL.LANGUAGE.MAX_POSITIONS is "
                f"{self.max_positions}: no token is left for the answer; shorten the caption or "
                "raise the key"
            )
        return room

    def merge_adapters(self) -> None:
        """Fold the LoRA adapters into the weights, whose keys are then those of a plain decoder."""
        merge_lora(self.llama)
        self.has_adapters = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageDecoder:
        # Weights that wait to be rounded do not follow `.to(device)`, which may not hold them.
        if self._waits_for_quantization:
            self.projector._apply(fn)
            return self
        return super()._apply(fn, recurse)

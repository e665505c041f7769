"""The language decoder: image tokens and text in, answer tokens and one embedding per <SEG> out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gella.modeling.adapters import QUANTIZATIONS, add_lora, merge_lora, quantize
from gella.modeling.filling import Fillable
from gella.modeling.generation import (
    Choices,
    Drafts,
    Prefix,
    greedy,
    joined_cache,
    read_prefix,
    with_drafts,
)

# The placeholder that `input_ids` hold where an image token goes, and the label that has no loss.
IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100
_CHOICES = {
    "PROJECTOR": ("mlp2x_gelu", "linear"),
    "ATTENTION": ("sdpa", "flash_attention_2", "eager"),
    "DTYPE": ("float32", "bfloat16", "float16"),
    "QUANTIZATION": QUANTIZATIONS,
}
# Some architectures rescale what their output layer gives. Only their own forward pass knows how,
# and it wants logits at every position.
_LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
# Weights that one product turns to float32 at a time: 8 MiB, which stay in a core's cache.
_BLOCK = 2**21
_LINEAR = F.linear
_logger = logging.getLogger(__name__)


class _Float32Products(TorchFunctionMode):
    """Multiply bfloat16 weights in float32, block by block: for CPUs without instructions for it.

    Those emulate bfloat16 at a tenth of their speed. A token or two are quicker as they are: then
    reading the weights is all the work, and float32 is twice as much to read.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _LINEAR or args[1].dtype != torch.bfloat16 or args[0].shape[:-1].numel() < 5:
            return func(*args, **(kwargs or {}))
        inputs, weight, bias = (*args, None)[:3]
        rows = max(1, _BLOCK // weight.shape[1])
        with torch.autocast("cpu", enabled=False):
            inputs, bias = inputs.float(), 0 if bias is None else bias.float()
            blocks = [func(inputs, block.float()) for block in weight.split(rows)]
            return (torch.cat(blocks, -1) + bias).to(weight.dtype)


def _float32_products_on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    # Not where gradients are recorded: autograd would keep the float32 copies of all layers.
    @functools.wraps(method)
    def wrapped(self: LanguageDecoder, *args: Any, **kwargs: Any) -> Any:
        slow = not torch.is_grad_enabled() and not multiplies_bfloat16()
        slow = slow and next(self.projector.parameters()).device.type == "cpu"
        if slow and any(p.dtype == torch.bfloat16 for p in self.parameters()):
            with _Float32Products():
                return method(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return wrapped


def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU is known to have instructions for products of bfloat16."""
    # Older PyTorch does not tell.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass
class LanguageOutput:
    """What one parallel pass over prompts and answers gives.

    Attributes:
        loss_answer: scalar, mean over samples of the mean cross-entropy over a sample's supervised
            tokens (eq. 5); a sample without any counts with 0.
        seg_embeddings: per sample (P_i, D): the final-norm hidden state at each <SEG> (E_vl), of
            the image grid's dtype.
    """

    loss_answer: Tensor
    seg_embeddings: list[Tensor]


class LanguageDecoder(Fillable):
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
            model_config: ``PretrainedConfig`` of the language model, see :func:`llama_config` and
                :func:`read_config`.
            image_dim: channels of the image grid.
            projector: ``linear``, the paper's single layer, or ``mlp2x_gelu``, LLaVA-1.5's two.
            image_token_stride: the grid is average-pooled by this factor before it is projected.
            max_positions: the longest prompt with its answer, in tokens, image tokens included.
            attention, dtype, gradient_checkpointing: see :func:`build_causal_lm`; the projector
                has the same dtype.
            lora: arguments of ``adapters.add_lora``; None trains all weights.
            quantization: "", ``8bit`` or ``4bit``. Weights are loaded into the plain model and
                rounded at its first use; until then the language model stays on the CPU.
            prompt_lookup_tokens: the longest draft of :meth:`generate`; 0 drafts nothing.

        Raises:
            ValueError, ImportError: a choice that is unknown or not installed.
        """
        super().__init__()
        _check_choices(PROJECTOR=projector, QUANTIZATION=quantization)
        if prompt_lookup_tokens < 0:
            raise ValueError(
                f"MODEL.LANGUAGE.PROMPT_LOOKUP_TOKENS is {prompt_lookup_tokens}; 0 turns it off"
            )
        width = model_config.hidden_size
        with self.building():
            self.projector: nn.Module = nn.Linear(image_dim, width)
            if projector == "mlp2x_gelu":
                self.projector = nn.Sequential(self.projector, nn.GELU(), nn.Linear(width, width))
            options = {"gradient_checkpointing": gradient_checkpointing}
            self.llama = build_causal_lm(model_config, attention=attention, dtype=dtype, **options)
            self.projector.to(self.llama.dtype if lora is None else torch.float32)  # as add_lora's
            if lora is not None:
                add_lora(self.llama, **lora)
        self.has_adapters = lora is not None
        self.image_token_stride = image_token_stride
        self.hidden_size = width
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
        lora = {key.lower(): value for key, value in node.LORA.items()}
        names = "projector image_token_stride max_positions attention dtype"
        names += " gradient_checkpointing quantization prompt_lookup_tokens"
        return dict(
            model_config=model_config,
            image_dim=image_dim,
            lora=lora if lora.pop("enabled") else None,
            **{name: node[name.upper()] for name in names.split()},
        )

    def image_tokens(self, image_grid: Tensor) -> Tensor:
        """Project an image grid (B, C, g, g) to word-space tokens (B, N, D), row by row (eq. 3)."""
        if self.image_token_stride > 1:
            image_grid = F.avg_pool2d(image_grid, self.image_token_stride)
        features = image_grid.flatten(2).transpose(1, 2)  # B N C
        return self.projector(features.to(next(self.projector.parameters()).dtype))  # B N D

    @_float32_products_on_cpu
    def forward(
        self,
        image_grid: Tensor,
        input_ids: list[Tensor],
        labels: list[Tensor],
        seg_positions: list[Tensor],
        prefixes: Sequence[Prefix] | None = None,
    ) -> LanguageOutput:
        """Run prompts and answers in one parallel pass.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            input_ids: per sample (L_i,) int64, with ``IMAGE_TOKEN_ID`` once per image token.
            labels: per sample (L_i,) int64, ``IGNORE_INDEX`` outside the answer.
            seg_positions: per sample (P_i,) int64, where <SEG> stands in `input_ids`.
            prefixes: per sample what :meth:`remember` gave for its image: only the rest of the
                prompts is computed, and the image grid is not looked at.

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
        embeds, _ = self._embed(image_grid, input_ids, "right", prefixes)
        read, cache = 0, {}
        if prefixes is not None:
            read = len(prefixes[0].ids)
            cache["past_key_values"] = joined_cache(prefixes)
        # No mask: nothing that counts looks right, to the padding, and attention is fused then.
        hidden = self.llama.base_model(
            inputs_embeds=embeds, use_cache=bool(cache), **cache
        ).last_hidden_state  # B L D, without what was read before
        seg_embeddings = [h[p - read].to(image_grid.dtype) for h, p in zip(hidden, seg_positions)]
        padded = nn.utils.rnn.pad_sequence(
            [label[read:] for label in labels], batch_first=True, padding_value=IGNORE_INDEX
        )
        return LanguageOutput(self._answer_loss(hidden, padded), seg_embeddings)

    def _answer_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        # Logits only where a token is supervised: at 32,000 words the full (B, L, V) tensor of a
        # long caption would cost more memory than a decoder layer.
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.llama.get_output_embeddings()(hidden[:, :-1][supervised])
        losses = F.cross_entropy(logits.float(), targets[supervised], reduction="none")
        shares = supervised / supervised.sum(1, keepdim=True).clamp(min=1)  # B L-1
        return (losses * shares[supervised]).sum() / len(labels)

    @torch.no_grad()
    @_float32_products_on_cpu
    def remember(self, image_grid: Tensor, ids: Tensor) -> list[Prefix] | None:
        """Read the start of every prompt about each image, its image tokens included, once.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            ids: (N,) int64, what all prompts begin with; the last image placeholder is among them.

        Returns:
            one prefix per image, for :meth:`forward` and :meth:`generate` in evaluation mode; None
            for an architecture that cannot (see ``generation.read_prefix``).
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
            if len(ids) > self.max_positions:
                raise ValueError(
                    f"A prompt has {len(ids)} tokens, MODEL.LANGUAGE.MAX_POSITIONS is "
                    f"{self.max_positions}: shorten the caption or raise the key"
                )
            placeholders = int((ids == IMAGE_TOKEN_ID).sum())
            if tokens is not None and placeholders != tokens.shape[1]:
                raise ValueError(
                    f"A prompt holds {placeholders} image placeholders, the image gives "
                    f"{tokens.shape[1]} tokens: the mapper and the model were built from different "
                    "configs"
                )
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

    @torch.no_grad()
    @_float32_products_on_cpu
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
        choices: Sequence[Choices | None] | None = None,
    ) -> list[Tensor]:
        """Answer prompts greedily, with a key-value cache; in evaluation mode.

        An answer ends at `eos_token_id`, or with a warning at `max_new_tokens` or where prompt and
        answer fill ``MODEL.LANGUAGE.MAX_POSITIONS``.

        Args:
            image_grid: (B, C, g, g) penultimate CLIP features.
            input_ids: per sample (L_i,) int64 prompts without an answer.
            max_new_tokens, eos_token_id, pad_token_id: the longest answer, what ends one, and what
                fills those of a batch that end early.
            snippets: pieces of answers that repeat words of their prompts, as token ids. A single
                prompt is decoded with drafts then, the same tokens in fewer passes. None: it isn't.
            streamer: gets the tokens of a single prompt, see ``generation.with_drafts``.
            prefixes: as in :meth:`forward`. choices: per sample what may be said; None: anything.

        Returns:
            per sample (T_i,) int64: the new tokens before the end token.

        Raises:
            ValueError: a prompt is too long, fills the context, or does not fit its image.
        """
        if self.training:
            raise RuntimeError("generate needs evaluation mode: call eval() first")
        limits = [min(max_new_tokens, self.max_positions - len(ids)) for ids in input_ids]
        if min(limits) < 1:
            raise ValueError(
                f"A prompt has {max(map(len, input_ids))} tokens, MODEL.LANGUAGE.MAX_POSITIONS is "
                f"{self.max_positions}: no token is left for the answer; shorten the caption or "
                "raise the key"
            )
        # A prompt near the end of the context may answer less than the others of its batch.
        alike = {limit: [i for i, x in enumerate(limits) if x == limit] for limit in limits}
        answers: dict[int, Tensor] = {}
        for limit, members in alike.items():
            written = self._generate(
                image_grid[members],
                [input_ids[i] for i in members],
                None if prefixes is None else [prefixes[i] for i in members],
                [None if choices is None else choices[i] for i in members],
                pad_token_id,
                snippets,
                max_new_tokens=limit,
                eos_token_id=eos_token_id,
                streamer=streamer,
            )
            answers.update(zip(members, written))
        return [answers[i] for i in range(len(input_ids))]

    def _generate(
        self,
        image_grid: Tensor,
        input_ids: list[Tensor],
        prefixes: Sequence[Prefix] | None,
        choices: Sequence[Choices | None],
        pad_token_id: int,
        snippets: Sequence[Sequence[int]] | None,
        **options: Any,
    ) -> list[Tensor]:
        # Prompts of one limit, with drafts where there is one prompt only.
        embeds, mask = self._embed(image_grid, input_ids, "left", prefixes)
        cache = None if prefixes is None else joined_cache(prefixes)
        if snippets is None or not self.prompt_lookup_tokens or len(input_ids) > 1:
            options["pad_token_id"] = pad_token_id
            answers = greedy(self.llama, embeds, mask, cache, choices, **options)
        else:
            words = input_ids[0][input_ids[0] != IMAGE_TOKEN_ID].tolist()
            options["num_drafted"] = self.prompt_lookup_tokens
            drafts = Drafts(words, snippets)
            answers = [with_drafts(self.llama, embeds, drafts, cache, choices[0], **options)]
        for i, answer in enumerate(answers):
            if len(answer) and int(answer[-1]) == options["eos_token_id"]:
                answers[i] = answer[:-1]
            else:
                _logger.warning(
                    "an answer was cut off after %d tokens: MODEL.LANGUAGE.MAX_NEW_TOKENS or "
                    "MAX_POSITIONS allows no more",
                    options["max_new_tokens"],
                )
        return answers

    def merge_adapters(self) -> None:
        """Fold the LoRA adapters into the weights, whose keys are then those of a plain decoder."""
        merge_lora(self.llama)
        self.has_adapters = False

    def device_of(self, name: str, device: torch.device) -> torch.device:
        """Weights that wait to be rounded stay on the CPU; see :meth:`Fillable.device_of`."""
        waits = self._waits_for_quantization and not name.startswith("projector")
        return torch.device("cpu") if waits else device

    def initialise(self, name: str, module: nn.Module) -> None:
        """See :meth:`Fillable.initialise`; peft starts A as any linear layer and B at zero."""
        if ".lora_B." in name:
            nn.init.zeros_(module.weight)
        elif ".lora_A." in name or name.startswith("projector"):
            module.reset_parameters()
        else:
            self.llama._init_weights(module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageDecoder:
        # Weights that wait to be rounded do not follow `.to(device)`, which may not hold them.
        if self._waits_for_quantization:
            self.projector._apply(fn)
            return self
        return super()._apply(fn, recurse)


def llama_config(node: Any) -> Any:
    """``LlamaConfig`` of the size keys of ``MODEL.LANGUAGE`` (VOCAB_SIZE, HIDDEN_SIZE, ...)."""
    from transformers import LlamaConfig

    return LlamaConfig(
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
    )


def read_config(folder: str, *, vocab_size: int, max_positions: int) -> Any:
    """Read a causal language model's ``config.json``, with room for ``<SEG>``.

    Args:
        folder: a local folder with transformers' ``config.json``. Of a multimodal model, such as
            LLaVA-1.5, its language part is taken. No code of the folder is run.
        vocab_size: rows of the embedding, ``<SEG>`` included (``MODEL.LANGUAGE.VOCAB_SIZE``).
        max_positions: the longest prompt with its answer, in tokens.

    Returns:
        a ``PretrainedConfig`` with ``vocab_size`` rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: transformers does not know the model, it is no causal language model, or one of
            the two numbers does not fit it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"MODEL.LANGUAGE.CONFIG is {folder!r}, but there is no file {path}: name the folder of "
            "a model in transformers' layout, or leave the key empty for LLaMA by its sizes"
        )
    try:
        config = AutoConfig.from_pretrained(str(path.parent), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} describes no model that transformers knows: {reason}") from error
    config = config.get_text_config(decoder=True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{path} is of type {config.model_type!r}, which is no causal language model"
        )
    if vocab_size < config.vocab_size:
        raise ValueError(
            f"{path} has {config.vocab_size} words, MODEL.LANGUAGE.VOCAB_SIZE is {vocab_size}: set "
            f"it to {config.vocab_size + 1} (<SEG> takes one row), or to {config.vocab_size} if "
            "the tokenizer uses fewer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_positions > positions:
        raise ValueError(
            f"{path} allows {positions} positions, MODEL.LANGUAGE.MAX_POSITIONS is "
            f"{max_positions}: lower the key to {positions}"
        )
    config.vocab_size = vocab_size
    return config


def build_causal_lm(
    config: Any,
    *,
    attention: str = "sdpa",
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Build an untrained causal language model.

    Args:
        config: a ``PretrainedConfig``; its attention and dtype entries are overwritten.
        attention: ``sdpa``, ``flash_attention_2`` or ``eager``.
        dtype: of the parameters, ``float32``, ``bfloat16`` or ``float16``.
        gradient_checkpointing: in training, keep the input of each layer only and compute the rest
            again in the backward pass.

    Raises:
        ValueError: an unknown name, fused attention that is not installed, or an architecture that
            rescales its logits.
    """
    from transformers import AutoModelForCausalLM

    _check_choices(ATTENTION=attention, DTYPE=dtype)
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"a {config.model_type} with {name} = {getattr(config, name)} cannot be the "
                "language decoder: its logits are rescaled behind the output layer, which the "
                "answer's loss calls directly"
            )
    try:
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=getattr(torch, dtype)
        )
    except ImportError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"MODEL.LANGUAGE.ATTENTION is {attention!r}, which is not available here ({reason}); "
            "'sdpa' always is"
        ) from error
    # cuDNN's attention took 1.4 ms of the host a call on an H100 (docs/RESULTS.md), where training
    # with two images waits for the host; flash attention, which is next in line, has no plans.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if gradient_checkpointing:
        # Its name in the older versions is deprecated in the newer ones.
        old = "gradient_checkpointing_enable"
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
        # The reentrant way would give no gradient where the first input has none.
        enable({"use_reentrant": False})
    # from_config leaves the model in evaluation mode or not, depending on the version.
    return model.train()


def _check_choices(**values: str) -> None:
    for key, value in values.items():
        if value not in _CHOICES[key]:
            names = ", ".join(repr(name) for name in _CHOICES[key])
            raise ValueError(f"MODEL.LANGUAGE.{key} is {value!r}; it must be one of {names}")

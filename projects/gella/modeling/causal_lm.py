"""The causal language model f_phi: LLaMA by its sizes, or any other by its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

ATTENTIONS = ("sdpa", "flash_attention_2", "eager")
DTYPES = ("float32", "bfloat16", "float16")
# Some architectures rescale what their output layer gives. Only their own forward pass knows how,
# and it wants logits at every position.
_LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


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
        attention: one of ``ATTENTIONS``.
        dtype: of the parameters, one of ``DTYPES``.
        gradient_checkpointing: in training, keep the input of each layer only and compute the rest
            again in the backward pass.

    Raises:
        ValueError: an unknown name, fused attention that is not installed, or an architecture that
            rescales its logits.
    """
    from transformers import AutoModelForCausalLM

    _check_choice("ATTENTION", attention, ATTENTIONS)
    _check_choice("DTYPE", dtype, DTYPES)
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
    if gradient_checkpointing:
        # The reentrant way would give no gradient where the first input has none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # from_config leaves the model in evaluation mode or not, depending on the version.
    return model.train()


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(f"MODEL.LANGUAGE.{key} is {value!r}; it must be one of {names}")

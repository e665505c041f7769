"""Low-rank adapters (peft) and 8- or 4-bit weights (bitsandbytes) of the language model.

A state dict keeps the keys and shapes of the plain model whichever of the two is in use: adapters
add ``<layer>.lora_A.default.weight`` and ``<layer>.lora_B.default.weight`` and rename nothing, and
quantised weights are written as what they stand for. So the weights of full fine-tuning load into
a model with adapters (allow ``*.lora_*`` to be missing) and into a quantised one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZATIONS = ("", "8bit", "4bit")
_ADAPTER_PARTS = ("lora_A", "lora_B")
# peft moves the adapted layer below this name.
_BASE = ".base_layer."


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: list[str],
    train_embeddings: bool,
) -> None:
    """Freeze a causal language model and put LoRA adapters beside its linear layers.

    The adapters start at zero: the output does not change. They, and the embeddings where these are
    trained, become float32 whatever the model's precision, which the hidden states keep: at rates
    near 1e-5 most steps are lost in bfloat16. DeepSpeed's ``bf16`` makes all of them bfloat16 again
    and steps float32 copies of them; its ``torch_autocast`` leaves them as they are.

    Args:
        model: of transformers; changed in place.
        rank, alpha, dropout: of the adapters, scaled by ``alpha / rank``.
        targets: last names of the layers, such as ``q_proj``.
        train_embeddings: go on training the input embedding and the output layer, in which
            ``<SEG>`` is new.

    Raises:
        ImportError: peft is not installed.
        ValueError: a target that no layer has, or a rank below 1.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "MODEL.LANGUAGE.LORA.ENABLED needs peft: pip install 'gella[lora]'"
        ) from error
    if rank < 1:
        raise ValueError(f"MODEL.LANGUAGE.LORA.RANK is {rank}; it must be at least 1")
    linear = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    unknown = sorted(set(targets) - linear)
    if unknown or not targets:
        raise ValueError(
            f"MODEL.LANGUAGE.LORA.TARGETS {unknown or targets} name no layer of this model, whose "
            f"linear layers are {sorted(linear)}"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(targets)
    )
    inject_adapter_in_model(config, model)
    if train_embeddings:
        dtype = _dtype(model)
        words, output = _embeddings(model)
        for layer in (words, output):
            layer.requires_grad_(True)
        words.register_forward_hook(lambda layer, _, embeds: embeds.to(dtype))
        output.register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype),))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.register_state_dict_post_hook(_hide_base_layers)
    model.register_load_state_dict_pre_hook(_find_base_layers)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights and take them out; the result is a plain model again.

    Raises:
        ValueError: the weights are quantised, and the sum would be rounded away.
    """
    from peft.tuners.lora import LoraLayer

    if any(_quantized_layers(model)):
        raise ValueError(
            "adapters cannot be merged into quantised weights: load the checkpoint with "
            "MODEL.LANGUAGE.QUANTIZATION '' and merge that"
        )
    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)  # refuses sums that are not finite
        model.set_submodule(name, layer.get_base_layer())
    model.requires_grad_(True)


def quantize(model: nn.Module, kind: str, device: torch.device) -> None:
    """Round the weights of all linear layers but the output layer, and move all to a device.

    8 bit: one scale per row (LLM.int8). 4 bit: NF4, one scale per 64 weights. Adapters, norms,
    embeddings and the output layer keep their precision.

    Args:
        model: of transformers, with or without adapters; changed in place. Its weights are moved
            one layer at a time: the device never holds the unrounded model.
        kind: ``8bit`` or ``4bit``.
        device: where the model is going to be.

    Raises:
        ImportError: bitsandbytes (or accelerate, which transformers wants beside it) is missing.
    """
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
        from transformers.integrations import replace_with_bnb_linear
    except ImportError as error:
        raise ImportError(
            f"MODEL.LANGUAGE.QUANTIZATION {kind!r} needs bitsandbytes and accelerate: "
            "pip install 'gella[quantization]'"
        ) from error
    # It says at every call that 8-bit products round their inputs to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=_dtype(model),
    )
    output = _embeddings(model)[1]
    kept = [name for name, m in model.named_modules() if m is output]
    kept += [rf".*\.{part}" for part in _ADAPTER_PARTS]
    before = dict(model.named_modules())
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    for name, layer in list(model.named_modules()):
        old = before.get(name)
        if layer is old or not isinstance(old, nn.Linear):
            continue
        # The new layers are empty; a weight is rounded when it leaves the CPU's float tensor.
        empty = layer.weight
        weight = type(empty)(old.weight.data.cpu(), requires_grad=False, **empty.__dict__)
        layer.weight = weight.to(device)
        layer.bias = old.bias
        # On some CPUs the first product rearranges a 4-bit weight in place, with scales rounded to
        # bfloat16, and writing a state dict (bitsandbytes 0.50) then loses the scales' order.
        layer.support_avx512bf16_for_cpu = False
        layer.train(old.training)
        old.weight = None  # type: ignore[assignment]  # frees it before the next layer
    model.to(device)
    model.register_state_dict_post_hook(_write_unrounded)
    model.register_load_state_dict_pre_hook(_refuse_loading)


def _embeddings(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        # Its own weight: an adapted layer also shows its base layer's.
        weight = module._parameters.get("weight")
        if type(weight).__name__ in ("Int8Params", "Params4bit"):
            yield name, module


def _hide_base_layers(
    model: nn.Module, state: MutableMapping[str, Tensor], prefix: str, metadata: Any
) -> None:
    for key in [k for k in state if k.startswith(prefix) and _BASE in k]:
        state[key.replace(_BASE, ".")] = state.pop(key)


def _find_base_layers(
    model: nn.Module, state: MutableMapping[str, Tensor], prefix: str, *_: Any
) -> None:
    for name, _module in list(model.named_modules()):
        if not name.endswith(_BASE[:-1]):
            continue
        plain = prefix + name[: -len(_BASE) + 1] + "."
        for leaf in ("weight", "bias"):
            if plain + leaf in state:
                state[f"{prefix}{name}.{leaf}"] = state.pop(plain + leaf)


def _write_unrounded(
    model: nn.Module, state: MutableMapping[str, Tensor], prefix: str, metadata: Any
) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, layer in _quantized_layers(model):
        path = prefix + name.replace(_BASE[:-1], "")
        # bitsandbytes also writes the scales and their format beside a weight.
        beside = (f"{path}.SCB", f"{path}.weight_format")
        for key in [k for k in state if k.startswith(f"{path}.weight.") or k in beside]:
            del state[key]
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        state[f"{path}.weight"] = weight.to(_dtype(model))


def _dtype(model: nn.Module) -> torch.dtype:
    # What LoRA trains may be of a higher precision than the model.
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    return next(frozen, _embeddings(model)[0].weight.dtype)  # type: ignore[arg-type]


def _refuse_loading(model: nn.Module, *_: Any) -> None:
    raise ValueError(
        "the language model's weights have been quantised, which happens when it is first used: "
        "load the weights into a newly built model"
    )

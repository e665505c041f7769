"""Every part of the model run on tensors without memory: the FLOPs it takes, the bytes it keeps.

The model is built on the meta device. To run, its tensors become fake ones: meta tensors that give
a device as their own, so that the operators a CPU would take are taken, fused attention included.
What depends on values (where a token is supervised, where an image token stands) is put in by its
shape; all else is the forward pass of the real modules. PyTorch's counter sees these operators;
fvcore's FlopCountAnalysis traces a run with real values, and takes fused attention for free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gella.modeling.criterion import GellaCriterion
from gella.modeling.mask_decoder import MaskDecoderOutput

Around = Callable[[str], AbstractContextManager[None]]  # what a part of the model runs inside
aten = torch.ops.aten
# "There are twelve semantic nouns, including", the last "and", the full stop and the end token.
ANSWER_FRAME = 10
# Table 12a, GFLOPs: language model, image and mask encoder, mask decoder, all.
TABLE_12 = {
    "LISA (Table 12)": (92_607, 3_114, 226, 95_947),
    "GELLA (Table 12)": (11_987, 204, 113, 12_304),
}
COLUMNS = {
    "LLM": ("projector", "language decoder"),
    "IME": ("image encoder", "colormap encoder"),
    "MMD": ("ResoBlend", "mask decoder", "association"),
}
# The language decoder's ways to ground the nouns of a caption, as two tables call them.
WAYS = {
    "given": ("nouns given", "nouns given, one pass"),
    "generated": ("answer generated", "answer generated, then one pass over it"),
    "one_noun": ("a pass per noun", "a pass per noun, with the caption"),
    "noun_alone": (
        "a pass per noun without caption",
        "a pass per noun, noun in place of the caption",
    ),
}


class Workload(NamedTuple):
    """What one image brings with it."""

    caption_tokens: int = 60  # of the caption in the question
    nouns: int = 12  # semantic nouns of the caption, each with one <SEG>
    noun_tokens: int = 2  # words of one noun in the answer, beside <SEG> and a comma
    prompt_tokens: int = 60  # system line, roles and instruction together
    entities: int = 20  # entity masks

    @property
    def answer(self) -> int:
        """Tokens of the answer: a frame, and per noun its words, ``<SEG>`` and a comma."""
        return ANSWER_FRAME + self.nouns * (self.noun_tokens + 2)

    def length(self, image_tokens: int) -> int:
        """Tokens of one parallel pass over image, question and answer, all nouns in one answer."""
        return image_tokens + self.prompt_tokens + self.caption_tokens + self.answer


def count_image_tokens(cfg: Any) -> int:
    """Tokens that one image takes in the language decoder."""
    clip = cfg.MODEL.IMAGE_ENCODER
    side = clip.IMAGE_SIZE // clip.PATCH_SIZE // cfg.MODEL.LANGUAGE.IMAGE_TOKEN_STRIDE
    return side * side


# -- running without data --------------------------------------------------------------------------


def make_fake(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give a module fake parameters and buffers in place; call it inside a ``FakeTensorMode``.

    Values are not read; shared tensors stay shared; all floating tensors become ``dtype``.
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


def run_model(
    model: nn.Module, cfg: Any, load: Workload, batch: int, around: Around
) -> tuple[MaskDecoderOutput, Tensor, list[Tensor], Tensor]:
    """All parts in their order, as in training, each inside ``around(part)``.

    Returns the mask decoder's output, word logits at the answers, association logits per image, and
    CLIP's penultimate grid.
    """
    side, colormap = cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE, cfg.INPUT.GELLA.COLORMAP_SIZE
    with around("image encoder"):
        grids = model.image_encoder(torch.empty(batch, 3, side, side))
    with around("colormap encoder"):
        pyramid = model.colormap_encoder(torch.empty(batch, 3, colormap, colormap))
    with around("ResoBlend"):
        fused = model.resoblend(grids["last"], pyramid)
    masks = torch.empty(batch, load.entities, colormap, colormap, dtype=torch.bool)
    with around("mask decoder"):
        output = model.mask_decoder(fused, entity_masks=masks)
    grid, length = grids["penultimate"], load.length(count_image_tokens(cfg))
    logits, nouns = run_language(model, grid, length, load.answer, load.nouns, around)
    with around("association"):
        scores = model.association(nouns, output.query_embeddings)
    return output, logits, scores, grid


def embed_prompt(model: nn.Module, grid: Tensor, length: int, around: Around) -> Tensor:
    """Image tokens among word embeddings: (B, length, D)."""
    decoder = model.language_decoder
    with around("projector"):
        tokens = decoder.image_tokens(grid)
    ids = torch.empty(len(grid), length, dtype=torch.int64)
    embeds = decoder.llama.get_input_embeddings()(ids)
    return embeds.masked_scatter((ids == 0).unsqueeze(-1), tokens.to(embeds.dtype))


def run_language(
    model: nn.Module, grid: Tensor, length: int, answer: int, nouns: int, around: Around
) -> tuple[Tensor, list[Tensor]]:
    """One parallel pass over ``length`` tokens, as :meth:`LanguageDecoder.forward`.

    Returns logits (B * answer, words), and per image (nouns, D) ``<SEG>`` embeddings.
    """
    embeds = embed_prompt(model, grid, length, around)
    llama = model.language_decoder.llama
    supervised = torch.empty(len(grid) * answer, dtype=torch.int64)
    with around("language decoder"):
        # With a cache transformers leaves the mask to the causal kernel, as it does in a real run
        # without padding; without one it would look for packed sequences, which takes values.
        hidden = llama.base_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    answers = hidden[:, :-1][supervised, supervised]
    with around("language decoder"):
        logits = llama.get_output_embeddings()(answers)
    return logits, [h[torch.empty(nouns, dtype=torch.int64)] for h in hidden]


# -- FLOPs -----------------------------------------------------------------------------------------


def counter() -> FlopCounterMode:
    """PyTorch's counter with rules for the operators that it would take for free."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def sampling(*_: Any, out_shape: Any, **__: Any) -> int:
        return 8 * math.prod(out_shape)  # bilinear: four multiply-adds a value

    rules = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten.grid_sampler_2d: sampling,
    }
    return FlopCounterMode(display=False, custom_mapping=rules)


class FlopCount:
    """Adds up FLOPs by part, a multiply-add as 2; an instance is an ``Around``."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.parts: Counter[str] = Counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what runs inside for ``part``."""
        with counter() as count:
            yield
        self.parts[part] += count.get_total_flops()


@contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, and attention that the counter can see.

    PyTorch runs multi-head attention in evaluation as one operator without a formula; and its
    counter loses its place at parameters that want a gradient where none is recorded.
    """
    model.eval().requires_grad_(False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_flops(model: nn.Module, cfg: Any, load: Workload) -> dict[str, Any]:
    """FLOPs of one image, a multiply-add as 2; the model's tensors become fake.

    Returns:
        ``parts``: ``{part: FLOPs}`` of grounding given nouns, one parallel pass over question and
        answer; ``language``: per way of ``WAYS`` to ground the nouns ``passes`` over the prompt,
        ``tokens`` of one of them, and ``flops`` of all (an answer is generated with a key-value
        cache; a pass per noun with the whole caption is what methods with one mask per answer
        need); ``table_12``: rows in the columns of the paper's, in FLOPs; ``implied_tokens``: the
        length of the pass that costs Table 12's LLM figure, should that one count a multiply-add
        as 1 or as 2.
    """
    image, count, single = count_image_tokens(cfg), FlopCount(), load._replace(nouns=1)
    length, alone = load.length(image), single._replace(caption_tokens=load.noun_tokens)
    with FakeTensorMode(), counting(model):
        make_fake(model)
        grid = run_model(model, cfg, load, 1, count)[-1]
        llm, *vision = (sum(count.parts[part] for part in parts) for parts in COLUMNS.values())
        generated = llm + generation_flops(model, grid, length - load.answer, load.answer)
        language = {
            "given": {"passes": 1, "tokens": length, "flops": llm},
            "generated": {"passes": 2, "tokens": length, "flops": generated},
        }
        for way, one in (("one_noun", single), ("noun_alone", alone)):
            flops = load.nouns * pass_flops(model, grid, one.length(image), one.answer)
            language[way] = {"passes": load.nouns, "tokens": one.length(image), "flops": flops}
        paper = 2e9 * TABLE_12["GELLA (Table 12)"][0]
        implied = {str(n): implied_tokens(model, grid, image, paper / n) for n in (1, 2)}
    table = {
        f"ours, {WAYS[way][0]}": [x["flops"], *vision, x["flops"] + sum(vision)]
        for way, x in language.items()
    }
    rest = {"language": language, "table_12": table, "implied_tokens": implied}
    return {"parts": count.parts, **rest}


def pass_flops(model: nn.Module, grid: Tensor, length: int, answer: int) -> int:
    """FLOPs of one parallel pass with ``answer`` logits, the projector included."""
    count = FlopCount()
    run_language(model, grid, length, answer, 0, count)
    return count.parts.total()


def generation_flops(model: nn.Module, grid: Tensor, prompt: int, answer: int) -> int:
    """FLOPs of generating ``answer`` tokens one by one behind a prompt, with a key-value cache.

    The first token comes from the pass over the prompt; each later one from a pass over the token
    before it, whose cost grows by the same amount with each token in the cache.
    """
    llama, past, projector = model.language_decoder.llama, None, FlopCount()
    embeds = embed_prompt(model, grid, prompt, projector)
    steps = []
    for tokens in (embeds, embeds[:, :1], embeds[:, :1]):
        with counter() as count:
            out = llama.base_model(inputs_embeds=tokens, use_cache=True, past_key_values=past)
            llama.get_output_embeddings()(out.last_hidden_state[:, -1:])
        past = out.past_key_values
        steps.append(count.get_total_flops())
    later, growth = answer - 1, steps[2] - steps[1]
    first = projector.parts.total() + steps[0]
    return first + later * steps[1] + growth * later * (later - 1) // 2


def implied_tokens(model: nn.Module, grid: Tensor, image: int, flops: float) -> int:
    """The length L of a pass without logits that takes ``flops``.

    It takes c + a L + b L^2 FLOPs, c the projector's; two passes give the three.
    """
    count = FlopCount()
    run_language(model, grid, image, 0, 0, count)
    fixed, first = count.parts["projector"], count.parts["language decoder"]
    second = pass_flops(model, grid, 2 * image, 0) - fixed
    square = (second - 2 * first) / (2 * image**2)
    linear = first / image - square * image
    # The positive root, in the form that holds for b = 0 too.
    rest = 2 * max(0.0, flops - fixed)
    return round(rest / (linear + math.sqrt(linear**2 + 2 * square * rest)))


# -- activations -----------------------------------------------------------------------------------


class SavedBytes:
    """Adds up what autograd saves by part; an instance is an ``Around``.

    The storages of all tensors saved for backward count, each once, for the part that saves it
    first, whole even where a view is saved.
    """

    def __init__(self, *modules: nn.Module) -> None:
        """Nothing saved yet; parameters and buffers of ``modules`` will not count."""
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        # Weak references keep an address from being used again, so that they compare safely.
        self._seen = {StorageWeakRef(t.untyped_storage()) for t in tensors}
        self.parts: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What is saved inside counts for ``part``."""
        self.parts.setdefault(part, 0)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self._seen:
                self._seen.add(reference)
                self.parts[part] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def saved_bytes(
    model: nn.Module, cfg: Any, load: Workload, batch: int, half: bool
) -> dict[str, Any]:
    """Bytes saved for backward in one training step of ``batch`` images with prompts as long.

    The model's tensors become fake. ``half``: the language branch in bfloat16, as ZeRO keeps it,
    and autocast for the rest, whose copies of parameters count; else float32. Autocast is the
    CPU's, which runs norms in bfloat16; CUDA's keeps them in float32, so that the vision side takes
    more there.

    Returns:
        ``parts``: ``{part: bytes}``, losses last; ``sums``: bytes of all parts, ``plain`` as they
        are and ``checkpointed``, when each block of the language decoder keeps its input only and
        is computed again in the backward pass: all inputs, and one whole block at a time.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train()
    # In training these layers look whether a value is infinite, which no fake tensor can tell;
    # without dropout that is all evaluation changes.
    model.mask_decoder.pixel_decoder.encoder.eval()
    dtype = torch.bfloat16 if half else torch.float32
    blocks: list[int] = []  # bytes that each block of the language decoder saves, in order

    def before(*_: Any) -> None:
        blocks.append(-saved.parts["language decoder"])

    def after(*_: Any) -> None:
        blocks[-1] += saved.parts["language decoder"]

    for module in model.language_decoder.llama.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # whatever the config says, both ways are told
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with FakeTensorMode():
        for name, child in model.named_children():
            make_fake(child, dtype if name == "language_decoder" else torch.float32)
        saved = SavedBytes(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output, logits, scores, _ = run_model(model, cfg, load, batch, saved)
        with saved("losses"):
            targets = torch.empty(len(logits), dtype=torch.int64)
            F.cross_entropy(logits.float(), targets, reduction="sum")
        outputs = (*output.entity_logits, *output.mask_logits, *scores)
        shapes = [(x.shape, x.dtype) for x in outputs]
    saved.parts["losses"] += criterion_bytes(cfg, load.entities, shapes, output.query_valid.shape)
    tokens = batch * load.length(count_image_tokens(cfg))
    inputs = len(blocks) * tokens * model.language_decoder.hidden_size * dtype.itemsize
    plain = sum(saved.parts.values())
    spared = max(0, sum(blocks[:-1]) - inputs)
    return {"parts": saved.parts, "sums": {"plain": plain, "checkpointed": plain - spared}}


def criterion_bytes(
    cfg: Any, entities: int, outputs: list[tuple[Any, torch.dtype]], valid: torch.Size
) -> int:
    """Bytes that the losses of masks, entities and association save, with ``entities`` per image.

    Their work depends on values: they run for real, on random logits of the same shapes.
    ``outputs`` are shape and dtype of the entity logits of every layer, of the mask logits, and of
    the association logits per image; ``valid`` is (B, Q).
    """
    side = cfg.INPUT.GELLA.COLORMAP_SIZE
    masks = torch.zeros(entities, side, side, dtype=torch.bool)
    masks[:, 0, 0] = True  # an entity without a pixel would be left out
    random = torch.Generator().manual_seed(0)
    filled = [torch.randn(x, generator=random).to(kind).requires_grad_() for x, kind in outputs]
    layers = (len(outputs) - valid[0]) // 2
    scores = filled[2 * layers :]
    output = MaskDecoderOutput(
        query_embeddings=torch.empty(valid),  # only its device is looked at
        entity_logits=filled[:layers],
        mask_logits=filled[layers : 2 * layers],
        query_valid=torch.ones(valid, dtype=torch.bool),
    )
    criterion = GellaCriterion(cfg)
    saved = SavedBytes(criterion)
    with torch.random.fork_rng(devices=[]), saved("losses"):
        criterion(
            output,
            target_masks=[masks] * valid[0],
            association_logits=scores,
            association_targets=[torch.zeros(len(score), entities) for score in scores],
        )
    return saved.parts["losses"]

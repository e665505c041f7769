"""What a training takes in memory, told without it: the model on meta, run on tensors without data.

To run, its tensors become fake ones: meta tensors that give a device as their own, so that the
operators a CPU would take are taken, fused attention included. What depends on values (where a
token is supervised, where an image token stands) is put in by its shape; all else is the forward
pass of the real modules.

The arithmetic of states is that of the ZeRO paper (arXiv 1910.02054, section 3.1 and figure 1) for
Adam on N GPUs. DeepSpeed's estimators (estimate_zero2/3_model_states_mem_needs) say otherwise: 18
bytes a parameter for 16, gathered layers in float32, no bfloat16 choice, no stages 0 and 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from gella.engine.zero import read_config
from gella.modeling.criterion import GellaCriterion
from gella.modeling.mask_decoder import MaskDecoderOutput

Around = Callable[[str], AbstractContextManager[None]]  # what a part of the model runs inside
# "There are twelve semantic nouns, including", the last "and", the full stop and the end token.
ANSWER_FRAME = 10
GIB = 2**30
CARDS = (24, 40, 48, 80)  # GiB
USABLE = 0.9  # of a card: the rest is CUDA's own, fragments, and buffers of communication
BYTES = {"bf16": (2, 2, 12), "fp32": (4, 4, 8)}  # weights, gradients, optimizer
HOST_BYTES = 16  # float32 weights, two moments, gradient
# ZeRO's stages, what each moves to the host, and the file in configs/zero/ that does so, if it is
# one to go to for room.
PLANS: tuple[tuple[int, tuple[str, ...], str], ...] = (
    *((stage, (), "") for stage in (0, 1)),
    (2, (), "stage2"),
    (2, ("optimizer",), "stage2_offload"),
    (3, (), "stage3"),
    (3, ("optimizer",), ""),
    (3, ("optimizer", "parameters"), "stage3_offload"),
)


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


# The longest prompt that the records of a dataset are taken to give in training, by the form of
# their files. Bounds, not counts: reading all of a dataset takes longer than a start may.
LONGEST = {
    "png": Workload(caption_tokens=250, nouns=30, noun_tokens=3),
    "captions": Workload(caption_tokens=300, nouns=30, noun_tokens=3),
    "entityseg": Workload(caption_tokens=300, nouns=30, noun_tokens=3),
    "refcoco": Workload(caption_tokens=40, nouns=1, noun_tokens=40),
}
PRESENT = 30  # categories of one COCO image at most, of which a list names all and absent ones


def longest_prompts(cfg: Any) -> dict[str, Workload]:
    """What one image brings at most, by dataset of ``DATASETS.TRAIN``; see ``LONGEST``.

    A list of categories takes an article and two tokens a name, and a comma. No prompt has more
    tokens than ``MODEL.LANGUAGE.MAX_POSITIONS``.
    """
    absent, image = cfg.INPUT.GELLA.PANOPTIC_NEGATIVES, count_image_tokens(cfg)
    loads = {}
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        load = LONGEST.get(metadata.get("form", "png"))
        if load is None:
            listed = len(metadata.get("thing_classes", ())) or 133
            listed = listed if absent < 0 else min(listed, PRESENT + absent)
            load = Workload(4 * listed, nouns=listed, noun_tokens=3)
        while load.length(image) > cfg.MODEL.LANGUAGE.MAX_POSITIONS and load.nouns > 1:
            load = load._replace(caption_tokens=load.caption_tokens // 2, nouns=load.nouns // 2)
        loads[name] = load
    return loads


def count_image_tokens(cfg: Any) -> int:
    """Tokens that one image takes in the language decoder."""
    clip = cfg.MODEL.IMAGE_ENCODER
    side = clip.IMAGE_SIZE // clip.PATCH_SIZE // cfg.MODEL.LANGUAGE.IMAGE_TOKEN_STRIDE
    return side * side


def build_on_meta(cfg: Any) -> nn.Module:
    """The model of a config without memory for its weights; ``cfg`` is not changed."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.LANGUAGE.ATTENTION = "sdpa"  # others may not be installed; the keys are the same
    importlib.import_module("torch._dynamo")  # PyTorch 2.8 cannot while tensors are made elsewhere
    with torch.device("meta"):
        return build_model(cfg)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers of parameters and of trained ones, each counted once; buffers do not count."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


# -- states under ZeRO -----------------------------------------------------------------------------


class Branch(NamedTuple):
    """Sizes of a part of the model: all parameters, the trained ones, the largest layer's."""

    parameters: int
    trained: int
    largest: int = 0


def zero_branches(model: nn.Module) -> tuple[Branch, Branch]:
    """The language branch, which ZeRO divides, and the rest, which every GPU holds whole."""
    language, whole = count_parameters(model.language_decoder), count_parameters(model)
    # What stage 3 gathers at once is what one module owns itself.
    owned = (m.parameters(recurse=False) for m in model.language_decoder.modules())
    largest = max(sum(p.numel() for p in parameters) for parameters in owned)
    return Branch(*language, largest), Branch(whole[0] - language[0], whole[1] - language[1])


def zero_states(
    branch: Branch, gpus: int, stage: int, precision: str = "bf16", offload: tuple[str, ...] = ()
) -> dict[str, int]:
    """Bytes of a branch under one of `PLANS`: of each GPU, and of the ``host`` of all.

    Stage 1 divides the optimizer by the GPUs, stage 2 the gradients too, stage 3 the weights too,
    and then holds one layer's whole weights while it runs (the largest one is counted, as
    ``gathered``). Frozen parameters have weights only. Optimizer offload moves optimizer and
    gradients to the host, as ZeRO-Offload does, where they take 12 + 4 bytes, and at stage 3
    DeepSpeed keeps the gradient as it came beside the float32 one; parameter offload the weights.
    """
    weight, gradient, optimizer = BYTES[precision]
    weights, gradients, moments = (
        -(-count // (gpus if stage >= first else 1))
        for count, first in ((branch.parameters, 3), (branch.trained, 2), (branch.trained, 1))
    )
    states = {
        "weights": weight * weights,
        "gradients": gradient * gradients,
        "optimizer": optimizer * moments,
        "gathered": weight * branch.largest if stage == 3 else 0,
        "host": 0,
    }
    if "optimizer" in offload:
        host = HOST_BYTES + (gradient if stage == 3 else 0)
        states.update(gradients=0, optimizer=0, host=host * branch.trained)
    if "parameters" in offload:
        states.update(weights=0, host=states["host"] + weight * branch.parameters)
    return states


def plan_rows(
    language: Branch, rest: Branch, gpus: int, precision: str, activations: dict[str, int]
) -> list[dict[str, Any]]:
    """A row per ZeRO plan: ``stage``, ``offload``, the bytes of :func:`zero_states`, ``rest``, and
    for both kinds of activations ``total`` and ``card``: GiB of the smallest of ``CARDS`` that
    holds the total in its usable share, or 0.

    ``activations``: bytes saved for backward on one GPU, ``plain`` and ``checkpointed``.
    """
    # Under DistributedDataParallel, in float32: 4 weights, 4 gradients, 8 moments, and 4 for the
    # buckets in which gradients travel.
    others = 4 * rest.parameters + (12 + 4 * (gpus > 1)) * rest.trained
    rows = []
    for stage, offload, _ in PLANS:
        states = zero_states(language, gpus, stage, precision, offload)
        gpu = sum(states.values()) - states["host"] + others
        total = {kind: gpu + size for kind, size in activations.items()}
        card = {
            kind: next((card for card in CARDS if size <= USABLE * card * GIB), 0)
            for kind, size in total.items()
        }
        row = {"stage": stage, "offload": sorted(offload), **states, "rest": others}
        rows.append({**row, "total": total, "card": card})
    return rows


class Plan(NamedTuple):
    """A way to train: ``overrides``, the ``KEY VALUE`` pairs that choose it, a space in front ("":
    the config as it is), and its bytes on each ``gpu`` and, of all processes, on the ``host``."""

    overrides: str
    gpu: int
    host: int


def plans(
    cfg: Any, language: Branch, rest: Branch, gpus: int, activations: dict[str, int]
) -> list[Plan]:
    """The config's own plan, then those that take less of a GPU, the quicker ones first.

    Arguments as for :func:`plan_rows`; raises what `read_config` raises of the config's ZeRO file.
    """
    file, half = cfg.SOLVER.ZERO.CONFIG, bool(cfg.SOLVER.AMP.ENABLED)
    config = read_config(file, bf16=half) if file else {}
    zero = config.get("zero_optimization", {})
    moved = (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))
    offload = tuple(n for n, key in moved if zero.get(key, {}).get("device") == "cpu")
    kept = cfg.MODEL.LANGUAGE.GRADIENT_CHECKPOINTING
    # Without ZeRO weights are float32, also under autocast.
    own = "bf16" if config.get("bf16", {}).get("enabled") else "fp32"
    row = plan_rows(language, rest, gpus, own, activations)[
        [plan[:2] for plan in PLANS].index((zero.get("stage", 0), offload))
    ]
    made = [Plan("", row["total"]["checkpointed" if kept else "plain"], row["host"])]
    rows = plan_rows(language, rest, gpus, "bf16" if half else "fp32", activations)
    more = "" if kept else " MODEL.LANGUAGE.GRADIENT_CHECKPOINTING True"
    for row, (*_, name) in zip(rows, PLANS, strict=True):
        if name:
            overrides = f"{more} SOLVER.ZERO.CONFIG configs/zero/{name}.json"
            made.append(Plan(overrides, row["total"]["checkpointed"], row["host"]))
    return made


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
    prompts = cfg.DATALOADER.PROMPTS_PER_IMAGE if model.training else 1
    asked = grid.repeat_interleave(prompts, dim=0)
    logits, nouns = run_language(model, asked, length, load.answer, load.nouns, around)
    with around("association"):
        scores = model.association(nouns[::prompts], output.query_embeddings)
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
    # In training these layers look whether a value is infinite, and the decoder around its layers
    # whether a random value leaves one out (transformers before 5.23): no fake tensor can tell.
    # Without dropout that is all evaluation changes.
    model.mask_decoder.pixel_decoder.encoder.eval()
    model.mask_decoder.transformer.decoder.training = False
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
    tokens = batch * cfg.DATALOADER.PROMPTS_PER_IMAGE * load.length(count_image_tokens(cfg))
    inputs = len(blocks) * tokens * model.language_decoder.hidden_size * dtype.itemsize
    plain = sum(saved.parts.values())
    spared = max(0, sum(blocks[:-1]) - inputs)
    return {"parts": saved.parts, "sums": {"plain": plain, "checkpointed": plain - spared}}


def criterion_bytes(
    cfg: Any, entities: int, outputs: list[tuple[Any, torch.dtype]], valid: torch.Size
) -> int:
    """Bytes that the losses of masks, entities and association save, with ``entities`` per image.

    Their work depends on values: they run for real, on random logits of the shapes and types
    ``outputs``: entity and mask logits of every layer, then per image association logits.
    ``valid`` is (B, Q).
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

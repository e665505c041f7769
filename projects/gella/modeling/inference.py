"""The one path of inference: encode images, write answers, find the entities of their nouns.

Evaluation walks it batch by batch (:func:`answer_batch`); the predictor encodes an image once and
asks it often. ``meta_arch.GELLA`` has the three steps as methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from gella.modeling.generation import Prefix
from gella.modeling.mask_decoder import MaskDecoderOutput
from gella.modeling.postprocessing import (
    Candidates,
    Masks,
    gather_candidates,
    ground_phrases,
    masks_in_original_frame,
    panoptic_from_scores,
    snap_to_entities,
)
from gella.text import prompts
from gella.text.copying import CopiedNouns
from gella.text.spans import located
from gella.text.words import names_several


class Grounder(Protocol):
    """What predictor and evaluators ask of any meta-architecture: the three steps as methods.

    What ``encode_images`` returns of an image has ``masks`` and ``scores`` of its entities.
    """

    encode_images: Callable[..., list[Any]]
    write_answers: Callable[..., list[dict[str, Any]]]
    find_entities: Callable[..., list[dict[str, Any]]]


class Model(Protocol):
    """What the path asks of the meta-architecture, which composes its parts."""

    mask_decoder: Any  # of which it reads `queries`
    language_decoder: Any
    association: Any
    encode: Callable[[list[dict[str, Any]]], tuple[list[MaskDecoderOutput], Tensor]]
    read_answers: Callable[..., Any]
    tokenizer: Any  # of the language decoder, with <SEG>
    noun_snippets: list[list[int]]  # for drafts, as token ids
    copied_nouns: Callable[[dict[str, Any]], CopiedNouns | None]
    max_new_tokens: int
    inference_options: Any  # the node MODEL.GELLA
    device: torch.device


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What every question about one image needs, computed once; nothing in it changes.

    Attributes:
        query_embeddings: (k, K, D), ``E_vc`` of the K queries that are entities, for k draws of
            colours.
        scores: (K,) what AP ranks them by, as Mask2Former does: the probability of each that it
            is one, the mean over the draws, times the mean probability inside its mask.
        masks: the decoder's K bool masks (height, width), in the original frame, of the draws'
            mean logits.
        snapped: int64 (K,), the input entity that each query reproduces, -1 for none; None where
            that is not looked for.
        image_grid: (1, C, g, g), CLIP's penultimate grid.
        prefix: what the language decoder has read of the image; None: it reads it anew each time.
    """

    query_embeddings: Tensor
    scores: Tensor
    masks: Masks
    snapped: Tensor | None
    image_grid: Tensor
    prefix: Prefix | None


@torch.no_grad()
def encode_images(
    model: Model,
    views: list[dict[str, Any]],
    prefix_ids: Tensor | None = None,
) -> list[EncodedImage]:
    """Compute what is the same for every question about some images.

    Not for several threads at once: the mask decoder keeps notes during its pass.

    Args:
        model: in evaluation mode.
        views: mapped dicts; the question, if there is one, is not looked at.
        prefix_ids: (N,) int64, what every prompt begins with, up to its last image token; None:
            prompts are read as wholes.
    """
    options, queries = model.inference_options, model.mask_decoder.queries
    outputs, grid = model.encode(views)
    prefixes: Sequence[Prefix | None] | None = None
    if prefix_ids is not None:
        prefixes = model.language_decoder.remember(grid, prefix_ids.to(model.device))
    encoded = []
    for i, view in enumerate(views):
        score = _mean(o.entity_logits[-1][i].float().softmax(-1)[:, 0] for o in outputs)  # Q
        keep = outputs[0].query_valid[i]
        if queries == "learned":
            keep = keep & (score > options.ENTITY_SCORE_THRESHOLD)
        logits = _mean(o.mask_logits[-1][i][keep] for o in outputs)
        inside = (logits > 0).float()
        sure = (logits.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        size = view["height"], view["width"]
        frame = tuple(view["colormap"].shape[-2:])
        masks = masks_in_original_frame(logits, frame, view["valid_size"], *size)
        snapped = None
        if queries == "learned" and options.SNAP:
            snapped = snap_to_entities(masks, view["entities_full"], options.SNAP_IOU)
            snapped = snapped.to(model.device)
        encoded.append(
            EncodedImage(
                query_embeddings=torch.stack([o.query_embeddings[i][keep] for o in outputs]),
                scores=score[keep] * sure,
                masks=masks,
                snapped=snapped,
                image_grid=grid[i : i + 1].clone(),  # a view would keep the whole batch alive
                prefix=None if prefixes is None else prefixes[i],
            )
        )
    return encoded


@torch.no_grad()
def write_answers(
    model: Model,
    batched_inputs: list[dict[str, Any]],
    encoded: Sequence[EncodedImage],
    on_text: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Generate the answers of "describe" and "extract".

    Args:
        model: in evaluation mode.
        batched_inputs: mapped dicts whose prompts end where the answer begins.
        encoded: the image of each; the same one may come several times.
        on_text: gets the text so far, of a single question.

    Returns:
        the mapped dicts with their answers, see :func:`with_answer`.
    """
    grids, prefixes = _joined(encoded)
    copies = [model.copied_nouns(x) for x in batched_inputs]
    answers = model.language_decoder.generate(
        grids,
        [x["input_ids"].to(model.device) for x in batched_inputs],
        max_new_tokens=model.max_new_tokens,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
        # The nouns of a caption are words of the prompt; a description has nothing to copy.
        snippets=model.noun_snippets
        if all(x["task"] == "extract" for x in batched_inputs)
        else None,
        streamer=None if on_text is None else _TextStreamer(model.tokenizer, on_text),
        prefixes=prefixes,
        choices=copies,
    )
    return [with_answer(model.tokenizer, *x) for x in zip(batched_inputs, answers, copies)]


def with_answer(
    tokenizer: Any, inputs: dict[str, Any], answer: Tensor, copied: CopiedNouns | None = None
) -> dict[str, Any]:
    """A prompt with its generated answer behind it, which makes it an input like any other.

    Args:
        tokenizer: with <SEG>.
        inputs: a mapped dict without an answer.
        answer: (T,) int64 token ids.
        copied: knows the answer's nouns; None: they are sought in the caption.

    Returns:
        the dict with ``text``, the answer in words; ``input_ids``, ``labels`` and ``seg_positions``
        of prompt and answer; ``phrases``, the nouns before each <SEG>.
    """
    input_ids = torch.cat([inputs["input_ids"], answer.to(inputs["input_ids"])])
    seg_id = tokenizer.convert_tokens_to_ids(prompts.SEG_TOKEN)
    seg_positions = (input_ids == seg_id).nonzero().flatten()
    text = prompts.decode_answer(tokenizer, answer.tolist())
    if copied is None:
        phrases = located(inputs["caption"], prompts.parse_nouns(text))
    else:
        phrases = copied.phrases
    return {
        **inputs,
        "text": text,
        "input_ids": input_ids,
        "labels": torch.full_like(input_ids, prompts.IGNORE_INDEX),
        "seg_positions": seg_positions[: len(phrases)],
        "phrases": phrases[: len(seg_positions)],
    }


@torch.no_grad()
def find_entities(
    model: Model, batched_inputs: list[dict[str, Any]], encoded: Sequence[EncodedImage]
) -> list[dict[str, Any]]:
    """Ground the nouns of answers, given or generated, in one pass of the language decoder.

    Args:
        model: in evaluation mode.
        batched_inputs: mapped dicts with their answers; the tasks may differ. ``threshold``, if
            there, replaces the config's for the scores; ``exclusive`` is of :func:`ground_phrases`.
        encoded: the image of each; the same one may come several times.

    Returns:
        of each ``panoptic_seg`` if its task is "panoptic", else ``grounding``.
    """
    grids, prefixes = _joined(encoded)
    queries = nn.utils.rnn.pad_sequence(
        [e.query_embeddings.flatten(0, 1) for e in encoded], batch_first=True
    )
    # Nothing is to be learned here: no position has a label, and no logits are computed.
    inputs = [
        {**x, "labels": torch.full_like(x["input_ids"], prompts.IGNORE_INDEX)}
        for x in batched_inputs
    ]
    language = model.read_answers(inputs, grids, prefixes)
    logits = model.association(language.seg_embeddings, queries)  # P_i k*Q each
    options = model.inference_options
    results = []
    for x, image, scores in zip(inputs, encoded, logits):
        entities, drawn = x["entities_full"], image.query_embeddings.shape[:2]
        candidates = gather_candidates(
            scores[:, : drawn.numel()].unflatten(1, drawn),
            image.masks,
            entities.segment_ids,
            queries=model.mask_decoder.queries,
            entity_masks=own_masks(entities, x["task"] == "panoptic") if options.SNAP else None,
            snapped=image.snapped,
        )
        results.append(answer_from(x, candidates, options))
    return results


def answer_from(x: dict[str, Any], candidates: Candidates, options: Any) -> dict[str, Any]:
    """What the scores of one image's nouns say: ``panoptic_seg`` or ``grounding``, by its task.

    Args:
        x: the mapped dict, see :func:`find_entities`.
        candidates: the entities with the scores of its phrases.
        options: the node ``MODEL.GELLA``.
    """
    phrases = x["phrases"]
    if x["task"] == "panoptic":
        threshold = x.get("threshold", options.PANOPTIC_THRESHOLD)
        masks, scores = candidates.masks, candidates.scores
        return {"panoptic_seg": panoptic_from_scores(scores, masks, phrases, threshold)}
    # MODEL.GELLA.SINGULAR_ARGMAX: a noun in the singular takes one entity.
    argmax = [options.SINGULAR_ARGMAX and not names_several(p["text"]) for p in phrases]
    grounding = ground_phrases(
        phrases,
        candidates,
        x.get("threshold", options.ASSOCIATION_THRESHOLD),
        best_only=argmax,
        none_threshold=options.NONE_THRESHOLD,
        exclusive=x.get("exclusive", False),
    )
    return {"grounding": grounding}


def answer_batch(model: Grounder, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answer mapped dicts, whose tasks may differ; see ``GELLA.forward`` for what comes back."""
    encoded = model.encode_images(batched_inputs)
    inputs = list(batched_inputs)
    to_write = [i for i, x in enumerate(inputs) if x["task"] in ("describe", "extract")]
    if to_write:
        written = model.write_answers([inputs[i] for i in to_write], [encoded[i] for i in to_write])
        for i, answered in zip(to_write, written):
            inputs[i] = answered
    results = [{"text": inputs[i]["text"]} if i in to_write else {} for i in range(len(inputs))]
    to_find = [i for i, x in enumerate(inputs) if x["task"] != "describe"]
    if to_find:
        found = model.find_entities([inputs[i] for i in to_find], [encoded[i] for i in to_find])
        for i, result in zip(to_find, found):
            instances = Instances((inputs[i]["height"], inputs[i]["width"]))
            masks = encoded[i].masks
            instances.pred_masks = (
                torch.stack(list(masks)) if len(masks) else torch.zeros(masks.shape).bool()
            )
            instances.scores = encoded[i].scores
            results[i].update(result, instances=instances)
    return results


def entity_masks(entities: Any, device: torch.device) -> Tensor:
    """Masks of an ``EntityMap``, bool (E, H, W) in its frame, on a device."""
    ids = torch.as_tensor(entities.ids, device=device)
    numbers = torch.arange(1, entities.num_entities + 1, device=device)
    masks = ids[None] == numbers[:, None, None]
    for index in entities.wholes:
        masks[index] = torch.from_numpy(entities.union([index])).to(device)
    return masks


def own_masks(entities: Any, flat: bool) -> Masks:
    """The same in main memory, each painted when it is asked for.

    ``flat``: without the pixels on which a smaller one lies, which would vanish under it in a map
    of one segment per pixel.
    """

    def mask_of(index: int) -> Tensor:
        return torch.from_numpy(entities.ids == index + 1 if flat else entities.union([index]))

    return Masks(mask_of, (entities.num_entities, *entities.size))


def _mean(of_draws: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(of_draws)).mean(dim=0)


def _joined(encoded: Sequence[EncodedImage]) -> tuple[Tensor, list[Prefix] | None]:
    prefixes = [e.prefix for e in encoded if e.prefix is not None]
    grids = torch.cat([e.image_grid for e in encoded])  # B C g g
    return grids, prefixes if len(prefixes) == len(encoded) else None


class _TextStreamer:
    """Hands on the text so far; in transformers' form (``put``, ``end``)."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None  # None until the prompt has come

    def put(self, ids: Tensor) -> None:
        """Take the next tokens; the first call brings the prompt's."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        # A letter may be several tokens; until the last of them it is a question mark.
        text = prompts.decode_answer(self._tokenizer, self._ids).rstrip("\ufffd")
        self._on_text(text)

    def end(self) -> None:
        """Nothing is kept back."""

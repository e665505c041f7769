"""GELLA's inference: answers to whole batches, or to questions about images encoded before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from gella.modeling.mask_decoder import MaskDecoderOutput
from gella.modeling.postprocessing import (
    gather_candidates,
    ground_phrases,
    masks_in_original_frame,
    panoptic_from_scores,
    selection_options,
    snap_to_entities,
)
from gella.modeling.prefix import Prefix
from gella.text import prompts


@dataclass(frozen=True, eq=False)
class Decoded:
    """What the mask decoder found in one image, whatever is asked about it.

    Attributes:
        keep: bool (Q,), the K queries that are entities.
        scores: (K,) probability of each.
        masks: bool (K, height, width) in the original frame; (0, height, width) where the nouns
            choose among the input's own masks and nobody asked for the decoder's.
        snapped: int64 (K,), the input entity that each query reproduces, -1 for none; None where
            that is not looked for.
    """

    keep: Tensor
    scores: Tensor
    masks: Tensor
    snapped: Tensor | None


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What every question about one image needs, computed once; nothing in it changes.

    Attributes:
        query_embeddings: (Q, D), ``E_vc``.
        image_grid: (1, C, g, g), CLIP's penultimate grid.
        decoded: the masks that the nouns choose among.
        prefix: what the language decoder has read of the image; None: it reads it anew each time.
    """

    query_embeddings: Tensor
    image_grid: Tensor
    decoded: Decoded
    prefix: Prefix | None


class Inference(nn.Module):
    """The half of the meta-architecture that answers; ``meta_arch.py`` composes its parts.

    A subclass has the parts, ``encode`` and ``associate``, ``device``, ``tokenizer_path``,
    ``max_new_tokens`` and ``inference_options``.
    """

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of ``MODEL.LANGUAGE.TOKENIZER``, loaded at first use."""
        return prompts.load_tokenizer(self.tokenizer_path)

    @cached_property
    def noun_snippets(self) -> list[list[int]]:
        """Token ids of pieces of extracted nouns, for drafts, each with the likeliest article."""
        answers = [prompts.noun_answer(["the"] * n).split(prompts.SEG_TOKEN) for n in range(2, 31)]
        texts = [" " + parts[0] for parts in answers] + [prompts.SEG_TOKEN + answers[1][1]]
        return [self.tokenizer(t.rstrip(), add_special_tokens=False)["input_ids"] for t in texts]

    # -- a whole batch at once: evaluation ---------------------------------------------------------

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer, ground and segment; see :meth:`GELLA.forward` for what comes back.

        The images of one batch may have different tasks. Where the answer is to be generated, one
        parallel pass over the finished answer gives the <SEG> embeddings, as in training.
        """
        decoder_output, image_grid = self.encode(batched_inputs)
        texts: list[str | None] = [None] * len(batched_inputs)
        waiting = [i for i, x in enumerate(batched_inputs) if x["task"] in ("describe", "extract")]
        if waiting:
            answers = self._generate([batched_inputs[i] for i in waiting], image_grid[waiting])
            batched_inputs = list(batched_inputs)
            for i, answer in zip(waiting, answers):
                texts[i], batched_inputs[i] = self._with_answer(batched_inputs[i], answer)
        _, logits = self.associate(batched_inputs, decoder_output, image_grid)
        results = []
        for i, (inputs, text) in enumerate(zip(batched_inputs, texts)):
            result = {} if text is None else {"text": text}
            if inputs["task"] != "describe":
                decoded = self._decoded(inputs, decoder_output, i)
                instances = Instances((inputs["height"], inputs["width"]))
                instances.pred_masks, instances.scores = decoded.masks, decoded.scores
                known = logits[i][:, decoder_output.query_valid[i]]
                result.update(self._segment(inputs, decoded, known), instances=instances)
            results.append(result)
        return results

    # -- questions about images that were encoded before: the predictor ----------------------------

    @torch.no_grad()
    def encode_images(
        self, views: list[dict[str, Any]], prefix_ids: Tensor | None
    ) -> list[EncodedImage]:
        """Compute what is the same for every question about some images.

        Not for several threads at once: the mask decoder keeps notes during its pass.

        Args:
            views: mapped dicts without a question.
            prefix_ids: (N,) int64, what every prompt begins with, up to its last image token; None:
                prompts are read as wholes.
        """
        output, grid = self.encode(views)
        prefixes = None
        if prefix_ids is not None:
            prefixes = self.language_decoder.remember(grid, prefix_ids.to(self.device))
        own = self.mask_decoder.queries == "entity" and self.inference_options.SNAP
        return [
            EncodedImage(
                query_embeddings=output.query_embeddings[i][output.query_valid[i]].clone(),
                image_grid=grid[i : i + 1].clone(),
                decoded=self._decoded(view, output, i, with_masks=not own),
                prefix=None if prefixes is None else prefixes[i],
            )
            for i, view in enumerate(views)
        ]

    @torch.no_grad()
    def write_answers(
        self,
        batched_inputs: list[dict[str, Any]],
        encoded: Sequence[EncodedImage],
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Generate the answers of "describe" and "extract", one task for all.

        Args:
            batched_inputs: mapped dicts whose prompts end where the answer begins.
            encoded: the image of each; the same one may come several times.
            on_text: gets the text so far, of a single question.
        """
        grids, prefixes = _joined(encoded)
        streamer = None if on_text is None else _TextStreamer(self.tokenizer, on_text)
        answers = self._generate(batched_inputs, grids, prefixes, streamer)
        return [prompts.decode_answer(self.tokenizer, answer.tolist()) for answer in answers]

    @torch.no_grad()
    def find_entities(
        self, batched_inputs: list[dict[str, Any]], encoded: Sequence[EncodedImage]
    ) -> list[dict[str, Any]]:
        """Answer "ground", "refer" and "panoptic": ``grounding`` or ``panoptic_seg`` of each.

        Args:
            batched_inputs: mapped dicts with their answers.
            encoded: the image of each; the same one may come several times.
        """
        grids, prefixes = _joined(encoded)
        padded = nn.utils.rnn.pad_sequence([e.query_embeddings for e in encoded], batch_first=True)
        counts = torch.tensor([len(e.query_embeddings) for e in encoded], device=padded.device)
        valid = torch.arange(padded.shape[1], device=padded.device) < counts[:, None]
        output = MaskDecoderOutput(padded, [], [], valid)
        # Nothing is to be learned here: no position has a label, and no logits are computed.
        inputs = [
            {**x, "labels": torch.full_like(x["input_ids"], prompts.IGNORE_INDEX)}
            for x in batched_inputs
        ]
        _, logits = self.associate(inputs, output, grids, prefixes)
        return [
            self._segment(x, e.decoded, rows[:, mask])
            for x, e, rows, mask in zip(inputs, encoded, logits, valid)
        ]

    # -- steps of both -----------------------------------------------------------------------------

    def _generate(
        self,
        inputs: list[dict[str, Any]],
        image_grid: Tensor,
        prefixes: Sequence[Prefix] | None = None,
        streamer: Any = None,
    ) -> list[Tensor]:
        known = {} if prefixes is None else {"prefixes": prefixes}
        return self.language_decoder.generate(
            image_grid,
            [x["input_ids"].to(self.device) for x in inputs],
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            # The nouns of a caption are words of the prompt; a description has nothing to copy.
            snippets=self.noun_snippets if all(x["task"] == "extract" for x in inputs) else None,
            streamer=streamer,
            **known,
        )

    def _with_answer(self, inputs: dict[str, Any], answer: Tensor) -> tuple[str, dict[str, Any]]:
        # The prompt with its generated answer behind it becomes an input like any other.
        prompt = inputs["input_ids"].to(self.device)
        input_ids = torch.cat([prompt, answer])
        seg_id = self.tokenizer.convert_tokens_to_ids(prompts.SEG_TOKEN)
        seg_positions = (input_ids == seg_id).nonzero().flatten()
        text = prompts.decode_answer(self.tokenizer, answer.tolist())
        phrases = prompts.located(inputs["caption"], prompts.parse_nouns(text))
        return text, {
            **inputs,
            "input_ids": input_ids,
            "labels": torch.full_like(input_ids, prompts.IGNORE_INDEX),
            "seg_positions": seg_positions[: len(phrases)],
            "phrases": phrases[: len(seg_positions)],
        }

    def _entity_masks(self, entities: Any) -> Tensor:
        ids = torch.as_tensor(entities.ids, device=self.device)
        numbers = torch.arange(1, entities.num_entities + 1, device=self.device)
        return ids[None] == numbers[:, None, None]  # E H W

    def _decoded(
        self,
        inputs: dict[str, Any],
        output: MaskDecoderOutput,
        index: int,
        with_masks: bool = True,
    ) -> Decoded:
        options, queries = self.inference_options, self.mask_decoder.queries
        size = inputs["height"], inputs["width"]
        probability = output.entity_logits[-1][index].float().softmax(-1)[:, 0]  # Q
        valid = output.query_valid[index]
        keep = valid
        if queries == "learned":
            keep = keep & (probability > options.ENTITY_SCORE_THRESHOLD)
        masks = masks_in_original_frame(
            output.mask_logits[-1][index][keep] if with_masks else probability.new_zeros(0, 1, 1),
            tuple(inputs["colormap"].shape[-2:]),
            inputs["valid_size"],
            *size,
        )  # K height width
        snapped = None
        if queries == "learned" and options.SNAP:
            entity_masks = self._entity_masks(inputs["entities_full"])
            snapped = snap_to_entities(masks, entity_masks, options.SNAP_IOU)
        return Decoded(keep[valid], probability[keep], masks, snapped)

    def _segment(self, inputs: dict[str, Any], decoded: Decoded, logits: Tensor) -> dict[str, Any]:
        options = self.inference_options
        candidates = gather_candidates(
            logits[:, decoded.keep],
            decoded.masks,
            self._entity_masks(inputs["entities_full"]) if options.SNAP else decoded.masks,
            inputs["entities_full"].segment_ids,
            queries=self.mask_decoder.queries,
            snap=options.SNAP,
            snap_iou=options.SNAP_IOU,
            snapped=decoded.snapped,
        )
        if inputs["task"] == "panoptic":
            panoptic_seg = panoptic_from_scores(
                candidates.scores, candidates.masks, inputs["phrases"], options.PANOPTIC_THRESHOLD
            )
            return {"panoptic_seg": panoptic_seg}
        grounding = ground_phrases(inputs["phrases"], candidates, **selection_options(options))
        return {"grounding": grounding}


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

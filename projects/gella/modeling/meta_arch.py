"""GELLA, the meta-architecture: the one file that composes the boxes of the paper's Figure 2."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gella.entities.view import painted
from gella.modeling import inference
from gella.modeling.association import Association
from gella.modeling.criterion import GellaCriterion
from gella.modeling.generation import Prefix
from gella.modeling.language_decoder import LanguageDecoder, LanguageOutput
from gella.modeling.mask_decoder import MaskDecoderOutput
from gella.modeling.resoblend import ResoBlend
from gella.modeling.upstream_mask_decoder import build_mask_decoder
from gella.text import prompts
from gella.text.copying import CopiedNouns, Vocabulary

_logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class GELLA(nn.Module):
    """Ground the nouns of a caption in given entity masks (arXiv 2402.02555, Figure 2).

    Training and inference share one path up to the heads: :meth:`encode` and :meth:`read_answers`.
    The module knows nothing of parallelism: every parameter takes part in the losses of every
    training step, with weight 0 in what a task does not train.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    image_mean: Tensor
    image_std: Tensor

    encode_images = inference.encode_images
    write_answers = inference.write_answers
    find_entities = inference.find_entities

    @configurable
    def __init__(
        self,
        *,
        colormap_encoder: nn.Module,
        image_encoder: nn.Module,
        resoblend: nn.Module,
        mask_decoder: nn.Module,
        language_decoder: nn.Module,
        association: nn.Module,
        criterion: nn.Module,
        statistics: dict[str, list[float]],
        answer_weight: float,
        caption_nouns: float,
        tokenizer_path: str,
        max_new_tokens: int,
        inference_options: Any,
    ) -> None:
        """Compose the model from its parts.

        Args:
            colormap_encoder: f_Upsilon, eq. 1. image_encoder: f_Omega, eq. 2.
            resoblend: eq. 7 and 8. mask_decoder: Mask2Former's head. language_decoder: eq. 3 to 5.
            association: eq. 9. criterion: the losses of eq. 6 and 9.
            statistics: ``pixel_mean`` and ``pixel_std`` of the colormap, ``image_mean`` and
                ``image_std`` of CLIP's image: RGB in 0..255.
            answer_weight: of L_ans in eq. 10.
            caption_nouns: of a caption that counts as one in eq. 9's loss; 0: every one does.
            tokenizer_path: read at the first question only.
            max_new_tokens: the longest generated answer.
            inference_options: the node ``MODEL.GELLA``.
        """
        super().__init__()
        self.colormap_encoder = colormap_encoder
        self.image_encoder = image_encoder
        self.resoblend = resoblend
        self.mask_decoder = mask_decoder
        self.language_decoder = language_decoder
        self.association = association
        self.criterion = criterion
        self.answer_weight, self.caption_nouns = answer_weight, caption_nouns
        self.tokenizer_path = tokenizer_path
        self.max_new_tokens = max_new_tokens
        self.inference_options = inference_options
        self._most_entities = 0  # that a warning has told of
        for name, values in statistics.items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Build every part from the config; the encoders and the head by their registered names."""
        draws, queries = cfg.TEST.COLOR_DRAWS, cfg.MODEL.MASK_DECODER.QUERIES
        if draws < 1 or (draws > 1 and queries == "learned"):
            raise ValueError(
                f"TEST.COLOR_DRAWS is {draws} and MODEL.MASK_DECODER.QUERIES is {queries!r}: draw "
                "once, or oftener with entity queries; a learned query is another entity each time"
            )
        if draws > 1 and cfg.INPUT.GELLA.COLORS == "location":
            raise ValueError(
                f"TEST.COLOR_DRAWS is {draws} and INPUT.GELLA.COLORS is 'location', whose draws "
                "are all equal: draw once, or take random or separated colours"
            )
        colormap_encoder = build_backbone(cfg)
        image_encoder = BACKBONE_REGISTRY.get(cfg.MODEL.IMAGE_ENCODER.NAME)(cfg, None)
        image_shape = image_encoder.output_shape()["last"]
        resoblend = ResoBlend(cfg, image_shape, colormap_encoder.output_shape())
        mask_decoder = build_mask_decoder(cfg, resoblend.output_shape())
        language_decoder = LanguageDecoder(cfg, image_shape.channels)
        return dict(
            colormap_encoder=colormap_encoder,
            image_encoder=image_encoder,
            resoblend=resoblend,
            mask_decoder=mask_decoder,
            language_decoder=language_decoder,
            association=Association(
                cfg, language_decoder.hidden_size, cfg.MODEL.MASK_DECODER.HIDDEN_DIM
            ),
            criterion=GellaCriterion(cfg),
            statistics={
                "pixel_mean": cfg.MODEL.PIXEL_MEAN,
                "pixel_std": cfg.MODEL.PIXEL_STD,
                "image_mean": cfg.MODEL.IMAGE_ENCODER.PIXEL_MEAN,
                "image_std": cfg.MODEL.IMAGE_ENCODER.PIXEL_STD,
            },
            answer_weight=cfg.MODEL.LANGUAGE.ANSWER_WEIGHT,
            caption_nouns=cfg.MODEL.ASSOCIATION.CAPTION_NOUNS,
            tokenizer_path=cfg.MODEL.LANGUAGE.TOKENIZER,
            max_new_tokens=cfg.MODEL.LANGUAGE.MAX_NEW_TOKENS,
            inference_options=cfg.MODEL.GELLA,
        )

    @property
    def device(self) -> torch.device:
        """Where the model lives; inputs are moved there."""
        return self.pixel_mean.device

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of ``MODEL.LANGUAGE.TOKENIZER``, loaded at first use."""
        return prompts.load_tokenizer(self.tokenizer_path)

    @cached_property
    def noun_snippets(self) -> list[list[int]]:
        """Token ids of pieces of extracted nouns, for drafts, each with the likeliest article."""
        texts = [f" {prompts.noun_answer_head(n)}the" for n in range(2, 31)]
        texts.append(f"{prompts.SEG_TOKEN}, the")
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    def copied_nouns(self, inputs: dict[str, Any]) -> CopiedNouns | None:
        """What may be said about the caption of a mapped dict; None: anything."""
        if not self.inference_options.COPY_NOUNS or inputs["task"] != "extract":
            return None
        return CopiedNouns(self._vocabulary, inputs["caption"][: inputs["num_read"]])

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Train on, or ground, a batch of mapped dicts (``data/mapper.py``).

        Args:
            batched_inputs: in training all of one task.

        Returns:
            in training a dict of weighted scalar losses with fixed names, means over the images of
            what each has alone; else a dict per image:
            ``grounding``, ``instances``, ``panoptic_seg`` (panoptic), ``text`` (describe, extract).
        """
        if not self.training:
            return inference.answer_batch(self, batched_inputs)
        if batched_inputs[0]["task"] == "describe":
            # Describing trains the language part only (section 3.4). The other losses are 0 and
            # depend on every parameter outside it, so that all steps have the same losses and all
            # ranks the same gradients to exchange, without the cost of the parts that are not
            # needed. The language part, billions of parameters, is trained by its own loss.
            idle = sum(
                p.sum() * 0.0
                for name, p in self.named_parameters()
                if p.requires_grad and not name.startswith("language_decoder.")
            )
            losses = {n: idle for n in self.criterion.loss_names(self.mask_decoder.num_outputs)}
            grid = self.image_encoder(self._pixels(batched_inputs, "image"))["penultimate"]
            language = self.read_answers(batched_inputs, grid)
        else:
            (output,), grid = self.encode(batched_inputs)
            counts = [1 + len(x.get("more", ())) for x in batched_inputs]
            asked = [
                y for x in batched_inputs for y in (x, *({**x, **z} for z in x.get("more", ())))
            ]
            language = self.read_answers(
                asked, grid.repeat_interleave(torch.tensor(counts, device=self.device), dim=0)
            )
            targets, valid = zip(*(self._association_targets(x) for x in asked))
            nouns, known = _joined(language.seg_embeddings, counts), _joined(valid, counts)
            losses = self.criterion(
                output,
                target_masks=self._entity_masks(batched_inputs),
                association_logits=self.association(nouns, output.query_embeddings),
                association_targets=_joined(targets, counts),
                association_valid=known,
                association_shares=[
                    rows.sum() / (count * self.caption_nouns)
                    if self.caption_nouns and x["task"] in ("extract", "ground")
                    else 1.0
                    for x, rows, count in zip(batched_inputs, known, counts)
                ],
            )
        losses["loss_answer"] = language.loss_answer * self.answer_weight
        return losses

    def encode(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[list[MaskDecoderOutput], Tensor]:
        """Run the vision side.

        Returns:
            the mask decoder's output for each draw of colours (one but for ``TEST.COLOR_DRAWS``),
            and CLIP's penultimate grid (B, C, g, g) for the language decoder.
        """
        grids = self.image_encoder(self._pixels(batched_inputs, "image"))
        known: dict[str, Tensor] = {}
        if self.mask_decoder.queries == "entity":
            masks = self._entity_masks(batched_inputs)
            valid = pad_sequence([m.new_ones(len(m)) for m in masks], batch_first=True)  # B E
            padded = pad_sequence(masks, batch_first=True)  # B E H W
            known = {"entity_masks": padded, "entity_valid": valid.bool()}
        views = [batched_inputs] + [
            [{"colormap": painted(x["entities"], c)} for x, c in zip(batched_inputs, colors)]
            for colors in zip(*(x.get("redrawn", ()) for x in batched_inputs))
        ]
        outputs = []
        for view in views:
            pyramid = self.colormap_encoder(self._pixels(view, "colormap"))
            fused = self.resoblend(grids["last"], pyramid)  # Z_vc
            outputs.append(self.mask_decoder(fused, **known))
        if self.mask_decoder.queries == "learned":
            num_queries = outputs[0].query_embeddings.shape[1]
            most = max(x["entities"].num_entities for x in batched_inputs)
            if most > max(num_queries, self._most_entities):
                self._most_entities = most
                _logger.warning(
                    "an image has %d entities, but MODEL.MASK_DECODER.NUM_QUERIES is %d: at most "
                    "so many can be found in it; raise it, or set MODEL.MASK_DECODER.QUERIES to "
                    "entity",
                    *(most, num_queries),
                )
        return outputs, grids["penultimate"]

    def read_answers(
        self,
        batched_inputs: list[dict[str, Any]],
        image_grid: Tensor,
        prefixes: Sequence[Prefix] | None = None,
    ) -> LanguageOutput:
        """Run the language side over prompts with their answers; see ``LanguageDecoder.forward``.

        Args:
            batched_inputs: mapped dicts.
            image_grid: (B, C, g, g), their penultimate grids.
            prefixes: what was read of each image already.
        """
        ids, labels, positions = (
            [x[key].to(self.device) for x in batched_inputs]
            for key in ("input_ids", "labels", "seg_positions")
        )
        return self.language_decoder(image_grid, ids, labels, positions, prefixes)

    def _pixels(self, batched_inputs: list[dict[str, Any]], key: str) -> Tensor:
        pixels = torch.stack([x[key] for x in batched_inputs]).to(self.device)  # B 3 H W, uint8
        if key == "image":
            return (pixels - self.image_mean) / self.image_std
        return (pixels - self.pixel_mean) / self.pixel_std

    def _entity_masks(self, batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
        return [inference.entity_masks(x["entities"], self.device) for x in batched_inputs]

    def _association_targets(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # G^A of eq. 9, and whether a noun's entities are known at all: captions made by a
        # multimodal model name nouns without saying where they are.
        num_entities = inputs["entities"].num_entities
        phrases = inputs["phrases"] if len(inputs["seg_positions"]) else []
        targets = torch.zeros(len(phrases), num_entities, device=self.device)
        valid = torch.zeros(len(phrases), dtype=torch.bool, device=self.device)
        for row, phrase in enumerate(phrases):
            indices = phrase["entity_indices"]
            valid[row] = indices is not None
            targets[row, indices or []] = 1.0
        return targets, valid


def _joined(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    # Of each image one tensor, from those of its prompts.
    rest = iter(tensors)
    return [torch.cat([next(rest) for _ in range(count)]) for count in counts]

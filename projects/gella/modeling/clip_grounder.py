"""A first answer without training: nouns scored against entities by a public image-text model.

Each entity has CLIP's image features twice, pooled under its mask and of its crop; a noun has
CLIP's text features, and their cosines decide. The three steps are those of ``meta_arch.GELLA``, so
that predictor, demo, page and evaluators are the same. It is the baseline of an evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gella.entities.view import fitted_size
from gella.modeling import inference
from gella.modeling.postprocessing import Candidates, Masks
from gella.text import prompts
from gella.text.words import noun_chunks, with_article

_CROPS = 32  # that go through the image encoder at a time
# Around an entity its crop shows this many cells per side: blurred, which served CLIP better than
# boxes, circles, and no background at all (Fine-Grained Visual Prompting, arXiv 2306.04356).
_BLURRED_CELLS = 8


@dataclass(frozen=True, eq=False)
class EncodedEntities:
    """What every question about one image needs, computed once; nothing in it changes.

    Attributes:
        pooled, crops: (E, D), the features of each entity, of length 1; 0 without any pixel.
        scores: (E,), all 1: what the input has is an entity.
        masks: its E bool masks (height, width), in the original frame.
    """

    pooled: Tensor
    crops: Tensor
    scores: Tensor
    masks: Masks


@META_ARCH_REGISTRY.register()
class ClipGrounder(nn.Module):
    """Ground nouns in given entity masks by a CLIP of transformers, as it is; nothing is trained.

    A noun's score of an entity is its share in CLIP's softmax over the image's entities, relative
    to the best one's: 1 for the best, and ``MODEL.GELLA.ASSOCIATION_THRESHOLD`` 0.5 takes all whose
    share is more than half of it. The shares alone would fall with their number: each of four dogs
    has a quarter. ``NONE_THRESHOLD`` therefore never applies. Of the task "panoptic" the scores are
    an entity's softmax over the categories, as CLIP classifies images.
    """

    text_model: Any
    text_projection: Any
    vision_model: Any
    visual_projection: Any
    logit_scale: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        clip: nn.Module,
        tokenizer: Any,
        pixel_mean: list[float],
        pixel_std: list[float],
        options: Any,
        inference_options: Any,
    ) -> None:
        """Compose the model.

        Args:
            clip: transformers' ``CLIPModel``; its keys of weights are those of this model.
            tokenizer: ends every text as CLIP's does.
            pixel_mean, pixel_std: RGB in 0..255.
            options: the node ``MODEL.CLIP``.
            inference_options: the node ``MODEL.GELLA``.

        Raises:
            ValueError: ``MODEL.CLIP.TEMPLATE`` has no place for the noun.
        """
        super().__init__()
        if "{}" not in options.TEMPLATE:
            raise ValueError(f"MODEL.CLIP.TEMPLATE {options.TEMPLATE!r} has no {{}} for the noun")
        for name, child in clip.named_children():
            self.add_module(name, child)
        self.logit_scale = clip.logit_scale
        self.requires_grad_(False)
        self.tokenizer, self.options = tokenizer, options
        self.inference_options = inference_options
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Build the CLIP of the folder ``MODEL.WEIGHTS``, from which its weights are loaded later.

        Raises:
            ValueError: there is no such folder, or it is of another kind of model; or colours are
                to be drawn several times (``TEST.COLOR_DRAWS``), which are not looked at.
        """
        from transformers import AutoConfig, CLIPConfig, CLIPModel

        if cfg.TEST.COLOR_DRAWS != 1:
            raise ValueError(
                f"TEST.COLOR_DRAWS is {cfg.TEST.COLOR_DRAWS}, but ClipGrounder looks at no colours:"
                " leave it at 1"
            )
        folder = cfg.MODEL.WEIGHTS
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise ValueError(
                f"ClipGrounder finds no config.json in MODEL.WEIGHTS {folder!r}: set"
                " MODEL.CLIP.NAME to a CLIP on the hub, such as openai/clip-vit-base-patch16, or to"
                " its folder"
            )
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"{folder} holds a model of type {config.model_type!r}, not 'clip'")
        return dict(
            clip=CLIPModel(config),
            tokenizer=prompts.load_tokenizer(cfg.MODEL.LANGUAGE.TOKENIZER),
            pixel_mean=cfg.MODEL.IMAGE_ENCODER.PIXEL_MEAN,
            pixel_std=cfg.MODEL.IMAGE_ENCODER.PIXEL_STD,
            options=cfg.MODEL.CLIP,
            inference_options=cfg.MODEL.GELLA,
        )

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Ground a batch of mapped dicts, see ``GELLA.forward``; RuntimeError in training."""
        if self.training:
            raise RuntimeError("ClipGrounder is not trained: use it with --eval-only")
        return inference.answer_batch(self, batched_inputs)

    @torch.no_grad()
    def encode_images(
        self, views: list[dict[str, Any]], prefix_ids: Tensor | None = None
    ) -> list[EncodedEntities]:
        """Compute the features of all entities of some images.

        Args:
            views: mapped dicts with ``entities_full``; their ``image`` is what crops are cut from.
            prefix_ids: of prompts, which CLIP does not read.
        """
        return [self._encode(view) for view in views]

    def _encode(self, view: dict[str, Any]) -> EncodedEntities:
        masks = inference.own_masks(view["entities_full"], flat=False)
        image = view["image"].to(self.pixel_mean.device)
        size = fitted_size(view["height"], view["width"], image.shape[-1])  # less the padding
        picture = (image[:, : size[0], : size[1]] - self.pixel_mean) / self.pixel_std
        grid = self.grid_features(picture)
        empty = grid.new_zeros(0, self.visual_projection.out_features)
        pooled, crops = [empty], [empty]
        for first in range(0, len(masks), _CROPS):
            few = (masks[k] for k in range(first, min(first + _CROPS, len(masks))))
            inside = torch.stack(
                [F.adaptive_avg_pool2d(mask.to(image.device).float()[None], size) for mask in few]
            )  # n 1 h w, the share of each pixel
            shares = F.adaptive_avg_pool2d(inside, (grid.shape[0], grid.shape[1])).flatten(1)  # n g
            mean = shares @ grid.flatten(0, 1) / shares.sum(1, keepdim=True).clamp(min=1e-9)
            pooled.append(self.visual_projection(mean))
            cut = torch.stack([self.crop(picture, one) for one in inside])  # n 3 S S
            seen = self.visual_projection(self.vision_model(pixel_values=cut).pooler_output)
            crops.append(seen * inside.any(-1).any(-1))
        return EncodedEntities(
            pooled=F.normalize(torch.cat(pooled).float(), dim=-1),
            crops=F.normalize(torch.cat(crops).float(), dim=-1),
            scores=torch.ones(len(masks)),
            masks=masks,
        )

    def grid_features(self, picture: Tensor) -> Tensor:
        """Features of a picture's patches, to be projected: the value path of the last layer.

        Its attention mixes all patches into what the class token needs. Without it each patch keeps
        its own values (MaskCLIP, arXiv 2112.01071); without the residual and the feed-forward part
        they are told apart better still (ClearCLIP, arXiv 2407.12442).

        Args:
            picture: (3, h, w) normalised; scaled to ``MODEL.CLIP.DENSE_SIZE`` and whole patches.

        Returns:
            (g_h, g_w, C) behind the final norm.
        """
        vision = self.vision_model
        sides = fitted_size(picture.shape[1], picture.shape[2], self.options.DENSE_SIZE)
        g_h, g_w = (max(1, round(side / vision.config.patch_size)) for side in sides)
        size = (g_h * vision.config.patch_size, g_w * vision.config.patch_size)
        pixels = F.interpolate(picture[None], size, mode="bicubic", antialias=True)
        options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
        before = vision(pixel_values=pixels, **options).hidden_states[-2][0, 1:]  # g C
        last = vision.encoder.layers[-1]
        values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(before)))
        return vision.post_layernorm(values).unflatten(0, (g_h, g_w))

    def crop(self, picture: Tensor, inside: Tensor) -> Tensor:
        """The square around an entity as CLIP's input, what is not of it blurred.

        It is as far inside the picture as it goes; where it is larger, the rest is CLIP's mean.

        Args:
            picture: (3, h, w) normalised.
            inside: (1, h, w), the entity's share of each pixel, 0..1.

        Returns:
            (3, S, S).
        """
        side = self.vision_model.config.image_size
        spans = [inside[0].any(axis).nonzero() for axis in (1, 0)]
        if not len(spans[0]):
            return picture.new_zeros(3, side, side)
        ends = [(int(span[0]), int(span[-1]) + 1) for span in spans]
        around = max(high - low for low, high in ends) * (1 + 2 * self.options.CROP_PADDING)
        cut = min(ceil(around), max(picture.shape[-2:]))  # pixels of its side
        pads: list[int] = []  # below 0 they cut
        for (low, high), size in zip(ends, picture.shape[-2:]):
            middle = (low + high - cut) // 2
            start = min(max(middle, 0), size - cut) if cut <= size else (size - cut) // 2
            pads = [-start, start + cut - size, *pads]  # the last axis comes first
        both = F.pad(torch.cat([picture, inside]), pads)[None]
        both = F.interpolate(both, (side, side), mode="bicubic", antialias=True)[0]
        shown, share = both[:3], both[3:].clamp(0, 1)
        cells = F.adaptive_avg_pool2d(shown[None], _BLURRED_CELLS)
        blurred = F.interpolate(cells, (side, side), mode="bilinear", align_corners=False)[0]
        return share * shown + (1 - share) * blurred

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """CLIP's features of P texts, (P, D) of length 1; what is too long for it is cut."""
        if not texts:
            return self.pixel_mean.new_zeros(0, self.text_projection.out_features)
        most = self.text_model.config.max_position_embeddings
        listed = self.tokenizer(list(texts), verbose=False)["input_ids"]
        # A text's features are those of its first end, behind which nothing counts.
        rows = [torch.tensor(ids[: most - 1] + ids[most - 1 :][-1:]) for ids in listed]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_token_id)
        pooled = self.text_model(input_ids=ids.to(self.pixel_mean.device)).pooler_output
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def write_answers(
        self,
        batched_inputs: list[dict[str, Any]],
        encoded: Sequence[EncodedEntities],
        on_text: Callable[[str], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Find the nouns of captions by a chunker; see `inference.write_answers`.

        Raises:
            ValueError: a description is asked for.
            ImportError: the chunker is not installed.
        """
        written = []
        for x in batched_inputs:
            if x["task"] != "extract":
                raise ValueError("ClipGrounder describes no picture; give captions")
            phrases = noun_chunks(x["caption"][: x["num_read"]], self.options.CHUNKER)
            text = prompts.noun_answer([p["text"] for p in phrases]) if phrases else ""
            if on_text is not None:
                on_text(text)
            written.append({**x, "text": text, "phrases": phrases})
        return written

    @torch.no_grad()
    def find_entities(
        self, batched_inputs: list[dict[str, Any]], encoded: Sequence[EncodedEntities]
    ) -> list[dict[str, Any]]:
        """Ground all nouns of each input in one pass; see `inference.find_entities`."""
        results = []
        for x, image in zip(batched_inputs, encoded):
            flat = x["task"] == "panoptic"
            names = [p["text"] for p in x["phrases"]]
            names = [with_article(name) for name in names] if flat else names
            texts = self.text_features([self.options.TEMPLATE.format(name) for name in names])
            weight, scale = self.options.CROP_WEIGHT, self.options.LOGIT_SCALE
            # Autocast would round the cosines to three digits, and the softmax tells the fourth.
            with torch.autocast(texts.device.type, enabled=False):
                entities = weight * image.crops + (1 - weight) * image.pooled
                logits = (scale or self.logit_scale.exp()) * (texts @ entities.T)  # P E
            best = logits.amax(1, keepdim=True) if len(entities) else 0.0
            scores = logits.softmax(0) if flat else (logits - best).exp()
            entities_full = x["entities_full"]
            candidates = Candidates(
                inference.own_masks(entities_full, flat), list(entities_full.segment_ids), scores
            )
            results.append(inference.answer_from(x, candidates, self.inference_options))
        return results

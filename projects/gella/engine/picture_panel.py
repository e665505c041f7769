"""A picture of the training every so often: what the model saw, should have said, and says."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image, ImageDraw

from gella.data.mapper import as_test_input
from gella.engine.evaluation_hooks import undisturbed
from gella.entities.entity_map import EntityMap
from gella.pictures.chips import PAPER, Piece, draw_row, load_font
from gella.pictures.grounding import Grounding
from gella.pictures.panels import draw_colormap

_TITLE_HEIGHT = 40  # pixels
_MARGIN = 16  # pixels, left of the titles


class PicturePanel(HookBase):
    """Every ``VIS_PERIOD`` iterations a picture of one sample of the batch just trained.

    It shows image and ground truth, image and prediction, and the colormap, as ``panel`` in
    TensorBoard. The prediction is that of the weights after the step, in evaluation mode, for the
    nouns of the training answer (nothing is generated). Nothing that training depends on changes.

    A step that describes has no nouns: the next one that has is drawn. Every rank makes the forward
    pass for a sample of its own, since parameters may be spread over the ranks; rank 0 draws.
    """

    def __init__(self, period: int, output_dir: str) -> None:
        """Args:
        period: ``VIS_PERIOD``, iterations, above 0.
        output_dir: where TensorBoard's files go if the trainer's storage takes no images (the
            small stand-in for Detectron2), in a folder ``pictures``.
        """
        self._period, self._folder = period, os.path.join(output_dir, "pictures")
        self._due = False
        self._writer: Any = None

    def after_step(self) -> None:
        """Draw if it is due and the batch has nouns; all ranks have the same task."""
        self._due = self._due or (self.trainer.iter + 1) % self._period == 0
        sample = self.trainer._trainer.batch[0]
        if not self._due or sample["task"] == "describe":
            return
        self._due = False
        inputs = panel_input(sample)
        model = self.trainer.model
        model = getattr(model, "module", model)  # a wrapper would count this as a training step
        with undisturbed(model), torch.no_grad():
            model.eval()
            grounding = model([inputs])[0]["grounding"]
            if comm.is_main_process():
                title = f"iteration {self.trainer.iter}, image {sample.get('image_id')}"
                options = self.trainer.cfg.MODEL
                learned = options.MASK_DECODER.QUERIES == "learned"
                own_masks = learned and not options.GELLA.SNAP
                self._put(draw_panel(inputs, grounding, title, own_masks=own_masks))

    def after_train(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()

    def _put(self, picture: Image.Image) -> None:
        pixels = np.asarray(picture).transpose(2, 0, 1)  # 3 H W, uint8
        storage = self.trainer.storage
        if hasattr(storage, "put_image"):
            storage.put_image("panel", pixels)
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder)
        self._writer.add_image("panel", pixels, self.trainer.iter)
        self._writer.flush()


def panel_input(sample: dict[str, Any]) -> dict[str, Any]:
    """A mapped training sample as `as_test_input` gives it, with ``picture``, uint8 (h, w, 3).

    The picture is CLIP's image without its padding, brought to the size of the answer's frame.

    Args:
        sample: mapped for training, for any task but "describe".
    """
    height, width = sample["valid_size"]
    square = sample["image"].cpu().numpy().transpose(1, 2, 0)
    # Both frames scale the longest side to their own and pad the rest (entities/view.py).
    scale = square.shape[0] / max(height, width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    crop = Image.fromarray(np.ascontiguousarray(square[:rows, :columns]))
    picture = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
    return {**as_test_input(sample), "picture": picture}


def draw_panel(
    inputs: dict[str, Any],
    grounding: list[dict[str, Any]],
    title: str,
    *,
    own_masks: bool = False,
) -> Image.Image:
    """Stack the ground truth, the prediction and the colormap of one sample.

    Args:
        inputs: from :func:`panel_input`.
        grounding: the model's answer for it, see `gella.pictures.grounding.Grounding.phrases`.
        title: what to write above.
        own_masks: the answer's ids number masks that the model decoded itself, not the entities.
    """
    entities, caption, picture = inputs["entities_full"], inputs["caption"], inputs["picture"]
    truth = [_truth(phrase, entities) for phrase in inputs["phrases"]]
    known = any(phrase["entity_indices"] is not None for phrase in inputs["phrases"])
    what = "ground truth" if known else "the entities of these nouns are not annotated"
    colormap = inputs["colormap"].cpu().numpy().transpose(1, 2, 0)

    def grounded(phrases: list[dict[str, Any]], own: bool) -> Image.Image:
        # Named weights: a model in training needs no warning that it is untrained.
        named: dict[str, Any] = {"own_masks": own, "weights": "in training"}
        return Grounding(picture, caption, entities, phrases, colormap, **named).plot()

    parts = [
        (f"{title}: {what}", grounded(truth, False)),
        ("prediction", grounded(grounding, own_masks)),
        ("colormap", draw_colormap(colormap, inputs["valid_size"])),
    ]
    width = max(part.width for _, part in parts)
    height = sum(part.height + _TITLE_HEIGHT for _, part in parts)
    panel = Image.new("RGB", (width, height), PAPER)
    draw, font, y = ImageDraw.Draw(panel), load_font(22), 0
    for text, part in parts:
        draw_row(draw, (_MARGIN, y), [Piece(text, None)], font, _TITLE_HEIGHT)
        panel.paste(part, (0, y + _TITLE_HEIGHT))
        y += part.height + _TITLE_HEIGHT
    return panel


def _truth(phrase: dict[str, Any], entities: EntityMap) -> dict[str, Any]:
    indices = phrase["entity_indices"] or []  # None: nobody knows
    return {
        "phrase": phrase["text"],
        "start": phrase["start"],
        "end": phrase["end"],
        "entity_ids": [entities.segment_ids[index] for index in indices],
        "scores": [1.0 for _ in indices],
        "mask": entities.union(indices),
    }

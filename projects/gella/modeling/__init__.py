"""The model. Importing this package fills Detectron2's registries with its parts."""

from gella.modeling import (
    clip_grounder,
    colormap_encoder,
    image_encoder,
    mask_decoder,
    meta_arch,
)

__all__ = ["clip_grounder", "colormap_encoder", "image_encoder", "mask_decoder", "meta_arch"]

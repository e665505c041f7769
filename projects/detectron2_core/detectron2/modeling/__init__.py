"""Registries and builders of the parts of a model; no model is provided here."""

from .backbone import BACKBONE_REGISTRY, Backbone, build_backbone
from .meta_arch import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, build_model, build_sem_seg_head

__all__ = ["BACKBONE_REGISTRY", "Backbone", "META_ARCH_REGISTRY", "SEM_SEG_HEADS_REGISTRY"]
__all__ += ["build_backbone", "build_model", "build_sem_seg_head"]

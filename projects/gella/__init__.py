"""GELLA: ground every entity that a caption names, on entity masks from any source.

Importing this package fills Detectron2's registries (``META_ARCH_REGISTRY``: ``GELLA`` and
``ClipGrounder``; ``BACKBONE_REGISTRY``; ``SEM_SEG_HEADS_REGISTRY``) and its dataset catalogs (names
that start with ``gella_``) and does nothing else: no file is read and no heavy third party is
imported.
"""

from __future__ import annotations

from gella import data, modeling, segmenters
from gella.config import add_gella_config, load_config
from gella.entities.entity_map import EntityMap
from gella.predictor import GellaPredictor, Grounding, Request, Scene

__version__ = "0.1.0"

__all__ = [
    "EntityMap",
    "GellaPredictor",
    "Grounding",
    "Request",
    "Scene",
    "add_gella_config",
    "data",
    "load_config",
    "modeling",
    "segmenters",
]

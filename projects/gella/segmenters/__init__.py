"""Live segmenters: class-agnostic entity masks from models of other libraries.

Importing this package makes the kind ``segmenter`` of ``INPUT.GELLA.ENTITY_SOURCES`` known.
"""

from gella.segmenters import from_detectron2, from_transformers, segmenter

__all__ = ["from_detectron2", "from_transformers", "segmenter"]

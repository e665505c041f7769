"""Live segmenters: class-agnostic entity masks from models of other libraries.

Importing this package makes the kind ``segmenter`` of ``INPUT.GELLA.ENTITY_SOURCES`` known.
"""

from gella.segmenters import segmenter

__all__ = ["segmenter"]

"""Datasets: synthetic scenes, readers of the real benchmarks' files, the mapper, task sampling.

Importing it registers the datasets by name below ``$DETECTRON2_DATASETS``; their files are read
when a dataset is first asked for.
"""

from __future__ import annotations

from gella.data.catalog import register_all
from gella.data.datasets import root_from_environment

register_all(root_from_environment())

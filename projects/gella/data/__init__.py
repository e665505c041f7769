"""Datasets: readers of the benchmarks' files, the mapper, task sampling.

Importing it registers the datasets by name below ``$DETECTRON2_DATASETS``; their files are read
when a dataset is first asked for.
"""

from __future__ import annotations

from gella.data.register import register_all, root_from_environment

register_all(root_from_environment())

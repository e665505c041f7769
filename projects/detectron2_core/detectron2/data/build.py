"""The loader for inference (the project builds its own training loader)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import data as torchdata

from .samplers import InferenceSampler


class _Mapped(torchdata.Dataset):
    """Samples of a list or of a map-style dataset, each passed through a function."""

    def __init__(self, dataset, mapper: Callable[[Any], Any] | None) -> None:
        self._dataset, self._mapper = dataset, mapper

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        sample = self._dataset[idx]
        return sample if self._mapper is None else self._mapper(sample)


def build_detection_test_loader(
    dataset: list[Any] | torchdata.Dataset,
    *,
    mapper: Callable[[Any], Any] | None,
    sampler: torchdata.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
) -> torchdata.DataLoader:
    """Build a loader that yields lists of mapped samples, in order, none lost.

    ``dataset``: list of dicts or a map-style dataset. ``mapper``: turns a sample into the model's
    input; ``None`` if the dataset's samples are that already. ``sampler``: by default
    ``InferenceSampler``, which splits the set over the ranks.
    """
    sampler = sampler or InferenceSampler(len(dataset))
    dataset = _Mapped(dataset, mapper)
    return torchdata.DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or list,
    )

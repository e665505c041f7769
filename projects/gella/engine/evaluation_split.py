"""Test sets while training: small deterministic subsets, and as many batches on every rank.

Under ZeRO stage 3 each forward pass gathers the weights from all ranks, so a rank with fewer images
than the others would leave them waiting for ever. Here shorter shares are filled up with repeated
samples, which are marked (``is_padding``) and which no evaluator gets to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from gella.data.records import Records, as_records, selected
from gella.data.sampling import start_worker
from gella.data.wrapped_loader import WrappedLoader

__all__ = ["EvenLoader", "RealSamples", "build_even_loader", "evenly_spaced", "even_share"]

PADDING_KEY = "is_padding"
"""True in the mapped dicts that only keep a rank busy."""


def evenly_spaced(records: Sequence[dict[str, Any]], num_images: int) -> Records:
    """All records of some images, evenly spaced over the dataset and the same in every run.

    Args:
        records: dataset dicts; several of them may be of one image.
        num_images: how many images (``TEST.SUBSET``); 0, or more than there are, takes all.
    """
    records = as_records(records)
    ids = records.image_ids().astype(object)
    for place in np.flatnonzero(ids == ""):
        ids[place] = ("", int(place))  # without an id, a record is an image of its own
    numbers: dict[Any, int] = {}
    images = np.array([numbers.setdefault(i, len(numbers)) for i in ids.tolist()], dtype=np.int64)
    count = len(numbers)
    if num_images <= 0 or num_images >= count:
        return records
    chosen = np.arange(num_images) * count // num_images
    return selected(records, np.flatnonzero(np.isin(images, chosen)))


def even_share(size: int, rank: int, world_size: int) -> tuple[list[int], int]:
    """Places of the samples that one rank evaluates, equally many on all ranks.

    Args:
        size: samples in all, at least 1.
        rank: 0..world_size - 1.
        world_size: number of ranks.

    Returns:
        ``(places, num_real)``: ceil(size / world_size) places, of which the first ``num_real`` are
        this rank's contiguous share (Detectron2's ``InferenceSampler``) and the others repetitions.

    Raises:
        ValueError: there is no sample.
    """
    if size < 1:
        raise ValueError("a test set without a record cannot be evaluated")
    share, longer = divmod(size, world_size)
    begin = rank * share + min(rank, longer)
    places = list(range(begin, begin + share + (rank < longer)))
    num_real = len(places)
    filler = places[-1] if places else 0
    places += [filler] * (share + (longer > 0) - num_real)
    return places, num_real


class EvenLoader(WrappedLoader):
    """A test loader whose length is equal on all ranks; it marks the samples that are repeated."""

    def __init__(self, loader: Iterable[list[dict[str, Any]]], num_real: int) -> None:
        """``loader`` gives lists of mapped dicts, of which the first ``num_real`` in all count."""
        super().__init__(loader)
        self.num_real = num_real

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """The loader's batches."""
        seen = 0
        for batch in self._loader:
            for sample in batch[max(self.num_real - seen, 0) :]:
                sample[PADDING_KEY] = True
            seen += len(batch)
            yield batch


def build_even_loader(
    records: Sequence[dict[str, Any]], mapper: Any, *, batch_size: int, num_workers: int
) -> EvenLoader:
    """Detectron2's test loader over this rank's even share of the records.

    Args:
        records: dataset dicts, equal on all ranks.
        mapper: turns one of them into a new mapped dict.
        batch_size: images at a time.
        num_workers: processes that map.
    """
    places, num_real = even_share(len(records), comm.get_rank(), comm.get_world_size())
    loader = build_detection_test_loader(
        records, mapper=mapper, sampler=places, batch_size=batch_size, num_workers=num_workers
    )
    loader.worker_init_fn = start_worker  # a signal to the group must not end an evaluation
    return EvenLoader(loader, num_real)


class RealSamples(DatasetEvaluator):
    """Hides repeated samples from an evaluator, whichever it is."""

    def __init__(self, evaluator: DatasetEvaluator) -> None:
        """``evaluator`` gets all other samples."""
        self._evaluator = evaluator

    def reset(self) -> None:
        """Forget all samples."""
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[Any]) -> None:
        """Pass on a batch without its repeated samples; nothing if none is left."""
        pairs = [(i, o) for i, o in zip(inputs, outputs, strict=True) if not i.get(PADDING_KEY)]
        if pairs:
            real_inputs, real_outputs = zip(*pairs)
            self._evaluator.process(list(real_inputs), list(real_outputs))

    def evaluate(self) -> Any:
        """What the evaluator says; every process must call this."""
        return self._evaluator.evaluate()

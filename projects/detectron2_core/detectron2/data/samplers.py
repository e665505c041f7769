"""Distribution of a test set over the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.utils import comm
from torch.utils.data import Sampler


class InferenceSampler(Sampler):
    """Gives every rank its contiguous share, so that each index occurs exactly once in all.

    The shares differ by at most one; the first ``size % world_size`` ranks get the longer ones.
    """

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise AssertionError(f"InferenceSampler needs at least one sample, got {size}")
        rank = comm.get_rank()
        share, longer = divmod(size, comm.get_world_size())
        begin = rank * share + min(rank, longer)
        self._local_indices = range(begin, begin + share + (rank < longer))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)

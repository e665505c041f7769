"""Which task each iteration trains (paper, Table 9), of which dataset, and which images.

Everything here is a function of (seed, iteration), the same on every rank: a run that is resumed
anywhere, on any number of ranks and with any number of workers, draws the batches of an
uninterrupted run. A batch is of one dataset: a list of 133 categories beside narratives of 5 nouns
would make every prompt of the batch as long as its own.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from gella.data.records import as_records, concatenated, indices_with_task
from gella.entities.view import received, to_send
from gella.text.prompts import TASKS

SampleKey = tuple[int, str, tuple[int, int, int]]

_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal a process gets when its parent ends
_BLOCK = 4096  # iterations whose tasks are drawn at once
# Keep the streams of chance apart: SeedSequence pads with zeros, so lengths alone do not.
_TASK_STREAM, _ORDER_STREAM, _DATASET_STREAM, _OTHERS_STREAM = 0x7A5C, 0x0D3E, 0xDA7A, 0x07E5


def task_at(seed: int, iteration: int, ratios: Sequence[float]) -> str:
    """Task of one training iteration; seed and iteration are not negative.

    ``ratios`` are shares of `prompts.TASKS` (describe, extract, ground), in any unit; Table 9 has
    0.2, 0.2, 0.6. ValueError for another number of them, a negative one, or none above 0.
    """
    block = _task_block(int(seed), int(iteration) // _BLOCK, _checked_ratios(ratios))
    return TASKS[block[int(iteration) % _BLOCK]]


class GroundingBatchSampler(Sampler[list[SampleKey]]):
    """Endless batches of keys (record index, task, seed of the view) for one rank.

    Each task goes through each of its pools, one per dataset, in a new permutation per epoch. The
    batch of an iteration is of one task and one dataset, and does not depend on the number of
    ranks: rank r takes the r-th contiguous part of it.
    """

    def __init__(
        self,
        pools: Mapping[str, Sequence[Sequence[int] | np.ndarray]],
        ratios: Sequence[float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_iteration: int = 0,
        dataset_ratios: Sequence[float] = (),
    ) -> None:
        """Args:
        pools: per task the record indices of each dataset.
        ratios: as in `task_at`.
        batch_size: images per iteration over all ranks, a multiple of `world_size`.
        seed: not negative.
        rank, world_size: of this process and the number of all.
        start_iteration: the first iteration to yield.
        dataset_ratios: one share per dataset, in any unit, of the iterations of every task that it
            has records of; empty: the number of these records.

        Raises ValueError when the batch does not divide, a task that is to be trained has no
        record, or there are not as many ratios as datasets.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size} but there are {world_size} processes; make "
                "it a multiple of their number"
            )
        if seed < 0:
            raise ValueError(f"the sampler's seed is {seed}; it must not be negative")
        self.ratios = _checked_ratios(ratios)
        self.pools = {
            task: [np.asarray(pool, dtype=np.int64) for pool in pools.get(task, ())]
            for task in TASKS
        }
        self._shares: dict[str, np.ndarray] = {}  # cumulated, per dataset
        for task, ratio in zip(TASKS, self.ratios):
            sizes = np.array([len(pool) for pool in self.pools[task]], dtype=np.float64)
            given = np.array(dataset_ratios if len(dataset_ratios) else sizes, dtype=np.float64)
            if len(given) != len(sizes) or not (given >= 0).all():
                raise ValueError(
                    f"DATALOADER.DATASET_RATIOS makes shares {list(dataset_ratios)} of "
                    f"{len(sizes)} datasets; each name of DATASETS.TRAIN needs one that is not "
                    "negative"
                )
            weights = np.where(sizes > 0, given, 0.0)
            if ratio > 0 and not weights.sum() > 0:
                raise ValueError(
                    f"task {task!r} has ratio {ratio:g} but no record that can train it; add a "
                    "dataset (or its share of DATALOADER.DATASET_RATIOS), or set its "
                    "DATALOADER.TASK_RATIOS to 0"
                )
            self._shares[task] = np.cumsum(weights) / (weights.sum() or 1.0)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield this rank's keys from `start_iteration` on, without end."""
        done = self._earlier_batches(self.start_iteration)
        share = self.batch_size // self.world_size
        mine = range(self.rank * share, (self.rank + 1) * share)
        for iteration in itertools.count(self.start_iteration):
            task = task_at(self.seed, iteration, self.ratios)
            drawn = _dataset_block(self.seed, iteration // _BLOCK)[iteration % _BLOCK]
            dataset = int(np.searchsorted(self._shares[task], drawn, side="right"))
            first = done[task][dataset] * self.batch_size
            done[task][dataset] += 1
            yield [
                (self._record(task, dataset, first + place), task, (self.seed, iteration, place))
                for place in mine
            ]

    def position(self, iteration: int) -> dict[str, Any]:
        """Where the data stand before an iteration, and what their order depends on; plain JSON."""
        return {
            "iteration": iteration,
            "batches": self._earlier_batches(iteration),
            "seed": int(self.seed),
            "batch": self.batch_size,
            "ratios": list(self.ratios),
            "records": {task: [len(x) for x in pools] for task, pools in self.pools.items()},
            "datasets": {task: shares.tolist() for task, shares in self._shares.items()},
        }

    def _earlier_batches(self, iteration: int) -> dict[str, list[int]]:
        """Batches of each task and dataset before `iteration`."""
        counts = {task: np.zeros(len(pools), np.int64) for task, pools in self.pools.items()}
        for block in range(iteration // _BLOCK + 1):
            stop = iteration - block * _BLOCK
            tasks = _task_block(self.seed, block, self.ratios)[:stop]
            numbers = _dataset_block(self.seed, block)[:stop]
            for place, (task, shares) in enumerate(self._shares.items()):
                drawn = np.searchsorted(shares, numbers[tasks == place], side="right")
                counts[task] += np.bincount(drawn, minlength=len(shares))
        return {task: count.tolist() for task, count in counts.items()}

    def _record(self, task: str, dataset: int, place: int) -> int:
        """Record at one place of a pool's endless sequence of permutations."""
        pool = self.pools[task][dataset]
        epoch, offset = divmod(place, len(pool))
        stream = _ORDER_STREAM + TASKS.index(task)
        return int(pool[_order(self.seed, stream, dataset, epoch, len(pool))[offset]])


class GroundingDataset(Dataset):
    """Records behind a mapper, addressed by the sampler's keys."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Any,
        prompts_per_image: int = 1,
        images: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        """Args:
        records: of all datasets.
        mapper: called as `mapper(record, task=..., rng_seed=..., others=...)`.
        prompts_per_image: records of an image that are asked together, ``others`` but for one.
        images: of each task that asks so, the places of its records and a number for the image of
            each: int64 (K,) both.
        """
        # Bytes, which worker processes share; a list of dicts would be copied into each.
        self.records, self.mapper = as_records(records), mapper
        self.prompts_per_image, self.images = prompts_per_image, images or {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        index, task, rng_seed = key
        record, more = self.records[index], {}
        if task in self.images:
            places, numbers = self.images[task]
            image = numbers[places == index]
            others = places[(numbers == image) & (places != index)]
            drawn = np.random.default_rng((*rng_seed, _OTHERS_STREAM)).permutation(others)
            # Ids of two datasets may be equal, and their masks other ones.
            rest = map(self.records.__getitem__, drawn)
            same = (x for x in rest if _picture(x) == _picture(record))
            more["others"] = list(itertools.islice(same, self.prompts_per_image - 1))
        return self.mapper(record, task=task, rng_seed=rng_seed, **more)


class GroundingTrainLoader:
    """Endless training batches (lists of mapped dicts) from `start_iteration` on.

    `start_iteration` may be set until iteration begins, as a resumed trainer does; every `iter()`
    starts there.
    """

    def __init__(
        self, dataset: GroundingDataset, sampler: GroundingBatchSampler, num_workers: int
    ) -> None:
        """``num_workers`` processes map; 0: this one. Batches do not depend on it."""
        self.dataset, self.sampler, self.num_workers = dataset, sampler, num_workers

    @property
    def start_iteration(self) -> int:
        """Iteration of the first batch."""
        return self.sampler.start_iteration

    @start_iteration.setter
    def start_iteration(self, iteration: int) -> None:
        self.sampler.start_iteration = int(iteration)

    def position(self, iteration: int) -> dict[str, Any]:
        """See `GroundingBatchSampler.position`."""
        return self.sampler.position(iteration)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Start the workers and yield batches."""
        # A generator of its own: starting a loader would draw from the global one.
        generator = torch.Generator().manual_seed(self.sampler.seed)
        loader: DataLoader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=self.num_workers,
            collate_fn=_to_send if self.num_workers else list,
            worker_init_fn=start_worker,
            generator=generator,
        )
        if not self.num_workers:
            return iter(loader)
        return ([received(item) for item in batch] for batch in loader)


def build_train_loader(
    cfg: Any,
    *,
    datasets: Sequence[Sequence[dict[str, Any]]],
    mapper: Any,
    start_iteration: int = 0,
) -> GroundingTrainLoader:
    """Training loader of this rank.

    Args:
        cfg: `DATALOADER.TASK_RATIOS`, `DATALOADER.DATASET_RATIOS`, `DATALOADER.NUM_WORKERS`,
            `SOLVER.IMS_PER_BATCH`, `DATASETS.TRAIN` (for errors) and `SEED`; a negative seed draws
            one that all ranks share, and such a run cannot be resumed into the same order.
        datasets: dataset dicts per name of `DATASETS.TRAIN`; `tasks` says which tasks each can
            train.
        mapper: a `GroundingMapper` for training.

    Raises ValueError when a task with a ratio above 0 has no record, naming the datasets.
    """
    parts = [as_records(part) for part in datasets]
    starts = np.cumsum([0, *map(len, parts)])
    pools = {
        task: [s + indices_with_task(p, task) for s, p in zip(starts, parts)] for task in TASKS
    }
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    given = cfg.DATALOADER.DATASET_RATIOS
    ratios = [
        next((float(share) for pattern, share in given if fnmatchcase(name, pattern)), 1.0)
        for name in (cfg.DATASETS.TRAIN if given else ())
    ]
    try:
        sampler = GroundingBatchSampler(
            pools,
            cfg.DATALOADER.TASK_RATIOS,
            cfg.SOLVER.IMS_PER_BATCH,
            seed,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            start_iteration=start_iteration,
            dataset_ratios=ratios,
        )
    except ValueError as error:
        raise ValueError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: {error}") from error
    for task, own in pools.items():
        sizes = " + ".join(f"{len(pool):,}" for pool in own)
        logging.getLogger(__name__).info("Training records of the datasets: %s %s", task, sizes)
    together, images = int(cfg.DATALOADER.PROMPTS_PER_IMAGE), None
    if together < 1:
        raise ValueError(f"DATALOADER.PROMPTS_PER_IMAGE is {together}; give at least 1")
    if together > 1:
        ids = np.concatenate([part.image_ids() for part in parts])
        numbers = np.unique(ids, return_inverse=True)[1]
        places = {task: np.concatenate(pools[task]) for task in ("extract", "ground")}
        images = {task: (own, numbers[own]) for task, own in places.items()}
    dataset = GroundingDataset(concatenated(parts), mapper, together, images)
    return GroundingTrainLoader(dataset, sampler, int(cfg.DATALOADER.NUM_WORKERS))


def _picture(record: Mapping[str, Any]) -> tuple[Any, Any]:
    return record["file_name"], record["entities"].get("file_name")


def _checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(ratio) for ratio in ratios)
    if len(values) != len(TASKS) or not sum(values) > 0 or min(values) < 0:
        raise ValueError(
            f"DATALOADER.TASK_RATIOS is {list(values)}; give one share for each of "
            f"{', '.join(TASKS)}, none negative and at least one above 0"
        )
    return values


@lru_cache(maxsize=64)
def _task_block(seed: int, block: int, ratios: tuple[float, ...]) -> np.ndarray:
    shares = np.asarray(ratios) / sum(ratios)
    rng = np.random.default_rng((seed, _TASK_STREAM, block))
    return rng.choice(len(TASKS), size=_BLOCK, p=shares)


@lru_cache(maxsize=64)
def _dataset_block(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, _DATASET_STREAM, block)).random(_BLOCK)


@lru_cache(maxsize=64)
def _order(*key_and_size: int) -> np.ndarray:
    # Of the epoch alone, so that a resumed run need not replay those before.
    *key, size = key_and_size
    return np.random.default_rng(key).permutation(size)


def _to_send(batch: list[Any]) -> list[Any]:
    return [to_send(item) for item in batch]


def start_worker(worker: int) -> None:
    """Set up a process that a loader has started, as its `worker_init_fn`.

    One thread; it ends with its parent, and neither Ctrl-C nor a SIGTERM of anyone else ends it.
    """
    torch.set_num_threads(1)
    # A killed trainer cannot stop its workers, and one that waits to hand a batch over never ends.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A terminal's Ctrl-C and a cluster's SIGTERM reach the whole group. The trainer finishes its
    # step then, for which it needs its workers; they end when it ends them.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)  # the trainer's, inherited
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_the_parent, args=(parent.pid,), daemon=True).start()


def _obey_the_parent(parent: int) -> None:
    """End this process at the SIGTERM of its parent, whose loader ends its workers so."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)

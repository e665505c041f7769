"""Task sampling: shares, order, ranks, workers and resuming."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg

from gella import add_gella_config
from gella.data.sampling import GroundingBatchSampler, build_train_loader, task_at
from gella.text.prompts import TASKS

RATIOS = (0.2, 0.2, 0.6)
POOLS = {
    "describe": [range(0, 9), ()],
    "extract": [range(5, 16), ()],
    "ground": [range(20, 50), range(60, 70)],
}


def batches(count: int, **changes: Any) -> list[list]:
    options = {"pools": POOLS, "ratios": RATIOS, "batch_size": 4, "seed": 3} | changes
    return list(itertools.islice(GroundingBatchSampler(**options), count))


def test_tasks_have_their_shares_and_depend_on_seed_and_iteration() -> None:
    count = 20_000  # crosses block borders
    drawn = [task_at(1, i, RATIOS) for i in range(count)]
    shares = Counter(drawn)
    for task, ratio in zip(TASKS, RATIOS):
        deviation = (count * ratio * (1 - ratio)) ** 0.5
        assert abs(shares[task] - count * ratio) < 4 * deviation
    assert drawn[:50] == [task_at(1, i, [2, 2, 6]) for i in range(50)]  # in any unit
    assert drawn[9000:9100] == [task_at(1, i, RATIOS) for i in range(9000, 9100)]
    assert drawn[:50] != [task_at(2, i, RATIOS) for i in range(50)]
    assert drawn[:4096] != drawn[4096:8192]
    # Successive tasks are independent: ground follows ground as often as it comes at all.
    pairs = Counter(zip(drawn, drawn[1:]))
    assert abs(pairs["ground", "ground"] / count - 0.36) < 0.015


def test_a_batch_has_one_task_and_its_pool() -> None:
    for iteration, batch in enumerate(batches(300)):
        task = task_at(3, iteration, RATIOS)
        for place, (_, said, rng_seed) in enumerate(batch):
            assert said == task and rng_seed == (3, iteration, place)
        assert any({index for index, *_ in batch} <= set(pool) for pool in POOLS[task])


def test_every_epoch_visits_each_record_once_in_another_order() -> None:
    visits: dict[str, list[int]] = {task: [] for task in TASKS}
    for batch in batches(400):
        visits[batch[0][1]] += [index for index, _, _ in batch]
    for task, pool in [(task, pool) for task, pools in POOLS.items() for pool in pools if pool]:
        size, seen = len(pool), [index for index in visits[task] if index in pool]
        epochs = [seen[k : k + size] for k in range(0, len(seen) - size, size)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(pool) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize(("ratios", "share"), [((), 0.75), ((1, 1), 0.5), ((0, 2), 0.0)])
def test_datasets_have_their_shares_of_a_task(ratios: tuple, share: float) -> None:
    """Without ratios their numbers of records; a dataset without records of a task has none."""
    pools = {**POOLS, "describe": [(), range(3)], "extract": [(), range(3, 9)]}
    drawn = [(b[0][1], b[0][0] < 60) for b in batches(3000, pools=pools, dataset_ratios=ratios)]
    first = [is_first for task, is_first in drawn if task == "ground"]
    deviation = (share * (1 - share) / len(first)) ** 0.5
    assert abs(sum(first) / len(first) - share) <= 4 * deviation
    # The datasets do not follow the tasks' dice.
    assert len({task for task, _ in drawn}) == 3


@pytest.mark.parametrize("start", [1, 17, 150, 4090, 4096, 8195])
def test_starting_anywhere_continues_the_uninterrupted_order(start: int) -> None:
    whole = batches(start + 12)
    assert batches(12, start_iteration=start) == whole[start:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_and_its_task(world_size: int) -> None:
    whole = batches(60)
    parts = [batches(60, rank=rank, world_size=world_size) for rank in range(world_size)]
    for iteration, batch in enumerate(whole):
        assert sum((part[iteration] for part in parts), []) == batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16, "world_size": 3}, "16.*3 processes"),
        ({"pools": {**POOLS, "extract": [(), ()]}}, "'extract'.*0.2"),
        ({"dataset_ratios": (0, 1)}, "'describe'.*DATASET_RATIOS"),
        ({"dataset_ratios": (1,)}, r"DATASET_RATIOS makes shares \[1\] of 2 datasets"),
        ({"dataset_ratios": (1, -1)}, "not negative"),
        ({"seed": -1}, "negative"),
        *[({"ratios": wrong}, "TASK_RATIOS") for wrong in ((1, 1), (0, 0, 0), (1, 1, -1))],
        ({"ratios": (1, 1, float("nan"))}, "TASK_RATIOS"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(1, **changes)
    assert len(batches(3, pools={"ground": [[4]]}, ratios=(0, 0, 1))) == 3


def echo(record: dict, *, task: str, rng_seed: tuple) -> dict:
    """A mapper that gives back what it is asked."""
    return {"name": record["name"], "task": task, "seed": rng_seed}


def config(*options: Any) -> Any:
    cfg = get_cfg()
    add_gella_config(cfg)
    small = ("SOLVER.IMS_PER_BATCH", 4, "SEED", 5, "DATALOADER.NUM_WORKERS", 0)
    cfg.merge_from_list(["DATASETS.TRAIN", ("gella_some_train", "gella_more_train"), *small])
    cfg.merge_from_list(["DATALOADER.DATASET_RATIOS", [["gella_s*", 3], ["x", 7]], *options])
    return cfg


RECORDS = [{"name": i, "tasks": TASKS if i % 3 else ("ground",)} for i in range(20)]


def test_the_loader_maps_the_samplers_keys_whatever_the_workers_and_resumes() -> None:
    def first(loader: Any, count: int) -> list:
        return list(itertools.islice(iter(loader), count))

    loader, parallel = (
        build_train_loader(config(*workers), datasets=[RECORDS[:8], RECORDS[8:]], mapper=echo)
        for workers in ((), ("DATALOADER.NUM_WORKERS", 2))
    )
    some = [i for i in range(20) if i % 3]
    pools = {"describe": some, "extract": some, "ground": range(20)}
    pools = {t: [[i for i in p if i < 8], [i for i in p if i > 7]] for t, p in pools.items()}
    ratios = config().DATALOADER.TASK_RATIOS
    expected = [
        [{"name": index, "task": task, "seed": seed} for index, task, seed in batch]
        for batch in batches(12, pools=pools, ratios=ratios, seed=5, dataset_ratios=(3, 1))
    ]
    assert len(loader.dataset) == 20 and first(loader, 12) == expected
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert first(parallel, 12) == expected
    assert torch.equal(torch.get_rng_state(), before)  # starting a loader draws nothing
    parallel.start_iteration = 7
    assert parallel.start_iteration == 7 and first(parallel, 5) == expected[7:]


def test_the_loader_names_the_datasets_that_cannot_train_a_task() -> None:
    only_ground = [record for record in RECORDS if len(record["tasks"]) == 1]
    with pytest.raises(ValueError, match="gella_some_train.*'describe'"):
        build_train_loader(config(), datasets=[only_ground, []], mapper=echo)
    cfg = config("DATALOADER.TASK_RATIOS", [0.0, 0.0, 1.0], "SEED", -1)
    loader = build_train_loader(cfg, datasets=[only_ground, []], mapper=echo)
    assert next(iter(loader))[0]["task"] == "ground"

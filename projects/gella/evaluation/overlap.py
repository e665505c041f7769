"""Scoring beside inference: evaluators on a thread of their own, decoding in worker processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from torch.utils.data import DataLoader, Dataset

_END = object()


class OverlappedEvaluator(DatasetEvaluator):
    """An evaluator that scores a batch while the model works on the next ones.

    One thread takes the batches in their order, so results are those of the evaluator alone, bit
    for bit. Reading files, decoding and NumPy's loops let other threads run, so on a GPU scoring
    costs no time until it takes longer than inference. At most ``waiting`` batches are held, which
    bounds the memory of outputs not yet scored.

    What the evaluator raises comes out of the next ``process`` and of ``evaluate``, until it is
    reset.
    """

    def __init__(self, evaluator: DatasetEvaluator, waiting: int = 2) -> None:
        """Wrap an evaluator.

        Args:
            evaluator: with ``reset``, ``process`` and ``evaluate``.
            waiting: batches held besides the one that is being scored, at least 1.
        """
        if waiting < 1:
            raise ValueError(f"{waiting} waiting batches; at least 1 is needed")
        self._evaluator = evaluator
        self._waiting = waiting
        self._thread: threading.Thread | None = None
        self._queue: queue.Queue[Any] = queue.Queue()
        self._error: BaseException | None = None
        self._discard = False

    def reset(self) -> None:
        """Forget all samples, those that wait among them."""
        self._discard = True
        self._stop()
        self._discard, self._error = False, None
        self._evaluator.reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Leave a batch to the thread; waits while ``waiting`` batches are held already.

        Neither argument may be changed afterwards.
        """
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._queue = queue.Queue(maxsize=self._waiting)
            # A daemon: an interrupted run must end although batches wait.
            self._thread = threading.Thread(target=self._work, args=(self._queue,), daemon=True)
            self._thread.start()
        self._queue.put((inputs, outputs))

    def evaluate(self) -> Any:
        """Score what is left, and return what the evaluator returns; every process must call it."""
        self._stop()
        if self._error is not None:
            raise self._error
        return self._evaluator.evaluate()

    def _work(self, batches: queue.Queue[Any]) -> None:
        while (batch := batches.get()) is not _END:
            # After an error batches are still taken, or `process` would wait for ever.
            if self._error is None and not self._discard:
                try:
                    self._evaluator.process(*batch)
                except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                    self._error = error

    def _stop(self) -> None:
        if self._thread is not None:
            self._queue.put(_END)
            self._thread.join()
            self._thread = None


def prepared_ahead(
    items: Sequence[Any], prepare: Callable[[Any], Any], workers: int
) -> Iterator[Any]:
    """``prepare(item)`` of each item, in order, made ahead by worker processes.

    For scoring saved predictions: ``prepare`` decodes PNGs and run lengths of a sample, while the
    main process scores the ones before.

    Args:
        items: indexable.
        prepare: what it returns is sent between processes.
        workers: processes; 0 prepares each item when it is asked for.
    """
    loader: Iterable[Any] = DataLoader(
        _Prepared(items, prepare), batch_size=None, num_workers=workers, collate_fn=_as_it_is
    )
    yield from loader


class _Prepared(Dataset):
    """A map-style dataset of ``prepare(items[i])``."""

    def __init__(self, items: Sequence[Any], prepare: Callable[[Any], Any]) -> None:
        self._items, self._prepare = items, prepare

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._prepare(self._items[index])


def _as_it_is(value: Any) -> Any:
    return value

"""The loop over a test set and the interface of what it feeds."""

from __future__ import annotations

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from detectron2.utils.comm import get_world_size, is_main_process
from detectron2.utils.logger import log_every_n_seconds
from torch import nn


class DatasetEvaluator:
    """Interface: ``reset``, then ``process`` per batch, then ``evaluate``."""

    def reset(self) -> None:
        """Forget everything; called before each round."""

    def process(self, inputs: list, outputs: list) -> None:
        """Take one batch: the model's inputs and its outputs, of equal length."""

    def evaluate(self) -> dict | None:
        """Return ``{task: {metric: value}}``; called on all ranks, ``None`` allowed on others."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their result keys must differ."""

    def __init__(self, evaluators: list[DatasetEvaluator]) -> None:
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list, outputs: list) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict:
        """Merge all results on rank 0; other ranks return an empty dict."""
        results: dict = OrderedDict()
        for result in [evaluator.evaluate() for evaluator in self._evaluators]:
            if is_main_process() and result is not None:
                if results.keys() & result.keys():
                    raise AssertionError(f"two evaluators return {results.keys() & result.keys()}")
                results.update(result)
        return results


def inference_on_dataset(
    model: nn.Module | Callable,
    data_loader,
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
) -> dict:
    """Run the model over all batches in eval mode without gradients and evaluate.

    ``data_loader``: iterable with a length. ``evaluator``: one, a list, or None to run only.
    Returns what ``evaluate`` returns, ``{}`` in place of None.
    The log tells progress and time left every 5 s.
    """
    logger, total = logging.getLogger(__name__), len(data_loader)
    logger.info(f"Start inference on {total} batches")
    if evaluator is None or isinstance(evaluator, list):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()

    start, compute = time.perf_counter(), 0.0
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        for done, inputs in enumerate(data_loader, start=1):
            before = time.perf_counter()
            outputs = model(inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            compute += time.perf_counter() - before
            evaluator.process(inputs, outputs)
            mean = (time.perf_counter() - start) / done
            left = datetime.timedelta(seconds=int(mean * (total - done)))
            text = f"Inference done {done}/{total}. Inference: {compute / done:.4f} s/iter."
            log_every_n_seconds(logging.INFO, f"{text} Total: {mean:.4f} s/iter. ETA={left}", n=5)
    seconds = time.perf_counter() - start
    for what, spent in (("inference time", seconds), ("inference pure compute time", compute)):
        mean = spent / max(total, 1)
        text = f"({mean:.6f} s / iter per device, on {get_world_size()} devices)"
        logger.info(f"Total {what}: {datetime.timedelta(seconds=int(spent))} {text}")
    results = evaluator.evaluate()
    return {} if results is None else results


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

"""Evaluation while training: on small splits, without a trace in the training, keeping the best.

``TEST.EVAL_PERIOD`` is Detectron2's key: iterations between two evaluations. ``TEST.SUBSET`` makes
these small and deterministic; the final evaluation and ``--eval-only`` always take all images.
``TEST.BEST_METRIC`` keeps the weights with the best score so far as the checkpoint ``model_best``.

Under ZeRO stage 3 each forward pass gathers the weights from all ranks, so a rank with fewer images
than the others would leave them waiting for ever. Shorter shares are therefore filled up with
repeated samples, which are marked (``is_padding``) and which no evaluator gets to see.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from gella.data.records import Records, as_records, selected
from gella.data.sampling import start_worker
from gella.engine.hooks import PhraseTally
from gella.utils.io import write_json

BEST_NAME = "model_best"
SUBSET_PREFIX = "subset/"
"""Before the names of scores of a subset, which do not compare with those of all images."""
PADDING_KEY = "is_padding"
"""True in the mapped dicts that only keep a rank busy."""

_logger = logging.getLogger(__name__)


def evenly_spaced(records: Sequence[dict[str, Any]], num_images: int) -> Records:
    """All records of some images, evenly spaced over the dataset and the same in every run.

    ``num_images`` 0 (``TEST.SUBSET``), or more than there are, takes all.
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


class EvenLoader:
    """A test loader whose length is equal on all ranks, with the attributes of the loader in it.

    It marks the samples that are repeated, and logs after its last batch how many phrases of the
    others match no input entity.
    """

    def __init__(self, loader: Iterable[list[dict[str, Any]]], num_real: int, name: str) -> None:
        """``loader`` gives lists of mapped dicts, of which the first ``num_real`` in all count;
        ``name`` is the dataset's, for the log."""
        self._loader, self.num_real, self._name = loader, num_real, name

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Whatever else the loader has, such as its dataset."""
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        seen, phrases = 0, PhraseTally()
        for batch in self._loader:
            for sample in batch[max(self.num_real - seen, 0) :]:
                sample[PADDING_KEY] = True
            seen += len(batch)
            phrases.add(batch)
            yield batch
        phrases.report(f"Dataset {self._name}")


def build_even_loader(
    records: Sequence[dict[str, Any]], mapper: Any, *, batch_size: int, num_workers: int, name: str
) -> EvenLoader:
    """Detectron2's test loader over this rank's share of the records, equally long on all ranks.

    A share is contiguous, as Detectron2's ``InferenceSampler`` cuts it; shorter ones repeat their
    last record. ``records`` are equal on all ranks; none is a ValueError.
    """
    if not len(records):
        raise ValueError("a test set without a record cannot be evaluated")
    rank = comm.get_rank()
    share, longer = divmod(len(records), comm.get_world_size())
    first = rank * share + min(rank, longer)
    places = list(range(first, first + share + (rank < longer)))
    num_real = len(places)
    filler = places[-1] if places else 0
    places += [filler] * (share + (longer > 0) - num_real)
    loader = build_detection_test_loader(
        records, mapper=mapper, sampler=places, batch_size=batch_size, num_workers=num_workers
    )
    loader.worker_init_fn = start_worker  # a signal to the group must not end an evaluation
    return EvenLoader(loader, num_real, name)


class RealSamples(DatasetEvaluator):
    """Hides repeated samples from an evaluator, whichever it is."""

    def __init__(self, evaluator: DatasetEvaluator) -> None:
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


def with_keys(cfg: Any, values: Mapping[str, Any]) -> Any:
    """A frozen copy of a config with other values, by the keys' dotted names."""
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([part for pair in values.items() for part in pair])
    changed.freeze()
    return changed


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave the random generators, the training flags and the buffers as they were before.

    Covers torch (CPU and current CUDA device), numpy and Python. Inside, every rank has the buffers
    of rank 0, which are those that checkpoints hold: BatchNorm's statistics are of a rank's own
    images, and scores must not depend on which rank an image falls to. And generation works under
    ZeRO stage 3: all ranks take as many forward passes as the longest of their answers. All ranks
    must then evaluate equally many batches (:class:`EvenLoader`).
    """
    inner = getattr(model, "module", model)  # without the distributed wrapper
    decoder = getattr(inner, "language_decoder", None)
    # Under ZeRO the decoder is no submodule of the model.
    decoder = getattr(getattr(decoder, "engine", None), "module", decoder)
    modules = {*model.modules(), *(decoder.modules() if decoder is not None else ())}
    flags = [(module, module.training) for module in modules]
    buffers = list(model.buffers()) if comm.get_world_size() > 1 else []
    before = [buffer.clone() for buffer in buffers]
    states = random_states()
    for buffer in buffers:
        torch.distributed.broadcast(buffer, 0)
    try:
        with _generation_in_step(decoder):
            yield
    finally:
        set_random_states(states)
        for module, flag in flags:
            module.training = flag
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def random_states() -> dict[str, Any]:
    """States of the random generators of torch (CPU, current GPU), NumPy and Python; plain data."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Give the random generators the states that :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


@contextlib.contextmanager
def _generation_in_step(decoder: Any) -> Iterator[None]:
    # DeepSpeed gives each parameter that it has partitioned a number.
    if decoder is None or not any(hasattr(p, "ds_id") for p in decoder.parameters()):
        yield
        return
    generate, llama = decoder.generate, decoder.llama

    def generate_in_step(image_grid: Any, input_ids: Any, **options: Any) -> Any:
        # Drafts would make the number of passes a matter of each rank's own words, and so would a
        # prompt that leaves less room than the others of its batch: it limits all of them.
        room = min(comm.all_gather(min(decoder.max_positions - len(ids) for ids in input_ids)))
        options["max_new_tokens"] = min(options["max_new_tokens"], max(room, 1))
        return generate(image_grid, input_ids, **{**options, "snippets": None})

    decoder.generate = generate_in_step
    # transformers has the switch, but turns it on by itself only for engines that it has made.
    llama.generate = functools.partial(llama.generate, synced_gpus=comm.get_world_size() > 1)
    try:
        yield
    finally:
        del llama.generate, decoder.generate


class BestCheckpoint:
    """The checkpoint ``model_best``: the weights with the best score of one metric so far.

    What is best is also written to ``best.json``, so that a resumed run compares with it. Only
    evaluations on the same images should be offered.
    """

    def __init__(
        self, save: Callable[[int, str], None], folder: str | Path, metric: str, mode: str
    ) -> None:
        """Args:
        save: called on all ranks with the iteration and the checkpoint's name.
        folder: of ``best.json``.
        metric, mode: ``TEST.BEST_METRIC``, such as "png/AR", and "max" or "min", else ValueError.
        """
        if mode not in ("max", "min"):
            raise ValueError(f'TEST.BEST_MODE is {mode!r}: use "max" or "min"')
        self._save, self._path = save, Path(folder) / "best.json"
        self._metric, self._mode = metric, mode
        self.value: float | None = None
        self.iteration: int | None = None

    def start(self, start_iteration: int) -> None:
        """Take up what an earlier part of the run found; every rank must call this.

        A best of iterations after the start, which the resumed run will reach again, or of another
        metric counts no more.
        """
        known: dict[str, Any] = {}
        if comm.is_main_process() and start_iteration > 0 and self._path.is_file():
            try:
                known = json.loads(self._path.read_text(encoding="utf-8"))
                known = {name: known[name] for name in ("metric", "mode", "value", "iteration")}
            except (ValueError, KeyError, TypeError) as error:
                text = "%s cannot be read (%s): the best is looked for anew"
                _logger.warning(text, self._path, error)
                known = {}
        known = comm.all_gather(known)[0]
        if not known:
            return
        if (known["metric"], known["mode"]) != (self._metric, self._mode):
            _logger.warning(
                "%s is about %s (%s), TEST.BEST_METRIC is %s (%s): the best is looked for anew",
                *(self._path, known["metric"], known["mode"], self._metric, self._mode),
            )
        elif known["iteration"] < start_iteration:
            self.value, self.iteration = known["value"], known["iteration"]

    def offer(self, scores: dict[str, float], iteration: int) -> bool:
        """Save the present weights if they are better; every rank must call this.

        ``scores`` are {"task/metric": score} on the main process, after ``iteration``. False also
        for a score that is missing, which is logged as an error, or no number.
        """
        value = comm.all_gather(scores.get(self._metric))[0]
        if value is None:
            if comm.is_main_process():
                _logger.error(
                    "TEST.BEST_METRIC %s is none of the scores (%s): %s is not written",
                    *(self._metric, ", ".join(sorted(scores)) or "there are none", BEST_NAME),
                )
            return False
        value = float(value)
        better = self.value is None or (
            value > self.value if self._mode == "max" else value < self.value
        )
        if not math.isfinite(value) or not better:
            return False
        before = "" if self.value is None else f", before {self.value:.4f} at {self.iteration}"
        self.value, self.iteration = value, iteration
        self._save(iteration, BEST_NAME)
        if comm.is_main_process():  # after the weights: it must not tell of what is not there
            score = {"metric": self._metric, "mode": self._mode, "value": value}
            write_json(self._path, {**score, "iteration": iteration, "checkpoint": BEST_NAME})
        _logger.info(
            "best %s so far: %.4f at iteration %d%s; saved as %s",
            *(self._metric, value, iteration, before, BEST_NAME),
        )
        return True


class EvaluationInTraining(HookBase):
    """Evaluates every ``period`` iterations, and all images after a successful training.

    Scores go into the storage as "task/metric", those of a subset as "subset/task/metric". After
    the last iteration the weights are offered as the best too, judged on the same images as before.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[int], dict[str, Any]],
        *,
        subset: int = 0,
        best: BestCheckpoint | None = None,
    ) -> None:
        """Args:
        period: ``TEST.EVAL_PERIOD``; 0 evaluates at the end only.
        evaluate: called on all ranks with the number of images per dataset, 0 for all; returns
            a nested dict of numbers on the main process.
        subset: ``TEST.SUBSET``, for all evaluations but the last.
        best: takes the scores; None keeps no best checkpoint.

        Raises ValueError for a negative number, or a best checkpoint without a period.
        """
        if period < 0 or subset < 0:
            raise ValueError(
                f"TEST.EVAL_PERIOD is {period} and TEST.SUBSET {subset}: neither may be negative"
            )
        if best is not None and period == 0:
            raise ValueError(
                "TEST.BEST_METRIC is set but TEST.EVAL_PERIOD is 0, so nothing is compared: set"
                " TEST.EVAL_PERIOD to a number of iterations"
            )
        self._period, self._evaluate, self._subset = period, evaluate, subset
        self._best = best
        self._is_done = False  # with the evaluation of all images

    def before_train(self) -> None:
        """Find out what was best before a resume."""
        if self._best is not None:
            self._best.start(self.trainer.start_iter)

    def after_step(self) -> None:
        """Evaluate where it is due."""
        done = self.trainer.iter + 1
        due = self._period > 0 and done % self._period == 0
        if done == self.trainer.max_iter:
            # All images are evaluated when the run has ended well, which is not yet known; the best
            # is saved by a step, as checkpoints are.
            due = self._best is not None
        scores = self._run(self._subset) if due else {}
        if due and self._best is not None:
            self._best.offer(scores, self.trainer.iter)

    def after_train(self) -> None:
        """Evaluate all images unless the run failed or that is done already."""
        if self.trainer.iter + 1 >= self.trainer.max_iter and not self._is_done:
            self._run(0)
        del self._evaluate  # it holds the trainer

    def _run(self, num_images: int) -> dict[str, float]:
        trainer = self.trainer
        results = self._evaluate(num_images) or {}
        if num_images == 0:
            # Detectron2's name, which its verification of expected results reads.
            trainer._last_eval_results = results
            self._is_done = trainer.iter + 1 >= trainer.max_iter
        flat = {}
        for name, value in flatten_results_dict(results).items():
            try:
                flat[name] = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"evaluation: {name} is {value!r}, not a number") from error
        prefix = SUBSET_PREFIX if num_images else ""
        named = {prefix + name: value for name, value in flat.items()}
        trainer.storage.put_scalars(**named, smoothing_hint=False)
        comm.synchronize()  # ranks may differ in evaluation time
        return flat

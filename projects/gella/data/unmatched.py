"""Phrases whose segments no input entity covers, and nouns cut from too long captions.

Both are counted where batches pass, and logged. With the annotation's own masks the former are
phrases of crowds; with a segmenter's masks they are what it missed or merged, and bound what any
association can reach.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from gella.data.wrapped_loader import WrappedLoader

__all__ = ["CountedLoader", "UnmatchedPhrases"]

_logger = logging.getLogger(__name__)


class _Tally:
    """How many phrases with segments went by, and how many of them had no entity."""

    def __init__(self) -> None:
        self.grounded, self.unmatched, self.cut = 0, 0, 0

    def add(self, batch: Sequence[dict[str, Any]]) -> None:
        """Count a batch of mapped dicts, without samples that only fill up a rank's share."""
        batch = [sample for sample in batch if not sample.get("is_padding")]
        self.grounded += sum(int(sample.get("num_grounded", 0)) for sample in batch)
        self.unmatched += sum(int(sample.get("num_unmatched", 0)) for sample in batch)
        self.cut += sum(int(sample.get("num_cut", 0)) for sample in batch)

    @property
    def share(self) -> float:
        """Unmatched of grounded phrases, 0..1; 0 before the first."""
        return self.unmatched / self.grounded if self.grounded else 0.0

    def report(self, what: str) -> None:
        """Log one line, a warning if phrases are unmatched, and one if nouns were cut."""
        part = " in this process" if comm.get_world_size() > 1 else ""
        if self.cut:
            _logger.warning(
                "%s%s: %d nouns were cut from captions too long for the model", what, part, self.cut
            )
        if self.grounded:
            _logger.log(
                logging.WARNING if self.unmatched else logging.INFO,
                "%s%s: %d of %d phrases with segments (%.2f %%) match no input entity",
                *(what, part, self.unmatched, self.grounded, 100 * self.share),
            )


class UnmatchedPhrases(HookBase):
    """Put the running share of unmatched phrases into the storage as ``unmatched_phrases``.

    The share, 0..1, is over all batches of this process since the run was started or resumed. The
    counts are logged at the end. Batches are seen where they enter the model, since workers map
    them.
    """

    def __init__(self) -> None:
        """Nothing to choose."""
        self._tally = _Tally()
        self._handle: Any = None

    def before_train(self) -> None:
        """Watch the model's forward passes."""
        self._handle = self.trainer.model.register_forward_pre_hook(self._watch)

    def after_step(self) -> None:
        """Write the share, once a phrase with segments has come by."""
        if self._tally.grounded:
            self.trainer.storage.put_scalar(
                "unmatched_phrases", self._tally.share, smoothing_hint=False
            )

    def after_train(self) -> None:
        """Stop watching, and log the counts."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._tally.report("Training")

    def _watch(self, model: Any, inputs: tuple[Any, ...]) -> None:
        if model.training:
            self._tally.add(inputs[0])


class CountedLoader(WrappedLoader):
    """A test loader that logs, after its last batch, how many phrases match no input entity."""

    def __init__(self, loader: Iterable[list[dict[str, Any]]], dataset_name: str) -> None:
        """``loader`` gives lists of mapped dicts of the dataset."""
        super().__init__(loader)
        self._name = dataset_name

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """The loader's batches."""
        tally = _Tally()
        for batch in self._loader:
            tally.add(batch)
            yield batch
        tally.report(f"Dataset {self._name}")

"""Checkpoints that are written atomically and read strictly."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from gella.engine.checkpoint_folder import MODEL_FILE, TRAINER_FILE, consolidate, read_trainer
from gella.engine.checkpoint_store import CheckpointStore, is_checkpoint
from gella.utils.io import write_atomically
from gella.weights.files import main_file, read_torch, read_weights

FOLDER = "checkpoints"
"""Below the output folder, for the checkpoints to resume from."""

_PERIODIC = re.compile(r"model_(\d{7,})")
# Keys of each kind that an error message lists before it only counts.
_LISTED_KEYS = 10

__all__ = [
    "GellaCheckpointer",
    "check_state_dict",
    "consolidate",
    "load_weights",
]


def check_state_dict(
    state: Mapping[str, torch.Tensor],
    model: nn.Module,
    *,
    source: str,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> None:
    """Refuse weights that do not fit a model, before anything is copied into it.

    Args:
        state: weights by key.
        model: the module that is going to load them.
        source: where the weights come from; only named in the error.
        allow_missing: shell patterns of keys that the weights may lack (they stay initialised).
        allow_unexpected: shell patterns of keys that the weights may have in excess.

    Raises:
        ValueError: one message with the count and the first keys of every kind of misfit: missing,
            unexpected, and of another shape (never allowed: such a tensor cannot be copied).
    """
    expected = model.state_dict()
    missing = _outside(expected.keys() - state.keys(), allow_missing)
    unexpected = _outside(state.keys() - expected.keys(), allow_unexpected)
    reshaped = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in sorted(state.keys() & expected.keys())
        if state[key].shape != expected[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    problems = [_list_keys(kind, keys) for kind, keys in kinds if keys]
    if problems:
        raise ValueError(
            f"weights {source} do not fit the model: {'; '.join(problems)}. Use the config that the"
            " weights were trained with, or name the keys (shell patterns) in"
            " MODEL.WEIGHTS_ALLOW_MISSING / MODEL.WEIGHTS_ALLOW_UNEXPECTED"
        )


def _outside(keys: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = tuple(patterns)
    return sorted(k for k in keys if not any(fnmatch.fnmatchcase(k, p) for p in patterns))


def _list_keys(kind: str, keys: list[str]) -> str:
    rest = len(keys) - _LISTED_KEYS
    return f"{len(keys)} {kind}: {', '.join(keys[:_LISTED_KEYS])}" + (
        f" and {rest} more" if rest > 0 else ""
    )


class GellaCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer: folders to resume from, plain files of weights, strict reading.

    ``model_<iteration>``, the name under which Detectron2's periodic checkpointer saves, becomes
    the folder ``save_dir/checkpoints/iter_<iteration>`` (see `checkpoint_store`) with

    - ``model.pth``: ``{"model": weights}``; without the part under ZeRO, which is in ``language/``,
    - ``trainer.pth``: ``{"trainer": ..., "iteration": ...}``, the states of what was given to save,
    - ``state.json``, and what the trainer puts there (``run_checkpoints``).

    Every other name becomes the file ``save_dir/NAME.pth``, ``{"model": weights, "iteration":
    ...}``: for evaluation and use, not to resume from. Reading never runs code from a file.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_missing: Iterable[str] = (),
        allow_unexpected: Iterable[str] = (),
        keep: int = 0,
        keep_every: int = 0,
        **checkpointables: Any,
    ) -> None:
        """Remember what to save.

        Args:
            model: module whose weights are saved and loaded; a distributed wrapper is looked into.
            save_dir: local folder of the checkpoints.
            save_to_disk: None: only the main process writes.
            allow_missing: see :func:`check_state_dict`.
            allow_unexpected: see :func:`check_state_dict`.
            keep: see `CheckpointStore`.
            keep_every: see `CheckpointStore`.
            checkpointables: further objects with ``state_dict`` and ``load_state_dict``.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.store = CheckpointStore(
            os.path.join(save_dir, FOLDER), keep=keep, keep_every=keep_every
        )
        self._allow_missing = tuple(allow_missing)
        self._allow_unexpected = tuple(allow_unexpected)
        self._source, self._saved = "", -1

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a folder or a file, as the name says; ``model_final`` both, so that a run can go on.

        Args:
            name: file name without its suffix and without folders.
            kwargs: further values to keep, such as ``iteration``.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if os.path.basename(name) != name or not name:
            raise ValueError(f"checkpoint name {name!r} must be a plain file name")
        periodic = _PERIODIC.fullmatch(name)
        if not periodic:
            self.save_weights(name, **kwargs)
        if periodic or (name == "model_final" and "iteration" in kwargs):
            iteration = int(periodic[1]) if periodic else int(kwargs["iteration"])
            if not periodic and iteration == self._saved:
                return
            self.write_parts(self.store.begin(iteration), **kwargs)
            self.logger.info("Saved checkpoint %s", self.store.finish(iteration, {}))
            self._saved = iteration

    def write_parts(self, folder: Path, **kwargs: Any) -> None:
        """Write ``model.pth`` and ``trainer.pth`` into a folder; ``kwargs`` as in :meth:`save`."""
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        torch.save({"model": self.model.state_dict()}, folder / MODEL_FILE)
        torch.save({**states, **kwargs}, folder / TRAINER_FILE)

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/NAME.pth``; arguments as in :meth:`save`. Nothing on other processes."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving weights to %s", path)
        data = {"model": self.model.state_dict(), **kwargs}
        write_atomically(path, lambda stream: torch.save(data, stream))

    def load(
        self, path: str, checkpointables: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Load a checkpoint; the empty path leaves the model as it was initialised.

        Args:
            path: a folder of :meth:`save`; or a local file or folder of weights, or an address that
                Detectron2's path manager knows: ``.pth``, ``.safetensors``, an index of shards.
            checkpointables: names of what to load besides the weights; None loads all of them.

        Returns:
            What there is besides the weights and the objects that were loaded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a checkpoint, an incomplete or damaged one, or weights that do not fit
                the model.
        """
        if path and is_checkpoint(path):
            states = {} if checkpointables == [] else read_trainer(path)
            return self.load_parts(path, {**states, "model": consolidate(path)}, checkpointables)
        if path and "://" not in path:
            if not os.path.exists(path):
                raise FileNotFoundError(f"weights file {path} does not exist: check MODEL.WEIGHTS")
            path = str(main_file(path))  # Detectron2's checkpointer takes files only
        self._source = path
        return super().load(path, checkpointables, **kwargs)

    def load_parts(
        self,
        path: str | Path,
        state: dict[str, Any],
        checkpointables: list[str] | None = None,
        without: str = "",
    ) -> dict[str, Any]:
        """Load what was read from a checkpoint's folder.

        Args:
            path: the folder, for messages.
            state: ``{"model": weights, name: state of a checkpointable, ...}``.
            checkpointables: as in :meth:`load`.
            without: a child of the model whose weights may be missing: they are loaded elsewhere.

        Returns:
            see :meth:`load`.
        """
        self.logger.info("Loading checkpoint %s", path)
        self._source = str(path)
        kept = self._allow_missing
        self._allow_missing += (f"{without}.*",) if without else ()
        try:
            self._load_model(state)
        finally:
            self._allow_missing = kept
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in state:
                self.checkpointables[key].load_state_dict(state.pop(key))
        return state

    def has_checkpoint(self) -> bool:
        """Whether ``save_dir`` has a complete checkpoint to resume from; see `CheckpointStore`."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Folder of the newest complete checkpoint of ``save_dir``, "" if none was saved.

        Raises:
            ValueError: there are checkpoints, and none is complete.
        """
        newest = self.store.newest() if self.save_dir else None
        return str(newest.path) if newest else ""

    def get_all_checkpoint_files(self) -> list[str]:
        """Folders of all complete checkpoints of ``save_dir``, oldest first."""
        return [str(item.path) for item in reversed(self.store.found()[0])]

    def _load_file(self, f: str) -> dict[str, Any]:
        if f.endswith(".pkl"):
            raise ValueError(
                f"weights {f} are a pickle, which could run code: convert them to a .pth file that"
                ' holds {"model": {key: tensor}} (tools/convert_weights.py knows public models)'
            )
        if f.endswith((".safetensors", ".json")):
            return {"model": read_weights(f)}
        loaded = read_torch(f)
        if not isinstance(loaded, dict) or not isinstance(loaded.get("model", {}), dict):
            raise ValueError(f'weights {f} hold no "model" dictionary of tensors by key')
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: Any) -> Any:
        state = checkpoint["model"]
        prefix = "module."  # left by a distributed wrapper
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
            checkpoint["model"] = state
        odd = next((k for k, v in state.items() if not isinstance(v, torch.Tensor)), None)
        if odd is not None:
            raise ValueError(
                f"weights {self._source}: key {odd} is a {type(state[odd]).__name__}, not a tensor"
            )
        check_state_dict(
            state,
            self.model,
            source=self._source,
            allow_missing=self._allow_missing,
            allow_unexpected=self._allow_unexpected,
        )
        return super()._load_model(checkpoint)


def load_weights(model: nn.Module, path: str, cfg: Any) -> None:
    """Load the weights of a checkpoint file into a model, strictly, and nothing else of it.

    Args:
        model: module on any device; changed in place.
        path: checkpoint file or folder; "" leaves the model untrained and says so in the log.
        cfg: gives ``MODEL.WEIGHTS_ALLOW_MISSING`` and ``MODEL.WEIGHTS_ALLOW_UNEXPECTED``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or its keys or shapes are not the model's.
    """
    if not path:
        logging.getLogger(__name__).warning("no weights were given: the model is untrained")
        return
    GellaCheckpointer(
        model,
        allow_missing=cfg.MODEL.WEIGHTS_ALLOW_MISSING,
        allow_unexpected=cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED,
    ).load(path, checkpointables=[])

"""Checkpoints that are written atomically and read strictly."""

from __future__ import annotations

import fnmatch
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from gella.modeling.state_dicts.files import main_file, read_torch, read_weights

# Keys of each kind that an error message lists before it only counts.
_LISTED_KEYS = 10

__all__ = ["GellaCheckpointer", "check_state_dict", "load_weights", "write_atomically"]


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that readers, and a kill at any moment, see the old one or the whole new one.

    Args:
        path: local file to create or replace; its folder must exist.
        write: called once with a binary stream; what it writes becomes the file.

    Raises:
        Whatever ``write`` raises; the temporary file is then removed and ``path`` is untouched.
    """
    folder, name = os.path.split(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # a rename must not overtake the data on a power failure
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


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
    """Detectron2's checkpointer, atomic when it writes and strict when it reads.

    The file layout is Detectron2's: ``{"model": ..., "trainer": ..., "iteration": ...}`` and the
    text file ``last_checkpoint``, which always names a complete file. Reading never runs code from
    the file (``weights_only``).
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_missing: Iterable[str] = (),
        allow_unexpected: Iterable[str] = (),
        **checkpointables: Any,
    ) -> None:
        """Remember what to save.

        Args:
            model: module whose weights are saved and loaded; a distributed wrapper is looked into.
            save_dir: local folder of the checkpoints.
            save_to_disk: None: only the main process writes.
            allow_missing: see :func:`check_state_dict`.
            allow_unexpected: see :func:`check_state_dict`.
            checkpointables: further objects with ``state_dict`` and ``load_state_dict``.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._allow_missing = tuple(allow_missing)
        self._allow_unexpected = tuple(allow_unexpected)
        self._source = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/name.pth``, then name it in ``save_dir/last_checkpoint``.

        Args:
            name: file name without its suffix and without folders.
            kwargs: further picklable values to keep beside the weights.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if os.path.basename(name) != name or not name:
            raise ValueError(f"checkpoint name {name!r} must be a plain file name")
        data: dict[str, Any] = {"model": self.model.state_dict()}
        for key, item in self.checkpointables.items():
            data[key] = item.state_dict()
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda stream: torch.save(data, stream))
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make ``save_dir/last_checkpoint`` name a file of ``save_dir``, atomically."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda stream: stream.write(last_filename_basename.encode()))

    def load(
        self, path: str, checkpointables: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Load a checkpoint file; the empty path leaves the model as it was initialised.

        Args:
            path: local file or folder, or an address that Detectron2's path manager knows. Weights
                alone may also be a ``.safetensors`` file, an index of shards, or a folder of these.
            checkpointables: names of what to load besides the weights; None loads all of them.

        Returns:
            What the file holds besides the weights and the objects that were loaded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a checkpoint, a damaged one, or weights that do not fit the model.
        """
        if path and "://" not in path:
            if not os.path.exists(path):
                raise FileNotFoundError(f"weights file {path} does not exist: check MODEL.WEIGHTS")
            path = str(main_file(path))  # Detectron2's checkpointer takes files only
        self._source = path
        return super().load(path, checkpointables, **kwargs)

    def get_checkpoint_file(self) -> str:
        """Path of the newest checkpoint of ``save_dir``, "" if there is none.

        Raises:
            FileNotFoundError: ``last_checkpoint`` names a file that is gone.
        """
        path = super().get_checkpoint_file()
        if path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"{self.save_dir}/last_checkpoint names {path}, which does not exist: restore it,"
                " or write the name of another checkpoint of that folder into last_checkpoint"
            )
        return path

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
        path: checkpoint file; "" leaves the model untrained and says so in the log.
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

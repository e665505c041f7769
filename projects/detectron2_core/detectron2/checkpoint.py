"""Checkpoints in Detectron2's file layout."""

from __future__ import annotations

from typing import Any

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from torch import nn

__all__ = ["Checkpointer", "DetectionCheckpointer", "PeriodicCheckpointer"]


class DetectionCheckpointer(Checkpointer):
    """Saves ``{"model": state_dict, <name>: state_dict of each checkpointable, ...}`` as .pth.

    ``save_dir`` also gets a text file ``last_checkpoint`` with the newest file's name, written
    once that file is complete. By default only rank 0 writes. A DDP model is saved without its
    wrapper, and a ``module.`` prefix is dropped when loading. Every rank reads the file itself.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        writes = comm.is_main_process() if save_to_disk is None else save_to_disk
        super().__init__(model, save_dir, save_to_disk=writes, **checkpointables)
        self.path_manager = PathManager

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            raise ValueError(f"{filename}: only .pth is read here; convert it with full Detectron2")
        loaded = super()._load_file(filename)
        return loaded if "model" in loaded else {"model": loaded}

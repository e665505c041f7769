"""The checkpoints of a training run: written by all processes together, taken up by a later run.

Beside weights and optimisers a folder gets ``config.yaml``, ``random_<rank>.pth`` with the states
of the random generators, and in ``state.json`` the number of processes, the layout of ZeRO, and
where the data stood. A run on the same layout goes on exactly. Where stage or number of processes
changed, DeepSpeed cannot read its own files: the language decoder's weights are then put together
and loaded exactly, and its optimiser starts anew, which is said.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from gella.engine import zero_checkpoint
from gella.engine.checkpoint import FOLDER, CheckpointStore
from gella.engine.evaluation_hooks import random_states, set_random_states
from gella.utils.io import versions, write_atomically
from gella.weights.checkpoint import (
    MODEL_FILE,
    TRAINER_FILE,
    check_sample,
    consolidate,
    load_state,
    read_parts,
)
from gella.weights.files import read_torch

PACKAGES = ("torch", "deepspeed", "transformers")
"""Whose versions ``state.json`` tells."""

_logger = logging.getLogger(__name__)


class RunCheckpoints(HookBase):
    """Saves every ``period`` iterations and at the end, and takes a checkpoint up again.

    In the place of Detectron2's periodic checkpointer, on all ranks; register it behind the hook of
    ZeRO and the scheduler's. At the end the weights alone are saved as ``model_final.pth`` too.
    """

    def __init__(self, cfg: Any, *, zero: Any = None, loader: Any = None) -> None:
        """Args:
        cfg: the run's config.
        zero: a ``ZeroHook``, or None.
        loader: the training loader; one with ``position(iteration)`` tells where the data stand.

        Raises:
            ValueError: a negative ``SOLVER.CHECKPOINT_KEEP`` or ``SOLVER.CHECKPOINT_KEEP_EVERY``.
        """
        solver = cfg.SOLVER
        self.store = CheckpointStore(
            Path(cfg.OUTPUT_DIR) / FOLDER,
            keep=solver.CHECKPOINT_KEEP,
            keep_every=solver.CHECKPOINT_KEEP_EVERY,
        )
        self._period, self._cfg = solver.CHECKPOINT_PERIOD, cfg
        self._zero, self._loader = zero, loader
        self._facts: dict[str, Any] = {}  # of the checkpoint that is being resumed from
        self._folder: Path | None = None
        self._exact = False  # DeepSpeed reads its own files
        self._whole: dict[str, Tensor] = {}  # else what the part's weights must become

    def after_step(self) -> None:
        """Save if this iteration is the period's last, or the last of all."""
        iteration = self.trainer.iter
        last = iteration + 1 >= self.trainer.max_iter
        if last:
            # First: a run that is resumed behind its last iteration would not write it any more.
            self.save(iteration, "model_final")
        if last or (self._period > 0 and (iteration + 1) % self._period == 0):
            self.save(iteration)

    def save(self, iteration: int, name: str = "") -> None:
        """Save a checkpoint to resume from, or with a name whole weights; all ranks call it."""
        if name:
            path = Path(self._cfg.OUTPUT_DIR) / f"{name}.pth"

            def save_weights() -> None:
                _logger.info("Saving weights to %s", path)
                data = {"model": self._model.state_dict(), "iteration": iteration}
                write_atomically(path, lambda stream: torch.save(data, stream))

            if self._zero is not None:
                self._zero.save_whole(save_weights)
            elif comm.is_main_process():
                save_weights()
            return
        if comm.is_main_process():
            self.store.begin(iteration)
        comm.synchronize()
        folder = self.store.being_written(iteration)
        torch.save(random_states(), folder / f"random_{comm.get_rank():04d}.pth")
        facts: dict[str, Any] = {
            "processes": comm.get_world_size(),
            "zero": None,
            "data": self._position(iteration + 1),
            "versions": versions(PACKAGES),
        }
        if self._zero is not None:
            engine = self._zero.engine
            zero_checkpoint.save_engine(engine, folder)
            facts["zero"] = {
                "part": self._zero.part,
                "layout": zero_checkpoint.part_layout(self._zero.config, engine.module),
                "sample": zero_checkpoint.sample_weights(engine),
            }
        if comm.is_main_process():
            states = {"trainer": self.trainer.state_dict(), "iteration": iteration}
            torch.save({"model": self._model.state_dict()}, folder / MODEL_FILE)
            torch.save(states, folder / TRAINER_FILE)
            (folder / "config.yaml").write_text(self._cfg.dump(), encoding="utf-8")
        comm.synchronize()  # all have written
        if comm.is_main_process():
            _logger.info("Saved checkpoint %s", self.store.finish(iteration, facts))
        comm.synchronize()  # nobody ends before it has its name

    @property
    def _model(self) -> nn.Module:
        model = self.trainer.model  # type: ignore[attr-defined]
        return getattr(model, "module", model)  # without the distributed wrapper

    def _position(self, iteration: int) -> dict[str, Any]:
        position = getattr(self._loader, "position", None)
        return position(iteration) if position is not None else {}

    def resume(self, path: str | Path) -> None:
        """Load a checkpoint's folder into model, trainer and hooks, before the training starts.

        All ranks call it. What is under ZeRO follows in :meth:`before_train`.

        Raises:
            ValueError: it is incomplete or damaged, or does not fit; names the file.
        """
        _logger.info("Loading checkpoint %s", path)
        self._facts, weights, states = read_parts(path)
        self._folder = Path(path)
        sampler, saved = getattr(self._loader, "sampler", None), self._facts.get("data", {})
        if self._cfg.SEED < 0 and saved and sampler is not None:
            sampler.seed = saved["seed"]  # it was drawn at random: this run's is of no meaning
        now = self._position(self._facts["iteration"] + 1)
        for key in ("seed", "batch", "ratios", "records", "datasets"):
            if key in saved and key in now and saved[key] != now[key]:
                _logger.warning(
                    "the checkpoint was trained with %s %s, this run has %s: the images come in"
                    " another order than in a run that was never interrupted",
                    *(key, saved[key], now[key]),
                )
        reason, without = self._read_part(weights)
        optimizer = self.trainer.optimizer  # type: ignore[attr-defined]
        inner = states["trainer"]["_trainer"]
        inner["optimizer"] = fitted_optimizer_state(inner["optimizer"], optimizer)
        divider = self._zero and self._zero.divider()
        kept = {"without": without, "settle": divider}
        load_state(self._model, weights, self._cfg, source=str(path), **kept)
        self.trainer.load_state_dict(states["trainer"])  # type: ignore[attr-defined]
        if reason:
            _logger.warning(
                "The language decoder's weights are restored exactly, but its optimiser's averages"
                " start anew, because of a change of layout: %s",
                reason,
            )

    def _read_part(self, weights: dict[str, Tensor]) -> tuple[str, str]:
        """Add the weights of the part under ZeRO to the others if they have to be put together.

        Returns why the optimiser starts anew ("" if it goes on), and the child of the model whose
        weights this rank does not load here.
        """
        saved, zero = self._facts.get("zero"), self._zero
        if saved is None and zero is None:
            return "", ""
        if saved is None:
            start = f"{zero.part}."
            whole = weights.items() if comm.is_main_process() else ()
            self._whole = {k[len(start) :]: t for k, t in whole if k.startswith(start)}
            return "no ZeRO -> ZeRO", ""
        name, reason, needed = saved["part"], "ZeRO -> no ZeRO", True
        if zero is not None:
            reason = zero_checkpoint.layout_changes(
                saved["layout"],
                self._facts["processes"],
                zero_checkpoint.part_layout(zero.config, zero.module),
                comm.get_world_size(),
            )
            # DeepSpeed takes the weights of rank 0 when it starts.
            needed = bool(reason) and comm.is_main_process()
            self._exact = not reason
        assert self._folder is not None
        if self._exact:
            zero_checkpoint.check_readable(self._folder)
        if not needed:
            return reason, name
        start = f"{name}."
        part = {k: t for k, t in consolidate(self._folder).items() if k.startswith(start)}
        weights |= part
        if zero is not None:
            self._whole = {k[len(start) :]: t for k, t in part.items()}
        return reason, ""

    def before_train(self) -> None:
        """Give the engine of ZeRO what the checkpoint holds of it; all ranks."""
        if self._folder is None or self._zero is None:
            return
        engine, saved = self._zero.engine, self._facts["zero"]
        if self._exact:
            zero_checkpoint.load_engine(engine, self._folder)
        elif self._zero.stage > 0:
            zero_checkpoint.set_weights(engine, self._whole)
        self._whole = {}
        if saved is not None:
            digests = zero_checkpoint.current_digests(engine, saved["sample"])
            check_sample(digests, saved["sample"], self._folder)

    def before_step(self) -> None:
        """Before the first step of a resumed run, give the random generators their states back."""
        if self._folder is None:
            return
        file = self._folder / f"random_{comm.get_rank():04d}.pth"
        if self._facts.get("processes") == comm.get_world_size() and file.is_file():
            set_random_states(read_torch(file))
        self._folder = None


def fitted_optimizer_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """An optimiser's state for an optimiser that has, or lacks, the groups under ZeRO.

    ``saved`` is the ``state_dict()`` of one with the same groups, of which those of the language
    side may be without parameters in one of the two; they get no state then.

    Raises:
        ValueError: the groups differ in another way; names the group and both numbers.
    """
    now, before = optimizer.state_dict()["param_groups"], saved["param_groups"]
    advice = "other parts of the model are trained. Start from its weights instead (MODEL.WEIGHTS,"
    advice += " without --resume)"
    if len(before) != len(now):
        raise ValueError(
            f"the checkpoint's optimiser has {len(before)} groups of parameters, this run's"
            f" {len(now)}: {advice}"
        )
    states: dict[int, Any] = {}
    groups = []
    for old, new in zip(before, now, strict=True):
        if len(old["params"]) == len(new["params"]):
            pairs = zip(old["params"], new["params"], strict=True)
            states |= {n: saved["state"][o] for o, n in pairs if o in saved["state"]}
        elif old.get("role") != "language" or (old["params"] and new["params"]):
            raise ValueError(
                f"the checkpoint's optimiser has {len(old['params'])} parameters in the group"
                f" {old.get('name')}, this run's {len(new['params'])}: {advice}"
            )
        groups.append({**old, "params": new["params"]})
    return {"state": states, "param_groups": groups}

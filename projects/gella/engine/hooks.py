"""Hooks of the training loop: clipping, numbers that are not finite, stopping, the run's scalars.

Where a method talks to the other processes, all ranks must call it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from gella.utils.io import write_json
from gella.utils.stopping import WatchedStopRequest, say

PATIENCE_SECONDS = 900.0
"""The longest that a process works on after a signal without reaching the end of its step."""

_logger = logging.getLogger(__name__)

# Datasets without captions train grounding in their own way; the sampler drew "ground".
_SAMPLED_TASK = {"refer": "ground", "panoptic": "ground"}


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank; all ranks must call it."""
    if comm.get_world_size() == 1:
        return flag
    # The NCCL backend carries tensors of a GPU only.
    device = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    raised = torch.tensor([int(flag)], device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


class GradientClipper(HookBase):
    """Clip gradients after the backward pass as ``SOLVER.CLIP_GRADIENTS`` says; log their norm.

    ``per_side`` scales the gradient of the language decoder and that of all other parts each by a
    factor of its own so that its norm is at most ``LANGUAGE_VALUE`` and ``CLIP_VALUE``. One limit
    for both would scale the language side by what ten supervised mask outputs need.

    ``full_model`` has one factor for the joint norm of all gradients and ``CLIP_VALUE``; ``norm``
    does so for each parameter alone, ``value`` clamps each number. With the language decoder under
    ZeRO, where no rank has a whole gradient, only the first two.
    """

    TYPES = ("per_side", "full_model", "norm", "value")

    def __init__(
        self,
        clip_type: str,
        clip_value: float,
        norm_type: float,
        *,
        language_value: float,
        zero: Any = None,
    ) -> None:
        """The keys of ``SOLVER.CLIP_GRADIENTS``, and a ``ZeroHook`` or None.

        Raises:
            ValueError: an unknown type, or one that cannot be had of divided gradients.
        """
        if clip_type not in self.TYPES:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip_type!r}: use one of {self.TYPES}"
            )
        if zero is not None and (clip_type not in self.TYPES[:2] or norm_type != 2.0):
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS has CLIP_TYPE {clip_type!r} and NORM_TYPE {norm_type}:"
                f" with SOLVER.ZERO.CONFIG only {self.TYPES[:2]} and 2.0 are possible"
            )
        self._type, self._value, self._norm, self._zero = clip_type, clip_value, norm_type, zero
        self._language_value = language_value if clip_type == "per_side" else clip_value

    def after_backward(self) -> None:
        """Clip, and put the norms before clipping into the storage.

        ``grad_norm`` is over all parameters, ``grad_norm_language`` and ``grad_norm_vision`` over
        those of the language decoder and all others.
        """
        inner = self.trainer._trainer
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None:
            scaler.unscale_(inner.optimizer)  # the limit is meant for the true gradients
        sides: dict[str, list[nn.Parameter]] = {"language": [], "vision": []}
        for group in inner.optimizer.param_groups:
            side = "language" if group.get("role") == "language" else "vision"
            sides[side] += group["params"]
        norms = {
            side: nn.utils.get_total_norm(
                [p.grad for p in parameters if p.grad is not None], self._norm
            )
            for side, parameters in sides.items()
        }
        if self._zero is not None:
            norms["language"] = self._zero.gradient_norm()
        device = norms["vision"].device
        norm = nn.utils.get_total_norm([n.to(device) for n in norms.values()], self._norm)
        parameters = sides["vision"] + sides["language"]
        if self._type in self.TYPES[:2]:
            limited = norms if self._type == "per_side" else dict.fromkeys(norms, norm)
            limit = self._language_value
            nn.utils.clip_grads_with_norm_(sides["vision"], self._value, limited["vision"])
            nn.utils.clip_grads_with_norm_(sides["language"], limit, limited["language"])
            if self._zero is not None:
                # PyTorch's own rule for the factor
                factor = min(1.0, limit / (float(limited["language"]) + 1e-6))
                self._zero.clip(factor, float(norms["language"]))
        elif self._type == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, self._value, self._norm)
        else:
            nn.utils.clip_grad_value_(parameters, self._value)
        storage = self.trainer.storage
        storage.put_scalar("grad_norm", float(norm))
        for side, value in norms.items():
            storage.put_scalar(f"grad_norm_{side}", float(value))


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite, and ``SOLVER.NONFINITE`` does not let it pass."""


class NonFiniteGuard(HookBase):
    """Decides what becomes of a step whose losses or gradients are NaN or infinite on any rank.

    ``stop`` raises at the first one; ``skip`` tells the trainer to leave the parameters as they
    are, up to ``limit`` steps in all, and then raises. Either way ``nonfinite_<iteration>.json`` in
    the output folder says which images of which rank took part. The number of skipped steps is
    logged as ``skipped_steps`` and is part of checkpoints.

    The trainer that makes the steps calls :meth:`losses_ok` between forward and backward pass. For
    gradients the hook looks at the norms that ``GradientClipper`` logs, behind which it must be
    registered; without ``SOLVER.CLIP_GRADIENTS`` there are none and gradients are not looked at.
    """

    POLICIES = ("stop", "skip")

    def __init__(self, policy: str, limit: int, output_dir: str) -> None:
        """``SOLVER.NONFINITE``, ``SOLVER.NONFINITE_LIMIT`` and the output folder.

        The limit is of the whole run, resumed parts included, and not in a row: a run that skips
        every tenth step trains on other data than its config says. ValueError for other values.
        """
        if policy not in self.POLICIES:
            raise ValueError(f"SOLVER.NONFINITE is {policy!r}: use one of {self.POLICIES}")
        if limit < 0:
            raise ValueError(f"SOLVER.NONFINITE_LIMIT is {limit}: it must not be negative")
        self.skipped = 0
        self._policy, self._limit, self._folder = policy, limit, output_dir
        self._seen: list[dict[str, Any]] = []

    def before_step(self) -> None:
        """Forget the batches of the last step."""
        self._seen = []

    def losses_ok(self, losses: Mapping[str, Tensor], batch: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the backward pass may be made; all ranks must call it and get one answer.

        After False no gradient of the step counts and no parameter changes. ``losses`` are the
        scalars that the model returns for ``batch``, mapped dicts.

        Raises:
            NonFiniteError: on all ranks, naming the file that was written.
        """
        numbers = torch.stack([loss.detach().double() for loss in losses.values()]).tolist()
        images = [
            {"file_name": str(item.get("file_name", "")), "image_id": item.get("image_id")}
            for item in batch
        ]
        tasks = sorted({str(item.get("task", "")) for item in batch})
        named = _written(dict(zip(losses, numbers, strict=True)))
        self._seen.append({"tasks": tasks, "losses": named, "images": images})
        return self._accepted(all(map(math.isfinite, numbers)), "losses", {})

    def after_backward(self) -> None:
        """Let the inner trainer drop the step if a gradient norm is not finite.

        Raises:
            NonFiniteError: on all ranks, naming the file that was written.
        """
        inner = self.trainer._trainer
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None and scaler.is_enabled():
            return  # it skips overflows by itself, and they are no accident
        latest = self.trainer.storage.latest()
        norms = {
            name: value
            for name, (value, iteration) in latest.items()
            if name.startswith("grad_norm") and iteration == self.trainer.iter
        }
        finite = all(map(math.isfinite, norms.values()))
        if not self._accepted(finite, "gradients", {"gradient_norms": _written(norms)}):
            inner.drop_step = True

    def after_step(self) -> None:
        """Log the count where steps may be skipped."""
        if self._policy == "skip":
            storage = self.trainer.storage
            storage.put_scalar("skipped_steps", self.skipped, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps, so that a resumed run goes on counting."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the number of skipped steps over."""
        self.skipped = int(state["skipped"])

    def _accepted(self, finite: bool, what: str, extra: dict[str, Any]) -> bool:
        if not any_rank(not finite):
            return True
        stops = self._policy == "stop" or self.skipped >= self._limit
        iteration = self.trainer.iter
        path = os.path.join(self._folder, f"nonfinite_{iteration:07d}.json")
        ranks = comm.gather({"rank": comm.get_rank(), **extra, "batches": self._seen})
        if comm.is_main_process():
            content = {"iteration": int(iteration), "what": what, "ranks": ranks}
            content |= {"action": "stop" if stops else "skip", "skipped_before": self.skipped}
            write_json(path, content)
        # A rank that raised early would take the others down before the file is written.
        comm.synchronize()
        if not stops:
            self.skipped += 1
            _logger.warning(
                "iteration %d: %s are not finite, the step is skipped (%d of %d); see %s",
                *(iteration, what, self.skipped, self._limit, path),
            )
            return False
        reason, advice = "", "SOLVER.NONFINITE skip passes over such steps"
        if self._policy == "skip":
            reason = f" and {self.skipped} steps were skipped already"
            advice = (
                "SOLVER.NONFINITE_LIMIT allows no more. A resumed run meets the same batch again"
            )
        raise NonFiniteError(
            f"iteration {iteration}: {what} are not finite{reason}. The images are listed in"
            f" {path}. {advice}; a lower SOLVER.BASE_LR, SOLVER.CLIP_GRADIENTS or higher precision"
            " may help"
        )


def _written(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """The numbers with NaN and infinity, which JSON lacks, as text."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


class RunStopped(SystemExit):
    """A run ended before its last iteration because it was asked to; status 0, and a line on it."""

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self._text = text

    def __str__(self) -> str:
        return self._text


class StopOnSignal(HookBase):
    """Ends a run at the end of its step after SIGTERM or SIGINT on any rank.

    All ranks agree on the iteration, save, and raise :class:`RunStopped`. A second signal ends the
    process at once, as does a step that takes longer than ``PATIENCE_SECONDS`` from the signal on
    (another process is gone, or the signal came in a long evaluation; an evaluation inside a run is
    finished first). After the training the signals are given back: what is left, a final
    evaluation, can be repeated.
    """

    def __init__(self, save: Callable[[int], None]) -> None:
        """``save`` is called with the iteration on all ranks."""
        self._save = save
        self.request = WatchedStopRequest(
            PATIENCE_SECONDS,
            lambda number: say(
                f"{signal.Signals(number).name}: this step is finished and saved; again: at once"
            ),
        )

    def before_train(self) -> None:
        """Take the signals over."""
        self.request.__enter__()

    def after_step(self) -> None:
        """Stop if any rank was asked to. The last iteration is followed by the run's own end."""
        number = self.request.number
        iteration, max_iter = self.trainer.iter, self.trainer.max_iter
        if not any_rank(number != 0) or iteration + 1 >= max_iter:
            return
        self.request.end_patience()
        self._save(iteration)
        name = signal.Signals(number).name if number else "a signal to another process"
        raise RunStopped(
            f"stopped by {name} after iteration {iteration} (of 0 to {max_iter - 1}), which is"
            " saved"
        )

    def after_train(self) -> None:
        """Give the signals back."""
        self.request.__exit__(None, None, None)


class PhraseTally:
    """Counts phrases whose segments no input entity covers, and nouns cut from too long captions.

    With the annotation's own masks the former are phrases of crowds; with a segmenter's masks they
    are what it missed or merged, and bound what any association can reach.
    """

    def __init__(self) -> None:
        self.grounded, self.unmatched, self.cut = 0, 0, 0

    def add(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Count a batch of mapped dicts, without samples that only fill up a rank's share."""
        batch = [sample for sample in batch if not sample.get("is_padding")]
        asked = [x for sample in batch for x in (sample, *sample.get("more", ()))]
        self.grounded += sum(int(x.get("num_grounded", 0)) for x in asked)
        self.unmatched += sum(int(x.get("num_unmatched", 0)) for x in asked)
        self.cut += sum(int(x.get("num_cut", 0)) for x in asked)

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
                *(what, part, self.unmatched, self.grounded, 100 * self.unmatched / self.grounded),
            )


class RunScalars(HookBase):
    """Puts these scalars into the storage after each step:

    * ``lr_<role>``, roles of `gella.engine.optimizer`: the learning rate of the step just done;
    * ``images_per_second`` over all ranks, during the step, waiting for data included;
    * ``max_memory_mib`` of this rank, see :func:`peak_memory_mib`;
    * ``batches_<task>``: micro batches of the task so far in the run, resumed parts included;
    * ``unmatched_phrases``: of this process's phrases with segments since the run was started or
      resumed, the share, 0..1, that match no input entity; the counts are logged at the end.

    Register it before the scheduler's hook, which changes the rates for the next step. The losses,
    ``data_time`` and ``grad_norm`` come from the trainer itself.
    """

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()
        self.phrases = PhraseTally()
        self._started = 0.0

    def before_step(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def after_step(self) -> None:
        """Write the scalars."""
        seconds = time.perf_counter() - self._started
        trainer: Any = self.trainer
        storage, step = trainer.storage, trainer._trainer
        # The first step also starts the loader and compiles.
        if trainer.iter > trainer.start_iter:
            images = len(step.batch) * comm.get_world_size()  # ranks have equal shares
            storage.put_scalar("images_per_second", images / seconds)
        task = str(step.batch[0].get("task", "none"))
        self.batches[_SAMPLED_TASK.get(task, task)] += step.accumulate
        self.phrases.add(step.batch)
        # Groups of one role differ in weight decay only.
        groups = [group for group in trainer.optimizer.param_groups if "role" in group]
        now = {f"lr_{group['role']}": group["lr"] for group in groups}
        now["max_memory_mib"] = peak_memory_mib(str(trainer.cfg.MODEL.DEVICE))
        now |= {f"batches_{task}": count for task, count in sorted(self.batches.items())}
        if self.phrases.grounded:
            now["unmatched_phrases"] = self.phrases.unmatched / self.phrases.grounded
        for name, value in now.items():
            if not math.isnan(value):
                storage.put_scalar(name, value, smoothing_hint=False)

    def after_train(self) -> None:
        """Log the counts of phrases."""
        self.phrases.report("Training")

    def state_dict(self) -> dict[str, Any]:
        """The counts of batches, so that a resumed run goes on counting."""
        return {"batches": dict(self.batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts over."""
        self.batches = Counter(state["batches"])


def peak_memory_mib(device: str) -> float:
    """Return the most memory that was in use so far, MiB (2^20 bytes).

    Args:
        device: of the model. "cuda...": what PyTorch had allocated on this process's GPU. Others:
            the resident memory of this process, without its loader's workers; NaN on systems that
            do not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

"""SIGTERM and SIGINT: finish the step, save, and end with status 0 and a line on how to go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase

from gella.engine.run_control import any_rank

__all__ = ["RunStopped", "StopOnSignal", "forwarded_signals", "resume_command"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 1.0
"""Signals that follow the first one so soon are the same request, come on two ways: from the
terminal or the cluster to the whole group, and from the process that started this one."""
PATIENCE_SECONDS = 900.0
"""The longest that a process works on after a signal without reaching the end of its step."""


class RunStopped(SystemExit):
    """A run ended before its last iteration because it was asked to; status 0.

    Attributes:
        signal_name: "SIGTERM" or "SIGINT", "a signal" on a rank that got none.
        iteration: the last one done, saved.
        max_iter: of the whole run.
    """

    def __init__(self, signal_name: str, iteration: int, max_iter: int) -> None:
        """See the attributes."""
        super().__init__(0)
        self.signal_name, self.iteration, self.max_iter = signal_name, iteration, max_iter

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"stopped by {self.signal_name} after iteration {self.iteration} (of 0 to"
            f" {self.max_iter - 1}), which is saved"
        )


class StopOnSignal(HookBase):
    """Ends a run at the end of its step after SIGTERM or SIGINT on any rank.

    All ranks agree on the iteration, save, and raise :class:`RunStopped`. A second signal, over
    ``REPEAT_SECONDS`` after the first, ends the process at once, as does a step that takes longer
    than ``PATIENCE_SECONDS`` from the signal on (another process is gone, or the signal came in a
    long evaluation; an evaluation inside a run is finished first).

    Register it behind the scheduler's hook, whose state is saved, and before the checkpointer's and
    the evaluation's. Outside the main thread Python takes no signals, and the hook does nothing but
    agree with the other ranks.
    """

    def __init__(self, save: Callable[[int], None]) -> None:
        """``save`` is called with the iteration on all ranks."""
        self._save = save
        self._previous: dict[signal.Signals, Any] = {}
        self._watch: _SignalWatch | None = None

    def before_train(self) -> None:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._watch = _SignalWatch()
            self._previous = {number: signal.signal(number, _noted) for number in SIGNALS}

    def after_step(self) -> None:
        """Stop if any rank was asked to. The last iteration is followed by the run's own end."""
        received = self._watch.received if self._watch else None
        iteration, max_iter = self.trainer.iter, self.trainer.max_iter
        if not any_rank(received is not None) or iteration + 1 >= max_iter:
            return
        if self._watch:
            self._watch.end_patience()
        self._save(iteration)
        name = signal.Signals(received).name if received else "a signal to another process"
        raise RunStopped(name, iteration, max_iter)

    def after_train(self) -> None:
        """Give the signals back: what is left, a final evaluation, can be repeated."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._watch:
            self._watch.close()
            self._watch = None


class _SignalWatch:
    """A thread that learns of signals even while the main thread waits inside a C library.

    Python runs its handlers in the main thread between two of its own instructions. A process that
    waits for a lost peer never gets there, but the signal's number is written to a socket at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since, self._deadline = 0.0, float("inf")
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def end_patience(self) -> None:
        """The step is done: what follows may take its time."""
        self._deadline = float("inf")

    def close(self) -> None:
        """Stop listening; call it in the main thread, after the handlers are back."""
        signal.set_wakeup_fd(self._previous_fd)
        # Not close(), which would wait for the loader's workers: they inherited the socket.
        self._mouth.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._mouth.close()
        self._ear.close()

    def _listen(self) -> None:
        while True:
            wait = self._deadline - time.monotonic()
            self._ear.settimeout(None if wait == float("inf") else max(wait, 0.01))
            try:
                numbers = self._ear.recv(64)
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    self._end(self.received or signal.SIGTERM, "the step has not come to its end")
                continue
            if not numbers:
                return
            for number in set(numbers).intersection(SIGNALS):
                self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            self._deadline = now + PATIENCE_SECONDS
            _say(f"{signal.Signals(number).name}: this step is finished and saved; again: at once")
        elif now - self._since > REPEAT_SECONDS:
            self._end(number, "a second signal")

    def _end(self, number: int, reason: str) -> None:
        _say(f"{signal.Signals(number).name}: ended without saving ({reason})")
        os._exit(128 + number)  # not exit(): the main thread may never answer


def _noted(number: int, frame: Any) -> None:
    """The handler in the main thread: the watching thread has the number already."""


def _say(text: str) -> None:
    # Not the log, whose lock the main thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, f"process {os.getpid()}, {text}\n".encode())


@contextlib.contextmanager
def forwarded_signals(processes: int) -> Iterator[None]:
    """Let the process that starts others pass SIGTERM and SIGINT on, and wait for their end.

    Put it around Detectron2's ``launch``. Without it the signal would end this process at once and
    leave the others to themselves.

    Args:
        processes: how many take part in the run. 1 changes nothing: ``launch`` then trains in this
            process, with a hook of its own.

    Raises:
        SystemExit: status 128 + signal if the processes could not end well after a signal.
    """
    if processes <= 1:
        yield
        return
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                if child.pid is not None:
                    os.kill(child.pid, number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        if not received:
            raise
        print(f"ended by a signal: {' '.join(str(error).split())[-300:]}", file=sys.stderr)
        raise SystemExit(128 + received[-1]) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def resume_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Return the command line that goes on with a run.

    Args:
        arguments: ``sys.argv`` of the run: the script and its options.
        environment: variables of the process; torchrun's tell that it started the run. Where the
            nodes of several met is not among them, so that this part is left to the reader.
    """
    script, *options = arguments
    if "--resume" not in options:
        options = ["--resume", *options]
    command = shlex.join([script, *options])
    if "TORCHELASTIC_RUN_ID" not in environment:
        return f"python {command}"
    if environment.get("GROUP_WORLD_SIZE", "1") != "1":
        return f"torchrun <its options, on every node> {command}"
    return f"torchrun --standalone --nproc-per-node {environment['LOCAL_WORLD_SIZE']} {command}"

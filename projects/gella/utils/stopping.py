"""The one way to stop on Ctrl-C and SIGTERM: the piece of work under way ends, then the run does.

    with StopRequest(tell) as stop:
        for batch in batches:
            if stop.number:
                break
            work(batch)
    return stop.status

The first signal is only noted; a second one ends the work at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 1.0
"""Signals that follow the first so soon are the same request to a process of a run of several, come
on two ways: from the terminal or the cluster to the whole group, and from the starting process."""


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt


class StopRequest:
    """Notes SIGINT and SIGTERM instead of letting them break in anywhere; a context manager.

    Outside the main thread, where Python takes no signals, it notes nothing.

    Args:
        first: called with the number of the first signal, in the handler: between any two
            instructions of the main thread, so that it must take no lock which that may hold.
        again: called so at each further one. The default raises KeyboardInterrupt.

    Attributes:
        number: the last signal, 0 if none came.
        count: signals so far.
    """

    def __init__(
        self, first: Callable[[int], object], again: Callable[[int], object] = _interrupt
    ) -> None:
        self._first, self._again = first, again
        self.number = self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def status(self) -> int:
        """Exit status that shells expect of a process which a signal ended: 128 plus the signal's
        number; 0 if none came."""
        return 128 + self.number if self.number else 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._handle) for kind in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        self._note(number)

    def _note(self, number: int) -> None:
        self.number, self.count = number, self.count + 1
        (self._first if self.count == 1 else self._again)(number)


class WatchedStopRequest(StopRequest):
    """A request that ends the process even while its main thread waits inside a C library.

    Python runs handlers in the main thread between two of its own instructions. A process that
    waits for a lost peer never gets there, but the signal's number is written to a socket at once,
    and a thread reads it. That thread ends the process, with status 128 plus the number, at a
    signal over ``REPEAT_SECONDS`` after the first, and when ``patience`` is over.

    Args:
        patience: the longest, in seconds, that the process works on after the first signal.
        first: called with its number, in the thread; it must not log, for the main thread may hold
            the log's lock (:func:`say` does not).
    """

    def __init__(self, patience: float, first: Callable[[int], object]) -> None:
        super().__init__(first)
        self._patience, self._since, self._deadline = patience, 0.0, float("inf")
        self._thread: threading.Thread | None = None

    def end_patience(self) -> None:
        """The piece of work is done: what follows, such as saving, may take its time."""
        self._deadline = float("inf")

    def __enter__(self) -> Self:
        """Take the signals over and start the thread."""
        super().__enter__()
        if self._before:
            self._ear, self._mouth = socket.socketpair()
            self._mouth.setblocking(False)
            descriptor = self._mouth.fileno()
            self._previous_fd = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back and end the thread; call it in the main thread."""
        super().__exit__(*error)
        if self._thread is not None:
            signal.set_wakeup_fd(self._previous_fd)
            # Not close(), which would wait for child processes: they inherited the socket.
            self._mouth.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._mouth.close()
            self._ear.close()
            self._thread = None

    def _handle(self, number: int, frame: Any) -> None:
        """The thread has the number already."""

    def _listen(self) -> None:
        while True:
            wait = self._deadline - time.monotonic()
            self._ear.settimeout(None if wait == float("inf") else max(wait, 0.01))
            try:
                numbers = self._ear.recv(64)
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    self._end(self.number, f"no end within {self._patience:g} s")
                continue
            if not numbers:
                return
            for number in set(numbers).intersection(SIGNALS):
                if self.number == 0:
                    self._since = time.monotonic()
                    self._deadline = self._since + self._patience
                    self._note(number)
                elif time.monotonic() - self._since > REPEAT_SECONDS:
                    self._end(number, "a second signal")

    def _end(self, number: int, reason: str) -> None:
        say(f"{signal.Signals(number).name}: ended without saving ({reason})")
        os._exit(128 + number)  # not exit(): the main thread may never answer


def say(text: str) -> None:
    """Write a line on stderr past Python's buffers and locks: any thread may, at any time."""
    with contextlib.suppress(OSError):
        os.write(2, f"process {os.getpid()}, {text}\n".encode())

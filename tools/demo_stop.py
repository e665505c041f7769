"""How a run of the demo is stopped without losing what is under way."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm


class Stop:
    """Ctrl-C and SIGTERM: the first asks for an end, the second is a KeyboardInterrupt.

    Attributes:
        number: of the signal that came, 0 if none did.
    """

    def __init__(self, captioner: Any = None) -> None:
        """``captioner``: told to begin no further request."""
        self.number = 0
        self._captioner = captioner
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        """Begin to listen; does nothing outside the main thread, where signals never arrive."""
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if self._captioner is not None:
                self._captioner.abort()  # or its threads would be waited for
            raise KeyboardInterrupt
        self.number = number
        if self._captioner is not None:
            self._captioner.stop()
        message = "stopping after the pictures under way (again: at once)"
        tqdm.write(message, file=sys.stderr)

"""How a run of the demo is stopped without losing what is under way."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from gella.utils.stopping import StopRequest


class Stop(StopRequest):
    """Ctrl-C and SIGTERM: the first asks for an end, the second is a KeyboardInterrupt."""

    def __init__(self, captioner: Any = None) -> None:
        """``captioner``: told to begin no further request."""
        super().__init__(self._asked, self._hurried)
        self._captioner = captioner

    def _asked(self, number: int) -> None:
        if self._captioner is not None:
            self._captioner.stop()
        tqdm.write("stopping after the pictures under way (again: at once)", file=sys.stderr)

    def _hurried(self, number: int) -> None:
        if self._captioner is not None:
            self._captioner.abort()  # or its threads would be waited for
        raise KeyboardInterrupt

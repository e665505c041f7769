"""How a run of the demo is stopped without losing what is under way."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from tqdm import tqdm

from gella.captions.run import Interrupts


class Stop(Interrupts):
    """Ctrl-C and SIGTERM: the first asks for an end, the second is a KeyboardInterrupt."""

    def __init__(self, captioner: Any = None) -> None:
        """``captioner``: told to begin no further request."""
        super().__init__()
        self._captioner = captioner

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        if self.count > 1:
            if self._captioner is not None:
                self._captioner.abort()  # or its threads would be waited for
            raise KeyboardInterrupt
        if self._captioner is not None:
            self._captioner.stop()
        tqdm.write("stopping after the pictures under way (again: at once)", file=sys.stderr)

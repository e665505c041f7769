"""What the web page keeps for its visitors: one encoded picture each, for a while, not too many."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

_logger = logging.getLogger(__name__)


@dataclass
class Held:
    """A visitor's encoded picture.

    Attributes:
        key: what it was made of; another key means another picture or other masks.
        scene: the predictor's ``Scene``.
        name: of the picture's file, without folder and suffix; names the downloads.
        preview: the picture as a data URI, for the page.
        shown: whether the page has shown it.
        extracted: a caption and the list of its nouns that a model made.
        used: ``clock()`` of the last use, seconds.
    """

    key: Hashable
    scene: Any
    name: str
    preview: str
    shown: bool = field(default=False, compare=False)
    extracted: tuple[str, str] = field(default=("", ""), compare=False)
    used: float = field(default=0.0, compare=False)

    def keep_nouns(self, caption: str, nouns: Sequence[str]) -> str:
        """Remember nouns that a model found in a caption; return them as a list to be typed."""
        self.extracted = (caption.strip(), ", ".join(nouns))
        return self.extracted[1]

    def nouns_for(self, caption: str, typed: str) -> str:
        """The typed list of nouns; "" if a model found them in a caption that was edited since."""
        of, nouns = self.extracted
        return "" if typed == nouns and (caption or "").strip() != of else typed


class Sessions:
    """Encoded pictures by session: the least recently used one goes when there are too many.

    A session sees only its own. All methods may be called from several threads.

    Args:
        limit: pictures kept at most, of all sessions.
        seconds: a picture not used for so long is dropped at the next :meth:`sweep`.
        clock: seconds that only grow.
    """

    def __init__(
        self, limit: int = 16, seconds: float = 1800.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if limit < 1:
            raise ValueError(f"at most {limit} pictures can be kept; allow at least 1")
        self.limit, self.seconds, self._clock = limit, seconds, clock
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._held)

    def get(self, session: str, key: Hashable) -> Held | None:
        """The session's picture if it was made of ``key``, else None."""
        with self._lock:
            held = self._held.get(session)
            if held is None or held.key != key:
                return None
            held.used = self._clock()
            self._held.move_to_end(session)
            return held

    def put(self, session: str, held: Held) -> None:
        """Keep a picture in the place of the session's former one."""
        with self._lock:
            held.used = self._clock()
            self._held[session] = held
            self._held.move_to_end(session)
            while len(self._held) > self.limit:
                self._held.popitem(last=False)

    def drop(self, session: str) -> None:
        """Forget a session, which may be unknown."""
        with self._lock:
            self._held.pop(session, None)

    def sweep(self) -> int:
        """Drop what was not used for :attr:`seconds`; return how many."""
        with self._lock:
            now = self._clock()
            old = [name for name, held in self._held.items() if now - held.used > self.seconds]
            for name in old:
                del self._held[name]
            return len(old)


class Janitor:
    """Calls functions again and again in a thread of its own until it is stopped.

    Args:
        duties: called in turn; one that fails is logged and called again the next time.
        seconds: pause between two rounds.
    """

    def __init__(self, duties: list[Callable[[], object]], seconds: float = 60.0) -> None:
        self._duties, self._seconds = duties, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="janitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self._seconds):
            for duty in self._duties:
                try:
                    duty()
                except Exception:
                    _logger.exception("cleaning up failed; the next try is in a while")

"""The size of the shared outbox, which no process can keep by itself: counted now and then, and adjusted in between."""
from __future__ import annotations

import math
import threading
from collections.abc import Callable

__all__ = ["Backlog"]

STALE = 1.0  # seconds that the count may be old, when counting is quick
STALEST = 5.0  # seconds that it may be old, however long it takes
SHARE = 20  # of its time at most one in so many parts goes into counting, as long as that is quick enough


class Backlog:
    """How many messages are in the outbox: counted about once a second, and changed by what this process does meanwhile.

    Thread-safe. What other processes did since the last count is not in it.
    """

    def __init__(self, count: Callable[[], int], clock: Callable[[], float]) -> None:
        self._count, self._clock = count, clock
        self._counting = threading.Lock()  # held by the one who counts; the others go on with the old figure
        self._lock = threading.Lock()  # guards everything below
        self._known: int | None = None
        self._since = 0  # change since the count began
        self._began = -math.inf  # when the last count began
        self._fresh_until = -math.inf

    def add(self, change: int) -> None:
        """This process put so many messages into the outbox, or will in a moment, or took them out."""
        with self._lock:
            self._since += change

    def get(self) -> int:
        """The figure, counted anew if it is old and nobody else does."""
        with self._lock:
            known, fresh = self._known, self._clock() < self._fresh_until
        if not fresh and self._counting.acquire(blocking=known is None):
            try:
                self._refresh()
            finally:
                self._counting.release()
        return self._figure()

    def recount(self) -> int:
        """The figure for somebody who is about to refuse a message: at most `STALE` seconds old when counting began."""
        asked = self._clock()
        with self._counting:  # whoever counts already may have begun late enough
            with self._lock:
                late_enough = self._began >= asked - STALE
            if not late_enough:
                self._refresh()
        return self._figure()

    def _figure(self) -> int:
        with self._lock:
            return max(0, (self._known or 0) + self._since)

    def _refresh(self) -> None:
        with self._lock:
            began, before = self._clock(), self._since
        known = self._count()
        with self._lock:
            now = self._clock()
            self._known, self._since, self._began = known, self._since - before, began
            self._fresh_until = now + min(STALEST, max(STALE, SHARE * (now - began)))

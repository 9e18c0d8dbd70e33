"""The size of the shared outbox, which no process can keep by itself: counted now and then, and adjusted in between."""
from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Backlog", "Counts"]

STALE = 1.0  # seconds that the count may be old, when counting is quick
STALEST = 5.0  # seconds that it may be old, however long it takes
SHARE = 20  # of its time at most one in so many parts goes into counting, as long as that is quick enough


class Counts(NamedTuple):
    """Messages in the outbox, and those of them that no batch holds."""

    pending: int = 0
    waiting: int = 0


class Backlog:
    """How many messages are in the outbox: counted about once a second, and changed by what this process does since.

    Thread-safe. What other processes did since the last count is not in it.
    """

    def __init__(self, count: Callable[[], Counts], clock: Callable[[], float]) -> None:
        self._count, self._clock = count, clock
        self._counting = threading.Lock()  # held by the one who counts; the others go on with the old figure
        self._lock = threading.Lock()  # guards everything below
        self._known: Counts | None = None
        self._since = Counts()  # change since the count began
        self._began = -math.inf  # when the last count began
        self._fresh_until = -math.inf

    def add(self, pending: int, waiting: int) -> None:
        """This process changed the outbox by so many messages, or will in a moment."""
        with self._lock:
            self._since = Counts(self._since.pending + pending, self._since.waiting + waiting)

    def peek(self) -> Counts:
        """The figures as they are known."""
        with self._lock:
            known = self._known or Counts()
            return Counts(max(0, known.pending + self._since.pending), max(0, known.waiting + self._since.waiting))

    def get(self) -> Counts:
        """The figures, counted anew if they are old and nobody else does."""
        with self._lock:
            known, fresh = self._known, self._clock() < self._fresh_until
        if not fresh and self._counting.acquire(blocking=known is None):
            try:
                self._refresh()
            finally:
                self._counting.release()
        return self.peek()

    def recount(self) -> Counts:
        """The figures for somebody who is about to refuse a message: at most `STALE` seconds old."""
        asked = self._clock()
        with self._counting:  # whoever counts already may have begun late enough
            with self._lock:
                late_enough = self._began >= asked - STALE
            if not late_enough:
                self._refresh()
        return self.peek()

    def _refresh(self) -> None:
        with self._lock:
            began, before = self._clock(), self._since
        known = self._count()
        with self._lock:
            now, since = self._clock(), self._since
            self._known, self._began = known, began
            self._since = Counts(since.pending - before.pending, since.waiting - before.waiting)
            self._fresh_until = now + min(STALEST, max(STALE, SHARE * (now - began)))

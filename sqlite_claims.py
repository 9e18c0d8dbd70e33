"""Which messages of an outbox in SQLite are claimed, and which come next. The file knows nothing of it.

The outbox is in order of (due, place). A message that is there, and is not claimed, is in one of two sets:

- it is in `_front`, a sorted list, or
- it comes after `_cursor`, and is read from the file when the front has too few.

Nothing in the front comes after the cursor. Three events keep this so. A commit publishes what it saved, and what
does not come after the cursor goes into the front. A release does the same. A look reads on from the cursor, which
moves. When it finds the end of the outbox, the cursor comes after all that can be, and nothing is read until the front
gets too long for the memory.

A look may read what is committed and not yet published. It passes this over: the cursor is then past it, so publishing
puts it into the front.
"""
from __future__ import annotations

import contextlib
import math
import sqlite3
import sys
import threading
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import replace

from base_repository import Claim, look
from message_model import Batch

__all__ = ["Key", "OutboxClaims"]

Key = tuple[float, float]  # when a message is due, in seconds since 1970, and its place: the order of the outbox

START, END = (-math.inf, 0.0), (math.inf, math.inf)  # before and after every key
AGAIN = 0.1  # seconds until the next look, while a transaction has messages which may be undone
LONGEST_FRONT = 10_000  # keys; one takes 120 bytes
KEYS = "SELECT due, place FROM outbox"
DUE = "SELECT due FROM outbox WHERE place = ?"
# Two terms, because SQLite does not use an index for (due, place) > (?, ?) when the place is the rowid.
AFTER = f"{KEYS} WHERE due = ? AND place > ? UNION ALL {KEYS} WHERE due > ? ORDER BY due, place"


class OutboxClaims:
    """What is claimed, and what can be. Thread-safe."""

    def __init__(self, backlog: int, last: int) -> None:
        """An outbox that holds so many messages, the last of them at this place."""
        self._lock = threading.Lock()  # guards everything below; the file is read for a look under it
        self._cursor: Key = START
        self._front: list[Key] = []
        self._claimed: dict[float, float] = {}  # when it is due, by place
        self._reserved: set[float] = set()  # those of the claimed that a transaction has, which may be undone
        self._backlog, self._published = backlog, last

    @property
    def backlog(self) -> int:
        """How many messages are in the outbox."""
        return self._backlog

    def publish(self, saved: Sequence[Key], left: Sequence[int], leaving: int) -> None:
        """A commit put these into the outbox, in order of their places, and took so many of those at `left` out."""
        with self._lock:
            if saved:
                self._published = int(saved[-1][1])
                self._add(saved)
            self._backlog += len(saved) - leaving
            self._reserved.difference_update(left)
            gone = {place for place in left if self._claimed.pop(place, None) is None}
            if gone and self._front:
                self._front = [key for key in self._front if key[1] not in gone]

    def take(
        self, db: sqlite3.Connection, size: int, now: float, horizon: float, flush: bool
    ) -> tuple[list[Key], Claim[Batch]]:
        """Claims the first messages, if a batch leaves now; else the claim tells when one will."""
        with self._lock:
            self._read_on(db, min(size, sys.maxsize))
            keys = self._front[:size]
            waits = look([due for due, _ in keys], now, size, horizon, self._waiting(), flush)
            if waits is not None:
                if self._reserved:  # nobody tells when they wait again: look again
                    due_in = max(AGAIN, min(self._claimed[place] for place in self._reserved) - now)
                    waits = replace(waits, waiting=self._backlog, due_in=min(waits.due_in, due_in))
                return [], waits
            del self._front[:size]
            self._claimed.update((place, due) for due, place in keys)
            return keys, Claim(waiting=self._waiting())

    def reserve(self, key: Key) -> bool:
        """Claims one message, so that it can be taken out of the outbox; false if it is claimed already.

        To be called in a transaction, in which the message was seen: all commits before it are published.
        """
        due, place = key
        with self._lock:
            if place in self._claimed or place > self._published:
                return False
            self._claimed[place] = due
            self._reserved.add(place)
            index = bisect_left(self._front, key)
            if index < len(self._front) and self._front[index] == key:
                del self._front[index]
            return True

    def release(self, places: Iterable[int]) -> None:
        """Those of the messages that are claimed wait again."""
        with self._lock:
            places = list(places)
            self._reserved.difference_update(places)
            self._add([(self._claimed.pop(place), place) for place in places if place in self._claimed])

    def claimed(self, places: Iterable[int]) -> set[int]:
        """Those of the places whose messages are claimed."""
        with self._lock:
            return {place for place in places if place in self._claimed}

    def start_over(self, db: sqlite3.Connection) -> None:
        """The file has another order now."""
        with self._lock:
            self._cursor, self._front = START, []
            for place in self._claimed:
                self._claimed[place], = db.execute(DUE, (place,)).fetchone() or (self._claimed[place],)

    def _waiting(self) -> int:
        return self._backlog - len(self._claimed)

    def _add(self, keys: Iterable[Key]) -> None:
        """These can be claimed."""
        front = self._front
        for key in keys:
            if key <= self._cursor:
                if not front or key > front[-1]:
                    front.append(key)
                else:
                    insort(front, key)
        if len(front) > LONGEST_FRONT:  # the rest is read again
            del front[LONGEST_FRONT // 2 :]
            self._cursor = front[-1]

    def _read_on(self, db: sqlite3.Connection, size: int) -> None:
        """Reads on until the front has this many keys, or nothing is left in the file."""
        if len(self._front) >= size or self._cursor == END:
            return
        due, place = self._cursor
        with contextlib.closing(db.execute(AFTER, (due, place, due))) as found:
            for key in found:
                self._cursor = key
                if key[1] not in self._claimed and key[1] <= self._published:
                    self._front.append(key)
                    if len(self._front) >= size:
                        return
        self._cursor = END

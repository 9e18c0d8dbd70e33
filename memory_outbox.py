"""The outbox of the repository in memory, in order of due."""
from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

from base_repository import EXPIRE_STEP
from message_model import Entry

__all__ = ["MemoryOutbox"]

SPARE = 1_000  # entries that may be left over before a queue is made anew without them


class MemoryOutbox:
    """The messages in the outbox, and the order in which they are due. Not thread-safe.

    Where lingers are equal, each message is due after those before it, so it is appended to `_sorted`. What is due
    earlier goes to the heap. An entry that has left has no `place` any more; in the queues it is skipped, and now and
    then removed.
    """

    def __init__(self) -> None:
        self.pending = 0  # how many there are
        self.claimed: set[Entry] = set()
        self._places = 0
        self._accepted: dict[float, int] = {}  # how many of them were accepted then, in order
        self._sorted: deque[Entry] = deque()
        self._earlier: list[tuple[float, int, Entry]] = []  # a heap
        # A heap of all that have a `max_age`, each of them once. What is claimed when its time is over leaves it.
        self._expiring: list[tuple[float, int, Entry]] = []
        self._overdue: set[Entry] = set()  # claimed, and not in the heap any more

    @property
    def waiting(self) -> int:
        """How many are in no batch."""
        return self.pending - len(self.claimed)

    @property
    def oldest(self) -> float:
        """When the one that was accepted first was; infinity for none."""
        return next(iter(self._accepted), math.inf)

    def add(self, accepted: Sequence[Entry], now: float) -> None:
        """Messages that are accepted now."""
        in_order, place, never = self._sorted, self._places, math.inf
        last = in_order[-1].due if in_order else -math.inf
        for entry in accepted:
            place += 1
            due = now + entry.linger
            entry.accepted_at, entry.due, entry.place = now, due, place
            if due >= last:
                in_order.append(entry)
                last = due
            else:
                heapq.heappush(self._earlier, (due, place, entry))
            if entry.max_age != never:
                entry.expires_at = now + entry.max_age
                heapq.heappush(self._expiring, (entry.expires_at, place, entry))
        self._places = place
        if accepted:
            self.pending += len(accepted)
            self._accepted[now] = self._accepted.get(now, 0) + len(accepted)

    def hasten(self, max_delay: float) -> None:
        """See `Repository`."""
        waiting = list(filter(self.waits, (*self._sorted, *(each[2] for each in self._earlier))))
        for entry in (*waiting, *self.claimed):
            if entry.default_linger:
                entry.due = min(entry.due, entry.accepted_at + max_delay)
        self._sorted, self._earlier = deque(sorted(waiting, key=lambda entry: (entry.due, entry.place))), []

    def release(self, entry: Entry) -> None:
        """A claimed message waits again."""
        self.claimed.remove(entry)
        heapq.heappush(self._earlier, (entry.due, entry.place, entry))
        if entry in self._overdue:
            self._overdue.remove(entry)
            heapq.heappush(self._expiring, (entry.expires_at, entry.place, entry))

    def remove(self, entries: Sequence[Entry]) -> None:
        """Messages leave the outbox."""
        self.claimed.difference_update(entries)
        self._overdue.difference_update(entries)
        self.pending -= len(entries)
        accepted = self._accepted
        for entry in entries:
            entry.place = 0
            if left := accepted[entry.accepted_at] - 1:
                accepted[entry.accepted_at] = left
            else:
                del accepted[entry.accepted_at]
        self._tidy()

    def waits(self, entry: Entry) -> bool:
        """Whether it is in the outbox and in no batch."""
        return entry.place > 0 and entry not in self.claimed

    def take(self, most: int) -> list[Entry]:
        """The first messages that wait, in order; `claim` them or `put_back` all of them."""
        taken: list[Entry] = []
        in_order, earlier = self._sorted, self._earlier
        while len(taken) < most and (in_order or earlier):
            if earlier and (not in_order or earlier[0][:2] < (in_order[0].due, in_order[0].place)):
                entry = heapq.heappop(earlier)[2]
            else:
                entry = in_order.popleft()
            if entry.place:  # what is claimed is in neither
                taken.append(entry)
        return taken

    def put_back(self, taken: Sequence[Entry]) -> None:
        """What `take` returned. It comes before everything else, so `_sorted` stays sorted."""
        self._sorted.extendleft(reversed(taken))

    def expired(self, now: float) -> tuple[list[Entry], float]:
        """The first messages that wait and are past their expiry, and when the next one is. The caller removes them."""
        found: list[Entry] = []
        expiring = self._expiring
        while expiring and len(found) < EXPIRE_STEP and (expiring[0][0] <= now or not expiring[0][2].place):
            entry = heapq.heappop(expiring)[2]
            if entry in self.claimed:
                self._overdue.add(entry)
            elif entry.place:
                found.append(entry)
        return found, expiring[0][0] if expiring else math.inf

    def _tidy(self) -> None:
        """Removes what has left, once it is more than half: it would keep the texts of cancelled messages."""
        most = 2 * self.waiting + SPARE
        if len(self._sorted) + len(self._earlier) > most:
            self._sorted = deque(filter(self.waits, self._sorted))
            self._earlier = [each for each in self._earlier if self.waits(each[2])]
            heapq.heapify(self._earlier)
        if len(self._expiring) > 2 * self.pending + SPARE:
            self._expiring = [each for each in self._expiring if each[2].place]
            heapq.heapify(self._expiring)

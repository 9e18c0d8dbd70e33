"""The changes that the shop has not been told of, in memory."""
from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from batch_outbox import Claim, look
from change_outbox import GATHER, Change, ChangeBody, ChangeOutbox
from message_model import MessageStatus, Reason

__all__ = ["MemoryChanges"]


class MemoryChanges(ChangeOutbox):
    """The outbox of changes of an `InMemoryRepository`; nothing blocks. A restart loses it."""

    def __init__(
        self, lock: threading.Lock, retention: float, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self._lock = lock  # the repository's; guards everything below
        self._retention, self._clock, self._wall_clock = retention or math.inf, clock, wall_clock
        self._updates: dict[str, MessageStatus | Reason] = {}  # the newest of each message that is in `_order`
        self._order: deque[tuple[float, str]] = deque()  # when each of these messages first changed
        self._body: ChangeBody | None = None  # made and not handed over
        self._body_since = 0.0  # when the first of its messages changed
        self._under_way = False  # whether the body is claimed

    def record(self, ids: Sequence[str], update: MessageStatus | Reason, now: float) -> None:
        """These messages changed. The caller holds the repository's lock."""
        self._order.extend([(now, message_id) for message_id in ids if message_id not in self._updates])
        self._updates.update(dict.fromkeys(ids, update))

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[ChangeBody]:
        """See `ChangeOutbox`."""
        with self._lock:
            if self._under_way:
                return Claim()
            if self._body is None:
                now, order = self._clock(), self._order
                while order and order[0][0] <= now - self._retention:
                    del self._updates[order.popleft()[1]]
                dues = [since + GATHER for since, _ in islice(order, size)]
                waits = look(dues, now, size, horizon, len(order), flush)
                if waits is not None:
                    return waits
                taken = [order.popleft() for _ in dues]
                changes = [Change.of(message_id, self._updates.pop(message_id)) for _, message_id in taken]
                self._body = ChangeBody.made(changes, self._wall_clock(), taken[-1][0] + self._retention)
                self._body_since = taken[0][0]
            self._under_way = True
            return Claim(self._body, len(self._order))

    def handed_over(self, body: ChangeBody) -> None:
        """See `ChangeOutbox`."""
        with self._lock:
            if body == self._body:
                self._body, self._under_way = None, False

    def release(self, body: ChangeBody, /) -> None:
        """See `ChangeOutbox`."""
        with self._lock:
            if body == self._body:
                self._under_way = False

    def pending(self) -> tuple[int, float]:
        """See `ChangeOutbox`."""
        with self._lock:
            since = [self._body_since] if self._body else [since for since, _ in islice(self._order, 1)]
            number = len(self._order) + (len(self._body) if self._body else 0)
            return number, self._clock() - since[0] if since else 0.0

"""The repository in memory: nothing blocks, and a restart loses it."""
from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from base_repository import FORGET_STEP, RETENTION, Claim, Repository, time_to_claim
from message_model import (
    STATUS_OF, TRANSITIONS, Batch, DuplicateMessageError, Entry, MessageStatus, OverloadedError, Reason, SmsProxyError,
    check_transition,
)  # fmt: skip

__all__ = ["InMemoryRepository"]


class InMemoryRepository(Repository):
    """A repository in dicts; a restart loses it. Nothing blocks.

    A message is forgotten late by at most a thousandth of `retention`.
    """

    def __init__(self, retention: float = RETENTION, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retention, self._clock = retention, clock
        self._lock = threading.Lock()  # guards everything below
        # Status, reason and time to forget. Messages that changed to the same status within retention / 1000
        # share one tuple: a tuple for each would cost more memory than its status does.
        self._records: dict[str, tuple[MessageStatus, Reason | None, float]] = {}
        self._fingerprints: dict[str, bytes] = {}
        self._waiting: deque[Entry] = deque()
        self._claimed: dict[str, Entry] = {}
        self._slices: deque[tuple[float, list[str]]] = deque()  # time to forget, IDs changed in one slice of time
        self._slice_end = -math.inf
        self._shared: dict[MessageStatus | Reason, tuple[MessageStatus, Reason | None, float]] = {}

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`."""
        with self._lock:
            now, limit = self._clock(), math.inf if max_pending is None else max_pending
            errors: list[Exception | None] = []
            for entry in entries:
                message_id = entry.message.message_id
                record = self._records.get(message_id)
                if record is not None and record[2] > now:
                    errors.append(DuplicateMessageError(message_id, self._fingerprints.get(message_id)))
                elif len(self._waiting) + len(self._claimed) >= limit:
                    errors.append(OverloadedError("too many messages are pending"))
                else:
                    entry.accepted_at = now
                    self._records[message_id] = _IN_OUTBOX
                    self._waiting.append(entry)
                    if entry.fingerprint is not None:
                        self._fingerprints[message_id] = entry.fingerprint
                    elif record is not None:  # it is due and not forgotten yet
                        self._fingerprints.pop(message_id, None)
                    errors.append(None)
            return errors

    def get(self, message_id: str) -> MessageStatus:
        """See `Repository`."""
        record = self._records.get(message_id)  # a dict look-up is atomic
        return MessageStatus.NOT_FOUND if record is None or record[2] <= self._clock() else record[0]

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        record = self._records.get(message_id, _IN_OUTBOX)
        return record[1] if record[2] > self._clock() else None

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`."""
        failures: dict[str, Exception] = {}
        with self._lock:
            now = self._clock()
            for message_id, update in updates.items():
                record = self._records.get(message_id)
                current = MessageStatus.NOT_FOUND if record is None or record[2] <= now else record[0]
                try:
                    if STATUS_OF[update] not in TRANSITIONS[current]:
                        check_transition(message_id, current, STATUS_OF[update])
                    if record is _IN_OUTBOX:
                        self._leave_outbox(message_id)
                    self._change(message_id, update, now)
                except SmsProxyError as error:
                    failures[message_id] = error
        return failures

    def claim(self, size: int, max_delay: float | None) -> Claim:
        """See `Repository`."""
        with self._lock:
            waiting = len(self._waiting)
            age = self._clock() - self._waiting[0].accepted_at if waiting else 0.0
            wait = time_to_claim(waiting, size, age, max_delay)
            if wait != 0.0:
                return Claim(None, waiting, wait)
            taken = tuple([self._waiting.popleft() for _ in range(min(size, waiting))])
            self._claimed.update((entry.message.message_id, entry) for entry in taken)
            return Claim(Batch(taken), waiting - len(taken))

    def release(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            for entry in reversed(batch.entries):
                if self._claimed.pop(entry.message.message_id, None):  # otherwise it was reported on meanwhile
                    self._waiting.appendleft(entry)

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            now = self._clock()
            for message_id in batch.ids:
                if self._records.get(message_id) is _IN_OUTBOX:
                    self._leave_outbox(message_id)
                    self._change(message_id, MessageStatus.ACCEPTED, now)

    def backlog(self) -> int:
        """See `Repository`."""
        return len(self._waiting) + len(self._claimed)

    def oldest(self) -> float | None:
        """See `Repository`."""
        with self._lock:
            entries = [*self._claimed.values(), *itertools.islice(self._waiting, 1)]
            return self._clock() - min(entry.accepted_at for entry in entries) if entries else None

    def forget(self) -> float | None:
        """See `Repository`."""
        with self._lock:
            now, slices = self._clock(), self._slices
            for _ in range(FORGET_STEP):
                if not slices or slices[0][0] > now:
                    break
                if not slices[0][1]:
                    slices.popleft()
                    continue
                message_id = slices[0][1].pop()
                record = self._records.get(message_id)
                if record is not None and record[2] <= now:  # otherwise it changed again later
                    del self._records[message_id]
                    self._fingerprints.pop(message_id, None)
            if not self._retention:
                return None
            return max(0.0, slices[0][0] - now) if slices else self._retention

    def _leave_outbox(self, message_id: str) -> None:
        if self._claimed.pop(message_id, None) is None:  # nobody sent it, so this is rare and may search
            self._waiting.remove(next(entry for entry in self._waiting if entry.message.message_id == message_id))

    def _change(self, message_id: str, update: MessageStatus | Reason, now: float) -> None:
        """Records a message that is not in the outbox any more."""
        if now >= self._slice_end:
            self._slice_end = now + self._retention / 1000
            self._shared = {}
            if self._retention:
                self._slices.append((self._slice_end + self._retention, []))
        record = self._shared.get(update)
        if record is None:
            forget_at = self._slices[-1][0] if self._retention else math.inf
            record = (STATUS_OF[update], update if isinstance(update, Reason) else None, forget_at)
            self._shared[update] = record
        if self._retention and self._records[message_id][2] != record[2]:
            self._slices[-1][1].append(message_id)
        self._records[message_id] = record


_IN_OUTBOX = (MessageStatus.ACCEPTED, None, math.inf)

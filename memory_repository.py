"""The repository in memory: nothing blocks, and a restart loses it."""
from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from base_repository import FORGET_STEP, RETENTION, Ages, Cancelled, Claim, Repository, look
from memory_changes import MemoryChanges
from memory_outbox import MemoryOutbox
from message_model import (
    STATUS_OF,
    TRANSITIONS,
    Batch,
    DuplicateMessageError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    refusal,
)  # fmt: skip

__all__ = ["InMemoryRepository"]

Record = tuple[MessageStatus, Reason | None, float]  # the last is the time to forget it


class InMemoryRepository(Repository):
    """A repository in dicts; a restart loses it. Nothing blocks.

    A message is forgotten late by at most a thousandth of `retention`.
    """

    def __init__(
        self, retention: float = RETENTION, *, clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._retention, self._clock, self._wall_clock = retention, clock, wall_clock
        self._lock = threading.Lock()  # guards everything below
        # Of a message in the outbox its entry. Others that changed to the same status within retention / 1000 share one
        # record: one for each would cost more memory than its status does.
        self._records: dict[str, Entry | Record] = {}
        self._fingerprints: dict[str, bytes] = {}
        self._outbox = MemoryOutbox()
        self._slices: deque[tuple[float, list[str]]] = deque()  # time to forget, IDs changed in one slice of time
        self._slice_end = -math.inf
        self._shared: dict[MessageStatus | Reason, Record] = {}
        self._changes: MemoryChanges | None = None

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`."""
        with self._lock:
            now, records = self._clock(), self._records
            prints = bool(self._fingerprints)  # some may be left of messages whose time is over
            room = len(entries) if max_pending is None else max_pending - self._outbox.pending
            errors: list[Exception | None] = [None] * len(entries)
            for number, entry in enumerate(entries):
                message_id = entry.message.message_id
                record = records.get(message_id)
                if record is not None and _forget_at(record) > now:
                    errors[number] = DuplicateMessageError(message_id, self._fingerprints.get(message_id))
                elif room <= 0:
                    errors[number] = OverloadedError("too many messages are pending")
                else:
                    room -= 1
                    records[message_id] = entry
                    if prints or entry.fingerprint is not None:
                        self._keep_fingerprint(entry, message_id)
            if any(errors):
                entries = [entry for entry, error in zip(entries, errors, strict=True) if error is None]
            self._outbox.add(entries, now)
            return errors

    def save_together(self, entries: Sequence[Entry], max_pending: int | None = None) -> Exception | None:
        """See `Repository`."""
        with self._lock:
            now, new = self._clock(), dict[str, Entry]()
            for entry in entries:
                message_id = entry.message.message_id
                record = self._records.get(message_id)
                if record is not None and _forget_at(record) > now:
                    return DuplicateMessageError(message_id, self._fingerprints.get(message_id))
                if message_id in new:
                    return DuplicateMessageError(message_id, new[message_id].fingerprint)
                new[message_id] = entry
            if max_pending is not None and self._outbox.pending + len(new) > max_pending:
                return OverloadedError("too many messages are pending")
            for message_id, entry in new.items():
                self._records[message_id] = entry
                self._keep_fingerprint(entry, message_id)
            self._outbox.add(entries, now)
            return None

    def get(self, message_id: str) -> MessageStatus:
        """See `Repository`."""
        return _status(self._records.get(message_id), self._clock())  # a dict look-up is atomic

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        record = self._records.get(message_id)
        return None if record is None or isinstance(record, Entry) or record[2] <= self._clock() else record[1]

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`."""
        failures: dict[str, Exception] = {}
        changed: dict[tuple[MessageStatus | Reason, bool], list[str]] = {}
        left: list[Entry] = []
        with self._lock:
            now, records, allowed = self._clock(), self._records, False
            forget_at = self._open_slice(now)
            last_record: object = self  # and update; most have the same, and so the same answer
            last_update, current = None, MessageStatus.NOT_FOUND
            for message_id, update in updates.items():
                record = records.get(message_id)
                if record is not last_record or update is not last_update:
                    last_record, last_update, current = record, update, _status(record, now)
                    allowed = STATUS_OF[update] in TRANSITIONS[current]
                    if isinstance(update, Reason):
                        allowed = isinstance(record, Entry)
                    if allowed:
                        first = True
                        if isinstance(record, Entry):
                            left.append(record)
                        elif record is not None:
                            first = record[2] != forget_at
                        ids = changed.setdefault((update, first), [])
                if allowed:
                    ids.append(message_id)
                else:
                    failures[message_id] = refusal(message_id, current, update)
            self._outbox.remove(left)
            for (update, first), ids in changed.items():
                self._change(ids, update, now, first)
        return failures

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
        """See `Repository`."""
        with self._lock:
            outbox = self._outbox
            taken = outbox.take(size)
            dues = [entry.due for entry in taken]
            found = look(dues, self._clock(), size, horizon, outbox.waiting, flush)
            if found is not None:
                outbox.put_back(taken)
                return found
            outbox.claimed.update(taken)
            return Claim(Batch(tuple(taken)), outbox.waiting)

    def release(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            for entry in filter(self._outbox.claimed.__contains__, batch.entries):
                self._outbox.release(entry)

    def unsent(self, batch: Batch) -> Batch:
        """See `Repository`."""
        with self._lock:
            claimed = self._outbox.claimed
            return batch if claimed.issuperset(batch.entries) else batch.only(claimed.__contains__)

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            self._leave([entry for entry in batch.entries if entry.place], MessageStatus.ACCEPTED)

    def cancel(self, message_id: str) -> Cancelled | None:
        """See `Repository`."""
        with self._lock:
            entry = self._records.get(message_id)
            if isinstance(entry, Entry) and self._outbox.waits(entry):
                self._leave([entry], Reason.CANCELLED)
                return Cancelled.NOW
        return Cancelled.BEFORE if self.reason(message_id) is Reason.CANCELLED else None

    def expire(self) -> tuple[list[str], float]:
        """See `Repository`."""
        with self._lock:
            now = self._clock()
            expired, following = self._outbox.expired(now)
            return self._leave(expired, Reason.EXPIRED), max(0.0, following - now)

    def hasten(self, max_delay: float) -> None:
        """See `Repository`."""
        with self._lock:
            self._outbox.hasten(max_delay)

    def changes(self) -> MemoryChanges:
        """See `Repository`."""
        self._changes = MemoryChanges(self._lock, self._retention, self._clock, self._wall_clock)
        return self._changes

    def backlog(self) -> int:
        """See `Repository`."""
        return self._outbox.pending

    def ages(self) -> Ages:
        """See `Repository`."""
        with self._lock:
            outbox, now = self._outbox, self._clock()
            if not outbox.pending:
                return Ages()
            first = outbox.take(1)
            outbox.put_back(first)
            due = min(entry.due for entry in (*first, *outbox.claimed))
            return Ages(now - outbox.oldest, max(0.0, now - due))

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
                if record is not None and _forget_at(record) <= now:  # otherwise it changed again later
                    del self._records[message_id]
                    self._fingerprints.pop(message_id, None)
            if not self._retention:
                return None
            return max(0.0, slices[0][0] - now) if slices else self._retention

    def _keep_fingerprint(self, entry: Entry, message_id: str) -> None:
        if entry.fingerprint is not None:
            self._fingerprints[message_id] = entry.fingerprint
        else:  # one may be left of a message whose time is over and that is not forgotten yet
            self._fingerprints.pop(message_id, None)

    def _leave(self, entries: Sequence[Entry], update: MessageStatus | Reason) -> list[str]:
        """Messages leave the outbox with this change; returns their IDs."""
        ids = [entry.message.message_id for entry in entries]
        self._outbox.remove(entries)
        now = self._clock()
        self._open_slice(now)
        self._change(ids, update, now, True)
        return ids

    def _open_slice(self, now: float) -> float:
        """Begins a slice of time if the last is over; returns when what changes in it is forgotten."""
        if now >= self._slice_end:
            self._slice_end, self._shared = now + self._retention / 1000, {}
            if self._retention:
                self._slices.append((self._slice_end + self._retention, []))
        return self._slices[-1][0] if self._retention else math.inf

    def _change(self, ids: Sequence[str], update: MessageStatus | Reason, now: float, first: bool) -> None:
        """Records messages that are not in the outbox any more; `first`: since this slice of time began."""
        record = self._shared.get(update)
        if record is None:
            forget_at = self._slices[-1][0] if self._retention else math.inf
            record = (STATUS_OF[update], update if isinstance(update, Reason) else None, forget_at)
            self._shared[update] = record
        if first and self._retention:
            self._slices[-1][1].extend(ids)
        records = self._records
        for message_id in ids:
            records[message_id] = record
        if self._changes is not None and record[0] is not MessageStatus.ACCEPTED:
            self._changes.record(ids, update, now)


def _status(record: Entry | Record | None, now: float) -> MessageStatus:
    if isinstance(record, Entry):
        return MessageStatus.ACCEPTED
    return MessageStatus.NOT_FOUND if record is None or record[2] <= now else record[0]


def _forget_at(record: Entry | Record) -> float:
    """What is in the outbox is not forgotten."""
    return math.inf if isinstance(record, Entry) else record[2]

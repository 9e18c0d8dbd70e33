"""The repository in memory: nothing blocks, and a restart loses it."""
from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from base_repository import EXPIRE_STEP, FORGET_STEP, RETENTION, Ages, Claim, Repository, look
from memory_changes import MemoryChanges
from message_model import (
    STATUS_OF,
    TRANSITIONS,
    Batch,
    DuplicateMessageError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    SmsProxyError,
    check_transition,
)  # fmt: skip

__all__ = ["InMemoryRepository"]

SPARE = 1_000  # entries that may be left over before a queue is made anew without them

Record = tuple[MessageStatus, Reason | None, float]  # the last is the time to forget it


class _Outbox:
    """The messages in the outbox, and the order in which they are due. Not thread-safe.

    Where lingers are equal, each message is due after those before it, so it is appended to `_sorted`. What is due
    earlier goes to the heap. An entry that has left has no `place` any more; in the queues it is skipped, and now and
    then removed.
    """

    def __init__(self) -> None:
        self.pending = 0  # how many there are
        self.claimed: set[Entry] = set()
        self._places = 0
        self._accepted: deque[Entry] = deque()  # all of them, in order of acceptance
        self._sorted: deque[Entry] = deque()
        self._earlier: list[tuple[float, int, Entry]] = []  # a heap
        self._expiring: list[tuple[float, int, Entry]] = []  # a heap of what waits and has a `max_age`

    @property
    def waiting(self) -> int:
        """How many are in no batch."""
        return self.pending - len(self.claimed)

    def add(self, accepted: Sequence[Entry], now: float) -> None:
        """Messages that are accepted now."""
        in_order, place = self._sorted, self._places
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
            if entry.max_age != math.inf:
                entry.expires_at = now + entry.max_age
                heapq.heappush(self._expiring, (entry.expires_at, place, entry))
        self._accepted.extend(accepted)
        self._places = place
        self.pending += len(accepted)

    def hasten(self, max_delay: float) -> None:
        """See `Repository`."""
        waiting = list(filter(self.waits, self._accepted))
        for entry in (*waiting, *self.claimed):
            if entry.default_linger:
                entry.due = min(entry.due, entry.accepted_at + max_delay)
        self._sorted, self._earlier = deque(sorted(waiting, key=lambda entry: (entry.due, entry.place))), []

    def release(self, entry: Entry) -> None:
        """A claimed message waits again."""
        self.claimed.remove(entry)
        heapq.heappush(self._earlier, (entry.due, entry.place, entry))
        if entry.expires_at != math.inf:
            heapq.heappush(self._expiring, (entry.expires_at, entry.place, entry))

    def remove(self, entries: Sequence[Entry]) -> None:
        """Messages leave the outbox."""
        self.claimed.difference_update(entries)
        for entry in entries:
            entry.place = 0
        self.pending -= len(entries)
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
        """The first messages that wait and are past their expiry, and when the next one is."""
        found: dict[Entry, None] = {}  # what was released is in the heap twice
        expiring = self._expiring
        while expiring and (len(found) < EXPIRE_STEP) and (expiring[0][0] <= now or not self.waits(expiring[0][2])):
            entry = heapq.heappop(expiring)[2]
            if self.waits(entry):
                found[entry] = None
        return list(found), expiring[0][0] if expiring else math.inf

    def oldest(self) -> Entry | None:
        """The one that was accepted first."""
        return self._accepted[0] if self._accepted else None

    def _tidy(self) -> None:
        """Removes what has left, once it is more than half: it would keep the texts of messages."""
        accepted, most = self._accepted, 2 * self.waiting + SPARE
        while accepted and not accepted[0].place:
            accepted.popleft()
        if len(accepted) > 2 * self.pending + SPARE:
            self._accepted = deque([entry for entry in accepted if entry.place])
        if len(self._sorted) + len(self._earlier) > most:
            self._sorted = deque(filter(self.waits, self._sorted))
            self._earlier = [each for each in self._earlier if self.waits(each[2])]
            heapq.heapify(self._earlier)
        if len(self._expiring) > most:
            self._expiring[:] = [each for each in self._expiring if self.waits(each[2])]
            heapq.heapify(self._expiring)


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
        self._outbox = _Outbox()
        self._slices: deque[tuple[float, list[str]]] = deque()  # time to forget, IDs changed in one slice of time
        self._slice_end = -math.inf
        self._shared: dict[MessageStatus | Reason, Record] = {}
        self._changes: MemoryChanges | None = None

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`."""
        with self._lock:
            now, records, new = self._clock(), self._records, list[Entry]()
            room = math.inf if max_pending is None else max_pending - self._outbox.pending
            errors: list[Exception | None] = []
            for entry in entries:
                message_id = entry.message.message_id
                record = records.get(message_id)
                if record is not None and _forget_at(record) > now:
                    errors.append(DuplicateMessageError(message_id, self._fingerprints.get(message_id)))
                elif len(new) >= room:
                    errors.append(OverloadedError("too many messages are pending"))
                else:
                    records[message_id] = entry
                    if entry.fingerprint is not None or self._fingerprints:
                        self._keep_fingerprint(entry, message_id)
                    new.append(entry)
                    errors.append(None)
            self._outbox.add(new, now)
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
        record = self._records.get(message_id)  # a dict look-up is atomic
        if isinstance(record, tuple):
            return record[0] if record[2] > self._clock() else MessageStatus.NOT_FOUND
        return MessageStatus.NOT_FOUND if record is None else MessageStatus.ACCEPTED

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        record = self._records.get(message_id)
        return None if record is None or isinstance(record, Entry) or record[2] <= self._clock() else record[1]

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`."""
        failures: dict[str, Exception] = {}
        changed: dict[MessageStatus | Reason, list[str]] = {}
        left: list[Entry] = []
        with self._lock:
            now, records, allowed = self._clock(), self._records, False
            last_record: object = self  # and update; most have the same, and so the same answer
            last_update, current = None, MessageStatus.NOT_FOUND
            for message_id, update in updates.items():
                record = records.get(message_id)
                if record is not last_record or update is not last_update:
                    last_record, last_update, current = record, update, self._status(record, now)
                    if allowed := STATUS_OF[update] in TRANSITIONS[current]:
                        ids = changed.setdefault(update, [])
                        if isinstance(record, Entry):
                            left.append(record)
                if allowed:
                    ids.append(message_id)
                    continue
                try:
                    check_transition(message_id, current, STATUS_OF[update])
                except SmsProxyError as error:
                    failures[message_id] = error
            self._outbox.remove(left)
            for update, ids in changed.items():
                self._change(ids, update, now)
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

    def cancel(self, message_id: str) -> bool:
        """See `Repository`."""
        with self._lock:
            entry = self._records.get(message_id)
            if isinstance(entry, Entry) and self._outbox.waits(entry):
                self._leave([entry], Reason.CANCELLED)
        return self.reason(message_id) is Reason.CANCELLED

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
            oldest = outbox.oldest()
            if oldest is None:
                return Ages()
            first = outbox.take(1)
            outbox.put_back(first)
            due = min(entry.due for entry in (*first, *outbox.claimed))
            return Ages(now - oldest.accepted_at, max(0.0, now - due))

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

    @staticmethod
    def _status(record: Entry | Record | None, now: float) -> MessageStatus:
        if isinstance(record, Entry):
            return MessageStatus.ACCEPTED
        return MessageStatus.NOT_FOUND if record is None or record[2] <= now else record[0]

    def _keep_fingerprint(self, entry: Entry, message_id: str) -> None:
        if entry.fingerprint is not None:
            self._fingerprints[message_id] = entry.fingerprint
        else:  # one may be left of a message whose time is over and that is not forgotten yet
            self._fingerprints.pop(message_id, None)

    def _leave(self, entries: Sequence[Entry], update: MessageStatus | Reason) -> list[str]:
        """Messages leave the outbox with this change; returns their IDs."""
        ids = [entry.message.message_id for entry in entries]
        self._outbox.remove(entries)
        self._change(ids, update, self._clock())
        return ids

    def _change(self, ids: Sequence[str], update: MessageStatus | Reason, now: float) -> None:
        """Records messages that are not in the outbox any more."""
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
        records = self._records
        if self._retention:
            found = map(records.__getitem__, ids)
            self._slices[-1][1].extend([each for each, before in zip(ids, found, strict=True)
                                        if isinstance(before, Entry) or before[2] != record[2]])  # fmt: skip
        for message_id in ids:
            records[message_id] = record
        if self._changes is not None and record[0] is not MessageStatus.ACCEPTED:
            self._changes.record(ids, update, now)


def _forget_at(record: Entry | Record) -> float:
    """What is in the outbox is not forgotten."""
    return math.inf if isinstance(record, Entry) else record[2]

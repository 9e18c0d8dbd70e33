"""The repository in memory: nothing blocks, and a restart loses it."""
from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

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
    earlier goes to the heap. Both may hold entries that have left; they are skipped, and now and then removed.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}  # by ID, in order of acceptance
        self.claimed: dict[str, Entry] = {}
        self._places = 0
        self._sorted: deque[Entry] = deque()
        self._earlier: list[tuple[float, int, Entry]] = []  # a heap
        self._expiring: list[tuple[float, int, Entry]] = []  # a heap of what waits and has a `max_age`

    @property
    def waiting(self) -> int:
        """How many are in no batch."""
        return len(self.entries) - len(self.claimed)

    def add(self, accepted: Iterable[Entry], now: float) -> None:
        """Messages that are accepted now."""
        entries, in_order, place = self.entries, self._sorted, self._places
        last = in_order[-1].due if in_order else -math.inf
        for entry in accepted:
            place += 1
            due = now + entry.linger
            entry.accepted_at, entry.due, entry.place = now, due, place
            entries[entry.message.message_id] = entry
            if due >= last:
                in_order.append(entry)
                last = due
            else:
                heapq.heappush(self._earlier, (due, place, entry))
            if entry.max_age != math.inf:
                entry.expires_at = now + entry.max_age
                heapq.heappush(self._expiring, (entry.expires_at, place, entry))
        self._places = place

    def hasten(self, max_delay: float) -> None:
        """See `Repository`."""
        for entry in self.entries.values():
            if entry.default_linger:
                entry.due = min(entry.due, entry.accepted_at + max_delay)
        waiting = filter(self.waits, self.entries.values())
        self._sorted, self._earlier = deque(sorted(waiting, key=lambda entry: (entry.due, entry.place))), []

    def release(self, entry: Entry) -> None:
        """A claimed message waits again."""
        del self.claimed[entry.message.message_id]
        heapq.heappush(self._earlier, (entry.due, entry.place, entry))
        if entry.expires_at != math.inf:
            heapq.heappush(self._expiring, (entry.expires_at, entry.place, entry))

    def remove(self, ids: Iterable[str]) -> None:
        """Messages leave the outbox."""
        entries, claimed = self.entries, self.claimed
        for message_id in ids:
            del entries[message_id]
            claimed.pop(message_id, None)
        self._tidy()

    def waits(self, entry: Entry) -> bool:
        """Whether this very entry is in the outbox and in no batch."""
        message_id = entry.message.message_id
        return self.entries.get(message_id) is entry and message_id not in self.claimed

    def take(self, most: int) -> list[Entry]:
        """The first messages that wait, in order; `claim` them or `put_back` all of them."""
        taken: list[Entry] = []
        in_order, earlier, entries, claimed = self._sorted, self._earlier, self.entries, self.claimed
        while len(taken) < most and (in_order or earlier):
            if earlier and (not in_order or earlier[0][:2] < (in_order[0].due, in_order[0].place)):
                entry = heapq.heappop(earlier)[2]
            else:
                entry = in_order.popleft()
            message_id = entry.message.message_id
            if entries.get(message_id) is entry and message_id not in claimed:  # `waits`, without the call
                taken.append(entry)
        return taken

    def put_back(self, taken: Sequence[Entry]) -> None:
        """What `take` returned. It comes before everything else, so `_sorted` stays sorted."""
        self._sorted.extendleft(reversed(taken))

    def claim(self, taken: Sequence[Entry]) -> None:
        """What `take` returned is in a batch."""
        self.claimed.update({entry.message.message_id: entry for entry in taken})

    def expired(self, now: float) -> tuple[list[str], float]:
        """The first messages that wait and are past their expiry, and when the next one is."""
        found: dict[str, None] = {}  # what was released is in the heap twice
        expiring = self._expiring
        while expiring and (len(found) < EXPIRE_STEP) and (expiring[0][0] <= now or not self.waits(expiring[0][2])):
            entry = heapq.heappop(expiring)[2]
            if self.waits(entry):
                found[entry.message.message_id] = None
        return list(found), expiring[0][0] if expiring else math.inf

    def _tidy(self) -> None:
        """Removes what has left, once it is more than half: it would keep the texts of cancelled messages."""
        if len(self._sorted) + len(self._earlier) > 2 * self.waiting + SPARE:
            self._sorted = deque(filter(self.waits, self._sorted))
            self._earlier = [each for each in self._earlier if self.waits(each[2])]
            heapq.heapify(self._earlier)
        if len(self._expiring) > 2 * self.waiting + SPARE:
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
        # Messages that changed to the same status within retention / 1000 share one record: one for each would cost
        # more memory than its status does.
        self._records: dict[str, Record] = {}
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
            room = math.inf if max_pending is None else max_pending - len(self._outbox.entries)
            errors: list[Exception | None] = []
            for entry in entries:
                message_id = entry.message.message_id
                record = records.get(message_id)
                if record is not None and record[2] > now:
                    errors.append(DuplicateMessageError(message_id, self._fingerprints.get(message_id)))
                elif len(new) >= room:
                    errors.append(OverloadedError("too many messages are pending"))
                else:
                    records[message_id] = _IN_OUTBOX
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
                if record is not None and record[2] > now:
                    return DuplicateMessageError(message_id, self._fingerprints.get(message_id))
                if message_id in new:
                    return DuplicateMessageError(message_id, new[message_id].fingerprint)
                new[message_id] = entry
            if max_pending is not None and len(self._outbox.entries) + len(new) > max_pending:
                return OverloadedError("too many messages are pending")
            for message_id, entry in new.items():
                self._records[message_id] = _IN_OUTBOX
                self._keep_fingerprint(entry, message_id)
            self._outbox.add(new.values(), now)
            return None

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
        changed: dict[MessageStatus | Reason, list[str]] = {}
        with self._lock:
            now, records = self._clock(), self._records
            for message_id, update in updates.items():
                record = records.get(message_id)
                current = MessageStatus.NOT_FOUND if record is None or record[2] <= now else record[0]
                if STATUS_OF[update] in TRANSITIONS[current]:
                    changed.setdefault(update, []).append(message_id)
                    continue
                try:
                    check_transition(message_id, current, STATUS_OF[update])
                except SmsProxyError as error:
                    failures[message_id] = error
            for update, ids in changed.items():
                self._outbox.remove(message_id for message_id in ids if records[message_id] is _IN_OUTBOX)
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
            outbox.claim(taken)
            return Claim(Batch(tuple(taken)), outbox.waiting)

    def release(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            for entry in self._unsent(batch):
                self._outbox.release(entry)

    def unsent(self, batch: Batch) -> Batch:
        """See `Repository`."""
        with self._lock:
            left = self._unsent(batch)
        return batch if len(left) == len(batch) else batch.only(left.__contains__)

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            ids = [message_id for message_id in batch.ids if self._records.get(message_id) is _IN_OUTBOX]
            self._outbox.remove(ids)
            self._change(ids, MessageStatus.ACCEPTED, self._clock())

    def cancel(self, message_id: str) -> bool:
        """See `Repository`."""
        with self._lock:
            now, entry = self._clock(), self._outbox.entries.get(message_id)
            if entry is not None and self._outbox.waits(entry):
                self._outbox.remove([message_id])
                self._change([message_id], Reason.CANCELLED, now)
        return self.reason(message_id) is Reason.CANCELLED

    def expire(self) -> tuple[list[str], float]:
        """See `Repository`."""
        with self._lock:
            now = self._clock()
            expired, following = self._outbox.expired(now)
            self._outbox.remove(expired)
            self._change(expired, Reason.EXPIRED, now)
            return expired, max(0.0, following - now)

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
        return len(self._outbox.entries)

    def ages(self) -> Ages:
        """See `Repository`."""
        with self._lock:
            outbox, now = self._outbox, self._clock()
            if not outbox.entries:
                return Ages()
            first = outbox.take(1)
            outbox.put_back(first)
            due = min(entry.due for entry in (*first, *outbox.claimed.values()))
            return Ages(now - next(iter(outbox.entries.values())).accepted_at, max(0.0, now - due))

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

    def _keep_fingerprint(self, entry: Entry, message_id: str) -> None:
        if entry.fingerprint is not None:
            self._fingerprints[message_id] = entry.fingerprint
        else:  # one may be left of a message whose time is over and that is not forgotten yet
            self._fingerprints.pop(message_id, None)

    def _unsent(self, batch: Batch) -> list[Entry]:
        """What of the batch is still claimed; an entry is compared as an object."""
        claimed = self._outbox.claimed
        return [entry for entry in batch.entries if claimed.get(entry.message.message_id) is entry]

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
            self._slices[-1][1].extend([each for each in ids if records[each][2] != record[2]])
        for message_id in ids:
            records[message_id] = record
        if self._changes is not None and record[0] is not MessageStatus.ACCEPTED:
            self._changes.record(ids, update, now)


_IN_OUTBOX: Record = (MessageStatus.ACCEPTED, None, math.inf)

"""The shared repository: statuses and one outbox in PostgreSQL, for any number of processes on any machines.

What is decided about leases is written down in README.md, `leases.py` and `schema.py`.
"""
from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from base_repository import EXPIRE_STEP, FORGET_STEP, RETENTION, Ages, Cancelled, Claim, Repository
from change_outbox import ChangeOutbox
from fastsmsing import Message
from message_model import (
    STATUS_OF,
    Batch,
    Entry,
    MessageStatus,
    Reason,
    RepositoryUnavailableError,
    refusal,
)  # fmt: skip

from .backlog import Backlog, Counts
from .changes import PostgresChanges
from .connections import Database
from .leases import Lease, Leases
from .saving import Saving, storable
from .schema import prepare
from .statements import (
    AGES,
    CANCEL,
    CHECK,
    CLAIM,
    COUNT,
    EXPIRE,
    FORGET,
    HANDED_OVER,
    HASTEN,
    IN_OUTBOX,
    RELEASE,
    SIZE,
    STATUS,
    UNSENT,
    UPDATE,
)  # fmt: skip

__all__ = ["PostgresRepository"]

CONNECTIONS = 8  # of one process, besides the one that renews leases: few, since a server has some hundred
CLOSE_TIMEOUT = 1.0  # seconds for what is still worth doing at the end
CHECK_TIMEOUT = 2.0  # seconds
LARGEST = 1_000_000  # messages in one batch; bounds what one claim can read
FORGET_PAUSE = 0.1  # seconds, shortest time between two looks for what is to be forgotten, when the last found little
UNSENT_TIMEOUT = 1.0  # seconds; before each request, which goes on without an answer
RELEASE_TIMEOUT = 1.0  # seconds; a stop waits for it, and what is not released waits out its lease
EXPIRY_LOOK = 1.0  # seconds, longest time between two looks for what expired, while anything in the outbox ever does
EXPIRY_LOOK_IDLE = 2.0  # seconds, the same while nothing does; another process's message may, and that process may die
HASTEN_STEP = 5_000  # messages that are brought forward in one statement, during which nobody claims
LONGEST = 1e9  # seconds, some thirty years; PostgreSQL refuses times further away than some 300,000
SLICE = 60.0  # seconds, longest; times of changes are rounded up to slices, so most changes leave the index alone


class PostgresRepository(Repository):
    """A repository in PostgreSQL that any number of processes share. Methods block until their change is committed.

    Every failure of the database is a `RepositoryUnavailableError`; when it comes from a connection that broke, the
    change may have been made nevertheless, and making it again does no harm. `lease` has to be the same everywhere.
    """

    blocking = True
    durable = True
    poll = 1.0  # seconds: at most so much later than its time a message of an instance that died leaves

    def __init__(
        self,
        url: str,
        retention: float = RETENTION,
        *,
        lease: float = 30.0,
        connections: int = CONNECTIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retention = min(retention, LONGEST) or None
        self._slice = min(SLICE, retention / 1000) or SLICE
        self._clock = clock
        self._database = Database(url, connections)
        with contextlib.ExitStack() as undo:
            undo.callback(self._database.close)
            prepare(self._database)
            undo.pop_all()
        self._leases = Leases(Database(url, 1), min(lease, LONGEST))
        self._backlog = Backlog(lambda: Counts(*self._database.run(COUNT)[0]), clock)
        self._saving = Saving(self._database, self._backlog, self._retention, clock)
        self._ends = [self._leases.close]
        self._forget_at = -math.inf  # by our clock: before that nothing is to be forgotten

    # Accepting

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`. One statement, and a second one if not all could be saved."""
        return self._saving.save_all(entries, max_pending)

    def save_together(self, entries: Sequence[Entry], max_pending: int | None = None) -> Exception | None:
        """See `Repository`. One statement, and a second one if nothing could be saved."""
        return self._saving.save_together(entries, max_pending)

    # Statuses

    def get(self, message_id: str) -> MessageStatus:
        """See `Repository`."""
        row = self._status(message_id)
        return MessageStatus(row[0]) if row else MessageStatus.NOT_FOUND

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        row = self._status(message_id)
        return Reason(row[1]) if row and row[1] else None

    def _status(self, message_id: str) -> Any:
        rows = self._database.run(STATUS, (message_id, self._retention)) if storable(message_id) else []
        return rows[0] if rows else None

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`. One statement; repeats and reordering do no harm."""
        ids = sorted(filter(storable, updates))
        wanted = [STATUS_OF[updates[each]] for each in ids]
        reasons = [each.value if isinstance(each := updates[message_id], Reason) else None for message_id in ids]
        parameters = {
            "ids": ids, "statuses": [status.value for status in wanted], "reasons": reasons,
            "retention": self._retention, "slice": self._slice, "ended": self._leases.ended_by(updates.keys()),
        }  # fmt: skip
        rows, again = self._database.run_again(lambda again: (UPDATE, parameters)) if ids else ([], False)
        found: dict[str, tuple[MessageStatus, bool]] = {}
        for message_id, before, allowed, *_ in rows:
            found[message_id] = MessageStatus(before), allowed or (again and before == STATUS_OF[updates[message_id]])
        if rows:
            gone, waited = rows[0][3:]
            self._backlog.add(-gone, -waited)
        self._leases.remove([message_id for message_id, (_, applied) in found.items() if applied])
        errors: dict[str, Exception] = {}
        for message_id, update in updates.items():
            before, applied = found.get(message_id, (MessageStatus.NOT_FOUND, False))
            if not applied:
                errors[message_id] = refusal(message_id, before, update)
        return errors

    # Handing over

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
        """See `Repository`. One statement. When its answer is lost, what it took waits out its lease."""
        size = min(size, LARGEST)
        sent_at = self._leases.clock()  # also if it is sent twice: too early does no harm
        parameters = (self._leases.owner, size, float(horizon), flush, self._leases.seconds)
        rows = self._database.run(CLAIM, parameters)
        batch_id, waited, taken, due_in, full_in, near = rows[0][:6]
        self._backlog.add(0, -taken)
        waiting, messages = waited - taken, [row[6:] for row in rows[1:]]
        if waited > size:  # the look ended before the outbox did; and a batch does not wait for a count
            waiting = max(waiting, (self._backlog.peek() if messages else self._backlog.get()).waiting)
        if not messages:
            return Claim(None, waiting, due_in, full_in, near)
        lease = self._leases.add(batch_id, sent_at, [row[0] for row in messages])
        return Claim(Batch(_entries(messages, self._clock()), lease), waiting)

    def release(self, batch: Batch) -> None:
        """See `Repository`. Does nothing when the lease is lost: then the batch is another process's."""
        if not isinstance(batch.lease, Lease):
            return
        parameters = (self._leases.owner, [batch.lease.id], sorted(batch.ids))
        self._backlog.add(0, self._database.run(RELEASE, parameters, timeout=RELEASE_TIMEOUT)[0][0])
        self._leases.remove(batch.ids, batch.lease)

    def unsent(self, batch: Batch) -> Batch:
        """See `Repository`. While the database is away: what is left as far as this process knows."""
        if not isinstance(batch.lease, Lease):
            return batch.only(lambda entry: False)
        try:
            rows = self._database.run(UNSENT, (batch.lease.id, self._leases.owner), timeout=UNSENT_TIMEOUT)
            left = {row[0] for row in rows}
            self._leases.remove(set(batch.ids) - left, batch.lease)
            if not left and not self._database.run(IN_OUTBOX, (batch.ids,), timeout=UNSENT_TIMEOUT)[0][0]:
                return Batch(())  # all were reported on, so no lease is lost
        except RepositoryUnavailableError:
            left = self._leases.known(batch.lease)
        return batch if left.issuperset(batch.ids) else batch.only(lambda entry: entry.message.message_id in left)

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`. Also when the lease is lost: FastSMSing took the messages."""
        ids = sorted(filter(storable, batch.ids))
        last = max((entry.place for entry in batch.entries), default=0) or sys.maxsize  # 0: saved here, and not claimed
        parameters = {"ids": ids, "last": last, "slice": self._slice, "ended": self._leases.ended_by(ids)}
        self._backlog.add(*(-count for count in self._database.run(HANDED_OVER, parameters)[0]))
        self._leases.remove(ids)

    def holds(self, batch: Batch) -> bool:
        """See `Repository`. By this machine's clock, which says no before the database lets others say yes."""
        return not isinstance(batch.lease, Lease) or self._leases.holds(batch.lease)

    # What waits

    def cancel(self, message_id: str) -> Cancelled | None:
        """See `Repository`. One statement, under the lock of the claims. If its answer is lost, none is told `NOW`."""
        if not storable(message_id):
            return None
        cancelled, now = self._database.run(CANCEL, (message_id, self._retention, self._slice))[0]
        self._backlog.add(-now, -now)
        return (Cancelled.NOW if now else Cancelled.BEFORE) if cancelled else None

    def expire(self) -> tuple[list[str], float]:
        """See `Repository`. What other processes accept may expire before what is known here: the wait is short."""
        (_, soonest), *rows = self._database.run(EXPIRE, (EXPIRE_STEP, self._slice))
        self._backlog.add(-len(rows), -len(rows))
        if len(rows) == EXPIRE_STEP:
            return [row[0] for row in rows], 0.0
        # With jitter, or all instances would look together.
        longest = (EXPIRY_LOOK if soonest < math.inf else EXPIRY_LOOK_IDLE) * (0.75 + random.random() / 4)
        return [row[0] for row in rows], min(soonest, longest)

    def hasten(self, max_delay: float) -> None:
        """See `Repository`. Some thousand messages in one statement."""
        while self._database.run(HASTEN, (float(max_delay), HASTEN_STEP))[0][0] == HASTEN_STEP:
            pass

    # Watching

    def changes(self) -> ChangeOutbox:
        """See `Repository`. From the first call on all processes record changes, until somebody ends it by hand."""
        changes = PostgresChanges(self._database, self._leases.owner, self._retention, self._clock)
        self._ends.append(changes.close)
        return changes

    def backlog(self) -> int:
        """See `Repository`. Of all processes together; about a second old."""
        return self._backlog.get().pending

    def ages(self) -> Ages:
        """See `Repository`. Of all processes together. Reads the whole outbox."""
        oldest, past_due = self._database.run(AGES)[0]
        return Ages(max(0.0, oldest), max(0.0, past_due))

    def size(self) -> int:
        """See `Repository`. The tables with their indexes."""
        return int(self._database.run(SIZE)[0][0])

    def check(self) -> None:
        """See `Repository`. Commits a change of one row, which is what a read-only or a stuck server cannot do."""
        if not self._database.run(CHECK, timeout=CHECK_TIMEOUT):
            raise RepositoryUnavailableError("the database's tables are damaged: a row of smsproxy.mutex is missing")

    # Forgetting and ending

    def forget(self) -> float | None:
        """See `Repository`. One process at a time; the others come again later."""
        if self._retention is None:
            return None
        wait = self._forget_at - self._clock()
        if wait > 0:
            return wait
        gone, due = self._database.run(FORGET, {"retention": self._retention, "step": FORGET_STEP})[0]
        if gone == FORGET_STEP:
            return 0.0
        # Without anything to forget: whatever changes from now on is due after its whole time.
        wait = self._retention if due is None else max(float(due), self._slice, FORGET_PAUSE)
        self._forget_at = self._clock() + wait
        return wait

    def close(self) -> None:
        """Closes the connections, within `CLOSE_TIMEOUT` and a little more, whatever hangs.

        Other threads' statements fail. Batches in requests that did not end wait out their leases.
        """
        self._database.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for end in self._ends:
            end(deadline)


def _entries(rows: Sequence[Any], now: float) -> tuple[Entry, ...]:
    """The messages of a batch, as `claim` in the database tells them."""
    entries = []
    for message_id, phone, content, age, linger, max_age, by_default, place in rows:
        message, accepted_at = Message(phone, bytes(content).decode(), message_id), now - age
        times = accepted_at, accepted_at + linger, accepted_at + max_age
        entries.append(Entry(message, None, linger, by_default, max_age, *times, place))
    return tuple(entries)

"""The batches that this process has claimed, and the thread that renews their leases."""
from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from incident_log import Incident, location
from message_model import RepositoryUnavailableError

from .connections import Database
from .statements import RELEASE, RENEW

__all__ = ["Lease", "Leases", "monotonic"]

log = logging.getLogger("smsproxy.postgres")

MARGIN = 0.05  # of a lease; this machine's clock may go so much slower than the database's
LAST_WAIT = 0.3  # seconds that a statement given up at its deadline may take to notice it
RETRY = 1.0  # seconds, longest wait before a renewal that failed is tried again


def monotonic() -> float:
    """Seconds of a clock that also runs while the machine is suspended, where there is one (Linux).

    `time.monotonic` stands still meanwhile there, and the database's clock does not.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@dataclass(slots=True, eq=False)
class Lease:
    """What a claimed batch is held by. Parts of the batch share it. `Leases` guards it."""

    id: int
    until: float  # by `monotonic`; no later than the database's `lease_until`
    remaining: set[str] = field(default_factory=set)  # IDs of its messages that are in the outbox, as far as we know
    asked: bool = False  # whether a sender wanted to know, as it does before each request


class Leases:
    """Knows which batches this process may send. Thread-safe.

    The rules, of which the claims of the other processes are the other half:

    1. `until` is counted from before the statement that took or renewed the lease was sent, the database's
       `lease_until` from when it ran. So ours comes first, and after it nothing is sent.
    2. Only what is in `_held` is renewed. A batch that `holds` denied once was given up by its sender, so it
       leaves `_held`, and others get it when its lease runs out. So does one whose claim was never answered.
    3. A renewal that finds another owner, or no batch any more, ends the lease at once.
    4. A lease that ran out here while the database was away, and that nobody took over, is renewed like any other.
    5. The end frees the batches that no sender asked about. A batch leaves `_held` in the same step in which that
       is found out, so a sender that has one of them and asks afterwards is told not to send it.

    `database` is the leases' own, so that no renewal waits behind other statements; `close` closes it.
    """

    def __init__(self, database: Database, seconds: float, *, clock: Callable[[], float] = monotonic) -> None:
        self.owner = uuid.uuid4()  # of this start of the process
        self.seconds = seconds
        self._database, self.clock = database, clock
        self._incident = Incident(log, "leases cannot be renewed")
        self._lock = threading.Lock()  # guards everything below
        self._changed = threading.Condition(self._lock)  # there is something to renew, or it is the end
        self._held: dict[int, Lease] = {}
        self._by_message: dict[str, Lease] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="smsproxy-leases-1", daemon=True)
        self._thread.start()

    def add(self, batch_id: int, sent_at: float, message_ids: Iterable[str]) -> Lease:
        """A batch that was claimed by a statement sent at `sent_at`. If this process took it over from itself, its old
        lease ends."""
        lease = Lease(batch_id, self._end(sent_at), set(message_ids))
        with self._lock:
            for old in {self._by_message[each] for each in lease.remaining if each in self._by_message}:
                self._drop(old)
            self._held[batch_id] = lease
            self._by_message.update(dict.fromkeys(lease.remaining, lease))
            self._changed.notify()
        return lease

    def holds(self, lease: Lease) -> bool:
        """Whether the lease lasts; once it does not, it never does again. Never blocks for long."""
        with self._lock:
            lease.asked = True
            if self._held.get(lease.id) is lease and lease.until <= self.clock():
                self._drop(lease)
            return self._held.get(lease.id) is lease

    def known(self, lease: Lease) -> set[str]:
        """Which of its messages are in the outbox as far as we know; none when the lease is lost."""
        with self._lock:
            return set(lease.remaining) if self._held.get(lease.id) is lease else set()

    def ended_by(self, message_ids: Collection[str]) -> list[int]:
        """The batches that have no messages left when these have left the outbox."""
        with self._lock:
            leases = {self._by_message[each] for each in message_ids if each in self._by_message}
            return sorted(lease.id for lease in leases if lease.remaining.issubset(message_ids))

    def remove(self, message_ids: Iterable[str], lease: Lease | None = None) -> None:
        """These messages are not ours any more: they left the outbox, or were released. With a lease: are not its."""
        with self._lock:
            for message_id in message_ids:
                found = self._by_message.get(message_id)
                if found is not None and lease in (found, None):
                    del self._by_message[message_id]
                    found.remaining.discard(message_id)
                    if not found.remaining:
                        self._drop(found)

    def close(self, deadline: float) -> None:
        """Ends the thread, which frees the batches that no sender began with: claimed while the senders stopped.

        What else is still held is in a request that did not end, so it waits out its lease, and so does everything
        when the database hangs. Blocks until `deadline` at most, a moment of `time.monotonic`, and a little longer.
        """
        with self._lock:
            self._closed = True
            self._changed.notify()
        self._database.end_by(deadline)
        self._thread.join(max(0.0, deadline - time.monotonic()) + LAST_WAIT)
        self._database.close()

    def _end(self, sent_at: float) -> float:
        return sent_at + self.seconds * (1 - MARGIN)

    def _drop(self, lease: Lease) -> None:
        """Forgets a lease; the lock is held."""
        self._held.pop(lease.id, None)
        for message_id in lease.remaining:
            if self._by_message.get(message_id) is lease:
                del self._by_message[message_id]

    # The thread

    def _run(self) -> None:
        wait = self.seconds / 3
        while self._wait(wait):
            wait = min(RETRY, self.seconds / 10)
            try:
                self._renew()
            except RepositoryUnavailableError as error:
                self._incident.failed(error)
            except Exception as error:  # whatever it is, leases have to be renewed
                self._incident.failed(location(error))
            else:
                self._incident.ended()
                wait = self.seconds / 3
        with contextlib.suppress(RepositoryUnavailableError):  # then they wait out their leases, too
            self._free()

    def _wait(self, seconds: float) -> bool:
        """Waits, first for something to renew and then for so long; False at the end."""
        with self._lock:
            while not (self._held or self._closed):
                self._changed.wait()
            self._changed.wait_for(lambda: self._closed, seconds)
            return not self._closed

    def _renew(self) -> None:
        with self._lock:
            asked = dict(self._held)
        sent_at = self.clock()
        if not asked:
            return
        # A statement that waits for longer than it takes until the next try would only be in its way.
        rows = self._database.run(RENEW, (self.owner, sorted(asked), self.seconds), timeout=self.seconds / 6)
        renewed = {row[0] for row in rows}
        with self._lock:
            for lease in asked.values():
                if lease.id in renewed:
                    lease.until = max(lease.until, self._end(sent_at))
                else:
                    self._drop(lease)

    def _free(self) -> None:
        with self._lock:
            free = [lease for lease in self._held.values() if not lease.asked]
            for lease in free:
                self._drop(lease)
        if free:
            self._database.run(RELEASE, (self.owner, sorted(lease.id for lease in free), None))

"""The changes that the shop has not been told of, in PostgreSQL: one instance at a time tells for all."""
from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable

from base_repository import Claim
from change_outbox import GATHER, Change, ChangeBody, ChangeOutbox
from incident_log import Incident, location
from message_model import MessageStatus, Reason, RepositoryUnavailableError

from .connections import Database
from .leases import MARGIN, monotonic
from .telling import HAND_OVER_BODY, PENDING, RECORD, RELEASE_BODY, RENEW_BODY, TELL

__all__ = ["PostgresChanges"]

log = logging.getLogger("smsproxy.postgres")

LEASE = 20.0  # seconds; a request may take 15, and a renewal before it some 3
REQUEST = 15.0  # seconds, longest, that a request to the receiver takes; `holds` says yes for as long
RENEW_TIMEOUT = 1.5  # seconds; twice as long until this side gives the connection up
RECORD_TIMEOUT = 4.0  # seconds; while it waits for those who write, all others who want to write wait behind it
LARGEST = 10_000  # messages in one body


class PostgresChanges(ChangeOutbox):
    """The outbox of changes of all processes. Thread-safe; methods block until their change is committed.

    The body that is under way has a lease, by the same rules as batches (see `Leases`): this process counts it from
    before the statement that took or renewed it was sent, and a little shorter than the database does. A thread renews
    it while the body waits for its next try, so that another process tells it only when this one died, hangs, or is cut
    off from the database. `holds` renews it, too: so the request that follows ends before anybody else may begin one.
    """

    durable = True
    poll = 1.0  # seconds

    def __init__(
        self, database: Database, owner: uuid.UUID, retention: float | None, clock: Callable[[], float], *,
        lease: float = LEASE, lease_clock: Callable[[], float] = monotonic,
    ) -> None:  # fmt: skip
        self._database, self._owner, self._retention, self._clock = database, owner, retention, clock
        self._lease, self._lease_clock = lease, lease_clock
        self._incident = Incident(log, "the webhook's lease cannot be renewed")
        database.run(RECORD, timeout=RECORD_TIMEOUT)
        self._lock = threading.Lock()  # guards everything below
        self._changed = threading.Condition(self._lock)  # there is a body to renew, or it is the end
        self._claiming = False  # a second claim would get the same body
        self._body: ChangeBody | None = None  # that is this process's, as far as it knows
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="smsproxy-webhook-lease-1", daemon=True)
        self._thread.start()

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[ChangeBody]:
        """See `ChangeOutbox`. One statement; when its answer is lost, the next one gives the body again."""
        with self._lock:
            if self._claiming or self._body is not None:
                return Claim()
            self._claiming = True
        found: Claim[ChangeBody] | None = None
        try:
            found = self._tell(min(size, LARGEST), horizon, flush)
        finally:
            with self._lock:
                self._claiming, self._body = False, found.batch if found else None
                self._changed.notify()
        return found

    def _tell(self, size: int, horizon: float, flush: bool) -> Claim[ChangeBody]:
        parameters = (self._owner, size, float(horizon), flush, GATHER, self._retention, self._lease)
        waiting, due_in, full_in, near, body_id, made_at, *columns, expires_in = self._database.run(TELL, parameters)[0]
        if body_id is None:
            return Claim(None, waiting, due_in, full_in, near)
        changes = [
            Change(message_id, MessageStatus(status), Reason(reason) if reason else None)
            for message_id, status, reason in zip(*columns, strict=True)
        ]
        return Claim(ChangeBody(body_id, made_at, tuple(changes), self._clock() + expires_in), waiting)

    def holds(self, body: ChangeBody) -> bool:
        """See `ChangeOutbox`. Asks the database, and renews the lease."""
        with self._lock:
            if self._body is None or self._body.id != body.id:
                return False
        until = self._renew(body)
        if until is not None and until < self._lease_clock() + REQUEST:
            raise RepositoryUnavailableError("the database is too slow: a lease was renewed too late")
        return until is not None

    def handed_over(self, body: ChangeBody) -> None:
        """See `ChangeOutbox`."""
        self._database.run(HAND_OVER_BODY, (body.id, self._owner))
        self._forget(body)

    def release(self, body: ChangeBody, /) -> None:
        """See `ChangeOutbox`. Others may tell it at once."""
        self._database.run(RELEASE_BODY, (body.id, self._owner))
        self._forget(body)

    def pending(self) -> tuple[int, float]:
        """See `ChangeOutbox`. Of all processes together. Behind the first thousand changes it estimates."""
        number, seconds = self._database.run(PENDING)[0]
        return number, max(0.0, seconds)

    def close(self, deadline: float) -> None:
        """Ends the thread. A body that is in a request waits out its lease. Blocks until `deadline` at most, a moment
        of `time.monotonic`."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _renew(self, body: ChangeBody) -> float | None:
        """Until when the body is ours, by `lease_clock`; None when it is another process's, or nobody's."""
        sent_at = self._lease_clock()
        if self._database.run(RENEW_BODY, (self._lease, body.id, self._owner), timeout=RENEW_TIMEOUT):
            return sent_at + self._lease * (1 - MARGIN)
        self._forget(body)
        return None

    def _forget(self, body: ChangeBody) -> None:
        with self._lock:
            if self._body is not None and self._body.id == body.id:
                self._body = None

    # The thread

    def _run(self) -> None:
        while (body := self._next()) is not None:
            try:
                self._renew(body)
            except RepositoryUnavailableError as error:
                self._incident.failed(error)
            except Exception as error:  # whatever it is, the lease has to be renewed
                self._incident.failed(location(error))
            else:
                self._incident.ended()

    def _next(self) -> ChangeBody | None:
        """Waits for a body, and then until its lease is to be renewed; None at the end."""
        with self._lock:
            while not self._closed:
                body = self._body
                self._changed.wait(None if body is None else self._lease / 4)
                if body is not None and body is self._body and not self._closed:
                    return body
            return None

"""A few connections to PostgreSQL, statements with a time limit on either side, and errors translated.

A statement is sent together with its `statement_timeout`, as one implicit transaction and in one round
trip (psycopg's pipeline mode), so nothing is left behind in the session and a transaction pooler may
stand between. The server ends a statement that takes too long; when even that does not arrive, because
the server hangs or the network swallows packets, the connection is given up on this side.
"""
from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import psycopg
from psycopg import errors

from message_model import RepositoryUnavailableError

from .urls import describe_failure, parse_url

__all__ = ["CONNECT_TIMEOUT", "STATEMENT_TIMEOUT", "Database", "Parameters"]

Parameters: TypeAlias = "Sequence[Any] | Mapping[str, Any]"

CONNECT_TIMEOUT = 3  # seconds; a server that answers does so in milliseconds
STATEMENT_TIMEOUT = 5.0  # seconds, by the server's clock; all statements together take some milliseconds
GRACE = 2.0  # seconds on top, or as long again if that is shorter; then this side gives the connection up
CONFLICTS = 10  # times that a statement is tried again when the server aborted it for another one's sake
# The server's machine is gone, or a firewall forgot the connection: both are noticed in about ten seconds at most.
KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 2, "tcp_user_timeout": 8000}
# For this transaction only. The tables grow from nothing to a hundred thousand rows and back faster than statistics are
# gathered; a plan that reads all of a table or an index that was small a minute ago is the one that must not be chosen.
SETTINGS = """
SELECT set_config('statement_timeout', %s, true), set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true), set_config('jit', 'off', true)
"""


class NoAnswerError(psycopg.OperationalError):
    """The server, or what stands between, did not answer in time, and the connection was given up."""


class _Connection(psycopg.Connection[Any]):
    """A connection whose waits end at `deadline`, a time of `time.monotonic`."""

    deadline = math.inf  # set by `Database`, by the thread that runs a statement and by one that ends it

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """See psycopg; raises `NoAnswerError` after the deadline, and then is of no use any more."""
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, gen: Any) -> Any:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > self.deadline:  # psycopg looks up ten times a second
                    self.pgconn.finish()
                    raise NoAnswerError
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


class Database:
    """Runs statements on pooled connections. Thread-safe.

    Every failure is a `RepositoryUnavailableError`, after at most a few times the limits above. Its text
    has no password, host or port, and nothing that a statement or the server's answer to it contained.
    """

    def __init__(self, url: str, connections: int, *, timeout: float = STATEMENT_TIMEOUT) -> None:
        self._timeout = timeout
        given = parse_url(url)
        ours = {"connect_timeout": CONNECT_TIMEOUT, "fallback_application_name": "smsproxy", **KEEPALIVE}
        self._parameters = {**ours, **given, "client_encoding": "UTF8"}
        self._changed = threading.Condition()  # guards what follows; a place is free, or it is the end
        self._places = connections  # that are free
        self._idle: deque[_Connection] = deque()  # the one used last at the end
        self._busy: set[_Connection] = set()
        self._end = math.inf  # of `time.monotonic`; nothing is waited for after it
        self._closed = False

    def run(self, sql: str, parameters: Parameters = (), *, timeout: float | None = None) -> list[Any]:
        """The rows of one statement, committed. `run_again` tells what happens when its answer is lost."""
        return self.run_again(lambda again: (sql, parameters), timeout=timeout)[0]

    def run_again(
        self, make: Callable[[bool], tuple[str, Parameters]], *, timeout: float | None = None
    ) -> tuple[list[Any], bool]:
        """The rows of the statement that `make` makes, and whether it may have been carried out twice.

        A statement aborted for another one's sake (a deadlock, a serialization failure) is sent again. So is,
        once, one whose connection broke: it had become stale, or the answer is lost, perhaps that to a COMMIT.
        So every statement has to be such that repeating it does no harm.
        """
        conflicts, again, limit = 0, False, self._timeout if timeout is None else timeout
        while True:
            with self._connection(limit, fresh=again) as db:
                try:
                    return _execute(db, *make(again), limit), again
                except (errors.SerializationFailure, errors.DeadlockDetected) as error:
                    conflicts += 1
                    if conflicts > CONFLICTS:
                        raise _unavailable(error) from None
                except psycopg.Error as error:
                    late, broken = time.monotonic() > db.deadline, _is_broken(db, error)
                    if broken:
                        db.close()
                        self._drop_idle()  # what broke this one broke them, too
                    if again or late or not broken or isinstance(error, errors.ReadOnlySqlTransaction):
                        raise _unavailable(error) from None
                    again = True

    @contextlib.contextmanager
    def start(self, timeout: float) -> Iterator[psycopg.Connection[Any]]:
        """A connection for what has to be done once, in several statements and within so many seconds altogether."""
        with self._connection(timeout, fresh=True) as db:
            try:
                yield db
            except psycopg.Error as error:
                db.close()
                raise _unavailable(error) from None

    def end_by(self, moment: float) -> None:
        """From now on no statement is waited for beyond this moment of `time.monotonic`, those under way included."""
        with self._changed:
            self._end = min(self._end, moment)
            for db in self._busy:
                db.deadline = min(db.deadline, self._end)
            self._changed.notify_all()

    def close(self) -> None:
        """Closes the connections; later statements raise `RepositoryUnavailableError`, and so do those under way.

        Returns at once, whatever hangs: a thread that waits for an answer closes its own connection.
        """
        with self._changed:
            self._closed = True
        self.end_by(-math.inf)
        self._drop_idle()

    @contextlib.contextmanager
    def _connection(self, timeout: float, fresh: bool) -> Iterator[_Connection]:
        """A connection of one's own for a while. Waits for a place no longer than a statement may take."""
        db = self._take_place(timeout, fresh)
        try:
            db = db or self._connect()
            try:
                self._begin(db, time.monotonic() + timeout + min(GRACE, timeout))
                yield db
            finally:
                self._put_back(db)
        finally:
            with self._changed:
                self._places += 1
                self._changed.notify()

    def _take_place(self, timeout: float, fresh: bool) -> _Connection | None:
        """Waits for a place, and takes an idle connection unless a fresh one is wanted."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._closed and not self._places and (wait := min(deadline, self._end) - time.monotonic()) > 0:
                self._changed.wait(wait)
            if self._closed:
                raise RepositoryUnavailableError("the database is closed")
            if not self._places or time.monotonic() > self._end:
                raise RepositoryUnavailableError("the database is too slow: every connection is in use")
            self._places -= 1
            return None if fresh or not self._idle else self._idle.pop()

    def _begin(self, db: _Connection, deadline: float) -> None:
        with self._changed:
            if self._closed:  # while we connected
                raise RepositoryUnavailableError("the database is closed")
            db.deadline = min(deadline, self._end)
            self._busy.add(db)

    def _put_back(self, db: _Connection) -> None:
        with self._changed:
            self._busy.discard(db)
            idle = not db.closed and db.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            if usable := idle and not self._closed:
                self._idle.append(db)
        if not usable:
            db.close()

    def _drop_idle(self) -> None:
        with self._changed:
            idle, self._idle = self._idle, deque()
        for db in idle:
            db.close()

    def _connect(self) -> _Connection:
        try:
            # No prepared statements: the next transaction may run on another connection of a pooler.
            return _Connection.connect(**self._parameters, autocommit=True, prepare_threshold=None)
        except (psycopg.Error, OSError) as error:
            raise RepositoryUnavailableError(f"cannot connect to PostgreSQL: {describe_failure(error)}") from None


def _execute(db: _Connection, sql: str, parameters: Parameters, timeout: float) -> list[Any]:
    failed: psycopg.Error | None = None
    try:
        with db.pipeline():  # ends with one Sync: until there it is one transaction, committed there
            try:
                db.execute(SETTINGS, (f"{max(1, round(timeout * 1000))}",))
                cursor = db.execute(sql, parameters, binary=True)
            except psycopg.Error as error:  # raised below: psycopg would log a line for each that the Sync follows
                failed = error
    except psycopg.Error as error:
        raise failed or error from None
    if failed is not None:
        raise failed
    return cursor.fetchall() if cursor.description else []


def _is_broken(db: _Connection, error: psycopg.Error) -> bool:
    """Whether the connection is of no use any more: it is lost, or another one may lead to the new primary."""
    state = error.sqlstate or ""
    ours = not state and isinstance(error, psycopg.OperationalError)  # not said by the server, which may say more
    return (
        db.closed or ours or state[:2] == "08" or state[:3] == "57P" or isinstance(error, errors.ReadOnlySqlTransaction)
    )


def _unavailable(error: psycopg.Error) -> RepositoryUnavailableError:
    """What callers get to know: the kind of error and its SQLSTATE. Its text may quote what was in the statement."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (errors.ReadOnlySqlTransaction, "the database is read-only, perhaps a standby"),
        (errors.QueryCanceled, "the database is too slow: a statement was cancelled"),
        (NoAnswerError, "the database is too slow: no answer in time"),
    )
    what = next((text for kind, text in kinds if isinstance(error, kind)), "the database fails")
    return RepositoryUnavailableError(f"{what} ({type(error).__name__} {error.sqlstate or 'without SQLSTATE'})")

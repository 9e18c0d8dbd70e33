"""A few connections to PostgreSQL, statements with a time limit on either side, and errors translated.

A statement is sent together with its `statement_timeout`, as one implicit transaction and in one round
trip (psycopg's pipeline mode), so nothing is left behind in the session and a transaction pooler may
stand between. The server ends a statement that takes too long; when even that does not arrive, because
the server hangs or the network swallows packets, the connection is given up on this side.
"""
from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union

import psycopg
from psycopg import conninfo, errors

from smsproxy import RepositoryUnavailableError, describe

__all__ = ["CONNECT_TIMEOUT", "Database", "STATEMENT_TIMEOUT"]

Parameters = Union[Sequence[Any], Mapping[str, Any]]

CONNECT_TIMEOUT = 3  # seconds; a server that answers does so in milliseconds
STATEMENT_TIMEOUT = 5.0  # seconds, by the server's clock; all statements together take some milliseconds
GRACE = 2.0  # seconds on top, after which this side gives the connection up
CONFLICTS = 10  # times that a statement is tried again when the server aborted it for another one's sake
# The server's machine is gone, or a firewall forgot the connection: both are noticed in about ten seconds at most.
KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 2, "tcp_user_timeout": 8000}
# For this transaction only. The tables grow from nothing to a hundred thousand rows and back faster than statistics are
# gathered; a plan that reads all of a table that was small a minute ago is the one that must not be chosen.
SETTINGS = """
SELECT set_config('statement_timeout', %s, true), set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true)
"""


class _Connection(psycopg.Connection[Any]):
    """A connection whose waits end at `deadline`, a time of `time.monotonic`."""

    deadline = float("inf")

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """See psycopg; raises `OperationalError` after the deadline, and then is of no use any more."""
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, gen: Any) -> Any:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > self.deadline:  # psycopg looks up ten times a second
                    self.pgconn.finish()
                    raise psycopg.OperationalError("no answer in time")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


class Database:
    """Runs statements on pooled connections. Thread-safe.

    Every failure is a `RepositoryUnavailableError`, after at most a few times the limits above. Its text
    has no password, and nothing that a statement or the server's answer to it contained.
    """

    def __init__(self, url: str, connections: int, *, timeout: float = STATEMENT_TIMEOUT) -> None:
        self._timeout = timeout
        self._parameters = _parameters(url)
        self._places = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()  # guards the next two
        self._idle: deque[_Connection] = deque()  # the one used last at the end
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

    def close(self) -> None:
        """Closes the connections; later statements raise `RepositoryUnavailableError`."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    @contextlib.contextmanager
    def _connection(self, timeout: float, fresh: bool) -> Iterator[_Connection]:
        """A connection of one's own for a while. Waits for a place no longer than a statement may take."""
        if not self._places.acquire(timeout=timeout):
            raise RepositoryUnavailableError("the database is too slow: every connection is in use")
        try:
            with self._lock:
                if self._closed:
                    raise RepositoryUnavailableError("the database is closed")
                db = None if fresh or not self._idle else self._idle.pop()
            db = db or self._connect()
            db.deadline = time.monotonic() + timeout + GRACE
            try:
                yield db
            except BaseException:
                self._put_back(db)
                raise
            self._put_back(db)
        finally:
            self._places.release()

    def _put_back(self, db: _Connection) -> None:
        with self._lock:
            usable = not self._closed and not db.closed and db.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            if usable:
                self._idle.append(db)
        if not usable:
            db.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, deque()
        for db in idle:
            db.close()

    def _connect(self) -> _Connection:
        try:
            # No prepared statements: the next transaction may run on another connection of a pooler.
            return _Connection.connect(**self._parameters, autocommit=True, prepare_threshold=None)
        except (psycopg.Error, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            password = str(self._parameters.get("password") or "")
            text = describe(error) if password and password in lines[0] else lines[0]
            raise RepositoryUnavailableError(f"cannot connect to PostgreSQL: {text}") from None


def _parameters(url: str) -> dict[str, Any]:
    try:
        given = conninfo.conninfo_to_dict(url)
    except psycopg.Error:  # its text quotes the URL
        raise RepositoryUnavailableError("the database's URL cannot be understood") from None
    ours = {"connect_timeout": CONNECT_TIMEOUT, "fallback_application_name": "smsproxy", **KEEPALIVE}
    return {**ours, **given, "client_encoding": "UTF8"}


def _execute(db: _Connection, sql: str, parameters: Parameters, timeout: float) -> list[Any]:
    with db.pipeline():  # ends with one Sync: until there it is one transaction, committed there
        db.execute(SETTINGS, (f"{max(1, round(timeout * 1000))}",))
        cursor = db.execute(sql, parameters, binary=True)
    return cursor.fetchall() if cursor.description else []


def _is_broken(db: _Connection, error: psycopg.Error) -> bool:
    """Whether the connection is of no use any more: it is lost, or another one may lead to the new primary."""
    state = error.sqlstate or ""
    return db.closed or state[:2] == "08" or state[:3] == "57P" or isinstance(error, errors.ReadOnlySqlTransaction)


def _unavailable(error: psycopg.Error) -> RepositoryUnavailableError:
    """What callers get to know: the kind of error and its SQLSTATE. Its text may quote what was in the statement."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (errors.ReadOnlySqlTransaction, "the database is read-only, perhaps a standby"),
        (errors.QueryCanceled, "the database is too slow: a statement was cancelled"),
    )
    what = next((text for kind, text in kinds if isinstance(error, kind)), "the database fails")
    return RepositoryUnavailableError(f"{what} ({type(error).__name__} {error.sqlstate or 'without SQLSTATE'})")

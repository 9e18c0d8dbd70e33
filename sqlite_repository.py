"""The durable repository: statuses and the outbox in one SQLite file, so that a 202 survives a crash.

One thread writes. It takes everything that waits, commits it as one group with `synchronous=FULL`,
and only then settles the callers' Futures, so that many callers share one fsync. Reads use
connections of their own, which in WAL mode never wait for the writer.
"""
from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from fastsmsing import Message
from smsproxy import (
    FINAL_STATUSES, RETENTION, TRANSITIONS, DuplicateMessageError, MessageStatus, RepositoryUnavailableError,
    SmsProxyError, check_transition,
)  # fmt: skip

__all__ = ["SqliteRepository"]

log = logging.getLogger("smsproxy.sqlite")

APPLICATION_ID = 0x534D5350  # "SMSP": tells our files from others (SQLite manual, PRAGMA application_id)
GROUP = 1_000  # changes in one commit at most, so that none waits long for the others
BUSY_TIMEOUT = 5.0  # seconds to wait while someone else, say a backup, holds the file's lock
PURGE_STEP = 500  # messages forgotten in one transaction: a few milliseconds between two groups
# For what no ID can be.
UNUSABLE = (ValueError, OverflowError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
PURGE_RETRY = 60.0  # seconds until the next try to forget when the file could not be written
# Each script leads from the schema version that is its index to the next one.
MIGRATIONS = (
    """
    CREATE TABLE message (
        seq INTEGER PRIMARY KEY,  -- in order of acceptance
        id TEXT NOT NULL UNIQUE,
        status TEXT NOT NULL,
        accepted_at REAL NOT NULL,  -- seconds since 1970, as all times here
        final_at REAL,
        phone_number TEXT,  -- number and text are NULL once handed over
        content TEXT,
        fingerprint BLOB  -- of the request, when it came with an idempotency key
    );
    CREATE INDEX outbox ON message(seq) WHERE phone_number IS NOT NULL;
    CREATE INDEX expiry ON message(final_at) WHERE final_at IS NOT NULL;
    """,
)
_FROM = {  # SQL list of the statuses that may go to a status
    status: ", ".join(f"'{before.value}'" for before, after in TRANSITIONS.items() if status in after) or "NULL"
    for status in MessageStatus
}
_Change = Callable[[sqlite3.Connection], Any]


class SqliteRepository:
    """A `DurableRepository` in one file. Thread-safe; methods block until their change is on disk.

    Raises `RepositoryUnavailableError` when the file cannot be used, at once when it is made, and then
    whenever it cannot be written (the disk is full, someone else holds it); nothing is half-written,
    and the next change is tried afresh. Final statuses are deleted after `retention` seconds (0: never).
    """

    slow = True

    def __init__(self, path: str, retention: float = RETENTION, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._retention, self._clock = os.path.realpath(path), retention, clock
        self._lock = threading.Lock()  # guards everything below
        self._filled = threading.Condition(self._lock)  # there are jobs, or none will come any more
        self._jobs: deque[tuple[_Change, Future[Any]]] = deque()  # no more than there are threads that wait for them
        self._readers: list[sqlite3.Connection] = []  # open and not in use
        self._closed = False
        self._purge_at: float | None = None  # the writer's alone
        with contextlib.ExitStack() as undo:
            self._process_lock = undo.enter_context(contextlib.closing(self._lock_file()))
            with self._translated():
                self._db = undo.enter_context(contextlib.closing(self._open()))
            undo.pop_all()
        self._writer = threading.Thread(target=self._write, name="smsproxy-writer-1", daemon=True)
        self._writer.start()

    # What a repository does

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        """Stores `ACCEPTED` and, if given, the message in the outbox; raises `DuplicateMessageError`."""
        phone_number, content = (message.phone_number, message.message) if message else (None, None)
        for error in self._insert([(message_id, phone_number, content, fingerprint)]):
            if error is not None:
                raise error

    def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
        """`save` for messages with their fingerprints, in one transaction; what it would raise for each of them."""
        return self._insert([(m.message_id, m.phone_number, m.message, fingerprint) for m, fingerprint in messages])

    def get(self, message_id: str) -> MessageStatus:
        """The status as last acknowledged, `NOT_FOUND` when unknown."""
        with self._reader() as db:
            return self._status(db, message_id)

    def update(self, message_id: str, status: MessageStatus) -> None:
        """Raises `UnknownMessageError` or `StatusTransitionError`, and then changes nothing."""
        for failure in self.update_all({message_id: status}).values():
            raise failure

    def update_all(self, updates: Mapping[str, MessageStatus]) -> dict[str, Exception]:
        """Applies the updates in one transaction; returns why some could not be. Numbers and texts go."""

        def change(db: sqlite3.Connection) -> dict[str, Exception]:
            now = self._clock()
            failures: dict[str, Exception] = {}
            for message_id, status in updates.items():
                final_at = now if status in FINAL_STATUSES else None
                sql = (
                    "UPDATE message SET status = ?, final_at = ?, phone_number = NULL, content = NULL"
                    f" WHERE id = ? AND status IN ({_FROM[status]})"
                )
                try:
                    if not db.execute(sql, (status.value, final_at, message_id)).rowcount:
                        check_transition(message_id, self._status(db, message_id), status)
                except (SmsProxyError, *UNUSABLE) as refusal:
                    failures[message_id] = refusal
                if final_at is not None and self._purge_at is None and self._retention:
                    self._purge_at = final_at + self._retention
            return failures

        failures: dict[str, Exception] = self._submit(change).result()
        return failures

    def handed_over(self, message_ids: Iterable[str]) -> None:
        """Takes messages out of the outbox and erases their numbers and texts."""
        rows = [(message_id,) for message_id in message_ids]
        sql = "UPDATE message SET phone_number = NULL, content = NULL WHERE id = ?"
        self._submit(lambda db: db.executemany(sql, rows) and None).result()

    def outbox(self) -> list[tuple[float, Message]]:
        """Time of acceptance and message of all that is not handed over, in order of acceptance."""
        sql = "SELECT accepted_at, phone_number, content, id FROM message WHERE phone_number IS NOT NULL ORDER BY seq"
        with self._reader() as db:
            return [(accepted_at, Message(*rest)) for accepted_at, *rest in db.execute(sql)]

    def check(self) -> None:
        """Writes to the file; raises `RepositoryUnavailableError` if that fails or the writer hangs."""
        sql = f"PRAGMA user_version = {len(MIGRATIONS)}"
        done = self._submit(lambda db: db.execute(sql) and None)
        try:
            done.result(BUSY_TIMEOUT + 1.0)
        except concurrent.futures.TimeoutError:  # not yet the builtin one in Python 3.10
            raise RepositoryUnavailableError(f"{self._path}: the writer does not answer") from None

    def close(self) -> None:
        """Commits what waits and closes the file; later calls raise `RepositoryUnavailableError`."""
        with self._lock:
            self._closed = True
            self._filled.notify()
        self._writer.join()
        with self._lock:
            while self._readers:
                self._readers.pop().close()
        self._db.close()
        self._process_lock.close()

    # Opening

    def _lock_file(self) -> sqlite3.Connection:
        """Keeps other processes away for as long as this one lives, by SQLite's own lock on a file beside ours."""
        with self._translated():
            lock = sqlite3.connect(self._path + ".lock", timeout=0, isolation_level=None, check_same_thread=False)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            lock.close()
            why = "another process uses it" if "locked" in str(error) else str(error)
            raise RepositoryUnavailableError(f"{self._path}: {why}") from error
        return lock

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)

    def _open(self) -> sqlite3.Connection:
        db = self._connect()
        try:
            version = self._version(db)
            # SQLite manual, "WAL" and "PRAGMA synchronous": FULL syncs the log after each commit, so that
            # it survives a loss of power; NORMAL would not.
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise RepositoryUnavailableError(f"{self._path}: the file system has no WAL mode")
            db.execute("PRAGMA synchronous = FULL")
            if db.execute("PRAGMA synchronous").fetchone()[0] != 2:
                raise RepositoryUnavailableError(f"{self._path}: synchronous=FULL is not to be had")
            db.execute("PRAGMA fullfsync = ON")  # macOS: its plain fsync does not reach the disk
            db.execute("PRAGMA secure_delete = ON")  # what is erased is overwritten
            db.execute("BEGIN IMMEDIATE")
            for script in MIGRATIONS[version:]:
                for statement in script.split(";"):
                    db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            db.execute("COMMIT")
            oldest = db.execute("SELECT min(final_at) FROM message WHERE final_at IS NOT NULL").fetchone()[0]
            self._purge_at = oldest + self._retention if oldest is not None and self._retention else None
        except BaseException:
            db.close()
            raise
        return db

    def _version(self, db: sqlite3.Connection) -> int:
        """The schema's version; raises for a file that is not ours, before anything is written to it."""
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application != APPLICATION_ID and (application, version, tables) != (0, 0, 0):
            raise RepositoryUnavailableError(f"{self._path}: the database belongs to something else")
        if version > len(MIGRATIONS):
            raise RepositoryUnavailableError(f"{self._path}: schema version {version} is newer than this program")
        return version

    # Reading and writing

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RepositoryUnavailableError(f"{self._path}: {error}") from error

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for one read; there are as many as there were reads at a time."""
        with self._lock:
            if self._closed:
                raise RepositoryUnavailableError(f"{self._path}: closed")
            db = self._readers.pop() if self._readers else None
        with self._translated():
            db = db or self._connect()
            try:
                yield db
            except BaseException:
                db.close()
                raise
        with self._lock:
            if not self._closed:
                self._readers.append(db)
                return
        db.close()

    @staticmethod
    def _status(db: sqlite3.Connection, message_id: str) -> MessageStatus:
        row = db.execute("SELECT status FROM message WHERE id = ?", (message_id,)).fetchone()
        return MessageStatus(row[0]) if row else MessageStatus.NOT_FOUND

    def _submit(self, change: _Change) -> Future[Any]:
        """Queues a change for the writer's next group."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RepositoryUnavailableError(f"{self._path}: closed")
            self._jobs.append((change, future))
            self._filled.notify()
        return future

    def _insert(self, rows: Sequence[tuple[str, str | None, str | None, bytes | None]]) -> list[Exception | None]:
        """Stores messages by ID, number, text and fingerprint; returns why some could not be."""
        now, status = self._clock(), MessageStatus.ACCEPTED.value
        sql = (
            "INSERT INTO message (id, phone_number, content, fingerprint, status, accepted_at)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
        )

        def insert(db: sqlite3.Connection, row: tuple[str, str | None, str | None, bytes | None]) -> Exception | None:
            try:
                if db.execute(sql, (*row, status, now)).rowcount:
                    return None
                stored = db.execute("SELECT fingerprint FROM message WHERE id = ?", row[:1]).fetchone()
                return DuplicateMessageError(row[0], stored[0])
            except UNUSABLE as refusal:
                return refusal

        errors: list[Exception | None] = self._submit(lambda db: [insert(db, row) for row in rows]).result()
        return errors

    def _write(self) -> None:
        while (group := self._next_group()) is not None:
            try:
                self._commit(group)
                if self._purge_at is not None and self._clock() >= self._purge_at:
                    done: Future[float | None] = Future()
                    self._purge_at = self._clock() + PURGE_RETRY  # should this fail
                    self._commit([(self._purge, done)])
                    if done.exception() is None:
                        self._purge_at = done.result()
            except Exception:
                log.exception("the writer goes on after an error")

    def _next_group(self) -> list[tuple[_Change, Future[Any]]] | None:
        """Everything that waits, or nothing when it is time to forget; None when closed and done."""
        with self._lock:
            while not self._jobs:
                if self._closed:
                    return None
                wait = None if self._purge_at is None else self._purge_at - self._clock()
                if wait is not None and wait <= 0:
                    return []
                self._filled.wait(None if wait is None else min(wait, threading.TIMEOUT_MAX))
            group = [self._jobs.popleft() for _ in range(min(len(self._jobs), GROUP))]
            return group

    def _commit(self, group: list[tuple[_Change, Future[Any]]]) -> None:
        """Makes the changes one transaction. One that fails by itself fails its caller alone: the others
        are rolled back and tried again without it. What fails for all, fails all."""
        while group:
            settle: list[Callable[[], None]] = []
            culprit = None
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for culprit in group:
                    change, future = culprit
                    settle.append(functools.partial(future.set_result, change(self._db)))
                culprit = None
                self._db.execute("COMMIT")
            except Exception as error:
                with contextlib.suppress(sqlite3.Error):  # there may be nothing left to roll back
                    self._db.execute("ROLLBACK")
                if culprit is not None and type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
                    group.remove(culprit)
                    culprit[1].set_exception(error)
                    continue
                log.error("nothing could be written to %s: %s", self._path, error)
                unavailable = RepositoryUnavailableError(f"the database cannot be written: {error}")
                settle = [functools.partial(future.set_exception, unavailable) for _, future in group]
            for call in settle:
                call()
            return

    def _purge(self, db: sqlite3.Connection) -> float | None:
        """Forgets a few; returns when the next are due."""
        sql = "DELETE FROM message WHERE seq IN (SELECT seq FROM message WHERE final_at <= ? ORDER BY final_at LIMIT ?)"
        db.execute(sql, (self._clock() - self._retention, PURGE_STEP))
        oldest = db.execute("SELECT min(final_at) FROM message WHERE final_at IS NOT NULL").fetchone()[0]
        return None if oldest is None else oldest + self._retention

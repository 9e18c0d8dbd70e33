"""The durable repository: statuses and the outbox in one SQLite file, so that a 202 survives a crash.

Of the threads that wait to write, the one that gets the writing connection commits the changes of all of
them as one group, with `synchronous=FULL`, so that they share one fsync. Reads use connections of
their own, which in WAL mode never wait for a writer.
"""
from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsmsing import Message
from smsproxy import (
    FORGET_STEP, RETENTION, STATUS_OF, TRANSITIONS, Batch, Claim, DuplicateMessageError, Entry, Incident, MessageStatus,
    OverloadedError, Reason, Repository, RepositoryUnavailableError, SmsProxyError, UnknownMessageError,
    check_transition, time_to_claim,
)  # fmt: skip

__all__ = ["SqliteRepository", "check_file"]

log = logging.getLogger("smsproxy.sqlite")

APPLICATION_ID = 0x534D5350  # "SMSP": tells our files from others (SQLite manual, PRAGMA application_id)
BUSY_TIMEOUT = 5.0  # seconds to wait while someone else, say a backup, holds the file's lock
# Rows of one statement. A statement for each row would hand the interpreter's lock over each time, and one for every
# number of rows would be prepared too often.
SIZES = (1, 2, 4, 8, 16, 32, 64, 100)
# Each script leads from the schema version that is its index to the next one.
MIGRATIONS = (
    """
    CREATE TABLE message (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        status TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        final_at REAL,
        phone_number TEXT,
        content TEXT,
        fingerprint BLOB
    )
    """,
    """
    ALTER TABLE message RENAME TO message1;
    CREATE TABLE message (
        id TEXT PRIMARY KEY,
        status TEXT NOT NULL,
        reason TEXT,  -- why the service itself made it FAILED
        changed_at REAL,  -- seconds since 1970, as all times here; NULL while the message is in the outbox
        fingerprint BLOB  -- of the request, when it came with an idempotency key
    ) WITHOUT ROWID;
    CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- in order of acceptance; never used twice
        id TEXT NOT NULL UNIQUE,
        accepted_at REAL NOT NULL,
        phone_number TEXT NOT NULL,
        content TEXT NOT NULL
    );
    INSERT INTO message SELECT id, status, NULL, CASE WHEN phone_number IS NULL THEN
        coalesce(final_at, accepted_at) END, fingerprint FROM message1 ORDER BY id;
    INSERT INTO outbox (id, accepted_at, phone_number, content)
        SELECT id, accepted_at, phone_number, content FROM message1 WHERE phone_number IS NOT NULL ORDER BY seq;
    DROP TABLE message1;
    CREATE INDEX expiry ON message (changed_at) WHERE changed_at IS NOT NULL
    """,
)
COLUMNS = ("id", "accepted_at", "phone_number", "content")  # of the outbox, as `_row` and `_entry` have them


# Statements of several rows: `{rows}` stands for their parameters. A missing row is NULL, which equals no ID.
INSERT_MESSAGES = """
    INSERT INTO message (id, status, fingerprint)
    SELECT column1, 'ACCEPTED', column2 FROM (VALUES {rows}) WHERE column1 IS NOT NULL
    ON CONFLICT (id) DO UPDATE
    SET status = 'ACCEPTED', reason = NULL, changed_at = NULL, fingerprint = excluded.fingerprint
"""
INSERT_OUTBOX = f"""
    INSERT INTO outbox ({', '.join(COLUMNS)})
    SELECT * FROM (VALUES {{rows}}) WHERE column1 IS NOT NULL
"""
_BEFORE = {  # the statuses that may lead to a status
    status: ", ".join(f"'{before.value}'" for before, after in TRANSITIONS.items() if status in after) or "''"
    for status in MessageStatus
}
NOTABLE = {  # by the status that is wanted: IDs with their status, and whether that forbids it; the others may get it
    status: f"""
    SELECT column1, status, status IS NULL OR status NOT IN ({_BEFORE[status]}) FROM (VALUES {{rows}}) LEFT JOIN message
    ON id = column1 AND (changed_at IS NULL OR changed_at > ?)
    WHERE column1 IS NOT NULL AND (changed_at IS NULL OR status NOT IN ({_BEFORE[status]}))
    """  # what is unknown, in the outbox, or forbidden
    for status in MessageStatus
}
UPDATE_MESSAGES = "UPDATE message SET status = ?, reason = ?, changed_at = ? WHERE id IN ({rows})"
LEAVE_OUTBOX = "DELETE FROM outbox WHERE id IN ({rows})"
HANDED_OVER = "UPDATE message SET changed_at = ? WHERE id IN ({rows}) AND changed_at IS NULL"
FINGERPRINTS = "SELECT id, fingerprint FROM message WHERE id IN ({rows}) AND (changed_at IS NULL OR changed_at > ?)"
FORGET = "DELETE FROM message WHERE id IN (SELECT id FROM message WHERE changed_at <= ? ORDER BY changed_at LIMIT ?)"
OLDEST_CHANGE = "SELECT min(changed_at) FROM message WHERE changed_at IS NOT NULL"
NEWEST = """
    SELECT max(coalesce((SELECT accepted_at FROM outbox ORDER BY seq DESC LIMIT 1), 0),
    coalesce((SELECT max(changed_at) FROM message WHERE changed_at IS NOT NULL), 0))
"""
CLAIM = f"SELECT seq, {', '.join(COLUMNS)} FROM outbox WHERE seq > ? ORDER BY seq"
STATUS = "SELECT status, reason FROM message WHERE id = ? AND (changed_at IS NULL OR changed_at > ?)"


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise RepositoryUnavailableError(f"{path}: {error}") from error


def _execute(
    db: sqlite3.Connection, sql: str, rows: Sequence[Sequence[Any]], first: Sequence[Any] = (), last: Sequence[Any] = ()
) -> list[Any]:
    """Runs a statement of several rows for these; `first` and `last` are its other parameters."""
    found: list[Any] = []
    for start in range(0, len(rows), SIZES[-1]):
        chunk = rows[start : start + SIZES[-1]]
        size, width = next(size for size in SIZES if size >= len(chunk)), len(chunk[0])
        values = [*[value for row in chunk for value in row], *[None] * ((size - len(chunk)) * width)]
        found += db.execute(_sized(sql, size, width), (*first, *values, *last)).fetchall()
    return found


def _rows(ids: Iterable[str]) -> list[tuple[str]]:
    return [(message_id,) for message_id in ids]


@functools.lru_cache(256)
def _sized(sql: str, size: int, width: int) -> str:
    return sql.format(rows=", ".join(["(" + ", ".join("?" * width) + ")"] * size))


def _storable(message_id: str) -> bool:
    """Whether the ID can be in a file: a lone surrogate cannot be encoded."""
    try:
        message_id.encode()
    except UnicodeEncodeError:
        return False
    return True


# Opening


def _connect(path: str, timeout: float = BUSY_TIMEOUT) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)


def _create_private(path: str) -> None:
    """Makes a file that does not exist yet, for its owner's eyes only; SQLite gives those beside it the same mode."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _lock_file(path: str) -> sqlite3.Connection:
    """Keeps other processes away for as long as this one lives, by SQLite's own lock on a file beside ours."""
    _create_private(path + ".lock")
    lock = _connect(path + ".lock", timeout=0)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        why = "another process uses it" if "locked" in str(error) else str(error)
        raise RepositoryUnavailableError(f"{path}: {why}") from error
    return lock


def _open(path: str) -> sqlite3.Connection:
    """The connection that writes; raises for a file that cannot be used."""
    _create_private(path)
    db = _connect(path)
    try:
        version = _version(path, db)
        # SQLite manual, "WAL" and "PRAGMA synchronous": FULL syncs the log after each commit, so that
        # it survives a loss of power; NORMAL would not.
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise RepositoryUnavailableError(f"{path}: the file system has no WAL mode")
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA synchronous").fetchone()[0] != 2:
            raise RepositoryUnavailableError(f"{path}: synchronous=FULL is not to be had")
        db.execute("PRAGMA fullfsync = ON")  # macOS: its plain fsync does not reach the disk
        db.execute("PRAGMA secure_delete = ON")  # what is erased is overwritten
        db.execute("BEGIN IMMEDIATE")
        for script in MIGRATIONS[version:]:
            for statement in script.split(";\n"):
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _version(path: str, db: sqlite3.Connection) -> int:
    """The schema's version; raises for a file that is not ours, before anything is written to it."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and (application, version, tables) != (0, 0, 0):
        raise RepositoryUnavailableError(f"{path}: the database belongs to something else")
    if version > len(MIGRATIONS):
        raise RepositoryUnavailableError(f"{path}: schema version {version} is newer than this program")
    return version


def check_file(path: str) -> None:
    """Whether a repository could be opened there, but for a process that uses it; changes nothing. Raises
    `RepositoryUnavailableError`."""
    path = os.path.realpath(path)
    with _translated(path):
        if not os.path.exists(path):
            if not os.access(os.path.dirname(path), os.W_OK):
                raise RepositoryUnavailableError(f"{path}: cannot be created")
            return
        if not os.access(path, os.R_OK | os.W_OK):
            raise RepositoryUnavailableError(f"{path}: cannot be read and written")
        with contextlib.closing(_connect(path)) as db:
            _version(path, db)


# The tables


class _Tables:
    """What can be done in a transaction of the writing connection. Not thread-safe; times are seconds since 1970."""

    def __init__(self, db: sqlite3.Connection, retention: float, now: Callable[[], float]) -> None:
        self.db, self._retention, self._now = db, retention, now
        self._slice = min(1.0, retention / 1000) or 1.0  # times of changes are rounded up to it: the index moves less
        self.backlog: int = db.execute("SELECT count(*) FROM outbox").fetchone()[0]

    def _changed_at(self) -> float:
        return math.ceil(self._now() / self._slice) * self._slice

    def limit(self) -> float:
        """What changed at this time or before is forgotten."""
        return self._now() - self._retention if self._retention else -math.inf

    def status(self, db: sqlite3.Connection, message_id: str) -> MessageStatus:
        """The status by any connection, `NOT_FOUND` when unknown."""
        row = db.execute(STATUS, (message_id, self.limit())).fetchone() if _storable(message_id) else None
        return MessageStatus(row[0]) if row else MessageStatus.NOT_FOUND

    def insert(self, max_pending: int | None, entries: Sequence[Entry]) -> list[Exception | None]:
        """`Repository.save_all`."""
        known = dict(_execute(self.db, FINGERPRINTS, _rows(entry.message.message_id for entry in entries),
                              last=(self.limit(),)))  # fmt: skip
        room = math.inf if max_pending is None else max_pending - self.backlog
        new: list[Entry] = []
        errors: list[Exception | None] = []
        for entry in entries:
            message_id = entry.message.message_id
            if message_id in known:
                errors.append(DuplicateMessageError(message_id, known[message_id]))
            elif len(new) >= room:
                errors.append(OverloadedError("too many messages are pending"))
            else:
                known[message_id] = entry.fingerprint
                new.append(entry)
                errors.append(None)
        now, messages = self._now(), [entry.message for entry in new]
        _execute(self.db, INSERT_MESSAGES, [(entry.message.message_id, entry.fingerprint) for entry in new])
        texts = [(each.message_id, now, each.phone_number, each.message) for each in messages]
        _execute(self.db, INSERT_OUTBOX, texts)
        self.backlog += len(new)
        return errors

    def update(self, items: Sequence[tuple[str, MessageStatus | Reason]]) -> list[Exception | None]:
        """`Repository.update_all`."""
        refused: dict[str, str | None] = {}  # the status that forbids it
        waiting: list[str] = []  # in the outbox
        for update in dict.fromkeys(update for _, update in items):
            status, reason = STATUS_OF[update], update.value if isinstance(update, Reason) else None
            ids = [message_id for message_id, each in items if each is update]
            for message_id, current, forbids in _execute(self.db, NOTABLE[status], _rows(ids), last=(self.limit(),)):
                if forbids:
                    refused[message_id] = current
                else:
                    waiting.append(message_id)
            rows = _rows(each for each in ids if each not in refused)
            _execute(self.db, UPDATE_MESSAGES, rows, first=(status.value, reason, self._changed_at()))
        self._leave_outbox(waiting)
        return [_refusal(*item, refused[item[0]]) if item[0] in refused else None for item in items]

    def hand_over(self, ids: Sequence[str]) -> list[Exception | None]:
        """`Repository.handed_over`."""
        if self._leave_outbox(ids):
            _execute(self.db, HANDED_OVER, _rows(ids), first=(self._changed_at(),))
        return [None] * len(ids)

    def _leave_outbox(self, ids: Iterable[str]) -> int:
        before = self.db.total_changes
        _execute(self.db, LEAVE_OUTBOX, _rows(ids))
        left = self.db.total_changes - before
        self.backlog -= left
        return left

    def forget(self, items: Sequence[None]) -> list[float]:
        """`Repository.forget`."""
        self.db.execute(FORGET, (self.limit(), FORGET_STEP))
        oldest = self.db.execute(OLDEST_CHANGE).fetchone()[0]
        return [self._retention if oldest is None else min(self._retention, max(0.0, oldest - self.limit()))]

    def touch(self, items: Sequence[None]) -> list[None]:
        """Writes something that changes nothing."""
        self.db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        return [None]


def _refusal(message_id: str, update: MessageStatus | Reason, current: str | None) -> Exception | None:
    """Why a message with this status (None: unknown) does not get the update."""
    try:
        check_transition(message_id, MessageStatus(current or MessageStatus.NOT_FOUND), STATUS_OF[update])
    except (SmsProxyError, ValueError) as error:  # ValueError: the row makes no sense
        return error
    return None


# Writing


@dataclass(slots=True)
class _Job:
    """A change of some items that waits for the writing connection; its results, one for each, when it is done."""

    change: Callable[[Any], list[Any]]
    items: Sequence[Any]
    results: list[Any] | None = None
    error: Exception | None = None


class _Writer:
    """Group commit: of the threads that wait to write, the one that gets the connection commits for all."""

    def __init__(self, path: str, tables: _Tables) -> None:
        self._path, self._tables = path, tables
        self._incident = Incident(log, f"{path} cannot be written")
        self.damage = ""  # what was found damaged
        self._committing = threading.Lock()  # held by the thread that commits for all; guards the tables and `_closed`
        self._closed = False
        self._lock = threading.Lock()  # guards _jobs
        self._jobs: list[_Job] = []  # no more than there are threads that wait for them

    def change(self, change: Callable[[Any], list[Any]], items: Sequence[Any]) -> list[Any]:
        """Makes the change in a transaction with those of all threads that wait at the time."""
        if not items:
            return []
        job = _Job(change, items)
        with self._lock:
            self._jobs.append(job)
        with self._committing:
            if job.results is None and job.error is None:  # otherwise another thread has done it
                if self._closed:
                    raise RepositoryUnavailableError(f"{self._path}: closed")
                with self._lock:
                    jobs, self._jobs = self._jobs, []
                self._commit(jobs)
        if job.error is not None:
            raise job.error
        return job.results or []

    def change_one(self, change: Callable[[Any], list[Any]], item: Any = None) -> Any:
        """`change` for one item; raises what failed."""
        result = self.change(change, [item])[0]
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Closes the connection once no change is under way."""
        with self._committing:
            self._closed = True
            self._tables.db.close()

    def _commit(self, jobs: Sequence[_Job]) -> None:
        """Makes the jobs one transaction. One that fails by itself is tried again alone, and then its halves,
        down to the item that is to blame. What fails for all, fails all."""
        try:
            results = self._transaction(jobs)
        except sqlite3.OperationalError as error:
            self._incident.failed(error)
            for job in jobs:
                job.error = RepositoryUnavailableError(f"the database cannot be written: {error}")
        except Exception as error:
            self._commit_in_parts(jobs, error)
        else:
            self._incident.ended()
            for job, result in zip(jobs, results):
                job.results = result

    def _commit_in_parts(self, jobs: Sequence[_Job], error: Exception) -> None:
        (job, *others), middle = jobs, len(jobs[0].items) // 2
        if others:
            for each in jobs:
                self._commit([each])
        elif middle:
            job.results = []
            for items in (job.items[:middle], job.items[middle:]):  # each item gets to know what became of it
                part = _Job(job.change, items)
                self._commit([part])
                job.results += [part.error] * len(items) if part.results is None else part.results
        elif type(error) is sqlite3.DatabaseError:
            if not self.damage:  # once: every message on a bad page comes here
                log.error("%s is damaged: %s", self._path, error)
            self.damage = str(error)
            job.results = [RepositoryUnavailableError(f"the database is damaged: {error}")]
        else:
            job.results = [error]

    def _transaction(self, jobs: Sequence[_Job]) -> list[list[Any]]:
        db, backlog = self._tables.db, self._tables.backlog
        try:
            db.execute("BEGIN IMMEDIATE")
            results = [job.change(job.items) for job in jobs]
            db.execute("COMMIT")
        except BaseException:
            self._tables.backlog = backlog
            with contextlib.suppress(sqlite3.Error):  # there may be nothing left to roll back
                db.execute("ROLLBACK")
            raise
        return results


# The repository


class SqliteRepository(Repository):
    """A repository in one file, for one process at a time. Methods block until their change is on disk.

    Raises `RepositoryUnavailableError` when the file cannot be used, at once when it is made, and then
    whenever it cannot be written (the disk is full, someone else holds it); nothing is half-written,
    and the next change is tried afresh. What a damaged page makes impossible fails alone, and `check`
    tells. Times pass by `clock` from the moment the file is opened, so that a jump of the wall clock
    changes nothing; only a start reads the wall clock.
    """

    blocking = True
    durable = True

    def __init__(
        self, path: str, retention: float = RETENTION, *,
        clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._path, self._retention, self._clock = os.path.realpath(path), retention, clock
        with contextlib.ExitStack() as undo, _translated(self._path):
            self._process_lock = undo.enter_context(contextlib.closing(_lock_file(self._path)))
            db = undo.enter_context(contextlib.closing(_open(self._path)))
            # What turns our clock into seconds since 1970. Time goes on where the file left it when the wall clock was
            # set back meanwhile: otherwise its messages would wait until they are as old as the clock thinks.
            self._epoch = max(wall_clock(), db.execute(NEWEST).fetchone()[0]) - clock()
            self._tables = _Tables(db, retention, lambda: clock() + self._epoch)
            undo.pop_all()
        self._writer = _Writer(self._path, self._tables)
        self._forget_at = -math.inf  # by our clock: nothing is due before
        self._claims = threading.Lock()  # guards the next two; claims read the file under it, one at a time
        self._cursor = 0  # no message up to this seq can be claimed, but for released ones, which reset it
        self._claimed: dict[str, int] = {}  # seq by ID
        self._lock = threading.Lock()  # guards everything below
        self._readers: list[sqlite3.Connection] = []  # open and not in use
        self._closed = False

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`."""
        results = self._writer.change(functools.partial(self._tables.insert, max_pending), entries)
        now = self._clock()
        for entry in entries:
            entry.accepted_at = now
        return results

    def get(self, message_id: str) -> MessageStatus:
        """See `Repository`; the status as last acknowledged."""
        with self._reader() as db:
            return self._tables.status(db, message_id)

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        with self._reader() as db:
            limit = self._tables.limit()
            row = db.execute(STATUS, (message_id, limit)).fetchone() if _storable(message_id) else None
        return Reason(row[1]) if row and row[1] else None

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`."""
        errors: dict[str, Exception] = {
            each: UnknownMessageError(f"message {each!r} is not known") for each in updates if not _storable(each)
        }
        items = [item for item in updates.items() if item[0] not in errors]
        results = self._writer.change(self._tables.update, items)
        errors.update((message_id, error) for (message_id, _), error in zip(items, results) if error is not None)
        self._forget_claims(updates.keys() - errors.keys())
        return errors

    def claim(self, size: int, max_delay: float | None) -> Claim:
        """See `Repository`. One SELECT."""
        with self._claims, self._reader() as db:
            with contextlib.closing(db.execute(CLAIM, (self._cursor,))) as found:
                unclaimed = (row for row in found if row[1] not in self._claimed)
                rows = list(itertools.islice(unclaimed, min(size + 1, sys.maxsize)))  # one more, if only to be counted
            now = self._clock()
            age = now + self._epoch - rows[0][2] if rows else 0.0
            wait = time_to_claim(len(rows), size, age, max_delay)
            if wait != 0.0:
                return Claim(None, len(rows), wait)
            taken, waiting = rows[:size], len(rows[size:])
            self._cursor = taken[-1][0]
            self._claimed.update((row[1], row[0]) for row in taken)
        entries = [Entry(Message(phone_number, content, each), None, min(now, accepted_at - self._epoch))
                   for _, each, accepted_at, phone_number, content in taken]  # fmt: skip
        return Claim(Batch(tuple(entries)), waiting)

    def release(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._claims:
            seqs = [self._claimed.pop(message_id) for message_id in batch.ids if message_id in self._claimed]
            self._cursor = min([self._cursor, *(seq - 1 for seq in seqs)])

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`."""
        for error in self._writer.change(self._tables.hand_over, [each for each in batch.ids if _storable(each)]):
            if error is not None:  # one message's own: trying again would not help
                raise SmsProxyError(str(error)) from error
        self._forget_claims(batch.ids)

    def backlog(self) -> int:
        """See `Repository`. Never blocks."""
        return self._tables.backlog

    def oldest(self) -> float | None:
        """See `Repository`."""
        with self._reader() as db:
            row = db.execute("SELECT accepted_at FROM outbox ORDER BY seq LIMIT 1").fetchone()
        return max(0.0, self._clock() + self._epoch - row[0]) if row else None

    def size(self) -> int:
        """See `Repository`."""
        return sum(os.path.getsize(path) for path in (self._path, self._path + "-wal") if os.path.exists(path))

    def forget(self) -> float | None:
        """See `Repository`. Nothing is read or written before something may be due."""
        if not self._retention:
            return None
        wait = self._forget_at - self._clock()
        if wait <= 0:
            wait = self._writer.change_one(self._tables.forget)
            self._forget_at = self._clock() + wait
        return wait

    def check(self) -> None:
        """See `Repository`. Writes to the file."""
        if self._writer.damage:
            raise RepositoryUnavailableError(f"the database is damaged: {self._writer.damage}")
        self._writer.change_one(self._tables.touch)

    def close(self) -> None:
        """Closes the file; later calls raise `RepositoryUnavailableError`."""
        self._writer.close()
        with self._lock:
            self._closed = True
            for db in (*self._readers, self._process_lock):  # the lock last
                db.close()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for one read. The pool grows to the peak number of concurrent reads."""
        with self._lock:
            if self._closed:
                raise RepositoryUnavailableError(f"{self._path}: closed")
            db = self._readers.pop() if self._readers else None
        with _translated(self._path):
            db = db or _connect(self._path)
            try:
                yield db
            except sqlite3.DatabaseError as error:
                if type(error) is sqlite3.DatabaseError:
                    self._writer.damage = str(error)
                raise
            finally:
                with self._lock:
                    if self._closed:
                        db.close()
                    else:
                        self._readers.append(db)

    def _forget_claims(self, ids: Iterable[str]) -> None:
        with self._claims:
            for message_id in ids:
                self._claimed.pop(message_id, None)

"""The file that an SQLite repository keeps its tables in: opening, locking, migrating and checking it."""
from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator

from message_model import RepositoryUnavailableError

__all__ = ["VERSION", "SqliteFile", "check_file", "opening"]

log = logging.getLogger("smsproxy.sqlite")

APPLICATION_ID = 0x534D5350  # "SMSP": tells our files from others (SQLite manual, PRAGMA application_id)
BUSY_TIMEOUT = 5.0  # seconds to wait while someone else, say a backup, holds the file's lock
# Bytes of the write-ahead log. At 4 MB SQLite begins to use it again from its start, unless someone reads an old state.
LOG_LIMIT = 8 * 2**20
LOG_REST = 1_000  # pages of the log that may still have to be copied while writers wait: some milliseconds
# What is meant to be a database elsewhere; as a file it would get an odd name, which may hold a password.
NO_FILE = re.compile(
    r"[a-z][a-z0-9+.-]+://|(.*\s)?(host|hostaddr|port|dbname|user|password|service)\s*=", re.IGNORECASE
)
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
        place INTEGER,  -- in the outbox; NULL when it has left
        fingerprint BLOB  -- of the request, when it came with an idempotency key
    ) WITHOUT ROWID;
    CREATE TABLE outbox (
        place INTEGER PRIMARY KEY,  -- in the order of acceptance
        id TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        due REAL NOT NULL,  -- infinite: only a full batch takes it
        expires_at REAL,  -- NULL: never
        default_linger INTEGER NOT NULL,  -- whether the sender left it to us
        phone_number TEXT NOT NULL,
        content TEXT NOT NULL
    );
    CREATE TABLE webhook (  -- one row as soon as there was a webhook
        changed_at REAL NOT NULL,  -- this and `id` are a message's: what changed up to it is told, or in `body`
        id TEXT NOT NULL,
        body TEXT  -- what is being told
    );
    INSERT INTO message SELECT id, status, NULL, CASE WHEN phone_number IS NULL THEN
        coalesce(final_at, accepted_at) END, CASE WHEN phone_number IS NOT NULL THEN seq END, fingerprint
        FROM message1 ORDER BY id;
    INSERT INTO outbox SELECT seq, id, accepted_at, accepted_at, NULL, 0, phone_number, content
        FROM message1 WHERE phone_number IS NOT NULL ORDER BY seq;
    DROP TABLE message1;
    CREATE INDEX message_changed ON message (changed_at) WHERE changed_at IS NOT NULL;
    -- And place, with which every index on the outbox ends.
    CREATE INDEX outbox_due ON outbox (due);
    CREATE INDEX outbox_expiry ON outbox (expires_at) WHERE expires_at IS NOT NULL
    """,
)
VERSION = len(MIGRATIONS)  # of the schema


def check_file(path: str) -> None:
    """Whether a repository could be opened there, but for a process that uses it; changes nothing. Raises
    `RepositoryUnavailableError`."""
    path = _real(path)
    with opening(path):
        if not os.path.exists(path):
            if not os.access(os.path.dirname(path), os.W_OK):
                raise RepositoryUnavailableError(f"{path}: cannot be created")
            return
        if not os.access(path, os.R_OK | os.W_OK):
            raise RepositoryUnavailableError(f"{path}: cannot be read and written")
        # Whoever closes a file last moves its log into it, but for a connection that may not write.
        mode = "mode=ro" if os.path.exists(path + "-wal") else "immutable=1"
        with contextlib.closing(_connect(f"file:{_quoted(path)}?{mode}", uri=True)) as db:
            _version(path, db)


class SqliteFile:
    """A file that this process alone uses: one connection that writes, and a pool of others that read.

    Raises `RepositoryUnavailableError` when it is made and cannot be used. Thread-safe, but for `writer`, of
    which somebody else has to take care.
    """

    def __init__(self, path: str) -> None:
        self.path = _real(path)
        self.damage = ""  # what was found damaged
        with contextlib.ExitStack() as undo, opening(self.path):
            self._process_lock = undo.enter_context(contextlib.closing(_lock(self.path)))
            self.writer = undo.enter_context(contextlib.closing(_open(self.path)))
            undo.pop_all()
        self._lock = threading.Lock()  # guards everything below
        self._readers: list[sqlite3.Connection] = []  # open and not in use
        self._closed = False

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for one read. The pool grows to the peak number of concurrent reads."""
        with self._lock:
            if self._closed:
                raise RepositoryUnavailableError("the database is closed")
            db = self._readers.pop() if self._readers else None
        try:
            db = db or _connect(self.path)
            yield db
        except sqlite3.Error as error:
            if type(error) is sqlite3.DatabaseError:
                self.damaged(error)
            raise RepositoryUnavailableError(f"the database cannot be read: {error}") from error
        finally:
            with self._lock:
                if self._closed and db is not None:
                    db.close()
                elif db is not None:
                    self._readers.append(db)

    def damaged(self, what: object) -> None:
        """Keeps and logs that the file is damaged, the same only once: everything on a bad page comes here."""
        if str(what) != self.damage:
            log.error("%s is damaged: %s", self.path, what)
        self.damage = str(what)

    def size(self) -> int:
        """Bytes on disk."""
        return _size(self.path) + _size(self.path + "-wal")

    def log_is_long(self) -> bool:
        """Whether the write-ahead log is longer than it gets by itself: someone reads, or has read, an old state.

        The part that is not in use then holds what was erased long ago.
        """
        return _size(self.path + "-wal") > LOG_LIMIT

    def copy_log(self) -> bool:
        """Copies the log into the database, as far as readers permit; false if much is left. Writers go on."""
        with self.reader() as db:
            _, pages, copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return bool(pages - copied <= LOG_REST)

    def cut_log(self) -> None:
        """Empties the log, unless someone reads it. Uses the writer, and never waits for a reader."""
        with _translated():
            self.writer.execute("PRAGMA busy_timeout = 0")
            try:
                self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self.writer.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")

    def close(self) -> None:
        """Closes the file. The writer is not in use any more; reads that are under way end by themselves."""
        with self._lock:
            self._closed = True
            for db in (self.writer, *self._readers, self._process_lock):  # the lock last
                db.close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Errors of SQLite in our words, without the path: these reach the service's clients."""
    try:
        yield
    except sqlite3.Error as error:
        raise RepositoryUnavailableError(f"the database cannot be used: {error}") from error


@contextlib.contextmanager
def opening(path: str) -> Iterator[None]:
    """Errors as whoever starts the service reads them."""
    try:
        yield
    except sqlite3.Error as error:
        raise RepositoryUnavailableError(f"{path}: {error}") from error
    except OSError as error:
        raise RepositoryUnavailableError(f"{path}: {error.strerror}") from error


def _real(path: str) -> str:
    """The path without links; raises for one where no file can be."""
    if NO_FILE.match(path):
        raise RepositoryUnavailableError("the database is neither a path nor a URL that begins with postgresql://")
    path = os.path.realpath(path)
    if os.path.isdir(path):
        raise RepositoryUnavailableError(f"{path}: is a directory")
    if not os.path.isdir(os.path.dirname(path)):
        raise RepositoryUnavailableError(f"{path}: the directory does not exist")
    return path


def _quoted(path: str) -> str:
    """As SQLite wants it in a URI (SQLite manual, "URI Filenames")."""
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _connect(path: str, *, waits: bool = True, uri: bool = False) -> sqlite3.Connection:
    timeout = BUSY_TIMEOUT if waits else 0.0
    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False, uri=uri)


def _size(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.path.getsize(path)
    return 0


def _create_private(path: str) -> None:
    """Makes a file that does not exist yet, for its owner's eyes only; SQLite gives those beside it the same mode."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _lock(path: str) -> sqlite3.Connection:
    """Keeps other processes away for as long as this one lives, by SQLite's own lock on a file beside ours."""
    _create_private(path + ".lock")
    lock = _connect(path + ".lock", waits=False)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        why = "another process uses it" if "locked" in str(error) else f"cannot be locked: {error}"
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
        db.execute(f"PRAGMA journal_size_limit = {LOG_LIMIT}")  # cuts a longer log when it begins anew
        _migrate(db, version)
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, version: int) -> None:
    db.execute("BEGIN IMMEDIATE")
    for script in MIGRATIONS[version:]:
        for statement in script.split(";\n"):
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def _version(path: str, db: sqlite3.Connection) -> int:
    """The schema's version; raises for a file that is not ours, before anything is written to it."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and (application, version, tables) != (0, 0, 0):
        raise RepositoryUnavailableError(f"{path}: the database belongs to something else")
    if version > VERSION:
        raise RepositoryUnavailableError(f"{path}: schema version {version} is newer than this program")
    if version == 2 and not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'webhook'").fetchone():
        raise RepositoryUnavailableError(f"{path}: a development version of 0.2.0 made the database; move it away")
    return version

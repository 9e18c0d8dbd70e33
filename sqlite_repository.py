"""The durable repository: statuses and the outbox in one SQLite file, so that a 202 survives a crash.

Changes are committed in groups, with `synchronous=FULL`, so that those of many threads share one fsync. Reads use
connections of their own, which in WAL mode never wait for a writer.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from base_repository import EXPIRE_STEP, RETENTION, Ages, Cancelled, Claim, Repository
from group_commit import GroupCommit
from incident_log import Incident, counted
from message_model import (
    Batch,
    Entry,
    MessageStatus,
    Reason,
    RepositoryUnavailableError,
    SmsProxyError,
    UnknownMessageError,
)
from sqlite_changes import SqliteChanges
from sqlite_file import SqliteFile, check_file, opening
from sqlite_tables import FIRST, EpochClock, Tables, entries_at, expired_at, is_damaged, storable

__all__ = ["SqliteRepository", "check_file"]

log = logging.getLogger("smsproxy.sqlite")

CUT_PAUSE = 60.0  # seconds between two looks whether the write-ahead log can be cut back


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
        with contextlib.ExitStack() as undo:
            self._file = undo.enter_context(contextlib.closing(SqliteFile(path)))
            with opening(self._file.path):
                self._clock = EpochClock(self._file.writer, clock, wall_clock)
                self._tables = Tables(self._file.writer, self._clock, retention)
            undo.pop_all()
        self._retention = retention
        self._claims = self._tables.claims
        self._passed_over = set[int]()  # places of what is damaged, and so cannot expire
        incident = Incident(log, f"{self._file.path} cannot be written")
        self._commits = GroupCommit(self._tables, incident, self._file.damaged)
        self._forget_at = self._cut_at = -math.inf  # by our clock: neither is worth trying before

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`."""
        return self._commits.change(functools.partial(self._tables.insert, max_pending), entries)

    def save_together(self, entries: Sequence[Entry], max_pending: int | None = None) -> Exception | None:
        """See `Repository`. The whole list is one item of a group commit: it is never divided."""
        return self._commits.change(functools.partial(self._tables.insert_together, max_pending), [entries])[0]

    def get(self, message_id: str) -> MessageStatus:
        """See `Repository`; the status as last acknowledged."""
        with self._file.reader() as db:
            return self._tables.status(db, message_id)[0]

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        with self._file.reader() as db:
            return self._tables.status(db, message_id)[1]

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`."""
        errors: dict[str, Exception] = {
            each: UnknownMessageError(f"message {each!r} is not known") for each in updates if not storable(each)
        }
        items = [item for item in updates.items() if item[0] not in errors]
        results = self._commits.change(self._tables.update, items)
        errors.update((item[0], error) for item, error in zip(items, results, strict=True) if error is not None)
        return errors

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
        """See `Repository`."""
        with self._file.reader() as db:
            keys, claim = self._claims.take(db, size, self._clock.now(), horizon, flush)
            if not keys:
                return claim
            try:
                entries = entries_at(db, keys, self._clock)
            except BaseException:
                damaged = [key for key in keys if is_damaged(db, key, self._clock)]
                self._claims.release(int(key[1]) for key in keys if key not in damaged)
                if not damaged:
                    raise
                # They stay claimed for as long as this process lives, or all others would wait behind them.
                self._file.damaged(f"{counted(len(damaged), 'message')} cannot be read from the outbox, so not sent")
                return Claim(None, claim.waiting + len(keys) - len(damaged), 0.0)
        if len(entries) < len(keys):  # some were reported on meanwhile, perhaps the one that was due: look again
            self._claims.release(entry.place for entry in entries)
            return Claim(None, claim.waiting + len(entries), 0.0)
        return Claim(Batch(tuple(entries)), claim.waiting)

    def release(self, batch: Batch) -> None:
        """See `Repository`. Never blocks for long."""
        self._claims.release(entry.place for entry in batch.entries)

    def unsent(self, batch: Batch) -> Batch:
        """See `Repository`."""
        claimed = self._claims.claimed(entry.place for entry in batch.entries)
        return batch if len(claimed) == len(batch) else batch.only(lambda entry: entry.place in claimed)

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`."""
        entries = [entry for entry in batch.entries if storable(entry.message.message_id)]
        for error in self._commits.change(self._tables.hand_over, entries):
            if error is not None:  # one message's own: trying again would not help
                raise SmsProxyError(str(error)) from error

    def cancel(self, message_id: str) -> Cancelled | None:
        """See `Repository`."""
        return self._commits.change_one(self._tables.cancel, message_id) if storable(message_id) else None

    def expire(self) -> tuple[list[str], float]:
        """See `Repository`. Writes only if something is past its expiry."""
        now = self._clock.now()
        with self._file.reader() as db:
            places, following = expired_at(db, self._claims, now, self._passed_over)
        results = self._commits.change(self._tables.expire, places)
        ids = [each for each in results if isinstance(each, str)]
        if len(places) == EXPIRE_STEP:  # others may be behind them
            failed = zip(places, results, strict=True)
            self._passed_over.update(place for place, each in failed if isinstance(each, Exception))
        for error in results:
            if isinstance(error, Exception) and not ids:
                raise error
        return ids, max(0.0, following - now)

    def hasten(self, max_delay: float) -> None:
        """See `Repository`. Goes through the whole outbox; when a page of it is damaged, nothing is brought forward."""
        self._commits.change(self._tables.hasten, [max_delay])
        with self._file.reader() as db:
            self._claims.start_over(db)

    def backlog(self) -> int:
        """See `Repository`. Never blocks."""
        return self._claims.backlog

    def ages(self) -> Ages:
        """See `Repository`."""
        with self._file.reader() as db:
            accepted_at, due = db.execute(FIRST).fetchone()
        now = self._clock.now()
        return Ages() if due is None else Ages(max(0.0, now - accepted_at), max(0.0, now - due))

    def changes(self) -> SqliteChanges:
        """See `Repository`. Nothing more is written for a change with it than without."""
        return SqliteChanges(self._file, self._commits, self._tables, self._clock, self._retention)

    def size(self) -> int:
        """See `Repository`."""
        return self._file.size()

    def forget(self) -> float | None:
        """See `Repository`. Nothing is read or written before something may be due."""
        wait = self._cut_log()
        if self._retention:
            if self._forget_at <= self._clock.monotonic():
                self._forget_at = self._clock.monotonic() + self._commits.change_one(self._tables.forget, None)
            wait = min(wait, self._forget_at - self._clock.monotonic())
        return None if wait == math.inf else max(0.0, wait)

    def check(self) -> None:
        """See `Repository`. Writes to the file."""
        if self._file.damage:
            raise RepositoryUnavailableError(f"the database is damaged: {self._file.damage}")
        self._commits.change_one(self._tables.rewrite, None)

    def close(self) -> None:
        """Closes the file; later calls raise `RepositoryUnavailableError`."""
        self._commits.close()
        self._file.close()

    def _cut_log(self) -> float:
        """Cuts the write-ahead log back once nobody reads an old state any more; returns the seconds until it is to be
        tried again, infinity for never."""
        now = self._clock.monotonic()
        if not self._file.log_is_long():
            return math.inf
        if now >= self._cut_at:
            self._cut_at = now + CUT_PAUSE
            if self._file.copy_log():
                with self._commits.paused():
                    self._file.cut_log()
        return self._cut_at - now if self._file.log_is_long() else math.inf

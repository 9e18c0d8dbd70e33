"""The changes that the shop has not been told of, in SQLite: a cursor in the order of what changed.

A change is not written down twice. Each message has the time of its last change, which is rounded up to the end of a
slice of a second at the most, and an index has the messages in order of (time, ID). In this order goes the cursor.

- A slice is closed when whatever changes from now on gets a later time: nothing comes into it any more. The cursor
  moves in closed slices alone, so it passes nothing that is still to be told.
- A message that changes again gets a later time, so it comes after the cursor again, with its newer status.
- A body, and the cursor after the last message in it, are stored in one transaction, before the body is sent. The body
  stays until the receiver took it.

Which slices are closed is decided while no transaction is under way, and they are read after that. Otherwise a reader
could take a slice for closed before it sees what a transaction that began earlier is just putting into it. The reading
itself keeps no writer waiting.
"""
from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from batch_outbox import Claim
from change_outbox import Change, ChangeBody, ChangeOutbox
from group_commit import GroupCommit
from message_model import MessageStatus, Reason
from sqlite_file import SqliteFile
from sqlite_tables import EpochClock, Tables

__all__ = ["SqliteChanges"]

# What a row may hold; one that makes no sense is passed over.
STATUSES = {status.value: status for status in (MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED)}
REASONS = {reason.value: reason for reason in Reason}
STEP = 1_000  # rows that are read for one body at the most: some milliseconds
COUNTED = 10_000  # rows that are counted one by one; of more, the number is estimated
MOMENT = 0.001  # seconds after its end when a slice is looked at

AFTER = "FROM message WHERE changed_at IS NOT NULL AND (changed_at, id) > (?, ?)"
CLOSED = f"SELECT changed_at, id, status, reason {AFTER} AND changed_at < ? ORDER BY changed_at, id LIMIT {STEP}"
NEXT = f"SELECT changed_at {AFTER} ORDER BY changed_at, id LIMIT 1"
FIRST_ROWS = f"SELECT CASE WHEN status <> 'ACCEPTED' THEN changed_at END AS at {AFTER} ORDER BY changed_at, id"
PENDING = f"SELECT count(*), count(at), min(at) FROM ({FIRST_ROWS} LIMIT {COUNTED})"
ROWS = f"SELECT count(*) {AFTER}"
LOAD = "SELECT changed_at, id, body FROM webhook"
BEGIN = "INSERT INTO webhook (changed_at, id) VALUES (?, ?)"
STORE = "UPDATE webhook SET changed_at = ?, id = ?, body = ?"
TOLD = "UPDATE webhook SET body = NULL"


@dataclass(frozen=True, slots=True)
class _State:
    """How far the shop was told."""

    cursor: tuple[float, str]  # time and ID of a message: what changed up to it is told, or in the body
    body: ChangeBody | None = None  # made and not handed over
    since: float = 0.0  # the time of the body's first message; these are seconds since 1970
    until: float = 0.0  # and of its last one


class SqliteChanges(ChangeOutbox):
    """The outbox of changes of an `SqliteRepository`. Makes bodies from closed slices alone, also in a flush."""

    durable = True

    def __init__(
        self, file: SqliteFile, commits: GroupCommit, tables: Tables, clock: EpochClock, retention: float
    ) -> None:
        self._file, self._commits, self._tables, self._clock = file, commits, tables, clock
        self._retention = retention or math.inf
        self._lock = threading.Lock()  # guards the two below
        self._under_way = False  # whether a body is claimed, or somebody looks for one: nobody else moves the cursor
        self._state = commits.change_one(self._load, None)

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[ChangeBody]:
        """See `ChangeOutbox`. Writes only if there is a body."""
        with self._lock:
            if self._under_way:
                return Claim()
            self._under_way = True
        claim: Claim[ChangeBody] = Claim()
        try:
            claim = self._look(size)
        finally:
            if claim.batch is None:
                with self._lock:
                    self._under_way = False
        return claim

    def handed_over(self, body: ChangeBody) -> None:
        """See `ChangeOutbox`."""
        with self._lock:
            state = self._state
        if state.body == body:
            self._commits.change_one(self._forget_body, None)
            with self._lock:
                self._state, self._under_way = _State(state.cursor), False

    def release(self, body: ChangeBody, /) -> None:
        """See `ChangeOutbox`. Never blocks."""
        with self._lock:
            if self._state.body == body:
                self._under_way = False

    def pending(self) -> tuple[int, float]:
        """See `ChangeOutbox`. Beyond `COUNTED` messages, the number is an estimate."""
        with self._lock:
            state = self._state
        cursor = self._after(state)
        with self._file.reader() as db:
            rows, number, since = db.execute(PENDING, cursor).fetchone()
            if rows == COUNTED:  # the rest has as many that were handed over and not reported on
                number = number * db.execute(ROWS, cursor).fetchone()[0] // rows
        if state.body is not None:
            number, since = number + len(state.body), state.since
        return number, 0.0 if since is None else max(0.0, self._clock.now() - since)

    def _look(self, size: int) -> Claim[ChangeBody]:
        while (body := self._state.body) is None:
            with self._commits.paused():  # what changed before is committed, and what changes later is not before this
                limit = self._tables.changed_at()
            with self._file.reader() as db:
                found = db.execute(NEXT, self._state.cursor).fetchone()
                if found is None:
                    return Claim()
                if found[0] >= limit:
                    return Claim(None, 1, max(0.0, found[0] - self._clock.now()) + MOMENT)
                state, text = self._read(db, size, limit)
            if text is not None:
                self._commits.change_one(self._store, (*state.cursor, text))
            with self._lock:
                self._state = state
        return Claim(body, 1)  # how many more there are would have to be counted

    def _read(self, db: sqlite3.Connection, size: int, limit: float) -> tuple[_State, str | None]:
        """Where the cursor is after the next messages before `limit`; with a body, and as what it is stored, if some of
        them are to be told. Without one, nothing is stored: the next process finds the same."""
        cursor, rows = self._after(self._state), []
        with contextlib.closing(db.execute(CLOSED, (*cursor, limit))) as found:
            for changed_at, message_id, status, reason in found:
                cursor = changed_at, message_id
                if status in STATUSES:  # otherwise it was handed over
                    rows.append((changed_at, message_id, status, reason))
                if len(rows) == size:
                    break
        if not rows:
            return _State(cursor), None
        since, until = rows[0][0], rows[-1][0]
        made = ChangeBody.made([_change(*row[1:]) for row in rows], self._clock.wall(), 0.0)
        text = json.dumps([made.id, made.timestamp, since, until, [row[1:] for row in rows]])
        return _State(cursor, self._body(made, until), since, until), text

    def _after(self, state: _State) -> tuple[float, str]:
        """The cursor, but for what is forgotten."""
        return max(state.cursor, (self._tables.forgotten(), ""))

    def _body(self, made: ChangeBody, until: float) -> ChangeBody:
        """The body, with its end."""
        return ChangeBody(made.id, made.timestamp, made.changes, until + self._retention - self._clock.epoch)

    # In the writer's transaction

    def _load(self, items: Sequence[None]) -> list[_State]:
        found = self._file.writer.execute(LOAD).fetchone()
        if found is None:  # the first webhook: it tells of what changes from now on
            cursor = math.nextafter(self._tables.changed_at(), 0.0), ""
            self._file.writer.execute(BEGIN, cursor)
            return [_State(cursor)]
        changed_at, message_id, text = found
        if text is None:
            return [_State((changed_at, message_id))]
        body_id, timestamp, since, until, rows = json.loads(text)
        changes = tuple(_change(*row) for row in rows)
        body = self._body(ChangeBody(body_id, timestamp, changes), until)
        return [_State((changed_at, message_id), body, since, until)]

    def _store(self, bodies: Sequence[tuple[float, str, str]]) -> list[None]:
        return [self._file.writer.execute(STORE, body).fetchone() for body in bodies]

    def _forget_body(self, items: Sequence[None]) -> list[None]:
        self._file.writer.execute(TOLD)
        return [None]


def _change(message_id: str, status: str, reason: str | None) -> Change:
    return Change(message_id, STATUSES[status], REASONS.get(reason or ""))

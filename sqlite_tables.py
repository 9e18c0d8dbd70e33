"""The tables of an SQLite repository, and what is done with them in a transaction: statements of several rows."""
from __future__ import annotations

import contextlib
import functools
import math
import sqlite3
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from base_repository import EXPIRE_STEP, FORGET_STEP, Cancelled
from fastsmsing import Message
from message_model import (
    STATUS_OF,
    TRANSITIONS,
    DuplicateMessageError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    refusal,
)
from sqlite_claims import Key, OutboxClaims
from sqlite_file import VERSION

__all__ = ["EpochClock", "Tables", "entries_at", "expired_at", "is_damaged", "storable"]

# Rows of one statement. A statement for each row would hand the interpreter's lock over each time, and one for every
# number of rows would be prepared too often.
SIZES = (1, 2, 4, 8, 16, 32, 64, 100)
COLUMNS = "place, id, accepted_at, due, expires_at, default_linger, phone_number, content"

# Statements of several rows: `{rows}` stands for their parameters. A missing row is NULL, which equals no ID.
INSERT_MESSAGES = """
    INSERT INTO message (id, status, place, fingerprint)
    SELECT column1, 'ACCEPTED', column2, column3 FROM (VALUES {rows}) WHERE column1 IS NOT NULL
    ON CONFLICT (id) DO UPDATE
    SET status = 'ACCEPTED', reason = NULL, changed_at = NULL, place = excluded.place,
    fingerprint = excluded.fingerprint WHERE changed_at <= ?
"""
UNDO_MESSAGES = "DELETE FROM message WHERE id IN ({rows}) AND place > ?"
INSERT_OUTBOX = f"INSERT INTO outbox ({COLUMNS}) SELECT * FROM (VALUES {{rows}}) WHERE column1 IS NOT NULL"
_BEFORE = {  # the statuses that may lead to a status
    status: ", ".join(f"'{before.value}'" for before, after in TRANSITIONS.items() if status in after) or "''"
    for status in MessageStatus
}
_FORBIDDEN: Mapping[MessageStatus | Reason, str] = {  # which messages do not get an update
    **{status: f"status NOT IN ({_BEFORE[status]})" for status in MessageStatus},
    **dict.fromkeys(Reason, "changed_at IS NOT NULL"),
}
NOTABLE = {  # by the update that is wanted: what is unknown, in the outbox, or not allowed to get it
    update: f"""
    SELECT column1, place, status, status IS NULL OR {forbidden} FROM (VALUES {{rows}})
    LEFT JOIN message ON id = column1 AND (changed_at IS NULL OR changed_at > ?)
    WHERE column1 IS NOT NULL AND (changed_at IS NULL OR {forbidden})
    """
    for update, forbidden in _FORBIDDEN.items()
}
UPDATE_MESSAGES = "UPDATE message SET status = ?, reason = ?, changed_at = ?, place = NULL WHERE id IN ({rows})"
LEAVE_OUTBOX = "DELETE FROM outbox WHERE place IN ({rows})"
# An ID that was forgotten meanwhile and accepted anew has a later place than all of its old batch.
HANDED_OVER = "UPDATE message SET changed_at = ?, place = NULL WHERE id IN ({rows}) AND place <= ?"
FINGERPRINTS = "SELECT id, fingerprint FROM message WHERE id IN ({rows}) AND (changed_at IS NULL OR changed_at > ?)"
AT = f"SELECT {COLUMNS} FROM outbox WHERE place IN ({{rows}})"

# Statements of one row.
STATUS = "SELECT status, reason FROM message WHERE id = ? AND (changed_at IS NULL OR changed_at > ?)"
KEY = "SELECT due, place FROM outbox WHERE place = (SELECT place FROM message WHERE id = ?)"
EXPIRING = "SELECT expires_at, place FROM outbox WHERE expires_at IS NOT NULL ORDER BY expires_at"
WAITING = "SELECT id, due FROM outbox WHERE place = ?"
HASTEN = "UPDATE outbox SET due = accepted_at + ? WHERE default_linger AND due > accepted_at + ?"
FORGET = "DELETE FROM message WHERE id IN (SELECT id FROM message WHERE changed_at <= ? ORDER BY changed_at LIMIT ?)"
FIRST_CHANGE = "SELECT min(changed_at) FROM message WHERE changed_at IS NOT NULL"
FIRST = """
    SELECT (SELECT accepted_at FROM outbox ORDER BY place LIMIT 1), (SELECT due FROM outbox ORDER BY due LIMIT 1)
"""
LAST_TIME = """
    SELECT max(coalesce((SELECT accepted_at FROM outbox ORDER BY place DESC LIMIT 1), 0),
    coalesce((SELECT max(changed_at) FROM message WHERE changed_at IS NOT NULL), 0),
    coalesce((SELECT changed_at + 0.001 FROM webhook), 0))
"""  # what changes from now on comes after the webhook's cursor


class EpochClock:
    """A process's monotonic clock, and what turns it into seconds since 1970, which is what the file holds."""

    def __init__(self, db: sqlite3.Connection, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self.monotonic, self.wall = clock, wall_clock
        # Time goes on where the file left it when the wall clock was set back meanwhile: otherwise its messages would
        # wait until they are as old as the clock thinks.
        self.epoch: float = max(wall_clock(), db.execute(LAST_TIME).fetchone()[0]) - clock()

    def now(self) -> float:
        """Seconds since 1970. A jump of the wall clock changes nothing here."""
        return self.monotonic() + self.epoch


@dataclass(slots=True)
class _Change:
    """What a transaction does to the outbox."""

    saved: list[Key] = field(default_factory=list)
    left: list[int] = field(default_factory=list)  # places, also of what had left before
    leaving: int = 0  # how many did leave
    reserved: list[int] = field(default_factory=list)  # places


class Tables:
    """The transactions of the writing connection, and the changes to be made in them. Not thread-safe.

    Each change takes a sequence of items, and returns a result for each.
    """

    def __init__(self, db: sqlite3.Connection, clock: EpochClock, retention: float) -> None:
        self._db, self._clock, self._retention = db, clock, retention
        self._slice = min(1.0, retention / 1000) or 1.0  # times of changes are rounded up to it: the index moves less
        backlog = db.execute("SELECT count(*) FROM outbox").fetchone()[0]  # by itself, SQLite counts pages
        self._last_place: int = db.execute("SELECT coalesce(max(place), 0) FROM outbox").fetchone()[0]
        self.claims = OutboxClaims(backlog, self._last_place)
        self._change = _Change()

    def status(self, db: sqlite3.Connection, message_id: str) -> tuple[MessageStatus, Reason | None]:
        """Status and reason by any connection, `NOT_FOUND` when unknown."""
        row = db.execute(STATUS, (message_id, self.forgotten())).fetchone() if storable(message_id) else None
        return (MessageStatus(row[0]), Reason(row[1]) if row[1] else None) if row else (MessageStatus.NOT_FOUND, None)

    def changed_at(self) -> float:
        """The time of a change that is made now: the end of its slice. Never less than at an earlier call."""
        return math.ceil(self._clock.now() / self._slice) * self._slice

    def forgotten(self) -> float:
        """What changed at this time or before is forgotten."""
        return self._clock.now() - self._retention if self._retention else -math.inf

    # Transactions

    def begin(self) -> None:
        """See `Transactions`."""
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """See `Transactions`."""
        self._db.execute("COMMIT")
        change, self._change = self._change, _Change()
        self.claims.publish(change.saved, change.left, change.leaving)

    def rollback(self) -> None:
        """See `Transactions`."""
        change, self._change = self._change, _Change()
        self.claims.release(change.reserved)
        with contextlib.suppress(sqlite3.Error):  # there may be nothing left to roll back
            self._db.execute("ROLLBACK")

    # Changes

    def insert(self, max_pending: int | None, entries: Sequence[Entry]) -> list[Exception | None]:
        """`Repository.save_all`."""
        room = self._room(max_pending)
        if len(entries) <= room and self._insert(entries):  # which is nearly always so
            return [None] * len(entries)
        known = self._known(entries)
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
        self._insert(new)
        return errors

    def insert_together(self, max_pending: int | None, lists: Sequence[Sequence[Entry]]) -> list[Exception | None]:
        """`Repository.save_together` for each of the lists."""
        return [self._insert_whole(max_pending, entries) for entries in lists]

    def update(self, items: Sequence[tuple[str, MessageStatus | Reason]]) -> list[Exception | None]:
        """`Repository.update_all`."""
        refused: dict[str, str | None] = {}  # the status that forbids it
        for update in dict.fromkeys(update for _, update in items):
            status, reason = STATUS_OF[update], update.value if isinstance(update, Reason) else None
            ids = [message_id for message_id, each in items if each is update]
            found = _execute(self._db, NOTABLE[update], _rows(ids), last=(self.forgotten(),))
            refused.update((message_id, current) for message_id, _, current, forbids in found if forbids)
            rows = _rows(each for each in ids if each not in refused)
            _execute(self._db, UPDATE_MESSAGES, rows, first=(status.value, reason, self.changed_at()))
            self._leave_outbox(LEAVE_OUTBOX, [(row[1],) for row in found if not row[3]], [row[1] for row in found])
        return [_refusal(*item, refused[item[0]]) if item[0] in refused else None for item in items]

    def hand_over(self, entries: Sequence[Entry]) -> list[None]:
        """`Repository.handed_over`."""
        places = [entry.place for entry in entries]
        if self._leave_outbox(LEAVE_OUTBOX, [(place,) for place in places], places):
            rows = _rows(entry.message.message_id for entry in entries)
            _execute(self._db, HANDED_OVER, rows, first=(self.changed_at(),), last=(max(places),))
        return [None] * len(entries)

    def cancel(self, ids: Sequence[str]) -> list[Cancelled | None]:
        """`Repository.cancel`."""
        return list(map(self._cancel, ids))

    def _cancel(self, message_id: str) -> Cancelled | None:
        if any(self._reserve(key) for key in self._db.execute(KEY, (message_id,)).fetchall()):
            self.update([(message_id, Reason.CANCELLED)])
            return Cancelled.NOW
        return Cancelled.BEFORE if self.status(self._db, message_id)[1] is Reason.CANCELLED else None

    def expire(self, places: Sequence[int]) -> list[str | None]:
        """`Repository.expire` for the messages at these places: their IDs, but for those that do not wait any more."""
        found = [self._db.execute(WAITING, (place,)).fetchone() for place in places]
        rows = zip(places, found, strict=True)
        ids = [row[0] if row and self._reserve((row[1], place)) else None for place, row in rows]
        self.update([(message_id, Reason.EXPIRED) for message_id in ids if message_id is not None])
        return ids

    def hasten(self, delays: Sequence[float]) -> list[None]:
        """`Repository.hasten`."""
        return [self._db.execute(HASTEN, (delay, delay)).fetchone() for delay in delays]

    def forget(self, items: Sequence[None]) -> list[float]:
        """`Repository.forget`."""
        limit = self.forgotten()
        self._db.execute(FORGET, (limit, FORGET_STEP))
        first = self._db.execute(FIRST_CHANGE).fetchone()[0]
        return [self._retention if first is None else min(self._retention, max(0.0, first - limit))]

    def rewrite(self, items: Sequence[None]) -> list[None]:
        """Writes to the file what it holds already."""
        self._db.execute(f"PRAGMA user_version = {VERSION}")
        return [None]

    def _room(self, max_pending: int | None) -> float:
        """For how many messages there is room."""
        backlog = self.claims.backlog + len(self._change.saved) - self._change.leaving
        return math.inf if max_pending is None else max_pending - backlog

    def _known(self, entries: Sequence[Entry]) -> dict[str, bytes | None]:
        """The fingerprints of those of the messages that are stored already, by ID."""
        ids = _rows(entry.message.message_id for entry in entries)
        return dict(_execute(self._db, FINGERPRINTS, ids, last=(self.forgotten(),)))

    def _insert_whole(self, max_pending: int | None, entries: Sequence[Entry]) -> Exception | None:
        if len(entries) <= self._room(max_pending) and self._insert(entries):
            return None
        known = self._known(entries)
        for entry in entries:
            message_id = entry.message.message_id
            if message_id in known:
                return DuplicateMessageError(message_id, known[message_id])
            known[message_id] = entry.fingerprint
        return OverloadedError("too many messages are pending")

    def _insert(self, entries: Sequence[Entry]) -> bool:
        """Stores the entries; false if one of them is known already, and then stores none."""
        now, epoch, never = self._clock.monotonic(), self._clock.epoch, math.inf
        accepted_at, messages, outbox, saved = now + epoch, [], [], []
        for place, entry in enumerate(entries, self._last_place + 1):
            message, linger, max_age = entry.message, entry.linger, entry.max_age
            entry.place, entry.accepted_at, entry.due, entry.expires_at = place, now, now + linger, now + max_age
            due, expires_at = entry.due + epoch, None if max_age == never else entry.expires_at + epoch
            messages.append((message.message_id, place, entry.fingerprint))
            outbox.append((place, message.message_id, accepted_at, due, expires_at, entry.default_linger,
                           message.phone_number, message.message))  # fmt: skip
            saved.append((due, place))
        before = self._db.total_changes
        _execute(self._db, INSERT_MESSAGES, messages, last=(self.forgotten(),))
        if self._db.total_changes - before < len(messages):
            _execute(self._db, UNDO_MESSAGES, _rows(row[0] for row in messages), last=(self._last_place,))
            return False
        _execute(self._db, INSERT_OUTBOX, outbox)
        self._last_place += len(entries)
        self._change.saved += saved
        return True

    def _leave_outbox(self, sql: str, rows: Sequence[Sequence[Any]], places: Iterable[int]) -> int:
        before = self._db.total_changes
        _execute(self._db, sql, rows)
        left = self._db.total_changes - before
        self._change.leaving += left
        self._change.left += places
        return left

    def _reserve(self, key: Key) -> bool:
        """Keeps a message that waits from being claimed, in this transaction; false if it is claimed already."""
        if not self.claims.reserve(key):
            return False
        self._change.reserved.append(int(key[1]))
        return True



def entries_at(db: sqlite3.Connection, keys: Iterable[Key], clock: EpochClock) -> list[Entry]:
    """The messages in the outbox with these keys, in their order; those that have left are missing."""
    rows = {row[0]: row for row in _execute(db, AT, [(place,) for _, place in keys])}
    return [_entry(rows[place], clock) for _, place in keys if place in rows]


def expired_at(
    db: sqlite3.Connection, claims: OutboxClaims, now: float, damaged: Container[int]
) -> tuple[list[int], float]:
    """Where the first messages are that wait and have expired, and when the next one does; those that are damaged are
    passed over. Reads an index alone."""
    places = list[int]()
    with contextlib.closing(db.execute(EXPIRING)) as found:
        for expires_at, place in found:
            if expires_at > now or len(places) == EXPIRE_STEP:
                return places, expires_at
            if place not in damaged and not claims.claimed([place]):
                places.append(place)
    return places, math.inf


def is_damaged(db: sqlite3.Connection, key: Key, clock: EpochClock) -> bool:
    """Whether a damaged page or row keeps the message from being read."""
    try:
        entries_at(db, [key], clock)
    except (sqlite3.Error, TypeError) as error:
        # A disk that cannot be read and a lock are operational errors, too. This one's text quotes the message.
        return not isinstance(error, sqlite3.OperationalError) or "Could not decode" in str(error)
    return False


def storable(message_id: str) -> bool:
    """Whether the ID can be in a file: a lone surrogate cannot be encoded."""
    try:
        message_id.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(row: Sequence[Any], clock: EpochClock) -> Entry:
    place, message_id, accepted_at, due, expires_at, default_linger, phone_number, content = row
    max_age = math.inf if expires_at is None else round(expires_at - accepted_at, 6)
    epoch = clock.epoch
    accepted = accepted_at - epoch
    return Entry(
        Message(phone_number, content, message_id), None, round(due - accepted_at, 6), bool(default_linger), max_age,
        accepted, due - epoch, accepted + max_age, place,
    )  # fmt: skip


def _refusal(message_id: str, update: MessageStatus | Reason, current: str | None) -> Exception:
    """Why a message with this status (None: unknown) does not get the update."""
    try:
        return refusal(message_id, MessageStatus(current or MessageStatus.NOT_FOUND), update)
    except ValueError as error:  # the row makes no sense
        return error


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

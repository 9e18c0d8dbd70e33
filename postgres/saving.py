"""How messages get into the shared outbox."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from message_model import DuplicateMessageError, Entry, OverloadedError, ValidationError

from .backlog import Backlog
from .connections import Database
from .statements import KNOWN, SAVE, SAVE_TOGETHER, columns

__all__ = ["Saving", "storable"]

TRIES = 3  # for a list whose messages are known in one statement and forgotten in the next


class Saving:
    """Saves groups and lists of messages, each in one statement. Thread-safe."""

    def __init__(
        self, database: Database, backlog: Backlog, retention: float | None, clock: Callable[[], float]
    ) -> None:
        self._database, self._backlog, self._retention, self._clock = database, backlog, retention, clock

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """`Repository.save_all`. One statement, and a second one if not all could be saved."""
        fresh: dict[str, Entry] = {}
        for entry in filter(lambda entry: storable(entry.message.message_id), entries):
            fresh.setdefault(entry.message.message_id, entry)  # of those with one ID the first counts
        known: dict[str, bytes | None] = {}
        room = len(fresh) if max_pending is None else self._room(len(fresh), max_pending)
        if room < len(fresh):  # those that are known are told so, however full it is
            known = self._known(fresh)
            fresh = dict([item for item in fresh.items() if item[0] not in known][:room])
        saved, again = self._insert(SAVE, list(fresh.values())) if fresh else (set(), False)
        if missing := fresh.keys() - saved:
            found = self._known(missing)
            if again:
                saved |= _saved_before({each: fresh[each] for each in missing}, found)
            known.update(found)
        known.update((each, fresh[each].fingerprint) for each in saved)
        _stamp(entries, self._clock())
        errors: list[Exception | None] = []
        for entry in entries:
            message_id = entry.message.message_id
            ours = message_id in saved and fresh[message_id] is entry
            errors.append(None if ours else _not_saved(message_id, known))
        return errors

    def save_together(self, entries: Sequence[Entry], max_pending: int | None = None) -> Exception | None:
        """`Repository.save_together`. One statement, and a second one if nothing could be saved."""
        fresh: dict[str, Entry] = {}
        for entry in entries:
            message_id = entry.message.message_id
            if not storable(message_id) or message_id in fresh:
                return _not_saved(message_id, {each: one.fingerprint for each, one in fresh.items()})
            fresh[message_id] = entry
        room = max_pending is None or self._room(len(fresh), max_pending) >= len(fresh)
        for _ in range(TRIES if fresh else 0):
            saved, again = self._insert(SAVE_TOGETHER, entries) if room else (set(), False)
            known = {} if saved else self._known(fresh)
            if saved or (again and _saved_before(fresh, known) == fresh.keys()):
                _stamp(entries, self._clock())
                return None
            if duplicate := next(filter(known.__contains__, fresh), None):
                return DuplicateMessageError(duplicate, known[duplicate])
            if not room:
                break
        return OverloadedError("too many messages are pending") if fresh else None

    def _room(self, wanted: int, max_pending: int) -> int:
        """How many of so many messages may be saved."""
        room = max_pending - self._backlog.get().pending
        if room < wanted:  # others may have handed over a lot since the last count
            room = max_pending - self._backlog.recount().pending
        return max(0, room)

    def _insert(self, statement: str, entries: Sequence[Entry]) -> tuple[set[str], bool]:
        self._backlog.add(len(entries), len(entries))  # at once: others are saving, too
        saved: set[str] = set()
        try:
            rows, again = self._database.run_again(lambda again: (statement, (*columns(entries), self._retention)))
            saved = {row[0] for row in rows}
        finally:
            self._backlog.add(len(saved) - len(entries), len(saved) - len(entries))
        return saved, again

    def _known(self, ids: Any) -> dict[str, bytes | None]:
        return dict(self._database.run(KNOWN, (sorted(ids), self._retention)))


def storable(message_id: str) -> bool:
    """Whether a text column can hold the ID: neither NUL nor a lone surrogate."""
    try:
        return b"\0" not in message_id.encode()
    except UnicodeEncodeError:
        return False


def _stamp(entries: Sequence[Entry], now: float) -> None:
    for entry in entries:
        entry.accepted_at, entry.due, entry.expires_at = now, now + entry.linger, now + entry.max_age


def _saved_before(entries: Mapping[str, Entry], known: Mapping[str, bytes | None]) -> set[str]:
    """What the first try of a statement saved whose answer was lost: what had no key got an ID that nobody can have
    used before."""
    return {each for each, entry in entries.items() if (known.get(each, b""), entry.fingerprint) == (None, None)}


def _not_saved(message_id: str, known: Mapping[str, bytes | None]) -> Exception:
    """Why an entry was not saved; `known` has the fingerprints of those that are stored by now."""
    if message_id in known:
        return DuplicateMessageError(message_id, known[message_id])
    if not storable(message_id):
        return ValidationError("message_id", "must not contain NUL or lone surrogates")
    return OverloadedError("too many messages are pending")

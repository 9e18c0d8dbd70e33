"""The domain: accept messages, batch them, hand them to FastSMSing, follow what becomes of them.

`SmsProxy` is the facade. A `Repository` keeps statuses and the outbox, the messages not yet handed
over. The outbox is the queue: the senders of a `SimpleBatchingClient` claim batches from it, and a
`StatusUpdater` applies FastSMSing's delivery reports. Nothing here knows of HTTP, flags or files.
"""
from __future__ import annotations

import abc
import bisect
import contextlib
import functools
import hashlib
import itertools
import logging
import math
import os
import queue
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import fastsmsing
from fastsmsing import FastSmsingClient, Message, RejectedError

__all__ = [
    "Batch", "CircuitBreaker", "Claim", "ClientResult", "ClientStatistics", "ClosedError", "DuplicateMessageError",
    "Entry", "FAMILIES", "FINAL_STATUSES", "Family", "IdempotencyError", "InMemoryRepository", "Incident",
    "MessageStatus", "Metrics", "OverloadedError", "Reason", "Repository", "RepositoryUnavailableError", "SendMessage",
    "SendingResult", "SimpleBatchingClient", "SmsProxy", "SmsProxyConfig", "SmsProxyError", "Statistics",
    "StatusTransitionError", "StatusUpdateError", "StatusUpdater", "TRANSITIONS", "UnknownMessageError",
    "UnknownStatusError", "ValidationError", "check_transition", "describe", "map_to_internal_status",
]  # fmt: skip

log = logging.getLogger("smsproxy")

RESULTS_WAITING = 1_000  # results a slow statistics sink may be behind before the newest are dropped
UPDATES_WAITING = 10_000  # delivery reports the provider may be ahead of us before it has to wait
UPDATES_AT_ONCE = 500  # statuses in one transaction, or some more: it holds up those who accept messages
ERRORS_WAITING = 1_000  # failed updates kept for whoever reads `StatusUpdater.errors`
LONGEST_WAIT = 3_600.0  # seconds; bounds what a provider can ask for with `retry_after`
DRAIN_TIMEOUT = 10.0  # seconds that leaving the context manager may take
DRAIN_BACKOFF = 1.0  # seconds; longest backoff during a drain, whose time is short
GRACE = 1.0  # seconds that the last steps of a stop get even when its deadline has passed
REPOSITORY_RETRY = 1.0  # seconds, longest wait before the repository is tried again
RETENTION = 3 * 24 * 3600.0  # seconds
FORGET_STEP = 500  # messages forgotten at a time: some ten microseconds to a millisecond
LONGEST_MESSAGE = 1_600  # code points: ten concatenated parts, as most providers limit it
LONGEST_NUMBER = 15  # digits (ITU-T E.164)


# Errors


class SmsProxyError(Exception):
    """The root of this module's errors."""


class ValidationError(SmsProxyError, ValueError):
    """The value of `field` is not acceptable; `problem` says why, without repeating it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field, self.problem = field, problem


class DuplicateMessageError(SmsProxyError):
    """The ID is stored already; `fingerprint` is what it was stored with."""

    def __init__(self, message_id: str, fingerprint: bytes | None = None) -> None:
        super().__init__(f"message {message_id} is stored already")
        self.message_id, self.fingerprint = message_id, fingerprint


class IdempotencyError(SmsProxyError):
    """An idempotency key came again with another message."""


class UnknownMessageError(SmsProxyError):
    """No message with this ID is stored."""


class StatusTransitionError(SmsProxyError):
    """`TRANSITIONS` does not allow this change of status."""


class UnknownStatusError(SmsProxyError):
    """FastSMSing reported a status that does not exist."""


class OverloadedError(SmsProxyError):
    """Too many messages are pending; try again later."""


class ClosedError(SmsProxyError):
    """The service is shutting down and accepts nothing more."""


class RepositoryUnavailableError(SmsProxyError):
    """The repository cannot be used just now (disk full, file locked); nothing was changed; try again later."""


# Statuses


class MessageStatus(str, Enum):
    """What the proxy says of a message."""

    ACCEPTED = "ACCEPTED"  # it will go out in the nearest batch, or FastSMSing has not reported on it yet
    NOT_FOUND = "NOT_FOUND"  # never accepted here, or forgotten
    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"
    DELIVERED = "DELIVERED"


class Reason(str, Enum):
    """Why the proxy gave a message up. As an update of a message it makes the message `FAILED`."""

    REJECTED = "rejected"  # FastSMSing refuses it
    ATTEMPTS = "attempts"  # all attempts are used
    EXPIRED = "expired"  # older than `max_age`


FINAL_STATUSES = frozenset({MessageStatus.FAILED, MessageStatus.DELIVERED})
TRANSITIONS: Mapping[MessageStatus, frozenset[MessageStatus]] = {
    MessageStatus.ACCEPTED: frozenset({MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED}),
    MessageStatus.NOT_FOUND: frozenset(),
    MessageStatus.CONFIRMED: FINAL_STATUSES,
    MessageStatus.FAILED: frozenset(),
    MessageStatus.DELIVERED: frozenset(),
}


# The status that an update of a message leads to.
STATUS_OF: Mapping[MessageStatus | Reason, MessageStatus] = {
    **{status: status for status in MessageStatus}, **dict.fromkeys(Reason, MessageStatus.FAILED)
}  # fmt: skip


def check_transition(message_id: str, current: MessageStatus, status: MessageStatus) -> None:
    """Raises `UnknownMessageError` or `StatusTransitionError` for a change that is not allowed."""
    if current is MessageStatus.NOT_FOUND:
        raise UnknownMessageError(f"message {message_id} is not known")
    if status not in TRANSITIONS[current]:
        raise StatusTransitionError(f"message {message_id} cannot go from {current.value} to {status.value}")


_INTERNAL: dict[str, MessageStatus] = {status: MessageStatus(status.value) for status in fastsmsing.MessageStatus}


def map_to_internal_status(status: object) -> MessageStatus:
    """The proxy's status for one of FastSMSing's; raises `UnknownStatusError`."""
    if isinstance(status, str) and (known := _INTERNAL.get(status)) is not None:
        return known
    word = isinstance(status, str) and len(status) <= 30 and status.isupper() and status.isidentifier()
    raise UnknownStatusError(f"unknown status {status if word else type(status).__name__}")


# Values


@dataclass(frozen=True, slots=True)
class SendMessage:
    """What a caller wants sent. Its `repr` shows nothing, so that logs stay private."""

    phone_number: str = field(repr=False)
    message: str = field(repr=False)

    def validate(self) -> None:
        """Raises `ValidationError` unless this can be sent. The values may be of any type."""
        number, text = self.phone_number, self.message
        if not (isinstance(number, str) and 0 < len(number) <= LONGEST_NUMBER):
            raise ValidationError("phone_number", _problem(number, LONGEST_NUMBER))
        if not (isinstance(text, str) and 0 < len(text) <= LONGEST_MESSAGE):
            raise ValidationError("message", _problem(text, LONGEST_MESSAGE))
        if not (number.isascii() and number.isdigit()):
            raise ValidationError("phone_number", "must consist of the digits 0 to 9 only")
        try:
            text.encode()
        except UnicodeEncodeError:  # could not be sent on
            raise ValidationError("message", "must not contain lone surrogates") from None

    def to_message(self, message_id: str) -> Message:
        """The message as FastSMSing gets it."""
        return Message(self.phone_number, self.message, message_id)


def _problem(value: object, longest: int) -> str:
    if not isinstance(value, str):
        return "must be a string"
    return f"must have at most {longest} characters" if value else "must not be empty"


@dataclass(frozen=True, slots=True)
class SendingResult:
    """The ID under which a message was accepted."""

    id: str


@dataclass(slots=True, eq=False)
class Entry:
    """A message in the outbox. `fingerprint` comes with an idempotency key and tells a repeat from a misuse.

    The repository sets `accepted_at` when it saves or claims the entry: seconds on this process's
    monotonic clock, so that the age of a message is the same everywhere and no jump of the wall clock
    changes it. Not frozen for that reason alone.
    """

    message: Message
    fingerprint: bytes | None = None
    accepted_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries claimed together, oldest first. `lease` is the repository's own; parts of a batch share it."""

    entries: tuple[Entry, ...]
    lease: Any = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def ids(self) -> list[str]:
        """The IDs of the messages."""
        return [entry.message.message_id for entry in self.entries]

    def only(self, keep: Callable[[Entry], bool]) -> Batch:
        """The part of the batch for which `keep` is true."""
        return replace(self, entries=tuple(filter(keep, self.entries)))


@dataclass(frozen=True, slots=True)
class Claim:
    """What a look into the outbox found.

    `waiting`: how many unclaimed messages remain, as far as the repository looked. `wait`: seconds until
    the oldest of them is due; None when only another message can make a batch leave.
    """

    batch: Batch | None = None
    waiting: int = 0
    wait: float | None = None


@dataclass(frozen=True, slots=True)
class ClientResult:
    """How one batch ended: `error` is None when FastSMSing took it, else that of the last attempt."""

    messages: tuple[Message, ...]
    error: BaseException | None
    attempt: int
    max_attempts: int | None


@dataclass(frozen=True, slots=True)
class SmsProxyConfig:
    """When batches leave and how hard we try; times in seconds. Wrong values raise `ValidationError`."""

    batch_size: int = 100  # the most messages in one request; so many leave at once; 1 or less turns batching off
    max_delay: float | None = 5.0  # longest linger of a message; None waits for a full batch for ever
    senders: int = 4  # requests to the provider at a time
    max_pending: int = 100_000  # accepted and not yet handed over
    max_attempts: int | None = 100  # tries per batch; less than 1 counts as 1; None: no limit
    backoff_base: float = 0.5  # before try n + 1: uniform in half to all of min(max, base * 2 ** (n - 1))
    backoff_max: float = 30.0
    max_age: float | None = None  # older messages are not sent any more; None sends them all

    def __post_init__(self) -> None:
        for spec in fields(self):
            self._check(spec.name, getattr(self, spec.name), whole="int" in spec.type, optional="None" in spec.type)
        object.__setattr__(self, "batch_size", max(1, self.batch_size))
        if self.max_attempts is not None:
            object.__setattr__(self, "max_attempts", max(1, self.max_attempts))
        if self.max_pending < self.batch_size:
            raise ValidationError("max_pending", "must not be less than batch_size")

    @staticmethod
    def _check(name: str, value: Any, whole: bool, optional: bool) -> None:
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValidationError(name, "must be a whole number" if whole else "must be a number")
        if name in ("senders", "max_pending") and value < 1:
            raise ValidationError(name, "must be at least 1")
        if not whole and not 0 <= value <= sys.float_info.max:
            raise ValidationError(name, "must be a finite number of seconds, not negative")

    def backoff(self, failures: int, fraction: float) -> float:
        """Seconds to wait after so many failures; `fraction` in 0..1 is the jitter."""
        return min(self.backoff_max, self.backoff_base * 2.0 ** min(failures - 1, 64)) * (0.5 + fraction / 2)


# Repositories


class Repository(abc.ABC):
    """Keeps the statuses of messages and the outbox. Safe under any number of threads.

    Implementations differ in where they keep things and in nothing that callers can see. Any method
    may raise `RepositoryUnavailableError`, and then has changed nothing. A message is in the outbox
    from `save_all` until it is handed over, or an update says what became of it. What is not in the
    outbox is forgotten `retention` seconds after its last change (0: never).
    """

    blocking = False  # whether methods may wait for a disk or a network: keep them off the serving thread
    durable = False  # whether the outbox outlives the process
    poll: float | None = None  # seconds between looks for what other processes saved; None: there are none

    @abc.abstractmethod
    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """Stores each entry as `ACCEPTED` and puts it into the outbox, all in one step.

        Returns for each, in order, None or why it is not stored: `DuplicateMessageError`, or
        `OverloadedError` when the outbox already holds `max_pending` messages.
        """

    @abc.abstractmethod
    def get(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` when unknown."""

    @abc.abstractmethod
    def reason(self, message_id: str) -> Reason | None:
        """Why the proxy itself made the message `FAILED`; None for every other message."""

    @abc.abstractmethod
    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """Applies the updates in one step; returns why some could not be. What is updated leaves the outbox."""

    @abc.abstractmethod
    def claim(self, size: int, max_delay: float | None) -> Claim:
        """Takes the next batch, in order of acceptance, or tells when there will be one, in one step.

        A batch may leave when `size` messages wait or the oldest has waited `max_delay` seconds (None:
        for ever), and then holds up to `size` messages. Nobody else gets a claimed message before it is
        released.
        """

    @abc.abstractmethod
    def release(self, batch: Batch) -> None:
        """Puts claimed messages back to the front of the outbox."""

    @abc.abstractmethod
    def handed_over(self, batch: Batch) -> None:
        """Takes messages that FastSMSing took out of the outbox, and erases their numbers and texts."""

    @abc.abstractmethod
    def backlog(self) -> int:
        """How many messages are in the outbox, claimed ones included."""

    @abc.abstractmethod
    def oldest(self) -> float | None:
        """Seconds since the oldest message in the outbox was accepted; None when it is empty."""

    @abc.abstractmethod
    def forget(self) -> float | None:
        """Forgets a few messages that are due; returns the seconds until it is to be called again, None for never."""

    def holds(self, batch: Batch) -> bool:
        """Whether the batch is still this process's to send. Never blocks."""
        return True

    def size(self) -> int:
        """Bytes on disk; 0 for none."""
        return 0

    def check(self) -> None:
        """Raises `RepositoryUnavailableError` when nothing could be written now."""

    def close(self) -> None:
        """Frees what it holds; later calls raise `RepositoryUnavailableError` where that matters."""

    def save(self, message_id: str, message: Message | None = None) -> None:
        """`save_all` for one message; raises what it returns. Without a `message` there is nothing to send."""
        entry = Entry(replace(message, message_id=message_id) if message else Message("", "", message_id))
        for error in self.save_all([entry]):
            if error is not None:
                raise error
        if message is None:
            self.handed_over(Batch((entry,)))

    def update(self, message_id: str, status: MessageStatus) -> None:
        """Raises `UnknownMessageError` or `StatusTransitionError`, and then changes nothing."""
        for error in self.update_all({message_id: status}).values():
            raise error


def time_to_claim(waiting: int, size: int, age: float, max_delay: float | None) -> float | None:
    """Seconds until a batch may leave, 0 for now, when the oldest of `waiting` messages is so old."""
    if waiting >= size:
        return 0.0
    if max_delay is None or not waiting:
        return None
    return max_delay - age if max_delay - age > 1e-6 else 0.0  # shorter waits may be lost in rounding


class InMemoryRepository(Repository):
    """A repository in dicts; a restart loses it. Nothing blocks.

    A message is forgotten late by at most a thousandth of `retention`.
    """

    def __init__(self, retention: float = RETENTION, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retention, self._clock = retention, clock
        self._lock = threading.Lock()  # guards everything below
        # Status, reason and time to forget. Messages that changed to the same status within retention / 1000
        # share one tuple: a tuple for each would cost more memory than its status does.
        self._records: dict[str, tuple[MessageStatus, Reason | None, float]] = {}
        self._fingerprints: dict[str, bytes] = {}
        self._waiting: deque[Entry] = deque()
        self._claimed: dict[str, Entry] = {}
        self._slices: deque[tuple[float, list[str]]] = deque()  # time to forget, IDs changed in one slice of time
        self._slice_end = -math.inf
        self._shared: dict[MessageStatus | Reason, tuple[MessageStatus, Reason | None, float]] = {}

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """See `Repository`."""
        with self._lock:
            now, limit = self._clock(), math.inf if max_pending is None else max_pending
            errors: list[Exception | None] = []
            for entry in entries:
                message_id = entry.message.message_id
                record = self._records.get(message_id)
                if record is not None and record[2] > now:
                    errors.append(DuplicateMessageError(message_id, self._fingerprints.get(message_id)))
                elif len(self._waiting) + len(self._claimed) >= limit:
                    errors.append(OverloadedError("too many messages are pending"))
                else:
                    entry.accepted_at = now
                    self._records[message_id] = _IN_OUTBOX
                    self._waiting.append(entry)
                    if entry.fingerprint is not None:
                        self._fingerprints[message_id] = entry.fingerprint
                    elif record is not None:  # it is due and not forgotten yet
                        self._fingerprints.pop(message_id, None)
                    errors.append(None)
            return errors

    def get(self, message_id: str) -> MessageStatus:
        """See `Repository`."""
        record = self._records.get(message_id)  # a dict look-up is atomic
        return MessageStatus.NOT_FOUND if record is None or record[2] <= self._clock() else record[0]

    def reason(self, message_id: str) -> Reason | None:
        """See `Repository`."""
        record = self._records.get(message_id, _IN_OUTBOX)
        return record[1] if record[2] > self._clock() else None

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """See `Repository`."""
        failures: dict[str, Exception] = {}
        with self._lock:
            now = self._clock()
            for message_id, update in updates.items():
                record = self._records.get(message_id)
                current = MessageStatus.NOT_FOUND if record is None or record[2] <= now else record[0]
                try:
                    if STATUS_OF[update] not in TRANSITIONS[current]:
                        check_transition(message_id, current, STATUS_OF[update])
                    if record is _IN_OUTBOX:
                        self._leave_outbox(message_id)
                    self._change(message_id, update, now)
                except SmsProxyError as error:
                    failures[message_id] = error
        return failures

    def claim(self, size: int, max_delay: float | None) -> Claim:
        """See `Repository`."""
        with self._lock:
            waiting = len(self._waiting)
            age = self._clock() - self._waiting[0].accepted_at if waiting else 0.0
            wait = time_to_claim(waiting, size, age, max_delay)
            if wait != 0.0:
                return Claim(None, waiting, wait)
            taken = tuple([self._waiting.popleft() for _ in range(min(size, waiting))])
            self._claimed.update((entry.message.message_id, entry) for entry in taken)
            return Claim(Batch(taken), waiting - len(taken))

    def release(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            for entry in reversed(batch.entries):
                if self._claimed.pop(entry.message.message_id, None):  # otherwise it was reported on meanwhile
                    self._waiting.appendleft(entry)

    def handed_over(self, batch: Batch) -> None:
        """See `Repository`."""
        with self._lock:
            now = self._clock()
            for message_id in batch.ids:
                if self._records.get(message_id) is _IN_OUTBOX:
                    self._leave_outbox(message_id)
                    self._change(message_id, MessageStatus.ACCEPTED, now)

    def backlog(self) -> int:
        """See `Repository`."""
        return len(self._waiting) + len(self._claimed)

    def oldest(self) -> float | None:
        """See `Repository`."""
        with self._lock:
            entries = [*self._claimed.values(), *itertools.islice(self._waiting, 1)]
            return self._clock() - min(entry.accepted_at for entry in entries) if entries else None

    def forget(self) -> float | None:
        """See `Repository`."""
        with self._lock:
            now, slices = self._clock(), self._slices
            for _ in range(FORGET_STEP):
                if not slices or slices[0][0] > now:
                    break
                if not slices[0][1]:
                    slices.popleft()
                    continue
                message_id = slices[0][1].pop()
                record = self._records.get(message_id)
                if record is not None and record[2] <= now:  # otherwise it changed again later
                    del self._records[message_id]
                    self._fingerprints.pop(message_id, None)
            if not self._retention:
                return None
            return max(0.0, slices[0][0] - now) if slices else self._retention

    def _leave_outbox(self, message_id: str) -> None:
        if self._claimed.pop(message_id, None) is None:  # nobody sent it, so this is rare and may search
            self._waiting.remove(next(entry for entry in self._waiting if entry.message.message_id == message_id))

    def _change(self, message_id: str, update: MessageStatus | Reason, now: float) -> None:
        """Records a message that is not in the outbox any more."""
        if now >= self._slice_end:
            self._slice_end = now + self._retention / 1000
            self._shared = {}
            if self._retention:
                self._slices.append((self._slice_end + self._retention, []))
        record = self._shared.get(update)
        if record is None:
            forget_at = self._slices[-1][0] if self._retention else math.inf
            record = (STATUS_OF[update], update if isinstance(update, Reason) else None, forget_at)
            self._shared[update] = record
        if self._retention and self._records[message_id][2] != record[2]:
            self._slices[-1][1].append(message_id)
        self._records[message_id] = record


_IN_OUTBOX = (MessageStatus.ACCEPTED, None, math.inf)


# Monitoring


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, type, help, and from the start every value of its label and every bucket's bound."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    bounds: tuple[float, ...] = ()


_SHORT = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
_LONG = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)  # seconds
_RESULTS = ("ok", "rejected", "error")
FAMILIES = (
    Family("smsproxy_messages_accepted_total", "counter", "Messages accepted."),
    Family("smsproxy_messages_handed_over_total", "counter", "Messages that FastSMSing took."),
    Family("smsproxy_messages_given_up_total", "counter", "Messages given up, by reason.", "reason",
           tuple(reason.value for reason in Reason)),
    Family("smsproxy_messages_final_total", "counter", "Messages that reached a final status.", "status",
           tuple(sorted(status.value for status in FINAL_STATUSES))),
    Family("smsproxy_batches_total", "counter", "Batches by how they ended; a rejected one is split.", "result",
           ("handed_over", "split", "given_up")),
    Family("smsproxy_batch_messages", "histogram", "Messages in a request.",
           bounds=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
    Family("smsproxy_provider_requests_total", "counter", "Requests to FastSMSing, billed each.", "result", _RESULTS),
    Family("smsproxy_provider_request_duration_seconds", "histogram", "Duration of requests to FastSMSing.",
           "result", _RESULTS, _SHORT),
    Family("smsproxy_handover_wait_seconds", "histogram", "Time from acceptance to the hand-over.",
           bounds=_LONG),
    Family("smsproxy_final_status_seconds", "histogram", "Time from acceptance to a final status.", bounds=_LONG),
    Family("smsproxy_status_updates_total", "counter", "Delivery reports, by what became of them.", "result",
           ("applied", "refused", "unknown_message", "unknown_status", "error")),
    Family("smsproxy_provider_requests_in_flight", "gauge", "Requests to FastSMSing under way."),
    Family("smsproxy_requests_saved", "gauge", "Messages handed over less all requests made."),
    Family("smsproxy_pending_messages", "gauge", "Messages accepted and not yet handed over."),
    Family("smsproxy_pending_messages_limit", "gauge", "With so many pending messages no more are accepted."),
    Family("smsproxy_oldest_pending_message_age_seconds", "gauge", "Age of the oldest pending message, 0 without one."),
    Family("smsproxy_database_bytes", "gauge", "Size of the database file, 0 without one."),
    Family("smsproxy_circuit_breaker_open_seconds", "gauge", "Time since requests stopped, 0 while they are made."),
    Family("smsproxy_circuit_breaker_next_try_seconds", "gauge", "Time until the next request, if open."),
)  # fmt: skip


class Metrics:
    """Counters and histograms for monitoring, all at 0 from the start. Thread-safe."""

    def __init__(self) -> None:
        self._bounds = {family.name: family.bounds for family in FAMILIES}
        self._lock = threading.Lock()  # guards _rows
        # A counter's value; of a histogram the count of each bucket, of what exceeds them all, and the sum.
        self._rows: dict[tuple[str, str], list[float]] = {
            (family.name, value): [0.0] * (len(family.bounds) + 2 if family.bounds else 1)
            for family in FAMILIES if family.kind != "gauge" for value in family.values
        }  # fmt: skip

    def add(self, name: str, label: str = "", amount: float = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._rows[name, label][0] += amount

    def observe(self, name: str, values: Iterable[float], label: str = "") -> None:
        """Adds values to a histogram."""
        bounds = self._bounds[name]
        with self._lock:
            row = self._rows[name, label]
            for value in values:
                row[bisect.bisect_left(bounds, value)] += 1
                row[-1] += value

    def total(self, name: str) -> float:
        """The sum of a counter over the values of its label."""
        with self._lock:
            return sum(row[0] for (each, _), row in self._rows.items() if each == name)

    def rows(self) -> dict[tuple[str, str], list[float]]:
        """The figures so far by name and value of the label: one for a counter; for a histogram the count of each
        bucket, the count beyond the last, and the sum. They are soon stale."""
        with self._lock:
            return {key: list(row) for key, row in self._rows.items()}


@dataclass(frozen=True, slots=True)
class Statistics:
    """How well the provider does."""

    success: int = 0  # batches that it took
    failed: int = 0  # batches that it rejected, or that were given up
    messages: int = 0  # in all these batches
    attempts: int = 0
    last_error: str | None = None

    @property
    def success_percentage(self) -> float:
        """Of the batches; 100.0 when there was none yet."""
        batches = self.success + self.failed
        return 100.0 * self.success / batches if batches else 100.0


class ClientStatistics:
    """Adds up the results of batches. Thread-safe, in constant memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards changes of _sum; reading it is atomic
        self._sum = Statistics()

    def send(self, result: ClientResult) -> None:
        """Counts one batch."""
        failed = result.error is not None
        with self._lock:
            old = self._sum
            self._sum = Statistics(
                old.success + (not failed), old.failed + failed,
                old.messages + len(result.messages), old.attempts + result.attempt,
                old.last_error if result.error is None else describe(result.error),
            )  # fmt: skip

    def get_statistics(self) -> Statistics:
        """The figures of one moment, already a little old when they are read."""
        return self._sum


def describe(error: BaseException) -> str:
    """An error's type, its number if it has one (errno, HTTP status), and the type of its cause.

    Never its text: a provider's error may quote a phone number or a message, in any spelling.
    """
    candidates: list[object] = []
    with contextlib.suppress(Exception):  # attributes of somebody else's class may be code that fails
        candidates += error.args[:1]
        candidates += [getattr(error, name, None) for name in ("errno", "code", "status")]
    number = next((each for each in candidates if type(each) is int and 0 < each < 1_000), None)
    described = type(error).__name__ if number is None else f"{type(error).__name__} {number}"
    return described if error.__cause__ is None else f"{described} from {type(error.__cause__).__name__}"


class Incident:
    """Logs an error that repeats when it begins, once a minute with its count, and when it ends. Thread-safe."""

    PAUSE = 60.0  # seconds between two lines about the same error

    def __init__(self, logger: logging.Logger, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._what, self._clock = logger, what, clock
        self._lock = threading.Lock()  # guards the following
        self._count = 0  # of errors since it began; 0 when all is well
        self._began = self._logged = 0.0

    def failed(self, error: object) -> None:
        """Counts an error, and logs it when it is time."""
        with self._lock:
            now = self._clock()
            self._count += 1
            count = self._count
            if count == 1:
                self._began = now
            elif now - self._logged < self.PAUSE:
                return
            self._logged, began = now, self._began
        self._log.error("%s: %s (%d times in %.0f s)", self._what, error, count, now - began)

    def ended(self) -> None:
        """Logs that all is well again, if it was not."""
        if not self._count:  # the common case costs no lock
            return
        with self._lock:
            count, self._count = self._count, 0
            seconds = self._clock() - self._began
        if count:
            self._log.warning("over after %.1f s and %d errors: %s", seconds, count, self._what)


# Threads


def _work_in_background() -> None:
    """Lets the thread that accepts messages run on when it wakes this one (Linux: sched(7), SCHED_BATCH).

    Otherwise every wake-up on a busy processor costs two changes of thread, only to find the interpreter's lock
    held (measured on one core: a fifth of the throughput). The share of the processor stays the same.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or one that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _location(error: BaseException) -> str:
    """An unexpected error's type and place; its text could hold a phone number."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {os.path.basename(at.filename)}:{at.lineno}"


def _persist(change: Callable[[], Any], over: threading.Event, incident: Incident) -> Any:
    """Repeats a change until the repository can make it; once `over` is set, its error is raised."""
    wait = 0.1
    while True:
        try:
            result = change()
        except RepositoryUnavailableError as error:
            incident.failed(error)
            if over.wait(wait):
                raise
            wait = min(REPOSITORY_RETRY, wait * 2)
        else:
            incident.ended()
            return result


def _rest(deadline: float | None) -> float:
    """Seconds until the deadline, and a little more when it is close or past."""
    return GRACE if deadline is None else min(max(GRACE, deadline - time.monotonic()), LONGEST_WAIT)


# Batching


class CircuitBreaker:
    """Stops all requests while FastSMSing is away. Not thread-safe: the owner's lock guards it.

    Closed: any request may start. Open, from the first request that fails for a reason that may pass: one
    at a time may, the probe, after a backoff that doubles with each probe that fails. It closes when any
    request succeeds, the probe or one that was under way before, or is rejected: FastSMSing is back.
    """

    def __init__(self, config: SmsProxyConfig, rng: Callable[[], float]) -> None:
        self._config, self._rng = config, rng
        self.opened_at: float | None = None  # None: closed
        self.requests = 0  # that failed since it opened
        self.next_try = 0.0
        self.asked_until = 0.0  # before that FastSMSing wants no request
        self.longest_backoff = math.inf
        self._failures = 0  # in a row: the first and the probes
        self._probe: object = None

    def wait(self, now: float) -> float | None:
        """Seconds until a request may start, 0 for now; None while only the end of the probe can tell."""
        if self.opened_at is None:
            return 0.0
        return None if self._probe is not None else max(0.0, self.next_try - now)

    def begin(self, request: object) -> None:
        """A request starts, after `wait` said that it may."""
        if self.opened_at is not None:
            self._probe = request

    def failed(self, request: object, retry_after: float, now: float) -> bool:
        """A request failed for a reason that may pass; returns whether that opened the breaker."""
        self.asked_until = max(self.asked_until, now + retry_after)
        opened = self.opened_at is None
        if opened:
            self.opened_at, self.requests, self._failures, self._probe = now, 0, 0, None
        self.requests += 1
        if opened or request is self._probe:
            self._failures, self._probe = self._failures + 1, None
            self.next_try = now + self.backoff(self._failures)
        self.next_try = max(self.next_try, self.asked_until)  # also for one that started before it opened
        return opened

    def succeeded(self, now: float) -> tuple[float, int] | None:
        """FastSMSing answered; returns for how many seconds and failed requests the breaker was open, if it was."""
        if self.opened_at is None:
            return None
        seconds, self.opened_at, self._probe = now - self.opened_at, None, None
        return seconds, self.requests

    def ended(self, request: object) -> None:
        """However a request ended: the probe's place is free again."""
        if request is self._probe:
            self._probe = None

    def backoff(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.longest_backoff, self._config.backoff(failures, self._rng()))

    def gauges(self, now: float) -> dict[str, float]:
        """Present figures for monitoring, by metric name; both are 0 while it is closed."""
        opened_at = now if self.opened_at is None else min(self.opened_at, now - 1e-3)
        next_try = now if self.opened_at is None else self.next_try
        return {
            "smsproxy_circuit_breaker_open_seconds": now - opened_at,
            "smsproxy_circuit_breaker_next_try_seconds": max(0.0, next_try - now),
        }

    def hasten(self, now: float) -> None:
        """From now on no wait is longer than `DRAIN_BACKOFF`, except where FastSMSing asks for it."""
        self.longest_backoff = DRAIN_BACKOFF
        self.next_try = self.no_later(self.next_try, now)

    def no_later(self, when: float, now: float) -> float:
        """A time, or the longest backoff from now if that is earlier; never before FastSMSing wants a request."""
        return min(when, max(now + self.longest_backoff, self.asked_until))


@dataclass(slots=True, eq=False)
class _Job:
    """A batch on its way. A sender that works on it owns it; nobody else changes it meanwhile."""

    batch: Batch
    attempt: int = 0
    not_before: float = -math.inf
    sent: tuple[Message, ...] = ()  # in the last request
    error: BaseException | None = None  # of the last request


class _Scheduler:
    """Decides what a sender does next. Thread-safe.

    One sender looks for a job at a time, the others sleep behind it. A job is either one of the `retries`
    or under way, never both. While the breaker is open, the only job that starts is the probe. It is a
    batch from the outbox if there is one and a sender has no retry to hold, else a retry: so a batch that
    fails again and again does not stop the others. While it is closed, retries come first: they are older.
    """

    def __init__(
        self, repository: Repository, config: SmsProxyConfig, clock: Callable[[], float], rng: Callable[[], float]
    ) -> None:
        self._repository, self._config, self._clock, self._rng = repository, config, clock, rng
        self._incident = Incident(log, "no batch can be claimed", clock=clock)
        self._lock = threading.Lock()  # guards everything below
        self._looker = threading.Condition(self._lock)  # the sender that looks waits for a job to start
        self._sleepers = threading.Condition(self._lock)  # the other idle senders wait to be the one that looks
        self._quiet = threading.Condition(self._lock)  # a stop waits for the last job
        self._breaker = CircuitBreaker(config, rng)
        self._looking = False
        self._claiming = False
        self._retries: list[_Job] = []
        self._under_way: set[_Job] = set()
        self._abandoned: list[_Job] = []
        self._waiting = 1  # unclaimed messages: what the last look found and was saved since; 0 only if there are none
        self._look_at = -math.inf  # when the next look is worth it: the oldest of them may be due, or a batch is full
        self._saved = self._saving = 0
        self._draining = self._closed = self._over = False

    # For those who accept messages

    def begin_save(self) -> bool:
        """Announces that messages are being saved; False when no more are to be."""
        with self._lock:
            self._saving += not self._closed
            return not self._closed

    def end_save(self, saved: int) -> None:
        """So many messages were saved. One wake-up starts the linger, and one sends a full batch."""
        with self._lock:
            before, size = self._waiting, self._config.batch_size
            self._saving -= 1
            self._saved += saved
            self._waiting += saved
            if saved and (not before or before < size <= self._waiting):
                self._look_at = -math.inf
                (self._looker if self._looking else self._sleepers).notify()
            if self._draining:
                self._quiet.notify_all()

    # For senders

    def next_job(self) -> _Job | None:
        """Waits for a job; None when there will be no more."""
        with self._lock:
            while self._looking and not self._over:
                self._sleepers.wait()
            if self._over:
                return None
            self._looking = True
        try:
            while True:
                job = self._look()
                if job is not None or self._over:
                    return job
        finally:
            with self._lock:
                self._looking = self._claiming = False
                if self._waiting or self._retries or self._repository.poll is not None:
                    self._sleepers.notify()  # somebody has to look after them

    def _look(self) -> _Job | None:
        """A job that starts now, or None after waiting until there may be one."""
        with self._lock:
            now = self._clock()
            wait = self._wait(now)
            room = wait == 0 and len(self._retries) < self._config.senders and (
                self._waiting > 0 or self._repository.poll is not None)  # fmt: skip
            claims = room and now >= self._look_at
            if wait == 0 and not (claims and self._breaker.opened_at is not None):
                if (job := self._ready(now)) is not None:
                    return job
                wait = self._until_retry(now)
            if not claims:
                if room:
                    wait = min(self._look_at - now, math.inf if wait is None else wait)
                if not self._over:
                    self._looker.wait(None if wait is None else min(wait, threading.TIMEOUT_MAX))
                return None
            seen, self._claiming = self._saved, True
        claim = self._claim()
        with self._lock:
            now, self._claiming = self._clock(), False
            self._waiting = claim.waiting + self._saved - seen
            if claim.batch is not None:
                self._retries.append(_Job(claim.batch))
            news = self._saved != seen and (not claim.waiting or self._waiting >= self._config.batch_size)
            again = claim.batch is not None or news
            self._look_at = -math.inf if again else now + self._until_look(claim.wait)
            if self._draining:
                self._quiet.notify_all()
            return self._ready(now)

    def _claim(self) -> Claim:
        try:
            claim = self._repository.claim(self._config.batch_size, 0.0 if self._draining else self._config.max_delay)
        except RepositoryUnavailableError as error:
            self._incident.failed(error)
            return Claim(None, 1, REPOSITORY_RETRY)
        self._incident.ended()
        return claim

    def _wait(self, now: float) -> float | None:
        """Seconds until a request may start, 0 for now; None while only something else can tell, or never."""
        return None if self._draining and self._repository.durable else self._breaker.wait(now)

    def _ready(self, now: float) -> _Job | None:
        """Starts the retry that has been ready for longest, if requests may start."""
        job = min(self._retries, key=lambda job: job.not_before, default=None)
        if job is not None and job.not_before <= now and self._wait(now) == 0:
            self._retries.remove(job)
            self._under_way.add(job)
            self._breaker.begin(job)
            return job
        return None

    def _until_retry(self, now: float) -> float | None:
        return min((max(0.0, job.not_before - now) for job in self._retries), default=None)

    def _until_look(self, due: float | None) -> float:
        """Seconds until the oldest message is due, or it is time to look for others' messages."""
        poll, wait = self._repository.poll, math.inf if due is None else due
        return wait if poll is None else min(wait, poll * (0.5 + self._rng()))  # jitter, or all instances look together

    # How a request ended

    def succeeded(self) -> tuple[float, int] | None:
        """FastSMSing answered; returns for how many seconds and failed requests the breaker was open, if it was."""
        with self._lock:
            closed = self._breaker.succeeded(self._clock())
            if closed:
                self._looker.notify()
            return closed

    def failed(self, job: _Job, retry_after: float) -> bool:
        """The job's request failed for a reason that may pass; returns whether that opened the breaker."""
        with self._lock:
            now = self._clock()
            opened = self._breaker.failed(job, retry_after, now)
            job.not_before = max(now + self._breaker.backoff(job.attempt), self._breaker.asked_until)
            self._looker.notify()
            return opened

    def ended(self, job: _Job, *again: _Job) -> None:
        """The job is over; those in `again` wait for a sender, the job itself perhaps among them."""
        with self._lock:
            self._under_way.discard(job)
            self._breaker.ended(job)
            self._retries.extend(again)
            self._looker.notify()
            if self._draining:
                self._quiet.notify_all()

    def abandon(self, job: _Job) -> None:
        """An error of ours stopped the job; nobody knows whether its messages were handed over."""
        with self._lock:
            self._abandoned.append(job)
        self.ended(job)

    # Watching and ending

    def gauges(self) -> dict[str, float]:
        """Present figures for monitoring, by metric name."""
        with self._lock:
            return {
                "smsproxy_provider_requests_in_flight": len(self._under_way), **self._breaker.gauges(self._clock())
            }  # fmt: skip

    def drain(self) -> None:
        """From now on nothing lingers and backoffs are short; of a durable outbox nothing is claimed any more."""
        with self._lock:
            now, self._draining, self._look_at = self._clock(), True, -math.inf
            self._breaker.hasten(now)
            for job in self._retries:
                job.not_before = self._breaker.no_later(job.not_before, now)
            self._looker.notify()

    def close(self, timeout: float | None) -> tuple[list[_Job], list[_Job]]:
        """Refuses messages, waits for what is to be done, ends the senders; returns the retries and unfinished jobs."""
        with self._lock:
            self._closed = True
            self._quiet.wait_for(self._is_quiet, timeout)
            self._over = True
            for condition in (self._looker, self._sleepers):
                condition.notify_all()
            return list(self._retries), [*self._under_way, *self._abandoned]

    def _is_quiet(self) -> bool:
        rest = not self._repository.durable and (self._waiting or self._retries)
        return self._over or not (self._claiming or self._under_way or self._saving or rest)


class _Sender:
    """Makes one request for a job and sees to what follows. All sender threads share it."""

    def __init__(
        self, repository: Repository, client: FastSmsingClient, config: SmsProxyConfig, scheduler: _Scheduler,
        metrics: Metrics, give_up: Callable[[dict[str, Any]], object], report: Callable[[_Job], None],
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._repository, self._client, self._config, self._scheduler = repository, client, config, scheduler
        self._metrics, self._give_up_all, self._report, self._clock = metrics, give_up, report, clock
        self._incident = Incident(log, "a hand-over cannot be recorded", clock=clock)
        self.over = threading.Event()  # set at the end: nothing is waited for any more

    def run(self) -> None:
        """Carries out one job after the other, until there will be no more."""
        _work_in_background()
        while not self.over.is_set():
            job = None
            try:
                job = self._scheduler.next_job()
                if job is None:
                    return
                self._scheduler.ended(job, *self._carry(job))
            except Exception as error:
                ids = " ".join(job.batch.ids) if job else "none"
                log.error("a sender goes on after a %s; messages: %s", _location(error), ids)
                if job is None:  # not at once: the cause may still be there
                    self.over.wait(REPOSITORY_RETRY)
                else:
                    self._scheduler.abandon(job)

    def _carry(self, job: _Job) -> Sequence[_Job]:
        """Makes one request for the job, if it is still to be made; returns the jobs that are left of it."""
        self._drop_expired(job)
        if not job.batch.entries or not self._repository.holds(job.batch):
            if job.batch.entries:
                log.warning("a lease is lost, so others send: %s", " ".join(job.batch.ids))
            if job.error is not None:
                self._report(job)
            return ()
        started = self._clock()
        refused = self._request(job, started)
        if job.error is None or isinstance(job.error, RejectedError):
            if closed := self._scheduler.succeeded():
                log.warning("circuit breaker closed after %.1f s and %d failed requests", *closed)
            return self._rejected(job, job.error) if job.error else self._handed_over(job, refused, started)
        return self._failed(job, job.error)

    def _drop_expired(self, job: _Job) -> None:
        while self._config.max_age is not None:
            oldest = self._clock() - self._config.max_age
            expired = job.batch.only(lambda entry: entry.accepted_at < oldest)
            if not expired.entries:
                return
            job.batch = job.batch.only(lambda entry: entry.accepted_at >= oldest)
            self._give_up(expired.ids, Reason.EXPIRED, f"older than {self._config.max_age:g} s")  # may take long

    def _request(self, job: _Job, started: float) -> set[str]:
        """One paid request; sets the job's `error`, and returns the IDs that FastSMSing refused by name."""
        job.attempt, job.error = job.attempt + 1, None
        job.sent = tuple([entry.message for entry in job.batch.entries])
        refused: set[str] = set()
        try:
            answer = self._client.send(list(job.sent))
            if isinstance(answer, Mapping):
                refused = set(answer).intersection(job.batch.ids)
        except BaseException as error:  # a SystemExit, too, would end nothing but this thread
            job.error = error
        result = "ok" if job.error is None else "rejected" if isinstance(job.error, RejectedError) else "error"
        self._metrics.add("smsproxy_provider_requests_total", result)
        self._metrics.observe("smsproxy_batch_messages", [len(job.sent)])
        self._metrics.observe("smsproxy_provider_request_duration_seconds", [self._clock() - started], result)
        return refused

    def _handed_over(self, job: _Job, refused: set[str], started: float) -> Sequence[_Job]:
        taken = job.batch
        if refused:
            taken = job.batch.only(lambda entry: entry.message.message_id not in refused)
            ids = [message_id for message_id in job.batch.ids if message_id in refused]
            self._give_up(ids, Reason.REJECTED, "refused by name")
        self._metrics.add("smsproxy_batches_total", "handed_over")
        self._metrics.add("smsproxy_messages_handed_over_total", "", len(taken))
        waits = [started - entry.accepted_at for entry in taken.entries]
        self._metrics.observe("smsproxy_handover_wait_seconds", waits)
        self._report(job)
        # Until it is recorded, a crash would send the batch again.
        _persist(lambda: self._repository.handed_over(taken), self.over, self._incident)
        log.info("handed over %d messages at attempt %d: %s", len(taken), job.attempt, " ".join(taken.ids))
        return ()

    def _rejected(self, job: _Job, error: RejectedError) -> Sequence[_Job]:
        """Halves the batch; whoever is to blame ends up alone, after about 2 * log2(n) requests."""
        self._report(job)
        entries, half = job.batch.entries, len(job.batch) // 2
        if not half and not self._repository.holds(job.batch):  # others send it
            return ()
        if not half:
            self._metrics.add("smsproxy_batches_total", "given_up")
            self._give_up(job.batch.ids, Reason.REJECTED, describe(error))
            return ()
        log.warning("%d messages are rejected (%s), so their halves are sent", len(entries), describe(error))
        self._metrics.add("smsproxy_batches_total", "split")
        return [_Job(replace(job.batch, entries=part)) for part in (entries[:half], entries[half:])]

    def _failed(self, job: _Job, error: BaseException) -> Sequence[_Job]:
        asked: object = None
        with contextlib.suppress(Exception):  # an attribute of somebody else's class may be code that fails
            asked = getattr(error, "retry_after", None)
        retry_after = min(LONGEST_WAIT, asked) if isinstance(asked, (int, float)) and asked > 0 else 0.0
        opened = self._scheduler.failed(job, retry_after)
        log.log(logging.WARNING if opened else logging.DEBUG, "%s at attempt %d of %s with %d messages%s",
                describe(error), job.attempt, self._config.max_attempts, len(job.batch),
                "; circuit breaker open" if opened else "")  # fmt: skip
        if self._config.max_attempts is None or job.attempt < self._config.max_attempts:
            return [job]
        if not self._repository.holds(job.batch):  # others send it
            return ()
        self._metrics.add("smsproxy_batches_total", "given_up")
        self._give_up(job.batch.ids, Reason.ATTEMPTS, describe(error))
        self._report(job)
        return ()

    def _give_up(self, ids: Sequence[str], reason: Reason, why: str) -> None:
        log.error("gave up %d messages (%s: %s): %s", len(ids), reason.value, why, " ".join(ids))
        self._metrics.add("smsproxy_messages_given_up_total", reason.value, len(ids))
        self._give_up_all(dict.fromkeys(ids, reason))


class SimpleBatchingClient:
    """Gathers messages and hands them over in batches, from threads of its own. Thread-safe.

    `statistics` gets one `ClientResult` per batch that was sent as one, from a thread of its own, and only
    ever delays itself. `give_up` gets the messages given up with their reasons, and records them; it may
    block. `clock` (seconds; the repository's, too) and `rng` (uniform in 0..1) are there for tests. Without
    `autostart` the threads start with `start`.
    """

    def __init__(
        self, repository: Repository, client: FastSmsingClient, config: SmsProxyConfig = SmsProxyConfig(),
        statistics: Any = None, *, metrics: Metrics | None = None,
        give_up: Callable[[dict[str, Any]], object] | None = None, clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random, autostart: bool = True,
    ) -> None:  # fmt: skip
        self._repository, self._config, self._statistics = repository, config, statistics
        self._metrics = metrics or Metrics()
        self._scheduler = _Scheduler(repository, config, clock, rng)
        self._sender = _Sender(repository, client, config, self._scheduler, self._metrics,
                               give_up or repository.update_all, self._report, clock)  # fmt: skip
        self._results: queue.Queue[ClientResult | None] = queue.Queue(RESULTS_WAITING)
        self._threads: list[threading.Thread] = []
        self._given_up_before: float | None = None  # the drain
        if autostart:
            self.start()

    def start(self) -> None:
        """Starts the threads, all or none: raises RuntimeError when the system has none left. Call it once."""
        roles = {f"sender-{number}": self._sender.run for number in range(1, self._config.senders + 1)}
        if self._statistics is not None:
            roles["statistics-1"] = self._report_all
        try:
            for role, target in roles.items():
                thread = threading.Thread(target=target, name=f"smsproxy-{role}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:
            self.stop(0)
            raise

    # Accepting

    def send(self, message: SendMessage, message_id: str) -> None:
        """Saves the message as `ACCEPTED`, to be sent; blocks for the repository only.

        Raises `OverloadedError`, `ClosedError` or what the repository's `save` raises; then nothing is sent.
        """
        for error in self.accept_all([Entry(message.to_message(message_id))]):
            if error is not None:
                raise error

    def accept_all(self, entries: Sequence[Entry]) -> list[Exception | None]:
        """`send` for entries, as one group; returns what it would raise for each of them, in order."""
        if not self._scheduler.begin_save():
            return [ClosedError("shutting down")] * len(entries)
        errors: list[Exception | None] = []
        try:
            errors = self._repository.save_all(entries, self._config.max_pending)
        except Exception as error:  # whatever it is, each of them gets to know
            errors = [error] * len(entries)
        finally:
            saved = errors.count(None)
            self._metrics.add("smsproxy_messages_accepted_total", "", saved)
            self._scheduler.end_save(saved)
        return errors

    # Statistics

    def _report(self, job: _Job) -> None:
        if self._statistics is not None:
            try:
                self._results.put_nowait(ClientResult(job.sent, job.error, job.attempt, self._config.max_attempts))
            except queue.Full:
                log.warning("the statistics sink is too slow: one result is dropped")

    def _report_all(self) -> None:
        _work_in_background()
        while (result := self._results.get()) is not None:
            try:
                self._statistics.send(result)
            except Exception as error:
                log.error("the statistics thread goes on after a %s", _location(error))

    # Watching and ending

    def gauges(self) -> dict[str, float]:
        """Present figures for monitoring, by metric name; soon stale. May block for the repository."""
        handed_over = self._metrics.total("smsproxy_messages_handed_over_total")
        return {
            **self._scheduler.gauges(),
            "smsproxy_requests_saved": handed_over - self._metrics.total("smsproxy_provider_requests_total"),
            "smsproxy_database_bytes": self._repository.size(),
            "smsproxy_pending_messages": self._repository.backlog(),
            "smsproxy_pending_messages_limit": self._config.max_pending,
            "smsproxy_oldest_pending_message_age_seconds": self._repository.oldest() or 0.0,
        }

    def health(self) -> tuple[list[str], list[str]]:
        """Why this instance should get no traffic, and other warnings. May block for the repository."""
        gauges, warnings = self.gauges(), []
        reasons = ["queue full"] if gauges["smsproxy_pending_messages"] >= self._config.max_pending else []
        if self._given_up_before is None:
            reasons += [f"{thread.name} is dead" for thread in self._threads if not thread.is_alive()]
        if seconds := gauges["smsproxy_circuit_breaker_open_seconds"]:
            next_try = gauges["smsproxy_circuit_breaker_next_try_seconds"]
            warnings.append(f"FastSMSing has been failing for {seconds:.0f} s; next try in {next_try:.0f} s")
        age = gauges["smsproxy_oldest_pending_message_age_seconds"]
        if self._config.max_delay is not None and age > self._config.max_delay + 60.0:
            warnings.append(f"the oldest pending message has waited for {age:.0f} s")
        return reasons, warnings

    def drain(self) -> None:
        """Prepares the end: nothing lingers any more, and what failed is tried again soon; in a durable outbox the
        messages that no request carries stay. Messages are still accepted. Returns at once; may be called again."""
        if self._given_up_before is None:
            self._given_up_before = self._metrics.total("smsproxy_messages_given_up_total")
            self._scheduler.drain()

    def stop(self, timeout: float | None = None) -> int:
        """Accepts no more, sends what is pending, and ends the threads.

        Blocks for `timeout` seconds and a little more at most (None: as long as it takes). Returns how many
        messages were not handed over, those given up since the drain began included; of a durable outbox,
        those in requests that did not end or could not be recorded. They are logged by ID.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.drain()
        if not self._threads:  # it never started, so nobody sends
            timeout = 0.0
        retries, under_way = self._scheduler.close(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        self._sender.over.set()
        left = [message_id for job in under_way for message_id in job.batch.ids]
        for job in retries:
            with contextlib.suppress(RepositoryUnavailableError):  # it stays claimed, which ends with this process
                self._repository.release(job.batch)
        while not self._repository.durable and (batch := self._repository.claim(sys.maxsize, 0.0).batch):
            left += batch.ids
        for start in range(0, len(left), 100):
            log.error("stopped before these messages were handed over: %s", " ".join(left[start : start + 100]))
        with contextlib.suppress(queue.Full):  # the sink hangs
            self._results.put(None, timeout=0.0 if left else _rest(deadline))
        for thread in self._threads:
            thread.join(0.0 if left else _rest(deadline))
        given_up = self._metrics.total("smsproxy_messages_given_up_total") - (self._given_up_before or 0)
        return len(left) + (0 if self._repository.durable else int(given_up))


# Delivery reports


@dataclass(frozen=True, slots=True)
class StatusUpdateError:
    """One update that could not be applied."""

    error: Exception
    message_id: str
    status: object


class StatusUpdater:
    """Applies delivery reports, and forgets what is due, from a thread of its own.

    `updates` takes mappings of message ID to status, or to the `Reason` of a message given up; it is bounded,
    so whoever is faster than the repository waits. `errors` gets what could not be applied; it is bounded,
    too: when full the oldest goes, and `errors_dropped` counts it.
    """

    RESULTS: Mapping[type[Exception], str] = {
        UnknownStatusError: "unknown_status",
        UnknownMessageError: "unknown_message",
        StatusTransitionError: "refused",
    }

    def __init__(
        self, repository: Repository, *, metrics: Metrics | None = None, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.updates: queue.Queue[Mapping[str, object] | None] = queue.Queue(UPDATES_WAITING)
        self.errors: queue.Queue[StatusUpdateError] = queue.Queue(ERRORS_WAITING)
        self.errors_dropped = 0
        self._repository, self._wall_clock = repository, wall_clock
        self._metrics = metrics or Metrics()
        self._incident = Incident(log, "status updates cannot be stored")
        self._forgetting = Incident(log, "messages that are due cannot be forgotten")
        self._end: Mapping[str, object] = {}  # a stop puts it into `updates`; None is the end of one source of reports
        self._ended = False
        self._over = threading.Event()  # set when a stop has waited long enough
        self._thread = threading.Thread(target=self._run, name="smsproxy-updater-1", daemon=True)

    def start(self) -> None:
        """Starts the thread; a second call does nothing. Raises RuntimeError when the system has none left."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Applies what is in `updates` and ends the thread; False if that took more than `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # it hangs, which the join will tell
                self.updates.put(self._end, timeout=timeout)
            self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            self._over.set()
            self._thread.join(GRACE)
        return not self._thread.is_alive()

    @property
    def dead(self) -> bool:
        """Whether the thread was started and runs no more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def _run(self) -> None:
        _work_in_background()
        wait: float | None = 0.0
        while not self._ended:
            reports: list[Mapping[str, object] | None] = []
            try:
                reports = self._next(wait)
                self._ended = any(each is self._end for each in reports)
                self._apply([each for each in reports if each is not None])
                wait = None if self._ended else self._forget()
            except Exception as error:
                log.error("the status updater goes on after a %s", _location(error))
                wait = Incident.PAUSE
            finally:
                for _ in reports:
                    self.updates.task_done()

    def _next(self, wait: float | None) -> list[Mapping[str, object] | None]:
        """What waits in `updates`, as much as is applied together; nothing if nothing comes in time."""
        reports: list[Mapping[str, object] | None] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            reports.append(self.updates.get(timeout=None if wait is None else min(wait, threading.TIMEOUT_MAX)))
            while (size := size + (len(reports[-1]) if isinstance(reports[-1], Mapping) else 1)) < UPDATES_AT_ONCE:
                reports.append(self.updates.get_nowait())
        return reports

    def _apply(self, reports: Iterable[Mapping[str, object]]) -> None:
        """Applies the reports in their order. Of a message's statuses that may follow each other the last is enough."""
        pending: dict[str, MessageStatus | Reason] = {}
        replaced: Counter[str] = Counter()  # statuses of a message that nobody needs to store
        for report in reports:
            updates = self._updates(report)
            twice = pending.keys() & updates.keys()
            changes = {(pending[message_id], updates[message_id]) for message_id in twice}
            if all(STATUS_OF[after] in TRANSITIONS[STATUS_OF[before]] for before, after in changes):
                replaced.update(twice)
            else:
                self._store(pending, replaced)
                pending, replaced = {}, Counter()
            pending.update(updates)
        self._store(pending, replaced)

    def _updates(self, report: object) -> dict[str, MessageStatus | Reason]:
        """What a report says, less what makes no sense, which fails."""
        updates: dict[str, MessageStatus | Reason] = {}
        failures: list[StatusUpdateError] = []
        if not isinstance(report, Mapping):
            log.error("a delivery report is not a mapping but a %s", type(report).__name__)
            return updates
        for message_id, status in report.items():
            try:
                if not isinstance(message_id, str):
                    raise UnknownMessageError("the ID is not a string")
                updates[message_id] = status if isinstance(status, Reason) else map_to_internal_status(status)
            except (UnknownMessageError, UnknownStatusError) as error:
                failures.append(StatusUpdateError(error, message_id, status))
        self._fail(failures)
        return updates

    def _store(self, updates: Mapping[str, MessageStatus | Reason], replaced: Counter[str]) -> None:
        if not updates:
            return
        try:
            errors = _persist(lambda: self._repository.update_all(updates), self._over, self._incident)
        except Exception as error:  # whatever it is, it is told of each of them
            errors = dict.fromkeys(updates, error)
        applied = {message_id: update for message_id, update in updates.items() if message_id not in errors}
        counts = Counter(applied.values())
        for update, count in counts.items():
            if STATUS_OF[update] in FINAL_STATUSES:
                self._metrics.add("smsproxy_messages_final_total", STATUS_OF[update].value, count)
        reports = sum(count for update, count in counts.items() if isinstance(update, MessageStatus))
        reports += sum(count for message_id, count in replaced.items() if message_id in applied)
        self._metrics.add("smsproxy_status_updates_total", "applied", reports)
        now = self._wall_clock()
        times = [time_of(each) for each, update in applied.items() if update is not MessageStatus.CONFIRMED]
        ages = [max(0.0, now - each) for each in times if each is not None]
        self._metrics.observe("smsproxy_final_status_seconds", ages)
        if counts[MessageStatus.FAILED]:
            failed = [each for each, update in applied.items() if update is MessageStatus.FAILED]
            log.info("FastSMSing reports %d messages as FAILED: %s", len(failed), " ".join(failed))
        self._fail([StatusUpdateError(error, message_id, updates[message_id]) for message_id, error in errors.items()])

    def _fail(self, failures: Sequence[StatusUpdateError]) -> None:
        """Counts the failures, logs those of a kind in one line, and keeps them for whoever reads `errors`."""
        kinds: dict[type[Exception], list[StatusUpdateError]] = {}
        for failure in failures:
            kinds.setdefault(type(failure.error), []).append(failure)
            if self.errors.full():
                with contextlib.suppress(queue.Empty):  # whoever reads `errors` was faster
                    self.errors.get_nowait()
                    self.errors_dropped += 1
            self.errors.put_nowait(failure)  # nobody else puts
        for kind, alike in kinds.items():
            self._metrics.add("smsproxy_status_updates_total", self.RESULTS.get(kind, "error"), len(alike))
            harmless = kind is StatusTransitionError  # repeated or overtaken
            level = logging.DEBUG if harmless else logging.WARNING
            log.log(level, "%d status updates were not applied (%s), the first of message %.80r",
                    len(alike), describe(alike[0].error), alike[0].message_id)  # fmt: skip

    def _forget(self) -> float | None:
        """Forgets a few messages; returns the seconds until it is to be called again."""
        try:
            wait = self._repository.forget()
        except RepositoryUnavailableError as error:
            self._forgetting.failed(error)
            return Incident.PAUSE
        self._forgetting.ended()
        return wait


# The facade


class SmsProxy:
    """Accepts messages, sees to their delivery, and answers for their status. Thread-safe.

    Use it as a context manager, or call `start` and `stop`. Messages may be accepted before the start and are
    sent after it. The repository stays the caller's to close.
    """

    def __init__(
        self, client: FastSmsingClient, config: SmsProxyConfig = SmsProxyConfig(), *,
        repository: Repository | None = None, statistics: Any = None, generate_id: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        self.statistics = ClientStatistics() if statistics is None else statistics
        self.metrics = Metrics()
        self._client = client
        self._repository = InMemoryRepository() if repository is None else repository
        self._generate_id = generate_id or NewIds()
        self._updater = StatusUpdater(self._repository, metrics=self.metrics)
        self._batching = SimpleBatchingClient(
            self._repository, client, config, self.statistics,
            metrics=self.metrics, give_up=self._updater.updates.put, autostart=False,
        )  # fmt: skip
        self._lock = threading.Lock()  # held for a whole start: a second one waits for the first
        self._started = False
        self.blocking = self._repository.blocking  # whether the methods may block for long
        client.subscribe(self._updater.updates)

    def __enter__(self) -> SmsProxy:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop(DRAIN_TIMEOUT)

    def start(self) -> None:
        """Starts to follow delivery reports and to send what is in the outbox; a second call does nothing.

        Raises RuntimeError when the system has no thread left; then nothing runs.
        """
        with self._lock:
            if not self._started:
                self._updater.start()
                try:
                    self._batching.start()
                except RuntimeError:
                    self._updater.stop(GRACE)
                    raise
                self._started = True

    def entry(self, message: SendMessage, idempotency_key: str | None = None) -> Entry:
        """The message with its ID, ready for `accept_all`; raises `ValidationError`. Never blocks.

        A key stands for its ID by a hash, so it is remembered wherever and as long as the message is.
        """
        message.validate()
        if idempotency_key is None:
            return Entry(message.to_message(self._generate_id()))
        content = "\0".join((idempotency_key, message.phone_number, message.message))
        fingerprint = hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:16]
        return Entry(message.to_message(id_of_key(idempotency_key)), fingerprint)

    def accept_all(self, entries: Sequence[Entry]) -> list[Exception | None]:
        """Accepts each entry or refuses it by itself; returns None or what `send` would raise for it, in order.

        Blocks for the repository only.
        """
        errors = self._batching.accept_all(entries)
        return [error and _refusal(error, entry) for entry, error in zip(entries, errors)] if any(errors) else errors

    def send(self, message: SendMessage, idempotency_key: str | None = None) -> SendingResult:
        """Accepts a message; blocks for the repository only.

        The same key with the same message gets the first result again, and nothing is sent twice.
        Raises `ValidationError`, `IdempotencyError`, `OverloadedError`, `ClosedError`, or what the
        repository raises; then the message is not accepted.
        """
        entry = self.entry(message, idempotency_key)
        for error in self.accept_all([entry]):
            if error is not None:
                raise error
        return SendingResult(entry.message.message_id)

    def get_status(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` for an ID that was never accepted here or is forgotten."""
        return self._repository.get(message_id)

    def get_reason(self, message_id: str) -> Reason | None:
        """Why the proxy itself gave the message up; None for every other message."""
        return self._repository.reason(message_id)

    def gauges(self) -> dict[str, float]:
        """Present figures for monitoring, by metric name; soon stale. May block for the repository."""
        return self._batching.gauges()

    def health(self) -> tuple[list[str], list[str]]:
        """Why this instance should get no traffic, and other warnings. May block for the repository."""
        reasons: list[str] = []
        warnings: list[str] = []
        try:
            self._repository.check()
            reasons, warnings = self._batching.health()
        except RepositoryUnavailableError as error:
            reasons.append(str(error))
        if self._updater.dead:
            reasons.append("the status updater is dead")
        return reasons, warnings

    def drain(self) -> None:
        """Prepares a `stop`, see `SimpleBatchingClient.drain`. Returns at once."""
        self._batching.drain()

    def stop(self, timeout: float | None = None) -> int:
        """Drains, then applies the delivery reports already received, and ends the client.

        Blocks for `timeout` seconds and a little more at most; returns how many messages could not be
        handed over, see `SimpleBatchingClient.stop`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        left = self._batching.stop(timeout)
        # In a thread of its own: a client that hangs must not hold up the end.
        closing = threading.Thread(target=self._stop_client, name="smsproxy-closer-1", daemon=True)
        try:
            closing.start()
            closing.join(_rest(deadline))
        except RuntimeError:  # the system has no thread left
            self._stop_client()
        if not self._updater.stop(None if deadline is None else _rest(deadline)):
            log.error("stopped before all delivery reports were applied")
        return left

    def _stop_client(self) -> None:
        try:
            self._client.stop()
        except Exception as error:  # it is the end all the same
            log.error("the client did not stop well: %s", describe(error))


def _refusal(error: Exception, entry: Entry) -> Exception | None:
    """Why a message that could not be saved is refused; None if it came before under the same key."""
    if entry.fingerprint is None or not isinstance(error, DuplicateMessageError):
        return error
    if error.fingerprint == entry.fingerprint:
        return None
    return IdempotencyError("the idempotency key was used for another message")


# IDs


_VARIANTS = dict(zip("0123456789abcdef", 4 * "89ab"))  # RFC 9562, 4.1: the variant's bits are 10


class NewIds:
    """Makes UUIDs of version 7 (RFC 9562, 5.7): milliseconds since 1970, then 74 random bits. Thread-safe.

    Random digits are drawn for many at a time, and the digits of a millisecond are used as long as it lasts (measured:
    0.9 in place of 2.3 microseconds an ID, of 28 that a POST takes the loop).
    """

    def __init__(self) -> None:
        self._tails: list[str] = []  # random parts not used yet
        self._head = (0, "")  # the last millisecond and its digits

    def __call__(self) -> str:
        """A new ID."""
        try:
            tail = self._tails.pop()
        except IndexError:
            tails = self._random_tails()
            tail = tails.pop()
            self._tails += tails
        milliseconds, head = self._head
        now = time.time_ns() // 1_000_000
        if now != milliseconds:
            head = f"{now >> 16:08x}-{now & 0xFFFF:04x}-"
            self._head = (now, head)
        return head + tail

    @staticmethod
    def _random_tails() -> list[str]:
        digits = os.urandom(19 * 256 // 2).hex()
        parts = [digits[start : start + 19] for start in range(0, len(digits), 19)]
        return [f"7{part[:3]}-{_VARIANTS[part[3]]}{part[4:7]}-{part[7:]}" for part in parts]


def id_of_key(key: str) -> str:
    """The UUID of version 8 (RFC 9562, 5.8) that stands for an idempotency key."""
    digits = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-{_VARIANTS[digits[16]]}{digits[17:20]}-{digits[20:32]}"


def time_of(message_id: str) -> float | None:
    """When the message was accepted, in seconds since 1970; None for an ID that does not tell."""
    return _seconds(message_id[:13]) if len(message_id) == 36 and message_id[14] == "7" else None


@functools.lru_cache(256)  # messages of a batch came within few milliseconds
def _seconds(digits: str) -> float | None:
    try:
        return int(digits.replace("-", ""), 16) / 1000
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit("smsproxy.py is the domain's module; start main.py, or the command smsproxy")

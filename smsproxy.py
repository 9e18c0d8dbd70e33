"""The domain: accept messages, batch them, hand them to FastSMSing, follow what becomes of them.

`SmsProxy` is the facade. Behind it a `SimpleBatchingClient` gathers messages and sends them from
its own threads, a `StatusUpdater` applies FastSMSing's delivery reports, and a `Repository`
remembers the status of every message. Nothing here knows of HTTP, flags or files.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import queue
import random
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Protocol

import fastsmsing
from fastsmsing import FastSmsingClient, Message, RejectedError

__all__ = [
    "ClientResult", "ClientStatistics", "ClosedError", "DuplicateMessageError", "DurableRepository",
    "FINAL_STATUSES", "IdempotencyError", "InMemoryRepository", "MessageStatus", "OverloadedError", "Repository",
    "RepositoryUnavailableError", "SendMessage", "SendingResult", "SimpleBatchingClient", "SmsProxy",
    "SmsProxyConfig", "SmsProxyError", "Statistics", "StatusTransitionError", "StatusUpdateError", "StatusUpdater",
    "TRANSITIONS", "Metrics", "UnknownMessageError", "UnknownStatusError", "ValidationError",
    "check_transition", "map_to_internal_status", "validate",
]  # fmt: skip

log = logging.getLogger("smsproxy")

RESULTS_WAITING = 1_000  # results a slow statistics sink may be behind before the newest are dropped
UPDATES_WAITING = 10_000  # delivery reports the provider may be ahead of us before it has to wait
ERRORS_WAITING = 1_000  # failed updates kept for whoever reads `StatusUpdater.errors`
LONGEST_WAIT = 3_600.0  # seconds; bounds what a provider can ask for with `retry_after`
GRACE = 1.0  # seconds that the last steps of a stop get even when its deadline has passed
RETENTION = 3 * 24 * 3600.0  # seconds


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
    """The repository cannot write just now (disk full, file locked); nothing was changed; try again later."""


# Statuses


class MessageStatus(str, Enum):
    """What the proxy says of a message."""

    ACCEPTED = "ACCEPTED"  # it will go out in the nearest batch
    NOT_FOUND = "NOT_FOUND"  # never accepted here, or forgotten
    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"
    DELIVERED = "DELIVERED"


FINAL_STATUSES = frozenset({MessageStatus.FAILED, MessageStatus.DELIVERED})
TRANSITIONS: Mapping[MessageStatus, frozenset[MessageStatus]] = {
    MessageStatus.ACCEPTED: frozenset({MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED}),
    MessageStatus.NOT_FOUND: frozenset(),
    MessageStatus.CONFIRMED: FINAL_STATUSES,
    MessageStatus.FAILED: frozenset(),
    MessageStatus.DELIVERED: frozenset(),
}


def check_transition(message_id: str, current: MessageStatus, status: MessageStatus) -> None:
    """The one judge: raises `UnknownMessageError` or `StatusTransitionError` for a change that is not allowed."""
    if current is MessageStatus.NOT_FOUND:
        raise UnknownMessageError(f"message {message_id} is not known")
    if status not in TRANSITIONS[current]:
        raise StatusTransitionError(f"message {message_id} cannot go from {current.value} to {status.value}")


_INTERNAL = {status: MessageStatus(status.value) for status in fastsmsing.MessageStatus}


def map_to_internal_status(status: object) -> MessageStatus:
    """The proxy's status for one of FastSMSing's; raises `UnknownStatusError`."""
    if isinstance(status, str) and status in _INTERNAL:
        return _INTERNAL[status]  # type: ignore[index]  # a str enum's members equal their values
    word = isinstance(status, str) and len(status) <= 30 and status.isupper() and status.isidentifier()
    raise UnknownStatusError(f"unknown status {status if word else type(status).__name__}")


# Values


@dataclass(frozen=True, slots=True)
class SendMessage:
    """What a caller wants sent. Its `repr` shows nothing, so that logs stay private."""

    phone_number: str = field(repr=False)
    message: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SendingResult:
    """The ID under which a message was accepted."""

    id: str


@dataclass(frozen=True, slots=True)
class ClientResult:
    """How one batch ended: `error` is None when FastSMSing took it, else that of the last attempt."""

    messages: tuple[Message, ...]
    error: BaseException | None
    attempt: int
    max_attempts: int


@dataclass(frozen=True, slots=True)
class SmsProxyConfig:
    """When batches leave and how hard we try; times in seconds. Wrong values raise `ValidationError`."""

    batch_size: int = 10  # messages that make a batch leave; 1 or less turns batching off
    max_batch_size: int | None = None  # most messages in one request; None means batch_size
    max_delay: float | None = 5.0  # longest linger of a message; None waits for ever
    senders: int = 4  # requests to the provider at a time
    max_pending: int = 10_000  # accepted and not yet handed over
    max_attempts: int = 3  # tries per batch; less than 1 counts as 1
    backoff_base: float = 0.1  # full jitter: before retry n uniform in 0 .. min(max, base * 2 ** (n - 1))
    backoff_max: float = 10.0
    max_age: float | None = None  # older messages are not sent any more; None sends them all

    def __post_init__(self) -> None:
        for spec in fields(self):
            self._check(spec.name, getattr(self, spec.name), whole="int" in spec.type)
        size = max(1, self.batch_size)
        largest = size if self.max_batch_size is None or size == 1 else self.max_batch_size
        object.__setattr__(self, "batch_size", size)
        object.__setattr__(self, "max_batch_size", largest)
        object.__setattr__(self, "max_attempts", max(1, self.max_attempts))
        if largest < size:
            raise ValidationError("max_batch_size", "must not be less than batch_size")
        if self.max_pending < size:
            raise ValidationError("max_pending", "must not be less than batch_size")

    @staticmethod
    def _check(name: str, value: Any, whole: bool) -> None:
        if value is None and name in ("max_batch_size", "max_delay", "max_age"):
            return
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValidationError(name, "must be a whole number" if whole else "must be a number")
        if name in ("senders", "max_pending") and value < 1:
            raise ValidationError(name, "must be at least 1")
        if not whole and not 0 <= value <= sys.float_info.max:
            raise ValidationError(name, "must be a finite number of seconds, not negative")


# Repositories


class Repository(Protocol):
    """Remembers statuses. Safe under any number of threads.

    One whose methods may block for long sets `slow = True`; they are then kept off the serving thread.
    """

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        """Stores `ACCEPTED`; raises `DuplicateMessageError`. A `fingerprint` only comes with an idempotency key."""

    def get(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` when unknown."""

    def update(self, message_id: str, status: MessageStatus) -> None:
        """Raises `UnknownMessageError` or `StatusTransitionError`, and then changes nothing."""


class DurableRepository(Repository, Protocol):
    """A repository that survives a restart: it also keeps the outbox, the messages not yet handed over.

    Every method returns when its change is on disk, or raises `RepositoryUnavailableError` when nothing
    can be written now.
    """

    def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
        """`save` for messages with their fingerprints, in one transaction; what it would raise for each of them."""

    def update_all(self, updates: Mapping[str, MessageStatus]) -> dict[str, Exception]:
        """Applies the updates in one transaction; returns why some could not be."""

    def handed_over(self, message_ids: Iterable[str]) -> None:
        """Takes messages out of the outbox and erases their numbers and texts."""

    def outbox(self) -> Iterable[tuple[float, Message]]:
        """Time of acceptance (as of `time.time`) and message, oldest first."""


class InMemoryRepository:
    """Statuses in a dict; a restart loses them. Thread-safe; nothing blocks.

    A final status is forgotten `retention` seconds after it was reached (0: never), a few at a time
    whenever something is stored or updated, and late by at most a thousandth of that time.
    """

    def __init__(self, retention: float = RETENTION, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retention, self._clock = retention, clock
        self._lock = threading.Lock()  # guards everything below
        self._statuses: dict[str, MessageStatus] = {}
        self._fingerprints: dict[str, bytes] = {}
        # IDs by the time to forget them, in lists that each span retention / 1000: a time to each ID would
        # cost more memory than its status does.
        self._finals: deque[tuple[float, list[str]]] = deque()

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        """Stores `ACCEPTED`; raises `DuplicateMessageError`. The message itself is not kept."""
        with self._lock:
            if self._finals:
                self._forget(self._clock())
            if message_id in self._statuses:
                raise DuplicateMessageError(message_id, self._fingerprints.get(message_id))
            self._statuses[message_id] = MessageStatus.ACCEPTED
            if fingerprint is not None:
                self._fingerprints[message_id] = fingerprint

    def get(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` when unknown."""
        return self._statuses.get(message_id, MessageStatus.NOT_FOUND)  # a dict look-up is atomic

    def update(self, message_id: str, status: MessageStatus) -> None:
        """Raises `UnknownMessageError` or `StatusTransitionError`, and then changes nothing."""
        with self._lock:
            current = self._statuses.get(message_id, MessageStatus.NOT_FOUND)
            if status not in TRANSITIONS[current]:
                check_transition(message_id, current, status)
            self._statuses[message_id] = status
            if status in FINAL_STATUSES and self._retention:
                now = self._clock()
                self._remember_final(message_id, now + self._retention * 1.001)
                self._forget(now)

    def _remember_final(self, message_id: str, forget_at: float) -> None:
        if self._finals and forget_at - self._finals[-1][0] < self._retention / 1000:
            self._finals[-1][1].append(message_id)
        else:
            self._finals.append((forget_at, [message_id]))

    def _forget(self, now: float) -> None:
        """Forgets a few: more than are added by one call, so that what is due never piles up."""
        if self._finals[0][0] > now:
            return
        due = self._finals[0][1]
        for message_id in due[-4:]:
            del self._statuses[message_id]
            self._fingerprints.pop(message_id, None)
        del due[-4:]
        if not due:
            self._finals.popleft()


# Statistics


class Metrics:
    """Counters for monitoring, by metric name and label value. Thread-safe."""

    BOUNDS: Mapping[str, tuple[float, ...]] = {  # of the histograms' buckets
        "smsproxy_batch_messages": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, math.inf),
        "smsproxy_provider_request_duration_seconds": (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, math.inf),
    }

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _counts
        self._counts: dict[tuple[str, str | float], float] = {}

    def add(self, name: str, label: str | float = "", amount: float = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name, label] = self._counts.get((name, label), 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram: counts its bucket, labelled by the upper bound, and sums it up."""
        self.add(name, next(bound for bound in self.BOUNDS[name] if value <= bound))
        self.add(f"{name}_sum", "", value)

    def counts(self) -> dict[tuple[str, str | float], float]:
        """The counters so far, by name and label."""
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True, slots=True)
class Statistics:
    """How well the provider does."""

    success: int = 0  # batches that it took
    failed: int = 0  # batches given up
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
                success=old.success + (not failed),
                failed=old.failed + failed,
                messages=old.messages + len(result.messages),
                attempts=old.attempts + result.attempt,
                last_error=_reason(result.error, result.messages) if result.error is not None else old.last_error,
            )

    def get_statistics(self) -> Statistics:
        """The figures of one moment, already a little old when they are read."""
        return self._sum


def _reason(error: BaseException, messages: Iterable[Message]) -> str:
    """An error in words, without the numbers and texts that a provider may have put into it."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # it is not ours
        return type(error).__name__
    secrets = {secret for message in messages for secret in (message.phone_number, message.message)}
    spelled = {spelling[cut] for secret in secrets for spelling, cut in (
        (secret, slice(None)), *((spell(secret), slice(1, -1)) for spell in (repr, ascii, json.dumps)))}  # fmt: skip
    for secret in sorted(spelled, key=len, reverse=True):  # the longest first: one may be part of another
        text = text.replace(secret, "***")
    return " ".join(text.split())[:500]  # in one line: it would pass for lines of ours


def _ids(messages: Iterable[Message]) -> str:
    return " ".join(message.message_id for message in messages)


def _work_in_background() -> None:
    """Lets the thread that accepts messages run on when it wakes this one (Linux: sched(7), SCHED_BATCH).

    Otherwise every wake-up on a busy processor costs two changes of thread, only to find the interpreter's lock
    held (measured on one core: a fifth of the throughput). The share of the processor stays the same.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or one that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class _Worker:
    """One daemon thread that hands every item of a queue to `handle`, until it takes a `None`."""

    def __init__(self, role: str, inbox: queue.Queue[Any], handle: Callable[[Any], None]) -> None:
        self._inbox, self._handle = inbox, handle
        self._thread = threading.Thread(target=self._run, name=f"smsproxy-{role}-1", daemon=True)

    def start(self) -> None:
        """Starts the thread; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    @property
    def dead(self) -> bool:
        """Whether it was started and runs no more."""
        return self._thread.ident is not None and not self.alive

    def stop(self, timeout: float | None) -> bool:
        """Lets the thread finish what is in the queue; False if it did not in `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # it hangs, which the join will tell
                self._inbox.put(None, timeout=timeout)
            self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        _work_in_background()
        while True:
            item = self._inbox.get()
            try:
                if item is None:
                    return
                self._handle(item)
            except Exception as error:  # its text could hold a phone number
                at = traceback.extract_tb(error.__traceback__)[-1]
                kind = type(error).__name__
                log.error("%s goes on after a %s at %s:%d", self._thread.name, kind, at.filename, at.lineno)
            finally:
                self._inbox.task_done()


# Batching


class SimpleBatchingClient:
    """Gathers messages and hands them over in batches, from threads of its own. Thread-safe.

    A batch is cut late, when a sender is free to carry it: once `batch_size` messages are pending, or
    the oldest has lingered for `max_delay`, or a flush or stop is under way. It then takes up to
    `max_batch_size`, so that batches grow while every sender is busy. `statistics` gets one
    `ClientResult` per batch from a thread of its own, and only ever delays itself. `settle` is called
    before a batch is marked `FAILED`, so that delivery reports received before can be applied first.
    `clock` (seconds) and `rng` (uniform in 0..1) are there for tests.
    """

    def __init__(
        self,
        repository: Repository,
        client: FastSmsingClient,
        config: SmsProxyConfig = SmsProxyConfig(),
        statistics: Any = None,
        *,
        metrics: Metrics | None = None,
        settle: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._repository, self._client, self._config = repository, client, config
        self._durable = hasattr(repository, "outbox")
        self._metrics = metrics or Metrics()
        self._settle, self._clock, self._rng = settle, clock, rng
        self._lock = threading.Lock()  # guards everything below
        self._condition = threading.Condition(self._lock)  # senders wait for a batch, `stop` for the last one to end
        self._fifo: deque[tuple[float, Message]] = deque()  # time of acceptance, message
        self._in_flight: dict[int, list[tuple[float, Message]]] = {}  # by thread
        self._requests = 0  # to the provider, under way
        self._pending = 0  # reserved, in the FIFO or in flight
        self._left = 0  # of those, given back to the outbox by a stop
        self._queued = self._taken = self._flush_until = 0  # counts of messages, in their order
        self._keeper = False  # one idle sender watches the linger of the oldest message; the others sleep
        self._closing = self._abandoned = False
        self._threads: list[threading.Thread] = []
        self._hurry = threading.Event()  # set by stop: cuts every wait between tries short
        self._results: queue.Queue[ClientResult | None] = queue.Queue(RESULTS_WAITING)
        self._reporter = _Worker("statistics", self._results, statistics.send) if statistics is not None else None

    # Accepting

    def send(self, message: SendMessage, message_id: str, fingerprint: bytes | None = None) -> None:
        """Saves the message as `ACCEPTED` and queues it; blocks for the repository only.

        Raises `OverloadedError`, `ClosedError` or what the repository's `save` raises; then nothing
        is queued.
        """
        outgoing = Message(message.phone_number, message.message, message_id)
        for error in self.send_all([(outgoing, fingerprint)]):
            if error is not None:
                raise error

    def send_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
        """`send` for messages with their fingerprints, at little more than the price of one.

        Returns what `send` would raise for each of them, in their order.
        """
        results: list[Exception | None] = []
        while rest := messages[len(results) :]:  # once more when some gave their places back
            room, refusal = self._reserve(len(rest))
            if not room:
                return results + [refusal] * len(rest)
            errors: list[Exception | None] = []
            try:
                errors = _save_all(self._repository, rest[:room])
            finally:
                self._enqueue([message for (message, _), error in zip(rest, errors) if error is None], room)
            results += errors
        return results

    def restore(self, outbox: Iterable[tuple[float, Message]]) -> int:
        """Queues what an earlier process accepted, whatever `max_pending` says; returns how many."""
        now, wall = self._clock(), time.time()
        restored = [(now - max(0.0, wall - accepted), message) for accepted, message in outbox]
        with self._lock:
            self._start_threads()
            self._pending += len(restored)
            self._queued += len(restored)
            self._fifo.extend(restored)
            self._condition.notify()
        return len(restored)

    def flush(self) -> None:
        """Lets everything that is pending now leave without lingering; does not wait for it."""
        with self._lock:
            self._flush_until = self._queued
            self._condition.notify()

    def _reserve(self, count: int) -> tuple[int, Exception | None]:
        """Takes places among the pending before anything is saved, so that nothing saved is refused.

        Returns how many there were, and why there is none for the rest.
        """
        with self._lock:
            if self._closing:
                return 0, ClosedError("shutting down")
            if not self._threads:
                self._start_threads()
            room = min(count, max(0, self._config.max_pending - self._pending))
            self._pending += room
            return room, OverloadedError("too many messages are pending")

    def _release(self, count: int) -> None:
        with self._lock:
            self._pending -= count
            if self._closing:
                self._condition.notify_all()

    def _enqueue(self, messages: Sequence[Message], reserved: int) -> None:
        """Queues messages for which places were reserved, and gives back the places that are left."""
        with self._lock:
            before = len(self._fifo)
            now = self._clock()
            self._fifo.extend([(now, message) for message in messages])
            self._queued += len(messages)
            self._pending -= reserved - len(messages)
            if self._closing:
                self._condition.notify_all()
            # One wake-up starts the linger and one takes a full batch; whoever cuts wakes the next.
            elif before < self._config.batch_size <= len(self._fifo) or (messages and not before and not self._keeper):
                self._condition.notify()

    def _start_threads(self) -> None:
        while len(self._threads) < self._config.senders:
            name = f"smsproxy-sender-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        if self._reporter is not None:
            self._reporter.start()

    # Cutting batches

    def _run(self) -> None:
        _work_in_background()
        while (batch := self._next_batch()) is not None:
            try:
                left = self._deliver(batch)
            except Exception as error:
                left, messages = 0, [message for _, message in batch]
                log.error("a batch ended with an error (%s): %s", _reason(error, messages), _ids(messages))
            with self._lock:
                del self._in_flight[threading.get_ident()]
                self._left += left
            self._release(len(batch) - left)

    def _next_batch(self) -> list[tuple[float, Message]] | None:
        """Waits for a batch to carry; None when the client is stopped."""
        with self._lock:
            while not self._abandoned:
                wait = self._linger()
                if wait is not None and wait <= 0:
                    return self._cut()
                if wait is None or self._keeper:
                    self._condition.wait()
                else:
                    self._keeper = True
                    self._condition.wait(min(wait, threading.TIMEOUT_MAX))
                    self._keeper = False
            return None

    def _linger(self) -> float | None:
        """Seconds until a batch may leave, None when only another message or a flush can tell."""
        if not self._fifo:
            return None
        if len(self._fifo) >= self._config.batch_size or self._taken < self._flush_until or self._closing:
            return 0.0
        if self._config.max_delay is None:
            return None
        return self._fifo[0][0] + self._config.max_delay - self._clock()

    def _cut(self) -> list[tuple[float, Message]]:
        size = min(len(self._fifo), self._config.max_batch_size or 1)
        batch = [self._fifo.popleft() for _ in range(size)]
        self._taken += size
        self._in_flight[threading.get_ident()] = batch
        if self._fifo:
            self._condition.notify()  # another full batch, or a linger to be watched
        return batch

    # Handing over

    def _deliver(self, batch: list[tuple[float, Message]]) -> int:
        """Tries until the batch is handed over or given up; returns how many messages a stop left over."""
        error: BaseException | None = None
        sent: tuple[Message, ...] = ()
        self._metrics.observe("smsproxy_batch_messages", len(batch))
        for attempt in range(1, self._config.max_attempts + 1):
            batch = self._drop_expired(batch)
            if not batch:
                if error is not None:
                    self._report(ClientResult(sent, error, attempt - 1, self._config.max_attempts))
                return 0
            sent = tuple([message for _, message in batch])
            error = self._request(sent, attempt)
            if error is None or isinstance(error, RejectedError):
                break
            if attempt < self._config.max_attempts:
                self._back_off(attempt, error)
            if self._abandoned:
                return len(sent)
        try:
            if error is None:
                self._handed_over(sent, attempt)
            elif isinstance(error, RejectedError):
                self._give_up(sent, "rejected", _reason(error, sent))
            elif self._durable and self._hurry.is_set():
                log.warning("left %d messages in the outbox for the next start: %s", len(sent), _ids(sent))
                return len(sent)
            else:
                self._give_up(sent, "attempts", _reason(error, sent))
            return 0
        finally:  # whatever the repository says
            self._report(ClientResult(sent, error, attempt, self._config.max_attempts))

    def _drop_expired(self, batch: list[tuple[float, Message]]) -> list[tuple[float, Message]]:
        if self._config.max_age is None:
            return batch
        oldest = self._clock() - self._config.max_age
        expired = [message for accepted, message in batch if accepted < oldest]
        if expired:
            self._give_up(expired, "expired", f"older than {self._config.max_age:g} s")
        return [item for item in batch if item[0] >= oldest]

    def _request(self, messages: tuple[Message, ...], attempt: int) -> BaseException | None:
        """One paid request; returns what it raised."""
        started, error, result = self._clock(), None, "ok"
        with self._lock:
            self._requests += 1
        try:
            self._client.send(list(messages))
        except BaseException as raised:  # a SystemExit, too, would end nothing but this thread
            error, result = raised, "rejected" if isinstance(raised, RejectedError) else "error"
            log.warning("attempt %d of %d failed for %d messages: %s", attempt, self._config.max_attempts,
                        len(messages), _reason(raised, messages))  # fmt: skip
        with self._lock:
            self._requests -= 1
        self._metrics.add("smsproxy_provider_requests_total", result)
        self._metrics.observe("smsproxy_provider_request_duration_seconds", self._clock() - started)
        return error

    def _back_off(self, attempt: int, error: BaseException) -> None:
        """Full jitter, but never less than the provider asked for; a stop cuts it short."""
        ceiling = min(self._config.backoff_max, self._config.backoff_base * 2.0 ** min(attempt - 1, 64))
        wait, asked = self._rng() * ceiling, getattr(error, "retry_after", None)
        if isinstance(asked, (int, float)) and asked > wait:  # False for a NaN
            wait = asked
        self._hurry.wait(min(LONGEST_WAIT, wait))

    def _handed_over(self, messages: tuple[Message, ...], attempt: int) -> None:
        if self._durable:  # first of all: until it is recorded, a crash would send the batch again
            ids = [message.message_id for message in messages]
            _persist(lambda: self._repository.handed_over(ids), self._hurry)  # type: ignore[attr-defined]
        self._metrics.add("smsproxy_batches_total", "handed_over")
        self._metrics.add("smsproxy_messages_handed_over_total", "", len(messages))
        self._metrics.add("smsproxy_requests_saved_total", "", len(messages) - 1)
        log.info("handed over %d messages at attempt %d: %s", len(messages), attempt, _ids(messages))

    def _give_up(self, messages: Sequence[Message], why: str, reason: str) -> None:
        log.error("gave up %d messages (%s, %s): %s", len(messages), why, reason, _ids(messages))
        if why != "expired":
            self._metrics.add("smsproxy_batches_total", "given_up")
        self._metrics.add("smsproxy_messages_given_up_total", why, len(messages))
        self._settle()
        updates = dict.fromkeys((message.message_id for message in messages), MessageStatus.FAILED)
        failures = _update_all(self._repository, updates, self._hurry)
        self._metrics.add("smsproxy_messages_final_total", "FAILED", len(messages) - len(failures))
        for message_id, error in failures.items():
            log.warning("message %s is not marked FAILED: %s", message_id, error)

    def _report(self, result: ClientResult) -> None:
        if self._reporter is not None:
            try:
                self._results.put_nowait(result)
            except queue.Full:
                log.warning("the statistics sink is too slow: one result is dropped")

    # Watching and ending

    def gauges(self) -> dict[str, float]:
        """Pending messages, age of the oldest in seconds, requests in flight, messages accepted; soon stale."""
        with self._lock:
            oldest = min((batch[0][0] for batch in (*self._in_flight.values(), self._fifo) if batch), default=None)
            return {
                "smsproxy_messages_accepted_total": self._queued,
                "smsproxy_pending_messages": self._pending,
                "smsproxy_oldest_pending_message_age_seconds": 0.0 if oldest is None else self._clock() - oldest,
                "smsproxy_provider_requests_in_flight": self._requests,
            }

    def health(self) -> list[str]:
        """Why this should be taken out of rotation; empty when all is well."""
        gauges, reasons = self.gauges(), []
        if self._closing:
            reasons.append("shutting down")
        if gauges["smsproxy_pending_messages"] >= self._config.max_pending:
            reasons.append("queue full")
        longest = (self._config.max_delay or 0.0) + 60.0
        if self._config.max_delay is not None and gauges["smsproxy_oldest_pending_message_age_seconds"] > longest:
            reasons.append(f"oldest pending message older than {longest:g} s")
        if not self._closing and not all(thread.is_alive() for thread in self._threads):
            reasons.append("a sender thread is dead")
        if self._reporter is not None and self._reporter.dead and not self._closing:
            reasons.append("the statistics thread is dead")
        return reasons

    def stop(self, timeout: float | None = None) -> int:
        """Accepts no more, sends what is pending without waits, and ends the threads.

        Blocks for `timeout` seconds at most (None: as long as it takes), and returns how many messages
        could not be handed over: still queued, or in a request that did not end. They are logged by ID.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        timeout = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        with self._lock:
            self._closing = True
            self._hurry.set()
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._abandoned or self._pending == self._left, timeout)
            self._abandoned = True
            self._condition.notify_all()
            left = self._pending
            lost = [message for batch in (*self._in_flight.values(), self._fifo) for _, message in batch]
        for start in range(0, len(lost), 100):
            log.error("stopped before these messages were handed over: %s", _ids(lost[start : start + 100]))
        for thread in self._threads:
            thread.join(0.0 if lost else GRACE)
        if self._reporter is not None:
            self._reporter.stop(_rest(deadline))
        return left


def _rest(deadline: float | None) -> float:
    """Seconds until the deadline, and a little more when it is close or past."""
    return GRACE if deadline is None else min(max(GRACE, deadline - time.monotonic()), LONGEST_WAIT)


def _persist(change: Callable[[], Any], hurry: threading.Event) -> Any:
    """Repeats a change until the repository can write again; once `hurry` is set, its error is raised."""
    wait = 0.1
    while True:
        try:
            return change()
        except RepositoryUnavailableError as error:
            if hurry.is_set():
                raise
            log.warning("waiting for the repository: %s", error)
            hurry.wait(wait)
            wait = min(10.0, wait * 2)


def _save_all(repository: Repository, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
    """Saves the messages, together where the repository can; returns why some could not be."""
    if hasattr(repository, "save_all"):
        try:
            return list(repository.save_all(messages))
        except Exception as error:  # whatever it is, each of them gets to know
            return [error] * len(messages)
    errors: list[Exception | None] = []
    for message, fingerprint in messages:
        try:
            if fingerprint is None:
                repository.save(message.message_id, message)
            else:
                repository.save(message.message_id, message, fingerprint)
            errors.append(None)
        except Exception as error:  # one that fails does not cost the others
            errors.append(error)
    return errors


def _update_all(
    repository: Repository, updates: Mapping[str, MessageStatus], hurry: threading.Event
) -> dict[str, Exception]:
    """Applies the updates, together where the repository can; returns why some could not be."""
    failures: dict[str, Exception] = {}
    if hasattr(repository, "update_all"):
        try:
            failures.update(_persist(lambda: repository.update_all(updates), hurry))
        except Exception as error:  # whatever it is, each of them gets to know
            failures.update(dict.fromkeys(updates, error))
        return failures
    for message_id, status in updates.items():
        try:
            repository.update(message_id, status)
        except Exception as error:  # one update that fails does not cost the others
            failures[message_id] = error
    return failures


# Delivery reports


@dataclass(frozen=True, slots=True)
class StatusUpdateError:
    """One update that could not be applied."""

    error: Exception
    message_id: str
    status: object


class StatusUpdater:
    """Applies delivery reports from a thread of its own, until it takes a `None` from `updates`.

    `updates` is bounded, so a provider that is faster than the repository waits. `errors` gets what
    could not be applied; it is bounded, too: when full the oldest goes, and `errors_dropped` counts it.
    """

    RESULTS: Mapping[type[Exception], str] = {
        UnknownStatusError: "unknown_status",
        UnknownMessageError: "unknown_message",
        StatusTransitionError: "refused",
    }

    def __init__(self, repository: Repository, *, metrics: Metrics | None = None) -> None:
        self.updates: queue.Queue[Mapping[str, object] | None] = queue.Queue(UPDATES_WAITING)
        self.errors: queue.Queue[StatusUpdateError | None] = queue.Queue(ERRORS_WAITING)
        self.errors_dropped = 0
        self._repository = repository
        self._metrics = metrics or Metrics()
        self._hurry = threading.Event()
        self._worker = _Worker("updater", self.updates, self._apply)

    def start(self) -> None:
        """Starts the thread; a second call does nothing."""
        self._worker.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Applies what is in `updates` and ends the thread; False if that took more than `timeout` seconds."""
        self._hurry.set()
        return self._worker.stop(timeout)

    @property
    def dead(self) -> bool:
        """Whether the thread was started and runs no more."""
        return self._worker.dead

    def settle(self) -> None:
        """Blocks until what is in `updates` now is applied, for a second at most."""
        marker = threading.Event()
        with contextlib.suppress(queue.Full):  # it hangs: then nothing is to be waited for
            self.updates.put_nowait(marker)  # type: ignore[arg-type]
            marker.wait(GRACE if self._worker.alive else 0.0)

    def _apply(self, reports: Mapping[str, object] | threading.Event) -> None:
        if isinstance(reports, threading.Event):
            reports.set()
            return
        updates: dict[str, MessageStatus] = {}
        for message_id, status in reports.items():
            try:
                updates[message_id] = map_to_internal_status(status)
            except UnknownStatusError as error:
                self._fail(message_id, status, error)
        failures = _update_all(self._repository, updates, self._hurry)
        for message_id, failure in failures.items():
            self._fail(message_id, updates.pop(message_id), failure)
        applied = list(updates.values())
        for status in set(applied):
            count = applied.count(status)
            self._metrics.add("smsproxy_status_updates_total", "applied", count)
            if status in FINAL_STATUSES:
                self._metrics.add("smsproxy_messages_final_total", status.value, count)

    def _fail(self, message_id: str, status: object, error: Exception) -> None:
        self._metrics.add("smsproxy_status_updates_total", self.RESULTS.get(type(error), "error"))
        while True:
            try:
                self.errors.put_nowait(StatusUpdateError(error, message_id, status))
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):  # whoever reads `errors` was faster
                    self.errors.get_nowait()
                    self.errors_dropped += 1


# The facade


class SmsProxy:
    """Accepts messages, sees to their delivery, and answers for their status. Thread-safe.

    Use it as a context manager, or call `start` and `stop`. The repository stays the caller's to close.
    """

    def __init__(
        self,
        client: FastSmsingClient,
        config: SmsProxyConfig = SmsProxyConfig(),
        *,
        repository: Repository | None = None,
        statistics: Any = None,
        generate_id: Callable[[], str] | None = None,
    ) -> None:
        self.statistics = ClientStatistics() if statistics is None else statistics
        self.metrics = Metrics()
        self._client = client
        self._repository = InMemoryRepository() if repository is None else repository
        self._generate_id = generate_id
        self._updater = StatusUpdater(self._repository, metrics=self.metrics)
        self._batching = SimpleBatchingClient(
            self._repository, client, config, self.statistics, metrics=self.metrics, settle=self._updater.settle
        )
        self._error_log = _Worker("errors", self._updater.errors, self._log_error)
        self._starting = threading.Lock()  # held for the whole start: two would send the outbox twice
        self._started = False
        self.slow = bool(getattr(self._repository, "slow", False))  # its methods may block for long
        self.durable = hasattr(self._repository, "outbox")
        client.subscribe(self._updater.updates)

    def __enter__(self) -> SmsProxy:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts to follow delivery reports, and queues again what an earlier process left in the outbox."""
        with self._starting:
            if self._started:
                return
            self._error_log.start()
            self._updater.start()
            if self.durable:
                restored = self._batching.restore(self._repository.outbox())  # type: ignore[attr-defined]
                log.info("queued %d messages again that were accepted before and not handed over", restored)
            self._started = True

    def send(self, message: SendMessage, idempotency_key: str | None = None) -> SendingResult:
        """Accepts a message; blocks for the repository only.

        The same key with the same message gets the first result again, and nothing is sent twice.
        Raises `ValidationError`, `IdempotencyError`, `OverloadedError`, `ClosedError`, or what the
        repository raises; then the message is not accepted.
        """
        result = self.send_all([(message.phone_number, message.message, idempotency_key)])[0]
        if isinstance(result, Exception):
            raise result
        return SendingResult(result)

    def send_all(self, messages: Sequence[tuple[Any, Any, str | None]]) -> list[str | Exception]:
        """`send` for messages as (phone number, message, idempotency key), at little more than the price of one.

        Each is accepted or refused by itself: returns its ID, or the exception that `send` would raise for it.
        """
        if self._generate_id is None:
            ids = _uuid4s(os.urandom(16 * len(messages)).hex().encode())
        else:
            ids = iter(self._generate_id, object())
        results: list[str | Exception] = []
        items: list[tuple[Message, bytes | None]] = []  # of those that are valid
        for phone_number, message, key in messages:
            try:
                items.append(self._identify(phone_number, message, key, ids))
                results.append(items[-1][0].message_id)
            except Exception as error:  # it is that message's alone
                results.append(error)
        errors = self._batching.send_all(items)
        if any(errors):
            places = [place for place, result in enumerate(results) if not isinstance(result, Exception)]
            for place, (_, fingerprint), refusal in zip(places, items, errors):
                if refusal is not None:
                    results[place] = _refusal(refusal, fingerprint) or results[place]
        return results

    def get_status(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` for an ID that was never accepted here or is forgotten."""
        return self._repository.get(message_id)

    def gauges(self) -> dict[str, float]:
        """Present figures for monitoring, by metric name; soon stale."""
        return self._batching.gauges()

    def health(self) -> list[str]:
        """Why the service should be taken out of rotation; empty when all is well. May block for the repository."""
        reasons = self._batching.health()
        if self._updater.dead and "shutting down" not in reasons:
            reasons.append("the status updater is dead")
        check = getattr(self._repository, "check", None)
        if check is not None:
            try:
                check()
            except SmsProxyError as error:
                reasons.append(str(error))
        return reasons

    def stop(self, timeout: float | None = None) -> int:
        """Drains: sends what is pending, then applies the delivery reports already received.

        Blocks for `timeout` seconds and a little more at most; returns how many messages could not be
        handed over.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        left = self._batching.stop(timeout)
        # In a thread of its own: a client that hangs must not hold up the end.
        closing = threading.Thread(target=self._stop_client, name="smsproxy-closer-1", daemon=True)
        closing.start()
        closing.join(_rest(deadline))
        self._updater.stop(_rest(deadline))
        self._error_log.stop(_rest(deadline))
        return left

    def _stop_client(self) -> None:
        try:
            self._client.stop()
        except Exception as error:  # it is the end all the same
            log.error("the client did not stop well: %s", _reason(error, ()))

    def _identify(
        self, phone_number: Any, message: Any, key: str | None, ids: Iterator[str]
    ) -> tuple[Message, bytes | None]:
        """The message with its ID, and the fingerprint that tells a repeat from another message under the same key.

        A key stands for its ID by a hash, so it is remembered wherever and as long as the message is.
        """
        validate(phone_number, message)
        if self.durable and not self._started:  # what is saved now would be restored, too
            raise ClosedError("not started yet")
        if key is None:
            return Message(phone_number, message, next(ids)), None
        message_id = next(_uuid4s(hashlib.sha256(key.encode()).hexdigest()[:32].encode()))
        content = "\0".join((key, phone_number, message))
        fingerprint = hashlib.sha256(content.encode()).digest()[:16]
        return Message(phone_number, message, message_id), fingerprint

    @staticmethod
    def _log_error(failed: StatusUpdateError) -> None:
        log.warning("a status update of message %r was not applied: %s", failed.message_id, failed.error)


def _refusal(error: Exception, fingerprint: bytes | None) -> Exception | None:
    """Why a message that could not be saved is refused; None if it came before under the same key."""
    if fingerprint is None or not isinstance(error, DuplicateMessageError):
        return error
    if error.fingerprint == fingerprint:
        return None
    return IdempotencyError("the idempotency key was used for another message")


_UUID_PARTS = struct.Struct("8s4sx3ss3s12s")  # the skipped digit becomes the version
_VARIANTS = {bytes([digit]): bytes([variant]) for digit, variant in zip(b"0123456789abcdef", 4 * b"89ab")}


def _uuid4s(digits: bytes) -> Iterator[str]:
    """Version 4 UUIDs (RFC 9562, 5.4) of 32 random hexadecimal digits each, as `uuid.UUID` would make them.

    That one, and a call of the system for each, take a sixth of the time of a POST.
    """
    for low, mid, high, variant, sequence, node in _UUID_PARTS.iter_unpack(digits):
        yield (b"%b-%b-4%b-%b%b-%b" % (low, mid, high, _VARIANTS[variant], sequence, node)).decode()


def validate(number: Any, text: Any) -> None:
    """Raises `ValidationError` unless these are a phone number and a text that can be sent."""
    if not (isinstance(number, str) and isinstance(text, str) and number and text):
        name, value = ("phone_number", number) if not (number and isinstance(number, str)) else ("message", text)
        raise ValidationError(name, "must not be empty" if isinstance(value, str) else "must be a string")
    if not (number.isascii() and number.isdigit()):
        raise ValidationError("phone_number", "must consist of the digits 0 to 9 only")
    try:
        text.encode()
    except UnicodeEncodeError:  # could not be sent on
        raise ValidationError("message", "must not contain lone surrogates") from None

"""FastSMSing as the proxy sees it: what a client must offer, and a stand-in that needs no network.

FastSMSing bills per request, whatever the request holds, and reports each message's fate later to
every subscriber. To plug in the real provider, write a class with the three methods of
`FastSmsingClient`; nothing here or elsewhere has to change.
"""
from __future__ import annotations

import queue
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

__all__ = ["FastSmsingClient", "FastSmsingError", "InMemoryClient", "Message", "MessageStatus", "RejectedError",
           "ReportReceiver"]  # fmt: skip


class FastSmsingError(Exception):
    """A request to FastSMSing failed, and may be tried again.

    `retry_after` is the shortest wait in seconds that the provider asked for before the next try.
    """

    def __init__(self, *args: object, retry_after: float = 0.0) -> None:
        super().__init__(*args)
        self.retry_after = retry_after


class RejectedError(FastSmsingError):
    """FastSMSing refuses this batch for good: sending the same batch again would only cost money."""


class MessageStatus(str, Enum):
    """What FastSMSing reports of a message."""

    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"
    DELIVERED = "DELIVERED"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a batch. Its `repr` shows the ID alone, so that logs stay private."""

    phone_number: str = field(repr=False)
    message: str = field(repr=False)
    message_id: str


class FastSmsingClient(Protocol):
    """What the proxy needs of a provider. Every method is called from several threads."""

    def send(self, messages: Sequence[Message]) -> Mapping[str, str] | None:
        """Hands over one batch as one paid request; blocks until FastSMSing took it.

        Returns the messages that FastSMSing refused, ID to reason; None or nothing when it took all.
        Raises `RejectedError` when it refuses the batch as a whole: the proxy then sends the halves of
        it, down to the messages that are to blame. Anything else raised means that the request may be
        tried again. It should have time limits of its own: a call that never returns occupies one
        sender for ever.
        """

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        """Puts every later delivery report into `updates` as a mapping of message ID to status.

        `None` says that no more will come. The queue is bounded, so `put` may block for a while.
        `updates.join()` returns once all that was put is applied, and on disk if the outbox is: to lose
        no report in a crash, acknowledge it to FastSMSing after that. A mapping has one status per
        message, so a later report on the same message belongs in a mapping of its own.
        """

    def stop(self) -> None:
        """Ends reports (`None` to every subscriber) and frees what the client holds."""


@runtime_checkable
class ReportReceiver(Protocol):
    """A client that its provider pushes delivery reports to: what comes to `POST /reports` is handed to it."""

    def receive(self, query: str, headers: Mapping[str, str], body: bytes) -> None:
        """Checks that a request is the provider's, and puts its reports into `updates`.

        `query` is what the target has behind "?"; `headers` have lower-case names. May block, and is called from
        several threads. When it returns the provider gets a 204; when it raises ValueError a 400 (the report makes
        no sense), PermissionError a 401 (it is not the provider's), and anything else a 500, so that the provider
        tries again. Anybody may call: compare a signature or a token in constant time (`hmac.compare_digest`).
        """


class InMemoryClient:
    """A provider in memory: takes every batch after `latency` seconds and reports at once.

    Each message is reported `CONFIRMED`, then `DELIVERED`, or `FAILED` with probability
    `undelivered_rate`; a request raises `FastSmsingError` with probability `failure_rate`.
    Thread-safe. `rng` (default: a new `random.Random`) makes a run repeatable.
    """

    def __init__(
        self,
        *,
        latency: float = 0.0,
        failure_rate: float = 0.0,
        undelivered_rate: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        if not latency >= 0:
            raise ValueError("latency must not be negative")
        for name, rate in (("failure_rate", failure_rate), ("undelivered_rate", undelivered_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must be between 0 and 1")
        self._latency = latency
        self._failure_rate = failure_rate
        self._undelivered_rate = undelivered_rate
        self._rng = rng or random.Random()
        self._lock = threading.Lock()  # guards _rng and _subscribers
        self._subscribers: list[queue.Queue[Mapping[str, object] | None]] = []
        self._stopped = threading.Event()

    def send(self, messages: Sequence[Message]) -> None:
        """Takes the batch, or raises `FastSmsingError`; blocks for `latency` seconds, less on stop."""
        if self._latency:
            self._stopped.wait(self._latency)
        with self._lock:
            if self._stopped.is_set():
                raise FastSmsingError("the client is stopped")
            if self._failure_rate and self._rng.random() < self._failure_rate:
                raise FastSmsingError("simulated failure")
            confirmed = dict.fromkeys((message.message_id for message in messages), MessageStatus.CONFIRMED)
            final = dict.fromkeys(confirmed, MessageStatus.DELIVERED)
            if self._undelivered_rate:
                lost = [message_id for message_id in final if self._rng.random() < self._undelivered_rate]
                final.update(dict.fromkeys(lost, MessageStatus.FAILED))
            subscribers = tuple(self._subscribers)
        for updates in subscribers:
            updates.put(confirmed)
            updates.put(final)

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        """Adds a subscriber; after `stop` it only gets the closing `None`."""
        with self._lock:
            self._subscribers.append(updates)
            stopped = self._stopped.is_set()
        if stopped:
            updates.put(None)

    def stop(self) -> None:
        """Refuses further batches, wakes those that wait, and closes every subscription once."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
            subscribers = tuple(self._subscribers)
        for updates in subscribers:
            updates.put(None)

"""The facade: accepts messages, sees to their delivery, answers for their status.

The domain's public names are handed on from here, so `from smsproxy import ...` is all that a caller needs.
"""
from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from base_repository import FORGET_STEP, RETENTION, Claim, Repository
from batch_scheduler import SmsProxyConfig
from batching_client import CircuitBreaker, SimpleBatchingClient
from client_statistics import ClientStatistics, Statistics
from fastsmsing import FastSmsingClient
from incident_log import Incident, describe
from memory_repository import InMemoryRepository
from message_ids import NewIds, id_of_key
from message_model import (
    FINAL_STATUSES, STATUS_OF, TRANSITIONS, Batch, ClientResult, ClosedError, DuplicateMessageError, Entry,
    IdempotencyError, MessageStatus, OverloadedError, Reason, RepositoryUnavailableError, SendingResult, SendMessage,
    SmsProxyError, StatusTransitionError, UnknownMessageError, UnknownStatusError, ValidationError, check_transition,
    map_to_internal_status,
)  # fmt: skip
from service_metrics import FAMILIES, Family, Metrics
from status_updater import StatusUpdateError, StatusUpdater
from worker_threads import GRACE, rest

__all__ = [
    "Batch", "CircuitBreaker", "Claim", "ClientResult", "ClientStatistics", "ClosedError", "DuplicateMessageError",
    "Entry", "FAMILIES", "FINAL_STATUSES", "FORGET_STEP", "Family", "IdempotencyError", "InMemoryRepository", "Incident",
    "MessageStatus", "Metrics", "OverloadedError", "RETENTION", "Reason", "Repository", "RepositoryUnavailableError",
    "STATUS_OF", "SendMessage", "SendingResult", "SimpleBatchingClient", "SmsProxy", "SmsProxyConfig", "SmsProxyError",
    "Statistics", "StatusTransitionError", "StatusUpdateError", "StatusUpdater", "TRANSITIONS", "UnknownMessageError",
    "UnknownStatusError", "ValidationError", "check_transition", "describe", "map_to_internal_status",
]  # fmt: skip

log = logging.getLogger("smsproxy")

DRAIN_TIMEOUT = 10.0  # seconds that leaving the context manager may take


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
            closing.join(rest(deadline))
        except RuntimeError:  # the system has no thread left
            self._stop_client()
        if not self._updater.stop(None if deadline is None else rest(deadline)):
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


if __name__ == "__main__":
    sys.exit("smsproxy.py is the domain's facade; start main.py, or the command smsproxy")

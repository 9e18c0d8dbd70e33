"""The facade: accepts messages, sees to their delivery, answers for their status.

The domain's public names are handed on from here, so `from smsproxy import ...` is all that a caller needs.
"""
from __future__ import annotations

import hashlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence

from base_repository import RETENTION, Ages, Cancelled, Claim, Repository
from batch_scheduler import SmsProxyConfig
from batching_client import ResultSink, SimpleBatchingClient
from client_statistics import ClientStatistics, Statistics
from fastsmsing import FastSmsingClient, InMemoryClient
from incident_log import Incident, describe
from memory_repository import InMemoryRepository
from message_ids import NewIds, id_of_key, is_ours
from message_model import (
    FINAL_STATUSES,
    LONGEST_LIST,
    TRANSITIONS,
    Batch,
    ClientResult,
    ClosedError,
    DuplicateMessageError,
    Entry,
    IdempotencyError,
    MessageStatus,
    OverloadedError,
    Reason,
    RepositoryUnavailableError,
    SendingResult,
    SendMessage,
    SmsProxyError,
    StatusTransitionError,
    UnknownMessageError,
    UnknownStatusError,
    ValidationError,
    check_transition,
    map_to_internal_status,
)  # fmt: skip
from service_metrics import Counter, Gauge, Histogram, Metrics, MetricSet
from status_updater import StatusUpdateError, StatusUpdater
from webhook_client import Webhook, WebhookClient
from webhook_message import WebhookConfig, WebhookTarget, webhook_secrets
from webhook_sender import WebhookSender
from worker_threads import GRACE, Deadline

__all__ = [
    "FINAL_STATUSES", "RETENTION", "TRANSITIONS", "Ages", "Batch", "Cancelled", "Claim", "ClientResult",
    "ClientStatistics", "ClosedError", "Counter", "DuplicateMessageError", "Entry", "Gauge", "Histogram",
    "IdempotencyError", "InMemoryRepository", "Incident", "LONGEST_LIST", "MessageStatus", "MetricSet", "Metrics",
    "OverloadedError", "Reason", "Repository", "RepositoryUnavailableError", "SendMessage", "SendingResult",
    "SimpleBatchingClient", "SmsProxy", "SmsProxyConfig", "SmsProxyError", "Statistics", "StatusTransitionError",
    "StatusUpdateError", "StatusUpdater", "UnknownMessageError", "UnknownStatusError", "ValidationError",
    "WebhookConfig", "WebhookTarget", "check_transition", "describe", "is_ours", "map_to_internal_status",
    "webhook_secrets",
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
        repository: Repository | None = None, statistics: ResultSink | None = None,
        generate_id: Callable[[], str] | None = None, webhook: WebhookConfig | None = None,
    ) -> None:  # fmt: skip
        self.statistics = ClientStatistics() if statistics is None else statistics
        self.metrics = Metrics()
        self._client = client
        self._repository = InMemoryRepository() if repository is None else repository
        self._generate_id = generate_id or NewIds()
        self._webhook = Webhook()
        if webhook is not None:
            sender = WebhookSender(webhook.target, webhook.secrets)
            self._webhook = WebhookClient(self._repository.changes(), sender, self.metrics)
        self._updater = StatusUpdater(
            self._repository, metrics=self.metrics, expire=self._expire, changed=self._webhook.changed
        )
        self._batching = SimpleBatchingClient(
            self._repository, client, config, self.statistics, metrics=self.metrics,
            give_up=self._updater.updates.put, remind=self._updater.remind, autostart=False,
        )  # fmt: skip
        self._lock = threading.Lock()  # held for a whole start: a second one waits for the first
        self._started = False
        self._checks = Incident(log, "the database cannot be written")
        self.blocking = self._repository.blocking  # whether the methods may block for long
        self.metrics.stand_in.value = float(isinstance(client, InMemoryClient))
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
                    self._webhook.start()
                    self._batching.start()
                except RuntimeError:
                    self._webhook.stop(0.0)
                    self._updater.stop(GRACE)
                    raise
                self._started = True

    def entry(self, message: SendMessage, idempotency_key: str | None = None) -> Entry:
        """The message with its ID, ready for `accept_all`; raises `ValidationError`. Never blocks.

        A key stands for its ID by a hash, so it is remembered wherever and as long as the message is.
        """
        message.validate()
        if idempotency_key is None:
            return self._batching.config.entry(message, self._generate_id())
        content = "\0".join((idempotency_key, message.phone_number, message.message))
        fingerprint = hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:16]
        return self._batching.config.entry(message, id_of_key(idempotency_key), fingerprint)

    def accept_all(self, entries: Sequence[Entry]) -> list[Exception | None]:
        """Accepts each entry or refuses it by itself; returns None or what `send` would raise for it, in order.

        Blocks for the repository only.
        """
        errors = self._batching.accept_all(entries)
        if not any(errors):
            return errors
        return [error and _refusal(error, entry) for entry, error in zip(entries, errors, strict=True)]

    def entries(self, messages: Sequence[SendMessage], idempotency_key: str | None = None) -> list[Entry]:
        """The messages of a list with their IDs, ready for `accept_together`; raises `ValidationError`. Never blocks.

        A key counts for the whole list, and is independent of the same key on a single message.
        """
        longest = min(LONGEST_LIST, self._batching.config.max_pending)
        if not 0 < len(messages) <= longest:
            raise ValidationError("messages", f"must be a list of 1 to {longest:,} messages")
        for message in messages:
            message.validate()
        make = self._batching.config.entry
        if idempotency_key is None:
            return [make(message, self._generate_id()) for message in messages]
        parts = [f"{len(each.message)}:{each.phone_number}:{each.message}" for each in messages]
        content = "\0".join((idempotency_key, *parts))
        fingerprint = hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:16]
        return [make(message, id_of_key(f"{idempotency_key}\0bulk\0{index}"), fingerprint)
                for index, message in enumerate(messages)]  # fmt: skip

    def accept_together(self, entries: Sequence[Entry]) -> Exception | None:
        """Accepts all entries that `entries` made, or none; returns None or why not. Blocks for the repository only.

        The same list again under the same key is accepted, and nothing is sent twice; also when some of its messages
        are forgotten already.
        """
        error = self._batching.accept_together(entries)
        return error and _refusal(error, entries[0], "list")

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

    def cancel(self, message_id: str) -> bool:
        """Sees to it that a message that waits is never sent: it becomes `FAILED` as cancelled.

        Returns whether it is cancelled, now or before; False for one that is in a batch, handed over, final or
        unknown. Blocks for the repository only.
        """
        cancelled = self._repository.cancel(message_id)
        if cancelled is Cancelled.NOW:
            self._webhook.changed()
            self.metrics.given_up.add(1, Reason.CANCELLED.value)
            self.metrics.final.add(1, MessageStatus.FAILED.value)
        return cancelled is not None

    def measure(self) -> None:
        """Sets the gauges in `metrics`. May block for the repository; what it cannot tell just now has no value."""
        self._batching.measure()
        self._webhook.measure()

    def dead_threads(self) -> list[str]:
        """The names of threads that should run and do not. Never blocks."""
        updater = ["smsproxy-updater-1"] if self._updater.dead else []
        return self._batching.dead_threads() + self._webhook.dead_threads() + updater

    def health(self) -> tuple[list[str], list[str]]:
        """Why this instance should get no traffic, and other warnings. May block for the repository."""
        reasons: list[str] = []
        warnings: list[str] = []
        try:
            self._repository.check()
            reasons, warnings = self._batching.health()
        except RepositoryUnavailableError as error:
            self._checks.failed(error)  # where it is, is for the log only
            reasons.append("the database cannot be written")
        else:
            self._checks.ended()
        if self._updater.dead:
            reasons.append("smsproxy-updater-1 is dead")
        self._webhook.measure()
        reasons += [f"{name} is dead" for name in self._webhook.dead_threads()]
        warnings += self._webhook.warnings()
        if self.metrics.stand_in.value:
            warnings.append("the provider is the stand-in, which sends nothing to anybody")
        return reasons, warnings

    def drain(self) -> None:
        """Prepares a `stop`, see `SimpleBatchingClient.drain`. Returns at once."""
        self._batching.drain()
        self._webhook.drain()

    def set_webhook_secrets(self, secrets: tuple[bytes, ...]) -> None:
        """What the webhook signs with from the next request on."""
        self._webhook.set_secrets(secrets)

    def _expire(self) -> tuple[list[str], float]:
        expired = self._batching.expire()
        self._webhook.changed()  # of what waited it is not known here whether anything expired
        return expired

    def stop(self, timeout: float | None = None) -> int:
        """Drains, then applies the delivery reports already received, and ends the client and the webhook.

        Blocks for `timeout` seconds and a little more at most; returns how many messages could not be
        handed over, see `SimpleBatchingClient.stop`.
        """
        deadline = Deadline(timeout)
        self.drain()
        left = self._batching.stop(timeout)
        ending = deadline.or_in(GRACE)
        # In a thread of its own: a client that hangs must not hold up the end.
        closing = threading.Thread(target=self._stop_client, name="smsproxy-closer-1", daemon=True)
        try:
            closing.start()
            closing.join(ending.left)
        except RuntimeError:  # the system has no thread left
            self._stop_client()
        if not self._updater.stop(ending.left):
            log.error("stopped before all delivery reports were applied")
        self._webhook.stop(None if timeout is None else ending.left)
        return left

    def _stop_client(self) -> None:
        try:
            self._client.stop()
        except Exception as error:  # it is the end all the same
            log.error("the client did not stop well: %s", describe(error))


def _refusal(error: Exception, entry: Entry, what: str = "message") -> Exception | None:
    """Why a message that could not be saved is refused; None if it came before under the same key."""
    if entry.fingerprint is None or not isinstance(error, DuplicateMessageError):
        return error
    if error.fingerprint == entry.fingerprint:
        return None
    return IdempotencyError(f"the idempotency key was used for another {what}")


if __name__ == "__main__":
    sys.exit("smsproxy.py is the domain's facade; start main.py, or the command smsproxy")

"""Tells the shop what became of its messages: takes bodies from the outbox of changes, and posts them from threads of
its own."""
from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from batch_dispatcher import Dispatcher
from batch_scheduler import Job, SmsProxyConfig
from change_outbox import GATHER, ChangeBody, ChangeOutbox
from incident_log import Incident, counted, location, named
from message_model import RepositoryUnavailableError
from service_metrics import WebhookMetrics
from webhook_sender import Answer
from worker_threads import GRACE, Deadline, persist, work_in_background

__all__ = ["Post", "Webhook", "WebhookClient"]

log = logging.getLogger("smsproxy")

# What a request to the receiver costs is the time of both, so gathering is short, and a receiver that is away is asked
# every few minutes. There is no last try: a body is dropped when its messages are forgotten.
RULES = SmsProxyConfig(
    batch_size=100, max_delay=GATHER, senders=1, max_attempts=None, backoff_base=1.0, backoff_max=300.0
)
LATE = 60.0  # seconds that the oldest change may wait before health warns of it


class Post(Protocol):
    """What makes the requests, as `WebhookSender` does."""

    secrets: tuple[bytes, ...]

    def post(self, body: ChangeBody) -> Answer:
        """Makes one request."""


class Webhook:
    """A webhook that nobody asked for, which does nothing. Each method is what `WebhookClient` does instead."""

    def start(self) -> None:
        """Starts the threads, all or none: raises RuntimeError when the system has none left. Call it once."""

    def changed(self) -> None:
        """The status of messages changed just now. Never blocks."""

    def set_secrets(self, secrets: tuple[bytes, ...]) -> None:
        """What is signed with from the next request on."""

    def measure(self) -> None:
        """Sets the gauges. May block for the repository; what it cannot tell just now has no value."""

    def warnings(self) -> list[str]:
        """What is wrong, as of the last `measure`."""
        return []

    def dead_threads(self) -> list[str]:
        """The names of threads that should run and do not. Never blocks."""
        return []

    def drain(self) -> None:
        """Prepares the end: changes do not gather any more, and backoffs are short; in a durable outbox what is not
        under way stays. Returns at once; may be called again."""

    def stop(self, timeout: float | None = None) -> None:
        """Tells what is left, or what is under way where the outbox is durable, and ends the threads.

        Blocks for `timeout` seconds and a little more at most. What is left untold is logged by its count.
        """


class WebhookClient(Webhook):
    """Tells all changes, one body after the other, from two threads. Thread-safe.

    The scheduler that gathers messages and backs off from a provider that is away does the same here with changes and
    the receiver.
    """

    def __init__(
        self, changes: ChangeOutbox, sender: Post, metrics: WebhookMetrics, *,
        clock: Callable[[], float] = time.monotonic, rng: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self._changes, self._sender, self._metrics, self._clock = changes, sender, metrics, clock
        self.dispatcher = Dispatcher(changes, RULES, clock, rng, trouble="changes cannot be read for the webhook")
        self._failing = Incident(log, "the webhook's receiver takes nothing", level=logging.WARNING, clock=clock)
        self._recording = Incident(log, "the webhook cannot go on", clock=clock)
        self._over = threading.Event()  # set at the end: nothing is waited for any more
        self._threads = [
            threading.Thread(target=target, name=f"smsproxy-webhook-{role}-1", daemon=True)
            for role, target in (("dispatcher", self.dispatcher.run), ("sender", self._run))
        ]
        self._ending = False

    def start(self) -> None:
        """See `Webhook`."""
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:
            self.stop(0.0)
            raise

    def changed(self) -> None:
        """See `Webhook`."""
        self.dispatcher.waits((GATHER,))

    def set_secrets(self, secrets: tuple[bytes, ...]) -> None:
        """See `Webhook`."""
        self._sender.secrets = secrets

    # The sending thread

    def _run(self) -> None:
        work_in_background()
        while (job := self.dispatcher.jobs.get()) is not None:
            if self._over.is_set():
                continue  # it stays in the outbox
            try:
                again = self.conclude(job, self._sender.post(job.batch)) if self.prepare(job) else ()
            except Exception as error:
                again = self.recover(job, error)
            self.dispatcher.ended(job, again)

    def prepare(self, job: Job[ChangeBody]) -> bool:
        """Whether the body is to be told; what is over is dropped."""
        body = job.batch
        if not self._changes.holds(body):
            log.warning("another instance tells %s", body.id)
            return False
        if not body.unexpired(self._clock()):
            log.error("the webhook drops %s, forgotten by now: %s", counted(len(body), "change"), named(body.ids))
            self._handed_over(body)
            return False
        job.attempt += 1
        return True

    def conclude(self, job: Job[ChangeBody], answer: Answer) -> Sequence[Job[ChangeBody]]:
        """Sees to what follows from a request; returns what is left to be done."""
        self._metrics.webhook_requests.add(1, "ok" if answer.ok else "error")
        if not answer.ok:
            self.dispatcher.failed(job, answer.retry_after)
            self._failing.failed(answer.said)
            return [job]
        self.dispatcher.answered(job)
        self._failing.ended()
        body = job.batch
        self._handed_over(body)
        log.info("told %s at attempt %d as %s: %s", counted(len(body), "change"), job.attempt, body.id, named(body.ids))
        return ()

    def recover(self, job: Job[ChangeBody], error: Exception) -> Sequence[Job[ChangeBody]]:
        """Sees to what follows from an error of ours: whatever it is, nothing else may leave before this body."""
        self._recording.failed(error if isinstance(error, RepositoryUnavailableError) else location(error))
        self.dispatcher.failed(job, 0.0)
        return [job]

    def _handed_over(self, body: ChangeBody) -> None:
        # Until it is recorded, a crash would tell it again.
        persist(lambda: self._changes.handed_over(body), self._over, self._recording)
        self.dispatcher.waits((0.0,))  # as long as it was under way, nobody saw what waits behind it

    # Watching and ending

    def measure(self) -> None:
        """See `Webhook`."""
        pending: tuple[float | None, float | None] = None, None
        with contextlib.suppress(RepositoryUnavailableError):
            pending = self._changes.pending()
        self._metrics.webhook_pending.value, self._metrics.webhook_oldest.value = pending

    def warnings(self) -> list[str]:
        """See `Webhook`."""
        late = self._metrics.webhook_oldest.value or 0.0
        return [f"the webhook has not told a change for {late:.0f} s"] if late > LATE else []

    def dead_threads(self) -> list[str]:
        """See `Webhook`."""
        if self._ending:
            return []
        return [thread.name for thread in self._threads if thread.ident is not None and not thread.is_alive()]

    def drain(self) -> None:
        """See `Webhook`."""
        self._ending = True
        self.dispatcher.drain()

    def stop(self, timeout: float | None = None) -> None:
        """See `Webhook`."""
        deadline = Deadline(timeout)
        self.drain()
        started = all(thread.is_alive() for thread in self._threads)
        self.dispatcher.close(deadline.left if started else 0.0)
        self._over.set()
        done = self.dispatcher.quiet
        ending = deadline.or_in(GRACE) if done else Deadline(0.0)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(ending.left)
        if not self._changes.durable and (left := self._changes.pending()[0]):
            log.error("stopped before the webhook told %s", counted(left, "change"))

"""Accepts messages into the outbox, and runs the threads that hand them over in batches."""
from __future__ import annotations

import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from base_repository import Ages, Repository
from batch_dispatcher import Dispatcher
from batch_scheduler import Job, SmsProxyConfig
from batch_sender import GiveUp, Sender
from fastsmsing import FastSmsingClient
from incident_log import Incident, counted, location, named
from message_model import (
    LONGEST_TIME,
    Batch,
    ClientResult,
    ClosedError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    RepositoryUnavailableError,
    SendMessage,
)  # fmt: skip
from service_metrics import Metrics
from worker_threads import GRACE, Deadline, work_in_background

__all__ = ["ResultSink", "SimpleBatchingClient"]

log = logging.getLogger("smsproxy")

RESULTS_WAITING = 1_000  # results a slow statistics sink may be behind before the newest are dropped
PAST_DUE = 60.0  # seconds that the first message may be past due before health warns of it
IDS_IN_A_LINE = 100
EXPIRY_STEP = 1.0  # seconds, shortest time between two looks for what has expired; 2 s are promised


class ResultSink(Protocol):
    """What gets the result of each batch, as `ClientStatistics` does."""

    def send(self, result: ClientResult) -> None:
        """Gets one result, in a thread that waits for nobody else."""


class SimpleBatchingClient:
    """Gathers messages and hands them over in batches, from threads of its own. Thread-safe.

    `statistics` gets one `ClientResult` per batch that was sent as one, from a thread of its own, and only
    ever delays itself. `give_up` gets the messages given up with their reasons, and records them; it may
    block. `remind` is told in how many seconds a message expires, so that somebody calls `expire` then. `clock`
    (seconds; the repository's, too) and `rng` (uniform in 0..1) are there for tests. Without `autostart` the threads
    start with `start`.
    """

    def __init__(
        self, repository: Repository, client: FastSmsingClient, config: SmsProxyConfig = SmsProxyConfig(),
        statistics: ResultSink | None = None, *, metrics: Metrics | None = None, give_up: GiveUp | None = None,
        remind: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic, rng: Callable[[], float] = random.random, autostart: bool = True,
    ) -> None:  # fmt: skip
        self.config, self._remind = config, remind
        self._repository, self._statistics = repository, statistics
        self._metrics = metrics or Metrics()
        self._metrics.pending_limit.value = config.max_pending
        self.dispatcher = Dispatcher(repository, config, clock, rng, claimed=self._claimed, remind=remind)
        self.sender = Sender(repository, client, config, self.dispatcher, self._metrics, give_up, self._report, clock)
        self._refusals: dict[type[Exception], tuple[str, Incident]] = {
            OverloadedError: ("queue_full", Incident(log, "messages are refused", clock=clock)),
            RepositoryUnavailableError: ("database", Incident(log, "messages cannot be saved", clock=clock)),
            ClosedError: ("stopping", Incident(log, "messages are refused", level=logging.INFO, clock=clock)),
        }
        self._refusing = False  # the last messages were refused
        self._expiry = Incident(log, "what has expired cannot be looked for", clock=clock)
        self._results: queue.Queue[ClientResult | None] = queue.Queue(RESULTS_WAITING)
        self._threads: list[threading.Thread] = []
        self._given_up_before: float | None = None  # the drain
        if autostart:
            self.start()

    def start(self) -> None:
        """Starts the threads, all or none: raises RuntimeError when the system has none left. Call it once."""
        if self.config.max_delay is not None:
            self._repository.hasten(self.config.max_delay)
        roles: dict[str, Callable[[], None]] = {"dispatcher-1": self.dispatcher.run}
        roles.update({f"sender-{number}": self.sender.run for number in range(1, self.config.senders + 1)})
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
        for error in self.accept_all([self.config.entry(message, message_id)]):
            if error is not None:
                raise error

    def accept_all(self, entries: Sequence[Entry]) -> list[Exception | None]:
        """`send` for entries, as one group; returns what it would raise for each of them, in order."""
        errors: list[Exception | None]
        if not self.dispatcher.begin_save():
            errors = [ClosedError("shutting down")] * len(entries)
        else:
            saved: Sequence[Entry] = ()
            try:
                errors = self._repository.save_all(entries, self.config.max_pending)
                saved = entries
                if any(errors):
                    saved = [entry for entry, error in zip(entries, errors, strict=True) if error is None]
            except Exception as error:  # whatever it is, each of them gets to know
                errors = [error] * len(entries)
            finally:
                self._saved(saved)
        self._count_refusals(errors)
        return errors

    def accept_together(self, entries: Sequence[Entry]) -> Exception | None:
        """Accepts all entries or none, in one step; returns what `send` would raise for them."""
        error: Exception | None = ClosedError("shutting down")
        if self.dispatcher.begin_save():
            saved: Sequence[Entry] = ()
            try:
                error = self._repository.save_together(entries, self.config.max_pending)
                saved = () if error else entries
            except Exception as unexpected:
                error = unexpected
            finally:
                self._saved(saved)
        self._count_refusals([error] * len(entries))
        return error

    def _saved(self, entries: Sequence[Entry]) -> None:
        self.dispatcher.end_save([entry.linger for entry in entries])
        self._metrics.accepted.add(len(entries))
        if expiring := [entry.max_age for entry in entries if entry.max_age != math.inf]:
            self._remind(min(expiring))

    def _count_refusals(self, errors: Sequence[Exception | None]) -> None:
        if not any(errors):
            if self._refusing:
                self._refusing = False
                for _, incident in self._refusals.values():
                    incident.ended()
            return
        self._refusing = True
        for kind, (cause, incident) in self._refusals.items():
            if refused := [error for error in errors if isinstance(error, kind)]:
                self._metrics.refused.add(len(refused), cause)
                incident.failed(refused[0])

    # Expiry

    def expire(self) -> tuple[list[str], float]:
        """Makes what waits in the outbox for longer than its `max_age` `FAILED`, and takes what does so in batches
        that wait for a retry out of these.

        Returns the IDs of the latter, which are still to be recorded as expired, behind the delivery reports that came
        before; and seconds until it is to be called again. May block for the repository.
        """
        following = EXPIRY_STEP
        try:
            expired, following = self._repository.expire()
        except RepositoryUnavailableError as error:
            self._expiry.failed(error)
        else:
            self._expiry.ended()
            if expired:
                self._metrics.final.add(len(expired), "FAILED")
                self.sender.count_given_up(expired, Reason.EXPIRED)
        batches, next_retry = self.dispatcher.expire()
        ours = {each for batch, _ in batches for each in self.sender.ours(batch).ids}
        retries = [each for _, ids in batches for each in ids if each in ours]
        if retries:
            self.sender.count_given_up(retries, Reason.EXPIRED)
        return retries, following if following == 0.0 else max(EXPIRY_STEP, min(following, next_retry))

    # Statistics

    def _claimed(self, batch: Batch) -> None:
        first = batch.entries[0]
        self._metrics.lead_delay.observe([min(first.due - first.accepted_at, LONGEST_TIME)])

    def _report(self, job: Job[Batch]) -> None:
        if self._statistics is not None:
            try:
                messages = tuple([entry.message for entry in job.batch.entries]) or job.sent
                attempt = job.attempt - job.inherited
                self._results.put_nowait(ClientResult(messages, job.error, attempt, self.config.max_attempts))
            except queue.Full:
                log.warning("the statistics sink is too slow: one result is dropped")

    def _report_all(self) -> None:
        work_in_background()
        assert self._statistics is not None
        while (result := self._results.get()) is not None:
            try:
                self._statistics.send(result)
            except Exception as error:
                log.error("the statistics thread goes on after a %s", location(error))

    # Watching and ending

    def measure(self) -> None:
        """Sets the gauges. May block for the repository; what it cannot tell just now has no value."""
        metrics = self._metrics
        metrics.in_flight.value, metrics.breaker_open.value, metrics.next_try.value = self.dispatcher.measure()
        metrics.requests_saved.value = metrics.handed_over.total - metrics.requests.total
        # What was given up became final, too, and was not handed over.
        metrics.unreported.value = max(0.0, metrics.handed_over.total + metrics.given_up.total - metrics.final.total)
        try:
            pending: float | None = self._repository.backlog()
            ages: Ages | None = self._repository.ages()
            size: float | None = self._repository.size()
        except RepositoryUnavailableError:
            pending = ages = size = None
        metrics.pending.value, metrics.database_bytes.value = pending, size
        metrics.oldest_age.value, metrics.past_due.value = ages or (None, None)

    def dead_threads(self) -> list[str]:
        """The names of threads that should run and do not. Never blocks."""
        if self._given_up_before is not None:
            return []
        return [thread.name for thread in self._threads if not thread.is_alive()]

    def health(self) -> tuple[list[str], list[str]]:
        """Why this instance should get no traffic, and other warnings. May block for the repository."""
        self.measure()
        metrics, warnings = self._metrics, []
        reasons = ["queue full"] if (metrics.pending.value or 0) >= self.config.max_pending else []
        reasons += [f"{name} is dead" for name in self.dead_threads()]
        if seconds := metrics.breaker_open.value:
            next_try = metrics.next_try.value or 0.0
            warnings.append(f"FastSMSing has been failing for {seconds:.0f} s; next try in {next_try:.0f} s")
        if (late := metrics.past_due.value or 0.0) > PAST_DUE:
            warnings.append(f"the first pending message has been past due for {late:.0f} s")
        return reasons, warnings

    def drain(self) -> None:
        """Prepares the end: nothing lingers any more, and what failed is tried again soon; in a durable outbox the
        messages that no request carries stay. Messages are still accepted. Returns at once; may be called again."""
        if self._given_up_before is None:
            self._given_up_before = self._given_up
            self.dispatcher.drain()

    @property
    def _given_up(self) -> float:
        """How many messages were given up for want of tries or time; a rejected one is dealt with."""
        given_up = self._metrics.given_up
        return given_up.count(Reason.ATTEMPTS.value) + given_up.count(Reason.EXPIRED.value)

    def stop(self, timeout: float | None = None) -> int:
        """Accepts no more, sends what is pending, and ends the threads.

        Blocks for `timeout` seconds and a little more at most (None: as long as it takes). Returns how many
        messages were not handed over, those given up since the drain began for want of tries or time included; of a
        durable outbox, those in requests that did not end or could not be recorded. They are logged by ID.
        """
        deadline = Deadline(timeout)
        self.drain()
        self.dispatcher.close(deadline.left if self._threads else 0.0)  # if it never started nobody sends
        self.sender.over.set()
        # For all that follows together. What a look into a durable outbox may still claim need not be waited for.
        ending = Deadline(GRACE) if self._repository.durable else deadline.or_in(GRACE)
        for thread in self._threads[:1]:
            thread.join(ending.left)  # the dispatcher: what it has just claimed counts
        left, waits = self.dispatcher.left()
        # What was reported on while it waited for a retry is handed over.
        left += [message_id for message_id in waits if self._repository.get(message_id) is MessageStatus.ACCEPTED]
        for start in range(0, len(left), IDS_IN_A_LINE):
            log.error("stopped before these messages were handed over: %s", named(left[start : start + IDS_IN_A_LINE]))
        try:
            self._results.put(None, timeout=0.0 if left else ending.left)
        except queue.Full:
            log.warning("the statistics sink hangs: some results are dropped")
        for thread in self._threads:
            thread.join(0.0 if left else ending.left)
        given_up = 0 if self._repository.durable else int(self._given_up - (self._given_up_before or 0))
        if given_up:
            log.error("%s given up during the stop", counted(given_up, "message"))
        return len(left) + given_up

"""Accepts messages into the outbox, cuts batches from it, hands them over in the background."""
from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from base_repository import Claim, Repository
from batch_scheduler import SmsProxyConfig
from fastsmsing import FastSmsingClient, Message, RejectedError
from incident_log import Incident, describe, location
from message_model import (
    Batch, ClientResult, ClosedError, Entry, Reason, RepositoryUnavailableError, SendMessage,
)  # fmt: skip
from service_metrics import Metrics
from worker_threads import LONGEST_WAIT, REPOSITORY_RETRY, persist, rest, work_in_background

__all__ = ["CircuitBreaker", "SimpleBatchingClient"]

log = logging.getLogger("smsproxy")

RESULTS_WAITING = 1_000  # results a slow statistics sink may be behind before the newest are dropped
DRAIN_BACKOFF = 1.0  # seconds; longest backoff during a drain, whose time is short


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
        work_in_background()
        while not self.over.is_set():
            job = None
            try:
                job = self._scheduler.next_job()
                if job is None:
                    return
                self._scheduler.ended(job, *self._carry(job))
            except Exception as error:
                ids = " ".join(job.batch.ids) if job else "none"
                log.error("a sender goes on after a %s; messages: %s", location(error), ids)
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
        persist(lambda: self._repository.handed_over(taken), self.over, self._incident)
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
        work_in_background()
        while (result := self._results.get()) is not None:
            try:
                self._statistics.send(result)
            except Exception as error:
                log.error("the statistics thread goes on after a %s", location(error))

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
            self._results.put(None, timeout=0.0 if left else rest(deadline))
        for thread in self._threads:
            thread.join(0.0 if left else rest(deadline))
        given_up = self._metrics.total("smsproxy_messages_given_up_total") - (self._given_up_before or 0)
        return len(left) + (0 if self._repository.durable else int(given_up))

"""Carries the scheduler's rules out: one thread that looks into the outbox, and hands jobs to the senders."""
from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic

from batch_outbox import B, Claim, Outbox
from batch_scheduler import Job, Look, Scheduler, SmsProxyConfig
from incident_log import Incident, location
from message_model import RepositoryUnavailableError
from worker_threads import REPOSITORY_RETRY, work_in_background

__all__ = ["Dispatcher"]

log = logging.getLogger("smsproxy")


class Dispatcher(Generic[B]):
    """Hands out `jobs`, one after the other, and a None to each sender at the end. Thread-safe.

    Every method but `run` and `advance` tells the scheduler what happened, and takes no longer than its lock. `claimed`
    is called with each batch that was claimed, in the thread of `run`. `remind` is told in how many seconds something
    expires that waits for its request. `trouble` is what the log says when the outbox fails.
    """

    def __init__(
        self, outbox: Outbox[B], config: SmsProxyConfig, clock: Callable[[], float], rng: Callable[[], float], *,
        claimed: Callable[[B], object] | None = None, remind: Callable[[float], object] | None = None,
        trouble: str = "no batch can be claimed",
    ) -> None:  # fmt: skip
        self.jobs: queue.SimpleQueue[Job[B] | None] = queue.SimpleQueue()
        self._outbox, self._config, self._clock = outbox, config, clock
        self._claimed, self._remind = claimed, remind
        self._incident = Incident(log, trouble, clock=clock)
        self._lock = threading.Lock()  # guards everything below
        self._changed = threading.Condition(self._lock)  # the next step may be another, or all is quiet
        self._scheduler: Scheduler[B] = Scheduler(config, rng, durable=outbox.durable, poll=outbox.poll)
        self._over = False

    def run(self) -> None:
        """Takes one step after the other until `close`; then puts back what no request carries."""
        work_in_background()
        try:
            while (step := self._next()) is not None:
                self._take(step)
        finally:
            for _ in range(self._config.senders):
                self.jobs.put(None)
        self.put_back()

    def advance(self) -> float:
        """Takes all steps of this moment, in place of `run`; returns the seconds until the next one."""
        while True:
            with self._lock:
                step = self._scheduler.next(self._clock())
            if isinstance(step, float):
                return step
            self._take(step)

    def _next(self) -> Job[B] | Look | None:
        """Waits for the next step; None when there will be no more."""
        with self._lock:
            while not self._over:
                step = self._scheduler.next(self._clock())
                if not isinstance(step, float):
                    return step
                self._changed.wait(None if step == math.inf else min(step, threading.TIMEOUT_MAX))
            return None

    def _take(self, step: Job[B] | Look) -> None:
        if isinstance(step, Job):
            self.jobs.put(step)
            return
        claim = self._claim(step)
        with self._lock:
            self._scheduler.claimed(claim, self._clock())
            self._changed.notify_all()
        if claim.batch is not None:
            self._expires([claim.batch])

    def _claim(self, look: Look) -> Claim[B]:
        try:
            claim = self._outbox.claim(look.size, look.horizon, flush=look.flush)
        except RepositoryUnavailableError as error:
            self._incident.failed(error)
        except Exception as error:  # whatever it is, batches have to leave
            self._incident.failed(location(error))
        else:
            self._incident.ended()
            if claim.batch is not None and self._claimed is not None:
                self._claimed(claim.batch)
            return claim
        return Claim(None, 1, REPOSITORY_RETRY)  # nobody knows, so there may be a message

    # What happens

    def begin_save(self) -> bool:
        """Announces that messages are being saved; False when no more are to be."""
        with self._lock:
            return self._scheduler.saving()

    def end_save(self, lingers: Sequence[float]) -> None:
        """Messages with these lingers were saved."""
        with self._lock:
            if self._scheduler.saved(lingers, self._clock()):
                self._changed.notify_all()

    def waits(self, lingers: Iterable[float]) -> None:
        """So many wait in the outbox, and are due in so many seconds, or were."""
        with self._lock:
            now = self._clock()
            if self._scheduler.waits([now + linger for linger in lingers], now):
                self._changed.notify_all()

    def answered(self, job: Job[B]) -> tuple[float, int] | None:
        """FastSMSing answered; returns for how many seconds and failed requests the breaker was open, if it was."""
        with self._lock:
            closed = self._scheduler.answered(job, self._clock())
            if closed:
                self._changed.notify_all()
            return closed

    def failed(self, job: Job[B], retry_after: float) -> bool:
        """The job's request failed for a reason that may pass; returns whether that opened the breaker."""
        with self._lock:
            self._changed.notify_all()
            return self._scheduler.failed(job, retry_after, self._clock())

    def ended(self, job: Job[B], again: Sequence[Job[B]]) -> None:
        """The job is over; those in `again` are ready, the job itself perhaps among them."""
        with self._lock:
            if self._scheduler.ended(job, again, self._clock()):
                self._changed.notify_all()
        self._expires([each.batch for each in again])

    def set_aside(self, job: Job[B], rest: B) -> None:
        """The request of the job will carry a part of its batch; this is the rest."""
        with self._lock:
            self._scheduler.set_aside(job, rest)
        self._expires([rest])

    def take_back(self, job: Job[B]) -> Job[B] | None:
        """What was set aside, as far as it still waits; the caller has it now."""
        with self._lock:
            return self._scheduler.take_back(job)

    def _expires(self, batches: Iterable[B]) -> None:
        soonest = min((batch.expires_at for batch in batches), default=math.inf)
        if self._remind is not None and soonest != math.inf:
            self._remind(max(0.0, soonest - self._clock()))

    def abandoned(self, job: Job[B]) -> None:
        """An error of ours stopped the job; nobody knows whether its messages were handed over."""
        with self._lock:
            self._scheduler.abandoned(job, self._clock())
            self._changed.notify_all()

    def expire(self) -> tuple[list[tuple[B, list[str]]], float]:
        """Takes what has expired out of the batches that wait; returns these as they were and the IDs of what has, and
        seconds until the next does."""
        with self._lock:
            now = self._clock()
            expired, following = self._scheduler.expire(now)
            if expired:
                self._changed.notify_all()
            return expired, max(0.0, following - now)

    def measure(self) -> tuple[int, float, float]:
        """How many requests are under way, for how long the breaker has been open, and in how long it tries again."""
        with self._lock:
            now, breaker = self._clock(), self._scheduler.breaker
            return self._scheduler.in_flight, breaker.open_for(now), self._scheduler.next_try_in(now)

    # The end

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way, and nothing waits that is to be sent before the end."""
        with self._lock:
            return self._scheduler.quiet

    def drain(self) -> None:
        """From now on nothing lingers and backoffs are short; of a durable outbox nothing is claimed any more."""
        with self._lock:
            self._scheduler.drain(self._clock())
            self._changed.notify_all()

    def close(self, timeout: float) -> None:
        """Refuses messages, waits until all that is to be done is done, at most for so long, and ends `run`."""
        with self._lock:
            self._scheduler.closed = True
            self._changed.wait_for(lambda: self._scheduler.quiet, timeout)
            self._over = True
            self._changed.notify_all()

    def put_back(self) -> None:
        """At the end: puts what no request carries back into an outbox that outlives the process."""
        if self._outbox.durable:
            with self._lock:
                ready = self._scheduler.withdraw()
            with contextlib.suppress(RepositoryUnavailableError):  # it stays claimed, which ends with this process
                for job in ready:
                    self._outbox.release(job.batch)

    def left(self) -> tuple[list[str], list[str]]:
        """After `run` has ended: the IDs of what is in requests of which nobody knows yet how they ended, and of what
        waits and would be lost, which is nothing in a durable outbox."""
        with self._lock:
            ready, unknown = self._scheduler.left()
        waits = [] if self._outbox.durable else [message_id for job in ready for message_id in job.batch.ids]
        while not self._outbox.durable and (batch := self._outbox.claim(1_000, math.inf, flush=True).batch) is not None:
            waits += batch.ids
        return [message_id for job in unknown for message_id in job.batch.ids], waits

"""When a batch leaves, and what happens when its request fails: the settings, the circuit breaker, the scheduler.

Rules only: no threads, locks, clock or I/O. The moment is an argument, in seconds on a monotonic clock, so an hour
passes in a test as fast as it is written down. `batch_dispatcher` carries the rules out.

**When a batch leaves.** FastSMSing bills a request, whatever it holds, so a message waits for others as long as it may.
How long that is, its *linger*, is the message's own: the `max_delay` that the caller said or the default, and half of
`max_age` at the most. It is *due* at acceptance + linger, and the outbox is in order of due. A batch leaves when

1. the first message is due. Nothing is gained by leaving earlier: whatever is accepted meanwhile may ride along. The
   batch takes the first `batch_size` messages of the outbox. Those that are not due yet are *riders*: their place
   in a request that is paid for anyway costs nothing. Leaving at the earliest due time and taking the earliest due is
   optimal: put off the first request of an optimal plan to that time, swap its messages for the most urgent ones, and
   the plan still keeps every due time.
2. `batch_size` messages are due within the *horizon*. A full batch cannot get cheaper, and leaving early spreads the
   work: if 20,000 messages were due at one moment, the senders could not carry them all at that moment. So the horizon
   is `max_delay` plus the time that the senders need for everything that waits. What may wait for longer does not
   make a batch full before its time, since it may be the company that a later message needs. When the outbox holds
   half of what it may hold, everything is within the horizon.
3. the service stops, and the outbox would not outlive it.

**What a failure does.** It opens the circuit breaker, of which `circuit_breaker` tells. Each batch that failed has a
backoff of its own, which doubles as well.

**No set of bad messages stops the others.** Some messages make every request fail that holds them, while FastSMSing
takes everything else. These rules keep them from looking like an outage, and find them, however many they are:

1. A batch that fails again, although FastSMSing has answered another request since its last one began, says nothing
   about FastSMSing: the failure is *its own*. It only waits for a backoff of its own. It does not open the breaker,
   unless FastSMSing asks for a wait.
2. When both a batch from the outbox and one that was sent before could go, they take turns, and of those that were sent
   before the one with the fewest tries goes first. So among the next two requests is one with another batch. One sender
   is kept for batches without failures of their own, since some messages fail slowly.
3. After `SUSPICIOUS` probes have failed, every other one carries a single message of its batch. That is as good to find
   out whether FastSMSing is back, also if most batches hold a bad message. The rest follows at once, so an outage costs
   one request more.
4. A batch with `SUSPICIOUS` failures of its own sends a single message, too. If FastSMSing takes `TAKEN_ALONE` of
   these, one after the other, and the rest fails each time, the rest is *to blame*: it is halved. Halves are treated
   alike, only sooner, until a bad message is alone. They keep the count of its tries, so nothing is tried much more
   often than `max_attempts`. Where FastSMSing fails at random, or takes only so many requests at a time, batches are
   taken in spite of failures of their own. As many more it takes then, for a while, until a batch is suspicious or to
   blame, so that hardly any is halved; a bad message that fails alone shortens that.
5. Riders do not share the fate of a batch that fails. They go back to the outbox, so that an outage does not turn the
   newsletter into small batches. Those that have ridden in `SUSPICIOUS` batches that failed become a batch that rule 4
   looks into, so that a bad message in the newsletter does not delay one password code after the other. If all its
   tries fail in an outage, its messages go back after all.

**Why no message is lost.** A message is in the outbox from its acceptance until FastSMSing took it, or an update
says what became of it. What the scheduler knows of the outbox is only when it is worth looking: `Outlook`. It may be
too early, never too late: what is saved during a look counts on top of what the look found, whether the look saw it or
not. A job is ready, under way, over, or abandoned (an error of ours; nobody knows its fate), and `left` tells of all
that are not over. A drain that begins during a look is seen when the look ends.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Generic, Union

from batch_outbox import ALMOST, B, Claim
from circuit_breaker import DRAIN_BACKOFF, PROBE_PATIENCE, SUSPICIOUS, CircuitBreaker
from fastsmsing import Message
from message_model import LONGEST_TIME, Entry, SendMessage, ValidationError

__all__ = ["Job", "Look", "Outlook", "Scheduler", "SmsProxyConfig", "Step", "Verdict", "horizon"]

# Single messages that FastSMSing took while the rest failed, after which the rest is to blame. Where FastSMSing takes a
# request now and then, one such message is likely before the whole is taken, two are not.
TAKEN_ALONE = 2
CHANCE_KEPT = 0.95  # of what is known of failures by chance, with each batch that is taken: half is left after 14
SUSPICIOUS_PART = 1  # as `SUSPICIOUS`, of a part, which is more likely to hold a bad message
FIRST_PACE = 1.0  # seconds that a request takes, until one was answered
PACE_SHARE = 0.25  # of the last request in what a request takes lately


@dataclass(frozen=True, slots=True)
class SmsProxyConfig:
    """When batches leave and how hard we try; times in seconds. Wrong values raise `ValidationError`."""

    batch_size: int = 100  # the most messages in one request; 1 or less turns batching off
    max_delay: float | None = 5.0  # linger of a message that does not say its own; None waits for a full batch for ever
    senders: int = 4  # requests to the provider at a time
    max_pending: int = 100_000  # accepted and not yet handed over
    max_attempts: int | None = 100  # tries per batch; less than 1 counts as 1; None: no limit
    backoff_base: float = 0.5  # before try n + 1: uniform in half to all of min(max, base * 2 ** (n - 1))
    backoff_max: float = 30.0
    max_age: float | None = None  # of a message that does not say its own; older ones are not sent; None sends them all

    def __post_init__(self) -> None:
        for spec in fields(self):
            kind = str(spec.type)
            self._check(spec.name, getattr(self, spec.name), whole="int" in kind, optional="None" in kind)
        object.__setattr__(self, "batch_size", max(1, self.batch_size))
        if self.max_attempts is not None:
            object.__setattr__(self, "max_attempts", max(1, self.max_attempts))
        if self.max_pending < self.batch_size:
            raise ValidationError("max_pending", "must not be less than batch_size")
        if self.max_age == 0:
            raise ValidationError("max_age", "must be more than 0")
        if self.backoff_base > self.backoff_max:
            raise ValidationError("backoff_base", "must not be more than backoff_max")

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

    def entry(self, message: SendMessage, message_id: str, fingerprint: bytes | None = None) -> Entry:
        """The message as it goes into the outbox, with its linger and its `max_age`."""
        default = message.max_delay is None
        delay = self.max_delay if default else message.max_delay
        age = self.max_age if message.max_age is None else message.max_age
        linger, max_age = math.inf if delay is None else delay, math.inf
        if age is not None:
            linger, max_age = min(linger, age / 2), age
        return Entry(message.to_message(message_id), fingerprint, linger, default, max_age)

    def backoff(self, failures: int, fraction: float) -> float:
        """Seconds to wait after so many failures; `fraction` in 0..1 is the jitter."""
        return min(self.backoff_max, self.backoff_base * 2.0 ** min(failures - 1, 64)) * (0.5 + fraction / 2)


def horizon(config: SmsProxyConfig, waiting: int, pace: float) -> float:
    """Seconds within which a message has to be due to make a batch full; `pace`: seconds that a sender takes lately."""
    if config.max_delay is None or 2 * waiting >= config.max_pending:
        return math.inf
    return config.max_delay + waiting / config.batch_size * pace / config.senders


class Verdict(Enum):
    """What its last failure makes of a batch."""

    NONE = "none"
    SUSPICIOUS = "suspicious"  # its next request carries a single message
    TO_BLAME = "to blame"  # its halves are sent


@dataclass(slots=True, eq=False)
class Job(Generic[B]):
    """A batch and what its requests came to so far. Whoever works on it owns it; nobody else changes it meanwhile."""

    batch: B
    attempt: int = 0
    inherited: int = 0  # of these tries, those of the batch that it is a part of
    own_failures: int = 0
    riders: bool = False  # they were in several batches that failed, and are looked into
    fresh: bool = False  # it comes from the outbox, and no request carried it
    verdict: Verdict = Verdict.NONE
    singles: int = 0  # such requests so far
    taken_alone: int = 0  # single messages of it that FastSMSing took; this is the rest
    not_before: float = -math.inf  # of the next request: the end of the batch's own backoff
    tried_at: float = math.inf  # when its last request that failed began
    expires_at: float = math.inf  # when the first of its messages does, while it waits
    answered: bool = False
    # Of the last request:
    single: bool = False  # it carries a single message
    rest: Job[B] | None = None  # then: the others
    started_at: float = 0.0
    sent: tuple[Message, ...] = ()
    error: BaseException | None = None
    refused: Mapping[str, str] = field(default_factory=dict)  # reason by ID

    @property
    def found(self) -> bool:
        """Whether it is a bad message, alone."""
        return self.own_failures >= SUSPICIOUS and len(self.batch) == 1

    def part(self, batch: B) -> Job[B]:
        """A part of it, which may hold a message that is to blame."""
        return Job(batch, self.attempt, self.attempt, riders=self.riders, tried_at=self.tried_at)


@dataclass(frozen=True, slots=True)
class Look:
    """A look into the outbox: what `Repository.claim` is called with."""

    size: int
    horizon: float
    flush: bool = False


# Send this job; look, and tell what was `claimed`; wait for so many seconds.
Step = Union[Job[B], Look, float]  # noqa: UP007, since Python 3.10 cannot make it generic otherwise


@dataclass(slots=True)
class Outlook:
    """What is known of the messages that wait, as far as it says when to look: the last look's, and what came since."""

    waiting: int = 0  # 0 only if there are none
    near: int = 0  # that were due within the horizon when they were seen
    due: float = math.inf  # when the first is due
    full_due: float = math.inf  # when that message is due whose coming within the horizon may make a batch full

    def add(self, dues: Sequence[float], limit: float) -> None:
        """Messages that came in; what is due by `limit` is within the horizon."""
        self.waiting += len(dues)
        self.due = min(self.due, min(dues))
        if max(dues) <= limit:  # the common case
            self.near += len(dues)
            return
        beyond = [due for due in dues if due > limit]
        self.near += len(dues) - len(beyond)
        self.full_due = min(self.full_due, min(beyond))

    def look_at(self, size: int, horizon: float, last_horizon: float) -> float:
        """When a look may find a batch; `last_horizon` is that of the last look."""
        if self.near >= size:
            return -math.inf
        if self.waiting < size or horizon == last_horizon == math.inf:  # then `near` counts them all
            return self.due
        return min(self.due, -math.inf if horizon == math.inf else self.full_due - horizon)


class Scheduler(Generic[B]):
    """Decides what is done next, about batches of any kind. The owner's lock guards it.

    `next` tells the step; every other method tells what happened. At most `senders` jobs are under way, and while the
    breaker is open one, unless a probe hangs.
    """

    def __init__(
        self, config: SmsProxyConfig, rng: Callable[[], float], *, durable: bool = False, poll: float | None = None
    ) -> None:
        self.breaker = CircuitBreaker(lambda failures: config.backoff(failures, rng()))
        self.draining = self.closed = False
        self._config, self._rng, self._durable, self._poll = config, rng, durable, poll
        self._ready: list[Job[B]] = []  # each from the moment in its `not_before`
        self._under_way: dict[Job[B], float] = {}  # since when
        self._abandoned: list[Job[B]] = []
        self._retries_turn = False  # the next request is for a batch that was sent before, if there is one
        self._held = False  # such a batch waits for a second sender that is free
        self._by_chance = 0.0  # the most failures of its own that a batch had which was taken nevertheless, lately
        self._pace = 0.0  # seconds from claim to claim of a sender, lately; 0: no request was answered yet
        self._looking: Look | None = None
        self._last_horizon = 0.0
        self._look_by = -math.inf  # whatever the outlook is: there may be messages from before the start
        self._outlook = Outlook(waiting=1)
        self._told = -math.inf  # when the look is that the last step waits for
        self._saving = 0  # groups of messages that are being saved

    @property
    def in_flight(self) -> int:
        """How many jobs are under way."""
        return len(self._under_way)

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way, and nothing waits that is to be sent before the end."""
        rest = not self._durable and (self._looking or self._outlook.waiting or self._ready)
        return not (self._under_way or self._saving or rest)

    def next_try_in(self, now: float) -> float:
        """Seconds until the next request while the breaker is open; 0 while it is closed."""
        if not self.breaker.open or self._under_way:
            return 0.0
        something = min([self._look_at(), *(job.not_before for job in self._ready)])
        return min(max(0.0, self.breaker.next_try - now, something - now), LONGEST_TIME)

    def next(self, now: float) -> Step[B]:
        """The next step. A job is under way from now on, a look until `claimed`."""
        self._told = -math.inf
        if len(self._under_way) >= self._config.senders or (self.draining and self._durable):
            return math.inf
        if wait := self.breaker.wait(now):
            return wait
        ready = [job for job in self._ready if job.not_before <= now]
        everything = self._spare or self.breaker.open or self.draining
        may = [job for job in ready if everything or not job.own_failures]
        self._held = len(may) < len(ready)
        job = min(may, key=lambda job: (not job.fresh, job.found, job.attempt, job.not_before), default=None)
        look_at = self._look_at() - ALMOST / 2  # less than a look allows, so that it does not come too early
        if job is not None and (job.fresh or self._retries_turn or now < look_at):
            return self._begin(job, now)
        if now >= look_at:
            self._looking, self._outlook = Look(self._config.batch_size, self._horizon(), self.draining), Outlook()
            return self._looking
        self._told = look_at + ALMOST / 2
        return min(self._told, *(job.not_before for job in self._ready if job.not_before > now), math.inf) - now

    @property
    def _spare(self) -> bool:
        """Whether a sender is left for others when another batch with failures of its own has begun; a single sender
        does everything."""
        return sum(job.own_failures > 0 for job in self._under_way) < max(1, self._config.senders - 1)

    def _begin(self, job: Job[B], now: float) -> Job[B]:
        self._ready.remove(job)
        self._under_way[job] = now
        self._retries_turn, job.fresh = job.fresh, False
        self.breaker.begin(job, now)
        suspicious = job.verdict is Verdict.SUSPICIOUS or (self.breaker.suspicious and not job.single)
        job.single, job.verdict, job.rest = suspicious and len(job.batch) > 1, Verdict.NONE, None
        return job

    def _wait(self, job: Job[B]) -> None:
        job.expires_at = job.batch.expires_at
        self._ready.append(job)

    def _horizon(self) -> float:
        return horizon(self._config, self._outlook.waiting, self._pace or FIRST_PACE)

    def _look_at(self) -> float:
        if self.draining and self._outlook.waiting:
            return -math.inf
        return min(self._look_by, self._outlook.look_at(self._config.batch_size, self._horizon(), self._last_horizon))

    # What happened in the outbox

    def saving(self) -> bool:
        """Messages are about to be saved; returns whether they may be."""
        self._saving += not self.closed
        return not self.closed

    def saved(self, lingers: Sequence[float], now: float) -> bool:
        """Messages with these lingers were; returns whether the next step is another than the last one for that."""
        self._saving -= 1
        return self.waits([now + linger for linger in lingers], now) or self.draining

    def waits(self, dues: Sequence[float], now: float) -> bool:
        """Messages that are due then wait in the outbox; returns whether the next step is another than the last one
        for that, once: whoever is told asks for it."""
        if not dues:
            return False
        if self._outlook.near >= self._config.batch_size:  # a look is due already, and will see them
            self._outlook.waiting += len(dues)
            return False
        self._outlook.add(dues, now + self._horizon())
        sooner = self._look_at() < self._told
        if sooner:
            self._told = -math.inf
        return sooner

    def claimed(self, claim: Claim[B], now: float) -> None:
        """What a look found. What was saved meanwhile may be in it or not."""
        if self._looking is None:
            raise RuntimeError("nothing was looked for")
        meanwhile, self._last_horizon = self._outlook, self._looking.horizon
        full_due = now + claim.full_in + (0.0 if claim.full_in == math.inf else self._looking.horizon)
        self._outlook = Outlook(
            claim.waiting + meanwhile.waiting, claim.near + meanwhile.near,
            min(now + claim.due_in, meanwhile.due), min(full_due, meanwhile.full_due),
        )  # fmt: skip
        self._looking, self._look_by = None, math.inf
        if claim.batch is not None:
            self._wait(Job(claim.batch, fresh=True))
            if claim.waiting:  # nothing else is known of them
                self._look_by = -math.inf
        if self._poll is not None:  # with jitter, or all instances would look together
            self._look_by = min(self._look_by, now + self._poll * (0.5 + self._rng()))

    # What happened to a job

    def answered(self, job: Job[B], now: float) -> tuple[float, int] | None:
        """FastSMSing took or rejected it; returns for how many seconds and failed requests the breaker was open."""
        job.answered = True
        if job.error is None and not job.single and len(job.batch) > 1:  # a batch was taken as it was
            self._by_chance = max(self._by_chance * CHANCE_KEPT, job.own_failures)
        return self.breaker.answered(now)

    def failed(self, job: Job[B], retry_after: float, now: float) -> bool:
        """Its request failed for a reason that may pass; returns whether that opened the breaker."""
        own = job.tried_at < self.breaker.answered_at and not self.breaker.open
        opened = not (own and (job.found or not retry_after)) and self.breaker.failed(job, retry_after, now)
        if not job.single:
            job.own_failures += own
            enough = (SUSPICIOUS_PART if job.inherited else SUSPICIOUS) + 2 * self._by_chance
            if own and job.taken_alone >= TAKEN_ALONE + self._by_chance:
                job.verdict = Verdict.TO_BLAME
            elif own and job.own_failures >= enough:
                job.verdict = Verdict.SUSPICIOUS
        if own and job.found:
            self._by_chance /= 2
        wait = self.breaker.backoff(job.attempt - job.inherited)
        if own and job.found:  # nobody else waits for what FastSMSing asks for
            wait = max(wait, retry_after)
        job.tried_at, job.not_before = self._under_way[job], now + wait
        return opened

    def set_aside(self, job: Job[B], rest: B) -> None:
        """The request of the job carries a part of its batch; this is the rest, which waits for it as for a probe."""
        job.rest = job.part(rest)
        job.rest.not_before = self._under_way[job] + PROBE_PATIENCE
        self._wait(job.rest)

    def take_back(self, job: Job[B]) -> Job[B] | None:
        """The rest of the job's batch, as far as no request has begun to carry it and it has not expired."""
        rest, job.rest = job.rest, None
        if rest is None or rest not in self._ready:
            return None
        self._ready.remove(rest)
        rest.not_before, rest.own_failures = -math.inf, job.own_failures
        rest.taken_alone = job.taken_alone + job.answered
        return rest

    def ended(self, job: Job[B], again: Sequence[Job[B]], now: float) -> bool:
        """It is over; those in `again` are ready, the job itself perhaps among them. Returns whether the next step is
        another than the last one for that."""
        waited_for = len(self._under_way) >= self._config.senders or self.breaker.open or self.draining or self._held
        since = self._under_way.pop(job)
        if job.answered:
            self._pace += (now - since - self._pace) * (PACE_SHARE if self._pace else 1.0)
        self.breaker.ended(job)
        for each in again:
            self._wait(each)
        return waited_for or bool(again) or self._look_at() < self._told  # the horizon grows with the pace

    def abandoned(self, job: Job[B], now: float) -> None:
        """An error of ours stopped it; nobody knows whether its messages were handed over."""
        self._abandoned.append(job)
        self.ended(job, (), now)

    def expire(self, now: float) -> tuple[list[tuple[B, list[str]]], float]:
        """Takes what has expired out of the batches that wait; returns these batches as they were and the IDs of
        what has, and when the next does."""
        expired: list[tuple[B, list[str]]] = []
        for job in self._ready:
            if job.expires_at <= now:
                before, job.batch = job.batch, job.batch.unexpired(now)
                left = set(job.batch.ids)
                expired.append((before, [message_id for message_id in before.ids if message_id not in left]))
                job.expires_at = job.batch.expires_at
        self._ready = [job for job in self._ready if len(job.batch)]
        return expired, min((job.expires_at for job in self._ready), default=math.inf)

    # The end

    def drain(self, now: float) -> None:
        """From now on nothing lingers and backoffs are short; of a durable outbox nothing is claimed any more."""
        self.draining = True
        self.breaker.hasten(now)
        for job in self._ready:
            job.not_before = min(job.not_before, now + DRAIN_BACKOFF)

    def withdraw(self) -> list[Job[B]]:
        """Takes out the jobs that no request carries: their messages go back to an outbox that others use, too."""
        ready, self._ready = self._ready, []
        return ready

    def left(self) -> tuple[list[Job[B]], list[Job[B]]]:
        """The jobs that no request carries, and those of which nobody knows yet how they ended."""
        return list(self._ready), [*self._under_way, *self._abandoned]

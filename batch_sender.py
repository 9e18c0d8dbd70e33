"""One request to FastSMSing and what follows from it."""
from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from base_repository import Repository
from batch_dispatcher import Dispatcher
from batch_scheduler import Job, SmsProxyConfig, Verdict
from circuit_breaker import SUSPICIOUS
from fastsmsing import FastSmsingClient, RejectedError
from incident_log import Incident, counted, describe, location, named
from message_model import Batch, Reason, RepositoryUnavailableError
from service_metrics import Metrics
from worker_threads import persist, work_in_background

__all__ = ["Sender"]

log = logging.getLogger("smsproxy")

LONGEST_WAIT = 3_600.0  # seconds; bounds what a provider can ask for with `retry_after`
CODE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # a reason that is a word of the provider's, and quotes no message

GiveUp = Callable[[dict[str, Reason]], object]


class Sender:
    """Makes requests, one at a time for each thread that runs it. Thread-safe."""

    def __init__(
        self, repository: Repository, client: FastSmsingClient, config: SmsProxyConfig, dispatcher: Dispatcher[Batch],
        metrics: Metrics, give_up: GiveUp | None, report: Callable[[Job[Batch]], None], clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._repository, self._client, self._config, self._dispatcher = repository, client, config, dispatcher
        self._metrics, self._report, self._clock = metrics, report, clock
        self._give_up_all = give_up or self._record
        self._incident = Incident(log, "what became of messages cannot be recorded", clock=clock)
        self._lock = threading.Lock()  # guards the following
        self._rides: Counter[str] = Counter()  # by ID: how many failures that opened the breaker had it as a rider
        self.over = threading.Event()  # set at the end: nothing is waited for any more

    def run(self) -> None:
        """Carries out one job after the other, until there will be no more."""
        work_in_background()
        while (job := self._dispatcher.jobs.get()) is not None:
            if self.over.is_set():
                continue  # no request for it begins; it counts as not handed over
            try:
                if self.prepare(job):
                    self.request(job)
                    again = self.conclude(job)
                else:
                    again = ()
                self._dispatcher.ended(job, again)
            except Exception as error:
                log.error("a sender goes on after a %s; messages: %s", location(error), named(job.batch.ids))
                self._dispatcher.abandoned(job)

    def prepare(self, job: Job[Batch]) -> bool:
        """Leaves in the batch what is still to be sent; returns whether that is anything."""
        job.batch = self.ours(job.batch)
        now = self._clock()
        while expired := [entry.message.message_id for entry in job.batch.entries if entry.expires_at <= now]:
            job.batch = replace(job.batch, entries=tuple([each for each in job.batch.entries if each.expires_at > now]))
            self.give_up(expired, Reason.EXPIRED)  # may take long
            now = self._clock()
        if not job.batch.entries and job.error is not None:
            self._report(job)
        return bool(job.batch.entries)

    def ours(self, batch: Batch) -> Batch:
        """What of the batch nobody has reported on, and is this process's to decide on, as far as it knows."""
        try:
            left = self._repository.unsent(batch)
        except RepositoryUnavailableError as error:
            self._incident.failed(error)
            left = batch
        if self._repository.holds(left):
            return left
        log.warning("a lease is lost, so others send: %s", named(batch.ids))
        return replace(batch, entries=())

    def request(self, job: Job[Batch]) -> None:
        """One paid request; sets the job's `error` and `refused`."""
        self.begin(job)
        error, answer = None, None
        try:
            answer = self._client.send(list(job.sent))
        except BaseException as raised:  # a SystemExit, too, would end nothing but this thread
            error = raised
        self.end(job, error, answer)

    def begin(self, job: Job[Batch]) -> None:
        """The request starts."""
        job.attempt, job.started_at = job.attempt + 1, self._clock()
        if job.single and len(job.batch) > 1:
            one = job.batch.entries[job.singles % len(job.batch)]  # each time another one, since it may be the bad one
            job.singles += 1
            self._dispatcher.set_aside(job, job.batch.only(lambda entry: entry is not one))
            job.batch = replace(job.batch, entries=(one,))
        job.sent = tuple([entry.message for entry in job.batch.entries])

    def end(self, job: Job[Batch], error: BaseException | None, answer: object) -> None:
        """The request ended with this error, or this answer."""
        job.error, job.refused = error, {}
        result = "ok" if error is None else "rejected" if isinstance(error, RejectedError) else "error"
        self._metrics.requests.add(1, result)
        if error is None:
            self._metrics.last_success.happened()
        else:
            self._metrics.errors.add(1, describe(error))
        self._metrics.batch_messages.observe([len(job.sent)])
        self._metrics.request_duration.observe([self._clock() - job.started_at], result)
        if isinstance(answer, Mapping):
            self._read(job, answer)

    def _read(self, job: Job[Batch], answer: Mapping[object, object]) -> None:
        ids = {message.message_id for message in job.sent}
        try:
            job.refused = {str(each): str(reason) for each, reason in answer.items() if each in ids}
        except Exception as odd:  # somebody else's class; FastSMSing answered, and nobody knows what it refuses
            log.error("an answer that ends with a %s counts as all taken: %s", location(odd), named(job.batch.ids))

    def conclude(self, job: Job[Batch]) -> Sequence[Job[Batch]]:
        """Sees to what follows from the request; returns the jobs that are left of it."""
        if job.error is not None and not isinstance(job.error, RejectedError):
            return self._failed(job, job.error)
        if closed := self._dispatcher.answered(job):
            log.warning("circuit breaker closed after %.1f s and %s", closed[0], counted(closed[1], "failed request"))
        again = self._rejected(job, job.error) if job.error else self._handed_over(job)
        rest = self._dispatcher.take_back(job)
        return again if rest is None else [*again, rest]

    def _handed_over(self, job: Job[Batch]) -> Sequence[Job[Batch]]:
        taken = job.batch
        if job.refused:
            taken = job.batch.only(lambda entry: entry.message.message_id not in job.refused)
            for reason, ids in self._by_reason(job).items():
                self.give_up(ids, Reason.REJECTED, f", refused by name: {reason}")
        self._metrics.batches.add(1, "handed_over")
        self._metrics.handed_over.add(len(taken))
        self._metrics.handover_wait.observe([job.started_at - entry.accepted_at for entry in taken.entries])
        self._report(job)
        if taken.entries:
            # Until it is recorded, a crash would send the batch again.
            persist(lambda: self._repository.handed_over(taken), self.over, self._incident)
            if self._rides:
                with self._lock:
                    for message_id in taken.ids:
                        self._rides.pop(message_id, None)
            log.info("handed over %s at attempt %d: %s", counted(len(taken), "message"), job.attempt, named(taken.ids))
        return ()

    @staticmethod
    def _by_reason(job: Job[Batch]) -> dict[str, list[str]]:
        """The IDs of what was refused by name, in order, by the reason as it may be logged."""
        found: dict[str, list[str]] = {}
        for message_id in filter(job.refused.__contains__, [message.message_id for message in job.sent]):
            reason = job.refused[message_id]
            found.setdefault(reason if CODE.fullmatch(reason) else "a reason that is no code", []).append(message_id)
        return found

    def _rejected(self, job: Job[Batch], error: BaseException) -> Sequence[Job[Batch]]:
        """Halves the batch; whoever is to blame ends up alone, after about 2 * log2(n) requests."""
        self._report(job)
        if len(job.batch) > 1:
            log.warning("%d messages are rejected (%s), so their halves are sent", len(job.batch), describe(error))
            return [Job(half.batch) for half in self._halves(job)]
        if self._repository.holds(job.batch):  # otherwise others send it
            self._metrics.batches.add(1, "given_up")
            self.give_up(job.batch.ids, Reason.REJECTED, f", {describe(error)}")
        return ()

    def _halves(self, job: Job[Batch]) -> Sequence[Job[Batch]]:
        entries, half = job.batch.entries, len(job.batch) // 2
        self._metrics.batches.add(1, "split")
        return [job.part(replace(job.batch, entries=part)) for part in (entries[:half], entries[half:])]

    def _failed(self, job: Job[Batch], error: BaseException) -> Sequence[Job[Batch]]:
        asked: object = None
        with contextlib.suppress(Exception):  # an attribute of somebody else's class may be code that fails
            asked = getattr(error, "retry_after", None)
        retry_after = min(LONGEST_WAIT, asked) if isinstance(asked, (int, float)) and asked > 0 else 0.0
        opened = self._dispatcher.failed(job, retry_after)
        log.log(logging.WARNING if opened else logging.DEBUG, "%s at attempt %d of %s with %s%s",
                describe(error), job.attempt, self._config.max_attempts or "any number",
                counted(len(job.batch), "message"), "; circuit breaker open" if opened else "")  # fmt: skip
        if rest := self._dispatcher.take_back(job):
            entries = sorted((*job.batch.entries, *rest.batch.entries), key=lambda entry: entry.due)
            job.batch = replace(job.batch, entries=tuple(entries))
        last = self._config.max_attempts is not None and job.attempt >= self._config.max_attempts
        suspects = self._release_riders(job, opened, last)
        if not job.batch.entries:
            return suspects
        if not last:
            if job.verdict is Verdict.TO_BLAME and len(job.batch) > 1:
                self._report(job)
                log.warning("%d messages fail while others are taken, so their halves are sent", len(job.batch))
                return [*self._halves(job), *suspects]
            return [job, *suspects]
        if left := self.ours(job.batch).ids:
            self._metrics.batches.add(1, "given_up")
            self.give_up(left, Reason.ATTEMPTS, f", {describe(error)}")
            self._report(job)
        return suspects

    def _release_riders(self, job: Job[Batch], opened: bool, last: bool) -> list[Job[Batch]]:
        """Puts what is not due back into the outbox, except what has ridden in several batches that failed, which
        becomes a job of its own and is returned. A batch of which nothing is due left as a full one, or is such a job:
        it stays, unless this was its last try and FastSMSing was away at each of them."""
        now = self._clock()
        back_again = last and job.riders and not job.own_failures
        if job.batch.entries[-1].due <= now or (job.batch.entries[0].due > now and not back_again):
            return []
        riders = job.batch.only(lambda entry: entry.due > now)
        suspects = set() if back_again else self._suspects(riders, opened)
        back = riders.only(lambda entry: entry.message.message_id not in suspects)
        try:
            self._repository.release(back)
        except RepositoryUnavailableError as error:  # they stay in the batch
            self._incident.failed(error)
            return []
        job.batch = job.batch.only(lambda entry: entry.due <= now)
        self._dispatcher.waits([entry.due - now for entry in back.entries])
        if not suspects:
            return []
        part = job.part(riders.only(lambda entry: entry.message.message_id in suspects))
        part.riders = True
        return [part]

    def _suspects(self, riders: Batch, opened: bool) -> set[str]:
        with self._lock:
            if len(self._rides) > self._config.max_pending:  # some were cancelled, say
                self._rides.clear()
            if opened:
                self._rides.update(riders.ids)
            return {message_id for message_id in riders.ids if self._rides[message_id] >= SUSPICIOUS}

    def give_up(self, ids: Sequence[str], reason: Reason, why: str = "") -> None:
        """Records, behind the delivery reports that came before, that these are not sent any more."""
        self.count_given_up(ids, reason, why)
        self._give_up_all(dict.fromkeys(ids, reason))

    def count_given_up(self, ids: Sequence[str], reason: Reason, why: str = "") -> None:
        """Logs and counts that these are not sent any more."""
        log.error("gave up %s (%s%s): %s", counted(len(ids), "message"), reason.value, why, named(ids))
        self._metrics.given_up.add(len(ids), reason.value)

    def _record(self, given_up: dict[str, Reason]) -> None:
        persist(lambda: self._repository.update_all(given_up), self.over, self._incident)

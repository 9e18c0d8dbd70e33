"""Applies delivery reports, and keeps house: what is too old expires, and what is over is forgotten."""
from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from base_repository import Repository
from incident_log import Incident, counted, location, named
from message_ids import time_of
from message_model import (
    FINAL_STATUSES,
    STATUS_OF,
    TRANSITIONS,
    MessageStatus,
    Reason,
    RepositoryUnavailableError,
    StatusTransitionError,
    UnknownMessageError,
    UnknownStatusError,
    map_to_internal_status,
)  # fmt: skip
from service_metrics import Metrics
from worker_threads import GRACE, Deadline, persist, work_in_background

__all__ = ["StatusUpdateError", "StatusUpdater"]

log = logging.getLogger("smsproxy")

UPDATES_WAITING = 10_000  # delivery reports the provider may be ahead of us before it has to wait
UPDATES_AT_ONCE = 500  # statuses that are gathered for one transaction, or some more
LARGEST_UPDATE = 1_000  # statuses in one transaction, which holds up those who accept messages for some milliseconds
ERRORS_WAITING = 1_000  # failed updates kept for whoever reads `StatusUpdater.errors`
EARLY = 0.5  # seconds; an expiry that comes no more than this before the next look for one waits for that look

Updates = dict[str, MessageStatus | Reason]


@dataclass(frozen=True, slots=True)
class StatusUpdateError:
    """One update that could not be applied."""

    error: Exception
    message_id: str
    status: object

    @property
    def is_late(self) -> bool:
        """Whether it gave up a message that was handed over or reported on before, which is nobody's fault."""
        harmless = isinstance(self.error, (StatusTransitionError, UnknownMessageError))
        return harmless and isinstance(self.status, Reason)


class StatusUpdater:
    """Applies delivery reports from a thread of its own, which keeps house, too. Thread-safe.

    `updates` takes mappings of message ID to status, or to the `Reason` of a message given up; it is bounded,
    so whoever is faster than the repository waits. `updates.join()` returns once all that was put is stored; it
    never does for reports that a stop had to give up. `errors` gets what could not be applied; it is bounded,
    too: when full the oldest goes, and `errors_dropped` counts it. `expire` makes a step of what expires, as
    `SimpleBatchingClient.expire` does. `changed` is called when statuses have changed, and must not block.
    """

    RESULTS: Mapping[type[Exception], str] = {
        UnknownStatusError: "unknown_status",
        UnknownMessageError: "unknown_message",
        StatusTransitionError: "refused",
    }

    def __init__(
        self, repository: Repository, *, metrics: Metrics | None = None, wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic, expire: Callable[[], tuple[list[str], float]] | None = None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.updates: queue.Queue[Mapping[str, object] | None] = queue.Queue(UPDATES_WAITING)
        self.errors: queue.Queue[StatusUpdateError] = queue.Queue(ERRORS_WAITING)
        self.errors_dropped = 0
        self._repository, self._wall_clock, self._clock, self._expire = repository, wall_clock, clock, expire
        self._metrics, self._changed = metrics or Metrics(), changed
        self._incident = Incident(log, "status updates cannot be stored")
        self._forgetting = Incident(log, "messages whose time is over cannot be forgotten")
        self._unexpected = Incident(log, "the status updater goes on after an error")
        self._refused = {kind: Incident(log, "delivery reports are not applied", level=logging.WARNING)
                         for kind in (UnknownStatusError, UnknownMessageError, Exception)}  # fmt: skip
        self._end: Mapping[str, object] = {}  # a stop puts it into `updates`; None is the end of one source of reports
        self._ended = False
        self._over = threading.Event()  # set when a stop has waited long enough
        self._lock = threading.Lock()  # guards the following
        self._expire_at = -math.inf if expire else math.inf  # when to look for what has expired
        self._thread = threading.Thread(target=self._run, name="smsproxy-updater-1", daemon=True)

    def start(self) -> None:
        """Starts the thread; a second call does nothing. Raises RuntimeError when the system has none left."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Applies what is in `updates` and ends the thread; False if that took more than `timeout` seconds."""
        deadline = Deadline(timeout)
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # it hangs, which the join will tell
                self.updates.put(self._end, timeout=deadline.left)
            self._thread.join(deadline.left)
            self._over.set()
            self._thread.join(GRACE)
        return not self._thread.is_alive()

    @property
    def dead(self) -> bool:
        """Whether the thread was started and runs no more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def remind(self, seconds: float) -> None:
        """Something expires in so many seconds: wakes the thread then, or now if it is to look later. Never blocks."""
        at = self._clock() + seconds
        with self._lock:
            if self._expire is None or at > self._expire_at - EARLY:
                return
            self._expire_at = at
        with contextlib.suppress(queue.Full):  # then the thread is busy, and sees it after that
            self.updates.put_nowait({})

    # The thread

    def _run(self) -> None:
        work_in_background()
        wait: float | None = 0.0
        while not self._ended:
            try:
                reports = self._next(wait)
                self._apply(reports)
                for _ in reports:
                    self.updates.task_done()
                wait = None if self._ended else self._keep_house()
            except RepositoryUnavailableError:  # only at the end
                log.error("stopped before the last delivery reports were stored")
                return
            except Exception as error:
                self._unexpected.failed(location(error))
                wait = Incident.PAUSE

    def _next(self, wait: float | None) -> list[Updates]:
        """What the reports say that wait in `updates`, as many as are applied together; nothing if none comes in
        time."""
        reports: list[Updates] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            report = self.updates.get(timeout=None if wait is None else min(wait, threading.TIMEOUT_MAX))
            while True:
                self._ended = self._ended or report is self._end
                reports.append({} if report is None else self._updates(report))
                size += len(reports[-1]) or 1
                if size >= UPDATES_AT_ONCE:
                    break
                report = self.updates.get_nowait()
        return reports

    def _apply(self, reports: Iterable[Updates]) -> None:
        """Applies the reports in their order. Of a message's statuses that may follow each other the last is enough."""
        pending: Updates = {}
        replaced: Counter[str] = Counter()  # statuses of a message that nobody needs to store
        for updates in reports:
            twice = pending.keys() & updates.keys()
            changes = {(pending[message_id], updates[message_id]) for message_id in twice}
            # A `Reason` may follow nothing: whether it does is for the repository to say.
            if all(after in TRANSITIONS[STATUS_OF[before]] for before, after in changes):
                replaced.update(twice)
            else:
                self._store(pending, replaced)
                pending, replaced = {}, Counter()
            pending.update(updates)
        self._store(pending, replaced)

    def _updates(self, report: object) -> Updates:
        """What a report says, less what makes no sense, which fails."""
        updates: dict[str, MessageStatus | Reason] = {}
        failures: list[StatusUpdateError] = []
        last: object = object()
        update: MessageStatus | Reason = MessageStatus.CONFIRMED  # most reports tell the same of all their messages
        try:
            for message_id, status in report.items() if isinstance(report, Mapping) else ((None, report),):
                try:
                    if not isinstance(message_id, str):
                        raise UnknownMessageError("the ID is not a string")
                    if status is not last:
                        update = status if isinstance(status, Reason) else map_to_internal_status(status)
                        last = status
                    updates[message_id] = update
                except (UnknownMessageError, UnknownStatusError) as error:
                    failures.append(StatusUpdateError(error, str(message_id), status))
        except Exception as error:  # somebody else's class; what it told before is applied
            failures.append(StatusUpdateError(error, "", None))
        self._fail(failures, Counter())
        return updates

    def _store(self, updates: Updates, replaced: Counter[str]) -> None:
        """Stores the updates, a large report's in parts, each by itself."""
        items = iter(updates.items())
        while part := dict(islice(items, LARGEST_UPDATE)):
            self._store_part(part, replaced)

    def _store_part(self, updates: Updates, replaced: Counter[str]) -> None:
        try:
            errors = persist(lambda: self._repository.update_all(updates), self._over, self._incident)
        except RepositoryUnavailableError:
            raise
        except Exception as error:  # whatever it is, it is told of each of them
            errors = dict.fromkeys(updates, error)
        applied = {each: update for each, update in updates.items() if each not in errors} if errors else updates
        if applied:
            self._changed()
        self._count(applied, replaced)
        if MessageStatus.FAILED in applied.values():
            failed = [each for each, update in applied.items() if update is MessageStatus.FAILED]
            log.info("FastSMSing reports %s as FAILED: %s", counted(len(failed), "message"), named(failed))
        failures = [StatusUpdateError(error, message_id, updates[message_id]) for message_id, error in errors.items()]
        if late := [failure.message_id for failure in failures if failure.is_late]:
            log.info("%s not given up, but reported on meanwhile: %s", counted(len(late), "message"), named(late))
        self._fail([failure for failure in failures if not failure.is_late], replaced)

    def _count(self, applied: Updates, replaced: Counter[str]) -> None:
        counts = Counter(applied.values())
        for update, count in counts.items():
            if STATUS_OF[update] in FINAL_STATUSES:
                self._metrics.final.add(count, STATUS_OF[update].value)
        reports = sum(count for update, count in counts.items() if isinstance(update, MessageStatus))
        reports += sum(replaced[each] for each in applied) if replaced else 0
        if reports:
            self._metrics.reports.add(reports, "applied")
            self._metrics.last_report.happened()
        now = self._wall_clock()
        times = [time_of(each) for each, update in applied.items() if update is not MessageStatus.CONFIRMED]
        self._metrics.final_time.observe([max(0.0, now - each) for each in times if each is not None])

    def _fail(self, failures: Sequence[StatusUpdateError], replaced: Counter[str]) -> None:
        """Counts the failures, logs those of a kind as one, and keeps them for whoever reads `errors`."""
        kinds: dict[type[Exception], list[StatusUpdateError]] = {}
        for failure in failures:
            kinds.setdefault(type(failure.error), []).append(failure)
            if self.errors.full():
                with contextlib.suppress(queue.Empty):  # whoever reads `errors` was faster
                    self.errors.get_nowait()
                    self.errors_dropped += 1
            self.errors.put_nowait(failure)  # nobody else puts
        for kind, alike in kinds.items():
            count = len(alike) + sum(replaced[failure.message_id] for failure in alike)
            self._metrics.reports.add(count, self.RESULTS.get(kind, "error"))
            first, ids = alike[0].error, [failure.message_id for failure in alike]
            what = first if kind is UnknownStatusError else kind.__name__
            text = f"{counted(count, 'report')}, {what}, on {named(ids)}"
            if kind is StatusTransitionError:  # harmless: repeated or overtaken
                log.debug("delivery reports are not applied: %s", text)
            else:
                self._refused.get(kind, self._refused[Exception]).failed(text)

    # Keeping house

    def _keep_house(self) -> float | None:
        """Forgets and expires a few messages; returns the seconds until it is to be called again."""
        forget = self._forget()
        with self._lock:
            wait = self._expire_at - self._clock()
            if wait <= 0:
                self._expire_at = math.inf  # a reminder that comes now counts
        if wait <= 0 and self._expire is not None:
            following = Incident.PAUSE
            try:
                expired, following = self._expire()
            finally:
                with self._lock:
                    self._expire_at = min(self._expire_at, self._clock() + following)
                    wait = max(0.0, self._expire_at - self._clock())
            if expired:
                self._apply_behind(dict.fromkeys(expired, Reason.EXPIRED))
        waits = [each for each in (forget, wait) if each is not None and each != math.inf]
        return min(waits, default=None)

    def _apply_behind(self, updates: Mapping[str, Reason]) -> None:
        """Applies updates behind the delivery reports that came before."""
        try:
            self.updates.put_nowait(updates)
        except queue.Full:  # this thread alone takes from it
            self._apply([dict(updates)])

    def _forget(self) -> float | None:
        """Forgets a few messages; returns the seconds until it is to be called again."""
        try:
            wait = self._repository.forget()
        except RepositoryUnavailableError as error:
            self._forgetting.failed(error)
            return Incident.PAUSE
        self._forgetting.ended()
        return wait

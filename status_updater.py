"""Applies delivery reports, and forgets what is due."""
from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from base_repository import Repository
from incident_log import Incident, describe, location
from message_ids import time_of
from message_model import (
    FINAL_STATUSES, STATUS_OF, TRANSITIONS, MessageStatus, Reason, RepositoryUnavailableError, StatusTransitionError,
    UnknownMessageError, UnknownStatusError, map_to_internal_status,
)  # fmt: skip
from service_metrics import Metrics
from worker_threads import GRACE, persist, work_in_background

__all__ = ["StatusUpdateError", "StatusUpdater"]

log = logging.getLogger("smsproxy")

UPDATES_WAITING = 10_000  # delivery reports the provider may be ahead of us before it has to wait
UPDATES_AT_ONCE = 500  # statuses in one transaction, or some more: it holds up those who accept messages
ERRORS_WAITING = 1_000  # failed updates kept for whoever reads `StatusUpdater.errors`


@dataclass(frozen=True, slots=True)
class StatusUpdateError:
    """One update that could not be applied."""

    error: Exception
    message_id: str
    status: object


class StatusUpdater:
    """Applies delivery reports, and forgets what is due, from a thread of its own.

    `updates` takes mappings of message ID to status, or to the `Reason` of a message given up; it is bounded,
    so whoever is faster than the repository waits. `errors` gets what could not be applied; it is bounded,
    too: when full the oldest goes, and `errors_dropped` counts it.
    """

    RESULTS: Mapping[type[Exception], str] = {
        UnknownStatusError: "unknown_status",
        UnknownMessageError: "unknown_message",
        StatusTransitionError: "refused",
    }

    def __init__(
        self, repository: Repository, *, metrics: Metrics | None = None, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.updates: queue.Queue[Mapping[str, object] | None] = queue.Queue(UPDATES_WAITING)
        self.errors: queue.Queue[StatusUpdateError] = queue.Queue(ERRORS_WAITING)
        self.errors_dropped = 0
        self._repository, self._wall_clock = repository, wall_clock
        self._metrics = metrics or Metrics()
        self._incident = Incident(log, "status updates cannot be stored")
        self._forgetting = Incident(log, "messages that are due cannot be forgotten")
        self._end: Mapping[str, object] = {}  # a stop puts it into `updates`; None is the end of one source of reports
        self._ended = False
        self._over = threading.Event()  # set when a stop has waited long enough
        self._thread = threading.Thread(target=self._run, name="smsproxy-updater-1", daemon=True)

    def start(self) -> None:
        """Starts the thread; a second call does nothing. Raises RuntimeError when the system has none left."""
        if self._thread.ident is None:
            self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Applies what is in `updates` and ends the thread; False if that took more than `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # it hangs, which the join will tell
                self.updates.put(self._end, timeout=timeout)
            self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            self._over.set()
            self._thread.join(GRACE)
        return not self._thread.is_alive()

    @property
    def dead(self) -> bool:
        """Whether the thread was started and runs no more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def _run(self) -> None:
        work_in_background()
        wait: float | None = 0.0
        while not self._ended:
            reports: list[Mapping[str, object] | None] = []
            try:
                reports = self._next(wait)
                self._ended = any(each is self._end for each in reports)
                self._apply([each for each in reports if each is not None])
                wait = None if self._ended else self._forget()
            except Exception as error:
                log.error("the status updater goes on after a %s", location(error))
                wait = Incident.PAUSE
            finally:
                for _ in reports:
                    self.updates.task_done()

    def _next(self, wait: float | None) -> list[Mapping[str, object] | None]:
        """What waits in `updates`, as much as is applied together; nothing if nothing comes in time."""
        reports: list[Mapping[str, object] | None] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            reports.append(self.updates.get(timeout=None if wait is None else min(wait, threading.TIMEOUT_MAX)))
            while (size := size + (len(reports[-1]) if isinstance(reports[-1], Mapping) else 1)) < UPDATES_AT_ONCE:
                reports.append(self.updates.get_nowait())
        return reports

    def _apply(self, reports: Iterable[Mapping[str, object]]) -> None:
        """Applies the reports in their order. Of a message's statuses that may follow each other the last is enough."""
        pending: dict[str, MessageStatus | Reason] = {}
        replaced: Counter[str] = Counter()  # statuses of a message that nobody needs to store
        for report in reports:
            updates = self._updates(report)
            twice = pending.keys() & updates.keys()
            changes = {(pending[message_id], updates[message_id]) for message_id in twice}
            if all(STATUS_OF[after] in TRANSITIONS[STATUS_OF[before]] for before, after in changes):
                replaced.update(twice)
            else:
                self._store(pending, replaced)
                pending, replaced = {}, Counter()
            pending.update(updates)
        self._store(pending, replaced)

    def _updates(self, report: object) -> dict[str, MessageStatus | Reason]:
        """What a report says, less what makes no sense, which fails."""
        updates: dict[str, MessageStatus | Reason] = {}
        failures: list[StatusUpdateError] = []
        if not isinstance(report, Mapping):
            log.error("a delivery report is not a mapping but a %s", type(report).__name__)
            return updates
        for message_id, status in report.items():
            try:
                if not isinstance(message_id, str):
                    raise UnknownMessageError("the ID is not a string")
                updates[message_id] = status if isinstance(status, Reason) else map_to_internal_status(status)
            except (UnknownMessageError, UnknownStatusError) as error:
                failures.append(StatusUpdateError(error, message_id, status))
        self._fail(failures)
        return updates

    def _store(self, updates: Mapping[str, MessageStatus | Reason], replaced: Counter[str]) -> None:
        if not updates:
            return
        try:
            errors = persist(lambda: self._repository.update_all(updates), self._over, self._incident)
        except Exception as error:  # whatever it is, it is told of each of them
            errors = dict.fromkeys(updates, error)
        applied = {message_id: update for message_id, update in updates.items() if message_id not in errors}
        counts = Counter(applied.values())
        for update, count in counts.items():
            if STATUS_OF[update] in FINAL_STATUSES:
                self._metrics.add("smsproxy_messages_final_total", STATUS_OF[update].value, count)
        reports = sum(count for update, count in counts.items() if isinstance(update, MessageStatus))
        reports += sum(count for message_id, count in replaced.items() if message_id in applied)
        self._metrics.add("smsproxy_status_updates_total", "applied", reports)
        now = self._wall_clock()
        times = [time_of(each) for each, update in applied.items() if update is not MessageStatus.CONFIRMED]
        ages = [max(0.0, now - each) for each in times if each is not None]
        self._metrics.observe("smsproxy_final_status_seconds", ages)
        if counts[MessageStatus.FAILED]:
            failed = [each for each, update in applied.items() if update is MessageStatus.FAILED]
            log.info("FastSMSing reports %d messages as FAILED: %s", len(failed), " ".join(failed))
        self._fail([StatusUpdateError(error, message_id, updates[message_id]) for message_id, error in errors.items()])

    def _fail(self, failures: Sequence[StatusUpdateError]) -> None:
        """Counts the failures, logs those of a kind in one line, and keeps them for whoever reads `errors`."""
        kinds: dict[type[Exception], list[StatusUpdateError]] = {}
        for failure in failures:
            kinds.setdefault(type(failure.error), []).append(failure)
            if self.errors.full():
                with contextlib.suppress(queue.Empty):  # whoever reads `errors` was faster
                    self.errors.get_nowait()
                    self.errors_dropped += 1
            self.errors.put_nowait(failure)  # nobody else puts
        for kind, alike in kinds.items():
            self._metrics.add("smsproxy_status_updates_total", self.RESULTS.get(kind, "error"), len(alike))
            harmless = kind is StatusTransitionError  # repeated or overtaken
            level = logging.DEBUG if harmless else logging.WARNING
            log.log(level, "%d status updates were not applied (%s), the first of message %.80r",
                    len(alike), describe(alike[0].error), alike[0].message_id)  # fmt: skip

    def _forget(self) -> float | None:
        """Forgets a few messages; returns the seconds until it is to be called again."""
        try:
            wait = self._repository.forget()
        except RepositoryUnavailableError as error:
            self._forgetting.failed(error)
            return Incident.PAUSE
        self._forgetting.ended()
        return wait

"""The status updater: applies delivery reports and forgets what is due."""
from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

import fastsmsing
import message_ids
import status_updater
from fastsmsing import Message
from helpers import HANG, Clock, returned_by
from smsproxy import (
    InMemoryRepository,
    MessageStatus,
    Metrics,
    Reason,
    RepositoryUnavailableError,
    StatusTransitionError,
    StatusUpdater,
    UnknownMessageError,
    UnknownStatusError,
)  # fmt: skip

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus


class Watched(InMemoryRepository):
    """A repository double. `update_all` raises `refusals`, one a call, and waits at the gate if that is closed."""

    def __init__(self, *message_ids: str, refusals: Sequence[BaseException] = ()) -> None:
        super().__init__()
        self.refusals = list(refusals)
        self.groups: list[dict[str, Any]] = []
        self.entered, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()
        for message_id in message_ids:
            self.save(message_id, Message("48123456789", "Hi", message_id))

    def update_all(self, updates: Mapping[str, Any]) -> dict[str, Exception]:
        self.entered.release()
        assert self.gate.wait(HANG)
        if self.refusals:
            raise self.refusals.pop(0)
        self.groups.append({each.encode().decode(): update for each, update in updates.items()})  # text, as in a file
        return super().update_all(updates)

    def statuses(self, *message_ids: str) -> list[MessageStatus]:
        return [self.get(message_id) for message_id in message_ids]


@contextlib.contextmanager
def running(repository: InMemoryRepository, *reports: Any, **options: Any) -> Iterator[StatusUpdater]:
    """An updater with these reports, at work until the block ends."""
    updater = StatusUpdater(repository, **options)
    for report in reports:
        updater.updates.put(report)
    updater.start()
    yield updater
    assert updater.stop(HANG)


def updater_of(repository: InMemoryRepository, *reports: Any, **options: Any) -> StatusUpdater:
    """An updater that has applied these reports, together, and ended."""
    with running(repository, *reports, **options) as updater:
        return updater


def errors_of(updater: StatusUpdater) -> list[tuple[str, type[Exception], object]]:
    errors = [updater.errors.get_nowait() for _ in range(updater.errors.qsize())]
    return [(error.message_id, type(error.error), error.status) for error in errors]


def test_reports_are_applied_in_order_and_those_that_came_together_as_one_group() -> None:
    repository = Watched("a", "b", "c")
    reports = {"a": "CONFIRMED", "b": "CONFIRMED"}, {"a": fastsmsing.MessageStatus.DELIVERED}, {"c": "FAILED"}
    updater = updater_of(repository, *reports)
    assert repository.groups == [{"a": DELIVERED, "b": CONFIRMED, "c": FAILED}]
    assert (repository.statuses("a", "b", "c"), errors_of(updater)) == ([DELIVERED, CONFIRMED, FAILED], [])


@pytest.mark.parametrize("seed", range(5))
def test_reports_that_came_together_have_the_effect_of_one_after_the_other(seed: int) -> None:
    rng = random.Random(seed)
    ids = [f"m{number}" for number in range(40)]
    statuses = ["CONFIRMED", "CONFIRMED", "DELIVERED", "FAILED", *Reason, "LOST"]
    reports = [{each: rng.choice(statuses) for each in rng.sample([*ids, "unknown"], 3)} for _ in range(200)]
    together, apart = Watched(*ids), Watched(*ids)
    updater_of(together, *reports)
    for report in reports:
        updater_of(apart, report)
    assert together.statuses(*ids) == apart.statuses(*ids)
    assert list(map(together.reason, ids)) == list(map(apart.reason, ids))
    assert len(together.groups) < len(apart.groups)


@pytest.mark.parametrize("report", [CONFIRMED, DELIVERED, FAILED])
def test_giving_up_does_not_overtake_a_report(report: MessageStatus) -> None:
    repository = Watched("a")
    updater_of(repository, {"a": report.value}, {"a": Reason.ATTEMPTS})
    assert (repository.get("a"), repository.reason("a")) == (report, None)


def test_a_message_that_is_given_up_too_late_is_no_refused_report(caplog: pytest.LogCaptureFixture) -> None:
    metrics, repository = Metrics(), Watched("a", "b")
    for report in ({"a": "CONFIRMED"}, {"a": Reason.ATTEMPTS, "x": Reason.EXPIRED}, {"a": "DELIVERED"}):
        updater = updater_of(repository, report, metrics=metrics)
        assert errors_of(updater) == []
    assert repository.get("a") is DELIVERED
    counts = {label: metrics.reports.count(label) for label in ("applied", *StatusUpdater.RESULTS.values(), "error")}
    assert counts == {"applied": 2, "refused": 0, "unknown_message": 0, "unknown_status": 0, "error": 0}
    assert (metrics.final.count("FAILED"), caplog.messages) == (0, [])


def test_what_cannot_be_applied_is_an_error_and_the_rest_is_applied() -> None:
    repository = Watched("a", "b", "c")
    reports = {"a": "DELIVERED", "x": "FAILED", "b": "LOST", "c": "DELIVERED"}
    updater = updater_of(repository, {"c": "FAILED"}, reports, {"b": "CONFIRMED"})
    assert sorted(errors_of(updater)) == [
        ("b", UnknownStatusError, "LOST"), ("c", StatusTransitionError, DELIVERED), ("x", UnknownMessageError, FAILED),
    ]  # fmt: skip
    assert repository.statuses("a", "b", "c", "x") == [DELIVERED, CONFIRMED, FAILED, NOT_FOUND]


def test_updates_are_counted_by_result_and_final_statuses_by_status() -> None:
    metrics, repository = Metrics(), Watched("a", "b", "c", "d", refusals=[RuntimeError("a bug")])
    reports = {"a": "CONFIRMED", "b": "DELIVERED", "c": "FAILED", "d": Reason.EXPIRED, "x": "FAILED", "y": "LOST"}
    for report in ({"a": "FAILED"}, reports, {"b": "CONFIRMED"}, {"a": "DELIVERED"}):
        updater_of(repository, report, metrics=metrics)
    counts = {label: metrics.reports.count(label) for label in ("applied", *StatusUpdater.RESULTS.values(), "error")}
    assert counts == {"applied": 4, "refused": 1, "unknown_message": 1, "unknown_status": 1, "error": 1}
    assert [metrics.final.count(label) for label in ("DELIVERED", "FAILED")] == [2, 2]


def test_the_last_report_is_one_that_was_applied_and_not_a_message_given_up() -> None:
    metrics = Metrics()
    for report, known in (({"x": "DELIVERED"}, False), ({"a": Reason.EXPIRED}, False), ({"b": "CONFIRMED"}, True)):
        updater_of(Watched("a", "b"), report, metrics=metrics)
        assert bool(list(metrics.last_report.text())) is known


def test_a_report_that_a_later_one_replaces_counts_as_that_does() -> None:
    metrics = Metrics()
    reports = [{"x": "CONFIRMED", "a": "CONFIRMED"}, {"x": "DELIVERED", "a": "DELIVERED"}]
    updater_of(Watched("a"), *reports, metrics=metrics)
    assert (metrics.reports.count("applied"), metrics.reports.count("unknown_message")) == (2, 2)


def test_the_time_from_acceptance_to_the_final_status_is_observed() -> None:
    message_id, metrics = message_ids.NewIds()(), Metrics()
    now = (message_ids.time_of(message_id) or 0) + 7
    repository = Watched(message_id, "no-time")
    reports = ({message_id: "CONFIRMED"}, {message_id: "DELIVERED", "no-time": "DELIVERED"}, {message_id: "FAILED"})
    for report in reports:
        updater_of(repository, report, metrics=metrics, wall_clock=lambda: now)
    assert metrics.final_time.total == 1
    assert "smsproxy_final_status_seconds_sum 7" in metrics.final_time.text()


def test_errors_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_updater, "ERRORS_WAITING", 3)
    updater = updater_of(InMemoryRepository(), {f"m{number}": "DELIVERED" for number in range(10)})
    assert [message_id for message_id, *_ in errors_of(updater)] == ["m7", "m8", "m9"]
    assert updater.errors_dropped == 7


@pytest.mark.parametrize("junk", [42, "FAILED", ["a"], {}, {"a": None}, {"a": {}}, {None: "FAILED"}, {7: "FAILED"}])
def test_a_senseless_report_costs_no_other(junk: Any) -> None:
    repository = Watched("b", "c")
    updater_of(repository, {"b": "DELIVERED"}, junk, {"c": "DELIVERED"})
    assert repository.statuses("b", "c") == [DELIVERED, DELIVERED]


def test_the_end_of_one_source_of_reports_does_not_end_the_updater_and_join_returns_when_all_is_applied() -> None:
    repository = Watched("a")
    with running(repository, None) as updater:
        returned_by(updater.updates.join)
        updater.updates.put({"a": "DELIVERED"})
        returned_by(updater.updates.join)
        assert (repository.get("a"), updater.dead) == (DELIVERED, False)
    assert updater.dead


def test_a_stop_applies_everything_received_before_it() -> None:
    class Updates(queue.Queue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            super().put(item)
            if timeout:  # the stop asks for the end
                repository.gate.set()

    ids = [f"m{number}" for number in range(350)]
    repository = Watched(*ids)
    repository.gate.clear()
    updater = StatusUpdater(repository)
    updater.updates = Updates()
    updater.updates.put({ids[0]: "DELIVERED"})
    updater.start()
    assert repository.entered.acquire(timeout=HANG)
    for report in (None, *({each: "DELIVERED"} for each in ids[1:])):
        updater.updates.put(report)
    assert updater.stop(HANG)
    assert Counter(repository.statuses(*ids)) == {DELIVERED: 350}


def test_an_updater_that_was_never_started_stops_at_once_and_one_may_be_started_and_stopped_twice() -> None:
    updater = StatusUpdater(InMemoryRepository())
    assert (returned_by(updater.stop), updater.dead) == (True, False)
    updater = StatusUpdater(InMemoryRepository())
    updater.start()
    updater.start()
    assert (updater.stop(HANG), returned_by(updater.stop), updater.dead) == (True, True, True)


@pytest.mark.parametrize(
    ("step", "wait"), [(3.5, 3.5), (0.0, 0.0), (1e12, threading.TIMEOUT_MAX), (None, None),
                       (RepositoryUnavailableError("disk full"), 60.0), (RuntimeError("a bug"), 60.0)]
)  # fmt: skip
def test_an_idle_updater_forgets_when_it_is_time_and_a_minute_after_an_error(step: Any, wait: float | None) -> None:
    waits: queue.Queue[float | None] = queue.Queue()

    class Updates(queue.Queue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if block:
                waits.put(timeout)
            return super().get(block, timeout)

    class Forgetful(InMemoryRepository):
        script: ClassVar[list[Any]] = [0.001, step]

        def forget(self) -> float | None:
            step = self.script.pop(0) if self.script else None
            if isinstance(step, Exception):
                raise step
            return step

    updater = StatusUpdater(Forgetful())
    updater.updates = Updates()
    updater.start()
    assert [waits.get(timeout=HANG) for _ in range(3)] == [0.0, 0.001, wait]
    assert updater.stop(HANG)


def test_a_repository_that_is_away_for_a_while_costs_no_report(caplog: pytest.LogCaptureFixture) -> None:
    repository = Watched("a", refusals=[RepositoryUnavailableError("disk full")])
    with running(repository, {"a": "DELIVERED"}) as updater:
        returned_by(updater.updates.join)
    assert (repository.get("a"), errors_of(updater)) == (DELIVERED, [])
    first, last = caplog.messages
    assert first == "status updates cannot be stored: disk full"
    assert last.startswith("status updates cannot be stored: over after ")
    assert last.endswith("1 error")


def test_reports_that_a_stop_gives_up_are_never_acknowledged() -> None:
    repository = Watched("a", "b", refusals=[RepositoryUnavailableError("disk full")] * 100)
    with running(repository, {"a": "DELIVERED"}, {"b": "DELIVERED"}) as updater:
        assert repository.entered.acquire(timeout=HANG)
        assert returned_by(lambda: updater.stop(0.0)) is True
    assert updater.updates.unfinished_tasks >= 2


class Broken(Mapping[str, str]):
    """A report that fails while it is read."""

    def __iter__(self) -> Iterator[str]:
        yield "a"
        raise ValueError("48123456789")

    def __getitem__(self, key: str) -> str:
        return "DELIVERED"

    def __len__(self) -> int:
        return 2


def test_a_report_that_cannot_be_read_costs_no_other_and_no_give_up(caplog: pytest.LogCaptureFixture) -> None:
    repository = Watched("a", "b", "c")
    updater_of(repository, {"b": "DELIVERED"}, Broken(), {"c": Reason.ATTEMPTS})
    assert repository.statuses("a", "b", "c") == [DELIVERED, DELIVERED, FAILED]
    assert repository.reason("c") is Reason.ATTEMPTS
    assert "48123456789" not in caplog.text


@pytest.mark.parametrize("broken", [ValueError("48123456789"), MemoryError()])
def test_a_report_that_does_not_know_its_length_costs_no_other(broken: Exception) -> None:
    class Unsized(Broken):
        def __len__(self) -> int:
            raise broken

    repository = Watched("a", "b", "c")
    with running(repository, {"b": "DELIVERED"}, Unsized(), {"c": "DELIVERED"}) as updater:
        returned_by(updater.updates.join)
    assert repository.statuses("a", "b", "c") == [DELIVERED] * 3


def test_a_large_report_is_stored_in_parts_and_what_is_stored_is_not_stored_again() -> None:
    ids = [f"m{number}" for number in range(2_400)]
    repository, metrics = Watched(*ids), Metrics()
    refusals = {2: RepositoryUnavailableError("disk full")}

    def update_all(updates: Mapping[str, Any]) -> dict[str, Exception]:
        if refusal := refusals.pop(len(repository.groups), None):
            raise refusal
        return Watched.update_all(repository, updates)

    repository.update_all = update_all  # type: ignore[method-assign]
    updater_of(repository, dict.fromkeys(ids, "DELIVERED"), metrics=metrics)
    assert [len(group) for group in repository.groups] == [1_000, 1_000, 400]
    assert Counter(repository.statuses(*ids)) == {DELIVERED: 2_400}
    assert (metrics.reports.count("applied"), metrics.reports.count("refused")) == (2_400, 0)


def test_what_a_large_report_replaces_counts_as_that_does() -> None:
    ids = [f"m{number}" for number in range(2_400)]
    metrics, repository = Metrics(), Watched(*ids)
    reports = {ids[0]: "CONFIRMED", "x": "CONFIRMED"}, {**dict.fromkeys(ids, "DELIVERED"), "x": "DELIVERED"}
    updater_of(repository, *reports, metrics=metrics)
    assert [len(group) for group in repository.groups] == [1_000, 1_000, 401]
    assert (metrics.reports.count("applied"), metrics.reports.count("unknown_message")) == (2_401, 2)


def test_reports_about_ids_that_are_not_ours_are_one_line_without_an_id(caplog: pytest.LogCaptureFixture) -> None:
    with running(Watched("a")) as updater:
        for number in range(500):
            updater.updates.put({f"48{number:09}": "DELIVERED"})
        returned_by(updater.updates.join)
    (line,) = caplog.messages
    assert line.startswith("delivery reports are not applied: ")
    assert "480000" not in line


# Keeping house


class Expiring:
    """What `expire` would be: a step for each call, and when to call again."""

    def __init__(self, *steps: tuple[list[str], float]) -> None:
        self.steps, self.called = list(steps), threading.Semaphore(0)

    def __call__(self) -> tuple[list[str], float]:
        step = self.steps.pop(0) if self.steps else ([], math.inf)
        self.called.release()
        return step


def test_it_looks_for_what_has_expired_at_the_start_and_when_it_is_reminded() -> None:
    expire = Expiring(([], math.inf), ([], 0.001), (["a"], math.inf))
    repository = Watched("a")
    with running(repository, expire=expire) as updater:
        assert expire.called.acquire(timeout=HANG)
        updater.remind(0.001)
        for _ in range(2):
            assert expire.called.acquire(timeout=HANG)
        assert repository.entered.acquire(timeout=HANG)
    assert (repository.get("a"), repository.reason("a")) == (FAILED, Reason.EXPIRED)


def test_what_expires_does_so_behind_the_reports_that_came_before() -> None:
    repository = Watched("a")
    updater = StatusUpdater(repository, expire=Expiring((["a"], math.inf)))
    updater._keep_house()
    assert list(updater.updates.queue) == [{"a": Reason.EXPIRED}]


def test_a_reminder_wakes_it_only_for_what_comes_before_its_next_look() -> None:
    clock = Clock()
    updater = StatusUpdater(Watched(), clock=clock, expire=Expiring(([], 100.0)))
    updater._keep_house()
    updater.remind(100.0)
    updater.remind(99.8)
    assert updater.updates.empty()
    updater.remind(50.0)
    updater.remind(60.0)
    assert list(updater.updates.queue) == [{}]
    clock.advance(50.0)
    assert updater._keep_house() is not None


def test_a_stop_tells_when_the_updater_did_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_updater, "GRACE", 0.01)
    repository = Watched("a")
    repository.gate.clear()
    with running(repository, {"a": "DELIVERED"}) as updater:
        assert repository.entered.acquire(timeout=HANG)
        assert returned_by(lambda: updater.stop(0.01)) is False
        repository.gate.set()


def test_messages_that_the_provider_reports_as_failed_are_logged_by_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    a, b, c, d = ids = [f"01a21087-c443-7ce3-b466-{number:012x}" for number in range(4)]
    updater_of(Watched(*ids), {a: "FAILED", b: "DELIVERED", c: "FAILED", d: Reason.EXPIRED})
    assert caplog.messages == [f"FastSMSing reports 2 messages as FAILED: {a} {c}"]

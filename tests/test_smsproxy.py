"""The domain's values, figures and logs, the status updater, and the facade. Batching has tests of its own."""
from __future__ import annotations

import dataclasses
import logging
import math
import queue
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

import fastsmsing
import smsproxy
from fastsmsing import FastSmsingError, InMemoryClient, Message, RejectedError
from helpers import HANG, Clock, Gate, Recorder
from smsproxy import (
    FAMILIES, FINAL_STATUSES, TRANSITIONS, Batch, ClientResult, ClientStatistics, ClosedError, DuplicateMessageError, Entry,
    IdempotencyError, Incident, InMemoryRepository, MessageStatus, Metrics, OverloadedError, Reason,
    RepositoryUnavailableError, SendMessage, SmsProxy, SmsProxyConfig, Statistics, StatusTransitionError, StatusUpdater,
    UnknownMessageError, UnknownStatusError, ValidationError, check_transition, describe, map_to_internal_status,
)  # fmt: skip

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
NUMBER = "48123456789"
HELLO = SendMessage(NUMBER, "hello")
ONE_BY_ONE = SmsProxyConfig(batch_size=1)
LINGERING = SmsProxyConfig(max_delay=None)
UPDATES = "smsproxy_status_updates_total"


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive(), f"{thread.name} was left behind"


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what hangs on purpose: the last steps of a stop get no second of their own."""
    monkeypatch.setattr(smsproxy, "GRACE", 0.01)


# Statuses


def test_the_transitions_are_total_and_those_of_the_contract() -> None:
    assert TRANSITIONS == {
        ACCEPTED: {CONFIRMED, FAILED, DELIVERED}, CONFIRMED: {FAILED, DELIVERED},
        NOT_FOUND: set(), FAILED: set(), DELIVERED: set(),
    }  # fmt: skip
    assert FINAL_STATUSES == {FAILED, DELIVERED}


@pytest.mark.parametrize("current", MessageStatus)
@pytest.mark.parametrize("status", MessageStatus)
def test_a_change_is_refused_unless_the_table_has_it(current: MessageStatus, status: MessageStatus) -> None:
    if status in TRANSITIONS[current]:
        check_transition("a", current, status)
    else:
        with pytest.raises(UnknownMessageError if current is NOT_FOUND else StatusTransitionError, match="message a "):
            check_transition("a", current, status)


@pytest.mark.parametrize("status", [*fastsmsing.MessageStatus, "CONFIRMED", "FAILED", "DELIVERED"])
def test_a_status_of_the_provider_is_mapped_as_a_member_and_as_a_string(status: str) -> None:
    assert map_to_internal_status(status) is MessageStatus(status)


@pytest.mark.parametrize(
    "status", ["", "confirmed", "ACCEPTED", "NOT_FOUND", "LOST", "rejected", None, 1, True, b"FAILED", ["FAILED"], {}, object()]
)
def test_any_other_status_is_unknown(status: object) -> None:
    with pytest.raises(UnknownStatusError):
        map_to_internal_status(status)


def test_an_unknown_status_is_named_only_if_it_looks_like_one() -> None:
    said = {}
    for status in ("LOST", f"lost {NUMBER}", "X" * 31):
        with pytest.raises(UnknownStatusError) as raised:
            map_to_internal_status(status)
        said[status] = str(raised.value)
    assert list(said.values()) == ["unknown status LOST", "unknown status str", "unknown status str"]


# Values


@pytest.mark.parametrize("value", [HELLO, SmsProxyConfig(), Statistics(), Batch(())])
def test_values_are_frozen_and_slotted(value: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)
    assert not hasattr(value, "__dict__")


def test_no_repr_shows_a_number_or_a_text() -> None:
    entry = Entry(HELLO.to_message("a"), b"fingerprint")
    for value in (HELLO, entry, Batch((entry,)), ClientResult((entry.message,), None, 1, None)):
        assert NUMBER not in repr(value) and "hello" not in repr(value)


LONGEST = {"number": "1" * 15, "text": "x" * 1600}


@pytest.mark.parametrize("number", ["1", LONGEST["number"], "0", NUMBER])
@pytest.mark.parametrize("text", ["x", LONGEST["text"], " ", "\0", "\U0001f4e6" * 1600])
def test_a_message_within_the_limits_is_valid(number: str, text: str) -> None:
    SendMessage(number, text).validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [("phone_number", each) for each in ("", "1" * 16, "+48123456789", "48 123", "1-2", "1\n", "\u0661\u0662", "\u00b2", "a", None, 48, b"48", ["1"])]
    + [("message", each) for each in ("", "x" * 1601, "a\ud800b", "\udfff", None, 1, b"hello", ["a"])],
)  # fmt: skip
def test_a_message_that_cannot_be_sent_is_refused_by_field_without_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        dataclasses.replace(HELLO, **{field: value}).validate()
    assert raised.value.field == field
    assert str(raised.value) == f"{field} {raised.value.problem}"
    assert not value or str(value) not in raised.value.problem


WRONG: dict[str, list[Any]] = {
    "batch_size": [True, 1.5, "2", None, math.nan],
    "max_delay": [-1, -1e-9, math.nan, math.inf, "1", True, 10**400],
    "senders": [0, -1, True, 1.0, None],
    "max_pending": [0, -1, 99, 100.0, None],
    "max_attempts": [1.5, True, "1"],
    "backoff_base": [-1, math.nan, math.inf, None, "1", True],
    "backoff_max": [-1, math.nan, math.inf, None, "1", True],
    "max_age": [-1, math.nan, math.inf, "1", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        SmsProxyConfig(**{name: value})
    assert raised.value.field == name


def test_every_setting_has_wrong_values_above() -> None:
    assert [field.name for field in dataclasses.fields(SmsProxyConfig)] == list(WRONG)


@pytest.mark.parametrize("value", [1, 0, -1, -1000])
def test_a_batch_size_and_attempts_below_one_count_as_one(value: int) -> None:
    config = SmsProxyConfig(batch_size=value, max_attempts=value)
    assert (config.batch_size, config.max_attempts) == (1, 1)


def test_some_settings_may_be_none() -> None:
    config = SmsProxyConfig(max_delay=None, max_attempts=None, max_age=None)
    assert (config.max_delay, config.max_attempts, config.max_age) == (None, None, None)


@pytest.mark.parametrize(
    ("failures", "fraction", "expected"), [(1, 0, 0.5), (1, 1, 1.0), (2, 1, 2.0), (4, 0.5, 6.0), (5, 1, 10.0), (10**6, 0, 5.0)]
)
def test_the_backoff_doubles_up_to_its_longest_with_jitter(failures: int, fraction: float, expected: float) -> None:
    assert SmsProxyConfig(backoff_base=1, backoff_max=10).backoff(failures, fraction) == expected


# IDs


def id_of(key: str | None = None) -> str:
    return SmsProxy(Recorder()).entry(HELLO, key).message.message_id


@pytest.mark.parametrize(("key", "version"), [(None, 7), ("a key", 8)])
def test_an_id_is_a_uuid_of_its_version(key: str | None, version: int) -> None:
    for number in range(200):  # the variant's digit differs
        message_id = id_of(key and f"{key} {number}")
        parsed = uuid.UUID(message_id)
        assert (str(parsed), parsed.version, parsed.variant) == (message_id, version, uuid.RFC_4122)


def test_an_id_begins_with_the_time_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for now in (1, 1_764_000_000_123, 2**48 - 1):
        monkeypatch.setattr(smsproxy.time, "time_ns", lambda: now * 1_000_000 + 999_999)  # noqa: B023
        ids.append(id_of())
        assert smsproxy.time_of(ids[-1]) == now / 1000
    assert ids == sorted(ids)


@pytest.mark.parametrize("other", ["", "m1", "x" * 36, "xxxxxxxx-xxxx-7xxx-8xxx-xxxxxxxxxxxx", "\ud800" * 36])
def test_an_id_of_another_kind_tells_no_time(other: str) -> None:
    assert smsproxy.time_of(other) is smsproxy.time_of(id_of("a key")) is None


def test_no_two_ids_are_the_same() -> None:
    proxy = SmsProxy(Recorder())
    assert len({proxy.entry(HELLO).message.message_id for _ in range(2000)}) == 2000


def test_a_key_has_one_id_for_ever() -> None:
    assert id_of("a key") == id_of("a key") != id_of("a key ")


# What is said of errors


class Odd(Exception):
    """An error with attributes and a text of its choice."""

    def __init__(self, *args: object, **attributes: object) -> None:
        super().__init__(*args)
        vars(self).update(attributes)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError(NUMBER)

    __repr__ = __str__
    errno = property(__str__)


class Argless(Exception):
    args = property(Mute.__str__)  # type: ignore[assignment]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(), "ValueError"),
        (ValueError(f"cannot send to {NUMBER}"), "ValueError"),
        (ValueError(int(NUMBER)), "ValueError"),
        (ValueError(503, NUMBER), "ValueError 503"),
        (ValueError(True), "ValueError"),
        (OSError(28, NUMBER, NUMBER), "OSError 28"),
        (Odd(NUMBER, errno=7), "Odd 7"),
        (Odd(NUMBER, code=502), "Odd 502"),
        (Odd(NUMBER, status=429), "Odd 429"),
        (Odd(code=int(NUMBER), status=NUMBER, errno=[NUMBER]), "Odd"),
        (Odd(code=-1, status=1000, errno=0), "Odd"),
        (Mute(NUMBER), "Mute"),
        (Argless(NUMBER), "Argless"),
        (caused(FastSmsingError(NUMBER), TimeoutError(NUMBER)), "FastSmsingError from TimeoutError"),
        (SystemExit(3), "SystemExit 3"),
    ],
)  # fmt: skip
def test_an_error_is_described_by_type_number_and_cause_and_never_by_its_text(error: BaseException, expected: str) -> None:
    assert describe(error) == expected


def test_an_incident_is_logged_when_it_begins_once_a_minute_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    incident = Incident(logging.getLogger("smsproxy"), "cannot write", clock=clock)
    incident.ended()
    for seconds in (0, 10, 49, 1, 59, 2):
        clock.advance(seconds)
        incident.failed("disk full")
    incident.ended()
    incident.ended()
    incident.failed("disk full")
    assert caplog.messages == [
        "cannot write: disk full (1 times in 0 s)",
        "cannot write: disk full (4 times in 60 s)",
        "cannot write: disk full (6 times in 121 s)",
        "over after 121.0 s and 6 errors: cannot write",
        "cannot write: disk full (1 times in 0 s)",
    ]


# Figures


def test_every_series_is_there_from_the_start_at_0() -> None:
    rows = Metrics().rows()
    assert set(rows) == {(each.name, value) for each in FAMILIES if each.kind != "gauge" for value in each.values}
    assert {figure for row in rows.values() for figure in row} == {0.0}


def test_counters_add_up_by_label() -> None:
    metrics = Metrics()
    metrics.add(UPDATES, "applied", 2)
    metrics.add(UPDATES, "applied")
    metrics.add(UPDATES, "refused")
    assert (metrics.rows()[UPDATES, "applied"], metrics.total(UPDATES)) == ([3.0], 4.0)


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (1, 0), (1.5, 1), (2, 1), (1000, 9), (1000.5, 10), (1e9, 10)])
def test_a_value_counts_in_the_first_bucket_that_holds_it_and_in_the_sum(value: float, bucket: int) -> None:
    metrics = Metrics()
    metrics.observe("smsproxy_batch_messages", [value, value])
    assert metrics.rows()["smsproxy_batch_messages", ""] == [2.0 if each == bucket else 0.0 for each in range(11)] + [2 * value]


def result(error: BaseException | None = None, messages: int = 1, attempt: int = 1) -> ClientResult:
    return ClientResult(tuple(HELLO.to_message(f"m{number}") for number in range(messages)), error, attempt, 3)


def test_statistics_add_up_batches_messages_and_attempts() -> None:
    statistics = ClientStatistics()
    before = statistics.get_statistics()
    for each in (result(messages=10), result(RejectedError(NUMBER), 5, 3), result(attempt=2), result()):
        statistics.send(each)
    after = statistics.get_statistics()
    assert (before, before.success_percentage) == (Statistics(), 100.0)
    assert (after, after.success_percentage) == (Statistics(3, 1, 17, 7, "RejectedError"), 75.0)


def test_no_result_is_missed_when_many_threads_send() -> None:
    statistics, start = ClientStatistics(), threading.Barrier(8)

    def send() -> None:
        start.wait(HANG)
        for number in range(500):
            statistics.send(result(ValueError() if number % 2 else None))

    threads = [threading.Thread(target=send, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert statistics.get_statistics() == Statistics(2000, 2000, 4000, 4000, "ValueError")


# The status updater


def returned_by(call: Callable[[], Any]) -> Any:
    """What the call returns; fails if it hangs."""
    answers: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: answers.put(call()), daemon=True).start()
    try:
        return answers.get(timeout=HANG)
    except queue.Empty:
        raise AssertionError("it hangs") from None


class Watched(InMemoryRepository):
    """A repository double. `update_all` raises `refusals`, one a call, and waits at the gate if that is closed."""

    def __init__(self, *message_ids: str, refusals: Sequence[BaseException] = ()) -> None:
        super().__init__()
        self.refusals = list(refusals)
        self.groups: list[dict[str, Any]] = []
        self.entered, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()
        for message_id in message_ids:
            self.save(message_id)

    def update_all(self, updates: Mapping[str, Any]) -> dict[str, Exception]:
        self.entered.release()
        assert self.gate.wait(HANG)
        if self.refusals:
            raise self.refusals.pop(0)
        self.groups.append(dict(updates))
        return super().update_all(updates)

    def statuses(self, *message_ids: str) -> list[MessageStatus]:
        return [self.get(message_id) for message_id in message_ids]


def updater_of(repository: InMemoryRepository, *reports: Any) -> StatusUpdater:
    """An updater that has applied these reports, together, and ended."""
    updater = StatusUpdater(repository, metrics=Metrics())
    for report in reports:
        updater.updates.put(report)
    updater.start()
    assert updater.stop(HANG)
    return updater


def errors_of(updater: StatusUpdater) -> list[tuple[str, type[Exception], object]]:
    errors = [updater.errors.get_nowait() for _ in range(updater.errors.qsize())]
    return [(error.message_id, type(error.error), error.status) for error in errors]


def test_reports_are_applied_in_order() -> None:
    repository = Watched("a", "b")
    updater = updater_of(repository, {"a": "CONFIRMED", "b": "CONFIRMED"}, {"a": "DELIVERED", "b": fastsmsing.MessageStatus.FAILED})
    assert (repository.statuses("a", "b"), errors_of(updater)) == ([DELIVERED, FAILED], [])


def test_reports_that_came_together_are_one_group_for_the_repository() -> None:
    repository = Watched("a", "b", "c")
    updater_of(repository, {"a": "CONFIRMED", "b": "CONFIRMED"}, {"a": "DELIVERED"}, {"c": "FAILED"})
    assert repository.groups == [{"a": DELIVERED, "b": CONFIRMED, "c": FAILED}]


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
    assert [(together.get(each), together.reason(each)) for each in ids] == [(apart.get(each), apart.reason(each)) for each in ids]
    assert len(together.groups) < len(apart.groups)


@pytest.mark.parametrize(
    ("report", "status", "reason"),
    [("DELIVERED", DELIVERED, None), ("FAILED", FAILED, None), ("CONFIRMED", FAILED, Reason.ATTEMPTS)],
)
def test_giving_up_does_not_overtake_a_report(report: str, status: MessageStatus, reason: Reason | None) -> None:
    repository = Watched("a")
    updater_of(repository, {"a": report}, {"a": Reason.ATTEMPTS})
    assert (repository.get("a"), repository.reason("a")) == (status, reason)


def test_what_cannot_be_applied_is_an_error_and_the_rest_is_applied() -> None:
    repository = Watched("a", "b", "c")
    updater = updater_of(repository, {"c": "FAILED"}, {"a": "DELIVERED", "x": "FAILED", "b": "LOST", "c": "DELIVERED"}, {"b": "CONFIRMED"})
    assert sorted(errors_of(updater)) == [
        ("b", UnknownStatusError, "LOST"), ("c", StatusTransitionError, DELIVERED), ("x", UnknownMessageError, FAILED),
    ]  # fmt: skip
    assert repository.statuses("a", "b", "c", "x") == [DELIVERED, CONFIRMED, FAILED, NOT_FOUND]


def test_updates_are_counted_by_result_and_final_statuses_by_status() -> None:
    metrics, repository = Metrics(), Watched("a", "b", "c", "d", refusals=[RuntimeError("a bug")])
    updater = StatusUpdater(repository, metrics=metrics)
    updater.start()
    reports = {"a": "CONFIRMED", "b": "DELIVERED", "c": "FAILED", "d": Reason.EXPIRED, "x": "FAILED", "y": "LOST"}
    for report in ({"a": "FAILED"}, reports, {"b": "CONFIRMED"}, {"a": "DELIVERED"}):
        updater.updates.put(report)
        updater.updates.join()
    assert updater.stop(HANG)
    rows = metrics.rows()
    assert {label: row[0] for (name, label), row in rows.items() if name == UPDATES} == {
        "applied": 4, "refused": 1, "unknown_message": 1, "unknown_status": 1, "error": 1,
    }  # fmt: skip
    finals = {label: row[0] for (name, label), row in rows.items() if name == "smsproxy_messages_final_total"}
    assert finals == {"DELIVERED": 2, "FAILED": 2}


def test_the_time_from_acceptance_to_the_final_status_is_observed() -> None:
    message_id = smsproxy.new_id()
    repository, metrics, accepted_at = Watched(message_id, "no-time"), Metrics(), smsproxy.time_of(message_id)
    assert accepted_at is not None
    updater = StatusUpdater(repository, metrics=metrics, wall_clock=lambda: accepted_at + 7)
    for report in ({message_id: "CONFIRMED"}, {message_id: "DELIVERED", "no-time": "DELIVERED"}):
        updater.updates.put(report)
    updater.start()
    assert updater.stop(HANG)
    *counts, total = metrics.rows()["smsproxy_final_status_seconds", ""]
    assert (sum(counts), total) == (1, pytest.approx(7))


def test_errors_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smsproxy, "ERRORS_WAITING", 3)
    updater = updater_of(InMemoryRepository(), {f"m{number}": "DELIVERED" for number in range(10)})
    assert [message_id for message_id, *_ in errors_of(updater)] == ["m7", "m8", "m9"]
    assert updater.errors_dropped == 7


@pytest.mark.parametrize("junk", [42, "DELIVERED", ["a"], object(), {"a": None}, {None: "DELIVERED"}, {7: "FAILED"}, {}, {"a": {}}])
def test_a_senseless_report_costs_no_other(junk: Any) -> None:
    repository = Watched("b", "c")
    updater_of(repository, {"b": "DELIVERED"}, junk, {"c": "DELIVERED"})
    assert repository.statuses("b", "c") == [DELIVERED, DELIVERED]


def test_the_end_of_one_source_of_reports_does_not_end_the_updater() -> None:
    repository = Watched("a")
    updater = StatusUpdater(repository)
    updater.start()
    for report in (None, {"a": "DELIVERED"}):
        updater.updates.put(report)
        updater.updates.join()
    assert (repository.get("a"), updater.dead) == (DELIVERED, False)
    assert (updater.stop(HANG), updater.stop(HANG), updater.dead) == (True, True, True)


def test_a_stop_applies_everything_received_before_it() -> None:
    ids = [f"m{number}" for number in range(350)]
    repository = Watched(*ids)
    repository.gate.clear()
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({ids[0]: "DELIVERED"})
    assert repository.entered.acquire(timeout=HANG)
    for report in (None, *({each: "DELIVERED"} for each in ids[1:])):
        updater.updates.put(report)
    stopping = threading.Thread(target=updater.stop, args=(HANG,), daemon=True)
    stopping.start()
    while updater.updates.unfinished_tasks < len(ids) + 2:  # until the stop has asked for the end
        assert stopping.is_alive()
    repository.gate.set()
    stopping.join(HANG)
    assert Counter(repository.statuses(*ids)) == {DELIVERED: 350}


def test_join_returns_when_what_was_put_is_applied() -> None:
    repository = Watched("a")
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    returned_by(updater.updates.join)
    assert repository.get("a") is DELIVERED
    assert updater.stop(HANG)


def test_an_updater_that_was_never_started_stops_at_once() -> None:
    updater = StatusUpdater(InMemoryRepository())
    assert (returned_by(updater.stop), updater.dead) == (True, False)


def test_an_updater_may_be_started_twice() -> None:
    updater = StatusUpdater(InMemoryRepository())
    updater.start()
    updater.start()
    assert updater.stop(HANG)


class Forgetful(InMemoryRepository):
    """A repository double whose `forget` does what the script says, and then wants to be called in no time."""

    def __init__(self, *script: Exception | float | None) -> None:
        super().__init__()
        self.script = list(script)
        self.called = threading.Semaphore(0)

    def forget(self) -> float | None:
        self.called.release()
        step = self.script.pop(0) if self.script else 0.001
        if isinstance(step, Exception):
            raise step
        return step

    def wait_called(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.called.acquire(timeout=HANG), "nobody forgets"


def test_an_idle_updater_forgets_whenever_it_is_time() -> None:
    repository = Forgetful()
    updater = StatusUpdater(repository)
    updater.start()
    repository.wait_called(5)
    assert updater.stop(HANG)


@pytest.mark.parametrize("error", [RepositoryUnavailableError("disk full"), RuntimeError("a bug")])
def test_forgetting_that_fails_is_tried_again_later_and_costs_no_report(error: Exception) -> None:
    waits: list[float | None] = []

    class Updates(queue.Queue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if block:
                waits.append(timeout)
            return super().get(block, timeout)

    repository = Forgetful(error, None)
    repository.save("a")
    updater = StatusUpdater(repository)
    updater.updates = Updates()
    updater.start()
    repository.wait_called()
    updater.updates.put({"a": "DELIVERED"})
    updater.updates.join()
    assert repository.get("a") is DELIVERED
    assert updater.stop(HANG)
    assert waits[0] == 0 and waits[1] is not None and waits[1] >= 1


def test_a_repository_that_is_away_for_a_while_costs_no_report(caplog: pytest.LogCaptureFixture) -> None:
    repository = Watched("a", refusals=[RepositoryUnavailableError("disk full")])
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    returned_by(updater.updates.join)
    assert (repository.get("a"), errors_of(updater)) == (DELIVERED, [])
    assert updater.stop(HANG)
    assert caplog.messages[0].startswith("status updates cannot be stored: disk full")
    assert caplog.messages[1].endswith("1 errors: status updates cannot be stored")


def test_a_stop_ends_the_wait_for_a_repository_and_the_updates_are_errors() -> None:
    repository = Watched("a", refusals=[RepositoryUnavailableError("disk full")] * 100)
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    assert repository.entered.acquire(timeout=HANG)
    assert returned_by(lambda: updater.stop(0.0)) is True
    assert errors_of(updater) == [("a", RepositoryUnavailableError, DELIVERED)]


def test_a_stop_tells_when_the_updater_did_not_end_in_time(no_grace: None) -> None:
    repository = Watched("a")
    repository.gate.clear()
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    assert repository.entered.acquire(timeout=HANG)
    assert returned_by(lambda: updater.stop(0.01)) is False
    repository.gate.set()


def test_messages_that_the_provider_reports_as_failed_are_logged_by_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    updater_of(Watched("a", "b", "c", "d"), {"a": "FAILED", "b": "DELIVERED", "c": "FAILED", "d": Reason.EXPIRED})
    assert caplog.messages == ["FastSMSing reports 2 messages as FAILED: a c"]

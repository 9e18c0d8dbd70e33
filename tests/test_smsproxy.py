"""Values, settings, the repository in memory, statistics, delivery reports and the facade."""
from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import queue
import random
import threading
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

import fastsmsing
import smsproxy
from fastsmsing import FastSmsingError, InMemoryClient, Message, RejectedError
from helpers import HANG, Gate, Grouping, Recorder, Scripted
from smsproxy import (
    FINAL_STATUSES, TRANSITIONS, ClientResult, ClientStatistics, ClosedError, DuplicateMessageError, IdempotencyError,
    InMemoryRepository, MessageStatus, Metrics, OverloadedError, Repository, RepositoryUnavailableError, SendingResult,
    SendMessage, SmsProxy, SmsProxyConfig, SmsProxyError, Statistics, StatusTransitionError, StatusUpdateError,
    StatusUpdater, UnknownMessageError, UnknownStatusError, ValidationError, check_transition,
    map_to_internal_status,
)  # fmt: skip

ACCEPTED, NOT_FOUND = MessageStatus.ACCEPTED, MessageStatus.NOT_FOUND
CONFIRMED, FAILED, DELIVERED = MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED
NUMBER = "48123456789"
HELLO = SendMessage(NUMBER, "hello")
ONE_BY_ONE = SmsProxyConfig(batch_size=1)
LINGERING = SmsProxyConfig(batch_size=100, max_delay=None)


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


# Tools


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Refusing(InMemoryRepository):
    """A repository double whose `update` raises for the IDs it is told."""

    def __init__(self, **errors: BaseException) -> None:
        super().__init__()
        self.errors = errors

    def update(self, message_id: str, status: MessageStatus) -> None:
        if message_id in self.errors:
            raise self.errors[message_id]
        super().update(message_id, status)


class Outbox(InMemoryRepository):
    """A durable repository double; `refusals` are raised by `update_all` or `handed_over`, one a call."""

    slow = True

    def __init__(self, *refusals: Exception) -> None:
        super().__init__()
        self.refusals = list(refusals)
        self.groups: list[dict[str, MessageStatus]] = []
        self.waiting: dict[str, tuple[float, Message]] = {}
        self.refused = threading.Semaphore(0)

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        super().save(message_id, message, fingerprint)
        if message is not None:
            self.waiting[message_id] = (time.time(), message)

    def update_all(self, updates: Mapping[str, MessageStatus]) -> dict[str, SmsProxyError]:
        self._refuse()
        self.groups.append(dict(updates))
        failures: dict[str, SmsProxyError] = {}
        for message_id, status in updates.items():
            try:
                self.update(message_id, status)
            except SmsProxyError as error:
                failures[message_id] = error
        return failures

    def handed_over(self, message_ids: Iterable[str]) -> None:
        self._refuse()
        for message_id in message_ids:
            self.waiting.pop(message_id, None)

    def outbox(self) -> Iterable[tuple[float, Message]]:
        return list(self.waiting.values())

    def _refuse(self) -> None:
        if self.refusals:
            self.refused.release()
            raise self.refusals.pop(0)


def returned_by(call: Callable[[], Any]) -> Any:
    """What the call returns; fails if it hangs."""
    answers: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: answers.put(call()), daemon=True).start()
    try:
        return answers.get(timeout=HANG)
    except queue.Empty:
        raise AssertionError("it hangs") from None


def result(error: BaseException | None = None, messages: int = 1, attempt: int = 1) -> ClientResult:
    return ClientResult(tuple(Message(NUMBER, "a text", f"m{n}") for n in range(messages)), error, attempt, 3)


# Statuses


def test_the_statuses_are_five() -> None:
    assert [status.value for status in MessageStatus] == ["ACCEPTED", "NOT_FOUND", "CONFIRMED", "FAILED", "DELIVERED"]


def test_a_status_is_a_string() -> None:
    assert MessageStatus.ACCEPTED == "ACCEPTED"


def test_the_final_statuses_are_failed_and_delivered() -> None:
    assert FINAL_STATUSES == {FAILED, DELIVERED}


def test_the_transitions_are_total_and_exactly_those_of_the_contract() -> None:
    assert TRANSITIONS == {
        ACCEPTED: {CONFIRMED, FAILED, DELIVERED},
        CONFIRMED: {FAILED, DELIVERED},
        NOT_FOUND: set(),
        FAILED: set(),
        DELIVERED: set(),
    }
    assert set(TRANSITIONS) == set(MessageStatus)


@pytest.mark.parametrize("current", MessageStatus)
@pytest.mark.parametrize("status", MessageStatus)
def test_the_judge_of_changes_follows_the_table(current: MessageStatus, status: MessageStatus) -> None:
    refusal: type[SmsProxyError] | None = None
    if current is NOT_FOUND:
        refusal = UnknownMessageError
    elif status not in TRANSITIONS[current]:
        refusal = StatusTransitionError
    try:
        raised: type[SmsProxyError] | None = check_transition("a", current, status)
    except SmsProxyError as error:
        raised = type(error)
    assert raised is refusal


@pytest.mark.parametrize("status", fastsmsing.MessageStatus)
def test_every_status_of_the_provider_has_one_of_ours(status: fastsmsing.MessageStatus) -> None:
    assert map_to_internal_status(status) is MessageStatus(status.value)


@pytest.mark.parametrize("status", ["CONFIRMED", "FAILED", "DELIVERED"])
def test_a_status_may_come_as_a_plain_string(status: str) -> None:
    assert map_to_internal_status(status) is MessageStatus(status)


@pytest.mark.parametrize(
    "status",
    ["", "delivered", "DELIVERED ", "ACCEPTED", "NOT_FOUND", MessageStatus.ACCEPTED, None, 0, 1.5, b"FAILED", [], {}],
)
def test_an_unknown_status_is_refused(status: object) -> None:
    with pytest.raises(UnknownStatusError, match="unknown status"):
        map_to_internal_status(status)


def test_a_giant_unknown_status_is_named_in_short() -> None:
    with pytest.raises(UnknownStatusError) as raised:
        map_to_internal_status("x" * 1_000_000)
    assert len(str(raised.value)) < 100


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def test_a_status_without_words_is_unknown_all_the_same() -> None:
    with pytest.raises(UnknownStatusError):
        map_to_internal_status(Unprintable())


# Errors and values


@pytest.mark.parametrize(
    "error",
    [
        ValidationError, DuplicateMessageError, IdempotencyError, UnknownMessageError, StatusTransitionError,
        UnknownStatusError, OverloadedError, ClosedError, RepositoryUnavailableError,
    ],
)  # fmt: skip
def test_all_errors_have_one_root(error: type[Exception]) -> None:
    assert issubclass(error, SmsProxyError)


def test_a_validation_error_is_a_value_error_that_names_the_field_and_the_problem() -> None:
    error = ValidationError("phone_number", "must not be empty")
    assert isinstance(error, ValueError)
    assert (str(error), error.field, error.problem) == (
        "phone_number must not be empty", "phone_number", "must not be empty",
    )  # fmt: skip


def test_a_duplicate_names_the_id_and_has_the_fingerprint() -> None:
    error = DuplicateMessageError("the-id", b"print")
    assert (str(error), error.message_id, error.fingerprint) == ("message the-id is stored already", "the-id", b"print")


def test_the_repr_of_a_message_shows_neither_number_nor_text() -> None:
    assert repr(SendMessage(NUMBER, "secret")) == "SendMessage()"


@pytest.mark.parametrize("value", [HELLO, SendingResult("a"), result(), SmsProxyConfig(), Statistics()])
def test_values_are_frozen_and_slotted(value: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, "another")
    assert not hasattr(value, "__dict__")


# Settings


def test_the_defaults_are_those_of_the_contract() -> None:
    assert dataclasses.asdict(SmsProxyConfig()) == {
        "batch_size": 10, "max_batch_size": 10, "max_delay": 5.0, "senders": 4, "max_pending": 10_000,
        "max_attempts": 3, "backoff_base": 0.1, "backoff_max": 10.0, "max_age": None,
    }  # fmt: skip


def test_max_batch_size_follows_batch_size() -> None:
    assert SmsProxyConfig(batch_size=25).max_batch_size == 25


@pytest.mark.parametrize("batch_size", [1, 0, -1, -1_000])
def test_a_batch_size_of_one_or_less_turns_batching_off(batch_size: int) -> None:
    config = SmsProxyConfig(batch_size=batch_size, max_batch_size=100)
    assert (config.batch_size, config.max_batch_size) == (1, 1)


@pytest.mark.parametrize("max_attempts", [1, 0, -1])
def test_less_than_one_attempt_counts_as_one(max_attempts: int) -> None:
    assert SmsProxyConfig(max_attempts=max_attempts).max_attempts == 1


@pytest.mark.parametrize("name", ["max_batch_size", "max_delay", "max_age"])
def test_some_settings_may_be_none(name: str) -> None:
    settings: dict[str, Any] = {name: None}
    assert isinstance(SmsProxyConfig(**settings), SmsProxyConfig)


@pytest.mark.parametrize("name", ["max_delay", "backoff_base", "backoff_max", "max_age"])
@pytest.mark.parametrize("value", [0, 0.0, 1, 1e-9, 1e12])
def test_times_may_be_any_number_from_zero_up(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value}
    assert getattr(SmsProxyConfig(**settings), name) == value


WHOLE = ["batch_size", "max_batch_size", "senders", "max_pending", "max_attempts"]
TIMES = ["max_delay", "backoff_base", "backoff_max", "max_age"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in WHOLE for value in (1.5, 2.0, "10", True, [], math.nan)),
        *((name, value) for name in TIMES for value in (-1, -0.001, math.nan, math.inf, -math.inf, "5", True, [])),
        *((name, None) for name in ("batch_size", "senders", "max_pending", "max_attempts")),
        *((name, None) for name in ("backoff_base", "backoff_max")),
        *((name, value) for name in ("senders", "max_pending") for value in (0, -1)),
        ("max_batch_size", 9), ("max_batch_size", 0), ("max_batch_size", -1), ("max_pending", 9),
        *(pytest.param(name, 10**400, id=f"{name}-giant") for name in TIMES),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValidationError) as raised:
        SmsProxyConfig(**settings)
    assert raised.value.field == name


def test_every_setting_has_a_test_of_wrong_values() -> None:
    assert sorted(WHOLE + TIMES) == sorted(field.name for field in dataclasses.fields(SmsProxyConfig))


# The repository in memory


def fill(repository: InMemoryRepository, count: int, status: MessageStatus | None = None, prefix: str = "m") -> None:
    for number in range(count):
        repository.save(f"{prefix}{number}")
        if status is not None:
            repository.update(f"{prefix}{number}", status)


def known(repository: InMemoryRepository, count: int, prefix: str = "m") -> int:
    return sum(repository.get(f"{prefix}{number}") is not NOT_FOUND for number in range(count))


def test_a_final_status_is_remembered_for_the_retention() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 1, DELIVERED)
    clock.now += 100
    repository.save("another")
    assert repository.get("m0") is DELIVERED


@pytest.mark.parametrize("status", sorted(FINAL_STATUSES))
def test_a_final_status_is_forgotten_after_the_retention(status: MessageStatus) -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 1, status)
    clock.now += 100.2
    repository.save("another")
    assert repository.get("m0") is NOT_FOUND


def test_an_update_forgets_as_saving_does() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    repository.save("another")
    fill(repository, 1, DELIVERED)
    clock.now += 100.2
    repository.update("another", DELIVERED)
    assert repository.get("m0") is NOT_FOUND


def test_the_retention_counts_from_the_final_status_and_not_from_acceptance() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    repository.save("m0")
    clock.now += 90
    repository.update("m0", DELIVERED)
    clock.now += 90
    repository.save("another")
    assert repository.get("m0") is DELIVERED


@pytest.mark.parametrize("status", [None, CONFIRMED])
def test_a_status_that_is_not_final_is_never_forgotten(status: MessageStatus | None) -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 10, status)
    clock.now += 1e9
    fill(repository, 100, prefix="later")
    assert known(repository, 10) == 10


def test_a_retention_of_zero_keeps_for_ever() -> None:
    clock = Clock()
    repository = InMemoryRepository(0, clock=clock)
    fill(repository, 10, DELIVERED)
    clock.now += 1e9
    fill(repository, 100, DELIVERED, prefix="later")
    assert known(repository, 10) == 10


def test_only_a_few_are_forgotten_at_a_time() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 1_000, DELIVERED)
    clock.now += 101
    repository.save("another")
    assert 990 <= known(repository, 1_000) < 1_000


def test_what_is_due_never_piles_up() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 1_000, DELIVERED)
    clock.now += 101
    fill(repository, 1_000, DELIVERED, prefix="later")
    assert (known(repository, 1_000), known(repository, 1_000, "later")) == (0, 1_000)


def test_an_id_that_was_forgotten_may_be_used_again() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 1, DELIVERED)
    clock.now += 101
    repository.save("another")
    repository.save("m0")
    assert repository.get("m0") is ACCEPTED


def test_an_id_used_again_is_remembered_for_a_retention_of_its_own() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    fill(repository, 1, DELIVERED)
    clock.now += 101
    repository.save("another")
    fill(repository, 1, FAILED)
    clock.now += 99
    fill(repository, 20, prefix="later")
    assert repository.get("m0") is FAILED


def test_a_fingerprint_is_forgotten_with_its_message() -> None:
    clock = Clock()
    repository = InMemoryRepository(100.0, clock=clock)
    repository.save("a", None, b"first")
    repository.update("a", DELIVERED)
    clock.now += 101
    repository.save("another")
    repository.save("a")
    with pytest.raises(DuplicateMessageError) as raised:
        repository.save("a")
    assert raised.value.fingerprint is None


def traced(work: Callable[[], object]) -> float:
    """The bytes that the work leaves behind."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = work()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        del kept
        return after - before
    finally:
        tracemalloc.stop()


def test_a_remembered_message_takes_220_bytes_at_most() -> None:
    count = 22_000  # just past a size at which a dict grows, where it is emptiest

    def remember() -> InMemoryRepository:
        repository = InMemoryRepository()
        for number in range(count):
            message_id = f"{number:036}"  # as long as a UUID
            repository.save(message_id, Message(NUMBER, f"{number:0200}", message_id))
            repository.update(message_id, CONFIRMED)
            repository.update(message_id, DELIVERED)
        return repository

    assert traced(remember) / count <= 220


def test_memory_does_not_grow_with_what_is_forgotten() -> None:
    def serve(rounds: int) -> float:
        def work() -> InMemoryRepository:
            clock = Clock()
            repository = InMemoryRepository(100.0, clock=clock)
            for number in range(rounds):
                clock.now += 1
                repository.save(f"{number:08}", None, b"print")
                repository.update(f"{number:08}", DELIVERED)
            return repository

        return traced(work)

    assert serve(20_000) < 2 * serve(1_000)


# Statistics


def test_without_batches_the_success_percentage_is_100() -> None:
    assert ClientStatistics().get_statistics().success_percentage == 100.0


def test_statistics_add_up_batches_messages_and_attempts() -> None:
    statistics = ClientStatistics()
    statistics.send(result(messages=10, attempt=2))
    statistics.send(result(messages=3))
    statistics.send(result(messages=5))
    statistics.send(result(FastSmsingError("busy"), messages=7, attempt=3))
    figures = statistics.get_statistics()
    assert (figures.success, figures.failed, figures.success_percentage) == (3, 1, 75.0)
    assert (figures.messages, figures.attempts, figures.last_error) == (25, 7, "FastSmsingError: busy")


def test_a_success_does_not_hide_the_last_error() -> None:
    statistics = ClientStatistics()
    for error in (FastSmsingError("first"), FastSmsingError("last"), None):
        statistics.send(result(error))
    assert statistics.get_statistics().last_error == "FastSmsingError: last"


def test_the_last_error_is_private_and_short() -> None:
    statistics = ClientStatistics()
    statistics.send(result(FastSmsingError(f"no 'a text' to {NUMBER} " + "x" * 10_000)))
    last_error = statistics.get_statistics().last_error or ""
    assert (NUMBER in last_error, "a text" in last_error, len(last_error) <= 500) == (False, False, True)


def test_statistics_that_were_read_do_not_change() -> None:
    statistics = ClientStatistics()
    before = statistics.get_statistics()
    statistics.send(result())
    assert before == Statistics()


def test_statistics_take_constant_memory() -> None:
    statistics = ClientStatistics()

    def feed(count: int) -> float:
        return traced(lambda: [None for n in range(count) if statistics.send(result(FastSmsingError(f"error {n}")))])

    feed(10)
    assert feed(2_000) < 5_000


def test_no_result_is_missed_when_many_threads_send() -> None:
    statistics, barrier = ClientStatistics(), threading.Barrier(8)

    def work() -> None:
        barrier.wait(HANG)
        for _ in range(500):
            statistics.send(result(messages=2))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert statistics.get_statistics() == Statistics(success=4_000, messages=8_000, attempts=4_000)


def test_metrics_add_up_by_name_and_label() -> None:
    metrics = Metrics()
    metrics.add("a")
    metrics.add("a", "x", 2)
    metrics.add("a", "x", 3)
    assert metrics.counts() == {("a", ""): 1, ("a", "x"): 5}


@pytest.mark.parametrize(("value", "bound"), [(0, 1), (1, 1), (1.5, 2), (1_000, 1_000), (1_001, math.inf)])
def test_a_histogram_counts_a_value_in_the_first_bucket_that_holds_it(value: float, bound: float) -> None:
    metrics = Metrics()
    metrics.observe("smsproxy_batch_messages", value)
    assert metrics.counts() == {("smsproxy_batch_messages", bound): 1, ("smsproxy_batch_messages_sum", ""): value}


# Delivery reports


def updater_of(repository: Any, *reports: Any, metrics: Metrics | None = None) -> StatusUpdater:
    """An updater that has applied these reports and ended."""
    updater = StatusUpdater(repository, metrics=metrics)
    for report in reports:
        updater.updates.put(report)
    updater.start()
    assert updater.stop(HANG)
    return updater


def errors_of(updater: StatusUpdater) -> list[StatusUpdateError]:
    return [error for error in (updater.errors.get_nowait() for _ in range(updater.errors.qsize())) if error]


def repository_of(*message_ids: str) -> InMemoryRepository:
    repository = InMemoryRepository()
    for message_id in message_ids:
        repository.save(message_id)
    return repository


def statuses(repository: InMemoryRepository, *message_ids: str) -> list[MessageStatus]:
    return [repository.get(message_id) for message_id in message_ids]


def test_reports_are_applied_in_order() -> None:
    repository = repository_of("a", "b")
    updater = updater_of(repository, {"a": "CONFIRMED", "b": "CONFIRMED"}, {"a": "DELIVERED", "b": "FAILED"})
    assert (statuses(repository, "a", "b"), errors_of(updater)) == ([DELIVERED, FAILED], [])


def test_reports_may_have_the_statuses_of_the_provider() -> None:
    repository = repository_of("a")
    updater_of(repository, {"a": fastsmsing.MessageStatus.DELIVERED})
    assert repository.get("a") is DELIVERED


def test_an_unknown_status_is_an_error_and_the_rest_of_the_mapping_is_applied() -> None:
    repository = repository_of("a", "b", "c")
    [error] = errors_of(updater_of(repository, {"a": "DELIVERED", "b": "LOST", "c": "DELIVERED"}))
    assert (type(error.error), error.message_id, error.status) == (UnknownStatusError, "b", "LOST")
    assert statuses(repository, "a", "b", "c") == [DELIVERED, ACCEPTED, DELIVERED]


def test_an_unknown_id_is_an_error_and_the_rest_of_the_mapping_is_applied() -> None:
    repository = repository_of("a", "c")
    [error] = errors_of(updater_of(repository, {"a": "DELIVERED", "b": "DELIVERED", "c": "DELIVERED"}))
    assert (type(error.error), error.message_id, error.status) == (UnknownMessageError, "b", DELIVERED)
    assert statuses(repository, "a", "b", "c") == [DELIVERED, NOT_FOUND, DELIVERED]


def test_a_refused_transition_is_an_error_and_changes_nothing() -> None:
    repository = repository_of("a", "b")
    [error] = errors_of(updater_of(repository, {"a": "DELIVERED"}, {"a": "CONFIRMED", "b": "CONFIRMED"}))
    assert (type(error.error), error.message_id, error.status) == (StatusTransitionError, "a", CONFIRMED)
    assert statuses(repository, "a", "b") == [DELIVERED, CONFIRMED]


def test_whatever_the_repository_raises_is_an_error_and_the_rest_is_applied() -> None:
    refusal = RuntimeError("disk on fire")
    repository = Refusing(b=refusal)
    for message_id in "abc":
        repository.save(message_id)
    [error] = errors_of(updater_of(repository, dict.fromkeys("abc", "DELIVERED")))
    assert (error.error, error.message_id) == (refusal, "b")
    assert statuses(repository, "a", "c") == [DELIVERED, DELIVERED]


def test_a_status_without_words_does_not_cost_the_rest_of_the_mapping() -> None:
    repository = repository_of("a", "b", "c")
    [error] = errors_of(updater_of(repository, {"a": "DELIVERED", "b": Unprintable(), "c": "DELIVERED"}))
    assert error.message_id == "b"
    assert statuses(repository, "a", "c") == [DELIVERED, DELIVERED]


@pytest.mark.parametrize("junk", [42, "DELIVERED", ["a"], object(), {"a": None}, {None: "DELIVERED"}, {}])
def test_junk_does_not_end_the_updater(junk: Any) -> None:
    repository = repository_of("b")
    updater_of(repository, junk, {"b": "DELIVERED"})
    assert repository.get("b") is DELIVERED


def test_none_ends_the_updater() -> None:
    repository = repository_of("a")
    updater = updater_of(repository, None, {"a": "DELIVERED"})
    assert (updater.dead, repository.get("a"), updater.updates.get_nowait()) == (True, ACCEPTED, {"a": "DELIVERED"})


def test_errors_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smsproxy, "ERRORS_WAITING", 3)
    updater = updater_of(InMemoryRepository(), {f"m{number}": "DELIVERED" for number in range(10)})
    assert [error.message_id for error in errors_of(updater)] == ["m7", "m8", "m9"]
    assert updater.errors_dropped == 7


def test_updates_and_errors_are_bounded() -> None:
    updater = StatusUpdater(InMemoryRepository())
    assert (updater.updates.maxsize, updater.errors.maxsize) == (smsproxy.UPDATES_WAITING, smsproxy.ERRORS_WAITING)
    assert 0 < smsproxy.ERRORS_WAITING <= smsproxy.UPDATES_WAITING


def test_an_updater_that_was_started_twice_applies_everything_once() -> None:
    repository = repository_of("a")
    updater = StatusUpdater(repository)
    updater.start()
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    assert updater.stop(HANG)
    assert (repository.get("a"), errors_of(updater)) == (DELIVERED, [])


def test_an_updater_that_was_never_started_stops_at_once() -> None:
    updater = StatusUpdater(InMemoryRepository())
    assert returned_by(lambda: updater.stop(None)) is True
    assert not updater.dead


def test_a_second_stop_of_an_updater_returns_the_same() -> None:
    updater = updater_of(InMemoryRepository())
    assert returned_by(lambda: updater.stop(None)) is True


def test_stop_tells_when_the_updater_did_not_end_in_time() -> None:
    entered, opened = threading.Event(), threading.Event()

    class Stuck(InMemoryRepository):
        def update(self, message_id: str, status: MessageStatus) -> None:
            entered.set()
            opened.wait(HANG)

    updater = StatusUpdater(Stuck())
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    try:
        assert entered.wait(HANG)
        assert returned_by(lambda: updater.stop(0.01)) is False
    finally:
        opened.set()


def test_a_mapping_is_one_group_for_a_repository_that_can() -> None:
    repository = Outbox()
    for message_id in "ab":
        repository.save(message_id)
    updater_of(repository, {"a": "DELIVERED", "b": "FAILED"})
    assert repository.groups == [{"a": DELIVERED, "b": FAILED}]


def test_a_repository_that_cannot_write_is_asked_again_until_it_can() -> None:
    repository = Outbox(RepositoryUnavailableError("disk full"))
    repository.save("a")
    applied = threading.Event()
    inner = repository.update

    def update(message_id: str, status: MessageStatus) -> None:
        inner(message_id, status)
        applied.set()

    repository.update = update  # type: ignore[method-assign]
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({"a": "DELIVERED"})
    assert applied.wait(HANG)
    assert updater.stop(HANG)
    assert (repository.get("a"), errors_of(updater)) == (DELIVERED, [])


def test_stop_ends_the_wait_for_a_repository_and_the_updates_are_errors() -> None:
    refusals = [RepositoryUnavailableError("disk full")] * 1_000
    repository = Outbox(*refusals)
    updater = StatusUpdater(repository)
    updater.start()
    updater.updates.put({"a": "DELIVERED", "b": "DELIVERED"})
    assert repository.refused.acquire(timeout=HANG)
    assert returned_by(lambda: updater.stop(HANG)) is True
    assert [(error.message_id, str(error.error)) for error in errors_of(updater)] == [
        ("a", "disk full"), ("b", "disk full"),
    ]  # fmt: skip


def test_a_group_that_fails_for_another_reason_is_an_error_for_each_of_its_updates() -> None:
    repository, refusal = Outbox(RuntimeError("a bug")), RuntimeError("a bug")
    repository.save("c")
    updater = updater_of(repository, {"a": "DELIVERED", "b": "DELIVERED"}, {"c": "DELIVERED"})
    assert [(error.message_id, str(error.error)) for error in errors_of(updater)] == [
        ("a", str(refusal)), ("b", str(refusal)),
    ]  # fmt: skip
    assert repository.get("c") is DELIVERED


def test_updates_are_counted_by_result() -> None:
    metrics, repository = Metrics(), Refusing(broken=RuntimeError("a bug"))
    for message_id in ("a", "b", "c", "broken"):
        repository.save(message_id)
    reports = {"a": "CONFIRMED", "b": "DELIVERED", "c": "FAILED", "broken": "FAILED", "x": "FAILED", "y": "LOST"}
    updater_of(repository, reports, {"b": "CONFIRMED"}, metrics=metrics)
    assert metrics.counts() == {
        ("smsproxy_status_updates_total", "applied"): 3,
        ("smsproxy_status_updates_total", "error"): 1,
        ("smsproxy_status_updates_total", "unknown_message"): 1,
        ("smsproxy_status_updates_total", "unknown_status"): 1,
        ("smsproxy_status_updates_total", "refused"): 1,
        ("smsproxy_messages_final_total", "DELIVERED"): 1,
        ("smsproxy_messages_final_total", "FAILED"): 1,
    }


# The facade: accepting


def test_a_message_goes_from_accepted_over_confirmed_to_delivered() -> None:
    seen: list[MessageStatus] = []

    class Watched(InMemoryRepository):
        def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
            super().save(message_id, message, fingerprint)
            seen.append(self.get(message_id))

        def update(self, message_id: str, status: MessageStatus) -> None:
            super().update(message_id, status)
            seen.append(self.get(message_id))

    proxy = SmsProxy(InMemoryClient(), ONE_BY_ONE, repository=Watched())
    with proxy:
        message_id = proxy.send(HELLO).id
    assert seen == [ACCEPTED, CONFIRMED, DELIVERED]
    assert proxy.get_status(message_id) is DELIVERED


def test_an_id_is_a_new_uuid4_each_time() -> None:
    with SmsProxy(Recorder()) as proxy:
        ids = [uuid.UUID(proxy.send(HELLO).id) for _ in range(100)]
    assert ({message_id.version for message_id in ids}, len(set(ids))) == ({4}, 100)


def test_an_id_that_was_never_issued_is_not_found() -> None:
    with SmsProxy(Recorder()) as proxy:
        assert proxy.get_status("never issued") is NOT_FOUND


def test_ids_may_be_generated_by_the_caller() -> None:
    provider = Recorder()
    with SmsProxy(provider, generate_id=lambda: "my-id") as proxy:
        assert proxy.send(HELLO) == SendingResult("my-id")
    assert provider.ids == ["my-id"]


def test_a_generated_id_that_exists_is_refused_and_nothing_is_sent() -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE, generate_id=lambda: "my-id") as proxy:
        proxy.send(HELLO)
        with pytest.raises(DuplicateMessageError):
            proxy.send(HELLO)
    assert provider.ids == ["my-id"]


@pytest.mark.parametrize(
    ("field", "phone_number", "text"),
    [
        ("phone_number", "", "hello"),
        ("message", NUMBER, ""),
        *(("phone_number", number, "hello") for number in (
            "+48123456789", "48 123", "48-123", " 48123", "48123\n", "48123\0", "abc", "48123a", "-1", "1.5", "٤٨١٢٣",
            "48123²", "４８１２３", "\ud800", None, 48123456789, b"48123", ["48123"],
        )),
        *(("message", NUMBER, text) for text in (None, 5, b"hello", ["hello"], {}, "lone \ud800", "\udfff")),
    ],
)  # fmt: skip
def test_a_wrong_message_is_refused_by_field_and_not_saved(field: str, phone_number: Any, text: Any) -> None:
    provider, repository = Recorder(), InMemoryRepository()
    with SmsProxy(provider, ONE_BY_ONE, repository=repository, generate_id=lambda: "my-id") as proxy:
        with pytest.raises(ValidationError) as raised:
            proxy.send(SendMessage(phone_number, text))
    assert (raised.value.field, repository.get("my-id"), provider.batches) == (field, NOT_FOUND, [])


def test_a_refusal_does_not_repeat_the_value() -> None:
    with SmsProxy(Recorder()) as proxy, pytest.raises(ValidationError) as raised:
        proxy.send(SendMessage("+48600700800", "secret"))
    assert "48600700800" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["zażółć gęślą jaźń", "😀👩‍👩‍👧‍👦", "\0", "\r\n\t", " ", "\u202e\ufeff\uffff", "𝔘" * 1_000, "e\u0301"]
)
def test_any_text_arrives_unchanged(text: str) -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE) as proxy:
        proxy.send(SendMessage("0", text))
    assert [(message.phone_number, message.message) for [message] in provider.batches] == [("0", text)]


def test_a_number_of_digits_arrives_unchanged() -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE) as proxy:
        proxy.send(SendMessage("0048123456789", "hello"))
    assert provider.batches[0][0].phone_number == "0048123456789"


def test_a_full_queue_refuses_and_does_not_save() -> None:
    ids = iter(["a", "b"])
    config = SmsProxyConfig(batch_size=1, max_pending=1)
    gate = Gate()
    with SmsProxy(gate, config, generate_id=lambda: next(ids)) as proxy:
        proxy.send(HELLO)
        with pytest.raises(OverloadedError):
            proxy.send(HELLO)
        gate.opened.set()
        assert proxy.get_status("b") is NOT_FOUND


def test_a_stopped_proxy_refuses() -> None:
    proxy = SmsProxy(Recorder())
    proxy.start()
    proxy.stop(HANG)
    with pytest.raises(ClosedError):
        proxy.send(HELLO)


def test_the_repository_decides_whether_the_proxy_is_slow_and_durable() -> None:
    for repository, expected in ((InMemoryRepository(), (False, False)), (Outbox(), (True, True))):
        proxy = SmsProxy(Recorder(), repository=repository)
        assert (proxy.slow, proxy.durable) == expected


def test_statistics_are_kept_unless_told_otherwise() -> None:
    proxy = SmsProxy(Scripted(RejectedError("no")), SmsProxyConfig(batch_size=1, senders=1))
    with proxy:
        proxy.send(HELLO)
        proxy.send(HELLO)
    assert proxy.statistics.get_statistics() == Statistics(1, 1, 2, 2, "RejectedError: no")


# The facade: idempotency keys


def test_the_same_key_with_the_same_message_is_one_message() -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE) as proxy:
        first, again = proxy.send(HELLO, "the key"), proxy.send(HELLO, "the key")
    assert (first, provider.ids) == (again, [first.id])


def test_an_id_of_a_key_is_a_uuid4() -> None:
    with SmsProxy(Recorder()) as proxy:
        assert uuid.UUID(proxy.send(HELLO, "the key").id).version == 4


def test_another_key_is_another_message() -> None:
    provider = Recorder()
    with SmsProxy(provider) as proxy:
        ids = [proxy.send(HELLO, key).id for key in ("a", "b")]
    assert sorted(provider.ids) == sorted(set(ids))
    assert len(ids) == len(provider.ids)


@pytest.mark.parametrize(
    "other", [SendMessage(NUMBER, "bye"), SendMessage("1", "hello"), SendMessage(NUMBER, "hello ")]
)
def test_the_same_key_with_another_message_is_refused(other: SendMessage) -> None:
    provider = Recorder()
    with SmsProxy(provider) as proxy:
        proxy.send(HELLO, "the key")
        with pytest.raises(IdempotencyError):
            proxy.send(other, "the key")
    assert len(provider.ids) == 1


def test_number_and_text_cannot_be_shifted_into_each_other() -> None:
    with SmsProxy(Recorder()) as proxy:
        proxy.send(SendMessage("12", "3"), "the key")
        with pytest.raises(IdempotencyError):
            proxy.send(SendMessage("1", "23"), "the key")


def test_a_repeat_after_the_end_of_a_message_gets_the_same_id() -> None:
    with SmsProxy(Scripted(RejectedError("no")), ONE_BY_ONE) as proxy:
        first = proxy.send(HELLO, "the key")
        assert proxy.send(HELLO, "the key") == first


def test_a_wrong_message_does_not_use_up_its_key() -> None:
    with SmsProxy(Recorder()) as proxy:
        with pytest.raises(ValidationError):
            proxy.send(SendMessage("+1", "hello"), "the key")
        assert proxy.get_status(proxy.send(HELLO, "the key").id) is ACCEPTED


def test_an_overload_does_not_use_up_a_key() -> None:
    gate = Gate()
    with SmsProxy(gate, SmsProxyConfig(batch_size=1, max_pending=1, senders=1)) as proxy:
        proxy.send(HELLO)
        with pytest.raises(OverloadedError):
            proxy.send(HELLO, "the key")
        gate.opened.set()
        gate.wait_for(lambda batches: len(batches) == 1)
    assert len(gate.ids) == 1


@pytest.mark.parametrize("make", [InMemoryRepository, Outbox])
@pytest.mark.parametrize("together", [1, 10, 50])
def test_one_key_from_many_threads_is_one_message(make: Callable[[], Repository], together: int) -> None:
    provider, barrier = Recorder(), threading.Barrier(8)
    answers: queue.Queue[Any] = queue.Queue()
    with SmsProxy(provider, ONE_BY_ONE, repository=make()) as proxy:

        def work() -> None:
            barrier.wait(HANG)
            for start in range(0, 50, together):
                keys = [f"key {number}" for number in range(start, start + together)]
                for answer in proxy.send_all([(HELLO.phone_number, HELLO.message, key) for key in keys]):
                    answers.put(answer)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
    ids = Counter(answers.queue)
    assert (set(ids.values()), len(ids)) == ({8}, 50)
    assert sorted(provider.ids) == sorted(ids)


# The facade: accepting many at once


WRONG = SendMessage("+1", "hello")
BYE = SendMessage(NUMBER, "bye")


def together(proxy: SmsProxy, *messages: SendMessage | tuple[SendMessage, str]) -> list[Any]:
    """What `send_all` returns, the type alone of what was refused."""
    pairs = [message if isinstance(message, tuple) else (message, None) for message in messages]
    items = [(message.phone_number, message.message, key) for message, key in pairs]
    return [each if isinstance(each, str) else type(each) for each in proxy.send_all(items)]


def test_each_of_a_group_is_told_its_id_in_order() -> None:
    provider = Recorder()
    texts = [f"text {number}" for number in range(25)]
    with SmsProxy(provider, SmsProxyConfig(batch_size=4, senders=1)) as proxy:
        results = together(proxy, *(SendMessage(NUMBER, text) for text in texts))
    assert [(message.message_id, message.message) for batch in provider.batches for message in batch] == [
        (result, text) for result, text in zip(results, texts)
    ]


def test_a_group_is_accepted_and_queued_when_send_all_returns() -> None:
    with SmsProxy(Recorder(), LINGERING) as proxy:
        ids = together(proxy, HELLO, HELLO, (HELLO, "the key"))
        assert proxy.gauges()["smsproxy_messages_accepted_total"] == 3
        assert [proxy.get_status(message_id) for message_id in ids] == [ACCEPTED] * 3


def test_a_group_is_saved_as_one() -> None:
    repository = Grouping()
    with SmsProxy(Recorder(), repository=repository) as proxy:
        ids = together(proxy, HELLO, (HELLO, "the key"), HELLO)
    assert repository.groups == [ids]


def test_a_group_of_none_is_no_error() -> None:
    with SmsProxy(Recorder()) as proxy:
        assert proxy.send_all([]) == []


def test_a_wrong_message_costs_the_others_of_its_group_nothing() -> None:
    provider = Recorder()
    with SmsProxy(provider, SmsProxyConfig(batch_size=3, senders=1)) as proxy:
        results = together(proxy, HELLO, WRONG, (HELLO, "the key"), (WRONG, "the key"), BYE)
    assert (results[1], results[3]) == (ValidationError, ValidationError)
    assert provider.ids == [results[place] for place in (0, 2, 4)]


def test_with_room_for_some_of_a_group_the_first_valid_ones_are_accepted() -> None:
    gate = Gate()
    with SmsProxy(gate, SmsProxyConfig(batch_size=1, max_pending=2, senders=1)) as proxy:
        results = together(proxy, WRONG, HELLO, WRONG, HELLO, BYE, (BYE, "the key"))
        gate.opened.set()
    assert [results[place] for place in (0, 2, 4, 5)] == [ValidationError] * 2 + [OverloadedError] * 2
    assert gate.ids == [results[1], results[3]]


def test_a_stopped_proxy_refuses_each_of_a_group() -> None:
    proxy = SmsProxy(Recorder())
    proxy.stop(HANG)
    assert together(proxy, HELLO, WRONG, (HELLO, "the key")) == [ClosedError, ValidationError, ClosedError]


def test_a_durable_proxy_refuses_each_of_a_group_before_its_start() -> None:
    repository = Outbox()
    proxy = SmsProxy(Recorder(), repository=repository)
    assert together(proxy, HELLO, WRONG, (HELLO, "the key")) == [ClosedError, ValidationError, ClosedError]
    proxy.stop(HANG)
    assert repository.waiting == {}


@pytest.mark.parametrize("error", [RepositoryUnavailableError("disk full"), RuntimeError("broken")])
def test_a_group_that_cannot_be_saved_is_refused_and_sends_nothing(error: Exception) -> None:
    class Broken(Grouping):
        def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
            raise error

    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE, repository=Broken()) as proxy:
        assert together(proxy, HELLO, WRONG, (HELLO, "the key")) == [type(error), ValidationError, type(error)]
        assert proxy.gauges()["smsproxy_pending_messages"] == 0
    assert provider.batches == []


def test_what_saving_raises_for_one_of_a_group_is_told_to_that_one() -> None:
    class Choosy(InMemoryRepository):
        def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
            if message is not None and message.message == "bye":
                raise RepositoryUnavailableError("not this one")
            super().save(message_id, message, fingerprint)

    provider = Recorder()
    with SmsProxy(provider, SmsProxyConfig(batch_size=2, senders=1), repository=Choosy()) as proxy:
        first, refused, last = together(proxy, HELLO, BYE, HELLO)
    assert (provider.ids, refused) == ([first, last], RepositoryUnavailableError)


@pytest.mark.parametrize("make", [InMemoryRepository, Outbox, Grouping])
def test_a_key_repeated_in_a_group_gets_the_same_id_and_is_sent_once(make: Callable[[], Repository]) -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE, repository=make()) as proxy:
        first, again, other = together(proxy, (HELLO, "the key"), (HELLO, "the key"), (HELLO, "another key"))
        assert together(proxy, (HELLO, "another key"), (HELLO, "the key")) == [other, first]
    assert (again, sorted(provider.ids)) == (first, sorted([first, other]))


@pytest.mark.parametrize("make", [InMemoryRepository, Outbox, Grouping])
def test_another_message_under_a_key_of_the_same_group_is_refused(make: Callable[[], Repository]) -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE, repository=make()) as proxy:
        first, refused, again = together(proxy, (HELLO, "the key"), (BYE, "the key"), (HELLO, "the key"))
    assert (refused, again, provider.ids) == (IdempotencyError, first, [first])


def test_an_id_is_generated_for_each_message_without_a_key_and_for_no_other() -> None:
    ids = iter(["a", "b", "c"])
    with SmsProxy(Recorder(), generate_id=lambda: next(ids)) as proxy:
        results = together(proxy, HELLO, (HELLO, "the key"), WRONG, HELLO)
        assert [results[0], results[3], proxy.send(HELLO).id] == ["a", "b", "c"]


def test_an_id_generated_twice_in_a_group_is_refused_the_second_time() -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE, generate_id=lambda: "my-id") as proxy:
        assert together(proxy, HELLO, HELLO) == ["my-id", DuplicateMessageError]
    assert provider.ids == ["my-id"]


def test_an_id_that_cannot_be_generated_costs_only_its_message() -> None:
    script: list[Any] = ["a", RuntimeError("out of IDs"), "b"]

    def generate() -> str:
        following = script.pop(0)
        if isinstance(following, Exception):
            raise following
        return str(following)

    with SmsProxy(Recorder(), generate_id=generate) as proxy:
        assert together(proxy, HELLO, HELLO, HELLO) == ["a", RuntimeError, "b"]


def test_the_ids_of_a_group_are_different_uuid4s() -> None:
    with SmsProxy(Recorder()) as proxy:
        ids = together(proxy, *[HELLO] * 100, *((HELLO, f"key {n}") for n in range(100)))
    found = [uuid.UUID(each) for each in ids]
    assert {(each.version, each.variant) for each in found} == {(4, uuid.RFC_4122)}
    assert ([str(each) for each in found], len(set(ids))) == (ids, 200)


def test_the_random_bits_of_ids_come_from_the_system_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = random.Random(7).randbytes(16 * 300), list[int]()

    def urandom(size: int) -> bytes:
        asked.append(size)
        return data[:size]

    with SmsProxy(Recorder()) as proxy:
        with monkeypatch.context() as patch:
            patch.setattr("os.urandom", urandom)
            ids = together(proxy, *[HELLO] * 300)
    assert (asked, len(set(ids))) == ([len(data)], 300)
    assert ids == [str(uuid.UUID(bytes=data[at : at + 16], version=4)) for at in range(0, len(data), 16)]


# The facade: start and stop


def test_a_proxy_may_be_started_twice() -> None:
    repository, provider = Outbox(), Recorder()
    repository.save("a", Message(NUMBER, "hello", "a"))
    with SmsProxy(provider, repository=repository) as proxy:
        proxy.start()
    assert provider.ids == ["a"]


def test_a_proxy_may_be_stopped_twice() -> None:
    proxy = SmsProxy(InMemoryClient(), ONE_BY_ONE)
    proxy.start()
    proxy.send(HELLO)
    assert [returned_by(proxy.stop), returned_by(proxy.stop)] == [0, 0]


def test_a_second_stop_after_one_that_left_messages_returns_the_same(no_grace: None) -> None:
    gate = Gate()
    proxy = SmsProxy(gate, ONE_BY_ONE)
    try:
        proxy.start()
        proxy.send(HELLO)
        gate.wait_entered()
        assert [returned_by(lambda: proxy.stop(0.0)), returned_by(lambda: proxy.stop(None))] == [1, 1]
    finally:
        gate.opened.set()


def test_a_proxy_that_was_never_started_may_be_stopped() -> None:
    provider = Recorder()
    assert returned_by(SmsProxy(provider).stop) == 0
    assert provider.stopped.is_set()


def test_a_proxy_that_was_never_started_sends_what_it_accepted() -> None:
    provider = Recorder()
    proxy = SmsProxy(provider, LINGERING)
    proxy.send(HELLO)
    assert (returned_by(proxy.stop), len(provider.ids)) == (0, 1)


def test_the_end_of_the_block_drains() -> None:
    provider = Recorder()
    with SmsProxy(provider, LINGERING) as proxy:
        ids = [proxy.send(HELLO).id for _ in range(5)]
    assert provider.ids == ids


def test_reports_that_came_before_the_end_are_applied() -> None:
    provider = Recorder()
    with SmsProxy(provider, LINGERING) as proxy:
        ids = [proxy.send(HELLO).id for _ in range(500)]
        for message_id in ids:
            provider.report({message_id: "CONFIRMED"})
            provider.report({message_id: "DELIVERED"})
    assert Counter(map(proxy.get_status, ids)) == {DELIVERED: 500}


def test_reports_on_the_batches_of_the_drain_are_applied() -> None:
    proxy = SmsProxy(InMemoryClient(), LINGERING)
    with proxy:
        ids = [proxy.send(HELLO).id for _ in range(250)]
    assert Counter(map(proxy.get_status, ids)) == {DELIVERED: 250}


def test_the_provider_is_stopped_after_the_last_batch() -> None:
    order: list[str] = []

    class Ordered(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            order.append("send")
            super().send(messages)

        def stop(self) -> None:
            order.append("stop")
            super().stop()

    with SmsProxy(Ordered(), LINGERING) as proxy:
        proxy.send(HELLO)
    assert order == ["send", "stop"]


def test_stop_tells_how_many_messages_a_hanging_provider_left(no_grace: None) -> None:
    gate = Gate()
    proxy = SmsProxy(gate, SmsProxyConfig(batch_size=2, senders=1))
    try:
        proxy.start()
        for _ in range(3):
            proxy.send(HELLO)
        assert returned_by(lambda: proxy.stop(0.01)) == 3
    finally:
        gate.opened.set()


def test_a_provider_whose_stop_hangs_does_not_hold_up_the_end(no_grace: None) -> None:
    opened = threading.Event()

    class Hanging(Recorder):
        def stop(self) -> None:
            opened.wait(HANG)

    provider = Hanging()
    proxy = SmsProxy(provider, ONE_BY_ONE)
    try:
        proxy.start()
        message_id = proxy.send(HELLO).id
        provider.report({message_id: "DELIVERED"})
        assert returned_by(lambda: proxy.stop(0.01)) == 0
        assert proxy.get_status(message_id) is DELIVERED
    finally:
        opened.set()


def test_a_provider_whose_stop_raises_is_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Recorder):
        def stop(self) -> None:
            raise RuntimeError("cannot stop")

    provider = Raising()
    proxy = SmsProxy(provider, ONE_BY_ONE)
    proxy.start()
    message_id = proxy.send(HELLO).id
    provider.report({message_id: "DELIVERED"})
    assert returned_by(proxy.stop) == 0
    assert proxy.get_status(message_id) is DELIVERED
    assert "cannot stop" in caplog.text


def test_a_provider_that_ends_its_reports_early_does_not_end_the_sending() -> None:
    provider = Recorder()
    with SmsProxy(provider, ONE_BY_ONE) as proxy:
        provider.report(None)  # type: ignore[arg-type]
        message_id = proxy.send(HELLO).id
    assert provider.ids == [message_id]


def test_a_subscriber_that_raises_does_not_end_the_sending() -> None:
    class Full(queue.Queue[Mapping[str, object] | None]):
        def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
            raise RuntimeError("a broken subscriber")

    client = InMemoryClient()
    proxy = SmsProxy(client, SmsProxyConfig(batch_size=1, senders=1, max_attempts=1))
    client.subscribe(Full())
    with proxy:
        ids = [proxy.send(HELLO).id for _ in range(3)]
        assert proxy.health() == []
        client._subscribers.pop()  # so that the end is an orderly one
    assert [proxy.get_status(message_id) in FINAL_STATUSES for message_id in ids] == [True] * 3


def test_failed_updates_are_logged_by_id(caplog: pytest.LogCaptureFixture) -> None:
    provider = Recorder()
    with SmsProxy(provider):
        provider.report({"the-id": "DELIVERED", "another-id": "LOST"})
    assert "the-id" in caplog.text and "another-id" in caplog.text and "LOST" in caplog.text


def test_a_giant_status_is_logged_in_short(caplog: pytest.LogCaptureFixture) -> None:
    provider = Recorder()
    with SmsProxy(provider):
        provider.report({"the-id": "x" * 1_000_000})
    assert "the-id" in caplog.text
    assert len(caplog.text) < 10_000


def test_a_busy_run_logs_neither_numbers_nor_texts(caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(1)

    class Talkative(InMemoryClient):
        def send(self, messages: Sequence[Message]) -> None:
            if rng.random() < 0.5:
                said = [(message.phone_number, message.message) for message in messages]
                raise rng.choice([FastSmsingError, RejectedError, ValueError])(f"cannot send {said}")
            super().send(messages)

    messages = [SendMessage(f"4860070{number:04}", f"code {rng.randrange(10**9, 10**10)}") for number in range(300)]
    config = SmsProxyConfig(batch_size=7, max_delay=0, backoff_base=0)
    with caplog.at_level(logging.DEBUG), SmsProxy(Talkative(undelivered_rate=0.3, rng=rng), config) as proxy:
        for number, message in enumerate(messages):
            proxy.send(message, f"key {number}" if number % 3 else None)
    secrets = [secret for message in messages for secret in (message.phone_number, message.message)]
    assert "gave up" in caplog.text and "handed over" in caplog.text
    assert [secret for secret in secrets if secret in caplog.text] == []


def test_a_report_received_before_the_provider_refused_is_not_overtaken_by_giving_up() -> None:
    class Slow(InMemoryRepository):
        def __init__(self) -> None:
            super().__init__()
            self.gave_up = threading.Event()

        def update(self, message_id: str, status: MessageStatus) -> None:
            if status is FAILED:
                self.gave_up.set()
            elif status is DELIVERED:
                self.gave_up.wait(0.05)  # long enough for whoever does not wait for this report
            super().update(message_id, status)

    class Late(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            self.report({messages[0].message_id: "DELIVERED"})
            raise RejectedError("answered too late")

    with SmsProxy(Late(), ONE_BY_ONE, repository=Slow()) as proxy:
        message_id = proxy.send(HELLO).id
    assert proxy.get_status(message_id) is DELIVERED


def test_giving_up_does_not_wait_for_an_updater_that_hangs(no_grace: None) -> None:
    entered, opened = threading.Event(), threading.Event()

    class Stuck(InMemoryRepository):
        def update(self, message_id: str, status: MessageStatus) -> None:
            if status is DELIVERED:
                entered.set()
                opened.wait(HANG)
            super().update(message_id, status)

    results: queue.Queue[ClientResult] = queue.Queue()

    class Sink:
        def send(self, result: ClientResult) -> None:
            results.put(result)

    provider = Scripted(RejectedError("no"))
    proxy = SmsProxy(provider, ONE_BY_ONE, repository=Stuck(), statistics=Sink())
    try:
        proxy.start()
        provider.report({"another": "DELIVERED"})
        assert entered.wait(HANG)
        message_id = proxy.send(HELLO).id
        results.get(timeout=HANG)
        assert proxy.get_status(message_id) is FAILED
    finally:
        opened.set()
        proxy.stop(HANG)


# The facade: durable


def test_a_start_sends_what_an_earlier_process_left_in_order() -> None:
    repository, provider = Outbox(), Recorder()
    ids = [f"m{number}" for number in range(25)]
    for message_id in ids:
        repository.save(message_id, Message(NUMBER, "hello", message_id))
    with SmsProxy(provider, SmsProxyConfig(batch_size=4, senders=1, max_pending=4), repository=repository):
        pass
    assert (provider.ids, repository.waiting) == (ids, {})


def test_what_one_process_left_the_next_one_sends(no_grace: None) -> None:
    repository = Outbox()
    config = SmsProxyConfig(batch_size=9, max_delay=None, max_attempts=1)
    first = SmsProxy(Scripted(FastSmsingError("down")), config, repository=repository)
    first.start()
    message_id = first.send(HELLO).id
    assert returned_by(first.stop) == 1
    provider = Recorder()
    with SmsProxy(provider, config, repository=repository):
        pass
    assert (provider.ids, repository.waiting) == ([message_id], {})


def test_what_has_grown_too_old_in_the_outbox_is_failed_and_not_sent() -> None:
    repository, provider = Outbox(), Recorder()
    for message_id, age in (("old", 100), ("young", 10)):
        message = Message(NUMBER, "hello", message_id)
        repository.save(message_id, message)
        repository.waiting[message_id] = (time.time() - age, message)
    with SmsProxy(provider, SmsProxyConfig(batch_size=1, max_age=50), repository=repository) as proxy:
        pass
    assert (provider.ids, proxy.get_status("old")) == (["young"], FAILED)


def test_a_message_before_the_start_is_refused_or_sent_once() -> None:
    provider, accepted = Recorder(), list[str]()
    proxy = SmsProxy(provider, LINGERING, repository=Outbox())
    with contextlib.suppress(SmsProxyError):
        accepted.append(proxy.send(HELLO).id)
    proxy.start()
    proxy.stop(HANG)
    assert provider.ids == accepted


def test_updates_can_be_joined_until_they_are_applied() -> None:
    repository = InMemoryRepository()
    repository.save("a")
    updater = StatusUpdater(repository)
    updater.updates.put({"a": "CONFIRMED"})
    updater.updates.put({"a": "DELIVERED"})
    updater.start()
    updater.updates.join()
    assert repository.get("a") is DELIVERED
    assert updater.stop(HANG)


# The facade: health


def test_a_proxy_at_work_is_healthy() -> None:
    with SmsProxy(Recorder()) as proxy:
        proxy.send(HELLO)
        assert proxy.health() == []


def test_a_stopped_proxy_says_only_that_it_is_shutting_down() -> None:
    proxy = SmsProxy(Recorder())
    proxy.start()
    proxy.stop(HANG)
    assert proxy.health() == ["shutting down"]


def test_an_updater_that_ended_early_is_unhealthy() -> None:
    provider = Recorder()
    others = set(threading.enumerate())
    with SmsProxy(provider) as proxy:
        provider.report(None)  # type: ignore[arg-type]
        [updater] = [thread for thread in set(threading.enumerate()) - others if thread.name == "smsproxy-updater-1"]
        updater.join(HANG)
        assert proxy.health() == ["the status updater is dead"]


def test_a_repository_that_cannot_write_is_unhealthy() -> None:
    class Checked(InMemoryRepository):
        def check(self) -> None:
            raise RepositoryUnavailableError("the database cannot be written: disk full")

    with SmsProxy(Recorder(), repository=Checked()) as proxy:
        assert proxy.health() == ["the database cannot be written: disk full"]


def test_a_repository_that_can_write_is_healthy() -> None:
    class Checked(InMemoryRepository):
        def check(self) -> None:
            return None

    with SmsProxy(Recorder(), repository=Checked()) as proxy:
        assert proxy.health() == []


def test_gauges_are_those_of_the_batching() -> None:
    gate = Gate()
    with SmsProxy(gate, LINGERING) as proxy:
        proxy.send(HELLO)
        gauges = proxy.gauges()
        gate.opened.set()
    assert (gauges["smsproxy_pending_messages"], gauges["smsproxy_messages_accepted_total"]) == (1, 1)

"""The domain's values, IDs, figures and logs, and the facade."""
from __future__ import annotations

import dataclasses
import logging
import math
import threading
import uuid
from typing import Any
from unittest import mock

import pytest

import fastsmsing
import message_ids
import worker_threads
from fastsmsing import FastSmsingError, RejectedError
from helpers import HANG, Clock, every_thread_ends, returned_by, together
from providers import Gate, Gossip, Recorder, Scripted
from smsproxy import (
    FAMILIES, FINAL_STATUSES, TRANSITIONS, Batch, ClientResult, ClientStatistics, ClosedError, DuplicateMessageError,
    Entry, IdempotencyError, Incident, InMemoryRepository, MessageStatus, Metrics, OverloadedError, Reason,
    RepositoryUnavailableError, SendMessage, SmsProxy, SmsProxyConfig, Statistics, UnknownStatusError, ValidationError,
    describe, map_to_internal_status,
)  # fmt: skip

__all__ = ["every_thread_ends"]  # a fixture

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
NUMBER = "48123456789"
HELLO = SendMessage(NUMBER, "hello")
ONE_BY_ONE = SmsProxyConfig(batch_size=1)
LINGERING = SmsProxyConfig(max_delay=None)
UPDATES = "smsproxy_status_updates_total"


# Statuses, values, IDs


def test_the_transitions_are_total_and_those_of_the_contract() -> None:
    assert TRANSITIONS == {
        ACCEPTED: {CONFIRMED, FAILED, DELIVERED}, CONFIRMED: {FAILED, DELIVERED},
        NOT_FOUND: set(), FAILED: set(), DELIVERED: set(),
    }  # fmt: skip
    assert FINAL_STATUSES == {FAILED, DELIVERED}


@pytest.mark.parametrize("status", [*fastsmsing.MessageStatus, "CONFIRMED", "FAILED", "DELIVERED"])
def test_a_status_of_the_provider_is_mapped_as_a_member_and_as_a_string(status: str) -> None:
    assert map_to_internal_status(status) is MessageStatus(status)


UNKNOWN: list[tuple[object, str]] = [  # and what is said of it: a word that looks like a status is named
    ("ACCEPTED", "ACCEPTED"), ("LOST", "LOST"), (f"lost {NUMBER}", "str"), ("X" * 31, "str"), ("", "str"),
    ("confirmed", "str"), (None, "NoneType"), (1, "int"), (b"FAILED", "bytes"), (["FAILED"], "list"), ({}, "dict"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said"), UNKNOWN)
def test_any_other_status_is_unknown_and_named_only_if_it_looks_like_one(status: object, said: str) -> None:
    with pytest.raises(UnknownStatusError, match=f"^unknown status {said}$"):
        map_to_internal_status(status)


def test_values_are_frozen_and_slotted_and_no_repr_shows_a_number_or_a_text() -> None:
    entry = Entry(HELLO.to_message("a"), b"fingerprint")
    result = ClientResult((entry.message,), None, 1, None)
    for value in (HELLO, Batch((entry,)), result, SmsProxyConfig(), Statistics()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)
        assert (hasattr(value, "__dict__"), NUMBER in repr(value), "hello" in repr(value)) == (False, False, False)


@pytest.mark.parametrize("number", ["0", "1" * 15])
@pytest.mark.parametrize("text", ["x", " ", "\0", "\U0001f4e6" * 1600])
def test_a_message_within_the_limits_is_valid(number: str, text: str) -> None:
    SendMessage(number, text).validate()


BAD: dict[str, list[Any]] = {
    "phone_number": ["", "1" * 16, "+48123", "48 123", "1-2", "1\n", "\u0661", "\u00b2", "a", None, 48, b"48", ["1"]],
    "message": ["", "x" * 1601, "a\ud800b", "\udfff", None, 1, b"hello", ["a"]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
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
    assert [field.name for field in dataclasses.fields(SmsProxyConfig)] == list(WRONG), "every setting is here"


@pytest.mark.parametrize("value", [1, 0, -1, -1000])
def test_a_batch_size_and_attempts_below_one_count_as_one_and_some_settings_may_be_none(value: int) -> None:
    config = SmsProxyConfig(batch_size=value, max_attempts=value, max_delay=None, max_age=None)
    assert (config.batch_size, config.max_attempts, config.max_delay, config.max_age) == (1, 1, None, None)
    assert SmsProxyConfig(max_attempts=None).max_attempts is None


def id_of(key: str | None = None) -> str:
    return SmsProxy(Recorder()).entry(HELLO, key).message.message_id


@pytest.mark.parametrize(("key", "version"), [(None, 7), ("a key", 8)])
def test_an_id_is_a_uuid_of_its_version(key: str | None, version: int) -> None:
    for number in range(200):  # the variant's digit differs
        message_id = id_of(key and f"{key} {number}")
        parsed = uuid.UUID(message_id)
        assert (str(parsed), parsed.version, parsed.variant) == (message_id, version, uuid.RFC_4122)


def test_an_id_begins_with_the_time_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, new_id = [], message_ids.NewIds()
    for now in (1, 1_764_000_000_123, 2**48 - 1):
        monkeypatch.setattr("time.time_ns", lambda: now * 1_000_000 + 999_999)  # noqa: B023
        ids.append(new_id())
        assert message_ids.time_of(ids[-1]) == now / 1000
    assert ids == sorted(ids)


@pytest.mark.parametrize("other", ["", "m1", "x" * 36, "xxxxxxxx-xxxx-7xxx-8xxx-xxxxxxxxxxxx", "\ud800" * 36])
def test_an_id_of_another_kind_tells_no_time(other: str) -> None:
    assert message_ids.time_of(other) is message_ids.time_of(id_of("a key")) is None


def test_any_string_can_be_a_key() -> None:
    with SmsProxy(Recorder()) as proxy:
        first, again = (proxy.send(HELLO, "\ud800") for _ in range(2))
    assert first == again


def test_no_two_ids_are_the_same_but_those_of_one_key() -> None:
    proxy = SmsProxy(Recorder())
    assert len({proxy.entry(HELLO).message.message_id for _ in range(2_000)}) == 2_000
    assert id_of("a key") == id_of("a key") != id_of("a key ")


# Errors and figures


class Odd(Exception):
    """An error that can have any attributes."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError(NUMBER)

    __repr__ = __str__
    errno = retry_after = property(__str__)


class Argless(FastSmsingError):
    def __init__(self, *args: object) -> None:
        """Forgets its base class."""

    args = property(Mute.__str__)


def having(error: Exception, **attributes: object) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *[(ValueError(*args), "ValueError") for args in ((), (NUMBER,), (int(NUMBER),), (True,), (NUMBER, 112))],
        (ValueError(503, NUMBER), "ValueError 503"),
        (OSError(28, NUMBER, NUMBER), "OSError 28"),
        *[(having(Odd(NUMBER), **{name: 7}), "Odd 7") for name in ("errno", "code", "status")],
        (having(Odd(), code=int(NUMBER), status=NUMBER, errno=[NUMBER]), "Odd"),
        (having(Odd(), code=-1, status=1000, errno=0), "Odd"),
        (Mute(NUMBER), "Mute"),
        (Argless(NUMBER), "Argless"),
        (having(FastSmsingError(NUMBER), __cause__=TimeoutError(NUMBER)), "FastSmsingError from TimeoutError"),
        (SystemExit(3), "SystemExit 3"),
    ],
)  # fmt: skip
def test_an_error_is_described_by_type_number_and_cause_and_never_by_its_text(
    error: BaseException, expected: str
) -> None:
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


def test_every_series_is_there_from_the_start_at_0_and_counts_by_label() -> None:
    metrics = Metrics()
    rows = metrics.rows()
    assert set(rows) == {(each.name, value) for each in FAMILIES if each.kind != "gauge" for value in each.values}
    assert {figure for row in rows.values() for figure in row} == {0.0}
    for label, count in (("applied", 2), ("applied", 1), ("refused", 1)):
        metrics.add(UPDATES, label, count)
    assert (metrics.rows()[UPDATES, "applied"], metrics.total(UPDATES)) == ([3.0], 4.0)


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (1, 0), (1.5, 1), (2, 1), (1000, 9), (1000.5, 10), (1e9, 10)])
def test_a_value_counts_in_the_first_bucket_that_holds_it_and_in_the_sum(value: float, bucket: int) -> None:
    metrics = Metrics()
    metrics.observe("smsproxy_batch_messages", [value, value])
    *counts, total = metrics.rows()["smsproxy_batch_messages", ""]
    assert (counts, total) == ([2.0 if each == bucket else 0.0 for each in range(11)], 2 * value)


def result(error: BaseException | None = None, messages: int = 1, attempt: int = 1) -> ClientResult:
    return ClientResult(tuple(HELLO.to_message(f"m{number}") for number in range(messages)), error, attempt, 3)


def test_statistics_add_up_batches_messages_and_attempts_from_many_threads() -> None:
    statistics = ClientStatistics()
    before = statistics.get_statistics()
    results = result(messages=10), result(RejectedError(NUMBER), 5, 3), result(attempt=2), result()
    together(8, lambda _: [*map(statistics.send, results * 100)])
    after = statistics.get_statistics()
    assert (before, before.success_percentage) == (Statistics(), 100.0)
    assert (after, after.success_percentage) == (Statistics(2_400, 800, 13_600, 5_600, "RejectedError"), 75.0)


# The facade, and its health


def test_a_message_goes_from_accepted_to_delivered() -> None:
    with SmsProxy(provider := Recorder(), ONE_BY_ONE) as proxy:
        message_id = proxy.send(HELLO).id
        assert (proxy.get_status(message_id), proxy.get_status("another")) == (ACCEPTED, NOT_FOUND)
        provider.wait_for(lambda batches: len(batches) == 1)
        provider.report({message_id: "CONFIRMED"})
        provider.report({message_id: "DELIVERED"})
    assert (proxy.get_status(message_id), provider.batches) == (DELIVERED, [[HELLO.to_message(message_id)]])


def test_a_message_given_up_says_why() -> None:
    with SmsProxy(Scripted(RejectedError()), ONE_BY_ONE) as proxy:
        message_id = proxy.send(HELLO).id
    assert (proxy.get_status(message_id), proxy.get_reason(message_id)) == (FAILED, Reason.REJECTED)


CARELESS = [Mute(), Argless(), KeyboardInterrupt(), SystemExit(), *[
    FastSmsingError("busy", retry_after=wait) for wait in (None, "0", math.nan)]]  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("error", CARELESS, ids=lambda error: type(error).__name__)
def test_a_batch_survives_whatever_its_first_request_raises(error: BaseException) -> None:
    provider = Scripted(error)
    with SmsProxy(provider, SmsProxyConfig(batch_size=1, backoff_base=0)) as proxy:
        message_id = proxy.send(HELLO).id
        provider.wait_for(lambda batches: len(batches) == 1)
    assert provider.ids == [message_id]


def test_each_of_a_group_is_accepted_or_refused_by_itself_in_order() -> None:
    ids = iter(["a", "a", "b", "c"])
    proxy = SmsProxy(Recorder(), SmsProxyConfig(batch_size=2, max_pending=2), generate_id=ids.__next__)
    errors = proxy.accept_all([proxy.entry(HELLO) for _ in range(4)])
    assert [type(error) for error in errors] == [type(None), DuplicateMessageError, type(None), OverloadedError]
    assert proxy.accept_all([]) == []


def test_one_key_is_one_message_also_from_many_threads_for_as_long_as_it_is_remembered() -> None:
    provider, ids = Recorder(), set[str]()
    with SmsProxy(provider, ONE_BY_ONE) as proxy:
        together(20, lambda _: ids.add(proxy.send(HELLO, "key").id))
        provider.wait_for(lambda batches: len(batches) == 1)
        provider.report(dict.fromkeys(ids, "DELIVERED"))
        returned_by(provider.subscribers[0].join)
        ids.add(proxy.send(HELLO, "key").id)
    assert [*ids] == provider.ids


@pytest.mark.parametrize("other", [(NUMBER, "bye"), ("1", "hello"), (NUMBER[:-1], f"{NUMBER[-1]}hello")])
def test_the_same_key_with_another_message_is_refused(other: tuple[str, str]) -> None:
    proxy = SmsProxy(Recorder())
    proxy.send(HELLO, "key")
    with pytest.raises(IdempotencyError):
        proxy.send(SendMessage(*other), "key")


def test_neither_a_wrong_message_nor_a_full_queue_uses_up_a_key_and_a_repeat_needs_no_room() -> None:
    proxy = SmsProxy(Recorder(), SmsProxyConfig(batch_size=1, max_pending=1))
    with pytest.raises(ValidationError, match="message"):
        proxy.send(SendMessage(NUMBER, ""), "key")
    first = proxy.send(HELLO, "key")
    with pytest.raises(OverloadedError):
        proxy.send(HELLO, "key 2")
    assert (proxy.send(HELLO, "key"), proxy.get_status(id_of("key 2"))) == (first, NOT_FOUND)


def test_messages_accepted_before_the_start_are_sent_after_it() -> None:
    provider = Recorder()
    proxy = SmsProxy(provider, ONE_BY_ONE)
    message_id = proxy.send(HELLO).id
    assert provider.batches == []
    with proxy:
        proxy.start()  # a second start changes nothing
    assert provider.ids == [message_id]


def test_the_end_of_the_block_drains_and_applies_the_reports_on_it_and_stops_the_provider_last() -> None:
    class Late(Recorder):
        def stop(self) -> None:
            self.report(dict.fromkeys(self.ids, "DELIVERED"))
            super().stop()

    with SmsProxy(provider := Late(), LINGERING) as proxy:
        ids = [proxy.send(HELLO).id for _ in range(250)]
    assert {proxy.get_status(each) for each in ids} == {DELIVERED}
    assert [len(batch) for batch in provider.batches] == [100, 100, 50] and sorted(provider.ids) == sorted(ids)


@pytest.mark.parametrize(("started", "left"), [(True, 0), (False, 1)])
def test_a_stopped_proxy_tells_what_it_did_not_send_and_refuses(started: bool, left: int) -> None:
    proxy = SmsProxy(provider := Recorder(), LINGERING)
    proxy.send(HELLO)
    if started:
        proxy.start()
    assert (returned_by(proxy.stop), provider.stopped.is_set()) == (left, True)
    assert returned_by(proxy.stop) == 0  # once more, to no effect
    with pytest.raises(ClosedError):
        proxy.send(HELLO)


def test_a_provider_that_hangs_does_not_hold_up_the_end_and_its_messages_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Hanging(Gate):
        def stop(self) -> None:
            self.opened.wait(HANG)

    monkeypatch.setattr(worker_threads, "GRACE", 0.01)  # seconds that the last steps of a stop get
    provider = Hanging()
    proxy = SmsProxy(provider, SmsProxyConfig(batch_size=1, senders=1))
    proxy.start()
    done, stuck = proxy.send(HELLO).id, proxy.send(HELLO).id
    provider.wait_entered()
    provider.report({done: "DELIVERED"})
    assert returned_by(lambda: proxy.stop(0.01)) == 2
    assert (proxy.get_status(done), done in caplog.text, stuck in caplog.text) == (DELIVERED, True, True)
    provider.opened.set()


def test_a_provider_whose_stop_raises_is_logged_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(Recorder):
        def stop(self) -> None:
            raise RuntimeError(NUMBER)

    with SmsProxy(Raising()):
        pass
    assert caplog.messages == ["the client did not stop well: RuntimeError"]


@pytest.mark.parametrize("threads", range(4))
def test_a_start_without_enough_threads_raises_and_leaves_none_running(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if len(started) >= threads:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    proxy = SmsProxy(Recorder(), SmsProxyConfig(senders=2))  # and one updater, one for statistics
    with pytest.raises(RuntimeError, match="can't start"):
        proxy.start()
    monkeypatch.undo()
    assert [thread.is_alive() for thread in started] == [False] * threads
    assert returned_by(proxy.stop) == 0


class Deadly(InMemoryRepository):
    """A repository with a method that raises once."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()
        self.raised, call = threading.Event(), getattr(self, method)

        def fail(*args: Any) -> Any:
            if self.raised.is_set():
                return call(*args)
            self.raised.set()
            raise error

        setattr(self, method, fail)


def test_a_proxy_at_work_is_healthy_and_its_gauges_are_those_of_the_list() -> None:
    with SmsProxy(Recorder()) as proxy:
        proxy.send(HELLO)
        assert proxy.health() == ([], [])
        assert set(proxy.gauges()) == {each.name for each in FAMILIES if each.kind == "gauge"}


def test_what_the_repository_says_of_itself_is_in_the_health() -> None:
    clock, full = Clock(), Deadly("check", RepositoryUnavailableError("disk full"))
    assert SmsProxy(Recorder(), repository=full).health() == (["disk full"], [])
    config = SmsProxyConfig(batch_size=1, max_pending=1)
    proxy = SmsProxy(Recorder(), config, repository=InMemoryRepository(clock=clock))
    proxy.send(HELLO)
    clock.advance(100)
    assert proxy.health() == (["queue full"], ["the oldest pending message has waited for 100 s"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("method", "thread", "reason"), [
    ("update_all", "smsproxy-updater-1", "the status updater is dead"),
    ("claim", "smsproxy-sender-1", "smsproxy-sender-1 is dead")])  # fmt: skip
def test_a_worker_that_died_is_unhealthy(method: str, thread: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self))[1])
    provider, repository = Recorder(), Deadly(method, SystemExit())
    proxy = SmsProxy(provider, SmsProxyConfig(senders=1), repository=repository)
    proxy.start()
    provider.report({"a": "DELIVERED"})
    assert repository.raised.wait(HANG)
    (worker,) = [each for each in started if each.name == thread]
    worker.join(HANG)
    assert proxy.health() == ([reason], [])
    returned_by(lambda: proxy.stop(0.0))


def test_an_unexpected_error_is_logged_by_type_and_place(caplog: pytest.LogCaptureFixture) -> None:
    with SmsProxy(Recorder(), repository=Deadly("claim", ValueError(NUMBER))) as proxy:
        proxy.send(HELLO)
    assert "a ValueError at test_smsproxy.py:" in caplog.text and NUMBER not in caplog.text


def test_a_busy_run_logs_neither_numbers_nor_texts(caplog: pytest.LogCaptureFixture) -> None:
    messages = [SendMessage(f"4860070{number:04}", f"code {10**9 + 7_919 * number}") for number in range(300)]
    config = SmsProxyConfig(batch_size=2, max_delay=0, max_attempts=2, backoff_base=0)
    with caplog.at_level(logging.DEBUG), SmsProxy(provider := Gossip(), config) as proxy:
        ids = [proxy.send(each, f"key {place}" if place % 3 else None).id for place, each in enumerate(messages)]
        provider.report({ids[1]: messages[1].message, "nobody": None})
        provider.wait_for(bool)
        provider.report({provider.ids[0]: "FAILED"})  # it was taken, so nothing else makes it FAILED before
    assert [word for word in ("gave up", "handed over", "reports") if word not in caplog.text] == []
    secrets = [each for message in messages for each in (message.phone_number, message.message)]
    assert [secret for secret in secrets if secret in caplog.text] == []
    assert [message for message in caplog.messages if len(message.splitlines()) > 1] == []


def test_a_stop_when_the_system_has_no_thread_left_ends_the_client_and_the_updater(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = Recorder()
    proxy = SmsProxy(provider)
    proxy.start()
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    assert proxy.stop(HANG) == 0
    assert provider.stopped.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("smsproxy-")]

"""The facade: from a message that is accepted to its last report, health, the end."""
from __future__ import annotations

import dataclasses
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

import batching_client
import smsproxy
import status_updater
from fastsmsing import FastSmsingError, InMemoryClient, RejectedError
from helpers import HANG, Clock, every_thread_ends, returned_by, together, until
from providers import Gate, Gossip, Recorder, Scripted
from smsproxy import (
    Cancelled,
    ClosedError,
    DuplicateMessageError,
    IdempotencyError,
    InMemoryRepository,
    MessageStatus,
    OverloadedError,
    Reason,
    RepositoryUnavailableError,
    SendMessage,
    SmsProxy,
    SmsProxyConfig,
    ValidationError,
)  # fmt: skip

__all__ = ["every_thread_ends"]  # a fixture

ACCEPTED, NOT_FOUND, CONFIRMED, FAILED, DELIVERED = MessageStatus
NUMBER = "48123456789"
HELLO = SendMessage(NUMBER, "hello")
ONE_BY_ONE = SmsProxyConfig(batch_size=1)
LINGERING = SmsProxyConfig(max_delay=None)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError(NUMBER)

    __repr__ = __str__
    errno = retry_after = property(__str__)


class Argless(FastSmsingError):
    def __init__(self, *args: object) -> None:
        """Forgets its base class."""

    args = property(Mute.__str__)


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
    another = proxy.entry(HELLO, "key 2").message.message_id
    assert (proxy.send(HELLO, "key"), proxy.get_status(another)) == (first, NOT_FOUND)


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
    assert sorted(len(batch) for batch in provider.batches) == [50, 100, 100]
    assert sorted(provider.ids) == sorted(ids)


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

    for module in (smsproxy, batching_client, status_updater):
        monkeypatch.setattr(module, "GRACE", 0.01)  # seconds that the last steps of a stop get
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

        def fail(*args: Any, **options: Any) -> Any:
            if self.raised.is_set():
                return call(*args, **options)
            self.raised.set()
            raise error

        setattr(self, method, fail)


def test_a_proxy_at_work_is_healthy_and_measures() -> None:
    with SmsProxy(Recorder(), LINGERING) as proxy:
        proxy.send(HELLO)
        assert (proxy.health(), proxy.dead_threads()) == (([], []), [])
        proxy.measure()
        metrics = proxy.metrics
        assert (metrics.pending.value, metrics.pending_limit.value, metrics.past_due.value) == (1, 100_000, 0.0)


def test_the_stand_in_as_provider_is_a_warning_and_a_gauge() -> None:
    proxy = SmsProxy(InMemoryClient())
    assert proxy.health() == ([], ["the provider is the stand-in, which sends nothing to anybody"])
    assert (proxy.metrics.stand_in.value, SmsProxy(Recorder()).metrics.stand_in.value) == (1.0, 0.0)


def test_what_a_repository_that_is_away_cannot_tell_has_no_value() -> None:
    proxy = SmsProxy(Recorder(), repository=Deadly("ages", RepositoryUnavailableError("away")))
    proxy.measure()
    assert (proxy.metrics.pending.value, proxy.metrics.past_due.value, proxy.metrics.in_flight.value) == (None, None, 0)
    proxy.measure()
    assert proxy.metrics.pending.value == 0


def test_a_message_that_waits_can_be_cancelled() -> None:
    with SmsProxy(provider := Recorder(), LINGERING) as proxy:
        kept, cancelled = proxy.send(HELLO).id, proxy.send(HELLO).id
        assert [proxy.cancel(each) for each in (cancelled, cancelled, "unknown")] == [True, True, False]
        assert (proxy.get_status(cancelled), proxy.get_reason(cancelled)) == (FAILED, Reason.CANCELLED)
        assert proxy.metrics.given_up.count("cancelled") == proxy.metrics.final.total == 1
    assert provider.ids == [kept]


def test_a_message_that_several_cancel_at_the_same_time_counts_once() -> None:
    class Late(InMemoryRepository):
        """Cancels when all have come to cancel."""

        def cancel(self, message_id: str) -> Cancelled | None:
            all_came.wait(HANG)
            return super().cancel(message_id)

    all_came = threading.Barrier(3)
    with SmsProxy(Recorder(), LINGERING, repository=Late()) as proxy, ThreadPoolExecutor(3) as pool:
        message_id = proxy.send(HELLO).id
        assert list(pool.map(proxy.cancel, [message_id] * 3)) == [True] * 3
        assert (proxy.metrics.given_up.count("cancelled"), proxy.metrics.final.total) == (1, 1)


def test_a_message_that_is_too_old_fails_on_time_while_the_provider_is_away() -> None:
    provider = Gate()
    with SmsProxy(provider, SmsProxyConfig(batch_size=1, senders=1)) as proxy:
        proxy.send(HELLO)
        provider.wait_entered(1)
        old = proxy.send(dataclasses.replace(HELLO, max_age=0.001)).id
        until(lambda: proxy.get_status(old) is FAILED)
        assert proxy.get_reason(old) is Reason.EXPIRED
        provider.opened.set()


def test_what_the_repository_says_of_itself_is_in_the_health() -> None:
    clock, full = Clock(), Deadly("check", RepositoryUnavailableError("disk full"))
    assert SmsProxy(Recorder(), repository=full).health() == (["the database cannot be written"], [])
    config = SmsProxyConfig(batch_size=1, max_pending=1)
    proxy = SmsProxy(Recorder(), config, repository=InMemoryRepository(clock=clock))
    proxy.send(HELLO)
    clock.advance(100)
    assert proxy.health() == (["queue full"], ["the first pending message has been past due for 95 s"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("method", "thread", "reason"), [
    ("update_all", "smsproxy-updater-1", "smsproxy-updater-1 is dead"),
    ("claim", "smsproxy-dispatcher-1", "smsproxy-dispatcher-1 is dead")])  # fmt: skip
def test_a_worker_that_died_is_unhealthy(
    method: str, thread: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_and_note(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_and_note)
    provider, repository = Recorder(), Deadly(method, SystemExit())
    proxy = SmsProxy(provider, SmsProxyConfig(senders=1), repository=repository)
    proxy.start()
    provider.report({"a": "DELIVERED"})
    assert repository.raised.wait(HANG)
    (worker,) = [each for each in started if each.name == thread]
    worker.join(HANG)
    assert reason in proxy.health()[0]
    assert reason.split()[0] in proxy.dead_threads()
    returned_by(lambda: proxy.stop(0.0))


def test_an_unexpected_error_is_logged_by_type_and_place(caplog: pytest.LogCaptureFixture) -> None:
    with SmsProxy(Recorder(), repository=Deadly("claim", ValueError(NUMBER))) as proxy:
        proxy.send(HELLO)
    assert "no batch can be claimed: ValueError at test_smsproxy.py:" in caplog.text
    assert NUMBER not in caplog.text


# Lists


def test_a_list_leaves_when_its_first_message_is_due() -> None:
    messages = [dataclasses.replace(HELLO, max_delay=delay) for delay in (600, 0, 600)]
    with SmsProxy(provider := Recorder(), SmsProxyConfig(batch_size=3, max_delay=600)) as proxy:
        entries = proxy.entries(messages)
        assert proxy.accept_together(entries) is None
        provider.wait_for(bool)
        ids = [entry.message.message_id for entry in entries]
        assert provider.ids == [ids[1], ids[0], ids[2]]
        assert proxy.metrics.accepted.total == 3


def test_a_message_of_a_list_expires_on_time() -> None:
    messages = [HELLO, dataclasses.replace(HELLO, max_delay=600, max_age=0.2), HELLO]
    with SmsProxy(provider := Gate(), SmsProxyConfig(batch_size=2, senders=1, max_delay=None)) as proxy:
        proxy.send(HELLO)
        proxy.send(HELLO)
        provider.wait_entered()  # so what follows waits
        entries = proxy.entries(messages)
        assert proxy.accept_together(entries) is None
        until(lambda: proxy.get_status(entries[1].message.message_id) is FAILED)
        assert proxy.get_reason(entries[1].message.message_id) is Reason.EXPIRED
        provider.opened.set()


@pytest.mark.parametrize(("messages", "error"), [
    *[([HELLO] * count, "messages must be a list of 1 to 100 messages") for count in (0, 101)],
    ([HELLO, SendMessage("+48", "x")], "phone_number must consist of the digits 0 to 9 only")])  # fmt: skip
def test_a_list_that_can_never_be_accepted_is_not_valid(messages: list[SendMessage], error: str) -> None:
    proxy = SmsProxy(Recorder(), SmsProxyConfig(max_pending=100))
    with pytest.raises(ValidationError, match=error):
        proxy.entries(messages)


def test_a_list_is_refused_as_a_whole_and_each_of_its_messages_is_counted() -> None:
    repository = InMemoryRepository()
    proxy = SmsProxy(Recorder(), SmsProxyConfig(max_delay=None, max_pending=100), repository=repository)
    assert proxy.accept_together(proxy.entries([HELLO] * 60)) is None
    assert isinstance(proxy.accept_together(proxy.entries([HELLO] * 50)), OverloadedError)
    proxy.stop(HANG)
    assert isinstance(proxy.accept_together(proxy.entries([HELLO] * 7)), ClosedError)
    refused, accepted = proxy.metrics.refused, proxy.metrics.accepted
    assert (refused.count("queue_full"), refused.count("stopping"), accepted.total) == (50, 7, 60)
    deadly = SmsProxy(Recorder(), repository=Deadly("save_together", RepositoryUnavailableError("disk full")))
    assert isinstance(deadly.accept_together(deadly.entries([HELLO] * 3)), RepositoryUnavailableError)
    assert deadly.metrics.refused.count("database") == 3


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


def test_a_stop_when_the_system_has_no_thread_left_ends_the_client_and_the_updater(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Recorder()
    proxy = SmsProxy(provider)
    proxy.start()
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    assert proxy.stop(HANG) == 0
    assert provider.stopped.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("smsproxy-")]

"""The batching client: when batches leave, how hard it tries, and what becomes of every message."""
from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

import smsproxy
from fastsmsing import FastSmsingClient, FastSmsingError, Message, RejectedError
from helpers import HANG, Gate, Grouping, Recorder, Scripted
from smsproxy import (
    ClientResult, ClosedError, DuplicateMessageError, InMemoryRepository, MessageStatus, Metrics, OverloadedError,
    Repository, RepositoryUnavailableError, SendMessage, SimpleBatchingClient, SmsProxyConfig, SmsProxyError,
)  # fmt: skip

ACCEPTED, FAILED, DELIVERED = MessageStatus.ACCEPTED, MessageStatus.FAILED, MessageStatus.DELIVERED
NUMBER = "48123456789"


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG)
        assert not thread.is_alive(), f"{thread.name} was left behind"


# Doubles


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Waits(threading.Event):
    """In place of the Event that a stop sets: remembers the waits between tries, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout)
        return self.is_set()


class Watched(threading.Condition):
    """In place of the client's Condition: knows who waits and was not notified, and for how long.

    Its waits with a time limit end by themselves only when `expire` says that the time is up.
    """

    def __init__(self) -> None:
        super().__init__(threading.Lock())
        self._watch = threading.Condition()
        self._limits: dict[int, float | None] = {}  # by thread, in the order in which notify wakes them
        self.notified = 0

    def wait(self, timeout: float | None = None) -> bool:
        with self._watch:
            self._limits[threading.get_ident()] = timeout
            self._watch.notify_all()
        return super().wait()

    def notify(self, n: int = 1) -> None:
        with self._watch:
            woken = list(self._limits)[:n]
            for thread in woken:
                del self._limits[thread]
        self.notified += len(woken)
        super().notify(n)

    def settled(self, waiting: int) -> list[float | None]:
        """Blocks until so many threads wait; returns their time limits, the shortest first, None last."""
        with self._watch:
            assert self._watch.wait_for(lambda: len(self._limits) == waiting, HANG), "the senders never settled"
            return sorted(self._limits.values(), key=lambda limit: math.inf if limit is None else limit)

    def expire(self) -> None:
        with self:
            self.notify_all()


class Sink:
    """A statistics double that keeps every result and then raises what it is told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._results: queue.Queue[ClientResult] = queue.Queue()
        self._error = error

    def send(self, result: ClientResult) -> None:
        self._results.put(result)
        if self._error is not None:
            raise self._error

    def next(self) -> ClientResult:
        return self._results.get(timeout=HANG)

    def rest(self) -> list[ClientResult]:
        """Those not taken yet; complete only after a stop."""
        return [self._results.get_nowait() for _ in range(self._results.qsize())]


class StuckSink:
    """A statistics double that hangs in its first result until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.results: list[ClientResult] = []

    def send(self, result: ClientResult) -> None:
        self.entered.set()
        if not self.opened.wait(HANG):
            raise TimeoutError("the sink was never opened")
        self.results.append(result)


class Outbox(InMemoryRepository):
    """A durable repository double. `refusals` are raised by `handed_over` or `update_all`, one a call."""

    def __init__(self, *refusals: Exception) -> None:
        super().__init__()
        self.refusals = list(refusals)
        self.waiting: dict[str, tuple[float, Message]] = {}
        self.calls: list[str] = []

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        super().save(message_id, message, fingerprint)
        if message is not None:
            self.waiting[message_id] = (time.time(), message)

    def update_all(self, updates: Mapping[str, MessageStatus]) -> dict[str, SmsProxyError]:
        self._refuse("update_all")
        failures: dict[str, SmsProxyError] = {}
        for message_id, status in updates.items():
            try:
                self.update(message_id, status)
                self.waiting.pop(message_id, None)
            except SmsProxyError as error:
                failures[message_id] = error
        return failures

    def handed_over(self, message_ids: Iterable[str]) -> None:
        self._refuse("handed_over")
        for message_id in message_ids:
            self.waiting.pop(message_id, None)

    def outbox(self) -> Iterable[tuple[float, Message]]:
        return list(self.waiting.values())

    def _refuse(self, call: str) -> None:
        self.calls.append(call)
        if self.refusals:
            raise self.refusals.pop(0)


class Broken(Grouping):
    """A repository double that raises in the calls it is told to."""

    def __init__(self, **errors: BaseException) -> None:
        super().__init__()
        self.errors = errors

    def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
        if "save_all" in self.errors:
            raise self.errors["save_all"]
        return super().save_all(messages)

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        if "save" in self.errors:
            raise self.errors["save"]
        super().save(message_id, message, fingerprint)

    def update(self, message_id: str, status: MessageStatus) -> None:
        if "update" in self.errors:
            raise self.errors["update"]
        super().update(message_id, status)


# Tools


@contextlib.contextmanager
def batching(
    client: FastSmsingClient,
    statistics: Any = None,
    *,
    repository: Repository | None = None,
    clock: Callable[[], float] = time.monotonic,
    rng: Callable[[], float] = random.random,
    metrics: Metrics | None = None,
    condition: threading.Condition | None = None,
    hurry: threading.Event | None = None,
    **settings: Any,
) -> Iterator[SimpleBatchingClient]:
    """A client with these settings, stopped at the end of the block."""
    made = SimpleBatchingClient(
        InMemoryRepository() if repository is None else repository, client, SmsProxyConfig(**settings), statistics,
        metrics=metrics, clock=clock, rng=rng,
    )  # fmt: skip
    if condition is not None:
        made._condition = made._lock = condition  # type: ignore[assignment]
    if hurry is not None:
        made._hurry = hurry
    try:
        yield made
    finally:
        made.stop(HANG)


def send(client: SimpleBatchingClient, *message_ids: str) -> None:
    for message_id in message_ids:
        client.send(SendMessage(NUMBER, f"text of {message_id}"), message_id)


def group(*message_ids: str) -> list[tuple[Message, bytes | None]]:
    """Messages for `send_all`; the fingerprint of each one tells its place."""
    return [(Message(NUMBER, f"text of {each}", each), f"{place}".encode()) for place, each in enumerate(message_ids)]


def kinds(errors: Iterable[BaseException | None]) -> list[type[BaseException] | None]:
    return [None if error is None else type(error) for error in errors]


def names(count: int, prefix: str = "m") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def sizes(client: Recorder) -> list[int]:
    return [len(batch) for batch in client.batches]


def stop_in_a_thread(client: SimpleBatchingClient, timeout: float | None) -> int:
    """What `stop` returns; fails if it hangs."""
    returned: queue.Queue[int] = queue.Queue()
    threading.Thread(target=lambda: returned.put(client.stop(timeout)), daemon=True).start()
    try:
        return returned.get(timeout=HANG)
    except queue.Empty:
        raise AssertionError("stop hangs") from None


def together(*works: Callable[[], object]) -> None:
    """Runs the works at the same time, each in a thread of its own; raises what one of them raised."""
    barrier, errors = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[], object]) -> None:
        try:
            barrier.wait(HANG)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@contextlib.contextmanager
def opening(*gates: threading.Event) -> Iterator[None]:
    """Opens the gates at the end, also after a failure."""
    try:
        yield
    finally:
        for gate in gates:
            gate.set()


# When a batch leaves


def test_a_full_batch_leaves_at_once() -> None:
    provider = Recorder()
    with batching(provider, batch_size=3, max_delay=None) as client:
        send(client, "a", "b", "c")
        provider.wait_for(lambda batches: len(batches) == 1)
        assert provider.ids == ["a", "b", "c"]


def test_a_message_arrives_as_it_was_accepted() -> None:
    provider = Recorder()
    with batching(provider, batch_size=1) as client:
        client.send(SendMessage("123", "zażółć 😀\r\n\0"), "a")
        provider.wait_for(lambda batches: len(batches) == 1)
    assert provider.batches == [[Message("123", "zażółć 😀\r\n\0", "a")]]


@pytest.mark.parametrize("batch_size", [1, 0, -1, -100])
def test_without_batching_every_message_leaves_by_itself_at_once(batch_size: int) -> None:
    provider = Recorder()
    with batching(provider, batch_size=batch_size, max_delay=None) as client:
        for number, message_id in enumerate(names(5), 1):
            send(client, message_id)
            provider.wait_for(lambda batches: len(batches) == number)
    assert sizes(provider) == [1, 1, 1, 1, 1]


def test_without_batching_a_large_max_batch_size_changes_nothing() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, max_batch_size=100, senders=1, max_delay=None) as client, opening(gate.opened):
        send(client, *names(5))
        gate.wait_entered()
        gate.opened.set()
        gate.wait_for(lambda batches: len(batches) == 5)
    assert sizes(gate) == [1, 1, 1, 1, 1]


def test_with_max_batch_size_equal_to_batch_size_all_batches_have_that_size_in_order() -> None:
    provider = Recorder()
    with batching(provider, batch_size=4, max_delay=None, senders=1) as client:
        send(client, *names(40))
        provider.wait_for(lambda batches: len(batches) == 10)
        assert (sizes(provider), provider.ids) == ([4] * 10, names(40))


def test_while_all_senders_are_busy_batches_grow_up_to_max_batch_size() -> None:
    gate = Gate()
    with batching(gate, batch_size=2, max_batch_size=7, max_delay=None, senders=1) as client, opening(gate.opened):
        send(client, *names(2))
        gate.wait_entered()
        send(client, *names(12, "later"))
        gate.opened.set()
        gate.wait_for(lambda batches: len(batches) == 3)
    assert sizes(gate) == [2, 7, 5]


def test_while_all_senders_are_busy_exact_batches_stay_exact() -> None:
    gate = Gate()
    with batching(gate, batch_size=2, max_delay=None, senders=1) as client, opening(gate.opened):
        send(client, *names(8))
        gate.wait_entered()
        gate.opened.set()
        gate.wait_for(lambda batches: len(batches) == 4)
    assert sizes(gate) == [2, 2, 2, 2]


def test_a_full_batch_never_waits_beside_an_idle_sender() -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_delay=None, senders=4) as client, opening(gate.opened):
        for number in range(4):
            send(client, *names(3, f"{number}-"))
            gate.wait_entered()
        assert client.gauges()["smsproxy_provider_requests_in_flight"] == 4


@pytest.mark.parametrize("max_delay", [None, 3_600.0])
def test_many_full_batches_at_once_occupy_every_idle_sender(max_delay: float | None) -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_delay=max_delay, senders=4) as client, opening(gate.opened):
        together(*(lambda prefix=f"{thread}-": send(client, *names(2, prefix)) for thread in range(6)))
        gate.wait_entered(4)


def test_a_full_batch_leaves_although_another_sender_watches_the_linger() -> None:
    gate, condition = Gate(), Watched()
    with batching(gate, condition=condition, batch_size=2, max_delay=5.0, senders=3) as client, opening(gate.opened):
        for number in range(3):
            send(client, f"{number}-first")
            condition.settled(3 - number)
            send(client, f"{number}-second")
            gate.wait_entered()


def test_a_batch_that_becomes_full_while_all_are_busy_leaves_with_the_first_sender_that_is_free() -> None:
    gate = Gate()
    with batching(gate, batch_size=2, max_delay=None, senders=2) as client, opening(gate.opened):
        send(client, *names(4))
        gate.wait_entered(2)
        send(client, *names(2, "later"))
        gate.opened.set()
        gate.wait_for(lambda batches: len(batches) == 3)


def test_what_remains_of_a_grown_queue_lingers_on() -> None:
    gate, condition = Gate(), Watched()
    with batching(gate, condition=condition, batch_size=2, max_delay=5.0, senders=1) as client, opening(gate.opened):
        send(client, *names(5))
        gate.wait_entered()
        gate.opened.set()
        [limit] = condition.settled(1)
        assert limit is not None and 0 < limit <= 5.0
        assert sizes(gate) == [2, 2]


# Linger and flush


def test_an_incomplete_batch_leaves_once_its_oldest_message_has_lingered() -> None:
    provider, condition, clock = Recorder(), Watched(), Clock()
    options: dict[str, Any] = {"batch_size": 10, "max_delay": 5.0, "senders": 1}
    with batching(provider, condition=condition, clock=clock, **options) as client:
        send(client, "a")
        assert condition.settled(1) == [5.0]
        clock.now += 3
        send(client, "b")
        clock.now += 2
        condition.expire()
        provider.wait_for(lambda batches: len(batches) == 1)
        assert provider.ids == ["a", "b"]


def test_a_sender_that_wakes_too_early_waits_for_the_rest_of_the_linger() -> None:
    provider, condition, clock = Recorder(), Watched(), Clock()
    options: dict[str, Any] = {"batch_size": 10, "max_delay": 5.0, "senders": 1}
    with batching(provider, condition=condition, clock=clock, **options) as client:
        send(client, "a")
        condition.settled(1)
        clock.now += 4
        condition.expire()
        assert condition.settled(1) == [1.0]
        assert provider.batches == []


def test_a_linger_really_ends_by_itself() -> None:
    provider = Recorder()
    with batching(provider, batch_size=10, max_delay=0.01) as client:
        send(client, "a")
        provider.wait_for(lambda batches: len(batches) == 1)


def test_a_linger_starts_again_with_the_next_message() -> None:
    provider = Recorder()
    with batching(provider, batch_size=10, max_delay=0.001, senders=2) as client:
        for number, message_id in enumerate(names(20), 1):
            send(client, message_id)
            provider.wait_for(lambda batches: len(batches) == number)
    assert provider.ids == names(20)


def test_with_max_delay_zero_no_message_lingers() -> None:
    provider = Recorder()
    with batching(provider, batch_size=10, max_delay=0) as client:
        send(client, "a")
        provider.wait_for(lambda batches: len(batches) == 1)


def test_a_linger_longer_than_threads_can_wait_is_no_error() -> None:
    provider = Recorder()
    with batching(provider, batch_size=2, max_delay=1e12, senders=1) as client:
        send(client, "a")
        send(client, "b")
        provider.wait_for(lambda batches: len(batches) == 1)


def test_without_max_delay_an_incomplete_batch_waits_for_a_flush() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=3, max_delay=None, senders=2) as client:
        send(client, "a", "b")
        assert condition.settled(2) == [None, None]
        assert provider.batches == []
        client.flush()
        provider.wait_for(lambda batches: len(batches) == 1)
        assert provider.ids == ["a", "b"]


def test_a_flush_lets_everything_pending_leave() -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_delay=None, senders=1) as client, opening(gate.opened):
        send(client, *names(7))
        gate.wait_entered()
        client.flush()
        gate.opened.set()
        gate.wait_for(lambda batches: len(batches) == 3)
    assert sizes(gate) == [3, 3, 1]


def test_a_flush_does_not_cut_the_linger_of_later_messages() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=3, max_delay=None, senders=1) as client:
        send(client, "a")
        client.flush()
        provider.wait_for(lambda batches: len(batches) == 1)
        condition.settled(1)
        send(client, "b")
        condition.settled(1)
        assert provider.ids == ["a"]


def test_a_flush_of_nothing_leaves_the_next_message_lingering() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=3, max_delay=None, senders=1) as client:
        client.flush()
        send(client, "a")
        condition.settled(1)
        assert provider.batches == []


def test_a_flush_does_not_wait_for_the_provider() -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_delay=None) as client, opening(gate.opened):
        send(client, "a")
        client.flush()
        gate.wait_entered()
        assert gate.batches == []


# Idle


def test_idle_senders_wait_without_a_time_limit() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=1, senders=4) as client:
        for number, message_id in enumerate(names(20), 1):
            send(client, message_id)
            provider.wait_for(lambda batches: len(batches) == number)
        assert condition.settled(4) == [None] * 4


def test_messages_that_do_not_complete_a_batch_wake_nobody() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=100, max_delay=None, senders=4) as client:
        send(client, "first")
        condition.settled(4)
        before = condition.notified
        send(client, *names(98))
        assert condition.notified == before


def test_one_sender_watches_the_linger_and_the_others_sleep() -> None:
    gate, condition, clock = Gate(), Watched(), Clock()
    options: dict[str, Any] = {"batch_size": 2, "max_delay": 5.0, "senders": 4}
    with batching(gate, condition=condition, clock=clock, **options) as client, opening(gate.opened):
        send(client, *names(8))
        gate.wait_entered(4)
        send(client, "lingering")
        gate.opened.set()
        assert condition.settled(4) == [5.0, None, None, None]


def test_after_a_linger_nobody_waits_with_a_time_limit() -> None:
    provider, condition, clock = Recorder(), Watched(), Clock()
    options: dict[str, Any] = {"batch_size": 100, "max_delay": 5.0, "senders": 4}
    with batching(provider, condition=condition, clock=clock, **options) as client:
        send(client, "a")
        condition.settled(4)
        clock.now += 5
        condition.expire()
        provider.wait_for(lambda batches: len(batches) == 1)
        assert condition.settled(4) == [None] * 4


def test_a_full_batch_wakes_one_sender() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=3, max_delay=None, senders=4) as client:
        send(client, "a")
        condition.settled(4)
        before = condition.notified
        send(client, "b", "c")
        assert condition.notified - before == 1


# What the caller of send sees


def test_a_message_is_saved_as_accepted_before_it_leaves() -> None:
    repository, seen = InMemoryRepository(), list[MessageStatus]()

    class Looking(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            seen.extend(repository.get(message.message_id) for message in messages)
            super().send(messages)

    with batching(Looking(), repository=repository, batch_size=2) as client:
        send(client, "a", "b")
    assert seen == [ACCEPTED, ACCEPTED]


def test_send_raises_what_saving_raises_and_queues_nothing() -> None:
    provider = Recorder()
    with batching(provider, repository=Broken(save=RuntimeError("disk on fire")), batch_size=1) as client:
        with pytest.raises(RuntimeError, match="disk on fire"):
            send(client, "a")
    assert provider.batches == []


def test_a_message_that_could_not_be_saved_frees_its_place() -> None:
    repository = Broken(save=RuntimeError("disk on fire"))
    with batching(Recorder(), repository=repository, batch_size=2, max_pending=2, max_delay=None) as client:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                send(client, "a")
        repository.errors.clear()
        send(client, "a")
        assert client.gauges()["smsproxy_pending_messages"] == 1


def test_a_place_is_freed_also_when_saving_is_interrupted() -> None:
    with batching(Recorder(), repository=Broken(save=KeyboardInterrupt())) as client:
        with pytest.raises(KeyboardInterrupt):
            send(client, "a")
        assert client.gauges()["smsproxy_pending_messages"] == 0


def test_a_duplicate_is_refused_and_not_sent() -> None:
    provider = Recorder()
    with batching(provider, batch_size=1) as client:
        send(client, "a")
        with pytest.raises(DuplicateMessageError):
            send(client, "a")
    assert provider.ids == ["a"]


def test_one_message_more_than_max_pending_is_refused_and_not_saved() -> None:
    gate, repository = Gate(), InMemoryRepository()
    with batching(gate, repository=repository, batch_size=2, max_pending=3) as client, opening(gate.opened):
        send(client, "a", "b", "c")
        with pytest.raises(OverloadedError):
            send(client, "d")
        assert repository.get("d") is MessageStatus.NOT_FOUND


def test_messages_in_a_request_count_as_pending() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, max_pending=1) as client, opening(gate.opened):
        send(client, "a")
        gate.wait_entered()
        with pytest.raises(OverloadedError):
            send(client, "b")


def test_after_the_provider_took_a_batch_there_is_room_again() -> None:
    provider, sink, condition = Recorder(), Sink(), Watched()
    with batching(provider, sink, condition=condition, batch_size=1, max_pending=1, senders=1) as client:
        for message_id in names(5):
            send(client, message_id)
            sink.next()
            condition.settled(1)
    assert provider.ids == names(5)


def test_send_does_not_wait_for_a_stuck_provider() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, senders=2) as client, opening(gate.opened):
        send(client, *names(50))
        assert gate.batches == []


def test_send_does_not_wait_for_a_stuck_statistics_sink() -> None:
    provider, sink = Recorder(), StuckSink()
    with batching(provider, sink, batch_size=1) as client, opening(sink.opened):
        send(client, "first")
        assert sink.entered.wait(HANG)
        send(client, *names(50))
        provider.wait_for(lambda batches: len(batches) == 51)


def test_a_stopped_client_accepts_nothing() -> None:
    repository = InMemoryRepository()
    with batching(Recorder(), repository=repository) as client:
        client.stop(HANG)
        with pytest.raises(ClosedError):
            send(client, "a")
    assert repository.get("a") is MessageStatus.NOT_FOUND


# Sending many at once


def test_messages_sent_together_are_saved_together_in_their_order() -> None:
    provider, repository = Recorder(), Grouping()
    with batching(provider, repository=repository, batch_size=3, max_delay=None) as client:
        assert client.send_all(group("c", "a", "b")) == [None] * 3
    assert (repository.groups, provider.ids) == ([["c", "a", "b"]], ["c", "a", "b"])


def test_a_message_sent_alone_is_a_group_of_one() -> None:
    repository = Grouping()
    with batching(Recorder(), repository=repository) as client:
        send(client, "a", "b")
    assert repository.groups == [["a"], ["b"]]


def test_no_messages_sent_together_are_no_error() -> None:
    with batching(Recorder()) as client:
        assert client.send_all([]) == []


@pytest.mark.parametrize("make", [InMemoryRepository, Grouping, Outbox])
def test_a_duplicate_among_messages_sent_together_is_refused_by_itself(make: Callable[[], Repository]) -> None:
    provider = Recorder()
    with batching(provider, repository=make(), batch_size=9, max_delay=None) as client:
        send(client, "b")
        errors = client.send_all(group("a", "b", "a", "c"))
        assert kinds(errors) == [None, DuplicateMessageError, DuplicateMessageError, None]
        assert [getattr(error, "fingerprint", None) for error in errors] == [None, None, b"0", None]
        assert client.gauges()["smsproxy_messages_accepted_total"] == 3
    assert provider.ids == ["b", "a", "c"]


def test_a_message_that_a_repository_without_groups_cannot_save_costs_only_itself() -> None:
    class Choosy(InMemoryRepository):
        def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
            if message_id == "b":
                raise RuntimeError("not this one")
            super().save(message_id, message, fingerprint)

    provider = Recorder()
    with batching(provider, repository=Choosy(), batch_size=2) as client:
        assert kinds(client.send_all(group("a", "b", "c"))) == [None, RuntimeError, None]
    assert provider.ids == ["a", "c"]


def test_a_repository_may_know_nothing_of_fingerprints() -> None:
    class Plain(InMemoryRepository):
        def save(self, message_id: str, message: Message) -> None:  # type: ignore[override]
            super().save(message_id, message)

    repository: Any = Plain()
    with batching(Recorder(), repository=repository) as client:
        assert client.send_all([(Message(NUMBER, "hello", "a"), None)]) == [None]


@pytest.mark.parametrize("pending", [0, 1, 3])
def test_with_room_for_some_the_first_are_taken_and_the_rest_refused_and_not_saved(pending: int) -> None:
    gate, repository = Gate(), Grouping()
    with batching(gate, repository=repository, batch_size=3, max_pending=3) as client, opening(gate.opened):
        send(client, *names(pending, "earlier"))
        errors = client.send_all(group(*names(5)))
        assert kinds(errors) == [None] * (3 - pending) + [OverloadedError] * (2 + pending)
        assert [each for group in repository.groups[pending:] for each in group] == names(3 - pending)
        assert client.gauges()["smsproxy_pending_messages"] == 3


def test_messages_sent_together_find_no_room_beside_restored_ones() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, max_pending=2) as client, opening(gate.opened):
        client.restore([(time.time(), Message(NUMBER, "hello", name)) for name in names(5)])
        assert kinds(client.send_all(group("a", "b", "c", "d", "e"))) == [OverloadedError] * 5
        assert client.gauges()["smsproxy_pending_messages"] == 5


def test_those_of_a_group_that_could_not_be_saved_give_their_places_back() -> None:
    gate = Gate()
    with batching(gate, batch_size=2, max_pending=3, max_delay=None) as client, opening(gate.opened):
        assert kinds(client.send_all(group("a", "a", "a"))) == [None] + [DuplicateMessageError] * 2
        assert client.gauges()["smsproxy_pending_messages"] == 1
        assert kinds(client.send_all(group("b", "c", "d"))) == [None, None, OverloadedError]


def test_the_places_of_those_that_could_not_be_saved_go_to_the_rest_of_the_group() -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_pending=3, max_delay=None) as client, opening(gate.opened):
        client.send_all(group("a"))
        refused = [DuplicateMessageError] * 5
        assert kinds(client.send_all(group("a", "a", "a", "a", "a", "b", "c", "d"))) == [*refused, None, None, OverloadedError]


@pytest.mark.parametrize("error", [RepositoryUnavailableError("disk full"), RuntimeError("no")])
def test_a_group_whose_saving_raises_is_refused_as_a_whole_and_frees_its_places(error: Exception) -> None:
    provider = Recorder()
    with batching(provider, repository=Broken(save_all=error), batch_size=1, max_pending=3) as client:
        for _ in range(2):
            assert client.send_all(group("a", "b", "c")) == [error] * 3
            assert client.gauges()["smsproxy_pending_messages"] == 0
    assert provider.batches == []


def test_a_group_whose_saving_is_interrupted_frees_its_places() -> None:
    with batching(Recorder(), repository=Broken(save_all=KeyboardInterrupt()), batch_size=1, max_pending=3) as client:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                client.send_all(group("a", "b", "c"))
            assert client.gauges()["smsproxy_pending_messages"] == 0


def test_a_group_without_room_is_not_saved_at_all() -> None:
    repository, gate = Grouping(), Gate()
    with batching(gate, repository=repository, batch_size=1, max_pending=1) as client, opening(gate.opened):
        client.send_all(group("a"))
        assert kinds(client.send_all(group("b", "c"))) == [OverloadedError] * 2
    assert repository.groups == [["a"]]


def test_a_stopped_client_accepts_no_group() -> None:
    repository = Grouping()
    with batching(Recorder(), repository=repository) as client:
        client.stop(HANG)
        assert kinds(client.send_all(group("a", "b"))) == [ClosedError] * 2
    assert repository.groups == []


def test_a_group_counts_as_pending_and_is_queued_only_once_it_is_safe() -> None:
    saving, saved, provider = threading.Event(), threading.Event(), Recorder()

    class Slow(Grouping):
        def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
            saving.set()
            assert saved.wait(HANG)
            return super().save_all(messages)

    with batching(provider, repository=Slow(), batch_size=1) as client, opening(saved):
        accepting = threading.Thread(target=client.send_all, args=(group("a", "b"),), daemon=True)
        accepting.start()
        assert saving.wait(HANG)
        client.flush()
        gauges = client.gauges()
        assert (gauges["smsproxy_pending_messages"], gauges["smsproxy_messages_accepted_total"]) == (2, 0)
        assert provider.batches == []
        saved.set()
        accepting.join(HANG)
    assert sorted(provider.ids) == ["a", "b"]


def test_a_group_is_queued_when_send_all_returns() -> None:
    with batching(Recorder(), batch_size=9, max_delay=None) as client:
        client.send_all(group("a", "b"))
        assert client.gauges()["smsproxy_messages_accepted_total"] == 2


def test_a_group_of_several_batches_leaves_in_exact_batches_in_order() -> None:
    provider = Recorder()
    with batching(provider, batch_size=4, max_delay=None, senders=1) as client:
        client.send_all(group(*names(43)))
        provider.wait_for(lambda batches: len(batches) == 10)
        assert (sizes(provider), provider.ids) == ([4] * 10, names(40))


def test_a_group_of_several_batches_is_one_large_batch_where_that_is_allowed() -> None:
    provider, condition = Recorder(), Watched()
    options: dict[str, Any] = {"batch_size": 3, "max_batch_size": 50, "max_delay": None, "senders": 4}
    with batching(provider, condition=condition, **options) as client:
        send(client, "first")
        condition.settled(4)
        before = condition.notified
        client.send_all(group(*names(49)))
        provider.wait_for(lambda batches: len(batches) == 1)
        assert condition.settled(4) == [None] * 4
        assert (sizes(provider), condition.notified - before) == ([50], 1)


def test_a_group_of_several_batches_occupies_every_idle_sender() -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_delay=None, senders=4) as client, opening(gate.opened):
        client.send_all(group(*names(12)))
        gate.wait_entered(4)


def test_a_group_that_completes_no_batch_wakes_nobody() -> None:
    provider, condition = Recorder(), Watched()
    with batching(provider, condition=condition, batch_size=100, max_delay=None, senders=4) as client:
        send(client, "first")
        condition.settled(4)
        before = condition.notified
        client.send_all(group(*names(98)))
        assert condition.notified == before


def test_the_first_of_a_group_begins_a_linger() -> None:
    condition, clock = Watched(), Clock()
    with batching(Recorder(), condition=condition, clock=clock, batch_size=9, max_delay=5.0, senders=2) as client:
        client.send_all(group("a", "b"))
        condition.settled(2)
        clock.now += 1.0
        client.send_all(group("c"))
        assert condition.settled(2) == [5.0, None]


# Retries


def test_a_failed_batch_is_sent_again_with_the_same_messages() -> None:
    provider = Scripted(FastSmsingError("busy"), OSError("reset"), None)
    with batching(provider, hurry=Waits(), batch_size=2, max_attempts=3) as client:
        send(client, "a", "b")
        provider.wait_for(lambda batches: len(batches) == 1)
    assert [[message.message_id for message in batch] for batch in provider.attempts] == [["a", "b"]] * 3


def test_after_the_last_attempt_the_messages_are_failed() -> None:
    provider, repository, sink = Scripted(*[FastSmsingError("busy")] * 3), InMemoryRepository(), Sink()
    with batching(provider, sink, repository=repository, hurry=Waits(), batch_size=2, max_attempts=3) as client:
        send(client, "a", "b")
        sink.next()
        assert [repository.get("a"), repository.get("b")] == [FAILED, FAILED]
    assert len(provider.attempts) == 3


@pytest.mark.parametrize("max_attempts", [1, 0, -5])
def test_max_attempts_of_one_or_less_is_one_attempt(max_attempts: int) -> None:
    provider, repository = Scripted(FastSmsingError("busy")), InMemoryRepository()
    with batching(provider, repository=repository, batch_size=1, max_attempts=max_attempts) as client:
        send(client, "a")
    assert (len(provider.attempts), repository.get("a")) == (1, FAILED)


def test_a_rejected_batch_is_not_sent_again() -> None:
    provider, repository, waits = Scripted(RejectedError("blocked")), InMemoryRepository(), Waits()
    with batching(provider, repository=repository, hurry=waits, batch_size=1, max_attempts=3) as client:
        send(client, "a")
    assert (len(provider.attempts), repository.get("a"), waits.asked) == (1, FAILED, [])


def test_a_rejection_after_a_failure_ends_the_tries() -> None:
    provider, repository = Scripted(FastSmsingError("busy"), RejectedError("blocked")), InMemoryRepository()
    with batching(provider, repository=repository, hurry=Waits(), batch_size=1, max_attempts=5) as client:
        send(client, "a")
    assert (len(provider.attempts), repository.get("a")) == (2, FAILED)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_whatever_the_provider_raises_is_a_failed_attempt(error: BaseException) -> None:
    provider = Scripted(error, None)
    with batching(provider, hurry=Waits(), batch_size=1, senders=1) as client:
        send(client, "a", "b")
        provider.wait_for(lambda batches: len(batches) == 2)
        assert client.health() == []
    assert provider.ids == ["a", "b"]


def test_the_wait_before_each_retry_has_full_jitter_under_a_doubling_ceiling() -> None:
    provider, waits = Scripted(*[FastSmsingError("busy")] * 6), Waits()
    options: dict[str, Any] = {"max_attempts": 6, "backoff_base": 0.1, "backoff_max": 1.0}
    with batching(provider, hurry=waits, rng=lambda: 0.5, batch_size=1, **options) as client:
        send(client, "a")
    assert waits.asked == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize(("draw", "wait"), [(0.0, 0.0), (0.25, 0.5), (1.0, 2.0)])
def test_the_jitter_covers_everything_from_zero_to_the_ceiling(draw: float, wait: float) -> None:
    provider, waits = Scripted(FastSmsingError("busy")), Waits()
    with batching(provider, hurry=waits, rng=lambda: draw, batch_size=1, backoff_base=2.0) as client:
        send(client, "a")
    assert waits.asked == [wait]


def test_every_wait_draws_anew() -> None:
    provider, waits, draws = Scripted(*[FastSmsingError("busy")] * 2), Waits(), iter([0.75, 0.25])
    with batching(provider, hurry=waits, rng=lambda: next(draws), batch_size=1, backoff_base=1.0) as client:
        send(client, "a")
    assert waits.asked == [0.75, 0.5]


def test_there_is_no_wait_after_the_last_attempt() -> None:
    provider, waits = Scripted(*[FastSmsingError("busy")] * 2), Waits()
    with batching(provider, hurry=waits, batch_size=1, max_attempts=2) as client:
        send(client, "a")
    assert len(waits.asked) == 1


def test_thousands_of_attempts_do_not_overflow_the_backoff() -> None:
    provider, waits = Scripted(*[FastSmsingError("busy")] * 1_999), Waits()
    with batching(provider, hurry=waits, rng=lambda: 1.0, batch_size=1, max_attempts=2_000, backoff_max=10) as client:
        send(client, "a")
        provider.wait_for(lambda batches: len(batches) == 1)
    assert max(wait or 0.0 for wait in waits.asked) == 10


def test_the_wait_that_the_provider_asks_for_is_a_minimum() -> None:
    provider, waits = Scripted(FastSmsingError("busy", retry_after=30.0)), Waits()
    with batching(provider, hurry=waits, rng=lambda: 1.0, batch_size=1, backoff_base=0.1) as client:
        send(client, "a")
    assert waits.asked == [30.0]


def test_a_backoff_longer_than_the_wait_asked_for_stays() -> None:
    provider, waits = Scripted(FastSmsingError("busy", retry_after=1.0)), Waits()
    with batching(provider, hurry=waits, rng=lambda: 1.0, batch_size=1, backoff_base=5.0) as client:
        send(client, "a")
    assert waits.asked == [5.0]


def test_the_provider_cannot_ask_for_more_than_an_hour() -> None:
    provider, waits = Scripted(FastSmsingError("busy", retry_after=1e9)), Waits()
    with batching(provider, hurry=waits, batch_size=1) as client:
        send(client, "a")
    assert waits.asked == [3_600.0]


@pytest.mark.parametrize("retry_after", [None, "30", [], float("nan"), -1])
def test_a_senseless_retry_after_costs_no_message_and_no_hour(retry_after: Any) -> None:
    provider, waits = Scripted(FastSmsingError("busy", retry_after=retry_after)), Waits()
    with batching(provider, hurry=waits, batch_size=1, backoff_base=0.1) as client:
        send(client, "a")
    assert (len(provider.attempts), provider.ids) == (2, ["a"])
    assert [wait for wait in waits.asked if wait is None or not 0 <= wait <= 30] == []


class Unprintable(FastSmsingError):
    def __str__(self) -> str:
        raise RuntimeError(f"no words for the message to {NUMBER}")


def test_an_error_without_words_costs_no_message() -> None:
    provider = Scripted(Unprintable(), None)
    with batching(provider, hurry=Waits(), batch_size=1) as client:
        send(client, "a")
    assert provider.ids == ["a"]


def test_an_error_without_words_is_no_request_in_flight_for_ever() -> None:
    provider, sink = Scripted(Unprintable(), None), Sink()
    with batching(provider, sink, hurry=Waits(), batch_size=1, senders=1) as client:
        send(client, "a", "b")
        provider.wait_for(lambda batches: "b" in provider.ids)
        client.stop(HANG)
        assert client.gauges()["smsproxy_provider_requests_in_flight"] == 0


def test_an_error_without_words_reveals_no_number(caplog: pytest.LogCaptureFixture) -> None:
    with batching(Scripted(Unprintable()), hurry=Waits(), batch_size=1) as client:
        send(client, "a")
    assert NUMBER not in caplog.text


def test_a_batch_in_backoff_lets_the_others_pass() -> None:
    provider = Scripted(FastSmsingError("busy"))
    with batching(provider, batch_size=1, senders=2, backoff_base=3_600, backoff_max=3_600, rng=lambda: 1.0) as client:
        send(client, "a")
        send(client, "b")
        provider.wait_for(lambda batches: len(batches) == 1)
        assert len(provider.ids) == 1
    assert sorted(provider.ids) == ["a", "b"]


def test_with_one_sender_a_retry_does_not_break_the_order() -> None:
    provider = Scripted(FastSmsingError("busy"))
    with batching(provider, hurry=Waits(), batch_size=2, senders=1, max_delay=None) as client:
        send(client, *names(6))
        provider.wait_for(lambda batches: len(batches) == 3)
    assert provider.ids == names(6)


# Giving up


def test_giving_up_is_logged_by_id_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with batching(Scripted(RejectedError("account is blocked")), batch_size=2) as client:
        send(client, "id-one", "id-two")
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    for words in ("id-one", "id-two", "rejected", "account is blocked"):
        assert words in record.getMessage()


def private(caplog: pytest.LogCaptureFixture, error: BaseException, *messages: tuple[str, str]) -> str:
    """Everything that is logged while a batch of these messages fails with the error until it is given up."""
    provider = Scripted(*[error] * 3)
    with caplog.at_level(logging.DEBUG), batching(provider, hurry=Waits(), batch_size=len(messages)) as client:
        for index, (phone_number, text) in enumerate(messages):
            client.send(SendMessage(phone_number, text), f"id-{index}")
    assert "gave up" in caplog.text and "id-0" in caplog.text
    return caplog.text


@pytest.mark.parametrize("kind", [FastSmsingError, RejectedError, RuntimeError, SystemExit])
def test_neither_number_nor_text_is_logged_when_the_error_has_them(
    caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    error = kind("cannot send 'your code is 9876' to +48600700800, retrying")
    logged = private(caplog, error, ("48600700800", "your code is 9876"))
    assert [secret for secret in ("48600700800", "9876") if secret in logged] == []


def test_the_numbers_of_a_whole_batch_stay_private_when_the_error_lists_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    messages = [(f"4860070080{digit}", f"secret {digit}") for digit in range(5)]
    logged = private(caplog, FastSmsingError(f"cannot send {messages}"), *messages)
    assert [secret for message in messages for secret in message if secret in logged] == []


def test_a_text_that_is_part_of_a_number_does_not_reveal_the_rest_of_it(caplog: pytest.LogCaptureFixture) -> None:
    error = FastSmsingError("cannot send to 48600700899")
    logged = private(caplog, error, ("111", "4860"), ("48600700899", "hello"))
    assert "0700899" not in logged


def test_a_number_that_is_part_of_a_longer_one_does_not_reveal_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    logged = private(caplog, FastSmsingError("cannot send to 48600700899"), ("4860", "hi"), ("48600700899", "hello"))
    assert "0700899" not in logged


@pytest.mark.parametrize("text", ["first\nsecond line", "it's \"quoted\"", "tab\tand\\slash", "zażółć\u200b"])
@pytest.mark.parametrize("wording", [repr, json.dumps, lambda text: str(KeyError(text)), lambda text: str({"t": text})])
def test_a_text_stays_private_however_the_error_spells_it(
    caplog: pytest.LogCaptureFixture, text: str, wording: Callable[[str], str]
) -> None:
    spelled = wording(f"begin {text} end")
    logged = private(caplog, FastSmsingError(f"cannot send {spelled}"), ("48600700800", f"begin {text} end"))
    assert "begin" not in logged


def test_an_error_of_giant_words_is_logged_in_short(caplog: pytest.LogCaptureFixture) -> None:
    logged = private(caplog, FastSmsingError("x" * 1_000_000), ("48600700800", "hello"))
    assert len(logged) < 10_000


def test_the_numbers_of_a_handed_over_batch_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), batching(Recorder(), batch_size=1) as client:
        client.send(SendMessage("48600700800", "your code is 9876"), "the-id")
    assert "the-id" in caplog.text
    assert [secret for secret in ("48600700800", "9876") if secret in caplog.text] == []


def test_a_status_that_arrived_before_the_error_is_not_overwritten_by_giving_up() -> None:
    repository, sink = InMemoryRepository(), Sink()

    class Late(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            repository.update("a", DELIVERED)
            raise RejectedError("answered too late")

    with batching(Late(), sink, repository=repository, batch_size=2) as client:
        send(client, "a", "b")
        sink.next()
    assert [repository.get("a"), repository.get("b")] == [DELIVERED, FAILED]


def test_a_confirmed_message_that_is_given_up_is_failed() -> None:
    repository = InMemoryRepository()

    class Confirming(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            repository.update("a", MessageStatus.CONFIRMED)
            raise RejectedError("changed its mind")

    with batching(Confirming(), repository=repository, batch_size=1) as client:
        send(client, "a")
    assert repository.get("a") is FAILED


def test_a_repository_that_raises_on_give_up_stops_nothing() -> None:
    provider = Scripted(RejectedError("blocked"))
    with batching(provider, repository=Broken(update=RuntimeError("disk on fire")), batch_size=1, senders=1) as client:
        send(client, "a", "b")
        provider.wait_for(lambda batches: len(batches) == 1)
        assert client.health() == []
    assert provider.ids == ["b"]


# Age


def test_a_message_too_old_before_the_first_try_is_never_sent() -> None:
    provider, repository, clock, condition = Recorder(), InMemoryRepository(), Clock(), Watched()
    options: dict[str, Any] = {"batch_size": 2, "max_delay": None, "senders": 1, "max_age": 60.0}
    with batching(provider, repository=repository, clock=clock, condition=condition, **options) as client:
        send(client, "old")
        clock.now += 60.5
        send(client, "young")
        provider.wait_for(lambda batches: len(batches) == 1)
    assert (provider.ids, repository.get("old"), repository.get("young")) == (["young"], FAILED, ACCEPTED)


def test_a_message_exactly_of_the_greatest_age_is_still_sent() -> None:
    provider, clock = Recorder(), Clock()
    with batching(provider, clock=clock, batch_size=2, max_delay=None, senders=1, max_age=60.0) as client:
        send(client, "old")
        clock.now += 60.0
        send(client, "young")
    assert provider.ids == ["old", "young"]


def test_a_batch_of_old_messages_alone_is_no_request() -> None:
    provider, repository, clock = Recorder(), InMemoryRepository(), Clock()
    with batching(provider, repository=repository, clock=clock, batch_size=9, max_delay=None, max_age=60.0) as client:
        send(client, "a", "b")
        clock.now += 61
        assert client.stop(HANG) == 0
    assert (provider.batches, repository.get("a"), repository.get("b")) == ([], FAILED, FAILED)


class Ageing(Scripted):
    """A provider double whose every request takes a minute."""

    def __init__(self, clock: Clock, *script: BaseException | None) -> None:
        super().__init__(*script)
        self._clock = clock

    def send(self, messages: Sequence[Message]) -> None:
        self._clock.now += 60
        super().send(messages)


def test_a_message_that_grows_too_old_between_tries_is_not_sent_again() -> None:
    clock, repository, sink, error = Clock(), InMemoryRepository(), Sink(), FastSmsingError("busy")
    provider = Ageing(clock, error)
    options: dict[str, Any] = {"batch_size": 2, "max_delay": None, "max_age": 90.0, "max_attempts": 3}
    with batching(provider, sink, repository=repository, clock=clock, hurry=Waits(), **options) as client:
        send(client, "old")
        clock.now += 45
        send(client, "young")
        sink.next()
    assert [[message.message_id for message in batch] for batch in provider.attempts] == [["old", "young"], ["young"]]
    assert (repository.get("old"), repository.get("young")) == (FAILED, ACCEPTED)


def test_a_batch_that_expires_between_tries_reports_its_last_error() -> None:
    clock, sink, error = Clock(), Sink(), FastSmsingError("busy")
    provider = Ageing(clock, error)
    with batching(provider, sink, clock=clock, hurry=Waits(), batch_size=1, max_age=30.0, max_attempts=3) as client:
        send(client, "a")
        result = sink.next()
    assert (result.error, result.attempt, result.max_attempts) == (error, 1, 3)


def test_expiry_is_logged_by_id_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with batching(Recorder(), clock=clock, batch_size=9, max_delay=None, max_age=60.0) as client:
        send(client, "the-id")
        clock.now += 61
    assert "the-id" in caplog.text and "expired" in caplog.text


def test_without_max_age_any_message_is_sent() -> None:
    provider, clock = Recorder(), Clock()
    with batching(provider, clock=clock, batch_size=9, max_delay=None) as client:
        send(client, "a")
        clock.now += 1e9
    assert provider.ids == ["a"]


# Results


def test_a_batch_that_was_taken_is_one_result_without_error() -> None:
    sink = Sink()
    with batching(Recorder(), sink, batch_size=2, max_attempts=3) as client:
        send(client, "a", "b")
    [result] = sink.rest()
    assert ([message.message_id for message in result.messages], result.error) == (["a", "b"], None)
    assert (result.attempt, result.max_attempts) == (1, 3)


def test_the_result_tells_the_attempt_that_succeeded() -> None:
    provider, sink = Scripted(FastSmsingError("busy"), FastSmsingError("busy")), Sink()
    with batching(provider, sink, hurry=Waits(), batch_size=1, max_attempts=5) as client:
        send(client, "a")
    [result] = sink.rest()
    assert (result.error, result.attempt, result.max_attempts) == (None, 3, 5)


def test_the_result_of_a_batch_given_up_has_the_last_error() -> None:
    first, last, sink = FastSmsingError("first"), FastSmsingError("last"), Sink()
    with batching(Scripted(first, last), sink, hurry=Waits(), batch_size=1, max_attempts=2) as client:
        send(client, "a")
    [result] = sink.rest()
    assert (result.error, result.attempt, result.max_attempts) == (last, 2, 2)


def test_the_result_of_a_rejected_batch_tells_the_attempt() -> None:
    rejection, sink = RejectedError("blocked"), Sink()
    with batching(Scripted(rejection), sink, batch_size=1, max_attempts=3) as client:
        send(client, "a")
    [result] = sink.rest()
    assert (result.error, result.attempt, result.max_attempts) == (rejection, 1, 3)


def test_every_batch_is_one_result() -> None:
    provider, sink = Scripted(*[FastSmsingError("busy"), None] * 5, RejectedError("no")), Sink()
    with batching(provider, sink, hurry=Waits(), batch_size=2, max_delay=None, senders=1) as client:
        send(client, *names(20))
    assert Counter(result.error is None for result in sink.rest()) == {True: 9, False: 1}


def test_a_sink_that_raises_gets_the_next_result_all_the_same() -> None:
    sink = Sink(RuntimeError("sink is broken"))
    with batching(Recorder(), sink, batch_size=1) as client:
        send(client, *names(5))
        assert len([sink.next() for _ in range(5)]) == 5
        assert client.health() == []


def test_results_are_dropped_and_nothing_blocks_when_the_sink_is_stuck_and_its_queue_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smsproxy, "RESULTS_WAITING", 3)
    provider, sink, condition = Recorder(), StuckSink(), Watched()
    with batching(provider, sink, condition=condition, batch_size=1) as client:
        with opening(sink.opened):
            send(client, "first")
            assert sink.entered.wait(HANG)
            send(client, *names(20))
            provider.wait_for(lambda batches: len(batches) == 21)
            condition.settled(4)
    assert (len(sink.results), caplog.text.count("dropped")) == (4, 17)


def test_what_a_sink_raises_reveals_neither_number_nor_text(caplog: pytest.LogCaptureFixture) -> None:
    class Complaining(Sink):
        def send(self, result: ClientResult) -> None:
            super().send(result)
            raise RuntimeError(f"cannot store {result}") from result.error

    sink = Complaining()
    with batching(Scripted(RejectedError(f"no 'your code is 9876' to {NUMBER}")), sink, batch_size=1) as client:
        client.send(SendMessage(NUMBER, "your code is 9876"), "a")
    assert len(sink.rest()) == 1
    assert [secret for secret in (NUMBER, "9876") if secret in caplog.text] == []


# Stopping


def test_stop_sends_an_incomplete_batch() -> None:
    provider = Recorder()
    with batching(provider, batch_size=10, max_delay=None) as client:
        send(client, "a", "b")
        assert stop_in_a_thread(client, HANG) == 0
        assert provider.ids == ["a", "b"]


def test_stop_drains_everything_in_batches() -> None:
    gate = Gate()
    with batching(gate, batch_size=3, max_delay=None, senders=1) as client, opening(gate.opened):
        send(client, *names(8))
        gate.opened.set()
        assert stop_in_a_thread(client, HANG) == 0
    assert sizes(gate) == [3, 3, 2]


def test_stop_without_a_time_limit_waits_until_all_is_handed_over() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, senders=2) as client, opening(gate.opened):
        send(client, *names(4))
        gate.wait_entered(2)
        together(lambda: client.stop(None), gate.opened.set)
    assert sorted(gate.ids) == names(4)


def test_stop_of_a_client_that_was_never_used_returns_at_once() -> None:
    with batching(Recorder(), Sink()) as client:
        assert stop_in_a_thread(client, None) == 0


def test_a_second_stop_waits_no_more_and_returns_the_same() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, senders=1) as client, opening(gate.opened):
        send(client, "a", "b")
        gate.wait_entered()
        assert [stop_in_a_thread(client, 0.0), stop_in_a_thread(client, None)] == [2, 2]


def test_stop_returns_although_the_provider_hangs_and_tells_what_is_left() -> None:
    gate = Gate()
    with batching(gate, batch_size=2, senders=1, max_delay=None) as client, opening(gate.opened):
        send(client, *names(5))
        gate.wait_entered()
        assert stop_in_a_thread(client, 0.05) == 5


def test_what_a_stop_leaves_is_logged_by_id(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    with batching(gate, batch_size=1, senders=1) as client, opening(gate.opened):
        send(client, "id-in-request", "id-in-queue")
        gate.wait_entered()
        stop_in_a_thread(client, 0.0)
        assert "id-in-request" in caplog.text and "id-in-queue" in caplog.text


def test_after_a_stop_that_left_messages_no_further_request_is_made() -> None:
    gate = Gate()
    with batching(gate, batch_size=1, senders=1) as client:
        with opening(gate.opened):
            send(client, "a", "b")
            gate.wait_entered()
            stop_in_a_thread(client, 0.0)
    assert gate.ids in ([], ["a"])


def test_stop_cuts_a_backoff_short() -> None:
    provider, repository = Scripted(FastSmsingError("busy")), InMemoryRepository()
    entered = threading.Event()

    def draw() -> float:
        entered.set()
        return 1.0

    options: dict[str, Any] = {"batch_size": 1, "backoff_base": 1e6, "backoff_max": 1e6}
    with batching(provider, repository=repository, rng=draw, **options) as client:
        send(client, "a")
        assert entered.wait(HANG)
        assert stop_in_a_thread(client, None) == 0
    assert provider.ids == ["a"]


def test_stop_cuts_the_wait_that_the_provider_asked_for_short() -> None:
    provider, entered = Scripted(FastSmsingError("busy", retry_after=3_000)), threading.Event()

    def draw() -> float:
        entered.set()
        return 0.0

    with batching(provider, rng=draw, batch_size=1) as client:
        send(client, "a")
        assert entered.wait(HANG)
        assert stop_in_a_thread(client, None) == 0
    assert provider.ids == ["a"]


def test_a_batch_that_fails_throughout_a_stop_is_given_up() -> None:
    provider, repository = Scripted(*[FastSmsingError("busy")] * 3), InMemoryRepository()
    options: dict[str, Any] = {"batch_size": 9, "max_delay": None, "backoff_base": 1e6, "backoff_max": 1e6}
    with batching(provider, repository=repository, max_attempts=3, **options) as client:
        send(client, "a")
        assert stop_in_a_thread(client, None) == 0
    assert (len(provider.attempts), repository.get("a")) == (3, FAILED)


def test_stop_returns_although_the_statistics_sink_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smsproxy, "GRACE", 0.01)
    sink = StuckSink()
    with batching(Recorder(), sink, batch_size=1) as client, opening(sink.opened):
        send(client, "a")
        assert sink.entered.wait(HANG)
        assert stop_in_a_thread(client, 0.0) == 0


def test_a_message_that_is_being_saved_when_stop_comes_is_still_sent() -> None:
    saving, saved, provider = threading.Event(), threading.Event(), Recorder()

    class Slow(InMemoryRepository):
        def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
            saving.set()
            assert saved.wait(HANG)
            super().save(message_id, message, fingerprint)

    returned, hurry = queue.Queue[int](), threading.Event()
    with batching(provider, repository=Slow(), hurry=hurry, batch_size=9, max_delay=None) as client, opening(saved):
        accepting = threading.Thread(target=send, args=(client, "a"), daemon=True)
        accepting.start()
        assert saving.wait(HANG)
        stopping = threading.Thread(target=lambda: returned.put(client.stop(None)), daemon=True)
        stopping.start()
        assert hurry.wait(HANG)  # stop was called
        saved.set()
        assert returned.get(timeout=HANG) == 0
    assert provider.ids == ["a"]


def test_a_message_that_is_not_saved_in_time_counts_as_left() -> None:
    saving, saved = threading.Event(), threading.Event()

    class Stuck(InMemoryRepository):
        def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
            saving.set()
            assert saved.wait(HANG)
            super().save(message_id, message, fingerprint)

    with batching(Recorder(), repository=Stuck()) as client, opening(saved):
        threading.Thread(target=send, args=(client, "a"), daemon=True).start()
        assert saving.wait(HANG)
        assert stop_in_a_thread(client, 0.0) == 1
        saved.set()


def test_stop_while_many_threads_send_loses_nothing_that_was_accepted() -> None:
    for round_ in range(20):
        provider, accepted = Recorder(), queue.Queue[str]()

        def work(prefix: str, client: SimpleBatchingClient, accepted: queue.Queue[str] = accepted) -> None:
            with contextlib.suppress(ClosedError):
                for message_id in names(100, prefix):
                    send(client, message_id)
                    accepted.put(message_id)

        with batching(provider, batch_size=7, max_delay=None) as client:
            works = [lambda prefix=f"{thread}-", client=client: work(prefix, client) for thread in range(4)]
            together(*works, lambda client=client: client.stop(HANG))
        assert sorted(provider.ids) == sorted(accepted.queue)


# Durable


def test_a_batch_leaves_the_outbox_when_the_provider_took_it() -> None:
    repository = Outbox()
    with batching(Recorder(), repository=repository, batch_size=2) as client:
        send(client, "a", "b")
    assert (repository.waiting, repository.calls) == ({}, ["handed_over"])


def test_handing_over_is_recorded_before_anything_else_is_said_of_the_batch() -> None:
    repository, seen = Outbox(), list[list[str]]()

    class Looking(Sink):
        def send(self, result: ClientResult) -> None:
            seen.append(list(repository.calls))
            super().send(result)

    sink = Looking()
    with batching(Recorder(), sink, repository=repository, batch_size=1) as client:
        send(client, "a")
    assert seen == [["handed_over"]]


def test_a_repository_that_cannot_write_is_asked_again_until_it_can() -> None:
    refusals = [RepositoryUnavailableError("disk full")] * 5
    repository, sink, waits, provider = Outbox(*refusals), Sink(), Waits(), Recorder()
    with batching(provider, sink, repository=repository, hurry=waits, batch_size=1) as client:
        send(client, "a")
        assert sink.next().error is None
    assert (repository.waiting, repository.calls) == ({}, ["handed_over"] * 6)
    assert waits.asked == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])


def test_a_batch_whose_handing_over_is_not_recorded_is_not_sent_again_by_this_process() -> None:
    repository, provider, sink = Outbox(*[RepositoryUnavailableError("disk full")] * 3), Recorder(), Sink()
    with batching(provider, sink, repository=repository, hurry=Waits(), batch_size=1) as client:
        send(client, "a")
        sink.next()
    assert provider.ids == ["a"]


@pytest.mark.parametrize("error", [RepositoryUnavailableError("disk full"), RuntimeError("a bug")])
def test_a_handing_over_that_cannot_be_recorded_is_a_result_all_the_same(error: Exception) -> None:
    repository, gate, sink, hurry = Outbox(error), Gate(), Sink(), threading.Event()
    with batching(gate, sink, repository=repository, hurry=hurry, batch_size=1) as client, opening(gate.opened):
        send(client, "a")
        gate.wait_entered()
        together(lambda: client.stop(HANG), lambda: hurry.wait(HANG) and gate.opened.set())
    assert [result.error for result in sink.rest()] == [None]


def test_giving_up_is_recorded_once_the_repository_can_write_again() -> None:
    repository, sink = Outbox(*[RepositoryUnavailableError("disk full")] * 3), Sink()
    with batching(Scripted(RejectedError("no")), sink, repository=repository, hurry=Waits(), batch_size=2) as client:
        send(client, "a", "b")
        sink.next()
    assert ([repository.get("a"), repository.get("b")], repository.waiting) == ([FAILED, FAILED], {})


def test_a_repository_that_breaks_on_give_up_kills_no_sender() -> None:
    provider, sink = Scripted(RejectedError("no")), Sink()
    with batching(provider, sink, repository=Outbox(RuntimeError("a bug")), batch_size=1, senders=1) as client:
        send(client, "a", "b")
        provider.wait_for(lambda batches: len(batches) == 1)
        assert client.health() == []
    assert len(sink.rest()) == 2


def test_a_stop_leaves_what_the_provider_does_not_take_in_the_outbox(caplog: pytest.LogCaptureFixture) -> None:
    repository, provider = Outbox(), Scripted(*[FastSmsingError("down")] * 3)
    options: dict[str, Any] = {"batch_size": 9, "max_delay": None, "max_attempts": 3}
    with batching(provider, repository=repository, **options) as client:
        send(client, "a", "b")
        assert stop_in_a_thread(client, None) == 2
    assert ([repository.get("a"), repository.get("b")], list(repository.waiting)) == ([ACCEPTED] * 2, ["a", "b"])
    assert "left 2 messages in the outbox for the next start: a b" in caplog.text


def test_what_is_rejected_during_a_stop_is_failed_and_not_left() -> None:
    repository, provider = Outbox(), Scripted(RejectedError("no"))
    with batching(provider, repository=repository, batch_size=9, max_delay=None) as client:
        send(client, "a")
        assert stop_in_a_thread(client, None) == 0
    assert (repository.get("a"), repository.waiting) == (FAILED, {})


def test_a_stop_sends_the_batches_behind_one_that_is_left() -> None:
    repository, provider = Outbox(), Scripted(*[FastSmsingError("down")] * 2)
    options: dict[str, Any] = {"batch_size": 2, "max_delay": None, "max_attempts": 2, "senders": 1}
    with batching(provider, repository=repository, **options) as client:
        send(client, "a", "b", "c")
        assert stop_in_a_thread(client, None) == 2
    assert (provider.ids, list(repository.waiting)) == (["c"], ["a", "b"])


def restored(*ages: float) -> list[tuple[float, Message]]:
    now = time.time()
    return [(now - age, Message(NUMBER, "hello", f"{age:g} s old")) for age in ages]


def test_restored_messages_are_sent_in_order_before_new_ones() -> None:
    provider, repository = Recorder(), Outbox()
    with batching(provider, repository=repository, batch_size=2, max_delay=None, senders=1) as client:
        assert client.restore(restored(30, 20, 10)) == 3
        send(client, "new")
        provider.wait_for(lambda batches: len(batches) == 2)
    assert provider.ids == ["30 s old", "20 s old", "10 s old", "new"]


def test_restored_messages_that_have_lingered_already_leave_at_once() -> None:
    provider = Recorder()
    with batching(provider, repository=Outbox(), batch_size=10, max_delay=5.0) as client:
        client.restore(restored(30))
        provider.wait_for(lambda batches: len(batches) == 1)


def test_restored_messages_leave_in_batches_of_max_batch_size_at_most() -> None:
    provider = Recorder()
    with batching(provider, repository=Outbox(), batch_size=4, max_delay=None, senders=1) as client:
        client.restore(restored(*range(100, 90, -1)))
    assert sizes(provider) == [4, 4, 2]


def test_restored_messages_are_never_refused_and_count_as_pending() -> None:
    gate = Gate()
    with batching(gate, repository=Outbox(), batch_size=2, max_pending=2) as client, opening(gate.opened):
        assert client.restore(restored(30, 20, 10)) == 3
        with pytest.raises(OverloadedError):
            send(client, "new")


def test_restored_messages_occupy_every_sender() -> None:
    gate = Gate()
    with batching(gate, repository=Outbox(), batch_size=2, senders=3) as client, opening(gate.opened):
        client.restore(restored(60, 50, 40, 30, 20, 10))
        gate.wait_entered(3)


def test_max_age_applies_to_restored_messages() -> None:
    provider, repository = Recorder(), Outbox()
    for _, message in restored(100, 10):
        repository.save(message.message_id, message)
    with batching(provider, repository=repository, batch_size=1, senders=1, max_age=50) as client:
        client.restore(restored(100, 10))
        provider.wait_for(lambda batches: len(batches) == 1)
    assert (provider.ids, repository.get("100 s old")) == (["10 s old"], FAILED)


def test_a_clock_that_was_set_back_does_not_make_restored_messages_younger_than_new() -> None:
    clock = Clock()
    with batching(Recorder(), repository=Outbox(), clock=clock, batch_size=9, max_delay=None) as client:
        client.restore(restored(-1_000))
        assert client.gauges()["smsproxy_oldest_pending_message_age_seconds"] == 0


# Watching


def test_gauges_of_an_unused_client_are_zero() -> None:
    with batching(Recorder()) as client:
        assert set(client.gauges().values()) == {0}


def test_gauges_tell_what_is_pending_and_in_flight() -> None:
    gate, clock = Gate(), Clock()
    with batching(gate, clock=clock, batch_size=2, max_delay=None, senders=1) as client, opening(gate.opened):
        send(client, "a")
        clock.now += 3
        send(client, "b", "c")
        gate.wait_entered()
        clock.now += 4
        assert client.gauges() == {
            "smsproxy_messages_accepted_total": 3,
            "smsproxy_pending_messages": 3,
            "smsproxy_oldest_pending_message_age_seconds": 7,
            "smsproxy_provider_requests_in_flight": 1,
        }


def test_gauges_return_to_zero_whatever_became_of_the_messages() -> None:
    provider = Scripted(None, RejectedError("no"), FastSmsingError("busy"), SystemExit(), None)
    with batching(provider, hurry=Waits(), batch_size=1) as client:
        send(client, *names(4))
        assert client.stop(HANG) == 0
        assert client.gauges() == {
            "smsproxy_messages_accepted_total": 4,
            "smsproxy_pending_messages": 0,
            "smsproxy_oldest_pending_message_age_seconds": 0,
            "smsproxy_provider_requests_in_flight": 0,
        }


def test_a_client_at_work_is_healthy() -> None:
    with batching(Recorder(), Sink()) as client:
        send(client, "a")
        assert client.health() == []


def test_a_full_queue_is_unhealthy() -> None:
    gate = Gate()
    with batching(gate, batch_size=2, max_pending=2, max_delay=None) as client, opening(gate.opened):
        send(client, "a", "b")
        assert client.health() == ["queue full"]


def test_a_message_that_does_not_leave_is_unhealthy() -> None:
    gate, clock = Gate(), Clock()
    with batching(gate, clock=clock, batch_size=1, max_delay=5.0) as client, opening(gate.opened):
        send(client, "a")
        clock.now += 65
        assert client.health() == []
        clock.now += 0.5
        assert client.health() == ["oldest pending message older than 65 s"]


def test_a_stopped_client_is_unhealthy() -> None:
    with batching(Recorder(), Sink(), batch_size=1) as client:
        send(client, "a")
        client.stop(HANG)
        assert client.health() == ["shutting down"]


def test_requests_batches_and_savings_are_counted() -> None:
    metrics = Metrics()
    provider = Scripted(FastSmsingError("busy"), None, RejectedError("no"))
    with batching(provider, metrics=metrics, hurry=Waits(), batch_size=3, max_delay=None, senders=1) as client:
        send(client, *names(6))
    counts = metrics.counts()
    assert {
        (name, label): count for (name, label), count in counts.items() if name.endswith("_total")
    } == {
        ("smsproxy_provider_requests_total", "error"): 1,
        ("smsproxy_provider_requests_total", "ok"): 1,
        ("smsproxy_provider_requests_total", "rejected"): 1,
        ("smsproxy_batches_total", "handed_over"): 1,
        ("smsproxy_batches_total", "given_up"): 1,
        ("smsproxy_messages_handed_over_total", ""): 3,
        ("smsproxy_requests_saved_total", ""): 2,
        ("smsproxy_messages_given_up_total", "rejected"): 3,
        ("smsproxy_messages_final_total", "FAILED"): 3,
    }
    assert (counts["smsproxy_batch_messages", 5], counts["smsproxy_batch_messages_sum", ""]) == (2, 6)


# Random schedules


class Ledger:
    """A repository double that sometimes cannot save, and keeps count of what is stored and not at its end."""

    def __init__(self, rng: random.Random, failing: float) -> None:
        self._inner, self._rng, self._failing = InMemoryRepository(), rng, failing
        self._lock = threading.Lock()
        self._open = 0
        self.most_open = 0

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        with self._lock:
            if self._rng.random() < self._failing:
                raise RuntimeError("cannot save")
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        self._inner.save(message_id, message, fingerprint)

    def get(self, message_id: str) -> MessageStatus:
        return self._inner.get(message_id)

    def update(self, message_id: str, status: MessageStatus) -> None:
        self._inner.update(message_id, status)
        self.ended(1)

    def ended(self, count: int) -> None:
        with self._lock:
            self._open -= count


class Chaos:
    """A provider double that fails at random in many ways, and keeps watch over what it is asked."""

    def __init__(self, rng: random.Random, failing: float, ledger: Ledger) -> None:
        self._rng, self._failing, self._ledger = rng, failing, ledger
        self._lock = threading.Lock()
        self._now: set[str] = set()
        self._running = 0
        self.most_running = 0
        self.batches: list[list[str]] = []
        self.taken: list[str] = []
        self.attempts: Counter[str] = Counter()
        self.in_two_batches: set[str] = set()

    def send(self, messages: Sequence[Message]) -> None:
        message_ids = [message.message_id for message in messages]
        with self._lock:
            self._running += 1
            self.most_running = max(self.most_running, self._running)
            self.in_two_batches |= self._now.intersection(message_ids)
            self._now.update(message_ids)
            self.batches.append(message_ids)
            self.attempts.update(message_ids)
            fails = self._rng.random() < self._failing
            error = self._rng.choice([FastSmsingError, RejectedError, OSError, SystemExit, KeyboardInterrupt])
        try:
            if fails:
                raise error("no luck")
            self._ledger.ended(len(message_ids))
            with self._lock:
                self.taken += message_ids
        finally:
            with self._lock:
                self._running -= 1
                self._now.difference_update(message_ids)

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class RandomSink(Sink):
    """A statistics sink that raises at random."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def send(self, result: ClientResult) -> None:
        super().send(result)
        if self._rng.random() < 0.5:
            raise RuntimeError("no luck")


@dataclass
class Played:
    """What came of one round."""

    settings: SmsProxyConfig
    accepted: list[list[str]]  # by thread, in order
    refused: list[str]
    provider: Chaos
    ledger: Ledger
    results: list[ClientResult]
    health: list[str]
    left: int
    sent: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.sent = [message_id for message_ids in self.accepted for message_id in message_ids]


def play(seed: int, *, failing: float = 0.3, stop_meanwhile: bool = False, **fixed: Any) -> Played:
    """One round: several threads send, flush and are refused as a seeded random schedule says; then a stop."""
    rng = random.Random(seed)
    batch_size = rng.randint(1, 8)
    settings = SmsProxyConfig(**{
        "batch_size": batch_size, "max_batch_size": batch_size + rng.choice([0, 0, 1, 5, 50]),
        "max_delay": rng.choice([None, 0, 0.0005, 5.0]), "senders": rng.randint(1, 4),
        "max_pending": batch_size + rng.choice([0, 3, 20, 1_000]), "max_attempts": rng.randint(1, 3),
        "backoff_base": rng.choice([0, 0.0005]),
    } | fixed)  # fmt: skip
    ledger = Ledger(random.Random(seed), failing / 3)
    provider = Chaos(random.Random(seed), failing, ledger)
    sink = RandomSink(random.Random(seed)) if failing else Sink()
    client = SimpleBatchingClient(ledger, provider, settings, sink, rng=random.Random(seed).random)
    accepted: list[list[str]] = [[] for _ in range(rng.randint(1, 6))]
    refused: list[str] = []

    def work(thread: int, flushes: frozenset[int], count: int, together: int) -> None:
        for start in range(0, count, together):
            message_ids = names(count, f"{thread}-")[start : start + together]
            try:
                errors = client.send_all(group(*message_ids))
            except ClosedError as error:
                errors = [error] * len(message_ids)
            for message_id, refusal in zip(message_ids, errors):
                (accepted[thread] if refusal is None else refused).append(message_id)
                assert isinstance(refusal, (type(None), OverloadedError, ClosedError, RuntimeError))
            if flushes.intersection(range(start, start + together)):
                client.flush()

    works: list[Callable[[], object]] = []
    for thread in range(len(accepted)):
        count = rng.randint(1, 40)
        flushes = frozenset() if fixed.get("max_delay", 0) is None else frozenset(rng.sample(range(count), count // 8))
        works.append(functools.partial(work, thread, flushes, count, rng.choice([1, 1, 2, 5, 40])))
    if stop_meanwhile:
        works.append(lambda: client.stop(HANG))
    together(*works)
    health = client.health()
    left = stop_in_a_thread(client, HANG)
    return Played(settings, accepted, refused, provider, ledger, sink.rest(), health, left)


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Lets threads take turns a thousand times as often as usual, so that races come out."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


pytestmark = pytest.mark.usefixtures("busy_switching")
ROUNDS = 50


@pytest.mark.parametrize("stop_meanwhile", [False, True])
def test_every_accepted_message_has_exactly_one_outcome(stop_meanwhile: bool) -> None:
    for seed in range(ROUNDS):
        played = play(seed, stop_meanwhile=stop_meanwhile)
        outcomes = Counter(played.provider.taken)
        outcomes.update(message_id for message_id in played.sent if played.ledger.get(message_id) is FAILED)
        assert (outcomes, played.left) == (Counter(played.sent), 0), f"seed {seed}"


def test_what_was_refused_is_neither_stored_nor_sent() -> None:
    for seed in range(ROUNDS):
        played = play(seed, stop_meanwhile=True)
        assert [name for name in played.refused if played.provider.attempts[name]] == [], f"seed {seed}"
        assert {played.ledger.get(name) for name in played.refused} <= {MessageStatus.NOT_FOUND}, f"seed {seed}"


def test_no_message_is_in_two_batches_at_once_or_tried_too_often() -> None:
    for seed in range(1_000, 1_000 + ROUNDS):
        played = play(seed, failing=0.6)
        assert played.provider.in_two_batches == set(), f"seed {seed}"
        assert max(played.provider.attempts.values(), default=0) <= played.settings.max_attempts, f"seed {seed}"


def test_a_retry_has_the_same_messages_as_the_first_try() -> None:
    for seed in range(1_500, 1_500 + ROUNDS):
        played = play(seed, failing=0.6)
        batch_of: dict[str, list[str]] = {}
        for batch in played.provider.batches:
            for message_id in batch:
                assert batch_of.setdefault(message_id, batch) == batch, f"seed {seed}"


def test_no_batch_is_empty_or_larger_than_max_batch_size() -> None:
    for seed in range(2_000, 2_000 + ROUNDS):
        played = play(seed)
        lengths = {len(batch) for batch in played.provider.batches}
        assert lengths <= set(range(1, (played.settings.max_batch_size or 0) + 1)), f"seed {seed}"


def test_without_linger_and_flush_exact_batches_are_as_few_as_can_be() -> None:
    for seed in range(3_000, 3_000 + ROUNDS):
        played = play(seed, failing=0.0, max_delay=None, max_batch_size=None, max_pending=1_000)
        fewest = math.ceil(len(played.sent) / played.settings.batch_size)
        assert len(played.provider.batches) == fewest, f"seed {seed}"


def test_pending_never_exceeds_max_pending() -> None:
    for seed in range(4_000, 4_000 + ROUNDS):
        played = play(seed)
        assert played.ledger.most_open <= played.settings.max_pending, f"seed {seed}"


def test_requests_at_a_time_never_exceed_senders() -> None:
    for seed in range(5_000, 5_000 + ROUNDS):
        played = play(seed)
        assert played.provider.most_running <= played.settings.senders, f"seed {seed}"


def test_one_sender_keeps_the_order_of_every_thread() -> None:
    for seed in range(6_000, 6_000 + ROUNDS):
        played = play(seed, failing=0.0, senders=1)
        for thread, message_ids in enumerate(played.accepted):
            arrived = [name for name in played.provider.taken if name.startswith(f"{thread}-")]
            assert arrived == message_ids, f"seed {seed}"


def test_a_raising_repository_provider_or_sink_kills_no_thread() -> None:
    for seed in range(7_000, 7_000 + ROUNDS):
        assert [reason for reason in play(seed, failing=0.8).health if "dead" in reason] == [], f"seed {seed}"


def test_every_batch_of_a_random_schedule_is_one_result() -> None:
    for seed in range(8_000, 8_000 + ROUNDS):
        played = play(seed)
        reported = Counter(message.message_id for result in played.results for message in result.messages)
        assert reported == Counter(played.sent), f"seed {seed}"


def test_a_stop_without_time_reports_all_that_a_stuck_provider_holds() -> None:
    for seed in range(9_000, 9_000 + ROUNDS):
        rng, gate = random.Random(seed), Gate()
        count = rng.randint(1, 30)
        with batching(gate, batch_size=rng.randint(1, 8), senders=rng.randint(1, 4), max_delay=None) as client:
            with opening(gate.opened):
                send(client, *names(count))
                assert stop_in_a_thread(client, 0.0) == count, f"seed {seed}"


# Background work


@pytest.mark.parametrize("error", [None, PermissionError("not here"), AttributeError("no such call")])
def test_threads_say_that_they_work_in_the_background_where_that_can_be_said(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, object]] = []

    def set_scheduler(pid: int, policy: int, parameter: object) -> None:
        asked.append((threading.current_thread().name, pid, policy))
        if error is not None:
            raise error

    monkeypatch.setattr(smsproxy.os, "SCHED_BATCH", 3, raising=False)
    monkeypatch.setattr(smsproxy.os, "sched_param", lambda priority: priority, raising=False)
    monkeypatch.setattr(smsproxy.os, "sched_setscheduler", set_scheduler, raising=False)
    provider = Recorder()
    with batching(provider, smsproxy.ClientStatistics(), batch_size=1, senders=1) as client:
        client.send(SendMessage(NUMBER, "hello"), "a")
    assert provider.ids == ["a"]
    assert sorted(asked) == [("smsproxy-sender-1", 0, 3), ("smsproxy-statistics-1", 0, 3)]

"""The provider as the proxy sees it, and its stand-in in memory."""
from __future__ import annotations

import dataclasses
import queue
import random
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from fastsmsing import FastSmsingError, InMemoryClient, Message, MessageStatus, RejectedError
from helpers import HANG

Updates = queue.Queue[Mapping[str, object] | None]

CONFIRMED, FAILED, DELIVERED = MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED


def batch(*message_ids: str) -> list[Message]:
    return [Message("48123456789", f"text of {message_id}", message_id) for message_id in message_ids]


def drained(updates: Updates) -> list[Mapping[str, object] | None]:
    return [updates.get_nowait() for _ in range(updates.qsize())]


class Waits(threading.Event):
    """An Event that remembers how long it was asked to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout)
        return self.is_set()


# Values


def test_the_provider_knows_three_statuses() -> None:
    assert [status.value for status in MessageStatus] == ["CONFIRMED", "FAILED", "DELIVERED"]


def test_a_status_is_a_string() -> None:
    assert MessageStatus.DELIVERED == "DELIVERED"


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch("a")[0].message = "another"  # type: ignore[misc]


def test_a_message_is_slotted() -> None:
    assert not hasattr(batch("a")[0], "__dict__")


def test_the_repr_of_a_message_shows_its_id_alone() -> None:
    assert repr(Message("48123456789", "secret", "the-id")) == "Message(message_id='the-id')"


def test_messages_are_equal_by_number_text_and_id() -> None:
    assert Message("1", "x", "a") == Message("1", "x", "a")
    assert Message("1", "x", "a") != Message("2", "x", "a")


# Errors


def test_a_rejection_is_an_error_of_the_provider() -> None:
    assert issubclass(RejectedError, FastSmsingError)


def test_an_error_asks_for_no_wait_unless_told() -> None:
    assert FastSmsingError("busy").retry_after == 0.0


def test_an_error_keeps_its_words_and_the_wait_it_asks_for() -> None:
    error = FastSmsingError("busy", retry_after=7.5)
    assert (str(error), error.retry_after) == ("busy", 7.5)


# The stand-in


def test_every_message_is_reported_confirmed_and_then_delivered() -> None:
    client, updates = InMemoryClient(), Updates()
    client.subscribe(updates)
    client.send(batch("a", "b"))
    assert drained(updates) == [{"a": CONFIRMED, "b": CONFIRMED}, {"a": DELIVERED, "b": DELIVERED}]


def test_every_subscriber_gets_every_report() -> None:
    client, first, second = InMemoryClient(), Updates(), Updates()
    client.subscribe(first)
    client.subscribe(second)
    client.send(batch("a"))
    assert drained(first) == drained(second) == [{"a": CONFIRMED}, {"a": DELIVERED}]


def test_a_batch_is_taken_without_any_subscriber() -> None:
    client, late = InMemoryClient(), Updates()
    client.send(batch("a"))
    client.subscribe(late)
    assert drained(late) == []


def test_with_failure_rate_one_every_request_fails_and_nothing_is_reported() -> None:
    client, updates = InMemoryClient(failure_rate=1), Updates()
    client.subscribe(updates)
    for _ in range(20):
        with pytest.raises(FastSmsingError, match="simulated failure"):
            client.send(batch("a"))
    assert drained(updates) == []


def test_a_simulated_failure_may_be_tried_again() -> None:
    with pytest.raises(FastSmsingError) as raised:
        InMemoryClient(failure_rate=1).send(batch("a"))
    assert not isinstance(raised.value, RejectedError)


def test_with_undelivered_rate_one_every_message_ends_failed() -> None:
    client, updates = InMemoryClient(undelivered_rate=1), Updates()
    client.subscribe(updates)
    client.send(batch("a", "b"))
    assert drained(updates) == [{"a": CONFIRMED, "b": CONFIRMED}, {"a": FAILED, "b": FAILED}]


def outcomes(seed: int) -> tuple[list[bool], list[object]]:
    """Which of 200 requests failed, and how the messages of the others ended."""
    client = InMemoryClient(failure_rate=0.3, undelivered_rate=0.3, rng=random.Random(seed))
    updates = Updates()
    client.subscribe(updates)
    failed: list[bool] = []
    for number in range(200):
        try:
            client.send(batch(str(number)))
            failed.append(False)
        except FastSmsingError:
            failed.append(True)
    return failed, [status for report in drained(updates)[1::2] for status in (report or {}).values()]


def test_the_same_seed_repeats_a_run() -> None:
    assert outcomes(7) == outcomes(7)


def test_another_seed_is_another_run() -> None:
    assert outcomes(7) != outcomes(8)


def test_rates_in_between_fail_some_and_spare_others() -> None:
    failed, final = outcomes(7)
    assert 30 <= failed.count(True) <= 90
    assert set(final) == {FAILED, DELIVERED}


def test_a_request_takes_its_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Event", lambda: waits)
        client = InMemoryClient(latency=2.5)
    client.send(batch("a"))
    client.send(batch("b"))
    assert waits.asked == [2.5, 2.5]


def test_stop_ends_a_request_that_waits() -> None:
    client, errors = InMemoryClient(latency=1e6), list[Exception]()

    def send() -> None:
        try:
            client.send(batch("a"))
        except FastSmsingError as error:
            errors.append(error)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    client.stop()
    sender.join(HANG)
    assert [str(error) for error in errors] == ["the client is stopped"]


def test_a_stopped_client_takes_no_batch() -> None:
    client, updates = InMemoryClient(), Updates()
    client.subscribe(updates)
    client.stop()
    with pytest.raises(FastSmsingError, match="stopped"):
        client.send(batch("a"))
    assert drained(updates) == [None]


def test_stop_closes_every_subscription_once() -> None:
    client, first, second = InMemoryClient(), Updates(), Updates()
    client.subscribe(first)
    client.subscribe(second)
    client.stop()
    client.stop()
    assert drained(first) == drained(second) == [None]


def test_whoever_subscribes_after_stop_is_told_that_no_more_will_come() -> None:
    client, updates = InMemoryClient(), Updates()
    client.stop()
    client.subscribe(updates)
    assert drained(updates) == [None]


@pytest.mark.parametrize("latency", [-1, -0.001, float("nan")])
def test_a_latency_must_be_a_number_from_zero_up(latency: float) -> None:
    with pytest.raises(ValueError, match="latency"):
        InMemoryClient(latency=latency)


@pytest.mark.parametrize("name", ["failure_rate", "undelivered_rate"])
@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_must_be_a_probability(name: str, rate: float) -> None:
    options: dict[str, Any] = {name: rate}
    with pytest.raises(ValueError, match=name):
        InMemoryClient(**options)


def test_requests_of_many_threads_are_each_reported_in_order() -> None:
    client, updates = InMemoryClient(), Updates()
    client.subscribe(updates)
    names = [[f"{thread}-{number}" for number in range(50)] for thread in range(8)]
    together = threading.Barrier(len(names))

    def send(message_ids: list[str]) -> None:
        together.wait(HANG)
        for message_id in message_ids:
            client.send(batch(message_id))

    threads = [threading.Thread(target=send, args=(message_ids,), daemon=True) for message_ids in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    reports: dict[str, list[object]] = {}
    for report in drained(updates):
        for message_id, status in (report or {}).items():
            reports.setdefault(message_id, []).append(status)
    assert reports == {message_id: [CONFIRMED, DELIVERED] for message_ids in names for message_id in message_ids}

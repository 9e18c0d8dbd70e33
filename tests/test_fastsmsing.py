"""The provider as the proxy sees it, and its stand-in in memory."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import random
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastsmsing import FastSmsingError, InMemoryClient, Message, MessageStatus, RejectedError
from helpers import HANG, together

Updates = queue.Queue[Mapping[str, object] | None]

CONFIRMED, FAILED, DELIVERED = MessageStatus
TAKEN = [{"a": CONFIRMED, "b": CONFIRMED}, {"a": DELIVERED, "b": DELIVERED}]
A_AND_B = [Message("48123456789", "a text", message_id) for message_id in "ab"]


def subscribed(client: InMemoryClient) -> Updates:
    updates = Updates()
    client.subscribe(updates)
    return updates


def drained(updates: Updates) -> list[Any]:
    return [updates.get_nowait() for _ in range(updates.qsize())]


def test_a_message_is_a_value_that_cannot_be_changed_and_its_repr_shows_its_id_alone() -> None:
    message = Message("48123456789", "secret", "the-id")
    assert (message, repr(message)) == (dataclasses.replace(message), "Message(message_id='the-id')")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.message = "another"  # type: ignore[misc]


def test_an_error_keeps_its_words_and_the_wait_it_asks_for_and_a_rejection_is_one() -> None:
    errors = FastSmsingError("busy"), RejectedError("busy", retry_after=7.5)
    assert [(str(error), error.retry_after) for error in errors] == [("busy", 0.0), ("busy", 7.5)]
    assert isinstance(errors[1], FastSmsingError)


def test_a_status_is_a_string() -> None:
    assert list(MessageStatus) == ["CONFIRMED", "FAILED", "DELIVERED"]


def test_every_subscriber_gets_confirmed_and_then_delivered_for_every_message() -> None:
    client = InMemoryClient()
    client.send(A_AND_B)  # nobody listens yet
    first, second = subscribed(client), subscribed(client)
    client.send(A_AND_B)
    assert (drained(first), drained(second)) == (TAKEN, TAKEN)


def test_rates_of_one_fail_every_request_without_a_report_or_every_message() -> None:
    failing, losing = InMemoryClient(failure_rate=1), InMemoryClient(undelivered_rate=1)
    updates = subscribed(failing), subscribed(losing)
    for _ in range(20):
        with pytest.raises(FastSmsingError, match="simulated failure") as raised:
            failing.send(A_AND_B)
        assert not isinstance(raised.value, RejectedError)  # it may be tried again
    losing.send(A_AND_B)
    assert [*map(drained, updates)] == [[], [{"a": CONFIRMED, "b": CONFIRMED}, {"a": FAILED, "b": FAILED}]]


def outcomes(seed: int) -> list[list[object]]:
    """What became of each of 200 requests."""
    client = InMemoryClient(failure_rate=0.3, undelivered_rate=0.3, rng=random.Random(seed))
    updates, found = subscribed(client), []
    for _ in range(200):
        with contextlib.suppress(FastSmsingError):
            client.send(A_AND_B[:1])
        found.append([report["a"] for report in drained(updates)])
    return found


def test_the_same_seed_repeats_a_run_and_rates_in_between_fail_some_and_spare_others() -> None:
    assert outcomes(7) == outcomes(7) != outcomes(8)
    counts = Counter(map(tuple, outcomes(7)))
    assert counts.keys() == {(), (CONFIRMED, DELIVERED), (CONFIRMED, FAILED)}
    assert (30 <= counts[()] <= 90, 15 <= counts[CONFIRMED, FAILED] <= 75) == (True, True)


def test_a_request_takes_its_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float | None] = []
    monkeypatch.setattr(threading.Event, "wait", lambda event, timeout=None: asked.append(timeout))
    InMemoryClient(latency=2.5).send(A_AND_B)
    assert asked == [2.5]


def test_stop_ends_requests_and_closes_every_subscription_once() -> None:
    client = InMemoryClient(latency=1e6)
    subscriptions = [subscribed(client), subscribed(client)]
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.send, A_AND_B)
        client.stop()
        client.stop()
        assert str(request.exception(HANG)) == "the client is stopped"
    with pytest.raises(FastSmsingError, match="stopped"):  # a later request, too
        client.send(A_AND_B)
    assert [drained(updates) for updates in (*subscriptions, subscribed(client))] == [[None], [None], [None]]


@pytest.mark.parametrize("name", ["latency", "failure_rate", "undelivered_rate"])
def test_a_wrong_setting_is_refused_by_name(name: str) -> None:
    for value in (-0.001, math.nan) if name == "latency" else (-0.001, 1.001, math.nan):
        with pytest.raises(ValueError, match=name):
            InMemoryClient(**{name: value})  # type: ignore[arg-type]


def test_the_reports_on_one_message_never_overtake_each_other_whatever_threads_send() -> None:
    client = InMemoryClient()
    updates = subscribed(client)

    def send(thread: int) -> None:
        for number in range(50):
            client.send([Message("1", "x", f"{thread}-{number}")])

    together(8, send)
    reports: dict[str, list[object]] = {}
    for message_id, status in (item for report in drained(updates) for item in report.items()):
        reports.setdefault(message_id, []).append(status)
    assert len(reports) == 400
    assert [each for each in reports.values() if each != [CONFIRMED, DELIVERED]] == []

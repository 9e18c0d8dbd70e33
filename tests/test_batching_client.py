"""Batches, retries, outages and the end as a shop sees them, in virtual time; and the client with its real threads."""
from __future__ import annotations

import functools
import itertools
import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from unittest import mock

import pytest

import batching_client
from base_repository import Claim
from batch_scheduler import SmsProxyConfig
from batching_client import SimpleBatchingClient
from fastsmsing import FastSmsingError, Message, RejectedError
from helpers import HANG
from memory_repository import InMemoryRepository
from message_model import (
    Batch,
    ClientResult,
    ClosedError,
    Entry,
    MessageStatus,
    OverloadedError,
    Reason,
    RepositoryUnavailableError,
    SendMessage,
    SmsProxyError,
)  # fmt: skip
from providers import Gate, Recorder
from simulation import Judge, Request, Shop, World, away

T = TypeVar("T")
OURS = "01a21087-c443-7ce3-b466-{:012x}"  # IDs that the log may quote
MakeShop = Callable[..., Shop]


def hopeless(request: Request) -> None:
    """A client that cannot even encode some messages."""
    if any(message.message == "bad" for message in request.messages):
        raise UnicodeEncodeError("ascii", "x", 0, 1, "bad")


def send_codes(it: Shop, count: int, *, every: float, max_delay: float, after: float = 0.0) -> list[float]:
    """Accepts a message at a time, which is due in `max_delay` seconds; returns how late those were that were taken."""
    due: dict[str, float] = {}
    for _ in range(count):
        due[it.post(max_delay=max_delay)[0]] = it.world.now + max_delay
        it.world.wait(every)
    it.world.wait(after)
    return [request.start - due[each] for request in it.requests if request.ok for each in due.keys() & request.ids]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def shop(world: World) -> MakeShop:
    return functools.partial(Shop, world)


# When batches leave


def test_a_message_lingers_for_company(shop: MakeShop, world: World) -> None:
    it = shop(max_delay=5.0)
    it.post()
    world.wait(2.0)
    it.post(3)
    world.wait(10.0)
    assert (it.starts, it.sizes) == ([5.0], [4])


def test_a_full_batch_leaves_at_once_and_the_rest_lingers(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=10, max_delay=5.0)
    it.post(25)
    world.wait(1.0)
    assert (it.starts, it.sizes) == ([0.0, 0.0], [10, 10])
    world.wait(5.0)
    assert (it.starts[2:], it.sizes[2:]) == ([5.0], [5])


def test_messages_leave_in_order_of_acceptance(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=7, senders=1)
    it.post(50)
    world.wait(10.0)
    assert [message_id for request in it.requests for message_id in request.ids] == it.accepted


@pytest.mark.parametrize("size", [1, 0, -5])
def test_a_batch_size_of_one_or_less_turns_batching_off(shop: MakeShop, world: World, size: int) -> None:
    it = shop(batch_size=size)
    it.post(3)
    world.wait(0.1)
    assert (it.starts, it.sizes) == ([0.0] * 3, [1] * 3)


def test_without_a_linger_a_partial_batch_leaves_only_at_the_stop(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=10, max_delay=None)
    it.post(15)
    world.wait(1e6)
    assert it.sizes == [10]
    assert it.stop() == 0
    assert it.sizes == [10, 5]


def test_batches_are_cut_late_while_every_sender_is_busy(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=100, max_delay=0.0, senders=2, latency=10.0)
    it.post(1)
    world.wait(1.0)
    it.post(1)
    world.wait(1.0)
    it.load(5.0, rate=10.0, count=1)
    world.wait(20.0)
    assert it.sizes == [1, 1, 50]


def test_a_full_batch_does_not_wait_beside_an_idle_sender(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=10, max_delay=1e6, senders=3, latency=5.0)
    it.post(60)
    world.wait(11.0)
    assert it.starts == [0.0] * 3 + [5.0] * 3
    assert it.most_under_way == 3


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_and_no_batch_is_late_under_random_arrivals(shop: MakeShop, world: World, seed: int) -> None:
    rng = random.Random(seed)
    latency = rng.choice([0.0, 0.5])
    it = shop(batch_size=rng.choice([1, 3, 10]), max_delay=2.0, senders=rng.choice([1, 2, 5]), latency=latency)
    times: dict[str, float] = {}
    for _ in range(150):
        now = world.now
        times.update(dict.fromkeys(it.post(rng.choice([1, 1, 1, 4, 13])), now))
        world.wait(rng.expovariate(2.0))
    world.wait(2.0 + 2000 * latency)
    assert it.delivered_once()
    if not latency:
        assert max(request.start - times[each] for request in it.requests for each in request.ids) <= 2.0 + 1e-6


def test_the_outbox_is_looked_at_only_when_a_batch_may_be_due(shop: MakeShop, world: World) -> None:
    looks: list[float] = []

    class Watched(InMemoryRepository):
        def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
            looks.append(world.now)
            return super().claim(size, horizon, flush=flush)

    it = shop(away(20.0, 25.0), repository=Watched(0, clock=world.clock), batch_size=20, max_delay=2.0, latency=0.1)
    for rate in (8.0, 16.0):  # the linger ends, and batches fill
        it.load(30.0, rate, count=1)
    world.wait(2.0)
    batches = len({request.ids[0] for request in it.requests})
    assert len(looks) <= 2 * batches + 1  # one that starts the linger and one that takes the batch


def test_messages_of_others_are_found_at_random_times(shop: MakeShop, world: World) -> None:
    looks: list[float] = []

    class Shared(InMemoryRepository):
        poll = 1.0

        def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
            looks.append(world.now)
            return super().claim(size, horizon, flush=flush)

    it = shop(repository=Shared(0, clock=world.clock), max_delay=2.0)
    world.wait(100.0)
    pauses = [round(after - before, 3) for before, after in itertools.pairwise(looks)]
    assert (min(pauses) >= 0.5, max(pauses) <= 1.5, len(set(pauses)) > 10) == (True, True, True)
    it.repository.save_all([Entry(Message("48123456789", "Hi", "from another instance"), linger=2.0)])
    world.wait(10.0)
    assert [request.ids for request in it.requests] == [["from another instance"]]
    assert 102.0 <= it.starts[0] <= 103.5


# An outage


OUTAGES = [
    *((seconds, most, seed) for seconds, most in ((1.0, 6), (5.0, 10), (60.0, 16)) for seed in range(2)),
    (1800.0, 100, 0),
]


@pytest.mark.parametrize(("seconds", "most", "seed"), OUTAGES)
def test_an_outage_costs_no_message_and_hardly_a_request(
    shop: MakeShop, world: World, seconds: float, most: int, seed: int
) -> None:
    it = shop(away(20.0, 20.0 + seconds), seed=seed, max_pending=200_000, latency=0.05)
    it.load(60.0 + seconds, count=2 if seconds > 60.0 else 10)
    world.wait(60.0)
    during = [request for request in it.requests if 20.0 <= request.start < 20.0 + seconds]
    assert len(during) <= most
    assert it.delivered_once()
    assert it.statuses() == {"ACCEPTED": len(it.accepted)}
    first = next(request.start for request in it.requests if request.start >= 20.0 + seconds)
    assert first <= 20.0 + seconds + 30.0
    assert all(request.start < first + 31.0 for request in it.requests if request.ids[0] in during[0].ids)


def test_while_it_is_down_at_most_every_other_request_is_for_a_new_batch(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 100.0), senders=2, batch_size=10)
    it.post(100)
    world.wait(60.0)
    batches = {int(message_id[1:]) // 10 for request in it.requests for message_id in request.ids}
    assert len(batches) <= (len(it.requests) + 1) // 2 + 1
    assert it.repository.backlog() == 100
    assert it.open
    world.wait(120.0)
    assert it.delivered_once()
    assert not it.open


def test_the_wait_doubles_from_the_base_to_the_maximum_with_jitter(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 1e9), senders=1, backoff_base=1.0, backoff_max=8.0, max_delay=0.0)
    it.post()
    world.wait(60.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(it.starts)]
    assert len(gaps) > 5
    for number, gap in enumerate(gaps):
        longest = min(8.0, 2.0**number)
        assert longest / 2 - 1e-6 <= gap <= longest + 1e-6
    assert len({round(gap / 8.0, 3) for gap in gaps[4:]}) > 1, "there is no jitter"


def test_the_provider_can_ask_for_a_longer_wait_than_the_backoff(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 10.0, FastSmsingError(429, retry_after=50.0)), max_delay=0.0)
    it.post()
    world.wait(200.0)
    assert len(it.requests) == 2
    assert it.starts[1] >= 50.0
    assert it.delivered_once()


@pytest.mark.parametrize("asked", [float("nan"), -5.0, "soon", None])
def test_a_senseless_retry_after_changes_nothing(shop: MakeShop, world: World, asked: Any) -> None:
    it = shop(away(0.0, 0.1, FastSmsingError(429, retry_after=asked)), max_delay=0.0)
    it.post()
    world.wait(5.0)
    assert it.delivered_once()


def test_a_provider_that_hangs_and_then_fails_has_one_request_under_way_once_it_is_known(
    shop: MakeShop, world: World
) -> None:
    it = shop(away(0.0, 300.0), latency=30.0, batch_size=10, max_delay=0.0)
    it.load(60.0, rate=10.0, count=1)
    before = len(it.requests)
    it.most_under_way = 0
    world.wait(200.0)
    assert it.most_under_way == 1
    assert len(it.requests) - before <= 8
    world.wait(700.0)
    assert it.delivered_once()


def test_the_success_of_a_request_that_was_under_way_closes_the_breaker(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if request.ids == ["m1"] and len(it.requests) == 2:
            raise FastSmsingError(429, retry_after=1000.0)

    it = shop(judge, latency=lambda request: 2.0 if request.ids == ["m0"] else 0.0, batch_size=1)
    it.post(2)
    world.wait(1.0)
    assert it.open
    it.post(1)
    world.wait(0.5)
    assert len(it.requests) == 2
    world.wait(1.0)
    assert not it.open
    assert [request.ids for request in it.requests[2:]] == [["m1"], ["m2"]]  # and nobody waits 1,000 s any more


def test_thirty_percent_of_requests_failing_at_random_cost_no_message(shop: MakeShop, world: World) -> None:
    rng = random.Random(1)

    def judge(request: Request) -> None:
        if rng.random() < 0.3:
            raise FastSmsingError(500)

    it = shop(judge, batch_size=20, latency=0.1)
    it.load(100.0, rate=25.0, count=2)
    world.wait(200.0)
    assert it.delivered_once()


@pytest.mark.parametrize("attempts", [5, None])
def test_a_batch_that_always_fails_holds_up_no_other(shop: MakeShop, world: World, attempts: int | None) -> None:
    def judge(request: Request) -> None:
        if any(message.message == "poison" for message in request.messages):
            raise FastSmsingError(500)

    it = shop(judge, batch_size=10, max_delay=0.5, max_attempts=attempts, latency=0.01)
    poison = it.post(10, "poison")
    accepted: dict[str, float] = {}
    for _ in range(600):
        now = world.now
        accepted[it.post()[0]] = now
        world.wait(0.5)
    world.wait(5.0)
    waits = [request.start - accepted[each] for request in it.requests if request.ok for each in request.ids]
    assert len(waits) == 600
    assert max(waits) < 3.0
    tried = Counter(message_id for request in it.requests for message_id in request.ids)
    tries = {tried[message_id] for message_id in poison}
    if attempts:
        assert tries == {attempts}
        assert {it.repository.reason(message_id) for message_id in poison} == {Reason.ATTEMPTS}
    else:
        assert 10 < min(tries) <= max(tries) < 40
        assert it.statuses()["FAILED"] == 0


def test_a_retry_does_not_wait_for_what_lingers(shop: MakeShop, world: World) -> None:
    it = shop(hopeless, batch_size=2, max_delay=10_000.0)
    it.post(1)
    bad = it.post(1, "bad")
    world.wait(5.0)
    it.post(2)  # their success closes the breaker
    it.post(1)
    world.wait(300.0)
    late = [request for request in it.requests if request.ids == bad and request.start > 100.0]
    assert len(late) >= 5  # every 30 s at most


def test_health_warns_and_logs_tell_of_an_outage(
    shop: MakeShop, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    it = shop(away(0.0, 50.0, ConnectionRefusedError(111, "48123456789")), max_delay=0.0)
    it.post()
    world.wait(40.0)
    reasons, (warning,) = it.client.health()
    assert reasons == []
    assert warning.startswith("FastSMSing has been failing for 40 s; next try in ")
    assert it.measured().breaker_open.value == pytest.approx(40.0)
    assert 0 < it.next_try <= 30.0
    world.wait(60.0)
    assert it.client.health() == ([], [])
    assert not it.open
    opened, closed = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert opened == "ConnectionRefusedError 111 at attempt 1 of 100 with 1 message; circuit breaker open"
    assert closed.startswith("circuit breaker closed after ")
    assert closed.endswith(f" and {len(it.requests) - 1} failed requests")


def test_every_request_counts_in_the_bill(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 5.0), batch_size=10, max_delay=0.0)
    it.post(10)
    world.wait(100.0)
    assert it.measured().requests_saved.value == 10 - len(it.requests)
    assert it.metrics.requests.total == len(it.requests)


def test_requests_are_timed_by_how_they_ended(shop: MakeShop, world: World) -> None:
    it = shop(away(10.0, 10.3), latency=lambda request: request.start / 40, max_delay=0.0)
    world.wait(10.0)
    it.post()
    world.wait(20.0)
    sums = [line for line in it.metrics.request_duration.text() if "_sum" in line and not line.endswith(" 0")]
    assert [line.split("{")[1].split("}")[0] for line in sums] == ['result="ok"', 'result="error"']
    assert [float(line.split()[1]) for line in sums] == [pytest.approx(start / 40) for start in it.starts[::-1]]


# Bad messages, hanging requests, reports that come between


@pytest.mark.parametrize(("bad", "senders", "attempts"), [
    (1, 1, None), (4, 4, 100), (4, 1, None), (12, 2, None), (100, 4, 100)])  # fmt: skip
def test_no_set_of_bad_batches_stops_the_others(
    shop: MakeShop, world: World, bad: int, senders: int, attempts: int | None
) -> None:
    it = shop(hopeless, senders=senders, max_attempts=attempts, latency=0.3)
    it.post(bad, "bad")
    for _ in range(1_200):
        it.post()
        world.wait(1.0)
    successes = [request.start for request in it.requests if request.ok]
    pauses = [after - before for before, after in itertools.pairwise(successes)]
    assert successes[0] < 20.0
    assert max(pauses) < 20.0
    assert len(it.taken) >= 1_150


@pytest.mark.parametrize(("rate", "share", "longest"), [
    (1, 0.05, 600.0), (1, 0.1, 3600.0), (10, 0.01, 600.0), (10, 0.02, 3600.0)])  # fmt: skip
def test_bad_messages_cost_no_other_message_however_many_batches_hold_one(
    shop: MakeShop, world: World, rate: int, share: float, longest: float
) -> None:
    rng, accepted = random.Random(1), {}
    it = shop(hopeless, latency=0.3)
    for _ in range(900 * rate):
        bad = rng.random() < share
        accepted[it.post(1, "bad" if bad else "Hi")[0]] = math.inf if bad else world.now
        world.wait(1 / rate)
    world.wait(7200.0)
    waits = {each: request.start - accepted[each] for request in it.requests if request.ok for each in request.ids}
    assert set(waits) == {each for each, time in accepted.items() if time != math.inf}
    assert max(waits.values()) < longest


@pytest.mark.parametrize("bad", [[0], [37], [99], [10, 60]])
def test_in_a_shop_without_other_messages_a_bad_one_costs_the_others_no_more_than_some_backoffs(
    shop: MakeShop, world: World, bad: list[int]
) -> None:
    it = shop(hopeless, latency=0.3, max_delay=0.5)
    for number in range(100):
        it.post(1, "bad" if number in bad else "Hi")
    world.wait(600.0)
    assert sorted(it.taken) == sorted(set(it.accepted) - {f"m{number}" for number in bad})
    assert it.metrics.batches.count("split") <= 7 * len(bad)


@pytest.mark.parametrize(("at_a_time", "most"), [(1, 400), (2, 200)])
def test_a_provider_that_takes_only_so_many_requests_at_a_time_does_not_make_small_batches(
    shop: MakeShop, world: World, at_a_time: int, most: int
) -> None:
    refused: set[Request] = set()

    def latency(request: Request) -> float:
        if len(it.under_way) <= at_a_time:
            return 1.0
        refused.add(request)
        return 0.05

    def judge(request: Request) -> None:
        if request in refused:
            raise FastSmsingError(503)

    it = shop(judge, latency=latency)
    it.post(5_000)
    world.wait(3_600.0)
    assert it.delivered_once()
    assert len(it.requests) < most


def test_a_provider_that_takes_one_request_a_second_does_not_make_small_batches(shop: MakeShop, world: World) -> None:
    taken: list[float] = []

    def judge(request: Request) -> None:
        if taken and request.start < taken[-1] + 1.0:
            raise FastSmsingError(429)
        taken.append(request.start)

    it = shop(judge, latency=0.3)
    it.post(5_000)
    world.wait(3_600.0)
    assert it.delivered_once()
    assert len(it.requests) < 500


@pytest.mark.parametrize("every", [5.0, 20.0, 60.0])
def test_a_provider_that_takes_one_request_now_and_then_costs_no_message(
    shop: MakeShop, world: World, every: float
) -> None:
    taken: list[float] = []

    def judge(request: Request) -> None:
        if taken and request.start < taken[-1] + every:
            raise FastSmsingError(503)
        taken.append(request.start)

    it = shop(judge, latency=0.3)
    it.post(1_000, max_delay=0.0)
    world.wait(24 * 3600.0)
    assert it.delivered_once()
    assert len(it.requests) < 500


def test_while_all_senders_are_busy_the_companions_of_a_bad_message_are_found_nevertheless(
    shop: MakeShop, world: World
) -> None:
    it = shop(hopeless, latency=3.2)
    company = [*it.post(5, max_delay=0.0), *it.post(1, "bad", max_delay=0.0)[:0], *it.post(5, max_delay=0.0)]
    for _ in range(300):
        it.post(max_delay=0.0)
        world.wait(1.0)
    assert set(company) <= set(it.taken)


@pytest.mark.parametrize("senders", [1, 4])
@pytest.mark.parametrize(("contents", "size"), [("bbbg", 2), ("bbbbbbgg", 4)])
def test_in_batches_of_bad_messages_a_good_one_gets_its_turn(
    shop: MakeShop, world: World, contents: str, size: int, senders: int
) -> None:
    it = shop(hopeless, latency=0.3, batch_size=size, senders=senders, max_delay=0.0)
    for content in contents:
        it.post(1, "bad" if content == "b" else "Hi")
    world.wait(1_200.0)
    assert len(it.taken) == contents.count("g")


def test_an_outage_takes_no_try_away_from_what_is_due_tomorrow(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if world.now % 4.0 < 0.4 or 8.0 < world.now < 600.0:
            raise FastSmsingError(503)

    it = shop(judge, latency=0.3, max_attempts=5)
    newsletter = it.post(50, max_delay=86_400.0)
    for _ in range(3):
        it.post(max_delay=0.0)  # each of these fails once, with the newsletter beside it
        world.wait(4.0)
    world.wait(90_000.0)
    assert not it.failed & set(newsletter)


def test_a_message_that_was_reported_on_while_it_waited_for_a_retry_is_not_left(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 1e9), max_delay=0.0)
    it.post(2)
    world.wait(1.0)
    it.repository.update_all({"m0": MessageStatus.DELIVERED})
    assert it.stop(0.0) == 1


def test_one_patient_bad_message_delays_no_code_for_long_and_costs_none_a_second_request(
    shop: MakeShop, world: World
) -> None:
    it = shop(hopeless, latency=0.3)
    bad = it.post(1, "bad", max_delay=86_400.0)
    it.post(50, max_delay=86_400.0)
    late = send_codes(it, 720, every=10.0, max_delay=1.0)
    assert len(late) == 720
    assert sum(each > 0.1 for each in late) < 20
    assert len(it.requests) < 720 + 150
    assert it.failed == set(bad)


def test_codes_do_not_wait_for_all_the_halves_of_rejected_batches(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if any(message.message == "bad" for message in request.messages):
            raise RejectedError(422)

    it = shop(judge, latency=0.3)
    it.post(1_000, "bad", max_delay=2.0)
    late = send_codes(it, 300, every=1.0, max_delay=0.5, after=300.0)
    assert len(late) == 300
    assert sum(each > 1.0 for each in late) < 10
    assert len(it.failed) == 1_000


def test_bad_messages_that_fail_slowly_leave_a_sender_for_the_others(shop: MakeShop, world: World) -> None:
    def latency(request: Request) -> float:
        return 30.0 if any(message.message == "bad" for message in request.messages) else 0.3

    it = shop(hopeless, latency=latency)
    for _ in range(8):
        it.post(1, "bad", max_delay=0.0)
        world.wait(1.0)
    late = send_codes(it, 200, every=17.0, max_delay=0.5, after=3_600.0)
    assert len(late) == 200
    assert sum(each > 0.1 for each in late) < 40


def test_a_bad_message_for_which_the_provider_asks_for_a_wait_stops_the_others_no_longer_than_it_takes_to_find_it(
    shop: MakeShop, world: World
) -> None:
    def judge(request: Request) -> None:
        if any(message.message == "bad" for message in request.messages):
            raise FastSmsingError(503, retry_after=30.0)

    it = shop(judge, latency=0.3)
    for number in range(50):
        it.post(1, "bad" if number == 20 else "Hi", max_delay=0.0)
    world.wait(600.0)
    late = send_codes(it, 3_000, every=1.0, max_delay=1.0, after=60.0)
    assert len(late) == 3_000
    assert sum(each > 0.5 for each in late) < 300
    assert it.failed <= {"m20"}


def test_what_waits_for_a_probe_of_one_message_that_hangs_expires_on_time_and_leaves_after_a_minute(
    shop: MakeShop, world: World
) -> None:
    hung: list[Request] = []

    def latency(request: Request) -> float:
        if len(request.messages) > 1 or hung:
            return 0.3
        hung.append(request)
        return 3_600.0

    it = shop(away(0.0, 20.0), latency=latency)
    some, others = it.post(20, max_delay=0.0, max_age=30.0), it.post(30, max_delay=0.0)
    world.wait(32.0)
    assert len(hung[0].ids) == 1
    assert it.failed == set(some) - set(hung[0].ids)
    world.wait(50.0)
    assert set(it.taken) == set(others) - set(hung[0].ids)
    world.wait(3_600.0)
    assert sorted(it.taken) == sorted(set(it.accepted) - it.failed)


def test_the_halves_of_a_batch_expire_on_time(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if len(it.requests) == 1:
            raise RejectedError(422)
        raise FastSmsingError(503, retry_after=1800.0)

    it = shop(judge, latency=0.3, senders=1)
    it.post(4, max_delay=0.0, max_age=60.0)
    world.wait(62.5)
    assert it.failed == set(it.accepted)
    assert it.reasons() == {Reason.EXPIRED}


class Odd:
    """A reason that cannot be read."""

    def __str__(self) -> str:
        raise ValueError("m0")


def test_an_answer_that_cannot_be_read_counts_as_all_taken(
    shop: MakeShop, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    it = shop(lambda request: {"m0": Odd()}, max_delay=0.0)
    it.post(2)
    world.wait(10.0)
    assert it.metrics.requests.count("ok") == len(it.requests) == 1
    assert it.stop() == 0
    assert it.statuses() == {"ACCEPTED": 2}
    assert "an answer that ends with a ValueError" in caplog.text


def test_a_message_that_is_rejected_as_the_probe_costs_only_itself(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if world.now < 20.0:
            raise FastSmsingError(503)
        if len(request.messages) == 1:
            raise RejectedError(422)

    it = shop(judge, max_delay=0.0)
    it.post(10)
    world.wait(100.0)
    assert it.sizes[-2:] == [1, 9]
    assert it.failed == set(it.requests[-2].ids)
    assert len(it.taken) == 9


def test_an_outage_costs_one_request_more_at_the_most(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 1800.0), latency=0.3)
    it.post(100)
    world.wait(3600.0)
    assert sum(request.ok for request in it.requests) <= 2
    assert it.delivered_once()


@pytest.mark.parametrize(("share", "most"), [(0.1, 0.01), (0.3, 0.03)])
def test_requests_that_fail_at_random_hardly_ever_halve_a_batch(
    shop: MakeShop, world: World, share: float, most: float
) -> None:
    rng = random.Random(1)

    def judge(request: Request) -> None:
        if rng.random() < share:
            raise FastSmsingError(503)

    it = shop(judge, latency=0.3)
    it.load(3_600.0, rate=1.0, count=5)
    world.wait(600.0)
    assert it.delivered_once()
    assert it.metrics.batches.count("split") <= most * len(it.requests)


@pytest.mark.parametrize("senders", [1, 4])
def test_bad_riders_hold_up_no_code_for_longer_than_a_few_backoffs(shop: MakeShop, world: World, senders: int) -> None:
    it = shop(hopeless, senders=senders, latency=0.1)
    it.post(4, "bad", max_delay=3600.0)
    late = send_codes(it, 300, every=2.0, max_delay=1.0)
    assert len(late) == 300
    assert max(late) < 3.0


def test_a_long_wait_that_was_asked_for_ends_with_the_next_success(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if request.start == 0.0 and request.ids == ["m1"]:
            raise FastSmsingError(429, retry_after=3_600.0)
        if 490.0 <= request.start < 490.5:
            raise FastSmsingError(500)

    it = shop(judge, latency=lambda request: 3.0 if request.ids == ["m0"] else 0.1, batch_size=1, max_delay=0.0)
    it.post(2)
    world.wait(10.0)
    it.load(1_000.0, rate=1.0, count=1)
    pauses = [after - before for before, after in itertools.pairwise(it.starts)]
    assert max(pauses) < 10.0
    assert it.delivered_once()


@pytest.mark.parametrize("opened", [True, False])
def test_a_request_that_hangs_stops_nothing_for_longer_than_a_minute(
    shop: MakeShop, world: World, opened: bool
) -> None:
    def judge(request: Request) -> None:
        if opened and request.start < 10.0:
            raise FastSmsingError(503)

    def latency(request: Request) -> float:
        return 1e5 if it.hung is None and request.start >= 10.0 and it.hang(request) else 0.1

    it = HangingShop(world, judge, latency=latency, max_delay=1.0)
    it.load(3_600.0, rate=1.0, count=1)
    pauses = [after - before for before, after in itertools.pairwise(it.starts)]
    assert max(pauses) < 70.0
    assert len(it.taken) > 3_500


class HangingShop(Shop):
    """A shop of which one request hangs."""

    hung: Request | None = None

    def hang(self, request: Request) -> bool:
        self.hung = request
        return True


def test_what_was_reported_while_its_batch_waits_for_a_retry_is_not_sent_again(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 20.0), batch_size=4)
    it.post(4)
    world.wait(1.0)
    it.repository.update_all({"m1": MessageStatus.DELIVERED, "m2": MessageStatus.CONFIRMED})
    world.wait(100.0)
    assert {message_id for request in it.requests if request.start > 1.0 for message_id in request.ids} == {"m0", "m3"}
    assert it.statuses() == {"ACCEPTED": 2, "DELIVERED": 1, "CONFIRMED": 1}


def test_a_batch_of_which_all_was_reported_costs_no_request(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 20.0), batch_size=2)
    it.post(2)
    world.wait(0.1)
    it.repository.update_all(dict.fromkeys(it.accepted, MessageStatus.DELIVERED))
    world.wait(100.0)
    assert len(it.requests) == 1
    it.post(2)
    world.wait(1.0)
    assert len(it.requests) == 2 or it.next_try > 0


# Each message its own linger


def test_a_code_leaves_at_once_and_the_newsletter_rides_beside_it(shop: MakeShop, world: World) -> None:
    it = shop(latency=0.2)
    it.post(150, max_delay=3_600.0)
    world.wait(10.0)
    (code,) = it.post(max_delay=0)
    world.wait(1.0)
    assert (it.starts, it.sizes, it.requests[0].ids[0]) == ([10.0], [100], code)
    world.wait(3_600.0)
    assert it.sizes == [100, 51]
    assert it.delivered_once()


def test_the_riders_of_a_batch_that_fails_can_be_cancelled_and_ride_with_another(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 5.0), backoff_base=8.0, backoff_max=8.0)
    riders = it.post(3, max_delay=600.0)
    (code,) = it.post(max_delay=1.0)
    world.wait(2.0)
    assert it.requests[0].ids == [code, *riders]
    assert it.repository.cancel(riders[0])
    assert not it.repository.cancel(code)
    it.post(max_delay=6.0)
    world.wait(30.0)
    assert [request.ids for request in it.requests[1:]] == [[code], ["m4", *riders[1:]]]


def test_what_another_process_accepted_expires_on_time_while_it_waits_for_a_retry(shop: MakeShop, world: World) -> None:
    repository = InMemoryRepository(0, clock=world.clock)
    it = shop(away(0.0, 1e9), repository=repository, max_delay=0.0)
    world.wait(100.0)
    repository.save_all([Entry(Message("48123", "Hi", "theirs"), linger=0.0, max_age=40.0)])
    it.post()  # so that it looks
    world.wait(42.0)
    assert len(it.requests) > 1
    assert repository.reason("theirs") is Reason.EXPIRED


def test_what_expires_is_failed_on_time_while_the_provider_is_away(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 1e9), max_delay=1.0)
    failed: dict[str, float] = {}
    accepted = dict.fromkeys(it.post(5, max_age=30.0), world.now)
    for _ in range(200):
        world.wait(0.5)
        failed.update(dict.fromkeys(it.failed - failed.keys(), world.now))
        if world.now < 50.0:
            accepted.update(dict.fromkeys(it.post(2, max_age=30.0), world.now))
    assert len(failed) == len(accepted) == 203
    assert {it.repository.reason(each) for each in failed} == {Reason.EXPIRED}
    assert max(failed[each] - accepted[each] for each in failed) <= 32.5  # 2 s, and half a second between the looks
    assert all(request.start < accepted[each] + 30.0 for request in it.requests for each in request.ids)
    assert it.metrics.given_up.count("expired") == 203


def test_twenty_thousand_messages_with_one_due_time_leave_before_it(shop: MakeShop, world: World) -> None:
    it = shop(latency=0.3)
    it.post(20_000, max_delay=600.0)
    world.wait(700.0)
    assert len(it.requests) == 200
    assert it.delivered_once()
    assert max(it.starts) <= 600.1
    assert min(it.starts) > 540.0


def test_a_hundred_thousand_patient_messages_leave_room_for_others(shop: MakeShop, world: World) -> None:
    it = shop(latency=0.3)
    for _ in range(100):
        it.post(1_000, max_delay=604_800.0)
        world.wait(5.0)
    assert it.repository.backlog() < 51_000  # what exceeds half of `max_pending` leaves in full batches
    assert set(it.sizes) == {100}


def test_the_lead_delay_tells_on_whose_account_requests_leave(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=2)
    it.post(2, max_delay=0)
    it.post(1, max_delay=60.0)
    world.wait(100.0)
    text = list(it.metrics.lead_delay.text())
    assert 'smsproxy_batch_lead_delay_seconds_bucket{le="0.0"} 1' in text
    assert "smsproxy_batch_lead_delay_seconds_sum 60" in text
    assert "smsproxy_batch_lead_delay_seconds_count 2" in text


@pytest.mark.parametrize("seed", range(60))
def test_every_message_has_one_fate_under_random_lingers_outages_restarts_cancels_and_expiries(seed: int) -> None:
    rng, world = random.Random(seed), World()
    outages = sorted(rng.uniform(0, 900) for _ in range(4))
    repository = Durable(0, clock=world.clock)
    terms: list[dict[str, Any]] = [
        {}, {"max_delay": 0}, {"max_delay": 1.0}, {"max_delay": 60.0}, {"max_delay": 600.0}, {"max_age": 20.0},
        {"max_delay": 300.0, "max_age": 50.0},
    ]  # fmt: skip

    def judge(request: Request) -> None:
        if any(start <= request.start < end for start, end in zip(outages[::2], outages[1::2], strict=True)):
            raise FastSmsingError(503)

    def start() -> Shop:
        made = Shop(world, judge, repository=repository, seed=seed, latency=rng.choice([0.0, 0.3, 2.0]),
                    batch_size=rng.choice([1, 5, 100]), max_delay=rng.choice([0.0, 5.0]),
                    ids=f"{len(shops)}-{{}}")  # fmt: skip
        shops.append(made)
        return made

    shops: list[Shop] = []
    it, cancelled = start(), set[str]()
    for _ in range(200):
        it.post(rng.choice([1, 1, 2, 30]), **rng.choice(terms))
        world.wait(rng.expovariate(0.25))
        if rng.random() < 0.2:
            victim = rng.choice(it.accepted)
            cancelled |= {victim} if repository.cancel(victim) else set()
        if rng.random() < 0.02:
            assert it.stop(60.0) == 0
            it = start()
    world.wait(5_000.0)
    accepted = [each for shop in shops for each in shop.accepted]
    taken = [each for shop in shops for each in shop.taken]
    expired = {each for each in accepted if repository.reason(each) is Reason.EXPIRED}
    assert repository.backlog() == 0
    assert sorted([*taken, *cancelled, *expired]) == sorted(accepted)


# Rejection


def rejecting(*bad: str) -> Judge:
    """A provider that rejects any batch with one of these messages."""

    def judge(request: Request) -> None:
        if set(bad) & set(request.ids):
            raise RejectedError(400)

    return judge


@pytest.mark.parametrize("bad", [["m0"], ["m57"], ["m99"]])
def test_one_bad_number_costs_itself_and_few_requests(shop: MakeShop, world: World, bad: list[str]) -> None:
    it = shop(rejecting(*bad))
    it.post(100)
    world.wait(10.0)
    assert len(it.requests) <= 16
    assert it.statuses() == {"ACCEPTED": 99, "FAILED": 1}
    assert it.repository.reason(bad[0]) is Reason.REJECTED
    assert it.repository.backlog() == 0
    assert it.metrics.handed_over.total == 99


@pytest.mark.parametrize("count", [2, 5, 20])
def test_bad_numbers_cost_no_other_message(shop: MakeShop, world: World, count: int) -> None:
    bad = random.Random(count).sample([f"m{number}" for number in range(20)], count)
    it = shop(rejecting(*bad), batch_size=20)
    it.post(20)
    world.wait(10.0)
    failed = {message_id for message_id in it.accepted if it.repository.get(message_id) is MessageStatus.FAILED}
    assert failed == set(bad)
    taken = [message_id for request in it.requests if request.ok for message_id in request.ids]
    assert sorted(taken) == sorted(set(it.accepted) - failed)


def test_a_rejection_during_an_outage_means_that_the_provider_is_back(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if len(it.requests) == 1:
            raise FastSmsingError(503)
        rejecting("m0")(request)

    it = shop(judge, batch_size=1, max_delay=0.0)
    it.post(1)
    world.wait(1.0)
    assert (len(it.requests), it.open) == (2, False)


def test_messages_refused_by_name_fail_and_nothing_is_sent_again(shop: MakeShop, world: World) -> None:
    it = shop(lambda request: {"m3": "no such number", "m7": "blocked", "another": "unknown to us"}, batch_size=10)
    it.post(10)
    world.wait(100.0)
    assert len(it.requests) == 1
    assert {each for each in it.accepted if it.repository.reason(each) is Reason.REJECTED} == {"m3", "m7"}
    assert it.metrics.handed_over.total == 8
    assert it.repository.backlog() == 0


@pytest.mark.parametrize("answer", [{}, [], "ok", 202, True])
def test_whatever_else_send_returns_means_that_all_were_taken(shop: MakeShop, world: World, answer: Any) -> None:
    it = shop(lambda request: answer, batch_size=2)
    it.post(2)
    world.wait(1.0)
    assert it.metrics.handed_over.total == 2


# Giving up


def test_errors_count_by_type_and_number_and_success_is_noted(shop: MakeShop, world: World) -> None:
    def judge(request: Request) -> None:
        if len(it.requests) < 4:
            raise FastSmsingError(503) if len(it.requests) < 3 else TimeoutError("48123456789 took too long")
        assert list(it.metrics.last_success.text()) == []

    it = shop(judge, batch_size=1, max_delay=0.0)
    it.post(1)
    world.wait(100.0)
    assert list(it.metrics.errors.text())[2:] == [
        'smsproxy_provider_errors_total{error="other"} 0',
        'smsproxy_provider_errors_total{error="FastSmsingError 503"} 2',
        'smsproxy_provider_errors_total{error="TimeoutError"} 1',
    ]  # fmt: skip
    assert len(list(it.metrics.last_success.text())) == 3


@pytest.mark.parametrize(("attempts", "requests"), [(1, 1), (3, 3), (0, 1), (-2, 1)])
def test_a_batch_is_given_up_after_its_attempts(shop: MakeShop, world: World, attempts: int, requests: int) -> None:
    it = shop(away(0.0, 1e9), batch_size=2, max_attempts=attempts)
    it.post(2)
    world.wait(1e4)
    assert len(it.requests) == requests
    assert {it.repository.reason(message_id) for message_id in it.accepted} == {Reason.ATTEMPTS}
    assert it.repository.backlog() == 0


def test_a_message_that_is_too_old_is_not_sent_any_more(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 50.0), batch_size=2, max_age=20.0)
    old = it.post(2)
    world.wait(45.0)
    it.post(2)
    world.wait(100.0)
    assert {it.repository.reason(message_id) for message_id in old} == {Reason.EXPIRED}
    assert all(request.start <= 20.0 for request in it.requests if set(old) & set(request.ids))
    assert it.statuses() == {"FAILED": 2, "ACCEPTED": 2}


# Accepting


def test_one_message_more_than_may_be_pending_is_refused(shop: MakeShop, world: World) -> None:
    it = shop(batch_size=2, max_pending=3, max_delay=None, senders=1, latency=10.0)
    it.post(2)
    world.wait(1.0)  # two under way are pending, too
    it.post(1)
    with pytest.raises(OverloadedError):
        it.client.send(SendMessage("48123", "Hi"), "one-too-many")
    assert it.repository.get("one-too-many") is MessageStatus.NOT_FOUND
    assert it.client.health()[0] == ["queue full"]
    world.wait(10.0)
    it.post(1)


def test_a_repository_that_fails_refuses_the_message(shop: MakeShop) -> None:
    it = shop()
    for error in (RepositoryUnavailableError("full"), ZeroDivisionError()):
        with mock.patch.object(it.repository, "save_all", side_effect=error), pytest.raises(type(error)):
            it.client.send(SendMessage("48123", "Hi"), "x")


# The end


def test_a_stop_sends_what_lingers_at_once(shop: MakeShop, world: World) -> None:
    it = shop(max_delay=1e6)
    it.post(5)
    world.wait(1.0)
    assert it.stop(10) == 0
    assert (it.starts, it.sizes) == ([1.0], [5])
    with pytest.raises(ClosedError):
        it.client.send(SendMessage("48123", "Hi"), "late")


@pytest.mark.parametrize("retry_after", [0.0, 3.0])
def test_a_stop_during_an_outage_tries_again_until_it_is_over(shop: MakeShop, world: World, retry_after: float) -> None:
    it = shop(away(0.0, 105.0, FastSmsingError(503, retry_after=retry_after)), batch_size=10, max_delay=0.0)
    it.post(25)
    world.wait(100.0)  # by now the backoff is 30 s
    before = len(it.requests)
    assert it.stop(60) == 0
    assert it.delivered_once()
    assert world.now <= 106.0 + 2 * max(1.0, retry_after)
    assert len(it.requests) - before <= 15


def test_a_stop_counts_what_it_could_not_hand_over(
    shop: MakeShop, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    it = shop(away(0.0, 1e9), ids=OURS, batch_size=10, max_delay=0.0)
    it.post(25)
    world.wait(10.0)
    assert it.stop(20) == 25
    assert world.now == pytest.approx(30.0)
    lost = " ".join(record.getMessage() for record in caplog.records if "stopped before" in record.getMessage())
    assert set(lost.split()) >= set(it.accepted)


def test_a_stop_counts_what_is_given_up_during_it(shop: MakeShop, world: World) -> None:
    it = shop(away(0.0, 1e9), batch_size=10, max_delay=1e6, max_attempts=2)
    it.post(5)
    world.wait(1.0)
    assert it.stop(60) == 5
    assert it.statuses() == {"FAILED": 5}


def test_a_stop_does_not_wait_longer_than_its_timeout_for_a_request_that_hangs(shop: MakeShop, world: World) -> None:
    it = shop(latency=1e5, batch_size=2)
    it.post(2)
    world.wait(1.0)
    assert it.stop(5) == 2
    assert world.now == pytest.approx(6.0)
    world.wait(1e5)  # the request ends


class Durable(InMemoryRepository):
    """A repository that outlives its clients."""

    durable = True


def test_a_durable_stop_lets_requests_end_and_leaves_the_rest_to_the_next_start(shop: MakeShop, world: World) -> None:
    repository = Durable(0, clock=world.clock)
    it = shop(repository=repository, batch_size=10, senders=1, latency=3.0, max_delay=1e6)
    it.post(25)
    world.wait(1.0)
    assert it.stop(60) == 0
    assert (world.now, it.sizes) == (3.0, [10])
    again = shop(repository=repository, batch_size=10, max_delay=2.0)
    world.wait(10.0)
    taken = [message_id for request in (*it.requests, *again.requests) for message_id in request.ids]
    assert taken == it.accepted


def test_an_outage_over_a_restart_costs_no_message(shop: MakeShop, world: World) -> None:
    repository = Durable(0, clock=world.clock)
    it = shop(away(0.0, 100.0), repository=repository, batch_size=10, max_delay=0.0)
    it.post(35)
    world.wait(50.0)
    assert it.stop(60) == 0
    assert world.now == 50.0
    again = shop(away(0.0, 100.0), repository=repository, batch_size=10, max_delay=0.0)
    world.wait(200.0)
    taken = [message_id for request in again.requests if request.ok for message_id in request.ids]
    assert sorted(taken) == sorted(it.accepted)
    assert it.statuses() == {"ACCEPTED": 35}


def test_after_drain_messages_are_still_accepted_and_leave_at_once(shop: MakeShop, world: World) -> None:
    it = shop(max_delay=1e6)
    it.client.drain()
    it.post(3)
    world.wait(0.1)
    assert it.sizes == [3]
    assert it.stop(1) == 0


# Real threads


def test_each_batch_that_was_sent_as_one_is_one_result() -> None:
    results: list[ClientResult] = []
    done = threading.Semaphore(0)
    failures = [ConnectionError()]  # of which there is no result, since the batch is sent again

    class Sink:
        def send(self, result: ClientResult) -> None:
            results.append(result)
            done.release()

    class Provider(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            if failures:
                raise failures.pop()
            if any(message.message_id == "bad" for message in messages):
                raise RejectedError(400)
            super().send(messages)

    config = SmsProxyConfig(batch_size=2, backoff_base=0.01)
    client = SimpleBatchingClient(InMemoryRepository(), Provider(), config, Sink())
    client.accept_all([Entry(Message("48123", "Hi", message_id)) for message_id in ("good", "bad")])
    for _ in range(3):
        assert done.acquire(timeout=HANG)
    assert client.stop(HANG) == 0
    found = sorted((*[message.message_id for message in result.messages], repr(result.error)) for result in results)
    assert found == [("bad", "RejectedError(400)"), ("good", "None"), ("good", "bad", "RejectedError(400)")]


def test_a_message_is_sent_by_real_threads_right_after_construction() -> None:
    provider = Recorder()
    client = SimpleBatchingClient(InMemoryRepository(), provider, SmsProxyConfig(batch_size=1))
    client.send(SendMessage("48123456789", "Hi"), "m")
    provider.wait_for(lambda batches: batches == [[Message("48123456789", "Hi", "m")]])
    assert client.stop(HANG) == 0


def test_many_threads_accept_while_senders_carry_and_every_message_is_sent_once() -> None:
    provider = Recorder()
    client = SimpleBatchingClient(InMemoryRepository(), provider, SmsProxyConfig(batch_size=7, max_delay=None))
    barrier = threading.Barrier(8)

    def post(thread: int) -> None:
        barrier.wait(HANG)
        for number in range(350):
            client.send(SendMessage("48123456789", "Hi"), f"{thread}/{number}")

    threads = [threading.Thread(target=post, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    provider.wait_for(lambda batches: len(batches) == 400)
    assert {len(batch) for batch in provider.batches} == {7}
    assert len(set(provider.ids)) == 2800
    assert client.stop(HANG) == 0


def test_nobody_waits_for_a_provider_that_hangs() -> None:
    provider = Gate()
    client = SimpleBatchingClient(InMemoryRepository(), provider, SmsProxyConfig(batch_size=1, senders=2))
    for number in range(50):
        client.send(SendMessage("48123456789", "Hi"), f"{number}")
    provider.wait_entered(2)
    assert client._repository.backlog() == 50
    provider.opened.set()
    assert client.stop(HANG) == 0
    assert len(provider.ids) == 50


@pytest.mark.parametrize("started", [0, 2])
def test_threads_that_cannot_be_started_are_an_error_and_leave_none_running(
    started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    made: list[threading.Thread] = []

    def refuse(thread: threading.Thread) -> None:
        if len(made) == started:
            raise RuntimeError("can't start new thread")
        made.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        SimpleBatchingClient(InMemoryRepository(), Recorder())
    for thread in made:
        thread.join(HANG)
        assert not thread.is_alive()


def test_a_sender_survives_whatever_a_provider_raises() -> None:
    class Provider(Recorder):
        def send(self, messages: Sequence[Message]) -> None:
            if not self.raised:
                self.raised = True
                raise SystemExit(1)
            super().send(messages)

        raised = False

    provider = Provider()
    config = SmsProxyConfig(batch_size=1, senders=1, backoff_base=0.0)
    client = SimpleBatchingClient(InMemoryRepository(), provider, config)
    client.send(SendMessage("48123456789", "Hi"), "m")
    provider.wait_for(lambda batches: len(batches) == 1)
    assert client.stop(HANG) == 0


def test_a_slow_statistics_sink_delays_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Sink:
        opened = threading.Event()

        def send(self, result: ClientResult) -> None:
            assert self.opened.wait(HANG)

    provider = Recorder()
    with mock.patch.object(batching_client, "RESULTS_WAITING", 3):
        client = SimpleBatchingClient(InMemoryRepository(), provider, SmsProxyConfig(batch_size=1), Sink())
    for number in range(10):
        client.send(SendMessage("48123456789", "Hi"), f"{number}")
    provider.wait_for(lambda batches: len(batches) == 10)
    Sink.opened.set()
    assert client.stop(HANG) == 0
    assert any("one result is dropped" in record.getMessage() for record in caplog.records)


class Unavailable(InMemoryRepository):
    """A repository of which one method fails with `error` until it is None."""

    def __init__(self, method: str, error: Exception | None) -> None:
        super().__init__()
        self.error, self._method = error, method
        self.tried, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def _call(self, method: str, call: Callable[[], T]) -> T:
        if method == self._method and self.error is not None:
            self.tried.release()
            raise self.error
        result = call()
        if method == self._method:
            self.done.release()
        return result

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
        return self._call("claim", lambda: super(Unavailable, self).claim(size, horizon, flush=flush))

    def handed_over(self, batch: Batch) -> None:
        self._call("handed_over", lambda: super(Unavailable, self).handed_over(batch))

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        return self._call("update_all", lambda: super(Unavailable, self).update_all(updates))


class Rejecting(Recorder):
    """A provider that refuses everything."""

    def send(self, messages: Sequence[Message]) -> None:
        raise RejectedError(400)


@pytest.mark.parametrize("method", ["claim", "handed_over", "update_all"])
def test_a_repository_that_is_unavailable_for_a_while_costs_no_message(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    repository = Unavailable(method, RepositoryUnavailableError("locked"))
    provider = Rejecting() if method == "update_all" else Recorder()
    client = SimpleBatchingClient(repository, provider, SmsProxyConfig(batch_size=1))
    client.send(SendMessage("48123456789", "Hi"), "m")
    for _ in range(2):
        assert repository.tried.acquire(timeout=HANG)
    repository.error = None
    assert repository.done.acquire(timeout=HANG)
    assert client.stop(HANG) == 0
    assert (repository.backlog(), repository.reason("m")) == (0, Reason.REJECTED if method == "update_all" else None)
    assert len([record for record in caplog.records if ": locked" in record.getMessage()]) == 1


def test_a_hand_over_that_fails_for_good_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    repository = Unavailable("handed_over", SmsProxyError("damaged"))
    client = SimpleBatchingClient(repository, Recorder(), SmsProxyConfig(batch_size=1))
    client.send(SendMessage("48123456789", "Hi"), OURS.format(1))
    assert repository.tried.acquire(timeout=HANG)
    repository.error = None
    client.send(SendMessage("48123456789", "Hi"), OURS.format(2))
    assert repository.done.acquire(timeout=HANG)
    assert client.stop(HANG) == 1
    assert caplog.records[-1].getMessage() == f"stopped before these messages were handed over: {OURS.format(1)}"


def test_a_hand_over_that_cannot_be_recorded_until_the_end_is_told() -> None:
    repository = Unavailable("handed_over", RepositoryUnavailableError("locked"))
    client = SimpleBatchingClient(repository, Recorder(), SmsProxyConfig(batch_size=1))
    client.send(SendMessage("48123456789", "Hi"), "m")
    assert repository.tried.acquire(timeout=HANG)
    assert client.stop(0) == 1

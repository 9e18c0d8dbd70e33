"""The webhook as a shop sees it: what it is told and when, in virtual time; then with threads and a real receiver."""
from __future__ import annotations

import functools
import itertools
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import webhook_client
from batch_scheduler import Job
from change_outbox import ChangeBody
from fastsmsing import InMemoryClient, RejectedError
from helpers import HANG, every_thread_ends, returned_by, until
from memory_repository import InMemoryRepository
from message_model import MessageStatus, Reason, RepositoryUnavailableError
from providers import Gate, Recorder
from receivers import SECRETS, Receiver, answer, away, hanging, verified
from repository_contract import entries, name
from service_metrics import Metrics, WebhookMetrics
from simulation import World
from smsproxy import SendMessage, SmsProxy, SmsProxyConfig, WebhookConfig, WebhookTarget
from webhook_client import WebhookClient
from webhook_sender import Answer

__all__ = ["every_thread_ends"]

CONFIRMED, DELIVERED, FAILED = MessageStatus.CONFIRMED, MessageStatus.DELIVERED, MessageStatus.FAILED
RANK = {CONFIRMED: 1, DELIVERED: 2, FAILED: 2}
TAKEN, DOWN = Answer(True, "status 204"), Answer(False, "status 500")

Judge = Callable[[float, ChangeBody], Answer]  # asked when a request ends, with the time when it began


class Silent:
    """Makes no requests: the teller does."""

    secrets: tuple[bytes, ...] = ()

    def post(self, body: ChangeBody) -> Answer:
        raise AssertionError("nobody asked for it")


class Teller:
    """A webhook with its outbox and receiver, in virtual time."""

    def __init__(self, world: World, judge: Judge = lambda start, body: TAKEN, *, latency: float = 0.0,
                 retention: float = 259_200.0, count: int = 0, seed: int = 0) -> None:  # fmt: skip
        self.world, self.judge, self.latency = world, judge, latency
        self.repository = InMemoryRepository(retention, clock=world.clock, wall_clock=world.clock)
        self.metrics = WebhookMetrics()
        self.client = WebhookClient(self.repository.changes(), Silent(), self.metrics, clock=world.clock,
                                    rng=random.Random(seed).random)  # fmt: skip
        self.repository.save_all(entries(range(count)))
        self.requests: list[tuple[float, ChangeBody]] = []
        self.told: dict[str, MessageStatus] = {}  # the newest that was taken
        self.bodies: list[ChangeBody] = []  # that were taken
        self.under_way = 0
        world.shops.append(self)

    def advance(self) -> float:
        while True:
            wait = self.client.dispatcher.advance()
            try:
                job = self.client.dispatcher.jobs.get_nowait()
            except queue.Empty:
                return self.world.now + wait
            assert job is not None
            try:
                to_tell = self.client.prepare(job)
            except RepositoryUnavailableError as error:
                self.client.dispatcher.ended(job, self.client.recover(job, error))
                continue
            if to_tell:
                self.under_way += 1
                assert self.under_way == 1
                start = self.world.now
                self.requests.append((start, job.batch))
                self.world.at(start + self.latency, functools.partial(self.end, job, start))
            else:
                self.client.dispatcher.ended(job, ())

    def end(self, job: Job[ChangeBody], start: float) -> None:
        self.under_way -= 1
        answered = self.judge(start, job.batch)
        if answered.ok:
            for message_id, status, _ in job.batch.changes:
                assert message_id not in self.told or RANK[status] >= RANK[self.told[message_id]], "told backwards"
                self.told[message_id] = status
            self.bodies.append(job.batch)
        self.client.dispatcher.ended(job, self.client.conclude(job, answered))

    def change(self, numbers: Sequence[int], update: MessageStatus = DELIVERED) -> None:
        """These messages change now."""
        self.repository.update_all({name(number): update for number in numbers})
        self.client.changed()

    def starts(self) -> list[float]:
        return [round(start, 6) for start, _ in self.requests]

    def pending(self) -> tuple[float | None, float | None]:
        self.client.measure()
        return self.metrics.webhook_pending.value, self.metrics.webhook_oldest.value


def down(start: float, end: float, answered: Answer = DOWN) -> Judge:
    """A receiver that is away for a while."""
    return lambda began, body: answered if start <= began < end else TAKEN


# Gathering


def test_changes_gather_for_a_second_and_no_longer() -> None:
    teller = Teller(world := World(), count=20)
    world.wait(100.0)
    for number in range(5):
        teller.change([number])
        world.wait(0.2)
    world.wait(10.0)
    teller.change([5])
    world.wait(10.0)
    assert teller.starts() == [101.0, 112.0]
    assert [len(body) for body in teller.bodies] == [5, 1]
    assert [body.timestamp for body in teller.bodies] == [101.0, 112.0]


def test_a_full_body_leaves_at_once_behind_the_one_before() -> None:
    teller = Teller(world := World(), latency=0.01, count=1_000)
    for number in range(1_000):
        teller.change([number])
    world.wait(1.2)
    assert [len(body) for body in teller.bodies] == [100] * 10
    assert max(teller.starts()) < 1.1


def test_nothing_happens_while_nothing_changes() -> None:
    teller = Teller(world := World(), count=1)
    teller.change([0])
    world.wait(10.0)
    looks = []
    teller.repository._changes.claim = lambda *args, **kwargs: looks.append(args)  # type: ignore[union-attr,method-assign]
    world.wait(1e6)
    assert (looks, len(teller.requests)) == ([], 1)


# Backing off


def test_a_receiver_that_is_away_is_asked_after_1_s_doubling_to_5_minutes_with_the_same_body() -> None:
    teller = Teller(world := World(), down(0.0, 10_000.0), count=1)
    teller.change([0])
    world.wait(20_000.0)
    gaps = [after - before for before, after in itertools.pairwise(teller.starts())]
    longest = [min(300.0, 2.0**number) for number in range(len(gaps))]
    assert all(most / 2 <= gap <= most + 1e-5 for gap, most in zip(gaps, longest, strict=True))
    assert 30 < len(gaps) < 80
    assert {body for _, body in teller.requests} == set(teller.bodies)
    assert (len(teller.bodies), teller.told) == (1, {name(0): DELIVERED})
    requests = teller.metrics.webhook_requests
    assert (requests.count("ok"), requests.count("error")) == (1, len(gaps))


def test_a_thousand_messages_while_the_receiver_is_away_for_a_minute_cost_a_handful_of_requests() -> None:
    teller = Teller(world := World(), down(0.0, 60.0), latency=0.05, count=1_000)
    for number in range(500):
        teller.change([2 * number, 2 * number + 1], CONFIRMED)
        world.wait(0.05)
        teller.change([2 * number], DELIVERED)
        world.wait(0.05)
    assert teller.pending()[0] in range(1_000, 1_101)  # of one message a body is under way, and a newer change waits
    world.wait(65.0)
    assert teller.pending() == (0, 0.0)
    assert teller.told == {name(number): CONFIRMED if number % 2 else DELIVERED for number in range(1_000)}
    failed = int(teller.metrics.webhook_requests.count("error"))
    assert failed <= 9
    assert len(teller.requests) - failed <= 12


def test_after_an_outage_the_next_one_begins_with_short_waits_again() -> None:
    def judge(start: float, body: ChangeBody) -> Answer:
        return DOWN if start < 100.0 or 200.0 <= start < 202.0 else TAKEN

    teller = Teller(world := World(), judge, count=2)
    teller.change([0])
    world.wait(199.5)
    teller.change([1])
    world.wait(100.0)
    assert teller.told == {name(0): DELIVERED, name(1): DELIVERED}
    assert [start for start in teller.starts() if start > 199.0][1] <= 201.5 + 1e-3


@pytest.mark.parametrize(("asked", "soonest"), [(7.0, 7.0), (3_600.0, 3_600.0)])
def test_retry_after_is_kept_to(asked: float, soonest: float) -> None:
    teller = Teller(world := World(), down(0.0, 5.0, Answer(False, "status 429", asked)), count=2)
    teller.change([0])
    world.wait(2.0)
    teller.change([1])
    world.wait(4_000.0)
    first, second, third = teller.starts()
    assert first == 1.0
    assert soonest <= second - first <= soonest + 0.1
    assert third == second


def test_changes_of_what_is_under_way_are_told_after_it() -> None:
    teller = Teller(world := World(), latency=5.0, count=1)
    teller.change([0], CONFIRMED)
    world.wait(2.0)
    teller.change([0], MessageStatus.FAILED)
    world.wait(10.0)
    assert [body.changes[0].status for body in teller.bodies] == [CONFIRMED, FAILED]
    assert teller.starts() == [1.0, 6.0]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_a_receiver_does_nothing_is_lost_or_told_backwards(seed: int) -> None:
    rng = random.Random(seed)
    bad = rng.choice([0.1, 0.5, 0.9])

    def judge(began: float, body: ChangeBody) -> Answer:
        answers = [TAKEN, DOWN, Answer(False, "TimeoutError"), Answer(False, "status 429", rng.uniform(0, 30))]
        return rng.choice(answers[1:]) if began < 600 and rng.random() < bad else TAKEN

    teller = Teller(world := World(), judge, latency=rng.choice([0.0, 0.3, 15.0]), count=300, seed=seed)
    while world.now < 600:
        numbers = [rng.randrange(300) for _ in range(rng.randrange(20))]
        teller.change(numbers, rng.choice([CONFIRMED, DELIVERED, FAILED]))
        world.wait(rng.expovariate(1.0))
    world.wait(1_000.0)
    statuses = {name(number): teller.repository.get(name(number)) for number in range(300)}
    assert teller.told == {each: status for each, status in statuses.items() if status in RANK}
    assert teller.pending() == (0, 0.0)
    assert all(len(body) <= 100 for _, body in teller.requests)


def test_what_is_older_than_the_retention_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    teller = Teller(world := World(), down(0.0, 5_000.0), retention=1_000.0, count=300)
    for number in range(200):
        teller.change([number])
        world.wait(20.0)
        teller.repository.forget()
    world.wait(3_000.0)
    assert teller.pending() == (0, 0.0)
    assert teller.told.keys() <= {name(number) for number in range(140, 200)}
    assert any(each.startswith("the webhook drops ") for each in caplog.messages)
    # Every body is given up on some time, and then the next one is tried.
    assert len({body.id for _, body in teller.requests}) > 2


def test_the_log_says_once_that_a_receiver_is_away_and_once_that_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    teller = Teller(world := World(), down(0.0, 50.0), count=2)
    teller.change([0, 1])
    world.wait(150.0)
    first, over, told = caplog.messages
    assert first == "the webhook's receiver takes nothing: status 500"
    failed = len(teller.requests) - 1
    assert re.fullmatch(rf"the webhook's receiver takes nothing: over after [\d.]+ s and {failed} errors", over)
    assert told == f"told 2 changes at attempt {failed + 1} as {teller.bodies[0].id}: {name(0)} {name(1)}"


# When our own side fails


def test_an_outbox_that_fails_is_asked_again_after_a_while_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    teller = Teller(world := World(), count=50)
    changes, rng, raised = teller.repository._changes, random.Random(1), []

    def failing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if rng.random() < 0.3:
                raised.append(world.now)
                raise RepositoryUnavailableError("disk full")
            return method(*args, **kwargs)

        return call

    for name_of_method in ("claim", "holds"):
        setattr(changes, name_of_method, failing(getattr(changes, name_of_method)))
    for number in range(50):
        teller.change([number])
        world.wait(3.0)
    world.wait(100.0)
    assert teller.told == {name(number): DELIVERED for number in range(50)}
    assert min(after - before for before, after in itertools.pairwise(raised)) > 0.2
    assert "the webhook cannot go on: disk full" in caplog.text
    assert "changes cannot be read for the webhook: disk full" in caplog.text


def test_a_body_that_another_instance_tells_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    teller = Teller(world := World(), down(0.0, 2.0), count=1)
    teller.change([0])
    world.wait(1.5)
    teller.repository._changes.holds = lambda body: False  # type: ignore[union-attr,method-assign]
    world.wait(100.0)
    assert (len(teller.requests), teller.told) == (1, {})
    assert any(each.startswith("another instance tells msg_") for each in caplog.messages)


# Threads


def proxy_of(receiver: Receiver | str, client: Any = None, **config: Any) -> SmsProxy:
    url = receiver if isinstance(receiver, str) else receiver.url()
    webhook = WebhookConfig(WebhookTarget.of(url), SECRETS[:1])
    return SmsProxy(client or Recorder(), SmsProxyConfig(max_delay=0.0, **config), webhook=webhook)


def send(proxy: SmsProxy, count: int) -> list[str]:
    return [proxy.send(SendMessage("48123456789", "Hi")).id for _ in range(count)]


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes need not gather."""
    rules = SmsProxyConfig(max_delay=0.0, senders=1, max_attempts=None, backoff_base=0.01, backoff_max=0.02)
    monkeypatch.setattr(webhook_client, "RULES", rules)
    monkeypatch.setattr(webhook_client, "GATHER", 0.0)
    monkeypatch.setattr("memory_changes.GATHER", 0.0)


def test_every_kind_of_change_is_told(prompt: None) -> None:
    with Receiver() as receiver:
        provider = Recorder()
        proxy = proxy_of(receiver, provider)
        lingering = proxy.send(SendMessage("48123456789", "Hi", max_delay=1_000.0)).id
        with proxy:
            assert proxy.cancel(lingering)
            confirmed, delivered, failed = send(proxy, 3)
            provider.wait_for(lambda batches: len(provider.ids) >= 3)
            provider.report({confirmed: "CONFIRMED", delivered: "DELIVERED", failed: "FAILED"})
            expected = {lingering: "FAILED", confirmed: "CONFIRMED", delivered: "DELIVERED", failed: "FAILED"}
            until(lambda: expected.items() <= receiver.statuses.items())
        assert receiver.backwards == []
        bodies = b"".join(told.body for told in receiver.told)
        assert b'"Reason":"cancelled"' in bodies
        assert all(verified(told.headers, told.body) for told in receiver.told)
        assert b"48123456789" not in bodies


@pytest.mark.parametrize("reason", list(Reason))
def test_what_is_given_up_is_told_when_nothing_else_happens(prompt: None, reason: Reason) -> None:
    provider = Refusing(RejectedError() if reason is Reason.REJECTED else ConnectionError())
    attempts = None if reason is Reason.EXPIRED else 1
    with Receiver() as receiver, proxy_of(receiver, provider, max_attempts=attempts, backoff_base=30.0) as proxy:
        if reason is Reason.EXPIRED:
            send(proxy, 1)
            until(lambda: proxy.metrics.requests.total)  # now the breaker is open, so the next one waits in the outbox
        lingers = 1_000.0 if reason is Reason.CANCELLED else None
        age = 0.05 if reason is Reason.EXPIRED else None
        message_id = proxy.send(SendMessage("48123456789", "Hi", lingers, age)).id
        if reason is Reason.CANCELLED:
            assert proxy.cancel(message_id)
        until(lambda: receiver.statuses == {message_id: "FAILED"})
        assert f'"Reason":"{reason.value}"'.encode() in receiver.told[-1].body
        proxy.stop(0.0)


class Refusing(Recorder):
    """Takes nothing."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def send(self, messages: Sequence[Any]) -> None:
        raise self.error


def test_a_stop_in_memory_tells_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    class Late(Recorder):
        def stop(self) -> None:
            self.report(dict.fromkeys(self.ids, "DELIVERED"))
            super().stop()

    with Receiver(answer(503)) as receiver:
        proxy = proxy_of(receiver, Late())
        proxy.start()
        ids = send(proxy, 250)
        assert returned_by(lambda: proxy.stop(HANG)) == 0
        assert receiver.statuses == dict.fromkeys(ids, "DELIVERED")
    assert not any("stopped before" in each for each in caplog.messages)


def test_a_stop_tells_side_by_side_with_the_drain_and_gathers_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("webhook_client", "memory_changes"):
        monkeypatch.setattr(f"{place}.GATHER", 1_000.0)
    provider = Gate()
    with Receiver() as receiver:
        proxy = proxy_of(receiver, provider)
        proxy.start()
        (held,) = send(proxy, 1)
        provider.wait_entered()
        cancelled = proxy.send(SendMessage("48123456789", "Hi", max_delay=1_000.0)).id
        assert proxy.cancel(cancelled)
        stopping = threading.Thread(target=proxy.stop, args=(HANG,))
        stopping.start()
        until(lambda: receiver.statuses == {cancelled: "FAILED"})
        assert proxy.get_status(held) is MessageStatus.ACCEPTED
        assert proxy.metrics.requests.total == 0  # the provider still has it
        provider.opened.set()
        stopping.join(HANG)
        assert not stopping.is_alive()


@pytest.mark.parametrize("timeout", [0.0, 0.3])
def test_a_receiver_that_hangs_delays_a_stop_by_no_more_than_the_deadline_and_a_second(
    timeout: float, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Recorder()
    with Receiver(usually=hanging) as receiver:
        proxy = proxy_of(receiver, provider)
        proxy.start()
        ids = send(proxy, 3)
        provider.wait_for(lambda batches: len(provider.ids) == 3)
        provider.report(dict.fromkeys(ids[:2], "DELIVERED"))
        receiver.wait_for(lambda told: len(told) == 1)
        provider.report(dict.fromkeys(ids[2:], "DELIVERED"))
        began = time.monotonic()
        assert returned_by(lambda: proxy.stop(timeout)) == 0
        assert time.monotonic() - began < timeout + 1.5
    assert "stopped before the webhook told 3 changes" in caplog.messages


def test_a_receiver_that_is_away_does_not_decide_the_result_of_a_stop(caplog: pytest.LogCaptureFixture) -> None:
    with away() as url:
        proxy = proxy_of(url, provider := Recorder())
        proxy.start()
        ids = send(proxy, 1)
        provider.wait_for(lambda batches: bool(batches))
        provider.report({ids[0]: "DELIVERED"})
        assert returned_by(lambda: proxy.stop(0.2)) == 0
    assert "stopped before the webhook told 1 change" in caplog.messages


def test_an_error_of_ours_in_the_sending_thread_costs_no_change(
    prompt: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = iter([KeyError("48123456789"), MemoryError()])
    post = webhook_client.WebhookClient.prepare

    def prepare(client: WebhookClient, job: Job[ChangeBody]) -> bool:
        for error in script:
            raise error
        return post(client, job)

    monkeypatch.setattr(WebhookClient, "prepare", prepare)
    provider = Recorder()
    with Receiver() as receiver, proxy_of(receiver, provider) as proxy:
        ids = send(proxy, 1)
        provider.wait_for(lambda batches: bool(batches))
        provider.report({ids[0]: "DELIVERED"})
        until(lambda: receiver.statuses == {ids[0]: "DELIVERED"})
        assert proxy.dead_threads() == []
    assert "the webhook cannot go on: KeyError at test_webhook_client.py:" in caplog.text
    assert "48123456789" not in caplog.text


def test_health_warns_when_the_oldest_change_has_waited_for_more_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    teller = Teller(world := World(), down(0.0, 1e9), count=1)
    teller.change([0])
    world.wait(60.0)
    assert teller.pending() == (1, 60.0)
    assert teller.client.warnings() == []
    world.wait(1.0)
    teller.client.measure()
    assert teller.client.warnings() == ["the webhook has not told a change for 61 s"]
    with away() as url, proxy_of(url) as proxy:
        monkeypatch.setattr(proxy._webhook, "warnings", teller.client.warnings)
        monkeypatch.setattr(proxy._webhook, "measure", lambda: None)
        assert proxy.health() == ([], ["the webhook has not told a change for 61 s"])


def test_figures_that_a_repository_cannot_tell_are_left_out() -> None:
    teller = Teller(World())

    def pending() -> Any:
        raise RepositoryUnavailableError("away")

    teller.repository._changes.pending = pending  # type: ignore[union-attr,method-assign]
    assert teller.pending() == (None, None)
    assert teller.client.warnings() == []


def test_a_dead_thread_is_a_reason_to_get_no_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(client: WebhookClient) -> None:
        """Ends at once."""

    monkeypatch.setattr(WebhookClient, "_run", dies)
    with away() as url, proxy_of(url) as proxy:
        until(lambda: proxy.dead_threads() == ["smsproxy-webhook-sender-1"])
        assert proxy.health()[0] == ["smsproxy-webhook-sender-1 is dead"]
    assert proxy._webhook.dead_threads() == []


def test_without_a_webhook_nothing_is_recorded_and_its_metrics_are_0() -> None:
    repository = InMemoryRepository()
    with SmsProxy(provider := Recorder(), repository=repository) as proxy:
        before = threading.active_count()
        ids = send(proxy, 3)
        provider.report(dict.fromkeys(ids, "DELIVERED"))
        until(lambda: proxy.get_status(ids[0]) is DELIVERED)
        proxy.set_webhook_secrets(SECRETS)
        assert repository._changes is None
        assert threading.active_count() == before
        proxy.measure()
        samples = [line for line in proxy.metrics.text() if line.startswith("smsproxy_webhook")]
    assert samples == [
        'smsproxy_webhook_requests_total{result="ok"} 0', 'smsproxy_webhook_requests_total{result="error"} 0',
        "smsproxy_webhook_pending_messages 0", "smsproxy_webhook_oldest_pending_seconds 0",
    ]  # fmt: skip


@pytest.mark.parametrize("last", ["smsproxy-webhook-sender-1", "smsproxy-sender-2"])
def test_a_start_without_a_thread_left_leaves_none_behind(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if thread.name == last:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with away() as url:
        proxy = proxy_of(url, InMemoryClient())
        with pytest.raises(RuntimeError):
            proxy.start()
        proxy._client.stop()


def test_metrics_of_the_domain_hold_those_of_the_webhook() -> None:
    assert isinstance(Metrics(), WebhookMetrics)

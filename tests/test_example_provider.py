"""The example of a real provider: its client alone against the stand-in, then the whole service with it."""
from __future__ import annotations

import email.utils
import http.client
import json
import logging
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastsmsing
from example_provider import client as example
from example_provider.client import HttpClient
from example_provider.stand_in import CUT, HANG_UP, OK, RESET, STALL, Fault, StandIn, deck
from fastsmsing import FastSmsingError, Message, RejectedError
from helpers import HANG, Scripted, serving
from smsproxy import InMemoryRepository, MessageStatus, Reason, SendMessage, SmsProxy, SmsProxyConfig

ROOT = Path(__file__).resolve().parent.parent

Updates = queue.Queue  # of Mapping[str, object] | None


def batch(*ids: str) -> list[Message]:
    """Messages with these IDs."""
    return [Message("48123456789", "Zażółć 🚚", message_id) for message_id in ids]


@pytest.fixture
def clients() -> Iterator[Any]:
    """Makes clients, and stops them at the end."""
    made: list[HttpClient] = []

    def make(url: str, token: str = "secret", **options: float) -> HttpClient:
        options = {"connect_timeout": HANG, "read_timeout": HANG, "poll_interval": 0.01, **options}
        made.append(HttpClient(url, token, **options))
        return made[-1]

    yield make
    for client in made:
        client.stop()


def refused_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class TestSending:
    def test_a_batch_is_one_authorized_request_that_arrives_unchanged(self, clients: Any) -> None:
        with StandIn() as provider:
            clients(provider.url, "the-token").send(batch("a", "b"))
            assert provider.processed == [(["a", "b"], False)]
            assert provider.messages["b"] == {"ID": "b", "To": "48123456789", "Text": "Zażółć 🚚"}
            assert provider.headers[0]["Authorization"] == "Bearer the-token"

    def test_batches_share_a_kept_alive_connection(self, clients: Any) -> None:
        with StandIn() as provider:
            client = clients(provider.url)
            for number in range(5):
                client.send(batch(str(number)))
            assert (len(provider.processed), provider.connections) == (5, 1)

    def test_threads_that_send_at_a_time_have_connections_of_their_own(self, clients: Any) -> None:
        threads = 8
        with StandIn(latency=0.002) as provider:
            client = clients(provider.url)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda number: client.send(batch(str(number))), range(200), timeout=HANG))
            assert sorted(ids[0] for ids, _ in provider.processed) == sorted(map(str, range(200)))
            assert provider.connections <= threads

    def test_a_connection_that_went_stale_is_replaced_before_anything_is_sent(self, clients: Any) -> None:
        with StandIn([Fault(processed=True, status=202, how=HANG_UP)]) as provider:
            client = clients(provider.url)
            client.send(batch("a"))
            assert provider.closed.acquire(timeout=HANG)
            client.send(batch("b"))
            assert (provider.requests, provider.connections) == ([["a"], ["b"]], 2)

    @pytest.mark.parametrize("processed", [False, True])
    def test_a_connection_that_breaks_is_an_error_and_the_request_never_repeated(
        self, clients: Any, processed: bool
    ) -> None:
        with StandIn([OK, Fault(processed=processed, how=RESET)]) as provider:
            client = clients(provider.url)
            client.send(batch("a"))
            with pytest.raises(FastSmsingError, match="no answer") as caught:
                client.send(batch("b"))  # on the same connection, so that it could be taken for stale
            assert not isinstance(caught.value, RejectedError)
            assert (provider.requests, provider.connections) == ([["a"], ["b"]], 1)

    def test_an_answer_that_never_comes_is_an_error_and_the_request_never_repeated(self, clients: Any) -> None:
        with StandIn([Fault(how=STALL)]) as provider:
            with pytest.raises(FastSmsingError, match="no answer"):
                clients(provider.url, read_timeout=0.1).send(batch("a"))
            assert provider.closed.acquire(timeout=HANG)
            assert (provider.requests, provider.connections) == ([["a"]], 1)

    def test_a_refused_connection_is_an_error_to_be_retried(self, clients: Any) -> None:
        with pytest.raises(FastSmsingError, match="no answer") as caught:
            clients(f"http://127.0.0.1:{refused_port()}").send(batch("a"))
        assert not isinstance(caught.value, RejectedError)

    def test_a_connection_that_is_never_made_ends_at_its_timeout(self, clients: Any) -> None:
        with socket.socket() as full, socket.socket() as first:
            full.bind(("127.0.0.1", 0))
            full.listen(0)  # one more connection fills the backlog, so that the next waits for ever
            first.connect(full.getsockname())
            with pytest.raises(FastSmsingError, match="no answer"):
                clients("http://{}:{}".format(*full.getsockname()), connect_timeout=0.1).send(batch("a"))

    def test_messages_refused_by_name_come_back_with_their_reasons_and_the_others_are_taken(self, clients: Any) -> None:
        with StandIn() as provider:
            refused = clients(provider.url).send([*batch("a"), Message("0048", "Hi", "b"), *batch("c")])
            assert (refused, provider.messages.keys()) == ({"b": "no such number"}, {"a", "c"})
            assert not clients(provider.url).send(batch("d"))

    def test_a_number_that_is_not_named_rejects_the_whole_batch(self, clients: Any) -> None:
        with StandIn() as provider:
            with pytest.raises(RejectedError, match="400"):
                clients(provider.url).send([*batch("a"), Message("048", "Hi", "b")])
            assert (provider.rejected, provider.messages) == ([["a", "b"]], {})

    @pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
    def test_a_4xx_rejects_the_batch_for_good(self, clients: Any, status: int) -> None:
        with StandIn([Fault(status=status)]) as provider:
            with pytest.raises(RejectedError, match=str(status)):
                clients(provider.url).send(batch("a"))

    @pytest.mark.parametrize("status", [302, 408, 425, 429, 500, 502, 503, 504])
    def test_an_answer_about_the_moment_is_to_be_retried(self, clients: Any, status: int) -> None:
        with StandIn([Fault(status=status)]) as provider:
            client = clients(provider.url)
            with pytest.raises(FastSmsingError, match=str(status)) as caught:
                client.send(batch("a"))
            assert not isinstance(caught.value, RejectedError)
            client.send(batch("a"))
            assert provider.connections == 1, "an answer leaves its connection in order"

    @pytest.mark.parametrize(
        ("value", "wait"),
        [("7", 7.0), ("0", 0.0), ("-5", 0.0), ("soon", 0.0), ("²", 0.0), ("", 0.0), ("9" * 400, 3600.0),
         ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0)],
    )  # fmt: skip
    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after_becomes_the_least_wait(self, clients: Any, status: int, value: str, wait: float) -> None:
        with StandIn([Fault(status=status, headers={"Retry-After": value})]) as provider:
            with pytest.raises(FastSmsingError) as caught:
                clients(provider.url).send(batch("a"))
            assert caught.value.retry_after == wait

    def test_retry_after_may_be_a_date(self, clients: Any) -> None:
        date = email.utils.formatdate(time.time() + 600, usegmt=True)
        with StandIn([Fault(status=429, headers={"Retry-After": date})]) as provider:
            with pytest.raises(FastSmsingError) as caught:
                clients(provider.url).send(batch("a"))
        assert 0 < caught.value.retry_after <= 600

    @pytest.mark.parametrize(("how", "headers"), [(CUT, {}), (HANG_UP, {"Transfer-Encoding": "chunked"})])
    def test_the_head_decides_even_if_the_body_of_the_answer_breaks_off(
        self, clients: Any, how: str, headers: Mapping[str, str]
    ) -> None:
        with StandIn([Fault(processed=True, status=202, how=how, headers=headers)]) as provider:
            client = clients(provider.url)
            client.send(batch("a"))
            client.send(batch("b"))
            assert (provider.processed, provider.connections) == ([(["a"], False), (["b"], False)], 2)

    @pytest.mark.parametrize("fault", [Fault(status=400), Fault(status=500), Fault(how=RESET)])
    def test_an_error_shows_neither_numbers_nor_texts_nor_the_token(self, clients: Any, fault: Fault) -> None:
        with StandIn([fault]) as provider:  # it echoes the request in its answers
            with pytest.raises(FastSmsingError) as caught:
                clients(provider.url, "the-token").send([Message("48123456789", "a private text", "a")])
        shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
        assert [secret for secret in ("48123456789", "private", "the-token") if secret in shown] == []


class TestReports:
    def test_reports_reach_every_subscriber_in_the_words_of_fastsmsing(self, clients: Any) -> None:
        with StandIn() as provider:
            client = clients(provider.url)
            inboxes: list[Updates[Any]] = [queue.Queue(), queue.Queue()]
            for inbox in inboxes:
                client.subscribe(inbox)
            provider.report(("a", "sent"))
            for inbox in inboxes:
                assert inbox.get(timeout=HANG) == {"a": fastsmsing.MessageStatus.CONFIRMED}
            provider.report(("b", "undeliverable"), ("c", "delivered"), ("d", "new word"))
            failed, delivered = fastsmsing.MessageStatus.FAILED, fastsmsing.MessageStatus.DELIVERED
            for inbox in inboxes:
                assert inbox.get(timeout=HANG) == {"b": failed, "c": delivered, "d": "new word"}

    def test_no_report_is_swallowed_by_a_later_one_of_the_same_message(self, clients: Any) -> None:
        with StandIn() as provider:
            provider.report(("a", "delivered"), ("b", "sent"), ("a", "sent"), ("b", "delivered"), ("a", "sent"))
            inbox: Updates[Any] = queue.Queue()
            clients(provider.url).subscribe(inbox)
            got = [{key: status.value for key, status in inbox.get(timeout=HANG).items()} for _ in range(3)]
        assert got == [{"a": "DELIVERED", "b": "CONFIRMED"}, {"a": "CONFIRMED", "b": "DELIVERED"}, {"a": "CONFIRMED"}]

    def test_polls_without_reports_disturb_no_subscriber(self, clients: Any) -> None:
        polls = threading.Semaphore(0)

        def counted() -> Iterator[Fault]:
            while True:
                polls.release()
                yield OK

        with StandIn(poll_faults=counted()) as provider:
            client = clients(provider.url)
            inbox: Updates[Any] = queue.Queue()
            client.subscribe(inbox)
            for _ in range(3):
                assert polls.acquire(timeout=HANG)
            client.stop()
            assert list(inbox.queue) == [None]

    def test_many_reports_come_in_pages_and_each_once(self, clients: Any) -> None:
        with StandIn() as provider:
            provider.report(*((f"m{number}", "sent") for number in range(1_234)))
            inbox: Updates[Any] = queue.Queue()
            clients(provider.url).subscribe(inbox)
            pages = [inbox.get(timeout=HANG) for _ in range(3)]
        assert [len(page) for page in pages] == [500, 500, 234]
        assert sorted(key for page in pages for key in page) == sorted(f"m{number}" for number in range(1_234))

    def test_polls_that_fail_lose_no_report(self, clients: Any, caplog: pytest.LogCaptureFixture) -> None:
        broken = [Fault(), Fault(how=RESET), Fault(status=404), Fault(processed=True, status=204)]
        with StandIn(poll_faults=broken) as provider:
            provider.report(("a", "delivered"))
            inbox: Updates[Any] = queue.Queue()
            client = clients(provider.url)
            client.subscribe(inbox)
            assert inbox.get(timeout=HANG) == {"a": fastsmsing.MessageStatus.DELIVERED}
            client.stop()
        reasons = [record.getMessage().partition(": ")[2] for record in caplog.records]
        assert reasons[::2] == ["503", "404"] and len(reasons) == 4


class TestStopping:
    def test_stop_closes_every_subscription_once_and_ends_thread_and_connections(self, clients: Any) -> None:
        with StandIn() as provider:
            client = clients(provider.url)
            inboxes: list[Updates[Any]] = [queue.Queue(), queue.Queue()]
            for inbox in inboxes:
                client.subscribe(inbox)
            client.send(batch("a"))
            client.stop()
            client.stop()
            left = [list(inbox.queue) for inbox in inboxes]
            assert [items[-1] for items in left] == [None, None]
            assert [items.count(None) for items in left] == [1, 1]
            assert [thread.name for thread in threading.enumerate() if "reports" in thread.name] == []
            for _ in range(provider.connections):
                assert provider.closed.acquire(timeout=HANG), "a connection stayed open"

    def test_after_stop_nothing_is_sent_and_a_subscriber_only_gets_none(self, clients: Any) -> None:
        with StandIn() as provider:
            client = clients(provider.url)
            client.stop()
            inbox: Updates[Any] = queue.Queue()
            client.subscribe(inbox)
            assert inbox.get_nowait() is None
            with pytest.raises(FastSmsingError, match="stopped"):
                client.send(batch("a"))
            assert provider.requests == []

    def test_stop_ends_a_request_under_way(self, clients: Any) -> None:
        with StandIn([Fault(how=STALL)]) as provider, ThreadPoolExecutor(1) as pool:
            client = clients(provider.url)
            sending = pool.submit(client.send, batch("a"))
            provider.wait_for(lambda: provider.requests == [["a"]])
            client.stop()
            assert isinstance(sending.exception(HANG), FastSmsingError)

    def test_a_client_that_was_never_subscribed_to_can_be_stopped(self) -> None:
        before = threading.active_count()
        HttpClient("http://127.0.0.1:1").stop()
        assert threading.active_count() == before


class TestFactory:
    def test_the_environment_describes_the_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with StandIn() as provider:
            monkeypatch.setenv("FASTSMSING_URL", provider.url)
            monkeypatch.setenv("FASTSMSING_TOKEN", "from the environment")
            monkeypatch.setenv("FASTSMSING_READ_TIMEOUT", "2.5")
            client = example.make_client()
            client.send(batch("a"))
            client.stop()
            assert provider.headers[0]["Authorization"] == "Bearer from the environment"

    def test_without_a_url_there_is_no_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FASTSMSING_URL", raising=False)
        with pytest.raises(ValueError, match="FASTSMSING_URL is not set"):
            example.make_client()

    @pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://host", "http://"])
    def test_a_url_that_is_none_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match="URL"):
            HttpClient(url)

    def test_the_command_finds_it_as_the_readme_says(self) -> None:
        env = {**os.environ, "PYTHONPATH": "tests", "FASTSMSING_URL": "http://127.0.0.1:1"}
        command = [sys.executable, "main.py", "--check", "--client", "example_provider.client:make_client"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG)
        assert (done.returncode, "good" in done.stdout) == (0, True)


class FinalsCounted(InMemoryRepository):
    """A repository that says when so many messages have a final status."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.all_final = threading.Event()
        self._missing = expected
        self._counting = threading.Lock()  # guards _missing

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        errors = super().update_all(updates)
        with self._counting:
            finals = [each for each, update in updates.items() if update is not MessageStatus.CONFIRMED]
            self._missing -= len(set(finals) - set(errors))
            if not self._missing:
                self.all_final.set()
        return errors


class Witness(HttpClient):
    """The client, with the IDs of all batches that ran into its time limit: a busy machine may delay a good answer."""

    def __init__(self, url: str, **options: float) -> None:
        super().__init__(url, "secret", **options)
        self.timed_out: list[list[str]] = []

    def send(self, messages: Sequence[Message]) -> Mapping[str, str] | None:
        try:
            return super().send(messages)
        except FastSmsingError as error:
            if isinstance(error.__cause__, TimeoutError):
                self.timed_out.append([message.message_id for message in messages])
            raise


def ask(address: Sequence[Any], requests: Sequence[tuple[str, str, str | None]]) -> list[Mapping[str, str]]:
    """The JSON answers to requests (method, path, body) made one after the other on one connection."""
    connection = http.client.HTTPConnection(address[0], address[1], timeout=HANG)
    answers = []
    try:
        for method, path, body in requests:
            connection.request(method, path, body)
            response = connection.getresponse()
            answers.append(json.loads(response.read()))
            assert response.status in (200, 202), answers[-1]
    finally:
        connection.close()
    return answers


def numbers_of(posts: Sequence[tuple[str, str, str]], posters: int) -> list[str]:
    """The numbers in the order in which the IDs come: each poster has a share of the posts."""
    return [json.loads(body)["PhoneNumber"] for start in range(posters) for _, _, body in posts[start::posters]]


def test_2000_messages_reach_a_final_status_through_a_provider_that_fails_30_percent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "smsproxy")  # of all the failures and of the reports that came late or twice
    total, posters = 2_000, 4  # one number in 500 is rejected with its batch, and one is refused by name
    numbers = [{250: "0700", 251: "00700"}.get(number % 500, f"48{number:09}") for number in range(total)]
    posts = [("POST", "/sms", json.dumps({"PhoneNumber": number, "Content": "Hi"})) for number in numbers]
    config = SmsProxyConfig(batch_size=20, max_delay=0.5, max_attempts=1_000, backoff_base=0.01, backoff_max=0.1)
    repository = FinalsCounted(total)
    rng = random.Random(20)
    with (
        StandIn(deck(rng), poll_faults=deck(random.Random(21)), seed=22, latency=0.02) as provider,
        SmsProxy(
            client := Witness(provider.url, connect_timeout=HANG, read_timeout=1.0, poll_interval=0.01),
            config,
            repository=repository,
        ) as proxy,
        serving(proxy) as server,
        ThreadPoolExecutor(posters) as pool,
    ):
        address = server.server_address[:2]
        accepted = pool.map(lambda share: ask(address, share), [posts[start::posters] for start in range(posters)])
        ids = [answer["ID"] for answers in accepted for answer in answers]
        assert repository.all_final.wait(2 * HANG), "not every message reached a final status"
        gets = [("GET", f"/sms/{message_id}", None) for message_id in ids]
        answers = pool.map(lambda share: ask(address, share), [gets[start::posters] for start in range(posters)])
        statuses = {gets[start + posters * index][1][5:]: answer["Status"]
                    for start, share in enumerate(answers) for index, answer in enumerate(share)}  # fmt: skip

    rejected = {message_id for message_id, number in zip(ids, numbers_of(posts, posters)) if number.startswith("0")}
    words = {"delivered": "DELIVERED", "undeliverable": "FAILED"}
    assert statuses == {
        message_id: "FAILED" if message_id in rejected else words[provider.fate(message_id)] for message_id in ids
    }
    assert provider.messages.keys() == set(ids) - rejected
    assert 0.25 <= provider.failures / len(provider.requests) <= 0.35
    assert provider.too_early == [], "a Retry-After was not waited for"
    outcomes: dict[str, list[bool]] = {}  # of each time that a message was processed: could the sender not know?
    for processed, unknown in provider.processed:
        for message_id in processed:
            outcomes.setdefault(message_id, []).append(unknown or processed in client.timed_out)
    assert [message_id for message_id, times in outcomes.items() if not all(times[:-1])] == []
    assert any(len(times) > 1 for times in outcomes.values()), "the faults made no duplicate, so nothing was tested"


class Careless(FastSmsingError):
    """An error whose author forgot the base class."""

    def __init__(self, code: int) -> None:
        self.code = code


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class TestCarelessProviders:
    """What the proxy makes of a provider that is written with less care than the example."""

    @pytest.mark.parametrize(
        "error",
        [
            Careless(7),
            Unprintable(),
            FastSmsingError("busy", retry_after=None),  # type: ignore[arg-type]
            FastSmsingError("busy", retry_after="0"),  # type: ignore[arg-type]
            KeyboardInterrupt(),
            SystemExit(),
        ],
        ids=["no base class", "unprintable", "no number", "a string", "interrupt", "exit"],
    )
    def test_a_batch_survives_whatever_its_first_request_raises(self, error: BaseException) -> None:
        provider = Scripted(error)
        with SmsProxy(provider, SmsProxyConfig(batch_size=1, backoff_base=0.0)) as proxy:
            accepted = proxy.send(SendMessage("48123456789", "Hi"))
            assert proxy.stop(HANG) == 0
            assert provider.ids == [accepted.id]

    def test_a_wait_that_is_no_number_is_no_wait(self) -> None:
        provider = Scripted(FastSmsingError("busy", retry_after=float("nan")))
        with SmsProxy(provider, SmsProxyConfig(batch_size=1, backoff_base=0.0)) as proxy:
            accepted = proxy.send(SendMessage("48123456789", "Hi"))
            provider.wait_for(lambda batches: bool(batches))
            assert provider.ids == [accepted.id]

    def test_texts_of_asterisks_do_not_blow_up_the_reason_of_a_failure(self) -> None:
        provider = Scripted(RejectedError("o"))
        texts = ["o", *["*"] * 12]
        with SmsProxy(provider, SmsProxyConfig(batch_size=len(texts))) as proxy:
            for text in texts:
                proxy.send(SendMessage("48123456789", text))
            proxy.stop(HANG)
            assert len(proxy.statistics.get_statistics().last_error or "") < 100

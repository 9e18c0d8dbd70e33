"""The example of a real provider: its client alone against the stand-in, then the whole service with it."""
from __future__ import annotations

import contextlib
import email.utils
import hashlib
import hmac
import itertools
import json
import logging
import queue
import random
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import command_line
import fastsmsing
import main
from example_provider.client import HttpClient, PushedClient, make_client, make_pushed_client
from example_provider.stand_in import CUT, HANG_UP, OK, RESET, STALL, Fault, StandIn, deck
from fastsmsing import FastSmsingError, Message, RejectedError
from helpers import Peer, every_thread_ends, raw, serving
from providers import HANG
from smsproxy import InMemoryRepository, MessageStatus, Reason, SendMessage, SmsProxy, SmsProxyConfig

__all__ = ["every_thread_ends"]  # a fixture

NUMBER, TEXT, TOKEN = "48123456789", "Zażółć 🚚", "the-token"
CONFIRMED, FAILED, DELIVERED = fastsmsing.MessageStatus


def batch(*ids: str) -> list[Message]:
    """Messages with these IDs."""
    return [Message(NUMBER, TEXT, message_id) for message_id in ids]


@contextlib.contextmanager
def connected(
    *faults: Fault, poll_faults: Iterable[Fault] = (), latency: float = 0.0, **options: Any
) -> Iterator[tuple[StandIn, HttpClient]]:
    """The stand-in with these faults and a client of it, which is stopped at the end."""
    with StandIn(faults, poll_faults=poll_faults, latency=latency) as provider:
        options = {"connect_timeout": HANG, "read_timeout": HANG, "poll_interval": 0.01, **options}
        client = HttpClient(provider.url, TOKEN, **options)
        try:
            yield provider, client
        finally:
            client.stop()


def subscribed(client: HttpClient) -> queue.Queue[Any]:
    inbox: queue.Queue[Any] = queue.Queue()
    client.subscribe(inbox)
    return inbox


def taken(inbox: queue.Queue[Any]) -> Any:
    """The next that was put, applied as the service does."""
    item = inbox.get(timeout=HANG)
    inbox.task_done()
    return item


# Sending


def test_a_batch_is_one_authorized_request_that_arrives_unchanged_and_connections_are_kept_alive() -> None:
    with connected() as (provider, client):
        for number in range(5):
            assert not client.send(batch(f"{number}a", f"{number}b"))
        assert (len(provider.processed), provider.connections) == (5, 1)
        assert provider.processed[0] == (["0a", "0b"], False)
        assert provider.messages["0b"] == {"ID": "0b", "To": NUMBER, "Text": TEXT}
        assert provider.headers[0]["Authorization"] == f"Bearer {TOKEN}"


def test_threads_that_send_at_a_time_have_connections_of_their_own() -> None:
    with connected(latency=0.002) as (provider, client), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: client.send(batch(str(number))), range(200), timeout=HANG))
        assert sorted(ids[0] for ids, _ in provider.processed) == sorted(map(str, range(200)))
        assert provider.connections <= 8


def test_a_connection_that_went_stale_is_replaced_before_anything_is_sent() -> None:
    with connected(Fault(processed=True, status=202, how=HANG_UP)) as (provider, client):
        client.send(batch("a"))
        assert provider.closed.acquire(timeout=HANG)
        client.send(batch("b"))
        assert (provider.requests, provider.connections) == ([["a"], ["b"]], 2)


@pytest.mark.parametrize("fault", [Fault(how=RESET), Fault(processed=True, how=RESET), Fault(how=STALL)])
def test_a_request_without_an_answer_is_an_error_to_be_retried_and_never_repeated(fault: Fault) -> None:
    with connected(OK, fault, read_timeout=0.1 if fault.how == STALL else HANG) as (provider, client):
        client.send(batch("a"))
        with pytest.raises(FastSmsingError, match="no answer") as caught:
            client.send(batch("b"))  # on the same connection, so that it could be taken for stale
        assert not isinstance(caught.value, RejectedError)
        assert (provider.requests, provider.connections) == ([["a"], ["b"]], 1)


@pytest.mark.parametrize("listens", [False, True])
def test_a_connection_that_is_refused_or_never_made_is_an_error_to_be_retried(listens: bool) -> None:
    with socket.socket() as server, socket.socket() as first:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(0)  # one more connection fills the backlog, so that the next waits for ever
            first.connect(server.getsockname())
        client = HttpClient("http://{}:{}".format(*server.getsockname()), connect_timeout=0.1 if listens else HANG)
        with pytest.raises(FastSmsingError, match="no answer") as caught:
            client.send(batch("a"))
        assert not isinstance(caught.value, RejectedError)


def test_messages_refused_by_name_come_back_with_their_reasons_and_the_others_are_taken() -> None:
    with connected() as (provider, client):
        refused = client.send([*batch("a"), Message("0048", "Hi", "b"), *batch("c")])
        assert (refused, set(provider.messages)) == ({"b": "no such number"}, {"a", "c"})
        with pytest.raises(RejectedError, match="400"):  # a number that is not named
            client.send([*batch("d"), Message("048", "Hi", "e")])
        assert (provider.rejected, set(provider.messages)) == ([["d", "e"]], {"a", "c"})


@pytest.mark.parametrize(("status", "kind"), [
    *[(status, RejectedError) for status in (400, 413, 422)],
    *[(status, FastSmsingError) for status in (302, 401, 402, 403, 404, 405, 408, 409, 410, 425, 429, 451)],
    *[(status, FastSmsingError) for status in (500, 502, 503, 504)]])  # fmt: skip
def test_only_a_response_about_the_batch_rejects_it_and_any_other_is_to_be_retried(status: int, kind: type) -> None:
    with connected(Fault(status=status)) as (provider, client):
        with pytest.raises(FastSmsingError, match=str(status)) as caught:
            client.send(batch("a"))
        assert type(caught.value) is kind
        client.send(batch("a"))
        assert provider.connections == 1, "an answer leaves its connection in order"


@pytest.mark.parametrize(
    ("value", "wait"),
    [("7", 7.0), ("0", 0.0), ("-5", 0.0), ("soon", 0.0), ("²", 0.0), ("", 0.0), ("9" * 400, 3600.0),
     ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
     (email.utils.formatdate(time.time() + 3_000, usegmt=True), pytest.approx(2_000, abs=1_000))],
)  # fmt: skip
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_or_as_a_date_becomes_the_least_wait(status: int, value: str, wait: float) -> None:
    fault = Fault(status=status, headers={"Retry-After": value})
    with connected(fault) as (_, client), pytest.raises(FastSmsingError) as caught:
        client.send(batch("a"))
    assert caught.value.retry_after == wait


@pytest.mark.parametrize(("how", "headers"), [(CUT, {}), (HANG_UP, {"Transfer-Encoding": "chunked"})])
def test_the_head_decides_even_if_the_body_of_the_answer_breaks_off(how: str, headers: Mapping[str, str]) -> None:
    with connected(Fault(processed=True, status=202, how=how, headers=headers)) as (provider, client):
        client.send(batch("a"))
        client.send(batch("b"))
        assert (provider.processed, provider.connections) == ([(["a"], False), (["b"], False)], 2)


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"null", b"[]", b'{"Refused": 7}', b"[" * 100_000])
def test_a_batch_is_taken_whatever_the_body_of_a_2xx_says(body: bytes) -> None:
    with connected(Fault(processed=True, status=200, body=body)) as (_, client):
        assert client.send(batch("a")) is None


@pytest.mark.parametrize("fault", [Fault(status=400), Fault(status=500), Fault(how=RESET)])
def test_an_error_shows_neither_numbers_nor_texts_nor_the_token(fault: Fault) -> None:
    with connected(fault) as (_, client), pytest.raises(FastSmsingError) as caught:
        client.send(batch("a"))  # the stand-in echoes the request in its answers
    shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert [secret for secret in (NUMBER, TEXT, TOKEN) if secret in shown] == []


# Reports, the end, and the start


def test_reports_reach_every_subscriber_in_the_words_of_fastsmsing_and_none_is_swallowed_by_a_later_one() -> None:
    reports = [("a", "delivered"), ("b", "sent"), ("a", "sent"), ("b", "undeliverable"), ("a", "sent"), ("c", "new")]
    expected = [{"a": DELIVERED, "b": CONFIRMED}, {"a": CONFIRMED, "b": FAILED}, {"a": CONFIRMED, "c": "new"}]
    with connected() as (provider, client):
        inboxes = [subscribed(client), subscribed(client)]
        provider.report(*reports)
        assert [[taken(inbox) for _ in expected] for inbox in inboxes] == [expected, expected]


def test_polls_without_reports_disturb_no_subscriber() -> None:
    with connected() as (provider, client):
        inbox = subscribed(client)
        provider.wait_for(lambda: len(provider.cursors) >= 3)
        client.stop()
        assert list(inbox.queue) == [None]


def test_many_reports_come_in_pages_and_each_once() -> None:
    names = [f"m{number:04}" for number in range(1_234)]
    with connected() as (provider, client):
        provider.report(*((name, "sent") for name in names))
        inbox = subscribed(client)
        pages = [list(taken(inbox)) for _ in range(3)]
    assert [names[:500], names[500:1_000], names[1_000:]] == pages


def test_polls_that_fail_lose_no_report() -> None:
    broken = [Fault(), Fault(how=RESET), Fault(status=404), Fault(processed=True, status=204)]
    broken += [Fault(status=200, body=body) for body in (b"{}", b'{"Reports": [], "Next": []}', b"[" * 100_000)]
    with connected(poll_faults=broken) as (provider, client):
        provider.report(("a", "delivered"))
        assert taken(subscribed(client)) == {"a": DELIVERED}


def test_polls_that_fail_are_logged_first_once_a_minute_and_when_they_succeed(caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count().__next__  # a second goes by with each look at it
    with connected(poll_faults=[Fault()] * 95, poll_interval=0.001, clock=clock) as (provider, client):
        provider.report(("a", "delivered"))
        assert taken(subscribed(client)) == {"a": DELIVERED}
    assert caplog.messages == [
        "no delivery reports: 503",
        "no delivery reports: 503 (61 times in 60 s)",
        "over after 95 s: no delivery reports (95 times)",
    ]


ODD: list[Any] = [  # entries of a page that are no reports
    None, 7, "text", [], {}, {"ID": "b"}, {"Status": "sent"}, {"ID": 5, "Status": "sent"}, {"ID": "b", "Status": []},
]  # fmt: skip


def test_an_odd_report_is_skipped_and_counted_and_those_around_it_arrive(caplog: pytest.LogCaptureFixture) -> None:
    known = [("a", "sent"), ("a", "lost in space"), ("c", "delivered")]
    first, *others = [{"ID": message_id, "Status": status} for message_id, status in known]
    reports = [first, *ODD, *others]
    page = Fault(status=200, body=json.dumps({"Reports": reports, "Next": "0"}).encode())
    with connected(poll_faults=[page]) as (provider, client):
        provider.report(("d", "delivered"))
        inbox = subscribed(client)
        found = [taken(inbox) for _ in range(3)]
    assert found == [{"a": CONFIRMED}, {"a": "lost in space", "c": DELIVERED}, {"d": DELIVERED}]
    assert [re.sub(r"\d+ s", "some s", message) for message in caplog.messages] == [
        "reports that cannot be read: 9 of 12", "over after some s: reports that cannot be read (once)",
    ]  # fmt: skip


def test_reports_are_acknowledged_when_they_are_applied_and_a_stop_does_not_wait_for_that() -> None:
    with connected() as (provider, client):
        provider.report(("a", "sent"))
        inbox = subscribed(client)
        assert inbox.get(timeout=HANG) == {"a": CONFIRMED}
        assert provider.cursors == [""]
        inbox.task_done()
        provider.wait_for(lambda: provider.cursors[1:2] == ["1"])
        provider.report(("b", "sent"))
        assert inbox.get(timeout=HANG) == {"b": CONFIRMED}
        client.stop()
        assert provider.cursors[-1] == "1"


def test_stop_closes_every_subscription_once_and_ends_all_connections_and_nothing_is_sent_after_it() -> None:
    with connected() as (provider, client):
        inboxes = [subscribed(client), subscribed(client)]
        client.send(batch("a"))
        client.stop()
        client.stop()
        left = [list(inbox.queue) for inbox in inboxes]
        assert [(items[-1], items.count(None)) for items in left] == [(None, 1)] * 2
        assert subscribed(client).get_nowait() is None
        with pytest.raises(FastSmsingError, match="stopped"):
            client.send(batch("b"))
        assert provider.requests == [["a"]]
        for _ in range(provider.connections):
            assert provider.closed.acquire(timeout=HANG), "a connection stayed open"


def test_stop_ends_a_request_under_way() -> None:
    with connected(Fault(how=STALL)) as (provider, client), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, batch("a"))
        provider.wait_for(lambda: provider.requests == [["a"]])
        client.stop()
        assert isinstance(sending.exception(HANG), FastSmsingError)


def test_the_environment_describes_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the command adds to
    with StandIn() as provider:
        for name, value in (("URL", provider.url), ("TOKEN", "of the environment"), ("READ_TIMEOUT", "2.5")):
            monkeypatch.setenv(f"FASTSMSING_{name}", value)
        client = main.make_client(command_line.load("example_provider.client:make_client"))  # as the README says
        client.send(batch("a"))
        client.stop()
        assert provider.headers[0]["Authorization"] == "Bearer of the environment"


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://host", "http://"])
def test_without_a_url_there_is_no_client(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSMSING_URL", url)
    with pytest.raises(ValueError, match="URL"):
        make_client()


# The client in the README


@contextlib.contextmanager
def readme(*faults: Fault, poll_faults: Iterable[Fault] = ()) -> Iterator[tuple[StandIn, Any]]:
    """The stand-in with these faults, and the README's client of it, which polls without a pause."""
    text = Path(main.__file__).with_name("README.md").read_text("utf-8")
    found = re.search(r"## Your provider\n.*?```python\n(.*?)```", text, re.S)
    assert found is not None
    assert found[1].count("wait(1)") == 1
    shop = types.ModuleType("shop")
    exec(found[1].replace("wait(1)", "wait(0.001)"), vars(shop))
    with StandIn(faults, poll_faults=poll_faults) as provider:
        vars(shop)["URL"] = provider.url
        client = shop.Client()
        try:
            yield provider, client
        finally:
            client.stopped.set()


@pytest.mark.parametrize(("status", "kind"), [
    *[(status, RejectedError) for status in (400, 413, 422)],
    *[(status, FastSmsingError) for status in (401, 403, 404, 408, 429, 500, 503)]])  # fmt: skip
def test_the_readmes_client_rejects_only_on_a_response_about_the_batch(status: int, kind: type) -> None:
    with readme(Fault(status=status)) as (_, client):
        with pytest.raises(FastSmsingError, match=str(status)) as caught:
            client.send(batch("a"))
        assert type(caught.value) is kind


@pytest.mark.parametrize("fault", [
    *[Fault(status=200, body=body) for body in (b"", b"<html>", b"\xff", b"null", b"[]", b"[" * 100_000)],
    Fault(status=202, how=CUT), Fault(status=202, how=HANG_UP, headers={"Transfer-Encoding": "chunked"})])  # fmt: skip
def test_the_readmes_client_takes_any_2xx_as_taken(fault: Fault) -> None:
    with readme(fault) as (_, client):
        assert client.send(batch("a")) is None


def test_the_readmes_client_names_the_messages_that_are_refused() -> None:
    with readme() as (_, client):
        assert client.send([*batch("a"), Message("0048", "Hi", "b")]) == {"b": "no such number"}


def test_the_readmes_client_can_be_stopped_before_it_is_used() -> None:  # as --check does
    with readme() as (_, client):
        client.stop()


def test_the_readmes_client_goes_on_polling_whatever_it_hears() -> None:
    page = {"Reports": [*ODD, {"ID": "a", "Status": "lost in space"}, {"ID": "b", "Status": "sent"}], "Next": "0"}
    bodies = [b"<html>", b"null", b"[]", b"{}", b'{"Reports": 7, "Next": ""}', json.dumps(page).encode()]
    faults = [Fault(), Fault(how=RESET), *(Fault(status=200, body=body) for body in bodies)]
    with readme(poll_faults=faults) as (provider, client):
        provider.report(("c", "delivered"))
        inbox = subscribed(client)
        found = {}
        while "c" not in found:
            found.update(taken(inbox))
        client.stop()
        assert taken(inbox) is None
    assert {name: found[name] for name in "abc"} == {"a": "lost in space", "b": "CONFIRMED", "c": "DELIVERED"}


# The service with the client


class FinalsCounted(InMemoryRepository):
    """A repository that says when so many messages have a final status."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.all_final = threading.Event()
        self._missing = expected  # for the updater's thread only

    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        errors = super().update_all(updates)
        finals = {each for each, update in updates.items() if update is not MessageStatus.CONFIRMED}
        self._missing -= len(finals - errors.keys())
        if not self._missing:
            self.all_final.set()
        return errors


class Witness(HttpClient):
    """The client, with the IDs of all batches that ran into its time limit: a busy machine may delay a good answer."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, TOKEN, **options)
        self.timed_out: list[list[str]] = []

    def send(self, messages: Sequence[Message]) -> Mapping[str, str] | None:
        try:
            return super().send(messages)
        except FastSmsingError as error:
            if isinstance(error.__cause__, TimeoutError):
                self.timed_out.append([message.message_id for message in messages])
            raise


def test_a_wrong_token_costs_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "smsproxy")
    config = SmsProxyConfig(batch_size=5, max_delay=0.0, backoff_base=0.01, backoff_max=0.01)
    repository = FinalsCounted(20)
    with StandIn([Fault(status=401)] * 10) as provider:
        client = HttpClient(provider.url, TOKEN, poll_interval=0.01)
        with SmsProxy(client, config, repository=repository) as proxy:
            ids = [proxy.send(SendMessage(NUMBER, TEXT)).id for _ in range(20)]
            assert repository.all_final.wait(HANG)
            found = {each: proxy.get_status(each).value.lower() for each in ids}
    assert found == {each: {"undeliverable": "failed"}.get(fate := provider.fate(each), fate) for each in ids}


def test_1000_messages_reach_a_final_status_through_a_provider_that_fails_30_percent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "smsproxy")  # of all the failures and of the reports that came late or twice
    # One number is rejected with its batch, and one is refused by name.
    numbers = [{250: "0700", 251: "00700"}.get(number, f"48{number:09}") for number in range(1_000)]
    config = SmsProxyConfig(batch_size=20, max_delay=0.5, max_attempts=1_000, backoff_base=0.01, backoff_max=0.1)
    repository = FinalsCounted(len(numbers))
    with StandIn(deck(random.Random(20)), poll_faults=deck(random.Random(21)), seed=22, latency=0.02) as provider:
        client = Witness(provider.url, connect_timeout=HANG, read_timeout=1.0, poll_interval=0.01)
        with SmsProxy(client, config, repository=repository) as proxy, serving(proxy) as server, Peer(server) as peer:
            posts = [raw("POST", "/sms", {"PhoneNumber": number, "Content": "Hi"}) for number in numbers]
            ids = [peer.exchange(data)[1]["ID"] for data in posts]
            assert repository.all_final.wait(2 * HANG), "not every message reached a final status"
            found = {each: peer.exchange(raw("GET", f"/sms/{each}"))[1]["Status"] for each in ids}
    rejected = {message_id for message_id, number in zip(ids, numbers, strict=True) if number.startswith("0")}
    words = {"delivered": "DELIVERED", "undeliverable": "FAILED"}
    assert found == {each: "FAILED" if each in rejected else words[provider.fate(each)] for each in ids}
    assert provider.messages.keys() == set(ids) - rejected
    assert 0.25 <= provider.failures / len(provider.requests) <= 0.35
    outcomes: dict[str, list[bool]] = {}  # of each time that a message was processed: could the sender not know?
    for processed, unknown in provider.processed:
        for message_id in processed:
            outcomes.setdefault(message_id, []).append(unknown or processed in client.timed_out)
    assert [message_id for message_id, times in outcomes.items() if not all(times[:-1])] == []
    assert any(len(times) > 1 for times in outcomes.values()), "the faults made no duplicate, so nothing was tested"


# Reports that are pushed


SECRET = b"a secret of both"


def signature(data: bytes) -> str:
    return hmac.new(SECRET, data, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("echoes", [True, False], ids=["IDs are echoed", "IDs are in the URL"])
def test_pushed_reports_reach_every_message(echoes: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "smsproxy")  # reports come late and twice
    repository = FinalsCounted(100)
    config = SmsProxyConfig(batch_size=20, max_delay=0.0)
    with contextlib.ExitStack() as stack:
        listener = socket.create_server(("127.0.0.1", 0))  # for its port, which the provider has to know first
        port = listener.getsockname()[1]
        listener.close()
        url = f"http://127.0.0.1:{port}/reports"
        provider = stack.enter_context(StandIn(push_to=url, secret=SECRET))
        client = PushedClient(provider.url, TOKEN, secret=SECRET, callback="" if echoes else url)
        proxy = stack.enter_context(SmsProxy(client, config, repository=repository))
        stack.enter_context(serving(proxy, receiver=client, address=("127.0.0.1", port)))
        ids = [proxy.send(SendMessage(NUMBER, TEXT)).id for _ in range(100)]
        assert repository.all_final.wait(HANG)
        found = {each: proxy.get_status(each).value.lower() for each in ids}
    assert found == {each: {"undeliverable": "failed"}.get(fate := provider.fate(each), fate) for each in ids}
    assert (provider.cursors, all("Callback" in each for each in provider.messages.values())) == ([], not echoes)


BODY = json.dumps({"Reports": [{"ID": "a", "Status": "sent"}, {"ID": "b"}, {"ID": "c", "Status": "odd"}]}).encode()
ONE = b'{"Status": "delivered", "ID": "b"}'
PUSHED: list[tuple[str, str, bytes, Any]] = [
    ("", signature(BODY), BODY, {"a": CONFIRMED, "c": "odd"}),
    (f"id=a&signature={signature(b'a')}", "", ONE, {"a": DELIVERED}),
    ("", signature(BODY), BODY + b" ", PermissionError), ("", "", BODY, PermissionError),
    ("", "\xff", BODY, PermissionError), (f"id=b&signature={signature(b'a')}", "", ONE, PermissionError),
    ("id=a", signature(ONE), ONE, PermissionError), (f"id=a&signature={signature(b'a')}", "", b"{}", ValueError),
    *[("", signature(body), body, ValueError) for body in (b"", b"[]", b"{}", b'{"Reports": 1}', b'{"Reports": [1]}')],
]  # fmt: skip


@pytest.mark.parametrize(("query", "signed", "body", "outcome"), PUSHED)
def test_what_is_pushed_is_taken_only_with_the_signature_of_the_provider_or_our_own(
    query: str, signed: str, body: bytes, outcome: Any
) -> None:
    with StandIn() as provider, contextlib.closing(AppliedAtOnce()) as updates:
        client = PushedClient(provider.url, TOKEN, secret=SECRET)
        client.subscribe(updates.queue)
        if isinstance(outcome, dict):
            client.receive(query, {"x-signature": signed}, body)
        else:
            with pytest.raises(outcome):
                client.receive(query, {"x-signature": signed}, body)
        client.stop()
    assert updates.taken == ([outcome] if isinstance(outcome, dict) else [])


class AppliedAtOnce:
    """A subscriber that applies what it gets, until it gets None."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Any] = queue.Queue()
        self.taken: list[Any] = []
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        while (update := self.queue.get()) is not None:
            self.taken.append(update)
            self.queue.task_done()

    def close(self) -> None:
        self._thread.join(HANG)


def test_the_client_for_pushed_reports_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSMSING_URL", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="FASTSMSING_SECRET is not set"):
        make_pushed_client()
    monkeypatch.setenv("FASTSMSING_SECRET", "x")
    client = make_pushed_client()
    client.stop()
    assert isinstance(client, fastsmsing.ReportReceiver)
    assert not isinstance(make_client(), fastsmsing.ReportReceiver)

"""The REST interface over a real server on a free port: responses, groups, figures, health, keys, private logs."""
from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import math
import operator
import re
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import command_line
import request_groups
import restapi
from change_outbox import Change, ChangeBody
from fastsmsing import FastSmsingError, RejectedError
from helpers import HANG, Peer, Response, RestServer, exchange, raw, request, serving
from http_doubles import DrivenFront
from http_exchange import Exchange
from providers import Gate, Receiver, Recorder, Scripted
from smsproxy import (
    TRANSITIONS,
    InMemoryRepository,
    MessageStatus,
    Reason,
    RepositoryUnavailableError,
    SendMessage,
    SmsProxy,
    SmsProxyConfig,
)
from webhook_message import content_of, signed_headers

NUMBER, TEXT = "48123456789", "Your parcel is here"
GOOD = {"PhoneNumber": NUMBER, "Content": TEXT}
KEYS = {"shop": "first-key", "batch job": "second-key"}
KEY_LINE, BEARER = "Idempotency-Key: order-1", "Authorization: Bearer first-key"
WAITS = SmsProxyConfig(max_delay=None)  # nothing leaves before a stop
SINGLY = SmsProxyConfig(batch_size=1, max_attempts=1)
ONE_PENDING = SmsProxyConfig(batch_size=1, max_pending=1)


class Guarded(InMemoryRepository):
    """A repository that may block: `closed` methods wait until `opened`, those in `errors` raise; `calls` has all."""

    def __init__(self, *closed: str, blocking: bool = True, **errors: BaseException) -> None:
        super().__init__()
        self.blocking, self.closed, self.errors = blocking, closed, dict(errors)
        self.calls: list[tuple[Any, ...]] = []  # name and arguments
        self._entered, self.opened = threading.Semaphore(0), threading.Event()
        for name in ASKED:
            setattr(self, name, functools.partial(self._call, name))

    def _call(self, name: str, *args: Any) -> Any:
        self.calls.append((name, *args))
        if name in self.closed:
            self._entered.release()
            assert self.opened.wait(HANG), f"nobody opened {name}"
        if name in self.errors:
            raise self.errors[name]
        return getattr(super(), name)(*args)

    def wait_entered(self) -> None:
        """Blocks until a call waits for the opening."""
        assert self._entered.acquire(timeout=HANG), "nobody came"


@contextlib.contextmanager
def service(
    client: Any = None, config: SmsProxyConfig = WAITS, repository: Any = None, **options: Any
) -> Iterator[RestServer]:
    """A running service; without arguments its provider takes everything, and nothing leaves before a stop."""
    proxy = SmsProxy(client or Recorder(), config, repository=repository)
    with contextlib.ExitStack() as stack:
        stack.callback(proxy.stop, HANG)
        proxy.start()
        server = stack.enter_context(serving(proxy, **options))
        for each in (repository, client):
            if isinstance(each, (Guarded, Gate)):
                stack.callback(each.opened.set)
        yield server


def post(content: object = TEXT, *lines: str) -> bytes:
    return raw("POST", "/sms", {**GOOD, "Content": content}, *lines)


ASKED = {  # by the call of the repository that it leads to
    "save_all": post(), "get": raw("GET", "/sms/x"), "cancel": raw("DELETE", "/sms/x"), "check": raw("GET", "/healthz"),
    "save_together": raw("POST", "/sms/bulk", {"Messages": [GOOD]}),
}  # fmt: skip


def accept(server: RestServer, *lines: str) -> str:
    """The ID of a message that is accepted."""
    return str(exchange(server, post(TEXT, *lines))[1]["ID"])


@contextlib.contextmanager
def connected(server: RestServer, count: int) -> Iterator[list[Peer]]:
    """So many peers, all accepted."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server)) for _ in range(count)]
        assert {peer.exchange(raw("GET", "/openapi.json"))[0] for peer in peers} == {200}
        yield peers


@pytest.fixture
def idle() -> Iterator[RestServer]:
    with service(receiver=Receiver()) as server:
        yield server


@pytest.fixture
def guarded() -> Iterator[RestServer]:
    with service(api_keys=KEYS, receiver=Receiver()) as server:
        yield server


# Accepting


@pytest.mark.parametrize("path", ["/sms", "/sms/", "/sms?x=1"])
def test_a_message_is_accepted_with_its_id_and_where_to_ask_for_it(idle: RestServer, path: str) -> None:
    status, doc, headers = request(idle, "POST", path, GOOD)
    assert (status, list(doc), headers["Location"]) == (202, ["ID"], f"/sms/{doc['ID']}")
    assert (headers["Content-Type"], str(uuid.UUID(doc["ID"]))) == ("application/json", doc["ID"])
    assert request(idle, "GET", headers["Location"])[:2] == (200, {"Status": "ACCEPTED"})


TEXTS = ["Zażółć gęślą \U0001f4e6", "a\0b\r\n", "\ufeff\u2028", "\U0001f4e6" * 1_600]
ACCEPTABLE: dict[str, tuple[bytes, str]] = {
    **{f"{number} {content}": (json.dumps({number: NUMBER, content: TEXT}).encode(), TEXT)
       for number in ("PhoneNumber", "phoneNumber", "phone_number", "PHONE_NUMBER", "_phone__number_")
       for content in ("Content", "content", "CONTENT", "con_tent")},
    "white space around": (b" \t\r\n" + json.dumps(GOOD).encode() + b"\n\n ", TEXT),
    **{f"text {number}, {'escaped' if escaped else 'as it is'}": (
        json.dumps({**GOOD, "Content": text}, ensure_ascii=escaped).encode(), text)
        for number, text in enumerate(TEXTS) for escaped in (True, False)},
}  # fmt: skip


@pytest.mark.parametrize(("body", "text"), ACCEPTABLE.values(), ids=ACCEPTABLE)
def test_a_message_may_be_written_in_many_ways_and_reaches_the_provider_unchanged(body: bytes, text: str) -> None:
    with service(client := Recorder()) as server:
        assert request(server, "POST", "/sms", body, {"Content-Type": "text/plain"})[0] == 202
        server.proxy.stop(HANG)
    assert [(each.phone_number, each.message) for batch in client.batches for each in batch] == [(NUMBER, text)]


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the body is empty; it must be a JSON object"),
    "blank": (b" \r\n", "the body is empty; it must be a JSON object"),
    "form": (urllib.parse.urlencode(GOOD).encode(), "the body is form-encoded; it must be a JSON object"),
    "no JSON": (b'{"PhoneNumber": "48",\n "Content" "x"}', "Expecting ':' delimiter at line 2, column 12"),
    "something behind": (b"{}\n {}", "Extra data at line 2, column 2"),
    "a BOM": (b"\xef\xbb\xbf{}", "JSON object in UTF-8"),
    "Latin-1": ('{"Content": "é"}'.encode("latin-1"), "JSON object in UTF-8"),
    "NaN": (b'{"PhoneNumber": NaN, "Content": "x"}', "PhoneNumber must be a string"),
    "a boolean": (b'{"PhoneNumber": "48", "Content": true}', "Content must be a string"),
    "null": (b'{"PhoneNumber": null, "Content": "x"}', "PhoneNumber must be a string"),
    "nested deeply": (b'{"Content": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "JSON object"),
    **{text: (text.encode(), "must be a JSON object") for text in ("[]", "null", '"x"', "1", "[{}]")},
    "a giant number": (b'{"PhoneNumber": ' + b"4" * 20_000 + b', "Content": "x"}', "PhoneNumber must be a string"),
    "an empty text": (b'{"PhoneNumber": "48", "Content": ""}', "Content must not be empty"),
    "an empty number": (b'{"PhoneNumber": "", "Content": "x"}', "PhoneNumber must not be empty"),
    "a long text": (b'{"PhoneNumber": "48", "Content": "%b"}' % (b"x" * 1601), "Content must have at most 1600 char"),
    "a long number": (b'{"PhoneNumber": "%b", "Content": "x"}' % (b"4" * 16), "PhoneNumber must have at most 15 char"),
    "no number": (b'{"Content": "x"}', "PhoneNumber is missing"),
    "no text": (b'{"PhoneNumber": "48"}', "Content is missing"),
    "a plus": (b'{"PhoneNumber": "+48123", "Content": "x"}', "PhoneNumber must consist of the digits"),
    "twice, spelt in two ways": (b'{"phone_number": "48", "PhoneNumber": "48"}', "PhoneNumber is given twice"),
    "unknown": (b'{"PhoneNumber": "48", "Content": "x", "Sender": "us"}', "unknown field Sender"),
    "misspelt": (b'{"Phonenumbr": "48", "Content": "x"}', "unknown field Phonenumbr; did you mean PhoneNumber?"),
    "misspelt with underscores": (b'{"PhoneNumber": "48", "_contnt_": "x"}', "_contnt_; did you mean Content?"),
    "spelt apart": (b'{"PhoneNumber": "48", "c__o__n__t__e__n__t__s": "x"}', "t__s; did you mean Content?"),
    "unknown and odd inside": (b'{"o": {"a": 1, "A": NaN}, "PhoneNumber": "48", "Content": "x"}', "unknown field o"),
    "unknown, twice": (b'{"PhoneNumber": "48", "o": 1, "o": 2, "Content": "x"}', "unknown field o"),
    "unknown giant number": (b'{"PhoneNumber": "48", "Content": "x", "n": ' + b"9" * 20_000 + b"}", "unknown field n"),
    "a number as a name": (b'{"48123456789": "x"}', "unknown field ***********"),
    "a long name": (b'{"%b": "x"}' % (b"y" * 60_000), f"unknown field {'y' * 50}..."),
}  # fmt: skip


@pytest.mark.parametrize(("body", "problem"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_will_not_do_is_a_400_that_says_why_and_saves_nothing(body: bytes, problem: str) -> None:
    with service(repository=(repository := Guarded())) as server:
        status, doc, _ = request(server, "POST", "/sms", body)
    assert (status, list(doc), repository.calls) == (400, ["Error"], [])
    assert problem in doc["Error"]
    assert [word for word in ("Traceback", ".py", "Error:") if word in doc["Error"]] == []


# Everything else that can be asked


PATHS = {  # a path of each route → its methods
    "/sms": "POST", "/sms/": "POST", "/sms/bulk": "POST", "/reports": "POST",
    "/sms/some-id": "GET HEAD DELETE", "/metrics": "GET HEAD",
    "/healthz": "GET HEAD", "/livez": "GET HEAD", "/openapi.json": "GET HEAD", "/": "GET HEAD",
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_takes_its_methods_and_tells_all_others_which_these_are(idle: RestServer, path: str) -> None:
    methods = [*PATHS[path].split(), "OPTIONS"]
    others = {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - {*methods, "GET" if path == "/sms/" else ""}
    for method in others:
        status, doc, headers = request(idle, method, path, b"")
        assert (status, doc, headers["Allow"].split(", ")) == (405, {"Error": f"{method} is not allowed here"}, methods)
    status, doc, headers = request(idle, "OPTIONS", path)
    assert (status, doc, headers["Allow"].split(", ")) == (200, b"", methods)
    if "HEAD" in methods:
        of_get, of_head = request(idle, "GET", path), request(idle, "HEAD", path)
        assert (of_get[0], of_head[:2], of_get[2]["Content-Type"]) == (200, (200, b""), of_head[2]["Content-Type"])
        assert ("Content-Security-Policy" in of_get[2]) == (path == "/")


@pytest.mark.parametrize("path", ["/nowhere", "/sms/a/b", "/sms//", "/smsx", "/SMS", "/metrics/", "/index.html"])
def test_any_other_path_and_the_status_of_no_id_are_a_404(idle: RestServer, path: str) -> None:
    assert {request(idle, method, path, b"")[0] for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS")} == {404}
    assert {request(idle, method, "/sms/")[0] for method in ("GET", "HEAD")} == {404}


# How long a message may wait


WAITS_AND_AGES: dict[str, tuple[str, float | None, float | None]] = {
    "nothing said": ("", None, None), "at once": ('"MaxDelay": 0', 0.0, None),
    "a minute, in other letters": ('"max_delay": 60, "MAXAGE": 120', 60.0, 120.0),
    "the longest": ('"MaxDelay": 604800, "MaxAge": 604800.0', 604_800.0, 604_800.0),
    "short": ('"MaxDelay": 2.5e-1, "MaxAge": 1e-3', 0.25, 0.001),
}  # fmt: skip


@pytest.mark.parametrize(("said", "max_delay", "max_age"), WAITS_AND_AGES.values(), ids=WAITS_AND_AGES)
def test_a_sender_may_say_how_long_a_message_may_wait_and_how_old_it_may_become(
    said: str, max_delay: float | None, max_age: float | None
) -> None:
    body = json.dumps(GOOD)[:-1] + (f", {said}}}" if said else "}")
    with service(repository=(repository := Guarded())) as server:
        expected = server.proxy.entry(SendMessage(NUMBER, TEXT, max_delay, max_age))
        assert request(server, "POST", "/sms", body.encode())[0] == 202
        entry = next(call[1][0] for call in repository.calls if call[0] == "save_all")
    for name in ("linger", "default_linger", "max_age"):
        assert getattr(entry, name) == getattr(expected, name)


NO_NUMBERS = ("true", "false", "null", '"5"', "[5]", "{}", "NaN", "Infinity", "-Infinity", "1e999", "-1", "604800.01")


@pytest.mark.parametrize("field", ["MaxDelay", "MaxAge"])
@pytest.mark.parametrize("value", [*NO_NUMBERS, "9" * 20_000])
def test_a_time_that_will_not_do_is_a_400_that_names_the_field(idle: RestServer, field: str, value: str) -> None:
    body = json.dumps(GOOD)[:-1] + f', "{field}": {value}}}'
    status, doc, _ = request(idle, "POST", "/sms", body.encode())
    assert (status, doc["Error"].split(" must be a number of seconds")[0]) == (400, field)


def test_an_age_of_nothing_is_refused(idle: RestServer) -> None:
    assert request(idle, "POST", "/sms", {**GOOD, "MaxAge": 0})[0] == 400


# Cancelling


CANCELLED = {"Status": "FAILED", "Reason": "cancelled"}


@pytest.mark.parametrize("blocking", [False, True])
def test_a_message_that_waits_can_be_cancelled_and_is_never_sent(blocking: bool) -> None:
    with service(client := Recorder(), repository=Guarded(blocking=blocking)) as server:
        message_id, other = accept(server), accept(server)
        for _ in range(2):
            assert request(server, "DELETE", f"/sms/{message_id}")[:2] == (200, CANCELLED)
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, CANCELLED)
        server.proxy.stop(HANG)
    assert client.ids == [other]


@pytest.mark.parametrize("blocking", [False, True])
def test_what_is_in_a_batch_handed_over_or_final_cannot_be_cancelled_any_more(blocking: bool) -> None:
    with service(client := Gate(), SINGLY, Guarded(blocking=blocking)) as server:
        message_id = accept(server)
        client.wait_entered()
        for status in ("ACCEPTED", "CONFIRMED", "DELIVERED"):
            if status != "ACCEPTED":
                client.opened.set()
                client.wait_for(bool)
                applied(client, {message_id: status})
            code, doc, _ = request(server, "DELETE", f"/sms/{message_id}")
            assert (code, list(doc), doc["Status"]) == (409, ["Error", "Status"], status)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("message_id", ["never-issued", "%ff", "%00", NUMBER])
def test_an_id_never_issued_cannot_be_cancelled(message_id: str, blocking: bool) -> None:
    with service(repository=Guarded(blocking=blocking)) as server:
        status, doc, _ = request(server, "DELETE", f"/sms/{message_id}")
        assert (status, list(doc)) == (404, ["Error"])


# Statuses


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("message_id", ["never-issued", "%ff", "%00", "x" * 5_000, "0" * 40, "%ed%a0%80"])
def test_an_id_never_issued_is_not_found_which_is_no_error(message_id: str, blocking: bool) -> None:
    with service(repository=Guarded(blocking=blocking)) as server:
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, {"Status": "NOT_FOUND"})


def applied(client: Recorder, reports: Mapping[str, object]) -> None:
    """Reports, and waits until the reports are applied."""
    client.report(reports)
    for updates in client.subscribers:
        updates.join()


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("reports", [["CONFIRMED", "DELIVERED"], ["FAILED"]])
def test_the_status_of_a_message_is_what_the_provider_reported_last(reports: list[str], blocking: bool) -> None:
    with service(client := Recorder(), SINGLY, Guarded(blocking=blocking)) as server:
        message_id = accept(server)
        escaped = "".join(f"%{ord(character):02x}" for character in message_id)
        client.wait_for(bool)
        for status in ("ACCEPTED", *reports):
            if status != "ACCEPTED":
                applied(client, {message_id: status})
            for path in (f"/sms/{message_id}", f"/sms/{escaped}", f"/sms/{message_id}?x=1"):
                assert request(server, "GET", path)[:2] == (200, {"Status": status})


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("reason", ["rejected", "attempts", "expired"])
def test_a_message_given_up_is_failed_and_says_why(reason: str, blocking: bool) -> None:
    error = {"rejected": RejectedError(), "attempts": FastSmsingError()}.get(reason)
    config = SmsProxyConfig(batch_size=1, max_attempts=1, max_age=1e-9 if reason == "expired" else None)
    with service(Scripted(error), config, Guarded(blocking=blocking)) as server:
        message_id = accept(server)
        server.proxy.stop(HANG)
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, {"Status": "FAILED", "Reason": reason})


# Refusals of the domain, failures, idempotency keys


def test_while_the_queue_is_full_and_after_a_stop_a_post_is_a_503_that_says_when_to_come_again() -> None:
    with service(Gate(), ONE_PENDING) as server:
        accept(server)
        status, doc, headers = exchange(server, post())
        assert (status, doc, headers["Retry-After"]) == (503, {"Error": "too many messages are pending"}, "1")
    with service() as server:
        server.proxy.stop(HANG)
        status, _, headers = exchange(server, post())
        assert (status, headers["Retry-After"]) == (503, "10")


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("call", ASKED)
@pytest.mark.parametrize("error", [RepositoryUnavailableError("full"), RuntimeError("secret"), SystemExit(1)], ids=repr)
def test_whatever_the_repository_raises_is_told_without_details_and_ends_nothing(
    error: BaseException, call: str, blocking: bool
) -> None:
    expected: tuple[int, Any, str | None] = (500, {"Error": "internal error"}, None)
    if isinstance(error, RepositoryUnavailableError):
        unhealthy = (503, {"Status": "UNAVAILABLE", "Reasons": ["the database cannot be written"]}, None)
        expected = unhealthy if call == "check" else (503, {"Error": "the database is unavailable"}, "5")
    with service(repository=(repository := Guarded(blocking=blocking, **{call: error}))) as server:
        status, doc, headers = exchange(server, ASKED[call])
        assert (status, doc, headers["Retry-After"]) == expected
        repository.errors.clear()
        assert exchange(server, ASKED[call])[0] in (200, 202, 404)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_repeat_gets_the_same_id_even_while_the_queue_is_full_and_another_message_a_422(blocking: bool) -> None:
    with service(Gate(), ONE_PENDING, Guarded(blocking=blocking)) as server:
        first = accept(server, KEY_LINE)
        again = f'{{ "content" : "{TEXT}", "phone_number": "{NUMBER}" }}'.encode()
        assert request(server, "POST", "/sms/", again, {"Idempotency-Key": "order-1"})[:2] == (202, {"ID": first})
        assert [exchange(server, post(TEXT, *lines))[0] for lines in ([], ["Idempotency-Key: order-2"])] == [503, 503]
        expected = (422, {"Error": "the idempotency key was used for another message"})
        assert exchange(server, post("another", KEY_LINE))[:2] == expected


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "a b", "a\tb", "é", "a, b"])
def test_a_bad_key_is_a_400_that_names_the_header_and_the_longest_one_will_do(key: str) -> None:
    with service(repository=(repository := Guarded())) as server:
        status, doc, _ = exchange(server, post(TEXT, f"Idempotency-Key: {key}"))
        assert (status, "Idempotency-Key" in doc["Error"], repository.calls) == (400, True, [])
        assert accept(server, f"Idempotency-Key: {'~' * 255}")


# Groups, and who waits for whom


@pytest.mark.parametrize("blocking", [False, True])
def test_what_one_iteration_finds_is_saved_together_and_each_gets_its_own_response(blocking: bool) -> None:
    repository, key, held, opened = Guarded(blocking=blocking), KEY_LINE, threading.Event(), threading.Event()
    requests = [post("1"), post("2", key), post(""), post("2", key), post("3", key), post("4"), post("5")]
    config = SmsProxyConfig(batch_size=3, max_delay=None, max_pending=3)
    with service(Gate(), config, repository) as server, connected(server, len(requests)) as peers:

        def hold() -> None:
            held.set()
            opened.wait(HANG)

        server.call_soon(hold)
        assert held.wait(HANG)
        for peer, data in zip(peers, requests, strict=True):
            peer.send(data)
        opened.set()
        found = [peer.receive()[:2] for peer in peers]
    assert [status for status, _ in found] == [202, 202, 400, 202, 422, 202, 503]
    assert (found[1], len({doc["ID"] for status, doc in found if status == 202})) == (found[3], 3)
    assert [len(call[1]) for call in repository.calls if call[0] == "save_all"] == [6]


@pytest.mark.parametrize(("call", "lanes"), [("save_all", request_groups.LANES), ("get", request_groups.LANES),
    ("cancel", request_groups.LANES), ("check", 1)])  # fmt: skip
def test_what_comes_while_the_repository_is_busy_shares_its_next_calls_and_others_go_on(call: str, lanes: int) -> None:
    repository = Guarded(call)
    with service(repository=repository) as server, connected(server, lanes + 20) as peers:
        for place, peer in enumerate(peers):
            peer.send(ASKED[call])
            if place < lanes:
                repository.wait_entered()
        for other in ASKED.keys() - {call, "cancel"}:  # which looks at the status, too
            assert exchange(server, ASKED[other])[0] in (200, 202, 404)  # by now the loop has read them all
        repository.opened.set()
        assert {peer.receive()[0] for peer in peers} <= {200, 202, 404}
    sizes = [len(args[0]) if call == "save_all" else 1 for name, *args in repository.calls if name == call]
    assert call in ("get", "cancel") or lanes < len(sizes) <= 2 * lanes


PADDED = b" " * 60_000  # bytes of a body
GONE = {  # and how many groups of them are with the workers at a time
    "POST /sms": (raw("POST", "/sms", json.dumps(GOOD).encode() + PADDED), request_groups.LANES),
    "GET /sms/x": (raw("GET", "/sms/x", PADDED), request_groups.LANES),
    "DELETE /sms/x": (raw("DELETE", "/sms/x", PADDED), request_groups.LANES),
    "GET /healthz": (raw("GET", "/healthz", PADDED), 1), "GET /metrics": (raw("GET", "/metrics", PADDED), 1),
    "POST /reports": (raw("POST", "/reports", PADDED), request_groups.LANES),
}  # fmt: skip


@pytest.mark.parametrize(("data", "lanes"), GONE.values(), ids=GONE.keys())
def test_nothing_is_kept_of_requests_whose_clients_are_gone_while_the_database_stalls(data: bytes, lanes: int) -> None:
    proxy, over = SmsProxy(Recorder(), WAITS, repository=Guarded()), threading.Event()
    front = DrivenFront(application=restapi.RestApi(proxy, receiver=Receiver()))

    def stall() -> None:
        over.wait(HANG)

    front.submit(stall)  # in its only worker
    for _ in range(lanes + 20):
        peer = front.connect().send(data)
        front.settle()
        peer.reset()
        front.settle()
    gc.collect()
    kept = [each for each in gc.get_objects() if isinstance(each, Exchange) and each.front is front]
    assert ([len(each.request.body) for each in kept], front.open_connections) == ([0] * lanes, 0)
    over.set()
    front.close()


# Health and figures


@pytest.mark.parametrize("reasons", [[], ["queue full"]])
@pytest.mark.parametrize("warnings", [[], ["FastSMSing has been failing"]])
def test_health_is_bad_for_a_reason_and_stays_good_with_a_warning(
    idle: RestServer, reasons: list[str], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle.proxy, "health", lambda: (reasons, warnings))
    expected: dict[str, Any] = {"Status": "UNAVAILABLE", "Reasons": reasons} if reasons else {"Status": "OK"}
    expected |= {"Warnings": warnings} if warnings else {}
    assert request(idle, "GET", "/healthz")[:2] == (503 if reasons else 200, expected)


def test_a_server_that_shuts_down_is_unhealthy() -> None:
    with service(repository=(repository := Guarded("check"))) as server, Peer(server) as peer:
        peer.send(ASKED["check"])
        repository.wait_entered()
        server.shutdown(HANG)
        repository.opened.set()
        assert peer.receive()[:2] == (503, {"Status": "UNAVAILABLE", "Reasons": ["shutting down"]})


def test_a_process_lives_unless_a_worker_is_dead_whatever_the_database_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with service(repository=(repository := Guarded(check=RepositoryUnavailableError("no")))) as server:
        assert request(server, "GET", "/healthz")[0] == 503
        assert request(server, "GET", "/livez")[:2] == (200, {"Status": "OK"})
        monkeypatch.setattr(server.proxy, "dead_threads", lambda: ["smsproxy-updater-1"])
        dead = {"Status": "UNAVAILABLE", "Reasons": ["smsproxy-updater-1 is dead"]}
        assert request(server, "GET", "/livez")[:2] == (503, dead)
    assert [call for call in repository.calls if call[0] == "check"] == [("check",)]


def test_the_figures_are_there_while_the_database_is_away_but_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: object) -> None:
        raise RepositoryUnavailableError("connection to db.internal port 5432 failed")

    with service(repository=(repository := Guarded())) as server:
        accept(server)
        before = figures(server)
        with monkeypatch.context() as patch:
            for name in ("backlog", "ages", "size"):
                patch.setattr(repository, name, away)
            now = figures(server)
        assert now["messages_accepted_total"] == 1
        assert before.keys() - now.keys() >= {"pending_messages", "oldest_pending_message_age_seconds"}
        assert figures(server).keys() == before.keys()


def test_who_asks_for_the_figures_a_thousand_times_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    front, made = DrivenFront(application=restapi.RestApi(SmsProxy(Recorder(), WAITS))), list[float]()
    monkeypatch.setattr(restapi.HttpMetrics, "measure", lambda _, front: made.append(front.now))
    peers = [front.connect() for _ in range(10)]
    front.settle()
    for peer in peers:
        peer.send(raw("HEAD", "/metrics") * 1_000)
    other = front.connect().send(raw("GET", "/livez"))
    while front.counts.by_status()["/metrics", 200] < 10_000:
        front.clock.advance(0.001)
        front.iterate(front.selector.select(0))
        for peer in peers:
            with contextlib.suppress(BlockingIOError):
                peer.socket.recv(1_000_000)
        if len(made) == 1:
            assert front.counts.by_status()["/livez", 200] == 1, "it waits for one group, not for all requests"
    assert sorted(set(made)) == made, "they are made once an iteration"
    assert other.response().status == 200
    front.close()


def test_no_body_says_where_the_database_is(caplog: pytest.LogCaptureFixture) -> None:
    away = RepositoryUnavailableError("connection to db.internal port 5432 failed: /var/run/postgresql")
    repository = Guarded()
    repository.errors = dict.fromkeys(ASKED, away)
    with service(repository=repository) as server:
        for data in ASKED.values():
            status, doc, _ = exchange(server, data)
            assert status == 503
            assert [word for word in ("db.internal", "5432", "/var", "postgres") if word in str(doc)] == []
    assert "db.internal" in caplog.text


LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\n"])*"'
SAMPLE = re.compile(rf"(([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{{LABEL}(?:,{LABEL})*\}})?) ([+-]?(?:[0-9.eE+-]+|Inf)|NaN)")


def figures(server: RestServer, key: str = "") -> dict[str, float]:
    """The figures, by name and labels as they are written: Prometheus text format 0.0.4, taken strictly."""
    found: dict[str, float] = {}
    text = request(server, "GET", "/metrics", None, {"Authorization": f"Bearer {key}"})[1].decode()
    for block in re.split("^(?=# HELP )", text, flags=re.MULTILINE)[1:]:
        head = re.match(r"# HELP (\w+) .+\n# TYPE \1 (counter|gauge|histogram)\n", block)
        assert head is not None, block
        suffixes = ["_bucket", "_sum", "_count"] if head[2] == "histogram" else [""]
        for line in block[head.end() :].splitlines():
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1] not in found, line
            assert match[2] in [head[1] + suffix for suffix in suffixes], line
            assert match[2].endswith("_total") == (head[2] == "counter"), line
            found[match[1].removeprefix("smsproxy_")] = float(match[3])
    return found


def test_every_figure_and_every_label_value_is_there_at_0_from_the_start() -> None:
    with service(version="1.2.3") as server:
        found = figures(server)
    codes = (200, 202, 204, 400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 417, 422, 431, 500, 501, 503, 505)
    routes = ("/", "/healthz", "/livez", "/metrics", "/openapi.json", "/sms", "/sms/<id>", "/sms/bulk", "other")
    expected = {f'http_responses_total{{route="{route}",code="{code}"}}' for route in routes for code in codes}
    expected |= {f'http_request_duration_seconds_bucket{{route="{route}",le="0.001"}}' for route in routes}
    assert {key: found.get(key) for key in expected} == dict.fromkeys(expected, 0.0)
    assert found["pending_messages_limit"] == 1e5
    assert (found["http_connections"], found["http_connections_limit"]) == (1, 1_000)
    assert any(key.startswith('build_info{version="1.2.3",') for key in found)
    for name in ("cpu_seconds_total", "start_time_seconds", "resident_memory_bytes", "open_fds", "max_fds"):
        assert found[f"process_{name}"] > 0


def test_what_the_system_does_not_tell_of_the_process_is_left_out(
    idle: RestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.listdir", lambda path: Path("/nowhere").stat())  # raises an OSError
    assert "process_open_fds" not in figures(idle)


def test_the_figures_after_a_known_run_are_right() -> None:
    client = Scripted(None, FastSmsingError("no"), RejectedError("no"))  # the second request waits for its third try
    config = SmsProxyConfig(batch_size=2, max_delay=None, senders=1, max_attempts=3, backoff_base=0.0)
    with service(client, config) as server:
        ids = [accept(server) for _ in range(2)]
        client.wait_for(lambda batches: len(batches) == 1)
        ids += [accept(server) for _ in range(2)]
        client.wait_for(lambda batches: len(batches) == 3)  # the halves of the second
        applied(client, {ids[0]: "CONFIRMED", "x": "DELIVERED"})
        applied(client, {ids[0]: "DELIVERED", ids[1]: "FAILED", ids[2]: "EATEN"})
        applied(client, {ids[0]: "CONFIRMED"})
        exchange(server, post(""))
        request(server, "GET", f"/sms/{ids[0]}")
        server.proxy.stop(HANG)
        found = figures(server)
    expected = {
        "messages_accepted_total": 4, "messages_handed_over_total": 4, 'batches_total{result="handed_over"}': 3,
        'batches_total{result="split"}': 1, 'provider_requests_total{result="ok"}': 3, "requests_saved": -1,
        'provider_requests_total{result="rejected"}': 1, 'provider_requests_total{result="error"}': 1,
        'provider_request_duration_seconds_count{result="ok"}': 3, "batch_messages_count": 5, "batch_messages_sum": 8,
        'provider_request_duration_seconds_bucket{result="ok",le="+Inf"}': 3, 'batch_messages_bucket{le="1"}': 2,
        'batch_messages_bucket{le="2"}': 5, 'batch_messages_bucket{le="+Inf"}': 5, "handover_wait_seconds_count": 4,
        "final_status_seconds_count": 2, 'messages_final_total{status="DELIVERED"}': 1, "pending_messages": 0,
        'messages_final_total{status="FAILED"}': 1, 'status_updates_total{result="applied"}': 3,
        'status_updates_total{result="refused"}': 1, 'status_updates_total{result="unknown_message"}': 1,
        'status_updates_total{result="unknown_status"}': 1, 'http_responses_total{route="/sms",code="202"}': 4,
        'http_responses_total{route="/sms",code="400"}': 1, 'http_request_duration_seconds_count{route="/sms"}': 5,
        "messages_unreported": 2, 'provider_errors_total{error="FastSmsingError"}': 1,
        'http_responses_total{route="/sms/<id>",code="200"}': 1,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


def test_each_response_on_a_connection_is_counted_under_its_own_route(guarded: RestServer) -> None:
    asked = [raw("GET", "/sms/x", None, BEARER), raw("GET", "/sms/x"), raw("GET", "/nowhere"), b"nonsense\r\n\r\n"]
    with Peer(guarded) as peer:
        assert [peer.exchange(data)[0] for data in asked] == [200, 401, 404, 400]
    found = {key: count for key, count in figures(guarded, "first-key").items() if "responses" in key and count}
    expected = ("/sms/<id>", 200), ("/sms/<id>", 401), ("other", 404), ("other", 400)
    assert found == {f'http_responses_total{{route="{route}",code="{code}"}}': 1 for route, code in expected}


# API keys, and private logs


@pytest.mark.parametrize(("method", "path"), [("POST", "/sms"), ("POST", "/sms/"), ("GET", "/sms/x"), ("GET", "/sms/"),
    ("GET", "/sms/a/b"), ("PUT", "/sms"), ("GET", "/metrics"), ("DELETE", "/metrics")])  # fmt: skip
def test_without_a_key_it_is_a_401_with_a_challenge_before_all_else(
    guarded: RestServer, method: str, path: str
) -> None:
    for value in ("", "Bearer x", "Basic first-key", "Bearer", "first-key", "Bearer first-key x", "Bearer \xef-key"):
        status, doc, headers = request(guarded, method, path, b"", {"Authorization": value} if value else {})
        assert (status, doc) == (401, {"Error": "a valid API key is needed"}), value
        assert headers["WWW-Authenticate"] == 'Bearer realm="smsproxy"'


@pytest.mark.parametrize("value", ["Bearer first-key", "bearer second-key", "BEARER   first-key"])
def test_each_key_opens_everything_that_is_not_open(guarded: RestServer, value: str) -> None:
    for path, code in {"/sms": 202, "/sms/x": 200, "/metrics": 200, "/sms/": 404}.items():
        method = "POST" if path == "/sms" else "GET"
        assert request(guarded, method, path, GOOD, {"Authorization": value})[0] == code
    assert {request(guarded, "GET", path)[0] for path in ("/healthz", "/openapi.json", "/")} == {200}


def test_keys_can_be_replaced_while_it_runs(guarded: RestServer) -> None:
    guarded.api.set_api_keys({"shop": "third-key"})
    for key, status in (("first-key", 401), ("third-key", 200)):
        assert request(guarded, "GET", "/sms/x", None, {"Authorization": f"Bearer {key}"})[0] == status


def test_the_debug_log_names_the_client_and_shows_no_key(
    guarded: RestServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Peer(guarded) as peer:
        for key in ("first-key", "second-key", "wrong-key"):
            peer.exchange(raw("GET", "/sms/x", None, f"Authorization: Bearer {key}"))
    lines = [record.getMessage() for record in caplog.records if "GET /sms/***" in record.getMessage()]
    assert [[name for name in KEYS if name in line] for line in lines] == [["shop"], ["batch job"], []]
    assert [key for key in (*KEYS.values(), "wrong-key") if key in caplog.text] == []


OURS = "01a21607-2884-73b7-99b2-ff8d783e44e4"
SHOWN = {
    f"/sms/{OURS}": f"/sms/{OURS}", "/sms/": "/sms/", "/healthz?48123456789": "/healthz", "/48123456789.json": "/***",
    "/sms/48-123-456-789": "/sms/***", "/sms/tel:48123456789": "/sms/***", "/sms/%34%38123456789": "/sms/***",
    f"/sms/{OURS}48": "/sms/***", f"/sms/{OURS.upper()}": "/sms/***", f"/sms/{OURS}/48123": "/sms/***",
}  # fmt: skip


@pytest.mark.parametrize(("path", "shown"), SHOWN.items())
def test_the_debug_log_shows_known_paths_and_our_own_ids_only(
    idle: RestServer, caplog: pytest.LogCaptureFixture, path: str, shown: str
) -> None:
    caplog.set_level(logging.DEBUG)
    status = request(idle, "GET", path)[0]
    assert f"127.0.0.1 GET {shown} {status}" in caplog.messages


# Web pages of others


SITES: dict[str, tuple[dict[str, str], int]] = {
    "curl": ({}, 202),
    "this page": ({"Origin": "http://x", "Sec-Fetch-Site": "same-origin"}, 202),
    "this page, in an old browser": ({"Origin": "http://x"}, 202),
    "this page, behind TLS": ({"Origin": "https://X"}, 202),
    "this page, which says no origin": ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, 202),
    "typed in": ({"Sec-Fetch-Site": "none"}, 202),
    "another page": ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
    "another page, in an old browser": ({"Origin": "https://evil.example"}, 403),
    "another page, without an origin": ({"Sec-Fetch-Site": "cross-site"}, 403),
    "a page of the same site": ({"Origin": "http://x", "Sec-Fetch-Site": "same-site"}, 403),
    "another port": ({"Origin": "http://x:8080"}, 403),
    "a sandboxed page": ({"Origin": "null"}, 403),
    "a file": ({"Origin": "null", "Sec-Fetch-Site": "cross-site"}, 403),
    "two origins": ({"Origin": "http://x, http://evil.example"}, 403),
    "no origin at all": ({"Origin": ""}, 403),
}


@pytest.mark.parametrize(("headers", "status"), SITES.values(), ids=SITES)
def test_a_web_page_of_another_origin_can_send_nothing(headers: dict[str, str], status: int) -> None:
    with service(repository=(repository := Guarded())) as server:
        assert request(server, "POST", "/sms", GOOD, headers)[0] == status
        assert len(repository.calls) == (status == 202)
        assert request(server, "PUT", "/sms", GOOD, headers)[0] == (405 if status == 202 else 403)
        for method in ("GET", "HEAD", "OPTIONS"):
            assert request(server, method, "/sms/x", None, headers)[0] == 200


def test_a_default_port_is_the_same_origin(idle: RestServer) -> None:
    origins = [("https://a", "a:443", 202), ("http://a:80", "A", 202), ("http://a", "a:443", 403), ("a", "", 403)]
    for origin, host, status in origins:
        data = post(TEXT, f"Origin: {origin}").replace(b"Host: x", f"Host: {host}".encode())
        assert exchange(idle, data)[0] == status


def test_no_number_no_text_and_no_idempotency_key_is_logged_whatever_the_body(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    number, pin = "48600123456", "1000003"
    good = {"PhoneNumber": number, "Content": f"Your PIN is {pin}"}
    bad = [{**good, "PhoneNumber": f"+{number}"}, {"PhoneNumber": number, "Text": pin}, {number: pin, pin: number},
           {"PhoneNumber": int(number), "Content": [pin]}, json.dumps(good)[:-2], f"{number}={pin}"]  # fmt: skip
    with service(Scripted(RejectedError(pin)), SINGLY) as server:
        assert request(server, "POST", "/sms", good, {"Idempotency-Key": f"key-{pin}"})[0] == 202
        assert {request(server, "POST", "/sms", body, {"Idempotency-Key": pin})[0] for body in bad} == {400}
        assert request(server, "GET", f"/sms/{number}")[:2] == (200, {"Status": "NOT_FOUND"})
        server.proxy.stop(HANG)
    assert [each for each in ("gave up", "POST /sms 202", "POST /sms 400") if each not in caplog.text] == []
    assert [secret for secret in (number, pin) if secret in caplog.text] == []
    assert [record for record in caplog.records if len(record.getMessage().splitlines()) > 1] == []


# The description, and files


@dataclass
class Description:
    """The document that a server serves, and what it says of a response."""

    document: Any

    def resolve(self, node: Any) -> Any:
        """The node that is meant by a `$ref`."""
        while "$ref" in node:
            node = functools.reduce(operator.getitem, node["$ref"].split("/")[1:], self.document)
        return node

    def operations(self) -> Iterator[tuple[str, str, Any]]:
        """Path, method, operation."""
        for path, item in self.document["paths"].items():
            yield from ((path, method.upper(), said) for method, said in item.items() if method != "parameters")

    def check_response(self, said: Any, response: Response) -> None:
        """Fails unless the response is what is said of it."""
        said, (_, doc, headers) = self.resolve(said), response
        for name, header in said.get("headers", {}).items():
            header = self.resolve(header)
            assert name in headers or not header["required"], f"{name} is not there"
            self.check(header["schema"], headers[name])
        if "content" not in said:
            assert doc == b""
            return
        assert headers["Content-Type"] in said["content"]
        self.check(said["content"][headers["Content-Type"]]["schema"], doc.decode() if isinstance(doc, bytes) else doc)

    def check(self, schema: Any, value: Any) -> bool:
        """True, or fails, by the part of JSON Schema that the document uses; any other keyword fails."""
        types: dict[str, Any] = {"object": dict, "array": list, "string": str,
                                 "number": (int, float), "integer": int}
        rules: dict[str, Callable[[Any], bool]] = {
            "type": lambda rule: isinstance(value, types[rule]),
            "required": lambda rule: set(rule) <= set(value),
            "enum": lambda rule: value in rule,
            "const": lambda rule: bool(value == rule),
            "minLength": lambda rule: len(value) >= rule,
            "maxLength": lambda rule: len(value) <= rule,
            "minimum": lambda rule: value >= rule,
            "exclusiveMinimum": lambda rule: value > rule,
            "maximum": lambda rule: value <= rule,
            "additionalProperties": lambda rule: set(value) <= set(self.resolve(schema)["properties"]),
            "minItems": lambda rule: len(value) >= rule,
            "maxItems": lambda rule: len(value) <= rule,
            "pattern": lambda rule: re.search(rule, value) is not None,
            "format": lambda rule: rule == "uuid" and str(uuid.UUID(value)) == value,
            "description": lambda rule: True,
            "properties": lambda rule: all(self.check(rule[name], value[name]) for name in rule.keys() & value),
            "items": lambda rule: all(self.check(rule, item) for item in value),
        }
        for keyword, rule in self.resolve(schema).items():
            assert rules[keyword](rule), f"{value!r} is not as {keyword}: {rule!r} says"
        return True


@pytest.fixture(scope="module")
def description() -> Description:
    with service() as server:
        return Description(request(server, "GET", "/openapi.json")[1])


def provoked(
    patch: pytest.MonkeyPatch, status: str, path: str, method: str, body: bytes | None
) -> Response:
    """The response of a service in the state, and to the request, that brings this status about."""
    path = path.replace("{id}", "a/b" if status == "404" and method == "GET" else "x")
    errors = {"500": RuntimeError("x"), "503": RepositoryUnavailableError("the disk is full")}
    repository = Guarded()
    repository.errors = dict.fromkeys(ASKED, errors[status]) if status in errors else {}
    data = raw("PUT" if status == "405" else method, path, b"" if status == "400" else body, KEY_LINE)
    raised = {"400": ValueError(), "401": PermissionError(), **errors}.get(status)
    if status == "403":
        data = data.replace(b"Host: x", b"Host: x\r\nOrigin: http://evil.example")
    keys = KEYS if status == "401" else {}
    with service(repository=repository, api_keys=keys, receiver=Receiver(raised)) as server:
        if status == "422":
            exchange(server, post("another", KEY_LINE))
            exchange(server, raw("POST", "/sms/bulk", {"Messages": [GOOD]}, KEY_LINE))
        if method == "DELETE" and status in ("200", "409"):
            path = f"/sms/{accept(server)}"
            data = raw(method, path)
            if status == "409":
                server.proxy.stop(HANG)
        if status == "500" and path in ("/", "/openapi.json"):
            server.api.files = {}
        if status in errors and path == "/livez":
            found = {"500": 1, "503": ["smsproxy-updater-1"]}[status]  # 1 is no list
            patch.setattr(server.proxy, "dead_threads", lambda: found)
        return exchange(server, data)


def test_every_response_of_this_interface_is_described_as_it_is(
    description: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, method, operation in description.operations():
        by_http = {"408", "411", "413", "431", "default", "400" if method != "POST" else ""}
        body = None
        if "requestBody" in operation:
            content = description.resolve(operation["requestBody"])["content"].get("application/json", {"example": 0})
            body = json.dumps(content["example"]).encode()
        body = b"a report" if path == "/reports" else body
        for status in operation["responses"].keys() - by_http:
            response = provoked(monkeypatch, status, path, method, body)
            assert (method, path, str(response[0])) == (method, path, status)
            description.check_response(operation["responses"][status], response)


def test_the_paths_the_methods_and_what_needs_a_key_are_described(
    description: Description, guarded: RestServer
) -> None:
    described: dict[str, str] = {}
    for path, method, operation in description.operations():
        described[path] = f"{described.get(path, '')} {method}".strip()
        status = request(guarded, method, path.replace("{id}", "x"), b"{}" if method == "POST" else None)[0]
        assert (path, method, status == 401) == (path, method, bool(operation.get("security")))
    assert description.document["openapi"] == "3.1.0"
    assert description.document["info"]["version"] == command_line.__version__
    assert described == {path.replace("some-id", "{id}"): methods for path, methods in PATHS.items()}


def test_the_limits_of_a_message_are_described_as_they_are(description: Description, idle: RestServer) -> None:
    schemas = description.document["components"]["schemas"]
    for name, character in (("PhoneNumber", "1"), ("Content", "x")):
        least, most = (schemas["Message"]["properties"][name][limit] for limit in ("minLength", "maxLength"))
        bodies = [{**GOOD, name: character * length} for length in (least, most, most + 1)]
        assert [request(idle, "POST", "/sms", body)[0] for body in bodies] == [202, 202, 400]
    assert set(schemas["Status"]["properties"]["Reason"]["enum"]) == {each.value for each in Reason}


def test_the_webhook_is_described_as_it_is(description: Description) -> None:
    (webhook,) = description.document["webhooks"].values()
    said = webhook["post"]["requestBody"]["content"]["application/json"]
    changes = [Change.of(f"m{place}", update) for place, update in enumerate([MessageStatus.CONFIRMED, *Reason])]
    body = ChangeBody.made(changes, 1.8e9, math.inf)
    for document in (said["example"], json.loads(content_of(body))):
        assert description.check(said["schema"], document)
    headers = signed_headers(body.id, content_of(body), (b"x" * 24,) * 2, 1.8e9)
    assert [each["name"] for each in webhook["post"]["parameters"]] == list(headers)
    for each in webhook["post"]["parameters"]:
        description.check(each["schema"], each["example"])
        description.check(each["schema"], headers[each["name"]])
    messages = said["schema"]["properties"]["data"]["properties"]["Messages"]
    status, reason = (messages["items"]["properties"][name]["enum"] for name in ("Status", "Reason"))
    assert set(status) == TRANSITIONS[MessageStatus.ACCEPTED]
    assert set(reason) == {each.value for each in Reason}


def test_every_example_is_as_its_schema_says_and_every_part_is_used(description: Description) -> None:
    components, text = {**description.document["components"]}, json.dumps(description.document)
    described = [*components["requestBodies"].values(), *components["responses"].values()]
    operations = [operation for *_, operation in description.operations()]
    described += [description.resolve(each) for operation in operations for each in operation["responses"].values()]
    contents = [content for each in described for content in each.get("content", {}).values() if "example" in content]
    assert len(contents) > 15
    for each in (*contents, *components["headers"].values(), *components["parameters"].values()):
        description.check(each["schema"], each["example"])
    del components["securitySchemes"]
    parts = [f"#/components/{kind}/{name}" for kind, found in components.items() for name in found]
    assert [part for part in parts if f'"{part}"' not in text] == []


def test_a_file_that_is_missing_fails_the_start() -> None:
    with pytest.raises(FileNotFoundError):
        restapi.data_file("nowhere.json")

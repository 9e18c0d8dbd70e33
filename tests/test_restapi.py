"""The REST interface over a real server on a free port: responses, groups, figures, health, keys, private logs."""
from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import re
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

import main
import restapi
from fastsmsing import FastSmsingError, InMemoryClient, Message, RejectedError
from helpers import HANG, Gate, Recorder, Scripted, request, serving
from http_front import Limits
from restapi import SmsServer
from smsproxy import (
    ClosedError, Entry, InMemoryRepository, MessageStatus, Reason, RepositoryUnavailableError, SendMessage, SmsProxy,
    SmsProxyConfig,
)  # fmt: skip

NUMBER, TEXT = "48123456789", "Your parcel is here"
GOOD = {"PhoneNumber": NUMBER, "Content": TEXT}
KEYS = {"shop": "first-key", "batch job": "second-key"}
SINGLY = SmsProxyConfig(batch_size=1, max_attempts=1)
WAITS = SmsProxyConfig(max_delay=None)  # nothing leaves before a stop
PATHS = {  # a path of each route → methods
    "/sms": "POST", "/sms/": "POST", "/sms/some-id": "GET HEAD", "/metrics": "GET HEAD", "/healthz": "GET HEAD",
    "/openapi.json": "GET HEAD", "/": "GET HEAD",
}  # fmt: skip


class Guarded(InMemoryRepository):
    """A repository that may block: `closed` methods wait until `opened`; `calls` has each call as name and size.

    A method in `errors` raises what is there for it.
    """

    def __init__(self, *closed: str, blocking: bool = True, **errors: BaseException) -> None:
        super().__init__()
        self.blocking = blocking
        self.closed, self.errors = set(closed), dict(errors)
        self.calls: list[tuple[str, int]] = []
        self._entered, self.opened = threading.Semaphore(0), threading.Event()

    def _pass(self, name: str, size: int = 1) -> None:
        self.calls.append((name, size))
        if name in self.closed:
            self._entered.release()
            assert self.opened.wait(HANG), f"nobody opened {name}"
        if name in self.errors:
            raise self.errors[name]

    def wait_entered(self) -> None:
        """Blocks until a call waits for the opening."""
        assert self._entered.acquire(timeout=HANG), "nobody came"

    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        self._pass("save_all", len(entries))
        return super().save_all(entries, max_pending)

    def get(self, message_id: str) -> MessageStatus:
        self._pass("get")
        return super().get(message_id)

    def check(self) -> None:
        self._pass("check")

    def oldest(self) -> float | None:
        self._pass("oldest")
        return super().oldest()


@contextlib.contextmanager
def service(
    client: Any = None, config: SmsProxyConfig = WAITS, repository: Any = None, *, patience: float = HANG, **options: Any
) -> Iterator[SmsServer]:
    """A running service; a provider double that takes everything, and nothing leaves by time."""
    proxy = SmsProxy(client or Recorder(), config, repository=repository)
    proxy.start()
    try:
        with serving(proxy, **options) as server:
            try:
                yield server
            finally:
                for each in (repository, client):
                    if isinstance(each, (Guarded, Gate)):
                        each.opened.set()
    finally:
        proxy.stop(patience)


def raw(method: str, path: str, body: bytes | None = None, *lines: str, version: str = "HTTP/1.1") -> bytes:
    """One request as bytes."""
    length = [] if body is None else [f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{method} {path} {version}", "Host: x", *length, *lines, "", ""]).encode() + (body or b"")


def post(content: object = TEXT, *lines: str, **others: object) -> bytes:
    """A POST as bytes."""
    return raw("POST", "/sms", json.dumps({**GOOD, "Content": content, **others}).encode(), *lines)


class Peer:
    """A client on one connection, byte by byte."""

    def __init__(self, server: SmsServer) -> None:
        self._socket = socket.create_connection(server.server_address[:2], HANG)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, method: str = "POST") -> tuple[int, bytes, http.client.HTTPMessage]:
        """One response. It is read without reading ahead, so several may follow each other."""
        response = http.client.HTTPResponse(_OneByOne(self._socket), method=method)  # type: ignore[arg-type]
        response.begin()
        return response.status, response.read(), response.headers

    def exchange(self, data: bytes) -> tuple[int, bytes, http.client.HTTPMessage]:
        self.send(data)
        return self.receive(data.split(b" ")[0].decode())


class _OneByOne:
    """What `HTTPResponse` wants of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def makefile(self, mode: str) -> Any:
        return self._socket.makefile(mode, buffering=0)  # type: ignore[call-overload]


def exchange(server: SmsServer, data: bytes) -> tuple[int, bytes, http.client.HTTPMessage]:
    """One request as bytes on a connection of its own."""
    with Peer(server) as peer:
        return peer.exchange(data)


@contextlib.contextmanager
def loop_held(server: SmsServer) -> Iterator[None]:
    """Whatever is sent in the block is found by one iteration of the server's loop."""
    held, opened = threading.Event(), threading.Event()
    server.call_soon(lambda: (held.set(), opened.wait(HANG)))
    assert held.wait(HANG)
    yield
    opened.set()


def together(server: SmsServer, requests: Sequence[bytes]) -> list[tuple[int, Any, http.client.HTTPMessage]]:
    """The responses to requests that one iteration of the loop finds, each on a connection of its own."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server)) for _ in requests]
        for peer in peers:
            assert peer.exchange(raw("GET", "/openapi.json"))[0] == 200  # it is accepted
        with loop_held(server):
            for peer, data in zip(peers, requests):
                peer.send(data)
        return [(status, json.loads(body), headers) for status, body, headers in map(Peer.receive, peers)]


# Accepting


@pytest.mark.parametrize("path", ["/sms", "/sms/", "/sms?x=1"])
def test_a_message_is_accepted_with_its_id_and_where_to_ask_for_it(path: str) -> None:
    with service() as server:
        status, doc, headers = request(server, "POST", path, GOOD)
        assert (status, list(doc), headers["Location"]) == (202, ["ID"], f"/sms/{doc['ID']}")
        assert headers["Content-Type"] == "application/json"
        assert str(uuid.UUID(doc["ID"])) == doc["ID"]
        assert request(server, "GET", headers["Location"])[:2] == (200, {"Status": "ACCEPTED"})


ACCEPTABLE: dict[str, bytes] = {
    **{name: json.dumps({name: NUMBER, "Content": TEXT}).encode()
       for name in ("PhoneNumber", "phoneNumber", "phone_number", "PHONE_NUMBER", "_phone__number_")},
    **{name: json.dumps({"PhoneNumber": NUMBER, name: TEXT}).encode() for name in ("content", "CONTENT", "con_tent")},
    "other fields": json.dumps({**GOOD, "Sender": None, "Priority": [1, {"a": {}}], "": 1e5}).encode(),
    "a giant number beside it": b'{"PhoneNumber": "48123456789", "Content": "Your parcel is here", "n": ' + b"9" * 20_000 + b"}",
    "white space around": b" \t\r\n" + json.dumps(GOOD).encode() + b"\n\n ",
    "escapes": json.dumps(GOOD).replace("Y", "\\u0059").encode(),
}  # fmt: skip


@pytest.mark.parametrize("body", ACCEPTABLE.values(), ids=ACCEPTABLE)
def test_a_message_may_be_written_in_many_ways_and_under_any_content_type(body: bytes) -> None:
    with service(client := Recorder()) as server:
        assert request(server, "POST", "/sms", body, {"Content-Type": "text/plain"})[0] == 202
        server.proxy.stop(HANG)
    assert [(each.phone_number, each.message) for batch in client.batches for each in batch] == [(NUMBER, TEXT)]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("text", ["Zażółć gęślą \U0001f4e6", "a\0b\r\n", "\ufeff\u2028", "x" * 1_600, "\U0001f4e6" * 1_600])
def test_any_text_arrives_unchanged_at_the_provider(text: str, ensure_ascii: bool) -> None:
    with service(client := Recorder()) as server:
        body = json.dumps({**GOOD, "Content": text}, ensure_ascii=ensure_ascii).encode()
        assert request(server, "POST", "/sms", body)[0] == 202
        server.proxy.stop(HANG)
    assert client.batches[0][0].message == text


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the body is empty; it must be a JSON object"),
    "blank": (b" \r\n", "the body is empty; it must be a JSON object"),
    "form": (urllib.parse.urlencode(GOOD).encode(), "the body is form-encoded; it must be a JSON object"),
    "no JSON": (b'{"PhoneNumber": "48",\n "Content" "x"}', "Expecting ':' delimiter at line 2, column 12"),
    "cut off": (b'{"PhoneNumber": "48', "at line 1, column 17"),
    "something behind": (b"{}\n {}", "Extra data at line 2, column 2"),
    "a BOM": (b"\xef\xbb\xbf{}", "JSON object in UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "JSON object in UTF-8"),
    "Latin-1": ('{"Content": "é"}'.encode("latin-1"), "JSON object in UTF-8"),
    "NaN": (b'{"PhoneNumber": NaN, "Content": "x"}', "JSON object"),
    "infinity": (b'{"PhoneNumber": "48", "Content": "x", "n": -Infinity}', "JSON object"),
    "nested deeply": (b'{"Content": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "JSON object"),
    **{text: (text.encode(), "must be a JSON object") for text in ("[]", "null", '"x"', "1", "[{}]")},
    "a null": (b'{"PhoneNumber": null, "Content": "x"}', "PhoneNumber must be a string"),
    "a number": (b'{"PhoneNumber": 48123456789, "Content": "x"}', "PhoneNumber must be a string"),
    "a giant number": (b'{"PhoneNumber": ' + b"4" * 20_000 + b', "Content": "x"}', "PhoneNumber must be a string"),
    "a list": (b'{"PhoneNumber": "48", "Content": ["x"]}', "Content must be a string"),
    "a boolean": (b'{"PhoneNumber": "48", "Content": true}', "Content must be a string"),
    "an empty number": (b'{"PhoneNumber": "", "Content": "x"}', "PhoneNumber must not be empty"),
    "an empty text": (b'{"PhoneNumber": "48", "Content": ""}', "Content must not be empty"),
    "no number": (b'{"Content": "x"}', "PhoneNumber is missing"),
    "no text": (b'{"PhoneNumber": "48"}', "Content is missing"),
    "nothing": (b"{}", "PhoneNumber is missing"),
    "a plus": (b'{"PhoneNumber": "+48123", "Content": "x"}', "PhoneNumber must consist of the digits"),
    "a blank": (b'{"PhoneNumber": "48 123", "Content": "x"}', "PhoneNumber must consist of the digits"),
    "other digits": ('{"PhoneNumber": "48²", "Content": "x"}'.encode(), "PhoneNumber must consist of the digits"),
    "16 digits": (b'{"PhoneNumber": "1234567890123456", "Content": "x"}', "PhoneNumber must have at most 15 characters"),
    "a long text": (json.dumps({**GOOD, "Content": "x" * 1_601}).encode(), "Content must have at most 1600 characters"),
    "a surrogate": (b'{"PhoneNumber": "48", "Content": "\\ud800"}', "Content must not contain lone surrogates"),
    "twice": (b'{"Content": "x", "PhoneNumber": "48", "Content": "x"}', "Content is given twice"),
    "twice in two spellings": (b'{"phone_number": "48", "Content": "x", "PhoneNumber": "48"}', "PhoneNumber is given twice"),
    "twice inside": (b'{"PhoneNumber": "48", "Content": "x", "o": {"a": 1, "A": 2}}', "A is given twice"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "problem"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_will_not_do_is_a_400_that_says_why_and_saves_nothing(body: bytes, problem: str) -> None:
    with service(repository=(repository := Guarded())) as server:
        status, payload, headers = exchange(server, raw("POST", "/sms", body))
        doc = json.loads(payload)
    assert (status, headers["Content-Type"], list(doc), repository.calls) == (400, "application/json", ["Error"], [])
    assert problem in doc["Error"]
    assert [word for word in ("Traceback", ".py", "Error:") if word in doc["Error"]] == []


# Everything else that can be asked


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/nowhere", "/sms/a/b", "/sms//", "/smsx", "/SMS", "/metrics/", "/healthz/x", "/index.html"])
def test_any_other_path_is_a_404(method: str, path: str) -> None:
    with service() as server:
        assert exchange(server, raw(method, path, b""))[0] == 404


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_asking_for_no_id_is_a_404(method: str) -> None:
    with service() as server:
        assert exchange(server, raw(method, "/sms/"))[0] == 404


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_method_is_a_405_and_options_a_200_that_say_what_is_allowed(path: str) -> None:
    allowed = [*PATHS[path].split(), "OPTIONS"]
    with service() as server:
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "GET" if "POST" in allowed and path != "/sms/" else "PUT"):
            status, body, headers = exchange(server, raw(method, path))
            assert (status, headers["Allow"].split(", ")) == (405, allowed)
            assert json.loads(body) == {"Error": f"{method} is not allowed here"}
        status, body, headers = exchange(server, raw("OPTIONS", path))
        assert (status, body, headers["Allow"].split(", ")) == (200, b"", allowed)


@pytest.mark.parametrize("path", [path for path, methods in PATHS.items() if "HEAD" in methods])
def test_a_body_ends_with_a_newline_and_head_is_get_without_it(path: str) -> None:
    with service() as server:
        (got, body, headers), (head, nothing, same) = (exchange(server, raw(method, path)) for method in ("GET", "HEAD"))
        assert (got, head, nothing, body[-1:]) == (200, 200, b"", b"\n")
        assert (headers["Content-Length"], headers["Content-Type"]) == (str(len(body)), same["Content-Type"])
        if path != "/metrics":  # whose length changes
            assert same["Content-Length"] == headers["Content-Length"]


@pytest.mark.parametrize("data", [post(), post(""), raw("GET", "/x"), raw("POST", "/sms"), raw("PUT", "/sms"), b"x\r\n\r\n"])
def test_every_body_ends_with_a_newline(data: bytes) -> None:
    with service() as server:
        assert exchange(server, data)[1].endswith(b"}\n")


FRAMING = {
    "no length": (raw("POST", "/sms"), 411),
    "chunked": (raw("POST", "/sms", None, "Transfer-Encoding: chunked"), 411),
    "a body over 64 KiB": (raw("POST", "/sms", None, "Content-Length: 65537"), 413),
    "too many headers": (raw("GET", "/healthz", None, *["X: y"] * 101), 431),
    "a long target": (raw("GET", f"/{'x' * 9_000}"), 414),
    "a bad header": (raw("GET", "/healthz", None, "Bad Header: x"), 400),
    "an unknown method": (raw("BREW", "/healthz"), 501),
    "an unknown version": (raw("GET", "/healthz", version="HTTP/2.0"), 505),
}


@pytest.mark.parametrize(("data", "code"), FRAMING.values(), ids=FRAMING)
def test_what_http_does_not_allow_gets_its_code_as_json(data: bytes, code: int) -> None:
    with service() as server:
        status, body, _ = exchange(server, data)
        assert (status, list(json.loads(body))) == (code, ["Error"])
        if code == 411:
            assert "Content-Length" in json.loads(body)["Error"]


# Statuses


@pytest.mark.parametrize("message_id", ["never-issued", "%ff", "%00", "x" * 5_000, "0" * 40, "%ed%a0%80"])
@pytest.mark.parametrize("blocking", [False, True])
def test_an_id_never_issued_is_not_found_which_is_no_error(message_id: str, blocking: bool) -> None:
    with service(repository=Guarded(blocking=blocking)) as server:
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, {"Status": "NOT_FOUND"})


def applied(server: SmsServer, client: Recorder, reports: Mapping[str, object]) -> None:
    """Reports, and waits until the reports are applied."""
    client.report(reports)
    for updates in client.subscribers:
        updates.join()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_message_goes_from_accepted_by_confirmed_to_delivered(blocking: bool) -> None:
    with service(client := Recorder(), SINGLY, Guarded(blocking=blocking)) as server:
        message_id = request(server, "POST", "/sms", GOOD)[1]["ID"]
        escaped = "".join(f"%{ord(character):02x}" for character in message_id)
        client.wait_for(bool)
        for status in ("ACCEPTED", "CONFIRMED", "DELIVERED"):
            if status != "ACCEPTED":
                applied(server, client, {message_id: status})
            for path in (f"/sms/{message_id}", f"/sms/{escaped}", f"/sms/{message_id}?x=1"):
                assert request(server, "GET", path)[:2] == (200, {"Status": status})


GIVEN_UP: dict[str, tuple[SmsProxyConfig, BaseException | None, dict[str, str]]] = {
    "rejected": (SINGLY, RejectedError("no"), {"Status": "FAILED", "Reason": "rejected"}),
    "attempts": (SINGLY, FastSmsingError("no"), {"Status": "FAILED", "Reason": "attempts"}),
    "expired": (SmsProxyConfig(batch_size=1, max_age=0.0), None, {"Status": "FAILED", "Reason": "expired"}),
}


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(("config", "error", "expected"), GIVEN_UP.values(), ids=GIVEN_UP)
def test_a_message_given_up_is_failed_and_says_why(
    config: SmsProxyConfig, error: BaseException | None, expected: dict[str, str], blocking: bool
) -> None:
    with service(Scripted(error), config, Guarded(blocking=blocking)) as server:
        message_id = request(server, "POST", "/sms", GOOD)[1]["ID"]
        server.proxy.stop(HANG)
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, expected)


def test_a_message_that_the_provider_failed_to_deliver_has_no_reason() -> None:
    with service(client := Recorder(), SINGLY) as server:
        message_id = request(server, "POST", "/sms", GOOD)[1]["ID"]
        client.wait_for(bool)
        applied(server, client, {message_id: "FAILED"})
        assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, {"Status": "FAILED"})


# Refusals of the domain, and failures


def test_a_full_queue_is_a_503_that_says_when_to_come_again() -> None:
    with service(config=SmsProxyConfig(batch_size=1, max_pending=1), client=Gate()) as server:
        assert request(server, "POST", "/sms", GOOD)[0] == 202
        status, doc, headers = request(server, "POST", "/sms", GOOD)
        assert (status, doc, headers["Retry-After"]) == (503, {"Error": "too many messages are pending"}, "1")


def test_after_the_stop_of_the_proxy_a_post_is_a_503_that_says_when_to_come_again() -> None:
    with service() as server:
        server.proxy.stop(HANG)
        status, _, headers = request(server, "POST", "/sms", GOOD)
        assert (status, headers["Retry-After"]) == (503, "10")


ASKED = {"POST": ("POST", "/sms", "save_all"), "GET": ("GET", "/sms/x", "get"), "metrics": ("GET", "/metrics", "oldest")}
FAILURES = {
    "unavailable": (RepositoryUnavailableError("the disk is full"), 503, {"Error": "the disk is full"}),
    "an error": (RuntimeError("password=hunter2"), 500, {"Error": "internal error"}),
    "an exit": (SystemExit("password=hunter2"), 500, {"Error": "internal error"}),
}


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(("method", "path", "call"), ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(("error", "code", "expected"), FAILURES.values(), ids=FAILURES)
def test_whatever_the_repository_raises_is_told_without_details_and_ends_nothing(
    error: BaseException, code: int, expected: object, method: str, path: str, call: str, blocking: bool
) -> None:
    repository = Guarded(blocking=blocking, **{call: error})
    with service(repository=repository) as server:
        body = GOOD if method == "POST" else None
        status, doc, headers = request(server, method, path, body)
        assert (status, doc, headers["Retry-After"]) == (code, expected, "5" if code == 503 else None)
        repository.errors.clear()
        assert request(server, method, path, body)[0] in (200, 202)


def test_a_health_check_that_raises_is_a_500_and_one_that_cannot_write_a_503() -> None:
    with service(repository=(repository := Guarded(check=RuntimeError("x")))) as server:
        assert request(server, "GET", "/healthz")[:2] == (500, {"Error": "internal error"})
        repository.errors["check"] = RepositoryUnavailableError("the disk is full")
        assert request(server, "GET", "/healthz")[:2] == (503, {"Status": "UNAVAILABLE", "Reasons": ["the disk is full"]})


# Idempotency keys


KEY = {"Idempotency-Key": "order-1"}


def test_a_repeat_gets_the_same_id_however_it_is_written_and_is_sent_once() -> None:
    with service(client := Recorder()) as server:
        first = request(server, "POST", "/sms", GOOD, KEY)[1]
        again = f'{{ "content" : "{TEXT}", "phone_number": "{NUMBER}" }}'
        assert request(server, "POST", "/sms/", again, KEY)[:2] == (202, first)
        other = request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-2"})[1]
        none = request(server, "POST", "/sms", GOOD)[1]
        server.proxy.stop(HANG)
    assert (sorted(client.ids), len({first["ID"], other["ID"], none["ID"]})) == (sorted(each["ID"] for each in (first, other, none)), 3)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_repeat_gets_its_202_while_the_queue_is_full(blocking: bool) -> None:
    config = SmsProxyConfig(batch_size=1, max_pending=1)
    with service(Gate(), config, Guarded(blocking=blocking)) as server:
        first = request(server, "POST", "/sms", GOOD, KEY)[1]
        assert request(server, "POST", "/sms", GOOD)[0] == 503
        assert request(server, "POST", "/sms", GOOD, KEY)[:2] == (202, first)
        assert request(server, "POST", "/sms", {**GOOD, "Content": "x"}, KEY)[0] == 422


@pytest.mark.parametrize("other", [{"Content": "another"}, {"PhoneNumber": "48123456780"},
                                   {"PhoneNumber": "4812345678", "Content": f"9{TEXT}"}])  # fmt: skip
def test_another_message_under_the_same_key_is_a_422(other: dict[str, str]) -> None:
    with service() as server:
        request(server, "POST", "/sms", GOOD, KEY)
        status, doc, _ = request(server, "POST", "/sms", {**GOOD, **other}, KEY)
        assert (status, doc) == (422, {"Error": "the idempotency key was used for another message"})


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "a b", "a\tb", "é", "a, b"])
def test_a_bad_key_is_a_400_that_names_the_header_and_uses_nothing_up(key: str) -> None:
    with service(repository=(repository := Guarded())) as server:
        status, body, _ = exchange(server, post(TEXT, "Idempotency-Key: ").replace(b"-Key: ", b"-Key: " + key.encode("latin-1")))
        assert (status, "Idempotency-Key" in json.loads(body)["Error"], repository.calls) == (400, True, [])
        assert request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "~" * 255})[0] == 202


def test_a_request_that_was_refused_does_not_use_its_key_up() -> None:
    with service(repository=(repository := Guarded(save_all=RepositoryUnavailableError("full")))) as server:
        assert request(server, "POST", "/sms", GOOD, KEY)[0] == 503
        assert request(server, "POST", "/sms", {**GOOD, "Content": ""}, KEY)[0] == 400
        repository.errors.clear()
        assert request(server, "POST", "/sms", {**GOOD, "Content": "other"}, KEY)[0] == 202


# Groups, and who waits for whom


@pytest.mark.parametrize("blocking", [False, True])
def test_what_one_iteration_finds_is_saved_together_and_each_gets_its_own_response(blocking: bool) -> None:
    repository = Guarded(blocking=blocking)
    key = "Idempotency-Key: same"
    requests = [post("1"), post("2", key), post(""), post("2", key), post("3", key), post("4"), post("5")]
    with service(config=SmsProxyConfig(batch_size=3, max_delay=None, max_pending=3), client=Gate(), repository=repository) as server:
        found = together(server, requests)
        assert [status for status, _, _ in found] == [202, 202, 400, 202, 422, 202, 503]
        assert found[1][1] == found[3][1]
        assert len({doc["ID"] for status, doc, _ in found if status == 202}) == 3
    assert [call for call in repository.calls if call[0] == "save_all"] == [("save_all", 6)]


def test_what_comes_while_a_repository_is_busy_shares_the_next_call() -> None:
    with service(repository=(repository := Guarded("save_all"))) as server, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server)) for _ in range(restapi.LANES + 20)]
        for peer in peers[: restapi.LANES]:
            peer.send(post())
            repository.wait_entered()
        for peer in peers[restapi.LANES :]:
            assert peer.exchange(raw("GET", "/openapi.json"))[0] == 200
            peer.send(post())
        assert exchange(server, raw("GET", "/openapi.json"))[0] == 200  # the loop has read them all
        repository.opened.set()
        assert {peer.receive()[0] for peer in peers} == {202}
    sizes = [size for name, size in repository.calls if name == "save_all"]
    assert (sum(sizes), sizes[: restapi.LANES]) == (len(peers), [1] * restapi.LANES)
    assert len(sizes) <= 2 * restapi.LANES


@pytest.mark.parametrize(("call", "data"), [("save_all", post()), ("get", raw("GET", "/sms/x")), ("check", raw("GET", "/healthz"))])
def test_nobody_else_waits_while_the_repository_hangs(call: str, data: bytes) -> None:
    others = {"save_all": post(), "get": raw("GET", "/sms/x"), "check": raw("GET", "/healthz")}
    with service(repository=(repository := Guarded(call))) as server, Peer(server) as waiting:
        waiting.send(data)
        repository.wait_entered()
        for other in [each for name, each in others.items() if name != call] + [raw("GET", "/metrics"), raw("GET", "/")]:
            assert exchange(server, other)[0] in (200, 202)
        repository.opened.set()
        assert waiting.receive("GET")[0] in (200, 202)


def test_one_health_check_runs_at_a_time_and_all_who_ask_meanwhile_share_the_next() -> None:
    with service(repository=(repository := Guarded("check"))) as server, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(server)) for _ in range(30)]
        peers[0].send(raw("GET", "/healthz"))
        repository.wait_entered()
        for peer in peers[1:]:
            assert peer.exchange(raw("GET", "/sms/x"))[0] == 200, "statuses are told meanwhile"
            peer.send(raw("GET", "/healthz"))
        assert exchange(server, raw("GET", "/sms/x"))[0] == 200  # the loop has read them all
        repository.opened.set()
        assert {peer.receive()[:2] for peer in peers} == {(200, b'{"Status": "OK"}\n')}
    assert repository.calls.count(("check", 1)) == 2


def test_responses_on_a_connection_keep_the_order_of_their_requests() -> None:
    with service(repository=(repository := Guarded("save_all"))) as server, Peer(server) as peer:
        peer.send(post("1") + raw("GET", "/openapi.json") + post("2") + raw("GET", "/nowhere") + post(""))
        repository.wait_entered()
        repository.opened.set()
        assert [peer.receive()[0] for _ in range(5)] == [202, 200, 202, 404, 400]


def test_a_peer_that_breaks_off_hurts_nobody_and_its_message_is_accepted() -> None:
    with service(client := Recorder(), repository=(repository := Guarded("save_all"))) as server:
        with Peer(server) as gone:
            gone.send(post("from the one that is gone"))
            repository.wait_entered()
        repository.opened.set()
        assert request(server, "POST", "/sms", GOOD)[0] == 202
        server.proxy.stop(HANG)
    assert sorted(each.message for batch in client.batches for each in batch) == sorted([TEXT, "from the one that is gone"])


# Health


def test_a_healthy_service_says_ok_and_nothing_else() -> None:
    with service() as server:
        assert request(server, "GET", "/healthz")[:2] == (200, {"Status": "OK"})


def test_a_full_queue_is_unhealthy() -> None:
    with service(Gate(), SmsProxyConfig(batch_size=1, max_pending=1)) as server:
        request(server, "POST", "/sms", GOOD)
        assert request(server, "GET", "/healthz")[:2] == (503, {"Status": "UNAVAILABLE", "Reasons": ["queue full"]})


def test_a_server_that_shuts_down_is_unhealthy() -> None:
    with service(repository=(repository := Guarded("check"))) as server, Peer(server) as peer:
        peer.send(raw("GET", "/healthz"))
        repository.wait_entered()
        server.shutdown(HANG)
        repository.opened.set()
        status, body, _ = peer.receive()
        assert (status, json.loads(body)) == (503, {"Status": "UNAVAILABLE", "Reasons": ["shutting down"]})


def test_a_provider_that_is_down_is_a_warning_and_no_reason() -> None:
    client = Scripted(FastSmsingError("down", retry_after=600.0))
    with service(client, SmsProxyConfig(batch_size=1), patience=0.0) as server:
        request(server, "POST", "/sms", GOOD)
        docs = [request(server, "GET", "/healthz")[1] for _ in range(1_000)]  # some hundred are before the request fails
        assert (docs[-1]["Status"], len(docs[-1]["Warnings"]), len(client.attempts)) == ("OK", 1, 1)
        assert "FastSMSing" in docs[-1]["Warnings"][0]


def page(server: SmsServer, path: str) -> bytes:
    return exchange(server, raw("GET", path))[1]


# Figures


LABELS = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\n"])*"'
SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({LABELS}(?:,{LABELS})*)\}})? ([+-]?(?:[0-9.eE+-]+|Inf)|NaN)")
Figures = dict[tuple[str, str], float]  # by name and labels as they are written


def parse(text: str) -> tuple[dict[str, str], Figures]:
    """The types of the families and their figures, or a failure: Prometheus text format 0.0.4, taken strictly."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    figures: Figures = {}
    lines = iter(text[:-1].split("\n"))
    family = ""
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert len(line.split(" ", 3)) == 4 and family not in kinds, f"{family} comes twice or has no help"
            word, name, kinds[family] = next(lines).removeprefix("# ").split(" ")
            assert (word, name) == ("TYPE", family) and kinds[family] in ("counter", "gauge", "histogram")
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels = match[1], match[2] or ""
        suffixes = ("_bucket", "_sum", "_count") if kinds[family] == "histogram" else ("",)
        assert name in [family + suffix for suffix in suffixes], f"{name} does not belong to {family}"
        assert (kinds[family] == "counter") == name.endswith("_total"), name
        assert (name, labels) not in figures
        figures[name, labels] = float(match[3])
    return kinds, figures


def figures(server: SmsServer) -> Figures:
    return parse(page(server, "/metrics").decode())[1]


VALUES = {  # every value of every label that alerts are written for
    "smsproxy_messages_given_up_total": ("reason", "rejected attempts expired"),
    "smsproxy_messages_final_total": ("status", "DELIVERED FAILED"),
    "smsproxy_batches_total": ("result", "handed_over split given_up"),
    "smsproxy_provider_requests_total": ("result", "ok rejected error"),
    "smsproxy_provider_request_duration_seconds_count": ("result", "ok rejected error"),
    "smsproxy_status_updates_total": ("result", "applied refused unknown_message unknown_status error"),
}
ALONE = ["messages_accepted_total", "messages_handed_over_total", "batch_messages_count", "handover_wait_seconds_count",
         "final_status_seconds_count", "provider_requests_in_flight", "requests_saved", "pending_messages",
         "oldest_pending_message_age_seconds", "circuit_breaker_open_seconds", "circuit_breaker_next_try_seconds",
         "database_bytes"]  # fmt: skip
ROUTE_NAMES = ["/", "/healthz", "/metrics", "/openapi.json", "/sms", "/sms/<id>", "other"]


def test_every_figure_and_every_label_value_is_there_at_0_from_the_start() -> None:
    with service(version="1.2.3") as server:
        found = figures(server)
    expected = {(name, f'{label}="{value}"') for name, (label, values) in VALUES.items() for value in values.split()}
    expected |= {(f"smsproxy_{name}", "") for name in ALONE}
    expected |= {("smsproxy_http_responses_total", f'route="{route}",code="{code}"') for route in ROUTE_NAMES
                 for code in (200, 202, 400, 401, 404, 405, 408, 411, 413, 422, 431, 500, 503)}  # fmt: skip
    assert {key: found.get(key) for key in expected} == dict.fromkeys(expected, 0.0)
    assert (found["smsproxy_pending_messages_limit", ""], found["smsproxy_http_connections_limit", ""]) == (100_000, 1_000)
    assert found["smsproxy_http_connections", ""] == 1
    assert [labels for name, labels in found if name == "smsproxy_build_info" and 'version="1.2.3"' in labels] != []
    for name in ("cpu_seconds_total", "start_time_seconds", "resident_memory_bytes", "open_fds", "max_fds"):
        assert found[f"process_{name}", ""] > 0


def test_figures_of_the_process_that_the_system_does_not_tell_are_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*args: object) -> list[str]:
        raise OSError("no /proc")

    with service() as server:
        monkeypatch.setattr(restapi.os, "listdir", nowhere)
        assert figures(server)["process_open_fds", ""] == 0


def test_the_figures_after_a_known_run_are_right() -> None:
    client = Scripted(None, FastSmsingError("no"), RejectedError("no"))  # the second request waits for its third try
    config = SmsProxyConfig(batch_size=2, max_delay=None, senders=1, max_attempts=3, backoff_base=0.0)
    with service(client, config) as server:
        ids = [request(server, "POST", "/sms", GOOD)[1]["ID"] for _ in range(2)]
        client.wait_for(lambda batches: len(batches) == 1)
        ids += [request(server, "POST", "/sms", GOOD)[1]["ID"] for _ in range(2)]
        client.wait_for(lambda batches: len(batches) == 3)  # the halves of the second
        applied(server, client, {ids[0]: "CONFIRMED", "x": "DELIVERED"})
        applied(server, client, {ids[0]: "DELIVERED", ids[1]: "FAILED", ids[2]: "EATEN"})
        applied(server, client, {ids[0]: "CONFIRMED"})
        request(server, "POST", "/sms", {**GOOD, "Content": ""})
        request(server, "GET", f"/sms/{ids[0]}")
        request(server, "PUT", "/nowhere")
        server.proxy.stop(HANG)
        found = figures(server)
    expected = {
        ("messages_accepted_total", ""): 4, ("messages_handed_over_total", ""): 4,
        ("batches_total", 'result="handed_over"'): 3, ("batches_total", 'result="split"'): 1,
        ("provider_requests_total", 'result="ok"'): 3, ("provider_requests_total", 'result="rejected"'): 1,
        ("provider_requests_total", 'result="error"'): 1, ("requests_saved", ""): -1,
        ("provider_request_duration_seconds_count", 'result="ok"'): 3, ("batch_messages_count", ""): 5,
        ("batch_messages_sum", ""): 8, ("batch_messages_bucket", 'le="1"'): 2, ("batch_messages_bucket", 'le="2"'): 5,
        ("batch_messages_bucket", 'le="+Inf"'): 5, ("handover_wait_seconds_count", ""): 4,
        ("final_status_seconds_count", ""): 2, ("messages_final_total", 'status="DELIVERED"'): 1,
        ("messages_final_total", 'status="FAILED"'): 1, ("status_updates_total", 'result="applied"'): 3,
        ("status_updates_total", 'result="refused"'): 1, ("status_updates_total", 'result="unknown_message"'): 1,
        ("status_updates_total", 'result="unknown_status"'): 1, ("pending_messages", ""): 0,
        ("http_responses_total", 'route="/sms",code="202"'): 4, ("http_responses_total", 'route="/sms",code="400"'): 1,
        ("http_responses_total", 'route="/sms/<id>",code="200"'): 1,
        ("http_responses_total", 'route="other",code="404"'): 1,
    }  # fmt: skip
    assert {key: found[f"smsproxy_{key[0]}", key[1]] for key in expected} == expected


def test_histograms_are_cumulative_and_end_with_all_values() -> None:
    with service(client := InMemoryClient(latency=0.001), SINGLY) as server:
        for _ in range(20):
            request(server, "POST", "/sms", GOOD)
        server.proxy.stop(HANG)
        kinds, found = parse(page(server, "/metrics").decode())
    assert client
    for family in [name for name, kind in kinds.items() if kind == "histogram"]:
        series: dict[str, list[tuple[float, float]]] = {}
        for (name, labels), value in found.items():
            if name == f"{family}_bucket":
                others, _, bound = labels.rpartition("le=")
                series.setdefault(others.rstrip(","), []).append((float(bound.strip('"')), value))
        assert series
        for others, buckets in series.items():
            assert buckets == sorted(buckets) and len(dict(buckets)) == len(buckets)
            assert (buckets[-1][0], [value for _, value in buckets]) == (float("inf"), sorted(value for _, value in buckets))
            assert found[f"{family}_count", others] == buckets[-1][1]
    assert found["smsproxy_handover_wait_seconds_count", ""] == 20
    assert found["smsproxy_provider_request_duration_seconds_sum", 'result="ok"'] >= 0.02


def test_what_is_pending_in_flight_and_refused_is_shown() -> None:
    with service(client := Gate(), SmsProxyConfig(batch_size=1, senders=1, max_pending=2)) as server:
        for code in (202, 202, 503):
            assert request(server, "POST", "/sms", GOOD)[0] == code
        client.wait_entered()
        found = figures(server)
        assert [found[f"smsproxy_{name}", ""] for name in ("pending_messages", "provider_requests_in_flight")] == [2, 1]
        assert found["smsproxy_oldest_pending_message_age_seconds", ""] > 0
        assert found["smsproxy_http_responses_total", 'route="/sms",code="503"'] == 1


def test_each_response_on_a_connection_is_counted_under_its_own_route() -> None:
    with service(api_keys=KEYS) as server, Peer(server) as peer:
        key = "Authorization: Bearer first-key"
        for data in (raw("GET", "/sms/x", None, key), raw("GET", "/nowhere"), raw("GET", "/sms/x"), b"nonsense\r\n\r\n"):
            peer.exchange(data)
        found = {labels: count for (name, labels), count in parse(
            exchange(server, raw("GET", "/metrics", None, key))[1].decode())[1].items()
            if name == "smsproxy_http_responses_total" and count}  # fmt: skip
    assert found == {'route="/sms/<id>",code="200"': 1, 'route="other",code="404"': 1, 'route="/sms/<id>",code="401"': 1,
                     'route="other",code="400"': 1}  # fmt: skip


# API keys


@pytest.mark.parametrize(("method", "path"), [("POST", "/sms"), ("POST", "/sms/"), ("GET", "/sms/x"), ("GET", "/sms/"),
    ("GET", "/sms/a/b"), ("PUT", "/sms"), ("GET", "/metrics"), ("DELETE", "/metrics")])  # fmt: skip
@pytest.mark.parametrize("value", [None, "Bearer wrong", "Basic first-key", "Bearer", "first-key", "Bearer first-key x",
                                   "Bearer f\xefrst-key", "Bearer FIRST-KEY"])  # fmt: skip
def test_without_a_key_it_is_a_401_with_a_challenge_before_anything_else(method: str, path: str, value: str | None) -> None:
    lines = [] if value is None else [f"Authorization: {value}"]
    with service(api_keys=KEYS) as server, Peer(server) as peer:
        peer.send("\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Content-Length: 0", *lines, "", ""]).encode("latin-1"))
        status, body, headers = peer.receive()
        assert (status, json.loads(body)) == (401, {"Error": "a valid API key is needed"})
        assert headers["WWW-Authenticate"] == 'Bearer realm="smsproxy"'


@pytest.mark.parametrize("value", ["Bearer first-key", "bearer second-key", "BEARER   first-key"])
def test_each_key_opens_everything(value: str) -> None:
    with service(api_keys=KEYS) as server:
        assert [request(server, method, path, GOOD if method == "POST" else None, {"Authorization": value})[0] for method, path in
                (("POST", "/sms"), ("GET", "/sms/x"), ("GET", "/metrics"), ("GET", "/sms/"))] == [202, 200, 200, 404]  # fmt: skip


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json", "/"])
def test_health_description_and_page_stay_open(path: str) -> None:
    with service(api_keys=KEYS) as server:
        assert request(server, "GET", path)[0] == 200


def test_keys_can_be_replaced_while_it_runs() -> None:
    with service(api_keys=KEYS) as server:
        server.set_api_keys({"shop": "third-key"})
        found = [request(server, "GET", "/sms/x", headers={"Authorization": f"Bearer {key}"})[0]
                 for key in ("first-key", "third-key")]  # fmt: skip
        assert found == [401, 200]


def test_the_debug_log_names_the_client_of_each_request_and_shows_no_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with service(api_keys=KEYS) as server, Peer(server) as peer:
        for key in ("first-key", "second-key", "wrong-key"):
            peer.exchange(raw("GET", "/sms/x", None, f"Authorization: Bearer {key}"))
    lines = [record.getMessage() for record in caplog.records if "GET /sms/x" in record.getMessage()]
    named = [[name for name in KEYS if name in line] for line in lines]
    assert named == [["shop"], ["batch job"], []]
    assert [key for key in (*KEYS.values(), "wrong-key") if key in caplog.text] == []


# Private logs


class Gossip(Recorder):
    """A provider whose errors tell every number and text of the batch, in some spelling."""

    def __init__(self, spelled: Callable[[str], str]) -> None:
        super().__init__()
        self._spelled, self._requests, self._lock = spelled, 0, threading.Lock()

    def send(self, messages: Sequence[Message]) -> None:
        with self._lock:
            self._requests += 1
            turn = self._requests % 4
        gossip = "; ".join(self._spelled(f"{each.message} to {each.phone_number}\r\nforged") for each in messages)
        if turn == 1:
            try:
                raise ValueError(gossip)
            except ValueError as cause:
                raise RejectedError(gossip) from cause
        if turn in (2, 3):
            raise FastSmsingError(gossip) if turn == 2 else RuntimeError(gossip, gossip)
        super().send(messages)


@pytest.mark.parametrize("spelled", [str, repr, urllib.parse.quote, json.dumps], ids=["plain", "repr", "URL", "JSON"])
def test_no_number_no_text_and_no_key_is_logged_whatever_happens(
    spelled: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    numbers = [f"48600{index:06d}" for index in range(60)]
    pins = [f"{1_000_003 + index * 7919}" for index in range(60)]
    bad = [{"PhoneNumber": f"+{numbers[0]}", "Content": pins[0]}, {"PhoneNumber": numbers[1], "Text": pins[1]},
           {"PhoneNumber": int(numbers[2]), "Content": [pins[2]]}, {numbers[3]: pins[3], pins[3]: numbers[3]}]  # fmt: skip
    unparsed = [f'{{"PhoneNumber": "{numbers[4]}", "Content": "{pins[4]}'.encode(), f"{numbers[5]}={pins[5]}".encode()]
    config = SmsProxyConfig(batch_size=5, max_delay=None, senders=3, max_attempts=2, backoff_base=0.0)
    with service(client := Gossip(spelled), config) as server:
        ids = [request(server, "POST", "/sms", {"PhoneNumber": number, "Content": f"Your PIN is {pin}"}, {
            "Idempotency-Key": f"key-{pin}"})[1]["ID"] for number, pin in zip(numbers, pins)]  # fmt: skip
        for body in (*bad, *unparsed):
            assert request(server, "POST", "/sms", body)[0] == 400
        assert request(server, "GET", f"/sms/{numbers[0]}")[:2] == (200, {"Status": "NOT_FOUND"})
        applied(server, client, {"nobody": "DELIVERED", ids[1]: f"cannot send {pins[1]}", ids[2]: None, ids[3]: pins[3]})
        server.proxy.stop(HANG)
    for expected in ("handed over", "gave up", "not applied", "POST /sms 202"):
        assert expected in caplog.text
    assert [secret for secret in (*numbers, *pins) if secret in caplog.text] == []
    assert [record for record in caplog.records if len(record.getMessage().splitlines()) > 1] == []


# The description


class Walk:
    """The document that a server serves, and what it says of a response."""

    def __init__(self, document: Any) -> None:
        self.document = document

    def resolve(self, node: Any) -> Any:
        """The node that is meant by a `$ref`."""
        while "$ref" in node:
            node = functools.reduce(lambda at, step: at[step], node["$ref"].removeprefix("#/").split("/"), self.document)
        return node

    def operations(self) -> Iterator[tuple[str, str, Any]]:
        """Path, method, operation."""
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                if method != "parameters":
                    yield path, method.upper(), operation

    def check_response(self, said: Any, response: tuple[int, bytes, http.client.HTTPMessage]) -> None:
        """Fails unless the response is what is said of it."""
        said, (_, body, headers) = self.resolve(said), response
        for name, header in said.get("headers", {}).items():
            header = self.resolve(header)
            assert name in headers or not header["required"], f"{name} is not there"
            self.check(header["schema"], headers[name])
        if "content" not in said:
            assert body == b""
            return
        assert headers["Content-Type"] in said["content"]
        schema = said["content"][headers["Content-Type"]]["schema"]
        self.check(schema, json.loads(body) if headers["Content-Type"] == "application/json" else body.decode())

    def check(self, schema: Any, value: Any) -> bool:
        """True, or fails, by the part of JSON Schema that the document uses; any other keyword fails."""
        types = {"object": dict, "array": list, "string": str}
        rules: dict[str, Callable[[Any], bool]] = {
            "type": lambda rule: isinstance(value, types[rule]),
            "required": lambda rule: set(rule) <= set(value),
            "enum": lambda rule: value in rule,
            "const": lambda rule: bool(value == rule),
            "minLength": lambda rule: len(value) >= rule,
            "maxLength": lambda rule: len(value) <= rule,
            "minItems": lambda rule: len(value) >= rule,
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
def walk() -> Walk:
    with service() as server:
        return Walk(request(server, "GET", "/openapi.json")[1])


def provoke(status: str, path: str, method: str, body: bytes | None) -> tuple[int, bytes, http.client.HTTPMessage]:
    """The response of a service in the state, and to the request, that brings this status about."""
    concrete, at_once = path.replace("{id}", "some-id"), SmsProxyConfig(batch_size=1, max_pending=1)
    failing = {name: RuntimeError("x") for name in ("save_all", "get", "check", "oldest")}
    unavailable = {name: RepositoryUnavailableError("the disk is full") for name in failing}
    data = raw(method, concrete, body)
    cases: dict[str, tuple[dict[str, Any], list[bytes]]] = {
        "200": ({}, [data]), "202": ({}, [data]), "401": ({"api_keys": KEYS}, [data]),
        "400": ({}, [raw(method, concrete, body, "Bad Header: x")]), "404": ({}, [raw(method, path.replace("{id}", "a/b"), body)]),
        "405": ({}, [raw("DELETE", concrete)]), "411": ({}, [raw(method, concrete)]),
        "408": ({"limits": Limits(read_timeout=0.01)}, [f"{method} {concrete} HTTP/1.1\r\n".encode()]),
        "413": ({}, [raw(method, concrete, None, "Content-Length: 65537")]),
        "422": ({}, [post("x", "Idempotency-Key: k"), raw(method, concrete, body, "Idempotency-Key: k")]),
        "431": ({}, [raw(method, concrete, body, *["X: y"] * 101)]), "500": ({"repository": Guarded(**failing)}, [data]),
        "503": ({"repository": Guarded(**unavailable)}, [data]) if method == "GET" else ({"client": Gate(), "config": at_once}, [data] * 2),
        "default": ({}, [raw(method, concrete, body, version="HTTP/2.0")]),
    }  # fmt: skip
    options, requests = cases[status]
    with service(**options) as server:
        if status == "500" and concrete in ("/", "/openapi.json"):
            server.files = {}
        return [exchange(server, each) for each in requests][-1]


def test_every_response_that_is_described_can_be_had_and_is_as_described(walk: Walk) -> None:
    seen: set[str] = set()
    for path, method, operation in walk.operations():
        body = None
        if "requestBody" in operation:
            content = walk.resolve(operation["requestBody"])["content"]["application/json"]
            walk.check(content["schema"], content["example"])
            body = json.dumps(content["example"]).encode()
        for status, said in operation["responses"].items():
            response = provoke(status, path, method, body)
            try:
                assert (str(response[0]) if str(response[0]) in operation["responses"] else "default") == status
                walk.check_response(said, response)
            except AssertionError as error:
                raise AssertionError(f"{method} {path} {status} got {response[:2]}: {error}") from error
            seen.add(status)
    refusals = {str(int(code)) for code, _ in restapi.REFUSALS.values()}
    assert seen >= {"200", "202", "400", "401", "404", "405", "500", "default"} | refusals


def test_the_paths_their_methods_and_what_needs_a_key_are_described(walk: Walk) -> None:
    described = {path.replace("{id}", "<id>"): set() for path, _, _ in walk.operations()}
    for path, method, operation in walk.operations():
        described[path.replace("{id}", "<id>")].add(method)
        with service(api_keys=KEYS) as server:
            status = exchange(server, raw(method, path.replace("{id}", "x"), b"{}" if method == "POST" else None))[0]
        assert (path, method, status == 401) == (path, method, bool(operation.get("security")))
    assert described == {path: set(methods) for path, methods in restapi.ROUTES.items() if path != "*"}


def test_the_limits_of_a_message_are_described_as_they_are(walk: Walk) -> None:
    fields = walk.document["components"]["schemas"]["Message"]["properties"]
    for name, character in (("PhoneNumber", "1"), ("Content", "x")):
        longest = fields[name]["maxLength"]
        values = {length: {**GOOD, name: character * length} for length in (fields[name]["minLength"], longest, longest + 1)}
        with service() as server:
            assert [request(server, "POST", "/sms", value)[0] for value in values.values()] == [202, 202, 400]
    assert set(walk.document["components"]["schemas"]["Status"]["properties"]["Reason"]["enum"]) == {each.value for each in Reason}


def test_every_example_is_as_its_schema_says_and_every_part_is_used(walk: Walk) -> None:
    components, text = walk.document["components"], json.dumps(walk.document)
    described = [*components["requestBodies"].values(), *components["responses"].values()]
    described += [walk.resolve(each) for _, _, operation in walk.operations() for each in operation["responses"].values()]
    contents = [content for each in described for content in each.get("content", {}).values() if "example" in content]
    assert len(contents) > 15
    for each in (*contents, *components["headers"].values(), *components["parameters"].values()):
        walk.check(each["schema"], each["example"])
    parts = [f"#/components/{kind}/{name}" for kind, found in components.items() for name in found if kind != "securitySchemes"]
    assert [part for part in parts if f'"{part}"' not in text] == []


def test_the_description_is_of_this_version(walk: Walk) -> None:
    assert (walk.document["openapi"], walk.document["info"]["version"]) == ("3.1.0", main.__version__)


# Parts that need no server


def test_a_file_is_found_where_an_installation_puts_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "share" / "smsproxy").mkdir(parents=True)
    (tmp_path / "share" / "smsproxy" / "only-there.json").write_bytes(b"{}")
    monkeypatch.setattr(restapi, "__file__", str(tmp_path / "lib" / "python" / "restapi.py"))
    assert restapi.data_file("only-there.json") == b"{}"


def test_what_cannot_be_handed_out_fails_the_start() -> None:
    with pytest.raises(OSError):
        restapi.data_file("nowhere.json")


def test_the_domain_refuses_for_reasons_that_all_have_a_code() -> None:
    assert {kind for kind in restapi.REFUSALS} >= {RepositoryUnavailableError, ClosedError}
    assert SendMessage(NUMBER, TEXT) == restapi.decode(json.dumps(GOOD).encode())

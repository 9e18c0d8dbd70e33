"""The REST interface over real sockets: every row of the interface's table, and what operators rely on."""
from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import queue
import re
import select
import socket
import struct
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import main
import restapi
from fastsmsing import FastSmsingError, InMemoryClient, Message, RejectedError
from helpers import HANG, Gate, Grouping, Recorder, Scripted, request, serving
from http_front import Limits
from restapi import SmsHandler, SmsServer
from smsproxy import (
    InMemoryRepository, MessageStatus, OverloadedError, RepositoryUnavailableError, SmsProxy, SmsProxyConfig,
    SmsProxyError,
)  # fmt: skip

NUMBER, TEXT = "48123456789", "Your parcel is here"
GOOD = {"PhoneNumber": NUMBER, "Content": TEXT}
SINGLY = SmsProxyConfig(batch_size=1, senders=1)
PAIRS = SmsProxyConfig(batch_size=2, max_delay=None, senders=1, max_attempts=2, backoff_base=0.0)
HELD = SmsProxyConfig(max_delay=None)  # nothing leaves before the end
PATHS = {"/sms": "POST", "/sms/": "POST", "/sms/some-id": "GET, HEAD"} | dict.fromkeys(
    ("/metrics", "/healthz", "/openapi.json"), "GET, HEAD"
)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT")


# Doubles and tools


class Watched(InMemoryRepository):
    """Tells when a message has reached a status."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._seen: dict[str, MessageStatus] = {}

    def update(self, message_id: str, status: MessageStatus) -> None:
        super().update(message_id, status)
        with self._changed:
            self._seen[message_id] = status
            self._changed.notify_all()

    def wait_for(self, message_id: str, status: MessageStatus) -> None:
        """Blocks until the message has the status."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._seen.get(message_id) is status, HANG), "it never came"


class Failing(InMemoryRepository):
    """Raises the same error whatever it is asked."""

    def __init__(self, error: BaseException, *, slow: bool = False) -> None:
        super().__init__()
        self.error, self.slow = error, slow

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        raise self.error

    def get(self, message_id: str) -> MessageStatus:
        raise self.error

    def update(self, message_id: str, status: MessageStatus) -> None:
        raise self.error

    def check(self) -> None:
        raise self.error


class Slow(InMemoryRepository):
    """Every method waits for its gate."""

    slow = True

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.saving, self.getting = threading.Semaphore(0), threading.Event(), threading.Event()

    def save(self, message_id: str, message: Message | None = None, fingerprint: bytes | None = None) -> None:
        self.entered.release()
        assert self.saving.wait(HANG)
        super().save(message_id, message, fingerprint)

    def get(self, message_id: str) -> MessageStatus:
        self.entered.release()
        assert self.getting.wait(HANG)
        return super().get(message_id)

    def wait_entered(self) -> None:
        """Blocks until one more call waits at a gate."""
        assert self.entered.acquire(timeout=HANG), "no call came"


class Durable(Grouping):
    """A durable repository whose saves end when the test says so; `texts` has the messages of each."""

    slow = True

    def __init__(self, outbox: Iterable[tuple[float, Message]] = ()) -> None:
        super().__init__()
        self.left = list(outbox)
        self.texts: list[list[str]] = []
        self._entered = threading.Semaphore(0)
        self._orders: queue.Queue[BaseException | None] = queue.Queue()
        for _, message in self.left:
            self.save(message.message_id, message)

    def save_all(self, messages: Sequence[tuple[Message, bytes | None]]) -> list[Exception | None]:
        self.texts.append([message.message for message, _ in messages])
        self._entered.release()
        error = self._orders.get(timeout=HANG)
        if error is not None:
            raise error
        return super().save_all(messages)

    def wait_entered(self) -> None:
        """Blocks until one more save waits for its end."""
        assert self._entered.acquire(timeout=HANG), "nothing was saved"

    def settle(self, error: BaseException | None = None) -> None:
        """Ends the save that came, or the next one."""
        self._orders.put(error)

    def outbox(self) -> Iterable[tuple[float, Message]]:
        return self.left

    def handed_over(self, message_ids: Iterable[str]) -> None:
        pass

    def update_all(self, updates: Mapping[str, MessageStatus]) -> dict[str, SmsProxyError]:
        return {}


@contextlib.contextmanager
def service(
    client: Any = None,
    config: SmsProxyConfig = HELD,
    *,
    repository: Any = None,
    statistics: Any = None,
    limits: Limits = Limits(),
    keys: Sequence[str] = (),
) -> Iterator[SmsServer]:
    """A proxy and a server for it; at the end everything still pending is handed over."""
    client = client or Recorder()
    proxy = SmsProxy(client, config, repository=repository, statistics=statistics)
    proxy.start()
    try:
        with serving(proxy, limits, api_keys=keys) as server:
            yield server
    finally:
        if isinstance(client, Gate):
            client.opened.set()
        proxy.stop(HANG)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def accepted(server: SmsServer) -> float:
    """How many messages were accepted so far."""
    return server.proxy.gauges()["smsproxy_messages_accepted_total"]


class Peer:
    """One connection, on which bytes can be sent that no HTTP client would send."""

    def __init__(self, server: SmsServer) -> None:
        host, port = server.server_address[:2]
        self._socket = socket.create_connection((str(host), int(port)), HANG)
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._answers.close()
        self._socket.close()

    def send(self, method: str, path: str, *lines: str, body: bytes = b"", version: str = "HTTP/1.1") -> None:
        head = "".join(f"{line}\r\n" for line in (f"{method} {path} {version}", "Host: here", *lines))
        self._socket.sendall(head.encode("latin-1") + b"\r\n" + body)

    def post(self, *lines: str, body: bytes = json.dumps(GOOD).encode()) -> None:
        self.send("POST", "/sms", f"Content-Length: {len(body)}", *lines, body=body)

    def post_text(self, text: str, *lines: str) -> None:
        self.post(*lines, body=json.dumps(GOOD | {"Content": text}).encode())

    def reset(self) -> None:
        """Breaks the connection off, so that whatever is sent to it fails."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._answers.close()
        self._socket.close()

    def half(self, data: bytes) -> None:
        """Sends a part of a request."""
        self._socket.sendall(data)

    def receive(self, method: str = "GET") -> tuple[int, bytes, http.client.HTTPMessage]:
        """The next answer: status, body, headers."""
        status = int(self._answers.readline().split()[1])
        headers = http.client.parse_headers(self._answers)
        return status, b"" if method == "HEAD" else self._answers.read(int(headers["Content-Length"])), headers

    @property
    def answered(self) -> bool:
        """Whether something of an answer is there now."""
        return bool(select.select([self._socket], [], [], 0)[0])


def raw(server: SmsServer, method: str, path: str, *lines: str, **options: Any) -> tuple[int, Any, Any]:
    """One request with exactly these lines; the answer's body as JSON."""
    with Peer(server) as peer:
        peer.send(method, path, *lines, **options)
        status, body, headers = peer.receive(method)
        return status, json.loads(body) if body else b"", headers


# Accepting


def test_a_message_is_accepted_with_its_id_and_where_to_ask_for_it() -> None:
    with service() as server:
        status, doc, headers = request(server, "POST", "/sms", GOOD)
        assert (status, list(doc)) == (202, ["ID"])
        assert (headers["Location"], headers["Content-Type"]) == (f"/sms/{doc['ID']}", "application/json")


def test_an_id_is_a_random_uuid() -> None:
    with service() as server:
        ids = [request(server, "POST", "/sms", GOOD)[1]["ID"] for _ in range(20)]
        assert [(str(uuid.UUID(each)), uuid.UUID(each).version) for each in ids] == [(each, 4) for each in ids]
        assert len(set(ids)) == 20


def test_the_slash_at_the_end_makes_no_difference_to_a_post() -> None:
    with service() as server:
        status, doc, headers = request(server, "POST", "/sms/", GOOD)
        assert (status, headers["Location"]) == (202, f"/sms/{doc['ID']}")


@pytest.mark.parametrize("number", ["PhoneNumber", "phoneNumber", "phone_number", "PHONE_NUMBER", "_phone__number_"])
@pytest.mark.parametrize("content", ["Content", "content", "CONTENT", "con_tent"])
def test_field_names_are_matched_without_regard_to_case_and_underscores(number: str, content: str) -> None:
    client = Recorder()
    with service(client) as server:
        status, _, _ = request(server, "POST", "/sms", {number: NUMBER, content: TEXT})
        assert status == 202
    assert [(each.phone_number, each.message) for each in client.batches[0]] == [(NUMBER, TEXT)]


def test_unknown_fields_are_ignored() -> None:
    with service() as server:
        assert request(server, "POST", "/sms", GOOD | {"Sender": "Shop", "Tags": [1, {"a": None}]})[0] == 202


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "nonsense"])
def test_the_content_type_of_a_request_is_not_looked_at(content_type: str) -> None:
    with service() as server:
        assert request(server, "POST", "/sms", GOOD, {"Content-Type": content_type})[0] == 202


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_unicode_content_arrives_unchanged_at_the_provider(ensure_ascii: bool) -> None:
    texts = [
        "Zażółć gęślą jaźń", "👩‍👩‍👧 🇵🇱", "שלום, مرحبا", "e\u0301 is not é", "\u2028\u2029\x85\x00\x7f\ufeff", "  \r\n\t ",
        'quotes " and \\ and /', "\U0010ffff\uffff",
    ]  # fmt: skip
    client = Recorder()
    with service(client) as server:
        for text in texts:
            body = json.dumps({"PhoneNumber": NUMBER, "Content": text}, ensure_ascii=ensure_ascii).encode()
            assert request(server, "POST", "/sms", body)[0] == 202
    assert [each.message for batch in client.batches for each in batch] == texts


def test_a_body_of_exactly_64_kib_is_accepted() -> None:
    client = Recorder()
    text = "x" * (64 * 1024 - len(json.dumps(GOOD | {"Content": ""})))
    with service(client) as server:
        body = json.dumps(GOOD | {"Content": text})
        assert (len(body), request(server, "POST", "/sms", body)[0]) == (65536, 202)
    assert client.batches[0][0].message == text


# Refusing


def field(name: str, value: str) -> bytes:
    """A body whose one field has the value, given as JSON."""
    values = {key: json.dumps(good) for key, good in GOOD.items()} | {name: value}
    return ("{" + ", ".join(f'"{key}": {each}' for key, each in values.items()) + "}").encode()


BAD_VALUES = {
    "empty": '""', "null": "null", "number": "48123456789", "negative": "-1", "float": "1.5e3", "boolean": "true",
    "list": '["48123456789"]', "object": '{"a": 1}', "giant integer": "9" * 60_000, "giant float": "1e" + "9" * 50_000,
    "lone surrogate": r'"1\ud800"', "surrogates the wrong way round": r'"1\udc00\ud800"',
    "nested 30,000 deep": "[" * 30_000 + "]" * 30_000,
}  # fmt: skip
BAD_NUMBERS = {
    "plus": "+48123456789", "spaces": "48 123 456 789", "dashes": "48-123", "letters": "4812a", "line end": "48123\\n",
    "Arabic digits": "\\u0664\\u0668", "full-width digits": "\\uff14\\uff18", "superscript": "\\u00b2", "NUL": "48\\u0000",
    "blank": " ",
}  # fmt: skip


@pytest.mark.parametrize("name", ["PhoneNumber", "Content"])
@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_field_with_a_bad_value_is_a_400_that_names_it(name: str, value: str) -> None:
    with service() as server:
        status, doc, _ = request(server, "POST", "/sms", field(name, value))
        assert (status, list(doc), accepted(server)) == (400, ["Error"], 0)
        assert name in doc["Error"] or value.startswith("[["), doc


@pytest.mark.parametrize("number", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_a_phone_number_is_made_of_ascii_digits_alone(number: str) -> None:
    with service() as server:
        status, doc, _ = request(server, "POST", "/sms", field("PhoneNumber", f'"{number}"'))
        assert (status, doc) == (400, {"Error": "PhoneNumber must consist of the digits 0 to 9 only"})


@pytest.mark.parametrize("name", ["PhoneNumber", "Content"])
def test_a_missing_field_is_a_400_that_names_it(name: str) -> None:
    with service() as server:
        body = {key: value for key, value in GOOD.items() if key != name}
        assert request(server, "POST", "/sms", body)[:2] == (400, {"Error": f"{name} is missing"})


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"PhoneNumber": "1", "phone_number": "2", "Content": "x"}', "phone_number"),
        (b'{"PhoneNumber": "1", "Content": "x", "CONTENT": "x"}', "CONTENT"),
        (b'{"PhoneNumber": "1", "PhoneNumber": "1", "Content": "x"}', "PhoneNumber"),
        (b'{"PhoneNumber": "1", "Content": "x", "con\\ud800tent": 1, "CON\\uD800TENT": 1}', "CON\ud800TENT"),
    ],
)
def test_a_field_given_twice_in_whatever_spelling_is_a_400_that_names_it(body: bytes, name: str) -> None:
    with service() as server:
        status, doc, _ = request(server, "POST", "/sms", body)
        assert (status, name in doc["Error"], accepted(server)) == (400, True, 0)


BAD_BODIES = {
    "nothing": b"", "blanks": b" \r\n", "not JSON": b"PhoneNumber=48123456789", "cut off": b'{"PhoneNumber": "48',
    "something behind": json.dumps(GOOD).encode() + b"}", "two documents": json.dumps(GOOD).encode() * 2,
    "list": json.dumps([GOOD]).encode(), "string": b'"text"', "null": b"null", "number": b"48123456789", "true": b"true",
    "NaN": field("Extra", "NaN"), "Infinity": field("Extra", "Infinity"), "-Infinity": field("Extra", "-Infinity"),
    "NaN as a field": field("PhoneNumber", "NaN"), "Infinity as a field": field("Content", "Infinity"),
    "NaN alone": b"NaN", "single quotes": b"{'PhoneNumber': '1', 'Content': 'x'}", "comma": field("Extra", "1,"),
    "control character": field("Content", '"\x01"'), "line end in a string": field("Content", '"a\nb"'),
    "UTF-16": json.dumps(GOOD).encode("utf-16"), "UTF-16 without BOM": json.dumps(GOOD).encode("utf-16-le"),
    "UTF-32": json.dumps(GOOD).encode("utf-32"), "BOM": json.dumps(GOOD).encode("utf-8-sig"),
    "Latin-1": json.dumps(GOOD | {"Content": "é"}, ensure_ascii=False).encode("latin-1"),
    "overlong UTF-8": field("Content", '"@"').replace(b"@", b"\xc1\x81"),
    "surrogate in UTF-8": field("Content", '"@"').replace(b"@", b"\xed\xa0\x80"),
    "UTF-8 cut off": field("Content", '"@"').replace(b"@", b"\xf0\x9f"),
    "open lists": b"[" * 60_000, "open objects": b'{"a":' * 12_000, "closed lists": b"[" * 30_000 + b"]" * 30_000,
    "closed objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "giant integer": b"9" * 60_000,
    "nested inside a field": field("Extra", "[" * 60_000),
}  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_json_object_in_utf_8_is_a_400(body: bytes) -> None:
    with service() as server, Peer(server) as peer:
        peer.post(body=body)
        status, answer, _ = peer.receive()
        assert (status, list(json.loads(answer)), accepted(server)) == (400, ["Error"], 0)
        peer.post()  # the connection is still good
        assert peer.receive()[0] == 202


def test_an_error_shows_nothing_of_python() -> None:
    with service() as server:
        for body in BAD_BODIES.values():
            answer = json.dumps(request(server, "POST", "/sms", body)[1])
            assert re.search(r"Traceback|File \"|Error:|Exception|line \d+ column|object at 0x", answer) is None


@pytest.mark.parametrize("lines", [(), ("Transfer-Encoding: chunked",)])
def test_a_post_without_a_length_is_a_411(lines: tuple[str, ...]) -> None:
    with service() as server:
        status, doc, headers = raw(server, "POST", "/sms", *lines)
        assert (status, list(doc), headers["Connection"]) == (411, ["Error"], "close")


def test_a_body_over_64_kib_is_a_413_that_does_not_wait_for_it() -> None:
    with service() as server:
        status, doc, headers = raw(server, "POST", "/sms", "Content-Length: 65537")
        assert (status, list(doc), headers["Connection"]) == (413, ["Error"], "close")


# Paths and methods


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path",
    ["/", "/sms/a/b", "/sms/a/", "/sms//", "//sms", "/SMS", "/smsx", "/%73ms", "/metrics/", "/healthz/x", "/favicon.ico",
     "/openapi", "/sms;a", "/../sms"],
)  # fmt: skip
def test_any_other_path_is_a_404(method: str, path: str) -> None:
    with service() as server:
        status, doc, headers = raw(server, method, path, "Content-Length: 0")
        assert (status, headers["Content-Type"]) == (404, "application/json")
        assert (doc == b"") if method == "HEAD" else (list(doc) == ["Error"])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_asking_for_no_id_is_a_404(method: str) -> None:
    with service() as server:
        assert request(server, method, "/sms/")[0] == 404


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_method_is_a_405_that_says_what_is_allowed(path: str) -> None:
    with service() as server:
        wrong = [each for each in METHODS if each not in PATHS[path] and (path != "/sms/" or each not in ("GET", "HEAD"))]
        found = {method: raw(server, method, path, "Content-Length: 0") for method in wrong}
        allow = {method: (status, headers["Allow"]) for method, (status, _, headers) in found.items()}
        assert allow == dict.fromkeys(wrong, (405, f"{PATHS[path]}, OPTIONS"))
        assert {bool(doc) for method, (_, doc, _) in found.items() if method != "HEAD"} == {True}


@pytest.mark.parametrize("path", PATHS)
def test_options_says_what_is_allowed(path: str) -> None:
    with service() as server:
        status, doc, headers = request(server, "OPTIONS", path)
        assert (status, doc, headers["Allow"]) == (200, b"", f"{PATHS[path]}, OPTIONS")


def test_options_can_be_asked_of_the_server_as_a_whole() -> None:
    with service() as server:
        status, _, headers = request(server, "OPTIONS", "*")
        assert (status, headers["Allow"]) == (200, "GET, HEAD, POST, OPTIONS")


@pytest.mark.parametrize("path", [path for path, methods in PATHS.items() if "HEAD" in methods])
def test_head_is_get_without_the_body(path: str) -> None:
    with service() as server, Peer(server) as peer:
        peer.send("GET", path)
        status, body, headers = peer.receive()
        peer.send("HEAD", path)
        bare = peer.receive("HEAD")
        assert (bare[0], bare[1], bare[2]["Content-Type"]) == (status, b"", headers["Content-Type"])
        assert int(bare[2]["Content-Length"]) >= len(body) > 0  # /metrics grows by a line
        peer.send("GET", "/healthz")  # what came was no body
        assert peer.receive()[0] == 200


def test_a_query_is_ignored() -> None:
    with service() as server:
        assert request(server, "POST", "/sms?a=b", GOOD)[0] == 202
        assert request(server, "GET", "/healthz?verbose")[:2] == (200, {"Status": "OK"})


# Statuses


def test_an_id_never_issued_is_not_found_which_is_no_error() -> None:
    with service() as server:
        for message_id in (str(uuid.uuid4()), "x", "%00", "%2F", "%ff", "a%20b", "%ED%A0%80", "<id>", "x" * 8000):
            assert request(server, "GET", f"/sms/{message_id}")[:2] == (200, {"Status": "NOT_FOUND"})


def test_a_message_goes_from_accepted_by_confirmed_to_delivered() -> None:
    client, repository = Gate(), Watched()
    with service(client, SINGLY, repository=repository) as server:
        _, doc, headers = request(server, "POST", "/sms", GOOD)
        client.wait_entered()
        seen = [request(server, "GET", headers["Location"])[1]]
        client.opened.set()
        client.wait_for(lambda batches: len(batches) == 1)
        for status in (MessageStatus.CONFIRMED, MessageStatus.DELIVERED):
            client.report({doc["ID"]: status.value})
            repository.wait_for(doc["ID"], status)
            seen.append(request(server, "GET", headers["Location"])[1])
        assert seen == [{"Status": "ACCEPTED"}, {"Status": "CONFIRMED"}, {"Status": "DELIVERED"}]


def test_a_message_is_delivered_by_the_provider_in_memory() -> None:
    repository = Watched()
    with service(InMemoryClient(), SINGLY, repository=repository) as server:
        _, doc, headers = request(server, "POST", "/sms", GOOD)
        repository.wait_for(doc["ID"], MessageStatus.DELIVERED)
        assert request(server, "GET", headers["Location"])[:2] == (200, {"Status": "DELIVERED"})


def test_a_message_given_up_is_failed() -> None:
    repository = Watched()
    with service(Scripted(RejectedError("no")), SINGLY, repository=repository) as server:
        _, doc, headers = request(server, "POST", "/sms", GOOD)
        repository.wait_for(doc["ID"], MessageStatus.FAILED)
        assert request(server, "GET", headers["Location"])[1] == {"Status": "FAILED"}


# Overload, shutdown, failure


def test_a_full_queue_is_a_503_that_says_when_to_come_again() -> None:
    client = Gate()
    with service(client, SmsProxyConfig(batch_size=1, senders=1, max_pending=2)) as server:
        statuses = [request(server, "POST", "/sms", GOOD)[0] for _ in range(2)]
        status, doc, headers = request(server, "POST", "/sms", GOOD)
        assert ([*statuses, status], list(doc)) == ([202, 202, 503], ["Error"])
        assert int(headers["Retry-After"]) > 0
    assert len(client.ids) == 2


def test_shutting_down_is_a_503_that_says_when_to_come_again() -> None:
    with service() as server:
        location = request(server, "POST", "/sms", GOOD)[2]["Location"]
        server.proxy.stop(HANG)
        status, doc, headers = request(server, "POST", "/sms", GOOD)
        assert (status, list(doc), int(headers["Retry-After"]) > 0) == (503, ["Error"], True)
        assert request(server, "GET", location)[0] == 200


@pytest.mark.parametrize("error", [RuntimeError("password=hunter2"), SystemExit("password=hunter2")], ids=["error", "exit"])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("method", "path"), [("POST", "/sms"), ("GET", "/sms/x"), ("GET", "/healthz")])
def test_a_repository_that_raises_is_a_500_without_any_details(
    method: str, path: str, slow: bool, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    repository = Failing(error, slow=slow)
    with service(repository=repository) as server, Peer(server) as peer:
        for _ in range(2):  # on the same connection
            peer.send(method, path, f"Content-Length: {len(json.dumps(GOOD))}", body=json.dumps(GOOD).encode())
            status, body, headers = peer.receive()
            assert (status, json.loads(body)) == (500, {"Error": "internal error"})
            assert headers["Content-Type"] == "application/json"
    assert "hunter2" in caplog.text  # the operator is told


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("method", "path"), [("POST", "/sms"), ("GET", "/sms/x"), ("HEAD", "/sms/x")])
def test_a_repository_that_cannot_be_used_now_is_a_503(method: str, path: str, slow: bool) -> None:
    with service(repository=Failing(RepositoryUnavailableError("the disk is full"), slow=slow)) as server:
        status, _, headers = request(server, method, path, GOOD)
        assert (status, int(headers["Retry-After"]) > 0) == (503, True)


def test_a_message_that_could_not_be_saved_takes_no_place_in_the_queue() -> None:
    repository = Failing(RuntimeError("no"))
    with service(config=SmsProxyConfig(batch_size=1, max_pending=1), repository=repository) as server:
        assert [request(server, "POST", "/sms", GOOD)[0] for _ in range(5)] == [500] * 5


# Idempotency keys


def test_a_repeat_gets_the_same_answer_and_is_sent_once() -> None:
    client = Recorder()
    with service(client) as server:
        found = [request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-1"}) for _ in range(5)]
        _, doc, headers = found[0]
        first = (202, doc, headers["Location"])
        assert [(status, doc, headers["Location"]) for status, doc, headers in found] == [first] * 5
        assert uuid.UUID(doc["ID"]).version == 4
    assert client.ids == [doc["ID"]]


def test_a_repeat_may_be_written_differently() -> None:
    with service() as server:
        headers = {"Idempotency-Key": "order-1"}
        first = request(server, "POST", "/sms", GOOD, headers)[1]
        second = request(server, "POST", "/sms/", {"content": TEXT, "phone_number": NUMBER, "More": 1}, headers)[1]
        assert second == first


def test_a_repeat_after_delivery_gets_the_same_answer() -> None:
    client, repository = InMemoryClient(), Watched()
    with service(client, SINGLY, repository=repository) as server:
        first = request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-1"})[1]
        repository.wait_for(first["ID"], MessageStatus.DELIVERED)
        assert request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-1"})[:2] == (202, first)
        assert accepted(server) == 1


@pytest.mark.parametrize("slow", [False, True])
def test_concurrent_repeats_get_the_same_answer_and_are_sent_once(slow: bool) -> None:
    client, repository = Recorder(), Slow()
    repository.slow = slow
    repository.saving.set()
    with service(client, repository=repository) as server:
        barrier = threading.Barrier(16)
        found: list[tuple[int, Any]] = []

        def post() -> None:
            barrier.wait(HANG)
            found.append(request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-1"})[:2])

        threads = [threading.Thread(target=post) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        assert found == [(202, found[0][1])] * 16
    assert client.ids == [found[0][1]["ID"]]


@pytest.mark.parametrize("other", [{"Content": "another"}, {"PhoneNumber": "48123456780"}])
def test_another_message_under_the_same_key_is_a_422(other: dict[str, str]) -> None:
    client = Recorder()
    with service(client) as server:
        first = request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-1"})[1]
        status, doc, _ = request(server, "POST", "/sms", GOOD | other, {"Idempotency-Key": "order-1"})
        assert (status, list(doc)) == (422, ["Error"])
        assert request(server, "POST", "/sms", GOOD, {"Idempotency-Key": "order-1"})[:2] == (202, first)
    assert client.ids == [first["ID"]]


def test_where_the_text_begins_matters_to_a_key() -> None:
    with service() as server:
        request(server, "POST", "/sms", {"PhoneNumber": "12", "Content": "3"}, {"Idempotency-Key": "k"})
        body = {"PhoneNumber": "1", "Content": "23"}
        assert request(server, "POST", "/sms", body, {"Idempotency-Key": "k"})[0] == 422


def test_other_keys_and_no_key_make_other_messages() -> None:
    client = Recorder()
    with service(client) as server:
        for key in ("a", "A", "b", "~" * 255, "!", None, None):
            headers = {} if key is None else {"Idempotency-Key": key}
            assert request(server, "POST", "/sms", GOOD, headers)[0] == 202
    assert len(set(client.ids)) == 7


BAD_KEYS = {
    "empty": ("Idempotency-Key:",), "blank": ("Idempotency-Key:   ",), "too long": ("Idempotency-Key: " + "x" * 256,),
    "space inside": ("Idempotency-Key: a b",), "tab inside": ("Idempotency-Key: a\tb",), "Latin-1": ("Idempotency-Key: é",),
    "repeated line": ("Idempotency-Key: a", "Idempotency-Key: a"), "two keys": ("Idempotency-Key: a", "Idempotency-Key: b"),
}  # fmt: skip


@pytest.mark.parametrize("lines", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_is_a_400_that_names_the_header(lines: tuple[str, ...]) -> None:
    with service() as server, Peer(server) as peer:
        peer.post(*lines)
        status, body, _ = peer.receive()
        assert (status, "Idempotency-Key" in json.loads(body)["Error"], accepted(server)) == (400, True, 0)


def test_a_request_that_was_refused_does_not_use_its_key_up() -> None:
    client = Recorder()
    with service(client) as server:
        headers = {"Idempotency-Key": "order-1"}
        statuses = [request(server, "POST", "/sms", body, headers)[0] for body in (GOOD | {"Content": ""}, GOOD, GOOD)]
        assert statuses == [400, 202, 202]
    assert len(client.ids) == 1


# API keys


KEYS = ("first-key", "second-key")
GUARDED = [("POST", "/sms"), ("POST", "/sms/"), ("GET", "/sms/x"), ("HEAD", "/sms/x"), ("GET", "/metrics"),
           ("DELETE", "/sms"), ("OPTIONS", "/sms"), ("GET", "/sms/a/b"), ("GET", "/sms/"), ("GET", "/metrics?x")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_a_key_it_is_a_401_with_a_challenge(method: str, path: str) -> None:
    with service(keys=KEYS) as server:
        status, _, headers = request(server, method, path, GOOD)
        assert (status, headers["WWW-Authenticate"].split()[0], accepted(server)) == (401, "Bearer", 0)


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens_everything(key: str) -> None:
    with service(keys=KEYS) as server:
        found = [request(server, method, path, GOOD, bearer(key))[0] for method, path in GUARDED]
        assert found == [202, 202, 200, 200, 200, 405, 200, 404, 404, 200]


@pytest.mark.parametrize(
    "value",
    ["", "first-key", "Basic first-key", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-ke", "Bearer first-keyx",
     "Bearer FIRST-KEY", "Bearerfirst-key", "Bearer first-key,second-key", "Bearer first-key second-key", "Bearer é",
     "Token first-key", "Bearer=first-key"],
)  # fmt: skip
def test_anything_but_a_key_after_bearer_is_a_401(value: str) -> None:
    with service(keys=KEYS) as server:
        assert raw(server, "GET", "/metrics", f"Authorization: {value}")[0] == 401


@pytest.mark.parametrize("value", ["bearer first-key", "BEARER first-key", "Bearer  first-key"])
def test_the_scheme_is_matched_without_regard_to_case(value: str) -> None:
    with service(keys=KEYS) as server:
        assert request(server, "GET", "/sms/x", headers={"Authorization": value})[0] == 200


def test_a_repeated_authorization_is_a_401() -> None:
    with service(keys=KEYS) as server:
        assert raw(server, "GET", "/sms/x", *["Authorization: Bearer first-key"] * 2)[0] == 401


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json"])
def test_health_and_description_stay_open(path: str) -> None:
    with service(keys=KEYS) as server:
        assert [request(server, method, path)[0] for method in ("GET", "HEAD", "OPTIONS")] == [200] * 3


def test_without_configured_keys_nothing_is_asked_for() -> None:
    with service() as server:
        assert [request(server, "GET", "/metrics", headers=headers)[0] for headers in ({}, bearer("x"))] == [200, 200]


def test_a_body_is_not_asked_for_without_a_key() -> None:
    with service(keys=KEYS) as server:
        status, _, headers = raw(server, "POST", "/sms", "Content-Length: 50", "Expect: 100-continue")
        assert (status, headers["Connection"]) == (401, "close")


def test_keys_are_in_no_log_and_in_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answers = []
    with service(repository=Failing(RuntimeError("no")), keys=KEYS) as server:
        for method, path in (*GUARDED, ("GET", "/healthz"), ("GET", "/openapi.json"), ("GET", "/")):
            for key in (KEYS[0], KEYS[1], f"{KEYS[0]}-typo"):
                status, doc, headers = request(server, method, path, GOOD, bearer(key))
                answers.append(f"{status} {doc} {headers}")
    assert len(caplog.records) > len(answers)
    assert [line for line in (*answers, caplog.text) if KEYS[0] in line or KEYS[1] in line] == []


# Repositories that may block


def test_others_are_served_while_a_save_blocks() -> None:
    repository = Slow()
    repository.getting.set()
    with service(repository=repository) as server, Peer(server) as blocked:
        blocked.post()
        repository.wait_entered()
        others = [request(server, "GET", path)[0] for path in ("/sms/x", "/healthz", "/metrics", "/openapi.json")]
        assert (others, blocked.answered) == ([200] * 4, False)
        repository.saving.set()
        assert blocked.receive()[0] == 202


def test_others_are_served_while_a_status_is_read() -> None:
    repository = Slow()
    repository.saving.set()
    with service(repository=repository) as server, Peer(server) as blocked:
        blocked.send("GET", "/sms/x")
        repository.wait_entered()
        assert (request(server, "POST", "/sms", GOOD)[0], blocked.answered) == (202, False)
        repository.getting.set()
        assert blocked.receive()[:2] == (200, b'{"Status": "NOT_FOUND"}')


def test_answers_on_a_connection_keep_the_order_of_their_requests() -> None:
    repository = Slow()
    with service(repository=repository) as server, Peer(server) as peer:
        peer.post()
        peer.send("GET", "/sms/x")
        peer.send("GET", "/openapi.json")
        peer.send("GET", "/nowhere")
        repository.wait_entered()
        assert (request(server, "GET", "/healthz")[0], peer.answered) == (200, False)
        repository.getting.set()
        repository.saving.set()
        assert [peer.receive()[0] for _ in range(4)] == [202, 200, 200, 404]


def test_a_durable_save_is_answered_once_it_is_on_disk_and_holds_up_nobody() -> None:
    repository = Durable()
    with service(repository=repository) as server, Peer(server) as first, Peer(server) as second:
        first.post()
        first.send("GET", "/nowhere")
        assert request(server, "GET", "/healthz")[0] == 200  # by now the first one is being saved
        second.post()
        assert (request(server, "GET", "/healthz")[0], first.answered, second.answered) == (200, False, False)
        repository.settle()
        status, body, headers = first.receive()
        assert (status, headers["Location"]) == (202, f"/sms/{json.loads(body)['ID']}")
        assert (first.receive()[0], second.answered) == (404, False)
        repository.settle()
        assert second.receive()[0] == 202


def test_messages_are_handed_over_only_when_they_are_on_disk() -> None:
    client, repository = Recorder(), Durable()
    with service(client, SINGLY, repository=repository) as server, Peer(server) as first, Peer(server) as second:
        first.post()
        repository.settle(RepositoryUnavailableError("the disk is full"))
        assert first.receive()[0] == 503
        second.post()
        repository.settle()
        message_id = json.loads(second.receive()[1])["ID"]
    assert client.ids == [message_id]


@contextlib.contextmanager
def one_group(server: SmsServer, repository: Durable, *posts: tuple[str, str]) -> Iterator[list[Peer]]:
    """Peers that post these texts under these keys, in this order, while another message is being saved."""
    with contextlib.ExitStack() as undo:
        first, *peers = [undo.enter_context(Peer(server)) for _ in range(len(posts) + 1)]
        first.post_text("first")
        repository.wait_entered()
        for peer, (text, key) in zip(peers, posts):
            peer.post_text(text, f"Idempotency-Key: {key}")
            assert request(server, "GET", "/healthz")[0] == 200  # by now the server has read it
        repository.settle()
        assert first.receive()[0] == 202
        yield peers


def test_what_comes_during_a_durable_save_shares_the_next() -> None:
    client, repository = Recorder(), Durable()
    with service(client, repository=repository) as server:
        with one_group(server, repository, ("a", "1"), ("b", "2"), ("c", "3")) as peers:
            repository.settle()
            ids = [json.loads(peer.receive()[1])["ID"] for peer in peers]
    assert repository.texts == [["first"], ["a", "b", "c"]]
    [batch] = client.batches
    assert [(each.message_id, each.message) for each in batch[1:]] == list(zip(ids, "abc"))


def test_each_of_a_durable_group_gets_its_own_answer() -> None:
    client, repository = Recorder(), Durable()
    posts = [("a", "1"), ("other", "1"), ("", "2"), ("a", "1"), ("b", "2")]
    with service(client, repository=repository) as server, one_group(server, repository, *posts) as peers:
        repository.settle()
        answers = [peer.receive() for peer in peers]
        assert [status for status, _, _ in answers] == [202, 422, 400, 202, 202]
        assert answers[3][1] == answers[0][1]
    assert repository.texts == [["first"], ["a", "other", "a", "b"]]
    assert [each.message for each in client.batches[0]] == ["first", "a", "b"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(RepositoryUnavailableError("the disk is full"), 503), (OverloadedError("too much"), 503), (RuntimeError("x"), 500)],
)
def test_a_durable_save_that_fails_is_told_to_each_of_its_group(error: Exception, status: int) -> None:
    client, repository = Recorder(), Durable()
    with service(client, repository=repository) as server:
        with one_group(server, repository, ("a", "1"), ("b", "2"), ("c", "3")) as peers:
            repository.settle(error)
            for peer in peers:
                found, _, headers = peer.receive()
                assert (found, "Retry-After" in headers) == (status, status == 503)
            peers[0].post_text("later")
            repository.settle()
            assert peers[0].receive()[0] == 202
    assert [each.message for each in client.batches[0]] == ["first", "later"]


def test_the_next_save_begins_before_the_last_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Durable()
    with service(repository=repository) as server, Peer(server) as first, Peer(server) as second:
        first.post()
        repository.wait_entered()
        second.post()
        assert request(server, "GET", "/healthz")[0] == 200

        def accepted(handler: SmsHandler, result: str | Exception) -> None:
            repository.wait_entered()
            answer(handler, result)

        answer = SmsHandler.accepted
        with monkeypatch.context() as patch:
            patch.setattr(SmsHandler, "accepted", accepted)
            repository.settle()
            assert first.receive()[0] == 202
        repository.settle()
        assert second.receive()[0] == 202


@pytest.mark.parametrize("make", [InMemoryRepository, Durable])
def test_whatever_accepting_raises_everybody_is_answered(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(messages: object) -> None:
        raise RuntimeError("broken")

    repository = make()
    with service(repository=repository) as server, Peer(server) as peer:
        with monkeypatch.context() as patch:
            patch.setattr(server.proxy, "send_all", broken)
            peer.post()
            assert peer.receive()[0] == 500
        peer.post()
        if isinstance(repository, Durable):
            repository.settle()
        assert peer.receive()[0] == 202


def test_concurrent_repeats_of_a_durable_save_get_the_same_answer() -> None:
    client, repository = Recorder(), Durable()
    with service(client, repository=repository) as server, Peer(server) as peer:
        with one_group(server, repository, ("a", "order-1"), ("a", "order-1")) as peers:
            peer.post_text("a", "Idempotency-Key: order-1")
            for _ in range(2):
                repository.settle()
            found = [each.receive()[:2] for each in (*peers, peer)]
    assert found == [(202, found[0][1])] * 3
    assert client.ids[1:] == [json.loads(found[0][1])["ID"]]


def test_pipelined_messages_are_saved_and_answered_in_order() -> None:
    client, repository = Recorder(), Durable()
    with service(client, repository=repository) as server, Peer(server) as peer:
        for text in "abc":
            peer.post_text(text)
            repository.settle()
        ids = [json.loads(peer.receive()[1])["ID"] for _ in "abc"]
    assert repository.texts == [["a"], ["b"], ["c"]]
    assert (client.ids, [each.message for each in client.batches[0]]) == (ids, ["a", "b", "c"])


@pytest.mark.parametrize("path", ["/sms/x", "/healthz", "/metrics", "/openapi.json", "/nowhere"])
def test_whatever_is_pipelined_behind_a_message_waits_until_that_is_on_disk(path: str) -> None:
    repository = Durable()
    with service(repository=repository) as server, Peer(server) as peer:
        peer.post()
        peer.send("GET", path)
        repository.wait_entered()
        assert (request(server, "GET", "/healthz")[0], peer.answered) == (200, False)
        repository.settle()
        assert [peer.receive()[0], peer.receive()[0]] == [202, 404 if path == "/nowhere" else 200]


def test_a_shutdown_answers_those_whose_messages_are_being_saved_or_wait_for_that() -> None:
    client, repository, closing = Recorder(), Durable(), threading.Event()
    with service(client, repository=repository) as server, Peer(server) as saved, Peer(server) as waiting:
        saved.post()
        repository.wait_entered()
        waiting.post()
        assert request(server, "GET", "/healthz")[0] == 200
        server.shutdown(HANG)
        server.call_soon(closing.set)  # runs after the shutdown has begun
        assert closing.wait(HANG)
        for peer in (saved, waiting):
            repository.settle()
            status, _, headers = peer.receive()
            assert (status, headers["Connection"]) == (202, "close")
    assert len(client.ids) == 2


@pytest.mark.parametrize("broken_off", [0, 1], ids=["being saved", "waiting"])
def test_a_peer_that_breaks_off_hurts_nobody_and_its_message_is_accepted(broken_off: int) -> None:
    client, repository = Recorder(), Durable()
    with service(client, repository=repository) as server, contextlib.ExitStack() as undo:
        peers = [undo.enter_context(Peer(server)) for _ in range(4)]
        for peer, text in zip(peers, "abcd"):
            peer.post_text(text)
            assert request(server, "GET", "/healthz")[0] == 200
        peers.pop(broken_off).reset()
        assert request(server, "GET", "/healthz")[0] == 200  # by now the server has noticed
        for _ in range(2):
            repository.settle()
        assert [peer.receive()[0] for peer in peers] == [202] * 3
    assert (repository.texts, [each.message for each in client.batches[0]]) == ([["a"], ["b", "c", "d"]], list("abcd"))


# Many at once, in memory


def test_many_messages_pipelined_in_one_write_get_different_ids_in_their_order() -> None:
    client = Recorder()
    texts = [f"text {number}" for number in range(400)]  # more than is read, and more than is answered, at a time
    bodies = [json.dumps(GOOD | {"Content": text}) for text in texts]
    with service(client, SmsProxyConfig(batch_size=400, max_delay=None, senders=1)) as server, Peer(server) as peer:
        posts = [f"POST /sms HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n{body}" for body in bodies]
        peer.half("".join(posts).encode())
        answers = [peer.receive() for _ in texts]
        assert {status for status, _, _ in answers} == {202}
        ids = [json.loads(body)["ID"] for _, body, _ in answers]
    assert len(set(ids)) == 400
    assert [(each.message_id, each.message) for each in client.batches[0]] == list(zip(ids, texts))


def test_what_comes_in_one_turn_is_accepted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, opened, groups = threading.Event(), threading.Event(), list[list[str]]()

    def hold() -> None:
        entered.set()
        assert opened.wait(HANG)

    def send_all(messages: Sequence[tuple[str, str, str | None]]) -> list[str | Exception]:
        groups.append(sorted(text for _, text, _ in messages))
        return SmsProxy.send_all(server.proxy, messages)

    with contextlib.ExitStack() as undo:
        server = undo.enter_context(service())
        peers = [undo.enter_context(Peer(server)) for _ in range(3)]
        for peer in peers:
            peer.send("GET", "/nowhere")
            assert peer.receive()[0] == 404  # it is connected
        monkeypatch.setattr(server.proxy, "send_all", send_all)
        server.call_soon(hold)
        assert entered.wait(HANG)
        for peer, text in zip(peers, ("a", "", "b")):
            peer.post_text(text)
        opened.set()
        assert [peer.receive()[0] for peer in peers] == [202, 400, 202]
    assert groups == [["", "a", "b"]]


# Groups that cannot be saved


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit("no")], ids=["error", "exit"])
def test_a_durable_save_that_raises_anything_is_a_500_and_the_next_one_works(error: BaseException) -> None:
    repository = Durable()
    with service(repository=repository) as server, Peer(server) as peer:
        for order, status in ((error, 500), (None, 202)):
            peer.post()
            repository.settle(order)
            assert peer.receive()[0] == status


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_thread_to_save_in_it_is_a_500_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Durable()
    with service(repository=repository) as server, Peer(server) as peer:
        with monkeypatch.context() as patch:
            patch.setattr(server, "submit", no_thread)
            peer.post()
            assert peer.receive()[0] == 500
        peer.post()
        repository.settle()
        assert peer.receive()[0] == 202


def test_a_group_that_fails_does_not_make_its_log_longer_for_each_of_it(caplog: pytest.LogCaptureFixture) -> None:
    repository, error = Durable(), RuntimeError("no")
    with service(repository=repository) as server:
        with one_group(server, repository, *((str(number), str(number)) for number in range(10))) as peers:
            repository.settle(error)
            assert [peer.receive()[0] for peer in peers] == [500] * 10
    assert len(traceback.extract_tb(error.__traceback__)) < 10  # each raise of it would add to it


def test_a_message_that_is_not_valid_is_refused_while_another_is_being_saved_and_costs_no_save() -> None:
    repository = Durable()
    with service(repository=repository) as server, Peer(server) as peer:
        peer.post()
        repository.wait_entered()
        assert request(server, "POST", "/sms", GOOD | {"PhoneNumber": "+1"})[0] == 400
        repository.settle()
        assert peer.receive()[0] == 202
    assert len(repository.groups) == 1


# Health


def health(server: SmsServer) -> tuple[int, Any]:
    status, doc, headers = request(server, "GET", "/healthz")
    assert headers["Content-Type"] == "application/json"
    return status, doc


def unavailable(*reasons: str) -> tuple[int, Any]:
    return 503, {"Status": "UNAVAILABLE", "Reasons": list(reasons)}


@pytest.fixture(name="others")
def threads_of_other_tests() -> set[threading.Thread]:
    return set(threading.enumerate())


def join(name: str, others: set[threading.Thread]) -> None:
    """Waits for the end of this test's threads of that name, if they are still there."""
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith(name):
            thread.join(HANG)
            assert not thread.is_alive()


def test_a_healthy_service_says_ok() -> None:
    with service() as server:
        assert health(server) == (200, {"Status": "OK"})
        request(server, "POST", "/sms", GOOD)
        assert health(server) == (200, {"Status": "OK"})


def test_a_service_that_is_stopped_is_unhealthy() -> None:
    with service() as server:
        server.proxy.stop(HANG)
        assert health(server) == unavailable("shutting down")


def test_a_server_that_is_shutting_down_is_unhealthy() -> None:
    entered, opened, closing = threading.Event(), threading.Event(), threading.Event()

    class Checked(InMemoryRepository):
        def check(self) -> None:
            entered.set()
            assert opened.wait(HANG)

    with service(repository=Checked()) as server, Peer(server) as peer:
        peer.send("GET", "/healthz")
        assert entered.wait(HANG)
        server.shutdown(HANG)
        server.call_soon(closing.set)  # runs after the shutdown has begun
        assert closing.wait(HANG)
        opened.set()
        status, body, _ = peer.receive()
        assert (status, json.loads(body)) == unavailable("shutting down")


def test_a_full_queue_is_unhealthy() -> None:
    with service(Gate(), SmsProxyConfig(batch_size=1, max_pending=1)) as server:
        request(server, "POST", "/sms", GOOD)
        assert health(server) == unavailable("queue full")


@pytest.mark.parametrize(("age", "expected"), [(70.0, "sick"), (50.0, "well")])
def test_an_old_pending_message_is_unhealthy(age: float, expected: str) -> None:
    client = Gate()
    outbox = [(time.time() - age, Message(NUMBER, TEXT, "old"))]
    with service(client, SmsProxyConfig(max_delay=5.0), repository=Durable(outbox)) as server:
        client.wait_entered()
        sick = unavailable("oldest pending message older than 65 s")
        assert health(server) == (sick if expected == "sick" else (200, {"Status": "OK"}))


def test_a_message_that_may_linger_for_ever_is_healthy() -> None:
    outbox = [(time.time() - 1e6, Message(NUMBER, TEXT, "old"))]
    with service(repository=Durable(outbox)) as server:
        assert health(server) == (200, {"Status": "OK"})


def test_a_dead_status_updater_is_unhealthy(others: set[threading.Thread]) -> None:
    client = Recorder()
    with service(client) as server:
        client.subscribers[0].put(None)  # the provider says that no more will come
        join("smsproxy-updater", others)
        assert health(server) == unavailable("the status updater is dead")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_sender_is_unhealthy(others: set[threading.Thread]) -> None:
    class Deadly(InMemoryRepository):
        def update(self, message_id: str, status: MessageStatus) -> None:
            raise SystemExit

    proxy = SmsProxy(Scripted(RejectedError("no")), SINGLY, repository=Deadly())
    proxy.start()
    with serving(proxy) as server:
        request(server, "POST", "/sms", GOOD)
        join("smsproxy-sender", others)
        assert health(server) == unavailable("a sender thread is dead")
    assert proxy.stop(0.0) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_statistics_thread_is_unhealthy(others: set[threading.Thread]) -> None:
    class Deadly:
        def send(self, result: object) -> None:
            raise SystemExit

    client = Recorder()
    with service(client, SINGLY, statistics=Deadly()) as server:
        request(server, "POST", "/sms", GOOD)
        client.wait_for(lambda batches: len(batches) == 1)
        join("smsproxy-statistics", others)
        assert health(server) == unavailable("the statistics thread is dead")


def test_a_database_that_cannot_be_written_is_unhealthy() -> None:
    with service(repository=Failing(RepositoryUnavailableError("the disk is full"))) as server:
        assert health(server) == unavailable("the disk is full")


def test_every_reason_is_told() -> None:
    repository = Failing(RepositoryUnavailableError("the disk is full"))
    with service(repository=repository) as server:
        server.proxy.stop(HANG)
        assert health(server) == unavailable("shutting down", "the disk is full")


# Metrics


NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
VALUE = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|Inf)|NaN")
Labels = tuple[tuple[str, str], ...]


class Exposition:
    """Prometheus text format 0.0.4, read strictly: every family is described, whole, and in one piece."""

    def __init__(self, text: str) -> None:
        assert text.endswith("\n") and "\r" not in text
        self.kinds: dict[str, str] = {}
        self.samples: dict[str, dict[Labels, float]] = {}
        self._helped: list[str] = []
        for line in text[:-1].split("\n"):
            self._comment(line) if line.startswith("#") else self._sample(line)
        assert list(self.kinds) == self._helped
        for name in [name for name, kind in self.kinds.items() if kind == "histogram"]:
            self._check_histogram(name)

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name][tuple(labels.items())]

    def _comment(self, line: str) -> None:
        _, what, name, rest = line.split(" ", 3)
        assert NAME.fullmatch(name) and rest.strip() == rest != ""
        if what == "HELP":
            assert name not in self._helped and re.sub(r"\\[\\n]", "", rest).find("\\") < 0
            self._helped.append(name)
        else:
            assert what == "TYPE" and rest in ("counter", "gauge", "histogram")
            assert (self._helped[-1], name in self.kinds) == (name, False)  # right after its HELP, once
            assert (rest == "counter") == name.endswith("_total")
            self.kinds[name] = rest

    def _sample(self, line: str) -> None:
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        name, text, value = match.groups()
        family = self._helped[-1]
        kind = self.kinds[family]
        assert name in ([f"{family}_{end}" for end in ("bucket", "sum", "count")] if kind == "histogram" else [family])
        labels = tuple(LABEL.findall(text or ""))
        assert "".join(found.group() for found in LABEL.finditer(text or "")) == (text or ""), line
        assert VALUE.fullmatch(value), line
        number = float(value)
        assert kind == "gauge" or number >= 0, line
        assert labels not in self.samples.setdefault(name, {}), line
        self.samples[name][labels] = number

    def _check_histogram(self, name: str) -> None:
        buckets = self.samples[f"{name}_bucket"]
        bounds = [float(dict(labels)["le"]) for labels in buckets]
        assert (bounds, bounds[-1]) == (sorted(set(bounds)), float("inf"))
        assert list(buckets) == [(("le", dict(labels)["le"]),) for labels in buckets]
        counts = list(buckets.values())
        assert counts == sorted(counts)
        assert self.samples[f"{name}_count"] == {(): counts[-1]}
        assert list(self.samples[f"{name}_sum"]) == [()]


def metrics(server: SmsServer) -> Exposition:
    status, body, headers = request(server, "GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return Exposition(body.decode())


def test_the_figures_of_a_fresh_service_are_there_and_zero() -> None:
    with service() as server:
        found = metrics(server)
        assert {name for name, kind in found.kinds.items() if kind == "histogram"} == {
            "smsproxy_batch_messages", "smsproxy_provider_request_duration_seconds",
        }  # fmt: skip
        assert {value for family in found.samples.values() for value in family.values()} == {0}


def test_the_figures_after_a_known_run_are_right() -> None:
    client = Scripted(FastSmsingError("once"), None, RejectedError("never"), None)
    with service(client, PAIRS) as server:
        ids = [request(server, "POST", "/sms", GOOD)[1]["ID"] for _ in range(5)]
        request(server, "POST", "/sms", {})
        request(server, "GET", "/sms/x")
        client.wait_for(lambda batches: len(batches) == 1)
        client.report({ids[0]: "CONFIRMED", "nobody": "DELIVERED"})
        client.report({ids[0]: "DELIVERED", ids[1]: "LOST"})
        client.report({ids[0]: "CONFIRMED"})
        server.proxy.stop(HANG)  # the fifth message leaves alone, all reports are applied
        found = metrics(server)
        assert found("smsproxy_messages_accepted_total") == 5
        assert found("smsproxy_messages_handed_over_total") == 3
        assert found.samples["smsproxy_messages_given_up_total"] == {(("reason", "rejected"),): 2}
        assert found("smsproxy_messages_final_total", status="DELIVERED") == 1
        assert found("smsproxy_messages_final_total", status="FAILED") == 2
        assert found("smsproxy_batches_total", result="handed_over") == 2
        assert found("smsproxy_batches_total", result="given_up") == 1
        assert found("smsproxy_batch_messages_bucket", le="1") == 1
        assert found("smsproxy_batch_messages_bucket", le="2") == 3
        assert (found("smsproxy_batch_messages_sum"), found("smsproxy_batch_messages_count")) == (5, 3)
        assert found("smsproxy_provider_requests_total", result="ok") == 2
        assert found("smsproxy_provider_requests_total", result="error") == 1
        assert found("smsproxy_provider_requests_total", result="rejected") == 1
        assert found("smsproxy_provider_request_duration_seconds_count") == 4
        assert found("smsproxy_requests_saved_total") == 1  # 3 messages handed over in 2 requests
        assert found("smsproxy_pending_messages") == 0
        assert found("smsproxy_oldest_pending_message_age_seconds") == 0
        assert found("smsproxy_provider_requests_in_flight") == 0
        assert found.samples["smsproxy_status_updates_total"] == {
            (("result", "applied"),): 2, (("result", "refused"),): 1, (("result", "unknown_message"),): 1,
            (("result", "unknown_status"),): 1,
        }  # fmt: skip
        assert found.samples["smsproxy_http_responses_total"] == {
            (("code", "200"),): 1, (("code", "202"),): 5, (("code", "400"),): 1,
        }  # fmt: skip


def test_what_is_pending_and_in_flight_is_shown() -> None:
    client = Gate()
    with service(client, SINGLY) as server:
        for _ in range(3):
            request(server, "POST", "/sms", GOOD)
        client.wait_entered()
        found = metrics(server)
        assert found("smsproxy_pending_messages") == 3
        assert found("smsproxy_provider_requests_in_flight") == 1
        assert found("smsproxy_oldest_pending_message_age_seconds") > 0


def test_messages_too_old_to_be_sent_are_counted_as_expired() -> None:
    outbox = [(time.time() - 100, Message(NUMBER, TEXT, "old"))]
    with service(config=SmsProxyConfig(batch_size=1, max_age=10.0), repository=Durable(outbox)) as server:
        server.proxy.stop(HANG)
        assert metrics(server)("smsproxy_messages_given_up_total", reason="expired") == 1


def test_messages_of_used_up_attempts_are_counted_as_such() -> None:
    with service(Scripted(OSError("a"), OSError("b")), PAIRS) as server:
        request(server, "POST", "/sms", GOOD)
        server.proxy.stop(HANG)
        assert metrics(server)("smsproxy_messages_given_up_total", reason="attempts") == 1


def test_large_figures_are_exact() -> None:
    with service() as server:
        server.proxy.metrics.add("smsproxy_batch_messages", 10, 1_234_567)
        server.proxy.metrics.add("smsproxy_batch_messages_sum", "", 12_345_678)
        server.proxy.metrics.add("smsproxy_messages_handed_over_total", "", 123_456_789)
        found = metrics(server)
        assert found("smsproxy_batch_messages_bucket", le="10") == 1_234_567
        assert found("smsproxy_batch_messages_count") == 1_234_567
        assert found("smsproxy_batch_messages_sum") == 12_345_678
        assert found("smsproxy_messages_handed_over_total") == 123_456_789


# The description


class Walk:
    """The document that a server serves, and what it says of an answer."""

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

    def check_answer(self, operation: Any, status: str, answer: tuple[int, bytes, http.client.HTTPMessage]) -> None:
        """Fails unless the answer is what is said of this status."""
        code, body, headers = answer
        known = operation["responses"]
        assert (str(code) if str(code) in known else "default") == status
        said = self.resolve(known[status])
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
        schema = self.resolve(schema)
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
        for keyword, rule in schema.items():
            assert rules[keyword](rule), f"{value!r} is not as {keyword}: {rule!r} says"
        return True


@pytest.fixture
def walk() -> Walk:
    with service() as server:
        return Walk(request(server, "GET", "/openapi.json")[1])


def exchange(
    server: SmsServer, method: str, path: str, *lines: str, body: bytes = b"", version: str = "HTTP/1.1"
) -> tuple[int, bytes, http.client.HTTPMessage]:
    with Peer(server) as peer:
        peer.send(method, path, *([f"Content-Length: {len(body)}"] if body else []), *lines, body=body, version=version)
        return peer.receive(method)


def provoke(
    status: str, path: str, method: str, example: bytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """The answer of a service in the state, and to the request, that brings this status about."""
    concrete, body = path.replace("{id}", "some-id"), example if method == "POST" else b""
    with contextlib.ExitStack() as stack:

        def run(*args: Any, **options: Any) -> SmsServer:
            return stack.enter_context(service(*args, **options))

        if status in ("200", "202"):
            return exchange(run(), method, concrete, body=body)
        if status == "400":
            return exchange(run(), method, concrete, "Bad Field: x", body=body)
        if status == "401":
            return exchange(run(keys=KEYS), method, concrete, body=body)
        if status == "404":
            return exchange(run(), method, path.replace("{id}", "a/b"), body=body)
        if status == "405":
            return exchange(run(), "DELETE", concrete)
        if status == "408":
            with Peer(run(limits=Limits(read_timeout=0.01))) as peer:
                peer.half(f"{method} {concrete} HTTP/1.1\r\n".encode())
                return peer.receive()
        if status == "411":
            return exchange(run(), method, concrete)
        if status == "413":
            return exchange(run(), method, concrete, "Content-Length: 65537")
        if status == "422":
            server = run()
            exchange(server, method, concrete, "Idempotency-Key: k", body=json.dumps(GOOD | {"Content": "x"}).encode())
            return exchange(server, method, concrete, "Idempotency-Key: k", body=body)
        if status == "431":
            return exchange(run(), method, concrete, *["X: y"] * 101, body=body)
        if status == "500":
            server = run()
            monkeypatch.setattr(server, "proxy", None)
            monkeypatch.setattr(restapi, "OPENAPI", Path("/nowhere"))
            return exchange(server, method, concrete, body=body)
        if (status, concrete) == ("503", "/healthz"):
            return exchange(run(Gate(), repository=Failing(RepositoryUnavailableError("no"))), method, concrete)
        if (status, method) == ("503", "POST"):
            server = run(Gate(), SmsProxyConfig(batch_size=1, max_pending=1))
            exchange(server, method, concrete, body=body)
            return exchange(server, method, concrete, body=body)
        if status == "503":
            return exchange(run(repository=Failing(RepositoryUnavailableError("no"))), method, concrete)
        if status == "default":
            return exchange(run(), method, concrete, body=body, version="HTTP/2.0")
    raise AssertionError(f"nothing is known that provokes a {status} of {method} {path}")


def test_every_answer_that_is_described_can_be_had_and_is_as_described(
    walk: Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    for path, method, operation in walk.operations():
        example = b""
        if "requestBody" in operation:
            content = walk.resolve(operation["requestBody"])["content"]["application/json"]
            walk.check(content["schema"], content["example"])
            example = json.dumps(content["example"]).encode()
        for status in operation["responses"]:
            with monkeypatch.context() as patch:
                answer = provoke(status, path, method, example, patch)
            try:
                walk.check_answer(operation, status, answer)
            except AssertionError as error:
                raise AssertionError(f"{method} {path} {status} got {answer[:2]}: {error}") from error
            seen.add(status)
    assert seen >= {"200", "202", "400", "401", "404", "405", "422", "500", "503", "default"}


def test_every_path_and_method_is_described(walk: Walk) -> None:
    described = {(path, method) for path, method, _ in walk.operations()}
    with service() as server:
        for path in {path for path, _ in described}:
            allow = request(server, "OPTIONS", path.replace("{id}", "some-id"))[2]["Allow"].split(", ")
            assert {method for at, method in described if at == path} == set(allow) - {"OPTIONS"}
    assert {path.replace("{id}", "some-id") for path, _ in described} == set(PATHS)


def test_what_is_described_as_guarded_asks_for_a_key_and_nothing_else_does(walk: Walk) -> None:
    guarded = {(path, method) for path, method, operation in walk.operations() if operation.get("security")}
    with service(keys=KEYS) as server:
        for path, method, _ in walk.operations():
            status = exchange(server, method, path.replace("{id}", "x"), body=b"{}" if method == "POST" else b"")[0]
            assert (path, method, status == 401) == (path, method, (path, method) in guarded)
    assert [scheme["scheme"] for scheme in walk.document["components"]["securitySchemes"].values()] == ["bearer"]


def test_every_example_is_as_its_schema_says(walk: Walk) -> None:
    components = walk.document["components"]
    described = [*components["requestBodies"].values(), *components["responses"].values()]
    described += [walk.resolve(each) for _, _, operation in walk.operations() for each in operation["responses"].values()]
    contents = [content for each in described for content in each.get("content", {}).values() if "example" in content]
    assert len(contents) > 15
    for content in contents:
        walk.check(content["schema"], content["example"])
    for each in (*components["headers"].values(), *components["parameters"].values()):
        walk.check(each["schema"], each["example"])


def test_every_part_of_the_description_is_used(walk: Walk) -> None:
    text = json.dumps(walk.document)
    parts = [f"#/components/{kind}/{name}" for kind, found in walk.document["components"].items() for name in found]
    assert [part for part in parts if "securitySchemes" not in part and f'"{part}"' not in text] == []


def test_the_description_is_of_this_version(walk: Walk) -> None:
    assert (walk.document["openapi"], walk.document["info"]["version"]) == ("3.1.0", main.__version__)


# Private logs


class Gossip(Recorder):
    """A provider whose errors tell every number and text of the batch."""

    def __init__(self, tell: Callable[[Message], str]) -> None:
        super().__init__()
        self._tell = tell
        self._lock = threading.Lock()
        self._requests = 0

    def send(self, messages: Sequence[Message]) -> None:
        with self._lock:
            self._requests += 1
            turn = self._requests % 4
        gossip = "; ".join(self._tell(each) for each in messages)
        if turn == 1:
            try:
                raise ValueError(gossip)
            except ValueError as cause:
                raise RejectedError(gossip) from cause
        if turn in (2, 3):
            raise FastSmsingError(gossip) if turn == 2 else RuntimeError(gossip, gossip)
        super().send(messages)


def plainly(message: Message) -> str:
    return f"cannot send {message.message} to {message.phone_number}"


def test_a_busy_run_logs_no_number_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = Gossip(plainly)
    config = SmsProxyConfig(batch_size=5, max_delay=None, senders=3, max_attempts=2, backoff_base=0.0)
    numbers = [f"48600{index:06d}" for index in range(200)]
    texts = [f"Dear customer №{index}, your PIN is {index * 7919 % 10007:05d}" for index in range(200)]
    bad = [
        *({"PhoneNumber": f"+{numbers[0]}", "Content": texts[0]}, {"PhoneNumber": numbers[1], "Text": texts[1]}),
        *({"PhoneNumber": int(numbers[2]), "Content": texts[2]}, {"PhoneNumber": numbers[3], "Content": [texts[3]]}),
        *({"PhoneNumber": numbers[4], "Content": f"{texts[4]}\ud800"}, {numbers[5]: texts[5], texts[5]: numbers[5]}),
    ]
    raw_bad = [f'{{"PhoneNumber": "{numbers[6]}", "Content": "{texts[6]}'.encode(), f"{numbers[7]} {texts[7]}".encode()]
    raw_bad.append(json.dumps({texts[8]: numbers[8]})[:-1].encode() + f', "{texts[8]}": 1}}'.encode())
    statuses: Counter[int] = Counter()
    with service(client, config) as server:
        ids = []
        for index, (number, text) in enumerate(zip(numbers, texts)):
            headers = {"Idempotency-Key": f"key-{index}"} if index % 3 else {}
            status, doc, _ = request(server, "POST", "/sms", {"PhoneNumber": number, "Content": text}, headers)
            statuses[status] += 1
            ids.append(doc["ID"])
        again = {"PhoneNumber": numbers[1], "Content": "another text"}
        statuses[request(server, "POST", "/sms", again, {"Idempotency-Key": "key-1"})[0]] += 1
        for body in (*bad, *raw_bad):
            statuses[request(server, "POST", "/sms", body)[0]] += 1
        client.report({"nobody": "DELIVERED", ids[0]: "DELIVERED", ids[1]: "NONSENSE", ids[2]: None})
        client.report({ids[0]: "CONFIRMED", ids[3]: 5})
        server.proxy.stop(HANG)
    assert statuses == {202: 200, 422: 1, 400: len(bad) + len(raw_bad)}
    for expected in ("handed over", "gave up", "attempt 1 of 2 failed", "not applied", "POST /sms 202"):
        assert expected in caplog.text
    assert [secret for secret in (*numbers, *texts, "another text") if secret in caplog.text] == []


def test_a_repository_that_fails_logs_nothing_of_the_message_either(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with service(repository=Failing(RuntimeError("broken"))) as server:
        assert request(server, "POST", "/sms", GOOD)[0] == 500
    assert "broken" in caplog.text
    assert [secret for secret in (NUMBER, TEXT) if secret in caplog.text] == []


def logged_of(messages: Sequence[tuple[str, str]], tell: Callable[[Message], str], log: pytest.LogCaptureFixture) -> str:
    """What is logged when a provider fails with an error that tells one batch of these messages."""
    log.set_level(logging.DEBUG)
    config = SmsProxyConfig(batch_size=len(messages), max_delay=None, max_attempts=1)
    with service(Gossip(tell), config) as server:
        for number, text in messages:
            assert request(server, "POST", "/sms", {"PhoneNumber": number, "Content": text})[0] == 202
        server.proxy.stop(HANG)
    assert "gave up" in log.text
    return str(log.text)


def test_a_text_that_begins_like_another_is_not_logged_in_part(caplog: pytest.LogCaptureFixture) -> None:
    log = logged_of([(NUMBER, "Hello"), ("48600700800", "Hello Bob, your PIN is 4711")], plainly, caplog)
    assert [secret for secret in ("4711", "Bob") if secret in log] == []


def test_a_number_that_begins_like_another_is_not_logged_in_part(caplog: pytest.LogCaptureFixture) -> None:
    assert "700800" not in logged_of([("48600", "Hello"), ("48600700800", "Hello")], plainly, caplog)


def test_an_error_of_the_provider_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with service(Scripted(RejectedError("no\r\n2026-01-01 ERROR forged")), SINGLY) as server:
        request(server, "POST", "/sms", GOOD)
        server.proxy.stop(HANG)
    found = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert [line for line in found if len(line.splitlines()) > 1] == []
    assert found != []


@pytest.mark.parametrize("quote", [repr, json.dumps], ids=["repr", "json"])
def test_a_text_that_the_provider_quotes_is_not_logged(quote: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    text = 'Dear "Bob",\nyour PIN is 4711 – don\'t tell'
    log = logged_of([(NUMBER, text)], lambda message: f"bad message {quote(message.message)}", caplog)
    assert "4711" not in log


def test_a_status_that_tells_a_number_or_a_text_is_not_logged_in_full(caplog: pytest.LogCaptureFixture) -> None:
    client = Recorder()
    with service(client, SINGLY) as server:
        message_id = request(server, "POST", "/sms", GOOD)[1]["ID"]
        client.wait_for(lambda batches: len(batches) == 1)
        client.report({message_id: f"cannot send {TEXT} to {NUMBER}"})
        server.proxy.stop(HANG)
    assert message_id in caplog.text
    assert [secret for secret in (NUMBER, TEXT) if secret in caplog.text] == []


def test_a_number_asked_for_in_place_of_an_id_is_not_logged_in_full(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with service() as server:
        assert request(server, "GET", f"/sms/{NUMBER}")[:2] == (200, {"Status": "NOT_FOUND"})
    assert "GET" in caplog.text
    assert NUMBER not in caplog.text

"""The HTTP front by itself: `Parser` on bytes, and a small server with an echo behind real sockets.

The clock of the server stands still until a test moves it, so no test waits for a deadline.
"""
from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import queue
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import http_front
from helpers import HANG, Clock, together
from http_front import FrontHandler, FrontServer, HttpError, Limits, Parser, State

LONG_TIME = 3600.0  # seconds, beyond every limit
LARGE = b"x" * 1_000_000  # far more than the sockets of these tests buffer
SMALL = 8192  # bytes of a socket's buffer
MIDNIGHT = 1_700_006_400.0  # of 2023-11-15, in the seconds of time.time()
STATUS_LINE = re.compile(r"HTTP/1\.1 ([0-9]{3}) [A-Z][A-Za-z -]*")


def req(line: str = "GET /echo HTTP/1.1", *headers: str, host: str | None = "Host: a", body: bytes = b"") -> bytes:
    """A request as bytes; strings are latin-1, so that any byte can be written."""
    lines = [line, *([host] if host is not None else []), *headers]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + body


def get(*headers: str, path: str = "/echo") -> bytes:
    return req(f"GET {path} HTTP/1.1", *headers)


def post(*headers: str, body: bytes = b"12345", path: str = "/echo") -> bytes:
    return req(f"POST {path} HTTP/1.1", *headers, body=body)


def whole(body: bytes = b"12345", *headers: str, path: str = "/echo") -> bytes:
    return post(f"Content-Length: {len(body)}", *headers, body=body, path=path)


PROBE = get(path="/")
OLD = "GET /echo HTTP/1.0"
PARSED_PROBE = ("GET", "/", b"", False, False)


# Bytes to requests


def outcomes(pieces: Iterable[bytes], limits: Limits = Limits()) -> list[Any]:
    """What a parser makes of the pieces: each request as a tuple, and the status of the refusal at the end."""
    parser, found = Parser(limits), []
    for piece in pieces:
        parser.buffer += piece
        try:
            while (request := parser.next()) is not None:
                found.append((request.method, request.path, request.body, request.old, request.last))
        except HttpError as error:
            assert error.close  # where the next request begins is not known
            return [*found, error.status]
    return found


def ok(
    name: str, data: bytes, method: str = "GET", path: str = "/echo", body: bytes = b"",
    *, old: bool = False, last: bool = False,
) -> Any:  # fmt: skip
    """A request that is taken, and what is read in it."""
    return pytest.param(data, (method, path, body, old, last), id=name)


def no(name: str, data: bytes, status: int = 400) -> Any:
    """A request that is refused."""
    return pytest.param(data, status, id=name)


BAD_LINES = {  # RFC 9112, 3
    "space before the method": " GET /echo HTTP/1.1", "space after the version": "GET /echo HTTP/1.1 ",
    "two spaces before the target": "GET  /echo HTTP/1.1", "two spaces before the version": "GET /echo  HTTP/1.1",
    "tab for a space": "GET\t/echo HTTP/1.1", "vertical tab for a space": "GET\x0b/echo HTTP/1.1",
    "form feed for a space": "GET /echo\x0cHTTP/1.1", "no-break space for a space": "GET\xa0/echo HTTP/1.1",
    "next line for a space": "GET /echo\x85HTTP/1.1", "file separator for a space": "GET\x1c/echo HTTP/1.1",
    "space in the target": "GET /ec ho HTTP/1.1", "NUL in the target": "GET /ec\0ho HTTP/1.1",
    "control character in the target": "GET /ec\x01ho HTTP/1.1", "DEL in the target": "GET /ec\x7fho HTTP/1.1",
    "latin-1 in the target": "GET /\xe9 HTTP/1.1", "latin-1 in the method": "G\xcbT /echo HTTP/1.1",
    "bare CR in the request line": "GET /echo\rHTTP/1.1", "only a method": "GET", "no method": "/echo HTTP/1.1",
    "method with a separator": "GE(T /echo HTTP/1.1", "no version": "GET /echo", "another protocol": "GET /echo ICY/1.1",
    "version without a minor": "GET /echo HTTP/1", "version of two digits": "GET /echo HTTP/1.10",
    "version with a leading zero": "GET /echo HTTP/01.1", "version with a sign": "GET /echo HTTP/+1.1",
    "version in superscript": "GET /echo HTTP/1.\xb2", "lower-case version": "GET /echo http/1.1",
}  # fmt: skip
REQUEST_LINES = [  # RFC 9112, 2.2, 2.3, 3
    ok("plain GET", req()),
    ok("one CRLF before the request", b"\r\n" + req()),
    ok("many CRLFs before the request", b"\r\n" * 500 + req()),
    no("bare LF before the request", b"\n" + req()),
    no("CR CR LF before the request", b"\r\r\n" + req()),
    *[no(name, req(line)) for name, line in BAD_LINES.items()],
    no("bare CR ends the request line", b"GET /echo HTTP/1.1\rHost: a\r\n\r\n"),
    no("bare LF ends the request line", b"GET /echo HTTP/1.1\nHost: a\r\n\r\n"),
    no("bare LF ends every line", b"GET /echo HTTP/1.1\nHost: a\n\n"),
    no("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    ok("unknown method", req("BREW /echo HTTP/1.1"), "BREW"),
    ok("lower-case method", req("get /echo HTTP/1.1"), "get"),
    ok("method of every token character", req("!#$%&'*+-.^_`|~09azAZ /echo HTTP/1.1"), "!#$%&'*+-.^_`|~09azAZ"),
    ok("HTTP/1.0", req(OLD), old=True, last=True),
    ok("HTTP/1.0 without Host", req(OLD, host=None), old=True, last=True),
    ok("HTTP/1.2 is served as HTTP/1.1", req("GET /echo HTTP/1.2")),
    no("HTTP/1.2 without Host", req("GET /echo HTTP/1.2", host=None)),
    *[no(f"HTTP/{version}", req(f"GET /echo HTTP/{version}"), 505) for version in ("0.9", "2.0", "3.1")],
    no("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
]
TARGETS = [  # RFC 9112, 3.2
    ok("query", get(path="/echo?a=b&c=%20")),
    ok("two question marks", get(path="/echo?a?b")),
    ok("every visible character", get(path="/!\"#$%&'()*+,-.:;<=>@[]^_`{|}~"), path="/!\"#$%&'()*+,-.:;<=>@[]^_`{|}~"),
    ok("asterisk-form", req("OPTIONS * HTTP/1.1"), "OPTIONS", "*"),
    no("asterisk-form for GET", get(path="*")),
    ok("absolute-form", get(path="http://a/echo?x=1")),
    ok("absolute-form in capitals", get(path="HTTP://A/echo")),
    ok("absolute-form of https with a port", get(path="https://[::1]:8443/echo")),
    ok("absolute-form without a path", get(path="http://a:80"), path="/"),
    ok("absolute-form with a query and no path", get(path="http://a?x=/echo"), path="/"),
    ok("absolute-form with a fragment and no path", get(path="http://a#x"), path="/#x"),
    no("absolute-form without an authority", get(path="http:///echo")),
    no("absolute-form of another scheme", get(path="ftp://a/echo")),
    no("absolute-form without Host", req("GET http://a/echo HTTP/1.1", host=None)),
    no("authority-form for GET", get(path="a:80")),
    ok("authority-form for CONNECT", req("CONNECT a:80 HTTP/1.1"), "CONNECT", "a:80"),
    no("relative target", get(path="echo")),
    no("OPTIONS of a relative target", req("OPTIONS echo HTTP/1.1")),
]
BAD_HEADERS = {  # RFC 9112, 2.2 and 5; RFC 9110, 5.5 and 5.6.2
    "space before the colon": "X : a", "tab before the colon": "X\t: a", "obs-fold by space": "X: a\r\n b",
    "obs-fold by tab": "X: a\r\n\tb", "line of blanks only": "  ", "line without a colon": "nonsense", "empty name": ": a",
    "space in a name": "X Y: a", "separator in a name": "X(Y): a", "latin-1 in a name": "X\xe9: a",
    "NUL in a name": "X\0: a", "NUL in a value": "X: a\0b", "bell in a value": "X: a\x07b", "DEL in a value": "X: a\x7fb",
    "vertical tab in a value": "X: a\x0bb", "bare CR in a value": "X: a\rb", "bare CR before the end of a line": "X: a\r",
    "bare CR hides a header": "X: a\rContent-Length: 5", "bare LF hides a header": "X: a\nContent-Length: 5",
}  # fmt: skip
HEADERS = [
    ok("no space after the colon", req(host="Host:a")),
    ok("blanks around a value", req(host="Host: \t a\t ")),
    ok("empty value", get("X:")),
    ok("obs-text, tab and colons in a value", get("X: \xff\x80\ta:b::c")),
    ok("every token character in a name", get("!#$%&'*+-.^_`|~09azAZ: a")),
    *[no(name, get(line)) for name, line in BAD_HEADERS.items()],
    no("space before the colon of Host", req(host="Host : a")),
    no("space before the first header", req(host=" Host: a")),
    no("bare LF ends the last header", b"GET /echo HTTP/1.1\r\nHost: a\n\r\n"),
    no("bare LF ends the head", b"GET /echo HTTP/1.1\r\nHost: a\r\n\n"),
]
BAD_HOSTS = {  # RFC 9112, 3.2
    "no Host": "X: a", "two Hosts": "Host: a\r\nHost: b", "two equal Hosts": "Host: a\r\nHost: a",
    "two Hosts in other letters": "Host: a\r\nhOST: b", "second Host empty": "Host: a\r\nHost:",
    "two Hosts in one line": "Host: a, b", "space in Host": "Host: a b", "slash in Host": "Host: a/b",
    "userinfo in Host": "Host: me@a", "latin-1 in Host": "Host: \xe9",
}  # fmt: skip
HOSTS = [
    *[no(name, req(host=line)) for name, line in BAD_HOSTS.items()],
    no("no header at all", req(host=None)),
    no("two Hosts on HTTP/1.0", req(OLD, "Host: b")),
    ok("empty Host", req(host="Host:")),
    ok("Host with a port", req(host="Host: example.com:8080")),
    ok("Host of IPv6", req(host="Host: [::1]:8080")),
]
BAD_LENGTHS = {  # RFC 9110, 8.6
    "with a plus": "+5", "with a minus": "-5", "with an underscore": "5_0", "with a blank inside": "5 5",
    "in Arabic digits": "٥".encode().decode("latin-1"), "superscript": "\xb2", "in hex": "0x5", "of a letter": "a",
    "with a point": "5.0", "with an exponent": "5e0", "empty": "", "quoted": '"5"', "with a semicolon": "5;",
    "with a trailing comma": "5,", "as an equal list": "5, 5", "as a list": "5, 6", "of a word": "five",
}  # fmt: skip
BODIES = [  # RFC 9112, 6.3; RFC 9110, 8.6
    ok("body", whole(), "POST", body=b"12345"),
    ok("empty body", whole(b""), "POST"),
    ok("body of every byte", whole(bytes(range(256))), "POST", body=bytes(range(256))),
    ok("body of line ends", whole(b"\r\n\r\n"), "POST", body=b"\r\n\r\n"),
    ok("body that looks like a request", whole(PROBE), "POST", body=PROBE),
    ok("leading zeros", post("Content-Length: 0005"), "POST", body=b"12345"),
    ok("thousands of leading zeros", post(f"Content-Length: {'0' * 9000}5"), "POST", body=b"12345"),
    ok("length of zeros", post("Content-Length: 000", body=b""), "POST"),
    ok("blanks around the length", post("Content-Length: \t5 "), "POST", body=b"12345"),
    ok("body of a GET", get("Content-Length: 5") + b"12345", body=b"12345"),
    ok("body of a PUT", req("PUT /echo HTTP/1.1", "Content-Length: 5", body=b"12345"), "PUT", body=b"12345"),
    ok("PUT without a length", req("PUT /echo HTTP/1.1"), "PUT"),
    no("POST without a length", post(), 411),
    no("POST of HTTP/1.0 without a length", req("POST /echo HTTP/1.0"), 411),
    *[no(f"length {name}", post(f"Content-Length: {value}")) for name, value in BAD_LENGTHS.items()],
    no("two equal lengths", post("Content-Length: 5", "Content-Length: 5")),
    no("two different lengths", post("Content-Length: 5", "Content-Length: 6")),
    no("second length in other letters", post("Content-Length: 0", "content-length: 5")),
    no("bad length of a GET", get("Content-Length: -1")),
    no("length with an underscored name", post("Content_Length: 5"), 411),
    no("length of 18 digits", post("Content-Length: " + "9" * 18), 413),
    no("length of thousands of digits", post("Content-Length: " + "9" * 9000), 413),
    no("length over the limit of a GET", get("Content-Length: 65537"), 413),
]
CHUNK = b"5\r\n12345\r\n0\r\n\r\n"
UNKNOWN_CODINGS = {
    "gzip": "gzip", "gzip, chunked": "gzip, chunked", "chunked twice": "chunked\r\nTransfer-Encoding: chunked",
    "identity": "identity", "xchunked": "xchunked", "quoted chunked": '"chunked"', "empty coding": "",
}  # fmt: skip
CODINGS = [  # RFC 9112, 6.1 and 6.3
    *[no(name, post(f"Transfer-Encoding: {coding}", body=CHUNK), 501) for name, coding in UNKNOWN_CODINGS.items()],
    no("chunked", post("Transfer-Encoding: chunked", body=CHUNK), 411),
    no("chunked in other letters", post("transfer-encoding: ChunkeD", body=CHUNK), 411),
    no("chunked GET", get("Transfer-Encoding: chunked") + CHUNK, 411),
    no("vertical tab before chunked", post("Transfer-Encoding: \x0bchunked", body=CHUNK)),
    no("coding and length", post("Transfer-Encoding: chunked", "Content-Length: 5", body=CHUNK)),
    no("length and coding", post("Content-Length: 5", "Transfer-Encoding: chunked", body=CHUNK)),
    no("length and another coding", post("Content-Length: 5", "Transfer-Encoding: x")),
    no("chunked on HTTP/1.0", req("POST /echo HTTP/1.0", "Transfer-Encoding: chunked", body=CHUNK)),
]
CONNECTIONS = [  # RFC 9112, 9.3 and 9.6; RFC 9110, 10.1.1
    ok("Connection: close", get("Connection: close"), last=True),
    ok("Connection: CLOSE", get("Connection: CLOSE"), last=True),
    ok("Connection: foo, close", get("Connection: foo, close"), last=True),
    ok("second Connection closes", get("Connection: foo", "Connection: close"), last=True),
    ok("keep-alive and close", get("Connection: keep-alive,close"), last=True),
    ok("close after a body", whole(b"12345", "Connection: close"), "POST", body=b"12345", last=True),
    ok("Connection: keep-alive", get("Connection: keep-alive")),
    ok("Connection of something like close", get("Connection: closed, xclose")),
    ok("empty Connection", get("Connection:")),
    ok("HTTP/1.0 with keep-alive", req(OLD, "Connection: keep-alive"), old=True),
    ok("HTTP/1.0 with Keep-Alive among others", req(OLD, "Connection: foo, Keep-Alive"), old=True),
    ok("HTTP/1.0 with both", req(OLD, "Connection: keep-alive, close"), old=True, last=True),
    ok("HTTP/1.0 expects nothing", req(OLD, "Expect: 200-ok"), old=True, last=True),
    ok("expectation without a body", get("Expect: 100-Continue")),
    ok("expectation of a body that is there", whole(b"12345", "Expect: 100-continue"), "POST", body=b"12345"),
    no("unknown expectation", whole(b"12345", "Expect: 200-ok"), 417),
    no("two expectations", whole(b"12345", "Expect: 100-continue", "Expect: 200-ok"), 417),
    no("empty expectation", whole(b"12345", "Expect:"), 417),
]
CASES = [*REQUEST_LINES, *TARGETS, *HEADERS, *HOSTS, *BODIES, *CODINGS, *CONNECTIONS]
REQUEST_AT_LIMITS = req("POST /67890 HTTP/1.1", "X: 1", "Content-Length: 5", body=b"12345")
AT_LIMITS = Limits(head=len(REQUEST_AT_LIMITS) - 9, target=6, headers=3, body=5)
LIMITED = [  # limits, request, what becomes of it
    pytest.param({}, REQUEST_AT_LIMITS, ("POST", "/67890", b"12345", False, False), id="all at the limits"),
    pytest.param({"head": AT_LIMITS.head - 1}, REQUEST_AT_LIMITS, 431, id="head"),
    pytest.param({"headers": 2}, REQUEST_AT_LIMITS, 431, id="headers"),
    pytest.param({"target": 5}, REQUEST_AT_LIMITS, 414, id="target"),
    pytest.param({"body": 4}, REQUEST_AT_LIMITS, 413, id="body"),
    pytest.param({}, b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, 431, id="head without an end"),
    pytest.param({}, b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 100_000, 431, id="many headers without an end"),
    pytest.param({}, b"GET /" + b"a" * 100_000, 414, id="request line without an end"),
    # A method, two spaces, a version and CRLF in 32 bytes more than a target has, or the line is too long.
    pytest.param({}, b"a" * 36 + b"\r\n" + b"a" * 100, 431, id="request line of the longest kind"),
    pytest.param({}, b"a" * 37 + b"\r\n" + b"a" * 100, 414, id="request line of one byte more"),
]


@pytest.mark.parametrize(("data", "outcome"), CASES)
def test_a_request_is_taken_or_refused_and_what_follows_it_is_taken_or_not_read(data: bytes, outcome: Any) -> None:
    assert outcomes([data + PROBE]) == ([outcome] if isinstance(outcome, int) else [outcome, PARSED_PROBE])


@pytest.mark.parametrize(("data", "outcome"), [case for case in CASES if len(case.values[0]) < 2000])
def test_a_request_means_the_same_however_it_is_split(data: bytes, outcome: Any) -> None:
    expected = [outcome] if isinstance(outcome, int) else [outcome, PARSED_PROBE]
    assert outcomes([data[i : i + 1] for i in range(len(data))]) == [outcome]
    for cut in range(1, len(data)):
        assert outcomes([data[:cut], data[cut:] + PROBE]) == expected, data[:cut]


@pytest.mark.parametrize(("limits", "data", "outcome"), LIMITED)
def test_the_limits_are_the_largest_sizes_that_are_taken(limits: dict[str, int], data: bytes, outcome: Any) -> None:
    values = {name: getattr(AT_LIMITS, name) for name in ("head", "headers", "target", "body")}
    assert outcomes([data], Limits(**{**values, **limits})) == [outcome]


def test_the_default_limits_are_these() -> None:
    assert Limits() == Limits(16_384, 100, 8192, 65_536, 1000, 10.0, 10.0, 60.0)


@pytest.mark.parametrize("seed", range(5))
def test_pipelined_requests_mean_the_same_however_they_are_split(seed: int) -> None:
    chance = random.Random(seed)
    small = [case.values for case in CASES if len(case.values[0]) < 2000]
    for _ in range(50):
        data, expected = b"", []
        while len(expected) < 20 and not (expected and isinstance(expected[-1], int)):
            request, outcome = chance.choice(small)
            data, expected = data + request, [*expected, outcome]
        pieces = []
        while data:
            size = chance.choice((1, 2, 3, 50, 500))
            pieces, data = [*pieces, data[:size]], data[size:]
        assert outcomes(pieces) == expected


def test_headers_have_lower_case_names_and_repeated_ones_are_joined() -> None:
    parser = Parser(Limits())
    parser.buffer = get("X-One: \t a b \t", "x-ONE:c", "Y: \xe9")
    request = parser.next()
    assert request is not None
    assert request.headers == {"host": "a", "x-one": "a b, c", "y": "\xe9"}  # RFC 9110, 5.3


@pytest.mark.parametrize(
    ("data", "known", "in_body"),
    [
        (b"POST /echo HTTP", ("-", "-"), False),
        (whole()[:-1], ("POST", "/echo"), True),
        (whole(), ("POST", "/echo"), False),
        (post("Content-Length: five"), ("POST", "/echo"), False),
        (b"garbage\r\n\r\n", ("-", "-"), False),
    ],
    ids=["part of a head", "part of a body", "whole", "bad header", "bad request line"],
)
def test_the_latest_request_is_known_as_far_as_it_has_come(data: bytes, known: tuple[str, str], in_body: bool) -> None:
    parser = Parser(Limits())
    parser.buffer = data
    with contextlib.suppress(HttpError):
        parser.next()
    assert ((parser.request.method, parser.request.path), parser.in_body) == (known, in_body)


# A small server and its clients


class Accepted(socket.socket):
    """A connection of the server; it takes no more at once than a test allows."""

    listener: Listener

    def send(self, data: Any, *flags: int) -> int:
        self.listener.sizes.append(len(data))
        return super().send(data[: self.listener.takes.pop()] if self.listener.takes else data, *flags)


class Listener(socket.socket):
    """A listening socket on a free port, whose connections have small buffers; it fails as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # connections inherit it
        self.bind(("127.0.0.1", 0))
        self.listen(1024)
        self.errors: list[int] = []  # error numbers of the next calls of accept()
        self.tries = 0  # calls of accept()
        self.sizes: list[int] = []  # how many bytes each send() was given
        self.takes: list[int] = []  # how many bytes the next calls of send() take
        self.accepted: list[Accepted] = []

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.errors:
            code = self.errors.pop()
            raise OSError(code, errno.errorcode[code])
        connection, address = super().accept()
        self.accepted.append(Accepted(fileno=connection.detach()))
        self.accepted[-1].listener = self
        return self.accepted[-1], address


class Echo(FrontHandler):
    """GET, HEAD, POST and OPTIONS on the paths of the server."""

    server: EchoServer

    def route(self) -> Callable[[Any], None]:
        if self.request.path == "/check-fails":
            raise ValueError("secret")
        if self.request.path not in ("*", *self.server.routes):
            raise HttpError(404, "nothing here")
        if self.request.method not in ("GET", "HEAD", "POST", "OPTIONS"):
            raise HttpError(405, "not allowed", {"Allow": "GET"})
        return Echo.run

    def translate(self, error: BaseException) -> HttpError | None:
        if isinstance(error, self.server.untranslatable):
            raise TypeError("a bug in translate")
        return HttpError(422, "translated") if isinstance(error, KeyError) else super().translate(error)

    def run(self) -> None:
        self.server.seen.append(self.request.path)
        self.server.routes.get(self.request.path, Echo.echo)(self)

    def echo(self) -> None:
        self.respond(200, json.dumps([self.request.path, self.request.body.decode("latin-1")]).encode())

    def later(self) -> None:
        """Leaves the response to `EchoServer.complete`."""
        self.suspend()
        self.server.waiting.put(self)

    def submitted(self) -> None:
        self.suspend()
        self.server.submit(self.server.call_soon, self.resume, self.echo)

    def gathers(self) -> None:
        """Leaves the response to the end of the iteration."""
        self.suspend()
        self.server.gathered.append(self)

    def holds(self) -> None:
        """Holds up the loop, so that a test can prepare what it finds next."""
        self.server.held.set()
        assert self.server.released.wait(HANG)
        self.echo()


def raises(error: BaseException) -> Callable[[Any], None]:
    """What fails in place of responding."""

    def fail(handler: Any) -> None:
        raise error

    return fail


class EchoServer(FrontServer):
    """An echo that a test can look into."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.listener, self.clock = Listener(), clock
        super().__init__(("127.0.0.1", 0), Echo, limits, listener=self.listener)
        self.routes: dict[str, Callable[[Echo], None]] = {
            "/": Echo.echo, "/echo": Echo.echo, "/later": Echo.later, "/submitted": Echo.submitted,
            "/gathers": Echo.gathers, "/holds": Echo.holds, "/empty": lambda handler: handler.respond(202),
            "/large": lambda handler: handler.respond(200, LARGE, content_type="text/plain"),
            "/refuses": raises(HttpError(409, "no", {"X-Reason": "busy"})), "/fails": raises(RuntimeError("secret")),
            "/refuses-and-closes": raises(HttpError(409, "no", close=True)), "/breaks": raises(ZeroDivisionError()),
        }  # fmt: skip
        self.untranslatable: Any = ZeroDivisionError
        self.seen: list[str] = []  # the path of every request served
        self.waiting: queue.Queue[Echo] = queue.Queue()  # the requests to /later
        self.gathered: list[Echo] = []  # the requests to /gathers in this iteration
        self.groups: list[int] = []  # how many there were each time
        self.iterations = 0
        self.at_end: Callable[[], object] = lambda: None  # runs at the end of each iteration
        self.held, self.released = threading.Event(), threading.Event()
        self.marks = threading.Semaphore(0)
        self.thread = threading.Thread(target=self.serve, name="front under test", daemon=True)
        self.stack = contextlib.ExitStack()  # of clients to close

    def serve(self) -> None:
        try:
            self.serve_forever()
        finally:
            self.marks.release(10_000)  # nobody waits for a loop that is over

    def end_of_iteration(self) -> None:
        self.iterations += 1
        self.at_end()
        gathered, self.gathered = self.gathered, []
        self.groups += [len(gathered)] if gathered else []
        for handler in gathered:
            self.guard(handler.resume, handler.echo)

    def client(self) -> Client:
        """A new connection, closed at the end of the test."""
        client = Client(socket.create_connection(self.server_address[:2], HANG))
        self.stack.callback(client.socket.close)
        return client

    def settle(self, rounds: int = 3) -> None:
        """Returns when the loop has handled all that was sent; 3, as a deadline is checked after the events."""
        for _ in range(rounds):
            self.call_soon(self.marks.release)
            assert self.marks.acquire(timeout=HANG), "the loop does not go on"

    def advance(self, seconds: float) -> None:
        self.settle()  # or a deadline that the loop is about to set would count from the new time
        self.clock.advance(seconds)
        self.settle()

    def complete(self, respond: Callable[[Echo], None] = Echo.echo) -> None:
        """Lets the longest-waiting request to /later have its response."""
        handler = self.waiting.get(timeout=HANG)
        self.call_soon(handler.resume, respond, handler)

    def rests(self) -> bool:
        """Whether the loop does nothing but what it is asked to."""
        self.settle(100)  # until what was sent has been read as far as it will be
        before = self.iterations
        self.settle(100)
        return self.iterations - before <= 150  # a resting loop has one for each round

    def ends(self) -> bool:
        """Whether `serve_forever` returns."""
        self.thread.join(HANG)
        return not self.thread.is_alive()


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A connection to the server. Every response that it reads is checked for what each response must have."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.received = connection, b""

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def end(self) -> None:
        """Sends a FIN; responses can still be read."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Goes away without a FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def head(self) -> tuple[str, dict[str, str]]:
        """The status line and the headers of the next response, 100 Continue included."""
        while b"\r\n\r\n" not in self.received:
            data = self.socket.recv(65536)
            assert data, f"the connection ended after {self.received[:200]!r}"
            self.received += data
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        line, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        assert len(headers) == len(lines), f"a header was sent twice: {lines}"
        return line, headers

    def response(self, method: str = "GET") -> Response:
        """The next response, which is to a request of this method."""
        line, headers = self.head()
        match = STATUS_LINE.fullmatch(line)
        assert match is not None, line
        length = int(headers["content-length"])
        assert "date" in headers and "server" not in headers
        assert ("content-type" in headers) == (length > 0)
        length = 0 if method == "HEAD" else length
        parts, missing = [self.received], length - len(self.received)
        while missing > 0:
            parts.append(self.socket.recv(65536))
            assert parts[-1], f"the connection ended {missing} bytes before its response"
            missing -= len(parts[-1])
        received = b"".join(parts)
        self.received = received[length:]
        return Response(int(match[1]), headers, received[:length])

    def echoed(self) -> tuple[str, str]:
        """The path and the body that the next response echoes."""
        path, body = json.loads(self.response().body)
        return path, body

    def rest(self) -> bytes:
        """What else comes before the server closes its side."""
        while data := self.socket.recv(65536):
            self.received += data
        rest, self.received = self.received, b""
        return rest

    def statuses(self) -> list[int]:
        """The statuses of all responses until the server closes its side."""
        found: list[int] = []
        self.received = self.rest()
        while self.received:
            found.append(self.response().status)
        return found

    def silent(self) -> bool:
        """Whether there is nothing to read now, not even an end."""
        self.socket.setblocking(False)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK) and False
        except BlockingIOError:
            return not self.received
        finally:
            self.socket.settimeout(HANG)

    def works(self) -> bool:
        """Whether the connection takes a request and responds to it."""
        return self.send(PROBE).echoed() == ("/", "")


@contextlib.contextmanager
def front(limits: Limits = Limits(), *, driven: bool = True) -> Iterator[EchoServer]:
    """A running server; when the block ends, all that is left of it is dropped at once."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(1000.0)
        if driven:
            driven_time = SimpleNamespace(monotonic=clock, time=lambda: MIDNIGHT + clock() - 1000.0)
            patch.setattr(http_front, "time", driven_time)
        server = EchoServer(limits, clock)
        server.thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown(0.0)
            ended = server.ends()
            server.stack.close()
            server.server_close()
            assert ended, "serve_forever did not return"


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with front() as running:
        yield running


# Connections: what a peer does, and what it sees


STEPS: dict[str, Callable[[EchoServer, Client], object]] = {
    "nothing comes": lambda server, client: client.silent(),
    "100 Continue": lambda server, client: client.head() == ("HTTP/1.1 100 Continue", {}),
    "the end": lambda server, client: client.rest() == b"",
    "still open": lambda server, client: server.open_connections == 1,
    "dropped": lambda server, client: server.open_connections == 0,
    "the loop rests": lambda server, client: server.rests(),
    "the loop ends": lambda server, client: server.ends(),
    "> end": lambda server, client: not client.end(),
    "> reset": lambda server, client: not client.reset(),
    "> read a little": lambda server, client: client.socket.recv(10_000),
    "> complete": lambda server, client: not server.complete(),
    "> respond at length": lambda server, client: not server.complete(server.routes["/large"]),
    "> fail": lambda server, client: not server.complete(raises(ZeroDivisionError())),
    "> shutdown": lambda server, client: not server.shutdown(LONG_TIME),
    "> break translate": lambda server, client: setattr(server, "untranslatable", HttpError) is None,
    "> take 5": lambda server, client: not server.listener.takes.append(5),
}


def play(server: EchoServer, client: Client, *steps: Any) -> None:
    """Bytes are sent, a float moves the clock, an int is the status of the next response, a dict some of its headers,
    a tuple what is echoed, a list the paths served so far; a text is one of `STEPS`, done once the loop is through."""
    for step in steps:
        if isinstance(step, bytes):
            client.send(step)
        elif isinstance(step, float):
            server.advance(step)
        elif isinstance(step, int):
            response = client.response()
            assert response.status == step
        elif isinstance(step, dict):
            assert {**response.headers, **step} == response.headers
        elif isinstance(step, tuple):
            assert client.echoed() == step
        elif isinstance(step, list):
            assert server.seen == step
        else:
            server.settle(5)
            assert STEPS[step](server, client), step


def script(name: str, *steps: Any) -> Any:
    return pytest.param(steps, id=name)


ECHOED, LATER, LARGE_GET, GARBAGE = ("/echo", "12345"), get(path="/later"), get(path="/large"), b"garbage\r\n\r\n"
EXPECTS = whole(b"12345", "Expect: 100-continue")[:-5]
HALF_HEAD, HALF_BODY = PROBE[:-1], whole()[:-1]


CLOSES, ALLOW = {"connection": "close"}, {"allow": "GET"}


def refused(name: str, data: bytes, status: int) -> Any:
    """RFC 9112, 9.3: what was not read never becomes the next request, but nor does a reset take the response away."""
    return script(f"refused: {name}", data, status, CLOSES, {"content-type": "application/json"}, PROBE, "the end", [])


SCRIPTS = [
    refused("garbage", GARBAGE, 400),
    refused("no Host", req(host=None), 400),
    refused("malformed length", post("Content-Length: +5", body=b""), 400),
    refused("no length", post(body=b""), 411),
    refused("chunked", post("Transfer-Encoding: chunked", body=CHUNK), 411),
    refused("body over the limit", post("Content-Length: 65537", body=b""), 413),
    refused("target over the limit", get(path="/" + "x" * 8192), 414),
    refused("expectation", whole(b"12345", "Expect: 200-ok"), 417),
    refused("headers over the limit", get(*["X: a"] * 100), 431),
    refused("coding", post("Transfer-Encoding: gzip"), 501),
    refused("version", req("GET /echo HTTP/2.0"), 505),
    refused("body not yet sent to no path", post("Content-Length: 36", "Expect: 100-continue", body=b"", path="/no"), 404),
    refused("body not yet sent, method", EXPECTS.replace(b"POST", b"PUT"), 405),
    refused("body not yet sent, unknown method", EXPECTS.replace(b"POST", b"BREW"), 501),
    refused("body not yet sent, too large", post("Content-Length: 65537", "Expect: 100-continue", body=b""), 413),
    script("kept: path", get(path="/nothing") + whole(path="/nothing") + PROBE, 404, 404, ("/", "")),
    script("kept: method", req("DELETE /echo HTTP/1.1") + PROBE, 405, ALLOW, ("/", "")),
    script("kept: unknown method", req("BREW / HTTP/1.1", "Content-Length: 5", body=b"GET /") + PROBE, 501, ("/", "")),
    script("kept: lower-case method", req("get / HTTP/1.1") + PROBE, 501, ("/", "")),
    script("kept: OPTIONS *", req("OPTIONS * HTTP/1.1") + PROBE, ("*", ""), ("/", "")),
    script("kept: refusal", get(path="/refuses") + PROBE, 409, {"x-reason": "busy"}, ("/", "")),
    script("kept: HTTP/1.0", req(OLD, "Connection: keep-alive"), 200, {"connection": "keep-alive"}, PROBE, 200, {}),
    script("last: Connection: close", get("Connection: close") + PROBE * 99, 200, CLOSES, "the end", ["/echo"]),
    script("last: no path", get("Connection: close", path="/no") + PROBE, 404, CLOSES, "the end", []),
    script("last: submitted", get("Connection: close", path="/submitted") + PROBE, 200, CLOSES, "the end"),
    script("last: refusal that closes", get(path="/refuses-and-closes") + PROBE, 409, CLOSES, "the end"),
    script("last: HTTP/1.0", req(OLD) + PROBE, 200, CLOSES, "the end", ["/echo"]),
    # Parsed headers are reused, but for the same method and version only
    script("same headers: method", get() * 2 + post(body=b"") + PROBE, 200, 200, 411, "the end"),
    script("same headers: version", get() * 2 + req(OLD) + PROBE, 200, 200, 200, CLOSES, "the end"),
    # RFC 9110, 10.1.1
    script("100 Continue: once", EXPECTS, "100 Continue", b"123", "nothing comes", b"45", ECHOED),
    script("100 Continue: not for a body that is there", EXPECTS + b"12345" + PROBE, ECHOED, ("/", "")),
    script("100 Continue: not for HTTP/1.0", EXPECTS.replace(b"/1.1", b"/1.0"), "nothing comes", b"12345", ECHOED),
    script("half-closed: nothing", "> end", "the end", "dropped"),
    script("half-closed: empty line", b"\r\n", "> end", "the end", "dropped"),
    script("half-closed: part of a head", HALF_HEAD, "> end", "the end", "dropped", []),
    script("half-closed: part of a body", HALF_BODY, "> end", "the end", "dropped", []),
    script("half-closed: part behind a suspended request", LATER + HALF_BODY, "> end", "> complete", 200, "the end", ["/later"]),
    script("half-closed: requests", get() + PROBE, "> end", 200, 200, "the end", "dropped"),
    script("half-closed: submitted", get(path="/submitted") * 2 + PROBE, "> end", 200, 200, 200, "the end", "dropped"),
    script("half-closed: gathered", get(path="/gathers") * 2 + PROBE, "> end", 200, 200, 200, "the end", "dropped"),
    script("half-closed: large", LARGE_GET * 2 + PROBE, "> end", 200, 200, 200, "the end", "dropped"),
    script("half-closed: suspended", LATER * 2, "> end", "> complete", 200, "still open", "> complete", 200, "the end"),
    # Deadlines are totals
    script("deadline: new connection", 9.75, "nothing comes", 0.25, "the end"),
    script("deadline: head", HALF_HEAD, 9.75, "nothing comes", 0.25, 408, "the end"),
    script("deadline: head that drips", HALF_HEAD, *[b"X", 1.0] * 9, "nothing comes", b"X", 1.0, 408, "the end"),
    script("deadline: empty lines that drip", *[b"\r\n", 1.0] * 9, "nothing comes", 1.0, "the end"),
    script("deadline: body", HALF_BODY, 9.75, "nothing comes", 0.25, 408, "the end", []),
    script("deadline: body that drips", whole(b"x" * 99)[:-98], *[b"x", 1.0] * 9, "nothing comes", 1.0, 408, "the end"),
    script("deadline: head and body have one each", HALF_BODY[:9], 9.75, HALF_BODY[9:], 9.75, b"5", ECHOED),
    script("deadline: idle", PROBE, 200, 59.75, "nothing comes", 0.25, "the end"),
    script("deadline: idle but for empty lines", PROBE, 200, *[b"\r\n", 9.5] * 6, "nothing comes", 3.0, "the end"),
    script("deadline: head after idleness", PROBE, 200, 59.0, HALF_HEAD, 9.75, "nothing comes", 0.25, 408, "the end"),
    script("deadline: body after idleness", PROBE, 200, 59.0, HALF_BODY, 9.75, "nothing comes", 0.25, 408, "the end"),
    script("deadline: head behind a response", PROBE + HALF_HEAD, 200, 9.75, "nothing comes", 0.25, 408, "the end"),
    script("deadline: body behind a response", PROBE + HALF_BODY, 200, 9.75, "nothing comes", 0.25, 408, "the end"),
    script("deadline: none for a suspended request", LATER, LONG_TIME, "nothing comes", "> complete", 200),
    script("deadline: none after idleness", PROBE, 200, LATER, LONG_TIME, "nothing comes", "> complete", 200),
    script("deadline: head behind a suspended request", LATER + HALF_HEAD, LONG_TIME, "> complete", 200, 9.75,
           "nothing comes", 0.25, 408, "the end"),
    script("deadline: write-blocked", LARGE_GET, *["still open", 1.0] * 10, "dropped"),
    script("deadline: write-blocked and slow", LARGE_GET, *["still open", "> read a little", 1.0] * 10, "dropped"),
    script("deadline: all of it after a late read", LARGE_GET, 9.0, 200, 59.0, PROBE, 200),
    script("deadline: refused peer", GARBAGE, 400, "the end", b"more", 1.5, "still open", b"more", 0.5, "dropped"),
    # A connection that stalls does not keep the loop busy
    script("rest: idle", "the loop rests"),
    script("rest: part of a head", HALF_HEAD, "the loop rests"),
    script("rest: refused", GARBAGE, "the loop rests"),
    script("rest: suspended", LATER, "the loop rests"),
    script("rest: suspended, half-closed", LATER, "> end", "the loop rests", "still open"),
    script("rest: suspended, reset", LATER, "> reset", "the loop rests", "dropped"),
    script("rest: suspended, half-closed, reset", LATER, "> end", "> reset", "the loop rests"),
    script("rest: more than is read ahead", LATER + PROBE * 600, "the loop rests", "> complete", *[200] * 601),
    script("rest: write-blocked", LARGE_GET, "the loop rests"),
    script("rest: write-blocked, half-closed", LARGE_GET, "> end", "the loop rests", "still open"),
    script("rest: write-blocked, reset", LARGE_GET, "> reset", "the loop rests", "dropped"),
    # A peer that goes leaves its place
    script("gone: reset", "> reset", "dropped"),
    script("gone: reset in a head", HALF_HEAD, "> reset", "dropped"),
    script("gone: reset in a body", HALF_BODY, "> reset", "dropped"),
    script("gone: refused, then half-closed", GARBAGE, "> end", 400, "the end", "dropped"),
    script("gone: refused, then reset", GARBAGE, "> reset", "dropped"),
    script("gone: write-blocked, then reset", LARGE_GET + PROBE, "> read a little", "> reset", "dropped"),
    script("gone: suspended, then reset", LATER + PROBE, "> reset", "> complete", "dropped", ["/later"]),
    script("gone: half-closed, then reset", LATER * 3, "> end", "> reset", "> respond at length", "dropped", ["/later"]),
    script("gone: last response", PROBE * 100 + get("Connection: close"), *[200] * 101, "the end", "dropped"),
    # A graceful shutdown
    script("shutdown: no connections", "> end", "dropped", "> shutdown", "the loop ends"),
    script("shutdown: new connection", "> shutdown", 0.15, "nothing comes", 0.1, "the end", "the loop ends"),
    script("shutdown: idle", PROBE, 200, "> shutdown", 0.15, "nothing comes", 0.1, "the end", "the loop ends"),
    script("shutdown: idle, then used", PROBE, 200, "> shutdown", 0.15, PROBE, 200, CLOSES, "the end", "the loop ends"),
    script("shutdown: head", HALF_HEAD, "> shutdown", 0.75, b"\n", 200, CLOSES, "the end", "the loop ends"),
    script("shutdown: body", HALF_BODY, "> shutdown", 0.75, b"5", 200, CLOSES, "the end", "the loop ends"),
    script("shutdown: late head", HALF_HEAD, "> shutdown", 0.75, "nothing comes", 0.25, 408, "the end", "> reset", "the loop ends"),
    script("shutdown: late body", HALF_BODY, "> shutdown", 0.75, "nothing comes", 0.25, 408, "the end", 1.0, "the loop ends"),
    script("shutdown: write-blocked", LARGE_GET, "> shutdown", 0.75, "still open", 0.25, "the loop ends"),
    script("shutdown: write-blocked, then read", LARGE_GET, "> shutdown", 0.75, 200, "nothing comes", 0.25, "the end", "the loop ends"),
    script("shutdown: suspended", LATER + PROBE, "> shutdown", 1800.0, "nothing comes", "> complete", 200, CLOSES, "the end",
           "> end", "the loop ends", ["/later"]),
]  # fmt: skip


@pytest.mark.parametrize("steps", SCRIPTS)
def test_a_connection_goes_as_written_and_nothing_is_logged(
    server: EchoServer, caplog: pytest.LogCaptureFixture, steps: tuple[Any, ...]
) -> None:
    caplog.set_level(logging.INFO)
    play(server, server.client(), *steps)
    assert caplog.messages == []


@pytest.mark.parametrize("half", [HALF_HEAD, HALF_BODY], ids=["head", "body"])
def test_half_a_request_behind_a_write_blocked_response_has_its_time(server: EchoServer, half: bytes) -> None:
    server.listener.takes = [5]
    play(server, server.client(), PROBE + half, 200, 9.75, "nothing comes", 0.25, 408, "the end")


def test_a_peer_that_goes_costs_one_debug_line(server: EchoServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    play(server, server.client(), HALF_HEAD, "> reset", "dropped")
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("DEBUG", None)]


# Responses


def test_a_refused_peer_can_read_its_response_though_it_sent_much_more(server: EchoServer) -> None:
    client = server.client()

    def send() -> None:
        with contextlib.suppress(OSError):
            client.send(b"POST /echo HTTP/1.1\r\n\r\n" + b"x" * 1_000_000)

    sender = threading.Thread(target=send)
    sender.start()
    assert client.statuses() == [400]
    client.end()
    sender.join(HANG)
    assert not sender.is_alive()


@pytest.mark.parametrize("path", ["/echo", "/submitted", "/large", "/empty", "/fails", "/refuses", "/nothing"])
def test_a_response_to_head_has_the_headers_of_get_and_no_body(server: EchoServer, path: str) -> None:
    client = server.client().send(get(path=path) + req(f"HEAD {path} HTTP/1.1") + PROBE)
    response = client.response()
    assert client.response("HEAD") == (response.status, response.headers, b"")
    assert client.echoed() == ("/", "")


def test_a_response_has_the_date_of_its_second(server: EchoServer) -> None:
    dates = []
    for seconds in (0.0, 0.75, 0.125, 0.25, 86_400.0):
        server.advance(seconds)
        dates.append(server.client().send(PROBE).response().headers["date"])
    wednesday = "Wed, 15 Nov 2023 00:00:"
    assert dates == [f"{wednesday}00 GMT"] * 3 + [f"{wednesday}01 GMT", "Thu, 16 Nov 2023 00:00:01 GMT"]


def test_responses_are_counted_by_route_and_status(server: EchoServer) -> None:
    assert server.client().send(PROBE * 2 + get(path="/nothing") + GARBAGE).statuses() == [200, 200, 404, 400]
    assert server.responses == {("other", 200): 2, ("other", 404): 1, ("other", 400): 1}


@pytest.mark.parametrize(
    ("target", "client", "line"),
    [
        ("/echo?48123456789", "", "127.0.0.1 GET /echo 200"),
        ("/echo", "shop", "127.0.0.1 (shop) GET /echo 200"),
        ("/48123456789", "", "127.0.0.1 GET /*** 404"),
        ("/a/+48123456789/1234", "", "127.0.0.1 GET /a/***/*** 404"),
        ("/123/1234x", "", "127.0.0.1 GET /123/1234x 404"),
    ],
)
def test_a_request_is_logged_at_debug_without_its_query_and_phone_numbers(
    server: EchoServer, caplog: pytest.LogCaptureFixture, target: str, client: str, line: str
) -> None:
    caplog.set_level(logging.DEBUG)
    server.routes["/echo"] = lambda handler: (setattr(handler.request, "client", client), handler.respond(200))[1]
    server.client().send(get(path=target)).response()
    server.settle()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("DEBUG", line)]


def test_nothing_of_a_body_is_kept_once_it_has_its_response(server: EchoServer) -> None:
    play(server, server.client(), whole(b"private" * 1000, path="/empty"), 202, "nothing comes")
    kept = [value for each in gc.get_objects() if isinstance(each, (Parser, http_front.Request))
            for value in (getattr(each, "body", b""), getattr(each, "buffer", b""))]  # fmt: skip
    assert kept and not any(b"private" in value for value in kept)


def test_pipelined_requests_have_their_responses_in_order(server: EchoServer) -> None:
    sent = [(("/echo", "/submitted", "/gathers")[i % 3], str(i)) for i in range(600)]
    client = server.client().send(b"".join(whole(body.encode(), path=path) for path, body in sent))
    assert [client.echoed() for _ in sent] == sent
    paths = ["/large", "/echo", "/large", "/submitted", "/large"]
    client.send(b"".join(get(path=path) for path in paths))
    assert [client.response().body == LARGE for _ in paths] == [path == "/large" for path in paths]


def test_requests_behind_a_suspended_one_wait_for_it_and_nobody_else_does(server: EchoServer) -> None:
    clients = [server.client().send(whole(str(i).encode(), path="/later") + whole()) for i in range(3)]
    handlers = [server.waiting.get(timeout=HANG) for _ in clients]
    assert server.client().works()
    assert [client.silent() for client in clients] == [True] * 3
    for handler in reversed(handlers):
        server.waiting.put(handler)
        server.complete()
        server.settle()
    assert [(client.echoed(), client.echoed()) for client in clients] == [(("/later", str(i)), ECHOED) for i in range(3)]


def test_a_request_that_comes_byte_by_byte_is_served(server: EchoServer) -> None:
    client, data = server.client(), b"\r\n" + whole() + PROBE
    for i in range(len(data)):
        client.send(data[i : i + 1])
        server.settle(1)
    assert (client.echoed(), client.echoed()) == (ECHOED, ("/", ""))


def test_a_peer_cannot_fill_the_memory_behind_a_suspended_request(server: EchoServer) -> None:
    client, sent, data = server.client().send(LATER), 0, memoryview(PROBE * 100)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    client.socket.setblocking(False)
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            sent += client.socket.send(data[sent % len(PROBE) :])
        server.settle(1)
    assert http_front.READ_AHEAD <= sent < 200_000  # some of it is in the kernel
    client.socket.settimeout(HANG)
    server.complete()
    assert {client.response().status for _ in range(sent // len(PROBE) + 1)} == {200}


# Iterations of the loop


def test_responses_of_an_iteration_leave_together(server: EchoServer) -> None:
    play(server, server.client(), PROBE * 10 + get(path="/gathers") + PROBE, *[200] * 12)
    assert len(server.listener.sizes) == 1


def test_pipelined_responses_are_sent_before_there_are_too_many(server: EchoServer) -> None:
    server.routes["/medium"] = lambda handler: handler.respond(200, LARGE[:10_000])
    play(server, server.client(), get(path="/medium") * 100, *[200] * 100)
    assert http_front.SEND_AHEAD <= max(server.listener.sizes) < http_front.SEND_AHEAD + 10_500


def test_requests_of_an_iteration_are_gathered(server: EchoServer) -> None:
    clients = [server.client() for _ in range(3)]
    assert [client.works() for client in clients] == [True] * 3
    server.client().send(get(path="/holds"))
    assert server.held.wait(HANG)
    for client in clients:
        client.send(get(path="/gathers") * 2 + PROBE)
    server.released.set()
    assert [[client.echoed()[0] for _ in range(3)] for client in clients] == [["/gathers", "/gathers", "/"]] * 3
    assert server.groups == [3, 3]  # a connection's second request waits for its first


def test_an_error_at_the_end_of_an_iteration_or_in_a_call_costs_nobody_anything(
    server: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.call_soon(raises(RuntimeError("a bug")), None)
    server.settle()
    server.at_end = lambda: 1 / 0
    assert server.client().works()
    assert [record.exc_info and record.exc_info[0] for record in caplog.records[:2]] == [RuntimeError, ZeroDivisionError]


def test_calls_from_other_threads_run_in_the_loop_and_none_is_lost(server: EchoServer) -> None:
    calls: list[threading.Thread] = []
    together(8, lambda _: [server.call_soon(lambda: calls.append(threading.current_thread())) for _ in range(500)])
    server.settle()
    assert calls == [server.thread] * 4000


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        pytest.param(Limits(read_timeout=0.05), HALF_HEAD, id="head"),
        pytest.param(Limits(idle_timeout=0.05), PROBE, id="idle"),
        pytest.param(Limits(write_timeout=0.05), LARGE_GET, id="write-blocked"),
    ],
)
def test_the_loop_wakes_by_itself_at_a_deadline(limits: Limits, data: bytes) -> None:
    with front(limits, driven=False) as server:
        gone = threading.Event()
        client = server.client().send(data)
        assert client.socket.recv(1) == b"H"
        server.at_end = lambda: server.open_connections or gone.set()
        if data == HALF_HEAD:
            client.end()
        assert gone.wait(HANG)


# Many connections


@pytest.mark.parametrize("leave", [Client.end, Client.reset])
def test_one_connection_more_than_allowed_waits_until_another_closes(leave: Callable[[Client], object]) -> None:
    with front(Limits(connections=3)) as server:
        clients = [server.client() for _ in range(3)]
        assert [client.works() for client in clients] == [True] * 3
        fourth = server.client().send(PROBE)
        assert (server.rests(), fourth.silent()) == (True, True)
        assert [client.works() for client in clients] == [True] * 3
        leave(clients[1])
        assert fourth.echoed() == ("/", "")
        assert server.open_connections == 3


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_file_descriptors_it_pauses_and_says_so_twice(code: int, caplog: pytest.LogCaptureFixture) -> None:
    with front() as server:
        other = server.client()
        assert other.works()
        server.listener.errors, tries = [code] * 3, server.listener.tries
        client = server.client().send(PROBE)
        for count in (1, 2, 3):
            server.settle()
            for _ in range(2):
                assert (server.listener.tries - tries, client.silent(), other.works()) == (count, True, True)
                server.advance(http_front.ACCEPT_PAUSE / 2)
        assert client.echoed() == ("/", "")
    begin = f"not accepting connections for now: [Errno {code}] {errno.errorcode[code]}"
    assert caplog.messages == [begin, "accepting connections again after 3.0 s"]


def test_a_closed_connection_makes_room_at_once_after_the_file_descriptors_ran_out(server: EchoServer) -> None:
    other = server.client()
    assert other.works()
    server.listener.errors = [errno.EMFILE]
    waiting = server.client().send(PROBE)
    server.settle()
    assert waiting.silent()
    other.end()
    assert waiting.echoed() == ("/", "")


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EAGAIN])
def test_a_connection_that_cannot_be_accepted_costs_nobody_else_anything(server: EchoServer, code: int) -> None:
    server.listener.errors = [code]
    assert server.client().works()


# Shutdown and the end


def test_shutdown_refuses_new_connections(server: EchoServer) -> None:
    play(server, server.client(), LATER, "still open", "> shutdown", "still open")
    with pytest.raises(ConnectionRefusedError):
        server.client()


@pytest.mark.parametrize("timeouts", [(10.0,), (10.0, LONG_TIME), (LONG_TIME, 10.0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_shutdown_ends_at_its_shortest_timeout(
    server: EchoServer, timeouts: tuple[float, ...], at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = server.client().send(LATER)
    server.settle()
    for timeout in timeouts:
        server.shutdown(timeout)
        server.settle(0 if at_once else 3)
    play(server, client, 9.5, "nothing comes", 0.5, "the loop ends")
    server.server_close()
    server.complete()  # after the end, which hurts nobody
    assert (client.rest(), server.responses, caplog.messages) == (b"", {}, [])


def test_shutdown_wakes_by_itself_at_its_timeout() -> None:
    with front(driven=False) as server:
        client = server.client().send(LATER)
        server.settle()
        server.shutdown(0.05)
        assert server.ends()
        assert client.rest() == b""


def test_all_who_connected_before_the_shutdown_are_served(server: EchoServer) -> None:
    holder = server.client().send(get(path="/holds"))
    assert server.held.wait(HANG)
    clients = [server.client().send(PROBE) for _ in range(3 * http_front.ACCEPTS)]
    server.shutdown(LONG_TIME)  # returns though the loop is held up
    server.released.set()
    assert [client.echoed() for client in clients] == [("/", "")] * len(clients)
    play(server, holder, 200, http_front.LAST_CALL, "the end", "the loop ends")


def test_a_request_that_comes_as_the_shutdown_begins_is_served(server: EchoServer) -> None:
    client, late = server.client(), [PROBE]  # sent in the iteration of the shutdown, after everyone has been read from
    assert client.works()
    server.at_end = lambda: server.stopping and late and client.send(late.pop())
    server.shutdown(LONG_TIME)
    assert client.statuses() == [200]


def test_shutdown_at_the_connection_limit_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with front(Limits(connections=2)) as server:
        first = server.client()
        assert first.works()
        first.send(get(path="/holds") + HALF_HEAD)
        assert server.held.wait(HANG)
        server.shutdown(LONG_TIME)  # the loop finds this call and the second connection in the same iteration
        second = server.client().send(HALF_HEAD)
        server.released.set()
        play(server, second, "nothing comes", PROBE[-1:], 200, CLOSES)
    assert caplog.messages == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_taken_from_the_constructor_to_server_close(host: str) -> None:
    server = FrontServer((host, 0), Silent)
    address = server.server_address
    with pytest.raises(OSError) as caught:
        FrontServer(address[:2], Silent)
    assert caught.value.errno == errno.EADDRINUSE
    server.server_close()
    FrontServer(address[:2], Silent).server_close()


class Silent(FrontHandler):
    """Has nothing to say."""

    def route(self) -> Callable[[Any], None]:
        return lambda handler: handler.respond(204)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX, None])
def test_connections_wait_in_the_backlog_until_it_serves(
    tmp_path: Path, family: socket.AddressFamily | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with contextlib.ExitStack() as stack:
        listener = None
        if family is not None:
            listener = stack.enter_context(socket.socket(family))
            listener.bind(str(tmp_path / "front") if family == socket.AF_UNIX else ("127.0.0.1", 0))
            listener.listen()
        server = FrontServer(("127.0.0.1", 0), Silent, listener=listener)
        clients = [stack.enter_context(socket.socket(server.socket.family)) for _ in range(100)]
        for client in clients:
            client.settimeout(HANG)
            client.connect(server.server_address)
            client.sendall(req("GET / HTTP/1.1", "Connection: close"))
        server.shutdown()
        server.serve_forever()
        server.server_close()
        assert {client.recv(24) for client in clients} == {b"HTTP/1.1 204 No Content\r"}
    peer = "local" if family == socket.AF_UNIX else "127.0.0.1"
    assert set(caplog.messages) == {f"{peer} GET / 204", f"{peer} connection closed: done"}


def test_small_responses_are_not_held_back(server: EchoServer) -> None:
    assert server.client().works()
    assert server.listener.accepted[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_pool_that_the_system_has_no_threads_for_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        FrontServer(("127.0.0.1", 0), Silent, workers=5)
    for thread in started:
        thread.join(HANG)
    assert [thread.is_alive() for thread in started] == [False] * 3


def test_server_close_closes_what_an_interrupted_loop_left() -> None:
    server = EchoServer(Limits(), Clock())
    server.routes["/interrupts"] = raises(KeyboardInterrupt())
    client = server.client().send(get(path="/interrupts"))
    with pytest.raises(KeyboardInterrupt):
        server.serve_forever()
    assert client.silent()
    server.server_close()
    assert (server.open_connections, client.rest()) == (0, b"")
    server.stack.close()


# Failures behind the front


FAILURES = [
    pytest.param(raises(RuntimeError("secret")), 500, ["failed"], id="error"),
    pytest.param(raises(SystemExit(1)), 500, ["failed"], id="exit"),  # as of a thread that called sys.exit()
    pytest.param(raises(KeyError("secret")), 422, [], id="known error"),
    pytest.param(raises(HttpError(409, "no")), 409, [], id="refusal"),
    pytest.param(lambda handler: None, 500, ["failed"], id="no response"),
    pytest.param(lambda handler: handler.respond(200, headers={"X": "€"}), 500, ["failed"], id="header"),
    pytest.param(lambda handler: (handler.respond(200), 1 / 0), 200, ["failed after its response"], id="too late"),
]


@pytest.mark.parametrize(("fail", "status", "logged"), FAILURES)
@pytest.mark.parametrize("path", ["/123456", "/later"])
def test_a_request_that_fails_costs_only_its_own_response(
    server: EchoServer, caplog: pytest.LogCaptureFixture, fail: Any, status: int, logged: list[str], path: str
) -> None:
    server.routes["/123456"] = fail
    client = server.client().send(get(path=path) + PROBE)
    if path == "/later":
        server.complete(fail)
    response = client.response()
    assert (response.status, b"secret" in response.body, client.echoed()) == (status, False, ("/", ""))
    assert caplog.messages == [f"GET {path.replace('123456', '***')} {text}" for text in logged]
    assert all(record.levelname == "ERROR" and record.exc_info for record in caplog.records)


@pytest.mark.parametrize("headers", [[], ["Content-Length: 36", "Expect: 100-continue"]])
def test_a_check_that_fails_is_a_500(server: EchoServer, headers: list[str]) -> None:
    play(server, server.client(), get(*headers, path="/check-fails"), 500, PROBE, "the end" if headers else 200)


def test_a_resumed_request_may_be_suspended_again(server: EchoServer) -> None:
    client = server.client().send(LATER)
    server.complete(Echo.later)
    server.complete(lambda handler: None)  # but not without saying so
    assert client.response().status == 500


BREAKS = [
    script("at once", get(path="/breaks")),
    script("refused", "> break translate", GARBAGE),
    script("too late", "> break translate", HALF_HEAD, 10.0),
    script("resumed", LATER, "> fail"),
    script("behind a response", PROBE + get(path="/breaks"), ("/", "")),
    script("behind a write-blocked response", LARGE_GET + get(path="/breaks"), 200),
]


@pytest.mark.parametrize("steps", BREAKS)
@pytest.mark.parametrize("used", [True, False])
def test_an_error_in_handling_an_error_is_logged_and_costs_that_connection(
    server: EchoServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, steps: Any, used: bool
) -> None:
    monkeypatch.setattr(http_front, "SEND_AHEAD", 1)  # each response is sent before the next request is served
    client = server.client()
    if used:
        assert client.works()
    play(server, client, *steps, "the end", "dropped")
    assert "the server's loop goes on after an error" in caplog.messages
    assert server.client().works()


# The table of states


def test_the_table_of_states_is_total() -> None:
    for state in State:
        assert set(state.followers) <= set(State.__members__)
        assert isinstance(getattr(Limits(), state.timeout) if isinstance(state.timeout, str) else state.timeout, float)
        assert ("CLOSED" in state.followers) == (state is not State.CLOSED)
    assert State.CLOSED.followers == []


@pytest.mark.parametrize("seed", range(30))
def test_a_random_walk_of_events_never_leaves_the_table_of_states(
    server: EchoServer, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    chance, client = random.Random(seed), server.client()
    kinds = [PROBE, PROBE, whole(), LATER, LARGE_GET, EXPECTS + b"12345"]
    ends = [GARBAGE, get("Connection: close"), EXPECTS.replace(b"/echo", b"/nothing")]
    data = bytearray(b"".join(chance.choices(kinds, k=10)) + chance.choice(ends) + PROBE)
    client.socket.setblocking(False)

    def send() -> None:
        size = chance.choice((1, 10, 50, 100))
        client.send(bytes(data[:size]))
        del data[:size]

    events = [send, send, send, lambda: client.socket.recv(200_000), lambda: server.advance(chance.choice((0.3, 5.0))),
              lambda: server.waiting.empty() or server.complete()]  # fmt: skip
    rare = [client.end, client.reset, lambda: server.shutdown(20.0)]
    for _ in range(60):
        with contextlib.suppress(OSError):
            chance.choice(rare if chance.random() < 0.03 else events)()
        server.settle()
    assert caplog.messages == []

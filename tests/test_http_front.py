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
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest

import http_front
from helpers import HANG, Clock, together
from http_front import FrontHandler, FrontServer, HttpError, Limits, Parser, State

Log = pytest.LogCaptureFixture
LONG_TIME = 3600.0  # seconds, beyond every limit
LARGE = b"x" * 1_000_000  # far more than the sockets of these tests buffer
SMALL = 8192  # bytes of a socket's buffer
MIDNIGHT = 1_700_006_400.0  # of 2023-11-15, in the seconds of time.time()


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
OLD, EVERY_BYTE = "GET /echo HTTP/1.0", bytes(range(256))
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


def ok(name: str, data: bytes, method: str = "GET", path: str = "/echo", body: bytes = b"", **others: bool) -> Any:
    """A request that is taken, and what is read in it; `others` are `old` and `last`."""
    return pytest.param(data, (method, path, body, others.get("old", False), others.get("last", False)), id=name)


def no(name: str, data: bytes, status: int = 400) -> Any:
    """A request that is refused."""
    return pytest.param(data, status, id=name)


BAD_LINES = (  # RFC 9112, 3
    " GET /echo HTTP/1.1", "GET  /echo HTTP/1.1", "GET /echo  HTTP/1.1", "GET /echo HTTP/1.1 ", "GET\t/echo HTTP/1.1",
    "GET\x0b/echo HTTP/1.1", "GET /echo\x0cHTTP/1.1", "GET\xa0/echo HTTP/1.1", "GET /echo\x85HTTP/1.1",
    "GET\x1c/echo HTTP/1.1", "GET /ec ho HTTP/1.1", "GET /ec\0ho HTTP/1.1", "GET /ec\x01ho HTTP/1.1",
    "GET /ec\x7fho HTTP/1.1", "GET /\xe9 HTTP/1.1", "G\xcbT /echo HTTP/1.1", "GET /echo\rHTTP/1.1", "GET", "GET /echo",
    "/echo HTTP/1.1", "GE(T /echo HTTP/1.1", "GET /echo ICY/1.1", "GET /echo HTTP/1", "GET /echo HTTP/1.10",
    "GET /echo HTTP/01.1", "GET /echo HTTP/+1.1", "GET /echo HTTP/1.\xb2", "GET /echo http/1.1",
    "GET /echo HTTP/1.1\rX: a", "GET /echo HTTP/1.1\nX: a",
)  # fmt: skip
REQUEST_LINES = [  # RFC 9112, 2.2, 2.3, 3
    ok("plain GET", req()),
    ok("one CRLF before the request", b"\r\n" + req()),
    ok("many CRLFs before the request", b"\r\n" * 500 + req()),
    no("bare LF before the request", b"\n" + req()),
    no("CR CR LF before the request", b"\r\r\n" + req()),
    *[no(ascii(line), req(line)) for line in BAD_LINES],
    no("bare LF ends every line", b"GET /echo HTTP/1.1\nHost: a\n\n"),
    no("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    *[ok(method, req(f"{method} /echo HTTP/1.1"), method) for method in ("BREW", "get", "!#$%&'*+-.^_`|~09azAZ")],
    ok("HTTP/1.0", req(OLD), old=True, last=True),
    ok("HTTP/1.0 without Host", req(OLD, host=None), old=True, last=True),
    ok("HTTP/1.2 is served as HTTP/1.1", req("GET /echo HTTP/1.2")),
    no("HTTP/1.2 without Host", req("GET /echo HTTP/1.2", host=None)),
    *[no(f"HTTP/{version}", req(f"GET /echo HTTP/{version}"), 505) for version in ("0.9", "2.0", "3.1")],
    no("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
]
VISIBLE = "/!\"#$%&'()*+,-.:;<=>@[]^_`{|}~"
PATHS = {  # RFC 9112, 3.2
    "/echo?a=b&c=%20": "/echo", "/echo?a?b": "/echo", VISIBLE: VISIBLE, "http://a/echo?x=1": "/echo",
    "HTTP://A/echo": "/echo", "https://[::1]:8443/echo": "/echo", "http://a:80": "/", "http://a?x=/echo": "/",
    "http://a#x": "/#x",
}  # fmt: skip
TARGETS = [
    *[ok(target, get(path=target), path=path) for target, path in PATHS.items()],
    *[no(target, get(path=target)) for target in ("*", "a:80", "echo", "http:///echo", "ftp://a/echo")],
    no("absolute-form without Host", req("GET http://a/echo HTTP/1.1", host=None)),
    ok("asterisk-form", req("OPTIONS * HTTP/1.1"), "OPTIONS", "*"),
    ok("authority-form", req("CONNECT a:80 HTTP/1.1"), "CONNECT", "a:80"),
    no("authority-form of nothing", req("CONNECT  HTTP/1.1")),
    no("OPTIONS of a relative target", req("OPTIONS echo HTTP/1.1")),
]
GOOD_HEADERS = ("X:", "X: \xff\x80\ta:b::c", "!#$%&'*+-.^_`|~09azAZ: a")  # RFC 9110, 5.5 and 5.6.2
BAD_HEADERS = (  # RFC 9112, 2.2 and 5
    "X : a", "X\t: a", "X: a\r\n b", "X: a\r\n\tb", "  ", "nonsense", ": a", "X Y: a", "X(Y): a", "X\xe9: a", "X\0: a",
    "X: a\0b", "X: a\x07b", "X: a\x0bb", "X: a\x7fb", "X: a\rb", "X: a\r", "X: a\rContent-Length: 5",
    "X: a\nContent-Length: 5",
)  # fmt: skip
HOSTS = ("Host:a", "Host: \t a\t ", "Host:", "Host: example.com:8080", "Host: [::1]:8080")
BAD_HOSTS = (  # RFC 9112, 3.2
    "X: a", "Host: a\r\nHost: b", "Host: a\r\nHost: a", "Host: a\r\nhOST: b", "Host: a\r\nHost:", "Host: a, b",
    "Host: a b", "Host: a/b", "Host: me@a", "Host: \xe9", "Host : a", " Host: a", "Host: a\n",
)  # fmt: skip
HEADERS = [
    *[ok(ascii(line), get(line)) for line in GOOD_HEADERS],
    *[no(ascii(line), get(line)) for line in BAD_HEADERS],
    *[ok(ascii(line), req(host=line)) for line in HOSTS],
    *[no(ascii(f"only {line}"), req(host=line)) for line in BAD_HOSTS],
    no("no header at all", req(host=None)),
    no("two Hosts on HTTP/1.0", req(OLD, "Host: b")),
    no("bare LF ends the head", b"GET /echo HTTP/1.1\r\nHost: a\r\n\n"),
]
BAD_LENGTHS = (  # RFC 9110, 8.6
    "+5", "-5", "5_0", "5 5", "\xd9\xa5", "\xb2", "0x5", "a", "5.0", "5e0", "", '"5"', "5;", "5,", "5, 5", "5, 6",
    "five", "5\r\nContent-Length: 5", "5\r\nContent-Length: 6", "0\r\ncontent-length: 5",
)  # fmt: skip
LENGTHS = ("0005", "\t5 ", "0" * 9000 + "5")
BODIES = [  # RFC 9112, 6.3
    *[ok(f"body {data[:9]!r}", whole(data), "POST", body=data) for data in (b"", b"\r\n\r\n", PROBE, EVERY_BYTE)],
    *[ok(ascii(f"length {n:.9}"), post(f"Content-Length: {n}"), "POST", body=b"12345") for n in LENGTHS],
    ok("length of zeros", post("Content-Length: 000", body=b""), "POST"),
    ok("body of a GET", get("Content-Length: 5") + b"12345", body=b"12345"),
    ok("PUT without a length", req("PUT /echo HTTP/1.1"), "PUT"),
    no("POST without a length", post(), 411),
    no("POST of HTTP/1.0 without a length", req("POST /echo HTTP/1.0"), 411),
    no("length with an underscored name", post("Content_Length: 5"), 411),
    *[no(ascii(f"length {value}"), post(f"Content-Length: {value}")) for value in BAD_LENGTHS],
    no("bad length of a GET", get("Content-Length: -1")),
    *[no(f"length {n:.20}", post(f"Content-Length: {n}"), 413) for n in ("65537", "9" * 18, "9" * 19, "9" * 9000)],
]
CHUNK = b"5\r\n12345\r\n0\r\n\r\n"
NOT_CHUNKED = ("gzip", "gzip, chunked", "chunked\r\nTransfer-Encoding: chunked", "xchunked", '"chunked"', "")
BAD_CODINGS = ("\x0bchunked", "chunked\r\nContent-Length: 5", "x\r\nContent-Length: 5")
CODINGS = [  # RFC 9112, 6.1 and 6.3
    *[no(ascii(f"coding {each}"), post(f"Transfer-Encoding: {each}", body=CHUNK), 501) for each in NOT_CHUNKED],
    *[no(ascii(f"coding {each}"), post(f"Transfer-Encoding: {each}", body=CHUNK)) for each in BAD_CODINGS],
    no("length and coding", post("Content-Length: 5", "Transfer-Encoding: chunked", body=CHUNK)),
    no("chunked on HTTP/1.0", req("POST /echo HTTP/1.0", "Transfer-Encoding: chunked", body=CHUNK)),
    no("chunked", post("Transfer-Encoding: chunked", body=CHUNK), 411),
    no("chunked in other letters", post("transfer-encoding: ChunkeD", body=CHUNK), 411),
    no("chunked GET", get("Transfer-Encoding: chunked") + CHUNK, 411),
]
CLOSING = ("close", "CLOSE", "foo, close", "foo\r\nConnection: close", "keep-alive,close")
CONNECTIONS = [  # RFC 9112, 9.3 and 9.6; RFC 9110, 10.1.1
    *[ok(ascii(f"Connection: {value}"), get(f"Connection: {value}"), last=True) for value in CLOSING],
    *[ok(f"Connection: {value}", get(f"Connection: {value}")) for value in ("keep-alive", "closed, xclose", "")],
    *[ok(f"1.0, {value}", req(OLD, f"Connection: {value}"), old=True) for value in ("keep-alive", "foo, Keep-Alive")],
    ok("1.0, keep-alive and close", req(OLD, "Connection: keep-alive, close"), old=True, last=True),
    ok("1.0 expects nothing", req(OLD, "Expect: 200-ok"), old=True, last=True),
    ok("expectation without a body", get("Expect: 100-Continue")),
    ok("expectation of a body that is there", whole(b"12345", "Expect: 100-continue"), "POST", body=b"12345"),
    *[no(f"Expect: {value}", whole(b"1", f"Expect: {value}"), 417) for value in ("200-ok", "100-continue, x", "")],
]
CASES = [*REQUEST_LINES, *TARGETS, *HEADERS, *BODIES, *CODINGS, *CONNECTIONS]
REQUEST_AT_LIMITS = req("POST /67890 HTTP/1.1", "X: 1", "Content-Length: 5", body=b"12345")
AT_LIMITS = Limits(head=len(REQUEST_AT_LIMITS) - 9, target=6, headers=3, body=5)
LIMITED = [  # limits, request, what becomes of it
    pytest.param({}, REQUEST_AT_LIMITS, ("POST", "/67890", b"12345", False, False), id="all at the limits"),
    pytest.param({"head": AT_LIMITS.head - 1}, REQUEST_AT_LIMITS, 431, id="head"),
    pytest.param({"headers": 2}, REQUEST_AT_LIMITS, 431, id="headers"),
    pytest.param({"target": 5}, REQUEST_AT_LIMITS, 414, id="target"),
    pytest.param({"target": 5}, REQUEST_AT_LIMITS.replace(b"/67890", b"/67?90"), 414, id="target with a query"),
    pytest.param({"body": 4}, REQUEST_AT_LIMITS, 413, id="body"),
    pytest.param({}, b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, 431, id="head without an end"),
    pytest.param({}, b"GET /" + b"a" * 100_000, 414, id="request line without an end"),
    # A method, two spaces, a version and CRLF in 32 bytes more than a target has, or the line is too long.
    pytest.param({}, b"a" * 36 + b"\r\n" + b"a" * 100, 431, id="request line of the longest kind"),
    pytest.param({}, b"a" * 37 + b"\r\n" + b"a" * 100, 414, id="request line of one byte more"),
]


@pytest.mark.parametrize(("data", "outcome"), CASES)
def test_a_request_is_taken_or_refused_however_it_is_split_and_so_is_the_next(data: bytes, outcome: Any) -> None:
    expected = [outcome] if isinstance(outcome, int) else [outcome, PARSED_PROBE]
    assert outcomes([data + PROBE]) == expected
    if len(data) < 2000:
        assert outcomes([data[i : i + 1] for i in range(len(data))]) == [outcome]
        for cut in range(1, len(data)):
            assert outcomes([data[:cut], data[cut:] + PROBE]) == expected, data[:cut]


@pytest.mark.parametrize(("limits", "data", "outcome"), LIMITED)
def test_the_limits_are_the_largest_sizes_that_are_taken(limits: Any, data: bytes, outcome: Any) -> None:
    limits = replace(AT_LIMITS, **limits)
    for cut in (0, *range(limits.head, limits.head + 5)):
        assert outcomes([data[:cut], data[cut:]], limits) == [outcome], cut


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
        cuts = sorted(chance.choices(range(len(data)), k=chance.choice((1, 10, 200))))
        assert outcomes([data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])]) == expected


KNOWN = {
    "part of a head": (b"POST /echo HTTP", ("-", "-", {}, False)),
    "part of a body": (whole()[:-1], ("POST", "/echo", {"host": "a", "content-length": "5"}, True)),
    "malformed request line": (b"garbage\r\n\r\n", ("-", "-", {}, False)),
    "malformed header": (post("X : a"), ("POST", "/echo", {}, False)),
    # RFC 9110, 5.3
    "repeated header": (get("X: \t a b \t", "x:\xe9"), ("GET", "/echo", {"host": "a", "x": "a b, \xe9"}, False)),
}


@pytest.mark.parametrize(("data", "known"), KNOWN.values(), ids=KNOWN)
def test_the_latest_request_is_known_as_far_as_it_has_come(data: bytes, known: tuple[Any, ...]) -> None:
    parser = Parser(Limits())
    parser.buffer = data
    with contextlib.suppress(HttpError):
        parser.next()
    assert (parser.request.method, parser.request.path, parser.request.headers, parser.in_body) == known


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

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.errors:
            code = self.errors.pop()
            raise OSError(code, errno.errorcode[code])
        connection, address = super().accept()
        accepted = Accepted(fileno=connection.detach())
        accepted.listener = self
        return accepted, address


class Echo(FrontHandler):
    """GET, HEAD, POST and OPTIONS on the paths of the server."""

    server: EchoServer

    def route(self) -> Callable[[Any], None]:
        if self.request.path == "/check-fails":
            raise ValueError("secret")
        if self.request.path not in self.server.routes:
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
        self.server.routes[self.request.path](self)

    def echo(self) -> None:
        self.respond(200, json.dumps([self.request.path, self.request.body.decode("latin-1")]).encode())

    def later(self) -> None:
        self.suspend()
        self.server.waiting.put(self)  # for `EchoServer.complete`

    def holds(self) -> None:
        """Holds up the loop, so that a test can prepare what it finds next."""
        self.server.held.set()
        assert self.server.released.wait(HANG)
        self.echo()


def raises(error: BaseException) -> Any:
    """What fails in place of responding."""
    return Mock(side_effect=error)


class EchoServer(FrontServer):
    """An echo that a test can look into."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.listener, self.clock = Listener(), clock
        super().__init__(("127.0.0.1", 0), Echo, limits, listener=self.listener)
        self.routes: dict[str, Callable[[Echo], object]] = {
            "/": Echo.echo, "*": Echo.echo, "/echo": Echo.echo, "/later": Echo.later, "/holds": Echo.holds,
            "/submitted": lambda each: (each.suspend(), self.submit(self.call_soon, each.resume, each.echo)),
            "/gathers": lambda handler: (handler.suspend(), self.gathered.append(handler)),
            "/empty": lambda handler: handler.respond(202),
            "/medium": lambda handler: handler.respond(200, LARGE[:10_000]),
            "/large": lambda handler: handler.respond(200, LARGE, content_type="text/plain"),
            "/refuses": raises(HttpError(409, "no", {"X-Reason": "busy"})), "/fails": raises(RuntimeError("secret")),
            "/refuses-and-closes": raises(HttpError(409, "no", close=True)), "/breaks": raises(ZeroDivisionError()),
        }  # fmt: skip
        self.untranslatable: Any = ZeroDivisionError
        self.seen: list[str] = []  # the path of every request served
        self.waiting: queue.Queue[Echo] = queue.Queue()  # the requests to /later
        self.gathered: list[Echo] = []  # the requests to /gathers that wait for the end of the iteration
        self.iterations = 0
        self.at_end: Callable[[], object] = lambda: None  # runs at the end of each iteration
        self.held, self.released = threading.Event(), threading.Event()
        self.marks = threading.Semaphore(0)  # many at the end: nobody waits for a loop that is over
        self.thread = threading.Thread(target=lambda: (self.serve_forever(), self.marks.release(10_000)), daemon=True)
        self.stack = contextlib.ExitStack()  # of clients to close

    def end_of_iteration(self) -> None:
        self.iterations += 1
        self.at_end()
        gathered, self.gathered = self.gathered, []
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

    def read(self, complete: Callable[[bytes], bool]) -> None:
        while not complete(self.received):
            data = self.socket.recv(65536)
            assert data, f"the connection ended after {self.received[:200]!r}"
            self.received += data

    def head(self) -> tuple[str, dict[str, str]]:
        """The status line and the headers of the next response, 100 Continue included."""
        self.read(lambda received: b"\r\n\r\n" in received)
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        line, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        assert len(headers) == len(lines), f"a header was sent twice: {lines}"
        return line, headers

    def response(self, method: str = "GET") -> Response:
        """The next response, which is to a request of this method."""
        line, headers = self.head()
        version, status, phrase = line.split(" ", 2)
        assert (version, len(status), phrase[:1].isupper()) == ("HTTP/1.1", 3, True)
        length = int(headers["content-length"])
        assert ("date" in headers, "server" in headers, "content-type" in headers) == (True, False, length > 0)
        length = 0 if method == "HEAD" else length
        self.read(lambda received: len(received) >= length)
        body, self.received = self.received[:length], self.received[length:]
        return Response(int(status), headers, body)

    def echoed(self) -> tuple[str, str]:
        """The path and the body that the next response echoes."""
        path, body = json.loads(self.response().body)
        return path, body

    def ended(self) -> bool:
        """Whether nothing else comes before the server closes its side."""
        return not (self.received or self.socket.recv(1))

    def silent(self) -> bool:
        """Whether there is nothing to read now, not even an end."""
        return not self.received and not select.select([self.socket], [], [], 0)[0]

    def works(self) -> bool:
        """Whether the connection takes a request and responds to it."""
        return self.send(PROBE).echoed() == ("/", "")


@contextlib.contextmanager
def front(limits: Limits = Limits(), *, driven: bool = True) -> Iterator[EchoServer]:
    """A running server; when the block ends, all that is left of it is dropped at once."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(0.0)
        if driven:
            patch.setattr(http_front, "time", SimpleNamespace(monotonic=clock, time=lambda: MIDNIGHT + clock()))
        server = EchoServer(limits, clock)
        server.thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown(0.0)
            server.thread.join(HANG)
            server.stack.close()
            server.server_close()
            assert not server.thread.is_alive(), "serve_forever did not return"


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with front() as running:
        yield running


STEPS: dict[str, Callable[[EchoServer, Client], object]] = {
    "nothing comes": lambda server, client: client.silent(),
    "100 Continue": lambda server, client: client.head() == ("HTTP/1.1 100 Continue", {}),
    "the end": lambda server, client: client.ended(),
    "still open": lambda server, client: server.open_connections == 1,
    "dropped": lambda server, client: server.open_connections == 0,
    "the loop rests": lambda server, client: server.rests(),
    "the loop ends": lambda server, client: not (server.thread.join(HANG) or server.thread.is_alive()),
    "> end": lambda server, client: not client.end(),
    "> reset": lambda server, client: not client.reset(),
    "> read a little": lambda server, client: client.socket.recv(10_000),
    "> complete": lambda server, client: not server.complete(),
    "> respond at length": lambda server, client: not server.complete(server.routes["/large"]),
    "> suspend again": lambda server, client: not server.complete(Echo.later),
    "one write": lambda server, client: len(server.listener.sizes) == 1,
    "writes of the right size": lambda server, client: 0 <= max(server.listener.sizes) - http_front.SEND_AHEAD < 10_500,
    "> fail": lambda server, client: not server.complete(raises(ZeroDivisionError())),
    "> shutdown": lambda server, client: not server.shutdown(LONG_TIME),
    "> break translate": lambda server, client: setattr(server, "untranslatable", HttpError) is None,
    "> take 5": lambda server, client: not server.listener.takes.append(5),
}


def play(server: EchoServer, client: Client, *steps: Any) -> None:
    """Bytes are sent, a float moves the clock, an int is the status of the next response, a dict some of its headers,
    a tuple what it echoes, a list the paths served so far; a text is one of `STEPS`, once the loop has caught up."""
    for step in steps:
        if isinstance(step, bytes):
            client.send(step)
        elif isinstance(step, float):
            server.advance(step)
        elif isinstance(step, int):
            response = client.response()
            assert response.status == step
        elif isinstance(step, dict):
            assert {name: response.headers.get(name) for name in step} == step
        elif isinstance(step, tuple):
            assert client.echoed() == step
        elif isinstance(step, list):
            assert server.seen == step
        else:
            server.settle(5)
            assert STEPS[step](server, client), step


EXPIRES = (9.75, "nothing comes", 0.25)  # the time for a head or a body passes
LAST_CALL = (0.75, "nothing comes", 0.25)  # and the time that the shutdown leaves to half a request
ECHOED, LATER, LARGE_GET, GARBAGE = ("/echo", "12345"), get(path="/later"), get(path="/large"), b"garbage\r\n\r\n"
EXPECTS = whole(b"12345", "Expect: 100-continue")[:-5]
HALF_HEAD, HALF_BODY = PROBE[:-1], whole()[:-1]
MIXED = [(("/echo", "/submitted", "/gathers")[i % 3], str(i)) for i in range(600)]
CLOSES, STAYS = {"connection": "close"}, {"connection": None}


def refused(data: bytes, status: int) -> tuple[Any, ...]:
    """RFC 9112, 9.3: what was not read never becomes the next request, but nor does a reset take the response away."""
    return (data, status, CLOSES, {"content-type": "application/json"}, PROBE, "the end", [])


SCRIPTS: dict[str, tuple[Any, ...]] = {
    "refused: garbage": refused(GARBAGE, 400),
    "refused: malformed length": refused(post("Content-Length: +5", body=b""), 400),
    "refused: no length": refused(post(body=b""), 411),
    "refused: body over the limit": refused(post("Content-Length: 65537", body=b""), 413),
    "refused: body not yet sent, path": refused(EXPECTS.replace(b"/echo", b"/nothing"), 404),
    "refused: body not yet sent, method": refused(EXPECTS.replace(b"POST", b"PUT"), 405),
    "refused: body not yet sent, unknown method": refused(EXPECTS.replace(b"POST", b"BREW"), 501),
    "kept: path": (get(path="/nothing") + whole(path="/nothing") + PROBE, 404, 404, ("/", "")),
    "kept: method": (req("DELETE /echo HTTP/1.1") + PROBE, 405, {"allow": "GET"}, ("/", "")),
    "kept: unknown method": (req("BREW / HTTP/1.1", "Content-Length: 5", body=b"GET /") + PROBE, 501, ("/", "")),
    "kept: OPTIONS *": (req("OPTIONS * HTTP/1.1") + PROBE, ("*", ""), ("/", "")),
    "kept: refusal": (get(path="/refuses") + PROBE, 409, {"x-reason": "busy"}, ("/", "")),
    "kept: 1.0": (req(OLD, "Connection: keep-alive"), 200, {"connection": "keep-alive"}, PROBE, 200, STAYS),
    "last: Connection: close": (get("Connection: close") + PROBE * 99, 200, CLOSES, "the end", ["/echo"]),
    "last: refusal that closes": (get(path="/refuses-and-closes") + PROBE, 409, CLOSES, "the end"),
    "last: HTTP/1.0": (req(OLD) + PROBE, 200, CLOSES, "the end", ["/echo"]),
    "refused: much more": (GARBAGE + b"x" * 1_000_000, 400, CLOSES, "the end"),
    "in order: quick and slow": (b"".join(whole(body.encode(), path=path) for path, body in MIXED), *MIXED),
    "in order: large and small": (LARGE_GET + PROBE + LARGE_GET + PROBE, 200, ("/", ""), 200, ("/", "")),
    "in portions": (get(path="/medium") * 100, *[200] * 100, "writes of the right size"),
    # Parsed headers are reused, but for the same method and version only
    "same headers: method": (get() * 2 + post(body=b"") + PROBE, 200, 200, 411, "the end"),
    "same headers: version": (get() * 2 + req(OLD) + PROBE, 200, 200, 200, CLOSES, "the end"),
    "kept: byte by byte": (*[step for byte in b"\r\n" + whole() for step in (bytes([byte]), 0.0)], ECHOED),
    "kept: suspended twice": (LATER, "> suspend again", "> complete", 200),
    "one write": (PROBE * 10 + get(path="/gathers") + PROBE, *[200] * 12, "one write"),
    # RFC 9110, 10.1.1
    "100 Continue: once": (EXPECTS, "100 Continue", b"123", "nothing comes", b"45", ECHOED),
    "100 Continue: not for a body that is there": (EXPECTS + b"12345" + PROBE, ECHOED, ("/", "")),
    "100 Continue: not for HTTP/1.0": (EXPECTS.replace(b"/1.1", b"/1.0"), "nothing comes", b"12345", ECHOED),
    "half-closed: part of a head": (HALF_HEAD, "> end", "the end", "dropped", []),
    "half-closed: part of a body": (HALF_BODY, "> end", "the end", "dropped", []),
    "half-closed: part behind another": (LATER + HALF_BODY, "> end", "> complete", 200, "the end", ["/later"]),
    "half-closed: gathered": (get(path="/gathers") * 2 + PROBE, "> end", 200, 200, 200, "the end", "dropped"),
    "half-closed: large": (LARGE_GET * 2 + PROBE, "> end", 200, 200, 200, "the end", "dropped"),
    "half-closed: suspended": (LATER * 2, "> end", "the loop rests", "> complete", 200, "> complete", 200, "the end"),
    # Deadlines are totals
    "deadline: new connection": ("the loop rests", *EXPIRES, "the end"),
    "deadline: head": (HALF_HEAD, "the loop rests", *EXPIRES, 408, "the end"),
    "deadline: head that drips": (HALF_HEAD, *[b"X", 1.0] * 9, "nothing comes", b"X", 1.0, 408, "the end"),
    "deadline: empty lines that drip": (*[b"\r\n", 1.0] * 9, "nothing comes", 1.0, "the end"),
    "deadline: body": (HALF_BODY, *EXPIRES, 408, "the end", []),
    "deadline: body that drips": (whole(b"x" * 99)[:-98], *[b"x", 1.0] * 9, "nothing comes", 1.0, 408),
    "deadline: head and body have one each": (HALF_BODY[:9], 9.75, HALF_BODY[9:], 9.75, b"5", ECHOED),
    "deadline: idle": (PROBE, 200, "the loop rests", 59.75, "nothing comes", 0.25, "the end"),
    "deadline: idle but for empty lines": (PROBE, 200, *[b"\r\n", 9.5] * 6, "nothing comes", 3.0, "the end"),
    "deadline: head after idleness": (PROBE, 200, 59.0, HALF_HEAD, *EXPIRES, 408, "the end"),
    "deadline: head behind a response": (PROBE + HALF_HEAD, 200, *EXPIRES, 408, "the end"),
    "deadline: none after idleness": (PROBE, 200, LATER, LONG_TIME, "nothing comes", "> complete", 200),
    "deadline: head behind a suspended request": (LATER + HALF_HEAD, LONG_TIME, "> complete", 200, *EXPIRES, 408),
    "deadline: write-blocked": (LARGE_GET, "the loop rests", *["still open", 1.0] * 10, "dropped"),
    "deadline: head behind a blocked response": ("> take 5", PROBE + HALF_HEAD, 200, *EXPIRES, 408),
    "deadline: write-blocked and slow": (LARGE_GET, *["still open", "> read a little", 1.0] * 10, "dropped"),
    "deadline: all of it after a late read": (LARGE_GET, 9.0, 200, 59.0, PROBE, 200),
    "deadline: refused": (GARBAGE, 400, "the end", "the loop rests", b"x", 1.5, "still open", 0.5, "dropped"),
    # A connection that stalls does not keep the loop busy
    "rest: more than is read ahead": (LATER + PROBE * 600, "the loop rests", "> complete", *[200] * 601),
    "rest: write-blocked, half-closed": (LARGE_GET, "> end", "the loop rests", "still open"),
    # A peer that goes leaves its place
    "gone: reset in a body": (HALF_BODY, "> reset", "dropped"),
    "gone: refused, then half-closed": (GARBAGE, "> end", 400, "the end", "dropped"),
    "gone: refused, then reset": (GARBAGE, "> reset", "dropped"),
    "gone: write-blocked, reset": (LARGE_GET + PROBE, "> read a little", "> reset", "the loop rests", "dropped"),
    "gone: suspended, reset": (LATER + PROBE, "> reset", "the loop rests", "> complete", "dropped", ["/later"]),
    "gone: half-closed, reset": (LATER * 3, "> end", "> reset", "the loop rests", "> respond at length", "dropped"),
    "gone: last response": (PROBE * 100 + get("Connection: close"), *[200] * 101, "the end", "dropped"),
    # A graceful shutdown
    "shutdown: no connection": ("> end", "dropped", "> shutdown", "the loop ends"),
    "shutdown: new connection": ("> shutdown", 0.15, "nothing comes", 0.1, "the end", "the loop ends"),
    "shutdown: idle": (PROBE, 200, "> shutdown", 0.15, "nothing comes", 0.1, "the end", "the loop ends"),
    "shutdown: idle, then used": (PROBE, 200, "> shutdown", 0.15, PROBE, 200, CLOSES, "the end", "the loop ends"),
    "shutdown: head": (HALF_HEAD, "> shutdown", 0.75, b"\n", 200, CLOSES, "the end", "the loop ends"),
    "shutdown: body": (HALF_BODY, "> shutdown", 0.75, b"5", 200, CLOSES, "the end", "the loop ends"),
    "shutdown: late head": (HALF_HEAD, "> shutdown", *LAST_CALL, 408, "> reset", "the loop ends"),
    "shutdown: late body": (HALF_BODY, "> shutdown", *LAST_CALL, 408, 1.0, "the loop ends"),
    "shutdown: write-blocked": (LARGE_GET, "> shutdown", 0.75, "still open", 0.25, "the loop ends"),
    "shutdown: late read": (LARGE_GET, "> shutdown", 0.75, 200, "nothing comes", 0.25, "the end"),
    "shutdown: suspended": (LATER + PROBE, "> shutdown", 1800.0, "nothing comes", "> complete", 200, CLOSES,
           "the end", "> end", "the loop ends", ["/later"]),
}  # fmt: skip


@pytest.mark.parametrize("steps", SCRIPTS.values(), ids=SCRIPTS)
def test_a_connection_goes_as_written_and_nothing_is_logged(server: EchoServer, caplog: Log, steps: Any) -> None:
    caplog.set_level(logging.INFO)
    play(server, server.client(), *steps)
    assert caplog.messages == []


STATUSES = {"/submitted": 200, "/large": 200, "/empty": 202, "/refuses": 409, "/fails": 500, "/check-fails": 500}


@pytest.mark.parametrize(("path", "status"), STATUSES.items())
def test_a_response_to_head_has_the_headers_of_get_and_no_body(server: EchoServer, path: str, status: int) -> None:
    client = server.client().send(get(path=path) + req(f"HEAD {path} HTTP/1.1") + PROBE)
    response = client.response()
    assert client.response("HEAD") == (status, response.headers, b"")
    assert (response.status, client.echoed()) == (status, ("/", ""))


def test_a_response_has_the_date_of_its_second(server: EchoServer, caplog: Log) -> None:
    dates = []
    for seconds in (0.0, 0.75, 0.125, 0.25, 86_400.0):
        server.advance(seconds)
        client = server.client().send(PROBE)
        dates.append(client.response().headers["date"])
        client.socket.close()  # the next connection has its file descriptor
    days = ["Wed, 15 Nov 2023 00:00:00 GMT"] * 3 + ["Wed, 15 Nov 2023 00:00:01 GMT", "Thu, 16 Nov 2023 00:00:01 GMT"]
    assert (dates, caplog.messages) == (days, [])


LOGGED = [
    ("/echo?48123456789", "127.0.0.1 (shop) GET /echo 200"), ("/48123456789", "127.0.0.1 GET /*** 404"),
    ("/a/%2b48123456789/1234", "127.0.0.1 GET /a/***/*** 404"), ("/123/1234x", "127.0.0.1 GET /123/1234x 404"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "line"), LOGGED)
def test_the_debug_log_shows_no_phone_numbers(server: EchoServer, caplog: Log, target: str, line: str) -> None:
    caplog.set_level(logging.DEBUG)
    server.routes["/echo"] = lambda handler: (setattr(handler.request, "client", "shop"), handler.respond(200))[1]
    play(server, server.client(), get(path=target), int(line[-3:]), "> reset", "dropped")
    assert [record.levelname for record in caplog.records] == ["DEBUG"] * 2
    assert server.responses == {("other", int(line[-3:])): 1}
    assert caplog.messages == [line, "127.0.0.1 connection closed: reading: [Errno 104] Connection reset by peer"]


def test_nothing_of_a_body_is_kept_once_it_has_its_response_or_its_peer_has_gone(server: EchoServer) -> None:
    play(server, server.client(), whole(b"private" * 1000, path="/empty"), 202, "nothing comes")
    play(server, server.client(), LATER + whole(b"private"), "nothing comes", "> reset", "still open")
    play(server, server.client(), GARBAGE + b"private", 400, "the end", b"private", "the loop rests")
    kept = [value for each in gc.get_objects() if isinstance(each, (Parser, http_front.Request))
            for value in (getattr(each, "body", b""), getattr(each, "buffer", b""))]  # fmt: skip
    assert kept and not any(b"private" in value for value in kept)


def test_requests_behind_a_suspended_one_wait_for_it_and_nobody_else_does(server: EchoServer) -> None:
    clients = [server.client().send(whole(str(i).encode(), path="/later") + whole()) for i in range(3)]
    handlers = [server.waiting.get(timeout=HANG) for _ in clients]
    assert server.client().works()
    assert [client.silent() for client in clients] == [True] * 3
    for handler in reversed(handlers):
        server.waiting.put(handler)
        server.complete()
        server.settle()
    for i, client in enumerate(clients):
        play(server, client, ("/later", str(i)), ECHOED)


@pytest.mark.parametrize("first", [LATER, whole(path="/large")], ids=["a suspended request", "a blocked response"])
def test_a_peer_cannot_fill_the_memory_behind_a_response_under_way(first: bytes, server: EchoServer) -> None:
    client, sent, data = server.client(), 0, memoryview(PROBE * 100)
    client.send(first)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    client.socket.setblocking(False)
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            sent += client.socket.send(data[sent % len(PROBE) :])
        server.settle(1)
    assert http_front.READ_AHEAD <= sent < 200_000  # some of it is in the kernel
    client.socket.settimeout(HANG)
    if first is LATER:
        server.complete()
    assert {client.response().status for _ in range(sent // len(PROBE) + first.count(b"HTTP/1.1"))} == {200}


def test_requests_of_an_iteration_are_gathered(server: EchoServer) -> None:
    clients, groups = [server.client() for _ in range(3)], []
    assert [client.works() for client in clients] == [True] * 3
    server.at_end = lambda: groups.append(len(server.gathered))
    server.client().send(get(path="/holds"))
    assert server.held.wait(HANG)
    for client in clients:
        client.send(get(path="/gathers") * 2 + PROBE)
    server.released.set()
    assert [[client.echoed()[0] for _ in range(3)] for client in clients] == [["/gathers", "/gathers", "/"]] * 3
    assert [size for size in groups if size] == [3, 3]  # a connection's second request waits for its first


def test_an_error_of_a_call_or_at_the_end_of_an_iteration_is_logged(server: EchoServer, caplog: Log) -> None:
    server.call_soon(raises(RuntimeError("a bug")), None)
    server.settle()
    server.at_end = lambda: 1 / 0
    assert server.client().works()
    kinds = [record.exc_info and record.exc_info[0] for record in caplog.records]
    assert kinds[:2] == [RuntimeError, ZeroDivisionError]


def test_calls_from_other_threads_run_in_the_loop_and_none_is_lost(server: EchoServer) -> None:
    calls: list[threading.Thread] = []
    together(8, lambda _: [server.call_soon(lambda: calls.append(threading.current_thread())) for _ in range(500)])
    server.settle()
    assert calls == [server.thread] * 4000


WAKES = {
    "head": (Limits(read_timeout=0.05), HALF_HEAD), "idle": (Limits(idle_timeout=0.05), PROBE),
    "write-blocked": (Limits(write_timeout=0.05), LARGE_GET), "shutdown": (Limits(), LATER),
}  # fmt: skip


@pytest.mark.parametrize(("limits", "data"), WAKES.values(), ids=WAKES)
def test_the_loop_wakes_by_itself_at_a_deadline(limits: Limits, data: bytes) -> None:
    with front(limits, driven=False) as server:
        gone, client = threading.Event(), server.client().send(data)
        server.settle()
        server.at_end = lambda: server.open_connections or gone.set()
        if data == LATER:
            server.shutdown(0.05)
        if data == HALF_HEAD:
            play(server, client, 408, "> end")
        server.settle()
        assert gone.wait(HANG)


@pytest.mark.parametrize(("most", "errors"), [(3, []), (9, [errno.EMFILE])])
@pytest.mark.parametrize("leave", [Client.end, Client.reset])
def test_a_connection_for_which_there_is_no_room_waits_until_another_closes(most: int, errors: Any, leave: Any) -> None:
    with front(Limits(connections=most)) as server:
        clients = [server.client() for _ in range(3)]
        assert [client.works() for client in clients] == [True] * 3
        server.listener.errors = errors[:]
        fourth = server.client().send(PROBE)
        assert (server.rests(), fourth.silent()) == (True, True)
        assert [client.works() for client in clients] == [True] * 3
        leave(clients[1])
        assert fourth.echoed() == ("/", "")
        assert server.open_connections == 3


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_file_descriptors_it_pauses_and_says_so_twice(code: int, caplog: Log) -> None:
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


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EAGAIN])
def test_a_connection_that_cannot_be_accepted_costs_nobody_else_anything(server: EchoServer, code: int) -> None:
    server.listener.errors = [code]
    assert server.client().works()


@pytest.mark.parametrize("timeouts", [(10.0,), (10.0, LONG_TIME), (LONG_TIME, 10.0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_shutdown_ends_at_its_shortest_timeout(server: EchoServer, caplog: Log, timeouts: Any, at_once: bool) -> None:
    client = server.client().send(LATER)
    server.settle()
    for timeout in timeouts:
        server.shutdown(timeout)
        server.settle(0 if at_once else 3)
    play(server, client, 9.5, "nothing comes")
    with pytest.raises(ConnectionRefusedError):
        server.client()
    play(server, client, 0.5, "the loop ends")
    server.server_close()
    server.complete()  # after the end, which hurts nobody
    assert (client.ended(), server.responses, caplog.messages) == (True, {}, [])


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
    play(server, client, 200, CLOSES, "the end")


def test_shutdown_at_the_connection_limit_is_quiet(caplog: Log) -> None:
    with front(Limits(connections=2)) as server:
        first = server.client()
        assert first.works()
        first.send(get(path="/holds") + HALF_HEAD)
        assert server.held.wait(HANG)
        server.shutdown(LONG_TIME)  # the loop finds this call and the second connection in the same iteration
        second, _ = server.client().send(HALF_HEAD), server.client()  # and one for which there is no room
        server.released.set()
        play(server, second, "nothing comes", PROBE[-1:], 200, CLOSES)
    assert caplog.messages == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_taken_from_the_constructor_to_server_close(host: str) -> None:
    server = FrontServer((host, 0), Silent)
    address = server.server_address
    assert server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # connections inherit it
    with pytest.raises(OSError) as caught:
        FrontServer(address[:2], Silent)
    assert caught.value.errno == errno.EADDRINUSE
    server.server_close()
    FrontServer(address[:2], Silent, workers=0).server_close()


class Silent(FrontHandler):
    """Has nothing to say."""

    def route(self) -> Callable[[Any], None]:
        return lambda handler: handler.respond(204)


@pytest.mark.parametrize("peer", ["local", "127.0.0.1"])
def test_connections_wait_in_the_backlog_until_it_serves(tmp_path: Path, peer: str, caplog: Log) -> None:
    caplog.set_level(logging.DEBUG)
    listener = socket.create_server(str(tmp_path / "front"), family=socket.AF_UNIX) if peer == "local" else None
    server = FrontServer(("127.0.0.1", 0), Silent, listener=listener)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(server.socket.family)) for _ in range(100)]
        for client in clients:
            client.settimeout(HANG)
            client.connect(server.server_address)
            client.sendall(get("Connection: close"))
        server.shutdown()
        server.serve_forever()
        server.server_close()
        assert {client.recv(24) for client in clients} == {b"HTTP/1.1 204 No Content\r"}
    assert set(caplog.messages) == {f"{peer} GET /echo 204", f"{peer} connection closed: done"}


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
    assert (server.open_connections, client.ended()) == (0, True)
    server.stack.close()


FAILURES = [
    pytest.param(raises(RuntimeError("secret")), 500, ["failed"], id="error"),
    pytest.param(raises(SystemExit(1)), 500, ["failed"], id="exit"),  # as of a thread that called sys.exit()
    pytest.param(raises(KeyError("secret")), 422, [], id="known error"),
    pytest.param(raises(HttpError(409, "no")), 409, [], id="refusal"),
    pytest.param(lambda handler: None, 500, ["failed"], id="no response"),
    pytest.param(lambda handler: handler.respond(200, headers={"X": "€"}), 500, ["failed"], id="header"),
    pytest.param(lambda handler: (handler.respond(200), 1 / 0), 200, ["failed after its response"], id="too late"),
    pytest.param(lambda handler: [handler.respond(200) for _ in "ab"], 200, ["failed after its response"], id="twice"),
]


@pytest.mark.parametrize(("fail", "status", "logged"), FAILURES)
@pytest.mark.parametrize("path", ["/123456", "/later"])
def test_a_request_that_fails_costs_only_its_own_response(
    server: EchoServer, caplog: Log, fail: Any, status: int, logged: list[str], path: str
) -> None:
    server.routes["/123456"] = fail
    client = server.client().send(get(path=path) + PROBE)
    if path == "/later":
        server.complete(fail)
    response = client.response()
    assert (response.status, b"secret" in response.body, client.echoed()) == (status, False, ("/", ""))
    assert caplog.messages == [f"GET {path.replace('123456', '***')} {text}" for text in logged]
    assert all(record.levelname == "ERROR" and record.exc_info for record in caplog.records)


BREAKS: dict[str, tuple[Any, ...]] = {
    "at once": (get(path="/breaks"),),
    "refused": ("> break translate", GARBAGE),
    "too late": ("> break translate", HALF_HEAD, 10.0),
    "resumed": (LATER, "> fail"),
    "behind responses": (PROBE * 2 + get(path="/breaks"), ("/", ""), ("/", "")),
    "behind a blocked response": (LARGE_GET + get(path="/breaks"), 200),
}


@pytest.mark.parametrize("steps", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("used", [True, False])
def test_an_error_in_handling_an_error_is_logged_and_costs_that_connection(
    server: EchoServer, caplog: Log, monkeypatch: pytest.MonkeyPatch, steps: Any, used: bool
) -> None:
    monkeypatch.setattr(http_front, "SEND_AHEAD", 1)  # each response is sent before the next request is served
    client = server.client()
    if used:
        assert client.works()
    play(server, client, *steps, "the end", "dropped")
    assert "the server's loop goes on after an error" in caplog.messages
    assert server.client().works()


def test_the_table_of_states_is_total() -> None:
    for state in State:
        assert set(state.followers) <= set(State.__members__)
        assert isinstance(getattr(Limits(), state.timeout) if isinstance(state.timeout, str) else state.timeout, float)
        assert ("CLOSED" in state.followers) == (state is not State.CLOSED)
        assert ("BUSY" in state.followers) == state.serves
    assert State.CLOSED.followers == []


@pytest.mark.parametrize("seed", range(30))
def test_a_random_walk_of_events_never_leaves_the_table_of_states(server: EchoServer, caplog: Log, seed: int) -> None:
    chance, client = random.Random(seed), server.client()
    kinds = [PROBE, PROBE, whole(), LATER, LARGE_GET, EXPECTS + b"12345"]
    ends = [GARBAGE, get("Connection: close"), EXPECTS.replace(b"/echo", b"/nothing")]
    data = bytearray(b"".join(chance.choices(kinds, k=10)) + chance.choice(ends) + PROBE)
    client.socket.setblocking(False)

    def send() -> None:
        size = chance.choice((1, 10, 50, 100))
        client.send(bytes(data[:size]))
        del data[:size]

    events = 40 * [send, send, send, lambda: client.socket.recv(200_000), lambda: server.advance(chance.choice((1, 5))),
                   lambda: server.waiting.empty() or server.complete()]  # fmt: skip
    for _ in range(60):
        with contextlib.suppress(OSError):
            chance.choice([*events, client.end, client.reset, lambda: server.shutdown(20.0)])()
        server.settle()
    assert caplog.messages == []

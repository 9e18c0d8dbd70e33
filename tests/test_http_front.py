"""The HTTP front by itself: raw sockets against a handler that knows nothing of SMS.

Time is the tests' own: `ClockedServer` takes `now` from them, so no test waits for a deadline.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

import http_front
from http_front import FrontHandler, FrontServer, HttpError, Limits

HANG = 30.0  # seconds after which a test has hung; nothing is paced by it
OPEN, CLOSED = "open", "closed"  # what becomes of the connection after the answer
LARGE = b"x" * 500_000  # far more than the sockets of these tests buffer
LONG_TIME = 3600.0  # seconds, beyond every limit
SMALL_BUFFER = 8192
STATUS_LINE = re.compile(r"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+")


# A front with an echo, and what can go wrong behind it


class Echo(FrontHandler):
    """One path for every way to answer; GET, HEAD, POST and OPTIONS on each."""

    server: EchoServer

    def route(self) -> Callable[[Any], None]:
        if self.request.path == "/check-fails":
            raise ValueError("secret of the check")
        if self.request.path not in ("*", *self.routes):
            raise HttpError(404, "nothing here")
        if self.request.method not in ("GET", "HEAD", "POST", "OPTIONS"):
            raise HttpError(405, "not allowed", {"Allow": "GET, HEAD, POST, OPTIONS"})
        return Echo.allow if self.request.method == "OPTIONS" else Echo.run

    def translate(self, error: Exception) -> HttpError | None:
        if isinstance(error, KeyError):
            return HttpError(422, "translated")
        if isinstance(error, ZeroDivisionError):
            raise TypeError("a bug in translate")
        return super().translate(error)

    def run(self) -> None:
        self.server.seen.append((self.request.method, self.request.path, self.request.body))
        self.routes[self.request.path](self)

    def allow(self) -> None:
        self.respond(200, headers={"Allow": "GET, HEAD, POST, OPTIONS"})

    def echo(self, result: Any = None) -> None:
        doc = {"method": self.request.method, "path": self.request.path, "body": self.request.body.decode("latin-1"), "result": result}
        self.respond(200, json.dumps(doc).encode())

    def defer(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        """Responds by `then(result)` once the Future is done."""
        self.suspend()
        future.add_done_callback(lambda done: self.server.call_soon(self.resume, lambda: then(done.result())))

    def later(self) -> None:
        future: Future[Any] = Future()
        self.server.pending.put(future)
        self.defer(future, self.echo)

    def submitted(self) -> None:
        self.defer(self.server.submit(lambda: "from a thread"), self.echo)

    def twice_later(self) -> None:
        self.defer(self.server.submit(lambda: None), lambda _: self.submitted())

    def large(self) -> None:
        self.respond(200, LARGE, content_type="text/plain")

    def large_later(self) -> None:
        self.defer(self.server.submit(lambda: None), lambda _: self.large())

    def raises(self) -> None:
        raise RuntimeError("secret of the handler")

    def raises_later(self) -> None:
        self.defer(self.server.submit(self.raises), self.echo)

    def raises_after_later(self) -> None:
        self.defer(self.server.submit(lambda: None), lambda _: self.raises())

    def raises_known(self) -> None:
        raise KeyError("secret of the domain")

    def refuses(self) -> None:
        raise HttpError(409, "no", {"X-Reason": "busy"})

    def refuses_and_closes(self) -> None:
        raise HttpError(409, "no, and go", close=True)

    def cancelled(self) -> None:
        future: Future[Any] = Future()
        future.cancel()
        self.defer(future, self.echo)

    def empty(self) -> None:
        self.respond(202)

    def holds(self) -> None:
        """Holds up the whole loop, so that a test can prepare what happens next."""
        self.server.held.set()
        assert self.server.released.wait(HANG)
        self.echo()

    def gathers(self) -> None:
        self.suspend()
        self.server.gathered.append(self)

    def misspells(self) -> None:
        self.respond(200, headers={"X-Price": "9 \u20ac"})

    def stops(self) -> None:
        self.server.shutdown()
        self.echo()

    def interrupts(self) -> None:
        raise KeyboardInterrupt

    def forgets(self) -> None:
        self.server.forgotten += 1
        if self.server.forgotten > 1:  # or a front that runs it for ever would hang the test
            raise HttpError(500, "run again", close=True)

    def answers_and_raises(self) -> None:
        self.echo()
        raise RuntimeError("after the answer")

    def unknown_status(self) -> None:
        raise HttpError(799, "no such status")

    def broken_translation_later(self) -> None:
        self.defer(self.server.submit(lambda: 1 / 0), self.echo)

    routes: dict[str, Callable[[Echo], None]] = {
        "/": echo,
        "/echo": echo,
        "/later": later,
        "/submitted": submitted,
        "/twice-later": twice_later,
        "/large": large,
        "/large-later": large_later,
        "/raises": raises,
        "/raises-later": raises_later,
        "/raises-after-later": raises_after_later,
        "/raises-known": raises_known,
        "/refuses": refuses,
        "/refuses-and-closes": refuses_and_closes,
        "/cancelled": cancelled,
        "/empty": empty,
        "/holds": holds,
        "/gathers": gathers,
        "/misspells": misspells,
        "/stops": stops,
        "/interrupts": interrupts,
        "/forgets": forgets,
        "/answers-and-raises": answers_and_raises,
        "/unknown-status": unknown_status,
        "/broken-translation-later": broken_translation_later,
    }


class EchoServer(FrontServer):
    """A front with small send buffers that a test can look into."""

    thread: threading.Thread

    def __init__(self, limits: Limits) -> None:
        super().__init__(("127.0.0.1", 0), Echo, limits)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)  # connections inherit it
        self.seen: list[tuple[str, str, bytes]] = []  # method, path and body of every request served
        self.pending: queue.Queue[Future[Any]] = queue.Queue()  # one for each request to /later
        self.held, self.released = threading.Event(), threading.Event()
        self.forgotten = 0
        self.gathered: list[Echo] = []  # requests to /gathers, answered at the end of the turn
        self.groups: list[int] = []  # how many each time
        self.stack = contextlib.ExitStack()  # of clients to close

    def end_of_iteration(self) -> None:
        while self.gathered:
            gathered, self.gathered = self.gathered, []
            self.groups.append(len(gathered))
            for handler in gathered:
                handler.resume(handler.echo)

    def client(self, receive_buffer: int | None = None) -> Client:
        """A new connection, closed at the end of the test."""
        return self.stack.enter_context(Client(self, receive_buffer))

    def settle(self) -> None:
        """Returns when the loop has handled everything that was sent before, deadlines included."""
        for _ in range(3):  # a deadline is checked after the events of its turn, and may cause others
            done = threading.Event()
            self.call_soon(done.set)
            assert done.wait(HANG), "the loop is stuck"

    def complete(self, result: Any = None) -> None:
        """Completes the longest-deferred request to /later."""
        self.pending.get(timeout=HANG).set_result(result)

    def gone(self) -> bool:
        """Waits until `serve_forever` has returned."""
        self.thread.join(HANG)
        return not self.thread.is_alive()


class ClockedServer(EchoServer):
    """A front whose clock stands still until a test moves it."""

    time = 1000.0
    ticks = 0  # how often the loop has read the time

    @property
    def now(self) -> float:
        return self.time

    @now.setter
    def now(self, value: float) -> None:
        """The loop's own reading of the time is ignored."""
        self.ticks += 1

    def advance(self, seconds: float) -> None:
        self.settle()  # or a deadline that the loop is about to set would count from the new time
        self.time += seconds
        self.settle()

    def gone(self) -> bool:
        """Lets idle connections come to their end, too, whose time begins when they become idle."""
        self.call_soon(self._pass, 50)
        return super().gone()

    def _pass(self, times: int) -> None:
        self.time += http_front.IDLE_CALL
        if times:
            self.call_soon(self._pass, times - 1)

    def rests(self) -> bool:
        """Whether the loop does nothing but what it is asked to."""
        for _ in range(50):  # until what was sent has been read as far as it will be
            self.settle()
        before = self.ticks
        for _ in range(50):
            self.settle()
        return self.ticks - before <= 50 * 3 * 4  # with room: a busy loop makes thousands


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def doc(self) -> Any:
        return json.loads(self.body)

    @property
    def closing(self) -> bool:
        return self.headers.get("connection") == "close"


class Client:
    """A raw connection. Every answer that it reads is checked for what each answer must have."""

    def __init__(self, server: EchoServer, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(HANG)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.socket.connect(server.server_address[:2])
        except OSError:
            self.socket.close()
            raise
        self._received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def end(self) -> Client:
        """Sends a FIN; answers can still be read."""
        self.socket.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Goes away without a FIN, the rude way."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"the connection ended after {self._received[:200]!r}"
        self._received += data

    def head(self) -> tuple[str, list[str]]:
        """The status line and the fields of the next answer, interim ones included."""
        while b"\r\n\r\n" not in self._received:
            self._read()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        line, *fields = head.decode("ascii").split("\r\n")
        return line, fields

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, which is to a request of this method."""
        line, fields = self.head()
        match = STATUS_LINE.fullmatch(line)
        assert match is not None, line
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        assert len(headers) == len(fields), f"a field was sent twice: {fields}"
        assert parsedate_to_datetime(headers["date"]).tzname() == "UTC"
        assert "server" not in headers
        length = int(headers["content-length"])
        assert ("content-type" in headers) == (length > 0)
        length = 0 if method == "HEAD" else length
        parts = [self._received]
        missing = length - len(self._received)
        while missing > 0:
            data = self.socket.recv(65536)
            assert data, f"the connection ended {missing} bytes before its answer"
            parts.append(data)
            missing -= len(data)
        received = b"".join(parts)
        self._received = received[length:]
        return Answer(int(match[1]), headers, received[:length])

    def rest(self) -> bytes:
        """What else comes before the server closes in good order."""
        while data := self.socket.recv(65536):
            self._received += data
        rest, self._received = self._received, b""
        return rest

    def statuses(self) -> list[int]:
        """The statuses of all answers until the server closes in good order."""
        found: list[int] = []
        rest = self._received = self.rest()
        while rest:
            found.append(self.answer().status)
            rest = self._received
        return found

    def silent(self) -> bool:
        """Whether there is nothing to read now, not even an end."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._received
        finally:
            self.socket.settimeout(HANG)
        return False

    def dropped(self) -> bool:
        """Whether the server has let go of the connection already, in good order or not."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(65536):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        finally:
            self.socket.settimeout(HANG)
        return True

    def works(self) -> bool:
        """Whether the connection takes a request and answers it."""
        return self.send(PROBE).answer().doc["path"] == "/"


@contextlib.contextmanager
def front(limits: Limits = Limits(), kind: type[Any] = EchoServer) -> Iterator[Any]:
    """A running front; at its end everything that is left of it goes, without waiting."""
    server = kind(limits)
    server.thread = threading.Thread(target=server.serve_forever, name="front under test", daemon=True)
    server.thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown(0.0)
        gone = server.gone()
        server.stack.close()
        server.server_close()
        assert gone, "serve_forever did not return"


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with front() as running:
        yield running


@pytest.fixture
def clocked() -> Iterator[ClockedServer]:
    with front(kind=ClockedServer) as running:
        yield running


def req(line: str = "GET /echo HTTP/1.1", *fields: str, body: bytes = b"", host: str | None = "Host: a") -> bytes:
    """A request as bytes; strings are latin-1, so that any byte can be written."""
    lines = [line, *([host] if host is not None else []), *fields]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + body


def post(body: bytes, path: str = "/echo", *fields: str) -> bytes:
    return req(f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}", *fields, body=body)


PROBE = req("GET / HTTP/1.1")
ARABIC_FIVE = "٥".encode().decode("latin-1")


# Strict


def case(name: str, request: bytes, status: int, after: str) -> Any:
    return pytest.param(request, status, after, id=name)


def bad(name: str, request: bytes, status: int = 400) -> Any:
    """A request after which nobody can know where the next one begins."""
    return case(name, request, status, CLOSED)


def good(name: str, request: bytes, status: int = 200) -> Any:
    return case(name, request, status, OPEN)


REQUEST_LINES = [  # RFC 9112, 2.2, 2.3, 3
    good("plain GET", req()),
    good("one CRLF before the request", b"\r\n" + req()),
    good("many CRLFs before the request", b"\r\n" * 500 + req()),
    bad("bare LF before the request", b"\n" + req()),
    bad("CR CR LF before the request", b"\r\r\n" + req()),
    bad("space before the method", req(" GET /echo HTTP/1.1")),
    bad("space after the version", req("GET /echo HTTP/1.1 ")),
    bad("two spaces before the target", req("GET  /echo HTTP/1.1")),
    bad("two spaces before the version", req("GET /echo  HTTP/1.1")),
    bad("tab for a space", req("GET\t/echo HTTP/1.1")),
    bad("vertical tab for a space", req("GET\x0b/echo HTTP/1.1")),
    bad("form feed for a space", req("GET /echo\x0cHTTP/1.1")),
    bad("no-break space for a space", req("GET\xa0/echo HTTP/1.1")),
    bad("next line for a space", req("GET /echo\x85HTTP/1.1")),
    bad("file separator for a space", req("GET\x1c/echo HTTP/1.1")),
    bad("space in the target", req("GET /ec ho HTTP/1.1")),
    bad("NUL in the target", req("GET /ec\0ho HTTP/1.1")),
    bad("control character in the target", req("GET /ec\x01ho HTTP/1.1")),
    bad("DEL in the target", req("GET /ec\x7fho HTTP/1.1")),
    bad("UTF-8 in the target", req("GET /łódź HTTP/1.1".encode().decode("latin-1"))),
    bad("latin-1 in the method", req("GËT /echo HTTP/1.1")),
    bad("bare CR in the request line", req("GET /echo\rHTTP/1.1")),
    bad("bare CR ends the request line", b"GET /echo HTTP/1.1\rHost: a\r\n\r\n"),
    bad("bare LF ends the request line", b"GET /echo HTTP/1.1\nHost: a\r\n\r\n"),
    bad("bare LF ends every line", b"GET /echo HTTP/1.1\nHost: a\n\n"),
    bad("only a method", req("GET")),
    bad("HTTP/0.9", b"GET /echo\r\n\r\n"),
    bad("no method", req("/echo HTTP/1.1")),
    bad("method with a separator", req("GE(T /echo HTTP/1.1")),
    bad("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    case("HTTP/1.0 closes", req("GET /echo HTTP/1.0"), 200, CLOSED),
    case("HTTP/1.0 needs no Host", req("GET /echo HTTP/1.0", host=None), 200, CLOSED),
    good("HTTP/1.0 with keep-alive", req("GET /echo HTTP/1.0", "Connection: keep-alive")),
    good("HTTP/1.0 with Keep-Alive among others", req("GET /echo HTTP/1.0", "Connection: foo, Keep-Alive")),
    case("HTTP/1.0 with both", req("GET /echo HTTP/1.0", "Connection: keep-alive, close"), 200, CLOSED),
    good("HTTP/1.2 is served as HTTP/1.1", req("GET /echo HTTP/1.2")),
    bad("HTTP/1.2 needs Host, too", req("GET /echo HTTP/1.2", host=None)),
    bad("HTTP/0.9 in full", req("GET /echo HTTP/0.9"), 505),
    bad("HTTP/2.0", req("GET /echo HTTP/2.0"), 505),
    bad("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    bad("HTTP/3.1", req("GET /echo HTTP/3.1"), 505),
    bad("version without a minor", req("GET /echo HTTP/1")),
    bad("version of two digits", req("GET /echo HTTP/1.10")),
    bad("version with a leading zero", req("GET /echo HTTP/01.1")),
    bad("version with a sign", req("GET /echo HTTP/+1.1")),
    bad("version in Arabic digits", req(f"GET /echo HTTP/1.{ARABIC_FIVE}")),
    bad("lower-case version", req("GET /echo http/1.1")),
    bad("another protocol", req("GET /echo ICY/1.1")),
    good("unknown method", req("BREW /echo HTTP/1.1"), 501),
    good("unknown method with a body", req("BREW /echo HTTP/1.1", "Content-Length: 5", body=b"GET /"), 501),
    good("lower-case method", req("get /echo HTTP/1.1"), 501),
    good("method of every token character", req("!#$%&'*+-.^_`|~09azAZ /echo HTTP/1.1"), 501),
    good("known method on a wrong path", req("DELETE /echo HTTP/1.1"), 405),
    good("unknown path", req("GET /nothing HTTP/1.1"), 404),
    good("OPTIONS of a path", req("OPTIONS /echo HTTP/1.1")),
    good("TRACE", req("TRACE /echo HTTP/1.1"), 405),
]
TARGETS = [  # RFC 9112, 3.2
    good("asterisk-form", req("OPTIONS * HTTP/1.1")),
    bad("asterisk-form for GET", req("GET * HTTP/1.1")),
    good("absolute-form", req("GET http://a/echo HTTP/1.1")),
    good("absolute-form in capitals", req("GET HTTP://A/echo HTTP/1.1")),
    good("absolute-form of https", req("GET https://a:8443/echo?x=1 HTTP/1.1")),
    good("absolute-form without a path", req("GET http://a HTTP/1.1")),
    good("absolute-form with a query and no path", req("GET http://a?x=/echo HTTP/1.1")),
    bad("absolute-form without an authority", req("GET http:///echo HTTP/1.1")),
    bad("absolute-form of another scheme", req("GET ftp://a/echo HTTP/1.1")),
    bad("absolute-form still needs Host", req("GET http://a/echo HTTP/1.1", host=None)),
    bad("authority-form for GET", req("GET a:80 HTTP/1.1")),
    good("authority-form for CONNECT", req("CONNECT a:80 HTTP/1.1"), 404),
    bad("relative target", req("GET echo HTTP/1.1")),
    good("query", req("GET /echo?a=b&c=%20 HTTP/1.1")),
    good("target of 8 KiB", req("GET /echo?" + "x" * (8192 - 6) + " HTTP/1.1")),
    bad("target over 8 KiB", req("GET /echo?" + "x" * (8192 - 5) + " HTTP/1.1"), 414),
    bad("target over the limit of a head", req("GET /" + "x" * 20_000 + " HTTP/1.1"), 414),
]
FIELDS = [  # RFC 9112, 5; RFC 9110, 5.5 and 5.6.2
    good("no space after the colon", req(host="Host:a")),
    good("blanks around a value", req(host="Host: \t a\t ")),
    good("empty value", req("GET /echo HTTP/1.1", "X:")),
    good("obs-text in a value", req("GET /echo HTTP/1.1", "X: \xff\x80")),
    good("tab in a value", req("GET /echo HTTP/1.1", "X: a\tb")),
    good("colons in a value", req("GET /echo HTTP/1.1", "X: a:b::c")),
    good("every token character in a name", req("GET /echo HTTP/1.1", "!#$%&'*+-.^_`|~09azAZ: a")),
    bad("space before the colon", req("GET /echo HTTP/1.1", "X : a")),
    bad("tab before the colon", req("GET /echo HTTP/1.1", "X\t: a")),
    bad("space before the colon of Host", req(host="Host : a")),
    bad("obs-fold by space", req("GET /echo HTTP/1.1", "X: a", " b")),
    bad("obs-fold by tab", req("GET /echo HTTP/1.1", "X: a", "\tb")),
    bad("space before the first field", b"GET /echo HTTP/1.1\r\n Host: a\r\n\r\n"),
    bad("line of blanks only", req("GET /echo HTTP/1.1", "  ")),
    bad("line without a colon", req("GET /echo HTTP/1.1", "nonsense")),
    bad("empty name", req("GET /echo HTTP/1.1", ": a")),
    bad("space in a name", req("GET /echo HTTP/1.1", "X Y: a")),
    bad("separator in a name", req("GET /echo HTTP/1.1", "X(Y): a")),
    bad("latin-1 in a name", req("GET /echo HTTP/1.1", "X\xe9: a")),
    bad("NUL in a name", req("GET /echo HTTP/1.1", "X\0: a")),
    bad("NUL in a value", req("GET /echo HTTP/1.1", "X: a\0b")),
    bad("bell in a value", req("GET /echo HTTP/1.1", "X: a\x07b")),
    bad("vertical tab in a value", req("GET /echo HTTP/1.1", "X: a\x0bb")),
    bad("DEL in a value", req("GET /echo HTTP/1.1", "X: a\x7fb")),
    bad("bare CR in a value", req("GET /echo HTTP/1.1", "X: a\rb")),
    bad("bare CR before a line end", req("GET /echo HTTP/1.1", "X: a\r")),
    bad("bare CR hides a field", req("GET /echo HTTP/1.1", "X: a\rContent-Length: 5")),
    bad("bare LF hides a field", req("GET /echo HTTP/1.1", "X: a\nContent-Length: 5")),
    bad("bare LF ends the last field", b"GET /echo HTTP/1.1\r\nHost: a\n\r\n"),
    bad("bare LF ends the head", b"GET /echo HTTP/1.1\r\nHost: a\r\n\n"),
    good("100 fields", req("GET /echo HTTP/1.1", *["X: a"] * 99)),
    bad("101 fields", req("GET /echo HTTP/1.1", *["X: a"] * 100), 431),
    good("head of 16 KiB", req("GET /echo HTTP/1.1", "X: " + "a" * (16384 - len(req()) - 3 + 2))),
    bad("head over 16 KiB", req("GET /echo HTTP/1.1", "X: " + "a" * (16384 - len(req()) - 3 + 3)), 431),
    bad("head of 100 KiB", req("GET /echo HTTP/1.1", "X: " + "a" * 100_000), 431),
    bad("head of many small fields over 16 KiB", req("GET /echo HTTP/1.1", *["X: a"] * 5000), 431),
]
HOSTS = [  # RFC 9112, 3.2
    bad("no Host", req(host=None)),
    bad("no field at all", b"GET /echo HTTP/1.1\r\n\r\n"),
    bad("two Hosts", req("GET /echo HTTP/1.1", "Host: b")),
    bad("two equal Hosts", req("GET /echo HTTP/1.1", "Host: a")),
    bad("two Hosts in other letters", req("GET /echo HTTP/1.1", "hOST: b")),
    bad("two Hosts in one line", req(host="Host: a, b")),
    bad("two Hosts on HTTP/1.0", req("GET /echo HTTP/1.0", "Host: b")),
    bad("second Host empty", req("GET /echo HTTP/1.1", "Host:")),
    bad("space in Host", req(host="Host: a b")),
    bad("slash in Host", req(host="Host: a/b")),
    bad("userinfo in Host", req(host="Host: me@a")),
    bad("latin-1 in Host", req(host="Host: \xe9")),
    good("empty Host", req(host="Host:")),
    good("Host with a port", req(host="Host: example.com:8080")),
    good("Host of IPv6", req(host="Host: [::1]:8080")),
]
LENGTHS = [  # RFC 9112, 6.3; RFC 9110, 8.6
    good("body", post(b"12345")),
    good("empty body", post(b"")),
    good("leading zeros", req("POST /echo HTTP/1.1", "Content-Length: 0005", body=b"12345")),
    good("thousands of leading zeros", req("POST /echo HTTP/1.1", f"Content-Length: {'0' * 9000}5", body=b"12345")),
    good("blanks around the length", req("POST /echo HTTP/1.1", "Content-Length: \t5 ", body=b"12345")),
    good("body of a GET", req("GET /echo HTTP/1.1", "Content-Length: 5", body=b"12345")),
    good("body of a wrong path", req("POST /nothing HTTP/1.1", "Content-Length: 5", body=b"12345"), 404),
    good("body of a wrong method", req("PUT /echo HTTP/1.1", "Content-Length: 5", body=b"12345"), 405),
    good("body that looks like a request", post(PROBE)),
    good("body of 64 KiB", post(b"x" * 65536)),
    bad("POST without a length", req("POST /echo HTTP/1.1"), 411),
    *[
        bad(f"length {name}", req("POST /echo HTTP/1.1", f"Content-Length: {value}", body=b"12345"))
        for name, value in {
            "with a plus": "+5",
            "with a minus": "-5",
            "with an underscore": "5_0",
            "with a blank inside": " 5 5",
            "in Arabic digits": ARABIC_FIVE,
            "superscript": "\xb2",
            "in hex": "0x5",
            "as hex digits": "a",
            "with a point": "5.0",
            "with an exponent": "5e0",
            "empty": "",
            "quoted": '"5"',
            "with a semicolon": "5;",
            "with a trailing comma": "5,",
            "as an equal list": "5, 5",
            "as a list": "5, 6",
            "of a word": "five",
        }.items()
    ],
    bad("two equal lengths", req("POST /echo HTTP/1.1", "Content-Length: 5", "Content-Length: 5", body=b"12345")),
    bad("two different lengths", req("POST /echo HTTP/1.1", "Content-Length: 5", "Content-Length: 6", body=b"123456")),
    bad("second length in other letters", req("POST /echo HTTP/1.1", "Content-Length: 0", "content-length: 5")),
    bad("bad length of a GET", req("GET /echo HTTP/1.1", "Content-Length: -1")),
    bad("length with an underscored name", req("POST /echo HTTP/1.1", "Content_Length: 5", body=b"12345"), 411),
    bad("body over 64 KiB", req("POST /echo HTTP/1.1", "Content-Length: 65537"), 413),
    bad("body over 64 KiB of a GET", req("GET /echo HTTP/1.1", "Content-Length: 65537"), 413),
    bad("length of 19 digits", req("POST /echo HTTP/1.1", "Content-Length: " + "9" * 19), 413),
    bad("length of thousands of digits", req("POST /echo HTTP/1.1", "Content-Length: " + "9" * 9000), 413),
]
CHUNK = b"5\r\n12345\r\n0\r\n\r\n"
CODINGS = [  # RFC 9112, 6.1 and 6.3
    bad("chunked", req("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", body=CHUNK), 411),
    bad("Chunked in other letters", req("POST /echo HTTP/1.1", "transfer-encoding: ChunkeD", body=CHUNK), 411),
    bad("chunked GET", req("GET /echo HTTP/1.1", "Transfer-Encoding: chunked", body=CHUNK), 411),
    bad("gzip", req("POST /echo HTTP/1.1", "Transfer-Encoding: gzip"), 501),
    bad("gzip, chunked", req("POST /echo HTTP/1.1", "Transfer-Encoding: gzip, chunked", body=CHUNK), 501),
    bad("chunked twice", req("POST /echo HTTP/1.1", *["Transfer-Encoding: chunked"] * 2, body=CHUNK), 501),
    bad("identity", req("POST /echo HTTP/1.1", "Transfer-Encoding: identity"), 501),
    bad("xchunked", req("POST /echo HTTP/1.1", "Transfer-Encoding: xchunked", body=CHUNK), 501),
    bad("quoted chunked", req("POST /echo HTTP/1.1", 'Transfer-Encoding: "chunked"', body=CHUNK), 501),
    bad("empty coding", req("POST /echo HTTP/1.1", "Transfer-Encoding:"), 501),
    bad("vertical tab before chunked", req("POST /echo HTTP/1.1", "Transfer-Encoding: \x0bchunked", body=CHUNK)),
    bad("coding and length", req("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 5", body=CHUNK)),
    bad("length and coding", req("POST /echo HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked", body=CHUNK)),
    bad("length and another coding", req("POST /echo HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: x")),
    bad("chunked on HTTP/1.0", req("POST /echo HTTP/1.0", "Transfer-Encoding: chunked", body=CHUNK)),
]
CONNECTIONS = [  # RFC 9112, 9.3 and 9.6; RFC 9110, 10.1.1
    case("Connection: close", req("GET /echo HTTP/1.1", "Connection: close"), 200, CLOSED),
    case("Connection: CLOSE", req("GET /echo HTTP/1.1", "Connection: CLOSE"), 200, CLOSED),
    case("Connection: foo, close", req("GET /echo HTTP/1.1", "Connection: foo, close"), 200, CLOSED),
    case("second Connection closes", req("GET /echo HTTP/1.1", "Connection: foo", "Connection: close"), 200, CLOSED),
    case("keep-alive and close", req("GET /echo HTTP/1.1", "Connection: keep-alive, close"), 200, CLOSED),
    case("close after a deferred answer", req("GET /submitted HTTP/1.1", "Connection: close"), 200, CLOSED),
    case("close after an error", req("GET /nothing HTTP/1.1", "Connection: close"), 404, CLOSED),
    case("close after a body", post(b"12345", "/echo", "Connection: close"), 200, CLOSED),
    good("Connection: keep-alive", req("GET /echo HTTP/1.1", "Connection: keep-alive")),
    good("Connection of something like close", req("GET /echo HTTP/1.1", "Connection: closed, xclose")),
    good("empty Connection", req("GET /echo HTTP/1.1", "Connection:")),
    good("expectation of a body that is there", post(b"12345", "/echo", "Expect: 100-continue")),
    good("expectation without a body", req("GET /echo HTTP/1.1", "Expect: 100-Continue")),
    bad("unknown expectation", post(b"12345", "/echo", "Expect: 200-ok"), 417),
    bad("two expectations", post(b"12345", "/echo", "Expect: 100-continue", "Expect: 200-ok"), 417),
    bad("empty expectation", post(b"12345", "/echo", "Expect:"), 417),
    case("HTTP/1.0 expects nothing", req("GET /echo HTTP/1.0", "Expect: 200-ok"), 200, CLOSED),
    case("refusal that closes", req("GET /refuses-and-closes HTTP/1.1"), 409, CLOSED),
    good("refusal that does not close", req("GET /refuses HTTP/1.1"), 409),
]
CASES = [*REQUEST_LINES, *TARGETS, *FIELDS, *HOSTS, *LENGTHS, *CODINGS, *CONNECTIONS]


def test_the_table_has_a_case_for_every_rule() -> None:
    names = [case.id for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 80


@pytest.mark.parametrize(("data", "status", "after"), CASES)
def test_a_request_gets_its_status_and_leaves_the_connection_as_stated(
    server: EchoServer, data: bytes, status: int, after: str
) -> None:
    client = server.client().send(data)
    answer = client.answer()
    assert (answer.status, answer.closing) == (status, after == CLOSED)
    if after == OPEN:
        assert client.works()
    else:
        assert client.rest() == b""


@pytest.mark.parametrize(("data", "status", "after"), CASES)
def test_a_request_behind_it_in_the_same_write_is_served_or_never_seen(
    server: EchoServer, data: bytes, status: int, after: str
) -> None:
    client = server.client().send(data + PROBE).end()
    assert client.statuses() == ([status, 200] if after == OPEN else [status])
    assert (server.seen[-1:] == [("GET", "/", b"")]) == (after == OPEN)


@pytest.mark.parametrize(("data", "status", "after"), [case for case in CASES if len(case.values[0]) < 2000])
def test_a_request_that_comes_byte_by_byte_is_judged_the_same(
    server: EchoServer, data: bytes, status: int, after: str
) -> None:
    client = server.client()
    with contextlib.suppress(ConnectionError):  # what is refused early is not read on
        for byte in data:
            client.send(bytes([byte]))
    answer = client.answer() if b"100-continue" not in data else _final(client)
    assert (answer.status, answer.closing) == (status, after == CLOSED)


def _final(client: Client) -> Answer:
    """The final answer, behind the interim one that may come while a body is missing."""
    client.send(b"")
    line, fields = client.head()
    if not line.startswith("HTTP/1.1 100 "):
        client._received = "\r\n".join([line, *fields, "", ""]).encode() + client._received
    return client.answer()


def test_errors_of_the_protocol_are_json(server: EchoServer) -> None:
    for data in (b"garbage\r\n\r\n", req(host=None), req("BREW / HTTP/1.1", "Connection: close")):
        answer = server.client().send(data).answer()
        assert list(answer.doc) == ["Error"]
        assert answer.headers["content-type"] == "application/json"


def test_a_method_not_allowed_is_told_what_is(server: EchoServer) -> None:
    answer = server.client().send(req("DELETE /echo HTTP/1.1")).answer()
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, POST, OPTIONS")


def test_options_are_answered_with_allow(server: EchoServer) -> None:
    answer = server.client().send(req("OPTIONS * HTTP/1.1")).answer()
    assert (answer.status, answer.headers["allow"], answer.body) == (200, "GET, HEAD, POST, OPTIONS", b"")


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/echo?x=1", "/echo"),
        ("/echo?a?b", "/echo"),
        ("http://a/echo?x=1", "/echo"),
        ("http://a:80", "/"),
        ("http://a?/echo", "/"),
        ("HTTPS://[::1]:80/echo", "/echo"),
    ],
)
def test_the_handler_sees_the_path_of_the_target(server: EchoServer, target: str, path: str) -> None:
    assert server.client().send(req(f"GET {target} HTTP/1.1")).answer().doc["path"] == path


def test_the_handler_sees_fields_in_lower_case_and_repeated_ones_joined(server: EchoServer) -> None:
    found: list[dict[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Echo, "route", lambda handler: found.append(handler.request.headers))
        server.client().send(req("GET /echo HTTP/1.1", "X-One: \t a b \t", "x-ONE:c", "Y: \xe9")).answer()
    assert found == [{"host": "a", "x-one": "a b, c", "y": "\xe9"}]


def test_fields_of_one_request_do_not_reach_the_next(server: EchoServer) -> None:
    found: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Echo, "route", lambda handler: found.append(list(handler.request.headers)) or Echo.echo)
        client = server.client().send(req("GET / HTTP/1.1", "A: 1") + req("GET / HTTP/1.1", "B: 1") + PROBE).end()
        assert client.statuses() == [200, 200, 200]
    assert found == [["host", "a"], ["host", "b"], ["host"]]


@pytest.mark.parametrize("body", [b"", b"\r\n\r\n", PROBE, bytes(range(256)), b"x" * 65536])
def test_a_body_arrives_unchanged(server: EchoServer, body: bytes) -> None:
    assert server.client().send(post(body)).answer().doc["body"].encode("latin-1") == body


def test_a_kept_alive_http_1_0_connection_says_so(server: EchoServer) -> None:
    client = server.client().send(req("GET /echo HTTP/1.0", "Connection: keep-alive"))
    assert client.answer().headers["connection"] == "keep-alive"
    assert "connection" not in client.send(PROBE).answer().headers


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_http_1_1_never_falls_back_to_what_http_1_0_said_before(server: EchoServer, version: str) -> None:
    client = server.client().send(req("GET /echo HTTP/1.0", "Connection: keep-alive"))
    client.answer()
    answer = client.send(req(f"GET /echo {version}")).answer()
    assert answer.closing == (version == "HTTP/1.0")


# Expect: 100-continue (RFC 9110, 10.1.1)


def test_the_go_ahead_comes_before_the_body_is_sent(server: EchoServer) -> None:
    client = server.client().send(req("POST /echo HTTP/1.1", "Content-Length: 5", "Expect: 100-continue"))
    assert client.head() == ("HTTP/1.1 100 Continue", [])
    assert client.send(b"12345").answer().doc["body"] == "12345"
    assert client.works()


def test_the_go_ahead_comes_once(server: EchoServer) -> None:
    client = server.client().send(req("POST /echo HTTP/1.1", "Content-Length: 5", "Expect: 100-continue"))
    client.head()
    for byte in b"12345":
        assert client.silent()
        client.send(bytes([byte]))
        server.settle()
    assert client.answer().status == 200


def test_no_go_ahead_for_a_body_that_is_there(server: EchoServer) -> None:
    client = server.client().send(post(b"12345", "/echo", "Expect: 100-continue"))
    assert client.answer().status == 200


def test_no_go_ahead_for_http_1_0(server: EchoServer) -> None:
    client = server.client().send(req("POST /echo HTTP/1.0", "Content-Length: 5", "Expect: 100-continue"))
    server.settle()
    assert client.silent()
    assert client.send(b"12345").answer().status == 200


@pytest.mark.parametrize(
    ("line", "length", "status"),
    [
        ("POST /nothing HTTP/1.1", "5", 404),
        ("PUT /echo HTTP/1.1", "5", 405),
        ("POST /echo HTTP/1.1", "65537", 413),
        ("POST /echo HTTP/1.1", "five", 400),
        ("BREW /echo HTTP/1.1", "5", 501),
    ],
)
def test_no_go_ahead_before_a_refusal(server: EchoServer, line: str, length: str, status: int) -> None:
    client = server.client().send(req(line, f"Content-Length: {length}", "Expect: 100-continue"))
    head, _ = client.head()
    assert head.split()[1] == str(status)


def test_a_body_refused_before_it_was_sent_closes_the_connection(server: EchoServer) -> None:
    client = server.client().send(req("POST /nothing HTTP/1.1", "Content-Length: 5", "Expect: 100-continue"))
    answer = client.answer()
    assert (answer.status, answer.closing, client.rest()) == (404, True, b"")


# What was not read never becomes the next request


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(f"POST /nothing HTTP/1.1|Expect: 100-continue|Content-Length: {len(PROBE)}", 404, id="refused"),
        pytest.param(f"POST /check-fails HTTP/1.1|Expect: 100-continue|Content-Length: {len(PROBE)}", 500, id="failed"),
        pytest.param("POST /echo HTTP/1.1|Content-Length: 70000", 413, id="too large"),
        pytest.param("POST /echo HTTP/1.1", 411, id="no length"),
        pytest.param("POST /echo HTTP/1.1|Transfer-Encoding: chunked", 411, id="chunked"),
        pytest.param(f"POST /echo HTTP/1.1|Content-Length: +{len(PROBE)}", 400, id="bad length"),
    ],
)
def test_a_body_that_was_not_read_is_not_the_next_request(server: EchoServer, request_: str, status: int) -> None:
    client = server.client().send(req(*request_.split("|")))
    server.settle()  # the body comes after the answer
    with contextlib.suppress(OSError):
        client.send(PROBE).end()
    assert client.statuses() == [status]
    assert server.seen == []


def test_a_request_behind_connection_close_is_not_served(server: EchoServer) -> None:
    client = server.client().send(req("GET /echo HTTP/1.1", "Connection: close") + post(b"1") * 100)
    assert client.statuses() == [200]
    assert len(server.seen) == 1


def test_a_request_behind_a_deferred_answer_that_closes_is_not_served(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1", "Connection: close") + PROBE)
    server.settle()
    client.send(PROBE)
    server.complete()
    assert client.statuses() == [200]
    assert len(server.seen) == 1


def test_a_refused_peer_can_read_its_answer_though_it_sent_much_more(server: EchoServer) -> None:
    client = server.client()
    sender = threading.Thread(target=_send_regardless, args=(client, b"POST /echo HTTP/1.1\r\n\r\n" + b"x" * 1_000_000))
    sender.start()
    answer = client.answer()
    sender.join(HANG)
    assert (answer.status, client.rest()) == (400, b"")


def _send_regardless(client: Client, data: bytes) -> None:
    with contextlib.suppress(OSError):
        client.send(data)


@pytest.mark.parametrize("data", [req()[:-2], req()[:1], b"\r\n", b"", post(b"12345")[:-1]])
def test_a_request_that_ends_early_is_not_served(server: EchoServer, data: bytes) -> None:
    client = server.client().send(data).end()
    assert client.statuses() in ([], [400])
    assert server.seen == []


def test_a_request_that_ends_early_behind_a_deferred_one_is_not_served(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1") + post(b"12345")[:-1]).end()
    server.settle()
    server.complete()
    assert client.statuses() == [200]
    assert len(server.seen) == 1


# Pipelining, keep-alive, splits


def test_pipelined_requests_are_answered_in_order(server: EchoServer) -> None:
    requests = [post(str(i).encode(), ("/echo", "/submitted", "/twice-later")[i % 3]) for i in range(600)]
    client = server.client().send(b"".join(requests))
    assert [client.answer().doc["body"] for _ in requests] == [str(i) for i in range(600)]
    assert client.works()


def test_large_and_small_answers_are_pipelined_in_order(server: EchoServer) -> None:
    paths = ["/large", "/echo", "/large-later", "/submitted", "/echo", "/large"]
    client = server.client(SMALL_BUFFER).send(b"".join(req(f"GET {path} HTTP/1.1") for path in paths))
    answers = [client.answer().body for _ in paths]
    assert [body == LARGE for body in answers] == [path.startswith("/large") for path in paths]
    assert client.works()


def test_requests_behind_a_deferred_one_wait_for_it(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1") + post(b"1") + post(b"2"))
    server.settle()
    assert client.silent()
    assert len(server.seen) == 1
    server.complete("first")
    answers = [client.answer().doc for _ in range(3)]
    assert [(answer["result"], answer["body"]) for answer in answers] == [("first", ""), (None, "1"), (None, "2")]


def test_deferred_answers_may_complete_out_of_order_across_connections(server: EchoServer) -> None:
    clients = [server.client() for _ in range(20)]
    futures = []
    for i, client in enumerate(clients):
        client.send(post(str(i).encode(), "/later") + post(f"behind {i}".encode()))
        futures.append(server.pending.get(timeout=HANG))
    for i, future in reversed(list(enumerate(futures))):
        future.set_result(i)
    for i, client in enumerate(clients):
        answers = [client.answer().doc for _ in range(2)]
        assert [(doc["body"], doc["result"]) for doc in answers] == [(str(i), i), (f"behind {i}", None)]


def test_a_deferred_request_holds_up_nobody_else(server: EchoServer) -> None:
    waiting = server.client().send(req("GET /later HTTP/1.1"))
    assert server.client().works()
    assert waiting.silent()


def test_a_future_that_is_done_already_can_be_deferred(server: EchoServer) -> None:
    client = server.client().send(req("GET /cancelled HTTP/1.1"))
    assert client.answer().status == 500
    assert client.works()


def test_a_deferred_answer_may_take_for_ever(clocked: ClockedServer) -> None:
    client = clocked.client()
    for _ in range(2):  # also when the connection has been idle before
        client.send(req("GET /later HTTP/1.1"))
        clocked.advance(LONG_TIME)
        assert client.silent()
        clocked.complete()
        assert client.answer().status == 200


def test_a_client_cannot_fill_the_memory_behind_a_deferred_answer(server: EchoServer) -> None:
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    client = server.client().send(req("GET /later HTTP/1.1"))
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    server.settle()
    sent = _send_until_refused(client, server, 4_000_000)
    assert sent < 1_000_000
    server.complete()
    assert client.answer().status == 200
    assert [client.answer().status for _ in range(sent // len(PROBE))] == [200] * (sent // len(PROBE))


def _send_until_refused(client: Client, server: EchoServer, most: int) -> int:
    """Sends probes until nobody takes them any more; returns the bytes sent."""
    sent, refused = 0, 0
    data = memoryview(PROBE * 100)
    client.socket.setblocking(False)
    while refused < 3 and sent < most:
        try:
            sent += client.socket.send(data[sent % len(PROBE) :])
            refused = 0
        except BlockingIOError:
            refused += 1
            server.settle()
    client.socket.settimeout(HANG)
    return sent


# Turns of the loop


class Sends(socket.socket):
    """A connection that remembers how many bytes each `send` was given."""

    sizes: list[int] = []

    def send(self, data: Any, *flags: int) -> int:
        self.sizes.append(len(data))
        return super().send(data, *flags)


class WatchedServer(EchoServer):
    """A front whose connections are `Sends`."""

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        return Sends(fileno=request.detach()), address


def test_pipelined_answers_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sends, "sizes", [])
    with front(kind=WatchedServer) as server:
        client = server.client().send(PROBE * 10 + req("GET /gathers HTTP/1.1") + PROBE)
        assert [client.answer().status for _ in range(12)] == [200] * 12
    assert len(Sends.sizes) == 1


def test_pipelined_answers_are_sent_before_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sends, "sizes", [])
    with front(kind=WatchedServer) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_000_000)
        client = server.client().send(req("GET /large HTTP/1.1") * 3)
        assert [len(client.answer().body) for _ in range(3)] == [len(LARGE)] * 3
    assert max(Sends.sizes) < len(LARGE) + http_front.SEND_AHEAD


def test_requests_of_one_turn_are_gathered_and_answered_in_it(server: EchoServer) -> None:
    holder, clients = server.client(), [server.client() for _ in range(3)]
    assert [client.works() for client in clients] == [True] * 3
    holder.send(req("GET /holds HTTP/1.1"))
    assert server.held.wait(HANG)
    for number, client in enumerate(clients):
        client.send(req("GET /gathers HTTP/1.1", f"X: {number}") * 2 + PROBE)
    server.released.set()
    for client in clients:
        assert [client.answer().doc["path"] for _ in range(3)] == ["/gathers", "/gathers", "/"]
    assert server.groups == [3, 3]  # a connection's second request waits for its first


class Reluctant(socket.socket):
    """A connection that takes a few bytes of what it is given first."""

    reluctant = True

    def send(self, data: Any, *flags: int) -> int:
        data, self.reluctant = (data[:5] if self.reluctant else data), False
        return super().send(data, *flags)


class ReluctantServer(ClockedServer):
    """A clocked front whose connections are `Reluctant`."""

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        return Reluctant(fileno=request.detach()), address


@pytest.mark.parametrize("half", [PROBE[:-1], post(b"12345")[:-1]], ids=["head", "body"])
def test_half_a_request_behind_an_answer_that_got_stuck_has_no_more_time(half: bytes) -> None:
    with front(kind=ReluctantServer) as server:
        client = server.client().send(PROBE + half)
        assert client.answer().status == 200
        server.advance(Limits().read_timeout)
        assert client.statuses() == [408]


def test_an_error_at_the_end_of_a_turn_does_not_end_the_loop(
    server: EchoServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(EchoServer, "end_of_iteration", lambda self: 1 / 0)
        assert server.client().works()
    assert server.client().works()
    assert "ZeroDivisionError" in caplog.text


def test_a_field_that_cannot_be_sent_is_a_500_and_nothing_of_the_answer_before_it(server: EchoServer) -> None:
    client = server.client().send(req("GET /misspells HTTP/1.1") + PROBE)
    assert [client.answer().status for _ in range(2)] == [500, 200]


def test_a_flood_of_empty_lines_before_a_request_is_skipped(server: EchoServer) -> None:
    assert server.client().send(b"\r\n" * 50_000 + PROBE).answer().status == 200


def test_one_connection_takes_a_thousand_requests(server: EchoServer) -> None:
    client = server.client()
    for i in range(1000):
        assert client.send(post(str(i).encode())).answer().doc["body"] == str(i)


def test_requests_split_at_every_byte_are_the_same_requests(server: EchoServer) -> None:
    data = b"\r\n" + post(b"one\r\n\r\n") + req("HEAD /echo HTTP/1.1") + post(b"", "/submitted") + post(b"two")
    whole = _bodies(server.client().send(data).end())
    for cut in range(1, len(data)):
        client = server.client().send(data[:cut])
        server.settle()
        assert _bodies(client.send(data[cut:]).end()) == whole
    assert whole == ["one\r\n\r\n", None, "", "two"]


def _bodies(client: Client) -> list[str | None]:
    """What the answers to a POST, a HEAD and two POSTs echo."""
    answers = [client.answer(method) for method in ("POST", "HEAD", "POST", "POST")]
    assert client.rest() == b""
    return [answer.doc["body"] if answer.body else None for answer in answers]


@pytest.mark.parametrize("seed", range(5))
def test_answers_do_not_depend_on_how_random_requests_are_split(server: EchoServer, seed: int) -> None:
    chance = random.Random(seed)
    small = [case.values for case in CASES if len(case.values[0]) < 2000 and b"100-" not in case.values[0]]
    for _ in range(20):
        data, expected, after = b"", [], OPEN
        while after == OPEN and len(expected) < 20:
            request, status, after = chance.choice(small)
            data += request
            expected.append(status)
        client = server.client()
        with contextlib.suppress(OSError):  # what is refused early is not read on
            while data:
                cut = chance.choice((1, 2, 3, 50, 500))
                client.send(data[:cut])
                data = data[cut:]
                if chance.random() < 0.3:
                    server.settle()
            client.end()
        assert client.statuses() == expected


# Deadlines


def test_a_head_that_is_not_in_within_its_time_gets_a_408(clocked: ClockedServer) -> None:
    client = clocked.client().send(req()[:-2])
    clocked.advance(9.5)
    assert client.silent()
    clocked.advance(0.5)
    answer = client.answer()
    assert (answer.status, answer.closing, client.rest()) == (408, True, b"")


def test_a_body_that_is_not_in_within_its_time_gets_a_408(clocked: ClockedServer) -> None:
    client = clocked.client().send(post(b"12345")[:-1])
    clocked.advance(9.5)
    assert client.silent()
    clocked.advance(0.5)
    answer = client.answer()
    assert (answer.status, answer.closing, client.rest()) == (408, True, b"")


def test_head_and_body_have_their_time_each(clocked: ClockedServer) -> None:
    data = post(b"12345")
    client = clocked.client().send(data[:10])
    clocked.advance(9.5)
    client.send(data[10:-1])
    clocked.advance(9.5)
    assert client.send(data[-1:]).answer().status == 200


@pytest.mark.parametrize("drip", [b"X", b"\r\n", b"X: a\r\n"], ids=["byte", "empty line", "field"])
def test_a_head_that_drips_gets_no_more_time(clocked: ClockedServer, drip: bytes) -> None:
    client = clocked.client()
    if drip != b"\r\n":
        client.send(b"GET /echo HTTP/1.1\r\n")
    for _ in range(10):
        assert client.silent()
        client.send(drip)
        clocked.advance(1.0)
    assert client.statuses() in ([], [408])


def test_a_body_that_drips_gets_no_more_time(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("POST /echo HTTP/1.1", "Content-Length: 100"))
    clocked.settle()
    for _ in range(10):
        assert client.silent()
        client.send(b"x")
        clocked.advance(1.0)
    assert client.statuses() == [408]


@pytest.mark.parametrize("drip", [b"", b"\r\n"], ids=["nothing", "empty lines"])
def test_an_idle_connection_is_closed_after_its_time(clocked: ClockedServer, drip: bytes) -> None:
    client = clocked.client()
    assert client.works()
    for _ in range(6):
        client.send(drip)
        clocked.advance(9.875)
        assert client.silent()
    clocked.advance(0.75)
    assert client.rest() == b""


def test_a_request_after_idleness_has_the_full_time_for_its_head(clocked: ClockedServer) -> None:
    client = clocked.client()
    assert client.works()
    clocked.advance(59.0)
    client.send(PROBE[:-1])
    clocked.advance(9.5)
    assert client.send(PROBE[-1:]).answer().status == 200


def test_a_head_has_no_more_time_for_coming_after_idleness(clocked: ClockedServer) -> None:
    client = clocked.client()
    assert client.works()
    client.send(PROBE[:-1])
    clocked.advance(10.0)
    assert client.statuses() == [408]


def test_the_time_of_a_pipelined_head_begins_after_the_answer_before_it(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /later HTTP/1.1") + PROBE[:-1])
    clocked.advance(LONG_TIME)
    clocked.complete()
    assert client.answer().status == 200
    clocked.advance(9.5)
    assert client.silent()
    clocked.advance(0.5)
    assert client.statuses() == [408]


def test_a_connection_that_never_says_anything_is_closed(clocked: ClockedServer) -> None:
    client = clocked.client()
    clocked.advance(10.0)
    assert client.rest() == b""


def test_a_peer_that_does_not_read_its_answer_is_dropped(clocked: ClockedServer) -> None:
    client = clocked.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
    clocked.advance(9.5)
    assert client.socket.recv(1) == b"H"
    clocked.advance(0.5)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while data := client.socket.recv(65536):
            received += len(data)
    assert received < len(LARGE)


def test_a_peer_that_reads_byte_by_byte_gets_no_more_time_for_its_answer(clocked: ClockedServer) -> None:
    client = clocked.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
    clocked.settle()
    received = 0
    with contextlib.suppress(ConnectionResetError):
        for _ in range(10):
            received += len(client.socket.recv(10_000))
            clocked.advance(1.0)
        while data := client.socket.recv(65536):
            received += len(data)
    assert received < len(LARGE)


def test_a_connection_is_usable_after_a_large_answer_that_was_read_late(clocked: ClockedServer) -> None:
    client = clocked.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
    clocked.advance(9.0)
    assert client.answer().body == LARGE
    clocked.advance(59.0)
    assert client.works()


def test_a_refused_peer_that_stays_is_dropped() -> None:
    with front(Limits(connections=1), ClockedServer) as server:
        client = server.client().send(b"garbage\r\n\r\n")
        assert client.statuses() == [400]
        waiting = server.client().send(PROBE)
        for _ in range(10):
            with contextlib.suppress(OSError):
                client.send(b"more")
            server.advance(1.0)
        assert waiting.answer().status == 200


@pytest.mark.parametrize(
    ("limits", "data", "statuses"),
    [
        (Limits(read_timeout=0.05), req()[:-2], [408]),
        (Limits(read_timeout=0.05), post(b"12345")[:-1], [408]),
        (Limits(idle_timeout=0.05), req(), [200]),
    ],
    ids=["head", "body", "idle"],
)
def test_the_loop_wakes_by_itself_at_a_deadline(limits: Limits, data: bytes, statuses: list[int]) -> None:
    with front(limits) as server:
        assert server.client().send(data).statuses() == statuses


def test_the_loop_wakes_by_itself_for_a_peer_that_does_not_read() -> None:
    with front(Limits(write_timeout=0.05, connections=1)) as server:
        stalled = server.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
        assert server.client().works()  # it waited for the place of the stalled one
        assert stalled.socket.recv(1) == b"H"


# Many clients


def test_hundreds_of_half_requests_do_not_delay_a_normal_client(clocked: ClockedServer) -> None:
    halves = [clocked.client().send((req()[:-2], post(b"12345")[:-1], b"G", b"")[i % 4]) for i in range(300)]
    normal = clocked.client()
    for i in range(20):
        assert normal.send(post(str(i).encode(), "/submitted")).answer().doc["body"] == str(i)
    clocked.advance(10.0)
    assert [half.statuses() for half in halves] == [[408], [408], [408], []] * 75
    assert normal.works()


def test_one_connection_more_than_allowed_waits_until_another_closes() -> None:
    with front(Limits(connections=3), ClockedServer) as server:
        clients = [server.client() for _ in range(3)]
        assert all(client.works() for client in clients)
        fourth = server.client().send(PROBE)
        server.settle()
        assert fourth.silent()
        assert all(client.works() for client in clients)
        clients[1].end()
        assert fourth.answer().status == 200
        fifth = server.client().send(PROBE)
        server.settle()
        assert fifth.silent()
        fourth.reset()
        assert fifth.answer().status == 200


def test_waiting_connections_take_turns_at_the_limit() -> None:
    with front(Limits(connections=3)) as server:
        clients = [server.client().send(req("GET /submitted HTTP/1.1", "Connection: close")) for _ in range(60)]
        assert [client.statuses() for client in clients] == [[200]] * 60


HAS_NO_PLACE = [
    pytest.param(lambda c: c.reset(), id="reset"),
    pytest.param(lambda c: c.send(req()[:-2]).reset(), id="reset in a head"),
    pytest.param(lambda c: c.send(post(b"12345")[:-1]).reset(), id="reset in a body"),
    pytest.param(lambda c: c.end(), id="end"),
    pytest.param(lambda c: c.send(req()[:-2]).end(), id="end in a head"),
    pytest.param(lambda c: c.send(post(b"12345")[:-1]).end(), id="end in a body"),
    pytest.param(lambda c: c.send(b"garbage\r\n\r\n").end(), id="garbage"),
    pytest.param(lambda c: c.send(b"garbage\r\n\r\n").reset(), id="garbage and a reset"),
    pytest.param(lambda c: c.send(req("GET /large HTTP/1.1")).reset(), id="large answer and a reset"),
    pytest.param(lambda c: c.send(req("GET /submitted HTTP/1.1")).end(), id="deferred answer and an end"),
    pytest.param(lambda c: c.send(req("GET /submitted HTTP/1.1")).reset(), id="deferred answer and a reset"),
    pytest.param(lambda c: c.send(req("GET /raises HTTP/1.1", "Connection: close")), id="failure"),
    pytest.param(lambda c: c.send(req("GET /unknown-status HTTP/1.1")), id="failed refusal"),
    pytest.param(lambda c: c.send(PROBE * 100 + req("GET / HTTP/1.1", "Connection: close")).answer(), id="pipeline"),
]


@pytest.mark.parametrize("leave", HAS_NO_PLACE)
def test_a_connection_that_went_leaves_its_place(leave: Callable[[Client], object]) -> None:
    with front(Limits(connections=1)) as server:
        for _ in range(3):
            leave(server.client())
        assert server.client().works()


STALLED = [
    pytest.param(lambda c: c, id="idle"),
    pytest.param(lambda c: c.send(PROBE[:-1]), id="half a head"),
    pytest.param(lambda c: c.send(b"garbage\r\n\r\n"), id="refused"),
    pytest.param(lambda c: c.send(b"garbage\r\n\r\n").end(), id="refused and ended"),
    pytest.param(lambda c: c.send(req("GET /later HTTP/1.1")), id="deferred"),
    pytest.param(lambda c: c.send(req("GET /later HTTP/1.1")).end(), id="deferred and ended"),
    pytest.param(lambda c: c.send(req("GET /later HTTP/1.1")).reset(), id="deferred and reset"),
    pytest.param(lambda c: c.send(req("GET /later HTTP/1.1")).end().reset(), id="deferred, ended and reset"),
    pytest.param(lambda c: c.send(req("GET /later HTTP/1.1") + PROBE * 8000).end(), id="more than is read ahead"),
    pytest.param(lambda c: c.send(req("GET /large HTTP/1.1")), id="not reading"),
    pytest.param(lambda c: c.send(req("GET /large HTTP/1.1")).end(), id="not reading and ended"),
    pytest.param(lambda c: c.send(req("GET /large HTTP/1.1")).reset(), id="not reading and reset"),
]


@pytest.mark.parametrize("stall", STALLED)
def test_a_stalled_connection_does_not_keep_the_loop_busy(
    clocked: ClockedServer, stall: Callable[[Client], object]
) -> None:
    stall(clocked.client(SMALL_BUFFER))
    assert clocked.rests()


def test_waiting_connections_at_the_limit_do_not_keep_the_loop_busy() -> None:
    with front(Limits(connections=1), ClockedServer) as server:
        server.client().works()
        server.client().send(PROBE)
        assert server.rests()


# Out of resources


class Exhausted(ClockedServer):
    """A front whose process runs out of file descriptors for a few connections."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.failures: list[int] = []
        self.tried = threading.Semaphore(0)
        self.tries = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            if self.failures:
                code = self.failures.pop()
                raise OSError(code, errno.errorcode[code])
            return super().get_request()
        finally:
            self.tries += 1
            self.tried.release()

    def wait_tried(self) -> None:
        assert self.tried.acquire(timeout=HANG), "nobody accepted"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_file_descriptors_it_pauses_and_serves_later(code: int) -> None:
    with front(kind=Exhausted) as server:
        server.settle()
        server.failures = [code] * 3
        client = server.client().send(PROBE)
        for tries in (1, 2, 3):
            server.wait_tried()
            server.settle()
            assert server.tries == tries  # no spinning
            server.advance(LONG_TIME / 100)
        assert client.answer().status == 200


def test_without_file_descriptors_the_others_are_served() -> None:
    with front(kind=Exhausted) as server:
        other = server.client()
        assert other.works()
        server.failures = [errno.EMFILE]
        waiting = server.client().send(PROBE)
        server.settle()
        assert other.works()
        assert waiting.silent()


def test_a_closed_connection_makes_room_at_once_after_the_descriptors_ran_out() -> None:
    with front(kind=Exhausted) as server:
        other = server.client()
        assert other.works()
        server.failures = [errno.EMFILE]
        waiting = server.client().send(PROBE)
        server.settle()
        other.end()
        assert waiting.answer().status == 200


def test_running_out_of_file_descriptors_is_logged_when_it_begins_and_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with front(kind=Exhausted) as server:
        server.failures = [errno.EMFILE] * 3
        client = server.client().send(PROBE)
        for _ in range(4):
            server.wait_tried()
            server.settle()
            server.advance(http_front.ACCEPT_PAUSE)
        assert client.answer().status == 200
    begin, end = [record.getMessage() for record in caplog.records]
    assert (begin, end) == (
        "not accepting connections for now: [Errno 24] EMFILE", "accepting connections again after 3.0 s",
    )  # fmt: skip


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM])
def test_a_connection_that_cannot_be_accepted_costs_nobody_else_anything(code: int) -> None:
    with front(kind=Exhausted) as server:
        server.failures = [code]
        assert server.client().works()


# Peers that go away


@pytest.mark.parametrize("data", [b"", PROBE[:-1], post(b"12345")[:-1]], ids=["idle", "head", "body"])
def test_a_peer_that_resets_is_not_worth_a_line(
    server: EchoServer, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    caplog.set_level(logging.INFO)
    client = server.client().send(data)
    server.settle()
    client.reset()
    server.settle()
    assert server.client().works()
    assert caplog.records == []


def test_a_peer_that_resets_before_its_deferred_answer_is_not_worth_a_line(
    server: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = server.client().send(req("GET /later HTTP/1.1") + PROBE)
    server.settle()
    client.reset()
    server.settle()
    server.complete()
    server.settle()
    assert server.client().works()
    assert caplog.records == []
    assert [path for _, path, _ in server.seen] == ["/later", "/"]


def test_a_peer_that_ended_and_then_resets_before_its_deferred_answer_is_not_worth_a_line(
    server: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = server.client().send(req("GET /later HTTP/1.1") * 3).end()
    server.settle()
    client.reset()
    for _ in range(3):
        server.complete()
        server.settle()
        if server.pending.empty():
            break
    assert server.client().works()
    assert caplog.records == []


def test_a_peer_that_resets_during_its_answer_is_not_worth_a_line(
    server: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = server.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1") + PROBE)
    assert client.socket.recv(1) == b"H"
    client.reset()
    server.settle()
    assert server.client().works()
    assert caplog.records == []


def test_a_peer_that_goes_costs_one_debug_line(server: EchoServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = server.client().send(PROBE[:-1])
    server.settle()
    client.reset()
    server.settle()
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("DEBUG", None)]


@pytest.mark.parametrize("path", ["/echo", "/submitted", "/large", "/large-later", "/later"])
def test_a_peer_that_closed_its_side_still_gets_its_answers(server: EchoServer, path: str) -> None:
    client = server.client(SMALL_BUFFER).send(req(f"GET {path} HTTP/1.1") * 2 + PROBE).end()
    if path == "/later":
        server.settle()
        server.complete()
        server.complete()
    assert client.statuses() == [200, 200, 200]


# Shutdown


def test_shutdown_closes_idle_connections_after_a_moment(clocked: ClockedServer) -> None:
    used, fresh = clocked.client(), clocked.client()
    assert used.works()
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    assert used.silent() and fresh.silent()
    assert clocked.gone()
    assert (used.rest(), fresh.rest()) == (b"", b"")


def test_a_request_that_comes_on_an_idle_connection_during_the_shutdown_is_the_last(clocked: ClockedServer) -> None:
    client = clocked.client()
    assert client.works()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    answer = client.send(PROBE).answer()
    assert (answer.status, answer.closing) == (200, True)
    assert clocked.gone()


def test_shutdown_without_connections_ends_at_once(clocked: ClockedServer) -> None:
    clocked.shutdown(LONG_TIME)
    assert clocked.gone()


def test_shutdown_before_serving_ends_the_serving() -> None:
    server = EchoServer(Limits())
    server.shutdown()
    server.serve_forever()
    server.server_close()
    assert server.stopping


def test_shutdown_lets_a_deferred_request_finish(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /later HTTP/1.1") + PROBE)
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    assert client.silent()
    clocked.complete()
    answer = client.answer()
    assert (answer.status, answer.closing, client.rest()) == (200, True, b"")
    client.socket.close()  # the request behind it was not served, so the server waits for the peer's end
    assert clocked.gone()


def test_shutdown_lets_a_large_answer_finish(clocked: ClockedServer) -> None:
    client = clocked.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    assert client.answer().body == LARGE
    assert clocked.gone()
    assert client.rest() == b""


@pytest.mark.parametrize("missing", [1, 5, 20], ids=["body", "body at all", "head"])
def test_shutdown_gives_half_a_request_a_last_call(clocked: ClockedServer, missing: int) -> None:
    data = post(b"12345")
    client = clocked.client().send(data[:-missing])
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    answer = client.send(data[-missing:]).answer()
    assert (answer.status, answer.closing, client.rest()) == (200, True, b"")
    assert clocked.gone()


def test_shutdown_does_not_wait_for_half_a_request_that_misses_its_last_call(clocked: ClockedServer) -> None:
    client = clocked.client().send(req()[:-2])
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.advance(5.0)
    assert client.statuses() == [408]
    client.reset()
    assert clocked.gone()


def test_shutdown_ends_at_its_timeout_with_a_deferred_request_that_is_stuck(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /later HTTP/1.1"))
    clocked.settle()
    clocked.shutdown(10.0)
    clocked.advance(9.5)
    assert client.silent()
    clocked.time += 0.5
    clocked.call_soon(lambda: None)
    assert clocked.gone()
    assert client.rest() == b""


def test_shutdown_wakes_by_itself_at_its_timeout(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1"))
    server.settle()
    server.shutdown(0.05)
    assert server.gone()
    assert client.rest() == b""


def test_shutdown_ends_at_its_timeout_with_a_peer_that_does_not_read() -> None:
    with front(Limits(write_timeout=LONG_TIME)) as server:
        server.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
        server.settle()
        server.shutdown(0.05)
        assert server.gone()


def test_shutdown_gives_a_peer_that_does_not_read_a_last_call_only(clocked: ClockedServer) -> None:
    clocked.client(SMALL_BUFFER).send(req("GET /large HTTP/1.1"))
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    clocked.time += http_front.LAST_CALL
    clocked.call_soon(lambda: None)
    assert clocked.gone()


def test_a_deferred_answer_that_comes_after_the_end_hurts_nobody(server: EchoServer) -> None:
    server.client().send(req("GET /later HTTP/1.1"))
    server.settle()
    server.shutdown(0.0)
    assert server.gone()
    server.server_close()
    server.complete()
    assert server.responses == {}


def test_shutdown_refuses_new_connections_while_old_ones_finish(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /later HTTP/1.1"))
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    with pytest.raises(ConnectionRefusedError):
        clocked.client()
    clocked.complete()
    assert client.answer().status == 200


def test_shutdown_from_inside_a_handler_does_not_hang(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /stops HTTP/1.1"))
    assert client.answer().status == 200
    assert clocked.gone()
    assert client.rest() == b""


def test_shutdown_from_another_thread_returns_at_once(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /holds HTTP/1.1"))
    assert clocked.held.wait(HANG)
    clocked.shutdown(LONG_TIME)  # the loop is held up, and this returns all the same
    clocked.released.set()
    assert client.answer().status == 200
    assert clocked.gone()


def test_shutdown_twice_is_shutdown_once(clocked: ClockedServer) -> None:
    client = clocked.client().send(req("GET /later HTTP/1.1"))
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    clocked.shutdown(LONG_TIME)
    clocked.settle()
    clocked.complete()
    assert client.statuses() == [200]
    assert clocked.gone()


@pytest.mark.parametrize("timeouts", [(10.0, LONG_TIME), (LONG_TIME, 10.0)], ids=["longer", "shorter"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
def test_a_second_shutdown_can_only_shorten_the_first(
    clocked: ClockedServer, timeouts: tuple[float, float], at_once: bool
) -> None:
    clocked.client().send(req("GET /later HTTP/1.1"))
    clocked.pending.get(timeout=HANG)
    for timeout in timeouts:
        clocked.shutdown(timeout)
        if not at_once:
            clocked.settle()
    clocked.settle()
    clocked.time += 10.0
    clocked.call_soon(lambda: None)
    assert clocked.gone()


def test_those_who_connected_before_the_shutdown_are_served(clocked: ClockedServer) -> None:
    clocked.client().send(req("GET /holds HTTP/1.1"))
    assert clocked.held.wait(HANG)
    clients = [clocked.client().send(PROBE) for _ in range(5)]
    clocked.shutdown(LONG_TIME)
    clocked.released.set()
    assert [client.answer().status for client in clients] == [200] * 5
    assert clocked.gone()


def test_all_who_connected_before_the_shutdown_are_served_however_many(server: EchoServer) -> None:
    server.client().send(req("GET /holds HTTP/1.1"))
    assert server.held.wait(HANG)
    clients = [server.client().send(PROBE) for _ in range(3 * http_front.ACCEPTS)]
    server.shutdown()
    server.released.set()
    assert [client.statuses() for client in clients] == [[200]] * len(clients)


def test_a_request_that_comes_as_the_shutdown_begins_is_answered(
    server: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.client()
    assert client.works()
    late = [PROBE]  # sent in the turn of the shutdown, after everyone has been read from
    monkeypatch.setattr(server, "end_of_iteration", lambda: server.stopping and late and client.send(late.pop()))
    server.shutdown()
    assert client.statuses() == [200]


def test_shutdown_at_the_connection_limit_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with front(Limits(connections=2), ClockedServer) as server:
        first = server.client()
        assert first.works()
        first.send(req("GET /holds HTTP/1.1") + PROBE[:-1])
        assert server.held.wait(HANG)
        server.shutdown(LONG_TIME)  # the loop finds this call and the second connection in the same turn
        second = server.client().send(PROBE[:-1])
        server.released.set()
        server.settle()
        answer = second.send(PROBE[-1:]).answer()
        assert (answer.status, answer.closing) == (200, True)
    assert caplog.records == []


def test_the_port_can_be_bound_again_after_the_end(server: EchoServer) -> None:
    assert server.client().works()
    server.shutdown()
    assert server.gone()
    server.server_close()
    again = FrontServer(server.server_address[:2], Echo)
    again.server_close()
    assert again.server_address == server.server_address


def test_a_taken_port_is_an_error_and_leaves_nothing_open(server: EchoServer) -> None:
    with pytest.raises(OSError) as caught:
        FrontServer(server.server_address[:2], Echo)
    assert caught.value.errno == errno.EADDRINUSE


def test_connections_wait_in_the_backlog_until_it_serves() -> None:
    server = EchoServer(Limits())
    client = server.client().send(PROBE)
    assert client.silent()
    server.shutdown()
    server.serve_forever()
    assert client.answer().status == 200
    server.stack.close()
    server.server_close()


@pytest.mark.parametrize("family", ["inet", "unix"])
def test_a_listening_socket_that_is_handed_over_is_served(tmp_path: Path, family: str) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET if family == "inet" else socket.AF_UNIX))
        listener.bind(("127.0.0.1", 0) if family == "inet" else str(tmp_path / "front"))
        listener.listen()
        address = listener.getsockname()
        server = FrontServer(("127.0.0.1", 1), Silent, listener=listener)
        assert server.server_address == address
        client = stack.enter_context(socket.socket(listener.family))
        client.settimeout(HANG)
        client.connect(address)
        client.sendall(req("GET / HTTP/1.1", "Connection: close"))
        server.shutdown()
        server.serve_forever()
        server.server_close()
        assert client.recv(100).startswith(b"HTTP/1.1 204 No Content\r\n")


def test_a_pool_that_the_system_has_no_threads_for_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, start = [0], threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        threads[0] += 1
        if threads[0] > 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        FrontServer(("127.0.0.1", 0), Silent, workers=5)
    for thread in threading.enumerate():
        if thread.name.startswith("smsproxy-http"):
            thread.join(HANG)
            assert not thread.is_alive()


class Silent(FrontHandler):
    """Has nothing to say."""

    def route(self) -> Callable[[Any], None]:
        return lambda handler: handler.respond(204)


def test_nothing_of_a_body_is_kept_once_it_has_its_response(server: EchoServer) -> None:
    body = b"very private " * 1000
    client = server.client().send(post(body, "/empty"))
    assert client.answer().status == 202
    server.settle()
    kept = [value for each in gc.get_objects() if isinstance(each, (http_front.Parser, http_front.Request))
            for value in (getattr(each, "body", b""), getattr(each, "buffer", b""))]  # fmt: skip
    assert kept and not any(b"private" in value for value in kept)


def test_server_close_closes_what_an_interrupted_loop_left() -> None:
    server = EchoServer(Limits())
    client = server.client().send(req("GET /interrupts HTTP/1.1"))
    with pytest.raises(KeyboardInterrupt):
        server.serve_forever()
    assert client.silent()
    server.server_close()
    assert client.dropped()
    server.stack.close()


# Failures behind the front


@pytest.mark.parametrize("path", ["/raises", "/raises-later", "/raises-after-later", "/check-fails"])
def test_a_failure_is_a_500_without_a_stack_trace(
    server: EchoServer, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    client = server.client().send(req(f"GET {path} HTTP/1.1"))
    answer = client.answer()
    assert (answer.status, list(answer.doc), answer.closing) == (500, ["Error"], False)
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body
    assert client.works()
    assert [(record.levelname, record.exc_info is not None) for record in caplog.records] == [("ERROR", True)]


def test_a_failed_future_is_a_500(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1") + PROBE)
    server.pending.get(timeout=HANG).set_exception(RuntimeError("secret"))
    assert (client.answer().status, client.answer().status) == (500, 200)


def test_a_future_that_fails_with_a_refusal_is_that_refusal(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1"))
    server.pending.get(timeout=HANG).set_exception(HttpError(409, "no", {"X-Reason": "busy"}))
    answer = client.answer()
    assert (answer.status, answer.doc, answer.headers["x-reason"]) == (409, {"Error": "no"}, "busy")


def test_a_future_that_fails_with_an_exit_does_not_end_the_loop(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1"))
    server.pending.get(timeout=HANG).set_exception(SystemExit(1))  # as of a thread that called sys.exit()
    assert client.answer().status == 500
    assert server.client().works()


def test_an_error_of_the_domain_is_translated(server: EchoServer, caplog: pytest.LogCaptureFixture) -> None:
    answer = server.client().send(req("GET /raises-known HTTP/1.1")).answer()
    assert (answer.status, answer.doc) == (422, {"Error": "translated"})
    assert caplog.records == []


def test_a_failed_future_is_translated(server: EchoServer) -> None:
    client = server.client().send(req("GET /later HTTP/1.1"))
    server.pending.get(timeout=HANG).set_exception(KeyError("secret"))
    assert client.answer().status == 422


@pytest.mark.parametrize("path", ["/forgets", "/unknown-status", "/broken-translation-later", "/answers-and-raises"])
def test_a_handler_that_breaks_its_contract_does_not_stop_the_loop(server: EchoServer, path: str) -> None:
    server.client().send(req(f"GET {path} HTTP/1.1"))
    assert server.client().works()


def test_a_handler_that_forgets_to_answer_is_run_once_and_gives_a_500(server: EchoServer) -> None:
    client = server.client().send(req("GET /forgets HTTP/1.1"))
    assert client.answer().status == 500
    assert server.forgotten == 1


def test_a_handler_that_fails_after_its_answer_gives_no_second_one(server: EchoServer) -> None:
    client = server.client().send(req("GET /answers-and-raises HTTP/1.1") + PROBE).end()
    assert client.statuses() in ([200], [200, 200])


@pytest.mark.parametrize("path", ["/unknown-status", "/broken-translation-later"])
def test_an_error_in_handling_an_error_costs_that_connection(server: EchoServer, path: str) -> None:
    with front(Limits(connections=1)) as server:
        client = server.client().send(req(f"GET {path} HTTP/1.1"))
        waiting = server.client().send(PROBE)
        server.stack.callback(client.reset)
        client.socket.settimeout(HANG / 10)
        assert client.socket.recv(1) == b""
        assert waiting.answer().status == 200


# Answers


@pytest.mark.parametrize("path", ["/echo", "/submitted", "/large", "/empty", "/raises", "/refuses", "/nothing"])
def test_head_has_the_fields_of_get_and_no_body(server: EchoServer, path: str) -> None:
    client = server.client()
    get = client.send(req(f"GET {path} HTTP/1.1")).answer()
    head = client.send(req(f"HEAD {path} HTTP/1.1")).answer("HEAD")
    expected = {**get.headers, "date": "", "content-length": ""}
    assert (head.status, head.body, {**head.headers, "date": "", "content-length": ""}) == (get.status, b"", expected)
    assert int(head.headers["content-length"]) - len(get.body) in (0, len("HEAD") - len("GET"))  # the echo names it
    assert client.works()


def test_a_refused_head_has_no_body(server: EchoServer) -> None:
    client = server.client().send(req("HEAD /echo HTTP/1.1", "Content-Length: five"))
    assert client.answer("HEAD").status == 400
    assert client.rest() == b""


def test_an_answer_without_a_body_has_no_content_type(server: EchoServer) -> None:
    answer = server.client().send(req("GET /empty HTTP/1.1")).answer()
    assert (answer.headers["content-length"], "content-type" in answer.headers) == ("0", False)


@pytest.mark.parametrize("path", ["/echo", "/submitted", "/empty", "/raises", "/refuses", "/nothing", "/large"])
def test_every_answer_has_a_date_and_a_length_and_no_banner(server: EchoServer, path: str) -> None:
    line, fields = server.client().send(req(f"GET {path} HTTP/1.1")).head()
    names = [field.partition(":")[0] for field in fields]
    assert (names.count("Date"), names.count("Content-Length"), names.count("Server")) == (1, 1, 0)
    assert re.fullmatch(r"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", fields[names.index("Date")])


def test_responses_are_counted_by_route_and_status(server: EchoServer) -> None:
    client = server.client().send(PROBE * 3 + req("GET /nothing HTTP/1.1") + b"garbage\r\n\r\n")
    assert client.statuses() == [200, 200, 200, 404, 400]
    assert server.responses == {("other", 200): 3, ("other", 404): 1, ("other", 400): 1}


def test_requests_are_logged_at_debug_only(server: EchoServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.client().send(req("GET /echo?secret HTTP/1.1")).answer()
    server.settle()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [("DEBUG", "127.0.0.1 GET /echo 200")]


def test_calls_from_other_threads_run_in_the_loop(server: EchoServer) -> None:
    found: queue.Queue[threading.Thread] = queue.Queue()
    server.call_soon(lambda: found.put(threading.current_thread()))
    assert found.get(timeout=HANG) is server.thread


def test_no_call_from_many_threads_is_lost(server: EchoServer) -> None:
    calls: list[int] = []
    start = threading.Barrier(8)

    def call() -> None:
        start.wait(HANG)
        for i in range(500):
            server.call_soon(lambda i=i: calls.append(i))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    server.settle()
    assert len(calls) == 4000


def test_a_call_that_fails_is_logged_and_the_loop_goes_on(
    server: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    server.call_soon(fail)
    assert server.client().works()
    assert [record.levelname for record in caplog.records] == ["ERROR"]

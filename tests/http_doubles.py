"""Doubles for the HTTP front: an application that echoes, a front that a test moves on step by step, and its peers.

Nothing here has a thread, and the clock stands still until a test moves it, so a test says what happens in which order.
"""
from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from helpers import Clock
from http_exchange import Exchange, Front, Handler
from http_front import FrontServer
from http_protocol import HttpError, Limits, Request
from providers import HANG

LARGE = b"x" * 1_000_000  # bytes, far more than the sockets of these tests buffer
MEDIUM = 10_000
SMALL = 8192  # bytes of a socket's buffer
MIDNIGHT = 1_700_006_400.0  # of 2023-11-15, in the seconds of time.time()
STEPS = 20_000  # iterations after which a loop spins


def req(line: str = "GET /echo HTTP/1.1", *headers: str, host: str | None = "Host: a", body: bytes = b"") -> bytes:
    """A request as bytes; strings are latin-1, so that any byte can be written."""
    lines = [line, *([host] if host is not None else []), *headers]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + body


def get(path: str = "/echo", *headers: str) -> bytes:
    return req(f"GET {path} HTTP/1.1", *headers)


def post(*headers: str, body: bytes = b"12345", path: str = "/echo") -> bytes:
    """A POST without a Content-Length of its own."""
    return req(f"POST {path} HTTP/1.1", *headers, body=body)


def whole(body: bytes = b"12345", *headers: str, path: str = "/echo") -> bytes:
    """A POST with its Content-Length."""
    return post(f"Content-Length: {len(body)}", *headers, body=body, path=path)


class Echo:
    """An application that echoes, at once or as late as a test wants."""

    def __init__(self) -> None:
        self.routes: dict[str, Handler] = {
            "/echo": self.echo, "/": self.echo, "*": self.echo, "/later": self.later, "/together": self.together,
            "/medium": lambda exchange: exchange.respond(200, LARGE[:MEDIUM]),
            "/large": lambda exchange: exchange.respond(200, LARGE, content_type="text/plain"),
        }  # fmt: skip
        self.bodies: dict[Exchange, bytes] = {}  # of what is deferred
        self.seen: list[str] = []  # the path of each request that was handled
        self.deferred: list[Exchange] = []  # those to /later, until a test finishes them
        self.gathered: list[Exchange] = []  # those to /together, until the end of the iteration
        self.groups: list[int] = []  # how many of them had their responses together
        self.refusals: dict[type[BaseException], HttpError] = {}

    def route(self, exchange: Exchange) -> Handler:
        path = exchange.request.path
        exchange.route = path
        if path not in self.routes:
            raise HttpError(404, "nothing here")
        if exchange.request.method not in ("GET", "HEAD", "POST", "OPTIONS"):
            raise HttpError(405, "not allowed", {"Allow": "GET"})
        return self.handle

    def handle(self, exchange: Exchange) -> None:
        self.seen.append(exchange.request.path)
        self.routes[exchange.request.path](exchange)

    def refusal(self, error: BaseException) -> HttpError | None:
        return self.refusals.get(type(error))

    def shown(self, request: Request) -> str:
        return f"<{request.path}>"

    def respond_together(self, front: Front) -> None:
        gathered, self.gathered = self.gathered, []
        self.groups.append(len(gathered))
        for exchange in gathered:
            exchange.finish(self.echo)

    def echo(self, exchange: Exchange) -> None:
        request = exchange.request
        body = self.bodies.pop(exchange, request.body)
        exchange.respond(200, json.dumps([request.path, body.decode("latin-1")]).encode())

    def defer(self, exchange: Exchange) -> None:
        """Keeps the body; a body that was kept before stays."""
        self.bodies.setdefault(exchange, exchange.request.body)
        exchange.defer(self)

    def withdraw(self, exchange: Exchange) -> bool:
        """What is deferred is worked on until it is finished."""
        return False

    def later(self, exchange: Exchange) -> None:
        self.defer(exchange)
        self.deferred.append(exchange)

    def together(self, exchange: Exchange) -> None:
        self.defer(exchange)
        if not self.gathered:
            exchange.front.at_end(self.respond_together)
        self.gathered.append(exchange)


class Accepted(socket.socket):
    """A connection of the front; it takes no more at once than a test allows."""

    listener: Listener

    def send(self, data: Any, *flags: int) -> int:
        self.listener.sent.append(len(data))
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
        self.sent: list[int] = []  # how many bytes each send() was given
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


class DrivenFront(FrontServer):
    """A front without a thread: a test moves its loop and its clock."""

    def __init__(self, limits: Limits = Limits(), application: Any = None) -> None:
        self.echo: Echo = application or Echo()
        self.clock, self.listener = Clock(0.0), Listener()
        super().__init__(("127.0.0.1", 0), self.echo, limits, listener=self.listener, clock=self.clock,
                         wall_clock=lambda: MIDNIGHT + self.clock())  # fmt: skip
        self._peers = contextlib.ExitStack()

    def connect(self) -> Peer:
        """A new peer; it is closed at the end of the test."""
        peer = Peer(self, socket.create_connection(address_of(self)))
        self._peers.callback(peer.socket.close)
        return peer

    def settle(self) -> None:
        """Runs the loop until nothing is left to do but to wait; fails if that never comes, for the loop would spin."""
        for _ in range(STEPS):
            events = [] if self.stopping and not self.open_connections else self.selector.select(0)
            self.iterate(events)
            if not events:
                return
        raise AssertionError("the loop does not come to rest")

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.settle()
        self.clock.advance(seconds)
        self.settle()

    def finish(self, respond: Callable[..., None] | None = None, *args: Any) -> None:
        """The longest-waiting request to /later gets its response."""
        self.settle()
        self.echo.deferred.pop(0).finish(respond or self.echo.echo, *args)

    def close(self) -> None:
        self._peers.close()
        self.server_close()


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Peer:
    """A client. Whatever it waits for, the loop is moved on until it is there, and the test fails if it does not come.

    Each response is checked for what each response must have.
    """

    def __init__(self, front: DrivenFront, connection: socket.socket) -> None:
        self.front, self.socket = front, connection
        self._received, self._ended = b"", False
        connection.setblocking(False)

    def send(self, data: bytes) -> Peer:
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                self.front.settle()
                _, ready, _ = select.select([], [self.socket], [], HANG)
                assert ready, "the front does not read"
        return self

    def half_close(self) -> None:
        """Sends a FIN; responses can still be read."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Goes away without a FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read(self, size: int = 1_000_000) -> bool:
        """Takes what has come by now; whether that is anything."""
        self.front.settle()
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return False
        self._received += data
        self._ended = not data
        return bool(data)

    def wait(self) -> None:
        """Takes what comes next, be it the end; fails if nothing comes. TCP may hold back an ACK for milliseconds."""
        while not self.read() and not self._ended:
            ready, _, _ = select.select([self.socket.fileno(), self.front.selector.fileno()], [], [], HANG)
            assert ready, f"nothing comes after {self._received!r}"

    def head(self) -> tuple[str, dict[str, str]]:
        """The status line and the headers of the next response, 100 Continue included."""
        while b"\r\n\r\n" not in self._received:
            assert not self._ended, f"no response but {self._received!r}"
            self.wait()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
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
        while len(self._received) < length:
            assert not self._ended, f"{len(self._received)} of {length} bytes"
            self.wait()
        body, self._received = self._received[:length], self._received[length:]
        return Response(int(status), headers, body)

    def statuses(self, count: int) -> list[int]:
        """The statuses of so many responses."""
        return [self.response().status for _ in range(count)]

    def echoed(self) -> tuple[str, str]:
        """The path and the body that the next response echoes."""
        path, body = json.loads(self.response().body)
        return path, body

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to read now, not even an end."""
        return not (self.read() or self._received or self._ended)

    def wait_for_end(self) -> None:
        """Takes what comes until the front closes its side."""
        while not self._ended:
            self.wait()

    @property
    def has_ended(self) -> bool:
        """Whether the front closes its side, and nothing else comes before."""
        self.wait()
        return self._ended and not self._received

    @property
    def works(self) -> bool:
        """Whether a request on this connection gets its response."""
        return self.send(get("/")).echoed() == ("/", "")


def address_of(front: FrontServer) -> tuple[str, int]:
    """Where it listens."""
    host, port = front.server_address[:2]
    return str(host), int(port)


@contextlib.contextmanager
def driven(limits: Limits = Limits()) -> Iterator[DrivenFront]:
    """A front that the block drives."""
    front = DrivenFront(limits)
    try:
        yield front
    finally:
        front.close()


@pytest.fixture
def front() -> Iterator[DrivenFront]:
    with driven() as running:
        yield running

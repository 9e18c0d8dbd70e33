"""HTTP/1.1: bytes to requests, connections and their states, one selector loop for all of them.

`Parser` cuts bytes into requests by the rules of RFC 9112 and knows no socket. `Connection` has a
socket, one state, the bytes still to be sent and a deadline; `FrontHandler`, its subclass, serves the
requests of it. `FrontServer` is the loop: it accepts, reads without blocking and watches the deadlines;
a slow or silent client costs it a dictionary entry, not a thread. What `route` chooses runs once a
request is whole; it calls `respond`, raises `HttpError`, or calls `suspend` when the response comes
later. Responses leave in the order of their requests. Nothing here knows of SMS.

An iteration of the loop first reads from everyone who is ready and sends the responses together at its
end: waking the peers one by one in the middle of the work costs far more context switches (measured:
1.5 times as many POSTs a second).
"""
from __future__ import annotations

import contextlib
import enum
import errno
import functools
import json
import logging
import re
import selectors
import socket
import socketserver
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import HTTPServer
from typing import Any

__all__ = ["FrontHandler", "FrontServer", "HttpError", "Limits", "Parser", "Request", "State"]

log = logging.getLogger("smsproxy.http")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RECEIVE_SIZE = 16 * 1024  # bytes a read: also bounds the pipelined work that one connection gets in an iteration
READ_AHEAD = 16 * 1024  # bytes buffered behind a response under way; then the peer has to wait
SEND_AHEAD = 64 * 1024  # bytes of pipelined responses gathered before they are sent
ACCEPTS = 64  # connections in an iteration, so that a flood of them does not starve those being served
ACCEPT_PAUSE = 1.0  # seconds without accepting after the process ran out of file descriptors
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
LINGER = 2.0  # seconds for a refused peer to read its response before the connection is closed
LAST_CALL = 1.0  # seconds that the shutdown leaves to half a request, and to a peer that does not read
# Seconds that it leaves to an idle connection: a proxy may just be sending a request on it, and whoever is in use is
# told to close with the next response.
IDLE_CALL = 0.2
HEADERS_KEPT = 64  # parsed header sections: clients repeat theirs, which saves a quarter of a request's instructions
NEVER = float("inf")

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}  # RFC 9110, 9.3; RFC 5789
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
# RFC 9112, 3: SP and nothing else. The path is what comes before the query, which begins with "?".
REQUEST_LINE = re.compile(rf"({TOKEN}) (?=[!-~])([!->@-~]*)((?:\?[!-~]*)?) (HTTP/[0-9]\.[0-9])\r\n")
# RFC 9112, 5: no space before the colon, no obs-fold; RFC 9110, 5.5: no NUL, bare CR or other CTL in a value.
HEADER_LINES = re.compile(rf"(?:{TOKEN}:[\t -~\x80-\xff]*\r\n)*")
HOST = re.compile(r"[A-Za-z0-9\-._~%!$&'()*+;=\[\]:]*")  # RFC 3986, 3.2.2, less the comma, which joins repeats
ABSOLUTE_FORM = re.compile(r"(?i:https?)://[^/?#]+")  # RFC 9112, 3.2.2
DIGITS = re.compile(r"[0-9]+")  # RFC 9110, 8.6: int() would take "+5", "5_0" and other scripts' digits
NUMBER = re.compile(r"/(?:[0-9+]|%[0-9A-Fa-f]{2}){4,}(?![^/])")  # in a path, perhaps a phone number
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
BARE_LF = re.compile(rb"(?<!\r)\n")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take; sizes in bytes, times in seconds. The times are totals, not per read."""

    head: int = 16 * 1024
    headers: int = 100
    target: int = 8 * 1024
    body: int = 64 * 1024
    connections: int = 1000
    read_timeout: float = 10.0  # for a head, and again for a body
    write_timeout: float = 10.0  # for a response that the peer does not read
    idle_timeout: float = 60.0  # for a kept-alive connection between requests


class HttpError(Exception):
    """A refusal: status, a text for the client, further headers, whether to close after it."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = {}, *, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, headers, close


# Bytes to requests: no sockets, no clock


@dataclass(slots=True, eq=False)
class Request:
    """One request, as far as it has come. `headers` have lower-case names and are shared: do not change them."""

    method: str = "-"
    path: str = "-"  # without the query
    old: bool = False  # HTTP/1.0
    headers: Mapping[str, str] = field(default_factory=dict)
    last: bool = False  # the connection ends after it
    length: int = 0  # of the body
    body: bytes = b""
    route: str = "other"  # what the response is counted as
    client: str = ""  # who sent it, for the log


ParsedHeaders = tuple[Mapping[str, str], bool, int]  # as `parse_headers_of` returns them


class Parser:
    """Cuts received bytes into requests. `request` is the latest, as far as it has come."""

    def __init__(
        self, limits: Limits, parse_headers: Callable[[str, str, bool], ParsedHeaders] | None = None
    ) -> None:
        self.request = Request()
        self.buffer = b""  # received, not yet cut
        self.in_body = False  # the head of `request` is in, its body is not
        self._limits, self._parse_headers = limits, parse_headers or functools.partial(parse_headers_of, limits)
        self._scanned = 0  # bytes of the buffer already searched for the end of a head

    def next(self) -> Request | None:
        """The next whole request; None while it is not whole.

        Raises `HttpError`, which always closes: where the next request begins is not known.
        """
        if not self.in_body:
            buffer = self.buffer
            if buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: empty lines before a request are skipped
                buffer = self.buffer = EMPTY_LINES.sub(b"", buffer, 1)
            end = buffer.find(b"\r\n\r\n", self._scanned)
            self.request = Request()
            if not 0 <= end <= self._limits.head:
                self._wait_for_head()
                return None
            self.buffer, self._scanned = buffer[end + 4 :], 0
            self._parse(buffer[: end + 2].decode("latin-1"))
        request = self.request
        if length := request.length:
            buffer = self.buffer
            self.in_body = len(buffer) < length
            if self.in_body:
                return None
            request.body, self.buffer = buffer[:length], buffer[length:]
        return request

    def _wait_for_head(self) -> None:
        buffer, limits = self.buffer, self._limits
        if BARE_LF.search(buffer, self._scanned):
            raise HttpError(HTTPStatus.BAD_REQUEST, "a line ends without CR (RFC 9112, 2.2)", close=True)
        if len(buffer) > limits.head + 3:  # which may be the end of it, but for one byte
            if buffer.find(b"\r\n", 0, limits.target + 32) < 0:
                raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long", close=True)
            raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too large", close=True)
        self._scanned = max(0, len(buffer) - 3)  # the end may be split between two reads

    def _parse(self, head: str) -> None:
        request = self.request
        line = REQUEST_LINE.match(head)
        if line is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request line (RFC 9112, 3)", close=True)
        request.method, request.path, query, version = line.groups()
        if version != "HTTP/1.1":
            if not version.startswith("HTTP/1."):
                raise HttpError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 and HTTP/1.0", close=True)
            request.old = version == "HTTP/1.0"
        if len(request.path) + len(query) > self._limits.target:
            raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the target is too long", close=True)
        if not request.path.startswith("/"):
            request.path = _path(request.method, request.path)
        request.headers, request.last, request.length = self._parse_headers(
            head[line.end() :], request.method, request.old
        )


def _path(method: str, target: str) -> str:
    """The path of a target that does not begin with it; both without the query (RFC 9112, 3.2)."""
    if absolute := ABSOLUTE_FORM.match(target):
        path = target[absolute.end() :]
        return path if path.startswith("/") else "/" + path
    if method == "CONNECT" or (method, target) == ("OPTIONS", "*"):
        return target
    raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request target (RFC 9112, 3.2)", close=True)


def parse_headers_of(limits: Limits, section: str, method: str, old: bool) -> ParsedHeaders:
    """The headers by lower-case name, whether the connection ends after the request, and the length of its body."""
    if HEADER_LINES.fullmatch(section) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "malformed header (RFC 9112, 5)", close=True)
    lines = section.split("\r\n")[:-1]
    if len(lines) > limits.headers:
        raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many headers", close=True)
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value  # RFC 9110, 5.3
    host = headers.get("host", "" if old else None)
    if host is None or HOST.fullmatch(host) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "exactly one valid Host is needed (RFC 9112, 3.2)", close=True)
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}  # RFC 9112, 9.3
    last = "close" in options or (old and "keep-alive" not in options)
    if not old and headers.get("expect", "100-continue").lower() != "100-continue":
        raise HttpError(HTTPStatus.EXPECTATION_FAILED, "only 100-continue can be expected", close=True)
    return headers, last, _body_length(headers, method, old, limits.body)


def _body_length(headers: Mapping[str, str], method: str, old: bool, most: int) -> int:
    """RFC 9112, 6.3. A body without a Content-Length is refused, so nothing is ever decoded."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or old:  # 6.1: how requests are smuggled
            raise HttpError(HTTPStatus.BAD_REQUEST, "Transfer-Encoding is not allowed here", close=True)
        if coding.lower() != "chunked":
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, "unknown transfer coding", close=True)
    if length is None:
        if coding is not None or method == "POST":
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length, not chunks", close=True)
        return 0
    if DIGITS.fullmatch(length) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "malformed Content-Length (RFC 9110, 8.6)", close=True)
    digits = length.lstrip("0") or "0"
    if len(digits) > 18 or int(digits) > most:  # 18: int() of thousands is slow
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body exceeds {most} bytes", close=True)
    return int(digits)


@functools.lru_cache(64)  # most responses have one of a few heads
def response_head(status: int, length: int, content_type: str, connection: str) -> bytes:
    """The head of a response, up to its own headers and the date."""
    head = f"HTTP/1.1 {status:d} {HTTPStatus(status).phrase}\r\nContent-Length: {length}\r\n"
    head += f"Content-Type: {content_type}\r\n" if length else ""
    head += f"Connection: {connection}\r\n" if connection else ""
    return head.encode("latin-1")


# One connection


class State(enum.Enum):
    """What a connection is doing: the states that may follow, its timeout (the name of a limit, or seconds), and of
    `takes` (what comes belongs to a request), `serves` (which may be served now) and `owes` (a 408 when the time is
    over) those that are true."""

    IDLE = ("HEAD BODY BUSY LAST CLOSED", "idle_timeout", "takes serves")  # nothing of the next request has come
    HEAD = ("BODY BUSY LAST CLOSED", "read_timeout", "takes serves owes")  # a new one, or part of a head has come
    BODY = ("BUSY LAST CLOSED", "read_timeout", "takes serves owes")  # a head has come, and its body is awaited
    BUSY = ("IDLE LAST CLOSED", NEVER, "takes")  # a request is whole and has no response; its maker has limits
    LAST = ("LINGERING CLOSED", NEVER, "")  # the last response is being sent; a blocked write has a deadline
    LINGERING = ("CLOSED", LINGER, "")  # what comes is thrown away until the peer closes (RFC 9112, 9.6)
    CLOSED = ("", NEVER, "")

    def __init__(self, followers: str, timeout: str | float, properties: str) -> None:
        self.followers, self.timeout = followers.split(), timeout
        self.takes, self.serves, self.owes = (each in properties.split() for each in ("takes", "serves", "owes"))
        self.label = self._name_  # plain attributes: `name` and a hash of a member cost a call each

    def seconds(self, limits: Limits) -> float:
        """The timeout."""
        return getattr(limits, self.timeout) if isinstance(self.timeout, str) else self.timeout


IDLE, HEAD, BODY, BUSY, LAST, LINGERING, CLOSED = State


class Connection:
    """A socket that never blocks: its state, the bytes still to be sent, one deadline. The loop drives it.

    A subclass serves what `parser` has received.
    """

    def __init__(self, connection: socket.socket, client_address: Any, server: Any) -> None:
        self.connection, self.server = connection, server
        self.client_address: Any = client_address or ("local",)
        self.parser = Parser(server.limits, server.parse_headers)
        self.state, self.deadline = HEAD, NEVER
        self._out = b""  # responses that the socket has not taken yet
        self._write_blocked = False  # the socket takes no more of them for now
        self._half_closed = False  # the peer sends no more
        self._unread = False  # it may still send what is not for us
        self._renews = True  # the state has changed, so the deadline is to be set anew
        self._interest = 0  # what the selector watches the connection for

    def advance(self) -> None:
        """Serves the buffered requests in order, until one is not whole or a response has to wait."""
        raise NotImplementedError

    # For the loop

    def ready(self, events: int) -> None:
        """Moves on when the socket can be read or written."""
        self.server.active[self] = None
        if events & WRITE:
            self._flush()
        if not events & READ:
            return
        try:
            data = self.connection.recv(RECEIVE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.drop(f"reading: {error}")
            return
        if not data:
            self._half_closed = True  # the responses under way are still sent
        elif self.state.takes:
            self.parser.buffer += data
            self.advance()

    def end_iteration(self) -> None:
        """Sends the responses, closes what has come to its end, or tells the selector what to wait for."""
        server = self.server
        if self._out and not self._write_blocked:
            self._flush()
        if self._renews and not self._write_blocked:
            self._expire_in(server.timeouts[self.state.label])
        if (self.state is IDLE or (self.state is BUSY and not self.parser.buffer)) and self._interest == READ:
            if not (self._write_blocked or self._half_closed):
                return  # nothing of what follows: in place of it for speed, a twentieth of a GET's bytecodes
        if self.state is LAST and not self._out:
            self._linger()
        if self._half_closed and not (self._out or self.state in (BUSY, CLOSED)):
            self.drop("closed by the peer")
        if self.state is not CLOSED:
            holds = (self._write_blocked or self.state is BUSY) and len(self.parser.buffer) >= READ_AHEAD
            reads = not (self._half_closed or holds)
            interest = (WRITE if self._write_blocked else 0) | (READ if reads else 0)
            if interest != self._interest:
                self._watch(interest)

    def wind_down(self) -> None:
        """At shutdown: serves what is there; half a request, and a peer that does not read, get a last call."""
        self.ready(READ)
        if self._write_blocked:
            self._expire_in(self.deadline - self.server.now)
        else:
            self._renews = True  # at the end of the iteration

    def drop(self, reason: str) -> None:
        """Closes the connection now; a second call does nothing."""
        if self.state is not CLOSED:
            log.debug("%s connection closed: %s", self.client_address[0], reason)
            if self._interest:
                self._watch(0)
            self._enter(CLOSED)
            self._out = self.parser.buffer = b""
            self.connection.close()
            self.server.forget(self)

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has come and no response is under way."""
        return self.state in (IDLE, HEAD) and not (self.parser.buffer or self._out)

    # States and deadlines

    def _enter(self, state: State) -> None:
        if state.label not in self.state.followers:
            raise RuntimeError(f"a connection cannot go from {self.state.label} to {state.label}")
        self.state, self._renews = state, True

    def _expire_in(self, seconds: float) -> None:
        if self.server.stopping and self.state is not BUSY:
            seconds = min(seconds, IDLE_CALL if self.idle else LAST_CALL)
        self._renews = False
        self.deadline = deadline = self.server.now + seconds
        if deadline < self.server.soonest:
            self.server.soonest = deadline

    def _watch(self, interest: int) -> None:
        selector = self.server.selector
        if not self._interest:
            selector.register(self.connection, interest, self.ready)
        elif interest:
            selector.modify(self.connection, interest, self.ready)
        else:
            selector.unregister(self.connection)
        self._interest = interest

    # Bytes out

    def _flush(self) -> None:
        """Sends what the socket takes of the responses; once it took all, serves what waited for that."""
        try:
            self._out = self._out[self.connection.send(self._out) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.drop(f"writing: {error}")
            return
        if not self._out:
            if self._write_blocked:
                self._write_blocked, self._renews = False, True
            if self.parser.buffer:
                self.advance()
        elif not self._write_blocked:
            self._write_blocked = True
            self._expire_in(self.server.limits.write_timeout)

    def _linger(self) -> None:
        """Closes after the last response. Bytes left unread would make the kernel send a reset, which can take the
        response with it, so they are read and thrown away for a while (RFC 9112, 9.6)."""
        if self._half_closed or not (self._unread or self.parser.buffer):
            self.drop("done")
            return
        self._enter(LINGERING)
        self.parser.buffer = b""
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.drop(f"closing: {error}")


class FrontHandler(Connection):
    """The requests of one connection; subclasses say what responds to them.

    While that runs, `request` is the request. Everything runs in the loop's thread and must not block.
    """

    def __init__(self, connection: socket.socket, client_address: Any, server: Any) -> None:
        super().__init__(connection, client_address, server)
        self.request = self.parser.request
        self._suspended = False

    # For subclasses to override

    def route(self) -> Callable[[Any], None]:
        """What responds to the request, called with the handler; raises `HttpError` when the head alone decides.
        Runs again once the body is in."""
        raise NotImplementedError

    def translate(self, error: BaseException) -> HttpError | None:
        """The refusal that stands for an exception; None makes it a 500."""
        return error if isinstance(error, HttpError) else None

    # For whatever responds

    def respond(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}, content_type: str = "application/json"
    ) -> None:
        """Responds to the request as a whole; it leaves at the end of the iteration, or as fast as the peer reads."""
        server, request = self.server, self.request
        last = request.last or server.stopping
        head = response_head(status, len(body), content_type, "close" if last else "keep-alive" if request.old else "")
        for name, value in headers.items() if headers else ():
            head += b"%b: %b\r\n" % (name.encode("latin-1"), value.encode("latin-1"))
        head += server.date
        # Before anything leaves: a second response, which would pass for the next request's, ends here.
        self._enter(LAST if last else IDLE)
        self._out += head if request.method == "HEAD" else head + body
        server.responses[request.route, status] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s%s %s %s %d", self.client_address[0], f" ({request.client})" if request.client else "",
                      request.method, self._shown, status)  # fmt: skip
        request.body = b""  # nothing of it is kept while the connection is idle
        server.active[self] = None

    def fail(self, error: BaseException) -> None:
        """Responds with the refusal that stands for the error, which is logged where there is none."""
        refusal = self.translate(error)
        if refusal is None:
            log.error("%s %s failed", self.request.method, self._shown, exc_info=error)
            refusal = HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        if refusal.close:
            self.request.last = self._unread = True
        self.respond(refusal.status, json.dumps({"Error": refusal.message}).encode() + b"\n", refusal.headers)

    def suspend(self) -> None:
        """The response comes later, by `resume`; until then the next requests of this connection wait."""
        self._suspended = True

    def resume(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)`, which responds to the suspended request; an error is translated."""
        if self.state is BUSY:
            self._run(call, *args)
            if self.parser.buffer:
                self.advance()

    # For the loop

    def expire(self) -> None:
        """At the deadline a request half received gets a 408; anything else is dropped."""
        if self._write_blocked or self.idle or not self.state.owes:
            self.drop("timed out")
        else:
            self.fail(HttpError(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", close=True))

    def advance(self) -> None:
        """See `Connection`."""
        parser = self.parser
        while parser.buffer and self.state.serves and not self._write_blocked and len(self._out) < SEND_AHEAD:
            try:
                request = parser.next()
            except HttpError as error:
                self.request = parser.request
                self.fail(error)
                return
            self.request = parser.request
            if request is None:
                self._wait_for_more()
                return
            self.state, self._renews = BUSY, True  # every state that serves may lead there
            self._run(self._serve)

    def _wait_for_more(self) -> None:
        if self.parser.in_body and self.state is not BODY:
            self._enter(BODY)
            if "expect" in self.request.headers and not self.request.old:
                self._expect()
        elif self.parser.buffer and self.state is IDLE:
            self._enter(HEAD)

    def _expect(self) -> None:
        """RFC 9110, 10.1.1: the final status in place of `100 Continue` when the head already tells it."""
        try:
            self._check()
        except Exception as error:
            self.request.last = self._unread = True  # the body may come or not
            self.fail(error)
        else:
            self._out += b"HTTP/1.1 100 Continue\r\n\r\n"
            self.server.active[self] = None

    def _check(self) -> Callable[[Any], None]:
        if self.request.method not in METHODS:
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, f"unknown method {self.request.method}")
        return self.route()

    def _serve(self) -> None:
        self._check()(self)

    def _run(self, call: Callable[..., None], *args: Any) -> None:
        """The boundary: a request that fails costs nobody else anything."""
        self._suspended = False
        try:
            call(*args)
            if self.state is BUSY and not self._suspended:
                raise RuntimeError("the handler gave no response")
        except (Exception, SystemExit) as error:  # a worker may bring the exit of another thread
            if self.state is BUSY:
                self.fail(error)
            else:  # it has responded: a second response would pass for the next request's
                log.error("%s %s failed after its response", self.request.method, self._shown, exc_info=error)

    @property
    def _shown(self) -> str:
        """The path for the logs, without what may be a phone number."""
        return NUMBER.sub("/***", self.request.path)


# The loop


class Acceptor:
    """Accepts connections, as many as the server may have; others wait in the backlog. For the loop's thread."""

    def __init__(self, server: FrontServer) -> None:
        self._server = server
        self.accepting = False
        self.again = NEVER  # when to accept again, if no connection closes before
        self._exhausted_since: float | None = None  # when the process ran out of file descriptors

    def start(self) -> None:
        """Accepts from now on."""
        self.accepting, self.again = True, NEVER
        self._server.selector.register(self._server.socket, READ, self.ready)

    def pause(self, seconds: float) -> None:
        """Stops accepting until a connection closes, at most for so long."""
        self._server.selector.unregister(self._server.socket)
        self.accepting, self.again = False, self._server.now + seconds
        self._server.soonest = min(self._server.soonest, self.again)

    def ready(self, mask: int) -> None:
        """Accepts who waits."""
        server = self._server
        for _ in range(ACCEPTS if self.accepting else 0):  # 0: the shutdown came in the same iteration
            if server.open_connections >= server.limits.connections:
                self.pause(NEVER)
                return
            try:
                connection, address = server.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_RESOURCES:
                    self._exhausted(error)
                return
            if self._exhausted_since is not None:
                log.warning("accepting connections again after %.1f s", server.now - self._exhausted_since)
                self._exhausted_since = None
            connection.setblocking(False)
            server.add(connection, address)

    def _exhausted(self, error: OSError) -> None:
        if self._exhausted_since is None:
            self._exhausted_since = self._server.now
            log.warning("not accepting connections for now: %s", error)
        self.pause(ACCEPT_PAUSE)


class FrontServer(HTTPServer):
    """The loop: accepts, watches sockets and deadlines, and runs what other threads hand back.

    Making one listens already (OSError if the address is taken); connections wait in the backlog until
    `serve_forever`, which blocks its thread. `shutdown`, `call_soon` and `submit` may be called from any
    thread, the first two also in signal handlers. `listener` is a listening socket to serve in place of the
    address. `responses` counts by route and status.
    """

    request_queue_size = 1024  # the default of 5 drops connections under a burst; the kernel may cap it
    allow_reuse_port = False  # a second process on the same port must fail, not share it

    def __init__(
        self, address: tuple[str, int], handler: type[FrontHandler], limits: Limits = Limits(), *, workers: int = 8,
        listener: socket.socket | None = None,
    ) -> None:  # fmt: skip
        self.limits, self._handler = limits, handler
        self.timeouts = {state.label: state.seconds(limits) for state in State}
        self.parse_headers = functools.lru_cache(HEADERS_KEPT)(functools.partial(parse_headers_of, limits))
        self.stopping = False
        self.responses: Counter[tuple[str, int]] = Counter()
        self.now, self.soonest = time.monotonic(), NEVER  # no deadline of any connection is earlier than `soonest`
        self.date = b""  # the header of this second and the end of a head
        self._date_until = 0.0
        self.active: dict[Connection, None] = {}  # connections to look after at the end of this iteration
        self._connections: set[Connection] = set()
        self._acceptor = Acceptor(self)
        self.stop_at = NEVER  # when a shutdown drops what is still open, by time.monotonic()
        self._calls: deque[tuple[Any, ...]] = deque()
        self._woken = False  # a byte is on its way through the waker
        with contextlib.ExitStack() as undo:
            undo.callback(self.server_close)
            self._workers = _started_pool(workers)
            self.selector = selectors.DefaultSelector()
            self._waker, self._wakee = socket.socketpair()
            self._listen(address, listener)
            undo.pop_all()

    def _listen(self, address: tuple[str, int], listener: socket.socket | None) -> None:
        if listener is None:
            self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            super().__init__(address, self._handler, bind_and_activate=True)  # type: ignore[arg-type]
        else:
            self.socket, self.server_address = listener, listener.getsockname()
        for sock in (self.socket, self._waker, self._wakee):
            sock.setblocking(False)
        if self.socket.family in (socket.AF_INET, socket.AF_INET6):
            # Accepted sockets inherit it: without it Nagle's algorithm holds small responses back.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(self._wakee, READ, self._wake)
        self._acceptor.start()

    def server_bind(self) -> None:
        """Binds without the name look-up of `HTTPServer.server_bind`, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serves until `shutdown`, then until every running request has its response."""
        while not self.stopping or self._connections:
            self._tick()
            timeout = None if self.soonest == NEVER else min(max(0.0, self.soonest - self.now), 3600.0)
            events = self.selector.select(timeout)
            self._tick()
            for key, mask in events:
                try:
                    key.data(mask)
                except Exception:
                    self._failed(key.data)
            self._end_iteration()
            if self.now >= self.soonest:
                self._check_deadlines()
                self._end_iteration()

    def end_of_iteration(self) -> None:
        """For subclasses to override: called before the responses are sent; must not block."""

    def shutdown(self, timeout: float = 10.0) -> None:
        """Begins the end and returns at once: accepts no more, closes idle connections, lets running
        requests finish for at most `timeout` seconds; a second call can only shorten that."""
        self.call_soon(self._begin_stopping, timeout)

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` in the loop's thread."""
        self._calls.append((call, *args))
        if not self._woken:  # append first, look second: _wake clears first, drains second
            self._woken = True
            with contextlib.suppress(OSError):  # the loop is over, and nobody waits for the response
                self._waker.send(b"\0")

    @property
    def wakeup_fd(self) -> int:
        """Whatever is written here wakes the loop; for `signal.set_wakeup_fd`."""
        return self._waker.fileno()

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs work that may block in one of the workers."""
        return self._workers.submit(work, *args)

    def server_close(self) -> None:
        """Frees the port, the threads and every connection; call it after `serve_forever` has returned."""
        for handler in list(self._connections):
            handler.drop("the server closed")
        parts = vars(self)  # after a constructor that failed some are missing
        if "_workers" in parts:
            self._workers.shutdown(wait=False, cancel_futures=True)
        for name in ("socket", "selector", "_waker", "_wakee"):
            if name in parts:
                parts[name].close()

    def add(self, connection: socket.socket, address: Any) -> None:
        """Takes care of a new connection."""
        handler = self._handler(connection, address, self)
        self._connections.add(handler)
        self.guard(handler.ready, READ)  # the request is mostly there already

    def forget(self, handler: Connection) -> None:
        """Lets go of a connection, which makes room for the next."""
        self._connections.discard(handler)
        if not self._acceptor.accepting and not self.stopping:
            self._acceptor.start()

    def guard(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` at the loop's boundary: an error of ours costs at most the connection it happened on."""
        try:
            call(*args)
        except Exception:
            self._failed(call)

    def _failed(self, call: Callable[..., None]) -> None:
        log.exception("the server's loop goes on after an error")
        handler = getattr(call, "__self__", None)
        if isinstance(handler, Connection):
            handler.drop("internal error")

    def _tick(self) -> None:
        self.now = time.monotonic()
        if self.now >= self._date_until:
            wall = time.time()
            self.date = f"Date: {formatdate(int(wall), usegmt=True)}\r\n\r\n".encode()
            self._date_until = self.now + 1 - wall % 1

    def _end_iteration(self) -> None:
        self.guard(self.end_of_iteration)
        while self.active:
            handlers, self.active = self.active, {}
            for handler in handlers:
                if handler.state is not CLOSED:
                    try:  # in place of `guard`, which costs a twentieth of a GET
                        handler.end_iteration()  # which may serve requests that waited for it
                    except Exception:
                        self._failed(handler.end_iteration)
            self.guard(self.end_of_iteration)

    def _wake(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakee.recv(64)
        self._woken = False
        for _ in range(len(self._calls)):  # whatever comes later sends a byte of its own
            self.guard(*self._calls.popleft())

    def _check_deadlines(self) -> None:
        self.soonest = NEVER
        if self.now >= self._acceptor.again:
            self._acceptor.start()
        for handler in list(self._connections):
            if self.now >= self.stop_at:
                handler.drop("the shutdown took too long")
            elif self.now >= handler.deadline:
                self.guard(handler.expire)
        self.soonest = min(self._acceptor.again, self.stop_at, *(each.deadline for each in self._connections), NEVER)

    def _begin_stopping(self, timeout: float) -> None:
        self.stop_at = min(self.stop_at, self.now + timeout)
        self.soonest = min(self.soonest, self.stop_at)
        if self.stopping:
            return
        acceptor, before = self._acceptor, -1
        while acceptor.accepting and before < len(self._connections):  # those who have connected already are served
            before = len(self._connections)
            acceptor.ready(READ)
        self.stopping = True
        if acceptor.accepting:
            acceptor.pause(NEVER)
        acceptor.again = NEVER
        self.socket.close()
        for handler in list(self._connections):
            self.guard(handler.wind_down)


def _started_pool(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads all run. It would start them one by one with the work, and `submit` queues the work before
    it says that the system has no thread left."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="smsproxy-http")
    barrier = threading.Barrier(workers + 1)
    try:
        for _ in range(workers):
            pool.submit(barrier.wait)
        barrier.wait()
    except RuntimeError:
        barrier.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool

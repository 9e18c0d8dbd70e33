"""The HTTP/1.1 protocol: one thread, one selector loop, strict requests in, whole answers out.

`FrontServer` accepts connections, reads without blocking and watches every deadline; a slow or
silent client costs it a dictionary entry, not a thread. `FrontHandler` is one connection: it cuts
the received bytes into requests by the rules of RFC 9112 and runs `do_<METHOD>` once a request is
whole. A method answers with `answer`, raises `HttpError`, or hands a Future to `defer` when the work
may block; answers leave in the order of their requests. Nothing here knows of SMS.

A turn of the loop first reads from everyone who is ready and writes the answers at its end: peers that
sleep until they are answered are then woken in a row, which costs far less than once in the middle of
the work for each (measured: 1.5 times as many POSTs a second).
"""
from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import re
import selectors
import socket
import socketserver
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

__all__ = ["FrontHandler", "FrontServer", "HttpError", "Limits"]

log = logging.getLogger("smsproxy.http")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RECEIVE_SIZE = 16 * 1024  # bytes a read: also bounds the pipelined work one connection gets in a turn
READ_AHEAD = 16 * 1024  # bytes buffered behind an answer under way; then the peer has to wait
SEND_AHEAD = 64 * 1024  # bytes of pipelined answers gathered before they are sent
ACCEPTS_A_TURN = 64  # so that a flood of connections does not starve those being served
ACCEPT_PAUSE = 1.0  # seconds without accepting after the process ran out of file descriptors
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
LINGER = 2.0  # seconds for a refused peer to read its answer before the connection is closed
LAST_CALL = 1.0  # seconds for a request half received when the shutdown begins
FIELDS_KEPT = 64  # parsed fields, of one client each
NEVER = float("inf")

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}  # RFC 9110, 9.3; RFC 5789
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) (HTTP/[0-9]\.[0-9])")  # RFC 9112, 3: SP and nothing else
# RFC 9112, 5: no space before the colon, no obs-fold; RFC 9110, 5.5: no NUL, bare CR or other CTL in a value.
FIELD_LINES = re.compile(rf"(?:{TOKEN}:[\t -~\x80-\xff]*\r\n)*")
HOST = re.compile(r"[A-Za-z0-9\-._~%!$&'()*+;=\[\]:]*")  # RFC 3986, 3.2.2, less the comma, which joins repeats
ABSOLUTE_FORM = re.compile(r"(?i:https?)://[^/?#]+")  # RFC 9112, 3.2.2
DIGITS = re.compile(r"[0-9]+")  # RFC 9110, 8.6: int() would take "+5", "5_0" and other scripts' digits
NUMBER = re.compile(r"/[0-9+%]{4,}(?![^/])")
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
BARE_LF = re.compile(rb"(?<!\r)\n")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take; sizes in bytes, times in seconds. The times are totals, not per read."""

    head: int = 16 * 1024
    fields: int = 100
    target: int = 8 * 1024
    body: int = 64 * 1024
    connections: int = 1000
    read_timeout: float = 10.0  # for a head, and again for a body
    write_timeout: float = 10.0  # for an answer that the peer does not read
    idle_timeout: float = 60.0  # for a kept-alive connection between requests


class HttpError(Exception):
    """A refusal: status, a text for the client, further header fields, whether to close after it."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] = {}, *, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, headers, close


def parse_fields(fields: str, command: str, version: str, limits: Limits) -> tuple[Mapping[str, str], bool, int]:
    """The fields of a head by lower-case name, whether the connection ends after this request, and the length of
    its body. Raises `HttpError`, which always closes: where the next request begins is not known."""
    headers = _split_fields(fields, limits.fields)
    old = version == "HTTP/1.0"
    host = headers.get("host", "" if old else None)
    if host is None or HOST.fullmatch(host) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "exactly one valid Host is needed (RFC 9112, 3.2)", close=True)
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}  # RFC 9112, 9.3
    close = "close" in options or (old and "keep-alive" not in options)
    if not old and headers.get("expect", "100-continue").lower() != "100-continue":
        raise HttpError(HTTPStatus.EXPECTATION_FAILED, "only 100-continue can be expected", close=True)
    return headers, close, _body_length(headers, command, old, limits.body)


def _split_fields(fields: str, most: int) -> dict[str, str]:
    if FIELD_LINES.fullmatch(fields) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "malformed header field (RFC 9112, 5)", close=True)
    lines = fields.split("\r\n")[:-1]
    if len(lines) > most:
        raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header fields", close=True)
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value  # RFC 9110, 5.3
    return headers


def _body_length(headers: dict[str, str], command: str, old: bool, most: int) -> int:
    """RFC 9112, 6.3. A body without a Content-Length is refused, so nothing is ever decoded."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or old:  # 6.1: how requests are smuggled
            raise HttpError(HTTPStatus.BAD_REQUEST, "Transfer-Encoding is not allowed here", close=True)
        if coding.lower() != "chunked":
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, "unknown transfer coding", close=True)
    if length is None:
        if coding is not None or command == "POST":
            raise HttpError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed", close=True)
        return 0
    if DIGITS.fullmatch(length) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "malformed Content-Length (RFC 9110, 8.6)", close=True)
    digits = length.lstrip("0") or "0"
    if len(digits) > 18 or int(digits) > most:  # 18: int() of thousands is slow
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body exceeds {most} bytes", close=True)
    return int(digits)


@functools.lru_cache(64)  # most answers have one of a few heads
def answer_head(status: int, length: int, content_type: str, connection: str) -> bytes:
    """The head of an answer, up to the fields of its own and the date."""
    head = f"HTTP/1.1 {status:d} {HTTPStatus(status).phrase}\r\nContent-Length: {length}\r\n"
    if length:
        head += f"Content-Type: {content_type}\r\n"
    if connection:
        head += f"Connection: {connection}\r\n"
    return head.encode("latin-1")


class FrontHandler(BaseHTTPRequestHandler):
    """One connection of a `FrontServer`, driven by its loop; subclasses add `do_<METHOD>` methods.

    While such a method runs, `command`, `path` (without the query), `headers` (lower-case names; shared with
    other requests, so not to be changed) and `body` describe the request. Everything runs in the loop's thread
    and must not block.
    """

    server: FrontServer
    headers: Mapping[str, str]  # type: ignore[assignment]

    def __init__(self, request: socket.socket, client_address: Any, server: FrontServer) -> None:
        # Not super().__init__(): it would read and answer here and now, blocking.
        self.connection, self.client_address, self.server = request, client_address, server
        self.command, self.path, self.request_version = "-", "-", "HTTP/1.1"
        self.headers, self.body = {}, b""
        self.close_connection = False
        self._buffer = b""  # received, not yet cut into requests
        self._scanned = 0  # bytes of the buffer already searched for the end of a head
        self._length: int | None = None  # of the body whose head is in; None before the head and after the answer
        self._reading = True  # the clock of the current head runs
        self._out = b""  # answers that the socket has not taken yet
        self._touched = False  # `settle` is to be called at the end of the turn
        self._stuck = False  # the socket takes no more of them for now
        self._suspended = False  # the answer to the current request comes later
        self._finished = False  # the last answer has been given: whatever else comes is not for us
        self._ended = self._lingering = self._closed = False
        self._interest = 0  # what the selector watches this connection for
        self._set_deadline(server.limits.read_timeout)

    # For subclasses to override

    def check(self) -> None:
        """Raises `HttpError` when the head alone settles the answer. Runs again once the body is in."""

    def translate(self, error: BaseException) -> HttpError | None:
        """The refusal that stands for an exception of a `do_` method; None makes it a 500."""
        return error if isinstance(error, HttpError) else None

    # For do_ methods to use

    def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        content_type: str = "application/json",
    ) -> None:
        """Answers the current request as a whole; it leaves at the end of the turn, or as fast as the peer reads."""
        self._finished = self.close_connection or self.server.closing
        connection = "close" if self._finished else "keep-alive" if self.request_version == "HTTP/1.0" else ""
        head = answer_head(status, len(body), content_type, connection)
        for name, value in headers.items() if headers else ():
            head += b"%b: %b\r\n" % (name.encode("latin-1"), value.encode("latin-1"))
        head += self.server.date
        self._out += head if self.command == "HEAD" else head + body
        self._touch()
        self.server.answers[status] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %s %d", self.client_address[0], self.command, self._shown, status)
        self._length, self._reading = None, False
        if not self._stuck:
            self._set_deadline(self.server.limits.idle_timeout)

    def fail(self, error: BaseException) -> None:
        """Answers with the refusal that stands for the error, which is logged where there is none."""
        refusal = self.translate(error)
        if refusal is None:
            log.error("%s %s failed", self.command, self._shown, exc_info=error)
            refusal = HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        self._refuse(refusal)

    def suspend(self) -> None:
        """The answer comes later, by `resume`; until then the next requests of this connection wait."""
        self._suspended = True
        self.deadline = NEVER  # whoever works on the answer has limits of its own

    def resume(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)`, which answers the suspended request; an error is translated. In the loop's thread."""
        if not self._closed:
            self._suspended = False
            self._run(call, *args)
            self._advance()

    def defer(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        """Answers later: `then(result)` runs in the loop once the Future is done; its error is translated."""
        self.suspend()
        future.add_done_callback(lambda done: self.server.call_soon(self.resume, lambda: then(done.result())))

    # For the server's loop to call

    def ready(self, events: int) -> None:
        """Moves on when the socket can be read or written."""
        if events & WRITE:
            self._flush()
        if events & READ:
            self._receive()
        self._touch()

    def settle(self) -> None:
        """Ends a turn: sends the answers, closes what has come to its end, or tells the selector what to wait for."""
        self._touched = False
        if self._out and not (self._stuck or self._closed):
            self._flush()
        if self._touched or self._closed:  # if touched, once more: more answers have come
            return
        if self._ended and not (self._out or self._suspended):
            self.drop("closed by the peer")
            return
        if self.server.closing and self.idle:
            self._receive()  # what came in the course of this turn: to close on it unread would reset the peer
            if self.idle:
                self.drop("shutting down")
            else:
                self._touch()
            return
        interest = WRITE if self._stuck else 0
        if not self._ended and (len(self._buffer) < READ_AHEAD or not (self._stuck or self._suspended)):
            interest |= READ
        if interest != self._interest:
            self.server.watch(self, self._interest, interest)
            self._interest = interest

    def expire(self) -> None:
        """At the deadline a request half received gets a 408; anything else is dropped."""
        if self._stuck or self._finished or self.idle:
            self.drop("timed out")
        else:
            self._refuse(HttpError(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", close=True))

    def wind_down(self) -> None:
        """At shutdown: serves what is there, closes if idle, gives half a request a last call."""
        self.ready(READ)
        if not (self._out or self._suspended):
            self._set_deadline(min(LAST_CALL, self.deadline - self.server.now))

    def drop(self, reason: str) -> None:
        """Closes the connection now; a second call does nothing."""
        if not self._closed:
            self._closed = self._finished = True
            log.debug("%s connection closed: %s", self.client_address[0], reason)
            self.server.forget(self, self._interest)
            self.connection.close()

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has come and no answer is under way."""
        under_way = self._suspended or self._out or self._buffer or self._lingering
        return not under_way and self._length is None

    @property
    def _shown(self) -> str:
        """The path for the logs, without what may be a phone number."""
        return NUMBER.sub("/***", self.path)

    def _set_deadline(self, seconds: float) -> None:
        self.deadline = self.server.now + seconds
        if self.deadline < self.server.soonest:
            self.server.soonest = self.deadline

    def _touch(self) -> None:
        """Asks for `settle` at the end of the turn."""
        if not self._touched:
            self._touched = True
            self.server.touched.append(self)

    def _receive(self) -> None:
        if self._closed:
            return
        try:
            data = self.connection.recv(RECEIVE_SIZE)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.drop(f"reading: {error}")
        else:
            if not data:
                self._ended = True  # the answers under way are still sent: the peer may have closed one side only
            elif not self._finished:
                self._buffer += data
                self._advance()

    def _flush(self) -> None:
        """Sends what the socket takes of the answers; once it took all, serves what waited for that."""
        try:
            sent = self.connection.send(self._out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.drop(f"writing: {error}")
            return
        self._out = self._out[sent:]
        if self._out:
            if not self._stuck:
                self._stuck = True
                self._set_deadline(self.server.limits.write_timeout)
            return
        if self._stuck:
            self._stuck = False
            limits, half_received = self.server.limits, self._reading or self._length is not None
            wait = limits.read_timeout if half_received else limits.idle_timeout
            self._set_deadline(NEVER if self._suspended else wait)
        if self._finished:
            self._finish()
        else:
            self._advance()

    def _finish(self) -> None:
        """Closes after the last answer. Bytes left unread would make the kernel send a reset, which can
        take the answer with it, so they are read and thrown away for a while (RFC 9112, 9.6)."""
        if self._ended or not (self._lingering or self._buffer):
            self.drop("done")
            return
        self._lingering = True
        self._buffer = b""
        self._set_deadline(LINGER)
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.drop(f"closing: {error}")

    def _advance(self) -> None:
        """Serves the buffered requests in order, until one is incomplete or an answer has to wait."""
        while self._buffer and not (self._suspended or self._stuck or self._finished or len(self._out) >= SEND_AHEAD):
            try:
                if not self._next_request():
                    return
            except HttpError as error:
                self._refuse(error)
            else:
                self._run(self._dispatch)

    def _dispatch(self) -> None:
        self._check()
        getattr(self, "do_" + self.command)()

    def _check(self) -> None:
        if self.command not in METHODS:
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, f"unknown method {self.command}")
        self.check()

    def _run(self, call: Callable[..., None], *args: Any) -> None:
        """The boundary: a request that fails costs nobody else anything."""
        try:
            call(*args)
            if self._length is not None and not self._suspended:
                raise RuntimeError("the handler gave no answer")
        except (Exception, SystemExit) as error:  # a Future may bring the exit of another thread
            if self._length is None:  # it has answered: a second answer would pass for the next request's
                log.error("%s %s failed after its answer", self.command, self._shown, exc_info=error)
            else:
                self.fail(error)

    def _refuse(self, refusal: HttpError) -> None:
        if refusal.close:
            self.close_connection = self._lingering = True
        self.answer(refusal.status, json.dumps({"Error": refusal.message}).encode(), refusal.headers)

    # Bytes to requests. Every refusal here closes: where the next request begins is not known.

    def _next_request(self) -> bool:
        """Cuts one request off the buffer; False while it is not whole."""
        if self._length is None:
            self._take_head()
        if self._length is None or len(self._buffer) < self._length:
            return False
        self.body = b""
        if self._length:
            self.body, self._buffer = self._buffer[: self._length], self._buffer[self._length :]
        return True

    def _take_head(self) -> None:
        """Cuts one head off the buffer and parses it, once it is whole."""
        buffer = self._buffer
        self.command, self.path = "-", "-"
        if buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: empty lines before a request are skipped
            buffer = self._buffer = EMPTY_LINES.sub(b"", buffer, 1)
        end = buffer.find(b"\r\n\r\n", self._scanned)
        if not 0 <= end <= self.server.limits.head:
            self._wait_for_head()
            return
        line, _, fields = buffer[: end + 2].decode("latin-1").partition("\r\n")
        self._buffer = buffer[end + 4 :]
        self._scanned = 0
        self._parse_line(line)
        self.headers, self.close_connection, length = self.server.parse_fields(
            fields, self.command, self.request_version
        )
        self._length = length
        if len(self._buffer) < length:
            self._set_deadline(self.server.limits.read_timeout)
            if "expect" in self.headers and self.request_version == "HTTP/1.1":
                self._expect()

    def _wait_for_head(self) -> None:
        buffer, limits = self._buffer, self.server.limits
        if BARE_LF.search(buffer, self._scanned):
            raise HttpError(HTTPStatus.BAD_REQUEST, "a line ends without CR (RFC 9112, 2.2)", close=True)
        if len(buffer) > limits.head:
            if buffer.find(b"\r\n", 0, limits.target + 32) < 0:
                raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long", close=True)
            raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too large", close=True)
        self._scanned = max(0, len(buffer) - 3)  # the end may be split between two reads
        if buffer and not self._reading:
            self._reading = True
            self._set_deadline(limits.read_timeout)

    def _expect(self) -> None:
        """RFC 9110, 10.1.1: the final status in place of `100 Continue` when the head already tells it."""
        try:
            self._check()
        except Exception as error:
            self.close_connection = self._lingering = True  # the body may come or not
            self.fail(error)
        else:
            self._out += b"HTTP/1.1 100 Continue\r\n\r\n"
            self._touch()

    def _parse_line(self, line: str) -> None:
        match = REQUEST_LINE.fullmatch(line)
        if match is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request line (RFC 9112, 3)", close=True)
        self.command, target, version = match.groups()
        if version != "HTTP/1.1":
            if not version.startswith("HTTP/1."):
                raise HttpError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 and HTTP/1.0", close=True)
            version = "HTTP/1.0" if version == "HTTP/1.0" else "HTTP/1.1"
        self.request_version = version
        if len(target) > self.server.limits.target:
            raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the target is too long", close=True)
        self.path = target.partition("?")[0] if target.startswith("/") else self._path(target)

    def _path(self, target: str) -> str:
        """The path of a target that does not begin with it, without the query (RFC 9112, 3.2)."""
        if absolute := ABSOLUTE_FORM.match(target):
            path = target[absolute.end() :].partition("?")[0]
            return path if path.startswith("/") else "/" + path
        if self.command == "CONNECT" or (self.command, target) == ("OPTIONS", "*"):
            return target.partition("?")[0]
        raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request target (RFC 9112, 3.2)", close=True)


class FrontServer(HTTPServer):
    """The loop: accepts, watches sockets and deadlines, and runs what other threads hand back.

    Making one binds the address (OSError if it is taken), but nobody can connect before `listen`.
    `serve_forever` blocks its thread; `shutdown`, `call_soon` and `submit` may be called from any
    thread and from signal handlers. `answers` counts answers by status code.
    """

    request_queue_size = 1024  # the default of 5 drops connections under a burst; the kernel may cap it
    allow_reuse_port = False  # a second process on the same port must fail, not share it

    def __init__(
        self, address: tuple[str, int], handler: type[FrontHandler], limits: Limits = Limits(), *, workers: int = 8
    ) -> None:
        self.limits = limits
        self.closing = False
        self.answers: Counter[int] = Counter()
        self.now = time.monotonic()
        self.soonest = NEVER  # no deadline of any connection is earlier
        self.date = b""  # the field of this second and the end of a head
        self._date_until = 0.0
        # Clients repeat their fields: a quarter of the instructions of a request, saved. Others cost no more than
        # `FIELDS_KEPT` heads of memory.
        self.parse_fields = functools.lru_cache(FIELDS_KEPT)(functools.partial(parse_fields, limits=limits))
        self.touched: list[FrontHandler] = []  # connections to be settled at the end of this turn
        self._connections: set[FrontHandler] = set()
        self._listening = self._accepting = False
        self._accept_again = self._stop_at = NEVER
        self._calls: deque[tuple[Any, ...]] = deque()
        self._woken = False  # a byte is on its way through the waker
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="smsproxy-http")
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._handler = handler
        super().__init__(address, handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError:
            self.server_close()
            raise
        self.socket.setblocking(False)
        # Accepted sockets inherit it: without it Nagle's algorithm holds small answers back.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakee, READ, self._wake)

    def server_bind(self) -> None:
        """Binds without the name look-up of `HTTPServer.server_bind`, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def listen(self) -> None:
        """Lets clients connect, before `serve_forever` serves them; a second call does nothing."""
        if not self._listening:
            self._listening = True
            self.server_activate()
            self._accept_on()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serves until `shutdown`, then until every running request is answered."""
        self.listen()
        while not self.closing or self._connections:
            self._tick()
            timeout = None if self.soonest == NEVER else min(max(0.0, self.soonest - self.now), 3600.0)
            events = self._selector.select(timeout)
            self._tick()
            for key, mask in events:
                self.guard(key.data, mask)
            self._end_turn()
            if self.now >= self.soonest:
                self._check_deadlines()
                self._end_turn()

    def end_turn(self) -> None:
        """For subclasses to override: called at the end of every turn, before the answers are sent; must not block."""

    def shutdown(self, timeout: float = 10.0) -> None:
        """Begins the end and returns at once: accepts no more, closes idle connections, lets running
        requests finish for at most `timeout` seconds; a second call can only shorten that."""
        self.call_soon(self._begin_closing, timeout)

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` in the loop's thread."""
        self._calls.append((call, *args))
        if not self._woken:  # append first, look second: _wake clears first, drains second
            self._woken = True
            with contextlib.suppress(OSError):  # the loop is over, and nobody waits for the answer
                self._waker.send(b"\0")

    @property
    def wakeup_fd(self) -> int:
        """Whatever is written here wakes the loop; for `signal.set_wakeup_fd`."""
        return self._waker.fileno()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs work that may block in one of a few threads; for `FrontHandler.defer`."""
        return self._workers.submit(work, *args)

    def server_close(self) -> None:
        """Frees the port, the threads and every connection; call it after `serve_forever` has returned."""
        for handler in list(self._connections):
            handler.drop("the server closed")
        super().server_close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        if hasattr(self, "_selector"):  # not there when the address could not be bound
            self._selector.close()
            self._waker.close()
            self._wakee.close()

    def watch(self, handler: FrontHandler, before: int, interest: int) -> None:
        """Changes what the selector watches a connection for; 0 is nothing."""
        if not before:
            self._selector.register(handler.connection, interest, handler.ready)
        elif interest:
            self._selector.modify(handler.connection, interest, handler.ready)
        else:
            self._selector.unregister(handler.connection)

    def forget(self, handler: FrontHandler, interest: int) -> None:
        """Lets go of a connection, which makes room for the next."""
        if interest:
            self._selector.unregister(handler.connection)
        self._connections.discard(handler)
        if not self._accepting and not self.closing:
            self._accept_on()

    def _tick(self) -> None:
        self.now = time.monotonic()
        if self.now >= self._date_until:
            wall = time.time()
            self.date = f"Date: {formatdate(int(wall), usegmt=True)}\r\n\r\n".encode()
            self._date_until = self.now + 1 - wall % 1

    def guard(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` at the loop's boundary: an error of ours costs at most the connection it happened on."""
        try:
            call(*args)
        except Exception:
            log.exception("the server's loop goes on after an error")
            handler = getattr(call, "__self__", None)
            if isinstance(handler, FrontHandler):
                handler.drop("internal error")

    def _end_turn(self) -> None:
        self.guard(self.end_turn)
        while self.touched:
            handlers, self.touched = self.touched, []
            for handler in handlers:
                self.guard(handler.settle)  # which may serve requests that waited for it
            self.guard(self.end_turn)

    def _wake(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakee.recv(64)
        self._woken = False
        for _ in range(len(self._calls)):  # whatever comes later sends a byte of its own
            self.guard(*self._calls.popleft())

    def _accept_on(self) -> None:
        self._accepting, self._accept_again = True, NEVER
        self._selector.register(self.socket, READ, self._accept)

    def _accept_off(self, seconds: float) -> None:
        """Stops accepting until a connection closes, at most for so long; others wait in the backlog."""
        self._selector.unregister(self.socket)
        self._accepting, self._accept_again = False, self.now + seconds
        self.soonest = min(self.soonest, self._accept_again)

    def _accept(self, mask: int) -> None:
        if not self._accepting:  # the shutdown came in the same turn
            return
        for _ in range(ACCEPTS_A_TURN):
            if len(self._connections) >= self.limits.connections:
                self._accept_off(NEVER)
                return
            try:
                request, address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_RESOURCES:
                    log.warning("not accepting connections for a moment: %s", error)
                    self._accept_off(ACCEPT_PAUSE)
                return
            request.setblocking(False)
            handler = self._handler(request, address, self)
            self._connections.add(handler)
            self.guard(handler.ready, READ)  # the request is mostly there already

    def _check_deadlines(self) -> None:
        self.soonest = NEVER
        if self.now >= self._accept_again:
            self._accept_on()
        for handler in list(self._connections):
            if self.now >= self._stop_at:
                handler.drop("the shutdown took too long")
            elif self.now >= handler.deadline:
                self.guard(handler.expire)
        self.soonest = min(
            self._accept_again, self._stop_at, *(handler.deadline for handler in self._connections), NEVER
        )

    def _begin_closing(self, timeout: float) -> None:
        self._stop_at = min(self._stop_at, self.now + timeout)
        self.soonest = min(self.soonest, self._stop_at)
        if self.closing:
            return
        before = -1
        while self._accepting and before < len(self._connections):  # those who have connected already are served
            before = len(self._connections)
            self._accept(READ)
        self.closing = True
        if self._accepting:
            self._selector.unregister(self.socket)
        self._accepting, self._accept_again = False, NEVER
        self.socket.close()
        for handler in list(self._connections):
            self.guard(handler.wind_down)

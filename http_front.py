"""The HTTP/1.1 protocol: one thread, one selector loop, strict requests in, whole answers out.

`FrontServer` accepts connections, reads without blocking and watches every deadline; a slow or
silent client costs it a dictionary entry, not a thread. `FrontHandler` is one connection: it cuts
the received bytes into requests by the rules of RFC 9112 and runs `do_<METHOD>` once a request is
whole. A method answers with `answer`, raises `HttpError`, or hands a Future to `defer` when the work
may block; answers leave in the order of their requests. Nothing here knows of SMS.
"""
from __future__ import annotations

import contextlib
import errno
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
READ_AHEAD = 128 * 1024  # bytes buffered behind an answer under way; then the peer has to wait
ACCEPTS_A_TURN = 64  # so that a flood of connections does not starve those being served
ACCEPT_PAUSE = 1.0  # seconds without accepting after the process ran out of file descriptors
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
LINGER = 2.0  # seconds for a refused peer to read its answer before the connection is closed
LAST_CALL = 1.0  # seconds for a request half received when the shutdown begins
NEVER = float("inf")

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}  # RFC 9110, 9.3; RFC 5789
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")  # RFC 9112, 3: SP and nothing else
# RFC 9112, 5: no space before the colon, no obs-fold; RFC 9110, 5.5: no NUL, bare CR or other CTL in a value.
FIELD_LINES = re.compile(rf"(?:{TOKEN}:[\t -~\x80-\xff]*\r\n)*")
HOST = re.compile(r"[A-Za-z0-9\-._~%!$&'()*+;=\[\]:]*")  # RFC 3986, 3.2.2, less the comma, which joins repeats
ABSOLUTE_FORM = re.compile(r"(?i:https?)://[^/?#]+")  # RFC 9112, 3.2.2
DIGITS = re.compile(r"[0-9]+")  # RFC 9110, 8.6: int() would take "+5", "5_0" and other scripts' digits
NUMBER = re.compile(r"/[0-9+%]{4,}(?![^/])")
BARE_LF = re.compile(rb"(?<!\r)\n")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


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

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, *, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, headers, close


class FrontHandler(BaseHTTPRequestHandler):
    """One connection of a `FrontServer`, driven by its loop; subclasses add `do_<METHOD>` methods.

    While such a method runs, `command`, `path` (without the query), `headers` (a dict, lower-case
    names) and `body` describe the request. Everything runs in the loop's thread and must not block.
    """

    server: FrontServer
    headers: dict[str, str]  # type: ignore[assignment]

    def __init__(self, request: socket.socket, client_address: Any, server: FrontServer) -> None:
        # Not super().__init__(): it would read and answer here and now, blocking.
        self.connection, self.client_address, self.server = request, client_address, server
        self.command, self.path, self.request_version = "-", "-", "HTTP/1.1"
        self.headers, self.body = {}, b""
        self.close_connection = False
        self._fields = ""  # the text behind `headers`
        self._buffer = bytearray()  # received, not yet cut into requests
        self._scanned = 0  # bytes of the buffer already searched for the end of a head
        self._length: int | None = None  # of the body whose head is in; None before the head and after the answer
        self._reading = True  # the clock of the current head runs
        self._unsent: memoryview | None = None
        self._busy = False  # an answer is deferred or not sent whole
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
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        """Sends the whole answer to the current request; what the socket does not take now goes later."""
        close = self._finished = self.close_connection or self.server.closing
        head = f"{STATUS_LINES[status]}{self.server.date}Content-Length: {len(body)}\r\n"
        if body:
            head += f"Content-Type: {content_type}\r\n"
        if headers:
            head += "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if close:
            head += "Connection: close\r\n"
        elif self.request_version == "HTTP/1.0":
            head += "Connection: keep-alive\r\n"
        data = head.encode("latin-1") + b"\r\n"
        self.server.answers[status] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %s %d", self.client_address[0], self.command, self._shown, status)
        self._length, self._reading = None, False
        self._set_deadline(self.server.limits.idle_timeout)
        self._write(data if self.command == "HEAD" else data + body)

    def defer(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        """Answers later: `then(result)` runs in the loop once the Future is done; its error is translated."""
        self._busy = True
        self.deadline = NEVER  # whoever works on the answer has limits of its own
        future.add_done_callback(lambda done: self.server.call_soon(self._resume, done, then))

    # For the server's loop to call

    def ready(self, events: int) -> None:
        """Moves on when the socket can be read or written."""
        if events & WRITE:
            self._flush()
        if events & READ:
            self._receive()
        self._listen()

    def expire(self) -> None:
        """At the deadline a request half received gets a 408; anything else is dropped."""
        if self._busy or self._finished or self.idle:
            self.drop("timed out")
        else:
            self._refuse(HttpError(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", close=True))
            self._listen()

    def wind_down(self) -> None:
        """At shutdown: serves what is there, closes if idle, gives half a request a last call."""
        self.ready(READ)
        if not self._busy:
            self._set_deadline(min(LAST_CALL, self.deadline - self.server.now))

    def drop(self, reason: str) -> None:
        """Closes the connection now; a second call does nothing."""
        if not self._closed:
            self._closed = self._finished = True
            log.debug("%s connection closed: %s", self.client_address[0], reason)
            self.server.forget(self, self._interest)
            self.connection.close()

    @property
    def _shown(self) -> str:
        """The path for the logs, without what may be a phone number."""
        return NUMBER.sub("/***", self.path)

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has come and no answer is under way."""
        return not (self._busy or self._buffer or self._lingering or self._length is not None)

    def _set_deadline(self, seconds: float) -> None:
        self.deadline = self.server.now + seconds
        if self.deadline < self.server.soonest:
            self.server.soonest = self.deadline

    def _listen(self) -> None:
        """Tells the selector what this connection waits for."""
        if self.server.closing and self.idle:
            self.drop("shutting down")
        if self._closed:
            return
        interest = WRITE if self._unsent is not None else 0
        if not self._ended and not (self._busy and len(self._buffer) >= READ_AHEAD):
            interest |= READ
        if interest != self._interest:
            self.server.watch(self, self._interest, interest)
            self._interest = interest

    def _receive(self) -> None:
        if self._closed:
            return
        try:
            data = self.connection.recv(RECEIVE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.drop(f"reading: {error}")
            return
        if not data:
            self._ended = True  # the answers under way are still sent: the peer may have closed one side only
            if not self._busy:
                self.drop("closed by the peer")
        elif not self._finished:
            self._buffer += data
            self._advance()

    def _write(self, data: bytes | memoryview) -> None:
        try:
            sent = self.connection.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.drop(f"writing: {error}")
            return
        if sent < len(data):
            if self._unsent is None:
                self._set_deadline(self.server.limits.write_timeout)
            self._busy, self._unsent = True, memoryview(data)[sent:]
        elif self._finished:
            self._finish()

    def _flush(self) -> None:
        if self._unsent is None or self._closed:
            return
        self._busy, rest = False, self._unsent
        self._write(rest)
        if not self._busy:
            self._unsent = None
            if not self._finished:
                self._set_deadline(self.server.limits.idle_timeout)
                self._advance()

    def _finish(self) -> None:
        """Closes after the last answer. Bytes left unread would make the kernel send a reset, which can
        take the answer with it, so they are read and thrown away for a while (RFC 9112, 9.6)."""
        if self._ended or not (self._lingering or self._buffer):
            self.drop("done")
            return
        self._lingering = True
        self._buffer.clear()
        self._set_deadline(LINGER)
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.drop(f"closing: {error}")

    def _advance(self) -> None:
        """Serves the buffered requests in order, until one is incomplete or an answer has to wait."""
        while not (self._busy or self._finished):
            try:
                if not self._next_request():
                    if self._ended:
                        self.drop("closed by the peer")
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

    def _resume(self, done: Future[Any], then: Callable[[Any], None]) -> None:
        if self._closed:
            return
        self._busy = False
        self._run(lambda: then(done.result()))
        self._advance()
        self._listen()

    def _run(self, call: Callable[[], None]) -> None:
        """The boundary: a request that fails costs nobody else anything."""
        try:
            call()
            if self._length is not None and not self._busy:
                raise RuntimeError("the handler gave no answer")
        except (Exception, SystemExit) as error:  # a Future may bring the exit of another thread
            if self._length is None:  # it has answered: a second answer would pass for the next request's
                log.error("%s %s failed after its answer", self.command, self._shown, exc_info=error)
                self.drop("internal error")
            else:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        refusal = self.translate(error)
        if refusal is None:
            log.error("%s %s failed", self.command, self._shown, exc_info=error)
            refusal = HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        self._refuse(refusal)

    def _refuse(self, refusal: HttpError) -> None:
        if refusal.close:
            self.close_connection = self._lingering = True
        self.answer(refusal.status, json.dumps({"Error": refusal.message}).encode(), refusal.headers)

    # Bytes to requests. Every refusal here closes: where the next request begins is not known.

    def _next_request(self) -> bool:
        """Cuts one request off the buffer; False while it is not whole."""
        buffer = self._buffer
        if self._length is None:
            self.command, self.path = "-", "-"
            while buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: empty lines before a request are skipped
                del buffer[:2]
            end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
            if not 0 <= end <= self.server.limits.head:
                self._wait_for_head()
                return False
            head = buffer[: end + 2].decode("latin-1")
            del buffer[: end + 4]
            self._scanned = 0
            self._length = self._parse(head)
            if len(buffer) < self._length:
                self._set_deadline(self.server.limits.read_timeout)
                if "expect" in self.headers and self.request_version == "HTTP/1.1":
                    self._expect()
        if self._length is None or len(buffer) < self._length:  # None: refused already
            return False
        self.body = b""
        if self._length:
            self.body = bytes(buffer[: self._length])
            del buffer[: self._length]
        return True

    def _wait_for_head(self) -> None:
        buffer, limits = self._buffer, self.server.limits
        if BARE_LF.search(buffer, max(0, self._scanned - 1)):
            raise HttpError(HTTPStatus.BAD_REQUEST, "a line ends without CR (RFC 9112, 2.2)", close=True)
        if len(buffer) > limits.head:
            if buffer.find(b"\r\n", 0, limits.target + 32) < 0:
                raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long", close=True)
            raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too large", close=True)
        self._scanned = len(buffer)
        if buffer and not self._reading:
            self._reading = True
            self._set_deadline(limits.read_timeout)

    def _expect(self) -> None:
        """RFC 9110, 10.1.1: the final status in place of `100 Continue` when the head already tells it."""
        try:
            self._check()
        except Exception as error:
            self.close_connection = self._lingering = True  # the body may come or not
            self._fail(error)
        else:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _parse(self, head: str) -> int:
        """Takes the request line and the fields in; returns the length of the body."""
        line, _, fields = head.partition("\r\n")
        match = REQUEST_LINE.fullmatch(line)
        if match is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request line (RFC 9112, 3)", close=True)
        self.command, target, major, minor = match.groups()
        if major != "1":
            raise HttpError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 and HTTP/1.0", close=True)
        self.request_version = "HTTP/1.0" if minor == "0" else "HTTP/1.1"
        if len(target) > self.server.limits.target:
            raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the target is too long", close=True)
        self.path = self._path(target)
        if fields != self._fields:  # most clients repeat them: a fifth of the time of a GET, saved
            self.headers = self._parse_fields(fields)
            self._fields = fields
        headers = self.headers
        host = headers.get("host", "" if minor == "0" else None)
        if host is None or HOST.fullmatch(host) is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "exactly one valid Host is needed (RFC 9112, 3.2)", close=True)
        options = headers.get("connection")  # RFC 9112, 9.3
        tokens = {token.strip().lower() for token in options.split(",")} if options else ()
        self.close_connection = "close" in tokens or (minor == "0" and "keep-alive" not in tokens)
        if minor != "0" and headers.get("expect", "100-continue").lower() != "100-continue":
            raise HttpError(HTTPStatus.EXPECTATION_FAILED, "only 100-continue can be expected", close=True)
        return self._body_length(headers)

    def _parse_fields(self, fields: str) -> dict[str, str]:
        if FIELD_LINES.fullmatch(fields) is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed header field (RFC 9112, 5)", close=True)
        lines = fields.split("\r\n")[:-1]
        if len(lines) > self.server.limits.fields:
            raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header fields", close=True)
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value  # RFC 9110, 5.3
        return headers

    def _path(self, target: str) -> str:
        """The path of an origin-form or absolute-form target, without the query (RFC 9112, 3.2)."""
        if not target.startswith("/") and (absolute := ABSOLUTE_FORM.match(target)):
            target = target[absolute.end() :]
            target = target if target.startswith("/") else "/" + target
        if target.startswith("/") or self.command == "CONNECT" or (self.command, target) == ("OPTIONS", "*"):
            return target.partition("?")[0]
        raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request target (RFC 9112, 3.2)", close=True)

    def _body_length(self, headers: dict[str, str]) -> int:
        """RFC 9112, 6.3. A body without a Content-Length is refused, so nothing is ever decoded."""
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if coding is not None:
            if length is not None or self.request_version == "HTTP/1.0":  # 6.1: how requests are smuggled
                raise HttpError(HTTPStatus.BAD_REQUEST, "Transfer-Encoding is not allowed here", close=True)
            if coding.lower() != "chunked":
                raise HttpError(HTTPStatus.NOT_IMPLEMENTED, "unknown transfer coding", close=True)
        if length is None:
            if coding is not None or self.command == "POST":
                raise HttpError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed", close=True)
            return 0
        if DIGITS.fullmatch(length) is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed Content-Length (RFC 9110, 8.6)", close=True)
        digits = length.lstrip("0")
        if len(digits) > 18 or int(digits or "0") > self.server.limits.body:  # 18: int() of thousands is slow
            raise HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body exceeds {self.server.limits.body} bytes", close=True
            )
        return int(digits or "0")


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
        self.date = ""
        self._date_until = 0.0
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
                self._guard(key.data, mask)
            if self.now >= self.soonest:
                self._check_deadlines()

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
            self.date = f"Date: {formatdate(int(wall), usegmt=True)}\r\n"
            self._date_until = self.now + 1 - wall % 1

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        """The loop's boundary: an error of ours costs at most the connection it happened on."""
        try:
            call(*args)
        except Exception:
            log.exception("the server's loop goes on after an error")
            handler = getattr(call, "__self__", None)
            if isinstance(handler, FrontHandler):
                handler.drop("internal error")

    def _wake(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakee.recv(64)
        self._woken = False
        for _ in range(len(self._calls)):  # whatever comes later sends a byte of its own
            self._guard(*self._calls.popleft())

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
            self._guard(handler.ready, READ)  # the request is mostly there already

    def _check_deadlines(self) -> None:
        self.soonest = NEVER
        if self.now >= self._accept_again:
            self._accept_on()
        for handler in list(self._connections):
            if self.now >= self._stop_at:
                handler.drop("the shutdown took too long")
            elif self.now >= handler.deadline:
                self._guard(handler.expire)
        self.soonest = min(
            self._accept_again, self._stop_at, *(handler.deadline for handler in self._connections), NEVER
        )

    def _begin_closing(self, timeout: float) -> None:
        self._stop_at = min(self._stop_at, self.now + timeout)
        self.soonest = min(self.soonest, self._stop_at)
        if self.closing:
            return
        if self._accepting:
            self._accept(READ)  # those who have connected already are served
        self.closing = True
        if self._accepting:
            self._selector.unregister(self.socket)
        self._accepting, self._accept_again = False, NEVER
        self.socket.close()
        for handler in list(self._connections):
            self._guard(handler.wind_down)

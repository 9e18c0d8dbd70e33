"""A connection and its states; an exchange, which is one request and its response; what a front serves.

The states and what may happen in them are rules of `http_protocol`. That the peer reads too slowly (write-blocked) or
sends no more (half-closed) is no state, since it can be so in any of them. Everything here runs in the loop's thread
and never blocks.
"""
from __future__ import annotations

import json
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from http import HTTPStatus
from selectors import EVENT_READ as READ
from selectors import EVENT_WRITE as WRITE
from typing import Any, Protocol

from http_protocol import (
    CONTINUE,
    METHODS,
    NEVER,
    NO_HEADERS,
    TRANSITIONS,
    Event,
    HttpError,
    Limits,
    ParsedHeaders,
    Request,
    RequestParser,
    State,
    header_lines,
    response_head,
)

__all__ = ["Application", "Connection", "Exchange", "Front", "Handler", "Loop"]


log = logging.getLogger("smsproxy.http")

RECEIVE_SIZE = 16 * 1024  # bytes a read: also bounds the pipelined work that one connection gets in an iteration
READ_AHEAD = 16 * 1024  # bytes buffered behind a response under way; then the peer has to wait
SEND_AHEAD = 64 * 1024  # bytes of pipelined responses gathered before they are sent
SHUTDOWN_GRACE = 1.0  # seconds that a shutdown leaves to half a request, and to a peer that does not read
# Seconds that it leaves to an idle connection: a proxy may just be sending a request on it, and whoever is in use is
# told to close with the next response.
IDLE_SHUTDOWN_GRACE = 0.2


# As names, since a member of an enumeration is looked up by a call before Python 3.12.
IDLE, HEAD, BODY, RESPONDING, CLOSING, LINGERING, CLOSED = State
PART, WHOLE_HEAD, REQUEST, RESPONSE, LAST_RESPONSE, SENT, DROP = Event


# What a front serves


class Front(Protocol):
    """What an application may ask of the front that serves it."""

    limits: Limits
    stopping: bool  # a shutdown has begun
    responses: Counter[tuple[str, int]]  # by route and status

    @property
    def open_connections(self) -> int:
        """How many connections are open."""

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` in the loop's thread; may be called from any thread."""

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        """Runs `work(*args)`, which may block, in one of the front's worker threads."""


class Application(Protocol):
    """What responds to requests. All of it is called in the loop's thread, and must not block."""

    def route(self, exchange: Exchange) -> Handler:
        """What responds to the request. The body may not be there yet: raises `HttpError` when the head decides."""

    def refusal(self, error: BaseException) -> HttpError | None:
        """The refusal that stands for an exception of a handler; None makes it a 500."""

    def shown(self, request: Request) -> str:
        """The request's path as the log may show it."""

    def end_iteration(self, front: Front) -> None:
        """The requests of an iteration of the loop have been read: what can be done for all of them together is
        done now, before the responses are sent. Called again when that makes other requests possible."""


class Exchange:
    """One request and the way back for its response. It ends with the response, or with the connection."""

    __slots__ = ("_connection", "_deferred", "client", "request", "route")

    def __init__(self, request: Request, connection: Connection) -> None:
        self.request = request
        self.route = "other"  # what the response is counted as
        self.client = ""  # who sent it, for the log
        self._connection, self._deferred = connection, False

    @property
    def front(self) -> Front:
        """The front that serves it."""
        return self._connection.loop

    def defer(self) -> None:
        """The response comes later; until then the next requests of this connection wait."""
        self._deferred = True

    def respond(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS,
        content_type: str = "application/json",
    ) -> None:  # fmt: skip
        """Responds to the request as a whole; it leaves at the end of the iteration, or as fast as the peer reads.

        Does nothing when the connection is closed; raises RuntimeError when there was a response already.
        """
        connection, request = self._connection, self.request
        if connection.exchange is not self:
            if connection.state is CLOSED:
                return
            raise RuntimeError("a request has one response")
        loop = connection.loop
        last = loop.stopping or not request.keep_alive
        option = "close" if last else "keep-alive" if request.http10 else ""
        head = response_head(status, len(body), content_type, option)
        if headers:
            head += header_lines(headers)
        connection.send(head + loop.date if request.method == "HEAD" else head + loop.date + body, last)
        if self._deferred:
            loop.active[connection] = None
            if connection.parser.buffer:
                loop.resumed.append(connection)
        loop.responses[self.route, status] += 1
        if loop.logs_responses:
            client = f" ({self.client})" if self.client else ""
            log.debug("%s%s %s %d", connection.address, client, self._shown, status)

    def fail(self, error: BaseException) -> None:
        """Responds with the refusal that stands for the error; one that stands for none is logged, and is a 500."""
        connection = self._connection
        refusal = error if isinstance(error, HttpError) else connection.loop.application.refusal(error)
        if refusal is None:
            log.error("%s failed", self._shown, exc_info=error)
            refusal = HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        if refusal.close:
            self.request.keep_alive = False
            connection.unread = True
        self.respond(refusal.status, json.dumps({"Error": refusal.message}).encode() + b"\n", refusal.headers)

    def handle(self) -> None:
        """Lets the application respond or defer. This is its boundary: whatever it raises becomes the response, and
        costs at most this connection."""
        connection = self._connection
        try:
            connection.loop.application.route(self)(self)
            if connection.exchange is self and not self._deferred:
                raise RuntimeError("the handler gave no response")
        except (Exception, SystemExit) as error:  # a worker may bring the exit of another thread
            self._failed(error)

    def finish(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(self, *args)`, which makes a deferred response, within the same boundary."""
        try:
            call(self, *args)
        except (Exception, SystemExit) as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        connection = self._connection
        if connection.exchange is not self:  # a second response would pass for the next request's
            log.error("%s failed after its response", self._shown, exc_info=error)
            return
        try:
            self.fail(error)
        except Exception:
            log.exception("%s failed, and so did its refusal", self._shown)
            connection.drop("internal error")

    @property
    def _shown(self) -> str:
        """Method and path for the log, without what may be a phone number: anything can come in their places."""
        method = self.request.method
        return f"{method if method in METHODS else '-'} {self._connection.loop.application.shown(self.request)}"


Handler = Callable[[Exchange], None]


# One connection


class Loop(Front, Protocol):
    """What a connection needs of the loop that drives it."""

    application: Application
    timeouts: Mapping[State, float]
    parse_headers: Callable[[str, str, bool], ParsedHeaders]
    now: float  # of this iteration, by time.monotonic()
    date: bytes  # the header of this second, and the end of a head
    logs_responses: bool  # the log takes debug messages
    soonest: float  # no deadline of a connection is earlier
    active: dict[Connection, None]  # what to look after at the end of this iteration
    resumed: list[Connection]  # what may go on, since a deferred response has been made
    idle: OrderedDict[Connection, None]  # in order of the time since they are; some may be busy again

    def watch(self, connection: Connection, before: int, events: int) -> None:
        """Has `ready` called for these events in place of the ones before; 0 is none."""

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""


class Connection:
    """A socket that never blocks: its state, the bytes still to be sent, one deadline. The loop drives it."""

    def __init__(self, sock: socket.socket, address: Any, loop: Loop) -> None:
        self.socket, self.loop = sock, loop
        self.address: str = address[0] if address else "local"
        self.parser = RequestParser(loop.limits, loop.parse_headers)
        self.state, self.deadline = HEAD, NEVER
        self.exchange: Exchange | None = None  # the one that has no response yet
        self.unread = False  # the peer may still send what is not for us
        self._out = b""  # responses that the socket has not taken yet
        self._write_blocked = False  # the socket takes no more of them for now
        self._half_closed = False  # the peer sends no more
        self._restarts = True  # the state has changed, so that its timeout starts at the end of the iteration
        self._watched = 0  # the events that the loop watches it for

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has come and no response is under way."""
        return self.state <= HEAD and not (self.parser.buffer or self._out)

    # For the loop

    def ready(self, events: int) -> None:
        """Moves on when the socket can be read or written."""
        self.loop.active[self] = None
        if events & WRITE:
            self._flush()
        if not events & READ:
            return
        try:
            data = self.socket.recv(RECEIVE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.drop(f"reading: {error}")
            return
        if not data:
            self._half_closed = True  # the responses under way are still sent
        elif self.state <= RESPONDING:
            self.parser.buffer += data
            self.advance()

    def advance(self) -> None:
        """Serves the buffered requests in order, until one is not whole or a response has to wait."""
        parser = self.parser
        while parser.buffer and self.state <= BODY and not self._write_blocked and len(self._out) < SEND_AHEAD:
            try:
                request = parser.next()
            except HttpError as error:
                self._refuse(Exchange(parser.request, self), error)
                return
            if request is None:
                self._wait_for_more()
                return
            self.state, self._restarts = TRANSITIONS[self.state][REQUEST], True
            self.exchange = exchange = Exchange(request, self)
            exchange.handle()

    def end_iteration(self) -> None:
        """Sends the responses, closes what has come to its end, or tells the selector what to wait for."""
        if self._out and not self._write_blocked:
            self._flush()
        if self._restarts and not self._write_blocked:
            self._expire_in(self.loop.timeouts[self.state])
        quiet = self.state is IDLE or (self.state is RESPONDING and not self.parser.buffer)
        if quiet and self._watched == READ and not (self._write_blocked or self._half_closed):
            return  # nothing of what follows: in place of it for speed, a twentieth of a GET's bytecodes
        if self.state is CLOSING and not self._out:
            self._linger()
        if self._half_closed and not (self._out or self.state in (RESPONDING, CLOSED)):
            self.drop("closed by the peer")
        if self.state is not CLOSED:
            events = (WRITE if self._write_blocked else 0) | (READ if self._readable() else 0)
            if events != self._watched:
                self._watch(events)

    def expire(self) -> None:
        """At the deadline a request half received gets a 408; anything else is dropped."""
        if self._write_blocked or self.is_idle or self.state > BODY:
            self.drop("timed out")
        else:
            error = HttpError(HTTPStatus.REQUEST_TIMEOUT, "the request took too long", close=True)
            self._refuse(Exchange(self.parser.request, self), error)

    def begin_shutdown(self) -> None:
        """Serves what is there; half a request, and a peer that does not read, are given a last moment."""
        self.ready(READ)
        if self._write_blocked:
            self._expire_in(self.deadline - self.loop.now)
        else:
            self._restarts = True  # at the end of the iteration

    def drop(self, reason: str) -> None:
        """Closes the connection now; a second call does nothing."""
        if self.state is CLOSED:
            return
        log.debug("%s connection closed: %s", self.address, reason)
        self._enter(DROP)
        self.exchange = None
        self._out = self.parser.buffer = b""
        if self._watched:
            self._watch(0)
        self.socket.close()
        self.loop.forget(self)

    # For the exchange

    def send(self, response: bytes, last: bool) -> None:
        """The response to the exchange under way; the connection closes after the last one."""
        self.state, self._restarts = TRANSITIONS[self.state][LAST_RESPONSE if last else RESPONSE], True
        self.exchange = None  # nothing of a body is kept while the connection is idle
        self.parser.request.body = b""
        self._out += response

    # Requests

    def _refuse(self, exchange: Exchange, error: BaseException) -> None:
        """Responds to a request that is not whole, and never will be."""
        exchange.request.keep_alive, self.unread = False, True  # the rest of it may come or not
        self.exchange = exchange
        self.loop.active[self] = None
        exchange.finish(Exchange.fail, error)

    def _wait_for_more(self) -> None:
        if self.parser.awaits_body and self.state is not BODY:
            self._enter(WHOLE_HEAD)
            request = self.parser.request
            if "expect" in request.headers and not request.http10:
                self._expect(request)
        elif self.parser.buffer and self.state is IDLE:
            self._enter(PART)

    def _expect(self, request: Request) -> None:
        """RFC 9110, 10.1.1: the final status in place of `100 Continue` when the head already tells it."""
        exchange = Exchange(request, self)
        try:
            self.loop.application.route(exchange)
        except Exception as error:
            self._refuse(exchange, error)
        else:
            self._out += CONTINUE

    # States and deadlines

    def _enter(self, event: Event) -> None:
        """What happens less than once a request; the rest does the same without the call."""
        self.state, self._restarts = TRANSITIONS[self.state][event], True

    def _expire_in(self, seconds: float) -> None:
        """Sets the deadline; whoever may be idle from now on joins the end of those who are."""
        loop = self.loop
        self._restarts = False
        if self.state <= HEAD:
            try:
                loop.idle.move_to_end(self)  # it may have been idle before
            except KeyError:
                loop.idle[self] = None
        if loop.stopping and self.state is not RESPONDING:
            seconds = min(seconds, IDLE_SHUTDOWN_GRACE if self.is_idle else SHUTDOWN_GRACE)
        self.deadline = deadline = loop.now + seconds
        if deadline < loop.soonest:
            loop.soonest = deadline

    def _readable(self) -> bool:
        """Whether to read: not once the peer sends no more, nor when enough is buffered behind a response."""
        if self._write_blocked or self.state is RESPONDING:
            return not self._half_closed and len(self.parser.buffer) < READ_AHEAD
        return not self._half_closed

    def _watch(self, events: int) -> None:
        before, self._watched = self._watched, events
        try:
            self.loop.watch(self, before, events)
        except OSError as error:  # ENOMEM, or ENOSPC: epoll_ctl(2)
            self._watched = 0
            self.drop(f"watching: {error}")

    # Bytes out

    def _flush(self) -> None:
        """Sends what the socket takes of the responses; once it took all, serves what waited for that."""
        try:
            self._out = self._out[self.socket.send(self._out) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.drop(f"writing: {error}")
            return
        if not self._out:
            if self._write_blocked:
                self._write_blocked, self._restarts = False, True
            if self.parser.buffer:
                self.advance()
        elif not self._write_blocked:
            self._write_blocked = True
            self._expire_in(self.loop.limits.write_timeout)

    def _linger(self) -> None:
        """Closes after the last response. Bytes left unread would make the kernel send a reset, which can take the
        response with it, so they are read and thrown away for a while (RFC 9112, 9.6)."""
        if self._half_closed or not (self.unread or self.parser.buffer):
            self.drop("done")
            return
        self._enter(SENT)
        self.parser.buffer = b""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.drop(f"closing: {error}")

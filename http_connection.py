"""A connection and its states.

The states and what may happen in them are rules of `http_protocol`. That the peer reads too slowly (write-blocked) or
sends no more (half-closed) is no state, since it can be so in any of them. Everything here runs in the loop's thread
and never blocks.
"""
from __future__ import annotations

import logging
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from http import HTTPStatus
from selectors import EVENT_READ as READ
from selectors import EVENT_WRITE as WRITE
from typing import Any, Protocol

from http_exchange import Exchange, Server
from http_protocol import (
    CONTINUE,
    NEVER,
    TRANSITIONS,
    Event,
    HttpError,
    ParsedHeaders,
    Request,
    RequestParser,
    State,
)

__all__ = ["Connection", "Loop"]

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


class Loop(Server, Protocol):
    """What a connection needs of the loop that drives it."""

    timeouts: Mapping[State, float]
    parse_headers: Callable[[str, str, bool], ParsedHeaders]
    now: float  # of this iteration, by time.monotonic()
    soonest: float  # no deadline of a connection is earlier
    idle_deadline: float  # of a connection that becomes idle in this iteration; `soonest` is not later
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
        self._awaited: Exchange | None = None  # the one whose body is awaited
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
            parser = self.parser
            if parser.awaits_body:
                parser.feed(data)
            else:
                parser.buffer += data  # in place of the call, for speed: a hundredth of a GET
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
            self.state, self._restarts = RESPONDING, True  # from each state up to `BODY`; for speed without the table
            self.exchange = exchange = self._awaited or Exchange(request, self)
            self._awaited = None
            exchange.handle()

    def end_iteration(self) -> None:
        """Sends the responses, closes what has come to its end, or tells the selector what to wait for."""
        if self._out and not self._write_blocked:
            self._flush()
        if self._restarts and not self._out:
            loop = self.loop
            if self.state is IDLE and not loop.stopping:  # as `_expire_in` does, in fewer steps
                self._restarts, self.deadline = False, loop.idle_deadline
                try:
                    loop.idle.move_to_end(self)
                except KeyError:
                    loop.idle[self] = None
            else:
                if self.state is CLOSING:  # all has been sent
                    self._linger()
                self._expire_in(loop.timeouts[self.state])
        quiet = self.state is IDLE or (self.state is RESPONDING and not self.parser.buffer)
        if quiet and self._watched == READ and not (self._write_blocked or self._half_closed):
            return  # nothing of what follows: in place of it for speed, a twentieth of a GET's bytecodes
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
            self._refuse(self._awaited or Exchange(self.parser.request, self), error)

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
        if self.exchange is not None:
            self.exchange.abandon()
        if self._awaited is not None:
            self._awaited.abandon()
        self.exchange = self._awaited = None
        self._out = b""
        self.parser.clear()
        if self._watched:
            self._watch(0)
        self.socket.close()
        self.loop.forget(self)

    # For the exchange

    def send(self, response: bytes, last: bool, deferred: bool) -> None:
        """See `Carrier`."""
        self.state, self._restarts = TRANSITIONS[self.state][LAST_RESPONSE if last else RESPONSE], True
        self.exchange = None
        self._out += response
        if deferred:
            self.loop.active[self] = None
            if self.parser.buffer:
                self.loop.resumed.append(self)

    # Requests

    def _refuse(self, exchange: Exchange, error: BaseException) -> None:
        """Responds to a request that is not whole, and never will be."""
        exchange.request.keep_alive, self.unread = False, True  # the rest of it may come or not
        self.exchange, self._awaited = exchange, None
        self.loop.active[self] = None
        exchange.finish(Exchange.fail, error)

    def _wait_for_more(self) -> None:
        if self.parser.awaits_body and self.state is not BODY:
            self._enter(WHOLE_HEAD)
            self._admit(self.parser.request)
        elif self.parser.buffer and self.state is IDLE:
            self._enter(PART)

    def _admit(self, request: Request) -> None:
        """What the head already tells is told before the body is taken in; RFC 9110, 10.1.1: then in place of `100
        Continue`."""
        exchange = Exchange(request, self)
        try:
            exchange.admit()
        except Exception as error:
            self._refuse(exchange, error)
        else:
            self._awaited = exchange
            if "expect" in request.headers and not request.http10:
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
                self.loop.active[self] = None  # what it responds now leaves in another round of this iteration
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
        self.parser.clear()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.drop(f"closing: {error}")

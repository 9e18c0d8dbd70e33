"""An exchange, which is one request and the way back for its response; what serves exchanges, and what carries them.

Everything here runs in the loop's thread and never blocks.
"""
from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

from http_protocol import METHODS, NO_HEADERS, HttpError, Limits, Request, State, response_head
from incident_log import Incidents
from response_counts import ResponseCounts

__all__ = ["Application", "Carrier", "Exchange", "Front", "Handler", "Holder", "Server"]

log = logging.getLogger("smsproxy.http")

BUSY = {"Retry-After": "1"}  # seconds; a large request takes milliseconds


# What a front serves


class Front(Protocol):
    """What an application may ask of the front that serves it."""

    limits: Limits
    now: float  # of this iteration of the loop, by time.monotonic()
    stopping: bool  # a shutdown has begun
    counts: ResponseCounts

    @property
    def open_connections(self) -> int:
        """How many connections are open."""

    def call_soon(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(*args)` in the loop's thread; may be called from any thread."""

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        """Runs `work(*args)`, which may block, in one of the front's worker threads."""

    def at_end(self, call: Callable[[Front], None]) -> None:
        """Runs `call` with the front at the end of this iteration of the loop, when the requests of all connections
        have been read and before the responses are sent: what can be done for many of them together is done then."""


class Application(Protocol):
    """What responds to requests. All of it is called in the loop's thread, and must not block."""

    def route(self, exchange: Exchange) -> Handler:
        """What responds to the request. The body may not be there yet: raises `HttpError` when the head decides."""

    def refusal(self, error: BaseException) -> HttpError | None:
        """The refusal that stands for an exception of a handler; None makes it a 500."""

    def shown(self, request: Request) -> str:
        """The request's path as the log may show it."""


class Server(Front, Protocol):
    """What an exchange needs of the front that serves it."""

    application: Application
    date: bytes  # the header of this second, and the end of a head
    logs_responses: bool  # the log takes debug messages
    failures: Incidents  # requests whose responses are 500, which are our faults
    large_bodies: Counter[str]  # by route: bytes, together, of the large bodies that have no response yet


class Carrier(Protocol):
    """What an exchange needs of its connection."""

    exchange: Exchange | None  # the one that has no response yet
    unread: bool  # the peer may still send what is not for us

    @property
    def address(self) -> str:
        """Of the peer."""

    @property
    def loop(self) -> Server:
        """What drives it."""

    @property
    def state(self) -> State:
        """What it is doing."""

    def send(self, response: bytes, last: bool, deferred: bool) -> None:
        """The response to the exchange under way; the connection closes after the last one."""

    def drop(self, reason: str) -> None:
        """Closes the connection now."""


class Holder(Protocol):
    """What defers responses."""

    def withdraw(self, exchange: Exchange) -> bool:
        """The connection is closed: forgets the request, and returns True; or False when it is being worked on."""


class Exchange:
    """One request and the way back for its response. It ends with the response, or with the connection.

    The body is the handler's while that runs, and is freed then: whoever defers the response keeps what it needs.
    """

    __slots__ = ("_began", "_connection", "_handler", "_holder", "_large", "client", "request", "route")

    def __init__(self, request: Request, connection: Carrier) -> None:
        self.request = request
        self.route = "other"  # what the response is counted as
        self.client = ""  # who sent it, for the log
        self._connection, self._began = connection, connection.loop.now
        self._holder: Holder | None = None  # what defers the response
        self._handler: Handler | None = None  # once the head has been judged before the body came
        self._large = 0  # bytes of the body that count as large

    @property
    def front(self) -> Front:
        """The front that serves it."""
        return self._connection.loop

    def admit(self) -> None:
        """Before the body is taken in: what the head alone decides, and whether there is room. Raises the refusal."""
        server, length = self._connection.loop, self.request.length
        self._handler = server.application.route(self)
        if length > server.limits.small_body:
            if server.large_bodies[self.route] + length > server.limits.large_bodies:
                raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "too many large requests at a time", BUSY)
            server.large_bodies[self.route] += length
            self._large = length

    def abandon(self) -> None:
        """The connection is closed. What is being worked on keeps its share of the large bodies until it is done."""
        if self._holder is None or self._holder.withdraw(self):
            self._give_room()

    def _give_room(self) -> None:
        self._connection.loop.large_bodies[self.route] -= self._large
        self._large = 0

    def defer(self, holder: Holder) -> None:
        """The response comes later; until then the next requests of this connection wait."""
        self._holder = holder

    def respond(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] = NO_HEADERS,
        content_type: str = "application/json",
    ) -> None:  # fmt: skip
        """Responds to the request as a whole; it leaves at the end of the iteration, or as fast as the peer reads.

        Does nothing when the connection is closed; raises RuntimeError when there was a response already.
        """
        connection, request = self._connection, self.request
        if self._large:
            self._give_room()
        if connection.exchange is not self:
            if connection.state is State.CLOSED:
                return
            raise RuntimeError("a request has one response")
        loop = connection.loop
        last = loop.stopping or not request.keep_alive
        option = "close" if last else "keep-alive" if request.http10 else ""
        head = response_head(status, len(body), content_type, option)
        for name, value in headers.items():
            head += f"{name}: {value}\r\n".encode("latin-1")
        response = head + loop.date if request.method == "HEAD" else head + loop.date + body
        connection.send(response, last, self._holder is not None)
        counted = self.route, status, self._began
        made = loop.counts.new
        made[counted] = made.get(counted, 0) + 1
        if loop.logs_responses:
            client = f" ({self.client})" if self.client else ""
            log.debug("%s%s %s %d", connection.address, client, self._shown, status)

    def fail(self, error: BaseException) -> None:
        """Responds with the refusal that stands for the error; one that has none counts as a failure, and is a 500."""
        connection = self._connection
        refusal = error if isinstance(error, HttpError) else connection.loop.application.refusal(error)
        if refusal is None:
            connection.loop.failures.failed(self._shown, error)
            refusal = HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        if refusal.close:
            self.request.keep_alive = False
            connection.unread = True
        doc = {"Error": refusal.message, **refusal.details}
        self.respond(refusal.status, json.dumps(doc).encode() + b"\n", refusal.headers)

    def handle(self) -> None:
        """Lets the application respond or defer. This is its boundary: whatever it raises becomes the response, and
        costs at most this connection."""
        connection = self._connection
        if self._handler is not None:  # it was made before the body came, which takes a slow client any time
            self._began = connection.loop.now
        try:
            (self._handler or connection.loop.application.route(self))(self)
            if connection.exchange is self and self._holder is None:
                raise RuntimeError("the handler gave no response")
        except (Exception, SystemExit) as error:  # a worker may bring the exit of another thread
            self.failed(error)
        self.request.body = b""

    def finish(self, call: Callable[..., None], *args: Any) -> None:
        """Runs `call(self, *args)`, which makes a deferred response, within the same boundary."""
        try:
            call(self, *args)
        except (Exception, SystemExit) as error:
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """What makes the response raised this: it becomes the response, unless there was one already."""
        connection = self._connection
        if connection.exchange is not self and connection.state is not State.CLOSED:
            # A second response would pass for the next request's.
            connection.loop.failures.failed(f"{self._shown} after its response", error)
            return
        try:
            self.fail(error)
        except Exception as another:
            connection.loop.failures.failed(f"{self._shown} and its refusal", another)
            connection.drop("internal error")

    @property
    def _shown(self) -> str:
        """Method and path for the log, without what may be a phone number: anything can come in their places."""
        method = self.request.method
        return f"{method if method in METHODS else '-'} {self._connection.loop.application.shown(self.request)}"


Handler = Callable[[Exchange], None]

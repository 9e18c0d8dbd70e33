"""HTTP/1.1 as rules: bytes to requests, the head of a response, what a connection may do. No sockets, clock or threads.

`RequestParser` cuts what has been received into requests as RFC 9112 says, and raises `HttpError` where the RFC wants
a refusal. It is stricter than the RFC asks for, since a request that two programs read differently is how requests are
smuggled: lines end in CRLF, no header is folded, a body has a Content-Length and is never chunked. After a refusal by
the parser the connection has to be closed, because nobody knows where the next request begins.

A connection goes through the states of `State`, by the events of `Event` and the table `TRANSITIONS`:

    IDLE ─────── PART ──────> HEAD ──── WHOLE_HEAD ────> BODY         a new connection is in HEAD
      │ ^                       │                          │
      │ └── RESPONSE ────────┐  │ REQUEST                  │ REQUEST
      │ REQUEST              │  v                          │
      └────────────────> RESPONDING <──────────────────────┘

From each of these LAST_RESPONSE leads to CLOSING, from there SENT to LINGERING, and from everywhere DROP to CLOSED.

What the table keeps: at most one request of a connection is with the application, so responses leave in the order of
their requests; a request has exactly one response; after the last response no other request is served.
"""
from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

__all__ = [
    "Event", "HttpError", "Limits", "Request", "RequestParser", "State", "TRANSITIONS", "parse_headers",
    "response_head", "timeouts",
]  # fmt: skip

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}  # RFC 9110, 9.3; RFC 5789
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
# RFC 9112, 3: SP and nothing else. The path is what comes before the query, which begins with "?".
REQUEST_LINE = re.compile(rf"({TOKEN}) (?=[!-~])([!->@-~]*)((?:\?[!-~]*)?) (HTTP/[0-9]\.[0-9])\r\n")
# RFC 9112, 5: no space before the colon, no obs-fold; RFC 9110, 5.5: no NUL, bare CR or other CTL in a value.
HEADER_LINES = re.compile(rf"(?:{TOKEN}:[\t -~\x80-\xff]*\r\n)*")
HOST = re.compile(r"[A-Za-z0-9\-._~%!$&'()*+;=\[\]:]*")  # RFC 3986, 3.2.2, less the comma, which joins repeats
ABSOLUTE_FORM = re.compile(r"(?i:https?)://[^/?#]+")  # RFC 9112, 3.2.2
DIGITS = re.compile(r"[0-9]+")  # RFC 9110, 8.6: int() would take "+5", "5_0" and other scripts' digits
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
BARE_LF = re.compile(rb"(?<!\r)\n")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NO_HEADERS: Mapping[str, str] = {}
NO_DETAILS: Mapping[str, Any] = {}
LINGER_TIMEOUT = 2.0  # seconds for a refused peer to read its response before the connection is closed
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take; sizes in bytes, times in seconds. The times are totals, not per read."""

    head: int = 16 * 1024
    headers: int = 100
    target: int = 8 * 1024
    body: int = 1024 * 1024  # the application may allow less
    connections: int = 1000
    read_timeout: float = 10.0  # for a head, and again for a body
    write_timeout: float = 10.0  # for a response that the peer does not read
    idle_timeout: float = 60.0  # for a keep-alive connection between requests
    small_body: int = 64 * 1024  # larger ones of a route share what follows, each as announced and until its response
    large_bodies: int = 32 * 1024 * 1024


class HttpError(Exception):
    """A refusal: status, a text for the client, further headers, whether to close the connection after it; `details`
    are further members of the JSON object that has the text."""

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] = NO_HEADERS, *, close: bool = False,
        details: Mapping[str, Any] = NO_DETAILS,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.headers, self.close = status, message, headers, close
        self.details = details


class Request:
    """One request, as far as it has come. `headers` have lower-case names; they are shared, so do not change them."""

    __slots__ = ("body", "headers", "http10", "keep_alive", "length", "method", "path", "query")

    def __init__(
        self, method: str = "-", path: str = "-", http10: bool = False, headers: Mapping[str, str] = NO_HEADERS,
        keep_alive: bool = True, length: int = 0, query: str = "",
    ) -> None:  # fmt: skip
        self.method = method
        self.query = query  # with the "?" before it, if there is any
        self.path = path  # without the query
        self.http10 = http10
        self.headers = headers
        self.keep_alive = keep_alive  # whether the connection may stay open after it
        self.length = length  # of the body
        self.body = b""


ParsedHeaders = tuple[Mapping[str, str], bool, int]  # as `parse_headers` returns them


class RequestParser:
    """Cuts received bytes into requests: `feed` it what comes and call `next`. Not thread-safe."""

    def __init__(
        self, limits: Limits, parse_headers: Callable[[str, str, bool], ParsedHeaders] | None = None
    ) -> None:
        self.request = Request()  # the latest, as far as it has come
        self.buffer = b""  # received, not yet cut; without the part of a body
        self.awaits_body = False  # the head of `request` has come, its body has not
        self._limits, self._parse_headers = limits, parse_headers or functools.partial(_parse_headers, limits)
        self._scanned = 0  # bytes of the buffer already searched for the end of a head
        self._part = bytearray()  # of a body: bytes are copied whenever something is added, a body may come in bytes

    def feed(self, data: bytes) -> None:
        """Takes what has been received."""
        if not self.awaits_body:
            self.buffer += data
            return
        self._part += data
        if len(self._part) >= self.request.length:
            self.buffer, self._part = bytes(self._part), bytearray()

    def clear(self) -> None:
        """Throws away what has been received."""
        self.buffer, self._part = b"", bytearray()

    def next(self) -> Request | None:
        """The next whole request; None while it is not whole. Raises `HttpError`, which always closes."""
        if not self.awaits_body:
            buffer = self.buffer
            if buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: empty lines before a request are skipped
                buffer = self.buffer = EMPTY_LINES.sub(b"", buffer, 1)
            end = buffer.find(b"\r\n\r\n", self._scanned)
            if not 0 <= end <= self._limits.head:
                self.request = Request()
                self._wait_for_head()
                return None
            self.buffer, self._scanned = buffer[end + 4 :], 0
            self._parse_head(buffer[: end + 2].decode("latin-1"))
        request = self.request
        if length := request.length:
            buffer = self.buffer
            self.awaits_body = len(buffer) < length
            if self.awaits_body:
                self._part += buffer
                self.buffer = b""
                return None
            request.body, self.buffer = buffer[:length], buffer[length:]
        return request

    def _wait_for_head(self) -> None:
        buffer, limits = self.buffer, self._limits
        if BARE_LF.search(buffer, self._scanned):
            raise HttpError(HTTPStatus.BAD_REQUEST, "a line ends without CR (RFC 9112, 2.2)", close=True)
        if len(buffer) > limits.head + 3:  # three bytes more may be a part of its end
            if buffer.find(b"\r\n", 0, limits.target + 32) < 0:
                raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long", close=True)
            raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too large", close=True)
        self._scanned = max(0, len(buffer) - 3)  # the end may be split between two reads

    def _parse_head(self, head: str) -> None:
        line = REQUEST_LINE.match(head)
        if line is None:
            self.request = Request()
            raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request line (RFC 9112, 3)", close=True)
        method, path, query, version = line.groups()
        http10 = False
        try:
            if version != "HTTP/1.1":
                if not version.startswith("HTTP/1."):
                    raise HttpError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 and HTTP/1.0", close=True)
                http10 = version == "HTTP/1.0"
            if len(path) + len(query) > self._limits.target:
                raise HttpError(HTTPStatus.REQUEST_URI_TOO_LONG, "the target is too long", close=True)
            if not path.startswith("/"):
                path = _path(method, path)
            headers, keep_alive, length = self._parse_headers(head[line.end() :], method, http10)
        except HttpError:
            self.request = Request(method, path, http10)
            raise
        self.request = Request(method, path, http10, headers, keep_alive, length, query)


def _path(method: str, target: str) -> str:
    """The path of a target that does not begin with it; both without the query (RFC 9112, 3.2)."""
    if absolute := ABSOLUTE_FORM.match(target):
        path = target[absolute.end() :]
        return path if path.startswith("/") else "/" + path
    if method == "CONNECT" or (method, target) == ("OPTIONS", "*"):
        return target
    raise HttpError(HTTPStatus.BAD_REQUEST, "malformed request target (RFC 9112, 3.2)", close=True)


def parse_headers(limits: Limits, cached: int) -> Callable[[str, str, bool], ParsedHeaders]:
    """A function of the header section, the method and whether it is HTTP/1.0, which remembers its latest results."""
    return functools.lru_cache(cached)(functools.partial(_parse_headers, limits))


def _parse_headers(limits: Limits, section: str, method: str, http10: bool) -> ParsedHeaders:
    """The headers by lower-case name, whether the connection may stay open, and the length of the body."""
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
    host = headers.get("host", "" if http10 else None)
    if host is None or HOST.fullmatch(host) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, "exactly one valid Host is needed (RFC 9112, 3.2)", close=True)
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}  # RFC 9112, 9.3
    keep_alive = "close" not in options and (not http10 or "keep-alive" in options)
    if not http10 and headers.get("expect", "100-continue").lower() != "100-continue":
        raise HttpError(HTTPStatus.EXPECTATION_FAILED, "only 100-continue can be expected", close=True)
    return headers, keep_alive, _body_length(headers, method, http10, limits.body)


def _body_length(headers: Mapping[str, str], method: str, http10: bool, most: int) -> int:
    """RFC 9112, 6.3. A body without a Content-Length is refused, so nothing is ever decoded."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or http10:  # 6.1: how requests are smuggled
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


# Responses


@functools.lru_cache(64)  # most responses have one of a few heads
def response_head(status: int, length: int, content_type: str, connection: str) -> bytes:
    """The status line and the headers that each response has, but for the date and the empty line."""
    head = f"HTTP/1.1 {status:d} {HTTPStatus(status).phrase}\r\n"
    head += f"Content-Length: {length}\r\n" if status != HTTPStatus.NO_CONTENT else ""  # RFC 9110, 8.6
    head += f"Content-Type: {content_type}\r\n" if length else ""
    head += f"Connection: {connection}\r\n" if connection else ""
    return head.encode("latin-1")


# States of a connection


class State(enum.IntEnum):
    """What a connection is doing. Up to `BODY` the next request may be served, up to `RESPONDING` what comes belongs to
    a request. Integers, since their hash and their order cost no call."""

    IDLE = enum.auto()  # keep-alive, and nothing of the next request has come
    HEAD = enum.auto()  # it is new, or a part of a head has come
    BODY = enum.auto()  # a head has come, and its body is awaited
    RESPONDING = enum.auto()  # a request is whole and has no response yet; whoever makes it has limits of its own
    CLOSING = enum.auto()  # the last response is being sent
    LINGERING = enum.auto()  # it has been sent; what comes is thrown away until the peer closes (RFC 9112, 9.6)
    CLOSED = enum.auto()


class Event(enum.IntEnum):
    """What happens to a connection."""

    PART = enum.auto()  # a part of a head has come
    WHOLE_HEAD = enum.auto()  # a head without its body has come
    REQUEST = enum.auto()  # a request is whole
    RESPONSE = enum.auto()  # its response is made, and the connection stays open
    LAST_RESPONSE = enum.auto()  # a response is made after which the connection closes
    SENT = enum.auto()  # that has been sent, and the peer may still be sending
    DROP = enum.auto()  # the socket is closed


IDLE, HEAD, BODY, RESPONDING, CLOSING, LINGERING, CLOSED = State
PART, WHOLE_HEAD, REQUEST, RESPONSE, LAST_RESPONSE, SENT, DROP = Event
class Row(dict[Event, State]):
    """What may happen in a state, and the state after it; anything else raises RuntimeError."""

    def __missing__(self, event: Event) -> State:
        raise RuntimeError(f"{event.name} must not happen now")


TRANSITIONS: dict[State, Row] = {
    IDLE: Row({PART: HEAD, WHOLE_HEAD: BODY, REQUEST: RESPONDING, LAST_RESPONSE: CLOSING, DROP: CLOSED}),
    HEAD: Row({PART: HEAD, WHOLE_HEAD: BODY, REQUEST: RESPONDING, LAST_RESPONSE: CLOSING, DROP: CLOSED}),
    BODY: Row({REQUEST: RESPONDING, LAST_RESPONSE: CLOSING, DROP: CLOSED}),
    RESPONDING: Row({RESPONSE: IDLE, LAST_RESPONSE: CLOSING, DROP: CLOSED}),
    CLOSING: Row({SENT: LINGERING, DROP: CLOSED}),
    LINGERING: Row({DROP: CLOSED}),
    CLOSED: Row(),
}


def timeouts(limits: Limits) -> dict[State, float]:
    """Seconds that a connection may stay in each state; a write-blocked one has `Limits.write_timeout` instead.
    Only the application has no deadline."""
    return {IDLE: limits.idle_timeout, HEAD: limits.read_timeout, BODY: limits.read_timeout, RESPONDING: NEVER,
            CLOSING: limits.write_timeout, LINGERING: LINGER_TIMEOUT, CLOSED: NEVER}  # fmt: skip

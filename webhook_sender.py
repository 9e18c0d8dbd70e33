"""Posts a body to the webhook's receiver: one request, one connection, one deadline for all of it."""
from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from change_outbox import ChangeBody
from incident_log import describe
from webhook_message import WebhookTarget, content_of, retry_after, signed_headers
from worker_threads import Deadline

__all__ = ["Answer", "WebhookSender"]

TIMEOUT = 15.0  # seconds that a request may take in all; the specification recommends 15 to 30
SHOWN = 65_536  # bytes of a response's content that are taken in, so that the receiver can send it to its end


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request. Of the response nothing is kept that could be logged, but its status."""

    ok: bool
    said: str  # the status, or the type of the error
    retry_after: float = 0.0  # seconds


class _Incoming(io.RawIOBase):
    """What a socket receives until the deadline, however slowly it trickles in."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._socket, self._deadline = sock, deadline

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as socket.SocketIO has it
        """Blocks until there is something; raises TimeoutError at the deadline."""
        _limit(self._socket, self._deadline)
        return self._socket.recv_into(buffer)


class _Wire:
    """As much of a socket as `http.client` uses, with one deadline in place of a timeout for each step."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._socket, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        """Blocks until the system has all of it; raises TimeoutError at the deadline."""
        _limit(self._socket, self._deadline)
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What comes in."""
        return io.BufferedReader(_Incoming(self._socket, self._deadline))

    def close(self) -> None:
        """Does nothing: `http.client` calls it when the head of the last response is read, and its content is not."""


class _Response(http.client.HTTPResponse):
    """The final response: interim ones (RFC 9110, 15.2), of which `http.client` knows only 100, are passed over."""

    def begin(self) -> None:
        """Reads the head, as `http.client` does."""
        super().begin()
        while self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:  # which nobody asked for
            self.headers = None  # type: ignore[assignment]  # by which the base class knows that it has to read one
            super().begin()


class _Connection(http.client.HTTPConnection):
    """A connection for one request."""

    response_class = _Response

    def __init__(self, target: WebhookTarget, context: ssl.SSLContext | None, deadline: Deadline) -> None:
        super().__init__(target.host, target.port)
        self.default_port = 443 if context else 80  # a Host without the port where that is the scheme's
        self._context, self._deadline = context, deadline
        self._opened: socket.socket | None = None

    def connect(self) -> None:
        """Connects to the first of the host's addresses that can be reached; each gets its share of the time left."""
        addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for place, (family, kind, protocol, _, address) in enumerate(addresses, 1):
            self._opened = sock = socket.socket(family, kind, protocol)
            try:
                _limit(sock, self._deadline, len(addresses) + 1 - place)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # head and content are sent one by one
                if self._context is not None:
                    _limit(sock, self._deadline)
                    self._opened = sock = self._context.wrap_socket(sock, server_hostname=self.host)
            except OSError:
                sock.close()
                if place == len(addresses):
                    raise
            else:
                self.sock = _Wire(sock, self._deadline)
                return

    def end(self) -> None:
        """Closes the socket, if there is one."""
        if self._opened is not None:
            self._opened.close()


def _limit(sock: socket.socket, deadline: Deadline, parts: int = 1) -> None:
    """Lets the next step of the socket take what is left until the deadline, or one of so many parts of it."""
    left = deadline.left
    if not left:
        raise TimeoutError("the request took too long")
    sock.settimeout(left / parts)


class WebhookSender:
    """Signs and posts. One thread at a time may `post`; `secrets` may be set by another one.

    No proxy of the environment is used, no redirect followed. The system's authorities have to trust a certificate.
    """

    def __init__(
        self, target: WebhookTarget, secrets: tuple[bytes, ...], *, timeout: float = TIMEOUT,
        wall_clock: Callable[[], float] = time.time, context: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self.secrets = secrets
        self._target, self._timeout, self._wall_clock = target, timeout, wall_clock
        self._context = context or (ssl.create_default_context() if target.scheme == "https" else None)

    def post(self, body: ChangeBody) -> Answer:
        """Makes one request; blocks for the timeout at the most, and for the system's look-up of the host's name."""
        content = content_of(body)
        headers = {"Content-Type": "application/json", "User-Agent": "smsproxy", "Connection": "close"}
        headers |= signed_headers(body.id, content, self.secrets, self._wall_clock())
        if self._target.authorization is not None:
            headers["Authorization"] = self._target.authorization
        connection = _Connection(self._target, self._context, Deadline(self._timeout))
        try:
            connection.request("POST", self._target.path, content, headers)
            response = connection.getresponse()
            with contextlib.suppress(OSError, http.client.HTTPException):  # the status is all that counts
                response.read(SHOWN)
        except (OSError, http.client.HTTPException) as error:
            return Answer(False, describe(error))
        finally:
            connection.end()
        wait = retry_after(response.getheader("Retry-After"), self._wall_clock())
        return Answer(200 <= response.status < 300, f"status {response.status}", wait)

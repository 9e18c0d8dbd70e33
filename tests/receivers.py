"""Receivers of the webhook: what a shop would run, in ways that a test can script."""
from __future__ import annotations

import base64
import contextlib
import json
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from helpers import HANG

__all__ = [
    "SECRETS", "Behaviour", "Receiver", "Told", "answer", "hanging", "reset", "secret_line", "trickle", "verified",
]  # fmt: skip

SECRETS = (bytes(range(32)), bytes(range(100, 124)))

# The receiver in ten lines that the documentation shows; `secret` is the line of the file.
VERIFY = '''\
import base64, hashlib, hmac, time

def verify(secret: str, headers: dict, body: bytes) -> None:
    """Raises ValueError unless the service that knows the secret sent this just now."""
    message_id, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    expected = "v1," + base64.b64encode(signed).decode()
    found = any(hmac.compare_digest(expected, each) for each in headers["webhook-signature"].split())
    if not found or abs(time.time() - int(timestamp)) > 300:
        raise ValueError("not from our SMS service, or too old")
'''
# The same with the official library, `pip install standardwebhooks`.
VERIFY_WITH_LIBRARY = '''\
from standardwebhooks import Webhook

def verify(secret: str, headers: dict, body: bytes) -> None:
    """Raises WebhookVerificationError unless the service that knows the secret sent this just now."""
    Webhook(secret).verify(body.decode(), headers)
'''


def secret_line(secret: bytes) -> str:
    """The secret as it is written in the file."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def verifier(snippet: str) -> Callable[[str, dict[str, str], bytes], None]:
    """What a snippet of the documentation defines."""
    names: dict[str, Any] = {}
    exec(snippet, names)
    found: Callable[[str, dict[str, str], bytes], None] = names["verify"]
    return found


def verified(headers: dict[str, str], body: bytes, secret: bytes = SECRETS[0]) -> bool:
    """Whether a receiver that knows the secret takes this."""
    try:
        verifier(VERIFY)(secret_line(secret), headers, body)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Told:
    """One request that came."""

    line: str  # the request line
    headers: dict[str, str]  # names in lower case
    body: bytes
    statuses: dict[str, str] = field(default_factory=dict)  # by message ID

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Behaviour = Callable[["_Handler"], None]


def answer(status: int, *headers: str, body: bytes = b"") -> Behaviour:
    """Answers with this status."""
    head = "\r\n".join([f"HTTP/1.1 {status} Told", f"Content-Length: {len(body)}", *headers])
    return lambda handler: handler.write(head.encode() + b"\r\n\r\n" + body)


def garbage(data: bytes) -> Behaviour:
    """Answers with something that is no HTTP."""
    return lambda handler: handler.write(data)


def hanging(handler: _Handler) -> None:
    """Answers when the test is over."""
    handler.server.over.wait(HANG)


def reset(handler: _Handler) -> None:
    """Resets the connection."""
    handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.request.close()


def trickle(start: bytes) -> Behaviour:
    """Answers with this, and then a byte each few milliseconds for ever."""

    def behave(handler: _Handler) -> None:
        with contextlib.suppress(OSError):
            handler.write(start)
            while not handler.server.over.wait(0.005):
                handler.write(b"x")

    return behave


class _Handler(socketserver.StreamRequestHandler):
    server: Receiver

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        headers = {}
        while field := self.rfile.readline().decode().strip():
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        behave = self.server.came(Told(line, headers, body, statuses_of(body)))
        behave(self)

    def write(self, data: bytes) -> None:
        self.wfile.write(data)


def statuses_of(body: bytes) -> dict[str, str]:
    return {each["ID"]: each["Status"] for each in json.loads(body)["data"]["Messages"]} if body else {}


class Receiver(socketserver.ThreadingTCPServer):
    """A receiver on the loopback. It behaves as the script says, one entry a request, and then as `usually`."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, *script: Behaviour, usually: Behaviour = answer(204), context: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.over = threading.Event()
        self.told: list[Told] = []
        self.statuses: dict[str, str] = {}  # by message ID, the newest that was taken
        self.backwards: list[Told] = []  # requests with a status older than one that came before
        self.usually = usually
        self._script = list(script)
        self._changed = threading.Condition()
        self._scheme = "https" if context else "http"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="receiver", daemon=True)
        self._thread.start()

    def url(self, path: str = "/hook", user: str = "") -> str:
        return f"{self._scheme}://{user}127.0.0.1:{self.server_address[1]}{path}"

    def __exit__(self, *exc_info: object) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join(HANG)
        self.server_close()

    def came(self, told: Told) -> Behaviour:
        """A request came; returns what happens next."""
        with self._changed:
            self.told.append(told)
            rank = {"CONFIRMED": 1, "DELIVERED": 2, "FAILED": 2}
            if any(rank[status] < rank.get(self.statuses.get(each, ""), 0) for each, status in told.statuses.items()):
                self.backwards.append(told)
            self.statuses.update(told.statuses)
            self._changed.notify_all()
            return self._script.pop(0) if self._script else self.usually

    def wait_for(self, predicate: Callable[[list[Told]], bool]) -> None:
        """Blocks until the requests so far satisfy the predicate."""
        with self._changed:
            assert self._changed.wait_for(lambda: predicate(self.told), HANG), f"it was told {self.told}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away: what a receiver that hangs or trickles is told."""


@contextlib.contextmanager
def away() -> Iterator[str]:
    """The URL of a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"

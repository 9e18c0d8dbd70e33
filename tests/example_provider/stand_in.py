"""A stand-in for the provider's HTTP API that misbehaves on demand and remembers what it processed.

What each request gets is read from an iterator of `Fault`s; once it is over every batch is taken. Run
as a program it serves until it is interrupted, with 30 % of the requests failing; with a URL and a secret it pushes
signed delivery reports there, and otherwise it is asked for them:

    python tests/example_provider/stand_in.py 9090
    python tests/example_provider/stand_in.py 9090 http://127.0.0.1:8080/reports the-secret
"""
from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import itertools
import json
import os
import random
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

HANG = 30.0  # seconds after which a test has hung
PAGE = 500  # reports in one answer

ANSWER, RESET, STALL, HANG_UP, CUT = "answer", "reset", "stall", "hang up", "cut"  # what becomes of a request


@dataclass(frozen=True)
class Fault:
    """How one request is dealt with; the default is that it is not."""

    processed: bool = False
    how: str = ANSWER  # or reset the connection, stay silent, close it unannounced after or within the answer
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # what it says in place of its answer

    @property
    def unknown(self) -> bool:
        """Whether the sender cannot know that its batch was processed."""
        return self.processed and (self.how in (RESET, STALL) or self.status >= 500)


OK = Fault(processed=True, status=202)
OK_THEN_CLOSED = Fault(processed=True, status=202, how=HANG_UP)
DECK = (  # of 100 requests 30 fail
    *[OK] * 65,
    *[OK_THEN_CLOSED] * 5,
    *[Fault()] * 6,
    *[Fault(status=429, headers={"Retry-After": "1"})] * 3,
    *[Fault(how=RESET)] * 6,
    *[Fault(how=STALL)] * 1,
    *[Fault(processed=True)] * 6,
    *[Fault(processed=True, how=RESET)] * 6,
    *[Fault(processed=True, how=STALL)] * 2,
)


def deck(rng: random.Random) -> Iterator[Fault]:
    """Faults without end: every 100 are those of `DECK`, in random order."""
    cards = list(DECK)
    while True:
        rng.shuffle(cards)
        yield from cards


class StandIn(ThreadingHTTPServer):
    """The provider, on a free port of the loopback; a context manager.

    A message whose number starts with 00 is refused by name; any other number that starts with 0 makes it reject the
    whole batch. Delivery reports come in random order, and one in ten comes twice. `latency` is the longest time in
    seconds that an answer takes. With `push_to`, a URL, it pushes reports there, signed with `secret`, until they are
    taken; those on a message with a URL of its own go to that one, without the ID.
    """

    request_queue_size = 128
    daemon_threads = False  # so that server_close() joins them

    def __init__(
        self,
        faults: Iterable[Fault] = (),
        *,
        poll_faults: Iterable[Fault] = (),
        seed: int = 0,
        latency: float = 0.0,
        port: int = 0,
        push_to: str = "",
        secret: bytes = b"",
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[list[str]] = []  # IDs of every batch that arrived
        self.processed: list[tuple[list[str], bool]] = []  # IDs, and whether the sender could not know
        self.rejected: list[list[str]] = []
        self.messages: dict[str, dict[str, str]] = {}  # by ID, as processed
        self.headers: list[Mapping[str, str]] = []
        self.cursors: list[str] = []  # of every poll
        self.failures = 0  # requests that a fault spoiled
        self.connections = 0
        self.closed = threading.Semaphore(0)  # released for every connection that ended
        self.errors: list[BaseException] = []
        self._faults = itertools.chain(faults, itertools.repeat(OK))
        self._poll_faults = itertools.chain(poll_faults, itertools.repeat(OK))
        self._rng, self._seed, self._latency = random.Random(seed), seed, latency
        self._reports: list[dict[str, str]] = []
        self._changed = threading.Condition()  # guards everything above, and says that it changed
        self._sockets: set[socket.socket] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="provider stand-in")
        self.pushed: list[int] = []  # the status of each push
        self._push_to, self._secret = push_to, secret
        self._pusher = threading.Thread(target=self._push_all, name="provider stand-in's pushes")

    def __enter__(self) -> StandIn:
        self._thread.start()
        self._pusher.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._pusher.join(HANG)
        self.shutdown()
        self._thread.join(HANG)
        with self._changed:
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # the peer was first
                    sock.shutdown(socket.SHUT_RDWR)
        self.server_close()
        if self.errors:
            raise self.errors[0]

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Blocks until the predicate holds; it is looked at whenever a request came."""
        with self._changed:
            assert self._changed.wait_for(predicate, HANG), "the requests never came"

    def report(self, *reports: tuple[str, str]) -> None:
        """Adds reports, message ID and status, in this order."""
        with self._changed:
            self._reports += [{"ID": message_id, "Status": status} for message_id, status in reports]
            self._changed.notify_all()

    def fate(self, message_id: str) -> str:
        """How the message ends: one in twenty is undeliverable."""
        return "undeliverable" if zlib.crc32(message_id.encode(), self._seed) % 20 == 0 else "delivered"

    # What the handlers ask

    def take(self, batch: list[dict[str, str]], headers: Mapping[str, str]) -> Fault:
        """Records a batch, processes it unless its fault says no, and returns the fault."""
        ids = [message["ID"] for message in batch]
        with self._changed:
            self.requests.append(ids)
            self.headers.append(headers)
            fault = next(self._faults)
            if any(message["To"].startswith("0") and not message["To"].startswith("00") for message in batch):
                fault = replace(fault, processed=False)
                if fault.status < 400:
                    fault = Fault(status=400)
                    self.rejected.append(ids)
            if fault.how in (RESET, STALL) or fault.status > 400:
                self.failures += 1
            if fault.processed:
                taken = [message for message in batch if not message["To"].startswith("00")]
                self._process(taken, [message["ID"] for message in taken], fault)
            self._changed.notify_all()
        return fault

    def _process(self, batch: list[dict[str, str]], ids: list[str], fault: Fault) -> None:
        self.processed.append((ids, fault.unknown))
        self.messages.update((message["ID"], message) for message in batch)
        reports = [{"ID": each, "Status": status} for each in ids for status in ("sent", self.fate(each))]
        reports += [report for report in reports if self._rng.random() < 0.1]
        self._rng.shuffle(reports)
        self._reports += reports

    def page(self, after: str) -> tuple[Fault, dict[str, Any]]:
        """The fault of a poll, and the reports after the cursor."""
        start = int(after or 0)
        with self._changed:
            self.cursors.append(after)
            self._changed.notify_all()
            reports = self._reports[start : start + PAGE]
            return next(self._poll_faults), {"Reports": reports, "Next": str(start + len(reports))}

    def linger(self) -> None:
        """The time an answer takes."""
        if self._latency:
            with self._changed:
                seconds = self._rng.uniform(0.0, self._latency)
            self._stopping.wait(seconds)

    # Pushing

    def _push_all(self) -> None:
        done = 0
        while self._push_to:
            with self._changed:
                while len(self._reports) <= done and not self._stopping.is_set():
                    self._changed.wait()
                reports = self._reports[done : done + PAGE]
                own = {each["ID"]: self.messages.get(each["ID"], {}).get("Callback", "") for each in reports}
            if self._stopping.is_set():
                return
            done += len(reports)
            self._push(self._push_to, {"Reports": [each for each in reports if not own[each["ID"]]]})
            for report in reports:
                if own[report["ID"]]:
                    self._push(own[report["ID"]], {"Status": report["Status"]})

    def _push(self, url: str, document: Mapping[str, Any]) -> None:
        """Repeats it until it is taken, or refused for good."""
        parts, body = urlsplit(url), json.dumps(document).encode()
        headers = {"X-Signature": hmac.new(self._secret, body, hashlib.sha256).hexdigest()}
        while document.get("Reports") != [] and not self._stopping.is_set():
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=HANG)
            status = 0
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("POST", f"{parts.path}?{parts.query}", body, headers)
                status = connection.getresponse().status
            with self._changed:
                self.pushed.append(status)
                self._changed.notify_all()
            if 200 <= status < 500 and status:
                return
            self._stopping.wait(0.05)

    # Connections

    def process_request(self, request: Any, client_address: Any) -> None:
        """Counts the connection."""
        with self._changed:
            self.connections += 1
            self._sockets.add(request)
            self._changed.notify_all()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Tells that it ended."""
        with self._changed:
            self._sockets.discard(request)
        super().shutdown_request(request)
        self.closed.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps what is not the peer's doing, for `__exit__` to raise."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    """One connection to the stand-in."""

    server: StandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write to an answer
    timeout = HANG

    def do_POST(self) -> None:
        """Takes a batch."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refused = {each["ID"]: "no such number" for each in body["Messages"] if each["To"].startswith("00")}
        self._finish(self.server.take(body["Messages"], dict(self.headers)), {"Refused": refused, "Echo": body})

    def do_GET(self) -> None:
        """Hands out delivery reports."""
        fault, page = self.server.page(parse_qs(urlsplit(self.path).query).get("after", [""])[0])
        self._finish(Fault(processed=True, status=200) if fault is OK else fault, page)

    def _finish(self, fault: Fault, document: Any) -> None:
        self.server.linger()
        if fault.how == STALL:
            self.connection.recv(1)  # until the peer has had enough
        if fault.how in (RESET, STALL):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once, and so with RST
            return
        data = json.dumps(document).encode() if fault.body is None else fault.body
        self.send_response(fault.status)
        for name, value in {**fault.headers, "Content-Length": str(len(data) + (fault.how == CUT))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = self.close_connection or fault.how in (HANG_UP, CUT)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the stand-in remembers enough."""


if __name__ == "__main__":
    endless = deck(random.Random())
    port, push_to, secret = (*sys.argv[1:], "", "")[:3]
    stand_in = StandIn(
        endless, poll_faults=deck(random.Random()), port=int(port), latency=0.2, push_to=push_to, secret=secret.encode()
    )
    with stand_in:
        print(f"the provider's stand-in listens on {stand_in.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{len(stand_in.requests)} requests, {stand_in.failures} failed, {len(stand_in.messages)} messages")

"""A complete `FastSmsingClient` over HTTP, on the standard library alone: copy it and fit it to your provider.

The provider it talks to wants `Authorization: Bearer <token>` and offers

    POST /messages  {"Messages": [{"ID": "...", "To": "48123456789", "Text": "Hi"}, ...]}
        202 {"Refused": {"<ID>": "<reason>", ...}} when it took all but these; one paid request
        400 when it takes none of them because of some that it does not name
    GET /reports?after=<cursor>
        200 {"Reports": [{"ID": "...", "Status": "sent"}, ...], "Next": "<cursor>"}, oldest first; reports are
        kept until a later cursor acknowledges them, so an empty one also brings what an earlier process missed

Delivery reports are polled for, which needs no port that the provider can reach. Or they are pushed, to the service's
own `POST /reports`: then the client is a `PushedClient`, and the provider has to reach that path, by the reverse proxy
perhaps. It signs what it pushes with a secret that both know:

    POST <your URL>/reports  {"Reports": [{"ID": "...", "Status": "sent"}, ...]}
        X-Signature: <hexadecimal HMAC-SHA256 of the body>

A provider that does not echo the ID of a message is given it in the URL that it is to call, with a signature of ours:

    POST /messages  {"Messages": [{..., "Callback": "<your URL>/reports?id=<ID>&signature=<HMAC of the ID>"}, ...]}
    POST <your URL>/reports?id=<ID>&signature=<HMAC of the ID>  {"Status": "sent"}
"""
from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from fastsmsing import FastSmsingError, Message, MessageStatus, RejectedError

__all__ = ["HttpClient", "PushedClient", "make_client", "make_pushed_client"]

log = logging.getLogger("smsproxy.provider")

CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
# The statuses that speak of the batch. Any other, 401 for a wrong token too, may be mended while the batch waits; a
# message that is rejected is lost.
REJECTED = {400, 413, 422}
STATUSES = {
    "sent": MessageStatus.CONFIRMED,
    "delivered": MessageStatus.DELIVERED,
    "undeliverable": MessageStatus.FAILED,
}
LARGEST_ANSWER = 1024 * 1024  # bytes; reports come in pages, so more is not an answer of this provider
LONGEST_WAIT = 3_600.0  # seconds, whatever a Retry-After asks for
LOG_PAUSE = 60.0  # seconds between two lines about the same error


class HttpClient:
    """Sends batches over kept-alive connections, one per thread that sends at the time. Thread-safe.

    `connect_timeout` covers the connection, `read_timeout` each wait for the provider, `poll_interval` the
    pause between two looks for delivery reports; all in seconds. Messages carry their IDs, which a provider
    that knows idempotency keys can use to recognise a batch that is sent again after an unknown outcome.
    """

    def __init__(
        self, url: str, token: str = "", *,
        connect_timeout: float = 5.0, read_timeout: float = 30.0, poll_interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in CONNECTIONS or not parts.hostname:
            raise ValueError("the provider's URL must look like https://host/path")
        kind, address = CONNECTIONS[parts.scheme], (parts.hostname, parts.port)
        self._new_connection: Callable[[], http.client.HTTPConnection] = lambda: kind(*address, timeout=connect_timeout)
        self._path = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._read_timeout, self._poll_interval, self._clock = read_timeout, poll_interval, clock
        self._lock = threading.Lock()  # guards the next three; never held during I/O
        self._busy: set[http.client.HTTPConnection] = set()
        self._idle: list[http.client.HTTPConnection] = []
        self._subscribers: list[queue.Queue[Mapping[str, object] | None]] = []
        self._stopped = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="smsproxy-reports-1", daemon=True)

    def send(self, messages: Sequence[Message]) -> Mapping[str, str] | None:
        """Hands over one batch; blocks for the two timeouts at most, unless the answer trickles in.

        Returns the messages that the provider refuses, if its answer can be read: the status says that it took the
        batch, so an answer that cannot be read is no reason to send it again.
        """
        payload = self._exchange("POST", "/messages", {"Messages": [self._described(each) for each in messages]})
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            refused = json.loads(payload).get("Refused")
            return refused if isinstance(refused, dict) else None
        return None

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        """Starts to poll with the first subscriber; after `stop` one only gets the closing `None`."""
        with self._lock:
            self._subscribers.append(updates)
            stopped = self._stopped.is_set()
            if not stopped and self._poller.ident is None:
                self._poller.start()
        if stopped:
            updates.put(None)

    def stop(self) -> None:
        """Ends the polling and every request under way, then closes every subscription, once."""
        with self._lock:
            if self._stopped.is_set():
                return
            self._stopped.set()
            idle, self._idle = self._idle, []
            busy, subscribers = tuple(self._busy), tuple(self._subscribers)
        for connection in idle:
            connection.close()
        for connection in busy:
            with contextlib.suppress(OSError, AttributeError):  # not connected, or not any more
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it, which then closes it
        for updates in subscribers:
            with updates.all_tasks_done:
                updates.all_tasks_done.notify_all()  # wakes the poller that waits for its reports to be applied
        if self._poller.ident is not None:
            self._poller.join()  # before the None, so that it really is the last
        for updates in subscribers:
            updates.put(None)

    def _described(self, message: Message) -> dict[str, str]:
        return {"ID": message.message_id, "To": message.phone_number, "Text": message.message}

    # Requests

    def _exchange(self, method: str, path: str, document: Any = None) -> bytes:
        """One request, never repeated here; returns the answer's body, or raises what the answer means."""
        body = None if document is None else json.dumps(document).encode()
        try:
            connection, keep, payload = self._connect(), False, b""
            try:
                connection.request(method, self._path + path, body, self._headers)
                response = connection.getresponse()
                # Whether the body can be read or not, the head has told how it went.
                with response, contextlib.suppress(OSError, http.client.HTTPException):
                    payload = response.read(LARGEST_ANSWER)
                    keep = response.isclosed() and not response.will_close
            finally:
                self._release(connection, keep)
        except (OSError, http.client.HTTPException) as error:
            raise FastSmsingError("no answer") from error
        if 200 <= response.status < 300:
            return payload
        if response.status in REJECTED:
            raise RejectedError(response.status)
        raise FastSmsingError(response.status, retry_after=_seconds(response.getheader("Retry-After")))

    def _connect(self) -> http.client.HTTPConnection:
        """A kept connection that the peer has not closed meanwhile, or a new one.

        Only before the first byte of a request is it certain that the provider has processed nothing, so only
        here a stale connection is replaced in silence. When one breaks later, even at once, the batch may have
        been read and paid for: that is an attempt like any other, and the proxy decides about the next.
        """
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else self._new_connection()
                self._busy.add(connection)
            try:
                sock: socket.socket | None = connection.sock
                if sock is None:
                    connection.connect()
                    connection.sock.settimeout(self._read_timeout)
                elif _readable(sock):  # closed, or an answer that nobody asked for
                    self._release(connection)
                    continue
                if self._stopped.is_set():  # only now: from here on `stop` finds a socket to shut down
                    raise FastSmsingError("the client is stopped")
                return connection
            except BaseException:
                self._release(connection)
                raise

    def _release(self, connection: http.client.HTTPConnection, keep: bool = False) -> None:
        with self._lock:
            self._busy.discard(connection)
            if keep and not self._stopped.is_set():
                self._idle.append(connection)
                return
        connection.close()

    # Delivery reports

    def _poll(self) -> None:
        silence = _Repeated("no delivery reports", self._clock)
        odd = _Repeated("reports that cannot be read", self._clock)
        cursor, wait = "", 0.0
        while not self._stopped.wait(wait):
            try:
                reports, following = _page(self._exchange("GET", "/reports?" + urlencode({"after": cursor})))
            except Exception as error:  # the boundary: whatever it is, the next poll may go well
                wait = max(self._poll_interval, getattr(error, "retry_after", 0.0))
                if not self._stopped.is_set():
                    silence.failed(error if isinstance(error, FastSmsingError) else type(error).__name__)
                continue
            silence.ended()
            good = [report for report in reports if _readable_report(report)]
            if len(good) < len(reports):
                odd.failed(f"{len(reports) - len(good)} of {len(reports)}")
            elif reports:
                odd.ended()
            self._publish(good)
            self._wait_until_applied()  # asking with the next cursor acknowledges them
            cursor, wait = following, 0.0 if reports else self._poll_interval

    def _publish(self, reports: Sequence[Mapping[str, str]]) -> None:
        """Every report to every subscriber, in order: a mapping has room for one status of a message.

        A status that is not in `STATUSES` goes on as it is: the service counts it and says which it was.
        """
        mappings: list[dict[str, object]] = []
        for report in reports:
            if not mappings or report["ID"] in mappings[-1]:
                mappings.append({})
            mappings[-1][report["ID"]] = STATUSES.get(report["Status"], report["Status"])
        with self._lock:
            subscribers = tuple(self._subscribers)
        for mapping in mappings:
            for updates in subscribers:
                updates.put(mapping)

    def _wait_until_applied(self) -> None:
        """What `Queue.join` does for each subscriber, but ends with `stop`, too."""
        with self._lock:
            subscribers = tuple(self._subscribers)
        for updates in subscribers:
            with updates.all_tasks_done:
                while updates.unfinished_tasks and not self._stopped.is_set():
                    updates.all_tasks_done.wait()


class PushedClient(HttpClient):
    """The same with delivery reports that are pushed. `secret` is what they are signed with.

    With `callback`, the URL at which the provider reaches `/reports`, each message tells it where to report on that
    message: that is for a provider that does not echo our IDs.
    """

    def __init__(self, url: str, token: str = "", *, secret: bytes, callback: str = "", **times: Any) -> None:
        super().__init__(url, token, **times)
        self._secret, self._callback = secret, callback

    def subscribe(self, updates: queue.Queue[Mapping[str, object] | None]) -> None:
        """Polls for nothing; after `stop` a subscriber only gets the closing `None`."""
        with self._lock:
            self._subscribers.append(updates)
            stopped = self._stopped.is_set()
        if stopped:
            updates.put(None)

    def receive(self, query: str, headers: Mapping[str, str], body: bytes) -> None:
        """Returns when the reports are applied, and so on disk if the outbox is: the provider then forgets them."""
        ours = parse_qs(query)
        message_id = ours.get("id", [""])[0]
        if message_id:
            self._verify(message_id.encode(), ours.get("signature", [""])[0])
        else:
            self._verify(body, headers.get("x-signature", ""))
        try:
            document = json.loads(body)
            reports = [{"ID": message_id, "Status": document["Status"]}] if message_id else document["Reports"]
            good = [report for report in reports if _readable_report(report)]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError("not a report") from error
        if reports and not good:
            raise ValueError("no report that can be read")
        self._publish(good)
        self._wait_until_applied()

    def _described(self, message: Message) -> dict[str, str]:
        described = super()._described(message)
        if self._callback:
            signed = {"id": message.message_id, "signature": self._signature(message.message_id.encode())}
            described["Callback"] = f"{self._callback}?{urlencode(signed)}"
        return described

    def _signature(self, data: bytes) -> str:
        return hmac.new(self._secret, data, hashlib.sha256).hexdigest()

    def _verify(self, data: bytes, signature: str) -> None:
        """In constant time, so that nobody learns from the time how much of a guess is right."""
        if not hmac.compare_digest(self._signature(data).encode(), signature.encode("utf-8", "replace")):
            raise PermissionError("not the provider's signature")


class _Repeated:
    """Logs an error that repeats when it begins, once a minute with its count, and when it is over. For one thread."""

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what, self._clock = what, clock
        self._count = 0  # of errors since it began; 0 when all is well
        self._began = self._logged = 0.0

    def failed(self, why: object) -> None:
        """Counts an error, and logs it when it is time."""
        now = self._clock()
        self._count += 1
        if self._count == 1:
            self._began = self._logged = now
            log.warning("%s: %s", self._what, why)
        elif now - self._logged >= LOG_PAUSE:
            self._logged = now
            log.warning("%s: %s (%d times in %.0f s)", self._what, why, self._count, now - self._began)

    def ended(self) -> None:
        """Logs that all is well again, if it was not."""
        if self._count:
            log.warning("over after %.0f s: %s (%s)", self._clock() - self._began, self._what, _times(self._count))
            self._count = 0


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _page(payload: bytes) -> tuple[list[Any], str]:
    """The reports of a response, and the cursor that acknowledges them; raises when it is no page."""
    page = json.loads(payload)
    reports, following = page["Reports"], page["Next"]
    if not (isinstance(reports, list) and isinstance(following, str)):
        raise TypeError("not a page of reports")
    return reports, following


def _readable_report(report: Any) -> bool:
    """Whether a report has an ID and a status; a page may hold what this client does not know."""
    return isinstance(report, dict) and all(isinstance(report.get(name), str) for name in ("ID", "Status"))


def _readable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:  # select.select() would fail from file descriptor 1024 on
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _seconds(retry_after: str | None) -> float:
    """The wait that a Retry-After asks for, as seconds or as a date (RFC 9110, 10.2.3); 0 if it makes no sense."""
    text = retry_after or "0"
    try:
        wait = float(text) if text.isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(LONGEST_WAIT, max(0.0, wait))


def make_client() -> HttpClient:
    """The client as the environment describes it: FASTSMSING_URL, FASTSMSING_TOKEN and, in seconds, the times."""
    return HttpClient(*_address(), **_times_given())


def make_pushed_client() -> PushedClient:
    """The same with FASTSMSING_SECRET, which signs what is pushed, and perhaps FASTSMSING_CALLBACK, a URL."""
    secret, callback = os.environ.get("FASTSMSING_SECRET", ""), os.environ.get("FASTSMSING_CALLBACK", "")
    if not secret:
        raise ValueError("FASTSMSING_SECRET is not set")  # anybody could sign
    return PushedClient(*_address(), secret=secret.encode(), callback=callback, **_times_given())


def _address() -> tuple[str, str]:
    if not os.environ.get("FASTSMSING_URL"):
        raise ValueError("FASTSMSING_URL is not set")
    return os.environ["FASTSMSING_URL"], os.environ.get("FASTSMSING_TOKEN", "")


def _times_given() -> dict[str, Any]:
    times = ("connect_timeout", "read_timeout", "poll_interval")
    values = {name: os.environ.get(f"FASTSMSING_{name.upper()}") for name in times}
    return {name: float(value) for name, value in values.items() if value}

"""The REST interface, an application that the front serves: routes, JSON in and out, which error is which response.

How a POST goes through it: the front asks `route` what responds, and calls that: `_send` checks the message and defers
the response. At the end of the iteration of the loop, when all requests have been read, what waits is accepted as one
group, and each exchange gets its response.

The HTTP protocol itself is the front's business, everything about messages `smsproxy`'s.
"""
from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import pkgutil
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bulk_requests import BulkRequests
from fastsmsing import ReportReceiver
from http_exchange import Exchange, Front, Handler
from http_protocol import METHODS, HttpError, Request
from pushed_reports import PushedReports
from request_decoding import NAMES, decode, idempotency_key
from request_groups import Group
from response_counts import DURATIONS
from smsproxy import (
    ClosedError,
    Entry,
    Gauge,
    Histogram,
    IdempotencyError,
    MessageStatus,
    MetricSet,
    OverloadedError,
    RepositoryUnavailableError,
    SmsProxy,
    ValidationError,
    is_ours,
)

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

__all__ = ["RestApi"]

GUARDED = ("/sms", "/metrics")  # what begins so needs an API key, if there are any
HARMLESS = {"GET", "HEAD", "OPTIONS"}  # what a web page of anybody's may ask a browser to send
REFUSALS: tuple[tuple[type[Exception], int, int | None, str | None], ...] = (
    # error, status, seconds before another try, what is said in place of the error's own text
    (IdempotencyError, HTTPStatus.UNPROCESSABLE_ENTITY, None, None),
    (OverloadedError, HTTPStatus.SERVICE_UNAVAILABLE, 1, None),
    (RepositoryUnavailableError, HTTPStatus.SERVICE_UNAVAILABLE, 5, "the database is unavailable"),
    (ClosedError, HTTPStatus.SERVICE_UNAVAILABLE, 10, None),
)
# All that are sent.
CODES = (200, 202, 204, 400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 417, 422, 431, 500, 501, 503, 505)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
STATUS_BODIES = {status: json.dumps({"Status": status.value}).encode() + b"\n" for status in MessageStatus}
BODY, LARGE_BODY = 64 * 1024, 1024 * 1024  # bytes
CANCELLED = b'{"Status": "FAILED", "Reason": "cancelled"}\n'
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
FILES = {"/openapi.json": ("openapi.json", "application/json"), "/": ("page.html", "text/html; charset=utf-8")}


def data_file(name: str) -> bytes:
    """A file that lies beside this module, in a zip file, too."""
    return pkgutil.get_data(__name__, name) or b""


def page_headers(page: bytes) -> dict[str, str]:
    """The headers of the operators' page: nothing runs or loads but what is in it (CSP level 3, by hashes)."""
    hashes = {tag: base64.b64encode(hashlib.sha256(text).digest()).decode()
              for tag, text in re.findall(rb"<(script|style)>(.*?)</", page, re.DOTALL)}  # fmt: skip
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes.get(b'script', '')}';"
        f" style-src 'sha256-{hashes.get(b'style', '')}'; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return {"Content-Security-Policy": policy, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer"}  # fmt: skip


# Requests


def from_another_page(headers: Mapping[str, str]) -> bool:
    """Whether a browser sent the request for a web page of another origin: by the Origin header (RFC 6454), and by
    Fetch Metadata where the browser sends it. Other programs send neither."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        return True
    if origin is None:
        return False
    if origin == "null":
        return site != "same-origin"
    scheme, _, authority = origin.lower().partition("://")
    port = DEFAULT_PORTS.get(scheme, "")
    return not authority or authority.removesuffix(port) != headers.get("host", "").lower().removesuffix(port)


class HttpMetrics(MetricSet):
    """What is measured of HTTP and of this process."""

    def __init__(self, version: str, routes: Iterable[str] = ()) -> None:
        self.durations = Histogram("smsproxy_http_request_duration_seconds",
                                   "Time from a whole request to its response, by route.",
                                   DURATIONS, "route", tuple(routes))  # fmt: skip
        self.connections = Gauge("smsproxy_http_connections", "Connections that are open.")
        self.limit = Gauge("smsproxy_http_connections_limit", "With so many an idle one is closed for a new one.")
        self.cpu = Gauge("process_cpu_seconds_total", "Processor time that this process used.", "counter")
        self.start = Gauge("process_start_time_seconds", "When this process started, in seconds since 1970.")
        self.start.value = time.time() - time.process_time()
        self.memory = Gauge("process_resident_memory_bytes", "Memory that this process holds.")
        self.open_fds = Gauge("process_open_fds", "File descriptors that are open.")
        self.max_fds = Gauge("process_max_fds", "File descriptors that may be open.")
        self._routes = tuple(routes)
        self._build = f'version="{version}",python="{platform.python_version()}"'

    def measure(self, front: Front) -> None:
        """Sets the gauges; what the system does not tell has no value."""
        self.durations.load(front.counts.durations())
        self.connections.value, self.limit.value = front.open_connections, front.limits.connections
        self.cpu.value = time.process_time()
        self.max_fds.value = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else None
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.value = pages * os.sysconf("SC_PAGESIZE")
            self.open_fds.value = len(os.listdir("/proc/self/fd"))
        except OSError:  # not Linux
            self.memory.value = self.open_fds.value = None

    def counts(self, front: Front) -> Iterator[str]:
        """The lines of the responses, by route and code, and of the build."""
        yield "# HELP smsproxy_http_responses_total HTTP responses, by route and code."
        yield "# TYPE smsproxy_http_responses_total counter"
        none = {(route, code): 0 for route in self._routes for code in CODES}
        for (route, code), count in {**none, **front.counts.by_status()}.items():
            yield f'smsproxy_http_responses_total{{route="{route}",code="{code:d}"}} {count}'
        yield "# HELP smsproxy_build_info Which program this is."
        yield "# TYPE smsproxy_build_info gauge"
        yield f"smsproxy_build_info{{{self._build}}} 1"


# The application


@dataclass(frozen=True, slots=True)
class Route:
    """What the metrics call a path, what responds to each method there, and how large a body may be, in bytes."""

    name: str
    methods: Mapping[str, Handler]
    body: int = BODY


class RestApi:
    """Serves one `SmsProxy`; the front needs `workers` threads for it.

    With `api_keys`, key by name, /sms and /metrics need one of them. `receiver` gets what a provider pushes.
    """

    def __init__(
        self, proxy: SmsProxy, *, api_keys: Mapping[str, str] = {}, version: str = "",
        receiver: ReportReceiver | None = None,
    ) -> None:  # fmt: skip
        self.proxy = proxy
        self.files = {path: data_file(name) for path, (name, _) in FILES.items()}
        self._page_headers = page_headers(self.files["/"])
        self.set_api_keys(api_keys)
        blocking = proxy.blocking
        self._posts: Group[Entry, None] = Group(proxy.accept_all, self._accepted, blocking=blocking)
        self._statuses = Group(self._status_bodies, self._found, blocking=blocking)
        self._cancels = Group(self._cancel_all, self._cancelled, blocking=blocking)
        # One at a time, and its result for all who ask meanwhile: anybody may ask.
        self._healths = Group(lambda asks: [proxy.health()] * len(asks), self._healthy, blocking=blocking, lanes=1)
        self._figures = Group(self._measure, self._measured, blocking=blocking, lanes=1)
        self._figures_text, self._figures_made = b"", -1.0  # and in which iteration of the loop
        self._bulks = BulkRequests(proxy)
        reports = PushedReports(receiver) if receiver else None
        self._groups: tuple[Group[Any, Any], ...] = (
            self._posts, self._statuses, self._cancels, self._healths, self._figures,
            *([reports.group] if reports else []))  # fmt: skip
        # Threads that the front needs for what may block.
        self.workers = sum(group.lanes for group in self._groups) + self._bulks.lanes
        post: dict[str, Handler] = {"POST": self._send}
        self._message = Route("/sms/<id>", {**_get(self._status), "DELETE": self._cancel})
        self._nowhere = Route("other", {})
        self._routes = {
            "/sms": Route("/sms", post),
            "/sms/": Route("/sms", post),
            "/sms/bulk": Route("/sms/bulk", {"POST": self._bulks.handle}, LARGE_BODY),
            **({"/reports": Route("/reports", {"POST": reports.handle}, LARGE_BODY)} if reports else {}),
            "/metrics": Route("/metrics", _get(self._metrics)),
            "/healthz": Route("/healthz", _get(self._health)),
            "/livez": Route("/livez", _get(self._alive)),
            **{path: Route(path, _get(self._file)) for path in FILES},
            # Of the whole server: OPTIONS (RFC 9110, 9.3.7).
            "*": Route("other", {**_get(self._file), **post, "DELETE": self._cancel}),
        }
        names = {route.name for route in (self._message, *self._routes.values())}
        self._http_metrics = HttpMetrics(version, sorted(names))

    def set_api_keys(self, api_keys: Mapping[str, str]) -> None:
        """Replaces the keys, key by name, for the requests that come from now on."""
        self.api_keys = {name: key.encode() for name, key in api_keys.items()}

    # For the front

    def route(self, exchange: Exchange) -> Handler:
        """What responds to the path and the method; 401, 403, 404 and 405."""
        request = exchange.request
        path, method = request.path, request.method
        route = self._routes.get(path)
        if route is None:
            route = self._message if path.startswith("/sms/") and "/" not in path[5:] else self._nowhere
        exchange.route = route.name
        if self.api_keys and path.startswith(GUARDED):
            exchange.client = self._authorized(request)
        if method not in HARMLESS and from_another_page(request.headers):
            raise HttpError(HTTPStatus.FORBIDDEN, "another web page's browser sent this")
        respond = route.methods.get(method)
        if respond is not None:
            if request.length > route.body:
                text = f"the body exceeds {route.body} bytes"
                raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, close=True)
            return respond
        if method not in METHODS:
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, "unknown method")
        if route is self._nowhere or (path == "/sms/" and method in ("GET", "HEAD")):  # the message without an ID
            raise HttpError(HTTPStatus.NOT_FOUND, "there is nothing here")
        allow = {"Allow": ", ".join((*route.methods, "OPTIONS"))}
        if method == "OPTIONS":
            return lambda exchange: exchange.respond(HTTPStatus.OK, headers=allow)
        raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, f"{method} is not allowed here", allow)

    def refusal(self, error: BaseException) -> HttpError | None:
        """The response to an error of the domain."""
        if isinstance(error, ValidationError):
            return HttpError(HTTPStatus.BAD_REQUEST, f"{NAMES.get(error.field, error.field)} {error.problem}")
        for kind, status, wait, text in REFUSALS:
            if isinstance(error, kind):
                return HttpError(status, text or str(error), {"Retry-After": str(wait)} if wait else {})
        return None

    def shown(self, request: Request) -> str:
        """The path for the log: our own, or with an ID of ours. Anything else may be a phone number."""
        path = request.path
        if path in self._routes or (path.startswith("/sms/") and is_ours(path[5:])):
            return path
        return "/sms/***" if path.startswith("/sms/") else "/***"

    def _authorized(self, request: Request) -> str:
        """The name of the API key that the request has."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # All are compared, each in constant time, so that the time tells nothing about any of them.
        known = [name for name, each in self.api_keys.items() if hmac.compare_digest(given, each)]
        if scheme.lower() != "bearer" or not known:
            challenge = {"WWW-Authenticate": 'Bearer realm="smsproxy"'}  # RFC 6750, 3
            raise HttpError(HTTPStatus.UNAUTHORIZED, "a valid API key is needed", challenge)
        return known[0]

    # Handlers, and what responds to those that are deferred

    def _send(self, exchange: Exchange) -> None:
        """Accepts a message, with all others of this iteration."""
        request = exchange.request
        message = decode(request.body)
        self._posts.add(exchange, self.proxy.entry(message, idempotency_key(request.headers)))

    def _accepted(self, exchange: Exchange, entry: Entry, result: None) -> None:
        message_id = entry.message.message_id  # a UUID, so nothing in it needs escaping
        exchange.respond(202, f'{{"ID": "{message_id}"}}\n'.encode(), {"Location": f"/sms/{message_id}"})

    def _status(self, exchange: Exchange) -> None:
        """Tells the status of a message."""
        message_id = unquote(exchange.request.path[5:])
        if self.proxy.blocking:
            self._statuses.add(exchange, message_id)
        else:  # in memory: at once, without the way through a group
            exchange.respond(200, self._status_body(message_id))

    def _status_body(self, message_id: str) -> bytes:
        """A message's status, and why the service itself gave it up, if it did, as JSON. May block."""
        status = self.proxy.get_status(message_id)
        reason = self.proxy.get_reason(message_id) if status is MessageStatus.FAILED else None
        return STATUS_BODIES[status] if reason is None else _json({"Status": status.value, "Reason": reason.value})

    def _status_bodies(self, ids: Sequence[str]) -> list[bytes]:
        return [self._status_body(message_id) for message_id in ids]

    def _found(self, exchange: Exchange, message_id: str, body: bytes) -> None:
        exchange.respond(200, body)

    def _cancel(self, exchange: Exchange) -> None:
        """Cancels a message that waits."""
        self._cancels.add(exchange, unquote(exchange.request.path[5:]))

    def _cancel_all(self, ids: Sequence[str]) -> list[MessageStatus | None]:
        """For each: None when it is cancelled, now or before, or else its status. May block."""
        return [None if self.proxy.cancel(each) else self.proxy.get_status(each) for each in ids]

    def _cancelled(self, exchange: Exchange, message_id: str, status: MessageStatus | None) -> None:
        if status is None:
            exchange.respond(200, CANCELLED)
        elif status is MessageStatus.NOT_FOUND:
            raise HttpError(HTTPStatus.NOT_FOUND, "there is no such message")
        else:
            doc = {"Error": "it is too late to cancel this message", "Status": status.value}
            exchange.respond(HTTPStatus.CONFLICT, _json(doc))

    def _health(self, exchange: Exchange) -> None:
        """Tells whether this instance should get traffic."""
        self._healths.add(exchange, None)

    def _healthy(self, exchange: Exchange, asked: None, result: tuple[list[str], list[str]]) -> None:
        reasons, warnings = result
        if exchange.front.stopping:
            reasons = [*reasons, "shutting down"]
        doc: dict[str, Any] = {"Status": "UNAVAILABLE", "Reasons": reasons} if reasons else {"Status": "OK"}
        if warnings:
            doc["Warnings"] = warnings
        exchange.respond(HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK, _json(doc))

    def _alive(self, exchange: Exchange) -> None:
        """Tells whether this process does its work: not whether the database or FastSMSing do theirs."""
        dead = self.proxy.dead_threads()
        doc = {"Status": "UNAVAILABLE", "Reasons": [f"{name} is dead" for name in dead]} if dead else {"Status": "OK"}
        exchange.respond(HTTPStatus.SERVICE_UNAVAILABLE if dead else HTTPStatus.OK, _json(doc))

    def _metrics(self, exchange: Exchange) -> None:
        """Tells the figures."""
        self._figures.add(exchange, None)

    def _measure(self, asked: Sequence[None]) -> Sequence[None]:
        self.proxy.measure()
        return asked

    def _measured(self, exchange: Exchange, asked: None, result: None) -> None:
        front = exchange.front
        if front.now != self._figures_made:  # once an iteration, since one client may ask for them hundreds of times
            self._http_metrics.measure(front)
            text = [*self.proxy.metrics.text(), *self._http_metrics.text(), *self._http_metrics.counts(front), ""]
            self._figures_text, self._figures_made = "\n".join(text).encode(), front.now
        exchange.respond(HTTPStatus.OK, self._figures_text, content_type=PROMETHEUS)

    def _file(self, exchange: Exchange) -> None:
        """Gives the operators' page or the description of the interface."""
        path = exchange.request.path
        exchange.respond(HTTPStatus.OK, self.files[path], self._page_headers if path == "/" else {}, FILES[path][1])


def _get(respond: Handler) -> dict[str, Handler]:
    return {"GET": respond, "HEAD": respond}  # RFC 9110, 9.3.2: the front leaves the body out


def _json(doc: Mapping[str, Any]) -> bytes:
    return json.dumps(doc).encode() + b"\n"

"""The REST interface: routes, JSON in and out, and which error becomes which response.

The HTTP protocol itself is `http_front`'s business, everything about messages `smsproxy`'s.
"""
from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import pkgutil
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from http_front import FrontHandler, FrontServer, HttpError, Limits
from smsproxy import (
    ClosedError, Gauge, IdempotencyError, MessageStatus, MetricSet, OverloadedError,
    RepositoryUnavailableError, SendMessage, SmsProxy, ValidationError,
)  # fmt: skip

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

__all__ = ["SmsHandler", "SmsServer"]

log = logging.getLogger("smsproxy.rest")

GUARDED = ("/sms", "/metrics")  # what begins so needs an API key, if there are any
FIELDS = {"phone_number": "PhoneNumber", "message": "Content"}  # the domain's names and ours
REFUSALS: dict[type[BaseException], tuple[int, int | None]] = {  # error → status, seconds before another try
    IdempotencyError: (HTTPStatus.UNPROCESSABLE_ENTITY, None),
    OverloadedError: (HTTPStatus.SERVICE_UNAVAILABLE, 1),
    RepositoryUnavailableError: (HTTPStatus.SERVICE_UNAVAILABLE, 5),
    ClosedError: (HTTPStatus.SERVICE_UNAVAILABLE, 10),
}
CODES = (200, 202, 400, 401, 404, 405, 408, 411, 413, 414, 417, 422, 431, 500, 501, 503, 505)  # all that are sent
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
FORM = re.compile(r"[A-Za-z_]+=")
LANES = 4  # groups that a blocking repository works on at a time; its waits overlap then
STATUS_BODIES = {status: json.dumps({"Status": status.value}).encode() + b"\n" for status in MessageStatus}
FILES = {"/openapi.json": ("openapi.json", "application/json"), "/": ("page.html", "text/html; charset=utf-8")}


class HttpMetrics(MetricSet):
    """What is measured of connections and of this process."""

    def __init__(self, limit: int) -> None:
        self.connections = Gauge("smsproxy_http_connections", "Connections that are open.")
        self.limit = Gauge("smsproxy_http_connections_limit", "With so many connections others wait in the backlog.")
        self.limit.value = limit
        self.cpu = Gauge("process_cpu_seconds_total", "Processor time that this process used.", "counter")
        self.start = Gauge("process_start_time_seconds", "When this process started, in seconds since 1970.")
        self.start.value = time.time() - time.process_time()
        self.memory = Gauge("process_resident_memory_bytes", "Memory that this process holds.")
        self.open_fds = Gauge("process_open_fds", "File descriptors that are open.")
        self.max_fds = Gauge("process_max_fds", "File descriptors that may be open.")

    def measure(self, connections: int) -> None:
        """Sets the gauges; what the system does not tell has no value."""
        self.connections.value, self.cpu.value = connections, time.process_time()
        self.max_fds.value = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else None
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.value = pages * os.sysconf("SC_PAGESIZE")
            self.open_fds.value = len(os.listdir("/proc/self/fd"))
        except OSError:  # not Linux
            self.memory.value = self.open_fds.value = None


def data_file(name: str) -> bytes:
    """A file that comes with the service, beside this module, in a zip file, too."""
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


class Group:
    """What the requests of one iteration of the loop ask for, asked for together at its end. In the loop's thread.

    If that may block it is done in a worker, `lanes` groups at a time; whatever comes meanwhile shares the next one.
    """

    def __init__(
        self, server: SmsServer, ask: Callable[[Sequence[Any]], Sequence[Any]],
        respond: Callable[[SmsHandler, Any], None], lanes: int = LANES,
    ) -> None:  # fmt: skip
        self._server, self._ask_all, self._respond, self._lanes = server, ask, respond, lanes
        self._waiting: list[tuple[SmsHandler, Any]] = []
        self._under_way = 0

    def add(self, handler: SmsHandler, item: Any) -> None:
        """Suspends the handler until `respond` gets the result for the item."""
        handler.suspend()
        if not self._waiting:
            self._server.asking.append(self)
        self._waiting.append((handler, item))

    def ask(self) -> None:
        """Asks for what waits, as one group."""
        if not self._waiting or self._under_way >= self._lanes:
            return
        waiting, self._waiting = self._waiting, []
        items = [item for _, item in waiting]
        if not self._server.proxy.blocking:
            self._resume(waiting, self._results(items))
            return
        self._under_way += 1
        future = self._server.submit(self._results, items)
        future.add_done_callback(lambda done: self._server.call_soon(self._done, waiting, done.result()))

    def _results(self, items: Sequence[Any]) -> Sequence[Any]:
        try:
            return self._ask_all(items)
        except (Exception, SystemExit) as error:  # the boundary: each of them gets a response
            return [error] * len(items)

    def _done(self, waiting: Sequence[tuple[SmsHandler, Any]], results: Sequence[Any]) -> None:
        self._under_way -= 1
        self.ask()  # first of all, so that the disk does not wait for the responses
        self._resume(waiting, results)

    def _resume(self, waiting: Sequence[tuple[SmsHandler, Any]], results: Sequence[Any]) -> None:
        for (handler, _), result in zip(waiting, results):
            if isinstance(result, BaseException):
                self._server.guard(handler.resume, handler.fail, result)
            else:
                self._server.guard(handler.resume, self._respond, handler, result)


class SmsServer(FrontServer):
    """Serves one `SmsProxy` over HTTP. With `api_keys`, key by name, /sms and /metrics need one of them."""

    def __init__(
        self, address: tuple[str, int], proxy: SmsProxy, *, limits: Limits = Limits(),
        api_keys: Mapping[str, str] = {}, version: str = "", **options: Any,
    ) -> None:  # fmt: skip
        self.proxy = proxy
        self.version = version
        self.files = {path: data_file(name) for path, (name, _) in FILES.items()}
        self.page_headers = page_headers(self.files["/"])
        self.set_api_keys(api_keys)
        self.posts = Group(self, proxy.accept_all, SmsHandler.accepted)
        self.statuses = Group(self, self._status_bodies, SmsHandler.found)
        # One at a time, and its result for all who ask meanwhile: anybody may ask.
        self.healths = Group(self, lambda items: [proxy.health()] * len(items), SmsHandler.healthy, lanes=1)
        self.metrics = Group(self, lambda items: [proxy.measure()] * len(items), SmsHandler.measured, lanes=1)
        self.own_metrics = HttpMetrics(limits.connections)
        self.asking: list[Group] = []  # the groups that have something to ask for in this iteration
        super().__init__(address, SmsHandler, limits, workers=2 * LANES + 2 if proxy.blocking else 0, **options)

    def set_api_keys(self, api_keys: Mapping[str, str]) -> None:
        """Replaces the keys, key by name, for the requests that come from now on."""
        self.api_keys = {name: key.encode() for name, key in api_keys.items()}

    def end_of_iteration(self) -> None:
        """Asks for what the requests of this iteration want of the domain, as groups."""
        while self.asking:
            self.asking.pop().ask()

    def status_body(self, message_id: str) -> bytes:
        """A message's status, and why the service itself gave it up, if it did, as JSON. May block."""
        status = self.proxy.get_status(message_id)
        reason = self.proxy.get_reason(message_id) if status is MessageStatus.FAILED else None
        return STATUS_BODIES[status] if reason is None else _json({"Status": status.value, "Reason": reason.value})

    def _status_bodies(self, ids: Iterable[str]) -> list[bytes]:
        return [self.status_body(message_id) for message_id in ids]


class SmsHandler(FrontHandler):
    """One client's requests."""

    server: SmsServer

    def route(self) -> Callable[[Any], None]:
        """What the path and the method ask for; 401, 404 and 405."""
        request = self.request
        path = request.path
        route = ROUTES.get(path)
        if route is None:
            route = MESSAGE if path.startswith("/sms/") and "/" not in path[5:] else NOWHERE
        request.route = route.name
        if self.server.api_keys and path.startswith(GUARDED):
            self._authorize()
        respond = route.methods.get(request.method)
        if respond is not None:
            return respond
        if route is NOWHERE or (path == "/sms/" and request.method in ("GET", "HEAD")):  # the message without an ID
            raise HttpError(HTTPStatus.NOT_FOUND, "there is nothing here")
        allow = {"Allow": ", ".join((*route.methods, "OPTIONS"))}
        if request.method == "OPTIONS":
            return lambda handler: handler.respond(HTTPStatus.OK, headers=allow)
        raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.method} is not allowed here", allow)

    def translate(self, error: BaseException) -> HttpError | None:
        """The response to an error of the domain."""
        if isinstance(error, ValidationError):
            return HttpError(HTTPStatus.BAD_REQUEST, f"{FIELDS.get(error.field, error.field)} {error.problem}")
        if type(error) in REFUSALS:
            status, wait = REFUSALS[type(error)]
            return HttpError(status, str(error), {"Retry-After": str(wait)} if wait else {})
        return super().translate(error)

    def send(self) -> None:
        """Accepts a message, with all others of this iteration."""
        message, key = decode(self.request.body), self.request.headers.get("idempotency-key")
        if key is not None and IDEMPOTENCY_KEY.fullmatch(key) is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "Idempotency-Key must be 1 to 255 visible ASCII characters")
        entry = self.server.proxy.entry(message, key)
        self._message_id = entry.message.message_id
        self.server.posts.add(self, entry)

    def status(self) -> None:
        """Tells the status of a message."""
        server, message_id = self.server, unquote(self.request.path[5:])
        if server.proxy.blocking:
            server.statuses.add(self, message_id)
        else:  # in memory: at once, without the way through a group
            self.found(server.status_body(message_id))

    def health(self) -> None:
        """Tells whether this instance should get traffic."""
        self.server.healths.add(self, None)

    def metrics(self) -> None:
        """Tells the figures."""
        self.server.metrics.add(self, None)

    def file(self) -> None:
        """Gives the operators' page or the description of the interface."""
        path, server = self.request.path, self.server
        headers = server.page_headers if path == "/" else {}
        self.respond(HTTPStatus.OK, server.files[path], headers, FILES[path][1])

    def accepted(self, refusal: None) -> None:
        """Responds with the ID of the message."""
        message_id = self._message_id  # a UUID, so nothing in it needs escaping
        self.respond(202, f'{{"ID": "{message_id}"}}\n'.encode(), {"Location": f"/sms/{message_id}"})

    def found(self, body: bytes) -> None:
        """Responds with a status."""
        self.respond(200, body)

    def healthy(self, result: tuple[list[str], list[str]]) -> None:
        """Responds with what is wrong, if anything is."""
        reasons, warnings = result
        if self.server.stopping:
            reasons = [*reasons, "shutting down"]
        doc: dict[str, Any] = {"Status": "UNAVAILABLE", "Reasons": reasons} if reasons else {"Status": "OK"}
        if warnings:
            doc["Warnings"] = warnings
        self.respond(HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK, _json(doc))

    def measured(self, nothing: None) -> None:
        """Responds with the figures for Prometheus."""
        text = "\n".join((*_exposition(self.server), ""))
        self.respond(HTTPStatus.OK, text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def _authorize(self) -> None:
        scheme, _, key = self.request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # All are compared, each in constant time, so that the time tells nothing about any of them.
        known = [name for name, each in self.server.api_keys.items() if hmac.compare_digest(given, each)]
        if scheme.lower() != "bearer" or not known:
            challenge = {"WWW-Authenticate": 'Bearer realm="smsproxy"'}  # RFC 6750, 3
            raise HttpError(HTTPStatus.UNAUTHORIZED, "a valid API key is needed", challenge)
        self.request.client = known[0]


def _get(respond: Callable[[SmsHandler], None]) -> dict[str, Callable[[SmsHandler], None]]:
    return {"GET": respond, "HEAD": respond}  # RFC 9110, 9.3.2: the front leaves the body out


class Route(NamedTuple):
    """What the metrics call a path, and what responds to each method there."""

    name: str
    methods: Mapping[str, Callable[[SmsHandler], None]]


MESSAGE = Route("/sms/<id>", _get(SmsHandler.status))
NOWHERE = Route("other", {})
_POST = Route("/sms", {"POST": SmsHandler.send})
ROUTES = {
    "/sms": _POST,
    "/sms/": _POST,
    "/metrics": Route("/metrics", _get(SmsHandler.metrics)),
    "/healthz": Route("/healthz", _get(SmsHandler.health)),
    **{path: Route(path, _get(SmsHandler.file)) for path in FILES},
    "*": Route("other", {**_get(SmsHandler.file), **_POST.methods}),  # of the whole server: OPTIONS (RFC 9110, 9.3.7)
}


def _json(doc: Mapping[str, Any]) -> bytes:
    return json.dumps(doc).encode() + b"\n"


# Requests


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object by its names without regard to case and underscores; one given twice is refused."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        key = name.replace("_", "").lower()
        if key in found:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"{name[:50]} is given twice")
        found[key] = value
    return found


def _no_number(name: str) -> None:
    raise ValueError(name)


# Integers of any length as floats: the digits of a giant one would cost quadratic time, and no field is a number.
_decode = json.JSONDecoder(object_pairs_hook=_fields, parse_int=float, parse_constant=_no_number).raw_decode


def decode(body: bytes) -> SendMessage:
    """The message of a request, its values as they are: the domain judges them. Raises `HttpError`."""
    problem = "the body must be a JSON object in UTF-8"
    try:
        text = body.decode()
        doc, end = _decode(text, len(text) - len(text.lstrip(" \t\n\r")))  # RFC 8259, 2
        if behind := text[end:].lstrip(" \t\n\r"):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(behind))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, NaN, nested too deeply
        if not body.strip():
            problem = "the body is empty; it must be a JSON object"
        elif FORM.match(body.decode("latin-1")):
            problem = "the body is form-encoded; it must be a JSON object"
        elif isinstance(error, json.JSONDecodeError):
            problem += f": {error.msg} at line {error.lineno}, column {error.colno}"
        raise HttpError(HTTPStatus.BAD_REQUEST, problem) from None
    if not isinstance(doc, dict):
        raise HttpError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
    try:
        return SendMessage(doc["phonenumber"], doc["content"])
    except KeyError:
        missing = next(name for name in FIELDS.values() if name.lower() not in doc)
        raise HttpError(HTTPStatus.BAD_REQUEST, f"{missing} is missing") from None


# Metrics


def _exposition(server: SmsServer) -> Iterator[str]:
    """The lines of Prometheus text format 0.0.4."""
    server.own_metrics.measure(server.open_connections)
    yield from server.proxy.metrics.text()
    yield from server.own_metrics.text()
    yield from ("# HELP smsproxy_http_responses_total HTTP responses, by route and code.",
                "# TYPE smsproxy_http_responses_total counter")  # fmt: skip
    names = {route.name for route in (MESSAGE, *ROUTES.values())}
    responses = {**{(name, code): 0 for name in sorted(names) for code in CODES}, **server.responses}
    for (name, code), count in responses.items():
        yield f'smsproxy_http_responses_total{{route="{name}",code="{code:d}"}} {count}'
    labels = f'version="{server.version}",python="{platform.python_version()}"'
    yield from ("# HELP smsproxy_build_info Which program this is.", "# TYPE smsproxy_build_info gauge",
                f"smsproxy_build_info{{{labels}}} 1")  # fmt: skip

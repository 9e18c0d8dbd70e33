"""The REST interface: routes, JSON in and out, and which error becomes which answer.

The HTTP protocol itself is `http_front`'s business, everything about messages `smsproxy`'s.
"""
from __future__ import annotations

import hmac
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Union
from urllib.parse import unquote

from http_front import FrontHandler, FrontServer, HttpError, Limits
from smsproxy import (
    ClosedError, IdempotencyError, MessageStatus, Metrics, OverloadedError, RepositoryUnavailableError, SendMessage,
    SmsProxy, ValidationError, validate,
)  # fmt: skip

__all__ = ["SmsHandler", "SmsServer"]

ROUTES = {
    "/sms": ("POST",),
    "/sms/": ("POST",),
    "/sms/<id>": ("GET", "HEAD"),
    "/metrics": ("GET", "HEAD"),
    "/healthz": ("GET", "HEAD"),
    "/openapi.json": ("GET", "HEAD"),
    "*": ("GET", "HEAD", "POST"),
}
FIELDS = {"phone_number": "PhoneNumber", "message": "Content"}  # the domain's names and ours
REFUSALS: dict[type[BaseException], tuple[int, int | None]] = {  # error of the domain → status, seconds to wait before another try
    IdempotencyError: (HTTPStatus.UNPROCESSABLE_ENTITY, None),
    OverloadedError: (HTTPStatus.SERVICE_UNAVAILABLE, 1),
    RepositoryUnavailableError: (HTTPStatus.SERVICE_UNAVAILABLE, 5),
    ClosedError: (HTTPStatus.SERVICE_UNAVAILABLE, 10),
}
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
_encode = json.encoder.encode_basestring_ascii  # what `json.dumps` does with a string, without asking what it is
STATUS_BODIES = {status: json.dumps({"Status": status.value}).encode() for status in MessageStatus}
OPENAPI = Path(__file__).with_name("openapi.json")
METRICS = (  # name, type, label, help
    ("smsproxy_messages_accepted_total", "counter", "", "Messages accepted and queued."),
    ("smsproxy_messages_handed_over_total", "counter", "", "Messages that FastSMSing took."),
    ("smsproxy_messages_given_up_total", "counter", "reason", "Messages given up, by reason."),
    ("smsproxy_messages_final_total", "counter", "status", "Messages that reached a final status."),
    ("smsproxy_batches_total", "counter", "result", "Batches handed over or given up."),
    ("smsproxy_batch_messages", "histogram", "", "Messages in a batch."),
    ("smsproxy_provider_requests_total", "counter", "result", "Requests to FastSMSing, every attempt."),
    ("smsproxy_provider_request_duration_seconds", "histogram", "", "Time that FastSMSing took to answer."),
    ("smsproxy_provider_requests_in_flight", "gauge", "", "Requests to FastSMSing under way."),
    ("smsproxy_requests_saved_total", "counter", "", "Messages handed over less the requests paid for them."),
    ("smsproxy_pending_messages", "gauge", "", "Messages accepted and not yet handed over."),
    ("smsproxy_oldest_pending_message_age_seconds", "gauge", "", "Age of the oldest pending message, 0 without one."),
    ("smsproxy_status_updates_total", "counter", "result", "Delivery reports, by what became of them."),
    ("smsproxy_http_responses_total", "counter", "code", "HTTP answers, by status code."),
)


class SmsServer(FrontServer):
    """Serves one `SmsProxy` over HTTP. With `api_keys`, /sms and /metrics need one of them."""

    def __init__(
        self, address: tuple[str, int], proxy: SmsProxy, *, limits: Limits = Limits(), api_keys: Iterable[str] = ()
    ) -> None:
        self.proxy = proxy
        self._handlers: list[SmsHandler] = []  # suspended until their message is accepted
        self._posts: list[tuple[Any, Any, str | None]] = []  # their numbers, texts and idempotency keys
        self._saving = False  # a durable save is under way
        self.api_keys = tuple(key.encode() for key in api_keys)
        super().__init__(address, SmsHandler, limits)

    def accept(self, handler: SmsHandler, number: Any, text: Any, key: str | None) -> None:
        """Suspends the handler until its message is accepted, at the end of the turn, with all others of the turn."""
        handler.suspend()
        self._handlers.append(handler)
        self._posts.append((number, text, key))

    def end_turn(self) -> None:
        """Accepts what has come, as one group. In durable mode that is one commit at a time; whatever comes
        during one shares the next."""
        while self._posts and not self._saving:
            handlers, posts = self._handlers, self._posts
            self._handlers, self._posts = [], []
            if not self.proxy.durable:
                self._answer(handlers, self._send_all(posts))
                continue
            try:
                saved = self.submit(self._send_all, posts)
            except RuntimeError as error:  # the system has no thread for us
                self._answer(handlers, [error] * len(posts))
            else:
                self._saving = True
                saved.add_done_callback(lambda done: self.call_soon(self._saved, handlers, done.result()))

    def _send_all(self, posts: Sequence[tuple[Any, Any, str | None]]) -> Sequence[_Result]:
        try:
            return self.proxy.send_all(posts)
        except (Exception, SystemExit) as error:  # the boundary: each of them gets an answer
            return [error] * len(posts)

    def _saved(self, handlers: Sequence[SmsHandler], results: Sequence[_Result]) -> None:
        self._saving = False
        self.end_turn()  # first of all, so that the disk does not wait for the answers
        self._answer(handlers, results)

    def _answer(self, handlers: Sequence[SmsHandler], results: Sequence[_Result]) -> None:
        for handler, result in zip(handlers, results):
            self.guard(handler.resume, handler.accepted, result)


class SmsHandler(FrontHandler):
    """One client's requests."""

    server: SmsServer

    def check(self) -> None:
        """401, 404 and 405: what the method, the path and the key tell."""
        path = self.path
        if self.server.api_keys and path.startswith(("/sms", "/metrics")):
            self._authorize()
        methods = ROUTES.get(path)
        if methods is None and path.startswith("/sms/") and "/" not in path[5:]:
            methods = ROUTES["/sms/<id>"]
        if methods is None or (path == "/sms/" and self.command in ("GET", "HEAD")):
            raise HttpError(HTTPStatus.NOT_FOUND, "there is nothing here")
        if self.command not in methods and self.command != "OPTIONS":
            allow = {"Allow": ", ".join((*methods, "OPTIONS"))}
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not allowed here", allow)
        self._methods = methods

    def translate(self, error: BaseException) -> HttpError | None:
        """The answer to an error of the domain."""
        if isinstance(error, ValidationError):
            return HttpError(HTTPStatus.BAD_REQUEST, f"{FIELDS.get(error.field, error.field)} {error.problem}")
        if type(error) in REFUSALS:
            status, wait = REFUSALS[type(error)]
            return HttpError(status, str(error), {"Retry-After": str(wait)} if wait else {})
        return super().translate(error)

    def do_OPTIONS(self) -> None:
        """Says what is allowed."""
        self.answer(HTTPStatus.OK, headers={"Allow": ", ".join((*self._methods, "OPTIONS"))})

    def do_POST(self) -> None:
        """Accepts a message."""
        (number, text), key, proxy = _message(self.body), self.headers.get("idempotency-key"), self.server.proxy
        if key is not None and IDEMPOTENCY_KEY.fullmatch(key) is None:
            raise HttpError(HTTPStatus.BAD_REQUEST, "Idempotency-Key must be 1 to 255 visible ASCII characters")
        if proxy.slow and not proxy.durable:  # one by one, so that a slow one holds up nobody else
            saved = self.server.submit(proxy.send, SendMessage(number, text), key)
            self.defer(saved, lambda result: self.accepted(result.id))
        else:
            if proxy.durable:
                validate(number, text)  # or a 400 would wait for the disk
            self.server.accept(self, number, text, key)

    def do_GET(self) -> None:
        """Tells a status, or one of the operator's pages."""
        if self.path.startswith("/sms/"):
            message_id = unquote(self.path[5:])
            if self.server.proxy.slow:
                self.defer(self.server.submit(self.server.proxy.get_status, message_id), self._status)
            else:
                self._status(self.server.proxy.get_status(message_id))
        elif self.path == "/healthz":
            self.defer(self.server.submit(self.server.proxy.health), self._health)
        elif self.path == "/metrics":
            text = _exposition(self.server.proxy, self.server.answers)
            self.answer(HTTPStatus.OK, text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")
        else:
            self.answer(HTTPStatus.OK, OPENAPI.read_bytes())

    do_HEAD = do_GET  # RFC 9110, 9.3.2: the front leaves the body out

    def accepted(self, result: _Result) -> None:
        """Answers with the ID, or why there is none."""
        if isinstance(result, BaseException):
            self.fail(result)
        else:
            self.answer(202, f'{{"ID": {_encode(result)}}}'.encode(), {"Location": f"/sms/{result}"})

    def _status(self, status: MessageStatus) -> None:
        self.answer(200, STATUS_BODIES[status])

    def _health(self, reasons: list[str]) -> None:
        if self.server.closing and "shutting down" not in reasons:
            reasons.append("shutting down")
        doc: dict[str, Any] = {"Status": "UNAVAILABLE", "Reasons": reasons} if reasons else {"Status": "OK"}
        self.answer(HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK, json.dumps(doc).encode())

    def _authorize(self) -> None:
        scheme, _, key = self.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # All are compared, each in constant time, so that the time tells nothing about any of them.
        known = sum([hmac.compare_digest(given, key) for key in self.server.api_keys])
        if scheme.lower() != "bearer" or not known:
            challenge = {"WWW-Authenticate": 'Bearer realm="smsproxy"'}  # RFC 6750, 3
            raise HttpError(HTTPStatus.UNAUTHORIZED, "a valid API key is needed", challenge)


_Result = Union[str, BaseException]  # the ID, or why there is none


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


def _message(body: bytes) -> tuple[Any, Any]:
    """The number and the text of a request; the domain judges them."""
    try:
        text = body.decode().strip(" \t\n\r")  # RFC 8259, 2
        doc, end = _decode(text)
        if end < len(text):
            raise ValueError("more than one document")
    except (ValueError, RecursionError):  # not UTF-8, not JSON, NaN, nested too deeply
        raise HttpError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object in UTF-8") from None
    if not isinstance(doc, dict):
        raise HttpError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
    try:
        return doc["phonenumber"], doc["content"]
    except KeyError:
        missing = next(name for name in FIELDS.values() if name.lower() not in doc)
        raise HttpError(HTTPStatus.BAD_REQUEST, f"{missing} is missing") from None


def _exposition(proxy: SmsProxy, answers: Mapping[int, int]) -> str:
    """Prometheus text format 0.0.4."""
    values: dict[tuple[str, str | float], float] = {(name, ""): value for name, value in proxy.gauges().items()}
    values.update(proxy.metrics.counts())
    values.update({("smsproxy_http_responses_total", str(int(code))): count for code, count in answers.items()})
    lines = []
    for name, kind, label, text in METRICS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        if kind == "histogram":
            total: float = 0
            for bound in Metrics.BOUNDS[name]:
                total += values.get((name, bound), 0)
                lines.append(f'{name}_bucket{{le="{bound if bound < math.inf else "+Inf"}"}} {total}')
            lines += [f"{name}_sum {values.get((f'{name}_sum', ''), 0)}", f"{name}_count {total}"]
        elif label:
            found = sorted((str(key), value) for (of, key), value in values.items() if of == name)
            lines += [f'{name}{{{label}="{key}"}} {value}' for key, value in found]
        else:
            lines.append(f"{name} {values.get((name, ''), 0)}")
    return "\n".join(lines) + "\n"

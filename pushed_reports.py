"""POST /reports: what a provider pushes goes to the client's `receive`, which may block: in workers of its own."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastsmsing import ReportReceiver
from http_exchange import Exchange
from http_protocol import HttpError
from request_groups import Group
from smsproxy import Incident

__all__ = ["PushedReports"]

log = logging.getLogger("smsproxy.http")

Report = tuple[str, Mapping[str, str], bytes]  # query, headers and body
WAITING = 200  # requests that wait for a worker; each may be as large as a small body
REFUSALS: tuple[tuple[type[Exception], int, str], ...] = (
    (ValueError, HTTPStatus.BAD_REQUEST, "the client cannot read this report"),
    (PermissionError, HTTPStatus.UNAUTHORIZED, "the client does not trust this report"),
)


class PushedReports:
    """Serves the requests in order of arrival, some at a time. What `receive` raises decides the response; nothing of
    it but its type is shown or logged, since anything else may be a phone number."""

    def __init__(self, receiver: ReportReceiver) -> None:
        self._receiver = receiver
        self._incident = Incident(log, "the client's receive raises")
        self.group: Group[Report, HttpError | None] = Group(self._receive, self._received, blocking=True, most=1)

    def handle(self, exchange: Exchange) -> None:
        """Hands a report to the client."""
        if len(self.group.waiting) >= WAITING:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "too many reports at a time", {"Retry-After": "5"})
        request = exchange.request
        self.group.add(exchange, (request.query[1:], dict(request.headers), request.body))

    def _receive(self, reports: Sequence[Report]) -> list[HttpError | None]:
        return [self._refusal(report) for report in reports]

    def _refusal(self, report: Report) -> HttpError | None:
        """In a worker: the response to a report that the client does not take."""
        try:
            self._receiver.receive(*report)
        except BaseException as error:  # somebody else's code
            self._incident.failed(type(error).__name__)
            for kind, status, text in REFUSALS:
                if isinstance(error, kind):
                    return HttpError(status, text)
            return HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
        self._incident.ended()
        return None

    def _received(self, exchange: Exchange, report: Report, refusal: HttpError | None) -> None:
        exchange.respond(HTTPStatus.NO_CONTENT)

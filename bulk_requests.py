"""POST /sms/bulk: a list of messages, accepted as a whole or not at all.

A list of a thousand takes some ten milliseconds to decode, to check and to make entries of. That is done in the
loop's thread, in slices, one an iteration, so that other requests are served in between. A worker would hold them up
for longer, because who waits for the interpreter's lock waits for 5 ms (`sys.getswitchinterval`). One list at a time is
decoded, and only when the repository is ready for it, so what waits are bodies, of which there are only so many. A
list whose client goes away before it is handed to the repository is not accepted: nobody would get to know the IDs.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from http_exchange import Exchange, Front
from http_protocol import HttpError
from request_decoding import NAMES, decode_list, idempotency_key, message_of
from request_groups import Group
from smsproxy import Entry, SendMessage, SmsProxy, ValidationError

__all__ = ["BulkRequests"]

WAITING = 64  # lists that wait for their turn; large ones share the memory for large bodies, too
LANES = 2  # lists that a blocking repository stores at a time; single messages go in between
ERRORS = 100  # that a response names
SLICE = 50  # messages that are checked at a time, which takes a fraction of a millisecond
COMPLETE: Mapping[str, Any] = {"phone_number": "0", "message": "-"}  # a message to check defaults with


class BulkRequests:
    """Serves the lists in order of arrival. In the loop's thread."""

    def __init__(self, proxy: SmsProxy) -> None:
        self._proxy = proxy
        self._waiting: dict[Exchange, bytes] = {}  # with their bodies, in order of arrival
        self._under_way: Exchange | None = None  # what is being decoded
        self._steps: Iterator[None] = iter(())  # which that takes
        self._group: Group[list[Entry], None] = Group(
            self._accept, self._accepted, blocking=proxy.blocking, lanes=LANES, most=1, freed=self._begin)  # fmt: skip
        self.lanes = self._group.lanes

    def handle(self, exchange: Exchange) -> None:
        """Accepts a list, or refuses it."""
        if len(self._waiting) >= WAITING:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "too many lists at a time", {"Retry-After": "1"})
        exchange.defer(self)
        self._waiting[exchange] = exchange.request.body
        exchange.front.at_end(self._begin)

    def withdraw(self, exchange: Exchange) -> bool:
        """See `Holder`."""
        self._waiting.pop(exchange, None)
        if exchange is self._under_way:
            self._steps = iter(())  # so that the next step is its last
        return True

    def _begin(self, front: Front) -> None:
        """Begins with the next list, if the last one is decoded and the repository is ready for it."""
        while self._waiting and self._under_way is None and not self._group.busy:
            self._under_way = exchange = next(iter(self._waiting))
            self._steps = self._decode(exchange, self._waiting.pop(exchange))
            front.call_soon(self._step, front)

    def _step(self, front: Front) -> None:
        exchange = self._under_way
        if exchange is not None:
            self._under_way = None
            exchange.finish(self._advance)
            if self._under_way is not None:
                front.call_soon(self._step, front)
            else:
                front.at_end(self._begin)

    def _advance(self, exchange: Exchange) -> None:
        for _ in self._steps:
            self._under_way = exchange  # there is more to do
            break

    def _decode(self, exchange: Exchange, body: bytes) -> Iterator[None]:
        """Each step is short. Raises what is wrong."""
        key = idempotency_key(exchange.request.headers)
        decoded: tuple[Mapping[str, Any], Sequence[Any]] = ({}, ())
        for decoded in decode_list(body):  # noqa: B007 - the last is what counts
            yield
        defaults, items = decoded
        messages: list[SendMessage] = []
        problems: list[dict[str, Any]] = []
        for index, item in enumerate(items):
            try:
                message = message_of(item, defaults)
                message.validate()
                messages.append(message)
            except HttpError as error:
                problems.append({"Index": index, "Error": error.message})
            except ValidationError as error:
                problems.append({"Index": index, "Error": f"{NAMES[error.field]} {error.problem}"})
            if len(problems) == ERRORS:
                break
            if index % SLICE == SLICE - 1:
                yield
        if problems:
            first = f"nothing is accepted; the message with index {problems[0]['Index']}: {problems[0]['Error']}"
            raise HttpError(HTTPStatus.BAD_REQUEST, first, details={"Errors": problems})
        message_of((), {**COMPLETE, **defaults}).validate()  # also the defaults that no message needs
        entries = self._proxy.entries(messages, key)
        yield
        self._group.add(exchange, entries)

    def _accept(self, lists: Sequence[list[Entry]]) -> list[Any]:
        return [self._proxy.accept_together(entries) for entries in lists]

    def _accepted(self, exchange: Exchange, entries: list[Entry], result: None) -> None:
        # UUIDs, so nothing in them needs escaping
        ids = ", ".join([f'{{"ID": "{entry.message.message_id}"}}' for entry in entries])
        exchange.respond(HTTPStatus.ACCEPTED, f'{{"Messages": [{ids}]}}\n'.encode())

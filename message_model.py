"""What the service speaks of: errors, statuses and their transitions, messages and batches. Values only."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import fastsmsing
from fastsmsing import Message

__all__ = [
    "FINAL_STATUSES", "STATUS_OF", "TRANSITIONS", "Batch", "ClientResult", "ClosedError", "DuplicateMessageError",
    "Entry", "IdempotencyError", "MessageStatus", "OverloadedError", "Reason", "RepositoryUnavailableError",
    "SendMessage", "SendingResult", "SmsProxyError", "StatusTransitionError", "UnknownMessageError",
    "UnknownStatusError", "ValidationError", "check_transition", "map_to_internal_status", "refusal",
]  # fmt: skip

LONGEST_MESSAGE = 1_600  # code points: ten concatenated parts, as most providers limit it
LONGEST_NUMBER = 15  # digits (ITU-T E.164)
LONGEST_LIST = 1_000  # messages that are accepted together
LONGEST_TIME = 604_800.0  # seconds, a week: no MaxDelay and no MaxAge is longer


# Errors


class SmsProxyError(Exception):
    """The root of this module's errors."""


class ValidationError(SmsProxyError, ValueError):
    """The value of `field` is not acceptable; `problem` says why, without repeating it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field, self.problem = field, problem


class DuplicateMessageError(SmsProxyError):
    """The ID is stored already; `fingerprint` is what it was stored with."""

    def __init__(self, message_id: str, fingerprint: bytes | None = None) -> None:
        super().__init__(f"message {message_id} is stored already")
        self.message_id, self.fingerprint = message_id, fingerprint


class IdempotencyError(SmsProxyError):
    """An idempotency key came again with another message."""


class UnknownMessageError(SmsProxyError):
    """No message with this ID is stored."""


class StatusTransitionError(SmsProxyError):
    """`TRANSITIONS` does not allow this change of status."""


class UnknownStatusError(SmsProxyError):
    """FastSMSing reported a status that does not exist."""


class OverloadedError(SmsProxyError):
    """Too many messages are pending; try again later."""


class ClosedError(SmsProxyError):
    """The service is shutting down and accepts nothing more."""


class RepositoryUnavailableError(SmsProxyError):
    """The repository cannot be used just now (disk full, file locked); nothing was changed; try again later."""


# Statuses


class MessageStatus(str, Enum):
    """What the proxy says of a message."""

    ACCEPTED = "ACCEPTED"  # it will go out in the nearest batch, or FastSMSing has not reported on it yet
    NOT_FOUND = "NOT_FOUND"  # never accepted here, or forgotten
    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"
    DELIVERED = "DELIVERED"


class Reason(str, Enum):
    """Why the proxy gave a message up. As an update it makes a message `FAILED` that is still in the outbox; what was
    handed over or reported on is FastSMSing's to report."""

    REJECTED = "rejected"  # FastSMSing refuses it
    ATTEMPTS = "attempts"  # all attempts are used
    EXPIRED = "expired"  # older than its `max_age`
    CANCELLED = "cancelled"  # the caller does not want it sent any more


FINAL_STATUSES = frozenset({MessageStatus.FAILED, MessageStatus.DELIVERED})
TRANSITIONS: Mapping[MessageStatus, frozenset[MessageStatus]] = {
    MessageStatus.ACCEPTED: frozenset({MessageStatus.CONFIRMED, MessageStatus.FAILED, MessageStatus.DELIVERED}),
    MessageStatus.NOT_FOUND: frozenset(),
    MessageStatus.CONFIRMED: FINAL_STATUSES,
    MessageStatus.FAILED: frozenset(),
    MessageStatus.DELIVERED: frozenset(),
}


# The status that an update of a message leads to.
STATUS_OF: Mapping[MessageStatus | Reason, MessageStatus] = {
    **{status: status for status in MessageStatus}, **dict.fromkeys(Reason, MessageStatus.FAILED)
}  # fmt: skip


def check_transition(message_id: str, current: MessageStatus, status: MessageStatus) -> None:
    """Raises `UnknownMessageError` or `StatusTransitionError` for a change that is not allowed."""
    if status not in TRANSITIONS[current]:
        raise refusal(message_id, current, status)


def refusal(message_id: str, current: MessageStatus, update: MessageStatus | Reason) -> SmsProxyError:
    """Why a message with this status does not get the update."""
    if current is MessageStatus.NOT_FOUND:
        return UnknownMessageError(f"message {message_id} is not known")
    if isinstance(update, Reason):
        return StatusTransitionError(f"message {message_id} was handed over, so it is not given up")
    return StatusTransitionError(f"message {message_id} cannot go from {current.value} to {update.value}")


_INTERNAL: dict[str, MessageStatus] = {status: MessageStatus(status.value) for status in fastsmsing.MessageStatus}


def map_to_internal_status(status: object) -> MessageStatus:
    """The proxy's status for one of FastSMSing's; raises `UnknownStatusError`."""
    if isinstance(status, str) and (known := _INTERNAL.get(status)) is not None:
        return known
    word = isinstance(status, str) and len(status) <= 30 and status.replace("_", "").isalpha() and status.isascii()
    raise UnknownStatusError(f"unknown status {status if word else type(status).__name__}")


# Values


@dataclass(frozen=True, slots=True, init=False)
class SendMessage:
    """What a caller wants sent. Its `repr` shows nothing of it, so that logs stay private.

    `max_delay`: seconds that it may linger for a batch. `max_age`: seconds after which it is not sent any more.
    None: the service's default.
    """

    phone_number: str = field(repr=False)
    message: str = field(repr=False)
    max_delay: float | None = None
    max_age: float | None = None

    def __init__(
        self, phone_number: str, message: str, max_delay: float | None = None, max_age: float | None = None
    ) -> None:
        # As the one that a frozen dataclass has, in half of the time, which is a hundredth of a POST.
        _set_number(self, phone_number)
        _set_message(self, message)
        _set_max_delay(self, max_delay)
        _set_max_age(self, max_age)

    def validate(self) -> None:
        """Raises `ValidationError` unless this can be sent. The values may be of any type."""
        number, text = self.phone_number, self.message
        if not (isinstance(number, str) and 0 < len(number) <= LONGEST_NUMBER):
            raise ValidationError("phone_number", _problem(number, LONGEST_NUMBER))
        if not (isinstance(text, str) and 0 < len(text) <= LONGEST_MESSAGE):
            raise ValidationError("message", _problem(text, LONGEST_MESSAGE))
        if not (number.isascii() and number.isdigit()):
            raise ValidationError("phone_number", "must consist of the digits 0 to 9 only")
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError:  # could not be sent on
            raise ValidationError("message", "must not contain lone surrogates") from None
        if self.max_delay is not None and not _is_time(self.max_delay):
            raise ValidationError("max_delay", f"must be a number of seconds from 0 to {LONGEST_TIME:,.0f}")
        if self.max_age is not None and not (_is_time(self.max_age) and self.max_age > 0):
            problem = f"must be a number of seconds, more than 0 and at most {LONGEST_TIME:,.0f}"
            raise ValidationError("max_age", problem)

    def to_message(self, message_id: str) -> Message:
        """The message as FastSMSing gets it."""
        return Message(self.phone_number, self.message, message_id)


_set_number, _set_message, _set_max_delay, _set_max_age = (
    getattr(SendMessage, each.name).__set__ for each in fields(SendMessage)
)


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST_TIME


def _problem(value: object, longest: int) -> str:
    if not isinstance(value, str):
        return "must be a string"
    return f"must have at most {longest} characters" if value else "must not be empty"


@dataclass(frozen=True, slots=True)
class SendingResult:
    """The ID under which a message was accepted."""

    id: str


@dataclass(slots=True, eq=False)
class Entry:
    """A message in the outbox. Not frozen, because the repository sets the times when it saves or claims the entry.

    These are seconds on this process's monotonic clock, so that the age of a message is the same everywhere and no
    jump of the wall clock changes it.
    """

    message: Message
    fingerprint: bytes | None = None  # comes with an idempotency key and tells a repeat from a misuse
    linger: float = 0.0  # seconds from acceptance until it is due; infinity: only a full batch or a stop takes it
    default_linger: bool = False  # the caller said no `max_delay`: a start with a shorter default brings it forward
    max_age: float = math.inf  # seconds from acceptance until it expires
    accepted_at: float = 0.0
    due: float = 0.0  # the batch that it is in leaves now, full or not
    expires_at: float = math.inf  # it is not sent any more
    place: int = 0  # in the order of acceptance, while it is in the outbox; the repository's own


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries claimed together, in order of due. `lease` is the repository's own; parts of a batch share it."""

    entries: tuple[Entry, ...]
    lease: Any = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def ids(self) -> list[str]:
        """The IDs of the messages."""
        return [entry.message.message_id for entry in self.entries]

    @property
    def expires_at(self) -> float:
        """When the first of them expires, infinity for never."""
        return min((entry.expires_at for entry in self.entries), default=math.inf)

    def unexpired(self, now: float) -> Batch:
        """The part of the batch that has not expired."""
        return self.only(lambda entry: entry.expires_at > now)

    def only(self, keep: Callable[[Entry], bool]) -> Batch:
        """The part of the batch for which `keep` is true."""
        return replace(self, entries=tuple(filter(keep, self.entries)))


@dataclass(frozen=True, slots=True)
class ClientResult:
    """How one batch ended: `error` is None when FastSMSing took it, else that of the last attempt."""

    messages: tuple[Message, ...]
    error: BaseException | None
    attempt: int
    max_attempts: int | None

"""What every repository offers: the statuses of messages and the outbox, wherever they are kept."""
from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

from batch_outbox import ALMOST, Claim, look
from change_outbox import ChangeOutbox
from fastsmsing import Message
from message_model import Batch, Entry, MessageStatus, Reason

__all__ = [
    "ALMOST", "EXPIRE_STEP", "FORGET_STEP", "RETENTION", "Ages", "Cancelled", "Claim", "Repository", "look",
]  # fmt: skip

RETENTION = 3 * 24 * 3600.0  # seconds
FORGET_STEP = 500  # messages forgotten at a time: some ten microseconds to a millisecond
EXPIRE_STEP = 500  # messages that expire at a time


class Cancelled(Enum):
    """When a message was cancelled."""

    NOW = "now"  # by this call: it waited until now
    BEFORE = "before"


class Ages(NamedTuple):
    """Of the messages in the outbox, in seconds; 0.0 for none."""

    oldest: float = 0.0  # since the oldest was accepted
    past_due: float = 0.0  # since the first was due


class Repository(abc.ABC):
    """Keeps the statuses of messages and the outbox. Safe under any number of threads.

    Implementations differ in where they keep things and in nothing that callers can see. Any method
    may raise `RepositoryUnavailableError`, and then has changed nothing. A message is in the outbox
    from `save_all` until it is handed over, or an update says what became of it; there it waits, or is
    claimed. What is not in the outbox is forgotten `retention` seconds after its last change (0: never).
    """

    blocking = False  # whether methods may wait for a disk or a network: keep them off the serving thread
    durable = False  # whether the outbox outlives the process
    poll: float | None = None  # seconds between looks for what other processes saved; None: there are none

    @abc.abstractmethod
    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """Stores each entry as `ACCEPTED` and puts it into the outbox, all in one step.

        Returns for each, in order, None or why it is not stored: `DuplicateMessageError`, or
        `OverloadedError` when the outbox already holds `max_pending` messages. Due times and expiry count from
        the acceptance and outlive a restart.
        """

    @abc.abstractmethod
    def save_together(self, entries: Sequence[Entry], max_pending: int | None = None) -> Exception | None:
        """Stores all entries as `save_all` does, or none of them, in one step.

        Returns None or why nothing is stored: `DuplicateMessageError` of the first entry whose ID is stored
        already, also when there is no room, or `OverloadedError` when there is not room for all of them.
        """

    @abc.abstractmethod
    def get(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` when unknown."""

    @abc.abstractmethod
    def reason(self, message_id: str) -> Reason | None:
        """Why the proxy itself made the message `FAILED`; None for every other message."""

    @abc.abstractmethod
    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """Applies the updates in one step; returns why some could not be. What is updated leaves the outbox.

        A `Reason` is refused with a `StatusTransitionError` when the message is not in the outbox any more: it was
        handed over or reported on, so it is not ours to give up.
        """

    @abc.abstractmethod
    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[Batch]:
        """Takes the next batch, in order of due and then of acceptance, or tells when there will be one, in one step.

        A batch may leave when the first message that waits is due, or when `size` of them are due within
        `horizon` seconds, or when any waits and `flush` is set; it then holds up to `size` messages. Nobody
        else gets a claimed message before it is released. Its price grows neither with what waits nor with what
        is claimed.
        """

    @abc.abstractmethod
    def release(self, batch: Batch) -> None:
        """Puts claimed messages back into the outbox, each at its place; the batch may be a part of a claimed one."""

    @abc.abstractmethod
    def unsent(self, batch: Batch) -> Batch:
        """The part of a claimed batch that is still to be sent: in the outbox, and this process's. May block."""

    @abc.abstractmethod
    def handed_over(self, batch: Batch) -> None:
        """Takes messages that FastSMSing took out of the outbox, and erases their numbers and texts."""

    @abc.abstractmethod
    def cancel(self, message_id: str) -> Cancelled | None:
        """Makes a message that waits `FAILED` as cancelled, so that it is never sent; atomic against a claim.

        Of several calls for one message one is told `NOW`. None for a message that is claimed, handed over, final
        or unknown.
        """

    @abc.abstractmethod
    def expire(self) -> tuple[list[str], float]:
        """Makes a few messages that wait longer than their `max_age` `FAILED` as expired.

        Returns their IDs, and the seconds until it is worth calling again: 0 when there may be more, infinity
        when nothing that waits expires.
        """

    @abc.abstractmethod
    def backlog(self) -> int:
        """How many messages are in the outbox, claimed ones included."""

    @abc.abstractmethod
    def ages(self) -> Ages:
        """How old the messages in the outbox are, claimed ones included."""

    @abc.abstractmethod
    def forget(self) -> float | None:
        """Forgets a few messages whose retention is over; returns the seconds until it is to be called again, None
        for never."""

    @abc.abstractmethod
    def hasten(self, max_delay: float) -> None:
        """At a start: brings forward what lingers by an earlier default that was longer than this one."""

    @abc.abstractmethod
    def changes(self) -> ChangeOutbox:
        """The outbox of changes. Called once, before anything changes, and only by a process that has a webhook."""

    def holds(self, batch: Batch) -> bool:
        """Whether the batch is still this process's to send, as far as it knows. Never blocks."""
        return True

    def size(self) -> int:
        """Bytes on disk; 0 for none."""
        return 0

    def check(self) -> None:
        """Raises `RepositoryUnavailableError` when nothing could be written now."""

    def close(self) -> None:
        """Frees what it holds; later calls raise `RepositoryUnavailableError` where that matters."""

    def save(self, message_id: str, message: Message | None = None) -> None:
        """`save_all` for one message; raises what it returns. Without a `message` there is nothing to send."""
        entry = Entry(replace(message, message_id=message_id) if message else Message("", "", message_id))
        for error in self.save_all([entry]):
            if error is not None:
                raise error
        if message is None:
            self.handed_over(Batch((entry,)))

    def update(self, message_id: str, status: MessageStatus) -> None:
        """Raises `UnknownMessageError` or `StatusTransitionError`, and then changes nothing."""
        for error in self.update_all({message_id: status}).values():
            raise error

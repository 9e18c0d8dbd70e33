"""What every repository offers: statuses and the outbox, whatever keeps them."""
from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastsmsing import Message
from message_model import Batch, Entry, MessageStatus, Reason

__all__ = ["FORGET_STEP", "RETENTION", "Claim", "Repository", "time_to_claim"]

RETENTION = 3 * 24 * 3600.0  # seconds
FORGET_STEP = 500  # messages forgotten at a time: some ten microseconds to a millisecond


@dataclass(frozen=True, slots=True)
class Claim:
    """What a look into the outbox found.

    `waiting`: how many unclaimed messages remain, as far as the repository looked. `wait`: seconds until
    the oldest of them is due; None when only another message can make a batch leave.
    """

    batch: Batch | None = None
    waiting: int = 0
    wait: float | None = None


class Repository(abc.ABC):
    """Keeps the statuses of messages and the outbox. Safe under any number of threads.

    Implementations differ in where they keep things and in nothing that callers can see. Any method
    may raise `RepositoryUnavailableError`, and then has changed nothing. A message is in the outbox
    from `save_all` until it is handed over, or an update says what became of it. What is not in the
    outbox is forgotten `retention` seconds after its last change (0: never).
    """

    blocking = False  # whether methods may wait for a disk or a network: keep them off the serving thread
    durable = False  # whether the outbox outlives the process
    poll: float | None = None  # seconds between looks for what other processes saved; None: there are none

    @abc.abstractmethod
    def save_all(self, entries: Sequence[Entry], max_pending: int | None = None) -> list[Exception | None]:
        """Stores each entry as `ACCEPTED` and puts it into the outbox, all in one step.

        Returns for each, in order, None or why it is not stored: `DuplicateMessageError`, or
        `OverloadedError` when the outbox already holds `max_pending` messages.
        """

    @abc.abstractmethod
    def get(self, message_id: str) -> MessageStatus:
        """The status, `NOT_FOUND` when unknown."""

    @abc.abstractmethod
    def reason(self, message_id: str) -> Reason | None:
        """Why the proxy itself made the message `FAILED`; None for every other message."""

    @abc.abstractmethod
    def update_all(self, updates: Mapping[str, MessageStatus | Reason]) -> dict[str, Exception]:
        """Applies the updates in one step; returns why some could not be. What is updated leaves the outbox."""

    @abc.abstractmethod
    def claim(self, size: int, max_delay: float | None) -> Claim:
        """Takes the next batch, in order of acceptance, or tells when there will be one, in one step.

        A batch may leave when `size` messages wait or the oldest has waited `max_delay` seconds (None:
        for ever), and then holds up to `size` messages. Nobody else gets a claimed message before it is
        released.
        """

    @abc.abstractmethod
    def release(self, batch: Batch) -> None:
        """Puts claimed messages back to the front of the outbox."""

    @abc.abstractmethod
    def handed_over(self, batch: Batch) -> None:
        """Takes messages that FastSMSing took out of the outbox, and erases their numbers and texts."""

    @abc.abstractmethod
    def backlog(self) -> int:
        """How many messages are in the outbox, claimed ones included."""

    @abc.abstractmethod
    def oldest(self) -> float | None:
        """Seconds since the oldest message in the outbox was accepted; None when it is empty."""

    @abc.abstractmethod
    def forget(self) -> float | None:
        """Forgets a few messages that are due; returns the seconds until it is to be called again, None for never."""

    def holds(self, batch: Batch) -> bool:
        """Whether the batch is still this process's to send. Never blocks."""
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


def time_to_claim(waiting: int, size: int, age: float, max_delay: float | None) -> float | None:
    """Seconds until a batch may leave, 0 for now, when the oldest of `waiting` messages is so old."""
    if waiting >= size:
        return 0.0
    if max_delay is None or not waiting:
        return None
    return max_delay - age if max_delay - age > 1e-6 else 0.0  # shorter waits may be lost in rounding

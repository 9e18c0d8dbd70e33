"""The outbox of the webhook: the changes of a status that the shop has not been told of, wherever they are kept."""
from __future__ import annotations

import abc
import math
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from batch_outbox import Claim
from message_model import STATUS_OF, MessageStatus, Reason

__all__ = ["GATHER", "Change", "ChangeBody", "ChangeOutbox"]

GATHER = 1.0  # seconds that changes gather for, so that a body has more than one


class Change(NamedTuple):
    """A message and its newest status."""

    message_id: str
    status: MessageStatus
    reason: Reason | None = None  # why the proxy itself made it `FAILED`

    @classmethod
    def of(cls, message_id: str, update: MessageStatus | Reason) -> Change:
        """The change that an update of a message is."""
        return cls(message_id, STATUS_OF[update], update if isinstance(update, Reason) else None)


@dataclass(frozen=True, slots=True)
class ChangeBody:
    """What one request tells, however often it is tried. Equal values make the same bytes."""

    id: str
    timestamp: float  # of its making, in seconds since 1970, whole milliseconds
    changes: tuple[Change, ...]  # of each message one
    # When the retention of its last message is over, on this process's monotonic clock: then it is dropped.
    expires_at: float = field(default=math.inf, compare=False)

    @classmethod
    def made(cls, changes: Iterable[Change], now: float, expires_at: float) -> ChangeBody:
        """A new body, with an ID of its own; `now` is the wall clock's."""
        return cls(f"msg_{uuid.uuid4()}", round(now, 3), tuple(changes), expires_at)

    def __len__(self) -> int:
        return len(self.changes)

    @property
    def ids(self) -> list[str]:
        """The IDs of the messages."""
        return [change.message_id for change in self.changes]

    def unexpired(self, now: float) -> ChangeBody:
        """The body, without its changes once it has expired."""
        return self if self.expires_at > now else replace(self, changes=())


class ChangeOutbox(abc.ABC):
    """The changes after `ACCEPTED` that the shop has not been told of. Safe under any number of threads.

    A change is in it from the moment when it is stored until a body with it, or with a newer change of the same
    message, is handed over. For one message no older status is told after a newer one: at most one body is under way, a
    change that happens meanwhile goes into a later one, and a body tells the newest status at the time of its making.

    A message whose retention is over is forgotten, and its change with it. A start tells what has changed since the
    last body that was handed over, or from now on if there was none. Any method may raise `RepositoryUnavailableError`,
    and then has changed nothing.
    """

    durable = False  # whether it outlives the process, and a body under way with it
    poll: float | None = None  # seconds between looks for what other processes changed; None: there are none

    @abc.abstractmethod
    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[ChangeBody]:
        """Makes the next body, of at most `size` messages, or tells when there will be one, in one step.

        As `Repository.claim`, with changes in place of messages; each is due `GATHER` seconds after it happened, or
        a little later. A body that was claimed before and not handed over, because its process died or released it,
        comes first, with the same ID, timestamp and changes.

        While a body is under way, in this process or in another one, the claim is empty, also its `waiting`; whoever
        hands the body over looks again.
        """

    @abc.abstractmethod
    def handed_over(self, body: ChangeBody) -> None:
        """The receiver took the body, or it is dropped. Does nothing when another process has it by now."""

    @abc.abstractmethod
    def release(self, body: ChangeBody, /) -> None:
        """No request carries the body any more, and it is not handed over: it can be claimed again as it is."""

    @abc.abstractmethod
    def pending(self) -> tuple[int, float]:
        """How many messages are not told yet, about, and how many seconds ago the first of these changed, 0.0 for none;
        a body under way counts."""

    def holds(self, body: ChangeBody) -> bool:
        """Asked before each request: whether the body is still this process's to tell, for as long as a request may
        take. Where that depends on a lease, it is renewed here. May block."""
        return True

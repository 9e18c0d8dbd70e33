"""What the scheduler and the dispatcher know of an outbox, whatever waits in it: messages for FastSMSing, or changes
of a status for the webhook."""
from __future__ import annotations

import bisect
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["ALMOST", "Claim", "Claimed", "Outbox", "look"]

ALMOST = 1e-6  # seconds; what is due so soon is due now, since shorter waits may be lost in rounding


class Claimed(Sized, Protocol):
    """What is claimed at a time and sent in one request: a batch of messages, or a body of changes."""

    @property
    def ids(self) -> list[str]:
        """The IDs of the messages."""

    @property
    def expires_at(self) -> float:
        """When the first of it expires, on this process's monotonic clock; infinity for never."""

    def unexpired(self: B, now: float) -> B:
        """The part of it that has not expired; it may be empty."""


B = TypeVar("B", bound=Claimed)
B_co = TypeVar("B_co", bound=Claimed, covariant=True)


@dataclass(frozen=True, slots=True)
class Claim(Generic[B_co]):
    """What a look into an outbox found: a batch, or when there will be one."""

    batch: B_co | None = None
    waiting: int = 0  # unclaimed messages that remain; 0 only if there are none
    due_in: float = math.inf  # seconds until the first of them is due
    full_in: float = math.inf  # seconds until the `size`-th of them comes within the horizon
    near: int = 0  # how many of them are due within the horizon, `size` at the most


class Outbox(Protocol[B]):
    """Where batches are claimed; `Repository` and `ChangeOutbox` are. Both methods may raise
    `RepositoryUnavailableError`, and then have changed nothing."""

    @property
    def durable(self) -> bool:
        """Whether it outlives the process."""

    @property
    def poll(self) -> float | None:
        """Seconds between looks for what other processes put there; None: there are none."""

    def claim(self, size: int, horizon: float, *, flush: bool = False) -> Claim[B]:
        """Takes the next batch, or tells when there will be one."""

    def release(self, batch: B, /) -> None:
        """Puts a claimed batch back."""


def look(
    dues: Sequence[float], now: float, size: int, horizon: float, waiting: int, flush: bool = False
) -> Claim[Any] | None:
    """The rule of every claim: None when a batch leaves now, else when one will.

    `dues`: when the first messages that wait are due, in order, `size` of them or all. `now` is on the same clock.
    A batch leaves when the first message is due; or when `size` messages are due within the horizon; or at a stop.
    """
    if dues and (flush or dues[0] - now <= ALMOST):
        return None
    near = bisect.bisect_right(dues, now + horizon + ALMOST)
    if near >= size:
        return None
    full_in = dues[size - 1] - now - horizon if len(dues) >= size else math.inf
    return Claim(None, waiting, dues[0] - now if dues else math.inf, full_in, near)

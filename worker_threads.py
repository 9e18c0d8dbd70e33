"""What the threads in the background share: how they are scheduled, how long they wait, how they repeat a change."""
from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from incident_log import Incident
from message_model import RepositoryUnavailableError

__all__ = ["GRACE", "REPOSITORY_RETRY", "Deadline", "persist", "work_in_background"]

T = TypeVar("T")

GRACE = 1.0  # seconds that all the last steps of a stop together get when its deadline has passed
REPOSITORY_RETRY = 1.0  # seconds, longest wait before the repository is tried again


class Deadline:
    """A moment by which something is over; with None as `seconds`, never. Immutable."""

    def __init__(self, seconds: float | None) -> None:
        self._at = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds until then, at least 0, and no more than a lock can wait for."""
        return min(max(0.0, self._at - time.monotonic()), threading.TIMEOUT_MAX)

    def or_in(self, seconds: float) -> Deadline:
        """The later one of this and so many seconds from now."""
        return self if self.left >= seconds else Deadline(seconds)


def work_in_background() -> None:
    """Lets the thread that accepts messages run on when it wakes this one (Linux: sched(7), SCHED_BATCH).

    Otherwise every wake-up on a busy processor costs two changes of thread, only to find the interpreter's lock
    held (measured on one core: a fifth of the throughput). The share of the processor stays the same.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or one that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def persist(change: Callable[[], T], over: threading.Event, incident: Incident) -> T:
    """Repeats a change until the repository can make it; once `over` is set, its error is raised."""
    wait = 0.1
    while True:
        try:
            result = change()
        except RepositoryUnavailableError as error:
            incident.failed(error)
            if over.wait(wait):
                raise
            wait = min(REPOSITORY_RETRY, wait * 2)
        else:
            incident.ended()
            return result

"""What threads in the background share: how they are scheduled, how they repeat a change, how long they wait."""
from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from incident_log import Incident
from message_model import RepositoryUnavailableError

__all__ = ["GRACE", "LONGEST_WAIT", "REPOSITORY_RETRY", "persist", "rest", "work_in_background"]

LONGEST_WAIT = 3_600.0  # seconds; bounds what a provider can ask for with `retry_after`
GRACE = 1.0  # seconds that the last steps of a stop get even when its deadline has passed
REPOSITORY_RETRY = 1.0  # seconds, longest wait before the repository is tried again


def work_in_background() -> None:
    """Lets the thread that accepts messages run on when it wakes this one (Linux: sched(7), SCHED_BATCH).

    Otherwise every wake-up on a busy processor costs two changes of thread, only to find the interpreter's lock
    held (measured on one core: a fifth of the throughput). The share of the processor stays the same.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system, or one that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def persist(change: Callable[[], Any], over: threading.Event, incident: Incident) -> Any:
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


def rest(deadline: float | None) -> float:
    """Seconds until the deadline, and a little more when it is close or past."""
    return GRACE if deadline is None else min(max(GRACE, deadline - time.monotonic()), LONGEST_WAIT)

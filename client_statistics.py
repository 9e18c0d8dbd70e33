"""How well the provider does, batch by batch."""
from __future__ import annotations

import threading
from dataclasses import dataclass

from incident_log import describe
from message_model import ClientResult

__all__ = ["ClientStatistics", "Statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """How well the provider does."""

    success: int = 0  # batches that it took
    failed: int = 0  # batches that it rejected, or that were given up
    messages: int = 0  # in all these batches
    attempts: int = 0
    last_error: str | None = None

    @property
    def success_percentage(self) -> float:
        """Of the batches; 100.0 when there was none yet."""
        batches = self.success + self.failed
        return 100.0 * self.success / batches if batches else 100.0


class ClientStatistics:
    """Adds up the results of batches. Thread-safe, in constant memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards changes of _sum; reading it is atomic
        self._sum = Statistics()

    def send(self, result: ClientResult) -> None:
        """Counts one batch."""
        failed = result.error is not None
        with self._lock:
            old = self._sum
            self._sum = Statistics(
                old.success + (not failed), old.failed + failed,
                old.messages + len(result.messages), old.attempts + result.attempt,
                old.last_error if result.error is None else describe(result.error),
            )  # fmt: skip

    def get_statistics(self) -> Statistics:
        """The figures of one moment, already a little old when they are read."""
        return self._sum

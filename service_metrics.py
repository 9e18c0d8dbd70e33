"""Counters and histograms for monitoring."""
from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from message_model import FINAL_STATUSES, Reason

__all__ = ["FAMILIES", "Family", "Metrics"]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, type, help, and from the start every value of its label and every bucket's bound."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    bounds: tuple[float, ...] = ()


_SHORT = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
_LONG = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)  # seconds
_RESULTS = ("ok", "rejected", "error")
FAMILIES = (
    Family("smsproxy_messages_accepted_total", "counter", "Messages accepted."),
    Family("smsproxy_messages_handed_over_total", "counter", "Messages that FastSMSing took."),
    Family("smsproxy_messages_given_up_total", "counter", "Messages given up, by reason.", "reason",
           tuple(reason.value for reason in Reason)),
    Family("smsproxy_messages_final_total", "counter", "Messages that reached a final status.", "status",
           tuple(sorted(status.value for status in FINAL_STATUSES))),
    Family("smsproxy_batches_total", "counter", "Batches by how they ended; a rejected one is split.", "result",
           ("handed_over", "split", "given_up")),
    Family("smsproxy_batch_messages", "histogram", "Messages in a request.",
           bounds=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
    Family("smsproxy_provider_requests_total", "counter", "Requests to FastSMSing, billed each.", "result", _RESULTS),
    Family("smsproxy_provider_request_duration_seconds", "histogram", "Duration of requests to FastSMSing.",
           "result", _RESULTS, _SHORT),
    Family("smsproxy_handover_wait_seconds", "histogram", "Time from acceptance to the hand-over.",
           bounds=_LONG),
    Family("smsproxy_final_status_seconds", "histogram", "Time from acceptance to a final status.", bounds=_LONG),
    Family("smsproxy_status_updates_total", "counter", "Delivery reports, by what became of them.", "result",
           ("applied", "refused", "unknown_message", "unknown_status", "error")),
    Family("smsproxy_provider_requests_in_flight", "gauge", "Requests to FastSMSing under way."),
    Family("smsproxy_requests_saved", "gauge", "Messages handed over less all requests made."),
    Family("smsproxy_pending_messages", "gauge", "Messages accepted and not yet handed over."),
    Family("smsproxy_pending_messages_limit", "gauge", "With so many pending messages no more are accepted."),
    Family("smsproxy_oldest_pending_message_age_seconds", "gauge", "Age of the oldest pending message, 0 without one."),
    Family("smsproxy_database_bytes", "gauge", "Size of the database file, 0 without one."),
    Family("smsproxy_circuit_breaker_open_seconds", "gauge", "Time since requests stopped, 0 while they are made."),
    Family("smsproxy_circuit_breaker_next_try_seconds", "gauge", "Time until the next request, if open."),
)  # fmt: skip


class Metrics:
    """Counters and histograms for monitoring, all at 0 from the start. Thread-safe."""

    def __init__(self) -> None:
        self._bounds = {family.name: family.bounds for family in FAMILIES}
        self._lock = threading.Lock()  # guards _rows
        # A counter's value; of a histogram the count of each bucket, of what exceeds them all, and the sum.
        self._rows: dict[tuple[str, str], list[float]] = {
            (family.name, value): [0.0] * (len(family.bounds) + 2 if family.bounds else 1)
            for family in FAMILIES if family.kind != "gauge" for value in family.values
        }  # fmt: skip

    def add(self, name: str, label: str = "", amount: float = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._rows[name, label][0] += amount

    def observe(self, name: str, values: Iterable[float], label: str = "") -> None:
        """Adds values to a histogram."""
        bounds = self._bounds[name]
        with self._lock:
            row = self._rows[name, label]
            for value in values:
                row[bisect.bisect_left(bounds, value)] += 1
                row[-1] += value

    def total(self, name: str) -> float:
        """The sum of a counter over the values of its label."""
        with self._lock:
            return sum(row[0] for (each, _), row in self._rows.items() if each == name)

    def rows(self) -> dict[tuple[str, str], list[float]]:
        """The figures so far by name and value of the label: one for a counter; for a histogram the count of each
        bucket, the count beyond the last, and the sum. They are soon stale."""
        with self._lock:
            return {key: list(row) for key, row in self._rows.items()}

"""Metrics and their text for Prometheus: counters, gauges and histograms, as attributes of one `Metrics`."""
from __future__ import annotations

import bisect
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from message_model import FINAL_STATUSES, Reason

__all__ = ["Age", "Counter", "Gauge", "Histogram", "KindCounter", "Metric", "MetricSet", "Metrics", "WebhookMetrics"]

ANY = ("",)  # the value of the label of a metric that has no label
KINDS = 20  # values of a label that takes what comes: each is a series that is kept for ever
OTHER = "other"  # what comes after these
KIND = re.compile(r"[\w .-]{1,100}")  # needs no escaping


class Metric:
    """One metric: its name, what it says, its label with every value that there is from the start. Thread-safe."""

    kind = ""

    def __init__(self, name: str, says: str, label: str = "", values: Sequence[str] = ANY) -> None:
        self.name, self.says, self._label = name, says, label
        self._lock = threading.Lock()  # guards what a subclass keeps for each value
        self._labels = {value: f'{label}="{value}"' if label else "" for value in values}

    def text(self) -> Iterator[str]:
        """Its lines in the text format 0.0.4; none when it has no figure."""
        if lines := list(self._samples()):
            yield from (f"# HELP {self.name} {self.says}", f"# TYPE {self.name} {self.kind}", *lines)

    def _samples(self) -> Iterator[str]:
        raise NotImplementedError

    def _series(self, suffix: str = "", *labels: str) -> str:
        joined = ",".join(filter(None, labels))
        return f"{self.name}{suffix}{{{joined}}}" if joined else self.name + suffix


class Counter(Metric):
    """A number that only grows, for each value of its label."""

    kind = "counter"

    def __init__(self, name: str, says: str, label: str = "", values: Sequence[str] = ANY) -> None:
        super().__init__(name, says, label, values)
        self._counts = dict.fromkeys(values, 0.0)

    def add(self, amount: float = 1, value: str = "") -> None:
        """Counts."""
        with self._lock:
            self._counts[value] += amount

    @property
    def total(self) -> float:
        """The sum over the values of the label."""
        with self._lock:
            return sum(self._counts.values())

    def count(self, value: str = "") -> float:
        """The number for one value of the label."""
        return self._counts[value]

    def _samples(self) -> Iterator[str]:
        for value, labels in list(self._labels.items()):
            yield f"{self._series('', labels)} {self._counts[value]:.15g}"


class KindCounter(Counter):
    """A counter whose label takes the values that come, the first `KINDS` of them; the others count as "other"."""

    def __init__(self, name: str, says: str, label: str) -> None:
        super().__init__(name, says, label, (OTHER,))

    def add(self, amount: float = 1, value: str = OTHER) -> None:
        """Counts."""
        with self._lock:
            if value not in self._counts:
                if len(self._counts) <= KINDS and KIND.fullmatch(value):
                    self._counts[value] = 0.0
                    self._labels[value] = f'{self._label}="{value}"'
                else:
                    value = OTHER
            self._counts[value] += amount


class Gauge(Metric):
    """The present figure of something; None while nobody knows it, and then it is left out."""

    kind = "gauge"

    def __init__(self, name: str, says: str, kind: str = "gauge") -> None:
        super().__init__(name, says)
        self.kind = kind
        self.value: float | None = 0.0

    def _samples(self) -> Iterator[str]:
        value = self.value
        if value is not None:
            yield f"{self.name} {value:.15g}"


class Age(Metric):
    """The seconds since something happened last; left out until it does."""

    kind = "gauge"

    def __init__(self, name: str, says: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name, says)
        self._clock = clock
        self._at: float | None = None

    def happened(self) -> None:
        """It happens now."""
        self._at = self._clock()

    def _samples(self) -> Iterator[str]:
        if self._at is not None:
            yield f"{self.name} {self._clock() - self._at:.15g}"


class Histogram(Metric):
    """How many values fell into each bucket, and their sum, for each value of its label."""

    kind = "histogram"

    def __init__(
        self, name: str, says: str, bounds: Sequence[float], label: str = "", values: Sequence[str] = ANY
    ) -> None:
        super().__init__(name, says, label, values)
        self._bounds = bounds
        # The count of each bucket, of what exceeds them all, and the sum.
        self._rows = {value: [0.0] * (len(bounds) + 2) for value in values}

    def observe(self, observed: Iterable[float], value: str = "") -> None:
        """Adds these. It looks for the bounds among them, since a batch has more of them than there are bounds."""
        ordered, counted = sorted(observed), 0
        with self._lock:
            row = self._rows[value]
            for place, bound in enumerate(self._bounds):
                if counted == len(ordered):
                    break
                upto = bisect.bisect_right(ordered, bound)
                row[place] += upto - counted
                counted = upto
            row[-2] += len(ordered) - counted
            row[-1] += sum(ordered)

    def load(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Takes over what was counted elsewhere: for values of the label the counts of each bucket, of what exceeds
        them all, and the sum."""
        with self._lock:
            self._rows.update({value: list(row) for value, row in rows.items()})

    @property
    def total(self) -> float:
        """How many were observed."""
        with self._lock:
            return sum(sum(row[:-1]) for row in self._rows.values())

    def _samples(self) -> Iterator[str]:
        for value, labels in self._labels.items():
            with self._lock:
                row = list(self._rows[value])
            total = 0.0
            for bound, count in zip((*self._bounds, "+Inf"), row, strict=False):  # the last of the row is the sum
                total += count
                limit = f'le="{bound}"'
                yield f"{self._series('_bucket', labels, limit)} {total:.15g}"
            yield f"{self._series('_sum', labels)} {row[-1]:.15g}"
            yield f"{self._series('_count', labels)} {total:.15g}"


class MetricSet:
    """Metrics that are attributes of it."""

    def text(self) -> Iterator[str]:
        """The lines of all of them in the text format 0.0.4; soon stale."""
        for metric in vars(self).values():
            if isinstance(metric, Metric):
                yield from metric.text()


SHORT = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
LONG = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)  # seconds
LINGERS = (0.0, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0)  # seconds
REQUEST_RESULTS = ("ok", "rejected", "error")


class WebhookMetrics(MetricSet):
    """What is counted of the webhook; all at 0 without one. Thread-safe."""

    def __init__(self) -> None:
        self.webhook_requests = Counter("smsproxy_webhook_requests_total", "Requests to the webhook's receiver.",
                                        "result", ("ok", "error"))  # fmt: skip
        self.webhook_pending = Gauge("smsproxy_webhook_pending_messages", "Messages whose change is not told yet.")
        self.webhook_oldest = Gauge("smsproxy_webhook_oldest_pending_seconds",
                                    "Time since the first change that is not told yet, 0 without one.")  # fmt: skip


class ProviderMetrics(WebhookMetrics):
    """What is counted of the requests to FastSMSing. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Counter("smsproxy_provider_requests_total", "Requests to FastSMSing, billed each.", "result",
                                REQUEST_RESULTS)  # fmt: skip
        self.request_duration = Histogram("smsproxy_provider_request_duration_seconds",
                                          "Duration of requests to FastSMSing.", SHORT,
                                          "result", REQUEST_RESULTS)  # fmt: skip
        self.errors = KindCounter("smsproxy_provider_errors_total",
                                  "Requests to FastSMSing that failed or were rejected, by type and number of the"
                                  " error.", "error")  # fmt: skip
        self.last_success = Age("smsproxy_provider_last_success_age_seconds",
                                "Time since a request to FastSMSing last succeeded; missing before.")  # fmt: skip
        self.in_flight = Gauge("smsproxy_provider_requests_in_flight", "Requests to FastSMSing under way.")
        self.breaker_open = Gauge("smsproxy_circuit_breaker_open_seconds",
                                  "Time since requests stopped, 0 while they are made.")  # fmt: skip
        self.next_try = Gauge("smsproxy_circuit_breaker_next_try_seconds", "Time until the next request, if open.")
        self.stand_in = Gauge("smsproxy_provider_stand_in", "1 if the provider is the stand-in, which sends nothing.")


class Metrics(ProviderMetrics):
    """What the domain counts, all at 0 from the start. Thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted = Counter("smsproxy_messages_accepted_total", "Messages accepted.")
        self.refused = Counter("smsproxy_refused_total", "Messages refused with a 503, by cause.", "reason",
                               ("queue_full", "stopping", "database"))  # fmt: skip
        self.handed_over = Counter("smsproxy_messages_handed_over_total", "Messages that FastSMSing took.")
        self.given_up = Counter("smsproxy_messages_given_up_total", "Messages given up, by reason.", "reason",
                                [reason.value for reason in Reason])  # fmt: skip
        self.final = Counter("smsproxy_messages_final_total", "Messages that reached a final status.", "status",
                             sorted(status.value for status in FINAL_STATUSES))  # fmt: skip
        self.batches = Counter("smsproxy_batches_total", "Batches by how they ended; one with bad messages is split.",
                               "result", ("handed_over", "split", "given_up"))  # fmt: skip
        self.batch_messages = Histogram("smsproxy_batch_messages", "Messages in a request.",
                                        (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))  # fmt: skip
        self.lead_delay = Histogram("smsproxy_batch_lead_delay_seconds",
                                    "Linger of each batch's first message, on whose account the request is paid.",
                                    LINGERS)  # fmt: skip
        self.handover_wait = Histogram("smsproxy_handover_wait_seconds", "Time from acceptance to the hand-over.", LONG)
        self.final_time = Histogram("smsproxy_final_status_seconds", "Time from acceptance to a final status.", LONG)
        self.reports = Counter("smsproxy_status_updates_total", "Delivery reports, by what became of them.", "result",
                               ("applied", "refused", "unknown_message", "unknown_status", "error"))  # fmt: skip
        self.last_report = Age("smsproxy_last_status_update_age_seconds",
                               "Time since a delivery report was last applied; missing before.")  # fmt: skip
        self.unreported = Gauge("smsproxy_messages_unreported",
                                "Messages handed over that are not final yet, of those since the start. Instances that"
                                " share an outbox have it as the sum only.")  # fmt: skip
        self.requests_saved = Gauge("smsproxy_requests_saved", "Messages handed over less all requests made.")
        self.pending = Gauge("smsproxy_pending_messages", "Messages accepted and not yet handed over.")
        self.pending_limit = Gauge("smsproxy_pending_messages_limit",
                                   "With so many pending messages no more are accepted.")  # fmt: skip
        self.oldest_age = Gauge("smsproxy_oldest_pending_message_age_seconds",
                                "Age of the oldest pending message, 0 without one.")  # fmt: skip
        self.past_due = Gauge("smsproxy_oldest_past_due_seconds",
                              "Time since the first pending message was due, 0 if none is.")  # fmt: skip
        self.database_bytes = Gauge("smsproxy_database_bytes", "Size of the database, 0 without one.")

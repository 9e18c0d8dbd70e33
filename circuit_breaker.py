"""Stops all requests but the probe while FastSMSing is away: a rule, without threads, clock or I/O.

A request that fails may be billed, and while FastSMSing is away all of them fail. So the first failure stops all
requests (the breaker is *open*) but one at a time, the *probe*, after a backoff that doubles. Any request that
FastSMSing answers closes the breaker, with a rejection, too. A probe that hangs gives up its place after
`PROBE_PATIENCE`. As long as one batch alone fails again and again, that says nothing new about FastSMSing, and the
backoff does not double: the next batch that comes waits for the shortest. Once another fails, too, it is an outage.
"""
from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["DRAIN_BACKOFF", "PROBE_PATIENCE", "SUSPICIOUS", "CircuitBreaker"]

DRAIN_BACKOFF = 1.0  # seconds; longest backoff during a drain, whose time is short
# Failures after which a message may be to blame: so many in a row are no accident while one request in ten fails.
SUSPICIOUS = 3
PROBE_PATIENCE = 60.0  # seconds until another request may be the probe; most clients give up after 10 to 30


class CircuitBreaker:
    """Stops all requests but the probe while FastSMSing is away. The owner's lock guards it."""

    def __init__(self, backoff: Callable[[int], float]) -> None:
        self._backoff = backoff  # seconds to wait after so many failures in a row
        self.opened_at: float | None = None  # None: closed
        self.requests = 0  # that failed since it opened
        self.next_try = 0.0
        self.asked_until = 0.0  # before that FastSMSing wants no request
        self.answered_at = -math.inf  # when FastSMSing last answered a request
        self.longest_backoff = math.inf
        self._probes = 0  # that failed since it opened
        self._failures = 0  # in a row: the first and the probes; while one batch alone failed, it counts once
        self._alone: object = None  # that batch
        self._probe: object = None
        self._probe_since = 0.0

    @property
    def open(self) -> bool:
        """Whether requests have stopped, but for the probe."""
        return self.opened_at is not None

    @property
    def suspicious(self) -> bool:
        """Whether so many probes have failed that it may be for the messages in them."""
        return self.open and self._probes >= SUSPICIOUS

    def wait(self, now: float) -> float:
        """Seconds until a request may start, 0 for now, unless the end of the probe comes before."""
        if not self.open:
            return 0.0
        until = self.next_try if self._probe is None else max(self.next_try, self._probe_since + PROBE_PATIENCE)
        return max(0.0, until - now)

    def begin(self, request: object, now: float) -> None:
        """A request starts, after `wait` said that it may."""
        if self.open:
            self._probe, self._probe_since = request, now

    def failed(self, request: object, retry_after: float, now: float) -> bool:
        """A request failed for a reason that may pass; returns whether that opened the breaker."""
        self.asked_until = max(self.asked_until, now + retry_after)
        opened = not self.open
        if opened:
            self.opened_at, self.requests, self._probes = now, 0, 0
        self.requests += 1
        if opened or request is self._probe:
            self._probes += not opened
            if opened:
                self._failures, self._alone = 1, request
            elif request is not self._alone:
                self._failures, self._alone = self._failures + 1, None
            self._probe, self.next_try = None, now + self.backoff(self._failures)
        self.next_try = max(self.next_try, self.asked_until)  # also for one that started before it opened
        return opened

    def answered(self, now: float) -> tuple[float, int] | None:
        """FastSMSing answered; returns for how many seconds and failed requests the breaker was open, if it was."""
        self.answered_at, self.asked_until = now, 0.0
        if self.opened_at is None:
            return None
        seconds, self.opened_at, self._probe = now - self.opened_at, None, None
        return seconds, self.requests

    def ended(self, request: object) -> None:
        """However a request ended: the probe's place is free again."""
        if request is self._probe:
            self._probe = None

    def backoff(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.longest_backoff, self._backoff(failures))

    def open_for(self, now: float) -> float:
        """Seconds since it opened; 0 while it is closed, and only then."""
        return 0.0 if self.opened_at is None else max(1e-3, now - self.opened_at)

    def hasten(self, now: float) -> None:
        """From now on no wait is longer than `DRAIN_BACKOFF`, except where FastSMSing asks for it."""
        self.longest_backoff = DRAIN_BACKOFF
        self.next_try = min(self.next_try, max(now + DRAIN_BACKOFF, self.asked_until))

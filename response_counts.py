"""How many responses there were and how long they took, by route and status; counted once an iteration of the loop."""
from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict

__all__ = ["DURATIONS", "ResponseCounts"]

# Seconds; bounds for the time from a whole request to its response.
DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ResponseCounts:
    """For the loop's thread. Whoever responds counts in `new`: by route, status, and when the request was whole."""

    def __init__(self) -> None:
        self.new: dict[tuple[str, int, float], int] = {}
        # How many took as long as each of `DURATIONS`, how many longer, and their sum.
        self._rows: defaultdict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0] * (len(DURATIONS) + 2))

    def count(self, now: float) -> None:
        """The responses in `new` are made now; those to requests that came together count as one."""
        for (route, status, began), count in self.new.items():
            row, seconds = self._rows[route, status], now - began
            row[bisect_left(DURATIONS, seconds)] += count
            row[-1] += seconds * count
        self.new.clear()

    def by_status(self) -> Counter[tuple[str, int]]:
        """How many, by route and status."""
        return Counter({key: round(sum(row[:-1])) for key, row in self._rows.items()})

    def durations(self) -> dict[str, list[float]]:
        """By route: how many took as long as each of `DURATIONS`, how many longer, and their sum."""
        rows: dict[str, list[float]] = {}
        for (route, _), row in self._rows.items():
            rows[route] = [a + b for a, b in zip(row, rows.get(route, [0.0] * len(row)), strict=True)]
        return rows
